"""The order of the components in a latent vector [P §2, Fig. 2].

Every part is squeezed onto the coarsest grid, the parts of each cell are concatenated (earliest first), and the cells
are sorted in Morton order. Consecutive components therefore belong to one connected region of the image.

Axes: B batch, C channels, H height, W width, D components of the latent vector.
"""

from collections.abc import Sequence
from functools import cache

import torch

from lsmix.glow.layers import depth_to_space, space_to_depth

__all__ = ["cell_order", "corner_index", "join_parts", "part_shapes", "split_parts"]


def part_shapes(height: int, width: int, channels: int, levels: int) -> list[tuple[int, int, int]]:
    """Return the (C, H, W) of each of the ``levels`` + 1 parts of a latent [P A.1].

    Height and width must be multiples of 2**levels.

    Example:
        >>> from lsmix.glow.latent_order import part_shapes
        >>> part_shapes(32, 32, 3, 3)
        [(6, 16, 16), (12, 8, 8), (24, 4, 4), (24, 4, 4)]
    """
    shapes = [(channels << i, height >> i, width >> i) for i in range(1, levels + 1)]
    return [*shapes, (channels << levels, height >> levels, width >> levels)]


def _morton_code(row: int, column: int) -> int:
    code = 0
    for bit in range(max(row.bit_length(), column.bit_length())):
        code |= (row >> bit & 1) << (2 * bit + 1) | (column >> bit & 1) << (2 * bit)
    return code


def cell_order(height: int, width: int) -> list[int]:
    """Return the cells of a grid, numbered row by row, in the order in which a latent vector stores them.

    This is Morton order, the order that squeezing the grid down to 1×1 would produce. Grids that are not square powers
    of two use the same bit-interleaved order for the cells that exist.
    """
    return sorted(range(height * width), key=lambda cell: _morton_code(cell // width, cell % width))


@cache  # never freed: recorded CUDA graphs read these tensors at a fixed address
def _orders(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    forward = torch.tensor(cell_order(height, width))
    return forward.to(device), torch.argsort(forward).to(device)  # CUDA graphs cannot copy from the CPU


def join_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Arrange the parts of latents, each (B, C_i, H_i, W_i), as vectors z (B, D).

    The last part has the coarsest grid; the grids of the earlier parts are larger by powers of two.
    """
    B, _, H, W = parts[-1].shape
    on_grid = []
    for part in parts:
        while part.shape[2] > H:
            part = space_to_depth(part)
        on_grid.append(part.permute(0, 2, 3, 1).reshape(B, H * W, -1))
    cells = torch.cat(on_grid, dim=2)
    forward, _ = _orders(H, W, cells.device)
    return cells.index_select(1, forward).reshape(B, -1)


def split_parts(z_BD: torch.Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Split vectors z (B, D) into parts of the given shapes (C, H, W); the inverse of ``join_parts``."""
    B = z_BD.shape[0]
    _, H, W = shapes[-1]
    _, backward = _orders(H, W, z_BD.device)
    cells = z_BD.reshape(B, H * W, -1).index_select(1, backward)
    widths = [C * h * w // (H * W) for C, h, w in shapes]
    parts = []
    for (_, h, _), part in zip(shapes, torch.split(cells, widths, dim=2), strict=True):
        part = part.reshape(B, H, W, -1).permute(0, 3, 1, 2)
        while part.shape[2] < h:
            part = depth_to_space(part)
        parts.append(part)
    return parts


def corner_index(shapes: Sequence[tuple[int, int, int]], *, bottom: bool, right: bool) -> torch.Tensor:
    """Return the index that reorders latents to start at another corner of the image, int64 (D,).

    ``z[:, corner_index(...)]`` is the latent order mirrored along one or both image axes, down to the last squeeze. Its
    first components belong to a region that grows from that corner. ``shapes`` are the shapes given to ``split_parts``.

    Example:
        >>> from lsmix.glow.latent_order import corner_index
        >>> corner_index([(1, 2, 2)], bottom=False, right=True).tolist()  # cells 0 1 / 2 3, mirrored left to right
        [1, 0, 3, 2]
    """
    D = sum(C * H * W for C, H, W in shapes)
    axes = [axis for axis, mirrored in ((2, bottom), (3, right)) if mirrored]
    parts = split_parts(torch.arange(D)[None], shapes)
    return join_parts([part.flip(axes) for part in parts])[0]
