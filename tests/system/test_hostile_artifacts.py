"""Malicious artifacts, recipes and exports: every command rejects them with one error line and has no other effect.

Checksums are recomputed after every change, so that the malicious content itself is detected and not a checksum
mismatch.
"""

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import remake_manifest
from guarded import assert_refused, plain_json, sealed_again, watched

from lsmix.data.artifact import read_manifest
from lsmix.data.atomic import add_checksum
from lsmix.data.pool import open_pool

MEMORY_BYTES = 128 << 20  # limit for a rejection, including imports; all sizes claimed below are far larger


@pytest.fixture
def guarded(tmp_path: Path, command: Callable) -> Callable:
    """Return a function that runs a command, checks that it did no harm, and returns its result."""

    def call(*words: str | Path, memory: bool = False):
        with watched(tmp_path / "outside", memory=memory) as watch:
            result = command(*words)
        watch.check()
        assert watch.peak_bytes < MEMORY_BYTES
        return result

    return call


@pytest.fixture
def pool(finished_workspace: Path, tmp_path: Path) -> Path:
    """Return a copy of a latent-space pool."""
    (made,) = (finished_workspace / "mix").glob("lsmix-*")
    return Path(shutil.copytree(made, tmp_path / "given-pool"))


@pytest.fixture
def flow(finished_workspace: Path, tmp_path: Path) -> Path:
    (made,) = (finished_workspace / "train-glow").iterdir()
    return Path(shutil.copytree(made, tmp_path / "given-flow"))


def edit(path: Path, change: Callable) -> None:
    """Modify a JSON file through its Python value, and update its checksum if it has one."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(sealed_again(value) if "checksum" in value else json.dumps(value).encode())


def edited(name: str, change: Callable) -> Callable:
    """Return a function that modifies a JSON file of an artifact."""
    return lambda folder: edit(folder / name, change)


def written(name: str, content: bytes) -> Callable:
    return lambda folder: (folder / name).write_bytes(content)


def lengthened(name: str) -> Callable:
    return lambda folder: os.truncate(folder / name, 2 * MEMORY_BYTES)


POOL_COMMANDS = {  # arguments after the pool; NEW is a path next to it
    "show": ("--image", "NEW.png"),
    "show --html": ("--html", "NEW.html"),
    "verify": (),
    "card": ("NEW", "--licence", "MIT"),
    "export": ("NEW", "--format", "hdf5", "-q"),
    "push": ("NEW", "-q"),
    "pull": ("NEW", "-q"),
}


def words_of(command: str, pool: Path) -> list[str]:
    new = str(pool.with_name("new"))
    return [command.split()[0], str(pool), *(word.replace("NEW", new) for word in POOL_COMMANDS[command])]


# Manifests.


def with_path(path: str) -> Callable:
    return lambda manifest: manifest["files"][0].update(path=path)


FORGED_MANIFESTS = {
    "parent folder": with_path("../outside/canary"),
    "a subfolder, then parent folders": with_path("pool.zarr/../../../outside/canary"),
    "absolute": with_path("/etc/passwd"),
    "backslashes": with_path("..\\outside\\canary"),
    "NUL": with_path("a\0b"),
    "escapes in a path": with_path("\x1b[2Ja"),
    "the manifest itself": with_path("manifest.json"),
    "escapes in the name": lambda m: m.update(name="\x1b]0;gone\x07"),
    "bidi in the name": lambda m: m.update(name="a\u202eb"),
    "a stage in two lines": lambda m: m.update(stage="mix\nerror: nothing"),
    "a path as digest": lambda m: m.update(content_digest="../x"),
    "an escape as key": lambda m: m.update(cache_key="\x9b1m"),
    "an endless time": lambda m: m.update(seconds=1e300),
    "a negative time": lambda m: m.update(seconds=-1),
    "versions that are a list": lambda m: m.update(environment={"versions": ["a"]}),
    "a huge number": lambda m: m.update(counts={"images": 10**40}),
    "deep counts": lambda m: m.update(counts={"a": json.loads("[" * 200 + "]" * 200)}),
    "a huge size": lambda m: m["files"][0].update(bytes=2**60),
    "a negative size": lambda m: m["files"][0].update(bytes=-1),
    "the same file twice": lambda m: m["files"].append(m["files"][0]),
}


@pytest.mark.parametrize("forged", FORGED_MANIFESTS)
def test_a_forged_manifest_is_rejected(forged, pool, guarded):
    edit(pool / "manifest.json", FORGED_MANIFESTS[forged])
    assert_refused(guarded("verify", pool), 5, "manifest.json")


@pytest.mark.parametrize("command_name", POOL_COMMANDS)
@pytest.mark.parametrize("forged", ["parent folder", "escapes in the name"])
def test_a_forged_manifest_is_rejected_by_every_command(forged, command_name, pool, guarded):
    edit(pool / "manifest.json", FORGED_MANIFESTS[forged])
    assert_refused(guarded(*words_of(command_name, pool)), 5, "manifest.json")


UNDECODABLE = {
    "arrays": b"[" * 100_000,
    "1e400": b'{"format_version": 1, "seconds": 1e400}',
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "a version that is not a number": b'{"format_version": true}',
    "deep inside": b'{"format_version": 1, "config": ' + b"[" * 5000 + b"}",
}


@pytest.mark.parametrize("content", UNDECODABLE.values(), ids=UNDECODABLE)
def test_a_manifest_that_cannot_be_decoded_is_rejected(content, pool, guarded):
    (pool / "manifest.json").write_bytes(content)
    assert_refused(guarded("verify", pool), 5, "manifest.json", "is damaged")


def test_a_manifest_of_gigabytes_is_not_read(pool, guarded):
    os.truncate(pool / "manifest.json", 4 << 30)
    assert_refused(guarded("verify", pool, memory=True), 5, "has 4,294,967,296 bytes")


def test_the_last_value_of_a_duplicate_key_is_used(pool, guarded):
    record = json.loads((pool / "manifest.json").read_text())
    (pool / "manifest.json").write_bytes(add_checksum(b'{\n"name": "first",' + plain_json(record)[1:]))
    assert read_manifest(pool).name == "lsmix"
    assert guarded("verify", pool).code == 0


# Links.


@pytest.mark.parametrize(
    ("linked", "command_name"),
    # pull copies files through links, since their bytes match the checksums
    [("pool.zarr/lam", "verify"), *(("pool.zarr", name) for name in POOL_COMMANDS if name != "pull")],
)
def test_a_link_in_place_of_a_folder_is_never_followed(linked, command_name, pool, tmp_path, command):
    away = (pool / linked).rename(tmp_path / "away")
    (pool / linked).symlink_to(away)
    with watched(tmp_path / "outside") as watch:
        result = command(*words_of(command_name, pool))
    watch.check()
    assert_refused(result, 5, "a link")
    assert not [path for path in watch.opened if path.startswith(str(away))]


def test_verify_finds_a_link_that_is_not_in_the_manifest(pool, tmp_path, guarded):
    (tmp_path / "outside").mkdir()
    (pool / "more").symlink_to(tmp_path / "outside")
    assert_refused(guarded("verify", pool), 5, "more", "is not listed")


# Columns.


def column(change: Callable) -> Callable:
    return edited("pool.zarr/image/zarr.json", change)


def attributes(**values: object) -> Callable:
    return edited("pool.zarr/zarr.json", lambda m: m["attributes"].update(values))


def rows(rows: int, chunk_rows: int) -> Callable:
    """Return a function that makes all columns claim ``rows`` rows."""

    def claim(metadata) -> None:
        metadata["shape"][0] = rows
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = chunk_rows

    return lambda pool: [edit(path, claim) for path in (pool / "pool.zarr").glob("*/zarr.json")]


FORGED_COLUMNS = {
    "shape": (column(lambda m: m.update(shape=[2**60, 8, 8, 1])), 1, "shape"),
    "rows without files": (rows(2**47, 128), 5, "is not in the manifest"),
    "one huge shard": (rows(2**47, 2**47), 5, "bytes, expected"),
    "object": (column(lambda m: m.update(data_type="object")), 1, "data_type"),
    "pickle codec": (column(lambda m: m["codecs"].append({"name": "pickle"})), 1, "codecs"),
    "unknown codec": (column(lambda m: m["codecs"][0].update(name="numcodecs.pickle")), 1, "numcodecs.pickle"),
    "codec with settings": (column(lambda m: m["codecs"][1].update(configuration={"a": 1})), 1, "codecs"),
    "transformer": (column(lambda m: m.update(storage_transformers=[{"name": "x"}])), 1, "storage_transformers"),
    "dimension names": (column(lambda m: m.update(dimension_names=["a"])), 1, "dimension_names"),
    "no classes": (attributes(class_names=[]), 5, "class_names"),
    "copies": (attributes(copies=2**40), 5, "do not add up"),
    "sources": (attributes(sources=10**9), 5, "sources"),
    "deep": (written("pool.zarr/lam/zarr.json", b'{"attributes":' + b'{"a":' * 3000), 5, "is damaged"),
    "long": (lengthened("pool.zarr/lam/zarr.json"), 1, "reads at most"),
}


@pytest.mark.parametrize(("change", "code", "words"), FORGED_COLUMNS.values(), ids=FORGED_COLUMNS)
def test_impossible_column_metadata_is_rejected(change, code, words, pool, guarded):
    change(pool)
    remake_manifest(pool)
    assert_refused(guarded("verify", pool, memory=True), code, words)


# Flows.


def tensors(head: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file with this header, which may claim another length."""
    return struct.pack("<Q", len(head) if length is None else length) + head


def weights(content: bytes, file_bytes: int = 0) -> Callable:
    def change(flow: Path) -> None:
        (flow / "glow.safetensors").write_bytes(content)
        os.truncate(flow / "glow.safetensors", max(file_bytes, len(content)))

    return change


def header(change: Callable) -> Callable:
    """Return a function that modifies the header of the flow's weights; ``change`` receives two of its tensors."""

    def write(flow: Path) -> None:
        content = (flow / "glow.safetensors").read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + size])
        change(*[one for one in head.values() if one.get("dtype") == "F32" and one["shape"]][:2])
        weights(tensors(json.dumps(head).encode()) + content[8 + size :])(flow)

    return write


def not_a_number(flow: Path) -> None:
    content = (flow / "glow.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8 : 8 + size])
    start = 8 + size + next(one["data_offsets"][0] for one in head.values() if one.get("dtype") == "F32")
    weights(content[:start] + np.float32(np.nan).tobytes() + content[start + 4 :])(flow)


TERABYTES = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
OVERFLOW = b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}'
FORGED_WEIGHTS = {
    "endless header": (weights(tensors(b"", 2**63)), "is damaged"),
    "long header": (weights(tensors(b"{}", MEMORY_BYTES), 2 * MEMORY_BYTES), "is damaged"),
    "deep header": (weights(tensors(b"[" * 5000)), "is damaged"),
    "terabytes": (weights(tensors(TERABYTES)), "is damaged"),
    "a product that overflows": (weights(tensors(OVERFLOW)), "is damaged"),
    "no tensors": (weights(tensors(b"{}")), "does not match its glow.json"),
    "overlap": (header(lambda one, two: one.update(data_offsets=two["data_offsets"])), "is damaged"),
    "wider type": (header(lambda one, _: one.update(dtype="F64")), "is damaged"),
    "other type": (header(lambda one, _: one.update(dtype="I32")), "does not match its glow.json"),
    "other shape": (header(lambda one, _: one.update(shape=[*one["shape"], 2])), "is damaged"),
    "negative offset": (header(lambda one, _: one.update(data_offsets=[0, -1])), "is damaged"),
    "NaN": (not_a_number, "invalid values"),
}


@pytest.mark.parametrize(("change", "words"), FORGED_WEIGHTS.values(), ids=FORGED_WEIGHTS)
def test_forged_weights_are_rejected(change, words, flow, tmp_path, guarded):
    change(flow)
    digest = hashlib.sha256((flow / "glow.safetensors").read_bytes()).hexdigest()
    edit(flow / "glow.json", lambda facts: facts.update(weights_sha256=digest))
    remake_manifest(flow)
    result = guarded("show", flow, "--image", tmp_path / "sheet.png", memory=True)
    assert_refused(result, 5, words, "glow.safetensors")


FLOW = b'{"kind":"lsmix-glow","format_version":2,"metadata":'
FORGED_FLOWS = {
    "width": (edited("glow.json", lambda f: f["config"].update(hidden=10**9)), 1),
    "levels": (edited("glow.json", lambda f: f["config"].update(levels=60)), 1),
    "images": (edited("glow.json", lambda f: f["config"].update(height=2**40)), 1),
    "escapes": (edited("glow.json", lambda f: f.update(kind="lsmix-\x1b[2J")), 1),
    "deep": (written("glow.json", FLOW + b"[" * 5000), 5),
    "not UTF-8": (written("glow.json", FLOW + b'{"a":"\xff"}}'), 5),
    "long": (lengthened("glow.json"), 1),
}


@pytest.mark.parametrize(("change", "code"), FORGED_FLOWS.values(), ids=FORGED_FLOWS)
def test_an_impossible_flow_configuration_is_rejected(change, code, flow, tmp_path, guarded):
    change(flow)
    remake_manifest(flow)
    assert_refused(guarded("show", flow, "--image", tmp_path / "sheet.png", memory=True), code, "glow.json")


def test_an_image_that_is_not_png_starts_no_program(pool, guarded, tmp_path):
    """Pillow runs Ghostscript for PostScript files, regardless of their names."""
    artifact = tmp_path / "naturalness"
    artifact.mkdir()
    (pool / "manifest.json").rename(artifact / "manifest.json")
    (artifact / "sheet.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) run\n")
    edit(artifact / "manifest.json", lambda m: m.update(stage="naturalness", config={"lam": 0.5}))
    remake_manifest(artifact)
    assert_refused(
        guarded("show", artifact, "--image", tmp_path / "x.png"), 5, "sheet.png", "is damaged or not a PNG file"
    )


# Recipes and plans.

RECIPE = 'name = "x"\n[data]\nformat = "digits"\n'


HOSTILE_RECIPES = {
    "many parts": (RECIPE + "[scale.a." + ".".join("a" * 3000) + "]\nx = 1\n", "nested too deeply"),
    "brackets": (RECIPE + "[scale.a.data]\nx = " + "[" * 3000, "nested too deeply"),
    "digits": (RECIPE + "limit = " + "9" * 5000, "not valid TOML"),
    "beyond 64 bits": (RECIPE + "limit = " + "9" * 30, "expected an integer of at most"),
    "1e400": (RECIPE + "[mix]\nalpha = 1e400\n", "expected a finite number"),
    "nan": (RECIPE + "[mix]\nalpha = nan\n", "expected a finite number"),
    "NUL": (RECIPE + 'path = "a\\u0000b"\n', "without NUL"),
    "escapes": (RECIPE + '"\\u001b[2J" = 1\n', "unknown key"),
    "a key twice": (RECIPE + 'format = "digits"\n', "not valid TOML"),
    "a path as name": (RECIPE.replace('"x"', '"../../x"'), "name"),
    "many scales": (RECIPE + "".join(f"[scale.s{number}]\n" for number in range(2000)), "at most 64"),
    "a function that exits": (RECIPE + '[classifier]\narchitecture = "os:_exit"\n', "is in Python's standard library"),
    "an import with a side effect": (RECIPE + '[classifier]\narchitecture = "antigravity:x"\n', "standard library"),
    "a file": (RECIPE + '[classifier]\narchitecture = "../evil.py:net"\n', "unknown architecture"),
    "not text": ("\ufeff\u202e\0", "not valid TOML"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE_RECIPES.values(), ids=HOSTILE_RECIPES)
def test_a_hostile_recipe_is_rejected(text, words, tmp_path, guarded):
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    result = guarded("run", tmp_path / "my.toml", "--workspace", tmp_path / "runs", memory=True)
    assert_refused(result, 1, words)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_of_100_megabytes_is_not_read(tmp_path, guarded):
    (tmp_path / "my.toml").touch()
    os.truncate(tmp_path / "my.toml", 100 << 20)
    result = guarded("run", tmp_path / "my.toml", "--workspace", tmp_path / "runs", memory=True)
    assert_refused(result, 1, "has 104.9 MB; the limit is 1.0 MB")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"{}" + b" " * (2 << 20), b'{"format_version": 1e400}', b'{"format_version": 99}'],
    ids=["deep", "long", "1e400", "newer"],
)
def test_a_hostile_plan_is_rejected(content, tmp_path, guarded):
    (tmp_path / "plan.json").write_bytes(content)
    words = ("--data", "digits", "--workspace", tmp_path / "runs", "--out", tmp_path / "x")
    assert_refused(guarded("rebuild", tmp_path / "plan.json", *words, memory=True), 1, "plan.json")
    assert not (tmp_path / "x").exists()


# Exports.


def test_an_export_whose_checksum_file_names_other_files_is_rejected(pool, tmp_path, command, guarded):
    assert command("export", pool, tmp_path / "out", "--format", "hdf5").code == 0
    for line in ("../outside/canary", "/etc/passwd", "\x1b[2J", "y" * 100_000):
        content = f"{'f' * 64}  {line}\n".encode()
        (tmp_path / "out" / "SHA256SUMS").write_bytes(content)

        def list_it(manifest, content=content):
            (record,) = (file for file in manifest["files"] if file["path"] == "SHA256SUMS")
            record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

        edit(tmp_path / "out" / "manifest.json", list_it)
        assert_refused(guarded("verify", tmp_path / "out"), 5, "does not match the manifest next to it")


def test_a_link_in_an_export_is_never_followed(invented_pool, tmp_path, command, guarded):
    assert command("export", invented_pool(), tmp_path / "out", "--format", "folder").code == 0
    (tmp_path / "out" / "images").rename(tmp_path / "images")
    (tmp_path / "out" / "images").symlink_to(tmp_path / "images")
    assert_refused(guarded("verify", tmp_path / "out"), 5, "is a link; folders of an artifact must not be links")


# Text on pages and terminals.

EVIL = '<img src=x onerror=alert(1)> \x1b[2J*a* "b" ]]>'


def test_class_names_are_escaped_on_pages_and_terminals(pool, tmp_path, guarded):
    names = [EVIL, "</script><script>alert(2)</script>", "| --- |", "=1+1", *map(str, range(6))]
    edit(pool / "pool.zarr/zarr.json", lambda m: m["attributes"].update(class_names=names))
    remake_manifest(pool)
    assert guarded("card", pool, tmp_path / "card").code == 0
    result = guarded("show", pool, "--html", tmp_path / "pool.html")
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    assert open_pool(pool).class_names[0] == EVIL
    page, card = (tmp_path / "pool.html").read_text(), (tmp_path / "card" / "README.md").read_text()
    for text in (page, card):
        assert "<img src=x" not in text
        assert "<script>alert" not in text
    assert "\x1b" not in card  # may be read on a terminal, too


def test_escapes_in_the_name_of_a_folder_are_not_printed(tiny_recipe, tiny_workspace, guarded):
    (whole,) = (tiny_workspace / "ingest").iterdir()
    whole.rename(whole.with_name("\x1b]0;gone\x07" + whole.name))
    for name, *options in (("run",), ("status",), ("status", "--json"), ("gc",)):
        result = guarded(name, tiny_recipe, *options, "--workspace", tiny_workspace)
        assert result.code == 0
        assert "\x1b" not in result.out + result.err
        assert "\x07" not in result.out + result.err


# Files in a shared workspace.

OWNERS = (
    b'{"user":"\\u001b[2J","host":"other","process":1,"since":"now"}',
    b'{"user":"a","host":"HOST","process":"abc","since":"now"}',
    b'{"user":"a","host":"HOST","process":99999999999999999999,"since":"now"}',
    b'{"user":"a","host":"HOST","process":-1,"since":"now"}',
    b"[" * 100_000,
    b"\xff",
    b"",
    b" " * (8 << 20) + b"{}",
)


def test_status_accepts_any_content_of_a_lock_owner_file(tiny_recipe, tiny_workspace, guarded):
    (pool,) = (tiny_workspace / "mix").glob("lsmix-*")
    key = read_manifest(pool).cache_key
    (pool / "manifest.json").unlink()
    for note in OWNERS:
        path = tiny_workspace / ".locks" / f"{key}.host.1-2.owner.json"
        path.write_bytes(note.replace(b"HOST", socket.gethostname().encode()))
        result = guarded("status", tiny_recipe, "--workspace", tiny_workspace)
        assert (result.code, "mix lsmix" in result.out, "\x1b" in result.out) == (0, True, False), note[:80]


RECORDS = (
    b"[" * 100_000,
    b"\xff",
    b'{"/a": ["../x", 1, 2, 3]}',
    b'{"shard": 5, "files": [], "seconds": 1, "counts": {}}',
    b'{"shard": 0, "files": [{"path": "%s", "bytes": 1, "sha256": "", "payload": true}], "seconds": 1, "counts": {}}'
    % (b"a" * 5000),
    b'{"shard": 0, "files": [{"path": "../../../outside/canary", "bytes": 25, "sha256": "", "payload": true}],'
    b' "seconds": 1e400, "counts": {}}',
)


def test_status_accepts_any_content_of_shard_records_and_cached_checksums(tiny_recipe, tiny_workspace, guarded):
    (pool,) = (tiny_workspace / "mix").glob("lsmix-*")
    (pool / "manifest.json").unlink()
    (pool / "work/ledger").mkdir(parents=True)
    for content in RECORDS:
        (pool / "work/ledger/000000.json").write_bytes(content)
        (tiny_workspace / ".sources.json").write_bytes(content)
        result = guarded("status", tiny_recipe, "--workspace", tiny_workspace)
        assert (result.code, "interrupted: 0 shards done" in result.out) == (0, True), content[:80]


def test_a_report_rejects_results_that_cannot_be_decoded(tiny_recipe, tiny_workspace, guarded):
    shutil.rmtree(tiny_workspace / "report")
    cases = [("train/*/metrics.json", content) for content in (b"[" * 100_000, b"\xff", b"{}", b'[{"epoch":1e400}]')]
    for pattern, content in [*cases, ("train/*/predictions.json", b"[]"), ("train-glow/*/log.jsonl", b"[]")]:
        intact = {path: path.read_bytes() for path in tiny_workspace.glob(pattern)}
        for path in intact:
            path.write_bytes(content)
            remake_manifest(path.parent)
        result = guarded("report", tiny_recipe, "--workspace", tiny_workspace, "-q")
        assert_refused(result, 5, Path(pattern).name)
        for path, original in intact.items():
            path.write_bytes(original)
            remake_manifest(path.parent)
