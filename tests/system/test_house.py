"""The house rules that a reader relies on: who imports whom, what starts fast, what is documented, and how long files are."""

import ast
import doctest
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("classifiers", "data", "glow", "pipeline")
ROOT_MODULES = {"__init__", "__main__", "cli"}
# From the bottom up: a package imports those before it, itself, and no other.
LAYERS = (
    "data",
    "data.readers",
    "data.readers.images",
    "data.readers.published",
    "data.loaders",
    "data.sharing",
    "data.exports",
    "glow",
    "classifiers",
    "pipeline.config",
    "pipeline.workspace",
    "pipeline.engine",
    "pipeline.views",
    "pipeline.views.dataset_card",
    "pipeline.views.report",
    "pipeline.naturalness",
    "pipeline.stages",
    "pipeline.verify",
    "pipeline",
)
STRANGERS = {("classifiers", "glow")}  # which know nothing of each other
AT_HOME = {
    "click": ("cli.py", "pipeline/cli_options.py"),
    "dask": ("pipeline/engine/dask.py",),
    "distributed": ("pipeline/engine/dask.py",),
}
HEAVY = {"torch", "matplotlib", "dask", "distributed", "zarr", "pandas", "pyarrow"}


def sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Go through what a file imports anywhere in it, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno} imports relatively"
            assert node.module
            if node.module == "lsmix":
                yield from ((node.lineno, f"lsmix.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


every_source = pytest.mark.parametrize("path", sources(), ids=name_of)


def package_of(module: str) -> str:
    """Return the package, without "lsmix.", in which a module is defined."""
    parts = module.split(".")[1:]
    while parts and not ROOT.joinpath(*parts, "__init__.py").is_file():
        parts.pop()
    return ".".join(parts)


@every_source
def test_imports_point_one_way(path):
    here = package_of("lsmix." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    if not here:  # the root package and the command line import what they like
        return
    for line, module in imports(path):
        if module.startswith("lsmix."):
            there = package_of(module)
            assert LAYERS.index(there) <= LAYERS.index(here), f"{name_of(path)}:{line}: {here} must not import {module}"
            assert (here, there) not in STRANGERS, f"{name_of(path)}:{line}: {here} must not import {module}"


@every_source
def test_click_and_dask_stay_at_home(path):
    for line, module in imports(path):
        homes = AT_HOME.get(module.split(".")[0])
        assert homes is None or name_of(path) in homes, f"{name_of(path)}:{line}: {module} belongs to {homes} alone"


def public_names(path: Path) -> list[str] | None:
    """Return what stands in a file's ``__all__``; None where it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


@every_source
def test_every_public_name_is_there_and_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} does not open with a sentence on what it holds"
    public = public_names(path)
    if path.name not in ("__init__.py", "__main__.py"):
        assert public, f"{name_of(path)} has no __all__"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in (public or ()):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name} has no docstring"


@every_source
def test_only_public_names_are_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lsmix."):
            home = ROOT.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
            if home.is_file():  # else a package, from which a module is taken
                private = {alias.name for alias in node.names} - set(public_names(home) or ())
                assert not private, f"{name_of(path)}:{node.lineno}: not in __all__ of {name_of(home)}: {private}"


@every_source
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 80, f"{name_of(path)}:{node.lineno} {node.name}"


@every_source
def test_no_file_is_a_drawer_for_everything(path):
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    assert not any(word in path.read_text(encoding="utf-8") for word in ("TODO", "FIXME", "NotImplementedError"))


def test_every_package_is_listed_and_nothing_else_lies_at_the_root():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    found = {"lsmix", *("lsmix." + ".".join(folder.relative_to(ROOT).parts) for folder in folders)}
    assert set(settings["packages"]) == found
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    for folder in ROOT.iterdir():  # a new room must be added to PACKAGES above, and to MAY_IMPORT
        if (folder / "__init__.py").is_file():
            assert folder.name in (*PACKAGES, "benchmarks")  # which are run from the checkout only


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running ``code``."""
    tell = "import sys, json; sys.stderr.write('\\n' + json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("module", ["lsmix", "lsmix.data.pool", "lsmix.cli", "lsmix.pipeline.api"])
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    assert not loaded_by(f"import {module}") & HEAVY


def test_help_and_init_answer_without_numpy():
    for arguments in (["--help"], ["mix", "--help"], ["init"], ["init", "demo"]):
        code = (
            f"import sys; sys.argv = ['lsmix', *{arguments}]\n"
            "from lsmix.cli import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code"
        )
        assert not loaded_by(code) & {*HEAVY, "numpy", "h5py", "PIL"}, arguments


def with_examples() -> list[str]:
    names = []
    for path in sources():
        if ">>> " in path.read_text(encoding="utf-8"):
            names.append(".".join(["lsmix", *path.relative_to(ROOT).with_suffix("").parts]))
    return names


@pytest.mark.parametrize("module", with_examples())
def test_the_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed
