"""Plain data into frozen dataclasses: unknown keys with "did you mean", wrong types with what was expected.

Shared by every configuration of the project, so that a YAML file, a Hydra command line and a call from Python are judged alike.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from cluster.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a `cls` (a dataclass, nested ones included) from plain data.

    `where` is the dotted path that error lines name. Raises ConfigError for an unknown key, a missing required key, a value of the
    wrong type, and for whatever the class's own `__post_init__` refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]  # T is a dataclass by contract
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown setting {_join(where, str(key))!r}{did_you_mean(str(key), fields, where)}")
    missing = [
        _join(where, f.name)
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing setting {missing[0]!r}: it has no default, give it a value")
    return cls(**{key: _convert(value, hints[key], _join(where, key)) for key, value in values.items()})


def to_plain(config: Any) -> dict[str, Any]:
    """The reverse of `build`: nested dicts and lists, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def did_you_mean(word: str, known: Iterable[str], where: str = "") -> str:
    """`"; did you mean 'x'?"` for the nearest known word, else the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {_join(where, near[0])!r}?"
    return f"; known: {', '.join(names)}"


def at_least(name: str, value: int, least: int) -> None:
    """Raises ConfigError for a number that is too small."""
    if value < least:
        raise ConfigError(f"{name} {value}: give a whole number of at least {least}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(value, args, where)
    if isinstance(value, str) and hasattr(hint, "from_word"):  # a class that has words for some of its values
        return hint.from_word(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else build(typing.cast(type, hint), value, where)
    if origin is list and isinstance(value, list | tuple):
        return [_convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {_convert(k, args[0], where): _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where}: expected a number, got {value!r}") from None
    plain = origin or hint
    if (isinstance(value, bool) and plain is not bool) or not isinstance(value, plain):
        raise ConfigError(f"{where}: expected {_describe(hint)}, got {value!r}")
    return value


def _convert_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    candidates = [arg for arg in args if arg is not type(None)]
    for candidate in candidates[:-1]:
        if isinstance(value, candidate) and not isinstance(value, bool):
            return value
    if len(candidates) > 1 and not isinstance(value, candidates[-1]):
        raise ConfigError(f"{where}: expected {' or '.join(_describe(candidate) for candidate in candidates)}, got {value!r}")
    return _convert(value, candidates[-1], where)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is list:
        return "a list"
    if origin is dict:
        return "a mapping"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf; an empty mapping is one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
