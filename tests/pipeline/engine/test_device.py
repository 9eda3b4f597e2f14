"""Devices are named by the user, checked before work begins, and give the same bytes each time."""

import pytest
import torch

from lsmix.data.errors import RecipeError
from lsmix.pipeline.engine.device import device_name, free_device_memory, prepare_device, resolve_device


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
