"""Converting the tables of a recipe to structs, with messages that name the key and suggest the nearest known one."""

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
    """Return a table as a model of some kind.

    Raises:
        RecipeError: a key is unknown or missing, or a value is not what the model takes; ``where`` begins the message.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, RecipeError):  # a model that says itself what is wrong
            place = _with_name(str(error).partition(" - at `$")[2].rstrip("`").lstrip("."), table, kind)
            raise RecipeError(f"{where}: {place}{': ' if place else ''}{error.__cause__}") from error
        raise RecipeError(f"{where}: {_explain(str(error), table, kind)}") from error


def _explain(message: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Turn a validation message into one that names the dotted key, and the nearest known one for an unknown."""
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
    """Put the name of a pool or a run where msgspec says only ``[...]``: the first that cannot be converted."""
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
    """Return the fields of the model, or the values of the literal, that a dotted path of a validation message points to."""
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
    """Return a model without ``Annotated`` and without the None of an optional section."""
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
    """Return a question after the known word that is nearest to an unknown one; "" where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
