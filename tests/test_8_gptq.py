"""GPTQ: what it learns from training tokens, how it rounds, and where its seconds go."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AUDITED, SMALL, shell

import train_gpt as t


# ------------------------------------------------------------------------------------------------------- the rounding
def correlated(rows: int, cols: int, seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices (batch, rows, cols), and Hessians of inputs that share a few directions."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, rows, cols, generator=generator)
    mix = torch.randn(batch, cols // 4, cols, generator=generator)
    noise = torch.rand(cols, generator=generator) * 0.3 + 0.05
    x = torch.randn(batch, 4 * cols, cols // 4, generator=generator) @ mix
    x += torch.randn(batch, 4 * cols, cols, generator=generator) * noise
    return w, x.transpose(1, 2) @ x


def round_all(w: torch.Tensor, hessians: torch.Tensor, bits: int = 4, floor: float = 0.5) -> tuple:
    """Codes by GPTQ, the nearest codes, and the scales of both, for a batch of matrices."""
    nearest, scales = zip(*(t.quantize_rows(each, t.row_clips(each), bits, floor) for each in w))
    nearest, scales = torch.stack(nearest), torch.stack(scales)
    _, order, factor = t.factor_hessians(hessians.clone(), 0.01)
    return t.gptq(w, scales, bits, order, factor), nearest, scales


def weighted_error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T), D the error of the weights: the squared error of the outputs."""
    d = (w - codes.float() * scales.float()).double()
    return ((d @ hessian.double()) * d).sum().item()


@pytest.mark.parametrize("floor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_uncorrelated_inputs_give_the_nearest_codes_exactly(bits: int, floor: float) -> None:
    w, _ = correlated(20, 300)
    for diagonal in (torch.ones(300), torch.rand(300) + 0.1):
        codes, nearest, _ = round_all(w, torch.diag(diagonal).unsqueeze(0), bits, floor)
        assert codes.dtype == torch.int8 and torch.equal(codes, nearest)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_correlated_inputs_give_a_smaller_error_of_the_outputs(bits: int) -> None:
    w, hessians = correlated(30, 200, batch=3)
    codes, nearest, scales = round_all(w, hessians, bits)
    for i in range(3):
        error = weighted_error(w[i], codes[i], scales[i], hessians[i])
        assert error < 0.6 * weighted_error(w[i], nearest[i], scales[i], hessians[i])


def reference(w: np.ndarray, scales: np.ndarray, hessian: np.ndarray, bits: int) -> np.ndarray:
    """Codes column by column in float64, by the formula of the paper: after a column is rounded, the rest is moved by
    its error times its row of the inverse Hessian, from which the column is then eliminated. No blocks, no Cholesky."""
    largest = 2 ** (bits - 1) - 1
    cols = len(hessian)
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, hessian = w[:, order].astype(np.float64), hessian[np.ix_(order, order)].astype(np.float64)
    inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(cols))
    codes = np.zeros(w.shape)
    for j in range(cols):
        codes[:, j] = np.clip(np.rint(w[:, j] / scales), -largest, largest)
        error = (w[:, j] - codes[:, j] * scales) / inverse[j, j]
        w[:, j:] -= np.outer(error, inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    restored = np.zeros(w.shape)
    restored[:, order] = codes
    return restored


@pytest.mark.parametrize("cols", [1, 7, 128, 129, 300])
def test_codes_are_those_of_a_plain_reference_in_float64(cols: int) -> None:
    w, hessians = correlated(12, cols, seed=cols) if cols >= 4 else (torch.randn(1, 12, cols), torch.eye(cols)[None])
    _, _, scales = round_all(w, hessians, 4)
    _, order, factor = t.factor_hessians(hessians.double(), 0.01)
    codes = t.gptq(w.double(), scales.double(), 4, order, factor.double())
    # scales go through fp32 in both; in float64 only ties of the last digits could differ
    expected = reference(w[0].numpy(), scales[0, :, 0].double().numpy(), hessians[0].numpy(), 4)
    single = round_all(w, hessians, 4)[0]
    assert (single[0].numpy() == expected).mean() > 0.995, "fp32 suffices"
    assert np.array_equal(codes[0].numpy(), expected)


def test_the_order_of_the_columns_does_not_matter() -> None:
    w, hessians = correlated(16, 150)
    moved = torch.randperm(150)
    codes, _, _ = round_all(w, hessians)
    permuted, _, _ = round_all(w[:, :, moved], hessians[:, moved][:, :, moved])
    assert (permuted == codes[:, :, moved]).float().mean() > 0.998, "but for rounding in fp32"


def test_a_batch_gives_what_each_matrix_gives_alone() -> None:
    w, hessians = correlated(10, 140, batch=3)
    together, _, _ = round_all(w, hessians)
    for i in range(3):
        alone, _, _ = round_all(w[i : i + 1], hessians[i : i + 1])
        assert (together[i] == alone[0]).float().mean() > 0.998


def test_a_dead_column_gives_code_0_and_leaves_the_others_alone(make_run: Callable) -> None:
    run = make_run(gptq_enabled=True)
    name = "blocks.0.mlp.fc.weight"
    weights = {n: p.detach() for n, p in run.model.named_parameters()}
    cols = weights[name].size(1)
    hessian = correlated(2, cols)[1][0]
    hessian[5] = hessian[:, 5] = 0
    dead, order, factor = t.factor_hessians(hessian[None].clone(), 0.01)
    assert dead[0].nonzero().flatten().tolist() == [5]
    curvatures = {n: t.Curvature(1.0) for n in weights if t.stored_bits(run.h, n) < 16}
    curvatures[name] = t.Curvature(1.0, dead[0], order[0], factor[0])
    prepared = t.prepare_weights(run._replace(calibrated={"gptq": curvatures}), weights, 0.0)
    codes = {s.name: s for s in t.quantize_weights(prepared, 0.5)}[name].values
    assert (codes[:, 5] == 0).all() and (codes != 0).any(0).sum() == cols - 1


def test_hessians_without_a_factor_get_more_damping_and_broken_ones_an_error() -> None:
    x = torch.randn(3, 50)
    singular = (x.T @ x)[None]
    _, _, factor = t.factor_hessians(singular.clone(), 1e-12)  # in fp32 that is no damping at all
    assert factor.isfinite().all() and (factor.diagonal(dim1=1, dim2=2) > 0).all()
    good = torch.diag(torch.rand(50) + 1)[None]
    alone = t.factor_hessians(good.clone(), 1e-12)[2]
    beside = t.factor_hessians(torch.cat([singular, good]), 1e-12)[2]
    assert torch.equal(alone[0], beside[1]), "a matrix gets no more damping for its neighbour's sake"
    singular[0, 3, 4] = math.nan
    with pytest.raises(t.UserError, match=r"not finite.*GPTQ_ENABLED=0"):
        t.factor_hessians(singular, 0.01)


def test_a_gradient_that_is_not_finite_is_an_error_with_the_parameters_name(make_run: Callable) -> None:
    sums = t.CurvatureSums(make_run(gptq_enabled=True))
    sums.squares["blocks.0.mlp.fc.weight"] += math.inf
    with pytest.raises(t.UserError, match=r"blocks\.0\.mlp\.fc\.weight.*GPTQ_ENABLED=0"):
        sums.solve()


def test_what_cannot_work_with_gptq_is_refused_at_the_start(tiny: Callable, make_run: Callable) -> None:
    with pytest.raises(t.UserError, match=r"PRUNE_FRAC=0\.3"):
        tiny(gptq_enabled=True, prune_frac=0.3)
    run = make_run(gptq_enabled=True, export_only="a.bin", train_batch_tokens=1024)
    run.h.train_seq_len = 1000  # of the file, which is read after the settings
    with pytest.raises(t.UserError, match="TRAIN_BATCH_TOKENS=1024 is not a multiple of TRAIN_SEQ_LEN=1000"):
        t.batch_plan(run.h, run.rt)


class Curve:
    """An estimate of sizes that is wrong by an offset, and a coder that is not."""

    codec = "zstd"
    LARGEST_FLOOR = 1024.0

    def __init__(self, offset: float):
        self.offset = offset

    def bytes_at(self, floor: float) -> float:
        return 10_000 * 2 ** -math.log2(1 + floor)

    def find_floor(self, wanted: float) -> float:
        return min(self.LARGEST_FLOOR, max(0.0, 10_000 / max(wanted, 1.0) - 1))


@pytest.mark.parametrize("offset", [-500.0, 0.0, 300.0, 6000.0])
@pytest.mark.parametrize("part", [0.1, 0.4, 0.9])
def test_the_search_for_the_floor_takes_few_files(offset: float, part: float) -> None:
    curve, budget = Curve(offset), int(max(offset, 0) + part * 10_000)
    search, sizes = t.FloorSearch(curve, budget), []
    while True:
        floor = search.next_floor()
        sizes.append(curve.bytes_at(floor) + offset)
        if search.is_over(floor, sizes[-1]):
            break
    assert sizes[-1] <= budget and sizes[-1] > 0.999 * budget and len(sizes) <= 3


def test_the_search_for_the_floor_gives_up_where_nothing_fits() -> None:
    curve = Curve(5000.0)
    search, files = t.FloorSearch(curve, 4000), 0
    while True:
        floor = search.next_floor()
        files += 1
        if search.is_over(floor, curve.bytes_at(floor) + 5000):
            break
    assert files == 2 and floor == curve.LARGEST_FLOOR


# -------------------------------------------------------------------------------------------------------- the steps
def test_steps_go_as_one_over_the_root_of_the_importance(make_run: Callable) -> None:
    run = make_run(mlp_bits=5)
    weights = {n: p.detach() for n, p in run.model.named_parameters()}
    names = [n for n in weights if t.stored_bits(run.h, n) < 16]
    assert set(t.scale_floors(run.h, weights, {}).values()) == {1.0}
    rng = np.random.default_rng(0)
    curvatures = {n: t.Curvature(float(np.exp(2 * rng.normal()))) for n in names}
    factors = t.scale_floors(run.h, weights, curvatures)
    steps = {n: factors[n] / (2 ** (t.stored_bits(run.h, n) - 1) - 1) for n in names}
    constant = [steps[n] * math.sqrt(curvatures[n].importance) for n in names]
    assert max(constant) / min(constant) < 2**0.13, "but for powers of 2^(1/8)"
    counts = np.array([weights[n].numel() for n in names])
    mean = (counts * np.log2([factors[n] for n in names])).sum() / counts.sum()
    assert abs(mean) < 1 / 16
    dead = {**curvatures, names[0]: t.Curvature(0.0)}
    assert math.isfinite(t.scale_floors(run.h, weights, dead)[names[0]])


def test_a_coarser_step_where_errors_cost_less(make_run: Callable) -> None:
    run = make_run()
    weights = {n: p.detach() for n, p in run.model.named_parameters()}
    names = [n for n in weights if t.stored_bits(run.h, n) < 16]
    curvatures = {n: t.Curvature(16.0 if "mlp.fc" in n else 1.0) for n in names}
    prepared = t.prepare_weights(run._replace(calibrated={"gptq": curvatures}), weights, 0.0)
    stored = {s.name: s for s in t.quantize_weights(prepared, 30.0)}  # a floor above all weights
    fine, coarse = (stored[f"blocks.0.{part}.weight"].scales.mean() for part in ("mlp.fc", "mlp.proj"))
    assert coarse / fine == pytest.approx(4.0, rel=1e-3)


# -------------------------------------------------------------------------------------------------- the measurement
def calibrated(run: t.Run, batches: int = 3) -> t.CurvatureSums:
    """The sums over the first training batches, as `measure_curvature` takes them."""
    sums = t.CurvatureSums(run)
    loader = t.TokenLoader(run.h, run.rt, run.train_shards)
    with sums.watching():
        for _ in range(batches):
            for x, y in loader.next_batch():
                sums.add(x, y)
    loader.pool.shutdown()
    return sums


@pytest.mark.parametrize("recur_layers", ["", "1"])
def test_hessians_are_the_second_moments_of_what_each_matrix_really_reads(
    make_run: Callable, recur_layers: str
) -> None:
    """Seen from the other side: W H W^T is the second moment of the outputs, scaled rows and second passes and all."""
    run = make_run(proj_bits=8, gptq_enabled=True, recur_layers=recur_layers)
    sums = calibrated(run)
    modules = dict(run.model.named_modules())
    moments: dict[str, torch.Tensor] = {}

    def see(name: str, y: torch.Tensor) -> None:
        y = y.detach().flatten(0, -2).double()
        moments[name] = moments.get(name, 0) + y.T @ y

    linears = [n for n, m in modules.items() if isinstance(m, t.Linear)]
    hooks = [modules[n].register_forward_hook(lambda m, a, y, n=n: see(n, y)) for n in linears]
    loader = t.TokenLoader(run.h, run.rt, run.train_shards)
    tokens = 0
    with torch.no_grad():
        for _ in range(3):
            for x, _ in loader.next_batch():
                tokens += x.numel()
                see("logits", torch.nn.functional.linear(run.model.hidden(x), run.model.tok_emb.weight))
    for hook in hooks:
        hook.remove()
    loader.pool.shutdown()
    assert tokens == 3 * run.h.train_batch_tokens
    assert sums.hessians.keys() == {f"{name}.weight" for name in linears} | {"tok_emb.weight"}
    for name in [*linears, "logits"]:
        key = "tok_emb.weight" if name == "logits" else f"{name}.weight"
        w = run.model.get_parameter(key).detach().double()
        if name.endswith(("attn.proj", "mlp.proj")):
            block = modules[name.rsplit(".", 2)[0]]
            w = w * (block.attn_scale if "attn" in name else block.mlp_scale).detach().double().unsqueeze(1)
        torch.testing.assert_close(w @ sums.hessians[key].double() @ w.T, moments[name], rtol=1e-4, atol=1e-3)


def test_importance_is_the_mean_squared_gradient_of_a_token(make_run: Callable) -> None:
    run = make_run(gptq_enabled=True)
    sums = calibrated(run, batches=2)
    expected = dict.fromkeys(sums.squares, 0.0)
    loader = t.TokenLoader(run.h, run.rt, run.train_shards)
    for _ in range(2):
        for x, y in loader.next_batch():
            loss = run.model(x, y)  # the loss that is trained
            for name in expected:
                (gradient,) = torch.autograd.grad(loss, run.model.get_parameter(name), retain_graph=True)
                expected[name] += gradient.square().mean().item() * y.numel()
    loader.pool.shutdown()
    for name, square in sums.squares.items():
        assert square.item() == pytest.approx(expected[name], rel=1e-4), name


def test_the_calibration_leaves_the_model_as_it_was(make_run: Callable) -> None:
    run = make_run(gptq_enabled=True, gptq_calibration_batches=2)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    kernels = [lambda *args: pytest.fail("a fused MLP shows no inputs") for _ in run.model.blocks]
    for block, kernel in zip(run.model.blocks, kernels):
        block.mlp.fused = kernel
    run.model.tok_emb.weight.grad = torch.full_like(run.model.tok_emb.weight, 1e6)  # of the last step
    learned, stats = t.calibrate(run)
    assert [block.mlp.fused for block in run.model.blocks] == kernels
    assert learned["gptq"]["tok_emb.weight"].importance < 1e6
    assert stats["calibration_seconds"] > 0 and stats["calibrated"] == {}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in run.model.named_parameters())
    assert not any(m._forward_pre_hooks for m in run.model.modules())


def test_tables_have_steps_and_no_hessian_and_the_head_has_one(make_run: Callable) -> None:
    run = make_run(gptq_enabled=True, gptq_calibration_batches=1)
    curvatures = t.measure_curvature(run)
    assert curvatures.keys() == {n for n, _ in run.model.named_parameters() if t.stored_bits(run.h, n) < 16}
    without = {n for n, c in curvatures.items() if c.factor is None}
    assert without == {"bigram.embed.weight", "ve_shared.embed.weight"}
    assert not curvatures["tok_emb.weight"].dead.any()
    assert all(c.importance > 0 for c in curvatures.values())


# ------------------------------------------------------------------------------------------------- seconds and stages
def test_the_reserve_is_what_the_preflight_predicts_unless_it_is_given(make_run: Callable) -> None:
    lines: list[str] = []
    for reserve, expected in (("auto", 100.0 - 1.2 * 9.0 - 0.5), (3.0, 97.0)):
        run = make_run(gptq_enabled=True, gptq_reserve_seconds=reserve, max_wallclock_seconds=100.0)
        assert t.training_budget(run.h) == (100.0 if reserve == "auto" else 97.0), "nothing is known before"
        run.rt.log = lines.append
        run.rt.pass_seconds = {"calibration": 0.5 / t.batch_plan(run.h, run.rt)[1], "factorization": 1.0}
        t.plan_calibration(run)
        assert t.training_budget(run.h) == pytest.approx(expected)
    assert "will take about 9.0s; 11.3s are kept for it, so steps end at 88.7s" in lines[0]
    assert lines[2].startswith("WARNING: ") and "more than GPTQ_RESERVE_SECONDS=3" in lines[2] and len(lines) == 3
    run.h.max_wallclock_seconds = 5.0
    run.rt.pass_seconds["calibration"] = 10.0
    run.h.gptq_reserve_seconds = "auto"
    with pytest.raises(t.UserError, match="leaves no time to train"):
        t.plan_calibration(run)


def test_the_preflight_learns_what_a_batch_takes_and_halves_what_does_not_fit(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(gptq_enabled=True, gptq_calibration_batches=500)
    seen, add = [], t.CurvatureSums.add

    def limited(self: t.CurvatureSums, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        seen.append(len(inputs))
        if len(inputs) > 2:
            raise RuntimeError("CUDA out of memory")
        add(self, inputs, targets)

    monkeypatch.setattr(t.CurvatureSums, "add", limited)
    learned = t._preflight_calibration(run)
    assert seen[0] > 2 and max(seen[2:]) == 2 and run.rt.max_rows["calibration"] == 2
    assert len(seen) < 12, "two micro-batches show what one takes"
    assert learned["gptq"] and run.rt.pass_seconds["calibration"] > 0
    assert run.h.gptq_calibration_batches == 500


def test_without_gptq_nothing_is_calibrated(make_run: Callable) -> None:
    run = make_run()
    assert t.calibrate(run) == ({}, {"calibration_seconds": 0.0, "calibrated": {}})
    assert t.training_budget(run.h) == run.h.max_wallclock_seconds
    assert t._preflight_calibration(run) == {}


def test_only_rank_0_solves(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(gptq_enabled=True, gptq_calibration_batches=1)
    monkeypatch.setattr(t, "factor_hessians", lambda *args: pytest.fail("only rank 0 needs the factors"))
    run.rt.rank = 1
    assert t.measure_curvature(run) == {}


# ------------------------------------------------------------------------------------------------------- real processes
GPTQ = {"GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 2, "COMPRESSOR": "rans"}


@pytest.fixture(scope="session")
def trained(once: Callable, corpus: object) -> Path:
    """The checkpoint of a small trained model."""

    def fill(folder: Path) -> None:
        environment = shell(corpus, **SMALL, RUN_ID="a", TTT_ENABLED=0)
        done = subprocess.run(
            [sys.executable, str(t.CODE)], env=environment, cwd=folder, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return once("gptq-trained", fill) / "logs/a/checkpoint.bin"


@pytest.mark.slow
def test_one_and_two_processes_write_the_same_file(run_script: Callable, trained: Path, tmp_path: Path) -> None:
    settings = {**SMALL, **GPTQ, "EXPORT_ONLY": trained, "TTT_ENABLED": 0, "SIZE_LIMIT": 220_000}
    settings["GPTQ_CALIBRATION_BATCHES"] = 16  # fp32 sums in another order changed 38 of 569,344 codes
    settings["MICRO_BATCH_TOKENS"] = 256  # so that passes have the same sequences
    artifacts = []
    for processes in (1, 2):
        done = run_script(processes, RUN_ID=f"p{processes}", **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "calibration took" in done.stdout and " of " not in done.stdout.partition("calibration took")[2][:8]
        artifacts.append((tmp_path / f"logs/p{processes}/final_model.bin").read_bytes())
    assert artifacts[0] == artifacts[1]
    assert t.read_stored(artifacts[0], "x")[0]["floor"] > 0, "the limit must bind"


@pytest.mark.slow
def test_without_shards_an_export_falls_back_aloud_to_the_clip_search(
    run_script: Callable, trained: Path, tmp_path: Path, corpus: object
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in corpus.data_path.iterdir():
        if "_val_" in path.name:
            (bare / path.name).symlink_to(path)
    settings = {**SMALL, "EXPORT_ONLY": trained, "TTT_ENABLED": 0}
    fallen = run_script(RUN_ID="fallen", **settings, **GPTQ | {"DATA_PATH": bare})
    plain = run_script(RUN_ID="plain", **settings, COMPRESSOR="rans")
    assert fallen.returncode == plain.returncode == 0, fallen.stdout + fallen.stderr
    assert re.search(r"WARNING: GPTQ_ENABLED=1 needs training shards in DATA_PATH=.*clip search", fallen.stdout)
    files = [(tmp_path / f"logs/{name}/final_model.bin").read_bytes() for name in ("fallen", "plain")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_an_audited_run_with_gptq_keeps_the_rules(run_script: Callable, tmp_path: Path) -> None:
    done = run_script(RUN_ID="a", **AUDITED, **GPTQ)
    assert done.returncode == 0, done.stdout + done.stderr
    result, compliance = (
        json.loads((tmp_path / "logs/a" / name).read_text()) for name in ("submission.json", "compliance.json")
    )
    assert compliance["passed"] is True
    opened = compliance["proofs"]["files"]["shards_opened"]
    assert any("_train_" in name for name in opened["calibrate"]) and not any("_val_" in n for n in opened["calibrate"])
    assert "export" not in opened and result["calibration_seconds"] > 0
    events = [json.loads(line) for line in (tmp_path / "logs/a/metrics.jsonl").read_text().splitlines()]
    families = {event["family"]: event for event in events if event["event"] == "stored"}
    assert families["mlp"]["weights"] > 0 and 0 < families["mlp"]["error"] < 0.2
    assert sum(event["bytes"] for event in families.values()) == pytest.approx(result["bytes_model"], abs=10)
    assert {"rans", "zstd"} <= next(event for event in events if event["event"] == "coders").keys()
