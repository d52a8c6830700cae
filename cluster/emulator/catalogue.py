"""What the emulated service offers: accelerator types, runtime versions, locations. The same in every zone."""

from typing import Any

from cluster.emulator.checks import check_parent, not_found, runtime_versions
from cluster.emulator.paging import page
from cluster.tpu import catalog

# Zones that the price lists of the API fact sheet and the public run logs name. Others are served as well; they are only not listed.
ZONES = (
    "asia-northeast1-b",
    "europe-west4-a",
    "europe-west4-b",
    "us-central1-a",
    "us-central1-b",
    "us-central2-b",
    "us-east1-d",
    "us-east5-a",
    "us-east5-b",
    "us-west4-a",
)
CONFIG_OF_GENERATION = {"v2": 2, "v3": 4, "v4": 7, "v5e": 9, "v5p": 10, "v6e": 11}
"""google.cloud.tpu.v2.AcceleratorConfig.Type by generation."""


def list_accelerator_types(call: Any) -> Any:
    """Raises Refusal."""
    from google.cloud import tpu_v2

    paths = [f"{call.parent}/acceleratorTypes/{name}" for name in catalog.by_name()]
    names, token = page(paths, call.parent, "acceleratorTypes", call.page_size, call.page_token)
    return tpu_v2.ListAcceleratorTypesResponse.pb()(accelerator_types=[get_accelerator_type(name) for name in names], next_page_token=token)


def get_accelerator_type(path: str) -> Any:
    """Raises Refusal."""
    from google.cloud import tpu_v2

    parent, _, name = path.partition("/acceleratorTypes/")
    check_parent(parent, wildcard=True)
    kind = catalog.by_name().get(name)
    if kind is None:
        raise not_found(path)
    config = {"type_": CONFIG_OF_GENERATION[kind.generation], "topology": kind.topology}
    return tpu_v2.AcceleratorType.pb()(name=path, type_=name, accelerator_configs=[config])


def list_runtime_versions(call: Any) -> Any:
    """Raises Refusal."""
    from google.cloud import tpu_v2

    paths = [f"{call.parent}/runtimeVersions/{version}" for version in runtime_versions()]
    names, token = page(paths, call.parent, "runtimeVersions", call.page_size, call.page_token)
    return tpu_v2.ListRuntimeVersionsResponse.pb()(runtime_versions=[get_runtime_version(name) for name in names], next_page_token=token)


def get_runtime_version(path: str) -> Any:
    """Raises Refusal."""
    from google.cloud import tpu_v2

    parent, _, version = path.partition("/runtimeVersions/")
    check_parent(parent, wildcard=True)
    if version not in runtime_versions():
        raise not_found(path)
    return tpu_v2.RuntimeVersion.pb()(name=path, version=version)


def service_identity(parent: str) -> Any:
    """Raises Refusal. The shape of the address is a guess."""
    from google.cloud import tpu_v2

    check_parent(parent)
    email = f"service-{parent.split('/')[1]}@cloud-tpu.iam.gserviceaccount.com"
    return tpu_v2.GenerateServiceIdentityResponse.pb()(identity={"email": email})


def list_locations(project: str) -> Any:
    from google.cloud.location import locations_pb2

    return locations_pb2.ListLocationsResponse(locations=[get_location(f"{project}/locations/{zone}") for zone in ZONES])


def get_location(path: str) -> Any:
    """Raises Refusal."""
    from google.cloud.location import locations_pb2

    return locations_pb2.Location(name=path, location_id=check_parent(path))
