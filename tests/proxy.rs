//! The fault proxy itself: as far away, as narrow and as faulty as it is told to be, and otherwise not there.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

mod harness;
mod proxy_support;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use harness::proxy::{Counts, Direction, Fault, Proxy, Reach, Rule, TcpFault};
use harness::weed::{ACCESS_KEY, SECRET_KEY, Weed, url_at, weed, with_credentials};
use harness::{Image, Serve, cli, need, noise, run, until};
use proxy_support::{Client, PATIENCE, echo, http, pattern, sink, source};

const MS: Duration = Duration::from_millis(1);

/// A proxy before a server that notes what it carried out.
fn web() -> (Proxy, Arc<Mutex<Vec<String>>>) {
    let done = Arc::new(Mutex::new(Vec::new()));
    (Proxy::http(http(done.clone())), done)
}

/// The best of a few runs: what a busy machine adds is not the proxy's.
fn best(mut run: impl FnMut() -> Duration) -> Duration {
    (0..5).map(|_| run()).min().unwrap()
}

#[test]
fn a_round_trip_takes_what_it_is_told_and_opening_a_connection_takes_one_more() {
    let proxy = Proxy::tcp(echo());
    for rtt in [0, 20, 80] {
        let rtt = rtt * MS;
        proxy.set_rtt(rtt);
        let slack = rtt / 10 + 5 * MS;
        let opened = best(|| {
            let start = Instant::now();
            let mut client = Client::connect(proxy.address());
            client.send(b"ping");
            assert_eq!(client.receive(4).unwrap(), b"ping");
            start.elapsed()
        });
        assert!((2 * rtt..2 * rtt + 2 * slack).contains(&opened), "{opened:?} at {rtt:?}");
        let mut client = Client::connect(proxy.address());
        client.send(b"x");
        client.receive(1).unwrap();
        let trip = best(|| {
            let start = Instant::now();
            client.send(b"ping");
            assert_eq!(client.receive(4).unwrap(), b"ping");
            start.elapsed()
        });
        assert!((rtt..rtt + slack).contains(&trip), "{trip:?} at {rtt:?}");
    }
}

/// How long it takes until `len` bytes have come, from the first byte on.
fn download(address: SocketAddr, len: u64) -> Duration {
    let mut client = Client::connect(address);
    client.send(&len.to_le_bytes());
    client.receive(1).unwrap();
    let start = Instant::now();
    client.receive(len as usize - 1).unwrap();
    start.elapsed()
}

#[test]
fn one_connection_over_a_long_way_fills_the_line() {
    let proxy = Proxy::tcp(source());
    // On the way at once are 10 MB.
    proxy.set_rtt(400 * MS);
    proxy.set_bandwidth(Some(50_000_000));
    let downloads = (0..3).map(|_| {
        let start = Instant::now();
        let coming = download(proxy.address(), 16 << 20);
        (coming, start.elapsed())
    });
    let (coming, whole): (Vec<_>, Vec<_>) = downloads.unzip();
    let (coming, whole) = (coming.iter().min().unwrap(), whole.iter().min().unwrap());
    assert!(*coming < 600 * MS, "16 MiB at 50 MB/s took {coming:?}");
    // With its opening and the trip: who takes the time of the first byte may come late to it, and then what follows seems faster than the line.
    assert!(*whole > 1100 * MS, "16 MiB at 50 MB/s took {whole:?}, all in all");

    let proxy = Proxy::tcp(sink());
    proxy.set_rtt(100 * MS);
    proxy.set_bandwidth_of(Direction::Up, Some(50_000_000));
    let took = best(|| {
        let mut client = Client::connect(proxy.address());
        let start = Instant::now();
        client.send(&(16_u64 << 20).to_le_bytes());
        client.send(&vec![1; 16 << 20]);
        client.receive(1).unwrap();
        start.elapsed()
    });
    // The connection's opening and the trip are in it.
    assert!((500 * MS..800 * MS).contains(&took), "16 MiB up at 50 MB/s took {took:?}");
}

#[test]
fn connections_share_the_line_fairly() {
    let proxy = Proxy::tcp(source());
    proxy.set_bandwidth(Some(40_000_000));
    let address = proxy.address();
    let start = Instant::now();
    // From the start of all: who takes the time of the first byte may come late to it, and then what follows seems faster than the line.
    let ended = move || {
        download(address, 4 << 20);
        start.elapsed()
    };
    let running: Vec<_> = (0..4).map(|_| thread::spawn(ended)).collect();
    let took: Vec<_> = running.into_iter().map(|thread| thread.join().unwrap()).collect();
    let all = start.elapsed();
    assert!((400 * MS..900 * MS).contains(&all), "4 times 4 MiB at 40 MB/s took {all:?}");
    for one in &took {
        assert!(*one > all / 2, "one had the line to itself: {took:?} of {all:?}");
    }
}

#[test]
fn many_connections_wait_at_the_same_time() {
    let (proxy, _) = web();
    proxy.set_rtt(20 * MS);
    let address = proxy.address();
    let start = Instant::now();
    let asking = || {
        let mut client = Client::connect(address);
        (0..50).for_each(|_| assert_eq!(client.ask("GET", "/9000").unwrap().body.len(), 9000));
    };
    thread::scope(|scope| (0..32).for_each(|_| drop(scope.spawn(asking))));
    let took = start.elapsed();
    // Opening takes one more.
    assert!((1020 * MS..1800 * MS).contains(&took), "32 times 50 requests at 20 ms took {took:?}");
}

#[test]
fn what_moves_is_counted_to_the_byte() {
    let proxy = Proxy::tcp(echo());
    for _ in 0..3 {
        let mut client = Client::connect(proxy.address());
        client.send(&[1; 1000]);
        client.receive(1000).unwrap();
    }
    assert_eq!(proxy.counts(), Counts { connections: 3, requests: 0, up: 3000, down: 3000 });
    proxy.reset_counts();
    assert_eq!(proxy.counts(), Counts::default());

    let (proxy, _) = web();
    let mut client = Client::connect(proxy.address());
    let (mut up, mut down) = (0, 0);
    for len in ["/0", "/100000"] {
        let answer = client.ask("GET", len).unwrap();
        up += format!("GET {len} HTTP/1.1\r\nHost: x\r\n\r\n").len() as u64;
        down += (answer.head.len() + answer.body.len()) as u64;
    }
    assert_eq!(proxy.counts(), Counts { connections: 1, requests: 2, up, down });
    assert_eq!(proxy.counts().json(), format!(r#"{{"connections":1,"requests":2,"up":{up},"down":{down}}}"#));
}

#[test]
fn without_a_fault_messages_pass_as_they_are() {
    let (proxy, done) = web();
    let mut client = Client::connect(proxy.address());
    for len in [0, 1, 70_000, 3_000_000] {
        assert!(client.ask("GET", &format!("/{len}")).unwrap().body == pattern(len), "{len}");
    }
    let answer = client.ask("HEAD", "/5").unwrap();
    assert!(answer.head.contains("Content-Length: 5\r\n"), "{}", answer.head);
    assert_eq!(client.ask("GET", "/nothing").unwrap().status, 204);
    client.send(b"PUT /a HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer(false).unwrap().status, 100);
    client.send(b"abc");
    assert_eq!(client.answer(false).unwrap().body, b"took 3");
    client.send(b"GET /chunked HTTP/1.1\r\n\r\n");
    let chunked = client.answer(false).unwrap();
    let rest = client.receive(b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nSum: 1\r\n\r\n".len()).unwrap();
    assert!(chunked.head.contains("chunked") && rest.ends_with(b"0\r\nSum: 1\r\n\r\n"));
    // Two at once, answered in their order.
    client.send(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n");
    assert_eq!((client.answer(false).unwrap().body.len(), client.answer(false).unwrap().body.len()), (1, 2));
    client.send(b"GET /until-end HTTP/1.1\r\n\r\n");
    client.answer(false).unwrap();
    assert_eq!(client.rest(), (b"until the end".to_vec(), None));
    assert_eq!(done.lock().unwrap().len(), 11);
    assert_eq!(proxy.counts().requests, 11);
}

#[test]
fn a_chunked_request_reaches_the_server_whole() {
    let sent = b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let proxy = Proxy::http(echo());
    let mut client = Client::connect(proxy.address());
    // The echo is no answer, and passes as what nobody framed.
    client.send(sent);
    assert_eq!(client.receive(sent.len()).unwrap(), sent);
}

/// The answer to `GET target` under one fault, on a connection of its own.
fn under(fault: Fault, target: &str) -> std::io::Result<proxy_support::Answer> {
    let (proxy, _) = web();
    let hits = proxy.rule(Rule::new(fault).next(1));
    let answer = Client::connect(proxy.address()).ask("GET", target);
    assert_eq!(hits.count(), 1);
    // The next one is well.
    assert_eq!(Client::connect(proxy.address()).ask("GET", "/9").unwrap().body, pattern(9));
    answer
}

#[test]
fn an_answer_is_reset_in_its_middle() {
    let answer = under(Fault::ResetMidBody, "/10000").unwrap();
    assert_eq!((answer.body, answer.error), (pattern(5000), Some(ErrorKind::ConnectionReset)));
    assert!(answer.head.contains("Content-Length: 10000"), "{}", answer.head);
    // One without a body, in the middle of its head.
    assert_eq!(under(Fault::ResetMidBody, "/nothing").unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn an_answer_is_cut_short_or_says_it_is_shorter() {
    let answer = under(Fault::CutShort, "/10000").unwrap();
    assert_eq!((answer.body, answer.error), (pattern(5000), Some(ErrorKind::UnexpectedEof)));
    assert!(answer.head.contains("Content-Length: 10000"), "{}", answer.head);
    assert_eq!(under(Fault::CutShort, "/nothing").unwrap_err().kind(), ErrorKind::UnexpectedEof);

    let (proxy, _) = web();
    proxy.rule(Rule::new(Fault::LowerLength).next(1));
    let mut client = Client::connect(proxy.address());
    let answer = client.ask("GET", "/10000").unwrap();
    assert!(answer.head.contains("Content-Length: 5000\r\n"), "{}", answer.head);
    assert_eq!((answer.body, answer.error), (pattern(5000), None));
    // The connection is in step.
    assert_eq!(client.ask("GET", "/7").unwrap().body, pattern(7));
}

#[test]
fn an_answer_has_a_wrong_byte_and_the_right_length() {
    let answer = under(Fault::WrongByte, "/10000").unwrap();
    let right = pattern(10_000);
    let wrong: Vec<usize> = (0..10_000).filter(|at| answer.body[*at] != right[*at]).collect();
    assert_eq!((wrong, answer.error), (vec![5000], None));
}

#[test]
fn an_answer_stalls_for_a_while_or_until_the_client_gives_up() {
    let start = Instant::now();
    let answer = under(Fault::Stall(Some(300 * MS)), "/10000").unwrap();
    assert_eq!(answer.body, pattern(10_000));
    assert!((300 * MS..PATIENCE).contains(&start.elapsed()), "{:?}", start.elapsed());

    let (proxy, _) = web();
    proxy.rule(Rule::new(Fault::Stall(None)).next(1));
    let mut client = Client::connect(proxy.address());
    client.patience(200 * MS);
    let answer = client.ask("GET", "/10000").unwrap();
    assert_eq!((answer.body, answer.error), (pattern(5000), Some(ErrorKind::WouldBlock)));
}

#[test]
fn an_answer_is_given_in_the_servers_place() {
    let (proxy, done) = web();
    let mut client = Client::connect(proxy.address());
    proxy.rule(Rule::new(Fault::InternalError).path("/500"));
    proxy.rule(Rule::new(Fault::SlowDown { retry_after_s: Some(2) }).path("/503"));
    proxy.rule(Rule::new(Fault::ErrorPage).path("/page"));
    let answer = client.ask("GET", "/500").unwrap();
    assert_eq!(answer.status, 500);
    assert!(String::from_utf8(answer.body).unwrap().contains("<Code>InternalError</Code>"));
    let answer = client.ask("GET", "/503").unwrap();
    assert_eq!(answer.status, 503);
    assert!(answer.head.contains("Retry-After: 2\r\n"), "{}", answer.head);
    assert!(String::from_utf8(answer.body).unwrap().contains("<Code>SlowDown</Code>"));
    let answer = client.ask("GET", "/page").unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.starts_with(b"<!DOCTYPE html>"));
    assert_eq!(client.ask("HEAD", "/503").unwrap().status, 503);
    // A body that was to come is taken first, and the connection stays in step.
    client.send(b"PUT /503 HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer(false).unwrap().status, 100);
    client.send(b"abc");
    assert_eq!(client.answer(false).unwrap().status, 503);
    assert!(done.lock().unwrap().is_empty(), "the server carried something out");
    assert_eq!(client.ask("GET", "/3").unwrap().body, pattern(3));
}

#[test]
fn an_answer_is_lost_after_the_request_was_carried_out() {
    let (proxy, done) = web();
    proxy.rule(Rule::new(Fault::LostAnswer).method("PUT"));
    let mut client = Client::connect(proxy.address());
    client.send(b"PUT /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc");
    assert_eq!(client.rest(), (Vec::new(), Some(ErrorKind::ConnectionReset)));
    assert_eq!(*done.lock().unwrap(), ["PUT /a"]);
}

#[test]
fn rules_choose_requests_by_method_path_count_and_chance() {
    let (proxy, _) = web();
    let mut client = Client::connect(proxy.address());
    let mut statuses = |method: &str, target: &str, n: usize| -> String {
        let status = |_| if client.ask(method, target).unwrap().status == 500 { '!' } else { '.' };
        (0..n).map(status).collect()
    };
    let fails = || Rule::new(Fault::InternalError);
    let hits = proxy.rule(fails().method("GET").path("a/").every(3));
    assert_eq!(statuses("GET", "/a/1", 7), "..!..!.");
    assert_eq!(statuses("GET", "/b/1", 4), "....");
    assert_eq!(statuses("HEAD", "/a/1", 4), "....");
    assert_eq!(hits.count(), 2);
    proxy.clear_rules();
    proxy.rule(fails().next(2));
    assert_eq!(statuses("GET", "/1", 5), "!!...");
    proxy.clear_rules();
    let mut drawn = |seed| {
        proxy.clear_rules();
        proxy.rule(fails().chance(300, seed));
        statuses("GET", "/1", 200)
    };
    let first = drawn(1);
    assert_eq!(first, drawn(1));
    assert_ne!(first, drawn(2));
    let failed = first.matches('!').count();
    assert!((30..=90).contains(&failed), "{failed} of 200 at 30%");
}

#[test]
fn a_connection_is_reset_or_stalls_after_so_many_bytes() {
    let proxy = Proxy::tcp(echo());
    proxy.set_tcp_fault(Some(TcpFault::ResetAfter(1500)));
    let mut client = Client::connect(proxy.address());
    client.send(&[1; 1000]);
    let (got, error) = client.rest();
    assert_eq!((got.len(), error), (500, Some(ErrorKind::ConnectionReset)));

    proxy.set_tcp_fault(Some(TcpFault::StallAfter(1500)));
    let mut client = Client::connect(proxy.address());
    client.send(&[1; 1000]);
    client.receive(500).unwrap();
    client.patience(200 * MS);
    assert_eq!(client.receive(1).unwrap_err().kind(), ErrorKind::WouldBlock);
    proxy.set_tcp_fault(None);
    client.patience(PATIENCE);
    assert_eq!(client.receive(500).unwrap(), [1; 500]);
}

#[test]
fn a_server_goes_away_and_comes_back() {
    for (away, mode) in [(Reach::Refusing, "tcp"), (Reach::Silent, "tcp"), (Reach::Refusing, "http")] {
        let proxy = if mode == "tcp" { Proxy::tcp(echo()) } else { Proxy::http(echo()) };
        for _ in 0..3 {
            let mut open = Client::connect(proxy.address());
            if mode == "tcp" {
                open.send(b"here");
                open.receive(4).unwrap();
            }
            proxy.set_reach(away);
            assert_eq!(open.rest().1, Some(ErrorKind::ConnectionReset), "{away:?}");
            if away == Reach::Refusing {
                let refused = TcpStream::connect_timeout(&proxy.address(), PATIENCE).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
                proxy.set_reach(Reach::Here);
            } else {
                let mut waits = Client::connect(proxy.address());
                waits.send(b"hello?");
                waits.patience(200 * MS);
                assert_eq!(waits.receive(1).unwrap_err().kind(), ErrorKind::WouldBlock);
                proxy.set_reach(Reach::Here);
                assert_eq!(waits.rest().1, Some(ErrorKind::ConnectionReset));
            }
        }
        let mut client = Client::connect(proxy.address());
        client.send(b"again\r\n\r\n");
        assert!(!client.receive(1).unwrap().is_empty());
    }
}

#[test]
fn every_connection_ends_with_its_proxy_and_with_its_server() {
    let proxy = Proxy::tcp(echo());
    proxy.set_rtt(100 * MS);
    proxy.set_bandwidth(Some(1));
    proxy.set_tcp_fault(Some(TcpFault::StallAfter(10)));
    let mut client = Client::connect(proxy.address());
    client.send(&[1; 100_000]);
    assert!(until(PATIENCE, || proxy.counts().connections == 1));
    let start = Instant::now();
    drop(proxy);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(client.rest().1, Some(ErrorKind::ConnectionReset));

    // A server that closes an idle connection closes it for the client.
    let proxy = Proxy::http(proxy_support::server(drop));
    assert_eq!(Client::connect(proxy.address()).rest(), (Vec::new(), None));
    // And one that is not there is a reset.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = Proxy::tcp(nobody);
    assert_eq!(Client::connect(proxy.address()).rest(), (Vec::new(), Some(ErrorKind::ConnectionReset)));
}

#[test]
fn an_image_goes_to_a_real_object_store_and_comes_back_through_it() {
    if !weed() || !need(&["nbdcopy"]) {
        return;
    }
    let server = Weed::start();
    let proxy = Proxy::http(server.address());
    proxy.set_rtt(2 * MS);
    proxy.set_bandwidth(Some(100_000_000));
    let image = Image::of(noise(7, 5 << 20));
    let url = url_at(proxy.address(), "behind");
    let mut cli = cli();
    cli.args(["image-from-file", "-s", "1M", "disk"]).arg(image.raw_file()).arg(&url);
    with_credentials(&mut cli, ACCESS_KEY, SECRET_KEY);
    run(&mut cli).ok();
    let up = proxy.counts();
    assert!(up.up > 5 << 20 && up.down < 1 << 20, "{up:?}");
    proxy.reset_counts();
    let state = image.dir().join("remote");
    let disk = Serve::new(Path::new(&url), &state).name("disk").credentials(ACCESS_KEY, SECRET_KEY).start();
    let copy = image.dir().join("copy");
    run(Command::new("nbdcopy").arg(disk.uri("disk")).arg(&copy)).ok();
    assert!(std::fs::read(&copy).unwrap() == image.raw, "the copy differs");
    disk.stop();
    let down = proxy.counts();
    assert!(down.down > 5 << 20 && down.down < 6 << 20 && down.up < 1 << 20, "{down:?}");
}
