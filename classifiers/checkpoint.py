"""The weights of a trained classifier in a file: writing it, and reading it as untrusted input."""

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
    """Write a model's parameters and buffers; the same numbers give the same bytes."""
    tensors = {
        name: tensor.detach()
        .to("cpu")
        .clone(memory_format=torch.contiguous_format)  # tied weights share no memory then
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
    """Return the trained network in evaluation mode: float images (B, C, H, W) in [0, 1] to logits (B, classes).

    ``image_shape`` is (H, W, C). The global random state is left as it was.

    Raises:
        MissingError: there is no such file.
        CorruptError: it is no readable safetensors file.
        FormatError: its tensors are not those of the configuration's network.
        RecipeError: the network cannot be built.

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
        raise MissingError(f"no weights of a classifier at {str(weights)!r}. Name the file that 'lsmix train' made.")
    with seeded(torch.device("cpu"), 0, "load"):  # what is drawn here is replaced, but must not move the global state
        model = build_classifier(config, classes, image_shape)
    try:
        check_tensor_header(weights)
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (SafetensorError, OSError) as error:
        raise CorruptError(f"{str(weights)!r} is damaged: {error}. Train again.") from error
    try:
        check_tensors(tensors, model.state_dict())
    except FormatError as error:
        raise FormatError(f"{str(weights)!r}: {error}") from error
    model.load_state_dict(tensors)
    return model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it for modules
