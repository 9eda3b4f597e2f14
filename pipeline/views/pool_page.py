"""The HTML page of a pool: samples next to their source images, more samples with filters, and statistics.

The page is one self-contained file of at most 3 MB. Only the template's own script may run: the content security policy
of the page contains its digest.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import SplitArrays
from lsmix.data.errors import CorruptError, FormatError, format_bytes
from lsmix.data.pool import Pool, Sample, open_pool
from lsmix.data.pool_spec import CORNERS, Provenance, read_provenance
from lsmix.data.store import open_artifact
from lsmix.pipeline.views.page import Fact, Figure, Page, Section, Table, render_page
from lsmix.pipeline.views.plots import histogram, pair_matrix
from lsmix.pipeline.views.pool_sources import source_images
from lsmix.pipeline.views.pool_summary import EVENTS, PoolSummary, source_parts, summarise_pool

__all__ = ["PAGE_SAMPLES", "render_pool_page"]

PAGE_SAMPLES: Final = 120  # rows of a pool on its page by default
_OPEN_SAMPLES = 9  # always visible; all further samples are folded
_FAILED_SAMPLES = 24  # rows that failed to decode, in a separate section
_PAGE_BYTES = 2_600_000  # for samples; styles and plots take less than 400 kB
_TEXT_BYTES = 1_600  # approximate upper limit per sample
_LARGEST_SIDE = 96  # pixels; larger images are downscaled
_MATRIX_CLASSES = 20  # with more classes, the most frequent pairs are listed instead of drawing a matrix
_PAIRS_LISTED = 20
_NAME_LENGTH = 40  # characters of a class name; pools may contain names of any length
_TEXT_LENGTH = 200  # characters of other texts
_CITATION_LENGTH = 5_000
_DETAILS = 60  # manifest values shown


@dataclass(frozen=True, kw_only=True)
class _Picture:
    title: str  # "x₁", "mix", "x₂", …
    name: str  # class name, "" for the mix
    alt: str
    uri: str  # data: URI of a PNG


@dataclass(frozen=True, kw_only=True)
class _Card:
    """One sample of a pool, prepared for the page."""

    row: int
    pictures: tuple[_Picture, ...]
    labels: tuple[tuple[str, str], ...]  # class and its share, such as ("cat", "63 %")
    classes: tuple[int, ...]
    lam: float
    share: float
    status: str  # one of EVENTS
    corner: str  # "" for the default corner


def render_pool_page(
    place: Path | str | Artifact, *, samples: int = PAGE_SAMPLES, data: Path | str | None = None
) -> tuple[str, str]:
    """Return the page of a pool as HTML, and a line that says what it shows.

    Args:
        place: The pool, its folder or its URL.
        samples: Number of rows to show, at least 1; fewer are shown if the page would exceed 3 MB.
        data: Folder or URL of the data set artifact that the pool was made from. By default, the pool's own workspace
            is searched. Without the data set, the page shows the mixes only.

    Raises:
        MissingError: The artifact does not exist.
        FormatError: The artifact is not a pool, or has a format that this version cannot read.
        CorruptError: The pool is damaged, or its labels differ from the labels of its source images.
        RecipeError: ``data`` is not the pool's data set.
    """
    artifact = open_artifact(place)
    manifest, where = artifact.manifest, artifact.location
    if manifest.stage != "mix":
        raise FormatError(f"Only pools have an HTML page; {where!r} is the artifact {manifest.stage} {manifest.name}.")
    pool = open_pool(artifact)
    if pool.image_shape[2] not in (1, 3):
        raise FormatError(
            f"A page shows images with 1 (grey) or 3 (RGB) channels; pool {where!r} has {pool.image_shape[2]}."
        )
    has_origin = "origin" in pool.columns.attributes
    origin = read_provenance(pool.columns.attributes, f"pool {where!r}") if has_origin else None
    train = source_images(pool, data)
    room = max(1, _PAGE_BYTES // _most_bytes(pool, with_sources=train is not None))  # samples that fit on the page
    summary = summarise_pool(pool, min(samples, room))
    cards = [_card(pool, train, row, event) for row, event in summary.chosen.items()]
    others = [row for row in summary.decode_failed if row not in summary.chosen]
    failures = [_card(pool, train, row) for row in others[: min(_FAILED_SAMPLES, room - len(cards))]]
    present = sorted({label for card in cards for label in card.classes})
    page = render_page(
        _page(pool, origin, summary),
        "pool_page.html.j2",
        open_cards=cards[:_OPEN_SAMPLES],
        folded_cards=cards[_OPEN_SAMPLES:],
        failures=failures,
        statuses=[(event, count) for event, count in summary.events.items() if count or event == "ok"],
        images=len(pool),
        with_sources=train is not None,
        reduced=max(pool.image_shape[:2]) > _LARGEST_SIDE,
        classes=[(label, _short(pool.class_names[label], _NAME_LENGTH)) for label in present],
    )
    sources = "with their source images" if train else "without their source images; name the data set with --data"
    return page, f"{len(cards):,} of {len(pool):,} images {sources}"


def _most_bytes(pool: Pool, *, with_sources: bool) -> int:
    """Return the maximum bytes that a sample takes on the page: its text, and incompressible PNGs in base64."""
    height, width, channels = pool.image_shape
    factor = -(-max(height, width) // _LARGEST_SIDE)
    picture = 200 + 1.4 * channels * -(-height // factor) * -(-width // factor)
    return int(_TEXT_BYTES + (pool.sources + 1 if with_sources else 1) * picture)


def _card(pool: Pool, train: SplitArrays | None, row: int, event: str = "") -> _Card:
    sample = pool[row]
    parts = source_parts(sample)
    names = [_short(pool.class_names[label], _NAME_LENGTH) for _, label, _ in parts]
    labels = tuple((name, f"{100 * share:.0f} %") for name, (*_, share) in zip(names, parts, strict=True))
    pictures = [_mix_picture(sample, labels)]
    if train is not None:
        sources = [
            _source_picture(pool, train, row, index, source, label, names[index])
            for index, (source, label, _) in enumerate(parts)
        ]
        pictures = [sources[0], pictures[0], *sources[1:]]
    return _Card(
        row=row,
        pictures=tuple(pictures),
        labels=labels,
        classes=tuple(dict.fromkeys(label for _, label, _ in parts)),
        lam=sample.lam,
        share=sample.share_b,
        status=event or (sample.status if sample.status != "ok" else EVENTS[-1]),
        corner="" if sample.corner == CORNERS[0] else sample.corner,
    )


def _mix_picture(sample: Sample, labels: Sequence[tuple[str, str]]) -> _Picture:
    shares = ", ".join(f"{share} {name}" for name, share in labels)
    return _Picture(title="mix", name="", alt=f"mix: {shares}", uri=_png_uri(sample.image))


def _source_picture(
    pool: Pool, train: SplitArrays, row: int, index: int, source: int, label: int, name: str
) -> _Picture:
    if (got := int(train.labels[source])) != label:
        raise CorruptError(
            f"Pool {pool.location!r} is damaged: row {row} says that training image {source} has class {label}, but in "
            f"the data set it has class {got}. Run 'lsmix verify'."
        )
    title = f"x{'₁₂₃₄₅₆₇₈₉'[index]}" if index < 9 else f"x{index + 1}"
    return _Picture(title=title, name=name, alt=f"{title}: {name}", uri=_png_uri(train.images[source]))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _png_uri(image: NDArray[np.uint8]) -> str:
    """Return an image (H, W, C) as a data: URI, downscaled if a side is longer than 96 pixels."""
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    factor = -(-max(picture.size) // _LARGEST_SIDE)
    if factor > 1:
        picture = picture.reduce(factor)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(pool: Pool, origin: Provenance | None, summary: PoolSummary) -> Page:
    height, width, channels = pool.image_shape
    size = format_bytes(sum(file.bytes for file in pool.manifest.files))
    licence = _short(origin.licence, _TEXT_LENGTH) if origin else ""
    copies = f"{pool.copies:,} {'copy' if pool.copies == 1 else 'copies'} of {pool.images_per_copy:,}"
    shares = f"{pool.sources} labels and their shares"
    return Page(
        title=_short(pool.manifest.name, _NAME_LENGTH),
        summary=f"{len(pool):,} images mixed by {_short(pool.method, _NAME_LENGTH)}, each with {shares}.",
        facts=(
            Fact(label="images", value=f"{len(pool):,}", note=copies),
            Fact(
                label="pixels",
                value=f"{height} × {width}",
                note=f"{'RGB' if channels == 3 else 'grey'}, {size} in total",
            ),
            Fact(label="classes", value=f"{len(pool.class_names):,}"),
            Fact(label="licence of the base images", value=licence or "not recorded"),
        ),
        warnings=() if licence else ("No licence is recorded for these images. Set data.licence in the recipe.",),
        sections=(
            Section(
                title="λ and shares",
                items=(
                    Figure(
                        name="shares",
                        data=histogram(summary.lam, summary.share),
                        alt="Histograms of the sampled λ and of the share of x₂, over all images.",
                        caption=f"All {len(pool):,} images. λ is the sampled weight of x₂, the second image; the share "
                        "is the weight that x₂ really has in the mix.",
                    ),
                ),
            ),
            *_pairs(pool, summary),
            *_provenance(pool, origin),
        ),
        made_by="Made by lsmix show.",
    )


def _pairs(pool: Pool, summary: PoolSummary) -> Iterator[Section]:
    """Yield the section on pairs of classes: a matrix, or the most frequent pairs if there are many classes."""
    if summary.pairs is None:
        return
    names = [_short(name, _NAME_LENGTH) for name in pool.class_names]
    if len(names) <= _MATRIX_CLASSES:
        figure = Figure(
            name="pairs",
            data=pair_matrix(summary.pairs, names),
            alt="Number of images for each class of x₁ (rows) and class of x₂ (columns).",
        )
        yield Section(title="Pairs of classes", items=(figure,), folded=True)
        return
    flat = summary.pairs.ravel()
    order = [pair for pair in np.argsort(-flat, kind="stable")[:_PAIRS_LISTED].tolist() if flat[pair]]
    rows = tuple((names[pair // len(names)], names[pair % len(names)], f"{int(flat[pair]):,}") for pair in order)
    text = f"The most frequent of the {len(flat):,} possible pairs."
    table = Table(columns=("class of x₁", "class of x₂", "images"), rows=rows)
    yield Section(title="Pairs of classes", text=text, items=(table,), folded=True)


def _provenance(pool: Pool, origin: Provenance | None) -> Iterator[Section]:
    manifest = pool.manifest
    details = [("content digest", manifest.content_digest), ("cache key", manifest.cache_key)]
    details += [(f"content digest of {record.role}", record.content_digest) for record in manifest.inputs]
    if origin:
        details += [
            ("content digest of data set", origin.content_digest),
            ("training images", f"{origin.train_images:,}"),
        ]
    details += [(name, str(value)) for name, value in manifest.config.items()]
    rows = tuple((_short(name, _NAME_LENGTH), _short(value, _TEXT_LENGTH)) for name, value in details[:_DETAILS])
    text = "Artifacts with equal content digests have equal bytes. Run lsmix verify to check the digest."
    yield Section(title="Provenance", text=text, items=(Table(columns=("field", "value"), rows=rows),), folded=True)
    citation = _short(origin.citation, _CITATION_LENGTH) if origin else ""
    yield Section(title="Citation of the base images", code=citation, folded=True)
