//! The package on a host of its own: systemd, Docker's own units, restarts and a reboot, in User Mode Linux.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

mod harness;

use harness::{Guest, cli, guests, need, need_root, run, tree};

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|meta| meta.modified()).ok()
}

/// When anything below a directory was changed last.
fn changed(dir: &Path) -> Option<SystemTime> {
    let entries = std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path());
    entries.filter_map(|path| if path.is_dir() { changed(&path) } else { modified(&path) }).max()
}

/// The package as `make deb PROFILE=dev` leaves it, of the sources as they are now.
fn package() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["src", "nbd-proto/src", "plugin", "tools/src"].map(|dir| changed(&here.join(dir)));
    let manifests = ["Cargo.toml", "Cargo.lock"].map(|file| modified(&here.join(file)));
    let dir = Path::new(env!("CARGO_BIN_EXE_horcrux-nbd")).parent().unwrap().with_file_name("debian");
    let debs = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let newest = debs
        .filter(|path| path.extension().is_some_and(|deb| deb == "deb"))
        .max_by_key(|path| modified(path));
    match newest {
        Some(deb) if sources.into_iter().chain(manifests).all(|changed| modified(&deb) >= changed) => deb,
        _ => panic!("{} has no package of these sources: make deb PROFILE=dev", dir.display()),
    }
}

#[test]
fn a_host_has_its_volumes_back_after_a_reboot() {
    if !guests()
        || !need(&["dockerd", "containerd", "runc", "docker", "dpkg", "systemctl"])
        || !need_root("for a root filesystem of the guest's own")
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, repo, disk) = (dir.path().join("src"), dir.path().join("repo"), dir.path().join("disk"));
    tree::make(&source, 10, 7);
    run(cli().args(["image-from-dir", "--size", "1G", "image"]).arg(&source).arg(&repo)).ok();
    std::fs::File::create(&disk).unwrap().set_len(8 << 30).unwrap();
    let boot = |number: &str, script: &str| {
        let console = Guest::running(Duration::from_secs(400))
            .env("UML_SYSTEMD", "1")
            .env("BOOT", number)
            .env("DEB", package())
            .env("REPO", &repo)
            .disk(&disk)
            .run("host.sh");
        println!("{console}");
        assert!(console.contains(script), "{console}");
        // What the kernel says after the script's end: of devices whose server went before their filesystem.
        for trouble in ["I/O error", "EXT4-fs error", "Failed unmounting", "Connection timed out"] {
            assert!(!console.contains(trouble), "{trouble}: {console}");
        }
    };
    boot("1", "the first day is over");
    boot("2", "nothing is left");
}
