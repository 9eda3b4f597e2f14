"""Push and pull: only missing files, every byte verified, the manifest last, and nothing outside the folder."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from factory import contents, flip, write_pool
from guarded import sealed_again
from places import Meter, make_bucket, s3_server, web_server

from lsmix.data.artifact import content_digest, read_manifest
from lsmix.data.atomic import add_checksum, locked_file
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    DownloadError,
    FormatError,
    LockedError,
    LsmixError,
    MissingError,
    RecipeError,
)
from lsmix.data.remote import open_remote
from lsmix.data.sharing.transfer import pull_artifact, push_artifact
from lsmix.data.store import local_folder
from lsmix.pipeline.api import pull, push, verify


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("made") / "mix-0123456789ab")


@pytest.fixture
def web(artifact, tmp_path):
    """A web server with a copy of the artifact as "pool", which tests may change."""
    shutil.copytree(artifact, tmp_path / "www" / "pool")
    with web_server(tmp_path / "www") as server:
        yield server


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3")
        make_bucket("bucket")
    return {
        "folder": str(tmp_path / "stick/pool"),
        "file": f"file://{tmp_path}/a/pool",
        "memory": f"memory://{tmp_path.name}/pool",
        "s3": "s3://bucket/some/pool",
    }[request.param]


every_place = pytest.mark.parametrize("place", ["folder", "file", "memory", "s3"], indirect=True)


@every_place
def test_push_and_pull_reproduce_an_artifact_and_transfer_it_once(artifact, place, tmp_path):
    meter = Meter()
    sent = push_artifact(artifact, place, meter)
    assert meter.count == meter.total > sent.bytes == sent.moved_bytes  # the progress includes the manifest
    assert push(artifact, place).moved_bytes == 0
    back = Meter()
    fetched = pull_artifact(place, tmp_path / "here", back)
    assert back.count == back.total == fetched.moved_bytes == sent.bytes
    assert contents(tmp_path / "here") == contents(artifact)
    assert (
        verify(tmp_path / "here")["content_digest"] == read_manifest(artifact).content_digest == fetched.content_digest
    )
    assert not (tmp_path / "here.part").exists()
    assert pull(place, tmp_path / "here").moved_bytes == 0


@every_place
def test_a_push_repairs_its_artifact_and_does_not_replace_another(artifact, place, tmp_path):
    push(artifact, place)
    remote = open_remote(place)
    remote.write("pool.zarr/image/c/0/0/0/0", artifact / "pool.zarr/image/c/1/0/0/0")
    remote.write("pool.zarr/status/c/0", artifact / "manifest.json")
    remote.remove("pool.zarr/lam/c/0")
    assert push(artifact, place).moved_files == 3
    with pytest.raises(RecipeError, match="contains another artifact"):
        push(write_pool(tmp_path / "other", seed=1), place)
    assert push(artifact, place).moved_files == 0


def test_an_unfinished_push_cannot_be_pulled_and_is_resumed(artifact, place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        push_artifact(artifact, place, Meter(stop_at=5000))
    with pytest.raises(MissingError, match=r"no artifact at .* if a push was interrupted"):
        pull(place, tmp_path / "here")
    assert not (tmp_path / "here.part").exists()
    assert push(artifact, place).moved_files < len(read_manifest(artifact).files)
    assert pull(place, tmp_path / "here").content_digest == read_manifest(artifact).content_digest


def test_a_damaged_artifact_is_not_sent(artifact, place, tmp_path):
    broken = shutil.copytree(artifact, tmp_path / "broken")
    flip(broken / "pool.zarr/image/c/1/0/0/0")
    with pytest.raises(CorruptError, match=r"image/c/1.* is damaged.* It was not sent"):
        push(broken, place)
    with pytest.raises(MissingError):
        pull(place, tmp_path / "here")


def test_a_push_fails_if_a_file_is_damaged_in_two_attempts(artifact, tmp_path, monkeypatch):
    kind = type(open_remote(tmp_path))
    write, count = kind.write, []

    def damage(self, path, source):
        write(self, path, source)
        if path == "pool.zarr/lam/c/0":
            (tmp_path / "stick" / path).write_bytes(bytes(source.stat().st_size))
            count.append(path)

    monkeypatch.setattr(kind, "write", damage)
    with pytest.raises(CorruptError, match=r"lam/c/0' was damaged in two attempts to send it"):
        push(artifact, str(tmp_path / "stick"))
    assert len(count) == 2
    assert not (tmp_path / "stick/manifest.json").exists()


def test_pull_from_a_web_server(web, artifact, tmp_path):
    pull(f"{web.url}/pool/", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)
    paths = [path for path, _ in web.asked]
    assert len(paths) == len(set(paths)) == len(contents(artifact)) - 1  # each once; an empty file needs no request


def test_push_to_a_web_server_is_rejected(web, tmp_path):
    other = write_pool(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="is a web server"):
        push(other, f"{web.url}/new")


def test_a_pull_downloads_only_the_rest_after_a_lost_connection(web, artifact, tmp_path):
    path = "pool/pool.zarr/image/c/1/0/0/0"
    size = (artifact / path.removeprefix("pool/")).stat().st_size
    web.cuts[path] = 1000
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)
    assert [start for asked, start in web.asked if asked == path] == [None, 1000]
    assert web.sent == sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    assert size > 1000


def test_a_file_is_downloaded_again_if_the_server_does_not_support_ranges(web, artifact, tmp_path):
    web.ranges = False
    web.cuts["pool/pool.zarr/image/c/1/0/0/0"] = 1000
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_an_interrupted_pull_is_resumed(web, artifact, tmp_path):
    total = sum(file.bytes for file in read_manifest(artifact).files)
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=total // 2))
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "here.part/content/manifest.json").exists()
    web.sent, web.asked = 0, []
    fetched = pull(f"{web.url}/pool", tmp_path / "here")
    assert 0 < fetched.moved_bytes <= total - total // 2
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_killed_pull_is_resumed(web, artifact, tmp_path):
    code = (
        "import os, sys\nfrom lsmix.data.sharing.transfer import pull_artifact\nfrom pathlib import Path\n"
        "class Kill:\n"
        "  count = 0\n"
        "  def start(self, *_, **__): pass\n"
        "  def advance(self, units=1):\n"
        "    self.count += units\n"
        "    if self.count > 6000: os._exit(9)\n"
        f"pull_artifact({web.url + '/pool'!r}, Path({str(tmp_path / 'here')!r}), Kill())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    web.sent = 0
    fetched = pull(f"{web.url}/pool", tmp_path / "here")
    assert fetched.moved_bytes < fetched.bytes
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_file_with_a_wrong_byte_is_downloaded_again(web, artifact, tmp_path):
    web.flips["pool/pool.zarr/image/c/2/0/0/0"] = 1
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_permanently_wrong_byte_is_one_error_line_with_exit_code_5(web, command, tmp_path):
    path = "pool/pool.zarr/image/c/2/0/0/0"
    web.flips[path] = 99
    result = command("pull", f"{web.url}/pool", tmp_path / "here", "--quiet")
    assert result.code == 5
    assert f"{path}' is damaged: expected sha256" in result.err
    assert "Traceback" not in result.err
    assert len([asked for asked, _ in web.asked if asked == path]) == 2
    assert not (tmp_path / "here").exists()
    web.flips[path] = 0
    pull(f"{web.url}/pool", tmp_path / "here")
    verify(tmp_path / "here")


def test_a_pull_replaces_partial_files_with_wrong_content(web, artifact, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=6000))
    for path in (tmp_path / "here.part").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_rejected(web, tmp_path, change):
    path = Path(web.folder, "pool/pool.zarr/label_a/c/0")
    path.write_bytes(path.read_bytes()[:change] if change < 0 else path.read_bytes() + b"x")
    with pytest.raises(CorruptError, match=r"label_a/c/0' is not the listed file: expected \d+ bytes, got"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_an_error_names_a_missing_file(web, tmp_path):
    Path(web.folder, "pool/pool.zarr/label_a/c/0").unlink()
    with pytest.raises(CorruptError, match=r"label_a/c/0' is missing"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_a_pull_retries_temporary_server_errors(web, tmp_path):
    web.statuses |= {"pool/manifest.json": 503, "pool/pool.zarr/lam/c/0": 429, "pool/pool.zarr/lam/c/1": 500}
    pull(f"{web.url}/pool", tmp_path / "here")
    verify(tmp_path / "here")


def test_errors_of_servers_are_reported(web, tmp_path):
    web.statuses["pool/pool.zarr/lam/c/0"] = 403
    with pytest.raises(DownloadError, match="answers 403"):
        pull(f"{web.url}/pool", tmp_path / "here")
    with pytest.raises(MissingError, match="no artifact at"):
        pull(f"{web.url}/elsewhere", tmp_path / "here2")
    with pytest.raises(DownloadError, match="cannot be reached"):
        pull("http://127.0.0.1:9/pool", tmp_path / "here2")


def rewrite(folder, change):
    """Change the manifest of an artifact like an attacker, with a matching content digest."""
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
    change(manifest["files"])
    lines = [f"{file['sha256']} {file['path']}\n" for file in manifest["files"] if file["payload"]]
    manifest["content_digest"] = hashlib.sha256("".join(sorted(lines, key=lambda line: line[65:])).encode()).hexdigest()
    (folder / "manifest.json").write_bytes(sealed_again(manifest))


HOSTILE = {
    "above": {"path": "../evil"},
    "deep above": {"path": "a/../../evil"},
    "absolute": {"path": "/tmp/evil"},
    "backslash": {"path": "..\\evil"},
    "empty part": {"path": "a//b"},
    "dot": {"path": "./a"},
    "nothing": {"path": ""},
    "zero byte": {"path": "a\0b"},
    "newline": {"path": "a\nb"},
    "manifest": {"path": "manifest.json"},
    "work": {"path": "work/lock"},
    "long": {"path": "a" * 300},
    "deep": {"path": "/".join("a" * 999)},
    "negative": {"bytes": -1},
    "absurd": {"bytes": 2**60},
    "checksum": {"sha256": "../../evil"},
    "short checksum": {"sha256": "ab"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_rejected_before_anything_is_written(web, tmp_path, change):
    rewrite(Path(web.folder, "pool"), lambda files: files[0].update(change))
    with pytest.raises(CorruptError, match=r"Download or rebuild the artifact|is damaged: Expected"):
        pull(f"{web.url}/pool", tmp_path / "in" / "here")
    assert not (tmp_path / "in").exists()
    assert [path for path, _ in web.asked] == ["pool/manifest.json"]


def test_files_listed_twice_or_as_folders_are_rejected(web, tmp_path):
    rewrite(Path(web.folder, "pool"), lambda files: files.append(files[0]))
    with pytest.raises(CorruptError, match="twice"):
        pull(f"{web.url}/pool", tmp_path / "here")
    rewrite(Path(web.folder, "pool"), lambda files: files.pop())
    rewrite(Path(web.folder, "pool"), lambda files: files.append({**files[0], "path": "pool.zarr/lam/c/0/0"}))
    with pytest.raises(CorruptError, match="as a file and a folder"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_invalid_manifests_and_other_versions_are_rejected(web, tmp_path):
    path = Path(web.folder, "pool/manifest.json")
    content = path.read_text()
    for bad in ("{", "[]", "\xff", "[" * 100_000, content.replace('"content_digest":', '"rot":')):
        path.write_text(bad, encoding="latin-1")
        with pytest.raises(CorruptError, match="is damaged"):
            pull(f"{web.url}/pool", tmp_path / "here")
    bare = "{\n" + content.split("\n", 2)[2]  # without its checksum
    path.write_bytes(add_checksum(bare.replace('"format_version": 1', '"format_version": 2').encode()))
    with pytest.raises(FormatError, match="has format 2"):
        pull(f"{web.url}/pool", tmp_path / "here")
    path.write_bytes(add_checksum(bare.replace(msgspec.json.decode(content)["content_digest"], "0" * 64).encode()))
    with pytest.raises(CorruptError, match="content digest does not match"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_a_manifest_is_read_up_to_the_size_limit_only(web, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.cache.MOST_MANIFEST_BYTES", 1000)
    with pytest.raises(CorruptError, match="more than 1,000 bytes"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_links_in_an_unfinished_pull_are_not_followed(web, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=1))
    part = tmp_path / "here.part/content"
    shutil.rmtree(part / "pool.zarr", ignore_errors=True)
    (part / "pool.zarr").symlink_to(outside)
    pull(f"{web.url}/pool", tmp_path / "here")
    assert not any(outside.iterdir())
    verify(tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here.part").symlink_to(outside)
    with pytest.raises(RecipeError, match="was not created by lsmix"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_files_of_an_unfinished_pull_of_another_artifact_are_removed(web, artifact, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=6000))
    stray = tmp_path / "here.part/content/pool.zarr/old/c/0"
    stray.parent.mkdir(parents=True)
    stray.write_text("of another artifact")
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_pull_does_not_change_a_folder_with_other_content(web, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="already contains something else"):
        pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here").keys() == {"thesis.txt"}
    (tmp_path / "new.part/mine").mkdir(parents=True)
    with pytest.raises(RecipeError, match="was not created by lsmix"):
        pull(f"{web.url}/pool", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    pull(f"{web.url}/pool", tmp_path / "empty")


def test_a_pull_reports_a_damaged_artifact_in_the_target(web, tmp_path):
    pull(f"{web.url}/pool", tmp_path / "here")
    path = tmp_path / "here/pool.zarr/lam/c/0"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptError, match=r"lam/c/0.*Remove and pull it again"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_two_pulls_to_one_folder_exclude_each_other(web, tmp_path):
    (tmp_path / "here.part").mkdir()
    with (
        locked_file(tmp_path / "here.part/.lsmix-unfinished", wait=False),
        pytest.raises(LockedError, match="another run"),
    ):
        pull(f"{web.url}/pool", tmp_path / "here")
    pull(f"{web.url}/pool", tmp_path / "here")


def test_a_pull_that_does_not_fit_on_the_disk_is_rejected_first(web, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"needs .* more in .* but only 1.0 kB are free"):
        pull(f"{web.url}/pool", tmp_path / "here")
    assert len(web.asked) == 1


def test_the_default_folder_is_named_after_the_last_part_of_the_url(web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pull(f"{web.url}/pool/").folder == "pool"
    verify("pool")
    with pytest.raises(RecipeError, match="does not end in a valid folder name"):
        pull("memory://")


def test_a_push_is_resumed_after_an_s3_server_stopped(artifact, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)  # s3fs and botocore have their own retries
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server() as server:
        make_bucket("dying")

        class Killing(Meter):
            def advance(self, units=1, note=""):
                super().advance(units)
                if self.count > 4000 and not killed.is_set():
                    killed.set()
                    server.stop()

        killed = threading.Event()
        with pytest.raises(LsmixError, match="cannot be reached"):
            push_artifact(artifact, "s3://dying/pool", Killing())
    with s3_server():  # moto keeps its buckets until the process ends
        rest = push(artifact, "s3://dying/pool")
        assert 0 < rest.moved_bytes < rest.bytes
        assert pull("s3://dying/pool", tmp_path / "here").content_digest == read_manifest(artifact).content_digest


def unimportable(url, **_):
    import s3fs  # noqa: F401  # raises ImportError, as in fsspec

    raise AssertionError(url)


def test_unsupported_urls_and_missing_packages_are_reported(artifact, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="lsmix does not support"):
        push(artifact, "nonsense://a/b")
    with pytest.raises(RecipeError, match="on another host"):
        pull("file://elsewhere/pool", tmp_path / "here")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr("fsspec.core.url_to_fs", unimportable)
    with pytest.raises(LsmixError, match=r"pip install 'lsmix\[s3\]'"):
        push(artifact, "s3://bucket/pool")


def test_paths_and_file_urls_are_local_folders():
    assert local_folder("file:///a%20b/pool") == Path("/a b/pool")
    assert local_folder("runs/x") == Path("runs/x")
    assert local_folder("memory://x") is None


def test_push_and_pull_report_the_transferred_bytes(artifact, command, tmp_path):
    first = command("push", artifact, tmp_path / "stick", "--json", "-q")
    assert first.code == 0
    document = json.loads(first.out)
    assert document["schema"] == "lsmix/push/1"
    assert document["content"]["moved_bytes"] == document["content"]["bytes"]
    second = command("pull", tmp_path / "stick", tmp_path / "here")
    assert second.code == 0
    assert second.out.splitlines()[0].split() == ["artifact", str(tmp_path / "here")]
    assert "all match the manifest (content digest" in second.out
    assert "pull mine: " in second.err
    assert content_digest(read_manifest(tmp_path / "here").files) == document["content"]["content_digest"]


def test_local_data_are_opened_and_pulled_without_heavy_imports(artifact, tmp_path):
    code = (
        "import sys\nimport lsmix.data.latents\nfrom lsmix.data.pool import open_pool\nopen_pool(sys.argv[1])\n"
        "remote = {'fsspec', 'urllib.request', 'lsmix.data.remote', 'concurrent.futures'}\n"
        "assert not {'zarr', 'dask', 'torch', *remote} & {*sys.modules}, {*sys.modules}\n"
        "import lsmix.data.dataset, lsmix.data.readers.registry\nfrom lsmix.pipeline.api import pull\npull(*sys.argv[1:])\n"
        "assert not {'zarr', 'dask', 'torch', 'fsspec', 'aiohttp'} & {*sys.modules}, {*sys.modules}"
    )
    words = [sys.executable, "-c", code, artifact, tmp_path / "here"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
