//! Ceph's object gateway, on a cluster of one monitor and three OSDs of which two hold every object: a second S3 engine with habits of its own.
//!
//! Debian 12's (16.2) takes If-Match only with a tag without quotes. Slow to set up and large to install, so the soak has it.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::weed::{ACCESS_KEY, BUCKET, SECRET_KEY, client_at, free_ports};
use super::{log_ends, need, run, until};

const PATIENCE: Duration = Duration::from_secs(120);
const OSDS: usize = 3;

/// Whether it can be run here; skipped, or failed in CI.
pub fn ceph() -> bool {
    need(&["ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool"])
}

/// A running cluster with an empty bucket. It is killed when dropped, and its data goes.
pub struct Ceph {
    osds: Vec<Child>,
    others: Vec<Child>,
    gateway: u16,
    dir: tempfile::TempDir,
}

impl Ceph {
    pub fn start() -> Ceph {
        // Sockets lie in it, and their paths may be 107 bytes long.
        let dir = tempfile::Builder::new().prefix("ceph").tempdir_in("/tmp").unwrap();
        let [monitor, gateway] = free_ports();
        let mut ceph = Ceph { osds: Vec::new(), others: Vec::new(), gateway, dir };
        let id = uuid::Uuid::new_v4().to_string();
        std::fs::write(ceph.path("ceph.conf"), ceph.config(&id, monitor)).unwrap();
        for dir in ["mon", "run", "osd0", "osd1", "osd2"] {
            std::fs::create_dir(ceph.path(dir)).unwrap();
        }
        ceph.make_keys();
        let address = format!("[v1:127.0.0.1:{monitor}]");
        ceph.run("monmaptool", &["--create", "--fsid", &id, "--addv", "a", &address, "monmap"]);
        ceph.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring"]);
        let process = ceph.process("ceph-mon", &["-i", "a"], "monitor.out");
        ceph.others.push(process);
        for number in 0..OSDS {
            let (id, uuid) = (number.to_string(), uuid::Uuid::new_v4().to_string());
            ceph.run("ceph", &["osd", "new", &uuid]);
            let (osd, host) = (format!("osd.{id}"), format!("host=h{id}"));
            ceph.run("ceph", &["osd", "crush", "add", &osd, "1", "root=default", &host]);
            ceph.run("ceph-osd", &["-i", &id, "--mkfs", "--osd-uuid", &uuid]);
            let process = ceph.process("ceph-osd", &["-i", &id], &format!("osd{id}.out"));
            ceph.osds.push(process);
        }
        let process = ceph.process("radosgw", &["-n", "client.rgw"], "gateway.out");
        ceph.others.push(process);
        let listens = || std::net::TcpStream::connect(ceph.address()).is_ok();
        assert!(until(PATIENCE, listens), "the gateway does not listen:\n{}", ceph.logs());
        let keys = [format!("--access-key={ACCESS_KEY}"), format!("--secret-key={SECRET_KEY}")];
        let user = ["-n", "client.rgw", "user", "create", "--uid=h", "--display-name=h", &keys[0], &keys[1]];
        ceph.run("radosgw-admin", &user);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = client_at(ceph.address());
        let made = || runtime.block_on(client.create_bucket().bucket(BUCKET).send()).is_ok();
        assert!(until(PATIENCE, made), "the gateway makes no bucket:\n{}", ceph.logs());
        ceph
    }

    fn config(&self, id: &str, monitor: u16) -> String {
        let (dir, gateway) = (self.dir.path().display(), self.gateway);
        format!(
            "[global]
fsid = {id}
mon host = v1:127.0.0.1:{monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {dir}/keyring
run dir = {dir}/run
admin socket = {dir}/run/$name.$pid.asok
pid file = {dir}/run/$name.$pid.pid
log file = {dir}/$name.log
mon data = {dir}/mon
osd data = {dir}/osd$id
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 2
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
rgw dynamic resharding = false
rgw frontends = beast endpoint=127.0.0.1:{gateway} tcp_nodelay=1
"
        )
    }

    fn make_keys(&self) {
        let key = |name: &str, caps: &[&str]| {
            let new = if name == "mon." { &["--create-keyring"][..] } else { &[] };
            let args = [&["keyring", "--gen-key", "-n", name], new, caps].concat();
            self.run("ceph-authtool", &args);
        };
        key("mon.", &["--cap", "mon", "allow *"]);
        key("client.admin", &["--cap", "mon", "allow *", "--cap", "osd", "allow *"]);
        for number in 0..OSDS {
            key(&format!("osd.{number}"), &["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"]);
        }
        key("client.rgw", &["--cap", "mon", "allow rw", "--cap", "osd", "allow rwx"]);
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path());
        match program {
            "ceph-authtool" | "monmaptool" => {}
            _ => _ = command.args(["-c", "ceph.conf"]),
        }
        command
    }

    fn run(&self, program: &str, args: &[&str]) {
        run(&mut self.command(program, args)).ok();
    }

    fn process(&self, program: &str, args: &[&str], log: &str) -> Child {
        let log = std::fs::File::create(self.path(log)).unwrap();
        let mut command = self.command(program, args);
        command.arg("-f").stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.gateway).into()
    }

    /// kill -9 of one of the three.
    pub fn kill_osd(&mut self, number: usize) {
        self.osds[number].kill().unwrap();
        self.osds[number].wait().unwrap();
    }

    fn logs(&self) -> String {
        log_ends(self.dir.path())
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        for child in self.others.iter_mut().chain(&mut self.osds) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}
