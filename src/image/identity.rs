//! The identity of a filesystem, derived instead of drawn: the same image name gives the same bytes.
//!
//! Enters: the image's name. Leaves: a UUID and a directory hash seed. Two images of different names differ in both.

/// A filesystem's UUID and the seed of its directory hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uuid: [u8; 16],
    pub(crate) hash_seed: [u8; 16],
}

impl Identity {
    pub(crate) fn of(image_name: &str) -> Identity {
        Identity {
            uuid: uuid(blake3::derive_key("horcrux 2026 filesystem uuid", image_name.as_bytes())),
            hash_seed: uuid(blake3::derive_key(
                "horcrux 2026 ext4 directory hash seed",
                image_name.as_bytes(),
            )),
        }
    }
}

/// The first half of a hash, marked as a UUID of version 8 (RFC 9562: of the maker's own making).
fn uuid(hash: [u8; 32]) -> [u8; 16] {
    let (&first, _) = hash.split_first_chunk::<16>().expect("16 is less than 32");
    let mut uuid = first;
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// A UUID in the form the tools take: `8-4-4-4-12`.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_depends_on_the_name_alone() {
        assert_eq!(Identity::of("AMCC"), Identity::of("AMCC"));
        assert_ne!(Identity::of("AMCC").uuid, Identity::of("AMCD").uuid);
        assert_ne!(Identity::of("AMCC").uuid, Identity::of("AMCC").hash_seed);
        let text = uuid_text(&Identity::of("AMCC").uuid);
        assert_eq!((text.len(), text.as_bytes()[14]), (36, b'8'));
    }
}
