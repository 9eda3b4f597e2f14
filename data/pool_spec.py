"""Pool specifications: the settings of a pool, and ``plan.json``, from which every pixel can be recomputed.

The settings are the fields of a recipe's ``[pools.NAME]``. Plans are untrusted input: every field is typed, and
inconsistent plans are rejected.
"""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from lsmix.data.atomic import DECODE_ERRORS, decode_versioned
from lsmix.data.errors import CorruptError, FormatError, MissingError, RecipeError, format_count
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, nearest
from lsmix.data.rng import Seed

__all__ = [
    "CORNERS",
    "LOCATION_FIELDS",
    "MOST_SPEC_BYTES",
    "PLAN_NAME",
    "SPEC_FORMAT",
    "EncodeConfig",
    "PoolConfig",
    "PoolSpec",
    "Provenance",
    "check_pool",
    "in_latent_space",
    "parse_spec",
    "read_provenance",
    "read_spec",
]

PLAN_NAME: Final = "plan.json"  # next to pool.zarr
SPEC_FORMAT: Final = 1
CORNERS: Final = ("top-left", "top-right", "bottom-left", "bottom-right")  # where the second image can begin
MOST_SPEC_BYTES: Final = 1 << 20  # more than the longest citation of a data set needs
_ChunkRows = Annotated[int, Meta(ge=0, le=1 << 24)]
_Rate = Annotated[float, Meta(ge=0, le=1)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The data set that the source images are from."""

    content_digest: str  # content digest of its artifact
    config: dict[str, Any]  # how its splits were chosen from the published files
    licence: str  # "" if unknown
    citation: str  # "" if unknown
    train_images: int  # number of rows in the train split, to which the source columns refer


# Settings for the location and the download of a data set's files, which are not part of a Provenance.
LOCATION_FIELDS: Final = frozenset({"path", "format", "download"})


def read_provenance(attributes: dict[str, Any], what: str) -> Provenance:
    """Return the ``origin`` in the attributes of a store.

    Raises:
        CorruptError: It is missing or incomplete; ``what`` begins the message.
    """
    try:
        return msgspec.convert(attributes.get("origin"), Provenance)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{what} does not record the origin of its images: {error}. Rebuild it.") from error


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the images of a pool are mixed."""

    method: str = "ls-mix"  # mixing method
    # λ ~ Beta(α, α), the share of the second image; Dirichlet(α, …, α) for more than two sources
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 0.4
    lambdas: tuple[_Rate, ...] = ()  # fixed λ instead of sampled ones: copy c uses lambdas[c % len(lambdas)]
    copies: Annotated[int, Meta(ge=0, le=1_000_000)] = 0  # passes over the train split; 0: one, or one per fixed λ
    sources: Annotated[int, Meta(ge=2, le=8)] = 2  # images in each mix; more than two with ls-mix only
    # where the second image begins; random: a sampled corner for each image; latent space only
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right", "random"] = "top-left"
    seed: Seed = 0  # of pairs, λ, corners and the random choices of the method
    output: Literal["8bit", "5bit"] = "8bit"  # levels of the decoded pixels; the paper uses 5bit
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images per batch; affects the last bits of results
    chunk_rows: _ChunkRows = 0  # images per chunk, at most 1 GiB; 0: about 25 MB, at most an eighth of the pool
    on_decode_failure: Literal["redraw", "keep"] = "redraw"  # keep: only count failed decodes
    attempts: Annotated[int, Meta(ge=0, le=100)] = 3  # further draws after a failed decode before x₁ replaces the image
    tolerance: Annotated[float, Meta(ge=0, le=1e6)] = 0.25  # distance from [−½, ½] above which a pixel is bad
    bad_pixel_fraction: _Rate = 0.02  # fraction of bad pixels above which a decode has failed

    @property
    def copies_made(self) -> int:
        """Number of copies, at least 1."""
        return self.copies or max(len(self.lambdas), 1)


def in_latent_space(config: PoolConfig) -> bool:
    """Return whether a pool is mixed in latent space and therefore needs a flow."""
    return config.method in LATENT_METHODS


def check_pool(config: PoolConfig) -> None:
    """Check the method, and that the fields are consistent.

    Raises:
        RecipeError: The method is unknown or does not support a setting; the message begins with the field's name.
    """
    if not in_latent_space(config) and config.method not in PIXEL_METHODS:
        known = [*LATENT_METHODS.names(), *PIXEL_METHODS.names()]
        raise RecipeError(f"method: unknown mixing method {config.method!r}.{nearest(config.method, known)}")
    if config.sources > 2 and config.method != "ls-mix":
        raise RecipeError(f"sources: only 'ls-mix' can mix more than two sources, got {config.method!r}.")
    if config.sources > 2 and config.lambdas:
        raise RecipeError("lambdas: fixed λ work with two sources only. With more sources, leave lambdas empty.")
    if config.corner != CORNERS[0] and not in_latent_space(config):
        raise RecipeError(f"corner: only methods in latent space support a corner, got {config.method!r}.")


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images are encoded as latents."""

    dequantise: Literal["low-bits", "uniform", "center"] = "low-bits"  # low-bits: the image's own; uniform: noise
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images per batch; affects the last bits of results
    seed: Seed = 0  # of the noise of uniform
    chunk_rows: _ChunkRows = 0  # latents per chunk, at most 1 GiB; 0: about 25 MB, at most an eighth of them
    check_round_trip: bool = True  # decode every latent and count the images that are reproduced exactly


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything that determines a pool: the content of plan.json."""

    format_version: int  # see SPEC_FORMAT
    stage_version: int  # of the mix stage
    pool: PoolConfig
    inputs: dict[str, _Digest]  # content digests of "latents" and "flow", or of "dataset" if pixels are mixed
    origin: Provenance  # the data set of the source images
    latents: EncodeConfig | None = None  # how images were encoded; None if pixels are mixed
    dim: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None  # length of a latent vector; None if pixels are mixed

    @property
    def latent(self) -> bool:
        """Whether latents are mixed, which needs a flow."""
        return self.latents is not None

    def to_json(self) -> bytes:
        """Return the content of plan.json; equal specifications have equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"


def read_spec(path: Path | str, *, expected: str = "", where: str = "") -> PoolSpec:
    """Read the specification from a plan.json.

    Args:
        path: The file, or the folder of its pool.
        expected: Expected SHA-256 of the file; "" for any.
        where: Name of the file in messages; "" for its path.

    Raises:
        MissingError: The file does not exist.
        FormatError: The file is not a plan, or this version of lsmix does not support its version.
        CorruptError: The plan is inconsistent or not the expected file.
    """
    path = Path(path)
    path = path / PLAN_NAME if path.is_dir() else path
    where = where or str(path)
    if not path.is_file():
        raise MissingError(f"no plan at {where!r}: the file does not exist. Name the {PLAN_NAME} of a pool.")
    with path.open("rb") as file:
        content = file.read(MOST_SPEC_BYTES + 1)
    if expected and len(content) <= MOST_SPEC_BYTES and sha256(content).hexdigest() != expected:
        raise CorruptError(f"{where!r} differs from the file listed in the manifest. Download or rebuild the pool.")
    return parse_spec(content, where)


def parse_spec(content: bytes, where: str) -> PoolSpec:
    """Decode and validate the content of a plan.json; ``where`` names the file in messages.

    Raises:
        FormatError, CorruptError: As for ``read_spec``.
    """
    advice = f"Name the {PLAN_NAME} of a pool."
    if len(content) > MOST_SPEC_BYTES:
        raise FormatError(f"{where!r} is not a plan: it has more than {MOST_SPEC_BYTES:,} bytes. {advice}")
    try:
        what, remedy = f"plan {where!r} has", "Use a newer lsmix."
        spec = decode_versioned(content, PoolSpec, SPEC_FORMAT, what=what, remedy=remedy)
    except DECODE_ERRORS as error:
        raise FormatError(f"{where!r} is not the plan of a pool: {error}. {advice}") from error
    if reason := _inconsistency(spec):
        raise CorruptError(f"plan {where!r} is inconsistent: {reason}. Download or rebuild the pool.")
    return spec


def _inconsistency(spec: PoolSpec) -> str:
    """Return why a specification is inconsistent, or ""."""
    roles = {"latents", "flow"} if spec.latent else {"dataset"}
    if set(spec.inputs) != roles or spec.latent != (spec.dim is not None):
        return f"its inputs are {sorted(spec.inputs)}, expected {sorted(roles)} and {'a' if spec.latent else 'no'} dim"
    if not spec.latent and spec.inputs["dataset"] != spec.origin.content_digest:
        return "its data set differs from its origin"
    if spec.origin.train_images < spec.pool.sources:
        return f"it mixes {spec.pool.sources} sources of {format_count(spec.origin.train_images, 'training image')}"
    if fields := LOCATION_FIELDS & spec.origin.config.keys():
        return f"its origin contains locations of files ({', '.join(sorted(fields))})"
    return ""
