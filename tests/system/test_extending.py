"""The code of docs/extending.md works, both as a separate package and as edits of a copy of lsmix."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lsmix.classifiers.config import PixelMix
from lsmix.classifiers.pixel_mixing import mix_images
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.artifact import is_expected_path
from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.exports.format import EXPORT_FORMATS
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, row_rngs
from lsmix.data.readers.registry import DATA_FORMATS, SourceConfig, read_source
from lsmix.glow.latent_mixing import mix_latents
from lsmix.pipeline.config.recipe import read_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
FILES = dict(
    re.findall(r"^```(?:python|toml) (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)
MODULES = {name: text for name, text in FILES.items() if "/" in name}  # by their paths in lsmix
EDITS = re.findall(r"^```diff (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
ROOT = PAGE.parents[1]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a folder with the files of the page, installed as an importable package with entry points."""
    (tmp_path / "checkers").mkdir()
    (tmp_path / "checkers" / "__init__.py").touch()
    for name, text in FILES.items():
        place = f"checkers/{Path(name).name}" if name in MODULES else name
        (tmp_path / place).write_text(text, encoding="utf-8")
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


def test_each_extension_is_a_short_module_and_at_most_one_edited_file():
    for name, text in MODULES.items():
        assert len(text.splitlines()) < 40, name
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        assert section.count("\n```diff ") <= 1, section.splitlines()[0]
    assert len(MODULES) == 6
    assert len(EDITS) == 5  # a classifier needs no edit


def test_the_methods_are_known_while_the_package_is_installed(installed):
    assert "comb" in LATENT_METHODS
    assert PIXEL_METHODS.names()[-1] == "board"
    assert PixelMix(method="board").method == "board"
    with pytest.raises(RecipeError, match=r"Did you mean 'board'\? Known: mixup, cutmix, resizemix, fmix, board\."):
        PixelMix(method="boards")
    assert "checkers.board" not in sys.modules, "checking a name must not import the method"
    sys.path.remove(str(installed))
    importlib.invalidate_caches()
    assert "board" not in PIXEL_METHODS
    with pytest.raises(RecipeError, match="unknown mixing method in pixel space 'board'"):
        PixelMix(method="board")


def test_the_example_of_the_page_runs(installed):
    exec(compile(FILES["try.py"], "try.py", "exec"), {})


def test_the_methods_mix_with_the_given_shares(installed):
    black, white = np.zeros((5, 8, 8, 1), np.uint8), np.full((5, 8, 8, 1), 255, np.uint8)
    mixed, share = mix_images("board", black, white, 0.5)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)) / 255, share, rtol=0, atol=1e-6)
    assert 0.1 < share.min() < share.max() < 0.9  # each of 16 squares comes from either image
    last, _ = mix_images("board", black[3:], white[3:], 0.5, draws=lambda row: row_rngs(0, "mix", "method")(row + 3))
    np.testing.assert_array_equal(last, mixed[3:])
    z, share = mix_latents("comb", np.zeros((3, 64)), np.ones((3, 64)), np.array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(z.mean(axis=1), share)
    assert share.tolist() == [0.0, 0.5, 1.0]
    assert not mix_images("board", black, white, 0.0)[0].any()


def test_the_recipe_trains_the_network_with_the_method(installed):
    recipe = read_recipe(installed / "my.toml")
    config = recipe.run_config("baseline", 0)
    assert "checkers.small" not in sys.modules, "reading a recipe must not import the network"
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    facts = []
    for mixes in (None, lambda _epoch, _index: (PixelMix(method="board"),)):
        trainer = ClassifierTrainer(config, 10, (8, 8, 1), seed=0, mixes=mixes)
        facts.append(trainer.run_epoch(ArrayLoader(images, np.arange(32) % 10, batch_size=16)))
    assert facts[0].updates == facts[1].updates == 2
    assert facts[0].loss != facts[1].loss


def test_a_run_uses_the_network(installed, command):
    words = ("--workspace", installed / "runs", "--device", "cpu", "--set", "data.limit=300")
    assert command("train", installed / "my.toml", *words, "--set", "classifier.epochs=1").code == 0
    assert list((installed / "runs" / "train").glob("*/classifier.safetensors"))


def test_modules_next_to_a_recipe_are_not_imported(installed, monkeypatch):
    (installed / "recipes").mkdir()
    (installed / "recipes" / "evil_nets.py").write_text("raise SystemExit('run')", encoding="utf-8")
    recipe = FILES["my.toml"].replace("checkers.small:small", "evil_nets:small")
    (installed / "recipes" / "my.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(installed / "recipes")
    with pytest.raises(RecipeError, match="needs the package 'evil_nets', which is not installed"):
        read_recipe(Path("my.toml"))


def test_the_formats_are_known(installed):
    table = np.arange(2 * 10).reshape(2, 10) % 7
    np.savetxt(installed / "images.csv", table, "%d", delimiter=",")
    published = read_source(SourceConfig(path=str(installed / "images.csv")))
    np.testing.assert_array_equal(published.splits["train"].images.reshape(2, 9), table[:, 1:])
    assert published.splits["train"].labels.tolist() == [0, 3]
    assert "pixel-csv" in DATA_FORMATS
    for wrong in ("1,2\n1,300\n", "1,2,3\n", "1,x\n"):
        (installed / "images.csv").write_text(wrong)
        with pytest.raises(SourceError, match=r"images\.csv"):
            read_source(SourceConfig(path=str(installed / "images.csv"), format="pixel-csv"))
    assert EXPORT_FORMATS.names()[-1] == "npy"
    assert is_expected_path("export", "pool-00000.share_b.npy")


USE = """
import json
import numpy as np
import lsmix
from lsmix.pipeline.api import export_pool

assert lsmix.__file__.startswith({tree!r}), lsmix.__file__
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (90, 64))
np.savetxt("images.csv", np.column_stack([np.arange(90) % 3, images]), "%d", delimiter=",")
made = lsmix.run("all.toml", device="cpu")
for name in ("comb", "board"):
    lsmix.verify(made[f"mix/{{name}}"].folder)
facts = export_pool(made["mix/comb"].folder, "exported", format="npy")
lsmix.verify("exported")
stored = np.load("exported/pool-00000.image.npy", mmap_mode="r")
np.testing.assert_array_equal(stored, lsmix.open_pool(made["mix/comb"].folder).image[:])
assert "A. Author, Comb, 2026." in (made["mix/comb"].folder / "README.md").read_text(encoding="utf-8")
report = made.report.read_text(encoding="utf-8")
assert "<summary>Classes</summary>" in report and 'data-label="images">20</td>' in report, report
assert ", Comb" in report  # the title of the method in the figure of Appendix E
"""

EVERYTHING = """
name = "all"
[data]
path = "images.csv"
test = 30
[flow]
levels = 2
steps = 1
hidden = 4
threads = 1
evaluate_images = 8
[flow.training]
iterations = 2
batch_size = 16
[pools.comb]
method = "comb"
[pools.board]
method = "board"
[classifier]
architecture = "lsmix.classifiers.small:small"
epochs = 1
batch_size = 32
threads = 1
[runs.small]
mix = [{ pool = "comb" }, { method = "board" }]
[report]
pairs = 1
bits_images = 8
"""


def apply_edit(path: Path, edit: str) -> None:
    """Apply a diff of the page, whose hunks are located by their text."""
    for hunk in re.split(r"^@@\n", edit, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        text = path.read_text(encoding="utf-8")
        assert not hunk or text.count(before) == 1, (
            f"{path.name} contains these lines {text.count(before)} times:\n{before}"
        )
        path.write_text(text.replace(before, after) if hunk else text, encoding="utf-8")


def test_a_copy_of_lsmix_with_all_modules_and_edits_of_the_page_works(tmp_path):
    tree = tmp_path / "tree" / "lsmix"
    for package in ("classifiers", "data", "glow", "pipeline"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "LICENSE"):
        shutil.copy(path, tree)
    for name, text in MODULES.items():
        (tree / name).write_text(text, encoding="utf-8")
    for name, edit in EDITS:
        apply_edit(tree / name, edit)
    (tmp_path / "all.toml").write_text(EVERYTHING, encoding="utf-8")
    words = [sys.executable, "-c", USE.format(tree=str(tree))]
    env = {**os.environ, "PYTHONPATH": str(tree.parent)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
