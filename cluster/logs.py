"""Logging: one set-up for the command line, the agents and the supervisor.

Everything goes to a rotating file per component under the state directory; the terminal hears warnings only, and more with -v.
"""

import logging
import logging.handlers
import sys

from cluster.state import logs_dir

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s[%(process)d]: %(message)s"

_NOT_FOR_THE_TERMINAL = ("google.auth", "py.warnings")
"""What google-auth tries on its way to credentials, and warnings for programmers: a user can do nothing with either."""


def set_up_logging(component: str, *, terminal: int | None = logging.WARNING, only: str | None = None) -> None:
    """Send the process's log to `<state>/logs/<component>.log`, and from level `terminal` on to stderr (None: never).

    Calling it again replaces what an earlier call set up. `only` names the logger to record, for code that runs inside somebody
    else's process; None records all of this one.
    """
    root = logging.getLogger(only)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    file = logging.handlers.RotatingFileHandler(logs_dir() / f"{component}.log", maxBytes=5_000_000, backupCount=3, encoding="utf-8")
    file.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S"))
    root.addHandler(file)
    if terminal is not None:
        stream = logging.StreamHandler(sys.stderr)
        stream.setLevel(terminal)
        stream.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        stream.addFilter(lambda record: not record.name.startswith(_NOT_FOR_THE_TERMINAL))
        root.addHandler(stream)
    logging.captureWarnings(only is None)
