"""Documents out of files of many kinds, in bounded memory: what is no document is said with file, line and reason.

A document is a JSON line's text (`.jsonl`), a row's (`.parquet`), or a plain text file, its lines or its paragraphs
(`.txt`); `.gz` and `.zst` are unpacked on the way, folders are read in order of their paths. A blank line is no
document, but counts: places are the lines that an editor shows. Batches are cut from the bytes alone, so they are the
same in every pass over the same files, however many processes work on them."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard
from shards import DataError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # and how such files begin
BATCH_BYTES = 1 << 20
LARGEST_WINDOW = 1 << 29  # bytes of memory that a Zstandard frame may ask for, as of `zstd --long=29`
PACKED_BYTES = 1 << 10  # of a Zstandard frame at a time: 4 bytes can stand for 128 KiB, so this for 32 MiB at most
JSON_OVERHEAD = 6  # a character takes six bytes at most in JSON (\\u0041) where one would do


class Options(NamedTuple):
    """How documents are found in files."""

    format: str = "auto"  # of FORMATS' values, or auto: by the file's name
    text_key: str = "text"  # of JSON lines and Parquet rows
    text_unit: str = "file"  # of plain text: file, line or paragraph
    max_document_bytes: int = 4_000_000


class Source(NamedTuple):
    """A file of documents."""

    path: Path
    format: str


class Batch(NamedTuple):
    """Neighbouring pieces of one file: raw ones, texts, or None with a reason; `places` are their lines or rows."""

    source: Source
    places: list[int]
    pieces: list[bytes | str | None]
    reasons: dict[int, str]  # place -> why there is no document


class Rejected(NamedTuple):
    """A place that holds no document."""

    file: str
    line: int
    reason: str


def find_sources(paths: Iterable[Path], options: Options) -> tuple[list[Source], Counter]:
    """Returns the files to read, folders opened up in order of their paths, and by suffix how many files in folders are
    not documents by their names; DataError where there is nothing to read."""
    sources: list[Source] = []
    ignored: Counter = Counter()
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path} is no regular file, and is read three times: pipe it to this command, and give -")
        inside = walk_folder(path, ignored) if path.is_dir() else [path]
        found = [Source(p, kind) for p in inside if (kind := format_of(p, options.format if p == path else "auto"))]
        if not found:
            kinds = f"{', '.join(FORMATS)}, also with {' or '.join(sorted(PACKED))}"
            raise DataError(f"{path} holds no documents by its name ({kinds}): rename it, or say --format")
        sources += found
        ignored.update(p.suffix or p.name for p in {*inside} - {source.path for source in found})
    check_sources(sources)
    return sources, ignored


def walk_folder(folder: Path, ignored: Counter) -> list[Path]:
    """Returns the regular files in a folder, in order of their paths, links followed. Hidden files and folders are
    counted in `ignored`. Raises DataError for a folder that cannot be listed, and for one that links lead to again."""
    files = []
    known = {folder.resolve(): folder}

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): change its permissions, or move it")

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for inside in (Path(parent) / name for name in folders if not name.startswith(".")):
            first = known.setdefault(inside.resolve(), inside)
            if first is not inside:
                raise DataError(f"{inside} is {first}, by another name: remove the link between them")
        ignored.update("hidden" for name in (*folders, *names) if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent) / name for name in names if not name.startswith(".")):
            if path.is_symlink() and not path.exists():
                raise DataError(f"{path} leads to {os.readlink(path)}, which is not there: mend or remove that link")
            if path.is_file():
                files.append(path)
    return sorted(files)


def check_sources(sources: list[Source]) -> None:
    """Raises DataError for a file that cannot be read, and for one that is there twice: it would count twice."""
    known: dict[tuple[int, int], Path] = {}
    for path in (source.path for source in sources):
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read: change its permissions, or move it away")
        found = path.stat()
        first = known.setdefault((found.st_dev, found.st_ino), path)
        if first is not path:
            raise DataError(f"{path} is {first}, by another name or given twice: leave one of them out")


def format_of(path: Path, given: str) -> str:
    """Returns the format of a file by its name, unless one is given; an empty text where it is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else (suffixes or [""])[-1]
    return given if given != "auto" else FORMATS.get(suffix, "")


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """Yields the unpacked bytes of a file."""
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".gz":
            stream = stack.enter_context(gzip.open(path, "rb"))
        elif path.suffix.lower() == ".zst":
            stream = io.BufferedReader(ZstdReader(stack.enter_context(path.open("rb"))), BATCH_BYTES)
        else:
            stream = stack.enter_context(path.open("rb"))
        yield stream


class ZstdReader(io.RawIOBase):
    """The unpacked bytes of Zstandard frames. The library's own reader takes a file that was cut off for its end."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self.inside = False
        self.frame, self.packed, self.unpacked = self.unpacker.decompressobj(), b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.file.read(PACKED_BYTES)
            if not self.packed and self.inside:
                raise EOFError("it is cut off inside of a frame")
            if not self.packed:
                return 0
            self.unpacked = memoryview(self.frame.decompress(self.packed))
            self.packed, self.inside = self.frame.unused_data, not self.frame.eof
            if self.frame.eof:
                self.frame = self.unpacker.decompressobj()
        count = min(len(buffer), len(self.unpacked))
        buffer[:count], self.unpacked = self.unpacked[:count], self.unpacked[count:]
        return count


def read_batches(sources: Iterable[Source], options: Options) -> Iterator[Batch]:
    """Yields all pieces of all files, about 1 MB at a time, or one piece where that is larger."""
    for source in sources:
        places, pieces, reasons, size = [], [], {}, 0
        for place, piece, reason in read_pieces(source, options):
            places.append(place)
            pieces.append(piece)
            reasons |= {place: reason} if reason else {}
            size += len(piece or b"") + 64
            if size >= BATCH_BYTES:
                yield Batch(source, places, pieces, reasons)
                places, pieces, reasons, size = [], [], {}, 0
        if places:
            yield Batch(source, places, pieces, reasons)


def read_pieces(source: Source, options: Options) -> Iterator[tuple[int, bytes | str | None, str]]:
    """Yields (line or row, piece, reason); the piece is None where the reason is not empty. A file that turns out to be
    damaged ends with a reason, after what could be read of it."""
    place = 0
    try:
        if source.format == "parquet":
            for place, text in enumerate(read_parquet(source.path, options.text_key), 1):
                known = isinstance(text, (str, bytes))  # some writers store text as binary
                yield place, text if known else None, "" if known else f"no text under the key {options.text_key}"
            return
        with open_unpacked(source.path) as stream:
            for place, piece, reason in split_stream(stream, source.format, options):
                yield place, piece, reason
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError) as error:
        if "too much memory" in str(error):
            fix = f"zstd -dc --long=31 {shlex.quote(str(source.path))} | python data/build.py - …"
            raise DataError(f"{source.path} needs over {LARGEST_WINDOW:,} bytes to be unpacked: {fix}") from None
        yield place + 1, None, f"the file cannot be read from here on ({type(error).__name__}: {error})"


def read_parquet(path: Path, key: str) -> Iterator[Any]:
    """Yields a column of a Parquet file, few rows at a time: those of 4 MB took 3 GB with the library's settings."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow: pip install -r data/requirements.txt") from None
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BATCH_BYTES) as file:
        if key not in file.schema_arrow.names:
            raise DataError(f"{path} has no column {key}, but {', '.join(file.schema_arrow.names)}: say --text-key")
        for rows in file.iter_batches(batch_size=8, columns=[key]):
            yield from rows.column(0).to_pylist()


def split_stream(stream: BinaryIO, kind: str, options: Options) -> Iterator[tuple[int, bytes | None, str]]:
    """Yields (first line, bytes, reason) of a stream: its lines, its paragraphs, or all of it. What is longer than a
    document may be is passed over without being held in memory."""
    limit = options.max_document_bytes * (JSON_OVERHEAD if kind == "jsonl" else 1) + 2
    if kind == "text" and options.text_unit == "file":
        content = stream.read(limit)
        num_bytes = len(content) + sum(len(rest) for rest in iter(lambda: stream.read(BATCH_BYTES), b""))
        yield (1, None, too_long(num_bytes, options)) if num_bytes >= limit else (1, content, "")
        return
    joined = kind == "text" and options.text_unit == "paragraph"
    paragraph, begin, size = [], 1, 0
    for place, line, num_bytes in read_lines(stream, limit):
        if num_bytes:
            yield place, None, too_long(num_bytes, options)
            paragraph, size = [], 0
        elif not joined:
            yield place, line, ""
        elif not is_blank(line):
            begin, size = place if not paragraph else begin, size + len(line)
            paragraph.append(line if size < limit else b"")  # what is too long already is not held
        elif paragraph:
            yield (begin, b"".join(paragraph), "") if size < limit else (begin, None, too_long(size, options))
            paragraph, size = [], 0
    if paragraph:
        yield (begin, b"".join(paragraph), "") if size < limit else (begin, None, too_long(size, options))


def is_blank(line: bytes) -> bool:
    """Returns whether a line shows nothing: white space of any kind, or a byte order mark."""
    return not line.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()


def too_long(num_bytes: int, options: Options) -> str:
    """Returns the reason why so long a piece is no document."""
    fix = "; of plain text --text-unit line or paragraph makes more" if options.text_unit == "file" else ""
    return f"too long ({num_bytes:,} bytes, --max-document-bytes is {options.max_document_bytes:,}{fix})"


def read_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """Yields (number, line, 0), or (number, b"", its bytes) of a line of `limit` bytes or more, which is not kept."""
    number, line = 0, stream.readline(limit)
    while line:
        number, num_bytes = number + 1, len(line)
        if num_bytes == limit and not line.endswith(b"\n"):
            while (rest := stream.readline(BATCH_BYTES)) and not rest.endswith(b"\n"):
                num_bytes += len(rest)
            yield number, b"", num_bytes + len(rest)
        else:
            yield number, line, 0
        line = stream.readline(limit)


def parse_batch(batch: Batch, options: Options) -> tuple[list[str], list[Rejected]]:
    """Returns the texts of a batch, and what holds none. A text is valid Unicode with something to read in it."""
    texts: list[str] = []
    rejected: list[Rejected] = []
    for place, piece in zip(batch.places, batch.pieces):
        text, reason = None, batch.reasons.get(place, "")
        if not reason:
            text, reason = parse_piece(piece, batch.source.format, options)
        if reason:
            rejected.append(Rejected(str(batch.source.path), place, reason))
        elif text is not None:
            texts.append(text)
    return texts, rejected


def parse_piece(piece: Any, kind: str, options: Options) -> tuple[str | None, str]:
    """Returns (text, ""), (None, the reason why there is none), or (None, "") of a blank line."""
    has_lines = kind == "jsonl" or (kind == "text" and options.text_unit != "file")
    if has_lines and is_blank(piece):
        return None, ""
    try:
        # A byte order mark may begin any line, where files were put together. JSON is UTF-8: json itself would guess.
        text = piece.removeprefix(codecs.BOM_UTF8).decode() if isinstance(piece, bytes) else piece
        if kind == "jsonl":
            value = json.loads(text)
            text = value[options.text_key] if isinstance(value, dict) else None
        if not isinstance(text, str):
            return None, f"no text under the key {options.text_key}"
        num_bytes = len(text.encode())
    except UnicodeDecodeError as error:
        return None, f"no UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
    except UnicodeEncodeError as error:
        return None, f"no Unicode text (a lone surrogate at character {error.start})"
    except json.JSONDecodeError as error:
        return None, f"no JSON ({error.msg} at character {error.pos})"
    except KeyError:
        return None, f"no key {options.text_key}"
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python's parser takes
        return None, f"no JSON ({error})"
    if not text.strip():
        return None, "an empty document"
    if num_bytes > options.max_document_bytes:
        return None, too_long(num_bytes, options)
    if kind == "text" and "\0" in text:
        return None, "binary data (a NUL character)"
    return text, ""
