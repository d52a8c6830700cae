"""The command `tpu`. One file per verb; verbs.py knows them."""

import importlib.metadata
import logging
import sys
from typing import Annotated

import typer

from launcher.cli.verbs import Verbs
from launcher.guard import guarded

app = typer.Typer(
    cls=Verbs,
    help="Slices of Cloud TPU, joined into Ray clusters, and the training runs on them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("podlaunch"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,  # noqa: ARG001
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say on stderr what is being done.")] = False,
) -> None:
    """Options of every command."""
    if verbose:
        for handler in logging.getLogger().handlers:
            handler.setLevel(logging.INFO)


def main() -> None:
    """Exits 0 when all went well, 1 for an error, 2 for wrong usage, 100 when a followed run failed, 130 after Ctrl-C."""
    sys.exit(guarded(_run, "tpu"))


def _run() -> int:
    try:
        result = app(standalone_mode=False)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.Abort:
        return 130
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own: wrong usage, with its own wording
            begin = "" if type(error).__name__ == "NoArgsIsHelpError" else "error: "
            typer.echo(f"{begin}{error.format_message()}", err=True)
            return int(error.exit_code)
        raise
    return result if isinstance(result, int) else 0
