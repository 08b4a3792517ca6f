"""Read paths as users write them on a command line, in a form, in a variable or in Python."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from vnp_lib.errors import ConfigError

AnyPath: TypeAlias = str | os.PathLike[str]

_STDIN_NAMES = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# `Path` collapses two slashes into one. With a single slash, only known schemes make an address,
# because the name of a directory may end with a colon.
_COLLAPSED = re.compile(
    r"(abfss?|adl|az|drs|file|ftps?|gc?s|globus|hdfs|hf|https?|oci|r2|rsync|s3[an]?|scp|sftp|smb"
    r"|ssh|swift|wasbs?):/(?!/)",
    re.IGNORECASE,
)

_ON_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\\w")
_ON_ANOTHER_MACHINE = re.compile(r"[\w.-]+@[\w.-]+:")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "\u2018": "\u2019", "„": "“", "«": "»"}
_MOST_NAME_BYTES = 255
_MOST_COMMAS_IN_A_NAME = 8


class PathUse(StrEnum):
    """The purpose of a path, which decides what an error message recommends instead."""

    # The input of a run, which may also be standard input.
    INPUT = "input"
    # An input of a command that reads files only.
    FILE = "file"
    OUTPUT = "output"
    RUN = "run directory"
    WEIGHTS = "weights"


def user_path(written: AnyPath, use: PathUse = PathUse.FILE) -> Path:
    """Return the path that a user means.

    If a file has exactly this name, it is that file, whatever characters are in the name.
    Otherwise surrounding white space is removed, `~`, `~user`, `$NAME` and `${NAME}` are expanded,
    and `file:///x` becomes `/x`. The file need not exist. Relative paths stay relative.

    Args:
        written: The text that the user wrote, or a `Path` made from it.
        use: Purpose of the path.

    Raises:
        ConfigError: The path is empty or an address, names an unknown user or variable, or cannot
            be the name of a file on this system.

    >>> user_path(" data/proteins.fasta\\n")
    PosixPath('data/proteins.fasta')
    >>> user_path("s3://bucket/x.fasta", PathUse.INPUT)
    Traceback (most recent call last):
    vnp_lib.errors.ConfigError: s3://bucket/x.fasta: addresses are not fetched; pipe it, as in \
`aws s3 cp s3://bucket/x.fasta - | python flows/embed.py --fasta - ...`
    """
    text = os.fsdecode(written)
    path = text if os.path.lexists(text) else _expand(text.strip(), use)
    _require_valid(path, use)
    return Path(path)


def user_inputs(written: AnyPath | Iterable[AnyPath]) -> tuple[Path, ...]:
    """Return the files, directories and patterns of a run's input; `-` is standard input.

    A text is split at commas, unless the comma is part of the name of an existing file or of a
    pattern that matches. Each item of a list is one path.

    Raises:
        ConfigError: As `user_path`; or nothing is between two commas, or standard input is given
            twice.
    """
    if isinstance(written, str):
        items: list[AnyPath] = [*_split_at_commas(written)]
    else:
        items = [written] if isinstance(written, os.PathLike) else [*written]
    paths = tuple(
        Path("-") if str(item).strip() in _STDIN_NAMES else user_path(item, PathUse.INPUT)
        for item in items
    )
    if paths.count(Path("-")) > 1:
        raise ConfigError("-: standard input is given twice, but can be read only once")
    return paths


def is_pattern(text: str) -> bool:
    """Return whether a path has a wildcard, and no file has exactly that name."""
    return glob.has_magic(text) and not os.path.lexists(text)


def _split_at_commas(text: str) -> list[str]:
    """Split a list of paths. A path with commas that exists is preferred to its parts."""
    if _exists_or_matches(text):
        return [text]
    # As in JSON, a list may be written so that commas in names are unambiguous.
    if text.lstrip().startswith("["):
        with suppress(ValueError):
            items: list[str] = json.loads(text)
            if all(isinstance(item, str) for item in items):
                return items
    pieces, paths = text.split(","), []
    while pieces:
        most = min(len(pieces), 1 + _MOST_COMMAS_IN_A_NAME)
        count = next((n for n in range(most, 1, -1) if _exists_or_matches(",".join(pieces[:n]))), 1)
        paths.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    if len(paths) > 1 and not all(path.strip() for path in paths):
        raise _refusal(
            text, "there is nothing before, after or between two of the commas; remove that comma"
        )
    return paths


def _exists_or_matches(text: str) -> bool:
    """Return whether a file has this name, or at least one matches this pattern."""
    if os.path.lexists(text):
        return True
    try:
        expanded = _expand(text.strip(), PathUse.INPUT)
    except ConfigError:
        return False
    return os.path.lexists(expanded) or (
        glob.has_magic(expanded) and any(glob.iglob(expanded, recursive=True))
    )


def _expand(text: str, use: PathUse) -> str:
    if not text:
        raise ConfigError(
            "'': the path is empty; give one, or set the variable that it is taken from"
        )
    if os.path.lexists(text):
        return text
    if collapsed := _COLLAPSED.match(text):
        text = f"{collapsed[1]}://{text[collapsed.end() :].lstrip('/')}"
        text = text.replace("file://", "file:///", 1)
    if _SCHEME.match(text):
        # `urlsplit` raises ValueError on brackets that do not enclose an IPv6 address.
        with suppress(ValueError):
            address = urlsplit(text)
            is_local = address.scheme.lower() == "file" and address.netloc in ("", "localhost")
            if is_local and address.path:
                return unquote(address.path, errors="surrogateescape")
        raise _refusal(text, _advice_on_address(text, use))
    if _QUOTES.get(text[0]) == text[-1] and len(text) > 1:
        raise _refusal(
            text,
            "there are quotes around this path; remove them: a shell does that, but a form or a "
            "file of variables does not",
        )
    if _ON_WINDOWS.match(text):
        raise _refusal(
            text, "this is a Windows path; give the path on this system, in WSL /mnt/c/..."
        )
    if _ON_ANOTHER_MACHINE.match(text):
        raise _refusal(
            text, "this is on another machine; copy it here first, or mount that file system"
        )
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        user = text[1:].partition("/")[0]
        reason = f"there is no user {user!r} on this machine" if user else "HOME is not set"
        raise _refusal(text, f"{reason}; write the path in full")
    return _VARIABLE.sub(lambda variable: _value(variable, text), path)


def _value(variable: re.Match[str], text: str) -> str:
    """Return the value of an environment variable that is part of a path."""
    name = variable[1] or variable[2]
    value = os.path.expandvars(f"${{{name}}}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise _refusal(
            text, f"only $NAME and ${{NAME}} are expanded; write the value of {variable[0]} instead"
        )
    if value in ("", f"${{{name}}}"):
        raise _refusal(
            text, f"the environment variable {name} is not set; set it, or write the path in full"
        )
    return value


def _advice_on_address(text: str, use: PathUse) -> str:
    """Return what to do instead of giving an address, with the command that copies it."""
    scheme, quoted = text.partition(":")[0].lower(), shlex.quote(text)
    if use in (PathUse.OUTPUT, PathUse.RUN):
        what = "addresses are not written to" if use == PathUse.OUTPUT else "addresses are not read"
        copy = {"s3": "aws s3 sync", "gs": "gcloud storage rsync"}.get(scheme)
        copied = f", for example with `{copy}`" if copy else ""
        when = "copy it there afterwards" if use == PathUse.OUTPUT else "copy it here first"
        return (
            f"{what}; give a directory on a disk of this machine or one mounted here, and "
            f"{when}{copied}"
        )
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


def _refusal(text: str, reason: str) -> ConfigError:
    return ConfigError(f"{shown(text)}: {reason}")


def _require_valid(text: str, use: PathUse) -> None:
    """Raise ConfigError if no file can have this name, or a UTF-8 record cannot hold it."""
    if "\0" in text:
        raise ConfigError(f"{text!r}: a path cannot have a NUL character in it; remove it")
    if re.search(r"[\n\r]", text) and not os.path.lexists(text):
        raise ConfigError(
            f"{text!r}: there is a line break in this path; give one path, or several separated by "
            "commas"
        )
    if too_long := next(
        (part for part in text.split("/") if len(os.fsencode(part)) > _MOST_NAME_BYTES), None
    ):
        raise ConfigError(
            f"{too_long[:40]}...: this is too long for the name of a file, which has up to "
            f"{_MOST_NAME_BYTES} bytes; give a path"
        )
    is_run_directory = use in (PathUse.OUTPUT, PathUse.RUN)
    try:
        # A run directory is recorded without symbolic links in its path.
        path = os.path.realpath(text) if is_run_directory else os.path.abspath(text)
    except OSError as error:
        raise _refusal(text, f"the current directory was removed ({error.strerror})") from None
    try:
        path.encode()
    except UnicodeEncodeError:
        link = "" if is_run_directory else ", or give a link to it whose name is"
        advice = f"this name is not UTF-8 text; rename it{link}"
        if is_utf8(os.fsencode(path)):
            advice = "this name cannot be read in this locale; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        raise _refusal(path, advice) from None


def is_utf8(data: bytes) -> bool:
    """Return whether bytes are UTF-8 text."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def shown(path: AnyPath) -> str:
    """Return a path for display. Bytes that are not UTF-8 are written as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")
