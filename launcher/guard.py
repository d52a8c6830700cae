"""What every command runs in: an error is one line and an exit code. Imports little, since `tpu --help` waits for it."""

import logging
import traceback
from collections.abc import Callable

from rich.console import Console

from cluster.errors import PodlaunchError
from cluster.logs import set_up_logging
from cluster.state import logs_dir
from launcher.environment import read_dotenv
from launcher.follow import EXIT_INTERRUPTED

logger = logging.getLogger(__name__)


def guarded(command: Callable[[], int], component: str, *, verbose: bool = False) -> int:
    """Run a command; whatever goes wrong is one line on stderr, and the traceback is in the component's log."""
    read_dotenv()
    errors = Console(stderr=True)
    try:
        set_up_logging(component, terminal=logging.INFO if verbose else logging.WARNING)
        return command()
    except PodlaunchError as error:
        logger.info("refused: %s", error, exc_info=True)
        for line in str(error).splitlines():
            errors.print(f"error: {line}", highlight=False, soft_wrap=True, markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the outermost loop: an error that nobody foresaw
        logger.info("%s", traceback.format_exc())
        log = logs_dir() / f"{component}.log"
        errors.print(f"error: {type(error).__name__}: {error} (the traceback is in {log})", highlight=False, soft_wrap=True, markup=False)
        return 1
