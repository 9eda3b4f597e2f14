"""Conversion of a model and its optimiser to one flat dictionary of tensors, and back.

All names, shapes and dtypes are checked before anything is restored, so a rejected state changes nothing.

The names are "model.<name>", "counter.<name>", and for each parameter that was updated "sgd.<name>.momentum_buffer" or
"adam.<name>.<exp_avg | exp_avg_sq | step>".
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lsmix.data.errors import FormatError

__all__ = ["check_tensors", "flat_state", "restore_state"]

_STEP = "step"  # Adam's step count, a float32 scalar

# The tensors that an optimiser keeps for each parameter. All but the step have the parameter's shape and dtype.
_PARTS: Mapping[type[torch.optim.Optimizer], tuple[str, tuple[str, ...]]] = {
    torch.optim.Adam: ("adam", ("exp_avg", "exp_avg_sq", _STEP)),
    torch.optim.SGD: ("sgd", ("momentum_buffer",)),
}


def flat_state(model: nn.Module, optimiser: torch.optim.Optimizer, counters: Mapping[str, int]) -> dict[str, Tensor]:
    """Return contiguous copies of all parameters, buffers, moments and counters on the CPU.

    ``optimiser`` must be torch's Adam or SGD.
    """
    kind, parts = _PARTS[type(optimiser)]
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = optimiser.state.get(parameter, {})  # unlike [], get does not add entries to this defaultdict
        # SGD without momentum stores None.
        state |= {f"{kind}.{name}.{part}": kept[part] for part in parts if kept.get(part) is not None}
    state |= {f"counter.{name}": torch.tensor(count, dtype=torch.int64) for name, count in counters.items()}
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def restore_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, counters: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, int]:
    """Load a state from ``flat_state`` into the model and the optimiser, and return the named counters.

    Parameters without moments in the state were not updated when it was saved; the optimiser's moments for them are
    cleared.

    Raises:
        FormatError: A tensor is missing, unknown, or of another shape or dtype, for instance from another optimiser.
    """
    kind, parts = _PARTS[type(optimiser)]
    updated = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f"{kind}.{name}.{part}" in state for part in parts)
    }
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    # Tensors on "meta" have a shape and dtype but use no memory.
    expected |= {f"counter.{name}": torch.empty((), dtype=torch.int64, device="meta") for name in counters}
    for name, parameter in updated.items():
        scalar = torch.empty((), dtype=torch.float32, device="meta")
        expected |= {f"{kind}.{name}.{part}": scalar if part == _STEP else parameter for part in parts}
    check_tensors(state, expected)

    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    optimiser.state.clear()
    fused = optimiser.param_groups[0].get("fused")  # fused Adam keeps its step on the parameter's device, else the CPU
    for name, parameter in updated.items():
        optimiser.state[parameter] = {
            # With the parameter's strides, because fused kernels read both in the same memory order.
            part: torch.empty_like(parameter, requires_grad=False).copy_(state[f"{kind}.{name}.{part}"])
            if part != _STEP
            else state[f"{kind}.{name}.{part}"].detach().to(parameter.device if fused else "cpu", copy=True)
            for part in parts
        }
    return {name: int(state[f"counter.{name}"]) for name in counters}


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless ``state`` has exactly the expected names, with tensors of the same shapes and dtypes."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    for names, problem in ((missing, "lacks"), (unknown, "has an unknown")):
        if names:
            raise FormatError(
                f"the state {problem} tensor {min(names)!r}: it belongs to another configuration. Remove it and train "
                "again."
            )
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise FormatError(
                f"tensor {name!r} of the state: expected {tensor.dtype} {tuple(tensor.shape)}, "
                f"got {got.dtype} {tuple(got.shape)}. It belongs to another configuration. Remove it and train again."
            )
