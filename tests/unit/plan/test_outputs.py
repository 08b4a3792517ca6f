"""Outputs: the choice, the names, and the width of rows."""

from __future__ import annotations

import numpy as np
import pytest

from vnp_lib.errors import ConfigError
from vnp_lib.plan.outputs import Output, OutputKind, RowLayout, choose_outputs, offsets_of


def names(include: str, repr_layers: list[int] | None, *, num_layers: int = 33) -> list[str]:
    kinds = [OutputKind(kind) for kind in include.split(",")]
    return [output.name for output in choose_outputs(kinds, repr_layers, num_layers=num_layers)]


def layout_of(*names: str, embed_dim: int = 4) -> RowLayout:
    return RowLayout.of_names(names, embed_dim=embed_dim)


@pytest.mark.parametrize(
    ("include", "repr_layers", "expected"),
    [
        ("mean", None, ["mean_33"]),
        ("mean", [0], ["mean_0"]),
        ("mean,bos", [-1], ["mean_33", "bos_33"]),
        ("bos,mean", [33, -34, 5], ["mean_0", "mean_5", "mean_33", "bos_0", "bos_5", "bos_33"]),
        ("mean", [33, -1], ["mean_33"]),
        ("logits,contacts,per_tok", [6], ["per_tok_6", "contacts", "logits"]),
        ("contacts", [6], ["contacts"]),
        ("std,max,std", [6], ["max_6", "std_6"]),
    ],
)
def test_outputs_are_ordered_by_kind_and_layer(include, repr_layers, expected):
    assert names(include, repr_layers) == expected


@pytest.mark.parametrize("layers", [[34], [-35], [0, 34], []])
def test_a_missing_layer_is_refused_with_the_existing_ones(layers):
    with pytest.raises(
        ConfigError,
        match=r"layers .* are requested: this model has the layers 0 \(its embedding\) to 33",
    ):
        names("mean", layers)


def test_a_name_is_parsed_into_its_output():
    for name in ("mean_0", "bos_33", "max_5", "std_12", "per_tok_33", "contacts", "logits"):
        assert Output.parse(name).name == name
    with pytest.raises(ValueError, match="median"):
        Output.parse("median_3")


def test_a_row_is_as_wide_as_its_outputs_together():
    lengths = np.array([3, 1, 3, 7])
    assert layout_of("mean_6", "std_6").fixed_width == 8
    assert layout_of("mean_6", "std_6").widths(lengths).tolist() == [8, 8, 8, 8]
    assert layout_of("per_tok_6").widths(lengths).tolist() == [12, 4, 12, 28]
    assert layout_of("contacts").widths(lengths).tolist() == [9, 1, 9, 49]
    assert layout_of("logits").widths(lengths).tolist() == [99, 33, 99, 231]
    assert layout_of("mean_6", "contacts").widths(lengths).tolist() == [13, 5, 13, 53]


def test_widths_of_very_long_sequences_do_not_overflow():
    assert layout_of("contacts").widths(np.array([100_000], dtype=np.int32)).tolist() == [10**10]


def test_one_mean_adds_nothing_to_the_identity():
    """The identity of runs of earlier versions, which had no choice of outputs, must not change."""
    assert layout_of("mean_6").identity() == {}
    several = layout_of("mean_6", "bos_6")
    assert several.identity() == {"outputs": "mean_6,bos_6", "embed_dim": 4}
    assert RowLayout.of_identity({"layer": 6} | several.identity()) == several
    assert RowLayout.of_identity({"layer": 6}, embed_dim=4) == layout_of("mean_6")


def test_offsets_are_boundaries_of_concatenated_rows():
    assert offsets_of(np.array([3, 1, 2])).tolist() == [0, 3, 4, 6]
    assert offsets_of(np.array([], dtype=np.int64)).tolist() == [0]
