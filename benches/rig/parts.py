"""The parts of the cold-start bench: an object store, a line to it, a kernel mount, a database.

Each is a context manager around processes of its own, which it ends by their ids; every wait has an end.
"""

import contextlib
import glob
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import harness

WEED = os.path.join(harness.ROOT, "target", "tools", "bin", "weed")
PROXY = os.path.join(harness.RELEASE, "examples", "fault_proxy")
CLUSTER = os.path.join(harness.ROOT, "tests", "uml", "postgres-cluster.sh")
KEY, SECRET = "BENCHKEY", "bench-secret"
BUCKET = "volumes"
LIMIT_S = 120
# Filling and downloading gigabytes.
LONG_S = 3600

# What must be installed: a command or file, and the Debian package that has it.
NEEDS = {
    "nbdfuse": "libnbd-bin", "nbdcopy": "libnbd-bin", "nbdkit": "nbdkit", "fio": "fio", "qemu-nbd": "qemu-utils",
    "qemu-img": "qemu-utils", "losetup": "mount", "mount": "mount", "setpriv": "util-linux",
    "psql": "postgresql-client", "pgbench": "postgresql", "curl": "curl", "zstd": "zstd", "/usr/bin/time": "time",
    "s3backer": "s3backer",
}


def wait_until(what, is_so, limit=LIMIT_S, pause=0.005):
    deadline = time.monotonic() + limit
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {limit} s")
        time.sleep(pause)


def postgres_dir():
    found = glob.glob("/usr/lib/postgresql/*/bin/postgres")
    return os.path.dirname(max(found, key=lambda path: int(path.split("/")[4]))) if found else None


def missing():
    """What this bench can't run without and is not here, as lines."""
    for name, package in NEEDS.items():
        if not (os.path.exists(name) if name[0] == "/" else shutil.which(name)):
            yield f"{name} is not installed: apt-get install {package}"
    if not postgres_dir():
        yield "no PostgreSQL server is installed: apt-get install postgresql"
    if not os.path.exists(WEED):
        yield "SeaweedFS is not here: tests/object_stores.sh fetches it"
    for name in (harness.NBD, harness.CLI, PROXY):
        if not os.path.exists(name):
            yield f"{name} is not built: benches/cold.sh builds it"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            yield f"{device} is not here: this machine can't mount an export"
    if os.geteuid() != 0:
        yield "root is needed to mount"


def free_port():
    """A port nobody has, nor the one 10,000 above, where SeaweedFS speaks gRPC."""
    while True:
        port = random.randrange(10_000, 22_000)
        try:
            for one in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
            return port
        except OSError:
            continue


class Process:
    """A process that is ended by its id, whatever happens."""

    def __init__(self, command, log, **options):
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command, **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, **options})

    def said(self):
        with open(self.log, errors="replace") as file:
            return file.read()[-2000:]

    def must_run(self):
        if self.process.poll() is not None:
            sys.exit(f"{self.process.args}: ended\n{self.said()}")

    def end(self, how=signal.SIGTERM, limit=LIMIT_S):
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def finish(self):
        """For who ends by itself when unmounted: it may still have to write."""
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Weed(Process):
    """SeaweedFS with one bucket, which takes signed requests from horcrux and unsigned ones from all else."""

    def __init__(self, work):
        identities = [
            {"name": "h", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}, {"name": "anonymous"},
        ]
        for identity in identities:
            identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        config = os.path.join(work, "s3.json")
        with open(config, "w") as file:
            json.dump({"identities": identities}, file)
        data = harness.fresh(os.path.join(work, "weed"))
        master, volume, filer, self.port = (free_port() for _ in range(4))
        super().__init__(
            [WEED, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", "-volume.max=200",
             "-master.volumeSizeLimitMB=1024", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
             f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={self.port}",
             f"-s3.config={config}",
             # Else every range is cut out of 4 MiB read from its disk, and what is measured is its processor time: it shares this machine.
             "-filer.maxMB=1", "-s3.cacheCapacityMB=512"],
            os.path.join(work, "weed.log"), cwd=work)
        try:
            wait_until("SeaweedFS takes an object", self.takes, pause=0.2)
        except BaseException:
            self.end()
            raise

    def takes(self):
        self.must_run()
        # The bucket may be there from the last try.
        self.request("PUT", BUCKET)
        return self.request("PUT", f"{BUCKET}/ready", b"x") is not None

    def request(self, method, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data=body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
                return answer.read()
        except OSError:
            return None

    def put_file(self, path, key):
        harness.run("curl", "-sS", "--fail", "-T", path, f"http://127.0.0.1:{self.port}/{BUCKET}/{key}", timeout=LONG_S)

    def stored(self, prefix):
        """Bytes of the objects below a prefix."""
        return sum(size for _, size in self.objects(prefix))

    def objects(self, prefix):
        """(key, bytes) of the objects below a prefix."""
        found, after = [], ""
        while True:
            listing = self.request("GET", f"{BUCKET}?list-type=2&prefix={prefix}&start-after={after}")
            if listing is None:
                sys.exit(f"SeaweedFS does not list {prefix}")
            listing = listing.decode()
            keys = re.findall(r"<Key>([^<]*)</Key>", listing)
            found += zip(keys, map(int, re.findall(r"<Size>(\d+)</Size>", listing)), strict=True)
            if "<IsTruncated>true" not in listing:
                return found
            after = keys[-1]

    def end(self, how=signal.SIGKILL, limit=LIMIT_S):
        # Nothing of it is kept, and SIGTERM takes it long.
        super().end(how, limit)


class Line(Process):
    """The fault proxy before the object store."""

    def __init__(self, work, port, rtt_ms, mbytes_per_s):
        log = os.path.join(work, "proxy.log")
        super().__init__(
            [PROXY, "--http", "--to", f"127.0.0.1:{port}", "--rtt-ms", str(rtt_ms), "--mbytes-per-s", str(mbytes_per_s)],
            log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.address = self.answer()

    def answer(self):
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            sys.exit("the proxy does not answer")
        line = self.process.stdout.readline().strip()
        if not line:
            self.process.wait(LIMIT_S)
            self.must_run()
        return line

    def say(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def count(self):
        return json.loads(self.say("count"))

    def reset(self):
        self.say("reset")

    @contextlib.contextmanager
    def longer(self, rtt_ms, usual_ms):
        """Another round trip for a while."""
        self.say(f"rtt {rtt_ms}")
        try:
            yield
        finally:
            self.say(f"rtt {usual_ms}")


class Mount:
    """A kernel mount of an NBD export, or of a file that holds a filesystem; no nbd.ko is needed."""

    def __init__(self, work, uri=None, file=None):
        self.work, self.uri, self.file = work, uri, file
        self.dir = os.path.join(work, "mnt")
        self.fuse = self.loop = None

    def __enter__(self):
        try:
            self.attach()
        except BaseException:
            self.detach()
            raise
        return self

    def attach(self):
        os.makedirs(self.dir, exist_ok=True)
        if self.uri:
            at = os.path.join(self.work, "fuse")
            os.makedirs(at, exist_ok=True)
            self.file = os.path.join(at, "disk")
            self.fuse = Process(["nbdfuse", self.file, self.uri], os.path.join(self.work, "nbdfuse.log"))
            wait_until("nbdfuse shows the export", lambda: self.fuse.must_run() or size_of(self.file) > 0)
        self.loop = harness.run("losetup", "-f", "--show", self.file, timeout=LIMIT_S).strip()
        harness.run("mount", self.loop, self.dir, timeout=LIMIT_S)

    def detach(self):
        """Takes it apart from the top, going on past what fails; the caches above the export go with it."""
        if os.path.ismount(self.dir):
            quietly("umount", self.dir) or quietly("umount", "-l", self.dir)
        if self.loop:
            quietly("losetup", "-d", self.loop)
        if self.fuse:
            quietly("umount", os.path.dirname(self.file))
            self.fuse.finish()

    def __exit__(self, *_):
        self.detach()


def size_of(path):
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def quietly(*command):
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Postgres(Process):
    """The database on a mounted data directory, as the owner of its files: PostgreSQL refuses root."""

    def __init__(self, data, work):
        self.owner = str(os.stat(os.path.join(data, "PG_VERSION")).st_uid)
        self.run_dir = harness.fresh(os.path.join(work, "pgrun"))
        os.chown(self.run_dir, int(self.owner), -1)
        super().__init__(
            [*self.as_owner(), os.path.join(postgres_dir(), "postgres"), "-D", data, "-k", self.run_dir,
             "-c", "listen_addresses=", "-c", "shared_buffers=128MB"],
            os.path.join(work, "postgres.log"), cwd="/")

    def as_owner(self):
        return ["setpriv", "--reuid", self.owner, "--clear-groups", "env", f"HOME={self.run_dir}"]

    def first_answer(self, statements):
        """Asks until it is answered, as a client does that waits for its database."""
        ask = [*self.as_owner(), "psql", "-h", self.run_dir, "-U", "postgres", "-XAtq", "-v", "ON_ERROR_STOP=1", "pgbench"]
        ask += [word for statement in statements for word in ("-c", statement)]
        listens = os.path.join(self.run_dir, ".s.PGSQL.5432")
        wait_until("PostgreSQL listens", lambda: self.must_run() or os.path.exists(listens), limit=LONG_S)
        deadline = time.monotonic() + LONG_S
        while True:
            done = subprocess.run(
                ask, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=LONG_S)
            if done.returncode == 0:
                return done.stdout.split()
            self.must_run()
            # psql's 2 is a connection that did not come about: it still starts.
            if done.returncode != 2 or time.monotonic() > deadline:
                sys.exit(f"psql: {done.stderr}\n{self.said()}")
            time.sleep(0.01)

    def end(self, how=signal.SIGINT, limit=LONG_S):
        # SIGINT is its fast shutdown, with a checkpoint.
        super().end(how, limit)


def cluster(where, scale):
    """A data directory with a pgbench database, cleanly shut down; one that is there already is used again."""
    path = os.path.join(where, f"cluster-{scale}")
    if not os.path.exists(os.path.join(path, "PG_VERSION")):
        harness.progress(f"pgbench -i -s {scale} into {path}")
        harness.run(CLUSTER, path, str(scale), timeout=LONG_S)
    if os.path.exists(os.path.join(path, "postmaster.pid")):
        sys.exit(f"{path}: was not shut down; remove it")
    return path
