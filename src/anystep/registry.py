"""Find a method, network or dataset by its file name, and keep any of them as plain JSON.

A *kind* is a package (`anystep.objectives`, `anystep.networks`, `anystep.data`) whose modules
each define one frozen dataclass derived from the package's base class. The name of the file is
the name of the method: adding a method adds a file and no line elsewhere.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anystep.errors import UserError

NAME = "name"  # the JSON key that holds the file name of a registered dataclass


def names(package: str) -> list[str]:
    """The names of all modules in `package`, such as `["flow_matching", "shortcut"]`."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def find(package: str, name: str) -> type[Any]:
    """The dataclass that module `name` of `package` defines.

    Dashes and underscores are the same in a name.

    Raises:
        UserError: there is no such module; the message names the nearest one.
    """
    name = name.replace("-", "_")
    if name not in names(package):
        raise UserError(unknown(f"{package.rsplit('.')[-1]} name", name, names(package)))
    base = importlib.import_module(package).BASE
    module = importlib.import_module(f"{package}.{name}")
    (found,) = (
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, base) and cls.__module__ == module.__name__
    )
    return typing.cast(type[Any], found)


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """One line that says `word` is not a known `what`, with the nearest match or the list."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} {word!r}; {hint}"


def name_of(config: Any) -> str:
    """The file name under which the dataclass instance (or class) is registered."""
    cls = config if isinstance(config, type) else type(config)
    return cls.__module__.rsplit(".", 1)[-1]


def to_json(value: Any) -> Any:
    """Plain JSON data for a (nested) dataclass; registered dataclasses carry their name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {NAME: name_of(value), **fields} if hasattr(type(value), "PACKAGE") else fields
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(cls: Any, data: Mapping[str, Any]) -> Any:
    """Rebuild a dataclass written by `to_json`; its `upgrade`, if any, knows earlier versions.

    Raises:
        UserError: a field is unknown (the nearest name is suggested) or missing.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{cls.__name__} must be a JSON object, not {data!r}")
    kind, data = cls, dict(data)
    if hasattr(cls, "PACKAGE"):
        kind = find(cls.PACKAGE, str(data.pop(NAME, "")))
    if hasattr(kind, "upgrade"):
        data = kind.upgrade(data)
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise UserError(unknown(f"field of {kind.__name__}", key, fields))
    try:
        return kind(**{k: _value(hints[k], v) for k, v in data.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{kind.__name__}: {error}") from None


def _value(hint: Any, value: Any) -> Any:
    """`value` as the annotation `hint` wants it; TypeError if it is something else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        items = typing.get_args(hint)
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return tuple(_value(h, v) for h, v in zip(items, value, strict=True))
    if typing.get_origin(hint) is typing.Literal:
        right = value in typing.get_args(hint)
    elif hint is Path:
        right, value = isinstance(value, str), Path(str(value))
    elif dataclasses.is_dataclass(hint):
        return from_json(hint, value)
    elif hint is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        right = type(value) is hint
    if not right:
        raise TypeError(f"{value!r} is not {getattr(hint, '__name__', hint)}")
    return value


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields, as "name: old -> new", in which two JSON objects differ."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
