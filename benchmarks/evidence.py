"""``make gpu-evidence``: CIFAR-10 through the paper's flow, three pools and four trainings, in several short calls.

A call goes on where the last one stopped, and stops by itself before its minutes are over. What the next call needs lies
in the folder of --carry, in files under 16 MiB: results so far, the flow, and the checkpoint of what is unfinished. Keep
that folder between calls (with OUT set it is copied there, too); latents and pools are made again.
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
_RESERVE_SECONDS = 25.0  # at the end of a call, to stop and to write the pieces
_POOLS = {"lsmix": "ls-mix", "bernmix": "bern-mix", "linear": "linear"}  # by name, their methods, all with alpha 0.4
_RUNS = {
    "baseline": "",
    "lsmix": 'pool = "lsmix"',
    "cutmix": 'mix = [{ method = "cutmix", alpha = 1.0 }]',
    "cutmix-lsmix": 'mix = [{ method = "cutmix", alpha = 1.0 }, { pool = "lsmix" }]',
}


class Evidence:
    """The steps, each of which runs a recipe in one workspace and adds its figures to the results."""

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
        """Run the recipe with more sections up to a stage; return the artifact of that stage."""
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
        for line in log[1:]:  # the last session's lines: its clock starts at 0
            session = [*session, line] if (line.seconds or 0) >= (session[-1].seconds or 0) else [line]
        steps = session[-1].iteration - session[0].iteration
        if steps:
            took = 1e3 * ((session[-1].seconds or 0) - (session[0].seconds or 0)) / steps
            predicted = roofline.flow_step_ms(built.manifest.config["training"]["precision"])
            self.results.add("a step of 256 images, checkpoints included", took, "ms", predicted, steps=steps)
        self.results.add("training in all sessions", built.manifest.seconds, "s", steps=counts["iterations"])
        self.results.add("training images", counts["train_bits_per_dim"], "bits/dim")

    def _round_trips(self) -> None:
        from benchmarks.gpu_sections import tf32_round_trips
        from lsmix.data.dataset import open_dataset
        from lsmix.glow.checkpoint import load_flow
        from lsmix.pipeline.config.results import DATASET_FILE

        manifest = self._run("encode").manifest
        count, exact = manifest.counts["images"], manifest.counts["exact_round_trips"]
        self.results.add("training images that come back exactly", exact, f"of {count}", float(count))
        rate = 50_000 / roofline.ENCODE_SECONDS
        self.results.add("encode and decode, disk to disk", count / manifest.seconds, "images/s", rate)
        dataset = open_dataset(self._run("ingest").folder / DATASET_FILE)
        flow = load_flow(self._run("train-glow").folder, device=self.device)
        test, batch = dataset.test.images[:], manifest.config["batch_size"]
        back = flow.decode(flow.encode(test, batch_size=batch), batch_size=batch)
        exact = int((back == test).all(axis=(1, 2, 3)).sum())
        self.results.add("test images that come back exactly", exact, f"of {len(test)}", float(len(test)))
        exact = tf32_round_trips(flow, test, batch=batch)
        self.results.add("… with TF32 in both directions, which lsmix does not use", exact, f"of {len(test)}")

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
        self.results.add("error on the test images", metrics[-1].test_error, "%", epochs=len(metrics))
        updates, precision = metrics[-1].updates, built.manifest.config["precision"]
        predicted = roofline.classifier_step_ms("cnn-13", precision)
        took = 1e3 * built.manifest.seconds / updates
        self.results.add("an update of 128 images, tests and checkpoints included", took, "ms", predicted)
        errors = {line.epoch: line.test_error for line in metrics if line.test_error is not None}
        curve = {f"epoch {epoch}": errors[epoch] for epoch in list(errors)[:: max(1, len(errors) // 10)]}
        self.results.add("least error on the way", min(errors.values()), "%", **curve)


def _pool_section(name: str) -> str:
    return f'\n[pools.{name}]\nmethod = "{_POOLS[name]}"\nalpha = 0.4\n'


class _Log:
    """Writes what a run tells into the log of the results."""

    def __init__(self, results: Results) -> None:
        self.info = self.warning = lambda message: results.info(f"  {message}")

    def __getattr__(self, name: str) -> Callable[..., None]:  # counts and details, which a log does not need
        return lambda *_, **__: None


def main(words: list[str]) -> int:
    """Go on as the command line says; return 1 if a step failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call; it stops before they are over")
    parser.add_argument("--steps", type=int, default=99, help="steps of this call, at most")
    parser.add_argument("--iterations", type=int, default=0, help="of the flow, if not 8,200; the same in each call")
    parser.add_argument(
        "--data", type=Path, default=Path("cifar-10-batches-bin"), help="published binary batches, or their sheets"
    )
    parser.add_argument("--carry", type=Path, default=_BUILD / "carry", help="what goes from one call to the next")
    parser.add_argument("--workspace", type=Path, default=_BUILD / "runs", help="of lsmix; may be lost between calls")
    options = parser.parse_args(words)
    end = time.monotonic() + 60.0 * options.minutes - (0.0 if options.tiny else _RESERVE_SECONDS)
    device = "cpu" if options.tiny else require_cuda()
    options.workspace.mkdir(parents=True, exist_ok=True)
    data = _data(options.data, options.workspace, tiny=options.tiny)
    results = _open_results(options, device)
    for name in join(options.carry, options.workspace):
        results.info(f"carried over: {name}")
    evidence = Evidence(results, options.workspace, data, device, options.iterations, tiny=options.tiny)
    _go_on(evidence, options, end)
    copy_to_out(results.folder, results.folder.name)
    copy_to_out(options.carry, "carry")
    return 1 if any(section["status"] == "failed" for section in results.sections.values()) else 0


def _open_results(options: argparse.Namespace, device: str) -> Results:
    state = options.carry / _STATE
    kept = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    about = environment(device)
    started = kept.get("started", datetime.now(UTC).date().isoformat())
    about |= {"started": started, "predicted": f"by a roofline model for {roofline.CARD}, right to about ±40%"}
    if options.tiny:
        about["size"] = "toy size on the CPU: the figures mean nothing"
    folder = options.out or results_folder(started, card_name(device), "-evidence")
    return Results(folder, f"CIFAR-10 on {about['device']}", about, kept.get("sections"))


def _go_on(evidence: Evidence, options: argparse.Namespace, end: float) -> None:
    """Do steps until they are done, or the time is over."""
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
    """Write what the next call needs to the folder of --carry."""
    files = []
    for stage in ("train-glow", "train"):
        for folder in sorted((options.workspace / stage).glob("*-*")):
            finished = (folder / "manifest.json").is_file()
            if not finished or stage == "train-glow":  # of a finished classifier the results have all that counts
                inside = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
                files += sorted(inside, key=lambda path: (path.name == "manifest.json", path))
    split(options.workspace, files, options.carry)
    state = {"started": results.about["started"], "sections": results.sections}
    part = options.carry / f".{_STATE}.part"
    part.write_text(json.dumps(state, indent=1), encoding="utf-8")
    part.replace(options.carry / _STATE)


@contextlib.contextmanager
def _interrupt_after(seconds: float) -> Iterator[Callable[[], bool]]:
    """Interrupt the block as Ctrl-C does once its time is over; yield a function that tells whether it did."""
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
    """Return the folder of the published binary batches; end the program where they are not there."""
    batches = workspace / "cifar-10-batches-bin"
    if tiny and not batches.is_dir():
        with tempfile.TemporaryDirectory() as temporary:  # by way of sheets, so that these are tried, too
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
            f"CIFAR-10 is not in {str(given)!r}: {missing[0]} is missing. Name a folder with {', '.join(BATCHES)}, "
            "or with both parts that 'python -m benchmarks sheets pack' wrote, by --data."
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
