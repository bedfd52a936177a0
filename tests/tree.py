#!/usr/bin/python3
"""Makes directory trees with everything a data directory can hold, and compares trees by all of it.

    tree.py make DIR [--mb N] [--seed N]    a tree of about N MiB; the same arguments give the same tree
    tree.py list DIR                        its manifest on stdout: one JSON object per entry, sorted by path
    tree.py check [--allow-extra] [--ignore FIELD,...] MANIFEST DIR
    tree.py compare [--allow-extra] [--ignore FIELD,...] A B

A manifest holds owner, mode, size, times to the nanosecond, hard link groups, link targets, device numbers, xattrs
(ACLs and capabilities among them) and a hash of the content. Directory sizes are a filesystem's own business and
`lost+found` at the top belongs to it, so neither is compared. A mostly-hole file must stay mostly holes.

`make` needs root for owners, devices, capabilities and trusted xattrs; what it has to leave out, it names.
"""

import argparse
import hashlib
import json
import os
import random
import socket
import stat
import struct
import sys

BASE_TIME_NS = 1_600_000_000_000_000_000
HOLE_SLACK = 128 * 1024
# A security module's label follows the mount; system.data is ext4's inline content; SGI_ACL_* is XFS's own form
# of the ACLs that are compared as system.posix_acl_*.
NOT_COMPARED = ("security.selinux", "system.data", "trusted.SGI_ACL_")


def kind(mode):
    for test, name in (
        (stat.S_ISREG, "file"), (stat.S_ISDIR, "dir"), (stat.S_ISLNK, "symlink"), (stat.S_ISFIFO, "fifo"),
        (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "char"), (stat.S_ISBLK, "block"),
    ):
        if test(mode):
            return name
    return f"type {mode:o}"


def digest(path):
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def xattrs(path):
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return {}
    return {
        name: os.getxattr(path, name, follow_symlinks=False).hex()
        for name in sorted(names) if not name.startswith(NOT_COMPARED)
    }


def entries(top):
    """Every entry below `top` (and `top` itself as `.`), sorted; paths are relative, bytes kept by surrogates."""
    paths = ["."]
    for base, dirs, files in os.walk(top, onerror=raise_it):
        relative = os.path.relpath(base, top)
        if relative == ".":
            relative = ""
            if "lost+found" in dirs:
                dirs.remove("lost+found")
        paths.extend(os.path.join(relative, name) for name in dirs + files)
    first_of_inode = {}
    for path in sorted(paths):
        full = os.path.join(top, path)
        st = os.lstat(full)
        entry = {
            "path": path, "type": kind(st.st_mode), "mode": f"{stat.S_IMODE(st.st_mode):04o}",
            "uid": st.st_uid, "gid": st.st_gid, "mtime_ns": st.st_mtime_ns, "xattrs": xattrs(full),
        }
        if entry["type"] == "file":
            entry["size"] = st.st_size
            entry["allocated"] = st.st_blocks * 512
            entry["sha256"] = digest(full)
        if entry["type"] == "symlink":
            entry["target"] = os.readlink(full)
        if entry["type"] in ("char", "block"):
            entry["device"] = [os.major(st.st_rdev), os.minor(st.st_rdev)]
        if entry["type"] != "dir":
            entry["nlink"] = st.st_nlink
            if st.st_nlink > 1:
                entry["same_as"] = first_of_inode.setdefault((st.st_dev, st.st_ino), path)
        yield entry


def raise_it(error):
    raise error


def show(path):
    return path.encode("utf-8", "backslashreplace").decode()


def compare(expected, actual, allow_extra, ignore):
    """Yields one sentence per difference."""
    expected = {entry["path"]: entry for entry in expected}
    seen = set()
    for entry in actual:
        path = entry["path"]
        seen.add(path)
        want = expected.get(path)
        if want is None:
            if not allow_extra:
                yield f"{show(path)}: not in the source"
            continue
        want, got = dict(want), dict(entry)
        want_allocated, got_allocated = want.pop("allocated", 0), got.pop("allocated", 0)
        for field in ignore | ({"mtime_ns"} if allow_extra and want["type"] == "dir" else set()):
            want.pop(field, None)
            got.pop(field, None)
        for field in sorted(want.keys() | got.keys()):
            if want.get(field) != got.get(field):
                yield f"{show(path)}: {field} is {got.get(field)!r}, the source has {want.get(field)!r}"
        if want_allocated + HOLE_SLACK < want.get("size", 0) // 2 and got_allocated > want["size"] // 2:
            yield f"{show(path)}: {got_allocated} bytes allocated, the source has {want_allocated}: holes were filled"
    for path in sorted(expected.keys() - seen):
        yield f"{show(path)}: missing"


def load(path):
    with open(path, encoding="ascii") as file:
        return [json.loads(line) for line in file]


class Maker:
    """Builds one tree. Everything derives from the seed, so the same seed gives the same tree."""

    def __init__(self, top, seed):
        self.top = os.fsencode(top)
        self.rng = random.Random(seed)
        self.left_out = {}
        self.words = [
            "".join(self.rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(self.rng.randint(2, 11)))
            for _ in range(2000)
        ]

    def path(self, name):
        full = os.path.join(self.top, os.fsencode(name))
        os.makedirs(os.path.dirname(full), exist_ok=True)
        return full

    def text(self, length):
        out = bytearray()
        while len(out) < length:
            out += " ".join(self.rng.choices(self.words, k=12)).encode() + b"\n"
        return bytes(out[:length])

    def file(self, name, data):
        full = self.path(name)
        with open(full, "wb") as file:
            file.write(data)
        return full

    def try_to(self, what, do):
        try:
            do()
        except (PermissionError, OSError) as error:
            self.left_out[what] = error.strerror

    def bulk(self, total):
        """Files as databases and applications have them: many small ones, a few big ones, mixed compressibility."""
        written = number = 0
        while written < total:
            number += 1
            length = min(int(self.rng.lognormvariate(9.5, 2.2)), 24 << 20, total - written + 1)
            shape = self.rng.random()
            if shape < 0.5:
                data = self.text(min(length, 1 << 16)) * (length // (1 << 16) + 1)
                data = data[:length]
            elif shape < 0.75:
                data = self.rng.randbytes(length)
            else:
                # Rows of a table: a counter, a few digits, padding.
                row = b"".join(
                    struct.pack("<QI", i, self.rng.getrandbits(16)) + b"\0" * 20
                    for i in range(min(length // 32 + 1, 4096))
                )
                data = (row * (length // len(row) + 1))[:length]
            self.file(f"data/{number % 37:02}/{number % 7}/f{number}", data)
            written += length

    def odd(self):
        """One of everything that tools forget."""
        long_name = "n" * 255
        self.file("odd/empty", b"")
        self.file("odd/one byte", b"x")
        self.file("odd/.hidden", b"dot\n")
        self.file("odd/" + long_name, b"longest name\n")
        self.file("odd/unicode-\u00e9\u4e2d\U0001f40e", b"unicode\n")
        self.file("odd/new\nline and \t tab", b"control\n")
        self.file("odd/ leading and trailing ", b"spaces\n")
        self.file("odd/-rf", b"dash\n")
        self.file("odd/back\\slash'quote\"", b"quotes\n")
        for edge in (4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1):
            self.file(f"odd/edge/{edge}", self.rng.randbytes(edge))
        os.makedirs(self.path("odd/empty dir/x/y/z"), exist_ok=True)
        os.makedirs(self.path("/".join(["odd/deep"] + ["d" * 20] * 40)), exist_ok=True)
        for i in range(1500):
            self.file(f"odd/many/{i}", f"{i}\n".encode())
        with open(self.path("odd/zeros"), "wb") as file:
            file.write(b"\0" * (3 << 20))
        # Sparse: a hole first, in the middle and last, and one far bigger than any scratch disk.
        with open(self.path("odd/sparse"), "wb") as file:
            for at in (1 << 20, 5 << 20, 50 << 20):
                file.seek(at)
                file.write(self.rng.randbytes(5000))
            file.truncate(64 << 20)
        with open(self.path("odd/all hole"), "wb") as file:
            file.truncate(1 << 30)
        os.symlink("one byte", self.path("odd/link"))
        os.symlink("/no/such/../place", self.path("odd/dangling"))
        os.symlink("s" * 1000, self.path("odd/long link"))
        os.symlink("t" * 59, self.path("odd/inline link"))
        os.symlink("t" * 60, self.path("odd/first link not inline"))
        os.symlink(".", self.path("odd/loop"))
        first = self.file("odd/hard/first", self.rng.randbytes(10_000))
        for i in range(5):
            os.link(first, self.path(f"odd/hard/again.{i}"))
        os.link(first, self.path("odd/elsewhere"))
        os.link(self.path("odd/dangling"), self.path("odd/hard link to a symlink"), follow_symlinks=False)
        os.mkfifo(self.path("odd/fifo"), 0o640)
        self.socket("odd/socket")
        # Nobody but root could read it back.
        if os.geteuid() == 0:
            os.chmod(self.file("odd/modes/0000", b"mode\n"), 0)
        for mode in (0o400, 0o644, 0o755, 0o777, 0o4755, 0o2755, 0o6711):
            os.chmod(self.file(f"odd/modes/{mode:04o}", b"mode\n"), mode)
        for mode in (0o700, 0o1777, 0o2775):
            os.makedirs(self.path(f"odd/modes/dir {mode:04o}"), exist_ok=True)
            os.chmod(self.path(f"odd/modes/dir {mode:04o}"), mode)
        self.attributes()
        self.privileged()

    def socket(self, name):
        def bind():
            sock = socket.socket(socket.AF_UNIX)
            # Relative, as the address holds 108 bytes at most.
            back = os.open(".", os.O_RDONLY)
            os.chdir(os.path.dirname(self.path(name)))
            try:
                sock.bind(os.path.basename(name))
            finally:
                os.fchdir(back)
                os.close(back)
                sock.close()
        self.try_to("a socket", bind)

    def attributes(self):
        marked = self.file("odd/xattr", b"attributes\n")
        self.try_to("user xattrs", lambda: os.setxattr(marked, "user.short", b"value"))
        self.try_to("user xattrs", lambda: os.setxattr(marked, "user.empty", b""))
        self.try_to("user xattrs", lambda: os.setxattr(marked, "user.binary", bytes(range(256))))
        self.try_to("user xattrs", lambda: os.setxattr(self.path("odd/empty dir"), "user.of.a.dir", b"dir"))
        bigger = self.file("odd/xattr bigger than an inode", b"")
        self.try_to("user xattrs", lambda: os.setxattr(bigger, "user.big", b"v" * 2000))
        # struct posix_acl_xattr: version 2; (tag, perm, id) of USER_OBJ, USER 1001, GROUP_OBJ, GROUP 1002, MASK, OTHER.
        acl = struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", tag, perm, who)
            for tag, perm, who in (
                (0x01, 6, 0xFFFFFFFF), (0x02, 4, 1001), (0x04, 4, 0xFFFFFFFF),
                (0x08, 5, 1002), (0x10, 7, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF),
            )
        )
        shared = self.file("odd/acl", b"acl\n")
        self.try_to("ACLs", lambda: os.setxattr(shared, "system.posix_acl_access", acl))
        os.makedirs(self.path("odd/acl dir"), exist_ok=True)
        self.try_to("ACLs", lambda: os.setxattr(self.path("odd/acl dir"), "system.posix_acl_default", acl))

    def privileged(self):
        owned = self.file("odd/owned", b"owner\n")
        far = self.file("odd/owned by a big id", b"owner\n")
        self.try_to("owners", lambda: os.chown(owned, 999, 998))
        self.try_to("owners", lambda: os.chown(far, 3_000_000_000, 70_000))
        self.try_to("owners", lambda: os.lchown(self.path("odd/link"), 123, 456))
        self.try_to("devices", lambda: os.mknod(self.path("odd/null"), stat.S_IFCHR | 0o666, os.makedev(1, 3)))
        self.try_to("devices", lambda: os.mknod(self.path("odd/loop0"), stat.S_IFBLK | 0o660, os.makedev(7, 0)))
        self.try_to("devices", lambda: os.mknod(self.path("odd/big"), stat.S_IFCHR | 0o600, os.makedev(300, 70_000)))
        able = self.file("odd/capability", b"#!/bin/true\n")
        os.chmod(able, 0o755)
        # struct vfs_cap_data, revision 2, effective: CAP_NET_BIND_SERVICE permitted.
        cap = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
        self.try_to("capabilities", lambda: os.setxattr(able, "security.capability", cap))
        self.try_to("trusted xattrs", lambda: os.setxattr(able, "trusted.kept", b"by root alone"))

    def times(self):
        """Sets every mtime, deepest first, so that a directory's is not moved again by its entries."""
        for base, dirs, files in os.walk(self.top, topdown=False):
            for name in sorted(files) + sorted(d for d in dirs if os.path.islink(os.path.join(base, d))):
                self.time(os.path.join(base, name))
            self.time(base)
        # What 32 bits of seconds can't hold, and what came before there was time.
        self.try_to("far times", lambda: os.utime(self.path("odd/one byte"), ns=(0, 5_000_000_000_123_456_789)))
        self.try_to("far times", lambda: os.utime(self.path("odd/.hidden"), ns=(0, -1_000_000_000)))
        self.time(self.path("odd"))

    def time(self, path):
        salt = int.from_bytes(hashlib.sha256(os.path.relpath(path, self.top)).digest()[:8], "big")
        at = BASE_TIME_NS + salt % 150_000_000_000_000_000
        os.utime(path, ns=(at, at), follow_symlinks=False)


def make(top, mb, seed):
    os.makedirs(top, exist_ok=True)
    if os.listdir(top):
        sys.exit(f"tree.py: {top} is not empty")
    os.umask(0o022)
    maker = Maker(top, seed)
    maker.bulk(mb << 20)
    maker.odd()
    maker.times()
    for what, why in maker.left_out.items():
        print(f"tree.py: left out {what}: {why}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make")
    one.add_argument("dir")
    one.add_argument("--mb", type=int, default=8)
    one.add_argument("--seed", type=int, default=1)
    commands.add_parser("list").add_argument("dir")
    for name in ("check", "compare"):
        one = commands.add_parser(name)
        one.add_argument("--allow-extra", action="store_true", help="entries the source lacks are fine")
        one.add_argument("--ignore", default="", help="fields not to compare, with commas")
        one.add_argument("source", help="a manifest" if name == "check" else "a directory")
        one.add_argument("dir")
    args = parser.parse_args()
    if args.command == "make":
        make(args.dir, args.mb, args.seed)
        return 0
    if args.command == "list":
        for entry in entries(args.dir):
            print(json.dumps(entry, sort_keys=True))
        return 0
    source = load(args.source) if args.command == "check" else list(entries(args.source))
    ignore = set(filter(None, args.ignore.split(",")))
    differences = list(compare(source, entries(args.dir), args.allow_extra, ignore))
    for line in differences[:50]:
        print("tree.py:", line)
    print(f"tree.py: {len(source)} entries compared, {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
