"""From conf/ and the command line to one validated LaunchConfig; every mistake becomes one line that says what to do."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.schema import did_you_mean, flatten
from cluster.yaml_files import read_settings
from launcher.config import LaunchConfig, meaningless_for_script
from launcher.mesh import AUTO, AXES

CONFIG_NAME = "config"
ENTRYPOINT = "job.entrypoint"
_MESH_WORD = re.compile(rf"trainer\.mesh=(['\"]?){AUTO}\1")
_BARE = re.compile(rf"{re.escape(ENTRYPOINT)}=(?!null$)[^'\"]")
_NO_OPTION = re.compile(r"null|true|false|[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)
_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def config_dir() -> Path:
    """Our conf/: beside the packages, in a checkout as in site-packages. Never found through sys.path, where a user's may stand first."""
    return Path(__file__).resolve().parent.parent / "conf"


def register_schema() -> None:
    """Give Hydra the types; what the user names freely (labels, types of slices) is open, and `load` checks it. And the name of a sweep."""
    schema = thawed_schema()
    _open(schema)
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)


def thawed_schema() -> DictConfig:
    """The types; of frozen dataclasses they would make the composed config read-only for Hydra's own overrides."""
    schema: DictConfig = OmegaConf.structured(LaunchConfig)
    _thaw(schema)
    return schema


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """The composed config, not yet resolved. Raises ConfigError, one line, for whatever is wrong with the overrides."""
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(CONFIG_NAME, overrides=spell_out(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def sweep_name(name: str | None, overrides: Iterable[str]) -> str:
    """One word for the sweep of a command line, the same for the same overrides. `name`: run.name."""
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return f"{name or 'sweep'}-{digest}"


def spell_out(overrides: Sequence[str]) -> list[str]:
    """With trainer.mesh=auto as the settings that it stands for, and the value of job.entrypoint quoted for Hydra: it may hold '=' and ',',
    and the shell has taken the user's own quotes.
    """
    for given in overrides:
        _check_option(given)
    return [
        override
        for given in overrides
        for override in ([f"trainer.mesh.{axis}=null" for axis in AXES] if _MESH_WORD.fullmatch(given) else _quoted(given))
    ]


def _check_option(override: str) -> None:
    """Raises ConfigError where one of a group's options has to be named and null or a number is given, at which Hydra stumbles."""
    group, _, value = override.lstrip("+").partition("=")
    wrong = [one for one in re.split(r"[\[\],]", value) if _NO_OPTION.fullmatch(one.strip())]
    if wrong and group and (config_dir() / group).is_dir():
        known = ", ".join(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))
        raise ConfigError(f"{group}={wrong[0]}: there is no such option; known: {known}. Leave {group} out for the default")


def _quoted(override: str) -> list[str]:
    return [f"{ENTRYPOINT}={_quote(override[len(ENTRYPOINT) + 1 :])}" if _BARE.match(override) else override]


def load(config: DictConfig) -> LaunchConfig:
    """The one load function: resolved, checked for unknown keys (`+` hides them from Hydra), turned into frozen objects."""
    try:
        # A copy without the schema's types, else a missing mandatory value could not be told from a wrong one.
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    plain.pop("local", None)
    plain.pop("experiment", None)
    schema = thawed_schema()
    if plain["job"]["kind"] == "script":
        _drop_training(plain, schema)
    for group in ("model", "data"):
        if plain.get(group) == OmegaConf.to_container(schema[group]):
            plain.pop(group)
    return LaunchConfig.from_dict(_without_missing({str(key): value for key, value in plain.items()}))


def _drop_training(plain: dict[Any, Any], schema: DictConfig) -> None:
    """Take out what means nothing to a program of the user's: nothing was set, or conf/local set it for the trainings of this machine.

    Raises ConfigError when more was set.
    """
    own = _own_settings()
    for group in ("model", "data", "trainer"):
        unset = OmegaConf.unsafe_merge(schema[group].copy(), own.get(group) or {})
        if group in plain and plain.pop(group) != OmegaConf.to_container(unset):
            raise meaningless_for_script(group)


def _own_settings() -> Mapping[Any, Any]:
    """conf/local/default.yaml, which Hydra has composed already."""
    places = (folder / "local" / "default.yaml" for folder in (config_dir(), Path.cwd() / "conf"))
    return next((cast(Mapping[Any, Any], OmegaConf.load(place)) for place in places if place.exists()), {})


def compose_file(path: Path, overrides: Sequence[str]) -> LaunchConfig:
    """A YAML file over the defaults of conf/, and overrides over both. Group names may be given as text: `model: gemma`.

    Raises ConfigError for a missing or broken file, an unknown key, a wrong value.
    """
    values = read_settings(path)
    groups = [f"{key}={value}" for key, value in values.items() if isinstance(value, str)]
    if isinstance(job := values.get("job"), Mapping) and isinstance(job.get("kind"), str):  # it decides which groups there are
        groups.append(f"job={job['kind']}")
    settings = [f"{key}={_quote(value)}" for key, value in flatten({k: v for k, v in values.items() if not isinstance(v, str)}, "")]
    return load(compose_config([*groups, *settings, *overrides]))


def compose_profile(words: Sequence[str]) -> ClusterConfig:
    """A profile of conf/cluster and settings of it, as `tpu start v5e slices=2` is given them."""
    profile = [f"cluster={word}" for word in words if "=" not in word]
    return compose_cluster([*profile, *(f"cluster.{word.removeprefix('cluster.')}" for word in words if "=" in word)])


def compose_cluster(overrides: Sequence[str]) -> ClusterConfig:
    """The `cluster` part alone, for commands that start no run."""
    plain = OmegaConf.to_container(compose_config(overrides).cluster, resolve=True)
    assert isinstance(plain, dict)
    return ClusterConfig.from_dict({str(key): value for key, value in plain.items()})


def explain(error: Exception) -> str:
    """One line for an error of Hydra's or OmegaConf's."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}: write key=value, and quote values that hold '=', ',' or spaces: 'key=\"a=b\"'"
    if isinstance(error, MissingConfigException):
        return _explain_missing_option(error, text)
    if found := re.search(r"Could not override '([^']*)'", text):
        return _explain_unknown_key(found.group(1), error.__cause__)
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, OmegaConfBaseException):
        return explain(error.__cause__)
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        wrong_type = re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", text)
        if wrong_type:
            value, kind = wrong_type.groups()
            return f"{error.full_key}: expected {_KINDS.get(kind, kind)}, got {value!r}"
        if wrong_bool := re.match(r"Value '(.*)' is not a valid bool", text):
            return f"{error.full_key}: expected true or false, got {wrong_bool.group(1)!r}"
        return f"{error.full_key}: {_explain_value(text.splitlines()[0])}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _explain_value(text: str) -> str:
    """In a user's words, what OmegaConf says of a value in those of a programmer."""
    if "is not Optional" in text:
        return "null is no value here; leave it out for the default"
    if "is not a ListConfig, list or tuple" in text:
        return "expected a list, such as [a,b]"
    if "is not a subclass of" in text:
        return "holds settings of its own and is no value itself; give one of those"
    return text.partition("raised while resolving interpolation: ")[2].strip('"') or text


def _explain_missing_option(error: MissingConfigException, text: str) -> str:
    found = re.search(r"Could not find '([^']*)/([^'/]*)'", text)
    if not found or not error.options:
        return " ".join(text.split())
    group, option = found.groups()
    return f"{group}={option}: there is no such option{did_you_mean(option, error.options)}"


def _explain_unknown_key(key: str, cause: BaseException | None) -> str:
    unknown = getattr(cause, "full_key", None) or key
    return f"unknown setting {unknown!r}{_nearest(unknown, known_keys())}"


def _nearest(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    by_leaf = [name for name in names if difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1]).ratio() > 0.75]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7) or by_leaf[:1]
    return f"; did you mean {near[0]!r}?" if near else f"; the groups are {', '.join(n for n in names if '.' not in n)}"


def known_keys() -> list[str]:
    """Every dotted key that may be set."""
    return [*_dotted(thawed_schema(), ""), "experiment"]


def _dotted(node: Any, prefix: str) -> Iterable[str]:
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{prefix}{key}.")


def _quote(value: Any) -> str:
    """A value as Hydra's override grammar writes it."""
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_quote(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quote(item)}" for key, item in value.items()) + "}"
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _thaw(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            if child._is_missing() or child._is_none():  # without a default: its type is known, its values come from conf/
                node[key] = OmegaConf.structured(child._metadata.ref_type)
                child = cast(DictConfig, node._get_node(key))
            if not child._is_none() and OmegaConf.get_type(child) is not dict:
                _thaw(child)


def _open(node: DictConfig) -> None:
    """Let mappings of names of the user's own take new keys, without a type: OmegaConf would make frozen dataclasses of their values."""
    for key in node:
        child = node._get_node(key)
        if not isinstance(child, DictConfig) or child._is_none():
            continue
        if OmegaConf.get_type(child) is dict:
            child._metadata.element_type = Any
            OmegaConf.set_struct(child, False)
        else:
            _open(child)


def _without_missing(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _without_missing(value) if isinstance(value, Mapping) else value for key, value in values.items() if value != "???"}
