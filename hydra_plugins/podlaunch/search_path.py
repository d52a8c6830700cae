"""Hydra's hook for the user's own options: `./conf` of the working directory joins the search path, behind ours.

Behind, so that a folder of that name which belongs to something else can never replace our config.yaml. Hydra imports this at every
start, so it stays small.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUPS = ("cluster", "model", "data", "trainer", "experiment", "local")
OURS = Path(__file__).resolve().parents[2] / "conf"


class UserConf(SearchPathPlugin):
    """Adds `./conf` when it holds at least one of our groups."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        conf = Path.cwd() / "conf"
        if conf.resolve() != OURS and any((conf / group).is_dir() for group in GROUPS):
            search_path.append("podlaunch-user", f"file://{conf}")
