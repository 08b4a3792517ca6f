"""The Prefect layer: the only place that imports prefect."""

from flows.prefect_environment import prepare_environment

prepare_environment()  # before any module here imports Prefect, which reads its settings meanwhile
