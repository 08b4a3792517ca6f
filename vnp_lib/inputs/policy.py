"""Input policies, and counts of the records they apply to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from vnp_lib.inputs.records import CharacterCounts

# Readers of a dataset import this module; they need no options, nor what parses them.
if TYPE_CHECKING:
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
    """How the input is read, and what to do with records that cannot be used as they are.

    The names are those of `EmbedConfig`.
    """

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
        """Return the settings that decide a run's rows in other ways than by its sequences."""
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
    """Counts of what was done to the input. The names are keys in `plan.json`."""

    num_skipped: int = 0  # records
    num_cut: int = 0  # sequences
    num_windowed: int = 0  # sequences whose mean is taken over windows
    num_in_part: int = 0  # sequences whose mean is over their first residues, as in VirNucPro
    num_renamed: int = 0  # records with the id of an earlier one
    num_duplicates: int = 0  # sequences identical to an earlier one, not computed again
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
        """Whether some record has no row, or a row of another sequence than its own."""
        return replace(self, num_duplicates=0).describe() != ""

    def describe(self) -> str:
        """Describe what was done to the input: `3 records skipped, 12 residues read as unknown`.

        Return "" if nothing was.
        """
        in_part = f"averaged over the first {VIRNUCPRO_RESIDUES:,} residues"
        num_unknown = self.letters.mapped + self.letters.read_as_unknown
        done = (
            (self.num_skipped, "record", "skipped"),
            (self.num_renamed, "id", "renamed"),
            (self.num_cut, "sequence", "cut short"),
            (self.num_windowed, "sequence", "averaged over windows"),
            (self.num_in_part, "sequence", in_part),
            (num_unknown, "residue", "read as unknown"),
            (self.num_duplicates, "duplicate", "not computed again"),
        )
        return ", ".join(
            f"{count:,} {what if count == 1 else what + 's'} {how}"
            for count, what, how in done
            if count
        )
