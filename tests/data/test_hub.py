"""Push to the Hugging Face Hub: 100 files per commit, the manifest last, no downloads, and no file sent twice."""

import logging
import subprocess
import sys

import pytest
from factory import write_pool
from hub_server import hub_server
from places import TESTS, Meter

import lsmix
from lsmix.data.artifact import read_manifest
from lsmix.data.errors import DownloadError, MissingError, RecipeError
from lsmix.data.sharing import hub as hub_module
from lsmix.data.sharing.transfer import push_artifact
from lsmix.pipeline.api import pull, push, verify

# huggingface_hub uploads in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
URL = "hf://datasets/me/pool"


@pytest.fixture
def server(monkeypatch):
    with hub_server(monkeypatch) as server:
        yield server


@pytest.fixture
def artifact(tmp_path):
    return write_pool(tmp_path / "mine")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pool of 212 files, including the manifest."""
    folder = write_pool(tmp_path_factory.mktemp("large") / "pool", rows=100, chunk_rows=4)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 212
    return folder


def test_a_pool_of_212_files_takes_three_commits_and_no_downloads(server, large):
    sent = push_artifact(large, URL, Meter())
    assert (sent.files, sent.moved_bytes) == (211, sent.bytes)
    assert [len(commit) for commit in server.commits] == [100, 100, 14]
    assert server.commits[-1][-2:] == ["manifest.json", "work/push.json"]  # the latter is removed
    assert server.read_bytes == 0
    assert server.created[0]["visibility"] == "private"
    stored = server.repositories["me/pool"].keys() - {".gitattributes"}
    assert stored == {path.relative_to(large).as_posix() for path in large.rglob("*") if path.is_file()}
    assert push_artifact(large, URL, Meter()).moved_files == 0
    assert len(server.commits) == 3


def test_a_pushed_pool_can_be_opened_verified_and_pulled(server, artifact, tmp_path):
    push(artifact, f"{URL}/folder")
    assert len(server.commits) == 1
    assert lsmix.open_pool(f"{URL}/folder").image[:].tolist() == lsmix.open_pool(artifact).image[:].tolist()
    assert verify(f"{URL}/folder")["content_digest"] == read_manifest(artifact).content_digest
    pull(f"{URL}/folder", tmp_path / "here")
    assert verify(tmp_path / "here")["edited"] == []


def test_the_next_push_resumes_a_killed_push(server, large):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom places import Meter\n"
        "from lsmix.data.sharing.transfer import push_artifact\n"
        "class Kill(Meter):\n"
        "  def advance(self, units=1, note=''):\n"
        "    self.count += units\n"
        "    if self.count > self.total / 3: os._exit(9)\n"
        "push_artifact(Path(sys.argv[1]), sys.argv[2], Kill())"
    )
    assert subprocess.run([sys.executable, "-c", code, large, URL], cwd=TESTS, check=False).returncode == 9
    commits = len(server.commits)
    with pytest.raises(MissingError, match="no artifact at"):
        lsmix.open_pool(URL)
    rest = push_artifact(large, URL, Meter())
    assert 0 < rest.moved_files <= 211 - 99 * commits
    assert "manifest.json" in server.repositories["me/pool"]
    assert "work/push.json" not in server.repositories["me/pool"]


def test_a_push_sends_only_the_files_that_differ_on_the_hub(server, artifact):
    push_artifact(artifact, URL, Meter())
    files = server.repositories["me/pool"]
    files["README.md"], files["pool.zarr/lam/c/0"] = b"other", ("0" * 64, b"other")
    assert push_artifact(artifact, URL, Meter()).moved_files == 2
    assert sorted(server.commits[-1]) == ["README.md", "pool.zarr/lam/c/0"]


def test_a_repository_with_other_content_is_not_changed(server, artifact, tmp_path):
    server.repositories["me/pool"] = {"thesis.tex": b"mine"}
    with pytest.raises(RecipeError, match=r"is not empty: it contains 'thesis.tex'"):
        push(artifact, URL)
    assert server.commits == []
    with pytest.raises(RecipeError, match="does not name a repository"):
        push(artifact, "hf://pool")


@pytest.mark.parametrize("path", ["commit/main", "paths-info/main"])
def test_a_push_waits_for_a_rate_limit_and_logs_it(server, artifact, path, caplog, monkeypatch):
    waited = []
    monkeypatch.setattr(hub_module, "pause", waited.append)
    server.refusals[path] = [(429, {"Retry_After": "7"})]
    push_artifact(artifact, URL, Meter())
    assert waited == [7]
    message = "the Hub accepts no requests for the next 7 s (rate limit). Waiting"
    assert ("lsmix", logging.WARNING, message) in caplog.record_tuples
    assert lsmix.open_pool(URL).image.shape[0] > 0


def test_a_push_succeeds_after_a_rate_limit_that_huggingface_hub_handles(server, artifact, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    server.refusals["preupload/main"] = [(429, {"Retry_After": "7"})]
    push_artifact(artifact, URL, Meter())
    assert waited
    assert "manifest.json" in server.repositories["me/pool"]


def test_a_rate_limit_of_hours_ends_the_push_and_temporary_errors_are_retried(server, artifact):
    server.refusals["commit/main"] = [(503, {}), (412, {}), (429, {"ratelimit": '"api";r=0;t=7200'})]
    with pytest.raises(DownloadError, match=r"accepts no requests for the next 7200 s .* Run again later to resume"):
        push_artifact(artifact, URL, Meter())
    push_artifact(artifact, URL, Meter())
    assert len(server.commits) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_is_reported_with_advice(server, artifact, status):
    server.repositories["me/pool"] = {}
    server.refusals["commit/main"] = [(status, {})]
    with pytest.raises(DownloadError, match=r"the Hub refused the request: .* log in with 'hf auth login' or HF_TOKEN"):
        push_artifact(artifact, URL, Meter())


def test_the_waiting_time_is_read_from_both_headers():
    assert hub_module._seconds_to_wait({"ratelimit": '"api";r=0;t=55'}) == 55
    assert hub_module._seconds_to_wait({"retry-after": "7"}) == 7
    assert hub_module._seconds_to_wait({}) == 60


def test_a_run_in_a_hub_workspace_makes_one_commit_per_shard(server, tiny_recipe, finished_workspace):
    lsmix.run(tiny_recipe, workspace="hf://datasets/me/runs", stage="encode", device="cpu")
    latents = lsmix.run(tiny_recipe, workspace=finished_workspace, stage="encode", device="cpu")["encode"].artifact
    encoded = [commit for commit in server.commits if commit[0].startswith("encode/")]
    shards = {path.rpartition("/c/")[2].split("/")[0] for path in latents.records if "/c/" in path}
    assert len(shards) > 1
    assert len(encoded) == len(shards) + 2  # the last two send the manifest and remove the shard records
