"""A model and its optimiser as one flat dictionary of tensors, and back.

Names, shapes and types must all fit before anything is restored, so a refused state changes nothing.

Names are "model.<name>", "counter.<name>", and for each parameter that was updated "adam.<name>.<exp_avg | exp_avg_sq |
step>" or "sgd.<name>.momentum_buffer".
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lsmix.data.errors import FormatError

__all__ = ["check_tensors", "flat_state", "restore_state"]

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
    fused = optimiser.param_groups[0].get("fused")  # then Adam keeps its step beside the parameter, else on the CPU
    for name, parameter in moved.items():
        optimiser.state[parameter] = {
            # With the parameter's own strides, since fused kernels read both in one order.
            part: torch.empty_like(parameter, requires_grad=False).copy_(state[f"{kind}.{name}.{part}"])
            if part != _STEP
            else state[f"{kind}.{name}.{part}"].detach().to(parameter.device if fused else "cpu", copy=True)
            for part in parts
        }
    return {name: int(state[f"counter.{name}"]) for name in counters}


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless ``state`` has exactly the expected names, with tensors of the same shapes and types."""
    for names, what in ((expected.keys() - state.keys(), "lacks"), (state.keys() - expected.keys(), "has the unknown")):
        if names:
            raise FormatError(
                f"the state {what} tensor {min(names)!r}: it belongs to another configuration. Remove it and train again."
            )
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise FormatError(
                f"tensor {name!r} of the state: expected {tensor.dtype} {tuple(tensor.shape)}, "
                f"got {got.dtype} {tuple(got.shape)}. It belongs to another configuration. Remove it and train again."
            )
