"""Stages on CUDA compared to the CPU: same plan, pixels within ±1, latents within a stated tolerance."""

import copy
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from factory import artifact_folder

from lsmix.data.errors import DeviceMemoryError, DivergedError
from lsmix.data.latents import open_latents
from lsmix.data.loaders.cuda_graph import Replayed
from lsmix.data.pool import open_pool
from lsmix.glow import network
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer
from lsmix.pipeline.api import run
from lsmix.pipeline.engine.device import free_device_memory, prepare_device

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda_workspace(tiny_recipe, finished_workspace, tmp_path_factory):
    """Return a workspace that was built on CUDA, except for its flow, which was trained on the CPU."""
    (flow,) = (finished_workspace / "train-glow").glob("tiny-*")
    workspace = tmp_path_factory.mktemp("cuda") / "runs"
    run(tiny_recipe, workspace=workspace, device="cuda", overrides=[f"flow.path='{flow}'"])
    return workspace


def test_latents_agree(finished_workspace, cuda_workspace):
    cpu = open_latents(artifact_folder(finished_workspace, "encode", "tiny"))
    cuda = open_latents(artifact_folder(cuda_workspace, "encode", "tiny"))
    # float32 sums in a different order over 4 steps of 16 channels: a few hundred ulp for values near 1.
    np.testing.assert_allclose(cuda.z[:], cpu.z[:], rtol=0, atol=1e-3)
    assert cuda.manifest.counts["exact_round_trips"] == len(cuda)


def test_the_plan_is_equal_and_pixels_differ_by_at_most_one(finished_workspace, cuda_workspace):
    cpu = open_pool(artifact_folder(finished_workspace, "mix", "lsmix"))
    cuda = open_pool(artifact_folder(cuda_workspace, "mix", "lsmix"))
    for column in ("source_a", "source_b", "label_a", "label_b", "lam", "share_b", "status"):
        np.testing.assert_array_equal(getattr(cuda, column)[:], getattr(cpu, column)[:], err_msg=column)
    assert np.abs(cuda.image[:].astype(int) - cpu.image[:].astype(int)).max() <= 1


def test_training_the_flow_on_cuda_twice_gives_the_same_bytes(tiny_recipe, tmp_path):
    digests = [
        run(tiny_recipe, workspace=tmp_path / name, device="cuda", stage="train-glow")[
            "train-glow"
        ].manifest.content_digest
        for name in ("first", "second")
    ]
    assert digests[0] == digests[1]


def test_recorded_graphs_are_bit_identical_to_plain_calls(monkeypatch):
    flow = Flow(FlowConfig(height=16, width=16, channels=3, levels=2, steps=4, hidden=32)).to("cuda").eval()
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    z = flow.encode(images, batch_size=8)  # five batches: one is recorded, four are replayed
    assert flow._recordings, "nothing was recorded"
    back = flow.decode(z, batch_size=8)
    assert np.array_equal(back, images)
    monkeypatch.setattr(Replayed, "__call__", lambda self, *inputs: list(self._function(*inputs)))
    assert np.array_equal(flow.encode(images, batch_size=8), z)
    assert np.array_equal(flow.decode(z, batch_size=8), back)


def test_recordings_are_updated_when_parameters_change():
    flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8)).to("cuda").eval()
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    before = flow.encode(images, batch_size=8)
    with torch.no_grad():
        next(flow._levels()[0].steps()).actnorm.shift.add_(1.0)
    after = flow.encode(images, batch_size=8)
    assert not np.array_equal(after, before)
    assert np.array_equal(flow.decode(after, batch_size=8), images)


@pytest.mark.parametrize("light", [False, True])
def test_recorded_training_equals_plain_training(light, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    prepare_device("cuda")

    def trained():
        flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8)).to("cuda")
        trainer = FlowTrainer(flow, FlowTraining(batch_size=16, memory_light=light), images)
        for _ in range(5):
            trainer.step()
        return trainer.state_dict()

    recorded = trained()
    monkeypatch.setattr(Replayed, "__call__", lambda self, *inputs: list(self._function(*inputs)))
    for name, value in trained().items():
        assert torch.equal(value, recorded[name]), name


@pytest.fixture
def little_memory():
    """Limit this process to 600 MB of additional memory, enough for a flow of 512 channels and some hundred images."""
    free_device_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("stage", "setting"),
    [("train-glow", "flow.training.batch_size"), ("encode", "latents.batch_size"), ("mix", "pools.lsmix.batch_size")],
)
@pytest.mark.usefixtures("little_memory")
@pytest.mark.filterwarnings("ignore:continuing without a CUDA graph:RuntimeWarning")  # a graph needs more memory
def test_the_out_of_memory_error_names_its_setting_and_halving_it_leads_to_a_batch_that_fits(
    stage, setting, tiny_recipe, tmp_path
):
    wide, batch, failed = ["flow.hidden=512", "flow.training.iterations=2"], 65536, 0
    for _ in range(17):
        settings = [*wide, f"{setting}={batch}"]
        try:
            run(tiny_recipe, workspace=tmp_path / "runs", stage=stage, device="cuda", overrides=settings)
        except DeviceMemoryError as error:
            found = re.search(
                rf"'{re.escape(setting)} = {batch}' .* Halve it to '{re.escape(setting)} = (\d+)'", str(error)
            )
            if not found:
                raise
            batch, failed = int(found[1]), failed + 1
        else:
            break
    else:
        pytest.fail("no batch size fits")
    assert failed, "memory never ran out"


def test_a_finished_stage_leaves_no_memory_reserved(tiny_recipe, finished_workspace, tmp_path):
    shutil.copytree(finished_workspace / "train-glow", tmp_path / "runs" / "train-glow")
    shutil.copytree(finished_workspace / "ingest", tmp_path / "runs" / "ingest")
    run(tiny_recipe, workspace=tmp_path / "first", device="cuda")  # libraries allocate their permanent memory
    free_device_memory()
    before = torch.cuda.memory_reserved()
    for stage in ("encode", "mix"):
        run(tiny_recipe, workspace=tmp_path / "runs", stage=stage, device="cuda")
        # cuBLAS keeps a workspace of a few megabytes for each stream.
        assert torch.cuda.memory_reserved() <= before + 64 * 2**20, stage


def _small_trainer(**changes):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8)).to("cuda")
    return FlowTrainer(flow, FlowTraining(batch_size=16, **changes), images)


@pytest.mark.parametrize("light", [False, True])
def test_training_continues_after_a_divergence_a_restore_and_a_move(light):
    trainer, uninterrupted = _small_trainer(memory_light=light), _small_trainer(memory_light=light)
    trainer.steps(3)
    kept = trainer.state_dict()
    with torch.no_grad():
        next(trainer.flow._levels()[0].steps()).coupling.bias_out.fill_(torch.nan)
    with pytest.raises(DivergedError):
        trainer.steps(2)
    trainer.load_state_dict(kept)
    results = trainer.steps(2)
    trainer.flow.cpu()
    trainer.flow.cuda()
    results += trainer.steps(2)
    assert uninterrupted.steps(7)[3:] == results
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(trainer.state_dict()[name], value), name


def test_a_flow_with_recordings_can_be_copied_and_records_only_in_eval_mode():
    flow = _small_trainer().flow
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    z = flow.train().encode(images, batch_size=8)
    assert not flow._recordings
    assert np.array_equal(flow.eval().encode(images, batch_size=8), z)
    assert flow._recordings
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert np.array_equal(other.encode(images, batch_size=8), z)


def test_cudnn_has_the_fused_kernel_for_float32(monkeypatch):
    monkeypatch.setattr(network, "_NOT_IN_CUDNN", set())
    flow = Flow(FlowConfig(height=32, width=32, channels=3, levels=3, steps=1, hidden=128)).to("cuda").eval()
    flow.encode(np.zeros((64, 32, 32, 3), np.uint8))
    assert not network._NOT_IN_CUDNN, "plain convolutions were used instead"


def test_a_second_device_is_recorded_on_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    flow = _small_trainer().flow.to("cuda:1").eval()
    z = flow.encode(images, batch_size=8)
    assert np.array_equal(flow.decode(z, batch_size=8), images)
    assert np.array_equal(flow.to("cuda:0").encode(images, batch_size=8), z)
