"""The Prefect server of a run: the user's, checked up front, or a temporary one for the run."""

from __future__ import annotations

import atexit
import io
import os
import re
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from flows.prefect_environment import Setting, UserSettings, choose_home, read_user_settings
from vnp_lib.errors import ConfigError

_PROGRAM = Path(__file__).with_name("server_process.py")
_OWN = "set an empty PREFECT_API_URL to let the run start its own server"
_REQUEST_S = 10.0
_PROBE_S = 14.0  # more than _REQUEST_S, since name resolution has no limit of its own
_DATABASE_S = 5.0
_START_S = 120.0
_STOP_S = 6.0
_POLL_S = 0.2
_CHECK_EVERY_S = 10.0
_MAX_UNANSWERED = 3  # requests in a row
_MAX_RESTARTS = 3
_KEPT_LINES = 200  # of the output of the server
# For a server on this machine, which either answers or is gone, unless the user has set other
# limits.
_OWN_SERVER_DEFAULTS = {"PREFECT_CLIENT_MAX_RETRIES": "2", "PREFECT_API_REQUEST_TIMEOUT": "20"}


class PrefectServer:
    """The server that records the run."""

    def __init__(self, api_url: str, cleanup: ExitStack) -> None:
        self.api_url = api_url
        # Closed at exit: removes what was created for the server.
        self.cleanup = cleanup

    @property
    def is_gone(self) -> bool:
        """Whether it has exited, as far as that is known without a request."""
        return False

    def answers(self) -> bool:
        """Whether the server responds, with any status."""
        # Here, not above: an invalid command line is rejected without it.
        import httpx

        try:
            httpx.get(f"{self.api_url}/health", timeout=_REQUEST_S / 3)
        except (httpx.HTTPError, OSError, ImportError, ValueError):
            return False
        return True


class TemporaryServer(PrefectServer):
    """A server for this run.

    The run owns the socket: the port is known before the server starts, and stays after a restart.
    """

    def __init__(self, database: str, cleanup: ExitStack) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        super().__init__(f"http://127.0.0.1:{self._listener.getsockname()[1]}/api", cleanup)
        cleanup.callback(self.close)
        self._database = database
        self._process: subprocess.Popen[bytes] | None = None
        self._is_wanted = threading.Event()
        self._checked_at = time.monotonic()
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def is_gone(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """Start the server without waiting for it."""
        self._last_lines.clear()
        environment = dict(os.environ) | {
            "PREFECT_API_URL": "",
            "PREFECT_UI_ENABLED": "false",
            "PYTHONSAFEPATH": "1",
        }
        if "PYTHONPATH" in environment:
            # An empty entry would mean the current directory.
            paths = environment["PYTHONPATH"].split(os.pathsep)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(self._listener.fileno())],
            # Never written to: its end shows the server that the run is gone.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            start_new_session=True,
            env=environment,
        )
        stream = self._process.stderr
        assert stream is not None

        def keep_last_lines() -> None:
            for line in stream:
                self._last_lines.append(line.decode(errors="replace"))

        threading.Thread(target=keep_last_lines, daemon=True).start()

    def wait(self, limit_s: float) -> None:
        """Wait until the server answers.

        Raises:
            ConfigError: It has exited, or does not answer in time.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if readable and self._process.stdout.readline():
            return
        what = "has not started" if readable else f"has not started within {limit_s:g} s"
        self._end_process(_STOP_S)
        lines = [line.strip() for line in self._last_lines]
        exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        reason = exceptions[-1][:300] if exceptions else "it printed no reason"
        raise ConfigError(
            f"Prefect's server {what} with {self._database}: {reason}; the "
            "database may be damaged, or from another version of Prefect: set PREFECT_HOME to "
            "another directory to create a new one"
        )

    def keep_up(self, tell: Callable[[str], None], limit_s: float) -> None:
        """Restart the server, from a thread, if it exits or freezes before it is closed.

        Meanwhile requests wait at the socket. After several restarts the socket is closed, too, so
        that requests are refused at once.
        """

        def restart_when_lost() -> None:
            for _ in range(_MAX_RESTARTS):
                self._wait_until_lost()
                if not self._is_wanted.is_set():
                    return
                tell(
                    "note: the Prefect server of this run was lost and is restarted; the run "
                    "continues"
                )
                try:
                    self._end_process(0.0)
                    self.start()
                    self.wait(limit_s)
                except (ConfigError, OSError):
                    break
            self._wait_until_lost()
            if self._is_wanted.is_set():
                self.close()

        self._is_wanted.set()
        threading.Thread(target=restart_when_lost, daemon=True).start()

    def _wait_until_lost(self) -> None:
        num_unanswered = 0
        while self._is_wanted.is_set() and not self.is_gone and num_unanswered < _MAX_UNANSWERED:
            time.sleep(_POLL_S)
            if time.monotonic() >= self._checked_at + _CHECK_EVERY_S:
                self._checked_at = time.monotonic()
                num_unanswered = 0 if self.answers() else num_unanswered + 1

    def _end_process(self, patience_s: float) -> None:
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the server, and do not restart it."""
        self._is_wanted.clear()
        self._end_process(_STOP_S)
        self._listener.close()


def find_prefect(
    tell: Callable[[str], None], *, environ: MutableMapping[str, str] | None = None
) -> PrefectServer:
    """Find the user's Prefect server or start one, and import Prefect with it.

    A server that is started here ends with this process, after the exit handlers of Prefect, which
    send its last log lines.

    Raises:
        ConfigError: There is no usable server; no file has been created by then.
    """
    environ = os.environ if environ is None else environ
    settings = read_user_settings(environ, Path.cwd())
    url = settings.find("PREFECT_API_URL")
    require_server(settings)
    require_certificates(settings)
    home = choose_home(settings, environ, is_needed=url is None)
    cleanup = ExitStack()
    # Before Prefect is imported, so that the handlers that it registers run first.
    atexit.register(cleanup.close)
    try:
        if home.is_temporary:
            cleanup.callback(shutil.rmtree, home.path, ignore_errors=True)
            tell(home.notice)
        _drop_unusable_proxies(environ, url)
        if url is None:
            return _start_server(settings, home.path, environ, cleanup, tell)
        _import_prefect(settings)
        check_standing_server(url)
        return PrefectServer(url.value, cleanup)
    except BaseException:
        cleanup.close()
        raise


def require_server(settings: UserSettings) -> None:
    """Raise ConfigError for settings that allow no server at all."""
    enabled = settings.find(
        "PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"
    )
    if (
        settings.find("PREFECT_API_URL") is None
        and enabled
        and enabled.value.strip().lower() in ("false", "0", "no", "off", "f", "n")
    ):
        raise ConfigError(
            f"there is no Prefect server for this run: PREFECT_API_URL is not set, and a temporary "
            f"server is disabled by {enabled.where}; set PREFECT_API_URL to the address of a "
            f"server, or PREFECT_SERVER_EPHEMERAL_ENABLED=true"
        )


def _start_server(
    settings: UserSettings,
    home: Path,
    environ: MutableMapping[str, str],
    cleanup: ExitStack,
    tell: Callable[[str], None],
) -> TemporaryServer:
    chosen = settings.find(
        "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"
    )
    check_database(chosen, home)
    for name, value in _OWN_SERVER_DEFAULTS.items():
        if settings.find(name) is None:
            environ[name] = value
    if (auth := settings.find("PREFECT_SERVER_API_AUTH_STRING")) and not settings.find(
        "PREFECT_API_AUTH_STRING"
    ):
        environ["PREFECT_API_AUTH_STRING"] = auth.value
    database = (
        f"the database of {chosen.where}" if chosen else f"the database {home / 'prefect.db'}"
    )
    server = TemporaryServer(database, cleanup)
    server.start()
    environ["PREFECT_API_URL"] = server.api_url
    # It takes seconds, in which the server starts.
    _import_prefect(settings)
    limit = settings.find("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS")
    limit_s = float(limit.value) if limit else _START_S
    server.wait(limit_s)
    server.keep_up(tell, limit_s)
    return server


def _import_prefect(settings: UserSettings) -> None:
    """Import Prefect, which reads its settings while it is imported.

    Raises:
        ConfigError: Prefect rejects the value of a setting, or its installation is incomplete.
    """
    try:
        # The package prints the error, and the module below raises it.
        with redirect_stderr(io.StringIO()):
            import prefect
        import prefect.main  # noqa: F401
    except Exception as error:
        faults = []
        errors = getattr(error, "errors", None)
        # Only pydantic's ValidationError describes its errors one by one.
        for detail in errors() if callable(errors) else ():
            field = "_".join(part for part in detail["loc"] if isinstance(part, str)).upper()
            found = settings.find_like(field, detail["input"])
            name, where = (found[0], f", set by {found[1].where}") if found else (field.lower(), "")
            faults.append(f"{name}={detail['input']!r}{where}: {detail['msg']}")
        if not callable(errors):
            faults.append(" ".join(str(error).split()))
        raise ConfigError(
            f"Prefect cannot be used with these settings: {'; '.join(faults)}"
        ) from error


def require_certificates(settings: UserSettings) -> None:
    """Raise ConfigError if a certificate file is missing: no client could be created with it."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "PREFECT_API_SSL_CERT_FILE"):
        if (found := settings.find(name)) and not Path(found.value).exists():
            raise ConfigError(
                f"{name}={found.value}, set by {found.where}, does not exist; correct or unset it"
            )


def check_standing_server(url: Setting) -> None:
    """Request the version of the user's server, with Prefect's own client.

    Raises:
        ConfigError: It does not answer, is another kind of server, denies access, or has an
            incompatible version.
    """
    server = f"Prefect's server at {url.value}, set by {url.where},"
    address = urlsplit(url.value)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(
            f"{server} has no valid address; use one such as http://host:4200/api, or {_OWN}"
        )
    fault: list[str] = []
    probe = threading.Thread(target=lambda: fault.append(_fault_of_server(url.value)), daemon=True)
    probe.start()
    probe.join(_PROBE_S)
    reason = fault[0] if fault else f"does not answer within {_PROBE_S:g} s"
    if reason:
        raise ConfigError(f"{server} {reason}; start it or correct the address, or {_OWN}")


def _fault_of_server(url: str) -> str:
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.settings import (
        PREFECT_API_KEY,
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_CLOUD_API_URL,
        temporary_settings,
    )

    is_cloud = url.startswith(PREFECT_CLOUD_API_URL.value())
    if is_cloud and not PREFECT_API_KEY.value():
        return "is Prefect Cloud, and PREFECT_API_KEY is not set (`prefect cloud login`)"
    try:
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": _REQUEST_S}, sync_client=True) as client,
        ):
            if is_cloud:
                return _describe_error(client.api_healthcheck())
            version = client.api_version()
    except Exception as error:
        # A client may raise anything, even while it is created.
        return _describe_error(error)
    ours = prefect.__version__.split(".")[0]
    if not re.fullmatch(r"\d+\.\d+.*", str(version)):
        return f"is not a Prefect server: it reports the version {str(version)[:40]!r}"
    if version.split(".")[0] != ours:
        return (
            f"has version {version}, but Prefect {prefect.__version__} is installed here: "
            f"install a matching one"
        )
    return ""


def _describe_error(error: Exception | None) -> str:
    """Explain what an error of the client means for the address of the server."""
    import httpx

    match error:
        case None:
            return ""
        case httpx.HTTPStatusError(response=response):
            code = response.status_code
            if code in (401, 403, 407):
                return (
                    f"denies access ({code}): check PREFECT_API_KEY, PREFECT_API_AUTH_STRING "
                    f"and any proxy"
                )
            if code in (404, 405):
                return f"has no Prefect API at this address ({code}), which usually ends with /api"
            return f"responds with an error ({code} {response.reason_phrase})"
        case httpx.TimeoutException():
            return f"does not answer within {_REQUEST_S:g} s"
        case ValueError() if type(error).__name__.endswith("JSONDecodeError"):
            return "is not a Prefect server; the address usually ends with /api"
        case httpx.ConnectError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "has a certificate that is not trusted here; set PREFECT_API_SSL_CERT_FILE"
        case httpx.ConnectError() if "SSL" in str(error):
            return "does not speak https; use http://"
        case httpx.HTTPError():
            return f"cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        case _:
            return f"cannot be used ({type(error).__name__}: {' '.join(str(error).split())})"


def check_database(chosen: Setting | None, home: Path) -> None:
    """Check the database that a temporary server would use.

    Raises:
        ConfigError: It is locked, is not a database, was created by another version of Prefect, or
            its server does not answer.
    """
    url = chosen.value if chosen else f"sqlite:///{home / 'prefect.db'}"
    if url.startswith("sqlite"):
        address = url.partition(":///")[2]
    else:
        address = re.sub(r"//[^@/]*@", "//", url)  # without the password
    database = f"the database {address}"
    database += f", set by {chosen.where}," if chosen else " in PREFECT_HOME"
    if url.startswith("sqlite"):
        fault = _fault_of_sqlite(Path(unquote(url.partition(":///")[2].partition("?")[0])))
    else:
        fault = _fault_of_database_server(url)
    if fault:
        cure = "correct it or unset it" if chosen else "set PREFECT_HOME to another directory"
        raise ConfigError(f"{database} cannot be used by Prefect's server: {fault}; {cure}")


def _fault_of_sqlite(path: Path) -> str:
    if str(path) in ("", ".") or str(path).startswith(":memory:") or not path.exists():
        return ""
    if not path.stat().st_size:
        return ""
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw", uri=True, timeout=_DATABASE_S, isolation_level=None
        )
        try:
            # Only takes the lock: nothing is written.
            connection.execute("BEGIN IMMEDIATE")
            versions = [
                version
                for (version,) in connection.execute("SELECT version_num FROM alembic_version")
            ]
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        is_empty = "no such table" in str(error)
        return (
            ""
            if is_empty
            else str(error) + (" by another process" if "locked" in str(error) else "")
        )
    known = _known_versions()
    if unknown := [version for version in versions if known and version not in known]:
        return (
            f"it was created by another version of Prefect than the one installed here "
            f"(its schema is {unknown[0]!r})"
        )
    return ""


def _known_versions() -> set[str]:
    """Return the database schemas that the installed Prefect knows; none if they are not found."""
    spec = find_spec("prefect")
    if spec is None or spec.origin is None:
        return set()
    folder = (
        Path(spec.origin).parent / "server" / "database" / "_migrations" / "versions" / "sqlite"
    )
    found: set[str] = set()
    with suppress(OSError):
        for path in folder.glob("*.py"):
            found |= set(
                re.findall(
                    r'^revision(?:: \w+)? = "(\w+)"',
                    path.read_text(encoding="utf-8"),
                    flags=re.MULTILINE,
                )
            )
    return found


def _fault_of_database_server(url: str) -> str:
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port or 5432
    except ValueError as error:
        return f"its address is invalid ({error})"
    if host is None:
        return ""
    try:
        socket.create_connection((host, port), timeout=_DATABASE_S).close()
    except OSError as error:
        return f"no server answers at {host}:{port} ({error.strerror or error})"
    return ""


def _drop_unusable_proxies(environ: MutableMapping[str, str], url: Setting | None) -> None:
    """Drop proxies that no client here can use, such as socks5:// without its package.

    Otherwise every client would fail while it is created.

    Raises:
        ConfigError: The server is on another machine, so the proxy may be needed.
    """
    import httpx

    is_here = url is None or urlsplit(url.value).hostname in ("127.0.0.1", "localhost", "::1")
    for name in [
        name
        for name in environ
        if name.lower() in ("all_proxy", "http_proxy", "https_proxy") and environ[name]
    ]:
        try:
            value = environ[name]
            httpx.HTTPTransport(proxy=value if "://" in value else f"http://{value}").close()
        except Exception as error:
            # ImportError, ValueError or httpx.InvalidURL.
            if not is_here:
                raise ConfigError(
                    f"the proxy {value}, set by the environment variable {name}, cannot be used "
                    f"({' '.join(str(error).split())}); unset it, or install what it needs"
                ) from None
            del environ[name]
