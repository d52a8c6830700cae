"""The environment variables that a user may set, in the shell or in .env. `.env.example` explains each; a test keeps the two equal."""

import os
from collections.abc import Iterable
from pathlib import Path

from dotenv import load_dotenv

from launcher.process_variables import EVENT_FD, HURRY, ORDERS_FD, PARENT_PID, REQUEST_FD, STOP_FD

USER_VARIABLES = frozenset(
    {
        "GOOGLE_CLOUD_PROJECT",  # cluster.project where the config names none
        "GOOGLE_APPLICATION_CREDENTIALS",  # read by Google's own client
        "PODLAUNCH_ZONES",  # cluster.zones where the config names none
        "PODLAUNCH_BUCKET",  # run.root of clusters on Google Cloud where the config names none
        "PODLAUNCH_STATE_DIR",
        "PODLAUNCH_CACHE_DIR",
        "HF_TOKEN",  # passed to training processes through run.secrets
        "WANDB_API_KEY",  # the same
    }
)
INTERNAL_VARIABLES = frozenset(
    {
        # Set by our own processes for those that they start; never by a user.
        "PODLAUNCH_OWNER",
        "PODLAUNCH_HOME",
        "PODLAUNCH_HOST_DIR",
        "PODLAUNCH_DEVICES",
        "PODLAUNCH_HOST_SETTINGS",
        "PODLAUNCH_PYTHON",
        "PODLAUNCH_HEAD",
        "PODLAUNCH_CLUSTER",
        "PODLAUNCH_DASHBOARD",
        "PODLAUNCH_COORDINATOR",
        "PODLAUNCH_NUM_PROCESSES",
        "PODLAUNCH_PROCESS_ID",
        EVENT_FD,
        STOP_FD,
        REQUEST_FD,
        HURRY,
        ORDERS_FD,
        "PODLAUNCH_RUN_DIR",
        "PODLAUNCH_ATTEMPT",
        "PODLAUNCH_CHECKPOINT_DIR",
        PARENT_PID,
        "PODLAUNCH_USER_CODE",
        "PODLAUNCH_COMPILATION_CACHE",
        "PODLAUNCH_PEAK_FLOPS",
    }
)


def read_dotenv(folder: Path | None = None) -> None:
    """Take `.env` of `folder` (default: the working directory) into the environment; what the shell has set stays."""
    load_dotenv((folder or Path.cwd()) / ".env")


def present(names: Iterable[str]) -> dict[str, str]:
    """Those of the named variables that are set."""
    return {name: os.environ[name] for name in names if os.environ.get(name)}
