"""The parts of the reference that are made from the code, in Markdown, so that they cannot be stale."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vnp_lib import cli, failures
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.inputs.characters import CLASSES
from vnp_lib.options import parse_command_line

_WIDTH = "100"  # letters of a line of --help
_SETTING = ("option, variable", "default", "means")


def run_options() -> str:
    """What `python flows/embed.py --help` says."""
    return _as_text(_printed_by(lambda: parse_command_line(["--help"])))


def vnp_commands() -> str:
    """What `vnp COMMAND --help` says, for each command."""
    return "\n\n".join(
        f"### vnp {command}\n\n{_as_text(help_of_vnp(command))}"
        for command in names_of_vnp_commands()
    )


def names_of_vnp_commands() -> list[str]:
    return re.findall(r"^    ([a-z][a-z-]*)\b", help_of_vnp(), re.MULTILINE)


def help_of_vnp(*arguments: str) -> str:
    return _printed_by(lambda: cli.main([*arguments, "--help"]))


def run_settings() -> str:
    """The table of a run's settings."""
    return _table(_settings_of(EmbedConfig, option="--", variable="VNP_"), head=_SETTING)


def runtime_settings() -> str:
    """The table of the settings for when things go wrong or take long."""
    return _table(
        _settings_of(RuntimeConfig, option="--runtime.", variable="VNP_RUNTIME__"), head=_SETTING
    )


def error_tree() -> str:
    """The tree of errors, as it stands at the top of their module."""
    assert failures.__doc__ is not None
    return _as_text(failures.__doc__.partition("\n\n")[2])


def character_classes() -> str:
    """The table of the classes of characters in sequence text."""
    rows = ((each.name, each.members, each.error, each.map, each.skip) for each in CLASSES)
    return _table(rows, head=("class", "characters", "`error`", "`map`", "`skip`"))


GENERATED: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        run_options,
        vnp_commands,
        run_settings,
        runtime_settings,
        error_tree,
        character_classes,
    )
}


def _printed_by(command: Callable[[], object]) -> str:
    """What a command prints, with lines as long on every machine."""
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
        if name != "runtime":  # those have a table of their own
            names = f"`{option}{name.replace('_', '-')}`<br>`{variable}{name.upper()}`"
            yield names, _default_of(field), field.description or ""


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    if field.default is None:
        return ""
    told = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"`{told}`"


def _table(rows: Iterator[tuple[str, ...]], *, head: tuple[str, ...]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _as_text(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
