"""Ranks of torchrun train the same models as one process, write files once, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import SMALL_RECIPE, write_images
from safetensors.torch import load_file, save_file
from torch.nn import functional
from two_ranks import IMAGES, LABELS, STEPS, classifier, epochs, flow, losses

import lsmix
from lsmix.classifiers.evaluation import logits_of, seeded
from lsmix.data.artifact import read_manifest
from lsmix.data.errors import RecipeError
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.loaders.ranks import Ranks
from lsmix.pipeline.engine import torchrun

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 sums in another order, after a few updates
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # the same in float32


def start(*words: str | Path, rank: int, port: int, size: int = 2) -> "subprocess.Popen[str]":
    """Start a process like torchrun does."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Run two_ranks.py, which also resumes training started here; return its folder and each rank's results."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    begun = flow()
    losses(begun, 3)
    save_file(begun.state_dict(), folder / "flow-one.safetensors")
    learner = classifier()
    epochs(learner, 1)
    save_file(learner.state_dict(), folder / "classifier-one.safetensors")
    process = start(Path(__file__).with_name("two_ranks.py"), folder, rank=0, port=port)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return folder, [json.loads((folder / f"{rank}.json").read_bytes()) for rank in range(2)]


def test_two_ranks_train_a_flow_like_one_process(trained):
    folder, (first, second) = trained
    expected = losses(flow())
    assert first["flow"] == second["flow"]
    np.testing.assert_allclose(first["flow"], expected, **EXACT)
    states = [load_file(folder / f"flow-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_flow_can_be_resumed_with_another_number_of_ranks(trained):
    folder, (first, _) = trained
    expected = losses(flow())[3:]
    np.testing.assert_allclose(first["flow resumed"], expected, **EXACT)
    alone = flow(seed=9)
    alone.load_state_dict(load_file(folder / "flow-half-0.safetensors"))
    np.testing.assert_allclose(losses(alone, STEPS - 3), expected, **EXACT)


def test_recorded_steps_equal_plain_steps_and_recordings_contain_no_communication(trained):
    _, (first, second) = trained
    assert first["flow recorded"] == second["flow recorded"]
    np.testing.assert_allclose(first["flow recorded"], first["flow"], rtol=1e-7)  # the learning rate is float32
    assert first["recordings"] == 2


def two_parts(epochs: range, begun: Path | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process, with own batch-norm statistics and dropout per half batch; return losses and state."""
    halves, source, found = [classifier(), classifier()], ArrayLoader(IMAGES, LABELS, 16), []
    if begun:
        for half in halves:
            half.load_state_dict(load_file(begun))
    rate = halves[0].optimiser.param_groups[0]["lr"]  # constant
    for epoch in epochs:
        source.set_epoch(epoch)
        total, draws = 0.0, []
        for rank, half in enumerate(halves):
            half.epoch = epoch
            half.model.train()
            with seeded(torch.device("cpu"), 0, "dropout", epoch, *([rank] if rank else [])):
                draws.append(torch.get_rng_state())
        for index, batch in enumerate(source):
            images, target = halves[0]._prepare(batch, index)
            middle, sums = len(images) // 2, []
            for rank, rows in enumerate((slice(0, middle), slice(middle, None))):
                with seeded(torch.device("cpu"), 0):
                    torch.set_rng_state(draws[rank])
                    logits = logits_of(halves[rank].model, images[rows], "float32")
                    draws[rank] = torch.get_rng_state()
                loss = functional.cross_entropy(logits, target[rows], reduction="sum")
                total += loss.item()
                sums.append(torch.autograd.grad(loss, list(halves[rank].model.parameters())))
            for half in halves:
                for weight, *parts in zip(half.model.parameters(), *sums, strict=True):
                    weight.grad = sum(parts) / len(images)
                torch.nn.utils.clip_grad_norm_(half.model.parameters(), half.config.grad_clip)
                assert half.optimiser.param_groups[0]["lr"] == rate
                half.optimiser.step()
        for one, other in zip(*(half.model.buffers() for half in halves), strict=True):
            if one.is_floating_point():
                one.copy_((one + other) / 2)
                other.copy_(one)
        found.append(total / len(IMAGES))
    return found, halves[0].model.state_dict()


def test_a_classifier_equals_one_process_with_the_statistics_of_each_half_batch(trained):
    folder, (first, second) = trained
    expected, weights = two_parts(range(2))
    assert first["classifier"] == second["classifier"]
    assert [row[1:] for row in first["classifier"]] == [[3, 41], [3, 41]]
    np.testing.assert_allclose([row[0] for row in first["classifier"]], expected, **CLOSE)
    states = [load_file(folder / f"classifier-{rank}.safetensors") for rank in range(2)]
    for name, tensor in weights.items():
        torch.testing.assert_close(states[0][f"model.{name}"], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(states[0][f"model.{name}"], states[1][f"model.{name}"]), name


def test_one_process_resumes_a_classifier(trained):
    folder, _ = trained
    alone = classifier(seed=0)
    alone.load_state_dict(load_file(folder / "classifier-half-0.safetensors"))
    assert alone.epoch == 1
    assert epochs(alone, 1)[0][1:] == [3, 41]


def test_two_ranks_resume_a_classifier_started_by_one_process(trained):
    folder, (first, second) = trained
    expected, _ = two_parts(range(1, 2), folder / "classifier-one.safetensors")
    assert first["classifier resumed"] == second["classifier resumed"]
    np.testing.assert_allclose([row[0] for row in first["classifier resumed"]], expected, **CLOSE)


def test_a_signal_to_one_rank_stops_all_and_the_first_rank_broadcasts(trained):
    _, found = trained
    assert all(rank["stopped"] and rank["broadcast"] == 5 for rank in found)


def test_batches_that_cannot_be_divided_among_the_ranks_are_rejected_before_any_work(monkeypatch):
    monkeypatch.setattr(torchrun, "_joined", [Ranks(size=3)])
    torchrun.check_ranks("flow.training.batch_size", 9, last_batch=3)
    for numbers, text in (((8,), "batches of 8 images cannot"), ((9, 2), "with a last batch of 2, cannot")):
        with pytest.raises(RecipeError, match=rf"^flow\.training\.batch_size: .*{text} be divided among 3 ranks"):
            torchrun.check_ranks("flow.training.batch_size", *numbers)


def test_a_process_that_joined_others_exits_without_finalizing_python():
    assert torchrun.leave_ranks(3) == 3  # this process joined no others
    script = (
        "import atexit; from lsmix.data.loaders.ranks import join_ranks; from lsmix.pipeline.engine.torchrun import leave_ranks\n"
        "atexit.register(print, 'finalized'); join_ranks(); print('kept', end=''); leave_ranks(3)"
    )
    alone = start("-c", script, rank=0, port=free_port(), size=1)
    assert alone.communicate(timeout=60) == ("kept", "")
    assert alone.returncode == 3


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_images(tmp_path / "images.npz", np.arange(24) % 3, np.arange(6) % 3)
    path = tmp_path / "small.toml"
    path.write_text(SMALL_RECIPE.partition("[naturalness]")[0].replace("iterations = 2", "iterations = 60"))
    return path


@pytest.mark.slow
def test_a_killed_rank_ends_all_ranks_and_torchrun_resumes(recipe):
    words = ("-m", "lsmix", "train", recipe, "--workspace", recipe.parent / "runs", "--device", "cpu")
    port = free_port()
    processes = [start(*words, rank=rank, port=port) for rank in range(2)]
    while not list(recipe.parent.glob("runs/train-glow/*/work/checkpoint.safetensors")):
        assert processes[0].poll() is None, processes[0].stderr.read()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    printed, errors = processes[0].communicate(timeout=60)
    assert (processes[0].returncode, printed) == (1, "")
    assert "error: another rank exited, so this rank stops too." in errors
    processes[1].communicate()

    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run([sys.executable, *map(str, launch + words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("artifacts made") == 1
    assert "train-glow small: on 2 ranks" in done.stderr
    alone = lsmix.run(recipe, workspace=recipe.parent / "alone", stage="train-glow", device="cpu")
    for stage, world_size in (("ingest", 1), ("train-glow", 2), ("encode", 1), ("train", 2)):
        (folder,) = (recipe.parent / "runs" / stage).iterdir()
        assert read_manifest(folder).environment["world_size"] == world_size
    (two_ranks,) = (recipe.parent / "runs" / "train-glow").iterdir()
    logs = [
        [json.loads(line)["loss_bits_per_dim"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (two_ranks, alone["train-glow"].folder)
    ]
    assert len(logs[0]) == 60
    np.testing.assert_allclose(logs[0], logs[1], rtol=1e-3)  # differences grow over 60 updates
    np.testing.assert_allclose(logs[0][:5], logs[1][:5], **CLOSE)
