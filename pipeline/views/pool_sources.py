"""The source images of a pool."""

from pathlib import Path

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import SplitArrays, open_dataset
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import read_provenance
from lsmix.data.store import open_artifact
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["source_images"]


def source_images(pool: Pool, data: Path | str | None = None) -> SplitArrays | None:
    """Return the training images that a pool was made from, or None if they are not on this machine.

    Args:
        pool: The pool.
        data: Folder or URL of the pool's data set artifact; None searches the pool's own workspace.

    Raises:
        RecipeError: ``data`` is not the pool's data set.
        CorruptError: The data set does not fit the pool, or one of them is damaged.
    """
    where, attributes = f"pool {pool.location!r}", pool.columns.attributes
    wanted = read_provenance(attributes, where).content_digest if "origin" in attributes else ""
    found: Artifact | None = None
    if data is not None:
        found = open_artifact(data)
        if (got := found.manifest.content_digest) != wanted:
            raise RecipeError(
                f"{where} was made from the data set with content digest {wanted[:12] or 'unknown'}, but "
                f"{found.location!r} has content digest {got[:12]}. Name the artifact of the pool's own data set."
            )
    elif wanted and pool.artifact.is_local:
        found = Workspace(pool.path.resolve().parent.parent).find_content("ingest", wanted)
    if found is None:
        return None
    train = open_dataset(found).train
    if train.images.shape != (expected := (pool.images_per_copy, *pool.image_shape)):
        raise CorruptError(
            f"{where} was made from images of shape {expected}, but its data set {found.location!r} has images of "
            f"shape {train.images.shape}. Run 'lsmix verify' on both."
        )
    return train
