"""One bucket of Cloud Storage. What goes wrong is a CloudError (cluster/cloud_errors.py)."""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cluster.cloud_errors import (
    CloudError,
    DeadlineExceededError,
    NotFoundError,
    PermissionDeniedError,
    Service,
    TransientError,
    from_exception,
)

T = TypeVar("T")

_CHECK = "check the network, then try again: what was asked for may have happened"
STORAGE = Service(
    "Cloud Storage",
    "storage.googleapis.com",
    "roles/storage.objectAdmin",
    next_steps={
        NotFoundError: "create the bucket (gcloud storage buckets create), or name another one as cluster.bucket or in PODLAUNCH_BUCKET",
        PermissionDeniedError: "grant {role} on the bucket to this identity, or log in (gcloud auth application-default login)",
        DeadlineExceededError: _CHECK,
        TransientError: _CHECK,
    },
)
PATIENCE_S = 120.0
"""How long a request is repeated while the service stumbles."""
LONGEST_PAUSE_S = 8.0
"""Between two tries; the first pause is a second at most, each is up to twice as long as the one before."""
REQUEST_S = 60.0
"""How long one answer may take."""
_CHUNK_BYTES = 32 * 2**20
"""A large file is sent in pieces of this size, each of which is repeated by itself."""


def split_url(url: str) -> tuple[str, str]:
    """Bucket and object name of gs://<bucket>/<name>; the name may be empty. Raises ValueError for anything else."""
    found = re.fullmatch(r"gs://([^/]+)(?:/(.*))?", url)
    if found is None:
        raise ValueError(f"{url!r} is not gs://<bucket>/<name>")
    return found[1], found[2] or ""


def storage_environment(endpoint: str | None) -> dict[str, str]:
    """What leads Google's client, gcsfs and TensorStore to a Cloud Storage API that asks for no credentials; nothing for Google's own."""
    if endpoint is None:
        return {}
    return {"STORAGE_EMULATOR_HOST": endpoint, "TENSORSTORE_GCS_HTTP_URL": endpoint, "FSSPEC_GCS_TOKEN": "anon"}


class Bucket:
    """A bucket by name. Nothing is asked before the first call."""

    def __init__(
        self,
        name: str,
        endpoint: str | None = None,
        project: str | None = None,
        *,
        patience: float | None = PATIENCE_S,
        request: float = REQUEST_S,
        client: Any = None,
    ) -> None:
        """`endpoint`: the URL of a Cloud Storage API that asks for no credentials; None: Google's own, with the default credentials.

        `patience`: seconds for which a call is repeated; None: for as long as the service stumbles. `request`: seconds for each answer.
        `client`: a google.cloud.storage.Client to use instead of a new one.
        """
        self.name, self.endpoint, self.project = name, endpoint, project
        self._patience, self._request, self._given = patience, request, client

    def ensure(self, location: str | None = None) -> bool:
        """Create the bucket where it does not exist, in `location` (a region such as us-central2). Returns whether it was made now."""
        from google.api_core.exceptions import Conflict

        def create() -> bool:
            bucket = self._client.bucket(self.name)
            bucket.iam_configuration.uniform_bucket_level_access_enabled = True
            try:
                self._client.create_bucket(bucket, project=self.project, location=location, **self._limits)
            except Conflict:  # a name is taken in all projects at once; whose it is shows at the first object
                return False
            return True

        return self._ask(self.url(""), create)

    def upload_once(self, path: Path, blob_name: str) -> bool:
        """Store the file's content unless the object exists already, which counts as success. Returns whether this call stored it.

        Of several callers at once exactly one gets True. (fake-gcs-server holds to that up to 8 MB only.)
        """
        from google.api_core.exceptions import PreconditionFailed

        def upload() -> bool:
            blob = self._blob(blob_name)
            if path.stat().st_size > _CHUNK_BYTES:
                if self.exists(blob_name):
                    return False  # a refusal would come after the last byte only
                blob.chunk_size = _CHUNK_BYTES
            try:
                blob.upload_from_filename(str(path), if_generation_match=0, **self._limits)
            except PreconditionFailed:
                return False
            return True

        return self._ask(self.url(blob_name), upload)

    def write(self, blob_name: str, content: bytes) -> None:
        """Store the content, over what was there."""
        self._ask(self.url(blob_name), lambda: self._blob(blob_name).upload_from_string(content, **self._limits))

    def create(self, blob_name: str, content: bytes) -> bool:
        """Store the content unless the object exists already. Returns whether this call stored it: of several at once exactly one."""
        from google.api_core.exceptions import PreconditionFailed

        def upload() -> bool:
            blob = self._blob(blob_name)
            try:
                blob.upload_from_string(content, if_generation_match=0, **self._limits)
            except PreconditionFailed:  # also when the answer to our own first try was lost: then the content is ours
                return bool(blob.download_as_bytes(**self._limits) == content)
            return True

        return self._ask(self.url(blob_name), upload)

    def upload(self, path: Path, blob_name: str) -> None:
        """Store the file's content, over what was there."""

        def send() -> None:
            blob = self._blob(blob_name)
            if path.stat().st_size > _CHUNK_BYTES:
                blob.chunk_size = _CHUNK_BYTES
            blob.upload_from_filename(str(path), **self._limits)

        self._ask(self.url(blob_name), send)

    def exists(self, blob_name: str) -> bool:
        """False also when there is no such bucket."""
        return self._ask(self.url(blob_name), lambda: bool(self._blob(blob_name).exists(**self._limits)))

    def read(self, blob_name: str) -> bytes:
        """Raises NotFoundError when there is no such object or bucket."""

        def download() -> bytes:
            content: bytes = self._blob(blob_name).download_as_bytes(**self._limits)
            return content

        return self._ask(self.url(blob_name), download)

    def there(self) -> bool:
        """Whether the bucket exists. False also when the service does not answer within `patience`."""
        try:
            self.list("no object is called so/")
        except CloudError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin with `prefix`. Raises NotFoundError when there is no such bucket."""
        return self._ask(
            self.url(prefix), lambda: [blob.name for blob in self._client.list_blobs(self.name, prefix=prefix, **self._limits)]
        )

    def changed(self, folder: str, name: str) -> dict[str, float]:
        """The folders directly in `folder` ('' or ending in '/') with an object called `name`, and when it was written last, in seconds
        since the epoch. Raises NotFoundError when there is no such bucket.
        """
        wanted = re.compile(re.escape(folder) + r"([^/]+)/" + re.escape(name))

        def look() -> dict[str, float]:
            found = self._client.list_blobs(self.name, prefix=folder, match_glob=f"{folder}*/{name}", **self._limits)
            # fake-gcs-server passes over match_glob and lists everything.
            return {match[1]: blob.updated.timestamp() for blob in found if (match := wanted.fullmatch(blob.name))}

        return self._ask(self.url(folder), look)

    def delete(self, blob_name: str) -> bool:
        """Returns whether there was such an object."""
        try:
            self._ask(self.url(blob_name), lambda: self._blob(blob_name).delete(**self._limits))
        except NotFoundError:
            return False
        return True

    def url(self, blob_name: str) -> str:
        return f"gs://{self.name}/{blob_name}"

    @property
    def _limits(self) -> dict[str, Any]:
        return {"timeout": self._request, "retry": self._retry}

    @cached_property
    def _retry(self) -> Any:
        from google.cloud.storage.retry import DEFAULT_RETRY

        return DEFAULT_RETRY.with_timeout(self._patience).with_delay(maximum=LONGEST_PAUSE_S)

    @cached_property
    def _client(self) -> Any:
        if self._given is not None:
            return self._given
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client  # half a second, and only who has a bucket needs it

        if self.endpoint is None:
            return Client(project=self.project)
        nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
        options = {"api_endpoint": self.endpoint}
        return Client(project=self.project or "none", credentials=nobody, client_options=options)

    def _blob(self, name: str) -> Any:
        return self._client.bucket(self.name).blob(name)

    def _ask(self, resource: str, call: Callable[[], T]) -> T:
        """Do `call` and turn what Google's client raises into ours."""
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException

        try:
            return call()
        except (GoogleAPIError, GoogleAuthError, RequestException, OSError) as error:
            raise from_exception(_plain(error), service=STORAGE, resource=resource) from error


def _plain(error: Exception) -> Exception:
    """With the service's words only: Google's client puts the request's URL before them and its own after them, or has JSON there."""
    from google.api_core.exceptions import GoogleAPICallError

    if not isinstance(error, GoogleAPICallError):
        return error
    words = re.sub(r"^[A-Z]+ \S+: |\s*: \('Request failed with status code'.*$", "", str(error.message), flags=re.DOTALL)
    if (said := re.search(r'"message": *"([^"]*)"', words)) is not None:
        words = said[1]
    return type(error)(words, errors=error.errors, response=error.response)
