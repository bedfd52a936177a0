//! The tests' fault proxy as a program, for scripts: a server on this machine becomes far away and narrow.
//!
//! Enters: a command line, then commands on standard input, one a line. Leaves: one line with the address it listens on,
//! then one line of answer for each command. It ends with its standard input, so that it can't outlive the script.
//!
//!     count            what went through since the last reset, as JSON
//!     reset            counts from nothing; answers what was counted until then
//!     rtt MS           another round trip
//!     rate MB          another width, in millions of bytes a second each way; 0 is without limit
//!     away | silent | here   the server goes (connections refused, or never answered), and comes back

use std::io::{self, BufRead, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use clap::Parser;

#[path = "../../tests/harness/proxy/mod.rs"]
mod proxy;

use proxy::{Mode, Proxy, Reach};

/// Puts a server on this machine behind a long or narrow line.
#[derive(Parser)]
struct Args {
    /// Where to listen; port 0 is a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The server
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// What a round trip takes more, in milliseconds
    #[arg(long, default_value_t = 0.0)]
    rtt_ms: f64,
    /// What all connections together may move each way, in millions of bytes a second; 0 is without limit
    #[arg(long, default_value_t = 0.0)]
    mbytes_per_s: f64,
    /// Takes the server for one that speaks HTTP/1.1, and counts requests; else any TCP server will do
    #[arg(long)]
    http: bool,
}

fn main() -> io::Result<()> {
    let args = Args::parse();
    let server = args.to.to_socket_addrs()?.next();
    let server = server.ok_or_else(|| io::Error::other(format!("{}: no address", args.to)))?;
    let proxy = Proxy::start(if args.http { Mode::Http } else { Mode::Tcp }, server, args.listen)?;
    set_rtt(&proxy, args.rtt_ms);
    set_rate(&proxy, args.mbytes_per_s);
    let mut out = io::stdout().lock();
    writeln!(out, "{}", proxy.address())?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        let answer = command(&proxy, line?.trim());
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn command(proxy: &Proxy, line: &str) -> String {
    let (word, value) = line.split_once(' ').unwrap_or((line, ""));
    let number = value.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    match (word, number) {
        ("count", None) => return proxy.counts().json(),
        ("reset", None) => {
            let counts = proxy.counts();
            proxy.reset_counts();
            return counts.json();
        }
        ("rtt", Some(ms)) => set_rtt(proxy, ms),
        ("rate", Some(mbytes)) => set_rate(proxy, mbytes),
        ("away", None) => proxy.set_reach(Reach::Refusing),
        ("silent", None) => proxy.set_reach(Reach::Silent),
        ("here", None) => proxy.set_reach(Reach::Here),
        _ => return format!("no such command: {line}"),
    }
    "ok".into()
}

fn set_rtt(proxy: &Proxy, ms: f64) {
    proxy.set_rtt(Duration::from_secs_f64(ms / 1e3));
}

fn set_rate(proxy: &Proxy, mbytes: f64) {
    proxy.set_bandwidth((mbytes > 0.0).then_some((mbytes * 1e6) as u64));
}
