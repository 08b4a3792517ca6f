"""The benchmarks' arithmetic, and that the GPU's can start where little is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.results import chunk_table, write_results
from benchmarks.workload import chunks, forward_flops, log_normal_mix, num_tokens
from vnp_lib.model.esm2 import MODELS

RECORDS = [
    {
        "model": "m",
        "input": "i",
        "proteins": 1,
        "tokens": 100,
        "flops": 2e9,
        "gemm_gflops": {"fp32_mm": 10.0, "fp32_conv": 20.0, "bf16_mm": 40.0},
        "seconds": {"extract.py": extract_s, "ours fp32": 1.0},
    }
    for extract_s in (1.0, 2.0, 6.0)
]


def test_the_cost_of_a_token_is_that_of_the_matrix_products_and_of_attention():
    """3B at 400 tokens: 24 x 2560^2 x 36 + 4 x 2560 x 36 x 400 = 5.81 GFLOP a token."""
    protein = "A" * 398
    assert forward_flops(MODELS["esm2_t36_3B_UR50D"], [protein]) / num_tokens(
        [protein]
    ) == pytest.approx(5.81e9, rel=1e-3)


def test_a_ratio_is_taken_within_each_chunk():
    """Extract.py took 1, 2 and 6 times as long on three chunks: the median is 2."""
    line = chunk_table(RECORDS).splitlines()[3].split("|")
    assert [cell.strip() for cell in line[3:9]] == [
        "ours fp32",
        "2.00",
        "1.50..4.00",
        "1.00..6.00",
        "3",
        ">= 2.4 MISSED",
    ]
    assert [cell.strip() for cell in line[9:12]] == ["100", "2", "10%"]


def test_results_hold_every_time_and_what_is_derived(tmp_path):
    write_results(tmp_path / "new" / "results.json", {"chunks": RECORDS, "programs": []})
    written = (tmp_path / "new" / "results.json").read_text()
    assert '"median": 2.0' in written
    assert '"extract.py": 6.0' in written


def test_chunks_go_from_short_proteins_to_long_ones():
    lengths = [len(chunk[0]) for chunk in chunks(log_normal_mix(200), 3)]
    assert lengths == sorted(lengths)
    assert len(lengths) == 3


def test_the_gpu_benchmark_starts_on_a_bare_machine():
    """It reaches neither Prefect nor pydantic, and no parser of FASTA."""
    absent = (
        "prefect",
        "pydantic",
        "pydantic_settings",
        "dnaio",
        "pyarrow",
        "rich",
        "safetensors",
        "transformers",
    )
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
