"""The optimizer against formulas: Newton-Schulz, Muon, AdamW, clipping, one process against several, schedules."""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from conftest import TINY, wake

import train_gpt as t

Settings = Callable[..., t.Hyperparameters]


# ----------------------------------------------------------------------------------------------------- Newton-Schulz

SHAPES = [(8, 24), (16, 16)]  # tall ones lie down in their stacks: `test_steps_equal_muon_…` has some


def quintic(x: np.ndarray, steps: int) -> np.ndarray:
    """What `steps` iterations make of a singular value."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def newton_schulz_in_loops(matrix: np.ndarray, steps: int) -> np.ndarray:
    """The iteration on one matrix, as published."""
    x = matrix / (math.sqrt((matrix * matrix).sum()) + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def random_matrices(shape: tuple[int, int], lowest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left singular vectors (n, rows, k), singular values (n, k), from `lowest` to 1, right ones (n, k, cols)."""
    rng, k = np.random.default_rng(7), min(shape)
    left = np.linalg.qr(rng.normal(size=(3, shape[0], k)))[0]
    right = np.linalg.qr(rng.normal(size=(3, shape[1], k)))[0].transpose(0, 2, 1)
    return left, np.geomspace(lowest, 1.0, k) * np.ones((3, 1)), right


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square"])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_keeps_singular_vectors_and_maps_singular_values(shape: tuple[int, int], steps: int) -> None:
    left, values, right = random_matrices(shape, 0.01)
    values = values * np.array([[1e-5], [1.0], [50.0]])  # so that the 1e-7 beside the norm counts in the first one
    matrices = torch.from_numpy(left * values[:, None] @ right)
    out = t.newton_schulz(matrices, steps, torch.float64).numpy()
    normed = values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-7)
    expected = left * quintic(normed, steps)[:, None] @ right
    # float64 rounds by 1e-16, some tens of times, which five iterations multiply by at most 3.4445^5 = 485.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square"])
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_newton_schulz_brings_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype, slack: float
) -> None:
    left, values, right = random_matrices(shape, 0.02)
    out = t.newton_schulz(torch.from_numpy(left * values[:, None] @ right).float(), 5, dtype)
    assert out.dtype == dtype and out.shape == (3, *shape)  # so that it travels in that type
    found = np.linalg.svd(out.double().numpy(), compute_uv=False)
    # Five quintics map [0.01, 1] into [0.68, 1.21]; here the smallest is 0.02 over a norm of less than 2. Rounding of
    # fp32 grows by at most 3.4445^5 = 485: 3e-5. In bfloat16 every product of the last iterations rounds by 2^-8, which
    # adds up to some hundredths.
    fine = quintic(np.linspace(0.01, 1.0, 10_000), 5)
    assert 0.68 < fine.min() and fine.max() < 1.21
    assert 0.68 - slack < found.min() and found.max() < 1.21 + slack


def test_newton_schulz_leaves_its_input_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrices = torch.randn(2, 8, 24, dtype=dtype)
        before = matrices.clone()
        t.newton_schulz(matrices, 5, dtype)
        assert torch.equal(matrices, before)


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "square"])
def test_newton_schulz_of_a_stack_is_that_of_each_matrix(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape)
    matrices[1] = 0.0  # as in the padding of a stack: no division by zero
    out = t.newton_schulz(matrices, 5, torch.float32).numpy()
    expected = np.stack([newton_schulz_in_loops(matrix, 5) for matrix in matrices.double().numpy()])
    # fp32: 6e-8 relative to the norm, grown by at most 3.4445^5 = 485.
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)
    assert not out[1].any()


# ------------------------------------------------------------------------------------------- Muon and AdamW, by hand

ALL_KINDS = {"gated_attention": True, "value_residual": True}
ADAM_EPS = (
    1e-3  # in the comparisons: a rounding d of a gradient then moves a weight by lr d / 1e-3 at most, and by no more
)


def optimizer_in_loops(h: t.Hyperparameters, weights: dict, gradients: list[dict], scales: list[float]) -> dict:
    """Weights after one step for each item, in float64, a parameter at a time."""
    w = {name: value.copy() for name, value in weights.items()}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    for step, (gradient, scale) in enumerate(zip(gradients, scales)):
        norm = math.sqrt(sum((g * g).sum() for g in gradient.values()))
        clip = min(1.0, h.grad_clip_norm / (norm + 1e-6)) if h.grad_clip_norm else 1.0
        mu = h.muon_momentum_warmup_start + (h.muon_momentum - h.muon_momentum_warmup_start) * min(
            1.0, step / h.muon_momentum_warmup_steps
        )
        for name in w:
            g = gradient[name] * clip
            is_block_matrix = name.startswith("blocks.") and name.endswith("weight") and "attn_gate" not in name
            is_table = name in (
                "tok_emb.weight",
                "bigram.embed.weight",
                "ve_shared.embed.weight",
            )
            if is_block_matrix or name.endswith("proj.weight"):
                first[name] = mu * first[name] + g
                nesterov = g + mu * first[name]
                if h.muon_row_norm:
                    nesterov = nesterov / np.linalg.norm(nesterov, axis=1, keepdims=True)  # of W (out, in)
                update = newton_schulz_in_loops(nesterov, h.muon_backend_steps)
                rows, cols = g.shape
                w[name] *= 1 - h.matrix_lr * scale * h.muon_wd
                w[name] -= h.matrix_lr * scale * math.sqrt(max(1, rows / cols)) * update
            else:
                lr, decay = (h.tied_embed_lr, h.adam_wd) if is_table else (h.scalar_lr, 0.0)
                first[name] = h.beta1 * first[name] + (1 - h.beta1) * g
                second[name] = h.beta2 * second[name] + (1 - h.beta2) * g * g
                m = first[name] / (1 - h.beta1 ** (step + 1))
                v = second[name] / (1 - h.beta2 ** (step + 1))
                w[name] *= 1 - lr * scale * decay
                w[name] -= lr * scale * m / (np.sqrt(v) + h.adam_eps)
    return w


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_clip_norm": 0.0},
        {"muon_row_norm": True},
        {"muon_wd": 1.5, "adam_wd": 2.0, "beta1": 0.5, "beta2": 0.7, "muon_backend_steps": 3},
    ],
    ids=["defaults", "no clip", "rows of one length", "other rates"],
)
def test_steps_equal_muon_and_adamw_in_plain_loops(tiny: Settings, settings: dict) -> None:
    h = tiny(**{"muon_momentum_warmup_steps": 3, "adam_eps": ADAM_EPS, **ALL_KINDS, **settings})
    model = t.GPT(h)
    wake(model)
    optimizer = t.Optimizer(h, t.Runtime(h), model)
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    # Norms: about 208 x these factors, above and below the clip of 0.3.
    gradients, scales = [], [1.0, 0.7, 1.0, 0.25, 0.1]
    for step, factor in enumerate((1.0, 0.001, 0.002, 0.05, 1.0)):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * factor
        gradients.append({name: p.grad.double().numpy().copy() for name, p in model.named_parameters()})
        norm = optimizer.step(scales[step], t.muon_momentum(h, step))
        expected = math.sqrt(sum((g * g).sum() for g in gradients[-1].values()))
        assert norm.item() == pytest.approx(expected, rel=1e-6)  # a sum of 43,000 fp32 squares, pairwise
        assert all(parameter.grad is None for parameter in model.parameters())
    after = optimizer_in_loops(h, before, gradients, scales)
    # Muon: fp32 rounding of 6e-8 grows in Newton-Schulz by at most 3.4445^5 = 485 to 3e-5, x lr 0.027 x factor sqrt(3):
    # 1.4e-6 a step, 5 steps. AdamW: gradients without a clip are up to 4 and their rounding relative, so below that.
    # Weights of up to 2 round by 1.2e-7 a step.
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), after[name], rtol=0, atol=7e-6, err_msg=name)
        assert abs(after[name] - before[name]).max() > 1e-4, name


def test_without_a_gradient_tables_and_matrices_decay_and_gains_stay(tiny: Settings) -> None:
    h = tiny(muon_wd=0.5, adam_wd=0.25, **ALL_KINDS)
    model = t.GPT(h)
    wake(model)
    optimizer = t.Optimizer(h, t.Runtime(h), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert optimizer.step(0.5, 0.9) == 0.0
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("resid_mix", "attn_gate.weight")) or name == "skip_weights":
            assert torch.equal(parameter, before[name]), name
        else:
            factor = 1 - 0.5 * (0.035 * 0.25 if name in tables else 0.027 * 0.5)
            torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=2e-7, atol=0)  # two roundings


def test_a_learning_rate_scale_of_zero_leaves_the_weights_bit_identical(tiny: Settings) -> None:
    h = tiny(**ALL_KINDS)
    model = t.GPT(h)
    wake(model)
    optimizer = t.Optimizer(h, t.Runtime(h), model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(0.0, 0.9)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))


# ---------------------------------------------------------------------------------------- one process and several

PARALLEL = {"num_layers": 3, "ve_layers": "2", "adam_eps": ADAM_EPS, "muon_row_norm": True, **ALL_KINDS}
NUM_STEPS = 3


def train_part(rank: int, num_processes: int, port: int, folder: str) -> None:
    """Trains as one of several processes on its part of six sequences a step; writes weights, norms, momentum sizes."""
    if num_processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(num_processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    h = t.Hyperparameters(**{**TINY, **PARALLEL})
    rt = t.Runtime(h)
    torch.set_num_threads(1)
    torch.manual_seed(11)
    model = t.GPT(h)
    wake(model)
    optimizer = t.Optimizer(h, rt, model)
    own = slice(rank * 6 // num_processes, (rank + 1) * 6 // num_processes)
    # Unequal sequences: the processes' gradients have norms over 20 times apart, so that clipping each before the
    # reduction would turn the direction of their mean.
    importance = torch.tensor([30.0, 20.0, 5.0, 1.0, 1.0, 0.5])[own]
    norms = []
    for step in range(NUM_STEPS):
        ids = torch.randint(h.vocab_size, (6, 17))[own]
        (model.token_nll(ids[:, :-1], ids[:, 1:]).mean(1) * importance).mean().backward()
        norms.append(optimizer.step(1.0, t.muon_momentum(h, step)).item())
    sizes = [len(stack.momentum) for stack in optimizer.muon_groups]
    torch.save((model.state_dict(), norms, sizes), f"{folder}/{num_processes}-{rank}.pt")
    rt.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[tuple]]:
    """Trains with a number of real processes; returns what each of them wrote, in the order of ranks."""
    folder: Path = tmp_path_factory.mktemp("parts")

    def run(num_processes: int) -> list[tuple]:
        paths = [folder / f"{num_processes}-{rank}.pt" for rank in range(num_processes)]
        if num_processes == 1:
            train_part(0, 1, 0, str(folder))
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            torch.multiprocessing.spawn(train_part, (num_processes, port, str(folder)), num_processes)
        return [torch.load(path) for path in paths]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_train_as_one_on_the_same_batch(trained: Callable, num_processes: int) -> None:
    [(weights, norms, num_matrices)] = trained(1)
    parts = trained(num_processes)
    assert min(norms) > 1.0  # so the clip of 0.3 acts in every step
    for own_weights, own_norms, sizes in parts:
        # Stacks of 6, 3 and 1 matrices (one process) do not all divide: each process holds the rounded-up part.
        assert sizes == [math.ceil(number / num_processes) for number in num_matrices]
        assert own_norms == parts[0][1]  # every process clips by the same number
        np.testing.assert_allclose(own_norms, norms, rtol=1e-5)  # of weights that differ as below, after the first step
        assert own_norms[0] == pytest.approx(norms[0], rel=1e-6)  # of the same weights: order of fp32 sums alone
        for name, value in own_weights.items():
            # Every process holds the same bits: all computed from the same reduced or gathered numbers.
            assert torch.equal(value, parts[0][0][name]), name
            # Against one process gradients are added in another order: 6e-8 of their norm. Newton-Schulz grows that by
            # at most 3.4445^5 = 485, to 3e-5 of an update of 0.027 x sqrt(3): 1.4e-6 a step. AdamW's eps turns it into
            # 0.035 x (0.3 x 6e-8) / 1e-3 = 6e-7. Three steps; and the gradients differ as the weights do: twice that.
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
    assert any(number % num_processes for number in num_matrices)  # so there was padding


def test_the_number_of_collectives_does_not_grow_with_the_layers(tiny: Settings) -> None:
    """Published: one all-reduce for each of some 80 replicated tensors."""
    counts = []
    for layers in (3, 9):
        h, calls = tiny(num_layers=layers, bigram_vocab_size=0, ve_enabled=False), Counter()
        rt = t.Runtime(h)
        rt.world_size = 2  # what a second process would add does not matter here
        rt.all_reduce = lambda x, calls=calls: calls.update(["all_reduce"]) or x
        rt.reduce_scatter = lambda x, calls=calls: calls.update(["scatter"]) or (lambda: x[: len(x) // 2].clone())
        rt.all_gather = lambda x, calls=calls: calls.update(["gather"]) or (lambda: torch.cat((x, x)))
        model = t.GPT(h)
        ids = torch.randint(96, (2, 9))
        model(ids[:, :-1], ids[:, 1:]).backward()
        t.Optimizer(h, rt, model).step(1.0, 0.9)
        ttt = t.TTT(t.Run(h, rt, model, model.forward, model.token_nll, [], None, b""))
        ttt.adapt(t.Batch(ids[:, :-1], ids[:, 1:], num_targets=16), lr_scale=1.0)
        counts.append(calls)
    # Shapes: (32, 32) of c_q and proj, (16, 32) of c_k and c_v, (32, 96) of the MLP. One all-reduce is of replicated
    # gradients, one of the norm, and one of a test-time step.
    assert counts[0] == counts[1] == {"all_reduce": 3, "scatter": 3, "gather": 3}


@pytest.mark.parametrize(("layers", "stacks"), [(11, {22: 3, 1: 2}), (10, {20: 3, 1: 2})])
def test_on_eight_processes_hardly_any_work_is_padding(layers: int, stacks: dict[int, int]) -> None:
    """The published banks padded 11 matrices to 16 (31% of their iterations for nothing)."""
    h = t.Hyperparameters(num_layers=layers)
    with torch.device("meta"):
        model = t.GPT(h)
    rt = SimpleNamespace(world_size=8, device=torch.device("meta"), compile=lambda function: function)
    optimizer = t.Optimizer(h, rt, model)
    assert Counter(len(stack.wide + stack.tall) for stack in optimizer.muon_groups) == stacks
    for stack in optimizer.muon_groups:
        matrices = 8 * len(stack.momentum)
        assert matrices == 24 or stack.momentum.numel() * len(stack.wide + stack.tall) <= 512 * 128  # a tiny projection
        assert (
            stack.momentum.dtype == torch.float32
        )  # published banks had bfloat16, which at 0.99 rounds by 0.2% a step


# --------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("settings", "step", "elapsed", "expected"),
    [
        # The last half of 1,000 steps, or of 600 s, whichever has less left.
        ({"iterations": 1000}, 0, 0.0, 1.0),
        ({"iterations": 1000}, 500, 0.0, 1.0),
        ({"iterations": 1000}, 501, 0.0, 0.998),
        ({"iterations": 1000}, 750, 0.0, 0.5),
        ({"iterations": 1000}, 1000, 0.0, 0.0),
        ({"iterations": 1000}, 1001, 0.0, 0.0),
        ({"iterations": 1000}, 0, 300.0, 1.0),
        ({"iterations": 1000}, 0, 450.0, 0.5),
        ({"iterations": 1000}, 0, 600.0, 0.0),
        ({"iterations": 1000}, 0, 700.0, 0.0),
        ({"iterations": 1000}, 750, 570.0, 0.1),
        ({"iterations": 1000}, 900, 450.0, 0.2),
        ({"iterations": 1000, "max_wallclock_seconds": 0.0}, 750, 1e6, 0.5),  # no cap
        ({"iterations": 1000, "warmdown_frac": 0.2}, 799, 0.0, 1.0),
        ({"iterations": 1000, "warmdown_frac": 0.2}, 900, 0.0, 0.5),
        ({"iterations": 1000, "warmdown_frac": 1.0}, 250, 0.0, 0.75),
        ({"iterations": 1000, "warmdown_frac": 0.0}, 999, 599.0, 1.0),  # never falls
        # WARMDOWN_ITERS steps, of 0.1 s where the clock is the end.
        ({"iterations": 1000, "warmdown_iters": 200}, 0, 0.0, 1.0),
        ({"iterations": 1000, "warmdown_iters": 200}, 800, 0.0, 1.0),
        ({"iterations": 1000, "warmdown_iters": 200}, 850, 0.0, 0.75),
        ({"iterations": 1000, "warmdown_iters": 200}, 1000, 0.0, 0.0),
        ({"iterations": 10**6, "warmdown_iters": 3500}, 5000, 250.0, 1.0),  # 3,500 steps are left
        ({"iterations": 10**6, "warmdown_iters": 3500}, 5000, 425.0, 0.5),
        ({"iterations": 10**6, "warmdown_iters": 3500}, 5000, 600.0, 0.0),
        ({"iterations": 10**6, "warmdown_iters": 3500}, 5000, 601.0, 0.0),
        ({"iterations": 6000, "warmdown_iters": 3500}, 5300, 425.0, 0.2),  # steps end before the clock
        ({"iterations": 10**6, "warmdown_iters": 3500, "max_wallclock_seconds": 0.0}, 5000, 1e6, 1.0),
        ({"iterations": 10**6, "warmdown_iters": 3500, "warmdown_frac": 1.0}, 5000, 425.0, 0.5),  # and not the fraction
    ],
)
def test_the_learning_rate_scale_at_named_points(
    tiny: Settings, settings: dict, step: int, elapsed: float, expected: float
) -> None:
    scale = t.learning_rate_scale(tiny(**settings), step, elapsed, 0.1)
    assert scale == pytest.approx(expected, abs=1e-12)  # a few float64 operations on numbers up to 1e6


def test_the_first_step_has_no_measured_duration_and_a_whole_learning_rate(tiny: Settings) -> None:
    assert t.learning_rate_scale(tiny(warmdown_iters=200), 0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({}, 0, 0.92),
        ({}, 750, 0.955),
        ({}, 1500, 0.99),
        ({}, 20_000, 0.99),
        ({"muon_momentum_warmup_steps": 0}, 0, 0.99),
        ({"muon_momentum_warmup_start": 0.5, "muon_momentum": 0.9, "muon_momentum_warmup_steps": 4}, 1, 0.6),
    ],
)
def test_muons_momentum_at_named_steps(tiny: Settings, settings: dict, step: int, expected: float) -> None:
    assert t.muon_momentum(tiny(**settings), step) == pytest.approx(expected, abs=1e-15)  # one float64 rounding or two


@pytest.mark.parametrize(("done", "expected"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0)])
def test_the_half_cosine_at_named_points(done: float, expected: float) -> None:
    assert t.cosine(done) == pytest.approx(expected, abs=1e-15)  # one float64 rounding or two
