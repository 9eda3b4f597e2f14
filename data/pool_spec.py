"""What a pool is made from: the settings of its mixes, and ``plan.json``, which is enough to make every pixel again.

The settings are the fields of a recipe's ``[pools.NAME]``. Other people's plans are read too, so every field is typed, and
a plan that contradicts itself is refused.
"""

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from lsmix.data.atomic import DECODE_ERRORS, decode_versioned
from lsmix.data.errors import CorruptError, FormatError, MissingError, RecipeError
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

PLAN_NAME: Final = "plan.json"  # beside the pool
SPEC_FORMAT: Final = 1
CORNERS: Final = ("top-left", "top-right", "bottom-left", "bottom-right")  # where the second image may begin
MOST_SPEC_BYTES: Final = 1 << 20  # a citation of the length that a data set may have, and room to spare
_ChunkRows = Annotated[int, Meta(ge=0, le=1 << 24)]
_Rate = Annotated[float, Meta(ge=0, le=1)]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The data set that the images are from."""

    content_digest: str  # content digest of its artifact
    config: dict[str, Any]  # how its splits were chosen from the published files
    licence: str  # "" where it is unknown
    citation: str  # "" where it is unknown
    train_images: int  # rows of the train split, which sources are counted in


# Settings of a data set that say where its files are and how they were fetched: no part of a Provenance.
LOCATION_FIELDS: Final = frozenset({"path", "format", "download"})


def read_provenance(attributes: dict[str, Any], what: str) -> Provenance:
    """Return the origin that a store's attributes hold under ``origin``.

    Raises:
        CorruptError: it is missing or not whole; ``what`` begins the message.
    """
    try:
        return msgspec.convert(attributes.get("origin"), Provenance)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{what} does not say where its images are from: {error}. Make it again.") from error


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the images of a pool are mixed."""

    method: str = "ls-mix"  # how images are mixed
    # λ ~ Beta(α, α), the share of the second image; Dirichlet(α, …, α) for more than two sources
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 0.4
    lambdas: tuple[_Rate, ...] = ()  # fixed λ instead of drawn ones: copy c takes lambdas[c % len(lambdas)]
    copies: Annotated[int, Meta(ge=0, le=1_000_000)] = 0  # passes over the train split; 0: one, or one a λ
    sources: Annotated[int, Meta(ge=2, le=8)] = 2  # images in each mix; more than two with ls-mix only
    # where the second image begins; random draws one for each image; latent space only
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right", "random"] = "top-left"
    seed: Seed = 0  # of pairs, λ, corners and the method's own draws
    output: Literal["8bit", "5bit"] = "8bit"  # levels of the decoded pixels; 5bit is the paper's
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images in a pass; other sizes change the last bits
    chunk_rows: _ChunkRows = 0  # images in a chunk, at most 1 GiB; 0 is about 25 MB, at most an eighth of the pool
    on_decode_failure: Literal["redraw", "keep"] = "redraw"  # keep: only count failed decodes
    attempts: Annotated[int, Meta(ge=0, le=100)] = 3  # further draws for such an image before x₁ takes its place
    tolerance: Annotated[float, Meta(ge=0, le=1e6)] = 0.25  # how far outside [−½, ½] a pixel counts as bad
    bad_pixel_fraction: _Rate = 0.02  # share of bad pixels above which a decode has failed

    @property
    def copies_made(self) -> int:
        """The number of copies, at least 1."""
        return self.copies or max(len(self.lambdas), 1)


def in_latent_space(config: PoolConfig) -> bool:
    """Tell whether a pool is mixed in latent space, so that it needs a flow."""
    return config.method in LATENT_METHODS


def check_pool(config: PoolConfig) -> None:
    """Check what no single field can tell.

    Raises:
        RecipeError: the method is unknown, or cannot do what is asked; the message begins with the field's name.
    """
    if not in_latent_space(config) and config.method not in PIXEL_METHODS:
        known = [*LATENT_METHODS.names(), *PIXEL_METHODS.names()]
        raise RecipeError(f"method: unknown mixing method {config.method!r}.{nearest(config.method, known)}")
    if config.sources > 2 and config.method != "ls-mix":
        raise RecipeError(f"sources: more than two are mixed by 'ls-mix' only, got {config.method!r}.")
    if config.sources > 2 and config.lambdas:
        raise RecipeError("lambdas: a fixed λ is the share of one of two sources; with more, leave lambdas empty.")
    if config.corner != CORNERS[0] and not in_latent_space(config):
        raise RecipeError(f"corner: only methods in latent space begin at a corner, got {config.method!r}.")


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images become latents."""

    dequantise: Literal["low-bits", "uniform", "center"] = "low-bits"  # low-bits: the image's own; uniform: noise
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images in a pass; other sizes change the last bits
    seed: Seed = 0  # of the noise of uniform
    chunk_rows: _ChunkRows = 0  # latents in a chunk, at most 1 GiB; 0 is about 25 MB, at most an eighth of them
    check_round_trip: bool = True  # decode every latent again and count the images that come back exactly


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """All that a pool is made from: the content of plan.json."""

    format_version: int  # see SPEC_FORMAT
    stage_version: int  # of the mix stage that drew and mixed
    pool: PoolConfig
    inputs: dict[str, _Digest]  # content digests: of "latents" and "flow", or of "dataset" where pixels are mixed
    origin: Provenance  # the data set behind it
    latents: EncodeConfig | None = None  # how images became latents; None where pixels are mixed
    dim: Annotated[int, Meta(ge=1, le=1 << 24)] | None = None  # length of a latent vector

    @property
    def latent(self) -> bool:
        """Whether latents are mixed, so that a flow is needed."""
        return self.latents is not None

    def to_json(self) -> bytes:
        """Return the content of plan.json; equal specifications give equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"


def read_spec(path: Path | str, *, expected: str = "", where: str = "") -> PoolSpec:
    """Return the specification in a plan.json, or in the folder of a pool.

    Args:
        path: the file or the folder.
        expected: SHA-256 that the file must have; "" for any.
        where: how to call it in messages; "" for its path.

    Raises:
        MissingError: there is no such file.
        FormatError: it is no plan, or of a version that this lsmix does not read.
        CorruptError: it contradicts itself, or is not the expected file.
    """
    path = Path(path)
    path = path / PLAN_NAME if path.is_dir() else path
    where = where or str(path)
    if not path.is_file():
        raise MissingError(f"no plan at {where!r}: there is no such file. Name a pool's {PLAN_NAME}.")
    with path.open("rb") as file:
        content = file.read(MOST_SPEC_BYTES + 1)
    if expected and len(content) <= MOST_SPEC_BYTES and sha256(content).hexdigest() != expected:
        raise CorruptError(f"{where!r} is not the file that the manifest lists. Fetch or make the pool again.")
    return parse_spec(content, where)


def parse_spec(content: bytes, where: str) -> PoolSpec:
    """Return the specification that the content of a plan.json holds; ``where`` names the file in messages.

    Raises:
        FormatError, CorruptError: as ``read_spec``.
    """
    if len(content) > MOST_SPEC_BYTES:
        raise FormatError(f"{where!r} is no plan: it has more than {MOST_SPEC_BYTES} bytes. Name a pool's {PLAN_NAME}.")
    try:
        what, remedy = f"plan {where!r} has", "Use a newer lsmix."
        spec = decode_versioned(content, PoolSpec, SPEC_FORMAT, what=what, remedy=remedy)
    except DECODE_ERRORS as error:
        raise FormatError(f"{where!r} is no plan of a pool: {error}. Name a pool's {PLAN_NAME}.") from error
    if wrong := _contradiction(spec):
        raise CorruptError(f"plan {where!r} contradicts itself: {wrong}. Do not use it.")
    return spec


def _contradiction(spec: PoolSpec) -> str:
    """Return what in a specification cannot be, or ""."""
    roles = {"latents", "flow"} if spec.latent else {"dataset"}
    if set(spec.inputs) != roles or spec.latent != (spec.dim is not None):
        return f"its inputs are {sorted(spec.inputs)}, expected {sorted(roles)} and {'a' if spec.latent else 'no'} dim"
    if not spec.latent and spec.inputs["dataset"] != spec.origin.content_digest:
        return "its data set and its origin are not the same"
    if spec.origin.train_images < spec.pool.sources:
        return f"it mixes {spec.pool.sources} of {spec.origin.train_images} training images"
    if beside := LOCATION_FIELDS & spec.origin.config.keys():
        return f"its origin says where files are stored ({', '.join(sorted(beside))})"
    return ""
