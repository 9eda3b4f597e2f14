"""The naturalness stage measures, for each method, how natural mixed images are to a flow that has seen no source.

Mean bits per dimension would mislead: grey and blurred images are more likely than photographs. The stage therefore
compares complete distributions in both directions, the features of a classifier, and the visibility of seams.
"""

from typing import TYPE_CHECKING

import msgspec

from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.errors import RecipeError
from lsmix.pipeline.config.results import (
    NATURALNESS_FILE,
    SHEET_FILE,
    WEIGHTS_FILE,
    Naturalness,
    write_naturalness,
)
from lsmix.pipeline.config.schema import NaturalnessConfig, TrainConfig
from lsmix.pipeline.engine.device import device_memory
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask

if TYPE_CHECKING:
    from torch import nn

    from lsmix.pipeline.naturalness.measures import Scores
    from lsmix.pipeline.naturalness.samples import SampleSet

__all__ = ["NATURALNESS"]

_SHEET_ROWS = 8


def run(task: StageTask) -> StageResult:
    """Create and measure all samples; write the results and a sheet of images."""
    from lsmix.data.latents import open_latents
    from lsmix.glow.checkpoint import load_flow
    from lsmix.pipeline.naturalness.measures import measure, summarise
    from lsmix.pipeline.naturalness.metrics import Resamples
    from lsmix.pipeline.naturalness.samples import SampleSet

    config: NaturalnessConfig = task.config
    dataset = open_dataset(task.inputs["dataset"])
    count = _sample_size(task, dataset)
    with device_memory(task.label, task.device):
        flow, evaluator = (load_flow(task.inputs[role], device=task.device) for role in ("flow", "evaluator"))
    samples = SampleSet(dataset, open_latents(task.inputs["latents"]), flow, config, count=count)
    classifier = _open_classifier(task, dataset) if "classifier" in task.inputs else None
    every = samples.all()
    task.progress.start(task.label, len(every), "sample")
    measured = []
    with device_memory(task.label, task.device, "naturalness.batch_size", config.batch_size):
        for sample in every:
            measured.append(measure(sample, evaluator, classifier, config, count=count, shown=_SHEET_ROWS))
            task.progress.advance()
    drawn = Resamples(count=config.bootstrap, pairs=count, originals=count, seed=config.seed)
    result = Naturalness(
        lam=config.lam,
        pairs=count,
        pairs_asked=config.pairs,
        bootstrap=config.bootstrap,
        evaluator_bits=evaluator.config.bits,
        classifier=task.inputs["classifier"].manifest.name if "classifier" in task.inputs else "",
        features=0 if measured[0].features is None else measured[0].features.shape[1],
        samples=tuple(summarise(one, measured[0], drawn) for one in measured),
    )
    write_atomic(task.folder / SHEET_FILE, _sheet(samples, measured))
    write_naturalness(task.folder, result)
    task.progress.finish()
    decode_failed = sum(one.decode_failed or 0 for one in measured)
    counts = {"pairs": count, "samples": len(every), "decode_failed": decode_failed}
    return StageResult(payload=frozenset({NATURALNESS_FILE}), counts=counts)


def _open_classifier(task: StageTask, dataset: DataSet) -> "nn.Module":
    from lsmix.classifiers.checkpoint import load_classifier

    item = task.inputs["classifier"]
    config = msgspec.convert(item.manifest.config, TrainConfig)
    classes = len(dataset.class_names)
    return load_classifier(item.file(WEIGHTS_FILE), config, classes, dataset.image_shape, task.device)


def _sample_size(task: StageTask, dataset: DataSet) -> int:
    """Return n, the size of every sample: ``pairs``, limited by the held-out images and pairs of unseen sources."""
    config: NaturalnessConfig = task.config
    requested = config.pairs
    heldout, pairs = len(dataset.heldout), (len(dataset.train) + 1) // 4  # two even rows each
    count = min(requested, heldout, pairs)
    if count < 2:
        raise RecipeError(
            f"{task.label}: needs at least 2 held-out images and 8 training images, got {heldout} and "
            f"{len(dataset.train)}. Raise 'data.heldout' and 'data.limit'."
        )
    if count < requested:
        task.progress.warning(
            f"{task.label}: samples have {count} images instead of {requested}, since there are only {heldout} held-out "
            f"images and {pairs} pairs of unseen sources; intervals are wider. Raise 'data.heldout' and 'data.limit'."
        )
    return count


def _sheet(samples: "SampleSet", measured: "list[Scores]") -> bytes:
    """Return an image sheet with a row for each of the first pairs: x₁, the mix of each method, x₂."""
    from lsmix.pipeline.views.images import page_grid

    methods = [one for one in measured if one.sample.kind != "original"]
    rows = []
    for row, (first, second) in enumerate(samples.pair_sheet(_SHEET_ROWS)):
        rows.append([first, *(one.shown[row] for one in methods), second])
    titles = ["x₁", *(one.sample.name for one in methods), "x₂"]
    return page_grid(rows, titles)


def _estimate(config: NaturalnessConfig, size: DatasetSize) -> Cost:
    """Estimate one pass through the evaluator per image and one decode per mix."""
    images = config.pairs * (len(config.methods) + 3)
    mixes = config.pairs * len(config.methods)
    sheet = _SHEET_ROWS * (len(config.methods) + 2) * size.image_bytes
    return Cost(bytes=24 * images + sheet + 4096, flops=float(images + mixes) * size.flow_flops)


NATURALNESS = Stage(name="naturalness", version=3, run=run, estimate=_estimate, lower="naturalness.pairs")
