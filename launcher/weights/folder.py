"""A folder of a model in the Hugging Face format: config.json, one or many safetensors files, a tokenizer. Read by ranges of bytes."""

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from launcher.weights.safetensors_format import LENGTH_BYTES, StoredTensor, header_length, parse_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
"""One request's share of a tensor."""
THREADS = 8
"""Requests under way at once: a single stream from Cloud Storage or the hub fills no network."""
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 16


class WeightsError(ConfigError):
    """The folder of `model.weights` cannot be used."""


class ModelFolder:
    """Raises WeightsError, one line, wherever something is missing, unreadable, or the place does not answer."""

    def __init__(self, url: str, endpoint: str | None = None) -> None:
        """`url`: a local path, gs://<bucket>/<folder>, or hf://<organisation>/<model>[@<revision>]. `endpoint`: of a Cloud Storage API that
        asks for no credentials; None: Google's own, or what STORAGE_EMULATOR_HOST says.
        """
        self.url = url.rstrip("/")
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._client, self._root, self._errors = _client(self.url, endpoint)
        # fsspec's other clients read what is asked for; that of the hub would read five megabytes further each time
        self._reading = {"cache_type": "none"} if self.url.startswith("hf://") else {}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self._json(CONFIG)

    @functools.cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of every file by its name, from the files' headers."""
        if self.has(INDEX):
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise WeightsError(f"model.weights {self.url}: {INDEX} has no weight_map; copy the folder again")
            files = sorted(set(weight_map.values()))
        else:
            files = [SINGLE]
        with ThreadPoolExecutor(THREADS) as pool:
            headers = list(pool.map(self._header, files))
        return {name: tensor for header in headers for name, tensor in header.items()}

    def has(self, file: str) -> bool:
        with self._explained(file):
            return bool(self._client.exists(f"{self._root}/{file}"))

    def read(self, file: str, start: int | None = None, stop: int | None = None) -> bytes:
        """All of a file, or these bytes of it."""
        with self._explained(file):
            content = bytes(self._client.cat_file(f"{self._root}/{file}", start=start, end=stop, **self._reading))
        with self._lock:
            self.bytes_read += len(content)
        return content

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Entries [start, stop) of the first axis of a tensor. Nothing else is read, and held are they and THREADS chunks."""
        values = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype)
        if not values.size:
            return values
        target = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # numpy's types know no buffers
        begin = tensor.start + start * tensor.row_bytes

        def fetch(at: int) -> None:
            end = min(at + CHUNK_BYTES, len(target))
            target[at:end] = self.read(tensor.file, begin + at, begin + end)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, range(0, len(target), CHUNK_BYTES)))
        return values

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; of the configuration, the places of all tensors, and samples of every file: other weights give another one."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        ends: dict[str, int] = {}
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor}".encode())
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.start + tensor.row_bytes * (tensor.shape[0] if tensor.shape else 1))
        places = [(file, end * i // _SAMPLES, end) for file, end in sorted(ends.items()) for i in range(_SAMPLES)]
        with ThreadPoolExecutor(THREADS) as pool:
            for sample in pool.map(lambda place: self.read(place[0], place[1], min(place[1] + _SAMPLE_BYTES, place[2])), places):
                digest.update(sample)
        return digest.hexdigest()

    def _header(self, file: str) -> dict[str, StoredTensor]:
        with self._explained(file):
            size = int(self._client.size(f"{self._root}/{file}"))
        try:
            length = header_length(self.read(file, 0, LENGTH_BYTES))
            return parse_header(self.read(file, LENGTH_BYTES, LENGTH_BYTES + length), file, size)
        except ValueError as error:
            raise WeightsError(f"model.weights {self.url}: {file} is damaged: {error}; copy it again") from error

    def _json(self, file: str) -> dict[str, Any]:
        try:
            values = json.loads(self.read(file))
        except ValueError as error:
            raise WeightsError(f"model.weights {self.url}: {file} is not valid JSON ({error}); copy it again") from error
        if not isinstance(values, dict):
            raise WeightsError(f"model.weights {self.url}: {file} holds no JSON object; copy it again")
        return values

    @contextmanager
    def _explained(self, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if error.__cause__ is not None and self.url.startswith("hf://"):  # not the file is missing, but where it should be
                advice = _advice(self.url, error.__cause__)
                raise WeightsError(
                    f"model.weights {self.url}: the hub shows no such model or revision; correct the name{advice}"
                ) from error
            raise WeightsError(
                f"model.weights {self.url}: there is no {file}; give a folder with {CONFIG}, *.safetensors and a tokenizer"
            ) from error
        except self._errors as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise WeightsError(f"model.weights {self.url}: {file} cannot be read: {text}{_advice(self.url, error)}") from error


def _client(url: str, endpoint: str | None) -> tuple[Any, str, tuple[type[Exception], ...]]:
    """(file system, path of the folder in it, what it raises)."""
    if url.startswith("gs://"):
        return _cloud_storage(url, endpoint)
    if url.startswith("hf://"):
        return _hub(url)
    from fsspec.implementations.local import LocalFileSystem

    return LocalFileSystem(), os.path.abspath(os.path.expanduser(url)), (OSError,)  # noqa: PTH100, PTH111  # text, as fsspec takes it


def _cloud_storage(url: str, endpoint: str | None) -> tuple[Any, str, tuple[type[Exception], ...]]:
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as in launcher/training/storage.py
    try:
        import fsspec
        from aiohttp import ClientError
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError
    except ImportError as error:
        raise WeightsError(f"model.weights {url} needs the extra gcs: pip install 'podlaunch[gcs]'") from error
    options = {"token": "anon", "endpoint_url": endpoint} if endpoint else {}
    return fsspec.filesystem("gcs", **options), url.removeprefix("gs://"), (OSError, ClientError, HttpError, GoogleAuthError)


def _hub(url: str) -> tuple[Any, str, tuple[type[Exception], ...]]:
    try:
        from huggingface_hub import HfFileSystem
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise WeightsError(f"model.weights {url} needs the extra hf: pip install 'podlaunch[hf]'") from error
    client = HfFileSystem(token=os.environ.get("HF_TOKEN") or False, endpoint=os.environ.get("HF_ENDPOINT"))
    errors = (OSError, ValueError, *HfHubHTTPError.__bases__)  # one of them is that of whatever HTTP client its version has
    return client, url.removeprefix("hf://"), errors


def _advice(url: str, error: BaseException) -> str:
    if not url.startswith("hf://"):
        return ""
    if not os.environ.get("HF_TOKEN"):
        return "; gated and private models need HF_TOKEN in .env or the environment"
    status = getattr(getattr(error, "response", None), "status_code", None)
    return "; accept the model's licence on the hub, or give another HF_TOKEN" if status in (401, 403) else ""
