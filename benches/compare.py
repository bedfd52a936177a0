"""fio against horcrux-nbd and its rivals, in turns. Run through benches/compare.sh.

In: release binaries. Out: a Markdown table of medians and ratios on stdout, progress on stderr, raw figures with
--json. Every server gets the same incompressible data over a Unix socket, one connection, and is started afresh in
every round; the reads come first, so that they meet the image and not what the writes left.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile

import harness
from harness import Server

NAME = "bench"
JOBS = {
    "randread 4k QD1": ("randread", "4k", 1),
    "randread 4k QD32": ("randread", "4k", 32),
    "read 1M QD8": ("read", "1M", 8),
    "randwrite 4k QD32": ("randwrite", "4k", 32),
}
BASELINE = "nbdkit file+cow"
CEILING = "nbdkit null"
EXAMPLE = os.path.join(harness.RELEASE, "examples", "nbd_crate_server")


class Rig:
    """The data in every form a server wants it, and how to start each server."""

    def __init__(self, work, size):
        self.work = work
        self.size = size
        self.raw = os.path.join(work, "data.raw")
        self.repo = os.path.join(work, "repo")
        rng = random.Random(1)
        with open(self.raw, "wb") as file:
            for _ in range(size >> 20):
                file.write(rng.randbytes(1 << 20))
        self.starts = {
            "horcrux-nbd": self.horcrux,
            "nbdkit file": lambda sock: self.nbdkit(sock, "file", self.copy("file")),
            BASELINE: lambda sock: self.nbdkit(sock, "--filter=cow", "file", self.raw),
            "qemu-nbd qcow2": self.qemu,
            "nbd crate": lambda sock: Server([EXAMPLE, self.copy("crate"), sock], sock),
            "nbdkit memory": lambda sock: self.nbdkit(sock, "memory", str(size)),
            CEILING: lambda sock: self.nbdkit(sock, "null", str(size)),
        }

    def start(self, name):
        return self.starts[name](self.sock(name))

    def sock(self, name):
        return os.path.join(self.work, f"{list(self.starts).index(name)}.sock")

    def copy(self, whose):
        """A file of its own for a rival that writes in place."""
        path = os.path.join(self.work, f"{whose}.raw")
        if not os.path.exists(path):
            shutil.copyfile(self.raw, path)
        return path

    def nbdkit(self, sock, *args):
        return Server(["nbdkit", "-f", "-U", sock, "-e", NAME, *args], sock, {"TMPDIR": self.work})

    def qemu(self, sock):
        overlay = os.path.join(self.work, "overlay.qcow2")
        harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.raw, "-F", "raw", overlay)
        return Server(["qemu-nbd", "-t", "-f", "qcow2", "-x", NAME, "-k", sock, overlay], sock)

    def horcrux(self, sock):
        if not os.path.exists(self.repo):
            harness.run(harness.CLI, "image-from-file", NAME, self.raw, self.repo)
        return harness.horcrux(self.repo, NAME, harness.fresh(os.path.join(self.work, "state")), sock)

    def uri(self, name):
        return f"nbd+unix:///{NAME}?socket={self.sock(name)}"

    def warm(self, server):
        """Reads the whole export once: page cache and product cache are warm, and memory holds the data."""
        if server == "nbdkit memory":
            harness.run("nbdcopy", self.raw, self.uri(server))
        elif server == "nbd crate":
            # Its handshake has no OPT_GO, which nbdcopy wants; it reads a file that was just written.
            pass
        else:
            harness.run("nbdcopy", "--allocated", self.uri(server), "null:")

    def fio(self, server, job, seconds):
        rw, block, depth = JOBS[job]
        out = subprocess.run(
            ["fio", "--name=b", "--ioengine=nbd", f"--uri={self.uri(server)}", f"--rw={rw}", f"--bs={block}",
             f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--randrepeat=0", "--norandommap",
             f"--size={self.size}", "--refill_buffers=0", "--output-format=json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.work, text=True,
        )
        if out.returncode != 0:
            sys.exit(f"fio {job}: exit {out.returncode}\n{out.stdout}\n{out.stderr}")
        # fio may put a warning before its JSON.
        result = json.loads(out.stdout[out.stdout.index("{"):])["jobs"][0]
        if result["error"]:
            sys.exit(f"fio {job}: error {result['error']}\n{out.stderr}")
        side = result["write" if "write" in rw else "read"]
        return side["bw_bytes"] / 1e6 if block == "1M" else side["iops"] / 1e3

    def kept(self):
        """Writes random pages, flushes, kills the server with SIGKILL, serves again: are they all there?"""
        import nbd

        name = "horcrux-nbd"
        state = os.path.join(self.work, "state")
        rng = random.Random(2)
        pages = {at: rng.randbytes(4096) for at in rng.sample(range(self.size // 4096), 4000)}
        with self.start(name) as server:
            handle = nbd.NBD()
            handle.connect_uri(self.uri(name))
            for at, data in pages.items():
                handle.pwrite(data, at * 4096)
            handle.flush()
            server.kill()
        with harness.horcrux(self.repo, NAME, state, self.sock(name)):
            handle = nbd.NBD()
            handle.connect_uri(self.uri(name))
            lost = sum(bytes(handle.pread(4096, at * 4096)) != data for at, data in pages.items())
            handle.shutdown()
        return len(pages), lost


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of a second each, for development")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--servers", help="a list with commas; default: all")
    parser.add_argument("--jobs", help="a list with commas; default: all")
    parser.add_argument("--dir", help="where the data goes (default: the temporary directory)")
    parser.add_argument("--json", help="a file for the raw figures")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 1
    work = tempfile.mkdtemp(dir=args.dir, prefix="bench.")
    try:
        measure(args, work)
    finally:
        shutil.rmtree(work)


def measure(args, work):
    facts = list(harness.machine(
        harness.first_line("fio", "--version"), harness.first_line("nbdkit", "--version"),
        harness.first_line("qemu-nbd", "--version"), "nbd crate 0.3",
    ))
    harness.progress(f"{args.size_mib} MiB of data in {work}")
    rig = Rig(work, args.size_mib << 20)
    servers = args.servers.split(",") if args.servers else list(rig.starts)
    jobs = args.jobs.split(",") if args.jobs else list(JOBS)
    for unknown in [s for s in servers if s not in rig.starts] + [j for j in jobs if j not in JOBS]:
        sys.exit(f"compare: no {unknown!r}; servers: {', '.join(rig.starts)}; jobs: {', '.join(JOBS)}")
    figures = {server: {job: [] for job in jobs} for server in servers}
    peak = {server: 0 for server in servers}
    anonymous = {server: 0 for server in servers}
    for round_number in range(args.rounds):
        # In turns, and each round begins with another: a drifting machine hits all alike. All are up, one is busy.
        turn = round_number % len(servers)
        order = servers[turn:] + servers[:turn]
        with contextlib.ExitStack() as stack:
            up = {}
            for name in order:
                up[name] = stack.enter_context(rig.start(name))
                rig.warm(name)
            for job in jobs:
                for name in order:
                    # What one left for the disk to write is not to slow the next.
                    os.sync()
                    figures[name][job].append(rig.fio(name, job, args.seconds))
                harness.progress(f"round {round_number + 1}: {job}: " + ", ".join(
                    f"{name} {figures[name][job][-1]:.1f}" for name in servers))
            for name in order:
                peak[name] = max(peak[name], up[name].peak_rss_mib())
                anonymous[name] = max(anonymous[name], up[name].anonymous_mib())
    report(args, facts, servers, jobs, figures, peak, anonymous)
    if "horcrux-nbd" in servers:
        pages, lost = rig.kept()
        print(f"\nAfter FLUSH and kill -9 of horcrux-nbd, {pages - lost} of {pages} random pages were there again.")
        if lost:
            sys.exit(1)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"facts": facts, "figures": figures, "peak_rss_mib": peak, "anonymous_mib": anonymous}, file, indent=1)


def report(args, facts, servers, jobs, figures, peak, anonymous):
    print("```")
    print(f"benches/compare.sh --rounds {args.rounds} --seconds {args.seconds} --size-mib {args.size_mib}")
    print("\n".join(facts))
    print("```")
    print(f"\nMedian of {args.rounds} (range). 4k: thousands of IOPS; 1M: MB/s. One connection, Unix socket.\n")
    harness.table(["server", *jobs, "peak RSS, MiB", "anonymous at the end, MiB"], [
        [name, *(harness.spread(figures[name][job], "{:.0f}" if "1M" in job else "{:.1f}") for job in jobs),
         f"{peak[name]:.0f}", f"{anonymous[name]:.0f}"]
        for name in servers
    ])
    for against in (BASELINE, "nbdkit file", CEILING):
        if against not in servers:
            continue
        # The ratio within each round, then the median: what drifts between rounds cancels.
        print(f"\nAs a multiple of {against}:\n")
        harness.table(["server", *jobs], [
            [name, *(harness.spread([ours / theirs for ours, theirs in zip(figures[name][job], figures[against][job])])
                     for job in jobs)]
            for name in servers if name != against
        ])


main()
