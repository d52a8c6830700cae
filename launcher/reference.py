"""The configuration reference, made from the schema: `python -m launcher.reference > docs/configuration.md`."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config import LaunchConfig

_INTRO = """\
# Configuration

Made from the schema by `python -m launcher.reference`; do not edit.

Every setting of `launch.py`, `podlaunch` and of YAML files, with its type and its default in the schema. What is composed when nothing
is given also depends on the files of `conf/`, among which `cluster=v5e` and the like choose; `--cfg job` behind `podlaunch` prints it.
A command like `tpu start v5e slices=2` takes the settings of `cluster` without that prefix.
"""


def render(root: type = LaunchConfig) -> str:
    return "\n".join([_INTRO, *_sections(root, "")]) + "\n"


def _sections(kind: type, prefix: str) -> Iterator[str]:
    """One for each group of settings, those inside it after it."""
    hints, told = typing.get_type_hints(kind), descriptions(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    nested = {field.name: inner for field in fields if (inner := _dataclass_in(hints[field.name])) is not None}
    rows = [field for field in fields if field.name not in nested]
    if prefix:
        yield f"## {prefix}\n\n{_paragraph(inspect.getdoc(kind) or '')}\n"
    if rows:
        yield "| setting | type | default | |\n| --- | --- | --- | --- |"
        for field in rows:
            cells = (f"`{_dotted(prefix, field.name)}`", _type_text(hints[field.name]), _default(field), told.get(field.name, ""))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    for name, inner in nested.items():
        yield from _sections(inner, _dotted(prefix, name))


def descriptions(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, also of those that it inherits, in one line."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = _paragraph(inspect.cleandoc(words))
    return found


def _dataclass_in(hint: Any) -> type | None:
    """The group that a field holds, also where it may be missing."""
    for one in (hint, *typing.get_args(hint)):
        if isinstance(one, type) and dataclasses.is_dataclass(one) and not issubclass(typing.get_origin(hint) or object, (list, Mapping)):
            return one
    return None


def _type_text(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("null" if one is type(None) else _type_text(one) for one in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping to {_type_text(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "settings"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number", "Any": "anything"}.get(
        getattr(hint, "__name__", str(hint)), str(hint)
    )


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "none: give it"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value}`"


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    print(render(), end="")
