"""Text to token ids. `Tokenizer` is all that the data pipeline, the generation of samples and the export need."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.data.documents import END_OF_TURN, START_OF_TURN

PAD, EOS, BOS, UNK = 0, 1, 2, 3
CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
_TURN_TOKENS = (START_OF_TURN, END_OF_TURN)


class Tokenizer(Protocol):
    """Never yields control tokens for text: a literal "<bos>" in the data is just five characters."""

    @property
    def vocab(self) -> int: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text would get other ids."""
        ...

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.int32]]:
        """Ids of each UTF-8 text, without bos and eos."""
        ...

    def control(self, name: str) -> int | None:
        """The id of the control token of this name; None when there is none."""
        ...

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text, control tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which Hugging Face tokenizers load the same tokenizer."""
        ...


class ByteTokenizer:
    """One token a byte: id = 4 + byte, after Gemma's four control tokens in Gemma's order; those of turns follow. Needs no file and fits
    any text.
    """

    vocab = len(CONTROL_TOKENS) + 256 + len(_TURN_TOKENS)
    bos = BOS
    eos = EOS
    pad = PAD

    @staticmethod
    def matches(tokenizer_json: bytes) -> bool:
        """Whether these are the contents of the tokenizer.json that `save` writes."""
        return len(tokenizer_json) < 1 << 16 and bool(json.loads(tokenizer_json) == _tokenizer_json())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(_tokenizer_json(), sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[np.int32]]:
        return [np.frombuffer(text, np.uint8).astype(np.int32) + len(CONTROL_TOKENS) for text in texts]

    def control(self, name: str) -> int | None:
        return _CONTROL_IDS.get(name)

    def decode(self, ids: NDArray[np.int32]) -> str:
        data = ids[(ids >= len(CONTROL_TOKENS)) & (ids < len(CONTROL_TOKENS) + 256)] - len(CONTROL_TOKENS)
        return data.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        _write_json(folder / "tokenizer.json", _tokenizer_json())
        _write_json(folder / "tokenizer_config.json", _tokenizer_config())


_CONTROL_IDS = {name: i for i, name in enumerate(CONTROL_TOKENS)} | {
    name: len(CONTROL_TOKENS) + 256 + i for i, name in enumerate(_TURN_TOKENS)
}


def _tokenizer_json() -> dict[str, Any]:
    """The `tokenizers` library's format: a BPE with no merges, so that every character falls back to its bytes."""
    names = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *_TURN_TOKENS]
    control = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for name, i in _CONTROL_IDS.items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
