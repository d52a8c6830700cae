"""Family name -> module. A new family is one file beside `gemma.py`, its variants, and one line here."""

import importlib
from typing import cast

from launcher.models.interface import Family

FAMILIES = {"gemma": "launcher.models.gemma"}


def family(name: str) -> Family:
    """The module of a family whose name the configuration has already checked; imports JAX."""
    return cast(Family, importlib.import_module(FAMILIES[name]))
