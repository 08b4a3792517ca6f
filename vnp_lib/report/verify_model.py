"""Compare our network with fair-esm's on this machine, layer by layer, with the same weights.

fair-esm's tokenizer and network run in float32 on the CPU, one sequence at a time. Ours runs in the
dtype and on the device of a run, with all sequences packed into one batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, RenderResult, group
from rich.table import Table
from torch import Tensor

from vnp_lib.config import ModelName
from vnp_lib.devices import resolve_devices, resolve_dtype, torch_device_name
from vnp_lib.errors import ConfigError
from vnp_lib.inference import LEAST_COSINE, embed_batch
from vnp_lib.model import (
    Weights,
    architecture_of,
    fair_esm_network,
    is_official,
    load_model,
    pack_batch,
    parameters_of,
    resolve_weights,
)
from vnp_lib.terminal import natural_width, plain

SEQUENCES = {
    "Trp-cage": "NLYIQWLKDGGPSSGRPPPS",
    "ambiguous and rare amino acids": "MQIFVXTLTGKTIBLEVEPUDTIENVZAKIODKEGIPPDXX",
    "human ubiquitin": (
        "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    ),
    "human insulin, P01308": (
        "MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERGFFYTPKTRREAEDLQVGQVELGGGPGAGSLQPLALEGSLQK"
        "RGIVEQCCTSICSLYQLENYCN"
    ),
    "green fluorescent protein, P42212": (
        "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQHDFFKSAM"
        "PEGYVQERTIFFKDDGNYKTRAEVKFEGDTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSV"
        "QLADHYQQNTPIGDGPVLLPDNHYLSTQSALSKDPNEKRDHMVLLEFVTAAGITHGMDELYK"
    ),
    "protein E2 of human papillomavirus 27, P36789": (
        "METLANRLDACQETLLELYEKDSNKLEDQIKHWAQVRLENVMLFKARECGMTRVGCTTVPALTVSKAKACQAIEVQLALQTLMQSAYS"
        "TEAWTLRDTCLEMWDAPPKKCWKKKGLSVLVKFDGSSDRDMIYTGWHHIYVQDANDDTWHKVPGKVDELGLYYEHDGVRVNYVDFGTE"
        "SLTYGVTGTWEVHVAGRVIHHTSASVSSTQATASDDEPLSPIRLAVSPVPAPASAASARTGTAPPTNLLCTAPAPPSPPAKRQRVIVG"
        "QQHLRPDSTRTVGEGQVECYDKRSISNTNSTAPRWDHGDTDTVPVIHLRGDANCLKCFRYRVQKHKDKLYDRVSSTWHWAGGKCDKTA"
        "FVTVWYTSVEQRKEFLTRVNIPKGVIALPGYMSAFV"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far apart two correct computations may be."""

    # The largest difference in a layer, by fair-esm's largest value there; None: any.
    relative_difference: float | None
    residue_cosine: float  # lowest in a layer
    mean_cosine: float  # lowest, of the mean embeddings of a run

    def describe(self) -> str:
        cosines = (
            f"cosines of at least {self.residue_cosine} for residues and {self.mean_cosine} for "
            "means"
        )
        if self.relative_difference is None:
            return cosines
        return (
            f"differences of at most {self.relative_difference:.0e} of the largest value, {cosines}"
        )


# The rounding errors of half precision grow from layer to layer. Wrong results have far lower
# cosines.
_ROUNDED = Tolerance(relative_difference=None, residue_cosine=0.99, mean_cosine=LEAST_COSINE)
TOLERANCES = {
    "float32": Tolerance(relative_difference=1e-4, residue_cosine=0.9999, mean_cosine=0.99999),
    "bfloat16": _ROUNDED,
    "float16": _ROUNDED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """Our states of a layer compared with fair-esm's, over all sequences."""

    layer: int  # as numbered by fair-esm: 0 is the embedding
    max_abs_difference: float
    relative_difference: float  # by fair-esm's largest value
    lowest_cosine: float  # over all residues

    @classmethod
    def between(cls, layer: int, ours: list[Tensor], theirs: list[Tensor]) -> LayerComparison:
        """Compare states, each (residues + 2, D), sequence by sequence.

        Non-finite values count as infinitely far apart.
        """
        pairs = [(our.double(), their.double()) for our, their in zip(ours, theirs, strict=True)]
        difference = max(
            float((our - their).abs().nan_to_num(inf, posinf=inf).max()) for our, their in pairs
        )
        cosines = [
            F.cosine_similarity(our[1:-1], their[1:-1]).nan_to_num(-1.0).min()
            for our, their in pairs
        ]
        return cls(
            layer=layer,
            max_abs_difference=difference,
            relative_difference=difference / max(float(their.abs().max()) for _, their in pairs),
            lowest_cosine=float(min(cosines)),
        )

    def is_within(self, tolerance: Tolerance) -> bool:
        allowed = tolerance.relative_difference
        is_near = allowed is None or self.relative_difference <= allowed
        return is_near and self.lowest_cosine >= tolerance.residue_cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """The comparison of the two networks."""

    model: str
    dtype: str
    device: str
    weights: str  # path, or "random"
    weights_digest: str
    is_official: bool | None  # None: not known
    layers: tuple[LayerComparison, ...]
    lowest_mean_cosine: float  # over all sequences, last layer

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def first_apart(self) -> int | None:
        """The first layer outside the tolerance; None if all are within."""
        return next(
            (each.layer for each in self.layers if not each.is_within(self.tolerance)), None
        )

    @property
    def is_close(self) -> bool:
        return self.first_apart is None and self.lowest_mean_cosine >= self.tolerance.mean_cosine

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; null stands for a non-finite number."""
        derived = {
            "tolerance": asdict(self.tolerance),
            "first_apart": self.first_apart,
            "is_close": self.is_close,
        }
        fields: dict[str, Any] = _finite(asdict(self) | derived)
        return fields


def compare_with_fair_esm(
    model: ModelName, weights: str, *, dtype: str, device: str
) -> ModelReport:
    """Compute `SEQUENCES` with fair-esm's network and with ours.

    This takes as much host memory as fair-esm's network in float32, 12 GB for 3B.

    Args:
        model, weights, dtype: As in the settings of a run.
        device: "auto" (the first GPU, or the CPU without one), "cpu", or the number of a GPU.

    Raises:
        ConfigError: If the model or the device does not exist.
        WeightsError: If the weights cannot be used.
    """
    if not re.fullmatch(r"auto|cpu|\d+", device):
        raise ConfigError(f"--device {device}: use 'auto', 'cpu' or the number of a GPU")
    architecture_of(model)
    device = resolve_devices(device, model)[0]
    dtype = resolve_dtype(dtype, device)
    found = resolve_weights(model, weights)
    theirs = _states_of_fair_esm(found)
    ours, means = _our_states(found, getattr(torch, dtype), torch.device(torch_device_name(device)))
    their_means = torch.stack([states[1:-1].mean(dim=0) for states in theirs[-1]])
    return ModelReport(
        model=model,
        dtype=dtype,
        device=device,
        weights=str(found.path or weights),
        weights_digest=found.digest,
        is_official=is_official(found),
        layers=tuple(
            LayerComparison.between(layer, *states)
            for layer, states in enumerate(zip(ours, theirs, strict=True))
        ),
        lowest_mean_cosine=float(
            F.cosine_similarity(means.double(), their_means.double()).nan_to_num(-1.0).min()
        ),
    )


@torch.inference_mode()
def _states_of_fair_esm(weights: Weights) -> list[list[Tensor]]:
    """Return the states of each layer, one tensor per sequence."""
    from esm import Alphabet

    layers = range(weights.architecture.num_layers + 1)
    network = fair_esm_network(weights.architecture, dict(parameters_of(weights)))
    to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    batches = (to_tokens([record])[2] for record in SEQUENCES.items())
    outputs = [network(tokens, repr_layers=layers)["representations"] for tokens in batches]
    return [[output[layer][0] for output in outputs] for layer in layers]


@torch.inference_mode()
def _our_states(
    weights: Weights, dtype: torch.dtype, device: torch.device
) -> tuple[list[list[Tensor]], Tensor]:
    """Return the states of each layer, one tensor per sequence, and the embeddings of a run.

    All are on the CPU.
    """
    network = load_model(weights, dtype=dtype, device=device)
    batch = pack_batch([*SEQUENCES.values()], [*SEQUENCES], range(len(SEQUENCES)), batch_idx=0)
    batch = batch.to(device)
    layers = range(network.architecture.num_layers + 1)
    states = network.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers)[
        "representations"
    ]
    lengths = batch.cu_seqlens.diff().tolist()
    return [list(states[layer].cpu().split_with_sizes(lengths)) for layer in layers], embed_batch(
        network, batch
    ).cpu()


@group()
def render_model_report(report: ModelReport) -> RenderResult:
    """Render the comparison for a terminal."""
    where = "the CPU" if report.device == "cpu" else f"GPU {report.device}"
    yield plain(
        f"{report.model} in {report.dtype} on {where}, compared with fair-esm in float32 on the "
        "CPU",
        style="bold",
    )
    yield plain(f"weights: {report.weights} ({report.weights_digest})")
    yield {
        True: plain("official weights", style="green"),
        False: plain("not the official weights", style="yellow"),
        None: plain(
            "not known whether they are official: no sha256 of this model's official files is known"
        ),
    }[report.is_official]
    residues = sum(map(len, SEQUENCES.values()))
    yield plain(f"{len(SEQUENCES)} sequences, {residues:,} residues")
    yield _Layers(report)
    yield plain(f"lowest cosine of a mean embedding: {report.lowest_mean_cosine:.6f}", style="bold")
    yield plain(f"allowed in {report.dtype}: {report.tolerance.describe()}", style="dim")
    if report.is_close:
        yield plain("close enough: equivalent to fair-esm's model", style="green")
    elif report.first_apart is None:
        yield plain(
            "too far apart: every layer is within tolerance, the mean embeddings are not",
            style="bold red",
        )
    else:
        yield plain(f"too far apart: layer {report.first_apart} is the first", style="bold red")


class _Layers:
    """Render a table if its numbers fit the terminal, else a paragraph per layer."""

    def __init__(self, report: ModelReport) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = (
            "layer",
            "largest difference",
            "of the largest value",
            "lowest cosine of a residue",
        )
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for each in self._report.layers:
            table.add_row(
                plain(str(each.layer)),
                plain(f"{each.max_abs_difference:.2g}"),
                plain(f"{each.relative_difference:.1e}"),
                plain(f"{each.lowest_cosine:.6f}"),
                plain("" if each.is_within(self._report.tolerance) else "too far", "bold red"),
            )
        if natural_width(table, console, options) <= options.max_width:
            yield table
            return
        for each in self._report.layers:
            yield plain(
                f"layer {each.layer}: largest difference {each.max_abs_difference:.2g}, "
                f"{each.relative_difference:.1e} of the largest value, "
                f"lowest cosine of a residue {each.lowest_cosine:.6f}"
                + ("" if each.is_within(self._report.tolerance) else "; too far")
            )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
