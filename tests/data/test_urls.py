"""Every command that takes an artifact takes a URL of one: the same result, the URL's name in every error, nothing twice."""

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from guarded import sealed_again
from places import Meter, make_bucket, s3_server, web_server, write_pool

import lsmix
from lsmix.data import cache as fetch
from lsmix.data.artifact import DESCRIPTION_FILES, read_manifest, verify_files
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    DownloadError,
    FormatError,
    LockedError,
    MissingError,
    RecipeError,
)
from lsmix.data.pool import open_pool
from lsmix.data.progress import NullProgress
from lsmix.data.remote import open_remote
from lsmix.data.sharing import store as fetched
from lsmix.data.sharing.store import download_artifact, fresh_download
from lsmix.pipeline.api import plan, pull, push, run, verify
from lsmix.pipeline.export import export_pool
from lsmix.pipeline.verify.rebuild import rebuild
from lsmix.pipeline.views.dataset_card.card import write_card
from lsmix.pipeline.views.show import draw_artifact

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*utcnow.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"),
]
KINDS = ("file", "memory", "s3", "web")
SHARD = "pool.zarr/image/c/0/0/0/0"


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Let each test have a cache and a current folder of its own, and wait for nothing."""
    monkeypatch.setattr(fetch, "_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(fetched, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LSMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    forget(tmp_path)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def made(finished_workspace):
    """The folders of a pool, its flow and its data set."""

    def one(stage, name):
        (folder,) = (finished_workspace / stage).glob(f"{name}-*")
        return folder

    return {"pool": one("mix", "lsmix"), "flow": one("train-glow", "tiny"), "data": one("ingest", "tiny")}


class There:
    """Artifacts at a place, by name: their URLs, and how to change what lies there."""

    def __init__(self, kind, base, folder):
        self.kind, self.base, self._folder = kind, base, folder
        self.server = None

    def __getitem__(self, name):
        return f"{self.base}/{name}"

    def put(self, name, folder):
        if self._folder:
            shutil.copytree(folder, self._folder / name)
        else:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    open_remote(self[name]).write(path.relative_to(folder).as_posix(), path)

    def change(self, name, path, change):
        """Put another file in the place of one."""
        place = open_remote(self._folder / name if self._folder else self[name])
        changed = Path("changed")
        changed.write_bytes(change(place.read(path, 1 << 30)))
        place.write(path, changed)

    def read(self, name, path):
        return open_remote(self._folder / name if self._folder else self[name]).read(path, 1 << 30)


@pytest.fixture(params=KINDS)
def there(request, tmp_path):
    kind = request.param
    if kind == "web":
        with web_server(tmp_path / "www") as server:
            found = There(kind, server.url, tmp_path / "www")
            found.server = server
            yield found
        return
    if kind == "s3":
        request.getfixturevalue("s3")
        make_bucket("bucket")
    base = {"file": f"file://{tmp_path}/far", "memory": f"memory://{tmp_path.name}", "s3": "s3://bucket/some"}[kind]
    yield There(kind, base, tmp_path / "far" if kind == "file" else None)


@pytest.fixture
def web(tmp_path):
    """A web server, and a small pool on it as "pool"."""
    folder = write_pool(tmp_path / "www" / "pool")
    with web_server(tmp_path / "www") as server:
        server.artifact = folder
        yield server


def flipped(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def forget(tmp_path):
    """Let go of all copies, and remove them."""
    for copy in fetched._copies.values():
        copy.lock.close()
    fetched._copies.clear()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def copies(tmp_path):
    home = tmp_path / "cache/artifacts"
    return sorted(path.name for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Every command, with a URL for every artifact.


def test_every_command_does_with_urls_what_it_does_with_folders(there, made, command, tmp_path):
    for name, folder in made.items():
        there.put(name, folder)
    pool, data, flow = there["pool"], there["data"] + "/dataset.h5", there["flow"]

    shown = command("show", pool, "--sheet", "s.png", "--html", "p.html", "--data", data)
    near = command("show", made["pool"], "--sheet", "n.png", "--html", "q.html", "--data", made["data"])
    assert shown.code == 0, shown.err
    assert shown.out == near.out.replace("n.png", "s.png").replace("q.html", "p.html").replace(
        "x₁ | mixes at growing λ | x₂", "images of the pool by growing share of the second"
    )
    assert Path("p.html").read_bytes() == Path("q.html").read_bytes()

    checked = command("verify", pool, "--data", data, "--flow", flow, "--deep", "--sample", "20", "--device", "cpu")
    assert checked.code == 0, checked.err
    assert str(tmp_path / "cache") not in checked.out
    if there.kind != "file":
        assert checked.out.startswith(f"{pool}: ")
        assert f"those of the data set '{there['data']}'" in checked.out
        assert "not checked  files that were added" in checked.out

    assert command("export", pool, "near", "--format", "hdf5", "-q").code == 0
    there.put("exported", Path("near"))
    assert command("verify", there["exported"]).code == 0

    sent = command("push", pool, f"memory://{tmp_path.name}-other/pool", "-q")
    assert sent.code == 0, sent.err
    assert pull(f"memory://{tmp_path.name}-other/pool", "back").root == read_manifest(made["pool"]).root

    for index, named in enumerate((pool, f"{pool}/plan.json")):
        words = ("--data", data, "--flow", flow, "--compare", pool, "--out", f"rebuilt{index}", "--device", "cpu", "-q")
        rebuilt = command("rebuild", named, *words)
        assert rebuilt.code == 0, rebuilt.err
        assert "equal to the original's" in rebuilt.out
    assert not any(path.name.endswith(":") for path in Path.cwd().iterdir())


def test_a_flow_at_a_url_encodes_as_the_one_in_a_folder(there, made, tmp_path):
    there.put("flow", made["flow"])
    images = lsmix.open_pool(made["pool"]).image[:4]
    np.testing.assert_array_equal(
        lsmix.load_flow(there["flow"]).encode(images), lsmix.load_flow(made["flow"]).encode(images)
    )


def test_a_recipe_that_names_a_flow_by_its_url_makes_the_same_latents_and_pools(
    there, made, tiny_recipe, tiny_workspace, command
):
    there.put("flow", made["flow"])
    shutil.rmtree(tiny_workspace / "train-glow")
    words = ("--workspace", tiny_workspace, "--set", f"flow.path={there['flow']}")
    status = command("status", tiny_recipe, *words, "--json")
    assert status.code == 0, status.err
    states = {(node["stage"], node["state"]) for node in msgspec.json.decode(status.out)["content"]}
    assert {("encode", "cached"), ("mix", "cached")} < states
    assert {stage for stage, _ in states}.isdisjoint({"train-glow"})
    pools = run(tiny_recipe, workspace=tiny_workspace, stage="mix", overrides=[f"pools.zero.flow={there['flow']}"])
    assert all(item.cached for item in pools.built if item.stage in ("encode", "mix") and item.name != "zero")


def test_the_card_of_a_pool_at_a_url_is_that_of_a_pool_which_came_alone(there, made, command, tmp_path):
    there.put("pool", made["pool"])
    before = there.read("pool", "manifest.json")
    done = command("card", there["pool"], tmp_path / "written", "--creator", "Ann", "--json")
    assert done.code == 0, done.err
    write_card(shutil.copytree(made["pool"], tmp_path / "near" / "pool"), tmp_path / "near" / "card", creator="Ann")
    assert contents(tmp_path / "written").keys() == contents(tmp_path / "near" / "card").keys()
    assert (tmp_path / "written" / "croissant.json").read_bytes() == (
        tmp_path / "near/card/croissant.json"
    ).read_bytes()
    assert there.read("pool", "manifest.json") == before


# What goes wrong.

COMMANDS = {
    "show": ("show", "URL"),
    "verify": ("verify", "URL"),
    "export": ("export", "URL", "out", "--format", "hdf5"),
    "card": ("card", "URL"),
    "push": ("push", "URL", "out"),
    "rebuild": ("rebuild", "URL", "--data", "digits", "--out", "out"),
    "rebuild of a file": ("rebuild", "URL/plan.json", "--data", "digits", "--out", "out"),
}
WRONG = {
    "no bucket": ("s3://no-such-bucket/pool", r"is not there"),
    "no artifact": ("s3://bucket/nothing", r"is not there"),
    "unknown kind": ("nonsense://bucket/pool", r"lsmix does not read"),
    "no package": ("gs://bucket/pool", r"needs a package that is not installed"),
    "no host": ("http://127.0.0.1:9/pool", r"cannot be reached|is a web server"),
    "other host": ("file://elsewhere/pool", r"names a file on another host"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_url_is_one_sentence_that_names_it(words, wrong, s3, command, tmp_path):
    url, message = wrong
    make_bucket("bucket")
    result = command(*(word.replace("URL", url) for word in words))
    assert (result.code, result.out) == (1, ""), result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert url in last
    assert __import__("re").search(message, last), last
    assert "Traceback" not in result.err
    assert list(Path.cwd().iterdir()) == []
    assert copies(tmp_path) == []


class _Refusing(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET


@contextmanager
def refusing_server(monkeypatch):
    """Let S3 be a server that refuses everybody."""
    from fsspec.config import conf

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setitem(
            conf, "s3", {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "key": "a", "secret": "b"}
        )
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_refused_credentials_are_told(words, command, monkeypatch):
    with refusing_server(monkeypatch):
        result = command(*(word.replace("URL", "s3://theirs/pool") for word in words))
    assert result.code == 1
    assert "'s3://theirs/pool/" in result.err
    assert "is refused: " in result.err
    assert "Check the URL and your credentials" in result.err


@pytest.mark.parametrize("words", [words for words in COMMANDS.values() if words[0] not in ("rebuild",)])
def test_a_damaged_file_there_is_exit_code_5_and_named_by_its_url(words, s3, made, command, tmp_path):
    make_bucket("bucket")
    found = There("s3", "s3://bucket", None)
    found.put("pool", made["pool"])
    found.change("pool", SHARD, flipped)
    result = command(*(word.replace("URL", found["pool"]) for word in words))
    assert (result.code, result.out) == (5, "")
    assert f"'s3://bucket/pool/{SHARD}' is damaged: expected sha256" in result.err
    assert str(tmp_path / "cache") not in result.err
    assert list(Path.cwd().glob("out*")) == []


def test_damage_of_what_a_rebuild_is_given_is_found(there, made, tmp_path):
    for name, folder in made.items():
        there.put(name, folder)
    for name, path in (("data", "dataset.h5"), ("flow", "glow.safetensors"), ("pool", "plan.json")):
        forget(tmp_path)
        whole = there.read(name, path)
        there.change(name, path, flipped)
        with pytest.raises(CorruptError) as error:
            rebuild(there["pool"], data=there["data"], flow=there["flow"], out=tmp_path / "out", device="cpu")
        assert f"{name}/{path}" in str(error.value) or there.kind == "file"
        assert str(tmp_path / "cache") not in str(error.value)
        there.change(name, path, lambda _, whole=whole: whole)


def test_errors_about_a_copy_name_the_url(there, made, tmp_path):
    for name, folder in made.items():
        there.put(name, folder)
    with pytest.raises(FormatError, match=f"{there['flow'].removeprefix('file://')}' holds .* only pools have a card"):
        write_card(there["flow"]) if there.kind != "web" else export_like_card(there["flow"])
    with pytest.raises(RecipeError, match="is no pool but the result of stage 'train-glow'") as told:
        verify(there["flow"], deep=True)
    assert there["flow"].removeprefix("file://") in str(told.value)
    with pytest.raises(MissingError, match="is no flow but the result of stage 'ingest'") as told:
        verify(there["pool"], flow=there["data"])
    assert there["data"].removeprefix("file://") in str(told.value)
    assert str(tmp_path / "cache") not in str(told.value)


def export_like_card(url):
    """A page of a flow is refused with the same words as its card, where there is nothing to write to."""
    try:
        draw_artifact(url, html="page.html")
    except FormatError as error:
        raise FormatError(f"{url}' holds, said as: {error}; only pools have a card") from error


# Copies: complete, shared, bounded.


def test_what_is_there_is_not_fetched_again(web):
    url = f"{web.url}/pool"
    first = download_artifact(url, NullProgress())
    assert contents(first) == contents(web.artifact)
    web.asked.clear()
    assert download_artifact(f"{url}/", NullProgress()) == first
    assert [path for path, _ in web.asked] == ["pool/manifest.json"]


def test_a_path_is_a_path_and_a_file_url_its_folder(tmp_path):
    assert download_artifact("runs/x", NullProgress()) == Path("runs/x")
    assert download_artifact(tmp_path, NullProgress()) == tmp_path
    assert download_artifact(f"file://{tmp_path}/a%20b", NullProgress()) == tmp_path / "a b"
    assert copies(tmp_path) == []


def test_what_changed_there_is_another_copy(web, tmp_path):
    first = download_artifact(f"{web.url}/pool", NullProgress())
    shutil.rmtree(web.artifact)
    write_pool(web.artifact, seed=1)
    second = download_artifact(f"{web.url}/pool", NullProgress())
    assert first != second
    assert contents(second) == contents(web.artifact)
    assert read_manifest(first).root != read_manifest(second).root
    assert len(copies(tmp_path)) == 2


def cut(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def add_to_manifest(folder):
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes() + b" ")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        add_to_manifest,
        lambda folder: (folder / SHARD).unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
    ids=["cut", "manifest", "missing", "no manifest"],
)
def test_a_copy_that_is_not_whole_is_fetched_anew(web, damage):
    folder = download_artifact(f"{web.url}/pool", NullProgress())
    damage(folder)
    assert download_artifact(f"{web.url}/pool", NullProgress()) == folder
    assert contents(folder) == contents(web.artifact)


def test_a_copy_that_is_damaged_while_another_process_uses_it_is_told(web, monkeypatch):
    folder = download_artifact(f"{web.url}/pool", NullProgress())
    held = fetched._copies.pop(folder)
    cut(folder)
    with pytest.raises(LockedError, match=f"of '{web.url}/pool' is damaged, and another process uses it"):
        download_artifact(f"{web.url}/pool", NullProgress())
    held.lock.close()
    verify_files(download_artifact(f"{web.url}/pool", NullProgress()), read_manifest(web.artifact))


def test_a_copy_whose_bytes_flipped_is_named_beside_its_url(web, tmp_path):
    url = f"{web.url}/pool"
    folder = download_artifact(url, NullProgress())
    (folder / SHARD).write_bytes(flipped((folder / SHARD).read_bytes()))
    with pytest.raises(CorruptError, match=f"'{url}/{SHARD}.* Its copy here is '{folder}'; if that was damaged"):
        export_pool(url, tmp_path / "out", format="hdf5")


def test_a_fetch_goes_on_where_it_was_stopped(web, command):
    total = sum(file.bytes for file in read_manifest(web.artifact).files)
    with pytest.raises(KeyboardInterrupt):
        download_artifact(f"{web.url}/pool", Meter(stop_at=total // 2))
    web.sent = 0
    assert command("push", f"{web.url}/pool", "out", "-q").code == 0
    assert 0 < web.sent <= total - total // 2 + (web.artifact / "manifest.json").stat().st_size


FETCH = (
    "import os, sys\nfrom lsmix.data.sharing.store import download_artifact\n"
    "class Meter:\n"
    "  count = 0\n"
    "  def info(self, message): print(message)\n"
    "  def start(self, *_, **__): pass\n"
    "  def finish(self): pass\n"
    "  def advance(self, units=1):\n"
    "    self.count += units\n"
    "    if self.count > int(sys.argv[2]): os._exit(9)\n"
    "print(download_artifact(sys.argv[1], Meter()), flush=True)\n"
    "sys.stdin.read()\n"
)


def started(url, stop_at=1 << 40):
    words = [sys.executable, "-c", FETCH, url, str(stop_at)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_fetch_goes_on_after_it_was_killed(web, tmp_path):
    killed = started(f"{web.url}/pool", 6000)
    assert (killed.wait(), killed.communicate()[0]) == (9, "")
    web.sent = 0
    folder = download_artifact(f"{web.url}/pool", NullProgress())
    assert contents(folder) == contents(web.artifact)
    assert web.sent < sum(file.bytes for file in read_manifest(web.artifact).files)


def test_processes_that_want_the_same_fetch_it_once(web, tmp_path):
    processes = [started(f"{web.url}/pool") for _ in range(4)]
    said = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(said)) == 1
    assert contents(Path(said[0])) == contents(web.artifact)
    files = [path for path, _ in web.asked if not path.endswith("/manifest.json")]
    assert len(files) == len(set(files))


def fetched_and_let_go(url):
    folder = download_artifact(url, NullProgress())
    fetched._copies.pop(folder).lock.close()
    return folder


def test_copies_used_longest_ago_go_but_never_one_that_is_used(web, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in web.artifact.rglob("*") if path.is_file())
    monkeypatch.setattr(fetched, "_KEPT_BYTES", 3 * size)
    urls = [f"{web.url}/pool{number}" for number in range(5)]
    for number in range(5):
        shutil.copytree(web.artifact, web.folder / f"pool{number}")
    user = started(urls[0])
    used = Path(user.stdout.readline().strip())
    for url in urls[1:3]:
        fetched_and_let_go(url)
    for lock in used.parent.glob("*.lock"):
        os.utime(lock, (0, 0))
    fetched_and_let_go(urls[1])  # so that pool2 is the one asked for longest ago, but for the one in use
    assert [name[:5] for name in copies(tmp_path)] == ["pool0", "pool1", "pool2"]
    fetched_and_let_go(urls[3])
    assert [name[:5] for name in copies(tmp_path)] == ["pool0", "pool1", "pool3"]
    assert contents(used) == contents(web.artifact)
    user.communicate()
    fetched_and_let_go(urls[4])  # pool0 still has the time that it was given above
    assert [name[:5] for name in copies(tmp_path)] == ["pool1", "pool3", "pool4"]
    locks = sorted(path.name[:5] for path in used.parent.glob("*.lock"))
    assert locks == ["pool1", "pool3", "pool4"]


def test_what_killed_fetches_left_goes_when_room_is_needed(web, tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "_KEPT_BYTES", 0)
    shutil.copytree(web.artifact, web.folder / "other")
    assert started(f"{web.url}/other", 6000).wait() == 9
    assert [name[-5:] for name in copies(tmp_path)] == [".part"]
    folder = download_artifact(f"{web.url}/pool", NullProgress())  # larger than the limit, and fetched all the same
    assert copies(tmp_path) == [folder.name]


def test_a_disk_without_room_is_told_with_the_url_and_where_copies_lie(web, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DiskSpaceError, match=f"'{web.url}/pool' needs a copy .* LSMIX_CACHE says where copies lie"):
        download_artifact(f"{web.url}/pool", NullProgress())


def test_a_hostile_name_in_a_url_stays_in_the_cache(web, tmp_path):
    (web.folder / "..." / "x").mkdir(parents=True)
    shutil.copytree(web.artifact, web.folder / "a b" / "..;é")
    folder = download_artifact(f"{web.url}/a%20b/..;%C3%A9", NullProgress())
    assert folder.parent == tmp_path / "cache/artifacts"
    assert verify_files(folder, read_manifest(folder))


# Verify: what lies there.


def test_verify_looks_at_what_lies_there_and_not_at_a_copy(there, made, tmp_path):
    there.put("pool", made["pool"])
    download_artifact(there["pool"], NullProgress())
    assert verify(there["pool"])["root"] == read_manifest(made["pool"]).root
    there.change("pool", SHARD, flipped)
    with pytest.raises(CorruptError, match=f"{SHARD}' is damaged: expected sha256"):
        verify(there["pool"])
    assert not [name for name in copies(tmp_path) if name.startswith(".fresh-")]


def test_a_verify_that_was_killed_leaves_nothing_for_long(web, tmp_path):
    code = (
        "import os, sys\nfrom lsmix.data.progress import NullProgress\nfrom lsmix.data.sharing.store import fresh_download\n"
        "with fresh_download(sys.argv[1], NullProgress()): os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, f"{web.url}/pool"], check=False).returncode == 9
    assert [name[:7] for name in copies(tmp_path)] == [".fresh-"]
    with fresh_download(f"{web.url}/pool", NullProgress()) as folder:
        assert copies(tmp_path) == [folder.name]
    assert copies(tmp_path) == []
    assert [path.name for path in (tmp_path / "cache/artifacts").iterdir()] == ["room"]


@pytest.mark.parametrize("form", ["hdf5", "folder"])
def test_an_export_at_a_url_is_verified_file_by_file(there, form, invented_pool, tmp_path):
    export_pool(invented_pool(), tmp_path / "out", format=form)
    there.put("out", tmp_path / "out")
    facts = verify(there["out"])
    assert (facts["stage"], facts["files"]) == ("export", verify(tmp_path / "out")["files"])
    assert there.kind == "file" or facts["folder"] == there["out"]
    name = next(path for path in contents(tmp_path / "out") if path.endswith((".h5", "0.png")))
    for path in (name, "SHA256SUMS"):
        whole = there.read("out", path)
        there.change("out", path, flipped)
        with pytest.raises(CorruptError) as error:
            verify(there["out"])
        assert there["out"].removeprefix("file://") in str(error.value)
        assert str(tmp_path / "cache") not in str(error.value)
        there.change("out", path, lambda _, whole=whole: whole)
    there.change("out", name, lambda content: content[:-1])
    with pytest.raises(CorruptError, match=r"is damaged|bytes"):
        verify(there["out"])


def test_an_export_whose_manifest_leads_elsewhere_is_refused_before_anything_is_written(web, invented_pool, tmp_path):
    export_pool(invented_pool(), web.folder / "out", format="hdf5")
    place = web.folder / "out/manifest.json"
    for path in ("../evil", "/tmp/evil", "a\\b", "manifest.json", "x" * 300):
        content = msgspec.json.decode(place.read_bytes())
        content["files"][0]["path"] = path
        place.write_bytes(sealed_again(content))
        with pytest.raises(CorruptError):
            verify(f"{web.url}/out")
        assert copies(tmp_path) == []
        assert not (tmp_path / "evil").exists()


def test_a_file_that_an_export_lacks_is_named(web, invented_pool, tmp_path):
    export_pool(invented_pool(), web.folder / "out", format="parquet")
    (name,) = (path.name for path in (web.folder / "out").glob("*.parquet"))
    (web.folder / "out" / name).unlink()
    with pytest.raises(CorruptError, match=f"'{web.url}/out/{name}' is missing"):
        verify(f"{web.url}/out")


# Cards: of a pool at a URL, and beside a pool that is pushed.


@pytest.fixture
def far_pool(made, tmp_path):
    push(made["pool"], f"memory://{tmp_path.name}/pool")
    return f"memory://{tmp_path.name}/pool"


def test_a_card_is_written_of_a_pool_at_a_url_and_changes_nothing_there(far_pool, tmp_path):
    before = open_remote(far_pool).read("manifest.json", 1 << 20)
    facts = write_card(far_pool, tmp_path / "card", licence="MIT")
    assert verify(tmp_path / "card")["edited"] == []
    assert facts["root"] == read_manifest(tmp_path / "card").inputs[0].root == open_pool(far_pool).manifest.root
    assert open_remote(far_pool).read("manifest.json", 1 << 20) == before


def test_a_pool_is_pushed_with_its_card_in_the_manifest_and_the_same_root(far_pool, made):
    sent, here = open_pool(far_pool).manifest, read_manifest(made["pool"])
    assert sent.root == here.root
    listed = {file.path for file in sent.files}
    assert listed == {file.path for file in here.files} | set(DESCRIPTION_FILES)
    assert b"## Statistics" in open_remote(far_pool).read("README.md", 1 << 20)
    assert b"## Statistics" not in (made["pool"] / "README.md").read_bytes()
    assert verify(far_pool)["edited"] == []


def test_a_pool_is_pushed_again_with_another_card_and_only_that_is_sent(far_pool, made, tmp_path, monkeypatch):
    write_card(made["pool"], tmp_path / "card", licence="MIT", creator="Ann")
    kind, sent = type(open_remote(far_pool)), []
    write = kind.write
    monkeypatch.setattr(kind, "write", lambda self, path, source: (sent.append(path), write(self, path, source)))
    push(made["pool"], far_pool, card=tmp_path / "card")
    assert sent[-1] == "manifest.json"
    assert sorted(sent[:-1]) == ["LICENSES/images.txt", "README.md", "croissant.json"]
    assert b"Ann" in open_remote(far_pool).read("croissant.json", 1 << 20)
    assert verify(far_pool)["edited"] == []
    sent.clear()
    push(made["pool"], far_pool, card=tmp_path / "card")
    assert sent == []


@pytest.mark.parametrize("at", range(4))
def test_a_push_of_another_card_that_was_stopped_leaves_a_pool_that_verifies(far_pool, made, tmp_path, monkeypatch, at):
    write_card(made["pool"], tmp_path / "card", licence="MIT")
    kind, sent = type(open_remote(far_pool)), []
    write, root = kind.write, open_pool(far_pool).manifest.root

    def stop(self, path, source):
        if len(sent) == at:
            raise KeyboardInterrupt
        sent.append(path)
        write(self, path, source)

    monkeypatch.setattr(kind, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        push(made["pool"], far_pool, card=tmp_path / "card")
    monkeypatch.setattr(kind, "write", write)
    assert verify(far_pool)["root"] == root
    push(made["pool"], far_pool, card=tmp_path / "card")
    assert verify(far_pool)["edited"] == []
    assert b"MIT" in open_remote(far_pool).read("README.md", 1 << 20)


def test_the_card_of_another_pool_is_refused(made, invented_pool, tmp_path):
    write_card(invented_pool(), tmp_path / "card")
    with pytest.raises(RecipeError, match="is no card of"):
        push(made["pool"], f"memory://{tmp_path.name}/other", card=tmp_path / "card")
    with pytest.raises(RecipeError, match="is no card of"):
        push(made["pool"], f"memory://{tmp_path.name}/other", card=made["pool"])


# Results stay here.


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("export", "POOL", "s3://bucket/out", "--format", "hdf5"), "an export"),
        (("rebuild", "POOL", "--data", "digits", "--out", "s3://bucket/out"), "a rebuilt pool"),
        (("show", "POOL", "--sheet", "s3://bucket/out.png"), "a sheet"),
        (("show", "POOL", "--html", "s3://bucket/out.html"), "a page"),
        (("pull", "POOL", "s3://bucket/out"), "a pulled artifact"),
        (("figure", "fig4", "RECIPE", "--out", "s3://bucket/out.png"), "a figure"),
    ],
)
def test_a_result_is_not_written_to_a_url(words, what, made, tiny_recipe, command):
    result = command(*({"POOL": made["pool"], "RECIPE": tiny_recipe}.get(word, word) for word in words))
    assert (result.code, result.out) == (1, "")
    assert f"error: {what} is written to this machine, not to the URL 's3://bucket/out" in result.err
    assert list(Path.cwd().iterdir()) == []


def test_a_file_url_is_a_folder_to_write_to(made, tmp_path):
    export_pool(made["pool"], f"file://{tmp_path}/out", format="hdf5")
    assert verify(tmp_path / "out")["stage"] == "export"


# Recipes.


def test_a_recipe_whose_flow_is_not_there_or_no_flow_names_the_url(there, made, tiny_recipe, tmp_path):
    there.put("data", made["data"])
    with pytest.raises(MissingError) as told:
        plan(tiny_recipe, overrides=[f"flow.path={there['nothing']}"])
    assert there["nothing"].removeprefix("file://") in str(told.value)
    if there.kind == "file":
        return
    with pytest.raises(MissingError, match=f"'{there['data']}' is no flow but the result of stage 'ingest'"):
        plan(tiny_recipe, overrides=[f"flow.path={there['data']}"])
    with pytest.raises(DownloadError, match=r"'http://127\.0\.0\.1:9/flow' cannot be reached"):
        plan(tiny_recipe, overrides=["flow.path=http://127.0.0.1:9/flow"])


@pytest.mark.parametrize("wrong", ["s3://bucket/nothing", "nonsense://bucket/x", "http://127.0.0.1:9/x"])
@pytest.mark.parametrize(
    "words",
    [
        ("show", "POOL", "--html", "out.html", "--data", "URL"),
        ("verify", "POOL", "--data", "URL"),
        ("verify", "POOL", "--flow", "URL"),
        ("rebuild", "POOL", "--data", "URL", "--flow", "FLOW", "--out", "out"),
        ("rebuild", "POOL", "--data", "digits", "--flow", "URL", "--out", "out"),
        ("rebuild", "POOL", "--data", "digits", "--flow", "FLOW", "--compare", "URL", "--out", "out"),
        ("encode", "RECIPE", "--set", "flow.path=URL"),
        ("mix", "RECIPE", "--set", "pools.lsmix.flow=URL"),
        ("status", "RECIPE", "--set", "flow.path=URL"),
    ],
)
def test_a_wrong_url_in_an_option_or_a_recipe_is_named(words, wrong, s3, made, tiny_recipe, command):
    make_bucket("bucket")
    known = {"POOL": made["pool"], "FLOW": made["flow"], "RECIPE": tiny_recipe}
    result = command(*(known.get(word, word.replace("URL", wrong)) for word in words))
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert wrong in result.err
    assert list(Path.cwd().iterdir()) == []
