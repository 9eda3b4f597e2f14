"""Options that commands share, and their shell completion. Only this module and cli.py import click."""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from lsmix.data.errors import LsmixError
from lsmix.pipeline.stages.registry import STAGES

if TYPE_CHECKING:
    import msgspec

__all__ = [
    "ArtifactName",
    "ExportFormatName",
    "artifact_workspace",
    "as_json",
    "completion_script",
    "device",
    "download",
    "log_names",
    "options",
    "overrides",
    "place",
    "quiet",
    "recipe_names",
    "recipe_options",
    "run_options",
    "work_options",
    "workspace",
]

_Decorator = Callable[[Callable[..., None]], Callable[..., None]]
_Completer = Callable[[click.Context, click.Parameter, str], list[str]]
_WORKSPACE = "lsmix.workspace"  # key of the workspace in click's context.meta

# A path or URL. It stays a string, because pathlib would drop one of the slashes in "://".
place = click.Path()


def _completer(values: Callable[[click.Context], Iterator[str]]) -> _Completer:
    """Return a click completion function for some values. If reading them fails, it offers none instead of an error."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        try:
            return [value for value in values(ctx) if value.startswith(incomplete)]
        except (LsmixError, OSError, ValueError):
            return []

    return complete


class ArtifactName(click.Path):
    """An artifact, given as a path, a URL, or a name or cache key in the workspace; converted to its path or URL.

    Args:
        stages: Stages whose artifacts are accepted; all if empty.
        words: Values that are passed through unchanged.
    """

    def __init__(self, *stages: str, words: Sequence[str] = ()) -> None:
        super().__init__()
        self._stages: Sequence[str] = stages or STAGES
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the artifact's path or URL; return an unknown name unchanged."""
        from lsmix.pipeline.workspace.workspace import artifact_location

        if ctx is None or value in self._words:
            return value
        return artifact_location(value, ctx.meta[_WORKSPACE], self._stages)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the workspace's artifacts whose names contain the word; otherwise files."""
        root = Path(ctx.meta.get(_WORKSPACE, "runs"))  # a plain listing: opening a URL would need slow imports
        names = sorted(
            f"{stage}/{folder.name}"
            for stage in self._stages
            for folder in root.glob(f"{stage}/*-*")
            if incomplete in f"{stage}/{folder.name}"
        )
        return [CompletionItem(name) for name in names] or super().shell_complete(ctx, param, incomplete)


class ExportFormatName(click.ParamType[str]):
    """The name of an export format, resolved on use because other packages can register formats."""

    name = "format"

    def get_metavar(self, *_: object, **__: object) -> str:
        """Return the format names for the help text."""
        return f"[{'|'.join(self._names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if it is a known format; otherwise fail."""
        from lsmix.data.exports.format import EXPORT_FORMATS

        try:
            EXPORT_FORMATS.check(value)
        except LsmixError as error:
            self.fail(str(error), param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the format names."""
        return [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]

    def _names(self) -> Sequence[str]:
        from lsmix.data.exports.format import EXPORT_FORMATS

        return EXPORT_FORMATS.names()


def completion_script(shell: str, cli: click.Command) -> str:
    """Return the completion script for "bash", "zsh" or "fish"."""
    kind = get_completion_class(shell)
    return kind(cli, {}, "lsmix", "_LSMIX_COMPLETE").source() if kind else ""


def _builtin_recipes(_: click.Context) -> Iterator[str]:
    from lsmix.pipeline.config.recipes import builtin_recipes

    yield from builtin_recipes()


def _logs(ctx: click.Context) -> Iterator[str]:
    yield "last"
    yield from (path.stem for path in sorted(Path(ctx.params["workspace"], ".logs").glob("*.jsonl"), reverse=True))


def _recipe_text(ctx: click.Context) -> dict[str, Any]:
    path = Path(ctx.params.get("recipe") or "lsmix.toml")
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _scales(ctx: click.Context) -> Iterator[str]:
    yield from _recipe_text(ctx).get("scale", {})


def _set_keys(ctx: click.Context) -> Iterator[str]:
    from lsmix.pipeline.config.recipe import Recipe

    yield from (f"{key}=" for key in _keys(Recipe, _recipe_text(ctx)))


def _keys(kind: "type[msgspec.Struct]", named: Any) -> Iterator[str]:
    """Yield the keys of a section and its subsections; ``named`` is that section of the user's recipe."""
    from msgspec import inspect

    for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]  # ``kind`` is a struct
        types = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
        section = next((one for one in types if isinstance(one, inspect.StructType | inspect.DictType)), None)
        own = named.get(field.encode_name, {}) if isinstance(named, dict) else {}
        if isinstance(section, inspect.StructType):
            yield from (f"{field.encode_name}.{key}" for key in _keys(section.cls, own))
        elif section is None:
            yield field.encode_name
        elif isinstance(section.value_type, inspect.StructType):
            for name in own:
                yield from (f"{field.encode_name}.{name}.{key}" for key in _keys(section.value_type.cls, own[name]))


recipe_names = _completer(_builtin_recipes)
log_names = _completer(_logs)


def options(*decorators: _Decorator) -> _Decorator:
    """Return a decorator that adds these arguments and options to a command, in this order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(decorators), command)


def _workspace_option(**more: Any) -> _Decorator:
    def keep(ctx: click.Context, _: click.Parameter, value: str) -> str:
        ctx.meta[_WORKSPACE] = value
        return value

    return click.option(
        "--workspace",
        default="runs",
        show_default=True,
        envvar="LSMIX_WORKSPACE",
        show_envvar=True,
        is_eager=True,  # parsed before the artifact names that it resolves
        callback=keep,
        help="Folder or URL of the workspace.",
        **more,
    )


workspace = _workspace_option()
artifact_workspace = _workspace_option(expose_value=False)  # for commands that only look up artifacts
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
quiet = click.option("-q", "--quiet", is_flag=True, help="Print only results and warnings, no progress.")
device = click.option(
    "--device",
    default="auto",
    show_default=True,
    envvar="LSMIX_DEVICE",
    show_envvar=True,
    shell_complete=_completer(lambda _: iter(("auto", "cpu", "cuda", "cuda:0"))),
    help="Device: auto, cpu, cuda or cuda:N.",
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=_completer(_set_keys),
    help="Override a recipe field.",
)
recipe_options = options(
    click.argument("recipe", type=click.Path(path_type=Path), default="lsmix.toml"),
    workspace,
    click.option(
        "--scale",
        default="",
        metavar="NAME",
        shell_complete=_completer(_scales),
        help="Apply the section [scale.NAME] of the recipe.",
    ),
    overrides,
    as_json,
)
work_options = options(
    device,
    click.option("--workers", type=click.IntRange(min=0), default=0, help="Local Dask workers; 0: this process."),
    click.option("--scheduler", default="", metavar="ADDRESS", help="Use the running Dask cluster at this address."),
    quiet,
    click.option("-v", "--verbose", is_flag=True, help="Also print each artifact's key, inputs and device."),
)
run_options = options(click.option("--dry-run", is_flag=True, help="Only show what would run, and why."), work_options)
download = click.option("--download", is_flag=True, help="Download data.download first, if it is missing.")
