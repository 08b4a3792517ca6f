"""Reading the dataset: single rows or all, and never a row that was not written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import vnp_lib.run.assembly
from tests.fake_runs import DIM, Run, embed, finish_run, start_run
from tests.helpers import flip_bit
from vnp_lib.dataset.reader import open_dataset, verify_dataset
from vnp_lib.errors import StorageError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finish_run(start_run(tmp_path))


def test_rows_are_found_by_id_and_by_ordinal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts have several row groups."""
    monkeypatch.setattr(vnp_lib.run.assembly, "_ROW_GROUP_BYTES", 7 * DIM * 4)
    run.assemble()
    dataset = open_dataset(str(run.paths.embeddings_dir))
    expected = run.expected_rows()
    assert pq.ParquetFile(run.paths.embeddings_dir / "part-00000.parquet").num_row_groups == 6
    assert (len(dataset), dataset.dim, dataset.ids) == (150, DIM, run.ids)
    for ordinal in np.random.default_rng(0).permutation(150).tolist():
        by_id = dataset[run.ids[ordinal]]
        assert by_id.dtype == np.float32
        assert np.array_equal(by_id, expected[ordinal])
        assert np.array_equal(dataset.row(ordinal), expected[ordinal])


@pytest.mark.parametrize("batch_size", [1, 7, 40, 64, 1000])
def test_batches_give_every_row_once_in_input_order(run: Run, batch_size: int) -> None:
    run.assemble()
    batches = list(open_dataset(run.paths.run_dir).batches(batch_size))
    assert all(len(ids) == len(rows) <= batch_size for ids, rows in batches)
    assert [sequence_id for ids, _ in batches for sequence_id in ids] == run.ids
    assert np.array_equal(np.concatenate([rows for _, rows in batches]), run.expected_rows())


def test_all_rows_as_one_array_and_as_tensors(run: Run) -> None:
    run.assemble()
    dataset = open_dataset(run.paths.run_dir)
    ids, embeddings = dataset.to_numpy()
    assert ids == run.ids
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings, run.expected_rows())
    batches = list(dataset.torch_batches(40))
    assert [sequence_id for ids, _ in batches for sequence_id in ids] == run.ids
    assert torch.equal(
        torch.cat([rows for _, rows in batches]), torch.from_numpy(run.expected_rows())
    )


def test_positions_in_the_dataset_and_the_input_differ(tmp_path: Path) -> None:
    """If a sequence has no row, `at` and `row` count differently."""
    run = start_run(tmp_path)
    left_out = int(run.plan.order[0])
    finish_run(run, without=[left_out]).assemble(quarantined=[left_out])
    dataset = open_dataset(run.paths.run_dir)
    kept = [ordinal for ordinal in range(150) if run.plan.representatives[ordinal] != left_out]
    assert len(dataset) == len(kept) < 150
    for position, ordinal in enumerate(kept):
        sequence_id, row = dataset.at(position)
        assert sequence_id == run.ids[ordinal]
        assert np.array_equal(row, dataset.row(ordinal))
    for position in (-1, len(kept)):
        with pytest.raises(IndexError, match=f"row {position} is not in"):
            dataset.at(position)


LOADED_WITH_WORKERS = """
import sys
import torch
from torch.utils.data import DataLoader
from vnp_lib.dataset import open_dataset

run_dir, method, num_workers, seen = sys.argv[1:]
dataset = open_dataset(run_dir)
dataset.to_numpy()
dataset.row(149)
loader = DataLoader(
    dataset.as_torch_dataset(),
    batch_size=16,
    shuffle=True,
    num_workers=int(num_workers),
    multiprocessing_context=method,
    generator=torch.Generator().manual_seed(0),
)
rows_by_id = {}
for ids, rows in loader:
    rows_by_id.update(zip(ids, rows, strict=True))
torch.save(rows_by_id, seen)
"""


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_a_data_loader_with_workers_gets_every_row_with_its_id(
    run: Run, tmp_path: Path, method: str, num_workers: int
) -> None:
    """Workers are forked from a process that has used Arrow's threads, or spawned.

    The test runs in a process of its own: one in which Prefect has run cannot be forked, because
    its threads are missing on exit.
    """
    run.assemble()
    arguments = (run.paths.run_dir, method, num_workers, tmp_path / "seen.pt")
    subprocess.run([sys.executable, "-c", LOADED_WITH_WORKERS, *map(str, arguments)], check=True)
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert list(seen) != run.ids
    assert seen.keys() == set(run.ids)
    for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
        assert np.array_equal(seen[sequence_id].numpy(), embed(sequence))


def test_rows_are_writable_copies(run: Run) -> None:
    run.assemble()
    dataset = open_dataset(run.paths.run_dir)
    dataset.row(0)[:] = 0
    assert np.array_equal(dataset.row(0), embed(run.sequences[0]))
    assert next(dataset.batches(4))[1].flags.writeable


def test_a_missing_id_or_ordinal_is_a_key_error(run: Run) -> None:
    run.assemble()
    dataset = open_dataset(run.paths.run_dir)
    assert "nobody" not in dataset
    with pytest.raises(KeyError, match="'nobody' is not in"):
        dataset["nobody"]
    for ordinal in (-1, 150):
        with pytest.raises(KeyError, match=f"ordinal {ordinal} is not in"):
            dataset.row(ordinal)


def test_an_incomplete_run_has_no_dataset(run: Run) -> None:
    """The error says how to resume the run."""
    with pytest.raises(StorageError, match=r"no complete dataset here .*start the run again"):
        open_dataset(run.paths.run_dir)
    with pytest.raises(StorageError, match="there is no such directory"):
        open_dataset(run.paths.run_dir / "nowhere")
    assert len(verify_dataset(run.paths.run_dir)) == 1


@pytest.mark.parametrize("change", [b"grown", None])
def test_a_part_of_another_size_or_missing_is_refused(run: Run, change: bytes | None) -> None:
    run.assemble()
    part = run.paths.embeddings_dir / "part-00002.parquet"
    if change is None:
        part.unlink()
    else:
        part.write_bytes(part.read_bytes() + change)
    with pytest.raises(
        StorageError, match=r"part-00002\.parquet has .* bytes, and .* were written"
    ):
        open_dataset(run.paths.run_dir)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_found_and_never_changes_a_row(run: Run, seed: int) -> None:
    run.assemble()
    rng = np.random.default_rng(seed)
    path = sorted(run.paths.embeddings_dir.iterdir())[rng.integers(5)]
    flip_bit(path, int(rng.integers(8 * path.stat().st_size)))

    assert any(path.name in damage for damage in verify_dataset(run.paths.run_dir))
    try:
        rows = np.concatenate([rows for _, rows in open_dataset(run.paths.run_dir).batches(50)])
    except StorageError:
        return
    assert np.array_equal(rows, run.expected_rows())


def test_no_flipped_bit_of_a_footer_passes_a_reader(run: Run) -> None:
    """Parquet has no checksum for the footer."""
    run.assemble()
    path = run.paths.embeddings_dir / "part-00001.parquet"
    whole = path.read_bytes()
    footer_bytes = open_dataset(run.paths.run_dir).metadata["parts"][1]["footer_bytes"]
    assert int.from_bytes(whole[-8:-4], "little") == footer_bytes - 8
    for position in range(0, footer_bytes * 8, 13):
        data = bytearray(whole)
        data[-1 - position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(StorageError, match="footer"):
            list(open_dataset(run.paths.run_dir).batches(50))
