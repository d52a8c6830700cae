"""One page about a run, from its run directory alone (docs/monitoring.md)."""
