"""The recipe: one TOML file that names the data set, the flow, the pools, the classifier runs and the report.

Checked whole when it is read, so that nothing starts which would fail later on a typing error; unknown keys are refused
with the nearest known one.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from lsmix.data.errors import MissingError, RecipeError
from lsmix.pipeline.encode import EncodeConfig
from lsmix.pipeline.ingest import DataConfig
from lsmix.pipeline.mix import PoolConfig
from lsmix.pipeline.report import ReportConfig
from lsmix.pipeline.train import RunConfig
from lsmix.pipeline.train_glow import FlowRecipe

__all__ = ["FlowSection", "Recipe", "RunSection", "read_recipe"]

_FORMAT = 1
_MAX_BYTES = 1 << 20  # far above any real recipe; a 100 MB file is not parsed
_MAX_DOTS = 4096  # tomllib takes memory by the square of a key's parts: 200 kB of "a.a.a…" were seen to fill 60 GB
_MAX_INTEGER = 2**63 - 1  # the largest that TOML promises, and that keys and manifests can hold

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]  # \Z: $ would let a newline through


class FlowSection(FlowRecipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The flow to train, or, with ``path``, one that is finished already."""

    path: str = ""  # folder of a finished flow, or its name or key in the workspace, to use instead of training one


class RunSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One arm of a comparison: a classifier trained once for each seed."""

    pool: str = ""  # name of the pool to train on; empty trains on the data set itself
    seeds: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)] = (0,)  # one training each
    classifier: dict[str, Any] = {}  # fields of [classifier] that differ in this run


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that ``lsmix run`` brings up to date."""

    format: Annotated[int, Meta(ge=1, le=_FORMAT)] = _FORMAT  # of the recipe file
    name: Name  # of the artifacts
    data: DataConfig
    flow: FlowSection = msgspec.field(default_factory=FlowSection)
    latents: EncodeConfig = msgspec.field(default_factory=EncodeConfig)
    pools: dict[Name, PoolConfig] = {}
    classifier: RunConfig = msgspec.field(default_factory=RunConfig)  # what all runs share
    runs: dict[Name, RunSection] = {}
    report: ReportConfig = msgspec.field(default_factory=ReportConfig)

    def run_config(self, run: str, seed: int) -> RunConfig:
        """Return the configuration of one training: the shared fields, this run's own, and a seed.

        Raises:
            RecipeError: a field of the run is wrong.
        """
        shared: dict[str, Any] = msgspec.to_builtins(self.classifier)
        where = f"runs.{run}.classifier"
        config: RunConfig = _convert({**shared, **self.runs[run].classifier, "seed": seed}, RunConfig, where)
        return config


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the TOML file; relative paths in it start at its own folder.
        overrides: "section.key=value" each, the value in TOML; relative paths in them start at the current folder.

    Raises:
        MissingError: there is no such file.
        RecipeError: the file or an override is no valid recipe; the message names the place.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no recipe at {str(path)!r}. 'lsmix init NAME > my.toml' writes one to start from.")
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"recipe {str(path)!r} has {path.stat().st_size} bytes; at most {_MAX_BYTES} are read.")
    where = f"recipe {str(path)!r}"
    try:
        table = _parse_toml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
        raise RecipeError(f"{where} is no valid TOML: {error}.") from error
    _anchor_paths(table, path.resolve().parent)
    for override in overrides:
        _apply_override(table, override)
    _check_format(table, where)
    _check_values(table, "", where)
    recipe: Recipe = _convert(table, Recipe, where)
    _check_references(recipe)
    return recipe


def _parse_toml(text: str) -> dict[str, Any]:
    if text.count(".") > _MAX_DOTS:
        raise ValueError(f"it has more than {_MAX_DOTS} dots, so it is no recipe")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, where a section has one; a flow may also be called by name, so only real paths are."""
    parts = [(table.get("data"), "path"), (table.get("flow"), "path")]
    pools = table.get("pools")
    parts += [(pool, "flow") for pool in pools.values()] if isinstance(pools, dict) else []
    for part, key in parts:
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(value, str) and value and "\0" not in value:
            path = folder / Path(value).expanduser()
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


def _convert(table: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{where}: {_explain(str(error), table, kind)}") from error


def _explain(message: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Turn a validation message into one that names the dotted key, and the nearest known one for an unknown."""
    text, _, path = message.partition(" - at `$")
    if key_of := re.search(r" - at `?key`? in `\$\.?([^`]*)`", message):
        return f"{key_of.group(1)}: a name in it has letters, digits, '.', '_' and '-' only, 64 at most."
    dotted = path.rstrip("`").lstrip(".")
    known = _known_fields(kind, dotted)
    dotted = _with_name(dotted, table, kind)
    if unknown := re.search(r"unknown field `([^`]*)`", text):
        key = unknown.group(1)
        full = f"{dotted}.{key}" if dotted else key
        return f"unknown key {full!r}.{_nearest(key, known)} Known keys here: {', '.join(known)}."
    if missing := re.search(r"missing required field `([^`]*)`", text):
        full = f"{dotted}.{missing.group(1)}" if dotted else missing.group(1)
        return f"the key {full!r} is missing."
    value = _value_at(table, dotted)
    if isinstance(value, Mapping) and ", got " not in text:  # a section's own check, which has told all
        return f"{dotted}: {text}" if dotted else text
    got = "" if value is None else f", got {value!r}"
    text = text.replace("`", "").replace("object", "a section")
    return f"{dotted or 'the recipe'}: {text[0].lower()}{text[1:]}{'' if ', got ' in text else got}."


def _with_name(dotted: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Put the name of a pool or a run where msgspec says only ``[...]``: the first that cannot be converted."""
    section, found, rest = dotted.partition("[...]")
    if not found:
        return dotted
    model = next(field.type for field in msgspec.structs.fields(kind) if field.name == section).__args__[-1]
    for name, part in table[section].items():
        try:
            msgspec.convert(part, model)
        except msgspec.ValidationError:
            return f"{section}.{name}{rest}"
    return dotted


def _known_fields(kind: type[Any], dotted: str) -> list[str]:
    """Return the fields of the model that a dotted path of a validation message points to."""
    current: Any = kind
    for part in [part for part in re.split(r"\.|(\[[^\]]*\])", dotted) if part]:
        if part.startswith("["):
            current = getattr(current, "__args__", (None, current))[-1]
        else:
            fields = {field.name: field.type for field in msgspec.structs.fields(current)}
            current = fields.get(part, current)
        while hasattr(current, "__metadata__"):
            current = current.__origin__
    return list(current.__struct_fields__) if hasattr(current, "__struct_fields__") else []


def _value_at(table: Mapping[str, Any], dotted: str) -> Any:
    value: Any = table
    for part in re.findall(r"[^.\[\]]+", dotted):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check_references(recipe: Recipe) -> None:
    if not recipe.flow.training.iterations:
        raise RecipeError("flow.training.iterations: expected int >= 1, got 0.")
    if recipe.classifier.seed:
        raise RecipeError("classifier.seed: each run has its own seeds; say them as 'runs.NAME.seeds'.")
    for name, run in recipe.runs.items():
        if run.pool and run.pool not in recipe.pools:
            known = ", ".join(recipe.pools) or "none"
            raise RecipeError(
                f"runs.{name}.pool: there is no pool {run.pool!r}; the recipe has {known}.{_nearest(run.pool, list(recipe.pools))}"
            )
        if len(set(run.seeds)) < len(run.seeds):
            raise RecipeError(f"runs.{name}.seeds: each seed counts once, got {list(run.seeds)}.")
        if "seed" in run.classifier:
            raise RecipeError(f"runs.{name}.classifier.seed: say it as 'runs.{name}.seeds'.")
        recipe.run_config(name, run.seeds[0])
