//! The names of volumes: what Docker lets a volume be called.

use std::fmt;
use std::str::FromStr;

use super::VolumeError;

/// The longest name: it is a directory's.
const MAX_BYTES: usize = 128;

/// A volume's name: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, one plain segment of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = VolumeError;

    fn from_str(text: &str) -> Result<VolumeName, VolumeError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let why = if text.is_empty() {
            "it is empty"
        } else if text.len() > MAX_BYTES {
            "it is longer than 128 characters"
        } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            "it must start with a letter or digit"
        } else if !text.chars().all(plain) {
            "only A-Z a-z 0-9 . _ - are allowed"
        } else {
            return Ok(VolumeName(text.to_owned()));
        };
        Err(VolumeError::BadName { text: text.chars().take(MAX_BYTES).collect(), why })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_docker_allows() {
        for good in ["v1", "A", "0", "a..b", "x_y.z-1", &"n".repeat(128)] {
            assert_eq!(good.parse::<VolumeName>().unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", "it is empty"),
            ("../x", "it must start with a letter or digit"),
            (".hidden", "it must start with a letter or digit"),
            ("a/b", "only A-Z a-z 0-9 . _ - are allowed"),
            ("a b", "only A-Z a-z 0-9 . _ - are allowed"),
            (&"n".repeat(129), "it is longer than 128 characters"),
        ] {
            let told = bad.parse::<VolumeName>().unwrap_err().to_string();
            assert!(told.ends_with(why), "{told}");
        }
    }
}
