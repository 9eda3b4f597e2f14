"""The output of commands for people: results as lines of text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsmix.data.errors import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from lsmix.data.sharing.transfer import Transfer
    from lsmix.pipeline.engine.array_task import ArrayTaskResult
    from lsmix.pipeline.engine.garbage import Garbage
    from lsmix.pipeline.engine.runner import Built
    from lsmix.pipeline.engine.status import NodeStatus
    from lsmix.pipeline.verify.rebuild import RebuildResult
    from lsmix.pipeline.views.error_rates import RunSummary
    from lsmix.pipeline.views.show import Drawn

__all__ = [
    "artifact_lines",
    "fact_lines",
    "garbage_lines",
    "part_lines",
    "rebuild_lines",
    "run_lines",
    "show_lines",
    "status_lines",
    "transfer_lines",
    "verify_lines",
]


def run_lines(built: "Sequence[Built]", error_rates: "Sequence[RunSummary]", report: str) -> list[str]:
    """Return the artifacts that a run made, its error rates, and where its report is, if it made one."""
    made, wanted = sum(not item.cached for item in built), len(built)
    rest = "" if made == wanted else f", {wanted - made} already up to date"
    lines = [f"{made} of {wanted} artifacts made{rest}"]
    for row in error_rates:
        paper = f"; paper: {row.paper}" if row.paper else ""
        verdict = f"; {row.verdict}" if row.verdict else ""
        lines.append(
            f"error rate  {row.label:<26} {row.text} %  ({format_count(len(row.errors), 'seed')}{paper}{verdict})"
        )
    if report:
        lines.append(f"report      {report}")
    elif built:
        lines.append(f"last        {built[-1].location}")
    return lines


def part_lines(parts: "Sequence[ArrayTaskResult]", recipe: str) -> list[str]:
    """Return the shards that one array task made, and the next step."""
    lines = [
        f"{part.label:<32} {part.made} of {part.shards} shards made; {part.finished} of {part.of} complete"
        for part in parts
    ]
    return [*lines, f"when all array tasks have ended: lsmix finalize {recipe}" if parts else "all up to date already"]


def status_lines(nodes: "Sequence[NodeStatus]") -> list[str]:
    """Return one line for the state of each artifact of a recipe."""
    return [_status_line(node) for node in nodes]


def _status_line(node: "NodeStatus") -> str:
    about = "" if node.state == "cached" else "~"
    size = "" if node.bytes is None else about + format_bytes(node.bytes)
    seconds = "" if node.seconds is None else about + format_duration(node.seconds)
    return f"{node.state:<10} {node.stage + ' ' + node.name:<32} {size:>10} {seconds:>13}  {node.why}"


def artifact_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the artifacts of a workspace, as ``list_artifacts`` gives them."""
    lines = [f"{'stage':<11} {'name':<20} {'cache key':<12} {'size':>8} {'age':>4}  made from"]
    for item in found:
        age = "" if item["age_seconds"] is None else _age(item["age_seconds"])
        keys = [key[:6] for key in item["inputs"].values() if key]
        origin = " ".join(keys[:2]) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")
        if not item["complete"]:
            origin = "unreadable" if age else "unfinished"
        lines.append(
            f"{item['stage']:<11} {item['name']:<20} {item['cache_key']:<12} {format_bytes(item['bytes']):>8} {age:>4}  {origin}"
        )
    return lines


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def garbage_lines(found: "Sequence[Garbage]", *, delete: bool) -> list[str]:
    """Return the folders that ``gc`` found, and whether it removed them."""
    lines = [
        f"{format_bytes(item.bytes):>9}  {item.folder}" + ("  (in use, kept)" if delete and not item.removed else "")
        for item in found
    ]
    total = format_bytes(sum(item.bytes for item in found))
    return [*lines, f"{format_count(len(found), 'folder')}, {total}: {'removed' if delete else 'remove with --delete'}"]


def transfer_lines(transfer: "Transfer", place: str) -> list[str]:
    """Return the result of a push to a place, or of a pull to it."""
    return [
        f"{place}: {format_bytes(transfer.moved_bytes)} moved; {format_count(transfer.files, 'file')}, {format_bytes(transfer.bytes)}, "
        f"all as recorded (content digest {transfer.content_digest[:12]})"
    ]


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return one line for each fact, with its name."""
    width = max((len(name) for name in facts), default=0) + 1
    return [f"{name:<{width}} {_fact(name, value)}" for name, value in facts.items()]


def _fact(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return format_bytes(value)
    if name == "seconds":
        return format_duration(value)
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_lines(facts: Mapping[str, Any], drawn: "Sequence[Drawn]") -> list[str]:
    """Return the facts of an artifact, and the files that ``show`` wrote."""
    files = [
        f"{one.kind}: {one.target} ({one.what})" if one.what else "an artifact of this stage has no images to show"
        for one in drawn
    ]
    return [*fact_lines(facts), *files]


def verify_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the results of ``verify``: what was checked, and what was not."""
    whole = f"{format_count(facts['files'], 'file')}, {format_bytes(facts['bytes'])}, all as recorded (content digest {facts['content_digest'][:12]})"
    lines = [f"{facts['folder']}: {whole}"]
    if facts.get("edited"):
        lines.append(
            f"{'edited':<12} {', '.join(facts['edited'])}: not as the manifest lists them, as owners may edit them"
        )
    if facts.get("ignored"):
        lines.append(f"{'ignored':<12} {', '.join(facts['ignored'])}: put there by a file manager or a hub")
    lines += [f"{'checked':<12} {line}" for line in facts.get("checked", ())]
    if facts.get("deep"):
        lines.append(f"{'recomputed':<12} {_deep(facts['deep'])}")
    return lines + [f"{'not checked':<12} {line}" for line in facts.get("unchecked", ())]


def _deep(deep: Mapping[str, Any]) -> str:
    text = f"{format_count(deep['rows'], 'row')}, {deep['pixels_differing']:,} of {deep['pixels']:,} pixels differ"
    if deep["pixels_differing"]:
        text += f", by at most {deep['largest']}, which another kind of device can cause"
    if deep["redrawn_otherwise"]:
        text += f"; left out: {format_count(deep['redrawn_otherwise'], 'row')} at the limit of a failed decode, redrawn differently"
    return text


def rebuild_lines(result: "RebuildResult") -> list[str]:
    """Return the result of ``rebuild``."""
    verdict = {None: "no expected digest given", True: "equal to the original's", False: "not the original's"}
    lines = [f"{'pool':<15} {result.folder}{' (already in the workspace)' if result.cached else ''}"]
    lines.append(f"content digest  {result.content_digest} ({verdict[result.equal]})")
    if result.comparison:
        lines.append(f"{'compared':<15} {result.comparison.text()}")
    return lines
