"""Where a secret's value is found: names and addresses, which may travel anywhere, never the value."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.schema import build
from cluster.state import private_dir, write_atomic


@dataclass(frozen=True)
class SecretPlace:
    """A 0600 file of this machine (`file`), or a secret of Secret Manager (`secret` in `project`)."""

    file: str | None = None
    secret: str | None = None
    project: str | None = None
    endpoint: str | None = None
    """host:port of a plaintext gRPC Secret Manager API; None: Google's own."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SecretPlace":
        return build(cls, values)

    @classmethod
    def from_json(cls, text: str) -> "SecretPlace":
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in dataclasses.asdict(self).items() if value is not None}, sort_keys=True)

    def read(self) -> str:
        """The value. Raises PodlaunchError, or OSError for a file that is not there."""
        if self.file is not None:
            return Path(self.file).read_text(encoding="utf-8")
        from cluster.secrets import SecretStore

        assert self.secret is not None
        assert self.project is not None
        return SecretStore(self.endpoint, self.project).read(self.secret)

    def local_file(self, folder: Path) -> Path:
        """A 0600 file of this machine with the value: the one that is named, or one written into `folder`."""
        if self.file is not None:
            return Path(self.file)
        path = private_dir(folder) / "token"
        write_atomic(path, self.read())
        return path

    def delete(self) -> None:
        """Nothing is there afterwards, whether or not there was before."""
        if self.file is not None:
            Path(self.file).unlink(missing_ok=True)
            return
        from cluster.secrets import SecretStore

        assert self.secret is not None
        assert self.project is not None
        SecretStore(self.endpoint, self.project).delete(self.secret)
