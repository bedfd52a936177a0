//! What goes wrong between a server and its bucket: every fault is got over, or said once and clearly.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::proxy::{Fault, Proxy, Reach, Rule};
use harness::weed::{ACCESS_KEY, SECRET_KEY, Weed, url_at, weed, with_credentials};
use harness::{Image, Ran, Serve, Server, cli, need, noise, run, until};

const MIB: usize = 1 << 20;

/// A bucket behind a proxy, and what the image `disk` in it holds.
struct Far {
    server: Weed,
    proxy: Proxy,
    dir: tempfile::TempDir,
    raw: Vec<u8>,
}

impl Far {
    fn new(raw: Vec<u8>) -> Far {
        let server = Weed::start();
        let proxy = Proxy::http(server.address());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("raw"), &raw).unwrap();
        Far { server, proxy, dir, raw }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Stores the image, through the proxy or past it.
    fn store(&self, url: &str) -> Ran {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "1M", "disk"]).arg(self.path("raw")).arg(url);
        with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
        run(&mut cli)
    }

    fn url(&self, repo: &str) -> String {
        url_at(self.proxy.address(), repo)
    }

    fn serve(&self, repo: &str, state: &str) -> Serve {
        Serve::new(Path::new(&self.url(repo)), &self.path(state))
            .name("disk")
            .credentials(ACCESS_KEY, SECRET_KEY)
    }

    fn read_all(&self, server: &Server) {
        let copy = self.path("copy");
        run(Command::new("nbdcopy").arg(server.uri("disk")).arg(&copy)).ok();
        assert!(std::fs::read(&copy).unwrap() == self.raw, "what came differs");
    }
}

/// A read by another program, that may take its time.
fn reading(server: &Server, at: &str) -> std::process::Child {
    let read = format!("read {at} 4k");
    Command::new("qemu-io")
        .args(["-r", "-f", "raw", "-c", &read])
        .arg(server.uri("disk"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn every_fault_of_an_answer_is_got_over_and_nothing_wrong_is_served() {
    if !weed() || !need(&["nbdcopy"]) {
        return;
    }
    let far = Far::new(noise(1, 12 * MIB));
    far.store(&far.server.url("r")).ok();
    let faults = [
        Fault::ResetMidBody,
        Fault::CutShort,
        Fault::LowerLength,
        Fault::Stall(Some(Duration::from_secs(2))),
        Fault::InternalError,
        Fault::SlowDown { retry_after_s: None },
        Fault::ErrorPage,
        Fault::WrongByte,
        Fault::LostAnswer,
    ];
    for (number, fault) in faults.into_iter().enumerate() {
        let server = far.serve("r", &format!("state{number}")).start();
        // What comes spoilt and looks whole is read twice more, so it must not be met three times in a row.
        let looks_whole = matches!(fault, Fault::LowerLength | Fault::WrongByte);
        let rule = Rule::new(fault).method("GET").path("/blocks/");
        let (rule, least) = if looks_whole { (rule.next(2), 2) } else { (rule.every(3), 3) };
        let hits = far.proxy.rule(rule);
        let began = Instant::now();
        far.read_all(&server);
        assert!(hits.count() >= least, "{fault:?} met {} requests", hits.count());
        assert!(began.elapsed() < Duration::from_secs(60), "{fault:?} cost {:?}", began.elapsed());
        far.proxy.clear_rules();
        server.stop();
    }
}

#[test]
fn an_image_is_stored_whole_though_requests_and_answers_are_lost() {
    if !weed() || !need(&["nbdcopy"]) {
        return;
    }
    let far = Far::new(noise(2, 24 * MIB));
    let writes = [
        Fault::LostAnswer,
        Fault::ResetMidBody,
        Fault::InternalError,
        Fault::SlowDown { retry_after_s: Some(1) },
    ];
    for (number, fault) in writes.into_iter().enumerate() {
        // Not the probe: it has to know, and says so when it can't.
        let hits: Vec<_> = ["/blocks/", "/maps/", "/commits/", "/refs/"]
            .map(|kind| far.proxy.rule(Rule::new(fault).method("PUT").path(kind).next(1)))
            .into();
        let repo = format!("w{number}");
        let said = far.store(&far.url(&repo)).ok();
        assert!(said.contains("stored as"), "{said}");
        assert!(hits.iter().all(|hits| hits.count() == 1), "{fault:?} was not met everywhere");
        far.proxy.clear_rules();
        assert!(far.store(&far.url(&repo)).ok().contains("unchanged"));
        let server = far.serve(&repo, &format!("state-w{number}")).start();
        far.read_all(&server);
        server.stop();
    }
}

#[test]
fn a_repository_that_goes_away_costs_time_and_no_error_and_is_told_of_once() {
    if !weed() || !need(&["nbdcopy", "qemu-io", "fio"]) {
        return;
    }
    let away = if std::env::var_os("HORCRUX_SOAK").is_some() { 60 } else { 8 };
    let far = Far::new(noise(3, 32 * MIB));
    far.store(&far.server.url("r")).ok();
    for reach in [Reach::Refusing, Reach::Silent] {
        let server = far.serve("r", &format!("state {reach:?}")).arg("--prefetch").arg("none").start();
        // The first half is here.
        run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 0 16M"]).arg(server.uri("disk")))
            .ok();
        far.proxy.set_reach(reach);
        let mut waits = reading(&server, "24M");
        let mut fio = Command::new("fio");
        // It leaves a file behind.
        fio.current_dir(far.dir.path());
        fio.args(["--ioengine=nbd", "--name=here", "--rw=randrw", "--bs=4k", "--iodepth=16", "--size=16M"]);
        fio.args(["--time_based", &format!("--runtime={away}"), "--verify=crc32c", "--verify_backlog=64"]);
        fio.arg(format!("--uri={}", server.uri("disk")));
        run(&mut fio).ok();
        assert!(waits.try_wait().unwrap().is_none(), "what is not here waits");
        far.proxy.set_reach(Reach::Here);
        let ended = until(Duration::from_secs(60), || waits.try_wait().unwrap().is_some());
        if !ended {
            waits.kill().unwrap();
        }
        let output = waits.wait_with_output().unwrap();
        assert!(ended && output.status.success(), "{output:?}");
        // A server that is silent is known to be away only when the first attempt is given up.
        let told = server.lines("no answer").len();
        assert!(told == 1 || reach == Reach::Silent && told == 0, "{}", server.log());
        assert_eq!(server.lines("answers again").len(), told, "{}", server.log());
        server.stop();
    }
}

#[test]
fn a_read_that_waited_long_enough_is_an_io_error_and_the_next_one_works() {
    if !weed() || !need(&["qemu-io"]) {
        return;
    }
    let far = Far::new(noise(4, 8 * MIB));
    far.store(&far.server.url("r")).ok();
    let server = far.serve("r", "state").arg("--remote-timeout").arg("3").start();
    far.proxy.set_reach(Reach::Refusing);
    let began = Instant::now();
    let output = reading(&server, "5M").wait_with_output().unwrap();
    let took = began.elapsed();
    assert!(
        !output.status.success() || String::from_utf8_lossy(&output.stdout).contains("error"),
        "{output:?}"
    );
    assert!((2..20).contains(&took.as_secs()), "{took:?}");
    assert!(!server.lines("ERROR").is_empty() || !server.lines("WARN").is_empty(), "{}", server.log());
    for secret in [ACCESS_KEY, SECRET_KEY] {
        assert!(!server.log().contains(secret), "{}", server.log());
    }
    far.proxy.set_reach(Reach::Here);
    let output = reading(&server, "5M").wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    server.stop();
}

#[test]
fn an_address_where_nobody_answers_is_given_up_soon() {
    if !weed() {
        return;
    }
    let image = Image::of(noise(5, MIB));
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut cli = cli();
    cli.args(["image-from-file", "disk"]).arg(image.raw_file()).arg(url_at(nobody, "r"));
    with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
    let began = Instant::now();
    let said = run(&mut cli).refused();
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let error = said.lines().find(|line| line.starts_with("error: ")).unwrap();
    assert!(error.contains("Connection refused") || error.contains("connection refused"), "{said}");
}
