"""On unusual terminals and accounts, commands print plain errors with documented exit codes, no tracebacks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsmix.data.cache import cache_folder
from lsmix.data.errors import MissingError, escape_json
from lsmix.glow.checkpoint import load_flow, save_flow

LSMIX = [sys.executable, "-m", "lsmix"]


def run(*words: str | Path, shell: str = '"$@"', **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a shell that redirects its streams; characters that their encoding lacks must be escaped."""
    command = ["bash", "-c", shell, "bash", *LSMIX, *map(str, words)]
    return subprocess.run(
        command, check=False, capture_output=True, encoding="latin-1", env={**os.environ, **environment}
    )


@pytest.fixture
def pool(invented_pool: Callable[..., Path]) -> Path:
    """Return a pool with class names beyond Latin-1."""
    return invented_pool(class_names=("cat", "λ", "🦊"))


@pytest.mark.parametrize("encoding", ["latin-1:strict", "ascii:strict"])
def test_characters_that_the_terminal_lacks_are_escaped(pool: Path, tmp_path: Path, encoding: str) -> None:
    shown = run("show", pool, "--image", tmp_path / "🦊.png", PYTHONIOENCODING=encoding)
    assert (shown.returncode, "Traceback" in shown.stderr) == (0, False)
    if encoding.startswith("latin-1"):  # for ASCII, click writes UTF-8, because many systems report ASCII wrongly
        assert r"\U0001f98a.png" in shown.stdout
    document = run("show", pool, "--image", tmp_path / "🦊.png", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(document.stdout)["content"]["image"].endswith("🦊.png")
    missing = run("show", tmp_path / "🦊λ", PYTHONIOENCODING=encoding)
    assert (missing.returncode, "Traceback" in missing.stderr) == (1, False)


def test_json_escaped_to_ascii_is_the_same_document() -> None:
    text = json.dumps({"a": "ë λ 🦊 \u202e"}, ensure_ascii=False)
    for ascii_only in (True, False):
        assert json.loads(escape_json(text, ascii_only=ascii_only)) == json.loads(text)
    assert escape_json(text, ascii_only=True).isascii()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_output_to_closed_streams_is_discarded(pool: Path, tmp_path: Path, closed: str) -> None:
    sheet = tmp_path / "sheet.png"
    done = run("show", pool, "--image", sheet, shell=f'"$@" {closed}')
    assert (done.returncode, done.stderr) == (0, "")
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_with_closed_streams_an_error_has_its_exit_code(tmp_path: Path) -> None:
    assert run("show", tmp_path / "nothing", shell='"$@" <&- >&- 2>&-').returncode == 1


def test_a_closed_pipe_ends_the_command_silently_with_the_documented_code(tmp_path: Path) -> None:
    script = "import sys; sys.stdin.read(); sys.argv[1:] = ['init', 'demo']; import lsmix.cli; lsmix.cli.main()"
    # The reader holds the command's input open until it exits, so the command writes only after that.
    shell = f'mkfifo "$FIFO"; {sys.executable} -c "{script}" <"$FIFO" | true >"$FIFO"; echo ${{PIPESTATUS[0]}}'
    done = run("unused", shell=shell, FIFO=str(tmp_path / "fifo"))
    assert (done.stdout, done.stderr) == ("141\n", "")
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert "| 141 |" in documented


def test_a_broken_connection_is_not_mistaken_for_a_closed_output_pipe(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("lsmix.pipeline.config.recipes.recipe_text", broken)
    result = command("init", "demo")
    assert (result.code, result.err) == (1, "error: Broken pipe. Completed work is kept.\n")


def test_shell_completion_works() -> None:
    done = run(_LSMIX_COMPLETE="bash_source")
    assert (done.returncode, "complete" in done.stdout) == (0, True)


def test_an_unknown_home_folder_is_a_plain_error(tmp_path: Path, command: Callable[..., Any]) -> None:
    recipe = tmp_path / "my.toml"
    recipe.write_text('name = "x"\n[data]\npath = "~nosuchuser/data"\n')
    result = command("status", recipe, "--workspace", tmp_path / "runs")
    assert (result.code, "no home folder is known for '~nosuchuser'" in result.err) == (1, True)


def test_without_a_home_folder_the_error_says_how_to_set_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "LSMIX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingError, match="Set LSMIX_CACHE"):
        cache_folder()
    monkeypatch.setenv("LSMIX_CACHE", "somewhere")
    assert cache_folder() == Path("somewhere")


def test_for_a_flow_whose_weights_overflow_the_error_does_not_suggest_another_run(
    tiny_workspace: Path, tiny_recipe: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    (made,) = (tiny_workspace / "train-glow").iterdir()
    flow = load_flow(made)
    with torch.no_grad():
        for name, value in flow.named_parameters():
            if not name.endswith((".sign", ".permutation")):
                value.fill_(1e38)
    flow_folder = tmp_path / "flow"
    flow_folder.mkdir()
    save_flow(flow_folder, flow, {"class_names": []})
    with np.errstate(all="ignore"):
        result = command("encode", tiny_recipe, "--workspace", tiny_workspace, "--set", f"flow.path={flow_folder}")
    assert (result.code, "its weights are unusable" in result.err) == (5, True), result.err
    assert "run the same command again" not in result.err
