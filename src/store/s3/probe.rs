//! Finds out whether a server keeps its conditions.
//!
//! Some servers know no conditional PUT, and some take the header, ignore it and answer 200: on those, two writers would overwrite each other's refs
//! and both be told they won. So before this process writes anything, it tries: with an object of its own, alone and in a race.

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use futures_util::future::join_all;

use super::super::{Key, StoreError};
use super::error::{Answer, answer, store_error};
use super::place::S3Place;

/// Keys below this are probes; one that a crash left is nobody's.
pub(super) const PROBES: &str = "probe";
/// Writers of one race. SeaweedFS lets those who lose wait for a second or more each.
const RACERS: usize = 4;

/// How the server wants the tag in If-Match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TagForm {
    /// As it gave it, in quotes.
    Quoted,
    /// Without them (Ceph RGW before 17).
    Bare,
}

impl TagForm {
    pub(super) fn of(self, tag: &str) -> &str {
        match self {
            TagForm::Quoted => tag,
            TagForm::Bare => tag.trim_matches('"'),
        }
    }
}

/// Tries the conditions; how they have to be written, or that they are not kept.
pub(super) async fn conditions(
    client: &Client,
    place: &S3Place,
    store: &str,
    id: uuid::Uuid,
) -> Result<TagForm, StoreError> {
    let probe = |what| {
        let key = Key::new(&format!("{PROBES}/{id}-{what}"))?;
        Ok::<_, StoreError>(Probe { client, place, store, key })
    };
    let (making, moving) = (probe("new")?, probe("swap")?);
    // Together: a server that lets the losers of a race wait costs that only once.
    let (made, moved) = tokio::join!(making.make(), moving.swap());
    for probe in [making, moving] {
        // Best effort: a probe left behind is skipped by whoever lists.
        let _ = client.delete_object().bucket(&place.bucket).key(probe.name()).send().await;
    }
    made?;
    moved
}

struct Probe<'p> {
    client: &'p Client,
    place: &'p S3Place,
    store: &'p str,
    key: Key,
}

/// `None`: the condition did not hold.
type Tried = Result<Option<String>, StoreError>;

impl Probe<'_> {
    fn name(&self) -> String {
        format!("{}{}", self.place.prefix, self.key)
    }

    /// An object that is made by one of several, and by nobody again.
    async fn make(&self) -> Result<(), StoreError> {
        // A connection for each racer, so that they start together.
        let _ = join_all((0..RACERS).map(|_| self.tag())).await;
        self.race(None, "If-None-Match").await?;
        match self.put(None, "again".into()).await? {
            Some(_) => Err(self.ignored("If-None-Match")),
            None => Ok(()),
        }
    }

    /// An object that is moved on by who knows it, and by one of several who do.
    async fn swap(&self) -> Result<TagForm, StoreError> {
        if self.put(None, "first".into()).await?.is_none() {
            return Err(self.ignored("If-None-Match"));
        }
        // As a reader is told it: that is what swaps will expect.
        let tag = self.tag().await?;
        let wrong = "\"00000000000000000000000000000000\"";
        for form in [TagForm::Quoted, TagForm::Bare] {
            if self.put(Some(form.of(wrong)), "wrong".into()).await?.is_some() {
                return Err(self.ignored("If-Match"));
            }
            if self.put(Some(form.of(&tag)), "right".into()).await?.is_none() {
                continue;
            }
            let new = self.tag().await?;
            if self.put(Some(form.of(&tag)), "stale".into()).await?.is_some() || new == tag {
                return Err(self.ignored("If-Match"));
            }
            self.race(Some(form.of(&new)), "If-Match").await?;
            return Ok(form);
        }
        Err(self.ignored("If-Match"))
    }

    /// Several writers with one condition: exactly one may win.
    async fn race(&self, expected: Option<&str>, condition: &'static str) -> Result<(), StoreError> {
        let raced = join_all((0..RACERS).map(|racer| self.put(expected, format!("racer {racer}")))).await;
        let (mut winners, mut unanswered) = (0, None);
        for tried in raced {
            match tried {
                Ok(Some(_)) => winners += 1,
                Ok(None) => {}
                // Told to come again later while another one was at it: it did not win.
                Err(error) if error.is_transient() => unanswered = Some(error),
                Err(error) => return Err(error),
            }
        }
        match (winners, unanswered) {
            (1, _) => Ok(()),
            // One of those may have won and not heard of it.
            (0, Some(error)) => Err(error),
            _ => Err(self.ignored(condition)),
        }
    }

    /// The object's tag, as a reader is told it.
    async fn tag(&self) -> Result<String, StoreError> {
        let got = self.client.get_object().bucket(&self.place.bucket).key(self.name()).send().await;
        let got = got.map_err(|error| store_error(self.store, "read", &self.key, &error))?;
        Ok(got.e_tag().unwrap_or_default().to_owned())
    }

    async fn put(&self, expected: Option<&str>, body: String) -> Tried {
        let request = self.client.put_object().bucket(&self.place.bucket).key(self.name());
        let request = match expected {
            Some(tag) => request.if_match(tag),
            None => request.if_none_match("*"),
        };
        let request = request.body(ByteStream::from(body.into_bytes()));
        match request.send().await {
            Ok(done) => Ok(Some(done.e_tag().unwrap_or_default().to_owned())),
            Err(error) if answer(&error) == Answer::Precondition => Ok(None),
            Err(error) => Err(store_error(self.store, "write", &self.key, &error)),
        }
    }

    fn ignored(&self, condition: &'static str) -> StoreError {
        StoreError::NoConditions { store: self.store.into(), condition }
    }
}
