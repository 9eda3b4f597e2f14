"""MkDocs hook: reference tables and a page for each command, generated from the code.

Marks in a page are replaced by tables: ``<!-- fields: SECTION -->`` by the fields of a recipe section, ``<!-- commands
-->`` by the commands, ``<!-- pool columns -->`` by the columns of a pool.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import click
import msgspec
from mkdocs.structure.files import File, Files
from msgspec import inspect as types

from lsmix.cli import GROUPS, cli
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import POOL_COLUMNS
from lsmix.data.pool_spec import EncodeConfig
from lsmix.data.readers.registry import DATA_FORMATS
from lsmix.glow.config import FlowTraining
from lsmix.pipeline.config.recipe import FlowSection, Recipe, RunSection
from lsmix.pipeline.config.schema import DataConfig, MixSource, NaturalnessConfig, PoolRecipe, ReportConfig, RunConfig
from lsmix.pipeline.stages.ingest import INGEST
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.stages.train_flow import TRAIN_GLOW

__all__ = [
    "SECTIONS",
    "command_page",
    "commands",
    "expanded",
    "fields",
    "on_config",
    "on_files",
    "on_page_markdown",
    "pool_columns",
]

SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "recipe": Recipe,
    "data": DataConfig,
    "flow": FlowSection,
    "flow.training": FlowTraining,
    "latents": EncodeConfig,
    "pools.NAME": PoolRecipe,
    "classifier": RunConfig,
    "runs.NAME": RunSection,
    "runs.NAME.mix": MixSource,
    "naturalness": NaturalnessConfig,
    "report": ReportConfig,
}
_NOT_IN_KEY: Final = {
    "recipe": {"name"},
    "data": INGEST.not_in_key,
    "flow": TRAIN_GLOW.not_in_key,
    "pools.NAME": MIX.not_in_key,
}
_NAMES: Final = {
    ("data", "format"): ("auto", *DATA_FORMATS.builtin()),
    ("pools.NAME", "method"): (*LATENT_METHODS.builtin(), *PIXEL_METHODS.builtin()),
    ("runs.NAME.mix", "method"): ("none", *PIXEL_METHODS.builtin()),
}
_MARK: Final = re.compile(r"^<!-- (fields|commands|pool columns)(?:: ([\w.]+))? -->$", re.MULTILINE)


def fields(section: str) -> str:
    """Return the table of a section's fields."""
    kind = SECTIONS[section]
    comments = _comments(kind)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in types.type_info(kind).fields:  # type: ignore[attr-defined]  # a struct's
        values = ", ".join(f"`{name}`" for name in _NAMES.get((section, field.name), ())) or _values(field.type)
        if isinstance(field.type, types.LiteralType) and all(
            str(value) in comments[field.name] for value in field.type.values
        ):
            values = ""
        hint = "not in the cache key" if field.name in _NOT_IN_KEY.get(section, ()) else ""
        meaning = "; ".join(filter(None, [comments[field.name], values, hint]))
        cells = (f"`{field.encode_name}`", _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _comments(kind: type) -> dict[str, str]:
    """Return the comment of each field: at the end of its line, or otherwise on the lines above it."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, msgspec.Struct) or owner is msgspec.Struct:
            continue
        source = inspect.getsource(owner)
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]  # a class's
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                last = lines[(node.end_lineno or node.lineno) - 1]
                behind = last.encode()[node.end_col_offset or 0 :].decode().strip()
                above = list(_lines_above(lines, node.lineno - 1))
                found[node.target.id] = " ".join([behind] if behind else above).replace("# ", "").rstrip(".")
    return found


def _lines_above(lines: list[str], end: int) -> Iterator[str]:
    start = end
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    yield from (line.strip() for line in lines[start:end])


def _default(field: Any) -> str:
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None or isinstance(value, msgspec.Struct):
        return "section"
    return f"`{msgspec.json.encode(value).decode()}`"


def _values(kind: Any) -> str:
    match kind:
        case types.LiteralType():
            return ", ".join(f"`{value}`" for value in kind.values)
        case types.UnionType():
            return next(filter(None, map(_values, kind.types)), "")
        case types.VarTupleType():
            return _values(kind.item_type)
        case types.StrType() if kind.max_length and kind.max_length < 4096 and not kind.pattern:
            return f"up to {kind.max_length:,} characters"
        case types.IntType() | types.FloatType():
            least = f"above {kind.gt:g}" if kind.gt is not None else f"{kind.ge:g}" if kind.ge is not None else ""
            most = kind.le if kind.le is not None else kind.lt
            if most is None:
                return least
            text = "2⁵³ − 1" if most == 2**53 - 1 else f"{most:,}" if most <= 1e9 else "10¹²"
            text = f"{'' if kind.le is not None else 'below '}{text.removesuffix('.0')}"
            if kind.ge == most:
                return least
            return f"{least}, at most {text}" if kind.gt is not None else f"{least} to {text}"
    return ""


def commands() -> str:
    """Return a table of commands for each group of the overview, with links to the command pages."""
    parts = []
    for title, names in GROUPS.items():
        rows = [
            f"| [`lsmix {name}`](commands/{name}.md) | {cli.commands[name].get_short_help_str(99)} |" for name in names
        ]
        parts.append("\n".join([f"| {title} | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def command_page(name: str) -> str:
    """Return the page of a command, generated from its click definition."""
    command = cli.commands[name]
    arguments = [_argument(one) for one in command.params if isinstance(one, click.Argument)]
    rows = [_option(one) for one in command.params if isinstance(one, click.Option)]
    usage = " ".join([name, *arguments, *(["[OPTIONS]"] if rows else [])])
    example = str(command.epilog).removeprefix("Example: ")
    parts = [f"# lsmix {name}", str(command.help), f"```text\nlsmix {usage}\n```"]
    parts += ["\n".join(["| option | meaning |", "|---|---|", *rows])] if rows else []
    return "\n\n".join([*parts, f"Example:\n\n```sh\n{example}\n```\n"])


def _argument(argument: click.Argument) -> str:
    return argument.make_metavar(click.Context(click.Command("lsmix")))


def _option(option: click.Option) -> str:
    context = click.Context(click.Command("lsmix"))
    flags = ", ".join(f"`{flag}`" for flag in option.opts)
    value = "" if option.is_flag else f" {option.make_metavar(context)}".replace("INTEGER RANGE", "N")
    default = f" Default: `{option.default}`" if option.show_default else ""
    default += f", or the environment's `{option.envvar}`." if option.envvar else "." if default else ""
    return f"| {flags}{value.replace('|', ' or ')} | {option.help}{default} |"


def pool_columns() -> str:
    """Return the table of all columns that a pool may have."""
    shapes = {"number": "(M,)", "image": "(M, H, W, C)", "more": "(M, sources − 2)"}
    values = {"pixel": "0 to 255", "source": "rows of the train split", "label": "0 to classes − 1", "share": "0 to 1"}
    lines = ["| column | type | values | meaning |", "|---|---|---|---|"]
    for column in POOL_COLUMNS.values():
        allowed = values.get(column.kind) or ", ".join(f"{number} {word}" for number, word in enumerate(column.words))
        lines.append(f"| `{column.name}` | {column.dtype} {shapes[column.row]} | {allowed} | {column.description} |")
    return "\n".join(lines)


_MAKERS: Final[dict[str, Callable[..., str]]] = {"fields": fields, "commands": commands, "pool columns": pool_columns}


def expanded(markdown: str) -> str:
    """Return the text of a page with its marks replaced by reference tables."""
    return _MARK.sub(lambda found: _MAKERS[found[1]](*filter(None, [found[2]])), markdown)


def on_config(config: Any) -> Any:
    """Add the command pages to the navigation, after cli.md."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    pages = next(entry["Commands"] for entry in reference if isinstance(entry, dict) and "Commands" in entry)
    pages += [f"commands/{name}.md" for names in GROUPS.values() for name in names]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the command pages."""
    for name in cli.commands:
        files.append(File.generated(config, f"commands/{name}.md", content=command_page(name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks in a page by tables."""
    return expanded(markdown)
