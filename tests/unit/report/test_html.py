"""Tests of `report.html`: self-contained, deterministic, safe, and available for any run."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.cli import main
from vnp_lib.errors import StorageError
from vnp_lib.failures import Failure, FailureCause, FailureKind
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.report import plots
from vnp_lib.report.html import render_report, write_report
from vnp_lib.run.history import Attempt, CheckpointEntry, Ending

MODEL = ModelIdentity(model="esm2_t6_8M_UR50D", weights_digest="w", layer=6, dtype="float32")
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>\"' onload=x \x1b[2J \u202e {{ 7 * 7 }}"


class Page(HTMLParser):
    """A page as a browser parses it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[str]:
        """The SVGs, decoded."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [
            base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
            for source in sources
        ]


def run_of(tmp_path: Path, num_shards: int, num_sequences: int = 40) -> tuple[RunPlan, RunPaths]:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(
        "".join(
            f">p{n}\n{'MKVLA' * (n % 7 + 1)}{'A' * (n % 50 + 1)}{'C' * (n // 50)}\n"
            for n in range(num_sequences)
        )
    )
    paths = RunPaths(tmp_path / "run")
    plan = make_plan(paths, [fasta], MODEL, num_shards=num_shards, token_budget=200)
    CheckpointManifest(paths.manifest).initialize(num_shards, plan.fingerprint, "w")
    return plan, paths


def line(minute: float, **fields: Any) -> str:
    at = NOON + timedelta(minutes=minute)
    return json.dumps({"at": at.isoformat(), "host": "h", "pid": 1} | fields) + "\n"


def write_history(
    paths: RunPaths, rank: int, *, num_checkpoints: int = 5, num_attempts: int = 2
) -> None:
    paths.shard_dir(rank).mkdir(parents=True, exist_ok=True)
    text = ""
    for attempt in range(num_attempts):
        start = attempt * 100.0 + rank
        text += line(start, event="started", number=attempt + 1, device="0", pending=9)
        for number in range(num_checkpoints):
            text += line(
                start + number + 1,
                event="checkpoint",
                number=number,
                rows=3,
                tokens=6000 + number,
                seconds=60.0,
            )
    paths.history(rank).write_text(text + line(num_attempts * 100.0, event="ended", ending="done"))


def record_failures(
    paths: RunPaths, rank: int, count: int, *, text: str = "worker process killed by SIGKILL"
) -> None:
    """Write all records in one change of the manifest."""
    manifest = CheckpointManifest(paths.manifest)
    failures = [
        Failure(cause=FailureCause.KILLED, message=f"{text} {number}").to_json()
        | {
            "at": (NOON + timedelta(seconds=number)).isoformat(),
            "reason": text,
            "device": "0",
            "session": "s",
        }
        for number in range(count)
    ]
    manifest._change(lambda state: state["shards"][str(rank)].update(failures=failures))


def page_of(plan: RunPlan, paths: RunPaths, now: datetime = NOON) -> Page:
    return Page(render_report(plan, paths, clock=lambda: now))


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    """It loads no script, style sheet, picture or font."""
    plan, paths = run_of(tmp_path, 2)
    write_history(paths, 0)
    page = page_of(plan, paths)
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "base",
        "form",
    } == set()
    assert all(
        (attributes.get("src") or "data:").startswith("data:") for _, attributes in page.tags
    )
    assert not any(
        name in {"href", "srcset"} or name.startswith("on")
        for _, found in page.tags
        for name in found
    )
    for svg in page.pictures:
        ElementTree.fromstring(svg)
        assert "http" not in re.sub(
            r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>',
            "",
            svg,
            flags=re.DOTALL,
        )


def test_equal_records_give_equal_pages(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 3)
    for rank in range(3):
        write_history(paths, rank)
    record_failures(paths, 1, 5)
    first = render_report(plan, paths, clock=lambda: NOON)
    assert render_report(plan, paths, clock=lambda: NOON) == first
    later = render_report(plan, paths, clock=lambda: NOON + timedelta(hours=1))
    assert later.replace("13:00:00", "12:00:00") == first


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    """Ids, messages and the name of the run directory are data."""
    directory = tmp_path / "<b>&amp;{{ x }}"
    directory.mkdir()
    plan, paths = run_of(directory, 1)
    record_failures(paths, 0, 1, text=HOSTILE)
    sequence = QuarantinedSequence(
        ordinal=3,
        id=HOSTILE,
        length=9,
        kind="poison_input",
        cause="native_crash",
        message=HOSTILE,
        attempts=2,
        at="2026",
        fingerprint=plan.fingerprint,
        sequence_sha256="",
    )
    Quarantine.of(plan, paths).add(sequence)
    page = page_of(plan, paths)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "b" not in {tag for tag, attributes in page.tags if attributes}
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.text.count(shown) == 4
    assert f"open_dataset({str(paths.run_dir)!r})" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


@pytest.mark.parametrize("num_shards", [1, 200])
def test_a_run_of_any_size_has_a_page(tmp_path: Path, num_shards: int) -> None:
    plan, paths = run_of(tmp_path, num_shards, num_sequences=400)
    for rank in range(plan.num_shards):
        write_history(paths, rank, num_checkpoints=3)
    record_failures(paths, 0, 180)
    record_failures(paths, plan.num_shards - 1, 180)
    page = page_of(plan, paths)
    # The run has no checkpoint file.
    assert len(page.pictures) == 4
    assert f"{num_shards} in all" in page.text
    newest = NOON + timedelta(seconds=179)
    assert newest.strftime("%H:%M:%S") in page.text
    if num_shards == 200:
        assert "360 failures: the newest 200 are shown" in page.text
        assert len(page.text) < 60_000


def test_a_run_without_any_records_has_a_page(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 2)
    page = page_of(plan, paths)
    assert len(page.pictures) == 2
    for text in (
        "No attempts are recorded",
        "No checkpoints are recorded",
        "No checkpoints.",
        "not assembled yet",
    ):
        assert text in page.text


@pytest.mark.parametrize(
    "damage",
    [lambda paths: paths.manifest.write_text("{"), lambda paths: paths.quarantine.write_text("{")],
)
def test_what_cannot_be_read_is_a_note(
    tmp_path: Path, damage: Callable[[RunPaths], object]
) -> None:
    plan, paths = run_of(tmp_path, 2)
    damage(paths)
    assert "Note: " in page_of(plan, paths).text


def test_the_page_has_the_counts_of_the_run(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 1)
    write_history(paths, 0, num_attempts=3)
    record_failures(paths, 0, 2)
    ordinals = plan.shard_ordinals(0)[:10]
    with AsyncCheckpointWriter(manifest=CheckpointManifest(paths.manifest), rank=0) as writer:
        metadata = {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint}
        writer.write_checkpoint_async(
            paths.checkpoint(0, 0), torch.ones(10, 4), plan.ids(ordinals), metadata
        )
    page = page_of(plan, paths)
    tiles = re.sub(r"\s+", " ", page.text)
    assert "25.0 %10 of 40 distinct sequences" in tiles
    assert "3attempts" in tiles
    assert "2failures" in tiles
    assert "in checkpoints: 1" in tiles
    assert plan.fingerprint in page.text
    assert len(page.pictures) == 5


def test_the_page_has_the_changes_to_the_input(tmp_path: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(f">a\n{'MKV' * 20}\n>b\nMK1\n")
    policy = InputPolicy(invalid_residues="skip", long="window", max_length=40)
    paths = RunPaths(tmp_path / "run<b>")
    plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=200, policy=policy)
    changes = (
        "1 record skipped, 1 sequence averaged over windows; skipped records are listed in "
        f"{paths.skipped}."
    )
    assert f"Input: {changes}" in page_of(plan, paths).text
    assert "Input:" not in page_of(*run_of(tmp_path / "run<b>", 1)).text


def test_shards_of_an_earlier_division_are_in_the_picture(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 1)
    manifest = CheckpointManifest(paths.manifest)
    manifest.open_or_rebuild(5, plan.fingerprint, "w", [])
    manifest.start_attempt(4, device="0")
    manifest.open_or_rebuild(1, plan.fingerprint, "w", [])
    write_history(paths, 4)
    record_failures(paths, 4, 1)
    page = page_of(plan, paths)
    assert "1 failure." in page.text
    assert len(page.pictures) == 4


def test_the_page_replaces_an_earlier_page_or_link(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 1)
    (tmp_path / "mine").write_text("mine")
    paths.report.symlink_to(tmp_path / "mine")
    for _ in range(2):
        assert write_report(plan, paths, clock=lambda: NOON) == paths.report
        assert paths.report.read_text() == render_report(plan, paths, clock=lambda: NOON)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    plan, paths = run_of(tmp_path, 1)
    paths.report.mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(plan, paths)


def test_the_command_prints_where_the_page_is(tmp_path: Path, capsys) -> None:
    _, paths = run_of(tmp_path, 1)
    assert main(["report", str(paths.run_dir)]) == 0
    assert capsys.readouterr().out == f"{paths.report}\n"
    assert paths.report.read_text().startswith("<!doctype html>")
    paths.report.unlink()
    paths.report.mkdir()
    assert main(["report", str(paths.run_dir)]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def attempt(
    *, ending: Ending, kind: str | None = None, seconds: float = 60.0, num_checkpoints: int = 0
) -> Attempt:
    entries = (
        CheckpointEntry(at=NOON, number=n, rows=1, tokens=100, seconds=1.0)
        for n in range(num_checkpoints)
    )
    return Attempt(
        rank=0,
        number=1,
        device="0",
        host="h",
        pid=1,
        started_at=NOON,
        pending=1,
        checkpoints=tuple(entries),
        ended_at=NOON + timedelta(seconds=seconds),
        ending=ending,
        kind=kind,
    )


def svg_of(address: str | None) -> str:
    assert address is not None
    return base64.b64decode(address.partition(",")[2]).decode()


@pytest.mark.parametrize(
    ("ending", "kind", "label"),
    [(ending, None, str(ending)) for ending in Ending]
    + [(Ending.LOST, str(kind), str(kind).replace("_", " ")) for kind in FailureKind]
    + [(Ending.LOST, "of a later version", "lost")],
)
def test_an_attempt_has_the_colour_of_its_outcome(
    ending: Ending, kind: str | None, label: str
) -> None:
    svg = svg_of(plots.attempts_over_time([attempt(ending=ending, kind=kind)], [0]))
    assert f">{label}</text>" in svg
    assert plots.COLOURS[kind if kind in plots.COLOURS else ending] in svg  # type: ignore[index]


def test_an_attempt_that_took_no_time_can_be_seen() -> None:
    svg = svg_of(plots.attempts_over_time([attempt(ending=Ending.LOST, seconds=0.0)], [0]))
    assert plots.COLOURS[Ending.LOST] in svg


def test_pictures_do_not_grow_with_the_run() -> None:
    """A line of a hundred thousand checkpoints has as many points as one of some hundreds."""
    short = plots.speed_over_time([attempt(ending=Ending.DONE, num_checkpoints=300)])
    long = plots.speed_over_time([attempt(ending=Ending.DONE, num_checkpoints=100_000)])
    many = plots.speed_over_time([attempt(ending=Ending.DONE, num_checkpoints=30)] * 500)
    assert len(svg_of(long)) < 2 * len(svg_of(short))
    assert len(svg_of(many)) < 500_000


def test_sequences_of_one_length_have_a_histogram() -> None:
    assert "sequences" in svg_of(plots.lengths_histogram(np.array([166, 166], dtype=np.int32)))
    assert "sequences" in svg_of(plots.lengths_histogram(np.array([1], dtype=np.int32)))


@pytest.mark.parametrize(
    "seconds",
    [1, 45, 61, 299, 3_599, 5 * 3_600 - 9, 100_000, 5 * 86_400 - 900, 40 * 86_400, 900 * 86_400],
)
def test_a_run_of_any_duration_has_its_times(seconds: int) -> None:
    """Matplotlib gives no warning, which would be an error here, and there are 2 to 9 ticks."""
    svg = svg_of(plots.attempts_over_time([attempt(ending=Ending.DONE, seconds=seconds)], [0]))
    assert 2 <= len(re.findall(r'id="xtick_\d+"', svg)) <= 9


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"MPLCONFIGDIR": "/proc/none", "MPLBACKEND": "TkAgg"}, 0, ""),
        ({"MPLBACKEND": "module://not_installed"}, 0, ""),
        ({"MATPLOTLIBRC": "{rc}"}, 0, ""),
        ({"MPLBACKEND": "NoSuchBackend"}, 2, "Matplotlib cannot be used"),
    ],
)
def test_settings_of_matplotlib_are_ignored(
    tmp_path: Path, variables, code: int, message: str
) -> None:
    """Broken caches, back ends and settings give no output, or one line if it cannot be used."""
    _, paths = run_of(tmp_path, 1)
    rc = tmp_path / "matplotlibrc"
    rc.write_text("no.such.setting: 1\nfigure.facecolor: black\nsvg.fonttype: path\n")
    environment = os.environ | {name: value.format(rc=rc) for name, value in variables.items()}
    ended = subprocess.run(
        [sys.executable, "-m", "vnp_lib", "report", paths.run_dir],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr if message else ended.stderr == ""
    assert "Traceback" not in ended.stderr
