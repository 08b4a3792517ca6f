"""The Prefect layer: the only place that imports prefect."""

from flows.prefect_environment import prepare_environment

# Prefect reads its settings while it is imported, which the other modules here do.
prepare_environment()
