"""Devices are resolved and checked before work begins, and made deterministic."""

import pytest
import torch

from lsmix.data.errors import RecipeError
from lsmix.pipeline.engine.device import device_name, free_device_memory, likely_device, prepare_device, resolve_device
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Cost
from lsmix.pipeline.workspace.workspace import Workspace


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has two GPUs; return the list of calls that release memory."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    return done


def test_a_device_is_resolved_to_an_available_one(gpus):
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert device_name("cuda:1") == "GPU cuda:1"
    for wrong in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(RecipeError, match=r"is not available: this machine has 2 CUDA devices"):
            resolve_device(wrong)
    with pytest.raises(RecipeError, match="device 'tpu' is unknown"):
        resolve_device("tpu")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert device_name("cpu")
    with pytest.raises(RecipeError, match="has no CUDA device"):
        resolve_device("cuda")


def test_a_gpu_is_made_deterministic(gpus, monkeypatch):
    for name, value in (("benchmark", True), ("deterministic", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    prepare_device("cuda")
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)


def test_unused_gpu_memory_is_released(gpus):
    free_device_memory()
    assert gpus == ["synchronize", "empty"]


@pytest.mark.parametrize(
    ("driver", "version", "expected"),
    [(True, "2.13.0", "cuda"), (True, "2.13.0+cu130", "cuda"), (True, "2.13.0+cpu", "cpu"), (False, "2.13.0", "cpu")],
)
def test_a_gpu_is_likely_with_a_driver_and_a_torch_that_can_use_it(driver, version, expected, monkeypatch):
    monkeypatch.setattr("lsmix.pipeline.engine.device.Path.exists", lambda self: driver)
    monkeypatch.setattr("lsmix.pipeline.engine.device.metadata.version", lambda name: version)
    assert likely_device() == expected


def test_an_estimate_uses_the_last_artifact_made_on_that_kind_of_device(finished_workspace, monkeypatch):
    cost = Cost(bytes=0, flops=1.2e15)

    def estimate(device):
        monkeypatch.setattr("lsmix.pipeline.engine.resolver.likely_device", lambda: device)
        return Resolver(Workspace(finished_workspace)).seconds("train-glow", cost)

    assert estimate("cuda") == pytest.approx(1.0 + 1.2e15 / 1.2e13)  # a guess, as nothing was made on such a device
    assert estimate("cpu") > 100 * estimate("cuda")
