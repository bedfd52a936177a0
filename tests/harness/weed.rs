//! A real, distributed S3 server: SeaweedFS, as a process.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use rand::Rng;

use super::{Image, can, cli, fetched, run, until};

/// What the one identity of the server is called, and its secret: what must never be seen anywhere.
pub const ACCESS_KEY: &str = "AKIDHORCRUXTEST";
pub const SECRET_KEY: &str = "5ecre7-n0b0dy-may-5ee";
/// One who may read and nothing else.
pub const READER_KEY: &str = "AKIDREADER";
pub const READER_SECRET: &str = "re4d-0nly-5ecret";
/// The bucket that is there.
pub const BUCKET: &str = "volumes";
/// From start to the first answer it takes some 5 s.
const PATIENCE: Duration = Duration::from_secs(90);

/// Whether the server can be run here; skipped, or failed in CI.
pub fn weed() -> bool {
    can(fetched("weed").is_file(), "SeaweedFS is missing; `make tools` fetches it")
}

/// A running server with an empty bucket. It is killed when dropped, and its data goes.
pub struct Weed {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Weed {
    pub fn start() -> Weed {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            r#"{{"identities":[{{"name":"h","credentials":[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}}],
                "actions":["Admin","Read","Write","List","Tagging"]}},
                {{"name":"r","credentials":[{{"accessKey":"{READER_KEY}","secretKey":"{READER_SECRET}"}}],
                "actions":["Read","List"]}}]}}"#
        );
        std::fs::write(dir.path().join("s3.json"), config).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let [master, volume, filer, s3] = free_ports();
        let mut command = Command::new(fetched("weed"));
        command.arg("server").arg(format!("-dir={}", dir.path().join("data").display()));
        command.args([
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            "-volume.max=20",
            "-master.volumeSizeLimitMB=256",
        ]);
        // Nothing leaves this machine, and no port is taken that was not asked for.
        command.args(["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
        command.arg(format!("-master.port={master}")).arg(format!("-volume.port={volume}"));
        command.arg(format!("-filer.port={filer}")).arg(format!("-s3.port={s3}"));
        command.arg(format!("-s3.config={}", dir.path().join("s3.json").display()));
        command.current_dir(dir.path()).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let mut weed = Weed { child, port: s3, dir };
        weed.wait();
        weed
    }

    /// Until it takes a bucket and an object.
    fn wait(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = self.client();
        let ready = until(PATIENCE, || {
            assert!(self.child.try_wait().unwrap().is_none(), "weed ended:\n{}", self.log());
            runtime.block_on(async {
                // It is there already where only the object failed.
                let _ = client.create_bucket().bucket(BUCKET).send().await;
                let put = client.put_object().bucket(BUCKET).key("ready").body(vec![1].into()).send().await;
                let gone = client.delete_object().bucket(BUCKET).key("ready").send().await;
                put.is_ok() && gone.is_ok()
            })
        });
        assert!(ready, "weed takes nothing:\n{}", self.log());
    }

    /// A client of its own making, with this server's credentials.
    pub fn client(&self) -> Client {
        client_at(self.address())
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Where it listens: for a proxy in front of it.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// A repository's URL below the bucket.
    pub fn url(&self, prefix: &str) -> String {
        url_at(self.address(), prefix)
    }

    /// Keeps `image` under `prefix`, by the name `disk`.
    pub fn store(&self, image: &Image, prefix: &str) {
        let mut store = cli();
        with_credentials(&mut store, ACCESS_KEY, SECRET_KEY);
        run(store.args(["image-from-file", "disk"]).arg(image.raw_file()).arg(self.url(prefix))).ok();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        // SIGTERM takes it some 20 s, and nothing of it is kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            eprintln!("weed's log ends:\n{}", &log[log.len().saturating_sub(2000)..]);
        }
    }
}

/// A client of the S3 server at `address`, with the credentials all servers of the tests take.
pub fn client_at(address: SocketAddr) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "test"))
        .region(Region::new("us-east-1"))
        .endpoint_url(format!("http://{address}"))
        .force_path_style(true);
    Client::from_conf(config.build())
}

/// A repository's URL below the bucket, for who comes by `address`: the server's own or a proxy's.
pub fn url_at(address: SocketAddr, prefix: &str) -> String {
    format!("minio://{address}/{BUCKET}/{prefix}")
}

/// Gives a command this server's credentials and nothing else of the AWS tools.
pub fn with_credentials(command: &mut Command, access: &str, secret: &str) {
    without_credentials(command);
    command.env("AWS_ACCESS_KEY_ID", access).env("AWS_SECRET_ACCESS_KEY", secret);
}

/// Takes a command everything the AWS tools keep.
pub fn without_credentials(command: &mut Command) {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
        command.env_remove(name);
    }
    command.env("AWS_EC2_METADATA_DISABLED", "true").env("HOME", "/nonexistent");
}

/// Ports nobody has, nor the ones 10,000 above them, where it speaks gRPC.
pub(super) fn free_ports<const N: usize>() -> [u16; N] {
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let mut taken: Vec<u16> = Vec::new();
    std::array::from_fn(|_| {
        loop {
            let port = rand::rng().random_range(10_000..22_000);
            if !taken.contains(&port) && is_free(port) && is_free(port + 10_000) {
                taken.push(port);
                return port;
            }
        }
    })
}
