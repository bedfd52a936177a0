//! `/metrics`: the daemon in figures, as Prometheus reads them.
//!
//! Enters: a host. Leaves: OpenMetrics text. Invariant: names and units are Prometheus's (base units, `_total` for what only grows); a series is there as long as what it is
//! about is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::cache::CacheStats;
use crate::host::{Host, RepositoryFigures, SinceOpen, VolumeFigures};
use crate::nbd::{CommandCount, TIMES};

/// What the answer is.
pub const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All of it.
pub async fn text(host: &Arc<Host>, up: Duration) -> Result<String, fmt::Error> {
    let volumes = host.figures().await;
    let all = All { volumes, repositories: host.repositories(), cache: host.cache().stats(), up };
    let mut registry = Registry::with_prefix("horcrux");
    registry.register_collector(Box::new(all));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

/// What is told, all of one moment.
#[derive(Debug)]
struct All {
    volumes: Vec<VolumeFigures>,
    repositories: Vec<RepositoryFigures>,
    cache: CacheStats,
    up: Duration,
}

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(&mut encoder);
        out.info(
            "build",
            "The release that runs",
            [vec![("version", env!("CARGO_PKG_VERSION").to_owned())]],
        )?;
        out.gauge(
            "uptime",
            "Time since the daemon started",
            Some(Unit::Seconds),
            [(vec![], self.up.as_secs_f64())],
        )?;
        self.encode_cache(&mut out)?;
        self.encode_volumes(&mut out)?;
        self.encode_requests(&mut out)?;
        self.encode_repositories(&mut out)
    }
}

/// The labels of a series.
type Labels = Vec<(&'static str, String)>;

/// Writes metrics, each with all its series.
struct Out<'e, 'w>(&'e mut DescriptorEncoder<'w>);

impl Out<'_, '_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        series: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in series {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn info(&mut self, name: &str, help: &str, series: impl IntoIterator<Item = Labels>) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Info)?;
        series.into_iter().try_for_each(|labels| metric.encode_info(&labels))
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        series: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in series {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
        }
        Ok(())
    }

    fn histogram<'c>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, &'c CommandCount)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (labels, count) in series {
            let ends = TIMES.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = ends.zip(count.times).collect();
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                count.took.as_secs_f64(),
                count.requests,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}

impl All {
    fn encode_cache(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let cache = &self.cache;
        let one = |value: u64| [(Labels::new(), value)];
        let size = |value: u64| [(Labels::new(), value as f64)];
        out.gauge("cache_used", "Chunks in the cache", Some(Unit::Bytes), size(cache.used.0))?;
        out.gauge(
            "cache_limit",
            "What the cache may take of the disk",
            Some(Unit::Bytes),
            size(cache.limit.0),
        )?;
        out.counter(
            "cache_fetched",
            "Chunks that came into the cache",
            Some(Unit::Bytes),
            one(cache.fetched.0),
        )?;
        out.counter("cache_hits", "Chunks asked for that were in the cache", None, one(cache.hits))?;
        out.counter("cache_misses", "Chunks asked for that were not", None, one(cache.misses))?;
        out.counter("cache_evictions", "Chunks that made room for others", None, one(cache.evicted))?;
        out.counter(
            "cache_healed",
            "Damaged entries found, thrown away and fetched again",
            None,
            one(cache.healed),
        )
    }

    fn encode_volumes(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let info = |volume: &VolumeFigures| {
            let status = &volume.status;
            let device = status.device.as_ref().map(|device| device.display().to_string());
            vec![
                ("volume", status.name.to_string()),
                ("image", status.record.image.clone()),
                ("commit", status.record.commit.to_string()),
                ("repository", places(&status.record.access)),
                ("device", device.unwrap_or_default()),
            ]
        };
        out.info("volume", "A volume, and what it is", self.volumes.iter().map(info))?;
        out.gauge(
            "volume_size",
            "Size of the disk",
            Some(Unit::Bytes),
            self.gauges(|volume| Some(volume.status.record.size.0)),
        )?;
        out.gauge(
            "volume_quota",
            "What its own writes may take",
            Some(Unit::Bytes),
            self.gauges(|volume| volume.status.record.quota.map(|quota| quota.0)),
        )?;
        out.gauge(
            "volume_cached",
            "Bytes of its image that are in the cache",
            Some(Unit::Bytes),
            self.gauges(|volume| volume.cached.map(|cached| cached.0)),
        )?;
        out.gauge(
            "volume_dirty",
            "Bytes of its own writes, of an open volume",
            Some(Unit::Bytes),
            self.gauges(|volume| volume.status.open.map(|open| open.dirty.0)),
        )?;
        out.gauge(
            "volume_open",
            "Whether it is open",
            None,
            self.gauges(|volume| Some(volume.status.open.is_some().into())),
        )?;
        out.gauge(
            "volume_connections",
            "NBD connections to it",
            None,
            self.gauges(|volume| volume.status.open.map(|open| open.connections as u64)),
        )?;
        out.counter(
            "volume_fetched",
            "What was fetched for it since it was opened",
            Some(Unit::Bytes),
            self.counters(|since| since.brought.bytes.0),
        )?;
        out.counter(
            "volume_fetch_failures",
            "Chunks that could not be fetched for it since it was opened",
            None,
            self.counters(|since| since.brought.failed),
        )
    }

    fn encode_requests(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let help = "Bytes that were read, written, trimmed, zeroed or fetched ahead by requests of clients";
        let moved = self.commands().filter(|(_, count)| count.bytes > 0 && count.command != "block_status");
        out.counter("request", help, Some(Unit::Bytes), moved.map(|(labels, count)| (labels, count.bytes)))?;
        let failed = self.commands().map(|(labels, count)| (labels, count.failed));
        out.counter("request_errors", "Requests of clients that were answered with an error", None, failed)?;
        out.histogram(
            "request_duration",
            "Requests of clients, from their receipt to the answer",
            self.commands(),
        )
    }

    fn encode_repositories(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let of = |repository: &RepositoryFigures| vec![("repository", places(&repository.access))];
        let all = |value: fn(&RepositoryFigures) -> Option<u64>| {
            let series = move |repository| value(repository).map(|value| (of(repository), value));
            self.repositories.iter().filter_map(series)
        };
        let help =
            "What was asked of a repository in use, each asked again until it is answered or its time is up";
        out.counter("repository_requests", help, None, all(|repository| Some(repository.requests)))?;
        out.counter(
            "repository_read",
            "What came from a repository in use",
            Some(Unit::Bytes),
            all(|repository| Some(repository.read.0)),
        )?;
        let help = "Attempts that failed in a way that may pass";
        out.counter(
            "repository_errors",
            help,
            None,
            all(|repository| repository.attempts.map(|attempts| attempts.failed)),
        )?;
        let help = "Attempts at those requests, of a repository over a network";
        let begun = all(|repository| repository.attempts.map(|attempts| attempts.begun));
        out.counter("repository_attempts", help, None, begun)?;
        let help = "Attempts made again";
        out.counter(
            "repository_retries",
            help,
            None,
            all(|repository| repository.attempts.map(|attempts| attempts.repeated)),
        )
    }

    fn gauges(&self, value: impl Fn(&VolumeFigures) -> Option<u64>) -> impl Iterator<Item = (Labels, f64)> {
        self.volumes.iter().filter_map(move |volume| Some((of_volume(volume), value(volume)? as f64)))
    }

    fn counters(&self, value: impl Fn(&SinceOpen) -> u64) -> impl Iterator<Item = (Labels, u64)> {
        self.volumes
            .iter()
            .filter_map(move |volume| Some((of_volume(volume), value(volume.since_open.as_ref()?))))
    }

    /// Every command of every volume.
    fn commands(&self) -> impl Iterator<Item = (Labels, &CommandCount)> {
        let open = self.volumes.iter().filter_map(|volume| Some((volume, volume.since_open.as_ref()?)));
        open.flat_map(|(volume, since)| {
            since.answered.iter().map(move |count| {
                let mut labels = of_volume(volume);
                labels.push(("command", count.command.to_owned()));
                (labels, count)
            })
        })
    }
}

fn of_volume(volume: &VolumeFigures) -> Labels {
    vec![("volume", volume.status.name.to_string())]
}

/// The places of a repository, as one label.
fn places(access: &[String]) -> String {
    access.join(" ")
}
