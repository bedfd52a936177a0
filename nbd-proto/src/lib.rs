//! The NBD protocol as a state machine: no sockets, no clock, no runtime, no dependencies.
#![forbid(unsafe_code)]
