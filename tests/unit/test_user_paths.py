"""Paths are read in one way, on a command line, in a form, in a variable or in Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vnp_lib.cli import main
from vnp_lib.config import EmbedConfig
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import ConfigError, ExitCode
from vnp_lib.options import parse_command_line, parse_estimate_command_line
from vnp_lib.user_paths import PathUse, shown, user_inputs, user_path

NOT_UTF8 = os.fsdecode(b"prot\xe9ines")


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)


def touch(name: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).touch()
    return name


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read()
    (line,) = str(caught.value).splitlines()
    return line


class TestOnePath:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("~/runs/mine", "/home/me/runs/mine"),
            ("~", "/home/me"),
            ("~root/x", "/root/x"),
            ("$DATA/x", "/data/x"),
            ("${DATA}_2/x", "/data_2/x"),
            ("$HOME/$DATA", "/home/me//data"),
            ("runs/mine\n", "runs/mine"),
            (" x.fasta\t", "x.fasta"),
            ("x.fasta\r\n", "x.fasta"),
            ("\u00a0x.fasta", "x.fasta"),
            ("file:///data/a%20b.fasta", "/data/a b.fasta"),
            ("file:/x", "/x"),
            ("a~b", "a~b"),
            ("cost$5", "cost$5"),
            ("a:b/c", "a:b/c"),
            ("runs/mine/", "runs/mine"),
            ("with blank.fasta", "with blank.fasta"),
            ("β-lactamase.fasta", "β-lactamase.fasta"),
        ],
    )
    def test_it_is_expanded_as_by_a_shell(self, written: str, meant: str) -> None:
        assert user_path(written) == user_path(Path(written)) == Path(meant)

    @pytest.mark.parametrize(
        "name",
        [
            "~x/y",
            "$ABSENT",
            "x ",
            "'x'",
            "a\nb",
            "https:/h/x",
            "s3:/bucket/x",
            "C:\\x",
            "me@host:x",
            "$DATA",
            "file:/x",
        ],
    )
    def test_an_existing_file_of_that_name_is_meant(self, name: str) -> None:
        """Even if the name looks like something else, and even if it is a dangling link."""
        assert user_path(touch(name)) == Path(name)
        Path(name).unlink()
        Path(name).symlink_to("nowhere")
        assert user_path(name) == Path(name)

    @pytest.mark.parametrize(
        ("written", "message"),
        [
            ("", "'': the path is empty; give one"),
            (" \n", "'': the path is empty"),
            (
                "$ABSENT/x",
                "$ABSENT/x: the environment variable ABSENT is not set; set it, or write",
            ),
            ("${ABSENT}", "${ABSENT}: the environment variable ABSENT is not set"),
            ("$EMPTY/x", "$EMPTY/x: the environment variable EMPTY is not set"),
            ("${ABSENT:-x}", "${ABSENT:-x}: only $NAME and ${NAME} are expanded"),
            (
                "~nobody_here/x",
                "~nobody_here/x: there is no user 'nobody_here' on this machine; write the path",
            ),
            ("a\0b", r"'a\x00b': a path cannot have a NUL character"),
            ("a\nb", r"'a\nb': there is a line break in this path"),
            ("x" * 256, f"{'x' * 40}...: this is too long for the name of a file"),
            ('"x.fasta"', '"x.fasta": there are quotes around this path; remove them'),
            ("\u201cx.fasta\u201d", "\u201cx.fasta\u201d: there are quotes around this path"),
            (r"C:\data\x.fasta", r"C:\data\x.fasta: this is a Windows path"),
            ("c:/data/x.fasta", "c:/data/x.fasta: this is a Windows path"),
            (r"\\server\x", r"\\server\x: this is a Windows path"),
            ("me@host:/x", "me@host:/x: this is on another machine; copy it"),
            ("file://host/x", "file://host/x: addresses are not fetched"),
            (
                NOT_UTF8,
                r"/prot\xe9ines: this name is not UTF-8 text; rename it, or give a link to it",
            ),
        ],
    )
    def test_an_impossible_path_is_refused_in_a_sentence(self, written: str, message: str) -> None:
        assert message in refusal(lambda: user_path(written))

    def test_a_name_that_is_not_utf8_needs_a_link_to_it(self, tmp_path: Path) -> None:
        """It could neither be recorded nor be a parameter of a flow."""
        directory = Path(NOT_UTF8)
        directory.mkdir()
        Path("link").symlink_to(directory)
        assert "not UTF-8" in refusal(lambda: user_path(directory / "x.fasta"))
        assert user_path("link/x.fasta") == Path("link/x.fasta")
        # A run directory is recorded by the path that has no links in it.
        for use in (PathUse.OUTPUT, PathUse.RUN):
            assert refusal(lambda use=use: user_path("link/run", use)) == (
                rf"{tmp_path}/prot\xe9ines/run: this name is not UTF-8 text; rename it"
            )

    def test_a_relative_path_below_a_name_not_utf8_is_refused(self, monkeypatch) -> None:
        Path(NOT_UTF8).mkdir()
        monkeypatch.chdir(NOT_UTF8)
        assert r"prot\xe9ines/out: this name is not UTF-8" in refusal(
            lambda: user_path("out", PathUse.OUTPUT)
        )

    def test_a_removed_current_directory_is_reported(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert refusal(lambda: user_path("x")).startswith("x: the current directory was removed")

    def test_an_unknown_home_is_reported(self, monkeypatch) -> None:
        # As without HOME and without an entry in passwd.
        monkeypatch.setattr(os.path, "expanduser", lambda text: text)
        assert refusal(lambda: user_path("~/x")) == "~/x: HOME is not set; write the path in full"

    def test_a_path_is_shown_as_text_whatever_its_bytes(self) -> None:
        assert shown(NOT_UTF8) == r"prot\xe9ines"
        assert shown(Path("β")) == "β"


@pytest.mark.parametrize("collapse", [str, Path], ids=["text", "Path"])
@pytest.mark.parametrize(
    ("address", "command"),
    [
        (
            "https://host/stream?format=fasta&query=x",
            "`curl --location 'https://host/stream?format=fasta&query=x' | python",
        ),
        ("HTTP://host/x.fasta", "`curl --location HTTP://host/x.fasta | python"),
        ("ftp://host/x.fasta.gz", "`curl --location ftp://host/x.fasta.gz | python"),
        ("s3://bucket/x.fasta", "`aws s3 cp s3://bucket/x.fasta - | python"),
        ("gs://bucket/x.fasta", "`gcloud storage cat gs://bucket/x.fasta | python"),
        ("az://container/x.fasta", "download it, and give the path"),
        ("hf://datasets/a/x.fasta", "download it, and give the path"),
    ],
)
def test_an_address_is_refused_with_a_command_to_fetch_it(collapse, address, command) -> None:
    """Also if `Path` has collapsed two slashes into one."""
    message = refusal(lambda: user_inputs(collapse(address)))
    assert message.startswith(f"{address}: addresses are not fetched; ")
    assert command in message
    assert "--fasta" not in refusal(lambda: user_path(collapse(address)))
    assert "addresses are not written to; give a directory" in refusal(
        lambda: user_path(collapse(address), PathUse.OUTPUT)
    )
    assert "weights are not fetched" in refusal(
        lambda: user_path(collapse(address), PathUse.WEIGHTS)
    )


class TestSeveralPaths:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("a.fa,b.fa", ["a.fa", "b.fa"]),
            (" a.fa , ~/b.fa,$DATA/c.fa", ["a.fa", "/home/me/b.fa", "/data/c.fa"]),
            ("a.fa,-", ["a.fa", "-"]),
            ("/dev/stdin", ["-"]),
            ('["a,1.fa", "b.fa"]', ["a,1.fa", "b.fa"]),
            ("[ab].fa", ["[ab].fa"]),
            (["a,b.fa", "c.fa"], ["a,b.fa", "c.fa"]),
            ([Path("~/a"), "-"], ["/home/me/a", "-"]),
            (Path("x.fa"), ["x.fa"]),
        ],
    )
    def test_a_text_is_split_at_commas(self, written: Any, meant: list[str]) -> None:
        assert user_inputs(written) == tuple(map(Path, meant))

    @pytest.mark.parametrize(
        ("existing", "written", "meant"),
        [
            (["a,b.fasta"], "a,b.fasta", ["a,b.fasta"]),
            (["a,b.fasta"], "a,b.fasta,c.fasta", ["a,b.fasta", "c.fasta"]),
            (["b,c.fa"], "a,b,c.fa", ["a", "b,c.fa"]),
            (["a,b.fa", "c,d.fa"], "a,b.fa, c,d.fa", ["a,b.fa", "c,d.fa"]),
            (["a", "b", "a,b"], "a,b", ["a,b"]),
            (["d,e/x.fa"], "d,e/*.fa,y.fa", ["d,e/*.fa", "y.fa"]),
            (["x1.fa"], "x[0,1].fa", ["x[0,1].fa"]),
            (["x,1.fa", "x,2.fa"], "x,?.fa", ["x,?.fa"]),
            (
                [",".join("abcdefghijklmno")],
                "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o",
                ["a,b,c,d,e,f,g,h,i,j,k,l,m,n,o"],
            ),
        ],
    )
    def test_a_name_with_a_comma_is_preferred(
        self, existing: list[str], written: str, meant: list[str]
    ) -> None:
        for name in existing:
            touch(name)
        assert user_inputs(written) == tuple(map(Path, meant))

    @pytest.mark.parametrize("written", ["a,,b", ",a", "a,", "a, ,b"])
    def test_nothing_between_commas_is_refused(self, written: str) -> None:
        """An empty path would be the current directory."""
        assert refusal(lambda: user_inputs(written)).startswith(
            f"{written}: there is nothing before, after or between"
        )

    def test_an_empty_text_is_refused(self) -> None:
        assert "the path is empty" in refusal(lambda: user_inputs(""))


def as_options(name: str, value: str) -> EmbedConfig:
    return parse_command_line([f"--{name.replace('_', '-')}", value])


def as_variables(name: str, value: str) -> EmbedConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"VNP_{name.upper()}", value)
        return parse_command_line([])


def as_flow_parameter(name: str, value: str) -> EmbedConfig:
    given = {
        "fasta": os.environ["VNP_FASTA"].split(","),
        "output_dir": os.environ["VNP_OUTPUT_DIR"],
    }
    return EmbedConfig.model_validate(given | {name: [value] if name == "fasta" else value})


def as_plan(name: str, value: str) -> EmbedConfig:
    return parse_estimate_command_line([f"--{name.replace('_', '-')}", value])


@pytest.fixture
def _needed(monkeypatch):
    monkeypatch.setenv("VNP_FASTA", "in.fasta")
    monkeypatch.setenv("VNP_OUTPUT_DIR", "out")


@pytest.mark.usefixtures("_needed")
@pytest.mark.parametrize("parse", [as_options, as_variables, as_flow_parameter, as_plan])
@pytest.mark.parametrize("name", ["fasta", "output_dir", "weights"])
class TestSettings:
    def test_home_is_expanded(self, parse, name) -> None:
        found = getattr(parse(name, "~/x"), name)
        assert (
            found
            == {
                "fasta": (Path("/home/me/x"),),
                "output_dir": Path("/home/me/x"),
                "weights": "/home/me/x",
            }[name]
        )

    def test_an_address_is_refused(self, parse, name) -> None:
        with pytest.raises(ValueError if parse == as_flow_parameter else ConfigError) as caught:
            parse(name, "s3://bucket/x")
        assert "s3://bucket/x: " in str(caught.value)
        if parse != as_flow_parameter:
            assert str(caught.value).startswith(f"--{name.replace('_', '-')} s3://bucket/x: ")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parse", [parse_command_line, parse_estimate_command_line])
def test_a_pattern_expanded_by_the_shell_is_refused(parse) -> None:
    files = [touch(f"{name}.faa") for name in "abcde"]
    assert refusal(lambda: parse(["--fasta", *files, "--output-dir", "out"])) == (
        "b.faa, c.faa, d.faa and 1 more: these paths belong to no option; quote a pattern, as in "
        "--fasta 'x/*.faa', so that the shell does not expand it, or separate several files "
        "with commas"
    )


@pytest.mark.usefixtures("_needed")
def test_speed_of_is_a_path_like_any() -> None:
    assert parse_estimate_command_line(["--speed-of", "~/x"]).speed_of == Path("/home/me/x")


@pytest.mark.usefixtures("_needed")
def test_settings_survive_json() -> None:
    config = EmbedConfig(fasta=("~/a,b.fa", "$DATA/*.fa"), output_dir="~/run", weights="~/w.pt")
    assert EmbedConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.usefixtures("_needed")
@pytest.mark.parametrize("weights", ["auto", "random", " random "])
def test_auto_and_random_are_not_paths(weights: str) -> None:
    touch("random")
    assert as_flow_parameter("weights", weights).weights == weights.strip()


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["verify"],
        ["report"],
        ["export", "--to", "npz"],
    ],
)
@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        (
            "s3://bucket/run",
            "s3://bucket/run: addresses are not read; give a directory on a disk of this machine",
        ),
        ("$ABSENT/run", "$ABSENT/run: the environment variable ABSENT is not set"),
        ("~/nowhere", "/home/me/nowhere is not a run directory: there is no such directory"),
        ("file", "file is not a run directory: it is a file"),
    ],
)
def test_a_command_reports_an_unusable_run_directory(command, run_dir, message, capsys) -> None:
    touch("file")
    assert main([*command, run_dir]) == ExitCode.UNUSABLE_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_dataset_is_opened_by_a_user_path() -> None:
    assert "addresses are not read" in refusal(lambda: open_dataset("https://host/run"))
    assert "ABSENT is not set" in refusal(lambda: open_dataset("$ABSENT"))
