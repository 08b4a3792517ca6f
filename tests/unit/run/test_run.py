"""A run's directory: whose it is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fake_runs import finish_run, start_run
from tests.helpers import flip_bit, small_config
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.errors import (
    ConfigError,
    FastaError,
    FingerprintMismatchError,
    InputError,
    RunDirectoryBusyError,
)
from vnp_lib.failures import Failure, FailureCause, classify_exception
from vnp_lib.inference import gpu_memory
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.run.directory import attach_run, open_run, validate_config
from vnp_lib.storage import durable
from vnp_lib.storage.durable import read_sealed_json, write_sealed_json


def test_checking_for_a_running_run_blocks_none(tmp_path: Path, tiny_fasta: Path) -> None:
    """`vnp status` tries the lock for a moment."""
    config = small_config(tiny_fasta, tmp_path / "run")
    config.output_dir.mkdir()
    with (config.output_dir / "run.lock").open("w") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        looking = threading.Timer(0.1, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN))
        looking.start()
        with open_run(config):
            pass
        looking.join()


def test_a_second_run_is_refused_with_the_holder(tmp_path: Path, tiny_fasta: Path) -> None:
    """And the directory is free again when the first run ends."""
    config = small_config(tiny_fasta, tmp_path / "run")
    holder = f"process {os.getpid()} on .*, to run on this directory; waited 0 s"
    with open_run(config), pytest.raises(RunDirectoryBusyError, match=holder), open_run(config):
        pass
    with open_run(config):
        pass


@pytest.mark.parametrize(
    ("devices", "shards", "num_threads"),
    [
        ("cpu", 4, None),
        ("cpu,cpu", 2, 4),
        ("cpu,cpu", 1, None),
        ("cpu,cpu,cpu", 2, 4),
        ("cpu,cpu,cpu", 7, 2),
    ],
)
def test_concurrent_workers_share_the_cores(
    tmp_path, tiny_fasta, monkeypatch, devices, shards, num_threads
):
    monkeypatch.setattr("vnp_lib.run.run.num_cores", lambda: 8)
    with open_run(
        small_config(tiny_fasta, tmp_path / "run", devices=devices, shards=shards)
    ) as run:
        assert run.shard_job(0, "cpu").num_threads == num_threads


def test_a_shard_on_another_machine_has_all_its_cores(tmp_path, tiny_fasta, monkeypatch):
    monkeypatch.setattr(
        "vnp_lib.run.directory.resolve_devices", lambda devices, model: ("cpu", "cpu")
    )
    config = small_config(tiny_fasta, tmp_path / "run", devices="cpu", shards=None)
    with open_run(config) as run:
        joined = attach_run(config, run.plan.fingerprint)
    assert joined.devices == ("cpu",)
    assert joined.shard_job(0, "cpu").num_threads is None


def plan_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, *given: Any, **settings: Any
) -> int:
    """Open a run on a machine with one GPU, and give the token budget of its plan."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(gpu_memory, "free_gpu_bytes", lambda gpu: free_bytes)
    with open_run(small_config(*given, **{"devices": "0", "shards": None} | settings)) as run:
        return run.plan.token_budget


PLENTY, LITTLE, TOO_LITTLE = 80 * 10**9, 12 * 10**8, 10**9


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}])
def test_a_gpu_run_keeps_its_batches(tmp_path, tiny_fasta, monkeypatch, settings):
    """Also with too little memory for a new run: an earlier worker may still hold it."""
    run = (tiny_fasta, tmp_path / "run")
    assert plan_on_a_gpu(monkeypatch, LITTLE, *run, **settings) == 13_312
    for free_bytes in (PLENTY, LITTLE, TOO_LITTLE):
        assert plan_on_a_gpu(monkeypatch, free_bytes, *run, **settings) == 13_312
    assert plan_on_a_gpu(monkeypatch, PLENTY, *run, **settings, force_restart=True) == 65_536


def test_what_the_user_says_goes_before_what_memory_says(tmp_path, tiny_fasta, monkeypatch):
    run = (tiny_fasta, tmp_path / "run")
    assert plan_on_a_gpu(monkeypatch, TOO_LITTLE, *run, token_budget=700) == 700
    assert plan_on_a_gpu(monkeypatch, PLENTY, *run, token_budget=900) == 900
    assert plan_on_a_gpu(monkeypatch, PLENTY, *run) == 900


def test_a_model_too_large_for_the_gpu_is_refused(tmp_path, tiny_fasta, monkeypatch):
    """A model without room on the GPU is refused and leaves no directory."""
    with pytest.raises(ConfigError, match="does not fit into GPU 0"):
        plan_on_a_gpu(monkeypatch, TOO_LITTLE, tiny_fasta, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gpus_of_other_machines_are_not_looked_at(tmp_path, tiny_fasta, monkeypatch):
    settings = {"executor": "work-pool", "shards": 2}
    assert (
        plan_on_a_gpu(monkeypatch, TOO_LITTLE, tiny_fasta, tmp_path / "run", **settings) == 16_384
    )


def test_a_damaged_plan_does_not_say_how_many_tokens(tmp_path, tiny_fasta, monkeypatch):
    run = (tiny_fasta, tmp_path / "run")
    plan_on_a_gpu(monkeypatch, LITTLE, *run)
    plan_json = tmp_path / "run/plan/plan.json"
    plan_json.write_bytes(plan_json.read_bytes()[:-20])
    assert plan_on_a_gpu(monkeypatch, PLENTY, *run) == 65_536


def test_the_store_dtype_stays_unless_the_user_changes_it(tmp_path, tiny_fasta):
    """The run is the same one: what is computed does not depend on it."""

    def planned(**settings: Any) -> tuple[str, str]:
        with open_run(small_config(tiny_fasta, tmp_path / "run", **settings)) as run:
            return run.plan.store_dtype, run.plan.fingerprint

    begun = planned(store_dtype="float16")
    assert begun[0] == "float16"
    assert planned() == begun
    assert planned(store_dtype="float32") == ("float32", begun[1])
    assert planned() == ("float32", begun[1])
    assert planned(store_dtype="float16") == begun
    assert planned(force_restart=True) == ("float32", begun[1])


def test_a_dataset_without_checkpoints_keeps_its_dtype(tmp_path: Path) -> None:
    """Everything would be computed again. Nothing is changed, so that the old command resumes."""
    run = finish_run(start_run(tmp_path, num_sequences=12))
    run.assemble()

    def planned(**settings: Any) -> str:
        with open_run(small_config(tmp_path / "x.fasta", run.paths.run_dir, **settings)) as opened:
            return opened.plan.store_dtype

    assert planned(store_dtype="float16") == "float16"
    assert planned(store_dtype="float32") == "float32"
    shutil.rmtree(run.paths.checkpoints_dir)
    message = (
        r"--store-dtype float16: the dataset in .*embeddings is in float32, "
        r"and the checkpoints .* are gone"
    )
    with pytest.raises(ConfigError, match=message):
        planned(store_dtype="float16")
    assert planned() == "float32"
    assert planned(store_dtype="float32") == "float32"
    assert planned(store_dtype="float16", force_restart=True) == "float16"


def test_a_plan_without_a_store_dtype_is_float32(tmp_path, tiny_fasta):
    """It is of an earlier version."""
    config = small_config(tiny_fasta, tmp_path / "run")
    with open_run(config) as run:
        plan_json = run.paths.plan_json
    fields = read_sealed_json(plan_json)
    del fields["store_dtype"]
    write_sealed_json(plan_json, fields, replace=True)
    assert load_plan(run.paths).store_dtype == "float32"
    with open_run(config) as run:
        assert run.plan.store_dtype == "float32"


def test_default_outputs_keep_the_fingerprint(tmp_path: Path, tiny_fasta: Path) -> None:
    """Its identity is the same as before there were other outputs, so that old runs resume."""
    with open_run(small_config(tiny_fasta, tmp_path / "run")) as run:
        identity = dict(run.plan.identity)
    assert identity.pop("sequences_sha256")
    assert identity.pop("schema")
    assert identity == {
        "model": "esm2_t6_8M_UR50D",
        "weights_digest": "random:seed=0",
        "layer": 6,
        "pooling": "mean",
        "dtype": "float32",
        "long_policy": "whole",
        "num_sequences": 40,
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repr_layers": (-1,)}, {"layer": 6, "pooling": "mean", "long_policy": "whole"}),
        ({"repr_layers": (2,)}, {"layer": 2, "pooling": "mean"}),
        (
            {"include": ("bos", "mean")},
            {"layer": 6, "pooling": "mean,bos", "outputs": "mean_6,bos_6", "embed_dim": 320},
        ),
        ({"include": ("logits",)}, {"layer": 6, "pooling": "logits", "outputs": "logits"}),
        ({"long": "virnucpro"}, {"long_policy": "virnucpro"}),
        ({"long": "window", "max_length": 30}, {"long_policy": "window:30:7"}),
        ({"long": "window", "max_length": 30, "window_overlap": 0}, {"long_policy": "window:30:0"}),
    ],
)
def test_what_is_computed_is_part_of_what_a_run_is(
    tmp_path: Path, tiny_fasta: Path, settings, expected
) -> None:
    with open_run(small_config(tiny_fasta, tmp_path / "run", **settings)) as run:
        assert expected.items() <= run.plan.identity.items()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"repr_layers": (7,)},
            r"layers 7 are requested: this model has the layers 0 \(its embedding\) to 6",
        ),
        (
            {"long": "window", "max_length": 30, "window_overlap": 30},
            "windows of 30 residues overlap by less than that",
        ),
        (
            {"long": "window", "max_length": 30, "include": ("mean", "bos")},
            "it goes with --include mean alone",
        ),
        ({"long": "virnucpro", "include": ("per_tok",)}, "it goes with --include mean alone"),
    ],
)
def test_impossible_outputs_leave_no_directory(
    tmp_path: Path, tiny_fasta: Path, settings: dict[str, Any], reason: str
) -> None:
    """What cannot be computed is refused and leaves no directory."""
    with (
        pytest.raises(ConfigError, match=reason),
        open_run(small_config(tiny_fasta, tmp_path / "run", **settings)),
    ):
        pass
    assert not (tmp_path / "run").exists()


FAILED_ALONE = Failure(cause=FailureCause.NATIVE_CRASH, message="SIGSEGV")


def plan_and_quarantine(fasta: Path, run_dir: Path, ordinal: int) -> None:
    """Begin a run, and put a sequence of it in quarantine."""
    with open_run(small_config(fasta, run_dir)) as run:
        run.quarantine.add(
            QuarantinedSequence.of_failure(run.plan, ordinal, FAILED_ALONE, attempts=2)
        )


@pytest.mark.parametrize(
    "rewrite_plan",
    [
        lambda paths: [
            shutil.rmtree(directory) for directory in (paths.plan_dir, paths.checkpoints_dir)
        ],
        lambda paths: paths.plan_json.write_text("damaged"),
    ],
    ids=["plan and checkpoints removed", "a damaged plan"],
)
def test_the_quarantine_of_another_input_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rewrite_plan: Callable[[RunPaths], object]
) -> None:
    """Neither of the same ordinal nor of the same id; the old lines are kept, with a warning."""
    paths, fasta = RunPaths(tmp_path / "run"), tmp_path / "in.fasta"
    fasta.write_text(">a\nMKV\n>b\nMKVL\n>c\nMKVLA\n")
    plan_and_quarantine(fasta, paths.run_dir, 1)
    rewrite_plan(paths)
    fasta.write_text(">a\nMKV\n>b\nMKVW\n>c\nMKVLA\n")
    with open_run(small_config(fasta, paths.run_dir)) as run:
        assert run.quarantine.read() == []
        assert sum(state.num_done for state in run.all_shard_progress()) == 0
    assert '"id":"b"' in paths.superseded_quarantine.read_text()
    assert f"their lines are in {paths.superseded_quarantine}" in caplog.text


def test_the_quarantine_survives_a_rewritten_plan(tmp_path: Path, tiny_fasta: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    plan_and_quarantine(tiny_fasta, paths.run_dir, 7)
    paths.plan_json.write_text("damaged")
    with open_run(small_config(tiny_fasta, paths.run_dir, token_budget=90, shards=1)) as run:
        assert run.quarantine.ordinals() == {7}
    assert not paths.superseded_quarantine.exists()


def test_a_line_whose_sequence_is_another_sets_nothing_aside(
    tmp_path: Path, tiny_fasta: Path
) -> None:
    """Though it names this run, and its seal fits."""
    with open_run(small_config(tiny_fasta, tmp_path / "run")) as run:
        named = QuarantinedSequence.of_failure(run.plan, 7, FAILED_ALONE, attempts=2)
        run.quarantine.add(
            replace(named, sequence_sha256="0" * 64),
            QuarantinedSequence.of_failure(run.plan, 8, FAILED_ALONE, attempts=2),
        )
    with open_run(small_config(tiny_fasta, tmp_path / "run")) as run:
        assert Quarantine.of(run.plan, run.paths).ordinals() == {8}


@pytest.mark.parametrize("given", ["x.fasta", "*.fasta", "."])
def test_a_run_resumes_without_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    """Its plan holds every sequence: a spot machine's own disk need not come back. It is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "x.fasta").write_text(">a\nMKV\n>b\nMKL\n")
    config = small_config(Path("input", given), tmp_path / "run")
    with open_run(config) as run:
        begun = run.plan.fingerprint
    shutil.rmtree(tmp_path / "input")

    validate_config(config)
    with open_run(config) as run:
        assert (run.plan.fingerprint, run.plan.num_sequences) == (begun, 2)
        assert run.plan.fetch(np.array([0, 1])) == (["a", "b"], ["MKV", "MKL"])
    assert (
        "no longer exists: the run continues with the 2 sequences that were read before"
        in caplog.text
    )
    with open_run(small_config(Path("input", given), tmp_path / "run", shards=1)) as run:
        assert (run.plan.fingerprint, run.plan.num_shards) == (begun, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fasta": (Path("y.fasta"),)}, "there is no such file"),
        ({"fasta": (Path("x.fasta"), Path("y.fasta"))}, "there is no such file"),
        ({"force_restart": True}, "there is no such file"),
        (
            {"dtype": "bfloat16"},
            "belongs to another run .dtype is 'float32' there and 'bfloat16' here",
        ),
        (
            {"long": "truncate", "max_length": 9},
            "belongs to another run .long_policy is 'whole' there",
        ),
    ],
    ids=[
        "another file",
        "one more file",
        "a forced restart",
        "another precision",
        "another policy",
    ],
)
def test_missing_input_is_an_error_for_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.fasta").write_text(">a\nMKV\n>b\nMKL\n")
    config = small_config(Path("x.fasta"), tmp_path / "run")
    with open_run(config):
        pass
    Path("x.fasta").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "plan").iterdir()}
    with pytest.raises(InputError, match=message), open_run(config.model_copy(update=settings)):
        pass
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "plan").iterdir()} == before


@pytest.mark.parametrize("damaged", ["sequences.arrow", "representatives.npy", "plan.json"])
def test_input_that_is_gone_is_missed_where_the_plan_is_damaged(
    tmp_path: Path, damaged: str
) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text(">a\nMKV\n>b\nMKL\n")
    with open_run(small_config(fasta, tmp_path / "run")):
        pass
    fasta.unlink()
    flip_bit(tmp_path / "run" / "plan" / damaged)
    with (
        pytest.raises(FastaError, match="there is no such file"),
        open_run(small_config(fasta, tmp_path / "run")),
    ):
        pass


def test_input_that_is_there_is_read_whatever_the_plan_remembers(tmp_path: Path) -> None:
    """And one that comes from elsewhere, with the same sequences, is the same run's."""
    first, second = tmp_path / "x.fasta", tmp_path / "moved.fasta"
    first.write_text(">a\nMKV\n")
    with open_run(small_config(first, tmp_path / "run")) as run:
        begun = run.plan.fingerprint
    first.rename(second)
    with open_run(small_config(second, tmp_path / "run")) as run:
        assert run.plan.fingerprint == begun
    second.unlink()
    with open_run(small_config(second, tmp_path / "run")) as run:
        assert run.plan.fingerprint == begun
    second.write_text(">a\nMKL\n")
    with pytest.raises(FingerprintMismatchError), open_run(small_config(second, tmp_path / "run")):
        pass


def test_an_upgrade_with_the_same_numerics_resumes(tmp_path, tiny_fasta, monkeypatch):
    """Version 1 is not in the identity, so that runs from before it had a name resume."""
    config = small_config(tiny_fasta, tmp_path / "run")
    with open_run(config) as run:
        assert "numerics" not in run.plan.identity
        begun = run.plan
    monkeypatch.setattr("vnp_lib.plan.planner.__version__", "9.0")
    with open_run(config) as run:
        assert (run.plan.fingerprint, run.plan.vnp) == (begun.fingerprint, "9.0")
    monkeypatch.setattr("vnp_lib.run.resolve.NUMERICS_VERSION", 2)
    before = run.paths.plan_json.read_bytes()
    with pytest.raises(
        FingerprintMismatchError, match=r"numerics version 1, .* \(9\.0\) has version 2"
    ):
        open_run(config).__enter__()
    assert run.paths.plan_json.read_bytes() == before
    with open_run(small_config(tiny_fasta, tmp_path / "another")) as run:
        assert run.plan.identity["numerics"] == 2


def test_a_deterministic_run_refuses_another_torch(tmp_path, tiny_fasta, monkeypatch):
    """A deterministic run is refused with another torch or processor."""
    config = small_config(tiny_fasta, tmp_path / "run", deterministic=True)
    with open_run(config):
        pass
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(FingerprintMismatchError, match=r"torch 2.* there and .*torch 9\.9\.9"):
        open_run(config).__enter__()
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    with pytest.raises(FingerprintMismatchError, match=r"CPU \(ABACUS\)' here"):
        open_run(config).__enter__()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ("vnp_lib.run.directory.__version__", "9.0"),
            r"was opened by vnp 0\..* and this machine has vnp 9\.0",
        ),
        (
            ("vnp_lib.run.directory.NUMERICS_VERSION", 2),
            r"\(numbers of version 1\), and this machine has vnp .* \(version 2\)",
        ),
        (
            ("torch.backends.cpu.get_cpu_capability", lambda: "ABACUS"),
            r"but this machine has .*CPU \(ABACUS\)",
        ),
    ],
)
def test_a_machine_with_another_software_does_not_join(
    tmp_path, tiny_fasta, monkeypatch, change, reason
):
    config = small_config(tiny_fasta, tmp_path / "run", deterministic=True)
    with open_run(config) as run:
        attach_run(config, run.plan.fingerprint)
        monkeypatch.setattr(*change)
        with pytest.raises(InputError, match=reason):
            attach_run(config, run.plan.fingerprint)


def test_a_plan_that_does_not_say_who_opened_it_is_joined(tmp_path, tiny_fasta):
    with open_run(small_config(tiny_fasta, tmp_path / "run")) as run:
        fields = read_sealed_json(run.paths.plan_json)
        del fields["vnp"]
        write_sealed_json(run.paths.plan_json, fields, replace=True)
        assert attach_run(run.config, run.plan.fingerprint).plan.vnp == ""


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, OSError), (errno.EDQUOT, OSError), (errno.EACCES, ConfigError)],
)
def test_a_full_disk_is_no_wrong_set_up(
    tmp_path: Path,
    tiny_fasta: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
) -> None:
    """An attempt without space for its directory is retried; one without permission is not."""

    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    with open_run(small_config(tiny_fasta, tmp_path / "run")) as run:
        monkeypatch.setattr(durable.ops, "mkdir", refuse)
        with pytest.raises(error) as caught:
            run.prepare_shard(0)
        monkeypatch.undo()
    assert classify_exception(caught.value).is_permanent is (error is ConfigError)
