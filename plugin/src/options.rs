//! The options of `docker volume create -o KEY=VALUE`.
//!
//! Enters: keys and values, with or without leading dashes. Leaves: what the daemon is to be asked for. Invariant: a key that is not known is refused, not passed over.

use std::collections::BTreeMap;

use horcrux::control::api::{CreateVolume, FilesystemKind, PrefetchMode};
use horcrux::repo::RefSpec;
use horcrux::units::ByteLen;

/// For a refusal: what there is.
const KNOWN: &str =
    "name, access, mirror (mirror2, ...), version or branch, size, ro, fs, prefetch, quota, from";

/// Why options can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("unknown option '{0}'; known are {KNOWN}")]
    Unknown(String),
    #[error("option '{0}' is given twice")]
    Twice(&'static str),
    #[error(
        "option '{0}' is missing, as in 'docker volume create -d horcrux-nbd -o name=IMAGE -o access=REPO VOLUME'"
    )]
    Missing(&'static str),
    #[error("option '{key}': '{value}' {why}")]
    Value { key: &'static str, value: String, why: String },
}

/// The options as they were given, each under its one name.
#[derive(Default)]
struct Given(BTreeMap<&'static str, String>);

impl Given {
    fn read(options: &BTreeMap<String, String>) -> Result<(Given, Vec<String>), OptionError> {
        let mut given = Given::default();
        let mut mirrors = BTreeMap::new();
        for (key, value) in options {
            let plain = key.trim_start_matches('-');
            let known = match plain {
                "name" => "name",
                "access" => "access",
                "version" | "branch" => "version",
                "size" => "size",
                "ro" | "read-only" => "ro",
                "fs" => "fs",
                "prefetch" => "prefetch",
                "quota" => "quota",
                "from" => "from",
                other => {
                    let unknown = || OptionError::Unknown(key.clone());
                    let number = other.strip_prefix("mirror").ok_or_else(unknown)?;
                    // Docker takes a key once only, so copies have numbers.
                    let number =
                        if number.is_empty() { 1 } else { number.parse::<u32>().map_err(|_| unknown())? };
                    if mirrors.insert(number, value.clone()).is_some() {
                        return Err(OptionError::Twice("mirror"));
                    }
                    continue;
                }
            };
            if given.0.insert(known, value.clone()).is_some() {
                return Err(OptionError::Twice(known));
            }
        }
        Ok((given, mirrors.into_values().collect()))
    }

    fn text(&self, key: &'static str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn needed(&self, key: &'static str) -> Result<&str, OptionError> {
        self.text(key).filter(|value| !value.is_empty()).ok_or(OptionError::Missing(key))
    }

    fn parsed<T>(
        &self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, OptionError> {
        let parsed = |value: &str| {
            parse(value).map_err(|why| OptionError::Value { key, value: value.to_owned(), why })
        };
        self.text(key).map(parsed).transpose()
    }
}

/// What `docker volume create VOLUME` with these options asks of the daemon.
pub fn wanted(volume: &str, options: &BTreeMap<String, String>) -> Result<CreateVolume, OptionError> {
    let (given, mirrors) = Given::read(options)?;
    let bytes = |text: &str| {
        text.parse().map(|ByteLen(bytes)| bytes).map_err(|_| "is no size; write it as 20G or 512M".to_owned())
    };
    if let Some(from) = given.text("from") {
        if given.0.len() > 1 || !mirrors.is_empty() {
            let why = "is a volume this one is a clone of: it has everything of it, so no other option goes with it";
            return Err(OptionError::Value { key: "from", value: from.to_owned(), why: why.to_owned() });
        }
        let (name, from) = (volume.to_owned(), Some(from.to_owned()));
        return Ok(CreateVolume { name, from, ..CreateVolume::default() });
    }
    let image = given.needed("name")?;
    let spec: RefSpec = image.parse().map_err(|error| OptionError::Value {
        key: "name",
        value: image.to_owned(),
        why: format!("names no version: {error}"),
    })?;
    let reference = match (image.contains('@'), given.text("version")) {
        (true, Some(_)) => return Err(OptionError::Twice("version")),
        (false, Some(version)) => version.to_owned(),
        (_, None) => spec.reference.to_string(),
    };
    let mut access = vec![given.needed("access")?.to_owned()];
    access.extend(mirrors);
    if let Some(relative) = access.iter().find(|place| !place.starts_with('/') && !place.contains("://")) {
        let why = "is relative; the daemon needs the whole path".to_owned();
        return Err(OptionError::Value { key: "access", value: relative.clone(), why });
    }
    Ok(CreateVolume {
        name: volume.to_owned(),
        access,
        image: spec.image.to_string(),
        from: None,
        reference: Some(reference),
        size: given.parsed("size", bytes)?,
        filesystem: given.parsed("fs", |text| match text {
            "ext4" => Ok(FilesystemKind::Ext4),
            "xfs" => Ok(FilesystemKind::Xfs),
            _ => Err("is neither ext4 nor xfs".to_owned()),
        })?,
        read_only: given.parsed("ro", switch)?.unwrap_or(false),
        prefetch: given
            .parsed("prefetch", |text| match text {
                "none" => Ok(PrefetchMode::None),
                "learned" => Ok(PrefetchMode::Learned),
                "all" => Ok(PrefetchMode::All),
                _ => Err("is neither all, none nor learned".to_owned()),
            })?
            .unwrap_or_default(),
        quota: given.parsed("quota", bytes)?,
    })
}

/// `-o ro` is `ro=` to Docker: the key is enough.
fn switch(text: &str) -> Result<bool, String> {
    match text {
        "" | "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("is neither 1 nor 0".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn of(options: &[(&str, &str)]) -> Result<CreateVolume, OptionError> {
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        wanted("v1", &options)
    }

    #[test]
    fn every_option_is_taken_with_and_without_dashes() {
        let all = of(&[
            ("name", "AMCC"),
            ("--access", "/repo"),
            ("mirror", "s3://a"),
            ("mirror2", "s3://b"),
            ("-version", "main~2"),
            ("size", "20G"),
            ("ro", ""),
            ("fs", "xfs"),
            ("--prefetch", "all"),
            ("quota", "512M"),
        ])
        .unwrap();
        assert_eq!((all.name.as_str(), all.image.as_str()), ("v1", "AMCC"));
        assert_eq!(all.access, ["/repo", "s3://a", "s3://b"]);
        assert_eq!(all.reference.as_deref(), Some("main~2"));
        assert_eq!((all.size, all.quota), (Some(20 << 30), Some(512 << 20)));
        assert!(all.read_only && all.filesystem == Some(FilesystemKind::Xfs));
        assert_eq!(all.prefetch, PrefetchMode::All);
        let few = of(&[("--name", "AMCC@v7"), ("access", "/repo")]).unwrap();
        assert_eq!(few.reference.as_deref(), Some("v7"));
        assert!(!few.read_only && few.size.is_none());
        assert_eq!(of(&[("name", "A"), ("access", "/r")]).unwrap().reference.as_deref(), Some("main"));
    }

    #[test]
    fn a_clone_names_its_source_and_nothing_else() {
        let clone = of(&[("--from", "v0")]).unwrap();
        assert_eq!((clone.name.as_str(), clone.from.as_deref(), clone.access.len()), ("v1", Some("v0"), 0));
        for more in [("size", "20G"), ("name", "A"), ("mirror", "/m")] {
            let told = of(&[("from", "v0"), more]).unwrap_err().to_string();
            assert!(told.starts_with("option 'from': 'v0' is a volume this one is a clone of"), "{told}");
        }
    }

    #[test]
    fn what_can_t_be_used_is_refused_with_words() {
        let base = [("name", "A"), ("access", "/r")];
        for (more, words) in [
            (&[("acces", "/r")][..], "unknown option 'acces'; known are name, access,"),
            (&[("mirrors", "/r")], "unknown option 'mirrors'"),
            (&[("--name", "B")], "option 'name' is given twice"),
            (&[("mirror", "/a"), ("mirror1", "/b")], "option 'mirror' is given twice"),
            (&[("version", "1"), ("branch", "2")], "option 'version' is given twice"),
            (&[("size", "big")], "option 'size': 'big' is no size; write it as 20G or 512M"),
            (&[("ro", "maybe")], "option 'ro': 'maybe' is neither 1 nor 0"),
            (&[("fs", "fat")], "option 'fs': 'fat' is neither ext4 nor xfs"),
            (&[("prefetch", "some")], "option 'prefetch': 'some' is neither all, none nor learned"),
        ] {
            let told = of(&[&base[..], more].concat()).unwrap_err().to_string();
            assert!(told.starts_with(words), "{told}");
        }
        let relative = of(&[("name", "A"), ("access", "srv/repo")]).unwrap_err().to_string();
        assert_eq!(relative, "option 'access': 'srv/repo' is relative; the daemon needs the whole path");
        assert!(of(&[("name", "A")]).unwrap_err().to_string().starts_with("option 'access' is missing"));
        assert!(of(&[("access", "/r")]).unwrap_err().to_string().starts_with("option 'name' is missing"));
        assert!(
            of(&[("access", "/r"), ("name", "a/b")]).unwrap_err().to_string().contains("names no version")
        );
    }
}
