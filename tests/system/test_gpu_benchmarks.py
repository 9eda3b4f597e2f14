"""The GPU measurements, at toy size on the CPU: every section runs, files are written, and later calls resume."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOW = ("levels", "steps", "hidden", "bits", "training")


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    """Put the checkout on sys.path, like ``python -m benchmarks``, and unset OUT."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("OUT", raising=False)


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_tiny_run_measures_every_section_and_writes_its_files(tmp_path, monkeypatch):
    (tmp_path / "returned").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "returned"))
    folder = tmp_path / "results"
    assert module("gpu").main(["--tiny", "--out", str(folder)]) == 0
    sections = read(folder)["sections"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(sections, "done")
    assert set(module("gpu")._SECTIONS) | {"tests marked gpu"} == set(sections)
    assert all(section["rows"] for section in sections.values())
    profiles = {f"profile-{name}.txt" for name in ("training-step-float32", "training-step-tf32", "encode", "decode")}
    wanted = {"README.md", "results.json", "log.txt", "tests.txt", *profiles}
    assert {path.name for path in folder.iterdir()} == wanted
    assert {path.name for path in (tmp_path / "returned" / "results").iterdir()} == wanted
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "| | measured | predicted | measured / predicted | details |" in page
    assert "one NVIDIA H100" in page
    (exact,) = (row for row in sections["flow: NumPy to NumPy"]["rows"] if row["what"].startswith("exact"))
    assert exact["measured"] == exact["predicted"] == module("gpu_sections").TINY.images


def test_sections_that_fail_or_exceed_their_time_limit_are_recorded_and_the_rest_runs(tmp_path):
    results = module("sections").Results(tmp_path, "a title", {})

    def slow() -> None:
        results.add("before", 1.0, "ms")
        while True:
            time.sleep(0.01)

    def wrong() -> None:
        raise ValueError("no such kernel")

    assert not results.section("slow", slow, seconds=0.2)
    assert not results.section("wrong", wrong, seconds=10)
    assert not results.section("late", slow, seconds=-1.0)
    assert results.section("right", lambda: results.add("figure", 2.0, "ms", 4.0), seconds=10)
    sections = read(tmp_path)["sections"]
    assert "time limit reached" in sections["slow"]["status"]
    assert [row["what"] for row in sections["slow"]["rows"]] == ["before"]
    assert "time limit reached" in sections["late"]["status"]
    assert not sections["late"]["rows"]
    assert "no such kernel" in sections["wrong"]["traceback"]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| figure | 2 ms | 4 ms | 0.50 |" in page
    assert "no such kernel" in page


@pytest.mark.parametrize("name", ["gpu", "evidence"])
def test_without_a_cuda_device_the_programs_exit_with_a_message(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        module(name).main(["--out", str(tmp_path / "results")])
    assert isinstance(stop.value.code, str)  # printed, with exit code 1
    assert "needs a CUDA device" in stop.value.code
    assert not (tmp_path / "results").exists()


# gpu-evidence in several calls.


def evidence(folder: Path, *words: str) -> dict[str, Any]:
    """Run gpu-evidence at toy size with its folders below ``folder``; return the sections."""
    places = ["--out", str(folder / "out"), "--carry", str(folder / "carry"), "--workspace", str(folder / "runs")]
    assert module("evidence").main(["--tiny", *places, *words]) == 0
    return read(folder / "out")["sections"]


@pytest.mark.slow
def test_later_calls_resume_from_carried_files_without_training_the_flow_again(tmp_path):
    assert list(evidence(tmp_path, "--steps", "1")) == ["flow"]
    pieces = list((tmp_path / "carry").iterdir())
    assert all(path.stat().st_size < 16 << 20 for path in pieces)
    shutil.rmtree(tmp_path / "runs")  # another machine
    shutil.rmtree(tmp_path / "out")
    sections = evidence(tmp_path)
    assert {section["status"] for section in sections.values()} == {"done"}
    assert len(sections) == 2 + 3 + 4
    exact = sections["round trips"]["rows"][0]
    assert (exact["measured"], exact["unit"]) == (50, "of 50")
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "train-glow evidence: up to date" in log
    assert "train-glow evidence: done" not in log
    assert "All steps are done." in log


@pytest.mark.slow
def test_an_interrupted_training_resumes_from_its_carried_checkpoint(tmp_path, monkeypatch):
    module_ = module("evidence")
    evidence(tmp_path / "whole", "--steps", "1")

    @contextlib.contextmanager
    def time_is_over(seconds):
        yield lambda: True

    def interrupt(_log: Any, _units: int = 1, note: str = "") -> None:
        if note:  # only training reports a note, the bits per dimension
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(module_, "_interrupt_after", time_is_over)
        patched.setattr(module_._Log, "advance", interrupt, raising=False)
        assert evidence(tmp_path / "parts", "--steps", "1")["flow"]["status"] == "interrupted"
    (unfinished,) = (tmp_path / "parts" / "runs" / "train-glow").iterdir()
    assert not (unfinished / "manifest.json").exists()
    shutil.rmtree(tmp_path / "parts" / "runs")
    assert evidence(tmp_path / "parts", "--steps", "1")["flow"]["status"] == "done"
    weights = [next((tmp_path / name / "runs").glob("train-glow/*/glow.safetensors")) for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    log = (tmp_path / "parts" / "out" / "log.txt").read_text(encoding="utf-8")
    assert "checkpoint.safetensors" in log  # it was restored


def test_a_call_without_time_left_does_nothing_and_lists_the_remaining_steps(tmp_path, capsys):
    assert evidence(tmp_path, "--minutes", "0") == {}
    assert "To do: flow, round trips, pool lsmix" in capsys.readouterr().out


def test_without_data_the_error_names_the_missing_file(tmp_path, monkeypatch):
    module_ = module("evidence")
    monkeypatch.setattr(module_, "require_cuda", lambda: "cpu")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "data_batch_1.bin").touch()
    words = ["--data", str(tmp_path / "given"), "--workspace", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match=r"data_batch_2\.bin is missing.*--data") as stop:
        module_.main(words)
    assert isinstance(stop.value.code, str)


def test_the_flow_equals_the_flow_of_table_1_and_the_recipe_of_every_step_is_valid(tmp_path):
    from lsmix.pipeline.config.recipe import read_recipe

    module_ = module("evidence")
    path = tmp_path / "evidence.toml"
    shared = (ROOT / "benchmarks" / "evidence.toml").read_text(encoding="utf-8")
    for run, lines in module_._RUNS.items():
        pools = "".join(map(module_._pool_section, module_._POOLS))
        path.write_text(f"{shared}{pools}\n[runs.{run}]\n{lines}\n", encoding="utf-8")
        recipe = read_recipe(path)
    paper = read_recipe(ROOT / "recipes" / "table1-cifar10.toml")
    assert [getattr(recipe.flow, name) for name in FLOW] == [getattr(paper.flow, name) for name in FLOW]
    assert recipe.flow.training.iterations == 8200
    assert {pool.alpha for pool in recipe.pools.values()} == {0.4}
    assert {pool.copies for pool in recipe.pools.values()} == {10}


# Files that are carried between machines.


def test_sheets_restore_the_published_bytes_and_a_changed_pixel_is_detected(tmp_path):
    from PIL import Image

    sheets = module("sheets")
    module("evidence")._invent_batches(tmp_path / "batches")
    sheets.pack(tmp_path / "batches", tmp_path / "sheets")
    sheets.unpack(tmp_path / "sheets", tmp_path / "again")
    for name in sheets.BATCHES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "batches" / name).read_bytes(), name
    path = tmp_path / "sheets" / "part2" / "test_batch.webp"
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(path, lossless=True)
    with pytest.raises(SystemExit, match=r"test_batch\.webp"):
        sheets.unpack(tmp_path / "sheets", tmp_path / "again")


def test_pieces_join_to_the_same_files_and_any_damage_is_detected(tmp_path):
    carry = module("carry")
    root, target = tmp_path / "root", tmp_path / "pieces"
    contents = {"a/large.bin": os.urandom(1000), "a/b/empty": b"", "exact": b"x" * 256}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    carry.split(root, [root / name for name in contents], target, piece_bytes=128)
    assert all(path.stat().st_size <= 128 for path in target.glob("*.piece"))
    assert carry.join(target, tmp_path / "again") == list(contents)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in contents} == contents
    assert carry.join(target, tmp_path / "again") == []  # existing files are kept

    for path in sorted(target.glob("*.piece")):
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        shutil.rmtree(tmp_path / "again")
        with pytest.raises(SystemExit, match="missing or damaged"):
            carry.join(target, tmp_path / "again")
        path.write_bytes(content)
        (tmp_path / "again").mkdir(exist_ok=True)

    (root / "a/large.bin").write_bytes(b"new")
    carry.split(root, [root / "a/large.bin"], target, piece_bytes=128)
    assert len(list(target.glob("*.piece"))) == 1  # unused pieces are removed


def test_gpu_packages_makes_the_checkout_importable_with_its_metadata(tmp_path):
    packages = module("gpu_packages")
    packages.prepare(tmp_path / "packages")
    packages.prepare(tmp_path / "packages")  # again
    code = "import lsmix, importlib.metadata as m; print(lsmix.__file__); print(m.version('lsmix'), lsmix.__version__)"
    words = [sys.executable, "-S", "-c", code]  # -S: without installed packages
    printed = subprocess.check_output(words, env={"PYTHONPATH": str(tmp_path / "packages")}, cwd=tmp_path, text=True)
    file, versions = printed.splitlines()
    assert Path(file) == tmp_path / "packages" / "lsmix" / "__init__.py"
    assert len(set(versions.split())) == 1
    with pytest.raises(SystemExit, match="No wheels"):
        packages.prepare(tmp_path / "packages", tmp_path)


# Glow against peers.


def test_a_contender_that_does_not_invert_is_reported_and_not_dropped(capsys):
    glow = module("glow")

    class Fixed:
        def __init__(self, error: float) -> None:
            self.call = lambda _: error

    figures = glow._inversions({"good": Fixed(1e-6), "bad": Fixed(0.02), "broken": Fixed(float("nan"))}, "float32")
    assert figures["bad, largest error"] == 0.02
    printed = capsys.readouterr().out
    assert "bad exceeds the tolerance" in printed
    assert "broken exceeds the tolerance" in printed
    assert "good exceeds" not in printed
    glow._inversions({"bad": Fixed(0.02)}, "tf32")
    assert "exceeds" not in capsys.readouterr().out


def test_the_ratio_to_the_best_peer_is_the_median_over_turns_with_its_minimum_and_maximum():
    rates = {"lsmix": [10.0, 12.0, 33.0], "normflows": [1.0] * 3, "nflows": [2.0] * 3, "FrEIA": [10.0, 10.0, 30.0]}
    table = {name: {"rates": values, "per_second": sorted(values)[1]} for name, values in rates.items()}
    figures = module("glow").against_peers(table)
    assert figures == {"lsmix against the best peer, FrEIA": 1.1, "lsmix, least": 1.0, "lsmix, most": 1.2}
