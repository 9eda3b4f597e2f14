"""Pools as WebDataset: tar files in which ``00000012.png`` and ``00000012.json`` make a sample.

A tar holds only samples, since readers take the first as the pattern of all; metadata of the pool is a comment in the tar's header.
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
            for image, facts in job.samples(rows):
                _add(archive, f"{facts['row']:08d}.{job.encoding}", image)
                _add(archive, f"{facts['row']:08d}.json", msgspec.json.encode(facts))
                archive.members = []  # type: ignore[attr-defined]  # not in typeshed; it keeps every header written
        yield path


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, time and mode are the same for everybody
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


WEBDATASET_FORMAT = ExportFormat(
    write=_write,
    encodes=True,
    hub_files=("pool-*.tar",),
    hub_row="sample",
    row_overhead_bytes=2560,  # two headers, two paddings, and the JSON
    loads_with=(
        'webdataset.WebDataset(f"{folder}/pool-00000.tar", shardshuffle=False).decode("pil").to_tuple("png", "json")'
    ),
)
