"""What to cite for a pool: the paper of its mixing method, the base set, and this software with the pool's digest."""

from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.pipeline.views.dataset_card.summary import CardFacts

__all__ = ["citations"]


def citations(facts: CardFacts) -> list[str]:
    """Return what to cite for a pool, one sentence each."""
    method, registry = facts.pool.method, LATENT_METHODS if facts.spec.latent else PIXEL_METHODS
    found = [registry.entry(method).citation if method in registry else ""]
    found.append(f"The lsmix authors, lsmix, version {facts.version}; pool with root digest {facts.manifest.root}.")
    if facts.origin.citation:
        found.append(f"Of the base images: {facts.origin.citation.rstrip('.')}.")
    return [text for text in found if text]
