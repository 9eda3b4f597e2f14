"""Export a pool as WebDataset: tar files in which, for instance, ``00000012.png`` and ``00000012.json`` form a sample.

Readers infer the fields of all samples from the first one, so a tar contains nothing but samples. The metadata of the
pool is a comment in the tar's header.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lsmix.data.exports.format import ExportFormat, ExportJob

__all__ = ["WEBDATASET_FORMAT"]


def _write(job: ExportJob) -> Iterator[Path]:
    for path, rows in job.shards("tar"):
        headers = {"comment": job.about.decode()}
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as archive:
            for image, metadata in job.samples(rows):
                _add(archive, f"{metadata['row']:08d}.{job.encoding}", image)
                _add(archive, f"{metadata['row']:08d}.json", msgspec.json.encode(metadata))
                # Otherwise the archive keeps every header in memory.
                archive.members = []  # type: ignore[attr-defined]  # not in typeshed
        yield path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, time and mode have fixed defaults, so equal rows give equal bytes
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


WEBDATASET_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files=("pool-*.tar",),
    hub_row="sample",
    row_overhead_bytes=2560,  # two headers, the padding of two files, and the JSON
    loads_with=(
        'webdataset.WebDataset(f"{folder}/pool-00000.tar", shardshuffle=False).decode("pil").to_tuple("png", "json")'
    ),
)
