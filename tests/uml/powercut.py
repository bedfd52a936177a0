"""Writes files that are checkable after a power cut, and checks them.

    powercut.py write MOUNT OUT ROUND SECONDS   appends `name seed length` to OUT/flushed after each fsync returned
    powercut.py check MOUNT FLUSHED             every line of FLUSHED must be a file with that content

A file's bytes follow from its seed and length, so the report is small. Files are rewritten in place too: a later
line of the same name replaces an earlier one, and a rewrite that was not flushed may show either version of a
4 KiB page, so every file is announced in OUT/started before it is touched: only announced-but-unflushed names
are exempt from the comparison (and must still be readable).
"""

import hashlib
import os
import random
import sys
import time


def content(seed, length):
    return random.Random(seed).randbytes(length)


def report(fd, line):
    os.write(fd, line.encode() + b"\n")
    # hostfs passes this to the host: the report survives the guest.
    os.fsync(fd)


def is_short_of_room(mount):
    found = os.statvfs(mount)
    return found.f_bavail * 8 < found.f_blocks


def write(mount, out, round_number, seconds):
    base = os.path.join(mount, f"round.{round_number}")
    os.makedirs(base, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    started = os.open(os.path.join(out, "started"), flags, 0o644)
    flushed = os.open(os.path.join(out, "flushed"), flags, 0o644)
    rng = random.Random(round_number)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        count += 1
        # One in three rewrites an earlier file in place; sizes straddle page and block edges.
        lengths = [1, 100, 4095, 4096, 4097, 65536, 100_000, 1_000_000]
        again = rng.random() < 0.33
        # A fast machine fills the filesystem in some rounds; from here on only small files are rewritten.
        if is_short_of_room(mount):
            again, lengths = True, lengths[:5]
        number = rng.randrange(count) if again else count
        length = rng.choice(lengths)
        seed = f"{round_number}.{count}"
        name = f"round.{round_number}/{number:06}"
        report(started, f"{name} {seed} {length}")
        fd = os.open(os.path.join(mount, name), os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(fd, length)
        data = content(seed, length)
        at = 0
        while at < length:
            at += os.pwrite(fd, data[at:], at)
        os.fsync(fd)
        os.close(fd)
        dir_fd = os.open(base, os.O_RDONLY)
        os.fsync(dir_fd)
        os.close(dir_fd)
        report(flushed, f"{name} {seed} {length}")
        if count == 3:
            # From here on the power may go at any moment.
            open(os.path.join(out, "writing"), "w").close()


def lines(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        # A torn last line was not reported: its newline is missing.
        return [line.split() for line in file if line.endswith("\n")]


def check(mount, flushed_path):
    flushed = {}
    for name, seed, length in lines(flushed_path):
        flushed[name] = (seed, int(length))
    last_started = {}
    for name, seed, length in lines(os.path.join(os.path.dirname(flushed_path), "started")):
        last_started[name] = (seed, int(length))
    wrong = []
    compared = 0
    for name, (seed, length) in sorted(flushed.items()):
        in_flight = last_started.get(name) != (seed, length)
        try:
            with open(os.path.join(mount, name), "rb") as file:
                data = file.read()
        except OSError as error:
            wrong.append(f"{name}: {error}")
            continue
        if in_flight:
            continue
        compared += 1
        expected = content(seed, length)
        if data != expected:
            at = next((i for i, (a, b) in enumerate(zip(data, expected)) if a != b), min(len(data), length))
            digest = hashlib.sha256(data).hexdigest()[:16]
            wrong.append(f"{name}: {len(data)} bytes of {length}, differs at {at} (sha256 {digest})")
    print(f"powercut: {compared} flushed files compared, {len(flushed) - compared} in flight, {len(wrong)} wrong")
    for line in wrong[:20]:
        print("powercut: WRONG", line)
    if compared == 0:
        print("powercut: nothing was compared")
    return 1 if wrong or compared == 0 else 0


if sys.argv[1] == "write":
    write(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
else:
    sys.exit(check(sys.argv[2], sys.argv[3]))
