"""The safetensors format (https://github.com/huggingface/safetensors#format): the length of a JSON header as eight bytes, the header,
then the tensors one after another. Read by ranges of bytes, since the library of that name reads local files only.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: str
    start: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]
    type: str
    """As the format names it; `TYPES` has those that weights may have."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return TYPES[self.type]

    @property
    def row_bytes(self) -> int:
        """Of one entry of the first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


def header_length(first: bytes) -> int:
    """From the first eight bytes. Raises ValueError when that cannot be."""
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("it does not begin with a safetensors header")
    return length


def parse_header(header: bytes, file: str, size: int) -> dict[str, StoredTensor]:
    """Name -> place. `size`: bytes of the whole file. Raises ValueError for what is no header, or tells of more than the file holds."""
    begin = LENGTH_BYTES + len(header)
    try:
        values: Mapping[str, Any] = json.loads(header)
        entries = {name: entry for name, entry in values.items() if name != "__metadata__"}
        tensors = {
            name: StoredTensor(file, begin + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
            for name, entry in entries.items()
        }
        ends = max((begin + entry["data_offsets"][1] for entry in entries.values()), default=begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its safetensors header cannot be read") from error
    if ends > size:
        raise ValueError(f"it is cut off: {size} bytes of {ends}")
    return tensors


def make_header(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype[Any]) -> bytes:
    """The beginning of a file that holds tensors of one type in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensors:
        end = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
