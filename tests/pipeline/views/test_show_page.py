"""Laws of the page on a pool: it shows what the pool holds, escapes what strangers wrote, and stays small."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lsmix.data.artifact import Manifest, record_files, root_digest, write_manifest
from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError, RecipeError
from lsmix.data.pool import POOL_NAME, create_pool, open_pool, write_pool_shard
from lsmix.pipeline.views.pool_page import render_pool_page, write_pool_page
from lsmix.pipeline.views.pool_summary import BINS, summarise_pool

EVIL = "<img src=x onerror=alert(1)>'\"&</script>"


def make_pool(
    folder: Path,
    *,
    rows: int = 3000,
    side: int = 8,
    channels: int = 3,
    classes: tuple[str, ...] = ("cat", "dog", "owl"),
    redrawn: tuple[int, ...] = (),
    kept: tuple[int, ...] = (),
    spoil: Callable[[dict[str, Any]], None] = lambda columns: None,
) -> Path:
    """Make a pool of noise with shares from 0 to 1, as a stranger might."""
    store = create_pool(
        folder,
        images_per_copy=rows,
        copies=1,
        image_shape=(side, side, channels),
        class_names=classes,
        method="ls-mix",
        chunk_rows=512,
    )
    random = np.random.default_rng(0)
    for shard in range(store.shards):
        own = np.asarray(store.shard_range(shard))
        columns = {
            "image": random.integers(0, 256, (len(own), side, side, channels), np.uint8),
            "source_a": own.astype(np.int64),
            "source_b": (rows - 1 - own).astype(np.int64),
            "label_a": (own % len(classes)).astype(np.int64),
            "label_b": ((own + 1) % len(classes)).astype(np.int64),
            "lam": (own / rows).astype(np.float32),
            "share_b": (own / rows).astype(np.float32),
            "status": np.isin(own, redrawn).astype(np.uint8),
        }
        spoil(columns)
        write_pool_shard(folder, shard, columns)
    finish(folder, counts={"decode_failed_rows": [*redrawn, *kept]})
    return folder


def finish(folder: Path, **changes: Any) -> None:
    files = record_files(folder, {POOL_NAME})
    facts = {"stage": "mix", "stage_version": 1, "name": "p", "key": "0" * 12, "config": {}, "inputs": []}
    write_manifest(folder, Manifest(root=root_digest(files), files=files, **{**facts, **changes}))


def shown(page: str) -> list[dict[str, str]]:
    """Return the data attributes of all samples on a page, and how many pictures each has."""
    items = re.findall(r'<li class="card"(.*?)</li>', page, re.DOTALL)
    return [{**dict(re.findall(r'data-(\w+)="(.*?)"', item)), "pictures": str(item.count("<img "))} for item in items]


def of(workspace: Path, stage: str, name: str) -> Path:
    (folder,) = (workspace / stage).glob(f"{name}-*")
    return folder


# What is counted, and what is chosen.


def test_a_survey_counts_every_row(tmp_path: Path) -> None:
    pool = open_pool(make_pool(tmp_path / "p", redrawn=(5, 700), kept=(9,)))
    survey = summarise_pool(pool, 50)
    assert survey.lam.shape == survey.share.shape == (BINS,)
    assert survey.lam.sum() == survey.share.sum() == len(pool)
    assert survey.lam.min() == survey.lam.max() == len(pool) / BINS
    assert survey.pairs is not None
    assert survey.pairs.sum() == len(pool)
    assert [survey.pairs[0, 1], survey.pairs[1, 2], survey.pairs[2, 0]] == [1000, 1000, 1000]
    assert survey.events == {"ok": 2997, "redrawn": 2, "replaced": 0, "decode failed": 1}


def test_all_rows_that_something_happened_to_are_chosen_and_the_rest_spread_over_the_shares(tmp_path: Path) -> None:
    redrawn, kept = (0, 3, 2999), (17, 1500)
    survey = summarise_pool(open_pool(make_pool(tmp_path / "p", redrawn=redrawn, kept=kept)), 55)
    assert len(survey.chosen) == 55
    assert {row for row, event in survey.chosen.items() if event == "redrawn"} == set(redrawn)
    assert {row for row, event in survey.chosen.items() if event == "decode failed"} == set(kept)
    plain = [row for row, event in survey.chosen.items() if event == "ok"]
    assert np.bincount(np.array(plain) * 10 // 3000, minlength=10).tolist() == [5] * 10


def test_the_choice_is_the_seeds_and_no_more_than_there_is(tmp_path: Path) -> None:
    pool = open_pool(make_pool(tmp_path / "p", rows=300))
    assert summarise_pool(pool, 40).chosen == summarise_pool(pool, 40).chosen
    assert summarise_pool(pool, 40).chosen != summarise_pool(pool, 40, seed=1).chosen
    assert sorted(summarise_pool(pool, 1000).chosen) == list(range(300))


def test_many_broken_rows_leave_a_quarter_for_the_others(tmp_path: Path) -> None:
    pool = open_pool(make_pool(tmp_path / "p", rows=300, redrawn=tuple(range(200)), kept=tuple(range(200, 220))))
    chosen = list(summarise_pool(pool, 40).chosen.values())
    assert [chosen.count(event) for event in ("redrawn", "decode failed", "ok")] == [15, 15, 10]


@pytest.mark.parametrize("rows", [[3000], [-1], ["0"], "0", [2**70]])
def test_a_manifest_that_names_rows_which_are_not_there_is_refused(rows: Any, tmp_path: Path) -> None:
    folder = make_pool(tmp_path / "p")
    (folder / "manifest.json").unlink()
    finish(folder, counts={"decode_failed_rows": rows})
    with pytest.raises(CorruptError, match=r"decode_failed_rows|its counts is"):
        render_pool_page(folder)


# What the page shows.


def test_a_pool_in_its_workspace_is_shown_between_its_sources(finished_workspace: Path, tmp_path: Path) -> None:
    folder = of(finished_workspace, "mix", "lsmix")
    assert "between their sources" in write_pool_page(folder, tmp_path / "page.html", samples=30)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    samples = shown(page)
    assert len(samples) == 30
    assert {sample["pictures"] for sample in samples} == {"3"}
    assert samples == sorted(samples, key=lambda sample: float(sample["share"]))
    pool = open_pool(folder)
    told = [int(row) for row in re.findall(r"<span>row (\d+)</span>", page)]
    for row, sample in zip(told, samples, strict=True):
        assert sample["classes"].split() == list(dict.fromkeys([str(pool[row].label_a), str(pool[row].label_b)]))
        assert float(sample["lam"]) == pytest.approx(pool[row].lam, abs=1e-6)
    assert pool.manifest.root in page


def test_a_pool_that_came_alone_is_shown_without_sources_until_one_names_them(
    finished_workspace: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    alone = Path(shutil.copytree(of(finished_workspace, "mix", "lsmix"), tmp_path / "alone"))
    page = tmp_path / "page.html"
    result = command("show", alone, "--html", page, "--rows", "20")
    assert result.code == 0
    assert "--data" in result.out
    assert {sample["pictures"] for sample in shown(page.read_text(encoding="utf-8"))} == {"1"}
    dataset = of(finished_workspace, "ingest", "tiny")
    for data in (dataset, dataset / "dataset.h5"):
        result = command("show", alone, "--html", page, "--rows", "20", "--data", data, "--json")
        answer = msgspec.json.decode(result.out)["content"]
        assert answer["html"] == str(page)
        assert "sheet" not in answer
        assert {sample["pictures"] for sample in shown(page.read_text(encoding="utf-8"))} == {"3"}
    assert not list(tmp_path.glob("*.png"))


def test_what_strangers_wrote_is_escaped_and_cut(tmp_path: Path) -> None:
    folder = make_pool(tmp_path / "p", classes=(EVIL, "x" * 100_000, "owl"))
    (folder / "manifest.json").unlink()
    finish(folder, name=EVIL, config={EVIL: EVIL * 1000})
    page, _ = render_pool_page(folder, samples=9)
    assert "<img src=x" not in page
    assert page.count("</script>") == 1
    assert "&lt;img src=x onerror" in page
    assert "x" * 50 not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)


@pytest.mark.parametrize(("side", "channels"), [(64, 3), (300, 3), (32, 1)])
def test_a_page_never_outgrows_its_limit(side: int, channels: int, tmp_path: Path) -> None:
    # Noise is the worst case.
    folder = make_pool(tmp_path / "p", rows=400, side=side, channels=channels, redrawn=(7, 8))
    page, what = render_pool_page(folder, samples=1000)
    assert 500_000 < len(page.encode()) < 3_000_000
    samples = shown(page)
    assert what.startswith(f"{len(samples)} of 400 images")
    assert [sample["event"] for sample in samples].count("redrawn") == 2
    assert ("Pictures are reduced" in page) == (side > 96)
    assert "2 of the 2 rows that were drawn again" in page


def test_pools_of_many_classes_and_of_three_sources_have_their_page(
    tmp_path: Path, finished_workspace: Path, tiny_recipe: Path
) -> None:
    page, _ = render_pool_page(make_pool(tmp_path / "p", classes=tuple(f"class {i}" for i in range(30))))
    assert "The most frequent of 900 possible ones" in page
    from lsmix.pipeline.api import run

    workspace = Path(shutil.copytree(finished_workspace, tmp_path / "runs"))
    three = ["pools.three.sources=3", 'pools.three.corner="random"']
    made = run(tiny_recipe, workspace=workspace, stage="mix", overrides=three, device="cpu")
    page, _ = render_pool_page(made["mix/three"].folder, samples=12)
    assert {sample["pictures"] for sample in shown(page)} == {"4"}
    assert re.search(r"<span>from (top-right|bottom-left|bottom-right)</span>", page)


# What is refused, with the reason.


def test_only_pools_have_a_page_and_only_their_own_sources_fit(
    finished_workspace: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    dataset, pool = of(finished_workspace, "ingest", "tiny"), of(finished_workspace, "mix", "lsmix")
    target = tmp_path / "page.html"
    with pytest.raises(FormatError, match="made of pools"):
        write_pool_page(dataset, target)
    with pytest.raises(RecipeError, match="made from the data set with root"):
        write_pool_page(pool, target, data=of(finished_workspace, "train-glow", "tiny"))
    with pytest.raises(MissingError):
        write_pool_page(pool, target, data=tmp_path / "nowhere")
    assert not target.exists()
    assert command("show", pool, "--data", dataset).code == 1
    assert command("show", pool, "--rows", "65").code == 1


def test_labels_that_are_not_those_of_the_sources_are_told(tmp_path: Path, tiny_workspace: Path) -> None:
    folder = of(tiny_workspace, "mix", "lsmix")
    pool = open_pool(folder)
    arrays = {name: column[:] for name, column in pool.columns.items()}
    arrays["label_a"] = (arrays["label_a"] + 1) % 10
    for shard in range(pool.columns.table.shards):
        rows = pool.columns.table.shard_range(shard)
        write_pool_shard(folder, shard, {name: values[rows.start : rows.stop] for name, values in arrays.items()})
    manifest = pool.manifest
    (folder / "manifest.json").unlink()
    finish(folder, counts=manifest.counts)
    with pytest.raises(CorruptError, match=r"training image \d+ is of class"):
        render_pool_page(folder)


@pytest.mark.parametrize("column", ["lam", "share_b"])
def test_numbers_that_no_pool_has_are_refused(column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = open_pool(make_pool(tmp_path / "p", rows=100))
    values = pool.columns[column][:]
    values[7] = np.nan
    monkeypatch.setitem(pool.columns._arrays, column, values)
    with pytest.raises(CorruptError, match=f"in row 7 {column} is nan, but expected 0 to 1"):
        summarise_pool(pool, 10)


def test_images_of_two_channels_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LsmixError, match="1 or 3 channels"):
        render_pool_page(make_pool(tmp_path / "p", rows=10, channels=2))
