"""Find the inputs, cache keys and existing artifacts of a graph's nodes, as far as they are known."""

from pathlib import Path
from typing import Any

from lsmix.data.artifact import Artifact, InputRecord
from lsmix.data.readers.registry import source_files, source_version
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.cache_key import artifact_key, key_fields
from lsmix.pipeline.workspace.local import Workspace

__all__ = ["Resolver"]


class Resolver:
    """Knows the inputs, the key and the artifact of every node of a graph, as far as they can be known yet.

    Args:
        workspace: where artifacts are.
        remember: whether checksums of source files may be written there, to be had at once the next time.
    """

    def __init__(self, workspace: Workspace, *, remember: bool = False) -> None:
        self.workspace = workspace
        self._remember = remember
        self._sources: dict[int, InputRecord] = {}
        self._found: dict[int, Artifact] = {}  # finished artifacts don't change under a run

    def inputs(self, node: Node) -> dict[str, Artifact] | None:
        """Return the finished inputs of a node by role; None while one isn't there yet."""
        found = {}
        for role, source in node.inputs.items():
            artifact = self.artifact(source) if isinstance(source, Node) else source
            if artifact is None:
                return None
            found[role] = artifact
        return found

    def records(self, node: Node) -> list[InputRecord] | None:
        """Return what goes into a node's key for its inputs; None while one isn't there yet."""
        if node.stage.reads_source:
            return [self._source_record(node)]
        inputs = self.inputs(node)
        if inputs is None:
            return None
        return [
            InputRecord(
                role=role, cache_key=artifact.manifest.cache_key, content_digest=artifact.manifest.content_digest
            )
            for role, artifact in inputs.items()
        ]

    def key(self, node: Node) -> str | None:
        """Return the key of a node; None while an input isn't there yet."""
        records = self.records(node)
        if records is None:
            return None
        return artifact_key(node.stage.name, node.stage.version, self.fields(node), records)

    def artifact(self, node: Node) -> Artifact | None:
        """Return the finished artifact of a node, or None."""
        if id(node) not in self._found:
            key = self.key(node)
            there = self.workspace.find(node.stage.name, key) if key else None
            if there is None:
                return None
            self._found[id(node)] = there
        return self._found[id(node)]

    def missing(self, node: Node) -> list[str]:
        """Return what those inputs of a node are called that its graph makes and that aren't there yet."""
        sources = [source for source in node.inputs.values() if isinstance(source, Node)]
        return [source.label for source in sources if self.artifact(source) is None]

    def forget(self, node: Node) -> None:
        """Forget a node's artifact, which was removed."""
        self._found.pop(id(node), None)

    @staticmethod
    def fields(node: Node) -> dict[str, Any]:
        """Return the configuration fields that are part of a node's key."""
        return key_fields(node.config, node.stage.not_in_key)

    def _source_record(self, node: Node) -> InputRecord:
        if id(node) not in self._sources:
            files = source_files(node.config)
            root = Path(node.config.path)
            base = root if root.is_dir() else root.parent
            sources = self.workspace.sources
            digest = sources.digest(files, base, remember=self._remember) if files else source_version(node.config)
            self._sources[id(node)] = InputRecord(role="source", cache_key="", content_digest=digest)
        return self._sources[id(node)]
