"""How far our network is from fair-esm's own on this machine, layer by layer, with the same weights.

fair-esm's tokenizer and network do it in float32 on the CPU, one sequence at a time; ours in the dtype and on the device that a
run would use, all sequences packed into one batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vnp_lib.config import ModelName
from vnp_lib.devices import resolve_devices, resolve_dtype, torch_device_name
from vnp_lib.errors import ConfigError
from vnp_lib.inference import LEAST_COSINE, embed_batch
from vnp_lib.model import (
    PackedBatch,
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
    "letters that stand for none or several amino acids, or rare ones": "MQIFVXTLTGKTIBLEVEPUDTIENVZAKIODKEGIPPDXX",
    "human ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "human insulin, P01308": "MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERGFFYTPKTRREAEDLQVGQVELGGGPGAGSLQPLALEGSLQKRGIVEQCCTSIC"
    "SLYQLENYCN",
    "green fluorescent protein, P42212": "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMK"
    "QHDFFKSAMPEGYVQERTIFFKDDGNYKTRAEVKFEGDTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNTPIGDGP"
    "VLLPDNHYLSTQSALSKDPNEKRDHMVLLEFVTAAGITHGMDELYK",
    "protein E2 of human papillomavirus 27, P36789": "METLANRLDACQETLLELYEKDSNKLEDQIKHWAQVRLENVMLFKARECGMTRVGCTTVPALTVSKAKACQA"
    "IEVQLALQTLMQSAYSTEAWTLRDTCLEMWDAPPKKCWKKKGLSVLVKFDGSSDRDMIYTGWHHIYVQDANDDTWHKVPGKVDELGLYYEHDGVRVNYVDFGTESLTYGVTGT"
    "WEVHVAGRVIHHTSASVSSTQATASDDEPLSPIRLAVSPVPAPASAASARTGTAPPTNLLCTAPAPPSPPAKRQRVIVGQQHLRPDSTRTVGEGQVECYDKRSISNTNSTAPR"
    "WDHGDTDTVPVIHLRGDANCLKCFRYRVQKHKDKLYDRVSSTWHWAGGKCDKTAFVTVWYTSVEQRKEFLTRVNIPKGVIALPGYMSAFV",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far apart two computations may be that are both right."""

    relative_difference: (
        float | None
    )  # the largest of a layer, by the largest value of fair-esm's there; None: any
    residue_cosine: float  # the lowest of a layer
    mean_cosine: float  # the lowest, of the embeddings that a run gives

    def describe(self) -> str:
        cosines = f"cosines of at least {self.residue_cosine} for residues and {self.mean_cosine} for means"
        if self.relative_difference is None:
            return cosines
        return (
            f"differences of at most {self.relative_difference:.0e} of the largest value, {cosines}"
        )


# A network rounded to half precision strays from layer to layer; what is wrong in it falls to cosines far below.
_ROUNDED = Tolerance(relative_difference=None, residue_cosine=0.99, mean_cosine=LEAST_COSINE)
TOLERANCES = {
    "float32": Tolerance(relative_difference=1e-4, residue_cosine=0.9999, mean_cosine=0.99999),
    "bfloat16": _ROUNDED,
    "float16": _ROUNDED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """Our states of a layer beside fair-esm's, over all sequences."""

    layer: int  # in fair-esm's numbers: 0 is the embedding
    max_abs_difference: float
    relative_difference: float  # of the largest value of fair-esm's
    lowest_cosine: float  # over all residues

    @classmethod
    def between(cls, layer: int, ours: list[Tensor], theirs: list[Tensor]) -> LayerComparison:
        """Compare states, each (residues + 2, D), sequence by sequence. What is not finite is as far off as can be."""
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
    """How far apart the two are."""

    model: str
    dtype: str
    device: str
    weights: str  # the file, or "random"
    weights_digest: str
    is_official: bool | None  # None: not known
    layers: tuple[LayerComparison, ...]
    lowest_mean_cosine: float  # over all sequences, of the mean embeddings of the last layer

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def first_apart(self) -> int | None:
        """The first layer that is too far off; None where all are near."""
        return next(
            (each.layer for each in self.layers if not each.is_within(self.tolerance)), None
        )

    @property
    def is_close(self) -> bool:
        return self.first_apart is None and self.lowest_mean_cosine >= self.tolerance.mean_cosine

    def to_json(self) -> dict[str, Any]:
        """All of it; null stands for what is not finite."""
        derived = {
            "tolerance": asdict(self.tolerance),
            "first_apart": self.first_apart,
            "is_close": self.is_close,
        }
        told: dict[str, Any] = _finite(asdict(self) | derived)
        return told


def compare_with_fair_esm(
    model: ModelName, weights: str, *, dtype: str, device: str
) -> ModelReport:
    """Compute `SEQUENCES` with fair-esm's network and with ours.

    It takes as much host memory as fair-esm's network does in float32, 12 GB for 3B.

    Args:
        model, weights, dtype: As a run takes them.
        device: "auto" (the first GPU, or else the CPU), "cpu", or a GPU's number.

    Raises:
        ConfigError: There is no such model or device.
        WeightsError: The weights cannot be used.
    """
    if not re.fullmatch(r"auto|cpu|\d+", device):
        raise ConfigError(f"--device {device}: it is 'auto', 'cpu' or the number of a GPU")
    architecture_of(model)
    device = resolve_devices(device, model)[0]
    dtype = resolve_dtype(dtype, device)
    found = resolve_weights(model, weights)
    theirs = _states_of_fair_esm(model, found)
    ours, means = _our_states(
        model, found, getattr(torch, dtype), torch.device(torch_device_name(device))
    )
    their_means = torch.stack([states[1:-1].mean(dim=0) for states in theirs[-1]])
    return ModelReport(
        model=model,
        dtype=dtype,
        device=device,
        weights=str(found.path or weights),
        weights_digest=found.digest,
        is_official=is_official(model, found),
        layers=tuple(
            LayerComparison.between(layer, *states)
            for layer, states in enumerate(zip(ours, theirs, strict=True))
        ),
        lowest_mean_cosine=float(
            F.cosine_similarity(means.double(), their_means.double()).nan_to_num(-1.0).min()
        ),
    )


@torch.inference_mode()
def _states_of_fair_esm(model: str, weights: Weights) -> list[list[Tensor]]:
    """The states of each layer, of each sequence."""
    from esm import Alphabet

    architecture = architecture_of(model)
    layers = range(architecture.num_layers + 1)
    network = fair_esm_network(architecture, dict(parameters_of(model, weights)))
    to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    batches = (to_tokens([record])[2] for record in SEQUENCES.items())
    outputs = [network(tokens, repr_layers=layers)["representations"] for tokens in batches]
    return [[output[layer][0] for output in outputs] for layer in layers]


@torch.inference_mode()
def _our_states(
    model: str, weights: Weights, dtype: torch.dtype, device: torch.device
) -> tuple[list[list[Tensor]], Tensor]:
    """The states of each layer, of each sequence, and the embeddings that a run gives, all on the CPU."""
    network = load_model(model, weights, dtype=dtype, device=device)
    batch = _packed().to(device)
    layers = range(network.architecture.num_layers + 1)
    states = network.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers)[
        "representations"
    ]
    lengths = batch.cu_seqlens.diff().tolist()
    return [list(states[layer].cpu().split_with_sizes(lengths)) for layer in layers], embed_batch(
        network, batch
    ).cpu()


def _packed() -> PackedBatch:
    return pack_batch([*SEQUENCES.values()], [*SEQUENCES], range(len(SEQUENCES)), batch_idx=0)


def render_model_report(report: ModelReport) -> RenderableType:
    """Draw it for a terminal."""
    return Group(*_headline(report), _Layers(report), *_verdict(report))


def _headline(report: ModelReport) -> Iterator[Text]:
    where = "the CPU" if report.device == "cpu" else f"GPU {report.device}"
    yield plain(
        f"{report.model} in {report.dtype} on {where}, beside fair-esm in float32 on the CPU",
        style="bold",
    )
    yield plain(f"weights: {report.weights} ({report.weights_digest})")
    yield {
        True: plain("they are the official ones", style="green"),
        False: plain("they are not the official ones", style="yellow"),
        None: plain(
            "whether they are the official ones is not known: no sha256 of official files of this model is"
        ),
    }[report.is_official]
    residues = sum(map(len, SEQUENCES.values()))
    yield plain(f"{len(SEQUENCES)} sequences, {residues:,} residues")


class _Layers:
    """A table where the terminal has room for its numbers, and else a paragraph for each layer."""

    def __init__(self, report: ModelReport) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _table(self._report)
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


def _table(report: ModelReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "layer",
        "largest difference",
        "of the largest value",
        "lowest cosine of a residue",
        "",
    ):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for each in report.layers:
        is_near = each.is_within(report.tolerance)
        table.add_row(
            plain(str(each.layer)),
            plain(f"{each.max_abs_difference:.2g}"),
            plain(f"{each.relative_difference:.1e}"),
            plain(f"{each.lowest_cosine:.6f}"),
            plain("" if is_near else "too far", style="bold red"),
        )
    return table


def _verdict(report: ModelReport) -> Iterator[Text]:
    yield plain(f"lowest cosine of a mean embedding: {report.lowest_mean_cosine:.6f}", style="bold")
    yield plain(f"allowed in {report.dtype}: {report.tolerance.describe()}", style="dim")
    if report.is_close:
        yield plain("close enough: this is fair-esm's model", style="green")
    elif report.first_apart is None:
        yield plain(
            "too far apart: every layer is near, the mean embeddings are not", style="bold red"
        )
    else:
        yield plain(f"too far apart: layer {report.first_apart} is the first", style="bold red")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
