//! A real S3 server that takes conditions and ignores them: rclone's, on a directory.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::weed::{ACCESS_KEY, BUCKET, SECRET_KEY};
use super::{can, fetched, until};

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether it can be run here; skipped, or failed in CI.
pub fn rclone() -> bool {
    can(fetched("rclone").is_file(), "rclone is missing; `make tools` fetches it")
}

/// A running server with an empty bucket. It is killed when dropped, and its data goes.
pub struct Rclone {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Rclone {
    pub fn start() -> Rclone {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let mut command = Command::new(fetched("rclone"));
        command.args(["serve", "s3", "--config=", "--addr", &address.to_string()]);
        command.args(["--auth-key", &format!("{ACCESS_KEY},{SECRET_KEY}")]).arg(dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let rclone = Rclone { child: command.spawn().unwrap(), address, dir };
        assert!(until(PATIENCE, || TcpStream::connect(rclone.address).is_ok()), "rclone does not listen");
        rclone
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the bucket's objects are, as files.
    pub fn bucket(&self) -> PathBuf {
        self.dir.path().join(BUCKET)
    }
}

impl Drop for Rclone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
