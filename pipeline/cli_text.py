"""What commands print for people: their facts as lines of text.

What was not checked is told in the same breath as what was.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsmix.data.errors import format_bytes, format_duration

if TYPE_CHECKING:
    from lsmix.data.sharing.transfer import Transfer
    from lsmix.pipeline.api import RunResult
    from lsmix.pipeline.engine.garbage import Garbage
    from lsmix.pipeline.engine.stage import ArrayTaskResult
    from lsmix.pipeline.engine.status import NodeStatus
    from lsmix.pipeline.verify.rebuild import RebuildResult

__all__ = [
    "fact_lines",
    "garbage_lines",
    "part_lines",
    "rebuild_lines",
    "run_facts",
    "run_lines",
    "status_lines",
    "transfer_lines",
    "verify_lines",
]


def run_lines(result: "RunResult") -> list[str]:
    """Return what a run made and what came of it."""
    made, wanted = sum(not item.cached for item in result.built), len(result.built)
    rest = "" if made == wanted else f", {wanted - made} up to date already"
    lines = [f"{made} of {wanted} artifacts made{rest}"]
    for row in result.error_rates:
        paper = f"; the paper has {row.paper}" if row.paper else ""
        lines.append(f"error rate  {row.label:<26} {row.text} %  ({len(row.errors)} seeds{paper})")
    if result.report_place:
        lines.append(f"report      {result.report_place}")
    elif result.built:
        lines.append(f"last        {result.built[-1].location}")
    return lines


def run_facts(result: "RunResult") -> dict[str, Any]:
    """Return what a run made, ready for JSON."""
    return {
        "artifacts": [
            {
                "stage": item.stage,
                "name": item.name,
                "key": item.key,
                "folder": item.location,
                "root": item.manifest.root,
                "cached": item.cached,
                "seconds": round(item.seconds, 3),
                "counts": item.manifest.counts,
            }
            for item in result.built
        ],
        "error_rates": [
            {
                "run": row.name,
                "label": row.label,
                "errors": row.errors,
                "mean": row.mean,
                "std": row.std,
                "paper": row.paper or None,
            }
            for row in result.error_rates
        ],
        "report": result.report_place or None,
    }


def part_lines(parts: "Sequence[ArrayTaskResult]", recipe: str) -> list[str]:
    """Return what one array task made, and what to do when all have ended."""
    lines = [
        f"{part.label:<32} {part.made} of {part.shards} shards made; {part.finished} of {part.of} are there"
        for part in parts
    ]
    return [*lines, f"when all array tasks have ended: lsmix finalize {recipe}" if parts else "all up to date already"]


def status_lines(nodes: "Sequence[NodeStatus]") -> list[str]:
    """Return the state of every artifact of a recipe, a line each."""
    return [_status_line(node) for node in nodes]


def _status_line(node: "NodeStatus") -> str:
    about = "" if node.state == "cached" else "~"
    size = "" if node.bytes is None else about + format_bytes(node.bytes)
    seconds = "" if node.seconds is None else about + format_duration(node.seconds)
    return f"{node.state:<10} {node.stage + ' ' + node.name:<32} {size:>10} {seconds:>13}  {node.why}"


def garbage_lines(found: "Sequence[Garbage]", *, delete: bool) -> list[str]:
    """Return what ``gc`` found, and whether it was removed."""
    lines = [
        f"{format_bytes(item.bytes):>9}  {item.folder}" + ("  (in use, kept)" if delete and not item.removed else "")
        for item in found
    ]
    total = format_bytes(sum(item.bytes for item in found))
    return [*lines, f"{len(found)} folders, {total}: {'removed' if delete else 'add --delete to remove them'}"]


def transfer_lines(transfer: "Transfer", place: str) -> list[str]:
    """Return what a push to a place, or a pull to it, came to."""
    return [
        f"{place}: {format_bytes(transfer.moved_bytes)} moved; {transfer.files} files, {format_bytes(transfer.bytes)}, "
        f"all as recorded (root {transfer.root[:12]})"
    ]


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return facts by name, a line each."""
    return [f"{name.replace('_', ' '):<14} {value}" for name, value in facts.items()]


def verify_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of ``verify`` as lines."""
    whole = f"{facts['files']} files, {facts['bytes']} bytes, all as recorded (root {facts['root'][:12]})"
    lines = [f"{facts['folder']}: {whole}"]
    if facts.get("edited"):
        lines.append(
            f"{'edited':<12} {', '.join(facts['edited'])}: not as the manifest lists them, as owners may edit them"
        )
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
        text += (
            f"; {deep['redrawn_otherwise']} rows at the limit of a failed decode were redrawn otherwise, and left out"
        )
    return text


def rebuild_lines(result: "RebuildResult") -> list[str]:
    """Return what came of ``rebuild`` as lines."""
    verdict = {None: "nobody told what to expect", True: "equal to the original's", False: "not the original's"}
    lines = [f"{'pool':<12} {result.folder}{' (was there already)' if result.cached else ''}"]
    lines.append(f"{'root':<12} {result.root} ({verdict[result.equal]})")
    if result.comparison:
        lines.append(f"{'compared':<12} {result.comparison.text()}")
    return lines
