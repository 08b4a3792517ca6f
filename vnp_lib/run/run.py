"""A run in its directory: progress, checkpoints, jobs of its shards."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from vnp_lib.checkpoint import (
    CommittedRows,
    Quarantine,
    Survey,
    move_to_damaged,
    refresh_listings,
    survey_checkpoints,
    wait_for_listed_files,
)
from vnp_lib.config import EmbedConfig
from vnp_lib.devices import device_type, num_cores
from vnp_lib.errors import ConfigError
from vnp_lib.failures import Failure
from vnp_lib.plan import RunPaths, RunPlan
from vnp_lib.run.assembly import DatasetSummary, find_complete_dataset
from vnp_lib.run.job import ShardJob
from vnp_lib.run.metrics import RunMetrics
from vnp_lib.run.record import RunRecord
from vnp_lib.run.resume import ShardProgress, read_coverage
from vnp_lib.run.validation import read_checkpoints
from vnp_lib.software import package_in_use
from vnp_lib.storage import make_directory

if TYPE_CHECKING:
    from vnp_lib.model import Weights

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"


class Run:
    """A run directory, locked by `open_run` or joined by `attach_run`."""

    def __init__(
        self, *, config: EmbedConfig, devices: tuple[str, ...], weights: Weights, plan: RunPlan
    ) -> None:
        self.config = config
        self.devices = devices
        self.plan = plan
        self.paths = RunPaths(config.output_dir)
        self.manifest = RunRecord(
            self.paths.manifest,
            world_size=plan.num_shards,
            input_fingerprint=plan.fingerprint,
            model_config_hash=weights.digest,
        )
        self.quarantine = Quarantine.of(plan, self.paths)
        self.metrics = RunMetrics()
        self._weights = weights
        # Read now, while the files on disk are those that this process has imported.
        self._package = package_in_use()

    def checkpoints(self, *, rank: int | None = None) -> Survey:
        """Read the markers of all checkpoints, or of those of one shard."""
        return survey_checkpoints(
            self.paths.checkpoints_dir, self.plan.fingerprint, verify_digests=False, rank=rank
        )

    def all_shard_progress(self) -> list[ShardProgress]:
        """Return how much of each shard is in checkpoints, by their markers, or in quarantine."""
        coverage = read_coverage(self.plan, self.paths, self._committed)
        return [coverage.progress(rank) for rank in range(self.plan.num_shards)]

    def refresh_and_check_complete(self) -> bool:
        """Return True if all shards are complete, after refreshing cached directory listings."""
        refresh_listings(self.paths.checkpoints_dir)
        return all(shard.is_complete for shard in self.all_shard_progress())

    def shard_progress(self, rank: int) -> ShardProgress:
        """Return how much of one shard is in checkpoints or in quarantine."""
        return read_coverage(self.plan, self.paths, self._committed).progress(rank)

    def num_quarantined(self, rank: int) -> int:
        """Return how many sequences of a shard are in quarantine."""
        return int(np.isin(self.plan.shard_ordinals(rank), list(self.quarantine.ordinals())).sum())

    def num_tokens_left(self, shards: Iterable[ShardProgress]) -> int:
        """Return how many tokens still have to go through the model, given the shards' progress."""
        return self.plan.num_tokens(self.plan.order) - sum(shard.tokens_done for shard in shards)

    def describe_progress(self) -> str:
        """Describe the progress, as in `9,000 of 10,000 distinct sequences are embedded`."""
        num_done = sum(shard.num_done for shard in self.all_shard_progress())
        return f"{num_done:,} of {self.plan.num_computed:,} distinct sequences are embedded"

    def complete_dataset(self) -> DatasetSummary | None:
        """Return the complete dataset of a run whose checkpoints have all been deleted since.

        Nothing has to be computed again then. None if there are checkpoints, or no such dataset.
        """
        if self.checkpoints().valid:
            return None
        return find_complete_dataset(self.plan, self.paths, quarantined=self.quarantine.ordinals())

    def move_damaged_checkpoints(self) -> None:
        """Read all checkpoints completely, and move those that assembly would refuse to `damaged/`.

        Raises:
            StorageFailingError: So many are damaged that the storage is failing. None was moved.
        """
        wait_for_listed_files(self.paths.checkpoints_dir)
        survey = read_checkpoints(self.plan, self.paths)
        survey.require_sound_storage()
        for damage in survey.damaged:
            logger.warning("%s is moved to damaged/: %s", damage.path, damage.reason)
            move_to_damaged(damage.path)

    def prepare_shard(self, rank: int) -> None:
        """Create a shard's directory and check that it is writable, before an attempt starts.

        Raises:
            ConfigError: It is not a directory, or cannot be written.
            OSError: The disk is full or failing, which may pass: the attempt is retried.
        """
        directory = self.paths.shard_dir(rank)
        try:
            make_directory(directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
                raise
            raise ConfigError(
                f"{directory} cannot be made: {error.strerror}; move away what is there"
            ) from None
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"{directory} cannot be written; fix its permissions")

    def shard_job(self, rank: int, device: str) -> ShardJob:
        """Return the job of the next attempt on a shard, for its worker process."""
        identity, runtime = self.plan.identity, self.config.runtime
        failures = [Failure.from_json(record) for record in self.manifest.failures(rank)]
        # Sequences on which an attempt fell silent while they were alone in their batch.
        silent = [failure.ordinal for failure in failures if failure.is_silence]
        deferred = tuple(dict.fromkeys(ordinal for ordinal in silent if ordinal is not None))
        # None leaves the choice to torch.
        num_threads: int | None = 1 if self.config.deterministic else None
        num_workers = min(sum(each == "cpu" for each in self.devices), self.plan.num_shards)
        if num_threads is None and num_workers > 1:
            num_threads = max(1, num_cores() // num_workers)
        token_budget = self.manifest.token_budget(rank, device) or self.plan.token_budget
        # To compute one by one: those that a worker crashed on come first, and the rest of their
        # batches follow.
        suspects: list[int | None] = []
        if self.config.on_poison == "quarantine":
            accused = [each for each in failures if each.accuses_batch and not each.is_silence]
            suspects += [failure.ordinal for failure in reversed(accused)]
            suspects += self.manifest.suspects()
        return ShardJob(
            run_dir=self.paths.run_dir.resolve(),
            rank=rank,
            fingerprint=self.plan.fingerprint,
            model=identity["model"],
            weights=RANDOM_WEIGHTS if self._weights.path is None else str(self._weights.path),
            weights_digest=self._weights.digest,
            dtype=identity["dtype"],
            device=device_type(device),
            num_threads=num_threads,
            is_deterministic=self.config.deterministic,
            checkpoint_seq_threshold=runtime.checkpoint_seq_threshold,
            checkpoint_time_threshold=runtime.checkpoint_time_threshold,
            token_budget=token_budget,
            suspects=tuple(dict.fromkeys(each for each in suspects if each is not None)),
            deferred=deferred,
            is_careful=bool(failures) and failures[-1].accuses_batch,
            quarantines=self.config.on_poison == "quarantine",
            package=self._package,
        )

    def scale_token_budget(self, rank: int, device: str, scale: float) -> None:
        """Scale the token budget of later attempts on a shard on a device."""
        tokens = self.manifest.token_budget(rank, device) or self.plan.token_budget
        self.manifest.remember_token_budget(rank, device, max(1, int(tokens * scale)))

    @cached_property
    def _committed(self) -> CommittedRows:
        return CommittedRows(
            self.paths.checkpoints_dir, self.plan.fingerprint, self.plan.num_sequences
        )
