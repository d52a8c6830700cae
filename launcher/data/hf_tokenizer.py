"""The tokenizer of a Hugging Face folder: tokenizer.json (the `tokenizers` library) or tokenizer.model (SentencePiece).

Both libraries can be made to see control tokens in text. Here text never yields one: they are entered by the id of their name.
"""

import hashlib
import json
import re
import shutil
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
    file = tokenizer_file(path)
    try:
        return _SentencePiece(file) if file.name.endswith(".model") else _Fast(file)
    except ConfigError:
        raise
    except Exception as error:  # both libraries raise what they like, SentencePiece RuntimeError and tokenizers a bare Exception
        raise ConfigError(f"data.tokenizer: {file} is no tokenizer: {' '.join(str(error).split())[:200]}; give another file") from error


def tokenizer_file(path: str) -> Path:
    """The file of `data.tokenizer`. Raises ConfigError when there is none."""
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


def tokenizer_files(path: str) -> list[Path]:
    """All files that belong to the tokenizer of `data.tokenizer`. Raises ConfigError when there is none."""
    file = tokenizer_file(path)
    return [file, *(place for name in SAVED if (place := file.with_name(name)).exists() and place != file)]


class _FromFile:
    """What both kinds have in common. `ids`: every control token."""

    vocab: int
    bos: int
    eos: int
    pad: int

    def __init__(self, file: Path) -> None:
        self._file = file
        self._settings = _read_settings(file.with_name(SETTINGS))

    @property
    def fingerprint(self) -> str:
        own = hashlib.sha256(self._file.read_bytes())
        own.update(f"{self.bos} {self.eos} {self.pad}".encode())
        return own.hexdigest()

    def save(self, folder: Path) -> None:
        for file in tokenizer_files(str(self._file)):
            shutil.copyfile(file, folder / (file.name if file != self._file else self._standard_name))

    @property
    def _standard_name(self) -> str:
        return TOKENIZER_MODEL if self._file.suffix == ".model" else TOKENIZER_JSON

    def _special_names(self) -> set[str]:
        """Control tokens by the settings beside the file."""
        added = self._settings.get("added_tokens_decoder")
        entries = added.values() if isinstance(added, Mapping) else ()
        return {str(entry["content"]) for entry in entries if isinstance(entry, Mapping) and entry.get("special") and "content" in entry}

    def _name_of(self, role: str) -> list[str]:
        """Names that the token of a role (bos, eos, pad) may have, the likeliest first."""
        given = self._settings.get(f"{role}_token")
        given = given.get("content") if isinstance(given, Mapping) else given
        return [given] if isinstance(given, str) else list(_USUAL[role])

    def _find_roles(self, ids: Mapping[str, int]) -> None:
        """`ids`: control tokens. Raises ConfigError for a tokenizer that has no beginning or end of text."""
        for role in ("bos", "eos", "pad"):
            found = next((ids[name] for name in self._name_of(role) if name in ids), None)
            if found is None and role != "pad":
                raise ConfigError(
                    f"data.tokenizer: {self._file} has no {role} token (looked for {', '.join(self._name_of(role))}), which every "
                    f"document needs; name it in {SETTINGS} beside it as {role}_token"
                )
            setattr(self, role, self.eos if found is None else found)


class _Fast(_FromFile):
    """tokenizer.json."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Fast

        super().__init__(file)
        content = json.loads(file.read_text(encoding="utf-8"))
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


class _SentencePiece(_FromFile):
    """tokenizer.model. Symbols that only text would be searched for become control symbols, which it never is."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece import sentencepiece_model_pb2 as generated

        proto: Any = generated  # protobuf makes its classes when it is imported
        super().__init__(file)
        model = proto.ModelProto.FromString(file.read_bytes())
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


def _read_settings(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.tokenizer: {file} cannot be read: {' '.join(str(error).split())}") from error
    return settings if isinstance(settings, Mapping) else {}
