"""Token shards on disk and the manifest that says what they are: what all tools of this folder share. Needs numpy only.

    <root>/datasets/<name>/<prefix>_train_000000.bin …, <prefix>_val_000000.bin …, manifest.json
    <root>/tokenizers/<tokenizer>.model, of SentencePiece

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then its tokens, little-endian uint16. Every
document is BOS (1) and its tokens, and may go on in the next shard. `manifest.json` is written last, by the tool that
made the folder, and names no file that was not complete then:

    name, tokenizer {path from here, vocab_size, sha256}, splits {split: documents, tokens, bytes, …},
    files {name: tokens, sha256}, and where it all comes from: sources with their licences, settings, versions."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
BYTE_VOCAB_SIZE = 260  # the byte-level vocabulary: the four ids above, then the 256 bytes
SPLITS = ("train", "val")
SHARD_NAME = re.compile(r".*_(train|val)_\d+\.bin")
PIECE_BYTES = 1 << 23  # read at a time where a whole file is looked at
ROOT = Path(__file__).resolve().parent


class DataError(ValueError):
    """Something that the user can mend: the message names the thing, its value and the fix."""


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_header(num_tokens: int) -> bytes:
    """Returns the first 1,024 bytes of a shard."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, num_tokens
    return header.tobytes()


class ShardFacts(NamedTuple):
    """What a whole look at a shard found."""

    tokens: int
    sha256: str


def read_num_tokens(path: Path) -> int:
    """Returns the tokens that a shard holds, from its header and size alone; DataError where these do not agree."""
    with path.open("rb") as file:
        content, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    if len(content) < HEADER_BYTES:
        raise DataError(f"{path} has {size} bytes, less than a shard's header of {HEADER_BYTES}")
    magic, version, num_tokens = np.frombuffer(content, dtype="<i4", count=3).tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path} is not a token shard: it starts with {magic}, {version}")
    if num_tokens < 1 or size != HEADER_BYTES + 2 * num_tokens:
        raise DataError(f"{path} has {size} bytes, its header declares {HEADER_BYTES + 2 * num_tokens}")
    return num_tokens


def open_shard(path: Path) -> np.ndarray:
    """Returns a shard's tokens, uint16, mapped into memory; DataError where header and size do not agree."""
    read_num_tokens(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def check_shard(path: Path, vocab_size: int) -> ShardFacts:
    """Returns what a shard holds after reading all of it, 8 MB at a time; DataError if it is broken or foreign."""
    num_tokens, digest, highest = read_num_tokens(path), hashlib.sha256(), 0
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            highest = max(highest, int(np.frombuffer(piece, dtype="<u2").max()))
    if highest >= vocab_size:
        raise DataError(f"{path} holds token {highest}, but its tokenizer has {vocab_size} pieces")
    return ShardFacts(num_tokens, digest.hexdigest())


def list_shards(folder: Path, split: str) -> list[Path]:
    """Returns the shards of a split in order of their names, which is the order of their tokens."""
    return sorted(folder.glob(f"*_{split}_*.bin"))


# ---- files -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, *parts: bytes | np.ndarray) -> None:
    """Writes the parts one after the other, so that a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(memoryview(part).cast("B") if len(part) else b"")
            file.flush()
            os.fsync(file.fileno())  # else a power failure can leave an empty file under the final name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps a second process out of what the file stands for; DataError where one is in it. The file stays, empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is at work on this (it holds {path}): wait for it") from None
        yield


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# ---- the manifest ----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a folder of shards."""
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder of shards, None where it has none; DataError where it is none of ours."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        tokenizer, files = manifest["tokenizer"], manifest["files"]
        if not isinstance(tokenizer["path"], str) or int(tokenizer["vocab_size"]) < 2 or not tokenizer["sha256"]:
            raise ValueError("its tokenizer is none")
        if not all(SHARD_NAME.fullmatch(name) and int(file["tokens"]) > 0 for name, file in files.items()):
            raise ValueError("a file in it is no shard")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path} is not a manifest of this project ({error!r}): remove or rebuild it") from None
    return manifest


def tokenizer_entry(folder: Path, path: Path, vocab_size: int) -> dict[str, Any]:
    """Returns what a manifest in `folder` says of the tokenizer at `path`."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return {"path": Path(relative).as_posix(), "vocab_size": vocab_size, "sha256": hash_file(path)}


# ---- what the user sees ----------------------------------------------------------------------------------------------


class Progress:
    """Says on standard error, every few seconds of long work, how far it is, how fast, and how long it will take."""

    def __init__(self, label: str, total: float, unit: str, scale: float = 1.0, every_seconds: float = 5.0):
        self.label, self.total, self.unit, self.scale, self.every = label, total, unit, scale, every_seconds
        self.done, self.start = 0.0, time.monotonic()
        self.last = self.start

    def advance(self, amount: float) -> None:
        """Takes note of work that is done."""
        self.done, now = self.done + amount, time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            print(self.line(now - self.start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Returns the line that is printed after so many seconds."""
        rate, done = self.done / seconds, f"{self.done * self.scale:,.1f}"
        left = f", {max(0.0, self.total / self.done - 1) * seconds:,.0f} s left" if self.done and self.total else ""
        of = f" of {self.total * self.scale:,.1f}" if self.total else ""
        return f"{self.label}: {done}{of} {self.unit}, {rate * self.scale:,.2f} {self.unit}/s{left}"


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Prints rows of cells in columns; the first row is the head."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


class Screen:
    """A standard stream of a program whose work is more than what it prints: one that is gone, as in `| head -1`, or on
    a full disk, ends the printing and not the work. Any character can be printed."""

    def __init__(self, stream: Any):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # there may be none at all
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Prints a text at once, as long as the stream takes any."""
        if self.stream is not None:
            try:
                self.stream.write(text)
                self.stream.flush()
            except OSError:
                self.stream = None
        return len(text)

    def flush(self) -> None:
        """Does nothing: `write` has."""


@contextlib.contextmanager
def errors_as_messages(tool: str, works_in_silence: bool = False) -> Iterator[None]:
    """Ends the program with a message instead of a traceback where something outside of it is wrong, or on Ctrl-C. One
    that works in silence goes on where nobody can read what it prints."""
    before = sys.stdout, sys.stderr
    if works_in_silence:
        sys.stdout, sys.stderr = map(Screen, before)
    try:
        yield
        if works_in_silence and sys.stdout.stream and sys.stderr.stream:  # else Python's own exit would stumble
            sys.stdout, sys.stderr = before
    except (DataError, OSError) as error:  # OSError: a disk that is full, a folder that is a file
        sys.exit(f"{tool}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{tool}: interrupted: run it again")
