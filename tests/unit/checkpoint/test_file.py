"""What is believed of a checkpoint on disk, and what is not."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import (
    RUN,
    content_by_hand,
    vouch_for,
    write_by_hand,
    write_checkpoint,
)
from tests.helpers import flip_bit
from vnp_lib.checkpoint import file
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.markers import batch_idx_of, move_to_damaged
from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
from vnp_lib.checkpoint.survey import Survey, survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.errors import CheckpointError
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps, digest_file, marker_path, write_file, write_marker


def test_a_file_that_is_not_there_is_invalid(tmp_path: Path) -> None:
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (False, "the file is missing")


def test_no_flipped_bit_of_a_checkpoint_passes(tmp_path: Path) -> None:
    """torch.load checks no CRC: by itself it takes a flipped bit, such as the last one here."""
    path = tmp_path / "batch_00000.pt"
    write_checkpoint(path, [0, 1, 2])
    size_bits = path.stat().st_size * 8
    for position in range(0, size_bits, 23):
        flip_bit(path, position)
        with pytest.raises(CheckpointError, match="sha256"):
            load_checkpoint(path, fingerprint=RUN)
        assert not validate_checkpoint_pt(path)[0]
        flip_bit(path, position)
    flip_bit(path, size_bits // 2)
    torch.load(path, weights_only=True)
    flip_bit(path, size_bits // 2)
    assert validate_checkpoint_pt(path) == (True, "")


@pytest.mark.parametrize("length", [0, 1, 10, 511, 512, 1000, -1, "grown"])
def test_no_cut_or_grown_checkpoint_passes(tmp_path: Path, length: int | str) -> None:
    path = tmp_path / "batch_00000.pt"
    write_checkpoint(path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" if isinstance(length, str) else whole[:length])
    with pytest.raises(CheckpointError, match="bytes"):
        load_checkpoint(path, fingerprint=RUN)
    assert not validate_checkpoint_pt(path)[0]


def test_no_flipped_bit_of_a_marker_passes(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1, 2])
    for position in range(0, marker_path(path).stat().st_size * 8 - 8, 5):
        flip_bit(marker_path(path), position)
        survey = survey_checkpoints(tmp_path, RUN, verify_digests=False)
        assert survey.valid == ()
        assert [damage.path for damage in survey.damaged] == [path]
        assert not validate_checkpoint_pt(path)[0]
        flip_bit(marker_path(path), position)


def test_an_emptied_marker_is_not_a_bare_one(tmp_path: Path) -> None:
    """A marker cut to nothing does not pass for one made by touch."""
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1, 2])
    marker_path(path).write_bytes(b"")
    assert validate_checkpoint_pt(path) == (False, "its marker is empty, though it names its run")


def test_an_empty_marker_is_never_enough_for_the_flow(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand())
    assert validate_checkpoint_pt(path) == (True, "")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_checkpoint(path, fingerprint=None)
    assert survey_checkpoints(tmp_path, RUN, verify_digests=False).valid == ()


def test_a_file_that_does_not_fit_its_marker_never_reaches_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1, 2])
    flip_bit(path, 9000)
    monkeypatch.setattr(
        torch, "load", lambda *_, **__: pytest.fail("torch has been given the bytes")
    )
    with pytest.raises(CheckpointError, match="bytes have changed"):
        load_checkpoint(path, fingerprint=RUN)


@pytest.mark.parametrize("fingerprint", ["ee" * 32, None])
def test_a_checkpoint_of_another_run_is_not_believed(
    tmp_path: Path, fingerprint: str | None
) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    metadata = {"ordinals": [0]} | ({"fingerprint": fingerprint} if fingerprint else {})
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(path, torch.ones(1, 2), ["a"], metadata)
    with pytest.raises(
        CheckpointError, match=f"is of the run {fingerprint!r}, and this run is '{RUN}'"
    ):
        load_checkpoint(path, fingerprint=RUN)
    (damage,) = survey_checkpoints(tmp_path, RUN, verify_digests=True).damaged
    assert "is of the run" in damage.reason
    assert not damage.is_unfinished


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (content_by_hand(extra=1), "unknown key: 'extra'"),
        (content_by_hand(embeddings=[1.0]), "no plain tensor"),
        (content_by_hand(embeddings=torch.ones(3, 4).to_sparse()), "_rebuild_sparse_tensor"),
        (content_by_hand(embeddings=torch.nn.Parameter(torch.ones(3, 4))), "_rebuild_parameter"),
        (
            content_by_hand(embeddings=torch.ones(3, 4, dtype=torch.complex64)),
            "ComplexFloatStorage",
        ),
        (content_by_hand(embeddings=torch.ones(3, 4, dtype=torch.bool)), "BoolStorage"),
        (content_by_hand(embeddings=torch.ones(3)), "shape mismatch"),
        (content_by_hand(embeddings=torch.ones(3, 0)), "shape mismatch"),
        (
            content_by_hand(embeddings=torch.ones(3, 1).expand(3, 1 << 20)),
            "claims more than the file holds",
        ),
        (content_by_hand(embeddings=torch.ones(4, 3).T), "claims more than the file holds"),
        (content_by_hand(embeddings=torch.full((3, 4), torch.nan)), "not finite"),
        (content_by_hand(sequence_ids=("a", "b", "c")), "no list of strings"),
        (content_by_hand(sequence_ids=["a", "b", 3]), "no list of strings"),
        (content_by_hand(metadata=[]), "metadata is no dict"),
        (content_by_hand(metadata={"ordinals": [0, 1]}), "3 rows, 2 ordinals"),
        (content_by_hand(metadata={"ordinals": [0, 1, 1]}), "twice"),
        (content_by_hand(metadata={"ordinals": [0, 1, 2**63]}), "whole numbers"),
        (content_by_hand(metadata={"ordinals": torch.arange(3)}), "more than one tensor"),
        (content_by_hand(metadata={"ordinals": 3}), "whole numbers"),
    ],
)
@pytest.mark.parametrize("has_digest", [True, False])
def test_content_that_is_no_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, content: Any, reason: str, has_digest: bool
) -> None:
    """Also where a marker vouches for the bytes."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content)
    if has_digest:
        vouch_for(path)
    is_valid, found = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason in found


def test_a_marker_that_says_otherwise_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand(metadata={"ordinals": [4, 5, 6]}))
    vouch_for(path, ordinals=[4, 5, 7])
    assert validate_checkpoint_pt(path) == (False, "its ordinals is not what its marker says")


def test_a_json_marker_by_another_hand_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand())
    marker_path(path).unlink()
    write_file(marker_path(path), json.dumps({"rows": 3}).encode())
    assert not validate_checkpoint_pt(path)[0]
    marker_path(path).unlink()
    write_marker(path, digest_file(path))
    assert validate_checkpoint_pt(path) == (False, "its marker has no rows")


class RunsCode:
    """What `pickle.load` of it would do."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "place", ["whole", "embeddings", "sequence_ids", "metadata", "plain pickle"]
)
@pytest.mark.parametrize(
    "function", [os.system, exec, eval, open, Path.touch, os.mkdir], ids=lambda each: each.__name__
)
def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(
    tmp_path: Path, place: str, function: Any
) -> None:
    proof = tmp_path / "proof"
    arguments = {
        os.system: (f"touch {proof}",),
        exec: (f"open({str(proof)!r}, 'w')",),
        eval: (f"open({str(proof)!r}, 'w')",),
        open: (str(proof), "w"),
        Path.touch: (proof,),
        os.mkdir: (str(proof),),
    }[function]
    trap = RunsCode(function, *arguments)
    path = checkpoint_path(tmp_path, 0, 0)
    changes: dict[str, Any] = {place: trap}
    write_by_hand(path, trap if place in ("whole", "plain pickle") else content_by_hand(**changes))
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(trap))
    assert "failed to load" in validate_checkpoint_pt(path)[1]
    vouch_for(path)
    with pytest.raises(CheckpointError, match="failed to load"):
        load_checkpoint(path, fingerprint=None)
    assert resume_from_checkpoints(tmp_path, 0).ids == []
    assert not proof.exists()


def test_torch_by_itself_would_run_no_code_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were our look at the pickle to miss something."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand(metadata=RunsCode(os.mkdir, str(tmp_path / "proof"))))
    monkeypatch.setattr(file, "check_archive", lambda *_: None)
    assert "Weights only load failed" in validate_checkpoint_pt(path)[1]
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("member", ["archive/data/0", "archive/data.pkl"])
def test_an_archive_with_compressed_members_is_refused(tmp_path: Path, member: str) -> None:
    """A deflated member can claim a thousand times the file's size."""
    write_by_hand(tmp_path / "plain.pt", content_by_hand())
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb,
    ):
        for each in plain.infolist():
            name = each.filename.replace("plain/", "archive/")
            compression = zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED
            bomb.writestr(name, plain.read(each), compress_type=compression)
    marker_path(tmp_path / "bomb.pt").touch()
    assert validate_checkpoint_pt(tmp_path / "bomb.pt") == (
        False,
        "failed to load: a member of the archive is compressed",
    )


def test_members_larger_than_the_archive_are_refused(tmp_path: Path) -> None:
    """An archive whose members claim more than it holds is refused."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        claimed = archive.getinfo("batch_00000/data/0")
    size = claimed.file_size.to_bytes(4, "little")
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(b"batch_00000/data/0"))
    entry = data[central:].replace(size, (1 << 30).to_bytes(4, "little"), 2)
    path.write_bytes(data[:central] + entry)
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason == "failed to load: the members of the archive claim more than the file holds"


def test_a_tensor_larger_than_its_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch.load makes of the bytes."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    monkeypatch.setattr(torch, "load", lambda *_, **__: content_by_hand(rows=1000))
    assert validate_checkpoint_pt(path) == (False, "embeddings claims more than the file holds")


def test_random_damage_gives_a_reason_and_no_crash(tmp_path: Path) -> None:
    """With an empty marker only the content is validated; the answer is always a pair."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    whole = path.read_bytes()
    random = np.random.default_rng(7)
    pickled = whole.index(b"\x80\x02")
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(pickled, pickled + 400, size=3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of its bytes
            is_valid, reason = validate_checkpoint_pt(path)
        assert is_valid is (reason == "")


def test_a_damaged_checkpoint_is_kept_as_evidence(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    targets = []
    for ordinal in range(2):
        write_checkpoint(path, [ordinal])
        targets.append(move_to_damaged(path))
    assert [load_checkpoint(target, fingerprint=RUN).sequence_ids for target in targets] == [
        ["seq0"],
        ["seq1"],
    ]
    assert {target.parent for target in targets} == {tmp_path / "shard_0" / "damaged"}
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True) == Survey(valid=(), damaged=())


def test_the_marker_is_moved_before_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between leaves a file without a marker, which is no damage.

    Both names are synced each time.
    """
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0])
    steps: list[str] = []

    class Recording(DurableOps):
        def replace(self, source: Path, target: Path) -> None:
            steps.append(source.suffix)
            super().replace(source, target)

        def fsync_directory(self, path: Path) -> None:
            steps.append(path.name)
            super().fsync_directory(path)

    monkeypatch.setattr(durable, "ops", Recording())
    move_to_damaged(path)
    made_directory = ["shard_0"]
    assert steps == [*made_directory, ".done", "damaged", "shard_0", ".pt", "damaged", "shard_0"]


@pytest.mark.parametrize(
    "name", ["batch_0.pt", "batch_00000.pt.done", "batch_000000.pt", "batch_-0001.pt", "a.pt"]
)
def test_what_is_no_checkpoints_name_has_no_number(name: str) -> None:
    with pytest.raises(ValueError, match="not a checkpoint name"):
        batch_idx_of(Path(name))


def test_a_number_may_outgrow_five_digits() -> None:
    assert batch_idx_of(Path("shard_0/batch_123456.pt")) == 123456
