"""TinyImageNet as published: the same images from folder and zip, val/ as test split, nothing extracted or guessed."""

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
    """Return a data set of three classes, 2 train images each and 4 in val/, one of them grey, by name."""
    tree = {
        "wnids.txt": "\n".join([*WNIDS, "n99"]).encode(),  # a class without a folder, as in a part of the data set
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
    """Return a function that writes a tree of files as a folder or as a zip, and returns where."""
    return PLACES[request.param]


def read(path: Path, **more) -> PublishedData:
    return read_source(SourceConfig(path=str(path), **more))


def test_folder_and_zip_give_the_same_images_in_the_order_of_wnids(place, tmp_path):
    tree = files()
    before = {**tree}
    path = place(tmp_path, tree)
    there = sorted(tmp_path.rglob("*"))
    data = read(path)
    assert sorted(tmp_path.rglob("*")) == there
    train, test = data.splits["train"], data.splits["test"]
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for row, (wnid, k) in enumerate((wnid, k) for wnid in WNIDS for k in range(2)):
        np.testing.assert_array_equal(train.images[row], decoded(before[f"train/{wnid}/images/{wnid}_{k}.JPEG"]))
    assert test.labels.tolist() == [1, 0, 2, 0]
    for row, k in enumerate([3, 0, 1, 2]):
        np.testing.assert_array_equal(test.images[row], decoded(before[f"val/images/val_{k}.JPEG"]))
    assert data.class_names == ("goldfish", "crane (n01)", "crane (n02)")
    assert "ImageNet" in data.licence
    assert "Russakovsky" in data.citation


def test_grey_images_become_three_equal_channels(place, tmp_path):
    image = read(place(tmp_path, files())).splits["train"].images[3]
    assert (image[..., :1] == image).all()


def test_the_folder_above_will_do_and_files_that_count_are_listed(tmp_path):
    folder = unpacked(tmp_path, files())
    assert read(tmp_path).class_names == read(folder).class_names
    listed = [file.relative_to(folder).as_posix() for file in source_files(SourceConfig(path=str(folder)))]
    assert listed[:4] == ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n03/images/n03_0.JPEG"]
    assert set(files()) - set(listed) == {"test/images/test_0.JPEG", *(f"train/{n}/{n}_boxes.txt" for n in WNIDS)}


def test_it_is_preferred_to_a_folder_of_images_and_a_folder_of_images_is_no_tiny_imagenet(tmp_path):
    folder = unpacked(tmp_path, files())
    for path in (folder, tmp_path):
        assert TINY_IMAGENET.recognise(path)
        assert read(path).class_names[0] == "goldfish"
    (folder / "wnids.txt").unlink()
    assert not TINY_IMAGENET.recognise(folder)


def test_a_folder_with_nothing_but_the_zip_stands_for_the_zip(tmp_path):
    zipped(tmp_path / "tiny-imagenet-200.zip", files())
    assert len(read(tmp_path).splits["train"]) == 6
    assert source_files(SourceConfig(path=str(tmp_path))) == [tmp_path / "tiny-imagenet-200.zip"]


ANNOTATIONS = files()["val/val_annotations.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words.txt": None}, r"not a whole tiny-imagenet-200: 'words.txt' missing"),
        ({"val/val_annotations.txt": None}, r"'val/val_annotations.txt' missing"),
        ({"wnids.txt": b"n01\nn02"}, r"train/ has the classes \['n03'\], which wnids.txt names not"),
        ({f"train/n03/images/n03_{k}.JPEG": None for k in range(2)}, r"names 'val_0.JPEG' of the class 'n03'"),
        ({"val/images/val_0.JPEG": None}, r"names 'val_0.JPEG' of the class 'n03'"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"val_0.JPEG\tn03\t0"}, r"names 'val_0.JPEG' of the class 'n03'"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"../x.JPEG\tn03\t0"}, r"names '../x.JPEG' of the class"),
        ({"val/val_annotations.txt": ANNOTATIONS + b"junk"}, r"names 'junk' of the class ''"),
        ({"val/val_annotations.txt": b""}, r"val_0.JPEG'? .*has no class in val/val_annotations.txt"),
        ({"val/images/val_9.JPEG": jpeg(3)}, r"val_9.JPEG'? .*has no class in val/val_annotations.txt"),
        ({"train/n01/images/n01_0.JPEG": b"no image"}, r"n01_0.JPEG.* is not an image that lsmix can read"),
        ({"train/n01/images/n01_0.JPEG": jpeg(0)[:-200]}, r"n01_0.JPEG.* is not an image that lsmix can read"),
        ({"train/n01/images/n01_0.JPEG": jpeg(0, side=9)}, r"8×8 .*n03_0.JPEG.*, 9×9 .*n01_0.JPEG"),
        ({"train/n01/images/n01_0.JPEG": bytes(2 << 20)}, r"n01_0.JPEG.* has more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_missing_inconsistent_and_damaged_files_are_named(place, tmp_path, change, message):
    tree = {name: content for name, content in (files() | change).items() if content is not None}
    with pytest.raises(SourceError, match=message):
        read(place(tmp_path, tree))


def test_a_zip_cut_short_anywhere_is_an_error(tmp_path):
    content = zipped(tmp_path / "tiny-imagenet-200.zip", files()).read_bytes()
    for length in range(0, len(content) - 1, len(content) // 31):
        (tmp_path / "tiny-imagenet-200.zip").write_bytes(content[:length])
        with pytest.raises(SourceError, match="is damaged"):
            read(tmp_path / "tiny-imagenet-200.zip")


def test_any_flipped_byte_of_a_zip_is_an_error_or_harmless(tmp_path):
    path = zipped(tmp_path / "tiny-imagenet-200.zip", files())
    content, data = path.read_bytes(), read(path)
    with zipfile.ZipFile(path) as archive:
        end = archive.start_dir  # behind it stands the list of names, which has no checksum in a zip
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
        (member("/etc/passwd"), "'/etc/passwd' in .* is a name that leads out"),
        (member("tiny-imagenet-200/../../x"), "is a name that leads out"),
        (member("tiny-imagenet-200/train/n01/images/x.JPEG", stat.S_IFLNK | 0o777), "is a link or device"),
        (member("tiny-imagenet-200/wnids.txt"), "is there twice"),
    ],
)
def test_a_member_that_no_published_archive_has_is_refused(tmp_path, odd, message):
    path = zipped(tmp_path / "any.zip", files())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the name that is there twice
        archive.writestr(odd, "x")
    with pytest.raises(SourceError, match=message):
        read(path)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    path = zipped(tmp_path / "any.zip", {**files(), "test/zeros": bytes(8 << 20)})
    assert len(read(path).splits["train"]) == 6
    monkeypatch.setattr("lsmix.data.readers.trees._SPARE_BYTES", 1 << 20)
    with pytest.raises(SourceError, match=r"would unpack from \d+ to 8\d+ bytes"):
        read(path)
    monkeypatch.setattr("lsmix.data.readers.trees._MAX_MEMBERS", 3)
    with pytest.raises(SourceError, match="in 19 files"):
        read(path)


def test_an_archive_of_something_else_is_not_recognised(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    (tmp_path / "y.zip").write_bytes(b"PK no archive")
    for name in ("x.zip", "y.zip"):
        assert not TINY_IMAGENET.recognise(tmp_path / name)
    with open_tree(tmp_path / "x.zip") as members, pytest.raises(SourceError, match="has more than 0 bytes"):
        members.read("notes.txt", 0)


def test_real_images_are_the_same_from_folder_and_zip(shared_data, tmp_path):
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
