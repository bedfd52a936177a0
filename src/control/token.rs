//! The bearer token that stands between a TCP port and the API (RFC 6750).
//!
//! Invariant: the token itself is forgotten once it is read, so that no log and no error can hold it; whether one is right takes the same time for all that are wrong.

use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};

use super::failure::Refused;

/// One that is shorter can be guessed.
const SHORTEST: usize = 16;
/// The longest file that is read.
const LONGEST: u64 = 4096;

/// Why a token can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file can't be read.
    #[error("can't read the token's file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Others can read it.
    #[error("others may read the token's file {}: its mode is {mode:03o}, its owner {owner}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// Whose it is.
        owner: u32,
    },
    /// What is in it is no token.
    #[error("the file {} holds no token: one line of {SHORTEST} characters or more ({LONGEST} at most), without spaces", path.display())]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// What who asks must know.
#[derive(Clone, Copy)]
pub struct Token(blake3::Hash);

impl Token {
    /// The token in a file that is its owner's alone.
    pub fn load(path: &Path) -> Result<Token, TokenError> {
        let failed = |source| TokenError::Io { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        let (mode, owner) = (found.mode() & 0o777, found.uid());
        let is_ours = owner == 0 || owner == rustix::process::geteuid().as_raw();
        if mode & 0o077 != 0 || !is_ours {
            return Err(TokenError::Open { path: path.to_owned(), mode, owner });
        }
        let mut text = Vec::new();
        file.take(LONGEST).read_to_end(&mut text).map_err(failed)?;
        let token = text.trim_ascii();
        if text.len() as u64 == LONGEST || token.len() < SHORTEST || !token.iter().all(u8::is_ascii_graphic) {
            return Err(TokenError::Content { path: path.to_owned() });
        }
        Ok(Token(blake3::hash(token)))
    }

    /// Whether a request brings it.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
        // The scheme's name is in any case (RFC 9110).
        let token = given.and_then(|given| given.split_at_checked("bearer ".len()));
        // Hashes are compared in constant time.
        token.is_some_and(|(scheme, token)| {
            scheme.eq_ignore_ascii_case(b"bearer ") && blake3::hash(token.trim_ascii()) == self.0
        })
    }
}

/// These routes, for those only who bring the token.
pub fn guarded(router: Router, token: Token) -> Router {
    router.layer(from_fn(move |request: Request, next: Next| async move {
        if token.is_in(request.headers()) {
            return next.run(request).await;
        }
        let mut refused: Response = Refused::no_token().into_response();
        refused.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"horcrux\""));
        refused
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn of(text: &str, mode: u32) -> Result<Token, TokenError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        Token::load(&path)
    }

    #[test]
    fn a_token_is_a_line_that_nobody_else_can_read() {
        assert!(of("0123456789abcdef\n", 0o600).is_ok());
        for (text, mode, words) in [
            ("0123456789abcdef\n", 0o644, "its mode is 644"),
            ("short\n", 0o600, "holds no token: one line of 16 characters or more"),
            ("two words that are long\n", 0o600, "holds no token"),
            ("", 0o400, "holds no token"),
        ] {
            let told = of(text, mode).err().unwrap().to_string();
            assert!(told.contains(words) && !told.contains("0123"), "{told}");
        }
        let told = Token::load(Path::new("/nowhere/token")).err().unwrap().to_string();
        assert!(told.starts_with("can't read the token's file /nowhere/token: "), "{told}");
    }

    #[test]
    fn only_the_token_opens() {
        let token = of("0123456789abcdef\n", 0o600).unwrap();
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_static(value));
            token.is_in(&headers)
        };
        assert!(with("Bearer 0123456789abcdef") && with("bearer  0123456789abcdef"));
        for wrong in
            ["", "Bearer", "Bearer ", "Basic 0123456789abcdef", "Bearer 0123456789abcdeF", "0123456789abcdef"]
        {
            assert!(!with(wrong), "{wrong}");
        }
        assert!(!token.is_in(&HeaderMap::new()));
    }
}
