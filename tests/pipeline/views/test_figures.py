"""The paper's figures and the command that draws them, tested with the flow and digits of the tiny recipe."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lsmix.classifiers.pixel_mixing import mix_images
from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.latents import Latents, open_latents
from lsmix.data.mixing import LATENT_METHODS
from lsmix.data.pool_spec import PoolConfig
from lsmix.glow.checkpoint import load_flow
from lsmix.glow.flow import Flow
from lsmix.glow.latent_mixing import is_failed_decode, mix_latents, zero_fill
from lsmix.pipeline.views.figures import FIGURES, choose_figure_pairs, draw_figure, figure_png

DOCS = Path(__file__).resolve().parents[3] / "docs"
RATES = [2, 5, 7, 9, 11, 14]  # sixteenths, of [P Fig. 4]


class Opened(NamedTuple):
    """The inputs of the figures."""

    flow: Flow
    latents: Latents
    dataset: DataSet

    def draw(self, name, pairs=3, seed=0, methods=()):
        return draw_figure(name, *self, pairs=pairs, seed=seed, methods=methods)

    def chosen(self, pairs=3, seed=0):
        chosen = choose_figure_pairs(self.dataset.train.labels, pairs, seed)
        return [first for first, _ in chosen], [second for _, second in chosen]

    def decoded(self, z):
        return self.flow.decode(z)


@pytest.fixture(scope="module")
def opened(finished_workspace):
    (ingest,), (flow,), (latents,) = (
        list((finished_workspace / stage).glob("tiny-*")) for stage in ("ingest", "train-glow", "encode")
    )
    return Opened(load_flow(flow), open_latents(latents), open_dataset(ingest))


def column(sheet, place):
    images = [row[place] for row in sheet.rows]
    return np.stack([image for image in images if image is not None])


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_deterministic_and_complete(opened, name):
    sheet = opened.draw(name)
    data = figure_png(sheet)
    assert data == figure_png(opened.draw(name))
    assert data != figure_png(opened.draw(name, seed=1))
    assert {len(row) for row in sheet.rows} == {len(sheet.column_titles)}
    assert len(sheet.row_titles) in (0, len(sheet.rows))
    assert "of the paper" in sheet.caption
    assert sheet.alt
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.height > 8 * len(sheet.rows)


def test_the_columns_of_figure_1_match_their_titles(opened):
    sheet = opened.draw("fig1")
    first, second = opened.chosen()
    images, z = opened.dataset.train.images, opened.latents.z
    assert sheet.column_titles == ["x₁", "x₂", "MixUp", "CutMix", "LS-Mix"]
    expected = [
        images[first],
        images[second],
        mix_images("mixup", images[first], images[second], 0.5, seed=0)[0],
        mix_images("cutmix", images[first], images[second], 0.5, seed=0)[0],
        opened.decoded(mix_latents("ls-mix", z.gather(first), z.gather(second), 0.5)[0]),
    ]
    for place, wanted in enumerate(expected):
        np.testing.assert_array_equal(column(sheet, place), wanted, sheet.column_titles[place])
    assert sheet.decoded == 3


def test_figure_3_starts_with_the_image_and_ends_with_only_its_first_cell_unchanged(opened):
    sheet = opened.draw("fig3")
    assert sheet.column_titles == ["x", *(f"{n}/12" for n in range(1, 12))]
    assert sheet.decoded == 3 * 11
    first, _ = opened.chosen()
    np.testing.assert_array_equal(column(sheet, 0), opened.dataset.train.images[first])
    nothing = opened.decoded(np.zeros((1, opened.flow.dim), np.float32))
    z = opened.latents.z.gather(first)
    np.testing.assert_array_equal(column(sheet, 11), opened.decoded(zero_fill(z, 64 * 11 // 12)))
    # The remaining twelfth, 5 of 64 components, belongs to the first of 2×2 cells; the rest shows the all-zero latent.
    change = np.abs(column(sheet, 11).astype(int) - nothing)[..., 0]
    assert change[:, :4, :4].mean() > 2 * change[:, 4:, 4:].mean()


@pytest.mark.parametrize(
    ("name", "methods", "pairs"),
    [
        ("fig4", ["ls-mix"], 3),
        ("fig7", ["swap-mix", "reverse-mix"], 3),
        ("appendix-e", ["ls-mix", "linear", "bern-mix", "swap-mix", "reverse-mix"], 2),  # half of 3, rounded up
    ],
)
def test_an_interpolation_goes_from_one_source_to_the_other_by_each_method(opened, name, methods, pairs):
    sheet = opened.draw(name)
    assert sheet.column_titles == ["x₁", *(f"λ={n}/16" for n in RATES), "x₂"]
    assert len(sheet.rows) == pairs * len(methods)
    assert sheet.decoded == pairs * len(methods) * 6
    first, second = (rows[:pairs] for rows in opened.chosen())
    images, z = opened.dataset.train.images, opened.latents.z
    np.testing.assert_array_equal(column(sheet, 0), np.concatenate([images[first]] * len(methods)))
    np.testing.assert_array_equal(column(sheet, 7), np.concatenate([images[second]] * len(methods)))
    decode_failed = 0
    for place, n in enumerate(RATES):
        mixed = np.concatenate(
            [mix_latents(method, z.gather(first), z.gather(second), n / 16)[0] for method in methods]
        )
        np.testing.assert_array_equal(column(sheet, place + 1), opened.decoded(mixed))
        failed = opened.flow.decode(
            mixed,
            validate=lambda y: is_failed_decode(
                y, tolerance=PoolConfig().tolerance, bad_pixel_fraction=PoolConfig().bad_pixel_fraction
            ),
        )[1]
        decode_failed += int(failed.sum())
    assert sheet.decode_failed == decode_failed
    titled = [title for title in sheet.row_titles if title]
    assert [title.lower() for title in titled] == (methods if len(methods) > 1 else [])
    assert sheet.row_titles[::pairs] == titled


def test_appendix_e_shows_methods_of_other_packages_only_on_request(opened, monkeypatch):
    other = "lsmix.glow.latent_mixing:linear"  # stands for an entry point of another package
    monkeypatch.setattr(LATENT_METHODS, "_external", lambda: {"from-elsewhere": other})
    own = ["LS-Mix", "Linear", "Bern-Mix", "Swap-Mix", "Reverse-Mix"]
    assert opened.draw("appendix-e", pairs=1).row_titles == own  # reports must not depend on the installed packages
    sheet = opened.draw("appendix-e", pairs=1, methods=LATENT_METHODS.names())
    assert sheet.row_titles == [*own, "from-elsewhere"]
    for linear, elsewhere in zip(sheet.rows[1], sheet.rows[5], strict=True):
        assert linear is not None
        np.testing.assert_array_equal(linear, elsewhere)


def test_failed_decodes_are_counted_and_shown(opened, monkeypatch):
    def explode(z1, z2, lam, draws):
        return z1 * 1e30, lam

    monkeypatch.setattr(LATENT_METHODS, "load", lambda name: explode)
    sheet = opened.draw("fig4")
    assert sheet.decode_failed == sheet.decoded == 18
    assert figure_png(sheet)


@given(labels=st.lists(st.integers(0, 3), max_size=30), count=st.integers(1, 8), seed=st.integers(0, 5))
def test_pairs_are_disjoint_and_of_two_classes_if_possible(labels, count, seed):
    array = np.array(labels, np.int64)
    pairs = choose_figure_pairs(array, count, seed)
    assert pairs == choose_figure_pairs(array, count, seed)
    assert len(pairs) == min(count, len(labels) // 2)
    rows = [row for pair in pairs for row in pair]
    assert len(set(rows)) == len(rows)
    for number, (first, second) in enumerate(pairs):
        if labels[first] == labels[second]:  # then all remaining rows have this class
            left = set(range(len(labels))) - {row for pair in pairs[:number] for row in pair}
            assert len({labels[row] for row in left}) == 1


# The command.


def test_the_command_draws_from_finished_artifacts(finished_workspace, tiny_recipe, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("figure", "fig4", tiny_recipe, "--workspace", finished_workspace, "--device", "cpu", "--rows", "2")
    assert result.code == 0, result.err
    assert "up to date" in result.err
    assert "Fig. 4 of the paper" in result.out
    assert "of 12 images failed to decode" in result.out
    (written,) = tmp_path.iterdir()
    assert written.name == "fig4.png"
    again = command(
        "figure", "fig4", tiny_recipe, "--workspace", finished_workspace, "--device", "cpu", "--rows", "2",
        "--out", "other.png", "--json", "-q",
    )  # fmt: skip
    assert not again.err
    document = json.loads(again.out)
    assert document["schema"] == "lsmix/figure/1"
    documented = next(line for line in (DOCS / "cli.md").read_text().splitlines() if "`lsmix/figure/1`" in line)
    assert all(f"`{name}`" in documented for name in document["content"])
    assert (tmp_path / document["content"]["path"]).read_bytes() == written.read_bytes()


def test_the_command_builds_only_the_artifacts_that_a_figure_needs(tiny_recipe, tmp_path, command):
    small = ["--set", "flow.training.iterations=2", "--set", "data.limit=150", "--device", "cpu", "-q"]
    target, workspace = tmp_path / "sheet.png", tmp_path / "runs"
    result = command("figure", "fig1", tiny_recipe, "--workspace", workspace, "--out", target, *small)
    assert result.code == 0, result.err
    assert {path.name for path in workspace.iterdir() if path.is_dir()} >= {"ingest", "train-glow", "encode"}
    assert not list(workspace.glob("mix/*"))
    assert target.is_file()


def test_a_dry_run_draws_nothing(tiny_recipe, tmp_path, command):
    target = tmp_path / "sheet.png"
    result = command("figure", "fig1", tiny_recipe, "--workspace", tmp_path, "--out", target, "--dry-run")
    assert result.code == 0
    assert [line.split()[1] for line in result.out.splitlines()[1:]] == ["ingest", "train-glow", "encode"]
    assert not list(tmp_path.iterdir())


def test_a_flow_given_by_path_is_used(finished_workspace, tmp_path, command):
    (flow,) = (finished_workspace / "train-glow").glob("tiny-*")
    recipe = tmp_path / "given.toml"
    recipe.write_text(
        'name = "given"\n[data]\nformat = "digits"\nlimit = 150\nheldout = 0\ntest = 50\n'
        f"[flow]\npath = {msgspec.json.encode(str(flow)).decode()}\n"
    )
    result = command(
        "figure", "fig1", recipe, "--workspace", tmp_path / "runs", "--out", tmp_path / "a.png", "--device", "cpu"
    )
    assert result.code == 0, result.err
    assert not list((tmp_path / "runs").glob("train-glow/*"))
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fig8", "{recipe}"],
            "unknown figure 'fig8'. Did you mean 'fig7'? Known: fig1, fig3, fig4, fig7, appendix-e.",
        ),
        (["fig8", "{recipe}", "--dry-run"], "unknown figure 'fig8'"),
        (["fig1", "{recipe}", "--out", "nowhere/fig1.png"], "folder 'nowhere' does not exist"),
        (["fig1", "{plain}"], "has no section [flow]"),
        (["fig1", "gone.toml"], "gone.toml"),
    ],
)
def test_invalid_arguments_are_rejected_before_any_work(words, message, tiny_recipe, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = tmp_path / "plain.toml"
    plain.write_text('name = "plain"\n[data]\nformat = "digits"\ntest = 50\n[runs.baseline]\n')
    paths = {"recipe": tiny_recipe, "plain": plain}
    result = command("figure", *(word.format(**paths) for word in words))
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert result.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == [plain]


def test_every_figure_is_documented():
    from lsmix.cli import cli

    page = (DOCS / "figures.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"| `{name}` |" in page
        assert name in str(cli.commands["figure"].help)
