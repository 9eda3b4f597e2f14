"""The command line: each command parses, makes one library call, prints.

Nothing heavy is imported before a command's body needs it, so that ``lsmix --help`` answers at once.
Results go to stdout, progress to stderr; LsmixError becomes an exit code here and nowhere else.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lsmix.data.errors import LsmixError, StaleError, escape_json, escape_terminal, system_error
from lsmix.pipeline.cli_text import (
    artifact_lines,
    fact_lines,
    garbage_lines,
    part_lines,
    rebuild_lines,
    run_lines,
    show_lines,
    status_lines,
    transfer_lines,
    verify_lines,
)
from lsmix.pipeline.stages.registry import STAGE_COMMANDS, StageCommand
from lsmix.pipeline.terminal import TerminalProgress, discard_output, output_is_gone, prepare_streams

if TYPE_CHECKING:
    from lsmix.pipeline.api import RunResult
    from lsmix.pipeline.engine.status import NodeStatus

__all__ = ["main"]

_INTERRUPTED = 130
_OUTPUT_GONE = 141  # as shells say of programs that SIGPIPE ends
_EPILOG = """\b
Exit codes: 0 done, 1 error, 2 usage, 3 stale, 4 locked by another run,
5 corrupt, 6 partly done, 130 interrupted (run again to go on),
141 output closed.
"""

# Not a docstring, since click wants real backspaces in front of what it must not wrap.
_HELP = """Make, check and use mixed-image data sets (LS-Mix).

\b
Begin with:  lsmix demo
or:          lsmix init --from photos > lsmix.toml && lsmix run
Without RECIPE a command reads lsmix.toml in this folder.
"""


_GROUPS: Mapping[str, Sequence[str]] = {
    "Make": ("demo", "init", "run", *STAGE_COMMANDS, "finalize", "figure"),
    "Look": ("status", "ls", "show"),
    "Share": ("verify", "rebuild", "export", "card", "push", "pull"),
    "Keep tidy": ("gc",),
}


class _Overview(click.Group):
    """A group whose help lists the commands under headings, each in a line of 80 characters."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(65)) for name in names])


@click.group(cls=_Overview, help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="lsmix")
def cli() -> None:
    """Hold the commands."""


_Decorator = Callable[[Callable[..., None]], Callable[..., None]]
# Of an artifact: a path, or a URL, of which a Path would lose a slash. It stays text until the library resolves it.
_place = click.Path()


class _ExportFormat(click.ParamType[str]):
    """The name of an export format, looked up when it is used, since other packages may add some."""

    name = "format"

    def get_metavar(self, *_: object, **__: object) -> str:
        from lsmix.data.exports.format import EXPORT_FORMATS

        return f"[{'|'.join(EXPORT_FORMATS.names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from lsmix.data.exports.format import EXPORT_FORMATS

        try:
            EXPORT_FORMATS.check(value)
        except LsmixError as error:
            self.fail(str(error), param, ctx)
        return value


def _options(*options: _Decorator) -> _Decorator:
    """Return a decorator that gives a command some arguments and options, in this order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, only results and warnings.")
_device = click.option(
    "--device",
    default="auto",
    show_default=True,
    envvar="LSMIX_DEVICE",
    show_envvar=True,
    help="auto, cpu, cuda or cuda:N.",
)
_workspace = click.option(
    "--workspace",
    default="runs",
    show_default=True,
    envvar="LSMIX_WORKSPACE",
    show_envvar=True,
    help="Folder or URL of the artifacts.",
)
_overrides = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field.")
_recipe_options = _options(
    click.argument("recipe", type=click.Path(path_type=Path), default="lsmix.toml"),
    _workspace,
    click.option("--scale", default="", metavar="NAME", help="Take the recipe's sizes of this name, such as small."),
    _overrides,
    _json,
)
_work_options = _options(
    _device,
    click.option("--workers", type=click.IntRange(min=0), default=0, help="Make shards in N Dask workers here."),
    click.option("--scheduler", default="", metavar="ADDRESS", help="Make shards on a running Dask cluster."),
    _quiet,
    click.option("-v", "--verbose", is_flag=True, help="Also tell what each artifact is made from."),
)
_run_options = _options(
    click.option("--dry-run", is_flag=True, help="Only show what would run, and why."), _work_options
)
_download_option = click.option(
    "--download", is_flag=True, help="Fetch what data.download names first, if it is not there."
)


@cli.command(epilog="Example: lsmix init --from photos > my.toml")
@click.argument("name", required=False)
@click.option("--from", "source", metavar="PATH", default="", help="Write one for these images: a folder or file.")
def init(name: str | None, source: str) -> None:
    """Print a commented recipe to start from. Without NAME, list them."""
    if source:
        from lsmix.pipeline.starter import starter_recipe

        text = starter_recipe(source)
    else:
        from lsmix.pipeline.config.recipes import recipe_list, recipe_text

        text = recipe_text(name) if name else recipe_list()
    click.echo(text, nl=False)


def _run(stage: str, recipe: Path, dry_run: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    force = stage if options.pop("force", False) else ""
    index, size = options.pop("array_index", None), options.pop("array_size", None)
    if (index is None) != (size is None):
        raise click.UsageError("--array-index and --array-size go together.")
    if dry_run:
        names = ("workspace", "overrides", "scale")
        nodes = _statuses(recipe, stage=stage, force=force, **{name: options[name] for name in names})
        _print("status", nodes, status_lines(nodes), as_json)
        return
    from lsmix.pipeline import api

    with TerminalProgress(quiet=quiet, verbose=verbose) as bars:
        if index is None:
            result = api.run(recipe, stage=stage, force=force, progress=bars, **options)
        elif force or options.pop("download"):
            raise click.UsageError("An array task makes its missing shards; it takes neither --force nor --download.")
        else:
            parts = api.run_array_task(recipe, stage, index, size, progress=bars, **options)
    if index is None:
        _print_run(result, as_json)
    else:
        _print("array-task", parts, part_lines(parts, str(recipe)), as_json)


@cli.command(epilog="Example: lsmix run my.toml --set data.path=cifar-10-batches-py")
@_recipe_options
@_run_options
@_download_option
def run(recipe: Path, **options: Any) -> None:
    """Bring everything in RECIPE up to date, from ingest to report."""
    _run("", recipe, **options)


def _stage_command(stage: str, about: StageCommand) -> None:
    @cli.command(name=stage, help=about.summary, epilog=f"Example: lsmix {stage} my.toml{about.example}")
    @_recipe_options
    @_run_options
    @_download_option
    @click.option("--force", is_flag=True, help="Make this stage again although it is up to date.")
    def command(recipe: Path, **options: Any) -> None:
        _run(stage, recipe, **options)

    if about.divisible:
        text = "Make task I of N, from 0; then 'lsmix finalize'."
        _options(
            click.option("--array-index", type=click.IntRange(min=0), metavar="I", help=text),
            click.option("--array-size", type=click.IntRange(min=1), metavar="N", help="Tasks in the job array."),
        )(command)


for _stage, _about in STAGE_COMMANDS.items():
    _stage_command(_stage, _about)


@cli.command(epilog="Example: lsmix finalize my.toml")
@_recipe_options
@_device
@_quiet
def finalize(recipe: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Complete what the tasks of a job array have made. Computes no shard."""
    from lsmix.pipeline.api import finalize as finalize_recipe

    with TerminalProgress(quiet=quiet) as bars:
        result = finalize_recipe(recipe, progress=bars, **options)
    _print_run(result, as_json)


@cli.command(epilog="Example: lsmix status my.toml --check")
@_recipe_options
@click.option("--check", is_flag=True, help="Exit with code 3 unless everything is up to date.")
def status(recipe: Path, as_json: bool, check: bool, **options: Any) -> None:
    """Show what is cached, what would run, and why. Reads only; safe while a run is under way."""
    nodes = _statuses(recipe, **options)
    _print("status", nodes, status_lines(nodes), as_json)
    stale = [node for node in nodes if node.state != "cached"]
    if check and stale:
        raise StaleError(f"{len(stale)} of {len(nodes)} artifacts are not up to date. 'lsmix run {recipe}' makes them.")


@cli.command(epilog="Example: lsmix demo")
@_workspace
@_run_options
def demo(workspace: str, **options: Any) -> None:
    """Run the whole pipeline on handwritten digits, in a few minutes. Downloads nothing."""
    from lsmix.pipeline.config.recipes import recipe_path

    _run("", recipe_path("demo"), workspace=workspace, overrides=(), scale="", as_json=False, **options)


@cli.command(epilog="Example: lsmix ls")
@_options(_workspace, _json)
def ls(workspace: str, as_json: bool) -> None:
    """List the artifacts of the workspace, with size, age and inputs. Inputs are named by the first digits of their cache keys."""
    from lsmix.pipeline.api import list_artifacts

    found = list_artifacts(workspace)
    _print("ls", found, artifact_lines(found), as_json)


@cli.command(epilog="Example: lsmix show runs/mix/lsmix-0123456789ab --html pool.html")
@click.argument("artifact", type=_place)
@click.option("--image", type=_place, help="Write a grid of images to this PNG.")
@click.option("--html", type=_place, help="Write the page of a pool to this HTML file.")
@click.option("--data", type=_place, help="With --html: the ingest artifact with the sources.")
@click.option("--rows", type=click.IntRange(1, 1000), help="Rows of the image (8), or samples on the page (120).")
@_json
def show(artifact: str, as_json: bool, **options: Any) -> None:
    """Show the facts of ARTIFACT and draw its images. Of a pool: x1 | mixes at growing λ | x2, or an HTML page."""
    from lsmix.pipeline.views.show import artifact_facts, draw_artifact

    facts = artifact_facts(artifact)
    drawn = draw_artifact(artifact, **options)
    files = {one.kind: str(one.target) if one.what else None for one in drawn}
    _print("show", {**facts, **files}, show_lines(facts, drawn), as_json)


@cli.command(epilog="Example: lsmix figure fig4 my.toml --out fig4.png")
@click.argument("name")
@_recipe_options
@_run_options
@_download_option
@click.option("--out", type=_place, help="Write the PNG here, not to NAME.png.")
@click.option("--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Pairs of images to show.")
def figure(name: str, recipe: Path, out: str | None, rows: int, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Draw a figure of the paper: fig1, fig3, fig4, fig7, appendix-e. Makes missing flows and latents first."""
    from lsmix.pipeline.views.figures import check_figure

    check_figure(name)
    if dry_run:
        _run("encode", recipe, dry_run, as_json, **options)
        return
    from lsmix.pipeline.api import figure as draw

    target = out or f"{name}.png"
    with TerminalProgress(quiet=options.pop("quiet"), verbose=options.pop("verbose")) as bars:
        drawn = draw(name, recipe, target, pairs=rows, progress=bars, **options)
    facts = {"name": name, "path": target, "caption": drawn.caption}
    lines = [
        f"figure      {target}",
        f"shows       {drawn.caption}",
        f"failed      {drawn.decode_failed:,} of {drawn.decoded:,} images failed to decode",
    ]
    _print("figure", {**facts, "decoded": drawn.decoded, "decode_failed": drawn.decode_failed}, lines, as_json)


@cli.command(epilog="Example: lsmix verify runs/mix/lsmix-0123456789ab --deep")
@click.argument("artifact", type=_place)
@click.option("--deep", is_flag=True, help="Make a sample of a pool's rows again, and compare every pixel.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True, help="Rows to make again.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the choice of these rows.")
@click.option("--data", type=_place, help="Base set: published files, digits, or dataset.h5.")
@click.option("--flow", type=_place, help="Folder or URL of the flow.")
@_device
@_json
def verify(artifact: str, as_json: bool, **options: Any) -> None:
    """Check every byte of ARTIFACT, and every row of a pool. Exit code 5 on the first damage."""
    from lsmix.pipeline.api import verify as verify_artifact

    with TerminalProgress(quiet=not options["deep"] and "://" not in artifact) as bars:
        facts = verify_artifact(artifact, progress=bars, **options)
    _print("verify", facts, verify_lines(facts), as_json)


@cli.command(epilog="Example: lsmix rebuild plan.json --data cifar-10-python.tar.gz --flow glow --out lsmix-pool")
@click.argument("plan", type=_place)
@click.option("--data", type=_place, required=True, help="Published files, digits, or dataset.h5.")
@click.option("--flow", type=_place, help="Folder or URL of the flow; not for pools mixed in pixels.")
@click.option("--out", type=_place, help="Folder of the new pool; without it, in the workspace.")
@_workspace
@click.option("--expect", default="", metavar="DIGEST", help="Content digest of the original, 12 digits or more.")
@click.option("--compare", type=_place, help="The original pool, to compare pixel by pixel.")
@_work_options
@_json
def rebuild(plan: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Make a pool again from PLAN, its base set and its flow. PLAN is its plan.json. Exit code 5 if the result differs."""
    from lsmix.pipeline.verify.rebuild import rebuild as rebuild_pool

    with TerminalProgress(quiet=quiet, verbose=verbose) as bars:
        result = rebuild_pool(plan, progress=bars, **options)
    _print("rebuild", result.to_dict(), rebuild_lines(result), as_json)


@cli.command(epilog="Example: lsmix export runs/mix/lsmix-0123456789ab exported --format parquet")
@click.argument("pool", type=_place)
@click.argument("dest", type=_place)
@click.option("--format", required=True, type=_ExportFormat(), help="What to write.")
@click.option("--shard-images", type=click.IntRange(min=0), default=0, metavar="N", help="Images a file; 0: about 500 MB.")  # fmt: skip
@click.option("--image", type=click.Choice(["png", "webp"]), default="png", show_default=True, help="How to pack images.")  # fmt: skip
@_json
@_quiet
def export(pool: str, dest: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write POOL to the new folder DEST in another format. Images are stored without loss."""
    from lsmix.pipeline.api import export_pool

    with TerminalProgress(quiet=quiet) as bars:
        facts = export_pool(pool, dest, progress=bars, **options)
    _print("export", facts, fact_lines(facts), as_json)


@cli.command(epilog="Example: lsmix push runs/mix/lsmix-0123456789ab s3://bucket/lsmix-pool")
@click.argument("artifact", type=_place)
@click.argument("url")
@click.option("--card", type=_place, help="Of a pool: send the card in this folder; without it, a new one.")
@_json
@_quiet
def push(artifact: str, url: str, card: str | None, as_json: bool, quiet: bool) -> None:
    """Send ARTIFACT to URL, a folder or an object store. Run it again to go on."""
    from lsmix.pipeline.api import push as push_artifact

    with TerminalProgress(quiet=quiet) as bars:
        done = push_artifact(artifact, url, card=card, progress=bars)
    _print("push", done, transfer_lines(done, done.url), as_json)


@cli.command(epilog="Example: lsmix pull https://example.org/lsmix-pool && lsmix verify lsmix-pool")
@click.argument("url")
@click.argument("dest", required=False, type=_place)
@_json
@_quiet
def pull(url: str, dest: str | None, as_json: bool, quiet: bool) -> None:
    """Fetch the artifact at URL to DEST and check every file. Run it again to go on."""
    from lsmix.pipeline.api import pull as pull_artifact

    with TerminalProgress(quiet=quiet) as bars:
        done = pull_artifact(url, dest, progress=bars)
    _print("pull", done, transfer_lines(done, str(done.folder)), as_json)


@cli.command(epilog="Example: lsmix card runs/mix/lsmix-0123456789ab lsmix-card --licence CC-BY-4.0")
@click.argument("pool", type=_place)
@click.argument("dest", required=False, type=_place)
@click.option("--licence", metavar="TEXT", help="Licence of the images: SPDX identifier or words.")
@click.option("--creator", metavar="NAME", default="", help="Who made the pool.")
@_json
def card(pool: str, dest: str | None, licence: str | None, creator: str, as_json: bool) -> None:
    """Write a card of POOL to the new folder DEST. It has README.md, croissant.json, samples.csv, a picture and LICENSES/."""
    from lsmix.pipeline.views.dataset_card.card import card_text, write_card

    facts = write_card(pool, dest, licence=licence, creator=creator)
    _print("card", facts, card_text(facts).splitlines(), as_json)


@cli.command(epilog="Example: lsmix gc my.toml --delete")
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@_workspace
@_overrides
@click.option("--delete", is_flag=True, help="Remove what is listed.")
@_json
def gc(recipes: Sequence[Path], workspace: str, overrides: Sequence[str], delete: bool, as_json: bool) -> None:
    """List what none of RECIPES needs at any scale. With --delete, remove it: artifacts and unfinished work."""
    from lsmix.pipeline.api import plan
    from lsmix.pipeline.engine.garbage import collect_garbage

    place, nodes = None, []
    for recipe in recipes:
        content, wanted, place = plan(recipe, workspace=workspace, overrides=overrides)
        nodes += wanted
        for scale in content.scale:
            nodes += plan(recipe, workspace=workspace, overrides=overrides, scale=scale)[1]
    found = collect_garbage(nodes, place, delete=delete) if place else []
    _print("gc", found, garbage_lines(found, delete=delete), as_json)


def _statuses(recipe: Path, *, force: str = "", **options: Any) -> "list[NodeStatus]":
    from lsmix.pipeline.api import plan
    from lsmix.pipeline.engine.resolver import slow_warning
    from lsmix.pipeline.engine.status import recipe_status

    _, nodes, place = plan(recipe, **options)
    found = recipe_status(nodes, place, force=force)
    slow = slow_warning(nodes, [0.0 if node.state == "cached" else node.seconds or 0.0 for node in found])
    if slow:
        click.echo(f"warning: {escape_terminal(slow)}", err=True)
    return found


def _print(kind: str, content: Any, lines: "list[str]", as_json: bool) -> None:
    """Print the results of a command: one document for programs, or lines for people."""
    if not as_json:
        click.echo("\n".join(map(escape_terminal, lines)))
        return
    import msgspec

    document = {"schema": f"lsmix/{kind}/1", "content": content}
    text = msgspec.json.format(msgspec.json.encode(document), indent=1).decode()
    click.echo(escape_json(text, ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf")))


def _print_run(result: "RunResult", as_json: bool) -> None:
    _print("run", result.to_dict(), run_lines(result.built, result.error_rates, result.report_place), as_json)


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_streams()
    # Waiting threads that spin made a training step over ten times slower on a busy machine. OpenMP reads it as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "_LSMIX_COMPLETE" in os.environ:
        cli.main(prog_name="lsmix")  # which asks click for the words that a shell completes, and exits
    if code := _exit_code():
        sys.exit(code)


def _exit_code() -> int:
    try:
        # Not cli.main, which exits with 1 and without a word where any pipe or socket broke.
        with cli.make_context("lsmix", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LsmixError as error:
        return _tell(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        import shlex

        again = shlex.join(["lsmix", *sys.argv[1:]])
        click.echo(escape_terminal(f"interrupted; what is done is kept. Go on with: {again}"), err=True)
        return _INTERRUPTED
    except MemoryError as error:
        return _tell(f"this needs more memory than there is{': ' if str(error) else ''}{error}.")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_gone():
            discard_output()
            return _OUTPUT_GONE
        path = Path(os.fsdecode(error.filename or ""))
        if error.errno in (errno.EROFS, errno.EACCES) and path.name.startswith(".") and path.suffix == ".part":
            name = path.name[1:].rsplit(".", 2)[0]  # of the file that the temporary one becomes
            return _tell(f"cannot write {name!r}: the folder {str(path.parent)!r} is read-only. Choose another path.")
        return _tell(f"{system_error(error)} What is done is kept.")
    return 0


def _tell(what: str, code: int = LsmixError.exit_code) -> int:
    click.echo(f"error: {escape_terminal(what)}", err=True)
    return code
