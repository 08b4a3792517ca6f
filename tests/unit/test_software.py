"""Whose code a worker process runs: that of the process that has started it, or none."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

from tests.support import ROOT
from vnp_lib.failures import ConfigError
from vnp_lib.software import Package, package_in_use, require_same_package
from vnp_lib.worker import ShardJob


def test_the_package_in_use_is_accepted():
    assert package_in_use().directory == str(ROOT / "vnp_lib")
    require_same_package(json.loads(json.dumps(asdict(package_in_use()))))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "pooling.py").write_text("pass"),
        lambda tree: (tree / "pooling.py").rename(tree / "pool.py"),
        lambda tree: (tree / "weights.py").unlink(),
        lambda tree: (tree / "inner").mkdir() or (tree / "inner" / "new.py").touch(),
    ],
    ids=["other text", "another name", "a file less", "a file more, further down"],
)
def test_the_digest_tells_of_every_change(tmp_path, change):
    tree = tmp_path / "vnp_lib"
    shutil.copytree(ROOT / "vnp_lib", tree, ignore=shutil.ignore_patterns("__pycache__"))
    before = Package.in_directory(tree)
    assert before.code_sha256 == package_in_use().code_sha256
    change(tree)
    assert Package.in_directory(tree).code_sha256 != before.code_sha256


@pytest.mark.parametrize("starter", [None, 1, {}, {"version": "0.1.0"}, {"code_sha256": "of others"}])
def test_a_job_of_other_code_is_refused(starter):
    with pytest.raises(ConfigError, match=str(ROOT / "vnp_lib")):
        require_same_package(starter)


def test_both_places_are_named():
    with pytest.raises(ConfigError, match=r"vnp 0\.0\.9 from /opt/old/vnp_lib"):
        require_same_package({"version": "0.0.9", "code_sha256": "", "directory": "/opt/old/vnp_lib"})


def test_code_that_was_changed_under_a_run_is_named_as_that():
    with pytest.raises(ConfigError, match="has changed since this run was started"):
        require_same_package(asdict(package_in_use()) | {"code_sha256": "of this morning"})


def test_a_job_names_the_package(tmp_path):
    fields = {name: 1 for name, field in ShardJob.model_fields.items() if field.is_required()}
    texts = dict.fromkeys(("fingerprint", "model", "weights", "weights_digest", "dtype", "device"), "x")
    job = ShardJob(**fields | texts | {"run_dir": tmp_path})
    assert json.loads(job.model_dump_json())["package"] == asdict(package_in_use())
