"""lsmix: mixed-image data sets made in the latent space of a Glow normalising flow.

Names are imported when they are first used, so that ``import lsmix`` costs nothing and reading a pool needs no flow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmix.classifiers.pixel_mixing import mix_images
    from lsmix.data.dataset import open_dataset
    from lsmix.data.errors import LsmixError
    from lsmix.data.latents import open_latents
    from lsmix.data.loaders.array_loader import ArrayLoader
    from lsmix.data.loaders.combined_loader import CombinedLoader
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool
    from lsmix.data.progress import NullProgress
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.latent_mixing import mix_latents
    from lsmix.pipeline.api import export_pool, figure, finalize, pull, push, run, run_array_task, verify
    from lsmix.pipeline.verify.rebuild import rebuild
    from lsmix.pipeline.views.show import write_image

__all__ = [
    "ArrayLoader",
    "CombinedLoader",
    "LsmixError",
    "NullProgress",
    "PoolLoader",
    "__version__",
    "export_pool",
    "figure",
    "finalize",
    "load_flow",
    "mix_images",
    "mix_latents",
    "open_dataset",
    "open_latents",
    "open_pool",
    "pull",
    "push",
    "rebuild",
    "run",
    "run_array_task",
    "verify",
    "write_image",
]

__version__ = "0.1.0"
_HOME = {
    "ArrayLoader": "lsmix.data.loaders.array_loader",
    "CombinedLoader": "lsmix.data.loaders.combined_loader",
    "LsmixError": "lsmix.data.errors",
    "NullProgress": "lsmix.data.progress",
    "PoolLoader": "lsmix.data.loaders.pool_loader",
    "export_pool": "lsmix.pipeline.api",
    "figure": "lsmix.pipeline.api",
    "finalize": "lsmix.pipeline.api",
    "load_flow": "lsmix.glow.checkpoint",
    "mix_images": "lsmix.classifiers.pixel_mixing",
    "mix_latents": "lsmix.glow.latent_mixing",
    "open_dataset": "lsmix.data.dataset",
    "open_latents": "lsmix.data.latents",
    "open_pool": "lsmix.data.pool",
    "pull": "lsmix.pipeline.api",
    "push": "lsmix.pipeline.api",
    "rebuild": "lsmix.pipeline.verify.rebuild",
    "run": "lsmix.pipeline.api",
    "run_array_task": "lsmix.pipeline.api",
    "verify": "lsmix.pipeline.api",
    "write_image": "lsmix.pipeline.views.show",
}


def __getattr__(name: str) -> Any:  # PEP 562: the type of a lazily imported name is not known here
    if name not in _HOME:
        raise AttributeError(f"module 'lsmix' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
