"""The mix stage: latents + flow + plan → ``pool.zarr``, the mixed images with their labels, shares and sources.

A method in pixel space needs the data set alone. The plan says what is mixed with what; this module only applies it, and
draws again what the flow cannot decode.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lsmix.classifiers.config import ClassifierTraining
from lsmix.data.errors import RecipeError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, nearest
from lsmix.data.pool import CORNERS
from lsmix.data.readers.registry import SourceConfig
from lsmix.glow.config import FlowShape, FlowTraining

if TYPE_CHECKING:
    pass

__all__ = [
    "HARD_CUT",
    "Combine",
    "DataConfig",
    "EncodeConfig",
    "FlowRecipe",
    "MixOnTheFly",
    "NaturalnessConfig",
    "PoolConfig",
    "RecipeReport",
    "ReportConfig",
    "RowText",
    "RunConfig",
    "TrainConfig",
    "TrainPart",
    "check_naturalness",
    "check_pool",
    "in_latent_space",
]

Rate = Annotated[float, Meta(ge=0, le=1)]


Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right", "random"]


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool of mixed images."""

    method: str = "ls-mix"  # how images are mixed: a name in LATENT_METHODS or PIXEL_METHODS
    alpha: Annotated[float, Meta(gt=0)] = 0.4  # λ ~ Beta(α, α), the share of the second image
    lambdas: tuple[Rate, ...] = ()  # instead of drawn λ: copy c takes lambdas[c % len(lambdas)]
    copies: Annotated[int, Meta(ge=0)] = 0  # times the training set is gone through; 0: one, or one for each of lambdas
    sources: Annotated[int, Meta(ge=2, le=8)] = 2  # images in each mix; more than two with ls-mix only
    corner: Corner = "top-left"  # where the second image begins; "random" draws one of the four for each image
    seed: Annotated[int, Meta(ge=0)] = 0  # of pairs and λ
    flow: str = ""  # another finished flow than the recipe's: its folder or URL, or its name or key in the workspace
    output: Literal["8bit", "5bit"] = "8bit"  # levels of the decoded pixels
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images a pass; part of the key, since it changes last bits
    shard_rows: Annotated[int, Meta(ge=0)] = 0  # images a shard; 0 chooses about 25 MB
    on_decode_failure: Literal["redraw", "keep"] = "redraw"  # what becomes of images that the flow cannot decode
    attempts: Annotated[int, Meta(ge=0, le=100)] = 3  # further draws after a failed decode before x₁ takes its place
    tolerance: Annotated[float, Meta(ge=0)] = 0.25  # how far outside [−½, ½] a pixel counts as bad
    bad_pixel_fraction: Rate = 0.02  # share of bad pixels above which a decode has failed

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
    if config.flow and not in_latent_space(config):
        raise RecipeError(f"flow: {config.method!r} mixes pixels and needs none. Remove it.")


class FlowRecipe(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow of a recipe: its shape (fields of ``FlowShape``), its training, and when to look at it."""

    training: FlowTraining = msgspec.field(default_factory=FlowTraining)
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # of the training on a CPU, where they decide the last bits
    evaluate_every: Annotated[int, Meta(ge=1)] = 500  # iterations between measures of held-out bits per dimension
    evaluate_images: Annotated[int, Meta(ge=1)] = 512  # images of each split in such a measure, at most
    checkpoint_every: Annotated[int, Meta(ge=1)] = 200  # iterations between checkpoints
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.7  # standard deviation of the latents of the sample sheet


HARD_CUT = "hard-cut"  # the control: pixels of x₂ in the very regions that LS-Mix takes from z₂


_METHODS = ("ls-mix", "linear", "bern-mix", "swap-mix", "reverse-mix", "mixup", "cutmix", HARD_CUT)


class NaturalnessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which methods are compared, on how many pairs, and by which judge."""

    judge: dict[str, Any] = {}  # fields of [flow] that differ for the judge, whose seed is the flow's + 1
    methods: Annotated[tuple[str, ...], Meta(min_length=1)] = _METHODS  # in latent or in pixel space, and "hard-cut"
    pairs: Annotated[int, Meta(ge=2, le=100_000)] = 500  # images of each sample, at most
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.5  # λ of all mixes
    seed: Annotated[int, Meta(ge=0)] = 0  # of pairs, methods, noise and resamples
    dequantise: Literal["uniform", "low-bits", "center"] = "uniform"  # what the judge sees below its bits
    bootstrap: Annotated[int, Meta(ge=10, le=100_000)] = 1000  # resamples behind each confidence interval
    classifier: str = ""  # run whose first seed gives features to compare; empty takes "baseline", where there is one
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images a pass; part of the key, since it changes last bits


def check_naturalness(config: NaturalnessConfig, *, heldout: int, rows: str) -> None:
    """Check what a configuration refers to outside of it.

    Args:
        config: the section of the recipe.
        heldout: number of held-out images.
        rows: those that the mixing flow learns from.

    Raises:
        RecipeError: a method is unknown or stands twice, there are no held-out images, or the flow has the judge's rows.
    """
    for name in config.methods:
        if name != HARD_CUT and name not in LATENT_METHODS and name not in PIXEL_METHODS:
            known = [HARD_CUT, *LATENT_METHODS.names(), *PIXEL_METHODS.names()]
            raise RecipeError(f"naturalness.methods: unknown mixing method {name!r}.{nearest(name, known)}")
    if len(set(config.methods)) < len(config.methods):
        raise RecipeError(f"naturalness.methods: each method counts once, got {list(config.methods)}.")
    if not heldout:
        raise RecipeError(
            "naturalness compares mixes with held-out originals, and there are none. Set 'data.heldout', such as to 500."
        )
    if rows == "odd":
        raise RecipeError(
            "flow.training.rows: expected 'all' or 'even' with a section [naturalness], got 'odd', which are the judge's."
        )


class RunConfig(ClassifierTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training of one classifier; its fields are those of ``ClassifierTraining``, the seed and the threads."""

    seed: Annotated[int, Meta(ge=0)] = 0  # of weights, order, augmentation and dropout
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # of the training on a CPU, where they decide the last bits


Combine = Literal["per-batch", "sequential"]  # how several ways of mixing come together in one run


class MixOnTheFly(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images are mixed while a classifier trains, with others of their batch."""

    method: str = ""  # a name in PIXEL_METHODS, or "none" to leave images as they are
    alpha: Annotated[float, Meta(gt=0)] = 1.0  # λ ~ Beta(α, α), the share of the second image
    rate: Literal["per-sample", "per-batch"] = "per-sample"  # whether λ is drawn for each image or once a batch
    weight: Annotated[float, Meta(gt=0)] = 1.0  # of this way against the others, where one is drawn for each batch


class TrainPart(MixOnTheFly, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way in which the batches of a training come about."""

    input: str = ""  # role of the pool among the inputs; "" takes the training images


class TrainConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training with what it trains on."""

    parts: Annotated[tuple[TrainPart, ...], Meta(min_length=1)] = (TrainPart(),)  # where its batches come from
    combine: Combine = "per-batch"  # of several parts


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images become latents."""

    dequantise: Literal["low-bits", "uniform", "center"] = "low-bits"  # what stands below the flow's bits
    order: Literal["morton", "raster"] = "morton"  # of the latent components
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images a pass; part of the key, since it changes last bits
    seed: Annotated[int, Meta(ge=0)] = 0  # of the noise, where dequantise is "uniform"
    shard_rows: Annotated[int, Meta(ge=0)] = 0  # latents a shard; 0 chooses about 25 MB
    check_round_trip: bool = True  # decode every latent again and count the images that come back exactly


class DataConfig(SourceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data set of a recipe and how it is split; fields of the source itself are in ``SourceConfig``."""

    limit: Annotated[int, Meta(ge=0)] = 0  # images kept of the published training split, class by class; 0 keeps all
    heldout: Annotated[int, Meta(ge=0)] = 0  # images taken off the training split to watch the flow's likelihood
    test: Annotated[int, Meta(ge=0)] = 0  # images in the test split; 0 keeps all of a published one
    seed: Annotated[int, Meta(ge=0)] = 0  # of the choice of rows


class RowText(msgspec.Struct, frozen=True, kw_only=True):
    """What a recipe says of a run beside its training."""

    label: str = ""  # as tables call it; empty takes the run's name
    paper: str = ""  # the paper's figure, as printed


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the report shows."""

    title: Annotated[str, Meta(max_length=200)] = ""  # of the page; empty names the recipe
    table: Annotated[str, Meta(max_length=200)] = ""  # title of the table of error rates; empty is "Error rates"
    note: Annotated[str, Meta(max_length=400)] = ""  # stands below that table
    pairs: Annotated[int, Meta(ge=1, le=64)] = 6  # rows of the sheets
    bits_images: Annotated[int, Meta(ge=1)] = 1000  # images of each pool whose bits per dimension are measured


class RecipeReport(ReportConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a recipe, with what the recipe says of its runs."""

    rows: dict[str, RowText] = {}  # by run
