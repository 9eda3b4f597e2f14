"""griffe extension for the docstring conventions of lsmix.

A comment on the last line of a field's or constant's assignment is its documentation, unless it is addressed to a tool.
"""

import io
import re
import tokenize
from typing import Any, Final

import griffe

__all__ = ["HouseStyle", "comment_behind"]

_TO_TOOLS: Final = ("noqa", "type:", "fmt:", "pragma:")


def comment_behind(lines: list[str]) -> str:
    """Return the comment at the end of the last of some lines of Python, or "" if there is none."""
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
    """Use the comment after an attribute as its docstring, and treat "Example:" as a section of code."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Set the docstring of an attribute from its comment."""
        if attr.docstring is None and attr.lineno and (text := comment_behind(attr.lines)):
            text = (text[0].upper() if text[0].isascii() else text[0]) + text[1:] + "." * (text[-1] not in ".:")
            attr.docstring = griffe.Docstring(text, parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename "Example:" sections."""
        if obj.docstring:  # griffe recognizes code in "Examples:" only
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
