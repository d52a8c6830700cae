"""Fixtures that several unit tests ask for by name."""

from tests.unit.fake_head import cluster, head

__all__ = ["cluster", "head"]
