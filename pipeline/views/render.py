"""The templates of HTML pages, which stand beside the modules that fill them.

The one rule: everything is escaped, and a name that a template asks for in vain is an error.
"""

from pathlib import Path

import jinja2

__all__ = ["html_templates"]


def html_templates(folder: Path) -> jinja2.Environment:
    """Return a new environment that finds the templates of a folder; filters may be added to it."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
