"""Which documents are held out of training: decided by content alone, so that a copy of a document never sits on both sides."""

import hashlib
from collections.abc import Sequence

from cluster.errors import ConfigError
from launcher.data.documents import Document

_SCALE = float(1 << 64)


def document_rank(document: Document) -> float:
    """A number from 0 to 1, uniform over documents, the same for the same words: whatever stands between them, in whichever source, and
    whether as one text or as prompt and response.
    """
    digest = hashlib.sha256(b" ".join(document.text.split())).digest()
    return int.from_bytes(digest[:8], "big") / _SCALE


def held_out_limit(ranks: Sequence[float], fraction: float, where: str) -> float:
    """Documents of a rank at or below this are held out: about `fraction` of them, and never none or all of them.

    Raises ConfigError when there are fewer than two different documents.
    """
    different = sorted(set(ranks))
    if len(different) < 2:
        raise ConfigError(
            f"{where}: too little data, {len(ranks)} documents of which {len(different)} are different; at least 2 are needed, "
            "one to train on and one to hold out: add text, or raise data.max_bytes"
        )
    return min(max(fraction, different[0]), different[-2])
