"""Array tasks give the same bytes as one run, in any order and any number of times; missing shards are reported."""

import shutil

import pytest
from factory import content_digests
from forked import forked

import lsmix
from lsmix.data.errors import MissingError, PartialError, RecipeError
from lsmix.pipeline.workspace.locks import artifact_lock


@pytest.fixture
def bare_workspace(tiny_workspace):
    """Return a workspace with only a data set and a flow."""
    for stage in ("encode", "mix", "train", "report"):
        shutil.rmtree(tiny_workspace / stage)
    return tiny_workspace


def test_concurrent_array_tasks_give_the_same_bytes_as_one_run(
    tiny_recipe, finished_workspace, bare_workspace, command
):
    where = ("--workspace", str(bare_workspace), "--device", "cpu")
    assert forked("array_tasks", tiny_recipe, bare_workspace, "encode", "mix") == [0] * 7
    result = command("finalize", tiny_recipe, *where, "--json")
    assert result.code == 0, result.err
    assert content_digests(bare_workspace, "encode", "mix") == content_digests(finished_workspace, "encode", "mix")
    assert not list(bare_workspace.glob("*/*/work"))
    again = command("encode", tiny_recipe, *where, "--array-index", "0", "--array-size", "3")
    assert again.out == "everything is up to date\n"


def test_finalize_names_missing_shards_and_computes_none(tiny_recipe, bare_workspace, command):
    words = (tiny_recipe, "--workspace", bare_workspace)
    made = command("encode", *words, "--array-index", "0", "--array-size", "2")  # of five shards: 0, 2 and 4
    assert f"When all tasks of the job array have ended, run: lsmix finalize {tiny_recipe}" in made.out
    assert made.out.splitlines()[0].split()[2:] == ["3", "of", "3", "shards", "made;", "3", "of", "5", "complete"]
    result = command("finalize", *words)
    assert result.code == PartialError.exit_code == 6
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "lacks 2 shards (1, 3): a task of the job array has not run or has failed" in result.err
    assert "interrupted: 3 shards done" in command("status", *words).out
    again = command("encode", *words, "--array-index", "0", "--array-size", "2", "--json")
    assert '"made": 0' in again.out


def test_arrays_of_several_sizes_may_overlap_and_a_plain_run_makes_the_rest(
    tiny_recipe, finished_workspace, bare_workspace
):
    for task in ((0, 5), (1, 2), (0, 5)):
        lsmix.run_array_task(tiny_recipe, "encode", *task, workspace=bare_workspace, device="cpu")
    lsmix.run(tiny_recipe, stage="encode", workspace=bare_workspace, device="cpu")
    assert content_digests(bare_workspace, "encode") == content_digests(finished_workspace, "encode")


def test_a_run_excludes_array_tasks_and_array_tasks_allow_each_other(tiny_recipe, bare_workspace, command):
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


def test_an_array_task_does_not_make_its_inputs(tiny_recipe, bare_workspace, command):
    result = command("mix", tiny_recipe, "--workspace", bare_workspace, "--array-index", "0", "--array-size", "2")
    assert result.code == 1
    assert result.err == "error: encode tiny has not been made yet. Run 'lsmix encode RECIPE' first.\n"


def test_finalize_without_array_tasks_is_an_error(tiny_recipe, bare_workspace):
    with pytest.raises(MissingError, match="no array task has run in"):
        lsmix.finalize(tiny_recipe, workspace=bare_workspace)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (0, 99_999_999)])
def test_an_index_outside_the_array_is_rejected(tiny_recipe, finished_workspace, index, size):
    with pytest.raises(RecipeError, match=r"expected a size of 1 to 1,000,000, and an index from 0 to size - 1"):
        lsmix.run_array_task(tiny_recipe, "encode", index, size, workspace=finished_workspace)


def test_array_index_and_size_must_be_given_together(tiny_recipe, command):
    assert command("encode", tiny_recipe, "--array-index", "0").code == 2
    assert command("encode", tiny_recipe, "--array-size", "2").code == 2


def test_only_stages_with_shards_can_run_as_a_job_array(tiny_recipe, tiny_workspace, command):
    with pytest.raises(RecipeError, match="stage 'train' cannot run as a job array"):
        lsmix.run_array_task(tiny_recipe, "train", 0, 2, workspace=tiny_workspace)
    assert command("train", tiny_recipe, "--array-index", "0", "--array-size", "2").code == 2
    assert command("mix", tiny_recipe, "--array-index", "0", "--array-size", "2", "--force").code == 2
