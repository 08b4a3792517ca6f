"""The settings of a run: one model behind the flow's parameters, the command line and the `VNP_*` variables.

The environment is read in this module and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    CliSettingsSource,
    NoDecode,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from vnp_lib.failures import ConfigError
from vnp_lib.machine import num_cpu_children
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
            raise PydanticCustomError("path", "{told}", {"told": f"{value!r} is not a path"}) from None

    return BeforeValidator(validated)


def _path(use: PathUse) -> BeforeValidator:
    return _told_as_a_value(lambda given: str(user_path(given, use)))


def weights_path(given: AnyPath) -> str:
    """Return what `weights` means: "auto" and "random" are themselves, all else is a path. Raises as `user_path`."""
    return given if given in ("auto", "random") else str(user_path(given, PathUse.WEIGHTS))


InputPaths = Annotated[tuple[Path, ...], NoDecode, _told_as_a_value(lambda given: tuple(map(str, user_inputs(given))))]
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

    model_config = ConfigDict(frozen=True, extra="forbid", title="Runtime", field_title_generator=_form_title)

    checkpoint_seq_threshold: int = Field(
        10_000, gt=0, title="Sequences per checkpoint", description="Write a checkpoint after this many sequences."
    )
    checkpoint_time_threshold: float = Field(
        300.0,
        gt=0,
        lt=600,
        title="Time per checkpoint (s)",
        description="Write a checkpoint after this many seconds, however few sequences there are.",
    )
    max_retries_transient: int = Field(3, ge=0, description="Retries of a shard after a passing failure.")
    max_retries_oom: int = Field(3, ge=0, description="Retries of a shard that ran out of memory.")
    max_retries_poison: int = Field(2, ge=1, description="How often one batch may fail before it is not tried again.")
    spot_retry_poll_interval: float = Field(
        60.0, ge=0, title="Wait after a preemption (s)", description="Seconds to wait after a preemption."
    )
    backoff_base_s: float = Field(
        1.0, ge=0, description="Seconds before the first retry after a passing failure; they double."
    )
    backoff_max_s: float = Field(60.0, ge=0, description="Most seconds before a retry after a passing failure.")
    grace_s: float = Field(30.0, gt=0, description="Seconds a child has to save its work when it is told to stop.")
    startup_limit_s: float = Field(900.0, gt=0, description="Seconds a child may take to load the model.")
    silence_limit_s: float = Field(600.0, gt=0, description="Seconds without progress after which a child is stopped.")
    artifact_interval_s: float = Field(5.0, gt=0, description="Least seconds between two updates in the Prefect UI.")
    heartbeat_s: float = Field(
        5.0, gt=0, description="Seconds between two signs of life of a shard that runs on another machine."
    )
    lost_after_s: float = Field(
        180.0, gt=0, description="Seconds without a sign of life after which another machine is taken to be gone."
    )
    log_interval_s: float = Field(30.0, gt=0, description="Seconds between progress lines where there is no terminal.")


class EmbedConfig(BaseModel):
    """Embed the proteins of FASTA files with ESM-2: one vector a protein, resumable at any moment."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Embed", field_title_generator=_form_title)

    fasta: InputPaths = Field(
        title="FASTA files",
        min_length=1,
        description="FASTA files, plain or compressed (gz, bz2, xz, zst, zip), a directory of them, a pattern such as 'x/*.fa', or - for "
        "standard input; CSV, TSV and Parquet by their suffix. On a command line, several with commas between.",
    )
    output_dir: OutputPath = Field(
        title="Run directory", description="Run directory: made where missing, continued where it holds a run begun."
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
    shards: int | None = Field(None, ge=1, description="Tasks to divide the input into; one per device if not given.")
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
        "vnp-embed-shard/gpu", description="Deployment that embeds one shard, where a work pool embeds them."
    )
    dtype: DType = Field(
        "auto", title="Precision", description="Precision of the model. 'auto': bfloat16 on a GPU, float32 on the CPU."
    )
    store_dtype: StoreDtypeName | None = Field(
        None,
        title="Precision of the dataset",
        description="Precision in which the dataset stores what is computed. 'float16' takes half the space: 11 significant bits, and "
        "an error where a value is above 65,504. If not given, as the run was begun, and float32 in a new one.",
    )
    deterministic: CliImplicitFlag[bool] = Field(
        False,
        description="The same bytes at every run, whatever is killed when: the division into shards and batches is kept, a "
        "child on the CPU uses one core, and memory that does not suffice ends the run.",
    )
    on_poison: Literal["quarantine", "fail"] = Field(
        "quarantine",
        title="Bad proteins",
        description="What becomes of a protein that the model dies of or gives no finite row for. 'quarantine': it is set "
        "aside, named, and all others are embedded; 'fail': its shard fails.",
    )
    allow_partial: CliImplicitFlag[bool] = Field(
        False, description="Put the dataset together even where shards have failed; without their missing rows."
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
    verbose: CliImplicitFlag[bool] = Field(False, description="Show Prefect's own log lines on the console too.")
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
        True, title="Compute identical sequences once", description="Compute identical sequences once."
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
        500, title="Chunk length (nucleotides)", description="Nucleotides of the chunks that are translated."
    )
    id_column: str = Field("id", description="Column of CSV, TSV and Parquet files that holds the ids.")
    sequence_column: str = Field("sequence", description="Column of these that holds the sequences.")
    runtime: RuntimeConfig = Field(RuntimeConfig(), description="Checkpoints, retries and patience.")

    @field_validator("min_length")
    @classmethod
    def _leaves_something(cls, min_length: int | None, info: ValidationInfo) -> int | None:
        most = info.data.get("max_length") if info.data.get("long") != "window" else None
        if min_length is not None and most is not None and min_length > most:
            raise PydanticCustomError("min_length", "Must not be above --max-length, which is {most}", {"most": most})
        return min_length

    @field_validator("max_length")
    @classmethod
    def _is_for_long_sequences(cls, max_length: int | None, info: ValidationInfo) -> int | None:
        has_none = info.data.get("long", "whole") in ("whole", "virnucpro")
        if not has_none and max_length is None:
            raise PydanticCustomError("max_length", "Needed where long sequences are not taken whole")
        if has_none and max_length is not None:
            raise PydanticCustomError("max_length", "Means nothing where long sequences are taken whole")
        return max_length


class ForecastConfig(EmbedConfig):
    """Say what a run would be. All options of a run are taken. Nothing on disk is changed."""

    output_dir: OutputPath = Field(Path(), description="Where the run would be: the space on that disk is looked at.")
    tokens_per_second: float | None = Field(
        None, gt=0, description="Tokens per second of all devices together, for the time that the run would take."
    )
    speed_of: RunPath | None = Field(
        None,
        description="Run directory with the same model on such devices, to take the speed from; if not given, --output-dir "
        "where that is one.",
    )


class _EmbedCli(EmbedConfig, BaseSettings):
    __doc__ = f"""{EmbedConfig.__doc__} Each option can also be given as an environment variable: --token-budget is
VNP_TOKEN_BUDGET, --runtime.grace-s is VNP_RUNTIME__GRACE_S."""

    model_config = SettingsConfigDict(
        title="Embed",
        env_prefix="VNP_",
        env_nested_delimiter="__",
        cli_prog_name="python flows/embed.py",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        frozen=True,
        extra="forbid",
    )


class _ForecastCli(ForecastConfig, BaseSettings):
    __doc__ = f"""{ForecastConfig.__doc__} With --json it is printed as JSON. Exit code 0: such a run can begin, 1: something in the
input would be refused, or the disk has no room, 2: an option cannot be used."""

    model_config = _EmbedCli.model_config | SettingsConfigDict(title="Forecast", cli_prog_name="vnp plan")


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves out what only a programmer reads: Python's type names, defaults that are None, a page of usage."""

    _METAVARS: ClassVar = {"tuple[Path,...]": "FILES", "Path": "DIR", "str": "TEXT", "int": "N"} | {
        f"tuple[{{{','.join(get_args(OutputName))}}},...]": "OUTPUTS",
        "tuple[int,...]": "LAYERS",
    }

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any) -> None:
        needed = [each for each in actions if "(required)" in (each.help or "")]
        told = " ".join(f"{each.option_strings[0]} {self._metavar_formatter(each, '')(1)[0]}" for each in needed)
        super().add_usage(f"%(prog)s {told} [options]", actions, *args, **kwargs)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.metavar == "float":
            action.metavar = "SECONDS" if "seconds" in (action.help or "").lower() else "N"
        elif isinstance(action.metavar, str):
            action.metavar = self._METAVARS.get(action.metavar, action.metavar)
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = re.sub(r" \(default: \(.*\)\)$", "", action.help or "")  # of several values; the text says it
        return told.replace(" (default: None)", "").replace(" (required)", "")


def parse_command_line(arguments: Sequence[str]) -> EmbedConfig:
    """Read the settings from a command line, and what it leaves open from `VNP_*`.

    Raises:
        ConfigError: A value that does not fit; one line for each.
        SystemExit: After `--help` (0), and for an option that does not exist (2).
    """
    return EmbedConfig.model_validate(_given(_EmbedCli, arguments))


def parse_forecast_command_line(arguments: Sequence[str]) -> ForecastConfig:
    """Read the settings of a run that is only thought of. `--json` is not among them. Raises as `parse_command_line`."""
    return ForecastConfig.model_validate(_given(_ForecastCli, arguments))


def _parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Do what `parse_args` does, and say what is at fault where a shell has put files in the place of a pattern."""
    given, others = parser.parse_known_args(arguments, namespace)
    if others and all(os.path.lexists(other) for other in others):
        raise ConfigError(
            f"{', '.join(others[:3])}{' and more' if len(others) > 3 else ''}: these paths belong to no option; quote a pattern, as in "
            "--fasta 'x/*.faa', so that the shell leaves it as it is, or put commas between several files"
        )
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return given


def _given(model: type[BaseSettings], arguments: Sequence[str]) -> dict[str, Any]:
    try:
        source = CliSettingsSource[Any](model, formatter_class=_HelpFormatter, parse_args_method=_parse_arguments)
        return CliApp.run(model, cli_args=list(arguments), cli_settings_source=source).model_dump()
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def _explain(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    assert isinstance(location, tuple)
    option = "--" + ".".join(str(part).replace("_", "-") for part in location if not isinstance(part, int))
    if detail["type"] == "missing":
        return f"{option} is needed (see --help)"
    if detail["type"] == "path":
        return f"{option} {detail['msg']}"
    message = str(detail["msg"])
    return f"{option}: {message[:1].lower()}{message[1:]}; it was {detail['input']!r}"


def resolve_devices(devices: str, model: ModelName) -> tuple[str, ...]:
    """Name the devices of a run: `("0", "1")` for GPUs, `("cpu", "cpu")` for two children on the CPU.

    Raises:
        ConfigError: A GPU that is not there.
    """
    if devices.startswith("cpu"):
        return tuple(devices.split(","))
    import torch  # here, not above: the command line answers --help without it

    count = torch.cuda.device_count()
    if devices == "auto":
        return tuple(str(index) for index in range(count)) or ("cpu",) * num_cpu_children(model)
    wanted = tuple(devices.split(","))
    absent = [index for index in wanted if int(index) >= count]
    if absent:
        raise ConfigError(
            f"--devices {devices}: there is no GPU {', '.join(absent)}; this machine shows {count}. "
            "Use --devices auto, or cpu."
        )
    return wanted


def planned_devices(config: EmbedConfig) -> tuple[str, ...]:
    """Name the devices that a run is planned for: this machine's, or what the machines of a work pool are taken to have.

    Raises:
        ConfigError: A GPU that is not there, or a work pool without a number of shards.
    """
    if config.executor == "local":
        return resolve_devices(config.devices, config.model)
    if config.shards is None:
        raise ConfigError("--executor work-pool needs --shards: into how many flow runs is the input to be divided?")
    return ("cpu",) if config.devices.startswith("cpu") else ("0",)


def child_environment(device: str) -> dict[str, str]:
    """Give a child this process's environment and, where `device` is a GPU, sight of that GPU alone.

    A mask that this process was started with (Slurm, Kubernetes, MIG) is kept: `device` counts within it. On a CPU the child's
    large blocks are in huge pages where the kernel has them: as it comes, glibc gives such blocks back after each layer, and has
    thousands of pages zeroed for the next one. Tunables that this process was started with are kept.

    Empty entries of PYTHONPATH are left out. `export PYTHONPATH=$PYTHONPATH:/some/where` makes one where there was none before,
    and Python takes it for the current directory.
    """
    inherited = {**os.environ}
    if path := os.pathsep.join(filter(None, inherited.pop("PYTHONPATH", "").split(os.pathsep))):
        inherited["PYTHONPATH"] = path
    if device == "cpu":
        return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | inherited | {"CUDA_VISIBLE_DEVICES": ""}
    return inherited | {
        "CUDA_VISIBLE_DEVICES": visible_gpu(device),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it, cuBLAS need not give the same bits again
    }


def visible_gpu(device: str) -> str:
    """Name a GPU as CUDA_VISIBLE_DEVICES does, by number or UUID; `device` counts within the mask that there may be."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[int(device)] if visible else device


def viral_checkpoint_mode() -> bool:
    """Whether checkpoints are to be written more often, as VirNucPro's users ask by an environment variable."""
    return os.environ.get("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "").strip().lower() in {"1", "true", "yes", "on"}
