"""The train-glow stage: data set → ``glow.safetensors`` and ``glow.json``, with a log and a sheet of samples.

Interrupted training resumes from its last checkpoint and produces the same bytes as uninterrupted training.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.errors import DivergedError, RecipeError, format_count
from lsmix.glow.config import FlowConfig, FlowShape, FlowTraining
from lsmix.pipeline.config.results import LOG_FILE, LogLine
from lsmix.pipeline.config.schema import FlowRecipe
from lsmix.pipeline.engine.device import device_memory
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask, check_translate
from lsmix.pipeline.engine.torchrun import check_ranks
from lsmix.pipeline.stages.checkpoints import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from lsmix.glow.training import FlowTrainer

__all__ = ["TRAIN_GLOW", "check_start"]

_SAMPLE_COUNT = 64
_ROWS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def run(task: StageTask) -> StageResult:
    """Train the flow to its last iteration, resuming from a checkpoint if there is one."""
    from lsmix.pipeline.engine.device import cpu_threads

    dataset = open_dataset(task.inputs["dataset"])
    with cpu_threads(task.ranks.threads(task.config.threads)):
        with device_memory(task.label, task.device):
            trainer, log = _restore(task, dataset)
        training: FlowTraining = task.config.training
        others = () if training.memory_light else ("flow.training.memory_light = true",)
        with device_memory(task.label, task.device, "flow.training.batch_size", training.batch_size, others):
            _train(task, trainer, dataset, log)
            return _publish(task, trainer, dataset, log) if task.ranks.first else StageResult()


def _restore(task: StageTask, dataset: DataSet) -> tuple["FlowTrainer", list[LogLine]]:
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.flow import Flow
    from lsmix.glow.training import FlowTrainer

    config: FlowRecipe = task.config
    height, width, channels = dataset.image_shape
    shape = {name: getattr(config, name) for name in FlowShape.__struct_fields__}
    flow_config = FlowConfig(height=height, width=width, channels=channels, **shape)
    flow = Flow(flow_config, seed=config.training.seed).to(task.device)
    if start := task.inputs.get("start"):
        given = load_flow(start)
        check_start(config, msgspec.to_builtins(given.config), start)
        if given.config.channels != channels:
            raise RecipeError(
                f"flow.start_from: {start.location!r} is a flow for images with "
                f"{format_count(given.config.channels, 'channel')}, but this data set has {channels}. Use another flow."
            )
        flow.load_state_dict(given.state_dict())
    if any(flow.pads):
        task.progress.warning(
            f"{task.label}: images of {height}×{width} are padded by reflection to "
            f"{flow.padded_height}×{flow.padded_width}, multiples of 2^{config.levels}. Fewer 'flow.levels' pad less."
        )
    trainer = FlowTrainer(flow, config.training, _own_rows(dataset, config), task.ranks)
    return trainer, load_checkpoint(task, trainer, LogLine)


def check_start(config: FlowShape, found: Mapping[str, Any], start: Artifact) -> None:
    """Raise RecipeError if the architecture of the start flow differs; height and width may differ."""
    names = [name for name in FlowShape.__struct_fields__ if name != "pad" and name in found]
    wrong = [f"flow.{name} = {found[name]}" for name in names if found[name] != getattr(config, name)]
    if wrong:
        raise RecipeError(
            f"flow.start_from: {start.location!r} differs from [flow]. To start from it, set {', '.join(wrong)}."
        )


def _own_rows(dataset: DataSet, config: FlowRecipe) -> npt.NDArray[np.uint8]:
    return dataset.train.images[_ROWS[config.training.rows]]


def _train(task: StageTask, trainer: "FlowTrainer", dataset: DataSet, log: list[LogLine]) -> None:
    config: FlowRecipe = task.config
    iterations = config.training.iterations
    task.progress.start(task.label, iterations, "iteration", done=trainer.iteration)
    begun = time.monotonic()
    while trainer.iteration < iterations:
        try:
            task.ranks.stop_point()
        except KeyboardInterrupt:
            save_checkpoint(task, trainer, log)
            raise
        try:
            steps = trainer.steps(_steps_until_pause(trainer, config))
        except DivergedError as error:
            kept = trainer.iteration - trainer.iteration % config.checkpoint_every
            checkpoint = f"The checkpoint at iteration {kept} was kept in {str(task.work)!r}. " if kept else ""
            raise DivergedError(
                f"{task.label}: {error} {checkpoint}Lower 'flow.training.learning_rate' or 'flow.training.grad_clip', or add a warm-up, and run again."
            ) from error
        last = trainer.iteration == iterations
        due = task.ranks.first and (last or trainer.iteration % config.evaluate_every == 0)
        measures = _evaluate(trainer, dataset, config) if due else {}
        seconds = round(time.monotonic() - begun, 3)
        log += [
            LogLine(
                iteration=step.iteration + 1,
                loss_bits_per_dim=step.loss_bits_per_dim,
                grad_norm=step.grad_norm,
                seconds=seconds,
                **(measures if step is steps[-1] else {}),
            )
            for step in steps
        ]
        if last or trainer.iteration % config.checkpoint_every == 0:
            save_checkpoint(task, trainer, log)
        for line in log[-len(steps) :]:
            task.progress.event("step", label=task.label, **msgspec.to_builtins(line))
        task.progress.advance(len(steps), note=f"{steps[-1].loss_bits_per_dim:.3f} bits/dim")
    task.progress.finish()


def _steps_until_pause(trainer: "FlowTrainer", config: FlowRecipe) -> int:
    """Return the number of steps until the next evaluation, checkpoint or end, limited to one group of steps."""
    done = trainer.iteration
    pauses = [every - done % every for every in (config.evaluate_every, config.checkpoint_every)]
    return min(trainer.steps_together, config.training.iterations - done, *pauses)


def _evaluate(trainer: "FlowTrainer", dataset: DataSet, config: FlowRecipe) -> dict[str, Any]:
    images = config.evaluate_images
    measures = {"train_bits_per_dim": trainer.evaluate(_own_rows(dataset, config)[:images])}
    if len(dataset.heldout.images):
        measures["heldout_bits_per_dim"] = trainer.evaluate(dataset.heldout.images[:images])
    return measures


def _publish(task: StageTask, trainer: "FlowTrainer", dataset: DataSet, log: list[LogLine]) -> StageResult:
    from lsmix.glow.checkpoint import save_flow
    from lsmix.glow.training import sample
    from lsmix.pipeline.views.images import image_grid, in_rows, png_bytes

    config: FlowRecipe = task.config
    last = log[-1] if log else LogLine(iteration=0)
    flow = trainer.flow.eval()
    save_flow(task.folder, flow, {"iterations": trainer.iteration, "class_names": list(dataset.class_names)})
    write_atomic(task.folder / LOG_FILE, b"".join(msgspec.json.encode(line) + b"\n" for line in log))
    samples = sample(flow, _SAMPLE_COUNT, temperature=config.temperature, seed=config.training.seed)
    write_atomic(task.folder / "samples.png", png_bytes(image_grid(in_rows(samples, 8))))
    counts = {
        "iterations": trainer.iteration,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "padding": list(flow.pads),  # pixels added at the top, bottom, left, right
        "train_bits_per_dim": last.train_bits_per_dim,
        "heldout_bits_per_dim": last.heldout_bits_per_dim,
    }
    return StageResult(payload=frozenset({"glow.safetensors", "glow.json"}), counts=counts)


def _estimate(config: FlowRecipe, size: DatasetSize) -> Cost:
    """Estimate bytes of weights and checkpoint (1 + 3 times the weights), and a backward pass as two forward passes."""
    images = config.training.iterations * config.training.batch_size
    return Cost(bytes=4 * 4 * size.flow_parameters, flops=3.0 * size.flow_flops * images)


def _check(config: FlowRecipe, size: DatasetSize) -> None:
    check_translate("flow.training.translate", config.training.translate, size)
    check_ranks("flow.training.batch_size", config.training.batch_size)


TRAIN_GLOW = Stage(
    name="train-glow",
    version=3,
    run=run,
    estimate=_estimate,
    check=_check,
    on_ranks=True,
    lower="flow.training.iterations, flow.steps, flow.hidden or data.size",
    not_in_key=frozenset({"evaluate_every", "evaluate_images", "checkpoint_every", "temperature"}),
)
