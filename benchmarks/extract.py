"""Do what fair-esm's `esm-extract` does on a CPU, with its arguments.

    python -m benchmarks.extract weights.pt in.fasta out_dir --include mean --nogpu

PyPI's fair-esm has the classes but not the script. This is its loop: its loader, its batches of
4,096 tokens,
one file per protein. `python -m benchmarks.bench --extract-script scripts/extract.py` runs the
original instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from esm import FastaBatchedDataset, pretrained
from torch import Tensor
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--toks_per_batch", type=int, default=4096)
    parser.add_argument("--repr_layers", type=int, nargs="+", default=[-1])
    parser.add_argument(
        "--include", nargs="+", choices=["mean", "per_tok", "bos", "contacts"], required=True
    )
    parser.add_argument("--truncation_seq_length", type=int, default=1022)
    parser.add_argument("--nogpu", action="store_true", required=True)
    given = parser.parse_args()

    model, alphabet = pretrained.load_model_and_alphabet(str(given.weights))
    model.eval()
    dataset = FastaBatchedDataset.from_file(given.fasta)
    batches = dataset.get_batch_indices(given.toks_per_batch, extra_toks_per_seq=1)
    to_batch = alphabet.get_batch_converter(given.truncation_seq_length)
    loader = DataLoader(dataset, collate_fn=to_batch, batch_sampler=batches)
    layers = [layer % (model.num_layers + 1) for layer in given.repr_layers]
    with torch.no_grad():
        for labels, sequences, tokens in loader:
            output = model(tokens, repr_layers=layers, return_contacts="contacts" in given.include)
            states = output["representations"]
            for row, (label, sequence) in enumerate(zip(labels, sequences, strict=True)):
                num_residues = min(len(sequence), given.truncation_seq_length)
                own = {
                    layer: of_layer[row, : num_residues + 1] for layer, of_layer in states.items()
                }
                result: dict[str, Any] = {"label": label, **_results(own, given.include)}
                if "contacts" in given.include:
                    result["contacts"] = output["contacts"][
                        row, :num_residues, :num_residues
                    ].clone()
                path = given.output_dir / f"{label}.pt"
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(result, path)


def _results(states: dict[int, Tensor], include: list[str]) -> dict[str, dict[int, Tensor]]:
    """Return the requested outputs of a protein's states, those of BOS and of the residues."""
    results = {}
    if "per_tok" in include:
        results["representations"] = {layer: own[1:].clone() for layer, own in states.items()}
    if "mean" in include:
        results["mean_representations"] = {
            layer: own[1:].mean(0).clone() for layer, own in states.items()
        }
    if "bos" in include:
        results["bos_representations"] = {layer: own[0].clone() for layer, own in states.items()}
    return results


if __name__ == "__main__":
    main()
