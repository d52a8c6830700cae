"""Who we are to Google: Application Default Credentials, tried before the first call."""

import contextlib
import functools
from typing import Any

_TOKEN_TIMEOUT_S = 10.0


@functools.cache
def default_credentials() -> Any:
    """Application Default Credentials with a token already: a call made with bad ones would be tried again and again, since the clients
    report them as UNAVAILABLE. Raises GoogleAuthError.
    """
    import google.auth
    from google.auth.exceptions import TransportError
    from google.auth.transport.requests import Request

    found, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    with contextlib.suppress(TransportError):  # no network says nothing about the credentials; the calls themselves are repeated and tell
        found.refresh(functools.partial(Request(), timeout=_TOKEN_TIMEOUT_S))  # type: ignore[no-untyped-call]  # google-auth's own
    return found
