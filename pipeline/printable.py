"""Words of strangers on a terminal: names, labels and paths that may hold what would move its cursor or change its title.

The one rule: whatever is printed for people goes through here, so no reader of files has to think of it.
"""

import re

__all__ = ["printable", "printable_json"]


def printable(text: str) -> str:
    r"""Return a line in which every letter that does not print, a line break included, is shown as its escape.

    Example:
        >>> print(printable("a cat\x1b[2J\n\u202e"))
        a cat\x1b[2J\n\u202e
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_json(text: str) -> str:
    r"""Return the same JSON, with letters that do not print as their escapes; line breaks between values stay.

    Example:
        >>> print(printable_json('"a \x9b"'))
        "a \u009b"
    """
    return re.sub(r"[^\n -~]", lambda found: found[0] if found[0].isprintable() else _escaped(found[0]), text)


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


def _escaped(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
