"""Read a foreign pickle of arrays without running anything it asks for.

A pickle is a program: it names functions and classes, and the usual reader imports and calls
them. Here every name it may use becomes an inert `Record` that keeps its arguments, and any other
name ends the reading. What the records mean is worked out afterwards, by the functions below:
NumPy arrays and numbers, JAX arrays (as NumPy's), Flax's FrozenDict (as a dict) and the states of
optax's optimizers (as tuples).
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anystep.errors import UserError

PLAIN = (type(None), bool, int, float, str, bytes)
FROZEN = "flax.core.frozen_dict.FrozenDict"
CONTAINER = re.compile(rf"optax\.[\w.]+\.\w*State|{re.escape(FROZEN)}")


class Record:
    """Something a pickle asks for: its arguments and its state, with nothing made of them.

    Attributes:
        name: what it is, as in "numpy.dtype".
        args: arguments of the call.
        state: what was to be set afterwards.
    """

    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":  # noqa: D102 - a pickle may skip __init__
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickle(path: Path) -> Any:
    """The content of a pickle, of dicts, lists, tuples, numbers, strings and arrays alone.

    Raises:
        UserError: it is missing, damaged, or asks for anything else, which is named.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Reader(file).load(), {})
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is no pickle, or a damaged one ({line})") from None


class _Reader(pickle.Unpickler):
    """Gives out a new class of records a name, so that nothing done to one outlives the load."""

    def find_class(self, module: str, name: str) -> type[Record]:
        full = f"{module}.{name}"
        if full not in MAKERS and not CONTAINER.fullmatch(full):
            raise UserError(f"asks for {full}, which is more than arrays need: it is not read")
        return type(name, (Record,), {"name": full})


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The value with each record replaced by what it stands for.

    Args:
        value: from the reader, which keeps it alive.
        done: what was made so far, by identity; a part that is used twice is made once.
    """
    if type(value) in PLAIN:
        return value
    if id(value) in done:
        if done[id(value)] is done:
            raise UserError("contains itself: it is not read")
        return done[id(value)]
    done[id(value)] = done  # being made
    made: Any
    if type(value) is dict:
        if not all(type(key) in (str, int) for key in value):
            raise UserError("has a dict whose keys are no names: it is not read")
        made = {key: _plain(part, done) for key, part in value.items()}
    elif type(value) in (list, tuple):
        made = type(value)(_plain(part, done) for part in value)
    elif isinstance(value, Record):
        if value.name in MAKERS:
            made = MAKERS[value.name](value)
        else:
            parts = tuple(_plain(part, done) for part in value.args)
            made = parts[0] if value.name == FROZEN and len(parts) == 1 else parts
    else:
        raise UserError(f"holds a {type(value).__name__}, which is not read")
    done[id(value)] = made
    return made


def _reconstructed(record: Record) -> Any:
    """An array as `ndarray.__reduce__` writes it: shape, dtype, order and bytes in its state."""
    _, shape, dtype, fortran, data = record.state
    return _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _buffered(record: Record) -> Any:
    """An array as protocol 5 writes it."""
    data, dtype, shape, order, *rest = record.args
    if any(part is not None for part in rest):
        raise UserError("has an array whose axes are permuted: it is not read")
    return _from_bytes(data, dtype, shape, order)


def _of_jax(record: Record) -> Any:
    """A JAX array, which is pickled as the NumPy array of its values and what JAX adds to it."""
    function, args, state = record.args[:3]
    if not (isinstance(function, type) and issubclass(function, Record)):
        raise UserError("has a JAX array of an unknown form: it is not read")
    inner = function(*args)
    inner.__setstate__(state)
    return _known_array(inner)


def _known_array(record: Record) -> Any:
    if MAKERS.get(record.name) not in (_reconstructed, _buffered):
        raise UserError(f"has an array made by {record.name}: it is not read")
    return MAKERS[record.name](record)


def _scalar(record: Record) -> Any:
    """A NumPy scalar, as a number."""
    dtype, data = record.args
    return _from_bytes(data, dtype, (), "C").item()


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Numbers from bytes, of a shape that their count must fit; a view of the bytes."""
    kind = _dtype(dtype)
    if not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise UserError(f"has an array of {type(data).__name__}, not of bytes: it is not read")
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise UserError("has an array without a shape: it is not read")
    if math.prod(shape) * kind.itemsize != len(data):
        raise UserError(f"has an array of shape {shape} in {len(data)} bytes: it is damaged")
    numbers: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(data, kind)
    return numbers.reshape(shape, order="F" if order == "F" else "C")


def _dtype(record: Any) -> np.dtype[Any]:
    """The dtype of numbers that a record of `numpy.dtype` stands for."""
    if not isinstance(record, Record) or record.name != "numpy.dtype":
        raise UserError("has an array without a dtype: it is not read")
    code = record.args[0] if record.args else None
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc]\d\d?", code):
        raise UserError(f"has an array of dtype {code!r}, which are no numbers: it is not read")
    return np.dtype(code).newbyteorder(record.state[1] if record.state else "=")


def _refused(record: Record) -> Any:
    raise UserError(f"holds a {record.name} outside of an array: it is not read")


MAKERS: dict[str, Callable[[Record], Any]] = {
    "numpy.ndarray": _refused,  # these two only as arguments of the ones below
    "numpy.dtype": _refused,
    "jax._src.array._reconstruct_array": _of_jax,
    "jax._src.device_array.reconstruct_device_array": _of_jax,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstructed for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _buffered for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
}
