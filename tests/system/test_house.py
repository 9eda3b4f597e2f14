"""Code conventions: import order of packages, fast start-up, documented names, and lengths of files and functions."""

import ast
import doctest
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("classifiers", "data", "glow", "pipeline")
ROOT_MODULES = {"__init__", "__main__", "cli"}
# From bottom to top: a package may import only itself and the packages before it.
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
INDEPENDENT = {("classifiers", "glow")}
IMPORTED_ONLY_BY = {
    "click": ("cli.py", "pipeline/cli_options.py"),
    "dask": ("pipeline/engine/dask.py",),
    "distributed": ("pipeline/engine/dask.py",),
}
HEAVY = {"torch", "matplotlib", "dask", "distributed", "zarr", "pandas", "pyarrow"}


SOURCES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))])


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imports(path: Path) -> list[tuple[int, str, tuple[str, ...]]]:
    """Return line, module and names of all imports of a file, including those in functions and for type checkers."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}:{node.lineno} imports relatively"
            names = tuple(alias.name for alias in node.names)
            if node.module == "lsmix":
                found += [(node.lineno, f"lsmix.{name}", ()) for name in names]
            else:
                found.append((node.lineno, str(node.module), names))
    return found


@cache
def package_of(module: str) -> str:
    """Return the package in which a module is defined, without "lsmix."."""
    parts = module.split(".")[1:]
    while parts and not ROOT.joinpath(*parts, "__init__.py").is_file():
        parts.pop()
    return ".".join(parts)


@cache
def public_names(path: Path) -> list[str] | None:
    """Return the names in the ``__all__`` of a file, or None if it has none."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def against_one_way(path: Path) -> Iterator[str]:
    here = package_of("lsmix." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    for line, module, _ in imports(path) if here else ():  # the root package and the command line may import everything
        if module.startswith("lsmix."):
            there = package_of(module)
            if LAYERS.index(there) > LAYERS.index(here) or (here, there) in INDEPENDENT:
                yield f"{line}: {here} must not import {module}"


def against_homes(path: Path) -> Iterator[str]:
    for line, module, _ in imports(path):
        homes = IMPORTED_ONLY_BY.get(module.split(".")[0])
        if homes and name_of(path) not in homes:
            yield f"{line}: only {homes} may import {module}"


def against_private_imports(path: Path) -> Iterator[str]:
    for line, module, names in imports(path):
        home = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        is_module = module.startswith("lsmix.") and home.is_file()  # otherwise a module is imported from a package
        if is_module and (private := set(names) - set(public_names(home) or ())):
            yield f"{line}: not in __all__ of {name_of(home)}: {private}"


def against_documented_names(path: Path) -> Iterator[str]:
    tree, public = tree_of(path), public_names(path)
    if not ast.get_docstring(tree):
        yield "the file has no docstring"
    if not public and path.name not in ("__init__.py", "__main__.py"):
        yield "the file has no __all__"
    for node in tree.body:
        is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in (public or ())
        if is_public and not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} has no docstring"


def against_sizes(path: Path) -> Iterator[str]:
    if (lines := path.read_text(encoding="utf-8").count("\n")) > 500:
        yield f"the file has {lines} lines, the limit is 500"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
            yield f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines, the limit is 80"


def against_plain_names(path: Path) -> Iterator[str]:
    if path.stem in ("utils", "util", "helpers", "common", "misc"):
        yield "the file name does not describe its content"
    for word in ("TODO", "FIXME", "NotImplementedError"):
        if word in path.read_text(encoding="utf-8"):
            yield f"{word} is unfinished work"


RULES = {
    "packages import only lower packages": against_one_way,
    "click and Dask are imported by few files": against_homes,
    "only public names are imported": against_private_imports,
    "files and public names are documented": against_documented_names,
    "files and functions are short": against_sizes,
    "file names are clear and no work is unfinished": against_plain_names,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_file_follows_the_rules(rule):
    broken = [f"{name_of(path)}: {finding}" for path in SOURCES for finding in RULES[rule](path)]
    assert not broken, "\n".join([rule, *broken])


def test_every_package_is_listed_and_no_other_module_is_at_the_root():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    found = {"lsmix", *("lsmix." + ".".join(folder.relative_to(ROOT).parts) for folder in folders)}
    assert set(settings["packages"]) == found
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES
    for folder in ROOT.iterdir():  # a new package must be added to PACKAGES and LAYERS above
        if (folder / "__init__.py").is_file():
            assert folder.name in (*PACKAGES, "benchmarks")  # benchmarks are run from the checkout only


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter has loaded after running ``code``."""
    report = "import sys, json; sys.stderr.write('\\n' + json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_heavy_packages_are_imported_only_when_needed():
    assert not loaded_by("import lsmix, lsmix.data.pool, lsmix.cli, lsmix.pipeline.api") & HEAVY


def test_help_and_init_do_not_import_numpy():
    code = (
        "import sys\n"
        "from lsmix.cli import main\n"
        "for words in (['--help'], ['mix', '--help'], ['init'], ['init', 'demo']):\n"
        "    sys.argv = ['lsmix', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code"
    )
    assert not loaded_by(code) & {*HEAVY, "numpy", "h5py", "PIL"}


@pytest.mark.parametrize("path", [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")], ids=name_of)
def test_the_examples_in_docstrings_run(path):
    module = importlib.import_module(".".join(["lsmix", *path.relative_to(ROOT).with_suffix("").parts]))
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
