"""Names of the autoscaler's instances and of the head's VM: derived, so that asking twice names the same thing."""

import hashlib


def head_instance_id(cluster: str) -> str:
    """The autoscaler's id of the head."""
    return f"{cluster}-head"


def head_vm_name(cluster: str) -> str:
    """The name of the head's VM in Compute Engine."""
    return f"podlaunch-{cluster}-head"


def slice_id(cluster: str, request: str, index: int) -> str:
    """The name of the `index`-th slice of one launch request: the same request asked again means the same slice."""
    digest = hashlib.sha256(request.encode()).hexdigest()[:6]
    return f"{cluster}-{digest}-{index}"
