"""`vnp verify-model`: what is right is found close to fair-esm, and what is wrong is named by its layer."""

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
    code, told = run_as_json(capsys, "--weights", weights_file, "--dtype", dtype, "--device", "cpu")
    assert code == 0
    assert told["is_close"]
    assert (told["dtype"], told["device"]) == (dtype, "cpu")
    assert [each["layer"] for each in told["layers"]] == list(range(7))
    if dtype == "float32":
        assert max(each["relative_difference"] for each in told["layers"]) < 2e-5
    else:
        assert (
            1e-4 < max(each["relative_difference"] for each in told["layers"]) < 0.1
        )  # or it was no half precision
    assert told["weights"] == str(weights_file)
    assert told["weights_digest"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert told["is_official"] is False


def test_hugging_faces_file_is_held_against_fair_esm_too(capsys, tmp_path):
    transformers_network(MODELS[MODEL], dict(random_tensors(MODELS[MODEL]))).save_pretrained(
        tmp_path
    )
    code, told = run_as_json(capsys, "--weights", tmp_path, "--device", "cpu")
    assert (code, told["dtype"], told["weights"]) == (
        0,
        "float32",
        str(tmp_path / "model.safetensors"),
    )


def test_a_person_reads_a_line_for_each_layer_and_a_verdict(capsys, weights_file):
    code, printed = run(capsys, "--weights", weights_file, "--device", "cpu")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines() if line.strip()[:1].isdigit()] == [
        *"60123456"
    ]
    assert "they are not the official ones" in printed
    assert "close enough: this is fair-esm's model" in printed


def test_random_weights_are_not_the_official_ones(capsys):
    code, printed = run(capsys, "--weights", "random", "--device", "cpu")
    assert code == 0
    assert "weights: random (random:seed=0)" in printed
    assert "they are not the official ones" in printed


def test_weights_with_a_known_digest_are_the_official_ones(capsys, weights_file, monkeypatch):
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.OFFICIAL_DIGESTS, MODEL, frozenset({digest}))
    assert (
        "they are the official ones" in run(capsys, "--weights", weights_file, "--device", "cpu")[1]
    )


def test_it_says_that_no_digest_of_a_model_is_known(capsys, weights_file, monkeypatch):
    monkeypatch.delitem(weights.OFFICIAL_DIGESTS, MODEL)
    code, printed = run(capsys, "--weights", weights_file, "--device", "cpu")
    assert code == 0
    assert "whether they are the official ones is not known" in printed


def load_damaged_in_layer_4(*arguments: object, **options: object) -> ESM2:
    network = weights.load_model(*arguments, **options)
    network.layers[3].fc2.weight[:160] *= -3
    return network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_wrong_is_named(capsys, monkeypatch, weights_file, dtype):
    monkeypatch.setattr(verify_model, "load_model", load_damaged_in_layer_4)
    monkeypatch.setenv(
        "COLUMNS", "140"
    )  # pytest-xdist sets it, and on fewer the table is paragraphs
    code, printed = run(capsys, "--weights", weights_file, "--dtype", dtype, "--device", "cpu")
    assert code == 1
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("too far")] == [
        "4",
        "5",
        "6",
    ]
    assert "too far apart: layer 4 is the first" in printed


def test_positions_that_are_not_turned_are_found_in_the_first_layer(
    capsys, monkeypatch, weights_file
):
    monkeypatch.setattr(esm2, "rotate", lambda x, factors: x)
    code, told = run_as_json(capsys, "--weights", weights_file, "--device", "cpu")
    assert (code, told["first_apart"], told["is_close"]) == (1, 1, False)


def test_states_that_are_not_finite_are_as_far_off_as_can_be(capsys, monkeypatch, weights_file):
    def load_with_nan(*arguments: object, **options: object) -> ESM2:
        network = weights.load_model(*arguments, **options)
        network.layers[0].fc2.bias[7] = float("nan")
        return network

    monkeypatch.setattr(verify_model, "load_model", load_with_nan)
    code, told = run_as_json(
        capsys, "--weights", weights_file, "--dtype", "float16", "--device", "cpu"
    )
    assert (code, told["first_apart"], told["lowest_mean_cosine"]) == (1, 1, -1.0)
    assert told["layers"][1]["max_abs_difference"] is None


def test_a_layer_is_compared_over_all_sequences_and_cosines_are_of_residues():
    """BOS and EOS, first and last, are turned by half and count for the difference only."""
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
    ("arguments", "said"),
    [
        (["--weights", "nowhere.pt"], "cannot read the weights at"),
        (["--weights", "random", "--device", "gpu"], "it is 'auto', 'cpu' or the number of a GPU"),
        (["--weights", "random", "--device", "99"], "there is no GPU 99"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(capsys, arguments, said):
    assert main(["verify-model", "--model", MODEL, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_sequences_are_short_and_long_and_have_every_letter_of_a_protein():
    lengths = sorted(map(len, SEQUENCES.values()))
    assert (lengths[0], lengths[-1]) == (20, 388)
    assert set("".join(SEQUENCES.values())) == set("ACDEFGHIKLMNPQRSTVWYXBUZO")
