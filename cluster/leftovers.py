"""What no cluster owns any more beside slices: head VMs and secrets, left by a crash, a lost state directory, or a machine that is gone."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cluster.services import Services
from cluster.tpu.slices import CREATOR_LABEL, HEAD_ROLE, OWNER_LABEL, ROLE_LABEL, SECRET_ROLE

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Leftover:
    """A resource of ours, by its labels, whose cluster is not known here."""

    kind: Literal["head VM", "secret"]
    name: str
    zone: str
    """Empty for a secret."""
    state: str
    cluster: str
    ours: bool
    """Made from this state directory, so nobody else can own it; another machine's cluster may well live."""
    created: float | None
    """Seconds since the epoch; None where the service does not say."""


def find_leftovers(services: Services, known: Collection[str], owner: str, *, quick: bool = False) -> list[Leftover]:
    """Those of the project that belong to none of the clusters `known`. Raises CloudError.

    `quick`: look for head VMs only where there are secrets of ours, since a head is made after its token and deleted before it; spares the
    seconds that Compute Engine's client takes to import.
    """

    def unowned(labels: "Mapping[str, str]") -> tuple[str, bool] | None:
        cluster = labels.get(OWNER_LABEL)
        return None if cluster is None or cluster in known else (cluster, labels.get(CREATOR_LABEL) == owner)

    found: list[Leftover] = []
    secrets = services.secrets.list_labels({ROLE_LABEL: SECRET_ROLE})
    if quick and not secrets:
        return []
    for vm in services.instances.list({ROLE_LABEL: HEAD_ROLE}):
        if (whose := unowned(vm.labels)) is not None:
            found.append(Leftover("head VM", vm.name, vm.zone, vm.status, *whose, vm.created))
    for name, labels in secrets.items():
        if (whose := unowned(labels)) is not None:
            found.append(Leftover("secret", name, "", "STORED", *whose, None))
    return found


def delete_leftover(services: Services, leftover: Leftover) -> bool:
    """Ask for its end. False: it is gone already. Raises CloudError."""
    if leftover.kind == "secret":
        return services.secrets.delete(leftover.name)
    return services.instances.delete(leftover.zone, leftover.name)
