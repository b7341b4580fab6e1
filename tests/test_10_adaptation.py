"""Test-time training: only on targets whose score is fixed, each as often as asked, alike for any number of ranks."""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, replay, wake

import train_gpt as t


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this size run faster on one thread, and alike on every machine."""
    monkeypatch.setattr(t, "available_cores", lambda: 1)


def adapted_nll(run: t.Run) -> torch.Tensor:
    """Returns the nats of every target, scored with adaptation; the model's weights are as before afterwards."""
    initial, kept, result = copy.deepcopy(run.model.state_dict()), [], t.Scorer.result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Scorer, "result", lambda self: (kept.append(self.nll[:-1].clone()), result(self))[1])
        t.eval_val_ttt(run)
    run.model.load_state_dict(initial)
    assert len(kept) == 1
    return kept[0]


def with_tokens(run: t.Run, tokens: torch.Tensor) -> t.Run:
    return run._replace(val=run.val._replace(tokens=tokens))


def numbered(run: t.Run) -> t.Run:
    """Returns the run on a text in which every token is another, so that a target's token tells its number plus 1."""
    assert run.h.vocab_size > run.val.num_targets
    return with_tokens(run, torch.arange(run.val.num_targets + 1, dtype=torch.int32))


# ------------------------------------------------------------------------------------------------------- causality
@pytest.mark.parametrize("settings", [{}, {"ttt_optimizer": "adamw", "ttt_lr": 1e-2}])
def test_adapting_learns_what_repeats_itself(make_run: Callable, settings: dict) -> None:
    """Seven tokens in turn: what a chunk teaches holds in the next, so the later text costs far less."""
    scores = []
    for ttt_enabled in (False, True):
        run = make_run(1200, awake=False, ttt_enabled=ttt_enabled, ttt_epochs=8, **settings)
        run = with_tokens(run, torch.arange(1201, dtype=torch.int32) % 7 + 20)
        scores.append(t.final_score(run).val_loss)
    assert abs(scores[0] - math.log(96)) < 0.1, "an untrained model guesses uniformly"
    assert scores[1] < 0.8 * scores[0]


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ttt_optimizer": "adamw", "ttt_lr": 1e-3, "ttt_chunk_tokens": 50},
        {"eval_seq_len": 64, "eval_attn_window": 32},
    ],
)
def test_future_tokens_do_not_change_past_scores_with_adaptation_on(
    make_run: Callable, settings: dict, replays: bool
) -> None:
    run = make_run(200, **settings)  # chunks end near 64 (or 50), 128 (100), 192 (150); windows advance by 8
    if replays:
        replay(run)
    before = adapted_nll(run)
    assert torch.equal(adapted_nll(run), before), "the same run twice is the same, bit by bit"
    # One token, or all from there on.
    for p, last in (
        (1, 2),
        (31, 32),
        (49, 201),
        (50, 51),
        (63, 64),
        (58, 59),
        (66, 67),
        (65, 201),
        (72, 73),
        (129, 201),
        (200, 201),
    ):
        tokens = run.val.tokens.clone()
        tokens[p:last] = (tokens[p:last] + 1) % run.h.vocab_size
        after = adapted_nll(with_tokens(run, tokens))
        # Target i is token i + 1 and sees tokens up to i: scores before p - 1 have nothing of token p.
        assert torch.equal(after[: p - 1], before[: p - 1]), f"token {p} changed scores of the past"
        assert after[p - 1] != before[p - 1]
        if p < 64 and last == p + 1:
            # Out of the reach of three blocks, in each later chunk: only the adapted weights carry it there.
            assert all((after[low:] != before[low:]).any() for low in (168, 192)), "the chunk was not trained on"


# ------------------------------------------------------------------------------------------------- naive reference
def naive_steps(tokens: torch.Tensor, sequences: list, h: t.Hyperparameters) -> list:
    """Returns optimizer steps, lists of (inputs, targets, number of targets that count at the end)."""
    cut = [
        (tokens[first:high].long(), tokens[first + 1 : high + 1].long(), high - low) for first, low, high in sequences
    ]
    return [cut[i : i + h.ttt_batch_seqs] for i in range(0, len(cut), h.ttt_batch_seqs)]


class NaiveAdapter:
    """The rule in plain torch: one sequence after the other, torch's own optimizer, a clip written out."""

    def __init__(self, model: t.GPT, h: t.Hyperparameters):
        self.model, self.h, self.groups = model, h, []
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[0] == "blocks" and int(parts[1]) < h.ttt_freeze_blocks:
                continue
            factor = 1.0
            for item in reversed(h.ttt_lr_groups.split(",") if h.ttt_lr_groups else []):
                part, value = item.split(":")
                factor = float(value) if part in name else factor
            self.groups.append({"params": [parameter], "factor": factor})
        if h.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.groups, lr=1.0, momentum=h.ttt_momentum)
        else:
            self.optimizer = torch.optim.AdamW(self.groups, lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)

    def nll(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model.forward_logits(ids.unsqueeze(0))[0]
        return torch.logsumexp(logits, 1) - logits[torch.arange(len(ids)), targets]

    def step(self, sequences: list, scale: float) -> None:
        self.model.zero_grad()
        count = sum(own for *_, own in sequences)
        loss = sum(self.nll(ids, targets)[len(ids) - own :].sum() for ids, targets, own in sequences) / count
        loss.backward()
        parameters = [p for group in self.groups for p in group["params"]]
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
        for p in parameters:
            if self.h.ttt_grad_clip and norm > self.h.ttt_grad_clip:
                p.grad *= self.h.ttt_grad_clip / norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.h.ttt_lr * group["factor"] * scale
        self.optimizer.step()


def naive_sequences(low: int, high: int, length: int) -> list:
    """Returns (first position, first target, end) of sequences that cover [low, high), the last one with context."""
    cuts = list(range(low, high, length)) + [high]
    return [(max(0, b - length), a, b) for a, b in zip(cuts, cuts[1:])]


def naive_ttt(run: t.Run) -> torch.Tensor:
    """Returns the nats of every target with score-first adaptation, written from its description."""
    h, tokens, n = run.h, run.val.tokens, run.val.num_targets
    adapter, length = NaiveAdapter(copy.deepcopy(run.model), h), min(h.window, n)
    windows, end = [(0, 0, length)], length
    while end < n:
        windows.append((min(end + h.stride, n) - length, end, min(end + h.stride, n)))
        end = windows[-1][2]
    nll, chunks = torch.full((n,), math.nan), sorted({low // h.ttt_chunk_tokens for _, low, _ in windows})
    for number, chunk in enumerate(chunks):
        own = [w for w in windows if w[1] // h.ttt_chunk_tokens == chunk]
        for first, low, high in own:
            with torch.no_grad():
                scores = adapter.nll(tokens[first:high].long(), tokens[first + 1 : high + 1].long())
            nll[low:high] = scores[low - first :]
        if number == len(chunks) - 1:
            break
        scale = 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1))) if h.ttt_cosine else 1.0
        scale *= 3 / max(3, h.ttt_epochs)  # more than three epochs share the sum of three
        for _ in range(h.ttt_epochs):
            for sequences in naive_steps(tokens, naive_sequences(own[0][1], own[-1][2], min(h.reach, n)), h):
                adapter.step(sequences, scale)  # of as many positions as attention reaches
    return nll


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ttt_momentum": 0.0, "ttt_epochs": 1, "ttt_grad_clip": 0.0, "ttt_lr": 0.01},
        {"ttt_grad_clip": 0.05, "ttt_cosine": False},
        {"ttt_freeze_blocks": 2, "ttt_batch_seqs": 1},
        {"ttt_lr_groups": "mlp.proj:3,mlp.fc:0.5,proj:0,blocks.0:2", "ttt_batch_seqs": 16},
        {"ttt_optimizer": "adamw", "ttt_lr": 1e-3},
        {"ttt_optimizer": "adamw", "ttt_lr": 1e-3, "ttt_lr_groups": "mlp.proj:3", "ttt_freeze_blocks": 1},
        {"ttt_epochs": 12, "ttt_chunk_tokens": 80},
        {"ttt_chunk_tokens": 20, "ttt_epochs": 2},  # chunks shorter than a window
        {"ttt_chunk_tokens": 51, "eval_stride": 7, "ttt_batch_seqs": 3, "micro_batch_tokens": 32},
        {"eval_stride": 0},
        {"eval_seq_len": 64, "eval_attn_window": 32, "eval_stride": 32},
        {"ttt_chunk_tokens": 1000},  # one chunk: nothing is ever adapted
    ],
)
def test_adapted_scores_are_those_of_a_naive_loop(make_run: Callable, settings: dict) -> None:
    run = make_run(203, **settings)
    got, expected = adapted_nll(run), naive_ttt(run)
    # The same arithmetic in fp32 in other orders and batch shapes: scores are 1e-5 off without adaptation (see
    # test_9), and at most 24 steps with a clipped gradient each carry such an error on. What a wrong rule does is
    # seen in the difference that adaptation makes: at least 200 times the tolerance.
    assert (got - expected).abs().max() < 1e-4
    change = (got - naive_ttt(run._replace(h=with_knob(run.h, ttt_lr=0.0)))).abs().max()
    assert change > 0.02 if settings.get("ttt_chunk_tokens") != 1000 else change < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ttt_optimizer": "adamw", "ttt_lr": 1e-3, "ttt_lr_groups": "mlp.proj:3"},
        {"ttt_freeze_blocks": 2, "ttt_batch_seqs": 3, "micro_batch_tokens": 32},
        {"ttt_chunk_tokens": 51, "eval_stride": 7},  # chunks and batches of several shapes
    ],
)
def test_replayed_from_a_graph_adaptation_and_scores_are_the_same(make_run: Callable, settings: dict) -> None:
    plain, run = make_run(203, **settings), make_run(203, **settings)
    replays = replay(run)
    expected, got = adapted_nll(plain), adapted_nll(run)
    assert len(replays) > 10
    # The same operations on the same tensors, but for the learning rate, which a graph reads as fp32: 6e-8 off.
    assert (got - expected).abs().max() < 2e-5
    assert (expected - naive_ttt(plain._replace(h=with_knob(plain.h, ttt_lr=0.0)))).abs().max() > 0.02


def with_knob(h: t.Hyperparameters, **values: object) -> t.Hyperparameters:
    h = copy.copy(h)
    for name, value in values.items():
        setattr(h, name, value)
    return h


def test_each_knob_of_adaptation_matters(make_run: Callable) -> None:
    """What the naive loop is compared on must not be a place where the knobs do nothing."""
    base = adapted_nll(make_run(203))
    for knob in (
        {"ttt_momentum": 0.5},
        {"ttt_epochs": 2},
        {"ttt_grad_clip": 0.5},
        {"ttt_cosine": False},
        {"ttt_freeze_blocks": 1},
        {"ttt_lr_groups": "mlp.fc:2"},
        {"ttt_batch_seqs": 1},
        {"ttt_chunk_tokens": 40},
        {"ttt_optimizer": "adamw", "ttt_lr": 1e-3},
    ):
        assert (adapted_nll(make_run(203, **knob)) - base).abs().max() > 5e-3, knob


# ------------------------------------------------------------------------------------------------------ score first
def spied_events(run: t.Run, evaluate: Callable, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Returns what was scored and trained on, in order: ("score" or "train", numbers of the targets)."""
    events, score, adapt = [], t.Scorer.score, t.TTT.adapt

    def spy_score(self: t.Scorer, windows: object) -> tuple[torch.Tensor, int]:
        known = self.nll[:-1].isfinite()
        sums = score(self, windows)
        events.append(("score", (self.nll[:-1].isfinite() & ~known).nonzero().flatten().tolist()))
        return sums

    def spy_adapt(self: t.TTT, batch: t.Batch, lr_scale: float) -> None:
        x, y, num_targets = batch
        # The tokens are numbered: an input before its target shows that the pair is one of the text.
        assert torch.equal(x[y >= 0] + 1, y[y >= 0])
        events.append(("train", (y[y >= 0] - 1).tolist()))
        assert num_targets == len(events[-1][1])
        adapt(self, batch, lr_scale)

    monkeypatch.setattr(t.Scorer, "score", spy_score)
    monkeypatch.setattr(t.TTT, "adapt", spy_adapt)
    evaluate(run)
    return events


@pytest.mark.parametrize(
    ("num_targets", "settings"),
    [
        (301, {}),
        (301, {"ttt_chunk_tokens": 33, "ttt_batch_seqs": 3, "ttt_epochs": 2}),
        (257, {"ttt_chunk_tokens": 100, "eval_stride": 7, "ttt_batch_seqs": 5}),
        (256, {"ttt_chunk_tokens": 128, "eval_stride": 0, "ttt_batch_seqs": 1, "ttt_epochs": 1}),
        (300, {"ttt_chunk_tokens": 7, "ttt_epochs": 4}),
        (70, {"ttt_chunk_tokens": 69, "eval_stride": 1}),
        (20, {"ttt_chunk_tokens": 5}),  # shorter than a window
    ],
)
def test_only_scored_targets_are_trained_on_and_each_exactly_ttt_epochs_times(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, num_targets: int, settings: dict
) -> None:
    run = numbered(make_run(num_targets, vocab_size=512, **settings))
    events = spied_events(run, t.eval_val_ttt, monkeypatch)
    assert events[-1][0] == "score", "nothing is trained on after the last chunk"
    scored, trained, last_chunk = [], Counter(), []
    for kind, targets in events:
        if kind == "score":
            assert targets == list(range(len(scored), len(scored) + len(targets))), "the text is scored in order"
            scored += targets
            last_chunk = targets
        else:
            assert set(targets) <= set(last_chunk), "trained on is the chunk scored last, and nothing else"
            trained.update(targets)
    assert scored == list(range(num_targets))
    assert trained == dict.fromkeys(range(num_targets - len(last_chunk)), run.h.ttt_epochs)
    starts = [targets[0] for kind, targets in events if kind == "score"]
    assert len({start // run.h.ttt_chunk_tokens for start in starts}) == len(starts), "one score for each chunk"


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("batch_seqs", [1, 2, 3, 16])
def test_the_ranks_share_the_sequences_of_the_step_that_one_process_takes(
    make_run: Callable, world_size: int, batch_seqs: int
) -> None:
    run = numbered(make_run(301, vocab_size=512, ttt_batch_seqs=batch_seqs))
    for low, high in ((0, 64), (64, 104), (101, 300), (200, 210)):
        expected = [sorted(y[y >= 0].tolist()) for _, y, _ in t.TTT(run).batches(run.val.tokens, low, high)]
        assert sum(expected, []) and sorted(sum(expected, [])) == list(range(low + 1, high + 1))
        shares = []
        for rank in range(world_size):
            rt = copy.copy(run.rt)
            rt.rank, rt.world_size = rank, world_size
            shares.append(t.TTT(run._replace(rt=rt)).batches(run.val.tokens, low, high))
        assert len({len(share) for share in shares}) == 1, "all take part in as many collectives"
        joint = []
        for parts in zip(*shares):
            assert len({x.shape for x, _, _ in parts}) == 1
            assert {count for _, _, count in parts} == {sum(int((y >= 0).sum()) for _, y, _ in parts)}
            joint.append(sorted(token for _, y, _ in parts for token in y[y >= 0].tolist()))
        assert joint == expected


@pytest.mark.parametrize("num_frozen", [1, 2, 3])
def test_frozen_blocks_stay_bit_identical_and_all_else_moves(make_run: Callable, num_frozen: int) -> None:
    run = make_run(203, ttt_freeze_blocks=num_frozen)
    before = copy.deepcopy(run.model.state_dict())
    t.eval_val_ttt(run)
    for name, w in run.model.state_dict().items():
        frozen = name.startswith("blocks.") and int(name.split(".")[1]) < num_frozen
        assert torch.equal(w, before[name]) == frozen, name
    assert all(p.grad is None for p in run.model.parameters()), "no gradient is left behind"
    assert all(p.requires_grad for p in run.model.parameters())


def test_no_gradient_of_a_frozen_block_is_computed(make_run: Callable) -> None:
    run, frozen = make_run(203, ttt_freeze_blocks=2), []

    def token_nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            frozen.append({name for name, p in run.model.named_parameters() if not p.requires_grad})
        return run.model.token_nll(x, y)

    t.eval_val_ttt(run._replace(token_nll=token_nll))
    own = {name for name, _ in run.model.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))}
    assert frozen and all(names == own for names in frozen)

    def fail(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    ttt = t.TTT(run._replace(token_nll=fail))
    with pytest.raises(MemoryError):
        ttt.add_gradients(*ttt.batches(run.val.tokens, 0, 64)[0])
    assert all(p.requires_grad for p in run.model.parameters()), "training, which comes later, needs them"


def test_a_part_of_the_name_with_the_factor_0_is_not_adapted(make_run: Callable) -> None:
    run = make_run(203, ttt_lr_groups="mlp.proj:0,tok_emb:0")
    before = copy.deepcopy(run.model.state_dict())
    t.eval_val_ttt(run)
    for name, w in run.model.state_dict().items():
        assert torch.equal(w, before[name]) == ("mlp.proj" in name or "tok_emb" in name), name


# ------------------------------------------------------------------------------------------------ before the scores
def test_adapting_before_scoring_says_that_it_breaks_the_rules_and_trains_on_everything(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = numbered(make_run(301, vocab_size=512, ttt_mode="pre", ttt_epochs=2, ttt_batch_seqs=3))
    events = spied_events(run, t.evaluate, monkeypatch)
    assert "BREAKS THE RULES" in capsys.readouterr().out
    kinds = [kind for kind, _ in events]
    first, last = kinds.index("train"), len(kinds) - kinds[::-1].index("train")
    assert kinds[:first] == ["score"] and kinds[last:] == ["score"], "the quantized score, training, the final score"
    trained = Counter(target for kind, targets in events if kind == "train" for target in targets)
    assert trained == dict.fromkeys(range(301), 2)


@pytest.mark.parametrize("settings", [{}, {"ttt_optimizer": "adamw", "ttt_lr": 1e-3, "ttt_cosine": False}])
def test_adapting_before_scoring_is_a_naive_loop_over_the_text(make_run: Callable, settings: dict) -> None:
    run = make_run(203, ttt_mode="pre", **settings)
    naive = NaiveAdapter(copy.deepcopy(run.model), run.h)
    steps = naive_steps(run.val.tokens, naive_sequences(0, 203, 32), run.h) * run.h.ttt_epochs
    for number, sequences in enumerate(steps):
        scale = 0.5 * (1 + math.cos(math.pi * number / len(steps))) if run.h.ttt_cosine else 1.0
        naive.step(sequences, scale)
    score, seconds = t.evaluate(run)
    expected = t.eval_val_sliding(run._replace(model=naive.model, token_nll=naive.model.token_nll))
    assert math.isclose(score.val_loss, expected.val_loss, abs_tol=1e-4)  # as of the naive loop above
    score_first = t.evaluate(make_run(203, **settings))[0]
    assert score.val_loss < score_first.val_loss - 0.02, "text that was trained on is known: this is why it is banned"
    assert seconds >= score.seconds, "the adaptation is part of the time"


def test_evaluation_without_adaptation_leaves_the_weights_alone(make_run: Callable) -> None:
    run = make_run(203, ttt_enabled=False)
    before = copy.deepcopy(run.model.state_dict())
    score, _ = t.evaluate(run)
    assert score[:2] == t.eval_val_sliding(run)[:2]
    assert all(torch.equal(w, before[name]) for name, w in run.model.state_dict().items())


# -------------------------------------------------------------------------------------------------- real processes
CASES = [
    {},
    {"ttt_optimizer": "adamw", "ttt_lr": 1e-3, "ttt_freeze_blocks": 1},
    {"ttt_chunk_tokens": 32},  # one sequence a chunk: fewer than processes
    {"ttt_batch_seqs": 3, "ttt_chunk_tokens": 100},  # a step of 3 sequences does not divide by 2
]


def adapt_cases() -> list[tuple[torch.Tensor, float, dict]]:
    """Returns finite scores of this rank, bits per byte and adapted weights of each case."""
    results, rt = [], t.Runtime(t.Hyperparameters(**TINY))
    for settings in CASES:
        h = t.Hyperparameters(**{**TINY, **settings})
        torch.manual_seed(1)
        tokens, model = torch.randint(h.vocab_size, (204,), dtype=torch.int32), t.GPT(h)
        wake(model)
        val = t.Validation(tokens, torch.full((203,), 2, dtype=torch.int16), 406, "")
        run = t.Run(h, rt, model, model.forward, model.token_nll, [], val, b"")
        kept, result = [], t.Scorer.result
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t.Scorer, "result", lambda self: (kept.append(self.nll[:-1]), result(self))[1])  # noqa: B023
            score = t.eval_val_ttt(run)
        results.append((kept[0], score.val_bpb, model.state_dict()))
    rt.close()
    return results


def adapt_on_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(adapt_cases(), Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_adapt_as_one_does_even_with_fewer_sequences_than_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=adapt_on_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    single = adapt_cases()
    for process in processes:
        process.join(timeout=120)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "the processes wait for each other"
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for settings, one, first, second in zip(CASES, single, *ranks):
        assert all(torch.equal(w, second[2][name]) for name, w in first[2].items()), f"{settings}: ranks drift apart"
        assert first[1] == second[1]
        both = torch.stack((first[0], second[0]))
        assert torch.equal(both.isfinite().sum(0), torch.ones(203, dtype=torch.int64))
        # Sums of gradients in another order, as in the naive loop above.
        assert (both.nan_to_num(0.0).sum(0) - one[0]).abs().max() < 1e-4, settings
        assert abs(first[1] - one[1]) < 1e-4, settings  # the mean of such errors is smaller than the largest


@pytest.mark.parametrize(("num_targets", "warned"), [(64, True), (65, False)])
def test_a_text_of_one_chunk_is_a_warning(
    make_run: Callable, capsys: pytest.CaptureFixture, num_targets: int, warned: bool
) -> None:
    """It is scored as without adaptation, under a name that says otherwise."""
    t.eval_val_ttt(make_run(num_targets, ttt_chunk_tokens=64))
    assert ("WARNING: the text is one chunk, so nothing is adapted" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("max_rows", "shapes"), [(8, [(5, 32)]), (4, [(3, 32)] * 2), (2, [(2, 32)] * 3), (1, [(1, 32)] * 5)]
)
def test_a_batch_is_cut_into_passes_of_one_shape_with_the_gradient_of_the_whole(
    make_run: Callable, max_rows: int, shapes: list[tuple[int, int]]
) -> None:
    run, found = make_run(ttt_batch_seqs=5), []

    def token_nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found.append(tuple(x.shape))
        return run.model.token_nll(x, y)

    ttt = t.TTT(run._replace(token_nll=token_nll))
    gradients = []
    for rows in (5, max_rows):
        run.rt.max_rows["adaptation"] = rows
        found.clear()
        ttt.flat_gradient.zero_()
        ttt.add_gradients(*ttt.batches(run.val.tokens, 0, 160)[0])
        gradients.append([gradient.clone() for gradient in ttt.gradients])
    assert found == shapes
    for whole, cut in zip(*gradients):  # sums of 160 terms in another order
        assert (whole - cut).abs().max() <= 2e-5 * whole.abs().max()


# ------------------------------------------------------------------------------------------------------ time to adapt
@pytest.mark.parametrize(
    ("num_targets", "settings"),
    [
        (301, {}),
        (301, {"ttt_chunk_tokens": 33, "ttt_batch_seqs": 3, "ttt_epochs": 2, "eval_batch_seqs": 2}),
        (257, {"ttt_chunk_tokens": 100, "eval_stride": 7, "ttt_batch_seqs": 5, "eval_batch_seqs": 3}),
        (300, {"ttt_mode": "pre", "ttt_batch_seqs": 2, "eval_batch_seqs": 4}),
        (300, {"ttt_enabled": False, "eval_stride": 16}),
        (20, {"ttt_chunk_tokens": 5}),  # one chunk, which is not adapted to
    ],
)
def test_the_passes_of_the_plan_are_those_of_the_final_score(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, num_targets: int, settings: dict
) -> None:
    run, counts = make_run(num_targets, **settings), Counter()
    for method in ("Scorer._score_tail", "TTT.update"):
        cls, name = method.split(".")
        original = getattr(getattr(t, cls), name)

        @functools.wraps(original)
        def counted(*args: object, original: Callable = original, name: str = name, **constants: object) -> None:
            counts[name] += 1
            original(*args, **constants)

        monkeypatch.setattr(getattr(t, cls), name, counted)
    t.final_score(run)
    num_batches, num_steps = t.count_passes(run)
    assert counts["update"] == num_steps * run.h.ttt_epochs
    # The plan counts the text's first window, a batch of its own, with the others.
    assert 0 <= counts["_score_tail"] - num_batches <= 1


def plan(run: t.Run, scoring: float, adaptation: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns what is logged of a full-size text on 8 processes, where passes take so many milliseconds."""
    lines: list[str] = []
    monkeypatch.setattr(run.rt, "log", lines.append)
    run.rt.world_size, run.rt.max_rows["scoring"] = 8, 32
    run.rt.pass_seconds = {"scoring": scoring / 1000, "adaptation": adaptation / 1000}
    t.plan_evaluation(run._replace(val=SimpleNamespace(num_targets=62_021_632)))
    return lines


FULL_TEXT = {"eval_seq_len": 2048, "ttt_chunk_tokens": 32_768, "eval_stride": 64, "ttt_batch_seqs": 32}


def test_the_log_says_how_long_the_final_score_will_take(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(**FULL_TEXT)
    # 1,893 chunks of 512 windows, 2 batches a process each; all but the last are adapted to, in one step an epoch.
    expected = "76s of EVAL_BUDGET_SECONDS=600: 56.8s of scoring, 3 epochs of 6.2s with steps of at most 0.03"
    assert plan(run, 15.0, 3.3, monkeypatch) == [f"plan: the final score will take about {expected}"]


@pytest.mark.parametrize(("epochs", "adaptation", "fix"), [(50, 8.0, "33 fits"), (3, 400.0, "use more GPUs or")])
def test_epochs_that_will_not_fit_are_a_warning_before_training(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, epochs: int, adaptation: float, fix: str
) -> None:
    run = make_run(**FULL_TEXT, ttt_epochs=epochs)
    (line,) = plan(run, 15.0, adaptation, monkeypatch)
    assert line.startswith("WARNING: the final score will take about") and fix in line
    assert run.h.ttt_epochs == epochs, "a number that was given stays"


def test_auto_takes_the_most_epochs_that_fit(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    # 570 s, 95% of 600, less 56.79 s of scoring: 513.21 s for epochs of 1,892 steps.
    for milliseconds, epochs in ((8.0, 33), (5.425, 50), (5.5, 49), (0.01, 1000), (1e6, 1), (0.0, 3)):
        run = make_run(**FULL_TEXT, ttt_epochs="auto")
        lines = plan(run, 15.0, milliseconds, monkeypatch)
        assert (
            run.h.ttt_epochs == epochs and f"plan: TTT_EPOCHS=auto is {epochs}, which repeats this run's score" in lines
        )
        assert lines[-1].startswith("WARNING") == (milliseconds == 1e6)
    run = make_run(**FULL_TEXT, ttt_epochs="auto", eval_budget_seconds=75.0)
    plan(run, 15.0, 3.3, monkeypatch)
    assert run.h.ttt_epochs == 2  # (71.25 - 56.79) / 6.24


def test_without_adaptation_only_scoring_is_planned(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(**FULL_TEXT, ttt_enabled=False)
    lines = plan(run, 15.0, 3.3, monkeypatch)
    # Not cut into chunks: 969,057 windows, 256 at a time.
    assert lines == ["plan: the final score will take about 57s of EVAL_BUDGET_SECONDS=600: 56.8s of scoring"]


@pytest.mark.parametrize("settings", [{}, {"ttt_mode": "pre"}, {"ttt_enabled": False}])
def test_the_preflight_measures_the_passes_that_are_planned(make_run: Callable, settings: dict) -> None:
    run = make_run(**settings)
    before = [p.detach().clone() for p in run.model.parameters()]
    t.preflight(run)
    phases = ["scoring"] if settings.get("ttt_enabled") is False else ["scoring", "adaptation"]
    assert list(run.rt.pass_seconds) == phases and min(run.rt.pass_seconds.values()) > 0
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), before)), "nothing is learnt meanwhile"
    t.plan_evaluation(run)
