"""Model families: one file each, found by its name. See `launcher.models.registry.Family` for what a file has to offer."""
