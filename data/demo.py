"""Build the embedded demonstration corpus offline, and check a demonstration run against its documented figures.

    python data/demo.py                    # corpus -> tokenizer -> shards: 3 s and 105 MB of memory on two cores
    python data/demo.py check logs/demo    # did this run learn what README documents? exit status 1 if not

The corpus is the English that every CPython carries: the reference texts of `pydoc_data.topics` and the docstrings of
the standard library, one document per topic and per module, about 2 MB. Modules are parsed, never imported. Corpus and
tokenizer, so every figure of a run, belong to one build of CPython: compare `corpus_sha256` before comparing losses.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import build as builder
import numpy as np
import shards

NUM_TRAIN_SHARDS = 2  # so that a demonstration crosses a shard boundary

SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
MIN_DOCUMENT_CHARS = 200
MIN_CORPUS_BYTES = 1_000_000  # CPython 3.10 to 3.13 give 2.1 to 2.2 MB, Debian's 1.9 (no tkinter, no idlelib)
VALIDATION_FRACTION = 0.055
MIN_VALIDATION_BYTES = 165_000  # 61,500 tokens or more: CPython 3.10 to 3.13 have 2.59 to 2.66 bytes per token
MAX_VALIDATION_DOCUMENT_BYTES = 20_000  # else one document (tkinter, 65 kB) can be 40% of the validation set
# Topics quote each other, sibling modules share docstrings: on CPython 3.10, 31% of the validation text lies in spans
# of 64 characters that train has too. Dropping shared paragraphs of >= 200 characters leaves 11%, of >= 60 leaves 5%.
MIN_SHARED_PARAGRAPH_CHARS = 60

FINAL_BPB_RANGE = (1.7, 2.4)  # what `check` holds a run against; README documents the same figures
FIRST_LOSS_TOLERANCE_NATS = 0.2  # around ln(vocab_size), the loss of a uniform guess: 6.93 for 1024 pieces
MIN_LOSS_DROP_NATS = 2.0
METRIC_KEYS = {"train": ("step", "train_loss"), "eval": ("val_bpb",), "final": ("val_loss", "val_bpb")}


# ---- documents ---------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Documents of both splits in shard order, and how many train paragraphs were dropped as copies of validation."""

    train: list[str]
    validation: list[str]
    num_dropped_paragraphs: int


def fold_document(text: str) -> str:
    """Returns `text` as paragraphs of single-spaced words, a blank line between them.

    The tokenizer's normaliser folds white space anyway, so indentation (`inspect.cleandoc`) could not change a token.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def iterate_docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and its functions, nested ones too, in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node, clean=False) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):  # what can hold a definition
            yield from iterate_docstrings(child)


def read_modules(library: Path) -> Iterator[str]:
    """Yields one document per Python file below `library`, in any order; skips files that do not decode or parse."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            try:
                document = fold_document("\n\n".join(iterate_docstrings(ast.parse(path.read_bytes()))))
                document.encode()  # a docstring can spell a lone surrogate, which is no UTF-8
            except (SyntaxError, ValueError) as error:  # UnicodeError is a ValueError
                print(f"skipped {path}: {error}")
            else:
                yield document


def collect_documents(library: Path) -> set[str]:
    """Returns the distinct documents of useful length: topics, and modules of the standard library at `library`."""
    from pydoc_data.topics import topics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own sources
        documents = {*map(fold_document, topics.values()), *read_modules(library)}
    documents = {document for document in documents if len(document) >= MIN_DOCUMENT_CHARS}
    if (num_bytes := count_bytes(documents)) < MIN_CORPUS_BYTES:
        raise shards.DataError(
            f"{library}: {num_bytes:,} bytes of documents; use a Python that carries its library's sources"
        )
    return documents


def count_bytes(documents: Iterable[str]) -> int:
    """Returns the UTF-8 bytes of all documents together."""
    return sum(len(document.encode()) for document in documents)


def split_documents(documents: Iterable[str]) -> Corpus:
    """Returns the corpus, ordered and split by the SHA-256 of each document: by the texts and nothing else.

    The smallest hashes are held out. A train paragraph that validation has word for word is dropped.
    """
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    wanted_bytes = max(MIN_VALIDATION_BYTES, VALIDATION_FRACTION * count_bytes(ordered))
    train, validation, held_out_bytes = [], [], 0
    for document in ordered:
        num_bytes = len(document.encode())
        if held_out_bytes < wanted_bytes and num_bytes <= MAX_VALIDATION_DOCUMENT_BYTES:
            validation.append(document)
            held_out_bytes += num_bytes
        else:
            train.append(document.split("\n\n"))
    held_out = {p for document in validation for p in document.split("\n\n") if len(p) >= MIN_SHARED_PARAGRAPH_CHARS}
    num_dropped = sum(paragraph in held_out for paragraphs in train for paragraph in paragraphs)
    cleaned = ("\n\n".join(p for p in paragraphs if p not in held_out) for paragraphs in train)
    return Corpus([document for document in cleaned if len(document) >= MIN_DOCUMENT_CHARS], validation, num_dropped)


def hash_corpus(corpus: Corpus) -> str:
    """Returns the SHA-256 (hex) of the documents of both splits in order; JSON keeps their boundaries unambiguous."""
    return hashlib.sha256(json.dumps([corpus.train, corpus.validation]).encode()).hexdigest()


# ---- tokens and files --------------------------------------------------------------------------------------------


def encode_documents(encoder: builder.Encoder, documents: list[str]) -> tuple[list[np.ndarray], dict[str, float]]:
    """Returns each document's tokens, BOS first and no EOS, and the counts of the split.

    Bytes are those of the decoded text, which is what bits per byte are divided by.
    """
    encoded = encoder.encode(documents)
    num_tokens, num_bytes = sum(map(len, encoded)), count_bytes(encoder.decode(encoded))
    counts = {"documents": len(documents), "tokens": num_tokens, "bytes": num_bytes}
    return encoded, {**counts, "bytes_per_token": num_bytes / num_tokens}


def write_shard(path: Path, documents: list[np.ndarray]) -> dict[str, Any]:
    """Writes a shard of documents and returns what the manifest says of it."""
    tokens = np.concatenate(documents).astype("<u2")
    write(path, shards.shard_header(len(tokens)) + tokens.tobytes())
    return {"tokens": len(tokens), "sha256": shards.hash_file(path)}


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and says so."""
    shards.write_atomically(path, content)
    print(f"wrote {path} ({len(content):,} bytes)")


def is_up_to_date(folder: Path, recipe: dict[str, Any]) -> bool:
    """Returns whether the folder's manifest was written for this recipe and every file it names is there unchanged."""
    try:
        manifest = shards.read_manifest(folder) or {}
        files = {name: file["sha256"] for name, file in manifest["files"].items()}
        files[manifest["tokenizer"]["path"]] = manifest["tokenizer"]["sha256"]
        same = all(shards.hash_file(folder / name) == sha256 for name, sha256 in files.items())
        return same and manifest == {**manifest, **recipe}
    except (OSError, KeyError, TypeError, shards.DataError):  # a file is missing, or the manifest is not ours
        return False


# ---- commands ----------------------------------------------------------------------------------------------------


def build(output: Path, vocab_size: int = 1024, force: bool = False) -> None:
    """Writes tokenizer, shards and, last, the manifest below `output`, unless they are there already."""
    if not 512 <= vocab_size <= 8192:
        raise shards.DataError(f"vocab_size={vocab_size}: choose 512 to 8192, what a corpus of 2 MB can fill")
    started = time.perf_counter()
    corpus = split_documents(collect_documents(Path(sysconfig.get_path("stdlib"))))
    recipe = {"corpus_sha256": hash_corpus(corpus), "python": platform.python_version(), "vocab_size": vocab_size}
    print(f"corpus of CPython {recipe['python']}: sha256 {recipe['corpus_sha256']}")
    folder = output / "datasets" / f"demo_sp{vocab_size}"
    tokenizer = output / "tokenizers" / f"demo_{vocab_size}_bpe.model"
    if not force and is_up_to_date(folder, recipe):
        print(f"up to date: {folder / 'manifest.json'} ({time.perf_counter() - started:.1f} s)")
        return

    print(f"{folder} is absent, stale or overruled: training a tokenizer of {vocab_size} pieces")
    longest = max(len(document.encode()) for document in corpus.train)
    write(tokenizer, builder.train_tokenizer(corpus.train, vocab_size, longest))
    encoder = builder.Encoder(tokenizer)
    train, train_counts = encode_documents(encoder, corpus.train)
    validation, validation_counts = encode_documents(encoder, corpus.validation)
    files = {"demo_val_000000.bin": validation}
    for i in range(NUM_TRAIN_SHARDS):
        first, end = len(train) * i // NUM_TRAIN_SHARDS, len(train) * (i + 1) // NUM_TRAIN_SHARDS
        files[f"demo_train_{i:06d}.bin"] = train[first:end]
    manifest = {"name": folder.name, **recipe, "num_dropped_paragraphs": corpus.num_dropped_paragraphs}
    manifest["files"] = {name: write_shard(folder / name, documents) for name, documents in files.items()}
    manifest["tokenizer"] = shards.tokenizer_entry(folder, tokenizer, vocab_size)
    manifest["splits"] = {"train": train_counts, "val": validation_counts}
    manifest["sources"] = [{"file": "the library's documentation", "licence": "PSF licence, as the running Python"}]
    shards.write_manifest(folder, manifest)
    for split, counts in (("train", train_counts), ("validation", validation_counts)):
        print(f"{split}: {counts['documents']:,} documents, {counts['bytes'] / 1e6:.3f} MB, ", end="")
        print(f"{counts['tokens']:,} tokens, {counts['bytes_per_token']:.4f} bytes per token")
    print(f"train paragraphs dropped because validation has them too: {corpus.num_dropped_paragraphs}")
    print(f"built in {time.perf_counter() - started:.1f} s")


def read_metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of `<run>/metrics.jsonl` by event; exits with the place and the fix if they are unusable."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give the folder of a finished run, for example logs/demo")
    metrics: dict[str, list[dict[str, Any]]] = {event: [] for event in METRIC_KEYS}
    for number, text in enumerate(path.read_text().split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            numbers = {key: float(line[key]) for key in METRIC_KEYS.get(line["event"], ())}
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: not a metrics line ({error!r}): {text!r}; run it again") from error
        metrics.setdefault(line["event"], []).append({**line, **numbers})
    if not metrics["train"]:
        raise SystemExit(f"{path}: no line with event 'train'; the run did not start training, see its log")
    if len(metrics["final"]) != 1:
        found = len(metrics["final"])
        raise SystemExit(f"{path}: {found} lines with event 'final', not 1; let one run finish in a fresh folder")
    return metrics


def check(run: Path, vocab_size: int = 1024) -> bool:
    """Returns whether a demonstration run learnt what README documents; prints one line per check."""
    metrics = read_metrics(run)
    by_step = sorted(metrics["train"], key=lambda line: line["step"])
    first, last, bpb = by_step[0]["train_loss"], by_step[-1]["train_loss"], metrics["final"][0]["val_bpb"]
    uniform = math.log(vocab_size)
    results = [  # a range each, so that a NaN fails
        ("first train_loss", first, uniform - FIRST_LOSS_TOLERANCE_NATS, uniform + FIRST_LOSS_TOLERANCE_NATS),
        ("last train_loss", last, 0.0, first - MIN_LOSS_DROP_NATS),
        ("final val_bpb", bpb, *FINAL_BPB_RANGE),
    ]
    for name, value, low, high in results:
        print(f"{'ok  ' if low <= value <= high else 'FAIL'} {name} {value:.4f}, expected {low:.4f} to {high:.4f}")
    for line in metrics["eval"]:
        print(f"     {line.get('stage')} val_bpb {line['val_bpb']:.4f}")
    has_learnt = all(low <= value <= high for _, value, low, high in results)
    steps = metrics.get("trained", [{}])[-1].get("steps", by_step[-1]["step"])
    wanted = metrics.get("config", [{}])[0].get("iterations", steps)
    if not has_learnt and steps < wanted:
        reason = f"only {steps:.0f} of {wanted} steps fitted into the demonstration's seconds"
        fix = "stop other work, or raise MAX_WALLCLOCK_SECONDS in records/env/demo.env"
        print(f"     {reason}, on a machine that is slow or busy: {fix}")
    return has_learnt


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the parsed command line; `build` is the command when none is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="build tokenizer and shards (the default)")
    build_parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="root (%(default)s)")
    build_parser.add_argument("--force", action="store_true", help="build even when everything is up to date")
    check_parser = commands.add_parser("check", help="check a finished run against the documented figures")
    check_parser.add_argument("run", type=Path, help="folder with metrics.jsonl, for example logs/demo")
    for command in (build_parser, check_parser):
        command.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer (%(default)s)")
    has_command = bool(arguments) and arguments[0] in ("build", "check", "-h", "--help")
    return parser.parse_args(arguments if has_command else ["build", *arguments])


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; exits with status 1 if a check fails."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if args.command == "build":
        build(args.output, args.vocab_size, args.force)
    elif not check(args.run, args.vocab_size):
        raise SystemExit(1)


if __name__ == "__main__":
    with shards.errors_as_messages("demo.py", works_in_silence=True):
        main()
