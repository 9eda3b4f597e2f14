"""A page as plain data, and its rendering as one HTML file that loads nothing else.

Pictures, style and text are all in the file. Every text is escaped for HTML, and characters that do not print are
shown as their escapes.
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

_LONG_CELL = 28  # characters, from which a column may wrap; shorter cells stay on one line
_PNG = b"\x89PNG"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""  # a few words under the number


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are text; columns of numbers are aligned to the right."""

    title: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # each as long as columns
    note: str = ""  # shown below it
    best: tuple[int, ...] = ()  # indices of the rows to highlight

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each column holds: "number", "long" for text that may wrap, or ""."""
        return tuple(_kind([row[column] for row in self.rows]) for column in range(len(self.columns)))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its caption."""

    name: str  # its file's name without suffix, unique on the page
    data: bytes  # PNG or SVG
    alt: str  # what it shows, for readers who cannot see it
    caption: str = ""
    density: int = 2  # pixels of a PNG for each CSS pixel of the page

    @property
    def file_name(self) -> str:
        """Name of the picture as a file of its own."""
        return f"{self.name}.png" if self.data.startswith(_PNG) else f"{self.name}.svg"

    @property
    def uri(self) -> str:
        """The picture as a data: URI."""
        media = "image/png" if self.data.startswith(_PNG) else "image/svg+xml"
        return f"data:{media};base64,{base64.b64encode(self.data).decode()}"

    @property
    def width(self) -> int | None:
        """Width of a PNG on the page, in CSS pixels; None for SVG, which fills its column."""
        # Bytes 16 to 20 of a PNG are its width: the IHDR chunk always comes first.
        return int.from_bytes(self.data[16:20], "big") // self.density if self.data.startswith(_PNG) else None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: text, then tables and pictures in their order. Folded parts come after the open ones."""

    title: str
    text: str = ""
    items: Sequence[Table | Figure] = ()
    code: str = ""  # shown as it is, in a fixed-width font
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page. Sections without items or code are left out."""

    title: str
    summary: str = ""
    facts: Sequence[Fact] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    made_by: str = ""  # such as "lsmix 0.1.0"

    @property
    def figures(self) -> list[Figure]:
        """All pictures of the page, in order."""
        return [item for section in self.sections for item in section.items if isinstance(item, Figure)]


def render_page(page: Page, template: str = "page.html.j2", **values: Any) -> str:
    """Return a page as HTML; ``values`` are further names for a template that extends the common one."""
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
