//! Images to serve: raw bytes that are known, stored with the command line program.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use super::{Ran, cli, run};

/// Bytes of a page of the delta.
pub const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// A directory with a repository, a state directory, and what the images in it hold.
pub struct Image {
    dir: tempfile::TempDir,
    /// What the image `disk` holds.
    pub raw: Vec<u8>,
}

/// Bytes that don't compress and that a seed names.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// The images of a repository by name; none where there is no repository.
pub fn images(repo: &Path) -> Vec<String> {
    let Ok(dir) = std::fs::read_dir(repo.join("images")) else { return Vec::new() };
    // One that was begun and not finished has no ref.
    dir.map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("refs/heads/main").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// What `image-from-dir` says when it refuses.
#[track_caller]
pub fn image_refused(args: &[&str], dir: &Path, repo: &Path) -> String {
    run(cli().arg("image-from-dir").args(args).arg(dir).arg(repo)).refused()
}

impl Image {
    /// Where [`Image::sparse`] has nothing: whole blocks and a piece of one.
    pub const HOLES: [Range<usize>; 2] = [5 * MIB..11 * MIB + 512 * 1024, 14 * MIB..16 * MIB];

    /// An image `disk` of 16 MiB in blocks of 1 MiB with data, holes, and data that compresses.
    pub fn sparse() -> Image {
        let mut raw = noise(1, 16 * MIB);
        raw[2 * MIB..3 * MIB].fill(0x11);
        for hole in Self::HOLES {
            raw[hole].fill(0);
        }
        Self::of(raw)
    }

    /// An image `disk` of these bytes.
    pub fn of(raw: Vec<u8>) -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap(), raw };
        std::fs::write(image.raw_file(), &image.raw).unwrap();
        image.store("disk", &image.raw_file());
        image
    }

    /// Stores a file as the next version of an image.
    pub fn store(&self, name: &str, file: &Path) {
        let mut cli = cli();
        cli.args(["image-from-file", "-s", "1M", name]).arg(file).arg(self.repo());
        run(&mut cli).ok();
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn repo(&self) -> PathBuf {
        self.dir.path().join("repo")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Makes a volume of it.
    pub fn volume(&self, name: &str, more: &[&str]) -> Ran {
        let repo = self.repo();
        let args = ["create", name, "--access", repo.to_str().unwrap(), "--name", "disk"];
        super::volume(&self.state(), &[args.as_slice(), more].concat())
    }

    /// A file with what the image holds.
    pub fn raw_file(&self) -> PathBuf {
        self.dir.path().join("raw")
    }

    /// The repository's objects of a kind ("blocks", "maps", "commits", "refs"), by path.
    pub fn objects(&self, kind: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.repo().join("images/disk").join(kind)];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let hidden = path.file_name().unwrap().to_string_lossy().starts_with('.');
                match path.is_dir() {
                    true => dirs.push(path),
                    false if !hidden => found.push(path),
                    false => {}
                }
            }
        }
        found.sort();
        found
    }
}
