//! The volume driver, asked as Docker asks it, over its socket; the daemon behind it is real, the kernel's part is in `kernel_docker.rs`.
//!
//! Failures users of other systems reported, and the test here that would find them:
//!
//! | failure | test |
//! |---|---|
//! | Docker drops a volume whose Get answers an error at start | `what_docker_knows_is_answered_with_the_daemon_away` |
//! | Create is not idempotent, or begins anew | `docker_s_calls_make_show_and_remove_volumes` |
//! | a request retried after a crash | `a_killed_driver_knows_its_volumes_again_and_any_call_may_come_twice` |
//! | a Mount that failed gets no Unmount | `a_mount_that_fails_leaves_nothing_behind` |

#![allow(clippy::unwrap_used)]

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::proxy::{Proxy, Reach};
use harness::weed::{self, Weed};
use harness::{Image, PATIENCE, Serve, Server, Tmpfs, need, need_root, run, until, volume, wait};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The driver as a process; killed when dropped.
struct Driver {
    child: Child,
    socket: PathBuf,
}

fn command(state: &Path, socket: &Path) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd")).with_file_name("horcrux-dv");
    assert!(path.exists(), "{} is not built; run: cargo build --workspace --bins", path.display());
    let mut command = Command::new(path);
    command.arg("--state-dir").arg(state).arg("--socket").arg(socket).env_remove("RUST_LOG");
    command
}

impl Driver {
    fn start(state: &Path) -> Driver {
        let socket = state.join("plugins/horcrux-nbd.sock");
        let child = command(state, &socket).stdin(Stdio::null()).spawn().unwrap();
        let driver = Driver { child, socket };
        // One of a killed driver is there too, and nobody answers.
        let listens = || std::os::unix::net::UnixStream::connect(&driver.socket).is_ok();
        assert!(until(PATIENCE, listens), "the driver does not listen");
        driver
    }

    /// A call as Docker makes it; what was answered.
    #[track_caller]
    fn call(&self, what: &str, body: &Value) -> Value {
        self.send(what, &body.to_string())
    }

    #[track_caller]
    fn send(&self, what: &str, body: &str) -> Value {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "-X", "POST", "-H"])
            .arg("Content-Type: application/vnd.docker.plugins.v1.2+json")
            .arg("--unix-socket")
            .arg(&self.socket)
            .arg(format!("http://localhost/{what}"))
            .args(["--data-binary", body]);
        serde_json::from_str(&run(&mut curl).ok()).unwrap()
    }

    /// What Docker would show.
    #[track_caller]
    fn refused(&self, what: &str, body: &Value) -> String {
        let said = self.call(what, body)["Err"].as_str().unwrap().to_owned();
        assert!(!said.is_empty(), "{what} {body} was not refused");
        said
    }

    #[track_caller]
    fn ok(&self, what: &str, body: &Value) -> Value {
        let answer = self.call(what, body);
        assert_eq!(answer["Err"], "", "{what} {body}");
        answer
    }

    #[track_caller]
    fn create(&self, name: &str, options: &Value) {
        self.ok("VolumeDriver.Create", &json!({"Name": name, "Opts": options}));
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    #[track_caller]
    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(wait(&mut self.child, PATIENCE).unwrap().success());
        assert!(!self.socket.exists());
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn disk(image: &Image) -> Value {
    json!({"name": "disk", "access": image.repo()})
}

/// A volume v1 of an image without a filesystem, with its daemon and its driver. What is first goes last: the image holds everything.
fn one_volume() -> (Image, PathBuf, Server, Driver) {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let driver = Driver::start(&state);
    driver.create("v1", &disk(&image));
    (image, state, server, driver)
}

#[test]
fn docker_s_calls_make_show_and_remove_volumes() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let driver = Driver::start(&state);
    assert_eq!(std::fs::metadata(&driver.socket).unwrap().permissions().mode() & 0o077, 0);
    assert_eq!(driver.ok("Plugin.Activate", &json!({})), json!({"Implements": ["VolumeDriver"], "Err": ""}));
    assert_eq!(
        driver.ok("VolumeDriver.Capabilities", &json!({})),
        json!({"Capabilities": {"Scope": "local"}, "Err": ""})
    );
    assert_eq!(driver.ok("VolumeDriver.List", &json!({})), json!({"Volumes": [], "Err": ""}));
    for _ in 0..2 {
        driver.create("v1", &disk(&image));
    }
    driver.create("v2", &json!({"--name": "disk@main", "--access": image.repo(), "ro": "", "quota": "64M"}));
    let shown = driver.ok("VolumeDriver.Get", &json!({"Name": "v2"}))["Volume"].clone();
    assert_eq!((shown["Name"].as_str(), shown["Mountpoint"].as_str()), (Some("v2"), Some("")));
    assert!(shown["CreatedAt"].as_str().unwrap().ends_with('Z'), "{shown}");
    let status = &shown["Status"];
    assert_eq!((&status["image"], &status["read_only"]), (&json!("disk@main"), &json!(true)));
    assert_eq!((&status["quota"], &status["size"]), (&json!(64 << 20), &json!(16 << 20)));
    assert_eq!(status["commit"].as_str().unwrap().len(), 64);
    let listed = driver.ok("VolumeDriver.List", &json!({}));
    let names: Vec<_> = listed["Volumes"].as_array().unwrap().iter().map(|volume| &volume["Name"]).collect();
    assert_eq!(names, ["v1", "v2"]);
    assert_eq!(driver.ok("VolumeDriver.Path", &json!({"Name": "v1"}))["Mountpoint"], "");
    // One the command line made, or that is there already, is taken up by its name alone.
    volume(&state, &["create", "mine", "--access", image.repo().to_str().unwrap(), "--name", "disk"]).ok();
    for options in [json!(null), json!({})] {
        driver.create("mine", &options);
    }
    for name in ["v1", "v1", "v2", "mine", "never"] {
        driver.ok("VolumeDriver.Remove", &json!({"Name": name}));
    }
    assert_eq!(driver.ok("VolumeDriver.List", &json!({}))["Volumes"], json!([]));
    assert_eq!(volume(&state, &["ls", "--json"]).ok().trim(), "[]");
    driver.stop();
    server.stop();
}

#[test]
fn what_docker_can_t_have_is_refused_with_words() {
    let (image, state, server, driver) = one_volume();
    let repo = image.repo();
    let repo = repo.to_str().unwrap();
    for (name, options, words) in [
        (
            "v2",
            json!({"name": "disk", "acces": repo}),
            "unknown option 'acces'; known are name, access, mirror",
        ),
        ("v2", json!({"name": "disk"}), "option 'access' is missing, as in 'docker volume create"),
        ("v2", json!({}), "option 'name' is missing"),
        ("v2", json!({"name": "disk", "access": repo, "size": "lots"}), "option 'size': 'lots' is no size"),
        (
            "v2",
            json!({"name": "disk", "access": repo, "size": "1M"}),
            "volume v2 can't have 1.0 MiB: its image has 16.0 MiB",
        ),
        ("v2", json!({"name": "disk", "access": repo, "fs": "xfs"}), "disk@main holds none, not xfs"),
        ("v2", json!({"name": "disk", "access": "gopher://x"}), "gopher"),
        ("v2", json!({"name": "disk", "access": "repo"}), "option 'access': 'repo' is relative"),
        ("v2", json!({"name": "disk", "access": "/nowhere/at/all"}), "/nowhere/at/all"),
        ("v2", json!({"name": "dusk", "access": repo}), "it has: disk"),
        ("v2", json!({"name": "disk", "access": repo, "version": "v9"}), "v9"),
        ("v1", json!({"name": "disk", "access": repo, "quota": "1G"}), "volume v1"),
        ("../v2", disk(&image), "it must start with a letter or digit"),
    ] {
        let said = driver.refused("VolumeDriver.Create", &json!({"Name": name, "Opts": options}));
        assert!(said.contains(words) && !said.contains('\n'), "{options}: {said}");
    }
    for call in ["Mount", "Unmount", "Path", "Get"] {
        let said = driver.refused(&format!("VolumeDriver.{call}"), &json!({"Name": "v9", "ID": "a"}));
        assert!(said.starts_with("there is no volume v9: 'docker volume create -d horcrux-nbd"), "{said}");
    }
    // One that is not mounted: Docker may ask again for what it has not heard an answer to.
    driver.ok("VolumeDriver.Unmount", &json!({"Name": "v1", "ID": "a"}));
    for (body, words) in
        [("{\"Name\":", "the request can't be understood"), ("[]", "the request can't be understood")]
    {
        let said = driver.send("VolumeDriver.Get", body);
        assert!(said["Err"].as_str().unwrap().contains(words), "{said}");
    }
    assert!(driver.send("VolumeDriver.Mount", "")["Err"].as_str().unwrap().contains("came without its body"));
    let unknown = driver.call("VolumeDriver.Snapshot", &json!({}));
    assert_eq!(
        unknown["Err"],
        "there is no /VolumeDriver.Snapshot: POST to /VolumeDriver.* or /Plugin.Activate"
    );
    // More than any request is.
    let huge = image.dir().join("huge");
    std::fs::write(&huge, vec![b' '; 1 << 20]).unwrap();
    let status_of = |body: &str, more: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"])
            .arg(&driver.socket);
        run(curl.args(["http://localhost/VolumeDriver.Get", "--data-binary", body]).args(more)).ok()
    };
    assert_eq!(status_of(&format!("@{}", huge.display()), &[]), "413");
    // Docker looks at the words, and says what it accepts; podman looks at the status.
    assert_eq!(status_of(r#"{"Name": "none"}"#, &[]), "200");
    assert_eq!(status_of(r#"{"Name": "none"}"#, &["-H", "Accept:"]), "500");
    // A second driver, on the same state or on the same socket.
    let other = image.dir().join("other-state");
    for (state, socket, words) in [
        (&other, &driver.socket, format!("error: can't listen on {}: ", driver.socket.display())),
        (
            &other,
            &huge,
            format!("error: can't listen on {}: something that is no socket is there", huge.display()),
        ),
    ] {
        let second = run(&mut command(state, socket));
        assert!(second.status.code() == Some(1) && second.stderr.contains(&words), "{}", second.stderr);
    }
    let second = command(&state, &state.join("second.sock")).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    let line = format!(
        "error: another driver runs on {}: in use by process {}",
        state.join("driver").display(),
        driver.child.id()
    );
    assert!(said.contains(&line) && second.status.code() == Some(1), "{said}");
    // A directory with something of somebody else's in it.
    let taken = image.dir().join("taken");
    std::fs::create_dir_all(taken.join("photos")).unwrap();
    let mode = std::fs::metadata(&taken).unwrap().permissions();
    let said = run(command(&other, &state.join("third.sock")).arg("--mounts").arg(&taken));
    let line = format!("error: {} is not empty, and no driver has used it", taken.display());
    assert!(said.status.code() == Some(1) && said.stderr.contains(&line), "{}", said.stderr);
    assert!(taken.join("photos").is_dir() && std::fs::metadata(&taken).unwrap().permissions() == mode);
    assert_eq!(volume(&state, &["ls"]).ok().lines().filter(|line| line.contains("v2")).count(), 0);
    driver.stop();
    server.stop();
}

#[test]
fn what_docker_knows_is_answered_with_the_daemon_away() {
    let (image, state, server, driver) = one_volume();
    server.stop();
    let shown = driver.ok("VolumeDriver.Get", &json!({"Name": "v1"}));
    assert_eq!(shown["Volume"]["Name"], "v1");
    let said = shown["Volume"]["Status"]["daemon"].as_str().unwrap();
    assert!(said.starts_with("no daemon answers at "), "{said}");
    assert_eq!(driver.ok("VolumeDriver.List", &json!({}))["Volumes"][0]["Name"], "v1");
    assert_eq!(driver.ok("VolumeDriver.Path", &json!({"Name": "v1"}))["Mountpoint"], "");
    let may_mount = need_root("to put a guard below mounts");
    for (call, body) in [
        ("Create", json!({"Name": "v2", "Opts": disk(&image)})),
        ("Mount", json!({"Name": "v1", "ID": "a"})),
        ("Remove", json!({"Name": "v1"})),
    ] {
        if call == "Mount" && !may_mount {
            continue;
        }
        let said = driver.refused(&format!("VolumeDriver.{call}"), &body);
        let hint = "(start it with 'horcrux-nbd serve', or give the --state-dir it runs on)";
        assert!(said.starts_with("no daemon answers at ") && said.ends_with(hint), "{said}");
    }
    assert!(std::fs::read_dir(state.join("mounts")).unwrap().next().is_none(), "a mountpoint is left");
    // It comes back, and nobody has to tell the driver.
    let server = Serve::daemon(&state).start();
    assert_eq!(
        driver.ok("VolumeDriver.Get", &json!({"Name": "v1"}))["Volume"]["Status"]["image"],
        "disk@main"
    );
    driver.ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
    driver.stop();
    server.stop();
}

#[test]
fn a_killed_driver_knows_its_volumes_again_and_any_call_may_come_twice() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    let mut driver = Driver::start(&state);
    driver.create("v1", &disk(&image));
    driver.kill();
    let mut driver = Driver::start(&state);
    assert_eq!(driver.ok("VolumeDriver.List", &json!({}))["Volumes"][0]["Name"], "v1");
    // The daemon did it and the driver died before it said so: asked again, it is done.
    driver.kill();
    volume(&state, &["rm", "v1"]).ok();
    volume(&state, &["create", "v2", "--access", image.repo().to_str().unwrap(), "--name", "disk"]).ok();
    let driver = Driver::start(&state);
    driver.ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
    driver.create("v2", &disk(&image));
    assert_eq!(driver.ok("VolumeDriver.List", &json!({}))["Volumes"][0]["Name"], "v2");
    driver.stop();
    server.stop();
}

#[test]
fn a_mount_that_fails_leaves_nothing_behind() {
    if !need(&["curl"]) || !need_root("to put a guard below mounts") {
        return;
    }
    let (_image, state, server, driver) = one_volume();
    let said = driver.refused("VolumeDriver.Mount", &json!({"Name": "v1", "ID": "a"}));
    assert!(said.contains("has no filesystem that is known here"), "{said}");
    // Docker sends no Unmount after this.
    let mounts = state.join("mounts");
    assert!(
        until(PATIENCE, || std::fs::read_dir(&mounts).unwrap().next().is_none()),
        "the mountpoint is left"
    );
    assert_eq!(driver.ok("VolumeDriver.Path", &json!({"Name": "v1"}))["Mountpoint"], "");
    driver.ok("VolumeDriver.Remove", &json!({"Name": "v1"}));
    driver.stop();
    server.stop();
}

/// Docker would not start the container a second time.
#[test]
fn a_mount_waits_for_a_daemon_that_is_being_restarted() {
    if !need(&["curl"]) || !need_root("to put a guard below mounts") {
        return;
    }
    let (_image, state, server, driver) = one_volume();
    server.stop();
    std::thread::scope(|scope| {
        let mount = || driver.refused("VolumeDriver.Mount", &json!({"Name": "v1", "ID": "a"}));
        let mounting = scope.spawn(mount);
        std::thread::sleep(Duration::from_secs(1));
        let server = Serve::daemon(&state).start();
        let said = mounting.join().unwrap();
        assert!(said.contains("has no filesystem that is known here"), "{said}");
        server.stop();
    });
    // One that does not come back is not waited for until Docker gives up.
    let began = Instant::now();
    let said = driver.refused("VolumeDriver.Mount", &json!({"Name": "v1", "ID": "a"}));
    assert!(said.starts_with("no daemon answers at "), "{said}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    driver.stop();
}

#[test]
fn what_a_full_disk_did_not_take_is_written_when_there_is_room_again() {
    if !need(&["curl"]) {
        return;
    }
    let Some(disk) = Tmpfs::mount(1) else { return };
    let image = Image::sparse();
    let state = image.state();
    std::fs::create_dir_all(&state).unwrap();
    std::os::unix::fs::symlink(disk.path(), state.join("driver")).unwrap();
    let server = Serve::daemon(&state).start();
    let driver = Driver::start(&state);
    let noted = || -> Value {
        serde_json::from_slice(&std::fs::read(disk.path().join("volumes.json")).unwrap()).unwrap()
    };
    assert!(until(PATIENCE, || noted()["is_new"] == false), "the daemon's volumes are not taken up");
    let before = noted()["session"].as_u64().unwrap();
    let filler = disk.fill(0);
    driver.call("Plugin.Activate", &json!({}));
    assert_eq!(noted()["session"], before);
    std::fs::remove_file(filler).unwrap();
    assert!(until(PATIENCE, || noted()["session"] == before + 1), "it is never written: {}", noted());
    driver.stop();
    server.stop();
}

/// Docker is told within half a minute, and what it was told failed is not there afterwards.
#[test]
fn a_mount_with_a_repository_that_hangs_is_given_up_in_time() {
    if !weed::weed() || !need(&["curl"]) || !need_root("to put a guard below mounts") {
        return;
    }
    let weed = Weed::start();
    let proxy = Proxy::http(weed.address());
    let image = Image::sparse();
    let far = weed::url_at(proxy.address(), "repo");
    weed.store(&image, "repo");
    let state = image.state();
    let server = Serve::daemon(&state).credentials(weed::ACCESS_KEY, weed::SECRET_KEY).start();
    let driver = Driver::start(&state);
    driver.create("v1", &json!({"name": "disk", "access": far}));
    proxy.set_reach(Reach::Silent);
    let began = Instant::now();
    let said = driver.refused("VolumeDriver.Mount", &json!({"Name": "v1", "ID": "a"}));
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert!(said.starts_with("volume v1 could not be mounted within 20 s"), "{said}");
    assert!(std::fs::read_dir(state.join("mounts")).unwrap().next().is_none(), "the mountpoint is left");
    assert_eq!(driver.ok("VolumeDriver.Get", &json!({"Name": "v1"}))["Volume"]["Mountpoint"], "");
    // The remote is back: what was waited for comes, and the next one is answered at once.
    proxy.set_reach(Reach::Here);
    let came = || {
        let said = driver.refused("VolumeDriver.Mount", &json!({"Name": "v1", "ID": "a"}));
        said.contains("has no filesystem that is known here")
    };
    assert!(until(PATIENCE, came), "it is not read again");
    driver.stop();
    server.stop();
}

/// A certificate of `by`, or of itself.
fn certificate(dir: &Path, name: &str, by: Option<&str>) {
    let file = |name: &str, kind: &str| dir.join(format!("{name}.{kind}")).display().to_string();
    let (key, pem) = (file(name, "key"), file(name, "pem"));
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]);
    openssl.args([
        "-subj",
        &format!("/CN={name}"),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        &key,
        "-out",
        &pem,
    ]);
    if let Some(by) = by {
        openssl.args([
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-CA",
            &file(by, "pem"),
            "-CAkey",
            &file(by, "key"),
        ]);
    }
    run(&mut openssl).ok();
}

#[test]
fn over_tls_only_a_docker_with_a_certificate_is_answered() {
    if !need(&["curl", "openssl"]) {
        return;
    }
    let image = Image::sparse();
    let state = image.state();
    let dir = image.dir();
    for (name, by) in [
        ("ca", None),
        ("driver", Some("ca")),
        ("docker", Some("ca")),
        ("other", None),
        ("stranger", Some("other")),
    ] {
        certificate(dir, name, by);
    }
    let file = |name: &str| dir.join(name).display().to_string();
    let tls = |cert: &str, key: &str, ca: &str| {
        let mut command = command(&state, &state.join("unused.sock"));
        command.args(["--listen", "127.0.0.1:0", "--tls-cert", &file(cert), "--tls-key", &file(key)]);
        command.args(["--tls-client-ca", &file(ca)]);
        command
    };
    for (cert, key, ca, words) in [
        ("nowhere.pem", "driver.key", "ca.pem", "can't use "),
        ("driver.key", "driver.key", "ca.pem", "driver.key holds no certificate"),
        ("driver.pem", "docker.key", "ca.pem", "driver.pem and its key can't be used"),
        ("driver.pem", "driver.key", "ca.key", "ca.key holds no certificate"),
    ] {
        let said = run(&mut tls(cert, key, ca));
        assert!(said.status.code() == Some(1) && said.stderr.contains(words), "{}", said.stderr);
    }
    let log = dir.join("driver.log");
    let mut ours = tls("driver.pem", "driver.key", "ca.pem");
    let mut child = ours.stdin(Stdio::null()).stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let address = || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.split_once("ready address=").and_then(|(_, rest)| Some(rest.lines().next()?.to_owned()))
    };
    assert!(until(PATIENCE, || address().is_some()), "the driver does not listen");
    let url = format!("https://{}/VolumeDriver.Capabilities", address().unwrap());
    let ask = |more: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "20", "--cacert", &file("ca.pem"), "-d", "{}"]).args(more).arg(&url);
        run(&mut curl)
    };
    let with =
        |name: &str| ask(&["--cert", &file(&format!("{name}.pem")), "--key", &file(&format!("{name}.key"))]);
    assert!(with("docker").ok().contains("local"));
    for said in [ask(&[]), with("stranger")] {
        assert!(!said.status.success() && said.stdout.is_empty(), "{} {}", said.stdout, said.stderr);
    }
    assert!(with("docker").ok().contains("local"), "and it goes on");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(wait(&mut child, PATIENCE).unwrap().success());
}

#[test]
fn a_service_manager_gives_the_socket_and_is_told_when_the_driver_is_ready() {
    let image = Image::sparse();
    let state = image.state();
    std::fs::create_dir_all(&state).unwrap();
    let (socket, told) = (state.join("given.sock"), state.join("told.sock"));
    let given = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let manager = std::os::unix::net::UnixDatagram::bind(&told).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    rustix::io::fcntl_setfd(&given, rustix::io::FdFlags::empty()).unwrap();
    let driver = command(&state, &state.join("own.sock"));
    let mut shell = Command::new("/bin/bash");
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
        std::os::fd::AsRawFd::as_raw_fd(&given)
    );
    shell.args(["-c", &script, "driver"]).arg(driver.get_program()).args(driver.get_args());
    let mut child = shell.env("NOTIFY_SOCKET", &told).stdin(Stdio::null()).spawn().unwrap();
    let mut word = [0; 64];
    let length = manager.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"READY=1\n");
    drop(given);
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "20", "-d", "{}", "--unix-socket"]).arg(&socket);
    assert!(run(curl.arg("http://localhost/VolumeDriver.Capabilities")).ok().contains("local"));
    assert!(!state.join("own.sock").exists());
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let length = manager.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"STOPPING=1\n");
    assert!(wait(&mut child, PATIENCE).unwrap().success());
    assert!(socket.exists(), "it is the manager's");
}
