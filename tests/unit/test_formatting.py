"""Formatting for people: `vnp_lib.formatting`."""

from __future__ import annotations

import pytest

from vnp_lib.formatting import listed


@pytest.mark.parametrize(
    ("items", "text"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_a_list_names_the_first_items_and_counts_the_others(items, text):
    assert listed(items, 2) == text


def test_a_list_may_be_given_only_the_items_it_shows():
    assert listed(["a", "b"], 2, separator="; ", total=1234) == "a; b; and 1,232 more"
