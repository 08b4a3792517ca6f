"""Packed integers in JSON are read back, and nothing else is taken for them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from vnp_lib.storage.packed_integers import is_packed, pack, unpack


@pytest.mark.parametrize("bits", range(64))
def test_integers_are_read_back_in_order(bits: int) -> None:
    draw = random.Random(bits)
    values = [draw.getrandbits(bits) for _ in range(draw.randrange(9))]
    packed = json.loads(json.dumps(pack(values)))
    assert is_packed(packed)
    assert unpack(packed).tolist() == values


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, "u1"), (256, "u2"), (65_536, "u4"), (2**32, "u8")]
)
def test_the_narrowest_type_is_used(largest: int, dtype: str) -> None:
    packed = pack([0, largest])
    assert packed is not None
    assert packed["dtype"] == dtype


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, True, "1", None])
def test_a_list_with_other_values_is_not_packed(value: Any) -> None:
    assert pack([0, value]) is None


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        ({"dtype": "u4", "base64": "AAAA"}, "multiple"),
        ({"dtype": "u1", "base64": "AA=A"}, "base64"),
        ({"dtype": "u1", "base64": "AA\n=="}, "base64"),
        ({"dtype": "u1", "base64": "ä"}, "ASCII"),
        ({"dtype": "u1", "base64": [0]}, "base64"),
        ({"dtype": "O", "base64": ""}, "'O' are not supported"),
        ({"dtype": ["u1"], "base64": ""}, "are not supported"),
        ({"dtype": "u8", "base64": "/////////38="}, None),
        ({"dtype": "u8", "base64": "//////////8="}, "larger than"),
    ],
)
def test_invalid_packed_integers_are_refused(packed: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        assert unpack(packed).tolist() == [2**63 - 1]
        return
    with pytest.raises(ValueError, match=reason):
        unpack(packed)
