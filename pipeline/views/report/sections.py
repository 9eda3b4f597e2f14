"""The report page: headline numbers, warnings, the sections in order, and the provenance of all artifacts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from lsmix.data.errors import escape_json, format_bytes, format_duration
from lsmix.pipeline.engine.stage import StageTask
from lsmix.pipeline.views.page import Fact, Page, Section, Table
from lsmix.pipeline.views.report.flow import flow_section
from lsmix.pipeline.views.report.inputs import ReportInputs
from lsmix.pipeline.views.report.naturalness import naturalness_section
from lsmix.pipeline.views.report.pools import mixes_sections, pools_section
from lsmix.pipeline.views.report.results import results_sections

__all__ = ["SECTIONS", "build_page"]

# In page order; folded sections follow all open ones.
SECTIONS: Final[tuple[Callable[[ReportInputs], Iterable[Section]], ...]] = (
    mixes_sections,
    results_sections,
    naturalness_section,
    pools_section,
    flow_section,
)


def build_page(task: StageTask) -> Page:
    """Return the report page of the recipe whose artifacts are the inputs of ``task``."""
    inputs = ReportInputs(task)
    return Page(
        title=inputs.config.title or inputs.name,
        summary=_summary(inputs),
        facts=tuple(_facts(inputs)),
        warnings=tuple(_warnings(inputs)),
        sections=(*(part for section in SECTIONS for part in section(inputs)), _provenance(inputs), _recipe(inputs)),
        made_by=f"lsmix {inputs.artifacts['dataset'].manifest.environment['versions']['lsmix']}",
    )


def _summary(inputs: ReportInputs) -> str:
    dataset = inputs.dataset
    height, width, channels = dataset.image_shape
    text = (
        f"{len(dataset.train):,} training, {len(dataset.heldout):,} held-out and {len(dataset.test):,} test images of "
        f"{height}×{width}×{channels} in {len(dataset.class_names)} classes."
    )
    if not inputs.has_flow:
        return text
    config = inputs.flow.config
    return (
        f"{text} The flow is a Glow with L={config.levels} levels of K={config.steps} steps and width {config.hidden}."
    )


def _facts(inputs: ReportInputs) -> Iterator[Fact]:
    pools = [item.manifest.counts for item in inputs.named("pool").values()]
    if pools:
        images, decode_failed = (sum(counts[name] for counts in pools) for name in ("images", "decode_failed"))
        yield Fact(label="mixed images", value=f"{images:,}", note=f"{decode_failed:,} failed to decode at first")
    if inputs.has_flow:
        yield from _flow_facts(inputs)
    finished = [run for run in inputs.runs if run.errors]
    if finished:
        best = min(finished, key=lambda run: run.mean)
        yield Fact(label="lowest error rate", value=f"{best.mean:.2f} %", note=best.label)


def _flow_facts(inputs: ReportInputs) -> Iterator[Fact]:
    counts = inputs.artifacts["flow"].manifest.counts
    for split, note in (("heldout", "held-out images"), ("train", "training images")):
        bits = counts.get(f"{split}_bits_per_dim")
        if bits is not None:
            note = f"{note}, {inputs.flow.config.bits} bits"
            yield Fact(label="bits per dimension", value=f"{bits:.3f}", note=note)
            break
    latents = inputs.artifacts["latents"].manifest.counts
    if "exact_round_trips" in latents:
        exact, images = latents["exact_round_trips"], latents["images"]
        yield Fact(label="exact round trips", value=f"{exact:,} of {images:,}", note="decode(encode(x)) = x")


def _warnings(inputs: ReportInputs) -> Iterator[str]:
    if inputs.has_flow:
        latents = inputs.artifacts["latents"].manifest.counts
        missed = latents["images"] - latents.get("exact_round_trips", latents["images"])
        if missed:
            yield f"{missed:,} of {latents['images']:,} training images do not decode back exactly."
    for name, item in inputs.named("pool").items():
        replaced = item.manifest.counts["replaced"]
        if replaced:
            yield f"Pool {name}: {replaced:,} mixes could not be decoded and were replaced by their first source image."
    budgets = {(run.images, run.updates) for run in inputs.runs}
    if len(budgets) > 1:
        yield "The runs saw different numbers of images or updates, so comparing their error rates is not fair."


def _provenance(inputs: ReportInputs) -> Section:
    rows = []
    for manifest in (item.manifest for item in inputs.artifacts.values()):
        versions = manifest.environment.get("versions", {})
        made_with = [str(manifest.environment.get("device", ""))]
        made_with += [f"{name} {versions[name]}" for name in ("torch", "numpy") if name in versions]
        rows.append(
            (
                f"{manifest.stage} {manifest.name}",
                manifest.cache_key,
                manifest.content_digest,
                ", ".join(f"{record.role} {record.content_digest[:12]}" for record in manifest.inputs) or "–",
                format_duration(manifest.seconds),
                format_bytes(sum(file.bytes for file in manifest.files)),
                ", ".join(filter(None, made_with)),
            )
        )
    table = Table(
        columns=("artifact", "cache key", "content digest", "inputs", "time", "size", "made with"), rows=tuple(rows)
    )
    text = "All artifacts that this page was made from. Artifacts with equal content digests have equal data."
    return Section(title="Provenance", text=text, items=(table,), folded=True)


def _recipe(inputs: ReportInputs) -> Section:
    """Return the section with the configuration of all artifacts as a recipe, with all defaults."""
    sections: dict[str, Mapping[str, Any]] = {"data": inputs.artifacts["dataset"].manifest.config}
    parts = ("flow", "latents", "naturalness")
    sections |= {role: inputs.artifacts[role].manifest.config for role in parts if role in inputs.artifacts}
    sections |= {f"pools.{name}": item.manifest.config for name, item in inputs.named("pool").items()}
    sections |= {f'runs."{name}"': item.manifest.config for name, item in inputs.named("run").items()}
    lines: list[str] = []
    for name, fields in sections.items():
        lines += [*_toml_section(name, fields), ""]
    return Section(title=f"Recipe {inputs.name}", code="\n".join(lines), folded=True)


def _toml_section(name: str, fields: Mapping[str, Any]) -> list[str]:
    plain = [
        f"{key} = {_toml_value(value)}"
        for key, value in fields.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    nested = [_toml_section(f"{name}.{key}", value) for key, value in fields.items() if isinstance(value, Mapping)]
    return [f"[{name}]", *plain, *(line for section in nested for line in section)]


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml_value(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return escape_json(msgspec.json.encode(value).decode())  # JSON's strings, numbers and booleans are TOML's
