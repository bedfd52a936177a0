//! What the integration tests share: commands with a bound, the server under test as a guard, trees of
//! fixtures, a guest kernel. A test file says `mod support;`, so each binary has its own copy and uses a part.
//!
//! Invariant: nothing here outlives its test. Processes are ended by their own id, waits have a bound, temporary
//! directories remove themselves.
#![allow(dead_code)]

pub mod command;
pub mod server;
pub mod tools;
pub mod tree;
pub mod uml;
