"""``plan.json``, read: what a pool is made of, enough to make or to check every row of it.

The one rule: a plan comes from strangers, so it is small, wholly typed, and says which versions it needs.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from lsmix.data.artifact import MANIFEST_NAME, Provenance
from lsmix.data.atomic import DECODE_ERRORS, decode_versioned
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.pool import PLAN_NAME
from lsmix.pipeline.config.schema import EncodeConfig, PoolConfig
from lsmix.pipeline.stages.ingest import INGEST
from lsmix.pipeline.stages.mix import MIX

__all__ = ["PLAN_FORMAT", "PoolPlan", "check_plan_version", "read_plan"]

PLAN_FORMAT = 1
_BYTES_CAP = 1 << 20  # a citation of the length that a data set may have, and room to spare

_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class PoolPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What plan.json says of a pool."""

    format_version: int  # see PLAN_FORMAT
    stage_version: int  # of the mix stage that drew and mixed
    pool: PoolConfig  # without the flow's name, which the digest stands for
    inputs: dict[str, _Digest]  # root digests: of "latents" and "flow", or of "dataset" where pixels are mixed
    origin: Provenance  # the data set behind it
    latents: EncodeConfig | None = None  # how images became latents; None where pixels are mixed
    dim: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None  # length of a latent vector

    @property
    def latent(self) -> bool:
        """Whether latents are mixed, so that a flow is needed."""
        return self.latents is not None


def read_plan(path: Path | str) -> PoolPlan:
    """Return the plan in a file, or in the folder of a pool.

    Raises:
        MissingError: there is no such file.
        FormatError: it is no plan, or of a version that this lsmix does not read.
        CorruptError: it contradicts itself.
    """
    path = Path(path)
    path = path / PLAN_NAME if path.is_dir() else path
    if not path.is_file():
        raise MissingError(f"no plan at {str(path)!r}: there is no such file. Name a pool's {PLAN_NAME}.")
    with path.open("rb") as file:
        content = file.read(_BYTES_CAP + 1)
    if len(content) > _BYTES_CAP:
        raise FormatError(f"{str(path)!r} is no plan: it has more than {_BYTES_CAP} bytes. Name a pool's {PLAN_NAME}.")
    try:
        what = f"plan {str(path)!r} has"
        plan = decode_versioned(content, PoolPlan, PLAN_FORMAT, what=what, remedy="Use a newer lsmix.")
    except DECODE_ERRORS as error:
        raise FormatError(f"{str(path)!r} is no plan of a pool: {error}. Name a pool's {PLAN_NAME}.") from error
    if wrong := _contradiction(plan):
        raise CorruptError(f"plan {str(path)!r} contradicts itself: {wrong}. Do not use it.")
    return plan


def check_plan_version(plan: PoolPlan, what: str) -> None:
    """Raise FormatError unless this lsmix draws and mixes as the one that made the plan; ``what`` begins the message."""
    if plan.stage_version != MIX.version:
        age = "a newer" if plan.stage_version > MIX.version else "the older"
        raise FormatError(
            f"{what} was made by version {plan.stage_version} of stage 'mix'; this lsmix has version {MIX.version}, which "
            f"gives other bytes. Use {age} lsmix (the versions that made a pool stand in its {MANIFEST_NAME})."
        )


def _contradiction(plan: PoolPlan) -> str:
    """Return what in a plan cannot be, or ""."""
    roles = {"latents", "flow"} if plan.latent else {"dataset"}
    if set(plan.inputs) != roles or plan.latent != (plan.dim is not None):
        return f"its inputs are {sorted(plan.inputs)}, expected {sorted(roles)} and {'a' if plan.latent else 'no'} dim"
    if plan.pool.flow:
        return "it names a flow by its place"
    if not plan.latent and plan.inputs["dataset"] != plan.origin.root:
        return "its data set and its origin are not the same"
    if plan.origin.train_images < plan.pool.sources:
        return f"it mixes {plan.pool.sources} of {plan.origin.train_images} training images"
    if beside := INGEST.not_in_key & plan.origin.config.keys():
        return f"its origin says where files lie ({', '.join(sorted(beside))})"
    return ""
