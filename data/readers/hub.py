"""Data sets on the Hugging Face Hub, downloaded to the hub's own cache and then read like local files."""

import re
from pathlib import Path

from lsmix.data.errors import DownloadError, MissingError, RecipeError

__all__ = ["hub_folder", "is_hub"]


def is_hub(path: str) -> bool:
    """Return whether ``data.path`` of a recipe refers to the hub."""
    return path.startswith("hf://")


def hub_folder(path: str, *, fetch: bool = False) -> Path:
    """Return the local folder with the files of a data set. No code in them is executed.

    Args:
        path: ``hf://datasets/OWNER/NAME``, optionally followed by ``@REVISION``.
        fetch: Whether to download files that are not in the cache.

    Raises:
        RecipeError: The path has another form, or huggingface-hub is not installed.
        MissingError: The data set has not been downloaded yet.
        DownloadError: The data set cannot be downloaded.
    """
    found = re.fullmatch(r"hf://datasets/([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", path)
    if not found:
        raise RecipeError(f"data.path: expected hf://datasets/OWNER/NAME, got {path!r}.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise RecipeError(f"{path!r} needs huggingface-hub. Run: pip install 'lsmix[hub]'") from error
    name, revision = found.groups()
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=not fetch))
    except LocalEntryNotFoundError as error:
        if fetch:
            raise DownloadError(f"cannot download {path!r}: {error}. Check the connection and the name.") from error
        raise MissingError(f"{path!r} has not been downloaded yet. Run: lsmix ingest my.toml --download") from error
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors
        raise DownloadError(f"cannot download {path!r}: {error}. Check the name and the revision.") from error
