"""Tests of `vnp plan`: the estimate is what the run then is, and nothing is written."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from vnp_lib.cli import main
from vnp_lib.config import EmbedConfig
from vnp_lib.errors import ConfigError, ExitCode, FastaError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records, read_with_faults
from vnp_lib.inputs.records import CharacterCounts
from vnp_lib.inputs.sources import Source
from vnp_lib.model.esm2 import ESM2
from vnp_lib.options import EstimateConfig
from vnp_lib.plan.outputs import Output, RowLayout
from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, required_bytes
from vnp_lib.plan.planner import make_plan
from vnp_lib.report.estimate import RunEstimate, estimate_run
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import BatchComputed, WorkerEvent
from vnp_lib.run.history import read_attempts
from vnp_lib.worker.attempt import ShardAttempt, StopFlag

MODEL = "esm2_t6_8M_UR50D"
IDENTITY = ModelIdentity(model=MODEL, weights_digest="w", layer=6, dtype="float32")
GOOD = ">a\nMKVLATTWQERS\n>b\nMKVLAT\n>c again\nMKVLATTWQERS\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def seen_of(*fasta: Path, **settings) -> RunEstimate:
    return estimate_run(
        EstimateConfig(fasta=fasta, **{"model": MODEL, "devices": "cpu"} | settings)
    )


def write_history(
    run_dir: Path, fasta: Path, tokens_and_seconds: list[tuple[int, float]], model: str = MODEL
) -> None:
    paths = RunPaths(run_dir)
    make_plan(
        paths,
        [fasta],
        ModelIdentity(**asdict(IDENTITY) | {"model": model}),
        num_shards=1,
        token_budget=100,
    )
    paths.shard_dir(0).mkdir(parents=True)
    about = {"at": datetime(2026, 11, 21, tzinfo=UTC).isoformat(), "host": "h", "pid": 1}
    lines = [about | {"event": "started", "device": "cpu", "pending": 3}]
    lines += [
        about
        | {"event": "checkpoint", "number": number, "rows": 1, "tokens": tokens, "seconds": seconds}
        for number, (tokens, seconds) in enumerate(tokens_and_seconds)
    ]
    paths.history(0).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("num_shards", "token_budget"), [(1, 100), (3, 70), (7, 40)])
def test_a_run_is_as_estimated(
    tmp_path: Path, tiny_fasta: Path, num_shards: int, token_budget: int
) -> None:
    """The input has copies, two files, and sequences that are longer than the budget."""
    again = write(
        tmp_path / "again.fasta",
        tiny_fasta.read_text().replace(">protein_", ">copy_") + ">new\nMKV\n",
    )
    seen = seen_of(tiny_fasta, again, shards=num_shards, token_budget=token_budget)
    plan = make_plan(
        RunPaths(tmp_path / "run"),
        [tiny_fasta, again],
        IDENTITY,
        num_shards=num_shards,
        token_budget=token_budget,
    )
    tokens = [
        plan.num_tokens(batch) for rank in range(num_shards) for batch in plan.shard_batches(rank)
    ]
    assert (
        (seen.num_sequences, seen.num_computed)
        == (plan.num_sequences, plan.num_computed)
        == (81, 41)
    )
    assert (seen.num_residues, seen.num_tokens) == (plan.num_residues, plan.num_tokens(plan.order))
    assert (seen.num_shards, seen.num_batches) == (num_shards, len(tokens))
    assert seen.mean_fill == pytest.approx(np.minimum(np.array(tokens) / token_budget, 1).mean())
    assert (
        seen.num_over_budget == (plan.lengths[plan.order] + NUM_SPECIAL_TOKENS > token_budget).sum()
    )
    assert seen.required_bytes == required_bytes(plan, RowLayout((Output.parse("mean_6"),), 320))
    assert sum(each.count for each in seen.lengths) == 81
    assert seen.can_begin


def test_tokens_of_windows_are_those_of_the_passes(
    tmp_path: Path, tiny_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the forward passes, in the events, in the history, and by what is left."""
    passed: list[int] = []
    forward_packed = ESM2.forward_packed

    def counting(self: ESM2, input_ids: Tensor, *arguments: Any, **options: Any) -> dict[str, Any]:
        passed.append(input_ids.numel())
        return forward_packed(self, input_ids, *arguments, **options)

    monkeypatch.setattr(ESM2, "forward_packed", counting)
    windows = {
        "long": "window",
        "max_length": 20,
        "window_overlap": 9,
        "weights": "random",
        "token_budget": 300,
    }
    seen = seen_of(tiny_fasta, output_dir=tmp_path / "run", **windows)
    events = Reported()
    config = EmbedConfig(
        fasta=(tiny_fasta,),
        output_dir=tmp_path / "run",
        model=MODEL,
        devices="cpu",
        shards=1,
        **windows,
    )
    with open_run(config) as run:
        left = run.num_tokens_left(run.all_shard_progress())
        run.prepare_shard(0)
        assert ShardAttempt(run.shard_job(0, "cpu"), events, Unstoppable()).run() == ExitCode.DONE
        assert run.num_tokens_left(run.all_shard_progress()) == 0
        (attempt,) = read_attempts(run.paths, 0)
        plain = (
            int(run.plan.lengths[run.plan.order].sum()) + NUM_SPECIAL_TOKENS * run.plan.num_computed
        )
    in_checkpoints = sum(each.tokens for each in attempt.checkpoints)
    assert [sum(passed), sum(events.tokens), in_checkpoints, left] == [seen.num_tokens] * 4
    assert seen.num_tokens > 1.5 * plain


class Reported:
    """Keep the tokens of each batch that an attempt reports."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def send(self, event: WorkerEvent) -> None:
        if isinstance(event, BatchComputed):
            self.tokens.append(event.tokens)


class Unstoppable(StopFlag):
    def install(self) -> None:
        """Leave SIGTERM to pytest."""


def test_there_are_never_more_shards_than_sequences(tmp_path: Path) -> None:
    assert seen_of(write(tmp_path / "x.fasta", GOOD), shards=50).num_shards == 2


def test_lengths_fall_into_bins_that_grow(tmp_path: Path) -> None:
    lengths = [1, 49, 50, 99, 100, 399, 400]
    text = "".join(f">p{number}\n{'M' * length}\n" for number, length in enumerate(lengths))
    seen = seen_of(write(tmp_path / "x.fasta", text))
    assert [(each.least, each.most, each.count) for each in seen.lengths] == [
        (1, 49, 2),
        (50, 99, 2),
        (100, 199, 1),
        (200, 399, 1),
        (400, 799, 1),
    ]
    assert (seen.median_length, seen.longest) == (99.0, 400)


BAD = """>ok
MKXXJj*
>gap
MK-VL
>fine
mkvl
>empty

>stop
MK*VL
>
MKVL
"""


def test_refusals_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.fasta", BAD)
    seen = seen_of(path)
    assert (seen.num_sequences, seen.num_refused, seen.can_begin) == (2, 4, False)
    starts = [
        f"{path}, line 3: sequence 'gap' has '-' at position 3; gaps",
        f"{path}, line 7: sequence 'empty' has no residues",
        f"{path}, line 9: sequence 'stop' has '*' at position 3; a stop codon",
        f"{path}, line 11: a record has no id",
    ]
    for refusal, start in zip(seen.refusals, starts, strict=True):
        assert refusal.startswith(start)
    with pytest.raises(FastaError) as caught:
        list(read_records(Source(path=path, name=str(path)), InputPolicy()))
    assert str(caught.value).splitlines() == list(seen.refusals)


def test_normalised_characters_are_counted(tmp_path: Path) -> None:
    seen = seen_of(write(tmp_path / "x.fasta", ">a\nMKXXJj*\n>b\nmk v\nl*\n>c\nMKx\n"))
    assert seen.input.letters == CharacterCounts(
        unknown=3, read_as_unknown=2, lower_case=6, final_stops=2, white_space=1
    )


def test_input_is_seen_as_the_run_sees_it(tmp_path: Path) -> None:
    """A directory, a table, and every policy: the counts are those of the plan."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "1.fasta", BAD + ">ok\nMKVLATTWQERS\n")
    write(tmp_path / "in.csv", "id,sequence\nc,MKVLAT\nd,MKVLATTW\n")
    policy = {
        "invalid_residues": "skip",
        "duplicate_ids": "keep",
        "dedup": False,
        "long": "truncate",
        "max_length": 6,
    }
    fasta = (tmp_path / "in", tmp_path / "*.csv")
    seen = seen_of(*fasta, **policy)
    plan = make_plan(
        RunPaths(tmp_path / "run"),
        fasta,
        IDENTITY,
        num_shards=1,
        token_budget=100,
        policy=InputPolicy(**policy),
    )
    assert (
        (seen.num_sequences, seen.num_computed) == (plan.num_sequences, plan.num_computed) == (5, 5)
    )
    assert (plan.counts.num_skipped, plan.counts.num_cut) == (4, 2)
    assert (seen.input, seen.num_residues, seen.can_begin) == (plan.counts, plan.num_residues, True)


def test_a_pattern_without_a_match_is_refused(tmp_path: Path) -> None:
    seen = seen_of(tmp_path / "*.fa", write(tmp_path / "x.fasta", GOOD))
    assert (seen.num_sequences, seen.num_refused) == (3, 1)
    assert "nothing matches this pattern" in seen.refusals[0]


def test_an_id_that_occurs_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    """Line numbers are right after refused records, and in another file."""
    first = write(tmp_path / "1.fasta", ">bad\nMK-\n>a\nMKVL\n>b\nMKVL\n")
    second = write(tmp_path / "2.fasta", "\n>c\nMK\n>b too\nMKV\n")
    seen = seen_of(first, second)
    assert seen.num_refused == 2
    assert seen.refusals[1] == f"{second}, line 4: id 'b' is also in {first}, line 5"


def test_a_file_that_cannot_be_used_does_not_hide_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "good.fasta", GOOD)
    cut = tmp_path / "cut.fasta.gz"
    cut.write_bytes(gzip.compress(GOOD.encode() * 5000)[:-20])
    genome = write(tmp_path / "genome.fasta", ">contig\n" + "ACGT" * 100 + "\n")
    seen = seen_of(tmp_path / "nowhere.fasta", cut, genome, good)
    assert seen.num_sequences >= 3
    refusals = " ".join(seen.refusals)
    assert "there is no such file" in refusals
    assert "cut short or damaged" in refusals
    assert "looks like nucleotides" in refusals


def test_of_many_refusals_the_first_are_kept(tmp_path: Path) -> None:
    seen = seen_of(
        write(tmp_path / "x.fasta", "".join(f">p{number}\nMK-\n" for number in range(20_000)))
    )
    assert (seen.num_refused, len(seen.refusals), seen.num_sequences) == (20_000, 5, 0)
    assert "line 9:" in seen.refusals[4]


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_records_keep_their_numbers_over_chunks(tmp_path: Path, chunk_size: int) -> None:
    path = write(tmp_path / "bad.fasta", BAD)
    chunks = list(
        read_with_faults(Source(path=path, name=str(path)), InputPolicy(), chunk_size=chunk_size)
    )
    usable = [
        pair for chunk in chunks for pair in zip(chunk.records, chunk.usable.sequences, strict=True)
    ]
    assert usable == [(0, "MKXXXX"), (2, "MKVL")]
    assert [fault.record for chunk in chunks for fault in chunk.refused] == [1, 3, 4, 5]


def test_the_time_is_the_tokens_by_the_speed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", GOOD)
    assert seen_of(path, output_dir=tmp_path).expected_s is None
    assert seen_of(path, tokens_per_second=4.0).expected_s == (12 + 6 + 4) / 4.0


def test_the_speed_of_an_earlier_run_counts_for_each_device(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", GOOD)
    write_history(tmp_path / "run", path, [(100, 10.0), (300, 10.0)])
    for settings in ({"speed_of": tmp_path / "run"}, {"output_dir": tmp_path / "run"}):
        seen = seen_of(path, devices="cpu,cpu", **settings)
        assert seen.speed is not None
        assert (seen.speed.tokens_per_s, seen.expected_s) == (40.0, 22 / 40.0)


def test_speed_of_a_run_without_speed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", GOOD)
    write_history(tmp_path / "none", path, [])
    write_history(tmp_path / "other", path, [(1, 1.0)], model="esm2_t36_3B_UR50D")
    for run_dir, what in (
        ("none", "no checkpoint"),
        ("other", "says nothing about"),
        ("nowhere", "not a run directory"),
    ):
        with pytest.raises(ConfigError, match=what):
            seen_of(path, speed_of=tmp_path / run_dir)
        assert seen_of(path, output_dir=tmp_path / run_dir).speed is None


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "vnp_lib.report.estimate.shutil.disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    path = write(tmp_path / "x.fasta", GOOD)
    assert main(["plan", "--fasta", str(path), "--model", MODEL, "--devices", "cpu"]) == 1
    assert "the disk has no room" in capsys.readouterr().out


def test_the_command_prints_text_or_json_and_writes_nothing(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "x.fasta", GOOD)
    arguments = [
        "plan",
        "--fasta",
        str(path),
        "--model",
        MODEL,
        "--devices",
        "cpu",
        "--output-dir",
        str(tmp_path / "a" / "b"),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "3, 2 distinct " in text
    assert "1 duplicate not computed again " in text
    assert "      1 to      49  ████████████████████████████████████████ 3\n" in text
    assert "the run can start" in text
    assert main([*arguments, "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (estimate["num_sequences"], estimate["can_begin"]) == (3, True)
    assert estimate["input"]["num_duplicates"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_hostile_ids_do_not_reach_the_terminal(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "x.fasta", ">\x1b[2Jp[bold]\nMK-\n")
    assert main(["plan", "--fasta", str(path), "--model", MODEL, "--devices", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "[bold]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--fasta is required"),
        (("--fasta", "x", "--model", "gpt"), "--model"),
        (("--fasta", "x", "--tokens-per-second", "0"), "--tokens-per-second"),
        (
            ("--fasta", "x", "--devices", "cpu", "--speed-of", "/nowhere"),
            "/nowhere is not a run directory",
        ),
    ],
)
def test_an_unusable_option_is_refused_in_one_line(capsys, arguments, message) -> None:
    assert main(["plan", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_unknown_options_are_refused(capsys) -> None:
    for arguments in (
        ["plan", "--fasta", "x", "--nonsense"],
        ["status", "x", "--nonsense"],
        ["verify", "x", "--nonsense"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
        assert "--nonsense" in capsys.readouterr().err
