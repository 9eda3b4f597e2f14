"""Pools: mixed images with their two labels, the share of the second label, and the source images.

``POOL_COLUMNS`` declares every column once. Row ``copy · images_per_copy + i`` is copy ``copy`` of the i-th pair. Pools
that mix more than two sources or use random corners have extra columns; the other columns keep their meaning.
"""

import base64
import functools
import html
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, NotRequired, TypedDict, cast, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.errors import CorruptError, FormatError
from lsmix.data.pool_spec import CORNERS, PLAN_NAME, PoolSpec, read_spec
from lsmix.data.store import CACHE_BYTES, open_artifact
from lsmix.data.table import Column, Dtype, Table, default_chunk_rows, table_in
from lsmix.data.table_reader import TableReader, open_artifact_table

if TYPE_CHECKING:
    import torch

__all__ = [
    "POOL_COLUMNS",
    "POOL_FORMAT",
    "POOL_NAME",
    "STATUSES",
    "Pool",
    "PoolAttributes",
    "PoolColumn",
    "PoolDataset",
    "PoolItem",
    "Sample",
    "Source",
    "create_pool",
    "open_pool",
    "pool_store",
    "write_pool_shard",
]

POOL_NAME: Final = "pool.zarr"
POOL_FORMAT: Final = 1
_STATUS_MEANINGS: Final = {
    "ok": "the image is from the first draw",
    "redrawn": "the first draw could not be decoded; partner and λ are from a later draw",
    "replaced": "no draw could be decoded; the image is its first source, and share_b is 0",
}
STATUSES: Final = tuple(_STATUS_MEANINGS)
_ITER_ROWS = 256  # rows read together when iterating over a pool
_PREVIEW_IMAGES = 12  # in a notebook


@dataclass(frozen=True)
class PoolColumn:
    """The declaration of a column."""

    name: str
    dtype: Dtype
    # Allowed values: any, a row of the train split, a class, a number from 0 to 1, or the index of a word.
    kind: Literal["pixel", "source", "label", "share", "word"]
    description: str  # one line
    row: Literal["number", "image", "more"] = "number"  # shape of a row: (), (H, W, C) or (sources − 2,)
    words: Mapping[str, str] = field(default_factory=dict)  # word -> meaning

    def as_text(self, values: NDArray[Any]) -> list[Any]:
        """Return values (n,) for text files: words, and floats as the shortest decimals that round-trip to float32."""
        items = np.array(tuple(self.words))[values] if self.words else values
        return list((items.astype("U") if items.dtype.kind == "f" else items).tolist())


_ROW_AXES = {"number": (), "image": ("height", "width", "channel"), "more": ("source",)}
_STATUS = "whether the image is from the first draw, from a later draw, or replaced by x₁"
_CORNER_WORDS = {corner: f"x₂ begins at the {corner.replace('-', ' ')}" for corner in CORNERS}
_COLUMNS = (
    PoolColumn("image", "uint8", "pixel", "the mixed image", "image"),
    PoolColumn("source_a", "int64", "source", "row of x₁, the first source, in the train split"),
    PoolColumn("source_b", "int64", "source", "row of x₂, the second source, in the train split"),
    PoolColumn("label_a", "int64", "label", "class of x₁"),
    PoolColumn("label_b", "int64", "label", "class of x₂"),
    PoolColumn("lam", "float32", "share", "sampled λ, i.e. the requested share of x₂"),
    PoolColumn("share_b", "float32", "share", "true share of x₂, the weight of label_b; x₁ has the rest"),
    PoolColumn("status", "uint8", "word", _STATUS, words=_STATUS_MEANINGS),
    PoolColumn("source_more", "int64", "source", "rows of x₃ and the following sources in the train split", "more"),
    PoolColumn("label_more", "int64", "label", "classes of x₃ and the following sources", "more"),
    PoolColumn("lam_more", "float32", "share", "sampled λ of x₃ and the following sources", "more"),
    PoolColumn("share_more", "float32", "share", "true shares of x₃ and the following sources", "more"),
    PoolColumn("corner", "uint8", "word", "where x₂ begins", words=_CORNER_WORDS),
)
POOL_COLUMNS: Final = {column.name: column for column in _COLUMNS}


class PoolAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of the pool's Zarr group, which define its columns and their allowed values."""

    format_version: int  # of the pool, see POOL_FORMAT
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]  # by label
    images_per_copy: Annotated[int, msgspec.Meta(ge=1)]  # pairs in one copy
    copies: Annotated[int, msgspec.Meta(ge=1)]  # passes over the source images
    method: str  # "ls-mix", "mixup", ...
    sources: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2  # images in each mix
    corners: bool = False  # whether x₂ begins at a random corner in each row

    def columns(self) -> list[PoolColumn]:
        """Return the columns of the pool, ``image`` first."""
        present = {"number": True, "image": True, "more": self.sources > 2}
        return [column for column in _COLUMNS if present[column.row] and (self.corners or column.name != "corner")]

    def row_shape(self, column: PoolColumn, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a row of a column."""
        return {"number": (), "image": image_shape, "more": (self.sources - 2,)}[column.row]

    def largest(self, column: PoolColumn) -> int:
        """Return the largest allowed value of a column; the smallest is 0."""
        return {
            "pixel": 255,
            "source": self.images_per_copy - 1,
            "label": len(self.class_names) - 1,
            "share": 1,
            "word": len(column.words) - 1,
        }[column.kind]

    def first_wrong(self, arrays: Mapping[str, NDArray[Any]], rows: Sequence[int] | NDArray[np.int64]) -> str:
        """Describe the first value out of range in ``arrays``, the columns of ``rows``; return "" if there is none."""
        for name, values in arrays.items():
            column = POOL_COLUMNS[name]
            if column.kind == "pixel":
                continue  # any uint8
            largest = self.largest(column)
            wrong = np.argwhere(~((values >= 0) & (values <= largest)))  # not "<": NaN is on neither side
            if len(wrong):
                place = tuple(wrong[0].tolist())
                which = f"{name}{list(place[1:])}" if place[1:] else name
                why = {
                    "source": f"the training split has rows 0 to {largest}; it may be a test image",
                    "label": f"the classes are 0 to {largest}",
                    "share": "must be from 0 to 1",
                    "word": f"must be from 0 to {largest} ({', '.join(column.words)})",
                }[column.kind]
                return f"in row {rows[place[0]]} {which} is {values[place]}, but {why}"
        return ""


class Source(NamedTuple):
    """The third or a following source image of a mix."""

    source: int  # its row in the train split
    label: int  # its class
    share: float  # true share, 0 to 1
    lam: float  # sampled λ, 0 to 1


class Sample(NamedTuple):
    """One mixed image with its labels and metadata."""

    image: NDArray[np.uint8]  # (H, W, C)
    label_a: int  # class of the first source image
    label_b: int  # class of the second source image
    share_b: float  # true share of the second image, 0 to 1
    lam: float  # sampled λ, 0 to 1
    source_a: int  # row of the first source image in the train split
    source_b: int  # row of the second source image
    status: str  # one of STATUSES
    more: tuple[Source, ...] = ()  # the third and following source images
    corner: str = CORNERS[0]  # where x₂ begins


class PoolItem(TypedDict):
    """A row of a ``PoolDataset``; the last two keys exist only if the pool mixes more than two sources."""

    image: "torch.Tensor"  # uint8 (C, H, W)
    label_a: "torch.Tensor"  # int64 ()
    label_b: "torch.Tensor"  # int64 ()
    share_b: "torch.Tensor"  # float32 (), weight of label_b, 0 to 1
    label_more: NotRequired["torch.Tensor"]  # int64 (sources − 2,)
    share_more: NotRequired["torch.Tensor"]  # float32 (sources − 2,)


class PoolDataset:
    """A pool as a map-style dataset of PyTorch, for its ``DataLoader`` and trainers that have their own sampler."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, row: int) -> PoolItem:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[PoolItem]:
        """Return the rows of a batch; ``DataLoader`` calls this method if it exists."""
        import torch

        self._pool = pool = self._pool.of_this_process()
        names = [name for name in PoolItem.__annotations__ if name in pool.columns]
        tensors = {name: torch.from_numpy(values) for name, values in pool.gather(np.asarray(rows), names).items()}
        tensors["image"] = tensors["image"].permute(0, 3, 1, 2)
        return [cast(PoolItem, dict(zip(names, parts, strict=True))) for parts in zip(*tensors.values(), strict=True)]


class Pool:
    """A complete pool, opened for reading with ``open_pool``.

    It is a sequence: ``pool[5]`` is a ``Sample``, ``pool[3:7]`` and ``pool[[1, 5]]`` are lists of samples. Columns are
    indexed like arrays: ``pool.image[a:b]`` is uint8 (b−a, H, W, C). ``POOL_COLUMNS`` describes all columns.
    """

    def __init__(
        self, artifact: Artifact, columns: TableReader, attributes: PoolAttributes, reopen: "Callable[[], Pool]"
    ) -> None:
        self.artifact = artifact
        self.location = artifact.location  # folder or URL
        self.manifest = artifact.manifest
        self.reopen = reopen  # opens the same pool again
        self._process = os.getpid()
        self.columns = columns
        self.image = columns["image"]
        self.source_a, self.source_b = columns["source_a"], columns["source_b"]
        self.label_a, self.label_b = columns["label_a"], columns["label_b"]
        self.lam, self.share_b = columns["lam"], columns["share_b"]
        self.status = columns["status"]
        self.attributes = attributes
        self.class_names = tuple(attributes.class_names)
        self.copies = attributes.copies
        self.images_per_copy = attributes.images_per_copy
        self.method = attributes.method
        self.sources = attributes.sources  # images in each mix, at least 2

    @property
    def path(self) -> Path:
        """The folder of the pool.

        Raises:
            MissingError: The pool is stored at a URL.
        """
        return self.artifact.folder

    @property
    def spec(self) -> PoolSpec | None:
        """The specification from plan.json, or None if the pool has no plan.json.

        Raises:
            MissingError: plan.json was removed.
            FormatError: plan.json is not a plan, or this version of lsmix does not support its version.
            CorruptError: plan.json is inconsistent or differs from the file listed in the manifest.
        """
        listed = {file.path: file.sha256 for file in self.manifest.files if file.payload}
        if PLAN_NAME not in listed:
            return None
        return read_spec(
            self.artifact.file(PLAN_NAME), expected=listed[PLAN_NAME], where=self.artifact.where(PLAN_NAME)
        )

    def of_this_process(self) -> "Pool":
        """Return this pool, or reopen it in a forked process.

        Locks that other threads held at the time of the fork would never be released in the child.
        """
        return self if self._process == os.getpid() else self.reopen()

    def as_dataset(self) -> PoolDataset:
        """Return the pool as a map-style dataset of PyTorch, with a dictionary of tensors for each row.

        Trainers that distribute rows themselves, such as Accelerate and the Trainer of Hugging Face, need it.
        """
        return PoolDataset(self)

    def rows(self, start: int, stop: int, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Return rows ``start`` to ``stop`` (exclusive) by column, and check that all values are in range.

        Args:
            start: The first row.
            stop: The row after the last one.
            names: The columns; empty for all except ``image``.

        Raises:
            CorruptError: A value is out of range, or a chunk is damaged.
        """
        names = names or [name for name in self.columns if name != "image"]
        return self._checked({name: self.columns[name][start:stop] for name in names}, range(start, stop))

    def gather(self, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the given rows in the given order, by column, with the checks of ``rows``."""
        return self._checked({name: self.columns[name][rows] for name in names}, rows)

    def _checked(self, found: dict[str, NDArray[Any]], rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        if wrong := self.attributes.first_wrong(found, rows):
            raise CorruptError(f"pool {self.location!r} is damaged: {wrong}. Download or rebuild it.")
        return found

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.image.shape
        return height, width, channels

    @property
    def info(self) -> dict[str, Any]:
        """Metadata of the pool and its manifest, as JSON types."""
        return {
            "path": self.location,
            "name": self.manifest.name,
            "cache_key": self.manifest.cache_key,
            "content_digest": self.manifest.content_digest,
            "method": self.method,
            "images": len(self),
            "copies": self.copies,
            "images_per_copy": self.images_per_copy,
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "counts": dict(self.manifest.counts),
            "config": dict(self.manifest.config),
            "attributes": dict(self.columns.attributes),
        }

    def __len__(self) -> int:
        return len(self.image)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Sample: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[np.integer[Any]]) -> list[Sample]: ...
    def __getitem__(self, index: Any) -> Sample | list[Sample]:
        rows = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        if rows.dtype.kind not in "iu" and rows.size:
            raise TypeError(f"samples are indexed by integers, got {rows.dtype}.")
        if wrong := [row for row in rows.ravel().tolist() if not -len(self) <= row < len(self)]:
            raise IndexError(f"sample {wrong[0]} is out of range: pool {self.location!r} has {len(self):,} images.")
        found = self.gather(np.atleast_1d(rows) % len(self), list(self.columns))
        samples = [self._sample({name: values[place] for name, values in found.items()}) for place in range(rows.size)]
        return samples if rows.ndim else samples[0]

    def _sample(self, row: dict[str, Any]) -> Sample:
        more = [row[f"{name}_more"].tolist() for name in Source._fields] if self.sources > 2 else []
        return Sample(
            image=row["image"],
            status=STATUSES[row["status"]],
            more=tuple(map(Source._make, zip(*more, strict=True))),
            corner=CORNERS[row.get("corner", 0)],
            **{name: row[name].item() for name in ("label_a", "label_b", "share_b", "lam", "source_a", "source_b")},
        )

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _ITER_ROWS):
            yield from self[start : start + _ITER_ROWS]

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return f"Pool({self.location!r}, {len(self)} images {height}×{width}×{channels}, method={self.method!r})"

    def _repr_html_(self) -> str:
        """Show the pool and its first images in a notebook; for a URL no images, which would have to be downloaded."""
        text = f"<code>{html.escape(repr(self))}</code>"
        if not self.artifact.is_local:
            return text
        from PIL import Image

        strip = np.concatenate(list(self.image[:_PREVIEW_IMAGES]), axis=1)  # (H, n·W, C)
        png = io.BytesIO()
        Image.fromarray(strip if strip.shape[2] == 3 else strip[..., 0]).save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        return f'{text}<br><img alt="first images" style="height: 4rem; image-rendering: pixelated" src="data:image/png;base64,{data}">'

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reopen, ()  # memory maps cannot be pickled; another process opens its own


def create_pool(
    folder: Path,
    *,
    image_shape: tuple[int, int, int],
    chunk_rows: int = 0,
    attributes: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Table:
    """Write the metadata of a pool in an artifact's folder, and return its layout.

    Args:
        folder: The artifact; the pool becomes "pool.zarr" in it.
        image_shape: Height, width, channels.
        chunk_rows: Images per chunk; 0 for ``default_chunk_rows``, about 25 MB.
        attributes: Additional metadata to store with the pool, as JSON types.
        fields: The fields of ``PoolAttributes`` except the version.

    Raises:
        ValueError: The pool would have no images or no classes.
    """
    known = PoolAttributes(format_version=POOL_FORMAT, **fields)
    if known.images_per_copy < 1 or known.copies < 1 or not known.class_names:
        raise ValueError(
            f"a pool needs images, copies and classes; got {known.copies} copies of {known.images_per_copy} images "
            f"in {len(known.class_names)} classes."
        )
    columns = tuple(
        Column(
            name=column.name,
            dtype=column.dtype,
            row_shape=known.row_shape(column, image_shape),
            row_axes=_ROW_AXES[column.row],
        )
        for column in known.columns()
    )
    rows = known.images_per_copy * known.copies
    chunk_rows = min(chunk_rows, rows) or default_chunk_rows(max(column.row_bytes for column in columns), rows)
    table = Table(folder=folder / POOL_NAME, columns=columns, rows=rows, chunk_rows=chunk_rows)
    table.create({**(attributes or {}), **msgspec.to_builtins(known)})
    return table


def pool_store(folder: Path) -> Table:
    """Return the layout of the pool in an artifact's folder, complete or unfinished."""
    return table_in(folder / POOL_NAME)[0]


def write_pool_shard(folder: Path, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write one shard of the pool in an artifact's folder.

    Args:
        folder: The artifact.
        shard: Number of the shard; its rows are ``pool_store(folder).shard_range(shard)``.
        arrays: Values by column, in the column's dtype: ``image`` (n, H, W, C), other columns (n,).

    Returns:
        The SHA-256 of each written file, by path relative to ``folder``.

    Raises:
        ValueError: A column is missing, or its values have the wrong shape, dtype or range.
    """
    table, attributes = table_in(folder / POOL_NAME)
    known = {name: values for name, values in arrays.items() if name in POOL_COLUMNS}  # write_shard rejects others
    if wrong := _read_attributes(str(folder), attributes).first_wrong(known, table.shard_range(shard)):
        raise ValueError(f"shard {shard} of pool {str(folder)!r}: {wrong}.")
    return {f"{POOL_NAME}/{path}": digest for path, digest in table.write_shard(shard, arrays).items()}


def open_pool(
    path: Path | str | Artifact,
    *,
    check_crc: bool = True,
    cache: Path | str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Pool:
    """Open the pool in an artifact's folder, or at a URL.

    From a URL, such as "s3://bucket/pool" or "https://host/pool", only the metadata is downloaded immediately. Each shard
    is downloaded on first use, verified against its SHA-256, and kept in a cache on disk that all processes share.

    The sizes of all files are checked immediately, and the CRC32C of each chunk on first use; ``lsmix verify`` checks
    every byte against the manifest.

    Args:
        path: The artifact, its folder or URL, or "pool.zarr" in it.
        check_crc: False skips the CRC32C checks.
        cache: Folder of the cache; None for LSMIX_CACHE, else "~/.cache/lsmix".
        cache_bytes: Limit of the cache for the files of all pools; the least recently used files are evicted first. It
            must be large enough for all images of a shuffled epoch, otherwise shards are downloaded repeatedly.

    Raises:
        MissingError: There is no pool, or it is unfinished.
        FormatError: This version of lsmix does not support the pool's format.
        CorruptError: A file is missing, has another size, or is damaged.
        DownloadError: The URL cannot be reached.
    """
    artifact = open_artifact(path, cache=cache, cache_bytes=cache_bytes)
    where = artifact.location
    columns = open_artifact_table(artifact, POOL_NAME, check_crc=check_crc)
    attributes = _read_attributes(where, columns.attributes)
    image_shape = columns["image"].shape[1:] if "image" in columns else ()
    expected = {item.name: (item.dtype, attributes.row_shape(item, image_shape)) for item in attributes.columns()}
    found = {name: (column.dtype.name, column.shape[1:]) for name, column in columns.items()}
    if found != expected or len(image_shape) != 3:
        raise FormatError(f"{where!r} is not a pool: expected the columns {expected}, got {found}.")
    if attributes.images_per_copy * attributes.copies != columns.table.rows:
        raise CorruptError(
            f"pool {where!r} is damaged: {attributes.copies} copies of {attributes.images_per_copy} images "
            f"do not add up to {columns.table.rows} rows. Download or rebuild it."
        )
    reopen = functools.partial(open_pool, where, check_crc=check_crc, cache=cache, cache_bytes=cache_bytes)
    return Pool(artifact, columns, attributes, reopen)


def _read_attributes(where: str, attributes: dict[str, Any]) -> PoolAttributes:
    version = attributes.get("format_version")
    if version != POOL_FORMAT:
        raise FormatError(
            f"pool {where!r} has format {version!r}; this version of lsmix reads format {POOL_FORMAT}. "
            "Use a newer lsmix, or rebuild the pool."
        )
    try:
        return msgspec.convert(attributes, PoolAttributes)
    except msgspec.ValidationError as error:
        raise CorruptError(f"pool {where!r} has invalid attributes: {error}. Download or rebuild it.") from error
