"""Where slices of ours may be: the projects that orphans are looked for in."""

import os
from collections.abc import Callable

from cluster import bare, clusters, local
from cluster.config import EMULATED_PROJECT, PROJECT_VARIABLE
from cluster.errors import PodlaunchError
from cluster.tpu.api import TpuApi
from cluster.tpu.orphans import Orphan, find_orphans
from cluster.tpu.owner import owner_id

Place = tuple[str | None, str]
"""Endpoint (None: Google's own) and project."""
_PATIENCE_S = 5.0


def places() -> list[Place]:
    """The emulated cloud where it runs, the project of the environment, and those of every cluster that is known here."""
    configs = [cluster.config for cluster in clusters.list_clusters()] + [one.config for one in bare.list_bare()]
    found: list[Place] = [(config.endpoint, config.effective_project) for config in configs if config.cloud != "emulated"]
    emulated = local.emulator_status()
    if emulated is not None:
        found.append((emulated.endpoint, EMULATED_PROJECT))
    if project := os.environ.get(PROJECT_VARIABLE):
        found.append((None, project))
    return list(dict.fromkeys(found))


def known_names() -> set[str]:
    return {cluster.name for cluster in clusters.list_clusters()} | {one.config.name for one in bare.list_bare()}


def orphans_everywhere(problem: Callable[[str], None]) -> list[tuple[Place, Orphan]]:
    """All orphans; what keeps one place from being looked at is told to `problem`, and the others are looked at all the same."""
    found: list[tuple[Place, Orphan]] = []
    for endpoint, project in places():
        try:
            api = TpuApi(endpoint, project, timeout=10.0, patience=_PATIENCE_S)
            try:
                found += [((endpoint, project), orphan) for orphan in find_orphans(api, known_names(), owner_id())]
            finally:
                api.close()
        except PodlaunchError as error:
            problem(str(error))
    return found
