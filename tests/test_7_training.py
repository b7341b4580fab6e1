"""The training step and all around it: averages, micro-batches, the clock, the preflight."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as t


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this size run faster on one thread, and alike on every machine."""
    monkeypatch.setattr(t, "available_cores", lambda: 1)


def snapshot(run: t.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def random_batch(run: t.Run, seed: int = 5, cuts: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns one step's tokens, in `cuts` micro-batches."""
    h = run.h
    torch.manual_seed(seed)
    rows = h.train_batch_tokens // h.train_seq_len
    tokens = torch.randint(h.vocab_size, (rows, h.train_seq_len + 1))
    return [(part[:, :-1], part[:, 1:]) for part in tokens.chunk(cuts)]


def log_lines(run: t.Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    return lines


# -------------------------------------------------------------------------------------------------------- averages
def walk(run: t.Run, trainer: t.Trainer, num_steps: int, lr_scale: Callable) -> list[np.ndarray]:
    """Moves the weights at random, with `update_averages` after each step; returns one tensor's values, float64."""
    torch.manual_seed(7)
    path = [run.model.skip_weights.detach().double().numpy().copy()]
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        trainer.update_averages(step, lr_scale(step))
        path.append(run.model.skip_weights.detach().double().numpy().copy())
    return path


@pytest.mark.parametrize("ema_decay", [0.997, 0.5, 0.9])
def test_the_ema_is_a_recursion_whose_decay_rises_to_its_limit(make_run: Callable, ema_decay: float) -> None:
    run = make_run(ema_decay=ema_decay)
    trainer = t.Trainer(run)
    path = walk(run, trainer, 120, lambda step: 1.0)
    average = path[0]
    for step in range(1, 121):
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * path[step]
    assert trainer.apply_average() == "averaging: EMA on, SWA of 0 snapshots"
    got = run.model.skip_weights.detach().double().numpy()
    # Each of the steps rounds to fp32, 6e-8 of values of at most 5, and is forgotten within 1 / (1 - decay) steps, of
    # which a growing average has at most 20 here: 6e-6.
    assert np.abs(got - average).max() < 6e-6
    assert np.abs(got - path[-1]).max() > 0.1, "the average is not the last weights"


def test_after_300_steps_the_ema_has_forgotten_its_initialisation(make_run: Callable) -> None:
    run = make_run()
    with torch.no_grad():
        torch._foreach_zero_(list(run.model.parameters()))
        run.model.skip_weights.fill_(1.0)
    trainer = t.Trainer(run)
    with torch.no_grad():
        run.model.skip_weights.zero_()  # from the first step on: what is not 0 in the average is the initialisation
    for step in range(1, 301):
        trainer.update_averages(step, 1.0)
    trainer.apply_average()
    # The product of (1 + s) / (10 + s) for s = 1 ... 300 telescopes to 10! 301! / 310! = 1.5e-16, as the limit of
    # 0.997 is reached at step 2,990 only; a constant decay of 0.997 would keep 0.997^300 = 41%.
    share = math.exp(math.lgamma(11) + math.lgamma(302) - math.lgamma(311))
    assert 1e-16 < share < 2e-16
    # Each product is rounded twice in fp32, to 6e-8 of it: 300 of them are 4e-5 off at most.
    assert torch.allclose(run.model.skip_weights.double(), torch.tensor(share, dtype=torch.double), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ema_enabled", [False, True])
def test_swa_is_the_mean_of_the_snapshots_late_in_the_run(make_run: Callable, ema_enabled: bool) -> None:
    run = make_run(ema_enabled=ema_enabled, swa_enabled=True, swa_every=10, swa_start_frac=0.4, ema_decay=0.8)
    trainer = t.Trainer(run)
    # The scale is 1 - step / 100: 0.4 itself, at step 60, is not below 0.4, so snapshots are 70, 80, 90 and 100.
    path = walk(run, trainer, 104, lambda step: (100 - step) / 100)
    averages = [path[0]]
    for step in range(1, 105):
        decay = min(0.8, (1 + step) / (10 + step))
        averages.append(decay * averages[-1] + (1 - decay) * path[step])
    source = averages if ema_enabled else path
    expected = np.mean([source[step] for step in (70, 80, 90, 100)], axis=0)
    assert trainer.apply_average() == f"averaging: EMA {'on' if ema_enabled else 'off'}, SWA of 4 snapshots"
    got = run.model.skip_weights.detach().double().numpy()
    assert np.abs(got - expected).max() < 6e-6  # as for the EMA; a sum of four is rounded three times more
    wrong = np.mean([source[step] for step in (60, 70, 80, 90, 100)], axis=0)
    assert np.abs(got - wrong).max() > 1e-2, "one snapshot more is another mean"


def test_a_single_snapshot_is_used(make_run: Callable) -> None:
    run = make_run(swa_enabled=True, swa_every=4)
    trainer = t.Trainer(run)
    path = walk(run, trainer, 6, lambda step: 0.1)
    average = path[0]
    for step in range(1, 5):
        average = (1 + step) / (10 + step) * average + 9 / (10 + step) * path[step]
    assert trainer.apply_average() == "averaging: EMA on, SWA of 1 snapshots"
    assert np.abs(run.model.skip_weights.detach().double().numpy() - average).max() < 6e-6  # as for the EMA


def test_without_a_snapshot_the_note_warns_and_the_ema_is_used(make_run: Callable) -> None:
    run = make_run(swa_enabled=True, swa_every=50)
    trainer = t.Trainer(run)
    walk(run, trainer, 49, lambda step: 0.1)
    ema = [e.clone() for e in trainer.ema]
    assert "WARNING: no SWA snapshot was taken" in trainer.apply_average()
    assert all(torch.equal(p, e) for p, e in zip(run.model.parameters(), ema))


def test_without_averages_the_last_weights_stay(make_run: Callable) -> None:
    run = make_run(ema_enabled=False)
    trainer = t.Trainer(run)
    walk(run, trainer, 3, lambda step: 0.1)
    before = snapshot(run)
    assert trainer.apply_average() == "averaging: EMA off, SWA of 0 snapshots"
    assert_same_bits(snapshot(run), before)


def test_the_average_is_put_into_the_model_in_fp32_in_every_tensor(make_run: Callable) -> None:
    run = make_run()
    trainer, parameters = t.Trainer(run), list(run.model.parameters())
    walk(run, trainer, 5, lambda step: 1.0)
    last, ema = snapshot(run), [e.clone() for e in trainer.ema]
    trainer.apply_average()
    assert all(a is b for a, b in zip(parameters, run.model.parameters())), "the tensors that everyone holds"
    for (name, p), e in zip(run.model.named_parameters(), ema):
        assert p.dtype == torch.float32 and torch.equal(p, e) and not torch.equal(p, last[name]), name


def test_the_training_step_updates_the_averages_with_the_weights_after_it(make_run: Callable) -> None:
    run = make_run()
    trainer, initial = t.Trainer(run), snapshot(run)
    trainer.step(1.0, random_batch(run))
    for (name, p), e in zip(run.model.named_parameters(), trainer.ema):
        # Step number 1: the decay is 2 / 11. Rounded to fp32 a few times at values of order 1.
        assert torch.allclose(e, initial[name] * 2 / 11 + p.detach() * 9 / 11, rtol=1e-6, atol=1e-6), name


# ---------------------------------------------------------------------------------------------------- the step
def test_micro_batches_make_the_step_of_one_big_batch(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cuts in (1, 2, 8):
        run = make_run()
        trainer, gradients = t.Trainer(run), {}

        def spy(lr_scale: float, momentum: float, run: t.Run = run, gradients: dict = gradients) -> torch.Tensor:
            gradients |= {name: p.grad.clone() for name, p in run.model.named_parameters()}
            return torch.zeros(())

        monkeypatch.setattr(trainer.optimizer, "step", spy)
        batch = random_batch(run, cuts=cuts)
        assert len(batch) == cuts
        found.append((trainer.step(1.0, batch).item(), gradients))
    for loss, gradients in found[1:]:
        assert math.isclose(loss, found[0][0], rel_tol=1e-6)  # a mean of 256 numbers of one sign in another order
        for name, g in gradients.items():
            # Sums over 256 tokens in another order: 256 x 6e-8 of the largest term, which is of the gradient's size.
            assert (g - found[0][1][name]).abs().max() <= 2e-5 * g.abs().max(), name


def test_the_loader_cuts_a_step_into_micro_batches_that_fit(make_run: Callable) -> None:
    run = make_run(micro_batch_tokens=64, loader="sequential")
    batch = t.TokenLoader(run.h, run.rt, run.train_shards).next_batch()
    assert [x.shape for x, _ in batch] == [torch.Size((2, 32))] * 4
    expected = torch.from_numpy(run.train_shards[0][:257].astype(np.int64))
    assert torch.equal(torch.cat([x for x, _ in batch]).flatten(), expected[:-1])
    assert torch.equal(torch.cat([y for _, y in batch]).flatten(), expected[1:])


# ---------------------------------------------------------------------------------------------------- the loop
FEW = {"iterations": 8, "max_wallclock_seconds": 0.0, "warmdown_frac": 0.5}


def train_losses(run: t.Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], dict, list[float]]:
    """Returns the losses of the steps, the figures of the training, and the losses of the validations."""
    events = []
    monkeypatch.setattr(run.rt, "record", lambda event, **fields: events.append((event, fields)))
    figures = t.train(run)
    losses = [fields["train_loss"] for event, fields in events if event == "train"]
    return losses, figures, [fields["val_loss"] for event, fields in events if event == "eval"]


def test_training_twice_with_one_seed_gives_bit_identical_losses_and_weights(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for _ in range(2):
        run = make_run(**FEW, swa_enabled=True, swa_every=2)
        results.append((train_losses(run, monkeypatch), snapshot(run)))
    (first, weights), (second, others) = results
    assert len(first[0]) == 8 and first[0] == second[0] and first[2] == second[2]
    assert_same_bits(weights, others)


def test_training_learns_and_leaves_the_averaged_weights(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(iterations=40, max_wallclock_seconds=0.0, awake=False)
    run.train_shards[0][:] = np.arange(5000) % 7  # a text that repeats itself
    kept, apply = {}, t.Trainer.apply_average
    monkeypatch.setattr(t.Trainer, "apply_average", lambda self: (apply(self), kept.update(snapshot(run)))[0])
    losses, figures, _ = train_losses(run, monkeypatch)
    assert losses[0] > 4.0 and losses[-1] < 1.0, "from ln(96) = 4.56 to knowing the next of seven tokens"
    assert_same_bits(snapshot(run), kept)
    assert figures["steps"] == 40
    assert math.isclose(figures["epochs"], 40 * 256 / 5000)


@pytest.mark.parametrize("bad_step", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    make_run: Callable, bad_step: int, value: float
) -> None:
    run, calls = make_run(**FEW), []

    def mean_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return run.model(x, y) * (value if len(calls) == bad_step else 1.0)

    with pytest.raises(t.UserError, match=f"step {bad_step}: train_loss is {value}, .*: lower MATRIX_LR=0.027"):
        t.train(run._replace(mean_loss=mean_loss))
    assert len(calls) == bad_step, "it stops at once"


class Clock:
    """A clock that only work advances: a training step takes the next of `durations`, a validation `pause`."""

    def __init__(self, run: t.Run, durations: list[float], monkeypatch: pytest.MonkeyPatch, pause: float = 0.0):
        self.now, self.durations = 1000.0, iter(durations)
        stand_in = SimpleNamespace(perf_counter=lambda: self.now, time=time.time)
        monkeypatch.setattr(t, "time", stand_in)

        def mean_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.now += next(self.durations)
            return run.model(x, y)

        def eval_val(run: t.Run) -> t.Score:
            self.now += pause
            return t.Score(1.0, 1.0, 1, 1, pause)

        monkeypatch.setattr(t, "eval_val", eval_val)
        self.run = run._replace(mean_loss=mean_loss)


@pytest.mark.parametrize("seed", range(6))
def test_a_run_does_not_overrun_its_wall_clock_and_uses_it(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    cap = rng.uniform(8, 25)
    # The first step is slow, the others differ by 2%, which the margin of 5% covers.
    durations = [3.0] + [rng.uniform(0.98, 1.02) for _ in range(100)]
    run = make_run(iterations=100, max_wallclock_seconds=cap, val_loss_every=0)
    figures = t.train(Clock(run, durations, monkeypatch).run)
    assert math.isclose(figures["train_seconds"], sum(durations[: figures["steps"]]), rel_tol=1e-9)
    assert figures["train_seconds"] <= cap
    assert figures["train_seconds"] + 1.05 * 1.02 * 1.05 > cap, "a step more would not have fitted with its margin"


@pytest.mark.parametrize("seed", range(6))
def test_a_run_whose_steps_become_longer_does_not_overrun_its_wall_clock(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The second pass through two of four blocks makes steps longer by 40%, from wherever it begins."""
    rng = random.Random(seed)
    cap, begin = rng.uniform(30, 60), rng.uniform(0.0, 0.9)
    settings = {"num_layers": 4, "recur_layers": "1,2", "recur_start_frac": begin}
    run = make_run(iterations=100, max_wallclock_seconds=cap, val_loss_every=0, **settings)
    passes = []

    def durations() -> Iterator[float]:
        while True:
            passes.append(len(run.model.block_order))
            yield rng.uniform(0.98, 1.02) * (1.4 if passes[-1] == 6 else 1.0)

    figures = t.train(Clock(run, durations(), monkeypatch).run)
    assert passes == sorted(passes) and len(run.model.block_order) == 6
    plain = 1.02 * passes.count(4)
    assert abs(plain - begin * cap) <= 2, "off until its part of the time has passed, then on for good"
    assert figures["train_seconds"] <= cap
    assert figures["train_seconds"] + 1.05 * 1.02 * 1.05 * 1.5 > cap


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"max_wallclock_seconds": 100.0}, 5), ({"max_wallclock_seconds": 0.0, "iterations": 12}, 6)],
)
def test_recurrence_begins_at_its_part_of_the_steps_or_of_the_clock_of_rank_0(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, limits: dict, expected: int
) -> None:
    """This rank's own clock says milliseconds; rank 0's says that each step took ten seconds."""
    run = make_run(recur_layers="1", recur_start_frac=0.5, val_loss_every=0, **limits)
    seconds, passes, step = iter(range(10, 10_000, 10)), [], t.Trainer.step
    monkeypatch.setattr(run.rt, "readings", lambda started: (float(next(seconds)), 0))

    def spy(self: t.Trainer, lr_scale: float, batch: list) -> torch.Tensor:
        passes.append(len(self.run.model.block_order))
        return step(self, lr_scale, batch)

    monkeypatch.setattr(t.Trainer, "step", spy)
    t.train(run)
    assert passes[: expected + 1] == [3] * expected + [4] and 3 not in passes[expected:]


def test_a_training_too_short_for_recurrence_leaves_the_model_that_its_file_describes(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A second step would not fit, long before the part of the time at which recurrence begins."""
    run = make_run(iterations=100, max_wallclock_seconds=10.0, val_loss_every=0, recur_layers="1", recur_start_frac=0.9)
    assert t.train(Clock(run, [6.0, 6.0], monkeypatch).run)["steps"] == 1
    assert run.model.block_order == [0, 1, 1, 2]
    printed = capsys.readouterr()
    assert "before RECUR_START_FRAC=0.9: no step had the second passes" in printed.out + printed.err


def test_the_preflight_runs_both_models_that_recurrence_makes(make_run: Callable) -> None:
    run = make_run(recur_layers="1")
    orders = {True: set(), False: set()}

    def counted(function: Callable) -> Callable:
        def count(*args: torch.Tensor) -> torch.Tensor:
            orders[torch.is_grad_enabled()].add(tuple(run.model.block_order))
            return function(*args)

        return count

    t.preflight(run._replace(mean_loss=counted(run.mean_loss), token_nll=counted(run.token_nll)))
    both = {(0, 1, 2), (0, 1, 1, 2)}
    assert orders == {True: both, False: both} and run.model.block_order == [0, 1, 1, 2]


def test_a_cap_shorter_than_a_step_still_takes_one(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(iterations=100, max_wallclock_seconds=0.5)
    before = snapshot(run)
    assert t.train(Clock(run, [2.0, 2.0], monkeypatch).run)["steps"] == 1
    assert not torch.equal(run.model.skip_weights, before["skip_weights"])


def test_a_slow_run_has_all_points_of_the_curve_of_a_fast_one(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds are 5 steps of 0.4 s, so 8; and 2.2 of 0.9 s, so 4."""
    points = []
    for seconds in (0.4, 0.9):
        run = make_run(iterations=42, max_wallclock_seconds=0.0, val_loss_every=0)
        found: list[int] = []
        monkeypatch.setattr(
            run.rt, "record", lambda event, step=0, found=found, **_: event == "train" and found.append(step)
        )
        t.train(Clock(run, [seconds] * 42, monkeypatch).run)
        points.append(found)
    assert points[0] == [*range(1, 11), 16, 24, 32, 40, 42]
    assert points[1] == [*range(1, 11), 12, 16, 20, 24, 28, 32, 36, 40, 42]


def test_validations_stop_the_clock(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(iterations=100, max_wallclock_seconds=20.5, val_loss_every=3)
    figures = t.train(Clock(run, [1.0] * 100, monkeypatch, pause=50.0).run)
    assert figures["steps"] == 20 and math.isclose(figures["train_seconds"], 20.0)


def test_a_real_run_with_a_cap_ends_in_time(make_run: Callable) -> None:
    run = make_run(max_wallclock_seconds=1.0, val_loss_every=0)
    figures = t.train(run)
    assert figures["steps"] >= 3
    # A step takes milliseconds; 0.5 s are for a machine that is busy with other things at the very end.
    assert figures["train_seconds"] < 1.5


# ---------------------------------------------------------------------------------------------------- the preflight
EVERYTHING = {**FEW, "swa_enabled": True, "swa_every": 1, "quant_floor": 1.0, "mlp_bits": 3, "attn_bits": 4}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"ttt_mode": "pre"}, {"ttt_enabled": False, "eval_stride": 0}])
def test_the_preflight_leaves_no_trace(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {**FEW, **settings}
    run = make_run(**settings)
    initial = snapshot(run)
    t.preflight(run)
    assert_same_bits(snapshot(run), initial)
    assert all(p.grad is None for p in run.model.parameters())
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert torch.rand(1000).unique().numel() > 900, "torch's generator still draws"
    # And the training that follows is, bit by bit, the one without a preflight.
    monkeypatch.setattr(t, "preflight", lambda run: pytest.fail("once is enough"))
    after, plain = train_losses(run, monkeypatch), train_losses(make_run(**settings), monkeypatch)
    assert after[0] == plain[0] and after[2] == plain[2]


def test_the_preflight_reports_no_event_of_the_training(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(**EVERYTHING)
    lines = log_lines(run, monkeypatch)
    t.preflight(run)
    assert len(lines) == 2 and lines[0] == "step: 1 processes x 1 micro-batches x 8 x 32 tokens", lines
    assert lines[1].startswith("preflight: the whole pipeline ran"), lines


# ------------------------------------------------------------------------------------------------------------ memory
def limit_memory(run: t.Run, training: int, scoring: int = 100, adaptation: int = 100) -> t.Run:
    """Returns the run on a device that has memory for so many sequences a pass."""

    def check(rows: int, limit: int) -> None:
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def mean_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        check(len(x), training)
        return run.model(x, y)

    def token_nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        check(len(x), adaptation if torch.is_grad_enabled() else scoring)
        return run.model.token_nll(x, y)

    return run._replace(mean_loss=mean_loss, token_nll=token_nll)


@pytest.mark.parametrize(("limit", "rows"), [(100, 8), (8, 8), (7, 4), (3, 2), (1, 1)])
def test_a_run_that_is_short_of_memory_is_the_one_with_smaller_passes_set_by_hand(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, limit: int, rows: int
) -> None:
    short = limit_memory(make_run(**FEW), limit)  # a step is 8 sequences of 32
    lines = log_lines(short, monkeypatch)
    t.preflight(short)
    assert short.rt.max_rows["training"] == rows
    halvings = [line for line in lines if line.startswith("out of memory: training again with at most")]
    assert len(halvings) == int(math.log2(8 // rows))
    assert f"step: 1 processes x {8 // rows} micro-batches x {rows} x 32 tokens" in lines
    by_hand = make_run(**FEW, micro_batch_tokens=32 * rows)
    (losses, _, validations), others = train_losses(short, monkeypatch), train_losses(by_hand, monkeypatch)
    assert len(losses) == 8 and losses == others[0] and validations == others[2]
    assert_same_bits(snapshot(short), snapshot(by_hand))


def test_scoring_and_adaptation_that_are_short_of_memory_take_smaller_passes(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ttt_batch_seqs": 8, "ttt_chunk_tokens": 256, "num_targets": 700}
    short = limit_memory(make_run(**settings, eval_batch_seqs=16), training=100, scoring=5, adaptation=3)
    t.preflight(short)
    assert short.rt.max_rows == {"training": 8, "scoring": 4, "adaptation": 2}
    roomy = make_run(**settings)
    t.preflight(roomy)
    assert roomy.rt.max_rows["adaptation"] == 128, "what fits is not limited to what was tried"
    by_hand = make_run(**settings, eval_batch_seqs=4, micro_batch_tokens=64)
    assert t.eval_val_ttt(short)[:4] == t.eval_val_ttt(by_hand)[:4]
    assert_same_bits(snapshot(short), snapshot(by_hand))


def test_where_one_sequence_is_too_much_the_run_ends_with_a_word(make_run: Callable) -> None:
    for phase, limits in (("training", (0,)), ("scoring", (9, 0)), ("adaptation", (9, 9, 0))):
        with pytest.raises(t.UserError, match=f"^{phase} does not fit into the memory"):
            t.preflight(limit_memory(make_run(), *limits))


def test_sequences_of_a_pass_are_limited_by_the_free_memory_of_a_gpu(make_run: Callable) -> None:
    run = make_run(train_batch_tokens=2**20, eval_seq_len=64)
    rt = run.rt
    t.limit_rows(run)
    assert rt.max_rows["training"] == 128  # a CPU's, whatever its memory
    rt.device, rt.free_memory = SimpleNamespace(type="cuda"), lambda: free
    state = 24 * sum(p.numel() for p in run.model.parameters())
    for rows in (1, 2, 5, 1000):
        free = math.ceil((state + 32 * rows * t.bytes_per_token(run.h, rt)) / 0.85 + 10)
        t.limit_rows(run)
        assert (rt.max_rows["training"], rt.max_rows["adaptation"]) == (rows, max(1, rows // 2))
    free = 1
    t.limit_rows(run)
    assert rt.max_rows["training"] == 1  # and the preflight finds out
    run.h.vocab_size, free = 2**20, 10**15
    t.limit_rows(run)
    assert rt.max_rows["training"] == (2**31 - 1) // 2**20 // 32
    run.h.micro_batch_tokens, rt.max_rows["training"] = 98_304, 3072
    t.limit_rows(run)
    assert rt.max_rows["training"] == 3072  # what the user says is only halved


def test_the_model_of_memory_is_near_what_was_counted() -> None:
    """Bytes a token of torch 2.11's allocator, compiled for an H200 and not, less the gradients (2026-11-28)."""
    counted = [
        ({"num_layers": 4}, True, 74_682),
        ({"num_layers": 8}, True, 142_329),
        ({"num_layers": 11}, True, 194_043),
        ({"num_layers": 4, "mlp_mult": 4.0}, True, 82_746),
        ({"num_layers": 4, "vocab_size": 8192}, True, 88_922),
        ({"num_layers": 4, "model_dim": 768, "num_heads": 12}, True, 107_019),
        ({"num_layers": 4, "value_residual": True, "gated_attention": True}, True, 76_825),
        ({"num_layers": 4}, False, 133_882),
        ({"num_layers": 8}, False, 240_810),
        ({"num_layers": 4, "mlp_mult": 4.0}, False, 146_010),
        ({"num_layers": 4, "vocab_size": 8192}, False, 248_266),
    ]
    for settings, compiled, count in counted:
        h = t.Hyperparameters(ve_layers="-2,-1", **settings)
        predicted = t.bytes_per_token(h, SimpleNamespace(compiled=compiled, dtype=torch.bfloat16))
        assert abs(predicted / count - 1) < 0.05, (settings, predicted / count)


# --------------------------------------------------------------------------------------- what the preflight meets


@pytest.mark.parametrize(
    "part",
    [
        "Trainer.apply_average",
        "Optimizer.step",
        "TTT.adapt",
        "Scorer.score",
        "quantize_rows",
        "encode",
        "decode",
    ],
)
def test_the_preflight_meets_what_would_fail_at_the_end(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise MemoryError(part)

    monkeypatch.setattr(f"train_gpt.{part}", fail)
    with pytest.raises(MemoryError, match=part):
        t.preflight(make_run(**EVERYTHING))


def test_the_preflight_prunes_as_the_export_will(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, prepare = [], t.prepare_weights
    monkeypatch.setattr(t, "prepare_weights", lambda *arguments: (parts.append(arguments[2]), prepare(*arguments))[1])
    t.preflight(make_run(prune_frac=0.3))
    assert parts == [0.3]


@pytest.mark.parametrize("setting", ["eval_only", "export_only"])
def test_the_preflight_trains_nothing_where_nothing_will_be_trained(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(t.Trainer, "step", lambda *arguments: pytest.fail("trained"))
    encoded, encode = [], t.encode
    monkeypatch.setattr(t, "encode", lambda *arguments: (encoded.append(1), encode(*arguments))[1])
    t.preflight(make_run(**{setting: "some file"}))
    assert len(encoded) == (setting == "export_only")


def test_every_rank_takes_the_learning_rate_from_the_clock_of_rank_0(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank's own clock says milliseconds; rank 0's says that each step took ten seconds."""
    run = make_run(max_wallclock_seconds=100.0, val_loss_every=0)
    seconds, scales, step = iter(range(10, 10_000, 10)), [], t.Trainer.step
    monkeypatch.setattr(run.rt, "readings", lambda started: (float(next(seconds)), 0))

    def spy(self: t.Trainer, lr_scale: float, batch: list) -> torch.Tensor:
        scales.append(lr_scale)
        return step(self, lr_scale, batch)

    monkeypatch.setattr(t.Trainer, "step", spy)
    t.train(run)
    # 1.05 x 10 s more must fit below 100 s: the step after 80 s still begins, the one after 90 s does not.
    assert scales == pytest.approx([min(1.0, (100 - 10 * done) / 50) for done in range(9)])


@pytest.mark.parametrize(("warmdown", "warned"), [(100, True), (3, True), (2, False)])
def test_a_warm_down_longer_than_the_run_is_a_warning(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, warmdown: int, warned: bool
) -> None:
    """Of 5 steps the fourth has 2 to go. With few GPUs, the published 3,500 steps begin below full rate."""
    run = make_run(iterations=5, max_wallclock_seconds=0.0, warmdown_iters=warmdown)
    lines = log_lines(run, monkeypatch)
    t.train(run)
    assert any(f"WARNING: WARMDOWN_ITERS={warmdown} steps do not fit" in line for line in lines) == warned


def test_averages_take_one_operation_for_all_tensors(make_run: Callable) -> None:
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.operations += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 6):
        trainer = t.Trainer(make_run(num_layers=layers, ve_layers="-1", swa_enabled=True, swa_every=1))
        with Count() as mode:
            trainer.update_averages(1, 0.1)
        counts.append(mode.operations)
    assert counts == [2, 2]  # one for the EMA, one for the SWA's sum


def test_a_slow_first_step_does_not_lower_the_learning_rate(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published mean had it: 0.69 of the rate at step 1."""
    run = make_run(max_wallclock_seconds=100.0, warmdown_iters=50, val_loss_every=0)
    clock, scales, step = iter([30.0, 30.5, *(30.5 + 0.5 * i for i in range(1, 1000))]), [], t.Trainer.step
    monkeypatch.setattr(run.rt, "readings", lambda started: (next(clock), 0))

    def spy(self: t.Trainer, lr_scale: float, batch: list) -> torch.Tensor:
        scales.append(lr_scale)
        return step(self, lr_scale, batch)

    monkeypatch.setattr(t.Trainer, "step", spy)
    t.train(run)
    # 30 s for the first step, then half a second each: the last 50 steps are the last 25 s.
    elapsed = [0.0, 30.0, *(30.5 + 0.5 * i for i in range(len(scales) - 2))]
    expected = [min(1.0, (100 - seconds) / 0.5 / 50) for seconds in elapsed]
    assert scales == pytest.approx(expected, abs=1e-9) and len(scales) > 130


def test_training_looks_at_no_loss_but_through_the_lag(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's loss is opaque to the loop: `.item()` on it, or a comparison, would drain the device in each step."""
    run = make_run(iterations=5, max_wallclock_seconds=0.0, val_loss_every=0)
    followed = []

    def step(self: t.Trainer, lr_scale: float, batch: list) -> SimpleNamespace:
        self.num_steps += 1
        return SimpleNamespace()

    monkeypatch.setattr(t.Trainer, "step", step)
    monkeypatch.setattr(t.Trainer, "numbers_of_step", lambda self, loss: [loss, 1.0])
    monkeypatch.setattr(run.rt, "lagged_list", lambda numbers: followed.append(numbers) or [1.0, 1.0])
    t.train(run)
    assert len(followed) == 5


def test_a_step_reads_no_number_from_the_device(make_run: Callable) -> None:
    """Each `.item()` in it would make the host wait for all that it has given the device to do."""

    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
            self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    run = make_run(swa_enabled=True, swa_every=1)
    trainer = t.Trainer(run)
    for scale in (1.0, 0.3):
        with Reads() as mode:
            loss = trainer.step(scale, random_batch(run))
        assert mode.number == 0 and isinstance(loss, torch.Tensor)
        with mode:
            loss.item()
        assert mode.number == 1  # and it would have been seen


def test_compiled_training_is_one_graph_with_the_losses_of_eager(make_run: Callable) -> None:
    """The graph of the first step is that of all, and no weight is folded into it."""
    losses = []
    for compiled in (False, True):
        torch.compiler.reset()
        run, graphs = make_run(ttt_enabled=False), []

        def backend(module: torch.fx.GraphModule, inputs: list, graphs: list = graphs) -> Callable:
            graphs.append(module)
            return aot_eager(module, inputs)

        if compiled:
            mean_loss = torch.compile(run.model.forward, backend=backend, dynamic=False, fullgraph=True)
            run = run._replace(mean_loss=mean_loss)
        trainer = t.Trainer(run)
        scales = (1.0, 0.51, 0.5, 0.4)
        losses.append([trainer.step(scale, random_batch(run)).item() for scale in scales])
        assert len(graphs) == int(compiled)
    # The same operations, perhaps fused or in another order: 1e-6 relative a step on a loss of about 10.
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.parametrize("stride", [0, 8])
def test_scoring_leaves_nothing_behind_that_cannot_be_trained_through(make_run: Callable, stride: int) -> None:
    """Published tables were made on first use, under inference mode, and then "cannot be saved for backward"."""
    run = make_run(eval_stride=stride)
    with torch.inference_mode():
        run.model.token_nll(torch.randint(96, (1, 16)), torch.randint(96, (1, 16)))
    score = t.eval_val(run, stride)
    assert math.isfinite(score.val_loss)
    trainer = t.Trainer(run)
    assert math.isfinite(trainer.step(1.0, random_batch(run)).item())
    held = [*run.model.parameters(), *(x for m in run.model.modules() for x in vars(m).values())]
    assert not any(x.is_inference() for x in held if isinstance(x, torch.Tensor))
