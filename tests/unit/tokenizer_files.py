"""Small tokenizers in the formats of Hugging Face folders, with Gemma's settings and its control tokens in Gemma's order."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Slices of chips are joined by hosts; hosts are joined by a network.",
    "What is the answer? The answer is forty-two.\nAnd then?\n\nThen nothing.",
] * 8
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def sentencepiece_model(folder: Path) -> Path:
    """As Gemma's: BPE with bytes to fall back to, no prefix; the tokens of turns are symbols that text is searched for."""
    folder.mkdir(parents=True, exist_ok=True)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT for line in text.split("\n")),
        model_writer=made,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "<table>"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return folder


def tokenizer_json(folder: Path) -> Path:
    """As Gemma's; <start_of_turn> is declared special, <end_of_turn> only in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁"), "merged_with_next")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=[*CONTROL, *bytes_], show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in CONTROL]
    made = Tokenizer.from_str(json.dumps(content))
    made.add_tokens([AddedToken("<table>", normalized=False)])
    content = json.loads(made.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in ("<end_of_turn>", "<table>")
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>"},
        "pad_token": "<pad>",
        "added_tokens_decoder": {"5": {"content": "<end_of_turn>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
