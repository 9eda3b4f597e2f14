"""The templates of HTML pages, which stand beside the modules that fill them.

Everything is escaped for HTML, what does not print is shown as its escape, and a name that a template asks for in vain is an error.
"""

from pathlib import Path
from typing import Any

import jinja2

from lsmix.data.errors import printable_lines

__all__ = ["html_templates"]


def html_templates(folder: Path) -> jinja2.Environment:
    """Return a new environment that finds the templates of a folder; filters may be added to it."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
