//! Range reads that are signed once an object.
//!
//! Enters: the keys of objects, and ranges of them. Leaves: answers that are ranges, or nothing, and then the SDK is asked as ever. Invariant: no error is made of an answer
//! here; whatever is not the range that was asked for is the SDK's to ask for again, and to put into words.
//!
//! A call through the SDK builds, resolves, signs and retries anew what for the next range of the same object is the same again: on a machine of two cores a third of what a cold
//! read of 4 KiB costs. A presigned request leaves the header `Range` unsigned, so one serves all ranges of its object, over the SDK's own
//! connections.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::{HttpRequest, HttpResponse};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, HttpClient, RuntimeComponents, RuntimeComponentsBuilder, SharedHttpClient,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::presigning::{PresignedRequest, PresigningConfig};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{HttpConnector as _, HttpConnectorSettings, SharedHttpConnector};
use aws_smithy_runtime_api::client::result::ConnectorError;
use parking_lot::Mutex;

/// How long a server is told to take a signature,
const SIGNED_FOR: Duration = Duration::from_secs(600);
/// and how long it is used: clocks differ.
const USED_FOR: Duration = Duration::from_secs(300);
/// Signatures that are kept: less than a kilobyte each.
const KEPT: usize = 1024;
/// Credentials that are lent for a time have a secret that would stand in every request's first line, which servers write down. They are used in headers only.
const SESSION_TOKEN: &str = "X-Amz-Security-Token";

/// A client, and the connections it uses for what has no long body.
#[derive(Clone, Debug)]
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
#[derive(Debug, Default)]
pub(super) struct Signed {
    objects: Mutex<HashMap<String, (PresignedRequest, Instant)>>,
    /// The server does not take them, or the credentials are not for that.
    off: AtomicBool,
}

impl Signed {
    /// Asks for a range of an object; `None` where the SDK is to ask.
    pub(super) async fn get(
        &self,
        through: &Lending,
        bucket: &str,
        object: &str,
        range: &Range<u64>,
    ) -> Option<Result<HttpResponse, ConnectorError>> {
        if self.off.load(Ordering::Relaxed) {
            return None;
        }
        // Before the SDK has made its first request there is none.
        let connector = through.lent.get()?;
        let signed = self.request(&through.client, bucket, object).await?;
        let mut request = HttpRequest::get(signed.uri()).ok()?;
        for (name, value) in signed.headers() {
            request.headers_mut().insert(name.to_owned(), value.to_owned());
        }
        request.headers_mut().insert("range", header(range));
        Some(connector.call(request).await)
    }

    async fn request(&self, client: &Client, bucket: &str, object: &str) -> Option<PresignedRequest> {
        if let Some((request, signed)) = self.objects.lock().get(object)
            && signed.elapsed() < USED_FOR
        {
            return Some(request.clone());
        }
        let now = Instant::now();
        let config = PresigningConfig::expires_in(SIGNED_FOR).ok()?;
        let request = client.get_object().bucket(bucket).key(object).presigned(config).await.ok()?;
        if request.uri().contains(SESSION_TOKEN) {
            self.off.store(true, Ordering::Relaxed);
            return None;
        }
        let mut objects = self.objects.lock();
        if objects.len() >= KEPT {
            // Who reads so many objects signs each once more.
            objects.clear();
        }
        objects.insert(object.to_owned(), (request.clone(), now));
        Some(request)
    }

    /// What was signed for this object was not taken.
    pub(super) fn forget(&self, object: &str) {
        self.objects.lock().remove(object);
    }

    /// No more of this: the server takes what the SDK signs, and not this.
    pub(super) fn give_up(&self) {
        self.off.store(true, Ordering::Relaxed);
    }
}

/// A range as a header has it.
pub(super) fn header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end - 1)
}
