"""The tokenizer of a Hugging Face folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.tokenizer import ByteTokenizer, Tokenizer
from launcher.weights.folder import ModelFolder, WeightsError

FAST, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_KEPT = (FAST, SENTENCEPIECE, SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")


def open_tokenizer(folder: ModelFolder | None) -> Tokenizer:
    """The folder's own; a token for each byte where there is none. Raises WeightsError when it has none, or one that cannot be read."""
    if folder is None:
        return ByteTokenizer()
    files = {name: folder.read(name) for name in _KEPT if folder.has(name)}
    if FAST in files:
        if ByteTokenizer.matches(files[FAST]):
            return ByteTokenizer()
        return FastTokenizer(files, folder.url)
    if SENTENCEPIECE in files:
        return SentencePieceTokenizer(files, folder.url)
    raise _no_tokenizer(folder)


def check_tokenizer(folder: ModelFolder) -> None:
    """Raises WeightsError when the folder has no tokenizer. Downloads none: the hosts read it."""
    if not folder.has(FAST) and not folder.has(SENTENCEPIECE):
        raise _no_tokenizer(folder)


def _no_tokenizer(folder: ModelFolder) -> WeightsError:
    return WeightsError(f"model.weights {folder.url}: there is no {FAST} and no {SENTENCEPIECE}; copy one of them there")


class _Stored:
    """What both have in common: the files they were read from, which an export passes on."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in (FAST, SENTENCEPIECE):
            digest.update(self._files.get(name, b""))
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


class FastTokenizer(_Stored):
    """tokenizer.json, by Hugging Face's `tokenizers`."""

    def __init__(self, files: dict[str, bytes], url: str) -> None:
        """Raises WeightsError."""
        super().__init__(files)
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise WeightsError(f"model.weights {url}: its {FAST} needs the extra hf: pip install 'podlaunch[hf]'") from error
        try:
            self._tokenizer: Any = Loaded.from_str(files[FAST].decode())
        except Exception as error:  # `tokenizers` raises no narrower class
            raise WeightsError(f"model.weights {url}: {FAST} cannot be read: {' '.join(str(error).split())[:200]}") from error
        self._tokenizer.encode_special_tokens = True  # "<bos>" in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos, self.eos, self.pad = (self._control(kind, url) for kind in ("bos", "eos", "pad"))

    @property
    def vocab(self) -> int:
        """One more than the greatest id of a token that is no control token."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def encode(self, text: bytes) -> NDArray[np.int32]:
        return np.array(self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, np.int32)

    def decode(self, ids: NDArray[np.int32]) -> str:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _control(self, kind: str, url: str) -> int:
        name = _settings(self._files).get(f"{kind}_token", f"<{kind}>")
        name = name.get("content") if isinstance(name, dict) else name
        number = self._tokenizer.token_to_id(str(name))
        if number is None:
            raise WeightsError(f"model.weights {url}: {FAST} has no token {name} ({kind}); a decoder of text needs bos, eos and pad")
        return int(number)


class SentencePieceTokenizer(_Stored):
    """tokenizer.model, by Google's `sentencepiece`, which never takes text for a control token."""

    def __init__(self, files: dict[str, bytes], url: str) -> None:
        """Raises WeightsError."""
        super().__init__(files)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise WeightsError(f"model.weights {url}: its {SENTENCEPIECE} needs the extra hf: pip install 'podlaunch[hf]'") from error
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=files[SENTENCEPIECE])
        except (RuntimeError, OSError) as error:
            raise WeightsError(f"model.weights {url}: {SENTENCEPIECE} cannot be read: {' '.join(str(error).split())[:200]}") from error
        self.bos, self.eos, self.pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if min(self.bos, self.eos, self.pad) < 0:
            raise WeightsError(f"model.weights {url}: {SENTENCEPIECE} has no bos, eos or pad; a decoder of text needs them")

    @property
    def vocab(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: bytes) -> NDArray[np.int32]:
        return np.array(self._processor.encode(text.decode("utf-8", "replace")), np.int32)

    def decode(self, ids: NDArray[np.int32]) -> str:
        return str(self._processor.decode(ids.tolist()))


def _settings(files: dict[str, bytes]) -> dict[str, Any]:
    values = json.loads(files.get(SETTINGS, b"{}"))
    return values if isinstance(values, dict) else {}
