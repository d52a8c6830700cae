"""Slices that no cluster owns any more: left by a crash, a lost state directory, or a machine that is gone."""

from collections.abc import Collection
from dataclasses import dataclass

from cluster.tpu.api import ALL_ZONES, TpuApi
from cluster.tpu.errors import NotFoundError
from cluster.tpu.lifecycle import Action
from cluster.tpu.slices import CREATOR_LABEL, OWNER_LABEL, ClusterSlice, merge


@dataclass(frozen=True)
class Orphan:
    """A slice of ours, by its labels, whose cluster is not known here."""

    item: ClusterSlice
    cluster: str
    """The cluster that it was made for."""
    ours: bool
    """Made from this state directory, so nobody else can own it; another machine's cluster may well live."""


def find_orphans(api: TpuApi, known: Collection[str], owner: str) -> list[Orphan]:
    """The slices in all zones of the project that belong to none of the clusters `known`. A zone that does not answer is left out, since
    an orphan that is not seen now is seen the next time. Raises TPUError.
    """
    queued = api.list_queued_resources(ALL_ZONES, needed=())
    return [
        Orphan(item, cluster, item.labels.get(CREATOR_LABEL) == owner)
        for item in merge(queued, api.list_nodes(ALL_ZONES, needed=()))
        if (cluster := item.labels.get(OWNER_LABEL)) is not None and cluster not in known
    ]


def delete_orphan(api: TpuApi, orphan: Orphan) -> bool:
    """Ask for its end. False: it is gone, or going already. Raises TPUError."""
    item = orphan.item
    if item.step.unwanted is not Action.DELETE:
        return False
    try:
        (api.delete_queued_resource if item.queued is not None else api.delete_node)(item.zone, item.name)
    except NotFoundError:
        return False
    return True
