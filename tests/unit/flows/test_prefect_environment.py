"""What a run needs before Prefect is imported: settings, a home, a server."""

from __future__ import annotations

import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from websockets.proxy import get_proxy
from websockets.uri import parse_uri

from flows import prefect_server
from flows.prefect_environment import (
    Setting,
    choose_home,
    prepare_environment,
    reach_loopback_past_proxies,
    read_user_settings,
)
from flows.prefect_server import (
    check_database,
    check_standing_server,
    require_certificates,
    require_server,
)
from vnp_lib.errors import ConfigError

HOME = {"HOME": "/nowhere"}
CLOSED = "http://127.0.0.1:9/api"  # no server listens there


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_run_gets_what_it_needs_from_every_directory(tmp_path):
    environ = dict(HOME)
    prepare_environment(environ, tmp_path)
    assert environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environ["DO_NOT_TRACK"] == "1"
    assert environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "120"
    # Only the server and the worker processes get it, from those who start them: a program that
    # imports a flow decides what its own subprocesses import.
    assert "PYTHONSAFEPATH" not in environ
    assert "127.0.0.1" in environ["no_proxy"]


@pytest.mark.parametrize(
    "place", ["environment", "lower case", ".env", "prefect.toml", "pyproject.toml", "profile"]
)
def test_settings_of_the_user_stay(tmp_path, place):
    """In any place where Prefect reads settings, and in the order of precedence."""
    environ = {"PREFECT_HOME": str(tmp_path / "home")}
    name, value = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "7"
    match place:
        case "environment":
            environ[name] = value
        case "lower case":
            environ[name.lower()] = value
        case ".env":
            write(tmp_path / ".env", f"{name}={value}\n")
        case "prefect.toml":
            write(
                tmp_path / "prefect.toml",
                f"[server.ephemeral]\nstartup_timeout_seconds = {value}\n",
            )
        case "pyproject.toml":
            write(
                tmp_path / "pyproject.toml",
                f"[tool.prefect.server.ephemeral]\nstartup_timeout_seconds = {value}\n",
            )
        case "profile":
            write(
                tmp_path / "home" / "profiles.toml",
                f"active = 'mine'\n[profiles.mine]\n{name} = '{value}'\n",
            )
    before = dict(environ)
    prepare_environment(environ, tmp_path)
    assert name not in environ or environ[name] == before.get(name)
    found = read_user_settings(environ, tmp_path).find(name)
    assert found is not None
    assert found.value == value
    assert ("mine" in found.where) == (place == "profile")


def test_analytics_that_the_user_wants_are_left_on(tmp_path):
    environ = HOME | {"PREFECT_SERVER_ANALYTICS_ENABLED": "true"}
    prepare_environment(environ, tmp_path)
    assert environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "true"
    assert "DO_NOT_TRACK" not in environ


def test_an_empty_variable_overrides_a_profile(tmp_path):
    """As error messages advise."""
    write(tmp_path / "profiles.toml", f"active = 'a'\n[profiles.a]\nPREFECT_API_URL = '{CLOSED}'\n")
    environ = {"PREFECT_HOME": str(tmp_path)}
    assert read_user_settings(environ, tmp_path).find("PREFECT_API_URL") is not None
    assert (
        read_user_settings(environ | {"PREFECT_API_URL": ""}, tmp_path).find("PREFECT_API_URL")
        is None
    )


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("profiles.toml", "active = 'x\n[", "profiles.toml"),
        ("profiles.toml", "active = 'gone'\n[profiles.a]\n", "profile 'gone'"),
        ("prefect.toml", "[server", "prefect.toml"),
        ("pyproject.toml", "[tool.prefect\n", "pyproject.toml"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path, file, text, words):
    path = write(tmp_path / file, text)
    with pytest.raises(ConfigError, match=words) as raised:
        read_user_settings({"PREFECT_HOME": str(tmp_path)}, tmp_path)
    assert str(path.parent) in str(raised.value)
    assert "\n" not in str(raised.value)
    # Importing the flow raises no error.
    prepare_environment({"PREFECT_HOME": str(tmp_path)}, tmp_path)


@pytest.mark.parametrize("profile", ["ephemeral", "local", "cloud", "test"])
def test_prefects_own_profiles_need_no_file(tmp_path, profile):
    assert (
        read_user_settings(
            {"PREFECT_PROFILE": profile, "PREFECT_HOME": str(tmp_path)}, tmp_path
        ).find("X")
        is None
    )


@pytest.mark.parametrize(
    "without",
    [
        {},
        {"NO_PROXY": "a.org, b.org"},
        {"no_proxy": "a.org"},
        {"no_proxy": "", "NO_PROXY": "b.org"},
    ],
)
@pytest.mark.parametrize(
    "name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_no_proxy_is_used_for_this_machine(monkeypatch, without, name, host):
    """By Prefect's clients of HTTP and web sockets; hosts that the user has excluded stay so."""
    for each in [each for each in os.environ if each.lower().endswith("_proxy")]:
        monkeypatch.delenv(each)
    environ = without | {name: "http://127.0.0.1:3999"}
    reach_loopback_past_proxies(environ)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    client = httpx.Client()
    assert client._transport_for_url(httpx.URL(f"http://{host}:4200/api")) is client._transport
    assert get_proxy(parse_uri(f"ws://{host}:4200/api")) is None
    assert {part.strip() for value in without.values() for part in value.split(",")} <= {
        "",
        *environ["no_proxy"].split(","),
    }
    assert environ["no_proxy"] == environ["NO_PROXY"]


def test_an_unusable_proxy_is_dropped_for_a_local_server():
    """For SOCKS without its package, a client could not even be created."""
    environ = {
        "all_proxy": "socks5://127.0.0.1:3",
        "HTTP_PROXY": "foo://x",
        "https_proxy": "http://proxy:3128",
    }
    prefect_server._drop_unusable_proxies(environ, None)
    assert environ == {"https_proxy": "http://proxy:3128"}
    elsewhere = Setting(value="http://far.example/api", where="x")
    with pytest.raises(ConfigError, match="all_proxy"):
        prefect_server._drop_unusable_proxies({"all_proxy": "socks5://127.0.0.1:3"}, elsewhere)


def settings_of(tmp_path: Path, **variables: str):
    return read_user_settings({"PREFECT_HOME": str(tmp_path / "home")} | variables, tmp_path)


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/none", "/dev/full"])
def test_an_unusable_home_is_refused_by_name(tmp_path, home):
    write(tmp_path / "file", "")
    chosen = home if home.startswith("/") else str(tmp_path / home)
    settings = read_user_settings({"PREFECT_HOME": chosen}, tmp_path)
    with pytest.raises(ConfigError, match="environment variable PREFECT_HOME") as raised:
        choose_home(settings, {}, is_needed=True)
    assert chosen in str(raised.value)


def test_a_home_is_checked_but_not_created(tmp_path):
    home = choose_home(settings_of(tmp_path), {}, is_needed=True)
    assert home.path == tmp_path / "home"
    assert not home.is_temporary
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_home(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.prefect_environment._NEEDED_BYTES", 1 << 62)
    with pytest.raises(ConfigError, match="No space left"):
        choose_home(settings_of(tmp_path), {}, is_needed=True)


@pytest.mark.parametrize("kind", ["is a file", "is nowhere"])
def test_without_a_home_a_temporary_one_is_created(tmp_path, monkeypatch, kind):
    """A notice names it, and HOME is set, so that Prefect can be imported."""
    monkeypatch.setenv("HOME", str(write(tmp_path / "file", "")))
    if kind == "is nowhere":
        monkeypatch.setattr(
            Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home")))
        )
    environ: dict[str, str] = {}
    home = choose_home(read_user_settings({}, tmp_path), environ, is_needed=True)
    assert home.is_temporary
    assert home.path.is_dir()
    assert str(home.path) in home.notice
    assert environ["PREFECT_HOME"] == str(home.path)
    assert ("HOME" in environ) == (kind == "is nowhere")
    home.path.rmdir()


@pytest.mark.parametrize(
    "name", ["PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"]
)
def test_no_server_at_all_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"environment variable {name}"):
        require_server(settings_of(tmp_path, **{name: "False"}))
    require_server(settings_of(tmp_path, **{name: "true"}))
    require_server(settings_of(tmp_path, **{name: "false", "PREFECT_API_URL": CLOSED}))


def test_certificates_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"SSL_CERT_FILE=/none\.pem"):
        require_certificates(settings_of(tmp_path, SSL_CERT_FILE="/none.pem"))


class Answers(http.server.BaseHTTPRequestHandler):
    """Respond to `/200/TEXT/...` with the status 200 and TEXT."""

    def do_GET(self) -> None:
        _, status, text, *_ = unquote(self.path).split("/")
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def answering() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (CLOSED, "Connection refused"),
        ("http://{}/200/<html>", "is not a Prefect server"),
        ("http://{}/200/null", "is not a Prefect server"),
        ("http://{}/200/%22ok%22", "the version 'ok'"),
        ("http://{}/401/no", "PREFECT_API_AUTH_STRING"),
        ("http://{}/403/no", "denies access"),
        ("http://{}/404/no", "usually ends with /api"),
        ("http://{}/500/no", "500 Internal Server Error"),
        ('http://{}/200/"2.20.1"', "version 2.20.1"),
        ("https://{}/200/x", "does not speak https"),
        ("http://no.such.host.invalid/api", "cannot be reached"),
        ("127.0.0.1:4200/api", "has no valid address"),
        ("ftp://127.0.0.1/api", "has no valid address"),
        ("http://127.0.0.1:port/api", "Invalid port"),
        ("https://api.prefect.cloud/api/accounts/a/workspaces/b", "PREFECT_API_KEY"),
    ],
)
def test_an_unusable_server_is_named_with_its_setting(answering, address, words):
    url = Setting(value=address.format(answering), where="profile 'cloud' in /home/u")
    with pytest.raises(ConfigError, match=words) as raised:
        check_standing_server(url)
    message = str(raised.value)
    assert url.value in message
    assert url.where in message
    assert "\n" not in message


def test_a_hanging_server_is_refused_soon(monkeypatch):
    monkeypatch.setattr(prefect_server, "_REQUEST_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ConfigError, match="does not answer"),
    ):
        check_standing_server(
            Setting(value=f"http://127.0.0.1:{server.getsockname()[1]}/api", where="x")
        )


@pytest.mark.parametrize("version", ['"3.8.8"', '"3.9.1"', '"3.0.0"'])
def test_a_server_of_the_same_major_version_is_accepted(answering, version):
    check_standing_server(Setting(value=f"http://{answering}/200/{version}", where="x"))


def database(home: Path, version: str) -> sqlite3.Connection:
    home.mkdir()
    connection = sqlite3.connect(home / "prefect.db", isolation_level=None)
    connection.execute("CREATE TABLE alembic_version (version_num)")
    connection.execute("INSERT INTO alembic_version VALUES (?)", [version])
    return connection


def test_a_database_of_another_version_is_refused(tmp_path):
    database(tmp_path / "home", "0123456789ab").close()
    with pytest.raises(ConfigError, match="another version of Prefect") as raised:
        check_database(None, tmp_path / "home")
    assert str(tmp_path / "home" / "prefect.db") in str(raised.value)


def test_databases_of_prefect_and_new_ones_are_accepted(tmp_path):
    check_database(None, tmp_path / "none")
    database(tmp_path / "home", "5b0bd3b41a23").close()
    check_database(None, tmp_path / "home")
    write(tmp_path / "empty" / "prefect.db", "")
    check_database(None, tmp_path / "empty")
    check_database(Setting(value="sqlite+aiosqlite:///:memory:", where="x"), tmp_path)


def test_a_locked_database_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prefect_server, "_DATABASE_S", 0.1)
    connection = database(tmp_path / "home", "5b0bd3b41a23")
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigError, match="locked by another process"):
        check_database(None, tmp_path / "home")
    connection.close()


def test_another_kind_of_file_is_refused(tmp_path):
    write(tmp_path / "prefect.db", "no database " * 100)
    with pytest.raises(ConfigError, match="not a database"):
        check_database(None, tmp_path)


def test_a_missing_database_server_is_named_without_password():
    with pytest.raises(ConfigError, match=r"no server answers at 127\.0\.0\.1:9") as raised:
        check_database(
            Setting(value="postgresql+asyncpg://user:secret@127.0.0.1:9/prefect", where="x"),
            Path("/"),
        )
    assert "secret" not in str(raised.value)


def embed(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `vnp-embed` on one protein in another directory."""
    write(tmp_path / "in.fasta", ">a\nMKVLATTWQERS\n")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "VNP_"))
    }
    code = "import sys; from flows.program import main; sys.exit(main())"
    arguments = [
        "--fasta",
        "in.fasta",
        "--output-dir",
        "out",
        "--model",
        "esm2_t6_8M_UR50D",
        "--weights",
        "random",
        "--devices",
        "cpu",
    ]
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=environment | {"PREFECT_HOME": str(tmp_path / "home")} | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PREFECT_API_URL": CLOSED}, "Connection refused"),
        (
            {"PREFECT_API_REQUEST_TIMEOUT": "soon"},
            "PREFECT_API_REQUEST_TIMEOUT='soon', set by the environment",
        ),
    ],
)
def test_a_failed_start_prints_one_line_and_creates_nothing(tmp_path, variables, words):
    ended = embed(tmp_path, **variables)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert not (tmp_path / "out").exists()
