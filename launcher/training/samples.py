"""Texts that the model writes from given prompts, with a cache of keys and values: greedy, or drawn at a temperature.

Prompts are rows of a batch that is split over the mesh as in training, so it works for any model that trains, on any number of hosts; rows
without a prompt fill it up. A row's draws depend on the seed, its number and the token's, and on nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from numpy.typing import NDArray

from launcher.config import SamplesConfig
from launcher.data.documents import END_OF_TURN, START_OF_TURN
from launcher.data.pack import control_id
from launcher.data.tokenizer import Tokenizer
from launcher.models.interface import Decoder, Params
from launcher.training.mesh import Layout
from launcher.training.state import Blueprint, abstract_array


@dataclass(frozen=True)
class Sample:
    """One text and what it began with."""

    prompt: str
    text: str
    """Without the prompt, and without what ended it."""
    tokens: int
    """That were drawn, the one that ended it included."""


class Sampler:
    """Compiled for one set of prompts. Collective: every process makes it, and calls it at the same time."""

    def __init__(self, blueprint: Blueprint, tokenizer: Tokenizer, config: SamplesConfig) -> None:
        """Raises ConfigError when conversations are asked for and the tokenizer has no tokens for their turns."""
        self._config, self._tokenizer, self._layout = config, tokenizer, blueprint.layout
        prompts = [encode_prompt(prompt, tokenizer, chat=config.chat) for prompt in config.prompts]
        self._tokens, self._lengths = _padded(prompts, tokenizer, blueprint.layout)
        rows = blueprint.layout.rows
        abstract = [abstract_array(array.shape, jnp.int32, rows) for array in (self._tokens, self._lengths)]

        def write(params: Params, frozen: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            return generate(blueprint.model(params, frozen), tokens, lengths, config, tokenizer.vocab)

        jitted = jax.jit(write, out_shardings=blueprint.layout.replicated)
        self._write: Compiled = jitted.lower(blueprint.abstract.params, blueprint.frozen, *abstract).compile()

    def __call__(self, params: Params, frozen: Params) -> list[Sample]:
        """One sample a prompt, in their order. `frozen`: what adapters stand beside."""
        rows = self._layout.rows
        given = [jax.make_array_from_callback(array.shape, rows, partial(_part, array)) for array in (self._tokens, self._lengths)]
        written = np.asarray(self._write(params, frozen, *given).addressable_data(0))
        return [self._read(prompt, row) for prompt, row in zip(self._config.prompts, written, strict=False)]

    def _read(self, prompt: str, row: NDArray[np.int32]) -> Sample:
        ends = {self._tokenizer.eos, self._tokenizer.control(END_OF_TURN)}
        length = next((i for i, token in enumerate(row.tolist()) if token in ends), len(row))
        return Sample(prompt, self._tokenizer.decode(row[:length]), min(length + 1, len(row)))


def encode_prompt(prompt: str, tokenizer: Tokenizer, *, chat: bool) -> NDArray[np.int32]:
    """With bos before it; with `chat` as the user's turn in Gemma's template, and the beginning of the model's."""
    if not chat:
        return np.concatenate([[tokenizer.bos], *tokenizer.encode([prompt.encode()])]).astype(np.int32)
    start, end = (control_id(tokenizer, name) for name in (START_OF_TURN, END_OF_TURN))
    said, between, answer = tokenizer.encode([f"user\n{prompt.strip()}".encode(), b"\n", b"model\n"])
    return np.concatenate([[tokenizer.bos, start], said, [end], between, [start], answer]).astype(np.int32)


def generate(model: Decoder, tokens: jax.Array, lengths: jax.Array, config: SamplesConfig, vocab: int) -> jax.Array:
    """Tokens that follow the prompts, int32 [B, max_tokens]; goes on after one that ends a text. For use inside a jitted function.

    tokens int32 [B, P], of which row b uses the first lengths[b] (at least 1). No id of `vocab` or above is drawn.
    """
    batch, width = tokens.shape
    places = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    prompt = (places < lengths[:, None]).astype(jnp.int32)  # the segment ids: what is behind a prompt is nothing
    cache = model.new_cache(batch, width + config.max_tokens - 1)
    hidden, cache = model.extend(tokens, places, prompt, cache, 0)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

    def step(carry: tuple[jax.Array, Any], number: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, cache = carry
        hidden, cache = model.extend(token, (lengths + number)[:, None], jnp.ones_like(token), cache, width + number)
        chosen = _choose(model, hidden, number + 1, config, vocab)
        return (chosen, cache), chosen

    first = _choose(model, last, jnp.zeros((), jnp.int32), config, vocab)
    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(config.max_tokens - 1))
    return jnp.concatenate([first, rest[..., 0].T], axis=1)


def _choose(model: Decoder, hidden: jax.Array, number: jax.Array, config: SamplesConfig, vocab: int) -> jax.Array:
    """The next token of every row, int32 [B, 1], from hidden [B, 1, d_model]."""
    logits = jnp.einsum("bd,vd->bv", hidden[:, 0], model.head().astype(hidden.dtype), preferred_element_type=jnp.float32)
    if model.final_soft_cap is not None:
        logits = model.final_soft_cap * jnp.tanh(logits / model.final_soft_cap)
    logits = jnp.where(jnp.arange(logits.shape[1]) < vocab, logits, -jnp.inf)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]

    def draw(row: jax.Array, logits: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), row), number)
        return jax.random.categorical(key, logits / config.temperature)

    return jax.vmap(draw)(jnp.arange(logits.shape[0]), logits).astype(jnp.int32)[:, None]


def _padded(prompts: Sequence[NDArray[np.int32]], tokenizer: Tokenizer, layout: Layout) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(tokens [B, P], lengths [B]), with as many rows as the mesh can split."""
    shards = layout.batch_shards
    filled = [*prompts, *[np.array([tokenizer.bos], np.int32)] * (-len(prompts) % shards)]
    tokens = np.full((len(filled), max(map(len, filled))), tokenizer.pad, np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array(list(map(len, filled)), np.int32)


def _part(array: NDArray[np.int32], index: tuple[slice, ...] | None) -> NDArray[np.int32]:
    return array[index] if index is not None else array
