"""Download a published file over http or https.

A file gets its final name only when its checksum is right. Until then it is ``NAME.part``, which the next call resumes.
"""

import os
from pathlib import Path

from lsmix.data.atomic import check_room, fsync_folder, locked_file
from lsmix.data.cache import fetch_file
from lsmix.data.errors import DownloadError
from lsmix.data.progress import Progress
from lsmix.data.readers.published_sets import PublishedFile
from lsmix.data.remote import open_remote

__all__ = ["download"]


def download(file: PublishedFile, target: Path, progress: Progress) -> None:
    """Fetch ``file`` to ``target``, going on with what an earlier call left; its folder is made if need be.

    Raises:
        DownloadError: it cannot be fetched; what came is kept for the next call.
        CorruptError: the server has another file; nothing is kept.
        DiskSpaceError: it does not fit on the disk.
        LockedError: another run is fetching it.
    """
    place = open_remote(file.url)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    message = f"{str(part)!r} is being fetched by another run. Wait for it to end, or stop it."
    with locked_file(part, message=message) as stream:
        try:
            size = file.size or place.size("")
            if size is None:
                raise DownloadError(
                    f"{file.url!r} is not there, or its server does not say how long it is. Check the URL, or fetch the file "
                    f"by hand to {str(target)!r}."
                )
            have = os.fstat(stream.fileno()).st_size
            have = have if have <= size else 0
            check_room(part.parent, size - have, file.name, "choose another data.path")
            progress.start(file.name, size, "byte", done=have)
            fetch_file(place, "", size, file.checksum, stream, progress.advance, algorithm=file.algorithm)
            progress.finish()
            part.replace(target)
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
    fsync_folder(target.parent)
