"""Input policies, and counts of the records they apply to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from vnp_lib.inputs.records import (
    CharacterCounts,
)

if TYPE_CHECKING:  # whoever reads a dataset does without what reads options
    from vnp_lib.config import (
        DuplicateIds,
        EmbedConfig,
        InvalidResidues,
        LongSequences,
        Translation,
    )


VIRNUCPRO_RESIDUES = 1024
"""Residues over which VirNucPro takes the mean, however long a sequence is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPolicy:
    """How the input is read, and what becomes of records that cannot be taken as they are. The names are `EmbedConfig`'s."""

    id_column: str = "id"
    sequence_column: str = "sequence"
    invalid_residues: InvalidResidues = "error"
    duplicate_ids: DuplicateIds = "error"
    dedup: bool = True
    long: LongSequences = "whole"
    max_length: int | None = None  # residues
    min_length: int | None = None  # residues, before any is cut
    allow_empty: bool = False
    translate: Translation | None = None
    chunk_length: int = 500  # nucleotides

    @classmethod
    def of(cls, config: EmbedConfig) -> InputPolicy:
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})

    def identity(self) -> dict[str, Any]:
        """What of it decides a run's rows, beside the sequences that it leads to: those are told apart by themselves."""
        identity: dict[str, Any] = {}
        if self.long == "truncate":
            identity["long_policy"] = f"truncate:{self.max_length}"
        if self.translate:
            identity["translation"] = f"{self.translate}:{self.chunk_length}"
        if not self.dedup:
            identity["dedup"] = False
        return identity


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCounts:
    """What was read, and what was done to it."""

    num_skipped: int = 0  # records
    num_cut: int = 0  # sequences
    num_windowed: int = 0  # sequences whose mean is taken over windows
    num_in_part: int = (
        0  # sequences whose mean is that of their first residues, as VirNucPro takes it
    )
    num_renamed: int = 0  # records whose id another one before had
    num_duplicates: int = (
        0  # sequences that are not computed again, since they are identical to one before
    )
    letters: CharacterCounts = field(default_factory=CharacterCounts)

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> InputCounts:
        return cls(**counts | {"letters": CharacterCounts(**counts["letters"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __add__(self, other: InputCounts) -> InputCounts:
        return InputCounts(
            **{
                each.name: getattr(self, each.name) + getattr(other, each.name)
                for each in fields(self)
            }
        )

    @property
    def is_altered(self) -> bool:
        """Whether a record has no row, or one that is not simply that of the sequence as it stands there."""
        return replace(self, num_duplicates=0).describe() != ""

    def describe(self) -> str:
        """Say what was done to the input: `3 records skipped, 12 letters read as unknown`; "" if nothing."""
        done = (
            (self.num_skipped, "record", "skipped"),
            (self.num_renamed, "id", "renamed"),
            (self.num_cut, "sequence", "cut short"),
            (self.num_windowed, "sequence", "averaged over windows"),
            (
                self.num_in_part,
                "sequence",
                f"averaged over the first {VIRNUCPRO_RESIDUES:,} residues",
            ),
            (self.letters.mapped + self.letters.read_as_unknown, "letter", "read as unknown"),
            (self.num_duplicates, "duplicate", "not computed again"),
        )
        return ", ".join(
            f"{count:,} {what if count == 1 else what + 's'} {became}"
            for count, what, became in done
            if count
        )
