"""The package of docs/extending.md, made from the page and installed beside lsmix, does what the page says."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lsmix.classifiers.config import PixelMix
from lsmix.classifiers.pixel_mixing import mix_images
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.errors import RecipeError
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, row_rngs
from lsmix.glow.latent_mixing import mix_latents
from lsmix.pipeline.config.recipe import read_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
FILES = dict(
    re.findall(r"^```(?:python|toml) (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)
METHODS = {"lsmix.latent_methods": "comb", "lsmix.pixel_methods": "board"}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a folder with the page's files, the package installed as pip would: importable, with its entry points."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "checkers" / "__init__.py").touch()
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    facts = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (facts / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "checkers"]:
        del sys.modules[name]


def test_each_method_is_under_thirty_lines_of_code_and_names():
    for code in ("checkers/latent.py", "checkers/pixel.py"):
        assert len(FILES[code].splitlines()) + len(FILES["pyproject.toml"].splitlines()) < 30


def test_its_methods_count_like_our_own_only_where_it_is_installed(installed, monkeypatch):
    assert "comb" in LATENT_METHODS
    assert PIXEL_METHODS.names()[-1] == "board"
    assert PixelMix(method="board").method == "board"
    with pytest.raises(RecipeError, match=r"Did you mean 'board'\? Known: mixup, cutmix, resizemix, fmix, board\."):
        PixelMix(method="boards")
    assert "checkers.pixel" not in sys.modules, "checking a name imports nothing"
    monkeypatch.syspath_prepend("")  # whatever else is there
    sys.path.remove(str(installed))
    importlib.invalidate_caches()
    assert "board" not in PIXEL_METHODS
    with pytest.raises(RecipeError, match="unknown mixing method in pixel space 'board'"):
        PixelMix(method="board")


def test_what_the_page_runs_runs(installed):
    exec(compile(FILES["try.py"], "try.py", "exec"), {})


def test_its_methods_hold_to_the_laws(installed):
    black, white = np.zeros((5, 8, 8, 1), np.uint8), np.full((5, 8, 8, 1), 255, np.uint8)
    mixed, share = mix_images("board", black, white, 0.5)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)) / 255, share, rtol=0, atol=1e-6)
    assert 0.1 < share.min() < share.max() < 0.9  # 16 squares, each from either
    last, _ = mix_images("board", black[3:], white[3:], 0.5, draws=lambda row: row_rngs(0, "mix", "method")(row + 3))
    np.testing.assert_array_equal(last, mixed[3:])
    z, share = mix_latents("comb", np.zeros((3, 64)), np.ones((3, 64)), np.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(z.mean(axis=1), share)
    assert share.tolist() == [0.0, 0.5, 1.0]
    assert not mix_images("board", black, white, 0.0)[0].any()


def test_its_recipe_trains_its_network_with_its_method(installed):
    recipe = read_recipe(installed / "my.toml")
    config = recipe.run_config("baseline", 0)
    assert "checkers.nets" not in sys.modules, "reading a recipe imports nothing"
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    facts = []
    for mixes in (None, lambda _epoch, _index: (PixelMix(method="board"),)):
        trainer = ClassifierTrainer(config, 10, (8, 8, 1), seed=0, mixes=mixes)
        facts.append(trainer.run_epoch(ArrayLoader(images, np.arange(32) % 10, batch_size=16)))
    assert facts[0].updates == facts[1].updates == 2
    assert facts[0].loss != facts[1].loss


def test_a_whole_run_uses_its_network(installed, command):
    words = [
        "--workspace",
        installed / "runs",
        "--device",
        "cpu",
        "--set",
        "data.limit=300",
        "--set",
        "classifier.epochs=1",
    ]
    assert command("train", installed / "my.toml", *words).code == 0
    assert list((installed / "runs" / "train").glob("*/classifier.safetensors"))


def test_a_recipes_folder_is_no_package(installed):
    (installed / "recipes").mkdir()
    (installed / "recipes" / "evil_nets.py").write_text("raise SystemExit('run')", encoding="utf-8")
    recipe = FILES["my.toml"].replace("checkers.nets:small", "evil_nets:small")
    (installed / "recipes" / "my.toml").write_text(recipe, encoding="utf-8")
    code = f"import sys; sys.path.pop(0)\nfrom lsmix.pipeline.config.recipe import read_recipe\nread_recipe({str(installed / 'recipes' / 'my.toml')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed / "recipes", capture_output=True, text=True, check=False
    )
    assert "needs the package 'evil_nets', which is not installed" in done.stderr
