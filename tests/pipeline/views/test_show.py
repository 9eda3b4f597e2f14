"""Laws of the grids of growing λ, of ``show`` and of the report as a whole, on a finished workspace."""

import re
import shutil

import numpy as np
import pytest
from factory import artifact_folder
from PIL import Image

from lsmix.data.dataset import open_dataset
from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.glow.checkpoint import load_flow
from lsmix.pipeline.views.figures import INTERPOLATION_TITLES, interpolation_grid
from lsmix.pipeline.views.images import mixed_rows


def test_a_grid_of_growing_shares_begins_with_the_first_image_and_ends_with_the_second(finished_workspace):
    train = open_dataset(artifact_folder(finished_workspace, "ingest", "tiny")).train
    flow = load_flow(artifact_folder(finished_workspace, "train-glow", "tiny"))
    latents = open_latents(artifact_folder(finished_workspace, "encode", "tiny"))
    pool = open_pool(artifact_folder(finished_workspace, "mix", "lsmix"))
    chosen = mixed_rows(pool, 3)
    assert ((pool.share_b[chosen] > 0.2) & (pool.share_b[chosen] < 0.8)).all()
    pairs = list(zip(pool.source_a[chosen].tolist(), pool.source_b[chosen].tolist(), strict=True))
    rows = interpolation_grid(flow, latents, pairs)
    assert [len(row) for row in rows] == [len(INTERPOLATION_TITLES)] * 3
    for (first, second), row in zip(pairs, rows, strict=True):
        np.testing.assert_array_equal(row[0], train.images[first])
        np.testing.assert_array_equal(row[-1], train.images[second])
        assert train.labels[first] != train.labels[second]


def test_show_draws_a_pool_between_its_sources(finished_workspace, tmp_path, command):
    sheet = tmp_path / "sheet.png"
    result = command("show", artifact_folder(finished_workspace, "mix", "lsmix"), "--image", sheet, "--rows", "2")
    assert result.code == 0
    assert "x₁ | mixes at growing λ | x₂" in result.out
    with Image.open(sheet) as picture:
        assert picture.width > 8 * len(INTERPOLATION_TITLES)


def test_show_draws_a_pool_without_its_workspace(finished_workspace, tmp_path, command):
    alone = tmp_path / "alone"
    shutil.copytree(artifact_folder(finished_workspace, "mix", "lsmix"), alone)
    result = command("show", alone, "--image", tmp_path / "sheet.png")
    assert result.code == 0
    assert "ordered by their share of x₂" in result.out


@pytest.mark.parametrize(("stage", "drawn"), [("ingest", True), ("train-glow", True), ("encode", False)])
def test_show_summarises_any_artifact(stage, drawn, finished_workspace, tmp_path, command):
    sheet = tmp_path / "sheet.png"
    folder = artifact_folder(finished_workspace, stage, "tiny")
    result = command("show", folder, "--image", sheet)
    assert result.code == 0
    assert folder.name.rpartition("-")[2] in result.out
    assert sheet.is_file() == drawn


def test_the_report_is_one_file_with_everything_in_it(finished_workspace):
    folder = artifact_folder(finished_workspace, "report", "tiny")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    for words in ("Error rates", "baseline", "lsmix", "Provenance", "exact round trips", "bits per dimension"):
        assert words in page
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert {"error-rates", "fig1", "fig3", "fig4", "fig7", "appendix-e", "pool-lsmix", "rates-lsmix", "bits"} <= figures
    assert {"flow-bits", "samples"} <= figures
