"""griffe extension: the comment behind a field or a constant is its documentation.

The one rule: only a comment on the line on which the assignment ends counts, and none that speaks to a tool.
"""

import io
import tokenize
from typing import Any, Final

import griffe

__all__ = ["FieldComments", "comment_behind"]

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


class FieldComments(griffe.Extension):
    """Gives an attribute without a docstring the comment behind it."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Look at one attribute that griffe has read."""
        if attr.docstring is None and attr.lineno and (text := comment_behind(attr.lines)):
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:] + "." * (text[-1] not in ".:"), parent=attr)
