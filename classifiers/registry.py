"""Building classifiers by name: lsmix's own, timm's, and any callable of an installed package.

Checking a name imports neither torch nor the classifier's package; building the classifier does. Names cannot trigger
downloads or read files.
"""

from typing import TYPE_CHECKING

from lsmix.classifiers.config import CNN13, check_architecture, depth_and_widening
from lsmix.data.errors import RecipeError
from lsmix.data.mixing import import_object

if TYPE_CHECKING:
    from torch import nn

    from lsmix.classifiers.config import ClassifierTraining

__all__ = ["build_classifier", "cost_per_pixel", "is_own"]


def build_classifier(config: "ClassifierTraining", classes: int, image_shape: tuple[int, int, int]) -> "nn.Module":
    """Return a network, on the CPU, that maps float images (B, C, H, W) in [0, 1] to logits (B, classes).

    ``image_shape`` is (H, W, C). Weights are drawn from torch's global generator. With ``normalise = "channel"``, the
    network is wrapped in ``Normalised``, and the caller must set its statistics.

    Raises:
        RecipeError: The architecture is unknown, cannot be imported, fails, or does not return logits for these images.
    """
    check_architecture(config.architecture)
    network = _network(config, classes, image_shape)
    if config.normalise == "none":
        return network
    from lsmix.classifiers.normalise import Normalised

    return Normalised(network, channels=image_shape[2])


def is_own(architecture: str) -> bool:
    """Return whether an architecture belongs to lsmix, not to another package."""
    return architecture == CNN13 or depth_and_widening(architecture) is not None


def cost_per_pixel(config: "ClassifierTraining", height: int, width: int, channels: int) -> tuple[int, float]:
    """Return the approximate number of parameters, and of multiply-adds per pixel in a forward pass.

    For architectures from other packages, which are unknown before they are built, the result is that of WRN-16-4.
    """
    if config.architecture == CNN13:
        # [P Table 5] at width 128: 2 convolutions 128→128, then 128→256 and 2 of 256→256 at a quarter of the pixels,
        # then 256→512, 512→256 and 256→128 at a sixteenth.
        products = 2 * 9 * 128**2 + 9 * (128 * 256 + 2 * 256**2) / 4 + (9 * 256 * 512 + 512 * 256 + 256 * 128) / 16
        share = (config.width / 128) ** 2
        return int(3_130_000 * share), products * share
    depth, widening = depth_and_widening(config.architecture) or (16, 4)
    blocks, inside, parameters = (depth - 4) // 6, 16, 9 * channels * 16
    products, share = float(parameters), 1.0 if min(height, width) < 64 else 0.25
    for outside in (16 * widening, 32 * widening, 64 * widening):
        group = 9 * (inside * outside + (2 * blocks - 1) * outside**2) + inside * outside
        parameters, products = parameters + group, products + group * share
        inside, share = outside, share / 4
    return parameters, products


def _network(config: "ClassifierTraining", classes: int, image_shape: tuple[int, int, int]) -> "nn.Module":
    height, width, channels = image_shape
    name = config.architecture
    if name == CNN13:
        from lsmix.classifiers.cnn13 import Cnn13

        return Cnn13(classes, channels, (height, width), config.width, config.final_batch_norm)
    if shape := depth_and_widening(name):
        from lsmix.classifiers.wide_resnet import WideResNet

        return WideResNet(classes, channels, (height, width), *shape)
    return _external(name, classes, image_shape)


def _external(name: str, classes: int, image_shape: tuple[int, int, int]) -> "nn.Module":
    """Return a network from another package, checked with one forward pass."""
    import torch

    height, width, channels = image_shape
    where = f"architecture {name!r}"
    network = logits = None
    try:
        if name.startswith("timm:"):
            create = import_object("timm:create_model", where)
            network = create(name.removeprefix("timm:"), pretrained=False, num_classes=classes, in_chans=channels)
        else:
            network = import_object(name, where)(classes)
        if isinstance(network, torch.nn.Module):
            with torch.no_grad():
                logits = network.eval()(torch.zeros(2, channels, height, width))
    except RecipeError:
        raise
    except Exception as error:  # other packages may raise anything
        raise RecipeError(
            f"{where} fails for {classes} classes and images of {height}×{width}×{channels}: {error}"
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise RecipeError(f"{where} returned {type(network).__name__}; expected a torch.nn.Module.")
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise RecipeError(f"{where} returns {got} for 2 images; expected logits (2, {classes}).")
    return network
