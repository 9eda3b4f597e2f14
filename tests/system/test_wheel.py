"""The wheel, in an environment of its own: what works from the checkout must work from what users install."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("classifiers", "data", "glow", "pipeline")
ROOT_FILES = ("__init__.py", "__main__.py", "cli.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the checkout, so that nothing is left behind in it and nothing old gets in."""
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


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Make an environment with the wheel alone, which borrows the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it are not read: so the editable lsmix there is not found.
    lenders = [path for path in sys.path if path.endswith("-packages")] or site.getsitepackages()
    (packages / "borrowed.pth").write_text("\n".join(lenders), encoding="utf-8")
    return folder


@pytest.fixture
def ask(environment, tmp_path):
    """Return a function that runs a program of the environment in an empty folder and returns its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_module_recipe_and_template_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = [ROOT / "__init__.py", ROOT / "__main__.py", ROOT / "cli.py", ROOT / "py.typed"]
    wanted += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    wanted += [*(ROOT / "recipes").glob("*.toml"), *(ROOT / "pipeline").rglob("*.j2")]
    assert names == {f"lsmix/{path.relative_to(ROOT).as_posix()}" for path in wanted}
    assert "lsmix/pipeline/views/templates/page.html.j2" in names


def test_the_command_line_works_from_the_wheel(ask):
    assert "Usage: lsmix" in ask("lsmix", "--help")
    assert ask("lsmix", "init", "demo") == (ROOT / "recipes" / "demo.toml").read_text(encoding="utf-8")
    assert (
        ask("lsmix", "--version")
        .strip()
        .endswith(ask("python", "-c", "import lsmix; print(lsmix.__version__)").strip())
    )
    assert "Usage:" in ask("python", "-m", "lsmix", "--help")


def test_the_public_names_come_from_the_wheel(ask, environment):
    code = "import lsmix; [getattr(lsmix, name) for name in lsmix.__all__]; print(lsmix.__file__, lsmix.open_pool.__module__)"
    file, module = ask("python", "-c", code).split()
    assert Path(file).is_relative_to(environment)
    assert module == "lsmix.data.pool"


def test_a_recipe_is_planned_from_the_wheel(ask):
    (name,) = (name for name in ask("lsmix", "init").split() if name == "demo")
    recipe = ask(
        "python", "-c", f"from lsmix.pipeline.config.recipes import recipe_path; print(recipe_path({name!r}))"
    ).strip()
    assert "was never made" in ask("lsmix", "status", recipe)
