"""The naturalness stage on digits: the compared samples, reproducible bytes, and the report."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from PIL import Image

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, DivergedError, FormatError, MissingError, RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.progress import NullProgress
from lsmix.glow.checkpoint import load_flow
from lsmix.pipeline.api import plan, run
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.config.results import Interval, Naturalness, SampleSummary, read_naturalness
from lsmix.pipeline.config.schema import NaturalnessConfig
from lsmix.pipeline.engine.status import recipe_status
from lsmix.pipeline.naturalness.measures import measure, summarise
from lsmix.pipeline.naturalness.metrics import Resamples
from lsmix.pipeline.naturalness.samples import Block, Sample, SampleSet, choose_rows_apart
from lsmix.pipeline.views.report.naturalness import naturalness_section

SETTINGS = ["naturalness.pairs=20", "naturalness.bootstrap=50", "naturalness.batch_size=16"]


class Warnings(NullProgress):
    """Collect warnings."""

    def __init__(self):
        self.warnings = []

    def warning(self, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def measured(tiny_recipe, finished_workspace, tmp_path_factory):
    """Run the naturalness stage in a copy of the finished workspace; return the result."""
    workspace = tmp_path_factory.mktemp("measured") / "runs"
    shutil.copytree(finished_workspace, workspace)
    return run(tiny_recipe, workspace=workspace, stage="naturalness", device="cpu", overrides=SETTINGS)


@pytest.fixture(scope="module")
def found(measured):
    return read_naturalness(measured["naturalness"].folder)


def report_of(item):
    """Return a task stand-in for the section of the report."""
    artifact = Artifact(folder=item.folder, manifest=item.manifest)
    return SimpleNamespace(artifacts={"naturalness": artifact})


def samples_of(measured, **fields):
    config = NaturalnessConfig(pairs=20, batch_size=16, **fields)
    dataset = open_dataset(measured["ingest"].folder / "dataset.h5")
    flow = load_flow(measured["train-glow/tiny"].folder)
    return SampleSet(dataset, open_latents(measured["encode"].folder), flow, config, count=20)


def images_of(samples, name, *parts):
    (sample,) = (sample for sample in samples.all() if sample.name == name)
    return np.concatenate([sample.block(part).images for part in parts or (slice(0, 20),)])


def test_the_stage_builds_only_the_evaluator_and_its_measurement(measured):
    built = [f"{item.stage} {item.name}" for item in measured.built if not item.cached]
    assert built == ["train-glow tiny-evaluator", "naturalness tiny"]


def test_gc_finds_a_measurement_that_no_recipe_uses(measured, tiny_recipe, command):
    workspace = measured["ingest"].folder.parents[1]
    found = command("gc", tiny_recipe, "--workspace", workspace).out
    for item in ("naturalness", "train-glow/tiny-evaluator"):
        assert str(measured[item].folder) in found
    wanted = [word for setting in SETTINGS for word in ("--set", setting)]
    kept = command("gc", tiny_recipe, "--workspace", workspace, *wanted).out
    assert "naturalness" not in kept
    assert "evaluator-" not in kept


def test_all_samples_have_equal_sizes_and_originals_come_first(measured, found):
    names = [sample.name for sample in found.samples]
    assert names == ["held-out", "test", "sources", *NaturalnessConfig().methods]
    assert {sample.images for sample in found.samples} == {found.pairs} == {20}
    assert measured["naturalness"].manifest.counts["pairs"] == 20


def test_the_evaluator_trains_on_odd_rows_and_pairs_use_each_even_row_once(measured):
    first, second = choose_rows_apart(301, 75, seed=0)
    rows = np.concatenate((first, second))
    assert len(np.unique(rows)) == 150
    assert not (rows % 2).any()
    assert measured["train-glow/tiny-evaluator"].manifest.config["training"]["rows"] == "odd"


def test_a_flow_is_trained_and_evaluated_on_its_rows_only(measured, tiny_recipe, tmp_path, monkeypatch):
    from lsmix.glow.training import FlowTrainer

    seen = []
    begin = FlowTrainer.__init__
    monkeypatch.setattr(
        FlowTrainer, "__init__", lambda self, *given: (seen.append(np.array(given[2])), begin(self, *given))[1]
    )
    train = open_dataset(measured["ingest"].folder / "dataset.h5").train.images
    few = ["flow.training.iterations=2", "flow.training.rows=even"]
    result = run(tiny_recipe, workspace=tmp_path, stage="train-glow", device="cpu", overrides=few)
    np.testing.assert_array_equal(seen[0], train[0::2])
    flow = load_flow(result["train-glow"].folder)
    bits = flow.bits_per_dim(flow.log_prob(train[0::2][:64], dequantise="uniform", seed=0)).mean()
    assert result["train-glow"].manifest.counts["train_bits_per_dim"] == pytest.approx(bits, rel=1e-12)


def test_held_out_originals_are_measured_by_the_evaluator(measured, found):
    heldout = open_dataset(measured["ingest"].folder / "dataset.h5").heldout.images
    evaluator = load_flow(measured["train-glow/tiny-evaluator"].folder)
    images = images_of(samples_of(measured), "held-out")
    assert {image.tobytes() for image in images} <= {image.tobytes() for image in heldout}
    expected = evaluator.bits_per_dim(evaluator.log_prob(images, dequantise="uniform", batch_size=16, seed=0))
    np.testing.assert_allclose(found["held-out"].bits_per_dim, expected, rtol=1e-12)
    assert found["held-out"].mean_bits == pytest.approx(expected.mean())
    assert found["held-out"].mean_bits_error == pytest.approx(expected.std(ddof=1) / np.sqrt(20))
    assert found["held-out"].distance is None


def test_at_lambda_zero_mixes_equal_their_first_sources_and_have_no_seam(measured):
    samples = samples_of(measured, lam=0.0)
    for name in ("ls-mix", "linear", "bern-mix", "swap-mix", "hard-cut"):
        np.testing.assert_array_equal(images_of(samples, name), images_of(samples, "sources"), err_msg=name)
    evaluator = load_flow(measured["train-glow/tiny-evaluator"].folder)
    config = NaturalnessConfig(batch_size=16)
    first = samples.all()[:4]
    measured = {sample.name: measure(sample, evaluator, None, config, count=20, shown=1) for sample in first}
    summary = summarise(measured["ls-mix"], measured["held-out"], Resamples(count=10, pairs=20, originals=20, seed=0))
    assert summary.seam is None
    np.testing.assert_array_equal(measured["ls-mix"].bits, measured["sources"].bits)


def test_at_lambda_one_mixes_equal_their_second_sources(measured):
    samples = samples_of(measured, lam=1.0)
    second = np.array([pair[1] for pair in samples.pair_sheet(20)])
    for name in ("ls-mix", "linear", "bern-mix", "swap-mix", "hard-cut"):
        np.testing.assert_array_equal(images_of(samples, name), second, err_msg=name)


def test_a_hard_cut_at_one_half_takes_the_upper_half_of_the_second_image(measured):
    samples = samples_of(measured)
    cut = images_of(samples, "hard-cut")
    first, second = (np.array(side) for side in zip(*samples.pair_sheet(20), strict=True))
    np.testing.assert_array_equal(cut[:, :4], second[:, :4])
    np.testing.assert_array_equal(cut[:, 4:], first[:, 4:])


def test_pixel_methods_mix_the_same_pairs_and_regions_show_the_second_image(measured):
    samples = samples_of(measured, methods=("mixup", "cutmix", "resizemix", "fmix"))
    first, second = (np.array(side).astype(int) for side in zip(*samples.pair_sheet(20), strict=True))
    mixup, cutmix, resizemix, fmix = (sample.block(slice(0, 20)) for sample in samples.all()[3:])
    np.testing.assert_array_equal(mixup.images, (first + second + 1) // 2)
    for block in (cutmix, fmix):
        expected = np.where(block.regions[..., None], second, first)
        np.testing.assert_array_equal(block.images, expected)
        np.testing.assert_allclose(block.share, block.regions.mean(axis=(1, 2)), rtol=1e-6)
    outside = ~resizemix.regions
    np.testing.assert_array_equal(resizemix.images[outside], first[outside])
    np.testing.assert_allclose(resizemix.share, resizemix.regions.mean(axis=(1, 2)), rtol=1e-6)
    assert [sample.seam_of for sample in samples.all()[3:]] == ["ls-mix", "own", "own", "own"]


def test_features_of_the_baseline_are_compared_if_there_is_one(measured, found):
    assert (found.classifier, found.features) == ("baseline-seed0", 8)
    assert found["held-out"].frechet is None
    assert all(sample.frechet > 0 for sample in found.samples[1:])


def test_features_come_from_the_first_seed_of_the_named_run(measured, tiny_recipe):
    overrides = [*SETTINGS, "naturalness.classifier=lsmix"]
    _, nodes, _ = plan(tiny_recipe, workspace=measured["naturalness"].folder.parent.parent, overrides=overrides)
    (node,) = (node for node in nodes if node.stage.name == "naturalness")
    assert node.inputs["classifier"].name == "lsmix-seed0"


def test_without_a_baseline_there_is_no_feature_distance(measured, tiny_recipe, tmp_path):
    recipe = tmp_path / "no-runs.toml"
    text = (
        tiny_recipe.read_text(encoding="utf-8").partition("[runs.baseline]")[0]
        + "[naturalness]\npairs = 4\nbootstrap = 10\n"
    )
    recipe.write_text(text + 'methods = ["hard-cut"]\n', encoding="utf-8")
    workspace = measured["naturalness"].folder.parent.parent
    result = run(recipe, workspace=workspace, stage="naturalness", device="cpu")
    found = read_naturalness(result["naturalness"].folder)
    assert (found.classifier, found.features) == ("", 0)
    assert [sample.frechet for sample in found.samples] == [None] * 4
    item = result["naturalness"]
    (section,) = naturalness_section(report_of(item))
    for table in section.items[-2:]:
        assert "Fréchet" not in table.columns
        assert "Fréchet" not in table.note


@pytest.mark.parametrize("name", ["bern-mix", "cutmix", "ls-mix", "test"])
def test_a_sample_does_not_depend_on_the_size_of_blocks(measured, name):
    samples = samples_of(measured)
    pieces = images_of(samples, name, slice(0, 16), slice(16, 20))
    np.testing.assert_array_equal(images_of(samples, name), pieces)


def test_failed_decodes_are_counted_and_included(measured, found):
    (sample,) = (sample for sample in samples_of(measured).all() if sample.name == "reverse-mix")
    decode_failed = sample.block(slice(0, 20)).decode_failed
    assert decode_failed.any(), "a barely trained flow should decode some reversed latents out of range"
    assert found["reverse-mix"].decode_failed == decode_failed.sum()
    assert found["reverse-mix"].images == len(found["reverse-mix"].bits_per_dim) == 20
    assert found["hard-cut"].decode_failed is None


def test_only_methods_with_regions_have_their_own_seam(found):
    own = {sample.name for sample in found.samples if sample.seam_of == "own"}
    assert own == {"ls-mix", "swap-mix", "reverse-mix", "cutmix", "resizemix", "fmix", "hard-cut"}
    assert all(sample.seam.low <= sample.seam.value <= sample.seam.high for sample in found.samples)


def test_two_runs_produce_the_same_bytes(measured, tiny_recipe):
    folder = measured["naturalness"].folder
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    again = run(
        tiny_recipe,
        workspace=folder.parent.parent,
        stage="naturalness",
        device="cpu",
        overrides=SETTINGS,
        force="naturalness",
    )
    assert [item.stage for item in again.built if not item.cached] == ["naturalness"]
    assert before.keys() == {"naturalness.json", "sheet.png"}
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert [file.path for file in again["naturalness"].manifest.files if file.payload] == ["naturalness.json"]


def test_too_few_held_out_images_shrink_every_sample_with_a_warning(measured, tiny_recipe):
    progress = Warnings()
    settings = ["naturalness.bootstrap=10", 'naturalness.methods=["hard-cut"]']
    result = run(
        tiny_recipe,
        workspace=measured["naturalness"].folder.parent.parent,
        stage="naturalness",
        device="cpu",
        overrides=settings,
        progress=progress,
    )
    found = read_naturalness(result["naturalness"].folder)
    assert (found.pairs, found.pairs_asked) == (30, 500)
    assert {sample.images for sample in found.samples} == {30}
    (warning,) = progress.warnings
    assert "samples have 30 images instead of 500, since there are only 30 held-out images and" in warning


# Images without a finite likelihood.


class _FailingEvaluator:
    """An evaluator whose likelihood is NaN for some rows."""

    def __init__(self, bad):
        self._bad = bad

    def encode(self, images, **options):
        rows = np.arange(len(images)) + options["first_index"]
        return None, np.where(np.isin(rows, self._bad), np.nan, -images.mean(axis=(1, 2, 3)))

    def bits_per_dim(self, log_prob):
        return -log_prob


def _sample(name):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 1), dtype=np.uint8)
    regions = np.zeros((10, 4, 4), bool)
    return Sample(name=name, kind="pixel", seam_of="own", block=lambda part: Block(images[part], regions[part]))


def _measured(sample, bad):
    return measure(sample, _FailingEvaluator(bad), None, NaturalnessConfig(batch_size=4), count=10, shown=2)


def test_images_without_a_finite_likelihood_are_excluded_counted_and_null():
    reference = _measured(_sample("reference"), [])
    partial = _measured(_sample("partial"), [3, 9])
    summary = summarise(partial, reference, Resamples(count=20, pairs=10, originals=10, seed=0))
    assert summary.not_finite == 2
    assert [row for row, bits in enumerate(summary.bits_per_dim) if bits is None] == [3, 9]
    assert summary.mean_bits == pytest.approx(np.delete(reference.bits, [3, 9]).mean())
    assert summary.distance.value > 0
    assert b"nan" not in msgspec.json.encode(summary).lower()


def test_the_error_for_too_few_finite_likelihoods_names_the_setting():
    with pytest.raises(
        DivergedError, match=r"only 1 of 10 images of sample 'x' have a finite .* 'naturalness\.evaluator\.train"
    ):
        _measured(_sample("x"), range(9))


# The recipe.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['naturalness.methods=["ls-mx"]'], r"unknown mixing method .*'ls-mx'\. Did you mean 'ls-mix'"),
        (['naturalness.methods=["linear", "linear"]'], r"naturalness\.methods: list each method only once"),
        (["naturalness.lam=1.5"], r"naturalness\.lam: expected float <= 1\.0, got 1\.5"),
        (["naturalness.pairs=1"], r"naturalness\.pairs: expected int >= 2, got 1"),
        (["naturalness.piars=3"], r"unknown key 'naturalness\.piars'\. Did you mean 'pairs'"),
        (["naturalness.pairs=9", "data.heldout=0"], r"there are none\. Set 'data\.heldout'"),
        (["naturalness.pairs=9", "flow.training.rows=odd"], r"flow\.training\.rows: expected 'all' or 'even'"),
        (
            ["naturalness.classifier=baselin"],
            r"naturalness\.classifier: there is no run 'baselin'\. .*Did you mean 'bas",
        ),
        (["naturalness.evaluator.stepps=3"], r"naturalness\.evaluator: unknown key 'stepps'\. Did you mean 'steps'"),
        (["naturalness.evaluator.path=x"], r"naturalness\.evaluator: unknown key 'path'"),
        (["naturalness.evaluator.training=3"], r"naturalness\.evaluator: training: expected a section"),
        (
            ["naturalness.evaluator.training.iterations=0"],
            r"naturalness\.evaluator\.training\.iterations: expected int >= 1",
        ),
        (
            ["naturalness.evaluator.training.rows=all"],
            r"naturalness\.evaluator\.training\.rows: the evaluator always trains on",
        ),
        (
            ["naturalness.evaluator.training.seed=0"],
            r"naturalness\.evaluator\.training\.seed: got 0, the seed of the flow itself",
        ),
    ],
)
def test_errors_in_the_section_name_the_field(tiny_recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(tiny_recipe, overrides)


def test_an_evaluator_has_the_settings_of_the_flow_except_seed_rows_and_overrides(tiny_recipe):
    recipe = read_recipe(tiny_recipe, ["naturalness.evaluator.steps=3", "naturalness.evaluator.training.batch_size=16"])
    evaluator = msgspec.to_builtins(recipe.evaluator_config())
    flow = msgspec.to_builtins(recipe.flow)
    del flow["path"], flow["start_from"]
    flow["steps"] = 3
    flow["training"] |= {"seed": 1, "rows": "odd", "batch_size": 16}
    assert evaluator == flow


def test_a_recipe_without_the_section_has_no_evaluator_and_the_command_fails(tiny_recipe, tmp_path, command):
    _, nodes, _ = plan(tiny_recipe, workspace=tmp_path)
    assert not [node for node in nodes if "evaluator" in node.name or node.stage.name == "naturalness"]
    result = command("naturalness", tiny_recipe, "--workspace", tmp_path)
    assert result.code == 1
    assert "has no section [naturalness], which stage 'naturalness' needs. Add one." in result.err


def test_changing_the_section_repeats_the_measurement_and_only_evaluator_settings_retrain_it(measured, tiny_recipe):
    workspace = measured["naturalness"].folder.parent.parent

    def to_build(*overrides):
        _, nodes, target = plan(tiny_recipe, workspace=workspace, overrides=[*SETTINGS, *overrides])
        return {(node.stage, node.name) for node in recipe_status(nodes, target) if node.state != "cached"}

    report = ("report", "tiny")
    assert to_build() == {report}
    assert to_build("naturalness.lam=0.25") == {("naturalness", "tiny"), report}
    changed = to_build("naturalness.evaluator.training.batch_size=16")
    assert changed == {("train-glow", "tiny-evaluator"), ("naturalness", "tiny"), report}


def test_the_cost_is_estimated_in_advance(tiny_recipe, finished_workspace):
    _, nodes, target = plan(tiny_recipe, workspace=finished_workspace, overrides=SETTINGS)
    (node,) = (node for node in recipe_status(nodes, target) if node.stage == "naturalness")
    assert node.state == "waits"
    assert node.bytes > 0
    assert node.seconds > 0


# The file and the report.


def test_a_missing_newer_or_damaged_result_is_rejected(measured, tmp_path):
    with pytest.raises(MissingError, match=r"naturalness\.json does not exist in .* 'lsmix naturalness'"):
        read_naturalness(tmp_path)
    content = (measured["naturalness"].folder / "naturalness.json").read_bytes()
    path = tmp_path / "naturalness.json"
    path.write_bytes(content.replace(b'"format_version": 2', b'"format_version": 3'))
    with pytest.raises(FormatError, match=r"has format 3; this version of lsmix reads format 2\. Use a newer"):
        read_naturalness(tmp_path)
    for damaged in (content[:-20], content.replace(b'"pairs"', b'"pears"'), b"\xff", b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match="is damaged"):
            read_naturalness(tmp_path)


def test_the_formats_page_documents_every_field():
    page = (Path(__file__).resolve().parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("## naturalness.json")[2].partition("\n## ")[0]
    for model in (Naturalness, SampleSummary, Interval):
        assert not [name for name in model.__struct_fields__ if f"`{name}`" not in section]


def test_the_report_section_contains_every_sample_and_the_caveats(measured, found):
    item = measured["naturalness"]
    (section,) = naturalness_section(report_of(item))
    *figures, likelihood, appearance = section.items
    originals = ["originals, held out", "originals, test", "originals, sources"]
    for table in (likelihood, appearance):
        assert [row[0] for row in table.rows] == [*originals, *NaturalnessConfig().methods]
    assert "Do not judge by bits per dimension alone" in section.text
    difference = np.mean(np.subtract(found["ls-mix"].bits_per_dim, found["hard-cut"].bits_per_dim))
    assert "on the same pairs: " + f"{difference:+.3f}".replace("-", "−") in likelihood.note
    linear = next(row for row in appearance.rows if row[0] == "linear")
    assert linear[-2].endswith("°")
    names = [figure.name for figure in figures]
    assert names == ["naturalness-sheet", "naturalness-bits", "naturalness-distance"]


def test_the_report_has_the_section_only_if_naturalness_was_measured(
    measured, tiny_recipe, finished_workspace, command
):
    workspace = measured["naturalness"].folder.parent.parent
    result = run(tiny_recipe, workspace=workspace, device="cpu", overrides=SETTINGS)
    assert "How natural is a mix?" in result.report.read_text(encoding="utf-8")
    assert (result.report.parent / "figures" / "naturalness-sheet.png").is_file()
    (without,) = (finished_workspace / "report").glob("tiny-*")
    words = [word for override in SETTINGS for word in ("--set", override)]
    shown = command("naturalness", tiny_recipe, "--workspace", workspace, "--device", "cpu", *words).out
    assert re.search(r"^sample +bits/dim +distance .*\n(.*\n)*ls-mix +[\d.]+ +[\d.]+ ", shown, re.MULTILINE)
    assert "How natural" not in Path(without / "report.html").read_text(encoding="utf-8")


def test_show_prints_counts_and_writes_the_sheet(measured, command, tmp_path):
    folder = measured["naturalness"].folder
    shown = command("show", folder, "--image", tmp_path / "sheet.png")
    assert shown.code == 0
    assert "x₁ | mixes of each method at λ = 0.5 | x₂" in shown.out
    with Image.open(tmp_path / "sheet.png") as drawn, Image.open(folder / "sheet.png") as made:
        assert drawn.tobytes() == made.tobytes()


@pytest.mark.gpu
def test_measures_on_cuda_are_close_to_the_cpu(measured, found, tiny_recipe, tmp_path):
    workspace = shutil.copytree(measured["naturalness"].folder.parent.parent, tmp_path / "runs")
    again = run(
        tiny_recipe, workspace=workspace, stage="naturalness", device="cuda", overrides=SETTINGS, force="naturalness"
    )
    on_cuda = read_naturalness(again["naturalness"].folder)
    for sample in found.samples:
        # A decoded pixel may differ by one level, which sometimes moves it to the next 5-bit cell.
        assert on_cuda[sample.name].mean_bits == pytest.approx(sample.mean_bits, abs=0.05)
        if sample.kind == "original":
            np.testing.assert_allclose(on_cuda[sample.name].bits_per_dim, sample.bits_per_dim, atol=1e-3)
