"""Download a published file over http or https.

The file is downloaded to ``NAME.part`` and renamed after its checksum was verified. A later call resumes ``NAME.part``.
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
    """Download ``file`` to ``target``, resuming an interrupted download; missing folders are created.

    Raises:
        DownloadError: The download failed; the downloaded part is kept for the next call.
        CorruptError: The checksum is wrong; the downloaded file is deleted.
        DiskSpaceError: The disk has too little free space.
        LockedError: Another run is downloading the file.
    """
    remote = open_remote(file.url)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    message = f"{str(part)!r} is being downloaded by another run. Wait for it to finish, or stop it."
    with locked_file(part, message=message) as stream:
        try:
            size = file.size or remote.size("")
            if size is None:
                raise DownloadError(
                    f"{file.url!r} does not exist, or its server does not report its size. Check the URL, or download "
                    f"the file manually to {str(target)!r}."
                )
            have = os.fstat(stream.fileno()).st_size
            have = have if have <= size else 0
            check_room(part.parent, size - have, file.name, "choose another data.path")
            progress.start(file.name, size, "byte", done=have)
            fetch_file(remote, "", size, file.checksum, stream, progress.advance, algorithm=file.algorithm)
            progress.finish()
            part.replace(target)
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
    fsync_folder(target.parent)
