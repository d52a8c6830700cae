"""What the documents name exists: every command, option, profile and setting."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

from cluster.errors import ConfigError
from launcher.cli.main import app
from launcher.compose import compose_cluster, compose_config, config_dir, known_keys
from launcher.config import RunConfig
from launcher.gang.gauges import MEASUREMENTS
from launcher.reference import descriptions, render

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every line of a bash block that starts with `program`, and of code in the text that does so with a verb."""
    lines = [line.strip() for block in _FENCE.findall(text) for line in block.splitlines()]
    lines += [code for code in _CODE.findall(_FENCE.sub("", text)) if " " in code]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.split(" ")[0] == program]


def check_tpu(words: list[str]) -> None:
    """Raises AssertionError for a verb or an option that does not exist, ConfigError for a wrong setting."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0].endswith(".yaml") and command.name == "train":  # means `run`
            words = ["run", *words]
        assert words[0] in command.commands, f"there is no `tpu ... {words[0]}`"
        command, words = command.commands[words[0]], words[1:]
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts) if name.startswith("-")}
    settings, takes_value = [], False
    for word in words[: words.index("--")] if "--" in words else words:  # what follows is a command for somebody else
        if takes_value:
            takes_value = False
        elif word.startswith("-") and word != "--help":
            assert word in options, f"`tpu {command.name}` has no option {word}"
            takes_value = not options[word].is_flag
        elif word != "--help":
            settings.append(word)
    if command.name == "start" and any(parameter.name == "overrides" for parameter in command.params):
        compose_cluster([f"cluster.{word}" if "=" in word else f"cluster={word}" for word in settings if not word.endswith("HOST:PORT")])


def points(settings: list[str]) -> list[list[str]]:
    """Those of a sweep: every combination; of an interval, where a search chooses, its beginning."""
    choices = []
    for override in OverridesParser.create().parse_overrides(settings):
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            choices.append([f"{key}={value.start}"])
        elif override.is_sweep_override():
            choices.append([f"{key}={one}" for one in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return [list(point) for point in itertools.product(*choices)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_exists(document: Path) -> None:
    text = document.read_text()
    found = commands(text, "tpu")
    assert found, "the documents show commands"
    for words in found:
        check_tpu(words)
    for words in commands(text, "podlaunch"):
        for settings in points([word for word in words if not word.startswith("-")]) if "-m" in words else [words]:
            compose_config([word for word in settings if not word.startswith("-")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_that_a_document_names_exists(document: Path) -> None:
    keys, groups = set(known_keys()), {path.name for path in config_dir().iterdir() if path.is_dir()}
    for code in _CODE.findall(_FENCE.sub("", document.read_text())):
        if re.fullmatch(r"(cluster|run|trainer|data|model)(\.\w+)+(=\S+)?", code):
            assert code.partition("=")[0] in keys, code
        elif found := re.fullmatch(r"(\w+)=(\w+)", code):
            assert found[1] not in groups or (config_dir() / found[1] / f"{found[2]}.yaml").exists(), code


def test_every_line_that_troubleshooting_explains_is_one_that_we_say() -> None:
    rooms = [path.read_text() for room in ("launcher", "cluster") for path in sorted((ROOT / room).rglob("*.py"))]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(rooms))  # strings that go on in the next line
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = [
        line for table in text.split("| the line says |")[1:] for line in re.findall(r"^\| `([^`]+)` \|", table.partition("\n\n")[0], re.M)
    ]
    assert len(lines) > 20
    unknown = [line for line in lines if not all(piece.strip(" ;,:") in said for piece in line.split("..."))]
    assert not unknown


@pytest.mark.parametrize("words", [["statsu"], ["start", "--bear"], ["emulator", "faults"], ["start", "v9"], ["start", "v5e", "zone=a"]])
def test_the_check_itself_finds_what_does_not_exist(words: list[str]) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check_tpu(words)


def test_the_configuration_reference_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == render(), (
        "make it anew: python -m launcher.reference > docs/configuration.md"
    )
    assert set(descriptions(RunConfig)) >= {"root", "spares", "max_usd"}


def test_every_measurement_is_in_the_document_on_monitoring() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    for one in MEASUREMENTS:
        assert re.search(rf"^\| `{one.name}`.*\| {re.escape(one.about)} \|$", text, re.MULTILINE), one.name
