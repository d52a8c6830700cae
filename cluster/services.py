"""Compute Engine and Secret Manager of a cluster's project. Connected when they are needed: their clients take seconds to import."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cluster.compute import Instances
    from cluster.secrets import SecretStore


class Where(Protocol):
    """What leads to a project's services: a ClusterConfig, or a place that is looked at for orphans."""

    @property
    def compute_endpoint(self) -> str | None: ...

    @property
    def secrets_endpoint(self) -> str | None: ...

    @property
    def effective_project(self) -> str: ...


@dataclass(frozen=True)
class Services:
    """Each is connected at its first use, which raises PodlaunchError where there are no credentials."""

    new_instances: "Callable[[], Instances]" = field(repr=False)
    new_secrets: "Callable[[], SecretStore]" = field(repr=False)

    @functools.cached_property
    def instances(self) -> "Instances":
        return self.new_instances()

    @functools.cached_property
    def secrets(self) -> "SecretStore":
        return self.new_secrets()


Connect = Callable[[Where], Services]


def connect(where: Where) -> Services:
    """Connects to nothing yet."""

    def instances() -> "Instances":
        from cluster.compute import Instances

        return Instances(where.compute_endpoint, where.effective_project)

    def secrets() -> "SecretStore":
        from cluster.secrets import SecretStore

        return SecretStore(where.secrets_endpoint, where.effective_project)

    return Services(instances, secrets)
