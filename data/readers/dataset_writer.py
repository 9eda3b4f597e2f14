"""Split a published data set and write it to ``dataset.h5``. Training, held-out and test images are disjoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.atomic import atomic_path
from lsmix.data.dataset import COLUMNS, FORMAT_VERSION, MAX_NAMES_BYTES, MAX_TEXT_BYTES
from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.readers.hdf5_writer import Extent, new_hdf5, reserve, write_rows
from lsmix.data.readers.source_images import PublishedData
from lsmix.data.rng import stratified_sample

__all__ = ["Rows", "plan_splits", "write_dataset"]

_BLOCK_BYTES = 16 << 20  # images copied at a time
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """The rows of a published split that form one split of ``dataset.h5``."""

    published_split: str  # "train", "heldout" or "test"
    index: npt.NDArray[np.int64]  # (N,), ascending


def plan_splits(
    labels: Mapping[str, Labels],
    class_names: Sequence[str],
    *,
    heldout: int,
    test: int,
    limit: int | None,
    seed: int,
) -> dict[str, Rows]:
    """Choose the rows of each split by stratified sampling, which preserves the class proportions.

    Args:
        labels: Labels of each published split.
        class_names: Class names by label.
        heldout: Number of held-out images. If the data set publishes held-out images, 0 means all of them; otherwise
            they are taken from the training images.
        test: Number of test images. If the data set publishes test images, 0 means all of them; otherwise they are
            taken from the training images.
        limit: Number of published training images to use, including those taken for the other splits; None for all.
        seed: Seed of the sampling.

    Raises:
        RecipeError: The numbers do not add up, or a split or the training images of a class would be empty.
    """
    rows = len(labels["train"])
    sizes = {name: len(split) for name, split in labels.items()}
    kept_count = rows if limit is None else limit
    _check_counts(sizes, heldout=heldout, test=test, kept=kept_count)

    rest = _choose(labels["train"], np.arange(rows), kept_count, seed, "limit")
    plan = {}
    for name, wanted in (("heldout", heldout), ("test", test)):
        if name in sizes:
            plan[name] = Rows(name, _choose(labels[name], np.arange(sizes[name]), wanted or sizes[name], seed, name))
        else:
            plan[name] = Rows("train", _choose(labels["train"], rest, wanted, seed, name))
            rest = np.setdiff1d(rest, plan[name].index, assume_unique=True)
    plan = {"train": Rows("train", rest), **plan}
    _check_classes(labels, class_names, plan)
    return plan


def _check_classes(labels: Mapping[str, Labels], class_names: Sequence[str], plan: Mapping[str, Rows]) -> None:
    """Raise RecipeError if a class that occurs in any split has no training images."""
    used = {name: np.unique(labels[rows.published_split][rows.index]) for name, rows in plan.items()}
    lost = sorted({class_names[label] for split in used.values() for label in np.setdiff1d(split, used["train"])})
    if lost:
        names = ", ".join(map(repr, lost[:20])) + (f" and {len(lost) - 20} more" if len(lost) > 20 else "")
        raise RecipeError(
            f"the split leaves {len(lost)} of {len(class_names)} classes without training images: {names}. "
            "Lower data.test or data.heldout, raise data.limit, or add images of these classes."
        )


def _choose(labels: Labels, among: Labels, count: int, seed: int, word: str) -> npt.NDArray[np.int64]:
    if count == len(among):
        return among
    chosen = stratified_sample(labels[among], count, seed=seed, words=("split", word))
    return among[chosen]


def _check_counts(sizes: Mapping[str, int], *, heldout: int, test: int, kept: int) -> None:
    rows = sizes["train"]
    if heldout < 0 or test < 0:
        raise RecipeError(
            f"heldout and test are numbers of images, at least 0; got heldout = {heldout}, test = {test}."
        )
    if not 1 <= kept <= rows:
        raise RecipeError(f"limit is {kept}, but there are {rows} published training images; choose 1 to {rows}.")
    for name, wanted, word in (("heldout", heldout, "held-out"), ("test", test, "test")):
        if wanted > sizes.get(name, wanted):
            raise RecipeError(
                f"{name} is {wanted}, but there are {sizes[name]} published {word} images; choose 1 to {sizes[name]}, "
                "or 0 for all."
            )
    if "test" not in sizes and test == 0:
        raise RecipeError(
            "this data set has no published test split and test is 0, which would leave no test images; "
            "say how many to take from train, for example test = 1000."
        )
    heldout, test = (0 if name in sizes else wanted for name, wanted in (("heldout", heldout), ("test", test)))
    if kept - heldout - test < 1:
        raise RecipeError(
            f"{kept} training images − {heldout} held-out − {test} test = {kept - heldout - test} left for train; "
            "at least 1 must be left. Lower heldout or test, or raise limit."
        )


def write_dataset(
    path: Path, published: PublishedData, *, heldout: int, test: int, limit: int | None, seed: int
) -> dict[str, int]:
    """Split ``published`` with ``plan_splits`` and write it to ``path``; return the number of images in each split.

    The file is written atomically and flushed to disk. The same arguments give the same bytes.

    Raises:
        RecipeError: The splits are impossible.
        SourceError: The class names, the licence or the citation are too long to be stored.
    """
    labels = {name: split.labels for name, split in published.splits.items()}
    plan = plan_splits(labels, published.class_names, heldout=heldout, test=test, limit=limit, seed=seed)
    with atomic_path(path) as temporary:
        _write_file(temporary, published, plan)
    return {split: len(rows.index) for split, rows in plan.items()}


def _write_file(path: Path, published: PublishedData, plan: Mapping[str, Rows]) -> None:
    with new_hdf5(path, lambda file: _create_arrays(file, published, plan)) as (stream, extents):
        for name, rows in plan.items():
            source = published.splits[rows.published_split]
            block = max(1, _BLOCK_BYTES // math.prod(source.images.shape[1:]))
            for start in range(0, len(rows.index), block):
                index = rows.index[start : start + block]
                write_rows(stream, extents[f"{name}/images"], start, source.images[index])
                write_rows(stream, extents[f"{name}/labels"], start, source.labels[index].astype("<i8"))
                write_rows(stream, extents[f"{name}/source_index"], start, index.astype("<i8"))


def _create_arrays(file: Any, published: PublishedData, plan: Mapping[str, Rows]) -> dict[str, Extent]:
    """Create the arrays and write the metadata; return the extent of each array."""
    file.attrs["format_version"] = np.int64(FORMAT_VERSION)
    names = msgspec.json.encode(published.class_names)
    if len(names) > MAX_NAMES_BYTES:
        raise SourceError(
            f"the class names have {len(names):,} bytes, but at most {MAX_NAMES_BYTES:,} can be stored. Shorten them."
        )
    file.create_dataset("class_names", data=np.frombuffer(names, np.uint8), track_times=False)
    _write_text(file, "licence", published.licence)
    _write_text(file, "citation", published.citation)
    extents = {}
    for split, rows in plan.items():
        group = file.create_group(split)
        _write_text(group, "published_split", rows.published_split)
        image_shape = published.splits[rows.published_split].images.shape[1:]
        for name, (dtype, _) in COLUMNS.items():
            shape = (len(rows.index), *(image_shape if name == "images" else ()))
            extents[f"{split}/{name}"] = reserve(group.create_dataset(name, shape, dtype, track_times=False))
    return extents


def _write_text(item: Any, name: str, text: str) -> None:
    # Fixed-length strings, because HDF5 stores variable-length strings in a heap, and HDF5 2.0.0 can loop forever on a
    # damaged heap.
    content = text.encode()
    if len(content) > MAX_TEXT_BYTES:
        raise SourceError(
            f"the data set's {name} has {len(content):,} bytes, but at most {MAX_TEXT_BYTES:,} can be stored. Shorten it."
        )
    item.attrs.create(name, content or b"\0", dtype=h5py.string_dtype("utf-8", max(1, len(content))))
