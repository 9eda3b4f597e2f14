"""The complete flow: maps images to latent vectors and back, with exact likelihoods [P §2, A].

All batches have the same size (the last is zero-padded), and both directions use the same precision. Results therefore
do not depend on how images are split into calls, and decode(encode(x)) equals x.

Axes: B batch, C channels, H height, W width, D components of the latent vector; N images, any number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast, overload

import numpy as np
import torch
from torch import nn

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.cuda_graph import Replayed, can_record
from lsmix.data.rng import generator
from lsmix.glow import pixels
from lsmix.glow.config import Dequantise, FlowConfig
from lsmix.glow.latent_order import join_parts, part_shapes, split_parts
from lsmix.glow.layers import depth_to_space, space_to_depth
from lsmix.glow.level import FlowLevel, FrozenLevel
from lsmix.glow.pixels import draw_noise, output_bits, pad_images, padding, quantise, reflected_index
from lsmix.glow.transfers import run_batches

__all__ = ["Flow", "Mix", "Validate"]

# Computes latents (n, D) from the indices of some rows and the tensors of these rows.
Mix: TypeAlias = Callable[[slice, Sequence[torch.Tensor]], torch.Tensor]
Advance: TypeAlias = Callable[[int], None]  # called with a number of images
Validate: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # maps y (B, C, height, width) to bool (B,)
_LOG_2PI = math.log(2.0 * math.pi)


class _EncodeOptions(TypedDict, total=False):
    dequantise: Dequantise
    batch_size: int
    seed: int
    first_index: int
    advance: Advance


class _DecodeOptions(TypedDict, total=False):
    output: str
    batch_size: int
    others: Sequence[np.ndarray]
    mix: Mix | None
    advance: Advance


class Flow(nn.Module):
    """A Glow with L levels; each squeezes, applies K steps and factors out half of its channels.

    ``forward`` and ``inverse`` work on tensors of padded size; ``encode``, ``decode`` and ``log_prob`` on NumPy arrays.
    ``seed`` draws the initial weights; None leaves zeros and identities, which a loaded checkpoint replaces.

    Example:
        >>> import numpy as np
        >>> from lsmix.glow.config import FlowConfig
        >>> from lsmix.glow.flow import Flow
        >>> flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=8))
        >>> images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
        >>> z = flow.encode(images)
        >>> z.shape, bool((flow.decode(z) == images).all())
        ((3, 64), True)
    """

    initialised: torch.Tensor  # bool, no axes: whether ActNorm has seen its first batch

    def __init__(self, config: FlowConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.pads = padding(config.height, config.width, config.levels, config.pad)
        top, bottom, left, right = self.pads
        self.padded_height, self.padded_width = config.height + top + bottom, config.width + left + right
        self.part_shapes = part_shapes(self.padded_height, self.padded_width, config.channels, config.levels)
        self.dim = self.padded_height * self.padded_width * config.channels  # D, of the padded image
        self.levels = nn.ModuleList()
        for level in range(config.levels):
            channels = 4 * config.channels << level
            self.levels.append(FlowLevel(channels, steps=config.steps, hidden=config.hidden, scale=config.scale))
        self.register_buffer("initialised", torch.tensor(False))
        self._recordings: dict[str, tuple[list[FrozenLevel], Replayed]] = {}
        if seed is not None:
            for level, steps in enumerate(self._levels()):
                for i, step in enumerate(steps.steps()):
                    step.reset(generator(seed, "glow", "start", level, i))

    def _levels(self) -> list[FlowLevel]:
        return [cast(FlowLevel, level) for level in self.levels]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.initialised.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters and of all activations."""
        return next(self.parameters()).dtype

    # Methods on tensors of padded size.

    def forward(self, y_BCHW: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Map padded y to the L + 1 parts of its latent [P A.1, Eq. 2-4] and the log-determinant, float64 (B,)."""
        h_BCHW = y_BCHW
        log_det_B = torch.zeros(len(y_BCHW), dtype=torch.float64, device=y_BCHW.device)
        parts = []
        for level in self._levels():
            h_BCHW, level_log_det_B = level(space_to_depth(h_BCHW))
            log_det_B = log_det_B + level_log_det_B
            part_BCHW, h_BCHW = h_BCHW.chunk(2, dim=1)
            parts.append(part_BCHW)
        return [*parts, h_BCHW], log_det_B

    def inverse(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map the parts of a latent to padded y; the inverse of ``forward``."""
        *factored_out, h_BCHW = parts
        for part_BCHW, level in zip(reversed(factored_out), reversed(self._levels()), strict=True):
            h_BCHW = depth_to_space(level.inverse(torch.cat((part_BCHW, h_BCHW), dim=1)))
        return h_BCHW

    def log_prob_y(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the log-density of padded y under the prior N(0, I) on every part: nats, float64 (B,)."""
        parts, log_det_B = self.forward(y_BCHW)
        return self._log_prior(parts) + log_det_B

    def _log_prior(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        squares = [part.square().sum(dim=(1, 2, 3)).double() for part in parts]
        return -0.5 * (torch.stack(squares).sum(dim=0) + self.dim * _LOG_2PI)

    @torch.no_grad()
    def initialise(self, y_BCHW: torch.Tensor) -> None:
        """Initialise every ActNorm from this batch of padded y, one after another, and set ``initialised``."""
        h_BCHW = y_BCHW
        for level in self._levels():
            h_BCHW = level.initialise(space_to_depth(h_BCHW)).chunk(2, dim=1)[1]
        self.initialised.fill_(True)

    def set_network_dtype(self, dtype: torch.dtype | None) -> None:
        """Compute the coupling networks in this type, for example bfloat16; None selects the type of the parameters."""
        for level in self._levels():
            level.network_dtype = dtype

    def set_rebuild(self, rebuild: bool) -> None:
        """Choose whether the backward pass recomputes activations from outputs instead of storing them.

        If True, call this again after each parameter update, before the next forward pass.
        """
        for level in self._levels():
            level.set_rebuild(rebuild)

    # Latent vectors as tensors.

    def encode_batch(self, y_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map y, float (B, C, height, width), to z (B, D) and the log-probability of the n-bit image: nats (B,).

        Pads by reflection if necessary. The last bits depend on the batch size, so keep it fixed.
        """

        def encode(y_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts, log_det_B = self.forward(y_BCHW)
            log_prob_B = self._log_prior(parts) + log_det_B - self.dim * self.config.bits * math.log(2.0)
            return join_parts(parts), log_prob_B

        with arithmetic(), torch.no_grad():
            z_BD, log_prob_B = self._replayed("encode", encode)(self._pad(y_BCHW.to(self.device, self.dtype)))
            return z_BD, log_prob_B

    def decode_batch(self, z_BD: torch.Tensor) -> torch.Tensor:
        """Map z (B, D) to y, float (B, C, height, width), cropped but not clipped; values may be infinite or NaN."""

        def decode(z_BD: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.inverse(split_parts(z_BD, self.part_shapes)),)

        with arithmetic(), torch.no_grad():
            (y_BCHW,) = self._replayed("decode", decode)(z_BD.to(self.device, self.dtype))
            top, _, left, _ = self.pads
            return y_BCHW[:, :, top : top + self.config.height, left : left + self.config.width]

    def _replayed(
        self, direction: str, function: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
        """Return ``function`` as this direction's CUDA graph, recorded again if a parameter has changed.

        In training mode, return ``function`` itself: no weights are frozen then for a graph to read.
        """
        if self.training or not can_record(self.device):
            return function
        frozen = [level.freeze() for level in self._levels()]
        kept = self._recordings.get(direction)
        if kept is None or any(a is not b for a, b in zip(kept[0], frozen, strict=True)):
            kept = self._recordings[direction] = frozen, Replayed(function)
        return kept[1]

    def forget_recordings(self) -> None:
        """Free the memory of CUDA graphs; the next pass records them again."""
        self._recordings.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the recordings, which cannot be copied or pickled."""
        return {**self.__dict__, "_recordings": {}}

    def _pad(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        if y_BCHW.shape[2:] == (self.padded_height, self.padded_width):
            return y_BCHW
        top, bottom, left, right = self.pads
        rows = torch.from_numpy(reflected_index(self.config.height, top, bottom)).to(y_BCHW.device)
        columns = torch.from_numpy(reflected_index(self.config.width, left, right)).to(y_BCHW.device)
        return y_BCHW[:, :, rows[:, None], columns]

    # Methods on NumPy arrays.

    @overload
    def encode(
        self, images: np.ndarray, *, return_log_prob: Literal[False] = ..., **options: Unpack[_EncodeOptions]
    ) -> np.ndarray: ...

    @overload
    def encode(
        self, images: np.ndarray, *, return_log_prob: Literal[True], **options: Unpack[_EncodeOptions]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def encode(
        self,
        images: np.ndarray,
        *,
        dequantise: Dequantise = "low-bits",
        batch_size: int = 64,
        seed: int = 0,
        first_index: int = 0,
        return_log_prob: bool = False,
        advance: Advance = lambda images: None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Map uint8 images (N, height, width, channels) to latent vectors, float32 (N, D).

        "uniform" noise is drawn for each image from ``seed`` and the image's index; indices start at ``first_index``.
        With ``return_log_prob``, the log-probability of each image is also returned: nats, float64 (N,). ``advance`` is
        called after each batch with the number of its images.

        Raises:
            RecipeError: The images do not have this flow's shape or type, or an option is unknown.
        """
        self.check_images(images)
        z, log_prob = np.empty((len(images), self.dim), np.float32), np.empty(len(images), np.float64)

        def load(rows: slice) -> list[np.ndarray]:
            indices = range(first_index + rows.start, first_index + rows.stop)
            return self._batch(images[rows], dequantise, seed, indices)

        def encode(rows: slice, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            padded = [_zero_padded(values, batch_size) for values in batch]
            noise = padded[1] if len(padded) > 1 else None
            y_BCHW = pixels.dequantise(padded[0], dequantise, bits=self.config.bits, noise_BHWC=noise)
            return [result[: rows.stop - rows.start] for result in self.encode_batch(y_BCHW)]

        for rows, (z_BD, log_prob_B) in run_batches(self.device, _batches(len(images), batch_size), load, encode):
            z[rows], log_prob[rows] = z_BD, log_prob_B
            advance(len(z_BD))
        return (z, log_prob) if return_log_prob else z

    def log_prob(
        self, images: np.ndarray, *, dequantise: Dequantise = "low-bits", batch_size: int = 64, seed: int = 0
    ) -> np.ndarray:
        """Return the log-probability of uint8 images (N, height, width, channels): nats, float64 (N,).

        It refers to the image reduced to ``config.bits`` bits, after padding, and includes the discretisation constant.
        """
        return self.encode(images, dequantise=dequantise, batch_size=batch_size, seed=seed, return_log_prob=True)[1]

    def bits_per_dim(self, log_prob: np.ndarray) -> np.ndarray:
        """Convert log-probabilities in nats per image to bits per dimension of the padded image."""
        return np.asarray(-np.asarray(log_prob, np.float64) / (self.dim * math.log(2.0)))

    @overload
    def decode(self, z: np.ndarray, *, validate: None = ..., **options: Unpack[_DecodeOptions]) -> np.ndarray: ...

    @overload
    def decode(
        self, z: np.ndarray, *, validate: Validate, **options: Unpack[_DecodeOptions]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def decode(
        self,
        z: np.ndarray,
        *,
        output: str = "8bit",
        batch_size: int = 64,
        validate: Validate | None = None,
        others: Sequence[np.ndarray] = (),
        mix: Mix | None = None,
        advance: Advance = lambda images: None,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Map latent vectors, float32 (N, D), to uint8 images (N, height, width, channels).

        Args:
            z: Vectors to decode.
            output: "8bit" returns the exact bytes that were encoded; "5bit" floors to 5 bits as in the paper.
            batch_size: Vectors per pass.
            validate: Maps y, the unrounded result of ``decode_batch``, float (B, C, height, width), to bool (B,). The
                results of all batches, bool (N,), are returned after the images.
            others: Additional arrays (N, …) for ``mix``.
            mix: Computes the vectors to decode, (n, D), from some rows of z and of ``others`` on the flow's device. It
                must not wait for the device.
            advance: Called after each batch with the number of its images.

        Raises:
            RecipeError: The vectors do not have this flow's length, or an option is unknown.
        """
        bits = output_bits(output)
        z = np.asarray(z)
        if z.ndim != 2 or z.shape[1] != self.dim or z.dtype.kind != "f":
            raise RecipeError(f"cannot decode: expected floats (N, {self.dim}), got {z.dtype} {z.shape}.")
        config = self.config
        images = np.empty((len(z), config.height, config.width, config.channels), np.uint8)
        flags = np.empty(len(z), bool)

        def load(rows: slice) -> list[np.ndarray]:
            return [source[rows].astype(np.float32, copy=False) for source in (z, *others)]

        def decode(rows: slice, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            z_BD = mix(rows, batch) if mix else batch[0]
            y_BCHW = self.decode_batch(_zero_padded(z_BD, batch_size))
            results = (quantise(y_BCHW, bits), *([validate(y_BCHW)] if validate else []))
            return [result[: len(z_BD)] for result in results]

        for rows, (images_BHWC, *flags_B) in run_batches(self.device, _batches(len(z), batch_size), load, decode):
            images[rows] = images_BHWC
            if flags_B:
                flags[rows] = flags_B[0]
            advance(len(images_BHWC))
        return (images, flags) if validate else images

    def _batch(self, images: np.ndarray, mode: Dequantise, seed: int, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the padded images, followed by their noise if the mode needs it."""
        padded = pad_images(images, self.pads)
        if mode != "uniform":
            return [padded]
        draws = [draw_noise(generator(seed, "dequantise", index), padded.shape[1:]) for index in indices]
        return [padded, np.stack(draws)]

    def check_images(self, images: np.ndarray) -> None:
        """Raise RecipeError unless the images are uint8 and have this flow's shape."""
        expected = (self.config.height, self.config.width, self.config.channels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise RecipeError(
                f"images do not match this flow: expected uint8 (N, {', '.join(map(str, expected))}), "
                f"got {images.dtype} {images.shape}. Use a flow that was trained on images of this shape."
            )

    def extra_repr(self) -> str:
        """Return the architecture for ``repr``."""
        return ", ".join(f"{name}={getattr(self.config, name)!r}" for name in self.config.__struct_fields__)


def _batches(count: int, batch_size: int) -> Iterator[slice]:
    if batch_size < 1:
        raise RecipeError(f"batch_size must be at least 1, got {batch_size}.")
    for start in range(0, count, batch_size):
        yield slice(start, min(start + batch_size, count))


def _zero_padded(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Pad the last batch with zeros to the fixed batch size."""
    missing = batch_size - len(rows)
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows
