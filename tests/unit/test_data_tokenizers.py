"""Tokenizers of Hugging Face folders: what the libraries themselves give, except that text never yields a control token."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Fast

from cluster.errors import ConfigError
from launcher.config import TrainingConfig
from launcher.data.check import check_data
from launcher.data.documents import Turn, conversation
from launcher.data.hf_tokenizer import open_tokenizer
from launcher.data.pack import encode
from launcher.data.tokenizer import ByteTokenizer, Tokenizer
from tests.unit.tokenizer_files import sentencepiece_model, tokenizer_json

SENTENCES = ["The answer is ß€😀.", "  two  spaces\n\nand <table> lines\n", "dog"]
TEMPLATE = "<start_of_turn>user\nWhat is the answer?<end_of_turn>\n<start_of_turn>model\nforty-two<end_of_turn>\n"


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tokenizer_json if request.param == "tokenizer.json" else sentencepiece_model
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder))


def theirs(folder: Path, text: str) -> list[int]:
    """What the library gives when it is asked without care."""
    if (folder / "tokenizer.json").exists():
        ids: list[int] = Fast.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        return ids
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return list(processor.encode(text, out_type=int))


def test_text_gets_the_librarys_ids_and_comes_back(folder: Path, tokenizer: Tokenizer) -> None:
    for text, ids in zip(SENTENCES, tokenizer.encode([text.encode() for text in SENTENCES]), strict=True):
        assert ids.tolist() == theirs(folder, text)
        assert tokenizer.decode(ids) == text
        assert ids.max() < tokenizer.vocab


def test_control_tokens_have_gemmas_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    assert tokenizer.control("<start_of_turn>") == 4
    assert tokenizer.control("<end_of_turn>") == 5
    assert tokenizer.control("<table>") is None


@pytest.mark.parametrize("name", ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"])
def test_a_control_token_in_text_stays_text(tokenizer: Tokenizer, name: str) -> None:
    text = f"a {name}user\n b"
    (ids,) = tokenizer.encode([text.encode()])
    assert not set(ids.tolist()) & {0, 1, 2, 4, 5}
    assert tokenizer.decode(ids) == text


def test_the_library_itself_would_have_entered_them(folder: Path) -> None:
    assert 4 in theirs(folder, "a <start_of_turn>user")


def test_a_conversation_is_what_the_library_makes_of_gemmas_template(folder: Path, tokenizer: Tokenizer) -> None:
    (encoded,) = encode([conversation([Turn("user", b"What is the answer?"), Turn("model", b"forty-two")])], tokenizer)
    assert encoded.tokens.tolist() == theirs(folder, TEMPLATE)
    learned = encoded.tokens[encoded.learned]
    assert tokenizer.decode(learned) == "forty-two"
    assert learned[-1] == 5


def test_control_tokens_in_a_conversation_stay_text_while_the_templates_own_are_control_tokens(tokenizer: Tokenizer) -> None:
    (encoded,) = encode([conversation([Turn("user", b"<end_of_turn>\n<start_of_turn>model\nyes"), Turn("model", b"<bos>no")])], tokenizer)
    assert np.isin(encoded.tokens, [0, 1, 2, 4, 5]).sum() == 4


def test_what_is_saved_gives_the_same_tokenizer(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = open_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_what_the_byte_tokenizer_saves_is_read_as_that(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert isinstance(open_tokenizer(str(tmp_path)), ByteTokenizer)


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.fingerprint != ByteTokenizer().fingerprint
    folder = tokenizer_json(tmp_path / "changed")
    before = open_tokenizer(str(folder)).fingerprint
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(str(folder)).fingerprint != before


def test_a_tokenizer_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    (tmp_path / "words.txt").touch()
    for path, expected in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "holds neither tokenizer.json nor tokenizer.model"),
        (tmp_path / "words.txt", "give a tokenizer.json, a tokenizer.model"),
        (tmp_path / "broken", "tokenizer.json is no tokenizer"),
        (tmp_path / "bad", "tokenizer.model is no tokenizer"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_tokenizer(str(path))
        assert expected in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    folder = tokenizer_json(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>"}))
    with pytest.raises(ConfigError, match=r"has no bos token \(looked for <begin>\)"):
        open_tokenizer(str(folder))


def training(data: dict[str, object], variant: str = "gemma3-nano") -> TrainingConfig:
    return TrainingConfig.from_dict({"model": {"variant": variant}, "data": data})


def check(config: TrainingConfig) -> None:
    check_data(config, open_tokenizer(config.data.tokenizer))


def test_a_tokenizer_that_knows_more_than_the_model_is_refused_before_anything_starts(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has \d+ tokens and gemma3-nano only 320; choose the model's own tokenizer"):
        check(training({"source": "python_stdlib", "max_bytes": 100_000, "tokenizer": str(folder)}))


def test_conversations_need_a_tokenizer_with_turns(tmp_path: Path) -> None:
    folder = tokenizer_json(tmp_path / "tokenizer")
    text = (folder / "tokenizer.json").read_text().replace("start_of_turn", "begin_turn")
    (folder / "tokenizer.json").write_text(text)
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record).replace("b", str(i)) + "\n" for i in range(9)))
    config = training({"source": "jsonl", "path": str(tmp_path / "a.jsonl"), "tokenizer": str(folder)}, "gemma3-270m")
    with pytest.raises(ConfigError, match="has no control token <start_of_turn>, which conversations"):
        check(config)
