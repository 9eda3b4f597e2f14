"""What ``lsmix verify`` and ``lsmix rebuild`` print: their facts as lines of text.

The one rule: what was not checked is told in the same breath as what was.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsmix.pipeline.rebuild import RebuildResult

__all__ = ["rebuild_lines", "verify_lines"]


def verify_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of ``verify`` as lines."""
    whole = f"{facts['files']} files, {facts['bytes']} bytes, all as recorded (root {facts['root'][:12]})"
    lines = [f"{facts['folder']}: {whole}"]
    lines += [f"{'checked':<12} {line}" for line in facts.get("checked", ())]
    if facts.get("deep"):
        lines.append(f"{'made again':<12} {_deep(facts['deep'])}")
    return lines + [f"{'not checked':<12} {line}" for line in facts.get("unchecked", ())]


def _deep(deep: Mapping[str, Any]) -> str:
    pixels = deep["pixels"]
    text = f"{deep['rows']} rows, {pixels['pixels_differing']} of {pixels['pixels']} pixels differ"
    if pixels["pixels_differing"]:
        text += f", by {pixels['largest']} at most, as another kind of device may"
    if deep["redrawn_otherwise"]:
        text += f"; {deep['redrawn_otherwise']} rows at the edge of corruption were redrawn otherwise, and left out"
    return text


def rebuild_lines(result: "RebuildResult") -> list[str]:
    """Return what came of ``rebuild`` as lines."""
    verdict = {None: "nobody told what to expect", True: "equal to the original's", False: "not the original's"}
    lines = [f"{'pool':<12} {result.folder}{' (was there already)' if result.cached else ''}"]
    lines.append(f"{'root':<12} {result.root} ({verdict[result.equal]})")
    if result.comparison:
        lines.append(f"{'compared':<12} {result.comparison.text()}")
    return lines
