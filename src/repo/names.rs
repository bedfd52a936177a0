//! Names of images, branches and tags, and how users point at a version: `NAME[@REF[~N]]`.
//!
//! Enters: strings from users and listings. Leaves: names that are one plain segment of a key, or an error that says the rule.

use std::fmt;
use std::str::FromStr;

use super::RepoError;
use crate::store::key::MAX_SEGMENT_BYTES;

/// The branch that is meant where none is named.
pub const DEFAULT_BRANCH: &str = "main";
/// git's word for what is checked out; in a repository, the default branch. No branch or tag is made with this name.
pub const HEAD: &str = "HEAD";
/// The furthest `~N` goes back.
pub const MAX_BACK: u32 = 1_000_000;
/// The shortest start of a commit's id that stands for it.
pub const MIN_PREFIX_DIGITS: usize = 4;

fn check(kind: &'static str, text: &str) -> Result<(), RepoError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let why = if text.is_empty() {
        "it is empty"
    } else if text.len() > MAX_SEGMENT_BYTES {
        "it is longer than 128 characters"
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        "it must start with a letter or digit"
    } else if text.contains('/') {
        "it has a '/'"
    } else if text.contains("..") {
        "it has '..'"
    } else if !text.chars().all(plain) {
        "only A-Z a-z 0-9 . _ - are allowed"
    } else {
        return Ok(());
    };
    Err(RepoError::BadName { kind, text: text.chars().take(MAX_SEGMENT_BYTES).collect(), why })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = RepoError;

            fn from_str(text: &str) -> Result<$name, RepoError> {
                check($kind, text)?;
                Ok($name(text.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// The name of an image.
    ImageName, "an image's name"
}
name! {
    /// The name of a branch.
    BranchName, "a branch's name"
}
name! {
    /// The name of a tag.
    TagName, "a tag's name"
}

impl Default for BranchName {
    fn default() -> BranchName {
        BranchName(DEFAULT_BRANCH.into())
    }
}

/// What a name is said to be the name of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefKind {
    /// `heads/NAME`.
    Branch,
    /// `tags/NAME`.
    Tag,
}

impl RefKind {
    fn prefix(self) -> &'static str {
        match self {
            RefKind::Branch => "heads/",
            RefKind::Tag => "tags/",
        }
    }
}

/// What follows the `@`: a branch, a tag or the start of a commit's id, and how many commits to go back from there. `heads/` or `tags/` before it says which it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    kind: Option<RefKind>,
    name: String,
    back: u32,
}

impl Reference {
    /// Whether it is said to be a branch or a tag.
    pub fn kind(&self) -> Option<RefKind> {
        self.kind
    }

    /// The name before any `~`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many first parents to go back.
    pub fn back(&self) -> u32 {
        self.back
    }
}

impl Default for Reference {
    fn default() -> Reference {
        Reference { kind: None, name: DEFAULT_BRANCH.into(), back: 0 }
    }
}

impl FromStr for Reference {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<Reference, RepoError> {
        const KIND: &str = "a version";
        let (name, back) = match text.split_once('~') {
            None => (text, 0),
            Some((name, "")) => (name, 1),
            Some((name, digits)) => {
                let back = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok());
                let back = back.flatten().filter(|&back| back <= MAX_BACK);
                let why = "what follows ~ must be a number of commits";
                (
                    name,
                    back.ok_or_else(|| RepoError::BadName {
                        kind: KIND,
                        text: text.chars().take(200).collect(),
                        why,
                    })?,
                )
            }
        };
        let kinds = [RefKind::Branch, RefKind::Tag];
        let said = kinds.into_iter().find_map(|kind| Some((kind, name.strip_prefix(kind.prefix())?)));
        let (kind, name) = said.map_or((None, name), |(kind, name)| (Some(kind), name));
        check(KIND, name)?;
        Ok(Reference { kind, name: name.to_owned(), back })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.map_or("", RefKind::prefix))?;
        f.write_str(&self.name)?;
        if self.back > 0 { write!(f, "~{}", self.back) } else { Ok(()) }
    }
}

/// `NAME[@REF]`: an image and a version of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RefSpec {
    /// The image.
    pub image: ImageName,
    /// The version; the default branch where none was given.
    pub reference: Reference,
}

impl FromStr for RefSpec {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<RefSpec, RepoError> {
        let (image, reference) = match text.split_once('@') {
            None => (text, Reference::default()),
            Some((image, reference)) => (image, reference.parse()?),
        };
        Ok(RefSpec { image: image.parse()?, reference })
    }
}

impl fmt::Display for RefSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.image, self.reference)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_mean_a_path_are_refused_with_the_rule() {
        for (bad, rule) in [
            ("", "empty"),
            ("a/b", "'/'"),
            ("a..b", "'..'"),
            ("..", "letter or digit"),
            (".x", "letter or digit"),
            ("-x", "letter or digit"),
            ("a b", "only"),
            ("ä", "letter or digit"),
            ("x\n", "only"),
        ] {
            let error = bad.parse::<ImageName>().unwrap_err().to_string();
            assert!(error.contains(rule), "{bad:?}: {error}");
        }
    }

    #[test]
    fn a_version_is_read_in_all_its_forms() {
        for (text, image, name, back) in [
            ("AMCC", "AMCC", "main", 0),
            ("AMCC@v1.0", "AMCC", "v1.0", 0),
            ("AMCC@main~3", "AMCC", "main", 3),
            ("AMCC@main~", "AMCC", "main", 1),
            ("a@0123abcd", "a", "0123abcd", 0),
            ("a@heads/v1~2", "a", "v1", 2),
            ("a@tags/v1", "a", "v1", 0),
        ] {
            let spec: RefSpec = text.parse().unwrap();
            assert_eq!(
                (spec.image.as_str(), spec.reference.name(), spec.reference.back()),
                (image, name, back)
            );
        }
        assert_eq!("heads/b".parse::<Reference>().unwrap().kind(), Some(RefKind::Branch));
        for bad in [
            "@main",
            "a@",
            "a@b@c",
            "a@~1",
            "a@b~x",
            "a@b~-1",
            "a@b~9999999999",
            "a@b~1~2",
            "a@../x",
            "a@heads/",
            "a@heads/b/c",
        ] {
            assert!(bad.parse::<RefSpec>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_string_panics_and_what_reads_prints_the_same(text in "[a-z0-9@~./é-]{0,30}") {
            if let Ok(spec) = text.parse::<RefSpec>() {
                prop_assert_eq!(spec.to_string().parse::<RefSpec>().unwrap(), spec);
            }
        }
    }
}
