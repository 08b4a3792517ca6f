"""Write results as JSON, and print them as tables: `python -m benchmarks.results FILE.json`.

With `--readme`, the tables of a file are inserted into benchmarks/README.md, between their marks.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

README = Path(__file__).parent / "README.md"
BASELINE = "extract.py"
GOALS = {  # times extract.py
    "ours fp32": 2.4,
    "ours fp32, split": 2.4,
    "ours bf16": 3.3,
    "ours bf16, split": 3.3,
    "vnp without Prefect": 3.2,
}

_RATIO_HEADS = ("x extract.py", "IQR", "min..max", "n", "goal")  # of `_ratio_cells`

Record = Mapping[str, Any]


def write_results(path: Path, results: Record) -> None:
    """Write a CPU's results, with the ratios of what they hold so far."""
    derived = {
        key: [_spread_record(*group) for group in _variants(results[key])]
        for key in ("chunks", "programs")
    }
    write_json(path, {**results, "derived": derived})


def write_json(path: Path, results: Record) -> None:
    """Write results; to be called after each measurement, so that none is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=str) + "\n")


def chunk_table(records: Sequence[Record]) -> str:
    """One line a model, input and variant: medians over chunks and rounds."""
    rows = []
    for about, name, chosen in _variants(records):
        gflops = np.array([one["flops"] / one["seconds"][name] / 1e9 for one in chosen])
        ceiling = np.array([_ceiling(one["gemm_gflops"], name) for one in chosen])
        tokens_per_s = np.median([one["tokens"] / one["seconds"][name] for one in chosen])
        figures = (*_ratio_cells(name, chosen), f"{tokens_per_s:,.0f}", f"{np.median(gflops):,.0f}")
        rows.append((*about, name, *figures, f"{np.median(gflops / ceiling):.0%}"))
    return markdown_table(
        ("model", "input", "variant", *_RATIO_HEADS, "tokens/s", "GFLOP/s", "of GEMM"), rows
    )


def program_table(records: Sequence[Record]) -> str:
    """One line a model and program."""
    rows = []
    for about, name, chosen in _variants(records):
        seconds = np.median([one["seconds"][name] for one in chosen])
        tokens_per_s = np.median([one["tokens"] / one["seconds"][name] for one in chosen])
        size = f"{chosen[0]['proteins']:,} / {chosen[0]['tokens']:,}"
        rows.append(
            (
                *about,
                size,
                name,
                *_ratio_cells(name, chosen),
                f"{seconds:.1f}",
                f"{tokens_per_s:,.0f}",
            )
        )
    return markdown_table(
        ("model", "proteins / tokens", "program", *_RATIO_HEADS, "seconds", "tokens/s"), rows
    )


def gpu_table(records: Sequence[Record]) -> str:
    """One line a model, variant and token budget."""
    heads = (
        "model",
        "variant",
        "token budget",
        "x fair-esm",
        "tokens/s",
        "TFLOP/s",
        "of GEMM",
        "peak GiB",
        "least cosine",
    )
    return markdown_table(
        heads,
        [_gpu_cells(record, _speed_of_fair_esm(record["model"], records)) for record in records],
    )


def machine_lines(results: Record) -> str:
    """The machine of a results file, in a sentence or two."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    load = ", ".join(f"{load:.2f}" for load in machine["load_average"])
    device = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return (
        f"{machine['started_at']}, commit {machine['commit']}: {device}{machine['cpu']}, "
        f"{machine['cores']} cores, load {load} "
        f"at the start; {packages}; Python {machine['python']}."
    )


def gemm_line(records: Sequence[Record]) -> str:
    """Matrix products of the same run: median and highest."""
    rates = {
        name: [one["gemm_gflops"][name] for one in records] for name in records[0]["gemm_gflops"]
    }
    return "GEMM, GFLOP/s, median (highest): " + ", ".join(
        f"{name} {np.median(found):,.0f} ({max(found):,.0f})" for name, found in rates.items()
    )


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:], ""]
    )


Variants = list[tuple[tuple[str, ...], str, list[Record]]]


def _variants(records: Sequence[Record]) -> Variants:
    """Group the records: (model and input, variant, records), in order of model and input."""

    def about(record: Record) -> tuple[str, ...]:
        return tuple(record[key] for key in ("model", "input") if key in record)

    grouped = [(key, list(group)) for key, group in groupby(records, key=about)]
    return [(key, name, group) for key, group in grouped for name in group[0]["seconds"]]


def _ratios(name: str, records: Sequence[Record]) -> np.ndarray:
    """Return the speed relative to extract.py on the same chunk at the same time, by chunk."""
    return np.array([record["seconds"][BASELINE] / record["seconds"][name] for record in records])


def _ratio_cells(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    low, q1, median, q3, high = np.percentile(_ratios(name, records), [0, 25, 50, 75, 100])
    goal = GOALS.get(name)
    verdict = "" if goal is None else f">= {goal} {'reached' if median >= goal else 'MISSED'}"
    return (
        f"{median:.2f}",
        f"{q1:.2f}..{q3:.2f}",
        f"{low:.2f}..{high:.2f}",
        str(len(records)),
        verdict,
    )


def _spread_record(about: tuple[str, ...], name: str, records: Sequence[Record]) -> dict[str, Any]:
    low, q1, median, q3, high = np.percentile(_ratios(name, records), [0, 25, 50, 75, 100]).tolist()
    tokens_per_s = float(np.median([one["tokens"] / one["seconds"][name] for one in records]))
    spread = {
        "median": median,
        "q1": q1,
        "q3": q3,
        "min": low,
        "max": high,
        "n": len(records),
        "goal": GOALS.get(name),
    }
    return {"about": about, "variant": name, "times_extract": spread, "tokens_per_s": tokens_per_s}


def _ceiling(gemm_gflops: Mapping[str, float], name: str) -> float:
    """The fastest matrix product of a variant's precision on this machine, by whatever library."""
    if "bf16" in name:
        return gemm_gflops["bf16_mm"]
    return max(gemm_gflops["fp32_mm"], gemm_gflops["fp32_conv"])


def _speed_of_fair_esm(model: str, records: Sequence[Record]) -> float | None:
    """Return the tokens/s of a model's first record, fair-esm's in float32 on small batches."""
    first = next(record for record in records if record["model"] == model)
    return None if "failed" in first else first["tokens"] / float(np.median(first["seconds"]))


def _gpu_cells(record: Record, speed_of_fair_esm: float | None) -> tuple[str, ...]:
    about = record["model"], record["variant"], f"{record['token_budget']:,}"
    if "failed" in record:
        return (*about, record["failed"], "", "", "", "", "")
    tokens_per_s = record["tokens"] / np.median(record["seconds"])
    tflops = record["flops"] / np.median(record["seconds"]) / 1e12
    ratio = "" if speed_of_fair_esm is None else f"{tokens_per_s / speed_of_fair_esm:.2f}"
    peak = "" if record["peak_gib"] is None else f"{record['peak_gib']:.1f}"
    speed = f"{tokens_per_s:,.0f}", f"{tflops:.3g}", f"{tflops / record['gemm_tflops']:.0%}"
    return (*about, ratio, *speed, peak, f"{record['least_cosine']:.5f}")


def _describe_cpu(results: Record) -> str:
    layers = ", ".join(f"{team}: {way}" for team, way in results["linear_layers"].items())
    summary = f"{gemm_line(results['chunks'])}. Our linear layers in float32: {layers}."
    parts = [machine_lines(results), summary, chunk_table(results["chunks"])]
    if results["programs"]:
        parts.append(program_table(results["programs"]))
    return "\n\n".join(parts)


def _describe_gpu(results: Record) -> str:
    return "\n\n".join([machine_lines(results), gpu_table(results["measurements"])])


_DESCRIBE: dict[str, Callable[[Record], str]] = {"cpu": _describe_cpu, "gpu": _describe_gpu}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--readme", action="store_true", help="put the tables into benchmarks/README.md"
    )
    given = parser.parse_args()
    results = json.loads(given.file.read_text())
    kind = "gpu" if "measurements" in results else "cpu"
    described = _DESCRIBE[kind](results)
    if not given.readme:
        print(described)
        return
    begin, end = f"<!-- {kind} results -->", f"<!-- end of {kind} results -->"
    source = f"From `results/{given.file.name}`.\n\n{described}"
    pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
    README.write_text(pattern.sub(lambda _: f"{begin}\n{source}\n{end}", README.read_text()))


if __name__ == "__main__":
    main()
