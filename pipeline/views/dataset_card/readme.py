"""``README.md`` and ``LICENSES/`` of a pool, written by the mix stage, or with statistics in a card or export.

Every sentence must be true for the pool at hand, so conditional sentences depend on the pool's own metadata.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from lsmix.data.atomic import write_atomic
from lsmix.data.errors import CorruptError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import Pool, PoolAttributes
from lsmix.data.pool_spec import PLAN_NAME, PoolSpec
from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, Licence
from lsmix.pipeline.views.dataset_card.markup import clean, render

if TYPE_CHECKING:
    from lsmix.data.exports.format import ExportFormat
    from lsmix.pipeline.views.dataset_card.statistics import CardStatistics

__all__ = ["README_FILE", "PoolDescription", "write_readme"]

README_FILE: Final = "README.md"
_CLASSES_SHOWN: Final = 20
_SAMPLE_METADATA: Final = {"row": "int64", "class_a": "string", "class_b": "string"}  # see ``ExportJob.samples``
_LONG: Final = 400  # characters of a setting that are shown
_SIZES: Final = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


class PoolDescription(NamedTuple):
    """What is known about a pool without reading its rows."""

    name: str
    spec: PoolSpec
    attributes: PoolAttributes
    image_shape: tuple[int, int, int]
    version: str  # of lsmix, with which the pool was made

    @classmethod
    def of(cls, pool: Pool) -> "PoolDescription":
        """Return the description of a finished pool.

        Raises:
            CorruptError: The pool has no plan.json, or it is damaged.
            FormatError: The plan has a version that this lsmix cannot read.
        """
        if pool.spec is None:
            raise CorruptError(f"Pool {pool.location!r} has no {PLAN_NAME}. Download or rebuild the pool.")
        versions = pool.manifest.environment.get("versions")
        version = str(versions.get("lsmix", "unknown")) if isinstance(versions, dict) else "unknown"
        return cls(pool.manifest.name, pool.spec, pool.attributes, pool.image_shape, version)

    @property
    def images(self) -> int:
        """The number of mixed images."""
        return self.attributes.copies * self.attributes.images_per_copy

    @property
    def text(self) -> str:
        """A short description of the pool."""
        method = self.attributes.method
        space = ", a method from another package"
        if method in LATENT_METHODS.builtin():
            space = " in the latent space of a Glow flow"
        elif method in PIXEL_METHODS.builtin():
            space = " in pixel space"
        return (
            f"{self.images:,} training images for classifiers, each mixed from {self.attributes.sources} images of one base "
            f"set by {method}{space}. Each row stores the mix, λ, and the row, class and share of every source image."
        )

    def citations(self, content_digest: str = "") -> list[str]:
        """Return the citations of the method's paper, of lsmix and the pool, and of the base set, one sentence each."""
        method, registry = self.attributes.method, LATENT_METHODS if self.spec.latent else PIXEL_METHODS
        found = [registry.entry(method).citation if method in registry else ""]
        found.append(
            f"The lsmix authors, lsmix, version {self.version}{content_digest and f'; pool with content digest {content_digest}'}."
        )
        if self.spec.origin.citation:
            found.append(f"Base images: {self.spec.origin.citation.rstrip('.')}.")
        return [text for text in found if text]


def write_readme(
    folder: Path,
    described: PoolDescription,
    licence: Licence,
    *,
    card: "CardStatistics | None" = None,
    form: "ExportFormat | None" = None,
    encoding: str = "",
) -> None:
    """Write README.md, with front matter for the Hugging Face Hub, and LICENSES/ into a folder.

    Args:
        folder: Folder of the pool, its card or its export.
        described: Description of the pool.
        licence: Licence of the base images.
        card: Statistics and image of the card; None omits them.
        form: Format of an export; None for a pool.
        encoding: Image encoding of the export.
    """
    attributes, spec = described.attributes, described.spec
    base = _short(spec.origin.config.get("title") or "")
    readme = render(
        "card.md.j2",
        card=card,
        cited=described.citations(card.content_digest if card else ""),
        classes=card.classes if card else [(name, None, None) for name in attributes.class_names],
        classes_shown=_CLASSES_SHOWN,
        columns=attributes.columns(),
        copies=attributes.copies,
        description=described.text,
        features=_hub_features(described, form.hub_row, encoding) if form and form.hub_row else [],
        form=form,
        image_shape=described.image_shape,
        images=described.images,
        latent=spec.latent,
        licence=licence,
        method=attributes.method,
        no_licence=NO_LICENCE,
        origin=spec.origin,
        origin_settings=[(name, _short(value)) for name, value in spec.origin.config.items() if value not in ("", 0)],
        settings=_settings(described),
        size_category=_SIZES[min(max(len(str(described.images)) - 3, 0), len(_SIZES) - 1)],
        sources=attributes.sources,
        title=f"{described.name}: {attributes.method} mixes of {spec.origin.train_images:,} images{base and f' of {base}'}",
    )
    values: dict[str, Any] = {"name": described.name, "origin": spec.origin}
    write_atomic(folder / README_FILE, readme)
    write_atomic(folder / "LICENSES" / "images.txt", render("images.txt.j2", licence=licence, **values))
    write_atomic(folder / "LICENSES" / "lsmix.txt", render("lsmix.txt.j2"))


def _hub_features(described: PoolDescription, rows: str, encoding: str) -> list[dict[str, Any]]:
    """Return the features of an export as Hugging Face ``datasets`` writes them; ``rows`` is the form's ``hub_row``."""
    names, columns = described.attributes.class_names, list[dict[str, Any]]()
    # datasets rejects duplicate class names.
    classes = {"class_label": {"names": {str(number): clean(name) for number, name in enumerate(names)}}}
    labels = classes if len(set(names)) == len(names) else "int64"
    for column in described.attributes.columns():
        if column.row != "image":
            kind = labels if column.kind == "label" else column.dtype
            columns.append({"name": column.name, "list" if column.row == "more" else "dtype": kind})
    if rows != "sample":
        image = {"array3_d": {"dtype": "uint8", "shape": list(described.image_shape)}}
        return [{"name": "image", "dtype": image}, *columns]
    columns += [{"name": name, "dtype": kind} for name, kind in _SAMPLE_METADATA.items()]
    member_names = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    return [{"name": encoding, "dtype": "image"}, {"name": "json", "struct": columns}, *member_names]


def _settings(described: PoolDescription) -> list[tuple[str, Any]]:
    spec = described.spec
    rows: list[tuple[str, Any]] = [
        (name, _short(value)) for name, value in msgspec.to_builtins(spec.pool).items() if value not in ("", ())
    ]
    if spec.latents:
        rows += [(f"latents: {name}", _short(value)) for name, value in msgspec.to_builtins(spec.latents).items()]
    rows += [(f"content digest of the {role}", digest) for role, digest in sorted(spec.inputs.items())]
    if spec.dim:
        rows.append(("components of a latent vector", spec.dim))
    return [*rows, ("made with", f"lsmix {described.version}, stage version {spec.stage_version}")]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
