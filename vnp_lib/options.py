"""Parse command lines and `VNP_*` variables into settings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from vnp_lib.config import EmbedConfig, OutputName, OutputPath, RunPath
from vnp_lib.errors import ConfigError
from vnp_lib.formatting import listed


class EstimateConfig(EmbedConfig):
    """Estimate a run without starting it, from the same options. Nothing on disk is changed."""

    output_dir: OutputPath = Field(
        Path(), description="Run directory of the run: the free space on its disk is checked."
    )
    tokens_per_second: float | None = Field(
        None,
        gt=0,
        description="Tokens per second of all devices together, to estimate the run time.",
    )
    speed_of: RunPath | None = Field(
        None,
        description=(
            "Run directory of the same model on the same kind of devices, to take the speed from; "
            "by default --output-dir, if it holds a run."
        ),
    )


class _EmbedCli(EmbedConfig, BaseSettings):
    __doc__ = f"""{EmbedConfig.__doc__} Each option can also be given as an environment variable:
--token-budget is VNP_TOKEN_BUDGET, --runtime.grace-s is VNP_RUNTIME__GRACE_S."""

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
    __doc__ = f"""{EstimateConfig.__doc__} With --json the estimate is printed as JSON. Exit code
0: the run can start, 1: it would refuse the input, or the disk has too little space, 2: an option
cannot be used."""

    model_config = _EmbedCli.model_config | SettingsConfigDict(title="Estimate")


class _HelpFormatter(argparse.HelpFormatter):
    """Help without Python's type names, defaults of None and a page-long usage line."""

    _METAVARS: ClassVar = {"tuple[Path,...]": "FILES", "Path": "DIR", "str": "TEXT", "int": "N"} | {
        f"tuple[{{{','.join(get_args(OutputName))}}},...]": "OUTPUTS",
        "tuple[int,...]": "LAYERS",
    }

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any
    ) -> None:
        required = " ".join(
            f"{action.option_strings[0]} {self._metavar_formatter(action, '')(1)[0]}"
            for action in actions
            if "(required)" in (action.help or "")
        )
        super().add_usage(f"%(prog)s {required} [options]", actions, *args, **kwargs)

    def _metavar_formatter(
        self, action: argparse.Action, default_metavar: str
    ) -> Callable[[int], tuple[str, ...]]:
        if action.metavar == "float":
            action.metavar = "SECONDS" if "seconds" in (action.help or "").lower() else "N"
        elif isinstance(action.metavar, str):
            action.metavar = self._METAVARS.get(action.metavar, action.metavar)
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # The default of an option with several values is a tuple; its description names it instead.
        text = re.sub(r" \(default: \(.*\)\)$", "", action.help or "")
        return text.replace(" (default: None)", "").replace(" (required)", "")


def parse_command_line(
    arguments: Sequence[str], *, program: str = "python flows/embed.py"
) -> EmbedConfig:
    """Parse the options of `program`; those that are not given are read from `VNP_*` variables.

    Raises:
        ConfigError: Invalid values; the message has one line per value.
        SystemExit: After `--help` (0), and for an option that does not exist (2).
    """
    return EmbedConfig.model_validate(_parse(_EmbedCli, arguments, program))


def parse_estimate_command_line(arguments: Sequence[str]) -> EstimateConfig:
    """Parse the options of a dry run, without `--json`. Raises as `parse_command_line`."""
    return EstimateConfig.model_validate(_parse(_EstimateCli, arguments, "vnp plan"))


def _parse_arguments(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    namespace: argparse.Namespace | None = None,
) -> argparse.Namespace:
    """Do what `parse_args` does, and explain paths left over by an unquoted pattern."""
    parsed, others = parser.parse_known_args(arguments, namespace)
    if others and all(os.path.lexists(other) for other in others):
        raise ConfigError(
            f"{listed(others, 3)}: these paths belong to no option; quote a pattern, as in "
            "--fasta 'x/*.faa', so that the shell does not expand it, or separate several files "
            "with commas"
        )
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return parsed


def _parse(model: type[BaseSettings], arguments: Sequence[str], program: str) -> dict[str, Any]:
    try:
        source = CliSettingsSource[Any](
            model,
            formatter_class=_HelpFormatter,
            parse_args_method=_parse_arguments,
            cli_prog_name=program,
        )
        return CliApp.run(model, cli_args=list(arguments), cli_settings_source=source).model_dump()
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            names = [str(part) for part in detail["loc"] if not isinstance(part, int)]
            option, message = "--" + ".".join(names).replace("_", "-"), detail["msg"]
            if detail["type"] == "missing":
                lines.append(f"{option} is required (see --help)")
            elif detail["type"] == "path":
                lines.append(f"{option} {message}")
            else:
                reason = f"{message[:1].lower()}{message[1:]}"
                lines.append(f"{option}: {reason}; it was {detail['input']!r}")
        raise ConfigError("\n".join(lines)) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None
