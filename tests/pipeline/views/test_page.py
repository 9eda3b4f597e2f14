"""Pages contain everything they are given, escape it, and load nothing from outside."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lsmix.data.errors import format_bytes, format_duration
from lsmix.pipeline.config.results import Seen
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.images import image_grid, png_bytes
from lsmix.pipeline.views.page import Fact, Figure, Page, Section, Table, render_page
from lsmix.pipeline.views.plots import error_rate_plot
from lsmix.pipeline.views.report.results import budget_table, error_table

RUNS = [
    RunSummary(label="baseline", errors=(5.1, 4.9), baseline=True),
    RunSummary(label="LS-Mix", errors=(4.01, 4.13, 3.92)),
    RunSummary(label="Bern-Mix", errors=()),
]
VOID = {"img", "meta", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Parser that collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, document):
        super().__init__()
        self.open = []
        self.tags = []
        self.words = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def whole_page(text="plain"):
    """Return a page with ``text`` in every text field."""
    svg = Figure(name="rates", data=error_rate_plot(RUNS), alt=f"alt {text}", caption=text)
    png = Figure(name="mixes", data=png_bytes(image_grid([[np.zeros((4, 4, 3), np.uint8)]], scale=5)), alt="mixes")
    table = Table(title=text, columns=("a", text), rows=((text, "1.5"), ("b", "2")), note=text, best=(1,))
    return Page(
        title=text,
        summary=text,
        facts=(Fact(label=text, value=text, note=text),),
        warnings=(text,),
        sections=(
            Section(title=text, code=text, folded=True),
            Section(title="Error rates", text=text, items=(error_table(RUNS), table, svg, png)),
            Section(title="left out", text="left out"),
        ),
        made_by=text,
    )


def test_the_page_is_well_formed_and_loads_nothing_from_outside():
    document = render_page(whole_page())
    page = Reader(document)
    assert not re.search(
        r"https?://|//[a-z]|url\(|@import|<script|<link|<iframe", document.replace("base64,", ""), re.I
    )
    assert all(image["src"].startswith("data:image/") for image in page.of("img"))
    assert all(link["href"].startswith("#") for link in page.of("a"))
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_every_figure_has_alternative_text_and_a_file_name():
    page = Reader(render_page(whole_page()))
    images = page.of("img")
    assert [image["alt"] for image in images] == ["alt plain", "mixes"]
    assert [image["src"] for image in images] == [figure.uri for figure in whole_page().figures]
    assert [figure.file_name for figure in whole_page().figures] == ["rates.svg", "mixes.png"]
    assert images[1]["width"] == "10"  # 4 pixels × scale 5, at 2 image pixels per CSS pixel


def test_folded_sections_follow_open_sections_and_empty_sections_are_omitted():
    document = render_page(whole_page())
    assert "left out" not in document
    assert document.index("Error rates") < document.index("<details") < document.index("<pre>")


def test_every_table_cell_names_its_column_for_narrow_screens():
    cells = Reader(render_page(whole_page())).of("td")
    assert [cell["data-label"] for cell in cells[:5]] == list(error_table(RUNS).columns)


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "{{ 7*7 }} &lt; 'x'", "</style>"]
)
def test_text_is_shown_verbatim_and_never_parsed_as_html(text):
    page, plain = Reader(render_page(whole_page(text))), Reader(render_page(whole_page()))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert sum(words.count(text) for words in page.words) >= 12
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]


def test_an_empty_page_renders():
    document = render_page(Page(title="Nothing yet"))
    assert "Nothing yet" in Reader(document).words


def test_both_themes_and_narrow_screens_are_supported():
    document = render_page(whole_page())
    assert "prefers-color-scheme: dark" in document
    assert "width=device-width" in document


def test_the_same_page_gives_the_same_bytes():
    assert render_page(whole_page()) == render_page(whole_page())


def test_the_table_shows_the_results_of_the_paper_next_to_the_measured_ones():
    runs = [
        RunSummary(label="baseline", errors=(5.1, 4.9), baseline=True, paper="3.61 ± 0.102"),
        RunSummary(label="LS-Mix", errors=(4.0,), paper="2.45 ± 0.061"),
        RunSummary(label="not in the paper", errors=(4.5,)),
        RunSummary(label="not run", errors=(), paper="2.61"),
    ]
    table = error_table(runs)
    assert table.columns[:5] == ("run", "error rate, %", "paper, %", "difference from baseline", "paper's difference")
    assert [row[:5] for row in table.rows] == [
        ("baseline", "5.00 ± 0.14", "3.61 ± 0.102", "–", "–"),
        ("LS-Mix", "4.00", "2.45 ± 0.061", "−1.00", "−1.16"),
        ("not in the paper", "4.50", "–", "−0.50", "–"),
        ("not run", "–", "2.61", "–", "−1.00"),
    ]
    assert b"open diamonds: paper" in error_rate_plot(runs)


def test_a_long_table_highlights_the_best_three_like_table_1_of_the_paper():
    runs = [RunSummary(label=str(error), errors=(error,)) for error in (5.0, 4.0, 7.0, 3.0, 6.0, 8.0, 2.0)]
    assert error_table(runs).best == (6, 3, 1)
    assert error_table(runs[:6]).best == (3,)


def test_the_budget_table_shows_how_often_images_were_seen():
    seen = (Seen(source="pool p", images=1000, times=3.0), Seen(source="training images", images=500, times=1.5))
    runs = [
        RunSummary(label="a", errors=(5.0,), images=3750, updates=60, seen=seen),
        RunSummary(label="b", errors=(5.0,), images=3750, updates=60),
    ]
    table = budget_table(runs)
    seen_text = "pool p: 1,000 images, 3× each; training images: 500 images, 1.5× each"
    assert table.rows == (("a", "3,750", "60", seen_text), ("b", "3,750", "60", "–"))
    assert table.note == "All runs have the same budget."
    assert "not fair" in budget_table([*runs, RunSummary(label="c", errors=(), images=1)]).note


def test_the_table_of_error_rates_highlights_the_lowest_and_compares_with_the_baseline():
    table = error_table(RUNS)
    assert table.rows == (
        ("baseline", "5.00 ± 0.14", "–", "2", "5.10, 4.90"),
        ("LS-Mix", "4.02 ± 0.11", "−0.98", "3", "4.01, 4.13, 3.92"),
        ("Bern-Mix", "–", "–", "0", "–"),
    )
    assert table.best == (1,)
    assert table.kinds == ("", "number", "number", "number", "")
    alone = error_table(RUNS[1:])
    assert alone.best == ()
    assert "difference from baseline" not in alone.columns


def test_sizes_and_durations_switch_to_the_next_unit_after_rounding():
    assert [format_bytes(n) for n in (0, 999, 1000, 999_949, 999_950, 2 * 10**9, 5 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "2.0 GB", "5.0 TB"
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 59.94, 59.96, 3599.4, 3599.6)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
    ]
