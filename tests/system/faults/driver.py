"""Run commands of lsmix repeatedly in a separate process, each time with another fault, and report the results.

The process runs the command of a scene once, to import everything, and then forks a child for each trial. So a killed
trial affects no other trial, no trial inherits memory of another, and torch is loaded once for thousands of trials.

Start it with the path of the fault library, which must also be in LD_PRELOAD. It reads scenes and writes results as
lines of JSON.
"""

import contextlib
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Python 3.12 and newer warn here. Threads of the parent may hold locks, but none that the forks need.
warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)

COUNT, FAIL, SHORT, KILL, ROOM, READ_ONLY, SIGNAL = range(1, 8)
TIMEOUT_SECONDS = 1200  # for a scene, ten times as long as the slowest one takes on an idle machine


class Faults:
    """The controls of the fault library in this process."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_long]
        self._library.faults_clock.argtypes = [ctypes.c_long] * 3
        self._library.faults_calls.restype = self._library.faults_hits.restype = ctypes.c_long
        self._library.faults_looks.restype = ctypes.c_long
        self._library.faults_hit_name.restype = ctypes.c_char_p

    def arm(self, folder: str, mode: int, place: int = 0, number: int = 0, room: int = 0) -> None:
        self._library.faults_arm(folder.encode(), mode, place, number, room)

    def clock(self, before: int, after: int, at: int) -> None:
        self._library.faults_clock(before, after, at)

    def disarm(self) -> dict[str, Any]:
        """Disable faults; return the numbers of calls, faults and clock reads, and the name of the failed call."""
        library = self._library
        seen = {"calls": library.faults_calls(), "hits": library.faults_hits(), "looks": library.faults_looks()}
        library.faults_disarm()
        return {**seen, "hit": library.faults_hit_name().decode()}


def begin(work: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """Start ``work`` in a fork of this process; return the arguments for ``end``."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(here)
        try:
            answer = work()
        except BaseException:  # noqa: BLE001 - reported by the test
            answer = {"broken": traceback.format_exc()}
        with os.fdopen(there, "w") as stream:
            json.dump(answer, stream)
        os._exit(0)
    os.close(there)
    return child, here


def end(child: int, here: int) -> dict[str, Any]:
    """Return the result of the work, or the signal that killed the fork."""
    with os.fdopen(here) as stream:
        answer = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(answer) if answer else {"signal": -code}


def call(words: list[str]) -> dict[str, Any]:
    """Run the command line in this process."""
    from lsmix.cli import main

    sys.argv, code = ["lsmix", *words], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001 - the tests look for tracebacks
            traceback.print_exc()
            code = -1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def files_below(folders: list[str]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in Path(folder).rglob("*") if path.is_file())


def digests(folders: list[str]) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files_below(folders)}


def outcome(folders: list[str]) -> dict[str, str]:
    """Verify every artifact in these folders; return their content digests."""
    from lsmix.data.artifact import MANIFEST_NAME, read_manifest, verify_files

    found = {}
    for place in map(Path, folders):
        for folder in [place, *(path for path in sorted(place.rglob("*")) if path.is_dir())]:
            if (folder / MANIFEST_NAME).is_file():
                manifest = read_manifest(folder)
                verify_files(folder, manifest)
                found[str(folder)] = manifest.content_digest
    return found


class Scene:
    """A command, the folders that it writes, and the folders that must not change."""

    def __init__(self, facts: dict[str, Any], faults: Faults) -> None:
        self.words: list[str] = facts["words"]
        self.within: str = facts["within"]  # folder below which calls fail
        self.made: list[str] = facts["made"]  # folders that the command writes, removed before each trial
        self.kept: list[str] = facts["kept"]  # folders whose files must not change
        self.faults = faults

    def reset(self) -> None:
        for folder in self.made:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(f"{folder}.part", ignore_errors=True)

    def warm_up(self) -> None:
        """Run the command in this process, to import everything that it needs."""
        from lsmix.pipeline.engine import shards

        self.reset()
        said = call(self.words)
        assert said["code"] == 0, f"the command fails without any fault: {said}"
        shards.close_job()
        gc.freeze()  # otherwise garbage collection would copy all memory pages of a child

    def work(self, mode: int, clock: tuple[int, int, int] = (0, 0, -1), **more: int) -> dict[str, Any]:
        """Run the command with a fault; return its output and, if it succeeded, its content digests."""
        self.faults.clock(*clock)
        self.faults.arm(self.within, mode, **more)
        said = call(self.words)
        seen = self.faults.disarm()
        is_made = said["code"] == 0 or "already exists and is not overwritten" in said["err"]
        return {**said, **seen, "outcome": outcome(self.made) if is_made else None}

    def run(self, mode: int, **more: Any) -> dict[str, Any]:
        """Run ``work`` in a fork."""
        return end(*begin(lambda: self.work(mode, **more)))

    def race(self, runners: int) -> dict[str, Any]:
        """Run the command in several forks at the same time, and then once more."""
        self.reset()
        at = time.monotonic() + 0.1

        def work() -> dict[str, Any]:
            while time.monotonic() < at:
                pass
            return self.work(COUNT)

        children = [begin(work) for _ in range(runners)]
        return {"runs": [end(*child) for child in children], "again": self.run(COUNT)}

    def trial(self, mode: int, **more: Any) -> dict[str, Any]:
        """Run the command with a fault and then without; return the files left by the first run, and both results."""
        self.reset()
        before = digests(self.kept)
        first = self.run(mode, **more)
        after = digests(self.kept)
        left = [str(path) for path in files_below([*self.made, *(f"{folder}.part" for folder in self.made)])]
        return {
            "first": first,
            "changed": sorted(path for path in {*before, *after} if before.get(path) != after.get(path)),
            "left": left,
            "again": self.run(COUNT),
            "parts": [name for name in map(str, files_below(self.made)) if name.endswith(".part")],
        }


def trials(scene: Scene, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the result of an undisturbed run, then of a trial for each requested call, disk size, clock or race."""
    mode, numbers = wanted["mode"], wanted.get("numbers", [0])
    scene.reset()
    undisturbed = scene.run(SHORT if mode == SHORT else COUNT)  # SHORT counts only calls that write bytes
    yield undisturbed
    if "commands" in wanted:  # run these on the result of the undisturbed run
        for scene.words in wanted["commands"]:
            yield scene.run(mode)
        return
    for runners in wanted.get("races", ()):
        yield scene.race(runners)
    each = [{"room": room} for room in wanted.get("rooms", ())]
    each += [{"clock": clock} for clock in wanted.get("clocks", ())]
    if "stride" in wanted:
        places = range(1 + wanted.get("shift", 0), undisturbed["calls"] + 1, wanted["stride"])
        each += [{"place": place, "number": numbers[index % len(numbers)]} for index, place in enumerate(places)]
    for more in each:
        yield {**more, **scene.trial(mode, **more)}


def main() -> None:
    import lsmix.data.sharing.transfer
    import lsmix.data.table
    import lsmix.pipeline.engine.progress
    import lsmix.pipeline.engine.run_log

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT by default
    lsmix.data.table._WRITERS = lsmix.data.sharing.transfer._JOBS = 1  # so that the order of calls is deterministic
    # Progress notes and log lines that depend on time would change the number of calls on a busy machine.
    lsmix.pipeline.engine.progress._SECONDS_BETWEEN = lsmix.pipeline.engine.run_log._SECONDS_BETWEEN = math.inf
    faults = Faults(sys.argv[1])
    for line in sys.stdin:
        signal.alarm(TIMEOUT_SECONDS)
        facts = json.loads(line)
        scene = Scene(facts, faults)
        scene.warm_up()
        print(json.dumps([list(trials(scene, wanted)) for wanted in facts["trials"]]), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
