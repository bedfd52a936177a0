//! A store in an S3 bucket: Amazon's, or any server that speaks its language.
//!
//! Enters: keys, ranges and bodies. Leaves: objects under the place's prefix. Invariant: nothing is written before the server has shown that it keeps
//! If-None-Match and If-Match (`probe`); on one that does not, every write is refused, because refs could be overwritten unseen.
//!
//! Write-once objects go up with If-None-Match, in one request or, when long, in parts of [`PART_BYTES`], [`PARTS_AT_ONCE`] at a time. Refs move with If-Match
//! on the tag they were read with. Every request is made once: who wants more wraps the store in `store::retry`.

mod client;
mod error;
mod place;
mod probe;
mod upload;

use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::{OnceCell, Semaphore};

pub use place::S3Place;

use self::error::{Answer, answer, store_error};
use self::probe::{PROBES, TagForm};
use self::upload::{Budget, Spool, spool_error};
use super::{Etag, Key, KeyPrefix, Listed, MAX_WHOLE_OBJECT, Page, Store, StoreError, Upload};

/// Bytes of one part; objects up to two of them go up in one request. Amazon wants at least 5 MiB.
const PART_BYTES: usize = 8 << 20;
/// Parts on their way at once.
const PARTS_AT_ONCE: usize = 4;
/// What uploads that wait for their names may keep in memory together; the rest waits in files.
const UPLOAD_MEMORY: usize = 64 << 20;
/// The most keys a server lists in one answer.
const LIST_MAX: usize = 1000;

/// A store in a bucket. Clones share the connection pool.
#[derive(Clone)]
pub struct S3Store {
    inner: Arc<Inner>,
}

struct Inner {
    place: S3Place,
    name: String,
    client: OnceCell<Client>,
    /// What the probe found.
    form: OnceCell<TagForm>,
    /// Parts on their way.
    sending: Semaphore,
    /// What all uploads together may keep in memory.
    memory: Budget,
}

impl std::fmt::Debug for S3Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the client: it knows credentials.
        f.debug_tuple("S3Store").field(&self.inner.place).finish()
    }
}

impl S3Store {
    /// The store at a place. Touches nothing yet.
    pub fn new(place: S3Place) -> S3Store {
        S3Store::of(place, OnceCell::new())
    }

    /// The store at a place, through a client that is there already.
    pub fn with_client(place: S3Place, client: Client) -> S3Store {
        S3Store::of(place, OnceCell::new_with(Some(client)))
    }

    fn of(place: S3Place, client: OnceCell<Client>) -> S3Store {
        let inner = Inner {
            name: place.to_string(),
            place,
            client,
            form: OnceCell::new(),
            sending: Semaphore::new(PARTS_AT_ONCE),
            memory: Budget::new(UPLOAD_MEMORY),
        };
        S3Store { inner: Arc::new(inner) }
    }
}

impl Inner {
    async fn client(&self) -> &Client {
        self.client.get_or_init(|| client::client(&self.place)).await
    }

    /// The client, once the server has shown that it keeps conditions.
    async fn writer(&self) -> Result<(&Client, TagForm), StoreError> {
        let client = self.client().await;
        let probe = || probe::conditions(client, &self.place, &self.name, uuid::Uuid::new_v4());
        Ok((client, *self.form.get_or_try_init(probe).await?))
    }

    fn object(&self, key: &Key) -> String {
        format!("{}{key}", self.place.prefix)
    }

    fn short(&self, key: &Key, expected: u64, actual: u64) -> StoreError {
        StoreError::ShortBody { store: self.name.clone(), key: key.clone(), expected, actual }
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        let head = self.client().await.head_object().bucket(&self.place.bucket).key(self.object(key));
        let head = head.send().await.map_err(|error| store_error(&self.name, "look at", key, &error))?;
        self.told(key, "length", head.content_length().and_then(|len| u64::try_from(len).ok()))
    }

    /// What an answer must say, or the answer makes no sense.
    fn told<T>(&self, key: &Key, what: &str, said: Option<T>) -> Result<T, StoreError> {
        said.ok_or_else(|| StoreError::Remote {
            store: self.name.clone(),
            operation: "read",
            key: key.to_string(),
            why: format!("the server's answer has no {what}"),
            // What stands between here and the server may have answered in its place.
            transient: true,
        })
    }

    /// A tag that a later swap can expect: an empty one would be no condition at all.
    fn tag(&self, key: &Key, tag: Option<&str>) -> Result<Etag, StoreError> {
        self.told(key, "ETag", tag.filter(|tag| !tag.trim_matches('"').is_empty())).map(Etag::new)
    }

    /// Reads a body of exactly `expected` bytes.
    async fn body(&self, key: &Key, mut body: ByteStream, expected: u64) -> Result<Bytes, StoreError> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        let mut got = 0;
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|source| StoreError::Remote {
                store: self.name.clone(),
                operation: "read",
                key: key.to_string(),
                why: format!("the answer broke off after {got} of {expected} bytes: {source}"),
                transient: true,
            })?;
            got += piece.len() as u64;
            if got > expected {
                return Err(self.short(key, expected, got));
            }
            if got == piece.len() as u64 {
                first = piece;
            } else {
                if rest.is_empty() {
                    rest.reserve(expected as usize);
                    rest.extend_from_slice(&first);
                }
                rest.extend_from_slice(&piece);
            }
        }
        if got != expected {
            return Err(self.short(key, expected, got));
        }
        Ok(if rest.is_empty() { first } else { rest.freeze() })
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        super::dir::check_range(&self.name, key, &range, u64::MAX)?;
        let expected = range.end - range.start;
        if expected == 0 {
            let len = self.len(key).await?;
            super::dir::check_range(&self.name, key, &range, len)?;
            return Ok(Bytes::new());
        }
        let get = self.client().await.get_object().bucket(&self.place.bucket).key(self.object(key));
        match get.range(format!("bytes={}-{}", range.start, range.end - 1)).send().await {
            Ok(got) => {
                // Without it, it is not the range, whatever its length: the server knows no ranges.
                let start = format!("bytes {}-", range.start);
                let told = got.content_range().filter(|told| told.starts_with(&start));
                self.told(key, "Content-Range from there", told)?;
                // A body that is shorter is the end of the object.
                self.body(key, got.body, expected).await
            }
            Err(error) if answer(&error) == Answer::Range => {
                let len = self.len(key).await?;
                Err(self.short(key, expected, len.saturating_sub(range.start).min(expected - 1)))
            }
            Err(error) => Err(store_error(&self.name, "read", key, &error)),
        }
    }

    /// What a write-once object that is there already means for who wanted to write it.
    async fn compare(&self, key: &Key, spool: &Spool) -> Result<(), StoreError> {
        let other = || StoreError::AlreadyExists { store: self.name.clone(), key: key.clone() };
        if self.len(key).await? != spool.len() {
            return Err(other());
        }
        let mut at = 0;
        while at < spool.len() {
            let len = (spool.len() - at).min(PART_BYTES as u64);
            let there = self.get_range(key, at..at + len).await?;
            let ours = spool.read(at, len as usize).await.map_err(|error| spool_error(&self.name, error))?;
            if there != ours {
                return Err(other());
            }
            at += len;
        }
        Ok(())
    }

    async fn put_spool(&self, key: &Key, spool: &Spool) -> Result<(), StoreError> {
        let (client, _) = self.writer().await?;
        let done = if spool.len() <= 2 * PART_BYTES as u64 {
            let body = spool.read(0, spool.len() as usize).await.map_err(|e| spool_error(&self.name, e))?;
            let put = client.put_object().bucket(&self.place.bucket).key(self.object(key)).if_none_match("*");
            let put = put.body(ByteStream::from(body)).customize();
            match put.config_override(client::for_bodies(spool.len(), false)).send().await {
                Ok(_) => Ok(()),
                Err(error) => Err(store_error(&self.name, "write", key, &error)),
            }
        } else {
            self.put_parts(client, key, spool).await
        };
        match done {
            Err(StoreError::Conflict { .. }) => self.compare(key, spool).await,
            other => other,
        }
    }

    async fn put_parts(&self, client: &Client, key: &Key, spool: &Spool) -> Result<(), StoreError> {
        // Asked first: on a server that checks the condition only of single requests, this is what is left of it.
        match self.len(key).await {
            Ok(_) => return Err(StoreError::Conflict { store: self.name.clone(), key: key.clone() }),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let (bucket, object) = (&self.place.bucket, &self.object(key));
        let begun = client.create_multipart_upload().bucket(bucket).key(object).send().await;
        let begun = begun.map_err(|error| store_error(&self.name, "begin", key, &error))?;
        let id = begun.upload_id().unwrap_or_default();
        let sent = self.send_parts(client, key, spool, id).await;
        let done = match sent {
            Ok(parts) => {
                let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
                let complete = client.complete_multipart_upload().bucket(bucket).key(object).upload_id(id);
                let complete = complete.if_none_match("*").multipart_upload(parts).send().await;
                complete.map(|_| ()).map_err(|error| store_error(&self.name, "complete", key, &error))
            }
            Err(error) => Err(error),
        };
        if done.is_err() {
            // Best effort: parts nobody completes are the server's to sweep.
            let _ = client.abort_multipart_upload().bucket(bucket).key(object).upload_id(id).send().await;
        }
        done
    }

    async fn send_parts(
        &self,
        client: &Client,
        key: &Key,
        spool: &Spool,
        id: &str,
    ) -> Result<Vec<CompletedPart>, StoreError> {
        let count = spool.len().div_ceil(PART_BYTES as u64);
        let parts = stream::iter(0..count).map(|index| async move {
            // Over all uploads: more at once would only make each slower.
            let _sending = self.sending.acquire().await;
            let at = index * PART_BYTES as u64;
            let len = (spool.len() - at).min(PART_BYTES as u64);
            let body = spool.read(at, len as usize).await.map_err(|error| spool_error(&self.name, error))?;
            let number = index as i32 + 1;
            let part = client.upload_part().bucket(&self.place.bucket).key(self.object(key)).upload_id(id);
            let part = part.part_number(number).body(ByteStream::from(body)).customize();
            let sent = part.config_override(client::for_bodies(len, true)).send().await;
            let sent = sent.map_err(|error| store_error(&self.name, "write", key, &error))?;
            Ok(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build())
        });
        parts.buffered(PARTS_AT_ONCE).try_collect().await
    }

    /// One answer of a listing: keys and, with a delimiter, what is below them, both without the place's prefix.
    async fn page(&self, ask: Ask<'_>) -> Result<Answered, StoreError> {
        let list = self.client().await.list_objects_v2().bucket(&self.place.bucket);
        let list = list
            .prefix(format!("{}{}", self.place.prefix, ask.prefix))
            .set_start_after(ask.after.map(|after| format!("{}{after}", self.place.prefix)))
            .set_continuation_token(ask.token)
            .set_delimiter(ask.delimited.then(|| "/".to_owned()))
            .max_keys(ask.limit.clamp(1, LIST_MAX) as i32);
        let listed = match list.send().await {
            Ok(listed) => listed,
            Err(error) => return Err(self.list_error(ask.prefix, &error)),
        };
        let own = |name: &str| name.strip_prefix(&self.place.prefix).map(str::to_owned);
        let objects = listed.contents().iter().filter_map(|object| {
            let len = u64::try_from(object.size().unwrap_or(0)).unwrap_or(0);
            let modified = object.last_modified().and_then(|at| SystemTime::try_from(*at).ok());
            Some(Listing { name: own(object.key()?)?, len, modified })
        });
        let below = listed.common_prefixes().iter().filter_map(|common| own(common.prefix()?));
        Ok(Answered {
            objects: objects.collect(),
            below: below.collect(),
            more: listed.is_truncated().unwrap_or(false),
            token: listed.next_continuation_token().map(str::to_owned),
        })
    }

    fn list_error<E>(&self, prefix: &str, error: &SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let named = Key::new(prefix.trim_end_matches('/')).or_else(|_| Key::new("objects"));
        match named {
            Ok(key) => match store_error(&self.name, "list", &key, error) {
                // A listing has no object that could be missing: some servers say so of the bucket.
                StoreError::NotFound { .. } => StoreError::NoBucket { store: self.name.clone() },
                other => other,
            },
            Err(error) => error.into(),
        }
    }
}

struct Ask<'a> {
    prefix: &'a str,
    after: Option<&'a str>,
    token: Option<String>,
    delimited: bool,
    limit: usize,
}

struct Listing {
    name: String,
    len: u64,
    modified: Option<SystemTime>,
}

struct Answered {
    objects: Vec<Listing>,
    below: Vec<String>,
    more: bool,
    token: Option<String>,
}

#[async_trait]
impl Store for S3Store {
    async fn get(&self, key: &Key) -> Result<(Bytes, Etag), StoreError> {
        let inner = &self.inner;
        let get = inner.client().await.get_object().bucket(&inner.place.bucket).key(inner.object(key));
        let got = get.send().await.map_err(|error| store_error(&inner.name, "read", key, &error))?;
        let len = got.content_length().and_then(|len| u64::try_from(len).ok());
        let len = inner.told(key, "length", len)?;
        if len > MAX_WHOLE_OBJECT {
            return Err(StoreError::TooLong {
                store: inner.name.clone(),
                key: key.clone(),
                len,
                max: MAX_WHOLE_OBJECT,
            });
        }
        let etag = inner.tag(key, got.e_tag())?;
        Ok((inner.body(key, got.body, len).await?, etag))
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn put_new(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let mut spool = Spool::new(self.inner.memory.clone());
        spool.push(body).await.map_err(|error| spool_error(&self.inner.name, error))?;
        self.inner.put_spool(key, &spool).await
    }

    async fn begin(&self) -> Result<Box<dyn Upload>, StoreError> {
        // Said now rather than after a block was made.
        self.inner.writer().await?;
        Ok(Box::new(S3Upload { inner: self.inner.clone(), spool: Spool::new(self.inner.memory.clone()) }))
    }

    async fn compare_and_swap(
        &self,
        key: &Key,
        expected: Option<&Etag>,
        new: Bytes,
    ) -> Result<Etag, StoreError> {
        let inner = &self.inner;
        let (client, form) = inner.writer().await?;
        let put = client.put_object().bucket(&inner.place.bucket).key(inner.object(key));
        let put = match expected {
            Some(tag) => put.if_match(form.of(tag.as_str())),
            None => put.if_none_match("*"),
        };
        match put.body(ByteStream::from(new)).send().await {
            Ok(done) => inner.tag(key, done.e_tag()),
            // If-Match on an object that is gone.
            Err(error) if expected.is_some() && answer(&error) == Answer::NotFound => {
                Err(StoreError::Conflict { store: inner.name.clone(), key: key.clone() })
            }
            Err(error) if conflicts(&error) => {
                Err(StoreError::Conflict { store: inner.name.clone(), key: key.clone() })
            }
            Err(error) => Err(store_error(&inner.name, "write", key, &error)),
        }
    }

    async fn list(
        &self,
        prefix: &KeyPrefix,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Listed>, StoreError> {
        let mut page = Page { items: Vec::new(), more: true };
        let mut token = None;
        while page.more && page.items.len() < limit {
            let ask = Ask {
                prefix: prefix.as_str(),
                after: after.map(Key::as_str),
                token: token.take(),
                delimited: false,
                limit: limit - page.items.len(),
            };
            let answered = self.inner.page(ask).await?;
            page.more = answered.more;
            token = answered.token;
            for Listing { name, len, modified } in answered.objects {
                // What is no key of ours (a folder mark, a stranger's file) is no object of this store.
                if let Ok(key) = Key::new(&name) {
                    page.items.push(Listed { key, len, modified });
                }
            }
            if page.more && token.is_none() {
                return Err(self.strange_listing(prefix));
            }
        }
        Ok(page)
    }

    async fn children(
        &self,
        dir: &KeyPrefix,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<String>, StoreError> {
        // A server orders by the whole name, `a-b/` before `a/`; here it is by segment. So all are asked for, and the page cut from them.
        let mut segments = std::collections::BTreeSet::new();
        let mut token = None;
        loop {
            let ask = Ask {
                prefix: dir.as_str(),
                after: None,
                token: token.take(),
                delimited: true,
                limit: LIST_MAX,
            };
            let answered = self.inner.page(ask).await?;
            let names = answered.objects.iter().map(|object| &object.name).chain(&answered.below);
            for name in names {
                let segment = name.strip_prefix(dir.as_str()).unwrap_or_default().trim_end_matches('/');
                if !segment.is_empty() && after.is_none_or(|after| segment > after) {
                    segments.insert(segment.to_owned());
                }
            }
            // No more than is asked for has to be kept.
            while segments.len() > limit.saturating_add(1) {
                segments.pop_last();
            }
            token = answered.token;
            if !answered.more {
                break;
            }
            if token.is_none() {
                return Err(self.strange_listing(dir));
            }
        }
        let more = segments.len() > limit;
        Ok(Page { items: segments.into_iter().take(limit).collect(), more })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let inner = &self.inner;
        let delete = inner.client().await.delete_object().bucket(&inner.place.bucket).key(inner.object(key));
        match delete.send().await {
            Ok(_) => Ok(()),
            Err(error) if answer(&error) == Answer::NotFound => Ok(()),
            Err(error) => Err(store_error(&inner.name, "delete", key, &error)),
        }
    }

    async fn occupant(&self) -> Result<Option<String>, StoreError> {
        // The first names are enough, however many there are: all probes are one of them, and so may be a mark for the folder itself.
        let ask = Ask { prefix: "", after: None, token: None, delimited: true, limit: 3 };
        let answered = self.inner.page(ask).await?;
        let names = answered.objects.into_iter().map(|object| object.name).chain(answered.below);
        let mut names = names.map(|name| name.trim_end_matches('/').to_owned());
        Ok(names.find(|name| !name.is_empty() && name != PROBES))
    }

    fn describe(&self) -> String {
        self.inner.name.clone()
    }

    fn expect_reads(&self, at_once: usize) {
        // The smallest question there is; the connection it came over is kept for what comes next.
        for _ in 0..at_once {
            let inner = self.inner.clone();
            tokio::spawn(async move {
                let bucket = inner.client().await.head_bucket().bucket(&inner.place.bucket);
                let _ = bucket.send().await;
            });
        }
    }
}

impl S3Store {
    fn strange_listing(&self, prefix: &KeyPrefix) -> StoreError {
        StoreError::Remote {
            store: self.inner.name.clone(),
            operation: "list",
            key: prefix.as_str().to_owned(),
            why: "the server says there is more and gives no way on".into(),
            transient: false,
        }
    }
}

fn conflicts<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    // 409 where another writer of the same key was faster but is not done yet: it has won, or nobody has.
    answer(error) == Answer::Precondition || error.code() == Some("ConditionalRequestConflict")
}

struct S3Upload {
    inner: Arc<Inner>,
    spool: Spool,
}

#[async_trait]
impl Upload for S3Upload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.spool.push(bytes).await.map_err(|error| spool_error(&self.inner.name, error))
    }

    async fn finish(&mut self, key: &Key) -> Result<(), StoreError> {
        self.inner.put_spool(key, &self.spool).await
    }
}
