"""Changing a field re-runs exactly the stages that depend on it; without a change nothing re-runs."""

import hashlib
import types

import msgspec
import pytest

from lsmix.data.artifact import Artifact, Manifest
from lsmix.pipeline.api import run
from lsmix.pipeline.config.recipe import Recipe, read_recipe
from lsmix.pipeline.config.schema import PoolRecipe
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.stages.graph import build_graph
from lsmix.pipeline.workspace.workspace import Workspace

INGEST, GLOW, ENCODE = "ingest tiny", "train-glow tiny", "encode tiny"
POOL, ZERO = "mix lsmix", "mix zero"
BASELINE, LSMIX = {"train baseline-seed0", "train baseline-seed1"}, {"train lsmix-seed0"}
REPORT = "report tiny"

NOTHING: set[str] = set()
FROM_REPORT = {REPORT}
FROM_RUN = {*LSMIX, REPORT}
FROM_CLASSIFIER = {*BASELINE, *FROM_RUN}
FROM_ZERO = {ZERO, REPORT}
FROM_POOL = {POOL, *FROM_RUN}
FROM_ENCODE = {ENCODE, ZERO, *FROM_POOL}
FROM_GLOW = {GLOW, *FROM_ENCODE}
EVERYTHING = {INGEST, *FROM_GLOW, *BASELINE}

# Each field of a recipe, a value that differs from the tiny recipe's, and what it re-runs.
TABLE = {
    "format": (1, NOTHING),
    "name": ("other", NOTHING),
    "data.limit": (400, EVERYTHING),
    "data.heldout": (31, EVERYTHING),
    "data.test": (81, EVERYTHING),
    "data.seed": (1, EVERYTHING),
    "data.size": (6, EVERYTHING),
    "data.fit": ("pad", EVERYTHING),
    "data.background": ("black", EVERYTHING),
    "data.title": ("Digits", EVERYTHING),
    "data.url": ("https://example.org", EVERYTHING),
    "data.licence": ("CC-BY-4.0", EVERYTHING),
    "data.citation": ("A. Author", EVERYTHING),
    "flow.levels": (1, FROM_GLOW),
    "flow.steps": (3, FROM_GLOW),
    "flow.hidden": (17, FROM_GLOW),
    "flow.bits": (6, FROM_GLOW),
    "flow.scale": ("sigmoid", FROM_GLOW),
    "flow.pad": ("refuse", FROM_GLOW),
    "flow.training.iterations": (41, FROM_GLOW),
    "flow.training.batch_size": (31, FROM_GLOW),
    "flow.training.learning_rate": (2e-3, FROM_GLOW),
    "flow.training.warmup": (11, FROM_GLOW),
    "flow.training.grad_clip": (20.0, FROM_GLOW),
    "flow.training.weight_decay": (1e-5, FROM_GLOW),
    "flow.training.flip": (True, FROM_GLOW),
    "flow.training.schedule": ("cosine", FROM_GLOW),
    "flow.training.translate": (0, FROM_GLOW),
    "flow.training.rows": ("even", FROM_GLOW),
    "flow.training.seed": (1, FROM_GLOW),
    "flow.training.memory_light": (True, FROM_GLOW),
    "flow.training.precision": ("bf16", FROM_GLOW),
    "flow.threads": (2, FROM_GLOW),
    "flow.evaluate_every": (10, NOTHING),
    "flow.evaluate_images": (32, NOTHING),
    "flow.checkpoint_every": (7, NOTHING),
    "flow.temperature": (0.5, NOTHING),
    "latents.dequantise": ("center", FROM_ENCODE),
    "latents.batch_size": (32, FROM_ENCODE),
    "latents.seed": (1, FROM_ENCODE),
    "latents.chunk_rows": (32, FROM_ENCODE),
    "latents.check_round_trip": (False, FROM_ENCODE),  # as planned; see the real run below
    "pools.lsmix.alpha": (0.5, FROM_POOL),
    "pools.lsmix.lambdas": ([0.5], FROM_POOL),
    "pools.lsmix.method": ("linear", FROM_POOL),
    "pools.lsmix.copies": (3, FROM_POOL),
    "pools.lsmix.sources": (3, FROM_POOL),
    "pools.lsmix.corner": ("random", FROM_POOL),
    "pools.lsmix.seed": (1, FROM_POOL),
    "pools.lsmix.output": ("5bit", FROM_POOL),
    "pools.lsmix.batch_size": (32, FROM_POOL),
    "pools.lsmix.chunk_rows": (64, FROM_POOL),
    "pools.lsmix.on_decode_failure": ("keep", FROM_POOL),
    "pools.lsmix.attempts": (2, FROM_POOL),
    "pools.lsmix.tolerance": (0.5, FROM_POOL),
    "pools.lsmix.bad_pixel_fraction": (0.5, FROM_POOL),
    "pools.zero.lambdas": ([0.0], FROM_ZERO),
    "classifier.threads": (2, FROM_CLASSIFIER),
    "classifier.width": (9, FROM_CLASSIFIER),
    "classifier.final_batch_norm": (True, FROM_CLASSIFIER),
    "classifier.evaluate_every": (2, FROM_CLASSIFIER),
    "classifier.epochs": (3, FROM_CLASSIFIER),
    "classifier.batch_size": (32, FROM_CLASSIFIER),
    "classifier.learning_rate": (2e-3, FROM_CLASSIFIER),
    "classifier.schedule": ("cosine", FROM_CLASSIFIER),
    "classifier.decay": (0.9, FROM_CLASSIFIER),
    "classifier.decay_every_epochs": (3, FROM_CLASSIFIER),
    "classifier.decay_after_updates": (1, FROM_CLASSIFIER),
    "classifier.translate": (0, FROM_CLASSIFIER),
    "classifier.flip": (True, FROM_CLASSIFIER),
    "classifier.precision": ("bf16", FROM_CLASSIFIER),
    "classifier.optimiser": ("sgd", FROM_CLASSIFIER),
    "classifier.momentum": (0.8, FROM_CLASSIFIER),
    "classifier.nesterov": (False, FROM_CLASSIFIER),
    "classifier.weight_decay": (5e-4, FROM_CLASSIFIER),
    "classifier.grad_clip": (5.0, FROM_CLASSIFIER),
    "classifier.normalise": ("channel", FROM_CLASSIFIER),
    "runs.lsmix.pool": ("zero", FROM_RUN),
    "runs.lsmix.mode": ("chain", FROM_RUN),
    "runs.lsmix.seeds": ([5], FROM_RUN),
    "runs.lsmix.classifier": ({"epochs": 3}, FROM_RUN),
    "runs.lsmix.label": ("LS-Mix", FROM_REPORT),
    "runs.lsmix.paper": ("4.01", FROM_REPORT),
    "report.title": ("Another", FROM_REPORT),
    "report.table": ("Table 1", FROM_REPORT),
    "report.note": ("At small scale.", FROM_REPORT),
    "report.pairs": (3, FROM_REPORT),
    "report.bits_images": (65, FROM_REPORT),
}
# Fields with only one possible value (architecture: with CNN-13's width), and locations: sources and trained flows
# count by their contents.
NOT_IN_TABLE = {
    "data.path",
    "data.download",
    "data.labels",  # this field and the next are for other data sets than digits
    "data.extra",
    "data.format",
    "data.on_error",  # this field and the next three are for image files
    "data.labels_file",
    "data.file_column",
    "data.label_column",
    "flow.path",
    "flow.start_from",
    "pools.lsmix.flow",
    "classifier.architecture",
    "classifier.seed",
    "runs.lsmix.mix",  # cannot be combined with a pool; see below
    "scale",  # has no effect without --scale
    "naturalness",  # adds artifacts: see test_naturalness.py
}


class PlannedResolver(Resolver):
    """Pretends that every artifact exists, with contents that are a function of its key."""

    def artifact(self, node):
        key = self.key(node)
        root = hashlib.sha256(key.encode()).hexdigest()
        manifest = Manifest(
            stage=node.stage.name,
            stage_version=1,
            name=node.name,
            cache_key=key,
            content_digest=root,
            config={},
            inputs=[],
            files=[],
        )
        return Artifact(folder=self.workspace.root, manifest=manifest)


def planned_keys(recipe_file, tmp_path, overrides=()):
    workspace = Workspace(tmp_path / "nothing-here")
    resolver = PlannedResolver(workspace)
    return [(node.label, resolver.key(node)) for node in build_graph(read_recipe(recipe_file, overrides), workspace)]


@pytest.mark.parametrize("field", TABLE)
def test_a_field_re_runs_exactly_what_depends_on_it(tiny_recipe, tmp_path, field):
    value, expected = TABLE[field]
    text = msgspec.toml.encode({"v": value}).decode().partition("=")[2].strip() if not isinstance(value, dict) else ""
    override = f"{field}={text}" if text else f"{field}.epochs={value['epochs']}"
    before = planned_keys(tiny_recipe, tmp_path)
    after = planned_keys(tiny_recipe, tmp_path, [override])
    assert len(before) == len(after) == len(EVERYTHING)
    assert {label for (label, one), (_, two) in zip(before, after, strict=True) if one != two} == expected


def fields_of(model, prefix):
    for field in msgspec.structs.fields(model):
        kind, name = field.type, f"{prefix}{field.name}"
        if name == "mix":  # shared by all pools, so it has the fields of a pool
            assert kind is PoolRecipe
            continue
        if isinstance(kind, types.UnionType) and name != "naturalness":  # an optional section
            kind = kind.__args__[0]
        part = {"pools": "lsmix.", "runs": "lsmix."}.get(name)
        if part:
            yield from fields_of(kind.__args__[-1], f"{name}.{part}")
        elif hasattr(kind, "__struct_fields__"):
            yield from fields_of(kind, f"{name}.")
        else:
            yield name


def test_the_table_has_every_field_of_a_recipe():
    assert set(fields_of(Recipe, "")) == (TABLE.keys() - {"pools.zero.lambdas"}) | NOT_IN_TABLE


def test_changing_on_the_fly_mixing_re_runs_only_that_run(tiny_recipe, tmp_path):
    ways = ['[{method="mixup"}]', '[{method="mixup", alpha=0.5}]', '[{method="cutmix"}]', '[{method="none"}]']
    ways += ['[{method="mixup", rate="per-batch"}]', '[{pool="lsmix"}, {method="mixup"}]']
    ways += ['[{pool="lsmix"}, {method="mixup", weight=2.0}]', '[{pool="zero"}, {method="mixup"}]']
    keys = [dict(planned_keys(tiny_recipe, tmp_path, [f"runs.baseline.mix={way}"])) for way in ways]
    keys.append(dict(planned_keys(tiny_recipe, tmp_path)))
    for label in keys[0]:
        alone = label in {*BASELINE, REPORT}
        assert len({one[label] for one in keys}) == (len(keys) if alone else 1), label


def test_a_shared_field_re_runs_the_pools_that_do_not_override_it(tiny_recipe, tmp_path):
    before, after = (dict(planned_keys(tiny_recipe, tmp_path, o)) for o in ([], ["mix.seed=7"]))
    assert {label for label in before if before[label] != after[label]} == {POOL, ZERO, *FROM_RUN}
    after = dict(planned_keys(tiny_recipe, tmp_path, ["mix.copies=7"]))
    assert {label for label in before if before[label] != after[label]} == FROM_ZERO  # the other has copies = 2


def test_adding_a_seed_to_a_run_does_not_re_run_the_others(tiny_recipe, tmp_path):
    before = dict(planned_keys(tiny_recipe, tmp_path))
    after = dict(planned_keys(tiny_recipe, tmp_path, ["runs.baseline.seeds=[0, 1, 2]"]))
    assert after.keys() - before.keys() == {"train baseline-seed2"}
    assert {label for label in before if before[label] != after[label]} == {REPORT}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_run_touches_nothing(tiny_recipe, tiny_workspace, command):
    command("run", tiny_recipe, "--workspace", tiny_workspace)  # creates locks and caches, which the copy lacks
    before = times(tiny_workspace)
    result = command("run", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == 0
    assert result.out.startswith("0 of 9 artifacts made")
    assert times(tiny_workspace) == before


def test_later_stages_do_not_re_run_if_the_contents_are_equal(tiny_recipe, tiny_workspace):
    # Without the round-trip check the latents have another key but the same bytes.
    result = run(tiny_recipe, workspace=tiny_workspace, device="cpu", overrides=["latents.check_round_trip=false"])
    assert [item.stage for item in result.built if not item.cached] == ["encode"]


def test_a_real_change_re_runs_what_was_planned(tiny_recipe, tiny_workspace):
    overrides = ["pools.lsmix.alpha=0.5", "flow.checkpoint_every=3"]
    result = run(tiny_recipe, workspace=tiny_workspace, device="cpu", overrides=overrides)
    assert {f"{item.stage} {item.name}" for item in result.built if not item.cached} == FROM_POOL
    again = run(tiny_recipe, workspace=tiny_workspace, device="cpu")
    assert all(item.cached for item in again.built), "the artifacts of the earlier settings must still exist"
