"""A run in its directory: opened under a lock, planned, and asked what is left of it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import Quarantine
from vnp_lib.config import EmbedConfig
from vnp_lib.devices import device_type, num_cores
from vnp_lib.errors import ConfigError
from vnp_lib.failures import Failure
from vnp_lib.plan import RunPaths, RunPlan
from vnp_lib.run.assembly import DatasetSummary, find_complete_dataset
from vnp_lib.run.job import ShardJob
from vnp_lib.run.metrics import RunMetrics
from vnp_lib.run.record import RunRecord
from vnp_lib.run.resume import done_or_quarantined, read_checkpoints
from vnp_lib.software import package_in_use
from vnp_lib.storage import make_directory

if TYPE_CHECKING:  # torch takes seconds to import: what a command line gets wrong is said before
    from vnp_lib.checkpoint import CommittedRows, Survey
    from vnp_lib.model import Weights

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """How much of a shard is done."""

    rank: int
    num_sequences: int
    num_done: int
    tokens_done: int

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.num_sequences


class Run:
    """A run directory that is ours for as long as `open_run` says."""

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
        self._package = (
            package_in_use()
        )  # now, when what is on disk is what this process has imported

    def checkpoints(self, *, rank: int | None = None) -> Survey:
        """Look into the markers of all checkpoints, or of one shard's."""
        from vnp_lib.checkpoint import survey_checkpoints

        return survey_checkpoints(
            self.paths.checkpoints_dir, self.plan.fingerprint, verify_digests=False, rank=rank
        )

    def all_shard_progress(self) -> list[ShardProgress]:
        """Say how much of each shard is in checkpoints, by their markers, or in quarantine."""
        is_done = done_or_quarantined(self.plan, self.paths, self._committed)
        return [self._shard_progress(rank, is_done) for rank in range(self.plan.num_shards)]

    def refresh_and_check_complete(self) -> bool:
        """Say whether all shards are complete, after having the system forget what it remembers of the directories."""
        from vnp_lib.checkpoint import refresh_listings

        refresh_listings(self.paths.checkpoints_dir)
        return all(shard.is_complete for shard in self.all_shard_progress())

    def shard_progress(self, rank: int) -> ShardProgress:
        """The same for one shard."""
        return self._shard_progress(
            rank, done_or_quarantined(self.plan, self.paths, self._committed)
        )

    def num_quarantined(self, rank: int) -> int:
        """How many of a shard's sequences are in quarantine."""
        return int(np.isin(self.plan.shard_ordinals(rank), list(self.quarantine.ordinals())).sum())

    def num_tokens_left(self, shards: Iterable[ShardProgress]) -> int:
        """How many tokens have to go through the model yet, when its shards stand so."""
        return self.plan.num_tokens(self.plan.order) - sum(shard.tokens_done for shard in shards)

    def describe_progress(self) -> str:
        """Say how much there is: `9,000 of 10,000 sequences are embedded`."""
        num_done = sum(shard.num_done for shard in self.all_shard_progress())
        return f"{num_done:,} of {self.plan.num_computed:,} distinct sequences are embedded"

    def complete_dataset(self) -> DatasetSummary | None:
        """The dataset of this very run, whole, where all checkpoints have been deleted since: nothing need be computed again."""
        if self.checkpoints().valid:
            return None
        return find_complete_dataset(self.plan, self.paths, quarantined=self.quarantine.ordinals())

    def move_damaged_checkpoints(self) -> None:
        """Read all checkpoints whole and move aside those that assembly would not take: their rows are computed again.

        Raises:
            StorageFailingError: So many are damaged that the storage is failing. Nothing has been moved.
        """
        from vnp_lib.checkpoint import move_to_damaged, wait_for_listed_files

        wait_for_listed_files(self.paths.checkpoints_dir)
        survey = read_checkpoints(self.plan, self.paths)
        survey.require_sound_storage()
        for damage in survey.damaged:
            logger.warning("%s is moved aside: %s", damage.path, damage.reason)
            move_to_damaged(damage.path)

    def prepare_shard(self, rank: int) -> None:
        """See that a shard's directory can take an attempt, before a child is started for it.

        Raises:
            ConfigError: It is no directory, or cannot be written.
            OSError: The disk is full or failing, which may pass: the attempt is made again.
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
            raise ConfigError(f"{directory} cannot be written; mend its permissions")

    def shard_job(self, rank: int, device: str) -> ShardJob:
        """Describe an attempt on a shard to its child."""
        identity, runtime = self.plan.identity, self.config.runtime
        failures = [Failure.from_json(record) for record in self.manifest.failures(rank)]
        return ShardJob(
            run_dir=self.paths.run_dir.resolve(),
            rank=rank,
            fingerprint=self.plan.fingerprint,
            model=identity["model"],
            weights=RANDOM_WEIGHTS if self._weights.path is None else str(self._weights.path),
            weights_digest=self._weights.digest,
            dtype=identity["dtype"],
            device=device_type(device),
            num_threads=1 if self.config.deterministic else self._threads_per_child(),
            is_deterministic=self.config.deterministic,
            checkpoint_seq_threshold=runtime.checkpoint_seq_threshold,
            checkpoint_time_threshold=runtime.checkpoint_time_threshold,
            token_budget=self.manifest.token_budget(rank, device) or self.plan.token_budget,
            suspects=self._suspects(failures),
            deferred=_silent_at(failures),
            is_careful=bool(failures) and failures[-1].accuses_batch,
            quarantines=self.config.on_poison == "quarantine",
            package=self._package,
        )

    def scale_token_budget(self, rank: int, device: str, scale: float) -> None:
        """Have the next attempts on a shard on a device take smaller batches, or larger ones."""
        tokens = self.manifest.token_budget(rank, device) or self.plan.token_budget
        self.manifest.remember_token_budget(rank, device, max(1, int(tokens * scale)))

    def _suspects(self, failures: list[Failure]) -> tuple[int, ...]:
        """Who is to be computed alone: first those at which a child has died already, then the rest of their batches."""
        if self.config.on_poison != "quarantine":
            return ()
        accused = [
            failure.ordinal
            for failure in reversed(failures)
            if failure.accuses_batch and not failure.is_silence
        ]
        ordinals = [
            ordinal for ordinal in accused if ordinal is not None
        ] + self.manifest.suspects()
        return tuple(dict.fromkeys(ordinals))

    @cached_property
    def _committed(self) -> CommittedRows:
        from vnp_lib.checkpoint import CommittedRows

        return CommittedRows(
            self.paths.checkpoints_dir, self.plan.fingerprint, self.plan.num_sequences
        )

    def _shard_progress(self, rank: int, is_done: NDArray[np.bool_]) -> ShardProgress:
        ordinals = self.plan.shard_ordinals(rank)
        done = ordinals[is_done[ordinals]]
        return ShardProgress(
            rank=rank,
            num_sequences=ordinals.size,
            num_done=done.size,
            tokens_done=self.plan.num_tokens(done),
        )

    def _threads_per_child(self) -> int | None:
        children = min(sum(device == "cpu" for device in self.devices), self.plan.num_shards)
        return max(1, num_cores() // children) if children > 1 else None


def _silent_at(failures: list[Failure]) -> tuple[int, ...]:
    """The sequences, each alone in the model, at which an attempt gave no sign of life."""
    ordinals = [failure.ordinal for failure in failures if failure.is_silence]
    return tuple(dict.fromkeys(ordinal for ordinal in ordinals if ordinal is not None))
