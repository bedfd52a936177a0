//! The layers: a module imports only what is below it. Reads the sources; fails on an upward import and names it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each layer, and what it may import. From the bottom up; a layer is never in the list of one above it in this table.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("manual", &[]),
    ("format", &["units"]),
    ("durable", &["format", "units"]),
    ("lock", &["format", "units"]),
    ("store", &["lock", "durable", "format", "units"]),
    ("repo", &["store", "lock", "durable", "format", "units"]),
    // Makes images; knows no device.
    ("image", &["repo", "store", "lock", "durable", "format", "units"]),
    ("delta", &["lock", "durable", "format", "units"]),
    // Of `repo` it may use what IMPORTS_OF_ITEMS says.
    ("cache", &["repo", "lock", "durable", "format", "units"]),
    ("device", &["delta", "cache", "repo", "store", "lock", "durable", "format", "units"]),
    ("volume", &["device", "delta", "cache", "repo", "store", "lock", "durable", "format", "units"]),
    // Reads filesystems on devices and in versions.
    ("files", &["device", "repo", "format", "units"]),
    ("nbd", &["volume", "device", "delta", "cache", "repo", "store", "lock", "durable", "format", "units"]),
    ("kernel", &["units"]),
    (
        "host",
        &[
            "kernel", "nbd", "files", "volume", "device", "delta", "cache", "repo", "store", "lock",
            "durable", "format", "units",
        ],
    ),
    ("control", &["host", "kernel", "nbd", "files", "volume", "repo", "store", "cache", "format", "units"]),
];

/// Where a layer may use only some items of another.
const IMPORTS_OF_ITEMS: &[(&str, &str, &[&str])] = &[("cache", "repo", &["MetaCache"])];

/// The text of a source file without comments, strings, characters and what is under `#[cfg(test)]`.
fn code(source: &str) -> String {
    let stripped = without_comments_and_strings(source);
    let mut kept = String::with_capacity(stripped.len());
    let mut rest = stripped.as_str();
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = after_item(&rest[at..]);
    }
    kept + rest
}

fn without_comments_and_strings(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(next) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if next == '"' {
            string_len(rest)
        } else if rest.starts_with("r\"") || rest.starts_with("r#") {
            raw_string_len(rest).unwrap_or(0)
        } else if rest.starts_with("'\"'") || rest.starts_with("'{'") || rest.starts_with("'}'") {
            3
        } else if rest.starts_with("'\\") {
            rest[3..].find('\'').map_or(1, |end| end + 4)
        } else {
            0
        };
        if skip == 0 {
            kept.push(next);
            rest = &rest[next.len_utf8()..];
        } else {
            kept.push(' ');
            rest = &rest[skip..];
        }
    }
    kept
}

fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn raw_string_len(text: &str) -> Option<usize> {
    let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
    // Else it is an identifier such as r#type.
    text[1 + hashes..].starts_with('"').then_some(())?;
    let end = format!("\"{}", "#".repeat(hashes));
    let from = 2 + hashes;
    Some(text[from..].find(&end).map_or(text.len(), |at| from + at + end.len()))
}

/// What follows an item: after its closing brace, or after its semicolon if that comes before any brace.
fn after_item(text: &str) -> &str {
    let mut depth = 0;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b';' if depth == 0 => return &text[at + 1..],
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return &text[at + 1..];
                }
            }
            _ => {}
        }
    }
    ""
}

/// The paths below `crate::` in a text, groups taken apart: `crate::{a::{B, C}, d::E}` is `a::B`, `a::C`, `d::E`.
fn crate_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$';
        if at > 0 && is_word(code.as_bytes()[at - 1]) {
            continue;
        }
        expand(String::new(), &code[at + "crate::".len()..], &mut paths);
    }
    paths
}

/// Reads one path or group from the start of `text`; returns what follows it.
fn expand<'a>(prefix: String, text: &'a str, paths: &mut Vec<String>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut inside) = text.strip_prefix('{') {
        loop {
            inside = expand(prefix.clone(), inside, paths).trim_start();
            if let Some(after) = inside.strip_prefix(',') {
                inside = after;
            } else {
                return inside.strip_prefix('}').unwrap_or(inside);
            }
        }
    }
    let word = text.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte == b'*');
    let (name, after) = text.split_at(word.count());
    if let Some(below) = after.strip_prefix("::") {
        return expand(format!("{prefix}{name}::"), below, paths);
    }
    if !name.is_empty() {
        paths.push(format!("{prefix}{name}"));
    }
    // `as` and the name after it are of no interest.
    after.trim_start_matches(|c: char| c != ',' && c != '}' && c != ';' && c != '{')
}

/// What is wrong with the imports of one file of a layer.
fn violations(layer: &str, file: &Path, source: &str) -> Vec<String> {
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("{}: layer '{layer}' has no place in the table", file.display())];
    };
    let mut found = BTreeSet::new();
    for path in crate_paths(&code(source)) {
        let mut parts = path.split("::");
        let target = parts.next().unwrap_or_default();
        let home = if Path::new("src").join(target).is_dir() {
            format!("src/{target}/")
        } else {
            format!("src/{target}.rs")
        };
        let is_layer = LAYERS.iter().any(|(name, _)| *name == target);
        if target == layer || (!is_layer && !Path::new(home.trim_end_matches('/')).exists()) {
            // Itself, or an item of the crate's root.
            continue;
        }
        let item = parts.next().unwrap_or("*");
        let only = IMPORTS_OF_ITEMS.iter().find(|(from, to, _)| (*from, *to) == (layer, target));
        if !allowed.contains(&target) {
            found.insert(format!(
                "{} imports crate::{path} of {home}: '{layer}' may use {allowed:?}",
                file.display()
            ));
        } else if let Some((.., items)) = only
            && !items.contains(&item)
        {
            found.insert(format!(
                "{} imports crate::{path} of {home}: of it '{layer}' may use {items:?}",
                file.display()
            ));
        }
    }
    found.into_iter().collect()
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn sources() -> Vec<(String, PathBuf)> {
    let mut files = Vec::new();
    rust_files(Path::new("src"), &mut files);
    files.sort();
    let layer_of = |path: &PathBuf| {
        let first = path.components().nth(1).unwrap().as_os_str().to_str().unwrap();
        first.strip_suffix(".rs").unwrap_or(first).to_owned()
    };
    // The programs and the crate's root stand above everything.
    files
        .into_iter()
        .map(|path| (layer_of(&path), path))
        .filter(|(layer, _)| layer != "bin" && layer != "lib")
        .collect()
}

#[test]
fn every_module_imports_only_what_is_below_it() {
    let mut found = Vec::new();
    for (layer, file) in sources() {
        found.extend(violations(&layer, &file, &fs::read_to_string(&file).unwrap()));
    }
    assert!(found.is_empty(), "the layers are broken:\n{}", found.join("\n"));
}

#[test]
fn the_table_itself_has_no_circle_and_no_layer_that_is_not_there() {
    for (at, (layer, allowed)) in LAYERS.iter().enumerate() {
        for below in *allowed {
            let place = LAYERS.iter().position(|(name, _)| name == below);
            assert!(
                place.is_some_and(|place| place < at),
                "'{layer}' may use '{below}', which is not below it"
            );
        }
        let there =
            Path::new("src").join(layer).is_dir() || Path::new("src").join(format!("{layer}.rs")).exists();
        assert!(there, "'{layer}' is in the table and not in src/");
    }
}

#[test]
fn an_upward_import_is_found_in_every_way_it_can_be_written() {
    let file = Path::new("src/delta/new.rs");
    let of_delta = |source: &str| violations("delta", file, source);
    for source in [
        "use crate::cache::Cache;",
        "use crate::{units::ByteLen, cache::{Cache as Other}};",
        "use crate :: x; use crate::\n    repo::{\n    Version,\n};",
        "fn f(x: &crate::device::Device) {}",
        "pub(in crate::nbd) fn f() {}",
        "#[cfg(test)] mod tests { use crate::image::Sink; } use crate::volume::Volume;",
        "const QUOTE: char = '\"'; use crate::repo::Version; const OTHER: &str = \"\\\"\";",
        "use crate::cache as other;",
    ] {
        let found = of_delta(source);
        assert_eq!(found.len(), 1, "{source}: {found:?}");
        assert!(found[0].starts_with("src/delta/new.rs imports crate::"), "{found:?}");
        assert!(found[0].contains(" of src/"), "{found:?}");
    }
    for source in [
        "use crate::units::ByteLen; use crate::{format::CommitId, delta::Layer};",
        "// use crate::cache::Cache;\n/* crate::repo::Version */ /// [`crate::nbd::Server`]\n",
        "const TEXT: &str = \"crate::cache::Cache\"; const RAW: &str = r#\"crate::repo::x\"#;",
        "#[cfg(test)]\nmod tests {\n    use crate::cache::Cache;\n    fn f() { if true { } }\n}\n",
        "#[cfg(test)]\nuse crate::repo::Version;\n",
        "fn f<'a>(x: &'a str) -> &'a str { x }",
        "use other_crate::cache::Cache;",
    ] {
        assert_eq!(of_delta(source), Vec::<String>::new(), "{source}");
    }
    let cache = |source: &str| violations("cache", Path::new("src/cache/new.rs"), source).len();
    assert_eq!(cache("use crate::repo::MetaCache;"), 0);
    assert_eq!(cache("use crate::repo::{MetaCache, Version};"), 1);
    assert_eq!(cache("use crate::repo;"), 1);
    assert_eq!(cache("use crate::store::Store;"), 1);
    assert_eq!(violations("image", Path::new("src/image/new.rs"), "use crate::device::Device;").len(), 1);
    assert_eq!(violations("device", Path::new("src/device/new.rs"), "use crate::image::Sink;").len(), 1);
    assert_eq!(violations("new", Path::new("src/new.rs"), "").len(), 1, "a new module needs a place");
}

#[test]
fn the_protocol_depends_on_nothing_and_has_no_unsafe_code() {
    let manifest = fs::read_to_string("nbd-proto/Cargo.toml").unwrap();
    let mut section = "";
    for line in manifest.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with('[') {
            section = line;
            let below = section.contains("dependencies.");
            assert!(!below, "nbd-proto/Cargo.toml: {line}: the protocol depends on nothing");
        } else if section.contains("dependencies") && section != "[dev-dependencies]" {
            panic!("nbd-proto/Cargo.toml: {section} {line}: the protocol depends on nothing");
        }
    }
    let root = fs::read_to_string("nbd-proto/src/lib.rs").unwrap();
    assert!(
        code(&root).contains("#![forbid(unsafe_code)]"),
        "nbd-proto/src/lib.rs lost its forbid(unsafe_code)"
    );
}
