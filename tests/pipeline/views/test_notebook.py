"""Notebook views of pools and results."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import lsmix


@pytest.fixture(scope="module")
def result(finished_workspace, tiny_recipe):
    return lsmix.run(tiny_recipe, workspace=finished_workspace, device="cpu")


def test_a_pool_shows_its_first_images(result):
    pool = lsmix.open_pool(result["mix/lsmix"].folder)
    shown = pool._repr_html_()
    png = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", shown)[1])
    strip = np.asarray(Image.open(io.BytesIO(png)))
    height, width, _ = pool.image_shape
    assert strip.shape == (height, 12 * width)
    np.testing.assert_array_equal(strip[:, width : 2 * width], pool.image[1][..., 0])


def test_a_pool_at_a_url_shows_no_images_to_avoid_a_download(result, tmp_path):
    url = f"memory://{tmp_path.name}/pool"
    lsmix.push(result["mix/lsmix"].folder, url)
    shown = lsmix.open_pool(url, cache=tmp_path / "cache")._repr_html_()
    assert url in shown
    assert "<img" not in shown


def test_the_location_of_a_pool_is_escaped(result, tmp_path):
    folder = tmp_path / "<b>pool"
    shutil.copytree(result["mix/lsmix"].folder, folder)
    assert "&lt;b&gt;pool" in lsmix.open_pool(folder)._repr_html_()


def test_a_result_shows_its_error_rates_and_the_path_of_its_report(result):
    shown = result._repr_html_()
    assert "0 of " in shown
    assert result.report_place in shown
    for row in result.error_rates:
        assert f">{row.label}</td>" in shown
        assert f">{row.text}</td>" in shown
