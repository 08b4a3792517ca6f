"""Parse command lines and `VNP_*` variables into settings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import (
    Field,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from vnp_lib.config import EmbedConfig, OutputName, OutputPath, RunPath
from vnp_lib.errors import ConfigError


class EstimateConfig(EmbedConfig):
    """Say what a run would be. All options of a run are taken. Nothing on disk is changed."""

    output_dir: OutputPath = Field(
        Path(), description="Where the run would be: the space on that disk is looked at."
    )
    tokens_per_second: float | None = Field(
        None,
        gt=0,
        description="Tokens per second of all devices together, for the time that the run would take.",
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
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        frozen=True,
        extra="forbid",
    )


class _EstimateCli(EstimateConfig, BaseSettings):
    __doc__ = f"""{EstimateConfig.__doc__} With --json it is printed as JSON. Exit code 0: such a run can begin, 1: something in the
input would be refused, or the disk has no room, 2: an option cannot be used."""

    model_config = _EmbedCli.model_config | SettingsConfigDict(title="Estimate")


class _HelpFormatter(argparse.HelpFormatter):
    """Leaves out what only a programmer reads: Python's type names, defaults that are None, a page of usage."""

    _METAVARS: ClassVar = {"tuple[Path,...]": "FILES", "Path": "DIR", "str": "TEXT", "int": "N"} | {
        f"tuple[{{{','.join(get_args(OutputName))}}},...]": "OUTPUTS",
        "tuple[int,...]": "LAYERS",
    }

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any
    ) -> None:
        needed = [each for each in actions if "(required)" in (each.help or "")]
        told = " ".join(
            f"{each.option_strings[0]} {self._metavar_formatter(each, '')(1)[0]}" for each in needed
        )
        super().add_usage(f"%(prog)s {told} [options]", actions, *args, **kwargs)

    def _metavar_formatter(
        self, action: argparse.Action, default_metavar: str
    ) -> Callable[[int], tuple[str, ...]]:
        if action.metavar == "float":
            action.metavar = "SECONDS" if "seconds" in (action.help or "").lower() else "N"
        elif isinstance(action.metavar, str):
            action.metavar = self._METAVARS.get(action.metavar, action.metavar)
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = re.sub(
            r" \(default: \(.*\)\)$", "", action.help or ""
        )  # of several values; the text says it
        return told.replace(" (default: None)", "").replace(" (required)", "")


def parse_command_line(
    arguments: Sequence[str], *, program: str = "python flows/embed.py"
) -> EmbedConfig:
    """Read the settings from a command line of `program`, and what it leaves open from `VNP_*`.

    Raises:
        ConfigError: A value that does not fit; one line for each.
        SystemExit: After `--help` (0), and for an option that does not exist (2).
    """
    return EmbedConfig.model_validate(_given(_EmbedCli, arguments, program))


def parse_estimate_command_line(arguments: Sequence[str]) -> EstimateConfig:
    """Read the settings of a run that is only thought of. `--json` is not among them. Raises as `parse_command_line`."""
    return EstimateConfig.model_validate(_given(_EstimateCli, arguments, "vnp plan"))


def _parse_arguments(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    namespace: argparse.Namespace | None = None,
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


def _given(model: type[BaseSettings], arguments: Sequence[str], program: str) -> dict[str, Any]:
    try:
        source = CliSettingsSource[Any](
            model,
            formatter_class=_HelpFormatter,
            parse_args_method=_parse_arguments,
            cli_prog_name=program,
        )
        return CliApp.run(model, cli_args=list(arguments), cli_settings_source=source).model_dump()
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


def _explain(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    assert isinstance(location, tuple)
    option = "--" + ".".join(
        str(part).replace("_", "-") for part in location if not isinstance(part, int)
    )
    if detail["type"] == "missing":
        return f"{option} is needed (see --help)"
    if detail["type"] == "path":
        return f"{option} {detail['msg']}"
    message = str(detail["msg"])
    return f"{option}: {message[:1].lower()}{message[1:]}; it was {detail['input']!r}"
