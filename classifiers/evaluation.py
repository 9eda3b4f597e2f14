"""Running images through a classifier: seeds, logits and features, shared by training and evaluation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.batch import to_device
from lsmix.data.rng import torch_seed

__all__ = ["PASS_IMAGES", "features", "logits_of", "passes", "seeded"]

PASS_IMAGES = 256  # batch size; fixed, since it affects the last bits of results


def logits_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Return logits, float32 (B, classes), of uint8 images (B, C, H, W), which are scaled to [0, 1] on their device."""
    pixels = images.float().div_(255.0).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(pixels)
    return logits.float()


def passes(
    model: nn.Module, images: NDArray[np.uint8], *, device: torch.device, precision: str
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each batch of images, uint8 (N, H, W, C), and their logits on the device.

    Switches the model to evaluation mode.
    """
    model.eval()
    for start in range(0, len(images), PASS_IMAGES):
        rows = slice(start, start + PASS_IMAGES)
        # Copied: a slice of a data set is a read-only memory map, which torch does not accept.
        pixels = torch.from_numpy(np.array(images[rows], order="C")).permute(0, 3, 1, 2)
        with torch.inference_mode(), arithmetic(precision):  # not around the yield: callers keep their own modes
            logits = logits_of(model, to_device(pixels, device), precision)
        yield rows, logits


@contextlib.contextmanager
def seeded(device: torch.device, seed: int, *words: str | int) -> Iterator[None]:
    """Seed torch's global generators, which modules draw from, within the block only."""
    number = torch_seed(seed, "classifier", *words)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def features(model: nn.Module, images: NDArray[np.uint8], *, precision: str = "float32") -> NDArray[np.float32]:
    """Return the features, float32 (N, F), of images, uint8 (N, H, W, C): the inputs of the last linear layer.

    ``model`` maps images in [0, 1] to logits, like the result of ``load_classifier``. It needs a linear layer and is
    switched to evaluation mode. F is the width of CNN-13, and 64·K for WRN-D-K.

    Raises:
        RecipeError: There are no images, or the last linear layer does not receive one vector per image.

    Example:
        >>> import numpy as np
        >>> from lsmix.classifiers.cnn13 import Cnn13
        >>> features(Cnn13(10, 1, (8, 8), width=4), np.zeros((3, 8, 8, 1), np.uint8)).shape
        (3, 4)
    """
    if len(images) == 0:
        raise RecipeError("features need at least one image, got 0.")
    seen: list[Tensor] = []

    def remember(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[:] = inputs[:1]

    hooks = [module.register_forward_pre_hook(remember) for module in model.modules() if isinstance(module, nn.Linear)]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    parts = []
    try:
        for rows, _ in passes(model, images, device=device, precision=precision):
            count = len(images[rows])
            if not seen or seen[0].ndim != 2 or len(seen[0]) != count:
                got = f"receives {tuple(seen[0].shape)}" if seen else "does not exist"
                raise RecipeError(
                    f"{type(model).__name__} has no features for {count} images: its last nn.Linear {got}; expected "
                    "one vector per image. Use another architecture."
                )
            parts.append(seen[0].float().cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(parts)
