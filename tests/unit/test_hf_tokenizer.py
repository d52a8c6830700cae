"""Tokenizers of published folders: text is text, ids are those of the library, an export passes the files on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.hf_tokenizer import check_tokenizer, open_tokenizer
from launcher.data.tokenizer import ByteTokenizer, Tokenizer
from launcher.weights.folder import ModelFolder, WeightsError

TEXT = "the quick brown fox jumps over the lazy dog; <bos> and <eos> are words here, ünïcödé too\n"


def fast() -> str:
    """A tokenizer.json as Gemma's is: byte-pair encoding with bytes for what is unknown, and control tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, processors, trainers

    tokenizer = Library(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"] * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    values: dict[str, Any] = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in special]
    return json.dumps(values)


def sentence_piece() -> bytes:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 3),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return written.getvalue()


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    content = fast().encode() if request.param == "tokenizer.json" else sentence_piece()
    (tmp_path / request.param).write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}))
    return tmp_path


def opened(place: Path) -> Tokenizer:
    return open_tokenizer(ModelFolder(str(place)))


def test_text_comes_back_and_holds_no_control_token(place: Path) -> None:
    tokenizer = opened(place)
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.int32
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids.tolist())
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    assert ids.max() < tokenizer.vocab


def test_an_export_has_the_same_tokenizer(place: Path, tmp_path: Path) -> None:
    tokenizer = opened(place)
    (tmp_path / "export").mkdir()
    tokenizer.save(tmp_path / "export")
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (place / file).exists() == (tmp_path / "export" / file).exists()
    assert opened(tmp_path / "export").fingerprint == tokenizer.fingerprint


def test_another_tokenizer_has_another_fingerprint(place: Path, tmp_path: Path) -> None:
    before = opened(place).fingerprint
    for file in ("tokenizer.json", "tokenizer.model"):
        (place / file).unlink(missing_ok=True)
    ByteTokenizer().save(place)
    assert opened(place).fingerprint != before


def test_our_own_export_gets_our_own_tokenizer_back(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert isinstance(opened(tmp_path), ByteTokenizer)
    assert isinstance(open_tokenizer(None), ByteTokenizer)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for look in (check_tokenizer, open_tokenizer):
        with pytest.raises(WeightsError, match=r"there is no tokenizer.json and no tokenizer.model; copy one of them there"):
            look(ModelFolder(str(tmp_path)))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text('{"version": "1.0"}')
    with pytest.raises(WeightsError, match=rf"{file} cannot be read") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(fast())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(WeightsError, match=r"tokenizer.json has no token </s> \(eos\)"):
        opened(tmp_path)
