"""Untrusted text in the documents of a card: class names, licences and citations, escaped for Markdown and YAML.

Templates escape all that they print; only a ``Markup`` that this program made goes through as it is.
"""

import html
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from lsmix.data.errors import escape_json, printable_words

__all__ = ["Markup", "clean", "markdown", "render", "yaml_value"]


class Markup(str):
    """Markdown that this program wrote, not to be escaped again."""

    __slots__ = ()


def clean(text: str) -> str:
    """Return the text without what no UTF-8 file may hold: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def markdown(value: Any) -> str:
    r"""Return a value on one line, with what Markdown and HTML would take for marks escaped.

    Example:
        >>> from lsmix.pipeline.views.dataset_card.markup import markdown
        >>> print(markdown("<b>*big*</b> | cat"))
        &lt;b&gt;\*big\*&lt;/b&gt; \| cat
    """
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(plain(value), quote=False))


def plain(value: Any) -> Markup:
    """Return a value on one line for a plain text, in which there are no marks."""
    return Markup(printable_words(str(value)))


def yaml_value(value: Any) -> Markup:
    r"""Return text or other values as JSON on one line, which is YAML, too; what does not print is escaped.

    Example:
        >>> from lsmix.pipeline.views.dataset_card.markup import yaml_value
        >>> print(yaml_value('a "b": {c}\x9b'))
        "a \"b\": {c}\u009b"
    """
    value = clean(value) if isinstance(value, str) else value
    return Markup(escape_json(msgspec.json.encode(value).decode()))


def render(template: str, **values: Any) -> bytes:
    """Return a template of this folder, filled in, as UTF-8."""
    return _environment().get_template(template).render(**values).encode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701 - finalize escapes everything, for Markdown instead of HTML
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"as_is": Markup, "plain": plain, "yaml": yaml_value}
    return environment
