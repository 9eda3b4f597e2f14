"""Data sets of the Hugging Face Hub: their files, fetched to the hub's own cache and read like any others."""

import re
from pathlib import Path

from lsmix.data.errors import DownloadError, MissingError, RecipeError

__all__ = ["hub_folder", "is_hub"]


def is_hub(path: str) -> bool:
    """Tell whether a path of a recipe names a data set of the hub."""
    return path.startswith("hf://")


def hub_folder(path: str, *, fetch: bool = False) -> Path:
    """Return the folder with the files of a data set; nothing in it is executed.

    Args:
        path: ``hf://datasets/OWNER/NAME``, perhaps with ``@REVISION``.
        fetch: whether to fetch what is not in the cache yet.

    Raises:
        RecipeError: the path is another, or huggingface-hub is not installed.
        MissingError: it was not fetched yet.
        DownloadError: it cannot be fetched.
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
            raise DownloadError(f"{path!r} cannot be fetched: {error}. Check the connection and the name.") from error
        raise MissingError(f"{path!r} was not fetched yet. Run: lsmix ingest my.toml --download") from error
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors
        raise DownloadError(f"{path!r} cannot be fetched: {error}. Check the name and the revision.") from error
