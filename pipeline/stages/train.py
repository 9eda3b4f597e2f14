"""The train stage: a pool or the data set → a classifier: error rates by epoch, test predictions, weights.

Every run of a comparison trains on the same number of images and updates, whatever it mixes: an epoch has as many
images as the training split. A run on a pool uses the pool's next copy in each epoch. If a run combines several ways of
mixing, each batch comes from one of them ("mixture"), or they are applied one after another ("chain").
"""

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lsmix.classifiers.registry import cost_per_pixel
from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.errors import DivergedError
from lsmix.pipeline.config.results import METRICS_FILE, PREDICTIONS_FILE, WEIGHTS_FILE, EpochMetrics, Predictions
from lsmix.pipeline.config.schema import RunConfig, TrainConfig
from lsmix.pipeline.engine.device import device_memory
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask, check_translate
from lsmix.pipeline.engine.torchrun import check_ranks
from lsmix.pipeline.stages.checkpoints import load_checkpoint, save_checkpoint
from lsmix.pipeline.stages.train_source import TrainSource

if TYPE_CHECKING:
    from lsmix.classifiers.training import ClassifierTrainer

__all__ = ["TRAIN"]


def run(task: StageTask) -> StageResult:
    """Train the classifier to its last epoch, resuming from the checkpoint of the last complete epoch."""
    from lsmix.pipeline.engine.device import cpu_threads

    dataset = open_dataset(task.inputs["dataset"])
    source = _open_source(task, dataset)
    with cpu_threads(task.ranks.threads(task.config.threads)):
        with device_memory(task.label, task.device):
            trainer, metrics = _restore(task, dataset, source)
        with device_memory(task.label, task.device, "classifier.batch_size", task.config.batch_size):
            _train(task, trainer, dataset, source, metrics)
            return _publish(task, trainer, dataset, metrics, source) if task.ranks.first else StageResult()


def _train(
    task: StageTask,
    trainer: "ClassifierTrainer",
    dataset: DataSet,
    source: TrainSource,
    metrics: list[EpochMetrics],
) -> None:
    config: TrainConfig = task.config
    batches = source.open()
    task.progress.start(task.label, config.epochs, "epoch", done=trainer.epoch)
    while trainer.epoch < config.epochs:
        task.ranks.stop_point()
        try:
            result = trainer.run_epoch(batches)
        except DivergedError as error:
            raise DivergedError(f"{task.label}: {error} Lower 'classifier.learning_rate' and run again.") from error
        due = trainer.epoch % config.evaluate_every == 0 or trainer.epoch == config.epochs
        test_error = trainer.evaluate(dataset.test.images, dataset.test.labels) if due and task.ranks.first else None
        metrics.append(
            EpochMetrics(
                epoch=trainer.epoch,
                loss=result.loss,
                test_error=test_error,
                images=result.images + (metrics[-1].images if metrics else 0),
                updates=result.updates + (metrics[-1].updates if metrics else 0),
            )
        )
        save_checkpoint(task, trainer, metrics)
        task.progress.event("epoch", label=task.label, **msgspec.to_builtins(metrics[-1]))
        task.progress.advance(note=f"loss {result.loss:.3f}" if test_error is None else f"error {test_error:.2f}%")
    task.progress.finish()


def _restore(task: StageTask, dataset: DataSet, source: TrainSource) -> tuple["ClassifierTrainer", list[EpochMetrics]]:
    from lsmix.classifiers.normalise import channel_statistics
    from lsmix.classifiers.training import ClassifierTrainer

    by_channel = task.config.normalise == "channel"
    trainer = ClassifierTrainer(
        task.config,
        classes=len(dataset.class_names),
        image_shape=dataset.image_shape,
        seed=task.config.seed,
        device=task.device,
        statistics=channel_statistics(dataset.train.images) if by_channel else None,
        mixes=source.mixes,
        ranks=task.ranks,
    )
    return trainer, load_checkpoint(task, trainer, EpochMetrics)


def _open_source(task: StageTask, dataset: DataSet) -> TrainSource:
    config: TrainConfig = task.config
    pools = {part.pool: task.inputs[part.pool] for part in config.parts if part.pool}
    return TrainSource(
        parts=config.parts,
        mode=config.mode,
        train=dataset.train,
        pools=pools,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _publish(
    task: StageTask,
    trainer: "ClassifierTrainer",
    dataset: DataSet,
    metrics: list[EpochMetrics],
    source: TrainSource,
) -> StageResult:
    from lsmix.classifiers.checkpoint import save_classifier

    save_classifier(task.folder / WEIGHTS_FILE, trainer.model)
    write_atomic(task.folder / METRICS_FILE, msgspec.json.format(msgspec.json.encode(metrics), indent=1) + b"\n")
    predicted, labels = trainer.predict(dataset.test.images), dataset.test.labels
    predictions = Predictions(predicted=tuple(predicted.tolist()), labels=tuple(labels.tolist()))
    write_atomic(task.folder / PREDICTIONS_FILE, msgspec.json.encode(predictions) + b"\n")
    last = metrics[-1]
    counts = {
        "epochs": last.epoch,
        "images": last.images,
        "updates": last.updates,
        "parameters": sum(int(np.prod(tensor.shape)) for tensor in trainer.model.parameters()),
        "test_error": last.test_error,
        "seen": msgspec.to_builtins(source.seen(task.config.epochs)),
    }
    return StageResult(payload=frozenset({METRICS_FILE, PREDICTIONS_FILE, WEIGHTS_FILE}), counts=counts)


def _estimate(config: RunConfig, size: DatasetSize) -> Cost:
    """Estimate multiply-adds, and the bytes of weights and checkpoint (weights and the optimiser's moments)."""
    parameters, products = cost_per_pixel(config, size.height, size.width, size.channels)
    moments = {"adam": 2, "sgd": 1}[config.optimiser]
    evaluations = -(-config.epochs // config.evaluate_every) + 1
    images = 3 * config.epochs * size.images + evaluations * size.test_images
    flops = 2.0 * products * size.height * size.width * images
    return Cost(bytes=4 * (2 + moments) * parameters, flops=flops)


def _check(config: RunConfig, size: DatasetSize) -> None:
    check_translate("classifier.translate", config.translate, size)
    check_ranks("classifier.batch_size", config.batch_size, size.images % config.batch_size)


TRAIN = Stage(
    name="train",
    version=3,
    run=run,
    estimate=_estimate,
    check=_check,
    on_ranks=True,
    lower="classifier.epochs, classifier.width, data.size or the number of seeds",
)
