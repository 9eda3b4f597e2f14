"""``verify`` detects forged rows in every column of a pool with valid checksums."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from factory import METHODS_RECIPE, reseal

from lsmix.classifiers.pixel_mixing import mix_images
from lsmix.data.artifact import read_manifest
from lsmix.data.errors import CorruptError, LsmixError, MissingError, RecipeError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, MixingMethod, row_rngs
from lsmix.data.pool import open_pool, pool_store, write_pool_shard
from lsmix.data.pool_spec import read_spec
from lsmix.glow.latent_mixing import mix_latents
from lsmix.pipeline.api import run, verify
from lsmix.pipeline.verify.rows import planned_shares

LATENT, PIXEL = LATENT_METHODS.builtin(), PIXEL_METHODS.builtin()
RECIPE = METHODS_RECIPE + "[mix]\nalpha = 0.7\ncopies = 2\nchunk_rows = 64\n"
POOLS = "".join(f'[pools.{method}]\nmethod = "{method}"\n' for method in (*LATENT, *PIXEL))
POOLS += "[pools.corners]\ncorner = 'random'\n[pools.end]\ncorner = 'bottom-right'\nlambdas = [0.0, 0.4, 1.0]\n"
POOLS += "[pools.three]\nsources = 3\nalpha = 1.0\n[pools.keep]\non_decode_failure = 'keep'\ntolerance = 0.0\n"
# Most images slightly exceed the pixel range, so many are redrawn and many replaced.
POOLS += "[pools.strict]\ntolerance = 0.02\nbad_pixel_fraction = 0.0\nattempts = 2\n[pools.never]\ntolerance = 0.02\nattempts = 0\n"
KINDS = [*LATENT, *PIXEL, "corners", "end", "three", "keep", "strict", "never"]


@pytest.fixture(scope="module")
def made(methods_workspace, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("checked") / "checked.toml"
    recipe.write_text(RECIPE + POOLS, encoding="utf-8")
    return run(recipe, workspace=methods_workspace, stage="mix", device="cpu")


@pytest.fixture
def given(made, tmp_path):
    """Return a function that copies a pool out of its workspace."""
    return lambda name: Path(shutil.copytree(made[f"mix/{name}"].folder, tmp_path / name))


def forge(folder, column, row, value):
    """Set a value in a row of a pool and update all checksums."""
    store = pool_store(folder)
    shard = row // store.chunk_rows
    rows = store.shard_range(shard)
    pool = open_pool(folder)
    arrays = {name: values[rows.start : rows.stop] for name, values in pool.columns.items()}
    arrays[column][row - rows.start] = value
    try:
        write_pool_shard(folder, shard, arrays)
    except ValueError:  # the writer rejects impossible values; a forger would use another writer
        store.write_shard(shard, arrays)
    reseal(folder)


def row_in_status(folder, status):
    return int(np.flatnonzero(open_pool(folder).status[:] == status)[0])


@pytest.mark.parametrize("name", KINDS)
def test_recomputed_pixels_are_equal_for_every_kind_of_pool(made, name):
    result = verify(made[f"mix/{name}"].folder, deep=True, sample=40, device="cpu")
    assert result["unchecked"] == []
    assert [line.partition(":")[0] for line in result["checked"]] == ["sources", "labels", "plan", "shares"]
    assert result["deep"]["rows"] == 40
    assert result["deep"]["same_device"]
    assert result["deep"]["pixels_differing"] == 0


def test_the_pools_have_rows_of_every_status(made):
    assert set(open_pool(made["mix/strict"].folder).status[:].tolist()) == {0, 1, 2}
    assert set(open_pool(made["mix/never"].folder).status[:].tolist()) == {0, 2}
    assert made["mix/keep"].manifest.counts["decode_failed"] > 0


def test_a_source_in_the_test_split_is_rejected_by_row_and_index(given, command):
    folder = given("ls-mix")
    images = read_spec(folder).origin.train_images
    forge(folder, "source_b", 97, images)
    with pytest.raises(
        CorruptError, match=rf"in row 97 source_b is {images}, .* rows 0 to {images - 1}; .* test image"
    ):
        verify(folder)
    result = command("verify", folder)
    assert (result.code, result.out) == (5, "")
    assert f"row 97 source_b is {images}" in result.err


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("ls-mix", "source_a", 3, "source_a is 3, but the plan has"),
        ("ls-mix", "source_b", 3, "source_b is 3, but the plan has"),
        ("ls-mix", "source_a", -1, "source_a is -1, but the training split has rows"),
        ("ls-mix", "lam", 0.625, "lam is 0.625, but the plan has"),
        ("ls-mix", "lam", np.nan, "lam is nan, but must be from 0 to 1"),
        ("ls-mix", "share_b", 0.015625 * 33, "share_b is 0.515625, but the plan has"),
        ("ls-mix", "share_b", 1.5, "share_b is 1.5, but must be from 0 to 1"),
        ("ls-mix", "status", 1, "none of the attempts 1 to 3"),
        ("ls-mix", "status", 2, "(replaced rows have share 0|the plan has)"),
        ("ls-mix", "status", 7, "status is 7, but must be from 0 to 2"),
        ("ls-mix", "label_a", 11, "label_a is 11, but the classes are 0 to 9"),
        ("cutmix", "share_b", 0.2, "share_b is 0.2.*, but the plan has"),
        ("cutmix", "status", 1, "no row is redrawn, since mixing pixels never fails"),
        ("keep", "status", 1, "no row is redrawn, since on_decode_failure is 'keep'"),
        ("bern-mix", "share_b", 0.25, "share_b is 0.25, but the plan has"),
        ("linear", "share_b", 0.25, "share_b is 0.25, but the plan has"),
        ("corners", "corner", 4, "corner is 4, but must be from 0 to 3"),
        ("end", "corner", 0, "corner is 0, but the plan has 3"),
        ("three", "source_more", 500, r"source_more\[0\] is 500, but the training split"),
        ("three", "lam_more", 0.125, r"lam_more\[0\] is 0.125, but the plan has"),
        ("three", "share_more", 0.125, r"share_more\[0\] is 0.125, but the plan has"),
    ],
)
def test_a_forged_value_is_rejected_by_row_and_value(given, name, column, value, message):
    folder = given(name)
    row = int(np.flatnonzero(open_pool(folder).status[:] == 0)[-3])
    forge(folder, column, row, value)
    with pytest.raises(CorruptError, match=rf"in row {row} (source_b is \[|.*){message}"):
        verify(folder)


def test_random_corners_are_checked_against_the_plan(given):
    folder = given("corners")
    corner = int(open_pool(folder).columns["corner"][40])
    forge(folder, "corner", 40, (corner + 1) % 4)
    with pytest.raises(CorruptError, match=f"in row 40 corner is {(corner + 1) % 4}, but the plan has {corner}"):
        verify(folder)


@pytest.mark.parametrize("column", ["label_a", "label_b"])
def test_each_training_image_must_have_a_single_label(given, made, column):
    folder = given("ls-mix")
    pool = open_pool(folder)
    wrong = (int(pool.columns[column][130]) + 1) % 10
    image = int(pool.columns["source" + column[-2:]][130])
    forge(folder, column, 130, wrong)
    with pytest.raises(CorruptError, match=rf"has label \d for the same training image {image}") as without:
        verify(folder)
    assert "row 130" in str(without.value)
    # With the base set, the error names the wrong label.
    message = rf"in row 130 {column} is {wrong}, but the data set .* has label \d for the same training image {image}"
    with pytest.raises(CorruptError, match=message):
        verify(folder, data=made["ingest"].folder)


def test_consistently_wrong_labels_are_detected_only_with_the_data_set(given, made):
    folder = given("mixup")
    store, pool = pool_store(folder), open_pool(folder)
    for shard in range(store.shards):
        rows = store.shard_range(shard)
        arrays = {name: values[rows.start : rows.stop] for name, values in pool.columns.items()}
        for column in ("label_a", "label_b"):
            arrays[column] = (arrays[column] + 1) % 10
        write_pool_shard(folder, shard, arrays)
    reseal(folder)
    assert any("name it with --data" in line for line in verify(folder)["unchecked"])
    with pytest.raises(CorruptError, match="in row 0 label_a"):
        verify(folder, data=made["ingest"].folder / "dataset.h5")


@pytest.mark.parametrize("status", [1, 2])
def test_forged_redrawn_and_replaced_rows_are_rejected(given, status):
    folder = given("strict")
    row = row_in_status(folder, status)
    forge(folder, "lam", row, 0.3125)
    with pytest.raises(CorruptError, match=f"in row {row} "):
        verify(folder)


def test_a_replaced_row_must_have_share_zero(given):
    folder = given("strict")
    row = row_in_status(folder, 2)
    forge(folder, "share_b", row, 0.5)
    with pytest.raises(CorruptError, match=f"in row {row} share_b is 0.5, but replaced rows have share 0"):
        verify(folder)


def test_a_changed_pixel_is_detected_only_by_the_deep_check(given, made):
    folder = given("three")
    image = open_pool(folder).image[31]
    image[2, 3] ^= 1
    forge(folder, "image", 31, image)
    flow, data = made["train-glow"].folder, made["ingest"].folder
    assert any("--deep" in line for line in verify(folder)["unchecked"])
    with pytest.raises(
        CorruptError, match=r"1 of [\d,]+ pixels differ .* by at most 1; image differs in 1 row, first in row 31"
    ):
        verify(folder, deep=True, sample=10_000, data=data, flow=flow, device="cpu")
    reseal(folder, environment={**read_manifest(folder).environment, "device_kind": "cuda"})
    result = verify(folder, deep=True, sample=10_000, data=data, flow=flow, device="cpu")
    assert not result["deep"]["same_device"]
    assert (result["deep"]["pixels_differing"], result["deep"]["largest"]) == (1, 1)
    image[2, 3] ^= 4
    forge(folder, "image", 31, image)
    with pytest.raises(CorruptError, match="on another kind of device"):
        verify(folder, deep=True, sample=10_000, data=data, flow=flow, device="cpu")


def test_pixel_space_pools_must_be_equal_on_every_device(given, made):
    folder = given("mixup")
    image = open_pool(folder).image[5]
    image[0, 0] ^= 1
    forge(folder, "image", 5, image)
    reseal(folder, environment={})
    with pytest.raises(CorruptError, match="first in row 5"):
        verify(folder, deep=True, sample=10_000, data=made["ingest"].folder)


def test_the_seed_determines_the_sample(given, made):
    folder = given("fmix")
    image = open_pool(folder).image[8]
    image[0, 0] ^= 1
    forge(folder, "image", 8, image)
    found = []
    for seed in (0, 1, 2, 3, 0, 1, 2, 3):
        try:
            verify(folder, deep=True, sample=100, seed=seed, data=made["ingest"].folder)
        except CorruptError:
            found.append(seed)
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    assert 0 < len(found) < 8


@pytest.mark.parametrize("dequantise", ["uniform", "center"])
def test_a_deep_check_encodes_images_like_the_encode_stage(methods_workspace, tmp_path, dequantise):
    (tmp_path / "r.toml").write_text(RECIPE + "[pools.p]\n", encoding="utf-8")
    options = [f"latents.dequantise={dequantise}", "latents.seed=3"]
    result = run(tmp_path / "r.toml", workspace=methods_workspace, stage="mix", device="cpu", overrides=options)
    pool = shutil.copytree(result["mix/p"].folder, tmp_path / "given")
    result = verify(pool, deep=True, sample=60, data=Path("digits"), flow=result["train-glow"].folder, device="cpu")
    assert result["deep"]["pixels_differing"] == 0
    assert "labels: equal to those of the data set 'digits'" in result["checked"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": {"seed": 1}}, "its configured seed is 0, but plan.json says 1"),
        ({"pool": {"alpha": 0.5}}, "its configured alpha is 0.7, but plan.json says 0.5"),
        ({"origin": {"train_images": 120}}, "its images_per_copy is 150, but plan.json says 120"),
        ({"origin": {"licence": "mine"}}, "its origin is"),
        ({"inputs": {"flow": "0" * 64}}, "its content digest of its flow is"),
        ({"dim": None}, "is inconsistent"),
        ({"stage_version": 1}, "its stage_version is 5, but plan.json says 1"),
    ],
)
def test_a_plan_of_another_pool_is_rejected(given, change, message):
    folder = given("ls-mix")
    path = folder / "plan.json"
    plan = msgspec.json.decode(path.read_bytes())
    for name, value in change.items():
        plan[name] = {**plan[name], **value} if isinstance(value, dict) else value
    path.write_bytes(msgspec.json.encode(plan))
    reseal(folder)
    with pytest.raises(CorruptError, match=message):
        verify(folder)


def test_counts_that_contradict_the_rows_are_rejected(given):
    folder = given("strict")
    counts = read_manifest(folder).counts
    reseal(folder, counts={**counts, "redrawn": 0})
    with pytest.raises(CorruptError, match="counts 0 rows as 'redrawn', but"):
        verify(folder)
    reseal(folder, counts={**counts, "decode_failed_rows": counts["decode_failed_rows"][1:]})
    with pytest.raises(CorruptError, match=f"do not match the column status: {counts['decode_failed_rows'][0]}"):
        verify(folder)


def test_verify_lists_what_it_cannot_check_without_a_plan(given, command):
    folder = given("ls-mix")
    (folder / "plan.json").unlink()
    reseal(folder)
    assert any(line.startswith("plan: this pool has no plan.json") for line in verify(folder)["unchecked"])
    assert "not checked  plan: this pool has no" in command("verify", folder).out
    with pytest.raises(RecipeError, match=r"cannot be compared .* has no plan\.json"):
        verify(folder, deep=True)
    forge(folder, "source_a", 9, 150)
    with pytest.raises(CorruptError, match="in row 9 source_a is 150"):
        verify(folder)


def test_a_plan_of_another_version_of_the_stage_is_not_checked(given):
    folder = given("ls-mix")
    plan = msgspec.json.decode((folder / "plan.json").read_bytes())
    (folder / "plan.json").write_bytes(msgspec.json.encode({**plan, "stage_version": 1}))
    reseal(folder, stage_version=1)
    assert any("drawn by version 1 of stage 'mix'" in line for line in verify(folder)["unchecked"])


def test_deep_check_errors_name_missing_inputs(given, made):
    folder, flow = given("ls-mix"), made["train-glow"].folder
    with pytest.raises(MissingError, match=r"the flow of the pool was not found\. Name it with '--flow'"):
        verify(folder, deep=True, data=made["ingest"].folder, device="cpu")
    with pytest.raises(MissingError, match="the data set of the pool was not found"):
        verify(folder, deep=True, flow=flow, device="cpu")
    with pytest.raises(RecipeError, match="is the result of stage 'train-glow'; these options"):
        verify(flow, deep=True)
    with pytest.raises(MissingError, match="is not a flow: it is an artifact of the stage 'ingest'"):
        verify(folder, flow=made["ingest"].folder)
    with pytest.raises(RecipeError, match="mixes pixels and needs no flow"):
        verify(given("mixup"), flow=flow)


@pytest.mark.parametrize("depends_on_content", [False, True])
def test_a_method_of_another_package_is_checked_if_possible(given, monkeypatch, depends_on_content):
    from lsmix.classifiers import pixel_mixing

    def method(x1, x2, lam, draws):
        mixed, share = pixel_mixing.mixup(x1, x2, lam, draws)
        return mixed, share * (x1.double().mean(dim=(1, 2, 3)) / 255 if depends_on_content else 1.0)

    folder = given("mixup")
    monkeypatch.setattr(PIXEL_METHODS, "builtin", list)
    monkeypatch.setattr(PIXEL_METHODS, "load", lambda _name: method)
    monkeypatch.setattr(PIXEL_METHODS, "entry", lambda name: MixingMethod(function="", title=name))
    result = verify(folder)
    if depends_on_content:
        assert any("depends on the images" in line for line in result["unchecked"])
    else:
        assert "shares: match 'mixup' at each λ" in result["checked"]
        forge(folder, "share_b", 7, 0.25)
        with pytest.raises(CorruptError, match=r"in row 7 share_b is 0\.25"):
            verify(folder)


def test_a_method_that_is_not_installed_is_not_checked(given, monkeypatch):
    monkeypatch.setattr(PIXEL_METHODS, "_builtin", {})
    result = verify(given("mixup"))
    assert "shares: the method 'mixup' is not installed; install its package" in result["unchecked"]


@pytest.mark.parametrize("method", [*LATENT, *PIXEL])
def test_planned_shares_equal_the_shares_that_methods_return(made, method):
    plan = read_spec(made[f"mix/{method}"].folder)
    lam = np.concatenate([np.random.default_rng(0).random(300), np.arange(65) / 64, [1e-12, 1 - 1e-12]])
    draws = row_rngs(5, "shares")
    shares = planned_shares(plan, (8, 8, 1), lam[:, None], draws)
    if plan.latent:
        zeros = np.zeros((len(lam), 64), np.float32)
        expected = mix_latents(method, zeros, zeros, lam, draws=draws)[1]
    else:
        images = np.zeros((len(lam), 8, 8, 1), np.uint8)
        expected = mix_images(method, images, images, lam, draws=draws)[1]
    np.testing.assert_array_equal(shares[:, 0], expected)


def test_selected_rows_of_a_plan_match_the_complete_plan(made):
    from lsmix.pipeline.stages.pair_sampler import PairSampler

    plan = read_spec(made["mix/three"].folder)
    complete = PairSampler(plan.pool, 150).pairs(np.arange(300))
    rows = np.array([0, 3, 149, 150, 151, 299])
    for picked, column in zip(PairSampler(plan.pool, 150).pairs(rows), complete, strict=True):
        np.testing.assert_array_equal(picked, column[rows])


def test_verify_prints_a_json_document_or_a_line_per_check(made, command):
    folder = made["mix/strict"].folder
    text = command("verify", folder, "--deep", "--sample", "20", "--device", "cpu").out
    assert "checked     plan: sources, λ and corners match plan.json" in text
    assert "recomputed  20 rows, 0 of 1,280 pixels differ" in text
    document = msgspec.json.decode(command("verify", folder, "--json").out)
    assert document["schema"] == "lsmix/verify/1"
    assert document["content"]["deep"] is None
    assert "checked" not in verify(made["ingest"].folder)
    assert issubclass(CorruptError, LsmixError)
