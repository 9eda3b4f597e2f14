"""The whole page of a report: its chapters, the facts on top, warnings, and where everything came from."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from lsmix.data.errors import escape_json
from lsmix.pipeline.engine.stage import StageTask
from lsmix.pipeline.views.report.flow import flow_section
from lsmix.pipeline.views.report.inputs import ReportInputs
from lsmix.pipeline.views.report.mixes import mixes_section
from lsmix.pipeline.views.report.naturalness import naturalness_section
from lsmix.pipeline.views.report.page import Fact, ProvenanceRow, ReportPage, Section
from lsmix.pipeline.views.report.pools import pools_section
from lsmix.pipeline.views.report.results import results_section

__all__ = ["SECTIONS", "build_page"]

# In the order of the page. A section with neither tables nor pictures is left out.
SECTIONS: Final[tuple[Callable[[ReportInputs], Section], ...]] = (
    results_section,
    mixes_section,
    naturalness_section,
    pools_section,
    flow_section,
)


def build_page(task: StageTask) -> ReportPage:
    """Return the page of a recipe whose artifacts are the inputs of ``task``."""
    material = ReportInputs(task)
    sections = [section(material) for section in SECTIONS]
    return ReportPage(
        title=material.config.title or material.name,
        summary=_summary(material),
        facts=tuple(_facts(material)),
        warnings=tuple(_warnings(material)),
        sections=tuple(section for section in sections if section.tables or section.figures),
        provenance=tuple(_provenance(material)),
        recipe=_as_toml(material),
        recipe_name=material.name,
        made_by=f"lsmix {material.inputs['dataset'].manifest.environment['versions']['lsmix']}",
    )


def _summary(material: ReportInputs) -> str:
    dataset = material.dataset
    height, width, channels = dataset.image_shape
    text = (
        f"{len(dataset.train):,} training, {len(dataset.heldout):,} held-out and {len(dataset.test):,} test images of "
        f"{height}×{width}×{channels} in {len(dataset.class_names)} classes."
    )
    if not material.has_flow:
        return text
    config = material.flow.config
    return f"{text} The flow is a Glow with L={config.levels}, K={config.steps} and width {config.hidden}."


def _facts(material: ReportInputs) -> Iterator[Fact]:
    finished = [run for run in material.runs if run.errors]
    if finished:
        best = min(finished, key=lambda run: run.mean)
        yield Fact(label="lowest error rate", value=f"{best.mean:.2f} %", note=best.label)
    if material.has_flow:
        yield from _flow_facts(material)
    pools = [item.manifest.counts for item in material.named("pool").values()]
    if pools:
        images, decode_failed = (sum(counts[name] for counts in pools) for name in ("images", "decode_failed"))
        yield Fact(label="mixed images", value=f"{images:,}", note=f"{decode_failed:,} failed to decode at first")


def _flow_facts(material: ReportInputs) -> Iterator[Fact]:
    counts = material.inputs["flow"].manifest.counts
    for split, note in (("heldout", "held-out images"), ("train", "training images")):
        bits = counts.get(f"{split}_bits_per_dim")
        if bits is not None:
            yield Fact(
                label="bits per dimension", value=f"{bits:.3f}", note=f"{note}, {material.flow.config.bits} bits"
            )
            break
    latents = material.inputs["latents"].manifest.counts
    if "exact_round_trips" in latents:
        exact, images = latents["exact_round_trips"], latents["images"]
        yield Fact(label="exact round trips", value=f"{exact:,} of {images:,}", note="decode(encode(x)) = x")


def _warnings(material: ReportInputs) -> Iterator[str]:
    if material.has_flow:
        latents = material.inputs["latents"].manifest.counts
        missed = latents["images"] - latents.get("exact_round_trips", latents["images"])
        if missed:
            yield f"{missed:,} of {latents['images']:,} training images do not decode back exactly."
    for name, item in material.named("pool").items():
        counts = item.manifest.counts
        if counts["replaced"]:
            yield f"Pool {name}: {counts['replaced']:,} images were never good and are replaced by their first source."
    budgets = {(run.images, run.updates) for run in material.runs}
    if len(budgets) > 1:
        yield "The runs saw different numbers of images or updates; their error rates are no fair comparison."


def _provenance(material: ReportInputs) -> Iterator[ProvenanceRow]:
    for item in material.inputs.values():
        manifest = item.manifest
        environment = manifest.environment
        versions = environment.get("versions", {})
        yield ProvenanceRow(
            stage=manifest.stage,
            name=manifest.name,
            key=manifest.key,
            root=manifest.root,
            inputs=tuple(f"{record.role} {record.root[:12]}" for record in manifest.inputs),
            seconds=manifest.seconds,
            bytes=sum(file.bytes for file in manifest.files),
            device=str(environment.get("device", "")),
            versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "numpy") if name in versions),
        )


def _as_toml(material: ReportInputs) -> str:
    """Return the configuration of all artifacts as a recipe says it, defaults included."""
    sections: dict[str, Mapping[str, Any]] = {"data": material.inputs["dataset"].manifest.config}
    parts = ("flow", "latents", "naturalness")
    sections |= {role: material.inputs[role].manifest.config for role in parts if role in material.inputs}
    sections |= {f"pools.{name}": item.manifest.config for name, item in material.named("pool").items()}
    sections |= {f'runs."{name}"': item.manifest.config for name, item in material.named("run").items()}
    lines: list[str] = []
    for name, fields in sections.items():
        lines += [*_toml_section(name, fields), ""]
    return "\n".join(lines)


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
