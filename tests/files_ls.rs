//! Files of versions are listed, read and exported without mounting: compared with the directory they came from, and with what the kernel shows.
//!
//! Images are made by image-from-dir, by mke2fs in the forms it knows, and by the kernel.
#![allow(clippy::unwrap_used)]

mod files_support;
mod harness;
#[path = "image_support/mod.rs"]
mod support;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::Command;

use files_support::{Repo, path_of, walk};
use harness::{cli, need};
use support::{Fixture, Listing, Mount, assert_same, noise, root};

/// Exports an image, extracts the archive, compares.
fn assert_exports(repo: &Repo, image: &str, source: &Path) {
    let (archive, out) = (repo.path("archive.tar"), repo.path("extracted"));
    repo.run("export", image, &["--output", archive.to_str().unwrap()]).ok();
    fs::create_dir(&out).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--same-owner", "-xpf"]);
    support::run(tar.arg(&archive).arg("--exclude=lost+found").arg("-C").arg(&out));
    // Tar has no sockets.
    let socket = source.join("socket");
    if socket.exists() {
        fs::remove_file(socket).unwrap();
        let time = "2021-01-01 01:01:01.010101010";
        support::run(Command::new("touch").args(["-m", "-d", time]).arg(source));
    }
    assert_same(Listing { linked_symlinks: false, ..Listing::default() }, source, &out);
    fs::remove_dir_all(&out).unwrap();
}

/// Lists an image, and compares with the directory.
fn assert_lists(repo: &Repo, image: &str, source: &Path) {
    let mut want = walk_without_contents(source);
    let listed = repo.json("ls", image, &["-R"]);
    for entry in &listed {
        let path = path_of(&entry["path"]);
        if path == b"lost+found" {
            continue;
        }
        let got = (
            entry["kind"].as_str().unwrap().to_owned(),
            u32::from_str_radix(entry["mode"].as_str().unwrap(), 8).unwrap(),
            entry["uid"].as_u64().unwrap() as u32,
            entry["gid"].as_u64().unwrap() as u32,
            entry["modified_s"].as_i64().unwrap(),
            entry["modified_ns"].as_i64().unwrap(),
        );
        let shown = String::from_utf8_lossy(&path).into_owned();
        assert_eq!(Some(got), want.remove(&path), "{shown}");
    }
    assert!(
        want.is_empty(),
        "not listed: {:?}",
        want.keys().map(|path| String::from_utf8_lossy(path)).collect::<Vec<_>>()
    );
}

type Listed = std::collections::BTreeMap<Vec<u8>, (String, u32, u32, u32, i64, i64)>;

fn walk_without_contents(root: &Path) -> Listed {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let mut seen = Listed::new();
    let mut todo = vec![std::path::PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let meta = fs::symlink_metadata(root.join(&relative)).unwrap();
        let kind = meta.file_type();
        if kind.is_dir() {
            let entries = fs::read_dir(root.join(&relative)).unwrap();
            todo.extend(entries.map(|entry| relative.join(entry.unwrap().file_name())));
        }
        let word = match kind {
            kind if kind.is_dir() => "directory",
            kind if kind.is_symlink() => "link",
            kind if kind.is_fifo() => "fifo",
            kind if kind.is_socket() => "socket",
            kind if kind.is_char_device() => "char_device",
            kind if kind.is_block_device() => "block_device",
            _ => "file",
        };
        if relative != Path::new("") {
            let facts = (
                word.to_owned(),
                meta.mode() & 0o7777,
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
            );
            seen.insert(relative.into_os_string().into_vec(), facts);
        }
    }
    seen
}

#[test]
fn an_image_of_one_of_everything_is_listed_and_exported_as_it_was() {
    let repo = Repo::new();
    let source = repo.dir("source");
    Fixture { not_for_streaming: false }.build(&source);
    repo.add_dir("AMCC", &source);
    assert_lists(&repo, "AMCC", &source);
    if root("for extracting owners") {
        assert_exports(&repo, "AMCC", &source);
    }
    let archive = fs::metadata(repo.path("archive.tar")).unwrap().len();
    assert!(archive < 50 << 20, "holes cost nothing: {archive} bytes of a file of 5 GiB and others");
}

#[test]
fn every_form_mke2fs_knows_is_listed_and_exported_as_it_was() {
    if !need(&["mke2fs"]) || !root("for devices and owners") {
        return;
    }
    for (name, size, options) in [
        ("plain", "512M", &["-t", "ext4"][..]),
        ("small", "512M", &["-t", "ext4", "-b", "1024", "-O", "^64bit,^metadata_csum"]),
        ("inline", "512M", &["-t", "ext4", "-I", "512", "-O", "inline_data"]),
        ("meta_bg", "512M", &["-t", "ext4", "-O", "meta_bg,^resize_inode,bigalloc", "-C", "16384"]),
    ] {
        let repo = Repo::new();
        let source = repo.dir("source");
        Fixture { not_for_streaming: true }.build(&source);
        let image = repo.path("image");
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-F"]).args(options).arg("-d").arg(&source).arg(&image).arg(size);
        mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        support::run(&mut mke2fs);
        repo.add_file(name, &image);
        assert_lists_but_socket(&repo, name, &source);
    }
}

/// mke2fs gives what it copies times in whole seconds, and some names of a link an inode of their own: what it keeps is compared.
fn assert_lists_but_socket(repo: &Repo, image: &str, source: &Path) {
    let want = walk_without_contents(source);
    let listed = repo.json("ls", image, &["-R"]);
    let mut names = 0;
    for entry in &listed {
        let path = path_of(&entry["path"]);
        if path == b"lost+found" {
            continue;
        }
        names += 1;
        let (kind, mode, uid, gid, seconds, _) = want.get(&path).unwrap_or_else(|| panic!("{path:?}"));
        assert_eq!(entry["kind"].as_str().unwrap(), kind, "{image} {path:?}");
        assert_eq!(
            u32::from_str_radix(entry["mode"].as_str().unwrap(), 8).unwrap(),
            *mode,
            "{image} {path:?}"
        );
        assert_eq!(
            (entry["uid"].as_u64(), entry["gid"].as_u64()),
            (Some((*uid).into()), Some((*gid).into()))
        );
        // It writes 32 bits of a time.
        if i32::try_from(*seconds).is_ok() {
            assert_eq!(entry["modified_s"].as_i64().unwrap(), *seconds, "{image} {path:?}");
        }
    }
    assert_eq!(names, want.len(), "{image}");
    for path in [
        "big",
        "pieces",
        "hole at the end",
        "one byte",
        "empty",
        "block and one",
        "a/b/c/d/deep",
        "many/file-02999",
    ] {
        let got = repo.bytes("cat", image, &[path.into()]);
        assert!(got == fs::read(source.join(path)).unwrap(), "{image}: {path}");
    }
}

#[test]
fn ext2_and_ext3_are_read_too() {
    if !need(&["mke2fs"]) {
        return;
    }
    for kind in ["ext2", "ext3"] {
        let repo = Repo::new();
        let source = repo.dir("source");
        let content = noise(9_000_000, 5);
        fs::write(source.join("triple"), &content).unwrap();
        support::sparse(&source.join("sparse"), 300_000_000, &[(0, 10), (200_000_000, 5000)]);
        fs::write(source.join("small"), b"small").unwrap();
        let image = repo.path("image");
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-F", "-t", kind, "-b", "1024", "-d"]).arg(&source).arg(&image).arg("64M");
        support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
        repo.add_file(kind, &image);
        assert!(repo.bytes("cat", kind, &["triple".into()]) == content, "{kind}");
        let sparse = repo.bytes("cat", kind, &["sparse".into()]);
        assert!(sparse == fs::read(source.join("sparse")).unwrap(), "{kind}");
    }
}

#[test]
fn what_the_kernel_wrote_and_only_its_journal_has_is_read() {
    if !root("for a mount") {
        return;
    }
    let repo = Repo::new();
    let (empty, image, crashed) = (repo.dir("empty"), repo.path("image"), repo.path("crashed"));
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&empty).arg(&image).arg("128M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    let mount = Mount::new(&image, "rw");
    for round in 0..20 {
        let dir = mount.path().join(format!("dir {round}"));
        fs::create_dir(&dir).unwrap();
        for number in 0..100 {
            fs::write(dir.join(format!("file {number}")), noise(100 * number, number as u64)).unwrap();
        }
        // What was freed is used again: revoked blocks.
        if round > 2 {
            fs::remove_dir_all(mount.path().join(format!("dir {}", round - 2))).unwrap();
        }
        support::run(Command::new("sync").arg("-f").arg(mount.path()));
    }
    // As after a power cut: the journal is written, what it says is not in its place yet.
    support::run(Command::new("cp").arg(&image).arg(&crashed));
    repo.add_file("crashed", &crashed);
    let features = support::run(Command::new("/sbin/dumpe2fs").arg("-h").arg(&crashed));
    assert!(features.contains("needs_recovery"), "{features}");
    let want = walk(mount.path());
    let listed = repo.json("ls", "crashed", &["-R"]);
    assert_eq!(listed.len() + 1, want.len(), "the root is not listed");
    for entry in &listed {
        let path = path_of(&entry["path"]);
        let seen = &want[&path];
        assert_eq!(entry["kind"].as_str().unwrap(), seen.kind);
        if seen.kind == "file" && seen.size > 9000 {
            let got = repo.bytes("cat", "crashed", &[OsString::from_vec(path.clone())]);
            assert_eq!(blake3::hash(&got).to_string(), seen.content, "{path:?}");
        }
    }
}

#[test]
fn names_are_shown_so_that_no_terminal_obeys_them() {
    let repo = Repo::new();
    let source = repo.dir("source");
    for name in [&b"\x1b[31mred"[..], b"new\nline", b"latin \xfc", b"plain"] {
        fs::write(source.join(OsStr::from_bytes(name)), b"x").unwrap();
    }
    std::os::unix::fs::symlink("\x1b]0;title\x07", source.join("link")).unwrap();
    repo.add_dir("AMCC", &source);
    let listed = repo.run("ls", "AMCC", &[]).ok();
    assert_eq!(listed, "\"\\033[31mred\"\n\"latin \\374\"\nlink\nlost+found\n\"new\\nline\"\nplain\n");
    let long = repo.run("ls", "AMCC", &["-l"]).ok();
    assert!(long.contains("link -> \"\\033]0;title\\007\"\n"), "{long}");
    assert!(!long.contains('\x1b'), "{long}");
    let got = repo.bytes("cat", "AMCC", &[OsString::from_vec(b"latin \xfc".to_vec())]);
    assert_eq!(got, b"x");
    let refused = repo.run("cat", "AMCC", &["\x1b[31mblue"]).refused();
    assert_eq!(refused, "error: AMCC@main: there is no \"\\033[31mblue\"\n");
}

#[test]
fn paths_are_followed_as_the_kernel_follows_them() {
    let repo = Repo::new();
    let source = repo.dir("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/b/file"), b"content").unwrap();
    for (target, name) in
        [("a/b", "short"), ("/a/../short/file", "way"), ("loop", "loop"), ("../../../../a", "a/b/up")]
    {
        std::os::unix::fs::symlink(target, source.join(name)).unwrap();
    }
    repo.add_dir("AMCC", &source);
    for path in ["a/b/file", "/a//b/./file", "short/file", "way", "a/b/up/b/file", "../a/b/file"] {
        assert_eq!(repo.run("cat", "AMCC", &[path]).ok(), "content", "{path}");
    }
    assert_eq!(repo.run("ls", "AMCC", &["short"]).ok(), "file\nup\n");
    assert_eq!(repo.run("ls", "AMCC", &["-d", "short"]).ok(), "short\n");
    assert_eq!(repo.run("ls", "AMCC", &["-R", "a"]).ok(), "a/b\na/b/file\na/b/up\n");
}

#[test]
fn what_can_not_be_read_is_refused_with_the_reason_and_the_way_out() {
    let repo = Repo::new();
    let source = repo.dir("source");
    fs::create_dir(source.join("dir")).unwrap();
    fs::write(source.join("file"), b"x").unwrap();
    std::os::unix::fs::symlink("loop", source.join("loop")).unwrap();
    std::os::unix::fs::symlink("/dir/gone/file", source.join("dangling")).unwrap();
    repo.add_dir("AMCC", &source);
    for (verb, args, said) in [
        ("cat", ["dir"], "error: AMCC@main: dir is a directory, not a file\n"),
        ("cat", ["file/x"], "error: AMCC@main: file is no directory\n"),
        ("ls", ["dir/nothing"], "error: AMCC@main: there is no dir/nothing\n"),
        ("cat", ["dir/../nothing"], "error: AMCC@main: there is no nothing\n"),
        ("cat", ["file/.."], "error: AMCC@main: file is no directory\n"),
        ("cat", ["dangling"], "error: AMCC@main: there is no dir/gone\n"),
        ("cat", ["loop"], "error: AMCC@main: loop leads through too many symbolic links\n"),
        ("export", ["nothing"], "error: AMCC@main: there is no nothing\n"),
    ] {
        assert_eq!(repo.run(verb, "AMCC", &args).refused(), said, "{verb} {args:?}");
    }
    let refused = repo.run("ls", "AMCC@nothing", &[]).refused();
    assert!(refused.starts_with("error: "), "{refused}");
    let raw = repo.path("raw");
    fs::write(&raw, noise(8 << 20, 1)).unwrap();
    repo.add_file("raw", &raw);
    let refused = repo.run("ls", "raw", &[]).refused();
    assert_eq!(refused, "error: raw@main: there is no filesystem that is known here: neither ext4 nor XFS\n");
    let mut xfs = vec![0; 8 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    fs::write(&raw, xfs).unwrap();
    repo.add_file("xfs", &raw);
    let refused = repo.run("ls", "xfs", &[]).refused();
    let repository = repo.url();
    assert_eq!(
        refused,
        format!(
            "error: xfs@main: this is an XFS filesystem: its files are read through a mount\nhint: 'horcrux-cli mount --read-only --access {} --name xfs@main DIR' mounts it, as root\n",
            repository.display()
        )
    );
    let refused = harness::run(cli().args(["ls", "v1", "--state-dir"]).arg(repo.path("state"))).refused();
    assert!(
        refused.contains("no daemon answers at ")
            && refused.contains("hint: start it with 'horcrux-nbd serve'"),
        "{refused}"
    );
}

#[test]
fn an_archive_that_is_not_whole_is_no_success() {
    if !need(&["mke2fs", "debugfs"]) {
        return;
    }
    let repo = Repo::new();
    let (source, image, archive) = (repo.dir("source"), repo.path("image"), repo.path("archive.tar"));
    fs::write(source.join("big"), noise(3_000_000, 9)).unwrap();
    fs::create_dir(source.join("last")).unwrap();
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-d"]).arg(&source).arg(&image).arg("16M");
    support::run(mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    repo.add_file("AMCC", &image);
    // Its reader goes away.
    let mut child = repo.command("export", "AMCC").stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(harness::wait(&mut child, harness::PATIENCE).unwrap().code(), Some(1));
    // A directory that holds itself, after a file that is sent before.
    support::run(Command::new("/sbin/debugfs").args(["-w", "-R", "link last last/again"]).arg(&image));
    repo.add_file("AMCC", &image);
    let refused = repo.run("export", "AMCC", &["-o", archive.to_str().unwrap()]).refused();
    assert!(refused.contains("the filesystem is damaged: directory "), "{refused}");
    assert!(!archive.exists(), "half an archive is none");
}
