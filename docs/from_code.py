"""Generate parts of the documentation from the code, in Markdown, so that they cannot be stale."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vnp_lib import cli, failures
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.inference.gpu_memory import most_useful_tokens, tokens_that_fit
from vnp_lib.inputs.characters import CLASSES
from vnp_lib.model import MODELS, Architecture
from vnp_lib.options import parse_command_line
from vnp_lib.plan import RowLayout

_WIDTH = "100"  # characters of a line of --help
_SETTING = ("option, variable", "default", "means")
_TENTHS_OF_GIB = range(1, 1000)


def run_options() -> str:
    """Return the output of `python flows/embed.py --help`."""
    return _as_text(_printed_by(lambda: parse_command_line(["--help"])))


def vnp_commands() -> str:
    """Return the output of `vnp COMMAND --help` for each command."""
    return "\n\n".join(
        f"### vnp {command}\n\n{_as_text(help_of_vnp(command))}"
        for command in names_of_vnp_commands()
    )


def names_of_vnp_commands() -> list[str]:
    return re.findall(r"^    ([a-z][a-z-]*)\b", help_of_vnp(), re.MULTILINE)


def help_of_vnp(*arguments: str) -> str:
    return _printed_by(lambda: cli.main([*arguments, "--help"]))


def run_settings() -> str:
    """Return the table of a run's settings."""
    return _table(_settings_of(EmbedConfig, option="--", variable="VNP_"), head=_SETTING)


def runtime_settings() -> str:
    """Return the table of the settings for retries, checkpoints and time limits."""
    return _table(
        _settings_of(RuntimeConfig, option="--runtime.", variable="VNP_RUNTIME__"), head=_SETTING
    )


def error_tree() -> str:
    """Return the tree of errors from the docstring of their module."""
    assert failures.__doc__ is not None
    return _as_text(failures.__doc__.partition("\n\n")[2])


def character_classes() -> str:
    """Return the table of the classes of characters in sequence text."""
    rows = ((each.name, each.members, each.error, each.map, each.skip) for each in CLASSES)
    return _table(rows, head=("class", "characters", "`error`", "`map`", "`skip`"))


def model_sizes() -> str:
    """Return the table of the models with the GPU memory that their token budget needs in bfloat16.

    The figures are those by which a run chooses its token budget: a GPU with less free memory than
    the last column gets fewer tokens per forward pass, one with less than the column before is
    refused.
    """
    rows = []
    for model, architecture in MODELS.items():
        weights_gib = architecture.num_parameters * torch.bfloat16.itemsize / 2**30
        full = most_useful_tokens(architecture)
        least, enough = (_free_gib_for(tokens, architecture) for tokens in (1, full))
        rows.append(
            (
                f"`{model}`",
                f"{architecture.num_parameters / 1e6:,.0f} M",
                f"{architecture.embed_dim:,}",
                f"{weights_gib:.2f} GiB",
                f"{least:.1f} GiB",
                f"{enough:.1f} GiB ({full:,} tokens)",
            )
        )
    head = (
        "model",
        "parameters",
        "dimension",
        "weights",
        "needs at least",
        "for the largest budget",
    )
    return _table(iter(rows), head=head)


def _free_gib_for(tokens: int, architecture: Architecture) -> float:
    """Return the free GPU memory, in steps of 0.1 GiB, at which a pass of `tokens` tokens fits."""
    layout = RowLayout.of_names(
        [f"mean_{architecture.num_layers}"], embed_dim=architecture.embed_dim
    )

    def fits(tenths: int) -> bool:
        return tokens_that_fit(architecture, torch.bfloat16, tenths * 2**30 // 10, layout) >= tokens

    return _TENTHS_OF_GIB[bisect_left(_TENTHS_OF_GIB, True, key=fits)] / 10


GENERATED: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        run_options,
        vnp_commands,
        run_settings,
        runtime_settings,
        error_tree,
        character_classes,
        model_sizes,
    )
}


def _printed_by(command: Callable[[], object]) -> str:
    """Return the output of a command, with the same line length on every machine."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
            command()
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return printed.getvalue()


def _settings_of(
    model: type[BaseModel], *, option: str, variable: str
) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        # The runtime settings have a table of their own.
        if name != "runtime":
            names = f"`{option}{name.replace('_', '-')}`<br>`{variable}{name.upper()}`"
            yield names, _default_of(field), field.description or ""


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    if field.default is None:
        return ""
    default = (
        ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    )
    return f"`{default}`"


def _table(rows: Iterator[tuple[str, ...]], *, head: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _as_text(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
