"""Hostile data sets: ``lsmix ingest`` rejects them with one line, executes no code and opens no other files.

These tests use the command line. The tests of the readers and test_fuzz.py cover further cases.
"""

import io
import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_targets import TARGETS
from guarded import assert_refused, watched
from PIL import Image

MEMORY_BYTES = 96 << 20  # peak allowed for a rejection, including imports; the sizes claimed below are far larger


@pytest.fixture
def ingest(tmp_path: Path, command: Callable) -> Callable:
    """Return a function that ingests a path under observation and returns the result of the command."""

    def call(path: Path, form: str, *, memory: bool = False):
        recipe = tmp_path / "my.toml"
        recipe.write_text(f'name = "x"\n[data]\npath = "{path}"\nformat = "{form}"\ntest = 1\n', encoding="utf-8")
        with watched(tmp_path / "outside", memory=memory) as watch:
            result = command("ingest", recipe, "--workspace", tmp_path / "runs")
        watch.check()
        assert watch.peak_bytes < MEMORY_BYTES
        assert not list((tmp_path / "runs").rglob("manifest.json"))
        return result

    return call


# Pickles.


class Gadget:
    """Calls a function when it is unpickled normally."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def gadgets(ran: Path) -> dict[str, bytes]:
    """Return pickles whose code would create a file, by the opcode that would run the code."""
    return {
        "REDUCE": pickle.dumps({"data": Gadget(os.system, (f"touch {ran}",))}, 2),
        "STACK_GLOBAL": pickle.dumps(Gadget(os.mkdir, (str(ran),)), 4),
        "BUILD": b"\x80\x02}cos\nsystem\nS'touch " + bytes(ran) + b"'\n\x85Rb.",
        "dtype of objects": b"\x80\x02}U\x04datacnumpy\ndtype\nU\x02O8K\x00K\x01\x87Rs.",
    }


@pytest.mark.parametrize("way", gadgets(Path("ran")))
def test_code_in_a_pickle_is_not_executed(way, tmp_path, ingest):
    folder = tmp_path / "cifar-10-batches-py"
    TARGETS["cifar-batch"].read(TARGETS["cifar-batch"].seeds()[0], tmp_path)  # writes a valid data set
    (tmp_path / "dataset.h5").unlink()
    (folder / "data_batch_2").write_bytes(gadgets(tmp_path / "ran")[way])
    result = ingest(folder, "cifar10-python")
    assert_refused(result, 1, "data_batch_2")
    assert "code" in result.err or "expected uint8" in result.err
    assert not (tmp_path / "ran").exists()


def test_an_array_of_objects_in_an_npz_is_never_unpickled(tmp_path, ingest):
    np.savez(tmp_path / "a.npz", images=np.array([Gadget(exit, (1,))], object), labels=np.arange(1))
    assert_refused(ingest(tmp_path / "a.npz", "npz"), 1, "'images'", "contains Python objects or records (object)")


@pytest.mark.parametrize("form", ["npz", "hdf5"])
def test_a_huge_label_does_not_create_a_name_for_every_class(form, tmp_path, ingest):
    """The names would fill the memory. Found by atheris."""
    arrays = {"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.array([0, 1 << 40])}
    if form == "npz":
        np.savez(tmp_path / "a.npz", **arrays)
    else:
        with h5py.File(tmp_path / "a.hdf5", "w") as file:
            for name, array in arrays.items():
                file[name] = array
    result = ingest(tmp_path / f"a.{form}", form, memory=True)
    assert_refused(result, 1, "has the label 1099511627776", "at most 65,536 classes")


# Archives.


def tar_with(path: Path, odd: tarfile.TarInfo) -> Path:
    """Write the archive of CIFAR-10 with its second batch replaced by another member."""
    with (
        tarfile.open(fileobj=io.BytesIO(TARGETS["cifar-tar"].seeds()[1])) as good,
        tarfile.open(path, "w:gz") as archive,
    ):
        for info in good:
            if info.name.endswith("data_batch_2"):
                archive.addfile(odd, io.BytesIO(bytes(odd.size)))
            else:
                archive.addfile(info, good.extractfile(info))
    return path


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


BATCH = "cifar-10-batches-py/data_batch_2"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (tar_member("../outside/evil"), "a path outside of the archive"),
        (tar_member("cifar-10-batches-py/../../outside/evil"), "a path outside of the archive"),
        (tar_member("/tmp/data_batch_2"), "a path outside of the archive"),
        (tar_member(BATCH, tarfile.SYMTYPE, "../../outside/canary"), "not a regular file"),
        (tar_member(BATCH, tarfile.CHRTYPE), "not a regular file"),
    ],
    ids=["up", "up and down", "absolute", "link", "character device"],
)
def test_a_tar_with_paths_outside_of_it_is_rejected_and_not_extracted(odd, words, tmp_path, ingest):
    result = ingest(tar_with(tmp_path / "cifar-10-python.tar.gz", odd), "cifar10-python")
    assert_refused(result, 1, words, "cifar-10-python.tar.gz")
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "my.toml", "outside", "cifar-10-python.tar.gz"}


def test_a_tar_with_thousands_of_long_names_is_rejected(tmp_path, ingest):
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 5
    block = name.tobuf(tarfile.GNU_FORMAT) + b"abcd\0".ljust(512, b"\0")
    (tmp_path / "cifar-10-python.tar").write_bytes(block * 3000 + bytes(1024))
    assert_refused(
        ingest(tmp_path / "cifar-10-python.tar", "cifar10-python"), 1, "headers of a member have more than 65,536"
    )


def test_a_tar_gz_that_unpacks_to_gigabytes_is_rejected_during_decompression(tmp_path, ingest):
    packer = zlib.compressobj(1, wbits=31)
    huge = tarfile.TarInfo("cifar-10-batches-py/readme.html")
    huge.size = 2 << 30
    content = packer.compress(huge.tobuf()) + b"".join(packer.compress(bytes(1 << 22)) for _ in range(30))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content + packer.flush())
    result = ingest(tmp_path / "cifar-10-python.tar.gz", "cifar10-python", memory=True)
    assert_refused(result, 1, "unpacks to more than", "not plausible for a data set")


def zip_with(path: Path, odd: zipfile.ZipInfo, content: bytes = b"x") -> Path:
    path.write_bytes(TARGETS["tiny-imagenet-zip"].seeds()[1])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(odd, content)
    return path


def zip_member(name: str, kind: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = (kind | 0o777) << 16 if kind else 0, zipfile.ZIP_DEFLATED
    return info


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (zip_member("../outside/evil"), "a path outside of the archive"),
        (zip_member("..\\outside\\evil"), "a path outside of the archive"),
        (zip_member("tiny-imagenet-200/train/n01/images/x.JPEG", stat.S_IFIFO), "a link or device"),
    ],
    ids=["up", "backslashes", "pipe"],
)
def test_a_zip_with_paths_outside_of_it_is_rejected_before_any_member_is_read(odd, words, tmp_path, ingest):
    result = ingest(zip_with(tmp_path / "tiny-imagenet-200.zip", odd), "tiny-imagenet")
    assert_refused(result, 1, words, "tiny-imagenet-200.zip")


# Images.


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, followed by one short row of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tiff_bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: png(60_000, 60_000), "far too large for an image"),
        (lambda: png(2**31 - 1, 1), "too large|is not an image|images differ"),
        (lambda: png(8000, 8000), "to 192.0 MB, which is not plausible for a photograph"),
        (tiff_bomb, "would unpack from"),
    ],
    ids=["bomb", "wide bomb", "bomb below Pillow's limit", "TIFF bomb"],
)
def test_image_bombs_are_reported_without_using_memory(content, words, tmp_path, ingest):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(content())
    (tmp_path / "images" / "a" / "1.png").write_bytes(picture())  # an image for the test split
    result = ingest(tmp_path / "images", "image-folder", memory=True)
    assert_refused(result, 1, "images/a/0.png")
    assert any(word in result.err for word in words.split("|"))


def test_a_class_folder_whose_name_is_not_valid_text_is_rejected(tmp_path, ingest):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(picture())
    (folder / "a" / "1.png").write_bytes(picture())
    (folder / "a").rename(folder / os.fsdecode(b"caf\xe9"))  # Latin-1
    assert_refused(ingest(folder, "image-folder"), 1, r"caf\udce9/0.png' is not valid UTF-8")


# HDF5 and MATLAB.


def external(file, outside):
    file.create_dataset("images", (1, 5, 5, 1), "u1", external=[(str(outside / "canary"), 0, 25)])


def external_link(file, outside):
    file["images"] = h5py.ExternalLink(str(outside / "other.h5"), "/images")


def huge(file, outside):
    file.create_dataset("images", (1 << 40, 5, 5, 1), "u1", chunks=(1, 5, 5, 1))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (external, "is stored in other files"),
        (external_link, "contains 'images' as a link"),
        (huge, "needs 27.5 TB"),
    ],
)
def test_an_hdf5_file_with_external_data_or_a_huge_array_is_rejected(write, words, tmp_path, ingest):
    outside = tmp_path / "outside"
    outside.mkdir()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file, outside)
        file["labels"] = np.zeros(1, np.int64)
    assert_refused(ingest(tmp_path / "a.h5", "hdf5", memory=True), 1, words)


def test_a_mat_file_that_claims_a_huge_size_is_rejected(tmp_path, ingest):
    good = bytearray(TARGETS["svhn"].seeds()[0])
    at = good.index(struct.pack("<4i", 32, 32, 3, 2))
    good[at : at + 16] = struct.pack("<4i", 32, 32, 3, 2**31 - 1)
    (tmp_path / "svhn").mkdir()
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / "svhn" / name).write_bytes(good)
    assert_refused(
        ingest(tmp_path / "svhn", "svhn", memory=True), 1, "'X' of shape (32, 32, 3, 2147483647) does not match its"
    )
