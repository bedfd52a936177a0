//! SeaweedFS as several processes, every object on two of three volume servers, any of which may be killed.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::weed::{ACCESS_KEY, BUCKET, SECRET_KEY, client_at, free_ports};
use super::{fetched, log_ends, until};

const PATIENCE: Duration = Duration::from_secs(120);
const VOLUMES: usize = 3;

/// The processes. They are killed when dropped, and their data goes.
pub struct Cluster {
    volumes: Vec<Child>,
    others: Vec<Child>,
    s3: u16,
    dir: tempfile::TempDir,
}

impl Cluster {
    pub fn start() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let [master, one, two, three, filer, s3] = free_ports();
        let mut cluster = Cluster { volumes: Vec::new(), others: Vec::new(), s3, dir };
        let config = format!(
            r#"{{"identities":[{{"name":"h","credentials":[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}}],
                "actions":["Admin","Read","Write","List","Tagging"]}}]}}"#
        );
        std::fs::write(cluster.dir.path().join("s3.json"), config).unwrap();
        let process = cluster.process("master", |command, dir| {
            command.args(["-defaultReplication=001", "-volumeSizeLimitMB=64", "-telemetry=false"]);
            command.arg(format!("-port={master}")).arg(format!("-mdir={dir}"));
        });
        cluster.others.push(process);
        for port in [one, two, three] {
            let process = cluster.process("volume", |command, dir| {
                command.arg(format!("-port={port}")).arg(format!("-dir={dir}"));
                command.arg("-max=20").arg(format!("-master=127.0.0.1:{master}"));
            });
            cluster.volumes.push(process);
        }
        let process = cluster.process("filer", |command, dir| {
            command.arg(format!("-port={filer}")).arg(format!("-master=127.0.0.1:{master}"));
            command.args(["-defaultReplicaPlacement=001", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
            command.arg(format!("-s3.port={s3}")).arg(format!("-defaultStoreDir={dir}"));
            command.arg("-s3.config=s3.json");
        });
        cluster.others.push(process);
        cluster.wait();
        cluster
    }

    fn process(&self, what: &str, options: impl FnOnce(&mut Command, &str)) -> Child {
        let number = self.volumes.len();
        let dir = self.dir.path().join(format!("{what}{number}"));
        std::fs::create_dir(&dir).unwrap();
        let log = std::fs::File::create(self.dir.path().join(format!("{what}{number}.log"))).unwrap();
        let mut command = Command::new(fetched("weed"));
        command.arg(what).args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
        options(&mut command, dir.to_str().unwrap());
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    /// Until it takes a bucket, and objects on all it has.
    fn wait(&self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = client_at(self.address());
        let ready = until(PATIENCE, || {
            runtime.block_on(async {
                let _ = client.create_bucket().bucket(BUCKET).send().await;
                let put =
                    client.put_object().bucket(BUCKET).key("ready").body(vec![1; 4096].into()).send().await;
                let gone = client.delete_object().bucket(BUCKET).key("ready").send().await;
                put.is_ok() && gone.is_ok()
            })
        });
        assert!(ready, "the cluster takes nothing:\n{}", self.logs());
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.s3).into()
    }

    /// kill -9 of one of the three.
    pub fn kill_volume_server(&mut self, number: usize) {
        assert!(number < VOLUMES);
        self.volumes[number].kill().unwrap();
        self.volumes[number].wait().unwrap();
    }

    fn logs(&self) -> String {
        log_ends(self.dir.path())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.others.iter_mut().chain(&mut self.volumes) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}
