"""If any system call of a command fails, it prints one error line, does no harm, and the next run succeeds.

Each trial is a real run of the command in which one system call fails below Python, whether it is made by lsmix, NumPy,
HDF5, Arrow or the standard library.
"""

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from driver import FAIL, KILL, ROOM, SHORT

from lsmix.pipeline.api import push
from lsmix.pipeline.stages.registry import STAGES

pytestmark = pytest.mark.faults

FORMS = ("hdf5", "parquet", "webdataset", "folder")
COMMANDS = (*STAGES, *(f"export {form}" for form in FORMS), "push", "pull", "card")
# Command -> step between tried calls, if slow tests are not run. Commands that do not load torch come first.
SHORT_FORM = {"ingest": 12, "export hdf5": 30, "pull": 70, "mix": 100}
STRIDES = {"report": 4}  # a report takes a second, so only every fourth call is tried


def scene_of(command: str, recipe: Path, workspace: Path, place: Path) -> dict[str, Any]:
    """Prepare the folders of a command and return its scene; see ``driver.Scene``."""
    if command in STAGES:
        for later in STAGES[STAGES.index(command) + 1 :]:
            shutil.rmtree(workspace / later)
        return {
            "words": [command, recipe, "--workspace", workspace, "--device", "cpu", "-q"],
            "within": workspace,
            "made": [workspace / command, workspace / ".locks"],
            "kept": [*(workspace / stage for stage in STAGES if stage != command), recipe.parent],
        }
    name, _, form = command.partition(" ")
    source, kept = next((workspace / "mix").iterdir()), [workspace]
    if name == "pull":
        push(source, str(place / "remote"))
        source = place / "remote"
        kept.append(source)
    options = {"export": ["--format", form, "-q"], "card": ["--licence", "CC-BY-4.0", "--creator", "A. Nother"]}
    (place / "new").mkdir(parents=True)
    words = [name, source, place / "new" / name, *options.get(name, ["-q"])]
    return {"words": words, "within": place / "new", "made": [place / "new" / name], "kept": kept}


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((command, stride), id=f"{command}, some calls") for command, stride in SHORT_FORM.items()),
        *(pytest.param((command, 0), id=command, marks=pytest.mark.slow) for command in COMMANDS),
    ],
)
def seen(request, small_recipe, small_finished, tmp_path_factory, trials) -> dict[str, list[dict[str, Any]]]:
    """Return the undisturbed run and the trials of a command, by kind of fault."""
    command, short = request.param
    place = tmp_path_factory.mktemp("disk")
    workspace = Path(shutil.copytree(small_finished, place / "runs"))
    step = short or STRIDES.get(command, 1)
    wanted = {
        "fail": {"mode": FAIL, "numbers": [errno.ENOSPC, errno.EIO], "stride": step, "shift": step // 2},
        "kill": {"mode": KILL, "stride": step if short else 3 * step},
        "short": {"mode": SHORT, "stride": -(-step // 3)},
        "room": {"mode": ROOM, "rooms": [0, 700] if short else [0, 1, 100, 700, 1500, 4000, 8000]},
    }
    scene = scene_of(command, small_recipe, workspace, place)
    found = dict(zip(wanted, trials(**scene, trials=list(wanted.values())), strict=True))
    counts = ", ".join(f"{name} {len(each) - 1}" for name, each in found.items())
    print(f"{command}: {found['fail'][0]['calls']} calls; trials: {counts}")
    return found


def check_said(said: dict[str, Any]) -> None:
    """Check that a failed run printed one error line on stderr, and otherwise only warnings."""
    lines = said["err"].splitlines()
    assert said["code"] in (1, 5, 6), said
    assert [line.split(":")[0] for line in lines if not line.startswith("warning: ")] == ["error"], said["err"]
    assert (said["out"], "Traceback" in said["err"]) == ("", False)


def check_trial(trial: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Check the files left by the faulty run and the result of the next run."""
    again = trial["again"]
    assert trial["changed"] == [], "other files must not change"
    assert again.get("outcome") is not None, again
    assert again["outcome"] == undisturbed["outcome"], "the next run must produce the digests of an undisturbed run"
    assert trial["parts"] == [], "the next run must remove temporary files of a killed run"


def test_if_any_call_fails_there_is_one_error_line_and_the_next_run_succeeds(seen):
    undisturbed, *each = seen["fail"]
    assert undisturbed["code"] == 0
    assert undisturbed["outcome"]
    for trial in each:
        first = trial["first"]
        assert first.get("hits") == 1, first  # otherwise it crashed, or the call was not made
        if first["code"] == 0:
            assert first["outcome"] == undisturbed["outcome"], f"a failed {first['hit']} must not change the result"
        else:
            check_said(first)
            assert not [name for name in trial["left"] if name.endswith(".part")], (
                "a failed run must remove its temporary files"
            )
        check_trial(trial, undisturbed)
    assert sum(trial["first"]["code"] != 0 for trial in each) > len(each) // 2


def test_after_a_kill_at_any_call_the_next_run_produces_the_bytes_of_an_undisturbed_run(seen):
    undisturbed, *each = seen["kill"]
    assert each
    for trial in each:
        assert trial["first"] == {"signal": signal.SIGKILL}
        check_trial(trial, undisturbed)


def test_a_partial_write_is_continued(seen):
    undisturbed, *each = seen["short"]
    assert each
    for trial in each:
        first = trial["first"]
        assert (first.get("hits"), first.get("code")) == (1, 0), first
        assert first["outcome"] == undisturbed["outcome"]
        check_trial(trial, undisturbed)


def test_on_a_full_disk_there_is_one_error_line_and_the_next_run_with_space_succeeds(seen):
    undisturbed, *each = seen["room"]
    for trial in each:
        first = trial["first"]
        assert "code" in first, first
        if first["hits"]:
            check_said(first)
            assert "No space left on device" in first["err"] or "the disk became full" in first["err"], first["err"]
        check_trial(trial, undisturbed)
    assert each[0]["first"]["hits"], "on a full disk nothing can be written"


def test_every_command_that_writes_is_tested():
    from lsmix.cli import cli

    looks = {"init", "status", "ls", "diff", "logs", "completion", "verify", "gc"}  # gc only removes files
    pages = {"show", "figure", "demo", "run", "rebuild", "finalize"}  # they write a single file, or run stages
    assert {command.split()[0] for command in COMMANDS} | looks | pages == set(cli.commands)
    assert {*SHORT_FORM, *STRIDES} <= set(COMMANDS)


# Runs in a separate mount namespace, so that the disk disappears with the last process.
ON_A_FULL_DISK = """
mount -t tmpfs -o size=20k tmpfs "$1" || exit 77
place=$1; shift
"$@"; echo "full: $?"
find "$place" -name "*.part" -o -name manifest.json
mount -o remount,size=4m "$place" && "$@" && find "$place" -name manifest.json | wc -l
"""


def test_on_a_real_full_disk_there_is_one_error_line_and_the_next_run_with_space_succeeds(small_recipe, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    words = [sys.executable, "-m", "lsmix", "ingest", small_recipe, "--workspace", place / "runs", "-q"]
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_A_FULL_DISK, "sh", place, *words]
    try:
        done = subprocess.run(alone, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("needs 'unshare' from util-linux")
    if "full:" not in done.stdout:
        pytest.skip(f"needs permission to mount a small disk: {done.stderr.strip()}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No space left on device"), done.stderr
    assert done.stdout.splitlines() == ["full: 1", "1 of 1 artifacts made", done.stdout.splitlines()[-2], "1"]
