"""From windows to bits per byte: every target once, whatever the length, the stride, the batches and the ranks."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

import train_gpt as t


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this size run faster on one thread, and alike on every machine."""
    monkeypatch.setattr(t, "available_cores", lambda: 1)


def score_nll(run: t.Run, stride: int) -> torch.Tensor:
    """Returns the nats of every target, as the scorer has them."""
    scorer = t.Scorer(run, run.val, stride)
    scorer.score(scorer.windows)
    return scorer.nll[:-1]


@torch.no_grad()
def naive_nll(run: t.Run, stride: int) -> torch.Tensor:
    """Returns the nats of every target, by the rule: the first window scores all of its targets,
    each later one `stride` more, the last what remains, and every window has as much context as fits."""
    tokens, n = run.val.tokens.long(), run.val.num_targets
    length, nll, logits = min(run.h.window, n), torch.empty(n), {}
    for i in range(n):
        end = length
        while end <= i:
            end = min(end + stride, n)
        if end not in logits:
            logits[end] = run.model.forward_logits(tokens[end - length : end].unsqueeze(0))[0]
        own = logits[end][i - (end - length)]
        nll[i] = torch.logsumexp(own, 0) - own[tokens[i + 1]]
    return nll


# -------------------------------------------------------------------------------------------------------- windows
def test_windows_are_a_partition_with_as_much_context_as_fits() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        length = rng.randint(1, 40)
        stride = rng.randint(1, length)
        begin = rng.randint(0, 60)
        end = begin + rng.randint(1, 150)
        windows = t.plan_windows(begin, end, length, stride)
        case = f"begin {begin} end {end} length {length} stride {stride}: {windows.tolist()}"
        targets = [i for _, low, high in windows for i in range(low, high)]
        assert targets == list(range(begin, end)), case
        for number, (first, low, high) in enumerate(windows):
            assert first == max(0, high - length) and first <= low < high, case
            wanted = length if number == 0 else stride
            assert high - low == wanted if number < len(windows) - 1 else high - low <= max(length, stride), case


def test_the_challenges_validation_text_has_its_known_windows_and_chunks() -> None:
    n = 62_021_632
    windows = t.plan_windows(0, n, 2048, 64)
    assert len(windows) == 1 + (n - 2048) // 64 == 969_057
    assert (windows[0].tolist(), windows[1].tolist()) == ([0, 0, 2048], [64, 2048, 2112])
    assert windows[-1].tolist() == [n - 2048, n - 64, n]
    assert np.array_equal(windows[1:, 1], windows[:-1, 2]), "each target once"
    counts = np.bincount(windows[:, 1] // 32_768)
    assert len(counts) == 1893
    assert (counts[0], set(counts[1:-1].tolist()), counts[-1]) == (481, {512}, 384)
    assert len(t.plan_windows(0, n, 2048, 2048)) == n // 2048 == 30_284


def test_gathered_windows_hold_their_inputs_and_only_their_own_targets(make_run: Callable) -> None:
    tokens = torch.arange(500, 600, dtype=torch.int32)  # 99 targets; token i is 500 + i
    windows = torch.tensor([[3, 5, 10], [40, 40, 47], [0, 0, 0], [0, 0, 0]])  # the last two are padding
    x, y, numbers = t.gather_windows(tokens, windows, 7)
    assert x.tolist()[:2] == [list(range(503, 510)), list(range(540, 547))]
    assert y.tolist() == [[-100, -100, *range(506, 511)], list(range(541, 548)), [-100] * 7, [-100] * 7]
    assert numbers.tolist() == [[99, 99, *range(5, 10)], list(range(40, 47)), [99] * 7, [99] * 7]


# ---------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize(
    ("num_targets", "window", "stride"),
    [(101, 32, 8), (101, 32, 5), (97, 32, 1), (96, 32, 32), (100, 32, 32), (20, 32, 8), (20, 32, 32), (33, 32, 32)],
)
def test_scores_are_those_of_each_target_in_its_own_window(
    make_run: Callable, num_targets: int, window: int, stride: int
) -> None:
    run = make_run(num_targets, train_seq_len=window, eval_stride=stride)
    got, expected = score_nll(run, stride), naive_nll(run, stride)
    # The same fp32 operations in other batch shapes: 3 blocks of sums over at most 128 terms, each 128 x 6e-8 off at
    # worst relative to values of order 10, so a few 1e-5. A neighbouring window's score differs by 1e-2.
    assert (got - expected).abs().max() < 1e-4
    if stride < window < num_targets:
        assert (naive_nll(run, window) - expected).abs().max() > 1e-2


def test_in_longer_windows_a_target_sees_as_many_keys_as_in_training_and_the_score_is_the_same_in_all_of_them(
    make_run: Callable,
) -> None:
    """With local attention, what a target of a late enough position is given depends on the tokens that its blocks can
    reach, 3 x 31 positions back, and on nothing else of its window: neither on its start nor on its length."""
    settings = {"eval_attn_window": 32, "eval_stride": 16}
    scores = []
    for window in (128, 160):
        run = make_run(320, eval_seq_len=window, **settings)
        scores.append(score_nll(run, 16))
        assert (scores[-1] - naive_nll(run, 16)).abs().max() < 1e-4
    assert (scores[0] - scores[1]).abs().max() < 1e-4  # the last 16 of 128 positions see no start of the window
    # Positions before the reach are not seen: with one block fewer to pass on, the scores are others.
    wide = score_nll(make_run(320, eval_seq_len=128, eval_stride=16), 16)
    assert (scores[0] - wide)[32:].abs().max() > 1e-2
    # Where no window is longer than the reach, it changes nothing at all.
    plain, same = make_run(320), make_run(320, eval_attn_window=32)
    assert torch.equal(score_nll(plain, 8), score_nll(same, 8))


@pytest.mark.parametrize("num_targets", [101, 20])
def test_scores_do_not_depend_on_the_windows_a_batch(make_run: Callable, num_targets: int) -> None:
    one, *others = (score_nll(make_run(num_targets, eval_batch_seqs=n), 8) for n in (1, 3, 4, 64))
    for other in others:
        assert (one - other).abs().max() < 1e-4  # as above: the same operations in other shapes


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("stride", [8, 32])
def test_scores_do_not_depend_on_the_number_of_ranks(make_run: Callable, world_size: int, stride: int) -> None:
    run = make_run(301)
    expected, parts = score_nll(run, stride), []
    for rank in range(world_size):
        rt = copy.copy(run.rt)
        rt.rank, rt.world_size = rank, world_size
        scorer = t.Scorer(run._replace(rt=rt), run.val, stride)
        scorer.score(scorer.windows)
        assert (scorer.times_scored == scorer.nll[:-1].isfinite().numpy()).all()
        parts.append(scorer.nll[:-1])
    parts = torch.stack(parts)
    assert torch.equal(parts.isfinite().sum(0), torch.ones(301, dtype=torch.int64)), "each target on one rank only"
    assert torch.equal(parts.nan_to_num(0.0).sum(0), expected)  # bit by bit: x + 0 is x, and the batches are the same
    if world_size < 8 and stride == 8:
        assert parts.isfinite().any(1).all(), "every rank has work"


@pytest.mark.parametrize("num_targets", [20, 40, 203])
def test_a_compiled_run_pads_every_batch_to_one_shape_and_scores_the_same(make_run: Callable, num_targets: int) -> None:
    """Of a text with fewer windows than a batch, too: otherwise the preflight would have compiled another shape."""
    scores = []
    for compiled in (False, True):
        run, rows = make_run(num_targets), set()
        token_nll = run.token_nll
        run = run._replace(token_nll=lambda x, y, f=token_nll, rows=rows: (rows.add(len(x)), f(x, y))[1])
        run.rt.compiled = compiled
        scores.append(t.eval_val_sliding(run).val_loss)
    assert rows == {4}
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)  # a product of more rows may add in another order


def test_bits_per_byte_are_nats_over_ln_2_and_bytes(make_run: Callable) -> None:
    run = make_run(101)
    target_bytes = torch.arange(101, dtype=torch.int16) % 5 + 1
    target_bytes[-1] += 333 - target_bytes.sum()
    run = run._replace(val=run.val._replace(target_bytes=target_bytes, num_bytes=333))
    for score, stride in ((t.eval_val_sliding(run), 8), (t.eval_val(run), 32), (t.eval_val(run, 16), 16)):
        nats = score_nll(run, stride).double().sum().item()
        # The same sum in the same order, in float64: only the last bits of the divisions can differ.
        assert math.isclose(score.val_loss, nats / 101, rel_tol=1e-14)
        assert math.isclose(score.val_bpb, nats / math.log(2) / 333, rel_tol=1e-14)
        assert (score.num_targets, score.num_bytes) == (101, 333)
        assert score.seconds >= 0


def test_a_stride_of_zero_means_windows_that_do_not_overlap(make_run: Callable) -> None:
    run = make_run(101, eval_stride=0)
    assert t.eval_val_sliding(run)[:4] == t.eval_val(run)[:4] == t.eval_val(run, 32)[:4]
    assert t.eval_val(run)[:4] != t.eval_val(run, 8)[:4]


def test_a_longer_scoring_window_is_used_and_better_context_is_seen(make_run: Callable) -> None:
    run = make_run(101, eval_seq_len=64)
    assert run.h.window == 64
    assert (score_nll(run, 8) - naive_nll(run, 8)).abs().max() < 1e-4  # as above
    assert t.plan_windows(0, 101, 64, 8)[-1].tolist() == [101 - 64, 96, 101]


def test_an_untrained_model_scores_the_logarithm_of_the_vocabulary(make_run: Callable) -> None:
    # The initial blocks are the identity and the embedding's standard deviation is 0.005: logits are sums of 32
    # products of it with normed states, so of standard deviation 0.005 sqrt(32) = 0.03, and the loss is off by half
    # its square, 4e-4, plus noise over 200 targets, 0.03 / sqrt(200) = 2e-3.
    assert abs(t.eval_val(make_run(200, awake=False)).val_loss - math.log(96)) < 0.01


# ------------------------------------------------------------------------------------------------------ the checks
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_an_error_that_says_so(make_run: Callable, value: float) -> None:
    run = make_run(101)
    with torch.no_grad():
        run.model.blocks[0].mlp.fc.weight[0, 0] = value
    with pytest.raises(t.UserError, match="scores are not finite"):
        t.eval_val(run)


def test_one_infinite_score_is_not_averaged_away(make_run: Callable) -> None:
    run = make_run(101)
    scorer = t.Scorer(run, run.val, 8)
    scorer.score(scorer.windows)
    scorer.nll[55] = math.inf
    with pytest.raises(t.UserError, match="1 of 101 scores are not finite"):
        scorer.result()


@pytest.mark.parametrize("change", ["dropped", "doubled", "overlapping"])
@pytest.mark.parametrize("at", [1, 2, 4, 9])
def test_a_target_not_scored_exactly_once_stops_the_run(make_run: Callable, change: str, at: int) -> None:
    run = make_run(101)
    scorer = t.Scorer(run, run.val, 8)
    overlapping = scorer.windows.copy()
    overlapping[at, 1] -= 1  # scores the last target of the window before it as well
    changed = {
        "dropped": np.delete(scorer.windows, at, axis=0),
        "doubled": np.insert(scorer.windows, at, scorer.windows[at], axis=0),
        "overlapping": overlapping,
    }
    scorer.score(changed[change])
    with pytest.raises(AssertionError, match="of 101 targets not scored exactly once"):
        scorer.result()


def test_a_window_in_the_place_of_another_stops_the_run(make_run: Callable) -> None:
    run = make_run(96 + 8)
    scorer = t.Scorer(run, run.val, 8)
    windows = scorer.windows.copy()
    windows[4] = windows[5]  # as many scores as targets, but eight targets have none
    scorer.score(windows)
    with pytest.raises(AssertionError, match="16 of 104 targets not scored exactly once"):
        scorer.result()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ladder", [False, True])
def test_scoring_has_few_shapes_and_no_pass_that_nobody_asked_for(
    make_run: Callable, ladder: bool, compiled: bool
) -> None:
    """A shape more is a graph more to compile, in the 600 seconds; PR 1092 scored everything once more than needed."""
    run = make_run(203, eval_ladder=ladder, ttt_lr=0.0)  # 203 targets: neither windows nor batches come out even
    run.rt.compiled = compiled
    shapes, scored = [], []

    def spy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():  # scoring, not adaptation
            shapes.append((tuple(x.shape), tuple(y.shape)))
            scored.append(int((y >= 0).sum()))
        return run.model.token_nll(x, y)

    t.evaluate(run._replace(token_nll=spy))
    # Full batches: of 4 windows with all their targets, or with the last 8. Compiled, the text's first window has the
    # former shape too, and padding; without compilation it is alone.
    first = ((4, 32), (4, 32)) if compiled else ((1, 32), (1, 32))
    assert set(shapes) == {first, ((4, 32), (4, 32)), ((4, 32), (4, 8))}
    assert sum(scored) == (3 if ladder else 2) * 203
