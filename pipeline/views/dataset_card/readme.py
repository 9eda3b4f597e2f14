"""``README.md`` and the notices in ``LICENSES/``: what a pool tells a person.

A sentence stands there only if it is true of this very pool; numbers are the pool's own.
"""

from typing import Any, Final, NamedTuple

import msgspec

from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import POOL_COLUMNS
from lsmix.pipeline.views.dataset_card.citations import citations
from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, Licence
from lsmix.pipeline.views.dataset_card.markup import render
from lsmix.pipeline.views.dataset_card.summary import CardFacts

__all__ = ["IMAGES_NOTICE", "LSMIX_NOTICE", "README_FILE", "describe", "images_notice", "lsmix_notice", "readme"]

README_FILE: Final = "README.md"
IMAGES_NOTICE: Final = "LICENSES/images.txt"
LSMIX_NOTICE: Final = "LICENSES/lsmix.txt"
_CLASSES_SHOWN: Final = 20
_LONG: Final = 400  # letters of a setting that are shown
_SIZES: Final = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_PLACES: Final = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


class _Part(NamedTuple):
    which: str
    label: int
    name: str
    source: int
    weight: float


def describe(facts: CardFacts) -> str:
    """Return one paragraph on what the pool is."""
    pool = facts.pool
    space = ", a method from another package"
    if pool.method in LATENT_METHODS.builtin():
        space = " in the latent space of a Glow flow"
    elif pool.method in PIXEL_METHODS.builtin():
        space = " in pixel space"
    return (
        f"{len(pool):,} training images for classifiers, each mixed from {pool.sources} images of one base set by "
        f"{pool.method}{space}, with the classes of its sources, the share of each, λ, and which images they were."
    )


def readme(facts: CardFacts, licence: Licence, *, sheet: bool, sheet_has_sources: bool) -> bytes:
    """Return the card of a pool: front matter as the Hugging Face hub reads it, then Markdown.

    Args:
        facts: of the pool.
        licence: of the base images.
        sheet: whether ``card.png`` lies beside it.
        sheet_has_sources: whether that shows each mix between its sources.
    """
    pool = facts.pool
    return render(
        "card.md.j2",
        cited=citations(facts),
        classes_left_out=max(len(facts.classes) - _CLASSES_SHOWN, 0),
        decode_failed=facts.decode_failed,
        description=describe(facts),
        example=facts.example,
        example_row=facts.example_row,
        kept=facts.spec.pool.on_decode_failure == "keep",
        latent=facts.spec.latent,
        licence=licence,
        manifest=facts.manifest,
        no_licence=NO_LICENCE,
        origin=facts.origin,
        origin_settings=[(name, _short(value)) for name, value in facts.origin.config.items() if value not in ("", 0)],
        parts=_parts(facts),
        pool=pool,
        settings=_settings(facts),
        sheet=sheet,
        sheet_has_sources=sheet_has_sources,
        shown_classes=facts.classes[:_CLASSES_SHOWN],
        size=sum(file.bytes for file in facts.files),
        size_category=_SIZES[min(max(len(str(len(pool))) - 3, 0), len(_SIZES) - 1)],
        spreads=[("lam", facts.lam), ("share_b", facts.share)],
        statuses=[(name, facts.statuses[name], meaning) for name, meaning in POOL_COLUMNS["status"].words.items()],
        columns=pool.attributes.columns(),
        title=f"{facts.manifest.name}: {pool.method} mixes of {facts.origin.train_images:,} images",
    )


def images_notice(facts: CardFacts, licence: Licence) -> bytes:
    """Return the notice on the licence of the images."""
    values: dict[str, Any] = {"name": facts.manifest.name, "manifest": facts.manifest, "origin": facts.origin}
    return render("images.txt.j2", licence=licence, no_licence=NO_LICENCE, **values)


def lsmix_notice() -> bytes:
    """Return the notice on the licence of what lsmix added."""
    return render("lsmix.txt.j2")


def _settings(facts: CardFacts) -> list[tuple[str, Any]]:
    spec = facts.spec
    rows: list[tuple[str, Any]] = [
        (name, _short(value)) for name, value in msgspec.to_builtins(spec.pool).items() if value not in ("", ())
    ]
    if spec.latents:
        rows += [(f"latents: {name}", _short(value)) for name, value in msgspec.to_builtins(spec.latents).items()]
    rows += [(f"root digest of the {role}", root) for role, root in spec.inputs.items()]
    if spec.dim:
        rows.append(("components of a latent vector", spec.dim))
    return [*rows, ("made with", f"lsmix {facts.version}, stage version {spec.stage_version}")]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _parts(facts: CardFacts) -> list[_Part]:
    """Return the sources of the example with their weights in the loss."""
    sample, names = facts.example, facts.pool.class_names
    rest = 1 - sample.share_b - sum(source.share for source in sample.more)
    found = [(sample.label_a, sample.source_a, rest), (sample.label_b, sample.source_b, sample.share_b)]
    found += [(source.label, source.source, source.share) for source in sample.more]
    return [
        _Part(_PLACES[place] if place < len(_PLACES) else str(place + 1), label, names[label], source, weight)
        for place, (label, source, weight) in enumerate(found)
    ]
