"""``make gpu-evidence``: the paper's flow on CIFAR-10, three pools and four classifiers, in several short calls.

Each call resumes where the last one stopped, and stops before its --minutes are over. The folder given by --carry
contains everything that the next call needs, in files under 16 MiB: results, the flow, and the checkpoint of unfinished
training. Keep this folder between calls (if OUT is set, it is also copied there). Latents and pools are rebuilt.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import roofline
from benchmarks.carry import join, split
from benchmarks.gpu import add_common_options, require_cuda
from benchmarks.pools import smooth_images
from benchmarks.sections import Results, card_name, copy_to_out, environment, results_folder
from benchmarks.sheets import BATCHES, pack, unpack

__all__ = ["main"]

_RECIPE = Path(__file__).with_name("evidence.toml")
_BUILD = Path(__file__).resolve().parents[1] / "build" / "gpu-evidence"
_STATE = "evidence.json"
_RESERVE_SECONDS = 25.0  # at the end of a call, for stopping and writing the pieces
_POOLS = {"lsmix": "ls-mix", "bernmix": "bern-mix", "linear": "linear"}  # name -> method, all with alpha 0.4
_RUNS = {
    "baseline": "",
    "lsmix": 'pool = "lsmix"',
    "cutmix": 'mix = [{ method = "cutmix", alpha = 1.0 }]',
    "cutmix-lsmix": 'mix = [{ method = "cutmix", alpha = 1.0 }, { pool = "lsmix" }]',
}


class Evidence:
    """The steps; each runs the recipe in one workspace and adds its measurements to the results."""

    def __init__(
        self, results: Results, workspace: Path, data: Path, device: str, iterations: int, *, tiny: bool
    ) -> None:
        self.results, self.workspace, self.device = results, workspace, device
        self._overrides = [f"data.path={json.dumps(str(data.resolve()))}"]
        if iterations:
            self._overrides.append(f"flow.training.iterations={iterations}")
        self._scale = "tiny" if tiny else ""

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps by name, in order."""
        steps: dict[str, Callable[[], None]] = {"flow": self._flow, "round trips": self._round_trips}
        steps |= {f"pool {name}": lambda name=name: self._pool(name) for name in _POOLS}
        return steps | {f"classifier {name}": lambda name=name: self._classifier(name) for name in _RUNS}

    def _run(self, stage: str, sections: str = "") -> Any:
        """Run the recipe with additional sections up to a stage; return the artifact of that stage."""
        from lsmix.pipeline.api import run

        recipe = self.workspace / "evidence.toml"
        recipe.write_text(_RECIPE.read_text(encoding="utf-8") + sections, encoding="utf-8")
        done = run(
            recipe,
            workspace=self.workspace,
            stage=stage,
            overrides=self._overrides,
            scale=self._scale,
            device=self.device,
            progress=_Log(self.results),
        )
        return done[stage]

    def _flow(self) -> None:
        from lsmix.pipeline.config.results import read_log

        built = self._run("train-glow")
        counts, log = built.manifest.counts, read_log(built.folder)
        session = log[:1]
        for line in log[1:]:  # keep only the last session; the clock of each session starts at 0
            session = [*session, line] if (line.seconds or 0) >= (session[-1].seconds or 0) else [line]
        steps = session[-1].iteration - session[0].iteration
        if steps:
            took = 1e3 * ((session[-1].seconds or 0) - (session[0].seconds or 0)) / steps
            predicted = roofline.flow_step_ms(built.manifest.config["training"]["precision"])
            self.results.add("step of 256 images, checkpoints included", took, "ms", predicted, steps=steps)
        self.results.add("training, all sessions", built.manifest.seconds, "s", steps=counts["iterations"])
        self.results.add("likelihood of the training images", counts["train_bits_per_dim"], "bits/dim")

    def _round_trips(self) -> None:
        from benchmarks.gpu_sections import tf32_round_trips
        from lsmix.data.dataset import open_dataset
        from lsmix.glow.checkpoint import load_flow
        from lsmix.pipeline.config.results import DATASET_FILE

        manifest = self._run("encode").manifest
        count, exact = manifest.counts["images"], manifest.counts["exact_round_trips"]
        self.results.add("exact round trips of training images", exact, f"of {count}", float(count))
        rate = 50_000 / roofline.ENCODE_SECONDS
        self.results.add("encode and decode, disk to disk", count / manifest.seconds, "images/s", rate)
        dataset = open_dataset(self._run("ingest").folder / DATASET_FILE)
        flow = load_flow(self._run("train-glow").folder, device=self.device)
        test, batch = dataset.test.images[:], manifest.config["batch_size"]
        back = flow.decode(flow.encode(test, batch_size=batch), batch_size=batch)
        exact = int((back == test).all(axis=(1, 2, 3)).sum())
        self.results.add("exact round trips of test images", exact, f"of {len(test)}", float(len(test)))
        exact = tf32_round_trips(flow, test, batch=batch)
        self.results.add("the same with TF32 in both directions, which lsmix does not use", exact, f"of {len(test)}")

    def _pool(self, name: str) -> None:
        manifest = self._run("mix", _pool_section(name)).manifest
        rate = 50_000 / roofline.COPY_SECONDS
        counts = {key: manifest.counts[key] for key in ("images", "decode_failed", "redrawn", "replaced")}
        self.results.add(f"mix {name}, disk to disk", counts["images"] / manifest.seconds, "images/s", rate, **counts)

    def _classifier(self, name: str) -> None:
        from lsmix.pipeline.config.results import read_metrics

        pool = _pool_section("lsmix") if "lsmix" in name else ""
        built = self._run("train", f"{pool}\n[runs.{name}]\n{_RUNS[name]}\n")
        metrics = read_metrics(built.folder)
        self.results.add("test error after the last epoch", metrics[-1].test_error, "%", epochs=len(metrics))
        updates, precision = metrics[-1].updates, built.manifest.config["precision"]
        predicted = roofline.classifier_step_ms("cnn-13", precision)
        took = 1e3 * built.manifest.seconds / updates
        self.results.add("update of 128 images, tests and checkpoints included", took, "ms", predicted)
        errors = {line.epoch: line.test_error for line in metrics if line.test_error is not None}
        curve = {f"epoch {epoch}": errors[epoch] for epoch in list(errors)[:: max(1, len(errors) // 10)]}
        self.results.add("lowest test error of all epochs", min(errors.values()), "%", **curve)


def _pool_section(name: str) -> str:
    return f'\n[pools.{name}]\nmethod = "{_POOLS[name]}"\nalpha = 0.4\n'


class _Log:
    """A progress reporter that writes messages to the log of the results."""

    def __init__(self, results: Results) -> None:
        self.info = self.warning = lambda message: results.info(f"  {message}")

    def __getattr__(self, name: str) -> Callable[..., None]:  # ignore counters and details
        return lambda *_, **__: None


def main(words: list[str]) -> int:
    """Run the command line; return 1 if a step failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of this call")
    parser.add_argument("--steps", type=int, default=99, help="maximum number of steps in this call")
    parser.add_argument(
        "--iterations",
        type=int,
        default=0,
        help="training iterations of the flow (default 8,200)",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("cifar-10-batches-bin"), help="folder of the binary batches or sheets"
    )
    parser.add_argument("--carry", type=Path, default=_BUILD / "carry", help="folder to keep from one call to the next")
    parser.add_argument("--workspace", type=Path, default=_BUILD / "runs", help="workspace; may be lost between calls")
    options = parser.parse_args(words)
    end = time.monotonic() + 60.0 * options.minutes - (0.0 if options.tiny else _RESERVE_SECONDS)
    device = "cpu" if options.tiny else require_cuda()
    options.workspace.mkdir(parents=True, exist_ok=True)
    data = _data(options.data, options.workspace, tiny=options.tiny)
    results = _open_results(options, device)
    for name in join(options.carry, options.workspace):
        results.info(f"restored: {name}")
    evidence = Evidence(results, options.workspace, data, device, options.iterations, tiny=options.tiny)
    _run_steps(evidence, options, end)
    copy_to_out(results.folder, results.folder.name)
    copy_to_out(options.carry, "carry")
    return 1 if any(section["status"] == "failed" for section in results.sections.values()) else 0


def _open_results(options: argparse.Namespace, device: str) -> Results:
    state = options.carry / _STATE
    kept = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    about = environment(device)
    started = kept.get("started", datetime.now(UTC).date().isoformat())
    about |= {"started": started, "predicted": f"by a roofline model for {roofline.CARD}, accurate to about ±40%"}
    if options.tiny:
        about["size"] = "toy size on the CPU: the numbers are meaningless"
    folder = options.out or results_folder(started, card_name(device), "-evidence")
    return Results(folder, f"CIFAR-10 on {about['device']}", about, kept.get("sections"))


def _run_steps(evidence: Evidence, options: argparse.Namespace, end: float) -> None:
    """Run the remaining steps until ``end``, a time of ``time.monotonic``."""
    results, steps = evidence.results, evidence.steps()
    left = [name for name in steps if results.sections.get(name, {}).get("status") != "done"]
    for name in left[: options.steps]:
        seconds = end - time.monotonic()
        if seconds <= 0:
            break
        try:
            with _interrupt_after(seconds) as is_over:
                results.section(name, steps[name], seconds=2 * seconds + 60)  # the interrupt comes first
        except KeyboardInterrupt:
            if not is_over():
                raise
            break
        finally:
            _keep(results, options)
    left = [name for name in steps if results.sections.get(name, {}).get("status") != "done"]
    results.info(f"\nResults: {results.folder}")
    results.info(f"To do: {', '.join(left)}. Run the same command again." if left else "All steps are done.")


def _keep(results: Results, options: argparse.Namespace) -> None:
    """Write everything that the next call needs to the folder given by --carry."""
    files = []
    for stage in ("train-glow", "train"):
        for folder in sorted((options.workspace / stage).glob("*-*")):
            finished = (folder / "manifest.json").is_file()
            if not finished or stage == "train-glow":  # results contain all numbers of finished classifiers
                inside = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
                files += sorted(inside, key=lambda path: (path.name == "manifest.json", path))
    split(options.workspace, files, options.carry)
    state = {"started": results.about["started"], "sections": results.sections}
    part = options.carry / f".{_STATE}.part"
    part.write_text(json.dumps(state, indent=1), encoding="utf-8")
    part.replace(options.carry / _STATE)


@contextlib.contextmanager
def _interrupt_after(seconds: float) -> Iterator[Callable[[], bool]]:
    """Interrupt the block like Ctrl-C after ``seconds``; yield a function that returns whether it was interrupted."""
    over = threading.Event()

    def interrupt() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield over.is_set
    finally:
        timer.cancel()


def _data(given: Path, workspace: Path, *, tiny: bool) -> Path:
    """Return the folder of the published binary batches; exit with a message if files are missing."""
    batches = workspace / "cifar-10-batches-bin"
    if tiny and not batches.is_dir():
        with tempfile.TemporaryDirectory() as temporary:  # packs and unpacks sheets, to test them, too
            _invent_batches(Path(temporary, "batches"))
            pack(Path(temporary, "batches"), Path(temporary, "sheets"))
            unpack(Path(temporary, "sheets"), batches)
    if tiny:
        return batches
    if any(given.rglob("*.webp")):
        unpack(given, batches)
        given = batches
    missing = [name for name in BATCHES if not (given / name).is_file()]
    if missing:
        sys.exit(
            f"{str(given)!r} does not contain CIFAR-10: {missing[0]} is missing. Set --data to a folder with "
            f"{', '.join(BATCHES)}, or with both parts written by 'python -m benchmarks sheets pack'."
        )
    return given


def _invent_batches(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(BATCHES[:-1]):
        images = smooth_images(10, seed=number)
        labels = np.arange(10, dtype=np.uint8)[:, None]
        records = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(10, -1)], axis=1)
        (folder / name).write_bytes(records.tobytes())
    (folder / BATCHES[-1]).write_text("\n".join(f"class{label}" for label in range(10)) + "\n", encoding="utf-8")
