"""What a classifier sees in an image, for a Fréchet distance: the input of its last linear layer.

The one rule: that layer is the last one that a pass comes to, whatever the order in which the modules stand.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lsmix.classifiers.inference import passes
from lsmix.data.errors import RecipeError

__all__ = ["features"]


def features(model: nn.Module, images: NDArray[np.uint8], *, precision: str = "float32") -> NDArray[np.float32]:
    """Return the features float32 (N, F) of images uint8 (N, H, W, C).

    ``model`` maps images in [0, 1] to logits, as ``load_classifier`` gives it; any architecture with a linear layer
    will do. It is put into evaluation mode. For CNN-13 F is its width, for WRN-D-K 64·K.

    Raises:
        RecipeError: there are no images, no linear layer is passed, or the last one does not see one vector per image.

    Example:
        >>> import numpy as np
        >>> from lsmix.classifiers.cnn13 import Cnn13
        >>> features(Cnn13(10, 1, (8, 8), width=4), np.zeros((3, 8, 8, 1), np.uint8)).shape
        (3, 4)
    """
    if len(images) == 0:
        raise RecipeError("features need at least one image, got none.")
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
                got = f"sees {tuple(seen[0].shape)}" if seen else "is not there"
                raise RecipeError(
                    f"{type(model).__name__} has no features for {count} images: the last nn.Linear of a pass {got}; "
                    "expected a vector for each image. Use another architecture."
                )
            parts.append(seen[0].float().cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(parts)
