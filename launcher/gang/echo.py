"""What a training process writes, once more among the logs that Ray's dashboard shows."""

import codecs
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

ECHO_S = 1.0
"""How often what a training process wrote is shown in Ray's dashboard."""


def echo(wait: Callable[[float], bool], log: Path, begin: int, output: TextIO) -> None:
    """What a training process writes, once more among the logs that Ray's dashboard shows of this actor. `wait`: whether the process has
    ended within so many seconds. `begin`: the length of `log` before it began.
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    ended = False
    while not ended:
        ended = wait(ECHO_S)
        try:
            with log.open("rb") as file:
                file.seek(begin)
                new = file.read()
            output.write(decode(new))
            output.flush()
        except FileNotFoundError:
            continue  # a spare makes it when it has its orders
        except OSError as error:  # such as a full disk: the log itself is what counts
            logger.warning("the log is not repeated here: %s", error)
            return
        begin += len(new)
