"""HTML pages described as plain data, and rendered as one self-contained file.

Images, styles and text are embedded; the file loads nothing else. All text is escaped for HTML, and unprintable
characters are shown as escape sequences.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lsmix.data.errors import printable_lines

__all__ = ["Fact", "Figure", "Page", "Section", "Table", "render_page"]

_LONG_CELL = 28  # characters; a column with a longer cell may wrap
_PNG = b"\x89PNG"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A headline number at the top of the page."""

    label: str
    value: str
    note: str = ""  # a few words under the number


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; numeric columns are right-aligned."""

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # one cell per column
    note: str = ""  # shown below the table
    best: tuple[int, ...] = ()  # indices of the rows to highlight

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each column: "number", "long" for text that may wrap, or ""."""
        return tuple(_kind([row[column] for row in self.rows]) for column in range(len(self.columns)))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An image with its caption."""

    name: str  # file name without suffix, unique on the page
    data: bytes  # PNG or SVG
    alt: str  # alternative text for screen readers
    caption: str = ""
    density: int = 2  # PNG pixels per CSS pixel

    @property
    def file_name(self) -> str:
        """The file name of the image, with suffix."""
        return f"{self.name}.png" if self.data.startswith(_PNG) else f"{self.name}.svg"

    @property
    def uri(self) -> str:
        """The image as a data: URI."""
        media = "image/png" if self.data.startswith(_PNG) else "image/svg+xml"
        return f"data:{media};base64,{base64.b64encode(self.data).decode()}"

    @property
    def width(self) -> int | None:
        """The width of a PNG on the page, in CSS pixels; None for SVG, which fills its column."""
        # The IHDR chunk always comes first, so bytes 16 to 20 of a PNG are its width.
        return int.from_bytes(self.data[16:20], "big") // self.density if self.data.startswith(_PNG) else None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page: text, then tables and figures in order. Folded sections follow all open ones."""

    title: str
    text: str = ""
    items: Sequence[Table | Figure] = ()
    code: str = ""  # shown verbatim in a fixed-width font
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page. Sections without items or code are omitted."""

    title: str
    summary: str = ""
    facts: Sequence[Fact] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    made_by: str = ""  # such as "lsmix 0.1.0"

    @property
    def figures(self) -> list[Figure]:
        """All figures of the page, in order."""
        return [item for section in self.sections for item in section.items if isinstance(item, Figure)]


def render_page(page: Page, template: str = "page.html.j2", **values: Any) -> str:
    """Return a page as HTML; ``values`` are extra variables for templates that extend ``page.html.j2``."""
    return _templates().get_template(template).render(page=page, **values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_digest"] = _csp_digest
    return environment


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _csp_digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _kind(cells: Sequence[str]) -> str:
    if cells and all(re.fullmatch(r"(–|[+−-]?[\d.,]+( ?%| ± [\d.]+| [kMGT]?B| s)?)", cell) for cell in cells):
        return "number"
    return "long" if max(map(len, cells), default=0) > _LONG_CELL else ""
