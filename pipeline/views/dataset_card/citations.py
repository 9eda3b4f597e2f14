"""Whom to cite for a pool: the method's paper, the base set, and this software with the pool's digest.

The one rule: a pool cites the method that mixed it, which need not be the paper that lsmix is made for.
"""

from typing import Final

from lsmix.data.mixing import LATENT_METHODS
from lsmix.pipeline.views.dataset_card.summary import CardFacts

__all__ = ["citations"]

_PAPER: Final = (
    "G. Osada, B. Ahsan and T. Nishide, Mixed Samples Data Augmentation with Replacing Latent Vector Components in "
    "Normalizing Flow."
)
_METHODS: Final = {
    "mixup": "H. Zhang, M. Cisse, Y. N. Dauphin and D. Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018.",
    "cutmix": "S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe and Y. Yoo, CutMix: Regularization Strategy to Train Strong "
    "Classifiers with Localizable Features, ICCV 2019.",
    "resizemix": "J. Qin, J. Fang, Q. Zhang, W. Liu, X. Wang and X. Wang, ResizeMix: Mixing Data with Preserved Object "
    "Information and True Labels, 2020.",
    "fmix": "E. Harris, A. Marcu, M. Painter, M. Niranjan, A. Prügel-Bennett and J. Hare, FMix: Enhancing Mixed Sample "
    "Data Augmentation, 2020.",
}


def citations(facts: CardFacts) -> list[str]:
    """Return what to cite for a pool, one sentence each."""
    method = facts.pool.method
    found = [_PAPER if method in LATENT_METHODS.builtin() else _METHODS.get(method, "")]
    found.append(f"The lsmix authors, lsmix, version {facts.version}; pool with root digest {facts.manifest.root}.")
    if facts.origin.citation:
        found.append(f"Of the base images: {facts.origin.citation.rstrip('.')}.")
    return [text for text in found if text]
