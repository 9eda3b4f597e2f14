"""Rebuilding a pool from its plan: the same content digest, or a clear error."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from factory import artifact_folder, reseal

from lsmix.data.artifact import read_manifest
from lsmix.data.errors import CorruptError, FormatError, MissingError, RecipeError
from lsmix.data.pool import open_pool, pool_store, write_pool_shard
from lsmix.data.pool_spec import read_spec
from lsmix.pipeline.api import run, verify
from lsmix.pipeline.engine.executor import InProcessExecutor
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.verify.compare import compare_pools
from lsmix.pipeline.verify.rebuild import rebuild

RECIPE = (
    'name = "pixels"\n[data]\nformat = "digits"\nlimit = 150\ntest = 60\n[pools.p]\nmethod = "cutmix"\ncopies = 2\n'
)


class Given:
    """The files of a receiver: the plan of a pool, the two files of its flow, and the base set."""

    def __init__(self, workspace, folder):
        self.original = artifact_folder(workspace, "mix", "lsmix")
        self.content_digest = read_manifest(self.original).content_digest
        self.flow = folder / "flow"
        self.flow.mkdir()
        for name in ("glow.json", "glow.safetensors"):
            shutil.copy(artifact_folder(workspace, "train-glow", "tiny") / name, self.flow)
        self.plan = Path(shutil.copy(self.original / "plan.json", folder))
        self.dataset = artifact_folder(workspace, "ingest", "tiny")


@pytest.fixture
def given(finished_workspace, tmp_path):
    return Given(finished_workspace, tmp_path)


def altered(plan, **changes):
    """Write a changed copy of a plan; dictionaries change single fields."""
    content = msgspec.json.decode(plan.read_bytes())
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    other = plan.with_name("other.json")
    other.write_bytes(msgspec.json.encode(content))
    return other


def test_plan_flow_and_published_images_reproduce_the_pool(given, tmp_path):
    result = rebuild(
        given.plan, data="digits", flow=given.flow, out=tmp_path / "pool", expect=given.content_digest, device="cpu"
    )
    assert (result.equal, result.cached, result.folder) == (True, False, tmp_path / "pool")
    assert given.plan.stat().st_size < 4096
    assert not list(tmp_path.glob("*.part")), "the temporary folder was not removed"
    verified = verify(tmp_path / "pool", deep=True, sample=100, data="digits", flow=given.flow, device="cpu")
    assert (verified["content_digest"], verified["unchecked"]) == (given.content_digest, [])


@pytest.mark.parametrize("lone", [False, True])
def test_an_ingested_data_set_is_accepted(given, tmp_path, lone):
    data = Path(shutil.copy(given.dataset / "dataset.h5", tmp_path)) if lone else given.dataset
    result = rebuild(given.plan, data=data, flow=given.flow, workspace=tmp_path / "w", device="cpu")
    assert (result.content_digest, result.expected, result.equal) == (given.content_digest, "", None)
    again = rebuild(given.plan, data=data, flow=given.flow, workspace=tmp_path / "w", device="cpu")
    assert (again.content_digest, again.cached) == (given.content_digest, True)


def test_shards_are_built_by_workers(given, tmp_path, monkeypatch):
    workers = []  # test_dask.py checks that Dask produces the same bytes
    executor = lambda **options: workers.append(options["workers"]) or InProcessExecutor()  # noqa: E731 - one line
    monkeypatch.setattr("lsmix.pipeline.engine.dask.DaskExecutor", executor)
    result = rebuild(given.original, data="digits", flow=given.flow, out=tmp_path / "pool", workers=2, device="cpu")
    assert (result.equal, workers) == (True, [2])


def test_a_pixel_space_pool_needs_no_flow(tmp_path, given, command):
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    original = run(tmp_path / "r.toml", workspace=tmp_path / "runs", stage="mix")["mix/p"].folder
    result = command("rebuild", original / "plan.json", "--data", "digits", "--out", tmp_path / "pool", "--json")
    assert result.code == 0, result.err
    content = msgspec.json.decode(result.out)["content"]
    assert (content["equal"], content["content_digest"]) == (True, read_manifest(original).content_digest)
    with pytest.raises(RecipeError, match="mixes pixels and needs no flow"):
        rebuild(original, data="digits", flow=given.flow, workspace=tmp_path / "w")


def test_an_interrupted_rebuild_is_resumed(given, tmp_path, monkeypatch):
    from lsmix.pipeline.stages.mix import MixProcessor

    store, done = MixProcessor.store, []

    def fail(self, shard, computed):
        if shard == 2:
            raise OSError("no space left on device")
        done.append(shard)
        return store(self, shard, computed)

    monkeypatch.setattr(MixProcessor, "store", fail)
    with pytest.raises(OSError, match="no space"):
        rebuild(given.plan, data="digits", flow=given.flow, out=tmp_path / "pool", device="cpu")
    assert not (tmp_path / "pool").exists()
    before = set(done)
    monkeypatch.setattr(
        MixProcessor, "store", lambda self, shard, made: (done.append(shard), store(self, shard, made))[1]
    )
    done.clear()
    result = rebuild(given.plan, data="digits", flow=given.flow, out=tmp_path / "pool", device="cpu")
    assert result.content_digest == given.content_digest
    assert before
    assert not before & set(done), "a shard was built twice"


def test_rebuilding_into_the_original_is_rejected(given, tiny_workspace):
    with pytest.raises(RecipeError, match=r"is the original itself, .* nothing was rebuilt"):
        rebuild(
            artifact_folder(tiny_workspace, "mix", "lsmix"), data="digits", flow=given.flow, workspace=tiny_workspace
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"limit": 331}}, "it has 301 training images, expected 300"),
        ({"config": {"seed": 1}}, "the images or their order differ"),
        ({"licence": "none"}, "its licence is 'CC BY 4.0', expected 'none'"),
    ],
)
def test_another_data_set_is_rejected_with_the_differences(given, tmp_path, changes, message):
    origin = msgspec.json.decode(given.plan.read_bytes())["origin"]
    config = {**origin["config"], **changes.pop("config", {})}
    digest = origin["content_digest"] if "licence" not in changes else "1" * 64
    plan = altered(given.plan, origin={**changes, "config": config, "content_digest": digest})
    with pytest.raises(RecipeError, match=f"is not the base set of the pool: .*{message}"):
        rebuild(plan, data="digits", flow=given.flow, workspace=tmp_path / "w")


def test_a_dataset_file_of_another_subset_is_rejected_without_leftovers(given, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    other = run(tmp_path / "r.toml", workspace=tmp_path / "runs", stage="ingest")["ingest"].folder
    lone = Path(shutil.copy(other / "dataset.h5", tmp_path))
    for data in (lone, other):
        with pytest.raises(RecipeError, match="it has 150 training images, expected 300"):
            rebuild(given.plan, data=data, flow=given.flow, workspace=tmp_path / "w")
    assert not list((tmp_path / "w").rglob("*.h5"))


def test_another_flow_is_rejected_by_its_digest(given, tmp_path):
    plan = altered(given.plan, inputs={"flow": "ab" * 32})
    with pytest.raises(RecipeError, match=r"does not match the plan: .* expected abababababab…"):
        rebuild(plan, data="digits", flow=given.flow, workspace=tmp_path / "w")
    with pytest.raises(RecipeError, match="Name its folder with '--flow'"):
        rebuild(given.plan, data="digits", workspace=tmp_path / "w")
    with pytest.raises(MissingError, match="no artifact at"):
        rebuild(given.plan, data="digits", flow=tmp_path / "nowhere", workspace=tmp_path / "w")
    assert not (tmp_path / "w").exists(), "the workspace was created before the inputs were checked"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 2}, FormatError, "has format 2; this version of lsmix reads format 1"),
        (
            {"stage_version": MIX.version + 1},
            FormatError,
            rf"version {MIX.version + 1} of stage 'mix'; this lsmix has version {MIX.version}. Use a newer lsmix",
        ),
        ({"stage_version": MIX.version - 1}, FormatError, "Use an older lsmix"),
        ({"surprise": 1}, FormatError, "unknown field `surprise`"),
        ({"pool": {"alpha": -1.0}}, FormatError, "alpha"),
        ({"pool": {"flow": "../elsewhere"}}, FormatError, "unknown field `flow`"),
        ({"pool": {"method": "no-mix"}}, RecipeError, "unknown mixing method 'no-mix'"),
        ({"inputs": {"flow": "x"}}, FormatError, "inputs"),
        ({"inputs": {"dataset": "0" * 64}}, CorruptError, "its inputs are"),
        ({"origin": {"config": {"path": "/etc"}}}, CorruptError, r"its origin contains locations of files \(path\)"),
        ({"origin": {"config": {"limits": 3}}}, FormatError, "settings that lsmix does not know: .*limits"),
        ({"origin": {"train_images": 1}}, CorruptError, "it mixes 2 sources of 1 training image"),
    ],
)
def test_a_hostile_or_damaged_plan_is_rejected(given, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        rebuild(altered(given.plan, **changes), data="digits", flow=given.flow, workspace=tmp_path / "w")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"{}", b"\xff\xfe", b'{"format_version": 1}', b" " * (2 << 20)]
)
def test_a_file_that_is_not_a_plan_is_rejected(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"is not (a|the) plan"):
        read_spec(path)
    with pytest.raises(MissingError, match="no plan at"):
        read_spec(tmp_path / "nothing.json")


def test_an_altered_plan_in_a_pool_is_rejected(given, tmp_path):
    pool = Path(shutil.copytree(given.original, tmp_path / "pool"))
    altered(pool / "plan.json", pool={"seed": 5}).replace(pool / "plan.json")
    with pytest.raises(CorruptError, match="was altered: its SHA-256 is not in"):
        rebuild(pool, data="digits", flow=given.flow, workspace=tmp_path / "w")


def test_existing_files_are_not_overwritten(given, tmp_path):
    (tmp_path / "there").write_bytes(b"")
    with pytest.raises(RecipeError, match="already exists and is not overwritten"):
        rebuild(given.plan, data="digits", flow=given.flow, out=tmp_path / "there")
    with pytest.raises(MissingError, match=r"the folder .* does not exist"):
        rebuild(given.plan, data="digits", flow=given.flow, out=tmp_path / "a" / "b")


def reforged(original, folder, levels, **environment):
    """Return a valid copy of a pool in which three pixels differ by ``levels``, optionally from another environment."""
    shutil.copytree(original, folder)
    store, pool = pool_store(folder), open_pool(folder)
    rows = store.shard_range(0)
    arrays = {name: values[rows.start : rows.stop] for name, values in pool.columns.items()}
    arrays["image"][3, 2, 2:5] ^= np.uint8(levels)  # a power of two changes a pixel by exactly this many levels
    write_pool_shard(folder, 0, arrays)
    reseal(folder, environment={**read_manifest(folder).environment, **environment})
    return folder


def test_pixels_from_another_kind_of_device_may_differ_by_one(given, tmp_path, command):
    other = reforged(given.original, tmp_path / "other", 1, device_kind="cuda")
    words = ("rebuild", given.plan, "--data", "digits", "--flow", given.flow, "--device", "cpu", "--quiet")
    result = command(*words, "--out", tmp_path / "pool", "--compare", other)
    assert result.code == 0, result.err
    assert "(differs from the original)" in result.out
    assert "3 of 38,400 pixels differ" in result.out
    assert (
        "in 1 of 600 images, by at most 1; image differs in 1 row, first in row 3; all labels, shares and sources"
        in result.out
    )
    comparison = compare_pools(open_pool(tmp_path / "pool"), open_pool(other)).to_dict()
    assert (comparison["pixels_differing"], comparison["columns"], comparison["largest"]) == (
        3,
        {"image": {"rows": 1, "first_row": 3}},
        1,
    )


@pytest.mark.parametrize(("levels", "how"), [(1, "despite the same kind of"), (2, "by more than another kind of")])
def test_differences_that_no_device_can_cause_are_rejected(given, tmp_path, command, levels, how):
    environment = {"device_kind": "cuda"} if "another" in how else {}
    other = reforged(given.original, tmp_path / "other", levels, **environment)
    words = ("rebuild", other / "plan.json", "--data", "digits", "--flow", given.flow, "--device", "cpu")
    result = command(*words, "--workspace", tmp_path / "w")
    assert result.code == 5
    assert f"differs from the original {str(other)!r} {how} device" in result.err


def test_another_digest_without_an_original_is_rejected(given, tmp_path, command):
    words = ("rebuild", given.plan, "--data", "digits", "--flow", given.flow, "--workspace", tmp_path / "w", "-q")
    result = command(*words, "--expect", "0123456789ab", "--device", "cpu")
    assert result.code == 5
    assert "expected 0123456789ab…. Name the original pool with '--compare'" in result.err
    assert command(*words, "--expect", given.content_digest[:16], "--device", "cpu").code == 0
    assert command(*words, "--expect", "xyz").code == 1
    text = command(*words, "--device", "cpu").out
    assert f"content digest  {given.content_digest} (no expected digest given)" in text
    assert "(already in the workspace)" in text


def test_only_pools_of_equal_shape_are_compared_in_every_column(given, finished_workspace, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    other = run(tmp_path / "r.toml", workspace=tmp_path / "runs", stage="mix")["mix/p"].folder
    with pytest.raises(RecipeError, match="cannot be compared"):
        compare_pools(open_pool(given.original), open_pool(other))
    zero = artifact_folder(finished_workspace, "mix", "zero")  # the same pairs, at another λ
    comparison = compare_pools(open_pool(given.original), open_pool(zero))
    assert {"lam", "share_b"} <= comparison.columns.keys()
    assert "source_a" not in comparison.columns
    assert not comparison.within(255)
    assert "lam differs in 600 rows, first in row 0" in comparison.text()


def test_the_built_in_flow_is_found_automatically(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(6) % 2)
    recipe = {
        "name": "x",
        "data": {"path": tmp_path / "x.npz", "test": 2},
        "flow": {"path": "natural-32"},
        "latents": {"batch_size": 2},
        "pools": {"p": {"copies": 1, "batch_size": 2}},
    }
    pool = run(recipe, workspace=tmp_path / "runs", stage="mix", device="cpu")["mix/p"]
    shutil.copytree(pool.folder, tmp_path / "received")
    data = tmp_path / "x.npz"
    assert verify(tmp_path / "received", deep=True, data=data, device="cpu")["deep"]["pixels_differing"] == 0
    made = rebuild(tmp_path / "received" / "plan.json", data=data, out=tmp_path / "again", device="cpu")
    assert made.content_digest == pool.manifest.content_digest
