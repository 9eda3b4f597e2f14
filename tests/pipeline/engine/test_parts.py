"""A job array's parts, in any order and any number of times, come to the bytes of one run; what is missing is named."""

import shutil
import subprocess
import sys

import pytest

import lsmix
from lsmix.data.errors import MissingError, PartialError, RecipeError
from lsmix.pipeline.workspace.locks import artifact_lock
from lsmix.pipeline.workspace.workspace import Workspace


def roots(workspace, *stages):
    return {
        manifest.name: manifest.content_digest
        for stage in stages
        for _, manifest in Workspace(workspace).manifests(stage)
    }


@pytest.fixture
def bare_workspace(tiny_workspace):
    """Return a workspace with the flow alone."""
    for stage in ("encode", "mix", "train", "report"):
        shutil.rmtree(tiny_workspace / stage)
    return tiny_workspace


def test_parts_in_processes_of_their_own_side_by_side_come_to_the_same_bytes(
    tiny_recipe, finished_workspace, bare_workspace, command
):
    where = ("--workspace", str(bare_workspace), "--device", "cpu")
    for stage in ("encode", "mix"):
        words = [sys.executable, "-m", "lsmix", stage, str(tiny_recipe), *where, "-q"]
        parts = [
            subprocess.Popen(
                [*words, "--array-index", f"{part}", "--array-size", "3"], stdout=subprocess.PIPE, text=True
            )
            for part in (2, 0, 1)
        ]
        printed = [part.communicate(timeout=120)[0] for part in parts]
        assert [part.returncode for part in parts] == [0, 0, 0]
        assert f"when all array tasks have ended: lsmix finalize {tiny_recipe}" in printed[0]
        result = command("finalize", tiny_recipe, *where, "--json")
        assert result.code == 0, result.err
    assert roots(bare_workspace, "encode", "mix") == roots(finished_workspace, "encode", "mix")
    assert not list(bare_workspace.glob("*/*/work"))
    assert (
        command("encode", tiny_recipe, *where, "--array-index", "0", "--array-size", "3").out
        == "all up to date already\n"
    )


def test_finish_names_the_shards_that_are_missing_and_computes_none(tiny_recipe, bare_workspace, command):
    words = (tiny_recipe, "--workspace", bare_workspace)
    made = command("encode", *words, "--array-index", "0", "--array-size", "2")  # of five shards: 0, 2 and 4
    assert made.out.splitlines()[0].split()[2:] == ["3", "of", "3", "shards", "made;", "3", "of", "5", "complete"]
    result = command("finalize", *words)
    assert result.code == PartialError.exit_code == 6
    assert result.err.splitlines()[-1].startswith("error: 2 shards of ")
    assert "are missing (1, 3): a task of the job array has not run, or failed" in result.err
    assert "was interrupted: 3 shards done" in command("status", *words).out
    again = command("encode", *words, "--array-index", "0", "--array-size", "2", "--json")
    assert '"made": 0' in again.out


def test_parts_may_overlap_and_be_cut_anew_and_a_plain_run_makes_the_rest(
    tiny_recipe, finished_workspace, bare_workspace
):
    for task in ((0, 5), (1, 2), (0, 5)):
        lsmix.run_array_task(tiny_recipe, "encode", *task, workspace=bare_workspace, device="cpu")
    lsmix.run(tiny_recipe, stage="encode", workspace=bare_workspace, device="cpu")
    assert roots(bare_workspace, "encode") == roots(finished_workspace, "encode")


def test_a_run_and_a_part_keep_out_of_each_others_way_and_parts_do_not(tiny_recipe, bare_workspace, command):
    words = (tiny_recipe, "--workspace", bare_workspace)
    command("encode", *words, "--array-index", "0", "--array-size", "5")
    (folder,) = (bare_workspace / "encode").iterdir()
    key = folder.name.rpartition("-")[2]
    with artifact_lock(bare_workspace, key, "another part", shared=True):
        assert command("encode", *words, "--array-index", "1", "--array-size", "5").code == 0
        for locked in (("encode", *words), ("finalize", *words)):
            result = command(*locked)
            assert result.code == 4
            assert "is being made by another run (user " in result.err
    with artifact_lock(bare_workspace, key, "a run"):
        assert command("encode", *words, "--array-index", "2", "--array-size", "5").code == 4
    assert command("encode", *words).code == 0


def test_what_a_part_needs_must_be_there_since_all_parts_would_make_it_at_once(tiny_recipe, bare_workspace, command):
    result = command("mix", tiny_recipe, "--workspace", bare_workspace, "--array-index", "0", "--array-size", "2")
    assert result.code == 1
    assert result.err == "error: encode tiny has not been made yet. Run 'lsmix encode RECIPE' first.\n"


def test_finish_without_parts_says_so(tiny_recipe, bare_workspace):
    with pytest.raises(MissingError, match="was begun by array tasks"):
        lsmix.finalize(tiny_recipe, workspace=bare_workspace)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (0, 99_999_999)])
def test_an_index_outside_of_the_array_is_refused(tiny_recipe, finished_workspace, index, size):
    with pytest.raises(RecipeError, match=r"expected a size of 1 to 1,000,000, and an index from 0 to size - 1"):
        lsmix.run_array_task(tiny_recipe, "encode", index, size, workspace=finished_workspace)


def test_index_and_size_go_together(tiny_recipe, command):
    assert command("encode", tiny_recipe, "--array-index", "0").code == 2
    assert command("encode", tiny_recipe, "--array-size", "2").code == 2


def test_only_stages_with_shards_have_parts(tiny_recipe, tiny_workspace, command):
    with pytest.raises(RecipeError, match="stage 'train' has no shards to be divided"):
        lsmix.run_array_task(tiny_recipe, "train", 0, 2, workspace=tiny_workspace)
    assert command("train", tiny_recipe, "--array-index", "0", "--array-size", "2").code == 2
    assert command("mix", tiny_recipe, "--array-index", "0", "--array-size", "2", "--force").code == 2
