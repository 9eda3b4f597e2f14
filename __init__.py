"""lsmix: mixed-image data sets made in the latent space of a Glow normalising flow.

Public names are imported on first use, so ``import lsmix`` is fast and reading a pool does not import the flow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmix.data.errors import LsmixError
    from lsmix.data.loaders.pool_loader import PoolLoader
    from lsmix.data.pool import open_pool
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.latent_mixing import mix_latents
    from lsmix.pipeline.api import finalize, pull, push, run, run_array_task, verify
    from lsmix.pipeline.verify.rebuild import rebuild

__all__ = [
    "LsmixError",
    "PoolLoader",
    "__version__",
    "finalize",
    "load_flow",
    "mix_latents",
    "open_pool",
    "pull",
    "push",
    "rebuild",
    "run",
    "run_array_task",
    "verify",
]

__version__ = "0.1.0"
_HOME = {
    "LsmixError": "lsmix.data.errors",
    "PoolLoader": "lsmix.data.loaders.pool_loader",
    "finalize": "lsmix.pipeline.api",
    "load_flow": "lsmix.glow.checkpoint",
    "mix_latents": "lsmix.glow.latent_mixing",
    "open_pool": "lsmix.data.pool",
    "pull": "lsmix.pipeline.api",
    "push": "lsmix.pipeline.api",
    "rebuild": "lsmix.pipeline.verify.rebuild",
    "run": "lsmix.pipeline.api",
    "run_array_task": "lsmix.pipeline.api",
    "verify": "lsmix.pipeline.api",
}


def __getattr__(name: str) -> Any:  # Any: the type of a lazily imported name is unknown (PEP 562)
    if name not in _HOME:
        raise AttributeError(f"module 'lsmix' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
