"""The recipe: one TOML file that describes the data set, the flow, the pools, the classifier runs and the report.

``read_recipe`` checks the entire recipe, including each of its scales, before any stage starts.
"""

import copy
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from msgspec import Meta

from lsmix.data.errors import MissingError, RecipeError, format_bytes
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, nearest
from lsmix.data.pool_spec import EncodeConfig, check_pool, in_latent_space
from lsmix.data.readers.hub import is_hub
from lsmix.data.readers.registry import expand_home
from lsmix.data.rng import Seed
from lsmix.pipeline.config.recipes import builtin_recipes
from lsmix.pipeline.config.schema import (
    HARD_CUT,
    DataConfig,
    FlowRecipe,
    MixMode,
    MixSource,
    NaturalnessConfig,
    PoolRecipe,
    RecipeReport,
    ReportConfig,
    RowText,
    RunConfig,
)
from lsmix.pipeline.config.validation import convert, did_you_mean

__all__ = ["FlowSection", "Recipe", "RecipeSource", "RunSection", "read_recipe", "recipe_name", "training_name"]

_FORMAT = 1
_MAX_BYTES = 1 << 20  # far more than any real recipe; larger files are not parsed
_MAX_DOTS = 4096  # tomllib's memory grows with the square of the parts of a key: 200 kB of "a.a.a…" filled 60 GB
_MAX_DEPTH = 32  # the built-in recipes have at most 6 levels
_MAX_SCALES = 64  # each is checked as a separate recipe
_MAX_INTEGER = 2**63 - 1  # the largest that TOML guarantees, and that keys and manifests can store
_NAMED = ("pools", "runs", "scale")  # sections whose subsections are named by the user
_FLOW_FIELDS = FlowRecipe.__struct_fields__
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]  # \Z: $ also matches before a newline


class FlowSection(FlowRecipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow to train, or with ``path``, a trained flow."""

    # trained flow to use instead: folder (relative to the recipe), URL, artifact name, cache key or natural-32
    path: str = ""
    start_from: str = ""  # trained flow, given like path, whose weights the training starts from


class RunSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a comparison: a classifier, trained once per seed."""

    pool: str = ""  # pool to train on; if empty, the data set itself
    mix: tuple[MixSource, ...] = ()  # list of batch sources, instead of pool; see below
    mode: MixMode = "mixture"  # mixture: a random source of mix for each batch; chain: all of them in order
    # one training per seed; at most 1,000
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=1000)] = (0,)
    classifier: dict[str, Any] = {}  # overrides of [classifier] in this run
    label: Annotated[str, Meta(max_length=100)] = ""  # label in tables and plots; if empty, the run's name
    paper: Annotated[str, Meta(max_length=40)] = ""  # the paper's error rate, shown in the report, e.g. 2.45 ± 0.061


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a recipe file: everything that ``lsmix run`` brings up to date."""

    format: Annotated[int, Meta(ge=1, le=_FORMAT)] = _FORMAT  # version of the recipe format
    name: Name  # name of the artifacts: letters, digits, '.', '_' and '-', at most 64
    data: DataConfig  # the data set
    flow: FlowSection | None = None  # the flow to train, or a trained one; not needed for pixel pools
    latents: EncodeConfig = msgspec.field(default_factory=EncodeConfig)  # how images are encoded
    mix: PoolRecipe = msgspec.field(default_factory=PoolRecipe)  # defaults for all pools
    pools: dict[Name, PoolRecipe] = {}  # one section per pool
    classifier: RunConfig = msgspec.field(default_factory=RunConfig)  # defaults for all runs
    # one section per run; all runs are compared with the run named baseline
    runs: dict[Name, RunSection] = {}
    naturalness: NaturalnessConfig | None = None  # how to measure the naturalness of mixes; omit it to measure nothing
    report: ReportConfig = msgspec.field(default_factory=ReportConfig)  # contents of the report
    scale: dict[Name, dict[str, Any]] = {}  # variants of the recipe for other sizes; see below

    @property
    def own_flow(self) -> FlowSection:
        """The recipe's [flow], or the default flow if there is none."""
        return self.flow or FlowSection()

    @property
    def wants_flow(self) -> bool:
        """Whether the recipe has a [flow], or needs its own flow for a pool or for naturalness."""
        if self.flow is not None or self.naturalness is not None:
            return True
        return any(in_latent_space(pool) and not pool.flow for pool in self.pools.values())

    def run_config(self, run: str, seed: int) -> RunConfig:
        """Return the configuration of one training: [classifier], with the overrides of the run and the seed.

        Raises:
            RecipeError: A field of the run is invalid.
        """
        shared: dict[str, Any] = msgspec.to_builtins(self.classifier)
        where = f"runs.{run}.classifier"
        config: RunConfig = convert({**shared, **self.runs[run].classifier, "seed": seed}, RunConfig, where)
        return config

    def report_config(self) -> RecipeReport:
        """Return the configuration of the report, with the label, the paper's error rate and the seeds of each run."""
        return RecipeReport(
            **msgspec.structs.asdict(self.report),
            rows={name: RowText(label=run.label, paper=run.paper, seeds=run.seeds) for name, run in self.runs.items()},
        )

    def evaluator_config(self) -> FlowRecipe:
        """Return the configuration of the evaluator: [flow] with the evaluator's overrides, another seed and odd rows.

        Raises:
            RecipeError: A field of the evaluator is invalid.
        """
        own = dict(self.naturalness.evaluator) if self.naturalness else {}
        shared: dict[str, Any] = {name: msgspec.to_builtins(getattr(self.own_flow, name)) for name in _FLOW_FIELDS}
        training = own.pop("training", {})
        if isinstance(training, Mapping):  # otherwise ``convert`` raises the error
            if "rows" in training:
                raise RecipeError(
                    "naturalness.evaluator.training.rows: the evaluator always trains on the odd rows. Remove this field."
                )
            seed = {"seed": self.own_flow.training.seed + 1}
            training = {**shared["training"], **seed, **training, "rows": "odd"}
        config: FlowRecipe = convert({**shared, **own, "training": training}, FlowRecipe, "naturalness.evaluator")
        if config.training.seed == self.own_flow.training.seed:
            raise RecipeError(
                f"naturalness.evaluator.training.seed: got {config.training.seed}, the seed of the flow itself. Choose a different seed."
            )
        return config


RecipeSource = Path | str | Mapping[str, Any] | Recipe


def recipe_name(recipe: RecipeSource) -> str:
    """Return the recipe's file for messages, or "recipe" if it was given as a Python object."""
    return str(recipe) if isinstance(recipe, Path | str) else "recipe"


def training_name(run: str, seed: int) -> str:
    """Return the name of the artifact of one training; also the name of the corresponding input of the report."""
    return f"{run}-seed{seed}"


def read_recipe(source: RecipeSource, overrides: Sequence[str] = (), scale: str = "") -> Recipe:
    """Read and check a recipe.

    Args:
        source: The TOML file, a dictionary with the same sections, or a ``Recipe``. A dictionary may contain paths,
            tuples and NumPy values. Relative paths start at the folder of the TOML file, otherwise at the current
            folder.
        overrides: Strings "section.key=value", the value in TOML; relative paths in them start at the current folder.
        scale: Name of a section ``[scale.NAME]``, applied before ``overrides``; "" for none.

    Raises:
        MissingError: The file does not exist.
        RecipeError: The recipe or an override is invalid; the message names the field.
    """
    if isinstance(source, Path | str):
        path = Path(source)
        where, folder = f"recipe {str(path)!r}", path.resolve().parent
        table = _read_table(path, where)
    else:
        where, folder = "recipe", Path.cwd()
        table = _recipe_table(source) if isinstance(source, Recipe) else _plain(source)
        if not isinstance(table, dict):
            raise RecipeError(f"expected a path, a dictionary or a Recipe, got {type(source).__name__}.")
    _check_format(table, where)
    _check_values(table, "", where)
    scales = table.get("scale", {})
    scales = scales if isinstance(scales, dict) else {}
    if scale and scale not in scales:
        known = ", ".join(scales) or "none"
        raise RecipeError(f"{where} has no scale {scale!r}. Available: {known}.{did_you_mean(scale, list(scales))}")
    if len(scales) > _MAX_SCALES:
        raise RecipeError(f"{where} has {len(scales):,} scales; at most {_MAX_SCALES} are supported.")
    for name in scales:
        if name != scale:  # the requested scale is checked below, with the overrides
            _to_recipe(table, name, (), folder, f"{where}, scale {name!r}")
    return _to_recipe(table, scale, overrides, folder, where)


def _read_table(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        name = path.stem if path.stem in builtin_recipes() else "NAME"
        problem = "is not a file" if path.exists() else "does not exist"
        raise MissingError(f"recipe {str(path)!r} {problem}. Write one with 'lsmix init {name} > my.toml'.")
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{where} has {format_bytes(path.stat().st_size)}; the limit is {format_bytes(_MAX_BYTES)}.")
    try:
        return _parse_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # invalid TOML, invalid UTF-8, or a number with thousands of digits
        raise RecipeError(f"{where} is not valid TOML: {error}.") from error


def _recipe_table(recipe: Recipe) -> dict[str, Any]:
    """Return the table of a checked recipe. Its pools contain [mix]; only their differences from [mix] are kept."""
    table: dict[str, Any] = msgspec.to_builtins(recipe)
    shared = table["mix"]
    for pool in table["pools"].values():
        for name in [name for name, value in pool.items() if value == shared[name]]:
            del pool[name]
    return table


def _plain(value: Any) -> Any:
    """Convert a value of a Python recipe to the types that TOML has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _to_recipe(table: Mapping[str, Any], scale: str, overrides: Sequence[str], folder: Path, where: str) -> Recipe:
    """Return the checked recipe at one scale."""
    merged: dict[str, Any] = copy.deepcopy(dict(table))
    if scale:
        section = merged["scale"][scale]
        if not isinstance(section, dict):
            raise RecipeError(f"{where}: scale.{scale}: expected a section, got {section!r}.")
        _override(merged, section)
    _anchor_paths(merged, folder)
    for override in overrides:
        _apply_override(merged, override)
    _check_values(merged, "", where)
    shared, pools = merged.get("mix"), merged.get("pools")
    recipe: Recipe = convert(merged, Recipe, where)
    if isinstance(shared, dict) and isinstance(pools, dict):
        merged["pools"] = {name: {**shared, **pool} for name, pool in pools.items()}
        recipe = convert(merged, Recipe, where)
    _check_references(recipe)
    return recipe


def _override(table: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Override the fields of ``table`` by those of ``other``, section by section."""
    for name, value in other.items():
        below = table.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            _override(below, value)
        else:
            table[name] = value


def _parse_toml(text: str) -> dict[str, Any]:
    if text.count(".") > _MAX_DOTS:
        raise ValueError(f"it has more than {_MAX_DOTS:,} dots")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):  # tomllib parses a key with many parts without recursion, but later code recurses
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return table
    raise ValueError("it is nested too deeply")


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute. A flow may also be given by name, so its path is changed only if it exists."""
    flow = table.get("flow")
    parts = [(table.get("data"), "path"), (flow, "path"), (flow, "start_from"), (table.get("mix"), "flow")]
    pools = table.get("pools")
    parts += [(pool, "flow") for pool in pools.values()] if isinstance(pools, dict) else []
    for part, key in parts:
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(value, str) and value and "\0" not in value:
            if "://" in value and (part is not table.get("data") or is_hub(value)):
                continue  # a URL
            path = folder / expand_home(value)
            if (key == "path" and part is table.get("data")) or path.exists():
                cast("dict[str, Any]", part)[key] = str(path)


def _apply_override(table: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not separator or not all(keys):
        raise RecipeError(f"'--set {override}': expected 'section.key=value', such as 'pools.lsmix.alpha=0.2'.")
    value: Any
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text  # strings need no quotes on the command line
    changed: dict[str, Any] = {}
    part, nested = table, changed
    named = table.get(keys[0], {})
    if keys[0] in _NAMED and len(keys) > 2 and isinstance(named, dict):  # otherwise a typo would add a pool or a run
        _check_known(f"'--set {override}'", keys[0].removesuffix("s"), keys[1], named)
    for key in keys[:-1]:
        part, nested = part.setdefault(key, {}), nested.setdefault(key, {})
        if not isinstance(part, dict):
            raise RecipeError(f"'--set {override}': {key!r} is a value, not a section.")
    nested[keys[-1]] = value
    _anchor_paths(changed, Path.cwd())  # separate from the table, whose paths start at another folder
    part[keys[-1]] = nested[keys[-1]]


def _check_format(table: Mapping[str, Any], where: str) -> None:
    version = table.get("format", _FORMAT)
    if isinstance(version, int) and version > _FORMAT:
        raise RecipeError(
            f"{where} has format {version}; this version of lsmix reads format {_FORMAT}. Use a newer lsmix."
        )


def _check_values(value: Any, dotted: str, where: str) -> None:
    """Reject values that keys, manifests or paths cannot store: infinities, integers over 64 bits, NUL characters."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_values(part, f"{dotted}.{name}" if dotted else name, where)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_values(part, f"{dotted}[{index}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {dotted}: expected a finite number, got {value}.")
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise RecipeError(f"{where}: {dotted}: expected an integer of at most {_MAX_INTEGER:,} in magnitude.")
    elif isinstance(value, str) and "\0" in value:
        raise RecipeError(f"{where}: {dotted}: expected text without NUL characters, got {value!r}.")


def _check_naturalness(recipe: Recipe, config: NaturalnessConfig) -> None:
    for name in config.methods:
        if name != HARD_CUT and name not in LATENT_METHODS and name not in PIXEL_METHODS:
            known = [HARD_CUT, *LATENT_METHODS.names(), *PIXEL_METHODS.names()]
            raise RecipeError(f"naturalness.methods: unknown mixing method {name!r}.{nearest(name, known)}")
    if len(set(config.methods)) < len(config.methods):
        raise RecipeError(f"naturalness.methods: list each method only once, got {list(config.methods)}.")
    if not recipe.data.heldout:
        raise RecipeError(
            "naturalness compares mixes with held-out originals, but there are none. Set 'data.heldout', for example to 500."
        )
    if recipe.own_flow.training.rows == "odd":
        raise RecipeError(
            "flow.training.rows: expected 'all' or 'even', got 'odd'. With a section [naturalness], the evaluator trains on the odd rows."
        )
    if not recipe.evaluator_config().training.iterations:
        raise RecipeError("naturalness.evaluator.training.iterations: expected int >= 1, got 0.")
    if config.classifier:
        _check_known("naturalness.classifier", "run", config.classifier, recipe.runs)


def _check_known(where: str, what: str, name: str, known: Mapping[str, object]) -> None:
    """Raise RecipeError unless the recipe has a section of this name."""
    if name not in known:
        raise RecipeError(
            f"{where}: there is no {what} {name!r}. The recipe has: {', '.join(known) or 'none'}."
            f"{did_you_mean(name, list(known))}"
        )


def _check_references(recipe: Recipe) -> None:
    if recipe.naturalness:
        _check_naturalness(recipe, recipe.naturalness)
    if recipe.flow and not recipe.flow.training.iterations:
        raise RecipeError("flow.training.iterations: expected int >= 1, got 0. To use a trained flow, set 'flow.path'.")
    if recipe.own_flow.path and recipe.own_flow.start_from:
        raise RecipeError(
            "flow.start_from: 'flow.path' names a flow that is used without training. Remove one of the two."
        )
    if recipe.classifier.seed:
        raise RecipeError("classifier.seed: seeds are set per run. Use 'runs.NAME.seeds'.")
    for name, pool in recipe.pools.items():
        try:
            check_pool(pool)
        except RecipeError as error:
            raise RecipeError(f"pools.{name}.{error}") from error
        if pool.flow and not in_latent_space(pool):
            raise RecipeError(f"pools.{name}.flow: {pool.method!r} mixes pixels and needs no flow. Remove this field.")
    for name, run in recipe.runs.items():
        _check_mixing(recipe, name, run)
        if len(set(run.seeds)) < len(run.seeds):
            raise RecipeError(f"runs.{name}.seeds: list each seed only once, got {list(run.seeds)}.")
        if "seed" in run.classifier:
            raise RecipeError(f"runs.{name}.classifier.seed: use 'runs.{name}.seeds' instead.")
        recipe.run_config(name, run.seeds[0])


def _check_mixing(recipe: Recipe, name: str, run: RunSection) -> None:
    if run.pool and run.mix:
        raise RecipeError(f"runs.{name}.mix: 'pool' and 'mix' cannot be combined. Move the pool into 'mix'.")
    named = [("pool", run.pool), *((f"mix[{place}].pool", part.pool) for place, part in enumerate(run.mix))]
    for key, pool in named:
        if pool:
            _check_known(f"runs.{name}.{key}", "pool", pool, recipe.pools)
    for place, part in enumerate(run.mix):
        where = f"runs.{name}.mix[{place}]"
        if bool(part.pool) == bool(part.method):
            raise RecipeError(
                f"{where}: expected either a 'pool' or a 'method', got {part.pool!r} and {part.method!r}."
            )
        if part.method and part.method != "none":
            if part.method in LATENT_METHODS:
                raise RecipeError(
                    f"{where}.method: {part.method!r} mixes in latent space and needs a pool. Add one and set 'pool'."
                )
            try:
                PIXEL_METHODS.check(part.method)
            except RecipeError as error:
                raise RecipeError(f"{where}.method: {error}") from error
        if run.mode == "chain" and part.pool and place:
            raise RecipeError(f"{where}.pool: in a chain, a pool must come first because its images are already mixed.")
