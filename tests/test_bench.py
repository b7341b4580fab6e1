"""The benchmark: its arithmetic by hand, a planted delay in its place, settings against themselves, its command."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t

sys.path.insert(0, str(ROOT / "tests"))
import bench  # noqa: E402


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., bench.Case]:
    """A case of a tiny model, with zstandard as it is here."""
    return lambda **settings: bench.Case(tmp_path, **{**TINY, **settings})


def test_the_operations_are_those_of_the_matrix_products_and_of_half_the_attention() -> None:
    """Counted by torch over a forward pass; there attention is a whole square, and the bigrams' rows are looked up."""
    h = t.Hyperparameters(**{**TINY, "device": "cpu"})
    model = t.GPT(h)
    for block in model.blocks:
        block.attn.attend = t.attention_definition  # whose products are batched, and the model's are not
    ids = torch.randint(h.vocab_size, (1, h.train_seq_len))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids)
    counts = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    products, attention = counts.pop("aten.mm"), counts.pop("aten.bmm")
    assert not counts
    assert bench.training_flops(h, model) == 3 * (products + attention / 2) / h.train_seq_len
    full = t.Hyperparameters()
    with torch.device("meta"):
        assert bench.training_flops(full, t.GPT(full)) * 98_304 == pytest.approx(22.48e12, rel=0.002)  # by hand


def test_a_planted_delay_shows_in_its_stage_alone(case: Callable) -> None:
    plain, slow = case(), case()
    update = slow.trainer.update_averages
    slow.trainer.update_averages = lambda *args: (time.sleep(0.05), update(*args))
    samples = bench.measure([plain, slow], ["step"], repeats=9)
    rows = [
        bench.figures(c, {n: statistics.median(v[i]) for n, v in samples.items()}) for i, c in ((0, plain), (1, slow))
    ]
    for name in rows[0]:
        if not name.endswith(", ms"):
            continue
        difference = rows[1][name] - rows[0][name]
        # A busy machine moves times of a few milliseconds, so half of the delay is the line.
        assert (difference > 25) == (name in ("averages, ms", "whole step, ms")), (name, difference)


def test_the_parts_of_a_step_add_up_to_the_whole(case: Callable) -> None:
    milliseconds = {"forward": 3.0, "forward_backward": 10.0, "optimizer": 4.0, "averages": 1.0, "load_batch": 0.5}
    c = case(train_batch_tokens=1024, micro_batch_tokens=256)
    rows = bench.figures(c, milliseconds | {"step": 50.0})
    assert rows["micro-batches a step"] == 4 and rows["micro-batch backward, ms"] == 7.0
    assert rows["everything else, ms"] == 50.0 - (4 * 10.0 + 4.0 + 1.0 + 0.5)
    assert rows["tokens/s, all processes"] == 1024 / 0.05
    assert rows["model TFLOP/s a device"] == bench.training_flops(c.h, c.run.model) * 1024 / 0.05 / 1e12
    rows = bench.figures(c, {"score": 100.0, "adapt": 64.0})
    assert rows["scoring, s per million targets"] == pytest.approx(0.1 / (4 * 8) * 1e6)
    assert rows["adaptation, s per million tokens and epoch"] == pytest.approx(0.064 / (2 * 32) * 1e6)


def test_the_interval_of_a_median_is_by_signs() -> None:
    """Of 10 ratios, the second smallest to the second largest: 1 - 2 (1 + 10) / 1024."""
    low, high, confidence = bench.sign_interval([float(i) for i in (3, 9, 1, 4, 10, 5, 2, 6, 8, 7)])
    assert (low, high) == (2.0, 9.0) and confidence == 1 - 22 / 1024
    assert bench.sign_interval([1.0, 2.0, 3.0]) == (1.0, 3.0, 0.75)  # too few for 95%, and it says so


def test_a_setting_against_itself_is_no_difference(case: Callable, capsys: pytest.CaptureFixture) -> None:
    cases = [case(), case()]
    samples = bench.measure(cases, ["step", "score", "adapt", "export"], repeats=20)
    ratios = bench.compare(cases, samples, "SEED=1337")
    assert ratios.keys() == samples.keys()
    # Each interval holds 1 with 95% or more; that of 11 fewer than 8 do would happen once in 10,000 times.
    assert sum(r["low"] <= 1 <= r["high"] for r in ratios.values()) >= 8
    assert len(cases[0].blob) > 10_000  # what was compressed is the model
    assert "SEED=1337 against the settings as they are" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_it_as_json(tmp_path: Path) -> None:
    environment = {name.upper(): str(value) for name, value in TINY.items()} | {"PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "--repeats", "3", "--profile"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    path = ROOT / done.stdout.rpartition("written: ")[2].strip()
    table = json.loads(path.read_text())
    path.unlink()
    for name in table["figures"]:
        assert name in done.stdout
    assert {"start-up, cold, s", "start-up, warm, s", "peak memory, GiB", "whole step, ms"} <= table["figures"].keys()
    assert table["settings"]["model_dim"] == TINY["model_dim"]  # the caller's own size is kept
    assert "aten::" in done.stdout  # the dearest operations
    wrong = subprocess.run(
        [*command, "--vs", "MLP_KERNL=plain"], env=environment, text=True, capture_output=True, check=False
    )
    assert wrong.returncode == 1 and "MLP_KERNL is no setting (did you mean mlp_kernel?)" in wrong.stderr
