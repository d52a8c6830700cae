"""Lists in pages: the token of a page is the last name of the one before."""

from collections.abc import Iterable

from cluster.emulator.checks import INVALID_ARGUMENT, check_parent
from cluster.emulator.model import Refusal

_PAGE = 500


def page(names: Iterable[str], parent: str, collection: str, size: int = 0, token: str = "") -> tuple[list[str], str]:
    """The names below `parent` (zone `-` means all zones) that belong on this page, and the token of the next one. Raises Refusal."""
    zone = check_parent(parent, wildcard=True)
    prefix = f"{parent}/{collection}/" if zone != "-" else f"{parent.rpartition('/')[0]}/"
    if size < 0 or (token and not token.startswith(prefix)):
        raise Refusal(INVALID_ARGUMENT, "Cloud TPU received an invalid argument. The page size or token is not valid.")  # a guess
    found = (name for name in names if name.startswith(prefix))
    return cut(found, size, token)


def cut(names: Iterable[str], size: int, token: str, *, most: int = _PAGE) -> tuple[list[str], str]:
    """The page of `names` that follows `token`, and the token of the next one. Raises Refusal."""
    if size < 0:
        raise Refusal(INVALID_ARGUMENT, "The page size must not be negative.")  # a guess
    found = sorted(name for name in names if name > token)
    size = min(size or most, most)
    return found[:size], found[size - 1] if len(found) > size else ""
