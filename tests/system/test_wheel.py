"""The wheel, installed in its own environment, works like the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import factory
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lsmix

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("classifiers", "data", "glow", "pipeline")
ROOT_FILES = ("__init__.py", "__main__.py", "cli.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, so that the build leaves nothing in the checkout and packs no stale files."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("source")
    for name in ROOT_FILES:
        shutil.copy2(ROOT / name, copy / name)
    for name in (*PACKAGES, "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def base_distributions(packages):
    """Return the installed distributions that the wheel requires without extras."""
    (wheel,) = importlib.metadata.distributions(name="lsmix", path=[str(packages)])
    found, names = {}, [Requirement(one).name for one in wheel.requires if "extra ==" not in one]
    while names:
        name = canonicalize_name(names.pop())
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            requirements = map(Requirement, found[name].requires or ())
            names += [one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Create an environment with only the wheel and links to the packages that it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in base_distributions(packages).values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (packages / name).exists():  # two distributions may share a namespace package
                (packages / name).symlink_to(distribution.locate_file(name))
    return folder


@pytest.fixture
def ask(environment, tmp_path):
    """Return a function that runs a program of the environment in an empty folder, and returns its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: str, code: int = 0) -> str:
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return run


def test_the_wheel_contains_every_module_recipe_and_template_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "cli.py", ROOT / "py.typed"]
    wanted += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    wanted += [*(ROOT / "recipes").glob("*.toml"), *(ROOT / "pipeline").rglob("*.j2")]
    wanted += [ROOT / "data" / "readers" / "digits.npz", *(ROOT / "data" / "flows").rglob("glow.*")]
    assert names == {f"lsmix/{path.relative_to(ROOT).as_posix()}" for path in wanted}
    assert "lsmix/pipeline/views/templates/page.html.j2" in names


def test_the_command_line_works_from_the_wheel(ask, tmp_path):
    assert "Usage: lsmix" in ask("lsmix", "--help")
    assert "Usage:" in ask("python", "-m", "lsmix", "--help")
    assert ask("lsmix", "--version").split()[-1] == lsmix.__version__
    recipe = ask("lsmix", "init", "demo")
    assert recipe == (ROOT / "recipes" / "demo.toml").read_text(encoding="utf-8")
    (tmp_path / "demo.toml").write_text(recipe, encoding="utf-8")
    assert "was never made" in ask("lsmix", "status", "demo.toml")


USE = """
import contextlib, io, pathlib, runpy, sys
import lsmix
from lsmix.cli import main

script = sys.argv[1]
print(lsmix.__file__)
for name in lsmix.__all__:
    getattr(lsmix, name)

def call(*words):
    sys.argv, code = ["lsmix", *map(str, words)], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue()

assert call("train", "tiny.toml", "--quiet")[0] == 0
pool, = pathlib.Path("runs/mix").glob("lsmix-*")
code, printed = call("verify", pool)
assert code == 0 and "all as recorded" in printed, printed
code, printed = call("report", "tiny.toml")
assert code == 1 and "pip install 'lsmix[report]'" in printed, printed
assert call("run", "tiny.toml", "--workspace", "other")[0] == 1
assert [path.name for path in pathlib.Path("other").iterdir() if path.name[0] != "."] == ["ingest"]
sys.argv[1:] = [str(pool), "--epochs", "1"]
runpy.run_path(script, run_name="__main__")
"""


def test_without_extras_all_public_names_work_and_a_pool_can_be_made_verified_and_trained_on(
    ask, environment, tmp_path
):
    recipe = factory.TINY_RECIPE.replace("limit = 330", "limit = 100").replace("iterations = 40", "iterations = 4")
    (tmp_path / "tiny.toml").write_text(recipe, encoding="utf-8")
    file, *printed = ask("python", "-c", USE, str(ROOT / "examples" / "plain_pytorch.py")).splitlines()
    assert Path(file).is_relative_to(environment)
    assert "loss" in printed[-1]
