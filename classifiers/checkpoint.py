"""Saving and loading the weights of a trained classifier. Files are read as untrusted input."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.evaluation import seeded
from lsmix.classifiers.registry import build_classifier
from lsmix.data.atomic import check_tensor_header, write_atomic
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.loaders.training_state import check_tensors

__all__ = ["load_classifier", "save_classifier"]


def save_classifier(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers. Equal values produce equal bytes."""
    tensors = {
        name: tensor.detach()
        .to("cpu")
        .clone(memory_format=torch.contiguous_format)  # so that tied weights do not share memory
        for name, tensor in model.state_dict().items()
    }
    write_atomic(path, save(tensors))


def load_classifier(
    weights: Path,
    config: ClassifierTraining,
    classes: int,
    image_shape: tuple[int, int, int],
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a trained network in evaluation mode. It maps float images (B, C, H, W) in [0, 1] to logits (B, classes).

    ``image_shape`` is (H, W, C). The global random state does not change.

    Raises:
        MissingError: The file does not exist.
        CorruptError: The file is not a readable safetensors file.
        FormatError: The tensors do not match the network that ``config`` describes.
        RecipeError: The network cannot be built.

    Example:
        >>> import tempfile
        >>> from lsmix.classifiers.training import ClassifierTrainer
        >>> config = ClassifierTraining(width=4)
        >>> trained = ClassifierTrainer(config, 10, (8, 8, 1), seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_classifier(Path(folder) / "w.safetensors", trained.model)
        ...     load_classifier(Path(folder) / "w.safetensors", config, 10, (8, 8, 1)).training
        False
    """
    if not weights.is_file():
        raise MissingError(f"{str(weights)!r} does not exist. Pass the weights file that 'lsmix train' wrote.")
    with seeded(torch.device("cpu"), 0, "load"):  # protects the global random state
        model = build_classifier(config, classes, image_shape)
    try:
        check_tensor_header(weights)
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open returns no dict
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{str(weights)!r} is damaged: {error}. Train again.") from error
    try:
        check_tensors(tensors, model.state_dict())
    except FormatError as error:
        raise FormatError(f"{str(weights)!r}: {error}") from error
    model.load_state_dict(tensors)
    return model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it for modules
