"""Where a run runs: slices of Cloud TPU VMs joined into one Ray cluster. Never imports `launcher`."""
