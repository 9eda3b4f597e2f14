"""Latent stores: the latent vector, label and log-likelihood of every image of a data set's train split.

Row i belongs to image i of the train split.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.errors import FormatError
from lsmix.data.store import open_artifact
from lsmix.data.table import Column, Dtype, Table, default_chunk_rows, table_in
from lsmix.data.table_reader import TableReader, open_artifact_table

__all__ = [
    "LATENTS_FORMAT",
    "LATENTS_NAME",
    "Latents",
    "create_latents",
    "latent_store",
    "open_latents",
    "write_latent_shard",
]

LATENTS_NAME: Final = "latents.zarr"
LATENTS_FORMAT: Final = 1
_DTYPES: Final[dict[str, Dtype]] = {"z": "float32", "label": "int64", "log_prob": "float64", "bits_per_dim": "float32"}


class Latents:
    """A complete latent store, opened for reading with ``open_latents``."""

    def __init__(self, artifact: Artifact, columns: TableReader) -> None:
        self.location = artifact.location  # folder or URL
        self.manifest = artifact.manifest
        self.columns = columns
        self.attributes = columns.attributes  # image shape, dequantisation and other metadata
        self.z = columns["z"]  # latent vectors, float32 (N, D), in latent order
        self.label = columns["label"]  # class of each image, int64 (N,)
        self.log_prob = columns["log_prob"]  # log-likelihood of each n-bit image in nats, float64 (N,)
        self.bits_per_dim = columns["bits_per_dim"]  # the same in bits per dimension, float32 (N,)
        self.dim = self.z.shape[1]  # length D of a latent vector

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The classes of all images, int64 (N,), cached."""
        labels: NDArray[np.int64] = self.label[:]
        return labels

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the latent vectors of the given rows, float32 (n, D)."""
        return self.z.gather(rows)

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        return f"Latents({self.location!r}, {len(self)} vectors of length {self.dim})"


def create_latents(
    folder: Path,
    *,
    rows: int,
    dim: int,
    chunk_rows: int = 0,
    attributes: Mapping[str, Any] | None = None,
) -> Table:
    """Write the metadata of a latent store in an artifact's folder, and return its layout.

    Args:
        folder: The artifact; the store becomes "latents.zarr" in it.
        rows: Number of images, at least 1.
        dim: Length of a latent vector, at least 1.
        chunk_rows: Images per chunk; 0 for ``default_chunk_rows``, about 25 MB.
        attributes: Metadata to store with the latents, as JSON types.
    """
    columns = [Column(name=name, dtype=dtype) for name, dtype in _DTYPES.items()]
    columns[0] = Column(name="z", dtype=_DTYPES["z"], row_shape=(dim,), row_axes=("component",))
    chunk_rows = min(chunk_rows, rows) or default_chunk_rows(dim * 4, rows)
    table = Table(folder=folder / LATENTS_NAME, columns=tuple(columns), rows=rows, chunk_rows=chunk_rows)
    table.create({**(attributes or {}), "format_version": LATENTS_FORMAT})
    return table


def latent_store(folder: Path) -> Table:
    """Return the layout of the latent store in an artifact's folder, complete or unfinished."""
    return table_in(folder / LATENTS_NAME)[0]


def write_latent_shard(folder: Path, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write one shard of the latent store in an artifact's folder.

    Args:
        folder: The artifact.
        shard: Number of the shard; its rows are ``latent_store(folder).shard_range(shard)``.
        arrays: ``z`` float32 (n, D), ``label`` int64 (n,), ``log_prob`` float64 (n,), ``bits_per_dim`` float32 (n,).

    Returns:
        The SHA-256 of each written file, by path relative to ``folder``.

    Raises:
        ValueError: A column is missing or has the wrong shape or dtype, or a number is not finite.
    """
    for name in ("z", "log_prob", "bits_per_dim"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise ValueError(f"shard {shard} of latents {str(folder)!r}: {name!r} has values that are not finite.")
    written = latent_store(folder).write_shard(shard, arrays)
    return {f"{LATENTS_NAME}/{path}": digest for path, digest in written.items()}


def open_latents(path: Path | str | Artifact) -> Latents:
    """Open the latent store of an artifact.

    Args:
        path: The artifact, its folder or URL, or "latents.zarr" in it.

    Raises:
        MissingError: There are no latents, or they are unfinished.
        FormatError: This version of lsmix does not support their format.
        CorruptError: A file is missing, has another size, or is damaged.
        DownloadError: The URL cannot be reached.
    """
    artifact = open_artifact(path)
    columns = open_artifact_table(artifact, LATENTS_NAME)
    version = columns.attributes.get("format_version")
    if version != LATENTS_FORMAT:
        raise FormatError(
            f"latents {artifact.location!r} have format {version!r}; this version of lsmix reads format {LATENTS_FORMAT}. "
            "Use a newer lsmix, or rebuild the latents."
        )
    found = {name: column.dtype.name for name, column in columns.items()}
    ranks = {name: len(column.shape) for name, column in columns.items()}
    if found != _DTYPES or any(rank != (2 if name == "z" else 1) for name, rank in ranks.items()):
        raise FormatError(f"{artifact.location!r} contains no latents: expected the columns {_DTYPES}, got {found}.")
    return Latents(artifact, columns)
