"""Text output of the commands. Tables are wrapped to the terminal; without a terminal, lines are not wrapped."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lsmix.data.errors import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from lsmix.data.sharing.transfer import Transfer
    from lsmix.pipeline.config.results import Naturalness
    from lsmix.pipeline.engine.array_task import ArrayTaskResult
    from lsmix.pipeline.engine.garbage import Garbage
    from lsmix.pipeline.engine.runner import Built
    from lsmix.pipeline.engine.status import NodeStatus
    from lsmix.pipeline.verify.rebuild import RebuildResult
    from lsmix.pipeline.views.diff import Difference
    from lsmix.pipeline.views.error_rates import RunSummary
    from lsmix.pipeline.views.show import Drawn

__all__ = [
    "artifact_lines",
    "difference_lines",
    "fact_lines",
    "garbage_lines",
    "log_lines",
    "log_table",
    "part_lines",
    "rebuild_lines",
    "run_lines",
    "show_lines",
    "status_lines",
    "transfer_lines",
    "verify_lines",
]


_UNLIMITED = 10_000  # columns, if there is no terminal
_MIN_WIDTH = 16  # columns, of a wrapped last column
_MIN_VALUE_WIDTH = 20  # columns, of each of two values that are compared


def _columns() -> int:
    return shutil.get_terminal_size(fallback=(_UNLIMITED, 0)).columns


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows in aligned columns, the last one wrapped; ``right`` lists the numbers of right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in rows:
        padded = [
            f"{cell:>{width}}" if number in right else f"{cell:<{width}}"
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        room = max(_MIN_WIDTH, _columns() - indent)
        first, *more = textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append("  ".join([*padded, first]).rstrip())
        lines += [" " * indent + line for line in more]
    return lines


def run_lines(
    built: "Sequence[Built]", error_rates: "Sequence[RunSummary]", naturalness: "Naturalness | None", report: str
) -> list[str]:
    """Return how many artifacts a run made, its results, and the location of its report, if any."""
    made, wanted = sum(not item.cached for item in built), len(built)
    rest = "" if made == wanted else f", {wanted - made} already up to date"
    lines = [f"{made} of {wanted} artifacts made{rest}"]
    rows = []
    for row in error_rates:
        paper = f"; paper: {row.paper}" if row.paper else ""
        verdict = f"; {row.verdict}" if row.verdict else ""
        about = f"({format_count(len(row.errors), 'seed')}{paper}{verdict})"
        rows.append(("error rate", row.label, f"{row.text} %", about))
    lines += _table(rows) if rows else []
    lines += _naturalness_lines(naturalness) if naturalness else []
    if report:
        lines.append(f"report      {report}")
    elif built:
        lines.append(f"result      {built[-1].location}")
    return lines


def _naturalness_lines(result: "Naturalness") -> list[str]:
    """Return a table of the naturalness measures of each method and of the originals."""
    rows = [("sample", "bits/dim", "distance", "Fréchet", "seam", "failed")]
    for sample in result.samples:
        numbers = (sample.distance, sample.seam)
        distance, seam = ("-" if one is None else f"{one.value:.3f}" for one in numbers)
        frechet = "-" if sample.frechet is None else f"{sample.frechet:.2f}"
        failed = "-" if sample.decode_failed is None else f"{sample.decode_failed:,}"
        rows.append((sample.name, f"{sample.mean_bits:.3f}", distance, frechet, seam, failed))
    return _table(rows, right=(1, 2, 3, 4))


def part_lines(parts: "Sequence[ArrayTaskResult]", recipe: str) -> list[str]:
    """Return the number of shards that an array task made, and the next step."""
    rows = [
        (part.label, f"{part.made} of {format_count(part.shards, 'shard')} made; {part.finished} of {part.of} complete")
        for part in parts
    ]
    if not rows:
        return ["everything is up to date"]
    return [*_table(rows), f"When all tasks of the job array have ended, run: lsmix finalize {recipe}"]


def status_lines(nodes: "Sequence[NodeStatus]") -> list[str]:
    """Return a table of the states of a recipe's artifacts."""
    rows = [("state", "artifact", "size", "time", "why")]
    for node in nodes:
        about = "" if node.state == "cached" else "~"
        size = "" if node.bytes is None else about + format_bytes(node.bytes)
        seconds = "" if node.seconds is None else about + format_duration(node.seconds)
        rows.append((node.state, f"{node.stage} {node.name}", size, seconds, node.why))
    return _table(rows, right=(2, 3))


def artifact_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the artifacts of a workspace, as returned by ``list_artifacts``."""
    rows = [("stage", "name", "cache key", "size", "age", "made from")]
    for item in found:
        age = "" if item["age_seconds"] is None else _age(item["age_seconds"])
        keys = [key[:6] for key in item["inputs"].values() if key]
        origin = " ".join(keys[:2]) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")
        if not item["complete"]:
            origin = "unreadable" if age else "unfinished"
        rows.append((item["stage"], item["name"], item["cache_key"], format_bytes(item["bytes"]), age, origin))
    return _table(rows, right=(3, 4))


def difference_lines(first: str, second: str, found: "Sequence[Difference]") -> list[str]:
    """Return a table of the fields that differ between two artifacts or recipes."""
    if not found:
        return [f"{first} and {second} do not differ"]
    rows = [("field", first, second), *((one.field, _value(one.a), _value(one.b)) for one in found)]
    room = max(_MIN_VALUE_WIDTH, (_columns() - max(len(row[0]) for row in rows) - 4) // 2)
    head = [("field", *(place if len(place) <= room else f"…{place[1 - room :]}" for place in rows[0][1:]))]
    return _table([*head, *((name, *(_cut(value, room) for value in values)) for name, *values in rows[1:])])


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def log_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the logs of a workspace, as returned by ``list_logs``."""
    rows = [("run", "began", "time", "outcome", "command")]
    for item in found:
        began = _local_time(item["began"], "%Y-%m-%d %H:%M")
        took = "" if item["seconds"] is None else format_duration(item["seconds"])
        command = f"{item['command'] or ''} {PurePath(item['recipe'] or '').name}"
        rows.append((item["run"].partition("-")[0], began, took, item["outcome"], command))
    return _table(rows, right=(2,)) if found else ["no logs yet; a run that makes an artifact writes one"]


def _local_time(text: Any, form: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone().strftime(form)
    except (TypeError, ValueError):
        return ""


def log_lines(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each event of a run's log: time, kind and text."""
    lines = []
    for event in events:
        fields = {
            name: value
            for name, value in event.items()
            if name not in ("at", "event", "process") and value not in ("", [])
        }
        text = fields.get("text") or ", ".join(f"{name} {_fact(name, value)}" for name, value in fields.items())
        lines.append(f"{_local_time(event.get('at'), '%H:%M:%S'):<8}  {event.get('event', ''):<8}  {text}")
    return lines


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def garbage_lines(found: "Sequence[Garbage]", *, delete: bool) -> list[str]:
    """Return the folders that ``gc`` found, and whether it removed them."""
    if not found:
        return ["nothing to remove"]
    lines = [
        f"{format_bytes(item.bytes):>9}  {item.folder}" + ("  (in use, kept)" if delete and not item.removed else "")
        for item in found
    ]
    total = f"{format_count(len(found), 'folder')}, {format_bytes(sum(item.bytes for item in found))}"
    return [*lines, f"{total}: {'removed' if delete else 'use --delete to remove'}"]


def transfer_lines(transfer: "Transfer", place: str) -> list[str]:
    """Return the result of a push or pull to ``place``."""
    files = _recorded(transfer.files, transfer.bytes, transfer.content_digest)
    return _table([("artifact", place), ("transferred", format_bytes(transfer.moved_bytes)), ("files", files)])


def _recorded(files: int, size: int, digest: str) -> str:
    return f"{format_count(files, 'file')}, {format_bytes(size)}, all match the manifest (content digest {digest[:12]})"


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the names and values of ``facts`` as a table."""
    return _table([(name, _fact(name, value)) for name, value in facts.items()]) if facts else []


def _fact(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return format_bytes(value)
    if name == "seconds" and isinstance(value, int | float):
        return format_duration(value)
    return "" if value is None else _value(value)


def show_lines(facts: Mapping[str, Any], drawn: "Sequence[Drawn]") -> list[str]:
    """Return an artifact's metadata, its configuration, and the files that ``show`` wrote."""
    files = [
        f"{one.kind}: {one.target} ({one.what})" if one.what else f"{one.kind}: artifacts of this stage have no images"
        for one in drawn
    ]
    head = {name: value for name, value in facts.items() if name not in ("counts", "config")}
    config = [f"  {line}" for line in fact_lines(facts["config"])]
    return [*fact_lines(head), *fact_lines(facts["counts"]), *(["configuration", *config] if config else []), *files]


def verify_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the result of ``verify``: what was checked and what was not."""
    files = _recorded(facts["files"], facts["bytes"], facts["content_digest"])
    rows = [("artifact", facts["folder"]), ("files", files)]
    if facts.get("edited"):
        edited = ", ".join(facts["edited"])
        rows.append(("edited", f"{edited}: differs from the manifest, which is allowed for these files"))
    if facts.get("ignored"):
        rows.append(("ignored", f"{', '.join(facts['ignored'])}: added by a file manager or a hub"))
    rows += [("checked", line) for line in facts.get("checked", ())]
    if facts.get("deep"):
        rows.append(("recomputed", _deep(facts["deep"])))
    return _table([*rows, *(("not checked", line) for line in facts.get("unchecked", ()))])


def _deep(deep: Mapping[str, Any]) -> str:
    text = f"{format_count(deep['rows'], 'row')}, {deep['pixels_differing']:,} of {deep['pixels']:,} pixels differ"
    if deep["pixels_differing"]:
        text += f", by at most {deep['largest']}; a different kind of device can cause this"
    if deep["redrawn_otherwise"]:
        text += f"; skipped {format_count(deep['redrawn_otherwise'], 'row')} with a borderline decode, which were resampled differently"
    return text


def rebuild_lines(result: "RebuildResult") -> list[str]:
    """Return the result of ``rebuild``."""
    verdict = {None: "no expected digest given", True: "same as the original", False: "differs from the original"}
    rows = [("pool", f"{result.folder}{' (already in the workspace)' if result.cached else ''}")]
    rows.append(("content digest", f"{result.content_digest} ({verdict[result.equal]})"))
    return _table([*rows, *([("compared", result.comparison.text())] if result.comparison else [])])
