"""`vnp_lib.embed` returns fair-esm's vectors under their ids for all forms of input."""

from __future__ import annotations

import asyncio
import doctest
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dnaio
import numpy as np
import pytest
import torch
from esm.model.esm2 import ESM2 as FairEsm2
from torch import Tensor

import vnp_lib.embeddings
from tests.fair_esm import FairEsm
from tests.fair_esm import assert_close as assert_equals_fair_esm
from tests.helpers import computed_ordinals, finished_checkpoints, flip_bit
from vnp_lib import Embeddings, Outputs, api, embed, open_dataset
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.errors import (
    FastaError,
    FingerprintMismatchError,
    InputError,
    NumericalInstabilityError,
    SequenceTooLargeError,
)
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.model.esm2 import ESM2, MODELS
from vnp_lib.model.tokens import pack_batch
from vnp_lib.model.weights import random_tensors, save_weights
from vnp_lib.plan.outputs import OutputKind
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.report.verify import verify_run
from vnp_lib.storage.durable import marker_path

SMALLEST = "esm2_t6_8M_UR50D"
SMALL: dict[str, Any] = {"model": SMALLEST, "weights": "random", "device": "cpu"}
NAMED = {"a": "MKVLATTWQERS", "b": "MKL", "c": "ACDEFGHIKLMNPQRSTVWYBUZOX", "d": "W"}


def fair_esm_means(sequences: list[str]) -> np.ndarray:
    """The oracle's mean representations, one sequence at a time, (N, D)."""
    architecture = MODELS[SMALLEST]
    oracle = FairEsm2(
        architecture.num_layers, architecture.embed_dim, architecture.attention_heads
    ).eval()
    oracle.load_state_dict(dict(random_tensors(architecture)), strict=False)
    last = architecture.num_layers
    with torch.inference_mode():
        tokens = [
            pack_batch([sequence], ["s"], [0], batch_idx=0).input_ids for sequence in sequences
        ]
        states = [
            oracle(own[None], repr_layers=[last])["representations"][last][0] for own in tokens
        ]
        return torch.stack([own[1:-1].mean(dim=0) for own in states]).numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def records_of(fasta: Path) -> dict[str, str]:
    with dnaio.open(fasta) as records:
        return {record.id: record.sequence for record in records}


@contextmanager
def model_that(monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any]) -> Iterator[list[int]]:
    """Replace the forward pass of the model by `spoil(forward, ...)`, and count its tokens."""
    forward, passes = ESM2.forward_packed, []

    def forward_packed(self: ESM2, input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        passes.append(input_ids.numel())
        return spoil(lambda *given: forward(self, *given, **options), input_ids, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ESM2, "forward_packed", forward_packed)
        yield passes


def as_it_is(forward: Callable[..., Any], *arguments: Any) -> Any:
    return forward(*arguments)


@pytest.fixture(scope="module")
def oracle() -> np.ndarray:
    return fair_esm_means(list(NAMED.values()))


def as_fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text(
        "".join(f">{name} described\n{sequence.lower()}*\n" for name, sequence in NAMED.items())
    )
    return path


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        pytest.param(
            lambda _: list(NAMED.values()), ["0", "1", "2", "3"], id="a list of sequences"
        ),
        pytest.param(
            lambda _: iter(NAMED.values()), ["0", "1", "2", "3"], id="an iterator of sequences"
        ),
        pytest.param(
            lambda _: [f" {s.lower()}\n*" for s in NAMED.values()],
            ["0", "1", "2", "3"],
            id="to be normalised",
        ),
        pytest.param(lambda _: NAMED, list(NAMED), id="a dictionary"),
        pytest.param(lambda _: NAMED.items(), list(NAMED), id="pairs"),
        pytest.param(as_fasta, list(NAMED), id="a Path"),
        pytest.param(lambda directory: str(as_fasta(directory)), list(NAMED), id="a path as text"),
        pytest.param(lambda directory: [as_fasta(directory)], list(NAMED), id="a list of Paths"),
    ],
)
def test_every_form_of_input_gives_fair_esms_vectors_in_order(tmp_path, oracle, given, ids):
    embeddings = embed(given(tmp_path), **SMALL)
    assert embeddings.ids == ids
    assert_close(embeddings.embeddings, oracle)


@pytest.mark.parametrize("given", [NAMED, as_fasta])
def test_a_run_directory_gets_the_dataset_and_the_same_rows_come_back(tmp_path, oracle, given):
    embeddings = embed(
        given(tmp_path) if callable(given) else given, **SMALL, output_dir=tmp_path / "run"
    )
    assert verify_run(tmp_path / "run").is_well
    dataset = open_dataset(tmp_path / "run")
    assert embeddings.ids == list(dataset.ids) == list(NAMED)
    assert_close(embeddings.embeddings, oracle)
    for row, sequence_id in enumerate(NAMED):
        np.testing.assert_array_equal(dataset[sequence_id], embeddings.embeddings[row])


@pytest.fixture(scope="module")
def both_heads() -> FairEsm:
    return FairEsm(MODELS[SMALLEST], dict(random_tensors(MODELS[SMALLEST], seed=7)))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, both_heads: FairEsm) -> Path:
    """fair-esm's network, as it was saved: with both heads."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(path, SMALLEST, both_heads.state())
    return path


@pytest.mark.parametrize("include", [list(OutputKind), ["std", "mean"], {"per_tok"}, ("contacts",)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_output_is_fair_esms_by_name_and_id(
    tmp_path, weights_file, both_heads, include, in_memory
):
    """With the names and the order of a dataset, also in a run directory, and for duplicates."""
    given = NAMED | {"a_again": NAMED["a"]}
    outputs = embed(
        given,
        **SMALL | {"weights": weights_file},
        include=include,
        repr_layers=[-1, 3],
        token_budget=30,
        output_dir=None if in_memory else tmp_path / "run",
    )
    assert isinstance(outputs, Outputs)
    assert outputs.ids == list(given)
    if not in_memory:
        assert tuple(outputs.arrays) == open_dataset(tmp_path / "run").outputs
    for (sequence_id, found), sequence in zip(outputs, given.values(), strict=True):
        expected = {
            name: values
            for name, values in both_heads.outputs(sequence, [3, 6]).items()
            if name.removesuffix("_3").removesuffix("_6") in include
        }
        assert found.keys() == outputs[sequence_id].keys() == expected.keys()
        for name, values in expected.items():
            assert_equals_fair_esm(found[name], values, what=f"{name} of {sequence_id}")
            np.testing.assert_array_equal(outputs[sequence_id][name], found[name])
    for name, arrays in outputs.arrays.items():
        assert len(arrays) == 5
        assert isinstance(arrays, np.ndarray) == name.startswith(("mean", "bos", "max", "std"))
        assert not np.shares_memory(arrays[0], arrays[4])


def test_another_layer_alone_is_a_matrix_like_the_last(both_heads, weights_file, tmp_path):
    settings = SMALL | {"weights": weights_file, "repr_layers": [3]}
    embeddings = embed(NAMED, **settings)
    assert isinstance(embeddings, Embeddings)
    for sequence_id, sequence in NAMED.items():
        expected = both_heads.outputs(sequence, [3], with_contacts=False)["mean_3"]
        assert_equals_fair_esm(embeddings[sequence_id], expected, what=sequence_id)
    in_a_run = embed(NAMED, **settings, output_dir=tmp_path / "run")
    assert_close(in_a_run.embeddings, embeddings.embeddings)
    assert open_dataset(tmp_path / "run").outputs == ("mean_3",)


def test_a_single_mean_requested_by_name_has_its_name(oracle, tmp_path):
    for output_dir in (None, tmp_path / "run"):
        outputs = embed(NAMED, **SMALL, include=["mean"], output_dir=output_dir)
        assert list(outputs.arrays) == ["mean_6"]
        assert_close(outputs.arrays["mean_6"], oracle)


def test_contacts_without_their_parameters_are_refused(tmp_path):
    trunk = {
        name: tensor
        for name, tensor in random_tensors(MODELS[SMALLEST])
        if not name.startswith("contact_head.")
    }
    save_weights(tmp_path / "trunk.pt", SMALLEST, trunk)
    with pytest.raises(InputError, match=r"trunk-contact-regression\.pt"):
        embed(NAMED, **SMALL | {"weights": tmp_path / "trunk.pt"}, include=["contacts"])


def test_batches_of_many_lengths_put_each_row_at_its_place(tiny_fasta):
    records = records_of(tiny_fasta)
    embeddings = embed(tiny_fasta, **SMALL, token_budget=150)
    assert embeddings.ids == list(records)
    assert_close(embeddings.embeddings, fair_esm_means(list(records.values())))


def test_identical_sequences_are_computed_once(monkeypatch):
    with model_that(monkeypatch, as_it_is) as passes:
        embeddings = embed(["MKVL", "W", "mkvl", "MKVL*"], **SMALL)
    assert passes == [4 + 2 + 1 + 2]
    for copy in (2, 3):
        np.testing.assert_array_equal(embeddings.embeddings[0], embeddings.embeddings[copy])


def test_what_does_not_fit_into_memory_is_computed_in_pieces(monkeypatch, oracle):
    def crowded(forward: Callable[..., Any], input_ids: Tensor, *arguments: Any) -> Any:
        if input_ids.numel() > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids, *arguments)

    with model_that(monkeypatch, crowded) as passes:
        embeddings = embed(NAMED, **SMALL)
    assert max(passes) > 30
    assert_close(embeddings.embeddings, oracle)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_sequence_that_does_not_fit_alone_is_named(monkeypatch, tmp_path, in_memory):
    def crowded(forward: Callable[..., Any], input_ids: Tensor, *arguments: Any) -> Any:
        if input_ids.numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(input_ids, *arguments)

    with (
        model_that(monkeypatch, crowded),
        pytest.raises(SequenceTooLargeError, match=r"1 sequences do not fit .*'c' \(25 residues\)"),
    ):
        embed(NAMED, **SMALL, output_dir=None if in_memory else tmp_path / "run")


def without_a_finite_row_for_d(
    forward: Callable[..., Any], input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Any:
    """It is the only one with a single residue."""
    output = forward(input_ids, cu_seqlens, max_seqlen)
    for states in output["representations"].values():
        states[cu_seqlens[:-1][cu_seqlens.diff() == 3] + 1] = float("nan")
    return output


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_row_that_is_not_finite_is_an_error_that_names_the_id(
    monkeypatch, tmp_path, oracle, in_memory
):
    """A run directory keeps the batches before it, and a later call computes the rest."""
    settings = SMALL | {"token_budget": 19, "output_dir": None if in_memory else tmp_path / "run"}
    with (
        model_that(monkeypatch, without_a_finite_row_for_d),
        pytest.raises(NumericalInstabilityError, match="1 not finite in batch 2: d; take it out"),
    ):
        embed(NAMED, **settings)
    with model_that(monkeypatch, as_it_is) as passes:
        assert_close(embed(NAMED, **settings).embeddings, oracle)
    assert passes == ([27, 19, 3] if in_memory else [3])


def test_what_a_run_has_in_quarantine_has_no_row_and_that_is_said(tmp_path, oracle, caplog):
    paths = RunPaths(tmp_path / "run")
    embed(NAMED, **SMALL, token_budget=19, output_dir=paths.run_dir)
    (*_, last) = sorted(finished_checkpoints(paths.run_dir))
    for path in (marker_path(last), last):
        path.unlink()
    shutil.rmtree(paths.embeddings_dir)
    failure = Failure(cause=FailureCause.NUMERICAL_INSTABILITY, message="not finite")
    plan = load_plan(paths)
    Quarantine.of(plan, paths).add(QuarantinedSequence.of_failure(plan, 3, failure, attempts=2))
    embeddings = embed(NAMED, **SMALL, token_budget=19, output_dir=paths.run_dir)
    assert embeddings.ids == ["a", "b", "c"]
    assert_close(embeddings.embeddings, oracle[:3])
    assert f"1 sequences are in quarantine and have no row: see {paths.quarantine}" in caplog.text


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/shard_0"])
def test_a_whole_dataset_is_enough_where_its_checkpoints_are_deleted(
    monkeypatch, tmp_path, oracle, gone
):
    """Nothing goes through the model again; a damaged dataset is computed again."""
    paths = RunPaths(tmp_path / "run")
    embed(NAMED, **SMALL, output_dir=paths.run_dir)
    before = {path: path.stat().st_ino for path in paths.embeddings_dir.iterdir()}
    shutil.rmtree(paths.run_dir / gone)
    with model_that(monkeypatch, as_it_is) as passes:
        assert_close(embed(NAMED, **SMALL, output_dir=paths.run_dir).embeddings, oracle)
    assert passes == []
    assert {path: path.stat().st_ino for path in paths.embeddings_dir.iterdir()} == before

    flip_bit(paths.embeddings_dir / "part-00000.parquet")
    with model_that(monkeypatch, as_it_is) as passes:
        assert_close(embed(NAMED, **SMALL, output_dir=paths.run_dir).embeddings, oracle)
    assert len(passes) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_ctrl_c_stops_everything_and_the_next_call_resumes(
    monkeypatch, tmp_path, tiny_fasta, in_memory
):
    """A signal in the pass of the third batch; in a run directory nothing is computed twice."""
    passes = 0

    def interrupted(forward: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments)

    run_dir = None if in_memory else tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = threading.active_count()
    try:
        with model_that(monkeypatch, interrupted), pytest.raises(KeyboardInterrupt):
            embed(tiny_fasta, **SMALL, token_budget=150, output_dir=run_dir)
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads
    if run_dir is not None:
        assert 2 <= len(computed_ordinals(run_dir)) < 40
    embeddings = embed(tiny_fasta, **SMALL, token_budget=150, output_dir=run_dir)
    assert_close(embeddings.embeddings, fair_esm_means(list(records_of(tiny_fasta).values())))
    if run_dir is not None:
        assert Counter(computed_ordinals(run_dir)) == dict.fromkeys(range(40), 1)


def test_a_directory_of_another_run_is_refused_and_untouched(tmp_path):
    embed(NAMED, **SMALL, output_dir=tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FingerprintMismatchError, match="belongs to another run"):
        embed({"a": "MKV"}, **SMALL, output_dir=tmp_path / "run")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    embed(NAMED, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_it_works_within_a_running_event_loop(oracle):
    """As in a notebook, whose cells are run by one."""

    async def cell() -> Embeddings:
        return embed(NAMED, **SMALL)

    assert_close(asyncio.run(cell()).embeddings, oracle)


@pytest.mark.parametrize(
    ("sequences", "reason"),
    [
        ([], "there is no sequence to embed; give at least one"),
        (["MKV", ""], r"record 1: sequence '1' has no residues"),
        (
            {"a": "MKV", "b": "MK-V"},
            r"record 1: sequence 'b' has '-' at position 3; gaps belong to an alignment",
        ),
        ({"a": "MK*V"}, "a stop codon inside a protein"),
        ({"a b": "MKV"}, r"record 0: the id 'a b' has white space in it"),
        ({"a ": "MKV"}, r"record 0: the id 'a ' has white space in it"),
        ({"": "MKV"}, "record 0: a record has no id"),
        ([("a", "MKV"), ("b", "W"), ("a", "MKL")], "the id 'a' occurs twice, at records 0 and 2"),
        (["ACGTACGTACGTACGT"], "these sequences: this looks like nucleotides"),
        (["MKV", None], r"record 1 \('1'\) has no sequence \(None\); leave it out"),
        ([("a", "MKV", "x")], "record 0 is"),
        ("MKVLATTWQERS", "there is no such file; a single sequence goes into a list"),
        ("M" * 5000, "there is no such file; a single sequence goes into a list"),
    ],
)
def test_invalid_sequences_are_refused_with_the_reason(sequences, reason):
    with pytest.raises(FastaError, match=reason):
        embed(sequences, **SMALL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (">a\nMKV\n>b\nMK1\n", r"in.fasta, line 3: sequence 'b' has '1' at position 3"),
        (">a\nMKV\n>b\nMKV\n>a\nMKL\n", r"'a': .*in.fasta, line 1 and .*in.fasta, line 5"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_fault_in_a_file_is_reported_with_its_line(tmp_path, text, reason, in_memory):
    path = tmp_path / "in.fasta"
    path.write_text(text)
    with pytest.raises(FastaError, match=reason):
        embed(path, **SMALL, output_dir=None if in_memory else tmp_path / "run")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "esm2"}, "model is 'esm2'; choose one of esm2_t6_8M_UR50D"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; choose one of auto, float32"),
        ({"device": "gpu"}, "device is 'gpu'; choose"),
        ({"device": "cuda:99"}, "device is 'cuda:99', and this machine shows"),
        ({"token_budget": 0}, "token_budget is 0; it must be at least 1"),
        ({"include": "mean"}, "include is 'mean'; give a list of mean, bos"),
        ({"include": []}, r"include is \[\]; give a list of mean, bos"),
        ({"include": ["mean", "means"]}, "include is 'means'; choose one of mean, bos"),
        ({"repr_layers": [7]}, "this model has the layers 0 .* to 6"),
        (
            {"repr_layers": [1, 2]},
            r"repr_layers is \[1, 2\]; for several layers give include=\['mean'\] too",
        ),
        ({"weights": "absent.pt"}, "absent.pt"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_invalid_settings_are_refused_before_anything_is_written(
    tmp_path, settings, reason, in_memory
):
    with pytest.raises(InputError, match=reason):
        embed(NAMED, **SMALL | settings, output_dir=None if in_memory else tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_device_of_torchs_is_one(oracle):
    assert_close(embed(NAMED, **SMALL | {"device": torch.device("cpu")}).embeddings, oracle)


def test_half_precision_is_close_and_its_rows_are_float32(oracle):
    rows = embed(NAMED, **SMALL, dtype="bfloat16").embeddings
    assert rows.dtype == np.float32
    cosines = (
        (rows * oracle).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(oracle, axis=1)
    )
    assert cosines.min() >= 0.999
    assert np.abs(rows - oracle).max() > 2e-5  # it is not float32 by another name


@pytest.mark.parametrize(
    ("is_terminal", "progress", "is_shown"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_a_bar_is_shown_on_a_terminal_if_it_is_wanted(
    monkeypatch, capsys, is_terminal, progress, is_shown
):
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for one
        monkeypatch.setenv("TERM", "xterm")
    embed(NAMED, **SMALL, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("4 of 4 sequences" in shown.err) == is_shown


def test_random_weights_are_said_to_mean_nothing(caplog):
    embed(["MKV"], **SMALL)
    assert "the vectors mean nothing" in caplog.text


def test_embeddings_are_looked_up_by_id_and_walked_in_order():
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    embeddings = Embeddings(ids=["x", "y", "z"], embeddings=matrix)
    assert len(embeddings) == 3
    assert ("y" in embeddings, "w" in embeddings) == (True, False)
    np.testing.assert_array_equal(embeddings["y"], [2, 3])
    with pytest.raises(KeyError, match="'w' is not among the 3 ids"):
        embeddings["w"]
    assert {name: row.tolist() for name, row in embeddings} == {
        "x": [0, 1],
        "y": [2, 3],
        "z": [4, 5],
    }


def test_outputs_are_looked_up_by_id_and_walked_in_order():
    residues = [np.full((length, 2), length, dtype=np.float32) for length in (3, 1)]
    outputs = Outputs(
        ids=["x", "y"], arrays={"mean_6": np.eye(2, dtype=np.float32), "per_tok_6": residues}
    )
    assert len(outputs) == 2
    assert ("y" in outputs, "w" in outputs) == (True, False)
    assert outputs["y"]["mean_6"].tolist() == [0, 1]
    assert outputs["y"]["per_tok_6"] is residues[1]
    with pytest.raises(KeyError, match="'w' is not among the 2 ids"):
        outputs["w"]
    assert [(name, found["per_tok_6"].shape) for name, found in outputs] == [
        ("x", (3, 2)),
        ("y", (1, 2)),
    ]


def test_embeddings_become_a_tensor_and_a_data_frame():
    pandas = pytest.importorskip("pandas")
    embeddings = Embeddings(ids=["x", "y"], embeddings=np.ones((2, 3), dtype=np.float32))
    assert torch.equal(embeddings.to_torch(), torch.ones(2, 3))
    frame = embeddings.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["y"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("module", [api, vnp_lib.embeddings])
def test_the_examples_in_docstrings_are_right(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
