"""Hostile URLs, endless responses, unusable schedulers, interrupts, and caches that other users can write to."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from factory import flip, write_pool
from places import Meter, scripted_server, web_server

import lsmix
from lsmix.data import remote, web
from lsmix.data.atomic import locked_file
from lsmix.data.errors import DownloadError, LsmixError, RecipeError
from lsmix.data.progress import graceful_signals, pause
from lsmix.data.remote import open_remote
from lsmix.data.sharing.transfer import pull_artifact
from lsmix.data.store import open_artifact
from lsmix.data.web import checked_url
from lsmix.pipeline.workspace.workspace import Workspace

SHARD = "pool.zarr/image/c/0/0/0/0"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("www") / "pool")


@pytest.fixture
def served(pool):
    """A web server with the pool as "pool"."""
    with web_server(pool.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# URLs.


def template(folder):
    """Return the URL of fsspec references with a template that runs a command when it is rendered."""
    run = f"{{{{ cycler.__init__.__globals__.os.system('touch {folder}/ran') }}}}"
    content = {"version": 1, "templates": {"u": run}, "gen": [], "refs": {"manifest.json": ["{{u}}"]}}
    return f"reference://::data:application/json;base64,{base64.b64encode(json.dumps(content).encode()).decode()}"


@pytest.mark.parametrize("words", [("status",), ("gc",), ("run", "--dry-run")])
@pytest.mark.parametrize("field", ["flow.path", "pools.lsmix.flow"])
@pytest.mark.parametrize("kind", ["dask", "reference"])
def test_a_url_in_a_recipe_runs_no_code_and_connects_to_nothing(words, field, kind, tiny_recipe, tmp_path, command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        url = f"dask://127.0.0.1:{port}/flow::file:///flow" if kind == "dask" else template(tmp_path)
        recipe = tmp_path / "mine.toml"
        section, _, key = field.rpartition(".")
        text = tiny_recipe.read_text().replace(f"[{section}]", f"[{section}]\n{key} = {url!r}")
        if section == "flow":  # a flow with a path has no other fields
            text = text[: text.index("[flow]")] + f"[flow]\npath = {url!r}\n" + text[text.index("[latents]") :]
        recipe.write_text(text)
        result = command(words[0], recipe, *words[1:], "--workspace", tmp_path / "runs")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: ")
    assert f"uses the scheme '{kind}', which lsmix does not support" in result.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *(
            (f"{kind}://a/b", "does not support")
            for kind in ("dask", "reference", "ftp", "sftp", "github", "zip", "local", "")
        ),
        ("simplecache::http://a/b", "chained"),
        ("s3://a/b::dask://c", "'::'"),
        ("http://a/b::file:///c", "'::'"),
        ("file:///a::b", "'::'"),
        ("http://[::1/x", "not a valid URL"),
        ("http://[x]/x", "not a valid URL"),
        ("s3://b[/x", "not a valid URL"),
        ("http://h:99999/x", "not a valid URL"),
        ("http://h:port/x", "not a valid URL"),
        ("http://exämple☃/x", "non-ASCII"),
        ("http://h/a b", "contains spaces"),
        ("http://h/a\nb", "control characters"),
        ("s3://b/\x1b[31m", "control characters"),
        (" http://h/x", "at its ends"),
        ("http://h/\udc80", "control characters"),
        (f"http://{'a' * 64}/x", "not a valid URL"),
        ("http://a..b/x", "not a valid URL"),
        ("https:///x", "has no host"),
        ("http://:80/x", "has no host"),
        ("s3://", "has no bucket"),
        ("s3:///x", "has no bucket"),
        ("hf://", "has no bucket"),
        ("file://host/x", "on another host"),
        ("file://localhost", "not a valid file URL"),
        ("file:///a%00b", "not a valid file URL"),
        ("file:///a#b", "not a valid file URL"),
    ],
)
def test_unsupported_and_invalid_urls_are_rejected_everywhere_with_one_error_line(
    url, message, pool, tmp_path, command
):
    for action in (
        checked_url,
        open_remote,
        lsmix.open_pool,
        Workspace,
        lambda url: lsmix.pull(url, tmp_path / "x"),
    ):
        with pytest.raises(RecipeError, match=message):
            action(url)
    result = command("pull", url, tmp_path / "x")
    assert (result.code, len(result.err.splitlines())) == (1, 1), result.err
    with pytest.raises(LsmixError):
        lsmix.push(pool, url)


@pytest.mark.parametrize("url", ["http://ann:secret@h/x", "s3://key:secret@bucket/x", "https://ann@h/x"])
def test_a_url_with_user_or_password_is_rejected_without_showing_the_password(url):
    with pytest.raises(RecipeError, match="user name or password") as caught:
        open_remote(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTPS://Example.org:443/a%20b?x=1", "https://Example.org:443/a%20b?x=1"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("http://xn--mnchen-3ya.de./x", "http://xn--mnchen-3ya.de./x"),
        ("S3://bucket/a key", "s3://bucket/a key"),
        ("abfs://box@account.dfs.core.windows.net/x", "abfs://box@account.dfs.core.windows.net/x"),
        ("hf://datasets/a/b@main/x", "hf://datasets/a/b@main/x"),
        ("File:///a%20b", "file:///a%20b"),
        ("memory://", "memory://"),
    ],
)
def test_valid_urls_are_returned_with_the_scheme_in_lower_case(url, normal):
    assert checked_url(url) == normal


@pytest.mark.parametrize(
    "section", ["", "[data]\n", "[flow]\n", "[latents]\n", "[pools.lsmix]\n", "[classifier]\n", "[run]\n", "[dask]\n"]
)
def test_a_recipe_cannot_set_the_address_of_a_scheduler(section, tmp_path, command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        recipe = tmp_path / "mine.toml"
        address = f'scheduler = "tcp://127.0.0.1:{server.getsockname()[1]}"\n'
        recipe.write_text(f'name = "x"\n{section}{address}')
        result = command("run", recipe, "--workspace", tmp_path / "runs")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.code == 1
    assert "error: " in result.err


# Servers.


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0, "endless"),
    "slow 100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02, "timed out"),
    "slow headers": (OK, b"X", 0.02, "timed out"),
    "trailers": (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n", 0, "endless"),
    "chunk extensions": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n",
        b"1;" + b"x" * 8000 + b"\r\na\r\n",
        0.02,
        "timed out",
    ),
    "slow body": (OK + b"Content-Length: 1000000\r\n\r\n", b"x", 0.02, "timed out"),
    "silence": (b"", b"", 0, "timed out"),
}


@pytest.mark.parametrize(("head", "more", "seconds", "message"), ENDLESS.values(), ids=ENDLESS)
def test_an_endless_or_slow_response_times_out(head, more, seconds, message, monkeypatch):
    monkeypatch.setattr(web, "_PATIENCE_SECONDS", 0.15)
    monkeypatch.setattr(web, "_MOST_OTHER_BYTES", 1 << 16)
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 0.15)
    with scripted_server(head, more, seconds=seconds) as (url, requests):
        place = open_remote(url)
        with pytest.raises(DownloadError, match=message):
            place.read("manifest.json", 1 << 30)
        assert len(requests) == 2


def test_circular_redirects_end_without_reading_their_pages():
    with scripted_server(b"HTTP/1.1 302 Found\r\nLocation: /x y\r\n\r\n", b"x" * 100) as (url, requests):
        with pytest.raises(DownloadError, match=r"too many redirects, the last to 'http://127.0.0.1:\d+/x%20y'"):
            open_remote(url).read("manifest.json", 1 << 30)
        assert len(requests) == 6


def test_one_byte_per_attempt_does_not_count_as_progress(served, tmp_path):
    served.cuts = _Always(1, but="pool/manifest.json")
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        pull_artifact(f"{served.url}/pool", tmp_path / "here", Meter())
    assert max(Counter(path for path, _ in served.asked).values()) <= 4


class _Always(dict):
    """Truncates every response except those for one path."""

    def __init__(self, cut, but):
        self._cut, self._but = cut, but

    def pop(self, path, default=None):
        return default if path == self._but else self._cut


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1/x",
        "http://ann:secret@127.0.0.1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1/x::file:///etc/passwd",
        "HTTP://a..b/",
        "file:///etc/passwd",
        "dask://127.0.0.1/x",
    ],
)
def test_a_redirect_to_an_unsupported_url_is_one_error_line(location, command):
    with scripted_server(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()) as (
        url,
        requests,
    ):
        result = command("pull", url, "here")
    assert (result.code, len(result.err.splitlines())) == (1, 1), result.err
    assert len(requests) == 1


@pytest.mark.parametrize("call", ["size", "entries", "write", "remove"])
def test_a_store_that_does_not_answer_times_out(call, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(remote, "_MOST_LISTING_BYTES", 0)
    (tmp_path / "file").touch()
    place, answer = open_remote("memory://silent"), threading.Event()
    calls = {"size": "info", "entries": "find", "write": "put_file", "remove": "rm_file"}
    monkeypatch.setattr(type(place._fs), calls[call], lambda *_, **__: answer.wait(60))
    try:
        with pytest.raises(DownloadError, match="did not answer within"):
            getattr(place, call)("x", *([tmp_path / "file"] if call == "write" else []))
    finally:
        answer.set()


CONNECT = """
import os, sys
from lsmix.data.errors import RecipeError
from lsmix.pipeline.engine import dask as on_dask
on_dask._CONNECT_SECONDS = 0.3
for address in sys.argv[1:]:
    try:
        on_dask.DaskExecutor(scheduler=address, say=print)._connected()
    except RecipeError as error:
        print(error)
sys.stdout.flush()
os._exit(0)
"""


def test_unusable_schedulers_are_reported_in_one_line_each():
    with scripted_server(b"") as (silent, _), scripted_server(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9) as (web, _):
        addresses = [url.replace("http", "tcp").removesuffix("/pool") for url in (silent, web)]
        addresses += [
            addresses[0].replace("tcp", "tls"),
            "ucx://127.0.0.1:1",
            "inproc://a",
            "s3://b",
            "tcp://a\nb:1",
            web,
        ]
        result = subprocess.run(
            [sys.executable, "-c", CONNECT, *addresses], capture_output=True, text=True, timeout=60, check=False
        )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(addresses), lines
    for address, line in zip(addresses, lines, strict=True):
        assert repr(address) in line


# Ctrl-C.


@contextmanager
def interrupted():
    """Send this process a SIGINT after 0.1 s, and check that it ends the block long before any timeout."""
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    with graceful_signals():
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            yield
    timer.join()
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("what", ["answer", "body", "pause", "store", "lock", "copy"])
def test_the_first_ctrl_c_ends_any_wait(what, monkeypatch, tmp_path):
    head = {"body": OK + b"Content-Length: 9\r\n\r\n"}.get(what, b"")
    with scripted_server(head, b"" if head == b"" else b"x", seconds=5) as (url, _):
        if what in ("answer", "body"):
            with interrupted():
                open_remote(url).read("x", 100)
        elif what == "pause":
            with interrupted():
                pause(60)
        elif what == "store":
            place, answer = open_remote("memory://silent"), threading.Event()
            monkeypatch.setattr(type(place._fs), "info", lambda *_, **__: answer.wait(60))
            with interrupted():
                place.size("x")
            answer.set()
        elif what == "lock":
            path = tmp_path / "lock"
            with locked_file(path, wait=False), interrupted(), locked_file(path, wait=True):
                pass
        else:
            with interrupted():
                open_artifact(url)


def test_the_first_ctrl_c_ends_the_threads_of_a_pull(served, tmp_path):
    wait, answer = threading.Event(), served.RequestHandlerClass.do_GET

    class Stalling(served.RequestHandlerClass):
        def do_GET(self):  # noqa: N802 - named by the base class
            if "manifest.json" not in self.path:
                wait.wait(60)
            answer(self)

    served.RequestHandlerClass = Stalling
    try:
        with interrupted():
            pull_artifact(f"{served.url}/pool", tmp_path / "here", Meter())
    finally:
        wait.set()


# The cache.


def test_damaged_cached_inputs_of_a_remote_workspace_are_downloaded_again(pool):
    lsmix.push(pool, "memory://runs/mix/mine-0123456789ab")
    workspace, content = Workspace("memory://runs"), (pool / SHARD).read_bytes()
    flip(workspace.find("mix", "0123456789ab").file(SHARD))
    found = workspace.find("mix", "0123456789ab")
    assert found.file(SHARD).read_bytes() == content
    flip(workspace.local_copy(found) / SHARD)
    assert (workspace.local_copy(found) / SHARD).read_bytes() == content


def test_a_cache_that_other_users_can_write_to_is_rejected(served, monkeypatch):
    cache = Path(os.environ["LSMIX_CACHE"])
    uses = {
        "copies": lambda: lsmix.verify(f"{served.url}/pool"),
        "files": lambda: lsmix.open_pool(f"{served.url}/pool"),
        "workspaces": lambda: Workspace("memory://x"),
    }
    for use in uses.values():
        use()
    for within, mode in ("", 0o770), ("", 0o707), ("copies", 0o770), ("files", 0o707), ("workspaces", 0o770):
        (cache / within).chmod(mode)
        for name, use in uses.items():
            if within in ("", name):
                with pytest.raises(LsmixError, match=r"other users can write to it .* Run 'chmod go-w'"):
                    use()
        (cache / within).chmod(0o755)
    for use in uses.values():
        use()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for use in uses.values():
        with pytest.raises(LsmixError, match="belongs to another user"):
            use()


def test_a_cache_created_under_a_loose_umask_is_private(served):
    before = os.umask(0o002)
    try:
        for _ in range(2):
            lsmix.verify(f"{served.url}/pool")
            lsmix.open_pool(f"{served.url}/pool")
    finally:
        os.umask(before)
