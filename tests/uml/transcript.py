"""dockerd's calls to a volume driver: written down on their way, and made again.

    transcript.py record LISTEN DRIVER FILE KEY=VALUE...   stands between Docker and the driver; ends with SIGTERM
    transcript.py replay DRIVER FILE KEY=VALUE...          makes each call again, in order, and compares the answer

FILE has one JSON object a line: the call, what was asked, what was answered. A VALUE that depends on the machine (where the repository is) stands there as @KEY@. What
depends on the moment is not compared: times, what a volume's Status says of its use.
"""

import http.client
import http.server
import json
import os
import signal
import socket
import socketserver
import sys
import threading

LIMIT_S = 120
# Calls that change nothing: in which order they are made is all the same.
LOOKING = {"Capabilities", "Get", "List", "Path"}


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=LIMIT_S)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self.path)


def ask(driver, call, body):
    """The status and the body of the driver's answer."""
    connection = Connection(driver)
    content = "application/vnd.docker.plugins.v1.2+json"
    connection.request("POST", call, body, {"Accept": content, "Content-Type": content})
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


def put(text, values):
    """Machine's values in the place of their keys."""
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def hide(text, values):
    # The longest first: one may begin with another.
    for key, value in sorted(values.items(), key=lambda pair: -len(pair[1])):
        text = text.replace(value, f"@{key}@")
    return text


def record(listen, driver, path, values):
    lock = threading.Lock()
    running, overlapping = set(), set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            call = (object(), self.path.rsplit(".", 1)[-1])
            with lock:
                running.add(call)
                if len(running) > 1 and not all(what in LOOKING for _, what in running):
                    overlapping.update(running)
            try:
                status, answer = ask(driver, self.path, body)
            finally:
                with lock:
                    running.discard(call)
            line = {"call": self.path.lstrip("/"), "asked": json.loads(body or "null"), "answered": json.loads(answer)}
            with lock, open(path, "a") as out:
                # Made again one after the other, calls that overlapped may not mean the same.
                if call in overlapping:
                    line["overlaps"] = True
                out.write(hide(json.dumps(line, sort_keys=True), values) + "\n")
            self.send_response(status)
            self.send_header("Content-Type", "application/vnd.docker.plugins.v1.2+json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def address_string(self):
            return "docker"

        def log_message(self, *_):
            pass

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Server(listen, Handler).serve_forever()


def settled(answer):
    """An answer without what depends on the moment."""
    answer = json.loads(json.dumps(answer))
    for volume in [answer.get("Volume") or {}, *(answer.get("Volumes") or [])]:
        volume.pop("CreatedAt", None)
        status = volume.get("Status") or {}
        for key in ("device", "dirty_bytes", "cached_bytes", "commit"):
            status.pop(key, None)
    return answer


def replay(driver, path, values):
    with open(path) as lines:
        calls = [json.loads(put(line, values)) for line in lines]
    kinds = {}
    for number, call in enumerate(calls, 1):
        body = b"" if call["asked"] is None else json.dumps(call["asked"]).encode()
        if call.get("overlaps"):
            sys.exit(f"call {number} overlapped another when it was written down: write it down again")
        status, answer = ask(driver, "/" + call["call"], body)
        answer = json.loads(answer)
        if status != 200 or settled(answer) != settled(call["answered"]):
            sys.exit(f"call {number}, {call['call']} {call['asked']}:\n  was answered {call['answered']}\n  and now is    {answer}")
        kinds[call["call"]] = kinds.get(call["call"], 0) + 1
    print(f"{len(calls)} calls made again: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))


def main():
    what, *rest = sys.argv[1:]
    positional = 3 if what == "record" else 2
    values = dict(pair.split("=", 1) for pair in rest[positional:])
    {"record": record, "replay": replay}[what](*rest[:positional], values)


main()
