"""Measure the data's path on this machine, each figure beside what it is held against. No test: it takes a minute.

    make bench-data                               # on the demonstration's documents, 40 MB with words in other orders
    make bench-data DOCS="a.jsonl b.jsonl.zst"    # on your own

Encoding is timed over the whole third pass of data/build.py (reading, parsing, duplicates, tokens, bytes, shards, the
start of its processes), against SentencePiece's own threads on the same documents, which lie in memory."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import build  # noqa: E402
import demo  # noqa: E402
import documents  # noqa: E402
import numpy as np  # noqa: E402
import parallel  # noqa: E402
import shards  # noqa: E402

import train_gpt as t  # noqa: E402

BYTES, NUM_SHARDS, NUM_STEPS = 40_000_000, 10_000, 20


def seconds_of(function: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def demonstration(path: Path) -> Path:
    """Writes the documents of the running Python's library, again and again with their words in another order."""
    texts, draw, size = sorted(demo.collect_documents(Path(os.__file__).parent)), random.Random(0), 0
    with path.open("w") as file:
        while size < BYTES:
            for text in texts:
                size += file.write(json.dumps({"text": text}) + "\n")
            texts = [" ".join(draw.sample(words, len(words))) for words in map(str.split, texts)]
    return path


def encoding(paths: list[Path], folder: Path) -> list[tuple[str, ...]]:
    """Returns rows on the speed of encoding, for a vocabulary of 1,024 pieces trained on the documents."""
    options = documents.Options()
    batches = documents.read_batches(documents.find_sources(paths, options)[0], options)
    texts = [text for batch in batches for text in documents.parse_batch(batch, options)[0]]
    megabytes, longest = sum(len(text.encode()) for text in texts) / 1e6, max(len(text.encode()) for text in texts)
    model = folder / "bench.model"
    model.write_bytes(build.train_tokenizer(texts[: 20_000_000 * len(texts) // int(megabytes * 1e6)], 1024, longest))
    sp = build.Encoder(model).sp
    cores, _ = parallel.available_cores()
    own = {}
    for threads in (cores, 2 * cores):  # in batches, which is faster than all at once
        work = lambda n=threads: [sp.encode(texts[i : i + 2000], num_threads=n) for i in range(0, len(texts), 2000)]  # noqa: E731
        own[threads] = megabytes / seconds_of(work)
    best = max(own.values())
    rows = [(f"SentencePiece's threads ({megabytes:.0f} MB)", f"{best:.1f} MB/s", f"best of {sorted(own)} threads")]
    for dedup in ("none", "near"):
        command = [
            sys.executable,
            str(ROOT / "data/build.py"),
            *map(str, paths),
            "--name",
            dedup,
            "--vocab",
            str(model),
        ]
        command += ["--root", str(folder), "--dedup", dedup, "--bad", "skip"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        speed = float(re.search(r"^encoded: .* ([\d.]+) MB/s$", out, re.M)[1])
        rows.append((f"data/build.py, --dedup {dedup}", f"{speed:.1f} MB/s", f"{speed / best:.0%}; at least 80%"))
    return rows


def shard_rows(folder: Path) -> list[tuple[str, ...]]:
    """Returns rows on shards: opening very many, and drawing windows from them."""
    tokens = np.random.default_rng(0).integers(4, 1024, 20_000).astype("<u2")
    for number in range(NUM_SHARDS):
        (folder / f"x_train_{number:06d}.bin").write_bytes(shards.shard_header(len(tokens)) + tokens.tobytes())
    h = t.Hyperparameters(data_path=str(folder), device="cpu")
    rt = t.Runtime(h)
    found: list[list[np.ndarray]] = []
    paths = sorted(folder.glob("*_train_*.bin"))
    opened = seconds_of(lambda: [t.load_data_shard(path) for path in paths])
    checked = seconds_of(lambda: found.append(t.load_shards(h, "train")))
    loader = t.TokenLoader(h, rt, found[0])
    drawn = seconds_of(lambda: [loader.next_batch() for _ in range(NUM_STEPS)]) / NUM_STEPS
    loader.pool.shutdown(cancel_futures=True)
    return [
        (f"open {NUM_SHARDS:,} shards", f"{opened:.2f} s", "below 1 s"),
        (f"the same, every token checked ({NUM_SHARDS * len(tokens) / 1e6:.0f} M)", f"{checked:.2f} s", ""),
        (
            f"a shuffled step of {h.train_batch_tokens:,} tokens",
            f"{1000 * drawn:.0f} ms",
            "a step takes 83 ms on 8 H100s",
        ),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "many").mkdir()
        paths = [Path(path) for path in sys.argv[1:]] or [demonstration(folder / "demonstration.jsonl")]
        shards.print_table([("what", "measured", "against"), *encoding(paths, folder), *shard_rows(folder / "many")])


if __name__ == "__main__":
    main()
