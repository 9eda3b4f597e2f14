"""MkDocs hook: an API page for every module of lsmix, generated from its docstrings.

Pages are generated from the source tree, so new modules and public names appear automatically.
"""

import ast
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

__all__ = ["modules_of", "on_config", "on_files", "on_page_markdown", "public_names", "subpackages"]

ROOT: Final = Path(__file__).resolve().parents[2]
_MARK: Final = re.compile("<!-- public names: (.+) -->")  # names in the order to show; unlisted names come last
# Exists until the process ends, because mkdocstrings reads it while pages are rendered.
_FOLDER: Final = tempfile.TemporaryDirectory(prefix="lsmix-docs-")


def subpackages() -> list[str]:
    """Return the names of all subpackages, as listed in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages: list[str] = settings["tool"]["setuptools"]["packages"]
    return [name.removeprefix("lsmix.") for name in packages if name != "lsmix"]


def modules_of(package: str) -> list[str]:
    """Return the module names of a package such as "data" or "pipeline.views"."""
    return sorted(path.stem for path in ROOT.joinpath(*package.split(".")).glob("*.py") if path.stem != "__init__")


def public_names(path: Path) -> list[str]:
    """Return the names in the ``__all__`` of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _isolated_package() -> Path:
    """Return a folder in which ``lsmix`` contains its packages and nothing else.

    griffe follows links and reads every Python file below a package. From the root of the repository it would loop in
    ``.typings/lsmix`` and read ``.venv``.
    """
    package = Path(_FOLDER.name) / "lsmix"
    if not package.exists():
        package.mkdir()
        for name in ("__init__.py", *sorted({name.split(".")[0] for name in subpackages()})):
            (package / name).symlink_to(ROOT / name)
    return package.parent


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Set the package path of mkdocstrings, and add every module to the navigation."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_isolated_package())]
    pages = _find(config.nav, "api/index.md")
    pages[1:] = [{package: [f"api/{package}/index.md", *_entries(package)]} for package in subpackages()]
    return config


def _entries(package: str) -> list[dict[str, str]]:
    return [{name: f"api/{package}/{name}.md"} for name in modules_of(package)]


def _find(nav: list[Any], page: str) -> list[Any]:
    for entry in nav:
        for part in entry.values() if isinstance(entry, dict) else ():
            if isinstance(part, list):
                if page in part:
                    return part
                if found := _find(part, page):
                    return found
    return []


def on_files(files: Files, config: Any) -> Files:
    """Add the API pages."""
    for package in subpackages():
        path = ROOT.joinpath(*package.split("."))
        lines = [f"# lsmix.{package}", "", _summary(path / "__init__.py"), "", "| module | content |", "|---|---|"]
        for name in modules_of(package):
            lines.append(f"| [{name}]({name}.md) | {_summary(path / f'{name}.py')} |")
            title = f"lsmix.{package}.{name}"
            text = f"# {title}\n\n::: {title}\n    options:\n      show_root_heading: false\n"
            files.append(File.generated(config, f"api/{package}/{name}.md", content=text))
        files.append(File.generated(config, f"api/{package}/index.md", content="\n".join([*lines, ""])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the mark by the public names of the root package, and rank module pages lower in the search."""
    if page.file.src_uri != "api/index.md":
        if page.file.src_uri.startswith("api/"):
            page.meta["search"] = {"boost": 0.2}
        return markdown
    names = [name for name in public_names(ROOT / "__init__.py") if not name.startswith("__")]

    def listed(mark: re.Match[str]) -> str:
        ordered = [name for name in mark[1].split() if name in names]
        return "\n".join(f"::: lsmix.{name}\n" for name in dict.fromkeys([*ordered, *names]))

    return _MARK.sub(listed, markdown)
