"""image-from-dir against `tar c DIR | zstd -3 -T2`, in turns. Run through benches/image.sh.

In: release binaries; a directory of one's own with --source, else one that is generated: 47,000 files in about 1.3 GiB,
sizes log-normal as in a data directory, a mix of text, table rows and incompressible bytes. Out: a Markdown table.
Each run makes its output afresh beside the source, on the same filesystem; the source is in the page cache.
`tar + sync` is tar with the durability that image-from-dir gives.
"""

import argparse
import os
import random
import shutil
import struct
import tempfile

import harness

FILES = 47_000
TOTAL = 1_300 << 20
POOL = 32 << 20


def pools(rng):
    """Text, rows and noise, each longer than a compressor's window: files are slices, so none repeats another."""
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 11))) for _ in range(20_000)]
    text = bytearray()
    while len(text) < POOL:
        text += " ".join(rng.choices(words, k=20_000)).encode() + b"\n"
    rows = bytearray()
    for i in range(POOL // 32):
        rows += struct.pack("<QIHH", i, rng.getrandbits(20), i % 7, 3) + b"open    \0\0\0\0\0\0\0\0"
    noise = rng.randbytes(POOL)
    return [memoryview(bytes(text)), memoryview(bytes(rows)), memoryview(noise)]


def generate(top, files, total):
    rng = random.Random(1)
    sources = pools(rng)
    sizes = [min(rng.lognormvariate(8.5, 1.9), 16 << 20) for _ in range(files)]
    scale = total / sum(sizes)
    for number, size in enumerate(sizes):
        size = int(size * scale)
        directory = os.path.join(top, f"{number % 61:02}", f"{number % 13:02}")
        os.makedirs(directory, exist_ok=True)
        source = sources[rng.choices((0, 1, 2), weights=(50, 25, 25))[0]]
        with open(os.path.join(directory, f"file.{number}"), "wb") as file:
            while size > 0:
                at = rng.randrange(POOL)
                piece = source[at:at + size]
                file.write(piece)
                size -= len(piece)


def size_of(path, measure):
    return sum(measure(os.lstat(os.path.join(base, name))) for base, _, names in os.walk(path) for name in names)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", help="a directory to image instead of a generated one")
    parser.add_argument("--dir", help="where everything goes (default: the temporary directory)")
    parser.add_argument("--size", default="20G", help="the image's --size")
    args = parser.parse_args()
    part = 10 if args.quick else 1
    rounds = 1 if args.quick else args.rounds
    work = tempfile.mkdtemp(dir=args.dir, prefix="bench.")
    try:
        measure(args, part, rounds, work)
    finally:
        shutil.rmtree(work)


def measure(args, part, rounds, work):
    facts = list(harness.machine(harness.first_line("tar", "--version"), harness.first_line("zstd", "--version")))
    source = args.source
    if not source:
        source = os.path.join(work, "source")
        harness.progress(f"generating {FILES // part} files, {TOTAL // part >> 20} MiB")
        generate(source, FILES // part, TOTAL // part)
    count = sum(len(names) for _, _, names in os.walk(source))
    total = size_of(source, lambda st: st.st_size)
    out = os.path.join(work, "out")
    tar = f'tar c -C "$0" . | zstd -q -{{level}} -T2 -o "$1/tar.zst" -f'
    contenders = {
        "image-from-dir": [harness.CLI, "image-from-dir", "--size", args.size, "bench", source, out],
        "tar \\| zstd -3 -T2": ["bash", "-o", "pipefail", "-c", tar.format(level=3), source, out],
        "tar \\| zstd -3 -T2, sync": [
            "bash", "-o", "pipefail", "-c", tar.format(level=3) + ' && sync "$1/tar.zst"', source, out],
    }
    seconds = {name: [] for name in contenders}
    rss = {name: [] for name in contenders}
    stored = {}
    # Once, unmeasured: the source comes into the page cache.
    harness.measured(contenders["tar \\| zstd -3 -T2"][:-1] + [harness.fresh(out)])
    for round_number in range(rounds):
        names = list(contenders)
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            harness.fresh(out)
            # What the last one left dirty must not be written back on this one's time.
            os.sync()
            took, peak = harness.measured(contenders[name])
            seconds[name].append(took)
            rss[name].append(peak)
            stored[name] = size_of(out, lambda st: st.st_blocks * 512)
            harness.progress(f"round {round_number + 1}: {name}: {took:.2f} s, {peak:.0f} MiB")
    print("```")
    print(f"benches/image.sh --rounds {rounds} --size {args.size}  ({count} files, {total / (1 << 20):.0f} MiB)")
    print("\n".join(facts))
    print("```\n")
    against = "tar \\| zstd -3 -T2"
    harness.table(["", "seconds", "times the speed of tar", "MiB/s read", "peak RSS, MiB", "stored, MiB"], [
        [name, harness.spread(seconds[name]),
         harness.spread([theirs / ours for ours, theirs in zip(seconds[name], seconds[against])]),
         f"{total / (1 << 20) / harness.median(seconds[name]):.0f}", harness.spread(rss[name], "{:.0f}"),
         f"{stored[name] / (1 << 20):.0f}"]
        for name in contenders
    ])


main()
