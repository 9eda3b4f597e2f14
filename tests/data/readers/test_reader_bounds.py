"""Readers reject decompression bombs, false sizes and endless files within limits of memory and time.

The files are read in a separate process whose peak memory is measured and whose duration is limited.
"""

import gzip
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_targets import TARGETS
from PIL import Image

from lsmix.data.errors import SourceError
from lsmix.data.readers.registry import SourceConfig, read_source

PEAK_BYTES = 200 << 20  # including about 50 MB for imports; the claimed sizes alone would exceed it
SECONDS = 60  # far more than a rejection takes on a busy machine, and less than reading the data would take
_READ = """
import sys
from pathlib import Path
from lsmix.data.errors import LsmixError
from lsmix.data.readers.registry import SourceConfig, read_source, source_files
from lsmix.pipeline.workspace.cache_key import SourceDigests
for path, form in zip(sys.argv[1::2], sys.argv[2::2]):
    config = SourceConfig(path=path, format=form)
    try:
        SourceDigests(Path(path + ".memory")).digest(source_files(config), Path("/"), remember=False)
        print(len(read_source(config).splits["train"]), "images")
    except LsmixError as error:
        print(error)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def read_alone(*sources: tuple[Path, str]) -> list[str]:
    """Hash and read data sets in a separate process, check its peak memory, and return one line of output for each."""
    words = [str(word) for source in sources for word in source]
    done = subprocess.run(
        [sys.executable, "-c", _READ, *words], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    assert int(peak) * 1024 < PEAK_BYTES, lines
    assert len(lines) == len(sources), lines
    return lines


def zeros(count: int, wbits: int = 15, head: bytes = b"") -> bytes:
    """Return ``head`` followed by zeros, compressed with deflate in constant memory."""
    packer = zlib.compressobj(1, wbits=wbits)
    packed = [packer.compress(head)] + [packer.compress(bytes(1 << 22)) for _ in range(count >> 22)]
    return b"".join(packed) + packer.flush()


# HDF5.


def hdf5_with(path: Path, shape: tuple[int, ...], packed: bytes, mask: int = 0, **filters: object) -> Path:
    """Write an HDF5 file whose images are one chunk that is stored as ``packed``."""
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("images", shape, "u1", chunks=shape, **filters)
        stored.id.write_direct_chunk((0,) * len(shape), packed, mask)
        file["labels"] = np.zeros(shape[0], np.int64)
    return path


LZF_BOMB = b"\x00\x00" + b"\xe0\xff\x00" * 1_390_000  # one zero, followed by many references to 264 zeros each


CHUNKS = {
    "masked shuffle": ((4096, 32, 32, 1), lambda: zeros(256 << 20), 1, {"shuffle": True, "compression": "gzip"}, "unpacks to more than its"),
    "lzf": ((4096, 32, 32, 1), lambda: LZF_BOMB, 0, {"compression": "lzf"}, "unpacks to more than its"),
    "lzf and masked shuffle": ((4096, 32, 32, 1), lambda: LZF_BOMB, 1, {"shuffle": True, "compression": "lzf"}, "unpacks to more than its"),
    "huge chunk": ((1 << 19, 32, 32, 1), lambda: zeros(8 << 20) * 99, 0, {"compression": "gzip"}, "has chunks of 536.9 MB"),
    "short": ((64, 4, 4, 1), lambda: zeros(0, head=bytes(9)), 0, {"compression": "gzip"}, "unpacks to 9 of its 1024 bytes"),
    "short and unpacked": ((64, 4, 4, 1), lambda: bytes(9), 1, {"compression": "gzip"}, "a chunk of 1024 bytes is stored in 9"),
    "unpacked": ((64, 4, 4, 1), lambda: bytes(1024), 1, {"compression": "gzip"}, "64 images"),
}  # fmt: skip


def test_an_hdf5_chunk_is_read_only_if_it_unpacks_to_its_exact_size(tmp_path):
    sources = []
    for name, (shape, packed, mask, filters, _) in CHUNKS.items():
        sources.append((hdf5_with(tmp_path / f"{name}.h5", shape, packed(), mask, **filters), "hdf5"))
    for line, (*_, words) in zip(read_alone(*sources), CHUNKS.values(), strict=True):
        assert words in line


@pytest.mark.parametrize(
    "filters", [{"compression": "lzf"}, {"compression": "gzip", "shuffle": True, "fletcher32": True}]
)
@pytest.mark.parametrize("kind", ["noise", "zeros", "steps"])
def test_every_file_compressed_by_h5py_passes_the_size_checks(kind, filters, tmp_path):
    draw = np.random.default_rng(3)
    images = draw.integers(0, 256, (300, 9, 9, 3), np.uint8) >> {"noise": 0, "zeros": 8, "steps": 6}[kind]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(128, 9, 9, 2), **filters)
        file.create_dataset("labels", data=np.arange(300) % 7, **filters)
    read = read_source(SourceConfig(path=str(tmp_path / "a.h5")))
    np.testing.assert_array_equal(read.splits["train"].images, images)


# Archives.


def tar_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


EXTENSIONS = [tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE]  # the name of the next member, and a header that is skipped


def test_tar_headers_of_hundreds_of_megabytes_are_not_read(tmp_path):
    zeros, noise, sources = gzip.compress(bytes(4 << 20)), gzip.compress(os.urandom(5 << 19)), []
    for number, kind in enumerate(EXTENSIONS):
        path = tmp_path / f"{number}.tar.gz"
        # The noise makes the file large enough that it is decompressed, in pieces.
        path.write_bytes(gzip.compress(tar_header(kind, 220 << 20)) + zeros * 55 + noise)
        sources.append((path, "cifar10-python"))
    (tmp_path / "small.tar.gz").write_bytes(gzip.compress(tar_header(EXTENSIONS[0], 220 << 20)) + zeros * 55)
    *damaged, small = read_alone(*sources, (tmp_path / "small.tar.gz", "cifar10-python"))
    assert all("is damaged" in line for line in damaged)
    assert "unpacks to more than" in small


def test_pax_headers_that_take_minutes_to_parse_are_rejected(tmp_path):
    good = TARGETS["cifar-tar"].seeds()[0]
    header = tar_header(tarfile.XHDTYPE, 200 * 1024) + b"1" * (200 * 1024)
    (tmp_path / "cifar-10-python.tar").write_bytes(header + good)
    with pytest.raises(SourceError, match="headers of a member have more than 65,536 bytes"):
        read_source(SourceConfig(path=str(tmp_path / "cifar-10-python.tar"), format="cifar10-python"))


@pytest.mark.parametrize("record", [b"99999999999999999999 path=x\n", b"29 size=99999999999999999999\n"])
@pytest.mark.parametrize("form", ["auto", "cifar10-python"])
def test_a_tar_with_numbers_beyond_64_bits_in_its_headers_is_rejected(record, form, tmp_path):
    header = tar_header(tarfile.XHDTYPE, len(record)) + record.ljust(tarfile.BLOCKSIZE, b"\0")
    (tmp_path / "cifar-10-python.tar").write_bytes(header + TARGETS["cifar-tar"].seeds()[0])
    with pytest.raises(SourceError, match="is damaged or not a tar archive"):
        read_source(SourceConfig(path=str(tmp_path / "cifar-10-python.tar"), format=form))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: tarfile.GNUTYPE_SPARSE.join([header[:156], header[157:]]), "is sparse or has a negative size"),
        (lambda header: header[:124] + b"\xff" * 12 + header[136:], "is sparse or has a negative size"),
        (lambda header: header * 2, "occurs twice"),
    ],
    ids=["sparse", "negative size", "member twice"],
)
def test_a_tar_with_an_unsupported_member_is_rejected(change, words, tmp_path):
    header = change(tarfile.TarInfo("cifar-10-batches-py/readme.html").tobuf())
    blocks = [header[at : at + 512] for at in range(0, len(header), 512)]
    sums = [block[:148] + b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:])) + block[156:] for block in blocks]
    (tmp_path / "a.tar").write_bytes(b"".join(sums) + TARGETS["cifar-tar"].seeds()[0])
    with pytest.raises(SourceError, match=words):
        read_source(SourceConfig(path=str(tmp_path / "a.tar"), format="cifar10-python"))


def zip_changed(content: bytes, name: bytes, packed: bytes, method: int, size: int) -> bytes:
    """Return a zip with the content of one member replaced, and its compression method and size in the directory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, packed if info.filename.encode() == name else old.read(info))
    changed = bytearray(buffer.getvalue())
    at = changed.index(name, changed.index(b"PK\x01\x02")) - 46
    struct.pack_into("<H", changed, at + 10, method)
    struct.pack_into("<I", changed, at + 24, size)
    return bytes(changed)


WNIDS = b"tiny-imagenet-200/wnids.txt"


def test_reading_stops_at_the_declared_size_of_a_zip_member(tmp_path):
    long = zeros(256 << 20, -15)
    content = zip_changed(TARGETS["tiny-imagenet-zip"].seeds()[0], WNIDS, long, zipfile.ZIP_DEFLATED, 8)
    (tmp_path / "a.zip").write_bytes(content)
    header = zeros(240 << 20, -15, b"\x93NUMPY\x02\x00" + struct.pack("<I", 240 << 20))
    content = zip_changed(TARGETS["npz"].seeds()[0], b"images.npy", header, zipfile.ZIP_DEFLATED, (240 << 20) + 12)
    (tmp_path / "a.npz").write_bytes(content)
    first, second = read_alone((tmp_path / "a.zip", "tiny-imagenet"), (tmp_path / "a.npz", "npz"))
    assert "is damaged (Bad CRC-32" in first
    assert "is damaged or not a NumPy array" in second


@pytest.mark.parametrize("method", [9, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 93, 99], ids=["deflate64", "bzip2", "lzma", "zstd", "unknown"])  # fmt: skip
@pytest.mark.parametrize(("form", "name"), [("tiny-imagenet", WNIDS), ("npz", b"images.npy")])
def test_a_zip_member_with_an_unsupported_compression_method_is_rejected(form, name, method, tmp_path):
    seed = TARGETS["tiny-imagenet-zip" if form == "tiny-imagenet" else form].seeds()[0]
    (tmp_path / "a.zip").write_bytes(zip_changed(seed, name, os.urandom(100), method, 100))
    with pytest.raises(
        SourceError, match=f"uses compression method {method}; only members that are stored or deflated"
    ):
        read_source(SourceConfig(path=str(tmp_path / "a.zip"), format=form))


def test_an_encrypted_zip_member_is_rejected(tmp_path):
    content = bytearray(TARGETS["npz"].seeds()[0])
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SourceError, match=r"'images' in .* is encrypted"):
        read_source(SourceConfig(path=str(tmp_path / "a.npz")))


# Arrays of NumPy.


def npz_with(path: Path, shape: str) -> Path:
    header = f"{{'descr':'|u1','fortran_order':False,'shape':{shape}}}".encode().ljust(118) + b"\n"
    labels = io.BytesIO()
    np.save(labels, np.zeros(1, np.int64))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16))
        archive.writestr("labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    "shape",
    ["(True,4,4)", "(1,4,4,True)", "(-1,-4,4)", "(1<<60,)", f"({1 << 60},0)", f"({'9' * 4000},{'9' * 4000})", "((1,4),4)",
     "(1.0,4,4)", "('1',4,4)", "(None,)", "[1,4,4]", "16", "(1,)*40", f"({'1,' * 40})", "(1,1,1,4,4)", "{}", "(1,4,4"],
)  # fmt: skip
def test_an_invalid_shape_is_rejected_with_a_short_message(shape, tmp_path):
    with pytest.raises(SourceError, match=r"'images' in .* is damaged") as caught:
        read_source(SourceConfig(path=str(npz_with(tmp_path / "a.npz", shape))))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("code", [0xFFFFFFFF, 0x110000, 0xD800, 0x80000000])
@pytest.mark.parametrize("order", "<>")
def test_a_class_name_with_an_invalid_character_is_rejected(code, order, tmp_path):
    arrays = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 1])}
    names = np.frombuffer(struct.pack(f"{order}4I", 97, 0, 98, code), f"{order}U2")
    np.savez(tmp_path / "a.npz", **arrays, class_names=names)
    with pytest.raises(SourceError, match=r"an invalid character|is not valid text"):
        read_source(SourceConfig(path=str(tmp_path / "a.npz")))


# Images.


def test_a_small_tiff_with_huge_tiles_is_rejected(tmp_path):
    side = 16_384
    data = zeros(side * side)
    numbers = {
        256: 16,
        257: 16,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: side,
        323: side,
        324: 8 + 2 + 12 * 10 + 4,
        325: len(data),
    }
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    content = b"II*\0" + struct.pack("<IH", 8, len(numbers)) + tags + bytes(4) + data
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.tif").write_bytes(content)
    assert "would unpack from" in read_alone((tmp_path / "images", "image-folder"))[0]


# Devices, pipes, sockets and links.


def good_folder(form: str, folder: Path) -> Path:
    """Write a valid data set as a folder; return one of the files that the reader needs."""
    if form == "image-folder":
        (folder / "a").mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "a" / "0.png")
        return folder / "a" / "0.png"
    if form == "tiny-imagenet":
        with zipfile.ZipFile(io.BytesIO(TARGETS["tiny-imagenet-zip"].seeds()[0])) as archive:
            archive.extractall(folder)
        return folder / "tiny-imagenet-200/train/n01/images/n01_0.JPEG"
    TARGETS["cifar-batch"].read(TARGETS["cifar-batch"].seeds()[0], folder)
    return folder / "cifar-10-batches-py/data_batch_3"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # the path of a socket is limited to 107 bytes


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def broken_link(path: Path) -> None:
    path.symlink_to("nothing")


ENDLESS = [pipe, listening, device]


def test_paths_that_are_not_regular_files_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = []
    for make in ENDLESS:
        for name in ("a.npz", "a.h5", "cifar-10-python.tar.gz", "tiny-imagenet-200.zip"):
            path = tmp_path / make.__name__ / name
            path.parent.mkdir(exist_ok=True)
            make(path)
            sources.append((path, "auto"))
    for line in read_alone(*sources):
        assert "is a device, pipe or socket; expected a file or folder" in line


def test_errors_name_parts_of_data_sets_that_are_not_regular_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources, names = [], []
    for form in ("image-folder", "tiny-imagenet", "cifar10-python"):
        for make in (*ENDLESS, broken_link):
            folder = tmp_path / f"{form}-{make.__name__}"
            part = good_folder(form, folder)
            part.unlink()
            make(part)
            sources.append((folder, form))
            names.append(part.name)
    for line, name in zip(read_alone(*sources), names, strict=True):
        assert name in line
        assert re.search("device, pipe or socket|missing|cannot be opened|does not exist", line)


def test_oversized_files_are_rejected_before_they_are_hashed(tmp_path):
    (tmp_path / "a.npz").write_bytes(TARGETS["npz"].seeds()[0])
    hdf5_with(tmp_path / "a.h5", (64, 4, 4, 1), bytes(1024))
    for name in ("a.npz", "a.h5"):
        os.truncate(tmp_path / name, 1 << 40)
    for line in read_alone((tmp_path / "a.npz", "auto"), (tmp_path / "a.h5", "auto")):
        assert "is too large: 1.1 TB" in line
