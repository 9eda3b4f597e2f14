"""The configuration of each stage, with the range of every field."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lsmix.classifiers.config import ClassifierTraining
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool_spec import PoolConfig
from lsmix.data.readers.registry import SourceConfig
from lsmix.data.rng import Seed
from lsmix.glow.config import FlowShape, FlowTraining

__all__ = [
    "HARD_CUT",
    "DataConfig",
    "FlowRecipe",
    "MixMode",
    "MixSource",
    "NaturalnessConfig",
    "PoolRecipe",
    "RecipeReport",
    "ReportConfig",
    "RowText",
    "RunConfig",
    "TrainConfig",
]


class PoolRecipe(PoolConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool of a recipe: how its images are mixed, and with which flow."""

    flow: str = ""  # another finished flow than the recipe's: its folder or URL, or its name or key in the workspace


class FlowRecipe(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow of a recipe: its shape (fields of ``FlowShape``), its training, and when to look at it."""

    training: FlowTraining = msgspec.field(default_factory=FlowTraining)
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # of the training on a CPU, where they decide the last bits
    # Iterations between measures of held-out bits per dimension.
    evaluate_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 500
    evaluate_images: Annotated[int, Meta(ge=1, le=1_000_000)] = 512  # images of each split in such a measure, at most
    checkpoint_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 200  # iterations between checkpoints
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.7  # standard deviation of the latents of the sample sheet


HARD_CUT = "hard-cut"  # the control: pixels of x₂ in the regions that LS-Mix takes from z₂


class NaturalnessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which methods are compared, on how many pairs, and by which evaluator."""

    evaluator: dict[str, Any] = {}  # fields of [flow] that differ for the evaluator, whose seed is the flow's + 1
    methods: tuple[str, ...] = ()  # in latent or in pixel space, and "hard-cut"; empty: all that come with lsmix
    pairs: Annotated[int, Meta(ge=2, le=100_000)] = 500  # images of each sample, at most
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.5  # λ of all mixes
    seed: Seed = 0  # of pairs, methods, noise and resamples
    dequantise: Literal["uniform", "low-bits", "center"] = "uniform"  # what the evaluator sees below its bits
    bootstrap: Annotated[int, Meta(ge=10, le=100_000)] = 1000  # resamples behind each confidence interval
    classifier: str = ""  # run whose first seed gives features to compare; empty takes "baseline", where there is one
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images a pass; part of the key, since it changes last bits

    def __post_init__(self) -> None:
        if not self.methods:  # filled in here, so that the names are part of the key
            every = (*LATENT_METHODS.builtin(), *PIXEL_METHODS.builtin(), HARD_CUT)
            msgspec.structs.force_setattr(self, "methods", every)


class RunConfig(ClassifierTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training of one classifier; its fields are those of ``ClassifierTraining``, and some of the stage."""

    seed: Seed = 0  # of weights, order, augmentation and dropout
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # of the training on a CPU, where they decide the last bits
    evaluate_every: Annotated[int, Meta(ge=1, le=1_000_000)] = 1  # epochs between measures of the test error


MixMode = Literal["mixture", "chain"]  # of several sources: one drawn for each batch, or one after another


class MixSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of a training's batches: a pool, or the training images, mixed with others of their batch or not."""

    pool: str = ""  # name of the pool, in a stage the role of that input; empty takes the training images
    method: str = ""  # a name in PIXEL_METHODS, or "none" to leave images as they are
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # λ ~ Beta(α, α), the share of the second image
    rate: Literal["per-sample", "per-batch"] = "per-sample"  # whether λ is drawn for each image or once a batch
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # against the others, in a mixture


class TrainConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, with the sources of its batches."""

    parts: Annotated[tuple[MixSource, ...], Meta(min_length=1)] = (MixSource(),)  # where its batches come from
    mode: MixMode = "mixture"  # of several parts


_Images = Annotated[int, Meta(ge=0, le=1_000_000_000)]


class DataConfig(SourceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data set of a recipe and how it is split; fields of the source itself are in ``SourceConfig``."""

    limit: _Images = 0  # images kept of the published training split, class by class; 0 keeps all
    heldout: _Images = 0  # images taken off the training split to watch the flow's likelihood
    test: _Images = 0  # images in the test split; 0 keeps all of a published one
    seed: Seed = 0  # of the choice of rows
    licence: Annotated[str, Meta(max_length=8000)] = ""  # of the images; "" takes the published one, if there is any
    citation: Annotated[str, Meta(max_length=8000)] = ""  # whom to cite for them; "" takes the published one


class RowText(msgspec.Struct, frozen=True, kw_only=True):
    """What a recipe says of a run beside its training."""

    label: str = ""  # as tables call it; empty takes the run's name
    paper: str = ""  # the paper's figure, as printed
    seeds: tuple[int, ...] = ()  # of its trainings


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the report shows."""

    title: Annotated[str, Meta(max_length=200)] = ""  # of the page; empty names the recipe
    table: Annotated[str, Meta(max_length=200)] = ""  # title of the table of error rates; empty is "Error rates"
    note: Annotated[str, Meta(max_length=400)] = ""  # text below that table
    pairs: Annotated[int, Meta(ge=1, le=64)] = 6  # rows of the sheets
    # Images of each pool whose bits per dimension are measured.
    bits_images: Annotated[int, Meta(ge=1, le=100_000)] = 1000


class RecipeReport(ReportConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a recipe, with what the recipe says of its runs."""

    rows: dict[str, RowText] = {}  # by run
