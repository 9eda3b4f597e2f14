"""A device's memory that runs out is told with the setting behind it, and with a value that was tried."""

import importlib
import pickle

import pytest
import torch

from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.errors import DeviceMemoryError, LsmixError
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer
from lsmix.pipeline.api import run
from lsmix.pipeline.device_memory import BatchSetting, device_memory

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free. "
    "Process 1 has 77.00 GiB memory in use. See documentation for Memory Management."
)


def hold_at_most(monkeypatch, owner, name, images, seen=None):
    """Let a method of ``owner``, whose first argument is a batch, run out of memory with more than so many images."""
    real = getattr(owner, name)

    def limited(self, batch, *rest, **more):
        if seen is not None:
            seen.append(len(batch))
        if len(batch) > images:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(self, batch, *rest, **more)

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize(
    ("stage", "direction", "setting"),
    [("encode", "encode_batch", "latents.batch_size"), ("mix", "decode_batch", "pools.lsmix.batch_size")],
)
def test_a_sharded_stage_names_its_setting_and_the_largest_fraction_that_fits(
    stage, direction, setting, tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch
):
    words = (stage, tiny_recipe, "--workspace", tiny_workspace, "--force", "--device", "cpu")
    seen: list[int] = []
    hold_at_most(monkeypatch, Flow, direction, 23, seen)
    result = command(*words)
    assert result.code == 1
    name = {"encode": "encode tiny", "mix": "mix lsmix"}[stage]
    assert result.err.strip().splitlines()[-1] == (
        f"error: {name}: device 'cpu' ran out of memory with '{setting} = 64' (CUDA out of memory. Tried to allocate 2.50 GiB. "
        "GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free). Tried now, and it fits: "
        f"'{setting} = 16'; set that and run again, which makes an artifact of another key, since it changes last bits."
    )
    assert seen[:3] == [64, 32, 16], "the other shards are not tried: each would fail the same way"
    assert 64 not in seen[1:]
    changed = command(*words[:4], "--device", "cpu", "--set", f"{setting}=16")
    assert changed.code == 0, changed.err


def test_a_training_of_a_flow_names_both_ways_out(tiny_recipe, tmp_path, monkeypatch):
    real = FlowTrainer.steps

    def steps(self, count):
        if self.iteration == (1 if self.config.batch_size == 32 and not self.config.memory_light else 99):
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(self, count)

    monkeypatch.setattr(FlowTrainer, "steps", steps)
    with pytest.raises(
        DeviceMemoryError,
        match=r"^train-glow tiny: .* with 'flow.training.batch_size = 32' .* it fits: 'flow.training.batch_size = 16' or "
        r"'flow.training.memory_light = true'; set that and run again",
    ):
        run(tiny_recipe, workspace=tmp_path / "runs", stage="train-glow", device="cpu")


def test_a_training_of_a_classifier_names_what_fits(tiny_recipe, tiny_workspace, monkeypatch):
    real = ClassifierTrainer._train_batch
    sizes = []

    def train_batch(self, batch, index):
        sizes.append(len(batch[0]))
        if len(batch[0]) > 7:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return real(self, batch, index)

    monkeypatch.setattr(ClassifierTrainer, "_train_batch", train_batch)
    with pytest.raises(
        DeviceMemoryError,
        match=r"^train baseline-seed0: .* 'classifier.batch_size = 64' .* it fits: 'classifier.batch_size = 4'; set that",
    ):
        run(tiny_recipe, workspace=tiny_workspace, stage="train", device="cpu", force="train")
    assert sizes == [64, 32, 16, 8, 4]


def test_a_rebuild_says_that_its_plan_fixes_the_batch(finished_workspace, tmp_path, command, monkeypatch):
    (pool,) = (finished_workspace / "mix").glob("lsmix-*")
    (flow,) = (finished_workspace / "train-glow").glob("tiny-*")
    (data,) = (finished_workspace / "ingest").glob("tiny-*")
    hold_at_most(monkeypatch, Flow, "decode_batch", 23)
    result = command(
        "rebuild", pool / "plan.json", "--data", data, "--flow", flow, "--out", tmp_path / "new", "--device", "cpu"
    )
    assert result.code == 1
    assert result.err.strip().endswith("since another would make another pool: take a device with more memory.")


def test_a_deep_check_says_which_device_is_too_small(finished_workspace, command, monkeypatch):
    (pool,) = (finished_workspace / "mix").glob("lsmix-*")
    hold_at_most(monkeypatch, Flow, "decode_batch", 23)
    result = command("verify", pool, "--deep", "--device", "cpu")
    assert result.code == 1
    assert "error: deep check of lsmix: device 'cpu' ran out of memory (CUDA out of memory. Tried" in result.err


def test_where_not_even_one_image_fits_it_says_so(tiny_recipe, tiny_workspace, command, monkeypatch):
    hold_at_most(monkeypatch, Flow, "decode_batch", 0)
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace, "--force", "--device", "cpu")
    assert result.code == 1
    assert "Not even a batch of 1 fits. Free it of other programs ('nvidia-smi' lists them), or take" in result.err


def test_a_model_that_does_not_fit_is_told_without_a_batch(tiny_recipe, tiny_workspace, command, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr("lsmix.glow.checkpoint.load_flow", no_room)
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace, "--force", "--device", "cpu")
    assert result.code == 1
    assert "error: mix lsmix: device 'cpu' ran out of memory (CUDA out of memory. Tried" in result.err
    assert "batch_size" not in result.err


def setting(attempt):
    return BatchSetting(label="encode x", device="cuda", field="latents.batch_size", value=8, attempt=attempt)


def test_what_torch_really_raises_is_known_and_the_memory_of_the_failed_pass_is_free_while_others_are_tried():
    alive: list[bool] = []
    made = []

    class Held:
        def __del__(self):
            made.append("freed")

    def fails():
        held = Held()  # noqa: F841 - a variable of the pass that fails, such as its activations
        torch.empty(1 << 60, dtype=torch.uint8)

    def attempt(images):
        alive.append(not made)
        if images > 2:
            torch.empty(1 << 60, dtype=torch.uint8)

    with (
        pytest.raises(DeviceMemoryError, match=r"\(can't allocate memory: .*'latents.batch_size = 2'"),
        device_memory(setting(attempt)),
    ):
        fails()
    assert alive == [False, False], "what the failed pass held was there still"


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling x",
    ],
)
def test_the_libraries_below_torch_are_understood(words):
    with pytest.raises(DeviceMemoryError, match="batch_size = 4"), device_memory(setting(lambda _: None)):
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), device_memory(setting(lambda _: None)):
        raise RuntimeError("shape mismatch")


def test_a_size_at_which_anything_else_goes_wrong_is_not_named():
    def attempt(images):
        if images < 3:
            raise ValueError("expected more than 1 value per channel")
        raise torch.OutOfMemoryError(CUDA_SAYS)

    with pytest.raises(DeviceMemoryError, match="Not even a batch of 1 fits"), device_memory(setting(attempt)):
        raise torch.OutOfMemoryError(CUDA_SAYS)


def test_the_error_comes_back_whole_from_another_process():
    importlib.import_module("distributed")  # which changes how errors are pickled
    error = DeviceMemoryError("encode x: device 'cuda' ran out of memory")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (DeviceMemoryError, str(error), 1)
    assert isinstance(again, MemoryError)
    assert isinstance(again, LsmixError)
