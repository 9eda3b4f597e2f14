"""Registries: built-in entries can be loaded, and entry points of other packages add more."""

import importlib.metadata
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsmix.data.errors import RecipeError
from lsmix.data.exports.format import EXPORT_FORMATS
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, MixingMethod, Registry, import_object
from lsmix.data.readers.registry import DATA_FORMATS
from lsmix.pipeline.engine.stage import Stage


@pytest.fixture
def offer(monkeypatch):
    """Return a function that registers an object with an entry point, as another package would."""
    module = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    entries: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [entry for entry in entries if entry.group == group]

    monkeypatch.setattr("lsmix.data.mixing.entry_points", entry_points)

    def add(group: str, name: str, value: Any) -> None:
        attribute = f"object_{len(entries)}"
        setattr(module, attribute, value)
        entries.append(importlib.metadata.EntryPoint(name, f"elsewhere:{attribute}", group))

    return add


@pytest.mark.parametrize(
    "registry", [LATENT_METHODS, PIXEL_METHODS, DATA_FORMATS, EXPORT_FORMATS], ids=lambda it: it.kind
)
def test_every_built_in_entry_loads(registry: Registry) -> None:
    for name in registry.builtin():
        assert registry.load(name) is not None


def test_every_built_in_method_has_title_citation_and_importable_region() -> None:
    for registry in (LATENT_METHODS, PIXEL_METHODS):
        for name in registry.builtin():
            method = registry.entry(name)
            assert method.title.lower() == name
            assert method.citation
            assert not method.region or callable(import_object(method.region, "region"))


def test_an_entry_point_may_refer_to_a_function_or_a_mixing_method(offer) -> None:
    def plain(z1: Any, _z2: Any, lam: Any, _draws: Any) -> Any:
        return z1, lam

    offer("lsmix.latent_methods", "plain", plain)
    assert LATENT_METHODS.load("plain") is plain
    assert LATENT_METHODS.entry("plain") == MixingMethod(function="elsewhere:object_0", title="plain")
    known = MixingMethod(function="elsewhere:object_0", title="Known", citation="Who, 2026.", share=lambda lam, _: lam)
    offer("lsmix.pixel_methods", "known", known)
    assert PIXEL_METHODS.load("known") is plain
    assert PIXEL_METHODS.entry("known") is known
    assert PIXEL_METHODS.names()[-1] == "known"


def test_entry_points_never_replace_built_in_methods(offer) -> None:
    offer("lsmix.latent_methods", "cutmix", np.add)
    offer("lsmix.latent_methods", "linear", np.add)
    assert "cutmix" not in LATENT_METHODS
    assert LATENT_METHODS.load("linear") is not np.add
    with pytest.raises(RecipeError, match="unknown mixing method in latent space 'cutmix'"):
        LATENT_METHODS.entry("cutmix")


def test_stages_are_listed_once_in_execution_order() -> None:
    from lsmix.data.artifact import ARTIFACT_FILES
    from lsmix.pipeline.stages import graph
    from lsmix.pipeline.stages.registry import STAGE_COMMANDS, STAGES

    stages = {stage.name: stage for stage in vars(graph).values() if isinstance(stage, Stage)}
    assert set(STAGES) == set(stages)
    assert tuple(ARTIFACT_FILES) == (*STAGES, "export", "card")
    for name, command in STAGE_COMMANDS.items():
        assert command.divisible == bool(stages[name].processor)


def test_the_documented_export_formats_match_the_registry() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exports.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| (raw bytes|PNG or WebP) \|.*\|$", page, re.MULTILINE)
    found = {name: EXPORT_FORMATS.load(name).encodes for name in EXPORT_FORMATS.builtin()}
    assert len(table) >= 4
    assert {(name, images == "PNG or WebP") for name, images in table} <= found.items()
