//! Range reads in a bucket: signed once an object, by the SDK where that is not taken. The server is this test's own, so that it sees every head.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use horcrux::store::{Key, S3Place, S3Store, Store, StoreError};

const LEN: usize = 1 << 20;
const IN_THE_URL: &str = "x-amz-signature=";
const IN_A_HEADER: &str = "authorization: aws4-hmac-sha256";

/// What the server makes of a request whose signature is in its URL.
const TAKES: u8 = 0;
const REFUSES: u8 = 1;
const IS_BUSY: u8 = 2;
const CUTS_THE_RANGE: u8 = 3;
const DOES_NOT_KNOW_IT: u8 = 4;
const IS_BROKEN: u8 = 5;
const STALLS: u8 = 6;

fn content() -> Vec<u8> {
    (0..LEN).map(|at| (at * 7 + at / 256) as u8).collect()
}

/// A bucket with one object. It ends with the test's process.
struct Bucket {
    port: u16,
    manner: Arc<AtomicU8>,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Bucket {
    fn start() -> Bucket {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (manner, heads) = (Arc::new(AtomicU8::new(TAKES)), Arc::new(Mutex::new(Vec::new())));
        let served = (manner.clone(), heads.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (manner, heads) = served.clone();
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(stream.unwrap());
                    let content = content();
                    loop {
                        let mut head = String::new();
                        while !head.ends_with("\r\n\r\n") {
                            if !stream.read_line(&mut head).is_ok_and(|len| len > 0) {
                                return;
                            }
                        }
                        let head = head.to_ascii_lowercase();
                        let now = manner.load(Ordering::SeqCst);
                        let mut answer = answer(&head, &content, now);
                        if now == STALLS && head.contains(IN_THE_URL) {
                            // It says no more, and does not go.
                            answer.truncate(answer.len() / 2);
                        }
                        heads.lock().unwrap().push(head);
                        if stream.get_mut().write_all(&answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Bucket { port, manner, heads }
    }

    fn store(&self, session_token: Option<&str>) -> S3Store {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let credentials =
            Credentials::new("AKIDTEST", "s3cret", session_token.map(str::to_owned), None, "test");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .credentials_provider(credentials)
            .region(Region::new("us-east-1"))
            .endpoint_url(&endpoint)
            .force_path_style(true);
        let place =
            S3Place { bucket: "b".into(), prefix: "p/".into(), region: None, endpoint: Some(endpoint) };
        S3Store::with_client(place, Client::from_conf(config.build()))
    }

    /// The heads since the last call.
    fn heads(&self) -> Vec<String> {
        std::mem::take(&mut self.heads.lock().unwrap())
    }
}

fn answer(head: &str, content: &[u8], manner: u8) -> Vec<u8> {
    let plain = |status: &str| format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").into_bytes();
    let in_the_url = head.contains(IN_THE_URL);
    match manner {
        REFUSES if in_the_url => return plain("403 Forbidden"),
        IS_BUSY if in_the_url => return plain("503 Service Unavailable"),
        DOES_NOT_KNOW_IT if in_the_url => return plain("501 Not Implemented"),
        IS_BROKEN if in_the_url => return plain("500 Internal Server Error"),
        _ => {}
    }
    let range = head.lines().find_map(|line| line.strip_prefix("range: bytes=")).unwrap();
    let (start, last) = range.split_once('-').unwrap();
    let (start, last): (usize, usize) = (start.parse().unwrap(), last.parse().unwrap());
    // A store behind some proxies: the object from its beginning, whatever was asked for.
    let start = if manner == CUTS_THE_RANGE && in_the_url { 0 } else { start };
    let body = &content[start..=last];
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {start}-{last}/{LEN}\r\ncontent-length: {}\r\netag: \"e\"\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn key() -> Key {
    Key::new("an/object").unwrap()
}

async fn reads_well(store: &S3Store, at: u64) {
    let got = store.get_range(&key(), at..at + 5000).await.unwrap();
    assert_eq!(got, content()[at as usize..at as usize + 5000]);
}

fn signature(head: &str) -> Option<&str> {
    head.split_once(IN_THE_URL)?.1.split(['&', ' ']).next()
}

#[tokio::test]
async fn ranges_of_an_object_are_signed_once() {
    let bucket = Bucket::start();
    let store = bucket.store(None);
    for at in 0..20 {
        reads_well(&store, at * 40_000).await;
    }
    let heads = bucket.heads();
    assert_eq!(heads.len(), 20, "{heads:?}");
    // The first makes the SDK's connection.
    assert!(heads[0].contains(IN_A_HEADER), "{}", heads[0]);
    let first = signature(&heads[1]).unwrap();
    for head in &heads[1..] {
        assert!(head.starts_with("get /b/p/an/object?"), "{head}");
        assert_eq!(signature(head), Some(first), "{head}");
        assert!(!head.contains("authorization:") && !head.contains("s3cret"), "{head}");
    }
    // Another object, another signature.
    let other = Key::new("another").unwrap();
    store.get_range(&other, 0..10).await.unwrap();
    let heads = bucket.heads();
    assert!(signature(&heads[0]).is_some_and(|other| other != first), "{heads:?}");
}

/// Which of the heads had their signature in the URL.
fn in_the_url(heads: &[String]) -> Vec<usize> {
    (0..heads.len()).filter(|&at| heads[at].contains(IN_THE_URL)).collect()
}

#[tokio::test]
async fn where_signed_urls_are_not_taken_the_sdk_asks_and_soon_asks_alone() {
    for manner in [REFUSES, CUTS_THE_RANGE, DOES_NOT_KNOW_IT] {
        let bucket = Bucket::start();
        bucket.manner.store(manner, Ordering::SeqCst);
        let store = bucket.store(None);
        for at in 1..11 {
            reads_well(&store, at * 1000).await;
        }
        let heads = bucket.heads();
        assert_eq!((in_the_url(&heads), heads.len()), (vec![1, 3, 5], 13), "{manner}: {heads:?}");
    }
}

#[tokio::test]
async fn a_signature_that_is_refused_once_is_made_anew() {
    let bucket = Bucket::start();
    let store = bucket.store(None);
    for at in 0..3 {
        reads_well(&store, at * 1000).await;
    }
    bucket.manner.store(REFUSES, Ordering::SeqCst);
    reads_well(&store, 0).await;
    bucket.manner.store(TAKES, Ordering::SeqCst);
    for at in 0..3 {
        reads_well(&store, at * 1000).await;
    }
    // The SDK's, two; the refused one and the SDK's; three.
    assert_eq!(in_the_url(&bucket.heads()), [1, 2, 3, 5, 6, 7]);
}

#[tokio::test]
async fn a_server_in_trouble_is_not_asked_twice_for_one_read_and_the_sdk_is_next() {
    for (manner, is_busy) in [(IS_BUSY, true), (IS_BROKEN, false)] {
        let bucket = Bucket::start();
        let store = bucket.store(None);
        reads_well(&store, 0).await;
        bucket.manner.store(manner, Ordering::SeqCst);
        bucket.heads();
        let error = store.get_range(&key(), 0..10).await.unwrap_err();
        assert!(error.is_transient() && matches!(error, StoreError::Busy { .. }) == is_busy, "{error}");
        assert_eq!(in_the_url(&bucket.heads()), [0]);
        // Who tries again has the SDK's answer.
        reads_well(&store, 0).await;
        let heads = bucket.heads();
        assert!(heads.len() == 1 && heads[0].contains(IN_A_HEADER), "{heads:?}");
        bucket.manner.store(TAKES, Ordering::SeqCst);
        reads_well(&store, 0).await;
        assert_eq!(in_the_url(&bucket.heads()), [0]);
    }
}

#[tokio::test]
async fn an_answer_that_stops_in_the_middle_is_given_up() {
    let bucket = Bucket::start();
    let store = bucket.store(None);
    reads_well(&store, 0).await;
    bucket.manner.store(STALLS, Ordering::SeqCst);
    let began = std::time::Instant::now();
    let error = store.get_range(&key(), 0..100_000).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("stopped after"), "{error}");
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_session_token_is_never_in_a_url() {
    let bucket = Bucket::start();
    let store = bucket.store(Some("t0ken"));
    for at in 0..5 {
        reads_well(&store, at * 1000).await;
    }
    let heads = bucket.heads();
    assert_eq!(heads.len(), 5);
    for head in heads {
        assert!(head.contains(IN_A_HEADER) && head.contains("x-amz-security-token: t0ken"), "{head}");
        assert!(!head.lines().next().unwrap().contains("t0ken"), "{head}");
    }
}
