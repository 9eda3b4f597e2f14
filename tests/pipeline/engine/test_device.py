"""Devices are named by the user, checked before work begins, and give the same bytes each time."""

from pathlib import Path

import pytest
import torch

from lsmix.data.errors import RecipeError
from lsmix.pipeline.engine.device import (
    device_name,
    free_device_memory,
    likely_device,
    prepare_device,
    resolve_device,
)
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Cost
from lsmix.pipeline.workspace.workspace import Workspace


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this machine have two cards; return what is done to them."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    return done


def test_a_device_is_resolved_to_one_of_this_machine(cards: list[str]) -> None:
    assert [resolve_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    assert device_name("cuda:1") == "card of cuda:1"
    for wrong in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(RecipeError, match=r"is not there: this machine has 2 CUDA device"):
            resolve_device(wrong)
    with pytest.raises(RecipeError, match="device 'tpu' is unknown"):
        resolve_device("tpu")


def test_without_a_card_the_processor_is_used_and_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    assert device_name("cpu")
    with pytest.raises(RecipeError, match="has no CUDA device"):
        resolve_device("cuda")


def test_a_card_is_told_to_be_deterministic(cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("benchmark", True), ("deterministic", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    prepare_device("cuda")
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)


def test_memory_of_a_card_that_nothing_uses_is_given_back(cards: list[str]) -> None:
    free_device_memory()
    assert cards == ["synchronize", "empty"]


@pytest.mark.parametrize(
    ("driver", "version", "expected"),
    [(True, "2.13.0", "cuda"), (True, "2.13.0+cu130", "cuda"), (True, "2.13.0+cpu", "cpu"), (False, "2.13.0", "cpu")],
)
def test_a_gpu_is_likely_with_a_driver_and_a_torch_that_can_use_it(
    driver: bool, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lsmix.pipeline.engine.device.Path.exists", lambda self: driver)
    monkeypatch.setattr("lsmix.pipeline.engine.device.metadata.version", lambda name: version)
    assert likely_device() == expected


def test_an_estimate_goes_by_the_last_artifact_that_was_made_on_such_a_device(
    finished_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = Cost(bytes=0, flops=1.2e15)

    def estimate(device: str) -> float:
        monkeypatch.setattr("lsmix.pipeline.engine.resolver.likely_device", lambda: device)
        return Resolver(Workspace(finished_workspace)).seconds("train-glow", cost)

    assert estimate("cuda") == pytest.approx(1.0 + 1.2e15 / 1.2e13)  # nothing was made there: a guess
    assert estimate("cpu") > 100 * estimate("cuda")
