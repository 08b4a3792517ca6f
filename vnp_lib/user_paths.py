"""Paths as users write them: on a command line, in a form, in an environment variable or in Python."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from vnp_lib.errors import ConfigError

AnyPath: TypeAlias = str | os.PathLike[str]

_STDIN_NAMES = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# `Path` makes one slash of two. With one, only what is known is an address: a directory's name may end with a colon.
_COLLAPSED = re.compile(
    r"(abfss?|adl|az|drs|file|ftps?|gc?s|globus|hdfs|hf|https?|oci|r2|rsync|s3[an]?|scp|sftp|smb|ssh|swift|wasbs?):/(?!/)",
    re.IGNORECASE,
)
_ON_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\\w")
_ON_ANOTHER_MACHINE = re.compile(r"[\w.-]+@[\w.-]+:")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "\u2018": "\u2019", "„": "“", "«": "»"}
_MOST_NAME_BYTES = 255
_MOST_COMMAS_IN_A_NAME = 8


class PathUse(StrEnum):
    """What a path is for, which decides what to do instead where it cannot be used."""

    INPUT = "input"  # of a run, which reads standard input too
    FILE = "file"  # that is read by whatever takes files only
    OUTPUT = "output"
    RUN = "run directory"
    WEIGHTS = "weights"


def user_path(given: AnyPath, use: PathUse = PathUse.FILE) -> Path:
    """Return the path that is meant by what a user wrote.

    What exists under exactly that name is meant, whatever is in the name. Otherwise white space around it is dropped, `~`,
    `~user`, `$NAME` and `${NAME}` are expanded, and `file:///x` is `/x`. It need not exist. Relative paths stay relative.

    Args:
        given: What was written. A `Path` is treated as its text.
        use: What the path is for.

    Raises:
        ConfigError: It is empty or an address, names an unknown user or variable, or cannot be the name of a file here.

    >>> user_path(" data/proteins.fasta\\n")
    PosixPath('data/proteins.fasta')
    >>> user_path("s3://bucket/x.fasta", PathUse.INPUT)
    Traceback (most recent call last):
    vnp_lib.errors.ConfigError: s3://bucket/x.fasta: addresses are not fetched; pipe it, as in \
`aws s3 cp s3://bucket/x.fasta - | python flows/embed.py --fasta - ...`
    """
    text = os.fsdecode(given)
    meant = text if os.path.lexists(text) else _expanded(text.strip(), use)
    _require_possible(meant, use)
    return Path(meant)


def user_inputs(given: AnyPath | Iterable[AnyPath]) -> tuple[Path, ...]:
    """Return the files, directories and patterns that are meant by the input of a run; `-` is standard input.

    A text is divided at commas, except where a file that exists, or a pattern that matches, has the comma in it; each item of a
    list is one path.

    Raises:
        ConfigError: As `user_path`; or there is nothing between two commas, or standard input is given twice.
    """
    items = (
        _divided(given)
        if isinstance(given, str)
        else [given]
        if isinstance(given, os.PathLike)
        else [*given]
    )
    paths = tuple(
        Path("-") if str(item).strip() in _STDIN_NAMES else user_path(item, PathUse.INPUT)
        for item in items
    )
    if paths.count(Path("-")) > 1:
        raise ConfigError("-: standard input is given twice, and can be read once; give it once")
    return paths


def is_pattern(text: str) -> bool:
    """Whether it has a character in it that stands for others, and no file has that name."""
    return glob.has_magic(text) and not os.path.lexists(text)


def _divided(text: str) -> list[str]:
    """The parts of a list with commas between, as long as they can be."""
    if _means_something(text):
        return [text]
    if text.lstrip().startswith("[") and (listed := _json_list(text)) is not None:
        return listed
    pieces, parts = text.split(","), []
    while pieces:
        most = min(len(pieces), 1 + _MOST_COMMAS_IN_A_NAME)
        count = next((n for n in range(most, 1, -1) if _means_something(",".join(pieces[:n]))), 1)
        parts.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise _refusal(
            text,
            "there is nothing before, after or between two of the commas; take that comma away",
        )
    return parts


def _json_list(text: str) -> list[str] | None:
    try:
        listed = json.loads(text)
    except ValueError:
        return None
    return listed if all(isinstance(item, str) for item in listed) else None


def _means_something(text: str) -> bool:
    """Whether a file has this name, or some match this pattern."""
    if os.path.lexists(text):
        return True
    try:
        expanded = _expanded(text.strip(), PathUse.INPUT)
    except ConfigError:
        return False
    return os.path.lexists(expanded) or (
        glob.has_magic(expanded) and any(glob.iglob(expanded, recursive=True))
    )


def _expanded(text: str, use: PathUse) -> str:
    if not text:
        raise ConfigError(
            "'': the path is empty; give one, or see that the variable that it comes from is set"
        )
    if os.path.lexists(text):
        return text
    if collapsed := _COLLAPSED.match(text):
        text = f"{collapsed[1]}://{text[collapsed.end() :].lstrip('/')}"
        text = text.replace("file://", "file:///", 1)
    if _SCHEME.match(text):
        return _path_in_address(text, use)
    if _QUOTES.get(text[0]) == text[-1] and len(text) > 1:
        raise _refusal(
            text,
            "there are quotes around this path; take them away: a shell does that, a form or a file of variables does not",
        )
    if _ON_WINDOWS.match(text):
        raise _refusal(
            text,
            "this is a path of Windows; give the path that it has here, in WSL for example /mnt/c/...",
        )
    if _ON_ANOTHER_MACHINE.match(text):
        raise _refusal(
            text, "this is on another machine; copy it here first, or mount that file system"
        )
    return _VARIABLE.sub(lambda variable: _value(variable, text), _with_home(text))


def _with_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        user = text[1:].partition("/")[0]
        what = (
            f"there is no user {user!r} on this machine"
            if user
            else "HOME is not set, so that ~ is not known"
        )
        raise _refusal(text, f"{what}; write the path in full")
    return expanded


def _value(variable: re.Match[str], text: str) -> str:
    name = variable[1] or variable[2]
    value = os.path.expandvars(f"${{{name}}}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise _refusal(
            text, f"only $NAME and ${{NAME}} are expanded; write what {variable[0]} stands for"
        )
    if value in ("", f"${{{name}}}"):
        raise _refusal(
            text, f"the environment variable {name} is not set; set it, or write the path in full"
        )
    return value


def _path_in_address(text: str, use: PathUse) -> str:
    try:
        address = urlsplit(text)
        is_here = (
            address.scheme.lower() == "file"
            and address.netloc in ("", "localhost")
            and address.path
        )
    except ValueError:  # brackets that are no IPv6 address
        is_here = False
    if is_here:
        return unquote(address.path, errors="surrogateescape")
    raise _refusal(text, _instead_of_address(text, use))


def _instead_of_address(text: str, use: PathUse) -> str:
    scheme, quoted = text.partition(":")[0].lower(), shlex.quote(text)
    if use in (PathUse.OUTPUT, PathUse.RUN):
        what = "addresses are not written to" if use == PathUse.OUTPUT else "addresses are not read"
        copy = {"s3": "aws s3 sync", "gs": "gcloud storage rsync"}.get(scheme)
        copied = f", for example with `{copy}`" if copy else ""
        when = "copy it there afterwards" if use == PathUse.OUTPUT else "copy it here first"
        return f"{what}; give a directory on a disk of this machine or one mounted here, and {when}{copied}"
    if use == PathUse.WEIGHTS:
        is_hub = scheme == "hf" or "huggingface.co" in text
        get = {"s3": f"aws s3 cp {quoted} .", "gs": f"gcloud storage cp {quoted} ."}.get(
            scheme, f"curl --location --remote-name {quoted}"
        )
        get = "hf download facebook/esm2_... --local-dir weights" if is_hub else get
        return f"weights are not fetched from an address; get them with `{get}` and give their path"
    show = {
        "s3": f"aws s3 cp {quoted} -",
        "gs": f"gcloud storage cat {quoted}",
        **dict.fromkeys(("http", "https", "ftp", "ftps", "sftp"), f"curl --location {quoted}"),
    }.get(scheme)
    if use == PathUse.FILE or show is None:
        return "addresses are not fetched; download it, and give the path of the file"
    return (
        f"addresses are not fetched; pipe it, as in `{show} | python flows/embed.py --fasta - ...`"
    )


def _refusal(text: str, why: str) -> ConfigError:
    return ConfigError(f"{shown(text)}: {why}")


def _require_possible(text: str, use: PathUse) -> None:
    """Raise ConfigError where no file could have this name, or where it could not be recorded: records are UTF-8."""
    if "\0" in text:
        raise ConfigError(f"{text!r}: a path cannot have a NUL character in it; take it away")
    if re.search(r"[\n\r]", text) and not os.path.lexists(text):
        raise ConfigError(
            f"{text!r}: there is a line break in this path; give one path, several with commas between"
        )
    if too_long := next(
        (part for part in text.split("/") if len(os.fsencode(part)) > _MOST_NAME_BYTES), None
    ):
        raise ConfigError(
            f"{too_long[:40]}...: this is too long for the name of a file, which has {_MOST_NAME_BYTES} bytes at most; give a path"
        )
    try:
        # Of a run directory the path without links is recorded.
        whole = (
            os.path.realpath(text)
            if use in (PathUse.OUTPUT, PathUse.RUN)
            else os.path.abspath(text)
        )
    except OSError as error:
        raise _refusal(
            text, f"the current directory is not there any more ({error.strerror})"
        ) from None
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise _refusal(whole, _instead_of_undecodable(whole, use)) from None


def _instead_of_undecodable(text: str, use: PathUse) -> str:
    if is_utf8(os.fsencode(text)):
        return "this name cannot be read in this locale; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    link = "" if use in (PathUse.OUTPUT, PathUse.RUN) else ", or give a link to it whose name is"
    return f"this name is not UTF-8 text; rename it{link}"


def is_utf8(data: bytes) -> bool:
    """Whether it can be decoded."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def shown(path: AnyPath) -> str:
    """A path for people, also where its name is no text: bytes that are none are written as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")
