"""Compare the speed on this CPU with fair-esm and transformers: `make bench`, or with `--quick`.

All compute the same proteins with the same parameters on the same cores, in turn. A result counts
only if its embeddings are equal to ours. benchmarks/README.md says what is compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import EngineSpec, embed_with
from benchmarks.hardware import cpu_name, describe_machine, gemm_gflops, results_path, timed
from benchmarks.networks import write_weights
from benchmarks.programs import PROGRAMS, ProgramFiles, read_rows, run_program
from benchmarks.results import chunk_table, program_table, write_results
from benchmarks.warm_processes import Team
from benchmarks.workload import (
    STOCK_TOKENS,
    chunks,
    forward_flops,
    log_normal_mix,
    num_tokens,
    viral_proteins,
    virnucpro_orfs,
    write_fasta,
)
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.linear import convolution_is_faster

Record = dict[str, Any]
Results = dict[str, Any]

NAMES = {"8M": "esm2_t6_8M_UR50D", "35M": "esm2_t12_35M_UR50D", "150M": "esm2_t30_150M_UR50D"}
EXTRACT, OURS = "extract.py", "ours fp32"
MOST_RELATIVE_ERROR = 2e-5  # in float32, of the largest number
LEAST_COSINE = 0.999  # in bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An engine with all cores, as threads of one process or as processes of one thread."""

    name: str
    engine: str
    dtype: str = "float32"
    is_split: bool = False


VARIANTS = (
    Variant(name=EXTRACT, engine="extract"),
    Variant(name=f"{EXTRACT}, split", engine="extract", is_split=True),
    Variant(name="fair-esm, one at a time", engine="one_at_a_time"),
    Variant(name="transformers, SDPA", engine="transformers"),
    Variant(name=OURS, engine="ours"),
    Variant(name=f"{OURS}, split", engine="ours", is_split=True),
    Variant(name="ours bf16", engine="ours", dtype="bfloat16"),
    Variant(name="ours bf16, split", engine="ours", dtype="bfloat16", is_split=True),
)


class Teams:
    """The processes in which variants run: one with all cores, and one for each core."""

    def __init__(self, cores: int, *, huge_pages: bool) -> None:
        self._whole = Team(processes=1, threads=cores, huge_pages=huge_pages)
        self._split = Team(processes=cores, threads=1, huge_pages=huge_pages)

    def embed(
        self, variant: Variant, model: str, weights: Path, sequences: Sequence[str]
    ) -> tuple[float, np.ndarray]:
        """Return the seconds from residues to rows, as the parent sees it, and the rows."""
        spec = EngineSpec(name=variant.engine, model=model, weights=weights, dtype=variant.dtype)
        team = self._split if variant.is_split else self._whole
        parts = [(spec, sequences[place :: team.size]) for place in range(team.size)]
        seconds, results = timed(team.call, embed_with, *parts)
        rows = np.empty((len(sequences), results[0].shape[1]), dtype=np.float32)
        for place, part in enumerate(results):
            rows[place :: team.size] = part
        return seconds, rows

    def gemm_gflops(self) -> dict[str, float]:
        return self._whole.call(gemm_gflops, ())[0]

    def linear_layers(self) -> dict[str, str]:
        """How our float32 linear layers are computed here: each process tries it for itself."""
        teams = {"with all cores": self._whole, "split": self._split}
        tried = {
            name: team.call(convolution_is_faster, *[()] * team.size)
            for name, team in teams.items()
        }
        return {
            name: "by convolution" if all(found) else "by matrix product"
            for name, found in tried.items()
        }

    def stop(self) -> None:
        self._whole.stop()
        self._split.stop()


def require_equal(name: str, rows: np.ndarray, ours: np.ndarray, *, is_half: bool) -> float:
    """How far rows are from ours: the largest error relative to the largest number.

    Raises:
        ValueError: So far that it is not the same work.
    """
    error = float(np.abs(rows - ours).max() / np.abs(ours).max())
    cosine = float(
        ((rows * ours).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(ours, axis=1)).min()
    )
    if not (cosine >= LEAST_COSINE if is_half else error <= MOST_RELATIVE_ERROR):
        raise ValueError(
            f"{name} computes something else: relative error {error:.1e}, least cosine {cosine:.6f}"
        )
    return error


def measure_chunks(
    teams: Teams,
    model: str,
    weights: Path,
    input_name: str,
    chosen: Sequence[Sequence[str]],
    rounds: int,
) -> Iterator[Record]:
    """Run all variants on each chunk in turn, in rotation; one record per chunk and round."""
    _compare(
        teams, model, weights, chosen[len(chosen) // 2]
    )  # which also loads the models and warms them up
    for turn, (round_idx, chunk_idx) in enumerate(np.ndindex(rounds, len(chosen))):
        sequences = chosen[chunk_idx]
        shift = turn % len(VARIANTS)
        timed_rows = {
            variant.name: teams.embed(variant, model, weights, sequences)
            for variant in VARIANTS[shift:] + VARIANTS[:shift]
        }
        ours = timed_rows[OURS][1]
        yield {
            "model": model,
            "input": input_name,
            "round": round_idx,
            "chunk": chunk_idx,
            "proteins": len(sequences),
            "tokens": num_tokens(sequences),
            "flops": forward_flops(MODELS[model], sequences),
            "gemm_gflops": teams.gemm_gflops(),
            "seconds": {variant.name: timed_rows[variant.name][0] for variant in VARIANTS},
            "relative_error": {
                variant.name: require_equal(
                    variant.name,
                    timed_rows[variant.name][1],
                    ours,
                    is_half=variant.dtype != "float32",
                )
                for variant in VARIANTS
            },
        }


def _compare(teams: Teams, model: str, weights: Path, sequences: Sequence[str]) -> None:
    """See that all variants compute the same, before any is timed."""
    rows = {variant: teams.embed(variant, model, weights, sequences)[1] for variant in VARIANTS}
    ours = next(found for variant, found in rows.items() if variant.name == OURS)
    for variant, found in rows.items():
        require_equal(variant.name, found, ours, is_half=variant.dtype != "float32")


def measure_programs(
    scratch: Path, model: str, sequences: Sequence[str], rounds: int, extract_script: Path | None
) -> Iterator[Record]:
    """Run the whole programs in turn on the same FASTA file; one record a round."""
    fasta = scratch / "in.fasta"
    write_fasta(fasta, sequences)
    for round_idx in range(rounds):
        seconds, rows = {}, {}
        for name in PROGRAMS:
            with tempfile.TemporaryDirectory(dir=scratch) as directory:
                out = Path(directory, "out")
                files = ProgramFiles(
                    model=model, weights=_weights(scratch, model), fasta=fasta, output_dir=out
                )
                seconds[name] = run_program(
                    name, files, prefect_home=scratch / "prefect", extract_script=extract_script
                )
                rows[name] = read_rows(name, out)
        for name in PROGRAMS:
            require_equal(name, rows[name], rows["flows/embed.py"], is_half=False)
        yield {
            "model": model,
            "round": round_idx,
            "proteins": len(sequences),
            "tokens": num_tokens(sequences),
            "flops": forward_flops(MODELS[model], sequences),
            "seconds": seconds,
        }


def warm_up_programs(scratch: Path, model: str, sequences: Sequence[str]) -> None:
    """Run the programs once untimed: Prefect creates its database at its first start."""
    for _ in measure_programs(scratch, model, sequences, rounds=1, extract_script=None):
        pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["8M", "35M"])
    parser.add_argument(
        "--cores",
        type=int,
        default=2,
        help="how many to use; more leave the measured ones in peace",
    )
    parser.add_argument(
        "--chunks", type=int, default=3, help="batches of extract.py's, of each input"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=STOCK_TOKENS, help="tokens of such a batch"
    )
    parser.add_argument(
        "--huge-pages", action="store_true", help="for the memory of all that are compared"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="how often each chunk, and the whole programs, are run",
    )
    parser.add_argument(
        "--program-proteins",
        type=int,
        default=1000,
        help="proteins for the whole programs; 0: leave out",
    )
    parser.add_argument(
        "--program-models", nargs="+", choices=NAMES, default=["8M"], help="models for those"
    )
    parser.add_argument(
        "--extract-script",
        type=Path,
        help="fair-esm's scripts/extract.py, in place of our account of it",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute, to see that it works; the figures mean little",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; by default benchmarks/results/<date>-<machine>.json"
    )
    given = parser.parse_args()
    if given.quick:
        given.models, given.chunks, given.chunk_tokens, given.rounds, given.program_proteins = (
            ["8M"],
            1,
            512,
            1,
            5,
        )
    return given


def bench_chunks(results: Results, output: Path, scratch: Path, given: argparse.Namespace) -> None:
    """Measure all models and inputs chunk by chunk, and print a table for each."""
    inputs = {
        "viral proteins": viral_proteins(),
        "log-normal mix": log_normal_mix(2000),
        "VirNucPro ORFs": virnucpro_orfs(2000),
    }
    teams = Teams(len(os.sched_getaffinity(0)), huge_pages=given.huge_pages)
    results["linear_layers"] = teams.linear_layers()
    for model in (NAMES[short] for short in given.models):
        for input_name, sequences in inputs.items():
            chosen = chunks(sequences, given.chunks, given.chunk_tokens)
            start = len(results["chunks"])
            for record in measure_chunks(
                teams, model, _weights(scratch, model), input_name, chosen, given.rounds
            ):
                results["chunks"].append(record)
                write_results(output, results)
            print(chunk_table(results["chunks"][start:]), flush=True)
    teams.stop()


def bench_programs(
    results: Results, output: Path, scratch: Path, given: argparse.Namespace
) -> None:
    """Measure the whole programs, and print one table."""
    sequences = log_normal_mix(given.program_proteins)
    warm_up_programs(scratch, NAMES[given.program_models[0]], sequences[:1])
    for model in (NAMES[short] for short in given.program_models):
        for record in measure_programs(
            scratch, model, sequences, given.rounds, given.extract_script
        ):
            results["programs"].append(record)
            write_results(output, results)
    print(program_table(results["programs"]), flush=True)


def main() -> None:
    given = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    name = f"{cpu_name()}-{len(os.sched_getaffinity(0))}-cores{'-quick' * given.quick}"
    output = given.output or results_path(name)
    results: Results = {
        "machine": describe_machine(),
        "settings": vars(given),
        "chunks": [],
        "programs": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for short in {*given.models, *given.program_models}:
            write_weights(scratch, NAMES[short])
        bench_chunks(results, output, scratch, given)
        if given.program_proteins:
            bench_programs(results, output, scratch, given)
    print(f"written: {output}")


def _weights(scratch: Path, model: str) -> Path:
    return scratch / f"{model}.pt"


if __name__ == "__main__":
    main()
