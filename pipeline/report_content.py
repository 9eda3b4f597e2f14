"""What stands in the report of a recipe: tables, curves, sheets and histograms, drawn from its artifacts."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from lsmix.data.dataset import DataSet, open_dataset
from lsmix.data.latents import Latents, open_latents
from lsmix.data.pool import Pool, open_pool
from lsmix.glow.checkpoint import load_flow
from lsmix.glow.flow import Flow
from lsmix.pipeline.error_rates import RunSummary, summarise_runs
from lsmix.pipeline.ingest import DATASET_FILE
from lsmix.pipeline.plots import Series, bits_histogram, curves, error_rate_plot, histogram
from lsmix.pipeline.report import ReportConfig
from lsmix.pipeline.report_naturalness import naturalness_section
from lsmix.pipeline.report_page import (
    Fact,
    PoolFacts,
    ProvenanceRow,
    ReportFigure,
    ReportPage,
    Section,
    Table,
    error_table,
    pool_table,
)
from lsmix.pipeline.sheets import png_bytes, sheet
from lsmix.pipeline.stage import InputArtifact, StageTask
from lsmix.pipeline.sweeps import FIG3_RATES, FIG4_RATES, choose_pairs, mix_sweep, zero_sweep
from lsmix.pipeline.train import read_metrics
from lsmix.pipeline.train_glow import read_log

__all__ = ["build_page"]

_SHEET_WIDTH = 830  # pixels that a sheet should about have
_DENSITY = 2  # pixels of a sheet to one of the page, so that its letters are sharp
_SMOOTHED_POINTS = 200  # of the loss curve: a mean over equal stretches shows the course and not the noise


class _Material:
    """The artifacts of a recipe, opened when they are wanted."""

    def __init__(self, task: StageTask) -> None:
        self.config: ReportConfig = task.config
        self.inputs = task.inputs
        self._device = task.device

    def named(self, kind: str) -> dict[str, InputArtifact]:
        """Return the inputs of a kind, "pool" or "run", by name."""
        prefix = f"{kind}:"
        return {role[len(prefix) :]: item for role, item in self.inputs.items() if role.startswith(prefix)}

    @cached_property
    def dataset(self) -> DataSet:
        """The data set."""
        return open_dataset(self.inputs["dataset"].folder / DATASET_FILE)

    @cached_property
    def flow(self) -> Flow:
        """The recipe's flow."""
        return load_flow(self.inputs["flow"].folder, device=self._device)

    @cached_property
    def latents(self) -> Latents:
        """The latents of the training images."""
        return open_latents(self.inputs["latents"].folder)

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """All pools by name."""
        return {name: open_pool(item.folder) for name, item in self.named("pool").items()}

    @cached_property
    def runs(self) -> list[RunSummary]:
        """The error rates of all runs."""
        grouped: dict[str, list[InputArtifact]] = {}
        for name, item in self.named("run").items():
            grouped.setdefault(name.partition("/")[0], []).append(item)
        return summarise_runs({name: [item.manifest for item in items] for name, items in grouped.items()})


def build_page(task: StageTask) -> ReportPage:
    """Return the page of a recipe whose artifacts are the inputs of ``task``."""
    material = _Material(task)
    name = task.folder.name.rpartition("-")[0]
    sections = [_results(material), _mixes(material), _pools(material), _flow(material)]
    sections.insert(2, naturalness_section(material.inputs.get("naturalness")))
    return ReportPage(
        title=material.config.title or name,
        summary=_summary(material),
        facts=tuple(_facts(material)),
        warnings=tuple(_warnings(material)),
        sections=tuple(section for section in sections if section.tables or section.figures),
        provenance=tuple(_provenance(material)),
        recipe=_as_toml(material),
        recipe_name=name,
        made_by=f"lsmix {material.inputs['dataset'].manifest.environment['versions']['lsmix']}",
    )


def _summary(material: _Material) -> str:
    dataset = material.dataset
    height, width, channels = dataset.image_shape
    return (
        f"{len(dataset.train):,} training, {len(dataset.heldout):,} held-out and {len(dataset.test):,} test images of "
        f"{height}×{width}×{channels} in {len(dataset.class_names)} classes. Mixed in the latent space of a Glow flow "
        f"with L={material.flow.config.levels}, K={material.flow.config.steps} and width {material.flow.config.hidden}."
    )


def _facts(material: _Material) -> Iterator[Fact]:
    finished = [run for run in material.runs if run.errors]
    if finished:
        best = min(finished, key=lambda run: run.mean)
        yield Fact(label="lowest error rate", value=f"{best.mean:.2f} %", note=best.label)
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
    pools = [item.manifest.counts for item in material.named("pool").values()]
    if pools:
        images, corrupted = (sum(counts[name] for counts in pools) for name in ("images", "corrupted"))
        yield Fact(label="mixed images", value=f"{images:,}", note=f"{corrupted:,} corrupted at first draw")


def _warnings(material: _Material) -> Iterator[str]:
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


def _results(material: _Material) -> Section:
    runs = material.runs
    if not runs:
        return Section(title="Error rates")
    budget = ", ".join(f"{run.label}: {run.images:,} images in {run.updates:,} updates" for run in runs)
    errors, losses = _by_epoch(material, "test_error"), _by_epoch(material, "loss")
    return Section(
        title="Error rates",
        text="Error of the last epoch on the test split, for every run over its seeds.",
        tables=(error_table(runs, note=f"Budget of each seed: {budget}."),),
        figures=(
            _plot("error-rates", error_rate_plot(runs), "Error rates of all runs with their standard deviations."),
            _plot(
                "error-curves",
                curves("Test error", errors, "epoch", "error rate, %", y_log=True),
                "Test error by epoch.",
            ),
            _plot(
                "loss-curves",
                curves("Training loss", losses, "epoch", "nats"),
                "Training loss by epoch, mean over seeds.",
                "On mixed images the loss cannot reach zero, so it does not compare across runs.",
            ),
        ),
    )


def _by_epoch(material: _Material, field: str) -> list[Series]:
    """Return a line for each run: a metric's mean over its seeds, by epoch."""
    seeds: dict[str, list[list[float]]] = {}
    for name, item in material.named("run").items():
        values = [float(getattr(entry, field)) for entry in read_metrics(item.folder)]
        seeds.setdefault(name.partition("/")[0], []).append(values)
    means = {run: np.mean(lines, axis=0) for run, lines in seeds.items()}
    return [Series(label=run, x=range(1, len(mean) + 1), y=mean) for run, mean in means.items()]


def _mixes(material: _Material) -> Section:
    figures = []
    count = material.config.pairs
    titles = ["x₁", *(f"λ={rate}" for rate in FIG4_RATES), "x₂"]
    for name, pool in material.pools.items():
        if _made_by_this_flow(material, name):
            rows = mix_sweep(material.flow, material.latents, choose_pairs(pool, count), method=pool.method)
            figures.append(
                _sheet(
                    f"mixes-{name}",
                    rows,
                    titles,
                    f"Pairs of pool {name} mixed at growing λ.",
                    f"Pool {name}: pairs mixed at growing λ, as in Fig. 4 of the paper. The part that comes from x₂ grows "
                    "from the upper left, cell by cell of the coarsest grid in Morton order.",
                )
            )
            break  # every pool with this flow would show the same kind of sweep
    zero_titles = ["x", *(str(rate) for rate in FIG3_RATES)]
    rows = zero_sweep(material.flow, material.latents, range(min(count, len(material.latents))))
    figures.append(
        _sheet(
            "zero-fill",
            rows,
            zero_titles,
            "Images whose last latent components are set to zero.",
            "The last part of the latent set to zero, as in Fig. 3 of the paper: the image of the zero latent spreads from "
            "the lower right.",
        )
    )
    return Section(title="Mixed images", figures=tuple(figures))


def _made_by_this_flow(material: _Material, pool: str) -> bool:
    flow = material.inputs["flow"].manifest.root
    return any(record.role == "flow" and record.root == flow for record in material.named("pool")[pool].manifest.inputs)


def _pools(material: _Material) -> Section:
    if not material.pools:
        return Section(title="Pools")
    facts = []
    figures = []
    bits = {}
    for name, pool in material.pools.items():
        counts = pool.manifest.counts
        facts.append(
            PoolFacts(
                name=name,
                method=pool.method,
                images=len(pool),
                redrawn=counts["redrawn"],
                replaced=counts["replaced"],
                corrupted=counts["corrupted_rows"],
            )
        )
        rates = _plot(
            f"rates-{name}",
            histogram(pool.lam[:], pool.share_b[:]),
            f"Histograms of λ and of the effective share in pool {name}.",
            f"Pool {name}: λ as drawn, and the share of the second image after rounding down to whole components.",
        )
        figures.append(rates)
        if _made_by_this_flow(material, name):
            images = pool.image[: material.config.bits_images]
            bits[name] = material.flow.bits_per_dim(material.flow.log_prob(images))
    originals = material.latents.bits_per_dim[:]
    figures.append(
        _plot(
            "bits",
            bits_histogram(originals, bits),
            "Bits per dimension of training images and of mixed images.",
            "How likely the flow itself finds training images and mixes, both with their own low bits instead of noise, so "
            "below the figures of the training. Fewer bits are more likely, which is not the same as more natural: grey "
            "and blurred images take fewer bits than photographs.",
        )
    )
    return Section(title="Pools", tables=(pool_table(facts),), figures=tuple(figures))


def _flow(material: _Material) -> Section:
    item = material.inputs["flow"]
    counts, config = item.manifest.counts, material.flow.config
    rows = [(name, f"{value}") for name, value in msgspec.to_builtins(config).items()]
    rows += [(name.replace("_", " "), _text(value)) for name, value in counts.items()]
    table = Table(title="The flow", columns=("what", "value"), rows=tuple(rows))
    if not (item.folder / "log.jsonl").is_file():  # a flow from elsewhere comes without its log
        return Section(title="Flow", tables=(table,))
    log = read_log(item.folder)
    iterations = np.array([line.iteration for line in log])
    loss = np.array([line.loss_bits_per_dim for line in log], dtype=float)
    parts = [part for part in np.array_split(np.arange(len(log)), min(_SMOOTHED_POINTS, len(log))) if len(part)]
    series = [Series(label="batch (mean)", x=[iterations[p].mean() for p in parts], y=[loss[p].mean() for p in parts])]
    for field, label in (("train_bits_per_dim", "train"), ("heldout_bits_per_dim", "held-out")):
        points = [(line.iteration, getattr(line, field)) for line in log if getattr(line, field) is not None]
        if points:
            x, y = zip(*points, strict=True)
            series.append(Series(label=label, x=x, y=y))
    norms = [Series(label="gradient norm", x=iterations, y=[line.grad_norm or np.nan for line in log])]
    figures = [
        _plot(
            "flow-bits",
            curves("Likelihood", series, "iteration", "bits per dimension"),
            "Bits per dimension by iteration.",
        ),
        _plot("flow-gradient", curves("Gradient norm", norms, "iteration", "nats/dim"), "Gradient norm by iteration."),
    ]
    samples = item.folder / "samples.png"
    if samples.is_file():
        alt = "Images drawn from the flow."
        caption = f"Images drawn from the flow at temperature {item.manifest.config['temperature']}."
        figures.append(
            ReportFigure(
                name="samples", data=samples.read_bytes(), media="image/png", alt=alt, caption=caption, pixelated=True
            )
        )
    return Section(title="Flow", tables=(table,), figures=tuple(figures))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plot(name: str, data: bytes, alt: str, caption: str = "") -> ReportFigure:
    return ReportFigure(name=name, data=data, media="image/svg+xml", alt=alt, caption=caption)


def _sheet(name: str, rows: list[list[np.ndarray]], titles: list[str], alt: str, caption: str) -> ReportFigure:
    scale = max(1, round(_SHEET_WIDTH / (len(titles) * rows[0][0].shape[1])))
    picture = sheet(rows, column_titles=titles, scale=_DENSITY * scale, gap=4 * _DENSITY, text_size=13 * _DENSITY)
    return ReportFigure(
        name=name,
        data=png_bytes(picture),
        media="image/png",
        alt=alt,
        caption=caption,
        pixelated=True,
        density=_DENSITY,
    )


def _provenance(material: _Material) -> Iterator[ProvenanceRow]:
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


def _as_toml(material: _Material) -> str:
    """Return the configuration of all artifacts as a recipe says it, defaults included."""
    sections: dict[str, Mapping[str, Any]] = {
        "data": material.inputs["dataset"].manifest.config,
        "flow": material.inputs["flow"].manifest.config,
        "latents": material.inputs["latents"].manifest.config,
    }
    sections |= {f"pools.{name}": item.manifest.config for name, item in material.named("pool").items()}
    sections |= {f"runs.{name}": item.manifest.config for name, item in material.named("run").items()}
    lines: list[str] = []
    for name, fields in sections.items():
        lines += [*_toml_section(name, fields), ""]
    return "\n".join(lines)


def _toml_section(name: str, fields: Mapping[str, Any]) -> list[str]:
    plain = [
        f"{key} = {msgspec.json.encode(value).decode()}"  # JSON's strings, numbers, booleans and lists are TOML's
        for key, value in fields.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    nested = [_toml_section(f"{name}.{key}", value) for key, value in fields.items() if isinstance(value, Mapping)]
    return [f"[{name}]", *plain, *(line for section in nested for line in section)]
