"""MkDocs hook: a page of the API for every module of lsmix, from its docstrings.

Pages are made from the source tree, so a module or a public name that is new has its place at once.
"""

import ast
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

__all__ = ["modules_of", "on_config", "on_files", "on_page_markdown", "public_names", "rooms"]

ROOT: Final = Path(__file__).resolve().parents[2]
_MARK: Final = re.compile("<!-- public names: (.+) -->")  # in the order of use; those that it lacks come last
# Kept as long as the process: mkdocstrings reads it while pages are rendered.
_FOLDER: Final = tempfile.TemporaryDirectory(prefix="lsmix-docs-")


def rooms() -> list[str]:
    """Return the packages below the root one, as pyproject.toml lists them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages: list[str] = settings["tool"]["setuptools"]["packages"]
    return [name.removeprefix("lsmix.") for name in packages if name != "lsmix"]


def modules_of(room: str) -> list[str]:
    """Return the modules of a room, such as "pool"."""
    return sorted(path.stem for path in ROOT.joinpath(*room.split(".")).glob("*.py") if path.stem != "__init__")


def public_names(path: Path) -> list[str]:
    """Return what stands in a file's ``__all__``."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def _package_alone() -> Path:
    """Make a folder in which ``lsmix`` has its packages and nothing else, and return it.

    griffe follows links and reads every Python file below a package: from the repository's root it would go round in
    ``.typings/lsmix`` and read ``.venv``.
    """
    package = Path(_FOLDER.name) / "lsmix"
    if not package.exists():
        package.mkdir()
        for name in ("__init__.py", *sorted({room.split(".")[0] for room in rooms()})):
            (package / name).symlink_to(ROOT / name)
    return package.parent


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Tell mkdocstrings where the package is, and put every module into the navigation."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_package_alone())]
    pages = _find(config.nav, "api/index.md")
    pages[1:] = [{room: [f"api/{room}/index.md", *_entries(room)]} for room in rooms()]
    return config


def _entries(room: str) -> list[dict[str, str]]:
    return [{name: f"api/{room}/{name}.md"} for name in modules_of(room)]


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
    """Add the pages."""
    for room in rooms():
        path = ROOT.joinpath(*room.split("."))
        lines = [f"# lsmix.{room}", "", _summary(path / "__init__.py"), "", "| module | holds |", "|---|---|"]
        for name in modules_of(room):
            lines.append(f"| [{name}]({name}.md) | {_summary(path / f'{name}.py')} |")
            text = f"# lsmix.{room}.{name}\n\n::: lsmix.{room}.{name}\n    options:\n      show_root_heading: false\n"
            files.append(File.generated(config, f"api/{room}/{name}.md", content=text))
        files.append(File.generated(config, f"api/{room}/index.md", content="\n".join([*lines, ""])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the root package's public names in the place of the mark; let the search put prose before modules."""
    if page.file.src_uri != "api/index.md":
        if page.file.src_uri.startswith("api/"):
            page.meta["search"] = {"boost": 0.2}
        return markdown
    names = [name for name in public_names(ROOT / "__init__.py") if not name.startswith("__")]

    def listed(mark: re.Match[str]) -> str:
        ordered = [name for name in mark[1].split() if name in names]
        return "\n".join(f"::: lsmix.{name}\n" for name in dict.fromkeys([*ordered, *names]))

    return _MARK.sub(listed, markdown)
