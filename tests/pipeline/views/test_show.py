"""``lsmix show`` and the finished report, on a finished workspace."""

import re
import shutil

import pytest
from factory import artifact_folder
from PIL import Image

from lsmix.pipeline.views.images import GRID_TITLES


def test_show_draws_the_mixes_of_a_pool_between_their_source_images(finished_workspace, tmp_path, command):
    sheet = tmp_path / "sheet.png"
    result = command("show", artifact_folder(finished_workspace, "mix", "lsmix"), "--image", sheet, "--rows", "2")
    assert result.code == 0
    assert "x₁ | mix | x₂" in result.out
    with Image.open(sheet) as picture:
        assert picture.width > 48 * len(GRID_TITLES)


def test_show_draws_a_pool_outside_its_workspace(finished_workspace, tmp_path, command):
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


def test_the_report_is_one_self_contained_file(finished_workspace):
    folder = artifact_folder(finished_workspace, "report", "tiny")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    for words in ("Error rates", "baseline", "lsmix", "Provenance", "exact round trips", "bits per dimension"):
        assert words in page
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert {"error-rates", "fig1", "fig3", "fig4", "fig7", "appendix-e", "pool-lsmix", "rates-lsmix", "bits"} <= figures
    assert {"flow-bits", "samples"} <= figures
