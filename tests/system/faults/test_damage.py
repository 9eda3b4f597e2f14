"""For every kind of artifact, verify detects any changed byte, and opening detects missing files and wrong sizes."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsmix.data.artifact import DESCRIPTION_FILES, MANIFEST_NAME, read_manifest
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError
from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.glow.checkpoint import load_flow
from lsmix.pipeline.api import export_pool, pull, verify
from lsmix.pipeline.stages.registry import STAGES
from lsmix.pipeline.workspace.workspace import Workspace

pytestmark = pytest.mark.faults

FORMS = ("hdf5", "parquet", "webdataset", "folder")
KINDS = (*STAGES, *FORMS, "pulled")
OPENERS = {
    "ingest": open_dataset,
    "train-glow": load_flow,
    "encode": open_latents,
    "mix": open_pool,
    "pulled": open_pool,
}


@pytest.fixture(scope="session")
def every_kind(small_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return an intact artifact of each kind. Tests that damage it must restore it."""
    place = tmp_path_factory.mktemp("kinds")
    runs = Path(shutil.copytree(small_finished, place / "runs"))
    found = {stage: min((runs / stage).iterdir()) for stage in STAGES}
    for form in FORMS:
        found[form] = place / form
        export_pool(found["mix"], found[form], format=form, shard_images=6)
    found["pulled"] = place / "pulled"
    pull(str(found["mix"]), found["pulled"])
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def swap(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


SIZES: dict[str, Callable[[Path], None]] = {"shortened": shorten, "emptied": empty, "missing": Path.unlink}
HARMS: dict[str, Callable[[Path], None]] = {"flipped": flip, **SIZES, "lengthened": lengthen}
LINK = "a link to other bytes"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_found(command, folder: Path, path: Path, harm: str) -> None:
    """Check that verify exits with 5 and one error line that names the file."""
    result = command("verify", folder)
    if path.name == MANIFEST_NAME and harm == "missing":
        assert (result.code, "has no manifest.json: it is not an artifact, or it is unfinished" in result.err) == (
            1,
            True,
        )
        return
    if path.relative_to(folder).as_posix() in DESCRIPTION_FILES and harm != LINK:  # owners may edit descriptions
        assert result.code == 0, (path, harm, result)
        assert path.name in next(line for line in result.out.splitlines() if line.startswith("edited"))
        return
    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1), (path, harm, result)
    assert path.name in result.err, (path, harm, result.err)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one each", "all"])
def test_verify_detects_every_kind_of_damage_to_every_file(every_kind, command, tmp_path, kind, all_of_them):
    folder = every_kind[kind]
    assert command("verify", folder).code == 0
    files, names, done = files_of(folder), [*HARMS, LINK], 0
    for number, path in enumerate(files):
        for harm in names if all_of_them else [names[number % len(names)]]:
            content = path.read_bytes()
            if not content and harm in ("flipped", "shortened", "emptied", LINK):
                continue
            if harm == LINK:
                moved = path.replace(tmp_path / path.name)
                flip(moved)
                path.symlink_to(moved)
            else:
                HARMS[harm](path)
            check_found(command, folder, path, harm)
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            done += 1
    assert done >= len(files) - 1
    assert command("verify", folder).code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_verify_detects_swapped_and_additional_files(every_kind, command, kind):
    folder = every_kind[kind]
    files = files_of(folder)
    for path, other in itertools.pairwise(files):
        if path.read_bytes() == other.read_bytes():
            continue
        if {path.relative_to(folder).as_posix(), other.relative_to(folder).as_posix()} <= set(DESCRIPTION_FILES):
            continue
        swap(path, other)
        result = command("verify", folder)
        assert (result.code, result.err.count("\n")) == (5, 1), (path, other, result)
        assert path.name in result.err or other.name in result.err
        swap(path, other)
    for place in {folder, files[-1].parent}:
        for make in (lambda path: path.write_bytes(b""), lambda path: path.symlink_to(folder.parent)):
            make(place / "extra")
            result = command("verify", folder)
            is_found = "it was added later" in result.err or "is a link" in result.err
            assert (result.code, is_found) == (5, True), result
            (place / "extra").unlink()
    assert command("verify", folder).code == 0


@pytest.mark.parametrize("kind", [*STAGES, "pulled"])
def test_opening_detects_every_file_with_a_wrong_size(every_kind, kind):
    folder = every_kind[kind]
    manifest = read_manifest(folder)
    openers = [OPENERS[kind]] if kind in OPENERS else []
    if kind in STAGES:
        openers.append(lambda folder: Workspace(folder.parent.parent).find(kind, manifest.cache_key))
    for record in manifest.files:
        if record.path in DESCRIPTION_FILES:
            continue
        path = folder / record.path
        content = path.read_bytes()
        for name, harm in SIZES.items():
            if not content and name != "missing":
                continue
            harm(path)
            for open_it in openers:
                with pytest.raises(CorruptError, match=r"is missing|is damaged: expected [\d,]+ bytes, got [\d,]+"):
                    open_it(folder)
            path.write_bytes(content)
    verify(folder)


@pytest.mark.parametrize("flips", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_verify_detects_every_changed_byte_of_every_kind_of_artifact(every_kind, flips):
    draw = np.random.default_rng(flips)
    editable = {Path(path).name for path in DESCRIPTION_FILES}
    files = {
        kind: [path for path in files_of(folder) if path.stat().st_size and path.name not in editable]
        for kind, folder in every_kind.items()
    }
    for number in range(flips):
        kind = KINDS[number % len(KINDS)]
        path = files[kind][draw.integers(len(files[kind]))]
        place, change = int(draw.integers(path.stat().st_size)), int(draw.integers(1, 256))
        with path.open("r+b", buffering=0) as stream:
            byte = os.pread(stream.fileno(), 1, place)
            os.pwrite(stream.fileno(), bytes([byte[0] ^ change]), place)
            with pytest.raises(CorruptError, match=r".") as raised:
                verify(every_kind[kind])
            assert path.name in str(raised.value), f"{path} at {place}: {raised.value}"
            os.pwrite(stream.fileno(), byte, place)
    for folder in every_kind.values():
        verify(folder)
