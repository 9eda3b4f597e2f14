"""Decode the images of a listing in a pool of threads.

Threads are effective because Pillow releases the GIL while it decodes and resizes. To limit memory, decoded rows are
written to an unnamed temporary file, from which ``dataset_writer`` copies the selected ones.
"""

import os
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from lsmix.data.errors import SourceError
from lsmix.data.progress import ROUND_SECONDS, Progress, stop_point
from lsmix.data.readers.images.pixels import Picture, decode_image, resize_pixels
from lsmix.data.readers.source_images import (
    ImageConfig,
    ImageEntry,
    ImageError,
    ImageListing,
    PublishedData,
    SourceSummary,
    Split,
    SplitCheck,
)

__all__ = ["load_images", "resize_arrays", "summarise_images"]

_AHEAD = 4  # images per thread that are queued, decoded or waiting to be written
_MAX_THREADS = 32
_SAMPLED = 300  # images whose sizes are read for a summary
_NAMED = 20  # unreadable images listed in an error
_SIZES = 5  # sizes listed in an error
_COMMON_SIDES = (64, 32, 16, 8)  # sizes to suggest
_Decoded = Picture | ImageError


def load_images(
    listing: ImageListing,
    config: ImageConfig,
    progress: Progress,
    *,
    label: str = "",
    folder: Path | None = None,
    check: SplitCheck | None = None,
) -> PublishedData:
    """Decode all images of a listing.

    Args:
        listing: The images.
        config: Size, background, and handling of unreadable images.
        progress: Progress reporter; it counts images.
        label: Label for progress reports.
        folder: Folder for the temporary file; None for the system's temporary folder.
        check: Called with the labels of each split and the class names before the first image is decoded.

    Raises:
        SourceError: An image is unreadable and ``config.on_error`` is "stop", or the images have different sizes.
    """
    if check:
        check(_labels(listing), listing.class_names)
    with tempfile.TemporaryFile(dir=folder) as file, _strict_pillow():
        rows = _Rows(file, listing, config)
        progress.start(label, len(listing.entries), "image")
        for entry, decoded in _decode_all(listing, config, rows):
            rows.add(entry, decoded)
            progress.advance()
        progress.finish()
        return rows.published()


def summarise_images(listing: ImageListing, name: str) -> SourceSummary:
    """Return a summary of a listing in the format ``name``, with the sizes of a sample of its images."""
    step = -(-len(listing.entries) // _SAMPLED)
    with _strict_pillow():
        sample = [_decode_entry(listing, entry, ImageConfig(), size_only=True) for entry in listing.entries[::step]]
    return SourceSummary(
        format=name,
        labels=_labels(listing),
        class_names=listing.class_names,
        sizes=Counter(found.pixels.shape[:2] for found in sample if isinstance(found, Picture)),
        channels=3,
        licence=listing.licence,
        citation=listing.citation,
        report=listing.report,
    )


def _labels(listing: ImageListing) -> dict[str, npt.NDArray[np.int64]]:
    splits = dict.fromkeys(entry.split for entry in listing.entries)
    return {name: np.array([row.label for row in listing.entries if row.split == name], np.int64) for name in splits}


@contextmanager
def _strict_pillow() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about unusual metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def resize_arrays(published: PublishedData, config: ImageConfig) -> PublishedData:
    """Resize the images of a data set that was read as arrays to ``config.target``."""
    splits = {
        name: Split(resize_pixels(split.images, config), split.labels) for name, split in published.splits.items()
    }
    return replace(published, splits=splits)


def _decode_all(listing: ImageListing, config: ImageConfig, rows: "_Rows") -> Iterator[tuple[ImageEntry, _Decoded]]:
    """Yield every entry with its decoded image, in order. After an interrupt, threads finish only the current image."""
    threads = min(
        _MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(threads, "lsmix-decode") as pool:
        entries, waiting = iter(listing.entries), deque[tuple[ImageEntry, Future[_Decoded]]]()
        try:
            while True:
                for entry in islice(entries, _AHEAD * threads - len(waiting)):
                    waiting.append((entry, pool.submit(_decode_entry, listing, entry, config, rows.several_sizes)))
                if not waiting:
                    return
                entry, future = waiting.popleft()
                stop_point()
                while not future.done() and not wait([future], ROUND_SECONDS).done:
                    stop_point()
                yield entry, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_entry(listing: ImageListing, entry: ImageEntry, config: ImageConfig, size_only: bool) -> _Decoded:
    try:
        return decode_image(listing.read(entry.name), config, size_only=size_only)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(f"cannot be opened ({error.strerror or error})")


class _Rows:
    """Collects decoded images in a file, and the errors and sizes of all images."""

    def __init__(self, file: IO[bytes], listing: ImageListing, config: ImageConfig) -> None:
        self._file, self._listing, self._config = file, listing, config
        self._labels: dict[str, list[int]] = {}
        self._errors: dict[tuple[str, str], list[str]] = {}  # file names by reason and advice
        self._sizes: Counter[tuple[int, ...]] = Counter()
        self._examples: dict[tuple[int, ...], str] = {}
        self._frames: list[str] = []
        self._grey = True
        self._enlarged = 0
        self.shape: tuple[int, ...] = ()  # (height, width) of the first image

    @property
    def several_sizes(self) -> bool:
        """Whether the images differ in size, which is an error, so that only sizes need to be read from then on."""
        return len(self._sizes) > 1

    def add(self, entry: ImageEntry, decoded: _Decoded) -> None:
        """Add the next entry."""
        if isinstance(decoded, ImageError):
            self._errors.setdefault((decoded.reason, decoded.advice), []).append(entry.name)
            return
        pixels = decoded.pixels
        size = pixels.shape[:2]
        self._sizes[size] += 1
        self._examples.setdefault(size, entry.name)
        self.shape = self.shape or size
        if size != self.shape:
            return
        self._grey &= pixels.ndim == 2
        self._enlarged += decoded.enlarged
        if decoded.more_frames:
            self._frames.append(entry.name)
        self._labels.setdefault(entry.split, []).append(entry.label)
        self._file.write((pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, 2)).tobytes())

    def published(self) -> PublishedData:
        """Return all rows as splits, with one channel if all images are grey, else three."""
        self._check_errors()
        self._check_sizes()
        if "train" not in self._labels:
            raise SourceError("no training images could be read. Check data.path.")
        self._note()
        self._file.flush()
        count = sum(map(len, self._labels.values()))
        mapped = np.memmap(self._file, np.uint8, "r", shape=(count, *self.shape, 3)).view(np.ndarray)
        images = mapped[..., :1] if self._grey else mapped
        splits, start = {}, 0
        for split, labels in self._labels.items():
            splits[split] = Split(images[start : start + len(labels)], np.array(labels, np.int64))
            start += len(labels)
        listing = self._listing
        return PublishedData(
            splits=splits,
            class_names=listing.class_names,
            licence=listing.licence,
            citation=listing.citation,
            report=listing.report,
        )

    def _check_errors(self) -> None:
        count = sum(map(len, self._errors.values()))
        if count and self._config.on_error == "stop":
            raise SourceError(self._error_message(count))
        for (reason, _), names in self._errors.items():
            for name in names:
                self._listing.report.leave_out(reason, name)

    def _error_message(self, count: int) -> str:
        label = self._listing.label
        if count == 1:
            (reason, advice), (name,) = next(iter(self._errors.items()))
            return f"{label(name)} {reason}. {advice}"
        left, groups = _NAMED, ""
        for (reason, advice), names in self._errors.items():
            shown = [*map(label, names[:left]), *([f"{len(names) - left:,} more"] if len(names) > left else [])]
            if len(names) == 1:
                groups += f" {shown[0]} {reason}. {advice}"
            else:
                groups += (
                    f" Each of these {len(names):,} {reason}: {', '.join(shown)}. {advice.replace(' it', ' them')}"
                )
            left = max(0, left - len(names))
        return f'{count:,} images cannot be used.{groups} To leave them out, set data.on_error = "skip".'

    def _check_sizes(self) -> None:
        if not self.several_sizes:
            return
        common = self._sizes.most_common(_SIZES)
        shown = ", ".join(
            f"{width}×{height} ({count:,}, for example {self._listing.label(self._examples[height, width])})"
            for (height, width), count in common
        )
        more = f" and {len(self._sizes) - _SIZES:,} more sizes" if len(self._sizes) > _SIZES else ""
        least = min(min(size) for size in self._sizes)
        side = next((side for side in _COMMON_SIDES if side <= least), least)
        raise SourceError(
            f"images differ in size (width×height): {shown}{more}. Add a line such as 'size = {side}' to [data] to "
            "resize all images."
        )

    def _note(self) -> None:
        report = self._listing.report
        report.used = {split: len(labels) for split, labels in self._labels.items()}
        if self._frames:
            report.notes.append(
                f"only the first frame was used of files with several frames: {len(self._frames):,} "
                f"({', '.join(self._frames[:3])}{', …' if len(self._frames) > 3 else ''})"
            )
        if self._enlarged:
            report.notes.append(f"images smaller than data.size were enlarged: {self._enlarged:,}")
