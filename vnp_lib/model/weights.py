"""Load ESM-2 weights from a file or a seed, and check that they match the model."""

from __future__ import annotations

import re
import socket
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from http.client import HTTPException
from math import isfinite, sqrt
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from vnp_lib.errors import WeightsError
from vnp_lib.model.esm2 import ESM2, MODELS, Architecture, architecture_of
from vnp_lib.model.linear import convolution_is_faster
from vnp_lib.model.tokens import ALPHABET_SIZE
from vnp_lib.model.weight_files import (
    files_of,
    is_read_whole,
    locate_weights,
    read_tensors,
    save_fair_esm,
)
from vnp_lib.storage import digest_file

RANDOM_SEED = 0

# sha256 of the published files: fair-esm's .pt, and Hugging Face's model.safetensors if it exists.
# Their publishers list none of them. At least three unrelated projects report each of these for the
# file that they downloaded, and none reports another; those of 15B are unknown. No published file
# was available for a comparison.
OFFICIAL_DIGESTS = {
    "esm2_t6_8M_UR50D": frozenset(
        {
            "46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928",
            "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189",
        }
    ),
    "esm2_t12_35M_UR50D": frozenset(
        {
            "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e",
            "e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0",
        }
    ),
    "esm2_t30_150M_UR50D": frozenset(
        {
            "881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62",
            "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566",
        }
    ),
    "esm2_t33_650M_UR50D": frozenset(
        {
            "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
            "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0",
        }
    ),
    "esm2_t36_3B_UR50D": frozenset(
        {"7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500"}
    ),
}
# The same for fair-esm's contact regressions.
OFFICIAL_REGRESSION_DIGESTS = {
    "esm2_t6_8M_UR50D": "8f7a4557d57713b97ba0e484303007efb7230d25299c0ac47a0a1b12a87bbb9d",
    "esm2_t33_650M_UR50D": "8ffe6edbd4173dc8d45c2cd5cb27d43aad77ec26b4c768200c58ae1f96693575",
    "esm2_t36_3B_UR50D": "4da500eab246481dc9c8c95bc7b1d02f2803d761c380b0e95186d4a07d0fc84e",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The parameters of a model: which model, its shape, and where the parameters come from."""

    model: str  # by fair-esm's name
    architecture: Architecture
    source: Literal["file", "random"]
    path: Path | None = None  # of the file, or of the index of several; None if they are random
    # sha256 of the file; of several files, the sha256 of their digests; of random parameters, how
    # they are drawn. Empty if the parameters have not been read.
    digest: str

    @classmethod
    def random(cls, model: str) -> Self:
        """Return the random parameters of a model. Raise ConfigError if there is no such model."""
        return cls(
            model=model,
            architecture=architecture_of(model),
            source="random",
            digest=f"random:seed={RANDOM_SEED}",
        )


def inspect_weights(model: str, weights: str) -> Weights | None:
    """Find the weights of a model and check their names and shapes, without reading their numbers.

    Args:
        model, weights: As for `resolve_weights`. Nothing is downloaded.

    Returns:
        What `resolve_weights` would return, without the digest; None if it would download them.

    Raises:
        ConfigError, WeightsError: As `resolve_weights`.
    """
    architecture = architecture_of(model)
    if weights == "random":
        return Weights.random(model)
    path = published_path(model) if weights == "auto" else Path(weights)
    if weights == "auto" and not path.exists():
        return None
    found = Weights(
        model=model, architecture=architecture, source="file", path=locate_weights(path), digest=""
    )
    assert found.path is not None
    if not is_read_whole(found.path):
        _checked_state(found.path, found)
    return found


def resolve_weights(model: str, weights: str) -> Weights:
    """Find the weights of a model, check that they belong to it, and compute their digest.

    Args:
        model: One of `MODELS`.
        weights: "auto" for fair-esm's file in the cache of torch.hub, which is downloaded if it is
            absent; "random"; or a path, as for `locate_weights`.

    Raises:
        ConfigError: The model is unknown.
        WeightsError: There is no such file, it is damaged, or it belongs to another model.
    """
    architecture = architecture_of(model)
    if weights == "random":
        return Weights.random(model)
    if weights == "auto" and not published_path(model).exists():
        _download(_url(model), published_path(model), what=f"weights of {model}")
    path = locate_weights(published_path(model) if weights == "auto" else Path(weights))
    found = Weights(model=model, architecture=architecture, source="file", path=path, digest="")
    _checked_state(path, found)
    found = replace(found, digest=_digest(path))
    if weights == "auto" and is_official(found) is False:
        raise _not_published(path, found.digest)
    return found


def is_official(weights: Weights) -> bool | None:
    """Return whether the digest is that of a published file; None if none is known of the model."""
    if weights.source == "random":
        return False
    known = OFFICIAL_DIGESTS.get(weights.model)
    return None if known is None else weights.digest in known


def model_of(path: Path) -> str:
    """Return the name of the model in a file, by the number of its layers and their width.

    Args:
        path: As `locate_weights` takes it.

    Raises:
        WeightsError: There is no such file, it is damaged, or its model is none of ESM-2's six.
    """
    found = _architecture_in(read_tensors(locate_weights(path)))
    for model, architecture in MODELS.items():
        if found == (architecture.num_layers, architecture.embed_dim):
            return model
    raise WeightsError(
        f"{path} holds none of {', '.join(MODELS)}: give the file of one of these, or its name"
    )


def load_model(
    weights: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device,
    by_convolution: bool | None = None,
) -> ESM2:
    """Build a model for inference in `dtype` on `device`.

    Parameters are cast one by one, so that memory never holds the model twice. The caller has to
    warn that embeddings with random parameters are meaningless.

    Args:
        by_convolution: How to multiply float32 on a CPU, see `Linear`; None measures which way is
            faster.

    Raises:
        WeightsError: The file is gone, damaged, or of another model; or a parameter is not finite,
            or exceeds the range of `dtype`.
    """
    tensors = parameters_of(weights)
    if weights.path is not None:
        tensors = _each_finite(tensors, weights.path, dtype)
    if device.type != "cpu" or dtype != torch.float32:
        by_convolution = False
    elif by_convolution is None:
        by_convolution = convolution_is_faster()
    # It copies the parameters: mapped ones would change under the model if the file is overwritten.
    return ESM2.from_fair_esm(
        weights.architecture, tensors, dtype=dtype, device=device, by_convolution=by_convolution
    )


def parameters_of(weights: Weights) -> Iterable[tuple[str, Tensor]]:
    """Return the parameters by fair-esm's names, in the dtype of the file.

    Those of a file are read when they are used.

    Raises:
        WeightsError: The file is gone, damaged, or of another model.
    """
    if weights.path is None:
        return random_tensors(weights.architecture)
    return _checked_state(weights.path, weights).items()


def require_finite(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Raise WeightsError if a parameter is not finite in `dtype`: embeddings would not be either.

    This reads all numbers, at 8 GB/s for float32 on one processor. `aminmax` propagates NaN.
    """
    largest = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        low, high = (float(value) for value in tensor.aminmax())
        if not (isfinite(low) and isfinite(high)):
            raise WeightsError(
                f"{path}: the parameter {name} holds NaN or infinity, so that embeddings would, "
                "too: these weights are damaged or of a training that failed; get them again"
            )
        if max(-low, high) > largest:
            kind = str(dtype).removeprefix("torch.")
            raise WeightsError(
                f"{path}: the parameter {name} holds {max(-low, high):g}, "
                f"and {kind} ends at {largest:g}; choose --dtype float32"
            )


def _each_finite(
    tensors: Iterable[tuple[str, Tensor]], path: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Check and yield parameters one by one, each while its numbers are in memory."""
    for name, tensor in tensors:
        require_finite({name: tensor}, path, dtype)
        yield name, tensor


def load_contact_regression(weights: Weights) -> tuple[Tensor, Tensor]:
    """Read the contact regression: a weight per attention head, layer by layer, and a bias.

    fair-esm has it in a small file next to the model's, which is downloaded if the model's was.
    Hugging Face has it among the parameters of the model. It is random if the model is.

    Returns:
        float32 (1, layers * heads) and float32 (1,), on the CPU.

    Raises:
        WeightsError: They are missing, damaged, or of another model.
    """
    model, architecture = weights.model, weights.architecture
    shapes = {
        "contact_head.regression.weight": (
            1,
            architecture.num_layers * architecture.attention_heads,
        ),
        "contact_head.regression.bias": (1,),
    }
    if weights.path is None:
        generator = torch.Generator().manual_seed(RANDOM_SEED)
        weight, bias = (
            torch.rand(shape, generator=generator).mul_(2).sub_(1) for shape in shapes.values()
        )
        return weight, bias
    own_file = weights.path.with_name(f"{weights.path.stem}-contact-regression.pt")
    url = f"https://dl.fbaipublicfiles.com/fair-esm/regression/{model}-contact-regression.pt"
    if weights.path == published_path(model):
        if not own_file.exists():
            _download(url, own_file, what=f"parameters of the contact regression of {model}")
        digest = digest_file(own_file).sha256
        if digest != OFFICIAL_REGRESSION_DIGESTS.get(model, digest):
            raise _not_published(own_file, digest)
    path = own_file if own_file.exists() else weights.path
    tensors = read_tensors(path)
    if any(name not in tensors or tensors[name].shape != shape for name, shape in shapes.items()):
        found = "belongs to another model" if path == own_file else "does not exist"
        raise WeightsError(
            f"contacts of {model} need its contact regression, and {own_file} {found}: "
            f"get it from {url}"
        )
    require_finite({name: tensors[name] for name in shapes}, path)
    weight, bias = (tensors[name].to(torch.float32, copy=True) for name in shapes)
    return weight, bias


def random_tensors(
    architecture: Architecture, *, seed: int = RANDOM_SEED
) -> Iterator[tuple[str, Tensor]]:
    """Draw float32 parameters, name by name, the same on every machine.

    Layer norms and biases are not neutral, so that a test shows if one is omitted. The states keep
    their size through all layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in _fair_esm_shapes(architecture).items():
        # Uniform, since a normal draw's last bits depend on the CPU's vector width.
        noise = torch.rand(shape, generator=generator).mul_(2).sub_(1)
        if "layer_norm" in name:
            noise.mul_(0.2)
            if name.endswith("weight"):
                noise.add_(1)
        elif name.endswith("bias"):
            noise.mul_(0.1)
        elif name.startswith("embed_tokens"):
            # The variance is 1.
            noise.mul_(sqrt(3))
        else:
            ends_a_branch = name.endswith(("out_proj.weight", "fc2.weight"))
            variance = 1 / (2 * architecture.num_layers) if ends_a_branch else 1
            noise.mul_(sqrt(3 * variance / shape[1]))
        yield name, noise


def save_weights(path: Path, model: str, state: Mapping[str, Tensor]) -> None:
    """Write parameters in fair-esm's format: a `.pt` that fair-esm and `load_model` read."""
    architecture = architecture_of(model)
    settings = Namespace(
        encoder_layers=architecture.num_layers,
        encoder_embed_dim=architecture.embed_dim,
        encoder_attention_heads=architecture.attention_heads,
        token_dropout=True,
    )
    save_fair_esm(path, settings, state)


def _fair_esm_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of the network by fair-esm's names.

    They are in the order of fair-esm, except that queries come first.
    """
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
        **{
            f"layers.{n}.{name}": own
            for n in range(architecture.num_layers)
            for name, own in layer.items()
        },
        "emb_layer_norm_after": norm,
    }
    return {f"{name}.{kind}": shape for name, own in modules.items() for kind, shape in own.items()}


def published_path(model: str) -> Path:
    """Return where fair-esm's own file of a model is found or downloaded: torch.hub's cache."""
    return Path(torch.hub.get_dir(), "checkpoints", f"{model}.pt").absolute()


def _digest(path: Path) -> str:
    """Return the sha256 of a file; for an index, that of the digests of its files, by name."""
    digests = []
    for file in files_of(path):
        digest, target = digest_file(file).sha256, file.resolve()
        # The cache of Hugging Face's hub names large files by their sha256.
        is_named_by_digest = target.parent.name == "blobs" and re.fullmatch(
            r"[0-9a-f]{64}", target.name
        )
        if is_named_by_digest and target.name != digest:
            raise WeightsError(
                f"{file} is damaged: its sha256 is {digest}, not the one in the name of {target}; "
                "download it again"
            )
        digests.append(digest)
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def _not_published(path: Path, digest: str) -> WeightsError:
    return WeightsError(
        f"{path} is not the file that fair-esm publishes (its sha256 is {digest}): remove it, and "
        "it is downloaded again; or move it elsewhere and give the path of the weights, to use it"
    )


def _url(model: str) -> str:
    return f"https://dl.fbaipublicfiles.com/fair-esm/models/{model}.pt"


def _download(url: str, path: Path, *, what: str) -> None:
    # torch.hub opens its connection without a timeout, and would wait for ever if nothing answers.
    default_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        raise WeightsError(
            f"the {what} are not at {path} and could not be downloaded from {url} ({error}): "
            "put the file there, or give the path of the weights"
        ) from error
    finally:
        socket.setdefaulttimeout(default_s)


def _checked_state(path: Path, weights: Weights) -> dict[str, Tensor]:
    """Read names and shapes, and check that they are the model's; numbers are read when used."""
    model, architecture = weights.model, weights.architecture
    state = {name: tensor for name, tensor in read_tensors(path).items() if not _UNUSED.match(name)}
    found = _architecture_in(state)
    if found is not None and found != (architecture.num_layers, architecture.embed_dim):
        raise WeightsError(
            f"{path} holds {found[0]} layers of width {found[1]}, but {model} has "
            f"{architecture.num_layers} of width {architecture.embed_dim}: "
            "choose the model of the file, or another file"
        )
    expected_shapes = _fair_esm_shapes(architecture)
    found_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = sorted(expected_shapes.keys() | found_shapes.keys())
    if wrong := [name for name in names if expected_shapes.get(name) != found_shapes.get(name)]:
        raise WeightsError(
            f"{path} does not hold the parameters of {model}: {len(wrong)} are missing, unexpected "
            f"or of another shape ({wrong[0]} is the first): get the file from {_url(model)}"
        )
    return state


def _architecture_in(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    layers = {int(found[1]) for name in state if (found := re.match(r"layers\.(\d+)\.", name))}
    embedding = state.get("embed_tokens.weight")
    return (
        (len(layers), embedding.shape[1])
        if layers and embedding is not None and embedding.ndim == 2
        else None
    )


# Parameters in the files that this network does not have.
_UNUSED = re.compile(r"lm_head\.|contact_head\.|pooler\.|embeddings\.position_ids$|.*\.inv_freq$")
