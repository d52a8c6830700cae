"""One record of jsonl, parquet or datasets into a document; whatever is wrong with it names the place and the field."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import ConfigError
from launcher.data.config import FieldsConfig, SourceConfig
from launcher.data.documents import Document, Place, Turn, conversation, plain, response

_ROLES = {"system": "system", "user": "user", "assistant": "model", "model": "model"}


class Records:
    """Reads the records of one source: all of the kind that `data.records` names, else of the first one's."""

    def __init__(self, source: SourceConfig) -> None:
        self._kind, self._fields = source.records, source.fields

    def read(self, record: Any, place: Place) -> Document:
        """Raises ConfigError, one line."""
        if not isinstance(record, Mapping):
            raise ConfigError(
                f"{place}: expected an object, got {type(record).__name__}; write one {_example(self._kind, self._fields)} a line"
            )
        if self._kind is None:
            self._kind = _kind_of(record, self._fields, place)
        return _READERS[self._kind](record, self._fields, place)

    @property
    def example(self) -> str:
        """A record as it should be."""
        return _example(self._kind, self._fields)


def _kind_of(record: Mapping[str, Any], fields: FieldsConfig, place: Place) -> str:
    for kind, name in (("response", fields.response), ("messages", fields.messages), ("text", fields.text)):
        if record.get(name) is not None:
            return kind
    if record.get(fields.prompt) is not None:
        return "response"  # whose response is missing, which is said then
    raise ConfigError(
        f"{place}: none of the fields {fields.response!r}, {fields.messages!r}, {fields.text!r} is there (found: "
        f"{', '.join(map(repr, list(record)[:8])) or 'none'}); name yours with data.fields.prompt=... data.fields.response=..., "
        "data.fields.messages=... or data.fields.text=..."
    )


def _read_response(record: Mapping[str, Any], fields: FieldsConfig, place: Place) -> Document:
    prompt, text = (_text(record, name, place, _example("response", fields)) for name in (fields.prompt, fields.response))
    if not text:
        raise ConfigError(f"{place}: {fields.response!r} is empty, there is nothing to learn; fill it or remove the record")
    return response(prompt, text, place)


def _read_text(record: Mapping[str, Any], fields: FieldsConfig, place: Place) -> Document:
    text = _text(record, fields.text, place, _example("text", fields))
    if not text:
        raise ConfigError(f"{place}: {fields.text!r} is empty, there is nothing to learn; fill it or remove the record")
    return plain(text, place)


def _read_messages(record: Mapping[str, Any], fields: FieldsConfig, place: Place) -> Document:
    messages = record.get(fields.messages)
    if not isinstance(messages, list):
        problem = "is not a list" if fields.messages in record else "is missing"
        raise ConfigError(f"{place}: {fields.messages!r} {problem}; write one {_example('messages', fields)} a record")
    turns = [_turn(message, f"{place}: {fields.messages}[{i}]") for i, message in enumerate(messages)]
    if turns and turns[0].role == "system":
        turns = _with_system(turns, f"{place}: {fields.messages}")
    for i, turn in enumerate(turns):
        expected = ("user", "model")[i % 2]
        if turn.role != expected:
            at = i + len(messages) - len(turns)
            raise ConfigError(
                f"{place}: {fields.messages}[{at}].role is {messages[at]['role']!r}; after an optional system message the roles "
                "user and assistant take turns, user first"
            )
    if len(turns) < 2:
        raise ConfigError(
            f"{place}: {fields.messages!r} holds no message of the assistant, there is nothing to learn; add one or remove the record"
        )
    return conversation(turns, place)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where}: expected an object with role and content, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        problem = f"is {role!r}" if "role" in message else "is missing"
        raise ConfigError(f"{where}.role {problem}; it is one of system, user, assistant")
    if not isinstance(content, str):
        problem = f"is not text but {type(content).__name__}" if "content" in message else "is missing"
        raise ConfigError(f"{where}.content {problem}")
    if not content.strip():
        raise ConfigError(f"{where}.content is empty; fill it or remove the record")
    # Gemma's template trims all but the system's
    return Turn(_ROLES[role], utf8(content if role == "system" else content.strip(), f"{where}.content"))


def _with_system(turns: list[Turn], where: str) -> list[Turn]:
    """Gemma has no role for it: its template puts it before the first words of the user."""
    if len(turns) < 2 or turns[1].role != "user":
        raise ConfigError(f"{where}[1].role: a message of the user has to follow the system's")
    return [Turn("user", turns[0].content + b"\n\n" + turns[1].content), *turns[2:]]


def _text(record: Mapping[str, Any], name: str, place: Place, example: str) -> bytes:
    value = record.get(name)
    if not isinstance(value, str):
        problem = f"{name!r} is missing" if name not in record else f"{name!r} is not text but {type(value).__name__}"
        raise ConfigError(f"{place}: {problem}; write one {example} a record")
    return utf8(value, f"{place}: {name!r}")


def utf8(text: str, where: str) -> bytes:
    """Raises ConfigError for text that UTF-8 has no bytes for: JSON's escapes may hold half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); write the whole character") from error


def _example(kind: str | None, fields: FieldsConfig) -> str:
    match kind:
        case "messages":
            return f'{{"{fields.messages}": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}'
        case "text":
            return f'{{"{fields.text}": "..."}}'
        case _:
            return f'{{"{fields.prompt}": "...", "{fields.response}": "..."}}'


_READERS: Mapping[str, Callable[[Mapping[str, Any], FieldsConfig, Place], Document]] = {
    "response": _read_response,
    "messages": _read_messages,
    "text": _read_text,
}
