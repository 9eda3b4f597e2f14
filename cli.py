"""The command line: each command parses its arguments, makes one library call and prints the result.

Heavy imports stay inside the command bodies, so that ``lsmix --help`` is fast. Results go to stdout, progress goes to
stderr. Only this module turns an LsmixError into an exit code.
"""

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lsmix.data.errors import LsmixError, StaleError, escape_json, escape_terminal, system_error
from lsmix.pipeline import cli_options as option
from lsmix.pipeline.cli_options import ArtifactName
from lsmix.pipeline.cli_text import (
    artifact_lines,
    difference_lines,
    fact_lines,
    garbage_lines,
    log_lines,
    log_table,
    part_lines,
    rebuild_lines,
    run_lines,
    show_lines,
    status_lines,
    transfer_lines,
    verify_lines,
)
from lsmix.pipeline.engine.torchrun import leave_ranks, run_on_first_rank
from lsmix.pipeline.stages.registry import STAGE_COMMANDS, StageCommand
from lsmix.pipeline.terminal import TerminalProgress, discard_output, output_is_gone, prepare_logging, prepare_streams

if TYPE_CHECKING:
    from lsmix.pipeline.api import RunResult
    from lsmix.pipeline.engine.status import NodeStatus

__all__ = ["main"]

_INTERRUPTED = 130
_OUTPUT_GONE = 141  # what shells report for a program that SIGPIPE ended
_EPILOG = """\b
Exit codes: 0 done, 1 error, 2 usage, 3 stale, 4 locked by another run,
5 corrupt, 6 partly done, 130 interrupted (run again to resume),
141 output closed.
"""

# Not a docstring, because click needs a real backspace character before text that it must not wrap.
_HELP = """Build, verify and share mixed-image data sets (LS-Mix).

\b
Try it:           lsmix demo
Use your images:  lsmix init --from photos > lsmix.toml && lsmix run
RECIPE defaults to lsmix.toml in the current folder.
"""


GROUPS: Mapping[str, Sequence[str]] = {
    "Build": ("demo", "init", "run", *STAGE_COMMANDS, "finalize", "figure"),
    "Inspect": ("status", "ls", "show", "diff", "logs"),
    "Verify and share": ("verify", "rebuild", "export", "card", "push", "pull"),
    "Maintain": ("gc", "completion"),
}


class _Overview(click.Group):
    """A group whose help lists the commands under headings, one line of at most 80 characters each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(65)) for name in names])


@click.group(cls=_Overview, help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="lsmix")
def cli() -> None:
    """Group all commands."""


@cli.command(epilog="Example: lsmix init --from photos > my.toml")
@click.argument("name", required=False, shell_complete=option.recipe_names)
@click.option("--from", "source", metavar="PATH", default="", help="Write a recipe for this folder or file.")
def init(name: str | None, source: str) -> None:
    """Print a commented recipe to start from. Without NAME, list the built-in recipes."""
    if source:
        from lsmix.pipeline.starter import starter_recipe

        text = starter_recipe(source)
    else:
        from lsmix.pipeline.config.recipes import recipe_list, recipe_text

        text = recipe_text(name) if name else recipe_list()
    click.echo(text, nl=False)


def _run(stage: str, recipe: Any, dry_run: bool, as_json: bool, **options: Any) -> "RunResult | None":
    force = stage if options.pop("force", False) else ""
    index, size = options.pop("array_index", None), options.pop("array_size", None)
    if (index is None) != (size is None):
        raise click.UsageError("Use --array-index and --array-size together.")
    if dry_run:
        names = options.keys() & {"workspace", "overrides", "scale", "data"}
        nodes = _statuses(recipe, stage=stage, force=force, **{name: options[name] for name in names})
        _print("status", nodes, status_lines(nodes), as_json)
        return None
    from lsmix.pipeline import api

    with TerminalProgress(quiet=options.pop("quiet"), verbose=options.pop("verbose")) as bars:
        if index is None:
            result = api.run(recipe, stage=stage, force=force, progress=bars, **options)
        elif force or options.pop("download"):
            raise click.UsageError("An array task only makes missing shards. Remove --force and --download.")
        else:
            parts = api.run_array_task(recipe, stage, index, size, progress=bars, **options)
    if index is None:
        _print_run(result, as_json)
        return result
    _print("array-task", parts, part_lines(parts, str(recipe)), as_json)
    return None


@cli.command(epilog="Example: lsmix run my.toml --set data.path=cifar-10-batches-py")
@option.recipe_options
@option.run_options
@option.download
def run(recipe: Path, **options: Any) -> None:
    """Bring everything in RECIPE up to date, from ingest to report."""
    _run("", recipe, **options)


def _stage_command(stage: str, about: StageCommand) -> None:
    @cli.command(name=stage, help=about.summary, epilog=f"Example: lsmix {stage} my.toml{about.example}")
    @option.recipe_options
    @option.run_options
    @option.download
    @click.option("--force", is_flag=True, help="Rerun this stage even if it is up to date.")
    def command(recipe: Path, **options: Any) -> None:
        _run(stage, recipe, **options)

    if about.divisible:
        text = "Run only task I of N, from 0; then 'lsmix finalize'."
        option.options(
            click.option("--array-index", type=click.IntRange(min=0), metavar="I", help=text),
            click.option("--array-size", type=click.IntRange(min=1), metavar="N", help="Tasks in the job array."),
        )(command)


for _stage, _about in STAGE_COMMANDS.items():
    _stage_command(_stage, _about)


@cli.command(epilog="Example: lsmix finalize my.toml")
@option.recipe_options
@option.device
@option.quiet
def finalize(recipe: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Complete the artifacts of a finished job array. Computes no shards."""
    from lsmix.pipeline.api import finalize as finalize_recipe

    with TerminalProgress(quiet=quiet) as bars:
        result = finalize_recipe(recipe, progress=bars, **options)
    _print_run(result, as_json)


@cli.command(epilog="Example: lsmix status my.toml --check")
@option.recipe_options
@click.option("--check", is_flag=True, help="Exit with code 3 unless everything is up to date.")
def status(recipe: Path, as_json: bool, check: bool, **options: Any) -> None:
    """Show what is cached, what would run, and why. Only reads, so it is safe during a run."""
    nodes = _statuses(recipe, **options)
    _print("status", nodes, status_lines(nodes), as_json)
    stale = [node for node in nodes if node.state != "cached"]
    if check and stale:
        raise StaleError(f"{len(stale)} of {len(nodes)} artifacts are not up to date. Run 'lsmix run {recipe}'.")


@cli.command(epilog="Example: lsmix demo --photos holiday")
@option.workspace
@click.option("--photos", metavar="FOLDER", help="Mix the photos in this folder, scaled to 32×32 pixels.")
@option.run_options
def demo(workspace: str, photos: str | None, **options: Any) -> None:
    """Try lsmix on handwritten digits or your own photos. Downloads nothing."""
    from lsmix.pipeline.config.recipes import recipe_path
    from lsmix.pipeline.photos import draw_photos, photos_recipe

    with TerminalProgress(quiet=options["quiet"]) as bars:
        recipe, options["data"] = photos_recipe(photos, bars) if photos else (recipe_path("demo"), None)
    result = _run("", recipe, workspace=workspace, overrides=(), scale="", as_json=False, **options)
    if photos and result:
        click.echo(escape_terminal(f"sheet       {draw_photos(result.built)}"))


@cli.command(epilog="Example: lsmix ls")
@option.options(option.workspace, option.as_json)
def ls(workspace: str, as_json: bool) -> None:
    """List the artifacts in the workspace with size, age and inputs. Inputs are shown by the first digits of their cache keys."""
    from lsmix.pipeline.api import list_artifacts

    found = list_artifacts(workspace)
    _print("ls", found, artifact_lines(found), as_json)


@cli.command(epilog="Example: lsmix show mix/lsmix --html pool.html")
@click.argument("artifact", type=ArtifactName())
@click.option("--image", type=option.place, help="Write a grid of its images to this PNG file.")
@click.option("--html", type=option.place, help="Write a page about a pool to this HTML file.")
@click.option("--data", type=ArtifactName("ingest"), help="With --html: ingest artifact with the source images.")
@click.option("--rows", type=click.IntRange(1, 1000), help="Rows of the grid (default 8) or samples on the page (120).")
@option.artifact_workspace
@option.as_json
def show(artifact: str, as_json: bool, **options: Any) -> None:
    """Describe ARTIFACT, given as a path, URL, name or cache key. With --image or --html, also draw its images."""
    from lsmix.pipeline.views.show import artifact_facts, draw_artifact

    facts = artifact_facts(artifact)
    drawn = draw_artifact(artifact, **options)
    files = {one.kind: str(one.target) if one.what else None for one in drawn}
    _print("show", {**facts, **files}, show_lines(facts, drawn), as_json)


@cli.command(epilog="Example: lsmix diff lsmix 0123456789ab")
@click.argument("first", metavar="A", type=ArtifactName())
@click.argument("second", metavar="B", type=ArtifactName())
@option.artifact_workspace
@option.as_json
def diff(first: str, second: str, as_json: bool) -> None:
    """Show the fields that differ between two artifacts or recipes. Give a recipe as its TOML file."""
    from lsmix.pipeline.views.diff import differences

    found = differences(first, second)
    content = {"a": first, "b": second, "differences": found}
    _print("diff", content, difference_lines(first, second, found), as_json)


@cli.command(epilog="Example: lsmix logs last")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=option.log_names)
@option.workspace
@option.as_json
def logs(run_name: str | None, workspace: str, as_json: bool) -> None:
    """List the run logs of the workspace, or print one. RUN is the start of a log's name, or 'last'."""
    from lsmix.pipeline.engine.run_log import list_logs, read_log

    if run_name:
        events = read_log(workspace, run_name)
        _print("log", events, log_lines(events), as_json)
    else:
        found = list_logs(workspace)
        _print("logs", found, log_table(found), as_json)


@cli.command(epilog="Example: lsmix figure fig4 my.toml --out fig4.png")
@click.argument("name")
@option.recipe_options
@option.run_options
@option.download
@click.option("--out", type=option.place, help="PNG file to write; by default NAME.png.")
@click.option("--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Number of image pairs.")
def figure(name: str, recipe: Path, out: str | None, rows: int, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Draw a figure of the paper: fig1, fig3, fig4, fig7, appendix-e. Builds a missing flow and latents first."""
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


@cli.command(epilog="Example: lsmix verify mix/lsmix --deep")
@click.argument("artifact", type=ArtifactName())
@click.option("--deep", is_flag=True, help="Also recompute a sample of a pool's rows and compare every pixel.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True, help="Rows to recompute.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for choosing these rows.")
@click.option(
    "--data", type=ArtifactName("ingest", words=("digits",)), help="Base set: published files, digits, or dataset.h5."
)
@click.option("--flow", type=ArtifactName("train-glow"), help="Folder or URL of the flow.")
@option.device
@option.artifact_workspace
@option.as_json
def verify(artifact: str, as_json: bool, **options: Any) -> None:
    """Check every byte of ARTIFACT, and every row of a pool. Exits with code 5 at the first error."""
    from lsmix.pipeline.api import verify as verify_artifact

    with TerminalProgress(quiet=not options["deep"] and "://" not in artifact) as bars:
        facts = verify_artifact(artifact, progress=bars, **options)
    _print("verify", facts, verify_lines(facts), as_json)


@cli.command(epilog="Example: lsmix rebuild plan.json --data cifar-10-python.tar.gz --flow glow --out lsmix-pool")
@click.argument("plan", type=ArtifactName("mix"))
@click.option(
    "--data",
    type=ArtifactName("ingest", words=("digits",)),
    required=True,
    help="Published files, digits, or dataset.h5.",
)
@click.option("--flow", type=ArtifactName("train-glow"), help="Folder or URL of the flow; not needed for pixel pools.")
@click.option("--out", type=option.place, help="Folder for the new pool; by default in the workspace.")
@option.workspace
@click.option("--expect", default="", metavar="DIGEST", help="Content digest of the original; at least 12 digits.")
@click.option("--compare", type=ArtifactName("mix"), help="Original pool to compare with, pixel by pixel.")
@option.work_options
@option.as_json
def rebuild(plan: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Rebuild a pool from PLAN, its base set and its flow. PLAN is its plan.json. Exits with code 5 if the result differs."""
    from lsmix.pipeline.verify.rebuild import rebuild as rebuild_pool

    with TerminalProgress(quiet=quiet, verbose=verbose) as bars:
        result = rebuild_pool(plan, progress=bars, **options)
    _print("rebuild", result.to_dict(), rebuild_lines(result), as_json)


@cli.command(epilog="Example: lsmix export mix/lsmix exported --format parquet")
@click.argument("pool", type=ArtifactName("mix"))
@click.argument("dest", type=option.place)
@click.option("--format", required=True, type=option.ExportFormatName(), help="Output format.")
@click.option("--shard-images", type=click.IntRange(min=0), default=0, metavar="N", help="Images per file; 0: files of about 500 MB.")  # fmt: skip
@click.option("--image", type=click.Choice(["png", "webp"]), default="png", show_default=True, help="Image encoding.")  # fmt: skip
@option.artifact_workspace
@option.as_json
@option.quiet
def export(pool: str, dest: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Export POOL to the new folder DEST in another format. Images are stored losslessly."""
    from lsmix.pipeline.api import export_pool

    with TerminalProgress(quiet=quiet) as bars:
        facts = export_pool(pool, dest, progress=bars, **options)
    _print("export", facts, fact_lines(facts), as_json)


@cli.command(epilog="Example: lsmix push mix/lsmix s3://bucket/lsmix-pool")
@click.argument("artifact", type=ArtifactName())
@click.argument("url")
@click.option("--card", type=option.place, help="For a pool: upload the card in this folder, not a new one.")
@option.artifact_workspace
@option.as_json
@option.quiet
def push(artifact: str, url: str, card: str | None, as_json: bool, quiet: bool) -> None:
    """Upload ARTIFACT to URL, a folder or an object store. After an interruption, run it again to resume."""
    from lsmix.pipeline.api import push as push_artifact

    with TerminalProgress(quiet=quiet) as bars:
        done = push_artifact(artifact, url, card=card, progress=bars)
    _print("push", done, transfer_lines(done, done.url), as_json)


@cli.command(epilog="Example: lsmix pull https://example.org/lsmix-pool && lsmix verify lsmix-pool")
@click.argument("url")
@click.argument("dest", required=False, type=option.place)
@option.as_json
@option.quiet
def pull(url: str, dest: str | None, as_json: bool, quiet: bool) -> None:
    """Download the artifact at URL to DEST and check every file. After an interruption, run it again to resume."""
    from lsmix.pipeline.api import pull as pull_artifact

    with TerminalProgress(quiet=quiet) as bars:
        done = pull_artifact(url, dest, progress=bars)
    _print("pull", done, transfer_lines(done, str(done.folder)), as_json)


@cli.command(epilog="Example: lsmix card mix/lsmix lsmix-card --licence CC-BY-4.0")
@click.argument("pool", type=ArtifactName("mix"))
@click.argument("dest", required=False, type=option.place)
@click.option("--licence", metavar="TEXT", help="Licence of the images: an SPDX identifier or free text.")
@click.option("--creator", metavar="NAME", default="", help="Who made the pool.")
@option.artifact_workspace
@option.as_json
def card(pool: str, dest: str | None, licence: str | None, creator: str, as_json: bool) -> None:
    """Write a dataset card of POOL to the new folder DEST. It has README.md, croissant.json, samples.csv, a picture and LICENSES/."""
    from lsmix.pipeline.views.dataset_card.card import card_text, write_card

    facts = write_card(pool, dest, licence=licence, creator=creator)
    _print("card", facts, card_text(facts).splitlines(), as_json)


@cli.command(epilog="Example: lsmix gc my.toml --delete")
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@option.workspace
@option.overrides
@click.option("--delete", is_flag=True, help="Delete the listed folders.")
@option.as_json
def gc(recipes: Sequence[Path], workspace: str, overrides: Sequence[str], delete: bool, as_json: bool) -> None:
    """List artifacts that none of RECIPES needs at any scale. Includes unfinished work. With --delete, remove them."""
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


@cli.command(epilog="Example: lsmix completion fish | source")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell."""
    click.echo(option.completion_script(shell, cli))


def _statuses(recipe: Path, *, force: str = "", **options: Any) -> "list[NodeStatus]":
    from lsmix.pipeline.api import plan
    from lsmix.pipeline.engine.resolver import slow_warning
    from lsmix.pipeline.engine.status import recipe_status

    _, nodes, place = plan(recipe, **options)
    found = recipe_status(nodes, place, force=force)
    if slow := slow_warning(nodes, [0.0 if node.state == "cached" else node.seconds or 0.0 for node in found]):
        click.echo(f"warning: {escape_terminal(slow)}", err=True)
    return found


def _print(kind: str, content: Any, lines: "list[str]", as_json: bool) -> None:
    """Print the results of a command, as one JSON document or as lines of text."""
    if not as_json:
        click.echo("\n".join(map(escape_terminal, lines)))
        return
    import msgspec

    document = {"schema": f"lsmix/{kind}/1", "content": content}
    text = msgspec.json.format(msgspec.json.encode(document), indent=1).decode()
    click.echo(escape_json(text, ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf")))


def _print_run(result: "RunResult", as_json: bool) -> None:
    lines = run_lines(result.built, result.error_rates, result.naturalness, result.report_place)
    _print("run", result.to_dict(), lines, as_json)


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_streams()
    prepare_logging()
    # Threads that spin while they wait make a busy machine up to 28 times slower; threads that never spin make tiny
    # networks on an idle machine 2 times slower. So they spin briefly (results/2026-11-27-waiting). Read when torch
    # loads OpenMP.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "_LSMIX_COMPLETE" in os.environ:
        cli.main(prog_name="lsmix")  # click prints the completions and exits
    if code := leave_ranks(_exit_code()):
        sys.exit(code)


def _exit_code() -> int:
    try:
        # Not cli.main, which exits with 1 and prints nothing if any pipe or socket breaks.
        with cli.make_context("lsmix", sys.argv[1:]) as context:
            return run_on_first_rank(lambda: cli.invoke(context))
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LsmixError as error:
        return _print_error(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        import shlex

        again = shlex.join(["lsmix", *sys.argv[1:]])
        click.echo(escape_terminal(f"interrupted; completed work is kept. Resume with: {again}"), err=True)
        return _INTERRUPTED
    except MemoryError as error:
        return _print_error(f"not enough memory{': ' if str(error) else ''}{error}.")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_gone():
            discard_output()
            return _OUTPUT_GONE
        path = Path(os.fsdecode(error.filename or ""))
        if error.errno in (errno.EROFS, errno.EACCES) and path.name.startswith(".") and path.suffix == ".part":
            name = path.name[1:].rsplit(".", 2)[0]  # the final file; ``path`` is its temporary file
            return _print_error(f"cannot write {name!r}: {str(path.parent)!r} is read-only. Choose another path.")
        return _print_error(f"{system_error(error)} Completed work is kept.")


def _print_error(message: str, code: int = LsmixError.exit_code) -> int:
    click.echo(f"error: {escape_terminal(message)}", err=True)
    return code
