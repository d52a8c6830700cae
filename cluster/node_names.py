"""Names of the autoscaler's instances: derived, so that asking twice names the same thing."""

import hashlib


def head_instance_id(cluster: str) -> str:
    """The autoscaler's id of the head."""
    return f"{cluster}-head"


def slice_id(cluster: str, request: str, index: int) -> str:
    """The name of the `index`-th slice of one launch request: the same request asked again means the same slice."""
    digest = hashlib.sha256(request.encode()).hexdigest()[:6]
    return f"{cluster}-{digest}-{index}"
