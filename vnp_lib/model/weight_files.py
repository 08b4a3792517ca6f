"""Read files of ESM-2 parameters in the formats of fair-esm and Hugging Face, by fair-esm's names.

Files are mapped into memory, so that numbers are read when they are used.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from vnp_lib.errors import WeightsError
from vnp_lib.formatting import listed
from vnp_lib.user_paths import PathUse, user_path

_SAFETENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EXPECTED = (
    "give the path of fair-esm's .pt file, or of Hugging Face's model.safetensors or its directory"
)

# Parts of names in fair-esm, and in transformers' EsmModel. A part comes before shorter ones that
# it contains.
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
# transformers still writes the names on the left.
_OLD_NAMES = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}
_FAIR_ESM_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")
_DAMAGE = (
    EOFError,
    RuntimeError,
    UnpicklingError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
)

_START_BYTES = 4096
_START_OF_OLD_TORCH = bytes.fromhex("80028a0a6cfc9c46f920")
_LFS_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/")
_SUBSTITUTES = {
    "a web page, of an error or a log-in": re.compile(
        rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error|!--)", re.IGNORECASE
    ),
    "JSON text, of a server's error": re.compile(rb"\s*\{\s*\""),
    "compressed with gzip": re.compile(rb"\x1f\x8b"),
    "compressed with xz": re.compile(rb"\xfd7zXZ"),
    "compressed with zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "compressed with bzip2": re.compile(rb"BZh\d"),
    "an HDF5 file, of TensorFlow": re.compile(rb"\x89HDF"),
    "a GGUF file": re.compile(rb"GGUF"),
}


def locate_weights(path: Path) -> Path:
    """Find the file that holds the parameters, or the index of those that do.

    Args:
        path: Such a file; a directory made by `hf download --local-dir`; or the directory of a
            model in the cache of Hugging Face's hub, `models--facebook--esm2_.../`, with or without
            `snapshots/REVISION`.

    Returns:
        An absolute path. Links are not resolved: in the cache of the hub they point to files whose
        names have no meaning.

    Raises:
        ConfigError: As `user_path`.
        WeightsError: There is no such file, the directory holds no parameters, or it holds several
            revisions.
    """
    given, path = path, user_path(path, PathUse.WEIGHTS).absolute()
    with _reading(path):
        if not os.path.lexists(path):
            raise WeightsError(
                f"cannot read the weights at {path} (No such file or directory): "
                f"{_advice_for_absent(given)}"
            )
        if not path.is_dir():
            return path
        directory = _snapshot(path) if (path / "snapshots").is_dir() else path
        for name in (_INDEX, _SAFETENSORS):
            if os.path.lexists(directory / name):
                return directory / name
        if pickled := sorted(directory.glob("*.bin")):
            raise _cannot_read_pickles(pickled[0])
        raise WeightsError(
            f"cannot read the weights at {path} (it is a directory without {_SAFETENSORS}): "
            f"{_advice_for_directory(directory)}"
        )


def files_of(located: Path) -> tuple[Path, ...]:
    """Return the files that hold the parameters: one, or all in an index.

    Raises:
        WeightsError: The index is damaged, or files in it are missing.
    """
    if not located.name.endswith(".index.json"):
        return (located,)
    with _reading(located):
        _require_no_substitute(located)
        names = sorted(set(json.loads(located.read_bytes())["weight_map"].values()))
        # Files outside of the directory of the index are refused.
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files, or files elsewhere")
        files = tuple(located.parent / name for name in names)
    if missing := [file.name for file in files if not file.exists()]:
        raise WeightsError(
            f"{located} names {len(files)} files, and {len(missing)} are not in its directory "
            f"({', '.join(missing[:3])}): download them again"
        )
    return files


def read_tensors(located: Path) -> dict[str, Tensor]:
    """Read parameters by fair-esm's names, including those of heads. Numbers are read when used.

    Raises:
        WeightsError: A file is missing, damaged, or of an unknown format.
    """
    tensors: dict[str, Tensor] = {}
    for file in files_of(located):
        with _reading(file):
            _require_no_substitute(file)
            if file.suffix == ".bin":
                raise _cannot_read_pickles(file)
            # Files in the hub's cache have no suffix.
            with file.open("rb") as opened:
                is_safetensors = opened.read(9)[8:] == b"{" or file.suffix == ".safetensors"
            tensors |= _read_safetensors(file) if is_safetensors else _read_fair_esm(file)
    return tensors


def is_read_whole(located: Path) -> bool:
    """Whether `read_tensors` reads all numbers at once: torch before 1.6 wrote the file."""
    (file, *others) = files_of(located)
    with _reading(file), file.open("rb") as opened:
        return not others and opened.read(len(_START_OF_OLD_TORCH)) == _START_OF_OLD_TORCH


def save_fair_esm(path: Path, settings: Namespace, state: Mapping[str, Tensor]) -> None:
    """Write parameters in fair-esm's format."""
    prefixed = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    torch.save({"cfg": {"model": settings}, "model": prefixed}, path)


def name_in_transformers(name: str) -> str:
    """Return the name of a parameter of fair-esm in transformers' EsmModel."""
    for ours, theirs in _IN_TRANSFORMERS.items():
        name = name.replace(ours, theirs)
    return name


def _name_in_fair_esm(name: str) -> str:
    # EsmForMaskedLM has the prefix, EsmModel does not.
    name = name.removeprefix("esm.")
    for old, new in (
        *_OLD_NAMES.items(),
        *((theirs, ours) for ours, theirs in _IN_TRANSFORMERS.items()),
    ):
        name = name.replace(old, new)
    return name


def _advice_for_absent(given: Path) -> str:
    name = str(given)
    if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not given.parent.exists():
        return (
            f"download a model from Hugging Face with `hf download {name} --local-dir weights`; "
            "then give `weights`"
        )
    if re.fullmatch(r"esm2_\w+", name):
        return f"the name of a model is given with --model; {_EXPECTED}"
    return _EXPECTED


def _advice_for_directory(directory: Path) -> str:
    """Return what to do with a directory that has no safetensors file of the usual name."""
    names = sorted(path.name for path in directory.iterdir())
    models = sorted(
        (name for name in names if name.startswith("models--")), key=lambda name: "esm2" not in name
    )
    files = [
        name
        for name in names
        if name.endswith((".pt", ".pth", ".safetensors")) and "contact-regression" not in name
    ]
    if found := models or files:
        return f"it holds {listed(found, 5)}: give the path of one of them"
    if any(name.endswith((".h5", ".msgpack", ".onnx", ".gguf")) for name in names):
        return f"parameters of other frameworks are not read; {_EXPECTED}"
    if "config.json" in names or any("token" in name or name == "vocab.txt" for name in names):
        return (
            "it holds only the tokenizer and settings, no parameters: "
            "download the model again, with `hf download`"
        )
    return _EXPECTED


def _snapshot(cached: Path) -> Path:
    """Return the revision `main` of a model in the hub's cache, or else the only revision."""
    snapshots = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    main = cached / "refs/main"
    if (
        main.is_file()
        and (named := cached / "snapshots" / main.read_text(encoding="utf-8").strip()) in snapshots
    ):
        return named
    if len(snapshots) != 1:
        raise WeightsError(
            f"{cached} holds {len(snapshots)} revisions, and none is main: "
            "give the path of one of them"
        )
    return snapshots[0]


def _require_no_substitute(path: Path) -> None:
    """Check by size and first bytes that a file is not a substitute for the real one.

    Raises:
        WeightsError: The file is a pointer of Git LFS.
        ValueError: The file is something else; the message is the end of a sentence.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if _LFS_POINTER.match(start):
        stands_for = re.search(rb"\nsize (\d+)", start)
        of_size = f" of {int(stands_for[1]):,} bytes" if stands_for else ""
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the file{of_size} that it stands for: "
            "run `git lfs pull` in the clone, or download the file itself"
        )
    if not size:
        raise ValueError("it is empty")
    is_json = path.suffix == ".json"
    kind = next((kind for kind, pattern in _SUBSTITUTES.items() if pattern.match(start)), None)
    if kind and not (is_json and start.lstrip().startswith(b"{")):
        raise ValueError(f"it is {kind}")
    if (
        size < _START_BYTES
        and not is_json
        and start.isascii()
        and start.decode().replace("\n", "").isprintable()
    ):
        line = start.decode().strip().partition("\n")[0]
        raise ValueError(f"it is text, {line[:60]!r}, which a server may have sent instead")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"it is cut short, at {size:,} bytes")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # Machines that run benchmarks with random weights do not have it.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # The file is not a dictionary: it cannot be iterated.
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    is_rotary = any("rotary_embeddings" in name for name in found)
    return {
        _name_in_fair_esm(name): tensor
        for name, tensor in found.items()
        # Older versions of transformers wrote a table of absolute positions for models without one.
        if not (is_rotary and "position_embeddings" in name)
    }


def _read_fair_esm(path: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no 'model', which files of fair-esm have")
    named = {_FAIR_ESM_PREFIX.sub("", name): tensor for name, tensor in content["model"].items()}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"cannot read the weights at {path} ({error.strerror or error}): {_EXPECTED}"
        ) from error
    except _DAMAGE as error:
        whose = "Hugging Face" if path.suffix in (".safetensors", ".json") else "fair-esm"
        what = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise WeightsError(
            f"{path} is damaged or not a file of {whose} ({what}): remove it and get it again"
        ) from error


def _cannot_read_pickles(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} is a pickle of Hugging Face, of which only safetensors are read: use fair-esm's "
        ".pt file, or write safetensors with "
        "`transformers.EsmModel.from_pretrained(...).save_pretrained(...)`"
    )
