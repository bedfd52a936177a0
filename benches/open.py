"""What opening an image costs by its size: time to the first 4 KiB, memory, bytes read. Run through benches/open.sh.

In: release binaries. A small directory becomes a thin image of each size; a server with an empty state directory
is started on it, and a client reads one 4 KiB page. Time counts from starting the process to the answer. `read` is
/proc/PID/io's rchar when the answer came: the repository's objects, and the process's libraries and
/proc besides, so it is an upper bound. Out: a Markdown table.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time

import harness

SIZES = ["1G", "10G", "64G", "1T", "16T"]


def first_read(repo, name, state, sock, offset):
    import nbd

    start = time.monotonic()
    with harness.horcrux(repo, name, state, sock) as server:
        accepting = time.monotonic() - start
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{name}?socket={sock}")
        size = handle.get_size()
        if len(handle.pread(4096, offset)) != 4096:
            sys.exit("short read")
        answered = time.monotonic() - start
        figures = (accepting * 1e3, answered * 1e3, server.peak_rss_mib(), server.read_bytes() / 1024)
        # The far end of the device, where nothing is: it must answer as well, and cost nothing.
        handle.pread(4096, size - 4096)
        handle.shutdown()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, small sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64, help="data in the directory")
    parser.add_argument("--dir", help="where everything goes (default: the temporary directory)")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    sizes = SIZES[:2] if args.quick else SIZES
    work = tempfile.mkdtemp(dir=args.dir, prefix="bench.")
    try:
        measure(args, rounds, sizes, work)
    finally:
        shutil.rmtree(work)


def measure(args, rounds, sizes, work):
    facts = list(harness.machine(harness.first_line("/usr/bin/python3", "--version")))
    source = os.path.join(work, "source")
    harness.run(os.path.join(harness.ROOT, "tests", "tree.py"), "make", source, "--mb", str(args.mib))
    made = {}
    repos = {}
    for size in sizes:
        repos[size] = os.path.join(work, f"repo.{size}")
        seconds, peak = harness.measured(
            [harness.CLI, "image-from-dir", "--size", size, "thin", source, repos[size]])
        stored = int(harness.run("du", "-sk", repos[size]).split()[0]) / 1024
        made[size] = (seconds, peak, stored)
        harness.progress(f"{size}: made in {seconds:.1f} s")
    figures = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            state = harness.fresh(os.path.join(work, "state"))
            # Offset 4096 is the block group descriptors: data in every ext4.
            figures[size].append(first_read(repos[size], "thin", state, os.path.join(work, "s"), 4096))
    print("```")
    print(f"benches/open.sh --rounds {rounds} --mib {args.mib}")
    print("\n".join(facts))
    print("```\n")
    rows = []
    for size in sizes:
        accepting, answered, rss, read = zip(*figures[size])
        seconds, peak, stored = made[size]
        rows.append([size, harness.spread(accepting, "{:.0f}"), harness.spread(answered, "{:.0f}"),
                     harness.spread(rss, "{:.0f}"), harness.spread(read, "{:.0f}"), f"{seconds:.1f}", f"{peak:.0f}",
                     f"{stored:.0f}"])
    harness.table(["image", "accepts, ms", "first 4 KiB, ms", "peak RSS, MiB", "read, KiB", "made in, s",
                   "making's RSS, MiB", "repository, MiB"], rows)


main()
