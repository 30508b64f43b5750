from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from mesh_transformer.data import DataError, cleaning, documents

EOT = "<|endoftext|>"
TEXTS = ["one\ntwo", "drei été 北京", 'with "quotes"\\n']


def texts(path: Path, separator: str | None = EOT, longest: int = 1 << 20) -> list[str]:
    """Join the pieces of each document of a file."""
    whole = [""]
    for piece in documents.read(path, separator, longest):
        assert piece.text
        whole[-1] += piece.text
        if piece.ends:
            whole.append("")
    assert whole.pop() == "", "the last document does not end"
    return whole


def json_lines(values: list[object]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


OBJECTS = json_lines([{"text": text, "meta": {"n": 1}} for text in TEXTS])
FILES = {text[:3] + ".txt": text.encode() for text in TEXTS}
LAYOUTS: dict[str, bytes] = {
    "separated.txt": EOT.join(TEXTS).encode(),
    "with a mark.txt": b"\xef\xbb\xbf" + EOT.join(TEXTS).encode(),
    "Windows.txt": EOT.join(TEXTS).replace("\n", "\r\n").encode(),
    "objects.jsonl": OBJECTS,
    "strings.jsonl": json_lines([*TEXTS]),
    "blank lines.jsonl": b"\n" + OBJECTS.replace(b"\n", b"\n\n"),
    "no last newline.jsonl": OBJECTS.rstrip(),
    "zstandard.jsonl.zst": zstandard.compress(OBJECTS),
    "strings.jsonl.zst": zstandard.compress(json_lines([*TEXTS])),
    "text.txt.xz": lzma.compress(EOT.join(TEXTS).encode()),
    "lines.jsonl.xz": lzma.compress(OBJECTS),
    "archive.tar.gz": gzip.compress(tar(FILES)),
    "archive of lines.tar.gz": gzip.compress(tar({"a/b.jsonl": OBJECTS})),
    "openwebtext.tar.xz": lzma.compress(
        tar({"openwebtext/urlsf_subset00_data.xz": lzma.compress(tar(FILES))})
    ),
    "urlsf_subset00_data.xz": lzma.compress(tar(FILES)),
    "parallel.jsonl.zst": b"".join(
        zstandard.compress(half) for half in (OBJECTS[:20], OBJECTS[20:])
    ),
    "skippable first.jsonl.zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    + zstandard.compress(OBJECTS),
    "two streams.txt.xz": lzma.compress(b"one\ntwo<|endof")
    + b"\0\0\0\0"
    + lzma.compress(EOT.join(TEXTS).encode().removeprefix(b"one\ntwo<|endof")),
}


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name])
    assert texts(path) == TEXTS


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "a.xz": lambda data: b"".join(
        lzma.compress(data[n : n + 1001]) for n in range(0, len(data), 1001)
    ),
    "a.tar.gz": lambda data: gzip.compress(tar({"b.xz": lzma.compress(tar({"a.txt": data}))})),
    "a.jsonl.zst": lambda data: zstandard.compress(json_lines([data.decode()])),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_text_is_unpacked_in_the_smallest_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", 7)
    rng = random.Random(0)
    text = "".join(rng.choices("aé北👩 \n", k=15_000))
    path = tmp_path / name
    path.write_bytes(COMPRESSORS[name](text.encode()))
    assert texts(path) == [text]


def test_paragraphs_of_a_document_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([{"text": ["one", "two"]}]))
    assert texts(path) == ["one\n\ntwo"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{EOT}{EOT}a{EOT}{EOT} {EOT}")
    assert texts(path) == ["a", " "]
    path.write_text("")
    assert texts(path) == []
    (tmp_path / "b.jsonl").write_bytes(json_lines(["", {"text": ""}]))
    assert texts(tmp_path / "b.jsonl") == []


def test_without_a_separator_the_end_of_text_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"a{EOT}b")
    assert texts(path, None) == [f"a{EOT}b"]


@pytest.mark.parametrize("longest", [128, 200, 1000])
@pytest.mark.parametrize("block", [7, 64, 1 << 18])
def test_no_piece_is_long_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int, block: int
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    rng = random.Random(0)
    words = ["\n", "  ", "\n\n", "Wort", "été", "北京", "<|endof", EOT, "x" * 90]
    text = "".join(rng.choice(words) + rng.choice(["", " ", "\n"]) for _ in range(3000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = list(documents.read(path, EOT, longest))
    assert max(len(piece.text) for piece in pieces) <= longest
    assert texts(path, EOT, longest) == [part for part in text.split(EOT) if part]


def test_pieces_say_on_which_line_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"{'word ' * 5}\n" + (EOT if n % 7 == 0 else "") for n in range(500))
    path.write_text(text)
    position = 0
    for piece in documents.read(path, EOT, 300):
        position = text.index(piece.text, position)
        assert piece.place == f"{path}:{1 + text.count(chr(10), 0, position)}"
        position += len(piece.text)


def test_a_long_document_is_cut_where_gpt2_cuts_tokens(tmp_path: Path) -> None:
    from mesh_transformer.data import tokenizer

    gpt2 = tokenizer.load("gpt2")
    path = tmp_path / "a.txt"
    rng = random.Random(1)
    words = ["it's", "x+=1", "  indented", "\n\n\tif", "end.\n", "1234", "été", "!?", "\r"]
    text = " ".join(rng.choice(words) for _ in range(3000)).replace("\r", "\n")
    path.write_text(text)
    pieces = [piece.text for piece in documents.read(path, None, 200)]
    assert len(pieces) > 80
    assert [i for piece in pieces for i in gpt2.encode(piece)] == gpt2.encode(text)


BROKEN: list[tuple[str, bytes, str]] = [
    ("latin.txt", b"one\ntwo\nthr\xe9e\n", r"latin\.txt:3: not UTF-8 text: byte 0xe9"),
    ("cut.txt", "one\nété".encode()[:-1], r"cut\.txt:2: not UTF-8 text"),
    ("bad.jsonl", b'"one"\n{"text": "two"\n', r"bad\.jsonl:2: not a line of JSON: Expecting ','"),
    ("latin.jsonl", b'"one"\n"thr\xe9e"\n', r"latin\.jsonl:2: not a line of JSON: 'utf-8'"),
    ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl:1: not a line of JSON"),
    (
        "keys.jsonl",
        b'"one"\n\n{"txt": "two"}',
        r"keys\.jsonl:3: needed .*found '{\"txt\": \"two\"}'",
    ),
    ("number.jsonl", b"1\n", r"number\.jsonl:1: needed a JSON string"),
    ("list.jsonl", b'{"text": ["a", 1]}\n', r"list\.jsonl:1: needed a JSON string"),
    ("half.jsonl", b'"a"\n"\\ud83d"\n', r"half\.jsonl:2: half a surrogate pair"),
    ("line.jsonl.zst", zstandard.compress(b'"a"\n"b\n'), r"line\.jsonl\.zst:2: not a line of JSON"),
    ("cut.jsonl.zst", zstandard.compress(OBJECTS)[:-9], "cut.jsonl.zst: its .* ends too early"),
    ("cut.txt.xz", lzma.compress(b"text" * 99)[:-9], "cut.txt.xz: its .* ends too early"),
    ("cut.tar.gz", gzip.compress(tar(FILES))[:-9], "cut.tar.gz: its .* ends too early"),
    ("not.jsonl.zst", OBJECTS, "not.jsonl.zst: its content is not what its name says"),
    ("not.tar.gz", b"", "not.tar.gz: its content is not what its name says"),
    (
        "member.tar.gz",
        gzip.compress(tar({"a.txt": b"fine", "b/c.txt": b"one\n\xff"})),
        r"member\.tar\.gz: b/c\.txt:2: not UTF-8 text",
    ),
    ("no.tar.gz", gzip.compress(b"no archive" * 99), "no.tar.gz: the tar archive is damaged"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(path)


CHECKED = zstandard.ZstdCompressor(write_checksum=True)


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.xz", lzma.compress), ("a.tar.gz", gzip.compress), ("a.jsonl.zst", CHECKED.compress)],
)
def test_a_flipped_bit_in_compressed_data_is_found(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    content = json_lines([str(random.Random(0).random())] * 3)
    content = tar({"a.txt": content}) if "tar" in name else content
    damaged = bytearray(compress(content))
    damaged[len(damaged) // 2] ^= 16
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(DataError, match=name):
        texts(tmp_path / name)


def test_a_folder_means_its_files_of_known_types_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "c.jsonl.zst", "d.xz", "e.tar.gz", "f.py", "g.index", "h.zst"):
        (tmp_path / name).touch()
    (tmp_path / "folder.txt").mkdir()
    found = [path.name for path in documents.find_files(tmp_path)]
    assert found == ["a.jsonl", "b.txt", "c.jsonl.zst", "d.xz", "e.tar.gz"]
    assert documents.find_files(tmp_path / "b.txt") == [tmp_path / "b.txt"]


def test_no_input_is_an_error_that_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    with pytest.raises(DataError, match=r"holds no file of a known type \(\.txt, \.jsonl, "):
        documents.find_files(tmp_path)
    with pytest.raises(DataError, match=r"a\.py: not a known type of file"):
        documents.find_files(tmp_path / "a.py")
    with pytest.raises(DataError, match="no such file or folder"):
        documents.find_files(tmp_path / "missing")


def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(OBJECTS))
    blocks: list[int] = []
    list(documents.read(path, EOT, advance=blocks.append))
    assert sum(blocks) == path.stat().st_size


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" = = Heading = = \n It was , once , so . \n", " == Heading ==\nIt was, once, so.\n"),
        (
            "1 @,@ 000 m ( 3 @.@ 3 ft ) : a well @-@ known one ;",
            "1,000 m (3.3 ft): a well-known one ;",
        ),
        ('Was it ? Yes ! " He is . " [ 1 ] { x } 20 ° C', 'Was it? Yes! "He is." [1] {x} 20°C'),
        ("the boys ' game ; N of them", "the boys' game; 1 of them"),
        ("he 's here", "he's here"),
        ("a ' quoted ' word", "a 'quoted' word"),
    ],
)
def test_wikitext_loses_its_spacing(text: str, wanted: str) -> None:
    assert cleaning.detokenize_wikitext(text) == wanted


def test_broken_encodings_are_repaired_and_normalised() -> None:
    assert cleaning.fix_encoding("schÃ¶n ﬁne") == "schön fine"
