"""Which tokenizer a run uses: the one that `data.tokenizer` names, else that of `model.weights`, else one token a byte."""

import hashlib
from pathlib import Path

from cluster.state import cache_dir, write_atomic_bytes
from launcher.data.config import DataConfig
from launcher.data.hf_tokenizer import SAVED, open_tokenizer
from launcher.data.tokenizer import Tokenizer
from launcher.weights.folder import ModelFolder


def tokenizer_of(data: DataConfig, weights: ModelFolder | None) -> Tokenizer:
    """Raises ConfigError, one line, when it cannot be used, or a folder of weights has none."""
    if data.tokenizer is not None or weights is None:
        return open_tokenizer(data.tokenizer)
    return open_tokenizer(str(_here(weights)))


def _here(weights: ModelFolder) -> Path:
    """A folder of this machine with the files of its tokenizer; one from elsewhere is kept in the cache by its content."""
    if "://" not in weights.url:
        return Path(weights.url)
    files = {name: weights.read(name) for name in SAVED if weights.has(name)}
    digest = hashlib.sha256(weights.url.encode() + b"".join(name.encode() + content for name, content in files.items()))
    folder = cache_dir() / "tokenizers" / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic_bytes(folder / name, content)
    return folder
