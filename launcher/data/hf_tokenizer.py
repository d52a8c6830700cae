"""The tokenizer of a Hugging Face folder: tokenizer.json (the `tokenizers` library) or tokenizer.model (SentencePiece).

Both libraries can be made to see control tokens in text. Here text never yields one: they are entered by the id of their name.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from launcher.data.tokenizer import ByteTokenizer, Tokenizer

TOKENIZER_JSON, TOKENIZER_MODEL, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SAVED = (TOKENIZER_JSON, TOKENIZER_MODEL, SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""What a folder of Hugging Face's holds of its tokenizer."""
_USUAL = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|im_start|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|im_end|>"),
    "pad": ("<pad>",),
}
_CONTROL = re.compile(
    r"</?s>|<(pad|eos|bos|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|2mass|unused\d+)>"
    r"|\[(multimodal|@BOS@|toxicity=0)\]"
)
"""Gemma's names of control tokens: some of its files declare them as ordinary symbols, which text would be searched for."""


_OF_IMAGES = ("<image_soft_token>",)
"""Gemma 3's text models have no embedding for the last token of the tokenizer that they share with the others."""


def open_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; null is one token a byte. Raises ConfigError, one line, when it cannot be used."""
    if path is None:
        return ByteTokenizer()
    where, *others = tokenizer_files(path)
    name = TOKENIZER_MODEL if where.suffix == ".model" else TOKENIZER_JSON
    files = {name: where.read_bytes(), **{other.name: other.read_bytes() for other in others}}
    return tokenizer_of(files, f"data.tokenizer {path}", name)


def tokenizer_of(files: Mapping[str, bytes], where: str, name: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. `files`: those of SAVED that it holds; `where`: the setting, for error lines; `name`: which
    of the two is read, by default tokenizer.json where there is one. Raises ConfigError, one line, when it cannot be used.
    """
    name = name or next((known for known in (TOKENIZER_JSON, TOKENIZER_MODEL) if known in files), None)
    if name is None:
        raise ConfigError(f"{where}: there is neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}")
    try:
        if name == TOKENIZER_MODEL:
            return _SentencePiece(files, where)
        return ByteTokenizer() if ByteTokenizer.matches(files[name]) else _Fast(files, where)
    except ConfigError:
        raise
    except Exception as error:  # both libraries raise what they like, SentencePiece RuntimeError and tokenizers a bare Exception
        raise ConfigError(f"{where}: {name} is no tokenizer: {' '.join(str(error).split())[:200]}; give another one") from error


def tokenizer_files(path: str) -> list[Path]:
    """The file of `data.tokenizer`, and what lies beside it and belongs to it. Raises ConfigError when there is none."""
    file = _tokenizer_file(path)
    return [file, *(place for name in SAVED if (place := file.with_name(name)).exists() and place != file)]


def _tokenizer_file(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.is_dir():
        if not place.exists():
            raise ConfigError(f"data.tokenizer {path}: no such file or folder (looked in {Path.cwd()})")
        if place.suffix not in (".json", ".model"):
            raise ConfigError(f"data.tokenizer {path}: give a tokenizer.json, a tokenizer.model, or a folder that holds one")
        return place
    for name in (TOKENIZER_JSON, TOKENIZER_MODEL):
        if (place / name).exists():
            return place / name
    raise ConfigError(f"data.tokenizer {path}: the folder holds neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}")


class _Stored:
    """What both kinds have in common: the files that they were read from, which an export passes on."""

    name: str
    vocab: int
    bos: int
    eos: int
    pad: int

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self._files, self._where = dict(files), where
        self._settings = _settings(files, where)

    @property
    def fingerprint(self) -> str:
        own = hashlib.sha256(self._files[self.name])
        own.update(f"{self.bos} {self.eos} {self.pad}".encode())
        return own.hexdigest()

    def save(self, folder: Path) -> None:
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    def _special_names(self) -> set[str]:
        """Control tokens by the settings beside the file."""
        added = self._settings.get("added_tokens_decoder")
        entries = added.values() if isinstance(added, Mapping) else ()
        return {str(entry["content"]) for entry in entries if isinstance(entry, Mapping) and entry.get("special") and "content" in entry}

    def _names_of(self, role: str) -> list[str]:
        """Names that the token of a role (bos, eos, pad) may have, the likeliest first."""
        given = self._settings.get(f"{role}_token")
        given = given.get("content") if isinstance(given, Mapping) else given
        return [given] if isinstance(given, str) else list(_USUAL[role])

    def _find_roles(self, ids: Mapping[str, int]) -> None:
        """`ids`: control tokens. Raises ConfigError for a tokenizer that has no beginning or end of text."""
        for role in ("bos", "eos", "pad"):
            found = next((ids[name] for name in self._names_of(role) if name in ids), None)
            if found is None and role != "pad":
                raise ConfigError(
                    f"{self._where}: {self.name} has no {role} token (looked for {', '.join(self._names_of(role))}), which every "
                    f"document needs; name it in {SETTINGS} beside it as {role}_token"
                )
            setattr(self, role, self.eos if found is None else found)


class _Fast(_Stored):
    """tokenizer.json."""

    name = TOKENIZER_JSON

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        from tokenizers import Tokenizer as Fast

        super().__init__(files, where)
        content = json.loads(files[TOKENIZER_JSON])
        special = self._special_names()
        for token in content.get("added_tokens", []):
            token["special"] = bool(token["special"]) or token["content"] in special or bool(_CONTROL.fullmatch(token["content"]))
        self._ids = {token["content"]: int(token["id"]) for token in content.get("added_tokens", []) if token["special"]}
        self._fast = Fast.from_str(json.dumps(content))
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # as the text that they are
        self.vocab = 1 + max(i for name, i in self._fast.get_vocab(with_added_tokens=True).items() if name not in _OF_IMAGES)
        self._find_roles(self._ids)

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.int32]]:
        encoded = self._fast.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def control(self, name: str) -> int | None:
        return self._ids.get(name)

    def decode(self, ids: NDArray[np.int32]) -> str:
        return str(self._fast.decode(ids.tolist(), skip_special_tokens=True))


class _SentencePiece(_Stored):
    """tokenizer.model. Symbols that only text would be searched for become control symbols, which it never is."""

    name = TOKENIZER_MODEL

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as generated

        proto: Any = generated  # protobuf makes its classes when it is imported
        super().__init__(files, where)
        model = proto.ModelProto.FromString(files[TOKENIZER_MODEL])
        kinds: Any = proto.ModelProto.SentencePiece
        special = self._special_names()
        for piece in model.pieces:
            if piece.type == kinds.USER_DEFINED and (piece.piece in special or _CONTROL.fullmatch(piece.piece)):
                piece.type = kinds.CONTROL
        self._ids = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
        self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        self.vocab = len(model.pieces)
        self._find_roles(self._ids)

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.int32]]:
        return [np.array(ids, np.int32) for ids in self._processor.encode([text.decode() for text in texts], out_type=int)]

    def control(self, name: str) -> int | None:
        return self._ids.get(name)

    def decode(self, ids: NDArray[np.int32]) -> str:
        control = set(self._ids.values())
        return str(self._processor.decode([i for i in ids.tolist() if i not in control]))


def _settings(files: Mapping[str, bytes], where: str) -> Mapping[str, Any]:
    try:
        settings = json.loads(files.get(SETTINGS, b"{}"))
    except ValueError as error:
        raise ConfigError(f"{where}: {SETTINGS} cannot be read: {' '.join(str(error).split())}") from error
    return settings if isinstance(settings, Mapping) else {}
