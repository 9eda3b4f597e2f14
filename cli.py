"""The command line: each command parses, makes one library call, prints.

The one rule: nothing heavy is imported before a command's body needs it, so that ``lsmix --help`` answers at once.
Results go to stdout, progress to stderr; LsmixError becomes an exit code here and nowhere else.
"""

import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lsmix.data.errors import LsmixError, StaleError
from lsmix.pipeline.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from lsmix.pipeline.api import RunResult
    from lsmix.pipeline.garbage import Garbage
    from lsmix.pipeline.status import NodeStatus

__all__ = ["main"]

_INTERRUPTED = 130
_SECONDS_BETWEEN_LINES = 30.0
_LINE = "{prefix}: {n} of {total}, {pace}, {left}{note}"

_EPILOG = """\b
Exit codes: 0 done, 1 error, 2 usage, 3 stale, 4 locked by another run,
5 corrupt, 6 partly done, 130 interrupted (run again to go on).
"""


class _Bars:
    """Progress on stderr: bars on a terminal, a line every half minute elsewhere."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: Any = None
        self._line_at = 0.0  # when the last line was printed, where there is no terminal

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()  # so that an error does not stand behind half a bar

    def say(self, message: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            click.echo(message, err=True)

    def detail(self, message: str) -> None:
        """Print a line, if verbose."""
        if self._verbose:
            click.echo(message, err=True)

    def warn(self, message: str) -> None:
        """Print a warning, even when quiet."""
        click.echo(f"warning: {message}", err=True)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a bar."""
        if self._quiet:
            return
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        bytewise = unit == "byte"
        if not terminal:
            amounts = (
                (human_bytes(total - done), human_bytes(total)) if bytewise else (total - done, f"{total} {unit}s")
            )
            click.echo(f"{label}: {amounts[0]} of {amounts[1]} to do", err=True)
        target = None if terminal else io.StringIO()  # without a terminal tqdm only keeps the count
        self._line_at = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="B" if bytewise else f" {unit}",
            unit_scale=bytewise,
            dynamic_ncols=terminal,
            leave=False,
            file=target,
        )

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._bar is None:
            return
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(units)
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._line_at > _SECONDS_BETWEEN_LINES and self._bar.n < self._bar.total:
            self._line_at = now
            click.echo(_LINE.format(**{**self._bar.format_dict, **_pace(self._bar.format_dict)}), err=True)

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _pace(facts: dict[str, Any]) -> dict[str, Any]:
    rate = (facts["n"] - facts["initial"]) / max(facts["elapsed"], 1e-9)
    left = (facts["total"] - facts["n"]) / rate / 60 if rate else 0.0
    note = f", {facts['postfix']}" if facts["postfix"] else ""
    if facts["unit_scale"]:
        amounts = {"n": human_bytes(facts["n"]), "total": human_bytes(facts["total"])}
        return {**amounts, "pace": f"{human_bytes(round(rate))}/s", "left": f"{left:.0f} min left", "note": note}
    pace = f"{1 / rate:.1f} s/{facts['unit'].strip()}" if 0 < rate < 1 else f"{rate:.1f}{facts['unit']}s/s"
    return {"pace": pace, "left": f"{left:.0f} min left", "note": note}


# Not a docstring, since click wants real backspaces in front of what it must not wrap.
_HELP = """Make, check and use mixed-image data sets (LS-Mix).

\b
Begin with:  lsmix demo
or:          lsmix init cifar10-small > my.toml && lsmix run my.toml
"""


@click.group(help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lsmix")
def cli() -> None:
    """Hold the commands."""


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.argument("recipe", type=click.Path(path_type=Path)),
            click.option("--workspace", default="runs", show_default=True, help="Folder of the artifacts."),
            click.option(
                "--scale", default="", metavar="NAME", help="Take the recipe's sizes of this name, such as small."
            ),
            click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text."),
        ]
    ):
        command = option(command)
    return command


def _work_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option(
                "--workers", type=click.IntRange(min=0), default=0, help="Make shards in N Dask workers here."
            ),
            click.option("--scheduler", default="", metavar="ADDRESS", help="Make shards on a running Dask cluster."),
            click.option("-q", "--quiet", is_flag=True, help="No progress, only results and warnings."),
            click.option("-v", "--verbose", is_flag=True, help="Also tell what each artifact is made from."),
        ]
    ):
        command = option(command)
    return command


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--dry-run", is_flag=True, help="Only show what would run, and why.")(_work_options(command))


_download_option = click.option(
    "--download", is_flag=True, help="Fetch what data.download names first, if it is not there."
)


@cli.command(epilog="Example: lsmix init cifar10-small > my.toml")
@click.argument("name", required=False)
def init(name: str | None) -> None:
    """Print a commented recipe to start from; without NAME, list them."""
    from lsmix.pipeline.builtin import builtin_recipes, recipe_text

    click.echo(recipe_text(name) if name else "\n".join(builtin_recipes()), nl=name is None)


def _run(stage: str, recipe: Path, dry_run: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    force = stage if options.pop("force", False) else ""
    if dry_run:
        nodes = _forced(_statuses(recipe, options["workspace"], stage, options["overrides"], options["scale"]), force)
        _print_json("status", nodes) if as_json else _print_status(nodes)
        return
    from lsmix.pipeline.api import run as run_recipe

    with _Bars(quiet, verbose) as bars:
        result = run_recipe(recipe, stage=stage, force=force, progress=bars, **options)
    _print_json("run", _run_facts(result)) if as_json else _print_run(result)


@cli.command(epilog="Example: lsmix run my.toml --set data.path=cifar-10-batches-py")
@_recipe_options
@_run_options
@_download_option
def run(recipe: Path, **options: Any) -> None:
    """Bring everything in RECIPE up to date, from ingest to report."""
    _run("", recipe, **options)


def _forced(nodes: "list[NodeStatus]", stage: str) -> "list[NodeStatus]":
    import msgspec

    made = {"cached", "damaged"}
    return [
        msgspec.structs.replace(node, state="to-run", why="--force")
        if node.stage == stage and node.state in made
        else node
        for node in nodes
    ]


def _stage_command(stage: str, text: str, example: str) -> None:
    @cli.command(name=stage, help=text, epilog=f"Example: lsmix {stage} my.toml{example}")
    @_recipe_options
    @_run_options
    @_download_option
    @click.option("--force", is_flag=True, help="Make this stage again although it is up to date.")
    def command(recipe: Path, **options: Any) -> None:
        _run(stage, recipe, **options)


for _stage, _text, _example in (
    ("ingest", "Read the published data set of RECIPE into dataset.h5.", " --set data.heldout=500"),
    ("train-glow", "Train the flow of RECIPE, and whatever it needs.", " --device cuda"),
    ("encode", "Encode the training images of RECIPE to latents.", " --workers 2"),
    ("mix", "Make the pools of RECIPE.", " --set pools.lsmix.alpha=0.2"),
    ("train", "Train the classifiers of RECIPE.", " --set classifier.epochs=5"),
    ("naturalness", "Measure how natural the mixes of each method in RECIPE are.", " --set naturalness.pairs=200"),
    ("report", "Write the report of RECIPE.", ""),
):
    _stage_command(_stage, _text, _example)


@cli.command(epilog="Example: lsmix status my.toml --check")
@_recipe_options
@click.option("--check", is_flag=True, help="Exit with code 3 unless everything is up to date.")
def status(recipe: Path, workspace: str, scale: str, overrides: Sequence[str], as_json: bool, check: bool) -> None:
    """Show what is cached, what would run, and why. Reads only; safe while a run is under way."""
    nodes = _statuses(recipe, workspace, "", overrides, scale)
    _print_json("status", nodes) if as_json else _print_status(nodes)
    stale = [node for node in nodes if node.state != "cached"]
    if check and stale:
        raise StaleError(f"{len(stale)} of {len(nodes)} artifacts are not up to date. 'lsmix run {recipe}' makes them.")


@cli.command(epilog="Example: lsmix demo")
@click.option("--workspace", default="runs", show_default=True, help="Folder of the artifacts.")
@_run_options
def demo(workspace: str, **options: Any) -> None:
    """Run the whole pipeline on scikit-learn's digits; a few minutes, nothing to download."""
    from lsmix.pipeline.builtin import recipe_path

    _run("", recipe_path("demo"), workspace=workspace, overrides=(), scale="", as_json=False, **options)


@cli.command(epilog="Example: lsmix show runs/mix/lsmix-0123456789ab --sheet sheet.png")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--sheet", type=click.Path(path_type=Path), help="Write the sheet of samples to this PNG.")
@click.option("--rows", type=click.IntRange(1, 64), default=8, show_default=True, help="Rows of the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def show(artifact: Path, sheet: Path | None, rows: int, as_json: bool) -> None:
    """Show the facts of ARTIFACT and draw a sheet; of a pool: x1 | mixes at growing λ | x2."""
    from lsmix.pipeline.show import artifact_facts, write_sheet

    facts = artifact_facts(artifact)
    target = sheet or Path(f"{artifact.resolve().name}.png")
    drawn = write_sheet(artifact, target, rows=rows)
    if as_json:
        _print_json("show", {**facts, "sheet": str(target) if drawn else None})
        return
    for name, value in facts.items():
        click.echo(f"{name:<12} {value}")
    click.echo(f"{'sheet':<12} {target} ({drawn})" if drawn else "no pictures to draw in an artifact of this stage")


@cli.command(epilog="Example: lsmix figure fig4 my.toml --out fig4.png")
@click.argument("name")
@_recipe_options
@_run_options
@_download_option
@click.option("--out", type=click.Path(path_type=Path), help="Write the PNG here, not to NAME.png.")
@click.option("--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Pairs of images to show.")
def figure(
    name: str,
    recipe: Path,
    out: Path | None,
    rows: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Draw a figure of the paper: fig1, fig3, fig4, fig7 or appendix-e; makes the flow and the latents if need be."""
    from lsmix.pipeline.figures import check_figure

    check_figure(name)
    if dry_run:
        _run("encode", recipe, dry_run, as_json, quiet, verbose, **options)
        return
    from lsmix.pipeline.api import figure as draw

    target = out or Path(f"{name}.png")
    with _Bars(quiet, verbose) as bars:
        sheet = draw(name, recipe, target, pairs=rows, progress=bars, **options)
    if as_json:
        facts = {"name": name, "path": str(target), "caption": sheet.caption}
        _print_json("figure", {**facts, "decoded": sheet.decoded, "corrupted": sheet.corrupted})
        return
    click.echo(f"figure      {target}")
    click.echo(f"shows       {sheet.caption}")
    click.echo(f"corrupted   {sheet.corrupted} of {sheet.decoded} decoded images")


@cli.command(epilog="Example: lsmix verify runs/mix/lsmix-0123456789ab --deep")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Make a sample of a pool's rows again, and compare every pixel.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True, help="Rows to make again.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the choice of these rows.")
@click.option("--data", type=click.Path(path_type=Path), help="Base set: published files, digits, or dataset.h5.")
@click.option("--flow", type=click.Path(path_type=Path), help="Folder of the flow.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def verify(artifact: Path, as_json: bool, **options: Any) -> None:
    """Check every byte of ARTIFACT, and every row of a pool against its plan; exit code 5 on the first damage."""
    from lsmix.pipeline.api import verify as verify_artifact
    from lsmix.pipeline.verdict import verify_lines

    with _Bars(quiet=not options["deep"], verbose=False) as bars:
        facts = verify_artifact(artifact, progress=bars, **options)
    _print_json("verify", facts) if as_json else click.echo("\n".join(verify_lines(facts)))


@cli.command(epilog="Example: lsmix rebuild plan.json --data cifar-10-python.tar.gz --flow glow --out lsmix-pool")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Published files, digits, or dataset.h5.")
@click.option("--flow", type=click.Path(path_type=Path), help="Folder of the flow; not for pools mixed in pixel space.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the new pool; without it, in the workspace.")
@click.option("--workspace", default="runs", show_default=True, help="Folder of the artifacts.")
@click.option("--expect", default="", metavar="ROOT", help="Root digest of the original, 12 digits or more.")
@click.option("--compare", type=click.Path(path_type=Path), help="The original pool, to compare pixel by pixel.")
@_work_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def rebuild(plan: Path, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Make a pool again from PLAN, its plan.json, with the base set and the flow; exit code 5 if another comes out."""
    from lsmix.pipeline.rebuild import rebuild as rebuild_pool
    from lsmix.pipeline.verdict import rebuild_lines

    with _Bars(quiet, verbose) as bars:
        result = rebuild_pool(plan, progress=bars, **options)
    _print_json("rebuild", result.facts()) if as_json else click.echo("\n".join(rebuild_lines(result)))


@cli.command(epilog="Example: lsmix gc my.toml --delete")
@click.argument("recipes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--workspace", default="runs", show_default=True, help="Folder of the artifacts.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field.")
@click.option("--delete", is_flag=True, help="Remove what is listed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
def gc(recipes: Sequence[Path], workspace: str, overrides: Sequence[str], delete: bool, as_json: bool) -> None:
    """List artifacts and unfinished work that none of RECIPES wants at any scale; remove them with --delete."""
    from lsmix.pipeline.api import plan
    from lsmix.pipeline.garbage import collect_garbage

    place, nodes = None, []
    for recipe in recipes:
        content, wanted, place = plan(recipe, workspace=workspace, overrides=overrides)
        nodes += wanted
        for scale in content.scale:
            nodes += plan(recipe, workspace=workspace, overrides=overrides, scale=scale)[1]
    found = collect_garbage(nodes, place, delete=delete) if place else []
    _print_json("gc", found) if as_json else _print_garbage(found, delete)


def _print_garbage(found: "Sequence[Garbage]", delete: bool) -> None:
    for item in found:
        click.echo(
            f"{human_bytes(item.bytes):>9}  {item.folder}" + ("  (in use, kept)" if delete and not item.removed else "")
        )
    total = human_bytes(sum(item.bytes for item in found))
    click.echo(f"{len(found)} folders, {total}: {'removed' if delete else 'add --delete to remove them'}")


def _statuses(recipe: Path, workspace: str, stage: str, overrides: Sequence[str], scale: str) -> "list[NodeStatus]":
    from lsmix.pipeline.api import plan
    from lsmix.pipeline.status import recipe_status

    _, nodes, place = plan(recipe, workspace=workspace, stage=stage, overrides=overrides, scale=scale)
    return recipe_status(nodes, place)


def _print_status(nodes: "Sequence[NodeStatus]") -> None:
    for node in nodes:
        size = "" if node.bytes is None else ("" if node.state == "cached" else "~") + human_bytes(node.bytes)
        seconds = "" if node.seconds is None else ("" if node.state == "cached" else "~") + human_seconds(node.seconds)
        click.echo(f"{node.state:<10} {node.stage + ' ' + node.name:<32} {size:>10} {seconds:>13}  {node.why}")


def _print_run(result: "RunResult") -> None:
    made, wanted = sum(not item.cached for item in result.built), len(result.built)
    rest = "" if made == wanted else f", {wanted - made} up to date already"
    click.echo(f"{made} of {wanted} artifacts made{rest}")
    for row in result.error_rates:
        paper = f"; the paper has {row.paper}" if row.paper else ""
        click.echo(f"error rate  {row.label:<26} {row.text} %  ({len(row.errors)} seeds{paper})")
    if result.report:
        click.echo(f"report      {result.report}")
    elif result.built:
        click.echo(f"last        {result.built[-1].folder}")


def _run_facts(result: "RunResult") -> dict[str, Any]:
    return {
        "artifacts": [
            {
                "stage": item.stage,
                "name": item.name,
                "key": item.key,
                "folder": str(item.folder),
                "root": item.manifest.root,
                "cached": item.cached,
                "seconds": round(item.seconds, 3),
                "counts": item.manifest.counts,
            }
            for item in result.built
        ],
        "error_rates": [
            {
                "run": row.name,
                "label": row.label,
                "errors": row.errors,
                "mean": row.mean,
                "std": row.std,
                "paper": row.paper or None,
            }
            for row in result.error_rates
        ],
        "report": str(result.report) if result.report else None,
    }


def _print_json(kind: str, content: Any) -> None:
    import msgspec

    document = {"schema": f"lsmix/{kind}/1", "content": content}
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=1).decode())


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LsmixError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"interrupted; what is done is kept. Go on with: {_command_line()}", err=True)
        sys.exit(_INTERRUPTED)
    except MemoryError as error:
        click.echo(f"error: this needs more memory than there is{': ' if str(error) else ''}{error}.", err=True)
        sys.exit(LsmixError.exit_code)
    except BrokenPipeError:  # the reader of our output, such as 'head', went away
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f": {error.filename!r}" if error.filename else ""
        click.echo(f"error: {error.strerror or error}{where}. What is done is kept.", err=True)
        sys.exit(LsmixError.exit_code)


def _command_line() -> str:
    import shlex

    return shlex.join(["lsmix", *sys.argv[1:]])
