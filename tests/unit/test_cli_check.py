"""`tpu train check` around the compiler: what it is asked, what is printed, and what ends it."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import launcher.check
from cluster.errors import ConfigError
from launcher.cli.main import app
from launcher.training.compile_check import Compilation, _refused

SETTINGS = ["cluster=v6e", "cluster.accelerator_type=v6e-16", "model.variant=gemma3-4b", "experiment=bf16"]


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.check, "LIBTPU", "a_module_that_is_not_there")
    with pytest.raises(ConfigError, match=r"needs the TPU compiler.*pip install") as caught:
        CliRunner().invoke(app, ["train", "check", *SETTINGS], catch_exceptions=False)
    assert "\n" not in str(caught.value)


def test_a_script_has_no_step_to_compile() -> None:
    with pytest.raises(ConfigError, match="job=script runs your own program"):
        CliRunner().invoke(app, ["train", "check", "job=script", "job.entrypoint=x.py"], catch_exceptions=False)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the compiler's place a program that answers with what is in the returned file, and keeps what it was asked."""
    answer = tmp_path / "answer.json"
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport os, pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(sys.stdin.read())\n"
        f"pathlib.Path({str(tmp_path / 'platform')!r}).write_text(os.environ['JAX_PLATFORMS'])\n"
        f"print(pathlib.Path({str(answer)!r}).read_text())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PODLAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher.check, "LIBTPU", "json")
    monkeypatch.setattr(sys, "executable", str(program))
    return answer


def test_json_is_nothing_but_json_and_a_good_step_ends_with_0(compiler: Path) -> None:
    compiler.write_text(
        json.dumps({"compiles": True, "seconds": 2.0, "fits": True, "total_bytes": 7 * 2**30, "collectives": {"all-gather": 3}})
    )
    result = CliRunner().invoke(app, ["train", "check", *SETTINGS, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["good"] is True
    assert found["compiler"]["total_bytes"] == 7 * 2**30
    assert found["compiler"]["collectives"] == {"all-gather": 3}
    assert sum(size for kind, size in found["estimated"]["bytes"].items() if kind != "total") == found["estimated"]["bytes"]["total"]
    asked = json.loads((compiler.parent / "asked").read_text())
    assert (asked["topology"], asked["slices"]) == ("v6e:4x4", 1)
    mesh = asked["config"]["trainer"]["mesh"]
    assert {axis: mesh[axis] for axis in ("data", "fsdp", "sequence", "tensor")} | {"slice": mesh["slices"]} == found["mesh"]
    assert (compiler.parent / "platform").read_text() == "cpu"


def test_what_does_not_fit_ends_with_1_and_says_by_how_much(compiler: Path) -> None:
    refused = _refused(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 31.25G hbm. Exceeded"), 3.0)
    assert (refused.fits, refused.needed_bytes) == (False, 40.5 * 2**30)
    compiler.write_text(json.dumps(vars(refused)))
    result = CliRunner().invoke(app, ["train", "check", *SETTINGS], catch_exceptions=False)
    assert result.exit_code == 1
    assert "no, 40.50 GiB of 31.25 GiB a chip" in result.stdout


def test_what_does_not_compile_ends_with_1_and_the_compilers_words(compiler: Path) -> None:
    compiler.write_text(json.dumps(vars(_refused(ValueError("INTERNAL: Mosaic failed to compile"), 3.0))))
    result = CliRunner().invoke(app, ["train", "check", *SETTINGS], catch_exceptions=False)
    assert result.exit_code == 1
    assert "Mosaic failed to compile" in result.stdout


def test_several_slices_are_compiled_as_such(compiler: Path) -> None:
    compiler.write_text(json.dumps(vars(Compilation(True, 1.0, fits=True, total_bytes=2**30, fused_attention=True))))
    result = CliRunner().invoke(app, ["train", "check", *SETTINGS, "cluster.slices=2", "cluster.max_slices=2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "the fused kernel" in result.stdout
    assert json.loads((compiler.parent / "asked").read_text())["slices"] == 2
