//! The S3 store on a real server, through the commands users type, and what they are told when it can't work.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "common/store_contract.rs"]
mod contract;
mod harness;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use harness::weed::{ACCESS_KEY, BUCKET, SECRET_KEY, Weed, weed, with_credentials, without_credentials};
use harness::{Image, Serve, cli, files_below, need, noise, run};
use horcrux::store::{Key, S3Place, S3Store, Store};

fn place(endpoint: String, prefix: &str) -> S3Place {
    S3Place { bucket: BUCKET.into(), prefix: prefix.into(), region: None, endpoint: Some(endpoint) }
}

#[test]
fn a_store_in_a_bucket_keeps_the_contract() {
    if !weed() {
        return;
    }
    let server = Weed::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    // Each with a client of its own, as another process would have; each probes the server before it writes.
    let stores: Vec<Arc<dyn Store>> = (0..4)
        .map(|_| S3Store::with_client(place(server.endpoint(), "a/b/"), server.client()))
        .map(|store| Arc::new(store) as Arc<dyn Store>)
        .collect();
    let turn = AtomicUsize::new(0);
    runtime.block_on(contract::run(|| async {
        stores[turn.fetch_add(1, Ordering::Relaxed) % stores.len()].clone()
    }));
    // And objects of many parts.
    runtime.block_on(async {
        let store = S3Store::with_client(place(server.endpoint(), "parts/"), server.client());
        let body = noise(3, 40 << 20);
        for _ in 0..2 {
            let mut upload = store.begin().await.unwrap();
            for piece in body.chunks(3 << 20) {
                upload.write(piece.to_vec().into()).await.unwrap();
            }
            upload.finish(&Key::new("big").unwrap()).await.unwrap();
        }
        let key = Key::new("big").unwrap();
        let got = store.get_range(&key, 0..body.len() as u64).await.unwrap();
        assert!(got == body, "what came back is not what went up");
    });
}

/// `image-from-file` of `raw` into `repo`.
fn store_image(raw: &Path, repo: &str, credentials: Option<(&str, &str)>) -> harness::Ran {
    let mut cli = cli();
    cli.args(["image-from-file", "-s", "1M", "disk"]).arg(raw).arg(repo);
    match credentials {
        Some((access, secret)) => with_credentials(&mut cli, access, secret),
        None => without_credentials(&mut cli),
    }
    run(&mut cli)
}

#[test]
fn an_image_in_a_bucket_is_served_and_reads_as_its_source() {
    if !weed() || !need(&["nbdcopy", "qemu-io"]) {
        return;
    }
    let server = Weed::start();
    let image = Image::sparse();
    let url = server.url("team/repo");
    let said = store_image(&image.raw_file(), &url, Some((ACCESS_KEY, SECRET_KEY))).ok();
    assert!(said.contains("stored as"), "{said}");
    let again = store_image(&image.raw_file(), &url, Some((ACCESS_KEY, SECRET_KEY))).ok();
    assert!(again.contains("unchanged"), "{again}");

    let state = image.dir().join("remote");
    let serve =
        || Serve::new(Path::new(&url), &state).name("disk").credentials(ACCESS_KEY, SECRET_KEY).start();
    let disk = serve();
    let copy = image.dir().join("copy");
    run(Command::new("nbdcopy").arg(disk.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw, "the copy differs");
    let write = ["-f", "raw", "-c", "write -P 0x42 1M 64k", "-c", "flush"];
    run(Command::new("qemu-io").args(write).arg(disk.uri("disk"))).ok();
    disk.stop();
    let disk = serve();
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 0x42 1M 64k"]).arg(disk.uri("disk"))).ok();
    let log = disk.log();
    disk.stop();

    // The same bytes as in a directory: base objects and map nodes, which no time or id is in.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = S3Store::with_client(place(server.endpoint(), "team/repo/"), server.client());
    let mut compared = 0;
    for kind in ["blocks", "maps"] {
        for file in image.objects(kind) {
            let name = file.strip_prefix(image.repo()).unwrap().to_str().unwrap().to_owned();
            let here = std::fs::read(&file).unwrap();
            let there = runtime.block_on(store.get_range(&Key::new(&name).unwrap(), 0..here.len() as u64));
            assert!(there.unwrap() == here, "{name} differs");
            compared += 1;
        }
    }
    assert!(compared > 8, "{compared} objects");
    assert!(!log.contains(SECRET_KEY) && !log.contains(ACCESS_KEY), "{log}");
    for file in files_below(&state) {
        let bytes = std::fs::read(&file).unwrap();
        for secret in [SECRET_KEY, ACCESS_KEY] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds {secret}", file.display());
        }
    }
}

#[test]
fn what_is_wrong_with_a_bucket_or_its_credentials_is_said_in_one_line() {
    if !weed() {
        return;
    }
    let server = Weed::start();
    let image = Image::of(noise(1, 1 << 20));
    let raw = image.raw_file();
    let good = Some((ACCESS_KEY, SECRET_KEY));
    let place = format!("s3://{BUCKET}/r/ at {}", server.endpoint());
    let refused = |url: &str, credentials| {
        let said = store_image(&raw, url, credentials).refused();
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!said.contains(SECRET_KEY) && !said.contains("wr0ng"), "{said}");
        said
    };
    assert_eq!(
        refused(&server.url("r").replace(BUCKET, "nowhere"), good),
        format!(
            "error: s3://nowhere/r/ at {}: there is no such bucket; hint: make it, or look at the name and the region\n",
            server.endpoint()
        )
    );
    assert_eq!(
        refused(&server.url("r"), Some((ACCESS_KEY, "wr0ng"))),
        format!("error: {place}: the server does not take these credentials (SignatureDoesNotMatch)\n")
    );
    assert_eq!(
        refused(&server.url("r"), Some(("NOBODY", "wr0ng"))),
        format!("error: {place}: the server does not take these credentials (InvalidAccessKeyId)\n")
    );
    assert_eq!(
        refused(&server.url("r"), None),
        format!(
            "error: {place}: no credentials; hint: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run 'aws configure'\n"
        )
    );
    let stranger = tokio::runtime::Runtime::new().unwrap();
    let client = server.client();
    stranger
        .block_on(client.put_object().bucket(BUCKET).key("r/letter.txt").body(vec![1].into()).send())
        .unwrap();
    let said = refused(&server.url("r"), good);
    assert!(said.contains("is not empty and not a repository: it holds 'letter.txt'"), "{said}");
}

#[test]
fn with_a_server_of_ones_own_no_cloud_is_asked_for_a_region() {
    if !weed() {
        return;
    }
    let server = Weed::start();
    let image = Image::of(noise(4, 1 << 20));
    let metadata = TcpListener::bind("127.0.0.1:0").unwrap();
    metadata.set_nonblocking(true).unwrap();
    let mut command = cli();
    command.args(["image-from-file", "disk"]).arg(image.raw_file()).arg(server.url("region"));
    with_credentials(&mut command, ACCESS_KEY, SECRET_KEY);
    let address = format!("http://{}", metadata.local_addr().unwrap());
    command.env_remove("AWS_EC2_METADATA_DISABLED").env("AWS_EC2_METADATA_SERVICE_ENDPOINT", address);
    let ran = run(&mut command);
    assert_eq!(ran.stderr, "");
    ran.ok();
    let asked = metadata.accept().map_err(|error| error.kind());
    assert_eq!(asked.unwrap_err(), std::io::ErrorKind::WouldBlock, "the metadata service was asked");
}

/// Answers one request with 403 after the other; what it was asked, head by head.
fn refuses(asked: Arc<Mutex<Vec<String>>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // It ends with the test's process: nothing is written, and nobody waits for it.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).is_ok_and(|len| len > 0) {}
            asked.lock().unwrap().push(head);
            let answer = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.get_mut().write_all(answer.as_bytes());
        }
    });
    port
}

#[test]
fn profiles_regions_and_session_tokens_are_where_the_aws_tools_keep_them() {
    let image = Image::of(noise(5, 1 << 20));
    let home = image.dir().join("home/.aws");
    std::fs::create_dir_all(&home).unwrap();
    let token = "t0ken-that-15-temporary";
    std::fs::write(
        home.join("credentials"),
        format!("[dev]\naws_access_key_id = AKIDDEV\naws_secret_access_key = d3v5ecret\naws_session_token = {token}\n"),
    )
    .unwrap();
    std::fs::write(home.join("config"), "[profile dev]\nregion = eu-north-9\n").unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let port = refuses(asked.clone());
    let ask = |settings: &[(&str, &str)]| {
        let mut command = cli();
        command.args(["image-from-file", "disk"]).arg(image.raw_file());
        command.arg(format!("minio://127.0.0.1:{port}/{BUCKET}/r"));
        without_credentials(&mut command);
        command.env("HOME", image.dir().join("home")).envs(settings.iter().copied());
        let said = run(&mut command).refused();
        assert_eq!(said.lines().count(), 1, "{said}");
        for secret in [token, "d3v5ecret", "AKIDDEV"] {
            assert!(!said.contains(secret), "{said}");
        }
        std::mem::take(&mut *asked.lock().unwrap()).remove(0).to_lowercase()
    };
    let head = ask(&[("AWS_PROFILE", "dev")]);
    assert!(head.contains("credential=akiddev/") && head.contains("/eu-north-9/s3/"), "{head}");
    assert!(head.contains(&format!("x-amz-security-token: {token}\r\n")), "{head}");
    // The environment is stronger.
    let head = ask(&[
        ("AWS_ACCESS_KEY_ID", "AKIDENV"),
        ("AWS_SECRET_ACCESS_KEY", "d3v5ecret"),
        ("AWS_SESSION_TOKEN", token),
        ("AWS_REGION", "ap-south-7"),
    ]);
    assert!(head.contains("credential=akidenv/") && head.contains("/ap-south-7/s3/"), "{head}");
    assert!(head.contains(&format!("x-amz-security-token: {token}\r\n")), "{head}");
}

/// A server that answers 200 to every PUT, whatever it was told to make sure of before: several real ones do.
fn ignores_conditions(
    stop: Arc<AtomicBool>,
    put: Arc<Mutex<Vec<String>>>,
) -> (u16, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepting = std::thread::spawn(move || {
        let mut serving = Vec::new();
        for stream in listener.incoming() {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let put = put.clone();
            serving.push(std::thread::spawn(move || {
                let mut stream = BufReader::new(stream.unwrap());
                let mut etag = 0;
                loop {
                    let (mut request, mut length) = (String::new(), 0);
                    loop {
                        let mut line = String::new();
                        if stream.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                        let line = line.trim_end().to_ascii_lowercase();
                        if let Some(value) = line.strip_prefix("content-length:") {
                            length = value.trim().parse().unwrap();
                        }
                        if line.is_empty() {
                            break;
                        }
                        request += &(line + "\n");
                    }
                    stream.read_exact(&mut vec![0; length]).unwrap();
                    etag += 1;
                    let answer = if request.starts_with("put") {
                        put.lock().unwrap().push(request.split(' ').nth(1).unwrap().to_owned());
                        format!("HTTP/1.1 200 OK\r\netag: \"{etag:032x}\"\r\ncontent-length: 0\r\n\r\n")
                    } else if request.starts_with("delete") {
                        "HTTP/1.1 204 No Content\r\n\r\n".into()
                    } else if request.contains("list-type=2") {
                        let body = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
                        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                    } else {
                        let body = "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>";
                        format!("HTTP/1.1 404 Not Found\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                    };
                    if stream.get_mut().write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            }));
        }
        serving.into_iter().for_each(|thread| thread.join().unwrap());
    });
    (port, accepting)
}

#[test]
fn a_server_that_ignores_conditions_is_found_out_before_anything_is_written() {
    let stop = Arc::new(AtomicBool::new(false));
    let put = Arc::new(Mutex::new(Vec::new()));
    let (port, accepting) = ignores_conditions(stop.clone(), put.clone());
    let image = Image::of(noise(1, 1 << 20));
    let url = format!("minio://127.0.0.1:{port}/volumes/r");
    let said = store_image(&image.raw_file(), &url, Some(("any", "thing"))).refused();
    assert_eq!(
        said,
        format!(
            "error: s3://volumes/r/ at http://127.0.0.1:{port}: the server does not keep If-None-Match, so writers could overwrite each other \
             unseen; nothing is written there\n"
        )
    );
    stop.store(true, Ordering::SeqCst);
    drop(std::net::TcpStream::connect(("127.0.0.1", port)));
    accepting.join().unwrap();
    let put = put.lock().unwrap();
    assert!(!put.is_empty() && put.iter().all(|path| path.starts_with("/volumes/r/probe/")), "{put:?}");
}
