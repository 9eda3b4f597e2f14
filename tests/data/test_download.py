"""Downloads from a local server: atomic, resumable, and only with the expected checksum."""

import hashlib
import http.server
import json
import re
import socket
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lsmix.data import atomic, cache, remote
from lsmix.data.errors import CorruptError, DiskSpaceError, DownloadError, LockedError, MissingError, RecipeError
from lsmix.data.progress import NullProgress
from lsmix.data.readers.published.download import download
from lsmix.data.readers.published_sets import PublishedFile, check_download, files_to_fetch
from lsmix.data.readers.registry import SourceConfig, source_files
from lsmix.pipeline import api
from lsmix.pipeline.config.schema import DataConfig
from lsmix.pipeline.stages.ingest import fetch_source

CONTENT = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8).tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's ``content``; its other attributes control errors, redirects and ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.statuses:
            status = server.statuses.pop(0)
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin, size = 0, len(server.content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and server.ranges:
            begin = int(wanted[1])
        if begin >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin + server.shift}-{size - 1}/{size}")
        if server.tells_length:
            self.send_header("Content-Length", str(size - begin))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else size
        self.wfile.write(server.content[begin : begin + cut])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for module in (cache, remote):
        monkeypatch.setattr(module, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("lsmix.data.web._TIMEOUT_SECONDS", 5.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.asked, server.statuses, server.cuts = CONTENT, [], [], []
        server.ranges, server.tells_length, server.shift, server.location = True, True, 0, ""
        server.url = f"http://127.0.0.1:{server.server_port}/some/data.npz"
        server.handle_error = lambda *_: None  # some tests disconnect the client
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Meter(NullProgress):
    """Records all calls."""

    def __init__(self):
        self.begun, self.bytes = [], 0

    def start(self, label, total, unit, done=0):
        self.begun.append((label, total, unit, done))

    def advance(self, units=1, note=""):
        self.bytes += units


def wanted(server, content=CONTENT, size=1_000_003, algorithm="sha256") -> PublishedFile:
    return PublishedFile(server.url, "data.npz", algorithm, hashlib.new(algorithm, content).hexdigest(), size)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "new" / "data.npz"


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_complete_file_is_downloaded_and_its_bytes_are_counted(server, target, algorithm):
    meter = Meter()
    download(wanted(server, algorithm=algorithm), target, meter)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert meter.begun == [("data.npz", len(CONTENT), "byte", 0)]
    assert meter.bytes == len(CONTENT)
    assert server.asked == [None]


def test_the_size_comes_from_the_recipe_or_the_server(server, target):
    server.tells_length = False
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT
    target.unlink()
    with pytest.raises(DownloadError, match="does not exist, or its server does not report its size"):
        download(wanted(server, size=0), target, Meter())
    assert list(target.parent.iterdir()) == []
    server.tells_length = True
    download(wanted(server, size=0), target, Meter())
    assert target.read_bytes() == CONTENT


def test_a_download_resumes_after_lost_connections(server, target, caplog):
    server.cuts = [300_000, 1, 200_000]
    meter = Meter()
    download(wanted(server), target, meter)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=300001-", "bytes=500001-"]
    assert meter.bytes == len(CONTENT)
    assert "the connection ended after 300,000 of 1,000,003 bytes" in caplog.text


def test_the_part_file_of_a_killed_download_is_resumed(server, target):
    target.parent.mkdir()
    (target.parent / "data.npz.part").write_bytes(CONTENT[:777_777])
    meter = Meter()
    download(wanted(server), target, meter)
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=777777-"]
    assert meter.begun == [("data.npz", len(CONTENT), "byte", 777_777)]


def test_the_next_call_resumes_an_interrupted_download(server, target):
    class Impatient(Meter):
        def advance(self, units=1, note=""):
            super().advance(units)
            if self.bytes > 400_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(wanted(server), target, Impatient())
    kept = (target.parent / "data.npz.part").stat().st_size
    assert not target.exists()
    assert kept > 400_000
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_failed_download_keeps_the_downloaded_part(server, target):
    server.cuts = [300_000]

    class Closing(Meter):
        def advance(self, units=1, note=""):
            server.statuses = [503] * 9  # from the first cut on

    with pytest.raises(DownloadError, match=r"Run again to resume the download"):
        download(wanted(server), target, Closing())
    assert (target.parent / "data.npz.part").read_bytes() == CONTENT[:300_000]
    server.statuses = []
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT


def test_a_download_restarts_if_the_server_does_not_support_ranges(server, target):
    server.ranges, server.cuts = False, [300_000]
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "left", [b"x" * 5000, CONTENT + b"x", b"x" * len(CONTENT)], ids=["shorter", "longer", "as long"]
)
def test_a_part_of_another_file_is_replaced(server, target, left):
    target.parent.mkdir()
    (target.parent / "data.npz.part").write_bytes(left)
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_raises_an_error_and_leaves_no_files(server, target):
    with pytest.raises(CorruptError, match=r"is damaged: expected sha256 \w{64}, got \w{64} in two attempts. Check"):
        download(wanted(server, b"another"), target, Meter())
    assert list(target.parent.iterdir()) == []


def test_a_wrong_size_is_detected_before_the_download(server, target):
    meter = Meter()
    with pytest.raises(CorruptError, match=r"expected 999 bytes, got 1,000,003"):
        download(wanted(server, size=999), target, meter)
    assert meter.bytes == 0
    assert list(target.parent.iterdir()) == []


def test_a_response_of_the_wrong_size_keeps_the_part_file(server, target):
    target.parent.mkdir()
    part = target.parent / "data.npz.part"
    part.write_bytes(CONTENT[:300_000])
    server.ranges, server.content = False, b"<html>please log in</html>"
    with pytest.raises(CorruptError, match="expected 1,000,003 bytes, got 26"):
        download(wanted(server), target, Meter())
    assert part.read_bytes() == CONTENT[:300_000]


def test_a_file_longer_than_expected_is_rejected(server, target):
    server.tells_length = False
    with pytest.raises(CorruptError, match="is damaged: expected sha256"):
        download(wanted(server, size=500_000), target, Meter())
    assert not target.exists()


@pytest.mark.parametrize(
    ("status", "text"),
    [(404, "is missing"), (403, "cannot be downloaded: the server answers 403 Forbidden"), (410, "is missing")],
)
def test_missing_and_forbidden_files_are_not_retried(server, target, status, text):
    server.statuses = [status, status]
    with pytest.raises((CorruptError, DownloadError), match=f"data.npz' {text}"):
        download(wanted(server), target, Meter())
    assert len(server.asked) <= 2
    assert list(target.parent.iterdir()) == []


def test_temporary_server_errors_are_retried_a_few_times(server, target):
    server.statuses = [503, 429, 500]
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT
    target.unlink()
    server.statuses = [503] * 4
    with pytest.raises(DownloadError, match="the server answers 503 Service Unavailable"):
        download(wanted(server), target, Meter())
    assert server.statuses == []


def test_a_response_with_another_range_is_rejected(server, target):
    server.cuts, server.shift = [1000], 5
    with pytest.raises(DownloadError, match="the server sent another range than the requested one"):
        download(wanted(server), target, Meter())


def test_only_redirects_to_http_and_https_are_followed(server, target):
    server.statuses, server.location = [302, 301], "/elsewhere/data.npz"
    download(wanted(server), target, Meter())
    assert target.read_bytes() == CONTENT
    target.unlink()
    for location in ("ftp://127.0.0.1/data.npz", "file:///etc/passwd", "data:,x"):
        server.statuses, server.location = [302], location
        with pytest.raises(DownloadError, match=re.escape(location)):
            download(wanted(server), target, Meter())
        assert not target.exists()
    server.statuses, server.location = [302] * 20, "/again"
    with pytest.raises(DownloadError, match="too many redirects"):
        download(wanted(server), target, Meter())


def test_a_refused_connection_is_reported(server, target):
    with socket.socket() as closed:  # bound, so that no other process uses the port, but not listening
        closed.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{closed.getsockname()[1]}/data.npz"
        with pytest.raises(DownloadError, match=r"cannot be downloaded: .*refused.* Run again"):
            download(wanted(server), target, Meter())
    assert list(target.parent.iterdir()) == []


def test_a_silent_server_times_out(server, target, monkeypatch):
    monkeypatch.setattr("lsmix.data.web._TIMEOUT_SECONDS", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server.url = f"http://127.0.0.1:{silent.getsockname()[1]}/data.npz"
        with pytest.raises(DownloadError, match="cannot be downloaded: timed out"):
            download(wanted(server), target, Meter())


def test_a_file_that_does_not_fit_on_the_disk_is_not_downloaded(server, target, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    meter = Meter()
    with pytest.raises(DiskSpaceError, match=r"needs 1.0 MB more in .* but only 1.0 kB are free"):
        download(wanted(server), target, meter)
    assert meter.bytes == 0


def test_a_file_that_another_run_downloads_is_locked(server, target):
    class Second(Meter):
        def start(self, *_args, **_options):
            with pytest.raises(LockedError, match="is being downloaded by another run"):
                download(wanted(server), target, Meter())

    download(wanted(server), target, Second())
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1


# The field data.download of a recipe, and the files that it downloads.

SHA = "sha256=" + "0" * 64


@pytest.mark.parametrize(
    "value",
    [
        *("cifar10", "cifar10-binary", "cifar100", "cifar100-binary", "svhn", "svhn-extra", "tiny-imagenet", ""),
        f"https://a.org/x.npz#{SHA}",
        "http://a.org:80/x.npz?y=1#md5=" + "aF" * 16,
    ],
)
def test_known_names_and_urls_with_a_checksum_are_accepted(value):
    check_download(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cifar11", r"expected one of cifar10, .*, or an http or https URL with its checksum, got 'cifar11'"),
        (f"file:///etc/passwd#{SHA}", "expected one of"),
        (f"ftp://a.org/x.npz#{SHA}", "expected one of"),
        (f"https:///x.npz#{SHA}", "expected one of"),
        (f"https://a.org:no/x.npz#{SHA}", "expected one of"),
        (f"https://a.org/x y.npz#{SHA}", "expected one of"),
        (f"https://a.org/ü.npz#{SHA}", "expected one of"),
        ("https://a.org/x.npz", "must end in its checksum"),
        ("https://a.org/x.npz#sha256=12", "must end in its checksum"),
        ("https://a.org/x.npz#md5=" + "g" * 32, "must end in its checksum"),
        ("https://a.org/x.npz#sha1=" + "0" * 40, "must end in its checksum"),
    ],
)
def test_other_downloads_are_rejected_when_the_recipe_is_read(value, message, tmp_path):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert({"download": value}, DataConfig)
    with pytest.raises(RecipeError, match=message):
        check_download(value)


def names(download: str, path: Path) -> list[str]:
    return [str(target.relative_to(path.parent)) for _, target in files_to_fetch(download, path)]


def test_a_path_with_a_suffix_is_a_file_and_one_without_a_folder(tmp_path):
    assert names("cifar10", tmp_path / "mine.tar.gz") == ["mine.tar.gz"]
    assert names("cifar10", tmp_path / "cifar") == ["cifar/cifar-10-python.tar.gz"]
    assert names("svhn", tmp_path / "svhn") == ["svhn/train_32x32.mat", "svhn/test_32x32.mat"]
    assert names(f"https://a.org/b/%2e%2e%2Fx%00y.npz?z#{SHA}", tmp_path / "web") == ["web/x_y.npz"]
    with pytest.raises(RecipeError, match=r"'svhn' consists of 2 files, but data.path is the name of one file"):
        names("svhn", tmp_path / "svhn.mat")
    with pytest.raises(RecipeError, match="does not show the type of the file"):
        names(f"https://a.org/download?id=3#{SHA}", tmp_path / "web")
    assert names(f"https://a.org/download?id=3#{SHA}", tmp_path / "web.npz") == ["web.npz"]


def test_existing_files_are_not_downloaded_again(tmp_path):
    (tmp_path / "mine.tar.gz").touch()
    (tmp_path / "file").touch()
    assert names("cifar10", tmp_path / "mine.tar.gz") == names("cifar10", tmp_path / "file") == []
    folder = tmp_path / "cifar"
    folder.mkdir()
    (folder / "cifar-10-python.tar.gz.part").touch()
    assert names("cifar10", folder) == ["cifar/cifar-10-python.tar.gz"]
    (folder / "cifar-10-batches-py").mkdir()
    assert names("cifar10", folder) == [], "the folder may hold the data set unpacked"
    assert names("svhn", folder) == ["cifar/train_32x32.mat", "cifar/test_32x32.mat"]
    (folder / "train_32x32.mat").touch()
    assert names("svhn", folder) == ["cifar/test_32x32.mat"]


def test_the_error_for_a_missing_data_set_names_the_download_option(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        (tmp_path / "cifar-10-python.tar.gz.part").touch()
        with pytest.raises(MissingError, match=r"Check it, or run 'lsmix ingest --download'"):
            source_files(SourceConfig(path=str(path), download="cifar10"))


def test_a_download_needs_a_source_and_a_path(tmp_path):
    for config in (DataConfig(format="digits"), DataConfig(path="x"), DataConfig(download="cifar10")):
        with pytest.raises(RecipeError, match=r"--download needs .data\.download. .* and .data\.path."):
            fetch_source(config, NullProgress())


# The command.


@pytest.fixture
def published(server, tmp_path) -> str:
    """Serve a small NumPy archive, and return the value of data.download for it."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "published.npz", images=rng.integers(0, 256, (40, 8, 8, 3), np.uint8), labels=np.arange(40) % 4)
    server.content = (tmp_path / "published.npz").read_bytes()
    return f"{server.url}#sha256={hashlib.sha256(server.content).hexdigest()}"


@pytest.mark.parametrize("path", ["images.npz", "images"])
@pytest.mark.parametrize("name", ["ingest", "run"])
def test_ingest_and_run_download_missing_files_once(server, published, tmp_path, command, monkeypatch, path, name):
    build_graph = api.build_graph
    monkeypatch.setattr(api, "build_graph", lambda *args: build_graph(*args)[:1])  # without training
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        f'name = "mine"\n[data]\npath = "{path}"\ndownload = "{published}"\ntest = 4\nheldout = 4\n', encoding="utf-8"
    )
    words = (name, recipe, "--workspace", tmp_path / "runs")
    missing = command(*words)
    assert (missing.code, server.asked) == (1, [])
    assert "or run 'lsmix ingest --download' to download it" in missing.err
    done = command(*words, "--download", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["content"]["artifacts"][0]["counts"]["train"] == 32
    assert f"downloading {server.url}" in done.err
    assert " kB" in done.err
    again = command(*words, "--download")
    assert again.code == 0
    assert "up to date" in again.err
    assert len(server.asked) == 2, "one request is for the size"


def test_a_wrong_checksum_ends_the_command_with_one_error_line(published, tmp_path, command):
    recipe = tmp_path / "my.toml"
    wrong = published[:-8] + "00000000"
    recipe.write_text(f'name = "mine"\n[data]\npath = "a.npz"\ndownload = "{wrong}"\ntest = 4\n', encoding="utf-8")
    result = command("ingest", recipe, "--workspace", tmp_path / "runs", "--download")
    assert (result.code, result.out) == (5, "")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "is damaged: expected sha256" in result.err
    assert not (tmp_path / "a.npz").exists()
