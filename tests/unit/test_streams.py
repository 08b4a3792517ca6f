"""Output that is only shown: whatever happens to its reader, the program continues."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers import EXAMPLE, ROOT
from vnp_lib.report.progress import RunProgress
from vnp_lib.streams import best_effort, output_error, standard_streams
from vnp_lib.terminal import error_console

HEADS = (
    "-c",
    "import sys; from vnp_lib.cli import main; "
    "sys.exit(main(['plan', '--fasta', sys.argv[1], '--shards', '1']))",
)


def opened(path: str | int, encoding: str = "utf-8") -> io.TextIOWrapper:
    return open(path, "w", encoding=encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_characters_that_an_encoding_lacks_are_escaped(tmp_path, encoding):
    """As in a Python string: nothing is lost, and nothing raises."""
    path = tmp_path / "out"
    with opened(path, encoding) as file:
        best_effort(file).write("β-lact_é \udc80█\n")
    text = path.read_bytes().decode(encoding)
    assert text == "β-lact_é \udc80█\n".encode(encoding, "backslashreplace").decode(encoding)
    assert text.endswith("\n")


def test_a_full_disk_is_remembered_and_does_not_raise():
    with opened("/dev/full") as full:
        stream = best_effort(full)
        assert stream.write("lost\n") == 5
        assert "No space" in str(stream.error)


def test_a_disk_with_room_again_is_written_to_again(tmp_path):
    """Lost text stays lost, and does not appear at exit."""
    file = opened(tmp_path / "out")
    stream = best_effort(file)
    room = os.dup(file.fileno())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file.fileno())
        stream.write("lost\n")
    os.dup2(room, file.fileno())
    os.close(room)
    stream.write("kept\n")
    file.close()
    assert (tmp_path / "out").read_text() == "kept\n"


def test_a_reader_that_is_gone_does_not_raise():
    reader, writer = os.pipe()
    os.close(reader)
    with opened(writer) as file:
        stream = best_effort(file)
        stream.write("unheard\n")
        assert isinstance(stream.error, BrokenPipeError)


def test_a_paused_reader_loses_text_and_costs_no_time():
    """A pager that waits for a key: what does not fit into the pipe is dropped after one wait."""
    reader, writer = os.pipe()
    with opened(writer) as file:
        stream = best_effort(file, patience_s=0.01)
        finished = threading.Thread(
            target=lambda: [stream.write("x" * 1000 + "\n") for _ in range(1000)], daemon=True
        )
        finished.start()
        finished.join(30)
        assert not finished.is_alive()
        assert len(os.read(reader, 1_000_000)) >= 4096
        stream.write("heard again\n")
        assert os.read(reader, 100) == b"heard again\n"
    os.close(reader)


def test_a_slow_reader_gets_everything_without_patience():
    reader, writer = os.pipe()
    got = []

    def read() -> None:
        while data := os.read(reader, 1000):
            got.append(data)

    slow = threading.Thread(target=read)
    slow.start()
    with opened(writer) as file:
        best_effort(file).write("x" * 300_000)
    slow.join(30)
    os.close(reader)
    assert b"".join(got) == b"x" * 300_000


def test_a_replaced_stream_is_written_by_its_own_method():
    """Notebooks and pytest replace the standard streams."""
    text = io.StringIO()
    best_effort(text).write("é")
    assert text.getvalue() == "é"


@pytest.mark.parametrize("stream", ["full", "closed", "none", "pipe"])
@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_of_a_run_never_fails(monkeypatch, stream, terminal):
    """Whatever standard error is, and whether it is taken for a terminal or not."""
    if stream == "full":
        file = opened("/dev/full")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        file = opened(writer)
    if stream == "closed":
        file.close()
    monkeypatch.setattr(sys, "stderr", None if stream == "none" else file)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    with (
        closing(file),
        RunProgress(total_sequences=2, total_tokens=20, log_interval_s=0.0) as progress,
    ):
        progress.begin(0, sequences=0, tokens=0)
        progress.advance(0, sequences=1, tokens=10)
    assert progress.describe().startswith("1 of 2 sequences")


@pytest.mark.parametrize("columns", ["0", "1", "20", "", "wide"])
def test_the_bar_can_be_drawn_on_any_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunProgress(total_sequences=2, total_tokens=20, console=error_console()) as progress:
        progress.advance(0, sequences=1, tokens=10)


def test_only_a_closed_pipe_is_no_error_of_standard_output(monkeypatch):
    with opened("/dev/full") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with standard_streams():
            print("lost")
            assert "No space" in str(output_error())
    reader, writer = os.pipe()
    os.close(reader)
    with opened(writer) as file:
        monkeypatch.setattr(sys, "stdout", file)
        with standard_streams():
            print("unheard")
            assert output_error() is None


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which `$VNP` is `vnp plan` of the example."""
    arguments = " ".join(f"'{part}'" for part in (sys.executable, *HEADS, str(EXAMPLE)))
    arguments = arguments.replace(f"'{HEADS[1]}'", '"$CODE"')
    line = f"vnp() {{ {arguments}; }}; {command}"
    environment = os.environ | {"CODE": HEADS[1]} | variables
    return subprocess.run(
        ["bash", "-c", line],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("vnp | head -1 >/dev/null; exit ${PIPESTATUS[0]}", 0, b""),
        ("vnp >&- 2>&-", 0, b""),
        ("vnp >/dev/full", 1, b"standard output cannot be written: No space left on device\n"),
    ],
)
def test_the_reader_of_the_output_may_be_gone(command, code, message):
    """`| head`, `>&-`, a full disk: no traceback, and an error only if output was lost."""
    ended = shell(command, PYTHONDEVMODE="")
    assert (ended.returncode, ended.stderr) == (code, message)


def test_bars_are_drawn_with_characters_of_the_encoding(tmp_path: Path):
    """And everything fits into 40 columns."""
    ended = shell("vnp", PYTHONIOENCODING="ascii", COLUMNS="40")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.decode("ascii").splitlines()
    assert any("###" in line for line in lines)
    assert max(map(len, lines)) <= 40
