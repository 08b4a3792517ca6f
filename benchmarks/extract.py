"""What fair-esm's `esm-extract` does on a CPU, as a program: `python -m benchmarks.extract weights.pt in.fasta out_dir`.

PyPI's fair-esm has the classes but not the script. This is its loop, with its arguments: its loader, its batches of 4,096 tokens,
one file a protein. `python -m benchmarks.bench --extract-script scripts/extract.py` runs the original in its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from esm import FastaBatchedDataset, pretrained
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--include", choices=["mean"], required=True)
    parser.add_argument("--nogpu", action="store_true", required=True)
    given = parser.parse_args()

    model, alphabet = pretrained.load_model_and_alphabet(str(given.weights))
    model.eval()
    dataset = FastaBatchedDataset.from_file(given.fasta)
    batches = dataset.get_batch_indices(4096, extra_toks_per_seq=1)
    loader = DataLoader(dataset, collate_fn=alphabet.get_batch_converter(1022), batch_sampler=batches)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    last = model.num_layers
    with torch.no_grad():
        for labels, sequences, tokens in loader:
            states = model(tokens, repr_layers=[last], return_contacts=False)["representations"][last]
            for row, (label, sequence) in enumerate(zip(labels, sequences, strict=True)):
                mean = states[row, 1 : len(sequence) + 1].mean(0).clone()
                torch.save({"label": label, "mean_representations": {last: mean}}, given.output_dir / f"{label}.pt")


if __name__ == "__main__":
    main()
