"""Which software computes: this package's version and code, the version of its numbers, torch, and the kind of device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vnp_lib import __version__
from vnp_lib.errors import ConfigError

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import device as TorchDevice

# The version of our numbers. Raise it with every change by which rows come out differently by more than rounding does (1e-5 in
# float32): other tokens, another pooling, another treatment of long sequences, a mended error in the network. It is part of what
# a run is, so that no dataset mixes two. Version 1 is left out there: runs that were begun before it had a name are of it.
NUMERICS_VERSION = 1

_UNKNOWN = "unknown"
_CODE_LETTERS = 8  # of a digest that is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A copy of `vnp_lib`."""

    version: str
    code_sha256: str  # of the names and bytes of its Python files
    directory: str

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """Look at a copy of this version."""
        digest = hashlib.sha256()
        for path in sorted(directory.rglob("*.py")):
            code = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()} {len(code)}\n".encode())
            digest.update(code)
        return cls(version=__version__, code_sha256=digest.hexdigest(), directory=str(directory))


@cache
def package_in_use() -> Package:
    """Return the copy that this process runs, as it is on disk when this is first asked for: at the start of a run."""
    return Package.in_directory(Path(__file__).parent)


def require_same_package(starter: object) -> None:
    """Raise ConfigError unless this process runs the code of the process that has started it.

    Args:
        starter: The fields of that one's `Package`, as JSON has them; anything else is another version's.
    """
    ours = package_in_use()
    if isinstance(starter, dict) and starter.get("code_sha256") == ours.code_sha256:
        return
    told = starter if isinstance(starter, dict) else {}
    version, directory = (
        told.get("version", "of an unknown version"),
        told.get("directory", "an unknown place"),
    )
    if directory == ours.directory:
        raise ConfigError(
            f"the code of vnp in {directory} has changed since this run was started (from {version} to {ours.version}), "
            f"and a run does not mix the two; start the run again: it resumes with the code that is there now"
        )
    raise ConfigError(
        f"the worker process runs vnp {ours.version} from {ours.directory}, and the run was started by vnp {version} from "
        f"{directory}, whose code differs; remove one of the two from the Python path (PYTHONPATH, site-packages) and "
        f"start the run again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What computed the rows of a checkpoint."""

    vnp: str
    code_sha256: str
    torch: str
    device: str  # its kind: `NVIDIA L4`, or `CPU (AVX512)`, by the instructions that torch uses

    @classmethod
    def on(cls, device: TorchDevice) -> Self:
        """Name what this process computes with on a device."""
        import torch

        package = package_in_use()
        return cls(
            vnp=package.version,
            code_sha256=package.code_sha256,
            torch=str(torch.__version__),
            device=_kind_of(device),
        )

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Read what a checkpoint says; one that says nothing was written by vnp 0.1.0, or not by vnp."""
        told = metadata.get("software")
        named = told if isinstance(told, dict) else {}
        return cls(**{field.name: str(named.get(field.name, _UNKNOWN)) for field in fields(cls)})

    def to_metadata(self) -> dict[str, Any]:
        """Write it as a checkpoint keeps it."""
        return {"software": asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareShare:
    """How many distinct sequences of a dataset were computed with a software."""

    software: Software
    sequences: int

    def to_json(self) -> dict[str, Any]:
        """Write it as `_SUCCESS.json` has it."""
        return asdict(self.software) | {"sequences": self.sequences}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(
            software=Software.of_metadata({"software": dict(record)}),
            sequences=int(record["sequences"]),
        )


def describe_software(shares: Sequence[SoftwareShare]) -> str:
    """Say it in a line: `vnp 0.1.0, torch 2.10.0, NVIDIA L4`; "" where nothing is known. Several have their numbers."""
    versions = {share.software.vnp for share in shares}
    codes = {(share.software.vnp, share.software.code_sha256) for share in shares}
    names = []
    for share in shares:
        used = share.software
        code = f" (code {used.code_sha256[:_CODE_LETTERS]})" if len(codes) > len(versions) else ""
        number = f": {share.sequences:,} sequences" if len(shares) > 1 else ""
        is_known = used.vnp != _UNKNOWN
        names.append(
            (f"vnp {used.vnp}{code}, torch {used.torch}, {used.device}" if is_known else _UNKNOWN)
            + number
        )
    return "; ".join(names)


def is_mixed(shares: Iterable[SoftwareShare]) -> bool:
    """Whether more than one version of vnp, its code or torch computed a dataset. Devices of several kinds are ordinary."""
    return (
        len(
            {(each.software.vnp, each.software.code_sha256, each.software.torch) for each in shares}
        )
        > 1
    )


def exact_software(devices: Iterable[TorchDevice]) -> str:
    """Name what decides the last bits of a row, for a run that is to have the same bytes whatever is killed when."""
    import torch

    return ", ".join(
        [
            f"vnp {package_in_use().version}",
            f"torch {torch.__version__}",
            *sorted(set(map(_kind_of, devices))),
        ]
    )


def _kind_of(device: TorchDevice) -> str:
    import torch

    if device.type == "cpu":
        return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
