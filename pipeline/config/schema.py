"""The configuration structs of the stages, with the range of every field."""

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
    """A pool of a recipe: how its images are mixed, and by which flow."""

    flow: str = ""  # trained flow to use instead of [flow], given like flow.path


class FlowRecipe(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow of a recipe: its shape (fields of ``FlowShape``), training, evaluation and checkpoints."""

    training: FlowTraining = msgspec.field(default_factory=FlowTraining)  # how to train it
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # CPU threads for training; changes the last bits
    evaluate_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 500  # iterations between measurements of bits/dim
    evaluate_images: Annotated[int, Meta(ge=1, le=1_000_000)] = 512  # maximum number of images of each split to measure
    checkpoint_every: Annotated[int, Meta(ge=1, le=100_000_000)] = 200  # iterations between checkpoints
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.7  # standard deviation of the latents in the sample grid


HARD_CUT = "hard-cut"  # the control: pixels of x₂ in the regions that LS-Mix takes from z₂


class NaturalnessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which methods to compare, on how many pairs, and with which evaluator."""

    evaluator: dict[str, Any] = {}  # overrides of [flow] for the evaluator (odd rows; default seed: the flow's + 1)
    methods: tuple[str, ...] = ()  # mixing methods, or hard-cut, the control for ls-mix; if empty, all built-in methods
    pairs: Annotated[int, Meta(ge=2, le=100_000)] = 500  # images per sample; fewer if the data set has fewer
    lam: Annotated[float, Meta(ge=0, le=1)] = 0.5  # λ of every mix
    seed: Seed = 0  # seed of pairs, methods, noise and resamples
    # low bits of the images: uniform replaces them by noise, low-bits keeps them, center sets them to the middle
    dequantise: Literal["uniform", "low-bits", "center"] = "uniform"
    bootstrap: Annotated[int, Meta(ge=10, le=100_000)] = 1000  # bootstrap resamples per confidence interval
    classifier: str = ""  # run whose features the Fréchet distance uses; if empty, baseline if there is one
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 64  # images per pass; changes the last bits of the result

    def __post_init__(self) -> None:
        if not self.methods:  # filled in here so that the names become part of the key
            every = (*LATENT_METHODS.builtin(), *PIXEL_METHODS.builtin(), HARD_CUT)
            msgspec.structs.force_setattr(self, "methods", every)


class RunConfig(ClassifierTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training of a classifier: the fields of ``ClassifierTraining`` and those of the stage."""

    seed: Seed = 0  # seed of weights, order, augmentation and dropout; set runs.NAME.seeds instead
    threads: Annotated[int, Meta(ge=1, le=1024)] = 2  # CPU threads for training; changes the last bits
    evaluate_every: Annotated[int, Meta(ge=1, le=1_000_000)] = 1  # epochs between measurements of the test error


MixMode = Literal["mixture", "chain"]  # several sources: a random one for each batch, or all in order


class MixSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of training batches: a pool, or the training images, optionally mixed within each batch."""

    pool: str = ""  # pool to take batches from, the next copy in each epoch; if empty, the training images
    method: str = ""  # how to mix the augmented images of a batch; none does not mix
    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # α of λ ~ Beta(α, α)
    # per-sample: λ for each image; per-batch: one λ for each batch, as in the published code
    rate: Literal["per-sample", "per-batch"] = "per-sample"
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # relative probability of this source in a mixture


class TrainConfig(RunConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, with the sources of its batches."""

    parts: Annotated[tuple[MixSource, ...], Meta(min_length=1)] = (MixSource(),)  # sources of the batches
    mode: MixMode = "mixture"  # how to combine several parts


_Images = Annotated[int, Meta(ge=0, le=1_000_000_000)]


class DataConfig(SourceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data set of a recipe and its splits; the fields of the source are in ``SourceConfig``."""

    limit: _Images = 0  # published training images to use, in proportion to the classes; 0 for all
    heldout: _Images = 0  # images held out to measure the flow; 0 for the published held-out split, if any
    test: _Images = 0  # images of the test split; 0 for the published one; required if there is none
    seed: Seed = 0  # seed for choosing the rows
    title: Annotated[str, Meta(max_length=200)] = ""  # title of the data set in cards and exports
    url: Annotated[str, Meta(max_length=2000)] = ""  # web page of the data set
    licence: Annotated[str, Meta(max_length=8000)] = ""  # licence of the images; if empty, the published one
    citation: Annotated[str, Meta(max_length=8000)] = ""  # work to cite; if empty, the published one


class RowText(msgspec.Struct, frozen=True, kw_only=True):
    """How the report shows a run."""

    label: str = ""  # label in tables; if empty, the run's name
    paper: str = ""  # the paper's error rate, as printed there
    seeds: tuple[int, ...] = ()  # seeds of the trainings


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of the report."""

    title: Annotated[str, Meta(max_length=200)] = ""  # title of the page; if empty, the recipe's name
    table: Annotated[str, Meta(max_length=200)] = ""  # title of the table of error rates; if empty, "Error rates"
    note: Annotated[str, Meta(max_length=400)] = ""  # text below that table
    pairs: Annotated[int, Meta(ge=1, le=64)] = 6  # rows of the image grids
    # number of images per pool whose bits per dimension are measured
    bits_images: Annotated[int, Meta(ge=1, le=100_000)] = 1000


class RecipeReport(ReportConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The report of a recipe, and how it shows each run."""

    rows: dict[str, RowText] = {}  # by name of the run
