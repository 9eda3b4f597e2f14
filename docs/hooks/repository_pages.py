"""MkDocs hook: pages that lie outside docs/, and links as they are written for a reader of the repository.

A link works in both places or the build fails. A page of the repository becomes one of the site, a picture
is copied, a module leads to its page of the API, and any other file of the repository is named without a link.
The README's links are absolute, so that they work on a package index; here they are as those of other pages.
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
_AT: Final = "repository/"  # where the pages from outside docs/ are on the site
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
    # MkDocs takes README.md for a folder's index, and the theme an index for its section's title.
    return _AT + name.replace("README.md", "readme.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from outside docs/."""
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
    """Give links their targets on the site, and fences that name a file a title."""
    if page.file.src_uri.startswith("api/") and page.file.src_uri != "api/index.md":
        return markdown
    return _NAMED_FENCE.sub(r'```\1 title="\2"', rewritten(markdown, page.file.src_uri, set(files.src_uris)))


def rewritten(markdown: str, page: str, known: set[str]) -> str:
    """Return a page's text with its links as the site has them.

    Args:
        markdown: the text.
        page: where the page is on the site.
        known: all files of the site.

    Raises:
        PluginError: a link leads to nothing, on the site or in the repository.
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
            raise PluginError(f"{at}: the link to {target!r} leads to nothing: there is no {wanted!r}.")
        return label

    parts = _outside_fences(markdown)
    return "".join(text if is_code else _LINK.sub(link, text) for text, is_code in parts)


def _places(wanted: str) -> Iterator[str]:
    """Give where a file of the repository may be on the site, the best first."""
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
