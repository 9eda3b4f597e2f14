"""Text from data in text for people: characters that do not print are shown as their escapes.

Class names, labels, licences and paths may hold control characters that move a terminal's cursor, make XML invalid or
change the direction of the text behind them. Terminal output, pages, plots, Markdown and READMEs all escape them here.
"""

import re

__all__ = ["printable", "printable_json", "printable_lines", "printable_words"]


def printable(text: str) -> str:
    r"""Return a line in which every letter that does not print, a line break included, is shown as its escape.

    Example:
        >>> print(printable("a cat\x1b[2J\n\u202e"))
        a cat\x1b[2J\n\u202e
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    r"""Return a text in which every character that does not print, but for its newlines, is shown as its escape.

    Example:
        >>> print(printable_lines("one\ntwo\x1b"))
        one
        two\x1b
    """
    return "\n".join(map(printable, text.split("\n")))


def printable_words(text: str) -> str:
    r"""Return a text on one line: blanks and line breaks become single spaces, and what does not print its escape.

    Example:
        >>> print(printable_words(" a\n cat\x1b[2J "))
        a cat\x1b[2J
    """
    return printable(" ".join(text.split()))


def printable_json(text: str, *, ascii_only: bool = False) -> str:
    r"""Return the same JSON, with letters that do not print as their escapes; line breaks between values stay.

    ``ascii_only`` escapes all others beyond ASCII, too, for terminals that cannot show them.

    Example:
        >>> print(printable_json('"a \x9b"'))
        "a \u009b"
    """

    def shown(found: re.Match[str]) -> str:
        return found[0] if found[0].isprintable() and not ascii_only else _escaped(found[0])

    return re.sub(r"[^\n -~]", shown, text)


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]


def _escaped(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
