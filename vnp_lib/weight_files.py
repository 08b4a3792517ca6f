"""Files of ESM-2's parameters, as fair-esm and as Hugging Face lay them out: all are read by fair-esm's names.

What is read stays in the file, mapped into memory, until it is used.
"""

from __future__ import annotations

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from vnp_lib.failures import WeightsError

_SAFETENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WANTED = "give the path of fair-esm's .pt file, or of Hugging Face's model.safetensors or its directory"

# Pieces of names, fair-esm's and those of transformers' EsmModel; a piece comes before those that are part of it.
_IN_TRANSFORMERS = {
    "embed_tokens.": "embeddings.word_embeddings.",
    "emb_layer_norm_after.": "encoder.emb_layer_norm_after.",
    "layers.": "encoder.layer.",
    "self_attn_layer_norm.": "attention.LayerNorm.",
    "self_attn.q_proj.": "attention.self.query.",
    "self_attn.k_proj.": "attention.self.key.",
    "self_attn.v_proj.": "attention.self.value.",
    "self_attn.out_proj.": "attention.output.dense.",
    "final_layer_norm.": "LayerNorm.",
    "fc1.": "intermediate.dense.",
    "fc2.": "output.dense.",
}
_OF_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # transformers writes them still
_FAIR_ESM_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")
_DAMAGE = (EOFError, RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, AttributeError)


def locate_weights(path: Path) -> Path:
    """Find the file that holds the parameters, or the index of those that do.

    Args:
        path: Such a file already; a directory as `hf download --local-dir` makes it; or a model's directory in the cache of
            Hugging Face's hub, `models--facebook--esm2_.../` with or without `snapshots/REVISION`.

    Returns:
        An absolute path. Links stay as they are: in the hub's cache they lead to files whose names tell nothing.

    Raises:
        WeightsError: A directory where there is none, or one of several revisions would have to be guessed.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        return path
    directory = _snapshot(path) if (path / "snapshots").is_dir() else path
    for name in (_INDEX, _SAFETENSORS):
        if (directory / name).exists():
            return directory / name
    if pickled := sorted(directory.glob("*.bin")):
        raise _cannot_read_pickles(pickled[0])
    raise WeightsError(f"cannot read the weights at {path} (it is a directory without {_SAFETENSORS}): {_WANTED}")


def files_of(located: Path) -> tuple[Path, ...]:
    """The files that hold the parameters: one, or those that an index names.

    Raises:
        WeightsError: The index is damaged, or files that it names are missing.
    """
    if not located.name.endswith(".index.json"):
        return (located,)
    with _reading(located):
        files = tuple(located.parent / name for name in _names_in_index(located))
    if missing := [file.name for file in files if not file.exists()]:
        raise WeightsError(
            f"{located} names {len(files)} files, and {len(missing)} are not beside it ({', '.join(missing[:3])}): "
            "download them again"
        )
    return files


def read_tensors(located: Path) -> dict[str, Tensor]:
    """Read parameters by fair-esm's names, those of heads among them; the numbers stay in the file until they are used.

    Raises:
        WeightsError: A file is missing, damaged, or of no known layout.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(located):
        if file.suffix == ".bin":
            raise _cannot_read_pickles(file)
        with _reading(file):
            tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_fair_esm(file)
    return tensors


def save_fair_esm(path: Path, settings: Namespace, state: Mapping[str, Tensor]) -> None:
    """Write parameters as fair-esm writes ESM-2's."""
    prefixed = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    torch.save({"cfg": {"model": settings}, "model": prefixed}, path)


def name_in_transformers(name: str) -> str:
    """Give the name that a parameter of fair-esm's has in transformers' EsmModel."""
    for ours, theirs in _IN_TRANSFORMERS.items():
        name = name.replace(ours, theirs)
    return name


def _name_in_fair_esm(name: str) -> str:
    name = name.removeprefix("esm.")  # EsmForMaskedLM has it, EsmModel has not
    for old, new in (*_OF_OLD.items(), *((theirs, ours) for ours, theirs in _IN_TRANSFORMERS.items())):
        name = name.replace(old, new)
    return name


def _snapshot(cached: Path) -> Path:
    """The revision that is to be taken of a model in the hub's cache: `main`, or the only one."""
    snapshots = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    main = cached / "refs/main"
    if main.is_file() and (named := cached / "snapshots" / main.read_text().strip()) in snapshots:
        return named
    if len(snapshots) != 1:
        raise WeightsError(f"{cached} holds {len(snapshots)} revisions, and none is main: give the path of one of them")
    return snapshots[0]


def _names_in_index(index: Path) -> list[str]:
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if not names or any(Path(name).name != name for name in names):  # nothing outside of the index's directory
        raise ValueError("it names no files, or files elsewhere")
    return names


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open  # a machine that measures random weights does without

    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    is_rotary = any("rotary_embeddings" in name for name in found)
    return {
        _name_in_fair_esm(name): tensor
        for name, tensor in found.items()
        # Older versions of transformers wrote a table of absolute positions for models that use none.
        if not (is_rotary and "position_embeddings" in name)
    }


def _read_fair_esm(path: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    named = {_FAIR_ESM_PREFIX.sub("", name): tensor for name, tensor in content["model"].items()}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(f"cannot read the weights at {path} ({error.strerror or error}): {_WANTED}") from error
    except _DAMAGE as error:
        whose = "Hugging Face's" if path.suffix in (".safetensors", ".json") else "fair-esm's"
        raise WeightsError(
            f"{path} is damaged or no file of {whose} ({type(error).__name__}): remove it and get it again"
        ) from error


def _cannot_read_pickles(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} is a pickle of Hugging Face's, and only their safetensors are read: take fair-esm's .pt file, or write "
        "safetensors with `transformers.EsmModel.from_pretrained(...).save_pretrained(...)`"
    )
