"""Push and pull: only what is missing, every byte checked, the manifest last, and nothing outside of the folder."""

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
    """A web server with the artifact as "pool"; what is served may be changed."""
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
def test_a_pushed_and_pulled_artifact_is_the_same_and_moves_once(artifact, place, tmp_path):
    meter = Meter()
    sent = push_artifact(artifact, place, meter)
    assert meter.count == meter.total > sent.bytes == sent.moved_bytes  # the manifest counts too
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
def test_a_push_repairs_missing_and_wrong_files_and_replaces_no_other_artifact(artifact, place, tmp_path):
    push(artifact, place)
    there = open_remote(place)
    there.write("pool.zarr/image/c/0/0/0/0", artifact / "pool.zarr/image/c/1/0/0/0")
    there.write("pool.zarr/status/c/0", artifact / "manifest.json")
    there.remove("pool.zarr/lam/c/0")
    assert push(artifact, place).moved_files == 3
    with pytest.raises(RecipeError, match="holds another artifact"):
        push(write_pool(tmp_path / "other", seed=1), place)
    assert push(artifact, place).moved_files == 0


def test_an_unfinished_push_is_no_artifact_and_goes_on(artifact, place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        push_artifact(artifact, place, Meter(stop_at=5000))
    with pytest.raises(MissingError, match=r"no artifact at .* unfinished"):
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


def test_a_file_that_arrives_damaged_twice_ends_the_push(artifact, tmp_path, monkeypatch):
    kind = type(open_remote(tmp_path))
    write, count = kind.write, []

    def damage(self, path, source):
        write(self, path, source)
        if path == "pool.zarr/lam/c/0":
            (tmp_path / "stick" / path).write_bytes(bytes(source.stat().st_size))
            count.append(path)

    monkeypatch.setattr(kind, "write", damage)
    with pytest.raises(CorruptError, match=r"lam/c/0' is damaged after it was sent, twice"):
        push(artifact, str(tmp_path / "stick"))
    assert len(count) == 2
    assert not (tmp_path / "stick/manifest.json").exists()


def test_a_web_server_is_pulled_from(web, artifact, tmp_path):
    pull(f"{web.url}/pool/", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)
    paths = [path for path, _ in web.asked]
    assert len(paths) == len(set(paths)) == len(contents(artifact)) - 1  # each once; an empty file needs no request


def test_a_web_server_is_not_pushed_to(web, tmp_path):
    other = write_pool(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match="is a web server"):
        push(other, f"{web.url}/new")


def test_only_the_rest_is_fetched_after_the_connection_was_cut(web, artifact, tmp_path):
    path = "pool/pool.zarr/image/c/1/0/0/0"
    size = (artifact / path.removeprefix("pool/")).stat().st_size
    web.cuts[path] = 1000
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)
    assert [start for asked, start in web.asked if asked == path] == [None, 1000]
    assert web.sent == sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    assert size > 1000


def test_a_server_without_ranges_is_read_from_the_beginning(web, artifact, tmp_path):
    web.ranges = False
    web.cuts["pool/pool.zarr/image/c/1/0/0/0"] = 1000
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_pull_goes_on_where_it_was_stopped(web, artifact, tmp_path):
    total = sum(file.bytes for file in read_manifest(artifact).files)
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=total // 2))
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "here.part/content/manifest.json").exists()
    web.sent, web.asked = 0, []
    fetched = pull(f"{web.url}/pool", tmp_path / "here")
    assert 0 < fetched.moved_bytes <= total - total // 2
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_pull_goes_on_after_it_was_killed(web, artifact, tmp_path):
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


def test_a_wrong_byte_is_fetched_once_more(web, artifact, tmp_path):
    web.flips["pool/pool.zarr/image/c/2/0/0/0"] = 1
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_byte_that_stays_wrong_is_one_sentence_and_exit_code_5(web, command, tmp_path):
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


def test_a_wrong_beginning_of_a_file_is_removed(web, artifact, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=6000))
    for path in (tmp_path / "here.part").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(web, tmp_path, change):
    path = Path(web.folder, "pool/pool.zarr/label_a/c/0")
    path.write_bytes(path.read_bytes()[:change] if change < 0 else path.read_bytes() + b"x")
    with pytest.raises(CorruptError, match=r"label_a/c/0' is not the listed file: expected \d+ bytes, got"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_a_file_that_is_gone_is_named(web, tmp_path):
    Path(web.folder, "pool/pool.zarr/label_a/c/0").unlink()
    with pytest.raises(CorruptError, match=r"label_a/c/0' is missing"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_a_server_that_is_busy_is_asked_again(web, tmp_path):
    web.statuses |= {"pool/manifest.json": 503, "pool/pool.zarr/lam/c/0": 429, "pool/pool.zarr/lam/c/1": 500}
    pull(f"{web.url}/pool", tmp_path / "here")
    verify(tmp_path / "here")


def test_a_server_that_refuses_or_is_gone_is_named(web, tmp_path):
    web.statuses["pool/pool.zarr/lam/c/0"] = 403
    with pytest.raises(DownloadError, match="answers 403"):
        pull(f"{web.url}/pool", tmp_path / "here")
    with pytest.raises(MissingError, match="no artifact at"):
        pull(f"{web.url}/elsewhere", tmp_path / "here2")
    with pytest.raises(DownloadError, match="cannot be reached"):
        pull("http://127.0.0.1:9/pool", tmp_path / "here2")


def rewrite(folder, change):
    """Change the manifest of an artifact as somebody hostile might, with a fitting content digest."""
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
def test_a_hostile_manifest_is_refused_before_anything_is_written(web, tmp_path, change):
    rewrite(Path(web.folder, "pool"), lambda files: files[0].update(change))
    with pytest.raises(CorruptError, match=r"Do not use this artifact|is damaged: Expected"):
        pull(f"{web.url}/pool", tmp_path / "in" / "here")
    assert not (tmp_path / "in").exists()
    assert [path for path, _ in web.asked] == ["pool/manifest.json"]


def test_files_listed_twice_or_as_folders_are_refused(web, tmp_path):
    rewrite(Path(web.folder, "pool"), lambda files: files.append(files[0]))
    with pytest.raises(CorruptError, match="twice"):
        pull(f"{web.url}/pool", tmp_path / "here")
    rewrite(Path(web.folder, "pool"), lambda files: files.pop())
    rewrite(Path(web.folder, "pool"), lambda files: files.append({**files[0], "path": "pool.zarr/lam/c/0/0"}))
    with pytest.raises(CorruptError, match="as a file and a folder"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_a_manifest_that_is_none_or_of_another_version_is_refused(web, tmp_path):
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
    path.write_bytes(add_checksum(bare.replace(read_manifest_root(content), "0" * 64).encode()))
    with pytest.raises(CorruptError, match="content digest does not fit"):
        pull(f"{web.url}/pool", tmp_path / "here")


def read_manifest_root(content):
    return msgspec.json.decode(content)["content_digest"]


def test_an_endless_manifest_is_not_read_to_its_end(web, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.cache.MOST_MANIFEST_BYTES", 1000)
    with pytest.raises(CorruptError, match="more than 1000 bytes"):
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
    with pytest.raises(RecipeError, match="in the way"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_files_of_an_unfinished_pull_of_another_artifact_are_removed(web, artifact, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pull_artifact(f"{web.url}/pool", tmp_path / "here", Meter(stop_at=6000))
    stray = tmp_path / "here.part/content/pool.zarr/old/c/0"
    stray.parent.mkdir(parents=True)
    stray.write_text("of another artifact")
    pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here") == contents(artifact)


def test_a_folder_that_holds_something_else_is_left_alone(web, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something else"):
        pull(f"{web.url}/pool", tmp_path / "here")
    assert contents(tmp_path / "here").keys() == {"thesis.txt"}
    (tmp_path / "new.part/mine").mkdir(parents=True)
    with pytest.raises(RecipeError, match="in the way"):
        pull(f"{web.url}/pool", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    pull(f"{web.url}/pool", tmp_path / "empty")


def test_a_damaged_copy_in_the_target_is_named(web, tmp_path):
    pull(f"{web.url}/pool", tmp_path / "here")
    path = tmp_path / "here/pool.zarr/lam/c/0"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptError, match=r"lam/c/0.*Remove it and pull again"):
        pull(f"{web.url}/pool", tmp_path / "here")


def test_two_pulls_to_one_folder_exclude_each_other(web, tmp_path):
    (tmp_path / "here.part").mkdir()
    with (
        locked_file(tmp_path / "here.part/.lsmix-unfinished", wait=False),
        pytest.raises(LockedError, match="another run"),
    ):
        pull(f"{web.url}/pool", tmp_path / "here")
    pull(f"{web.url}/pool", tmp_path / "here")


def test_an_artifact_that_does_not_fit_is_refused_first(web, tmp_path, monkeypatch):
    facts = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: facts._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"needs \d+ more bytes .* where 1000 are free"):
        pull(f"{web.url}/pool", tmp_path / "here")
    assert len(web.asked) == 1


def test_without_a_folder_the_last_part_of_the_url_is_its_name(web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pull(f"{web.url}/pool/").folder == "pool"
    verify("pool")
    with pytest.raises(RecipeError, match="does not end in a name"):
        pull("memory://")


def test_a_push_goes_on_after_an_s3_server_died(artifact, tmp_path, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)  # it has a patience of its own, and so has botocore
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
    with s3_server():  # moto keeps its buckets while the process lives
        rest = push(artifact, "s3://dying/pool")
        assert 0 < rest.moved_bytes < rest.bytes
        assert pull("s3://dying/pool", tmp_path / "here").content_digest == read_manifest(artifact).content_digest


def unimportable(url, **_):
    import s3fs  # noqa: F401  # which raises, as in fsspec

    raise AssertionError(url)


def test_urls_that_nothing_reads_are_refused(artifact, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="lsmix does not read"):
        push(artifact, "nonsense://a/b")
    with pytest.raises(RecipeError, match="on another host"):
        pull("file://elsewhere/pool", tmp_path / "here")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr("fsspec.core.url_to_fs", unimportable)
    with pytest.raises(LsmixError, match=r"pip install 'lsmix\[s3\]'"):
        push(artifact, "s3://bucket/pool")


def test_folders_and_file_urls_are_folders():
    assert local_folder("file:///a%20b/pool") == Path("/a b/pool")
    assert local_folder("runs/x") == Path("runs/x")
    assert local_folder("memory://x") is None


def test_commands_say_what_was_moved(artifact, command, tmp_path):
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
