"""Servers on loopback for tests of transfers: web servers that fail on request, and an S3 server."""

import http.server
import os
import re
import socket
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

from lsmix.data.pool import open_pool

TESTS = Path(__file__).resolve().parent  # folder of the modules that workers import


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files below the server's ``folder``, with the faults that its other attributes request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        path = http.server.urllib.parse.unquote(self.path).lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        with server.counting:
            server.asked.append((path, wanted and int(wanted[1])))
            status = server.statuses.pop(path, 0)
            cut = server.cuts.pop(path, None)
            flipped = server.flips.get(path, 0) > 0
            server.flips[path] = server.flips.get(path, 0) - flipped
        file = Path(server.folder, path)
        if status or not file.is_file():
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = bytearray(file.read_bytes())
        if flipped:
            content[len(content) // 2] ^= 1
        begin = int(wanted[1]) if wanted and server.ranges else 0
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        body = content[begin:] if cut is None else content[begin : begin + cut]
        with server.counting:
            server.sent += len(body)
        self.wfile.write(body)


@contextmanager
def serving(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextmanager
def web_server(folder):
    """Serve a folder; yield the server with its ``url``, the recorded requests, and the faults to inject."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.counting = folder, threading.Lock()
        server.asked, server.sent = [], 0  # (path, first byte or None) of each request; bytes of all bodies
        # By path: status of the next answer, bytes after which it is truncated, number of answers with a flipped bit.
        server.statuses, server.cuts, server.flips = {}, {}, {}
        server.ranges = True
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.handle_error = lambda *_: None  # some tests close connections on purpose
        with serving(server):
            yield server


@contextmanager
def scripted_server(head, more=b"", *, seconds=0.0):
    """Answer each connection with ``head`` and then endlessly with ``more``; yield the URL and the threads."""
    connections, done = [], threading.Event()

    def answer(connection):
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(head)
                while more and not done.wait(seconds):
                    connection.sendall(more if seconds else more * 1000)
                if head == b"":
                    done.wait()
            except OSError:
                pass

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(threading.Thread(target=answer, args=(connection,)))
            connections[-1].start()

    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/pool", connections
    finally:
        done.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for each in connections:
            each.join()


@contextmanager
def s3_server():
    """Start an S3 server and point fsspec to it by environment variables, as users do."""
    from fsspec.config import conf, set_conf_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from moto and its dependencies
        from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    wanted = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    set_conf_env(conf)  # fsspec reads the environment only on import
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        conf.pop("s3", None)
        set_conf_env(conf)


def make_bucket(name):
    """Create an empty bucket on the running server."""
    import fsspec

    files = fsspec.filesystem("s3", use_listings_cache=False)
    if files.exists(name):
        files.rm(name, recursive=True)
    files.mkdir(name)
    return files


def read_all(url, limit, out):
    """Put the sum of all pixels of a pool into a queue; runs in a separate process."""
    out.put(int(open_pool(url, cache_bytes=limit).image[:].sum()))


class Meter:
    """A progress reporter that counts transferred bytes; ``stop_at`` interrupts the transfer after that many bytes."""

    def __init__(self, stop_at=None):
        self.count, self.total, self.stop_at = 0, 0, stop_at

    def info(self, message):
        pass

    def start(self, label, total, unit, done=0):
        assert unit == "byte"
        self.total, self.count = total, done

    def advance(self, units=1, note=""):
        self.count += units
        if self.stop_at is not None and self.count >= self.stop_at:
            raise KeyboardInterrupt

    def finish(self):
        pass
