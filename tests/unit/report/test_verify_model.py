"""Tests of `vnp verify-model`: a right network is close to fair-esm, a wrong layer is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.networks import transformers_network
from vnp_lib.cli import main
from vnp_lib.model import esm2, weights
from vnp_lib.model.esm2 import ESM2, MODELS
from vnp_lib.model.weights import random_tensors, save_weights
from vnp_lib.report import verify_model
from vnp_lib.report.verify_model import SEQUENCES, LayerComparison

MODEL = "esm2_t6_8M_UR50D"


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / f"{MODEL}.pt"
    save_weights(path, MODEL, dict(random_tensors(MODELS[MODEL], seed=5)))
    return path


def run(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["verify-model", "--model", MODEL, *map(str, arguments)])
    return code, capsys.readouterr().out


def run_as_json(capsys, *arguments: object) -> tuple[int, dict]:
    code, printed = run(capsys, *arguments, "--json")
    return code, json.loads(printed, parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_network_is_close_in_every_layer(capsys, weights_file, dtype):
    code, report = run_as_json(
        capsys, "--weights", weights_file, "--dtype", dtype, "--device", "cpu"
    )
    assert code == 0
    assert report["is_close"]
    assert (report["dtype"], report["device"]) == (dtype, "cpu")
    assert [each["layer"] for each in report["layers"]] == list(range(7))
    if dtype == "float32":
        assert max(each["relative_difference"] for each in report["layers"]) < 2e-5
    else:
        # A smaller difference would mean that it was not half precision.
        assert 1e-4 < max(each["relative_difference"] for each in report["layers"]) < 0.1
    assert report["weights"] == str(weights_file)
    assert report["weights_digest"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert report["is_official"] is False


def test_hugging_faces_file_is_compared_too(capsys, tmp_path):
    transformers_network(MODELS[MODEL], dict(random_tensors(MODELS[MODEL]))).save_pretrained(
        tmp_path
    )
    code, report = run_as_json(capsys, "--weights", tmp_path, "--device", "cpu")
    assert (code, report["dtype"], report["weights"]) == (
        0,
        "float32",
        str(tmp_path / "model.safetensors"),
    )


def test_the_table_has_a_line_per_layer_and_a_verdict(capsys, weights_file):
    code, printed = run(capsys, "--weights", weights_file, "--device", "cpu")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines() if line.strip()[:1].isdigit()] == [
        *"60123456"
    ]
    assert "not the official weights" in printed
    assert "close enough: equivalent to fair-esm's model" in printed


def test_random_weights_are_not_the_official_ones(capsys):
    code, printed = run(capsys, "--weights", "random", "--device", "cpu")
    assert code == 0
    assert "weights: random (random:seed=0)" in printed
    assert "not the official weights" in printed


def test_weights_with_a_known_digest_are_the_official_ones(capsys, weights_file, monkeypatch):
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.OFFICIAL_DIGESTS, MODEL, frozenset({digest}))
    printed = run(capsys, "--weights", weights_file, "--device", "cpu")[1]
    assert "\nofficial weights" in printed


def test_a_model_without_a_known_digest(capsys, weights_file, monkeypatch):
    monkeypatch.delitem(weights.OFFICIAL_DIGESTS, MODEL)
    code, printed = run(capsys, "--weights", weights_file, "--device", "cpu")
    assert code == 0
    assert "not known whether they are official" in printed


def load_damaged_in_layer_4(*arguments: object, **options: object) -> ESM2:
    network = weights.load_model(*arguments, **options)
    network.layers[3].fc2.weight[:160] *= -3
    return network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_wrong_is_named(capsys, monkeypatch, weights_file, dtype):
    monkeypatch.setattr(verify_model, "load_model", load_damaged_in_layer_4)
    # Pytest-xdist sets COLUMNS, and with fewer the table becomes paragraphs.
    monkeypatch.setenv("COLUMNS", "140")
    code, printed = run(capsys, "--weights", weights_file, "--dtype", dtype, "--device", "cpu")
    assert code == 1
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("too far")] == [
        "4",
        "5",
        "6",
    ]
    assert "too far apart: layer 4 is the first" in printed


def test_missing_rotary_embeddings_show_in_layer_1(capsys, monkeypatch, weights_file):
    monkeypatch.setattr(esm2, "rotate", lambda x, factors: x)
    code, report = run_as_json(capsys, "--weights", weights_file, "--device", "cpu")
    assert (code, report["first_apart"], report["is_close"]) == (1, 1, False)


def test_non_finite_states_are_infinitely_far_apart(capsys, monkeypatch, weights_file):
    def load_with_nan(*arguments: object, **options: object) -> ESM2:
        network = weights.load_model(*arguments, **options)
        network.layers[0].fc2.bias[7] = float("nan")
        return network

    monkeypatch.setattr(verify_model, "load_model", load_with_nan)
    code, report = run_as_json(
        capsys, "--weights", weights_file, "--dtype", "float16", "--device", "cpu"
    )
    assert (code, report["first_apart"], report["lowest_mean_cosine"]) == (1, 1, -1.0)
    assert report["layers"][1]["max_abs_difference"] is None


def test_cosines_are_of_residues_over_all_sequences():
    """BOS and EOS, first and last, point the other way and count for the difference only."""
    theirs = [torch.eye(4), 2 * torch.eye(4)]
    ours: list[Tensor] = [each.clone() for each in theirs]
    ours[0][0] *= -1
    ours[1][2, 3] = 2.0
    assert LayerComparison.between(3, ours, theirs) == LayerComparison(
        layer=3,
        max_abs_difference=2.0,
        relative_difference=1.0,
        lowest_cosine=pytest.approx(0.5**0.5),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.pt"], "cannot read the weights at"),
        (["--weights", "random", "--device", "gpu"], "use 'auto', 'cpu' or the number of a GPU"),
        (["--weights", "random", "--device", "99"], "there is no GPU 99"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line(capsys, arguments, message):
    assert main(["verify-model", "--model", MODEL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_sequences_have_every_residue_and_many_lengths():
    lengths = sorted(map(len, SEQUENCES.values()))
    assert (lengths[0], lengths[-1]) == (20, 388)
    assert set("".join(SEQUENCES.values())) == set("ACDEFGHIKLMNPQRSTVWYXBUZO")
