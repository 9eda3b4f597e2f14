"""The documentation matches the code: commands, fields, exit codes and names are documented, and examples run."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner

import lsmix
from lsmix.cli import cli
from lsmix.data import errors
from lsmix.data.pool import POOL_COLUMNS
from lsmix.pipeline.config.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def rows(page: str) -> list[list[str]]:
    """Return the cells of all table rows of a page."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def reader_folder(tiny_recipe, finished_workspace, tmp_path_factory):
    """Return the folder of a README reader: my.toml, its finished runs, and a pool from someone else."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(tiny_recipe, folder / "my.toml")
    shutil.copytree(finished_workspace, folder / "runs")
    shutil.copytree(next((finished_workspace / "mix").glob("lsmix-*")), folder / "lsmix-pool")
    return folder


@pytest.fixture
def inside(reader_folder, monkeypatch):
    monkeypatch.chdir(reader_folder)
    return reader_folder


# Everything is documented.


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_an_example(name):
    command = cli.commands[name]
    assert command.help
    assert f"Example: lsmix {name}" in (command.epilog or "")
    assert all(parameter.help for parameter in command.params if isinstance(parameter, click.Option))
    arguments = shlex.split(str(command.epilog).removeprefix("Example: lsmix "))[1:]
    command.make_context(name, parsed(arguments))


def test_help_texts_contain_no_layout_marks():
    shown = CliRunner().invoke(cli, ["--help"]).output
    assert "\\b" not in shown  # click's mark against rewrapping does not work in a raw string
    assert "Exit codes: 0 done" in shown


def test_every_exit_code_is_documented():
    table = {row[0]: row for row in rows("docs/cli.md") if row[0].isdigit()}
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LsmixError)]
    for kind in kinds:
        if kind is not errors.LsmixError:
            assert f"`{kind.__name__}`" in table[str(kind.exit_code)][2]
    assert set(table) == {"0", "2", "130", "141", *(str(kind.exit_code) for kind in kinds)}


def test_every_state_is_documented():
    from lsmix.pipeline.engine.status import NodeStatus

    states = next(field.type for field in msgspec.structs.fields(NodeStatus) if field.name == "state").__args__
    assert {f"`{state}`" for state in states} <= {row[0] for row in rows("docs/cli.md")}


def test_every_field_option_and_column_of_the_reference_tables_is_described():
    pytest.importorskip("mkdocs", reason="needs pip install --group docs")
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    try:
        import reference_tables as reference
    finally:
        sys.path.pop(0)
    for page in ("recipe", "cli", "formats"):
        shown = reference.expanded(text_of(f"docs/{page}.md"))
        assert "<!--" not in shown
        for line in shown.splitlines():
            if line.startswith("| `"):
                assert line.strip("| ").rpartition(" | ")[2], line
    assert set(re.findall(r"<!-- fields: (.*) -->", text_of("docs/recipe.md"))) == set(reference.SECTIONS)
    assert re.search(r'\| `fit` \| `"crop"` \| .*pad.*stretch', reference.fields("data"))
    assert re.search(r"\| `alpha` \| `0.4` \| .*; above 0, at most 1,000,000 \|", reference.fields("pools.NAME"))
    assert "not in the cache key |" in next(
        line for line in reference.fields("flow").splitlines() if "temperature" in line
    )
    assert all(f"`{name}`" in reference.pool_columns() for name in POOL_COLUMNS)
    for name, command in cli.commands.items():
        page = reference.command_page(name)
        assert f"(commands/{name}.md)" in reference.commands()
        assert all(f"`{option}`" in page for one in command.params for option in one.opts if "-" in option)


def test_every_dependency_is_documented():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    documented = {name for row in rows("docs/dependencies.md") for name in row[0].split(", ")}
    assert {name_of(line) for line in project["dependencies"]} <= documented
    text = text_of("docs/dependencies.md")
    wanted = {
        *required_by("dev", list(project["optional-dependencies"])),
        *required_by("bench", []),
        *required_by("docs", []),
    }
    missing = {name for name in map(name_of, wanted) if not re.search(rf"\b{name}\b", text)}
    assert not missing, f"docs/dependencies.md does not describe {sorted(missing)}"


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=]", requirement)[0]


def test_every_public_name_exists_and_is_in_the_readme():
    wanted = {"load_flow", "mix_latents", "open_pool", "PoolLoader", "pull", "push", "rebuild", "run", "verify"}
    assert wanted <= set(lsmix.__all__) == set(dir(lsmix))
    for name in wanted:
        assert callable(getattr(lsmix, name))
        assert f"lsmix.{name}(" in text_of("README.md")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lsmix.nothing


def test_only_the_page_on_extensions_imports_modules_of_lsmix():
    pages = [
        *(ROOT / "docs").glob("*.md"),
        ROOT / "docs" / "tutorial.ipynb",
        ROOT / "README.md",
        *ROOT.glob("examples/*.py"),
    ]
    importing = [
        page.name for page in pages if re.search(r"from lsmix\.|import lsmix\.", page.read_text(encoding="utf-8"))
    ]
    assert importing == ["extending.md"]


def test_the_changelog_has_the_current_version():
    assert f"\n## {lsmix.__version__}" in text_of("CHANGELOG.md")


def test_the_workflow_tests_every_python_version_of_the_classifiers():
    kinds = tomllib.loads(text_of("pyproject.toml"))["project"]["classifiers"]
    named = [kind.rpartition(" ")[2] for kind in kinds if re.search(r"Python :: 3\.", kind)]
    assert (
        yaml.safe_load(text_of(".github/workflows/test.yml"))["jobs"]["tests"]["strategy"]["matrix"]["python"] == named
    )


@pytest.mark.parametrize(
    ("lock", "group", "extras"),
    [
        ("requirements", "dev", ["heic", "hub", "parquet", "report", "s3"]),
        ("requirements-bench", "bench", []),
    ],
)
def test_a_lock_file_pins_and_hashes_everything_and_names_no_index(lock, group, extras):
    lines = [line for line in text_of(f"{lock}.lock").splitlines() if not line.startswith("#")]
    pins = [line for line in lines if not line.startswith(" ")]
    names = {re.fullmatch(r"([a-z0-9-]+)==[a-z0-9.]+(?: ; [^;]+)? \\", line)[1] for line in pins}
    assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}(?: \\)?", line) for line in lines if line not in pins)
    assert not any(name.startswith(("nvidia", "triton", "cuda")) for name in names)
    assert text_of("requirements-torch.lock") == "torch==2.13.0\n"
    assert {name_of(line).lower() for line in required_by(group, extras)} - {"lsmix", "torch"} <= names


def required_by(group: str, extras: list[str]) -> Iterator[str]:
    content = tomllib.loads(text_of("pyproject.toml"))
    yield from content["project"]["dependencies"]
    for extra in extras:
        yield from content["project"]["optional-dependencies"][extra]
    for line in content["dependency-groups"][group]:
        yield from [line] if isinstance(line, str) else required_by(line["include-group"], [])


# Examples work.


@pytest.mark.parametrize("page", PAGES)
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", text_of(page)):
        inside = re.fullmatch(r"https://github\.com/lsmix/lsmix/(?:blob|raw)/main/(.+)", target)
        assert inside is None or (ROOT / inside[1]).exists(), target
        if not target.startswith("https://"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for name in re.findall(r"`((?:pipeline|glow|classifiers|data|tests|recipes)/[\w./]+)`", text_of(page)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, inside):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_shown_recipes_are_valid(page, tmp_path):
    for block in blocks(page, "toml"):
        (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
        read_recipe(tmp_path / "shown.toml")


def parsed(arguments: list[str]) -> list[str]:
    """Return the arguments of a shell line before a redirection, a pipe or the next command."""
    for sign in (">", "|", "&&"):
        arguments = arguments[: arguments.index(sign)] if sign in arguments else arguments
    return arguments


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_shell_blocks_are_real_commands(page):
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    for line in "".join(blocks(page, "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] in ("make", "lsmix", "pip"), line
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "lsmix":
            cli.commands[words[1]].make_context(words[1], parsed(words[2:]))


def documented_keys(schema: str) -> set[str]:
    (row,) = (row for row in rows("docs/cli.md") if row[0] == f"`lsmix/{schema}/1`")
    return set(re.findall(r"`([^`]+)`", row[1]))


def answer(*arguments: str) -> dict:
    done = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return msgspec.json.decode(done.stdout)


def test_json_output_matches_the_reference(inside):
    pool = next((inside / "runs" / "mix").iterdir())
    asked = {
        "run": answer("run", "my.toml", "--quiet"),
        "status": answer("status", "my.toml"),
        "verify": answer("verify", str(pool)),
        "gc": answer("gc", "my.toml", "--set", "pools.lsmix.alpha=0.2"),
        "show": answer("show", "mix/lsmix", "--image", "pool.png", "--rows", "1"),
        "ls": answer("ls"),
        "diff": answer("diff", "mix/lsmix", "encode/tiny"),
        "logs": answer("logs"),
        "log": answer("logs", "last"),
    }
    for name, document in asked.items():
        assert document["schema"] == f"lsmix/{name}/1"
    for name in ("status", "gc", "ls", "logs"):
        for entry in asked[name]["content"]:
            assert set(entry) <= documented_keys(name)
    assert set(asked["verify"]["content"]) <= documented_keys("verify")
    assert {*asked["diff"]["content"], *asked["diff"]["content"]["differences"][0]} <= documented_keys("diff")
    assert {"at", "event"} <= asked["log"]["content"][0].keys()
    run = asked["run"]["content"]
    for entry in (run, *run["artifacts"], *run["error_rates"]):
        assert set(entry) <= documented_keys("run")
    assert Path(asked["show"]["content"]["image"]).is_file()


def test_a_run_with_everything_up_to_date_does_not_import_torch(inside):
    code = (
        "import sys; sys.argv = ['lsmix', 'run', 'my.toml']\n"
        "from lsmix.cli import main\n"
        "main()\n"
        "assert not {'torch', 'matplotlib', 'dask'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 of " in done.stdout


def test_the_formats_page_has_all_fields_of_manifests_and_attributes(inside):
    page = text_of("docs/formats.md")
    pool = lsmix.open_pool("lsmix-pool")
    for name in (*pool.columns.attributes, *msgspec.structs.asdict(pool.manifest)):
        assert f"`{name}`" in page, name
