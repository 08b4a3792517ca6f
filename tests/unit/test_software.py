"""The code that a worker process may run, and the software that a dataset records."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT
from vnp_lib.errors import ConfigError
from vnp_lib.run.job import ShardJob
from vnp_lib.software import (
    Package,
    Software,
    SoftwareShare,
    describe_software,
    is_mixed,
    package_in_use,
    require_same_package,
)


def test_the_package_in_use_is_accepted():
    assert package_in_use().directory == str(ROOT / "vnp_lib")
    require_same_package(json.loads(json.dumps(asdict(package_in_use()))))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "model" / "pooling.py").write_text("pass"),
        lambda tree: (tree / "model" / "pooling.py").rename(tree / "model" / "pool.py"),
        lambda tree: (tree / "model" / "weights.py").unlink(),
        lambda tree: (tree / "inner").mkdir() or (tree / "inner" / "new.py").touch(),
    ],
    ids=["other text", "another name", "a file less", "a file more, further down"],
)
def test_the_digest_changes_with_every_file(tmp_path, change):
    tree = tmp_path / "vnp_lib"
    shutil.copytree(ROOT / "vnp_lib", tree, ignore=shutil.ignore_patterns("__pycache__"))
    before = Package.in_directory(tree)
    assert before.code_sha256 == package_in_use().code_sha256
    change(tree)
    assert Package.in_directory(tree).code_sha256 != before.code_sha256


@pytest.mark.parametrize(
    "starter", [None, 1, {}, {"version": "0.1.0"}, {"code_sha256": "of others"}]
)
def test_a_job_of_other_code_is_refused(starter):
    with pytest.raises(ConfigError, match=str(ROOT / "vnp_lib")):
        require_same_package(starter)


def test_both_directories_are_named():
    with pytest.raises(ConfigError, match=r"vnp 0\.0\.9 from /opt/old/vnp_lib"):
        require_same_package(
            {"version": "0.0.9", "code_sha256": "", "directory": "/opt/old/vnp_lib"}
        )


def test_code_that_changed_during_a_run_is_reported():
    with pytest.raises(ConfigError, match="has changed since this run was started"):
        require_same_package(asdict(package_in_use()) | {"code_sha256": "of this morning"})


def test_a_job_names_the_package(tmp_path):
    fields = {name: 1 for name, field in ShardJob.model_fields.items() if field.is_required()}
    texts = dict.fromkeys(
        ("fingerprint", "model", "weights", "weights_digest", "dtype", "device"), "x"
    )
    job = ShardJob(**fields | texts | {"run_dir": tmp_path})
    assert json.loads(job.model_dump_json())["package"] == asdict(package_in_use())


def used(
    vnp: str = "0.2.0", code: str = "c0de", version: str = "2.10.0", device: str = "NVIDIA L4"
) -> Software:
    return Software(vnp=vnp, code_sha256=code, torch=version, device=device)


def shares(*software: Software) -> list[SoftwareShare]:
    return [
        SoftwareShare(software=each, sequences=1000 + place) for place, each in enumerate(software)
    ]


def test_software_is_read_back_from_metadata():
    here = Software.on(torch.device("cpu"))
    assert here.device.startswith("CPU (")
    assert Software.of_metadata(json.loads(json.dumps(here.to_metadata()))) == here


@pytest.mark.parametrize(
    "metadata", [{}, {"software": None}, {"software": [1]}, {"software": {"torch_version": "2"}}]
)
def test_metadata_without_software_are_of_unknown_software(metadata):
    assert Software.of_metadata(metadata) == used("unknown", "unknown", "unknown", "unknown")


@pytest.mark.parametrize(
    ("software", "mixed", "text"),
    [
        ([], False, ""),
        ([used()], False, "vnp 0.2.0, torch 2.10.0, NVIDIA L4"),
        (
            [used(), used(device="NVIDIA A100")],
            False,
            "vnp 0.2.0, torch 2.10.0, NVIDIA A100: 1,001 sequences",
        ),
        (
            [used(), used(vnp="0.3.0", code="new")],
            True,
            "vnp 0.3.0, torch 2.10.0, NVIDIA L4: 1,001 sequences",
        ),
        (
            [used(), used(version="2.11.0")],
            True,
            "vnp 0.2.0, torch 2.11.0, NVIDIA L4: 1,001 sequences",
        ),
        (
            [used(), used(code="0123456789")],
            True,
            "vnp 0.2.0 (code 01234567), torch 2.10.0, NVIDIA L4: 1,001 sequences",
        ),
    ],
)
def test_only_several_versions_are_mixed_software(software, mixed, text, monkeypatch):
    """The flow warns of it at its end, and `_SUCCESS.json` records it."""
    import flows.embed

    read_back = [
        SoftwareShare.from_json(json.loads(json.dumps(each.to_json())))
        for each in shares(*software)
    ]
    assert describe_software(read_back).endswith(text)
    assert is_mixed(read_back) == mixed
    warnings = []
    logger = SimpleNamespace(warning=lambda message, *values: warnings.append(message % values))
    monkeypatch.setattr(flows.embed, "get_run_logger", lambda: logger)
    flows.embed.warn_of_mixed_software(SimpleNamespace(software=read_back))
    assert [text in warning for warning in warnings] == [True] * mixed
