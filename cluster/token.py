"""Secrets of a cluster: its token, 256 random bits that every process of its Ray shows, and those that its runs name.

The client keeps the token in a 0600 file. Where head or hosts do not see this machine's files, Secret Manager has it too, under a name
that follows from the cluster's; metadata, labels, command lines and logs carry that name only.
"""

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cloud_errors import AlreadyExistsError, NotFoundError
from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.secret_place import SecretPlace
from cluster.state import write_atomic
from cluster.tpu.owner import owner_id
from cluster.tpu.requests import role_labels
from cluster.tpu.slices import OWNER_LABEL, SECRET_ROLE

if TYPE_CHECKING:
    from cluster.secrets import SecretStore

BYTES = 32
_FORBIDDEN = re.compile(r"[^-_a-zA-Z0-9]")
"""Secret Manager takes letters, digits, '-' and '_', at most 255 of them."""


def secret_name(cluster: str) -> str:
    return f"podlaunch-{cluster}-token"


def run_secret_name(cluster: str, run: str) -> str:
    return f"podlaunch-{cluster}-run-{_FORBIDDEN.sub('_', run)}"


def token_place(config: ClusterConfig, folder: Path) -> SecretPlace:
    """Where hosts (and a head VM) get the token of the cluster whose folder on this machine is `folder`."""
    if config.shares_files:
        return SecretPlace(file=str(folder / "token"))
    return SecretPlace(secret=secret_name(config.name), project=config.effective_project, endpoint=config.secrets_endpoint)


def make_token(path: Path) -> None:
    write_atomic(path, secrets.token_hex(BYTES))


def share_token(path: Path, store: "SecretStore", config: ClusterConfig) -> None:
    """Afterwards the file and Secret Manager hold the same token; one that is there already stays. Raises PodlaunchError."""
    name = secret_name(config.name)
    if not path.exists():
        make_token(path)
    try:
        store.create(name, path.read_text(encoding="utf-8"), role_labels(config, owner_id(), SECRET_ROLE))
    except AlreadyExistsError:
        write_atomic(path, store.read(name))


def fetch_token(path: Path, store: "SecretStore", cluster: str) -> None:
    """The token of a cluster that another machine made. Raises ClusterError when there is none, PodlaunchError without the rights."""
    try:
        write_atomic(path, store.read(secret_name(cluster)))
    except NotFoundError as error:
        raise ClusterError(
            f"cluster {cluster!r} has a head VM and no token in Secret Manager ({secret_name(cluster)}); end it with: tpu stop {cluster}"
        ) from error


def keep_run_secret(config: ClusterConfig, run: str, value: str, store: "SecretStore") -> SecretPlace:
    """Keep what a run is given; what the same run was given before is replaced. Raises PodlaunchError."""
    name = run_secret_name(config.name, run)
    store.delete(name)
    store.create(name, value, role_labels(config, owner_id(), SECRET_ROLE))
    return SecretPlace(secret=name, project=config.effective_project, endpoint=config.secrets_endpoint)


def delete_secrets(store: "SecretStore", cluster: str) -> int:
    """Delete every secret of the cluster. Returns how many there were. Raises PodlaunchError."""
    names = store.list({OWNER_LABEL: cluster})
    for name in names:
        store.delete(name)
    return len(names)
