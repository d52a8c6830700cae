"""The verbs of `tpu`, each imported when it is needed: `tpu --help` waits for none of them, another command for its own alone."""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

VERBS = {
    "start": ("start.start", "Bring a cluster up (default profile: local)."),
    "stop": ("stop.stop", "End a cluster: its runs, its slices, its head."),
    "status": ("status.status", "Show clusters, slices and hosts."),
    "ssh": ("ssh.ssh", "Open a shell on a host of a slice; ends with the shell's exit code."),
    "exec": ("exec.execute", "Run a command on all hosts of a slice at once; ends with 0, or the highest of their exit codes."),
    "dashboard": ("dashboard.dashboard", "Open the way to a cluster's dashboard and say how to log in."),
    "types": ("types.types", "List accelerator types with topology, hosts, memory, peak and list price."),
    "doctor": ("doctor.doctor", "Check this machine, and with a profile its project; changes nothing."),
    "train": ("train.app", "Training runs."),
    "emulator": ("emulator.app", "The emulated Cloud TPU service of this machine, and what befalls it."),
}
"""Where each one is (module and name), and what `tpu --help` says of it."""


class Verbs(TyperGroup):
    """The group of all of them (click's documentation: "Lazily Loading Subcommands")."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, said) for name, (_, said) in VERBS.items()])


class _Commands(MutableMapping[str, Any]):
    """Loads what is asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name, VERBS[name][0])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


def _load(name: str, place: str) -> Any:
    module, _, attribute = place.partition(".")
    found = getattr(importlib.import_module(f"launcher.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)
