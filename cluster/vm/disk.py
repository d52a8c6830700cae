"""Where a VM keeps what is ours."""

import os
from pathlib import Path


def home() -> Path:
    """The folder that the image or the startup script filled; $PODLAUNCH_HOME moves it."""
    return Path(os.environ.get("PODLAUNCH_HOME", "/opt/podlaunch"))
