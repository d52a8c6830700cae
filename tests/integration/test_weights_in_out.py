"""Published weights into a run and out of it: bit by bit, on any number of hosts, with a bounded share of a host's memory."""

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from cluster.errors import ConfigError
from launcher.config import TrainingConfig
from launcher.data.config import DataConfig
from launcher.data.tokenizer import BOS, ByteTokenizer
from launcher.models.families import gemma
from launcher.models.registry import VARIANTS
from launcher.training import export as export_module
from launcher.training.export import export_model
from launcher.training.job import TrainingJob
from launcher.training.loading import load_params
from launcher.training.mesh import make_layout
from launcher.training.optimizer import make_optimizer
from launcher.training.state import Blueprint, make_blueprint
from launcher.weights import folder as folder_module
from launcher.weights.check import check_weights
from launcher.weights.folder import ModelFolder
from launcher.weights.tokenizer import tokenizer_of
from tests.integration.fake_gcs import BUCKET, FakeGcs
from tests.integration.test_training_job import Recorder
from tests.integration.training_gang import Gang, write_config

REFERENCES = Path(__file__).resolve().parents[1] / "references" / "gemma"


@pytest.fixture(params=["gemma", "gemma2", "gemma3-long"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = REFERENCES / str(request.param)
    shape = gemma.hf_shape(json.loads((folder / "config.json").read_text()))
    monkeypatch.setitem(VARIANTS, "reference", dataclasses.replace(VARIANTS["gemma3-nano"], **shape))
    return folder


def blueprint(weights: Path | str, dtype: str = "float32", variant: str = "reference") -> Blueprint:
    values = {
        "model": {"variant": variant, "weights": str(weights)},
        "data": {"source": "python_stdlib"},
        "trainer": {"compute_dtype": dtype},
    }
    config = TrainingConfig.from_dict(values)
    return make_blueprint(config, make_layout(config.check_devices(jax.device_count())), make_optimizer(config))


def load(plan: Blueprint) -> Any:
    folder = check_weights(plan.config.model)
    assert folder is not None
    return load_params(folder, plan.config.model, plan.layout, plan.abstract.params)


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


def same_bits(ours: dict[str, np.ndarray[Any, Any]], theirs: dict[str, np.ndarray[Any, Any]]) -> None:
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        assert (values.dtype, values.shape) == (theirs[name].dtype, theirs[name].shape)
        assert values.tobytes() == theirs[name].tobytes(), name


def test_in_and_out_again_is_the_same_bit_by_bit(source: Path, tmp_path: Path) -> None:
    plan = blueprint(source)
    out = export_model(load(plan), plan.config, ByteTokenizer(), tmp_path / "out", plan.layout, ModelFolder(str(source)).config)
    same_bits(tensors(out), tensors(source))
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert gemma.hf_shape(written) == gemma.hf_shape(read)
    assert [written[name] for name in export_module._KEPT] == [read[name] for name in export_module._KEPT]


@pytest.mark.parametrize("source", ["gemma3-long"], indirect=True)
def test_bfloat16_weights_stay_what_they_are_in_many_files(source: Path, tmp_path: Path) -> None:
    plan = blueprint(source, "bfloat16")
    first = export_model(load(plan), plan.config, ByteTokenizer(), tmp_path / "first", plan.layout, file_bytes=12_000)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert all((first / name).stat().st_size < 20_000 for name in files)
    plan = blueprint(first, "bfloat16")
    second = export_model(load(plan), plan.config, ByteTokenizer(), tmp_path / "second", plan.layout)
    assert [path.name for path in second.glob("*.safetensors")] == ["model.safetensors"]
    same_bits(tensors(second), tensors(first))


def test_a_host_holds_one_tensor_and_a_few_requests_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured as what Python and numpy have allocated: JAX's own buffers, the model itself, are not among that."""
    wide = dataclasses.replace(VARIANTS["gemma3-nano"], layers=6, d_model=256, d_ff=2048, vocab=4096)
    monkeypatch.setitem(VARIANTS, "wide", wide)
    monkeypatch.setattr(folder_module, "CHUNK_BYTES", 1 << 18)
    plan = blueprint(tmp_path / "nowhere", variant="wide")
    source = export_model(plan.init().params, plan.config, ByteTokenizer(), tmp_path / "wide", plan.layout)
    plan = blueprint(source, variant="wide")
    folder = check_weights(plan.config.model)
    assert folder is not None
    tracemalloc.start()
    try:
        load_params(folder, plan.config.model, plan.layout, plan.abstract.params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = wide.vocab * wide.d_model * 4
    requests = folder_module.THREADS * folder_module.CHUNK_BYTES * 2
    compiling = 2 << 20
    print(f"peak {peak / 2**20:.1f} MiB, model {wide.parameters * 4 / 2**20:.1f} MiB, largest tensor {largest / 2**20:.1f} MiB")
    assert peak < largest + requests + compiling < wide.parameters * 4 / 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def configured(run: Path, weights: str, **trainer: Any) -> Path:
    write_config(run, **trainer)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["weights"] = weights
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[tuple[Path, float]]:
    """What a short run exported, and its held-out loss then."""
    run = write_config(tmp_path_factory.mktemp("base"), steps=6, log_every=2)
    with Gang(run, cache, processes=1) as gang:
        assert gang.wait() == [0], gang.events
        yield run / "export", gang.named("evaluation")[1]["loss"]


@pytest.mark.timeout(400)
def test_a_run_goes_on_from_what_another_exported_on_two_hosts_that_read_half_each(
    base: tuple[Path, float], cache: Path, tmp_path: Path
) -> None:
    export, loss = base
    run = configured(tmp_path / "run", str(export), steps=2, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    with Gang(run, cache, processes=2) as gang:
        assert gang.wait() == [0, 0], gang.events
        assert gang.named("evaluation")[0]["loss"] == pytest.approx(loss, rel=1e-5)
        read = [gang.named("weights_loaded", process)[0]["bytes"] for process in (0, 1)]
    size = (export / "model.safetensors").stat().st_size
    assert sum(read) == pytest.approx(size, rel=0.02)
    assert max(read) < 0.52 * size
    assert sorted(path.name for path in (run / "export").iterdir()) == sorted(path.name for path in export.iterdir())


def test_a_run_whose_weights_are_of_another_variant_is_refused_before_it_begins(base: tuple[Path, float], tmp_path: Path) -> None:
    run = configured(tmp_path / "run", str(base[0]))
    values = yaml.safe_load((run / "config.yaml").read_text())
    values.pop("cluster")
    values["model"]["variant"] = "gemma3-270m"
    recorder = Recorder()
    with pytest.raises(folder_module.WeightsError, match=r"its config.json says layers 6 where gemma3-270m has 18; d_model 192 where"):
        TrainingJob(TrainingConfig.from_dict(values), run, recorder).run()
    assert [event["phase"] for event in recorder.named("phase")] == ["data"]


def test_a_resume_with_other_weights_at_the_same_path_is_refused(base: tuple[Path, float], tmp_path: Path) -> None:
    folder = shutil.copytree(base[0], tmp_path / "weights")
    run = configured(tmp_path / "run", str(folder), steps=1)

    values = yaml.safe_load((run / "config.yaml").read_text())
    values.pop("cluster")
    TrainingJob(TrainingConfig.from_dict(values), run).run()
    others = {name: weight * np.float32(1.01) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(others, folder / "model.safetensors")
    changed = r"checkpoint 1 was .* the content of model.weights \(digest \w{8} to \w{8}\);.*run.allow=\[model\]"
    with pytest.raises(ConfigError, match=changed):
        TrainingJob(TrainingConfig.from_dict(values), run, attempt=1).run()


@pytest.mark.parametrize("source", ["gemma2"], indirect=True)
def test_a_folder_on_gs_is_read_like_one_here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeGcs(tmp_path)
    try:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        there = ModelFolder(f"gs://{BUCKET}/models/x", service.address)
        import gcsfs  # only now: where it is asked for its client of zonal buckets, it asks a control API that is not there

        client = gcsfs.GCSFileSystem(token="anon", endpoint_url=service.address)
        for file in ("config.json", "model.safetensors"):
            client.pipe_file(f"{BUCKET}/models/x/{file}", (source / file).read_bytes())
        here = ModelFolder(str(source))
        assert there.tensors == here.tensors
        assert there.fingerprint == here.fingerprint
        monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
        with pytest.raises(ConfigError, match=r"the folder holds neither tokenizer.json nor tokenizer.model"):
            tokenizer_of(DataConfig("python_stdlib"), there)
        ByteTokenizer().save(tmp_path)
        client.pipe_file(f"{BUCKET}/models/x/tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
        assert tokenizer_of(DataConfig("python_stdlib"), there).decode(np.array([BOS, 69, 70])) == "AB"
        for name, stored in here.tensors.items():
            np.testing.assert_array_equal(there.rows(stored, 0, stored.shape[0]), here.rows(stored, 0, stored.shape[0]), err_msg=name)
    finally:
        service.stop()
