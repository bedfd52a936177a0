"""Cold starts over a long line: the time to a database's first answer, and throughput. Run through benches/cold.sh.

In: release binaries, root, SeaweedFS. A PostgreSQL data directory (pgbench, `--scale` 140 is 2.1 GiB) is imaged into a bucket; then, behind a line of
20 ms a round trip and 50 MB/s each way, each way to start the database on it is taken in turns: the clock runs from starting the first process (or the download)
until PostgreSQL, on a kernel mount of what is served, has answered three queries: one account by its key, the sum over all branches and over all tellers. Everyone
gets the same filesystem, and mounts it the same way: nbdfuse, a loop device, mount.
Out: Markdown tables of medians on stdout, progress on stderr, raw figures with --json.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import harness
from rig import parts, starts

CHUNK = 128 << 10
DEPTH = 32
# Random reads are measured on a line this many times as long too: there it is the line that they wait for, and not this machine's processors.
LONGER = 5
# What five rounds leave behind; with less, the object store has an internal error after a round or two.
DISK = 40e9


class Rig:
    """The store, the line to it, and what is in the bucket."""

    def __init__(self, args, work, stack):
        self.work = work
        self.args = args
        self.repo = "repo"
        self.weed = stack.enter_context(parts.Weed(work))
        self.line = stack.enter_context(parts.Line(work, self.weed.port, args.rtt_ms, args.mbytes_per_s))

    def near(self, prefix):
        """A repository by the short way."""
        return f"minio://127.0.0.1:{self.weed.port}/{parts.BUCKET}/{prefix}"

    def far(self, prefix):
        """The same repository by the long way."""
        return f"minio://{self.line.address}/{parts.BUCKET}/{prefix}"

    def far_object(self, key):
        return f"http://{self.line.address}/{parts.BUCKET}/{key}"

    def sock(self, name):
        return os.path.join(self.work, f"{name}.sock")

    def uri(self, name, sock):
        return f"nbd+unix:///{name}?socket={sock}"

    def serve(self, repo, name, state, *flags):
        return harness.horcrux(self.far(repo), name, state, self.sock("horcrux"), *flags)

    def image_database(self, *flags):
        data = parts.cluster(self.args.data or self.work, self.args.scale)
        used = int(harness.run("du", "-sk", data).split()[0]) >> 10
        # Room for the filesystem itself and for what the database writes while it runs.
        size = f"{used * 11 // 10 + 256}M"
        harness.run(harness.CLI, "image-from-dir", *flags, "--size", size, starts.NAME, data, self.near(self.repo), timeout=parts.LONG_S)
        account = self.args.scale * 100_000 // 2 + 1
        self.statements = [
            f"SELECT abalance FROM pgbench_accounts WHERE aid = {account}",
            "SELECT count(*), sum(bbalance) FROM pgbench_branches",
            "SELECT count(*), sum(tbalance) FROM pgbench_tellers",
        ]
        self.answers = ["0", f"{self.args.scale}|0", f"{self.args.scale * 10}|0"]
        return used, size

    def first_answer(self, served):
        """Mounts, starts the database, asks; the moment of the answer, and what had gone through the line by then."""
        with parts.Mount(self.work, **served) as mount:
            with parts.Postgres(mount.dir, self.work) as database:
                answers = database.first_answer(self.statements)
                answered, counts = time.monotonic(), self.line.count()
        if answers != self.answers:
            sys.exit(f"wrong answers: {answers}, not {self.answers}")
        return answered, counts

    def start(self, way):
        """(seconds to the first answer, MB that had come by then, requests)."""
        self.line.reset()
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            served = way(stack)
            answered, counts = self.first_answer(served)
        return answered - start, counts["down"] / 1e6, counts["requests"]


def measure_starts(args, rig):
    ways = starts.Starts(rig)
    names = args.starts.split(";") if args.starts else list(ways.ways)
    starts.check(names, ways.ways)
    if "horcrux, warm" in names and "horcrux, cold" not in names:
        sys.exit("cold: 'horcrux, warm' goes on with what 'horcrux, cold' left; ask for both")
    names = ways.prepare(names)
    figures = {name: [] for name in names}
    for number in range(args.rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        if "horcrux, warm" in order:
            # It is the second start of what was cold in this round.
            order.remove("horcrux, warm")
            order.insert(order.index("horcrux, cold") + 1, "horcrux, warm")
        for name in order:
            figures[name].append(rig.start(ways.ways[name]))
            seconds, down, requests = figures[name][-1]
            harness.progress(f"round {number + 1}: {name}: {seconds:.2f} s, {down:.1f} MB, {requests} requests")
    return ways, figures


# What the throughput images hold: name, and how a 4 KiB page of them is made.
PAGES = {
    "noise": lambda rng: rng.randbytes(4096),
    # About a fifteenth of its size when compressed, as a new pgbench table.
    "text": lambda rng: rng.randbytes(256) * 16,
}


def measure_throughput(args, rig):
    """Per kind of data: rows of (seconds, bytes, requests, peak RSS or None)."""
    size = args.noise_mib << 20
    figures = {}
    for kind, page in PAGES.items():
        rng = random.Random(kind)
        raw = os.path.join(rig.work, f"{kind}.raw")
        with open(raw, "wb") as file:
            for _ in range(size >> 12):
                file.write(page(rng))
        harness.run(harness.CLI, "image-from-file", kind, raw, rig.near(f"repo-{kind}"), timeout=parts.LONG_S)
        stored = rig.weed.stored(f"repo-{kind}/images/{kind}/blocks/") / (size // CHUNK)
        figures[kind] = {"stored": stored, "upload": [], "sequential": [], "random": [], "near": [], "curl": [], "random, long": [], "curl, long": []}
    for number in range(args.rounds):
        for kind in PAGES:
            if not args.reads_only:
                figures[kind]["upload"].append(upload(rig, kind, number))
                figures[kind]["sequential"].append(sequential(rig, kind))
            figures[kind]["random"].append(random_reads(rig, kind, size))
            figures[kind]["near"].append(random_reads(rig, kind, size, rig.near))
            figures[kind]["curl"].append(ranges_by_curl(rig, kind, size, int(figures[kind]["stored"])))
            with rig.line.longer(LONGER * args.rtt_ms, args.rtt_ms):
                figures[kind]["random, long"].append(random_reads(rig, kind, size))
                figures[kind]["curl, long"].append(ranges_by_curl(rig, kind, size, int(figures[kind]["stored"])))
            harness.progress(f"round {number + 1}: {kind}: " + ", ".join(
                f"{what} {of[-1][0]:.2f} s" for what, of in figures[kind].items() if what != "stored" and of))
    return figures


def upload(rig, kind, number):
    rig.line.reset()
    # A repository of its own each time: what is stored already would not be sent.
    command = [harness.CLI, "image-from-file", kind, os.path.join(rig.work, f"{kind}.raw"), rig.far(f"up-{kind}-{number}")]
    seconds, peak = harness.measured(command)
    counts = rig.line.count()
    return seconds, counts["up"], counts["requests"], peak


def nothing_to_write_back():
    """What was uploaded before must not take the processors of what is measured now."""
    os.sync()


@contextlib.contextmanager
def served(rig, kind, way, name=None):
    name = name or kind
    state = harness.fresh(os.path.join(rig.work, f"state.{kind}"))
    nothing_to_write_back()
    flags = starts.prefetch_flags("none")
    with harness.horcrux(way(f"repo-{kind}"), name, state, rig.sock("horcrux"), *flags) as server:
        rig.line.reset()
        yield rig.uri(name, server.sock), server
    shutil.rmtree(state)


def sequential(rig, kind):
    with served(rig, kind, rig.far) as (uri, server):
        start = time.monotonic()
        harness.run("nbdcopy", uri, "null:", timeout=parts.LONG_S)
        seconds = time.monotonic() - start
        counts = rig.line.count()
        return seconds, counts["down"], counts["requests"], server.peak_rss_mib()


def random_reads(rig, kind, size, way=None, chunk_len=CHUNK, name=None):
    """Reads of 4 KiB, each in a chunk of its own, of every other chunk in a random order."""
    chunks = random.sample(range(size // chunk_len), size // chunk_len // 2)
    # fio draws offsets again where they are aligned to more than is read, so it is told them.
    script = os.path.join(rig.work, "reads.iolog")
    with open(script, "w") as file:
        file.write("fio version 2 iolog\nnbd add\nnbd open\n")
        file.writelines(f"nbd read {chunk * chunk_len + chunk % (chunk_len >> 12) * 4096} 4096\n" for chunk in chunks)
    with served(rig, kind, way or rig.far, name) as (uri, server):
        out = subprocess.run(
            ["fio", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--iodepth={DEPTH}", f"--read_iolog={script}",
             "--replay_no_stall=1", f"--size={size}", "--output-format=json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=rig.work, text=True, timeout=parts.LONG_S)
        counts = rig.line.count()
        if out.returncode != 0:
            sys.exit(f"fio: exit {out.returncode}\n{out.stdout}\n{out.stderr}")
        job = json.loads(out.stdout[out.stdout.index("{"):])["jobs"][0]
        if job["error"] or job["read"]["total_ios"] != len(chunks):
            sys.exit(f"fio: error {job['error']} after {job['read']['total_ios']} of {len(chunks)} reads\n{out.stderr}")
        # It counts what it sent, and does not wait for the last of it.
        answered = len(chunks) - (DEPTH - 1)
        return job["read"]["runtime"] / 1e3, answered, counts["requests"], server.peak_rss_mib()


def ranges_by_curl(rig, kind, size, length):
    """As many ranges as `random_reads` reads, each as long as a stored chunk, by curl, DEPTH at a time: what line, store and machine allow."""
    objects = rig.weed.objects(f"repo-{kind}/images/{kind}/blocks/")
    reads = size // CHUNK // 2
    script = os.path.join(rig.work, "ranges.curl")
    with open(script, "w") as file:
        for number in range(reads):
            key, stored = random.choice(objects)
            at = random.randrange(stored - length)
            file.write(f'{"next" if number else ""}\nurl = "{rig.far_object(key)}"\nrange = "{at}-{at + length - 1}"\noutput = "/dev/null"\nfail\n')
    nothing_to_write_back()
    rig.line.reset()
    start = time.monotonic()
    harness.run("curl", "-sS", "--parallel", "--parallel-immediate", "--parallel-max", str(DEPTH), "--config", script, timeout=parts.LONG_S)
    seconds, counts = time.monotonic() - start, rig.line.count()
    if counts["down"] < reads * length:
        sys.exit(f"curl fetched {counts['down']} bytes, not {reads * length}")
    return seconds, reads


def measure_chunks(args, rig):
    """Per chunk length: what is stored, starts as (seconds, MB, requests), random reads as (seconds, reads, ...)."""
    lens = [text.strip() for text in args.chunks.split(",")]
    kinds = ("horcrux, cold", "horcrux, cold, learned prefetch")
    size = args.noise_mib << 20
    raw = os.path.join(rig.work, "chunks.raw")
    with open(raw, "wb") as file:
        for _ in range(args.noise_mib):
            file.write(random.randbytes(1 << 20))
    ways, figures = {}, {}
    for text in lens:
        rig.repo = f"chunks-{text}"
        rig.image_database("--chunk-len", text)
        harness.run(harness.CLI, "image-from-file", "--chunk-len", text, "noise", raw, rig.near(f"repo-noise-{text}"), timeout=parts.LONG_S)
        ways[text] = starts.Starts(rig)
        ways[text].prepare(list(kinds))
        stored = rig.weed.stored(f"{rig.repo}/images/{starts.NAME}/blocks/")
        figures[text] = {"stored": stored, **{kind: [] for kind in kinds}, "random": []}
    for number in range(args.rounds):
        turn = number % len(lens)
        for text in lens[turn:] + lens[:turn]:
            rig.repo = f"chunks-{text}"
            for kind in kinds:
                figures[text][kind].append(rig.start(ways[text].ways[kind]))
            chunk_len = int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
            figures[text]["random"].append(random_reads(rig, f"noise-{text}", size, chunk_len=chunk_len, name="noise"))
            harness.progress(f"round {number + 1}: {text}: " + ", ".join(f"{figures[text][kind][-1][0]:.2f} s" for kind in kinds))
    return figures


def report_chunks(args, figures):
    print(f"\nMedian of {args.rounds} (range). Stored: the database's image. Seconds and MB to its first answer; 4 KiB reads at QD{DEPTH} of {args.noise_mib} MiB of noise.\n")
    rows = []
    for text, of in figures.items():
        row = [text, f"{of['stored'] / 1e6:.0f}"]
        for kind in ("horcrux, cold", "horcrux, cold, learned prefetch"):
            seconds, down, requests = zip(*of[kind])
            row += [harness.spread(seconds), harness.spread(down, "{:.1f}"), harness.spread(requests, "{:.0f}")]
        seconds, reads, *_ = zip(*of["random"])
        rows.append(row + [harness.spread([n / s for s, n in zip(seconds, reads)], "{:.0f}")])
    harness.table(["chunk", "stored, MB", "cold, s", "MB", "requests", "learned, s", "MB", "requests", "cold 4k reads, IOPS"], rows)


def report_starts(args, ways, figures, image):
    used, size = image
    print(f"\nData directory {used} MiB, image {size}" + "".join(
        f", {what} {bytes_ / 1e6:.0f} MB" for what, bytes_ in getattr(ways, "sizes", {}).items())
        + f". Median of {args.rounds} (range). MB down and requests through the line until the answer.\n")
    against = "download, then nbdkit file"
    rows = []
    for name in ways.ways:
        if name in ways.skipped:
            rows.append([name, f"not run: {ways.skipped[name]}", "", "", ""])
        if name not in figures:
            continue
        seconds, down, requests = zip(*figures[name])
        times = "?"
        if against in figures:
            times = harness.spread([theirs[0] / ours for theirs, ours in zip(figures[against], seconds)])
        rows.append([name, harness.spread(seconds), times, harness.spread(down, "{:.1f}"), harness.spread(requests, "{:.0f}")])
    harness.table(["start", "first answer, s", "times as fast as the download", "MB", "requests"], rows)


def report_throughput(args, figures):
    rate = args.mbytes_per_s * 1e6
    rows = []
    for kind, of in figures.items():
        for what, label in (("upload", "image-from-file"), ("sequential", "nbdcopy, cold")):
            if not of[what]:
                continue
            seconds, moved, requests, peak = zip(*of[what])
            speeds = [args.noise_mib * 1.048576 / s for s in seconds]
            share = [100 * m / s / rate for m, s in zip(moved, seconds)]
            rows.append([f"{label}, {kind}", harness.spread(speeds, "{:.1f}") + " MB/s", f"{args.mbytes_per_s:g} MB/s of line",
                         harness.spread(share, "{:.0f}"), harness.spread(requests, "{:.0f}"), harness.spread(peak, "{:.0f}")])
        for what, rtt_ms in (("random", args.rtt_ms), ("random, long", LONGER * args.rtt_ms)):
            seconds, reads, requests, peak = zip(*of[what])
            by_latency = DEPTH / (rtt_ms / 1e3)
            bound = min(by_latency, rate / of["stored"])
            speeds = [n / s for n, s in zip(reads, seconds)]
            rows.append([f"randread 4k QD{DEPTH}, cold, {rtt_ms:g} ms, {kind}", harness.spread(speeds, "{:.0f}") + " IOPS",
                         f"{bound:.0f} IOPS: min({by_latency:.0f}, {rate / of['stored']:.0f})",
                         harness.spread([100 * s / bound for s in speeds], "{:.0f}"),
                         harness.spread([r / (n + DEPTH - 1) for r, n in zip(requests, reads)], "{:.2f}") + " a read",
                         harness.spread(peak, "{:.0f}")])
    stored = "; ".join(f"{kind} {of['stored'] / 1024:.1f} KiB" for kind, of in figures.items())
    print(f"\n{args.noise_mib} MiB of data that does not compress (noise) and of data that does (text). Stored for each chunk of 128 KiB: {stored}.")
    print(f"MB/s are of the disk; % of the line is what went through it by time. Random reads: {args.noise_mib * 4}, each in a chunk of its own, so")
    print(f"each must fetch; the bound is min({DEPTH} / round trip, line / stored bytes of a chunk).")
    near = {kind: harness.spread([n / s for s, n, *_ in of["near"]], "{:.0f}") for kind, of in figures.items()}
    print("It leaves out what this machine does for each, server and object store on the same cores: without the line the same reads reach "
          + "; ".join(f"{kind} {iops} IOPS" for kind, iops in near.items()) + ".")
    for suffix, rtt_ms in (("", args.rtt_ms), (", long", LONGER * args.rtt_ms)):
        told = []
        for kind, of in figures.items():
            ours, theirs = ([n / s for s, n, *_ in of[what + suffix]] for what in ("random", "curl"))
            shares = harness.spread([100 * our / their for our, their in zip(ours, theirs)], "{:.0f}")
            told.append(f"{kind} {harness.spread(theirs, '{:.0f}')} a second, of which the random reads reach {shares}%")
        print(f"At {rtt_ms:g} ms curl, which checks and signs nothing, fetches as many ranges of that length, {DEPTH} at a time, at " + "; ".join(told) + ".")
    print()
    harness.table(["what", "speed", "bound", "% of it", "requests", "peak RSS, MiB"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="other defaults: scale 10, one round, 64 MiB: for development")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--scale", type=int, help="pgbench's; default: 140, which is 2.1 GiB")
    parser.add_argument("--rtt-ms", type=float, default=20)
    parser.add_argument("--mbytes-per-s", type=float, default=50)
    parser.add_argument("--noise-mib", type=int, help="of each of the two throughput images; default: 1024")
    parser.add_argument("--starts", help="a list with semicolons; default: all; none: throughput only")
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--reads-only", action="store_true", help="of the throughput only the random reads, which take three minutes")
    parser.add_argument("--chunks", metavar="LENS", help="compare lengths of chunks instead, as 64K,128K,1M")
    parser.add_argument("--data", help="a directory where the database is kept for the next run")
    parser.add_argument("--dir", help="where everything else goes (default: the temporary directory)")
    parser.add_argument("--json", help="a file for the raw figures")
    args = parser.parse_args()
    defaults = (10, 1, 64) if args.quick else (140, 5, 1024)
    args.scale, args.rounds, args.noise_mib = (
        given or default for given, default in zip((args.scale, args.rounds, args.noise_mib), defaults))
    lacking = list(parts.missing())
    if lacking:
        sys.exit("\n".join(f"cold: {line}" for line in lacking))
    free = shutil.disk_usage(args.dir or tempfile.gettempdir()).free
    if not args.quick and free < DISK:
        sys.exit(f"cold: {free / 1e9:.0f} GB are free in {args.dir or tempfile.gettempdir()}, {DISK / 1e9:.0f} are needed; --dir names another place")
    # So that everything is taken down on SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(AWS_ACCESS_KEY_ID=parts.KEY, AWS_SECRET_ACCESS_KEY=parts.SECRET, AWS_EC2_METADATA_DISABLED="true",
                      AWS_CONFIG_FILE="/dev/null", AWS_SHARED_CREDENTIALS_FILE="/dev/null")
    if args.data:
        os.makedirs(args.data, exist_ok=True)
    work = tempfile.mkdtemp(dir=args.dir, prefix="bench.")
    # The database's owner must find its way in.
    os.chmod(work, 0o711)
    try:
        with contextlib.ExitStack() as stack:
            measure(args, work, stack)
    finally:
        # Never into what is mounted: that would be deleting from the disk, or from the bucket.
        left = [path for path in (os.path.join(work, name) for name in ("mnt", "fuse", "s3b")) if os.path.ismount(path)]
        if left:
            sys.exit(f"cold: still mounted: {' '.join(left)}; {work} is left")
        shutil.rmtree(work)


def measure(args, work, stack):
    facts = list(harness.machine(
        f"SeaweedFS {harness.first_line(parts.WEED, 'version').split()[2]}",
        harness.first_line(os.path.join(parts.postgres_dir(), "postgres"), "--version"),
        harness.first_line("nbdkit", "--version"), harness.first_line("qemu-nbd", "--version"),
        harness.first_line("nbdfuse", "--version"), harness.first_line("fio", "--version"),
    ))
    rig = Rig(args, work, stack)
    raw = {"facts": facts}
    print("```")
    print(f"benches/cold.sh --rounds {args.rounds} --scale {args.scale} --rtt-ms {args.rtt_ms:g} --mbytes-per-s {args.mbytes_per_s:g}"
          f" --noise-mib {args.noise_mib}" + (" --reads-only" if args.reads_only else "") + (f" --chunks {args.chunks}" if args.chunks else ""))
    print("\n".join(facts))
    print("```", flush=True)
    if args.chunks:
        raw["chunks"] = measure_chunks(args, rig)
        report_chunks(args, raw["chunks"])
    elif args.starts != "none":
        image = rig.image_database()
        harness.progress(f"{image[0]} MiB of data, imaged")
        ways, figures = measure_starts(args, rig)
        report_starts(args, ways, figures, image)
        raw["starts"], raw["skipped"] = figures, ways.skipped
    if not args.no_throughput and not args.chunks:
        figures = measure_throughput(args, rig)
        report_throughput(args, figures)
        raw["throughput"] = figures
    if args.json:
        with open(args.json, "w") as file:
            json.dump(raw, file, indent=1)


main()
