"""The reproduction: `python -m reproduce EXPERIMENT --preset smoke`. Start reading at `rows`, `training`, `language`."""
