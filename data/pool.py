"""A pool: mixed images with their two labels, the second label's share, and where each image comes from.

The one rule: row ``copy · images_per_copy + i`` is copy ``copy`` of the i-th pair, so that copies lie one behind the other.
A pool may mix more than two sources, or begin at drawn corners; then it has columns more, and the others mean the same.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, SupportsIndex

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Manifest
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.table import Column, ColumnStore, Dtype, open_store, rows_per_chunk, rows_per_shard
from lsmix.data.table_reader import ColumnArray, ColumnReader, open_artifact_columns, open_columns

__all__ = [
    "CORNERS",
    "PLAN_NAME",
    "POOL_FORMAT",
    "POOL_NAME",
    "STATUSES",
    "Pool",
    "Sample",
    "Source",
    "create_pool",
    "open_pool",
    "pool_columns",
    "pool_store",
    "unsealed_pool",
    "write_pool_shard",
]

POOL_NAME: Final = "pool.zarr"
PLAN_NAME: Final = "plan.json"  # beside it: what the pool was made by
POOL_FORMAT: Final = 1
STATUSES: Final = ("ok", "redrawn", "replaced")  # what the numbers in the column ``status`` mean
CORNERS: Final = ("top-left", "top-right", "bottom-left", "bottom-right")  # … and in the column ``corner``

_NUMBERS: Final[dict[str, Dtype]] = {
    "source_a": "int64",
    "source_b": "int64",
    "label_a": "int64",
    "label_b": "int64",
    "lam": "float32",
    "share_b": "float32",
    "status": "uint8",
}
# Of the third source and those behind it, (M, sources − 2); only in pools that mix more than two.
_MORE: Final[dict[str, Dtype]] = {
    "source_more": "int64",
    "label_more": "int64",
    "lam_more": "float32",
    "share_more": "float32",
}
_CORNER: Final[dict[str, Dtype]] = {"corner": "uint8"}  # only in pools that begin at drawn corners


class _Attributes(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool's group says of it."""

    format_version: int  # of the pool, see POOL_FORMAT
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]  # by label
    images_per_copy: Annotated[int, msgspec.Meta(ge=1)]  # pairs in one copy
    copies: Annotated[int, msgspec.Meta(ge=1)]  # times that each source image was mixed
    method: str  # "ls-mix", "mixup", ...
    sources: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2  # images in each mix
    corners: bool = False  # whether each row began at a drawn corner


class Source(NamedTuple):
    """One image more in a mix, behind the first two."""

    source: int  # its row in the train split
    label: int  # its class
    share: float  # effective, 0 to 1
    lam: float  # as drawn, 0 to 1


class Sample(NamedTuple):
    """One mixed image and all that is known of it."""

    image: NDArray[np.uint8]  # (H, W, C)
    label_a: int  # class of the first source image
    label_b: int  # class of the second
    share_b: float  # the second label's effective share, 0 to 1
    lam: float  # λ as drawn, 0 to 1
    source_a: int  # row of the first source image in the train split
    source_b: int  # row of the second
    status: str  # one of STATUSES
    more: tuple[Source, ...] = ()  # the third image and those behind it
    corner: str = CORNERS[0]  # where x₂ begins


class Pool:
    """A complete pool, opened for reading; use ``open_pool``.

    Its columns read like arrays: ``pool.image[a:b]`` is uint8 (b−a, H, W, C).
    """

    def __init__(
        self,
        where: str,
        manifest: Manifest,
        columns: ColumnReader,
        attributes: _Attributes,
        reopen: "Callable[..., Pool] | None" = None,
    ) -> None:
        self.location = where  # its folder, or its URL
        self._reopen = reopen or functools.partial(open_pool, where)
        self.manifest = manifest
        self.columns = columns
        self.class_names = tuple(attributes.class_names)
        self.copies = attributes.copies
        self.images_per_copy = attributes.images_per_copy
        self.method = attributes.method
        self.sources = attributes.sources  # images in each mix, at least 2

    @property
    def path(self) -> Path:
        """Its folder.

        Raises:
            MissingError: it is read from afar, and has none here.
        """
        if "://" in self.location:
            raise MissingError(
                f"pool {self.location!r} is not on this machine. Fetch it first: lsmix pull {self.location}"
            )
        return Path(self.location)

    def reopen(self, *, check_crc: bool | None = None) -> "Pool":
        """Open the same pool once more, as another process must; ``check_crc`` as before, unless it is given."""
        return self._reopen(check_crc=self.columns.check_crc if check_crc is None else check_crc)

    @property
    def image(self) -> ColumnArray:
        """Mixed images, uint8 (M, H, W, C)."""
        return self.columns["image"]

    @property
    def source_a(self) -> ColumnArray:
        """Row of each first source image in the train split, int64 (M,)."""
        return self.columns["source_a"]

    @property
    def source_b(self) -> ColumnArray:
        """Row of each second source image in the train split, int64 (M,)."""
        return self.columns["source_b"]

    @property
    def label_a(self) -> ColumnArray:
        """Class of each first source image, int64 (M,)."""
        return self.columns["label_a"]

    @property
    def label_b(self) -> ColumnArray:
        """Class of each second source image, int64 (M,)."""
        return self.columns["label_b"]

    @property
    def lam(self) -> ColumnArray:
        """λ as drawn, float32 (M,) in 0 to 1."""
        return self.columns["lam"]

    @property
    def share_b(self) -> ColumnArray:
        """Effective share of the second label, float32 (M,) in 0 to 1."""
        return self.columns["share_b"]

    @property
    def status(self) -> ColumnArray:
        """0, 1 or 2 for ok, redrawn or replaced, uint8 (M,)."""
        return self.columns["status"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.image.shape
        return height, width, channels

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the pool, from its manifest and its metadata; ready for JSON."""
        return {
            "path": self.location,
            "name": self.manifest.name,
            "key": self.manifest.key,
            "root": self.manifest.root,
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

    def __getitem__(self, index: SupportsIndex) -> Sample:
        row = index.__index__()
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} is outside of pool {self.location!r}, which has {len(self)} images.")
        numbers = {name: self.columns[name][row].item() for name in _NUMBERS}
        status = numbers.pop("status")
        if status >= len(STATUSES):
            raise CorruptError(f"pool {self.location!r}: sample {row} has the unknown status {status}. Do not use it.")
        return Sample(
            image=self.image[row], status=STATUSES[status], more=self._more(row), corner=self._corner(row), **numbers
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def _more(self, row: int) -> tuple[Source, ...]:
        if self.sources == 2:
            return ()
        sources, labels, rates, shares = (self.columns[name][row].tolist() for name in _MORE)
        return tuple(Source(*facts) for facts in zip(sources, labels, shares, rates, strict=True))

    def _corner(self, row: int) -> str:
        corner = int(self.columns["corner"][row]) if "corner" in self.columns else 0
        if corner >= len(CORNERS):
            raise CorruptError(f"pool {self.location!r}: sample {row} has the unknown corner {corner}. Do not use it.")
        return CORNERS[corner]

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return f"Pool({self.location!r}, {len(self)} images {height}×{width}×{channels}, method={self.method!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A map of a file belongs to one process; another opens its own.
        return functools.partial(self._reopen, check_crc=self.columns.check_crc), ()


def create_pool(
    folder: Path,
    *,
    images_per_copy: int,
    copies: int,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    method: str,
    shard_rows: int | None = None,
    sources: int = 2,
    corners: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> ColumnStore:
    """Write the metadata of a pool in an artifact's folder, and return its layout.

    Args:
        folder: the artifact; the pool becomes "pool.zarr" in it.
        images_per_copy: number of pairs in each copy, at least 1.
        copies: at least 1.
        image_shape: height, width, channels.
        class_names: by label.
        method: what mixed the images.
        shard_rows: images in a shard; None takes about 25 MB.
        sources: images in each mix, at least 2.
        corners: whether each row begins at a corner of its own.
        attributes: more facts to keep with the pool, ready for JSON.

    Raises:
        ValueError: the pool would have no images or no classes.
    """
    if images_per_copy < 1 or copies < 1 or not class_names:
        raise ValueError(
            f"a pool needs images, copies and classes; got {copies} copies of {images_per_copy} images "
            f"in {len(class_names)} classes."
        )
    rows, row_bytes = images_per_copy * copies, int(np.prod(image_shape))
    shard_rows = shard_rows or rows_per_shard(row_bytes, rows)
    chunk_rows = rows_per_chunk(row_bytes, shard_rows)
    columns = [Column(name="image", dtype="uint8", row_shape=tuple(image_shape), chunk_rows=chunk_rows)]
    for name, dtype in _narrow_columns(sources, corners).items():
        row_shape = (sources - 2,) if name in _MORE else ()
        columns.append(Column(name=name, dtype=dtype, row_shape=row_shape, chunk_rows=shard_rows))
    store = ColumnStore(folder=folder / POOL_NAME, columns=tuple(columns), rows=rows, shard_rows=shard_rows)
    known = _Attributes(
        format_version=POOL_FORMAT,
        class_names=list(class_names),
        images_per_copy=images_per_copy,
        copies=copies,
        method=method,
        sources=sources,
        corners=corners,
    )
    store.create({**(attributes or {}), **msgspec.to_builtins(known)})
    return store


def _narrow_columns(sources: int, corners: bool) -> dict[str, Dtype]:
    """Return the dtype of every column but ``image``."""
    return {**_NUMBERS, **(_MORE if sources > 2 else {}), **(_CORNER if corners else {})}


def pool_columns(
    attributes: dict[str, Any], image_shape: tuple[int, int, int], where: str
) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Return dtype and shape of a row of every column that a pool with these attributes has, ``image`` first.

    Raises:
        FormatError: they are of a version that this lsmix does not read; ``where`` is named in the message.
        CorruptError: they are not what a pool's attributes must be.
    """
    known = _read_attributes(Path(where), attributes)
    narrow = _narrow_columns(known.sources, known.corners)
    tails = {name: (known.sources - 2,) if name in _MORE else () for name in narrow}
    return {"image": ("uint8", image_shape), **{name: (dtype, tails[name]) for name, dtype in narrow.items()}}


def pool_store(folder: Path) -> ColumnStore:
    """Return the layout of the pool in an artifact's folder, finished or not."""
    return open_store(folder / POOL_NAME)[0]


def write_pool_shard(folder: Path, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write one shard of the pool in an artifact's folder.

    Args:
        folder: the artifact.
        shard: which one; its rows are ``pool_store(folder).shard_range(shard)``.
        arrays: by column, in the column's dtype: ``image`` (n, H, W, C), the others (n,).

    Returns:
        The SHA-256 of each file written, by its path relative to ``folder``.

    Raises:
        ValueError: a column is left out, or its values are of another shape, dtype or range.
    """
    store, attributes = open_store(folder / POOL_NAME)
    most_label = len(_read_attributes(folder, attributes).class_names) - 1
    limits = {name: most_label for name in arrays if name.startswith("label_")}
    limits |= {name: 1 for name in arrays if name.startswith(("lam", "share_"))}
    limits |= {"status": len(STATUSES) - 1, "corner": len(CORNERS) - 1}
    for name in arrays.keys() - {"image"}:
        least, most = arrays[name].min(initial=0), arrays[name].max(initial=0)
        if not (least >= 0 and most <= limits.get(name, most)):  # not "or": NaN is on neither side
            bounds = f"lie in 0 to {limits[name]}" if name in limits else "be 0 or more"
            raise ValueError(f"shard {shard} of pool {str(folder)!r}: {name!r} must {bounds}, got {least} to {most}.")
    return {f"{POOL_NAME}/{path}": digest for path, digest in store.write_shard(shard, arrays).items()}


def open_pool(
    path: Path | str,
    *,
    check_crc: bool = True,
    cache: Path | str | None = None,
    cache_bytes: int = 10 << 30,
) -> Pool:
    """Open the pool in an artifact's folder, or at a URL.

    From a URL, such as "s3://bucket/pool" or "https://host/pool", only the metadata is fetched at once. Each shard comes
    when it is first touched, is checked against its SHA-256, and stays in a cache on the disk that all processes share.

    Sizes of all files are checked at once, each chunk's CRC32C when it is first touched; ``lsmix verify`` checks
    every byte against the manifest.

    Args:
        path: the artifact's folder or URL, or "pool.zarr" in it.
        check_crc: False skips the checksums of chunks.
        cache: folder that shards from a URL are kept in; None for LSMIX_CACHE, else "~/.cache/lsmix".
        cache_bytes: how much may be kept there, of all pools together; what was used longest ago goes first. A shuffled
            epoch needs room for all images that it goes over, or it fetches shards again and again.

    Raises:
        MissingError: there is no pool, or it is not finished.
        FormatError: it is of a format that this version does not read.
        CorruptError: a file is missing, altered in size, or damaged.
        DownloadError: the URL cannot be reached.
    """
    if isinstance(path, str) and "://" in path:
        return _open_far(path, check_crc=check_crc, cache=cache, cache_bytes=cache_bytes)
    folder = Path(path)
    folder = folder.parent if folder.name == POOL_NAME else folder
    manifest, columns = open_artifact_columns(folder, POOL_NAME, check_crc=check_crc)
    return _pool(folder, str(folder), manifest, columns)


def unsealed_pool(folder: Path, manifest: Manifest) -> Pool:
    """Return the pool in an artifact's folder without asking the manifest there, which may not be written yet.

    Args:
        folder: the artifact; all shards of the pool are there.
        manifest: what is known of it.

    Raises:
        MissingError, FormatError, CorruptError: as ``open_pool``.
    """
    return _pool(folder, str(folder), manifest, open_columns(folder / POOL_NAME))


def _open_far(url: str, *, check_crc: bool, **options: Any) -> Pool:
    from lsmix.data.cache import open_remote_columns
    from lsmix.data.remote import local_folder

    folder = local_folder(url)
    if folder is not None:
        return open_pool(folder, check_crc=check_crc)
    url = url.rstrip("/").removesuffix(f"/{POOL_NAME}")
    manifest, columns = open_remote_columns(url, POOL_NAME, check_crc=check_crc, **options)
    return _pool(Path(url), url, manifest, columns, functools.partial(open_pool, url, **options))


def _pool(
    folder: Path,
    where: str,
    manifest: Manifest,
    columns: ColumnReader,
    reopen: Callable[..., Pool] | None = None,
) -> Pool:
    attributes = _read_attributes(folder, columns.attributes)
    expected = {"image": "uint8", **_narrow_columns(attributes.sources, attributes.corners)}
    found = {name: column.dtype.name for name, column in columns.items()}
    tails = {name: column.shape[1:] for name, column in columns.items() if name != "image"}
    fitting = {name: (attributes.sources - 2,) if name in _MORE else () for name in tails}
    if found != expected or tails != fitting or len(columns["image"].shape) != 4:
        raise FormatError(f"{str(folder)!r} is no pool: expected the columns {expected}, got {found}.")
    if attributes.images_per_copy * attributes.copies != columns.store.rows:
        raise CorruptError(
            f"pool {str(folder)!r} is damaged: {attributes.copies} copies of {attributes.images_per_copy} images "
            f"do not make {columns.store.rows} rows. Fetch or make it again."
        )
    return Pool(where, manifest, columns, attributes, reopen)


def _read_attributes(folder: Path, attributes: dict[str, Any]) -> _Attributes:
    version = attributes.get("format_version")
    if version != POOL_FORMAT:
        raise FormatError(
            f"pool {str(folder)!r} has format {version!r}; this version of lsmix reads format {POOL_FORMAT}. "
            "Use a newer lsmix, or make the pool again."
        )
    try:
        return msgspec.convert(attributes, _Attributes)
    except msgspec.ValidationError as error:
        raise CorruptError(f"pool {str(folder)!r} is damaged: its attributes are wrong: {error}.") from error
