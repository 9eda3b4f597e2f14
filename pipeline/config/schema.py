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

    flow: str = ""  # another finished flow than the recipe's, as flow.path


class FlowRecipe(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow of a recipe: its shape (fields of ``FlowShape``), its training, and when to look at it."""

    training: FlowTraining = msgspec.field(default_factory=FlowTraining)  # how it is trained
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # CPU threads of the training; the number decides the last bits
    evaluate_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 500  # iterations between measurements of bits/dim
    evaluate_images: Annotated[int, Meta(ge=1, le=1_000_000)] = 512  # most images of each split in such a measurement
    checkpoint_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 200  # iterations between checkpoints
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.7  # standard deviation of the latents of the sample grid


HARD_CUT = "hard-cut"  # the control: pixels of x₂ in the regions that LS-Mix takes from z₂


class NaturalnessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which methods are compared, on how many pairs, and by which evaluator."""

    evaluator: dict[str, Any] = {}  # fields of [flow] that differ for the evaluator (rows odd, the flow's seed + 1)
    methods: tuple[str, ...] = ()  # mixing methods, and hard-cut, the control for ls-mix; empty takes all of lsmix
    pairs: Annotated[int, Meta(ge=2, le=100_000)] = 500  # images of each sample, or fewer if there are not as many
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.5  # λ of all mixes
    seed: Seed = 0  # of pairs, methods, noise and resamples
    dequantise: Literal["uniform", "low-bits", "center"] = "uniform"  # low-bits: the images' own; uniform: noise
    bootstrap: Annotated[int, Meta(ge=10, le=100_000)] = 1000  # resamples for each confidence interval
    classifier: str = ""  # run that gives the features of the Fréchet distance; empty takes baseline, if any
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images in a pass; other sizes change the last bits

    def __post_init__(self) -> None:
        if not self.methods:  # filled in here, so that the names are part of the key
            every = (*LATENT_METHODS.builtin(), *PIXEL_METHODS.builtin(), HARD_CUT)
            msgspec.structs.force_setattr(self, "methods", every)


class RunConfig(ClassifierTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training of one classifier; its fields are those of ``ClassifierTraining``, and some of the stage."""

    seed: Seed = 0  # of weights, order, augmentation and dropout; set runs.NAME.seeds instead
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # CPU threads of the training; the number decides the last bits
    evaluate_every: Annotated[int, Meta(ge=1, le=1_000_000)] = 1  # epochs between measures of the test error


MixMode = Literal["mixture", "chain"]  # of several sources: one drawn for each batch, or one after another


class MixSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of a training's batches: a pool, or the training images, mixed with others of their batch or not."""

    pool: str = ""  # pool whose batches are taken, its next copy in each epoch; empty takes the training images
    method: str = ""  # how the augmented images of a batch are mixed; none leaves them as they are
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # λ ~ Beta(α, α) of the method
    # λ for each image, or one for each batch as in the published codes
    rate: Literal["per-sample", "per-batch"] = "per-sample"
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # how often a mixture draws this way, against the others


class TrainConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, with the sources of its batches."""

    parts: Annotated[tuple[MixSource, ...], Meta(min_length=1)] = (MixSource(),)  # where its batches come from
    mode: MixMode = "mixture"  # of several parts


_Images = Annotated[int, Meta(ge=0, le=1_000_000_000)]


class DataConfig(SourceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data set of a recipe and how it is split; fields of the source itself are in ``SourceConfig``."""

    limit: _Images = 0  # published training images to use, each class in proportion; 0 uses all
    heldout: _Images = 0  # images held out to measure the flow's likelihood; 0 takes a published held-out split
    test: _Images = 0  # images of the test split; 0 takes the published one; needed if there is none
    seed: Seed = 0  # of the choice of rows
    title: Annotated[str, Meta(max_length=200)] = ""  # what the images are called in cards and exports
    url: Annotated[str, Meta(max_length=2000)] = ""  # where they are published
    licence: Annotated[str, Meta(max_length=8000)] = ""  # of the images; empty takes the published one
    citation: Annotated[str, Meta(max_length=8000)] = ""  # of the images; empty takes the published one


class RowText(msgspec.Struct, frozen=True, kw_only=True):
    """What a recipe says of a run beside its training."""

    label: str = ""  # as tables call it; empty takes the run's name
    paper: str = ""  # the paper's figure, as printed
    seeds: tuple[int, ...] = ()  # of its trainings


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the report shows."""

    title: Annotated[str, Meta(max_length=200)] = ""  # of the page; empty takes the recipe's name
    table: Annotated[str, Meta(max_length=200)] = ""  # title of the table of error rates; empty is "Error rates"
    note: Annotated[str, Meta(max_length=400)] = ""  # text below that table
    pairs: Annotated[int, Meta(ge=1, le=64)] = 6  # rows of the image grids
    # images of each pool whose bits per dimension are measured
    bits_images: Annotated[int, Meta(ge=1, le=100_000)] = 1000


class RecipeReport(ReportConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a recipe, with what the recipe says of its runs."""

    rows: dict[str, RowText] = {}  # by run
