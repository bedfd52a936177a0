//! `/metrics` and the control API over TCP, as Prometheus and curl use them: what is told is what was done.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use harness::proxy::{Fault, Proxy, Rule};
use harness::weed::{self, Weed};
use harness::{Client, Image, PAGE, PATIENCE, Ran, Serve, Server, cli, need, need_python, noise, run, until};
use nbd_proto::Errno;

const MIB: usize = 1 << 20;
const TOKEN: &str = "a-token-that-is-long-enough";

/// Samples by name and labels, as the OpenMetrics parser of Prometheus's own client library has them.
type Samples = BTreeMap<String, f64>;

const PARSE: &str = r#"
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
samples = {}
for family in text_string_to_metric_families(open(sys.argv[1]).read()):
    assert family.documentation, family
    for sample in family.samples:
        labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
        name = f"{sample.name}{{{labels}}}"
        assert name not in samples, name
        samples[name] = sample.value
print(json.dumps(samples))
"#;

fn curl(args: &[&str]) -> Ran {
    run(Command::new("curl").args(["-sS", "--max-time", "60"]).args(args))
}

fn scraped(state: &Path) -> Samples {
    let socket = state.join("run/control.sock");
    let headers = state.join("headers");
    let metrics = state.join("metrics");
    let (to, head) = (metrics.to_str().unwrap(), headers.to_str().unwrap());
    curl(&["--unix-socket", socket.to_str().unwrap(), "-o", to, "-D", head, "http://localhost/metrics"]).ok();
    let head = std::fs::read_to_string(&headers).unwrap();
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{head}"
    );
    let mut parse = Command::new("/usr/bin/python3");
    parse.args(["-c", PARSE]).arg(&metrics);
    serde_json::from_str(&run(&mut parse).ok()).unwrap()
}

fn make(state: &Path, name: &str, repo: &str, more: &[&str]) {
    let mut command = cli();
    command.args(["volume", "create", name, "--access", repo, "--name", "disk"]).args(more);
    run(command.arg("--state-dir").arg(state)).ok();
}

fn of(samples: &Samples, name: &str) -> f64 {
    *samples.get(name).unwrap_or_else(|| panic!("there is no {name} in {samples:#?}"))
}

#[test]
fn what_prometheus_is_told_is_what_was_done() {
    if !need(&["curl"]) || !need_python("prometheus_client") {
        return;
    }
    let image = Image::of(noise(61, 8 * MIB));
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let repo = image.repo().display().to_string();
    make(&state, "v", &repo, &["--quota", "1M"]);
    make(&state, "idle", &repo, &["--read-only"]);
    let before = scraped(&state);
    assert_eq!(of(&before, "horcrux_volume_open{volume=v}"), 0.0);
    assert!(!before.keys().any(|name| name.starts_with("horcrux_request")), "{before:#?}");

    let mut client = Client::open(&server, "v");
    for at in 0..10 {
        client.read(at * PAGE as u64, PAGE).unwrap();
    }
    client.read(4 * MIB as u64, 2 * MIB).unwrap();
    client.write(0, &[7; 3 * PAGE]).unwrap();
    client.flush().unwrap();
    assert_eq!(client.write(MIB as u64, &vec![8; 2 * MIB]), Err(Errno::NoSpc));
    let told = || scraped(&state);
    // The last answer is counted right after it was sent.
    assert!(until(PATIENCE, || of(&told(), "horcrux_request_errors_total{command=write,volume=v}") == 1.0));
    let after = told();
    for (name, value) in [
        ("horcrux_volume_open{volume=v}", 1.0),
        ("horcrux_volume_open{volume=idle}", 0.0),
        ("horcrux_volume_connections{volume=v}", 1.0),
        ("horcrux_volume_size_bytes{volume=v}", 8.0 * MIB as f64),
        ("horcrux_volume_quota_bytes{volume=v}", MIB as f64),
        ("horcrux_request_duration_seconds_count{command=read,volume=v}", 11.0),
        ("horcrux_request_duration_seconds_bucket{command=read,le=+Inf,volume=v}", 11.0),
        ("horcrux_request_bytes_total{command=read,volume=v}", (10 * PAGE + 2 * MIB) as f64),
        ("horcrux_request_errors_total{command=read,volume=v}", 0.0),
        ("horcrux_request_duration_seconds_count{command=write,volume=v}", 2.0),
        ("horcrux_request_bytes_total{command=write,volume=v}", 3.0 * PAGE as f64),
        ("horcrux_request_duration_seconds_count{command=flush,volume=v}", 1.0),
        ("horcrux_volume_fetch_failures_total{volume=v}", 0.0),
        ("horcrux_cache_healed_total{}", 0.0),
    ] {
        assert_eq!(of(&after, name), value, "{name}");
    }
    // Ten pages are in one chunk of 128 KiB, two MiB are sixteen; what is ahead of them may be here too.
    let fetched = of(&after, "horcrux_volume_fetched_bytes_total{volume=v}");
    assert!((17.0 * 131_072.0..=8.0 * MIB as f64).contains(&fetched), "{fetched}");
    // Two volumes of one commit have the same here; what is read ahead may still be coming.
    let cached = || {
        let now = told();
        ["v", "idle"].map(|name| of(&now, &format!("horcrux_volume_cached_bytes{{volume={name}}}")))
    };
    assert!(
        until(PATIENCE, || cached()[0] >= 17.0 * 131_072.0 && cached()[0] == cached()[1]),
        "{:?}",
        cached()
    );
    let dirty = of(&after, "horcrux_volume_dirty_bytes{volume=v}");
    assert!(dirty >= 3.0 * PAGE as f64 && dirty <= MIB as f64, "{dirty}");
    let took = of(&after, "horcrux_request_duration_seconds_sum{command=read,volume=v}");
    assert!(took > 0.0 && took < 60.0, "{took}");
    let info =
        after.keys().find(|name| name.starts_with("horcrux_volume_info") && name.contains("volume=v,"));
    let info = info.or_else(|| {
        after.keys().find(|name| name.starts_with("horcrux_volume_info") && name.contains("volume=v}"))
    });
    assert!(info.unwrap().contains(&format!("repository={repo}")), "{info:?}");
    assert!(
        of(&after, &format!("horcrux_repository_read_bytes_total{{repository={repo}}}")) > 2.0 * MIB as f64
    );
    // The same for people: what the image has here.
    let inspected = run(cli().args(["volume", "inspect", "v", "--json", "--state-dir"]).arg(&state)).ok();
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert!(inspected["cached_bytes"].as_f64().unwrap() >= 17.0 * 131_072.0, "{inspected}");
    server.stop();
}

#[test]
fn a_repository_that_fails_is_seen_in_its_retries() {
    if !weed::weed() || !need(&["curl"]) || !need_python("prometheus_client") {
        return;
    }
    let weed = Weed::start();
    let proxy = Proxy::http(weed.address());
    let image = Image::of(noise(62, 4 * MIB));
    let far = weed::url_at(proxy.address(), "repo");
    weed.store(&image, "repo");
    let state = image.state();
    let server = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY).start();
    make(&state, "v", &far, &[]);
    let hits = proxy.rule(Rule::new(Fault::InternalError).method("GET").path("/blocks/").next(2));
    assert_eq!(Client::open(&server, "v").read(0, 4 * MIB).unwrap(), image.raw);
    assert_eq!(hits.count(), 2);
    let told = scraped(&state);
    let of_repository = |what: &str| of(&told, &format!("horcrux_repository_{what}{{repository={far}}}"));
    assert_eq!((of_repository("errors_total"), of_repository("retries_total")), (2.0, 2.0));
    assert!(of_repository("requests_total") >= 1.0);
    assert_eq!(of(&told, "horcrux_volume_fetched_bytes_total{volume=v}"), 4.0 * MIB as f64);
    server.stop();
}

/// The address the daemon says it is controlled at.
fn control_of(server: &Server) -> String {
    let address = server.said.iter().find_map(|line| line.trim().strip_prefix("control over TCP: http://"));
    address.unwrap().to_owned()
}

#[test]
fn over_tcp_only_who_has_the_token_is_answered() {
    if !need(&["curl"]) {
        return;
    }
    let image = Image::sparse();
    let state = image.state();
    let token = image.dir().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let daemon = |listen: &str| {
        Serve::daemon(&state)
            .arg("--control-listen")
            .arg(listen)
            .arg("--control-token")
            .arg(token.to_str().unwrap())
    };
    let server = daemon("127.0.0.1:0").start();
    let url = format!("http://{}", control_of(&server));
    let asked = |path: &str, more: &[&str]| {
        let url = format!("{url}{path}");
        let said = curl(&[more, &["-w", "\n%{http_code}", &url]].concat()).ok();
        let (body, status) = said.rsplit_once('\n').unwrap();
        (status.parse::<u16>().unwrap(), body.to_owned())
    };
    let right = format!("Authorization: Bearer {TOKEN}");
    let wrong = format!("Authorization: Bearer {TOKEN}x");
    for path in ["/v1/status", "/v1/volumes", "/metrics", "/openapi.json", "/nothing"] {
        for headers in [&[][..], &["-H", &wrong], &["-H", "Authorization: Basic YTpi"]] {
            let (status, body) = asked(path, headers);
            assert_eq!(status, 401, "{path}: {body}");
            assert!(body.contains(r#""error":"this needs the daemon's token""#), "{body}");
        }
        let (status, body) = asked(path, &["-H", &right]);
        assert_eq!(status, if path == "/nothing" { 404 } else { 200 }, "{path}: {body}");
    }
    let made = format!(r#"{{"name":"v","access":["{}"],"image":"disk"}}"#, image.repo().display());
    let json = ["-H", "content-type: application/json", "--data", &made];
    assert_eq!(asked("/v1/volumes", &json).0, 401);
    assert_eq!(asked("/v1/volumes", &[&json[..], &["-H", &right]].concat()).0, 201);
    // On the socket nobody asks for a token, and the daemon has not told it.
    assert!(run(cli().args(["volume", "ls", "--state-dir"]).arg(&state)).ok().contains("disk"));
    assert!(!server.log().contains(TOKEN), "{}", server.log());

    let other = image.dir().join("other");
    let refused = |listen: &str, mode: u32| {
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(mode)).unwrap();
        let second = Serve::daemon(&other).arg("--control-listen").arg(listen);
        second.arg("--control-token").arg(token.to_str().unwrap()).refused()
    };
    let said = refused("127.0.0.1:0", 0o640);
    assert!(said.contains("others may read the token's file") && said.contains("hint: chmod 600 "), "{said}");
    let taken = control_of(&server);
    let said = refused(&taken, 0o600);
    assert!(said.contains(&format!("error: can't listen on {taken}: ")), "{said}");
    server.stop();
    let said = Serve::daemon(&state).arg("--control-listen").arg("127.0.0.1:0").run();
    assert_eq!(said.status.code(), Some(2), "{}", said.stderr);
}
