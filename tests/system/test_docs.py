"""The documentation against the code: commands, fields, exit codes and names are told, and what is shown runs."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner

import lsmix
from lsmix.cli import cli
from lsmix.data import errors
from lsmix.data.pool import POOL_COLUMNS
from lsmix.data.pool_spec import EncodeConfig
from lsmix.glow.config import FlowTraining
from lsmix.pipeline.config.recipe import FlowSection, Recipe, RunSection, read_recipe
from lsmix.pipeline.config.schema import (
    DataConfig,
    MixSource,
    NaturalnessConfig,
    PoolRecipe,
    ReportConfig,
    RunConfig,
)

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
SECTIONS = {
    "": Recipe,
    "data.": DataConfig,
    "flow.": FlowSection,
    "flow.training.": FlowTraining,
    "latents.": EncodeConfig,
    "pools.NAME.": PoolRecipe,
    "classifier.": RunConfig,
    "runs.NAME.": RunSection,
    "runs.NAME.mix[].": MixSource,
    "naturalness.": NaturalnessConfig,
    "report.": ReportConfig,
}
TINY = """
name = "tiny"
[data]
format = "digits"
limit = 80
heldout = 8
test = 20
[flow]
levels = 2
steps = 1
hidden = 4
threads = 1
evaluate_images = 8
[flow.training]
iterations = 2
batch_size = 16
flip = false
[pools.lsmix]
copies = 2
[classifier]
threads = 1
width = 4
epochs = 1
batch_size = 32
flip = false
[runs.baseline]
[runs.lsmix]
pool = "lsmix"
[report]
pairs = 1
bits_images = 8
"""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def rows(page: str) -> list[list[str]]:
    """Return the cells of all table rows of a page; a bar within backticks stands for itself."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Make a folder as a reader of the README has it: my.toml, its finished runs, and a pool that somebody gave."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my.toml").write_text(TINY, encoding="utf-8")
    result = lsmix.run(folder / "my.toml", workspace=folder / "runs", device="cpu")
    shutil.copytree(result["mix/lsmix"].folder, folder / "lsmix-pool")
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


# What there is, is told.


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_an_example_and_its_place_in_the_reference(name):
    command = cli.commands[name]
    assert command.help
    assert f"Example: lsmix {name}" in (command.epilog or "")
    reference = text_of("docs/cli.md")
    assert f"`lsmix {name}" in reference
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(option in reference for option in parameter.opts), f"{name} {parameter.opts}"
            assert parameter.help
    arguments = shlex.split(str(command.epilog).removeprefix("Example: lsmix "))[1:]
    command.make_context(name, parsed(arguments))


def test_help_is_laid_out_as_meant():
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert "\\b" not in shown  # click's mark for lines to keep, which must not be in a raw string
    assert "Exit codes: 0 done" in shown


def test_every_exit_code_is_told():
    table = {row[0]: row for row in rows("docs/cli.md") if row[0].isdigit()}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LsmixError)]
    for kind in kinds:
        if kind is not errors.LsmixError:
            assert f"`{kind.__name__}`" in table[str(kind.exit_code)][2]
    assert set(table) == {"0", "2", "130", "141", *(str(kind.exit_code) for kind in kinds)}


def test_every_state_is_told():
    from lsmix.pipeline.engine.status import NodeStatus

    states = next(field.type for field in msgspec.structs.fields(NodeStatus) if field.name == "state").__args__
    assert {f"`{state}`" for state in states} <= {row[0] for row in rows("docs/cli.md")}


@pytest.mark.parametrize("prefix", SECTIONS)
def test_every_recipe_field_is_told_with_its_default(prefix):
    table = {row[0]: row for row in rows("docs/recipe.md")}
    for field in msgspec.structs.fields(SECTIONS[prefix]):
        row = table.get(f"`{prefix}{field.encode_name}`")
        assert row, f"{prefix}{field.encode_name} is not in docs/recipe.md"
        assert row[1] == told_default(field), row
        assert row[2]


def test_the_reference_tells_of_no_field_that_is_not_there():
    known = {f"`{prefix}{name}`" for prefix, kind in SECTIONS.items() for name in kind.__struct_fields__}
    told = {row[0] for row in rows("docs/recipe.md") if row[0].startswith("`")}
    assert told == known


def told_default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if field.default is msgspec.NODEFAULT and issubclass(field.default_factory, msgspec.Struct):
        return "section"
    if field.default is None:  # a section that may be left out
        return "section"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"`{msgspec.json.encode(value).decode()}`"


def test_fields_that_the_reference_calls_not_in_the_key_are_those():
    from lsmix.pipeline.stages.ingest import INGEST
    from lsmix.pipeline.stages.mix import MIX
    from lsmix.pipeline.stages.train_flow import TRAIN_GLOW

    stages = {"data.": INGEST, "flow.": TRAIN_GLOW, "pools.NAME.": MIX}
    known = {f"`{prefix}{name}`" for prefix, stage in stages.items() for name in stage.not_in_key}
    told = {row[0] for row in rows("docs/recipe.md") if len(row) > 2 and "not in the key" in row[2]}
    assert told == {*known, "`name`"}


def test_every_dependency_is_told():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    told = {name for row in rows("docs/dependencies.md") for name in row[0].split(", ")}
    assert {name_of(line) for line in project["dependencies"]} <= told
    text = text_of("docs/dependencies.md")
    for extra, lines in project["optional-dependencies"].items():
        for name in {name_of(line) for line in lines} - {"lsmix"}:
            assert re.search(rf"\b{name}\b", text), f"{name} of the extra {extra!r} is not told of"


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=]", requirement)[0]


def test_every_public_name_is_there_and_told():
    wanted = {"load_flow", "mix_latents", "open_pool", "PoolLoader", "pull", "push", "rebuild", "run", "verify"}
    assert wanted <= set(lsmix.__all__) == set(dir(lsmix))
    for name in wanted:
        assert callable(getattr(lsmix, name))
        assert f"lsmix.{name}(" in text_of("README.md")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lsmix.nothing


def test_versions_agree():
    version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    assert lsmix.__version__ == version
    assert f"\nversion: {version}\n" in text_of("CITATION.cff")
    assert f"\n## {version}" in text_of("CHANGELOG.md")


@pytest.mark.parametrize(("lock", "extras"), [("requirements", ["test", "dev"]), ("requirements-bench", ["bench"])])
def test_a_lock_pins_everything_and_names_no_place(lock, extras):
    lines = [line for line in text_of(f"{lock}.lock").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines)
    names = {re.sub("[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert {"setuptools", "wheel", "torch"} <= names
    assert "torch==2.13.0" in lines
    assert not any(name.startswith(("nvidia", "triton", "cuda")) for name in names)
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    assert {re.split(r"[>\[]", line)[0].lower() for line in wanted} - {"lsmix"} <= names


# What is shown, is so.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", text_of(page)):
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:pipeline|glow|classifiers|data|tests|recipes)/[\w./]+)`", text_of(page)):
        assert (ROOT / name).exists(), name


def test_proofs_that_are_named_are_tests():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+\.py::\w+)`", text_of(page))}
    assert len(named) > 40
    for name in named:
        file, test = name.split("::")
        homes = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob(file)]
        assert any(re.search(rf"^def {test}\(", text_of(str(home)), re.MULTILINE) for home in homes), name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, inside):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_recipes_that_are_shown_are_valid(page, tmp_path):
    for block in blocks(page, "toml"):
        (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / "shown.toml")


def parsed(arguments: list[str]) -> list[str]:
    """Return what the program gets of a shell line: nothing after a redirection, a pipe or the next command."""
    for sign in (">", "|", "&&"):
        arguments = arguments[: arguments.index(sign)] if sign in arguments else arguments
    return arguments


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_shell_blocks_are_real_commands(page):
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words or "_LSMIX_COMPLETE" in line:  # completion has a test of its own
            continue
        assert words[0] in ("make", "lsmix"), line
        if words[0] == "make":
            assert words[1] in targets, line
        else:
            cli.commands[words[1]].make_context(words[1], parsed(words[2:]))


def test_completion_is_there():
    clean = {**os.environ, "_LSMIX_COMPLETE": "zsh_source"}
    code = "import sys; sys.argv[0] = 'lsmix'; from lsmix.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert "_lsmix_completion" in done.stdout


def keys_told(schema: str) -> set[str]:
    (row,) = (row for row in rows("docs/cli.md") if row[0] == f"`lsmix/{schema}/1`")
    return set(re.findall(r"`([^`]+)`", row[1]))


def answer(*arguments: str) -> dict:
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return msgspec.json.decode(done.stdout)


def test_json_is_as_the_reference_says(inside):
    pool = next((inside / "runs" / "mix").iterdir())
    asked = {
        "run": answer("run", "my.toml", "--quiet"),
        "status": answer("status", "my.toml"),
        "verify": answer("verify", str(pool)),
        "gc": answer("gc", "my.toml", "--set", "pools.lsmix.alpha=0.2"),
        "show": answer("show", str(pool), "--rows", "1"),
    }
    for name, document in asked.items():
        assert document["schema"] == f"lsmix/{name}/1"
    for name in ("status", "gc"):
        for entry in asked[name]["content"]:
            assert set(entry) <= keys_told(name)
    assert set(asked["verify"]["content"]) <= keys_told("verify")
    run = asked["run"]["content"]
    for entry in (run, *run["artifacts"], *run["error_rates"]):
        assert set(entry) <= keys_told("run")
    assert Path(asked["show"]["content"]["image"]).is_file()


def test_a_run_that_is_up_to_date_imports_no_torch(inside):
    code = (
        "import sys; sys.argv = ['lsmix', 'run', 'my.toml']\n"
        "from lsmix.cli import main\n"
        "main()\n"
        "assert not {'torch', 'matplotlib', 'dask'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 of " in done.stdout


def test_manifest_and_columns_are_as_the_formats_page_says(inside):
    page = text_of("docs/formats.md")
    pool = lsmix.open_pool("lsmix-pool")
    for name in (*pool.columns, *pool.columns.attributes, *msgspec.structs.asdict(pool.manifest)):
        assert f"`{name}`" in page, name


def test_the_table_of_pool_columns_is_the_declaration():
    shapes = {"number": "(M,)", "image": "(M, H, W, C)", "more": "(M, sources − 2)"}
    values = {"pixel": "0 to 255", "source": "rows of the train split", "label": "0 to classes − 1", "share": "0 to 1"}
    declared = [
        [
            f"`{column.name}`",
            f"{column.dtype} {shapes[column.row]}",
            values.get(column.kind) or ", ".join(f"{number} {word}" for number, word in enumerate(column.words)),
            column.description,
        ]
        for column in POOL_COLUMNS.values()
    ]
    text = text_of("docs/formats.md")
    _, _, table = text.partition("| column | type | values | |\n|---|---|---|---|\n")
    written = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()]
    assert written == declared
