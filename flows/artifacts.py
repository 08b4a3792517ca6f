"""Show a run in the Prefect UI: a progress bar per shard, a table of shards, a summary, tags.

An error here never affects the run: it is a debug message in the log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from vnp_lib.formatting import format_bytes, format_duration, printable
from vnp_lib.report import RunStatus, read_status
from vnp_lib.run import DatasetSummary, Run

logger = logging.getLogger(__name__)

_REQUEST_LIMIT_S = 2.0
_MAX_QUARANTINED_SHOWN = 20
_MAX_MESSAGE = 200  # characters
_LINE = 40  # characters of a table's last column that Prefect's UI shows without scrolling
# The table is updated at most a tenth of the time: with millions of sequences, reading the status
# takes seconds.
_PAUSE_FACTOR = 10


def tags_of_shard(run: Run) -> set[str]:
    """Return the tags of a shard's task run: the model, and `cpu`, `cuda` or `work-pool`."""
    if run.config.executor == "work-pool":
        return {run.config.model, "work-pool"}
    return {run.config.model, "cpu" if set(run.devices) == {"cpu"} else "cuda"}


async def tag_flow_run(flow_run_id: UUID, tag: str) -> None:
    """Add a tag to a flow run."""
    await _harmless(f"tag {tag}", _tags_of(flow_run_id).add(tag))


class _FlowRunTags:
    """Adds tags one at a time, since an update of a flow run replaces all of them."""

    def __init__(self, flow_run_id: UUID) -> None:
        self._flow_run_id = flow_run_id
        self._added: set[str] = set()
        self._lock = asyncio.Lock()

    async def add(self, tag: str) -> None:
        async with self._lock:
            if tag in self._added:
                return
            async with get_client() as client:
                present = (await client.read_flow_run(self._flow_run_id)).tags
                if tag not in present:
                    await client.update_flow_run(self._flow_run_id, tags=[*present, tag])
            self._added.add(tag)


_tags_of = lru_cache(maxsize=8)(_FlowRunTags)


class ShardArtifact:
    """The progress artifact of a shard, for all attempts, updated at most every `interval_s`."""

    def __init__(
        self, rank: int, *, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = f"shard-{rank:03d}"
        self._interval_s = interval_s
        self._clock = clock
        self._next_at = clock()
        self._id: UUID | None = None

    async def show(self, percent: float, description: str, *, now: bool = False) -> None:
        """Show the progress of the shard, unless the last update is recent and `now` is not set."""
        if not now and self._clock() < self._next_at:
            return
        self._next_at = self._clock() + self._interval_s
        await _harmless(self._key, self._send(percent, description))

    async def _send(self, percent: float, description: str) -> None:
        percent = round(percent, 1)
        if self._id is None:
            self._id = await acreate_progress_artifact(
                percent, key=self._key, description=description
            )
        else:
            await aupdate_progress_artifact(self._id, percent, description=description)


@asynccontextmanager
async def shard_table(run: Run) -> AsyncIterator[None]:
    """Keep a table of all shards up to date while the block runs, and once more at its end."""
    table = _ShardTable(run)
    task = asyncio.create_task(table.keep_up_to_date(run.config.runtime.artifact_interval_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await table.show()


class _ShardTable:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._id: UUID | None = None

    async def keep_up_to_date(self, interval_s: float) -> None:
        while True:
            started_at = time.monotonic()
            await self.show()
            await asyncio.sleep(max(interval_s, _PAUSE_FACTOR * (time.monotonic() - started_at)))

    async def show(self) -> None:
        await _harmless("vnp-shards", self._send(), limit_s=None)

    async def _send(self) -> None:
        status = await asyncio.to_thread(read_status, self._run.plan, self._run.paths)
        rows = [
            {
                "shard": f"{shard.rank:03d}",
                "state": str(shard.state),
                "attempt": shard.attempts,
                "sequences": f"{shard.num_done:,} of {shard.num_sequences:,} "
                f"({int(shard.percent)} %)",
                "tokens/s": f"{shard.tokens_per_s:,.0f}" if shard.tokens_per_s else "",
                "device": shard.device or "",
                "last failure": _cell(f"{shard.failure.kind}: {shard.failure.explanation}")
                if shard.failure
                else "",
            }
            for shard in status.shards
        ]
        # The limit is for the requests only: a slow disk may take longer.
        async with asyncio.timeout(_REQUEST_LIMIT_S):
            if self._id is None:
                self._id = await acreate_table_artifact(
                    rows, key="vnp-shards", description=_headline(status)
                )
                return
            update = ArtifactUpdate(data=json.dumps(rows), description=_headline(status))
            async with get_client() as client:
                await client.update_artifact(artifact_id=self._id, artifact=update)


async def show_summary(
    run: Run, summary: DatasetSummary, *, elapsed_s: float, num_tokens: int
) -> None:
    """Show what the dataset holds, what is missing, and how to read it."""
    text = describe_in_markdown(run, summary, elapsed_s=elapsed_s, num_tokens=num_tokens)
    await _harmless(
        "vnp-summary",
        acreate_markdown_artifact(text, key="vnp-summary", description=summary.describe()),
    )


def describe_in_markdown(
    run: Run, summary: DatasetSummary, *, elapsed_s: float, num_tokens: int
) -> str:
    """Return the summary of a dataset as Markdown.

    Args:
        run: Its run.
        summary: Its counts.
        elapsed_s: Seconds of this flow run.
        num_tokens: Tokens computed in this flow run.
    """
    identity, report = run.plan.identity, run.paths.report.resolve()
    facts = {
        "sequences embedded": f"{summary.num_rows:,}",
        "distinct ones computed": f"{run.plan.num_computed:,}",
        "in quarantine": f"{summary.num_quarantined:,}",
        "missing": f"{summary.num_missing:,}",
        "model": f"{identity['model']}, layer {identity['layer']}, "
        f"{identity['pooling']}, {identity['dtype']}",
        "precision": summary.precision.describe()
        if summary.precision
        else f"{identity['dtype']}, not compared",
        "dataset": f"`{summary.path.resolve()}`, {format_bytes(summary.size_bytes)}, "
        f"parts: {summary.num_parts:,}",
        "report": f"[{_escaped(str(report))}]({report.as_uri()})",
        "this flow run": f"{format_duration(elapsed_s)}, {num_tokens:,} tokens, "
        f"{num_tokens / elapsed_s:,.0f} tokens/s",
        "fingerprint": f"`{run.plan.fingerprint}`",
    }
    first, *others = (f"| {name} | {value} |" for name, value in facts.items())
    table = "\n".join([first, "|---|---|", *others])
    reading = f"""```python
from vnp_lib.dataset import open_dataset

dataset = open_dataset("{run.paths.run_dir.resolve()}")
for ids, rows in dataset.batches(10_000):
    ...
```"""
    return "\n\n".join([table, *_quarantine_in_markdown(run), "## Read it", reading])


def _quarantine_in_markdown(run: Run) -> list[str]:
    quarantined = run.quarantine.read()
    if not quarantined:
        return []
    shown = [
        f"| {_cell(sequence.id)} | {sequence.length:,} "
        f"| {sequence.cause} | {_cell(sequence.message)} |"
        for sequence in quarantined[:_MAX_QUARANTINED_SHOWN]
    ]
    more = f"All {len(quarantined):,} are in `{run.paths.quarantine.resolve()}`."
    return [
        "## In quarantine",
        "\n".join(["| id | residues | cause | message |", "|---|---|---|---|", *shown]),
        more,
    ]


def _cell(text: str) -> str:
    """Escape and wrap a text for a column: Prefect's UI renders table cells as Markdown."""
    lines = textwrap.wrap(textwrap.shorten(text, _MAX_MESSAGE, placeholder=" ..."), _LINE)
    return "<br>".join(map(_escaped, lines))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*<\[\]|])", r"\\\1", printable(text))


def _headline(status: RunStatus) -> str:
    parts = [
        f"{status.num_done:,} of {status.num_computed:,} distinct sequences in checkpoints "
        f"({status.percent:.1f} %)"
    ]
    if status.tokens_per_s:
        parts.append(f"{status.tokens_per_s:,.0f} tokens/s")
    if status.eta_s is not None:
        parts.append(f"{format_duration(status.eta_s)} left")
    if status.num_quarantined:
        parts.append(f"{status.num_quarantined:,} in quarantine")
    return ", ".join(parts)


async def _harmless(
    what: str, request: Awaitable[Any], *, limit_s: float | None = _REQUEST_LIMIT_S
) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await request
    except Exception as error:
        logger.debug("%s: not shown: %r", what, error)
