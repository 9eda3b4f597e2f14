"""User errors end with one error line and the documented exit code, never with a traceback, and change nothing."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lsmix
from lsmix.cli import cli
from lsmix.data.errors import RecipeError
from lsmix.pipeline.config.recipes import builtin_recipes

STAGES = ("ingest", "train-glow", "encode", "mix", "train", "report")


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def is_clean_error(result, code=1):
    """Return whether a command failed with an empty stdout, a final error line on stderr, and the exit code."""
    last = result.err.splitlines()[-1] if result.err else ""
    return (result.code, result.out) == (code, "") and last.startswith("error: ") and "Traceback" not in result.err


@pytest.fixture
def recipe_of(tmp_path):
    """Return a function that writes a recipe for a data set at a path."""

    def write(path, more="", name="mine"):
        recipe = tmp_path / "my.toml"
        recipe.write_text(f'name = "{name}"\n[data]\npath = {json.dumps(str(path))}\n{more}')
        return recipe

    return write


def batch(count=20, **more):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3072), np.uint8)
    return {b"data": images, b"labels": [int(i) % 10 for i in range(count)], **more}


def cifar_folder(folder, **replaced):
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        content = replaced.get(name, pickle.dumps(batch(), protocol=2))
        if content is not None:
            (folder / name).write_bytes(content)
    names_of_classes = [f"class{number}".encode() for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names_of_classes}, protocol=2))
    return folder


class Evil:
    def __reduce__(self):
        return (Path.write_text, (Path("evil-was-here"), "x"))


BAD_BATCHES = {
    "truncated": (pickle.dumps(batch(), protocol=2)[:-1000], "data_batch_3"),
    "empty": (b"", "data_batch_3"),
    "text": (b"<html>404 not found</html>", "data_batch_3"),
    "other keys": (pickle.dumps({b"images": 1}, protocol=2), "data_batch_3"),
    "other lengths": (pickle.dumps(batch(labels=[1]) | {b"labels": [1]}, protocol=2), "data_batch_3"),
    "code": (pickle.dumps({b"data": Evil()}, protocol=2), "which was not run"),
    "gone": (None, "data_batch_3"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_an_invalid_batch_file_is_named_and_never_executed(tmp_path, recipe_of, command, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_BATCHES[kind]
    folder = cifar_folder(tmp_path / "cifar", data_batch_3=content)
    recipe = recipe_of(folder, 'format = "cifar10-python"\nheldout = 10\n')
    result = command("ingest", recipe, "--workspace", tmp_path / "runs")
    assert is_clean_error(result), result
    assert message in result.err
    assert "data_batch_3" in result.err
    assert not list(tmp_path.glob("runs/ingest/*")), "no files must remain of a data set that could not be read"
    assert not (tmp_path / "evil-was-here").exists()


def test_a_complete_batch_folder_is_read(tmp_path, recipe_of, command):
    recipe = recipe_of(cifar_folder(tmp_path / "cifar"), "heldout = 10\n")
    assert command("ingest", recipe, "--workspace", tmp_path / "runs").code == 0


def image_folder(folder, damage):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            side = 9 if damage == "mixed sizes" and (name, number) == ("dog", 3) else 8
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name / f"{number}.png")
    if damage == "unreadable":
        (folder / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    if damage == "truncated":
        whole = (folder / "dog" / "3.png").read_bytes()
        (folder / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("damage", ["mixed sizes", "unreadable", "truncated"])
def test_an_invalid_image_is_named(tmp_path, recipe_of, command, damage):
    recipe = recipe_of(image_folder(tmp_path / "pictures", damage), "heldout = 2\ntest = 2\n")
    result = command("ingest", recipe, "--workspace", tmp_path / "runs")
    assert is_clean_error(result), result
    assert "3.png" in result.err
    assert not list(tmp_path.glob("runs/ingest/*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('format = "npz"\n', "is a folder; the format of this source is a file"),
        ('format = "cifar10-binary"\n', "error: "),
        ("heldout = 100\ntest = 2\n", "12 training images − 100 held-out − 2 test"),
        ("test = 12\n", "12 training images − 0 held-out − 12 test = 0 left for train"),
        ("heldout = 1\n", "would leave no test images"),
    ],
)
def test_an_impossible_split_or_format_is_rejected(tmp_path, recipe_of, command, more, message):
    recipe = recipe_of(image_folder(tmp_path / "pictures", ""), more)
    result = command("ingest", recipe, "--workspace", tmp_path / "runs")
    assert is_clean_error(result), result
    assert message in result.err
    assert not list(tmp_path.glob("runs/ingest/*"))


@pytest.mark.parametrize("command_name", ["run", "status", "gc", *STAGES])
def test_a_missing_recipe_or_data_set_is_named(tmp_path, recipe_of, command, command_name):
    workspace = tmp_path / "runs"
    assert is_clean_error(command(command_name, tmp_path / "no.toml", "--workspace", workspace))
    assert is_clean_error(command(command_name, tmp_path, "--workspace", workspace))
    recipe = recipe_of(tmp_path / "no-data", "[pools.a]\n[runs.a]\n")
    result = command(command_name, recipe, "--workspace", workspace)
    assert is_clean_error(result), result
    assert "no-data" in result.err
    assert not workspace.exists()


@pytest.mark.parametrize("command_name", ["verify", "show"])
def test_a_path_that_is_not_an_artifact_is_rejected(tmp_path, command, command_name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for path in ("nothing", "empty", "file", "binary\x01name"):
        assert is_clean_error(command(command_name, tmp_path / path)), path


@pytest.mark.parametrize("command_name", ["run", "mix", "status", "gc"])
def test_an_invalid_field_does_not_harm_existing_artifacts(tiny_recipe, tiny_workspace, command, command_name):
    before = snapshot(tiny_workspace)
    for override in ("pools.lsmix.alpah=1", "pools.lsmix.alpha=0", "flow.path=nobody", "runs.lsmix.pool=x", "nothing"):
        result = command(command_name, tiny_recipe, "--workspace", tiny_workspace, "--set", override)
        assert is_clean_error(result), result
        assert result.err.count("\n") == 1
    assert snapshot(tiny_workspace) == before


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("run", "a.toml", "--nonsense"),
        ("run", "a.toml", "--workers", "-1"),
        ("run", "a.toml", "--workers", "x"),
        ("show", "x", "--rows", "0"),
        ("gc",),
    ],
)
def test_an_invalid_command_line_exits_with_2(command, words):
    result = command(*words)
    assert (result.code, result.out) == (2, "")
    assert "Usage: " in result.err


@pytest.mark.parametrize(("device", "message"), [("tpu", "device 'tpu' is unknown"), ("cuda:99", "device 'cuda:99'")])
def test_an_unknown_device_is_rejected_before_any_work(tiny_recipe, tiny_workspace, command, device, message):
    shutil.rmtree(tiny_workspace / "encode")
    result = command("encode", tiny_recipe, "--workspace", tiny_workspace, "--device", device)
    assert is_clean_error(result), result
    assert message in result.err
    assert not list(tiny_workspace.glob("encode/*"))


def test_system_errors_are_reported_in_one_line(tiny_recipe, tiny_workspace, tmp_path, command, monkeypatch):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the workspace should be")
    result = command("ingest", tiny_recipe, "--workspace", occupied)
    assert is_clean_error(result), result
    assert "occupied" in result.err
    assert is_clean_error(command("ingest", tiny_recipe, "--workspace", "/proc/nowhere"))

    def denied(*words, **more):
        raise PermissionError(13, "Permission denied", "runs/ingest")

    shutil.rmtree(tiny_workspace / "ingest")
    with monkeypatch.context() as closed:
        closed.setattr(Path, "mkdir", denied)
        result = command("ingest", tiny_recipe, "--workspace", tiny_workspace)
    assert is_clean_error(result)
    assert "error: Permission denied: 'runs/ingest'" in result.err

    def too_much(*words, **more):
        raise MemoryError("Unable to allocate 1.00 TiB")

    monkeypatch.setattr("lsmix.data.readers.dataset_writer.write_dataset", too_much)
    result = command("ingest", tiny_recipe, "--workspace", tiny_workspace)
    assert is_clean_error(result)
    assert "this needs more memory than there is: Unable to allocate 1.00 TiB" in result.err


def test_a_flow_for_images_of_another_shape_is_rejected(tiny_workspace, recipe_of, tmp_path, command):
    flow = next((tiny_workspace / "train-glow").iterdir())
    pictures = image_folder(tmp_path / "pictures", "")
    recipe = recipe_of(pictures, f'heldout = 2\ntest = 2\n[flow]\npath = "{flow}"\n')
    result = command("encode", recipe, "--workspace", tmp_path / "other", "--device", "cpu")
    assert is_clean_error(result), result
    assert "images do not match this flow: expected uint8 (N, 8, 8, 1), got uint8 (8, 8, 8, 3)" in result.err


def test_training_without_test_images_is_rejected(recipe_of, tmp_path, command):
    np.savez(tmp_path / "a.npz", images=np.zeros((40, 8, 8, 1), np.uint8), labels=np.arange(40) % 4)
    recipe = recipe_of(tmp_path / "a.npz", "heldout = 4\n[classifier]\nwidth = 4\nepochs = 1\n[runs.a]\n")
    result = command("train", recipe, "--workspace", tmp_path / "runs", "--device", "cpu")
    assert is_clean_error(result), result


def test_json_output_is_one_document_with_its_schema(tiny_recipe, tiny_workspace, tmp_path, command):
    pool = next((tiny_workspace / "mix").iterdir())
    for kind, words in [
        ("status", ("status", tiny_recipe)),
        ("run", ("run", tiny_recipe)),
        ("status", ("run", tiny_recipe, "--dry-run")),
        ("run", ("mix", tiny_recipe)),
        ("gc", ("gc", tiny_recipe)),
        ("ls", ("ls",)),
        ("diff", ("diff", tiny_recipe, tiny_recipe)),
        ("logs", ("logs",)),
        ("log", ("logs", "last")),
        ("verify", ("verify", pool)),
        ("show", ("show", pool, "--image", tmp_path / "sheet.png")),
    ]:
        result = command(*words, "--workspace", tiny_workspace, "--json")
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert document.keys() == {"schema", "content"}
        assert document["schema"] == f"lsmix/{kind}/1"


def test_the_json_output_of_a_run_lists_every_artifact(tiny_recipe, tiny_workspace, command):
    content = json.loads(command("run", tiny_recipe, "--workspace", tiny_workspace, "--json", "-q").out)["content"]
    assert [item["stage"] for item in content["artifacts"]] == [
        "ingest", "train-glow", "encode", "mix", "mix", "train", "train", "train", "report",
    ]  # fmt: skip
    assert all(item["cached"] for item in content["artifacts"])
    assert [row["run"] for row in content["error_rates"]] == ["baseline", "lsmix"]
    assert Path(content["report"]).is_file()


def test_a_dry_run_changes_nothing(tiny_recipe, tiny_workspace, recipe_of, tmp_path, command):
    before = snapshot(tiny_workspace)
    recipe = recipe_of(image_folder(tmp_path / "pictures", ""), "heldout = 2\ntest = 2\n[pools.a]\n[runs.a]\n")
    for name in ("run", *STAGES):
        result = command(name, tiny_recipe, "--workspace", tiny_workspace, "--dry-run", "--set", "data.seed=7")
        assert result.code == 0
        assert "seed 0 → 7" in result.out
        for more in (("--dry-run",), ("--dry-run", "--json")):
            assert command(name, recipe, "--workspace", tmp_path / "new", *more).code == 0
    assert snapshot(tiny_workspace) == before
    command("status", recipe, "--workspace", tmp_path / "new")
    assert not (tmp_path / "new").exists(), "the checksum cache must not be written either"


def test_a_dry_run_with_force_shows_what_would_be_rebuilt(tiny_recipe, tiny_workspace, command):
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace, "--dry-run", "--force")
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["cached"] * 3 + ["to-run"] * 2


def test_status_check_exits_with_3_unless_everything_is_up_to_date(tiny_recipe, tiny_workspace, command):
    words = ("status", tiny_recipe, "--workspace", tiny_workspace, "--check")
    assert command(*words).code == 0
    result = command(*words, "--set", "report.title=New")
    assert result.code == 3
    assert "error: 1 of 9 artifacts are not up to date" in result.err
    shutil.rmtree(tiny_workspace / "encode")
    assert command(*words).code == 3


def test_status_says_what_an_artifact_waits_for(tiny_recipe, tmp_path, command):
    lines = command("status", tiny_recipe, "--workspace", tmp_path / "runs").out.splitlines()
    assert lines[0].split() == ["state", "artifact", "size", "time", "why"]
    assert lines[1].split()[:3] == ["to-run", "ingest", "tiny"]
    assert lines[1].endswith("was never made")
    assert all(line.startswith("waits ") for line in lines[2:])


def test_quiet_prints_no_progress(tiny_recipe, tiny_workspace, command):
    assert command("run", tiny_recipe, "--workspace", tiny_workspace, "-q").err == ""


@pytest.mark.parametrize(("stage", "section"), [("mix", "[pools.NAME]"), ("train", "[runs.NAME]")])
def test_a_stage_without_its_recipe_section_reports_it(recipe_of, tmp_path, command, stage, section):
    recipe = recipe_of(image_folder(tmp_path / "pictures", ""), "heldout = 2\ntest = 2\n")
    result = command(stage, recipe, "--workspace", tmp_path / "runs")
    assert is_clean_error(result)
    assert f"has no {section}, which the stage {stage!r} needs" in result.err
    assert command("status", recipe, "--workspace", tmp_path / "runs").code == 0


def test_init_lists_the_recipes_and_prints_one(command):
    lines = command("init").out.splitlines()
    assert lines == [line[:80] for line in lines]
    assert [line.split()[0] for line in lines] == builtin_recipes()
    assert command("init", "demo").out.startswith("#")
    assert is_clean_error(command("init", "dmeo"))


def test_the_recipe_defaults_to_lsmix_toml_and_the_workspace_to_the_environment(
    tiny_recipe, finished_workspace, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    missing = command("status")
    assert (missing.code, "no recipe at 'lsmix.toml'" in missing.err) == (1, True)
    assert "'lsmix init demo > my.toml'" in command("status", "demo").err
    shutil.copy(tiny_recipe, "lsmix.toml")
    monkeypatch.setenv("LSMIX_WORKSPACE", str(finished_workspace))
    assert command("status", "--check").code == 0
    assert command("status", "--check", "--workspace", "runs").code == 3


def test_ls_lists_every_artifact_with_its_inputs_and_marks_unfinished_work(tiny_workspace, command):
    (pool,) = (tiny_workspace / "mix").glob("lsmix-*")
    (pool / "manifest.json").unlink()
    where = ("--workspace", tiny_workspace)
    table = [line.split() for line in command("ls", *where).out.splitlines()]
    found = json.loads(command("ls", *where, "--json").out)["content"]
    assert [row[:3] for row in table[1:]] == [[item["stage"], item["name"], item["cache_key"]] for item in found]
    assert {f"{item['name']}-{item['cache_key']}" for item in found} == {
        path.name for path in tiny_workspace.glob("*/*-*") if path.is_dir()
    }
    assert [item["name"] for item in found if not item["complete"]] == ["lsmix"]
    keys = {item["stage"]: item["cache_key"] for item in found}
    assert next(item for item in found if item["stage"] == "encode")["inputs"] == {
        "dataset": keys["ingest"],
        "flow": keys["train-glow"],
    }


def test_the_overview_has_each_command_once_with_a_complete_text(command):
    lines = command("--help").out.splitlines()
    named = [line.split()[0] for line in lines if re.match(r"  [a-z-]+  +[A-Z]", line)]
    assert sorted(named) == sorted(cli.commands)
    assert not [line for line in lines if len(line) > 80 or re.match(r"  [a-z].*\.\.\.$", line)]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_with_an_example(command, name):
    result = command(name, "--help")
    assert result.code == 0
    assert f"Example: lsmix {name}" in result.out


def test_a_cached_run_imports_no_heavy_packages(tiny_recipe, tiny_workspace):
    script = (
        "import sys; from lsmix.cli import main; main(); "
        "print(sorted({'torch', 'dask', 'distributed', 'zarr', 'matplotlib'} & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", script, "run", tiny_recipe, "--workspace", tiny_workspace]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_entry_point_exits_with_the_documented_codes(tmp_path):
    for code, words in ((0, ["--version"]), (1, ["run", tmp_path / "no.toml"]), (2, ["nonsense"])):
        done = subprocess.run([sys.executable, "-m", "lsmix", *words], check=False, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)


@pytest.mark.parametrize("options", [{"stage": "train_glow"}, {"force": "train_glow"}])
def test_an_unknown_stage_is_rejected_with_a_suggestion(tiny_recipe, tmp_path, options):
    with pytest.raises(RecipeError, match=r"unknown stage 'train_glow'. Did you mean 'train-glow'\?"):
        lsmix.run(tiny_recipe, workspace=tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("passive", "1000")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
    ],
)
def test_waiting_threads_spin_briefly_unless_the_user_sets_otherwise(monkeypatch, command, chosen, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert command("--version").code == 0
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == expected


@pytest.fixture
def runs_in_cwd(tiny_recipe, tiny_workspace, tmp_path, monkeypatch):
    """Change to a folder with lsmix.toml and a workspace "runs", and return the workspace."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_recipe, "lsmix.toml")
    return tiny_workspace


def test_an_artifact_is_named_by_path_name_or_key(runs_in_cwd, command, monkeypatch):
    (pool,) = runs_in_cwd.glob("mix/lsmix-*")
    key = pool.name.rpartition("-")[2]
    for name in ("lsmix", "mix/lsmix", pool.name, key, key[:6], f"runs/mix/{pool.name}"):
        assert json.loads(command("show", name, "--json").out)["content"]["cache_key"] == key, name
    several = command("show", "tiny")
    assert is_clean_error(several)
    assert "'tiny' could be ingest/tiny-" in several.err
    assert is_clean_error(command("show", "nothing"))
    for words in (("verify", "lsmix", "--deep", "--data", "ingest/tiny", "--flow", "tiny"), ("card", "lsmix", "card")):
        assert command(*words).code == 0
    assert is_clean_error(command("card", "encode/tiny", "other")), "only pools have a card"
    monkeypatch.setenv("LSMIX_WORKSPACE", "elsewhere")
    assert is_clean_error(command("show", "lsmix"))


def test_show_writes_an_image_only_on_request(runs_in_cwd, command):
    before = snapshot(Path())
    result = command("show", "mix/lsmix")
    assert (result.code, ".png" in result.out) == (0, False)
    assert snapshot(Path()) == before
    assert is_clean_error(command("show", "mix/lsmix", "--rows", "4"))


def test_diff_lists_the_fields_that_differ(runs_in_cwd, command):
    text = Path("lsmix.toml").read_text(encoding="utf-8")
    Path("b.toml").write_text(text.replace('"tiny"', '"other"').replace("alpha = 0.4", "alpha = 0.7"), encoding="utf-8")
    table = [line.split() for line in command("diff", "lsmix.toml", "b.toml").out.splitlines()]
    assert table == [["field", "lsmix.toml", "b.toml"], ["name", "tiny", "other"], ["pools.lsmix.alpha", "0.4", "0.7"]]
    found = json.loads(command("diff", "mix/lsmix", "encode/tiny", "--json").out)["content"]["differences"]
    assert {"field": "stage", "a": "mix", "b": "encode"} in found
    assert "do not differ" in command("diff", "mix/lsmix", "mix/lsmix").out
    assert is_clean_error(command("diff", "lsmix.toml", "mix/lsmix"))


def test_logs_lists_runs_and_prints_one(runs_in_cwd, command):
    assert command("mix", "--force", "-q").code == 0
    (runs_in_cwd / ".logs" / "20000101T000000.0-cut-1.jsonl").write_bytes(b'{"at":"x","event":"begin","stage":"","comm')
    newest, *_, oldest = (line.split() for line in command("logs").out.splitlines()[1:])
    assert newest[-3:] == ["done", "mix", "lsmix.toml"]
    assert oldest[-1] == "unfinished"
    lines = command("logs", "last").out.splitlines()
    assert ("begin" in lines[0], "outcome done" in lines[-1]) == (True, True)
    assert command("logs", "2000").out == "\n"
    for wrong in ("nothing", "2"):
        assert is_clean_error(command("logs", wrong))


COMPLETED = {
    "sta": "status",
    "init de": "demo",
    "status --scale s": "small",
    "run --set flow.training.it": "flow.training.iterations=",
    "run --set pools.lsmix.alp": "pools.lsmix.alpha=",
    "run --device cp": "cpu",
    "show lsm": "mix/lsmix-",
    "export mix/lsmix out --format web": "webdataset",
    "logs la": "last",
}


def test_shells_complete_commands_recipes_and_artifacts(runs_in_cwd, command, monkeypatch):
    with Path("lsmix.toml").open("a", encoding="utf-8") as file:
        file.write("\n[scale.small.data]\nheldout = 4\n")

    for shell in ("bash", "zsh", "fish"):
        assert "_lsmix_completion" in command("completion", shell).out
    monkeypatch.setenv("_LSMIX_COMPLETE", "bash_complete")
    for words, expected in COMPLETED.items():
        monkeypatch.setenv("COMP_WORDS", f"lsmix {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert f"plain,{expected}" in command().out, words


def test_tables_fit_the_terminal_and_are_complete_elsewhere(runs_in_cwd, command, monkeypatch):
    shutil.rmtree(runs_in_cwd / "mix")
    changed = [word for key in ("alpha", "seed", "copies", "tolerance") for word in ("--set", f"pools.lsmix.{key}=3")]
    for words in (
        ("status", *changed),
        ("ls",),
        ("show", "encode/tiny"),
        ("diff", "ingest/tiny", "encode/tiny"),
        ("logs",),
    ):
        monkeypatch.delenv("COLUMNS", raising=False)
        whole = command(*words)
        assert whole.code == 0
        monkeypatch.setenv("COLUMNS", "80")
        lines = command(*words).out.splitlines()
        assert max(map(len, lines)) <= 80, lines
        assert len(lines) >= len(whole.out.splitlines())
