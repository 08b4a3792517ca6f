"""Read the user's settings of Prefect, and complete them before Prefect is imported.

Prefect reads its settings once, while it is imported, so this module does not import it. It reads
and writes `PREFECT_*`, the proxy variables and HOME; `vnp_lib` reads all others.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnp_lib.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SERVER_START_S = 120
_NEEDED_BYTES = 32_000_000  # for a new database of a Prefect server, with its journal

# These exist without a file, and then have no settings.
_PREFECTS_OWN_PROFILES = ("ephemeral", "local", "test", "cloud")

# Needed by a run, unless the user has set it under any of the names, wherever Prefect reads
# settings.
_DEFAULTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("PREFECT_SERVER_ANALYTICS_ENABLED",), "false"),
    (("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS",), str(_SERVER_START_S)),
    (("PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"), "true"),
    (("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"), "1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting of Prefect that the user has made."""

    value: str
    where: str  # such as "the environment variable PREFECT_API_URL"


class UserSettings:
    """The user's settings: environment, `.env`, `prefect.toml`, `pyproject.toml`, profile.

    An earlier place overrides a later one.
    """

    def __init__(self, places: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        self._places = places

    def find(self, *names: str) -> Setting | None:
        """Return the setting with any of these names from the first place; None if it is empty."""
        for where, values in self._places:
            for name in names:
                if name in values:
                    return (
                        Setting(value=values[name], where=where.format(name=name))
                        if values[name]
                        else None
                    )
        return None

    def find_like(self, ending: str, value: object) -> tuple[str, Setting] | None:
        """Return the name and value of a setting of which only the end of the name is known."""
        for where, values in self._places:
            for name, found in values.items():
                if name.startswith("PREFECT_") and name.endswith(ending) and found == str(value):
                    return name, Setting(value=found, where=where.format(name=name))
        return None


def read_user_settings(environ: Mapping[str, str], cwd: Path) -> UserSettings:
    """Read all places where Prefect reads settings.

    Raises:
        ConfigError: A file that cannot be read, or a profile that does not exist.
    """
    set_here = {name.upper(): value for name, value in environ.items()}
    places: list[tuple[str, Mapping[str, str]]] = [("the environment variable {name}", set_here)]
    if (path := cwd / ".env").is_file():
        # Here, not above: few users have such a file.
        from dotenv import dotenv_values

        try:
            dotenv = {name.upper(): value or "" for name, value in dotenv_values(path).items()}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read Prefect's settings from {path}: {error}; fix or remove the file"
            ) from None
        places.append(
            (
                f"{{name}} in {path}",
                {name: value for name, value in dotenv.items() if name.startswith("PREFECT_")},
            )
        )
    for path, table in ((cwd / "prefect.toml", ()), (cwd / "pyproject.toml", ("tool", "prefect"))):
        if values := dict(_flattened("PREFECT", _table(_read_toml(path), table))):
            places.append((f"{path} (there {{name}} in TOML)", values))
    settings = UserSettings(places)
    places.append(_profile(settings, cwd))
    return settings


def prepare_environment(
    environ: MutableMapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Complete the environment with the settings that a run needs; keep those of the user.

    A file that cannot be read is ignored here; at the start of a run, `read_user_settings` reports
    it.
    """
    environ = os.environ if environ is None else environ
    try:
        settings = read_user_settings(environ, cwd or Path.cwd())
    except (ConfigError, OSError):
        settings = UserSettings(
            [("{name}", {name.upper(): value for name, value in environ.items()})]
        )
    for names, value in _DEFAULTS:
        if settings.find(*names) is None:
            environ[names[0]] = value
    reach_loopback_past_proxies(environ)


def reach_loopback_past_proxies(environ: MutableMapping[str, str]) -> None:
    """Add this machine to the hosts that are reached without a proxy.

    Both spellings of the variable are set; the one in lower case takes precedence.
    """
    without = next((environ[name] for name in ("no_proxy", "NO_PROXY") if environ.get(name)), "")
    names = [name.strip() for name in without.split(",") if name.strip()]
    if "*" not in names:
        without = ",".join([*names, *(name for name in _LOOPBACK if name not in names)])
    environ["no_proxy"] = environ["NO_PROXY"] = without


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectHome:
    """The directory of Prefect's database and profiles."""

    path: Path
    is_temporary: bool = False  # to be removed at the end
    notice: str = ""


def choose_home(
    settings: UserSettings, environ: MutableMapping[str, str], *, is_needed: bool
) -> PrefectHome:
    """Choose PREFECT_HOME: the user's, or ~/.prefect, or a temporary one if that is not writable.

    `environ` is changed so that Prefect uses it too, and gets a HOME if there is no such variable:
    without one, Prefect cannot be imported. Unless a server of the run `is_needed`, nothing
    important is written there, and any directory is accepted.

    Raises:
        ConfigError: The user's choice cannot be written to.
    """
    chosen = settings.find("PREFECT_HOME")
    try:
        path = Path(chosen.value).expanduser() if chosen else Path.home() / ".prefect"
        fault = _fault_of(path)
    except RuntimeError:
        # There is neither HOME nor an entry for this user id.
        path, fault = Path("~/.prefect"), "this user has no home directory"
    if fault and chosen and is_needed:
        raise ConfigError(
            f"PREFECT_HOME {path}, set by {chosen.where}, cannot be used for Prefect's database: "
            f"{fault}; set it to a writable directory, or unset it"
        )
    home = PrefectHome(path=path)
    if fault:
        try:
            made = Path(tempfile.mkdtemp(prefix="vnp-prefect-"))
        except OSError as error:
            raise ConfigError(
                f"no writable directory for Prefect's database: {path}: {fault}; {error}. "
                "Set PREFECT_HOME or TMPDIR to a writable one"
            ) from None
        notice = (
            f"note: {path} cannot be used ({fault}): Prefect's record of this run is in {made}, "
            "and removed at the end"
        )
        home = PrefectHome(path=made, is_temporary=True, notice=notice)
        environ["PREFECT_HOME"] = str(made)
    try:
        Path.home()
    except RuntimeError:
        environ["HOME"] = str(home.path)
    return home


def _fault_of(path: Path) -> str:
    """Return why a directory cannot hold a database; "" if it can. No file stays in it."""
    existing = next(
        each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each)
    )
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(65_536))
            file.flush()
            os.fsync(file.fileno())
        room = os.statvfs(existing)
    except OSError as error:
        return f"{existing}: {error.strerror}"
    if room.f_bavail * room.f_frsize < _NEEDED_BYTES:
        return f"{existing}: No space left on device"
    return ""


def _profile(settings: UserSettings, cwd: Path) -> tuple[str, Mapping[str, str]]:
    path: Path | None = None
    home = settings.find("PREFECT_HOME")
    if own := settings.find("PREFECT_PROFILES_PATH"):
        path = cwd / own.value
    else:
        # There is none if the user has no home directory.
        with suppress(RuntimeError):
            path = Path(home.value).expanduser() if home else Path.home() / ".prefect"
            path /= "profiles.toml"
    profiles = _read_toml(path) if path is not None else {}
    chosen = settings.find("PREFECT_PROFILE")
    name = chosen.value if chosen else profiles.get("active")
    known = _table(profiles, ("profiles",))
    if name is None or (name in _PREFECTS_OWN_PROFILES and name not in known):
        return "{name}", {}
    if name not in known:
        where = chosen.where if chosen else f"'active' in {path}"
        raise ConfigError(
            f"Prefect's profile {name!r}, selected by {where}, is not in "
            f"{path or '~/.prefect/profiles.toml'}; available: {', '.join(known) or 'none'}. "
            f"Select one of these, or unset it"
        )
    values = {key.upper(): str(value) for key, value in _table(known, (name,)).items()}
    return f"{{name}} in the profile {name!r} of {path}", values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # As in Prefect. A home that cannot be used is reported elsewhere.
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read Prefect's settings from {path}: {error}; fix or remove the file"
        ) from None


def _table(data: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    table: Any = data
    for name in names:
        table = table.get(name) if isinstance(table, Mapping) else None
    return table if isinstance(table, Mapping) else {}


def _flattened(prefix: str, table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return `[server.ephemeral] enabled = false` as PREFECT_SERVER_EPHEMERAL_ENABLED, "False"."""
    settings: list[tuple[str, str]] = []
    for key, value in table.items():
        name = f"{prefix}_{key.upper()}"
        settings += _flattened(name, value) if isinstance(value, Mapping) else [(name, str(value))]
    return settings
