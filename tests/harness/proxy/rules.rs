//! What goes wrong, and with which requests.
//!
//! Enters: the method and target of each request, in the order they came. Leaves: the fault it meets, if any.
//! Invariant: the same requests in the same order meet the same faults; chance comes from a seed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What goes wrong with a request or its answer. "In the middle" is half-way through the body by its Content-Length; after the first byte of a
/// body without one; half-way through the head of an answer without a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client's connection is reset (RST) in the middle of the answer.
    ResetMidBody,
    /// The right Content-Length, and an orderly close (FIN) in the middle.
    CutShort,
    /// Half the Content-Length and half the body: an answer that looks whole. Others than those with a Content-Length pass as they are.
    LowerLength,
    /// Nothing comes from the middle on: for this long, or until the client gives up.
    Stall(Option<Duration>),
    /// 500 in the server's place: nothing is carried out.
    InternalError,
    /// 503 SlowDown with S3's error body: nothing is carried out.
    SlowDown {
        /// What Retry-After says, in seconds.
        retry_after_s: Option<u32>,
    },
    /// 200 with an HTML page in the server's place: nothing is carried out.
    ErrorPage,
    /// The byte in the middle of the body is another.
    WrongByte,
    /// The server carries the request out and answers; the client's connection is reset before it hears of it.
    LostAnswer,
}

impl Fault {
    /// The answer given in the server's place.
    pub fn own_answer(self, method: &str) -> Option<Vec<u8>> {
        let (status, more, kind, body) = match self {
            Fault::InternalError => (
                "500 Internal Server Error",
                String::new(),
                "application/xml",
                xml("InternalError", "We encountered an internal error. Please try again."),
            ),
            Fault::SlowDown { retry_after_s } => (
                "503 Slow Down",
                retry_after_s.map(|s| format!("Retry-After: {s}\r\n")).unwrap_or_default(),
                "application/xml",
                xml("SlowDown", "Please reduce your request rate."),
            ),
            Fault::ErrorPage => (
                "200 OK",
                String::new(),
                "text/html",
                "<!DOCTYPE html><html><head><title>Sign in</title></head><body><h1>Sign in to the network</h1></body></html>\n".into(),
            ),
            _ => return None,
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {}\r\n\r\n",
            body.len()
        );
        Some(if method == "HEAD" { head.into() } else { (head + &body).into() })
    }
}

fn xml(code: &str, message: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
         <RequestId>PROXY</RequestId></Error>"
    )
}

#[derive(Clone, Copy, Debug)]
enum When {
    Always,
    /// Each n-th match.
    Every(u64),
    /// The first matches from now on.
    Next(u64),
    /// One match in so many, drawn.
    Chance {
        of_1000: u32,
        state: u64,
    },
}

/// Which requests meet which fault. Without more said: all of them, always.
#[derive(Clone, Debug)]
pub struct Rule {
    fault: Fault,
    method: Option<String>,
    path: Option<String>,
    when: When,
    matched: u64,
    hits: Hits,
}

impl Rule {
    pub fn new(fault: Fault) -> Rule {
        let hits = Hits(Arc::new(AtomicU64::new(0)));
        Rule { fault, method: None, path: None, when: When::Always, matched: 0, hits }
    }

    /// Only requests of this method.
    pub fn method(mut self, method: &str) -> Rule {
        self.method = Some(method.into());
        self
    }

    /// Only requests whose target, query included and escapes as sent, has this in it.
    pub fn path(mut self, part: &str) -> Rule {
        self.path = Some(part.into());
        self
    }

    /// Only each `n`-th of them.
    pub fn every(mut self, n: u64) -> Rule {
        self.when = When::Every(n.max(1));
        self
    }

    /// Only the next `k` of them.
    pub fn next(mut self, k: u64) -> Rule {
        self.when = When::Next(k);
        self
    }

    /// Only about `of_1000` of 1000 of them; the same ones for the same seed.
    pub fn chance(mut self, of_1000: u32, seed: u64) -> Rule {
        self.when = When::Chance { of_1000, state: seed };
        self
    }

    fn meets(&mut self, method: &str, target: &str) -> bool {
        let matches = self.method.as_ref().is_none_or(|wanted| wanted == method)
            && self.path.as_ref().is_none_or(|part| target.contains(part.as_str()));
        if !matches {
            return false;
        }
        self.matched += 1;
        let meets = match &mut self.when {
            When::Always => true,
            When::Every(n) => self.matched.is_multiple_of(*n),
            When::Next(k) => self.matched <= *k,
            When::Chance { of_1000, state } => draw(state) % 1000 < u64::from(*of_1000),
        };
        if meets {
            self.hits.0.fetch_add(1, Ordering::SeqCst);
        }
        meets
    }
}

/// SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How many requests met a rule's fault: a test that injects nothing proves nothing.
#[derive(Clone, Debug)]
pub struct Hits(Arc<AtomicU64>);

impl Hits {
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// The rules of a proxy; the first that a request meets counts.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

impl Rules {
    pub fn add(&mut self, rule: Rule) -> Hits {
        let hits = rule.hits.clone();
        self.0.push(rule);
        hits
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn fault(&mut self, method: &str, target: &str) -> Option<Fault> {
        self.0.iter_mut().find_map(|rule| rule.meets(method, target).then_some(rule.fault))
    }
}
