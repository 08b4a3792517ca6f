"""Settings by option, variable and flow parameter, and the devices that they name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from vnp_lib import config, devices
from vnp_lib.cli import main
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.devices import resolve_devices
from vnp_lib.environment import viral_checkpoint_mode, worker_environment
from vnp_lib.errors import ConfigError
from vnp_lib.model.esm2 import MODELS
from vnp_lib.options import EstimateConfig, parse_command_line, parse_estimate_command_line
from vnp_lib.plan.outputs import OutputKind, StoreDtype

SMALLEST = "esm2_t6_8M_UR50D"

NEEDED = ("--fasta", "in.fasta", "--output-dir", "out")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VNP_")]:
        monkeypatch.delenv(name)


def test_the_defaults_are_those_of_a_real_run():
    config = parse_command_line(NEEDED)
    assert (config.model, config.weights, config.devices) == ("esm2_t36_3B_UR50D", "auto", "auto")


def test_options_variables_and_parameters_are_equivalent(monkeypatch):
    by_options = parse_command_line(
        [
            *NEEDED,
            "--token-budget",
            "512",
            "--shards",
            "3",
            "--force-restart",
            "--runtime.grace-s",
            "5",
        ]
    )
    for name, value in {
        "FASTA": "in.fasta",
        "OUTPUT_DIR": "out",
        "TOKEN_BUDGET": "512",
        "SHARDS": "3",
        "FORCE_RESTART": "true",
        "RUNTIME__GRACE_S": "5",
    }.items():
        monkeypatch.setenv(f"VNP_{name}", value)
    by_variables = parse_command_line([])
    by_parameter = EmbedConfig.model_validate(
        {
            "fasta": ["in.fasta"],
            "output_dir": "out",
            "token_budget": 512,
            "shards": 3,
            "force_restart": True,
            "runtime": {"grace_s": 5},
        }
    )
    assert by_options == by_variables == by_parameter


def test_an_option_wins_over_a_variable(monkeypatch):
    monkeypatch.setenv("VNP_SHARDS", "7")
    assert parse_command_line([*NEEDED, "--shards", "2"]).shards == 2


@pytest.mark.parametrize(
    ("choices", "defined"),
    [
        (config.OutputName, OutputKind),
        (config.StoreDtypeName, StoreDtype),
        (config.ModelName, MODELS),
    ],
    ids=["outputs", "store_dtypes", "models"],
)
def test_choices_are_those_of_the_rooms(choices, defined):
    """`config` is below the rooms and cannot import them, so it repeats what they define."""
    assert get_args(choices) == tuple(defined)


@pytest.mark.parametrize(
    ("given", "layers"),
    [("6", (6,)), ("-1", (-1,)), ("0,6", (0, 6))],
    ids=["one", "negative", "several"],
)
def test_layers_and_outputs_are_lists_with_commas(given, layers):
    config = parse_command_line([*NEEDED, "--include", "mean,per_tok", f"--repr-layers={given}"])
    assert (config.include, config.repr_layers) == (("mean", "per_tok"), layers)
    assert EmbedConfig(fasta=("a",), output_dir="b", repr_layers=layers).repr_layers == layers


def test_an_unknown_output_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"--include: input should be 'mean', .* or 'logits'; it was 'median'"
    ):
        parse_command_line([*NEEDED, "--include", "median"])


def test_the_flows_parameter_does_not_read_the_environment(monkeypatch):
    """Otherwise the environment of a worker would set what was left open in the UI."""
    monkeypatch.setenv("VNP_SHARDS", "7")
    assert EmbedConfig(fasta=(Path("a"),), output_dir=Path("b")).shards is None


def test_several_fasta_files_by_comma_or_repeated_option():
    expected = (Path("a.fa"), Path("b.fa.gz"))
    assert parse_command_line(["--fasta", "a.fa,b.fa.gz", "--output-dir", "out"]).fasta == expected
    assert (
        parse_command_line(["--fasta", "a.fa", "--fasta", "b.fa.gz", "--output-dir", "out"]).fasta
        == expected
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--fasta is required", "--output-dir is required"]),
        ([*NEEDED, "--model", "esm3"], ["--model", "esm2_t6_8M_UR50D", "esm3"]),
        ([*NEEDED, "--token-budget", "-3"], ["--token-budget", "-3"]),
        ([*NEEDED, "--shards", "many"], ["--shards", "many"]),
        ([*NEEDED, "--devices", "gpu0"], ["--devices", "gpu0"]),
        ([*NEEDED, "--metrics-port", "70000"], ["--metrics-port", "65535", "70000"]),
        ([*NEEDED, "--metrics-address", "localhost"], ["--metrics-address", "IPv4", "localhost"]),
        (
            [*NEEDED, "--runtime.checkpoint-time-threshold", "600"],
            ["--runtime.checkpoint-time-threshold", "600"],
        ),
    ],
)
def test_an_invalid_value_is_named_with_its_option(arguments, words):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_help_has_no_python_types(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--fasta FILES" in text
    assert "VNP_TOKEN_BUDGET" in text
    assert "tuple[" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("parse", "settings"),
    [(parse_command_line, EmbedConfig), (parse_estimate_command_line, EstimateConfig)],
)
def test_help_names_what_a_number_counts(parse, settings, capsys, monkeypatch):
    """A number is SECONDS if the title in Prefect's form has the unit, and N otherwise."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = dict(re.findall(r"^  --(\S+) ([A-Z]+)\b", capsys.readouterr().out, re.MULTILINE))
    numbers = titles_of_numbers(settings) | titles_of_numbers(RuntimeConfig, "runtime.")
    assert "runtime.grace_s" in numbers
    for name, title in numbers.items():
        assert shown[name.replace("_", "-")] == ("SECONDS" if title.endswith("(s)") else "N"), name


def titles_of_numbers(settings, prefix=""):
    properties = settings.model_json_schema()["properties"]
    numbers = {
        name
        for name, field in settings.model_fields.items()
        if {int, float} & {field.annotation, *get_args(field.annotation)}
    }
    return {prefix + name: properties[name]["title"] for name in numbers}


@pytest.mark.parametrize(
    "command", ["status", "export", "report", "esm-extract", "verify", "verify-model"]
)
def test_help_of_a_command_names_the_kind_of_value(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = re.findall(r"^  --[\w-]+ \[?([A-Z_]+)\b", capsys.readouterr().out, re.MULTILINE)
    assert set(shown) <= {"N", "SECONDS", "TEXT", "PATH", "FORMAT", "DTYPE", "NAME"}


def test_usage_shows_the_required_options(capsys):
    for parse, usage in (
        (
            parse_command_line,
            "usage: python flows/embed.py --fasta FILES --output-dir DIR [options]",
        ),
        (parse_estimate_command_line, "usage: vnp plan --fasta FILES [options]"),
    ):
        with pytest.raises(SystemExit):
            parse(["--help"])
        assert capsys.readouterr().out.splitlines()[0] == usage


def test_descriptions_suit_prefects_form():
    """The form has the same descriptions as `--help`, and no options."""
    described = json.dumps(EmbedConfig.model_json_schema())
    assert "--" not in described


def test_settings_are_frozen_and_refuse_other_fields():
    config = parse_command_line(NEEDED)
    with pytest.raises(ValidationError):
        config.shards = 3
    with pytest.raises(ValidationError, match="typo"):
        EmbedConfig(fasta=(Path("a"),), output_dir=Path("b"), typo=1)


def test_devices_by_name():
    assert resolve_devices("cpu", SMALLEST) == ("cpu",)
    assert resolve_devices("cpu,cpu", SMALLEST) == ("cpu", "cpu")


def test_without_a_gpu_the_cpu_workers_are_the_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(devices, "num_cpu_workers", {SMALLEST: 3}.get)
    assert resolve_devices("auto", SMALLEST) == ("cpu", "cpu", "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_devices("auto", SMALLEST) == ("0", "1")


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"there is no GPU 98, 99"):
        resolve_devices("98,99", SMALLEST)


@pytest.mark.parametrize(
    ("mask", "device", "seen"),
    [(None, "1", "1"), ("2,3", "1", "3"), ("GPU-abc, GPU-def", "0", "GPU-abc"), ("0,1", "cpu", "")],
)
def test_a_worker_sees_one_gpu_within_the_inherited_mask(monkeypatch, mask, device, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert worker_environment(device)["CUDA_VISIBLE_DEVICES"] == seen


def test_a_cpu_worker_has_huge_pages_by_default(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert worker_environment("cpu")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "GLIBC_TUNABLES" not in worker_environment("0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert worker_environment("cpu")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("1", True), ("false", False), ("", False)]
)
def test_viral_checkpoint_mode_is_a_switch(monkeypatch, value, expected):
    monkeypatch.setenv("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", value)
    assert viral_checkpoint_mode() is expected


def test_a_minimum_length_above_the_maximum_is_refused():
    """A window may be shorter than the shortest sequence, which is then computed in several."""
    given = [*NEEDED, "--min-length", "100", "--max-length"]
    for long in ("skip", "truncate", "error"):
        assert parse_command_line([*given, "100", "--long", long]).min_length == 100
        with pytest.raises(
            ConfigError, match="--min-length: must not be above --max-length, which is 99; it was"
        ):
            parse_command_line([*given, "99", "--long", long])
    assert parse_command_line([*given, "50", "--long", "window"]).min_length == 100
    with pytest.raises(ConfigError, match="--min-length: "):
        parse_command_line([*NEEDED, "--min-length", "0"])


def test_a_maximum_length_is_required_by_windows_only():
    assert (
        parse_command_line([*NEEDED, "--long", "window", "--max-length", "1022"]).max_length == 1022
    )
    assert parse_command_line([*NEEDED, "--long", "virnucpro"]).max_length is None
    for given in (["--long", "window"], ["--long", "virnucpro", "--max-length", "1022"]):
        with pytest.raises(ConfigError, match="--max-length: "):
            parse_command_line([*NEEDED, *given])
