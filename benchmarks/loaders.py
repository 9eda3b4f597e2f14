"""Shuffled epochs of the same images by lsmix, by floors, and by other loaders used as their documentation shows.

Each loader visits every image once per epoch and yields uint8 batches and labels. The sums over all labels and over the
first pixel row of all images must be the same for every loader.
"""

import importlib
import importlib.machinery
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from benchmarks.contender import peak_mb

__all__ = ["BATCH", "loader_jobs", "write"]

BATCH = 128

_Batches = Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]  # epoch -> images (B, 32, 32, 3), labels (B,)


class Sums(NamedTuple):
    """The checksums of an epoch."""

    images: int
    labels: int
    pixels: int


def _import_torchvision() -> None:
    """Import torchvision, or a stand-in if its compiled part does not fit the installed torch (CPU builds).

    Two peers import it on load, for data sets and transforms that are not used here.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("", ".datasets", ".transforms", ".transforms.functional", ".io"):
            sys.modules[f"torchvision{name}"] = _StandIn(f"torchvision{name}")


class _StandIn(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write(name: str, folder: Path, images: np.ndarray) -> None:
    """Write the images in the format of a loader."""
    labels = np.arange(len(images)) % 10
    if name == "lsmix":
        from benchmarks.pools import make_pool

        make_pool(folder, images)
        return
    folder.mkdir()
    if name in ("mosaicml-streaming", "litdata"):
        _import_torchvision()
    if name == "webdataset":
        import webdataset

        with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=8192, verbose=0) as sink:
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                sink.write({"__key__": f"{i:08d}", "bin": image.tobytes(), "cls": str(label)})
    elif name == "mosaicml-streaming":
        from streaming import MDSWriter

        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=25_000_000) as sink:
            for image, label in zip(images, labels, strict=True):
                sink.write({"image": image.tobytes(), "label": int(label)})
    elif name == "litdata":
        _write_litdata(folder, images, labels)
    elif name == "HF datasets":
        import datasets

        rows = {"image": [image.tobytes() for image in images], "label": labels.tolist()}
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    else:
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", labels)


def _write_litdata(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    from litdata.streaming.writer import BinaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="16MB")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        writer.add_item(i, (image.tobytes(), int(label)))
    writer.done()
    writer.merge()


def loader_jobs(name: str, folder: str, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return the jobs of a loader: "epoch" runs a shuffled epoch, "sums" returns its checksums, "memory" its peak."""
    if name in ("mosaicml-streaming", "litdata"):
        _import_torchvision()
    opener: Any = _OPENERS[name]
    options = dict(options)
    passes = options.pop("passes", 1)  # epochs per turn, more than 1 for epochs of a few milliseconds
    batches: _Batches = opener(Path(folder), **options)
    number, sums = 0, Sums(0, 0, 0)

    def epoch() -> int:
        nonlocal number, sums
        for _ in range(passes):
            count = total_labels = total_pixels = 0
            for images, labels in batches(number):
                count += len(images)
                total_labels += int(labels.sum())
                total_pixels += int(images[:, 0].sum())
            number, sums = number + 1, Sums(count, total_labels, total_pixels)
        return count * passes

    return {"epoch": epoch, "sums": lambda: tuple(sums), "memory": lambda: peak_mb(epoch)}


def _lsmix(folder: Path, **options: Any) -> _Batches:
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool

    reopen = options.pop("reopen", False)
    opened = open_pool(folder, check_crc=options.pop("check_crc", True))

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pool = opened.reopen() if reopen else opened
        for batch in PoolLoader(pool, BATCH, epoch=epoch, **options):
            yield batch.images.permute(0, 2, 3, 1).numpy(), batch.label_a.numpy()

    return batches


def _random_rows(folder: Path, *, ahead: bool = False) -> _Batches:
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy")

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = np.random.default_rng(epoch).permutation(len(images))
        made = ((images[order[i : i + BATCH]], labels[order[i : i + BATCH]]) for i in range(0, len(order), BATCH))
        if not ahead:
            return made
        from lsmix.data.loaders.epoch_loader import read_ahead

        return read_ahead(made, 21)  # 8 MiB

    return batches


def _sequential(folder: Path) -> _Batches:
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy")

    def batches(_epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(0, len(images), BATCH):
            yield np.array(images[i : i + BATCH]), labels[i : i + BATCH]

    return batches


def _map_loader(folder: Path, *, by_batch: bool) -> _Batches:
    import torch

    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = torch.from_numpy(np.load(folder / "labels.npy"))

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, row: int) -> Any:
            return torch.from_numpy(images[row].copy()), labels[row]

    class Batches(Rows):
        def __getitems__(self, rows: list[int]) -> Any:
            return torch.from_numpy(images[rows]), labels[rows]

    data = Batches() if by_batch else Rows()
    collate = {"collate_fn": _itself} if by_batch else {}

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        torch.manual_seed(epoch)
        for pixels, label in torch.utils.data.DataLoader(data, BATCH, shuffle=True, **collate):  # type: ignore[arg-type]
            yield pixels.numpy(), label.numpy()

    return batches


def _itself(batch: Any) -> Any:
    return batch


def _as_batch(samples: list[tuple[bytes, Any]]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.frombuffer(b"".join(sample[0] for sample in samples), np.uint8).reshape(-1, 32, 32, 3)
    return pixels, np.array([int(sample[1]) for sample in samples])


def _webdataset(folder: Path) -> _Batches:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        data = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=epoch, empty_check=False)
        data = data.shuffle(4096).to_tuple("bin", "cls").batched(BATCH, collation_fn=_as_batch, partial=True)
        yield from data

    return batches


def _mosaic(folder: Path) -> _Batches:
    import torch
    from streaming import StreamingDataset

    data: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)

    def batches(_epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        loader = torch.utils.data.DataLoader(
            data, BATCH, collate_fn=lambda rows: _as_batch([(r["image"], r["label"]) for r in rows])
        )
        yield from loader

    return batches


def _litdata(folder: Path) -> _Batches:
    import litdata

    data = litdata.StreamingDataset(str(folder), shuffle=True)

    def batches(_epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from litdata.StreamingDataLoader(data, batch_size=BATCH, collate_fn=_as_batch)

    return batches


def _hf(folder: Path) -> _Batches:
    import datasets

    data = datasets.load_from_disk(str(folder))

    def batches(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in data.shuffle(seed=epoch).iter(BATCH):
            yield _as_batch(list(zip(batch["image"], batch["label"], strict=True)))

    return batches


_OPENERS = {
    "lsmix": _lsmix,
    "random rows": _random_rows,
    "sequential read": _sequential,
    "map-style DataLoader": _map_loader,
    "webdataset": _webdataset,
    "mosaicml-streaming": _mosaic,
    "litdata": _litdata,
    "HF datasets": _hf,
}
