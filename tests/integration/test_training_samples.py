"""Texts that the model writes: the cache of keys and values against none, draws by seed, meshes, two processes, a whole job."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launcher.config import LaunchConfig, SamplesConfig, TrainingConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.models.decoder import Transformer
from launcher.models.interface import BuildOptions
from launcher.models.registry import VARIANTS
from launcher.models.variants import Variant
from launcher.training.job import TrainingJob
from launcher.training.mesh import make_layout
from launcher.training.optimizer import make_optimizer
from launcher.training.samples import Sampler, encode_prompt, generate
from launcher.training.state import make_blueprint
from tests.integration.training_gang import Gang, write_config

TINY: dict[str, Any] = {
    "layers": 6,
    "d_model": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "vocab": 64,
    "window": 4,
    "query_scale": 8.0,
}
LENGTH, PROMPT, NEW = 20, 9, 11
FAMILIES = {
    "gemma3": dataclasses.replace(VARIANTS["gemma3-nano"], **TINY),
    "gemma2": dataclasses.replace(VARIANTS["gemma2-2b"], **TINY),
    "gemma1": dataclasses.replace(VARIANTS["gemma-2b"], **(TINY | {"window": None})),
}
PROMPTS = ["def f(", "import os\nclass A:\n    ", "x"]


def decoder(variant: Variant) -> Transformer:
    model = Transformer(variant, jax.random.key(1), BuildOptions())
    state = nnx.state(model)
    # far from uniform logits, and norms that are not all one
    nnx.update(model, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), state))
    return model


def ids(seed: int, length: int = LENGTH) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (2, length), 4, 64)


def counting(length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length), (2, length))


@nnx.jit
def extend(model: Transformer, *arguments: Any) -> Any:
    return model.extend(*arguments)


@nnx.jit
def hidden_of(model: Transformer, *arguments: Any) -> Any:
    return model.hidden(*arguments)


@pytest.mark.parametrize(("family", "pieces"), [("gemma3", [9, *[1] * 11]), ("gemma3", [13, 7]), ("gemma2", [13, 7]), ("gemma1", [13, 7])])
def test_hidden_states_with_a_cache_are_those_without(family: str, pieces: list[int]) -> None:
    model, tokens, places = decoder(FAMILIES[family]), ids(0), counting(LENGTH)
    expected = hidden_of(model, tokens, places, jnp.ones_like(tokens))
    cache, at, found = model.new_cache(2, LENGTH + 3), 0, []
    for piece in pieces:
        part = slice(at, at + piece)
        hidden, cache = extend(model, tokens[:, part], places[:, part], jnp.ones((2, piece), jnp.int32), cache, jnp.array(at))
        found.append(hidden)
        at += piece
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=3e-5)


def test_a_packed_document_goes_on_as_it_would_alone() -> None:
    model, tokens = decoder(FAMILIES["gemma3"]), ids(1)
    segments = jnp.array([[1] * 5 + [2] * 7] * 2)
    places = jnp.array([[*range(5), *range(7)]] * 2)
    _, cache = model.extend(tokens[:, :12], places, segments, model.new_cache(2, LENGTH), 0)
    hidden, _ = model.extend(tokens[:, 12:], counting(8) + 7, jnp.full((2, 8), 2), cache, 12)
    alone = model.hidden(tokens[:, 5:], counting(15), jnp.ones((2, 15), jnp.int32))
    np.testing.assert_allclose(hidden, alone[:, 7:], atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_the_likeliest_tokens_of_the_whole_forward_pass(family: str) -> None:
    model, tokens, lengths = decoder(FAMILIES[family]), ids(2, PROMPT), jnp.array([PROMPT, 4])
    written = generate(model, tokens, lengths, SamplesConfig(max_tokens=NEW), vocab=60)
    assert written.shape == (2, NEW)
    for row, length in enumerate(lengths.tolist()):
        whole = jnp.concatenate([tokens[row, :length], written[row]])[None]
        logits = model.logits(whole, jnp.arange(whole.shape[1])[None], jnp.ones_like(whole))[0, length - 1 : -1, :60]
        assert jnp.argmax(logits, axis=-1).tolist() == written[row].tolist()
    assert len(set(written.ravel().tolist())) > 2


def test_draws_depend_on_the_seed_and_the_row_alone_and_follow_the_temperature() -> None:
    model, tokens, lengths = decoder(FAMILIES["gemma3"]), ids(3, PROMPT), jnp.array([PROMPT, 4])

    def draw(**settings: Any) -> list[list[int]]:
        found: list[list[int]] = generate(model, tokens, lengths, SamplesConfig(max_tokens=NEW, **settings), vocab=60).tolist()
        return found

    warm = draw(temperature=1.0, seed=7)
    assert warm != draw(temperature=1.0, seed=8)
    assert draw(temperature=1e-6, seed=7) == draw()
    config = SamplesConfig(max_tokens=NEW, temperature=1.0, seed=7)
    padded = generate(model, jnp.concatenate([tokens] * 2), jnp.concatenate([lengths] * 2), config, vocab=60)
    assert padded[:2].tolist() == warm


def test_a_chat_prompt_is_gemmas_template() -> None:
    tokenizer = ByteTokenizer()
    start, end = tokenizer.control("<start_of_turn>"), tokenizer.control("<end_of_turn>")
    prompt = encode_prompt(" hi <bos> ", tokenizer, chat=True).tolist()
    (said,) = tokenizer.encode([b"user\nhi <bos>"])
    (answer,) = tokenizer.encode([b"model\n"])
    assert prompt == [tokenizer.bos, start, *said.tolist(), end, 4 + ord("\n"), start, *answer.tolist()]
    assert encode_prompt("", tokenizer, chat=False).tolist() == [tokenizer.bos]


def test_a_text_ends_where_the_model_ended_it() -> None:
    config = TrainingConfig.from_dict({"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}})
    layout = make_layout(config.trainer.mesh.resolve(jax.device_count()))
    tokenizer = ByteTokenizer()
    sampler = Sampler(make_blueprint(config, layout, make_optimizer(config)), tokenizer, SamplesConfig(prompts=["a"], max_tokens=2))
    body = tokenizer.encode([b"yes"])[0].tolist()
    for end in (tokenizer.eos, 261):
        sample = sampler._read("a", np.array([*body, end, *body], np.int32))
        assert (sample.text, sample.tokens) == ("yes", 4)
    assert sampler._read("a", np.array(body, np.int32)).tokens == 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_writes_samples_before_and_after_alike_on_one_device_and_on_the_mesh_of_two_processes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(cache / "data"))
    wanted = {"prompts": PROMPTS, "max_tokens": 12, "temperature": 0.5, "seed": 3}
    run = write_config(tmp_path / "one", samples=wanted)
    TrainingJob(LaunchConfig.from_yaml(run / "config.yaml").training, run).run()
    rows = samples(run)
    assert [(row["when"], row["step"], row["prompt"]) for row in rows] == [
        *(("before", 0, prompt) for prompt in PROMPTS),
        *(("after", 8, prompt) for prompt in PROMPTS),
    ]
    assert all(row["text"] for row in rows)
    assert [row["text"] for row in rows[:3]] != [row["text"] for row in rows[3:]]
    other = write_config(tmp_path / "two", samples=wanted, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    with Gang(other, cache, processes=2) as gang:
        assert gang.wait(600) == [0, 0], gang.events
        told = [gang.named("samples", process) for process in range(2)]
    assert [row["text"] for row in samples(other)[:3]] == [row["text"] for row in rows[:3]]
    for events in told:
        assert [sample["text"] for event in events for sample in event["samples"]] == [row["text"] for row in samples(other)]
