"""What is found by name: built-in entries load, and entry points of other packages add to them."""

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
    """Return a function that offers an object as another package would, by an entry point of a group."""
    home = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", home)
    offered: list[importlib.metadata.EntryPoint] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [entry for entry in offered if entry.group == group]

    monkeypatch.setattr("lsmix.data.mixing.entry_points", entry_points)

    def add(group: str, name: str, thing: Any) -> None:
        attribute = f"thing_{len(offered)}"
        setattr(home, attribute, thing)
        offered.append(importlib.metadata.EntryPoint(name, f"elsewhere:{attribute}", group))

    return add


@pytest.mark.parametrize(
    "registry", [LATENT_METHODS, PIXEL_METHODS, DATA_FORMATS, EXPORT_FORMATS], ids=lambda it: it.kind
)
def test_every_built_in_entry_loads(registry: Registry) -> None:
    for name in registry.builtin():
        assert registry.load(name) is not None


def test_every_method_of_lsmix_has_a_title_and_a_citation_and_its_region_can_be_imported() -> None:
    for registry in (LATENT_METHODS, PIXEL_METHODS):
        for name in registry.builtin():
            method = registry.entry(name)
            assert method.title.lower() == name
            assert method.citation
            assert not method.region or callable(import_object(method.region, "region"))


def test_an_entry_point_may_name_a_plain_function_or_an_entry(offer) -> None:
    def plain(z1: Any, _z2: Any, lam: Any, _draws: Any) -> Any:
        return z1, lam

    offer("lsmix.latent_methods", "plain", plain)
    assert LATENT_METHODS.load("plain") is plain
    assert LATENT_METHODS.entry("plain") == MixingMethod(function="elsewhere:thing_0", title="plain")
    known = MixingMethod(function="elsewhere:thing_0", title="Known", citation="Who, 2026.", share=lambda lam, _: lam)
    offer("lsmix.pixel_methods", "known", known)
    assert PIXEL_METHODS.load("known") is plain
    assert PIXEL_METHODS.entry("known") is known
    assert PIXEL_METHODS.names()[-1] == "known"


def test_a_method_of_lsmix_is_never_replaced_by_an_entry_point_of_either_space(offer) -> None:
    offer("lsmix.latent_methods", "cutmix", np.add)
    offer("lsmix.latent_methods", "linear", np.add)
    assert "cutmix" not in LATENT_METHODS
    assert LATENT_METHODS.load("linear") is not np.add
    with pytest.raises(RecipeError, match="unknown mixing method in latent space 'cutmix'"):
        LATENT_METHODS.entry("cutmix")


def test_stages_are_listed_once_in_the_order_of_their_work() -> None:
    from lsmix.data.artifact import ARTIFACT_FILES
    from lsmix.pipeline.stages import graph
    from lsmix.pipeline.stages.registry import STAGE_COMMANDS, STAGES

    made = {stage.name: stage for stage in vars(graph).values() if isinstance(stage, Stage)}
    assert set(STAGES) == set(made)
    assert tuple(ARTIFACT_FILES) == (*STAGES, "export", "card")
    for name, about in STAGE_COMMANDS.items():
        assert about.divisible == bool(made[name].processor)


def test_the_table_of_export_formats_says_what_the_registry_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "exports.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| (raw bytes|PNG or WebP) \|.*\|$", page, re.MULTILINE)
    found = {name: EXPORT_FORMATS.load(name).encodes for name in EXPORT_FORMATS.builtin()}
    assert len(table) >= 4
    assert {(name, images == "PNG or WebP") for name, images in table} <= found.items()
