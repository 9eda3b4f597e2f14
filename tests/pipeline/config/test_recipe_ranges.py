"""Laws of a recipe's numbers: each has a lower and an upper bound, and what depends on the data is held against them."""

import shutil
from collections import namedtuple
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec
import pytest

from lsmix.data.errors import RecipeError
from lsmix.pipeline.config.recipe import Recipe, read_recipe
from lsmix.pipeline.config.schema import FlowRecipe


def _numbers(kind, place, bounds=()):
    """Go through the numbers that a type may hold, with what is declared of each."""
    if hasattr(kind, "__metadata__"):
        yield from _numbers(kind.__origin__, place, kind.__metadata__)
    elif kind in (int, float):
        yield place, bounds
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield from _numbers(field.type, f"{place}.{field.encode_name}" if place else field.encode_name)
    elif isinstance(kind, UnionType) or get_origin(kind) in (dict, tuple):
        for part in get_args(kind):
            if part not in (Ellipsis, type(None), Any):
                yield from _numbers(part, place)


NUMBERS = dict([*_numbers(Recipe, ""), *_numbers(FlowRecipe, "naturalness.evaluator")])


@pytest.mark.parametrize("place", NUMBERS)
def test_every_number_of_a_recipe_has_a_lower_and_an_upper_bound(place):
    metas = [meta for meta in NUMBERS[place] if isinstance(meta, msgspec.Meta)]
    assert any(meta.ge is not None or meta.gt is not None for meta in metas), place
    assert any(meta.le is not None or meta.lt is not None for meta in metas), place


def test_the_walk_over_a_recipe_finds_its_numbers():
    assert {"flow.training.batch_size", "pools.copies", "runs.seeds", "classifier.epochs", "runs.mix.weight"} <= set(
        NUMBERS
    )


@pytest.mark.parametrize(
    "override",
    [
        "flow.training.batch_size=1000000000000000",
        "flow.training.iterations=1000000000000000",
        "flow.training.learning_rate=1e38",
        "flow.training.seed=9007199254740992",
        "latents.chunk_rows=1000000000000000",
        "pools.lsmix.copies=9223372036854775807",
        "pools.lsmix.alpha=1e308",
        "pools.lsmix.chunk_rows=1000000000000000",
        "classifier.translate=3000",
        "classifier.width=1000000",
        "classifier.batch_size=1000000000000000",
        "classifier.epochs=1000000000000000",
        "data.heldout=1000000000000000",
        "runs.baseline.seeds=[9223372036854775807]",
        "report.bits_images=1000000000000000",
    ],
)
def test_a_number_too_large_for_any_machine_is_refused_with_its_limit(tiny_recipe, override):
    with pytest.raises(RecipeError, match=r"expected (int|float) <= [\d.e+]+"):
        read_recipe(tiny_recipe, [override])


def test_a_network_of_too_many_layers_is_refused_with_the_limit(tiny_recipe):
    more = ["classifier.architecture=wrn-9996-999", "classifier.width=128"]
    with pytest.raises(RecipeError, match=r"D must be 6n \+ 4 \(10, 16, 22, 28, …, 1000\) and K 1 to 64"):
        read_recipe(tiny_recipe, more)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classifier.translate=8", "classifier.translate: expected at most 7 for images of 8×8, got 8"),
        ("flow.training.translate=64", "flow.training.translate: expected at most 7 for images of 8×8, got 64"),
    ],
)
def test_a_shift_by_a_whole_image_is_refused_before_anything_is_trained(
    tiny_recipe, tmp_path, command, override, message
):
    result = command("run", tiny_recipe, "--workspace", tmp_path, "--set", override)
    assert (result.code, message in result.err) == (1, True), result.err
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {"ingest", "log", "logs"}


def test_a_shard_that_would_fill_the_memory_is_refused(tiny_workspace, tiny_recipe, command, monkeypatch):
    def begun(*_, **__):
        raise ValueError("a pool of gigabytes was begun")  # so that a broken check fails instead of filling the memory

    monkeypatch.setattr("lsmix.pipeline.stages.mix.create_pool", begun)
    more = ["--set", "pools.lsmix.copies=100000", "--set", "pools.lsmix.chunk_rows=16777216"]
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace, *more)
    assert result.code == 1
    assert "mix lsmix: chunk_rows of the pool: expected at most 10226112 for rows of 105 bytes" in result.err


def test_rebuild_checks_the_disk_as_mix_does(tiny_workspace, tiny_recipe, tmp_path, command, monkeypatch):
    (pool,) = (tiny_workspace / "mix").glob("lsmix-*")
    (flow,) = (tiny_workspace / "train-glow").iterdir()
    (data,) = (tiny_workspace / "ingest").iterdir()
    lone = shutil.copy(data / "dataset.h5", tmp_path / "dataset.h5")
    usage = namedtuple("usage", "total used free")(1 << 40, 0, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    mixed = command("mix", tiny_recipe, "--workspace", tiny_workspace, "--set", "pools.lsmix.seed=1")
    for given in (data, lone):
        out = tmp_path / "out"
        rebuilt = command("rebuild", pool, "--data", given, "--flow", flow, "--out", out)
        assert (rebuilt.code, mixed.code) == (1, 1)
        assert "mix lsmix needs about" in mixed.err
        assert "encode lsmix needs about" in rebuilt.err, rebuilt.err
        assert not out.exists()
