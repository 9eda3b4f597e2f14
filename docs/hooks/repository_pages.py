"""MkDocs hook: add pages from outside docs/, and convert repository links to links of the site.

Every link must work both in the repository and on the site, or the build fails. Links to pages and images of the
repository lead to their copies on the site, links to modules lead to API pages, and links to other files become plain
text. The links in the README are absolute, so that they work on a package index; they are converted, too.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

__all__ = ["on_files", "on_page_markdown", "rewritten"]

ROOT: Final = Path(__file__).resolve().parents[2]
_AT: Final = "repository/"  # site folder of the pages from outside docs/
_PICTURES: Final = (".png", ".svg")
_ABSOLUTE: Final = re.compile(r"https://github\.com/lsmix/lsmix/(?:blob|raw)/main/")
_LINK: Final = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
_FENCE: Final = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
_NAMED_FENCE: Final = re.compile(r"^```(\w+) ([\w./-]+)$", re.MULTILINE)


def _outside() -> Iterator[Path]:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        yield ROOT / name
    for path in sorted((ROOT / "results").rglob("*")):
        if path.name == "README.md" or path.suffix in _PICTURES:
            yield path


def _on_site(name: str) -> str:
    # MkDocs treats README.md as the index of a folder, and the theme would use it as the section title.
    return _AT + name.replace("README.md", "readme.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and images from outside docs/."""
    for path in _outside():
        name = _on_site(path.relative_to(ROOT).as_posix())
        file = File.generated(config, name, abs_src_path=str(path))
        if file.is_documentation_page() and not _in_nav(config.nav, name):
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def _in_nav(nav: Any, page: str) -> bool:
    if isinstance(nav, str):
        return nav == page
    return any(_in_nav(part, page) for part in (nav.values() if isinstance(nav, dict) else nav))


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Convert links to their targets on the site, and add titles to code blocks that name a file."""
    if page.file.src_uri.startswith("api/") and page.file.src_uri != "api/index.md":
        return markdown
    return _NAMED_FENCE.sub(r'```\1 title="\2"', rewritten(markdown, page.file.src_uri, set(files.src_uris)))


def rewritten(markdown: str, page: str, known: set[str]) -> str:
    """Return the text of a page with its links converted for the site.

    Args:
        markdown: Text of the page.
        page: Path of the page on the site.
        known: Paths of all files on the site.

    Raises:
        PluginError: The target of a link exists neither on the site nor in the repository.
    """
    at = page.removeprefix(_AT) if page.startswith(_AT) else f"docs/{page}"

    def link(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        name, _, anchor = target.partition("#")
        inside = _ABSOLUTE.sub("", name)
        if not name or re.match(r"[a-z]+:", inside):
            return found[0]
        folder = posixpath.dirname(at) if inside == name else ""
        wanted = posixpath.normpath(posixpath.join(folder, inside))
        goal = next((place for place in _places(wanted) if place in known), "")
        if goal:
            way = posixpath.relpath(goal, posixpath.dirname(page) or ".")
            return f"{mark}[{label}]({way}{'#' + anchor if anchor else ''})"
        if not (ROOT / wanted).exists():
            raise PluginError(f"{at}: broken link to {target!r}: {wanted!r} does not exist.")
        return label

    parts = _outside_fences(markdown)
    return "".join(text if is_code else _LINK.sub(link, text) for text, is_code in parts)


def _places(wanted: str) -> Iterator[str]:
    """Yield the possible site paths of a repository file, the preferred path first."""
    if wanted.startswith("docs/"):
        inside = wanted.removeprefix("docs/")
        yield from (inside.removesuffix(".ipynb") + ".md",) if inside.endswith(".ipynb") else (inside,)
    if wanted.endswith(".py"):
        yield f"api/{wanted.removesuffix('.py')}.md"
    yield _on_site(wanted)


def _outside_fences(markdown: str) -> Iterator[tuple[str, bool]]:
    start = 0
    for fence in _FENCE.finditer(markdown):
        yield markdown[start : fence.start()], False
        yield fence[0], True
        start = fence.end()
    yield markdown[start:], False
