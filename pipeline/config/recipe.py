"""The recipe: one TOML file that names the data set, the flow, the pools, the classifier runs and the report.

Reading a recipe checks all of it, with each of its scales, before any stage starts.
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

from lsmix.data.errors import MissingError, RecipeError
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
_MAX_BYTES = 1 << 20  # far above any real recipe; a 100 MB file is not parsed
_MAX_DOTS = 4096  # tomllib takes memory by the square of a key's parts: 200 kB of "a.a.a…" were seen to fill 60 GB
_MAX_DEPTH = 32  # ours have six levels at most
_MAX_SCALES = 64  # each is checked as a recipe of its own
_MAX_INTEGER = 2**63 - 1  # the largest that TOML promises, and that keys and manifests can hold
_NAMED = ("pools", "runs", "scale")  # sections of sections whose names the recipe chooses
_FLOW_FIELDS = FlowRecipe.__struct_fields__
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]  # \Z: $ would let a newline through


class FlowSection(FlowRecipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow to train, or, with ``path``, one that is finished already."""

    # finished flow to use instead: folder (relative to the recipe's), URL, name or cache key in the workspace, or natural-32
    path: str = ""
    start_from: str = ""  # finished flow, named in the same way, whose weights the training starts from


class RunSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One arm of a comparison: a classifier trained once for each seed."""

    pool: str = ""  # pool to train on; empty trains on the data set itself
    mix: tuple[MixSource, ...] = ()  # instead of pool: a list of ways to make batches, see below
    mode: MixMode = "mixture"  # mixture draws one way of mix for each batch, chain applies all in turn
    # one training for each; at most 1,000
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=1000)] = (0,)
    classifier: dict[str, Any] = {}  # fields of [classifier] that differ in this run
    label: Annotated[str, Meta(max_length=100)] = ""  # name of the run in tables and plots; empty takes its name
    paper: Annotated[str, Meta(max_length=40)] = ""  # the paper's figure, for the report: 2.45 ± 0.061


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that ``lsmix run`` brings up to date: the content of a recipe file."""

    format: Annotated[int, Meta(ge=1, le=_FORMAT)] = _FORMAT  # version of the recipe format
    name: Name  # name of the artifacts: letters, digits, '.', '_' and '-', at most 64
    data: DataConfig  # the data set
    flow: FlowSection | None = None  # the flow to train, or a finished one; not needed for pixel pools
    latents: EncodeConfig = msgspec.field(default_factory=EncodeConfig)  # how images are encoded
    mix: PoolRecipe = msgspec.field(default_factory=PoolRecipe)  # fields that all pools share
    pools: dict[Name, PoolRecipe] = {}  # one section for each pool
    classifier: RunConfig = msgspec.field(default_factory=RunConfig)  # fields that all runs share
    # one section for each arm of the comparison; the others are compared with the one named baseline
    runs: dict[Name, RunSection] = {}
    naturalness: NaturalnessConfig | None = None  # how natural mixes are; without it nothing is measured
    report: ReportConfig = msgspec.field(default_factory=ReportConfig)  # what the report shows
    scale: dict[Name, dict[str, Any]] = {}  # other sizes of the recipe, see below

    @property
    def own_flow(self) -> FlowSection:
        """The recipe's flow; with the defaults if it has no [flow]."""
        return self.flow or FlowSection()

    @property
    def wants_flow(self) -> bool:
        """Whether the recipe has a [flow], or something needs the recipe's own flow."""
        if self.flow is not None or self.naturalness is not None:
            return True
        return any(in_latent_space(pool) and not pool.flow for pool in self.pools.values())

    def run_config(self, run: str, seed: int) -> RunConfig:
        """Return the configuration of one training: the shared fields, this run's own, and a seed.

        Raises:
            RecipeError: a field of the run is wrong.
        """
        shared: dict[str, Any] = msgspec.to_builtins(self.classifier)
        where = f"runs.{run}.classifier"
        config: RunConfig = convert({**shared, **self.runs[run].classifier, "seed": seed}, RunConfig, where)
        return config

    def report_config(self) -> RecipeReport:
        """Return the configuration of the report, with the label, figure and seeds of each run."""
        return RecipeReport(
            **msgspec.structs.asdict(self.report),
            rows={name: RowText(label=run.label, paper=run.paper, seeds=run.seeds) for name, run in self.runs.items()},
        )

    def evaluator_config(self) -> FlowRecipe:
        """Return the configuration of the evaluator: the recipe's flow, with the evaluator's own fields, seed and rows.

        Raises:
            RecipeError: a field of the evaluator is wrong.
        """
        own = dict(self.naturalness.evaluator) if self.naturalness else {}
        shared: dict[str, Any] = {name: msgspec.to_builtins(getattr(self.own_flow, name)) for name in _FLOW_FIELDS}
        training = own.pop("training", {})
        if isinstance(training, Mapping):  # the conversion refuses anything else
            if "rows" in training:
                raise RecipeError(
                    "naturalness.evaluator.training.rows: the evaluator always learns from the odd rows; leave it out."
                )
            seed = {"seed": self.own_flow.training.seed + 1}
            training = {**shared["training"], **seed, **training, "rows": "odd"}
        config: FlowRecipe = convert({**shared, **own, "training": training}, FlowRecipe, "naturalness.evaluator")
        if config.training.seed == self.own_flow.training.seed:
            raise RecipeError(
                f"naturalness.evaluator.training.seed: got {config.training.seed}, which is the flow's own; an evaluator needs another."
            )
        return config


RecipeSource = Path | str | Mapping[str, Any] | Recipe


def recipe_name(recipe: RecipeSource) -> str:
    """Return what to call a recipe: its file, or "recipe" for one that Python code made."""
    return str(recipe) if isinstance(recipe, Path | str) else "recipe"


def training_name(run: str, seed: int) -> str:
    """Return the name of the artifact that one training of a run makes; the report's input of it is called so, too."""
    return f"{run}-seed{seed}"


def read_recipe(source: RecipeSource, overrides: Sequence[str] = (), scale: str = "") -> Recipe:
    """Read and check a recipe.

    Args:
        source: the TOML file, whose relative paths start at its own folder; or a dictionary with the same sections, in
            which paths, tuples and NumPy values may be; or a ``Recipe``. Relative paths in these start at the current folder.
        overrides: "section.key=value" each, the value in TOML; relative paths in them start at the current folder.
        scale: name of a section ``[scale.NAME]`` whose fields go over the recipe's, before the overrides; "" for none.

    Raises:
        MissingError: there is no such file.
        RecipeError: the file, the dictionary or an override is no valid recipe; the message names the place.
    """
    if isinstance(source, Path | str):
        path = Path(source)
        where, folder = f"recipe {str(path)!r}", path.resolve().parent
        table = _read_table(path, where)
    else:
        where, folder = "recipe", Path.cwd()
        table = _recipe_table(source) if isinstance(source, Recipe) else _plain(source)
        if not isinstance(table, dict):
            raise RecipeError(f"a recipe is a path, a dictionary or a Recipe; got {type(source).__name__}.")
    _check_format(table, where)
    _check_values(table, "", where)
    scales = table.get("scale", {})
    scales = scales if isinstance(scales, dict) else {}
    if scale and scale not in scales:
        known = ", ".join(scales) or "none"
        raise RecipeError(f"{where} has no scale {scale!r}; it has {known}.{did_you_mean(scale, list(scales))}")
    if len(scales) > _MAX_SCALES:
        raise RecipeError(f"{where} has {len(scales)} scales; at most {_MAX_SCALES} are read.")
    for name in scales:
        if name != scale:  # the one that is asked for is checked with its overrides
            _to_recipe(table, name, (), folder, f"{where}, scale {name!r}")
    return _to_recipe(table, scale, overrides, folder, where)


def _read_table(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        name = path.stem if path.stem in builtin_recipes() else "NAME"
        raise MissingError(f"no recipe at {str(path)!r}. 'lsmix init {name} > my.toml' writes one to start from.")
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{where} has {path.stat().st_size} bytes; at most {_MAX_BYTES} are read.")
    try:
        return _parse_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
        raise RecipeError(f"{where} is no valid TOML: {error}.") from error


def _recipe_table(recipe: Recipe) -> dict[str, Any]:
    """Return the table of a checked recipe; its pools have the fields of [mix] already, so they keep what differs from it."""
    table: dict[str, Any] = msgspec.to_builtins(recipe)
    shared = table["mix"]
    for pool in table["pools"].values():
        for name in [name for name, value in pool.items() if value == shared[name]]:
            del pool[name]
    return table


def _plain(value: Any) -> Any:
    """Return a value of a recipe that was made in Python as TOML would give it."""
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
    """Return the recipe at one scale, checked."""
    whole: dict[str, Any] = copy.deepcopy(dict(table))
    if scale:
        section = whole["scale"][scale]
        if not isinstance(section, dict):
            raise RecipeError(f"{where}: scale.{scale}: expected a section, got {section!r}.")
        _lay_over(whole, section)
    _anchor_paths(whole, folder)
    for override in overrides:
        _apply_override(whole, override)
    _check_values(whole, "", where)
    shared, pools = whole.get("mix"), whole.get("pools")
    recipe: Recipe = convert(whole, Recipe, where)
    if isinstance(shared, dict) and isinstance(pools, dict):
        whole["pools"] = {name: {**shared, **pool} for name, pool in pools.items()}
        recipe = convert(whole, Recipe, where)
    _check_references(recipe)
    return recipe


def _lay_over(table: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Put the fields of ``other`` over those of ``table``, section by section."""
    for name, value in other.items():
        below = table.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            _lay_over(below, value)
        else:
            table[name] = value


def _parse_toml(text: str) -> dict[str, Any]:
    if text.count(".") > _MAX_DOTS:
        raise ValueError(f"it has more than {_MAX_DOTS} dots, so it is no recipe")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):  # a key of many parts is no recursion to tomllib, but would be to all that follows
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return table
    raise ValueError("it is nested too deeply")


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, where a section has one; a flow may also be called by name, so only real paths are."""
    flow = table.get("flow")
    parts = [(table.get("data"), "path"), (flow, "path"), (flow, "start_from"), (table.get("mix"), "flow")]
    pools = table.get("pools")
    parts += [(pool, "flow") for pool in pools.values()] if isinstance(pools, dict) else []
    for part, key in parts:
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(value, str) and value and "\0" not in value:
            if "://" in value and (part is not table.get("data") or is_hub(value)):
                continue  # the URL of a flow or of a data set
            path = folder / expand_home(value)
            if (key == "path" and part is table.get("data")) or path.exists():
                cast("dict[str, Any]", part)[key] = str(path)


def _apply_override(table: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not separator or not all(keys):
        raise RecipeError(f"'--set {override}' is no 'section.key=value', such as 'pools.lsmix.alpha=0.2'.")
    value: Any
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text  # a bare word: strings may go without quotes on the command line
    changed: dict[str, Any] = {}
    part, beside = table, changed
    named = table.get(keys[0], {})
    if keys[0] in _NAMED and len(keys) > 2 and isinstance(named, dict):  # or a typo would add a pool or a run
        _check_known(f"'--set {override}'", keys[0].removesuffix("s"), keys[1], named)
    for key in keys[:-1]:
        part, beside = part.setdefault(key, {}), beside.setdefault(key, {})
        if not isinstance(part, dict):
            raise RecipeError(f"'--set {override}': {key!r} is a value, not a section.")
    beside[keys[-1]] = value
    _anchor_paths(changed, Path.cwd())  # apart from the table, whose other paths start elsewhere
    part[keys[-1]] = beside[keys[-1]]


def _check_format(table: Mapping[str, Any], where: str) -> None:
    version = table.get("format", _FORMAT)
    if isinstance(version, int) and version > _FORMAT:
        raise RecipeError(
            f"{where} has format {version}; this version of lsmix reads format {_FORMAT}. Use a newer lsmix."
        )


def _check_values(value: Any, dotted: str, where: str) -> None:
    """Refuse what a key, a manifest or a path cannot hold: JSON knows no infinity, integers have 64 bits, paths no NUL."""
    if isinstance(value, dict):
        for name, part in value.items():
            _check_values(part, f"{dotted}.{name}" if dotted else name, where)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_values(part, f"{dotted}[{index}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {dotted}: expected a finite number, got {value}.")
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise RecipeError(f"{where}: {dotted}: expected an integer of at most {_MAX_INTEGER}, got a larger one.")
    elif isinstance(value, str) and "\0" in value:
        raise RecipeError(f"{where}: {dotted}: expected text without NUL characters, got {value!r}.")


def _check_naturalness(recipe: Recipe, config: NaturalnessConfig) -> None:
    for name in config.methods:
        if name != HARD_CUT and name not in LATENT_METHODS and name not in PIXEL_METHODS:
            known = [HARD_CUT, *LATENT_METHODS.names(), *PIXEL_METHODS.names()]
            raise RecipeError(f"naturalness.methods: unknown mixing method {name!r}.{nearest(name, known)}")
    if len(set(config.methods)) < len(config.methods):
        raise RecipeError(f"naturalness.methods: each method counts once, got {list(config.methods)}.")
    if not recipe.data.heldout:
        raise RecipeError(
            "naturalness compares mixes with held-out originals, and there are none. Set 'data.heldout', such as to 500."
        )
    if recipe.own_flow.training.rows == "odd":
        raise RecipeError(
            "flow.training.rows: expected 'all' or 'even' with a section [naturalness], got 'odd', which are the evaluator's."
        )
    if not recipe.evaluator_config().training.iterations:
        raise RecipeError("naturalness.evaluator.training.iterations: expected int >= 1, got 0.")
    if config.classifier:
        _check_known("naturalness.classifier", "run", config.classifier, recipe.runs)


def _check_known(where: str, what: str, name: str, known: Mapping[str, object]) -> None:
    """Raise RecipeError unless the recipe has a section of this name."""
    if name not in known:
        raise RecipeError(
            f"{where}: there is no {what} {name!r}; the recipe has {', '.join(known) or 'none'}."
            f"{did_you_mean(name, list(known))}"
        )


def _check_references(recipe: Recipe) -> None:
    if recipe.naturalness:
        _check_naturalness(recipe, recipe.naturalness)
    if recipe.flow and not recipe.flow.training.iterations:
        raise RecipeError(
            "flow.training.iterations: expected int >= 1, got 0. 'flow.path' names a flow that is used as it is."
        )
    if recipe.own_flow.path and recipe.own_flow.start_from:
        raise RecipeError("flow.start_from: the flow of 'flow.path' is used as it is. Leave one of them out.")
    if recipe.classifier.seed:
        raise RecipeError("classifier.seed: each run has its own seeds; say them as 'runs.NAME.seeds'.")
    for name, pool in recipe.pools.items():
        try:
            check_pool(pool)
        except RecipeError as error:
            raise RecipeError(f"pools.{name}.{error}") from error
        if pool.flow and not in_latent_space(pool):
            raise RecipeError(f"pools.{name}.flow: {pool.method!r} mixes pixels and needs none. Remove it.")
    for name, run in recipe.runs.items():
        _check_mixing(recipe, name, run)
        if len(set(run.seeds)) < len(run.seeds):
            raise RecipeError(f"runs.{name}.seeds: each seed counts once, got {list(run.seeds)}.")
        if "seed" in run.classifier:
            raise RecipeError(f"runs.{name}.classifier.seed: say it as 'runs.{name}.seeds'.")
        recipe.run_config(name, run.seeds[0])


def _check_mixing(recipe: Recipe, name: str, run: RunSection) -> None:
    if run.pool and run.mix:
        raise RecipeError(f"runs.{name}.mix: say the pool in 'mix' as well, and leave 'pool' out.")
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
                    f"{where}.method: {part.method!r} mixes in latent space, which is done beforehand: make a pool, and name it."
                )
            try:
                PIXEL_METHODS.check(part.method)
            except RecipeError as error:
                raise RecipeError(f"{where}.method: {error}") from error
        if run.mode == "chain" and part.pool and place:
            raise RecipeError(f"{where}.pool: in a chain a pool comes first, since its images are mixed already.")
