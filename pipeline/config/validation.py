"""Convert the tables of a recipe to structs, with error messages that name the key and suggest similar ones."""

import difflib
import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

import msgspec

from lsmix.data.errors import RecipeError

__all__ = ["convert", "did_you_mean"]


_NAMES = "a name may contain letters, digits, '.', '_' and '-', no spaces, at most 64 characters."


def convert(table: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    """Convert a table to a struct of type ``kind``.

    Raises:
        RecipeError: A key is unknown or missing, or a value is invalid; the message starts with ``where``.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, RecipeError):  # raised by the struct's own checks
            place = _with_name(str(error).partition(" - at `$")[2].rstrip("`").lstrip("."), table, kind)
            raise RecipeError(f"{where}: {place}{': ' if place else ''}{error.__cause__}") from error
        raise RecipeError(f"{where}: {_explain(str(error), table, kind)}") from error


def _explain(message: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Rewrite a message of msgspec to name the dotted key, and for an unknown key the most similar known one."""
    text, _, path = message.partition(" - at `$")
    if key_of := re.search(r" - at `?key`? in `\$\.?([^`]*)`", message):
        return f"{key_of.group(1)}: {_NAMES}"
    dotted = path.rstrip("`").lstrip(".")
    known = _known_fields(kind, dotted)
    dotted = _with_name(dotted, table, kind)
    if unknown := re.search(r"unknown field `([^`]*)`", text):
        key = unknown.group(1)
        full = f"{dotted}.{key}" if dotted else key
        return f"unknown key {full!r}.{did_you_mean(key, known)} Known keys here: {', '.join(known)}."
    if missing := re.search(r"missing required field `([^`]*)`", text):
        full = f"{dotted}.{missing.group(1)}" if dotted else missing.group(1)
        return f"the key {full!r} is missing."
    value = _value_at(table, dotted)
    if "matching regex" in text:
        return f"{dotted}: {_NAMES} Got {value!r}."
    if "Invalid enum value" in text:
        return f"{dotted}: unknown value {value!r}.{did_you_mean(str(value), known)} Known: {', '.join(known)}."
    got = "" if value is None else f", got {value!r}"
    text = text.replace("`", "").replace("object", "a section")
    return f"{dotted or 'the recipe'}: {text[0].lower()}{text[1:]}{'' if ', got ' in text else got}."


def _with_name(dotted: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Replace msgspec's ``[...]`` by the name of the first pool or run that cannot be converted."""
    section, found, rest = dotted.partition("[...]")
    if not found:
        return dotted
    model = next(field.type for field in msgspec.structs.fields(kind) if field.name == section).__args__[-1]
    for name, part in table[section].items():
        try:
            msgspec.convert(part, model)
        except msgspec.ValidationError:
            return f"{section}.{name}{rest}"
    return dotted


def _known_fields(kind: type[Any], dotted: str) -> list[str]:
    """Return the field names of the struct, or the values of the literal, at a dotted path of a validation message."""
    current: Any = kind
    for part in [part for part in re.split(r"\.|(\[[^\]]*\])", dotted) if part]:
        if part.startswith("["):
            current = [kind for kind in getattr(current, "__args__", (current,)) if kind is not Ellipsis][-1]
        else:
            fields = {field.name: field.type for field in msgspec.structs.fields(current)}
            current = fields.get(part, current)
        current = _model(current)
    if get_origin(current) is Literal:
        return [str(value) for value in get_args(current)]
    return list(current.__struct_fields__) if hasattr(current, "__struct_fields__") else []


def _model(kind: Any) -> Any:
    """Strip ``Annotated`` and ``| None`` from the type of a section."""
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    if isinstance(kind, UnionType):
        return next(part for part in kind.__args__ if part is not NoneType)
    return kind


def _value_at(table: Mapping[str, Any], dotted: str) -> Any:
    value: Any = table
    for part in re.findall(r"[^.\[\]]+", dotted):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return " Did you mean …?" with the known word that is most similar to ``word``; "" if none is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
