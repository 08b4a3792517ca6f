"""Compressed and joined files, files in other encodings, and files of other kinds."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from backports import zstd
from Bio import SeqIO
from Bio.Align import MultipleSeqAlignment
from Bio.AlignIO import write as write_alignment
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from vnp_lib.errors import FastaError
from vnp_lib.inputs.chunks import InputChunk
from vnp_lib.inputs.locations import RecordLocator
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.sources import Source

FASTA = b">a one\nMKVLAT\n>b\nMKW\n"
RECORDS = [("a", "MKVLAT"), ("b", "MKW")]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def chunks_of(path: Path, **policy: Any) -> list[InputChunk]:
    return list(read_records(Source(path=path, name=str(path)), InputPolicy(**policy)))


def records_of(path: Path, **policy: Any) -> list[tuple[str, str]]:
    chunks = chunks_of(path, **policy)
    return [
        record
        for each in chunks
        for record in zip(each.usable.ids, each.usable.sequences, strict=True)
    ]


def refusal(path: Path, **policy: Any) -> str:
    """Return the message that a file is refused with, which is one line."""
    with pytest.raises(FastaError) as caught:
        records_of(path, **policy)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestEncodings:
    @pytest.mark.parametrize(
        "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
    )
    @pytest.mark.parametrize("name", ["x.fasta", "x.csv"])
    def test_text_is_read_in_every_encoding_of_unicode(
        self, tmp_path: Path, encoding: str, name: str
    ) -> None:
        text = ">β1 é\nMKV\n>b\nMKW\n" if name == "x.fasta" else "id,sequence\nβ1 é,MKV\nb,MKW\n"
        if name == "x.csv" and encoding in ("utf-16-le", "utf-16-be"):
            text = "\ufeff" + text  # without it, nothing tells
        path = write(tmp_path / name, text.encode(encoding))
        assert records_of(path) == [("β1", "MKV"), ("b", "MKW")]
        assert records_of(write(path, gzip.compress(path.read_bytes()))) == [
            ("β1", "MKV"),
            ("b", "MKW"),
        ]

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("\ufeff>a\nMKV\n\ufeff>b\nMKW\n", id="at the joint of files"),
            pytest.param("\ufeff\ufeff>a\nMKV\n>b\nMKW\n", id="twice"),
            pytest.param(">\ufeffa\nMKV\n> \ufeff b\nMKW\n", id="in a header"),
            pytest.param(">a\ufeff x\nMKV\n>b\ufeff\nMKW\n", id="after an id"),
            pytest.param(">a\n\ufeffMK\ufeffV\n>b\nMKW\ufeff\n", id="in a sequence"),
            pytest.param("\n \ufeff\n>a\nMKV\n\ufeff\n>b\nMKW", id="on a line of its own"),
            pytest.param(
                "\ufeff# a comment\n>a\nMKV\n\ufeff; another\n>b\nMKW\n", id="before a comment"
            ),
        ],
    )
    def test_byte_order_marks_do_not_matter(self, tmp_path: Path, text: str) -> None:
        path = write(tmp_path / "x.fasta", text.encode())
        assert records_of(path) == [("a", "MKV"), ("b", "MKW")]
        assert (
            RecordLocator(Source(path=path, name="x")).find(1)["line"]
            == text[: text.index("b\n" if "b\n" in text else "b\ufeff")].count("\n") + 1
        )

    @pytest.mark.parametrize(
        "text",
        [
            ">a\rMK\rV\r>b\rMKW",
            ">a\r\nMKV\r\n>b\r\nMKW\r\n",
            ">a\nMK\rV\r\n>b\rMKW\n\r",
            "\r\r>a\r\r\nMKV\n\n\r>b\nMKW\r\r",
            "; x\r>a\r;y\rMKV\r#z\r>b\rMKW\r",
        ],
    )
    def test_lines_end_in_every_way(self, tmp_path: Path, text: str) -> None:
        assert records_of(write(tmp_path / "x.fasta", text.encode())) == [
            ("a", "MKV"),
            ("b", "MKW"),
        ]

    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("length", [131_070, 131_071, 131_072, 131_073, 262_143, 300_000])
    def test_line_ends_are_found_at_ends_of_blocks(
        self, tmp_path: Path, newline: str, length: int
    ) -> None:
        """The first line is as long as a block, or one character longer or shorter."""
        first = "M" * (length - len(f">a{newline}"))
        text = newline.join([">a", first, "K", ">β", "MKW", ""])
        path = write(tmp_path / "x.fasta", text.encode())
        assert records_of(path) == [("a", first + "K"), ("β", "MKW")]
        assert RecordLocator(Source(path=path, name="x")).find(1) == {"line": 4}

    @pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman"])
    def test_text_in_another_encoding_is_refused_by_its_line(
        self, tmp_path: Path, encoding: str
    ) -> None:
        text = (
            "# a comment\n>a \ufffd\nMKV\n>b\nMK\n>é\nMKV\n"  # U+FFFD itself is text like any other
        )
        data = b"".join(
            line.encode(encoding if "é" in line else "utf-8") + b"\n"
            for line in text.split("\n")[:-1]
        )
        assert refusal(write(tmp_path / "x.fasta", data)).startswith(
            f"{tmp_path / 'x.fasta'}, line 6: this is not UTF-8 text; convert it first"
        )

    def test_utf16_that_is_cut_is_refused(self, tmp_path: Path) -> None:
        assert "this is not the utf-16" in refusal(
            write(tmp_path / "x.fasta", FASTA.decode().encode("utf-16")[:-1])
        )


class TestCompression:
    @pytest.mark.parametrize("extension", COMPRESSORS)
    @pytest.mark.parametrize("rest", [b"garbage", b"\0" * 10_000, b"\0garbage", b"x"])
    def test_bytes_after_the_end_are_ignored_with_one_warning(
        self, tmp_path: Path, extension: str, rest: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(tmp_path / "x.fasta", COMPRESSORS[extension](FASTA) + rest)
        with caplog.at_level(logging.WARNING):
            assert records_of(path) == records_of(path) == RECORDS
        assert caplog.messages == [
            f"{path}: bytes follow the end of the compressed data, and are ignored"
        ]

    @pytest.mark.parametrize("extension", COMPRESSORS)
    def test_parts_are_read_to_the_end(self, tmp_path: Path, extension: str) -> None:
        compress = COMPRESSORS[extension]
        parts = [b">a\nMK", b"", b"V\n>b\nMK", b"W\n", b""]
        assert records_of(write(tmp_path / "x.fasta", b"".join(map(compress, parts)))) == [
            ("a", "MKV"),
            ("b", "MKW"),
        ]

    @pytest.mark.parametrize("extension", COMPRESSORS)
    @pytest.mark.parametrize(
        "joint",
        [
            pytest.param(lambda part, text: part + text, id="text that is not compressed"),
            pytest.param(
                lambda part, text: part + b"\xef\xbb\xbf" + text, id="text with a byte order mark"
            ),
            pytest.param(lambda part, text: part + b"junk" + part, id="bytes before a part"),
            pytest.param(
                lambda part, text: part + b"\0" * 300_000 + part, id="many bytes before a part"
            ),
            pytest.param(
                lambda part, text: part + b"?" + part[1:], id="a part whose first byte is damaged"
            ),
            pytest.param(
                lambda part, text: part + part[:1] + b"?" + part[2:],
                id="a part whose second byte is damaged",
            ),
            pytest.param(lambda part, text: part + part[:-3], id="a part that is cut"),
            pytest.param(lambda part, text: part + part[:4], id="a part of a few bytes"),
        ],
    )
    def test_records_after_compressed_data_are_never_dropped(
        self, tmp_path: Path, extension: str, joint: Callable[[bytes, bytes], bytes]
    ) -> None:
        path = write(tmp_path / "x.fasta", joint(COMPRESSORS[extension](FASTA), b">c\nMK\n"))
        assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")

    def test_parts_of_other_kinds_are_never_dropped(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.fasta", gzip.compress(FASTA) + zstd.compress(b">c\nMK\n"))
        assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")

    def test_empty_frames_of_zst_are_skipped(self, tmp_path: Path) -> None:
        frame = b"\x5d\x2a\x4d\x18\x03\0\0\0abc"
        path = write(
            tmp_path / "x.fasta",
            frame + zstd.compress(b">a\nMKV\n") + frame + zstd.compress(b">b\nMKW\n"),
        )
        assert records_of(path) == [("a", "MKV"), ("b", "MKW")]

    def test_high_compression_does_not_fill_memory(self, tmp_path: Path) -> None:
        """A 200 MB sequence in 20 kB would need it; comments of this size are read in pieces."""
        line = b"# " + b"x" * 998 + b"\n"
        path = write(tmp_path / "x.fasta", zstd.compress(line * 200_000 + FASTA))
        assert records_of(path) == RECORDS


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


class TestZip:
    @pytest.mark.parametrize(
        "members",
        [
            pytest.param(
                {"ncbi_dataset/data/protein.faa": FASTA, "README.md": b"x", "md5sum.txt": b"y"},
                id="NCBI",
            ),
            pytest.param(
                {"2.faa": b">a one\nMKVLAT", "1.fasta": b">b\nMKW"}, id="several, without line ends"
            ),
            pytest.param({"x.faa.gz": gzip.compress(FASTA)}, id="compressed within"),
            pytest.param({"sequences.txt": FASTA}, id="one file of any name"),
            pytest.param(
                {"x.faa": FASTA, "__MACOSX/._x.faa": b"\0\5\x16\7", ".DS_Store": b"\0"},
                id="of a Mac",
            ),
            pytest.param({"d/": b"", "d/x.pep": FASTA}, id="with directories"),
            pytest.param({"empty.faa": b"", "x.faa": FASTA}, id="with an empty file"),
        ],
    )
    def test_the_fasta_files_in_it_are_read_in_their_order(
        self, tmp_path: Path, members: dict[str, bytes]
    ) -> None:
        assert records_of(write(tmp_path / "x.zip", zipped(members))) == RECORDS

    @pytest.mark.parametrize(
        "compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    def test_it_may_be_compressed_in_other_ways(self, tmp_path: Path, compression: int) -> None:
        assert records_of(write(tmp_path / "x", zipped({"x.fa": FASTA}, compression))) == RECORDS

    def test_a_table_in_it_is_read_by_the_name_of_the_archive(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.csv.zip", zipped({"x.csv": b"id,sequence\na,MKV\n"}))
        assert records_of(path) == [("a", "MKV")]

    @pytest.mark.parametrize(
        ("members", "what"),
        [
            (
                {"a.txt": b"x", "b/c.md": b"y"},
                "there is no FASTA file in this zip archive (it holds a.txt, c.md)",
            ),
            ({}, "there is no FASTA file in this zip archive (it is empty)"),
            (
                {"p.faa": FASTA, "g.fna": b">g\nACGT\n"},
                "there are proteins and nucleotides in this zip archive",
            ),
            (
                {"[Content_Types].xml": b"", "xl/workbook.xml": b""},
                "this is not FASTA but an Excel workbook; save",
            ),
            (
                {"[Content_Types].xml": b"", "word/document.xml": b""},
                "this is not FASTA but a Word document; copy",
            ),
            (
                {"mimetype": b"", "content.xml": b""},
                "this is not FASTA but a document of LibreOffice",
            ),
            ({"Index/Document.iwa": b""}, "this is not FASTA but a document of Pages or Numbers"),
            ({"x.png": b"\x89PNG\r\n\x1a\n"}, "this is not FASTA but a picture"),
        ],
    )
    def test_other_archives_are_named(
        self, tmp_path: Path, members: dict[str, bytes], what: str
    ) -> None:
        path = write(tmp_path / "x.zip", zipped(members))
        assert refusal(path).startswith(f"{path}: {what}")

    def test_an_encrypted_one_is_named(self, tmp_path: Path) -> None:
        data = bytearray(zipped({"x.faa": FASTA}))
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.index(signature) + offset] |= 1
        path = write(tmp_path / "x.zip", bytes(data))
        assert (
            refusal(path)
            == f"{path}: this zip archive is encrypted; unpack it first, with `unzip {path}`"
        )

    def test_one_of_an_unknown_compression_is_named(self, tmp_path: Path) -> None:
        data = bytearray(zipped({"x.faa": FASTA}))
        for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            data[data.index(signature) + offset] = 9
        assert "has a compression that is not supported" in refusal(
            write(tmp_path / "x.zip", bytes(data))
        )

    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_one_that_is_cut_is_refused(self, tmp_path: Path, kept: float) -> None:
        data = zipped({"x.faa": FASTA * 100}, zipfile.ZIP_STORED)
        path = write(tmp_path / "x.zip", data[: int(len(data) * kept)])
        assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")

    def test_one_whose_bytes_have_changed_is_refused(self, tmp_path: Path) -> None:
        data = zipped({"x.faa": FASTA * 100}, zipfile.ZIP_STORED).replace(b"MKVLAT", b"MKVLAV", 1)
        path = write(tmp_path / "x.zip", data)
        assert refusal(path).startswith(
            f"{path}: the compressed file is cut short or damaged (Bad CRC"
        )


def tarred(mode: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("x.faa")
        member.size = len(FASTA)
        archive.addfile(member, io.BytesIO(FASTA))
    return data.getvalue()


def hdf5() -> bytes:
    with h5py.File(data := io.BytesIO(), "w") as file:
        file["x"] = [1]
    return data.getvalue()


def sqlite() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (x)")
    data = connection.serialize()
    connection.close()
    return data


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    save(data := io.BytesIO())
    return data.getvalue()


TABLE = pa.table({"id": ["a"], "sequence": ["MK"]})
ALIGNED = MultipleSeqAlignment(
    [
        SeqRecord(Seq(text), id=name, annotations={"molecule_type": "protein"})
        for name, text in (("a", "MK-V"), ("b", "MKWV"))
    ]
)


def biopython(name: str) -> bytes:
    """Return an alignment or records as Biopython writes them."""
    text = io.StringIO()
    write_alignment(ALIGNED, text, name) if name in (
        "clustal",
        "stockholm",
        "phylip",
        "nexus",
    ) else SeqIO.write(list(ALIGNED), text, name)
    return text.getvalue().encode()


BINARY: dict[str, tuple[bytes, str]] = {
    "tar": (tarred("w"), "a tar archive; unpack it first, with `tar -xf x.fasta`"),
    "tar.gz": (tarred("w:gz"), "a tar archive"),
    "tar.bz2": (tarred("w:bz2"), "a tar archive"),
    "tar.xz": (tarred("w:xz"), "a tar archive"),
    "gzip within gzip": (
        gzip.compress(gzip.compress(FASTA)),
        "a gzip file within a compressed one; decompress it once",
    ),
    "zip within gzip": (gzip.compress(zipped({"x.faa": FASTA})), "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "rar": (b"Rar!\x1a\x07\x01\0", "a rar archive"),
    "compress": (
        b"\x1f\x9d\x90>\xc2\xa0",
        "a file of `compress` (.Z); decompress it first, with `zcat x.fasta",
    ),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40", "an lz4 file"),
    "lzip": (b"LZIP\x01\x0c", "an lzip file"),
    "lzma": (lzma.compress(FASTA, format=lzma.FORMAT_ALONE), "an lzma file"),
    "HDF5": (hdf5(), "an HDF5 file; write the sequences as FASTA"),
    "SQLite": (sqlite(), "an SQLite database"),
    "Parquet": (
        saved(lambda file: pq.write_table(TABLE, file)),
        "a Parquet file; have its name end in .parquet",
    ),
    "Feather": (
        saved(lambda file: pyarrow.feather.write_feather(TABLE, file)),
        "an Arrow or Feather file",
    ),
    "PyTorch": (
        saved(lambda file: torch.save({"x": 1}, file)),
        "a file of PyTorch; weights go to --weights",
    ),
    "safetensors": (safetensors.torch.save({"x": torch.zeros(1)}), "a safetensors file"),
    "NumPy": (saved(lambda file: np.save(file, np.zeros(2))), "a NumPy array"),
    "NumPy arrays": (saved(lambda file: np.savez(file, x=np.zeros(2))), "a file of NumPy arrays"),
    "pickle": (pickle.dumps({"a": "MK"}), "a Python pickle"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0", "a picture"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture"),
    "old Office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.xls, .doc)"),
    "RTF": (b"{\\rtf1\\ansi >a", "an RTF document"),
    "ELF": (b"\x7fELF\x02\x01", "a program"),
    "BAM": (
        gzip.compress(b"BAM\x01\0\0"),
        "a BAM file; convert it first, with `samtools fasta x.fasta",
    ),
    "CRAM": (b"CRAM\x03\x00", "a CRAM file"),
    "DIAMOND": (b"\x6d\x18\xee\x15\xa4\xf8\x4a\x02\xa0", "a DIAMOND database"),
    "MMseqs2": (b"MKVLAT\n\0MKW\n\0", "an MMseqs2 database"),
    "BLAST": (b"\0\0\0\x05\0\0\0\x01\0", "a part of a BLAST database"),
    "R": (gzip.compress(b"RDX3\nX\n"), "a file of R"),
    "something else": (b"\x00\x01\x02\x03", "a binary file"),
}

TEXTS: dict[str, tuple[bytes, str]] = {
    "Clustal": (biopython("clustal"), "an alignment in Clustal format"),
    "MUSCLE": (
        b"MUSCLE (3.8) multiple sequence alignment\n\na  MK-V\n",
        "an alignment in Clustal format",
    ),
    "Stockholm": (biopython("stockholm"), "an alignment in Stockholm format"),
    "PHYLIP": (biopython("phylip"), "an alignment in PHYLIP format"),
    "NEXUS": (biopython("nexus"), "a NEXUS file"),
    "MSF": (
        b"PileUp\n\n x.msf MSF: 4 Type: P\n\n Name: a\n//\n\na MK.V\n",
        "an alignment in GCG's MSF format",
    ),
    "MSF of GCG": (
        b"!!AA_MULTIPLE_ALIGNMENT 1.0\n\n x.msf  MSF: 4\n",
        "an alignment in GCG's MSF format",
    ),
    "GenBank": (
        biopython("genbank"),
        "a GenBank file; convert it first, for example with Biopython",
    ),
    "EMBL": (biopython("embl"), "an EMBL or UniProt flat file"),
    "UniProt": (
        b"ID   CRAB_ANAPL   Reviewed;  174 AA.\nAC   Q05557;\n",
        "an EMBL or UniProt flat file",
    ),
    "tab": (biopython("tab"), "a table, by its looks"),
    "PDB": (b"HEADER    OXYGEN TRANSPORT    07-MAR-84   4HHB\n", "a PDB file"),
    "PDB without a header": (
        b"ATOM      1  N   MET A   1      27.340  24.430   2.614\n",
        "a PDB file",
    ),
    "mmCIF": (b"data_4HHB\n#\n_entry.id   4HHB\n", "an mmCIF file"),
    "SAM": (b"@HD\tVN:1.6\tSO:coordinate\n@SQ\tSN:a\tLN:4\n", "a SAM file"),
    "VCF": (b"##fileformat=VCFv4.3\n#CHROM\tPOS\n", "a VCF file"),
    "GFF": (
        b"##gff-version 3\nseq1\tx\tCDS\t1\t9\t.\t+\t0\tID=a\n##FASTA\n>seq1\nMKV\n",
        "a GFF file",
    ),
    "GTF": (b'seq1\tx\tCDS\t1\t9\t.\t+\t0\tgene_id "a";\n', "a GFF or GTF file"),
    "BED": (b"chr1\t1\t9\ta\n", "a BED file"),
    "fai": (b"a\t6\t7\t6\t7\nb\t3\t17\t3\t4\n", "an index of `samtools faidx`"),
    "BLAST report": (b"BLASTP 2.15.0+\n\nQuery= a\n", "a report of BLAST"),
    "BLAST with comments": (b"# BLASTP 2.15.0+\n# Query: a\na\tb\t99.0\n", "a report of BLAST"),
    "JSON": (b'{"id": "a", "sequence": "MKV"}\n', "JSON; write each sequence of it"),
    "JSON list": (b'\n[\n  {"id": "a"}\n]\n', "JSON"),
    "XML": (b'<?xml version="1.0"?>\n<uniprot>\n', "XML; download the FASTA version"),
    "web page": (
        b"\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
        "a web page, often an error",
    ),
    "web page under a byte order mark": (
        b"\xef\xbb\xbf<HTML><HEAD>\n",
        "a web page, often an error",
    ),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer, which stands for the file; fetch the file itself with `git lfs pull`",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s12--abc.fasta\n", "a git-annex pointer"),
    "Newick": (b"((a:0.1,b:0.2):0.3,c:0.4);\n", "a tree in Newick format"),
    "checksums": (b"d41d8cd98f00b204e9800998ecf8427e  x.faa\n", "a list of checksums"),
    "sequences alone": (
        b"MKVLAT\nMKW*\n\nMKV\n",
        "a list of sequences without headers, by its looks",
    ),
    "a sequence alone": (b"mkvlat", "a list of sequences without headers, by its looks"),
    "CSV": (b"id,sequence\na,MKV\n", "a table, by its looks; have its name end in .csv"),
    "CSV with semicolons": (b"id;sequence\na;MKV\n", "a table, by its looks"),
    "old FASTA": (
        b";LCBO - prolactin\n; bovine\nMDSKGSSQK\n",
        "FASTA of an old kind, whose headers begin with ';'",
    ),
    "FASTQ": (b"@r1\nACGT\n+\nIIII\n", ""),
}


class TestKinds:
    @pytest.mark.parametrize("name", BINARY)
    def test_a_binary_file_is_named_with_what_to_do(self, tmp_path: Path, name: str) -> None:
        data, what = BINARY[name]
        path = write(tmp_path / "x.fasta", data)
        message = refusal(path)
        assert message.startswith(
            f"{path}: this is not FASTA but {what.replace('x.fasta', str(path))}"
        )
        assert (
            message
            == refusal(path, invalid_residues="map")
            == refusal(path, invalid_residues="skip")
        )

    @pytest.mark.parametrize("name", [name for name in TEXTS if name != "FASTQ"])
    @pytest.mark.parametrize(
        "change", [bytes, lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\n \n" + text]
    )
    def test_another_format_of_text_is_named(
        self, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
    ) -> None:
        text, what = TEXTS[name]
        path = write(tmp_path / "x.fasta", gzip.compress(change(text)))
        assert refusal(path, invalid_residues="skip").startswith(
            f"{path}: this is not FASTA but {what}"
        )

    @pytest.mark.parametrize(
        "text",
        [
            b"# id, sequence\n# a, MKV\n>a x, y\nMKVLAT\n>b\nMKW\n",
            b"; id; sequence\n; a; MKV\n>a\nMKVLAT\n>b\nMKW\n",
            b"#\tid\tx\n#a\tb\tc\n\n>a\nMKVLAT\n>b\nMKW\n",
            b'>a {"id": 1}\nMKVLAT\n>b\nMKW\n',
            b"# LOCUS\n>a <html>\nMKVLAT\n>b\nMKW\n",
        ],
    )
    def test_fasta_that_looks_like_something_else_is_read(
        self, tmp_path: Path, text: bytes
    ) -> None:
        assert records_of(write(tmp_path / "x", text)) == RECORDS

    @pytest.mark.parametrize(
        ("name", "content", "what"),
        [
            (
                "x.csv",
                FASTA,
                "this is FASTA, by its looks, and no table; have its name end in .fasta",
            ),
            ("x.csv", TEXTS["web page"][0], "this is not FASTA but a web page"),
            ("x.csv", zipped({"xl/workbook.xml": b""}), "this is not FASTA but an Excel workbook"),
            ("x.tsv", hdf5(), "this is not FASTA but an HDF5 file"),
            ("x.parquet", TEXTS["Git LFS"][0], "this is not Parquet but a Git LFS pointer"),
            ("x.parquet", hdf5(), "this is not Parquet but an HDF5 file"),
        ],
    )
    def test_a_table_of_another_kind_than_its_name_says_is_named(
        self, tmp_path: Path, name: str, content: bytes, what: str
    ) -> None:
        path = write(tmp_path / name, content)
        assert refusal(path).startswith(f"{path}: {what}")

    def test_a_record_of_nbrf_is_refused_anywhere(self, tmp_path: Path) -> None:
        """Its second line is a title, which would be taken for residues."""
        path = write(
            tmp_path / "x.pir", b">a\nMK\n>P1;CRAB\nCRYSTALLIN\nMDITIHN*\n>F1;x\nTITLE\nMK*\n"
        )
        with pytest.raises(FastaError) as caught:
            records_of(path, invalid_residues="map")
        first, second = str(caught.value).splitlines()
        assert first.startswith(
            f"{path}, line 3: the header of 'P1;CRAB' is one of NBRF/PIR format"
        )
        assert second.startswith(f"{path}, line 6: the header of 'F1;x'")
        assert records_of(path, invalid_residues="skip") == [("a", "MK")]
        assert records_of(write(path, b">A1;x\nMK\n>P1\nMKV\n")) == [("A1;x", "MK"), ("P1", "MKV")]


READS = b"@r1 x\nATGAAAGTTCTG\n+\nIIII>@+IIIII\n@r2\natgaaa\n+r2\nIIIIII\n"


class TestFastq:
    @pytest.mark.parametrize("name", ["x.fastq", "x.fq.gz", "x.txt"])
    @pytest.mark.parametrize(
        "encode",
        [
            bytes,
            gzip.compress,
            lambda data: data.replace(b"\n", b"\r\n"),
            lambda data: zipped({"x.fq": data}),
        ],
    )
    def test_fastq_gives_the_reads_of_the_same_fasta(
        self, tmp_path: Path, name: str, encode: Callable[[bytes], bytes]
    ) -> None:
        fasta = write(tmp_path / "x.fna", b">r1 x\nATGAAAGTTCTG\n>r2\natgaaa\n")
        expected = records_of(fasta, translate="six-frame")
        assert ("r1_chunk_1F1", "MKVL") in expected
        assert records_of(write(tmp_path / name, encode(READS)), translate="six-frame") == expected

    @pytest.mark.parametrize("policy", ["error", "map", "skip"])
    def test_it_is_refused_without_translation(self, tmp_path: Path, policy: str) -> None:
        path = write(tmp_path / "x.fq", READS)
        assert refusal(path, invalid_residues=policy) == (
            f"{path}: this is FASTQ, whose nucleotides are read with --translate six-frame only; "
            "give proteins as FASTA"
        )

    def test_faults_are_reported_by_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.fq", READS + b"@r3\nATGE\n+\nIIII\n")
        assert refusal(path, translate="six-frame").startswith(
            f"{path}, line 9: sequence 'r3' has 'E' at position 4"
        )

    @pytest.mark.parametrize("kept", [3, 10, 25, 45, len(READS) - 3])
    def test_one_that_is_cut_is_refused(self, tmp_path: Path, kept: int) -> None:
        path = write(tmp_path / "x.fq", READS[:kept])
        assert refusal(path, translate="six-frame").startswith(
            f"{path}: this FASTQ cannot be read ("
        )

    def test_many_reads_are_all_there(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "x.fq",
            b"".join(b"@r%d\nATGAAA\n+\nIIIIII\n" % number for number in range(20_001)),
        )
        ids = [sequence_id for sequence_id, _ in records_of(path, translate="six-frame")]
        assert len({name.partition("_")[0] for name in ids}) == 20_001
