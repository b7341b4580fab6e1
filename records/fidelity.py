"""Trains the four systems of records/env/ at a small size and compares them with the published scripts at that size.

    python records/fidelity.py            # all of them, one after the other: 6 to 7 minutes each on two CPU cores
    python records/fidelity.py pr518      # one

The size is records/env/bench.env: 4 layers, width 128, 300 steps of 16,384 tokens in file order, scored on the first
131,072 targets of the challenge's validation text. The published scripts ran so on two CPU cores (torch 2.13.0,
compiled, bf16 autocast), cuda replaced by cpu and FlashAttention by torch's kernel. The numbers are raw: of the weights
after the last step, in windows that do not overlap. Prints a table, and ends with status 1 where a system is more than
0.02 bits per byte worse than its original, with 2 where that cannot be said because the tokens differ."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from launch import read_events, read_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_gpt import Hyperparameters  # noqa: E402

BESIDE = ROOT.parent / "shared" / "data"  # where a checkout has the reference's tokens
# System: seed of the published run, its raw bits per byte, and those after its averaging, quantization and sliding.
PUBLISHED = {
    "pr518": (1337, 2.2801, 3.1621),
    "pr562": (1337, 2.3089, 2.3089),
    "pr977": (42, 2.2838, 3.0614),
    "pr1092": (1337, 2.2815, 3.1762),
}
MARGIN = 0.02
# Of the tokens that are trained on and scored.
TOKENS_SHA256 = "4d99a40d6a4954ab160492c742416d913f209df8f8e744946a3a00784637f221"


def settings_of(*names: str) -> dict[str, str]:
    """Returns what the files records/env/<name>.env set, read in this order by a shell, as `make train` reads them."""
    files = [str(ROOT / "records" / "env" / f"{name}.env") for name in names]
    return read_settings(files, {"PATH": os.environ["PATH"]})


def fingerprint(data_path: Path, num_train: int, num_val: int) -> str:
    """Returns the SHA-256 of the first tokens of the training shards, in file order, and of the validation shards."""
    digest = hashlib.sha256()
    for split, count in (("train", num_train), ("val", num_val)):
        for path in sorted(data_path.glob(f"*_{split}_*.bin")):
            tokens = np.fromfile(path, dtype="<u2", offset=1024, count=count)
            digest.update(tokens.tobytes())
            count -= len(tokens)
    return digest.hexdigest()


def train(name: str, data_path: str, tokenizer_path: str) -> tuple[float, float]:
    """Trains one system and returns its raw score and the one after averaging, quantization and sliding."""
    run_id = f"fidelity-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = settings_of(name, "bench") | {"SEED": str(PUBLISHED[name][0]), "TTT_ENABLED": "0", "RUN_ID": run_id}
    settings |= {"DATA_PATH": data_path, "TOKENIZER_PATH": tokenizer_path}
    others = {name: value for name, value in os.environ.items() if name.lower() not in Hyperparameters.knobs()}
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=others | settings, cwd=ROOT, check=True)
    scores = {event["stage"]: event["val_bpb"] for event in read_events(ROOT / "logs" / run_id, "eval")}
    return scores["raw"], scores["sliding"]


def main(names: list[str]) -> int:
    for name in names:
        if name not in PUBLISHED:
            raise SystemExit(f"fidelity.py: error: {name} is no system, use some of: {' '.join(PUBLISHED)}")
    data_path = os.environ.get("DATA_PATH", str(BESIDE / "bench_web"))
    tokenizer_path = os.environ.get("TOKENIZER_PATH", str(BESIDE / "fineweb_1024_bpe.model"))
    if not list(Path(data_path).glob("*_train_*.bin")):
        print(f"fidelity.py: error: no shards in {data_path}: set DATA_PATH and TOKENIZER_PATH to the tokens that")
        print("records/README.md names under Fidelity")
        return 2
    size = settings_of("bench")
    num_train = int(size["ITERATIONS"]) * int(size["TRAIN_BATCH_TOKENS"]) + 1
    found = fingerprint(Path(data_path), num_train, int(size["MAX_VAL_TOKENS"]) + 1)
    if found != TOKENS_SHA256:
        print(f"fidelity.py: error: the tokens in DATA_PATH={data_path} are not those of the published runs (SHA-256")
        print(f"{found}, not {TOKENS_SHA256}): a comparison would mean nothing")
        return 2
    rows, failed = [], []
    for name in names or list(PUBLISHED):
        (seed, raw, final), (own_raw, own_final) = PUBLISHED[name], train(name, data_path, tokenizer_path)
        compared = f"{raw:.4f} | {own_raw:.4f} | {own_raw - raw:+.4f}"
        rows.append(f"| {name} | {seed} | {compared} | {final:.4f} | {own_final:.4f} |")
        if own_raw > raw + MARGIN:
            failed.append(name)
    print("| system | seed | published, raw | here, raw | difference | published, stored, sliding | here |")
    print("|---|--:|--:|--:|--:|--:|--:|", *rows, sep="\n")
    print(f"over {MARGIN} worse: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
