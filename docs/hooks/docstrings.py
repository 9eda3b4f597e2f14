"""griffe extension: docstrings and comments as this house writes them.

The comment behind a field or a constant is its documentation, if it stands on the line on which the assignment
ends and doesn't speak to a tool.
"""

import io
import re
import tokenize
from typing import Any, Final

import griffe

__all__ = ["HouseStyle", "comment_behind"]

_TO_TOOLS: Final = ("noqa", "type:", "fmt:", "pragma:")


def comment_behind(lines: list[str]) -> str:
    """Return the comment that ends the last of some lines of Python; "" if there is none."""
    found = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO("\n".join(line.strip() for line in lines)).readline):
            if token.type == tokenize.COMMENT and token.start[0] == len(lines):
                found = token.string.lstrip("# ")
    except (tokenize.TokenError, IndentationError):
        return ""
    text = found.split("  # ")[0].strip()
    return "" if text.startswith(_TO_TOOLS) else text


class HouseStyle(griffe.Extension):
    """Takes the comment behind an attribute as its docstring, and "Example:" as a section of code."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Look at one attribute that griffe has read."""
        if attr.docstring is None and attr.lineno and (text := comment_behind(attr.lines)):
            text = (text[0].upper() if text[0].isascii() else text[0]) + text[1:] + "." * (text[-1] not in ".:")
            attr.docstring = griffe.Docstring(text, parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Look at any object that griffe has read."""
        if obj.docstring:  # griffe knows code in "Examples:" only
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
