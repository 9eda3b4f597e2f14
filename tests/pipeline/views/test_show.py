"""Laws of ``show`` and of the report as a whole, on a finished workspace."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lsmix.pipeline.views.images import GRID_TITLES


def _one(workspace: Path, stage: str, name: str) -> Path:
    (folder,) = (workspace / stage).glob(f"{name}-*")
    return folder


def test_show_draws_a_pool_with_its_sources_where_they_are_known(
    finished_workspace: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    sheet = tmp_path / "sheet.png"
    result = command("show", _one(finished_workspace, "mix", "lsmix"), "--image", sheet, "--rows", "2")
    assert result.code == 0
    assert "x₁ | mix | x₂" in result.out
    with Image.open(sheet) as picture:
        assert picture.width > 48 * len(GRID_TITLES)


def test_show_draws_a_pool_that_came_alone(
    finished_workspace: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(_one(finished_workspace, "mix", "lsmix"), alone)
    result = command("show", alone, "--image", tmp_path / "sheet.png")
    assert result.code == 0
    assert "ordered by their share of x₂" in result.out


@pytest.mark.parametrize(("stage", "drawn"), [("ingest", True), ("train-glow", True), ("encode", False)])
def test_show_tells_the_facts_of_any_artifact(
    stage: str, drawn: bool, finished_workspace: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    sheet = tmp_path / "sheet.png"
    folder = _one(finished_workspace, stage, "tiny")
    result = command("show", folder, "--image", sheet)
    assert result.code == 0
    assert folder.name.rpartition("-")[2] in result.out
    assert sheet.is_file() == drawn


def test_the_report_is_one_file_with_everything_in_it(finished_workspace: Path) -> None:
    folder = _one(finished_workspace, "report", "tiny")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    for words in ("Error rates", "baseline", "lsmix", "Provenance", "exact round trips", "bits per dimension"):
        assert words in page
    figures = {path.stem for path in (folder / "figures").iterdir()}
    assert {"error-rates", "fig1", "fig3", "fig4", "fig7", "appendix-e", "pool-lsmix", "rates-lsmix", "bits"} <= figures
    assert {"flow-bits", "samples"} <= figures
