"""Mixing in pixel space: MixUp, CutMix, ResizeMix and FMix, for pools and training batches."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsmix.classifiers.config import PixelMix
from lsmix.data.errors import RecipeError
from lsmix.data.loaders.batch import to_device
from lsmix.data.mixing import PIXEL_METHODS, Method, RowRng, checked_rates, row_rngs
from lsmix.data.rng import generator

__all__ = ["cutmix", "fmix", "mix_batch", "mix_images", "mix_pixels", "mixup", "resizemix"]

_Mixed = tuple[Tensor, Tensor]
_UNIT = 1 << 32  # MixUp rounds λ to a multiple of 1 / _UNIT, which changes pixels by at most 1e-7
_DECAY = 3.0  # exponent of FMix's spectrum, as published


def mixup(x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, _draws: RowRng) -> _Mixed:
    """Return (1 − λ)·x₁ + λ·x₂, rounded half up; the share is λ. λ = 1 returns x₂ [Zhang et al. 2018]."""
    weight_B = to_device(torch.round(lam_B * _UNIT).to(torch.int64), x1_BCHW.device)[:, None, None, None]
    sum_BCHW = (_UNIT - weight_B) * x1_BCHW + weight_B * x2_BCHW  # below 2^40, hence exact
    return ((sum_BCHW + _UNIT // 2) >> 32).to(torch.uint8), lam_B.clone()


def cutmix(x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, draws: RowRng) -> _Mixed:
    """Replace a box of x₁ by the same box of x₂; the share is the box's area [Yun et al. 2019, and their code].

    The box has √λ of the image's sides and a random centre, and is clipped at the image's edges. λ = 1 therefore
    returns x₂ only if the box happens to be centred.
    """
    height, width = x1_BCHW.shape[2:]

    def side(lam: float, length: int, centre: int) -> tuple[int, int]:
        half = int(length * np.sqrt(lam)) // 2
        return max(centre - half, 0), min(centre + half, length)

    def box(lam: float, row: np.random.Generator) -> tuple[int, ...]:
        x, y = int(row.integers(width)), int(row.integers(height))  # in the order used by the published code
        return *side(lam, height, y), *side(lam, width, x)

    box_B4 = _boxes(box, lam_B, draws)
    return torch.where(_inside(box_B4, x1_BCHW), x2_BCHW, x1_BCHW), _area(box_B4, x1_BCHW)


def resizemix(x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, draws: RowRng) -> _Mixed:
    """Paste a downscaled x₂ onto x₁; the share is the patch's area [Qin et al. 2020].

    The patch has √λ of the image's sides, rounded down, and lies inside the image. It is resampled by nearest
    neighbour. λ = 1 returns x₂.
    """
    height, width = x1_BCHW.shape[2:]

    def box(lam: float, row: np.random.Generator) -> tuple[int, ...]:
        tall, wide = int(height * np.sqrt(lam)), int(width * np.sqrt(lam))
        top, left = (int(row.integers(free, endpoint=True)) for free in (height - tall, width - wide))
        return top, top + tall, left, left + wide

    box_B4 = _boxes(box, lam_B, draws)
    from_row_BH = to_device(_shrunk(box_B4[:, 0], box_B4[:, 1], height), x1_BCHW.device)
    from_column_BW = to_device(_shrunk(box_B4[:, 2], box_B4[:, 3], width), x1_BCHW.device)
    index_B = torch.arange(len(lam_B), device=x1_BCHW.device)
    small_BHWC = x2_BCHW.permute(0, 2, 3, 1)[
        index_B[:, None, None], from_row_BH[:, :, None], from_column_BW[:, None, :]
    ]
    return torch.where(_inside(box_B4, x1_BCHW), small_BHWC.permute(0, 3, 1, 2), x1_BCHW), _area(box_B4, x1_BCHW)


def fmix(x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, draws: RowRng) -> _Mixed:
    """Take ⌊λHW⌋ pixels from x₂ where a smooth random field is largest; the share is ⌊λHW⌋/HW [Harris et al. 2020].

    The field is noise whose spectrum decays with the third power of the frequency. λ = 1 returns x₂.
    """
    height, width = x1_BCHW.shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    scale = np.maximum(frequency, 1.0 / max(height, width)) ** -_DECAY
    count_B = torch.floor(lam_B * (height * width))
    mask_BL = torch.zeros(len(lam_B), height * width, dtype=torch.bool)
    for row, count in enumerate(count_B.to(torch.int64).tolist()):
        real, imaginary = draws(row).standard_normal((2, *scale.shape))
        field = np.fft.irfft2(scale * (real + 1j * imaginary), s=(height, width))
        largest = np.argsort(-field, axis=None, kind="stable")[:count]
        mask_BL[row, torch.from_numpy(largest)] = True
    mask_B1HW = to_device(mask_BL.view(-1, 1, height, width), x1_BCHW.device)
    return torch.where(mask_B1HW, x2_BCHW, x1_BCHW), count_B / (height * width)


def _boxes(box: Callable[[float, np.random.Generator], tuple[int, ...]], lam_B: Tensor, draws: RowRng) -> Tensor:
    """Return int64 (B, 4) on the CPU: top, bottom, left, right of each row's box; bottom and right are exclusive."""
    boxes = [box(lam, draws(row)) for row, lam in enumerate(lam_B.tolist())]
    return torch.tensor(boxes, dtype=torch.int64).view(-1, 4)


def _inside(box_B4: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return the mask of each box, bool (B, 1, H, W), on the images' device."""
    top_B1, bottom_B1, left_B1, right_B1 = to_device(box_B4, x_BCHW.device)[:, :, None].unbind(dim=1)
    row_H, column_W = (torch.arange(length, device=x_BCHW.device) for length in x_BCHW.shape[2:])
    inside_BH = (row_H >= top_B1) & (row_H < bottom_B1)
    inside_BW = (column_W >= left_B1) & (column_W < right_B1)
    return (inside_BH[:, :, None] & inside_BW[:, None, :])[:, None]


def _area(box_B4: Tensor, x_BCHW: Tensor) -> Tensor:
    top_B, bottom_B, left_B, right_B = box_B4.unbind(dim=1)
    area_B: Tensor = (bottom_B - top_B) * (right_B - left_B)
    return area_B.double() / (x_BCHW.shape[2] * x_BCHW.shape[3])


def _shrunk(start_B: Tensor, stop_B: Tensor, length: int) -> Tensor:
    """Return the source pixel, int64 (B, length), of each position, where start to stop displays the full length."""
    position_BL = torch.arange(length)[None, :] - start_B[:, None]
    size_B1 = (stop_B - start_B)[:, None].clamp(min=1)
    return ((2 * position_BL + 1) * length // (2 * size_B1)).clamp(0, length - 1)


def mix_images(
    method: str,
    x1: NDArray[np.uint8],
    x2: NDArray[np.uint8],
    lam: float | NDArray[np.float64],
    *,
    seed: int = 0,
    draws: RowRng | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mix images pair by pair; return uint8 (N, H, W, C) and the effective shares of x2, float32 (N,).

    x1 and x2 are uint8 (N, H, W, C). ``lam`` is a number or an array (N,) in [0, 1], converted to float64. Random
    methods draw row i from (seed, i), or from ``draws(i)`` if ``draws`` is given.

    Raises:
        RecipeError: The method is unknown or violates its contract, shapes or types differ, or λ is outside [0, 1].

    Example:
        >>> import numpy as np
        >>> from lsmix.classifiers.pixel_mixing import mix_images
        >>> black, white = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)
        >>> mixed, share = mix_images("mixup", black, white, 0.25)
        >>> int(mixed[0, 0, 0, 0]), float(share[0])
        (64, 0.25)
    """
    if x1.ndim != 4 or x1.shape != x2.shape or x1.dtype != np.uint8 or x2.dtype != np.uint8:
        raise RecipeError(
            f"cannot mix: expected two uint8 arrays (N, H, W, C) of the same shape, got {x1.dtype} {x1.shape} and "
            f"{x2.dtype} {x2.shape}."
        )
    lam_N = torch.from_numpy(checked_rates(lam, len(x1)))
    mixed, share = mix_pixels(method, _tensor(x1), _tensor(x2), lam_N, draws or row_rngs(seed, "mix", "method"))
    return np.ascontiguousarray(mixed.permute(0, 2, 3, 1).numpy()), share.to(torch.float32).numpy()


def mix_pixels(method: str, x1_BCHW: Tensor, x2_BCHW: Tensor, lam_B: Tensor, draws: RowRng) -> tuple[Tensor, Tensor]:
    """Mix tensors with a method and check its results, since methods may come from other packages.

    Raises:
        RecipeError: The method is unknown, or does not return uint8 like x1 and float64 shares (B,) in [0, 1] on the CPU.
    """
    function: Method = PIXEL_METHODS.load(method)
    mixed_BCHW, share_B = function(x1_BCHW, x2_BCHW, lam_B, draws)
    if (mixed_BCHW.shape, mixed_BCHW.dtype, mixed_BCHW.device) != (x1_BCHW.shape, torch.uint8, x1_BCHW.device):
        raise RecipeError(
            f"{PIXEL_METHODS.kind} {method!r} returned {mixed_BCHW.dtype} {tuple(mixed_BCHW.shape)} on "
            f"{mixed_BCHW.device}; expected torch.uint8 {tuple(x1_BCHW.shape)} on {x1_BCHW.device}."
        )
    fits = (share_B.shape, share_B.dtype, share_B.device.type) == (lam_B.shape, torch.float64, "cpu")
    if not fits or not bool(((share_B >= 0) & (share_B <= 1)).all()):
        raise RecipeError(
            f"{PIXEL_METHODS.kind} {method!r} returned shares {share_B.dtype} {tuple(share_B.shape)} on "
            f"{share_B.device}; expected torch.float64 {tuple(lam_B.shape)} on the CPU, all in [0, 1]."
        )
    return mixed_BCHW, share_B


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    # torch shares memory with writable arrays only; rows from a Zarr store may be read-only.
    return torch.from_numpy(images if images.flags.writeable else images.copy()).permute(0, 3, 1, 2)


def mix_batch(
    mix: PixelMix, images_BCHW: Tensor, target_BK: Tensor, seed: int, *words: str | int
) -> tuple[Tensor, Tensor]:
    """Return mixed images uint8 (B, C, H, W) and targets float32 (B, K), both on the images' device.

    Partners, λ and the method's own draws come from generators keyed by ``seed`` and ``words``.

    Raises:
        RecipeError: The method cannot be loaded or violates its contract.
    """
    count = len(images_BCHW)
    draws = generator(seed, *words, "pairs")
    partner_B = to_device(torch.from_numpy(draws.permutation(count)), images_BCHW.device)
    rates = draws.beta(mix.alpha, mix.alpha, count if mix.rate == "per-sample" else 1)
    lam_B = torch.from_numpy(np.broadcast_to(rates, (count,)).copy())
    # Index with channels last, which preserves the channels-last memory layout.
    partner_BCHW = images_BCHW.permute(0, 2, 3, 1)[partner_B].permute(0, 3, 1, 2)
    mixed_BCHW, share_B = mix_pixels(mix.method, images_BCHW, partner_BCHW, lam_B, row_rngs(seed, *words, "row"))
    share_B1 = to_device(share_B.to(target_BK.dtype), target_BK.device)[:, None]
    return mixed_BCHW, (1.0 - share_B1) * target_BK + share_B1 * target_BK[partner_B]
