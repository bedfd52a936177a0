//! Range reads that are signed once an object.
//!
//! Enters: the keys of objects, and ranges of them. Leaves: answers, or nothing, and then the SDK is asked as ever. Invariants: a request that brought no range is never the last word: the SDK asks for
//! the same, at once or, where the server has too much to do or is gone, the next time; no secret is in a URL.
//!
//! A call through the SDK builds, resolves, signs and retries anew what for the next range of the same object is the same again: on a machine of two cores a third of what a cold
//! read of 4 KiB costs. A presigned request leaves the header `Range` unsigned, so one serves all ranges of its object, over the SDK's own
//! connections.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::{HttpRequest, HttpResponse};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, HttpClient, RuntimeComponents, RuntimeComponentsBuilder, SharedHttpClient,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_smithy_runtime_api::client::connection::CaptureSmithyConnection;
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{HttpConnector as _, HttpConnectorSettings, SharedHttpConnector};
use aws_smithy_runtime_api::client::result::ConnectorError;
use parking_lot::Mutex;

/// How long a server is told to take a signature,
const SIGNED_FOR: Duration = Duration::from_secs(600);
/// and how long it is used: clocks differ.
const USED_FOR: Duration = Duration::from_secs(300);
/// Signatures that are kept: a few kilobytes each at most.
const KEPT: usize = 1024;
/// So often in a row the SDK may have to help out,
const STRIKES: u32 = 3;
/// before it asks alone for so long.
const REST: Duration = Duration::from_secs(60);
/// What may be in a URL. Credentials that are lent for a time come with a token, by one name or another, which would stand in every request's first line, which servers write down: those stay with headers.
const IN_A_URL: [&str; 9] = [
    "x-id",
    "x-amz-algorithm",
    "x-amz-credential",
    "x-amz-date",
    "x-amz-expires",
    "x-amz-signedheaders",
    "x-amz-signature",
    "x-amz-content-sha256",
    "x-amz-checksum-mode",
];

/// A client, and the connections it uses for what has no long body.
#[derive(Clone)]
pub(super) struct Lending {
    pub(super) client: Client,
    lent: Arc<OnceLock<SharedHttpConnector>>,
}

impl Lending {
    /// The same client, whose connections others may use too, once it has.
    pub(super) fn of(client: &Client) -> Lending {
        let lent = Arc::new(OnceLock::new());
        let config = client.config();
        let mut lending = config.to_builder();
        if let Some(inner) = config.http_client() {
            let read_timeout = config.timeout_config().and_then(TimeoutConfig::read_timeout);
            lending = lending.http_client(Lender { inner, read_timeout, lent: lent.clone() });
        }
        Lending { client: Client::from_conf(lending.build()), lent }
    }
}

/// The client's HTTP client. It keeps connections for each setting of timeouts; those of the client itself are lent.
#[derive(Debug)]
struct Lender {
    inner: SharedHttpClient,
    read_timeout: Option<Duration>,
    lent: Arc<OnceLock<SharedHttpConnector>>,
}

impl HttpClient for Lender {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let connector = self.inner.http_connector(settings, components);
        if settings.read_timeout() == self.read_timeout {
            self.lent.get_or_init(|| connector.clone());
        }
        connector
    }

    fn validate_base_client_config(
        &self,
        components: &RuntimeComponentsBuilder,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        self.inner.validate_base_client_config(components, config)
    }

    fn validate_final_config(
        &self,
        components: &RuntimeComponents,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        self.inner.validate_final_config(components, config)
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.inner.connector_metadata()
    }
}

/// What is signed already.
#[derive(Default)]
pub(super) struct Signed {
    state: Mutex<State>,
    /// The credentials are not for URLs.
    never: AtomicBool,
}

#[derive(Default)]
struct State {
    objects: HashMap<String, Known>,
    /// How often in a row a signed request brought nothing where the SDK's then did.
    strikes: u32,
    rests_until: Option<Instant>,
}

/// What is known of an object.
enum Known {
    /// Its requests.
    Signed(Arc<Made>),
    /// The last one brought nothing, and nobody was asked again: the SDK is next.
    Doubted,
}

/// A signed request, and when it was made. Two clocks: one stands still while the machine sleeps, the other may be set.
struct Made {
    request: PresignedRequest,
    at: Instant,
    wall: SystemTime,
}

impl Made {
    fn is_young(&self) -> bool {
        let by_the_wall = SystemTime::now().duration_since(self.wall);
        self.at.elapsed() < USED_FOR && by_the_wall.is_ok_and(|age| age < USED_FOR)
    }
}

/// An answer to a signed request, and the connection it came over.
pub(super) struct Asked {
    pub(super) answer: Result<HttpResponse, ConnectorError>,
    connection: CaptureSmithyConnection,
}

impl Asked {
    /// Whether who answers has too much to do, or is broken, or does not answer: nobody to be asked again at once. A connection to who is broken is not used again.
    pub(super) fn is_trouble(&self) -> bool {
        let status = self.answer.as_ref().map_or(0, |answer| answer.status().as_u16());
        if matches!(status, 500 | 502..=504)
            && let Some(connection) = self.connection.get()
        {
            connection.poison();
        }
        matches!(status, 0 | 408 | 429 | 500 | 502..=504)
    }
}

impl Signed {
    /// Asks for a range of an object; `None` where the SDK is to ask.
    pub(super) async fn get(
        &self,
        through: &Lending,
        bucket: &str,
        object: &str,
        range: &Range<u64>,
    ) -> Option<Asked> {
        if self.never.load(Ordering::Relaxed) {
            return None;
        }
        // Before the SDK has made its first request there is none.
        let connector = through.lent.get()?;
        let signed = self.request(&through.client, bucket, object).await?;
        let mut request = HttpRequest::get(signed.request.uri()).ok()?;
        for (name, value) in signed.request.headers() {
            request.headers_mut().insert(name.to_owned(), value.to_owned());
        }
        request.headers_mut().insert("range", header(range));
        let connection = CaptureSmithyConnection::new();
        request.add_extension(connection.clone());
        Some(Asked { answer: connector.call(request).await, connection })
    }

    async fn request(&self, client: &Client, bucket: &str, object: &str) -> Option<Arc<Made>> {
        {
            let state = self.state.lock();
            if state.rests_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            match state.objects.get(object) {
                Some(Known::Doubted) => return None,
                Some(Known::Signed(made)) if made.is_young() => return Some(made.clone()),
                _ => {}
            }
        }
        let (at, wall) = (Instant::now(), SystemTime::now());
        let config = PresigningConfig::expires_in(SIGNED_FOR).ok()?;
        let request = client.get_object().bucket(bucket).key(object).presigned(config).await.ok()?;
        if !may_be_sent(request.uri()) {
            self.never.store(true, Ordering::Relaxed);
            return None;
        }
        let made = Arc::new(Made { request, at, wall });
        self.note(object, Known::Signed(made.clone()));
        Some(made)
    }

    fn note(&self, object: &str, known: Known) {
        let mut state = self.state.lock();
        if state.objects.len() >= KEPT {
            state.objects.retain(|_, known| matches!(known, Known::Signed(made) if made.is_young()));
        }
        if state.objects.len() >= KEPT {
            // Who reads so many objects at once signs each once more.
            state.objects.clear();
        }
        state.objects.insert(object.to_owned(), known);
    }

    /// A signed request brought what was asked for.
    pub(super) fn worked(&self) {
        let mut state = self.state.lock();
        state.strikes = 0;
    }

    /// A signed request for this object came to nothing, and nobody is asked again now.
    pub(super) fn doubt(&self, object: &str) {
        self.note(object, Known::Doubted);
    }

    /// The SDK has brought a range of this object; `instead` of a signed request that did not.
    pub(super) fn helped_out(&self, object: &str, instead: bool) {
        let mut state = self.state.lock();
        let doubted = matches!(state.objects.get(object), Some(Known::Doubted));
        if !doubted && !instead {
            return;
        }
        // Made anew the next time: it may have been too old, or the keys others.
        state.objects.remove(object);
        state.strikes += 1;
        if state.strikes >= STRIKES {
            state.strikes = 0;
            state.rests_until = Some(Instant::now() + REST);
            tracing::debug!(rest = ?REST, "ranges that were signed ahead are not what this server takes: each is signed by itself for a while");
        }
    }
}

/// Whether a URL says no more than who asks, for what, and until when.
fn may_be_sent(uri: &str) -> bool {
    let query = uri.split_once('?').map_or("", |(_, query)| query);
    let names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default().to_ascii_lowercase());
    names.filter(|name| !name.is_empty()).all(|name| IN_A_URL.contains(&name.as_str()))
}

/// A range as a header has it.
pub(super) fn header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_with_a_token_of_any_name_is_not_sent() {
        let signed = "http://h/b/k?x-id=GetObject&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=K%2F1&X-Amz-Date=2&X-Amz-Expires=600&X-Amz-SignedHeaders=host&X-Amz-Signature=ab";
        assert!(may_be_sent(signed) && may_be_sent("http://h/b/k"));
        for token in ["X-Amz-Security-Token", "X-Amz-S3session-Token", "anything"] {
            assert!(!may_be_sent(&format!("{signed}&{token}=t")), "{token}");
        }
    }
}
