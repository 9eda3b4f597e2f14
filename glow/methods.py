"""The mixing methods in latent space by name. Imports no torch, so that recipes are checked at once."""

from typing import Final

from lsmix.data.methods import Registry

__all__ = ["LATENT_METHODS"]

LATENT_METHODS: Final = Registry(
    "mixing method in latent space",
    "lsmix.latent_methods",
    {
        "ls-mix": "lsmix.glow.latent_mixing:ls_mix",
        "linear": "lsmix.glow.latent_mixing:linear",
        "bern-mix": "lsmix.glow.latent_mixing:bern_mix",
        "swap-mix": "lsmix.glow.latent_mixing:swap_mix",
        "reverse-mix": "lsmix.glow.latent_mixing:reverse_mix",
    },
)
