//! Option data, parsed: pure functions from bytes to what a client asks.
//!
//! Source: "Option types". Invariant: `None` stands for data that must be answered `ERR_INVALID`; the lengths inside must
//! add up to the length outside, to the byte.

use crate::bytes::{Reader, string};
use crate::wire;

/// `INFO` and `GO`: an export, and which facts about it are wanted.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoQuery<'a> {
    pub name: &'a str,
    pub wants_name: bool,
    pub wants_description: bool,
    pub wants_block_size: bool,
}

pub(super) fn info(data: &[u8]) -> Option<InfoQuery<'_>> {
    let mut r = Reader::new(data);
    let name_len = r.u32()?;
    let name = string(r.bytes(usize::try_from(name_len).ok()?)?)?;
    let count = usize::from(r.u16()?);
    if r.rest().len() != 2 * count {
        return None;
    }
    let mut query = InfoQuery { name, wants_name: false, wants_description: false, wants_block_size: false };
    while let Some(wanted) = r.u16() {
        match wanted {
            wire::info::NAME => query.wants_name = true,
            wire::info::DESCRIPTION => query.wants_description = true,
            wire::info::BLOCK_SIZE => query.wants_block_size = true,
            // EXPORT is always sent; what is not understood must be ignored.
            _ => {}
        }
    }
    Some(query)
}

/// Why the data of a metadata option is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MetaError {
    Invalid,
    TooMany,
}

/// `LIST_META_CONTEXT` and `SET_META_CONTEXT`: an export, and queries for its contexts.
pub(super) fn meta(data: &[u8]) -> Result<(&str, Vec<String>), MetaError> {
    let mut r = Reader::new(data);
    let name = next_string(&mut r).ok_or(MetaError::Invalid)?;
    let count = r.u32().ok_or(MetaError::Invalid)?;
    if count > wire::MAX_META_QUERIES {
        return Err(MetaError::TooMany);
    }
    let mut queries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        queries.push(next_string(&mut r).ok_or(MetaError::Invalid)?.to_owned());
    }
    if r.is_empty() { Ok((name, queries)) } else { Err(MetaError::Invalid) }
}

fn next_string<'a>(r: &mut Reader<'a>) -> Option<&'a str> {
    let len = usize::try_from(r.u32()?).ok()?;
    string(r.bytes(len)?)
}

/// Whether a query of `LIST_META_CONTEXT` finds `context`: by its full name, or by its namespace with the colon.
pub(super) fn list_matches(query: &str, context: &str) -> bool {
    let is_namespace = query.find(':').is_some_and(|at| at + 1 == query.len());
    query == context || (is_namespace && context.starts_with(query))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut d = Vec::new();
        d.extend_from_slice(&(name.len() as u32).to_be_bytes());
        d.extend_from_slice(name.as_bytes());
        d.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for q in queries {
            d.extend_from_slice(&(q.len() as u32).to_be_bytes());
            d.extend_from_slice(q.as_bytes());
        }
        d
    }

    #[test]
    fn info_data_must_add_up_to_the_byte() {
        let good = b"\0\0\0\x02ab\0\x02\0\x03\0\x01";
        let q = info(good).unwrap();
        assert_eq!(
            (q.name, q.wants_block_size, q.wants_name, q.wants_description),
            ("ab", true, true, false)
        );
        for cut in 0..good.len() {
            assert!(info(&good[..cut]).is_none(), "cut at {cut}");
        }
        assert!(info(b"\0\0\0\x02ab\0\x02\0\x03\0\x01\0").is_none());
        assert!(info(b"\xff\xff\xff\xffab\0\0").is_none());
        assert!(info(b"\0\0\0\x02\xff\xfe\0\0").is_none(), "not UTF-8");
        assert!(info(b"\0\0\0\x02a\0\0\0").is_none(), "a NUL");
    }

    #[test]
    fn meta_data_must_add_up_to_the_byte() {
        let good = meta_data("vol", &["base:allocation", "x-horcrux:"]);
        let (name, queries) = meta(&good).unwrap();
        assert_eq!(name, "vol");
        assert_eq!(queries, ["base:allocation", "x-horcrux:"]);
        for cut in 0..good.len() {
            assert_eq!(meta(&good[..cut]), Err(MetaError::Invalid), "cut at {cut}");
        }
        let mut long = good;
        long.push(0);
        assert_eq!(meta(&long), Err(MetaError::Invalid));
    }

    #[test]
    fn a_count_of_queries_over_the_limit_is_refused_before_they_are_read() {
        let mut d = meta_data("v", &[]);
        let at = d.len() - 4;
        d[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(meta(&d), Err(MetaError::TooMany));
    }

    #[test]
    fn only_a_bare_namespace_is_a_wildcard() {
        assert!(list_matches("base:", "base:allocation"));
        assert!(list_matches("base:allocation", "base:allocation"));
        assert!(!list_matches("base:all", "base:allocation"));
        assert!(!list_matches("base", "base:allocation"));
        assert!(!list_matches("", "base:allocation"));
        assert!(!list_matches("x:y:", "x:y:z"));
    }
}
