"""The benchmark: its arithmetic by hand, a planted delay in its place, settings against themselves, its command."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t

sys.path.insert(0, str(ROOT / "tests"))
import bench  # noqa: E402

STEP = bench.STAGES["step"]


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
    """On a clock that only the delay moves: a busy machine is no reason to fail."""
    slow, clock = case(), [0.0]
    update = slow.trainer.update_averages

    def delayed(*args: object) -> None:
        clock[0] += 0.05
        update(*args)

    slow.trainer.update_averages = delayed
    slow.rt.now = lambda: clock[0]
    samples = bench.measure([slow], ["step", "score", "adapt"], repeats=3)
    rows = bench.figures(slow, {name: statistics.median(values[0]) for name, values in samples.items() if name in STEP})
    delays = {name: value for name, value in rows.items() if name.endswith(", ms") and abs(value) > 1e-6}
    assert delays == {"averages, ms": pytest.approx(50.0), "whole step, ms": pytest.approx(50.0)}
    assert all(value == [[0.0] * 3] for name, value in samples.items() if name not in ("averages", "step"))


def test_the_parts_of_a_step_add_up_to_the_whole(case: Callable) -> None:
    milliseconds = {"forward": 3.0, "forward_backward": 10.0, "optimizer": 4.0, "averages": 1.0, "load_batch": 0.5}
    milliseconds["checkpoint"] = 2.0  # not part of every step
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


@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_a_setting_against_itself_is_no_difference_and_a_slower_one_is(
    drift: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With simulated times that scatter by 5%, on a machine that slows down by 1% from each call to the next, too: the
    cases are measured in turns, and the first is not always the same."""
    draw, calls = random.Random(0), []

    def time_once(case: float, name: str) -> float:
        calls.append(case)
        return case * draw.lognormvariate(0, 0.05) * (1 + drift) ** len(calls)

    monkeypatch.setattr(bench, "time_once", time_once)
    for slower, holds_one in ((1.0, True), (1.2, False)):
        ratios = []
        for _ in range(20):
            calls.clear()
            samples = bench.measure([1.0, slower], ["step", "score", "adapt", "export"], repeats=20)
            ratios += bench.compare(samples, "SEED=1337").values()
        assert len(ratios) == 260 and all(r["confidence"] > 0.95 for r in ratios)
        # Of 260 intervals at 96% each, 250 hold the truth, give or take 3: fewer than 240 would be one in a thousand.
        assert sum(r["low"] <= slower <= r["high"] for r in ratios) >= 240
        assert (sum(r["low"] <= 1 <= r["high"] for r in ratios) >= 240) is holds_one
    assert "SEED=1337 against the settings as they are" in capsys.readouterr().out


def test_what_is_compressed_is_the_model(case: Callable) -> None:
    c = case()
    bench.measure([c], ["export"], repeats=1)
    assert bench.figures(c, {"fit": 1.0, "fit_gptq": 1.0, "reload": 1.0})["artifact, bytes"] > 10_000


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


def test_without_a_gpu_the_size_is_that_of_the_bench_env_and_the_callers_own_settings_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    size = bench.size_for(t.Hyperparameters())
    assert size.keys() == bench.SIZES and size["model_dim"] == 128 and size["train_batch_tokens"] == 16_384
    monkeypatch.setenv("MODEL_DIM", "256")
    assert bench.size_for(t.Hyperparameters()).keys() == bench.SIZES - {"model_dim"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.size_for(t.Hyperparameters()) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vs", "MLP_KERNL=plain"], "MLP_KERNL is not a setting (did you mean MLP_KERNEL?)"),
        (["--vs", "MLP_KERNEL"], "which value? Write MLP_KERNEL=VALUE"),
        (["--vs", "SEED=one"], "SEED=one is not allowed"),
        (["--repeats", "0"], "--repeats 0: a figure needs at least one sample"),
        (["--stages", "startup", "--vs", "SEED=1"], "--vs does not compare start-up"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_an_error_of_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises((t.UserError, SystemExit)) as caught:
        chosen = bench.parse_arguments()
        bench.parse_setting(chosen.vs)
    assert message in str(caught.value) + capsys.readouterr().err
