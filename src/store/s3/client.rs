//! An SDK client for a place: credentials from where the AWS tools keep them, one attempt a call (`store::retry` makes the others).

use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;

use super::place::S3Place;

/// For a server to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For the first byte of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// An upload that goes at 16 KB/s or faster is let finish, besides the time for the answer.
const SLOWEST_BYTES_PER_MS: u64 = 16;
/// A body that does not move for so long is given up.
pub(super) const STALL_GRACE: Duration = Duration::from_secs(10);
/// What servers that are not Amazon's are told where nobody says otherwise: signatures need some region.
const FALLBACK_REGION: &str = "us-east-1";
/// Attempts at one part of an upload: the part is lost alone, not the block with it.
const PART_ATTEMPTS: u32 = 4;

/// The client. Reads the environment and files of the AWS tools; asks nobody yet.
pub(super) async fn client(place: &S3Place) -> Client {
    let http =
        aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT).build();
    let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .http_client(http)
        .timeout_config(timeouts)
        .retry_config(RetryConfig::disabled())
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled().grace_period(STALL_GRACE).build(),
        );
    if let Some(region) = &place.region {
        loader = loader.region(Region::new(region.clone()));
    } else if place.endpoint.is_some() {
        // A server that is not Amazon's: what this machine's cloud would say is no answer, and asking it takes time.
        let said = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new());
        let said = said.or_else(ProfileFileRegionProvider::new());
        loader = loader.region(said.or_else(Region::new(FALLBACK_REGION)));
    }
    let shared = loader.load().await;
    let mut config = aws_sdk_s3::config::Builder::from(&shared)
        // Not every server knows the newer checksums; content is checked against its hash anyway.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if shared.region().is_none() {
        config = config.region(Region::new(FALLBACK_REGION));
    }
    if let Some(endpoint) = &place.endpoint {
        config = config.endpoint_url(endpoint).force_path_style(true);
    }
    Client::from_conf(config.build())
}

/// How requests with long bodies differ: they have the time a slow line needs for so many bytes. (The SDK's watch over bodies that stall takes one that is in memory
/// for sent as soon as it begins.)
pub(super) fn for_bodies(bytes: u64, attempts: bool) -> aws_sdk_s3::config::Builder {
    let bound = READ_TIMEOUT + Duration::from_millis(bytes / SLOWEST_BYTES_PER_MS);
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .disable_read_timeout()
        .operation_attempt_timeout(bound)
        .build();
    let config = aws_sdk_s3::config::Builder::new().timeout_config(timeouts);
    match attempts {
        true => config.retry_config(RetryConfig::standard().with_max_attempts(PART_ATTEMPTS)),
        false => config,
    }
}
