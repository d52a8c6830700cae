"""model.weights=hf://... through the hub's own client, against a stand-in of the hub: what is read, with which token, and every refusal."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from launcher.config import TrainingConfig
from launcher.data.tokenizer import ByteTokenizer
from launcher.models.config import ModelConfig
from launcher.runs import RunDirectory, RunState
from launcher.training.export import export_model
from launcher.training.mesh import make_layout
from launcher.training.optimizer import make_optimizer
from launcher.training.state import make_blueprint
from launcher.weights.check import check_weights
from launcher.weights.folder import ModelFolder, WeightsError
from tests.integration.fake_hub import FakeHub
from tests.integration.training_gang import ROOT

NAME, TOKEN, OTHER = "google/gemma-3-tiny", "hf_of-somebody-who-agreed", "hf_of-somebody-else"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub has them."""
    config = TrainingConfig.from_dict({"model": {"variant": "gemma3-nano"}, "data": {"source": "python_stdlib"}})
    plan = make_blueprint(config, make_layout(config.check_devices(jax.device_count())), make_optimizer(config))
    return export_model(plan.init().params, config, ByteTokenizer(), tmp_path_factory.mktemp("hub") / "export", plan.layout)


@pytest.fixture
def hub(export: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Of a gated model."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub(export, NAME, accepted=frozenset({TOKEN}), known=frozenset({OTHER})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served


def test_the_hubs_client_reads_what_is_there_by_ranges_and_nothing_twice(
    hub: FakeHub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    here = ModelFolder(str(export))
    there = check_weights(ModelConfig("gemma3-nano", weights=f"hf://{NAME}"))
    assert there is not None
    assert (there.config, there.tensors, there.fingerprint) == (here.config, here.tensors, here.fingerprint)
    before = hub.bytes_sent
    for name, stored in here.tensors.items():
        np.testing.assert_array_equal(there.rows(stored, 0, stored.shape[0]), here.rows(stored, 0, stored.shape[0]), err_msg=name)
    size = (export / "model.safetensors").stat().st_size
    assert 0.9 * size < hub.bytes_sent - before < size
    assert there.bytes_read == hub.bytes_sent
    assert hub.tokens == {TOKEN}
    assert {asked.token for asked in hub.asked if asked.path.startswith("/cdn/")} == {None}


@pytest.mark.parametrize(
    ("token", "name", "line"),
    [
        (None, NAME, r"config.json cannot be read: 401 .*gated.*; gated and private models need HF_TOKEN in .env or the environment"),
        (OTHER, NAME, r"config.json cannot be read: 403 .*gated.*; accept the model's licence on the hub, or give another HF_TOKEN"),
        ("hf_wrong", NAME, r".*401 .*; accept the model's licence on the hub, or give another HF_TOKEN"),
        (None, "google/none", r"the hub shows no such model or revision; correct the name; gated and private models need HF_TOKEN in .*"),
        (TOKEN, "google/none", r"the hub shows no such model or revision; correct the name"),
        (TOKEN, f"{NAME}@v7", r"the hub shows no such model or revision; correct the name"),
    ],
)
def test_a_refusal_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str | None, name: str, line: str) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError) as caught:
        check_weights(ModelConfig("gemma3-nano", weights=f"hf://{name}"))
    assert re.fullmatch(f"model.weights hf://{name}: {line}", str(caught.value)), str(caught.value)
    assert hub.tokens == {token}


def test_a_file_that_is_missing_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(WeightsError, match=r"there is no none.json; give a folder with config.json"):
        ModelFolder(f"hf://{NAME}").read("none.json")


def test_a_hub_that_does_not_answer_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard service, which nobody runs
    with pytest.raises(WeightsError) as caught:
        check_weights(ModelConfig("gemma3-nano", weights=f"hf://{NAME}"))
    assert re.match(rf"model.weights hf://{NAME}: config.json cannot be read: \S+", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(300)
def test_a_run_begins_with_weights_of_the_hub_by_the_token_of_the_env_file(hub: FakeHub, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launcher.training",
        f"model.weights=hf://{NAME}",
        "run.name=tuned",
        "trainer=debug",
        "trainer.steps=1",
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PODLAUNCH_CACHE_DIR": str(tmp_path / "cache"),
        "PODLAUNCH_STATE_DIR": str(tmp_path / "state"),
        "NO_COLOR": "1",
    }

    def start() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False)

    refused = start()
    assert refused.returncode == 2
    assert "gated and private models need HF_TOKEN in .env or the environment" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    hub.asked.clear()
    done = start()
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.tokens == {TOKEN}
    run = RunDirectory(tmp_path / "runs" / "tuned")
    status = run.status()
    assert status is not None
    assert status.state is RunState.SUCCEEDED
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()], "a token stands nowhere but in .env"
