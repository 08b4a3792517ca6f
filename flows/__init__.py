"""The Prefect layer: the only place that imports prefect."""
