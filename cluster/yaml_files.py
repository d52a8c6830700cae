"""Settings in YAML: what a file holds, or one line that says what is wrong with it."""

from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; PyYAML takes the last, and Hydra refuses it in its own files."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where values are made of nodes: a merge (`<<`) has put its keys into some of them by then.
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} stands there twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
        return node


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ConfigError when it is missing, unreadable or no YAML, or has a key twice."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return _parse(content, str(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError also when it holds something else."""
    return _mapping(read_yaml(path), str(path))


def parse_settings(content: bytes, place: str) -> dict[str, Any]:
    """The mapping that YAML text holds. Raises ConfigError also when it holds something else."""
    return _mapping(_parse(content, place), place)


def _parse(content: bytes, place: str) -> Any:
    try:
        return yaml.load(content.decode(), _OnceLoader)  # a safe one
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not valid YAML: {' '.join(str(error).split())}") from error


def _mapping(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        found = {list: "a list", str: "a text", type(None): "nothing"}.get(type(values), type(values).__name__)
        raise ConfigError(f"{place}: expected a mapping of settings such as `trainer: {{steps: 100}}`, found {found}")
    return values
