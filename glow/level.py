"""The K steps of one level, computed together [P §2].

The one rule: three ways lead to the same numbers. With gradients, one operation whose gradient is written by hand;
without, the folded maps and the networks' weights, kept between calls in eval mode alone; and the steps themselves, one
layer after the other, which the other two are tested against.

Axes: B batch, C channels, H height, W width.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lsmix.glow.config import Scale
from lsmix.glow.conv1x1 import mix_channels
from lsmix.glow.coupling import log_scale_of
from lsmix.glow.folding import Folded, fold
from lsmix.glow.level_gradient import LevelOptions, couple_, level_forward
from lsmix.glow.network import NetworkWeights, run_network
from lsmix.glow.step import FlowStep

__all__ = ["FlowLevel", "FrozenLevel"]


class FrozenLevel(NamedTuple):
    """All that evaluation computes from the parameters and no image."""

    folded: Folded
    networks: list[NetworkWeights]


class FlowLevel(nn.ModuleList):
    """The steps of a level, from the squeeze to factoring out.

    Example:
        >>> import torch
        >>> from lsmix.glow.level import FlowLevel
        >>> level, x = FlowLevel(4, steps=2, hidden=8, scale="tanh"), torch.ones(2, 4, 2, 2)
        >>> y, log_det = level(x)
        >>> bool(torch.allclose(level.inverse(y), x)), log_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, channels: int, *, steps: int, hidden: int, scale: Scale) -> None:
        super().__init__(FlowStep(channels, hidden=hidden, scale=scale) for _ in range(steps))
        self.scale: Scale = scale
        self.network_dtype: torch.dtype | None = None  # bfloat16 while a trainer works in that precision
        self.rebuild = False  # whether activations are rebuilt on the way back: less memory, more work
        self._way_back: tuple[torch.Tensor, torch.Tensor] | None = None  # inverse maps to rebuild with
        self._frozen: FrozenLevel | None = None
        self._frozen_from: tuple[object, ...] = ()
        self._places: list[tuple[Mapping[str, torch.Tensor | None], str]] = []  # where parameters and buffers are

    def steps(self) -> Iterator[FlowStep]:
        """Go over the steps."""
        return (cast(FlowStep, step) for step in self)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (B, C, H, W) and the log-determinant (B,), float64."""
        if torch.is_grad_enabled():
            folded = fold(list(self.steps()), inverse=False)
            if self.rebuild and self._way_back is not None:
                folded = folded._replace(inverse_weight_KCC=self._way_back[0], inverse_bias_KC=self._way_back[1])
            couplings = [parameter for step in self.steps() for parameter in step.coupling.parameters()]
            options = LevelOptions(self.scale, self.network_dtype, self.rebuild)
            y_BCHW, log_det_B = level_forward(x_BCHW, folded, couplings, options)
        else:
            folded, networks = self.freeze()
            y_BCHW, log_det_B = x_BCHW, torch.zeros(len(x_BCHW), dtype=torch.float64, device=x_BCHW.device)
            for weight_CC, bias_C, network in zip(folded.weight_KCC, folded.bias_KC, networks, strict=True):
                y_BCHW = mix_channels(y_BCHW, weight_CC, bias_C)
                log_det_B += couple_(y_BCHW, network, self.scale)[0].sum(dim=(1, 2, 3))
        return y_BCHW, log_det_B + folded.log_det_per_pixel * (y_BCHW.shape[2] * y_BCHW.shape[3])

    def inverse(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the x (B, C, H, W) that ``forward`` maps to y."""
        if torch.is_grad_enabled():
            for step in reversed(list(self.steps())):
                y_BCHW = step.inverse(y_BCHW)
            return y_BCHW
        folded, networks = self.freeze()
        x_BCHW = y_BCHW.clone(memory_format=torch.channels_last)
        maps = zip(folded.inverse_weight_KCC, folded.inverse_bias_KC, networks, strict=True)
        for weight_CC, bias_C, network in reversed(list(maps)):
            y1_BCHW, y2_BCHW = x_BCHW.chunk(2, dim=1)
            shift_BCHW, raw_BCHW = run_network(y1_BCHW, network)[0].chunk(2, dim=1)
            log_scale_BCHW = log_scale_of(raw_BCHW, self.scale)
            y2_BCHW.mul_(log_scale_BCHW.neg_().exp_()).sub_(shift_BCHW)
            x_BCHW = mix_channels(x_BCHW, weight_CC, bias_C)
        return x_BCHW

    @torch.no_grad()
    def initialise(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Let every ActNorm initialise itself from this batch; return the level's output for it."""
        for step in self.steps():
            x_BCHW = step.initialise(x_BCHW)
        return x_BCHW

    @torch.no_grad()
    def set_rebuild(self, rebuild: bool) -> None:
        """Choose whether the way back rebuilds activations; if so, solve now for the maps that it takes.

        Solved here and not in ``forward``, since not every triangular solver can be part of a CUDA graph. The maps stay
        in the same memory, where a recorded graph reads them; so this is called again after each update.
        """
        self.rebuild = rebuild
        if not rebuild:
            return
        folded = fold(list(self.steps()))
        solved = folded.inverse_weight_KCC, folded.inverse_bias_KC
        kept = self._way_back
        if kept is None or (kept[0].device, kept[0].dtype) != (solved[0].device, solved[0].dtype):
            self._way_back = solved
        else:
            kept[0].copy_(solved[0])
            kept[1].copy_(solved[1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is computed from the parameters again."""
        blank: dict[str, Any] = {"_way_back": None, "_frozen": None, "_frozen_from": (), "_places": []}
        return {**self.__dict__, "rebuild": False, **blank}

    def train(self, mode: bool = True) -> "FlowLevel":
        """Switch between training and evaluation; forget what was frozen."""
        self._frozen = None
        super().train(mode)
        return self

    def freeze(self) -> FrozenLevel:
        """Return what evaluation needs, made again if a parameter was replaced, moved or written since the last time.

        torch's fused optimisers write parameters without raising their version (seen in 2.13), so versions alone would
        serve stale numbers; hence nothing is kept in training mode, and ``train`` and ``eval`` forget what was.
        """
        if not self._places:  # walking through all modules at each call would take 3% of a decode
            modules = list(self.modules())
            self._places = [(module._parameters, name) for module in modules for name in module._parameters]
            self._places += [(module._buffers, name) for module in modules for name in module._buffers]
        values = [cast(torch.Tensor, place[name]) for place, name in self._places]
        made_from = (self.network_dtype, *[(id(value), value._version, value.data_ptr()) for value in values])
        if self.training or self._frozen is None or made_from != self._frozen_from:
            couplings = [step.coupling for step in self.steps()]
            networks = [NetworkWeights.of(list(coupling.parameters()), self.network_dtype) for coupling in couplings]
            self._frozen = FrozenLevel(fold(list(self.steps())), networks)
            self._frozen_from = made_from
        return self._frozen
