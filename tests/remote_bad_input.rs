//! What users get wrong about a bucket, and what they are told.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use harness::rclone::{Rclone, rclone};
use harness::weed::{
    ACCESS_KEY, READER_KEY, READER_SECRET, SECRET_KEY, Weed, url_at, weed, with_credentials,
    without_credentials,
};
use harness::{Image, Serve, cli, need, noise, run};

const SECRETS: [&str; 4] = [ACCESS_KEY, SECRET_KEY, READER_KEY, READER_SECRET];

fn store(image: &Image, url: &str, access: &str, secret: &str) -> harness::Ran {
    let mut cli = cli();
    cli.args(["image-from-file", "-s", "1M", "disk"]).arg(image.raw_file()).arg(url);
    with_credentials(&mut cli, access, secret);
    run(&mut cli)
}

#[test]
fn who_may_only_read_is_told_so_when_writing_and_can_serve() {
    if !weed() || !need(&["nbdcopy"]) {
        return;
    }
    let server = Weed::start();
    let image = Image::of(noise(1, 2 << 20));
    let url = server.url("r");
    let said = store(&image, &url, READER_KEY, READER_SECRET).refused();
    assert!(said.contains(": not allowed to write probe/"), "{said}");
    assert!(SECRETS.iter().all(|secret| !said.contains(secret)), "{said}");
    store(&image, &url, ACCESS_KEY, SECRET_KEY).ok();
    let disk = Serve::new(Path::new(&url), &image.dir().join("reader"))
        .name("disk")
        .credentials(READER_KEY, READER_SECRET)
        .start();
    let copy = image.dir().join("copy");
    run(Command::new("nbdcopy").arg(disk.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw);
    // Nor does another process see them.
    let line = std::fs::read(format!("/proc/{}/cmdline", disk.pid())).unwrap();
    let line = String::from_utf8_lossy(&line);
    assert!(SECRETS.iter().all(|secret| !line.contains(secret) && !disk.log().contains(secret)), "{line}");
    disk.stop();
}

#[test]
fn credentials_come_from_a_profile_of_the_aws_tools_too() {
    if !weed() {
        return;
    }
    let server = Weed::start();
    let image = Image::of(noise(2, 1 << 20));
    let home = image.dir().join("home");
    std::fs::create_dir_all(home.join(".aws")).unwrap();
    let keys = format!("[work]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n");
    std::fs::write(home.join(".aws/credentials"), keys).unwrap();
    let with_profile = |profile: &str| {
        let mut cli = cli();
        cli.args(["image-from-file", "disk"]).arg(image.raw_file()).arg(server.url("r"));
        without_credentials(&mut cli);
        cli.env("HOME", &home).env("AWS_PROFILE", profile);
        run(&mut cli)
    };
    with_profile("work").ok();
    let said = with_profile("play").refused();
    assert!(said.contains("no credentials; hint: "), "{said}");
}

#[test]
fn a_bucket_that_is_no_repository_and_a_repository_half_copied_are_named() {
    if !weed() || !need(&["qemu-io"]) {
        return;
    }
    let server = Weed::start();
    let image = Image::of(noise(3, 3 << 20));
    let serve = |url: &str, state: &str| {
        Serve::new(Path::new(url), &image.dir().join(state)).name("disk").credentials(ACCESS_KEY, SECRET_KEY)
    };
    let said = serve(&server.url("nothing"), "s1").refused();
    assert!(said.contains("is not a repository") && said.contains("\nhint: check --access"), "{said}");

    // As a copy that was cut short leaves it, where refs went first.
    let url = server.url("half");
    store(&image, &url, ACCESS_KEY, SECRET_KEY).ok();
    let block = image.objects("blocks").pop().unwrap();
    let key = format!("half/{}", block.strip_prefix(image.repo()).unwrap().display());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(server.client().delete_object().bucket(harness::weed::BUCKET).key(&key).send()).unwrap();
    let disk = serve(&url, "s2").start();
    let read = ["-r", "-f", "raw", "-c", "read 0 3M"];
    let failed = run(Command::new("qemu-io").args(read).arg(disk.uri("disk")));
    assert!(!failed.status.success() || failed.stdout.contains("error"), "{failed:?}");
    disk.logs(block.file_name().unwrap().to_str().unwrap());
    disk.stop();

    let commit = image.objects("commits").pop().unwrap();
    let name = commit.file_name().unwrap().to_str().unwrap().to_owned();
    let listed = runtime
        .block_on(
            server
                .client()
                .list_objects_v2()
                .bucket(harness::weed::BUCKET)
                .prefix("half/images/disk/commits/")
                .send(),
        )
        .unwrap();
    for object in listed.contents() {
        let gone = server.client().delete_object().bucket(harness::weed::BUCKET).key(object.key().unwrap());
        runtime.block_on(gone.send()).unwrap();
    }
    let said = serve(&url, "s3").refused();
    assert!(said.contains("commits/") && said.contains("\nhint: put this object back"), "{name}: {said}");
}

#[test]
fn a_real_server_that_ignores_conditions_is_refused_and_nothing_is_stored_there() {
    if !rclone() {
        return;
    }
    let server = Rclone::start();
    let image = Image::of(noise(5, 1 << 20));
    let said = store(&image, &url_at(server.address(), "r"), ACCESS_KEY, SECRET_KEY).refused();
    assert!(
        said.contains("the server does not keep If-None-Match, so writers could overwrite each other unseen; nothing is written there"),
        "{said}"
    );
    let mut dirs = vec![server.bucket()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            let is_probe = entry.strip_prefix(server.bucket()).unwrap().starts_with("r/probe");
            assert!(is_probe || entry.is_dir(), "{} was written", entry.display());
            if entry.is_dir() {
                dirs.push(entry);
            }
        }
    }
}

/// A server that says that the clocks are apart.
fn skewed() -> (u16, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answering = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        while lines.read_line(&mut line).unwrap() > 2 {
            line.clear();
        }
        let body = "<?xml version=\"1.0\"?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time and the current time is too large.</Message></Error>";
        let head =
            format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
        lines.get_mut().write_all((head + body).as_bytes()).unwrap();
    });
    (port, answering)
}

#[test]
fn clocks_that_are_apart_are_said_to_be() {
    let (port, answering) = skewed();
    let image = Image::of(noise(4, 1 << 20));
    let url = url_at(([127, 0, 0, 1], port).into(), "r");
    let said = store(&image, &url, "any", "thing").refused();
    assert!(
        said.ends_with(
            "the clocks of this machine and of the server are too far apart; hint: set this one right\n"
        ),
        "{said}"
    );
    answering.join().unwrap();
}
