"""MkDocs hook: the notebook docs/tutorial.ipynb as a page, with its stored outputs.

Nothing is executed here: ``docs/make_tutorial.py`` executes the notebook and stores its outputs. A notebook is JSON, so
neither nbconvert nor a plugin is needed.
"""

import base64
import json
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

__all__ = ["as_markdown", "on_files"]

_WRITES: Final = "%%writefile "
_NOTEBOOK: Final = Path(__file__).resolve().parents[1] / "tutorial.ipynb"


def as_markdown(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the images in its outputs by file name (``NAME-1.png``, …)."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _code(source))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode("".join(data["image/png"]))
                described = cell.get("metadata", {}).get("alt", "output of the cell above")
                parts.append(f"![{described}]({file})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(_fenced("text", text.rstrip("\n")))
    return "\n\n".join(parts) + "\n", pictures


def _code(source: str) -> str:
    """Return a code cell as a fenced block; a cell that writes a file becomes a block titled with the file name."""
    first, _, rest = source.partition("\n")
    if not first.startswith(_WRITES):
        return _fenced("python", source)
    name = first.removeprefix(_WRITES)
    return _fenced(f'{name.rpartition(".")[2]} title="{name}"', rest)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def on_files(files: Files, config: Any) -> Files:
    """Add the page and its images."""
    notebook = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))
    text, pictures = as_markdown(notebook, _NOTEBOOK.stem)
    files.append(File.generated(config, f"{_NOTEBOOK.stem}.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files
