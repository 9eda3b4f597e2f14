"""Commands accept URLs of artifacts: same results, errors name the URL, and no file is downloaded twice."""

import hashlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from factory import contents, write_pool
from guarded import sealed_again
from places import scripted_server, web_server

import lsmix
from lsmix.data.artifact import DESCRIPTION_FILES, read_manifest
from lsmix.data.errors import (
    CorruptError,
    DownloadError,
    FormatError,
    MissingError,
    RecipeError,
)
from lsmix.data.pool import open_pool
from lsmix.data.progress import NullProgress
from lsmix.data.remote import open_remote
from lsmix.data.sharing.transfer import temporary_copy
from lsmix.data.store import open_artifact
from lsmix.pipeline.api import export_pool, list_artifacts, plan, pull, push, run, verify
from lsmix.pipeline.verify.rebuild import rebuild
from lsmix.pipeline.views.dataset_card.card import write_card

SHARD = "pool.zarr/image/c/0/0/0/0"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Run each test in its own current folder."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture(scope="module")
def made(finished_workspace):
    """The folders of a pool, its flow and its data set."""
    names = {"pool": "mix/lsmix-*", "flow": "train-glow/tiny-*", "data": "ingest/tiny-*"}
    return {name: next(finished_workspace.glob(pattern)) for name, pattern in names.items()}


class StoredArtifacts:
    """Artifacts on a remote, by name; each is uploaded when its URL is first used."""

    def __init__(self, kind, base, folder, made):
        self.kind, self._base, self._folder, self._made = kind, base, folder, dict(made)

    def __getitem__(self, name):
        if folder := self._made.pop(name, None):
            self.put(name, folder)
        return f"{self._base}/{name}"

    def put(self, name, folder):
        if self._folder:
            shutil.copytree(folder, self._folder / name)
        else:
            place = open_remote(self[name])
            for path in contents(folder):
                place.write(path, folder / path)

    def place(self, name):
        """Return the remote of an artifact, whose files can be read and written."""
        url = self[name]
        return open_remote(self._folder / name if self._folder else url)

    @contextmanager
    def changed(self, name, path, change):
        """Change a file within the context, and restore it at the end."""
        place = self.place(name)
        for index, content in enumerate((original := place.read(path, 1 << 30), change(original))):
            Path(f"{index}.changed").write_bytes(content)
        place.write(path, Path("1.changed"))
        yield
        place.write(path, Path("0.changed"))


@pytest.fixture(scope="module", params=("file", "memory", "web"))
def stored(request, made, tmp_path_factory):
    """The finished artifacts on a remote of each kind; tests must not change them."""
    kind, folder = request.param, tmp_path_factory.mktemp("stored")
    if kind == "web":
        with web_server(folder) as server:
            yield StoredArtifacts(kind, server.url, folder, made)
        return
    if kind == "s3":
        request.getfixturevalue("s3")
    base = {"file": f"file://{folder}", "memory": f"memory://{folder.name}", "s3": "s3://bucket/some"}[kind]
    yield StoredArtifacts(kind, base, folder if kind == "file" else None, made)


def at(*kinds):
    return pytest.mark.parametrize("stored", kinds, indirect=True, scope="module")


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


def copies(tmp_path):
    """Return the names of temporary copies."""
    home = tmp_path / "cache/copies"
    return sorted(path.name for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def payload(folder):
    """Return the SHA-256 of all files except the manifest."""
    return {path: digest for path, digest in contents(folder).items() if path != "manifest.json"}


# All commands, with URLs for all artifacts.


@at("file", "web")
def test_every_command_accepts_urls_instead_of_folders(stored, made, command, tmp_path):
    pool, data, flow = stored["pool"], stored["data"] + "/dataset.h5", stored["flow"]

    shown = command("show", pool, "--image", "s.png", "--html", "p.html", "--data", data)
    local = command("show", made["pool"], "--image", "n.png", "--html", "q.html", "--data", made["data"])
    assert shown.code == 0, shown.err
    assert shown.out == local.out.replace("n.png", "s.png").replace("q.html", "p.html").replace(
        "x₁ | mix | x₂", "images of the pool, ordered by their share of x₂"
    )
    assert Path("p.html").read_bytes() == Path("q.html").read_bytes()

    checked = command("verify", pool, "--data", data, "--flow", flow, "--deep", "--sample", "20", "--device", "cpu")
    assert checked.code == 0, checked.err
    assert str(tmp_path / "cache") not in checked.out
    if stored.kind != "file":
        assert checked.out.splitlines()[0].split() == ["artifact", pool]
        assert f"those of the data set '{stored['data']}'" in checked.out
        assert "not checked  added files" in checked.out

    assert command("export", pool, "near", "--format", "hdf5", "-q").code == 0
    stored.put("exported", Path("near"))
    assert command("verify", stored["exported"]).code == 0

    other = f"memory://{tmp_path.name}-other/pool"
    sent = command("push", pool, other, "-q")
    assert sent.code == 0, sent.err
    assert pull(other, "back").content_digest == read_manifest(made["pool"]).content_digest

    for index, named in enumerate((pool, f"{pool}/plan.json")):
        words = ("--data", data, "--flow", flow, "--compare", pool, "--out", f"rebuilt{index}", "--device", "cpu", "-q")
        rebuilt = command("rebuild", named, *words)
        assert rebuilt.code == 0, rebuilt.err
        assert "same as the original" in rebuilt.out
    assert not any(path.name.endswith(":") for path in Path.cwd().iterdir())


def test_a_remote_flow_encodes_like_a_local_one(stored, made):
    images = lsmix.open_pool(made["pool"]).image[:4]
    np.testing.assert_array_equal(
        lsmix.load_flow(stored["flow"]).encode(images), lsmix.load_flow(made["flow"]).encode(images)
    )


@at("file", "web")
def test_a_recipe_with_a_remote_flow_reuses_the_same_latents_and_pools(stored, tiny_recipe, tiny_workspace, command):
    shutil.rmtree(tiny_workspace / "train-glow")
    words = ("--workspace", tiny_workspace, "--set", f"flow.path={stored['flow']}")
    status = command("status", tiny_recipe, *words, "--json")
    assert status.code == 0, status.err
    states = {(node["stage"], node["state"]) for node in msgspec.json.decode(status.out)["content"]}
    assert {("encode", "cached"), ("mix", "cached")} < states
    assert {stage for stage, _ in states}.isdisjoint({"train-glow"})
    pools = run(tiny_recipe, workspace=tiny_workspace, stage="mix", overrides=[f"pools.zero.flow={stored['flow']}"])
    assert all(item.cached for item in pools.built if item.stage in ("encode", "mix") and item.name != "zero")


@at("memory", "web")
def test_the_card_of_a_remote_pool_equals_that_of_a_local_one(stored, made, command, tmp_path):
    before = stored.place("pool").read("manifest.json", 1 << 20)
    done = command("card", stored["pool"], tmp_path / "written", "--creator", "Ann", "--json")
    assert done.code == 0, done.err
    write_card(shutil.copytree(made["pool"], tmp_path / "near" / "pool"), tmp_path / "near" / "card", creator="Ann")
    written, expected = contents(tmp_path / "written"), contents(tmp_path / "near" / "card")
    assert written.keys() == expected.keys()
    assert written["croissant.json"] == expected["croissant.json"]
    assert verify(tmp_path / "written")["edited"] == []
    assert (
        msgspec.json.decode(done.out)["content"]["content_digest"]
        == read_manifest(tmp_path / "written").inputs[0].content_digest
        == open_pool(stored["pool"]).manifest.content_digest
    )
    assert stored.place("pool").read("manifest.json", 1 << 20) == before


# Errors.

COMMANDS = {
    "show": ("show", "URL", "--image", "out.png"),
    "verify": ("verify", "URL"),
    "export": ("export", "URL", "out", "--format", "hdf5"),
    "card": ("card", "URL"),
    "push": ("push", "URL", "out"),
    "rebuild": ("rebuild", "URL", "--data", "digits", "--out", "out"),
    "rebuild of a file": ("rebuild", "URL/plan.json", "--data", "digits", "--out", "out"),
    "show with data": ("show", "POOL", "--html", "out.html", "--data", "URL"),
    "verify with data": ("verify", "POOL", "--data", "URL"),
    "verify with a flow": ("verify", "POOL", "--flow", "URL"),
    "rebuild with data": ("rebuild", "POOL", "--data", "URL", "--flow", "FLOW", "--out", "out"),
    "rebuild with a flow": ("rebuild", "POOL", "--data", "digits", "--flow", "URL", "--out", "out"),
    "compare": ("rebuild", "POOL", "--data", "digits", "--flow", "FLOW", "--compare", "URL", "--out", "out"),
    "encode": ("encode", "RECIPE", "--set", "flow.path=URL"),
    "mix": ("mix", "RECIPE", "--set", "pools.lsmix.flow=URL"),
    "status": ("status", "RECIPE", "--set", "flow.path=URL"),
}
WRONG = {
    "no bucket": (
        "s3://no-such-bucket/pool",
        r"does not exist: http://127\.0\.0\.1:\d+ has no bucket 'no-such-bucket'",
    ),
    "no artifact": ("s3://bucket/nothing", r"does not exist|no artifact at"),
    "unknown kind": ("nonsense://bucket/pool", r"lsmix does not support"),
    "no package": ("gs://bucket/pool", r"needs a package that is not installed"),
    "no host": ("http://127.0.0.1:9/pool", r"cannot be reached|is a web server"),
    "other host": ("file://elsewhere/pool", r"names a file on another host"),
}


@pytest.mark.parametrize(
    ("name", "wrong"), [*((name, "no artifact") for name in COMMANDS), *(("verify", wrong) for wrong in WRONG)]
)
def test_a_wrong_url_is_one_error_line_with_the_url(name, wrong, s3, made, tiny_recipe, command, tmp_path):
    url, message = WRONG[wrong]
    known = {"POOL": made["pool"], "FLOW": made["flow"], "RECIPE": tiny_recipe}
    result = command(*(known.get(word, word.replace("URL", url)) for word in COMMANDS[name]))
    assert (result.code, result.out) == (1, ""), result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert url in last
    assert re.search(message, last), last
    assert "Traceback" not in result.err
    assert list(Path.cwd().iterdir()) == []
    assert copies(tmp_path) == []


def test_a_command_reports_a_retry(command, web):
    web.statuses["pool/manifest.json"] = 503
    result = command("show", f"{web.url}/pool")
    assert result.code == 0
    assert (
        result.err
        == f"warning: '{web.url}/pool' cannot be reached: the server answers 503 Service Unavailable. Trying again in 0 s\n"
    )


@pytest.mark.parametrize("name", ["show", "push"])
def test_denied_access_is_reported_with_advice(name, command, monkeypatch):
    from fsspec.config import conf

    with scripted_server(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as (url, _):
        endpoint = url.removesuffix("/pool")
        monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, "key": "a", "secret": "b"})
        result = command(*(word.replace("URL", "s3://theirs/pool") for word in COMMANDS[name]))
    assert result.code == 1
    assert "'s3://theirs/pool/" in result.err
    assert "no access to " in result.err
    assert "Check the URL and your credentials" in result.err


@pytest.mark.parametrize("ask", [open_artifact, list_artifacts, lambda url: push(write_pool(Path("p")), url)])
def test_missing_bucket_wrong_key_and_dead_endpoint_have_distinct_messages(ask, s3, monkeypatch, caplog):
    from fsspec.config import conf

    host = f"http://127.0.0.1:{s3.get_host_and_port()[1]}"
    with pytest.raises(DownloadError, match=f"'s3://nowhere/pool' does not exist: {host} has no bucket 'nowhere'"):
        ask("s3://nowhere/pool")
    for allowed in (b"0", b"inf"):  # requests with any key
        order = urllib.request.Request(f"{host}/moto-api/reset-auth", allowed, {"Content-Type": "text/plain"})
        urllib.request.urlopen(order).close()
        if allowed == b"0":
            with pytest.raises(
                DownloadError, match=r"no access to .*: The AWS Access Key Id you .*\. Check the URL and your cre"
            ):
                ask("s3://bucket/pool")
    shutil.rmtree("p", ignore_errors=True)
    monkeypatch.setitem(conf, "s3", {"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "b"})
    caplog.clear()
    start = time.time()
    with pytest.raises(DownloadError, match=r"cannot be reached: .*127\.0\.0\.1:9/.*Check the endpoint"):
        ask("s3://bucket/pool")
    retries = [record for record in caplog.records if record.name == "lsmix" and "Trying again" in record.message]
    assert retries[0].created - start < 5


@at("memory")
@pytest.mark.parametrize("name", ["show", "verify", "export", "card", "push"])
def test_a_damaged_file_is_reported_by_its_url_with_exit_code_5(name, stored, command, tmp_path):
    words = [word.replace("URL", stored["pool"]) for word in COMMANDS[name]]
    with stored.changed("pool", SHARD, flipped):
        result = command(*words)
    assert (result.code, result.out) == (5, "")
    assert f"'{stored['pool']}/{SHARD}' is damaged: expected sha256" in result.err
    assert str(tmp_path / "cache") not in result.err
    assert list(Path.cwd().glob("out*")) == [] or name == "push"  # the next push can complete it
    assert not Path("out/manifest.json").exists()


def test_damaged_inputs_of_a_rebuild_are_detected(stored, tmp_path):
    for name, path in (("data", "dataset.h5"), ("flow", "glow.safetensors"), ("pool", "plan.json")):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with stored.changed(name, path, flipped), pytest.raises(CorruptError) as error:
            rebuild(stored["pool"], data=stored["data"], flow=stored["flow"], out=tmp_path / "out", device="cpu")
        assert f"{name}/{path}" in str(error.value) or stored.kind == "file"
        assert str(tmp_path / "cache") not in str(error.value)


@at("file", "memory")
def test_errors_about_a_copy_name_the_url(stored, tmp_path):
    for error, start, call in (
        (
            FormatError,
            f"{stored['flow']}' is an artifact of the stage 'train-glow'",
            lambda: write_card(stored["flow"]),
        ),
        (
            RecipeError,
            f"{stored['flow']}' is the result of stage 'train-glow'; these options apply to pools only",
            lambda: verify(stored["flow"], deep=True),
        ),
        (
            MissingError,
            f"{stored['data']}' is not a flow: it is an artifact of the stage 'ingest'",
            lambda: verify(stored["pool"], flow=stored["data"]),
        ),
    ):
        with pytest.raises(error, match=start.removeprefix("file://")) as caught:
            call()
        assert str(tmp_path / "cache") not in str(caught.value)


# Files of a remote artifact, downloaded once on first use.


def test_paths_and_file_urls_are_read_in_place(tmp_path):
    write_pool(tmp_path / "a b")
    for place in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b", tmp_path / "a b" / "pool.zarr"):
        assert open_artifact(place).folder == tmp_path / "a b"
    assert not (tmp_path / "cache").exists()


def test_a_remote_artifact_has_no_folder(web):
    artifact = open_artifact(f"{web.url}/pool")
    assert not artifact.is_local
    with pytest.raises(MissingError, match=f"'{web.url}/pool' is not on this machine.* lsmix pull {web.url}/pool"):
        _ = artifact.folder
    with pytest.raises(MissingError, match=f"'{web.url}/pool/other' is not listed"):
        artifact.file("other")


def test_an_open_remote_artifact_does_not_change_until_it_is_reopened(web):
    first = open_artifact(f"{web.url}/pool")
    assert [path for path, _ in web.asked] == ["pool/manifest.json"]
    before = sha(first.file(SHARD))
    shutil.rmtree(web.artifact)
    write_pool(web.artifact, seed=1)
    second = open_artifact(f"{web.url}/pool")
    assert sha(second.file(SHARD)) == payload(web.artifact)[SHARD] != before
    assert sha(first.file(SHARD)) == before


FETCH = (
    "import sys\nfrom lsmix.data.store import open_artifact\n"
    "artifact = open_artifact(sys.argv[1])\n"
    "for path in artifact.records: artifact.file(path)\n"
)


def test_concurrent_processes_download_each_file_once(web):
    processes = [subprocess.Popen([sys.executable, "-c", FETCH, f"{web.url}/pool"]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    files = [path for path, _ in web.asked if not path.endswith("/manifest.json")]
    assert len(files) == len(set(files))


# Verify.


@at("file", "s3", "web")
def test_verify_checks_the_remote_bytes_not_a_cached_copy(stored, made, tmp_path):
    if stored.kind != "file":
        open_artifact(stored["pool"]).file(SHARD)
    assert verify(stored["pool"])["content_digest"] == read_manifest(made["pool"]).content_digest
    with (
        stored.changed("pool", SHARD, flipped),
        pytest.raises(CorruptError, match=f"{SHARD}' is damaged: expected sha256"),
    ):
        verify(stored["pool"])
    assert copies(tmp_path) == []


def test_the_next_call_removes_the_copy_of_a_killed_verify(web, tmp_path):
    code = (
        "import os, sys\nfrom lsmix.data.progress import NullProgress\n"
        "from lsmix.data.sharing.transfer import temporary_copy\n"
        "with temporary_copy(sys.argv[1], NullProgress()): os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, f"{web.url}/pool"], check=False).returncode == 9
    (stale,) = copies(tmp_path)
    with temporary_copy(f"{web.url}/pool", NullProgress()) as folder:
        assert copies(tmp_path) == [folder.name] != [stale]
        assert payload(folder) == payload(web.artifact)
    assert list((tmp_path / "cache/copies").iterdir()) == []


@at("file", "memory", "web")
def test_every_file_of_a_remote_export_is_verified(stored, invented_pool, tmp_path):
    form = {"file": "hdf5", "memory": "hdf5", "web": "folder"}[stored.kind]
    export_pool(invented_pool(), tmp_path / "out", format=form)
    stored.put("out", tmp_path / "out")
    facts = verify(stored["out"])
    assert (facts["stage"], facts["files"]) == ("export", verify(tmp_path / "out")["files"])
    assert stored.kind == "file" or facts["folder"] == stored["out"]
    name = next(path for path in contents(tmp_path / "out") if path.endswith((".h5", "0.png")))
    for path, change in ((name, flipped), ("SHA256SUMS", flipped), (name, lambda content: content[:-1])):
        with stored.changed("out", path, change), pytest.raises(CorruptError, match=r"is damaged|bytes") as error:
            verify(stored["out"])
        assert stored["out"].removeprefix("file://") in str(error.value)
        assert str(tmp_path / "cache") not in str(error.value)


def test_an_export_with_paths_outside_its_folder_is_rejected_before_anything_is_written(web, invented_pool, tmp_path):
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


def test_an_error_names_a_missing_file_of_an_export(web, invented_pool, tmp_path):
    export_pool(invented_pool(), web.folder / "out", format="parquet")
    (name,) = (path.name for path in (web.folder / "out").glob("*.parquet"))
    (web.folder / "out" / name).unlink()
    with pytest.raises(CorruptError, match=f"'{web.url}/out/{name}' is missing"):
        verify(f"{web.url}/out")


# Cards of remote and pushed pools.


@pytest.fixture
def remote_pool(made, tmp_path):
    push(made["pool"], f"memory://{tmp_path.name}/pool")
    return f"memory://{tmp_path.name}/pool"


def test_pushing_a_pool_adds_its_card_and_keeps_the_content_digest(remote_pool, made):
    sent, here = open_pool(remote_pool).manifest, read_manifest(made["pool"])
    assert sent.content_digest == here.content_digest
    listed = {file.path for file in sent.files}
    assert listed == {file.path for file in here.files} | set(DESCRIPTION_FILES)
    assert b"## Statistics" in open_remote(remote_pool).read("README.md", 1 << 20)
    assert b"## Statistics" not in (made["pool"] / "README.md").read_bytes()
    assert verify(remote_pool)["edited"] == []


def test_pushing_a_pool_with_another_card_sends_only_the_changed_card_files(remote_pool, made, tmp_path, monkeypatch):
    write_card(made["pool"], tmp_path / "card", licence="MIT", creator="Ann")
    kind, sent = type(open_remote(remote_pool)), []
    write = kind.write
    monkeypatch.setattr(kind, "write", lambda self, path, source: (sent.append(path), write(self, path, source)))
    push(made["pool"], remote_pool, card=tmp_path / "card")
    assert sent[-1] == "manifest.json"
    assert sorted(sent[:-1]) == ["LICENSES/images.txt", "README.md", "croissant.json"]
    assert b"Ann" in open_remote(remote_pool).read("croissant.json", 1 << 20)
    assert verify(remote_pool)["edited"] == []
    sent.clear()
    push(made["pool"], remote_pool, card=tmp_path / "card")
    assert sent == []


def test_a_pool_stays_valid_after_an_interrupted_push_of_another_card(remote_pool, made, tmp_path, monkeypatch):
    write_card(made["pool"], tmp_path / "card", licence="MIT")
    kind, sent = type(open_remote(remote_pool)), []
    write, digest = kind.write, open_pool(remote_pool).manifest.content_digest

    def write_one_more(self, path, source):
        if len(sent) == allowed:
            raise KeyboardInterrupt
        sent.append(path)
        write(self, path, source)

    monkeypatch.setattr(kind, "write", write_one_more)
    for allowed in range(4):  # noqa: B007  # read by write_one_more
        with pytest.raises(KeyboardInterrupt):
            push(made["pool"], remote_pool, card=tmp_path / "card")
        assert verify(remote_pool)["content_digest"] == digest
    assert len(sent) == 3
    monkeypatch.setattr(kind, "write", write)
    push(made["pool"], remote_pool, card=tmp_path / "card")
    assert verify(remote_pool)["edited"] == []
    assert b"MIT" in open_remote(remote_pool).read("README.md", 1 << 20)


def test_the_card_of_another_pool_is_rejected(made, invented_pool, tmp_path):
    write_card(invented_pool(), tmp_path / "card")
    with pytest.raises(RecipeError, match="is not a card of"):
        push(made["pool"], f"memory://{tmp_path.name}/other", card=tmp_path / "card")
    with pytest.raises(RecipeError, match="is not a card of"):
        push(made["pool"], f"memory://{tmp_path.name}/other", card=made["pool"])


# Results are written to local paths only.


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("export", "POOL", "s3://bucket/out", "--format", "hdf5"), "an export"),
        (("rebuild", "POOL", "--data", "digits", "--out", "s3://bucket/out"), "a rebuilt pool"),
        (("show", "POOL", "--image", "s3://bucket/out.png"), "an image"),
        (("show", "POOL", "--html", "s3://bucket/out.html"), "a page"),
        (("pull", "POOL", "s3://bucket/out"), "a pulled artifact"),
        (("figure", "fig4", "RECIPE", "--out", "s3://bucket/out.png"), "a figure"),
    ],
)
def test_results_are_not_written_to_urls(words, what, made, tiny_recipe, command):
    result = command(*({"POOL": made["pool"], "RECIPE": tiny_recipe}.get(word, word) for word in words))
    assert (result.code, result.out) == (1, "")
    assert f"error: {what} cannot be written to the URL 's3://bucket/out" in result.err
    assert list(Path.cwd().iterdir()) == []


def test_results_can_be_written_to_file_urls(made, tmp_path):
    export_pool(made["pool"], f"file://{tmp_path}/out", format="hdf5")
    assert verify(tmp_path / "out")["stage"] == "export"


# Recipes.


@at("file", "memory")
def test_a_recipe_with_a_wrong_flow_url_is_reported(stored, tiny_recipe):
    with pytest.raises(MissingError, match=stored["nothing"].removeprefix("file://")):
        plan(tiny_recipe, overrides=[f"flow.path={stored['nothing']}"])
    if stored.kind != "file":
        with pytest.raises(
            MissingError, match=f"'{stored['data']}' is not a flow: it is an artifact of the stage 'ingest'"
        ):
            plan(tiny_recipe, overrides=[f"flow.path={stored['data']}"])
        with pytest.raises(DownloadError, match=r"'http://127\.0\.0\.1:9/flow' cannot be reached"):
            plan(tiny_recipe, overrides=["flow.path=http://127.0.0.1:9/flow"])
