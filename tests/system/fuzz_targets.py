"""The fuzz targets: for each reader, small valid inputs and checks of the value that it returns.

A target reads bytes like lsmix reads the file. Checksums are recomputed if a mismatch would hide deeper bugs.
"""

import functools
import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import msgspec
import numpy as np
import scipy.io
from factory import CLASSES
from PIL import Image

from lsmix.data.artifact import (
    MANIFEST_NAME,
    Manifest,
    content_digest,
    parse_manifest,
    record_files,
    write_manifest,
)
from lsmix.data.dataset import open_dataset
from lsmix.data.pool import POOL_NAME, open_pool
from lsmix.data.pool_spec import PLAN_NAME
from lsmix.data.progress import NullProgress
from lsmix.data.readers.dataset_writer import write_dataset
from lsmix.data.readers.hdf5 import HDF5
from lsmix.data.readers.images.folder import IMAGE_FOLDER
from lsmix.data.readers.images.parquet import PARQUET
from lsmix.data.readers.images.pixels import decode_image
from lsmix.data.readers.npz import NPZ
from lsmix.data.readers.published.cifar import CIFAR10_BINARY, CIFAR10_PYTHON
from lsmix.data.readers.published.svhn import SVHN
from lsmix.data.readers.published.tiny_imagenet import TINY_IMAGENET
from lsmix.data.readers.published.unpickler import load_batch
from lsmix.data.readers.registry import SourceConfig, read_source
from lsmix.data.readers.source_images import ImageConfig, PublishedData, SourceFormat, Split
from lsmix.data.table import TableFiles
from lsmix.data.table_reader import TableReader, open_table
from lsmix.pipeline.engine.stage import StageTask

__all__ = ["TARGETS", "Target", "remake_manifest"]


class Target(NamedTuple):
    """A reader under test."""

    seeds: Callable[[], list[bytes]]  # valid inputs
    read: Callable[[bytes, Path], None]  # reads an input, using a scratch folder; asserts that the value is valid


def _small(shape: tuple[int, ...], most: int = 255) -> np.ndarray:
    return np.random.default_rng(7).integers(0, most + 1, shape, dtype=np.uint8)


_CHECKPOINT = "work/checkpoint.safetensors"


def _bytes_of(write: Callable[[Path], object], name: str = "file") -> bytes:
    with tempfile.TemporaryDirectory(prefix="lsmix-seed-") as folder:
        write(Path(folder, name))
        return Path(folder, name).read_bytes()


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _check_published(data: PublishedData, folder: Path) -> None:
    """Check the result of a reader, and use it like the ingest stage."""
    for split in data.splits.values():
        assert split.images.dtype == np.uint8
        assert split.images.ndim == 4
        assert 0 <= split.labels.min() <= split.labels.max() < len(data.class_names)
    if len(data.splits["train"]) > 3:
        write_dataset(folder / "dataset.h5", data, heldout=0, test=1, limit=None, seed=0)
        open_dataset(folder / "dataset.h5")


def _source(kind: SourceFormat, name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        path = _put(folder, name, content)
        kind.recognise(path)
        kind.files(path)
        _check_published(read_source(SourceConfig(path=str(path), format=kind.name)), folder)

    return read


# Pickles, and CIFAR.


def _pickles() -> list[bytes]:
    batch = {b"data": _small((2, 30)), b"labels": [1, 2], "more": (None, True, "text")}
    return [pickle.dumps(batch, protocol) for protocol in (2, 3, 4)]


def _read_pickle(content: bytes, folder: Path) -> None:
    assert isinstance(load_batch(content, name="a batch"), dict)


_BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def _cifar_files() -> dict[str, bytes]:
    batch = pickle.dumps({b"data": _small((1, 3072)), b"labels": [3]}, 2)
    return {**dict.fromkeys(_BATCHES, batch), "batches.meta": pickle.dumps({"label_names": list("abcdefghij")}, 2)}


def _read_cifar_batch(content: bytes, folder: Path) -> None:
    for name, whole in _cifar_files().items():
        _put(folder, f"cifar-10-batches-py/{name}", content if name == "data_batch_2" else whole)
    _check_published(read_source(SourceConfig(path=str(folder), format=CIFAR10_PYTHON.name)), folder)


def _tar() -> list[bytes]:
    packed = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, content in _cifar_files().items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            archive.addfile(
                tarfile.TarInfo("cifar-10-batches-py/" + "long/" * (30 if form == tarfile.USTAR_FORMAT else 60))
            )
        packed.append(buffer.getvalue())
    return packed


def _read_cifar_binary(content: bytes, folder: Path) -> None:
    for name in [*(f"{batch}.bin" for batch in _BATCHES), "batches.meta.txt"]:
        text = b"\n".join(b"abcdefghij"[at : at + 1] for at in range(10))
        _put(folder, f"cifar-10-batches-bin/{name}", text if name.endswith(".txt") else content)
    _check_published(read_source(SourceConfig(path=str(folder), format=CIFAR10_BINARY.name)), folder)


# Other published files.


def _mats() -> list[bytes]:
    arrays = {"X": _small((32, 32, 3, 2)), "y": np.array([[1], [10]], np.uint8)}
    return [_bytes_of(lambda path, on=on: scipy.io.savemat(path, arrays, do_compression=on), "a.mat") for on in (False, True)]  # fmt: skip


def _read_svhn(content: bytes, folder: Path) -> None:
    for name in ("train_32x32.mat", "test_32x32.mat"):
        _put(folder, f"svhn/{name}", content)
    _check_published(read_source(SourceConfig(path=str(folder / "svhn"), format=SVHN.name)), folder)


def _arrays() -> dict[str, np.ndarray]:
    labels = np.array([0, 1, 0, 1, 1])
    return {"images": _small((5, 4, 4, 3)), "labels": labels, "class_names": np.array(["cat", "dög"])}


def _npzs() -> list[bytes]:
    split = {"x_train": _small((5, 4, 4)), "y_train": np.arange(5), "x_test": _small((2, 4, 4)), "y_test": np.arange(2)}
    return [
        _bytes_of(lambda path: np.savez(path, **_arrays()), "a.npz"),
        _bytes_of(lambda path: np.savez_compressed(path, **split), "a.npz"),
    ]


def _hdf5s() -> list[bytes]:
    def write(path: Path, *, names: tuple[str, str], **options: object) -> None:
        with h5py.File(path, "w") as file:
            for name, array in zip(names, (_arrays()["images"], _arrays()["labels"]), strict=True):
                file.create_dataset(name, data=array, **options)
            file.create_dataset("class_names", data=np.char.encode(_arrays()["class_names"], "utf-8"))

    plain, filtered = ("images", "labels"), {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True}
    return [
        _bytes_of(functools.partial(write, names=plain)),
        _bytes_of(functools.partial(write, names=("train/images", "train/labels"), **filtered)),
        _bytes_of(functools.partial(write, names=plain, chunks=True, compression="lzf")),
    ]


def _datasets() -> list[bytes]:
    data = PublishedData(splits={"train": Split(_small((9, 4, 4, 3)), np.arange(9) % 3)}, class_names=CLASSES)
    return [_bytes_of(lambda path: write_dataset(path, data, heldout=2, test=2, limit=None, seed=0))]


def _read_dataset(content: bytes, folder: Path) -> None:
    data = open_dataset(_put(folder, "dataset.h5", content))
    for split in data.splits.values():
        assert len(split.images) == len(split.labels)
        split.images.sum()
        assert not len(split) or 0 <= split.labels.min() <= split.labels.max() < len(data.class_names)


def _picture(ending: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_small((8, 8, 3))).convert(mode).save(buffer, ending, **options)
    return buffer.getvalue()


def _pictures() -> list[bytes]:
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("AVIF", "RGB"), ("PNG", "L"), ("PNG", "1"), ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("BMP", "RGB"), ("GIF", "P"), ("PPM", "RGB"), ("TIFF", "RGB"), ("WEBP", "RGBA")]  # fmt: skip
    return [*(_picture(*kind) for kind in kinds), _picture("TIFF", compression="tiff_lzw")]


def _read_picture(content: bytes, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = decode_image(content, ImageConfig(size=6, fit="pad")).pixels
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2 or pixels.shape[2:] == (3,)


def _read_image_folder(content: bytes, folder: Path) -> None:
    for number in range(4):
        _put(folder, f"images/a/{number}.png", _picture("PNG"))
    _put(folder, "images/b/0.png", content)
    assert IMAGE_FOLDER.recognise(folder / "images")
    _check_published(read_source(SourceConfig(path=str(folder / "images"), format="image-folder", size=8)), folder)


def _tables(*, arrow: bool) -> list[bytes]:
    """Return a small Hugging Face table as Parquet with several row groups, or as an Arrow stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    images = [{"bytes": _picture("PNG"), "path": None}] * 5
    table = pa.table({"image": images, "label": [0, 1, 0, 1, 1]})
    table = table.replace_schema_metadata({"huggingface": msgspec.json.encode(names)})
    buffer = io.BytesIO()
    if arrow:
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        pq.write_table(table, buffer, row_group_size=2)
    return [buffer.getvalue()]


def _zips() -> list[bytes]:
    files = {"wnids.txt": b"n01\nn02\n", "words.txt": b"n01\ta cat\nn02\ta dog, hound\n"}
    files["val/val_annotations.txt"] = b"val_0.JPEG\tn01\t0\t0\t1\t1\n"
    files["val/images/val_0.JPEG"] = _picture("JPEG")
    for wnid in ("n01", "n02"):
        files |= {f"train/{wnid}/images/{wnid}_{number}.JPEG": _picture("JPEG") for number in range(2)}
    packed = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(f"tiny-imagenet-200/{name}", content)
        packed.append(buffer.getvalue())
    return packed


# Artifacts of lsmix.


def remake_manifest(folder: Path) -> None:
    """Record the sizes and checksums of all files again, so that a change looks intended and not like damage."""
    old = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    files = record_files(folder, {file.path for file in old.files if file.payload})
    write_manifest(folder, msgspec.structs.replace(old, files=files, content_digest=content_digest(files)))


_POOL_RECIPE = """\
name = "small"
[data]
format = "digits"
limit = 20
test = 10
[pools.small]
method = "mixup"
chunk_rows = 8
"""


@functools.cache
def _pool() -> Path:
    """Return a small pool in pixel space, with 20 rows in three shards, made by the mix stage."""
    from lsmix.pipeline.api import run

    place = Path(tempfile.mkdtemp(prefix="lsmix-seed-"))
    (place / "small.toml").write_text(_POOL_RECIPE, encoding="utf-8")
    return run(place / "small.toml", workspace=place / "runs", stage="mix", device="cpu")["mix/small"].folder


_POOL_FILES = (
    MANIFEST_NAME, PLAN_NAME, f"{POOL_NAME}/zarr.json", f"{POOL_NAME}/image/zarr.json", f"{POOL_NAME}/lam/zarr.json",
    f"{POOL_NAME}/image/c/0/0/0/0", f"{POOL_NAME}/status/c/1", f"{POOL_NAME}/label_b/c/0", "README.md",
)  # fmt: skip


def _pool_parts() -> list[bytes]:
    """Return the files of a pool, each prefixed with a byte for its index in ``_POOL_FILES``."""
    return [bytes([number]) + (_pool() / name).read_bytes() for number, name in enumerate(_POOL_FILES)]


def _read_pool(content: bytes, folder: Path) -> None:
    from lsmix.pipeline.api import export_pool, verify
    from lsmix.pipeline.cli_text import verify_lines
    from lsmix.pipeline.views.dataset_card.card import write_card
    from lsmix.pipeline.views.show import artifact_facts, write_image

    if not content or content[0] >= len(_POOL_FILES):
        return
    pool = folder / "pool"
    shutil.rmtree(pool, ignore_errors=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copytree(_pool(), pool)
    _put(pool, _POOL_FILES[content[0]], content[1:])
    if content[0]:
        remake_manifest(pool)
    facts = artifact_facts(pool)
    assert "\x1b" not in facts["artifact"] + facts["cache_key"] + facts["content_digest"]
    msgspec.json.encode(facts)
    opened = open_pool(pool)
    assert opened.image[:].shape == (len(opened), *opened.image_shape)
    write_image(pool, folder / "sheet.png", rows=2)
    verify_lines(verify(pool))
    shutil.rmtree(folder / "card", ignore_errors=True)
    write_card(pool, folder / "card")
    export_pool(pool, folder / "out", format="hdf5")


def _read_manifest(content: bytes, folder: Path) -> None:
    manifest = parse_manifest(content, "afar")
    msgspec.json.encode(manifest)
    for file in manifest.files:
        assert (folder / file.path).resolve().is_relative_to(folder.resolve())


def _open_folder(folder: Path) -> TableReader:
    """Open a table as if a manifest listed all files of its folder."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return open_table(TableFiles(location=str(folder), sizes=sizes, open=lambda path: (folder / path).open("rb")))


def _read_columns(content: bytes, folder: Path) -> None:
    store = folder / "store"
    if not store.is_dir():
        shutil.copytree(_pool() / POOL_NAME, store)
    _put(store, "image/zarr.json", content)
    columns = _open_folder(store)
    for column in columns.values():
        assert len(column[:]) == columns.table.rows


def _shards() -> list[bytes]:
    return [(_pool() / POOL_NAME / "image/c/0/0/0/0").read_bytes()]


def _read_shard(content: bytes, folder: Path) -> None:
    store = folder / "store"
    if not store.is_dir():
        shutil.copytree(_pool() / POOL_NAME, store)
    _put(store, "image/c/0/0/0/0", content)
    assert _open_folder(store)["image"][:].shape == (20, 8, 8, 1)


def _read_plan(content: bytes, folder: Path) -> None:
    from lsmix.data.pool_spec import read_spec

    read_spec(_put(folder, PLAN_NAME, content)).to_json()


def _flow_parts() -> list[bytes]:
    from lsmix.glow.checkpoint import CONFIG_NAME, WEIGHTS_NAME, save_flow
    from lsmix.glow.config import FlowConfig
    from lsmix.glow.flow import Flow

    with tempfile.TemporaryDirectory(prefix="lsmix-seed-") as place:
        save_flow(Path(place), Flow(FlowConfig(levels=1, steps=1, hidden=2, height=4, width=4, channels=1), seed=0), {})
        return [bytes([number]) + Path(place, name).read_bytes() for number, name in enumerate((CONFIG_NAME, WEIGHTS_NAME))]  # fmt: skip


_flow_seeds = functools.cache(_flow_parts)


def _read_flow(content: bytes, folder: Path) -> None:
    from lsmix.glow.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_flow

    config, weights = (part[1:] for part in _flow_seeds())
    config, weights = (content[1:], weights) if content[:1] == b"\x00" else (config, content[1:])
    if weights is not _flow_seeds()[1]:
        facts = msgspec.json.decode(_flow_seeds()[0][1:])
        if content[:1] != b"\x00":
            config = msgspec.json.encode({**facts, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    _put(folder, f"flow/{CONFIG_NAME}", config)
    _put(folder, f"flow/{WEIGHTS_NAME}", weights)
    flow = load_flow(folder / "flow")
    height, width, channels = flow.config.height, flow.config.width, flow.config.channels
    z = flow.encode(np.zeros((1, height, width, channels), np.uint8))
    flow.decode(np.zeros_like(z))


@functools.cache
def _classifier_config() -> object:
    from lsmix.classifiers.config import ClassifierTraining

    return ClassifierTraining(width=1)


@functools.cache
def _classifiers() -> list[bytes]:
    from lsmix.classifiers.checkpoint import save_classifier
    from lsmix.classifiers.registry import build_classifier

    return [_bytes_of(lambda path: save_classifier(path, build_classifier(_classifier_config(), 3, (8, 8, 1))))]


def _read_classifier(content: bytes, folder: Path) -> None:
    from lsmix.classifiers.checkpoint import load_classifier

    load_classifier(_put(folder, "w.safetensors", content), _classifier_config(), 3, (8, 8, 1))


def _training(folder: Path) -> StageTask:
    return StageTask(
        stage="train", name="", cache_key="", folder=folder, config=None, inputs={}, records=[], device="cpu",
        executor=None, progress=NullProgress(),
    )  # fmt: skip


def _checkpoints() -> list[bytes]:
    import torch

    from lsmix.pipeline.config.results import LogLine
    from lsmix.pipeline.stages.checkpoints import save_checkpoint

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "counter.epoch": torch.tensor(3)}
    trainer, log = SimpleNamespace(state_dict=lambda: tensors), [LogLine(iteration=1, loss_bits_per_dim=0.5)]
    return [_bytes_of(lambda path: save_checkpoint(_training(path.parent.parent), trainer, log), _CHECKPOINT)]


def _read_checkpoint(content: bytes, folder: Path) -> None:
    from lsmix.pipeline.config.results import LogLine
    from lsmix.pipeline.stages.checkpoints import load_checkpoint

    _put(folder, _CHECKPOINT, content)
    found = load_checkpoint(_training(folder), SimpleNamespace(load_state_dict=lambda tensors: None), LogLine)
    assert all(isinstance(line, LogLine) for line in found)


# Recipes and notes.

_RECIPE = """\
name = "mine"
[data]
path = "images"
heldout = 30
[flow]
levels = 2
[flow.training]
learning_rate = 1e-3
[pools.one]
lambdas = [0.0, 0.5]
[runs.baseline]
seeds = [0, 1]
[runs.one]
mix = [{ pool = "one" }, { method = "cutmix", alpha = 1.0 }]
[scale.small.data]
limit = 10
"""


def _recipes() -> list[bytes]:
    from lsmix.pipeline.config.recipes import builtin_recipes, recipe_text

    return [_RECIPE.encode(), *(recipe_text(name).encode() for name in builtin_recipes())]


def _read_recipe(content: bytes, folder: Path) -> None:
    from lsmix.pipeline.config.recipe import read_recipe
    from lsmix.pipeline.stages.graph import build_graph
    from lsmix.pipeline.workspace.workspace import Workspace

    recipe = read_recipe(_put(folder, "my.toml", content))
    msgspec.json.encode(recipe)
    build_graph(recipe, Workspace(folder / "runs"))


def _notes() -> list[bytes]:
    record = {
        "shard": 0,
        "files": [{"path": "a", "bytes": 0, "sha256": "f" * 64, "payload": True}],
        "seconds": 1.0,
        "counts": {"images": 3, "rows": [1]},
    }
    owner = {"user": "me", "host": "here", "process": 1, "since": "2026-01-01"}
    return [bytes([number]) + msgspec.json.encode(note) for number, note in enumerate((record, owner, {"/a": ["f" * 64, 1, 2, 3]}))]  # fmt: skip


def _read_notes(content: bytes, folder: Path) -> None:
    """Read files of a workspace to which others may write; ``status`` reads all of them and must never fail."""
    from lsmix.pipeline.engine.shards import finished_shards, merge_counts
    from lsmix.pipeline.workspace.cache_key import SourceDigests
    from lsmix.pipeline.workspace.locks import working_owners

    kind, note = content[:1], content[1:]
    if kind == b"\x00":
        _put(folder, "a", b"")
        _put(folder, "work/ledger/000000.json", note)
        records = finished_shards(folder)
        merge_counts({**records, 1: next(iter(records.values()))} if records else {0: None}, 2 if records else 0)
    elif kind == b"\x01":
        _put(folder, ".locks/0123456789ab.host.1-2.owner.json", note)
        assert all(str(owner).isprintable() for owner in working_owners(folder, "0123456789ab"))
    elif kind == b"\x02":
        _put(folder, "sources.json", note)
        assert len(SourceDigests(folder / "sources.json").digest([_put(folder, "a", b"")], folder)) == 64


def _results() -> list[bytes]:
    from lsmix.pipeline.config.results import EpochMetrics, Interval, LogLine, Naturalness, Predictions, SampleSummary

    of = SampleSummary(name="held-out", kind="original", images=1, share=None, decode_failed=None, not_finite=0, mean_bits=1.0, mean_bits_error=0.1, less_likely=None, more_likely=None, distance=Interval(value=1.0, low=0.0, high=2.0), frechet=None, seam=None, seam_of="own", bits_per_dim=(1.0, None))  # fmt: skip
    measured = Naturalness(
        lam=0.5, pairs=1, pairs_asked=1, bootstrap=1, evaluator_bits=5, classifier="", features=0, samples=(of,)
    )
    metrics = [EpochMetrics(epoch=1, loss=0.5, test_error=50.0, images=3, updates=1)]
    contents = (
        msgspec.json.encode(measured),
        msgspec.json.encode(metrics),
        msgspec.json.encode(LogLine(iteration=1)) + b"\n",
        msgspec.json.encode(Predictions(predicted=(0, 1), labels=(1, 1))),
    )
    return [bytes([number]) + content for number, content in enumerate(contents)]


def _read_results(content: bytes, folder: Path) -> None:
    from lsmix.pipeline.config import results

    readers = (
        (results.NATURALNESS_FILE, results.read_naturalness),
        (results.METRICS_FILE, results.read_metrics),
        (results.LOG_FILE, results.read_log),
        (results.PREDICTIONS_FILE, results.read_predictions),
    )
    if content and content[0] < len(readers):
        name, read = readers[content[0]]
        _put(folder, name, content[1:])
        msgspec.json.encode(read(folder))


TARGETS: dict[str, Target] = {
    "unpickler": Target(_pickles, _read_pickle),
    "cifar-batch": Target(lambda: [_cifar_files()["test_batch"]], _read_cifar_batch),
    "cifar-tar": Target(_tar, _source(CIFAR10_PYTHON, "cifar-10-python.tar")),
    "cifar-tar-gz": Target(lambda: [gzip.compress(content, mtime=0) for content in _tar()], _source(CIFAR10_PYTHON, "cifar-10-python.tar.gz")),
    "cifar-binary": Target(lambda: [bytes([3]) + _small((3072,)).tobytes()], _read_cifar_binary),
    "svhn": Target(_mats, _read_svhn),
    "npz": Target(_npzs, _source(NPZ, "a.npz")),
    "hdf5": Target(_hdf5s, _source(HDF5, "a.h5")),
    "dataset": Target(_datasets, _read_dataset),
    "picture": Target(_pictures, _read_picture),
    "image-folder": Target(lambda: [_picture("PNG"), _picture("PNG", "L")], _read_image_folder),
    "parquet": Target(functools.partial(_tables, arrow=False), _source(PARQUET, "train.parquet")),
    "arrow": Target(functools.partial(_tables, arrow=True), _source(PARQUET, "train.arrow")),
    "tiny-imagenet-zip": Target(_zips, _source(TINY_IMAGENET, "tiny-imagenet-200.zip")),
    "manifest": Target(lambda: [(_pool() / MANIFEST_NAME).read_bytes()], _read_manifest),
    "plan": Target(lambda: [(_pool() / PLAN_NAME).read_bytes()], _read_plan),
    "columns": Target(lambda: [(_pool() / POOL_NAME / "image/zarr.json").read_bytes()], _read_columns),
    "shard": Target(_shards, _read_shard),
    "pool": Target(_pool_parts, _read_pool),
    "flow": Target(_flow_seeds, _read_flow),
    "classifier": Target(_classifiers, _read_classifier),
    "checkpoint": Target(_checkpoints, _read_checkpoint),
    "recipe": Target(_recipes, _read_recipe),
    "notes": Target(_notes, _read_notes),
    "results": Target(_results, _read_results),
}  # fmt: skip
