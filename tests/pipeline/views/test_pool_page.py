"""The HTML page of a pool shows the pool's content, escapes hostile text and stays small."""

import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from factory import artifact_folder, reseal, write_pool

from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError, RecipeError
from lsmix.data.pool import open_pool, write_pool_shard
from lsmix.pipeline.views.pool_page import render_pool_page
from lsmix.pipeline.views.pool_summary import BINS, summarise_pool

EVIL = "<img src=x onerror=alert(1)>'\"&</script>"


def make_pool(folder, *, rows=3000, side=8, channels=3, classes=("cat", "dog", "owl"), redrawn=(), kept=(), **manifest):
    """Write a pool of noise images with evenly spaced shares from 0 to 1."""

    def columns(own):
        labels = {"label_a": own % len(classes), "label_b": (own + 1) % len(classes)}
        shares = {"lam": own / rows, "share_b": own / rows}
        return {"source_a": own, "source_b": rows - 1 - own, **labels, **shares, "status": np.isin(own, redrawn)}

    manifest = {"counts": {"decode_failed_rows": [*redrawn, *kept]}, **manifest}
    size = {"rows": rows, "copies": 1, "chunk_rows": 512, "image_shape": (side, side, channels)}
    return write_pool(folder, class_names=classes, method="ls-mix", columns=columns, **size, **manifest)


def shown(page):
    """Return the data attributes of all samples on a page, each with its number of images."""
    items = re.findall(r'<li class="card"(.*?)</li>', page, re.DOTALL)
    return [{**dict(re.findall(r'data-(\w+)="(.*?)"', item)), "pictures": str(item.count("<img "))} for item in items]


# Counting and choosing rows.


def test_a_summary_counts_every_row(tmp_path):
    pool = open_pool(make_pool(tmp_path / "p", redrawn=(5, 700), kept=(9,)))
    summary = summarise_pool(pool)
    for counts in (summary.lam, summary.share):
        np.testing.assert_array_equal(counts, np.full(BINS, 3000 / BINS))
    assert summary.pairs is not None
    assert summary.pairs.tolist() == [[0, 1000, 0], [0, 0, 1000], [1000, 0, 0]]
    assert summary.events == {"ok": 2997, "redrawn": 2, "replaced": 0, "decode failed": 1}
    assert summary.decode_failed == [5, 700, 9]


def test_chosen_rows_have_statuses_in_true_proportion_and_evenly_spread_shares(tmp_path):
    pool = open_pool(make_pool(tmp_path / "p", redrawn=range(0, 3000, 5)))
    rows = np.array([*summarise_pool(pool, 100).chosen])
    assert len(set(rows.tolist())) == 100
    assert (pool.status[rows] == 1).sum() == 20
    assert [*summarise_pool(pool, 100).chosen.values()].count("redrawn") == 20
    assert np.bincount(rows * 10 // 3000, minlength=10).tolist() == [10] * 10
    few = open_pool(make_pool(tmp_path / "q", redrawn=(3,)))
    assert not few.status[[*summarise_pool(few, 100).chosen]].any()


def test_clearly_mixed_rows_from_the_entire_pool_come_first(tmp_path):
    pool = open_pool(make_pool(tmp_path / "p"))
    rows = np.array([*summarise_pool(pool, 50).chosen])
    share = pool.share_b[rows]
    mixed = (share > 0.2) & (share < 0.8) & (pool.label_a[rows] != pool.label_b[rows])
    assert mixed[:30].all()
    assert not mixed[30:].any()
    assert share[:9].std() > 0.1
    assert (np.diff(share[30:]) >= 0).all()


def test_the_choice_of_rows_depends_on_the_seed_and_has_no_duplicates(tmp_path):
    pool = open_pool(make_pool(tmp_path / "p", rows=300))
    assert summarise_pool(pool, 40).chosen == summarise_pool(pool, 40).chosen
    assert summarise_pool(pool, 40).chosen != summarise_pool(pool, 40, seed=1).chosen
    assert sorted(summarise_pool(pool, 1000).chosen) == list(range(300))


@pytest.mark.parametrize("rows", [[100], [-1], ["0"], "0", [2**70]])
def test_a_manifest_with_row_numbers_out_of_range_is_rejected(rows, tmp_path):
    folder = make_pool(tmp_path / "p", rows=100, counts={"decode_failed_rows": rows})
    with pytest.raises(CorruptError, match=r"decode_failed_rows|its counts is"):
        render_pool_page(folder)


# Content of the page.


def test_a_pool_in_its_workspace_is_shown_with_its_source_images(finished_workspace):
    folder = artifact_folder(finished_workspace, "mix", "lsmix")
    page, what = render_pool_page(folder, samples=30)
    assert "with their source images" in what
    pool = open_pool(folder)
    samples = shown(page.partition("more rows whose first attempt failed")[0])
    assert len(samples) == 30
    assert {sample["pictures"] for sample in samples} == {"3"}
    listed = [int(row.replace(",", "")) for row in re.findall(r"<span>row ([\d,]+)</span>", page)]
    for row, sample in zip(listed, samples, strict=False):
        assert sample["classes"].split() == list(dict.fromkeys([str(pool[row].label_a), str(pool[row].label_b)]))
        assert float(sample["lam"]) == pytest.approx(pool[row].lam, abs=1e-6)
        assert sample["status"] in (pool[row].status, "decode failed")
    assert all(0.2 < float(sample["share"]) < 0.8 for sample in samples[:5])
    assert page.index("data-status") < page.index("<details")
    assert pool.manifest.content_digest in page


def test_statuses_are_counted_over_the_entire_pool_and_failed_rows_have_their_own_section(tmp_path):
    page, _ = render_pool_page(make_pool(tmp_path / "p", redrawn=range(30), kept=(17 * 30,)), samples=50)
    assert "2,969 ok (98.97 %), 30 redrawn (1.00 %), 1 decode failed (0.03 %)" in re.sub(r"\s+", " ", page)
    assert "24 more rows whose first attempt failed to decode" in page
    failed = shown(page.split("more rows whose first attempt failed")[1])
    assert {sample["status"] for sample in failed} <= {"redrawn", "decode failed"}
    assert len(failed) == 24
    assert "more rows whose" not in render_pool_page(make_pool(tmp_path / "q"), samples=50)[0]


def test_a_pool_outside_its_workspace_is_shown_without_source_images_unless_data_is_given(
    finished_workspace, tmp_path, command
):
    alone = Path(shutil.copytree(artifact_folder(finished_workspace, "mix", "lsmix"), tmp_path / "alone"))
    page = tmp_path / "page.html"
    result = command("show", alone, "--html", page, "--rows", "20")
    assert result.code == 0
    assert "--data" in result.out
    assert {sample["pictures"] for sample in shown(page.read_text(encoding="utf-8"))} == {"1"}
    dataset = artifact_folder(finished_workspace, "ingest", "tiny")
    for data in (dataset, dataset / "dataset.h5"):
        result = command("show", alone, "--html", page, "--rows", "20", "--data", data, "--json")
        answer = msgspec.json.decode(result.out)["content"]
        assert answer["html"] == str(page)
        assert "image" not in answer
        assert {sample["pictures"] for sample in shown(page.read_text(encoding="utf-8"))} == {"3"}
    assert not list(tmp_path.glob("*.png"))


def test_hostile_text_is_escaped_and_shortened(tmp_path):
    classes = (EVIL, "x" * 100_000, "owl")
    folder = make_pool(tmp_path / "p", rows=100, classes=classes, name=EVIL, config={EVIL: EVIL * 1000})
    page, _ = render_pool_page(folder, samples=12)
    assert "<img src=x" not in page
    assert page.count("</script>") == 1
    assert "&lt;img src=x onerror" in page
    assert "x" * 50 not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)


@pytest.mark.parametrize(("side", "channels"), [(300, 3), (32, 1)])
def test_a_page_never_exceeds_its_size_limit(side, channels, tmp_path):
    # Noise is the worst case, since it cannot be compressed.
    folder = make_pool(tmp_path / "p", rows=400, side=side, channels=channels)
    page, what = render_pool_page(folder, samples=1000)
    assert 500_000 < len(page.encode()) < 3_000_000
    assert what.startswith(f"{len(shown(page))} of 400 images")
    assert ("Images are downscaled" in page) == (side > 96)


def test_pools_with_many_classes_or_three_sources_have_a_page(tmp_path, finished_workspace, tiny_recipe):
    page, _ = render_pool_page(make_pool(tmp_path / "p", classes=tuple(f"class {i}" for i in range(30))))
    assert "The most frequent of the 900 possible pairs" in page
    from lsmix.pipeline.api import run

    workspace = Path(shutil.copytree(finished_workspace, tmp_path / "runs"))
    three = tmp_path / "three.toml"
    three.write_text(f'{tiny_recipe.read_text()}\n[pools.three]\nsources = 3\ncorner = "random"\n', encoding="utf-8")
    made = run(three, workspace=workspace, stage="mix", device="cpu")
    page, _ = render_pool_page(made["mix/three"].folder, samples=12)
    assert {sample["pictures"] for sample in shown(page)} == {"4"}
    assert re.search(r"<span>from (top-right|bottom-left|bottom-right)</span>", page)


# Rejected inputs.


def test_other_artifacts_and_other_data_sets_are_rejected(finished_workspace, tmp_path, command):
    dataset, pool = (
        artifact_folder(finished_workspace, "ingest", "tiny"),
        artifact_folder(finished_workspace, "mix", "lsmix"),
    )
    with pytest.raises(FormatError, match="Only pools have an HTML page"):
        render_pool_page(dataset)
    with pytest.raises(RecipeError, match="made from the data set with content digest"):
        render_pool_page(pool, data=artifact_folder(finished_workspace, "train-glow", "tiny"))
    with pytest.raises(MissingError):
        render_pool_page(pool, data=tmp_path / "nowhere")
    assert command("show", pool, "--data", dataset).code == 1
    assert command("show", pool, "--rows", "65").code == 1


def test_labels_that_differ_from_the_source_labels_are_rejected(tmp_path, tiny_workspace):
    folder = artifact_folder(tiny_workspace, "mix", "lsmix")
    pool = open_pool(folder)
    arrays = {name: column[:] for name, column in pool.columns.items()}
    arrays["label_a"] = (arrays["label_a"] + 1) % 10
    for shard in range(pool.columns.table.shards):
        rows = pool.columns.table.shard_range(shard)
        write_pool_shard(folder, shard, {name: values[rows.start : rows.stop] for name, values in arrays.items()})
    reseal(folder)
    with pytest.raises(CorruptError, match=r"training image \d+ has class \d, but in the data set it has class \d"):
        render_pool_page(folder)


@pytest.mark.parametrize("column", ["lam", "share_b"])
def test_numbers_out_of_range_are_rejected(column, tmp_path, monkeypatch):
    pool = open_pool(make_pool(tmp_path / "p", rows=100))
    values = pool.columns[column][:]
    values[7] = np.nan
    monkeypatch.setitem(pool.columns, column, values)
    with pytest.raises(CorruptError, match=f"in row 7 {column} is nan, but must be from 0 to 1"):
        summarise_pool(pool)


def test_images_with_two_channels_are_rejected(tmp_path):
    with pytest.raises(LsmixError, match=r"with 1 \(grey\) or 3 \(RGB\) channels; pool .* has 2"):
        render_pool_page(make_pool(tmp_path / "p", rows=10, channels=2))
