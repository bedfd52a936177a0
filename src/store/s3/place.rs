//! Where a repository is in an object store, as its URL says.

use std::fmt;

/// A bucket, or a part of one, at a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct S3Place {
    /// The bucket.
    pub bucket: String,
    /// What all keys start with; empty, or ends in `/`.
    pub prefix: String,
    /// The region, where the URL names one.
    pub region: Option<String>,
    /// The server, `http://...` or `https://...`, where it is not Amazon's.
    pub endpoint: Option<String>,
}

impl fmt::Display for S3Place {
    /// The bucket as its URL has it, and the server: nothing here is secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)?;
        match &self.endpoint {
            Some(endpoint) => write!(f, " at {endpoint}"),
            None => Ok(()),
        }
    }
}
