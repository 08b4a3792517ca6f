"""A run, `vnp plan`, `vnp verify-model` and Python check weights alike, and up front."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.networks import RANDOM, SMALLEST
from vnp_lib import embed
from vnp_lib.cli import main
from vnp_lib.config import EmbedConfig
from vnp_lib.embeddings import Embeddings
from vnp_lib.errors import ExitCode, InputError, WeightsError
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.weight_files import name_in_transformers
from vnp_lib.model.weights import inspect_weights, random_tensors, resolve_weights, save_weights
from vnp_lib.options import EstimateConfig
from vnp_lib.report.estimate import estimate_run
from vnp_lib.run.directory import open_run, validate_config

REVISION = "c731040fcd8d73dceaa04b0a8e6329b345b0f5df"
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0\nsize 2609506392\n"
)
WEB_PAGE = "<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>\n"


@pytest.fixture(scope="module")
def fair_esm_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(path, SMALLEST, dict(random_tensors(MODELS[SMALLEST])))
    return path


@pytest.fixture(scope="module")
def safetensors_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("downloaded") / "model.safetensors"
    save_file(
        {name_in_transformers(name): tensor for name, tensor in random_tensors(MODELS[SMALLEST])},
        path,
    )
    (path.parent / "config.json").write_text("{}")
    return path


def downloaded(tmp_path: Path, file: Path) -> Path:
    """As `hf download --local-dir` makes it."""
    return file.parent


def cached(tmp_path: Path, file: Path) -> Path:
    """A model in the hub's cache: links to files whose names have no suffix."""
    directory = tmp_path / "models--facebook--esm2_t6_8M_UR50D"
    snapshot = directory / "snapshots" / REVISION
    for made in (directory / "blobs", snapshot, directory / "refs"):
        made.mkdir(parents=True)
    shutil.copy(file, directory / "blobs/0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    (directory / "refs/main").write_text(REVISION)
    return directory


def snapshot(tmp_path: Path, file: Path) -> Path:
    return cached(tmp_path, file) / "snapshots" / REVISION


def blob(tmp_path: Path, file: Path) -> Path:
    return cached(tmp_path, file) / "blobs/0123"


def sharded(tmp_path: Path, file: Path) -> Path:
    tensors = load_file(file)
    names = {
        name: f"model-0000{1 + place % 2}-of-00002.safetensors"
        for place, name in enumerate(tensors)
    }
    for shard in set(names.values()):
        save_file(
            {name: tensors[name] for name in tensors if names[name] == shard}, tmp_path / shard
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def index(tmp_path: Path, file: Path) -> Path:
    return sharded(tmp_path, file) / "model.safetensors.index.json"


def config_with(
    weights: object, tmp_path: Path, kind: type[EmbedConfig] = EmbedConfig, **settings
) -> EmbedConfig:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKVLATTWQERS\n")
    given = {"model": SMALLEST, "devices": "cpu", "shards": 1} | settings
    return kind(fasta=(fasta,), output_dir=tmp_path / "run", weights=str(weights), **given)


@pytest.mark.parametrize("layout", [downloaded, cached, snapshot, blob, sharded, index])
def test_every_layout_of_hugging_faces_is_taken_by_all(tmp_path, safetensors_file, layout) -> None:
    """A run, its plan, and Python; with the digest that goes into the run's identity."""
    given = layout(tmp_path, safetensors_file)
    config = config_with(given, tmp_path)
    validate_config(config)
    with open_run(config) as run:
        assert run.plan.identity["weights_digest"] == resolve_weights(SMALLEST, str(given)).digest
    assert estimate_run(config_with(given, tmp_path, EstimateConfig)).weights == str(
        inspect_weights(SMALLEST, str(given)).path
    )
    ours = embed(["MKV"], model=SMALLEST, weights=given, device="cpu", progress=False)
    theirs = embed(["MKV"], model=SMALLEST, weights="random", device="cpu", progress=False)
    assert isinstance(ours, Embeddings)
    assert isinstance(theirs, Embeddings)
    assert (ours.embeddings == theirs.embeddings).all()


def text(content: str | bytes, name: str = "w.pt") -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def holding(*names: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        for name in names:
            (directory / name).write_bytes(b"x")
        return directory

    return make


def clone_without_lfs(directory: Path) -> Path:
    text(LFS_POINTER, "model.safetensors")(directory)
    return directory


def broken_link(directory: Path) -> Path:
    (directory / "model.safetensors").symlink_to("../blobs/gone")
    return directory


def index_alone(directory: Path) -> Path:
    content = json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    text(content, "model.safetensors.index.json")(directory)
    return directory


def pointers_of_shards(directory: Path) -> Path:
    text(LFS_POINTER, "model-00001-of-00001.safetensors")(index_alone(directory))
    return directory


def fair_esm(**changes: object) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        torch.save({"model": {}} | changes, directory / "w.pt")
        return directory / "w.pt"

    return make


def of_another_model(directory: Path) -> Path:
    state = {f"layers.{n}.x": torch.zeros(1) for n in range(33)} | {
        "embed_tokens.weight": torch.zeros(33, 1280)
    }
    torch.save(
        {"model": {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}},
        directory / "w.pt",
    )
    return directory / "w.pt"


def of_a_pickle(directory: Path) -> Path:
    """pytorch_model.bin under another name."""
    torch.save({"esm.embeddings.word_embeddings.weight": torch.zeros(33, 320)}, directory / "w.pt")
    return directory / "w.pt"


def cut(kept: int, name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        tensors = {
            name_in_transformers(key): tensor for key, tensor in random_tensors(MODELS[SMALLEST])
        }
        path = directory / name
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(
            {"model": tensors}, path
        )
        path.write_bytes(path.read_bytes()[:kept])
        return path

    return make


REFUSED = {
    "absent": (lambda directory: directory / "w.pt", "No such file or directory"),
    "link to nothing": (broken_link, "model.safetensors (No such file or directory)"),
    "LFS pointer": (
        text(LFS_POINTER),
        "is a pointer of Git LFS, not the file of 2,609,506,392 bytes that it stands for: run `git",
    ),
    "LFS pointer, safetensors": (text(LFS_POINTER, "model.safetensors"), "is a pointer of Git LFS"),
    "LFS pointer, pickle": (text(LFS_POINTER, "pytorch_model.bin"), "is a pointer of Git LFS"),
    "clone without LFS": (clone_without_lfs, "model.safetensors is a pointer of Git LFS"),
    "shards without LFS": (
        pointers_of_shards,
        "model-00001-of-00001.safetensors is a pointer of Git LFS",
    ),
    "LFS pointer as index": (
        text(LFS_POINTER, "model.safetensors.index.json"),
        "is a pointer of Git LFS",
    ),
    "index without shards": (index_alone, "names 1 files, and 1 are not in its directory"),
    "web page": (
        text(WEB_PAGE),
        "(it is a web page, of an error or a log-in): remove it and get it again",
    ),
    "XML error": (
        text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
        "it is a web page",
    ),
    "web page, safetensors": (text("\n " + WEB_PAGE, "model.safetensors"), "it is a web page"),
    "web page as index": (text(WEB_PAGE, "model.safetensors.index.json"), "it is a web page"),
    "JSON error": (
        text('{"error": "Repository not found"}'),
        "it is JSON text, of a server's error",
    ),
    "text": (
        text("Entry not found"),
        "it is text, 'Entry not found', which a server may have sent instead",
    ),
    "empty": (text(""), "it is empty"),
    "empty, safetensors": (text("", "model.safetensors"), "it is empty"),
    "gzip": (text(gzip.compress(b"x" * 100)), "it is compressed with gzip"),
    "HDF5": (text(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is an HDF5 file"),
    "zeros": (text(bytes(9999)), "is damaged or not a file of fair-esm"),
    "cut fair-esm": (cut(10_000, "w.pt"), "it is cut short, at 10,000 bytes"),
    "cut safetensors": (cut(10_000, "w.safetensors"), "is damaged or not a file of Hugging Face"),
    "cut header": (cut(20, "w.safetensors"), "is damaged or not a file of Hugging Face"),
    "another model": (
        of_another_model,
        "holds 33 layers of width 1280, but esm2_t6_8M_UR50D has 6 of width 320",
    ),
    "no parameters": (fair_esm(), "does not hold the parameters of esm2_t6_8M_UR50D"),
    "no model": (fair_esm(model=[1]), "it has no 'model'"),
    "pickle, renamed": (of_a_pickle, "it has no 'model'"),
    "pickle": (holding("pytorch_model.bin", "config.json"), "is a pickle of Hugging Face"),
    "tokenizer alone": (
        holding("config.json", "vocab.txt", "tokenizer_config.json"),
        "it holds only the tokenizer and settings",
    ),
    "empty directory": (holding(), "it is a directory without model.safetensors"),
    "fair-esm's directory": (
        holding("esm2_t6_8M_UR50D.pt", "esm2_t6_8M_UR50D-contact-regression.pt"),
        "it holds esm2_t6_8M_UR50D.pt: give",
    ),
    "other frameworks": (
        holding("tf_model.h5", "config.json"),
        "parameters of other frameworks are not read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_are_no_weights_is_refused_by_all_in_the_same_sentence(tmp_path, capsys, name) -> None:
    """Before a run makes anything or a server starts."""
    (tmp_path / "weights").mkdir()
    make, reason = REFUSED[name]
    given = make(tmp_path / "weights")
    with pytest.raises(WeightsError) as by_run:
        validate_config(config_with(given, tmp_path))
    (sentence,) = str(by_run.value).splitlines()
    assert reason in sentence
    assert not (tmp_path / "run").exists()
    for look in (
        lambda: estimate_run(config_with(given, tmp_path, EstimateConfig)),
        lambda: resolve_weights(SMALLEST, str(given)),
        lambda: embed(["MKV"], model=SMALLEST, weights=given, device="cpu", progress=False),
    ):
        with pytest.raises(WeightsError) as by_other:
            look()
        assert str(by_other.value) == sentence
    assert (
        main(["verify-model", "--model", SMALLEST, "--weights", str(given), "--device", "cpu"])
        == ExitCode.UNUSABLE_INPUT
    )
    assert capsys.readouterr().err == sentence + "\n"


def test_a_directory_of_the_hub_with_several_models_names_them(tmp_path) -> None:
    for model in ("bert", "facebook--esm2_t6_8M_UR50D"):
        (tmp_path / f"models--{model}").mkdir()
    with pytest.raises(
        WeightsError,
        match=r"it holds models--facebook--esm2_t6_8M_UR50D, models--bert: give the path",
    ):
        inspect_weights(SMALLEST, str(tmp_path))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            "facebook/esm2_t6_8M_UR50D",
            "`hf download facebook/esm2_t6_8M_UR50D --local-dir weights`",
        ),
        ("esm2_t6_8M_UR50D", "the name of a model is given with --model"),
        ("https://huggingface.co/facebook/esm2_t6_8M_UR50D", "`hf download facebook/esm2_"),
        ("https://host/w.pt", "`curl --location --remote-name https://host/w.pt`"),
        ("$ABSENT/w.pt", "the environment variable ABSENT is not set"),
    ],
)
def test_an_invalid_path_is_refused_with_advice(given, reason, monkeypatch) -> None:
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(InputError) as caught:
        inspect_weights(SMALLEST, given)
    assert reason in str(caught.value)


def test_home_is_expanded_in_python_too(fair_esm_file, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(fair_esm_file.parent))
    found = inspect_weights(SMALLEST, "~/model.pt")
    assert found is not None
    assert found.path == fair_esm_file


def test_the_numbers_are_not_read_for_a_look(fair_esm_file, monkeypatch) -> None:
    """A file has gigabytes, and the look comes before everything."""
    monkeypatch.setattr("vnp_lib.model.weights.digest_file", None)
    monkeypatch.setattr("vnp_lib.model.weight_files.torch.load", pytest.fail)
    old = fair_esm_file.with_name("old.pt")
    torch.save({"model": {}}, old, _use_new_zipfile_serialization=False)
    found = inspect_weights(SMALLEST, str(old))
    assert found is not None
    assert found.digest == ""


def test_a_look_at_random_weights_gives_them() -> None:
    assert inspect_weights(SMALLEST, "random") == RANDOM


def test_vnp_plan_reports_where_weights_would_be_downloaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert inspect_weights(SMALLEST, "auto") is None
    weights = estimate_run(config_with("auto", tmp_path, EstimateConfig)).weights
    path = f"{tmp_path}/hub/checkpoints/{SMALLEST}.pt"
    assert weights == f"not here yet: a run downloads them to {path}"
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / f"hub/checkpoints/{SMALLEST}.pt").write_text(WEB_PAGE)
    with pytest.raises(WeightsError, match="it is a web page"):
        validate_config(config_with("auto", tmp_path))


@pytest.mark.parametrize("include", ["logits", "contacts"])
def test_heads_that_are_missing_are_said_before_a_run_begins(
    tmp_path, fair_esm_file, include
) -> None:
    for config, look in ((EmbedConfig, validate_config), (EstimateConfig, estimate_run)):
        with pytest.raises(WeightsError, match=f"{include} .*need"):
            look(config_with(fair_esm_file, tmp_path, config, include=(include,)))


def test_a_layer_that_the_model_has_not_is_said_before_a_run_begins(tmp_path) -> None:
    with pytest.raises(InputError, match="layers 7 are requested"):
        validate_config(config_with("random", tmp_path, repr_layers=(7,)))
