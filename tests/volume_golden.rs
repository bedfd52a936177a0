//! Volumes written by earlier builds go on under this one: their record, and the unsaved writes in their delta. `tests/golden/state-v1` and `state-v2` are checked in and never
//! written again; where a later version of the formats adds one, HORCRUX_WRITE_GOLDEN=<empty directory> makes this test write it there.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Client, PAGE, Serve, Server, run};
use nbd_proto::{Command as Nbd, CommandFlags};

const CHUNK: u64 = 65_536;
const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn serve(state: &Path) -> Server {
    Serve::new(&golden("repository-v1"), state).name("golden").start()
}

/// What was written, in two lives of the server, over what the repository's second version holds.
fn write(state: &Path) {
    let server = serve(state);
    let mut client = Client::open(&server, "golden");
    client.write(4701 * CHUNK + PAGE as u64, &[0xa1; PAGE]).unwrap();
    client.write(100 * MIB + 512, &[0xa2; 1024]).unwrap();
    client.call(Nbd::WriteZeroes, 0, 4 * PAGE as u64, NONE, &[]).unwrap().result.unwrap();
    client.flush().unwrap();
    client.disconnect();
    server.stop();
    let server = serve(state);
    let mut client = Client::open(&server, "golden");
    client.write(100 * MIB, &[0xa3; 256]).unwrap();
    client.write(PAGE as u64, &[0xa4; PAGE]).unwrap();
    client.call(Nbd::Trim, 4799 * CHUNK, CHUNK, NONE, &[]).unwrap().result.unwrap();
    client.flush().unwrap();
    client.disconnect();
    server.stop();
}

#[test]
fn a_volume_of_version_1_has_what_was_written_to_it() {
    has_what_was_written("state-v1");
}

#[test]
fn a_volume_of_version_2_has_what_was_written_to_it() {
    has_what_was_written("state-v2");
}

fn has_what_was_written(kept: &str) {
    let temp = tempfile::tempdir().unwrap();
    let state = temp.path().join("state");
    match std::env::var_os("HORCRUX_WRITE_GOLDEN") {
        Some(at) => {
            write(&state);
            // The cache is thrown away where it can't be read; what matters is the volume.
            run(Command::new("cp").arg("-r").arg(state.join("volumes")).arg(at)).ok();
        }
        None => {
            std::fs::create_dir(&state).unwrap();
            run(Command::new("cp").arg("-r").arg(golden(kept).join("volumes")).arg(&state)).ok();
        }
    }
    let server = serve(&state);
    let mut client = Client::open(&server, "golden");
    let mut read = |at: u64, len: usize| client.read(at, len).unwrap();
    // The base, where nothing was written: chunk 4701 of version 2 is twos.
    assert_eq!(read(4701 * CHUNK, PAGE), [2; PAGE]);
    assert_eq!(read(4701 * CHUNK + PAGE as u64, PAGE), [0xa1; PAGE]);
    assert_eq!(read(4701 * CHUNK + 2 * PAGE as u64, PAGE), [2; PAGE]);
    // Zeros, and a page over them.
    assert_eq!(read(0, PAGE), [0; PAGE]);
    assert_eq!(read(PAGE as u64, PAGE), [0xa4; PAGE]);
    assert_eq!(read(2 * PAGE as u64, 2 * PAGE), [0; 2 * PAGE]);
    assert_ne!(read(4 * PAGE as u64, PAGE), [0; PAGE], "the base again");
    // One page, of two writes that were no whole ones.
    let page = read(100 * MIB, PAGE);
    assert!(page[..256] == [0xa3; 256] && page[256..512] == [0; 256]);
    assert!(page[512..1536] == [0xa2; 1024] && page[1536..] == [0; PAGE - 1536]);
    // Trimmed, where the base has data.
    assert_eq!(read(4799 * CHUNK, CHUNK as usize), vec![0; CHUNK as usize]);
    client.disconnect();
    server.stop();
}
