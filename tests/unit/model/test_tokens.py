"""Residues become fair-esm's tokens, and incomplete batches are refused."""

import numpy as np
import pytest
import torch
from esm.data import Alphabet

from vnp_lib.model.tokens import (
    ALPHABET_SIZE,
    BOS,
    EOS,
    MASK,
    PAD,
    RESIDUES,
    UNK,
    PackedBatch,
    pack_batch,
)

FAIR_ESM = Alphabet.from_architecture("ESM-1b")


def pack(*sequences: str) -> PackedBatch:
    return pack_batch(
        sequences,
        [f"s{i}" for i in range(len(sequences))],
        range(10, 10 + len(sequences)),
        batch_idx=3,
    )


def test_alphabet_is_fair_esms():
    assert (
        FAIR_ESM.cls_idx,
        FAIR_ESM.padding_idx,
        FAIR_ESM.eos_idx,
        FAIR_ESM.unk_idx,
        FAIR_ESM.mask_idx,
    ) == (BOS, PAD, EOS, UNK, MASK)
    assert len(FAIR_ESM) == ALPHABET_SIZE
    assert list(RESIDUES) == FAIR_ESM.standard_toks


def test_tokens_are_those_of_fair_esms_batch_converter():
    sequences = [RESIDUES, "MKV", "A"]
    _, _, padded = FAIR_ESM.get_batch_converter()([("", sequence) for sequence in sequences])
    batch = pack(*sequences)
    assert batch.input_ids.tolist() == padded[padded != PAD].tolist()
    assert batch.cu_seqlens.tolist() == [0, 29, 34, 37]
    assert (batch.max_seqlen, batch.num_sequences, batch.num_tokens) == (29, 3, 37)
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("letter", ["J", "*", "a", "1", "<", "é", "λ"])
def test_letter_unknown_to_the_model_is_one_unk_token(letter):
    """J is not taken for X here: that is for fasta.py to do, which normalises before."""
    assert pack(f"M{letter}K").input_ids[2] == UNK
    assert pack(f"M{letter}K").num_tokens == 5


def test_select_keeps_tokens_ids_and_ordinals_together():
    batch = pack("MKVL", "AAA", "CC", "W")
    kept = batch.select(np.array([False, True, False, True]))
    alone = pack("AAA", "W")
    assert kept.input_ids.tolist() == alone.input_ids.tolist()
    assert kept.cu_seqlens.tolist() == alone.cu_seqlens.tolist()
    assert kept.max_seqlen == alone.max_seqlen
    assert kept.sequence_ids == ("s1", "s3")
    assert kept.ordinals.tolist() == [11, 13]
    assert kept.batch_idx == 3


def test_moved_batch_keeps_what_is_not_a_tensor():
    batch = pack("MKV", "A")
    moved = batch.to("meta")
    assert moved.input_ids.is_meta
    assert moved.cu_seqlens.is_meta
    assert (moved.sequence_ids, moved.max_seqlen) == (batch.sequence_ids, batch.max_seqlen)


def test_packed_mapping_is_taken_as_it_is():
    packed = pack("MKV", "A")
    mapping = {
        "input_ids": packed.input_ids,
        "cu_seqlens": packed.cu_seqlens,
        "max_seqlen": packed.max_seqlen,
        "sequence_ids": ["x", "y"],
        "ordinals": [7, 5],
    }
    batch = PackedBatch.from_mapping(mapping, batch_idx=1, first_ordinal=100)
    assert torch.equal(batch.input_ids, packed.input_ids)
    assert torch.equal(batch.cu_seqlens, packed.cu_seqlens)
    assert batch.max_seqlen == 5
    assert batch.ordinals.tolist() == [7, 5]


def test_padded_rows_become_one_sequence_each():
    """A padded batch of three gives three sequences, never one embedding for three ids."""
    sequences = ["MKVLA", "AA", "WCY"]
    _, _, padded = FAIR_ESM.get_batch_converter()([("", sequence) for sequence in sequences])
    batch = PackedBatch.from_mapping(
        {"input_ids": padded, "sequence_ids": ["x", "y", "z"]}, batch_idx=0, first_ordinal=100
    )
    packed = pack(*sequences)
    assert torch.equal(batch.input_ids, packed.input_ids)
    assert torch.equal(batch.cu_seqlens, packed.cu_seqlens)
    assert batch.ordinals.tolist() == [100, 101, 102]


def test_only_padding_at_the_right_is_taken_away():
    row = torch.tensor([[BOS, 5, PAD, 5, EOS, PAD]])
    batch = PackedBatch.from_mapping(
        {"input_ids": row, "sequence_ids": ["x"]}, batch_idx=0, first_ordinal=0
    )
    assert batch.input_ids.tolist() == [BOS, 5, PAD, 5, EOS]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_ids": ["x"]}, "batch 4 has 1 ids, 1 ordinals and 2 sequences"),
        ({"sequence_ids": ["x", "y", "z"]}, "3 ids, 3 ordinals and 2 sequences"),
        ({"ordinals": [1]}, "2 ids, 1 ordinals and 2 sequences"),
        ({"cu_seqlens": [0, 5, 7]}, "8 tokens, but cu_seqlens goes from 0 to 7"),
        ({"cu_seqlens": [1, 5, 8]}, "8 tokens, but cu_seqlens goes from 1 to 8"),
        ({"cu_seqlens": [0, 6, 8]}, "sequence 'y' of batch 4 has no residue: 2 tokens"),
        ({"cu_seqlens": [0, 9, 8]}, "sequence 'y' of batch 4 has no residue: -1 tokens"),
        ({"cu_seqlens": None}, "1 dimensions and no cu_seqlens"),
        (
            {"input_ids": torch.full((2, 4), PAD), "cu_seqlens": None},
            "sequence 'x' of batch 4 has no residue: 0 tokens",
        ),
    ],
)
def test_mapping_that_does_not_add_up_is_refused(changed, message):
    mapping = {
        "input_ids": pack("MKV", "A").input_ids,
        "cu_seqlens": [0, 5, 8],
        "sequence_ids": ["x", "y"],
    }
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_mapping(mapping | changed, batch_idx=4, first_ordinal=0)


def test_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence 's1' of batch 3 has no residue"):
        pack("MKV", "")


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="0 ids, 0 ordinals and 0 sequences"):
        pack()


@pytest.mark.parametrize("token_budget", [1, 6, 11, 1000])
def test_split_keeps_every_sequence_in_order_with_its_id(token_budget):
    sequences = ["MKV", "ACDEFG", "W", "LLLL"]
    batch = pack_batch(sequences, sequence_ids=list("abcd"), ordinals=[4, 9, 2, 7], batch_idx=3)
    pieces = batch.split(token_budget)
    assert [id_ for piece in pieces for id_ in piece.sequence_ids] == list("abcd")
    assert [ordinal for piece in pieces for ordinal in piece.ordinals.tolist()] == [4, 9, 2, 7]
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), batch.input_ids)
    assert all(piece.num_tokens <= token_budget or piece.num_sequences == 1 for piece in pieces)
