"""The settings of a run, shared by the command line, the `VNP_*` variables and the flow."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import CliImplicitFlag, NoDecode

from vnp_lib.errors import ConfigError
from vnp_lib.user_paths import AnyPath, PathUse, user_inputs, user_path

# The rooms define the same choices as enums and tables, which this module cannot import: they are
# above it. A test keeps both equal.
ModelName = Literal[
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
]
OutputName = Literal["mean", "bos", "max", "std", "per_tok", "contacts", "logits"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
StoreDtypeName = Literal["float32", "float16"]
InvalidResidues = Literal["error", "map", "skip"]
DuplicateIds = Literal["error", "keep", "rename"]
LongSequences = Literal["whole", "error", "truncate", "skip", "window", "virnucpro"]
Translation = Literal["six-frame"]


def _split_at_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


# An option, a variable and a JSON document give a number as text or as an integer.
ChunkLength = Annotated[
    Literal[300, 500],
    BeforeValidator(
        lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value
    ),
]
Outputs = Annotated[tuple[OutputName, ...], NoDecode, BeforeValidator(_split_at_commas)]
Layers = Annotated[
    tuple[int, ...],
    NoDecode,
    BeforeValidator(
        lambda value: _split_at_commas(str(value) if isinstance(value, int) else value)
    ),
]


def _validated_by(read: Callable[[Any], object]) -> BeforeValidator:
    """Return a validator that reports the ConfigError of `read` as an invalid value.

    `read` returns text, because pydantic takes a path in JSON from nothing else.
    """

    def validate(value: Any) -> object:
        try:
            return read(value)
        except ConfigError as error:
            raise PydanticCustomError("path", "{message}", {"message": str(error)}) from None
        except TypeError:
            message = f"{value!r} is not a path"
            raise PydanticCustomError("path", "{message}", {"message": message}) from None

    return BeforeValidator(validate)


def _path_for(use: PathUse) -> BeforeValidator:
    return _validated_by(lambda value: str(user_path(value, use)))


def weights_path(weights: AnyPath) -> str:
    """Return "auto" and "random" unchanged, and all else as a path. Raises as `user_path`."""
    return weights if weights in ("auto", "random") else str(user_path(weights, PathUse.WEIGHTS))


InputPaths = Annotated[
    tuple[Path, ...], NoDecode, _validated_by(lambda value: tuple(map(str, user_inputs(value))))
]
OutputPath = Annotated[Path, _path_for(PathUse.OUTPUT)]
RunPath = Annotated[Path, _path_for(PathUse.RUN)]
WeightsPath = Annotated[str, _validated_by(weights_path)]
IpAddress = Annotated[str, AfterValidator(lambda text: str(ip_address(text)))]


def _form_title(name: str, _: object) -> str:
    """Return a field's title in Prefect's form: "Backoff base (s)" for `backoff_base_s`."""
    words = re.sub(r"_s$", " (s)", name).replace("_", " ").replace("oom", "OOM")
    return words[:1].upper() + words[1:]


class RuntimeConfig(BaseModel):
    """Checkpoint, retry and timeout settings. The defaults suit days on preemptible GPUs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", title="Runtime", field_title_generator=_form_title
    )

    checkpoint_seq_threshold: int = Field(
        10_000,
        gt=0,
        title="Sequences per checkpoint",
        description="Sequences after which a checkpoint is written.",
    )
    checkpoint_time_threshold: float = Field(
        300.0,
        gt=0,
        lt=600,
        title="Time per checkpoint (s)",
        description="Seconds after which a checkpoint is written, however few sequences it holds.",
    )
    max_retries_transient: int = Field(
        3, ge=0, description="Retries of a shard after a transient failure."
    )
    max_retries_oom: int = Field(3, ge=0, description="Retries of a shard that ran out of memory.")
    max_retries_poison: int = Field(
        2, ge=1, description="How often one batch may fail before it is no longer retried."
    )
    spot_retry_poll_interval: float = Field(
        60.0,
        ge=0,
        title="Wait after a preemption (s)",
        description="Seconds to wait after a preemption.",
    )
    backoff_base_s: float = Field(
        1.0,
        ge=0,
        description=(
            "Seconds before the first retry after a transient failure; doubled for each further "
            "one."
        ),
    )
    backoff_max_s: float = Field(
        60.0, ge=0, description="Maximum seconds before a retry after a transient failure."
    )
    grace_s: float = Field(
        30.0,
        gt=0,
        description="Seconds that a worker process has to save its work when it is stopped.",
    )
    startup_limit_s: float = Field(
        900.0,
        gt=0,
        description=(
            "Seconds without a heartbeat after which a worker process is stopped while it "
            "validates checkpoints, loads the model, saves, or waits for another process to "
            "release its shard."
        ),
    )
    silence_limit_s: float = Field(
        600.0,
        gt=0,
        description=(
            "Seconds without a heartbeat after which a worker process is stopped while it "
            "computes; longer if one layer may take that long."
        ),
    )
    artifact_interval_s: float = Field(
        5.0, gt=0, description="Minimum seconds between two updates in the Prefect UI."
    )
    heartbeat_s: float = Field(
        5.0,
        gt=0,
        description="Seconds between two heartbeats of a shard that runs on another machine.",
    )
    lost_after_s: float = Field(
        180.0,
        gt=0,
        description="Seconds without a heartbeat after which another machine is considered lost.",
    )
    log_interval_s: float = Field(
        30.0, gt=0, description="Seconds between progress lines if the output is not a terminal."
    )


class EmbedConfig(BaseModel):
    """Embed proteins from FASTA files with ESM-2: one vector per protein, resumable at any time."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", title="Embed", field_title_generator=_form_title
    )

    fasta: InputPaths = Field(
        title="FASTA files",
        min_length=1,
        description=(
            "FASTA files, plain or compressed (gz, bz2, xz, zst, zip), a directory of them, a "
            "pattern such as 'x/*.fa', or - for standard input. CSV, TSV and Parquet are "
            "recognised by their suffix. On a command line, separate several with commas."
        ),
    )
    output_dir: OutputPath = Field(
        title="Run directory",
        description="Run directory: created if missing, resumed if it holds a run.",
    )
    model: ModelName = Field("esm2_t36_3B_UR50D", description="ESM-2 model, by its fair-esm name.")
    weights: WeightsPath = Field(
        "auto",
        description=(
            "A fair-esm .pt file, or a Hugging Face safetensors file or model directory; 'auto': "
            "fair-esm's cache, downloaded if missing; 'random': seeded random weights, for trying "
            "things out."
        ),
    )
    include: Outputs = Field(
        ("mean",),
        min_length=1,
        title="Outputs",
        description=(
            "Outputs to compute per protein, separated by commas: 'mean' (the default), 'max' and"
            " 'std' over its residues, 'bos', 'per_tok' (one vector per residue), 'contacts', "
            "'logits'."
        ),
    )
    repr_layers: Layers | None = Field(
        None,
        description=(
            "Layers to take the outputs from, separated by commas, in fair-esm's numbering: 0 is "
            "the embedding layer, -1 the last layer (the default)."
        ),
    )
    devices: str = Field(
        "auto",
        pattern=r"^(auto|cpu(,cpu)*|\d+(,\d+)*)$",
        description=(
            "'auto': all visible GPUs; without one, one CPU worker per core, memory permitting. "
            "'cpu': one worker on the CPU ('cpu,cpu': two that share its cores); '0,1': these "
            "GPUs."
        ),
    )
    shards: int | None = Field(
        None, ge=1, description="Tasks to divide the input into; by default one per device."
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description=(
            "Maximum tokens in one forward pass. By default 2048 on the CPU, and on a GPU as many"
            " as fit in its free memory, up to 65536 (16384 for 3B and 15B). A resumed run on "
            "GPUs keeps the value that it was started with."
        ),
    )
    executor: Literal["local", "work-pool"] = Field(
        "local",
        description=(
            "Where shards are embedded. 'local': on this machine; 'work-pool': each in a flow run"
            " of its own, on the machines of the shard deployment's work pool, which share the "
            "run directory."
        ),
    )
    shard_deployment: str = Field(
        "vnp-embed-shard/gpu",
        description="Deployment that embeds one shard, if the executor is a work pool.",
    )
    dtype: DType = Field(
        "auto",
        title="Precision",
        description="Precision of the model. 'auto': bfloat16 on a GPU, float32 on the CPU.",
    )
    store_dtype: StoreDtypeName | None = Field(
        None,
        title="Precision of the dataset",
        description=(
            "Precision in which the dataset stores the outputs. 'float16' takes half the space: "
            "it has 11 significant bits, and a value above 65,504 is an error. By default that of"
            " the run to resume, and float32 for a new one."
        ),
    )
    deterministic: CliImplicitFlag[bool] = Field(
        False,
        description=(
            "Produce the same bytes in every run, even if processes are killed: the division into"
            " shards and batches is kept, and so must be vnp, torch and the kind of processor or "
            "GPU. A CPU worker uses one core, and running out of memory ends the run."
        ),
    )
    on_poison: Literal["quarantine", "fail"] = Field(
        "quarantine",
        title="Bad proteins",
        description=(
            "What to do with a protein that crashes the model or gives a non-finite embedding. "
            "'quarantine': it is quarantined and reported, and all others are embedded; 'fail': "
            "its shard fails."
        ),
    )
    allow_partial: CliImplicitFlag[bool] = Field(
        False,
        description="Assemble the dataset even if shards have failed, without their missing rows.",
    )
    force_restart: CliImplicitFlag[bool] = Field(
        False,
        description=(
            "Start over: the contents of the run directory are moved aside instead of resumed."
        ),
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Serve Prometheus metrics on this port during the run; off by default.",
    )
    metrics_address: IpAddress = Field(
        "127.0.0.1",
        description=(
            "Address on which metrics are served. '127.0.0.1': to this machine only; '0.0.0.0': "
            "to every machine that can reach it."
        ),
    )
    verbose: CliImplicitFlag[bool] = Field(
        False, description="Also show Prefect's own log lines on the console."
    )
    invalid_residues: InvalidResidues = Field(
        "error",
        description=(
            "What to do with characters that are not amino acids, and with a * that is not at the"
            " end. 'error': refuse the run; 'map': read each as X; 'skip': leave such records "
            "out, empty ones too, and list them in plan/skipped.jsonl. Gaps, digits and "
            "punctuation, which show that the text is not a sequence, are never read as X. White "
            "space is removed."
        ),
    )
    duplicate_ids: DuplicateIds = Field(
        "error",
        description=(
            "What to do with ids that occur more than once. 'error': refuse the run; 'keep': each"
            " record has its own row; 'rename': the second x becomes x_2, the third x_3, with the"
            " next free number if such an id exists."
        ),
    )
    dedup: CliImplicitFlag[bool] = Field(
        True,
        title="Compute identical sequences once",
        description="Compute identical sequences once.",
    )
    long: LongSequences = Field(
        "whole",
        title="Long sequences",
        description=(
            "What to do with sequences longer than the maximum. 'whole': there is no maximum; "
            "'error': refuse the run; 'truncate': cut them at the maximum; 'skip': leave them "
            "out, and list them in plan/skipped.jsonl; 'window': compute the mean over "
            "overlapping windows of the maximum length; 'virnucpro', without a maximum: run the "
            "whole sequence through the model, and take the mean of its first 1024 residues."
        ),
    )
    max_length: int | None = Field(
        None,
        ge=1,
        title="Maximum length (residues)",
        validate_default=True,
        description=(
            "Maximum residues of a sequence, or of a window, if long sequences are not taken whole."
        ),
    )
    window_overlap: int | None = Field(
        None,
        ge=0,
        title="Window overlap (residues)",
        description="Residues that consecutive windows share; by default a quarter of a window.",
    )
    min_length: int | None = Field(
        None,
        ge=1,
        title="Minimum length (residues)",
        description=(
            "Minimum residues of a sequence: shorter ones, empty ones too, are left out, and "
            "listed in plan/skipped.jsonl."
        ),
    )
    allow_empty: CliImplicitFlag[bool] = Field(
        False,
        description=(
            "Produce a dataset without rows if the input has no sequences, or none is left of it;"
            " otherwise such a run is refused."
        ),
    )
    translate: Translation | None = Field(
        None,
        description=(
            "'six-frame': the input is nucleotides, and the proteins that VirNucPro derives from "
            "them are embedded."
        ),
    )
    chunk_length: ChunkLength = Field(
        500,
        title="Chunk length (nucleotides)",
        description="Length of the chunks that are translated, in nucleotides.",
    )
    id_column: str = Field(
        "id", description="Column of CSV, TSV and Parquet files that holds the ids."
    )
    sequence_column: str = Field(
        "sequence", description="Column of CSV, TSV and Parquet files that holds the sequences."
    )
    runtime: RuntimeConfig = Field(
        RuntimeConfig(), description="Checkpoints, retries and time limits."
    )

    @field_validator("min_length")
    @classmethod
    def _validate_min_length(cls, min_length: int | None, info: ValidationInfo) -> int | None:
        # A window may be shorter than the shortest sequence.
        most = info.data.get("max_length") if info.data.get("long") != "window" else None
        if min_length is not None and most is not None and min_length > most:
            raise PydanticCustomError(
                "min_length", "Must not be above --max-length, which is {most}", {"most": most}
            )
        return min_length

    @field_validator("max_length")
    @classmethod
    def _validate_max_length(cls, max_length: int | None, info: ValidationInfo) -> int | None:
        is_unlimited = info.data.get("long", "whole") in ("whole", "virnucpro")
        if not is_unlimited and max_length is None:
            raise PydanticCustomError("max_length", "Needed if long sequences are not taken whole")
        if is_unlimited and max_length is not None:
            raise PydanticCustomError("max_length", "Not allowed if long sequences are taken whole")
        return max_length
