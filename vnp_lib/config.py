"""The settings of a run: one model behind the flow's parameters, the command line and the `VNP_*` variables.

The environment is read in this module and nowhere else.
"""

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
from pydantic_settings import (
    CliImplicitFlag,
    NoDecode,
)

from vnp_lib.errors import ConfigError
from vnp_lib.user_paths import AnyPath, PathUse, user_inputs, user_path

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


def _as_number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


ChunkLength = Annotated[Literal[300, 500], BeforeValidator(_as_number)]


def _several(value: object) -> object:
    return _split_at_commas(str(value) if isinstance(value, int) else value)


Outputs = Annotated[tuple[OutputName, ...], NoDecode, BeforeValidator(_split_at_commas)]
Layers = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_several)]


def _told_as_a_value(read: Callable[[Any], object]) -> BeforeValidator:
    """Have pydantic report what `read` raises as it does any other value that does not fit.

    `read` gives text: in JSON, which has no paths, pydantic takes nothing else for one.
    """

    def validated(value: Any) -> object:
        try:
            return read(value)
        except ConfigError as error:
            raise PydanticCustomError("path", "{told}", {"told": str(error)}) from None
        except TypeError:
            raise PydanticCustomError(
                "path", "{told}", {"told": f"{value!r} is not a path"}
            ) from None

    return BeforeValidator(validated)


def _path(use: PathUse) -> BeforeValidator:
    return _told_as_a_value(lambda given: str(user_path(given, use)))


def weights_path(given: AnyPath) -> str:
    """Return what `weights` means: "auto" and "random" are themselves, all else is a path. Raises as `user_path`."""
    return given if given in ("auto", "random") else str(user_path(given, PathUse.WEIGHTS))


InputPaths = Annotated[
    tuple[Path, ...], NoDecode, _told_as_a_value(lambda given: tuple(map(str, user_inputs(given))))
]
OutputPath = Annotated[Path, _path(PathUse.OUTPUT)]
RunPath = Annotated[Path, _path(PathUse.RUN)]
WeightsPath = Annotated[str, _told_as_a_value(weights_path)]
IpAddress = Annotated[str, AfterValidator(lambda text: str(ip_address(text)))]


def _form_title(name: str, _: object) -> str:
    """Make a field's title in Prefect's form: `backoff_base_s` is shown as "Backoff base (s)"."""
    words = re.sub(r"_s$", " (s)", name).replace("_", " ").replace("oom", "OOM")
    return words[:1].upper() + words[1:]


class RuntimeConfig(BaseModel):
    """How a run behaves when things go wrong or take long. The defaults suit days on preemptible GPUs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", title="Runtime", field_title_generator=_form_title
    )

    checkpoint_seq_threshold: int = Field(
        10_000,
        gt=0,
        title="Sequences per checkpoint",
        description="Write a checkpoint after this many sequences.",
    )
    checkpoint_time_threshold: float = Field(
        300.0,
        gt=0,
        lt=600,
        title="Time per checkpoint (s)",
        description="Write a checkpoint after this many seconds, however few sequences there are.",
    )
    max_retries_transient: int = Field(
        3, ge=0, description="Retries of a shard after a passing failure."
    )
    max_retries_oom: int = Field(3, ge=0, description="Retries of a shard that ran out of memory.")
    max_retries_poison: int = Field(
        2, ge=1, description="How often one batch may fail before it is not tried again."
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
        description="Seconds before the first retry after a passing failure; they double.",
    )
    backoff_max_s: float = Field(
        60.0, ge=0, description="Most seconds before a retry after a passing failure."
    )
    grace_s: float = Field(
        30.0, gt=0, description="Seconds a child has to save its work when it is told to stop."
    )
    startup_limit_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without a sign of life after which a child is stopped that checks what is on disk, loads the model, "
        "saves, or waits for another process to leave its shard.",
    )
    silence_limit_s: float = Field(
        600.0,
        gt=0,
        description="Seconds without a sign of life after which a child is stopped that computes; longer where one layer may "
        "take that long.",
    )
    artifact_interval_s: float = Field(
        5.0, gt=0, description="Least seconds between two updates in the Prefect UI."
    )
    heartbeat_s: float = Field(
        5.0,
        gt=0,
        description="Seconds between two signs of life of a shard that runs on another machine.",
    )
    lost_after_s: float = Field(
        180.0,
        gt=0,
        description="Seconds without a sign of life after which another machine is taken to be gone.",
    )
    log_interval_s: float = Field(
        30.0, gt=0, description="Seconds between progress lines where there is no terminal."
    )


class EmbedConfig(BaseModel):
    """Embed the proteins of FASTA files with ESM-2: one vector a protein, resumable at any moment."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", title="Embed", field_title_generator=_form_title
    )

    fasta: InputPaths = Field(
        title="FASTA files",
        min_length=1,
        description="FASTA files, plain or compressed (gz, bz2, xz, zst, zip), a directory of them, a pattern such as 'x/*.fa', or - for "
        "standard input; CSV, TSV and Parquet by their suffix. On a command line, several with commas between.",
    )
    output_dir: OutputPath = Field(
        title="Run directory",
        description="Run directory: made where missing, continued where it holds a run begun.",
    )
    model: ModelName = Field("esm2_t36_3B_UR50D", description="ESM-2 model, by fair-esm's name.")
    weights: WeightsPath = Field(
        "auto",
        description="A fair-esm .pt file, or Hugging Face's safetensors or their directory; 'auto': fair-esm's cache or download; "
        "'random': seeded, for trying things out.",
    )
    include: Outputs = Field(
        ("mean",),
        min_length=1,
        title="Outputs",
        description="What is computed of each protein, with commas between: 'mean' (which is computed if nothing is given), 'max' and "
        "'std' over its residues, 'bos', 'per_tok' (the state of every residue), 'contacts', 'logits'.",
    )
    repr_layers: Layers | None = Field(
        None,
        description="Layers to take them from, with commas between, in fair-esm's numbers: 0 is the embedding, -1 the last layer, "
        "which is taken if none is given.",
    )
    devices: str = Field(
        "auto",
        pattern=r"^(auto|cpu(,cpu)*|\d+(,\d+)*)$",
        description="'auto': every GPU, or where there is none the CPU, a child a core if memory allows; 'cpu' ('cpu,cpu' shares "
        "its cores); '0,1': GPUs.",
    )
    shards: int | None = Field(
        None, ge=1, description="Tasks to divide the input into; one per device if not given."
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Most tokens in one forward pass; if not given, 2048 on the CPU, and on a GPU what its free memory holds, "
        "65536 at most, 16384 for 3B and 15B. A run on GPUs that goes on keeps to what it was begun with.",
    )
    executor: Literal["local", "work-pool"] = Field(
        "local",
        description="Where shards are embedded. 'local': on this machine; 'work-pool': each as a flow run of its own, on "
        "whatever machines the work pool of the shard deployment has; they share the run directory.",
    )
    shard_deployment: str = Field(
        "vnp-embed-shard/gpu",
        description="Deployment that embeds one shard, where a work pool embeds them.",
    )
    dtype: DType = Field(
        "auto",
        title="Precision",
        description="Precision of the model. 'auto': bfloat16 on a GPU, float32 on the CPU.",
    )
    store_dtype: StoreDtypeName | None = Field(
        None,
        title="Precision of the dataset",
        description="Precision in which the dataset stores what is computed. 'float16' takes half the space: 11 significant bits, and "
        "an error where a value is above 65,504. If not given, as the run was begun, and float32 in a new one.",
    )
    deterministic: CliImplicitFlag[bool] = Field(
        False,
        description="The same bytes at every run, whatever is killed when: the division into shards and batches is kept, and "
        "with it vnp, torch and the kind of processor or GPU; a child on the CPU uses one core, and memory that does not suffice ends the run.",
    )
    on_poison: Literal["quarantine", "fail"] = Field(
        "quarantine",
        title="Bad proteins",
        description="What becomes of a protein that the model dies of or gives no finite row for. 'quarantine': it is set "
        "aside, named, and all others are embedded; 'fail': its shard fails.",
    )
    allow_partial: CliImplicitFlag[bool] = Field(
        False,
        description="Put the dataset together even where shards have failed; without their missing rows.",
    )
    force_restart: CliImplicitFlag[bool] = Field(
        False, description="Begin anew: what the run directory holds is moved aside, not continued."
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Serve metrics for Prometheus on this port while the run lasts; none if not given.",
    )
    metrics_address: IpAddress = Field(
        "127.0.0.1",
        description="Where metrics are served. '127.0.0.1': for this machine alone; '0.0.0.0': for all that reach it.",
    )
    verbose: CliImplicitFlag[bool] = Field(
        False, description="Show Prefect's own log lines on the console too."
    )
    invalid_residues: InvalidResidues = Field(
        "error",
        description="What becomes of letters that are no amino acids, and of a * that is not at the end. 'error': the run is refused; "
        "'map': each is read as X; 'skip': such records are left out, empty ones too, and listed in plan/skipped.jsonl. Gaps, digits "
        "and punctuation, which show that the text is no sequence, are never read as X. White space is removed.",
    )
    duplicate_ids: DuplicateIds = Field(
        "error",
        description="What becomes of ids that occur more than once. 'error': the run is refused; 'keep': each record has its row; "
        "'rename': the second x becomes x_2, the third x_3, with the next number where there is such an id.",
    )
    dedup: CliImplicitFlag[bool] = Field(
        True,
        title="Compute identical sequences once",
        description="Compute identical sequences once.",
    )
    long: LongSequences = Field(
        "whole",
        title="Long sequences",
        description="What becomes of sequences longer than the maximum. 'whole': there is none; 'error': the run is refused; "
        "'truncate': they are cut there; 'skip': they are left out, and listed in plan/skipped.jsonl; 'window': their mean is "
        "taken over overlapping windows of the maximum length. Without a maximum, 'virnucpro': the whole sequence goes through "
        "the model, and the mean is that of its first 1024 residues.",
    )
    max_length: int | None = Field(
        None,
        ge=1,
        title="Maximum length (residues)",
        validate_default=True,
        description="Most residues of a sequence, or of a window, where long ones are not taken whole.",
    )
    window_overlap: int | None = Field(
        None,
        ge=0,
        title="Window overlap (residues)",
        description="Residues that windows share; a quarter if not given.",
    )
    min_length: int | None = Field(
        None,
        ge=1,
        title="Minimum length (residues)",
        description="Fewest residues of a sequence: shorter ones, empty ones too, are left out, and listed in plan/skipped.jsonl.",
    )
    allow_empty: CliImplicitFlag[bool] = Field(
        False,
        description="Make a dataset without rows where the input has no sequences, or none is left of it; otherwise such a run "
        "is refused.",
    )
    translate: Translation | None = Field(
        None,
        description="'six-frame': the input is nucleotides; what is embedded are the proteins that VirNucPro makes of them.",
    )
    chunk_length: ChunkLength = Field(
        500,
        title="Chunk length (nucleotides)",
        description="Nucleotides of the chunks that are translated.",
    )
    id_column: str = Field(
        "id", description="Column of CSV, TSV and Parquet files that holds the ids."
    )
    sequence_column: str = Field(
        "sequence", description="Column of these that holds the sequences."
    )
    runtime: RuntimeConfig = Field(
        RuntimeConfig(), description="Checkpoints, retries and patience."
    )

    @field_validator("min_length")
    @classmethod
    def _leaves_something(cls, min_length: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("max_length") if info.data.get("long") != "window" else None
        if min_length is not None and most is not None and min_length > most:
            raise PydanticCustomError(
                "min_length", "Must not be above --max-length, which is {most}", {"most": most}
            )
        return min_length

    @field_validator("max_length")
    @classmethod
    def _is_for_long_sequences(cls, max_length: int | None, info: ValidationInfo) -> int | None:
        has_none = info.data.get("long", "whole") in ("whole", "virnucpro")
        if not has_none and max_length is None:
            raise PydanticCustomError(
                "max_length", "Needed where long sequences are not taken whole"
            )
        if has_none and max_length is not None:
            raise PydanticCustomError(
                "max_length", "Means nothing where long sequences are taken whole"
            )
        return max_length
