"""Look at all of a folder of token shards, and print one table that says what is right in it and what is not.

    python data/verify.py                                   # data/datasets/fineweb10B_sp1024
    python data/verify.py data/datasets/mine_sp4096         # any other: its manifest names the tokenizer
    python data/verify.py folder --tokenizer file --all     # bytes of all training documents, not of a sample
    python data/verify.py folder --json                     # the same as one JSON object

    headers      every shard is whole: magic, version, size
    manifest     shards, token counts, SHA-256 and tokenizer are those of manifest.json
    tokens       ids are below the vocabulary, and none is pad (0), eos (2) or unk (3)
    documents    a split begins with BOS (1), no document is empty, there are as many as the manifest says
    overlap      no validation document occurs in training, token for token
    bytes        what scoring counts is the UTF-8 length of the decoded text, document by document
    fingerprint  whether the validation split is the challenge's

ok, warn, note (neither good nor bad), skipped (and why) or FAIL. A shard that is broken is named once, under headers;
the others' checks go on without it and say so. Exit status 0: nothing failed; 1: a check failed; 2: wrong usage.

A document belongs to the shard that it begins in, and is followed into the next ones. Two are the same if 64 bits of
their BLAKE2b are: 50,000 and 10 million different ones collide with a probability of 3e-8. Memory: 100 MB and 150 bytes
a validation document in every process, 200 MB for torch in one. A document is decoded as a whole, 80 bytes a token; one
of more than 4,194,304 tokens is named instead of looked into."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shards
from build import Encoder
from parallel import available_cores, in_order
from shards import BOS_ID, HEADER_BYTES, PIECE_BYTES, ROOT, UNK_ID, DataError, Progress

SHOWN = 5  # findings of a check
LONGEST = PIECE_BYTES // 2  # tokens of a document that is looked into
FORBIDDEN = {0: "pad (0)", 2: "eos (2)", 3: "unk (3)", -1: "an id beyond the vocabulary"}
EMPTY, LONG = "an empty document", "a document too long to look into (is a BOS missing?)"
NOTHING = "no shard could be read"
MISCOUNTED = "a document whose bytes are miscounted"
PROCESS_BYTES = 64_000_000  # of shards that are worth a process: it takes half a second to start

# The challenge's validation split: its documents; its targets, cut to a multiple of 2,048, by vocabulary; its bytes.
# All as in the logs of the merged records, where bytes are 151.024e6 to 151.081e6 whatever the tokenizer.
WINDOW, CHALLENGE_DOCUMENTS, CHALLENGE_BYTES = 2048, 50_000, (151.02e6, 151.10e6)
CHALLENGE_TARGETS = {1024: (62_021_632,), 4096: (45_508_608, 45_514_752), 8192: (40_540_160,)}
# SHA-256 of its first tokens (little-endian uint16) in the vocabulary of 1,024, measured from the challenge's export
CHALLENGE_BEGINS = {
    1_040_298: "3fad60f7e717550f18ba7aa3a9f1d0cb14ded3e3823714488ecb1e2a7f6630df",
    4_096: "7c0cc94930ee509887878ade159216d4ce3d867c509be82c155cf3dd7d6792e4",  # for parts that are shorter
}


# ---- what one process does with a shard ------------------------------------------------------------------------------


@dataclasses.dataclass
class Facts:
    """What a look at one shard found. Positions count its tokens from 0; a document is its BOS and what follows."""

    name: str
    error: str = ""
    sha256: str = ""
    num_tokens: int = 0
    first_token: int = BOS_ID
    num_documents: int = 0
    wrong: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)  # what -> how often, the first place
    num_hashed: int = 0  # documents with a hash in `hashes`, copies too
    hashes: dict[int, int] = dataclasses.field(default_factory=dict)  # of documents -> position of the first
    measured: Counter = dataclasses.field(default_factory=Counter)  # documents, tokens and bytes

    def mark(self, what: str, position: int, count: int = 1, detail: str = "") -> None:
        """Takes note of something wrong."""
        before, place = self.wrong.get(what, (0, f"token {position:,}{detail}"))
        self.wrong[what] = (before + count, place)


def read_tokens(path: Path) -> Iterator[np.ndarray]:
    """Yields the tokens of a shard, 8 MB at a time."""
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while piece := file.read(PIECE_BYTES):
            yield np.frombuffer(piece, "<u2")


@dataclasses.dataclass
class Inspector:
    """The work of one process on a split."""

    paths: list[Path | None]  # in order; None stands for a broken shard
    vocab_size: int
    val_hashes: frozenset[int] | None  # None: this is the validation split, all hashes are kept
    limits: list[float]  # by shard: documents that begin before this token are decoded
    encoder: Encoder | None
    luts: tuple[np.ndarray, ...]

    def inspect(self, number: int) -> Facts:
        """Returns what is in a shard, and in the documents that begin in it."""
        facts = Facts(self.paths[number].name)
        try:
            for position, tokens, ends_split in self.documents(number, facts):
                self.look_at_documents(number, position, tokens, ends_split, facts)
        except (OSError, ValueError) as error:  # ValueError: half a token, of a file that changes
            facts.error = f"cannot be read ({error})"
        return facts

    def documents(self, number: int, facts: Facts) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Yields (position, tokens, whether the split ends with them): whole documents, as many as a piece has. What
        lies before the shard's first BOS belongs to the shards before it."""
        path = self.paths[number]
        digest, held, position = hashlib.sha256(np.fromfile(path, np.uint8, HEADER_BYTES)), None, 0
        for piece in read_tokens(path):
            digest.update(piece)
            self.look_at_ids(piece, facts)
            tokens = piece if held is None else np.concatenate((held, piece))
            starts = np.flatnonzero(tokens == BOS_ID)
            first, last = (int(starts[0]), int(starts[-1])) if len(starts) else (len(tokens), len(tokens))
            if last > first:
                yield position + first, tokens[first:last], False
            held, position = tokens[last:] if len(starts) else None, position + last
            if held is not None and len(held) > LONGEST:
                yield position, held, False
                held, position = None, position + len(held)
        facts.sha256 = digest.hexdigest()
        if held is not None:
            yield position, *self.follow(number, held)

    def follow(self, number: int, held: np.ndarray) -> tuple[np.ndarray, bool]:
        """Returns a shard's last document with its tokens in the next shards, and whether the split ends with it; no
        tokens if a broken shard hides where it ends."""
        parts, size = [held], len(held)
        for path in self.paths[number + 1 :]:
            if path is None:
                return held[:0], False
            for piece in read_tokens(path):
                starts = np.flatnonzero(piece == BOS_ID)
                parts.append(piece[: starts[0]] if len(starts) else piece)
                size += len(parts[-1])
                if len(starts) or size > LONGEST:
                    return np.concatenate(parts), False
        return np.concatenate(parts), True

    def look_at_ids(self, piece: np.ndarray, facts: Facts) -> None:
        """Counts documents and ids that must not occur."""
        if not facts.num_tokens:
            facts.first_token = int(piece[0])
        facts.num_documents += int(np.count_nonzero(piece == BOS_ID))
        bad = np.flatnonzero((piece <= UNK_ID) & (piece != BOS_ID) | (piece > self.vocab_size - 1))
        ids = np.where(piece[bad] > UNK_ID, -1, piece[bad].astype(np.int32))
        for kind in np.unique(ids).tolist():
            places = bad[ids == kind]
            facts.mark(FORBIDDEN[kind], facts.num_tokens + int(places[0]), len(places))
        facts.num_tokens += len(piece)

    def look_at_documents(self, number: int, position: int, tokens: np.ndarray, ends_split: bool, facts: Facts) -> None:
        """Hashes and measures documents that lie one after the other."""
        starts = np.flatnonzero(tokens == BOS_ID)
        ends = np.append(starts[1:], len(tokens))
        for what, chosen in ((EMPTY, ends - starts == 1), (LONG, ends - starts > LONGEST)):
            if chosen.any():
                facts.mark(what, position + int(starts[chosen][0]), int(chosen.sum()))
        good = (ends - starts > 1) & (ends - starts <= LONGEST)
        for begin, end in zip(starts[good].tolist(), ends[good].tolist()):
            document = tokens[begin:end]
            key = int.from_bytes(hashlib.blake2b(document.tobytes(), digest_size=8).digest(), "little")
            if self.val_hashes is None or key in self.val_hashes:
                facts.hashes.setdefault(key, position + begin)
                facts.num_hashed += 1
            if position + begin < self.limits[number]:
                self.measure(position + begin, document, ends_split and end == len(tokens), facts)

    def measure(self, position: int, document: np.ndarray, ends_split: bool, facts: Facts) -> None:
        """Compares the bytes that scoring counts with those of the text. A split may be cut inside of a character: its
        last document may end with a part of one, which no text can equal."""
        rest = document[1:]
        if rest.max() >= self.vocab_size or rest.min() <= UNK_ID:
            return  # named among the ids
        base_bytes, has_leading_space, is_boundary = self.luts
        counted = int((base_bytes[rest] + (has_leading_space[rest] & ~is_boundary[document[:-1]])).sum())
        text = self.encoder.decode([document])[0]
        facts.measured.update(documents=1, tokens=len(document), bytes=counted)
        if counted != (length := len(text.encode())) and not (ends_split and text.endswith("\ufffd")):
            facts.mark(MISCOUNTED, position, 1, f" ({counted:,} counted, {length:,} in its text)")


# ---- the folder ------------------------------------------------------------------------------------------------------


class Folder:
    """A folder of shards with its manifest, its tokenizer and all that was found in its shards."""

    def __init__(self, path: Path, tokenizer: Path | None = None):
        self.path = Path(os.path.abspath(path))
        self.paths = {split: shards.list_shards(self.path, split) for split in shards.SPLITS}
        self.num_tokens: dict[Path, int] = {}  # of the whole shards
        self.broken: dict[Path, str] = {}  # the others, and why
        self.facts: dict[str, list[Facts]] = {}
        self.manifest, self.manifest_error = None, ""
        try:
            self.manifest = shards.read_manifest(self.path)
        except DataError as error:
            self.manifest_error = str(error)
        for path in (*self.paths["train"], *self.paths["val"]):
            try:
                self.num_tokens[path] = shards.read_num_tokens(path)
            except (DataError, OSError) as error:
                self.broken[path] = str(error).replace(f"{self.path}{os.sep}", "")
        self.tokenizer = tokenizer or self.find_tokenizer()
        self.encoder, self.luts, self.lacks = None, (), "no tokenizer: give it with --tokenizer"
        self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"]) if self.manifest else None
        if self.tokenizer and self.tokenizer.is_file():
            self.load_tokenizer()

    def find_tokenizer(self) -> Path | None:
        """Returns the tokenizer that the manifest names; without one the challenge's, if the folder has its name."""
        if self.manifest:
            return self.path / self.manifest["tokenizer"]["path"]
        name = re.fullmatch(r"fineweb.*_sp(\d+)", self.path.name)
        places = [r / "tokenizers" / f"fineweb_{name[1]}_bpe.model" for r in (self.path.parent.parent, ROOT) if name]
        return next((path for path in places if path.is_file()), None)

    def load_tokenizer(self) -> None:
        """Opens the tokenizer and asks the trainer how it counts, or says in `lacks` why that cannot be."""
        if self.manifest and shards.hash_file(self.tokenizer) != self.manifest["tokenizer"]["sha256"]:
            self.lacks = "the tokenizer is not the manifest's"
            return
        if str(ROOT.parent) not in sys.path:
            sys.path.insert(0, str(ROOT.parent))
        try:
            self.encoder = Encoder(self.tokenizer)
            self.vocab_size = self.encoder.vocab_size
            from train_gpt import build_sentencepiece_luts  # only here: it needs torch, and takes a second

            self.luts = tuple(lut.numpy() for lut in build_sentencepiece_luts(self.encoder.sp, self.vocab_size))
            self.lacks = ""
        except (ImportError, DataError) as error:
            self.lacks = str(error)

    def look(self, jobs: int, everything: bool) -> None:
        """Reads all shards, validation first: training documents are looked up among its documents."""
        sizes, hashes = self.num_tokens.values(), None
        if not jobs:
            cores, _ = available_cores()
            jobs = min(cores, 1 + 2 * sum(sizes) // PROCESS_BYTES)
        progress = Progress("looking at shards", sum(sizes), "M tokens", 1e-6)
        for split in reversed(shards.SPLITS):
            paths = [path if path in self.num_tokens else None for path in self.paths[split]]
            limits = [math.inf if (split == "val" or everything) and not self.lacks else 0] * len(paths)
            for tenth in range(10 if paths and not self.lacks else 0):  # the first piece of the first shard of each
                limits[len(paths) * tenth // 10] = max(limits[len(paths) * tenth // 10], PIECE_BYTES // 2)
            held = paths, self.vocab_size or 1 << 16, hashes, limits, self.encoder, self.luts
            numbers = [number for number, path in enumerate(paths) if path]
            self.facts[split] = []
            for facts in in_order(
                functools.partial(Inspector, *held), "inspect", numbers, min(jobs, len(numbers) or 1)
            ):
                self.facts[split].append(facts)
                progress.advance(facts.num_tokens)
            hashes = frozenset(key for facts in self.facts[split] for key in facts.hashes)
            for facts in self.facts[split]:
                if facts.error or facts.num_tokens != self.num_tokens[self.path / facts.name]:
                    self.broken[self.path / facts.name] = f"{facts.name} {facts.error or 'changed while it was read'}"

    def stated(self, split: str, what: str) -> Any:
        """Returns a figure of a split in the manifest, None where it has none."""
        try:
            return self.manifest["splits"][split].get(what)
        except (KeyError, TypeError, AttributeError):
            return None

    def missing(self, *splits: str) -> list[str]:
        """Returns the names of broken shards."""
        return [path.name for split in splits for path in self.paths[split] if path in self.broken]

    def total(self, split: str, what: str) -> int:
        """Returns the sum of a number over the shards of a split."""
        return sum(getattr(facts, what) for facts in self.facts[split])


# ---- the checks ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Check:
    """A line of the table, and the findings below it."""

    name: str
    status: str = "ok"
    found: str = ""
    findings: list[str] = dataclasses.field(default_factory=list)

    def add(self, finding: str, status: str = "FAIL") -> None:
        """Takes note of a finding."""
        self.findings.append(finding)
        self.status = status if self.status == "ok" or status == "FAIL" else self.status

    def add_wrong(self, folder: Folder, *kinds: str, status: str = "FAIL") -> None:
        """Takes note of what is wrong in the shards."""
        for facts in (*folder.facts["val"], *folder.facts["train"]):
            for kind in (kind for kind in kinds if kind in facts.wrong):
                count, place = facts.wrong[kind]
                self.add(f"{facts.name}: {kind} at {place}, {count:,} in all", status)

    def lines(self) -> list[str]:
        """Returns the first findings, and how many more there are."""
        others = len(self.findings) - SHOWN
        return self.findings[:SHOWN] + ([f"… and {others:,} more"] if others > 0 else [])


def check_headers(folder: Folder) -> Check:
    """Returns whether every shard is whole, and belongs to one split."""
    check, train, val = Check("headers"), set(folder.paths["train"]), set(folder.paths["val"])
    for split in (split for split in shards.SPLITS if not folder.paths[split]):
        check.add(f"there is no *_{split}_*.bin")
    for reason in folder.broken.values():
        check.add(reason)
    for path in sorted(train & val):
        check.add(f"{path.name} is both a training and a validation shard")
    for path in sorted({*folder.path.glob("*.bin")} - train - val):
        check.add(f"{path.name} is in no split: nothing reads it", "warn")
    check.found = f"{len(train):,} train and {len(val):,} val shards, {sum(folder.num_tokens.values()):,} tokens"
    return check


def check_manifest(folder: Folder) -> Check:
    """Returns whether the folder holds what its manifest says, and nothing else."""
    check, manifest = Check("manifest"), folder.manifest
    if folder.manifest_error:
        return Check("manifest", "FAIL", folder.manifest_error)
    if manifest is None:
        return Check("manifest", "skipped", "no manifest.json: data/download.py and data/build.py make one")
    listed, broken = manifest["files"], {path.name for path in folder.broken}
    facts = {f.name: f for split in shards.SPLITS for f in folder.facts[split] if f.name not in broken}
    for name in sorted(listed.keys() - facts.keys() - broken):
        check.add(f"{name} is missing")
    for name in sorted((facts.keys() | broken) - listed.keys()):
        check.add(f"{name} is not listed")
    for name in sorted(listed.keys() & facts.keys()):
        stated = int(listed[name]["tokens"])
        if facts[name].num_tokens != stated:
            check.add(f"{name} has {facts[name].num_tokens:,} tokens, listed are {stated:,}")
        elif facts[name].sha256 != listed[name].get("sha256"):
            check.add(f"{name} has another SHA-256 than listed")
    for split in shards.SPLITS:
        tokens = sum(int(file["tokens"]) for name, file in listed.items() if f"_{split}_" in name)
        if tokens != folder.stated(split, "tokens"):
            check.add(f"its {split} shards have {tokens} tokens, its split {folder.stated(split, 'tokens')}")
    name = os.path.relpath(folder.tokenizer, folder.path)
    if not folder.tokenizer.is_file():
        check.add(f"the tokenizer {name} is missing")
    elif shards.hash_file(folder.tokenizer) != manifest["tokenizer"]["sha256"]:
        check.add(f"the tokenizer {name} has another SHA-256 than listed")
    elif folder.vocab_size != (stated := int(manifest["tokenizer"]["vocab_size"])):
        check.add(f"the tokenizer {name} has {folder.vocab_size} pieces, listed are {stated}")
    check.found = f"{len(listed):,} shards by token count and SHA-256, and the tokenizer"
    return check


def check_tokens(folder: Folder) -> Check:
    """Returns whether every id is one that text can have."""
    if not any(folder.facts.values()):
        return Check("tokens", "skipped", NOTHING)
    check, size = Check("tokens"), folder.vocab_size
    check.add_wrong(folder, *FORBIDDEN.values())
    check.found = f"ids below {size:,}; no pad, eos, unk" if size else "no pad, eos, unk; the vocabulary is not known"
    return check


def check_documents(folder: Folder) -> Check:
    """Returns whether the splits are whole documents, as many as the manifest says."""
    if not any(folder.facts.values()):
        return Check("documents", "skipped", NOTHING)
    check, counts = Check("documents"), {split: folder.total(split, "num_documents") for split in shards.SPLITS}
    for split, count in counts.items():
        first, stated = (folder.facts[split] or [Facts("")])[0], folder.stated(split, "documents")
        if first.first_token != BOS_ID and folder.paths[split][0].name == first.name:
            check.add(f"{first.name} begins with token {first.first_token}, not with BOS ({BOS_ID})")
        gone = folder.stated(split, "tokens") not in (None, folder.total(split, "num_tokens"))  # the manifest's concern
        if stated not in (None, count) and not gone and not folder.missing(split):
            check.add(f"{split} has {count} documents, the manifest says {stated}")
    check.add_wrong(folder, EMPTY)
    check.add_wrong(folder, LONG, status="warn")
    check.found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return check


def check_overlap(folder: Folder) -> Check:
    """Returns whether training is free of validation documents."""
    check, val, train = Check("overlap"), folder.facts["val"], folder.facts["train"]
    if not val or not train:
        return Check("overlap", "skipped", "it takes shards of both splits")
    places = {key: f"{facts.name} at token {at:,}" for facts in reversed(val) for key, at in facts.hashes.items()}
    leaked: dict[int, str] = {}
    for facts in train:
        for key, at in facts.hashes.items():
            leaked.setdefault(key, f"{facts.name} at token {at:,} is {places[key]}")
    for place in leaked.values():
        check.add(place)
    times, copies = folder.total("train", "num_hashed"), folder.total("val", "num_hashed") - len(places)
    check.found = f"{len(leaked):,} of {len(places):,} validation documents in training"
    check.found += (f", {times:,} times" if leaked else "") + (f"; {copies:,} copies in validation" if copies else "")
    return check


def check_bytes(folder: Folder) -> Check:
    """Returns whether scoring counts the bytes of the text, and the manifest's figures are those."""
    check, said = Check("bytes"), []
    if folder.lacks.startswith(str(folder.tokenizer)):  # it is there, and nothing can be done with it
        return Check("bytes", "FAIL", folder.lacks)
    if folder.lacks:
        return Check("bytes", "skipped", folder.lacks)
    check.add_wrong(folder, MISCOUNTED)
    for split in (split for split in reversed(shards.SPLITS) if folder.facts[split]):
        found, count = sum((f.measured for f in folder.facts[split]), Counter()), folder.total(split, "num_documents")
        ratio = found["bytes"] / max(1, found["tokens"])
        measured = "all" if found["documents"] == count else f"{found['documents']:,}"
        said.append(f"{split} {ratio:.4f} a token ({measured} of {count:,} documents)")
        exact = found["tokens"] == folder.total(split, "num_tokens") and not folder.missing(split)
        if exact and count == folder.stated(split, "documents"):
            for what, value in (("bytes", found["bytes"]), ("bytes_per_token", ratio)):
                if folder.stated(split, what) not in (None, value):
                    check.add(f"{split} has {what} {value}, the manifest says {folder.stated(split, what)}")
    check.found = ", ".join(said)
    if check.status == "ok" and not any(f.measured["documents"] for facts in folder.facts.values() for f in facts):
        return Check("bytes", "skipped", f"no document could be measured: {check.found or 'there is none'}")
    return check


def check_fingerprint(folder: Folder) -> Check:
    """Returns which text the validation split is."""
    if not folder.facts["val"] or folder.missing("val"):
        return Check("fingerprint", "skipped", "it takes all validation shards")
    if folder.vocab_size is None:
        return Check("fingerprint", "skipped", folder.lacks)
    num_targets = (folder.total("val", "num_tokens") - 1) // WINDOW * WINDOW
    num_bytes = None if folder.lacks else sum(facts.measured["bytes"] for facts in folder.facts["val"])
    begins, tokens = None, np.empty(0, "<u2")
    if folder.vocab_size == 1024:
        for path in folder.paths["val"]:
            rest = max(CHALLENGE_BEGINS) - len(tokens)
            tokens = np.append(tokens, np.fromfile(path, "<u2", rest, offset=HEADER_BYTES)) if rest else tokens
        length = next((length for length in CHALLENGE_BEGINS if length <= len(tokens)), 0)
        begins = hashlib.sha256(tokens[:length].tobytes()).hexdigest() == CHALLENGE_BEGINS.get(length)
    found = fingerprint(folder.vocab_size, num_targets, folder.total("val", "num_documents"), num_bytes, begins)
    return Check("fingerprint", *found)


def fingerprint(
    vocab_size: int, num_targets: int, num_documents: int, num_bytes: int | None, begins: bool | None
) -> tuple[str, str]:
    """Returns (status, words). `begins`: whether the first tokens are the challenge's, None where these are not known;
    then documents and bytes tell it too, in any vocabulary."""
    known, (low, high) = CHALLENGE_TARGETS.get(vocab_size, ()), CHALLENGE_BYTES
    fits = num_documents == CHALLENGE_DOCUMENTS and (num_bytes is None or low <= num_bytes <= high)
    size = f"{num_documents:,} documents, {num_targets:,} targets" + (f", {num_bytes:,} bytes" if num_bytes else "")
    if fits and begins is not False and num_targets in known:
        return "ok", f"the challenge's validation set ({size})"
    if fits and begins is None and num_bytes:
        odd = f"; known are {' and '.join(f'{number:,}' for number in known)} targets" if known else ""
        return "warn" if known else "ok", f"the challenge's validation set, by documents and bytes ({size}{odd})"
    if begins and num_documents < CHALLENGE_DOCUMENTS:
        return "warn", f"a part of the challenge's validation set ({num_documents:,} of 50,000 documents)"
    unknown = "" if vocab_size == 1024 else "; a part of the challenge's is recognised in 1,024 pieces only"
    return "note", f"another text: a score on it is no challenge score ({size}{unknown})"


def check_all(folder: Folder) -> list[Check]:
    """Returns all checks; one that had to do without a shard is not ok."""
    checks = [check_headers(folder), check_manifest(folder), check_tokens(folder), check_documents(folder)]
    checks += [check_overlap(folder), check_bytes(folder), check_fingerprint(folder)]
    if missing := folder.missing(*shards.SPLITS):
        for check in (check for check in checks[1:] if check.status != "skipped"):
            check.add("without " + ", ".join(missing[:SHOWN]) + (", …" if missing[SHOWN:] else ""), "warn")
    return checks


# ---- the command -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the command line's options; exits with status 2 where they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "datasets" / "fineweb10B_sp1024"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="of shards (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="where no manifest names it")
    cores, limit = available_cores()
    jobs_help = f"processes ({cores}, the cores of {limit}; fewer for little data)"
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help=jobs_help)
    parser.add_argument("--all", action="store_true", help="decode all training documents, not a sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder: name one, or fetch the export with data/download.py")
    if args.tokenizer and not args.tokenizer.is_file():
        parser.error(f"--tokenizer {args.tokenizer} is no file")
    if not 0 <= args.jobs <= 1024:
        parser.error(f"--jobs {args.jobs} is not between 0 and 1,024")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Prints what was found and returns the exit status."""
    args = parse_arguments(arguments)
    folder = Folder(args.folder, args.tokenizer)
    folder.look(args.jobs, args.all)
    checks = check_all(folder)
    failed = [check.name for check in checks if check.status == "FAIL"]
    if args.json:
        rows = [{"check": c.name, "status": c.status, "found": c.found, "findings": c.lines()} for c in checks]
        print(json.dumps({"folder": str(folder.path), "failed": failed, "checks": rows}, indent=1))
    else:
        rows = [("check", "", "found")]
        for c in checks:
            rows += [(c.name, c.status, c.found), *(("", "", line) for line in c.lines())]
        shards.print_table(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    with shards.errors_as_messages("verify.py"):
        sys.exit(main())
