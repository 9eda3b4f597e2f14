"""Saving and loading flows: ``glow.safetensors`` for the weights, ``glow.json`` for architecture and metadata.

Checkpoints are untrusted input: architecture, tensor names, types, shapes and the checksum are checked before any
tensor is allocated, and nothing in a checkpoint is executed.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lsmix.data.artifact import Artifact
from lsmix.data.atomic import DECODE_ERRORS, check_tensor_header, decode_versioned, write_atomic
from lsmix.data.errors import CorruptError, FormatError, format_bytes
from lsmix.data.store import open_flow_artifact
from lsmix.glow.config import FlowConfig
from lsmix.glow.flow import Flow

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "WEIGHTS_NAME", "load_flow", "save_flow"]

FORMAT_VERSION = 2
CONFIG_NAME = "glow.json"
WEIGHTS_NAME = "glow.safetensors"
_JSON_BYTES_CAP = 1 << 24
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


class _Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: Literal["lsmix-glow"] = "lsmix-glow"
    format_version: int = FORMAT_VERSION
    config: FlowConfig
    weights_sha256: str
    metadata: dict[str, Any]  # for example the number of iterations and the class names


def save_flow(folder: Path, flow: Flow, metadata: dict[str, Any]) -> None:
    """Write a flow to ``folder``, the JSON file last. Equal flows produce equal bytes.

    ``metadata`` may contain any JSON values.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in flow.state_dict().items()}
    weights = save_tensors(tensors)
    checkpoint = _Checkpoint(config=flow.config, weights_sha256=hashlib.sha256(weights).hexdigest(), metadata=metadata)
    content = msgspec.json.format(msgspec.json.encode(checkpoint, order="sorted"), indent=1)
    write_atomic(folder / WEIGHTS_NAME, weights)
    write_atomic(folder / CONFIG_NAME, content + b"\n")


def load_flow(path: Path | str | Artifact, device: str | torch.device = "cpu") -> Flow:
    """Load a flow in evaluation mode from an artifact's folder or URL, or from any folder that contains its two files.

    Raises:
        MissingError: The folder or file does not exist, or the URL has no complete artifact.
        DownloadError: The URL cannot be reached.
        FormatError: The checkpoint has another kind or version, or lsmix does not accept its architecture.
        CorruptError: The checkpoint is damaged, or its tensors do not match its architecture.
    """
    artifact = open_flow_artifact(path)
    checkpoint = _read_checkpoint(artifact)
    weights_path, where = artifact.file(WEIGHTS_NAME), artifact.where(WEIGHTS_NAME)
    with torch.device("meta"):
        blank = Flow(checkpoint.config, seed=None)
    _check_header(weights_path, where, blank)
    weights = weights_path.read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != checkpoint.weights_sha256:
        raise CorruptError(
            f"{where!r} is damaged: expected sha256 {checkpoint.weights_sha256[:12]}…, got {digest[:12]}…. "
            "Download or train the flow again."
        )
    tensors = load_tensors(weights)
    _check_values(where, tensors)
    flow = Flow(checkpoint.config, seed=None)  # to_empty() would import sympy, which takes a second
    flow.load_state_dict(tensors)
    return flow.to(device).eval()


def _read_checkpoint(artifact: Artifact) -> _Checkpoint:
    where = artifact.where(CONFIG_NAME)
    with artifact.open(CONFIG_NAME) as file:
        content = file.read(_JSON_BYTES_CAP + 1)
    if len(content) > _JSON_BYTES_CAP:
        raise FormatError(f"{where!r} does not describe a flow: it is larger than {format_bytes(_JSON_BYTES_CAP)}.")
    try:
        what, remedy = f"{where!r} is a flow of", "Use the version of lsmix that wrote it, or train the flow again."
        return decode_versioned(content, _Checkpoint, FORMAT_VERSION, what=what, remedy=remedy)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where!r} does not describe a flow that lsmix accepts: {error}.") from error
    except DECODE_ERRORS as error:
        raise CorruptError(f"{where!r} is damaged: {error}. Download or train the flow again.") from error


def _check_header(path: Path, where: str, blank: Flow) -> None:
    """Check the names, types and shapes in the file against the architecture, before any tensor is read."""
    expected = {name: (_DTYPES[value.dtype], list(value.shape)) for name, value in blank.state_dict().items()}
    try:
        check_tensor_header(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - safe_open returns no dict
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{where!r} is damaged: {error}. Download or train the flow again.") from error
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CorruptError(
                f"{where!r} does not match its {CONFIG_NAME}: tensor {name!r}: expected {expected.get(name, 'none')}, "
                f"got {found.get(name, 'none')}. Download or train the flow again."
            )


def _check_values(where: str, tensors: dict[str, torch.Tensor]) -> None:
    """Reject values that training cannot produce, such as NaN and permutations that index out of bounds."""
    for name, value in tensors.items():
        good = bool(torch.isfinite(value).all())
        if name.endswith(".permutation"):
            good = bool((value.sort().values == torch.arange(len(value))).all())
        elif name.endswith(".sign"):
            good = bool((value.abs() == 1.0).all())
        if not good:
            raise CorruptError(f"{where!r} contains invalid values in {name!r}. Download or train the flow again.")
