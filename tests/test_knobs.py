"""Every knob, turned: it changes what it should, and nothing else.

The script is cut into stages, from the initial weights to the final line. Each gets the settings and FIXED inputs: the
same weights, gradients, text and learning rates, not what another stage has made of the settings. So nothing reaches a
stage but the knobs that it reads. What a stage does is compared bit by bit between two values of each knob; `TURNS`
says, for each, where there must be a difference. Everywhere else there must be none. A new knob should get a row; until
it has one, there is a warning."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from shards import shard_header
from test_3_data import train_tokenizer

import train_gpt as t

DEFAULTS = {name: knob.default for name, knob in t.Hyperparameters.knobs().items()}
# Settings under which as many knobs as possible have something to act on.
BASE = {
    **TINY,
    "device": "auto", "data_path": "shards", "tokenizer_path": "a.model", "vocab_size": 40, "model_dim": 16,
    "rope_train_len": 8, "xsa_last_n": 2, "proj_bits": 8,
    "quant_floor": 0.05, "swa_enabled": True, "swa_every": 2, "iterations": 24,
}  # fmt: skip
FITTED = {"quant_floor": "auto"}  # the floor is found by size
STORED = {  # the parameters that have a knob for their bits; all others are the "rest"
    "attn": r"blocks\.\d+\.attn\.(c_q|c_k|c_v|proj)\.weight",
    "mlp": r"blocks\.\d+\.mlp\.(fc|proj)\.weight",
    "proj": r"(bigram|ve_shared)\.proj\.weight",
    "embed": r"(tok_emb|ve_shared\.embed)\.weight",
    "hash": r"bigram\.embed\.weight",
}


def each(stage: str, *groups: str) -> str:
    return " ".join(f"{stage}:{group}" for group in groups)


CODE = t.CODE.read_bytes()
CODES = each("codes", *STORED)
MATRICES, TABLES, REST = each("update", "attn", "mlp", "proj"), each("update", "embed", "hash"), "update:rest"
TTT = each("ttt", *STORED, "rest") + " final"
WINDOWS = f"text plain sliding {TTT} score_batches ttt_batches preflight banner"  # all that is cut into windows
SHAPES = "initial function file"  # another model: other weights and logits, and the artifact's header says so

# Knob: a value, another one, the stages that differ between them (see the functions below), and settings that it needs.
TURNS: dict[str, tuple] = {
    "data_path": ("shards", "other_shards", "text"),
    "tokenizer_path": ("a.model", "b.model", "text"),
    "run_id": ("", "mine", "main"),
    "seed": (1337, 1, "initial batches preflight report"),
    "device": ("auto", "cpu", "machine"),
    "compile": ("auto", "0", "machine"),
    "cuda_graphs": (True, False, "machine"),
    "dtype": ("auto", "float32", "machine"),
    "attn_backend": ("auto", "sdpa", "kernels"),
    "mlp_kernel": ("auto", "plain", "kernels"),
    "max_val_tokens": (0, 64, "text"),
    "eval_only": ("", "old.bin", "main text preflight banner"),
    "export_only": ("", "old.bin", "main text preflight banner"),
    "resume": ("", "stopped", "main"),
    "checkpoint_every": (120.0, 5.0, "loop"),
    "fallback_dir": ("", "elsewhere", "machine"),
    "audit": (False, True, "main"),
    "tensorboard": (False, True, "machine"),
    "estimate": (False, True, "main"),
    "smoke": (False, True, "main"),
    "iterations": (24, 20, "schedule loop banner"),
    "max_wallclock_seconds": (600.0, 12.0, "schedule loop banner kept"),
    "warmdown_frac": (0.5, 0.25, "schedule banner"),
    "warmdown_iters": (0, 10, "schedule banner"),
    "warmup_steps": (20, 3, "preflight"),
    "train_batch_tokens": (256, 512, "batches loop preflight banner"),
    "micro_batch_tokens": ("auto", 32, "batches preflight ttt_batches report", {"ttt_grad_clip": 0.0}),
    "loader": ("shuffled", "sequential", "batches"),
    "train_seq_len": (32, 64, f"batches {WINDOWS} function file report"),
    "train_log_every": (500, 15, "loop"),
    "val_loss_every": (4000, 10, "loop"),
    "vocab_size": (40, 41, f"{SHAPES} text preflight"),  # `text` refuses it: the tokenizer has 40 pieces
    "num_layers": (3, 4, SHAPES),
    "model_dim": (16, 24, SHAPES),
    "num_heads": (4, 2, SHAPES),
    "num_kv_heads": (2, 1, SHAPES),
    "mlp_mult": (3.0, 2.0, SHAPES),
    "leaky_slope": (0.75, 0.5, "function file"),
    "logit_softcap": (30.0, 5.0, "function file"),
    "rope_base": (10_000.0, 500.0, "function file"),
    "rope_dims": (4, 2, "function file"),
    "rope_train_len": (8, 16, "function file"),
    "xsa_last_n": (2, 1, "function file"),
    "ln_scale": (True, False, "function file"),
    "bigram_vocab_size": (64, 65, SHAPES),
    "bigram_dim": (16, 8, SHAPES),
    "trigram_shared": (False, True, "function file"),
    "ve_enabled": (True, False, SHAPES),
    "ve_dim": (16, 8, SHAPES),
    "ve_layers": ("-2,-1", "0,1", "function file"),
    "value_residual": (False, True, SHAPES),
    "gated_attention": (False, True, SHAPES),
    "attn_gate_dims": (0, 4, SHAPES),
    "parallel_last_n": (0, 1, "function file"),
    "gated_skips": (False, True, SHAPES),
    "recur_layers": ("", "1", "function file"),
    "recur_start_frac": (0.48, 0.2, "loop"),
    "qk_gain_init": (1.5, 1.0, "initial"),
    "tied_embed_init_std": (0.005, 0.01, "initial"),
    "matrix_lr": (0.027, 0.02, f"{MATRICES} banner"),
    "scalar_lr": (0.025, 0.02, f"{REST} banner"),
    "tied_embed_lr": (0.035, 0.02, f"{TABLES} banner"),
    "muon_momentum": (0.99, 0.95, "schedule"),
    "muon_momentum_warmup_start": (0.92, 0.85, "schedule"),
    "muon_momentum_warmup_steps": (1500, 10, "schedule"),
    "muon_backend_steps": (5, 4, MATRICES),
    "muon_row_norm": (False, True, MATRICES),
    "muon_wd": (0.04, 0.1, MATRICES),
    "adam_wd": (0.04, 0.1, TABLES),  # gains, scales and gates have none
    "beta1": (0.9, 0.8, f"{TABLES} {REST}"),
    "beta2": (0.95, 0.9, f"{TABLES} {REST}"),
    "adam_eps": (1e-8, 1e-3, f"{TABLES} {REST}"),
    "grad_clip_norm": (0.3, 0.0, f"{MATRICES} {TABLES} {REST}"),
    "ema_enabled": (True, False, "averages"),
    "ema_decay": (0.997, 0.9, "averages"),
    "swa_enabled": (True, False, "averages"),
    "swa_every": (2, 3, "averages"),
    "swa_start_frac": (0.4, 0.7, "averages"),
    "mlp_bits": (6, 5, "codes:mlp size banner"),
    "attn_bits": (6, 5, "codes:attn size banner"),
    "embed_bits": (8, 6, "codes:embed size banner"),
    "bigram_bits": (8, 6, "codes:hash size banner"),
    "proj_bits": (8, 16, "codes:proj size banner"),
    "fp16_keep_name_patterns": ("", "attn.c_k", "codes:attn size banner"),
    "quant_floor": (0.05, 0.5, f"{CODES} size"),
    "prune_frac": (0.0, 0.3, f"{CODES} size"),
    "gptq_enabled": (False, True, "learned kept size banner"),
    "gptq_calibration_batches": (2, 3, "learned kept banner", {"gptq_enabled": True}),
    "gptq_reserve_seconds": ("auto", 5.0, "kept banner", {"gptq_enabled": True}),
    "compressor": ("zstd", "lzma", "file"),
    "size_of_code": ("packed", "raw", "code"),
    "size_limit": (len(CODE) + 5000, len(CODE) + 4000, f"{CODES} size", FITTED),
    "eval_seq_len": (0, 64, f"{WINDOWS} report"),
    "eval_attn_window": (0, 32, f"text {TTT} ttt_batches preflight report", {"eval_seq_len": 64}),
    "eval_stride": (8, 16, "sliding final score_batches preflight banner"),
    "eval_batch_seqs": (4, 8, "score_batches preflight report"),
    "eval_ladder": (False, True, "passes"),
    "eval_budget_seconds": (600.0, 1.0, "plan"),
    "ttt_enabled": (True, False, f"{TTT} ttt_batches passes preflight banner report"),
    "ttt_mode": ("score_first", "pre", f"{TTT} ttt_batches preflight banner report", {"ttt_chunk_tokens": 32}),
    "ttt_optimizer": ("sgd", "adamw", f"{TTT} banner"),
    "ttt_lr": (0.03, 0.01, f"{TTT} banner"),
    "ttt_epochs": (3, 2, f"{TTT} ttt_batches banner"),
    "ttt_chunk_tokens": (64, 32, f"{TTT} ttt_batches preflight"),
    "ttt_momentum": (0.9, 0.5, TTT),
    "ttt_batch_seqs": (2, 1, f"{TTT} ttt_batches preflight"),
    "ttt_cosine": (True, False, TTT),
    "ttt_grad_clip": (1.0, 0.0, TTT),
    "ttt_freeze_blocks": (0, 1, "ttt:attn ttt:mlp ttt:rest final", {"ttt_grad_clip": 0.0}),
    "ttt_lr_groups": ("", "mlp.fc:2", "ttt:mlp final"),
}
FIXED = {
    "tie_embeddings": (False, "TIE_EMBEDDINGS=0 is not supported")
}  # knobs with one value, and how another is refused


# --------------------------------------------------------------------------------------------------- fixed inputs
@functools.cache
def fixed_tensor(name: str, shape: tuple, std: float = 0.3) -> torch.Tensor:
    """Returns numbers that depend on the name and the shape only."""
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def with_fixed_weights(model: torch.nn.Module) -> torch.nn.Module:
    weights = {name: fixed_tensor(name, w.shape) + (w.dim() < 2) for name, w in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model


@functools.cache
def full_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    settings = {**BASE, "num_layers": 2, "ve_layers": "1", "value_residual": True, "gated_attention": True}
    settings["recur_layers"] = "1"
    model = with_fixed_weights(t.GPT(t.Hyperparameters(**settings)))
    return model, weights_of(model)


def fixed_model() -> torch.nn.Module:
    """The model with parameters of every kind, as at first: no stage but `initial` and `function` builds another."""
    model, weights = full_model()
    model.load_state_dict(weights)
    model.zero_grad()
    return model


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


IDS = np.random.default_rng(0).integers(1, 40, 700)  # 1 is BOS: documents begin
SHARDS = [IDS[:300].astype(np.uint16), IDS[300:].astype(np.uint16)]
VAL = t.Validation(torch.from_numpy(IDS[:193].astype(np.int32)), torch.full((192,), 2, dtype=torch.int16), 384, "fixed")
SCORE = t.Score(val_loss=2.0, val_bpb=1.2, num_targets=200, num_bytes=151_060_000, seconds=1.0)


def exact_nll(model: torch.nn.Module, calls: list) -> Callable:
    """Returns a stand-in for token_nll, which notes its calls. A nll depends on its target, on all tokens of its window
    and their places, and linearly on all weights. Its gradient, whose direction depends on the tokens, is a fraction of
    4 x 8 x targets, 2^11 here, so sums of it are exact: how sequences are cut into passes cannot be seen in them."""
    parameters = list(model.parameters())
    factors = torch.tensor([[(1 + i % n) / 4 for i in range(len(parameters))] for n in (3, 4)])

    def token_nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append((torch.is_grad_enabled(), x.shape, y.shape))
        context = (x * torch.arange(1, x.size(1) + 1)).cumsum(1)[:, -y.size(1) :]
        first, second = factors @ torch.stack([p.sum() for p in parameters])
        return torch.where(y < 0, 0.0, context + first * ((context + y) % 7) / 8 + second * (1 + y % 8) / 8)

    return token_nll


def make_run(h: t.Hyperparameters, calls: list | None = None, mean_loss: Callable | None = None) -> t.Run:
    """Returns a run of the fixed model on fixed data, on a machine that keeps what it is told in lists."""
    rt, model = t.Runtime(h), fixed_model()
    rt.run_dir, rt.lines, rt.events = Path(), [], []
    rt.log, rt.record = rt.lines.append, lambda event, **fields: rt.events.append((event, fields))
    return t.Run(h, rt, model, mean_loss, exact_nll(model, [] if calls is None else calls), SHARDS, VAL, CODE)


def by_group(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns values by name of a parameter as one fingerprint for each group of parameters."""
    groups: dict[str, Any] = {f"{stage}:{group}": {} for group in (*STORED, "rest")}
    for name, value in values.items():
        group = next((group for group, pattern in STORED.items() if re.fullmatch(pattern, name)), "rest")
        groups[f"{stage}:{group}"][name] = value
    return groups


# --------------------------------------------------------------------------------------------------------- stages
def stage_machine(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """machine: what is chosen where there are a GPU and all kernels."""
    for name, answer in (("is_available", True), ("device_count", 1), ("get_device_capability", (9, 0))):
        patch.setattr(torch.cuda, name, lambda answer=answer: answer)
    patch.setattr(torch.cuda, "set_device", lambda _: None)
    patch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    patch.setattr(torch, "compile", lambda function, **options: "compiled")
    rt = t.Runtime(h)
    compiles = rt.compile(len) is not len
    return {"machine": (rt.device, rt.dtype, compiles, rt.lag, rt.records_graphs, rt.fallback_dir, rt.board is None)}


def stage_kernels(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """kernels: those that are tried where there are all."""
    tried = []
    patch.setattr(t, "fastest_kernel", lambda rt, setting, candidates, *_: tried.append(list(candidates)) or "flash")
    patch.setitem(t.MLP_KERNELS, "flash", lambda: None)
    run = make_run(h)
    run.rt.dtype, run.rt.has_kernels = torch.bfloat16, True
    t.pick_kernels(run)
    return {"kernels": tried}


def stage_main(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """main: the order of its calls, the files it reads, and its folder."""
    calls, runs = [], []

    def fake(name: str, result: Callable) -> None:
        patch.setattr(t, name, lambda *args: (calls.append(name), result(*args))[1])

    run = t.Run(h, None, None, None, None, SHARDS, VAL, b"")
    fake("build_run", lambda h, rt, decoded: (runs.append(rt), run._replace(h=h, rt=rt))[1])
    fake("load_artifact", lambda path: (calls.append(Path(path).name), (h, None))[1])
    fake("evaluate", lambda run, averaged_bpb: (calls.append(run.train_shards), (SCORE, 1.0))[1])
    fake("reload", lambda run, path: (calls.append(path.name), {})[1])
    fake("calibrate", lambda run: ({}, {}))
    for name in ("write_code", "banner", "preflight", "plan_evaluation", "train", "report", "estimate", "smoke"):
        fake(name, lambda *args: {})
    fake("export", lambda run: {"artifact": "final_model.bin"})
    patch.setattr(t, "bytes_to_write", lambda run: (0, 0))
    patch.setitem(sys.modules, "audit", SimpleNamespace(Auditor=lambda script: calls.append(("audit", script))))
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(t, "Hyperparameters", lambda: h)
    patch.setattr(t, "time", SimpleNamespace(time=lambda: 1e9, perf_counter=lambda: 0.0))
    for folder in ("logs", "stopped"):
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
    Path("stopped/train.log").touch()
    t.main()
    for file in [file for rt in runs for file in rt.files]:
        file.close()
    return {"main": (calls, os.listdir("logs"))}


def stage_text(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """text: the scored tokens and their bytes, and the training shards, of files. code: the script as it is shipped."""
    model = fixed_model()
    patch.setattr(t, "pack", lambda source: b"packed")
    patch.setattr(t, "GPT", lambda h: model)
    try:
        run = t.build_run(h, t.Runtime(h))
    except t.UserError as error:
        return {"text": str(error), "code": t.shipped_code(h)}
    return {"text": (run.val, [shard[:] for shard in run.train_shards]), "code": run.code}


def stage_batches(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """batches: three steps' training tokens, as they are cut."""
    loader = t.TokenLoader(h, t.Runtime(h), SHARDS)
    batches = [loader.next_batch() for _ in range(3)]
    loader.pool.shutdown()
    return {"batches": batches}


def stage_model(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """initial: weights that a run begins with. function: logits of given weights."""
    _ = t.Runtime(h)  # seeds the generator
    model = t.GPT(h)
    initial = weights_of(model)
    with torch.no_grad():
        logits = with_fixed_weights(model).forward_logits(torch.from_numpy(IDS[:60]).view(2, 30))
    return {"initial": initial, "function": logits}


def stage_train(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """schedule: learning-rate scale and momentum of each step. loop: when it logs, validates and stops, if each step
    takes a second."""
    clock, schedule = [0.0], []

    def step(lr_scale: float, momentum: float) -> torch.Tensor:
        clock[0] += 1.0
        schedule.append((lr_scale, momentum))
        return torch.ones(())

    patch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: clock[0], time=time.time))
    patch.setattr(t, "Optimizer", lambda h, rt, model: SimpleNamespace(step=step, norms=torch.ones(0)))
    patch.setattr(t.Trainer, "update_averages", lambda *args: None)
    patch.setattr(t, "eval_val", lambda run: SCORE)
    patch.setattr(t.Trainer, "state", lambda self: ({}, []))
    patch.setattr(t.Checkpoints, "restore", lambda self: None)

    def save(self: t.Checkpoints) -> None:
        self.saved = self.trainer.elapsed
        self.rt.record("checkpoint")

    patch.setattr(t.Checkpoints, "save", save)
    run = make_run(h, mean_loss=lambda x, y: 0 * sum(p.sum() for p in run.model.parameters()))
    figures = t.train(run)
    events = [(event, {k: v for k, v in fields.items() if k != "lr_scale"}) for event, fields in run.rt.events]
    return {"schedule": schedule[:20], "loop": (figures, events)}


def stage_update(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """update: two optimizer steps with given gradients, the second's half the first's."""
    run = make_run(h)
    optimizer = t.Optimizer(h, run.rt, run.model)
    for number in (1, 2):
        for name, p in run.model.named_parameters():
            p.grad = fixed_tensor(f"gradient {number} {name}", p.shape) / number
        optimizer.step(0.7, 0.9)
    return by_group("update", weights_of(run.model))


def stage_averages(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """averages: what is exported after given weights, late enough for the EMA's decay to be its limit."""
    run = make_run(h)
    trainer = t.Trainer(run)
    for step in range(5000, 5016):
        torch._foreach_mul_([p.data for p in run.model.parameters()], 0.9)
        trainer.update_averages(step, (5016 - step) / 16)
    return {"averages": (trainer.apply_average(), weights_of(run.model))}


def stage_calibrate(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """learned: what GPTQ learns from training tokens. kept: the seconds of training that are left, if a batch of that
    takes one."""
    run = make_run(h)
    curvatures = t.calibrate(run)[0].get("gptq", {})
    run.rt.pass_seconds = {"calibration": 1.0, "factorization": 1.0}
    t.plan_calibration(run)
    learned = [(name, c.importance, c.factor) for name, c in curvatures.items()]
    return {"learned": learned, "kept": t.training_budget(h)}


def stage_export(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """codes: what is stored of given weights. size: the choice of the floor, and the limit. file: a file of given
    tensors."""
    encode, stored, codecs = t.encode, {}, set()

    def count_bytes(h: t.Hyperparameters, tensors: Iterator[tuple], floor: float, codec: str) -> bytes:
        tensors = list(tensors)
        if codec == "none":  # the checkpoint
            return b""
        blob = zlib.compress(b"".join(values.numpy().tobytes() for _, _, values, _ in tensors))
        stored[blob] = {name: entry for name, *entry in tensors}
        codecs.add(codec)
        return blob

    patch.setattr(t, "encode", count_bytes)
    patch.setattr(t, "log_stored", lambda *args: None)
    run = make_run(h)
    figures = t.export(run)
    del figures["export_seconds"]
    fixed = [("a", 6, torch.arange(-20, 20).to(torch.int8).view(4, 10), torch.ones(4, 1).half())]
    codes = by_group("codes", stored[Path("final_model.bin").read_bytes()])
    return {**codes, "size": (figures, run.rt.lines), "file": [encode(h, fixed, 0.5, codec) for codec in codecs]}


def stage_scoring(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """plain, sliding: the nll of each target in windows that do not overlap, and that do. passes: what the evaluation
    scores, by name. ttt: the weights that it adapts. final: the final nll. …_batches: the shapes of the calls."""
    calls, scores, result = [], [], t.Scorer.result
    patch.setattr(t.Scorer, "result", lambda self: (scores.append(self.nll[:-1]), result(self))[1])
    run = make_run(h, calls)
    for evaluate in (t.eval_val, t.eval_val_sliding):
        evaluate(run)
    score_batches = calls.copy()
    t.evaluate(run)
    passes = (len(scores), [fields["stage"] for _, fields in run.rt.events])
    found = {"plain": scores[0], "sliding": scores[1], "final": scores[-1], "passes": passes}
    batches = {"score_batches": score_batches, "ttt_batches": [call for call in calls if call[0]]}
    return {**found, **batches, **by_group("ttt", weights_of(run.model))}


def stage_preflight(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """preflight: the tokens of its training steps, and the shapes in which it scores and adapts."""
    calls, steps = [], []
    step = lambda *args: steps.append(args)  # noqa: E731
    trainer = lambda run: SimpleNamespace(run=run, step=step, backward=lambda _: None, apply_average=lambda: None)  # noqa: E731
    patch.setattr(t, "Trainer", trainer)
    patch.setattr(t, "encode", lambda *args: b"")
    patch.setattr(t, "decode", lambda *args: None)
    run = make_run(h, calls)
    run.rt.compiled = True  # elsewhere two steps are enough
    t.preflight(run)
    return {"preflight": (steps, calls)}


def stage_plan(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """plan: whether the final score is said to take too long."""
    run = make_run(h)
    run.rt.pass_seconds = {"scoring": 1.0, "adaptation": 0.1}
    t.plan_evaluation(run)
    return {"plan": [line for line in run.rt.lines if "WARNING" in line][:1] != []}


def stage_report(h: t.Hyperparameters, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """banner: the log's first lines, but that of the settings. report: its last ones, and submission.json."""
    run = make_run(h)
    t.banner(run)
    banner = [line for line in run.rt.lines if not line.startswith("settings")]
    times = {name: 2.0 for name in ("train_seconds", "eval_seconds", "load_seconds", "preflight_seconds")}
    t.report(run, SCORE, {"bytes_model": 1000, **times})
    record = json.loads(Path("submission.json").read_text())
    return {"settings": record.pop("settings"), "banner": banner, "report": (run.rt.lines[-2:], record)}


STAGES = [function for name, function in list(globals().items()) if name.startswith("stage_")]


# ---------------------------------------------------------------------------------------------------------- tests
def bits(value: Any) -> Any:
    """Returns a value in which tensors are bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return [(key, bits(part)) for key, part in value.items()]
    return [bits(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)


@functools.cache
def fingerprints(settings: frozenset) -> dict[str, Any]:
    """Returns what every stage does under the settings, on a machine with one core and no GPU."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", {})
            patch.setattr(t, "available_cores", lambda: 1)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.backends.mps, "is_available", lambda: False)
            patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)  # the others keep tracebacks
            made = stage(t.Hyperparameters(**dict(settings)), patch)
            found |= {name: bits(value) for name, value in made.items()}
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tokenizers of 40 pieces, two sets of shards, and something to load."""
    folder = tmp_path_factory.mktemp("knobs")
    for name, text in (("a", "the cat sat on the mat and the dog ran"), ("b", "lazy dogs jump while a quick fox hums")):
        (folder / f"{name}.model").write_bytes(train_tokenizer([text] * 3, vocab_size=40))
    for name, ids in (("shards", IDS), ("other_shards", IDS[::-1])):
        (folder / name).mkdir()
        for split in ("train", "val"):
            (folder / name / f"x_{split}_0.bin").write_bytes(shard_header(len(ids)) + ids.astype("<u2").tobytes())
    (folder / "old.bin").write_bytes(b"artifact")
    return folder


@pytest.fixture(autouse=True)
def inside(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


def turned(knob: str) -> list[dict[str, Any]]:
    """Returns the fingerprints under the knob's two values."""
    first, second, _, *needed = TURNS[knob]
    settings = {**DEFAULTS, **BASE, **(needed[0] if needed else {})}
    return [fingerprints(frozenset({**settings, knob: value}.items())) for value in (first, second)]


@pytest.mark.parametrize("knob", TURNS)
def test_turning_a_knob_changes_what_it_should_and_nothing_else(knob: str) -> None:
    before, after = turned(knob)
    assert before.keys() == after.keys()
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert changed == {*TURNS[knob][2].split(), "settings"}
    recorded = set(before["settings"]) ^ set(after["settings"])
    assert {name for name, _ in recorded} == {knob}


@pytest.mark.parametrize("knob", FIXED)
def test_a_knob_with_one_value_refuses_any_other(knob: str) -> None:
    value, message = FIXED[knob]
    with pytest.raises(t.UserError, match=message):
        t.Hyperparameters(**{**BASE, knob: value})


def test_every_stage_is_reached_by_a_knob_of_the_table() -> None:
    """And every row is of a setting. A setting without a row is no failure, so that one can be tried with no more than
    its declaration; it is told, because nothing shows yet that it does what it should and nothing else."""
    assert {*TURNS, *FIXED} <= t.Hyperparameters.knobs().keys()
    missing = t.Hyperparameters.knobs().keys() - {*TURNS, *FIXED}
    if missing:
        warnings.warn(f"settings without a row in TURNS: {', '.join(sorted(missing))}", stacklevel=1)
    reached = {stage for _, _, stages, *_ in TURNS.values() for stage in stages.split()}
    # Gains, scales and gates are fp16 whatever is set.
    assert reached == turned("seed")[0].keys() - {"settings", "codes:rest"}


def test_the_same_settings_twice_do_the_same() -> None:
    """Otherwise a difference would prove nothing."""
    settings = frozenset({**DEFAULTS, **BASE}.items())
    assert fingerprints(settings) == fingerprints.__wrapped__(settings)
