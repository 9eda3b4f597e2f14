"""Pools of every method, and every way of combining them in training, end to end on digits."""

import html
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import METHODS_RECIPE

from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.errors import RecipeError
from lsmix.data.loaders.pool_loader import PoolLoader
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import Pool, open_pool
from lsmix.data.pool_spec import CORNERS
from lsmix.pipeline.api import RunResult, run
from lsmix.pipeline.config.results import read_metrics

RECIPE = (
    METHODS_RECIPE
    + """\
[mix]
lambdas = [0.0, 0.4, 1.0]
on_decode_failure = "keep"
chunk_rows = 64
[classifier]
threads = 1
width = 4
epochs = 3
batch_size = 32
flip = false
"""
)
LATENT, PIXEL = LATENT_METHODS.names(), PIXEL_METHODS.names()
POOLS = "".join(f'[pools.{method}]\nmethod = "{method}"\n' for method in (*LATENT, *PIXEL))
POOLS += "[pools.corners]\nlambdas = []\ncorner = 'random'\n[pools.end]\ncorner = 'bottom-right'\n"
POOLS += "[pools.three]\nlambdas = []\nsources = 3\nalpha = 1.0\ncopies = 2\n"
RUNS = """
[runs.baseline]
[runs.mixup]
mix = [{ method = "mixup" }]
[runs.three]
pool = "three"
[runs.either]
mix = [{ method = "cutmix" }, { pool = "ls-mix", weight = 2.0 }, { method = "none" }]
[runs.sequence]
mix = [{ pool = "three" }, { method = "mixup" }, { method = "cutmix" }]
mode = "chain"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("every") / "every.toml"
    path.write_text(RECIPE + POOLS + RUNS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(recipe: Path, methods_workspace: Path) -> RunResult:
    return make(recipe, methods_workspace)


def make(recipe: Path, workspace: Path) -> RunResult:
    """Build all pools and classifiers, without the report."""
    pools, runs = (run(recipe, workspace=workspace, stage=stage, device="cpu") for stage in ("mix", "train"))
    return RunResult(recipe=pools.recipe, built=pools.built + [item for item in runs.built if item.stage == "train"])


@pytest.fixture(scope="module")
def dataset(made: RunResult) -> DataSet:
    return open_dataset(made["ingest"].folder)


def pool_of(made: RunResult, name: str) -> Pool:
    return open_pool(made[f"mix/{name}"].folder)


@pytest.mark.parametrize("method", [*LATENT, *PIXEL])
def test_mixes_at_lambda_0_and_1_equal_the_source_images(made: RunResult, dataset: DataSet, method: str) -> None:
    pool, images = pool_of(made, method), dataset.train.images
    count = pool.images_per_copy
    first, last = slice(0, count), slice(2 * count, 3 * count)
    assert (pool.share_b[first] == 0).all()
    if method != "reverse-mix":  # which reverses the latent of x₁
        np.testing.assert_array_equal(pool.image[first], images[pool.source_a[first]])
    if method != "cutmix":  # whose box may extend beyond the image
        assert (pool.share_b[last] == 1).all()
        np.testing.assert_array_equal(pool.image[last], images[pool.source_b[last]])


@pytest.mark.parametrize("method", PIXEL)
def test_pools_in_pixel_space_need_no_flow(made: RunResult, method: str) -> None:
    assert [record.role for record in made[f"mix/{method}"].manifest.inputs] == ["dataset"]


def test_a_pool_in_pixel_space_has_correct_labels_and_shares(made: RunResult, dataset: DataSet) -> None:
    pool, labels = pool_of(made, "fmix"), dataset.train.labels
    np.testing.assert_array_equal(pool.label_a[:], labels[pool.source_a[:]])
    np.testing.assert_array_equal(pool.label_b[:], labels[pool.source_b[:]])
    np.testing.assert_allclose(pool.share_b[:], np.floor(pool.lam[:] * 64) / 64, atol=1e-6)


def test_x2_starts_in_the_recorded_corner(made: RunResult, dataset: DataSet) -> None:
    pool = pool_of(made, "corners")
    assert {pool[row].corner for row in range(len(pool))} == set(CORNERS)
    # The grid has 2×2 cells. The flow is local, so a cell that comes entirely from one source looks like this source.
    # Therefore the cell in the corner is closer to x₂ than the opposite one.
    near, far = [], []
    for row in np.flatnonzero((pool.share_b[:] > 0.3) & (pool.share_b[:] < 0.7)):
        sample = pool[int(row)]
        vertical, horizontal = sample.corner.split("-")
        second = dataset.train.images[sample.source_b].astype(int)
        flipped = [
            image[:: -1 if vertical == "bottom" else 1, :: -1 if horizontal == "right" else 1]
            for image in (sample.image.astype(int), second)
        ]
        gap = np.abs(flipped[0] - flipped[1])
        near.append(gap[:3, :3].mean())
        far.append(gap[-3:, -3:].mean())
    assert len(near) > 10
    assert np.mean(near) < 0.5 * np.mean(far)


def test_a_fixed_corner_is_recorded(made: RunResult) -> None:
    assert set(pool_of(made, "end").columns["corner"][:].tolist()) == {CORNERS.index("bottom-right")}


def test_three_sources_share_each_image(made: RunResult, dataset: DataSet) -> None:
    pool = pool_of(made, "three")
    more = {name: pool.columns[f"{name}_more"][:] for name in ("source", "label", "lam", "share")}
    np.testing.assert_array_equal(more["label"], dataset.train.labels[more["source"]])
    total = pool.share_b[:] + more["share"].sum(axis=1)
    assert ((total >= 0) & (total <= 1 + 1e-6)).all()
    # Each share equals its λ, except for up to two components due to rounding down.
    assert np.abs(more["share"] - more["lam"]).max() <= 1 / 64 + 1e-6
    assert np.abs(pool.share_b[:] - pool.lam[:]).max() <= 1 / 64 + 1e-6
    assert [source.label for source in pool[5].more] == more["label"][5].tolist()


def test_soft_targets_of_three_sources_weight_every_label(made: RunResult) -> None:
    pool = pool_of(made, "three")
    _, target = next(iter(PoolLoader(pool, 100, labels="soft", shuffle=False)))
    for row in range(100):
        sample = pool[row]
        expected = np.zeros(10)
        expected[sample.label_a] += 1 - sample.share_b - sum(source.share for source in sample.more)
        expected[sample.label_b] += sample.share_b
        for source in sample.more:
            expected[source.label] += source.share
        np.testing.assert_allclose(target[row], expected, atol=1e-6)


def test_three_sources_need_soft_labels(made: RunResult) -> None:
    with pytest.raises(RecipeError, match="mixes 3 sources, which labels='pair' cannot represent"):
        PoolLoader(pool_of(made, "three"), 64)


def test_every_run_sees_the_same_number_of_images_and_updates(made: RunResult) -> None:
    arms = {item.name: read_metrics(item.folder)[-1] for item in made.built if item.stage == "train"}
    assert len(arms) == 5
    assert {(last.images, last.updates) for last in arms.values()} == {(3 * 150, 3 * 5)}


@pytest.mark.parametrize(
    ("arm", "sources"),
    [
        ("baseline", {"training images": 150}),
        ("mixup", {"training images": 150}),
        ("three", {"pool three": 300}),
        ("sequence", {"pool three": 300}),
        ("either", {"training images": 150, "pool ls-mix": 450}),
    ],
)
def test_the_manifest_records_how_often_each_image_was_seen(made: RunResult, arm: str, sources: dict[str, int]) -> None:
    seen = made[f"train/{arm}-seed0"].manifest.counts["seen"]
    assert {one["source"]: one["images"] for one in seen} == sources
    assert sum(one["images"] * one["times"] for one in seen) == pytest.approx(450, abs=1)


def test_pools_and_classifiers_in_another_workspace_have_the_same_bytes(
    made: RunResult, recipe: Path, methods_workspace: Path, tmp_path: Path
) -> None:
    for stage in ("ingest", "train-glow", "encode"):
        shutil.copytree(methods_workspace / stage, tmp_path / stage)
    digests = [(item.stage, item.name, item.manifest.content_digest) for item in made.built]
    assert [(item.stage, item.name, item.manifest.content_digest) for item in make(recipe, tmp_path).built] == digests


def test_the_report_shows_pools_of_every_kind_and_the_budget_of_each_run(
    made: RunResult, methods_workspace: Path, tmp_path: Path
) -> None:
    kinds = ("ls-mix", "cutmix", "corners", "three")
    pools = [
        section
        for section in re.split(r"(?m)^(?=\[pools)", POOLS)
        if section.startswith(tuple(f"[pools.{name}]" for name in kinds))
    ]
    (tmp_path / "kinds.toml").write_text(RECIPE + "".join(pools) + RUNS, encoding="utf-8")
    report = run(tmp_path / "kinds.toml", workspace=methods_workspace, device="cpu")["report"].folder
    assert {f"pool-{name}" for name in kinds} <= {path.stem for path in (report / "figures").iterdir()}
    page = html.unescape(re.sub(r"<[^>]+>", "|", (report / "report.html").read_text(encoding="utf-8")))
    assert re.search(r"\|either\|+450\|+15\|", page)
    assert "pool three: 300 images, 1.5× each" in page
    assert re.search(r"\|mixup\|+450\|+15\|+training images", page)
    toml = page[page.rindex("[data]") :].partition("|")[0]
    assert tomllib.loads(toml)["runs"]["either-seed0"]["parts"][1]["weight"] == 2.0


def test_a_recipe_without_a_flow_has_a_report(tmp_path: Path) -> None:
    recipe = tmp_path / "pixels.toml"
    text = RECIPE.replace("[flow]", "[x]").partition("[x]")[0] + "[classifier]" + RECIPE.partition("[classifier]")[2]
    recipe.write_text(text + '[pools.p]\nmethod = "mixup"\n[runs.p]\npool = "p"\nlabel = "<MixUp>"\npaper = "4.33"\n')
    result = run(recipe, workspace=tmp_path / "runs", device="cpu")
    assert [item.stage for item in result.built] == ["ingest", "mix", "train", "report"]
    assert result.error_rates[0].label == "<MixUp>"
    page = (result["report"].folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;MixUp&gt;" in page
    assert "<MixUp>" not in page
    assert "4.33" in page


@pytest.mark.parametrize(
    ("pool", "shown"),
    [
        ("cutmix", "x₁ | mix | x₂"),
        ("three", "x₁ | mix | x₂"),
        ("linear", "x₁ | mix | x₂"),
    ],
)
def test_show_draws_every_kind_of_pool(
    made: RunResult, tmp_path: Path, command: Callable[..., Any], pool: str, shown: str
) -> None:
    result = command("show", made[f"mix/{pool}"].folder, "--image", tmp_path / "sheet.png", "--rows", "2")
    assert result.code == 0, result.err
    assert shown in result.out
