"""A disk that fails, fills up or stops at any call of any command: one sentence, nothing else harmed, and the next run ends well.

A trial is a real run of the command in which one call of the system fails below Python, whoever made it: our
code, NumPy, HDF5, Arrow or the standard library.
"""

import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driver import FAIL, KILL, ROOM, SHORT

from lsmix.pipeline.api import push
from lsmix.pipeline.stages.registry import STAGES

pytestmark = pytest.mark.faults

FORMS = ("hdf5", "parquet", "webdataset", "folder")
COMMANDS = (*STAGES, *(f"export {form}" for form in FORMS), "push", "pull", "card")
# In how many steps the short form goes through the calls of a command, so that it takes seconds.
SHORT_FORM = {"ingest": 9, "export hdf5": 15, "pull": 60, "mix": 90}  # those without torch first
STRIDES = {"report": 4}  # a page with its plots takes a second, so every fourth call


@pytest.fixture
def setting(small_recipe: Path, small_workspace: Path, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function that prepares the folders of a command; see ``driver.Scene``."""
    pool, place = next((small_workspace / "mix").iterdir()), tmp_path / "place"

    def set_up(command: str) -> dict[str, Any]:
        if command in STAGES:
            for later in STAGES[STAGES.index(command) + 1 :]:
                shutil.rmtree(small_workspace / later)
            return {
                "words": [command, small_recipe, "--workspace", small_workspace, "--device", "cpu", "-q"],
                "within": small_workspace,
                "made": [small_workspace / command, small_workspace / ".locks"],
                "kept": [*(small_workspace / stage for stage in STAGES if stage != command), small_recipe.parent],
            }
        place.mkdir()
        name, _, form = command.partition(" ")
        kept = [small_workspace]
        if name == "pull":
            push(pool, str(tmp_path / "remote"))
            kept.append(tmp_path / "remote")
        options = {"export": ["--format", form], "card": ["--licence", "CC-BY-4.0", "--creator", "A. Nother"]}
        source = kept[-1] if name == "pull" else pool
        words = [name, source, place / "new", *options.get(name, ()), *(["-q"] if name != "card" else [])]
        return {"words": words, "within": place, "made": [place / "new"], "kept": kept}

    return set_up


@pytest.fixture(scope="module")
def played() -> dict[tuple[str, bool], dict[str, list[dict[str, Any]]]]:
    """Return what was seen of each command so far, so that one driver plays all of its trials."""
    return {}


@pytest.fixture
def seen(command, short, played, setting, trials) -> dict[str, list[dict[str, Any]]]:
    """Return the undisturbed run and the trials of a command, by the way in which the disk failed."""
    if (command, short) not in played:
        step = SHORT_FORM[command] if short else STRIDES.get(command, 1)
        at = {"stride": step, "shift": step // 2}
        wanted = {
            "fail": {"mode": FAIL, "numbers": [errno.ENOSPC, errno.EIO], **at},
            "kill": {"mode": KILL, "stride": step if short else 3 * step},
            "short": {"mode": SHORT, "stride": -(-step // 3)},
            "room": {"mode": ROOM, "rooms": [0, 700] if short else [0, 1, 100, 700, 1500, 4000, 8000]},
        }
        played[command, short] = dict(zip(wanted, trials(**setting(command), trials=[*wanted.values()]), strict=True))
    return played[command, short]


def in_both_forms(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for some commands at a few calls, and for all at every call if slow tests run."""
    short = [pytest.param(command, True, id=f"{command}, here and there") for command in SHORT_FORM]
    long = [pytest.param(command, False, id=command, marks=pytest.mark.slow) for command in COMMANDS]
    return pytest.mark.parametrize(("command", "short"), [*short, *long])(test)


def check_said(said: dict[str, Any]) -> None:
    """Hold that a run which failed said so in one sentence on stderr, and nothing else but warnings."""
    lines = said["err"].splitlines()
    assert said["code"] in (1, 5, 6), said
    assert [line.split(":")[0] for line in lines if not line.startswith("warning: ")] == ["error"], said["err"]
    assert (said["out"], "Traceback" in said["err"]) == ("", False)


def check_trial(trial: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Hold all laws but what the faulty run itself has to say."""
    again = trial["again"]
    assert trial["changed"] == [], "what was there before must stay as it was"
    assert again.get("outcome") is not None, again
    assert again["outcome"] == undisturbed["outcome"], "the next run must give the digests of an undisturbed one"
    assert trial["parts"] == [], "the next run must sweep what a kill left"


@in_both_forms
def test_whatever_call_fails_the_error_is_one_sentence_and_the_next_run_ends_well(command, seen):
    undisturbed, *each = seen["fail"]
    assert undisturbed["code"] == 0
    assert undisturbed["outcome"]
    failed = 0
    for trial in each:
        first = trial["first"]
        assert first.get("hits") == 1, first  # else it crashed, or the call was not made
        if first["code"] == 0:
            assert first["outcome"] == undisturbed["outcome"], (
                f"a failed {first['hit']} is passed over only if all is right"
            )
        else:
            failed += 1
            check_said(first)
            assert not [name for name in trial["left"] if name.endswith(".part")], "what failed must clear up"
        check_trial(trial, undisturbed)
    print(f"{command}: {undisturbed['calls']} calls, of which {len(each)} failed in turn, and {failed} runs with them")
    assert failed > len(each) // 2


@in_both_forms
def test_killed_at_any_call_the_next_run_ends_with_the_bytes_of_an_undisturbed_one(command, seen):
    undisturbed, *each = seen["kill"]
    assert each
    for trial in each:
        assert trial["first"] == {"signal": signal.SIGKILL}
        check_trial(trial, undisturbed)
    print(f"{command}: killed at {len(each)} of {undisturbed['calls']} calls")


@in_both_forms
def test_a_write_that_is_cut_short_is_gone_on_with(command, seen):
    undisturbed, *each = seen["short"]
    assert each
    for trial in each:
        first = trial["first"]
        assert (first.get("hits"), first.get("code")) == (1, 0), first
        assert first["outcome"] == undisturbed["outcome"]
        check_trial(trial, undisturbed)
    print(f"{command}: {len(each)} of {undisturbed['calls']} writes cut short in turn")


@in_both_forms
def test_a_disk_that_fills_up_is_told_in_one_sentence_and_room_is_all_it_takes(command, seen):
    undisturbed, *each = seen["room"]
    for trial in each:
        first = trial["first"]
        assert "code" in first, first
        if first["hits"]:
            check_said(first)
            assert "No space left on device" in first["err"] or "the disk became full" in first["err"], first["err"]
        check_trial(trial, undisturbed)
    assert each[0]["first"]["hits"], "on a full disk nothing can be written"


def test_every_command_that_writes_is_among_them():
    from lsmix.cli import cli

    looks = {"init", "status", "ls", "diff", "logs", "completion", "verify", "gc"}  # gc only removes
    pages = {"show", "figure", "demo", "run", "rebuild", "finalize"}  # a PNG or a page of its own; or what stages write
    assert {command.split()[0] for command in COMMANDS} | looks | pages == set(cli.commands)
    assert {*SHORT_FORM, *STRIDES} <= set(COMMANDS)


# In a name space of its own, so that nobody else sees the disk and it is gone with the last process.
ON_A_FULL_DISK = """
mount -t tmpfs -o size=20k tmpfs "$1" || exit 77
place=$1; shift
"$@"; echo "full: $?"
find "$place" -name "*.part" -o -name manifest.json
mount -o remount,size=4m "$place" && "$@" && find "$place" -name manifest.json | wc -l
"""


def test_a_real_disk_that_is_full_is_told_in_one_sentence_and_room_is_all_it_takes(small_recipe, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    words = [sys.executable, "-m", "lsmix", "ingest", small_recipe, "--workspace", place / "runs", "-q"]
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_A_FULL_DISK, "sh", place, *words]
    try:
        done = subprocess.run(alone, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("a small disk needs 'unshare' of util-linux; it is not there")
    if "full:" not in done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No space left on device"), done.stderr
    assert done.stdout.splitlines() == ["full: 1", "1 of 1 artifacts made", done.stdout.splitlines()[-2], "1"]
