"""Image files: no file is left out silently, pixels are as documented, and all layouts give the same data set."""

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.readers.registry import SourceConfig, read_source
from lsmix.data.readers.source_images import PublishedData

RNG = np.random.default_rng(0)


def put(path: Path, form: str = "PNG", side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path, form)
    return path


def base(root: Path, count: int = 10, classes=("a", "b")) -> None:
    for name in classes:
        for number in range(count):
            put(root / name / f"{number}.png")


def read(path: Path, **more) -> PublishedData:
    return read_source(SourceConfig(path=str(path), **more))


def used(data: PublishedData) -> dict[str, int]:
    assert data.report
    assert data.report.found == sum(data.report.used.values()) + data.report.skipped
    return {**data.report.used, "classes": len(data.class_names)}


def left_out(data: PublishedData) -> dict[str, int]:
    assert data.report
    return {group.reason: group.files for group in data.report.left_out}


# Files that must not be left out silently.


def test_phone_and_browser_formats_are_read_or_reported(tmp_path):
    base(tmp_path)
    for number in range(5):
        put(tmp_path / f"a/IMG_{number}.jfif", "JPEG")
        (tmp_path / f"b/IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        put(tmp_path / f"b/w{number}.avif", "AVIF")
    with pytest.raises(
        SourceError, match=r"5 images cannot be used.*(HEIC image|not an image).*IMG_0.HEIC.*IMG_4.HEIC"
    ):
        read(tmp_path)
    data = read(tmp_path, on_error="skip")
    assert used(data) == {"train": 30, "classes": 2}
    assert list(left_out(data).values()) == [5]


def test_images_in_sub_folders_of_a_class_are_read(tmp_path):
    base(tmp_path)
    for number in range(5):
        put(tmp_path / f"a/session2/deep/{number}.png")
    assert used(read(tmp_path)) == {"train": 25, "classes": 2}


def test_links_to_missing_files_are_reported_or_counted(tmp_path):
    base(tmp_path)
    for number in range(25):
        (tmp_path / f"a/l{number}.png").symlink_to(f"/nowhere/{number}.png")
    with pytest.raises(SourceError, match=r"25 images cannot be used\. .*a/l0\.png.*, 5 more\. .*on_error = \"skip\""):
        read(tmp_path)
    assert left_out(read(tmp_path, on_error="skip")) == {"cannot be opened (No such file or directory)": 25}


@pytest.mark.parametrize("name", ["valid", "Validation", "VAL", "test", "Testing"])
def test_all_usual_split_names_are_recognised(tmp_path, name):
    base(tmp_path / "Train")
    base(tmp_path / name, 5)
    data = read(tmp_path)
    assert used(data) == {"train": 20, "test": 10, "classes": 2}
    assert data.report.splits == {"train": "train", "val" if name.lower().startswith("val") else "test": "test"}


def test_val_is_the_held_out_split_if_there_is_a_test_split(tmp_path):
    base(tmp_path / "train")
    base(tmp_path / "val", 5)
    base(tmp_path / "test", 4)
    assert used(read(tmp_path)) == {"train": 20, "heldout": 10, "test": 8, "classes": 2}


def test_a_table_of_labels_next_to_a_single_folder_is_reported_and_can_be_read(tmp_path):
    lines = ["file,label"]
    for number in range(20):
        put(tmp_path / f"images/{number}.png")
        lines.append(f"{number}.png,{number % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(
        SourceError,
        match=r"fewer than two class folders, but the table 'labels.csv' lists images.*labels_file = 'labels.csv', file_column = 'file', label_column = 'label'",
    ):
        read(tmp_path)
    data = read(tmp_path, labels_file="labels.csv", file_column="file")
    assert used(data) == {"train": 20, "classes": 2}
    assert data.splits["train"].labels.tolist() == [0, 1] * 10


def test_files_with_several_frames_are_counted(tmp_path):
    base(tmp_path)
    frames = [Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    for form in ("tif", "gif", "png", "webp"):
        frames[0].save(tmp_path / f"a/x.{form}", save_all=True, append_images=frames[1:])
    data = read(tmp_path)
    assert used(data) == {"train": 24, "classes": 2}
    assert data.report.notes == [
        "only the first frame was used of files with several frames: 4 (a/x.gif, a/x.png, a/x.tif, …)"
    ]


def test_unused_files_are_counted_by_reason_with_three_examples(tmp_path):
    base(tmp_path / "train")
    for number in range(4):
        put(tmp_path / f"test/{number}.png")
        put(tmp_path / f"train/loose{number}.png")
    put(tmp_path / "extra/c/0.png")
    put(tmp_path / "train/a/.hidden.png")
    (tmp_path / "README.md").touch()
    data = read(tmp_path)
    assert used(data) == {"train": 20, "classes": 2}
    assert left_out(data) == {
        "hidden, or created by macOS": 1,
        "outside of the split folders": 1,
        "without a label, in a split folder without class folders": 4,
        "outside of the class folders": 4,
        "not a supported image type (.md)": 1,
    }
    examples = {group.reason: group.examples for group in data.report.left_out}
    assert examples["outside of the class folders"] == ["train/loose0.png", "train/loose1.png", "train/loose2.png"]


def test_damaged_images_are_reported_together_and_can_be_left_out(tmp_path):
    base(tmp_path)
    for number in (3, 5):
        (tmp_path / f"a/{number}.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"2 images cannot be used.*a/3\.png.*a/5\.png"):
        read(tmp_path)
    data = read(tmp_path, on_error="skip")
    assert used(data) == {"train": 18, "classes": 2}
    assert data.splits["train"].labels.tolist() == [0] * 8 + [1] * 10


@pytest.mark.parametrize("around", ["", "set", "download/set"])
@pytest.mark.parametrize("packed", [False, True])
def test_outer_folders_around_the_classes_or_splits_are_skipped(tmp_path, around, packed):
    base(tmp_path / "a" / around / "Train", 3)
    base(tmp_path / "a" / around / "VALID", 2)
    put(tmp_path / "a" / "preview.png")
    base(tmp_path / "b" / around, 3)
    path = tmp_path
    for name, splits in (("a", {"train": 6, "test": 4}), ("b", {"train": 6})):
        path = tmp_path / name
        if packed:
            made = Path(shutil.make_archive(str(tmp_path / "packed" / name), "zip", path))
            path = made.rename(made.with_suffix(".ZIP"))
        assert used(read(path)) == {**splits, "classes": 2}


def test_images_whose_labels_or_splits_would_be_ignored_are_reported(tmp_path):
    base(tmp_path / "test", 2)
    base(tmp_path / "val", 2)
    with pytest.raises(SourceError, match=r"no training images, only the split folders 'test', 'val'\. Rename one"):
        read(tmp_path)
    for number in range(4):
        put(tmp_path / f"flat/{number}.png")
    (tmp_path / "flat" / "sizes.csv").write_text("unit;mm\n")
    with pytest.raises(SourceError, match=r"no class folders with images; .*data\.labels_file"):
        read(tmp_path / "flat")
    (tmp_path / "flat" / "labels.csv").write_text("id;kind\n" + "".join(f"{n};{'ab'[n % 2]}\n" for n in range(4)))
    with pytest.raises(SourceError, match=r"'labels\.csv'.*file_column = 'id', label_column = 'kind'"):
        read(tmp_path / "flat")
    table = {"labels_file": "labels.csv", "file_column": "id", "label_column": "kind"}
    assert used(read(tmp_path / "flat", **table)) == {"train": 4, "classes": 2}
    put(tmp_path / "images/images/0.png")
    assert read(tmp_path / "images").report.notes == [
        "all images belong to one class, 'images'; use class folders or data.labels_file"
    ]


def test_loose_images_next_to_tables_or_tars_are_counted(tmp_path):
    for layout in (as_parquet, as_webdataset):
        path = layout(tree(), tmp_path / layout.__name__)
        put(path / "more" / "0.png")
        assert left_out(read(path)) == {"an image file in a data set of archives or tables": 1}


def test_heic_photographs_are_read(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pip install 'lsmix[heic]'")
    pillow_heif.register_heif_opener()
    pictures = [halves(64, 32), halves(64, 32).transpose(Image.Transpose.ROTATE_180)]
    (tmp_path / "a").mkdir()
    pictures[0].save(tmp_path / "a" / "0.HEIC", "HEIF", quality=-1, chroma=444)
    pictures[1].save(tmp_path / "a" / "1.heif", "HEIF", quality=-1, chroma=444, save_all=True, append_images=pictures)
    data = read(tmp_path)
    assert data.splits["train"].images.shape == (2, 32, 64, 3)
    for image, left in zip(data.splits["train"].images, ([255, 0, 0], [0, 0, 255]), strict=True):
        assert image[4, 4].tolist() == pytest.approx(left, abs=12)
    assert data.report.notes[-1].endswith("of files with several frames: 1 (a/1.heif)")


def test_the_error_for_heic_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.images.pixels._formats", lambda: ("PNG",))
    base(tmp_path, 1)
    (tmp_path / "a" / "IMG_0.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(SourceError, match=r"needs the extra 'heic'\. Run: pip install 'lsmix\[heic\]', or convert it"):
        read(tmp_path)


# Sizes and pixels.


def one(tmp_path: Path, image: Image.Image, name: str = "x.png", *, save: dict | None = None, **more) -> np.ndarray:
    (tmp_path / "a").mkdir(exist_ok=True)
    image.save(tmp_path / "a" / name, **(save or {}))
    return read(tmp_path, **more).splits["train"].images[0]


def halves(width: int, height: int) -> Image.Image:
    """Return an image whose left half is red and whose right half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_fit_gives_the_target_size_and_keeps_left_and_right(tmp_path, fit, name):
    image = one(tmp_path, halves(400, 200), name, size=(32, 48), fit=fit, background="#00ff00")
    assert image.shape == (32, 48, 3)
    assert image[16, 4].tolist() == pytest.approx([255, 0, 0], abs=6)
    assert image[16, -5].tolist() == pytest.approx([0, 0, 255], abs=6)
    assert (image[0, 4].tolist() == [0, 255, 0]) == (fit == "pad")


def test_crop_keeps_the_centre(tmp_path):
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 200
    image = one(tmp_path, Image.fromarray(pixels), size=10)
    assert (
        abs(image.astype(int) - 200).max() < 20
    )  # at the edges, the Lanczos filter includes black pixels from outside


def test_reducing_is_antialiased(tmp_path):
    board = np.indices((256, 256)).sum(0) % 2 * 255
    image = one(tmp_path, Image.fromarray(board.astype(np.uint8)), size=16)
    assert abs(image.astype(int) - 127).max() <= 2


def test_an_image_of_the_target_size_is_not_changed(tmp_path):
    pixels = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(one(tmp_path, Image.fromarray(pixels), size=16), pixels)


@pytest.mark.parametrize(
    ("name", "orientation"), [*(("x.jpg", turn) for turn in range(1, 9)), ("x.tif", 6), ("x.png", 6), ("x.webp", 6)]
)
def test_images_are_rotated_by_their_exif_orientation(tmp_path, orientation, name):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image = one(tmp_path, halves(48, 32), name, save={"exif": exif})
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a" / name)).convert("RGB")
    np.testing.assert_array_equal(image, np.asarray(expected))
    assert image.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))


def test_transparent_pixels_show_the_background(tmp_path):
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [9, 9, 9, 0]]], np.uint8))
    assert one(tmp_path, rgba).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert one(tmp_path, rgba, background="#0000ff").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert one(tmp_path, rgba.quantize(4)).tolist()[0][1] == [255, 255, 255]
    grey = Image.fromarray(np.array([[[7, 255], [9, 0]]], np.uint8))
    assert grey.mode == "LA"
    assert one(tmp_path, grey).tolist() == [[[7], [255]]]


def test_16_bit_grey_and_colour_images_are_scaled_alike(tmp_path):
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert one(tmp_path, Image.fromarray(deep))[..., 0].tolist() == [[0, 0, 1, 128, 255]]
    (tmp_path / "a" / "x.png").write_bytes(png16(deep))
    assert read(tmp_path).splits["train"].images[0, ..., 1].tolist() == [[0, 0, 1, 128, 255]]


def png16(pixels: np.ndarray) -> bytes:
    """Return a PNG with three equal 16-bit channels, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_cmyk_and_palettes_become_rgb(tmp_path):
    assert one(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "x.tif").tolist()[0][0] == [255, 0, 0]
    (tmp_path / "a" / "x.tif").unlink()
    assert one(tmp_path, Image.new("RGB", (4, 4), "red").quantize(4)).tolist()[0][0] == [255, 0, 0]


def test_enlarged_images_are_counted(tmp_path):
    base(tmp_path, 3)
    assert read(tmp_path, size=32).report.notes == ["images smaller than data.size were enlarged: 6"]


def test_the_error_for_several_sizes_lists_the_most_frequent_ones(tmp_path):
    for number, side in enumerate([10] * 5 + [20, 20, 30, 40, 50, 60]):
        put(tmp_path / f"a/{number:02}.png", side=side)
    with pytest.raises(
        SourceError, match=r"10×10 \(5, .*20×20 \(2, .* and 1 more sizes\. Add a line such as 'size = 8'"
    ):
        read(tmp_path)


@pytest.mark.parametrize("change", [{"size": -1}, {"size": 5000}, {"size": (0, 3)}, {"background": "pink"}])
def test_settings_out_of_range_are_rejected(change):
    with pytest.raises(ValueError, match=r"size must be a number of pixels|background must be white"):
        SourceConfig(**change)


# Layouts.


def tree() -> dict[str, bytes]:
    """Return the images of three classes by name."""
    files = {}
    for name in ("cat", "dog", "fox"):
        for number in range(3):
            stream = io.BytesIO()
            Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
            files[f"{name}/{number}.png"] = stream.getvalue()
    return files


def as_folder(files: dict[str, bytes], path: Path, prefix: str = "") -> Path:
    for name, content in files.items():
        (path / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (path / prefix / name).write_bytes(content)
    return path


def as_zip(files, path):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, content in files.items():
            archive.writestr(f"wrapper/{name}", content)
        archive.writestr("__MACOSX/wrapper/._0.png", b"x")
    return path.with_suffix(".zip")


def as_tar(files, path, mode="w", suffix=".tar"):
    with tarfile.open(path.with_suffix(suffix), mode) as archive:
        for name, content in reversed(files.items()):
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.with_suffix(suffix)


def as_table(files, path, name="metadata.csv", separator=","):
    flat = {f"{number}.png": content for number, content in enumerate(files.values())}
    lines = [separator.join((f"{number}.png", key.split("/")[0])) for number, key in enumerate(files)]
    as_folder(flat, path)
    (path / name).write_text("\n".join([separator.join(("file_name", "label")), *lines]) + "\n")
    return path


def as_json_lines(files, path):
    as_table(files, path)
    lines = [{"file_name": f"{number}.png", "label": key.split("/")[0]} for number, key in enumerate(files)]
    (path / "metadata.csv").unlink()
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def as_webdataset(files, path, label=lambda name: (".json", json.dumps({"label": name}).encode())):
    path.mkdir(parents=True, exist_ok=True)
    members = {}
    for number, (name, content) in enumerate(files.items()):
        ending, text = label(name.split("/")[0])
        members |= {f"{number:04}.png": content, f"{number:04}{ending}": text}
    for start, shard in ((0, "train-000.tar"), (8, "train-001.tar")):
        part = dict(list(members.items())[start : start + 8 if start == 0 else None])
        with tarfile.open(path / shard, "w") as archive:
            for name, content in part.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def as_parquet(files, path, names=("cat", "dog", "fox")):
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [names.index(name.split("/")[0]) for name in files]
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (path / "data").mkdir(parents=True)
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    return path


def as_arrow(files, path, names=("cat", "dog", "fox")):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": content, "path": None} for content in files.values()]
    labels = [name.split("/")[0] for name in files]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(path)
    return path


def arrays(files) -> dict[str, np.ndarray]:
    names = [name.split("/")[0] for name in files]
    class_names, labels = np.unique(names, return_inverse=True)
    images = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files.values()])
    return {"images": images, "labels": labels, "class_names": class_names}


def as_arrays(files, path):
    np.savez(path.with_suffix(".npz"), **arrays(files))
    return path.with_suffix(".npz")


def as_hdf5(files, path):
    import h5py

    with h5py.File(path.with_suffix(".h5"), "w") as file:
        for name, array in arrays(files).items():
            file[name] = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
    return path.with_suffix(".h5")


LAYOUTS = {
    "folder": as_folder,
    "wrapped folder": lambda files, path: as_folder(files, path, "wrapper"),
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": lambda files, path: as_tar(files, path, "w:gz", ".tar.gz"),
    "CSV": as_table,
    "JSON lines": as_json_lines,
    "WebDataset": as_webdataset,
    "Parquet": as_parquet,
    "save_to_disk": as_arrow,
    "NumPy arrays": as_arrays,
    "HDF5": as_hdf5,
}


def ingested(command, path: Path, *more: str) -> Path:
    """Ingest a path with the command line and return the data set."""
    (path.parent / "my.toml").write_text(f'name = "x"\n[data]\npath = "{path}"\ntest = 3\nheldout = 2\n')
    runs = path.parent / "runs"
    result = command("ingest", path.parent / "my.toml", "--workspace", runs, *more)
    assert result.code == 0, result.err
    return next(runs.glob("ingest/*/dataset.h5"))


def test_all_layouts_give_the_same_data_set(tmp_path, command):
    from lsmix.data.dataset import open_dataset

    files, paths = tree(), {}
    for layout, pack in LAYOUTS.items():
        (tmp_path / layout).mkdir()
        paths[layout] = ingested(command, pack(files, tmp_path / layout / "set"))
    assert len({path.read_bytes() for path in paths.values()}) == 1
    data = open_dataset(paths["folder"])
    assert data.class_names == ("cat", "dog", "fox")
    images = [np.asarray(Image.open(io.BytesIO(content))) for content in files.values()]
    for split in data.splits.values():
        for image, label, row in zip(split.images, split.labels, split.source_index, strict=True):
            np.testing.assert_array_equal(image, images[row])
            assert label == row // 3


def test_integer_labels_in_a_webdataset_are_sorted_as_numbers(tmp_path):
    files = {f"{number}/x.png": content for number, content in zip((0, 1, 2, 10), tree().values(), strict=False)}
    data = read(as_webdataset(files, tmp_path / "set", lambda name: (".cls", name.encode())))
    assert data.class_names == ("0", "1", "2", "10")
    assert data.splits["train"].labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "set" / "train-000.tar").rename(tmp_path / "set" / "val-000.tar")
    assert used(read(as_webdataset(files, tmp_path / "set", lambda name: (".cls", name.encode())))) == {
        "train": 4, "test": 4, "classes": 4,
    }  # fmt: skip


def test_parquet_files_keep_the_order_of_class_labels_and_their_splits(tmp_path):
    path = as_parquet(tree(), tmp_path, ("fox", "unused", "cat", "dog"))
    shard = path / "data" / "train-00000-of-00001.parquet"
    (path / "data" / "validation-0.parquet").write_bytes(shard.read_bytes())
    data = read(path)
    assert data.class_names == ("fox", "unused", "cat", "dog")
    assert data.splits["test"].labels.tolist() == [2, 2, 2, 3, 3, 3, 0, 0, 0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(SourceError, match="is damaged or not a Parquet file"):
        read(path)


def test_a_hugging_face_data_set_exported_to_parquet_is_read(tmp_path):
    import datasets

    images = [Image.open(io.BytesIO(content)) for content in tree().values()]
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    dataset = datasets.Dataset.from_dict({"picture": images, "label": [0, 1, 0] * 3}, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    data = read(tmp_path)
    assert data.class_names == ("b", "a")
    assert data.splits["train"].labels.tolist() == [0, 1, 0] * 3
    np.testing.assert_array_equal(data.splits["train"].images[4], np.asarray(images[4]))


def test_a_hugging_face_data_set_saved_to_disk_is_read(tmp_path):
    import datasets
    import pyarrow as pa

    images = [Image.open(io.BytesIO(content)) for content in tree().values()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    train = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0] * 3}, features=features)
    datasets.DatasetDict({"train": train, "test": train.select([4, 1])}).save_to_disk(tmp_path / "set")
    data = read(tmp_path / "set")
    assert used(data) == {"train": 9, "test": 2, "classes": 2}
    assert data.class_names == ("b", "a")
    assert data.splits["test"].labels.tolist() == [1, 1]
    np.testing.assert_array_equal(data.splits["test"].images[0], np.asarray(images[4]))
    (shard,) = tmp_path.glob("set/train/*.arrow")
    content = shard.read_bytes()
    for damaged in (content[: len(content) // 2], content[:40] + b"\xff" * 8 + content[48:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(SourceError, match="is damaged or not an Arrow file"):
            read(tmp_path / "set")
    table = pa.ipc.open_stream(content).read_all()
    with pa.ipc.new_stream(str(shard), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    with pytest.raises(SourceError, match="it contains compressed batches"):
        read(tmp_path / "set")


def test_a_data_set_of_the_hub_is_downloaded_on_request_and_read_from_the_cache(tmp_path, command, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name, *, repo_type, revision, local_files_only):
        assert (name, repo_type, revision) == ("owner/cats", "dataset", "v1")
        if local_files_only and not (tmp_path / "cache").exists():
            raise LocalEntryNotFoundError("no")
        return str(tmp_path / "cache" if local_files_only else as_parquet(tree(), tmp_path / "cache"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "my.toml").write_text('name = "x"\n[data]\npath = "hf://datasets/owner/cats@v1"\ntest = 3\n')
    options = (tmp_path / "my.toml", "--workspace", tmp_path / "runs")
    assert "has not been downloaded yet. Run: lsmix ingest my.toml --download" in command("ingest", *options).err
    assert command("ingest", *options, "--download").code == 0
    assert command("ingest", *options).code == 0
    assert "expected hf://datasets/OWNER/NAME" in command("ingest", *options, "--set", "data.path=hf://owner/x").err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RecipeError, match=r"pip install 'lsmix\[hub\]'"):
        read("hf://datasets/owner/cats")


def test_a_tsv_table_is_read_if_the_recipe_names_it(tmp_path):
    as_table(tree(), tmp_path, "labels.tsv", "\t")
    assert used(read(tmp_path, labels_file="labels.tsv")) == {"train": 9, "classes": 3}


def test_tables_in_split_folders_define_splits(tmp_path):
    as_table(tree(), tmp_path / "train")
    as_table(tree(), tmp_path / "validation")
    assert used(read(tmp_path)) == {"train": 9, "test": 9, "classes": 3}


def test_a_column_named_split_defines_splits(tmp_path):
    as_folder({f"{n}.png": content for n, content in enumerate(tree().values())}, tmp_path)
    lines = [f"{n},{'ab'[n % 2]},{['train', 'train', 'test'][n % 3]}" for n in range(9)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,split", *lines]))
    assert used(read(tmp_path)) == {"train": 6, "test": 3, "classes": 2}


def test_rows_without_an_image_and_images_without_a_row_are_reported(tmp_path):
    as_table(tree(), tmp_path)
    put(tmp_path / "more.png", side=8)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("gone.png,cat\n../../etc/passwd.png,cat\n2.png,\n")
    with pytest.raises(SourceError, match=r"2 images cannot be used\. Each of these 2 is listed but does not exist"):
        read(tmp_path)
    assert left_out(read(tmp_path, on_error="skip")) == {
        "without a label": 1,
        "not listed in metadata.csv": 1,
        "is listed but does not exist": 2,
    }
    with pytest.raises(SourceError, match="has no column 'name'"):
        read(tmp_path, labels_file="metadata.csv", file_column="name")


def test_a_table_cannot_refer_to_images_outside_of_the_data_set(tmp_path):
    put(tmp_path / "secret.png", side=8)
    as_table(tree(), tmp_path / "set")
    (tmp_path / "set" / "metadata.csv").write_text("file_name,label\n../secret.png,cat\n0.png,dog\n")
    with pytest.raises(SourceError, match="is listed but does not exist"):
        read(tmp_path / "set")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["a/x.png", "../x.png"])
def test_a_tar_of_images_with_links_devices_or_outside_paths_is_rejected(tmp_path, kind, name):
    path = as_tar(tree(), tmp_path / "set")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(SourceError, match=r"a link or device|a path outside of the archive"):
        read(path, format="image-folder")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_with_long_names_is_read_and_a_damaged_header_is_an_error(tmp_path, form):
    path, name = tmp_path / "set.tar", f"ä{'b' * 150}/{'c' * 90}.png"
    content = put(tmp_path / "one.png").read_bytes()
    with tarfile.open(path, "w", format=form) as archive:
        for folder in (name, f"z/{name}", "a/1.png", "b/1.png"):
            info = tarfile.TarInfo(folder)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert read(path).class_names == ("a", "b", "z", name.partition("/")[0])
    path.write_bytes(path.read_bytes().replace(b"b/1.png", b"B/1.png"))
    with pytest.raises(SourceError, match="is damaged or not a tar archive"):
        read(path, format="image-folder")


def test_a_link_to_a_folder_that_contains_it_is_rejected(tmp_path):
    base(tmp_path, 1)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(SourceError, match="is a link to a folder that contains it"):
        read(tmp_path)


# The command line.


def recipe(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "my.toml"
    path.write_text(f'name = "mine"\n[data]\npath = "img"\ntest = 2\n{more}\n')
    return path


def test_the_report_is_printed_stored_in_the_manifest_and_shown(tmp_path, command):
    base(tmp_path / "img")
    (tmp_path / "img" / "a" / "notes.md").touch()
    result = command("ingest", recipe(tmp_path), "--workspace", tmp_path / "runs", "--json")
    assert result.code == 0, result.err
    assert "ingest mine: reading the data set\n" in result.err
    assert "ingest mine: 18 training, 0 held-out, 2 test images in 2 classes\n" in result.err
    assert "  left out: 1, not a supported image type (.md) (a/notes.md)\n" in result.err
    assert "warning: ingest mine: 1 of 21 files were skipped\n" in result.err
    counts = json.loads(result.out)["content"]["artifacts"][0]["counts"]
    assert counts["class_images"] == {"a": 9, "b": 9}
    assert counts["source"]["left_out"] == [
        {"reason": "not a supported image type (.md)", "files": 1, "examples": ["a/notes.md"]}
    ]
    shown = command("show", next((tmp_path / "runs" / "ingest").glob("mine-*")), "--image", tmp_path / "x.png").out
    assert "21 files found, 20 images read; left out: 1, not a supported image type (.md) (a/notes.md)" in shown
    assert "a 9, b 9" in shown


def test_the_licence_and_the_citation_of_a_recipe_are_stored(tmp_path, command):
    from lsmix.data.dataset import open_dataset

    base(tmp_path / "img", 3)
    path = recipe(tmp_path, 'licence = "CC0"\ncitation = "Ünö, 2026"')
    assert command("ingest", path, "--workspace", tmp_path / "runs").code == 0
    dataset = open_dataset(next((tmp_path / "runs" / "ingest").glob("mine-*")))
    assert (dataset.licence, dataset.citation) == ("CC0", "Ünö, 2026")


def test_class_names_of_66_kilobytes_are_supported(tmp_path, command):
    from lsmix.data.dataset import open_dataset

    content = put(tmp_path / "x.png", side=4).read_bytes()
    names = [f"{number:05}_{'Plantae' * 30}" for number in range(310)]  # more than the 64 KB limit of an HDF5 attribute
    for name in names:
        (tmp_path / "img" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "img" / name / f"{number}.png").write_bytes(content)
    assert command("ingest", recipe(tmp_path), "--workspace", tmp_path / "runs").code == 0
    assert open_dataset(next((tmp_path / "runs" / "ingest").glob("mine-*"))).class_names == tuple(names)


def test_impossible_splits_are_rejected_before_images_are_decoded(tmp_path, command):
    base(tmp_path / "img", 1, [f"c{number:02}" for number in range(20)])
    (tmp_path / "img" / "c00" / "0.png").write_bytes(b"damaged")
    result = command("ingest", recipe(tmp_path), "--workspace", tmp_path / "runs")
    assert result.code == 1
    assert "leaves 2 of 20 classes without training images: 'c" in result.err


def test_an_interrupt_stops_ingest_within_a_second_with_exit_code_130(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    base(tmp_path / "img", 1)
    smooth = np.indices((1500, 1500)).sum(0)[..., None] // (12, 15, 18)
    big = tmp_path / "img" / "a" / "big.png"
    Image.fromarray(smooth.astype(np.uint8)).save(big)
    for number in range(149):
        (big.parent / f"big{number}.png").write_bytes(big.read_bytes())
    words = [sys.executable, "-m", "lsmix", "ingest", recipe(tmp_path, "size = 16"), "--workspace", tmp_path / "runs"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if ": 152 images" in line:
                break
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.wait(60) == 130
        assert time.monotonic() - start < 10  # under a second unless the machine is busy
    assert not list((tmp_path / "runs").rglob("manifest.json"))
