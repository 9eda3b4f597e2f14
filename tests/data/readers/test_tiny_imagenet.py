"""The reader of TinyImageNet: folder and zip give the same images, val/ is the test split, and nothing is extracted."""

import io
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsmix.data.errors import SourceError
from lsmix.data.readers.published.tiny_imagenet import TINY_IMAGENET
from lsmix.data.readers.registry import SourceConfig, read_source, source_files
from lsmix.data.readers.source_images import PublishedData
from lsmix.data.readers.trees import open_tree

WNIDS = ["n03", "n01", "n02"]


def jpeg(seed: int, mode: str = "RGB", side: int = 8) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, side, 3) if mode == "RGB" else (side, side), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def files() -> dict[str, bytes]:
    """Return the files of a data set with three classes, two training images each (one is grey) and four in val/."""
    tree = {
        "wnids.txt": "\n".join([*WNIDS, "n99"]).encode(),  # a class without a folder, as in a subset
        "words.txt": b"n00\tentity\nn01\tcrane, a bird\nn02\tcrane\nn03\tgoldfish, Carassius auratus\n",
        "val/val_annotations.txt": b"val_3.JPEG\tn01\t0\t1\t2\t3\nval_0.JPEG\tn03\t0\t1\t2\t3\nval_1.JPEG\tn02\t0\t0\t7\t7\nval_2.JPEG\tn03\t0\t0\t7\t7\n",
        "test/images/test_0.JPEG": b"never read",
    }
    for number, wnid in enumerate(WNIDS):
        tree[f"train/{wnid}/{wnid}_boxes.txt"] = b"never read"
        for k in range(2):
            tree[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(
                10 * number + k, "L" if (number, k) == (1, 1) else "RGB"
            )
    for k in range(4):
        tree[f"val/images/val_{k}.JPEG"] = jpeg(100 + k)
    return tree


def unpacked(parent: Path, tree: dict[str, bytes]) -> Path:
    folder = parent / "tiny-imagenet-200"
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path: Path, tree: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("tiny-imagenet-200")
        for name, content in tree.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path


PLACES = {"folder": unpacked, "zip": lambda parent, tree: zipped(parent / "any.zip", tree)}


@pytest.fixture(params=PLACES)
def place(request):
    """Return a function that writes files as a folder or as a zip and returns its path."""
    return PLACES[request.param]


def read(path: Path, **more) -> PublishedData:
    return read_source(SourceConfig(path=str(path), **more))


def test_folder_and_zip_give_the_same_images_in_the_order_of_wnids(place, tmp_path):
    tree = files()
    path = place(tmp_path, tree)
    before = sorted(tmp_path.rglob("*"))
    data = read(path)
    assert sorted(tmp_path.rglob("*")) == before
    train, test = data.splits["train"], data.splits["test"]
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for row, (wnid, k) in enumerate((wnid, k) for wnid in WNIDS for k in range(2)):
        np.testing.assert_array_equal(train.images[row], decoded(tree[f"train/{wnid}/images/{wnid}_{k}.JPEG"]))
    assert test.labels.tolist() == [1, 0, 2, 0]
    for row, k in enumerate([3, 0, 1, 2]):
        np.testing.assert_array_equal(test.images[row], decoded(tree[f"val/images/val_{k}.JPEG"]))
    assert data.class_names == ("goldfish", "crane (n01)", "crane (n02)")
    assert "ImageNet" in data.licence
    assert "Russakovsky" in data.citation


def test_grey_images_become_three_equal_channels(place, tmp_path):
    image = read(place(tmp_path, files())).splits["train"].images[3]
    assert (image[..., :1] == image).all()


def test_the_parent_folder_is_read_and_the_files_used_are_listed(tmp_path):
    folder = unpacked(tmp_path, files())
    assert read(tmp_path).class_names == read(folder).class_names
    listed = [file.relative_to(folder).as_posix() for file in source_files(SourceConfig(path=str(folder)))]
    assert listed[:4] == ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n03/images/n03_0.JPEG"]
    assert set(files()) - set(listed) == {"test/images/test_0.JPEG", *(f"train/{n}/{n}_boxes.txt" for n in WNIDS)}


def test_the_format_takes_precedence_over_image_folders_but_needs_wnids(tmp_path):
    folder = unpacked(tmp_path, files())
    for path in (folder, tmp_path):
        assert TINY_IMAGENET.recognise(path)
        assert read(path).class_names[0] == "goldfish"
    (folder / "wnids.txt").unlink()
    assert not TINY_IMAGENET.recognise(folder)


def test_a_folder_with_only_the_zip_is_read_like_the_zip(tmp_path):
    zipped(tmp_path / "tiny-imagenet-200.zip", files())
    assert len(read(tmp_path).splits["train"]) == 6
    assert source_files(SourceConfig(path=str(tmp_path))) == [tmp_path / "tiny-imagenet-200.zip"]


ANNOTATIONS = files()["val/val_annotations.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words.txt": None}, r"an incomplete copy of tiny-imagenet-200: 'words.txt' missing"),
        ({"val/val_annotations.txt": None}, r"'val/val_annotations.txt' missing"),
        ({"wnids.txt": b"n01\nn02"}, r"train/ contains the classes \['n03'\], which are missing in wnids.txt"),
        ({f"train/n03/images/n03_{k}.JPEG": None for k in range(2)}, r"lists 'val_0.JPEG' with the class 'n03'"),
        ({"val/images/val_0.JPEG": None}, r"lists 'val_0.JPEG' with the class 'n03'"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"val_0.JPEG\tn03\t0"}, r"lists 'val_0.JPEG' with the class 'n03'"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"../x.JPEG\tn03\t0"}, r"lists '../x.JPEG' with the class"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"junk"}, r"lists 'junk' with the class ''"),
        ({"val/val_annotations.txt": b""}, r"val_0.JPEG'? .*has no class in val/val_annotations.txt"),
        ({"val/images/val_9.JPEG": jpeg(3)}, r"val_9.JPEG'? .*has no class in val/val_annotations.txt"),
        ({"train/n01/images/n01_0.JPEG": b"no image"}, r"n01_0.JPEG.* is not an image that lsmix can read"),
        ({"train/n01/images/n01_0.JPEG": jpeg(0)[:-200]}, r"n01_0.JPEG.* is not an image that lsmix can read"),
        ({"train/n01/images/n01_0.JPEG": jpeg(0, side=9)}, r"8×8 .*n03_0.JPEG.*, 9×9 .*n01_0.JPEG"),
        ({"train/n01/images/n01_0.JPEG": bytes(2 << 20)}, r"n01_0.JPEG.* is too large; at most 1.0 MB"),
    ],
)  # fmt: skip
def test_errors_name_missing_inconsistent_and_damaged_files(place, tmp_path, change, message):
    tree = {name: content for name, content in (files() | change).items() if content is not None}
    with pytest.raises(SourceError, match=message):
        read(place(tmp_path, tree))


def test_a_truncated_zip_is_an_error(tmp_path):
    content = zipped(tmp_path / "tiny-imagenet-200.zip", files()).read_bytes()
    for length in range(0, len(content) - 1, len(content) // 31):
        (tmp_path / "tiny-imagenet-200.zip").write_bytes(content[:length])
        with pytest.raises(SourceError, match="is damaged"):
            read(tmp_path / "tiny-imagenet-200.zip")


def test_any_flipped_byte_of_a_zip_is_an_error_or_harmless(tmp_path):
    path = zipped(tmp_path / "tiny-imagenet-200.zip", files())
    content, data = path.read_bytes(), read(path)
    with zipfile.ZipFile(path) as archive:
        end = archive.start_dir  # start of the directory, which has no checksum in a zip
    for position in range(0, end, 53):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x44]) + content[position + 1 :])
        try:
            again = read(path, format="tiny-imagenet")
        except SourceError:
            continue
        np.testing.assert_array_equal(again.splits["train"].images, data.splits["train"].images)
        np.testing.assert_array_equal(again.splits["test"].images, data.splits["test"].images)


# The archive itself.


def member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (member("/etc/passwd"), "'/etc/passwd' in .* has a path outside of the archive"),
        (member("tiny-imagenet-200/../../x"), "has a path outside of the archive"),
        (member("tiny-imagenet-200/train/n01/images/x.JPEG", stat.S_IFLNK | 0o777), "is a link or device"),
        (member("tiny-imagenet-200/wnids.txt"), "occurs twice"),
    ],
)
def test_an_invalid_member_is_rejected(tmp_path, odd, message):
    path = zipped(tmp_path / "any.zip", files())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate name
        archive.writestr(odd, "x")
    with pytest.raises(SourceError, match=message):
        read(path)


def test_an_archive_with_an_implausible_compression_ratio_is_rejected(tmp_path, monkeypatch):
    path = zipped(tmp_path / "any.zip", {**files(), "test/zeros": bytes(8 << 20)})
    assert len(read(path).splits["train"]) == 6
    monkeypatch.setattr("lsmix.data.readers.trees._SPARE_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"would unpack from [\d.]+ kB to 8\.. MB"):
        read(path)
    monkeypatch.setattr("lsmix.data.readers.trees._MAX_MEMBERS", 3)
    with pytest.raises(SourceError, match="in 19 files"):
        read(path)


def test_other_archives_are_not_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    (tmp_path / "y.zip").write_bytes(b"PK no archive")
    for name in ("x.zip", "y.zip"):
        assert not TINY_IMAGENET.recognise(tmp_path / name)
    with open_tree(tmp_path / "x.zip") as members, pytest.raises(SourceError, match="is too large"):
        members.read("notes.txt", 0)


def test_published_images_are_the_same_in_folder_and_zip(shared_data, tmp_path):
    archive = shared_data / "tiny-imagenet-200-subset.zip"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    one, other = read(archive), read(tmp_path)
    assert one.class_names == other.class_names
    assert (len(one.class_names), one.class_names[0]) == (10, "bullfrog")
    for split, count in (("train", 120), ("test", 25)):
        assert one.splits[split].images.shape == (10 * count, 64, 64, 3)
        np.testing.assert_array_equal(one.splits[split].images, other.splits[split].images)
        assert np.bincount(one.splits[split].labels).tolist() == [count] * 10
        assert one.splits[split].labels.tolist() == other.splits[split].labels.tolist()
