"""Kinds of files by their first bytes, and how to get at the FASTA in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Size of the first part of a file, by which its kind is recognised.
START_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A kind of file that is no FASTA."""

    name: str  # with its article
    advice: str  # a clause; {path} is the file
    start: re.Pattern[bytes]  # of its content


def _starting(start: bytes, name: str, advice: str) -> FileKind:
    return FileKind(name=name, advice=advice, start=re.compile(start, re.DOTALL))


_UNPACK = "unpack it first, with `{tool} {{path}}`, and give the FASTA files in it"
_EXPORT = (
    "write the sequences as FASTA, or as a .csv file with a column of ids and one of sequences"
)
_DOCUMENT = "copy the sequences into a plain text file"
_AS_TABLE = "save the sheet as .csv and give that"
_WITH_BIOPYTHON = (
    "convert it first, for example with Biopython: "
    "SeqIO.convert('{{path}}', '{format}', 'proteins.fasta', 'fasta')"
)
_ALIGNMENT = (
    "convert it to FASTA and remove the gaps, for example with `seqmagick convert --ungap` or "
    "Biopython's AlignIO"
)
_ANNOTATION = "give the proteins that go with it, as the .faa file of the same annotation"
_HITS = "give the FASTA file of what was found"
_NOT_TEXT = "this holds no sequences; give the FASTA file that goes with it"
_WEIGHTS = "weights go to --weights, and FASTA files to --fasta"
_STRUCTURE = (
    "extract the sequences from it first, for example with Biopython: "
    "SeqIO.convert('{{path}}', '{format}', 'x.fasta', 'fasta')"
)

_ZIP = re.compile(rb"PK")

# Binary kinds, and text in markup that is certainly something else.
_SIGNATURES = (
    _starting(
        rb"\x1f\x8b", "a gzip file within a compressed one", "decompress it once, with `zcat`"
    ),
    _starting(
        rb"BZh[1-9]1AY&SY",
        "a bzip2 file within a compressed one",
        "decompress it once, with `bzcat`",
    ),
    _starting(
        rb"\xfd7zXZ\0", "an xz file within a compressed one", "decompress it once, with `xzcat`"
    ),
    _starting(
        rb"\x28\xb5\x2f\xfd",
        "a zstd file within a compressed one",
        "decompress it once, with `zstdcat`",
    ),
    _starting(rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive", _UNPACK.format(tool="unzip")),
    _starting(rb".{257}ustar", "a tar archive", _UNPACK.format(tool="tar -xf")),
    _starting(rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format(tool="7z x")),
    _starting(rb"Rar!\x1a\x07", "a rar archive", _UNPACK.format(tool="unrar x")),
    _starting(
        rb"\x1f[\x9d\xa0]",
        "a file of `compress` (.Z)",
        "decompress it first, with `zcat {path} > proteins.fasta`",
    ),
    _starting(
        rb"(?:\x04\x22\x4d\x18|\x02\x21\x4c\x18)",
        "an lz4 file",
        "decompress it first, with `lz4 -dc {path} > proteins.fasta`",
    ),
    _starting(
        rb"LZIP[\0\x01]",
        "an lzip file",
        "decompress it first, with `lzip -dc {path} > proteins.fasta`",
    ),
    _starting(
        rb"\x5d\0\0.{10}",
        "an lzma file",
        "decompress it first, with `lzma -dc {path} > proteins.fasta`",
    ),
    _starting(
        rb"\xff\x06\0\0sNaPpY", "a snappy file", "decompress it first, and give the FASTA file"
    ),
    _starting(rb"!<arch>\n", "an archive of `ar`", _UNPACK.format(tool="ar x")),
    _starting(rb"07070[127]", "a cpio archive", _UNPACK.format(tool="cpio -i <")),
    _starting(rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    _starting(
        rb"PAR1", "a Parquet file", "have its name end in .parquet, and it is read as a table"
    ),
    _starting(
        rb"(?:ARROW1|\xff{4}.\0\0\0)",
        "an Arrow or Feather file",
        "save it as Parquet, and give that",
    ),
    _starting(rb"FEA1", "a Feather file", "save it as Parquet, and give that"),
    _starting(rb"ORC[^A-Za-z\s]", "an ORC file", "save it as Parquet, and give that"),
    _starting(rb"Obj\x01", "an Avro file", "save it as Parquet, and give that"),
    _starting(
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.xls, .doc)", _AS_TABLE
    ),
    _starting(rb"%PDF-", "a PDF document", _DOCUMENT),
    _starting(rb"%!PS", "a PostScript document", _DOCUMENT),
    _starting(rb"\{\\rtf", "an RTF document", _DOCUMENT),
    _starting(rb"(?:\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|BM.{4}\0{4})", "a picture", _NOT_TEXT),
    _starting(rb"SQLite format 3\0", "an SQLite database", _EXPORT),
    _starting(
        rb"(?:\x7fELF|MZ.{2,}PE\0\0|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe)",
        "a program",
        _NOT_TEXT,
    ),
    _starting(rb"\x93NUMPY", "a NumPy array", _NOT_TEXT),
    _starting(rb"\x80[\x02-\x05]", "a Python pickle", _NOT_TEXT),
    _starting(rb".{8}\{\"__metadata__|.{2}\0{6}\{\"", "a safetensors file", _WEIGHTS),
    _starting(
        rb"(?:RDX|RDA)[23]\n",
        "a file of R",
        "write the sequences from R with `Biostrings::writeXStringSet`",
    ),
    _starting(
        rb"BAM\x01", "a BAM file", "convert it first, with `samtools fasta {path} > reads.fasta`"
    ),
    _starting(
        rb"CRAM[\x01-\x04]",
        "a CRAM file",
        "convert it first, with `samtools fasta {path} > reads.fasta`",
    ),
    _starting(rb"BCF\x02", "a BCF file", _NOT_TEXT),
    _starting(
        rb"\x43\x27\x41\x1a|\x1a\x41\x27\x43",
        "a 2bit file",
        "convert it first, with `twoBitToFa {path} genome.fasta`",
    ),
    _starting(
        rb"\x6d\x18\xee\x15\xa4\xf8\x4a\x02",
        "a DIAMOND database",
        "convert it first, with `diamond getseq -d {path} > x.fasta`",
    ),
    _starting(
        rb"\0\0\0[\x04\x05]\0\0\0[\0\x01]",
        "a part of a BLAST database",
        "convert it first, with `blastdbcmd -db NAME -entry all > proteins.fasta`",
    ),
    _starting(
        rb"(?:[A-Za-z*]+\n\0)+",
        "an MMseqs2 database",
        "convert it first, with `mmseqs convert2fasta {path} proteins.fasta`",
    ),
    _starting(rb"\xb1HMMERb|HMMER[23]", "an HMMER profile", _NOT_TEXT),
    _starting(
        rb"\s*version https://git-lfs\.github\.com",
        "a Git LFS pointer, which stands for the file",
        "fetch the file itself with `git lfs pull`",
    ),
    _starting(
        rb"\s*version https://hawser\.",
        "a Git LFS pointer, which stands for the file",
        "fetch it with `git lfs pull`",
    ),
    _starting(
        rb"\s*[./]*(?:git/)?annex/objects/",
        "a git-annex pointer, which stands for the file",
        "fetch it with `git annex get`",
    ),
    _starting(
        rb"(?:\xef\xbb\xbf|\s)*(?i:<!doctype html|<html|<head|<!--.{0,500}<html)",
        "a web page, often an error that a server answered with",
        "open it to see what it says, and download the file again",
    ),
)

# White space and the bytes of byte order marks.
_BLANK = b"\xef\xbb\xbf \t\r\n"

# Documents and data that are zip archives, by the name of a file in them.
_ZIPPED = (
    (re.compile(r"xl/"), FileKind(name="an Excel workbook", advice=_AS_TABLE, start=_ZIP)),
    (re.compile(r"word/"), FileKind(name="a Word document", advice=_DOCUMENT, start=_ZIP)),
    (
        re.compile(r"ppt/|\[Content_Types\]\.xml$"),
        FileKind(name="an Office document", advice=_DOCUMENT, start=_ZIP),
    ),
    (
        re.compile(r"Index/.*\.iwa$"),
        FileKind(name="a document of Pages or Numbers", advice=_AS_TABLE, start=_ZIP),
    ),
    (
        re.compile(r"META-INF/manifest\.xml$|content\.xml$"),
        FileKind(
            name="a document of LibreOffice",
            advice="save it as .csv or as plain text, and give that",
            start=_ZIP,
        ),
    ),
    (
        re.compile(r"[^/]+\.npy$"),
        FileKind(name="a file of NumPy arrays", advice=_NOT_TEXT, start=_ZIP),
    ),
    (
        re.compile(r"[^/]+/data\.pkl$"),
        FileKind(name="a file of PyTorch", advice=_WEIGHTS, start=_ZIP),
    ),
)

# Text of other formats whose first line would be a comment in FASTA.
_DIRECTIVES = (
    _starting(rb"#\s*STOCKHOLM", "an alignment in Stockholm format", _ALIGNMENT),
    _starting(rb"(?i:#NEXUS)", "a NEXUS file", _ALIGNMENT),
    _starting(rb"(?i:#mega)", "an alignment in MEGA format", _ALIGNMENT),
    _starting(rb"##fileformat=VCF", "a VCF file", _NOT_TEXT),
    _starting(
        rb"#\s+(?:hmm|phmmer|jackhmmer)",
        "a report of HMMER",
        "give the FASTA file of what was found",
    ),
    _starting(
        rb";[^\n]*\n(?:;[^\n]*\n)*\s*[A-Za-z*]",
        "FASTA of an old kind, whose headers begin with ';'",
        "replace the first ';' of each record by '>'",
    ),
    _starting(rb"##gff-version", "a GFF file", _ANNOTATION),
    _starting(rb"# T?BLAST[NPX]", "a report of BLAST", _HITS),
)

# Text of other formats, by its first line that would be no comment.
_TEXTS = (
    _starting(
        rb"<\?xml|<[A-Za-z!]", "XML", "download the FASTA version of it, or convert it first"
    ),
    _starting(
        rb"[\[{]\s*[\]}\"\[{0-9-]|[\[{]\s*\Z",
        "JSON",
        "write each sequence of it as a record: a line of '>' and its id, then the sequence",
    ),
    _starting(rb"LOCUS\s", "a GenBank file", _WITH_BIOPYTHON.format(format="genbank")),
    _starting(
        rb"ID   \S",
        "an EMBL or UniProt flat file",
        "download it as FASTA, or convert it first with Biopython (embl, swiss)",
    ),
    _starting(
        rb"(?i:clustal|muscle \(|probcons|t-coffee|mafft)[^\n]*\n",
        "an alignment in Clustal format",
        _ALIGNMENT,
    ),
    _starting(
        rb"!!(?:AA|NA)_|PileUp|[^\n>]{0,200}\n?[^\n>]*MSF:\s*\d",
        "an alignment in GCG's MSF format",
        _ALIGNMENT,
    ),
    _starting(
        rb"\d+[ \t]+\d+[ \t]*[A-Za-z]*[ \t]*\r?\n", "an alignment in PHYLIP format", _ALIGNMENT
    ),
    _starting(
        rb"(?:HEADER    |TITLE     |COMPND    |REMARK  |CRYST1|MODEL     |"
        rb"(?:ATOM  |HETATM)[ \d]{5})",
        "a PDB file",
        _STRUCTURE.format(format="pdb-atom"),
    ),
    _starting(rb"data_\S*\s", "an mmCIF file", _STRUCTURE.format(format="cif-atom")),
    _starting(
        rb"@(?:HD|SQ|RG|PG|CO)\t",
        "a SAM file",
        "convert it first, with `samtools fasta {path} > reads.fasta`",
    ),
    _starting(
        rb"[^\t\n>]+\t[^\t\n]+\t[^\t\n]+\t\d+\t\d+\t[\d.eE-]+\t[-+.?]\t",
        "a GFF or GTF file",
        _ANNOTATION,
    ),
    _starting(
        rb"[^\s>]+\t\d+\t\d+\t\d+\t\d+\r?\n",
        "an index of `samtools faidx`",
        "give the FASTA file that it is the index of",
    ),
    _starting(rb"[^\s>]+\t\d+\t\d+(?:\t|\r?\n)", "a BED file", _NOT_TEXT),
    _starting(rb"(?:P?BLAST[NPX]|TBLAST[NX]|Query= )", "a report of BLAST", _HITS),
    _starting(rb"\(.{0,2000}\)[^()\n]*;\s", "a tree in Newick format", _NOT_TEXT),
    _starting(
        rb"[0-9a-f]{32,64} [ *]\S", "a list of checksums", "give the FASTA file that goes with it"
    ),
    _starting(
        rb"(?:Seq-entry|Seq-submit|Bioseq-set) ?::=", "an ASN.1 file", "download it as FASTA"
    ),
    _starting(
        rb"(?:[^\t\n>]+\t)+[^\t\n]*\n[^\t\n]+\t|(?:[^,\n>]+,)+[^,\n]*\n[^,\n]+,|"
        rb"(?:[^;\n>]+;)+[^;\n]*\n[^;\n]+;",
        "a table, by its looks",
        "have its name end in .csv (with commas) or .tsv (with tabs), and name the columns with "
        "--id-column and --sequence-column",
    ),
    _starting(
        rb"(?:[A-Z*.-][A-Z*.\s-]+|[a-z*.-][a-z*.\s-]+)\Z",
        "a list of sequences without headers, by its looks",
        "put a line of '>' and an id before each sequence",
    ),
)

_COMMENTS = re.compile(rb"\A(?:[#;][^\n]*\n|\s|\xef\xbb\xbf)*")


def is_fastq(start: bytes) -> bool:
    """Return whether a file is FASTQ, by its first bytes."""
    return start.lstrip(_BLANK).startswith(b"@") and kind_of(start) is None


def binary_kind_of(start: bytes) -> FileKind | None:
    """Return the kind of a file, by its first bytes, if it is certainly no plain text."""
    return next((kind for kind in _SIGNATURES if kind.start.match(start)), None)


def zip_kind_of(names: Sequence[str]) -> FileKind | None:
    """Return the kind of a document or of data that is a zip archive of such files, if any."""
    return next((kind for part, kind in _ZIPPED if any(map(part.match, names))), None)


def kind_of(start: bytes) -> FileKind | None:
    """Return the kind of a file by its first bytes, decompressed; None if it may be FASTA."""
    if kind := binary_kind_of(start):
        return kind
    text = start.replace(b"\r\n", b"\n").replace(b"\r", b"\n").lstrip(_BLANK)
    if kind := next((kind for kind in _DIRECTIVES if kind.start.match(text)), None):
        return kind
    text = _COMMENTS.sub(b"", text, count=1)
    return (
        None
        if text.startswith((b">", b"#", b";"))
        else next((kind for kind in _TEXTS if kind.start.match(text)), None)
    )
