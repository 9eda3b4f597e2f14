"""Training of a flow step by step, so that callers can log, save and stop between steps [P B.3], and sampling.

Step i depends only on (seed, i) and on the state after step i − 1, so resumed and uninterrupted training produce the
same bytes.

Axes: B batch, C channels, H height, W width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import torch

from lsmix.data.errors import DivergedError, RecipeError
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.batch import to_device
from lsmix.data.loaders.cuda_graph import Replayed, can_record
from lsmix.data.loaders.ranks import ALONE, Ranks
from lsmix.data.loaders.training_state import flat_state, restore_state
from lsmix.data.rng import generator
from lsmix.glow.config import FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.pixels import dequantise, draw_noise, pad_images

__all__ = ["FlowTrainer", "StepResult", "augment", "learning_rate", "sample"]

_EVALUATION_BATCH = 64  # images
_STEPS_AHEAD = 16  # steps queued on a GPU before the host waits
_BETAS = (0.9, 0.999)  # [P B.3]
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # state of torch's Adam for each parameter


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one step."""

    iteration: int  # index of the step, from 0
    loss_bits_per_dim: float  # of the batch, before the update
    grad_norm: float  # nats/dim, before clipping


def learning_rate(config: FlowTraining, iteration: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or half a cosine wave down to 0."""
    rate = config.learning_rate * min(1.0, (iteration + 1) / max(config.warmup, 1))
    if config.schedule == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * iteration / config.iterations)
    return rate


def augment(images: np.ndarray, rng: np.random.Generator, *, translate: int, flip: bool) -> np.ndarray:
    """Shift uint8 images (B, H, W, C) by up to ``translate`` pixels, zero-padded; mirror each with probability ½."""
    B, H, W, _ = images.shape
    down, right = rng.integers(0, 2 * translate + 1, size=(2, B))
    mirrored = (rng.random((B,)) < 0.5) & flip
    columns = np.where(mirrored[:, None], np.arange(W)[::-1], np.arange(W)) + right[:, None]
    rows = np.arange(H) + down[:, None]
    t = translate
    framed = np.pad(images, ((0, 0), (t, t), (t, t), (0, 0)))
    return np.asarray(framed[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]])


@contextmanager
def _as_configured(flow: Flow, config: FlowTraining) -> Iterator[None]:
    """Compute coupling networks in the configured precision; 1×1 convolutions stay float32 (see ``mix_channels``)."""
    try:
        with arithmetic(config.precision, convolutions_only=True):
            flow.set_network_dtype(torch.bfloat16 if config.precision == "bf16" else None)
            yield
    finally:
        flow.set_network_dtype(None)
        flow.set_rebuild(False)


class FlowTrainer:
    """Train ``flow`` in place, on its current device, on uint8 images (N, H, W, C).

    With several ``ranks``, training computes the same steps as one process, up to the summation order of gradients.

    Example:
        >>> import numpy as np
        >>> from lsmix.glow.config import FlowConfig, FlowTraining
        >>> from lsmix.glow.flow import Flow
        >>> from lsmix.glow.training import FlowTrainer
        >>> flow = Flow(FlowConfig(height=4, width=4, channels=1, levels=1, steps=1, hidden=4))
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
        >>> trainer = FlowTrainer(flow, FlowTraining(batch_size=4, translate=0), images)
        >>> trainer.step().iteration, trainer.iteration
        (0, 1)
    """

    def __init__(self, flow: Flow, config: FlowTraining, images: np.ndarray, ranks: Ranks = ALONE) -> None:
        flow.check_images(images)
        if not len(images):
            raise RecipeError("cannot train a flow: the train split has no images.")
        self.flow = flow
        self.config = config
        self.iteration = 0  # number of completed steps
        self._images = images
        self._ranks = ranks
        self._epoch_order: tuple[int, np.ndarray] | None = None
        self._ahead: tuple[int, torch.Tensor] | None = None  # an iteration and its batch
        # fused=True updates all parameters with one kernel, on the CPU as well as on a GPU.
        self._adam = torch.optim.Adam(
            flow.parameters(), lr=config.learning_rate, betas=_BETAS, weight_decay=config.weight_decay, fused=True
        )
        self._broken = torch.zeros(())  # 1 after a loss or gradient was not finite; later updates are skipped
        self._update = Replayed(self._apply, self._state)
        self._gradients = Replayed(self._gradient_vector, self._state)  # with several ranks, instead of _update
        self._descent = Replayed(self._apply_vector, self._state)

    @property
    def steps_together(self) -> int:
        """The preferred number of steps per call of ``steps``; above 1 if the host can run ahead of the device."""
        return _STEPS_AHEAD if can_record(self.flow.device) else 1

    def step(self) -> StepResult:
        """Run one step and return its result."""
        (result,) = self.steps(1)
        return result

    def steps(self, count: int) -> list[StepResult]:
        """Run ``count`` steps and return the result of each; wait for the device once, at the end.

        Step 0 initialises ActNorm from its batch.

        Raises:
            DivergedError: A loss or gradient is not finite. This update and all later ones were not applied.
        """
        config, flow = self.config, self.flow
        if not flow.training:  # train() iterates over all layers
            flow.train()
        self._place()
        first, measured = self.iteration, []
        with _as_configured(flow, config):
            for _ in range(count):
                y_BCHW = self._prepared(self.iteration)
                if self.iteration == 0 and not bool(flow.initialised):
                    flow.initialise(y_BCHW if self._ranks.size == 1 else self._batch(0, slice(None)))
                flow.set_rebuild(config.memory_light)
                self._set_rate(learning_rate(config, self.iteration))
                measured += self._update(y_BCHW) if self._ranks.size == 1 else self._update_together(y_BCHW)
                self.iteration += 1
                if can_record(flow.device) and self.iteration < config.iterations:  # while the device computes
                    self._ahead = self.iteration, self._prepared(self.iteration)
        return self._results(first, torch.stack(measured).tolist())  # the only wait for a GPU

    def _results(self, first: int, measured: list[list[float]]) -> list[StepResult]:
        """Return the results of the steps from ``first`` on; raise DivergedError if one of them diverged."""
        for iteration, (loss, norm) in enumerate(measured, start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.iteration = iteration
                self._broken.zero_()
                self._adam.zero_grad(set_to_none=True)
                raise DivergedError(
                    f"training diverged at iteration {iteration}: loss {loss} nats/dim, gradient norm {norm}; expected "
                    "finite numbers. The update was not applied. Lower learning_rate, or use warmup and grad_clip."
                )
        bits = self.flow.config.bits
        return [
            StepResult(iteration=iteration, loss_bits_per_dim=loss / math.log(2.0) + bits, grad_norm=norm)
            for iteration, (loss, norm) in enumerate(measured, start=first)
        ]

    def _apply(self, y_BCHW: torch.Tensor) -> tuple[torch.Tensor]:
        """Apply the update of a batch unless a step has diverged; return loss and gradient norm, nats/dim (2,).

        Nothing here may wait for the device, so that it can be recorded as a CUDA graph.
        """
        return self._descend(self._loss(y_BCHW))

    def _update_together(self, y_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Like ``_apply`` for the batches of all ranks; ranks communicate outside of the recorded graphs."""
        gradients = self._gradients(y_BCHW)
        self._ranks.average(gradients)
        return self._descent(*gradients)

    def _gradient_vector(self, y_BCHW: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the gradients of all parameters for a batch, followed by its loss, as one vector."""
        loss = self._loss(y_BCHW)
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        return (torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1).to(gradients[0].dtype)]),)

    def _apply_vector(self, vector: torch.Tensor) -> tuple[torch.Tensor]:
        """Apply the update of a gradient vector; return loss and gradient norm like ``_apply``."""
        parameters = self._parameters()
        *gradients, loss = torch.split(vector, [*(parameter.numel() for parameter in parameters), 1])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # Same strides as the parameter: fused kernels read both in the same order.
            parameter.grad = torch.zeros_like(parameter, requires_grad=False).copy_(gradient.view_as(parameter))
        return self._descend(loss[0].double())

    def _descend(self, loss: torch.Tensor) -> tuple[torch.Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.grad_clip or math.inf)
        measured = torch.stack((loss, norm.double()))
        broken = (~torch.isfinite(measured).all()).to(self._broken.dtype)
        self._broken.copy_(torch.maximum(self._broken, broken))
        self._adam.step()
        return (measured,)

    def _loss(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of all parameters for a batch; return its loss, nats/dim."""
        for parameter in self._parameters():
            parameter.grad = None
        loss = -self.flow.log_prob_y(y_BCHW).mean() / self.flow.dim
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.detach()

    def _parameters(self) -> list[torch.Tensor]:
        parameters: list[torch.Tensor] = self._adam.param_groups[0]["params"]
        return parameters

    def _place(self) -> None:
        """Move Adam's state to the flow's device; if steps are recorded there, create it first."""
        device, group = self.flow.device, self._adam.param_groups[0]
        recorded = can_record(device)
        if self._broken.device != device or isinstance(group["lr"], torch.Tensor) != recorded:
            self._broken = torch.zeros((), device=device)
            group["capturable"] = device.type == "cuda"
            group["lr"] = torch.zeros((), device=device) if recorded else self.config.learning_rate
            for state in self._adam.state.values():
                state.update({moment: state[moment].to(device) for moment in _MOMENTS})
        # If found_inf is 1, the fused kernel skips parameters and moments; GradScaler passes it in the same way.
        self._adam.found_inf = self._broken  # type: ignore[attr-defined]  # torch reads it with getattr
        for parameter in self._parameters() if recorded else ():
            if parameter not in self._adam.state:
                zeros = torch.zeros_like(parameter, requires_grad=False)
                step = torch.zeros((), device=device)
                self._adam.state[parameter] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": step}

    def _set_rate(self, rate: float) -> None:
        group = self._adam.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # a recorded step reads it from this tensor
        else:
            group["lr"] = rate

    def _state(self) -> list[torch.Tensor]:
        """Return all tensors that a recorded step reads and writes, except its batch."""
        moments = [state[moment] for state in self._adam.state.values() for moment in _MOMENTS]
        return [*self._parameters(), *self.flow.buffers(), *moments, self._adam.param_groups[0]["lr"], self._broken]

    def _prepared(self, iteration: int) -> torch.Tensor:
        """Return the batch of a step, possibly prepared in advance."""
        if self._ahead is not None and self._ahead[0] == iteration and self._ahead[1].device == self.flow.device:
            return self._ahead[1]
        return self._batch(iteration, self._ranks.part(self.config.batch_size))

    def _batch(self, iteration: int, part: slice) -> torch.Tensor:
        """Return part of the batch of a step as padded y (B, C, H, W): augmented, with uniform noise."""
        config, device = self.config, self.flow.device
        rng = generator(config.seed, "train-glow", "batch", iteration)
        images = self._images[np.sort(self._rows(iteration))]  # sorted: a memory-mapped file is read sequentially
        images = augment(images, rng, translate=config.translate, flip=config.flip)
        images = np.ascontiguousarray(pad_images(images, self.flow.pads))
        noise = to_device(torch.from_numpy(draw_noise(rng, images.shape)[part]), device)
        images_BHWC = to_device(torch.from_numpy(images[part]), device)
        y_BCHW = dequantise(images_BHWC, "uniform", bits=self.flow.config.bits, noise_BHWC=noise)
        return y_BCHW.to(self.flow.dtype)

    def _rows(self, iteration: int) -> np.ndarray:
        """Return the rows of a step's batch, taken from consecutive seeded permutations, one per epoch."""
        count, start = len(self._images), iteration * self.config.batch_size
        stop = start + self.config.batch_size
        pieces = []
        for epoch in range(start // count, (stop - 1) // count + 1):
            if self._epoch_order is None or self._epoch_order[0] != epoch:
                order = generator(self.config.seed, "train-glow", "order", epoch).permutation(count)
                self._epoch_order = (epoch, order)
            first = epoch * count
            pieces.append(self._epoch_order[1][max(start - first, 0) : max(stop - first, 0)])
        return np.concatenate(pieces)

    def evaluate(self, images: np.ndarray, *, batch_size: int = _EVALUATION_BATCH) -> float:
        """Return the mean bits per dimension of uint8 images (N, H, W, C), with seeded uniform noise."""
        self.flow.eval()  # steps() switches back to training mode
        log_prob = self.flow.log_prob(images, dequantise="uniform", batch_size=batch_size, seed=self.config.seed)
        return float(self.flow.bits_per_dim(log_prob).mean())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything needed to resume training: weights, Adam's moments and the iteration, under flat names."""
        return flat_state(self.flow, self._adam, {"iteration": self.iteration})

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Resume, bit for bit, from a result of ``state_dict``.

        Raises:
            FormatError: The state does not match a trainer of this flow. The trainer remains unchanged.
        """
        self.iteration = restore_state(self.flow, self._adam, ("iteration",), state)["iteration"]


def sample(flow: Flow, n: int, *, temperature: float = 1.0, seed: int = 0, batch_size: int = 64) -> np.ndarray:
    """Sample ``n`` images from the flow: uint8 (n, H, W, C), in the flow's bit depth.

    Image i depends only on (seed, i). A ``temperature`` below 1 reduces artefacts and variety.
    """
    draws = [generator(seed, "sample", i).standard_normal(flow.dim, dtype=np.float32) for i in range(n)]
    z = np.reshape(draws, (n, flow.dim)).astype(np.float32) * np.float32(temperature)
    return flow.decode(z, output=f"{flow.config.bits}bit", batch_size=batch_size)
