"""Sections of an expensive measurement: each has a time limit, and a failure in one does not stop the others.

Every number is written to ``results.json`` as soon as it is measured, so that none is lost.
"""

import contextlib
import json
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Results", "card_name", "copy_to_out", "environment", "results_folder"]

_ROOT = Path(__file__).resolve().parents[1]
_LINES = 12  # of a traceback in the Markdown; the JSON file and the log contain the full traceback


class _OverBudgetError(Exception):
    """A section has exceeded its time limit."""


class Results:
    """The measurements of several sections, written to a folder immediately.

    Args:
        folder: Folder for results.json, README.md and log.txt; created if necessary.
        title: Title of the Markdown page.
        about: Versions, device and settings, for the top of the page.
        sections: Sections of an earlier call to continue from.
    """

    def __init__(
        self, folder: Path, title: str, about: dict[str, Any], sections: dict[str, dict[str, Any]] | None = None
    ) -> None:
        self.folder, self.title, self.about = folder, title, about
        self.sections = sections if sections is not None else {}
        self._open: dict[str, Any] = {"rows": []}  # the section that is being measured
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def info(self, text: str) -> None:
        """Print a line, and add it to the log."""
        print(text, flush=True)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    def add(self, what: str, measured: float, unit: str, predicted: float | None = None, **details: Any) -> None:
        """Add a measurement to the current section."""
        row = {"what": what, "measured": measured, "unit": unit, "predicted": predicted, "details": details}
        self._open["rows"].append(row)
        expected = "" if predicted is None else f" (predicted {_number(predicted)})"
        self.info(f"  {what}: {_number(measured)} {unit}{expected} {details or ''}".rstrip())
        self.write()

    def section(self, name: str, work: Callable[[], None], *, seconds: float) -> bool:
        """Measure a section for at most ``seconds``; return whether it finished.

        Failures are recorded with their traceback, warnings with their text.
        """
        self.info(f"\n{name}")
        self._open = self.sections[name] = {
            "status": "running",
            "device": self.about.get("device", ""),  # a later call may run on another
            "seconds": 0.0,
            "rows": [],
            "warnings": [],
        }
        begun = time.monotonic()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            try:
                if seconds <= 0:
                    raise _OverBudgetError  # noqa: TRY301 - handled like a limit that is reached later
                with _time_limit(seconds):
                    work()
                self._open["status"] = "done"
            except _OverBudgetError:
                self._open["status"] = f"stopped after {max(seconds, 0):.0f} s: time limit reached"
            except Exception:  # noqa: BLE001 - every failure is recorded, and the other sections continue
                self._open["status"] = "failed"
                self._open["traceback"] = traceback.format_exc()
            except BaseException:  # an interrupt ends the measurement, and the section is not a result
                self._open["status"] = "interrupted"
                raise
            finally:
                self._open["seconds"] = round(time.monotonic() - begun, 2)
                self._open["warnings"] = sorted({str(warning.message) for warning in seen})
                self.write()
        self.info(f"  {self._open['status']}, {self._open['seconds']:.1f} s")
        for line in (*self._open["warnings"], self._open.get("traceback", "")):
            if line:
                self.info(f"  {line}")
        return self._open["status"] == "done"

    def write(self) -> None:
        """Write results.json and README.md."""
        content = {"title": self.title, "about": self.about, "sections": self.sections}
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
        for name, written in (("results.json", text), ("README.md", self._markdown())):
            part = self.folder / f".{name}.part"
            part.write_text(f"{written}\n", encoding="utf-8")
            part.replace(self.folder / name)

    def _markdown(self) -> str:
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in self.about.items())]
        for name, section in self.sections.items():
            lines += ["", f"## {name}", "", f"{section['status']}, {section['seconds']:.1f} s, {section['device']}"]
            if section["rows"]:
                lines += ["", "| | measured | predicted | measured / predicted | details |", "|---|---:|---:|---:|---|"]
                lines += [_line(row) for row in section["rows"]]
            lines += [line for text in section["warnings"] for line in ("", f"Warning: {text}")]
            if section.get("traceback"):
                lines += ["", "```text", *section["traceback"].splitlines()[-_LINES:], "```"]
        return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    predicted, measured, unit = row["predicted"], row["measured"], row["unit"]
    details = ", ".join(f"{name} {_number(value)}" for name, value in row["details"].items())
    expected = ("–", "–") if predicted is None else (f"{_number(predicted)} {unit}", f"{measured / predicted:.2f}")
    return f"| {row['what']} | {_number(measured)} {unit} | {expected[0]} | {expected[1]} | {details} |"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _OverBudgetError inside the block at the first Python instruction after ``seconds``."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OverBudgetError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def environment(device: str) -> dict[str, Any]:
    """Return the machine and software versions for a page of results."""
    import torch

    from lsmix.pipeline.engine.device import describe_environment

    facts = describe_environment(device)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": facts["device"]}
    about |= {"python": facts["python"]} | {name: facts["versions"][name] for name in ("lsmix", "torch", "numpy")}
    if device != "cpu":
        about |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    return about


def card_name(device: str) -> str:
    """Return a short name of the GPU for folder names, such as "h100"."""
    from lsmix.pipeline.engine.device import device_name

    if device == "cpu":
        return "cpu"
    words = device_name(device).lower().replace("nvidia", "").replace("geforce", "").split()
    return "-".join(words[:2]).strip("-") or "gpu"


def results_folder(date: str, card: str, suffix: str = "") -> Path:
    """Return the folder below results/ for a measurement on a date (YYYY-MM-DD) and a GPU."""
    return _ROOT / "results" / f"{date}-{card}{suffix}"


def copy_to_out(folder: Path, name: str) -> None:
    """Copy a folder into the folder named by the environment variable OUT, if set; some machines return only that."""
    out = os.environ.get("OUT")
    if out and Path(out).is_dir():
        target = Path(out) / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
