"""The ways to start a database on an image that is in an object store far away.

Each `Starts` method brings up what serves the image, on the given exit stack, and returns what `Mount` takes. The
clock runs from its call on; what can be made before, once, is made in `prepare_*`.
"""

import os
import subprocess
import sys

import harness
from harness import Server
from rig import parts
from rig.parts import BUCKET, LIMIT_S, LONG_S

NAME = "pg"
RAW, PACKED = "raw.img", "raw.img.zst"


def helps(command, word):
    """Whether a program's help knows a word."""
    done = subprocess.run([*command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    return word in done.stdout


# Prefetch as horcrux's commands have it, all in one place.
def prefetch_flags(mode):
    return ["--prefetch", mode] if helps([harness.NBD, "serve"], "--prefetch") else []


def prefetch_known():
    return bool(prefetch_flags("learned")) and helps([harness.CLI], "prefetch")


def prefetch_learn(rig):
    """One start is listed, and what was learned from it goes to the repository, for hosts that have seen nothing."""
    state = harness.fresh(os.path.join(rig.work, "state.learn"))
    with rig.serve(rig.repo, NAME, state, "--prefetch", "none") as server:
        rig.first_answer({"uri": rig.uri(NAME, server.sock)})
    harness.run(harness.CLI, "prefetch", "push", "--state-dir", state, NAME, timeout=LIMIT_S)


class Starts:
    """`names` in the order of the table; `skipped` says why a row is empty."""

    def __init__(self, rig):
        self.rig = rig
        self.warm_state = None
        self.ways = {
            "horcrux, cold": self.cold,
            "horcrux, cold, learned prefetch": self.learned,
            "horcrux, warm": self.warm,
            "download, then nbdkit file": self.download,
            "download of zstd -3, then nbdkit file": self.download_packed,
            "qemu-nbd qcow2 over nbdkit curl": self.qemu,
            "s3backer": self.s3backer,
        }
        self.skipped = {}

    def prepare(self, names):
        """Makes what the ways need, for those that are asked for."""
        if "horcrux, cold, learned prefetch" in names:
            if prefetch_known():
                harness.progress("learning from one start")
                prefetch_learn(self.rig)
            else:
                self.skipped["horcrux, cold, learned prefetch"] = "this build has no `serve --prefetch` and no `horcrux-cli prefetch`"
        if {"download, then nbdkit file", "download of zstd -3, then nbdkit file", "qemu-nbd qcow2 over nbdkit curl", "s3backer"} & set(names):
            self.prepare_raw()
        if "s3backer" in names:
            reason = self.prepare_s3backer()
            if reason:
                self.skipped["s3backer"] = reason
        for name, reason in self.skipped.items():
            harness.progress(f"{name}: left out: {reason}")
        return [name for name in names if name not in self.skipped]

    def prepare_raw(self):
        """The very filesystem that horcrux serves, as a raw image, for everyone else."""
        rig = self.rig
        self.raw = os.path.join(rig.work, RAW)
        state = harness.fresh(os.path.join(rig.work, "state.raw"))
        with harness.horcrux(rig.near(rig.repo), NAME, state, rig.sock("raw"), "--read-only") as server:
            harness.run("nbdcopy", rig.uri(NAME, server.sock), self.raw, timeout=LONG_S)
        packed = os.path.join(rig.work, PACKED)
        harness.run("zstd", "-q", "-3", "-T0", "-f", self.raw, "-o", packed, timeout=LONG_S)
        rig.weed.put_file(self.raw, RAW)
        rig.weed.put_file(packed, PACKED)
        self.sizes = {"raw": os.path.getsize(self.raw), "zstd -3": os.path.getsize(packed)}
        os.unlink(packed)

    def cold(self, stack):
        self.warm_state = harness.fresh(os.path.join(self.rig.work, "state.cold"))
        return self.horcrux(stack, self.warm_state, *prefetch_flags("none"))

    def learned(self, stack):
        state = harness.fresh(os.path.join(self.rig.work, "state.learned"))
        return self.horcrux(stack, state, "--prefetch", "learned")

    def warm(self, stack):
        # What the cold start of this round left: cache and delta.
        return self.horcrux(stack, self.warm_state, *prefetch_flags("none"))

    def horcrux(self, stack, state, *flags):
        server = stack.enter_context(self.rig.serve(self.rig.repo, NAME, state, *flags))
        return {"uri": self.rig.uri(NAME, server.sock)}

    def download(self, stack):
        file = self.fresh_file()
        harness.run("curl", "-sS", "--fail", "-o", file, self.rig.far_object(RAW), timeout=LONG_S)
        return self.nbdkit_file(stack, file)

    def download_packed(self, stack):
        file = self.fresh_file()
        # Through a pipe: what has come is unpacked while the rest comes.
        harness.run("bash", "-c", 'set -o pipefail; curl -sS --fail "$1" | zstd -q -d --sparse -o "$2"', "bash",
                    self.rig.far_object(PACKED), file, timeout=LONG_S)
        return self.nbdkit_file(stack, file)

    def fresh_file(self):
        file = os.path.join(self.rig.work, "downloaded.raw")
        if os.path.exists(file):
            os.unlink(file)
        return file

    def nbdkit_file(self, stack, file):
        sock = self.rig.sock("file")
        stack.enter_context(Server(["nbdkit", "-f", "-U", sock, "file", file], sock))
        return {"uri": f"nbd+unix:///?socket={sock}"}

    def qemu(self, stack):
        rig = self.rig
        near, far = rig.sock("qemu"), rig.sock("curl")
        stack.enter_context(Server(["nbdkit", "-f", "-r", "-U", far, "curl", rig.far_object(RAW)], far))
        overlay = os.path.join(rig.work, "overlay.qcow2")
        harness.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"nbd+unix:///?socket={far}", overlay,
                    timeout=LIMIT_S)
        stack.enter_context(Server(["qemu-nbd", "-t", "-e", "8", "-f", "qcow2", "-k", near, overlay], near))
        return {"uri": f"nbd+unix:///?socket={near}"}

    def s3backer_mount(self, stack, address, *flags):
        work = self.rig.work
        access = os.path.join(work, "s3backer.key")
        with open(access, "w", opener=lambda path, how: os.open(path, how, 0o600)) as file:
            file.write(f"{parts.KEY}:{parts.SECRET}\n")
        at = os.path.join(work, "s3b")
        os.makedirs(at, exist_ok=True)
        size = os.path.getsize(self.raw)
        backer = parts.Process(
            ["s3backer", "-f", f"--accessFile={access}", f"--baseURL=http://{address}/",
             "--authVersion=aws4", "--blockSize=128k", f"--size={size >> 10}k", "--prefix=s3backer/", "--filename=disk",
             "--force", *flags, BUCKET, at],
            os.path.join(work, "s3backer.log"))
        stack.callback(backer.end)
        stack.callback(self.s3backer_leave, backer, at)
        disk = os.path.join(at, "disk")
        parts.wait_until("s3backer shows its file", lambda: backer.process.poll() is not None or parts.size_of(disk) > 0)
        if backer.process.poll() is not None:
            raise RuntimeError(f"s3backer does not start: {backer.said().strip().splitlines()[-1:]}")
        return disk

    def s3backer_leave(self, backer, at):
        # It writes what is dirty before it goes, and that must not count as the next one's.
        if parts.quietly("umount", at):
            backer.finish()

    def prepare_s3backer(self):
        """Fills it over the short way; why it can't be used, if so."""
        import contextlib

        try:
            with contextlib.ExitStack() as stack:
                disk = self.s3backer_mount(stack, f"127.0.0.1:{self.rig.weed.port}", "--blockCacheThreads=8")
                harness.run("dd", f"if={self.raw}", f"of={disk}", "bs=128k", "conv=notrunc,sparse", timeout=LONG_S)
        except (RuntimeError, SystemExit) as error:
            return str(error)
        return None

    def s3backer(self, stack):
        return {"file": self.s3backer_mount(stack, self.rig.line.address)}


def check(names, ways):
    for unknown in [name for name in names if name not in ways]:
        sys.exit(f"cold: no {unknown!r}; there are: {'; '.join(ways)}")
