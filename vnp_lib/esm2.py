"""ESM-2: the network over packed batches, its weights from a file or a seed, and the pooling of its states."""

from __future__ import annotations

import re
import socket
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from math import sqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vnp_lib.attention import PackedLayout, pairs_adjacent, rotary_factors, rotate, varlen_attention
from vnp_lib.failures import ConfigError, WeightsError
from vnp_lib.files import digest_file
from vnp_lib.linear import Linear, convolution_is_faster
from vnp_lib.tokens import ALPHABET_SIZE, PAD

RANDOM_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    num_layers: int
    embed_dim: int
    attention_heads: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.attention_heads

    @property
    def num_parameters(self) -> int:
        """Of the network without its heads."""
        of_a_layer = 12 * self.embed_dim**2 + 13 * self.embed_dim
        return self.num_layers * of_a_layer + (ALPHABET_SIZE + 2) * self.embed_dim


MODELS = {
    "esm2_t6_8M_UR50D": Architecture(num_layers=6, embed_dim=320, attention_heads=20),
    "esm2_t12_35M_UR50D": Architecture(num_layers=12, embed_dim=480, attention_heads=20),
    "esm2_t30_150M_UR50D": Architecture(num_layers=30, embed_dim=640, attention_heads=20),
    "esm2_t33_650M_UR50D": Architecture(num_layers=33, embed_dim=1280, attention_heads=20),
    "esm2_t36_3B_UR50D": Architecture(num_layers=36, embed_dim=2560, attention_heads=40),
    "esm2_t48_15B_UR50D": Architecture(num_layers=48, embed_dim=5120, attention_heads=40),
}


def architecture_of(model: str) -> Architecture:
    """Look a model up by name; ConfigError where it is none of ESM-2's six."""
    if model not in MODELS:
        raise ConfigError(f"there is no model {model!r}; choose one of {', '.join(MODELS)}")
    return MODELS[model]


class ESM2(nn.Module):
    """ESM-2 without its heads, for inference (Lin et al. 2023, doi:10.1126/science.ade2574).

    Queries, keys and values come from one projection, in the order that `rotate` wants; else it is fair-esm's network.
    """

    def __init__(self, architecture: Architecture, *, by_convolution: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        # Given a weight, it draws none: for that, on "meta", torch imports its compiler, which takes seconds.
        weight = torch.empty(ALPHABET_SIZE, architecture.embed_dim)
        self.embed_tokens = nn.Embedding(ALPHABET_SIZE, architecture.embed_dim, padding_idx=PAD, _weight=weight)
        self.layers = nn.ModuleList(
            _TransformerLayer(architecture, by_convolution=by_convolution) for _ in range(architecture.num_layers)
        )
        self.emb_layer_norm_after = nn.LayerNorm(architecture.embed_dim)
        self.requires_grad_(False)

    @classmethod
    def from_fair_esm(
        cls, architecture: Architecture, tensors: Iterable[tuple[str, Tensor]], *, by_convolution: bool = False
    ) -> Self:
        """Build it on fair-esm's parameters, by fair-esm's names; it keeps those that need no change.

        Args:
            by_convolution: How to multiply, see `Linear`; for float32 on a CPU only.
        """
        with torch.device("meta"):
            network = cls(architecture, by_convolution=by_convolution)
        network.load_state_dict(dict(_with_fused_projections(tensors, architecture.head_dim)), assign=True)
        return network.eval()

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, repr_layers: Sequence[int] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """Compute the states of every token.

        Args:
            input_ids: Tokens without PAD or MASK, int64, (T,).
            cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,), first 0, last T.
            max_seqlen: The longest sequence, in tokens.
            repr_layers: Which layers to return, in fair-esm's numbers: 0 is the embedding, `num_layers`, the default, is
                the last one after the final layer norm. Layers above the highest are not computed.

        Returns:
            {"representations": {layer: states, (T, D), in the weights' dtype}}
        """
        last = self.architecture.num_layers
        wanted = {last} if repr_layers is None else set(repr_layers)
        if not wanted <= set(range(last + 1)):
            raise ValueError(f"repr_layers is {sorted(wanted)}; this model has layers 0 to {last}")

        x = self.embed_tokens(input_ids) * _TOKEN_DROPOUT_SCALE
        layout = PackedLayout.of(cu_seqlens, max_seqlen, x.dtype)
        factors = rotary_factors(layout, len(x), self.architecture.head_dim)
        representations = {0: x} if 0 in wanted else {}
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, layout, factors)
            if number in wanted:
                representations[number] = x if number < last else self.emb_layer_norm_after(x)
        return {"representations": representations}


# In training 12 % of the tokens (15 % chosen, 80 % of those masked) were zero; without masks the embeddings shrink likewise.
_TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8


class _TransformerLayer(nn.Module):
    def __init__(self, architecture: Architecture, *, by_convolution: bool) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.self_attn = _SelfAttention(architecture, by_convolution=by_convolution)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, 4 * dim, by_convolution=by_convolution)
        self.fc2 = Linear(4 * dim, dim, by_convolution=by_convolution)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, layout: PackedLayout, factors: Tensor) -> Tensor:
        # `add_` goes into the fresh tensor: x may be among the states that the caller asked for.
        x = self.self_attn(self.self_attn_layer_norm(x), layout, factors).add_(x)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))).add_(x)
        return hidden


class _SelfAttention(nn.Module):
    def __init__(self, architecture: Architecture, *, by_convolution: bool) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.heads = (architecture.attention_heads, architecture.head_dim)
        self.qkv_proj = Linear(dim, 3 * dim, by_convolution=by_convolution)
        self.out_proj = Linear(dim, dim, by_convolution=by_convolution)

    def forward(self, x: Tensor, layout: PackedLayout, factors: Tensor) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, *self.heads))
        q, k = rotate(qkv[:, :2], factors).unbind(1)
        attended = varlen_attention(q, k, qkv[:, 2], layout)
        out: Tensor = self.out_proj(attended.flatten(-2))
        return out


_PROJECTION = re.compile(r"(layers\.\d+\.self_attn\.)([qkv])(_proj\.(?:weight|bias))")


def _with_fused_projections(tensors: Iterable[tuple[str, Tensor]], head_dim: int) -> Iterator[tuple[str, Tensor]]:
    """Lay fair-esm's three projections of each layer into one, as soon as all three have come."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if (match := _PROJECTION.fullmatch(name)) is None:
            yield name, tensor
            continue
        fused_name = f"{match[1]}qkv{match[3]}"
        parts = waiting.setdefault(fused_name, {})
        parts[match[2]] = tensor if match[2] == "v" else pairs_adjacent(tensor, head_dim)
        if len(parts) == 3:
            yield fused_name, torch.cat([waiting[fused_name][which] for which in "qkv"])
            del waiting[fused_name]


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average each sequence's residue states, leaving out BOS and EOS.

    Args:
        hidden: States, (T, D), with T = cu_seqlens[-1].
        cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,), first 0.

    Returns:
        One vector per sequence, float32, (B, D).

    Matches the "mean" representation of fair-esm's scripts/extract.py.
    """
    num_residues = cu_seqlens.diff() - 2
    one = torch.ones_like(num_residues)
    bos_residues_eos = torch.stack((one, num_residues, one), dim=1).flatten()
    means = torch.segment_reduce(hidden.float(), "mean", lengths=bos_residues_eos, axis=0, unsafe=True)
    return means[1::3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Which parameters a run uses."""

    source: Literal["file", "random"]
    path: Path | None = None  # where source is "file"
    digest: str  # sha256 of the file, or how the random ones were drawn


def resolve_weights(model: str, weights: str) -> Weights:
    """Find a model's weights and see that they are the model's.

    Args:
        model: One of `MODELS`.
        weights: "auto" (fair-esm's file in torch.hub's cache, downloaded where it is not there), "random", or a path.

    Raises:
        ConfigError: The model is unknown.
        WeightsError: There is no such file, it is damaged, or it is of another model.
    """
    architecture = architecture_of(model)
    if weights == "random":
        return Weights(source="random", digest=f"random:seed={RANDOM_SEED}")
    path = _hub_file(model) if weights == "auto" else Path(weights).expanduser()
    _checked_state(path, model, architecture)
    return Weights(source="file", path=path.resolve(), digest=digest_file(path).sha256)


def load_model(
    model: str, weights: Weights, *, dtype: torch.dtype, device: torch.device, by_convolution: bool | None = None
) -> ESM2:
    """Build a model for inference in `dtype` on `device`; tensors are cast one by one, never the whole model twice.

    Random ones give vectors that mean nothing; it is for the caller to say so.

    Args:
        by_convolution: How float32 is multiplied on a CPU, see `Linear`; None tries which way is faster.

    Raises:
        WeightsError: The file has gone, is damaged, or is of another model.
    """
    architecture = architecture_of(model)
    tensors: Iterable[tuple[str, Tensor]]
    if weights.path is None:
        tensors = random_tensors(architecture)
    else:
        tensors = _checked_state(weights.path, model, architecture).items()
    # A copy in any case: what is read in place changes under the model when someone overwrites the file.
    own = ((name, tensor.to(device, dtype, copy=True)) for name, tensor in tensors)
    if device.type != "cpu" or dtype != torch.float32:
        by_convolution = False
    elif by_convolution is None:
        by_convolution = convolution_is_faster()
    return ESM2.from_fair_esm(architecture, own, by_convolution=by_convolution)


def random_tensors(architecture: Architecture, *, seed: int = RANDOM_SEED) -> Iterator[tuple[str, Tensor]]:
    """Draw float32 parameters, name by name, the same on every machine.

    Layer norms and biases are not neutral, so that a forgotten one shows; states keep their size through all layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in _fair_esm_shapes(architecture).items():
        # Uniform, since a normal draw's last bits depend on the CPU's vector width.
        noise = torch.rand(shape, generator=generator).mul_(2).sub_(1)
        yield name, _scaled_parameter(name, noise, architecture)


def save_weights(path: Path, model: str, state: Mapping[str, Tensor]) -> None:
    """Write parameters as fair-esm writes ESM-2's: a `.pt` that fair-esm and `load_model` read."""
    architecture = architecture_of(model)
    settings = Namespace(
        encoder_layers=architecture.num_layers,
        encoder_embed_dim=architecture.embed_dim,
        encoder_attention_heads=architecture.attention_heads,
        token_dropout=True,
    )
    prefixed = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    torch.save({"cfg": {"model": settings}, "model": prefixed}, path)


def _fair_esm_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """fair-esm's parameters that this network needs, in fair-esm's order but for queries, which come first."""
    dim = architecture.embed_dim
    norm: dict[str, tuple[int, ...]] = {"weight": (dim,), "bias": (dim,)}
    square: dict[str, tuple[int, ...]] = {"weight": (dim, dim), "bias": (dim,)}
    layer: dict[str, dict[str, tuple[int, ...]]] = {
        **{f"self_attn.{which}_proj": square for which in ("q", "k", "v", "out")},
        "self_attn_layer_norm": norm,
        "fc1": {"weight": (4 * dim, dim), "bias": (4 * dim,)},
        "fc2": {"weight": (dim, 4 * dim), "bias": (dim,)},
        "final_layer_norm": norm,
    }
    modules: dict[str, dict[str, tuple[int, ...]]] = {
        "embed_tokens": {"weight": (ALPHABET_SIZE, dim)},
        **{f"layers.{n}.{name}": own for n in range(architecture.num_layers) for name, own in layer.items()},
        "emb_layer_norm_after": norm,
    }
    return {f"{name}.{kind}": shape for name, own in modules.items() for kind, shape in own.items()}


def _scaled_parameter(name: str, noise: Tensor, architecture: Architecture) -> Tensor:
    """Scale noise from [-1, 1) to what suits the parameter."""
    if "layer_norm" in name:
        return noise.mul_(0.2).add_(1) if name.endswith("weight") else noise.mul_(0.2)
    if name.endswith("bias"):
        return noise.mul_(0.1)
    if name.startswith("embed_tokens"):
        return noise.mul_(sqrt(3))  # variance 1
    ends_a_branch = name.endswith(("out_proj.weight", "fc2.weight"))
    variance = 1 / (2 * architecture.num_layers) if ends_a_branch else 1
    return noise.mul_(sqrt(3 * variance / noise.shape[1]))


def _hub_file(model: str) -> Path:
    """fair-esm's file in torch.hub's cache, where fair-esm itself looks for it and puts it."""
    path = Path(torch.hub.get_dir(), "checkpoints", f"{model}.pt")
    if not path.exists():
        _download(model, path)
    return path


def _url(model: str) -> str:
    return f"https://dl.fbaipublicfiles.com/fair-esm/models/{model}.pt"


def _download(model: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(30.0):
            torch.hub.download_url_to_file(_url(model), str(path), progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        raise WeightsError(
            f"the weights of {model} are not at {path} and could not be downloaded from {_url(model)} ({error}): "
            "put the file there, or say where it is"
        ) from error


@contextmanager
def _socket_timeout(timeout_s: float) -> Iterator[None]:
    # torch.hub opens its connection without a timeout, and would wait for ever on a silent network.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _checked_state(path: Path, model: str, architecture: Architecture) -> dict[str, Tensor]:
    """Read the parameters' names and shapes; the numbers stay in the file until they are used."""
    state = _read_state(path)
    found = _architecture_in(state)
    if found is not None and found != (architecture.num_layers, architecture.embed_dim):
        raise WeightsError(
            f"{path} holds {found[0]} layers of width {found[1]}, but {model} has {architecture.num_layers} "
            f"of width {architecture.embed_dim}: choose the model that the file is of, or another file"
        )
    expected_shapes = _fair_esm_shapes(architecture)
    found_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = sorted(expected_shapes.keys() | found_shapes.keys())
    if wrong := [name for name in names if expected_shapes.get(name) != found_shapes.get(name)]:
        raise WeightsError(
            f"{path} does not hold the parameters of {model}: {len(wrong)} are missing, unexpected or of another shape "
            f"({wrong[0]} is the first): get the file from {_url(model)}"
        )
    return state


def _architecture_in(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    layers = {int(found[1]) for name in state if (found := re.match(r"layers\.(\d+)\.", name))}
    embedding = state.get("embed_tokens.weight")
    return (len(layers), embedding.shape[1]) if layers and embedding is not None and embedding.ndim == 2 else None


_FAIR_ESM_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")
_UNUSED = re.compile(r"lm_head\.|contact_head\.|.*\.rot_emb\.inv_freq$")  # in fair-esm's files, not in this network
_DAMAGE = (EOFError, RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        named = {_FAIR_ESM_PREFIX.sub("", name): tensor for name, tensor in content["model"].items()}
        return {
            name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor) and not _UNUSED.match(name)
        }
    except OSError as error:
        raise WeightsError(
            f"cannot read the weights at {path} ({error.strerror or error}): give the path of fair-esm's .pt file"
        ) from error
    except _DAMAGE as error:
        raise WeightsError(
            f"{path} is damaged or no file of fair-esm's ({type(error).__name__}): remove it and get it again"
        ) from error
