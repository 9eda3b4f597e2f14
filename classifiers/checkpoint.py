"""A model and its optimiser as one flat dictionary of tensors, and back.

Names, shapes and types must all fit before anything is restored, so a refused state changes nothing.

Names are "model.<name>", "counter.<name>", and for each parameter that was updated "adam.<name>.<exp_avg | exp_avg_sq |
step>" or "sgd.<name>.momentum_buffer".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.evaluation import seeded
from lsmix.classifiers.registry import build_classifier
from lsmix.data.atomic import check_tensor_header, write_atomic
from lsmix.data.errors import CorruptError, FormatError, MissingError

__all__ = ["check_tensors", "flat_state", "load_classifier", "restore_state", "save_classifier"]

_STEP = "step"  # of Adam, a float32 scalar

# What an optimiser keeps for each parameter, like it in shape and type, but for the step.
_PARTS: Mapping[type[torch.optim.Optimizer], tuple[str, tuple[str, ...]]] = {
    torch.optim.Adam: ("adam", ("exp_avg", "exp_avg_sq", _STEP)),
    torch.optim.SGD: ("sgd", ("momentum_buffer",)),
}


def flat_state(model: nn.Module, optimiser: torch.optim.Optimizer, counters: Mapping[str, int]) -> dict[str, Tensor]:
    """Return copies of all parameters, buffers, moments and counters, contiguous and on the CPU.

    ``optimiser`` is torch's Adam or SGD.
    """
    kind, parts = _PARTS[type(optimiser)]
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = optimiser.state.get(parameter, {})  # get adds nothing to this defaultdict
        # SGD without momentum keeps None.
        state |= {f"{kind}.{name}.{part}": kept[part] for part in parts if kept.get(part) is not None}
    state |= {f"counter.{name}": torch.tensor(count, dtype=torch.int64) for name, count in counters.items()}
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def restore_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, counters: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, int]:
    """Put a state from ``flat_state`` into the model and the optimiser, and return the named counters.

    A parameter that was not updated yet, as all are before the first update, has no moments, and loses those it has.

    Raises:
        FormatError: a tensor is missing, unknown, or of another shape or type; such as those of another optimiser.
    """
    kind, parts = _PARTS[type(optimiser)]
    moved = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f"{kind}.{name}.{part}" in state for part in parts)
    }
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    # On no device, so that they cost nothing.
    expected |= {f"counter.{name}": torch.empty((), dtype=torch.int64, device="meta") for name in counters}
    for name, parameter in moved.items():
        scalar = torch.empty((), dtype=torch.float32, device="meta")
        expected |= {f"{kind}.{name}.{part}": scalar if part == _STEP else parameter for part in parts}
    check_tensors(state, expected)

    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    optimiser.state.clear()
    for name, parameter in moved.items():
        optimiser.state[parameter] = {
            # Adam keeps its step on the CPU unless it is capturable, which ours is not.
            part: state[f"{kind}.{name}.{part}"].detach().to("cpu").clone()
            if part == _STEP
            else torch.empty_like(parameter).copy_(state[f"{kind}.{name}.{part}"])
            for part in parts
        }
    return {name: int(state[f"counter.{name}"]) for name in counters}


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless ``state`` has exactly the expected names, with tensors of the same shapes and types."""
    for names, what in ((expected.keys() - state.keys(), "lacks"), (state.keys() - expected.keys(), "has the unknown")):
        if names:
            raise FormatError(
                f"the classifier's state {what} tensor {min(names)!r}: it belongs to another configuration. Train again."
            )
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise FormatError(
                f"tensor {name!r} of the classifier's state: expected {tensor.dtype} {tuple(tensor.shape)}, "
                f"got {got.dtype} {tuple(got.shape)}. It belongs to another configuration. Train again."
            )


def save_classifier(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers; the same numbers give the same bytes."""
    tensors = {
        name: tensor.detach()
        .to("cpu")
        .clone(memory_format=torch.contiguous_format)  # tied weights share no memory then
        for name, tensor in model.state_dict().items()
    }
    write_atomic(path, save(tensors))


def load_classifier(
    weights: Path,
    config: ClassifierTraining,
    classes: int,
    image_shape: tuple[int, int, int],
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return the trained network in evaluation mode: float images (B, C, H, W) in [0, 1] to logits (B, classes).

    ``image_shape`` is (H, W, C). The global random state is left as it was.

    Raises:
        MissingError: there is no such file.
        CorruptError: it is no readable safetensors file.
        FormatError: its tensors are not those of the configuration's network.
        RecipeError: the network cannot be built.

    Example:
        >>> import tempfile
        >>> from lsmix.classifiers.training import ClassifierTrainer
        >>> config = ClassifierTraining(width=4)
        >>> trained = ClassifierTrainer(config, 10, (8, 8, 1), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_classifier(Path(folder) / "w.safetensors", trained.model)
        ...     load_classifier(Path(folder) / "w.safetensors", config, 10, (8, 8, 1)).training
        False
    """
    if not weights.is_file():
        raise MissingError(f"no weights of a classifier at {str(weights)!r}. Name the file that 'lsmix train' made.")
    with seeded(torch.device("cpu"), 0, "load"):  # what is drawn here is replaced, but must not move the global state
        model = build_classifier(config, classes, image_shape)
    try:
        check_tensor_header(weights)
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{str(weights)!r} is damaged: {error}. Train again.") from error
    try:
        check_tensors(tensors, model.state_dict())
    except FormatError as error:
        raise FormatError(f"{str(weights)!r}: {error}") from error
    model.load_state_dict(tensors)
    return model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it for modules
