"""The Prefect server of a run: the user's, looked at before anything is made, or one of our own for the time of the run."""

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
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from flows.prefect_environment import Setting, UserSettings, choose_home, read_user_settings
from vnp_lib.errors import ConfigError

_PROGRAM = Path(__file__).with_name("server_process.py")
_OWN = "`PREFECT_API_URL= ` (empty) lets the run start a server of its own"
_REQUEST_S = 10.0
_PROBE_S = 14.0  # names are looked up without a limit of their own
_DATABASE_S = 5.0
_START_S = 120.0
_STOP_S = 6.0
_WATCH_S = 0.2
_ASK_S = 10.0
_MOST_SILENT = 3  # questions in a row that get no answer
_MOST_RESTARTS = 3
_LAST_WORDS = 200  # lines of a server that fails
# Of a server on this machine, which is there or gone for good: unless the user has set other limits.
_OWN_SERVER_DEFAULTS = {"PREFECT_CLIENT_MAX_RETRIES": "2", "PREFECT_API_REQUEST_TIMEOUT": "20"}


class PrefectServer:
    """Where the run is recorded."""

    def __init__(self, api_url: str, cleanup: ExitStack) -> None:
        self.api_url = api_url
        self.cleanup = cleanup  # of what has been made for it; done at exit

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as can be told without asking it."""
        return False

    def answers(self) -> bool:
        """Ask for a sign of life; whatever it says is one."""
        import httpx  # here, not above: a command line that cannot be used is answered without it

        try:
            httpx.get(f"{self.api_url}/health", timeout=_REQUEST_S / 3)
        except (httpx.HTTPError, OSError, ImportError, ValueError):
            return False
        return True


class TemporaryServer(PrefectServer):
    """A server of our own. The socket is ours: its port is known before it starts, and stays should it be started again."""

    def __init__(self, database: str, cleanup: ExitStack) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        super().__init__(f"http://127.0.0.1:{self._listener.getsockname()[1]}/api", cleanup)
        cleanup.callback(self.close)
        self._database = database
        self._process: subprocess.Popen[bytes] | None = None
        self._is_wanted = threading.Event()
        self._asked_at = time.monotonic()
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)

    @property
    def is_gone(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """Start it, and do not wait for it."""
        self._last_words.clear()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(self._listener.fileno())],
            stdin=subprocess.PIPE,  # never written to: its end tells the server that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            start_new_session=True,
            env=_server_environment(os.environ),
        )
        threading.Thread(target=self._listen, args=[self._process.stderr], daemon=True).start()

    def _listen(self, stream: Any) -> None:
        for line in stream:
            self._last_words.append(line.decode(errors="replace"))

    def wait(self, limit_s: float) -> None:
        """Wait until it answers.

        Raises:
            ConfigError: It has ended, or does not answer in time.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if readable and self._process.stdout.readline():
            return
        what = "has not started" if readable else f"has not started within {limit_s:g} s"
        self._end_process(_STOP_S)
        raise ConfigError(
            f"Prefect's server {what} with {self._database}: {_reason_of(self._last_words)}; it may be damaged, or of "
            "another version of Prefect: PREFECT_HOME names another directory for one"
        )

    def keep_up(self, tell: Callable[[str], None], limit_s: float) -> None:
        """Start it again, from a thread, where it ends or freezes before it is stopped: killed for want of memory, say.

        Requests wait on our socket meanwhile. One that is lost again and again is given up, and requests are refused at once.
        """
        self._is_wanted.set()
        threading.Thread(target=self._keep_up, args=[tell, limit_s], daemon=True).start()

    def _keep_up(self, tell: Callable[[str], None], limit_s: float) -> None:
        for _ in range(_MOST_RESTARTS):
            self._wait_until_lost()
            if not self._is_wanted.is_set():
                return
            tell(
                "note: Prefect's server of this run was lost, and is started again; the run goes on"
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

    def _wait_until_lost(self) -> None:
        num_silent = 0
        while self._is_wanted.is_set() and not self.is_gone and num_silent < _MOST_SILENT:
            time.sleep(_WATCH_S)
            if time.monotonic() >= self._asked_at + _ASK_S:
                self._asked_at = time.monotonic()
                num_silent = 0 if self.answers() else num_silent + 1

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
        """End it, in any case."""
        self._is_wanted.clear()
        self._end_process(_STOP_S)
        self._listener.close()


def find_prefect(
    tell: Callable[[str], None], *, environ: MutableMapping[str, str] | None = None
) -> PrefectServer:
    """Find the user's Prefect server or start one, and import Prefect with it.

    What is ours of it ends with this process, after what Prefect has registered to be done at exit: it sends its last lines.

    Raises:
        ConfigError: A server cannot be had; nothing has been made by then.
    """
    environ = os.environ if environ is None else environ
    settings = read_user_settings(environ, Path.cwd())
    url = settings.find("PREFECT_API_URL")
    require_server(settings)
    require_certificates(settings)
    home = choose_home(settings, environ, is_needed=url is None)
    cleanup = ExitStack()
    atexit.register(cleanup.close)  # before Prefect is imported: what it registers is done first
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
    """Refuse settings under which there is no server at all."""
    enabled = settings.find(
        "PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"
    )
    if (
        settings.find("PREFECT_API_URL") is None
        and enabled
        and enabled.value.strip().lower() in ("false", "0", "no", "off", "f", "n")
    ):
        raise ConfigError(
            f"there is no Prefect server for this run: PREFECT_API_URL is not set, and a temporary server is switched off by "
            f"{enabled.where}; set PREFECT_API_URL to a server's address, or PREFECT_SERVER_EPHEMERAL_ENABLED=true"
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
    _import_prefect(settings)  # seconds, in which the server starts
    limit = settings.find("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS")
    limit_s = float(limit.value) if limit else _START_S
    server.wait(limit_s)
    server.keep_up(tell, limit_s)
    return server


def _import_prefect(settings: UserSettings) -> None:
    """Import Prefect, which reads its settings meanwhile.

    Raises:
        ConfigError: A setting has a value that Prefect does not take, or Prefect is not whole.
    """
    try:
        with redirect_stderr(
            io.StringIO()
        ):  # the package prints what is wrong; the module below raises it
            import prefect
        import prefect.main  # noqa: F401
    except Exception as error:
        errors = getattr(error, "errors", None)
        faults = (
            [_fault_of(each, settings) for each in errors()]
            if callable(errors)
            else [" ".join(str(error).split())]
        )
        told = "; ".join(faults)
        raise ConfigError(f"Prefect cannot be used with these settings: {told}") from error


def _fault_of(detail: Mapping[str, Any], settings: UserSettings) -> str:
    field = "_".join(str(part) for part in detail["loc"] if isinstance(part, str)).upper()
    found = settings.find_like(field, detail["input"])
    name, where = (found[0], f", set by {found[1].where}") if found else (field.lower(), "")
    return f"{name}={detail['input']!r}{where}: {detail['msg']}"


def require_certificates(settings: UserSettings) -> None:
    """Refuse a file of certificates that is not there: no client can be made with it, whatever server it is for."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "PREFECT_API_SSL_CERT_FILE"):
        if (found := settings.find(name)) and not Path(found.value).exists():
            raise ConfigError(
                f"{name}={found.value}, set by {found.where}, does not exist; correct it or unset it"
            )


def check_standing_server(url: Setting) -> None:
    """Ask a server that the user has named for its version, with Prefect's own client.

    Raises:
        ConfigError: It is not there, is something else, does not let us in, or is of a version that does not fit.
    """
    about = f"Prefect's server at {url.value}, set by {url.where},"
    address = urlsplit(url.value)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(
            f"{about} is no address; it must look like http://host:4200/api, and {_OWN}"
        )
    fault: list[str] = []
    probe = threading.Thread(target=lambda: fault.append(_fault_of_server(url.value)), daemon=True)
    probe.start()
    probe.join(_PROBE_S)
    told = fault[0] if fault else f"does not answer within {_PROBE_S:g} s"
    if told:
        raise ConfigError(f"{about} {told}; start it or correct the address, or {_OWN}")


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
                return _told(client.api_healthcheck())
            version = client.api_version()
    except Exception as error:  # whatever a client may raise, also while it is made
        return _told(error)
    ours = prefect.__version__.split(".")[0]
    if not re.fullmatch(r"\d+\.\d+.*", str(version)):
        return (
            f"does not answer as a Prefect server does, but with the version {str(version)[:40]!r}"
        )
    if version.split(".")[0] != ours:
        return f"is of version {version}, and Prefect here is {prefect.__version__}: install one that fits"
    return ""


def _told(error: Exception | None) -> str:
    """Say what a client's error means for a server's address."""
    import httpx

    match error:
        case None:
            return ""
        case httpx.HTTPStatusError(response=response):
            code = response.status_code
            if code in (401, 403, 407):
                return f"does not let us in ({code}): see to PREFECT_API_KEY or PREFECT_API_AUTH_STRING, or a proxy on the way"
            if code in (404, 405):
                return f"has no Prefect API at this address ({code}); it usually ends with /api"
            return f"answers with an error ({code} {response.reason_phrase})"
        case httpx.TimeoutException():
            return f"does not answer within {_REQUEST_S:g} s"
        case ValueError() if type(error).__name__.endswith("JSONDecodeError"):
            return "answers, but not as a Prefect server does; its address usually ends with /api"
        case httpx.ConnectError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "has a certificate that is not trusted here; see PREFECT_API_SSL_CERT_FILE"
        case httpx.ConnectError() if "SSL" in str(error):
            return "does not speak https; use http://"
        case httpx.HTTPError():
            return f"cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"
        case _:
            return f"cannot be asked ({type(error).__name__}: {' '.join(str(error).split())})"


def check_database(chosen: Setting | None, home: Path) -> None:
    """Look at the database that a server of our own would use.

    Raises:
        ConfigError: It is locked, no database, or of a version of Prefect that is not installed here; or no server answers there.
    """
    url = chosen.value if chosen else f"sqlite:///{home / 'prefect.db'}"
    named = f"the database {url.partition(':///')[2] if url.startswith('sqlite') else _without_password(url)}"
    told = f"{named}, set by {chosen.where}," if chosen else f"{named} in PREFECT_HOME"
    if url.startswith("sqlite"):
        fault = _fault_of_sqlite(Path(unquote(url.partition(":///")[2].partition("?")[0])))
    else:
        fault = _fault_of_database_server(url)
    if fault:
        cure = "correct it or unset it" if chosen else "set PREFECT_HOME to another directory"
        raise ConfigError(f"{told} cannot be used by Prefect's server: {fault}; {cure}")


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
            connection.execute("BEGIN IMMEDIATE")  # and nothing is written: can it be locked?
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
        return f"it is of another version of Prefect than the one installed here (its schema is {unknown[0]!r})"
    return ""


def _known_versions() -> set[str]:
    """The schemas of Prefect's database that the installed one knows; none where they cannot be found."""
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
        return f"it is no address ({error})"
    if host is None:
        return ""
    try:
        socket.create_connection((host, port), timeout=_DATABASE_S).close()
    except OSError as error:
        return f"nobody answers at {host}:{port} ({error.strerror or error})"
    return ""


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//", url)


def _drop_unusable_proxies(environ: MutableMapping[str, str], url: Setting | None) -> None:
    """Drop proxies that no client here can use, such as socks5:// without its package: making one fails, whatever it is for.

    Raises:
        ConfigError: The user's server is on another machine, so that the proxy may be needed.
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
        except Exception as error:  # ImportError, ValueError, httpx.InvalidURL
            if not is_here:
                raise ConfigError(
                    f"the proxy {value}, set by the environment variable {name}, cannot be used "
                    f"({' '.join(str(error).split())}); unset it, or install what it needs"
                ) from None
            del environ[name]


def _server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Give a server our environment, without empty entries of PYTHONPATH, which would be the current directory."""
    ours = dict(environ)
    if "PYTHONPATH" in ours:
        ours["PYTHONPATH"] = os.pathsep.join(
            part for part in ours["PYTHONPATH"].split(os.pathsep) if part
        )
    return ours | {"PREFECT_API_URL": "", "PREFECT_UI_ENABLED": "false", "PYTHONSAFEPATH": "1"}


def _reason_of(lines: deque[str]) -> str:
    """The last exception that a server has told of."""
    told = [
        line.strip()
        for line in lines
        if re.match(r"[\w.]+(Error|Exception|Exit)\b.*", line.strip())
    ]
    return told[-1][:300] if told else "it has not said why"
