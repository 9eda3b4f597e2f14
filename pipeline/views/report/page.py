"""The page of a report as plain data, and its two renderings: one self-contained HTML file, and Markdown.

The page asks for nothing from outside. Pictures, style and text are all in it, and everything is escaped.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lsmix.data.errors import format_bytes, format_duration, printable_lines
from lsmix.pipeline.views.dataset_card.markup import markdown
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.render import html_templates

__all__ = [
    "Fact",
    "PoolFacts",
    "ProvenanceRow",
    "ReportFigure",
    "ReportPage",
    "Section",
    "Table",
    "budget_table",
    "error_table",
    "pool_table",
    "render_html",
    "render_markdown",
]

Media: TypeAlias = Literal["image/png", "image/svg+xml"]
_TEMPLATE = "report.html.j2"
_SUFFIX = {"image/png": ".png", "image/svg+xml": ".svg"}
_LONG_CELL = 40  # characters, beyond which a column may wrap; shorter ones stay on one line
_LONG_TABLE = 6  # runs, beyond which the best three are stressed
_INDICES_SHOWN = 12  # of failed decodes in a table; the pool itself lists them all


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""  # a few words under the number


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are text; columns that hold numbers only are set to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # each as long as columns
    note: str = ""  # shown below it
    best: tuple[int, ...] = ()  # indices of the rows to stress

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each column holds: "number", to be set to the right; "long", to be wrapped; or "", words."""
        return tuple(_kind([row[column] for row in self.rows]) for column in range(len(self.columns)))


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A picture with its words."""

    name: str  # its file's name without suffix, unique on the page
    data: bytes
    media: Media
    alt: str  # what it shows, for those who don't see it
    caption: str = ""
    pixelated: bool = False  # whether enlarging it must keep its pixels sharp
    density: float = 1.0  # pixels of a PNG to one of the page, at least 1

    @property
    def file_name(self) -> str:
        """Name of the picture as a file of its own."""
        return self.name + _SUFFIX[self.media]

    @property
    def uri(self) -> str:
        """The picture as a data: URI."""
        return f"data:{self.media};base64,{base64.b64encode(self.data).decode()}"

    @property
    def width(self) -> int | None:
        """Width of a PNG on the page, in CSS pixels; None for SVG, which fills its column."""
        # Bytes 16 to 20 of a PNG are its width: the IHDR chunk always comes first.
        return round(int.from_bytes(self.data[16:20], "big") / self.density) if self.media == "image/png" else None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter of the page: words, then tables, then pictures."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[ReportFigure, ...] = ()

    @property
    def anchor(self) -> str:
        """Target of links to the section."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


@dataclass(frozen=True, kw_only=True)
class ProvenanceRow:
    """Where one artifact came from."""

    stage: str
    name: str
    key: str  # 12 hex digits
    root: str  # root digest of the payload, hex
    inputs: tuple[str, ...] = ()  # such as "dataset 9f2c41d07be3"
    seconds: float = 0.0
    bytes: int = 0
    device: str = ""
    versions: str = ""  # such as "torch 2.13.0, numpy 2.4.6"


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """All that a report says."""

    title: str
    summary: str = ""  # a sentence or two below the title
    facts: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    provenance: tuple[ProvenanceRow, ...] = ()
    recipe: str = ""  # its text, as TOML
    recipe_name: str = ""
    made_by: str = ""  # such as "lsmix 0.1.0"

    @property
    def figures(self) -> tuple[ReportFigure, ...]:
        """All pictures of the page, in order."""
        return tuple(figure for section in self.sections for figure in section.figures)


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """What became of the images of one pool."""

    name: str
    method: str
    images: int
    redrawn: int
    replaced: int
    decode_failed: Sequence[int] = ()  # rows of the pool that were redrawn or replaced

    @property
    def ok(self) -> int:
        """Number of images that were good at the first draw."""
        return self.images - self.redrawn - self.replaced


def error_table(runs: Sequence[RunSummary], *, title: str = "Error rates", note: str = "") -> Table:
    """Return the table of error rates in the recipe's order, with the paper's figures beside ours where there are some.

    The lowest mean is stressed, in long tables the best three, as in the paper's Table 1. With a baseline among the runs
    columns say by how many points each mean differs from it, ours and the paper's.
    """
    baseline = next((run for run in runs if run.baseline and run.errors), None)
    papers = any(run.paper for run in runs)
    columns = ["run", "error rate, %", *(["paper, %"] if papers else [])]
    if baseline:
        columns += ["against baseline", *(["paper's"] if papers and baseline.paper_mean is not None else [])]
    rows = []
    for run in runs:
        cells = [run.label, run.text, *([run.paper or "–"] if papers else [])]
        if baseline:
            cells.append("–" if run is baseline or not run.errors else _difference(run.mean - baseline.mean))
        if baseline and papers and baseline.paper_mean is not None:
            known = run is not baseline and run.paper_mean is not None
            cells.append(_difference((run.paper_mean or 0.0) - baseline.paper_mean) if known else "–")
        cells += [str(len(run.errors)), ", ".join(f"{error:.2f}" for error in run.errors) or "–"]
        rows.append(tuple(cells))
    done = sorted((index for index, run in enumerate(runs) if run.errors), key=lambda index: runs[index].mean)
    return Table(
        title=title,
        columns=(*columns, "seeds", "of each seed, %"),
        rows=tuple(rows),
        note=f"Last epoch, test images; mean ± sample standard deviation over seeds. {note}".strip(),
        best=tuple(done[: 3 if len(runs) > _LONG_TABLE else 1]) if len(done) > 1 else (),
    )


def _difference(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


def budget_table(runs: Sequence[RunSummary], *, title: str = "Budget of each seed") -> Table:
    """Return the table of what each run was given: images, updates, and how often it saw each image of its sources."""
    rows = []
    for run in runs:
        seen = "; ".join(f"{one.source}: {one.images:,} images, {one.times:g}× each" for one in run.seen)
        rows.append((run.label, f"{run.images:,}", f"{run.updates:,}", seen or "–"))
    budgets = {(run.images, run.updates) for run in runs}
    return Table(
        title=title,
        columns=("run", "images", "updates", "seen, on average"),
        rows=tuple(rows),
        note="The same for all runs." if len(budgets) == 1 else "Not the same for all runs: no fair comparison.",
    )


def pool_table(pools: Sequence[PoolFacts], *, title: str = "Pools", note: str = "") -> Table:
    """Return the table of pools with their counts and the first rows that failed to decode."""
    rows = []
    for pool in pools:
        shown = ", ".join(str(row) for row in pool.decode_failed[:_INDICES_SHOWN]) or "none"
        more = len(pool.decode_failed) - _INDICES_SHOWN
        counts = (f"{count:,}" for count in (pool.images, pool.ok, pool.redrawn, pool.replaced))
        rows.append((pool.name, pool.method, *counts, f"{shown} … and {more:,} more" if more > 0 else shown))
    return Table(
        title=title,
        columns=("pool", "method", "images", "ok", "redrawn", "replaced", "failed to decode at first, rows"),
        rows=tuple(rows),
        note=note or "Redrawn: failed, then good with another draw. Replaced: never good, the first image stands in.",
    )


def render_html(page: ReportPage) -> str:
    """Return the page as one HTML file that needs nothing beside it."""
    environment = html_templates(Path(__file__).parent)
    environment.filters |= {"format_bytes": format_bytes, "format_duration": format_duration}
    return environment.get_template(_TEMPLATE).render(page=page)


def render_markdown(page: ReportPage, *, figure_folder: str = "figures") -> str:
    """Return the page as Markdown, with pictures as links to ``<figure_folder>/<file_name>``."""
    parts = [f"# {markdown(page.title)}", markdown(page.summary)]
    parts.append("\n".join(f"- {markdown(f'{f.label}: {f.value}{_note(f)}')}" for f in page.facts))
    parts += [f"> **Warning:** {markdown(warning)}" for warning in page.warnings]
    for section in page.sections:
        parts += [f"## {markdown(section.title)}", markdown(section.text)]
        parts += [_markdown_table(table) for table in section.tables]
        for figure in section.figures:
            parts.append(f"![{markdown(figure.alt)}]({figure_folder}/{figure.file_name})")
            parts.append(f"*{markdown(figure.caption)}*" if figure.caption else "")
    if page.provenance:
        parts += ["## Provenance", _markdown_table(_provenance_table(page.provenance))]
    if page.recipe:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", page.recipe)), default=0))
        parts += ["## Recipe", f"{fence}toml\n{printable_lines(page.recipe.rstrip())}\n{fence}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _note(fact: Fact) -> str:
    return f" ({fact.note})" if fact.note else ""


def _provenance_table(rows: Sequence[ProvenanceRow]) -> Table:
    return Table(
        title="",
        columns=("stage", "name", "key", "root digest", "inputs", "time", "size", "made with"),
        rows=tuple(
            (
                row.stage,
                row.name,
                row.key,
                row.root[:12],
                ", ".join(row.inputs),
                format_duration(row.seconds),
                format_bytes(row.bytes),
                "; ".join(part for part in (row.device, row.versions) if part),
            )
            for row in rows
        ),
    )


def _markdown_table(table: Table) -> str:
    lines = [f"### {markdown(table.title)}\n"] if table.title else []
    lines.append("| " + " | ".join(markdown(column) for column in table.columns) + " |")
    lines.append("|" + "|".join("--:" if kind == "number" else "---" for kind in table.kinds) + "|")
    for index, row in enumerate(table.rows):
        cells = [markdown(cell) for cell in row]
        if index in table.best:
            cells[:2] = [f"**{cell}**" for cell in cells[:2]]
        lines.append("| " + " | ".join(cells) + " |")
    if table.note:
        lines.append(f"\n{markdown(table.note)}")
    return "\n".join(lines)


def _kind(cells: Sequence[str]) -> str:
    if cells and all(_is_number(cell) for cell in cells):
        return "number"
    return "long" if max(map(len, cells), default=0) > _LONG_CELL else ""


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"(–|[+−-]?[\d.,]+( ?%| ± [\d.]+| [kMGT]?B| s)?)", cell) is not None
