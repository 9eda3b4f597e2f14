"""A model and its Adam optimiser as one flat dictionary of tensors, and back.

The one rule: names, shapes and types must all fit before anything is restored, so a refused state changes nothing.

Names are "model.<name>", "adam.<parameter>.<exp_avg | exp_avg_sq | step>" and "counter.<name>".
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lsmix.data.errors import FormatError

__all__ = ["flat_state", "restore_state"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def flat_state(model: nn.Module, optimiser: torch.optim.Adam, counters: Mapping[str, int]) -> dict[str, Tensor]:
    """Return copies of all parameters, buffers, moments and counters, contiguous and on the CPU."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for part, tensor in optimiser.state[parameter].items() if parameter in optimiser.state else ():
            state[f"adam.{name}.{part}"] = tensor
    state |= {f"counter.{name}": torch.tensor(count, dtype=torch.int64) for name, count in counters.items()}
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def restore_state(
    model: nn.Module, optimiser: torch.optim.Adam, counters: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, int]:
    """Put a state from ``flat_state`` into the model and the optimiser, and return the named counters.

    A state from before the first update has no moments at all, and clears those of the optimiser.

    Raises:
        FormatError: a tensor is missing, unknown, or of another shape or type.
    """
    parameters = dict(model.named_parameters())
    trained = any(name.startswith("adam.") for name in state)
    _check(state, _expected(model, counters, with_moments=trained))

    model.load_state_dict({name: state[f"model.{name}"] for name in model.state_dict()})
    optimiser.state.clear()
    for name, parameter in parameters.items() if trained else ():
        moments = {part: torch.empty_like(parameter).copy_(state[f"adam.{name}.{part}"]) for part in _MOMENTS}
        # Adam keeps its step on the CPU unless it is capturable, which ours is not.
        optimiser.state[parameter] = {"step": state[f"adam.{name}.step"].detach().to("cpu").clone(), **moments}
    return {name: int(state[f"counter.{name}"]) for name in counters}


def _expected(model: nn.Module, counters: Sequence[str], *, with_moments: bool) -> dict[str, Tensor]:
    """Return a tensor of the right shape and type for every name; empty ones on no device, so that they cost nothing."""
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    expected |= {f"counter.{name}": torch.empty((), dtype=torch.int64, device="meta") for name in counters}
    for name, parameter in model.named_parameters() if with_moments else ():
        expected |= {f"adam.{name}.{part}": parameter for part in _MOMENTS}
        expected[f"adam.{name}.step"] = torch.empty((), dtype=torch.float32, device="meta")
    return expected


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
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
