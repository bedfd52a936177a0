//! Flag words: what an export can do, and what a request asks for.
//!
//! Enters: 16-bit words of the wire. Leaves: typed sets. Unknown bits are kept, so that a validator can refuse them.

macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $shift:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u16);

        impl $name {
            /// No flag.
            pub const NONE: $name = $name(0);
            $($(#[$bit_doc])* pub const $bit: $name = $name(1 << $shift);)*
            /// Every flag this crate knows.
            pub const KNOWN: $name = $name(0 $(| 1 << $shift)*);

            /// The bare word.
            #[inline]
            pub const fn bits(self) -> u16 {
                self.0
            }

            /// Whether all flags of `other` are set.
            #[inline]
            pub const fn contains(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether no flag is set.
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// The flags of both.
            #[inline]
            pub const fn with(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }

            /// The flags that are not in `other`.
            #[inline]
            pub const fn without(self, other: $name) -> $name {
                $name(self.0 & !other.0)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = $name;
            #[inline]
            fn bitor(self, other: $name) -> $name {
                self.with(other)
            }
        }
    };
}

flag_set! {
    /// What an export offers (`NBD_FLAG_*`, "Transmission flags").
    TransmissionFlags {
        /// Always set on the wire.
        HAS_FLAGS = 0,
        /// Writes are refused.
        READ_ONLY = 1,
        /// `FLUSH` works.
        SEND_FLUSH = 2,
        /// `FUA` works on every command that writes.
        SEND_FUA = 3,
        /// Seeking costs.
        ROTATIONAL = 4,
        /// `TRIM` works.
        SEND_TRIM = 5,
        /// `WRITE_ZEROES` works, with `NO_HOLE`.
        SEND_WRITE_ZEROES = 6,
        /// `DF` works on reads; only sent with structured replies or extended headers.
        SEND_DF = 7,
        /// A flush covers all connections.
        CAN_MULTI_CONN = 8,
        /// `CACHE` works.
        SEND_CACHE = 10,
        /// `FAST_ZERO` works on `WRITE_ZEROES`.
        SEND_FAST_ZERO = 11,
        /// `BLOCK_STATUS` takes a payload; only sent with extended headers and a context selected.
        BLOCK_STAT_PAYLOAD = 12,
    }
}

flag_set! {
    /// What a request asks for (`NBD_CMD_FLAG_*`, "Command flags").
    CommandFlags {
        /// Durable before the reply.
        FUA = 0,
        /// Zeroes that are allocated.
        NO_HOLE = 1,
        /// One content chunk at most.
        DF = 2,
        /// One extent per context.
        REQ_ONE = 3,
        /// Zero fast or fail fast.
        FAST_ZERO = 4,
        /// The header's length is that of a payload (extended headers only).
        PAYLOAD_LEN = 5,
    }
}
