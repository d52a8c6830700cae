"""`python -m cluster.emulator`: the emulated cloud in the foreground, until SIGTERM or Ctrl-C."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from cluster.emulator.daemon import serve
from cluster.emulator.profile import DEFAULT_PROFILE, PROFILES, with_overrides
from cluster.errors import PodlaunchError
from cluster.logs import set_up_logging
from cluster.state import emulator_dir, state_dir


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        set_up_logging("emulator")
        folder = options.state_dir.absolute() if options.state_dir is not None else emulator_dir()
        profile = with_overrides(PROFILES[options.profile], create=options.create_seconds, delete=options.delete_seconds)
        serve(folder, state_dir(), options.image_bundle, env=os.environ, stop=stop, profile=profile, profile_name=options.profile)
    except PodlaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.emulator", description="A Cloud TPU service on this machine.")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where it keeps its nodes and hosts")
    parser.add_argument("--image-bundle", default="", metavar="HASH", help="the bundle in the image of its hosts (none: a bare image)")
    parser.add_argument("--profile", choices=sorted(PROFILES), default=DEFAULT_PROFILE, help="how long everything takes")
    parser.add_argument("--create-seconds", type=float, metavar="S", help="how long a node takes until its hosts start")
    parser.add_argument("--delete-seconds", type=float, metavar="S", help="how long a node takes until its hosts end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
