"""Where resources of ours may be: the projects that orphans, and clusters of other machines, are looked for in."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from cluster import bare, clusters, local
from cluster.clusters import Cluster
from cluster.config import EMULATED_PROJECT, PROJECT_VARIABLE
from cluster.errors import PodlaunchError
from cluster.leftovers import Leftover, delete_leftover, find_leftovers
from cluster.services import connect
from cluster.tpu.api import TpuApi
from cluster.tpu.orphans import Orphan, delete_orphan, find_orphans
from cluster.tpu.owner import owner_id

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Place:
    """A project, and where its services answer (None: Google's own)."""

    endpoint: str | None
    compute_endpoint: str | None
    secrets_endpoint: str | None
    effective_project: str
    billed: bool = True
    """What is overlooked there costs money."""


@dataclass(frozen=True)
class Orphans:
    """What a place holds that no cluster known here owns."""

    place: Place
    slices: list[Orphan]
    others: list[Leftover]

    def __len__(self) -> int:
        return len(self.slices) + len(self.others)

    def only_ours(self) -> "Orphans":
        return Orphans(self.place, [one for one in self.slices if one.ours], [one for one in self.others if one.ours])

    def without(self, cluster_names: set[str]) -> "Orphans":
        slices = [one for one in self.slices if one.cluster not in cluster_names]
        return Orphans(self.place, slices, [one for one in self.others if one.cluster not in cluster_names])

    def delete(self) -> None:
        """Heads first, since a living one makes slices again. Raises PodlaunchError."""
        for kind in ("head VM", "secret"):
            for leftover in self.others:
                if leftover.kind == kind:
                    delete_leftover(connect(self.place), leftover)
        api = TpuApi(self.place.endpoint, self.place.effective_project)
        for orphan in self.slices:
            delete_orphan(api, orphan)
        api.close()


def places() -> list[Place]:
    """The emulated cloud where it runs, the project of the environment, and those of every cluster that is known here."""
    configs = [cluster.config for cluster in clusters.list_clusters()] + [one.config for one in bare.list_bare()]
    found = [
        Place(config.endpoint, config.compute_endpoint, config.secrets_endpoint, config.effective_project)
        for config in configs
        if config.cloud != "emulated"
    ]
    emulated = local.emulator_status()
    if emulated is not None:
        found.append(Place(emulated.endpoint, emulated.rest, emulated.endpoint, EMULATED_PROJECT, billed=False))
    if project := os.environ.get(PROJECT_VARIABLE):
        found.append(Place(None, None, None, project))
    return list(dict.fromkeys(found))


def known_names() -> set[str]:
    return {cluster.name for cluster in clusters.list_unended()} | {one.config.name for one in bare.list_bare()}


def orphans_everywhere(problem: Callable[[str], None], *, thorough: bool = True) -> list[Orphans]:
    """All orphans; what keeps one place from being looked at is told to `problem`, and the others are looked at all the same.

    `thorough`: false for a look that is quick where nothing costs money.
    """
    found: list[Orphans] = []
    for place in places():
        slices: list[Orphan] = []
        others: list[Leftover] = []
        try:
            api = TpuApi(place.endpoint, place.effective_project, timeout=10.0, patience=_PATIENCE_S)
            try:
                slices = find_orphans(api, known_names(), owner_id())
            finally:
                api.close()
            others = find_leftovers(connect(place), known_names(), owner_id(), quick=not (thorough or place.billed))
        except PodlaunchError as error:
            problem(str(error))
        found.append(Orphans(place, slices, others))
    return found


def clusters_elsewhere(problem: Callable[[str], None], name: str | None = None) -> list[Cluster]:
    """Clusters that other machines made, by their head VMs; `name`: only that one."""
    found: list[Cluster] = []
    for place in places():
        try:
            found += [one for one in clusters.list_in_project(place) if one.name not in known_names() and name in (None, one.name)]
        except PodlaunchError as error:
            problem(str(error))
    return found
