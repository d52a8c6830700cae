"""Settings in YAML: what a file holds, or one line that says what is wrong with it."""

from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; PyYAML takes the last, and Hydra refuses it in its own files."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                raise yaml.YAMLError(f"{key_node.value} stands there twice, in lines {lines[key_node.value]} and {line}; keep one")
            lines[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ConfigError when it is missing, unreadable or no YAML, or has a key twice."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, place: str) -> Any:
    """What YAML text holds; `place` is where it comes from. Raises ConfigError when it is none, or has a key twice."""
    try:
        return yaml.load(content.decode(), _OnceLoader)  # a safe one
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} is not valid YAML: {' '.join(str(error).split())}") from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError also when it holds something else."""
    return _mapping(read_yaml(path), str(path))


def parse_settings(content: bytes, place: str) -> dict[str, Any]:
    """The mapping that YAML text holds. Raises ConfigError also when it holds something else."""
    return _mapping(parse_yaml(content, place), place)


def _mapping(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        found = {list: "a list", str: "a text", type(None): "nothing"}.get(type(values), type(values).__name__)
        raise ConfigError(f"{place}: expected a mapping of settings such as `trainer: {{steps: 100}}`, found {found}")
    return values
