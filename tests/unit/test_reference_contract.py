"""Tests that code for VirNucPro's checkpoints runs on ours: signatures, files, models."""

from __future__ import annotations

import inspect
import io
import pickle
import pickletools
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import content_by_hand, vouch_for, write_by_hand
from vnp_lib.checkpoint import (
    AsyncCheckpointWriter,
    CheckpointTrigger,
    resume_from_checkpoints,
    validate_checkpoint_pt,
)
from vnp_lib.checkpoint.array_pickle import require_plain_arrays
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.errors import CheckpointWriteError
from vnp_lib.inference import AsyncInferenceRunner
from vnp_lib.inference.runner import RESUMED
from vnp_lib.manifest import CheckpointManifest
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.run.job import ShardJob
from vnp_lib.storage.durable import marker_path
from vnp_lib.worker.attempt import _checkpoint_thresholds

REQUIRED = inspect.Parameter.empty


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        (
            CheckpointTrigger,
            {"seq_threshold": 10000, "time_threshold_sec": 300.0, "emergency_override_sec": 600.0},
        ),
        (CheckpointTrigger.should_checkpoint, {"self": REQUIRED, "batch_size": REQUIRED}),
        (AsyncCheckpointWriter, {"max_workers": 1, "manifest": None, "rank": None}),
        (
            AsyncCheckpointWriter.write_checkpoint_async,
            dict.fromkeys(
                ["self", "checkpoint_path", "embeddings", "sequence_ids", "metadata"], REQUIRED
            ),
        ),
        (
            AsyncCheckpointWriter._write_checkpoint_sync,
            dict.fromkeys(
                ["self", "checkpoint_path", "embeddings", "sequence_ids", "metadata"], REQUIRED
            ),
        ),
        (AsyncCheckpointWriter.wait_all, {"self": REQUIRED, "timeout": None}),
        (
            resume_from_checkpoints,
            {
                "checkpoint_dir": REQUIRED,
                "rank": REQUIRED,
                "force_restart": False,
                "manifest": None,
            },
        ),
        (CheckpointManifest, {"manifest_path": REQUIRED, "staleness_threshold_sec": 600}),
        (
            CheckpointManifest.initialize,
            {
                "self": REQUIRED,
                "world_size": REQUIRED,
                "input_fingerprint": "",
                "model_config_hash": "",
            },
        ),
        (
            CheckpointManifest.update_shard_checkpoint,
            dict.fromkeys(
                ["self", "rank", "batch_idx", "num_sequences", "checkpoint_file"], REQUIRED
            ),
        ),
        (CheckpointManifest.mark_shard_complete, {"self": REQUIRED, "rank": REQUIRED}),
        (
            CheckpointManifest.mark_shard_failed,
            {"self": REQUIRED, "rank": REQUIRED, "error": REQUIRED},
        ),
        (
            CheckpointManifest.record_redistribution,
            {"self": REQUIRED, "failed_rank": REQUIRED, "new_rank": REQUIRED},
        ),
        (
            AsyncInferenceRunner,
            {
                "model": REQUIRED,
                "device": REQUIRED,
                "enable_streams": True,
                "checkpoint_dir": None,
                "rank": 0,
                "checkpoint_seq_threshold": 10000,
                "checkpoint_time_threshold": 300.0,
                "manifest": None,
                "input_fingerprint": "",
                "model_config_hash": "",
            },
        ),
        (
            AsyncInferenceRunner.run,
            {
                "self": REQUIRED,
                "dataloader": REQUIRED,
                "progress_callback": None,
                "force_restart": False,
            },
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_are_those_of_the_contract(
    called: Callable[..., Any], expected: dict[str, Any]
) -> None:
    """By name, by position and by default; what we add can only be given by name."""
    parameters = inspect.signature(called).parameters.values()
    by_position = {
        each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD
    }
    assert by_position == expected
    assert list(by_position) == list(expected)


def test_a_validated_path_may_be_given_by_position() -> None:
    inspect.signature(validate_checkpoint_pt).bind(Path("batch_00000.pt"))


# --- the manifest ---


def test_a_manifest_is_initialized_by_its_number_of_shards_alone(tmp_path: Path) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    manifest.initialize(world_size=2)
    manifest.update_shard_checkpoint(
        rank=0, batch_idx=5, num_sequences=100, checkpoint_file="batch_00005.pt"
    )
    assert manifest.get_shard_status(0)["total_sequences"] == 100
    assert manifest.get_resumable_shards() == [0, 1]


# --- the trigger ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (5000, 180.0)),
        ({"seq_threshold": 999}, (999, 300.0)),
        ({"seq_threshold": 10_000}, (10_000, 300.0)),
        ({"time_threshold_sec": 99.0}, (10_000, 99.0)),
        ({"time_threshold_sec": 300.0}, (10_000, 300.0)),
        ({"emergency_override_sec": 700.0}, (5000, 180.0)),
    ],
)
def test_viral_mode_is_for_who_gives_no_threshold(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: tuple[int, float]
) -> None:
    """An explicit one stands, even the default's number; the other keeps its usual default."""
    monkeypatch.setenv("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "true")
    trigger = CheckpointTrigger(**given)
    assert (trigger.seq_threshold, trigger.time_threshold_sec) == expected


@pytest.mark.parametrize(
    ("seq_threshold", "time_threshold", "expected"),
    [(10_000, 300.0, (5000, 180.0)), (10, 300.0, (10, 300.0)), (10_000, 20.0, (10_000, 20.0))],
)
def test_viral_mode_reaches_a_run_with_defaults(
    monkeypatch: pytest.MonkeyPatch,
    seq_threshold: int,
    time_threshold: float,
    expected: tuple[int, float],
) -> None:
    """Viral mode reaches a run that is configured with the defaults."""
    monkeypatch.setenv("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "true")
    job = ShardJob.model_construct(
        checkpoint_seq_threshold=seq_threshold, checkpoint_time_threshold=time_threshold
    )
    trigger = AsyncInferenceRunner(RequiresLayers(), "cpu", **_checkpoint_thresholds(job))._trigger
    assert (trigger.seq_threshold, trigger.time_threshold_sec) == expected


# --- the writer ---


class Moved(Tensor):
    """Counts what brings it to the CPU, and where that is called."""

    calls: list[tuple[str, str]] = []

    def to(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append(("to", threading.current_thread().name))
        return torch.ones(2, 3).to(*arguments, **options)

    def cpu(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append(("cpu", threading.current_thread().name))
        return torch.ones(2, 3)


def test_a_tensor_comes_to_the_cpu_once_and_by_the_caller(tmp_path: Path) -> None:
    Moved.calls.clear()
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            tmp_path / "a.pt", torch.zeros(2, 3).as_subclass(Moved), ["a", "b"], {}
        )
    assert Moved.calls == [("to", threading.current_thread().name)]
    assert (load_checkpoint(tmp_path / "a.pt", fingerprint=None).embeddings == 1).all()


def test_a_method_put_on_the_tensor_itself_is_what_is_called(tmp_path: Path) -> None:
    """A stand-in for a GPU tensor: `to` accepts a device only, and `numpy` follows."""
    tensor, steps = torch.zeros(2, 3), []
    arrived = torch.ones(2, 3)

    def to(device: str) -> Tensor:
        steps.append(f"to {device}")
        return arrived

    def numpy() -> Any:
        steps.append("numpy")
        return np.ones((2, 3), dtype=np.float32)

    arrived.numpy = numpy  # type: ignore[method-assign]
    tensor.to = to  # type: ignore[assignment, method-assign]
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "a.pt", tensor, ["a", "b"], {})
    assert steps == ["to cpu", "numpy"]


def test_a_mock_of_a_tensor_is_taken_as_one(tmp_path: Path) -> None:
    mock = MagicMock(spec=Tensor)
    mock.to.return_value.numpy.return_value = np.ones((2, 3), dtype=np.float32)
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "a.pt", mock, ["a", "b"], {})
    mock.to.assert_called_once_with("cpu")
    assert load_checkpoint(tmp_path / "a.pt", fingerprint=None).embeddings.shape == (2, 3)


def test_a_failing_save_is_raised_once_when_waiting(tmp_path: Path) -> None:
    """Not by the next checkpoint, which is written; closing the writer does not raise it again."""
    save, calls = torch.save, []

    def fail_first(content: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise OSError("simulated")
        save(content, file)

    writer = AsyncCheckpointWriter()
    with patch("vnp_lib.checkpoint.torch.save", side_effect=fail_first):
        first = writer.write_checkpoint_async(
            tmp_path / "batch_00000.pt", np.ones((1, 2)), ["a"], {"batch_idx": 0}
        )
        assert first.exception(timeout=30) is not None
        writer.write_checkpoint_async(
            tmp_path / "batch_00001.pt", np.ones((1, 2)), ["b"], {"batch_idx": 1}
        )
        with pytest.raises(
            RuntimeError, match=r"^1 checkpoint write\(s\) failed: .*batch_00000.pt.*simulated"
        ):
            writer.wait_all()
    writer.shutdown()
    assert len(calls) == 2
    assert validate_checkpoint_pt(tmp_path / "batch_00001.pt") == (True, "")


def test_a_save_that_calls_itself_ends_as_a_failure(tmp_path: Path) -> None:
    """A stand-in that calls the name that it replaces recurses.

    That is the error of its write, and the writer's thread survives it.
    """

    def call_again(content: Any, file: Any) -> None:
        torch.save(content, file)

    writer = AsyncCheckpointWriter()
    with patch("vnp_lib.checkpoint.torch.save", side_effect=call_again):
        for name in ("a.pt", "b.pt"):
            writer.write_checkpoint_async(tmp_path / name, np.ones((1, 2)), ["a"], {})
        with pytest.raises(RuntimeError, match=r"2 checkpoint write\(s\) failed"):
            writer.wait_all()
    writer.write_checkpoint_async(tmp_path / "c.pt", np.ones((1, 2)), ["a"], {})
    with pytest.raises(CheckpointWriteError):
        writer.wait_all()
    writer.shutdown()
    assert [path.name for path in sorted(tmp_path.glob("*.done"))] == ["c.pt.done"]


def test_a_name_unknown_to_the_manifest_costs_nothing(tmp_path: Path) -> None:
    """A manifest that a name says nothing to costs no checkpoint."""
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    manifest.initialize(1)
    with AsyncCheckpointWriter(manifest=manifest, rank=0) as writer:
        writer.write_checkpoint_async(tmp_path / "valid.pt", np.ones((1, 2)), ["a"], {})
    assert validate_checkpoint_pt(tmp_path / "valid.pt") == (True, "")


# --- files by other hands ---

ARRAYS = {
    "float16": np.arange(12, dtype=np.float16).reshape(3, 4),
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "float64": np.arange(12, dtype=np.float64).reshape(3, 4),
    "int64": np.arange(12).reshape(3, 4),
    "big-endian": np.arange(12, dtype=">f4").reshape(3, 4),
    "Fortran order": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "every second": np.arange(24, dtype=np.float32).reshape(3, 8)[:, ::2],
    "reversed": np.arange(12, dtype=np.float32).reshape(3, 4)[::-1],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("is_writeable", [True, False], ids=["", "read-only"])
def test_a_checkpoint_with_a_numpy_array_validates_and_resumes(
    tmp_path: Path, array: np.ndarray[Any, Any], is_writeable: bool
) -> None:
    array = array[:]
    array.flags.writeable = is_writeable
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(
        path, content_by_hand(embeddings=array, metadata={"batch_idx": 0, "num_sequences": 3})
    )
    assert validate_checkpoint_pt(path) == (True, "")
    ids, embeddings, resume_batch_idx, corrupted_ids = resume_from_checkpoints(tmp_path, rank=0)
    assert (ids, resume_batch_idx, corrupted_ids) == (["s0", "s1", "s2"], 1, [])
    assert embeddings is not None
    np.testing.assert_array_equal(embeddings, array)


def test_a_vouched_for_checkpoint_with_a_numpy_array_loads(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand(embeddings=ARRAYS["float32"]))
    vouch_for(path)
    np.testing.assert_array_equal(
        load_checkpoint(path, fingerprint=None).embeddings, ARRAYS["float32"]
    )


def test_ids_of_an_unused_numpy_checkpoint_are_returned(tmp_path: Path) -> None:
    """The ids of an unused checkpoint with a NumPy array come back."""
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand(embeddings=ARRAYS["float64"]))
    marker_path(path).unlink()
    assert resume_from_checkpoints(tmp_path, 0).corrupted_ids == ["s0", "s1", "s2"]


def test_arrays_of_numpy_1_are_read(tmp_path: Path) -> None:
    """It names the module without an underscore."""
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand(embeddings=ARRAYS["float32"]))
    rewrite_pickle(
        path, lambda data: data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    )
    assert validate_checkpoint_pt(path) == (True, "")


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Save an archive like the one that is there, with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embeddings": np.ones((10, 4))}, ["shape mismatch", "10", "3"]),
        ({"embeddings": np.ones(3)}, ["shape mismatch"]),
        ({"embeddings": np.ones((3, 2, 2))}, ["shape mismatch"]),
        ({"embeddings": np.ones((3, 0))}, ["failed to load"]),
        ({"embeddings": np.array([[1.0, np.nan]] * 3)}, ["not finite"]),
        ({"embeddings": np.array([["a"], [1], [None]], dtype=object)}, ["failed to load", "'O8'"]),
        ({"embeddings": np.array([["a"], ["b"], ["c"]])}, ["failed to load", "'U1'"]),
        ({"embeddings": np.ones((3, 2), dtype=np.complex64)}, ["failed to load", "'c8'"]),
        ({"embeddings": np.zeros(3, dtype=[("a", "f4"), ("b", "f4")])}, ["failed to load"]),
        ({"embeddings": np.ones((3, 2), dtype=bool)}, ["failed to load", "'b1'"]),
        ({"embeddings": np.zeros((3, 2), dtype="M8[s]")}, ["failed to load"]),
        ({"embeddings": np.ma.masked_array(np.ones((3, 2)))}, ["failed to load", "numpy.ma"]),
        ({"sequence_ids": np.array(["a", "b", "c"])}, ["failed to load"]),
        ({"metadata": {"batch_idx": np.int64(3)}}, ["failed to load", "multiarray scalar"]),
    ],
    ids=lambda value: "",
)
def test_numpy_content_that_is_no_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    """What is no checkpoint of numbers is refused in the known words."""
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand(**changes))
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert [word for word in words if word not in reason] == []


def test_a_pickle_of_another_protocol_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    path.parent.mkdir()
    torch.save(content_by_hand(embeddings=ARRAYS["float32"]), path, pickle_protocol=4)
    marker_path(path).touch()
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason.startswith("failed to load: its pickle has protocol 4")


def test_missing_keys_with_a_numpy_array_are_named(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "missing_keys.pt", {"embeddings": np.ones((5, 32))})
    is_valid, reason = validate_checkpoint_pt(tmp_path / "missing_keys.pt")
    assert (is_valid, reason) == (False, "missing required keys: sequence_ids, metadata")


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


_reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "trap",
    [
        Calls(_reconstruct, np.ndarray, (10**12,), b"b"),
        Calls(_reconstruct, np.matrix, (0,), b"b"),
        Calls(np.ndarray, (10**12,)),
        Calls(np.dtype, "O", False, True),
        Calls(np.dtype, "V1000000000", False, True),
        Calls(np.dtype, "(100000,100000)f8", False, True),
        Calls(np.load, "/etc/passwd"),
    ],
    ids=["huge", "subclass", "ndarray", "object", "void", "subarray", "np.load"],
)
def test_reconstructors_build_arrays_of_numbers_only(tmp_path: Path, trap: Calls) -> None:
    """With a good array too, which makes them known."""
    path = checkpoint_path(tmp_path, 0, 0)
    for content in (
        content_by_hand(embeddings=trap),
        content_by_hand(embeddings=ARRAYS["float32"], metadata=trap),
    ):
        write_by_hand(path, content)
        assert "failed to load" in validate_checkpoint_pt(path)[1]
        path.unlink()


@pytest.mark.parametrize("codec", ["punycode", "utf-32", "rot13"])
def test_bytes_come_from_latin_1_only(codec: str) -> None:
    """Other codecs can take for ever, or give more than they got."""
    pickled = io.BytesIO()
    pickle.Pickler(pickled, protocol=2).dump(np.ones(3))
    data = pickled.getvalue().replace(
        b"X\x06\x00\x00\x00latin1", b"X" + bytes([len(codec), 0, 0, 0]) + codec.encode()
    )
    assert codec.encode() in data
    with pytest.raises(ValueError, match="_codecs encode"):
        require_plain_arrays(data)


def test_an_array_larger_than_its_bytes_is_not_built() -> None:
    """An array that claims more values than its bytes hold is not built."""
    data = pickle.dumps(np.arange(6, dtype=np.float32).reshape(2, 3), protocol=2)
    claims_more = data.replace(b"K\x02K\x03\x86", b"K\x02K\xff\x86")
    assert claims_more != data
    with pytest.raises(ValueError, match="does not fit it"):
        require_plain_arrays(claims_more)


def test_damage_makes_no_array_larger_than_its_bytes() -> None:
    """The check of the pickle raises ValueError, or the result is no larger than the pickle."""
    whole = pickle.dumps(np.arange(6, dtype=np.float32).reshape(2, 3), protocol=2)
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[random.integers(2, len(whole) - 1)] = random.integers(256)
        try:
            operations = list(pickletools.genops(bytes(damaged)))
        except ValueError:
            continue
        assert operations[-1][0].name == "STOP"
        try:
            require_plain_arrays(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 100
    require_plain_arrays(whole)


# --- models by other hands ---

WIDTH = 5
LENGTHS = [3, 7, 1, 4]


def states_of(input_ids: Tensor) -> Tensor:
    return input_ids[..., None].float() * 10 + torch.arange(WIDTH)


class RequiresLayers:
    """As VirNucPro's stand-ins: `repr_layers` has no default, and both ways in are there."""

    def __init__(self, layer: int = 36) -> None:
        self.layer = layer
        self.calls: list[tuple[str, list[int]]] = []

    def forward(self, input_ids: Tensor, repr_layers: list[int]) -> dict[str, Any]:
        self.calls.append(("forward", list(repr_layers)))
        assert input_ids.dim() == 2
        return {"representations": {self.layer: states_of(input_ids)}}

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, repr_layers: list[int]
    ) -> dict[str, Any]:
        self.calls.append(("forward_packed", list(repr_layers)))
        assert cu_seqlens.dtype == torch.int32
        assert max_seqlen == int(cu_seqlens.diff().max())
        return {"representations": {self.layer: states_of(input_ids)}}


class ByKeyword(RequiresLayers):
    def forward_packed(self, input_ids, cu_seqlens, max_seqlen, *, repr_layers):  # type: ignore[no-untyped-def, override]
        return super().forward_packed(input_ids, cu_seqlens, max_seqlen, repr_layers)

    def forward(self, tokens, *, repr_layers):  # type: ignore[no-untyped-def, override]
        return super().forward(tokens, repr_layers)


class ByPosition(RequiresLayers):
    def forward_packed(self, input_ids, cu_seqlens, max_seqlen, layers):  # type: ignore[no-untyped-def, override]
        return super().forward_packed(input_ids, cu_seqlens, max_seqlen, layers)

    def forward(self, input_ids, layers, /):  # type: ignore[no-untyped-def, override]
        return super().forward(input_ids, layers)


class TakesAny(RequiresLayers):
    def forward_packed(self, *arguments):  # type: ignore[no-untyped-def, override]
        return super().forward_packed(*arguments)

    def forward(self, *arguments, **named):  # type: ignore[no-untyped-def, override]
        return super().forward(*arguments, **named)


class SeveralLayers(RequiresLayers):
    """Returns more layers than requested: the highest counts."""

    def forward_packed(self, *arguments, **named):  # type: ignore[no-untyped-def, override]
        given = super().forward_packed(*arguments, **named)
        return {
            "representations": {0: given["representations"][36] * 0, **given["representations"]}
        }

    def forward(self, *arguments, **named):  # type: ignore[no-untyped-def, override]
        given = super().forward(*arguments, **named)
        return {
            "representations": {**given["representations"], 0: given["representations"][36] * 0}
        }


class PaddedOnly(nn.Module):
    """As fair-esm's: it says how many layers it has, and has no packed pass."""

    def __init__(self) -> None:
        super().__init__()
        self.num_layers = 33
        self.calls: list[tuple[str, list[int]]] = []

    def forward(
        self, tokens: Tensor, repr_layers: Any = (), need_head_weights: bool = False
    ) -> dict[str, Any]:
        self.calls.append(("forward", list(repr_layers)))
        return {
            "logits": None,
            "representations": {layer: states_of(tokens) for layer in repr_layers if layer <= 33},
        }


def mock_model() -> MagicMock:
    model = MagicMock()
    model.calls = []
    model.forward_packed = RequiresLayers().forward_packed
    model.forward = RequiresLayers().forward
    return model


def loader(*, packed: bool) -> list[dict[str, Any]]:
    """Two batches of four sequences: BOS, residues, EOS."""
    batches = []
    for first in (5, 15):
        rows = [[0, *([first + place] * length), 2] for place, length in enumerate(LENGTHS)]
        ids = [f"seq{first + place}" for place in range(len(rows))]
        if packed:
            boundaries = np.cumsum([0, *map(len, rows)])
            batches.append(
                {
                    "input_ids": torch.tensor([token for row in rows for token in row]),
                    "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
                    "max_seqlen": max(map(len, rows)),
                    "sequence_ids": ids,
                }
            )
        else:
            longest = max(map(len, rows))
            padded = [row + [1] * (longest - len(row)) for row in rows]
            batches.append({"input_ids": torch.tensor(padded), "sequence_ids": ids})
    return batches


def expected_rows() -> dict[str, np.ndarray[Any, Any]]:
    """The mean over the residues alone: BOS, EOS and padding would move it."""
    return {
        f"seq{first + place}": (first + place) * 10 + np.arange(WIDTH, dtype=np.float32)
        for first in (5, 15)
        for place in range(len(LENGTHS))
    }


def assert_rows(results: list[Any]) -> None:
    rows = {
        sequence_id: np.asarray(row)
        for result in results
        for sequence_id, row in zip(result.sequence_ids, result.embeddings, strict=True)
    }
    assert rows.keys() == expected_rows().keys()
    for sequence_id, row in expected_rows().items():
        np.testing.assert_allclose(rows[sequence_id], row, rtol=1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "make_model",
    [RequiresLayers, ByKeyword, ByPosition, TakesAny, SeveralLayers, PaddedOnly, mock_model],
)
def test_a_model_by_another_hand_is_served_packed_and_padded(
    make_model: Callable[[], Any], packed: bool
) -> None:
    model = make_model()
    assert_rows(
        list(
            AsyncInferenceRunner(model, torch.device("cpu"), enable_streams=False).run(
                loader(packed=packed)
            )
        )
    )
    if isinstance(model, RequiresLayers):
        assert model.calls == [("forward_packed" if packed else "forward", [36])] * 2
    if isinstance(model, PaddedOnly):
        assert model.calls == [("forward", [33])] * 2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_run_resumed_within_a_batch_serves_it(tmp_path: Path, packed: bool) -> None:
    """What is left of a padded batch is padded again."""
    done = ["seq5", "seq7", "seq8"]
    write_by_hand(
        checkpoint_path(tmp_path, 0, 0),
        {
            "embeddings": np.array([expected_rows()[each] for each in done]),
            "sequence_ids": done,
            "metadata": {"batch_idx": 0},
        },
    )
    model = RequiresLayers()
    runner = AsyncInferenceRunner(model, "cpu", checkpoint_dir=tmp_path)
    results = list(runner.run(loader(packed=packed)))
    assert [result.batch_idx for result in results] == [RESUMED, 0, 1]
    assert results[0].sequence_ids == tuple(done)
    assert_rows(results)
    assert {kind for kind, _ in model.calls} == {"forward_packed" if packed else "forward"}


def test_the_metadata_of_a_checkpoint_has_the_names_of_virnucpro(tmp_path: Path) -> None:
    runner = AsyncInferenceRunner(
        RequiresLayers(), "cpu", checkpoint_dir=tmp_path, checkpoint_seq_threshold=4
    )
    list(runner.run(loader(packed=True)))
    metadata = torch.load(checkpoint_path(tmp_path, 0, 1), weights_only=True)["metadata"]
    named = ("trigger_reason", "batch_idx", "num_sequences")
    assert [metadata[name] for name in named] == ["sequence_threshold", 1, 4]


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be non-negative"):
        AsyncInferenceRunner(RequiresLayers(), "cpu", rank=-1)
