"""Escaping of untrusted text in card documents (class names, licences, citations) for Markdown and YAML.

Templates escape every value that they print, except ``Markup``, which only lsmix creates.
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
    """Trusted Markdown that is not escaped again."""

    __slots__ = ()


def clean(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def markdown(value: Any) -> str:
    r"""Return a value on one line, with all Markdown and HTML markup escaped.

    Example:
        >>> from lsmix.pipeline.views.dataset_card.markup import markdown
        >>> print(markdown("<b>*big*</b> | cat"))
        &lt;b&gt;\*big\*&lt;/b&gt; \| cat
    """
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(plain(value), quote=False))


def plain(value: Any) -> Markup:
    """Return a value on one line for plain-text documents, which need no escaping of markup."""
    return Markup(printable_words(str(value)))


def yaml_value(value: Any) -> Markup:
    r"""Return a value as one line of JSON, which is also valid YAML; unprintable characters are escaped.

    Example:
        >>> from lsmix.pipeline.views.dataset_card.markup import yaml_value
        >>> print(yaml_value('a "b": {c}\x9b'))
        "a \"b\": {c}\u009b"
    """
    value = clean(value) if isinstance(value, str) else value
    return Markup(escape_json(msgspec.json.encode(value).decode()))


def render(template: str, **values: Any) -> bytes:
    """Render a template of this folder as UTF-8."""
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
