"""Build training data: documents -> a tokenizer -> shards in the challenge's format, and a manifest that says it all.

    python data/build.py documents.jsonl --name mine --vocab 4096          # train a tokenizer of 4,096 pieces, encode
    python data/build.py corpus/ more.parquet --name mine --vocab bytes    # the byte-level vocabulary of 260 ids
    zstdcat docs.zst | python data/build.py - --name mine --vocab data/tokenizers/fineweb_1024_bpe.model
    python data/build.py data/docs_selected.jsonl --name fineweb10B --vocab 8192 --val-documents 50000 --val-first \\
        --dedup none        # the challenge's own documents and split, in a larger vocabulary

The result is a folder data/datasets/<name>_<vocabulary>/ that needs no further settings to be trained on:
`DATA_PATH=data/datasets/mine_sp4096 python train_gpt.py`. It appears all at once, when everything in it is complete.

Three passes over the files: count, check and choose the validation documents; sign these against near duplicates and
draw the tokenizer's sample from the others; encode. Order is that of the input (the trainer shuffles), and every byte
of the result follows from the input, the options and the versions of the packages, not from the number of processes. A
build that was interrupted goes on where it was. Memory: 150 MB and 150 MB a process, with documents of ordinary length;
one of --max-document-bytes takes up to 80 times its size while it is encoded, and a row group of a Parquet file may
take its own. Tokenizer training is a process of its own before: 305 MB in all with --sample-bytes as it is."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shards
from documents import FORMATS, PACKED, Batch, Options, Rejected, find_sources, parse_batch, read_batches
from parallel import available_cores, in_order, interrupts_held_back
from shards import BOS_ID, BYTE_VOCAB_SIZE, EOS_ID, PAD_ID, UNK_ID, DataError, Progress

SHARD_TOKENS = 100_000_000  # as in the challenge's export
# Near duplicates: MinHash (Broder 1997) of 128 values in 16 bands of 8 finds documents that share 70% of their shingles
# with a probability of 1 - (1 - 0.7^8)^16 = 61%, 80% with 95%, 90% with 99.99%. A shingle is 32 bytes, some five words,
# from one place in eight on, chosen by the bytes there: in any language, and however much text stands before.
NUM_HASHES, NUM_BANDS, NEAR_JACCARD, SHINGLE_BYTES, SHINGLE_STEP = 128, 16, 0.7, 32, 8
DEDUP_HELP = "copies of validation documents kept out of training (%(default)s, which is exact ones too)"
LONGEST_SENTENCE = 1 << 30  # bytes, SentencePiece's own limit
SMALLEST_VOCAB, LARGEST_VOCAB = 512, 65_536  # 260 are taken, and tokens are uint16
JOURNAL_SECONDS = 10.0
SHOWN_REJECTIONS = 10
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples scatter (Knuth, TAOCP 6.4)


class Settings(NamedTuple):
    """What the result depends on, besides the input."""

    vocab: str  # a number of pieces, "bytes", or the path of a SentencePiece model
    seed: int = 1337
    val_documents: int = 0  # 0: one in a hundred, 50,000 at most
    val_first: bool = False
    dedup: str = "near"  # none, exact, near
    sample_bytes: int = 50_000_000
    shard_tokens: int = SHARD_TOKENS
    on_bad: str = "refuse"  # or skip
    licence: str = "not stated"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, longest_bytes: int, **options: Any) -> bytes:
    """Returns a SentencePiece BPE model with the challenge's options; DataError where the text cannot fill it.

    A training sentence is a whole document, exactly what is encoded later: cut into paragraphs, their first words would
    be counted without the leading "▁". The limit matters: longer sentences are left out without an error."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        max_sentence_length=longest_bytes,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.999,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        normalization_rule_name="nmt_nfkc",  # folds newlines and tabs into spaces: "a\nb" is "a", "▁b"
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        num_threads=1,
        **{"minloglevel": 2, **options},
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    if pieces != vocab_size:
        raise DataError(f"the text gives {pieces:,} pieces, not {vocab_size:,}: a smaller --vocab, or more text")
    return model.getvalue()


def train_tokenizer_apart(sample: Path, vocab_size: int, model: Path) -> None:
    """Trains on the lines of a file in a process of its own, whose memory is given back, and shows how far it is."""
    log = sample.with_suffix(".log")
    log.write_bytes(b"")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train_tokenizer_child, args=(sample, vocab_size, model, log), daemon=True)
    with interrupts_held_back():
        process.start()
    progress = Progress("tokenizer", vocab_size, "pieces")
    while process.is_alive():
        process.join(0.5)
        said = log.read_text(errors="replace")
        progress.advance(int((re.findall(r"(?:merges|size)=(\d+)", said) or [0])[-1]) - progress.done)
    if process.exitcode:
        said = log.read_text(errors="replace")
        killed = f"its process was killed ({-process.exitcode}), for want of memory perhaps: try less --sample-bytes"
        reason = killed if process.exitcode < 0 else (said.strip().splitlines() or ["it does not say why"])[-1]
        raise DataError(f"no tokenizer of {vocab_size:,} pieces: {reason}")


def _train_tokenizer_child(sample: Path, vocab_size: int, model: Path, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)  # the library tells its progress on standard error
    with sample.open(encoding="utf-8") as lines:
        try:
            content = train_tokenizer(lines, vocab_size, LONGEST_SENTENCE, minloglevel=0)
        except (DataError, RuntimeError) as error:
            sys.exit(str(error))
    shards.write_atomically(model, content)


def byte_tokenizer() -> bytes:
    """Returns the challenge's byte-level vocabulary, four control ids and the 256 bytes, as a SentencePiece model that
    leaves text as it is. Written by hand: the library can only train models that have pieces besides the bytes."""
    kinds = {"<pad>": 3, "<s>": 3, "</s>": 3, "<unk>": 2} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    pieces = (field(1, field(1, piece) + field(2, 0.0) + field(3, kind)) for piece, kind in kinds.items())
    # Of the trainer's settings: BPE, size, byte fallback, and the ids; of the normalizer's: none of its changes.
    trainer = {3: 2, 4: BYTE_VOCAB_SIZE, 35: 1, 40: UNK_ID, 41: BOS_ID, 42: EOS_ID, 43: PAD_ID}
    normalizer = {1: "identity", 3: 0, 4: 0, 5: 0}
    specs = (b"".join(field(number, value) for number, value in spec.items()) for spec in (trainer, normalizer))
    return b"".join((*pieces, *(field(number, spec) for number, spec in enumerate(specs, 2))))


def field(number: int, value: int | float | str | bytes) -> bytes:
    """Returns a field of a Protocol Buffers message (developers.google.com/protocol-buffers, "Encoding")."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


class Encoder:
    """A tokenizer from its file: texts to tokens, and back to their normal form."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            # One thread: there is a process for every core, and the library would start one more for each core in each.
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes(), num_threads=1)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model ({error})") from None
        self.vocab_size, self.escapes = self.sp.get_piece_size(), self.sp.normalize("a b") != "a b"
        if self.sp.bos_id() != BOS_ID or self.vocab_size > 1 << 16:
            found = f"BOS {self.sp.bos_id()}, {self.vocab_size:,} pieces"
            raise DataError(f"{path} ({found}) does not fit: shards need BOS {BOS_ID} and at most 65,536 pieces")
        if self.sp.is_unknown(self.sp.piece_to_id("▁")) and "<0x20>" not in self.sp.encode("x x", out_type=str):
            raise DataError(f"{path} lacks the bare piece '▁', so bytes would be miscounted: train it anew")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns each text's tokens, uint16, BOS first."""
        return [tokens.astype("<u2") for tokens in self.sp.encode(texts, add_bos=True, out_type="numpy")]

    def normalize(self, texts: list[str]) -> list[str]:
        """Returns the texts as the tokenizer sees them, which is what their tokens decode to."""
        normal = map(self.sp.normalize, texts)
        return [text.replace("▁", " ") for text in normal] if self.escapes else list(normal)

    def decode(self, tokens: list[np.ndarray]) -> list[str]:
        """Returns the texts of documents' tokens."""
        return self.sp.decode([t.tolist() for t in tokens]) if tokens else []  # it would make "" of no documents


# ---- what one process does with a batch ------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Returns a text in which only the words count: documents that differ in case and white space are copies."""
    return " ".join(text.lower().split())


def key_of(folded: str, seed: int) -> int:
    """Returns 64 bits of a folded text, which also order the documents at random."""
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8, key=seed.to_bytes(8, "big")).digest(), "big")


def sign(folded: str) -> Any:
    """Returns the MinHash signature of a folded text."""
    import rensa

    content, signature = folded.encode().ljust(SHINGLE_BYTES), rensa.RMinHash(NUM_HASHES, 0)
    count = len(content) - SHINGLE_BYTES + 1
    a, b, c, d = (np.frombuffer(content, np.uint8, count, at) for at in (0, 3, 7, 12))
    mixed = (a * np.uint8(37) + b) * np.uint8(101) + (c * np.uint8(59) + d) * np.uint8(11)  # modulo 256
    chosen = mixed < 256 // SHINGLE_STEP
    chosen[0] = True
    # An array of all overlapping shingles takes a third of the time of a loop.
    signature.update(np.ndarray(count, f"S{SHINGLE_BYTES}", content, strides=(1,))[chosen].tolist())
    return signature


class Scanned(NamedTuple):
    """What the first pass found in a batch."""

    keys: np.ndarray
    num_bytes: int
    rejected: list[Rejected]


class Selected(NamedTuple):
    """What the second pass took from a batch: of validation documents key and signature, of the others some texts."""

    keys: list[int]
    signatures: list[Any]
    sample: list[str]


class Encoded(NamedTuple):
    """What the third pass made of a batch, by split."""

    tokens: dict[str, np.ndarray]
    counts: Counter  # (split, what) -> number
    num_bytes: int  # of all its texts, for the progress


class Task(NamedTuple):
    """A batch, and which of its documents are for validation, by their place among its valid ones."""

    batch: Batch
    val: frozenset[int]


class Worker:
    """The work of one process: it has the tokenizer and what the validation documents look like."""

    def __init__(self, options: Options, settings: Settings, **held: Any):
        self.options, self.settings = options, settings
        self.sample_limit = int(held.get("sample_fraction", 0.0) * 2**64)
        self.encoder = Encoder(held["tokenizer"]) if "tokenizer" in held else None
        self.val_keys, self.signatures = frozenset(held.get("val_keys", ())), held.get("signatures", [])
        if self.signatures:
            import rensa

            self.near = rensa.RMinHashLSH(NEAR_JACCARD, NUM_HASHES, NUM_BANDS)
            for number, signature in enumerate(self.signatures):
                self.near.insert(number, signature)

    def scan(self, task: Task) -> Scanned:
        """Returns what the first pass finds in a batch."""
        texts, rejected = parse_batch(task.batch, self.options)
        keys = np.array([key_of(fold(text), self.settings.seed) for text in texts], dtype=np.uint64)
        return Scanned(keys, sum(len(text.encode()) for text in texts), rejected)

    def select(self, task: Task) -> Selected:
        """Returns what the second pass takes from a batch."""
        texts, _ = parse_batch(task.batch, self.options)
        found = Selected([], [], [])
        for place, text in enumerate(texts):
            folded = fold(text)
            key = key_of(folded, self.settings.seed)
            if place in task.val:
                found.keys.append(key)
                found.signatures.append(sign(folded) if self.settings.dedup == "near" else None)
            elif key * GOLDEN % 2**64 < self.sample_limit:
                found.sample.append(text)
        return found

    def encode(self, task: Task) -> Encoded:
        """Returns what the third pass makes of a batch; DataError if a validation document is not written exactly."""
        texts, _ = parse_batch(task.batch, self.options)
        counts, tokens, kept = Counter(), {}, {"val": [], "train": []}
        for place, text in enumerate(texts):
            reason = "" if place in task.val or self.settings.dedup == "none" else self.copies_validation(text)
            if reason:
                counts["dropped", reason] += 1
            else:
                kept["val" if place in task.val else "train"].append(text)
        for split, chosen in kept.items():
            encoded, normal = self.encoder.encode(chosen), self.encoder.normalize(chosen)
            if split == "val" and self.encoder.decode(encoded) != normal:  # on all documents in data/verify.py
                raise DataError("a validation document does not decode to its text: use another tokenizer")
            full = [i for i, t in enumerate(encoded) if len(t) > 1 and UNK_ID not in t]
            counts[split, "documents"] += len(full)
            counts[split, "bytes"] += sum(len(normal[i].encode()) for i in full)
            counts["dropped", "no tokens, or unknown ones"] += len(chosen) - len(full)
            tokens[split] = np.concatenate([encoded[i] for i in full]) if full else np.empty(0, "<u2")
            counts[split, "tokens"] += len(tokens[split])
        return Encoded(tokens, counts, sum(len(text.encode()) for text in texts))

    def copies_validation(self, text: str) -> str:
        """Returns how a training document is a copy of a validation document, an empty text if it is none."""
        folded = fold(text)
        if key_of(folded, self.settings.seed) in self.val_keys:
            return "exact duplicates"
        if self.signatures:
            signature = sign(folded)
            candidates = (self.signatures[number] for number in self.near.query(signature))
            if any(signature.jaccard(other) >= NEAR_JACCARD for other in candidates):
                return "near duplicates"
        return ""


# ---- shards that grow ------------------------------------------------------------------------------------------------


class SplitWriter:
    """The shards of a split while they grow. A header is written when its shard is complete; what was written after the
    last journal is cut off again when a build goes on."""

    def __init__(self, folder: Path, prefix: str, split: str, shard_tokens: int, state: dict[str, int]):
        self.folder, self.prefix, self.split, self.shard_tokens = folder, prefix, split, shard_tokens
        self.index, self.num_tokens = state["index"], state["num_tokens"]  # the shard that grows, its tokens
        for path in shards.list_shards(folder, split):
            if path.name > self.path.name:
                path.unlink()
        self.file = self.path.open("r+b" if self.num_tokens else "w+b")
        if self.num_tokens and self.file.seek(0, os.SEEK_END) < shards.HEADER_BYTES + 2 * self.num_tokens:
            raise DataError(f"{self.path} is shorter than its journal says: remove {folder} and build again")
        self.file.truncate(shards.HEADER_BYTES + 2 * self.num_tokens)
        self.file.seek(0, os.SEEK_END)

    @property
    def path(self) -> Path:
        """The shard that grows."""
        return self.folder / f"{self.prefix}_{self.split}_{self.index:06d}.bin"

    def append(self, tokens: np.ndarray) -> None:
        """Adds tokens, and goes on to the next shard where one is full."""
        while len(tokens):
            if self.num_tokens == self.shard_tokens:
                self.complete()
                self.index, self.num_tokens = self.index + 1, 0
                self.file = self.path.open("w+b")
                self.file.write(bytes(shards.HEADER_BYTES))
            part = tokens[: self.shard_tokens - self.num_tokens]
            self.file.write(part.tobytes())
            self.num_tokens, tokens = self.num_tokens + len(part), tokens[len(part) :]

    def save(self) -> dict[str, int]:
        """Returns the state, of which everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"index": self.index, "num_tokens": self.num_tokens}

    def complete(self) -> None:
        """Writes the header and closes the shard."""
        self.file.seek(0)
        self.file.write(shards.shard_header(self.num_tokens))
        self.save()
        self.file.close()


# ---- the build -------------------------------------------------------------------------------------------------------


class Build:
    """One build, from its files to its folder."""

    def __init__(self, folder: Path, paths: list[Path], options: Options, settings: Settings, jobs: int = 1):
        self.folder, self.options, self.settings, self.jobs = folder, options, settings, jobs
        self.sources, ignored = find_sources(paths, options)
        self.work = folder.with_name(folder.name + ".building")
        self.docs_per_batch: list[int] = []
        self.num_bytes, self.val = 0, np.empty(0, np.int64)
        self.rejected = Counter({f"not read: {suffix}": number for suffix, number in sorted(ignored.items())})
        self.num_rejected = 0  # of them places in files

    def tasks(self) -> Iterator[Task]:
        """Yields the batches with their validation documents; in the first pass none is chosen yet."""
        begin = 0
        for number, batch in enumerate(read_batches(self.sources, self.options)):
            end = begin + (self.docs_per_batch[number] if number < len(self.docs_per_batch) else 0)
            first, last = np.searchsorted(self.val, (begin, end))
            yield Task(batch, frozenset((self.val[first:last] - begin).tolist()))
            begin = end

    def run(self, name: str, tasks: Iterable[Task], **held: Any) -> Iterator[Any]:
        """Yields what Worker.<name> returns for each task, in order."""
        return in_order(functools.partial(Worker, self.options, self.settings, **held), name, tasks, self.jobs)

    def scan(self) -> None:
        """First pass: counts, reports what is no document, and chooses the validation documents."""
        wanted, progress = self.settings.val_documents or 50_000, Progress("reading", 0, "MB", 1e-6)
        keys, places, num_docs = np.empty(0, np.uint64), np.empty(0, np.int64), 0
        with (self.work / "rejected.jsonl").open("w") as report:
            for found in self.run("scan", self.tasks()):
                for rejected in found.rejected:
                    report.write(json.dumps(rejected._asdict()) + "\n")
                    self.reject(rejected)
                self.docs_per_batch.append(len(found.keys))
                self.num_bytes += found.num_bytes
                if not self.settings.val_first:
                    keys = np.concatenate((keys, found.keys))
                    places = np.concatenate((places, np.arange(num_docs, num_docs + len(found.keys))))
                if len(keys) > 4 * wanted:
                    keys, places = smallest(keys, places, wanted)
                num_docs += len(found.keys)
                progress.advance(found.num_bytes)
        if self.num_rejected and self.settings.on_bad == "refuse":
            fix = f"mend them, or leave them out with --bad skip; all are named in {self.work / 'rejected.jsonl'}"
            raise DataError(f"{self.num_rejected:,} places hold no document: {fix}")
        if not num_docs:
            raise DataError(f"there are no documents in {', '.join(str(source.path) for source in self.sources[:5])}")
        wanted = self.settings.val_documents or min(50_000, num_docs // 100)
        if not 0 < wanted < num_docs:
            fix = "set --val-documents, or give more (of one plain text --text-unit line or paragraph makes many)"
            raise DataError(f"{num_docs:,} documents do not give {wanted:,} for validation: {fix}")
        self.val = np.arange(wanted) if self.settings.val_first else np.sort(smallest(keys, places, wanted)[1])
        print(f"read: {num_docs:,} documents, {self.num_bytes / 1e6:,.1f} MB, {len(self.val):,} for validation")

    def reject(self, rejected: Rejected) -> None:
        """Counts what is no document, and shows the first ones."""
        shown, self.num_rejected = self.num_rejected, self.num_rejected + 1
        self.rejected[rejected.reason.split(" (")[0]] += 1
        if shown < SHOWN_REJECTIONS:
            print(f"no document: {rejected.file}:{rejected.line}: {rejected.reason}", file=sys.stderr)
        elif shown == SHOWN_REJECTIONS:
            print(f"no document: … the others are in {self.work / 'rejected.jsonl'}", file=sys.stderr)

    def select(self) -> Selected:
        """Second pass: keys and signatures of the validation documents; the tokenizer's sample goes to a file."""
        training = self.settings.vocab.isdigit() and not self.tokenizer.exists()
        found = Selected([], [], [])
        if not training and self.settings.dedup == "none":
            return found
        fraction = self.settings.sample_bytes / max(1, self.num_bytes) if training else 0.0
        progress = Progress("sampling", len(self.docs_per_batch), "batches")
        tasks = (task for task in self.tasks() if training or task.val)
        with (self.work / "sample.txt").open("w", encoding="utf-8") as sample:
            for part in self.run("select", tasks, sample_fraction=fraction):
                found.keys.extend(part.keys)
                found.signatures.extend(part.signatures)
                sample.writelines(" ".join(text.splitlines()) + "\n" for text in part.sample)
                progress.advance(1)
        return found

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file inside of the folder, so that shards and tokenizer cannot be parted."""
        return self.work / "tokenizer.model"

    def make_tokenizer(self) -> None:
        """Trains, copies or writes the tokenizer, unless an interrupted build has left it."""
        if self.tokenizer.exists():
            return
        if self.settings.vocab.isdigit():
            start = time.monotonic()
            train_tokenizer_apart(self.work / "sample.txt", int(self.settings.vocab), self.tokenizer)
            size = (self.work / "sample.txt").stat().st_size
            print(f"tokenizer: trained on {size / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s")
        elif self.settings.vocab == "bytes":
            shards.write_atomically(self.tokenizer, byte_tokenizer())
        else:
            shards.write_atomically(self.tokenizer, Path(self.settings.vocab).read_bytes())

    def encode(self, selected: Selected) -> Counter:
        """Third pass: writes the shards and returns the counts."""
        journal, start = self.work / "journal.json", time.monotonic()
        state = json.loads(journal.read_text()) if journal.exists() else {"batches": 0, "counts": []}
        fresh, prefix = {"index": 0, "num_tokens": 0}, self.folder.name.rsplit("_", 1)[0]
        size = self.settings.shard_tokens
        writers = {s: SplitWriter(self.work, prefix, s, size, state.get(s, fresh)) for s in shards.SPLITS}
        counts = Counter({(kind, what): number for kind, what, number in state["counts"]})
        done = begin = state["batches"]
        skipped_bytes = self.num_bytes * sum(self.docs_per_batch[:done]) / sum(self.docs_per_batch)
        if done:
            print(f"going on after {skipped_bytes / 1e6:,.1f} MB")
        progress, last = Progress("encoding", self.num_bytes - skipped_bytes, "MB", 1e-6), time.monotonic()
        tasks = (task for number, task in enumerate(self.tasks()) if number >= begin)
        signatures = selected.signatures if self.settings.dedup == "near" else []
        held = {"tokenizer": self.tokenizer, "val_keys": selected.keys, "signatures": signatures}
        for part in self.run("encode", tasks, **held):
            for split, tokens in part.tokens.items():
                writers[split].append(tokens)
            counts.update(part.counts)
            done += 1
            progress.advance(part.num_bytes)
            if time.monotonic() - last > JOURNAL_SECONDS:
                last, state = time.monotonic(), {split: writer.save() for split, writer in writers.items()}
                state |= {"batches": done, "counts": [(*key, number) for key, number in counts.items()]}
                shards.write_atomically(journal, json.dumps(state).encode())
        for writer in writers.values():
            writer.complete()
        seconds = time.monotonic() - start
        print(f"encoded: {progress.done / 1e6:,.1f} MB in {seconds:.1f} s, {progress.done / 1e6 / seconds:.2f} MB/s")
        return counts

    def finish(self, counts: Counter, recipe: dict[str, Any]) -> None:
        """Looks at every shard once more, writes the manifest, and gives the folder its name."""
        encoder, splits, files = Encoder(self.tokenizer), {}, {}
        for split in shards.SPLITS:
            figures = {what: counts[split, what] for what in ("documents", "tokens", "bytes")}
            if not figures["tokens"]:
                raise DataError(f"no document is left for {split}: give more, or another --val-documents or --dedup")
            figures["bytes_per_token"] = figures["bytes"] / figures["tokens"]
            paths = shards.list_shards(self.work, split)
            with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
                facts = list(pool.map(lambda path: shards.check_shard(path, encoder.vocab_size), paths))
            files |= {path.name: fact._asdict() for path, fact in zip(paths, facts)}
            splits[split] = {"shards": len(paths), **figures}
            assert sum(fact.tokens for fact in facts) == figures["tokens"], (split, facts, figures)
        manifest = {"name": self.folder.name, "splits": splits, "files": files}
        manifest["tokenizer"] = shards.tokenizer_entry(self.work, self.tokenizer, encoder.vocab_size)
        manifest["dropped"] = {what: number for (kind, what), number in sorted(counts.items()) if kind == "dropped"}
        manifest |= {"rejected": dict(self.rejected), **recipe}
        for name in ("sample.txt", "sample.log", "journal.json", "recipe.json"):
            (self.work / name).unlink(missing_ok=True)
        if not self.num_rejected:
            (self.work / "rejected.jsonl").unlink(missing_ok=True)
        shards.write_manifest(self.work, manifest)
        os.replace(self.work, self.folder)

    def make(self) -> None:
        """Builds the folder, or goes on where an interrupted build of the same recipe was."""
        recipe = self.recipe()
        if self.folder.exists():
            manifest = shards.read_manifest(self.folder) or {}
            if {**manifest, **recipe} != manifest:
                raise DataError(f"{self.folder} exists, and was not made from this: another --name, or move it away")
            print(f"up to date: {self.folder}")
            return
        place = self.work / "recipe.json"
        if self.work.exists() and (not place.exists() or json.loads(place.read_text()) != recipe):
            print(f"{self.work} is of another build: beginning anew")
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True, exist_ok=True)
        for left in self.work.glob("*.tmp"):  # by a build that was killed while it wrote a file
            left.unlink()
        shards.write_atomically(place, json.dumps(recipe).encode())
        self.scan()
        selected = self.select()
        self.make_tokenizer()
        counts = self.encode(selected)
        if self.recipe() != recipe:
            raise DataError("the files changed while they were read: build again when nothing writes to them")
        self.finish(counts, recipe)

    def recipe(self) -> dict[str, Any]:
        """Returns all that the result depends on; files by content, not by place."""
        settings = self.settings._asdict()
        licence = settings.pop("licence")
        if not self.settings.vocab.isdigit() and self.settings.vocab != "bytes":
            settings["vocab"] = shards.hash_file(Path(self.settings.vocab))
        sources = [{"file": s.path.name, "format": s.format, "bytes": s.path.stat().st_size} for s in self.sources]
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            digests = pool.map(shards.hash_file, [source.path for source in self.sources])
            sources = [{**source, "sha256": digest, "licence": licence} for source, digest in zip(sources, digests)]
        packages = ("sentencepiece", "numpy", *(("rensa",) if self.settings.dedup == "near" else ()))
        versions = {package: importlib.metadata.version(package) for package in packages}
        return {"sources": sources, "options": self.options._asdict(), "settings": settings, "versions": versions}


def smallest(keys: np.ndarray, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest distinct keys with the first place of each."""
    order = np.lexsort((places, keys))
    keys, places = keys[order], places[order]
    first = np.append(True, keys[1:] != keys[:-1]) if len(keys) else np.empty(0, bool)
    return keys[first][:count], places[first][:count]


# ---- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def spooled(paths: list[str], place: Path) -> Iterator[list[Path]]:
    """Yields the paths; what comes from standard input, packed or not, lies in a file meanwhile: it is read thrice."""
    if "-" not in paths:
        yield [Path(path) for path in paths]
        return
    first = sys.stdin.buffer.read(shards.PIECE_BYTES)
    place = place.with_name(place.name + next((end for end, magic in PACKED.items() if first.startswith(magic)), ""))
    try:
        with place.open("wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file, shards.PIECE_BYTES)
        yield [place if path == "-" else Path(path) for path in paths]
    except DataError as error:  # that file is gone when somebody reads this: a command begins with - again
        raise DataError(str(error).replace(shlex.quote(str(place)), "-").replace(str(place), "-")) from None
    finally:
        place.unlink(missing_ok=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default, reading, kinds = Settings(""), Options(), ", ".join(FORMATS)
    numbers = {"type": int, "metavar": "N"}
    cores, limit = available_cores()
    for name, options, meaning in (
        ("paths", {"nargs": "+", "metavar": "PATH"}, f"files or folders ({kinds}, .gz, .zst); - is standard input"),
        ("--name", {"required": True}, "the result is the folder data/datasets/<name>_<vocabulary>"),
        ("--vocab", {"required": True}, "a number of pieces to train, bytes, or a SentencePiece model to use"),
        ("--root", {"type": Path, "default": shards.ROOT}, "where datasets/ lies (%(default)s)"),
        ("--val-documents", {"default": 0, **numbers}, "documents held out (1 in 100, 50,000 at most)"),
        ("--val-first", {"action": "store_true"}, "hold out the first ones, as the challenge's split, not random ones"),
        ("--dedup", {"choices": ("near", "exact", "none"), "default": default.dedup}, DEDUP_HELP),
        ("--bad", {"choices": ("refuse", "skip"), "default": default.on_bad}, "what is no document (%(default)s)"),
        ("--seed", {"default": default.seed, **numbers}, "of held-out documents and sample (%(default)s)"),
        ("--sample-bytes", {"default": default.sample_bytes, **numbers}, "to train a tokenizer on (%(default)s)"),
        ("--shard-tokens", {"default": default.shard_tokens, **numbers}, "of a full shard (%(default)s)"),
        ("--format", {"choices": ("auto", "jsonl", "text", "parquet"), "default": "auto"}, "where names do not say it"),
        ("--text-key", {"default": reading.text_key}, "of JSON lines; column of Parquet files (%(default)s)"),
        ("--text-unit", {"choices": ("file", "line", "paragraph"), "default": "file"}, "of plain text (%(default)s)"),
        ("--max-document-bytes", {"default": reading.max_document_bytes, **numbers}, "longer is bad (%(default)s)"),
        ("--licence", {"default": default.licence}, "of the documents, for the manifest"),
        ("--jobs", {"default": cores, **numbers}, f"processes (%(default)s, the cores of {limit})"),
    ):
        parser.add_argument(name, help=meaning, **options)
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises DataError where an option has a value that cannot be."""
    for name, low, high in (
        ("val_documents", 0, 10**9),
        ("seed", 0, 2**63),
        ("sample_bytes", 10_000, 2**40),
        ("shard_tokens", 1, 2**31 - 1),
        ("max_document_bytes", 1, 10**8),
        ("jobs", 1, 1024),
    ):
        if not low <= (value := getattr(args, name)) <= high:
            raise DataError(f"--{name.replace('_', '-')} {value} is not between {low:,} and {high:,}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name) or re.search(r"_(train|val)(_|$)", args.name):
        raise DataError(f"--name {args.name}: use letters, digits, '.', '_' and '-', and no _train or _val as a word")
    if re.fullmatch("[0-9]+", args.vocab) and not SMALLEST_VOCAB <= int(args.vocab) <= LARGEST_VOCAB:
        raise DataError(f"--vocab {args.vocab} is not between {SMALLEST_VOCAB:,} and {LARGEST_VOCAB:,} pieces")
    if not (re.fullmatch("[1-9][0-9]*", args.vocab) or args.vocab == "bytes" or Path(args.vocab).is_file()):
        raise DataError(f"--vocab {args.vocab} is no number, not `bytes`, and no file")
    if args.dedup == "near" and importlib.util.find_spec("rensa") is None:
        raise DataError("--dedup near needs the package rensa: pip install -r data/requirements.txt")


def main(arguments: list[str] | None = None) -> None:
    """Builds what the command line says."""
    args = parse_arguments(arguments)
    check_arguments(args)
    options = Options(args.format, args.text_key, args.text_unit, args.max_document_bytes)
    names = [field for field in Settings._fields if field != "on_bad"]
    settings = Settings(**{name: getattr(args, name) for name in names}, on_bad=args.bad)
    start = time.monotonic()
    if args.vocab.isdigit() or args.vocab == "bytes":
        vocabulary = "byte260" if args.vocab == "bytes" else f"sp{args.vocab}"
    else:
        vocabulary = f"sp{Encoder(Path(args.vocab)).vocab_size}"
    folder = args.root / "datasets" / f"{args.name}_{vocabulary}"
    spool = folder.with_name(f"{folder.name}.stdin.{'txt' if args.format == 'text' else 'jsonl'}")
    with shards.locked(folder.with_name(f".{folder.name}.lock")), spooled(args.paths, spool) as paths:
        Build(folder, paths, options, settings, args.jobs).make()
    show(folder, time.monotonic() - start)


def show(folder: Path, seconds: float) -> None:
    """Prints what was built, and how to train on it."""
    manifest = shards.read_manifest(folder)
    rows = [("split", "documents", "MB", "tokens", "bytes per token", "shards")]
    for split, figures in manifest["splits"].items():
        sizes = f"{figures['bytes'] / 1e6:,.3f}", f"{figures['tokens']:,}", f"{figures['bytes_per_token']:.4f}"
        rows.append((split, f"{figures['documents']:,}", *sizes, str(figures["shards"])))
    shards.print_table(rows)
    left_out = {**manifest["rejected"], **manifest["dropped"]}
    print("left out: " + (", ".join(f"{number:,} {what}" for what, number in left_out.items() if number) or "nothing"))
    print(f"built {folder} in {seconds:.1f} s; train on it with")
    print(f"    DATA_PATH={shlex.quote(str(folder))} python train_gpt.py")


if __name__ == "__main__":
    with shards.errors_as_messages("build.py", works_in_silence=True):
        main()
