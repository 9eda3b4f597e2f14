"""Laws of the mix stage, on a finished workspace and with failing decodes."""

import msgspec
import numpy as np
import pytest
from factory import artifact_folder

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import DATASET_NAME, open_dataset
from lsmix.data.latents import open_latents
from lsmix.data.pool import STATUSES, open_pool
from lsmix.data.pool_spec import PoolConfig
from lsmix.glow.checkpoint import load_flow
from lsmix.pipeline.engine.shards import ShardJob
from lsmix.pipeline.stages.mix import MixProcessor
from lsmix.pipeline.stages.pool_builder import PoolBuilder
from lsmix.pipeline.workspace.workspace import Workspace


@pytest.fixture
def pool(finished_workspace):
    return open_pool(artifact_folder(finished_workspace, "mix", "lsmix"))


def test_a_pool_equals_its_first_sources_at_lambda_zero_and_its_second_at_one(finished_workspace):
    train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny")).train
    pool = open_pool(artifact_folder(finished_workspace, "mix", "zero"))
    count = pool.images_per_copy
    np.testing.assert_array_equal(pool.image[:count], train.images[pool.source_a[:count]])
    np.testing.assert_array_equal(pool.image[count:], train.images[pool.source_b[count:]])
    assert (pool.share_b[:count] == 0).all()
    assert (pool.share_b[count:] == 1).all()


def test_every_latent_decodes_to_its_training_image(finished_workspace):
    train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny")).train
    latents = open_latents(artifact_folder(finished_workspace, "encode", "tiny"))
    flow = load_flow(artifact_folder(finished_workspace, "train-glow", "tiny"))
    np.testing.assert_array_equal(flow.decode(latents.z[:]), train.images)
    assert latents.manifest.counts["exact_round_trips"] == len(train)


def test_labels_and_shares_match_the_sources(finished_workspace, pool):
    train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny")).train
    np.testing.assert_array_equal(pool.label_a[:], train.labels[pool.source_a[:]])
    np.testing.assert_array_equal(pool.label_b[:], train.labels[pool.source_b[:]])
    dim = 64
    replaced = pool.status[:] == STATUSES.index("replaced")
    expected = np.where(replaced, 0, np.floor(pool.lam[:].astype(np.float64) * dim) / dim)
    # λ is stored as float32: near a whole number of components, rounding may change the share by one component.
    assert np.abs(pool.share_b[:] - expected).max() <= 1 / dim
    assert (pool.share_b[:] != expected.astype(np.float32)).mean() < 0.01


def test_no_test_or_held_out_image_is_a_source(finished_workspace, pool):
    dataset = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny"))
    sources = set(pool.source_a[:].tolist()) | set(pool.source_b[:].tolist())
    assert sources <= set(range(len(dataset.train)))
    published = [
        {(split.published_split, int(row)) for row in split.source_index}
        for split in (dataset.train, dataset.heldout, dataset.test)
    ]
    assert not published[0] & published[1]
    assert not published[0] & published[2]
    assert not published[1] & published[2]


def _processor(workspace, **fields):
    folder = artifact_folder(workspace, "mix", "lsmix")
    inputs = {}
    for record in open_pool(folder).manifest.inputs:
        stage = {"latents": "encode", "flow": "train-glow"}[record.role]
        artifact = Workspace(workspace).find(stage, record.cache_key)
        assert artifact is not None
        inputs[record.role] = Artifact(folder=artifact.folder, manifest=artifact.manifest)
    config = PoolConfig(alpha=0.4, copies=2, chunk_rows=128, **fields)
    job = ShardJob(
        processor="",
        stage="mix",
        name="lsmix",
        config=msgspec.to_builtins(config),
        inputs={},
        device="cpu",
        folder=str(folder),
    )
    return MixProcessor(job, folder, inputs, "cpu")


def _no_advance(images):
    """Ignore progress."""


def test_images_that_always_fail_are_replaced_by_their_first_source_with_share_zero(finished_workspace):
    train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny")).train
    # With tolerance 0 and bad-pixel fraction 0, any value out of range fails; some images always fail.
    worker = _processor(finished_workspace, tolerance=0.0, bad_pixel_fraction=0.0, attempts=1)
    made = worker.compute(worker.load(0), _no_advance)
    replaced = made["status"] == STATUSES.index("replaced")
    assert replaced.any()
    np.testing.assert_array_equal(made["image"][replaced], train.images[made["source_a"][replaced]])
    assert (made["share_b"][replaced] == 0).all()
    assert (made["decode_failed"] == (made["status"] != STATUSES.index("ok"))).all()


def test_keep_does_not_change_failed_decodes(finished_workspace, pool):
    worker = _processor(finished_workspace, on_decode_failure="keep", tolerance=0.0, bad_pixel_fraction=0.0)
    loaded = worker.load(0)
    made = worker.compute(loaded, _no_advance)
    assert made["decode_failed"].any()
    assert (made["status"] == STATUSES.index("ok")).all()
    np.testing.assert_array_equal(made["source_b"], loaded.pairs.others[:, 0])


def test_redrawn_images_do_not_depend_on_how_the_work_is_split(finished_workspace):
    first, again = _processor(finished_workspace, tolerance=0.02), _processor(finished_workspace, tolerance=0.02)
    one = first.compute(first.load(1), _no_advance)
    first.compute(first.load(0), _no_advance)
    again.compute(again.load(0), _no_advance)
    two = again.compute(again.load(1), _no_advance)
    assert (one["status"] == STATUSES.index("redrawn")).any()
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


@pytest.mark.parametrize("pool", ["lsmix", "cutmix"])
def test_rows_do_not_depend_on_the_batch_size(pool, finished_workspace, monkeypatch):
    def made():
        if pool == "lsmix":
            worker = _processor(finished_workspace, tolerance=0.02, corner="random")
            return worker.compute(worker.load(0), _no_advance)
        train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny") / DATASET_NAME).train
        builder = PoolBuilder(PoolConfig(method=pool), train)
        return builder.build(builder.load(np.arange(20, 150)))

    expected = made()
    for size in (1, 3000):  # bytes: one image per batch, or a few
        monkeypatch.setattr("lsmix.pipeline.stages.pool_builder._PIXEL_BATCH_BYTES", size)
        for name, values in made().items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
