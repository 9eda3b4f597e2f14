"""Report which artifacts are cached, which would be made, and which fields or inputs have changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from lsmix.data.artifact import InputRecord, Manifest
from lsmix.data.errors import CorruptError, format_count, format_duration
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.shards import finished_shards, read_ledger
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.locks import Owner, working_owners
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["NodeStatus", "field_differences", "recipe_status"]


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one artifact of a recipe."""

    stage: str
    name: str
    state: Literal["cached", "under-way", "unfinished", "to-run", "waits", "damaged"] = "damaged"
    cache_key: str = ""  # "" while an input is missing
    folder: str = ""  # current or future location; "" while the key is unknown
    why: str = ""
    bytes: int | None = None  # on disk, or estimated; None if unknown
    seconds: float | None = None  # measured, or estimated; None if unknown
    done: int | None = None  # finished units of all processes; this and the following fields only for "under-way"
    total: int | None = None  # units in total
    unit: str = ""  # "image", "iteration", …
    per_second: float | None = None  # units per second of all processes
    seconds_left: float | None = None


def recipe_status(nodes: Sequence[Node], workspace: Workspace, *, force: str = "") -> list[NodeStatus]:
    """Return the status of every node, in order; ``force`` names a stage to rerun. Reads manifests and records only."""
    resolver = Resolver(workspace)
    found = [_node_status(node, resolver) for node in nodes]
    made = {"cached", "damaged"}
    return [
        replace(node, state="to-run", why="--force") if node.stage == force and node.state in made else node
        for node in found
    ]


def _node_status(node: Node, resolver: Resolver) -> NodeStatus:
    workspace = resolver.workspace
    status = NodeStatus(stage=node.stage.name, name=node.name)
    try:
        records = resolver.records(node)
        artifact = resolver.artifact(node)
        if artifact:
            return replace(
                status,
                state="cached",
                cache_key=artifact.manifest.cache_key,
                folder=artifact.location,
                why="up to date",
                bytes=sum(file.bytes for file in artifact.manifest.files),
                seconds=artifact.manifest.seconds,
            )
        cost = resolver.cost(node)
    except CorruptError as error:
        return replace(status, why=str(error))
    if cost:
        status = replace(status, bytes=cost.bytes, seconds=resolver.seconds(node.stage.name, cost))
    key = resolver.key(node)
    if records is None or key is None:
        return replace(status, state="waits", why=_waits_for(node, resolver))
    folder = workspace.folder(node.stage.name, node.name, key)
    status = replace(status, cache_key=key, folder=str(folder))
    url = workspace.url_of(folder)
    remote = read_ledger(url, node.stage.name) if url and node.stage.create else {}
    if not folder.is_dir() and not remote:
        return replace(status, state="to-run", why=_why(node, resolver.fields(node), records, workspace))
    progress = (
        f"{format_count(len(finished_shards(folder) | remote), 'shard')} done"
        if node.stage.create
        else "resumes from the last checkpoint"
    )
    owners = working_owners(workspace.root, key)
    if owners:
        return _under_way(replace(status, state="under-way", why=progress), owners)
    return replace(status, state="unfinished", why=f"interrupted: {progress}")


def _under_way(status: NodeStatus, owners: Sequence[Owner]) -> NodeStatus:
    """Add the processes that work on the artifact, and their combined progress."""
    counting = [owner for owner in owners if owner.total]
    who = "; ".join(map(str, owners))
    if not counting:
        return replace(status, why=f"{status.why}; {who}")
    done, total = sum(owner.done for owner in counting), sum(owner.total for owner in counting)
    rate, unit = sum(owner.per_second for owner in counting), counting[0].unit
    unit = unit if unit.isalpha() else "unit"  # other users may have written the note
    known = [owner.seconds_left for owner in counting if owner.seconds_left is not None]
    left = max(known) if len(known) == len(counting) else None  # array tasks run at the same time
    why = f"{done:,} of {total:,} {unit}s, {rate:.1f} {unit}s/s" + (
        f", {format_duration(left)} left" if left is not None else ""
    )
    return replace(status, why=f"{why}; {who}", done=done, total=total, unit=unit, per_second=rate, seconds_left=left)


def _waits_for(node: Node, resolver: Resolver) -> str:
    missing = resolver.missing(node)
    return f"waits for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")


def _why(node: Node, fields: Mapping[str, Any], records: Sequence[InputRecord], workspace: Workspace) -> str:
    """Describe the differences from the most similar artifact of this name."""
    best: list[str] | None = None
    for _, manifest in workspace.manifests(node.stage.name):
        if manifest.name == node.name:
            differences = _differences(node, fields, records, manifest)
            if best is None or len(differences) < len(best):
                best = differences
    if best is None:
        return "not made yet"
    return "; ".join(best) or "the earlier artifact was removed"


def _differences(
    node: Node, fields: Mapping[str, Any], records: Sequence[InputRecord], manifest: Manifest
) -> list[str]:
    found = []
    if manifest.stage_version != node.stage.version:
        found.append(f"stage version {manifest.stage_version} → {node.stage.version}")
    before = {name: value for name, value in manifest.config.items() if name not in node.stage.not_in_key}
    found += [f"{name} {_short(old)} → {_short(new)}" for name, old, new in field_differences(before, fields)]
    digests = {record.role: record.content_digest for record in manifest.inputs}
    for record in records:
        old = digests.get(record.role)
        if old != record.content_digest:
            found.append(f"input {record.role} {'is new' if old is None else 'has changed'}")
    found += [f"input {role} is no longer used" for role in digests.keys() - {record.role for record in records}]
    return found


def field_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each dotted field in which two nested mappings differ, with both values; None for a missing value."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from field_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, old, new


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else text[:37] + "…"
