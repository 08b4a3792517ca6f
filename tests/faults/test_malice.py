"""Malice: files that are forged, ids that would be paths, links that lead elsewhere."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import unicodedata
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import RUN, vouch_for
from tests.faults.compare import Outcome, assert_untouched, committed_files, outcome_of
from tests.faults.damage import copy_of, whole_run
from tests.faults.figures import record_figure
from tests.faults.forgery import archive, forgeries, good_content
from tests.faults.trials import call, scratch_directory
from tests.faults.workload import FASTA, config_for, run_to_the_end, write_fasta
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
from vnp_lib.checkpoint.survey import heal_shard, survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.dataset.reader import open_dataset, verify_dataset
from vnp_lib.errors import CheckpointError, ConfigError, StorageError
from vnp_lib.inputs.characters import INVISIBLE
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.run.assembly import assemble
from vnp_lib.run.directory import open_run
from vnp_lib.storage import durable
from vnp_lib.storage.durable import marker_path
from vnp_lib.storage.locks import FileLock
from vnp_lib.worker.supervisor import run_worker

# The fields of a marker that matches `good_content`.
GOOD_FIELDS = {"rows": 1, "ordinals": [0], "fingerprint": RUN}
ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
MEMORY_BYTES = 64 * 1024**2
MEMORY_PER_BYTE = 128  # `]` is a list of 56 bytes, and a place in the list around it
ALL = list(forgeries(Path("/nowhere/canary")))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory, as nothing here is about syncing."""
    directory = scratch_directory()
    yield directory
    shutil.rmtree(directory)


def peak_growth_bytes(act) -> int:
    """Return how much the peak memory of the process grew while `act` ran."""
    # Reset the peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    act()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def test_the_forger_can_forge(tmp_path):
    """A forged file with the right content is accepted: others are refused by their content."""
    path = tmp_path / "batch_00000.pt"
    path.write_bytes(archive(good_content()))
    vouch_for(path, **GOOD_FIELDS)
    assert load_checkpoint(path, fingerprint=RUN).sequence_ids == ["a"]


@pytest.mark.parametrize("has_marker", [True, False])
def test_no_forged_checkpoint_is_accepted_or_runs_code(scratch, has_marker):
    """The forger writes a matching marker too; the memory for the check is bounded."""
    canary = scratch / "canary"
    for number, (name, data) in enumerate(forgeries(canary)):
        run = scratch / f"{number}"
        path = run / "shard_0" / "batch_00000.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        if has_marker:
            vouch_for(path, **GOOD_FIELDS)

        growth_bytes = peak_growth_bytes(
            lambda run=run, path=path, name=name: _require_refusal(run, path, name)
        )

        assert growth_bytes < MEMORY_BYTES + MEMORY_PER_BYTE * len(data), (
            f"{name}: reading {len(data):,} bytes took {growth_bytes:,}"
        )
        assert not canary.exists(), name
    record_figure(
        f"forged .pt, {'with' if has_marker else 'without'} a marker that fits",
        len(ALL),
        "0 executed, 0 believed, 64 MiB or 128 times the file at most",
    )


def _require_refusal(run: Path, path: Path, name: str) -> None:
    has_marker = marker_path(path).exists()
    assert not _is_accepted(path), name
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid, name
    assert reason, name
    survey = survey_checkpoints(run, RUN, verify_digests=True)
    # A survey reads markers and digests, but no content.
    assert len(survey.damaged) == (not has_marker), name
    heal_shard(run, 0, RUN)
    assert path.exists() == has_marker, name
    resumed = resume_from_checkpoints(run, 0)
    assert resumed.embeddings is None, name
    assert not path.exists(), name


def _is_accepted(path: Path) -> bool:
    try:
        load_checkpoint(path, fingerprint=RUN)
    except CheckpointError:
        return False
    return True


FORGED_INTO_A_RUN = [
    "reduce to os.system, protocol 2, as a zip archive",
    "bytearray",
    "stride 0",
    "TorchScript",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*FORGED_INTO_A_RUN, "other ids", "ordinals of nobody", "ordinals in another order"]
)
def test_a_run_replaces_a_forged_checkpoint(trials, oracle, name):
    """Its marker matches, so that a resume, which reads digests only, accepts it at first."""
    template = trials.scratch / "forged" / "run"
    if not template.exists():
        trials.once(whole_run, template)
    trials.once(recover_from_forgery, template, name, oracle)


def recover_from_forgery(directory: Path, template: Path, name: str, oracle: Outcome) -> None:
    run_dir = copy_of(template, directory, with_dataset=False)
    path = RunPaths(run_dir).checkpoint(0, 1)
    ended = call(forge, path, name, directory / "canary")
    assert not ended.error, ended.error
    good = {
        path_: digest
        for path_, digest in committed_files(run_dir, oracle).items()
        if path.name not in path_.name
    }
    for _ in range(3):
        ended = call(run_to_the_end, run_dir)
        if ended.value:
            break
    assert ended.value, ended.error
    assert call(outcome_of, run_dir).value == oracle
    assert_untouched(good)
    assert not (directory / "canary").exists()


def forge(path: Path, name: str, canary: Path) -> None:
    """Replace a checkpoint by a forged file with a matching marker."""
    held = load_checkpoint(path, fingerprint=None)
    ordinals = held.metadata["ordinals"]
    path.unlink()
    marker_path(path).unlink()
    if name in FORGED_INTO_A_RUN:
        path.write_bytes(dict(forgeries(canary))[name])
        vouch_for(
            path,
            rows=len(ordinals),
            width=8,
            ordinals=ordinals,
            fingerprint=held.metadata["fingerprint"],
        )
        return
    changed = {
        "ordinals of nobody": [each + 10_000 for each in ordinals],
        "ordinals in another order": ordinals[::-1],
    }
    ids = [f"x{id_}" for id_ in held.sequence_ids] if name == "other ids" else held.sequence_ids
    with AsyncCheckpointWriter() as writer:
        metadata = held.metadata | {"ordinals": changed.get(name, ordinals)}
        writer.write_checkpoint_async(path, held.embeddings, ids, metadata)


def test_there_are_enough_forgeries():
    assert len(ALL) >= 40
    assert len({name for name, _ in ALL}) == len(ALL)


# --- ids ---


def hostile_ids(seed: int) -> list[str]:
    """Return ids that cause trouble as a path, a line, a command, a number or a pickle."""
    hostile = [
        "../../escape",
        "..",
        ".",
        "...",
        "/etc/passwd",
        "/tmp/escape",
        "~",
        "~root/x",
        "$HOME",
        "${HOME}",
        "`id`",
        "$(id)",
        ";rm -rf .",
        "|touch x",
        "&",
        "&&true",
        ">out",
        "<in",
        "*",
        "?",
        "[a-z]",
        "{a,b}",
        "!",
        "#",
        "%s%n",
        "%00",
        "\\",
        "\\\\host\\x",
        "C:\\x",
        "CON",
        "NUL",
        "PRN",
        "AUX",
        "COM1",
        "LPT1",
        "con.txt",
        "'",
        '"',
        "'; DROP TABLE x;--",
        '"""',
        "a,b",
        "a=b",
        "a:b",
        "-",
        "--help",
        "-rf",
        "+1",
        "=1+1",
        "@x",
        "x" * 300,
        "é" * 300,
        "\u202egpj.exe",
        "\u200b",
        "\u00a0x",
        "\ufeffx",
        "\u2028x",
        "e\u0301",
        "\u00e9",
        "\U0001f9ec",
        "\u4e2d\u6587",
        "\u0000",
        "a\0b",
        "a\nb",
        "a\r\nb",
        "a\tb",
        "\x1b[31m",
        "\x7f",
        "\b",
        "",
        " ",
        " x",
        "x ",
        "None",
        "null",
        "true",
        "NaN",
        "Infinity",
        "0",
        "-1",
        "1e999",
        "0x10",
        "1_000",
        "{}",
        "[]",
        '{"a":1}',
        "<a>",
        "&lt;",
        "http://x/?a=b",
        "file:///etc/passwd",
        "batch_00000.pt",
        "batch_00000.pt.done",
        "manifest.json",
        "_SUCCESS.json",
        "part-00000.parquet",
        ".tmp-x-host-1-00000000",
        "shard_0/batch_00001.pt",
        "cos\nsystem\n(S'true'\ntR.",
        "\x80\x02}q\x00.",
        "gASVHwAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU",
        "ordinal",
        "id",
        "embedding",
        "sequence_ids",
        "storage",
        "cpu",
        "little",
        "archive",
        "sp|P12345|NAME_HUMAN",
        "gi|1|ref|x|",
        "a" * 10_000,
        "\ud800"[:0] + "A\u030a",
        "İ",
        "ß",
        "ǅ",
    ]
    draw = random.Random(seed)
    planes = (
        range(0x20, 0x7F),
        range(0xA1, 0x250),
        range(0x590, 0x700),
        range(0x2000, 0x2070),
        range(0x4E00, 0x4F00),
        range(0x1F300, 0x1F600),
    )
    while len(hostile) < 260:
        plane = draw.choice(planes)
        hostile.append("".join(chr(draw.choice(plane)) for _ in range(draw.randint(1, 40))))
    return list(dict.fromkeys(hostile))


@pytest.fixture
def walled_in(tmp_path) -> Iterator[Path]:
    """Yield a run directory whose surroundings must not change."""
    outside = tmp_path / "outside"
    (outside / "a" / "run").mkdir(parents=True)
    before = _tree(tmp_path, but=outside / "a" / "run")
    yield outside / "a" / "run"
    assert _tree(tmp_path, but=outside / "a" / "run") == before
    assert not Path("/tmp/escape").exists()


def test_hostile_ids_given_to_the_writer_come_back_exactly(walled_in, seeds):
    (seed,) = seeds(1)
    # No file can hold the surrogates as text, but they are Python strings.
    ids = [*hostile_ids(seed), "\udc80", "\ud800"]
    path = RunPaths(walled_in).checkpoint(0, 0)
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path,
            torch.arange(len(ids) * 2.0).reshape(-1, 2),
            ids,
            {"ordinals": list(range(len(ids)))},
        )
    checkpoint = load_checkpoint(path, fingerprint=None)
    assert checkpoint.sequence_ids == ids, f"seed {seed}"
    assert sorted(each.name for each in walled_in.rglob("*") if each.is_file()) == [
        path.name,
        marker_path(path).name,
    ]
    assert resume_from_checkpoints(RunPaths(walled_in).checkpoints_dir, 0).ids == ids
    record_figure("hostile ids, given to the writer", len(ids), "0 written outside, all come back")


def test_hostile_ids_of_a_fasta_come_back_exactly(walled_in, seeds, tmp_path_factory):
    """An id ends at the first white space, is visible, and has no control characters."""
    (seed,) = seeds(1)
    margin = re.compile(f"^[{INVISIBLE}]|[{INVISIBLE}]$")
    ids = [
        each
        for each in hostile_ids(seed)
        if each.split() == [each]
        and not margin.search(each)
        and "Cc" not in map(unicodedata.category, each)
    ]
    fasta = tmp_path_factory.mktemp("input") / "hostile.fasta"
    draw = random.Random(seed)
    fasta.write_text(
        "".join(f">{each} ../{each}\n{''.join(draw.choices(ALPHABET, k=30))}\n" for each in ids),
        newline="",
    )
    paths = RunPaths(walled_in)
    model = ModelIdentity(model="m", weights_digest="w", layer=1, dtype="float32")
    plan = make_plan(paths, [fasta], model, num_shards=2, token_budget=512)

    for rank in range(plan.num_shards):
        _embed_by_id(plan, paths, rank)
    assemble(
        plan,
        paths,
        survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=True).valid,
    )

    assert verify_dataset(walled_in) == []
    dataset = open_dataset(walled_in)
    assert dataset.ids == ids, f"seed {seed}"
    assert all(dataset[each][0] == np.float32(zlib.crc32(each.encode())) for each in ids), (
        f"seed {seed}"
    )
    names = {each.relative_to(walled_in).parts[0] for each in walled_in.rglob("*")}
    assert names == {"plan", "checkpoints", "embeddings"}
    assert len(ids) >= 200
    record_figure(
        "hostile ids, through a FASTA to the dataset", len(ids), "0 written outside, all come back"
    )


def _embed_by_id(plan: RunPlan, paths: RunPaths, rank: int) -> None:
    ordinals = plan.shard_ordinals(rank)
    ids, _ = plan.fetch(ordinals)
    rows = torch.tensor([[float(np.float32(zlib.crc32(each.encode())))] * 2 for each in ids])
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            paths.checkpoint(rank, 0),
            rows,
            ids,
            {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint},
        )


def _tree(directory: Path, *, but: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for folder, folders, names in os.walk(directory):
        folders[:] = [each for each in folders if Path(folder, each) != but]
        for name in (*names, *folders):
            status = Path(folder, name).lstat()
            found[os.path.join(folder, name)] = (
                status.st_mode,
                0 if name in folders else status.st_size,
            )
    return found


# --- links ---


@pytest.fixture
def elsewhere(walled_in) -> Path:
    """Yield a directory with a file outside of the run directory, as the target of links."""
    outside = walled_in.parent.parent / "linked"
    outside.mkdir()
    (outside / "file").write_text("precious")
    yield outside
    assert [each.name for each in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "precious"
    shutil.rmtree(outside)


def write_row(path: Path) -> None:
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path, torch.ones(1, 2), ["a"], {"ordinals": [0], "fingerprint": RUN}
        )


@pytest.mark.parametrize("leads_to", ["file", "nowhere"])
def test_a_link_under_the_temporary_name_is_not_followed(
    walled_in, elsewhere, monkeypatch, leads_to
):
    """Even if its name was guessed."""
    monkeypatch.setattr(durable.uuid, "uuid4", lambda: uuid.UUID(int=7))
    path = RunPaths(walled_in).checkpoint(0, 0)
    path.parent.mkdir(parents=True)
    durable.temporary_path(path).symlink_to(elsewhere / leads_to)
    with pytest.raises(StorageError):
        write_row(path)
    assert not path.exists()


@pytest.mark.parametrize("leads_to", ["file", "nowhere"])
@pytest.mark.parametrize("link", ["checkpoint", "marker"])
def test_a_link_instead_of_a_checkpoint_is_not_followed(walled_in, elsewhere, link, leads_to):
    path = RunPaths(walled_in).checkpoint(0, 0)
    path.parent.mkdir(parents=True)
    (path if link == "checkpoint" else marker_path(path)).symlink_to(elsewhere / leads_to)
    heal_shard(RunPaths(walled_in).checkpoints_dir, 0, RUN)
    write_row(path)
    assert load_checkpoint(path, fingerprint=RUN).sequence_ids == ["a"]
    assert not path.is_symlink()
    assert not marker_path(path).is_symlink()


@pytest.mark.parametrize("leads_to", ["file", "nowhere"])
def test_a_link_instead_of_lock_manifest_or_plan_is_not_followed(walled_in, elsewhere, leads_to):
    paths = RunPaths(walled_in)
    paths.plan_dir.mkdir()
    paths.checkpoints_dir.mkdir()
    for link in (
        paths.run_lock,
        paths.manifest,
        paths.manifest.with_suffix(".lock"),
        paths.plan_json,
        paths.sequences,
    ):
        link.symlink_to(elsewhere / leads_to)
    with pytest.raises(OSError, match="symbolic"):
        FileLock(paths.run_lock, purpose="test").acquire(timeout_s=0)
    with pytest.raises(OSError, match="symbolic"):
        CheckpointManifest(paths.manifest).initialize(1, "", "")
    write_fasta(walled_in.parent.parent)
    model = ModelIdentity(model="m", weights_digest="w", layer=1, dtype="float32")
    make_plan(paths, [walled_in.parent.parent / FASTA], model, num_shards=1, token_budget=512)
    (walled_in.parent.parent / FASTA).unlink()
    assert not paths.plan_json.is_symlink()
    assert not paths.sequences.is_symlink()


@pytest.mark.parametrize(
    "name", ["plan", "checkpoints", "checkpoints/shard_0", "embeddings", ".assembly"]
)
def test_a_run_does_not_write_through_a_link_to_a_directory(walled_in, elsewhere, name):
    link = walled_in / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(ConfigError, match="is a link"), open_run(config_for(walled_in)):
        pass


def test_a_worker_does_not_log_through_a_link(walled_in, elsewhere):
    log = walled_in / "worker.log"
    log.symlink_to(elsewhere / "file")
    limits = {"startup_limit_s": 1.0, "silence_limit_s": 1.0, "grace_s": 1.0}
    with pytest.raises(OSError, match="symbolic"):
        asyncio.run(
            run_worker(Path("job.json"), device="cpu", log_path=log, on_event=None, **limits)
        )
