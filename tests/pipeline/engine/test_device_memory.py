"""When a device's memory runs out, the message names the setting behind it, and half of its value."""

import contextlib
import importlib
import pickle

import pytest
import torch
from emulated_graphs import emulate_cuda_graphs

from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.errors import DeviceMemoryError, LsmixError
from lsmix.data.loaders.cuda_graph import Replayed
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer
from lsmix.pipeline.api import run
from lsmix.pipeline.engine.device import device_memory

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
def test_a_sharded_stage_names_its_setting_and_half_of_its_value(
    stage, direction, setting, tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch
):
    words = (stage, tiny_recipe, "--workspace", tiny_workspace, "--force", "--device", "cpu")
    seen = []
    hold_at_most(monkeypatch, Flow, direction, 32, seen)
    result = command(*words)
    assert result.code == 1
    name = {"encode": "encode tiny", "mix": "mix lsmix"}[stage]
    assert result.err.strip().splitlines()[-1] == (
        f"error: {name}: device 'cpu' ran out of memory with '{setting} = 64' (CUDA out of memory. Tried to allocate 2.50 GiB. "
        f"GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free). Halve it to '{setting} = 32', and "
        "run again; this makes an artifact of another key, since it changes last bits."
    )
    assert seen == [64], "the other shards are not tried: each would fail the same way"
    changed = command(*words[:4], "--device", "cpu", "--set", f"{setting}=32")
    assert changed.code == 0, changed.err


@pytest.mark.parametrize(
    ("light", "ways"),
    [
        (False, "Halve it to 'flow.training.batch_size = 16' or set 'flow.training.memory_light = true'"),
        (True, "Halve it to 'flow.training.batch_size = 16'"),
    ],
)
def test_the_error_of_a_flow_training_names_the_settings_to_lower(light, ways, tiny_recipe, tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(FlowTrainer, "steps", step)
    light_setting = [f"flow.training.memory_light={str(light).lower()}"]
    with pytest.raises(
        DeviceMemoryError,
        match=rf"^train-glow tiny: .* with 'flow.training.batch_size = 32' .*\. {ways}, and run again",
    ):
        run(tiny_recipe, workspace=tmp_path / "runs", stage="train-glow", device="cpu", overrides=light_setting)


def test_the_error_of_a_classifier_training_names_its_setting(tiny_recipe, tiny_workspace, monkeypatch):
    def train_batch(*_):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(ClassifierTrainer, "_train_batch", train_batch)
    with pytest.raises(
        DeviceMemoryError,
        match=r"^train baseline-seed0: .* 'classifier.batch_size = 64' .* Halve it to 'classifier.batch_size = 32', and",
    ):
        run(tiny_recipe, workspace=tiny_workspace, stage="train", device="cpu", force="train")


def test_a_rebuild_says_that_its_plan_fixes_the_batch(finished_workspace, tmp_path, command, monkeypatch):
    (pool,) = (finished_workspace / "mix").glob("lsmix-*")
    (flow,) = (finished_workspace / "train-glow").glob("tiny-*")
    (data,) = (finished_workspace / "ingest").glob("tiny-*")
    hold_at_most(monkeypatch, Flow, "decode_batch", 23)
    result = command(
        "rebuild", pool / "plan.json", "--data", data, "--flow", flow, "--out", tmp_path / "new", "--device", "cpu"
    )
    assert result.code == 1
    assert result.err.strip().endswith("another batch size would change the pool. Use a device with more memory.")


def test_a_deep_check_says_which_device_is_too_small(finished_workspace, command, monkeypatch):
    (pool,) = (finished_workspace / "mix").glob("lsmix-*")
    hold_at_most(monkeypatch, Flow, "decode_batch", 23)
    result = command("verify", pool, "--deep", "--device", "cpu")
    assert result.code == 1
    assert "error: deep check of lsmix: device 'cpu' ran out of memory (CUDA out of memory. Tried" in result.err


def test_an_error_says_if_not_even_one_image_fits(tiny_recipe, tiny_workspace, command, monkeypatch):
    hold_at_most(monkeypatch, Flow, "decode_batch", 0)
    words = ("mix", tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu", "--set", "pools.lsmix.batch_size=1")
    result = command(*words)
    assert result.code == 1
    assert "A smaller batch is impossible. Free it of other programs ('nvidia-smi' lists them), or take" in result.err


def test_the_error_of_a_model_that_does_not_fit_names_no_batch(tiny_recipe, tiny_workspace, command, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr("lsmix.glow.checkpoint.load_flow", no_room)
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace, "--force", "--device", "cpu")
    assert result.code == 1
    assert "error: mix lsmix: device 'cpu' ran out of memory (CUDA out of memory. Tried" in result.err
    assert "batch_size" not in result.err


SETTING = ("encode x", "cuda", "latents.batch_size", 8)


def test_the_error_of_torch_is_recognised_and_the_failed_pass_holds_no_memory():
    made = []

    class Held:
        def __del__(self):
            made.append("freed")

    def fails():
        held = Held()  # noqa: F841 - a variable of the pass that fails, such as its activations
        torch.empty(1 << 60, dtype=torch.uint8)

    freed = []
    text = ""
    try:
        with device_memory(*SETTING):
            fails()
    except DeviceMemoryError as error:  # while it is handled, as by somebody who tries again
        freed, text = [*made], str(error)
    assert freed == ["freed"], "what the failed pass held was there still"
    assert "(can't allocate memory: " in text
    assert "'latents.batch_size = 4'" in text


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling x",
    ],
)
def test_errors_of_cuda_libraries_are_recognised(words):
    with pytest.raises(DeviceMemoryError, match="batch_size = 4"), device_memory(*SETTING):
        raise RuntimeError(words)


def test_other_errors_are_passed_on():
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), device_memory(*SETTING):
        raise RuntimeError("shape mismatch")


def test_the_error_can_be_pickled():
    importlib.import_module("distributed")  # which changes how errors are pickled
    error = DeviceMemoryError("encode x: device 'cuda' ran out of memory")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (DeviceMemoryError, str(error), 1)
    assert isinstance(again, MemoryError)
    assert isinstance(again, LsmixError)


@pytest.mark.parametrize("plain_fits", [True, False])
def test_if_recording_runs_out_of_memory_the_plain_call_runs_or_its_error_names_the_setting(plain_fits):
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) > 2 and not plain_fits:  # the first two warm up
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return [x + 1.0]

    expectation = contextlib.nullcontext() if plain_fits else pytest.raises(DeviceMemoryError, match="batch_size = 4")
    with emulate_cuda_graphs() as recorder:
        recorder.fault = "no memory"
        replayed = Replayed(function)
        with pytest.warns(RuntimeWarning, match="without a CUDA graph"), expectation, device_memory(*SETTING):
            replayed(torch.ones(4))
        if plain_fits:
            replayed(torch.ones(4))
        assert recorder.captures == 1, "what could not be recorded is not recorded again"
