"""The page on which one looks at a pool: facts, samples between their sources with filters, and how everything spreads.

One file that asks for nothing from outside and is never above 3 MB; all text in it is escaped, and only the
script that came with the template may run, by its digest in the page's content security policy.
"""

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsmix.data.artifact import Artifact, Provenance, read_provenance
from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import SplitArrays, open_dataset
from lsmix.data.errors import CorruptError, FormatError, RecipeError, format_bytes
from lsmix.data.pool import Pool, Sample, open_pool
from lsmix.data.pool_spec import CORNERS
from lsmix.data.store import open_artifact
from lsmix.pipeline.views.pool_summary import PoolSummary, summarise_pool
from lsmix.pipeline.views.render import html_templates
from lsmix.pipeline.workspace.local import Workspace

__all__ = ["PAGE_SAMPLES", "PoolCard", "PoolPicture", "render_pool_page", "write_pool_page"]

PAGE_SAMPLES = 120  # rows of a pool on its page, unless one asks for another number
_TEMPLATE = "pool_page.html.j2"
_PAGE_BYTES = 2_700_000  # of samples; facts and style take well under 300 kB beside them
_CARD_BYTES = 1_600  # what the text of a sample takes at most, about
_LARGEST_SIDE = 96  # pixels; larger images are reduced
_MATRIX_CLASSES = 20  # up to which pairs of classes are told as a matrix, else the most frequent ones as a list
_PAIRS_TOLD = 20
_NAME_LENGTH = 40  # characters of a class's name; strangers' names may be of any length
_TEXT_LENGTH = 200  # of other facts
_CITATION_LENGTH = 5_000
_DETAILS = 60  # facts of a manifest


@dataclass(frozen=True, kw_only=True)
class PoolPicture:
    """One picture of a sample."""

    title: str  # "x₁", "mix", "x₂", …
    name: str  # class, "" for the mix
    alt: str
    uri: str  # data: URI of a PNG


@dataclass(frozen=True, kw_only=True)
class PoolCard:
    """One sample of a pool, as the page shows it."""

    row: int
    pictures: tuple[PoolPicture, ...]
    labels: tuple[tuple[str, str], ...]  # class and its share, such as ("cat", "63 %")
    classes: tuple[int, ...]
    lam: float
    share: float
    event: str  # one of EVENTS
    corner: str  # "" where it is the first one

    @property
    def bytes(self) -> int:
        """What it takes on the page, about."""
        return _CARD_BYTES + sum(len(picture.uri) for picture in self.pictures)


def write_pool_page(
    place: Path | str | Artifact, target: Path | str, *, samples: int = PAGE_SAMPLES, data: Path | str | None = None
) -> str:
    """Write the page of a pool: what ``lsmix show --html`` does; return what it shows.

    Args:
        place: the pool, its folder or its URL.
        target: the HTML file to write.
        samples: rows of the pool to show, 1 or more; fewer are shown where the page would grow beyond 3 MB.
        data: artifact of the data set that the pool was made from, for the sources; else the pool's own workspace is
            searched, and without sources the mixes are shown alone.

    Raises:
        MissingError: there is no such artifact.
        FormatError: it is no pool, or of a format that this version does not read.
        CorruptError: it is damaged, or its labels are not those of its sources.
        RecipeError: ``data`` is another data set than the pool's.
    """
    page, what = render_pool_page(place, samples=samples, data=data)
    write_atomic(Path(target), page.encode())
    return what


def render_pool_page(
    place: Path | str | Artifact, *, samples: int = PAGE_SAMPLES, data: Path | str | None = None
) -> tuple[str, str]:
    """Return the page of a pool as HTML, and what it shows; see ``write_pool_page``."""
    artifact = open_artifact(place)
    manifest, where = artifact.manifest, artifact.location
    if manifest.stage != "mix":
        raise FormatError(f"an HTML page is made of pools; {where!r} holds {manifest.stage} {manifest.name!r}.")
    pool = open_pool(artifact)
    if pool.image_shape[2] not in (1, 3):
        raise FormatError(
            f"a page shows grey or RGB images, with 1 or 3 channels; those of pool {where!r} have {pool.image_shape[2]}."
        )
    origin = read_provenance(pool.columns.attributes, f"pool {where!r}") if _has_origin(pool) else None
    train = _train_split(pool, origin, data)
    survey = summarise_pool(pool, samples)
    cards = _within_the_limit(_card(pool, train, row, event) for row, event in survey.chosen.items())
    cards.sort(key=lambda card: (card.share, card.row))
    templates = html_templates(Path(__file__).parent)
    templates.filters["csp_digest"] = _csp_digest
    text = templates.get_template(_TEMPLATE).render(**_content(pool, origin, survey, cards, train is not None))
    sources = " between their sources" if train else "; their sources are not here, name the data set with --data"
    return text, f"{len(cards)} of {len(pool)} images{sources}"


def _csp_digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _has_origin(pool: Pool) -> bool:
    return "origin" in pool.columns.attributes


def _train_split(pool: Pool, origin: Provenance | None, data: Path | str | None) -> SplitArrays | None:
    """Return the images that the pool is made of; None where they are not here."""
    if data is None:
        found = _in_the_workspace(pool.artifact, origin) if origin else None
        if found is None:
            return None
    else:
        found = open_artifact(data)
        root = found.manifest.root
        if origin is None or root != origin.root:
            raise RecipeError(
                f"pool {pool.location!r} was made from the data set with root {origin.root[:12] if origin else 'unknown'}, "
                f"got {found.location!r} with root {root[:12]}. Name the artifact of the pool's own data set."
            )
    train = open_dataset(found).train
    if train.images.shape[1:] != pool.image_shape:
        raise CorruptError(
            f"pool {pool.location!r} has images of {pool.image_shape}, its data set {found.location!r} of {train.images.shape[1:]}."
        )
    return train


def _in_the_workspace(pool: Artifact, origin: Provenance) -> Artifact | None:
    if not pool.is_local:
        return None
    workspace = Workspace(pool.folder.resolve().parent.parent)
    manifests = (manifest for _, manifest in workspace.manifests("ingest"))
    return next((workspace.find("ingest", each.key) for each in manifests if each.root == origin.root), None)


def _within_the_limit(cards: Iterator[PoolCard]) -> list[PoolCard]:
    kept: list[PoolCard] = []
    size = 0
    for card in cards:
        size += card.bytes
        if kept and size > _PAGE_BYTES:
            break
        kept.append(card)
    return kept


def _card(pool: Pool, train: SplitArrays | None, row: int, event: str) -> PoolCard:
    sample = pool[row]
    others = [(sample.source_b, sample.label_b, sample.share_b), *((m.source, m.label, m.share) for m in sample.more)]
    first = (sample.source_a, sample.label_a, max(0.0, 1 - sum(share for _, _, share in others)))
    parts = [first, *others]
    labels = tuple((_name(pool, label, row), f"{100 * share:.0f} %") for _, label, share in parts)
    pictures = [_mix_picture(sample, labels)]
    if train is not None:
        sources = [
            _source_picture(pool, train, row, place, source, label) for place, (source, label, _) in enumerate(parts)
        ]
        pictures = [sources[0], pictures[0], *sources[1:]]
    return PoolCard(
        row=row,
        pictures=tuple(pictures),
        labels=labels,
        classes=tuple(dict.fromkeys(label for _, label, _ in parts)),
        lam=sample.lam,
        share=sample.share_b,
        event=event,
        corner="" if sample.corner == CORNERS[0] else sample.corner,
    )


def _mix_picture(sample: Sample, labels: Sequence[tuple[str, str]]) -> PoolPicture:
    told = ", ".join(f"{share} {name}" for name, share in labels)
    return PoolPicture(title="mix", name="", alt=f"mix: {told}", uri=_png_uri(sample.image))


def _source_picture(pool: Pool, train: SplitArrays, row: int, place: int, source: int, label: int) -> PoolPicture:
    if not 0 <= source < len(train) or int(train.labels[source]) != label:
        got = f"class {int(train.labels[source])}" if 0 <= source < len(train) else f"a split of {len(train)} images"
        raise CorruptError(
            f"pool {pool.location!r} is damaged: by row {row} training image {source} is of class {label}, the data "
            f"set has {got}. Run 'lsmix verify'."
        )
    title, name = f"x{'₁₂₃₄₅₆₇₈₉'[place]}" if place < 9 else f"x{place + 1}", _name(pool, label, row)
    return PoolPicture(title=title, name=name, alt=f"{title}: {name}", uri=_png_uri(train.images[source]))


def _name(pool: Pool, label: int, row: int) -> str:
    if not 0 <= label < len(pool.class_names):
        raise CorruptError(f"pool {pool.location!r} is damaged: row {row} has label {label}. Run 'lsmix verify'.")
    return _short(pool.class_names[label], _NAME_LENGTH)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _png_uri(image: NDArray[np.uint8]) -> str:
    """Return an image (H, W, C) as a data: URI, reduced where a side is longer than a page shows."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    factor = -(-max(picture.size) // _LARGEST_SIDE)
    if factor > 1:
        picture = picture.reduce(factor)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _content(
    pool: Pool, origin: Provenance | None, survey: PoolSummary, cards: Sequence[PoolCard], with_sources: bool
) -> dict[str, Any]:
    height, width, channels = pool.image_shape
    present = sorted({label for card in cards for label in card.classes})
    return {
        "name": _short(pool.manifest.name, _NAME_LENGTH),
        "method": _short(pool.method, _NAME_LENGTH),
        "images": len(pool),
        "copies": pool.copies,
        "per_copy": pool.images_per_copy,
        "shape": f"{height} × {width}",
        "colours": "RGB" if channels == 3 else "grey",
        "class_count": len(pool.class_names),
        "bytes": format_bytes(sum(file.bytes for file in pool.manifest.files)),
        "licence": _short(origin.licence, _TEXT_LENGTH) if origin else "",
        "citation": _short(origin.citation, _CITATION_LENGTH) if origin else "",
        "with_sources": with_sources,
        "reduced": max(height, width) > _LARGEST_SIDE,
        "sources": pool.sources,
        "events": survey.events,
        "events_total": len(pool) - survey.events["ok"],
        "events_shown": sum(card.event != "ok" for card in cards),
        "cards": cards,
        "classes": [(label, _short(pool.class_names[label], _NAME_LENGTH)) for label in present],
        "histograms": [
            ("λ as drawn", "lam", _bars(survey.lam)),
            ("Share of x₂, as it is", "share", _bars(survey.share)),
        ],
        "matrix": _matrix(pool, survey),
        "pairs": _pairs(pool, survey),
        "details": _details(pool, origin),
    }


def _bars(counts: NDArray[np.int64]) -> list[dict[str, Any]]:
    step, most = 1 / len(counts), max(int(counts.max()), 1)
    return [
        {"range": f"{place * step:.2f}–{(place + 1) * step:.2f}", "count": int(count), "height": int(count) / most}
        for place, count in enumerate(counts)
    ]


def _matrix(pool: Pool, survey: PoolSummary) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return a row for each first class: its name, and count and shade for each second one; none for many classes."""
    if survey.pairs is None or len(pool.class_names) > _MATRIX_CLASSES:
        return []
    most = max(int(survey.pairs.max()), 1)
    return [
        (_short(name, _NAME_LENGTH), [(int(count), round(int(count) / most, 3)) for count in line])
        for name, line in zip(pool.class_names, survey.pairs, strict=True)
    ]


def _pairs(pool: Pool, survey: PoolSummary) -> list[tuple[str, str, int]]:
    """Return the most frequent pairs of classes, for pools that have too many for a matrix."""
    if survey.pairs is None or len(pool.class_names) <= _MATRIX_CLASSES:
        return []
    flat = survey.pairs.ravel()
    names = [_short(name, _NAME_LENGTH) for name in pool.class_names]
    order = np.argsort(-flat, kind="stable")[:_PAIRS_TOLD].tolist()
    return [(names[pair // len(names)], names[pair % len(names)], int(flat[pair])) for pair in order if flat[pair]]


def _details(pool: Pool, origin: Provenance | None) -> list[tuple[str, str]]:
    manifest = pool.manifest
    details = [("root digest", manifest.root), ("key", manifest.key)]
    details += [(f"from {record.role}", record.root) for record in manifest.inputs]
    if origin:
        details += [("data set", origin.root), ("training images", f"{origin.train_images:,}")]
    details += [(name, str(value)) for name, value in manifest.config.items()]
    return [(_short(name, _NAME_LENGTH), _short(value, _TEXT_LENGTH)) for name, value in details[:_DETAILS]]
