"""The graph of a recipe: its artifacts and their inputs, in an order in which they can be built.

Building the graph reads or downloads nothing except the manifests of finished flows that the recipe names.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from lsmix.data.artifact import MANIFEST_NAME, Artifact
from lsmix.data.errors import MissingError
from lsmix.data.pool_spec import in_latent_space
from lsmix.data.store import NATURAL_32, local_folder, open_input
from lsmix.pipeline.config.recipe import FlowSection, Recipe, training_name
from lsmix.pipeline.config.schema import (
    FlowRecipe,
    MixSource,
    NaturalnessConfig,
    TrainConfig,
)
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.stages.encode import ENCODE
from lsmix.pipeline.stages.ingest import INGEST
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.stages.naturalness import NATURALNESS
from lsmix.pipeline.stages.report import REPORT
from lsmix.pipeline.stages.train import TRAIN
from lsmix.pipeline.stages.train_flow import TRAIN_GLOW, check_start
from lsmix.pipeline.workspace.workspace import Workspace, find_artifact

if TYPE_CHECKING:
    from lsmix.data.readers.images.memory import MemorySource

__all__ = ["build_graph"]


def build_graph(recipe: Recipe, workspace: Workspace, source: "MemorySource | None" = None) -> list[Node]:
    """Return all nodes of a recipe in topological order; ``source`` replaces the files of its data set.

    Raises:
        MissingError: A flow that the recipe names does not exist.
        LsmixError: The recipe names a flow by URL and its manifest cannot be downloaded.
    """
    dataset = Node(stage=INGEST, name=recipe.name, config=recipe.data, source=source)
    nodes = [dataset]
    own_flow = recipe.own_flow
    encoded: dict[str, tuple[Node | Artifact, Node]] = {}

    def latents_of(flow_name: str) -> tuple[Node | Artifact, Node]:
        if flow_name not in encoded:
            flow: Node | Artifact
            if flow_name:
                flow = _find_flow(flow_name, workspace)
            else:
                inputs: dict[str, Node | Artifact] = {"dataset": dataset}
                if own_flow.start_from:
                    inputs["start"] = start = _find_flow(own_flow.start_from, workspace)
                    check_start(own_flow, start.manifest.config, start)
                flow = Node(stage=TRAIN_GLOW, name=recipe.name, config=_training_part(own_flow), inputs=inputs)
                nodes.append(flow)
            name = recipe.name if flow_name == own_flow.path else f"{recipe.name}.{len(encoded)}"
            latents = Node(stage=ENCODE, name=name, config=recipe.latents, inputs={"dataset": dataset, "flow": flow})
            nodes.append(latents)
            encoded[flow_name] = (flow, latents)
        return encoded[flow_name]

    artifacts: dict[str, Node | Artifact] = {"dataset": dataset}
    if recipe.wants_flow:
        artifacts["flow"], artifacts["latents"] = latents_of(own_flow.path)
    pools = {}
    for name, config in recipe.pools.items():
        inputs: dict[str, Node | Artifact] = {"dataset": dataset}
        if in_latent_space(config):
            pool_flow, pool_latents = latents_of(config.flow or own_flow.path)
            inputs = {"latents": pool_latents, "flow": pool_flow}
        pools[name] = Node(stage=MIX, name=name, config=config, inputs=inputs)
        nodes.append(pools[name])
    runs = _train_nodes(recipe, dataset, pools)
    nodes += runs.values()
    artifacts |= {f"pool:{name}": node for name, node in pools.items()}
    artifacts |= {f"run:{name}": node for name, node in runs.items()}
    if recipe.naturalness:
        nodes += _naturalness_nodes(recipe, recipe.naturalness, artifacts, runs)
        artifacts["naturalness"] = nodes[-1]
    nodes.append(Node(stage=REPORT, name=recipe.name, config=recipe.report_config(), inputs=artifacts))
    return nodes


def _train_nodes(recipe: Recipe, dataset: Node, pools: dict[str, Node]) -> dict[str, Node]:
    nodes = {}
    for name, run in recipe.runs.items():
        inputs: dict[str, Node | Artifact] = {"dataset": dataset}
        parts = []
        for part in run.mix or (MixSource(pool=run.pool),):
            role = f"pool-{len(inputs)}" if part.pool else ""
            if part.pool:
                inputs[role] = pools[part.pool]
            parts.append(msgspec.structs.replace(part, pool=role))
        for seed in run.seeds:
            shared = msgspec.structs.asdict(recipe.run_config(name, seed))
            config = TrainConfig(**shared, parts=tuple(parts), mode=run.mode)
            training = training_name(name, seed)
            nodes[training] = Node(stage=TRAIN, name=training, config=config, inputs=inputs)
    return nodes


def _naturalness_nodes(
    recipe: Recipe, config: NaturalnessConfig, artifacts: Mapping[str, Node | Artifact], runs: Mapping[str, Node]
) -> list[Node]:
    """Return the nodes of evaluator flow and naturalness; features come from the configured run, default "baseline"."""
    inputs = {role: artifacts[role] for role in ("dataset", "flow", "latents")}
    evaluator = Node(
        stage=TRAIN_GLOW,
        name=f"{recipe.name}-evaluator",
        config=recipe.evaluator_config(),
        inputs={"dataset": artifacts["dataset"]},
    )
    inputs["evaluator"] = evaluator
    run = config.classifier or "baseline"
    if run in recipe.runs:
        inputs["classifier"] = runs[training_name(run, recipe.runs[run].seeds[0])]
    return [evaluator, Node(stage=NATURALNESS, name=recipe.name, config=config, inputs=inputs)]


def _training_part(flow: FlowSection) -> FlowRecipe:
    return FlowRecipe(**{name: getattr(flow, name) for name in FlowRecipe.__struct_fields__})


def _find_flow(name: str, workspace: Workspace) -> Artifact:
    """Return a finished flow by its folder or URL, its name or cache key in the workspace, or NATURAL_32."""
    path = local_folder(name)
    if name == NATURAL_32 or path is None or (path / MANIFEST_NAME).is_file() or (path / "glow.json").is_file():
        return open_input(name, "flow")
    found = find_artifact(name, workspace, (TRAIN_GLOW.name,))
    if not found:
        existing = ", ".join(workspace.folder_names(TRAIN_GLOW.name)) or "none"
        raise MissingError(
            f"flow {name!r} does not exist, neither as a folder nor as a flow in {workspace.location!r} ({existing})."
        )
    return found
