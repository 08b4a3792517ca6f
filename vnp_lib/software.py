"""The software that computes embeddings: version and code of vnp, torch, and the kind of device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vnp_lib import __version__
from vnp_lib.errors import ConfigError

# Functions import torch when they need it, because that takes seconds.
if TYPE_CHECKING:
    from torch import device as TorchDevice

# Raise it with every change that alters rows by more than rounding (1e-5 in float32): other tokens,
# another pooling, another treatment of long sequences, a fixed error in the network. It is part of
# the fingerprint of a run, so that no dataset mixes two versions. Version 1 is omitted there,
# because the first runs were started before the version was recorded.
NUMERICS_VERSION = 1

_UNKNOWN = "unknown"
_SHOWN_DIGITS = 8  # hexadecimal digits of a digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed copy of `vnp_lib`.

    Attributes:
        version: Its version.
        code_sha256: Digest of the names and bytes of its Python files.
        directory: Where it is installed.
    """

    version: str
    code_sha256: str
    directory: str

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """Compute the digest of the copy in a directory, which has this version."""
        digest = hashlib.sha256()
        for path in sorted(directory.rglob("*.py")):
            code = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()} {len(code)}\n".encode())
            digest.update(code)
        return cls(version=__version__, code_sha256=digest.hexdigest(), directory=str(directory))


@cache
def package_in_use() -> Package:
    """Return the copy that this process runs, as it is on disk at the first call.

    The first call is at the start of a run.
    """
    return Package.in_directory(Path(__file__).parent)


def require_same_package(starter: object) -> None:
    """Raise ConfigError unless this process runs the code of the process that started it.

    Args:
        starter: The fields of that process's `Package` in JSON. Anything else comes from another
            version of vnp.
    """
    ours = package_in_use()
    if isinstance(starter, dict) and starter.get("code_sha256") == ours.code_sha256:
        return
    fields = starter if isinstance(starter, dict) else {}
    version = fields.get("version", "of an unknown version")
    directory = fields.get("directory", "an unknown place")
    if directory == ours.directory:
        raise ConfigError(
            f"the code of vnp in {directory} has changed since this run was started (from "
            f"{version} to {ours.version}), and a run does not mix the two; start the run again: "
            "it resumes with the new code"
        )
    raise ConfigError(
        f"the worker process runs vnp {ours.version} from {ours.directory}, but the run was "
        f"started by vnp {version} from {directory}, whose code differs; remove one of the two "
        "from the Python path (PYTHONPATH, site-packages) and start the run again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """The software and the kind of device that computed the rows of a checkpoint.

    Attributes:
        vnp: Version of vnp.
        code_sha256: Digest of its code.
        torch: Version of torch.
        device: Kind of device: `NVIDIA L4`, or `CPU (AVX512)` after the instructions that torch
            uses.
    """

    vnp: str
    code_sha256: str
    torch: str
    device: str

    @classmethod
    def on(cls, device: TorchDevice) -> Self:
        """Return the software that this process uses on a device."""
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
        """Read the metadata of a checkpoint. vnp 0.1.0 and other programs recorded no software."""
        recorded = metadata.get("software")
        if not isinstance(recorded, dict):
            recorded = {}
        return cls(**{field.name: str(recorded.get(field.name, _UNKNOWN)) for field in fields(cls)})

    def to_metadata(self) -> dict[str, Any]:
        """Return the fields as metadata of a checkpoint."""
        return {"software": asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareShare:
    """The number of distinct sequences of a dataset that one software computed."""

    software: Software
    sequences: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as an entry of `_SUCCESS.json`."""
        return asdict(self.software) | {"sequences": self.sequences}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read the result of `to_json`."""
        return cls(
            software=Software.of_metadata({"software": dict(record)}),
            sequences=int(record["sequences"]),
        )


def describe_software(shares: Sequence[SoftwareShare]) -> str:
    """Format as `vnp 0.1.0, torch 2.10.0, NVIDIA L4`; several entries with their sequence counts.

    Returns "" if there are no entries.
    """
    versions = {share.software.vnp for share in shares}
    codes = {(share.software.vnp, share.software.code_sha256) for share in shares}
    names = []
    for share in shares:
        used = share.software
        code = f" (code {used.code_sha256[:_SHOWN_DIGITS]})" if len(codes) > len(versions) else ""
        name = f"vnp {used.vnp}{code}, torch {used.torch}, {used.device}"
        count = f": {share.sequences:,} sequences" if len(shares) > 1 else ""
        names.append((_UNKNOWN if used.vnp == _UNKNOWN else name) + count)
    return "; ".join(names)


def is_mixed(shares: Iterable[SoftwareShare]) -> bool:
    """Return whether a dataset was computed by several versions of vnp, its code or torch.

    Several kinds of devices are normal.
    """
    used = [share.software for share in shares]
    return len({(each.vnp, each.code_sha256, each.torch) for each in used}) > 1


def exact_software(devices: Iterable[TorchDevice]) -> str:
    """Name everything that decides the last bits of a row, for a deterministic run."""
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
