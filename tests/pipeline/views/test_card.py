"""The card of a pool is correct and can be parsed, its code examples run, and hostile text is escaped."""

import csv
import hashlib
import os
import re
import shutil
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from factory import reseal, write_pool
from PIL import Image

from lsmix import __version__
from lsmix.data.artifact import (
    DESCRIPTION_FILES,
    MANIFEST_NAME,
    content_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, FormatError, MissingError, RecipeError
from lsmix.data.pool import STATUSES, open_pool
from lsmix.data.rng import generator
from lsmix.pipeline.api import export_pool, verify
from lsmix.pipeline.views.dataset_card import card, samples
from lsmix.pipeline.views.dataset_card.card import write_card
from lsmix.pipeline.views.dataset_card.statistics import card_statistics

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = [
    '"]}: <script>alert(1)</script>',
    "| a | *b* [c](http://d) `e`\n---\nlicense: mit",
    "NA",
    "=1+1",
    "\u202e\x00\x85x",
    "🦊 ë",
]


@pytest.fixture(scope="module")
def pool_folder(finished_workspace):
    """Return a pool as the mix stage wrote it. Do not modify it."""
    (folder,) = (finished_workspace / "mix").glob("lsmix-*")
    return folder


@pytest.fixture(scope="module")
def made(pool_folder, tmp_path_factory):
    """Return the card of that pool. Do not modify it."""
    folder = tmp_path_factory.mktemp("card") / "made"
    write_card(pool_folder, folder)
    return folder


@pytest.fixture
def pool_copy(pool_folder, tmp_path):
    """Return a modifiable copy of the pool outside its workspace."""
    return Path(shutil.copytree(pool_folder, tmp_path / "pool_copy"))


def card_of(pool, **options):
    """Write the card of a pool next to it."""
    return Path(write_card(pool, pool.with_name(f"{pool.name}-card"), **options)["folder"])


def foreign_pool(folder, *, sources=2, names=tuple(HOSTILE), **words):
    """Write a pool of 200 rows that was not made by a recipe, without a card."""
    origin = {
        "content_digest": "ab" * 32,
        "config": {"seed": 3, "<i>": "|"},
        "licence": words.pop("licence", ""),
        "citation": words.pop("citation", ""),
        "train_images": 100,
    }
    size = {"rows": 200, "chunk_rows": 200, "image_shape": (4, 4, 3), "corners": sources > 2}
    fields = {"method": "ls-mix", "name": "a: <b>|pool</b>", "stage_version": 2, **words}
    return write_pool(folder, class_names=names, sources=sources, origin=origin, **size, **fields)


def front_matter(folder):
    _, head, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head)


def croissant_of(folder):
    return msgspec.json.decode((folder / "croissant.json").read_bytes())


def table_of(folder):
    with (folder / "samples.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Files of the mix stage and of the card.


def test_a_pool_has_a_readme_and_notices_that_do_not_affect_its_content_digest(pool_folder):
    manifest = read_manifest(pool_folder)
    described = {file.path for file in manifest.files if not file.payload and not file.path.endswith("zarr.json")}
    assert described == {"README.md", "LICENSES/images.txt", "LICENSES/lsmix.txt"} <= set(DESCRIPTION_FILES)
    assert manifest.content_digest == content_digest(manifest.files)
    assert verify(pool_folder)["edited"] == []
    text = (pool_folder / "README.md").read_text(encoding="utf-8")
    for heading in ("Columns", "Classes", "Licence", "How to cite", "How to load it"):
        assert f"\n## {heading}\n" in text
    assert not re.search(r"Statistics|card\.png|samples\.csv|croissant", text)
    assert front_matter(pool_folder)["license"] == "cc-by-4.0"


def test_a_card_is_a_separate_artifact_and_leaves_the_pool_unchanged(pool_folder, tmp_path):
    def times():
        return {str(path): path.stat().st_mtime_ns for path in [pool_folder, *pool_folder.rglob("*")]}

    before = times()
    facts = write_card(pool_folder, tmp_path / "card", creator="Ann")
    assert times() == before
    manifest = read_manifest(tmp_path / "card")
    assert facts["files"] == sorted(DESCRIPTION_FILES) == [file.path for file in manifest.files]
    assert manifest.inputs[0].content_digest == facts["content_digest"] == read_manifest(pool_folder).content_digest
    assert manifest.config == {"licence": "CC BY 4.0", "creator": "Ann"}
    assert verify(tmp_path / "card")["stage"] == "card"


def test_the_same_pool_gives_the_same_card(pool_folder, made, tmp_path):
    write_card(pool_folder, tmp_path / "again")
    for name in DESCRIPTION_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()


def test_a_pool_without_a_licence_can_be_made_and_every_document_says_so(tmp_path, command):
    draws = generator(0, "test", "licence")
    images, labels = draws.integers(256, size=(40, 8, 8, 1)).astype(np.uint8), draws.integers(3, size=40)
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    recipe = tmp_path / "own.toml"
    data = 'path = "own.npz"\ntest = 10\ntitle = "My shapes"\nurl = "https://example.org/shapes"\n'
    recipe.write_text(f'name = "own"\n[data]\n{data}[pools.mixed]\nmethod = "mixup"\n', encoding="utf-8")
    result = command("mix", recipe, "--workspace", tmp_path / "runs")
    assert result.code == 0
    assert "No licence" not in result.err
    (pool,) = (tmp_path / "runs" / "mix").glob("mixed-*")
    warning = "warning: No licence is recorded for these images. Set data.licence in the recipe."
    assert command("push", pool, tmp_path / "pushed").err.count(warning) == 1
    assert command("export", pool, tmp_path / "exported", "--format", "hdf5").err.count(warning) == 1
    bare = card_of(pool)
    for folder in (pool, bare):
        assert front_matter(folder)["license"] == "unknown"
        assert "> **No licence is recorded for these images." in (folder / "README.md").read_text(encoding="utf-8")
        assert "No licence is recorded" in (folder / "LICENSES" / "images.txt").read_text(encoding="utf-8")
        assert "no flow was used" in (folder / "README.md").read_text(encoding="utf-8")
        assert "images of My shapes" in (folder / "README.md").read_text(encoding="utf-8")
    assert croissant_of(bare)["license"]["name"] == "unknown"
    assert croissant_of(bare)["prov:wasDerivedFrom"][0]["sc:url"] == "https://example.org/shapes"
    assert "mixup: Beyond Empirical Risk Minimization" in croissant_of(bare)["citeAs"]

    assert command("card", pool, tmp_path / "named", "--licence", "cc by-nc 4.0").code == 0
    named = tmp_path / "named"
    assert front_matter(named)["license"] == "cc-by-nc-4.0"
    assert croissant_of(named)["license"] == "https://spdx.org/licenses/CC-BY-NC-4.0"
    assert "No licence" not in (named / "README.md").read_text(encoding="utf-8")
    verify(named)


# Correctness of the card.


def test_the_front_matter_has_the_fields_that_the_hub_reads(made):
    head = front_matter(made)
    assert head["license"] == "cc-by-4.0"
    assert head["task_categories"] == ["image-classification"]
    assert head["size_categories"] == ["n<1K"]
    assert head["configs"] == [{"config_name": "samples", "data_files": ["samples.csv"]}]
    assert "ls-mix" in head["tags"]


def test_hugging_face_datasets_loads_the_table_from_the_front_matter(made, pool_folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = datasets.load_dataset(str(made), "samples", cache_dir=str(tmp_path))["train"]
    assert table["source_a"][:] == open_pool(pool_folder).source_a[:].tolist()


@pytest.mark.parametrize("sources", [2, 4])
def test_the_example_shows_the_values_of_its_row(sources, tmp_path):
    folder = foreign_pool(tmp_path / "pool", sources=sources, names=("cat", "dog", "fox"))
    text, pool = (card_of(folder) / "README.md").read_text(encoding="utf-8"), open_pool(folder)
    row = int(re.findall(r"For example, row (\d+):", text)[0])
    sample = pool[row]
    loss = re.findall(r"    loss = (.*)\n", text)[0]
    terms = [
        (float(weight), int(label)) for weight, label in re.findall(r"([\d.]+) · cross_entropy\(logits, (\d+)\)", loss)
    ]
    expected = [(sample.share_b, sample.label_b), *((more.share, more.label) for more in sample.more)]
    assert [label for _, label in terms] == [sample.label_a, *(label for _, label in expected)]
    np.testing.assert_allclose([weight for weight, _ in terms[1:]], [weight for weight, _ in expected], atol=1e-6)
    assert abs(sum(weight for weight, _ in terms) - 1) < 1e-5  # six decimals each
    assert f"| x1 | {sample.label_a} | {pool.class_names[sample.label_a]} | {sample.source_a} |" in text


def test_the_statistics_match_the_columns(tmp_path):
    pool = open_pool(foreign_pool(tmp_path / "pool", sources=3, names=("cat", "dog")))
    facts = card_statistics(pool, 0, None)
    assert [(name, count) for name, count, _ in facts.events] == [
        (name, int((pool.status[:] == number).sum())) for number, name in enumerate(STATUSES)
    ]
    for low, high, lam, share in facts.bins[:-1]:
        assert lam == ((pool.lam[:] >= low) & (pool.lam[:] < high)).sum()
        assert share == ((pool.share_b[:] >= low) & (pool.share_b[:] < high)).sum()
    assert sum(share for _, _, _, share in facts.bins) == len(pool)
    for label, (_, first, second) in enumerate(facts.classes):
        assert (first, second) == ((pool.label_a[:] == label).sum(), (pool.label_b[:] == label).sum())


def loading_blocks():
    text = (ROOT / "pipeline" / "views" / "dataset_card" / "card.md.j2").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(?:import sys\n\n)?(import \w+)", text, re.MULTILINE)


@pytest.mark.parametrize("place", range(4), ids=loading_blocks())
def test_the_code_that_loads_the_pool_runs(place, made, pool_folder, monkeypatch):
    code = re.findall(
        r"^```python\n(.*?)^```", (made / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(code) == 4
    for module in re.findall(r"^(?:import|from) (\w+)", code[place], re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.setattr("sys.argv", ["load.py", str(pool_folder)])
    names = {}
    with warnings.catch_warnings():
        if "dask" in code[place]:
            warnings.simplefilter("ignore")
        exec(compile(code[place], "README.md", "exec"), names)
    pool = open_pool(pool_folder)
    if "np" in names:
        count = min(len(names["images"]), len(pool))
        np.testing.assert_array_equal(names["images"][:count], pool.image[:count])
    elif "dask" in names:
        assert names["mean"] == pytest.approx(pool.image[:].mean(axis=(0, 1, 2)))
    elif "zarr" in names:
        np.testing.assert_array_equal(names["share_b"], pool.share_b[:])
    else:
        assert len(names["images"]) > 0


def test_the_loading_code_for_more_than_two_sources_yields_soft_labels(tmp_path, monkeypatch):
    folder = foreign_pool(tmp_path / "pool", sources=3, names=("cat", "dog"))
    code = re.findall(
        r"^```python\n(.*?)^```", (card_of(folder) / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    monkeypatch.setattr("sys.argv", ["load.py", str(folder)])
    names = {}
    exec(compile(code[0], "README.md", "exec"), names)
    assert names["targets"].shape[1] == 2


@pytest.mark.parametrize("sources", [2, 4])
def test_the_table_contains_the_exact_values_of_every_column_except_the_pixels(sources, tmp_path):
    folder = foreign_pool(tmp_path / "pool", sources=sources)
    pool, table = open_pool(folder), table_of(card_of(folder))
    assert [int(line["row"]) for line in table] == list(range(len(pool)))
    for name in ("source_a", "source_b", "label_a", "label_b"):
        assert [int(line[name]) for line in table] == pool.columns[name][:].tolist()
    for name in ("lam", "share_b"):
        np.testing.assert_array_equal(
            np.array([line[name] for line in table]).astype(np.float32), pool.columns[name][:]
        )
    assert [line["status"] for line in table] == [STATUSES[status] for status in pool.status[:]]
    for line, sample in zip(table, pool, strict=True):
        for place, more in enumerate(sample.more, start=3):
            assert (int(line[f"source_{place}"]), int(line[f"label_{place}"])) == (more.source, more.label)
            assert np.float32(line[f"share_{place}"]) == np.float32(more.share)
        assert line.get("corner", "top-left") == sample.corner


def test_the_table_names_the_file_and_row_of_every_image(made, pool_folder):
    pool = open_pool(pool_folder)
    chunk_rows = pool.columns.table.chunk_rows
    for line in table_of(made):
        assert (pool_folder / line["image"]).is_file()
        assert int(line["image"].split("/")[3]) * chunk_rows + int(line["image_row"]) == int(line["row"]) < len(pool)


def test_the_table_does_not_depend_on_the_block_size(made, pool_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_BLOCK_ROWS", 7)
    samples.write_samples(open_pool(pool_folder), tmp_path / "again.csv", in_zarr=True)
    assert (tmp_path / "again.csv").read_bytes() == (made / "samples.csv").read_bytes()


def test_the_picture_shows_the_source_images_if_the_data_set_is_available(
    finished_workspace, pool_folder, made, pool_copy
):
    with Image.open(made / "card.png") as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    (dataset,) = (finished_workspace / "ingest").glob("*")
    from lsmix.pipeline.views.images import GRID_TITLES, image_grid, sample_grid

    expected = image_grid(
        sample_grid(open_pool(pool_folder), open_dataset(dataset).train.images, 4), scale=6, column_titles=GRID_TITLES
    )
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    without_sources = card_of(pool_copy)
    assert (without_sources / "card.png").is_file()
    assert "ordered by the share" in (without_sources / "README.md").read_text(encoding="utf-8")


def test_images_that_are_neither_grey_nor_rgb_have_a_card_without_a_picture(tmp_path):
    origin = {"content_digest": "ab" * 32, "config": {}, "licence": "MIT", "citation": "", "train_images": 8}
    pool = write_pool(
        tmp_path / "pool", rows=8, copies=1, image_shape=(4, 4, 2), method="cutmix", origin=origin, stage_version=2
    )
    folder = card_of(pool)
    assert not (folder / "card.png").exists()
    assert "card.png" not in (folder / "README.md").read_text(encoding="utf-8")
    verify(folder)


def test_the_mit_licence_and_the_citations_match_the_repository(made):
    notice = (made / "LICENSES" / "lsmix.txt").read_text(encoding="utf-8")
    assert notice.endswith((ROOT / "LICENSE").read_text(encoding="utf-8"))
    assert "does not cover any image" in notice
    cited, digest = croissant_of(made)["citeAs"], read_manifest(made).inputs[0].content_digest
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["references"][0]["title"] in cited
    assert all(author["family-names"] in cited for author in cff["references"][0]["authors"])
    assert f"lsmix, version {__version__}; pool with content digest {digest}" in cited


# Croissant.


@pytest.mark.parametrize("kind", ["made", "foreign", "export"])
def test_croissant_validates_and_its_record_sets_iterate(kind, made, pool_folder, tmp_path):
    mlcroissant = pytest.importorskip("mlcroissant")
    source = foreign_pool(tmp_path / "pool", sources=3) if kind == "foreign" else pool_folder
    folder = tmp_path / "out"
    if kind == "export":
        export_pool(source, folder, format="hdf5")
    else:
        write_card(source, folder, creator="Ann" if kind == "foreign" else "")
    pool = open_pool(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rdflib and pandas
        dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
        classes = list(dataset.records("classes"))
        samples = list(dataset.records("samples"))
        statuses = list(dataset.records("statuses"))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert all("datePublished" in warning for warning in issues.warnings)  # lsmix does not know the date
    assert str(dataset.metadata.ctx.conforms_to.value) == "http://mlcommons.org/croissant/1.1"
    assert [record["classes/name"] for record in classes] == list(pool.class_names)
    assert [record["statuses/name"] for record in statuses] == list(STATUSES)
    assert [record["samples/row"] for record in samples] == list(range(len(pool)))
    for name in ("label_a", "label_b", "source_a", "source_b"):
        assert [record[f"samples/{name}"] for record in samples] == pool.columns[name][:].tolist()
    share = np.array([record["samples/share_b"] for record in samples]).astype(np.float32)
    np.testing.assert_array_equal(share, pool.share_b[:])


def test_croissant_has_the_required_fields_and_the_checksum_of_every_file(made, pool_folder):
    document = croissant_of(made)
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    for name in ("@context", "@type", "name", "description", "license", "url", "distribution", "recordSet", "citeAs"):
        assert document[name]
    assert "datePublished" not in document
    files = {item["contentUrl"]: item for item in document["distribution"]}
    listed = {file.path for folder in (made, pool_folder) for file in read_manifest(folder).files}
    assert set(files) == listed - {"croissant.json"}
    for path, item in files.items():
        where = (made if path in DESCRIPTION_FILES else pool_folder) / path
        assert item["sha256"] == hashlib.sha256(where.read_bytes()).hexdigest()
        assert item["contentSize"] == f"{where.stat().st_size} B"
    sources = document["prov:wasDerivedFrom"]
    assert [source["prov:label"] for source in sources] == ["The base set, 300 training images", "The Glow flow"]


# Hostile text.


def test_hostile_text_is_escaped_in_every_file(tmp_path):
    name = " ".join(HOSTILE[1].split())  # manifests with unprintable names are rejected
    words = {"licence": HOSTILE[1], "citation": HOSTILE[0], "name": name, "method": HOSTILE[0]}
    folder = card_of(foreign_pool(tmp_path / "pool", **words), creator=HOSTILE[0] + HOSTILE[4])
    verify_files(folder, read_manifest(folder))
    head, text = front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert head["license"] == "other"
    assert head["license_name"] == " ".join(HOSTILE[1].split())
    assert HOSTILE[0] in head["tags"]
    assert head["pretty_name"].startswith(name)
    body = text.split("---\n", 2)[2]
    assert "<script" not in body
    assert "](http://d)" not in re.sub(r"\\\]", "", body)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    table = [line for line in body.splitlines() if line.startswith("| 1 | ")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [5]  # no more cells than the header
    document = croissant_of(folder)
    assert document["creator"]["name"] == HOSTILE[0] + HOSTILE[4]
    assert [row["classes/name"] for row in document["recordSet"][0]["data"]] == HOSTILE
    notice = (folder / "LICENSES" / "images.txt").read_text(encoding="utf-8")
    assert "\nlicense: mit" not in notice
    assert not any(word in (folder / "samples.csv").read_text(encoding="utf-8") for word in ("script", "=1+1"))


@pytest.mark.parametrize(
    ("column", "value"), [("label_a", 99), ("label_b", -1), ("share_b", np.nan), ("lam", 1.5), ("status", 9)]
)
def test_numbers_out_of_range_are_rejected_and_leave_no_card(column, value, pool_copy):
    pool = open_pool(pool_copy)
    store = pool.columns.table
    arrays = {name: pool.columns[name][: store.chunk_rows] for name in pool.columns}
    arrays[column][5] = value
    store.write_shard(0, arrays)
    reseal(pool_copy)
    with pytest.raises(CorruptError, match=f"in row 5 {column} is"):
        card_of(pool_copy, licence="MIT")
    assert list(pool_copy.parent.iterdir()) == [pool_copy]


@pytest.mark.parametrize("content", [b"{", b'{"stage_version": 2}', b"[" * (2 << 20)], ids=["cut", "fields", "long"])
def test_a_damaged_plan_is_rejected(content, tmp_path):
    folder = foreign_pool(tmp_path / "pool")
    (folder / "plan.json").write_bytes(content)
    reseal(folder)
    with pytest.raises(FormatError, match=r"plan\.json"):
        card_of(folder)


# Damage and interrupts.


def test_a_damaged_pool_gets_no_card(pool_copy):
    shard = pool_copy / "pool.zarr/image/c/0/0/0/0"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CorruptError, match="is damaged"):
        card_of(pool_copy, licence="MIT")
    assert list(pool_copy.parent.iterdir()) == [pool_copy]


@pytest.mark.parametrize("at", range(5))
def test_an_interrupted_card_leaves_nothing(at, pool_copy, monkeypatch):
    writes = 0

    def failing(name, write):
        def call(*args, **options):
            nonlocal writes
            if writes == at:
                raise KeyboardInterrupt
            writes += 1
            return write(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("write_atomic", "write_samples", "write_readme", "write_manifest"):
            patched.setattr(card, name, failing(name, getattr(card, name)))
        with pytest.raises(KeyboardInterrupt):
            card_of(pool_copy)
    assert list(pool_copy.parent.iterdir()) == [pool_copy]
    verify(card_of(pool_copy))


def test_a_card_does_not_overwrite_an_existing_folder(pool_copy):
    card_of(pool_copy)
    with pytest.raises(RecipeError, match="already exists and is not overwritten"):
        card_of(pool_copy)


def test_shards_missing_from_the_manifest_are_rejected(pool_copy):
    manifest = read_manifest(pool_copy)
    files = [file for file in manifest.files if not file.path.startswith("pool.zarr/lam/c/")]
    write_manifest(pool_copy, msgspec.structs.replace(manifest, files=files, content_digest=content_digest(files)))
    with pytest.raises(CorruptError):
        card_of(pool_copy)


def test_only_finished_pools_have_a_card(finished_workspace, pool_copy):
    (dataset,) = (finished_workspace / "ingest").glob("*")
    with pytest.raises(FormatError, match=r"Only pools have a card; .* stage 'ingest'"):
        write_card(dataset, pool_copy.parent / "card")
    (pool_copy / MANIFEST_NAME).unlink()
    with pytest.raises(MissingError):
        write_card(pool_copy, pool_copy.parent / "card")


def test_the_command_lists_the_written_files(pool_copy, command, monkeypatch):
    monkeypatch.chdir(pool_copy.parent)
    shown = command("card", pool_copy, "--licence", "my own terms")
    assert shown.code == 0
    assert "licence     my own terms" in shown.out
    assert "README.md" in shown.out
    assert read_manifest("pool_copy-card").config["licence"] == "my own terms"
    answer = msgspec.json.decode(command("card", pool_copy, "again", "--json").out)
    assert answer["schema"] == "lsmix/card/1"
    (documented,) = (
        line for line in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines() if "lsmix/card/1" in line
    )
    assert all(f"`{name}`" in documented for name in answer["content"])
    assert command("card", pool_copy / "nothing").code == 1
