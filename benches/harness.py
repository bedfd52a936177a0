"""What the bench scripts share: processes ended by their own id, medians, and the machine's description."""

import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RELEASE = os.environ.get("HORCRUX_BIN_DIR", os.path.join(ROOT, "target", "release"))
NBD = os.path.join(RELEASE, "horcrux-nbd")
CLI = os.path.join(RELEASE, "horcrux-cli")
START_LIMIT_S = 60
STOP_LIMIT_S = 60


def run(*command, **options):
    """Runs to the end; a failure shows what the command said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout.decode(errors='replace')}")
    return done.stdout.decode(errors="replace")


def measured(command):
    """Runs a command; returns (seconds, peak resident MiB of its largest process).

    Through time(1), a small process: a child's peak counts the parent's memory from before exec, and ours is big.
    """
    with tempfile.NamedTemporaryFile("r") as told:
        start = time.monotonic()
        run("/usr/bin/time", "-q", "-f", "%M", "-o", told.name, *command)
        return time.monotonic() - start, int(told.read()) / 1024


class Server:
    """A process that listens on a Unix socket: waited for at the start, ended by its id at the end."""

    def __init__(self, command, sock, env=None):
        self.sock = sock
        # Some servers leave their socket behind, and then refuse to start over it.
        if os.path.exists(sock):
            os.unlink(sock)
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env={**os.environ, **(env or {})}
        )
        deadline = time.monotonic() + START_LIMIT_S
        while not accepts(sock):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                self.log.seek(0)
                sys.exit(f"{command}: does not accept\n{self.log.read().decode(errors='replace')}")
            time.sleep(0.001)

    def proc(self, name):
        with open(f"/proc/{self.process.pid}/{name}") as file:
            return dict(line.split(":", 1) for line in file if ":" in line)

    def peak_rss_mib(self):
        return int(self.proc("status")["VmHWM"].split()[0]) / 1024

    def anonymous_mib(self):
        """Its own memory now, without the pages of mapped files that the kernel can take back at any time."""
        return int(self.proc("status")["RssAnon"].split()[0]) / 1024

    def read_bytes(self):
        """What read(2) and its kin returned to it: the repository's objects, and its libraries and /proc besides."""
        return int(self.proc("io")["rchar"])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            sys.exit(f"{self.process.args}: still running {STOP_LIMIT_S} s after SIGTERM")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()


def accepts(path):
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
            return True
        except OSError:
            return False


def horcrux(repo, name, state, sock, *more):
    return Server([NBD, "serve", "--access", repo, "--name", name, "--unix", sock, "--state-dir", state, *more], sock)


def first_line(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout.splitlines()[0].strip() if done.stdout else "?"
    except OSError:
        return "missing"


def machine(*versions):
    """One line per fact a figure needs to be read: machine, kernel, commit, versions."""
    model = "?"
    memory = "?"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    with open("/proc/meminfo") as file:
        memory = f"{int(file.readline().split()[1]) / (1 << 20):.0f} GiB"
    commit = first_line("git", "-C", ROOT, "rev-parse", "--short", "HEAD")
    changed = subprocess.run(["git", "-C", ROOT, "diff", "--quiet", "HEAD"]).returncode
    yield f"machine: {model}, {os.cpu_count()} cores, {memory}; load before: {os.getloadavg()[0]:.1f}"
    yield f"kernel: {platform.release()}"
    yield f"commit: {commit}{' with changes' if changed else ''}"
    yield f"versions: {'; '.join(versions)}"
    yield f"date: {time.strftime('%Y-%m-%d')}"


def median(values):
    return statistics.median(values)


def spread(values, form="{:.2f}"):
    """The median, and the range when there is one."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(median(values))} ({form.format(min(values))}..{form.format(max(values))})"


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def progress(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def fresh(path):
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path
