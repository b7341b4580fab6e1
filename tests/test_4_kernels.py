"""Attention and MLP kernels: the formulas, the Triton code on a CPU and for an H100, and how a run chooses.

Triton's kernels run here in Triton's interpreter, in a process of its own, from a packed script; and they are compiled
for sm_90a, which needs no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as t

FA3, FA2 = "flash_attn_interface", "flash_attn"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")


# ---- attention -------------------------------------------------------------------------------------------------------
def attend_by_loops(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns causal grouped-query attention (B, t, H, d), from the formula, the ends of queries and keys aligned."""
    (num_rows, num_queries, num_heads, width), length, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(num_rows, num_queries, num_heads):
        end = length - num_queries + i + 1  # keys that query i may see
        scores = k[b, :end, h // group] @ q[b, i, h] / math.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, :end, h // group]
    return out


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Puts FlashAttention packages in place that compute with torch's own kernel, and hides the others."""

    def install(*packages: str, returns_tuple: bool = False, error: float = 0.0, aligns_ends: bool = True) -> list:
        calls: list[tuple] = []

        def make(package: str) -> ModuleType:
            def flash_attn_func(
                q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False
            ) -> Any:
                calls.append((package, tuple(q.shape), tuple(k.shape), tuple(v.shape), causal))
                t_, length, group = q.size(1), k.size(1), q.size(2) // k.size(2)
                k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
                shift = length - t_ if aligns_ends else 0
                rows = torch.arange(t_).unsqueeze(1) + shift if causal else torch.full((t_, 1), length)
                mask = torch.arange(length) <= rows
                out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)
                out = out + error * out.detach().abs().mean()
                return (out, torch.zeros(q.shape[:3])) if returns_tuple else out

            module = ModuleType(package)
            module.flash_attn_func = flash_attn_func
            return module

        for package in (FA3, FA2):
            monkeypatch.setitem(sys.modules, package, make(package) if package in packages else None)
        return calls

    return install


@pytest.mark.parametrize("num_queries", [6, 3, 1])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("name", "returns_tuple"), [("fa3", False), ("fa3", True), ("fa2", False)])
def test_flash_attention_is_causal_grouped_query_attention(
    name: str, returns_tuple: bool, num_kv_heads: int, num_queries: int, flash: Callable
) -> None:
    calls = flash(FA3, FA2, returns_tuple=returns_tuple)
    q = torch.randn(2, num_queries, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 6, num_kv_heads, 8, dtype=torch.float64)
    out = t.ATTENTION_KERNELS[name]()(q, k, v)
    # float64, sums of 8 and 6 terms of size one: a few 1e-16; a wrong mask, scale or head differs by 1e-1.
    np.testing.assert_allclose(out.numpy(), attend_by_loops(q.numpy(), k.numpy(), v.numpy()), atol=1e-13)
    package, kv = {"fa3": FA3, "fa2": FA2}[name], (2, 6, num_kv_heads, 8)
    assert calls == [(package, (2, num_queries, 4, 8), kv, kv, True)]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("name", "num_queries"),
    [(name, number) for name in ("sdpa", "attention_definition") for number in (6, 3, 1)] + [("flash", 6)],
)
def test_torchs_attention_and_what_kernels_are_checked_against_are_the_formula(
    name: str, num_queries: int, num_kv_heads: int
) -> None:
    function = t.ATTENTION_KERNELS["flash"]() if name == "flash" else getattr(t, name)
    q = torch.randn(2, num_queries, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 6, num_kv_heads, 8, dtype=torch.float64)
    np.testing.assert_allclose(function(q, k, v), attend_by_loops(q.numpy(), k.numpy(), v.numpy()), atol=1e-13)


@pytest.mark.parametrize("num_queries", [6, 3, 1])
@pytest.mark.parametrize("reach", [1, 2, 5, 6, 7])
def test_local_attention_is_attention_to_the_last_positions_alone(num_queries: int, reach: int) -> None:
    q = torch.randn(2, num_queries, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 6, 2, 8, dtype=torch.float64)
    got = t.sdpa(q, k, v, reach)
    for i in range(num_queries):
        end = 6 - num_queries + i + 1
        own = slice(max(0, end - reach), end)
        expected = attend_by_loops(q[:, i : i + 1].numpy(), k[:, own].numpy(), v[:, own].numpy())
        np.testing.assert_allclose(got[:, i : i + 1], expected, atol=1e-13)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_torch_kernel_is_asked_for_by_its_name_and_with_what_it_supports(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash kernel knows no masks, the efficient one no groups: both would be errors on a GPU."""
    asked: list[tuple] = []

    class Context:
        def __init__(self, backend: Any):
            self.backend = backend

        def __enter__(self) -> None:
            monkeypatch.setattr(F, "scaled_dot_product_attention", self.attend)

        def __exit__(self, *_: object) -> None:
            monkeypatch.undo()

        def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, is_causal: bool, enable_gqa: bool) -> Tensor:
            asked.append((self.backend.name, attn_mask is not None, q.size(1) != k.size(1)))
            return q

    attend = t.ATTENTION_KERNELS[name]()
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    for queries in (q, q[:, -2:]):
        monkeypatch.setattr(t, "sdpa_kernel", Context)
        attend(queries, k, k)
    expected = {
        "cudnn": [("CUDNN_ATTENTION", False, True), ("EFFICIENT_ATTENTION", True, False)],
        "flash": [("FLASH_ATTENTION", False, True), ("EFFICIENT_ATTENTION", True, False)],
        "efficient": [("EFFICIENT_ATTENTION", False, False), ("EFFICIENT_ATTENTION", True, False)],
    }
    assert asked == expected[name]


# ---- the choice ------------------------------------------------------------------------------------------------------
@pytest.fixture
def machine(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """A run that believes to be on a GPU with bfloat16, with given milliseconds for each kernel in turn."""

    # On a CPU torch has a flash kernel, and it supports masks. The efficient one is an error, as anything may be.
    monkeypatch.setitem(t.ATTENTION_KERNELS, "flash", lambda: t.sdpa)

    def make(times: list[float] | None = None, **settings: str) -> SimpleNamespace:
        run = make_run(compile="0")
        for name, value in settings.items():
            setattr(run.h, name, value)  # what a Runtime without a GPU would refuse
        run.rt.dtype, run.rt.has_kernels = torch.bfloat16, True
        found = SimpleNamespace(run=run, lines=[], events=[], timed=[])
        left = list(times or [5.0, 4.0, 3.0, 2.0, 1.0])

        def milliseconds(function: Callable) -> float:
            found.timed.append(function())
            return left.pop(0)

        run.rt.milliseconds = milliseconds
        run.rt.log = found.lines.append
        run.rt.record = lambda event, **fields: found.events.append((event, fields))
        return found

    return make


def choose(run: t.Run, candidates: dict[str, Callable], setting: str = "KERNEL=auto") -> str:
    """Chooses between functions that are to compute 1.3 x."""

    def make_trial(rows: int, length: int, dtype: torch.dtype) -> t.Trial:
        x = torch.arange(1.0, 1.0 + length).repeat(rows, 1).to(dtype).requires_grad_()
        return t.Trial((x,), (x,), torch.ones(rows, length, dtype=dtype), scoring=((x,),))

    loaders = {name: (lambda function=function: function) for name, function in candidates.items()}
    loaders |= {"missing": candidates["missing"]} if "missing" in candidates else {}  # whose loading fails
    return t.fastest_kernel(run.rt, setting, loaders, plain, make_trial, (7, 4))


def plain(x: Tensor) -> Tensor:
    return x * 1.3


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 1.33


def test_the_fastest_right_kernel_is_taken_and_all_are_named(machine: Callable) -> None:
    m = machine([3.0, 1.5, 2.0])
    assert choose(m.run, {"a": plain, "b": plain, "c": plain}) == "b"
    assert m.lines == [
        "KERNEL=auto: b; forward and backward of 7 x 4 positions: a 3.000 ms, b 1.500 ms, c 2.000 ms",
    ]
    [(event, fields)] = m.events
    assert event == "kernel" and fields["setting"] == "KERNEL=auto" and fields["chosen"] == "b"
    assert fields["milliseconds"] == {"a": 3.0, "b": 1.5, "c": 2.0} and fields["refused"] == {}
    # Output, gradient, and output in scoring; the definition's own errors in bfloat16, of which twice is allowed.
    assert all(own == [limit / 2 for limit in fields["limits"]] for own in fields["errors"].values())
    assert len(fields["limits"]) == 3
    assert all(y.shape == dx.shape == (7, 4) for y, dx in m.timed)  # timed in the real shape, with gradients


def test_of_equally_fast_kernels_the_first_is_taken(machine: Callable) -> None:
    """Clocks drift by 1% from one trial to the next, and runs are to be alike."""
    assert choose(machine([2.0, 1.97, 2.5]).run, {"a": plain, "b": plain, "c": plain}) == "a"
    assert choose(machine([2.0, 1.95, 2.5]).run, {"a": plain, "b": plain, "c": plain}) == "b"


def test_a_kernel_that_is_wrong_in_scoring_or_when_compiled_is_passed_over(machine: Callable) -> None:
    """A pass without gradients is another kernel, and so may be what a compiler makes of one."""

    def wrong_in_scoring(x: Tensor) -> Tensor:
        return x * (1.3 if torch.is_grad_enabled() else 1.4)

    def wrong_compiled(x: Tensor) -> Tensor:
        return x * 1.3

    m = machine([3.0])
    m.run.rt.compile = lambda function: (lambda x: 1.4 * x) if function is wrong_compiled else function
    assert choose(m.run, {"scoring": wrong_in_scoring, "compiled": wrong_compiled, "right": plain}) == "right"
    assert all("it is wrong" in m.events[0][1]["refused"][name] for name in ("scoring", "compiled"))


def test_a_duration_is_the_least_mean_of_ten_calls_after_a_warm_up(make_run: Callable) -> None:
    rt, calls = make_run().rt, []
    clock = iter([0.0, 0.05, 1.0, 1.02, 2.0, 2.03])  # three times ten calls: 50, 20 and 30 ms
    rt.now = lambda: calls.append("now") or next(clock)
    assert rt.milliseconds(lambda: calls.append("call")) == pytest.approx(2.0)
    assert calls == ["call"] * 3 + (["now"] + ["call"] * 10 + ["now"]) * 3


def test_wrong_and_broken_kernels_are_passed_over_with_the_reason(machine: Callable) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image\nand a long explanation")

    def missing() -> Callable:
        raise OSError("libcudart.so.11: cannot open shared object file")

    m = machine([3.0])
    candidates = {
        "doubles": lambda x: 2 * x,
        "nan": lambda x: x * math.nan,
        "gradient": WrongGradient.apply,
        "broken": broken,
        "right": plain,
    }
    assert choose(m.run, candidates) == "right"
    [line] = m.lines
    assert "no kernel image)" in line and "long explanation" not in line
    refused = m.events[0][1]["refused"]
    assert refused.keys() == candidates.keys() - {"right"}
    assert all("wrong, the errors of outputs and gradients are" in refused[name] for name in ("doubles", "nan"))
    # Its output is as exact as the definition's in bfloat16, of which twice is allowed; its gradient is 1.33 for 1.3.
    assert "2.2e-03 of 4.4e-03, 2.2e-02 of 4.8e-03, 2.2e-03 of 4.4e-03 allowed" in refused["gradient"]
    with pytest.raises(t.UserError, match=r"KERNEL=x: no kernel can be used: not missing \(OSError: libcudart"):
        choose(m.run, {"missing": missing}, "KERNEL=x")


def test_a_kernel_that_cannot_be_compiled_is_passed_over(machine: Callable) -> None:
    """As FlashAttention before it registered its operators: fullgraph=True would end the run later."""

    def breaks_the_graph(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 1.3

    m = machine([3.0])
    m.run.rt.compile = lambda function: torch.compile(function, fullgraph=True, backend="eager")
    assert choose(m.run, {"breaks": breaks_the_graph, "right": plain}) == "right"
    assert m.events[0][1]["refused"].keys() == {"breaks"}


def test_a_kernel_that_fails_on_another_rank_is_used_by_none(machine: Callable) -> None:
    m = machine([1.0, 2.0])
    m.run.rt.world_size = 2
    theirs = iter([math.inf, 4.0])
    m.run.rt.all_reduce = lambda mine: mine + next(theirs)
    assert choose(m.run, {"a": plain, "b": plain}) == "b"
    assert m.events[0][1]["milliseconds"] == {"b": 3.0}  # the mean
    assert m.events[0][1]["refused"] == {"a": "it failed on another rank"}


def test_attention_is_tried_on_the_real_heads_and_set_in_every_block(machine: Callable, flash: Callable) -> None:
    calls = flash(FA3, FA2)
    m = machine([5.0, 4.0, 9.0], mlp_kernel="plain")
    t.pick_kernels(m.run)
    assert m.events[0][1]["milliseconds"] == {"fa3": 5.0, "fa2": 4.0, "flash": 9.0}
    assert m.events[0][1]["refused"].keys() == {"cudnn", "efficient"}
    assert m.lines[0].startswith("ATTN_BACKEND=auto: fa2; forward and backward of 8 x 32 positions")
    assert (FA3, (8, 32, 4, 8), (8, 32, 2, 8), (8, 32, 2, 8), True) in calls  # TINY: 256 tokens a step
    assert (FA3, (2, 8, 4, 8), (2, 32, 2, 8), (2, 32, 2, 8), True) in calls  # a tail of EVAL_STRIDE queries
    before = len(calls)
    m.run.model.compute_dtype = torch.float32
    ids = torch.randint(96, (2, 33))
    m.run.mean_loss(ids[:, :-1], ids[:, 1:])
    assert [call[0] for call in calls[before:]] == [FA2] * 3
    assert [block.mlp.fused for block in m.run.model.blocks] == [None] * 3


def test_attention_with_another_alignment_of_tails_is_wrong(machine: Callable, flash: Callable) -> None:
    flash(FA2, aligns_ends=False)  # as FlashAttention before 2.1
    m = machine(mlp_kernel="plain")
    t.pick_kernels(m.run)
    fields = m.events[0][1]
    *others, tail = [part.split()[-3:] for part in fields["refused"]["fa2"].removesuffix(" allowed").split(", ")[1:]]
    assert float(tail[0]) > 0.5 and all(float(error) <= float(limit) for error, _, limit in others)
    flash(FA2, error=0.05)
    with pytest.raises(
        t.UserError, match=r"ATTN_BACKEND=fa2: no kernel can be used: not fa2 \(ArithmeticError: it is w"
    ):
        t.pick_kernels(machine(attn_backend="fa2").run)


@pytest.mark.parametrize("wanted", ["fa3", "fa2"])
def test_a_kernel_that_is_asked_for_and_missing_is_an_error(wanted: str, machine: Callable, flash: Callable) -> None:
    flash()
    with pytest.raises(t.UserError, match=rf"ATTN_BACKEND={wanted}: no kernel can be used: not {wanted} \(ModuleNotF"):
        t.pick_kernels(machine(attn_backend=wanted).run)


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_broken_installation_is_passed_over_with_its_reason(
    error: str, machine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in (FA3, FA2):
        (tmp_path / f"{package}.py").write_text(f"raise {error}('{package}: undefined symbol _ZN3c10')")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    m = machine(mlp_kernel="plain")
    t.pick_kernels(m.run)
    for name, package in (("fa3", FA3), ("fa2", FA2)):
        assert m.events[0][1]["refused"][name] == f"{error}: {package}: undefined symbol _ZN3c10"
    assert m.events[0][1]["chosen"] == "flash"


@pytest.mark.parametrize(
    "setting", [{"attn_backend": name} for name in t.ATTENTION_KERNELS] + [{"mlp_kernel": "fused"}]
)
def test_without_a_suitable_gpu_a_kernel_is_an_error_if_asked_for(setting: dict, tiny: Callable) -> None:
    [(name, value)] = setting.items()
    knob = name.upper()
    with pytest.raises(t.UserError, match=f"{knob}={value} needs bfloat16 on an NVIDIA GPU.*set {knob}=auto"):
        t.Runtime(tiny(**setting))


def test_on_a_cpu_nothing_is_tried(make_run: Callable, flash: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash(FA3, FA2)
    monkeypatch.setattr(t, "fastest_kernel", None)
    for setting in ({}, {"attn_backend": "sdpa", "mlp_kernel": "plain"}):
        run = make_run(**setting)
        t.preflight(run)
        assert all(block.attn.attend is t.sdpa and block.mlp.fused is None for block in run.model.blocks)
    assert calls == []


def test_sdpa_on_a_gpu_is_torchs_own_choice(machine: Callable) -> None:
    m = machine(attn_backend="sdpa", mlp_kernel="plain")
    t.pick_kernels(m.run)
    assert m.events == [] and m.lines == []  # there is nothing to try
    assert all(block.attn.attend is t.sdpa for block in m.run.model.blocks)


# ---- the MLP's kernels -----------------------------------------------------------------------------------------------
# Triton 3.7 and 3.9 interpret bfloat16 wrongly: products of the bare 16 bits, and casts that cut off, not round.
INTERPRETED = """
    import json, sys
    import numpy as np, torch
    import torch.nn.functional as F
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert_any(data, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy()
        return rounded.view(np.uint16).reshape(data.shape)

    dot, convert_any = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)
    interpreter._convert_float = convert

    sys.path.insert(0, sys.argv[1])
    import train_gpt as t

    def plain(x, w_up, w_down, slope):
        return F.linear(F.leaky_relu(F.linear(x, w_up), slope).square(), w_down)

    def results(function, inputs, slope, dy):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = function(*inputs, slope)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def case(rows, length, dim, hidden, slope, tile, dtype):
        torch.manual_seed(rows)
        x, dy = torch.randn(2, rows, length, dim).to(dtype)
        weights = [torch.randn(hidden, dim) / dim**0.5, torch.randn(dim, hidden) / hidden**0.5]
        inputs = [x, *(w.to(dtype) for w in weights)]
        exact = results(plain, [x.double() for x in inputs], slope, dy.double())
        fused = t.fused_mlp(tile)
        mine = results(fused, inputs, slope, dy)
        with torch.no_grad():
            same = torch.equal(fused(*inputs, slope), mine[0])
        pre, post = t.leaky_square_up(x.flatten(0, 1), inputs[1], slope, tile, True)
        empty, post_alone = t.leaky_square_up(x.flatten(0, 1), inputs[1], slope, tile, False)
        square = F.leaky_relu(pre.float(), slope).square().to(dtype)
        return {
            "errors": t.relative_errors(mine, exact),
            "own": t.relative_errors(results(plain, inputs, slope, dy), exact),
            "types": [str(x.dtype) for x in mine],
            "equal": [same, torch.equal(square, post), torch.equal(post_alone, post), empty.numel() == 0],
            "pre": t.relative_errors([pre], [F.linear(x.double(), inputs[1].double()).flatten(0, 1)]),
        }

    def compiled():
        inputs = [torch.randn(2, 40, 16), torch.randn(24, 16), torch.randn(16, 24)]
        dy = torch.randn(2, 40, 16)
        fused = t.fused_mlp(1)
        whole = torch.compile(lambda *args: 1 + fused(*args), backend="aot_eager", fullgraph=True)
        mine, eager = (results(f, inputs, 0.5, dy) for f in (whole, lambda *args: 1 + fused(*args)))
        x, w_up, w_down = inputs[0].flatten(0, 1), *inputs[1:]
        for keep_pre in (True, False):
            torch.library.opcheck(t.leaky_square_up, (x, w_up, 0.5, 1, keep_pre))
        torch.library.opcheck(t.leaky_square_grad, (x, w_down, torch.randn(80, 24), 0.5, 1))
        return [torch.equal(a, b) for a, b in zip(mine, eager)]

    def chosen(knobs, another=None):
        h = t.Hyperparameters(**knobs)
        rt = t.Runtime(h)
        rt.dtype, rt.has_kernels, events, times = torch.bfloat16, True, [], [3.0, 2.0, 1.0, 4.0] * 2
        rt.milliseconds = lambda function: [function(), times.pop(0)][1]
        rt.record = lambda event, **fields: events.append(fields)
        run = t.Run(h, rt, t.GPT(h), None, None, [], None, b"")
        if another:
            run.model.blocks[1].mlp = another(h)
        t.pick_kernels(run)
        return [events[-1], *(block.mlp.fused is not None for block in run.model.blocks)]

    class Gelu(t.MLP):
        def forward(self, x, scale):
            if self.fused is not None:
                return self.fused(x, self.fc.matrix(x.dtype), self.proj.matrix(x.dtype, scale), self.slope)
            return self.proj(F.gelu(self.fc(x)).square(), scale)

    class Gain(t.MLP):
        "A parameter that is no matrix, for which the kernel has no place."
        def __init__(self, h):
            super().__init__(h)
            self.gain = torch.nn.Parameter(torch.full((1,), 1.5))

        def forward(self, x, scale):
            return super().forward(x, scale) * self.gain.to(x.dtype)

    class NoScale(t.MLP):
        def forward(self, x, scale):
            return super().forward(x, scale if self.fused is None else torch.ones_like(scale))

    class WrongGradient(t.MLP):
        "Its fused kernel takes no notice of one matrix in the backward pass."
        def forward(self, x, scale):
            if self.fused is None:
                return super().forward(x, scale)
            w_down = self.proj.matrix(x.dtype, scale)
            w_down = w_down.detach() + 0 * w_down
            return self.fused(x, self.fc.matrix(x.dtype), w_down, self.slope)

    found = {name: case(*shape, getattr(torch, dtype)) for name, (*shape, dtype) in json.loads(sys.argv[2]).items()}
    knobs = json.loads(sys.argv[3])
    found |= {"packed": t.unpack(open(t.__file__, "rb").read()) is not None, "compiled": compiled()}
    found |= {"chosen": chosen(knobs), "one of another kind": chosen(knobs, t.MLP)}
    found |= {kind.__name__: chosen(knobs, kind) for kind in (Gelu, Gain, NoScale, WrongGradient)}
    print(json.dumps(found))
"""


CASES = {
    # rows, length, D, hidden, slope, tile, type; hidden and D are multiples of 8, nothing else divides
    "tiny": (1, 6, 16, 24, 0.5, 0, "float32"),
    "odd": (3, 47, 48, 200, 0.0, 1, "float32"),
    "linear": (2, 75, 40, 136, 1.0, 2, "float32"),
    "odd bfloat16": (3, 47, 48, 200, 0.75, 0, "bfloat16"),
    "full width": (1, 130, 512, 1536, 0.5, 0, "bfloat16"),
    "full width, small tiles": (1, 130, 512, 1536, 0.5, 1, "bfloat16"),
    "full width, shallow tiles": (1, 130, 512, 1536, 0.5, 2, "bfloat16"),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script above found."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "train_gpt.py").write_bytes(t.pack(t.CODE.read_bytes()))
    knobs = {"device": "cpu", "num_layers": 2, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "ve_layers": "1"}
    knobs |= {"train_seq_len": 64, "train_batch_tokens": 256, "attn_backend": "sdpa"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED), str(folder), json.dumps(CASES), json.dumps(knobs)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_the_kernels_run_from_a_packed_script(interpreted: dict) -> None:
    assert interpreted["packed"]


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_fused_mlp_is_the_plain_one(name: str, interpreted: dict) -> None:
    found, dtype = interpreted[name], CASES[name][-1]
    assert found["types"] == [f"torch.{dtype}"] * 4
    # Rounded where the plain lines round: the product, the square, the derivative. Sums are in other orders.
    for error, own in zip(found["errors"], found["own"]):
        assert error < 1.2 * own + 1e-7, found
    assert found["pre"][0] < (2**-8 if dtype == "bfloat16" else 1e-6)
    # post is the square of the stored pre to the last bit, with and without autograd; which alone needs pre.
    assert found["equal"] == [True] * 4


@needs_triton
def test_the_operators_are_registered_as_torch_wants_them_and_break_no_graph(interpreted: dict) -> None:
    assert interpreted["compiled"] == [True] * 4  # fullgraph=True, and torch.library.opcheck had no complaint


@needs_triton
def test_the_fused_mlp_is_qualified_timed_and_set(interpreted: dict) -> None:
    event, *fused = interpreted["chosen"]
    assert fused == [True, True] and event["chosen"] == "fused128"
    times = {"plain": 3.0, "fused256": 2.0, "fused128": 1.0, "fused128shallow": 4.0}
    assert event["milliseconds"] == times and event["refused"] == {}
    assert interpreted["one of another kind"][1:] == [True, True]


@needs_triton
@pytest.mark.parametrize("kind", ["Gelu", "NoScale", "WrongGradient"])
def test_an_mlp_of_which_the_fused_kernel_is_not_the_function_keeps_its_plain_lines(
    kind: str, interpreted: dict
) -> None:
    """Whoever tries an idea in MLP.forward gets that idea on a GPU too, and not the kernel of the old function. The
    model's other blocks keep the kernel."""
    event, *fused = interpreted[kind]
    assert fused == [True, False] and event["chosen"] == "plain"
    assert event["refused"].keys() == t.MLP_KERNELS.keys() - {"plain"}
    reason = "not have been used in the graph" if kind == "NoScale" else "it is wrong"  # a gradient that is not there
    assert all(reason in text for text in event["refused"].values())


@needs_triton
def test_an_mlp_with_a_parameter_of_another_shape_is_tried_like_any_other(interpreted: dict) -> None:
    event, *fused = interpreted["Gain"]
    assert fused == [True, True] and len(event["limits"]) == 7  # y, x, scale, two matrices, the gain, y in scoring


KERNELS = {
    "up": (t.leaky_square_kernel, {"keep_pre": True}),
    "up of scoring": (t.leaky_square_kernel, {"keep_pre": False}),
    "gradient": (t.leaky_square_grad_kernel, {}),
}


@needs_triton
@pytest.mark.parametrize(("tile", "capability"), [(0, 90), (1, 90), (2, 80)])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_uses_the_matrix_units_and_no_stack(name: str, tile: int, capability: int, tmp_path: Path) -> None:
    """Compiled for sm_90a (H100), and the shallow tile for sm_80 (A100). Spilled registers would go to the stack, which
    is memory."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, switches = KERNELS[name]
    kernel = t.triton_kernel(function)
    rows, (cols, depth, num_warps) = t.TILE_ROWS, t.TILES[tile]
    constants = {"rows": rows, "cols": cols, "step": depth, **switches}
    blocks = {"x": (rows, depth), "dy": (rows, depth), "pre": (rows, cols), "post": (rows, cols), "dpre": (rows, cols)}
    blocks["w"] = (depth, cols) if name == "gradient" else (cols, depth)
    signature = {}
    for argument in kernel.arg_names:
        if argument in blocks:
            signature[argument] = "tensordesc<bf16[{},{}]>".format(*blocks[argument])
        else:
            signature[argument] = {"slope": "fp32", "depth": "i32"}.get(argument, "constexpr")
    constexprs = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    options = {"num_warps": num_warps, "num_stages": 3}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs), GPUTarget("cuda", capability, 32), options)
    ptx = compiled.asm["ptx"]
    wanted = ("wgmma.mma_async", "cp.async.bulk.tensor") if capability == 90 else ("mma.sync",)
    assert all(instruction in ptx for instruction in wanted) and "st.local" not in ptx
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], text=True, capture_output=True, check=True).stdout
    numbers = dict(field.split(":") for field in usage.split() if field.count(":") == 1 and field[-1].isdigit())
    assert numbers["STACK"] == numbers["LOCAL"] == "0"
    if capability == 90:
        assert int(numbers["REG"]) <= 200  # 162 to 187 by Triton 3.6 to 3.9; 255 is where spilling begins
        blocks_at_once = 2 if tile == 1 else 1  # of the 228 KiB of a multiprocessor, each with 1 KiB for the system
        assert (compiled.metadata.shared + 1024) * blocks_at_once <= 228 * 1024
