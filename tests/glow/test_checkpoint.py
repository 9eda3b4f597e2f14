"""Checkpoints of a flow: loading restores the saved flow and rejects damaged or forged files."""

import functools
import hashlib
import json

import numpy as np
import pytest
import torch
from factory import complete_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from lsmix.data.errors import CorruptError, FormatError, LsmixError, MissingError
from lsmix.glow.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_flow, save_flow
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 1), dtype=np.uint8)
METADATA = {"bits_per_dim": 1.5, "name": "λ"}


@functools.cache
def _flow():
    flow = Flow(FlowConfig(height=6, width=4, channels=1, levels=2, steps=2, hidden=4))
    trainer = FlowTrainer(flow, FlowTraining(batch_size=8, learning_rate=1e-2), IMAGES)
    for _ in range(3):
        trainer.step()
    return flow.eval()


@pytest.fixture
def folder(tmp_path):
    save_flow(tmp_path / "flow", _flow(), METADATA)
    return tmp_path / "flow"


def _edit_json(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder, **changes):
    """Replace tensors and update the checksum, as a forger would."""
    tensors = load_file(folder / WEIGHTS_NAME)
    content = save(tensors | changes)
    (folder / WEIGHTS_NAME).write_bytes(content)
    _edit_json(folder, weights_sha256=hashlib.sha256(content).hexdigest())


def test_a_loaded_flow_equals_the_saved_flow(folder):
    flow = load_flow(folder)
    assert flow.config == _flow().config
    assert bool(flow.initialised), "ActNorm would be initialised again"
    for name, value in _flow().state_dict().items():
        assert torch.equal(flow.state_dict()[name], value)
    assert np.array_equal(flow.encode(IMAGES), _flow().encode(IMAGES))
    assert json.loads((folder / CONFIG_NAME).read_text())["metadata"] == METADATA
    assert not flow.training
    assert next(flow._levels()[1].steps()).coupling.weight_in.is_contiguous(memory_format=torch.channels_last), (
        "another memory layout would be slow"
    )


def test_saving_a_loaded_flow_again_writes_the_same_bytes(folder, tmp_path):
    save_flow(tmp_path / "again", load_flow(folder), METADATA)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_file_sizes_of_an_artifact_are_checked_first(folder):
    complete_artifact(folder, stage="train-glow")
    assert isinstance(load_flow(folder), Flow)
    with (folder / WEIGHTS_NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptError, match=r"expected [\d,]+ bytes, got"):
        load_flow(folder)


def test_errors_name_missing_folders_and_files(folder, tmp_path):
    with pytest.raises(MissingError, match="the folder does not exist"):
        load_flow(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"glow\.json is missing"):
        load_flow(tmp_path)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(MissingError, match=r"glow\.safetensors' is missing"):
        load_flow(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_in_the_weights_is_detected(folder, data):
    path = folder / WEIGHTS_NAME
    good = path.read_bytes()
    offset = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[offset] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bad)
    try:
        with pytest.raises(CorruptError):
            load_flow(folder)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_damaged_json_is_reported_as_damaged(folder, content):
    (folder / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CorruptError, match=r"glow\.json' is damaged"):
        load_flow(folder)


def test_other_kinds_and_versions_are_rejected(folder):
    _edit_json(folder, format_version=3)
    with pytest.raises(FormatError, match=r"is a flow of format 3; this version of lsmix reads format 2"):
        load_flow(folder)
    _edit_json(folder, kind="vae", format_version=2)
    with pytest.raises(FormatError, match="does not describe a flow that lsmix accepts: Invalid enum value 'vae'"):
        load_flow(folder)
    (folder / CONFIG_NAME).write_text("[]")
    with pytest.raises(FormatError, match="does not describe a flow that lsmix accepts"):
        load_flow(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden", 10**9), ("steps", 10**6), ("levels", 40), ("height", 10**6), ("depth", 3)]
)
def test_an_architecture_beyond_the_caps_is_rejected(folder, field, value):
    config = json.loads((folder / CONFIG_NAME).read_text())["config"]
    _edit_json(folder, config=config | {field: value})
    with pytest.raises(FormatError, match="does not describe a flow that lsmix accepts"):
        load_flow(folder)


def test_an_architecture_that_does_not_match_the_weights_is_rejected_before_it_is_built(folder):
    config = json.loads((folder / CONFIG_NAME).read_text())["config"]
    _edit_json(folder, config=config | {"channels": 16, "levels": 8, "hidden": 4096})  # would take terabytes
    with pytest.raises(CorruptError, match=r"does not match its glow\.json: tensor"):
        load_flow(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("levels.0.0.conv1x1.permutation", torch.tensor([0, 1, 2, 99])),
        ("levels.0.0.conv1x1.sign", torch.zeros(4)),
        ("levels.0.0.actnorm.shift", torch.full((4,), torch.nan)),
    ],
)
def test_forged_values_are_rejected(folder, name, value):
    _edit_weights(folder, **{name: value})
    with pytest.raises(CorruptError, match="contains invalid values"):
        load_flow(folder)


@pytest.mark.parametrize("changes", [{"extra": torch.zeros(1)}, {"initialised": torch.zeros(3)}])
def test_tensors_with_unexpected_names_or_types_are_rejected(folder, changes):
    _edit_weights(folder, **changes)
    with pytest.raises(CorruptError, match="does not match its"):
        load_flow(folder)


def test_truncated_weights_raise_an_lsmix_error(folder):
    content = (folder / WEIGHTS_NAME).read_bytes()
    for size in (0, 7, 8, 100, len(content) - 1):
        (folder / WEIGHTS_NAME).write_bytes(content[:size])
        with pytest.raises(LsmixError):
            load_flow(folder)
