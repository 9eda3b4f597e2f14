"""``lsmix init --from``: generate a recipe for the user's own data set."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace as with_fields

from lsmix.data.errors import RecipeError, format_duration
from lsmix.data.pool_spec import EncodeConfig
from lsmix.data.readers.dataset_writer import plan_splits
from lsmix.data.readers.hub import hub_folder, is_hub
from lsmix.data.readers.registry import SourceConfig, summarise_source
from lsmix.data.readers.source_images import LabelsTableError, SourceSummary
from lsmix.data.store import NATURAL_32
from lsmix.glow.config import FlowTraining
from lsmix.pipeline.config.schema import DataConfig, FlowRecipe, PoolRecipe, RecipeReport, TrainConfig
from lsmix.pipeline.engine.resolver import Resolver, expected_size
from lsmix.pipeline.engine.stage import DatasetSize, Stage
from lsmix.pipeline.stages.encode import ENCODE
from lsmix.pipeline.stages.ingest import SPLIT_WORDS
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.stages.report import REPORT
from lsmix.pipeline.stages.train import TRAIN
from lsmix.pipeline.stages.train_flow import TRAIN_GLOW
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["split_sizes", "starter_recipe"]

_FLOW_SECONDS = 2400  # budget for training the flow; the classifiers and the pool get half of it each
_FLOWS = ((8, 64), (4, 48))  # (steps, hidden channels), best first
_ITERATIONS = (500, 8200)  # minimum, and the paper's number
_FLOW_EPOCHS = 200  # a flow overfits its training images after more
_BATCH = 64
_EPOCHS = (3, 50)
_WIDTHS = (32, 16)  # of the classifier, best first
_ENOUGH_EPOCHS = 10
_TRAININGS = 4  # two runs with two seeds
_MAX_COPIES = 10
_SHARES = (0.1, 0.03, 0.01)  # of the images, for the test split; the held-out split gets half as many
_MAX_SIDE = 64  # pixels; larger images are scaled to _SIDE
_SIDE = 32
_CLASSES_SHOWN = 30
_NATURAL = FlowRecipe(levels=3, steps=8, hidden=96)  # the shape of NATURAL_32


class _Plan(NamedTuple):
    """The chosen settings, and the estimated seconds of each stage."""

    flow: FlowRecipe
    classifier: TrainConfig
    pool: PoolRecipe
    seconds: dict[str, float]


def starter_recipe(path: str, *, workspace: Path | str = "runs") -> str:
    """Return a commented recipe for a data set, with settings for a run of one to two hours on two CPU cores.

    Args:
        path: File or folder of the data set, or ``hf://datasets/OWNER/NAME``, which is downloaded; copied to the
            recipe.
        workspace: Workspace whose artifacts are used to estimate the speed of this machine.

    Raises:
        MissingError: The path does not exist.
        SourceError: The path cannot be read as a data set.
        RecipeError: There are too few images to hold some out.
    """
    fields: dict[str, Any] = {"path": path}
    if is_hub(path):
        hub_folder(path, fetch=True)
    try:
        summary = summarise_source(SourceConfig(**fields))
    except LabelsTableError as error:
        fields |= error.fields
        summary = summarise_source(SourceConfig(**fields))
    (height, width), _ = summary.sizes.most_common(1)[0] if summary.sizes else ((_SIDE, _SIDE), 0)
    if len(summary.sizes) != 1 or max(height, width) > _MAX_SIDE:
        fields["size"] = height = width = _SIDE
    if summary.report:
        fields["on_error"] = "skip"
    fields |= split_sizes(summary)
    size = expected_size(DataConfig(**fields), summary)
    return "".join(f"{line}\n" for line in _lines(summary, fields, _choose(size, Resolver(Workspace(workspace)))))


def split_sizes(summary: SourceSummary) -> dict[str, int]:
    """Return how many training images to move to each split that the data set does not come with."""
    labels = summary.labels
    for share in (*_SHARES, 0.0):
        images = len(labels["train"])
        wanted = {} if "test" in labels else {"test": max(1, round(share * images))}
        if "heldout" not in labels:
            wanted["heldout"] = round(share / 2 * images)
        try:
            numbers = {"test": 0, "heldout": 0, **wanted}
            plan_splits(labels, summary.class_names, **numbers, limit=None, seed=0)
        except RecipeError:
            if not share:
                raise
        else:
            return wanted
    raise AssertionError("unreachable: the loop returns or raises")


def _choose(size: DatasetSize, resolver: Resolver) -> _Plan:
    levels = max(2, min(4, (min(size.height, size.width) // 4).bit_length() - 1))  # 32×32 → 4×4
    if (size.height, size.width, size.channels) == (_SIDE, _SIDE, 3):
        return _with_classifier(with_fields(_NATURAL, threads=min(8, os.cpu_count() or 1)), size, resolver)
    least, most = _ITERATIONS
    most = max(least, min(most, _FLOW_EPOCHS * size.images // _BATCH))
    flow = FlowRecipe()
    for steps, hidden in _FLOWS:
        flow = FlowRecipe(levels=levels, steps=steps, hidden=hidden, threads=min(8, os.cpu_count() or 1))
        size = replace(size, flow=flow)
        thousand = with_fields(flow, training=FlowTraining(iterations=1000, batch_size=_BATCH))
        one = _seconds(resolver, TRAIN_GLOW, thousand, size)
        iterations = min(most, int(1000 * _FLOW_SECONDS / one))
        if iterations >= least:
            break
    training = FlowTraining(
        iterations=max(least, iterations // 100 * 100), batch_size=_BATCH, learning_rate=5e-4, warmup=100
    )
    return _with_classifier(with_fields(flow, training=training), size, resolver)


def _seconds(resolver: Resolver, stage: Stage, config: Any, size: DatasetSize) -> float:
    return resolver.seconds(stage.name, stage.estimate(config, size))


def _with_classifier(flow: FlowRecipe, size: DatasetSize, resolver: Resolver) -> _Plan:
    """Choose the classifier and the pool for a flow."""
    size = replace(size, flow=flow)

    def seconds(stage: Stage, config: Any) -> float:
        return _seconds(resolver, stage, config, size)

    classifier = TrainConfig()
    for width in _WIDTHS:
        classifier = TrainConfig(width=width, epochs=1, batch_size=_BATCH, schedule="cosine", threads=flow.threads)
        epochs = int(_FLOW_SECONDS / 2 / (_TRAININGS * seconds(TRAIN, classifier)))
        if epochs >= _ENOUGH_EPOCHS:
            break
    classifier = with_fields(classifier, epochs=min(max(epochs, _EPOCHS[0]), _EPOCHS[1]))
    copies = int(_FLOW_SECONDS / 2 / seconds(MIX, PoolRecipe(copies=1)))
    pool = PoolRecipe(copies=max(1, min(copies, classifier.epochs, _MAX_COPIES)))
    times = {
        "train-glow": 0.0 if flow.training is _NATURAL.training else seconds(TRAIN_GLOW, flow),
        "encode": seconds(ENCODE, EncodeConfig()),
        "mix": seconds(MIX, pool),
        "train": _TRAININGS * seconds(TRAIN, classifier),
        "report": seconds(REPORT, RecipeReport()),
    }
    return _Plan(flow, classifier, pool, times)


def _lines(summary: SourceSummary, fields: dict[str, Any], plan: _Plan) -> Iterator[str]:
    yield "# Written by 'lsmix init --from'. 'lsmix status' shows what would run and how long it takes; 'lsmix run' runs it."
    yield from (_comment(line) for line in _found(summary))
    hours = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in plan.seconds.items() if seconds)
    yield _comment(f"Estimated: {hours}; {format_duration(sum(plan.seconds.values()))} in total.")
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(fields["path"]).resolve().name.partition(".")[0]).strip("-_")
    yield from ("format = 1", f"name = {_value(name or 'mine')}", "", "[data]")
    comments = {
        "path": f"{summary.format}; relative to this file's folder",
        "size": "side in pixels; images are scaled and cropped to the centre; 64 shows more detail and takes 4 times as long",
        "on_error": 'skip and count unreadable images; "stop" reports them and stops',
        "test": "images to move from the training to the test split, in proportion to the classes",
        "heldout": "images to hold out from training, to measure the flow",
    }
    for field, value in fields.items():
        yield f"{field} = {_value(value)}" + (f" # {comments[field]}" if field in comments else "")
    licence, citation = summary.licence, summary.citation
    yield f"# licence = {_value(licence or 'CC-BY-4.0')} # of the images; shown in pools that you share"
    yield f"# citation = {_value(citation or 'A. Author, My images, 2026')}"
    flow, classifier = plan.flow, plan.classifier
    yield from _natural_lines() if flow.training is _NATURAL.training else _flow_lines(flow)
    yield from (
        "",
        "[pools.lsmix]",
        f"copies = {plan.pool.copies} # mixes per training image",
        "",
        "[classifier] # trained twice on the original images and twice on the pool",
        f"width = {classifier.width}",
        f"epochs = {classifier.epochs}",
        f"batch_size = {classifier.batch_size}",
        f'schedule = "{classifier.schedule}"',
        f"threads = {classifier.threads}",
        "flip = true",
        "",
        "[runs.baseline]",
        "seeds = [0, 1]",
        "",
        "[runs.lsmix]",
        'pool = "lsmix"',
        "seeds = [0, 1]",
    )


def _natural_lines() -> Iterator[str]:
    yield from (
        "",
        "[flow]",
        f'path = "{NATURAL_32}" # bundled with lsmix, for photos of 32×32 pixels; no flow is trained',
        "# To train it further on your images, use these lines instead:",
        f'# start_from = "{NATURAL_32}"',
        *(f"# {name} = {getattr(_NATURAL, name)}" for name in ("levels", "steps", "hidden")),
        "# training = { iterations = 500, batch_size = 32, learning_rate = 2e-4, warmup = 100 }",
    )


def _flow_lines(flow: FlowRecipe) -> Iterator[str]:
    yield from (
        "",
        "[flow] # on a GPU: steps = 32, hidden = 128, iterations = 8200, batch_size = 256",
        f"levels = {flow.levels}",
        f"steps = {flow.steps}",
        f"hidden = {flow.hidden}",
        f"threads = {flow.threads}",
        "",
        "[flow.training]",
        f"iterations = {flow.training.iterations} # more iterations give better mixes",
        f"batch_size = {flow.training.batch_size}",
        f"learning_rate = {flow.training.learning_rate}",
        f"warmup = {flow.training.warmup}",
        "flip = true # set to false, here and below, if mirroring changes the meaning, as for digits and letters",
    )


def _found(summary: SourceSummary) -> Iterator[str]:
    """Describe the data set, and which files are skipped."""
    splits = ", ".join(f"{len(labels):,} {SPLIT_WORDS[name]}" for name, labels in summary.labels.items())
    yield f"Format {summary.format}: {splits} images in {len(summary.class_names):,} classes."
    counts = {name: int((summary.labels["train"] == label).sum()) for label, name in enumerate(summary.class_names)}
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_CLASSES_SHOWN]]
    more = len(counts) - len(shown)
    yield "Training images by class: " + ", ".join(shown) + (f" and {more:,} more classes." if more else ".")
    sizes = ", ".join(f"{width}×{height}" for (height, width), _ in summary.sizes.most_common(3))
    yield f"Sizes: {sizes}{', …' if len(summary.sizes) > 3 else ''}."
    if summary.report:
        yield from (line for line in summary.report.lines() if line.startswith(("left out", "'")))


def _comment(text: str) -> str:
    return "# " + "".join(letter if letter.isprintable() else "?" for letter in text)


def _value(value: object) -> str:
    return msgspec.json.encode(value).decode()  # JSON strings and numbers are valid TOML
