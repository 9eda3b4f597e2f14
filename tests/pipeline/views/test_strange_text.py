"""Unprintable characters in text that comes with data are shown as escape sequences in every human-readable output."""

import json
import unicodedata
import zipfile
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from factory import invented_plan, reseal

from lsmix.data.errors import SourceError, printable_lines, printable_words
from lsmix.data.exports.format import EXPORT_FORMATS
from lsmix.data.readers.registry import SourceConfig, read_source
from lsmix.pipeline.api import export_pool
from lsmix.pipeline.config.results import Interval
from lsmix.pipeline.views.dataset_card.card import write_card
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.page import Fact, Figure, Page, Section, Table, render_page
from lsmix.pipeline.views.plots import Series, curves, distance_plot, error_rate_plot, pair_matrix, spread_plot
from lsmix.pipeline.views.pool_page import render_pool_page
from lsmix.pipeline.views.report.results import error_table

CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
BIDI = "".join(
    map(chr, [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0x2028, 0x2029])
)
SURROGATES = "\ud800 \udfff"  # can come from the command line or from Python, but not from lsmix files
NAMES = (
    "cat",
    "",
    " \t\n ",
    "cat",
    f"a{CONTROLS}z",
    f"b{BIDI}z",
    "| `c` ``` <d> *e* [f](g)",
    "---\n# h",
    "🦊 ë",
    "\x0b",
)
STRANGE = "".join(NAMES) + SURROGATES
COUNTS = np.arange(40) / 40


def check(text):
    """Fail if the text contains an unprintable character other than a newline."""
    odd = {letter for letter in text if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}
    assert not odd, sorted(map(hex, map(ord, odd)))


@pytest.fixture
def pool(invented_pool):
    """Return a pool with strange class names, licence and citation, and with the plan that a card needs."""
    folder = invented_pool(class_names=NAMES)
    path = folder / "pool.zarr" / "zarr.json"
    group = json.loads(path.read_bytes())
    group["attributes"]["origin"] |= {
        "config": {CONTROLS[1:]: BIDI},
        "licence": "".join(NAMES),
        "citation": "".join(NAMES),
    }
    path.write_text(json.dumps(group))
    (folder / "plan.json").write_bytes(invented_plan(group["attributes"]["origin"]))
    reseal(folder)
    return folder


@pytest.mark.parametrize("form", ["pool", *EXPORT_FORMATS.names()])
def test_the_cards_of_a_pool_and_of_its_exports_are_printable(pool, tmp_path, form):
    if form == "pool":
        write_card(pool, tmp_path / "out", creator=STRANGE)
    else:
        export_pool(pool, tmp_path / "out", format=form)
    for name in ("README.md", "LICENSES/images.txt", "samples.csv"):
        check((tmp_path / "out" / name).read_text(encoding="utf-8"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    table = [line for line in text.split("\n") if line.startswith("| ")]
    for label, name in enumerate(NAMES):
        shown = printable_words(name).translate({ord("\\"): "\\\\"}) if "|" not in name and "#" not in name else ""
        assert any(line.startswith(f"| {label} | {shown}") for line in table), label


def test_the_output_of_show_is_printable(pool, tmp_path, command):
    check(render_pool_page(pool)[0])
    for options in ((), ("--json",)):
        shown = command("show", pool, "--image", tmp_path / "sheet.png", *options)
        assert shown.code == 0
        check(shown.out + shown.err)


def test_plots_with_strange_labels_are_valid_xml():
    interval = Interval(value=0.25, low=0.0, high=0.5)
    names = [*dict.fromkeys((*NAMES, STRANGE, CONTROLS, BIDI))]
    plots = [
        error_rate_plot([RunSummary(label=name, errors=(5.1, 4.9), paper=name) for name in names]),
        curves(STRANGE, [Series(label=name, x=[0, 1], y=[1.0, 2.0]) for name in names], "x", "y"),
        spread_plot(dict.fromkeys(names, COUNTS), "bits"),
        distance_plot(dict.fromkeys(names, (interval, interval)), "bits"),
        pair_matrix(np.ones((len(names), len(names))), names),
    ]
    for svg in plots:
        check(svg.decode())
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_reports_with_strange_text_are_printable():
    runs = [RunSummary(label=STRANGE, errors=(5.1, 4.9), paper=STRANGE)]
    figure = Figure(name="f", data=error_rate_plot(runs), alt=STRANGE, caption=STRANGE)
    table = Table(title=STRANGE, columns=(STRANGE,), rows=((STRANGE,),), note=STRANGE)
    page = Page(
        title=STRANGE,
        summary=STRANGE,
        facts=(Fact(label=STRANGE, value=STRANGE, note=STRANGE),),
        warnings=(STRANGE,),
        sections=(
            Section(title=STRANGE, text=STRANGE, items=(error_table(runs), table, figure)),
            Section(title=STRANGE, code=STRANGE, folded=True),
        ),
        made_by=STRANGE,
    )
    text = render_page(page)
    check(text)
    text.encode()


def test_newlines_are_kept_and_all_other_unprintable_characters_are_escaped():
    assert printable_lines(f"a\nb{CONTROLS}").count("\n") == 2
    check(printable_lines(STRANGE))
    assert printable_lines("ë 🦊") == "ë 🦊"


def test_class_names_with_invalid_code_points_are_rejected(tmp_path):
    path = tmp_path / "set.npz"
    names = np.array(["aa", "bb"])
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.array([0, 1, 0, 1]), class_names=names)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for number in (b"\xff\xff\xff\xff", b"\x00\x00\x11\x00"):
        members["class_names.npy"] = members["class_names.npy"][:-4] + number
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(SourceError, match="is damaged: it contains an invalid character"):
            read_source(SourceConfig(path=str(path)))
