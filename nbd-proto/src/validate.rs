//! Judges a request by the facts of its export: one pure function, so that no command can forget a check.
//!
//! Source: "Block size constraints", "Command flags", "Request types" and "Error values".

use crate::command::{Command, Request};
use crate::errno::Errno;
use crate::export::ExportFacts;
use crate::flags::{CommandFlags, TransmissionFlags};
use crate::mode::HeaderMode;
use crate::status::StatusQuery;

/// Whether `request` may run on the export, or the error it is answered with.
///
/// A payload must be moved (or drained) whatever comes out. The payload form of `BLOCK_STATUS` is judged twice: here by its
/// header, and again after [`StatusQuery::apply`] by its length. `DISC` always passes: there is no reply to refuse it with.
#[inline]
pub fn validate(request: &Request, facts: &ExportFacts) -> Result<(), Errno> {
    // The common case first: a plain read or write inside the export.
    check_flags(request, facts)?;
    match request.command {
        Command::Disc => Ok(()),
        Command::Flush => check_flush(request, facts),
        Command::Unknown(_) => Err(Errno::Inval),
        _ => check_range(request, facts),
    }
}

/// The flags a command takes under what was negotiated. FUA is accepted on every command once advertised, because clients
/// are known to set it anywhere.
#[inline]
fn check_flags(request: &Request, facts: &ExportFacts) -> Result<(), Errno> {
    if request.flags.is_empty() {
        return Ok(());
    }
    let offered = |flag: TransmissionFlags| facts.flags.contains(flag);
    let mut allowed = CommandFlags::NONE;
    if offered(TransmissionFlags::SEND_FUA) {
        allowed = allowed | CommandFlags::FUA;
    }
    match request.command {
        Command::Read if offered(TransmissionFlags::SEND_DF) => allowed = allowed | CommandFlags::DF,
        Command::Write if facts.mode == HeaderMode::Extended => allowed = allowed | CommandFlags::PAYLOAD_LEN,
        Command::WriteZeroes => {
            allowed = allowed | CommandFlags::NO_HOLE;
            if offered(TransmissionFlags::SEND_FAST_ZERO) {
                allowed = allowed | CommandFlags::FAST_ZERO;
            }
        }
        Command::BlockStatus => {
            allowed = allowed | CommandFlags::REQ_ONE;
            if offered(TransmissionFlags::BLOCK_STAT_PAYLOAD) {
                allowed = allowed | CommandFlags::PAYLOAD_LEN;
            }
        }
        Command::Disc => return Ok(()),
        _ => {}
    }
    if request.flags.without(allowed).is_empty() { Ok(()) } else { Err(Errno::Inval) }
}

fn check_flush(request: &Request, facts: &ExportFacts) -> Result<(), Errno> {
    // Offset and length are reserved and must be zero.
    if !facts.flags.contains(TransmissionFlags::SEND_FLUSH) || request.offset != 0 || request.length != 0 {
        return Err(Errno::Inval);
    }
    Ok(())
}

#[inline]
fn check_range(request: &Request, facts: &ExportFacts) -> Result<(), Errno> {
    let command = request.command;
    let offered = match command {
        Command::Read | Command::Write => TransmissionFlags::NONE,
        Command::Trim => TransmissionFlags::SEND_TRIM,
        Command::WriteZeroes => TransmissionFlags::SEND_WRITE_ZEROES,
        Command::Cache => TransmissionFlags::SEND_CACHE,
        _ => TransmissionFlags::NONE,
    };
    // Read-only comes before "not offered": a read-only export need not offer TRIM, and EPERM says why.
    if command.is_write() && facts.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Errno::Perm);
    }
    if !facts.flags.contains(offered) {
        return Err(Errno::Inval);
    }
    if command == Command::BlockStatus {
        if !facts.has_contexts || !facts.mode.has_chunks() {
            return Err(Errno::Inval);
        }
        if request.is_status_payload() {
            return if StatusQuery::fits(request.payload) { Ok(()) } else { Err(Errno::Inval) };
        }
    }
    // A length of zero is "unspecified"; nothing sensible can come of it.
    if request.length == 0 {
        return Err(Errno::Inval);
    }
    let minimum = u64::from(facts.block_sizes.minimum());
    if (request.offset | request.length) & (minimum - 1) != 0 {
        return Err(Errno::Inval);
    }
    let maximum = u64::from(facts.block_sizes.maximum());
    match command {
        Command::Read if request.flags.contains(CommandFlags::DF) && request.length > facts.df_limit => {
            return Err(Errno::Overflow);
        }
        Command::Read | Command::Write if request.length > maximum => return Err(Errno::Inval),
        _ => {}
    }
    let inside = request.offset.checked_add(request.length).is_some_and(|end| end <= facts.size);
    if !inside {
        let full = matches!(command, Command::Write | Command::WriteZeroes);
        return Err(if full { Errno::NoSpc } else { Errno::Inval });
    }
    if request.flags.contains(CommandFlags::FAST_ZERO) {
        let no_hole = request.flags.contains(CommandFlags::NO_HOLE);
        if !(if no_hole { facts.fast_zero_no_hole } else { facts.fast_zero }) {
            return Err(Errno::NotSup);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::BlockSizes;

    const SIZE: u64 = 1 << 30;

    fn facts() -> ExportFacts {
        ExportFacts {
            size: SIZE,
            flags: TransmissionFlags::KNOWN
                .without(TransmissionFlags::READ_ONLY)
                .without(TransmissionFlags::ROTATIONAL),
            block_sizes: BlockSizes::new(512, 4096, 1 << 20).unwrap(),
            mode: HeaderMode::Extended,
            has_contexts: true,
            df_limit: 65_536,
            fast_zero: true,
            fast_zero_no_hole: false,
        }
    }

    fn request(command: Command, offset: u64, length: u64, flags: CommandFlags) -> Request {
        let payload = if command == Command::Write { length as u32 } else { 0 };
        Request { cookie: 1, offset, length, payload, flags, command }
    }

    fn judge(command: Command, offset: u64, length: u64, flags: CommandFlags) -> Result<(), Errno> {
        validate(&request(command, offset, length, flags), &facts())
    }

    const RANGED: [Command; 6] = [
        Command::Read,
        Command::Write,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ];

    #[test]
    fn requests_inside_the_export_pass_up_to_its_last_byte() {
        for c in RANGED {
            assert_eq!(judge(c, 0, 512, CommandFlags::NONE), Ok(()), "{c:?}");
            assert_eq!(judge(c, SIZE - 512, 512, CommandFlags::NONE), Ok(()), "{c:?}");
        }
    }

    #[test]
    fn past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
        for c in RANGED {
            let expected =
                if matches!(c, Command::Write | Command::WriteZeroes) { Errno::NoSpc } else { Errno::Inval };
            assert_eq!(judge(c, SIZE, 512, CommandFlags::NONE), Err(expected), "{c:?}");
            assert_eq!(judge(c, SIZE - 512, 1024, CommandFlags::NONE), Err(expected), "{c:?}");
            assert_eq!(judge(c, u64::MAX - 511, 1024, CommandFlags::NONE), Err(expected), "{c:?} wraps");
        }
    }

    #[test]
    fn zero_and_unaligned_lengths_are_einval() {
        for c in RANGED {
            assert_eq!(judge(c, 0, 0, CommandFlags::NONE), Err(Errno::Inval), "{c:?}");
            assert_eq!(judge(c, 1, 512, CommandFlags::NONE), Err(Errno::Inval), "{c:?}");
            assert_eq!(judge(c, 512, 513, CommandFlags::NONE), Err(Errno::Inval), "{c:?}");
        }
    }

    #[test]
    fn only_reads_and_writes_are_bound_by_the_maximum_block_size() {
        for c in RANGED {
            let expected =
                if matches!(c, Command::Read | Command::Write) { Err(Errno::Inval) } else { Ok(()) };
            assert_eq!(judge(c, 0, 1 << 21, CommandFlags::NONE), expected, "{c:?}");
        }
    }

    #[test]
    fn a_read_only_export_answers_eperm_even_where_trim_is_not_offered() {
        let mut facts = facts();
        facts.flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
        for c in [Command::Write, Command::Trim, Command::WriteZeroes] {
            assert_eq!(validate(&request(c, 0, 512, CommandFlags::NONE), &facts), Err(Errno::Perm), "{c:?}");
        }
        assert_eq!(validate(&request(Command::Read, 0, 512, CommandFlags::NONE), &facts), Ok(()));
    }

    #[test]
    fn a_command_that_was_not_offered_is_einval() {
        let mut facts = facts();
        facts.flags = TransmissionFlags::HAS_FLAGS;
        facts.has_contexts = false;
        for c in [Command::Trim, Command::WriteZeroes, Command::Cache, Command::BlockStatus] {
            assert_eq!(validate(&request(c, 0, 512, CommandFlags::NONE), &facts), Err(Errno::Inval), "{c:?}");
        }
        assert_eq!(validate(&request(Command::Flush, 0, 0, CommandFlags::NONE), &facts), Err(Errno::Inval));
        let fua = request(Command::Write, 0, 512, CommandFlags::FUA);
        assert_eq!(validate(&fua, &facts), Err(Errno::Inval));
    }

    #[test]
    fn flush_takes_no_range_and_disc_is_never_refused() {
        assert_eq!(judge(Command::Flush, 0, 0, CommandFlags::NONE), Ok(()));
        assert_eq!(judge(Command::Flush, 0, 0, CommandFlags::FUA), Ok(()));
        assert_eq!(judge(Command::Flush, 512, 0, CommandFlags::NONE), Err(Errno::Inval));
        assert_eq!(judge(Command::Flush, 0, 512, CommandFlags::NONE), Err(Errno::Inval));
        assert_eq!(judge(Command::Disc, 7, 7, CommandFlags(0xffff)), Ok(()));
        assert_eq!(judge(Command::Unknown(99), 0, 512, CommandFlags::NONE), Err(Errno::Inval));
    }

    #[test]
    fn each_flag_is_accepted_only_where_the_specification_allows_it() {
        let allowed = |c: Command, bit: u16| match 1 << bit {
            0x01 => true,
            0x02 | 0x10 => c == Command::WriteZeroes,
            0x04 => c == Command::Read,
            0x08 => c == Command::BlockStatus,
            0x20 => c == Command::Write || c == Command::BlockStatus,
            _ => false,
        };
        for c in RANGED {
            for bit in 0..16 {
                let mut r = request(c, 0, 512, CommandFlags(1 << bit));
                if r.is_status_payload() {
                    (r.length, r.payload) = (0, 12);
                }
                let expected = if allowed(c, bit) { Ok(()) } else { Err(Errno::Inval) };
                assert_eq!(validate(&r, &facts()), expected, "{c:?} with bit {bit}");
            }
        }
    }

    #[test]
    fn payload_len_is_einval_without_extended_headers() {
        let mut facts = facts();
        facts.mode = HeaderMode::Structured;
        facts.flags = facts.flags.without(TransmissionFlags::BLOCK_STAT_PAYLOAD);
        for c in RANGED {
            let r = request(c, 0, 512, CommandFlags::PAYLOAD_LEN);
            assert_eq!(validate(&r, &facts), Err(Errno::Inval), "{c:?}");
        }
    }

    #[test]
    fn a_df_read_too_long_for_one_chunk_is_eoverflow() {
        assert_eq!(judge(Command::Read, 0, 65_536, CommandFlags::DF), Ok(()));
        assert_eq!(judge(Command::Read, 0, 65_536 + 512, CommandFlags::DF), Err(Errno::Overflow));
        assert_eq!(judge(Command::Read, 0, 65_536 + 512, CommandFlags::NONE), Ok(()));
    }

    #[test]
    fn a_fast_zero_that_would_be_slow_is_enotsup() {
        let fast = CommandFlags::FAST_ZERO;
        assert_eq!(judge(Command::WriteZeroes, 0, 512, fast), Ok(()));
        assert_eq!(judge(Command::WriteZeroes, 0, 512, fast | CommandFlags::NO_HOLE), Err(Errno::NotSup));
        assert_eq!(judge(Command::WriteZeroes, 0, 512, CommandFlags::NO_HOLE), Ok(()));
    }

    #[test]
    fn a_status_payload_is_judged_by_its_size_and_then_by_its_length() {
        let mut r = request(Command::BlockStatus, 512, 0, CommandFlags::PAYLOAD_LEN);
        for (payload, expected) in
            [(12, Ok(())), (8, Ok(())), (7, Err(Errno::Inval)), (1 << 20, Err(Errno::Inval))]
        {
            r.payload = payload;
            assert_eq!(validate(&r, &facts()), expected, "payload of {payload}");
        }
        let query = StatusQuery { length: SIZE, ids: vec![1] };
        assert_eq!(validate(&query.apply(&r), &facts()), Err(Errno::Inval));
        let query = StatusQuery { length: SIZE - 512, ids: vec![1] };
        assert_eq!(validate(&query.apply(&r), &facts()), Ok(()));
    }
}
