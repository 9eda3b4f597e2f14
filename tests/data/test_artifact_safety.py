"""The files that an artifact may contain, and the memory that reading a hostile one may take."""

import hashlib
import json
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from factory import reseal, write_pool
from guarded import sealed_again
from places import TESTS

from lsmix.data.artifact import (
    ARTIFACT_FILES,
    FileRecord,
    Manifest,
    content_digest,
    is_expected_path,
    parse_manifest,
    read_manifest,
    record_files,
    write_manifest,
)
from lsmix.data.atomic import add_checksum, dump_checksummed
from lsmix.data.errors import CorruptError, FormatError
from lsmix.data.pool import open_pool
from lsmix.data.progress import NullProgress
from lsmix.data.sharing.transfer import push_artifact
from lsmix.data.table import Column, Table
from lsmix.pipeline.api import pull, push, verify
from lsmix.pipeline.stages.registry import STAGES

CODE = (
    "lsmix.py",
    "zarr.py",
    "numpy/__init__.py",
    "lsmix.so",
    "site.pth",
    "pool.zarr/lsmix.py",
    "LICENSES/x.py",
    "x.md",
)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool")


def add_listed(folder: Path, name: str) -> None:
    """Add a file that the manifest lists but the content digest does not cover, as a forger would."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("print('gotcha')\n")
    record = json.loads((folder / "manifest.json").read_bytes())
    content = path.read_bytes()
    file = {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "payload": False}
    record["files"].append(file)
    (folder / "manifest.json").write_bytes(sealed_again(record))


# Code in artifacts and exports.


@pytest.mark.parametrize("name", CODE)
def test_pull_open_verify_and_push_reject_a_pool_with_a_file_of_no_stage(name, pool, tmp_path):
    honest = read_manifest(pool).content_digest
    add_listed(pool, name)
    assert json.loads((pool / "manifest.json").read_bytes())["content_digest"] == honest
    for action in (
        open_pool,
        verify,
        lambda folder: pull(str(folder), tmp_path / "to"),
        lambda f: push(f, "memory://x"),
    ):
        with pytest.raises(
            CorruptError, match=rf"lists the file {name!r}, which does not belong to an artifact of the stage 'mix'"
        ):
            action(pool)
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "to.part").exists()


def test_every_stage_declares_its_files(finished_workspace):
    assert set(ARTIFACT_FILES) == {*STAGES, "export", "card"}
    for stage in STAGES:
        for path in (finished_workspace / stage).glob("*/manifest.json"):
            assert read_manifest(path.parent).files, stage


@pytest.mark.parametrize("stage", ARTIFACT_FILES)
def test_no_stage_accepts_files_that_python_runs(stage):
    for name in (
        *CODE,
        "lsmix.pyc",
        "lsmix/__init__.py",
        "x.pkl",
        "x.sh",
        "figures/x.py",
        "pool.zarr/lam/c/0.py",
        "\n",
    ):
        assert not is_expected_path(stage, name)
    assert not is_expected_path("unknown", "README.md")


def test_an_unknown_stage_is_rejected(pool):
    record = json.loads((pool / "manifest.json").read_bytes())
    (pool / "manifest.json").write_bytes(sealed_again({**record, "stage": "brew"}))
    with pytest.raises(FormatError, match="unknown stage 'brew'"):
        open_pool(pool)


def test_an_artifact_with_a_foreign_file_cannot_be_completed(pool):
    manifest = read_manifest(pool)
    (pool / "notes.txt").write_text("mine")
    files = record_files(pool)
    with pytest.raises(
        CorruptError, match=r"notes\.txt' does not belong to an artifact of the stage 'mix'. Move it elsewhere"
    ):
        write_manifest(pool, Manifest(stage="mix", stage_version=1, name="x", cache_key="", content_digest=content_digest(files), config={}, inputs=[], files=files))  # fmt: skip
    assert read_manifest(pool) == manifest


def test_exports_do_not_accept_files_that_python_runs():
    for name in (
        *("h5py.py", "images/0/0000/00000000.py", "../pool-00000.h5", "pool-00000.h5.py"),
        *("pool-00000.pyc", "pool-00000.so", "pool-0.x.sh", "pool-0.pkl", "pool-0.a.b.npy", "pool-0/x.npy"),
    ):
        assert not is_expected_path("export", name)


def test_verify_and_pull_reject_an_export_with_code(invented_pool, tmp_path, command):
    exported = tmp_path / "exported"
    assert command("export", invented_pool(), exported, "--format", "hdf5", "-q").code == 0
    verify(exported)
    add_listed(exported, "numpy.py")
    with pytest.raises(
        CorruptError, match=r"lists the file 'numpy\.py', which does not belong to an artifact of the stage 'export'"
    ):
        verify(exported)
    import fsspec

    fsspec.filesystem("memory").put(str(exported), f"/{tmp_path.name}", recursive=True)
    for action in (verify, lambda url: pull(url, tmp_path / "to")):
        with pytest.raises(CorruptError, match=r"lists the file 'numpy\.py'"):
            action(f"memory://{tmp_path.name}")


# Descriptions, which owners may edit.


def test_a_pool_with_edited_descriptions_can_be_opened_verified_pushed_and_pulled(pool, tmp_path):
    (pool / "README.md").write_text("As made.")
    (pool / "LICENSES").mkdir()
    (pool / "LICENSES" / "images.txt").write_text("As made.")
    reseal(pool)
    digest = read_manifest(pool).content_digest
    assert verify(pool)["edited"] == []
    (pool / "README.md").write_text("My own words, and more of them.")
    (pool / "LICENSES" / "images.txt").unlink()
    (pool / "LICENSES" / "lsmix.txt").write_text("Added.")
    edited = ["LICENSES/images.txt", "LICENSES/lsmix.txt", "README.md"]
    assert verify(pool)["edited"] == edited
    assert len(open_pool(pool)) == 48
    pull(str(pool), tmp_path / "pulled")
    assert verify(tmp_path / "pulled")["edited"] == ["LICENSES/images.txt", "README.md"]  # only listed files are pulled
    assert (tmp_path / "pulled" / "README.md").read_text() == "My own words, and more of them."
    push_artifact(pool, str(tmp_path / "there"), NullProgress())
    checked = verify(str(tmp_path / "there"))
    assert (checked["edited"], checked["content_digest"]) == ([], digest)
    (pool / "README.md").write_text("Better words.")
    push_artifact(pool, str(tmp_path / "there"), NullProgress())
    assert (tmp_path / "there" / "README.md").read_text() == "Better words."
    assert verify(str(tmp_path / "there"))["edited"] == []


def test_links_and_folders_in_place_of_descriptions_are_rejected(pool, tmp_path):
    (pool / "README.md").write_text("As made.")
    reseal(pool)
    (pool / "README.md").unlink()
    for make in (lambda path: path.symlink_to(tmp_path / "secret"), Path.mkdir):
        (tmp_path / "secret").write_text("secret")
        make(pool / "README.md")
        for action in (verify, open_pool, lambda folder: push(folder, str(tmp_path / "there"))):
            with pytest.raises(CorruptError, match=r"README\.md"):
                action(pool)
        shutil.rmtree(pool / "README.md") if make is Path.mkdir else (pool / "README.md").unlink()
    (pool / "card.png").symlink_to(tmp_path / "secret")  # a description that is not listed
    with pytest.raises(CorruptError, match="it was added later"):
        verify(pool)


def test_the_code_of_a_card_runs_in_any_folder_with_the_pool_as_argument(finished_workspace, tmp_path):
    pool = next((finished_workspace / "mix").glob("lsmix-*"))
    text = (pool / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    assert all("sys.argv[1]" in block for block in blocks)
    assert "lsmix verify POOL" in text
    (tmp_path / "load.py").write_text(blocks[3])
    subprocess.run([sys.executable, tmp_path / "load.py", pool], cwd=tmp_path, check=True)


# Memory. Imports take about 60 MB, and decoded JSON may take about ten times its size.


def peak_mebibytes(code: str, *words: object) -> tuple[int, list[str]]:
    """Run ``code`` for each word in a new process, and return its peak memory in MiB and the errors."""
    program = (
        "import re, sys\nfrom pathlib import Path\nfrom lsmix.data.errors import LsmixError\nfor word in sys.argv[1:]:\n"
        f" try:\n  {code}\n except LsmixError as error:\n  print(error)\n"
        # Not ru_maxrss, which includes the memory of the test process at the time of the fork.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=TESTS,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    *errors, peak = done.stdout.splitlines()
    return int(peak), errors


READ_MANIFEST = "from lsmix.data.artifact import read_manifest; read_manifest(Path(word))"
HEAD = (
    b'{\n"format_version": 1, "stage": "mix", "stage_version": 1, "name": "a", "cache_key": "", "content_digest": "'
    + b"0" * 64
    + b'", '
)
TAIL = b'"inputs": [], "files": []}'


def keys(count: int) -> bytes:
    return b",".join(b'"%07x":0' % number for number in range(count))


def test_manifests_of_tens_of_megabytes_are_rejected_with_little_memory(tmp_path):
    contents = {
        "[": b'"config": {"a": [' + b"[]," * 8_000_000 + b"0]}, ",
        "{": b'"config": {"a": [' + b"{}," * 8_000_000 + b"0]}, ",
        ",": b'"counts": {"decode_failed_rows": [' + b"999," * 8_000_000 + b'0]}, "config": {}, ',
        ":": b'"environment": {' + keys(3_000_000) + b'}, "config": {}, ',
    }
    folders = [tmp_path / str(number) for number in range(len(contents))]
    for folder, content in zip(folders, contents.values(), strict=True):
        folder.mkdir()
        (folder / "manifest.json").write_bytes(add_checksum(HEAD + content + TAIL))
    peak, errors = peak_mebibytes(READ_MANIFEST, *folders)
    for mark, error in zip(contents, errors, strict=True):
        assert re.search(
            rf"is damaged: it contains '{re.escape(mark)}' [\d,]+ times; lsmix reads at most [\d,]+", error
        )
    assert peak < 160


@pytest.mark.slow
def test_the_largest_allowed_manifest_takes_a_few_hundred_megabytes(tmp_path):
    content = b'"config": {"a": [' + b'{"a":0},' * 199_900 + b"9999," * 4_000_000 + b"0]," + keys(790_000) + b"}, "
    (tmp_path / "manifest.json").write_bytes(add_checksum(HEAD + content + TAIL))
    peak, errors = peak_mebibytes(READ_MANIFEST, tmp_path)
    assert errors == []
    assert peak < 450  # measured: 327


def test_the_error_about_a_large_manifest_names_the_limit(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CorruptError, match=f"has {65 << 20:,} bytes; lsmix reads at most {64 << 20:,}"):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_a_pool_of_four_million_failed_decodes_and_one_of_100_000_shards_can_be_read():
    known = {"stage": "mix", "stage_version": 1, "name": "a", "cache_key": "", "content_digest": "0" * 64}
    rows = list(range(4_000_000))
    manifest = Manifest(**known, config={}, inputs=[], files=[], counts={"decode_failed_rows": rows})
    assert parse_manifest(dump_checksummed(manifest), "here").counts["decode_failed_rows"] == rows
    files = [
        FileRecord(path=f"pool.zarr/image/c/{shard}/0/0/0", bytes=1, sha256="0" * 64, payload=True)
        for shard in range(100_000)
    ]
    manifest = Manifest(**known, config={}, inputs=[], files=files)
    assert len(parse_manifest(dump_checksummed(manifest), "here").files) == 100_000


def test_zarr_metadata_of_16_megabytes_is_rejected_with_little_memory(pool):
    shutil.copytree(pool, pool.parent / "other")
    for folder, path in ((pool, "zarr.json"), (pool.parent / "other", "image/zarr.json")):
        metadata = json.loads((folder / "pool.zarr" / path).read_bytes())
        head, tail = json.dumps({**metadata, "attributes": "HERE"}).split('"HERE"')
        (folder / "pool.zarr" / path).write_text(f'{head}{{"a": [{"[]," * (15 << 20 >> 2)}0]}}{tail}')
    code = "from lsmix.data.table import table_in; table_in(Path(word))"
    peak, errors = peak_mebibytes(code, pool / "pool.zarr", pool.parent / "other/pool.zarr")
    assert len(errors) == 2
    for error in errors:
        assert re.search(r"it has [\d,]+ bytes; lsmix reads at most [\d,]+", error)
    assert peak < 100


def test_a_table_with_too_many_columns_is_rejected_before_they_are_read(pool):
    content = (pool / "pool.zarr/lam/zarr.json").read_bytes()
    for number in range(65):
        (pool / f"pool.zarr/x{number}").mkdir()
        (pool / f"pool.zarr/x{number}/zarr.json").write_bytes(content)
    from lsmix.data.table import table_in

    with pytest.raises(FormatError, match="lsmix reads at most 64"):
        table_in(pool / "pool.zarr")


def test_attributes_above_the_reading_limit_are_not_written(tmp_path):
    store = Table(folder=tmp_path / "x.zarr", columns=(Column(name="a", dtype="uint8"),), rows=1, chunk_rows=1)
    with pytest.raises(FormatError, match=r"would have [\d,]+ bytes; lsmix reads at most 1,048,576"):
        store.create({"class_names": ["n" * 100] * 20_000})
    store.create({"class_names": [f"a class with a name {number}" for number in range(21_841)]})


@pytest.mark.parametrize("name", ["metrics.json", "predictions.json", "log.jsonl"])
def test_results_above_16_mib_are_rejected(name, tmp_path):
    from lsmix.pipeline.config.results import read_log, read_metrics, read_predictions

    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match=f"it has {1 << 40:,} bytes; lsmix reads at most {16 << 20:,}"):
        {"metrics.json": read_metrics, "predictions.json": read_predictions, "log.jsonl": read_log}[name](tmp_path)


def test_weights_with_a_large_header_are_rejected_before_it_is_parsed(finished_workspace, tmp_path, monkeypatch):
    from lsmix.glow import checkpoint

    flow = next(path for path in (finished_workspace / "train-glow").iterdir() if "evaluator" not in path.name)
    shutil.copy(flow / "glow.json", tmp_path / "glow.json")
    (tmp_path / "glow.safetensors").write_bytes(struct.pack("<Q", 5 << 20) + b"{" + bytes(5 << 20))
    monkeypatch.setattr(checkpoint, "safe_open", lambda *_, **__: pytest.fail("the header was parsed"))
    with pytest.raises(CorruptError, match="its header has 5,242,880 bytes; lsmix reads at most 4,194,304"):
        checkpoint.load_flow(tmp_path)
