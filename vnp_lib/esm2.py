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
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vnp_lib.attention import PackedLayout, rotary_tables, rotate, varlen_attention
from vnp_lib.failures import ConfigError, WeightsError
from vnp_lib.files import digest_file
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
    """ESM-2 without its heads, for inference, with fair-esm's parameter names (Lin et al. 2023, doi:10.1126/science.ade2574)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        # Given a weight, it draws none: for that, on "meta", torch imports its compiler, which takes seconds.
        weight = torch.empty(ALPHABET_SIZE, architecture.embed_dim)
        self.embed_tokens = nn.Embedding(ALPHABET_SIZE, architecture.embed_dim, padding_idx=PAD, _weight=weight)
        self.layers = nn.ModuleList(_TransformerLayer(architecture) for _ in range(architecture.num_layers))
        self.emb_layer_norm_after = nn.LayerNorm(architecture.embed_dim)
        self.requires_grad_(False)

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
        cos, sin = rotary_tables(layout, len(x), self.architecture.head_dim, x.dtype)
        representations = {0: x} if 0 in wanted else {}
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, layout, cos, sin)
            if number in wanted:
                representations[number] = x if number < last else self.emb_layer_norm_after(x)
        return {"representations": representations}


# In training 12 % of the tokens (15 % chosen, 80 % of those masked) were zero; without masks the embeddings shrink likewise.
_TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8


class _TransformerLayer(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.self_attn = _SelfAttention(architecture)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = _Linear(dim, 4 * dim)
        self.fc2 = _Linear(4 * dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, layout: PackedLayout, cos: Tensor, sin: Tensor) -> Tensor:
        # `add_` goes into the fresh tensor: x may be among the states that the caller asked for.
        x = self.self_attn(self.self_attn_layer_norm(x), layout, cos, sin).add_(x)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))).add_(x)
        return hidden


class _SelfAttention(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.heads = (architecture.attention_heads, architecture.head_dim)
        self.q_proj = _Linear(dim, dim)
        self.k_proj = _Linear(dim, dim)
        self.v_proj = _Linear(dim, dim)
        self.out_proj = _Linear(dim, dim)

    def forward(self, x: Tensor, layout: PackedLayout, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = varlen_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, layout)
        out: Tensor = self.out_proj(attended.flatten(-2))
        return out


_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """Multiply tokens, (T, in_features); on a CPU in float32 as a 1 x 1 convolution over them.

        Convolutions go to oneDNN, which uses AVX-512 on every CPU that has it; matrix products go to MKL, which does so
        on Intel's alone. Measured on AMD Zen 5: 410 against 185 GFLOP/s. Both views are free of copies.
        """
        if x.device.type != "cpu" or x.dtype != torch.float32 or not _HAS_ONEDNN:
            return super().forward(x)
        pixels = x[None, None].permute(0, 3, 1, 2)
        return F.conv2d(pixels, self.weight[..., None, None], self.bias).permute(0, 2, 3, 1)[0, 0]


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


def load_model(model: str, weights: Weights, *, dtype: torch.dtype, device: torch.device) -> ESM2:
    """Build a model for inference in `dtype` on `device`; tensors are cast one by one, never the whole model twice.

    Random ones give vectors that mean nothing; it is for the caller to say so.

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
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors}
    network = _empty_network(architecture)
    network.load_state_dict(state, assign=True)
    return network.eval()


def random_tensors(architecture: Architecture, *, seed: int = RANDOM_SEED) -> Iterator[tuple[str, Tensor]]:
    """Draw float32 parameters, name by name, the same on every machine.

    Layer norms and biases are not neutral, so that a forgotten one shows; states keep their size through all layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in _empty_network(architecture).named_parameters():
        # Uniform, since a normal draw's last bits depend on the CPU's vector width.
        noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
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


def _empty_network(architecture: Architecture) -> ESM2:
    with torch.device("meta"):
        return ESM2(architecture)


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
    expected_shapes = {name: parameter.shape for name, parameter in _empty_network(architecture).named_parameters()}
    found_shapes = {name: tensor.shape for name, tensor in state.items()}
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
