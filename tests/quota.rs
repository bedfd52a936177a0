//! A volume that may take only so much space: what it is told, and what it keeps.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Client, Image, PAGE, Serve};
use nbd_proto::Errno;

const MIB: usize = 1 << 20;

#[test]
fn of_writes_that_come_together_each_gets_its_own_answer() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &["--quota", "64K"]).ok();
    let mut client = Client::open(&server, "v");
    let size = image.raw.len() as u64;
    let at = |page: usize| (page * PAGE) as u64;
    let pages: Vec<[u8; PAGE]> = (0..40).map(|page| [page + 1; PAGE]).collect();

    // More than there is space for: those that came first have it.
    let writes: Vec<(u64, &[u8])> = (0..20).map(|page| (at(page * 3), &pages[page][..])).collect();
    let results = client.write_together(&writes);
    assert_eq!(results[..16], [Ok(()); 16]);
    assert_eq!(results[16..], [Err(Errno::NoSpc); 4]);
    for (page, written) in pages[..20].iter().enumerate() {
        let there = at(page * 3) as usize;
        let expected = if page < 16 { &written[..] } else { &image.raw[there..there + PAGE] };
        assert!(client.read(at(page * 3), PAGE).unwrap() == expected, "page {page}");
    }

    // To what has space there is always room: the last to a page is what stays. One that is refused, and one to a part of a page, change nothing for the others.
    let part = [99; 512];
    let results = client.write_together(&[
        (at(0), &pages[30]),
        (at(3), &pages[31]),
        (at(0), &pages[32]),
        (size - 512, &pages[33]),
        (at(6) + 512, &part),
        (at(9), &pages[34]),
        (at(9), &pages[35]),
        (at(6), &part),
    ]);
    assert_eq!(results, [Ok(()), Ok(()), Ok(()), Err(Errno::NoSpc), Ok(()), Ok(()), Ok(()), Ok(())]);
    assert!(client.read(at(0), PAGE).unwrap() == pages[32]);
    assert!(client.read(at(3), PAGE).unwrap() == pages[31]);
    assert!(client.read(at(6), PAGE).unwrap() == [[99; 1024].as_slice(), &pages[2][1024..]].concat());
    assert!(client.read(at(9), PAGE).unwrap() == pages[35]);
    client.flush().unwrap();

    // What a commit has is replaced in other places, which takes nothing more: not of one write, and not of many.
    let results =
        client.write_together(&(0..16).map(|page| (at(page * 3), &pages[20][..])).collect::<Vec<_>>());
    assert_eq!(results, [Ok(()); 16]);
    client.flush().unwrap();
    client.disconnect();
    server.stop();
}

#[test]
fn a_write_over_pages_of_which_some_are_the_volume_s_already_needs_quota_for_the_others_alone() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &["--quota", "64K"]).ok();
    let mut client = Client::open(&server, "v");
    client.write(0, &[1; 8 * PAGE]).unwrap();
    client.flush().unwrap();
    client.write(0, &[2; 16 * PAGE]).unwrap();
    assert_eq!(client.write(16 * PAGE as u64, &[2; PAGE]), Err(Errno::NoSpc));
    assert!(client.read(0, 16 * PAGE).unwrap() == [2; 16 * PAGE]);
    client.disconnect();
    server.stop();
}

#[test]
fn a_volume_at_its_quota_has_no_space_for_more_and_takes_what_it_has_again() {
    let image = Image::sparse();
    let state = image.state();
    let server = Serve::daemon(&state).start();
    image.volume("v", &["--quota", "1M"]).ok();
    let mut client = Client::open(&server, "v");
    client.write(0, &[1; MIB]).unwrap();
    assert_eq!(client.write(2 * MIB as u64, &[2; PAGE]), Err(Errno::NoSpc));
    for round in 2..6 {
        client.write(0, &[round; MIB]).unwrap();
        client.flush().unwrap();
    }
    assert_eq!(client.write(2 * MIB as u64, &[2; PAGE]), Err(Errno::NoSpc));
    assert_eq!(client.read(2 * MIB as u64, PAGE).unwrap(), image.raw[2 * MIB..2 * MIB + PAGE]);
    // Zeros take nothing, and make room.
    client
        .call(nbd_proto::Command::Trim, 0, MIB as u64 / 2, nbd_proto::CommandFlags::NONE, &[])
        .unwrap()
        .result
        .unwrap();
    client.write(2 * MIB as u64, &[2; PAGE]).unwrap();
    assert_eq!(client.read(MIB as u64 / 2, PAGE).unwrap(), [5; PAGE]);
    server.logs("the volume's quota of 1.0 MiB is used up");
    client.disconnect();
    server.stop();
    // It holds after a restart too.
    let server = Serve::daemon(&state).start();
    let mut client = Client::open(&server, "v");
    client.write(4 * MIB as u64, &[3; MIB / 2 - PAGE]).unwrap();
    assert_eq!(client.write(8 * MIB as u64, &[3; PAGE]), Err(Errno::NoSpc));
    client.disconnect();
    server.stop();
}
