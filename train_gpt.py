"""Train, average, quantize, export, score and adapt a 16 MB language model: a whole Parameter Golf entry in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                   # the real thing: 600 s on 8 H100s
    python train_gpt.py                                                     # one GPU, an Apple GPU or a CPU
    RESUME=1 RUN_ID=<run> python train_gpt.py                               # go on with a run that was stopped
    EVAL_ONLY=logs/<run>/final_model.bin TTT_EPOCHS=50 python train_gpt.py  # score a finished model again
    ESTIMATE=1 python train_gpt.py                                          # say what a run will take, and end

Every setting is an environment variable, declared in `Hyperparameters`. The file follows a token:

    1 hyper-parameters  one line per setting         7 training    averages, checkpoints, loop, preflight
    2 runtime           device, ranks, clock, log    8 artifact    weights -> codes and scales -> a 16 MB file
    3 data              shards -> (x, y)             9 scoring     sliding windows -> bits per byte
    4 model             tokens -> loss              10 adaptation  score-first test-time training (TTT)
    5 parameter groups  how each tensor is treated  11 report      final line, submission.json, journal.json
    6 optimizer         reduce, clip, Muon, AdamW   12 main        the stages of a run, in order

Shapes: B sequences, T positions, t last positions that are scored, D model width, H query heads, K key/value heads,
d head width, G = H / K, V vocabulary, W windows, N targets. Target i is tokens[i + 1]. Ranges are half-open.
A `loss` is a mean in nats per token, `bpb` is bits per byte of text. Attention crosses document boundaries.
"""

from __future__ import annotations

import sys
from pathlib import Path

CODE = Path(__file__).resolve()  # this script
# What runs, whatever happens to the file later: an editor may save it, or git switch to another branch, while it does.
# Read before `import torch`, which takes seconds.
SCRIPT = CODE.read_bytes()

import base64
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import linecache
import lzma
import math
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Where Triton and tracebacks look for a source; an entry without a time is never read again. That of a packed script,
# whose source has another name, is there.
SOURCE_NAME = sys._getframe().f_code.co_filename
if Path(SOURCE_NAME).resolve() == CODE:
    linecache.cache[SOURCE_NAME] = len(SCRIPT), None, SCRIPT.decode().splitlines(True), SOURCE_NAME
# The challenge's limits.
SIZE_LIMIT_BYTES = 16_000_000
TRAIN_LIMIT_SECONDS = 600.0
EVAL_LIMIT_SECONDS = 600.0


class UserError(ValueError):
    """A mistake that the user can correct. The message names the setting or file, its value and the fix.

    It is one line: control characters, which names and values may have, are escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


# ============================================== 1  HYPER-PARAMETERS ===================================================
BIG = 10**12
# Strict on purpose: a published command has MUON_MOMENTUM_WARMUP_START=092, which float() reads as 92.0.
NUMBER = re.compile(r"[+-]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Variables of the published scripts that have no effect here: whole names, or their first word. See the README.
RETIRED = {
    *"DTG EMBED_LR GPTQ_SAMPLES GRAD_QUANT HEAD_LR KEEP_FLOAT_MAX_NUMEL LATE LAWA MTP QAT WEIGHT_DECAY".split(),
    *"TRIGRAM_VOCAB_SIZE TRIGRAM_DIM".split(),
}
# Names, and first words of names, that unrelated programs use too (MAX_JOBS). Only near-misses of these are rejected.
COMMON = set(
    "CHECKPOINT COMPILE CUDA DATA DEVICE EXPORT MAX MICRO MODEL MODEL_DIR NUM NUM_THREADS PROJ RUN SEED SIZE".split()
)


class Knob:
    """One setting: its default, the allowed values, and what it means. Read on the class, it is the default.

    The environment variable is the attribute's name in capitals, and its type is that of the default. `allowed` is a
    closed range for numbers, a tuple of choices for text, or None: a switch (0, 1), or any value.
    """

    def __init__(self, default: Any, allowed: tuple | None, meaning: str):
        self.default = default
        self.kind = type(default)
        self.allowed = allowed
        self.meaning = meaning

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self.default  # an instance's own value is in its __dict__, which is looked up first

    def parse(self, name: str, value: Any) -> Any:
        """Return `value`, environment text or a Python value, as this knob's type. Raise UserError if not allowed."""
        try:
            if self.kind is bool:
                return _parse_bool(value)
            if self.kind is str:
                return _parse_text(value, self.allowed)
            low, high = self.allowed or (-math.inf, math.inf)
            return _parse_number(value, self.kind, low, high)
        except (ValueError, OverflowError):
            fix = f"it must be {self._form()} (default {self.default}): {self.meaning}"
            raise UserError(f"{name.upper()}={value} is not allowed, {fix}") from None

    def _form(self) -> str:
        """Return what is allowed, in words."""
        if self.kind is bool:
            return "0 or 1"
        if self.allowed is None:
            return f"of type {self.kind.__name__}"
        if self.kind is str:
            return f"one of {', '.join(self.allowed)}"
        low, high = self.allowed
        return f"of type {self.kind.__name__}, from {low} to {high}"


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value == "0" or value == "1":
        return value == "1"
    raise ValueError


def _parse_text(value: Any, choices: tuple | None) -> str:
    if not isinstance(value, str):
        raise ValueError
    if choices is not None and value not in choices:
        raise ValueError
    return value


def _parse_number(value: Any, kind: type, low: float, high: float) -> Any:
    if isinstance(value, str):
        if not NUMBER.fullmatch(value):
            raise ValueError
        value = kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or not low <= value <= high:
        raise ValueError
    return value


class AutoKnob(Knob):
    """A number of a range, of the type of its bounds; or auto, which leaves it to the run."""

    def __init__(self, allowed: tuple, meaning: str, default: Any = "auto"):
        super().__init__(default, allowed, meaning)
        self.kind = type(allowed[0])

    def parse(self, name: str, value: Any) -> Any:
        """Return "auto" or a number. Raise UserError if not allowed."""
        return value if value == "auto" else super().parse(name, value)

    def _form(self) -> str:
        return f"auto, or {super()._form()}"


class ModelKnob(Knob):
    """A knob that is part of the model's function, so the artifact's header carries it.

    `absent` is the value assumed for files older than the knob; with it, they compute what they did before. None marks
    the knobs that every file has.
    """

    def __init__(self, default: Any, allowed: tuple | None, meaning: str, absent: Any = None):
        super().__init__(default, allowed, meaning)
        self.absent = None if absent is None else self.parse("absent", absent)


class Hyperparameters:
    """All settings.

    `Hyperparameters.model_dim` is a default. `Hyperparameters()` reads the environment (`MODEL_DIM`) and raises
    UserError for values and combinations that are not allowed. `Hyperparameters(model_dim=64)` overrides both.
    A plain class: review tools load this file in a way that breaks dataclasses on Python 3.10.
    """

    # data, machine and kind of run
    data_path = Knob("./data/datasets/fineweb10B_sp1024", None, "folder of the *_train_*.bin and *_val_*.bin shards")
    tokenizer_path = Knob("./data/tokenizers/fineweb_1024_bpe.model", None, "SentencePiece model of those shards")
    run_id = Knob("", None, "name of the run's folder in logs/; empty: the start time")
    seed = Knob(1337, (0, 2**31 - 1), "seeds the initial weights, the training order and the preflight's tokens")
    device = Knob("auto", ("auto", "cuda", "mps", "cpu"), "auto: the first of these that is available")
    compile = Knob("auto", ("auto", "0", "1"), "torch.compile; auto: on CUDA only")
    cuda_graphs = Knob(True, None, "replay scoring and adaptation as CUDA graphs: one launch for hundreds of kernels")
    dtype = Knob(
        "auto",
        ("auto", "float32", "bfloat16"),
        "type of activations; auto: bfloat16 on GPUs that have it, and compiled on a CPU where it wins a trial",
    )
    attn_backend = Knob(
        "auto",
        ("auto", "fa3", "fa2", "cudnn", "flash", "efficient", "sdpa"),
        "auto: the fastest that is right, on a GPU with bfloat16; sdpa: what torch chooses, as elsewhere",
    )
    mlp_kernel = Knob("auto", ("auto", "fused", "plain"), "auto: the fastest that is right; fused: own Triton kernels")
    max_val_tokens = Knob(0, (0, BIG), "score only so many targets; 0: all, which a record needs")
    eval_only = Knob("", None, "artifact to score, without training")
    export_only = Knob("", None, "checkpoint to quantize, export and score, without training")
    resume = Knob("", None, "1: go on with the run RUN_ID where it stopped; or the folder of that run")
    checkpoint_every = Knob(
        120.0, (0.0, 1e9), "seconds between the checkpoints of a training, for RESUME; 0: one at its end only"
    )
    fallback_dir = Knob("", None, "where results go when the run's folder is full; empty: the temporary folder")
    tensorboard = Knob(False, None, "write TensorBoard's files, too, into the run's folder: tensorboard --logdir logs")
    audit = Knob(False, None, "prove that the finished run kept the rules: records/audit.py, compliance.json")
    estimate = Knob(False, None, "only say what the run would take: parameters, bytes, memory, seconds, data, rules")
    smoke = Knob(False, None, "only run the untrained model on random tokens and print one line")
    # training
    iterations = Knob(20_000, (1, BIG), "maximum number of steps")
    max_wallclock_seconds = Knob(600.0, (0.0, 1e9), "maximum seconds of training, with calibrations; 0: no limit")
    warmdown_frac = Knob(0.5, (0.0, 1.0), "last part of the run, over which the learning rate falls linearly to 0")
    warmdown_iters = Knob(0, (0, BIG), "the same in steps; overrides the fraction when not 0")
    warmup_steps = Knob(20, (1, 1000), "untimed preflight steps on random tokens (at most 2 without compilation)")
    train_batch_tokens = Knob(786_432, (1, BIG), "tokens per optimizer step, over all processes")
    micro_batch_tokens = AutoKnob(
        (1, BIG), "maximum tokens per forward and backward pass on one device; auto: what fits (CUDA), or 4096"
    )
    train_seq_len = ModelKnob(2048, (2, 2**20), "positions T of a training sequence")
    loader = Knob("shuffled", ("shuffled", "sequential"), "order of the training windows; sequential: as in the files")
    train_log_every = Knob(500, (1, BIG), "steps between log lines (besides the first ten and one every 30 s)")
    val_loss_every = Knob(4000, (0, BIG), "steps between validations; 0: only after the last step")
    # model
    vocab_size = ModelKnob(1024, (2, 65_536), "vocabulary V")
    num_layers = ModelKnob(11, (2, 128), "blocks")
    model_dim = ModelKnob(512, (8, 16_384), "width D of the residual stream")
    num_heads = ModelKnob(8, (1, 256), "query heads H")
    num_kv_heads = ModelKnob(4, (1, 256), "key/value heads K (grouped-query attention); divides NUM_HEADS")
    mlp_mult = ModelKnob(3.0, (0.1, 64.0), "hidden width of the MLP, in units of D")
    leaky_slope = ModelKnob(0.75, (0.0, 1.0), "LeakyReLU(slope)^2; 0: ReLU^2")
    tie_embeddings = ModelKnob(True, None, "must be 1: the head is the token embedding")
    logit_softcap = ModelKnob(30.0, (1e-3, 1e6), "c in logits = c tanh(logits / c)")
    rope_base = ModelKnob(10_000.0, (1.0, 1e9), "base of the rotary frequencies")
    rope_dims = ModelKnob(16, (0, 1024), "rotated dimensions per head; 0: all")
    rope_train_len = ModelKnob(1024, (0, 2**20), "the base is scaled up from this length to TRAIN_SEQ_LEN; 0: never")
    xsa_last_n = ModelKnob(11, (0, 128), "exclusive self attention in the last n blocks")
    ln_scale = ModelKnob(True, None, "scale the normed inputs of block l by 1/sqrt(l + 1)")
    bigram_vocab_size = ModelKnob(2048, (0, 2**24), "rows of the bigram hash table, the last one reserved; 0: none")
    bigram_dim = ModelKnob(128, (1, 16_384), "width of the bigram hash table")
    trigram_shared = ModelKnob(False, None, "look up trigrams in the bigram table too (PR 562)")
    ve_enabled = ModelKnob(True, None, "value embeddings: add the token's identity to the values of some blocks")
    ve_dim = ModelKnob(128, (1, 16_384), "width of the value-embedding table")
    ve_layers = ModelKnob("-2,-1", None, "blocks with value embeddings; a negative number counts from the end")
    value_residual = ModelKnob(False, None, "mix the first block's values into those of every block")
    gated_attention = ModelKnob(False, None, "a sigmoid gate per head on the attention output")
    attn_gate_dims = ModelKnob(
        0, (0, 16_384), "inputs of a narrow gate per head on attention's output; 0: none", absent=0
    )
    parallel_last_n = ModelKnob(0, (0, 128), "in the last n blocks, attention and MLP have the same input", absent=0)
    gated_skips = ModelKnob(False, None, "skip connections mix in by a learned gate", absent=False)
    recur_layers = ModelKnob("", None, "neighbouring blocks that run a second time, in turn, as 4,5", absent="")
    recur_start_frac = Knob(0.48, (0.0, 0.9), "part of the run after which RECUR_LAYERS do")
    qk_gain_init = Knob(1.5, (0.0, 100.0), "initial gain of the normed queries")
    tied_embed_init_std = Knob(0.005, (0.0, 10.0), "standard deviation of the initial token embedding")
    # optimizer and averages
    matrix_lr = Knob(0.027, (0.0, 10.0), "Muon learning rate")
    scalar_lr = Knob(0.025, (0.0, 10.0), "AdamW learning rate of gains, scales and gates")
    tied_embed_lr = Knob(0.035, (0.0, 10.0), "AdamW learning rate of the embedding and hash tables")
    muon_momentum = Knob(0.99, (0.0, 0.9999), "Muon momentum after its warm-up")
    muon_momentum_warmup_start = Knob(0.92, (0.0, 0.9999), "Muon momentum at step 0")
    muon_momentum_warmup_steps = Knob(1500, (0, BIG), "steps of the linear momentum warm-up")
    muon_backend_steps = Knob(5, (1, 20), "Newton-Schulz iterations")
    muon_row_norm = Knob(False, None, "scale the rows of Muon's gradients to one length before the orthogonalization")
    muon_wd = Knob(0.04, (0.0, 10.0), "decoupled weight decay of the matrices")
    adam_wd = Knob(0.04, (0.0, 10.0), "decoupled weight decay of the tables (gains and gates have none)")
    beta1 = Knob(0.9, (0.0, 0.9999), "AdamW beta1")
    beta2 = Knob(0.95, (0.0, 0.99999), "AdamW beta2")
    adam_eps = Knob(1e-8, (1e-20, 1.0), "AdamW epsilon")
    grad_clip_norm = Knob(0.3, (0.0, 1e9), "maximum norm of the reduced gradient; 0: off")
    ema_enabled = Knob(True, None, "export an exponential moving average of the weights")
    ema_decay = Knob(0.997, (0.0, 0.99999), "EMA decay, approached from below as (1 + step) / (10 + step)")
    swa_enabled = Knob(False, None, "export a mean of snapshots (of the EMA where that is on)")
    swa_every = Knob(50, (1, BIG), "steps between snapshots")
    swa_start_frac = Knob(0.4, (0.0, 1.0), "take snapshots while the learning-rate scale is below this")
    # artifact
    mlp_bits = Knob(6, (2, 16), "stored bits of the MLP matrices: 2 to 8, or 16 for fp16")
    attn_bits = Knob(6, (2, 16), "stored bits of the attention matrices")
    embed_bits = Knob(8, (2, 16), "stored bits of the token embedding and the value-embedding table")
    bigram_bits = Knob(8, (2, 16), "stored bits of the hash tables")
    proj_bits = Knob(16, (2, 16), "stored bits of the projections of hash table and value embedding")
    fp16_keep_name_patterns = Knob("", None, "comma-separated parts of names; such tensors are stored in fp16")
    quant_floor = AutoKnob(
        (0.0, 1e3),
        "smallest clip of a row, with GPTQ times a factor of the parameter; auto: the smallest that fits SIZE_LIMIT",
    )
    prune_frac = Knob(0.0, (0.0, 0.9), "zero this part of each quantized matrix, smallest magnitudes first")
    gptq_enabled = Knob(False, None, "round by GPTQ, with Hessians and steps learned from training tokens")
    gptq_calibration_batches = Knob(16, (1, 100_000), "batches of TRAIN_BATCH_TOKENS that GPTQ learns from")
    gptq_reserve_seconds = AutoKnob(
        (0.0, 1e9), "seconds of MAX_WALLCLOCK_SECONDS kept for that; auto: what the preflight predicts"
    )
    compressor = Knob(
        "zstd", ("zstd", "lzma", "rans"), "zstd: level 22; lzma: preset 9; rans: tables for rows, smallest"
    )
    size_of_code = Knob("packed", ("packed", "raw"), "form of the script that is shipped, counted and fitted against")
    size_limit = Knob(SIZE_LIMIT_BYTES, (1, SIZE_LIMIT_BYTES), "maximum bytes of code + model")
    # scoring and adaptation
    eval_seq_len = Knob(0, (0, 2**20), "positions of a scoring window; 0: TRAIN_SEQ_LEN")
    eval_attn_window = Knob(
        0, (0, 2**20), "positions that a query of a longer scoring window attends to (local attention); 0: all"
    )
    eval_stride = Knob(64, (0, 2**20), "targets scored per window; 0: windows do not overlap")
    eval_batch_seqs = AutoKnob((1, 4096), "maximum windows per forward pass; auto: 32, or a rank's share of a chunk")
    eval_ladder = Knob(False, None, "with TTT, also score the sliding windows without it, for the report")
    eval_budget_seconds = Knob(600.0, (1.0, 1e9), "seconds that the final score may take, with all adaptation")
    ttt_enabled = Knob(True, None, "adapt at test time")
    ttt_mode = Knob("score_first", ("score_first", "pre"), "pre: adapt, then score, which BREAKS THE RULES")
    ttt_optimizer = Knob("sgd", ("sgd", "adamw"), "SGD with momentum, or AdamW with betas 0.9 and 0.999 and no decay")
    ttt_lr = Knob(0.03, (0.0, 10.0), "peak learning rate; score_first: of up to 3 epochs, more share the sum of 3")
    ttt_epochs = AutoKnob(
        (1, 1000), "passes over each chunk (pre: over the whole text); auto: what fits EVAL_BUDGET_SECONDS", default=3
    )
    ttt_chunk_tokens = Knob(32_768, (1, BIG), "targets that are scored before each adaptation")
    ttt_momentum = Knob(0.9, (0.0, 0.9999), "momentum of SGD")
    ttt_batch_seqs = Knob(32, (1, 65_536), "sequences per adaptation step, over all processes")
    ttt_cosine = Knob(True, None, "the learning rate falls as a half cosine over the chunks (pre: over the steps)")
    ttt_grad_clip = Knob(1.0, (0.0, 1e9), "maximum norm of the reduced gradient; 0: off")
    ttt_freeze_blocks = Knob(0, (0, 128), "do not adapt the first n blocks")
    ttt_lr_groups = Knob("", None, "learning-rate multipliers by part of the name, as mlp.proj:3,mlp.fc:0.5")

    def __init__(self, **overrides: Any):
        knobs = self.knobs()
        self.given = read_environment(knobs)  # knob -> text
        self.chosen = {*self.given, *overrides}  # names that the data's manifest must not change
        self.assumed: dict[str, Any] = {}  # model settings that an older artifact lacks; see load_artifact
        self.predicted_seconds: dict[str, float] = {}  # of calibrations, by name; see plan_calibration
        for name in overrides:
            if name not in knobs:
                raise UserError(f"{name} is not a setting{suggest(name, knobs)}")
        for name, knob in knobs.items():
            value = overrides.get(name, self.given.get(name, knob.default))
            setattr(self, name, knob.parse(name, value))
        self._derive()
        self._check_model()
        self._check_run()

    @classmethod
    def knobs(cls, kind: type[Knob] = Knob) -> dict[str, Knob]:
        """Return name -> knob of every knob of a kind, in the order of declaration."""
        return {name: knob for name, knob in vars(cls).items() if isinstance(knob, kind)}

    def values(self, kind: type[Knob] = Knob) -> dict[str, Any]:
        """Return name -> value of every knob of a kind."""
        return {name: getattr(self, name) for name in self.knobs(kind)}

    @property
    def trains(self) -> bool:
        """Whether this process trains. EVAL_ONLY and EXPORT_ONLY begin later, and so may RESUME."""
        return self.first_stage == "train"

    def _derive(self) -> None:
        """Compute what follows from single settings, and parse the settings that are written as text."""
        if self.resume == "0":
            self.resume = ""
        self.first_stage = "train"  # of this process: train, calibrate, export or score
        if self.export_only:
            self.first_stage = "calibrate" if self.gptq_enabled else "export"
        if self.eval_only:
            self.first_stage = "score"
        self.head_dim = self.model_dim // self.num_heads
        self.window = self.eval_seq_len or self.train_seq_len  # positions T of a scoring window
        self.stride = self.eval_stride or self.window  # targets per window, except in the first
        self.reach = self.eval_attn_window or self.window  # positions that a query attends to
        multipliers = []
        try:
            for entry in filter(None, self.ttt_lr_groups.split(",")):
                part, factor = entry.split(":")
                multipliers.append((part, factor))
        except ValueError:
            groups = f"TTT_LR_GROUPS={self.ttt_lr_groups}"
            raise UserError(f"{groups} is malformed, use the form mlp.proj:3,mlp.fc:0.5") from None
        self.ve_blocks = sorted(set(self._block_numbers("ve_layers"))) if self.ve_enabled else []
        self.recur_blocks = self._block_numbers("recur_layers") if self.recur_layers else []
        number = Knob(0.0, (0.0, 1e3), "a plain number")
        self.ttt_multipliers = {part: number.parse("ttt_lr_groups", factor) for part, factor in multipliers}
        self.fp16_patterns = [part for part in self.fp16_keep_name_patterns.split(",") if part]

    def _block_numbers(self, name: str) -> list[int]:
        """Return the blocks that a setting lists, where negative numbers count from the end."""
        text = getattr(self, name)
        try:
            numbers = [int(i) for i in text.split(",")]
        except ValueError:
            raise UserError(f"{name.upper()}={text} is malformed, use the form 9,10") from None
        return [i + self.num_layers if i < 0 else i for i in numbers]

    def _check_model(self) -> None:
        """Raise UserError where the model's settings do not fit together."""
        dim, heads, kv_heads = self.model_dim, self.num_heads, self.num_kv_heads
        rope_dims = self.rope_dims or self.head_dim
        longest = max(self.train_seq_len, self.window)
        if not self.tie_embeddings:
            raise UserError("TIE_EMBEDDINGS=0 is not supported: an untied head measured worse (+0.008)")
        if dim % heads:
            raise UserError(f"MODEL_DIM={dim} is not a multiple of NUM_HEADS={heads}")
        if heads % kv_heads:
            raise UserError(f"NUM_HEADS={heads} is not a multiple of NUM_KV_HEADS={kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"MODEL_DIM={dim} / NUM_HEADS={heads} is odd, but rotary embeddings rotate pairs")
        if rope_dims % 2 or rope_dims > self.head_dim:
            raise UserError(f"ROPE_DIMS={rope_dims} is odd or larger than the head width {self.head_dim}")
        if longest * rope_dims > 2**27:
            raise UserError(f"{longest} positions are too many: lower TRAIN_ or EVAL_SEQ_LEN")
        if self.bigram_vocab_size == 1:
            raise UserError("BIGRAM_VOCAB_SIZE=1 leaves no row for bigrams: use 0 or at least 2")
        if self.trigram_shared and not self.bigram_vocab_size:
            raise UserError("TRIGRAM_SHARED=1 needs BIGRAM_VOCAB_SIZE above 0")
        if not set(self.ve_blocks) <= set(range(self.num_layers)):
            raise UserError(f"VE_LAYERS={self.ve_layers}: blocks are 0 to {self.num_layers - 1}")
        first = self.recur_blocks[0] if self.recur_blocks else 0
        last = first + len(self.recur_blocks) - 1
        if first < 0 or last >= self.num_layers or self.recur_blocks != list(range(first, last + 1)):
            form = f"give neighbours in their order, of blocks 0 to {self.num_layers - 1}, as 4,5"
            raise UserError(f"RECUR_LAYERS={self.recur_layers}: {form}")
        if self.gated_attention and self.attn_gate_dims:
            raise UserError("GATED_ATTENTION=1 and ATTN_GATE_DIMS are two gates on one output: use one")
        if self.attn_gate_dims > dim:
            raise UserError(f"ATTN_GATE_DIMS={self.attn_gate_dims} is more than MODEL_DIM={dim}")

    def _check_run(self) -> None:
        """Raise UserError where settings of training, export and scoring do not fit together."""
        wrong_bits = [name.upper() for name in self.knobs() if name.endswith("_bits") and 8 < getattr(self, name) < 16]
        if self.reach > self.window:
            wide = f"EVAL_ATTN_WINDOW={self.eval_attn_window} is larger than the window of {self.window} positions"
            raise UserError(f"{wide}: raise EVAL_SEQ_LEN")
        if self.ttt_epochs == "auto" and self.ttt_mode == "pre":
            raise UserError("TTT_EPOCHS=auto is for TTT_MODE=score_first: give a number")
        if self.stride > self.window:
            raise UserError(f"EVAL_STRIDE={self.eval_stride} is larger than the window of {self.window} positions")
        if self.trains:
            self.check_batch()
        if self.ttt_freeze_blocks > self.num_layers:
            raise UserError(f"TTT_FREEZE_BLOCKS={self.ttt_freeze_blocks} is more than the {self.num_layers} blocks")
        if wrong_bits:
            raise UserError(f"{', '.join(wrong_bits)}: stored bits are 2 to 8, or 16 for fp16")
        if self.gptq_enabled and self.prune_frac:
            raise UserError(
                f"GPTQ_ENABLED=1 moves errors into weights that PRUNE_FRAC={self.prune_frac} zeroes: use one"
            )
        if self.smoke and self.estimate:
            raise UserError("SMOKE and ESTIMATE are both set: use one of them")
        if self.eval_only and self.export_only:
            raise UserError("EVAL_ONLY and EXPORT_ONLY are both set: use one of them")
        if self.resume and not self.trains:
            raise UserError(
                "RESUME is for runs that train: EVAL_ONLY and EXPORT_ONLY start from a file, so run it again"
            )
        if self.resume == "1" and not self.run_id:
            raise UserError("RESUME=1 goes on with the run that RUN_ID names: set RUN_ID, or RESUME=logs/<run>")
        if not re.fullmatch(r"(\w[\w.-]*)?", self.run_id):
            raise UserError(f"RUN_ID={self.run_id}: use letters, digits, '.', '_' and '-'")

    def check_batch(self) -> None:
        """Raise UserError if a step is not a whole number of sequences."""
        if self.train_batch_tokens % self.train_seq_len:
            batch = f"TRAIN_BATCH_TOKENS={self.train_batch_tokens}"
            raise UserError(f"{batch} is not a multiple of TRAIN_SEQ_LEN={self.train_seq_len}")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean …?)' with the most similar known name, or an empty text."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def read_environment(knobs: Iterable[str]) -> dict[str, str]:
    """Return knob -> text for the knobs that are set.

    Raise UserError for variables that look like misspelt settings (4 of 44 published READMEs have one), and for
    settings of the published scripts that have no effect here.
    """
    names = {knob.upper() for knob in knobs}
    own_words = {name.split("_")[0] for name in names} - COMMON
    given = {}
    for name, value in os.environ.items():
        first_word = name.split("_")[0] if "_" in name else ""
        if name in names:
            given[name.lower()] = value
        elif name in RETIRED or first_word in RETIRED:
            raise UserError(f"{name} has no effect in this script: unset it (the README says what to use instead)")
        elif name in COMMON:
            continue
        elif first_word in own_words or difflib.get_close_matches(name, names, 1, 0.85):
            raise UserError(f"{name} is not a setting of this script{suggest(name, names)}: unset or rename it")
    return given


# =================================================== 2  RUNTIME =======================================================
CGROUPS = Path("/sys/fs/cgroup")  # where Linux tells what control groups may use,
OWN_CGROUPS = Path("/proc/self/cgroup")  # and which ones are this process's
# Of a pass where there is no CUDA. On a CPU, 16,384 would take four times the memory and save 1 to 3% of a step, and
# 1,024 would add 4 to 20% (records/env/bench.env on 2 cores of AMD Zen 4, compiled and not).
SMALL_PASS_TOKENS = 4096
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED")


def core_limits() -> dict[str, int]:
    """Return how many cores this process may use, by what says so: the machine, its affinity mask, and the quotas of
    its control groups and of those around them, of version 1 or 2."""
    limits = {"the machine": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["the affinity mask"] = len(os.sched_getaffinity(0))
    quotas = list(filter(None, map(cpu_quota, cgroup_folders())))
    if quotas:
        limits["the control group's quota"] = math.ceil(min(quotas))
    return limits


def cgroup_folders() -> set[Path]:
    """Return the folders in which this process's control groups, and those around them, may have a CPU quota."""
    folders = {CGROUPS, CGROUPS / "cpu"}  # all that is seen of them in most containers
    lines = ""
    with contextlib.suppress(OSError):
        lines = OWN_CGROUPS.read_text(errors="replace")
    for line in lines.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = []
        if not controllers:  # version 2
            mounts = [CGROUPS, CGROUPS / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [CGROUPS / "cpu", CGROUPS / controllers]
        for mount in mounts:
            own = mount / group.strip("/")
            folders |= {own, *own.parents}
    return folders


def cpu_quota(folder: Path) -> float:
    """Return the cores that a control group may use at a time; 0 where it has no limit, or says none."""
    version_1 = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    for paths in ([folder / "cpu.max"], version_1):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no limit is max, or -1
            quota, period = " ".join(path.read_text() for path in paths).split()
            return max(0.0, int(quota) / int(period))
    return 0.0


def available_cores() -> int:
    """Return the number of cores that this process may use: `os.cpu_count` is the whole machine's, and 64 threads on a
    quota of 4 cores mostly wait for each other."""
    return max(1, min(core_limits().values()))


def is_set_by_launcher(name: str) -> bool:
    """Whether this process has a variable that its parent, a launcher, was not started with. Linux tells; elsewhere,
    the launcher is taken to have set it."""
    parent = Path(f"/proc/{os.getppid()}/environ")
    try:
        return not any(entry.startswith(f"{name}=".encode()) for entry in parent.read_bytes().split(b"\0"))
    except OSError:
        return True


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, unless a variable such as MALLOC_TRIM_THRESHOLD_ tells it something.

    By default large tensors go back to the kernel at once, and each page of the next one is a fault: 4 to 8% of a
    training step on a CPU.
    """
    is_told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or is_told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def refuse_kernels(h: Hyperparameters) -> None:
    """Raise UserError where the settings ask for a kernel. For machines without a GPU that has bfloat16."""
    for name, elsewhere in (("attn_backend", "sdpa"), ("mlp_kernel", "plain")):
        value = getattr(h, name)
        if value not in ("auto", elsewhere):
            knob = name.upper()
            raise UserError(f"{knob}={value} needs bfloat16 on an NVIDIA GPU (Ampere or newer): set {knob}=auto")


class Launch(NamedTuple):
    """The place of this process among those of its run, as torchrun or another launcher has set it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine; -1: not set
    local_world_size: int = 1
    host: str = ""  # of rank 0, where the others find it
    port: int = 0


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Launchers of many processes that set none of these, and the variable with the number of processes.
OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


def read_launch() -> Launch:
    """Return this process's place. Raise UserError unless the launcher's variables make sense together: with a RANK
    that is left over from another run, a process would train a model of zeros, or wait for others for ever."""
    given = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    if not given:
        for launcher, variable in OTHER_LAUNCHERS.items():
            number = os.environ.get(variable, "")
            if number.isdecimal() and int(number) > 1:
                raise UserError(
                    f"{launcher} has started {number} processes, which do not know of each other (RANK is not set): "
                    f"have it start one torchrun on each machine; for a single process, `unset {variable}`"
                )
        return Launch()
    numbers = {name: launch_number(name, given) for name in given}
    with_pair = "LOCAL_RANK" in given or "LOCAL_WORLD_SIZE" in given
    for name in RANK_VARIABLES if with_pair else RANK_VARIABLES[:2]:
        if name not in given:
            raise launch_error(f"{name} is not set", given)
    world_size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    local_rank, local_world_size = numbers.get("LOCAL_RANK", -1), numbers.get("LOCAL_WORLD_SIZE", 1)
    if not 1 <= local_world_size <= world_size:
        raise launch_error("the numbers of processes are not 1 <= LOCAL_WORLD_SIZE <= WORLD_SIZE", given)
    if rank >= world_size:
        raise launch_error("RANK is not below WORLD_SIZE", given)
    if local_rank >= local_world_size:
        raise launch_error("LOCAL_RANK is not below LOCAL_WORLD_SIZE", given)
    if world_size == 1:
        return Launch()
    given |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    host = given.get("MASTER_ADDR", "").strip()
    if not host:
        raise launch_error("MASTER_ADDR, the machine of rank 0, is not set", given)
    port = launch_number("MASTER_PORT", given)
    if not 1 <= port <= 65_535:
        raise launch_error("MASTER_PORT is not from 1 to 65535", given)
    return Launch(rank, world_size, local_rank, local_world_size, host, port)


def launch_number(name: str, given: dict[str, str]) -> int:
    """Return the number that a variable of the launcher has."""
    text = given.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise launch_error(f"{name} is {'no whole number' if text else 'empty or not set'}", given)
    return int(text)


def launch_error(what: str, given: dict[str, str]) -> UserError:
    """Return an error about the launcher's variables, with all that are set."""
    values = ", ".join(f"{name}={value!r}" for name, value in given.items())
    fix = f"start with torchrun, which sets all of them; for a single process, `unset {' '.join(given)}`"
    return UserError(f"{what} ({values}): {fix}")


JOIN_SECONDS = 300.0  # that a process waits for the others of its run


class Waiting:
    """Says what this process waits for, after 3 s and then every 15 s, and raises UserError after JOIN_SECONDS."""

    def __init__(self):
        self.start = time.monotonic()
        self.next_line = 3.0

    def go_on(self, what: str, fix: str) -> None:
        """Wait a little longer."""
        seconds = time.monotonic() - self.start
        if seconds > JOIN_SECONDS:
            raise UserError(f"waited {seconds:.0f}s for {what}: {fix}")
        if seconds > self.next_line:
            self.next_line = seconds + 15
            left = JOIN_SECONDS - seconds
            tell(f"waiting for {what}; {left:.0f}s more, then this run ends")
        time.sleep(0.1)


def tell(line: str) -> None:
    """Print a line for which there is no log yet."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal may be gone
        print(f"train_gpt.py: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def tell_if_slow(seconds: float, line: str) -> Iterator[None]:
    """Print a line if the block takes longer than so many seconds."""
    timer = threading.Timer(seconds, tell, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def meet(launch: Launch) -> tuple[dist.Store, Launch]:
    """Wait until all processes of the run are there. Return the store through which they have found each other, and
    this process's place with its local rank. Raise UserError where they do not fit together, or do not come."""
    waiting = Waiting()
    where = f"MASTER_ADDR:MASTER_PORT={launch.host}:{launch.port}"
    hosts_store = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts_store:
        wait_for_port(launch, waiting, where)
    joining = in_daemon(open_store, launch, hosts_store)  # which hears no signal, and may take for ever
    while not concurrent.futures.wait([joining], 0.1).done:
        waiting.go_on(f"an answer of rank 0 from {where}", "something else is there, choose another MASTER_PORT")
    try:
        store, world_size = joining.result()
        if world_size != launch.world_size:
            raise UserError(
                f"WORLD_SIZE={launch.world_size}, but rank 0 at {where} has {world_size}: give all the same"
            )
        store.set(f"host {launch.rank}", host_name())
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if store.add(f"rank {launch.rank}", 1) > 1 and not by_torchrun:
            raise UserError(f"two processes at {where} have RANK={launch.rank}: give each its own")
        wait_for_ranks(launch, store, waiting, where)
        hosts = store.multi_get([f"host {rank}" for rank in range(launch.world_size)])
    except RuntimeError as error:  # as all errors of a store are
        reason = str(error).partition("\n")[0]
        fix = "another run may be using the port, choose another MASTER_PORT"
        raise UserError(f"rank {launch.rank} cannot join the others at {where} ({reason}): {fix}") from None
    if launch.local_rank < 0:
        own = hosts[launch.rank]
        launch = launch._replace(local_rank=hosts[: launch.rank].count(own), local_world_size=hosts.count(own))
    return store, launch


def in_daemon(function: Callable, *args: Any) -> concurrent.futures.Future:
    """Call a function in a thread that no end of this process waits for."""
    future = concurrent.futures.Future()

    def call() -> None:
        """Keep what the call returns or raises."""
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def open_store(launch: Launch, hosts_store: bool) -> tuple[dist.Store, int]:
    """Return the store of the run, which rank 0 hosts unless its launcher does, and the number of processes there."""
    host = "localhost" if hosts_store else launch.host
    timeout = timedelta(seconds=2 * JOIN_SECONDS)
    store = dist.TCPStore(host, launch.port, is_master=hosts_store, wait_for_workers=False, timeout=timeout)
    store = dist.PrefixStore(store_prefix(launch), store)
    if launch.rank == 0:
        store.set("world size", str(launch.world_size))
    return store, int(store.get("world size"))


def store_prefix(launch: Launch) -> str:
    """Return what tells the keys of a restarted run from those that it had before: otherwise a process would find the
    addresses of those before the restart (pytorch#135712). On several nodes, whose launchers count for themselves, only
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps."""
    if launch.world_size != launch.local_world_size:
        return f"run of {launch.world_size}"
    return f"run, restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def host_name() -> str:
    """Return what tells this machine from others, and containers on one machine from each other."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{platform.node()} {boot}"


def wait_for_port(launch: Launch, waiting: Waiting, where: str) -> None:
    """Wait until something answers where rank 0 should be."""
    while True:
        try:
            socket.create_connection((launch.host, launch.port), timeout=5).close()
            return
        except OSError as error:
            what = f"rank 0 of {launch.world_size} at {where} ({error})"
            waiting.go_on(what, "start it there, or correct the address")


def wait_for_ranks(launch: Launch, store: dist.Store, waiting: Waiting, where: str) -> None:
    """Wait until every rank has been counted."""
    while True:
        missing = [rank for rank in range(launch.world_size) if not store.check([f"rank {rank}"])]
        if not missing:
            return
        names = ", ".join(map(str, missing[:8])) + ", …" * (len(missing) > 8)
        what = f"{len(missing)} of {launch.world_size} processes at {where} (rank {names})"
        waiting.go_on(what, "start them, or correct WORLD_SIZE")


class Stopped(BaseException):
    """A signal has asked this process to end, and nothing that is worth keeping is lost."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Runtime:
    """The machine: device, ranks, collectives, compilation, clock and log. Nothing else mentions CUDA.

    With one process every collective returns its argument, so an algorithm has one code path for 1 and N processes.
    """

    def __init__(self, h: Hyperparameters, launch: Launch | None = None):
        launch = launch or read_launch()
        # First, so that a missing package ends the run before others wait for this process.
        self.board = TensorBoard() if h.tensorboard and launch.rank == 0 else None
        self.store: dist.Store | None = None  # kept, because the others need it until their end
        if launch.world_size > 1:
            self.store, launch = meet(launch)
        self.rank, self.world_size, self.local_rank, self.local_world_size, self.master, _ = launch
        self.device = self._pick_device(h.device)
        cuda = self.device.type == "cuda"
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.compiled = cuda if h.compile == "auto" else h.compile == "1"
        self._set_compiler_defaults()
        self.compiler = CompilerWatch(self)
        self.has_graphs = cuda
        self.records_graphs = cuda and h.cuda_graphs
        self.graphs = weakref.WeakSet()  # that are recorded and still held
        self.lag = int(cuda)  # steps that the host may be ahead of the device
        self.pending = None  # the numbers that lagged_list returns next
        self.run_dir: Path | None = None  # the run's folder, once `open_log` has it
        self.can_resume = not (h.eval_only or h.export_only)
        self.fallback_dir = h.fallback_dir  # for what the run's folder does not take; or empty
        self.fallbacks: list[Path] = []  # the folders that are used then
        self.saved: dict[str, Path] = {}  # where `save` has put what
        self.files = []  # train.log and metrics.jsonl, on rank 0
        self.dead_files = []  # that take no more lines
        self.stop_signal = 0  # the signal that has asked this run to end
        self.stop_time = 0.0
        self.finishes_steps = False  # a signal then waits for the end of the step
        self.handlers = {}  # signal -> what took care of it before
        self.threads_by = self._set_threads()  # the reason for the number of threads
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_flush_denormal(True)
        if self.world_size > 1:
            # Import before init_process_group; otherwise its threads outlive close().
            importlib.import_module("torch._dynamo")
            self._join_group()
        self.lifeline = Lifeline(self)
        self.dtype = self._pick_dtype(h)
        self.has_kernels = cuda and self.dtype == torch.bfloat16  # the preflight has a choice of them
        if not self.has_kernels:
            refuse_kernels(h)
        self.max_rows = self._initial_rows(h)
        self.keeps_rows = False  # which an earlier segment of the run has found
        self.pass_seconds: dict[str, float] = {}  # of a batch of scoring, a step of adaptation, …: see the preflight
        torch.manual_seed(h.seed)

    def _join_group(self) -> None:
        # gloo beside NCCL: the host's decisions do not wait for the device. Half an hour: rank 0 exports alone.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=30)
        fix = "if it does not, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to them"
        line = f"rank {self.rank} has met the others, and is still connecting to them, for 30 minutes at most; {fix}"
        with tell_if_slow(30, line):
            dist.init_process_group(
                backend, timeout=timeout, store=self.store, rank=self.rank, world_size=self.world_size
            )

    def _pick_device(self, name: str) -> torch.device:
        available = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available() and self.world_size == 1,  # gloo cannot reduce MPS tensors
            "cpu": True,
        }
        if name == "auto":
            name = next(n for n in available if available[n])
        is_missing = name == "cuda" and self.local_rank >= torch.cuda.device_count()
        if not available[name] or is_missing:
            raise UserError(
                f"DEVICE={name} is not available for process {self.local_rank}: change DEVICE or --nproc_per_node"
            )
        if name != "cuda":
            return torch.device(name)
        torch.cuda.set_device(self.local_rank)
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda", self.local_rank)

    def _pick_dtype(self, h: Hyperparameters) -> torch.dtype:
        """Return the type of activations and matrix products."""
        if h.dtype != "auto":
            return getattr(torch, h.dtype)
        use_bfloat16 = False
        if self.device.type == "cuda":
            use_bfloat16 = torch.cuda.get_device_capability()[0] >= 8  # GPUs before Ampere emulate it
        elif self.device.type == "cpu" and self.compiled:
            use_bfloat16 = self.broadcast_from_rank0(self._bfloat16_cost(h) < 0.8) == 1
        return torch.bfloat16 if use_bfloat16 else torch.float32

    def _bfloat16_cost(self, h: Hyperparameters) -> float:
        """Return the time of a product of the MLP in bfloat16, in units of the time in float32.

        0.35 to 0.53 on 2 cores of AMD Zen 4, which have instructions for it; others emulate it, and take many times as
        long. A whole step that is not compiled gains 5% there, too little for the rounding.
        """
        milliseconds = []
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.ones(512, h.model_dim, dtype=dtype)  # emulated, more would take minutes
            w = torch.ones(int(h.mlp_mult * h.model_dim), h.model_dim, dtype=dtype)
            milliseconds.append(self.milliseconds(functools.partial(F.linear, x, w)))
        return milliseconds[0] / milliseconds[1]

    def _initial_rows(self, h: Hyperparameters) -> dict[str, int]:
        """Return the maximum sequences of a pass in training, scoring and adaptation. On CUDA, `limit_rows` lowers
        those that are left to the run, but for scoring. The preflight halves what an allocator refuses."""
        tokens = h.micro_batch_tokens
        if tokens == "auto":
            tokens = BIG if self.device.type == "cuda" else SMALL_PASS_TOKENS
        rows = {"training": tokens // h.train_seq_len, "scoring": h.eval_batch_seqs, "adaptation": tokens // h.reach}
        if h.eval_batch_seqs == "auto":
            rows["scoring"] = 32
            if h.ttt_enabled and h.ttt_mode == "score_first":
                share = h.ttt_chunk_tokens / h.stride / self.world_size
                rows["scoring"] = min(32, math.ceil(share))
            if self.device.type == "cpu":
                rows["scoring"] = min(rows["scoring"], SMALL_PASS_TOKENS // h.window)
        return {phase: max(1, count) for phase, count in rows.items()}

    def _set_threads(self) -> str:
        """Share the cores between the processes of this machine, unless the user has exported OMP_NUM_THREADS. Return
        the reason for the number of threads."""
        name = "OMP_NUM_THREADS"
        given = os.environ.get(name, "")
        # torchrun sets 1 where nothing is set.
        is_torchruns = given == "1" and self.local_world_size > 1 and is_set_by_launcher(name)
        if re.fullmatch("[1-9][0-9]*(,.*)?", given) and not is_torchruns:
            return f"{name}={given}"
        limits = core_limits()
        tightest = min(limits, key=limits.__getitem__)
        torch.set_num_threads(max(1, available_cores() // self.local_world_size))
        shared = f", shared by {self.local_world_size} processes" * (self.local_world_size > 1)
        cores = f"{limits[tightest]} core{'s' * (limits[tightest] != 1)}"
        return f"{cores} of {tightest}{shared}"

    def _set_compiler_defaults(self) -> None:
        """Set what Inductor reads when it is imported, unless the user has."""
        # On, the default since torch 2.10, it fuses row and column sums into kernels that cost 6 ms a step
        # (pytorch#179494) and can give wrong gradients in silence (pytorch#193061).
        os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
        # The default is up to 32 workers for each process: 256 on a machine with 8 GPUs.
        num_workers = min(32, max(1, available_cores() // self.local_world_size))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(num_workers))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, stack: Tensor) -> Callable[[], Tensor]:
        """Start to sum `stack`, whose first dimension is a multiple of the world size. Return a function that waits for
        this rank's part of the sum, and returns it.

        Values travel in `self.dtype` and are added in the type of `stack`, in the order of the ranks: against a sum of
        fp32 values, bfloat16 rounds each rank's contribution once, and moves half the bytes.
        """
        if self.world_size == 1:
            return lambda: stack
        sent = stack.to(self.dtype)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, async_op=True)

        def wait() -> Tensor:
            """Return this rank's part."""
            work.wait()
            return received.unflatten(0, (self.world_size, -1)).sum(0, dtype=stack.dtype)

        return wait

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Start to collect the parts of all ranks. Return a function that waits for them, and returns them as one
        tensor, in the order of the ranks."""
        if self.world_size == 1:
            return lambda: part
        stack = part.new_empty((len(part) * self.world_size, *part.shape[1:]))
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch is renaming it
        work = collective(stack, part.contiguous(), async_op=True)

        def wait() -> Tensor:
            """Return all parts."""
            work.wait()
            return stack

        return wait

    def least(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        tensor = torch.tensor(number, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.item()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's `tensor` on every rank, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast_from_rank0(self, number: float) -> float:
        """Return rank 0's `number` on every rank, so that a decision is taken once. Does not wait for the device."""
        return self.broadcast(torch.tensor(number, dtype=torch.float64)).item()

    def readings(self, started: float) -> tuple[float, int]:
        """Return rank 0's seconds since `started` on its clock, which does not wait for the device, and the signal that
        has come to it, or 0. One message, every step."""
        numbers = torch.tensor([time.perf_counter() - started, self.stop_signal], dtype=torch.float64)
        seconds, number = self.broadcast(numbers).tolist()
        return seconds, int(number)

    def on_rank0(self, function: Callable[[], bytes]) -> bytes:
        """Return on every rank the bytes that `function()` gives on rank 0: so other hosts need no copy of a file.
        A UserError or OSError there is a UserError on every rank."""
        data, failed = b"", False
        if self.rank == 0:
            try:
                data = function()
            except UserError as error:
                data, failed = str(error).encode(), True
            except OSError as error:
                data, failed = str(UserError(os_error_line(error))).encode(), True
        size, failed = self.broadcast(torch.tensor([len(data), failed])).tolist()
        buffer = torch.empty(size, dtype=torch.uint8)
        if self.rank == 0 and size:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        data = self.broadcast(buffer).numpy().tobytes()
        if failed:
            raise UserError(data.decode())
        return data

    def compile(self, function: Callable) -> Callable:
        """Return `function` compiled for fixed shapes, or unchanged where compilation is off."""
        if not self.compiled:
            return function
        return self.compiler.watched(function, torch.compile(function, dynamic=False, fullgraph=True))

    def record_graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` gives the device, which does not do it yet. Return a function that has it done."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Thread-local: the loader's thread may pin memory meanwhile, and NCCL's watchdog ask for its events.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails would leave its own
        self.graphs.add(graph)
        return graph.replay

    def to_device(self, array: np.ndarray) -> Tensor:
        """Return the array as int64 on the device; the host does not wait for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True).long()

    def now(self) -> float:
        """Return seconds on a monotonic clock, after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until the device has done what it has been given so far."""
        if self.device.type != "cuda":
            return lambda: None
        return torch.cuda.current_stream().record_event().synchronize

    def random_state(self) -> list[str]:
        """Return the state of torch's generators, as text."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state())
        return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]

    def set_random_state(self, texts: list[str]) -> None:
        """Take over what `random_state` returned, as far as this machine has the devices."""
        states = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in texts]
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1])

    def free_memory(self) -> int:
        """Return the bytes that this process could still use: of a CUDA device. Others are not asked: 0."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
        return min(free + torch.cuda.memory_reserved(), allowed) - torch.cuda.memory_allocated()

    def fits(self, work: Callable[[], Any]) -> bool:
        """Do `work`, which must not communicate. Return whether every rank had the memory."""
        records_graphs = self.records_graphs
        self.records_graphs = False  # they keep their memory, also of a size that does not fit
        enough = self._has_memory_for(work)
        self.records_graphs = records_graphs
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for other libraries, and for pieces of other sizes
        return self.least(enough) == 1

    def _has_memory_for(self, work: Callable[[], Any]) -> bool:
        try:
            # Libraries allocate workspaces later, and memory is lost in fragments: a tenth stays free.
            spare = torch.empty(self.free_memory() // 10, dtype=torch.uint8, device=self.device)
            work()
            del spare
        except RuntimeError as error:  # only CUDA has a class of its own for it
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            return False
        return True

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Return the duration of a call: the least of three means over ten calls, after three to warm up."""
        for _ in range(3):
            function()
        durations = []
        for _ in range(3):
            start = self.now()
            for _ in range(10):
                function()
            durations.append(self.now() - start)
        return 1000 * min(durations) / 10

    def pace(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a call of `work`, which has been called before, on the slowest rank."""
        calls = 1
        if self.device.type == "cuda":  # where the next call is recorded, and the first replay is slow
            work()
            work()
            calls = 10
        start = self.now()
        for _ in range(calls):
            work()
        return -self.least((start - self.now()) / calls)

    def lagged_list(self, numbers: Tensor) -> list[float] | None:
        """Non-blocking `.tolist()`: on CUDA, return the previous call's numbers (None at first), so the host never
        waits for the step that it has just launched, and is never more than one step ahead."""
        if not self.lag:
            return numbers.tolist()
        copied = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copied.copy_(numbers, non_blocking=True)
        previous = self.pending_list()
        self.pending = (copied, torch.cuda.current_stream().record_event())
        return previous

    def pending_list(self) -> list[float] | None:
        """Return the numbers that `lagged_list` would return next, once the device has them; or None."""
        if self.pending is None:
            return None
        values, event = self.pending
        self.pending = None
        event.synchronize()
        return values.tolist()

    def describe(self) -> str:
        """Return device, processes, numerics and versions on one line."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        dtype = str(self.dtype).removeprefix("torch.")
        threads = f"threads:{torch.get_num_threads()} ({self.threads_by})"
        return (
            f"device:{self.device.type} ({name}) processes:{self.world_size} "
            f"dtype:{dtype} compile:{int(self.compiled)} "
            f"torch:{torch.__version__} python:{platform.python_version()} {threads}"
        )

    def open_log(self, folder: Path) -> None:
        """Append to the logs in the run's folder, which is made if need be."""
        self.run_dir = folder
        self.on_rank0(self._open_files)

    def _open_files(self) -> bytes:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("train.log", "metrics.jsonl"):
            path = self.run_dir / name
            drop_half_line(path)
            self.files.append(path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace"))
        self._show_on_board(lambda board: board.open(self.run_dir))
        return b""

    def log(self, line: str) -> None:
        """Print a line on rank 0, and append it to train.log."""
        if self.rank == 0:
            self._print(line, sys.stdout, *self.files[:1])

    def _print(self, line: str, *files: Any) -> None:
        """Print a line into files. One that takes no more, as a terminal that is gone or a disk that is full, is given
        up with a warning: no run ends for a line."""
        for file in files:
            if file in self.dead_files:
                continue
            try:
                print(f"{line}\n", end="", file=file, flush=True)  # in one piece, as threads print, too
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self.dead_files.append(file)
                self.log(f"WARNING: {getattr(file, 'name', file)} takes no more lines: {error}")

    def warn(self, line: str) -> None:
        """Log a warning on rank 0. Print it on every other rank, with its number."""
        if self.rank != 0:
            self._print(f"rank {self.rank}: WARNING: {line}", sys.stderr)
        self.log(f"WARNING: {line}")

    def record(self, event: str, **fields: Any) -> None:
        """Append a JSON line to metrics.jsonl: what happened, when (seconds since 1970), and its numbers."""
        self._print(json.dumps({"event": event, "time": round(time.time(), 3), **fields}), *self.files[1:])
        if self.run_dir is not None:
            self._show_on_board(lambda board: board.add(event, fields))

    def _show_on_board(self, show: Callable[[TensorBoard], None]) -> None:
        """Let TensorBoard's files have something. Where they cannot, as on a full disk, go on without: no run ends for
        a curve."""
        if self.board is None:
            return
        try:
            show(self.board)
        except OSError as error:
            self.board = None
            self.warn(f"TensorBoard gets no more numbers: {os_error_line(error)}")

    def save(self, name: str, *pieces: bytes | memoryview) -> Path:
        """Write a result, which must not be lost, and return where it is: in the run's folder, or, where that takes
        nothing twice, in FALLBACK_DIR or the system's temporary folder. Try for as long as the other ranks wait."""
        size = sum(map(len, pieces))
        start = time.perf_counter()
        folders = [self.run_dir]
        num_rounds = 0
        while True:
            path, reason = self.write_into(folders, name, *pieces)
            if path is not None:
                return path
            if time.perf_counter() - start > SAVE_SECONDS:
                raise UserError(f"{name} was not written for {SAVE_SECONDS:.0f}s: {reason}")
            if num_rounds % 12 == 0:
                self.warn(f"{reason}; trying again every {RETRY_SECONDS:.0f}s: free {size:,} bytes")
            num_rounds += 1
            if num_rounds == 2:
                folders += self.other_folders()
            time.sleep(RETRY_SECONDS)

    def write_into(self, folders: list[Path], name: str, *pieces: bytes | memoryview) -> tuple[Path | None, str]:
        """Write a file into the first of the folders that takes it. Return its path; or None, and the reason."""
        reason = ""
        for folder in folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, *pieces)
            except OSError as error:
                reason += "; " * bool(reason) + os_error_line(error)
                continue
            if folder is not self.run_dir:
                self.warn(f"{name} is in {folder}, because {self.run_dir} took no more")
            self.saved[name] = folder / name
            return folder / name, ""
        return None, reason

    def other_folders(self) -> list[Path]:
        """Return folders of this run's elsewhere, for what its own has no room for."""
        if self.fallbacks:
            return self.fallbacks
        if self.fallback_dir:
            self.fallbacks.append(Path(self.fallback_dir) / self.run_dir.name)
        with contextlib.suppress(OSError):
            self.fallbacks.append(Path(tempfile.mkdtemp(prefix=f"{self.run_dir.name}-")))
        return self.fallbacks

    def catch_signals(self) -> None:
        """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 end this process with nothing lost: in training after the step, which
        is kept, elsewhere as soon as Python has a say. A second one ends it there and then, unless it comes within a
        second: launchers repeat that of a terminal."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # not all are everywhere
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if self.lifeline.is_leaving:
            return  # this process ends in half a second, and says why
        is_second = self.stop_signal != 0
        if is_second and time.monotonic() - self.stop_time > 1:
            os._exit(128 + number)
        if is_second:
            return
        self.note_signal(number)
        if not self.finishes_steps:
            raise Stopped(number)
        self.lifeline.tell_rank0(number)

    def note_signal(self, number: int) -> None:
        """Take note of a signal that has come to this process, or to another one, which has told it."""
        self.stop_time = time.monotonic()
        self.stop_signal = number

    def __enter__(self) -> Runtime:
        self.catch_signals()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Leave the process group, or say why the run ends before its end."""
        if error is None:
            self.close()
        elif isinstance(error, Stopped):
            self.lifeline.is_armed = False
            self.log(f"stopped by {error}{self.how_to_resume()}")
            self.record("ended", reason=f"stopped by {error}")
        elif isinstance(error, UserError):
            self._print(f"ended by an error: {error}", *self.files[:1])  # the screen gets it last
            self.record("ended", reason=str(error))
        else:
            self.lifeline.wait_for_cause()
            self._keep_traceback(error)
            self.record("ended", reason=repr(error))
            self.lifeline.tell_failure()
        self.lifeline.is_armed = False
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _keep_traceback(self, error: BaseException) -> None:
        """Write the traceback into a file of this rank's, which no launcher mixes with those of others."""
        if self.run_dir is None:
            return
        path = self.run_dir / f"rank{self.rank}.error.txt"
        with contextlib.suppress(OSError):  # the disk may be the reason
            self.run_dir.mkdir(parents=True, exist_ok=True)  # on other hosts it is not there yet
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        self._print(f"rank {self.rank} failed: {error!r}, see {path}{self.how_to_resume()}", sys.stderr)

    def how_to_resume(self) -> str:
        """Return the end of a line on a run that has stopped."""
        if self.run_dir is None or not self.can_resume:
            return ""
        settings = f"RESUME={self.run_dir}"
        if self.run_dir.parent == Path("logs"):
            settings = f"RESUME=1 RUN_ID={self.run_dir.name}"
        return f"; the same command with {settings} goes on"

    def close(self) -> None:
        """Leave the process group, which all do together."""
        self.compiler.close()
        self.lifeline.close()
        for graph in self.graphs:
            graph.reset()  # NCCL waits for graphs that have its collectives
        if self.world_size > 1:
            dist.destroy_process_group()


RETRY_SECONDS = 5.0  # between two tries to write a file
SAVE_SECONDS = 1500.0  # for which it is tried; the other ranks wait for half an hour
HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0  # from another process, after which it is gone
ALIVE, BYE, GONE = b".", b"-", b"!"  # messages of a lifeline; others are 128 + the number of a signal


class TensorBoard:
    """Gives the numbers of events to TensorBoard: losses and rates by step, scores and bytes at the end, settings."""

    SCALARS = ("train_loss", "lr_scale", "tokens_per_second")

    def __init__(self):
        require("tensorboard", "or unset TENSORBOARD")
        self.writer_type = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.step = 0  # the last one

    def open(self, folder: Path) -> None:
        """Write into a run's folder."""
        self.folder = str(folder)
        self.writer = self.writer_type(self.folder, flush_secs=15)

    def add(self, event: str, fields: dict[str, Any]) -> None:
        """Write what there is to see of an event. Raise OSError where that cannot be written."""
        writer = self.writer
        if event == "config":
            settings = "\n".join(f"    {name.upper()}={value}" for name, value in fields.items())
            writer.add_text("settings", settings)
        elif event == "resumed":  # steps behind it were lost with the process, and come again
            writer.close()
            self.step = fields["step"]
            self.writer = self.writer_type(self.folder, flush_secs=15, purge_step=self.step + 1)
        elif event == "train":
            self.step = fields["step"]
            for name in self.SCALARS:
                writer.add_scalar(f"train/{name}", fields[name], self.step)
        elif event == "eval":
            stage = "validation" if fields["stage"].startswith("step:") else fields["stage"]
            step = int(fields["stage"][5:].split("/")[0]) if stage == "validation" else self.step
            writer.add_scalar(f"{stage}/val_loss", fields["val_loss"], step)
            writer.add_scalar(f"{stage}/val_bpb", fields["val_bpb"], step)
        elif event == "final":
            writer.add_scalar("final/val_bpb", fields["val_bpb"], self.step)
            writer.add_scalar("final/bytes_total", fields["bytes_total"], self.step)
        if event in ("eval", "final", "ended"):
            writer.flush()


class Lifeline:
    """Ends this process when another one of the run is gone: at once where its connection breaks, after SILENCE_SECONDS
    where its host is cut off. A collective would wait for half an hour, and keep the GPUs.

    Each rank has a connection to rank 0, over which both say every second that they are there. Time in which this
    process was suspended does not count.
    """

    def __init__(self, rt: Runtime):
        self.rt = rt
        self.peers: dict[socket.socket, int] = {}  # connection -> the rank at its other end
        self.heard: dict[socket.socket, float] = {}  # when it was heard of last
        self.on_leaving: Callable[[], None] | None = None  # what there is to finish before this process ends
        self.is_armed = True  # until this process ends by itself
        self.is_leaving = False  # it ends, because another one is gone
        self.failed: int | None = None  # the rank that has said that it is about to end
        if rt.world_size > 1:
            self._connect()
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _connect(self) -> None:
        rt = self.rt
        server = None
        port = 0
        if rt.rank == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            dualstack = family == socket.AF_INET6
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=dualstack, backlog=rt.world_size)
            port = server.getsockname()[1]
        port = int(rt.broadcast_from_rank0(port))
        password = rt.on_rank0(lambda: os.urandom(16))
        if server is None:
            connection = socket.create_connection((rt.master, port), timeout=60)
            connection.sendall(password + struct.pack("<I", rt.rank))
            self.peers[connection] = 0
            return
        server.settimeout(60)
        while len(self.peers) < rt.world_size - 1:
            connection, _ = server.accept()
            connection.settimeout(5)
            greeting = b""
            with contextlib.suppress(OSError):  # strangers knock at any port
                greeting = connection.makefile("rb").read(len(password) + 4)
            if greeting[:-4] == password:
                self.peers[connection] = struct.unpack("<I", greeting[-4:])[0]
            else:
                connection.close()
        server.close()

    def _watch(self) -> None:
        try:
            self._speak_and_listen()
        except Exception as error:  # whatever it is, nobody would notice the end of the others from here on
            self._leave(self.rt.rank, f"its lifeline failed: {error!r}")

    def _speak_and_listen(self) -> None:
        """Speak and listen until all others have said good-bye, or one is gone."""
        selector = selectors.DefaultSelector()
        for connection in self.peers:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        last_round = last_beat = -math.inf
        while self.peers and self.is_armed:
            ready = selector.select(HEARTBEAT_SECONDS)
            now = time.monotonic()
            if now - last_round > SILENCE_SECONDS / 2:
                self.heard = dict.fromkeys(self.peers, now)
            last_round = now
            for key, _ in ready:
                self._listen(key.fileobj)
                if key.fileobj not in self.peers:
                    selector.unregister(key.fileobj)
            if now - last_beat >= HEARTBEAT_SECONDS:
                last_beat = now
                self._say(ALIVE)
            for connection, rank in self.peers.items():
                if now - self.heard[connection] > SILENCE_SECONDS:
                    self._leave(rank, f"nothing was heard of it for {SILENCE_SECONDS:.0f}s")
                    return

    def _listen(self, connection: socket.socket) -> None:
        rank = self.peers[connection]
        try:
            message = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._leave(rank, f"its connection is broken: {error.strerror}")
            return
        if not message:
            self._leave(rank, "it has failed" if rank == self.failed else "its connection is closed")
            return
        if GONE in message:
            at = message.index(GONE) + 1
            (gone,) = struct.unpack("<I", message[at : at + 4])
            if gone != rank:
                self._leave(gone, f"rank {rank} says so")
                return
            self.failed = rank  # the launcher shall see its end first
        if BYE in message:
            del self.peers[connection]
        signals = [byte - 128 for byte in message if byte >= 128]
        if signals and not self.rt.stop_signal:
            self.rt.note_signal(signals[0])
        self.heard[connection] = time.monotonic()

    def _say(self, message: bytes) -> None:
        for connection in list(self.peers):  # the other thread may take one out
            with contextlib.suppress(OSError):  # a connection that is broken is heard of by listening
                connection.send(message)

    def tell_rank0(self, number: int) -> None:
        """Pass a signal on to rank 0, which decides for all."""
        if self.rt.rank != 0:
            self._say(bytes([128 + number]))

    def tell_failure(self) -> None:
        """Tell the others that this process is about to end."""
        self._say(GONE + struct.pack("<I", self.rt.rank))

    def wait_for_cause(self) -> None:
        """Wait for a second, as something has gone wrong: if that was the end of another process, it ends this one with
        a line, and not with the traceback of a collective. Wait longer if another one has said that it fails."""
        if self.peers:
            time.sleep(1)
        if self.failed is not None:
            time.sleep(SILENCE_SECONDS + 2)

    def _leave(self, rank: int, why: str) -> None:
        """End this process, because that of `rank` is gone, unless it ends by itself."""
        self.is_leaving = self.is_armed
        if self.rt.rank == 0:
            self._say(GONE + struct.pack("<I", rank))
        time.sleep(0.5)  # for what goes wrong on all ranks, which have their own say then
        if not self.is_armed:
            return
        line = f"rank {rank} of {self.rt.world_size} is gone ({why}), so all stop{self.rt.how_to_resume()}"
        try:
            self.rt.warn(line)
            if self.on_leaving is not None:
                self.on_leaving()
        finally:
            os._exit(1)

    def close(self) -> None:
        """Say good-bye: what ends now is done."""
        self.is_armed = False
        self._say(BYE)


SLOW_COMPILE_SECONDS = 1.0  # from which on a compilation is worth a line


class CompilerWatch:
    """Logs what torch.compile compiles and how long it takes, and warns of what is compiled after the preflight, in
    time that counts."""

    def __init__(self, rt: Runtime):
        self.rt = rt
        self.seconds: list[float] = []  # of each compilation so far
        self.num_late = 0  # compilations after the preflight
        self.preflight_is_over = False
        self.called = ""  # the compiled function that was called last
        self.start = 0.0  # of the compilation in progress
        self.handler = None
        if rt.compiled:
            # The default is 8: less than the times that a batch may be halved.
            importlib.import_module("torch._dynamo").config.recompile_limit = 64
            self.handler = importlib.import_module("torch._dynamo.callback").callback_handler
            self.handler.register_start_callback(self._on_start)
            self.handler.register_end_callback(self._on_end)

    def close(self) -> None:
        """Stop watching."""
        if self.handler is not None:
            self.handler.remove_start_callback(self._on_start)
            self.handler.remove_end_callback(self._on_end)
            self.handler = None

    def watched(self, function: Callable, compiled: Callable) -> Callable:
        """Return the compiled function, which will be known by the name of `function`."""
        name = getattr(function, "__qualname__", type(function).__name__)

        def call(*args: Any) -> Any:
            """Call the compiled function. It is compiled at its first call, and again when it meets a new shape."""
            self.called = name
            return compiled(*args)

        return call

    def _on_start(self, _: Any) -> None:
        self.start = time.perf_counter()

    def _on_end(self, args: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.seconds.append(seconds)
        name = self.called
        if args.callback_trigger.name == "LAZY_BACKWARD":
            name += ", backward"
        self.rt.record("compile", name=name, seconds=seconds, after_preflight=self.preflight_is_over)
        if self.preflight_is_over:
            self.num_late += 1
            self.rt.log(f"WARNING: {name} was compiled after the preflight, in {seconds:.1f}s that count")
        elif seconds > SLOW_COMPILE_SECONDS:
            self.rt.log(f"compiled {name} in {seconds:.1f}s")


class GraphCache:
    """CUDA graphs of work that an object does again and again: one launch for the host, where a step of adaptation has
    638, which take it 7 ms.

    The first call with some shapes works as usual, which compiles and allocates what there is to; the second is
    recorded. So the function must do the same at every call, in place, on tensors that stay where they are, without
    looking at a value, and return nothing. Its arguments are copied to where it was recorded to read them, numbers as
    tensors. Where recording fails, a warning says so, and it works as usual.
    """

    def __init__(self, rt: Runtime, name: str, records: bool = True):
        self.rt = rt
        self.name = name
        self.records = records
        self.inputs: dict[tuple, list[Tensor]] = {}  # the arguments in their places
        self.replays: dict[tuple, Callable[[], None]] = {}

    def run(self, function: Callable[..., None], *args: Tensor | float, **constants: Any) -> None:
        """Do `function(*args, **constants)`, on CUDA from a graph where there is one."""
        if not self.rt.has_graphs:
            function(*args, **constants)
            return
        shapes = tuple(getattr(arg, "shape", ()) for arg in args)
        key = (function.__name__, shapes, *constants.values())
        if key not in self.inputs:
            self.inputs[key] = [self._place(arg) for arg in args]
            function(*self.inputs[key], **constants)
            return
        for place, arg in zip(self.inputs[key], args):
            if isinstance(arg, Tensor):
                place.copy_(arg)
            else:
                place.fill_(arg)
        work = functools.partial(function, *self.inputs[key], **constants)
        if self.records and self.rt.records_graphs and key not in self.replays:
            self.replays[key] = self._record(work)
        replay = self.replays.get(key, work)
        replay()

    def _place(self, arg: Tensor | float) -> Tensor:
        """Return an argument in a place of its own."""
        if isinstance(arg, Tensor):
            return arg.clone()
        return torch.full((), arg, dtype=torch.float32, device=self.rt.device)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what replays `work`, or `work` itself where it cannot be recorded."""
        try:
            return self.rt.record_graph(work)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a recording that failed fails too
            reason = str(cause).partition("\n")[0]
            self.rt.warn(f"{self.name} is not replayed as a CUDA graph and so takes longer: {reason}")
            return work


class Progress:
    """Logs a line every 15 seconds of long work: amount done, rate, elapsed time, time left.

    `status` returns text to append; it is called only when a line is printed.
    """

    def __init__(self, rt: Runtime, label: str, total: int, unit: str):
        self.rt = rt
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self.status: Callable[[], str] = lambda: ""
        self.start = self.last_line = time.perf_counter()

    def advance(self, amount: int) -> None:
        """Count `amount` as done, and log a line if one is due."""
        self.done += amount
        now = time.perf_counter()
        if self.done >= self.total or now - self.last_line <= 15:
            return
        self.last_line = now
        seconds = now - self.start
        rate = f"{self.done / seconds:,.1f} {self.unit}/s"
        left = seconds * (self.total / self.done - 1)
        times = f"elapsed:{seconds:.0f}s left:{left:.0f}s"
        self.rt.log(f"{self.label}: {self.done:,}/{self.total:,} {rate} {times}{self.status()}")
        self.rt.record("progress", label=self.label, done=self.done, total=self.total, seconds=seconds)


def require(module: str, otherwise: str) -> Any:
    """Return an imported package, or raise UserError. Nothing ever silently takes a missing package's place."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"the package {module} is missing: `pip install {module}`, {otherwise}") from None


def os_error_line(error: OSError) -> str:
    """Return what the system could not do with which file, and the fix where it is known, on one line."""
    path = f"{error.filename}: " if error.filename else ""
    return path + os_error_reason(error)


def os_error_reason(error: OSError) -> str:
    """Return what the system could not do, and the fix where it is known."""
    fixes = {
        errno.ENOSPC: ": free some space there",
        errno.EDQUOT: ": free some of your space there",
        errno.EROFS: ": choose a folder that can be written to",
        errno.EACCES: ": change its permissions, or choose another place",
        errno.EMFILE: ": raise `ulimit -n`",
    }
    return f"{error.strerror or error}{fixes.get(error.errno, '')}"


def read_file(path: Path, limit: int, name: str = "") -> bytes:
    """Return a file's content. Raise UserError, with the name of a setting, if it is none, cannot be read, or has more
    than `limit` bytes."""
    setting = f"{name}={path}" if name else str(path)
    try:
        if path.is_dir():
            raise UserError(f"{setting} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            raise UserError(f"{setting} is a pipe or a device: save its content in a file first")
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{setting} has {size:,} bytes, and such files have at most {limit:,}: give the right one")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{setting} cannot be read: {os_error_reason(error)}") from None


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or the nearest one around it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def check_writable(folder: Path, fix: str) -> None:
    """Raise UserError, with the fix, unless files can be written into a folder, or it can be made where it is not there
    yet."""
    try:
        if folder.is_symlink() and not folder.exists():
            raise OSError(errno.ENOENT, f"a link to {os.readlink(folder)}, which is not there", str(folder))
        with tempfile.TemporaryFile(dir=nearest_folder(folder)) as file:
            file.write(bytes(1024))
    except OSError as error:
        raise UserError(f"{folder.absolute()} takes no files ({error.strerror}): {fix}") from None


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Write to a temporary file, then rename it: nobody ever sees half a file, not even after a loss of power."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the disk may be full
        error.filename = error.filename or str(path)
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(folder)  # the name, too
        os.close(folder)


def lock(folder: Path) -> Any:
    """Return what keeps other processes out of a run's folder until this one ends, however it does. Raise UserError if
    another one is at work there."""
    file = (folder / "train.log").open("a")
    if os.name != "posix":
        return file
    fcntl = importlib.import_module("fcntl")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"another process is at work in {folder}: wait for its end, or stop it") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def drop_half_line(path: Path) -> None:
    """Cut off what follows the last line break of a log: a process that was killed may have left half a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


# ===================================================== 3  DATA ========================================================
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
LARGEST_JSON = 2**23  # bytes of a manifest or journal; 10,000 shards take 2 million
LARGEST_TOKENIZER = 2**26
SLOW_READ_SECONDS = 1.0  # that a step may wait for its tokens before it says so
BOS = 1  # the first token of every document
DATA_HELP = (
    "run `python data/download.py` (with --variant for another vocabulary, see data/README.md), or "
    "`python data/demo.py` and set DATA_PATH=./data/datasets/demo_sp1024"
)


def find_path(path: str | Path, variable: str) -> Path:
    """Return `path`, searched from here and then upwards from this script, since a copy of it may run in records/…/."""
    try:
        for base in (Path(), *CODE.parents):
            if (base / path).exists():
                return base / path
    except OSError as error:  # a name that is too long
        raise UserError(f"{variable}={path} cannot be read: {os_error_reason(error)}") from None
    fix = DATA_HELP if variable.endswith("_PATH") else "runs leave such files in logs/, the project has records/"
    raise UserError(f"{variable}={path} does not exist (searched from {Path.cwd()}): {fix}")


class Shard:
    """A shard's tokens, uint16, read from the file whenever some are asked for: shard[begin:end].

    The file is not mapped into memory: one that is cut short, or on a network volume that fails, would end the process
    without a word (SIGBUS). Nor is it kept open, as there may be more shards than a process may have files open.
    """

    TRIES = 5  # with pauses of 1, 2, 4 and 8 s

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file, but a folder, a pipe or a device: remove it from DATA_PATH")
        self.path = path
        self.size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_BYTES // 4)
        if header.size < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
            found = f"{self.size} bytes, starts with {header[:2].tolist()}"
            raise UserError(f"{path} is not a token shard ({found}): fetch it again")
        expected = SHARD_HEADER_BYTES + 2 * int(header[2])
        if header[2] < 1 or self.size != expected:
            state = "empty" if header[2] < 1 else "truncated" if self.size < expected else "oversized"
            raise UserError(f"{path} is {state}: {self.size} bytes, but its header declares {expected}: fetch it again")
        self.num_tokens = int(header[2])
        self.written = path.stat().st_mtime_ns
        self.was_changed = False  # since it was opened first

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the tokens of a range. Raise UserError where the file has changed its length or cannot be read."""
        begin, end, _ = part.indices(self.num_tokens)
        tokens = np.empty(max(0, end - begin), "<u2")
        self.read_into(tokens, begin)
        return tokens

    def read_into(self, tokens: np.ndarray, begin: int) -> None:
        """Fill `tokens` with those from `begin` on."""
        for attempt in range(self.TRIES):
            try:
                self._read(begin, tokens)
                return
            except OSError as error:  # a network volume may be back soon
                failure = error
            time.sleep(2**attempt * (attempt < self.TRIES - 1))
        raise UserError(f"{os_error_line(failure)}, for {self.TRIES} times: is DATA_PATH still there?")

    def _read(self, begin: int, tokens: np.ndarray) -> None:
        with self.path.open("rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            if facts.st_size != self.size:
                raise UserError(
                    f"{self.path} had {self.size} bytes, and has {facts.st_size} now: something is writing to DATA_PATH"
                )
            if facts.st_mtime_ns != self.written:
                self.was_changed = True
            file.seek(SHARD_HEADER_BYTES + 2 * begin)
            num_bytes = file.readinto(tokens.view(np.uint8))
        if num_bytes != tokens.nbytes:
            raise UserError(f"{self.path} was cut short while it was read: fetch it again")

    def max(self) -> int:
        """Return the highest token."""
        piece = np.empty(min(2**20, self.num_tokens), "<u2")  # which stays in the processor's cache
        highest = 0
        for begin in range(0, self.num_tokens, len(piece)):
            part = piece[: self.num_tokens - begin]
            self.read_into(part, begin)
            highest = max(highest, int(part.max()))
        return highest


def load_data_shard(path: Path) -> Shard:
    """Return a shard. Raise UserError if the file is broken."""
    try:
        return Shard(path)
    except OSError as error:
        raise UserError(f"a shard of DATA_PATH cannot be read: {os_error_line(error)}") from None


class Manifest(NamedTuple):
    """What the manifest.json beside the shards says of them, which is not believed before it is compared."""

    vocab_size: int
    tokenizer: str  # its file, as seen from the folder of the shards
    tokenizer_sha256: str
    tokens: dict[str, int]  # by shard
    sha256: dict[str, str]  # by shard


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a folder's manifest says, None where there is none. Raise UserError for one that cannot be read."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    content = read_file(path, LARGEST_JSON)
    try:
        manifest = json.loads(content)
        tokenizer, files = manifest["tokenizer"], manifest["files"]
        return Manifest(
            vocab_size=int(tokenizer["vocab_size"]),
            tokenizer=os.fspath(tokenizer["path"]),  # TypeError for what is no text
            tokenizer_sha256=str(tokenizer.get("sha256")),
            tokens={name: int(entry["tokens"]) for name, entry in files.items()},
            sha256={name: entry["sha256"] for name, entry in files.items() if isinstance(entry.get("sha256"), str)},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not a manifest of token shards ({error!r}): rebuild or remove it") from None


def apply_manifest(h: Hyperparameters) -> Hyperparameters:
    """Fill vocab_size and tokenizer_path from the shards' manifest.json, unless they were given.

    Return the settings unchanged where there is no manifest. Raise UserError where it does not match the files.
    """
    folder = find_path(h.data_path, "DATA_PATH")
    manifest = read_manifest(folder)
    if manifest is None:
        return h
    path = folder / "manifest.json"
    shards = [shard for split in ("train", "val") for shard in folder.glob(f"*_{split}_*.bin")]
    try:
        present = {(shard.name, (shard.stat().st_size - SHARD_HEADER_BYTES) // 2) for shard in shards}
    except OSError as error:
        raise UserError(f"a shard of DATA_PATH cannot be read: {os_error_line(error)}") from None
    mismatched = sorted(set(manifest.tokens.items()) ^ present)
    if mismatched:
        name, _ = mismatched[0]
        raise UserError(f"{folder / name} does not match {path}: `python data/verify.py {folder}` says what is wrong")
    found = {"vocab_size": manifest.vocab_size, "tokenizer_path": str(folder / manifest.tokenizer)}
    settings = copy.copy(h)
    for name in found.keys() - h.chosen:
        try:
            setattr(settings, name, h.knobs()[name].parse(name, found[name]))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if tokenizer_sha256(settings.tokenizer_path) != manifest.tokenizer_sha256:
        file = find_path(settings.tokenizer_path, "TOKENIZER_PATH")
        raise UserError(f"TOKENIZER_PATH={file} is not the tokenizer that {path} names: unset it, or fetch it again")
    return settings


def tokenizer_sha256(path: str) -> str:
    """Return the SHA-256 of the tokenizer's file."""
    file = find_path(path, "TOKENIZER_PATH")
    return hashlib.sha256(read_file(file, LARGEST_TOKENIZER, "TOKENIZER_PATH")).hexdigest()


def data_hashes(h: Hyperparameters) -> dict[str, str]:
    """Return the SHA-256 of the tokenizer, and of what `sha256sum *_val_*.bin` prints of the validation shards. That of
    the training shards, which may be 16 GB, is by their manifest, if they have one.

    Raise UserError for a validation shard that is not the manifest's.
    """
    folder = find_path(h.data_path, "DATA_PATH")
    manifest = read_manifest(folder)
    listed = manifest.sha256 if manifest else {}
    found = {}
    for path in sorted(folder.glob("*_val_*.bin")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if listed.get(path.name, found[path.name]) != found[path.name]:
            raise UserError(f"{path} is not the shard that manifest.json names: `python data/verify.py {folder}`")
    hashes = {"tokenizer_sha256": tokenizer_sha256(h.tokenizer_path), "val_sha256": listing_sha256(found)}
    train = {name: listed.get(name, "") for name in manifest.tokens if "_train_" in name} if manifest else {}
    if train and not h.eval_only and all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in train.values()):
        hashes["train_sha256"] = listing_sha256(train)
    return hashes


def listing_sha256(hashes: dict[str, str]) -> str:
    """Return the SHA-256 of the lines that sha256sum prints for these files."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_shards(h: Hyperparameters, split: str) -> list[Shard]:
    """Return the shards of `split`, train or val, in the order of their names. Raise UserError for a bad shard now, and
    not ten minutes into a run."""
    folder = find_path(h.data_path, "DATA_PATH")
    other_split = "val" if split == "train" else "train"
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder} has no *_{split}_*.bin: {DATA_HELP}")
    other_paths = {os.path.realpath(path) for path in folder.glob(f"*_{other_split}_*.bin")}
    in_both = sorted(other_paths & {os.path.realpath(path) for path in paths})
    if in_both:
        raise UserError(
            f"{in_both[0]} is both a train and a validation shard (*_train_*, *_val_*): rename or remove it"
        )
    shards = [load_data_shard(path) for path in paths]
    for path, shard in zip(paths, shards):
        highest = shard.max()
        if highest >= h.vocab_size:
            raise UserError(f"{path} has token {highest}, but VOCAB_SIZE={h.vocab_size}: {DATA_HELP}")
    return shards


def equal_parts(rows: int, max_rows: int) -> int:
    """Return the least number of equal parts, of at most `max_rows`, that `rows` can be cut into."""
    parts = 1
    while rows % parts or rows // parts > max_rows:
        parts += 1
    return parts


def batch_plan(h: Hyperparameters, rt: Runtime) -> tuple[int, int]:
    """Return a rank's (sequences of a micro-batch, micro-batches of a step). Raise UserError if they do not divide."""
    h.check_batch()  # with EXPORT_ONLY, the file has set TRAIN_SEQ_LEN since the start
    sequences = h.train_batch_tokens // h.train_seq_len
    if sequences % rt.world_size:
        step_tokens = f"{rt.world_size} x {h.train_seq_len} tokens"
        raise UserError(f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is not a multiple of {step_tokens}")
    rows = sequences // rt.world_size
    grad_accum_steps = equal_parts(rows, rt.max_rows["training"])
    return rows // grad_accum_steps, grad_accum_steps


class TokenLoader:
    """Training batches of windows of T = TRAIN_SEQ_LEN tokens, read two steps ahead.

    Shards wrap around. An epoch visits every window once: in file order, or (LOADER=shuffled) permuted and offset by
    less than T, both drawn from SEED and the epoch. A step's windows do not depend on the number of processes, nor on
    the step at which reading began; each rank reads its own part.
    """

    def __init__(self, h: Hyperparameters, rt: Runtime, shards: list[Shard], step: int = 0):
        self.h = h
        self.rt = rt
        self.shards = shards
        self.step = step
        self.offsets = np.cumsum([0, *map(len, shards)])  # where each shard begins, and the end
        self.num_tokens = int(self.offsets[-1])
        self.num_windows = max(1, self.num_tokens // h.train_seq_len)
        rows, self.grad_accum_steps = batch_plan(h, rt)
        self.rows = rows * self.grad_accum_steps  # of a step
        self.epoch = -1  # the epoch that `phase` and `order` belong to
        self.phase = 0
        self.order = None
        self.unchanged = [shard for shard in shards if isinstance(shard, Shard)]  # random tokens are arrays
        self.warned = -math.inf  # when a step that waited was warned of last
        self.waited = 0.0  # seconds that steps have waited for their tokens
        self.pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.futures = collections.deque(self.pool.submit(self._read, step + ahead) for ahead in range(2))

    def _window_start(self, i: int) -> int:
        """Return the position of window i, counted over all steps and ranks."""
        epoch, idx = divmod(i, self.num_windows)
        if self.h.loader == "sequential":
            return i * self.h.train_seq_len
        if epoch != self.epoch:  # 8 bytes per window: 31 MB and 0.1 s for the challenge's 8 billion tokens
            self.epoch = epoch
            rng = np.random.default_rng((self.h.seed, epoch))
            self.phase = int(rng.integers(self.h.train_seq_len))
            self.order = rng.permutation(self.num_windows)
        return self.phase + int(self.order[idx]) * self.h.train_seq_len

    def _copy(self, start: int, window: np.ndarray) -> None:
        """Fill `window` with the tokens from `start` on, across the ends of shards."""
        filled = 0
        while filled < len(window):
            position = (start + filled) % self.num_tokens
            shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
            begin = position - self.offsets[shard]
            part = self.shards[shard][begin : begin + len(window) - filled]
            window[filled : filled + len(part)] = part
            filled += len(part)

    def _read(self, step: int) -> np.ndarray:
        """Return this rank's windows of a step, int32 (rows, T + 1): inputs and, shifted by one, targets."""
        windows = np.empty((self.rows, self.h.train_seq_len + 1), np.int32)
        first = (step * self.rt.world_size + self.rt.rank) * self.rows
        for row, window in enumerate(windows):
            self._copy(self._window_start(first + row), window)
        if windows.max() >= self.h.vocab_size:
            raise UserError(f"a shard has token {windows.max()} since it was looked at: is something writing there?")
        return windows

    def _wait(self) -> np.ndarray:
        """Return the next step's windows, and say so where they come late, or not from what was there at the start."""
        start = time.perf_counter()
        windows = self.futures.popleft().result()
        seconds = time.perf_counter() - start
        self.waited += seconds
        if seconds > SLOW_READ_SECONDS and start > self.warned + 60:
            self.warned = start
            fix = "copy the shards to a disk of this machine"
            self.rt.warn(f"a step waited {seconds:.1f}s for its tokens from DATA_PATH={self.h.data_path}: {fix}")
        for shard in [shard for shard in self.unchanged if shard.was_changed]:
            self.unchanged.remove(shard)
            self.rt.warn(f"{shard.path} was written to since this run began: it may train on other tokens now")
        return windows

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        """Return this rank's micro-batches of the next step: inputs and targets, int64 (B, T)."""
        windows = self._wait()
        self.step += 1
        self.futures.append(self.pool.submit(self._read, self.step + 1))
        tokens = self.rt.to_device(windows).unflatten(0, (self.grad_accum_steps, -1))  # (steps, B, T + 1)
        inputs = tokens[..., :-1].contiguous()
        targets = tokens[..., 1:].contiguous()
        return list(zip(inputs, targets))


def load_tokenizer(path: str, vocab_size: int) -> Any:
    """Return the SentencePiece model. Raise UserError if it does not fit VOCAB_SIZE or would miscount bytes."""
    file = find_path(path, "TOKENIZER_PATH")
    sp = require("sentencepiece", "it counts the bytes of the tokens").SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(read_file(file, LARGEST_TOKENIZER, "TOKENIZER_PATH"))
        for i in range(sp.vocab_size()):
            sp.id_to_piece(i)  # all can be read: a piece may be other bytes than text
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"TOKENIZER_PATH={file} is not a SentencePiece model ({error}): fetch it again") from None
    if sp.vocab_size() != vocab_size:
        raise UserError(f"{file} has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}: unset that, or use other data")
    # Without a piece for a bare space, the space before an unknown word is lost and its byte is not counted.
    if sp.is_unknown(sp.piece_to_id("\u2581")) and "<0x20>" not in sp.encode("x x", out_type=str):
        raise UserError(f"TOKENIZER_PATH={file} lacks the bare piece '\u2581', so bytes are miscounted: retrain it")
    return sp


def build_sentencepiece_luts(
    sp: Any, vocab_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lookup tables (V,): bytes of each piece without its leading "\u2581", whether it has one, and whether it
    is a boundary, after which that "\u2581" is not a space. Control, unknown and unused ids are boundaries of 0 bytes.
    """
    base_bytes_np = np.zeros(vocab_size, dtype=np.int16)
    has_leading_space_np = np.zeros(vocab_size, dtype=np.bool_)
    is_boundary_token_np = np.ones(vocab_size, dtype=np.bool_)
    for i in range(vocab_size):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        is_boundary_token_np[i] = False
        if sp.is_byte(i):
            base_bytes_np[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\u2581"):
            has_leading_space_np[i] = True
            piece = piece[1:]
        piece = piece.replace("\u2581", " ")  # inside of pieces that join words
        base_bytes_np[i] = len(piece.encode("utf-8"))  # noqa: UP012 - the form that reviewers' tools look for
    return (
        torch.tensor(base_bytes_np, device=device),
        torch.tensor(has_leading_space_np, device=device),
        torch.tensor(is_boundary_token_np, device=device),
    )


class Validation(NamedTuple):
    """The text that is scored: N + 1 tokens, the UTF-8 bytes of its N targets, and a line about it."""

    tokens: Tensor  # int32 (N + 1,)
    target_bytes: Tensor  # of each target: int16 (N,)
    num_bytes: int  # of all targets; summing 62 million takes 0.2 s
    note: str

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.target_bytes)

    def head(self, num_targets: int) -> Validation:
        """Return the text of the first targets."""
        target_bytes = self.target_bytes[:num_targets]
        return Validation(self.tokens[: num_targets + 1], target_bytes, int(target_bytes.sum()), self.note)


def load_validation_tokens(h: Hyperparameters) -> Validation:
    """Return the text of all validation shards, cut to a multiple of the positions that attention reaches, which are
    the window's in all published scores."""
    sp = load_tokenizer(h.tokenizer_path, h.vocab_size)
    shards = load_shards(h, "val")
    tokens = torch.from_numpy(np.concatenate([shard[:].astype(np.int32) for shard in shards]))
    num_available = len(tokens) - 1
    num_targets = min(num_available, h.max_val_tokens or BIG)
    num_targets = num_targets // h.reach * h.reach or num_targets
    tokens = tokens[: num_targets + 1]
    base_bytes, has_leading_space, is_boundary_token = build_sentencepiece_luts(sp, h.vocab_size)
    previous, target = tokens[:-1].long(), tokens[1:].long()
    target_bytes = base_bytes[target] + (has_leading_space[target] & ~is_boundary_token[previous])
    num_bytes = int(target_bytes.sum())
    if not num_bytes:
        raise UserError(f"the validation shards of DATA_PATH={h.data_path} have no text ({num_targets + 1} tokens)")
    counts = f"{len(shards)} shards, {num_targets:,} targets ({num_available - num_targets:,} left off)"
    note = f"{counts}, {num_bytes:,} bytes, {num_bytes / num_targets:.6f} bytes a target"
    return Validation(tokens, target_bytes, num_bytes, note)


# ==================================================== 4  MODEL ========================================================
def sdpa(q: Tensor, k: Tensor, v: Tensor, reach: int = BIG) -> Tensor:
    """Return causal attention (B, t, H, d) of queries that end where the keys and values (B, T, K, d) end, each to the
    last `reach` positions, by the kernel that torch chooses."""
    t, length = q.size(1), k.size(1)
    mask = None
    if t < length or reach < length:
        k, v = repeat_heads(k, q), repeat_heads(v, q)  # masked kernels do not support grouped heads
        mask = torch.ones(t, length, dtype=torch.bool, device=q.device).tril(length - t)
        if reach < length:
            mask = mask.triu(length - t - reach + 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, positions, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None)
    return y.transpose(1, 2)


def repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values x (B, T, K, d) once for each query head of q: (B, T, H, d)."""
    return x.repeat_interleave(q.size(2) // x.size(2), dim=2)


def torch_attention(backend: SDPBackend) -> Callable:
    """Return `sdpa` by one of torch's kernels. A tail of queries needs a mask, which not all support; there it is the
    efficient kernel."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention, as `sdpa` does."""
        kernel = backend
        if q.size(1) < k.size(1):
            kernel = SDPBackend.EFFICIENT_ATTENTION
        elif backend == SDPBackend.EFFICIENT_ATTENTION:  # it does not support grouped heads
            k, v = repeat_heads(k, q), repeat_heads(v, q)
        with sdpa_kernel(kernel):
            return sdpa(q, k, v)

    return attend


def flash_attention(package: str) -> Callable:
    """Return the kernel of a FlashAttention package, called like `sdpa`. Raise what its import raises."""
    flash_attn_func = importlib.import_module(package).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention, as `sdpa` does."""
        y = flash_attn_func(q, k, v, causal=True)  # aligns the ends of queries and keys
        return y[0] if isinstance(y, tuple) else y  # some releases return the log-sum-exp as well

    return attend


# ATTN_BACKEND -> a function that loads the kernel. Of equally fast ones, `fastest_kernel` takes the first.
ATTENTION_KERNELS = {
    "fa3": lambda: flash_attention("flash_attn_interface"),
    "fa2": lambda: flash_attention("flash_attn"),
    "cudnn": lambda: torch_attention(SDPBackend.CUDNN_ATTENTION),
    "flash": lambda: torch_attention(SDPBackend.FLASH_ATTENTION),
    "efficient": lambda: torch_attention(SDPBackend.EFFICIENT_ATTENTION),
}


def attention_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention (B, t, H, d) from its formula, as `sdpa` does. Kernels are checked against it."""
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_heads(k, q), repeat_heads(v, q)))  # (B, H, T, d)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    t, length = scores.shape[-2:]
    future = torch.ones(t, length, dtype=torch.bool, device=q.device).triu(1 + length - t)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return x divided by its root mean square (Zhang & Sennrich 2019), times `gain`; statistics in fp32.

    The gain multiplies the reciprocal root, one number a vector, and not the vector: with F.rms_norm(x) * gain the
    gain's gradient reads all of x once more, 0.27 GB a layer. eps is fp32's machine epsilon, as in F.rms_norm.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1.1920929e-07)
    if gain is not None:
        rstd = rstd * gain
    return (wide * rstd).to(x.dtype)


class Linear(nn.Linear):
    """A matrix with fp32 master weights, cast to the activations' type at use, or ahead (see CastMatrices)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Ahead, with its rows scaled. Not on the class: a graph that found it there is compiled again once an instance
        # has one of its own.
        self.cast: Tensor | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return x W^T + b, with the rows of W times `scale`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.matrix(x.dtype, scale), bias)

    def matrix(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """Return W in `dtype`, its rows times `scale`: cheaper than scaling the output, by 0.48 GB a layer and pass."""
        if self.cast is not None:
            return self.cast
        weight = self.weight if scale is None else self.weight * scale.unsqueeze(1)
        return weight.to(dtype)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) of the first r = ROPE_DIMS dimensions of a head.

    The base is multiplied by max(1, TRAIN_SEQ_LEN / ROPE_TRAIN_LEN)^(r / (r - 2)) ("NTK-aware" scaling). The tables
    are fp32 and not buffers, so that no cast of the model rounds them (PR 562 trained with bf16 tables).
    """

    def __init__(self, h: Hyperparameters):
        super().__init__()
        r = h.rope_dims or h.head_dim
        self.base = h.rope_base
        ratio = h.train_seq_len / (h.rope_train_len or h.train_seq_len)
        if ratio > 1 and r > 2:
            self.base *= ratio ** (r / (r - 2))
        frequencies = self.base ** (-torch.arange(0, r, 2, dtype=torch.float64, device="cpu") / r)  # (r / 2,)
        positions = torch.arange(max(h.train_seq_len, h.window), dtype=torch.float64, device="cpu")  # (T,)
        angles = torch.outer(positions, frequencies).unsqueeze(1)  # (T, 1, r / 2), the same for all heads
        self.cos = angles.cos().float()
        self.sin = angles.sin().float()

    def _apply(self, fn: Callable, recurse: bool = True) -> Rotary:
        """Move the tables with the model, but never cast them."""
        device = fn(torch.empty(0)).device
        self.cos = self.cos.to(device)
        self.sin = self.sin.to(device)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, end: int) -> Tensor:
        """Return x (B, t, heads, d) at positions [end - t, end), each pair (a, b) turned by position x frequency."""
        begin = end - x.size(1)
        cos = self.cos[begin:end].to(x.dtype)
        sin = self.sin[begin:end].to(x.dtype)
        half = cos.size(-1)
        a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def begins_document(ids: Tensor) -> Tensor:
    """Return (B, T), True where nothing comes before a token: at position 0 and at the first token of a document."""
    return (ids == BOS) | (torch.arange(ids.size(1), device=ids.device) == 0)


class ProjectedEmbedding(nn.Module):
    """A narrow embedding table for tokens, bigrams or trigrams, projected to `width` and scaled.

    Order 1 looks up the token itself (value embedding). Orders 2 and 3 are BigramHash and TrigramHash: the tokens that
    end at t share row (36313 id_t XOR 27191 id_{t-1} XOR 51497 id_{t-2}) mod (rows - 1) with others of that hash.
    Bigrams and trigrams cut off by the start of a document use the last row.
    """

    def __init__(self, rows: int, dim: int, width: int, orders: tuple[int, ...], scale: float):
        super().__init__()
        self.orders = orders
        self.embed = nn.Embedding(rows, dim)
        self.proj = Linear(dim, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))

    def rows_of(self, ids: Tensor, order: int) -> Tensor:
        """Return the table's row (B, T) for each position and one order."""
        if order == 1:
            return ids
        key = ids * 36313  # int64: from id 59,138 on, products overflow int32
        key = key ^ (ids.roll(1, 1) * 27191)
        cut = begins_document(ids)
        if order == 3:
            key = key ^ (ids.roll(2, 1) * 51497)
            cut = cut | cut.roll(1, 1)
        reserved = self.embed.num_embeddings - 1
        return torch.where(cut, reserved, key % reserved)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, T, width) for ids (B, T)."""
        vectors = sum(self.embed(self.rows_of(ids, order)) for order in self.orders)  # (B, T, dim)
        return self.proj(vectors.to(dtype)) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """Mixes a little of the previous position into each: (1 - g) x_t + g x_{t-1} with a gate g per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return (B, T, D). x_{t-1} is 0 where a document begins."""
        g = torch.sigmoid(self.gate).to(x.dtype)
        # Not roll: Inductor then keeps `previous` and computes the sum again in every block, 1.4 GB.
        previous = F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(begins_document(ids).unsqueeze(-1), 0.0)
        return (1 - g) * x + g * previous


def xsa(y: Tensor, v: Tensor) -> Tensor:
    """Return exclusive self attention: outputs y (B, t, H, d) without their part along their own position's value
    v (B, t, K, d), y - (y . v / |v|^2) v for each query head of v's group. Sums in fp32."""
    grouped = y.unflatten(2, (v.size(2), -1)).float()  # (B, t, K, G, d)
    v = v.unsqueeze(3).float()  # (B, t, K, 1, d)
    dot = (grouped * v).sum(-1, keepdim=True)  # (B, t, K, G, 1)
    norm = (v * v).sum(-1, keepdim=True).clamp_min(1e-24)  # (B, t, K, 1, 1)
    part = dot / norm
    return (grouped - part * v).flatten(2, 3).to(y.dtype)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023).

    Order: project, value embedding, value residual, QK norm with the query gain, rotary, attend, XSA, gate, project.
    The gate is one number for each head and position: sigmoid(G x + b) of the whole input (PR 562), or twice the
    sigmoid of G x[:ATTN_GATE_DIMS], which starts at 1 (PR 1667).
    Queries are taken at the last t positions only, keys and values at all T.
    """

    def __init__(self, h: Hyperparameters, layer: int, rotary: Rotary):
        super().__init__()
        self.head_dim = h.head_dim
        self.use_xsa = layer >= h.num_layers - h.xsa_last_n
        self.attend = sdpa
        self.reach = max(h.reach, h.train_seq_len)  # longer windows have local attention
        self.rotary = rotary
        kv_dim = h.num_kv_heads * h.head_dim
        # Initial weights are drawn, and parameters stored, in the order of these lines.
        self.c_q = Linear(h.model_dim, h.model_dim, bias=False)
        self.proj = Linear(h.model_dim, h.model_dim, bias=False)
        self.c_k = Linear(h.model_dim, kv_dim, bias=False)
        self.c_v = Linear(h.model_dim, kv_dim, bias=False)
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5])) if h.value_residual else None
        self.attn_gate = Linear(h.model_dim, h.num_heads) if h.gated_attention else None
        self.gate_dims = h.attn_gate_dims
        self.head_gate = nn.Parameter(torch.zeros(h.num_heads, self.gate_dims)) if self.gate_dims else None

    def forward(self, x: Tensor, v0: Tensor | None, ve: Tensor | None, t: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (B, t, D), times `scale`, for inputs x (B, T, D), and the first block's values (B, T, K d)."""
        length = x.size(1)
        last = x[:, -t:]  # (B, t, D)
        q = self.c_q(last).unflatten(2, (-1, self.head_dim))  # (B, t, H, d)
        k = self.c_k(x).unflatten(2, (-1, self.head_dim))  # (B, T, K, d)
        v, v0 = self._values(x, v0, ve)  # (B, T, K, d)
        # Rounded after the rotation: of a bare concatenation Inductor makes three kernels in scoring, +1.8 GB a batch.
        q = self.rotary(rms_norm(q.float(), self.q_gain.unsqueeze(1)), length).to(x.dtype)
        k = self.rotary(rms_norm(k.float()), length).to(x.dtype)
        if length > self.reach:
            y = sdpa(q, k, v, self.reach)  # no other kernel here has a mask
        else:
            y = self.attend(q, k, v)  # (B, t, H, d)
        if self.use_xsa:
            y = xsa(y, v[:, -t:])
        if self.attn_gate is not None:
            y = y * torch.sigmoid(self.attn_gate(last)).unsqueeze(-1)
        if self.head_gate is not None:
            few = last[..., : self.gate_dims].contiguous()  # (B, t, ATTN_GATE_DIMS)
            y = y * (2 * torch.sigmoid(F.linear(few, self.head_gate.to(x.dtype)))).unsqueeze(-1)
        return self.proj(y.flatten(2), scale), v0

    def _values(self, x: Tensor, v0: Tensor | None, ve: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the values (B, T, K, d), and those of the first block (B, T, K d), which are x's own if v0 is None."""
        v = self.c_v(x)
        if ve is not None:
            v = v + ve
        if v0 is None:
            v0 = v
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(x.dtype)
            v = mix[0] * v0 + mix[1] * v
        return v.unflatten(2, (-1, self.head_dim)), v0


# Two Triton kernels for the MLP. As kernels of their own, activation and derivative move 1.5 GB a layer of 98,304
# tokens, as the ends of the products before them 0.6.
tl: Any = None  # triton.language, once `triton_kernel` has imported it
TILE_ROWS = 128


class Tile(NamedTuple):
    """What one program of a kernel computes: TILE_ROWS x cols of a product, `depth` terms of its sums at a time."""

    cols: int
    depth: int
    num_warps: int


# A large tile reads less. Two small ones fit on a multiprocessor, and one computes while the other writes. The shallow
# one is for GPUs before Hopper, where the others spill registers. The preflight finds out which is fastest.
TILES = (Tile(256, 64, 8), Tile(128, 64, 4), Tile(128, 32, 8))


def leaky_square_kernel(
    x, w, pre, post, slope, depth, rows: tl.constexpr, cols: tl.constexpr, step: tl.constexpr, keep_pre: tl.constexpr
):
    """Compute a tile (rows, cols) of pre = x w^T and of post = LeakyReLU(pre)^2. The arguments are descriptors."""
    row = tl.program_id(1) * rows
    col = tl.program_id(0) * cols  # the fastest index: neighbours read the same rows of x
    total = tl.zeros((rows, cols), tl.float32)
    for k in range(0, depth, step):
        total = tl.dot(x.load([row, k]), w.load([col, k]).T, total)
    rounded = total.to(post.dtype)  # as the plain product is
    if keep_pre:
        pre.store([row, col], rounded)
    value = rounded.to(tl.float32)
    value = tl.where(value > 0, value, slope * value)
    post.store([row, col], (value * value).to(post.dtype))


def leaky_square_grad_kernel(
    dy, w, pre, dpre, slope, depth, rows: tl.constexpr, cols: tl.constexpr, step: tl.constexpr
):
    """Compute a tile (rows, cols) of dpre = (dy w) * d LeakyReLU(pre)^2 / d pre."""
    row = tl.program_id(1) * rows
    col = tl.program_id(0) * cols
    total = tl.zeros((rows, cols), tl.float32)
    for k in range(0, depth, step):
        total = tl.dot(dy.load([row, k]), w.load([k, col]), total)
    dpost = total.to(dpre.dtype).to(tl.float32)
    value = pre.load([row, col]).to(tl.float32)
    derivative = tl.where(value > 0, 2 * value, 2 * slope * slope * value)
    dpre.store([row, col], (dpost * derivative).to(dpre.dtype))


@functools.cache
def triton_kernel(function: Callable) -> Any:
    """Return one of the kernels above for Triton to compile. Raise ImportError where Triton is missing."""
    global tl
    tl = importlib.import_module("triton.language")
    function.__annotations__ = inspect.get_annotations(function, eval_str=True)  # tl.constexpr, not its name
    return importlib.import_module("triton").jit(function)


def launch_tiles(
    function: Callable, tile: Tile, operands: list[tuple[Tensor, list[int]]], slope: float, **constants: Any
) -> None:
    """Run a kernel for every tile of the last operand. Operands are a matrix and the shape of the blocks it is read or
    written in; blocks that stick out read zeros."""
    descriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
    descriptors = [descriptor.from_tensor(matrix, block) for matrix, block in operands]
    output, _ = operands[-1]
    grid = (math.ceil(output.size(1) / tile.cols), math.ceil(output.size(0) / TILE_ROWS))
    depth = operands[0][0].size(1)
    constants |= {"rows": TILE_ROWS, "cols": tile.cols, "step": tile.depth}
    triton_kernel(function)[grid](*descriptors, slope, depth, **constants, num_warps=tile.num_warps, num_stages=3)


def _empty_pre_and_post(x: Tensor, w_up: Tensor, keep_pre: bool) -> tuple[Tensor, Tensor]:
    post = x.new_empty(x.size(0), w_up.size(0))
    pre = torch.empty_like(post) if keep_pre else x.new_empty(0)
    return pre, post


@torch.library.custom_op(
    "parameter_golf::leaky_square_up",
    mutates_args=(),
    schema="(Tensor x, Tensor w_up, float slope, int tile, bool keep_pre) -> (Tensor, Tensor)",
)
def leaky_square_up(x: Tensor, w_up: Tensor, slope: float, tile: int, keep_pre: bool) -> tuple[Tensor, Tensor]:
    """Return pre = x w_up^T, empty without `keep_pre`, and LeakyReLU(pre)^2, both (M, hidden), for x (M, D), by tiles
    of TILES[tile]."""
    pre, post = _empty_pre_and_post(x, w_up, keep_pre)
    cols, depth, _ = TILES[tile]
    block = [TILE_ROWS, cols]
    operands = [(x.contiguous(), [TILE_ROWS, depth]), (w_up, [cols, depth])]
    operands += [(pre if keep_pre else post, block), (post, block)]
    launch_tiles(leaky_square_kernel, TILES[tile], operands, slope, keep_pre=keep_pre)
    return pre, post


@leaky_square_up.register_fake
def _(x: Tensor, w_up: Tensor, slope: float, tile: int, keep_pre: bool) -> tuple[Tensor, Tensor]:
    return _empty_pre_and_post(x, w_up, keep_pre)


@torch.library.custom_op(
    "parameter_golf::leaky_square_grad",
    mutates_args=(),
    schema="(Tensor dy, Tensor w_down, Tensor pre, float slope, int tile) -> Tensor",
)
def leaky_square_grad(dy: Tensor, w_down: Tensor, pre: Tensor, slope: float, tile: int) -> Tensor:
    """Return the gradient of `pre` (M, hidden) for the gradient dy (M, D) of LeakyReLU(pre)^2 w_down^T."""
    dpre = torch.empty_like(pre)
    cols, depth, _ = TILES[tile]
    block = [TILE_ROWS, cols]
    operands = [(dy.contiguous(), [TILE_ROWS, depth]), (w_down, [depth, cols]), (pre, block), (dpre, block)]
    launch_tiles(leaky_square_grad_kernel, TILES[tile], operands, slope)
    return dpre


@leaky_square_grad.register_fake
def _(dy: Tensor, w_down: Tensor, pre: Tensor, slope: float, tile: int) -> Tensor:
    return torch.empty_like(pre)


class FusedMLP(torch.autograd.Function):
    """LeakyReLU(x w_up^T)^2 w_down^T (M, D) of x (M, D). The two operators are opaque to torch.compile, and all other
    products are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_up: Tensor, w_down: Tensor, slope: float, tile: int) -> Tensor:
        """Return the output and keep what the gradient needs."""
        pre, post = leaky_square_up(x, w_up, slope, tile, keep_pre=True)
        ctx.save_for_backward(x, w_up, w_down, pre, post)
        ctx.slope = slope
        ctx.tile = tile
        return post @ w_down.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and both matrices."""
        x, w_up, w_down, pre, post = ctx.saved_tensors
        dpre = leaky_square_grad(dy, w_down, pre, ctx.slope, ctx.tile)
        return dpre @ w_up, dpre.T @ x, dy.T @ post, None, None


def fused_mlp(tile: int) -> Callable:
    """Return the MLP's function by the kernels above and TILES[tile]. Raise ImportError without Triton."""
    triton_kernel(leaky_square_kernel)

    def fused(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
        """Return LeakyReLU(x w_up^T)^2 w_down^T (B, t, D) of x (B, t, D)."""
        rows = x.flatten(0, 1)  # (M, D)
        if torch.is_grad_enabled():
            y = FusedMLP.apply(rows, w_up, w_down, slope, tile)
        else:
            _, post = leaky_square_up(rows, w_up, slope, tile, keep_pre=False)
            y = post @ w_down.T
        return y.view_as(x)

    return fused


# Kernel -> a function that loads it. None stands for the plain lines in `MLP.forward`.
MLP_KERNELS = {
    "plain": lambda: None,
    "fused256": lambda: fused_mlp(0),
    "fused128": lambda: fused_mlp(1),
    "fused128shallow": lambda: fused_mlp(2),
}


class MLP(nn.Module):
    """LeakyReLU(x)^2 between two matrices: a negative input becomes slope^2 x^2, so its unit still learns."""

    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden = int(h.mlp_mult * h.model_dim)
        self.slope = h.leaky_slope
        self.fused: Callable | None = None
        self.fc = Linear(h.model_dim, hidden, bias=False)
        self.proj = Linear(hidden, h.model_dim, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return outputs (B, t, D), times `scale`. The plain lines are the definition: a fused kernel that computes
        anything else is not used."""
        if self.fused is not None:
            return self.fused(x, self.fc.matrix(x.dtype), self.proj.matrix(x.dtype, scale), self.slope)
        x = self.fc(x)  # (B, t, hidden)
        x = F.leaky_relu(x, self.slope).square()
        return self.proj(x, scale)


class Block(nn.Module):
    """Attention and MLP on normed inputs, scaled by 1/sqrt(layer + 1), after mixing in the embedding x0.

    The MLP's input is the stream with what attention adds; in the last PARALLEL_LAST_N blocks it is attention's own, so
    that the two could run side by side (GPT-J, Wang & Komatsuzaki 2021).
    """

    def __init__(self, h: Hyperparameters, layer: int, rotary: Rotary):
        super().__init__()
        self.attn = CausalSelfAttention(h, layer, rotary)
        self.mlp = MLP(h)
        self.input_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.is_parallel = layer >= h.num_layers - h.parallel_last_n
        self.attn_scale = nn.Parameter(torch.ones(h.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(h.model_dim))
        mix = torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim)))  # of x and x0
        self.resid_mix = nn.Parameter(mix)

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, ve: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        """Return the residual stream (B, t, D) after the block, and the first block's values."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0  # (B, T, D)
        normed = rms_norm(x) * self.input_scale
        y, v0 = self.attn(normed, v0, ve, t, self.attn_scale)
        x = x[:, -t:] + y  # (B, t, D)
        normed = normed[:, -t:] if self.is_parallel else rms_norm(x) * self.input_scale  # (B, t, D)
        return x + self.mlp(normed, self.mlp_scale), v0


class GPT(nn.Module):
    """The model, `GPT(h)` or `GPT(model_dim=64, …)`. Parameters are fp32, activations have `compute_dtype`.

    The blocks form a U-Net: with e = L // 2, block e + i adds the output of block e - 1 - i (of 11 blocks, the last
    adds none). `block_order` lists the blocks that run. A block listed twice runs twice, with the same weights and
    value embedding, which belong to the block and not to its place in the list. Skip connections are between first
    passes, so that a second pass is all that is added (one that took and gave some, too, disturbed a trained model 2.9
    times as much); one whose source has not run yet carries nothing.
    """

    def __init__(self, h: Hyperparameters | None = None, **knobs: Any):
        super().__init__()
        h = h or Hyperparameters(**knobs)
        dim = h.model_dim
        self.compute_dtype = torch.float32
        self.logit_softcap = h.logit_softcap
        self.recur_blocks = h.recur_blocks
        self.num_encoders = h.num_layers // 2
        # Block e + i adds the output of block e - 1 - i, times skip_weights[i].
        self.skip_source = {self.num_encoders + i: self.num_encoders - 1 - i for i in range(self.num_encoders)}
        self.ve_blocks = h.ve_blocks
        self.tok_emb = nn.Embedding(h.vocab_size, dim)
        self.smear = SmearGate(dim)
        rotary = Rotary(h)
        self.bigram = self.ve_shared = None
        if h.bigram_vocab_size:
            orders = (2, 3) if h.trigram_shared else (2,)
            self.bigram = ProjectedEmbedding(h.bigram_vocab_size, h.bigram_dim, dim, orders, scale=0.05)
        if self.ve_blocks:
            kv_dim = h.num_kv_heads * h.head_dim
            self.ve_shared = ProjectedEmbedding(h.vocab_size, h.ve_dim, kv_dim, orders=(1,), scale=0.1)
        self.blocks = nn.ModuleList(Block(h, layer, rotary) for layer in range(h.num_layers))
        self.set_recurrence(True)
        self.skip_weights = nn.Parameter(torch.ones(self.num_encoders, dim))
        self.skip_gates = nn.Parameter(torch.zeros(self.num_encoders, dim)) if h.gated_skips else None
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in self.ve_blocks)
        if self.tok_emb.weight.device.type != "meta":  # there only names and shapes are wanted
            self.init_weights(h)

    def set_recurrence(self, is_on: bool) -> None:
        """Let the blocks of RECUR_LAYERS run a second time (Dehghani et al. 2018, of all blocks), or not."""
        order = list(range(len(self.blocks)))
        if is_on and self.recur_blocks:
            end = self.recur_blocks[-1] + 1
            order[end:end] = self.recur_blocks
        self.block_order = order

    @contextlib.contextmanager
    def without_recurrence(self) -> Iterator[None]:
        """Run each block once, in this context: the model as it is before RECUR_START_FRAC."""
        self.set_recurrence(False)
        try:
            yield
        finally:
            self.set_recurrence(True)

    @torch.no_grad()
    def init_weights(self, h: Hyperparameters) -> None:
        """Set all initial weights except gains and scales.

        Matrices into heads and hidden units are orthogonal, those out of them zero, so that every block begins as the
        identity. Projections of tables are orthogonal, times 1/sqrt(2 L); hash tables are zero.
        """
        embedding_std = {"tok_emb": h.tied_embed_init_std, "ve_shared.embed": 0.01}
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=embedding_std.get(name, 0.0))
            elif name.endswith(("attn.proj", "mlp.proj")):
                nn.init.zeros_(module.weight)
            elif name.endswith("attn_gate"):
                nn.init.zeros_(module.weight)
                nn.init.constant_(module.bias, 4.0)  # sigmoid(4) = 0.98, nearly open
            elif isinstance(module, Linear):
                gain = 1.0 if name.startswith("blocks.") else (2 * h.num_layers) ** -0.5
                nn.init.orthogonal_(module.weight, gain)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the input x0 (B, T, D) of the first block."""
        x = self.tok_emb(ids).to(self.compute_dtype)
        if self.bigram is not None:
            x = x + self.bigram(ids, self.compute_dtype)
        return self.smear(rms_norm(x), ids)

    def hidden(self, ids: Tensor, last_n: int | None = None) -> Tensor:
        """Return the normed final states (B, t, D) of ids (B, T), where t is `last_n`, or T if that is None.

        For the other positions the last block needs keys and values only: the same function, with 9% fewer operations
        at t = 64 of T = 2048.
        """
        dtype = self.compute_dtype
        length = ids.size(1)
        x = x0 = self.embed(ids)
        ve = None if self.ve_shared is None else self.ve_shared(ids, dtype)  # (B, T, K d)
        ve_scales = dict(zip(self.ve_blocks, self.ve_layer_scales))
        v0 = None
        outputs = {}  # block -> its output, for the skip connections
        for position, i in enumerate(self.block_order):
            is_first_pass = i not in self.block_order[:position]
            source = self.skip_source.get(i)
            if is_first_pass and source in outputs:
                weight = self.skip_weights[i - self.num_encoders].to(dtype)
                if self.skip_gates is None:
                    x = x + weight * outputs[source]
                else:
                    gate = self.skip_gates[i - self.num_encoders].sigmoid().to(dtype)
                    x = torch.lerp(weight * outputs[source], x, gate)
            block_ve = ve * ve_scales[i].to(dtype) if i in ve_scales else None
            is_last = position == len(self.block_order) - 1
            t = last_n if is_last and last_n else length
            x, v0 = self.blocks[i](x, x0, v0, block_ve, t)
            if is_first_pass and i < self.num_encoders:
                outputs[i] = x
        return rms_norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Return logits (B, t, V), fp32, within the soft cap (Gemma 2, 2024), of final states (B, t, D)."""
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)).float()
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def forward_logits(self, input_ids: Tensor, last_n: int | None = None) -> Tensor:
        """Return logits (B, t, V) at the last t positions of inputs (B, T)."""
        return self.head(self.hidden(input_ids, last_n))

    def token_nll(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Return nats (B, t) of targets (B, t) at the last t positions of inputs (B, T); 0 where a target is -100."""
        logits = self.forward_logits(input_ids, target_ids.size(1))
        nll = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction="none")
        return nll.view_as(target_ids)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Return the mean loss in nats per token."""
        return self.token_nll(input_ids, target_ids).mean()


class CastMatrices:
    """The model's matrices, scaled and cast once for many passes without gradients, to the same bits as in each pass.

    A batch of scoring then launches 86 of Inductor's kernels and not 154, and moves 0.15 GB less of 29 (counted).
    """

    def __init__(self, model: GPT):
        scale_of = {}
        for block in model.blocks:
            scale_of[block.attn.proj] = block.attn_scale
            scale_of[block.mlp.proj] = block.mlp_scale
        self.scaled = list(scale_of)
        self.scales = [scale.unsqueeze(1) for scale in scale_of.values()]
        self.unscaled = [m for m in model.modules() if isinstance(m, Linear) and m not in scale_of]
        self.linears = self.scaled + self.unscaled
        self.tensors = [torch.empty_like(linear.weight, dtype=model.compute_dtype) for linear in self.linears]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Cast the weights as they are now, for the passes in this context, in which they must not change."""
        with torch.no_grad():
            scaled = torch._foreach_mul([linear.weight for linear in self.scaled], self.scales)
            torch._foreach_copy_(self.tensors, [*scaled, *(linear.weight for linear in self.unscaled)])
        for linear, tensor in zip(self.linears, self.tensors):
            linear.cast = tensor
        try:
            yield
        finally:
            for linear in self.linears:
                linear.cast = None


def bytes_per_token(h: Hyperparameters, rt: Runtime) -> float:
    """Return the bytes of GPU memory that a forward and backward pass takes for each token.

    The numbers of activations are fitted to the peaks of torch 2.11's allocator, and within 5% of them: 4 to 11 layers,
    D 512 and 768, MLP_MULT 3 and 4, V 1,024 and 8,192, compiled for an H200 and not (2026-11-28). Attention that keeps
    its T x T weights, as torch's does where it has no better kernel, comes on top.
    """
    hidden = h.mlp_mult * h.model_dim
    passes = h.num_layers + len(h.recur_blocks)
    if rt.compiled:
        activations = passes * (10.6 * h.model_dim + 2 * hidden) + 5 * h.model_dim + h.vocab_size
    else:
        activations = passes * (17 * h.model_dim + 3 * hidden) + 10.5 * h.model_dim + 8 * h.vocab_size
    return activations * rt.dtype.itemsize


# ============================================== 5  PARAMETER GROUPS ===================================================
class ParamGroup(NamedTuple):
    """How the parameters whose whole name matches `pattern` are treated. Text in the last three fields names a knob."""

    name: str
    pattern: str
    optimizer: str  # muon or adamw
    lr: str
    weight_decay: str | float
    bits: str | int  # stored bits


BLOCK = r"blocks\.\d+\."
CONTROL = BLOCK + r"(attn_scale|mlp_scale|resid_mix)"
CONTROL += "|" + BLOCK + r"attn\.(q_gain|vr_lambda|attn_gate\.weight|attn_gate\.bias|head_gate)"
CONTROL += r"|skip_weights|skip_gates|smear\.gate|\w+\.scale|ve_layer_scales\.\d+"
PARAM_GROUPS = (
    ParamGroup("attention", BLOCK + r"attn\.(c_q|c_k|c_v|proj)\.weight", "muon", "matrix_lr", "muon_wd", "attn_bits"),
    ParamGroup("mlp", BLOCK + r"mlp\.(fc|proj)\.weight", "muon", "matrix_lr", "muon_wd", "mlp_bits"),
    ParamGroup("projection", r"(bigram|ve_shared)\.proj\.weight", "muon", "matrix_lr", "muon_wd", "proj_bits"),
    ParamGroup("embedding", r"(tok_emb|ve_shared\.embed)\.weight", "adamw", "tied_embed_lr", "adam_wd", "embed_bits"),
    ParamGroup("hash_table", r"bigram\.embed\.weight", "adamw", "tied_embed_lr", "adam_wd", "bigram_bits"),
    # No decay: gains start at 1, and decay would pull them, and whole blocks with them, towards 0.
    ParamGroup("control", CONTROL, "adamw", "scalar_lr", 0.0, 16),
)


def param_group_of(name: str) -> ParamGroup:
    """Return the group of a parameter. Every parameter has exactly one."""
    found = [group for group in PARAM_GROUPS if re.fullmatch(group.pattern, name)]
    assert len(found) == 1, f"parameter {name} is in the groups {[group.name for group in found]}"
    return found[0]


def family_of(name: str) -> str:
    """Return the name of a stored tensor's group, or "other": a file may be of another script."""
    return next((group.name for group in PARAM_GROUPS if re.fullmatch(group.pattern, name)), "other")


def knob_or_value(h: Hyperparameters, field: str | float) -> Any:
    """Return the value of the knob that `field` names, or `field` itself if it is a number."""
    return getattr(h, field) if isinstance(field, str) else field


def stored_bits(h: Hyperparameters, name: str) -> int:
    """Return the bits in which the artifact stores each value of a parameter; 16 is fp16."""
    if any(part in name for part in h.fp16_patterns):
        return 16
    return knob_or_value(h, param_group_of(name).bits)


# =================================================== 6  OPTIMIZER =====================================================
def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return wide matrices (n, rows, cols), in `dtype`, with the singular vectors of the given ones and singular values
    near 1.

    The quintic iteration of Muon (Jordan et al. 2024): small singular values grow fast, all end in about [0.7, 1.2].
    """
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x


class MuonGroup(NamedTuple):
    """Muon's matrices of one shape, tall ones transposed to be wide. An MLP's fc and proj share a group: 22 matrices,
    which 8 ranks pad to 24 (9%); two groups of 11 would be padded to 32 (45%)."""

    wide: list[nn.Parameter]  # (rows, cols)
    tall: list[nn.Parameter]  # (cols, rows)
    momentum: Tensor  # this rank's equal part of all n, (ceil(n / world size), rows, cols)
    lr: float
    weight_decay: float

    @property
    def tall_lr(self) -> float:
        """Muon's learning rate of the tall ones: larger by the root of the aspect ratio."""
        rows, cols = self.momentum.shape[1:]
        return self.lr * (cols / rows) ** 0.5


class Optimizer:
    """Parallel Muon on the matrices, AdamW on everything else.

    Each Muon group is reduce-scattered, orthogonalized in parts, and gathered, the largest first; while one travels,
    the next is computed. Gradients are averaged over the processes first and clipped by their joint norm then: clipping
    before would scale each rank differently.
    """

    def __init__(self, h: Hyperparameters, rt: Runtime, model: nn.Module):
        self.h = h
        self.rt = rt
        self.model = model
        self.orthogonalize = rt.compile(newton_schulz)
        matrices = collections.defaultdict(list)  # (rows, cols, lr, decay) -> Muon's parameters
        others = collections.defaultdict(list)  # (lr, weight decay) -> AdamW's parameters
        for name, parameter in model.named_parameters():
            group = param_group_of(name)
            lr = knob_or_value(h, group.lr)
            weight_decay = knob_or_value(h, group.weight_decay)
            if group.optimizer == "muon":
                rows, cols = sorted(parameter.shape)
                matrices[rows, cols, lr, weight_decay].append(parameter)
            else:
                others[lr, weight_decay].append(parameter)
        # In the order of the model, in which they are saved: by size, it would depend on the number of processes.
        self.saved_groups = [self._muon_group(*key, parameters) for key, parameters in matrices.items()]
        self.muon_groups = sorted(self.saved_groups, key=lambda group: group.momentum.numel(), reverse=True)
        adamw_groups = []
        for (lr, weight_decay), parameters in others.items():
            adamw_groups.append({"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay})
        betas = (h.beta1, h.beta2)
        self.adamw = torch.optim.AdamW(adamw_groups, betas=betas, eps=h.adam_eps, fused=rt.device.type != "mps")
        self.replicated = [p for group in adamw_groups for p in group["params"]]
        self.norms = torch.zeros(0, device=rt.device)  # of this rank's gradients in the last step; see `reduce`
        zeros = [torch.zeros_like(p) for p in self.replicated]
        self.set_adamw_state(zeros, [z.clone() for z in zeros], num_steps=0)

    def _muon_group(
        self, rows: int, cols: int, lr: float, weight_decay: float, parameters: list[nn.Parameter]
    ) -> MuonGroup:
        part_size = math.ceil(len(parameters) / self.rt.world_size)
        momentum = torch.zeros(part_size, rows, cols, device=self.rt.device)
        wide = [p for p in parameters if p.size(0) == rows]
        tall = [p for p in parameters if p.size(0) != rows]
        return MuonGroup(wide, tall, momentum, lr, weight_decay)

    def first_not_finite(self, norms: list[float]) -> str:
        """Return the first parameter of the model whose gradient is not finite on any rank, where that of another one
        is, from what `norms` were."""
        own = []  # this rank's parameters, in the order of `norms`
        for group in self.muon_groups:
            part_size = len(group.momentum)
            padded = [*group.wide, *group.tall] + [None] * (part_size * self.rt.world_size)
            own += padded[self.rt.rank * part_size : (self.rt.rank + 1) * part_size]
        own += self.replicated
        order = [id(parameter) for parameter in self.model.parameters()]
        wrong = [order.index(id(p)) for p, norm in zip(own, norms) if not math.isfinite(norm)]
        first = int(self.rt.least(min(wrong, default=len(order))))
        are_all_wrong = self.rt.least(len(wrong) == len(own) - own.count(None)) == 1
        if first == len(order) or are_all_wrong:
            return ""
        return [name for name, _ in self.model.named_parameters()][first]

    def set_adamw_state(self, means: list[Tensor], squares: list[Tensor], num_steps: int) -> None:
        """Set AdamW's running means of the gradients and of their squares, in the order of `replicated`."""
        content = self.adamw.state_dict()
        for i, (mean, square) in enumerate(zip(means, squares)):
            step = torch.tensor(float(num_steps))
            content["state"][i] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self.adamw.load_state_dict(content)

    def state(self) -> list[Tensor]:
        """Return the state of both optimizers, whole, whatever the number of processes, which all have to call this:
        the momenta of each Muon group in the order of its parameters, then AdamW's means and squares."""
        momenta = []
        for group in self.saved_groups:
            whole = self.rt.all_gather(group.momentum)()
            momenta.append(whole[: len(group.wide) + len(group.tall)])
        states = [self.adamw.state[p] for p in self.replicated]
        return momenta + [state["exp_avg"] for state in states] + [state["exp_avg_sq"] for state in states]

    def load_state(self, tensors: list[Tensor], num_steps: int) -> None:
        """Take over what `state` returned after `num_steps` steps, perhaps of another number of processes."""
        num_groups, num_replicated = len(self.saved_groups), len(self.replicated)
        for group, whole in zip(self.saved_groups, tensors):
            part_size = len(group.momentum)
            part = whole[self.rt.rank * part_size : (self.rt.rank + 1) * part_size]
            group.momentum[: len(part)] = part
        means, squares = tensors[num_groups : num_groups + num_replicated], tensors[num_groups + num_replicated :]
        self.set_adamw_state(means, squares, num_steps)

    def reduce(self) -> tuple[list[Tensor], Tensor]:
        """Average the gradients over the processes. Return this rank's part of each Muon group, and the joint norm.
        Keep the norm of each of this rank's gradients in `norms`: its parts of the Muon groups, and AdamW's."""
        world_size = self.rt.world_size
        in_transit = []
        for group in self.muon_groups:
            gradients = [p.grad for p in group.wide] + [p.grad.mT for p in group.tall]  # (rows, cols) each
            num_missing = len(group.momentum) * world_size - len(gradients)
            if num_missing:
                gradients += [torch.zeros_like(gradients[0])] * num_missing
            in_transit.append(self.rt.reduce_scatter(torch.stack(gradients)))
        average_gradients(self.rt, self.replicated)
        parts = [wait() for wait in in_transit]
        torch._foreach_div_(parts, world_size)
        own = [matrix for part in parts for matrix in part] + [p.grad for p in self.replicated]
        self.norms = torch.stack(torch._foreach_norm(own))
        squares = self.rt.all_reduce(sum_of_squares(parts))
        squares = squares + sum_of_squares([p.grad for p in self.replicated])
        return parts, squares.sqrt()

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """Update the parameters, drop their gradients and return their norm before clipping."""
        parts, norm = self.reduce()
        clip = norm.new_ones(())
        if self.h.grad_clip_norm:
            clip = (self.h.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, clip)
        self._muon_step(parts, lr_scale, momentum)
        torch._foreach_mul_([p.grad for p in self.replicated], clip)
        set_learning_rates(self.adamw, lr_scale)
        self.adamw.step()
        self.model.zero_grad(set_to_none=True)
        return norm

    def _muon_step(self, gradients: list[Tensor], lr_scale: float, momentum: float) -> None:
        """Update Muon's parameters with this rank's parts of the clipped gradients, which are overwritten."""
        momenta = [group.momentum for group in self.muon_groups]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_add_(gradients, momenta, alpha=momentum)  # Nesterov
        in_transit = []
        for group, nesterov in zip(self.muon_groups, gradients):
            if self.h.muon_row_norm:
                self._normalize_rows(group, nesterov)
            update = self.orthogonalize(nesterov, self.h.muon_backend_steps, self.rt.dtype)
            in_transit.append(self.rt.all_gather(update))
        for group, wait in zip(self.muon_groups, in_transit):
            updates = wait().float()
            num_wide = len(group.wide)
            tall = updates[num_wide : num_wide + len(group.tall)].mT.contiguous()
            torch._foreach_mul_(group.wide + group.tall, 1 - lr_scale * group.lr * group.weight_decay)
            # Lists of one layout each: otherwise these would be loops over the parameters.
            if group.wide:
                torch._foreach_add_(group.wide, list(updates[:num_wide]), alpha=-lr_scale * group.lr)
            if group.tall:
                torch._foreach_add_(group.tall, list(tall), alpha=-lr_scale * group.tall_lr)

    def _normalize_rows(self, group: MuonGroup, part: Tensor) -> None:
        """Divide the rows of this rank's part of a group by their lengths, in place (MuonEq-R, PR 1260). The rows of
        tall matrices lie in it as columns."""
        num_wide = max(0, len(group.wide) - self.rt.rank * len(part))
        for matrices, dim in ((part[:num_wide], 2), (part[num_wide:], 1)):
            matrices.div_(matrices.norm(dim=dim, keepdim=True).clamp_min(1e-7))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all values, in a few launches for any number of tensors."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def set_learning_rates(optimizer: torch.optim.Optimizer, lr_scale: float) -> None:
    """Set every group's learning rate to its peak times `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale


def average_gradients(rt: Runtime, parameters: list[nn.Parameter]) -> None:
    """Replace the gradients by their means over the processes, in one collective."""
    if rt.world_size == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    flat = rt.all_reduce(flat).mul_(1 / rt.world_size)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def learning_rate_scale(h: Hyperparameters, step: int, elapsed: float, step_seconds: float) -> float:
    """Return the factor in [0, 1] on all learning rates: 1, then linear to 0 at the run's end, by steps or by clock.

    The warm-down takes WARMDOWN_FRAC of the run on any machine, or WARMDOWN_ITERS steps of `step_seconds` each.
    """
    if h.warmdown_iters:
        steps_left = h.iterations - step
        budget = training_budget(h)
        if budget and step_seconds:
            steps_left = min(steps_left, (budget - elapsed) / step_seconds)
        return min(1.0, max(0.0, steps_left / h.warmdown_iters))
    if not h.warmdown_frac:
        return 1.0
    return min(1.0, max(0.0, part_left(h, step, elapsed)) / h.warmdown_frac)


def part_left(h: Hyperparameters, step: int, elapsed: float) -> float:
    """Return the part of the training that is still to come, by steps or by clock, whichever is less."""
    part = (h.iterations - step) / h.iterations
    budget = training_budget(h)
    return min(part, 1 - elapsed / budget) if budget else part


def muon_momentum(h: Hyperparameters, step: int) -> float:
    """Return Muon's momentum at a step: linear from the start of its warm-up to the end."""
    if not h.muon_momentum_warmup_steps:
        return h.muon_momentum
    done = min(1.0, step / h.muon_momentum_warmup_steps)
    return (1 - done) * h.muon_momentum_warmup_start + done * h.muon_momentum


def cosine(done: float) -> float:
    """Return the half cosine from 1 at done = 0 to 0 at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


# =================================================== 7  TRAINING ======================================================
class Run(NamedTuple):
    """One run: settings, machine, model, and what it is trained and scored on."""

    h: Hyperparameters
    rt: Runtime
    model: GPT
    mean_loss: Callable  # model.forward, compiled where that is on
    token_nll: Callable  # model.token_nll, likewise
    train_shards: list[Shard]
    val: Validation
    code: bytes  # the script as it is shipped and counted
    calibrated: Mapping[str, Any] = MappingProxyType({})  # what each calibration returned, by name


def training_budget(h: Hyperparameters) -> float:
    """Return the seconds that steps may take: MAX_WALLCLOCK_SECONDS less what calibrations reserve. 0 is no limit."""
    if not h.max_wallclock_seconds:
        return 0.0
    reserved = sum(reserved_seconds(h, calibration) for calibration in calibrations(h))
    if reserved >= h.max_wallclock_seconds:
        cap = f"MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g}"
        raise UserError(
            f"calibrations reserve {reserved:g} s, and {cap} leaves no time to train: raise it, or reserve less"
        )
    return h.max_wallclock_seconds - reserved


def build_run(h: Hyperparameters, rt: Runtime, decoded: GPT | None = None) -> Run:
    """Return a run with checked data and the given or initial model, equal on all ranks, compiled where that is on."""
    if 0 < h.eval_attn_window < h.train_seq_len:
        least = f"TRAIN_SEQ_LEN={h.train_seq_len}, with which the model was trained"
        raise UserError(f"EVAL_ATTN_WINDOW={h.eval_attn_window} is smaller than {least}: use that or more")
    val = load_validation_tokens(h)
    shards = []
    if h.export_only and h.first_stage == "calibrate":
        has_shards = any(find_path(h.data_path, "DATA_PATH").glob("*_train_*.bin"))
        if rt.least(has_shards) == 0:
            h.first_stage = "export"
            rt.warn(f"GPTQ_ENABLED=1 needs training shards in DATA_PATH={h.data_path}: the clip search quantizes")
    if h.first_stage in ("train", "calibrate"):
        shards = load_shards(h, "train")
        batch_plan(h, rt)  # raises now what training would raise later
        training_budget(h)
    model = (decoded or GPT(h)).to(rt.device)
    num_blocks = len(model.blocks)
    if set(model.block_order) != set(range(num_blocks)):
        raise UserError(f"block_order={model.block_order} must contain each of the {num_blocks} blocks at least once")
    names = [name for name, _ in model.named_parameters()]
    for part in (*h.fp16_patterns, *h.ttt_multipliers):
        if not any(part in name for name in names):
            raise UserError(f"{part}, in FP16_KEEP_NAME_PATTERNS or TTT_LR_GROUPS, is in no parameter's name: fix it")
    for parameter in model.parameters():
        rt.broadcast(parameter.data)
    model.compute_dtype = rt.dtype
    return Run(h, rt, model, rt.compile(model.forward), rt.compile(model.token_nll), shards, val, shipped_code(h))


# Between the points of a training's curve in metrics.jsonl, at least. They are at multiples of a power of two steps, so
# that a slow run has all points of a fast one.
POINT_SECONDS = 2.0


class Trainer:
    """The training step, and the state of a training in progress: weights, optimizer, averages, clock.

    What is exported is an average, in fp32. The EMA's decay is min(EMA_DECAY, (1 + step) / (10 + step)), so that short
    runs forget their initialisation: a constant 0.997 still holds 41% of it after 300 steps.
    """

    def __init__(self, run: Run):
        self.run = run
        self.parameters = list(run.model.parameters())
        self.optimizer = Optimizer(run.h, run.rt, run.model)
        self.ema = [p.detach().clone() for p in self.parameters] if run.h.ema_enabled else []
        self.swa = [torch.zeros_like(p) for p in self.parameters] if run.h.swa_enabled else []
        self.num_snapshots = 0  # that `swa` is the sum of
        self.num_steps = 0  # taken so far
        self.gradient_norm = torch.zeros((), device=run.rt.device)  # of the last step
        self.num_segments = 1  # that took them: more, if the run was stopped and went on
        self.started = 0.0  # start of the clock, pauses excluded
        self.elapsed = 0.0  # seconds on rank 0's clock after the last step
        # Steps are timed from the second on, as the first two pay for caches, and again from where they become longer.
        self.settled = 0.0  # `elapsed` there
        self.settled_steps = 0  # `num_steps` there
        self.step_seconds = 0.0  # mean duration of a step
        self.num_passes = len(run.model.blocks)  # through blocks in a step: more, once RECUR_LAYERS run twice
        self.last_line = 0.0  # `elapsed` at the last log line
        self.stop_signal = 0  # that all ranks know of

    def step(self, lr_scale: float, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Train on the micro-batches and return the mean loss over them and the processes, on the device."""
        rt = self.run.rt
        loss = self.backward(batch)
        self.gradient_norm = self.optimizer.step(lr_scale, muon_momentum(self.run.h, self.num_steps))
        self.num_steps += 1
        self.update_averages(self.num_steps, lr_scale)
        return rt.all_reduce(loss / rt.world_size)

    def numbers_of_step(self, loss: Tensor) -> Tensor:
        """Return the loss of the last step, the norm of its gradient, and those of this rank's parts of it."""
        return torch.cat([loss.view(1), self.gradient_norm.view(1), self.optimizer.norms])

    def backward(self, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the gradients of the mean loss over this rank's micro-batches, and return that loss."""
        total = torch.zeros((), device=self.run.rt.device)
        sums = []
        for x, y in batch:
            loss = self.run.mean_loss(x, y) / len(batch)
            loss.backward()
            total += loss.detach()
            sums = self._add_gradients(sums)
        for parameter, gradient in zip(self.parameters, sums):
            parameter.grad = gradient
        return total

    def _add_gradients(self, sums: list[Tensor]) -> list[Tensor]:
        """Take the gradients from the parameters and return their sums with earlier ones: a few launches, where
        backward into gradients that are there adds each by itself."""
        gradients = [p.grad for p in self.parameters]
        self.run.model.zero_grad(set_to_none=True)
        if sums:
            torch._foreach_add_(sums, gradients)
        return sums or gradients

    @torch.no_grad()
    def update_averages(self, step: int, lr_scale: float) -> None:
        """Add the weights after step number `step`, counted from 1, to the averages."""
        h = self.run.h
        if self.ema:
            decay = min(h.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        if self.swa and lr_scale < h.swa_start_frac and step % h.swa_every == 0:
            torch._foreach_add_(self.swa, self.ema or self.parameters)
            self.num_snapshots += 1

    @torch.no_grad()
    def apply_average(self) -> str:
        """Copy the average into the model and return a line on what was averaged."""
        average = self.ema
        if self.num_snapshots:
            average = torch._foreach_div(self.swa, self.num_snapshots)
        if average:
            torch._foreach_copy_(self.parameters, average)
        line = f"averaging: EMA {'on' if self.ema else 'off'}, SWA of {self.num_snapshots} snapshots"
        if self.swa and not self.num_snapshots:
            line += "; WARNING: no SWA snapshot was taken, see SWA_EVERY"
        return line

    NUMBERS = (
        "num_steps", "num_segments", "num_snapshots", "elapsed", "settled", "settled_steps", "step_seconds",
        "last_line", "num_passes",
    )  # fmt: skip

    def state(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return all that the next steps depend on: numbers, and tensors, whole, which every rank has to help with."""
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        numbers["random"] = self.run.rt.random_state()
        weights = [p.detach() for p in self.parameters]
        return numbers, [*weights, *self.ema, *self.swa, *self.optimizer.state()]

    @torch.no_grad()
    def load_state(self, numbers: dict[str, Any], tensors: list[Tensor]) -> None:
        """Take over what `state` returned."""
        for name in self.NUMBERS:
            number = type(getattr(self, name))(numbers[name])
            if not 0 <= number < BIG:
                raise ValueError(f"{name} is {number}")
            setattr(self, name, number)
        if self.run.model.recur_blocks:
            self.run.model.set_recurrence(self.num_passes > len(self.run.model.blocks))
        self.run.rt.set_random_state(numbers["random"])
        own = [*self.parameters, *self.ema, *self.swa]
        device = self.run.rt.device
        tensors = [tensor.to(device) for tensor in tensors]
        torch._foreach_copy_(own, tensors[: len(own)])
        self.optimizer.load_state(tensors[len(own) :], self.num_steps)

    def start_clock(self) -> None:
        """Start the clock, or resume it at `elapsed`."""
        self.started = self.run.rt.now() - self.elapsed

    def tick(self) -> None:
        """Read the clock after a step, and whether a signal has come. All ranks take rank 0's readings."""
        self.elapsed, self.stop_signal = self.run.rt.readings(self.started)
        if self.num_steps <= 2:
            self.settled, self.settled_steps = self.elapsed, self.num_steps
            self.step_seconds = self.elapsed / self.num_steps
        else:
            self.step_seconds = (self.elapsed - self.settled) / (self.num_steps - self.settled_steps)

    def switch_recurrence(self) -> None:
        """Let RECUR_LAYERS run twice from RECUR_START_FRAC of the training on, whose clock is rank 0's."""
        h, model = self.run.h, self.run.model
        if not model.recur_blocks:
            return
        before = self.num_passes
        model.set_recurrence(part_left(h, self.num_steps, self.elapsed) <= 1 - h.recur_start_frac)
        self.num_passes = len(model.block_order)
        if self.num_passes > before:
            self.settled, self.settled_steps = self.elapsed, self.num_steps
            self.step_seconds *= self.num_passes / before
            when = f"from step {self.num_steps + 1} on, after {self.elapsed:.1f}s"
            self.run.rt.log(f"recurrence: blocks {h.recur_layers} run twice {when}")
            self.run.rt.record("recurrence", step=self.num_steps, seconds=self.elapsed)

    def may_step(self) -> bool:
        """Return whether another step, with those in flight, will end within the budget."""
        budget = training_budget(self.run.h)
        time_needed = 1.05 * self.step_seconds * (1 + self.run.rt.lag)
        in_time = not budget or self.elapsed + time_needed <= budget
        return self.num_steps < self.run.h.iterations and in_time

    def lr_scale(self) -> float:
        """Return the learning-rate factor of the next step. The first steps are too slow to be extrapolated."""
        step_seconds = self.step_seconds if self.num_steps > 2 else 0.0
        return learning_rate_scale(self.run.h, self.num_steps, self.elapsed, step_seconds)

    def check_and_log(self, numbers: list[float] | None, lr_scale: float) -> None:
        """Log the step that the numbers are of, if there are any and a line is due. Raise UserError if its loss or its
        gradient is not finite."""
        h, rt = self.run.h, self.run.rt
        step = self.num_steps - rt.lag
        if self.num_steps == 4 and lr_scale < 1 and h.warmdown_iters:
            rt.log(f"WARNING: WARMDOWN_ITERS={h.warmdown_iters} steps do not fit into this run: use WARMDOWN_FRAC")
        if numbers is None:
            return
        self.check_step(step, numbers)
        loss = numbers[0]
        rate = h.train_batch_tokens / self.step_seconds
        is_last = self.num_steps == h.iterations
        has_line = step <= 10 or step % h.train_log_every == 0 or is_last or self.elapsed - self.last_line > 30
        if has_line:
            self.last_line = self.elapsed
            self._log_step(step, loss, lr_scale, rate)
        steps_apart = 2 ** max(0, math.ceil(math.log2(POINT_SECONDS / self.step_seconds)))
        if has_line or step % steps_apart == 0:
            fields = {"seconds": self.elapsed, "tokens_per_second": rate, "lr_scale": lr_scale}
            rt.record("train", step=step, train_loss=loss, **fields)

    def check_step(self, step: int, numbers: list[float]) -> None:
        """Raise UserError if a step's loss or gradient is not finite. States with such values are never kept."""
        h = self.run.h
        loss, norm, *norms = numbers
        if math.isfinite(loss + norm):
            return
        name = self.optimizer.first_not_finite(norms)
        where, fix = f", the norm of the gradient {norm}", f"lower MATRIX_LR={h.matrix_lr} or another rate"
        if name:
            where = f", the gradient of {name} is not finite"
            rate = param_group_of(name).lr
            fix = f"lower {rate.upper()}={getattr(h, rate)}"
        kept = ", ".join(sorted(path.name for path in self.run.rt.run_dir.glob("checkpoint-*.bin")))
        kept = f"; {kept} stay in {self.run.rt.run_dir}" if kept else ""
        raise UserError(f"step {step}: train_loss is {loss}{where}: {fix}{kept}")

    def _log_step(self, step: int, loss: float, lr_scale: float, rate: float) -> None:
        h = self.run.h
        seconds_left = (h.iterations - self.num_steps) * self.step_seconds
        budget = training_budget(h)
        if budget:
            seconds_left = max(0.0, min(seconds_left, budget - self.elapsed))
        times = f"train_time:{1000 * self.elapsed:.0f}ms step_avg:{1000 * self.step_seconds:.2f}ms tok/s:{rate:,.0f}"
        rest = f"lr_scale:{lr_scale:.4f} left:{seconds_left:.0f}s"
        self.run.rt.log(f"step:{step}/{h.iterations} train_loss:{loss:.4f} {times} {rest}")

    def validate_if_due(self) -> None:
        """Log the validation score every VAL_LOSS_EVERY steps, with the clock stopped."""
        h, rt = self.run.h, self.run.rt
        is_last = self.num_steps == h.iterations
        if not h.val_loss_every or self.num_steps % h.val_loss_every or is_last:
            return
        paused = rt.now()
        log_score(rt, f"step:{self.num_steps}/{h.iterations}", eval_val(self.run))
        self.started += rt.now() - paused


class Checkpoints:
    """Keeps the last two states of a training in the run's folder.

    A thread writes them, from a copy on the host: a step waits for the copy alone. They have the form of an artifact,
    with a checksum, and are parsed and never executed. Rank 0 has the files; others get its bytes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.h = trainer.run.h
        self.rt = trainer.run.rt
        self.saved = 0.0  # the training's `elapsed` at the last one
        self.copies: list[Tensor] = []  # rank 0's, of the trainer's state
        self.pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: concurrent.futures.Future | None = None
        _, tensors = trainer.state()
        self.shapes = [tensor.shape for tensor in tensors]
        if self.rt.rank == 0:
            pin = self.rt.device.type == "cuda"
            self.copies = [torch.empty_like(tensor, device="cpu", pin_memory=pin) for tensor in tensors]
        self.rt.lifeline.on_leaving = functools.partial(self.wait, timeout=3)  # of a device that may never be done

    def restore(self) -> None:
        """Go on from the newest checkpoint in the run's folder, if there is one."""
        blob = self.rt.on_rank0(self._read_newest)
        if not blob:
            return
        header, tensors = parse(blob, "the checkpoint")
        try:
            if [tensor.shape for tensor in tensors.values()] != self.shapes:
                raise ValueError("its tensors have other shapes")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("its tensors are not finite")
            self.trainer.load_state(header["training"], list(tensors.values()))
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"the newest checkpoint in {self.rt.run_dir} is of another training ({error!r})") from None
        self.saved = self.trainer.elapsed
        self.trainer.num_segments += self.trainer.may_step()
        where = f"step {self.trainer.num_steps}, {self.trainer.elapsed:.1f}s of training"
        self.rt.log(f"resumed: from the checkpoint after {where}")
        self.rt.record("resumed", step=self.trainer.num_steps, seconds=self.trainer.elapsed)

    def _paths(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = {}
        for path in self.rt.run_dir.glob("checkpoint-*.bin"):
            step = path.stem.partition("-")[2]
            if step.isdecimal():
                found[int(step)] = path
        return [found[step] for step in sorted(found)]

    def _read_newest(self) -> bytes:
        for path in reversed(self._paths()):
            blob = read_file(path, LARGEST_FILE)  # one that cannot be read ends this: it may be as good as any
            try:
                parse(blob, str(path))
                return blob
            except UserError as error:
                self.rt.log(f"WARNING: {error}; the checkpoint before it is taken, if there is one")
                path.rename(f"{path}.damaged")
        return b""

    def after_step(self) -> None:
        """Save the state every CHECKPOINT_EVERY seconds. Where a signal has come, save it and raise Stopped."""
        trainer = self.trainer
        is_due = self.h.checkpoint_every and trainer.elapsed - self.saved >= self.h.checkpoint_every
        if is_due or trainer.stop_signal:
            self.save()
        self._stop_if_asked()

    def after_training(self) -> None:
        """Save the last state. Raise Stopped where a signal has come."""
        self.save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.trainer.stop_signal:
            self.wait()
            self.rt.broadcast_from_rank0(0)  # the others wait for it, too: a rank that leaves takes all with it
            raise Stopped(self.trainer.stop_signal)

    def save(self) -> None:
        """Copy the state, which is then written by the thread."""
        start = time.perf_counter()
        self.saved = self.trainer.elapsed
        numbers, tensors = self.trainer.state()
        if self.rt.rank != 0:
            return
        self.wait()  # for the one before, whose copies are taken again
        for copied, tensor in zip(self.copies, tensors):
            copied.copy_(tensor, non_blocking=copied.is_pinned())
        arrived = self.rt.mark()
        waited = time.perf_counter() - start
        self.writing = self.pool.submit(self._write, numbers, arrived, waited)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the last checkpoint is written, but no more than `timeout` seconds."""
        if self.writing is not None:
            concurrent.futures.wait([self.writing], timeout)

    def close(self) -> None:
        """Wait, and keep nothing: not the optimizer's state, nor the training shards."""
        self.wait()
        self.pool.shutdown()
        self.rt.lifeline.on_leaving = None

    def _write(self, numbers: dict[str, Any], arrived: Callable[[], None], waited: float) -> None:
        rt, step = self.rt, numbers["num_steps"]
        start = time.perf_counter()
        arrived()
        if not all(copied.isfinite().all() for copied in self.copies):  # a loss is looked at one step later on CUDA
            rt.warn(f"the state after step {step} is not finite, so it is not kept")
            return
        tensors = [Stored(str(i), 32, copied, None) for i, copied in enumerate(self.copies)]
        pieces = frame(self.h, tensors, 0.0, "none", training=numbers)
        try:
            write_atomically(rt.run_dir / f"checkpoint-{step}.bin", *pieces)
            for old in self._paths()[:-2]:
                old.unlink()
        except OSError as error:
            reason = os_error_line(error)
            rt.warn(f"the checkpoint after step {step} was not written ({reason}); the one before it stays")
            return
        seconds, size = time.perf_counter() - start, sum(map(len, pieces))
        times = f"written in {seconds:.2f}s, for which the steps waited {1000 * waited:.1f}ms"
        rt.log(f"checkpoint: after step {step}, {size:,} bytes {times}")
        rt.record("checkpoint", step=step, bytes=size, seconds=seconds, waited_seconds=waited)


def train(run: Run) -> dict[str, Any]:
    """Train the model, leave the averaged weights in it, and return the training's stats.

    Where the run's folder has a checkpoint, the training goes on from there.
    """
    h, rt = run.h, run.rt
    trainer = Trainer(run)
    checkpoints = Checkpoints(trainer)
    checkpoints.restore()
    loader = TokenLoader(h, rt, run.train_shards, trainer.num_steps)
    trainer.start_clock()
    rt.finishes_steps = True
    if trainer.num_steps:
        trainer.validate_if_due()  # which the run was stopped before
    trainer.switch_recurrence()
    while trainer.may_step():
        lr_scale = trainer.lr_scale()
        loss = trainer.step(lr_scale, loader.next_batch())
        lagged_numbers = rt.lagged_list(trainer.numbers_of_step(loss))
        trainer.tick()
        trainer.check_and_log(lagged_numbers, lr_scale)
        checkpoints.after_step()
        trainer.validate_if_due()
        trainer.switch_recurrence()
    last_numbers = rt.pending_list()
    if last_numbers is not None:
        trainer.check_step(trainer.num_steps, last_numbers)
    seconds = rt.broadcast_from_rank0(rt.now() - trainer.started)
    trainer.elapsed, trainer.stop_signal = seconds, rt.readings(0.0)[1]
    checkpoints.after_training()
    rt.finishes_steps = False
    if run.model.recur_blocks:
        if trainer.num_passes == len(run.model.blocks):
            rt.warn(f"training ended before RECUR_START_FRAC={h.recur_start_frac:g}: no step had the second passes")
        run.model.set_recurrence(True)
    steps = trainer.num_steps
    step_avg_ms = 1000 * seconds / steps
    epochs = steps * h.train_batch_tokens / loader.num_tokens
    rt.record("trained", steps=steps, seconds=seconds)
    rt.log(f"trained: steps:{steps} train_time:{1000 * seconds:.0f}ms step_avg:{step_avg_ms:.2f}ms epochs:{epochs:.4f}")
    log_score(rt, "raw", eval_val(run))
    rt.log(trainer.apply_average())
    averaged = eval_val(run)
    log_score(rt, "averaged", averaged)
    checkpoints.close()
    checkpoint = write_checkpoint(run)
    times = {"train_seconds": seconds, "step_avg_ms": step_avg_ms, "data_wait_seconds": loader.waited}
    stats = {"steps": steps, "train_segments": trainer.num_segments, **times, "epochs": epochs}
    return stats | {"checkpoint": checkpoint, "averaged_bpb": averaged.val_bpb}


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, in this context, and not in TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Curvature(NamedTuple):
    """What training tokens say of a quantized parameter: how much an error in it costs."""

    importance: float  # mean over its weights of the squared gradient
    dead: Tensor | None = None  # columns whose input is always 0: bool (cols,). None for tables, as are the next two
    order: Tensor | None = None  # columns by descending mean square of their input: int64 (cols,)
    factor: Tensor | None = None  # U (cols, cols), upper triangular, with U^T U = (H + damping)^-1 in that order


class CurvatureSums:
    """Sums over training tokens, for each quantized parameter: squared gradients, and the Hessian H = sum x x^T of the
    inputs x of each linear map. The token embedding is one too, as the head."""

    HEAD = "tok_emb.weight"
    DAMPING = 0.01  # of the mean of H's diagonal; 0.01 to 0.05 in published systems, without a measured difference

    def __init__(self, run: Run):
        self.run = run
        self.model = run.model
        self.quantized = {n: p for n, p in run.model.named_parameters() if stored_bits(run.h, n) < 16}
        device = run.rt.device
        # fp64 where there is one: of fp32 products, it makes the sums the same in whatever order ranks add them.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.squares = {name: torch.zeros((), dtype=self.dtype, device=device) for name in self.quantized}
        self.linears = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Linear) and f"{name}.weight" in self.quantized:
                self.linears[f"{name}.weight"] = module
        self.hessians = {}  # name -> (cols, cols)
        for name in [*self.linears, self.HEAD]:
            if name in self.quantized:
                cols = self.quantized[name].size(1)
                self.hessians[name] = torch.zeros(cols, cols, dtype=self.dtype, device=device)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See the inputs of all linear maps, in this context. A fused MLP calls no modules, so none is used in it."""
        self.model.zero_grad(set_to_none=True)  # of the last step
        hooks = []
        for name, module in self.linears.items():
            see = functools.partial(self._see_input, name)
            hooks.append(module.register_forward_pre_hook(lambda _, arguments, see=see: see(arguments[0])))
        fused = [block.mlp.fused for block in self.model.blocks]
        for block in self.model.blocks:
            block.mlp.fused = None
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, kernel in zip(self.model.blocks, fused):
                block.mlp.fused = kernel

    def _see_input(self, name: str, x: Tensor) -> None:
        """Add inputs (…, cols). TF32 products of bf16 inputs are exact."""
        rows = x.detach().flatten(0, -2).float()
        self.hessians[name] += rows.T @ rows

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add the tokens of a pass, inputs and targets (B, T)."""
        states = self.model.hidden(inputs)
        if self.HEAD in self.hessians:
            self._see_input(self.HEAD, states)
        F.cross_entropy(self.model.head(states).flatten(0, 1), targets.flatten()).backward()
        for name, parameter in self.quantized.items():
            if parameter.grad is not None:
                # The gradient of a mean over n tokens is mostly noise, whose square falls as 1/n.
                self.squares[name] += parameter.grad.square().mean() * targets.numel()
        self.model.zero_grad(set_to_none=True)

    def reduce(self) -> None:
        """Sum over the processes."""
        for tensor in [*self.squares.values(), *self.hessians.values()]:
            self.run.rt.all_reduce(tensor)

    def solve(self) -> dict[str, Curvature]:
        """Return the curvature of each quantized parameter. Hessians of one size are factored in one batch."""
        device = self.run.rt.device
        curvatures = {name: Curvature(square.item()) for name, square in self.squares.items()}
        for name, curvature in curvatures.items():
            if not math.isfinite(curvature.importance):
                raise UserError(f"GPTQ met a gradient of {name} that is not finite: set GPTQ_ENABLED=0")
        by_size: dict[int, list[str]] = {}
        for name, hessian in self.hessians.items():
            by_size.setdefault(len(hessian), []).append(name)
        for names in by_size.values():
            hessians = torch.stack([self.hessians.pop(name).float() for name in names])
            if device.type == "mps":
                hessians = hessians.cpu()  # not all of torch's factorizations exist there
            for name, *parts in zip(names, *factor_hessians(hessians, self.DAMPING)):
                dead, order, factor = [part.to(device) for part in parts]
                if name == self.HEAD:
                    dead = torch.zeros_like(dead)  # as the embedding, such a column is still read
                curvatures[name] = Curvature(curvatures[name].importance, dead, order, factor)
        return curvatures


def factor_hessians(hessians: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for symmetric H (n, C, C): which columns are dead (n, C), the order of columns by descending diagonal
    (n, C), and the upper Cholesky factor U (n, C, C) of the inverse of H + damping in that order (Frantar et al. 2022).

    The damping is a part of the mean of H's diagonal: ten times as much for a matrix that is not positive definite in
    fp32 with it, as often as that takes.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    hessians = hessians.gather(1, order.unsqueeze(2).expand_as(hessians))
    hessians = hessians.gather(2, order.unsqueeze(1).expand_as(hessians))
    added = damping * hessians.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)  # (n, 1)
    for _ in range(12):
        damped = hessians.clone()
        damped.diagonal(dim1=1, dim2=2).add_(added)
        lower, failed_first = torch.linalg.cholesky_ex(damped)
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        is_bad = (failed_first != 0) | (failed != 0) | ~factor.isfinite().flatten(1).all(1)
        if not is_bad.any():
            return dead, order, factor
        added = torch.where(is_bad.unsqueeze(1), 10 * added, added)
    raise UserError("GPTQ's Hessians have no factor, as if activations were not finite: set GPTQ_ENABLED=0")


def measure_curvature(run: Run) -> dict[str, Curvature]:
    """Return, on rank 0, the curvature of each quantized parameter, from GPTQ_CALIBRATION_BATCHES of the training
    shards: those that training began with. All ranks sum, and any number of them finds the same if their passes have
    as many sequences."""
    h, rt = run.h, run.rt
    sums = CurvatureSums(run)
    loader = TokenLoader(h, rt, run.train_shards)
    progress = Progress(rt, "calibrating GPTQ", h.gptq_calibration_batches, "batch")
    with sums.watching():
        for _ in range(h.gptq_calibration_batches):
            start = rt.now()
            for x, y in loader.next_batch():
                rows = rt.max_rows.get("calibration", len(x))
                for inputs, targets in zip(x.split(rows), y.split(rows)):
                    sums.add(inputs, targets)
            rt.pass_seconds["calibration"] = rt.now() - start
            progress.advance(1)
    loader.pool.shutdown()
    start = rt.now()
    sums.reduce()
    curvatures = sums.solve() if rt.rank == 0 else {}
    rt.pass_seconds["factorization"] = rt.broadcast_from_rank0(rt.now() - start)
    return curvatures


class Calibration(NamedTuple):
    """Work between training and export that may read training shards, such as the statistics of activations.

    Its seconds belong to the 600 of training: steps stop earlier by `reserve_seconds`. `measure(run)` is called twice:
    in the preflight, on random shards and weights, and after training, on the real shards and the averaged weights.
    What it returns is `run.calibrated[name]` during the export.
    """

    name: str
    reserve_seconds: float | str  # text names a knob; auto is what the preflight predicts
    measure: Callable[[Run], Any]
    switch: str = ""  # knob that turns it on; empty: always on


CALIBRATIONS: tuple[Calibration, ...] = (
    Calibration("gptq", "gptq_reserve_seconds", measure_curvature, switch="gptq_enabled"),
)


def calibrations(h: Hyperparameters) -> list[Calibration]:
    """Return the calibrations that are on."""
    return [c for c in CALIBRATIONS if not c.switch or getattr(h, c.switch)]


def reserved_seconds(h: Hyperparameters, calibration: Calibration) -> float:
    """Return the seconds that are kept for a calibration. Before the preflight, auto is 0."""
    seconds = knob_or_value(h, calibration.reserve_seconds)
    return h.predicted_seconds.get(calibration.name, 0.0) if seconds == "auto" else seconds


def calibrate(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the calibrations, the last stage allowed to read training shards. Return their results by name, and stats."""
    rt = run.rt
    learned = {}
    total = 0.0
    for calibration in calibrations(run.h):
        name = calibration.name
        start = rt.now()
        learned[name] = calibration.measure(run)
        seconds = rt.broadcast_from_rank0(rt.now() - start)
        reserved = math.inf
        if training_budget(run.h) and not run.h.export_only:
            reserved = reserved_seconds(run.h, calibration)
        of_reserve = f" of {reserved:.1f}s" if math.isfinite(reserved) else ""
        warning = ", WARNING: more than was reserved" if seconds > reserved else ""
        rt.log(f"calibration took {seconds:.1f}s{of_reserve}: {name}{warning}")
        total += seconds
    shown = {name: value for name, value in learned.items() if isinstance(value, int | float | str)}
    return learned, {"calibration_seconds": total, "calibrated": shown}


class Trial(NamedTuple):
    """What kernels are tried on: arguments, the tensors whose gradients are compared, the output's gradient, and sets
    of arguments as scoring has them, without gradients."""

    arguments: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    output_grad: Tensor
    scoring: tuple[tuple[Tensor, ...], ...]

    def train(self, kernel: Callable) -> list[Tensor]:
        """Return the kernel's output and the gradients of the sources."""
        y = kernel(*self.arguments)
        return [y.detach(), *torch.autograd.grad(y, self.sources, self.output_grad)]

    def run(self, kernel: Callable) -> list[Tensor]:
        """Return what `train` does, and the outputs of scoring."""
        results = self.train(kernel)
        with torch.no_grad():
            return results + [kernel(*arguments) for arguments in self.scoring]


def relative_errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return |result - exact| / |exact| of each pair."""
    return [((result.double() - e).norm() / e.double().norm()).item() for result, e in zip(results, exact)]


def check_errors(results: list[Tensor], exact: list[Tensor], limits: list[float]) -> list[float]:
    """Return the relative errors. Raise ArithmeticError if one is over its limit."""
    errors = relative_errors(results, exact)
    if not all(error <= limit for error, limit in zip(errors, limits)):  # nan is not, either
        shown = ", ".join(f"{error:.1e} of {limit:.1e}" for error, limit in zip(errors, limits))
        raise ArithmeticError(f"it is wrong, the errors of outputs and gradients are {shown} allowed")
    return errors


def fastest_kernel(
    rt: Runtime,
    setting: str,
    candidates: dict[str, Callable[[], Callable]],
    definition: Callable,
    make_trial: Callable[[int, int, torch.dtype], Trial],
    shape: tuple[int, int],
) -> str:
    """Return the name of the fastest candidate that is right. Log how long each took, or why it cannot be used.

    Right is measured on two sequences, against `definition` in float64: outputs and gradients are off by at most twice
    as much as those of `definition` in the run's type. Fast is measured on `shape`, sequences x positions, forward and
    backward; of those within 2% of the fastest, the first is taken. A kernel has to be right on every rank, and the
    mean time over the ranks decides, so that all take the same one.
    """
    rows, length = shape
    small_length = min(length, 2048)  # what `attention_definition` keeps grows with the square: 3 GB
    small = make_trial(2, small_length, rt.dtype)
    exact = make_trial(2, small_length, torch.float64).run(definition)
    limits = [2 * error for error in relative_errors(small.run(definition), exact)]
    large = make_trial(rows, length, rt.dtype)
    times, errors, refused = {}, {}, {}
    for name, load in candidates.items():
        milliseconds = math.inf
        try:
            kernel = load()
            errors[name] = check_errors(small.run(kernel), exact, limits)
            milliseconds = _time_kernel(rt, kernel, large, limits)
        except Exception as error:  # of whatever kind: it is a reason to take another kernel
            message = str(error).strip().partition("\n")[0]
            refused[name] = f"{type(error).__name__}: {message}"
        milliseconds = rt.all_reduce(torch.tensor(milliseconds, dtype=torch.float64)).item() / rt.world_size
        if milliseconds < math.inf:
            times[name] = milliseconds
        else:
            refused.setdefault(name, "it failed on another rank")
    shown = [f"{name} {times[name]:.3f} ms" for name in times]
    shown += [f"not {name} ({reason})" for name, reason in refused.items()]
    if not times:
        raise UserError(f"{setting}: no kernel can be used: {', '.join(shown)}: mend that, or choose another")
    chosen = next(name for name in times if times[name] <= 1.02 * min(times.values()))
    rt.log(f"{setting}: {chosen}; forward and backward of {rows} x {length} positions: {', '.join(shown)}")
    fields = {"chosen": chosen, "milliseconds": times, "errors": errors, "limits": limits, "refused": refused}
    rt.record("kernel", setting=setting, **fields)
    return chosen


def _time_kernel(rt: Runtime, kernel: Callable, large: Trial, limits: list[float]) -> float:
    """Return the milliseconds of a training pass, compiled as in the model. Some packages cannot be compiled, which is
    a reason as well; and what is compiled must do what it does otherwise."""
    compiled = rt.compile(kernel)
    twice = [2 * limit for limit in limits]  # both are rounded
    check_errors(large.train(compiled), large.train(kernel), twice)
    return rt.milliseconds(lambda: large.train(compiled))


def pick_attention(run: Run, shape: tuple[int, int]) -> Callable:
    """Return the attention function to use, called like `sdpa`."""
    h, rt = run.h, run.rt
    if h.attn_backend == "sdpa":
        return sdpa
    generator = torch.Generator(rt.device)

    def make_trial(rows: int, length: int, dtype: torch.dtype) -> Trial:
        """Return random queries, keys and values of the model's heads, the same values in any type."""
        generator.manual_seed(0)
        tensors = []
        for heads in (h.num_heads, h.num_kv_heads, h.num_kv_heads, h.num_heads):  # q, k, v, and the output's gradient
            drawn = torch.randn(rows, length, heads, h.head_dim, generator=generator, device=rt.device)
            tensors.append(drawn.bfloat16().to(dtype))
        q, k, v = (x.requires_grad_() for x in tensors[:3])
        # Scoring needs the last queries alone. FlashAttention before 2.1 aligned the starts instead of the ends.
        return Trial((q, k, v), (q, k, v), tensors[3], scoring=((q, k, v), (q[:, -h.stride :], k, v)))

    candidates = ATTENTION_KERNELS
    if h.attn_backend != "auto":
        candidates = {h.attn_backend: ATTENTION_KERNELS[h.attn_backend]}
    setting = f"ATTN_BACKEND={h.attn_backend}"
    name = fastest_kernel(rt, setting, candidates, attention_definition, make_trial, shape)
    return ATTENTION_KERNELS[name]()


def pick_mlp(run: Run, block: Block, shape: tuple[int, int]) -> Callable | None:
    """Return the fused function for the block's `MLP.fused`, or None for the plain lines."""
    h, rt = run.h, run.rt
    if h.mlp_kernel == "plain":
        return None
    candidates = dict(MLP_KERNELS)
    if h.mlp_kernel == "fused":
        del candidates["plain"]
    generator = torch.Generator(rt.device)
    generator.manual_seed(0)
    mlp = copy.deepcopy(block.mlp)
    mlp.fused = None
    scale = 0.5 + torch.rand(h.model_dim, generator=generator, device=rt.device)
    for w in mlp.parameters():
        if w.ndim == 2:  # (out, in); they begin as zeros
            drawn = torch.randn(w.shape, generator=generator, device=rt.device) * w.size(1) ** -0.5
            w.data = drawn.bfloat16().float()
    scale.requires_grad_()

    def make_trial(rows: int, length: int, dtype: torch.dtype) -> Trial:
        """Return random inputs, the same values in any type."""
        generator.manual_seed(1)
        drawn = torch.randn(2, rows, length, h.model_dim, generator=generator, device=rt.device)
        x, output_grad = drawn.bfloat16().to(dtype)
        x.requires_grad_()
        return Trial((x, scale), (x, scale, *mlp.parameters()), output_grad, scoring=((x, scale),))

    def load(name: str) -> Callable:
        """Return the MLP with a kernel."""
        mlp.fused = candidates[name]()
        return mlp

    loaders = {name: functools.partial(load, name) for name in candidates}
    name = fastest_kernel(rt, f"MLP_KERNEL={h.mlp_kernel}", loaders, mlp, make_trial, shape)
    return candidates[name]()


TRIAL_TOKENS = 98_304  # are enough to compare kernels on; more would only take memory


def pick_kernels(run: Run) -> None:
    """Give the model the fastest kernels that are right on this machine. Only GPUs with bfloat16 have a choice."""
    h, rt = run.h, run.rt
    if not rt.has_kernels:
        return
    rows = rt.max_rows["scoring"]
    if h.trains:
        rows, _ = batch_plan(h, rt)
    shape = (min(rows, max(1, TRIAL_TOKENS // h.train_seq_len)), h.train_seq_len)
    attend = pick_attention(run, shape)
    fused = {}  # one trial for all MLPs of a kind: the same class and the same numbers and switches
    for block in run.model.blocks:
        kind = (type(block.mlp), *(f"{k}={v}" for k, v in vars(block.mlp).items() if isinstance(v, int | float | str)))
        if kind not in fused:
            fused[kind] = pick_mlp(run, block, shape)
        block.attn.attend = attend
        block.mlp.fused = fused[kind]


# Of a training for each weight, beside it: gradients and their sum, momenta, two averages, and an update in progress.
STATE_BYTES = 6 * 4


def limit_rows(run: Run) -> None:
    """With MICRO_BATCH_TOKENS=auto, limit the sequences of a pass to what should fit into the GPU."""
    h, rt = run.h, run.rt
    if h.micro_batch_tokens != "auto" or rt.device.type != "cuda" or rt.keeps_rows:
        return
    state = STATE_BYTES * sum(p.numel() for p in run.model.parameters())
    tokens = (0.85 * rt.least(rt.free_memory()) - state) / bytes_per_token(h, rt)
    widest = max(h.vocab_size, h.mlp_mult * h.model_dim)
    tokens = min(tokens, (2**31 - 1) / widest)  # larger tensors need 64-bit indices
    rt.max_rows["training"] = max(1, int(tokens / h.train_seq_len))
    rt.max_rows["adaptation"] = max(1, int(tokens / h.reach))


def fit_rows(rt: Runtime, phase: str, rows: int, work: Callable[[], Any]) -> None:
    """Do `work`, whose passes have `rows` sequences. Where it is out of memory on any rank, halve them for all, in
    `rt.max_rows[phase]`, and do it again. Raise UserError where even one sequence is too much."""
    while not rt.fits(work):
        if rows == 1:
            raise UserError(f"{phase} does not fit into the memory of this device: shorten TRAIN_ or EVAL_SEQ_LEN")
        rows //= 2
        rt.max_rows[phase] = rows
        rt.log(f"out of memory: {phase} again with at most {rows} sequences in a pass")
    rt.record("rows", phase=phase, rows=rows)


def preflight(run: Run) -> float:
    """Run the whole pipeline on random tokens in the real shapes before the clock starts, so that nothing fails for the
    first time after ten minutes. This also compiles all graphs. Restore the weights; return the seconds it took."""
    h, rt = run.h, run.rt
    start = rt.now()
    parameters = list(run.model.parameters())
    initial = [p.detach().clone() for p in parameters]
    limit_rows(run)
    pick_kernels(run)
    trainer = None
    if h.trains:
        trainer = _preflight_training(run)
    if h.first_stage in ("train", "calibrate"):
        run = run._replace(calibrated=_preflight_calibration(run))
    if h.first_stage != "score" and rt.rank == 0:
        weights = dict(run.model.named_parameters())
        quantized = quantize_weights(prepare_weights(run, weights, h.prune_frac), quant_floor=1.0)
        decode(encode(h, quantized, 1.0, h.compressor), "the preflight's file")
    _preflight_scoring(run)
    del trainer  # whose state was there, as it is when the raw weights are scored
    with torch.no_grad():
        torch._foreach_copy_(parameters, initial)
    seconds = rt.now() - start
    compiled = ""
    if rt.compiled:
        compiled = f", {len(rt.compiler.seconds)} graphs compiled in {sum(rt.compiler.seconds):.1f}s of it"
    rt.log(f"preflight: the whole pipeline ran on random tokens in {seconds:.1f}s{compiled}, before the clock starts")
    rt.compiler.preflight_is_over = True
    return seconds


def random_text(h: Hyperparameters, num_targets: int) -> Validation:
    """Return random tokens in the place of a text to score."""
    tokens = torch.randint(h.vocab_size, (num_targets + 1,), dtype=torch.int32)
    return Validation(tokens, torch.ones(num_targets, dtype=torch.int16), num_targets, "random")


def random_batch(run: Run) -> list[tuple[Tensor, Tensor]]:
    """Return random tokens as the micro-batches of a step."""
    rows, grad_accum_steps = batch_plan(run.h, run.rt)
    shape = (grad_accum_steps, rows, run.h.train_seq_len)
    x = torch.randint(run.h.vocab_size, shape, device=run.rt.device)
    return list(zip(x, x.roll(-1, -1)))


def fit_training(trainer: Trainer) -> None:
    """Find how many sequences a training pass can have, and log the plan of a step."""
    run = trainer.run
    h, rt = run.h, run.rt

    def first_passes() -> None:
        """Make two passes: there is room for the second beside the gradients of the first."""
        run.model.zero_grad(set_to_none=True)
        trainer.backward(random_batch(run)[:2])

    rows, _ = batch_plan(h, rt)
    fit_rows(rt, "training", rows, first_passes)
    run.model.zero_grad(set_to_none=True)
    rows, grad_accum_steps = batch_plan(h, rt)
    rt.max_rows["training"] = rows
    shape = f"{rows} x {h.train_seq_len} tokens"
    rt.log(f"step: {rt.world_size} processes x {grad_accum_steps} micro-batches x {shape}")


def _preflight_training(run: Run) -> Trainer:
    h = run.h
    trainer = Trainer(run)
    fit_training(trainer)
    num_steps = h.warmup_steps if run.rt.compiled else min(2, h.warmup_steps)
    if run.model.recur_blocks:
        with run.model.without_recurrence():
            for _ in range(num_steps):
                trainer.step(1.0, random_batch(run))
    for _ in range(num_steps):
        trainer.step(1.0, random_batch(run))
    trainer.apply_average()
    return trainer


def _preflight_calibration(run: Run) -> dict[str, Any]:
    """Calibrate on random tokens: two micro-batches, of which the second shows how long one takes."""
    h = copy.copy(run.h)
    if not calibrations(h):
        return {}
    rng = np.random.default_rng(h.seed)
    shard = rng.integers(h.vocab_size, size=2 * h.train_batch_tokens + 1, dtype=np.uint16)
    run = run._replace(h=h, train_shards=[shard], val=random_text(h, h.window))
    if h.gptq_enabled:
        fit_calibration(run)
        rows, _ = batch_plan(h, run.rt)
        h.train_batch_tokens = rows * h.train_seq_len * run.rt.world_size
        h.gptq_calibration_batches = 2
    return {calibration.name: calibration.measure(run) for calibration in calibrations(h)}


def fit_calibration(run: Run) -> None:
    """Find how many sequences a pass of the calibration can have: eager, it needs more memory than training."""
    h, rt = run.h, run.rt
    rows, _ = batch_plan(h, rt)
    rt.max_rows["calibration"] = rows

    def first_pass() -> None:
        """Make a pass on random tokens."""
        sums = CurvatureSums(run)
        with sums.watching():
            x = torch.randint(h.vocab_size, (rt.max_rows["calibration"], h.train_seq_len), device=rt.device)
            sums.add(x, x.roll(-1, -1))

    fit_rows(rt, "calibration", rows, first_pass)


def plan_calibration(run: Run) -> None:
    """Predict the seconds of GPTQ's calibration from a micro-batch of the preflight's, and keep them where that is left
    to the run."""
    h, rt = run.h, run.rt
    if "calibration" not in rt.pass_seconds:
        return
    _, grad_accum_steps = batch_plan(h, rt)
    passes = h.gptq_calibration_batches * grad_accum_steps
    seconds = passes * rt.pass_seconds["calibration"] + rt.pass_seconds["factorization"]
    predicted = rt.broadcast_from_rank0(seconds)
    h.predicted_seconds["gptq"] = 1.2 * predicted + 0.5
    reserved = h.predicted_seconds["gptq"] if h.gptq_reserve_seconds == "auto" else h.gptq_reserve_seconds
    line = f"calibration of GPTQ on {h.gptq_calibration_batches} batches will take about {predicted:.1f}s"
    if not h.trains or not h.max_wallclock_seconds:
        rt.log(f"plan: {line}")
        return
    rt.log(f"plan: {line}; {reserved:.1f}s are kept for it, so steps end at {h.max_wallclock_seconds - reserved:.1f}s")
    if predicted > reserved:
        rt.log(f"WARNING: {line}, more than GPTQ_RESERVE_SECONDS={reserved:g}: use auto, or fewer batches")
    training_budget(h)  # raises where nothing is left


def _preflight_scoring(run: Run) -> None:
    h, rt = run.h, run.rt
    chunk = h.ttt_chunk_tokens if h.ttt_mode == "score_first" else h.ttt_batch_seqs * h.reach
    chunk = min(chunk, 2**22)  # more has no other shapes
    num_windows = 1 + rt.max_rows["scoring"] * rt.world_size
    val = random_text(h, max(chunk, num_windows * h.window))
    plain = Scorer(run, val, h.window)
    sliding = Scorer(run, val, h.stride)
    plain.progress.total = sliding.progress.total = 0  # only a batch of the text is scored: no time left to estimate
    score_sliding = sliding.score
    ttt = None
    if h.ttt_enabled:
        ttt = pick_ttt(run)
        score_sliding = functools.partial(ttt.score, sliding)

    def score_both() -> None:
        """Score a batch in each of the shapes that there will be."""
        if run.model.recur_blocks and h.trains and h.val_loss_every:
            with run.model.without_recurrence():  # as validations before RECUR_START_FRAC are
                plain.score(plain.windows[:num_windows])
        plain.score(plain.windows[:num_windows])
        score_sliding(sliding.windows[:num_windows])

    fit_rows(rt, "scoring", rt.max_rows["scoring"], score_both)
    one_each = sliding.windows[1 : 1 + rt.max_rows["scoring"] * rt.world_size]  # a batch for every process
    rt.pass_seconds["scoring"] = rt.pace(functools.partial(score_sliding, one_each))
    if ttt:
        batch = ttt.batches(sliding.tokens, 0, chunk)[0]
        add_gradients = functools.partial(ttt.add_gradients, *batch)
        fit_rows(rt, "adaptation", min(len(batch.inputs), rt.max_rows["adaptation"]), add_gradients)
        ttt.adapt(batch, lr_scale=0.0)
        rt.pass_seconds["adaptation"] = rt.pace(functools.partial(ttt.adapt, batch, lr_scale=0.0))


# ==================================================== 8  ARTIFACT =====================================================
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16, so that a row of zeros has a step as well


class Prepared(NamedTuple):
    """A parameter on its way into the file: what depends on the weights alone, computed once for all grids."""

    name: str
    bits: int
    values: Tensor  # fp32 (rows, cols), pruned; or fp16 where bits == 16
    clips: Tensor | None  # candidates for each row: fp32 (quantiles, rows, 1)
    floor_scale: float = 1.0  # of this parameter's floor, in units of QUANT_FLOOR
    curvature: Curvature | None = None  # of a linear map that GPTQ rounds


class Stored(NamedTuple):
    """A parameter as the file has it: codes and scales, or plain values (16: fp16, 32: fp32) without scales."""

    name: str
    bits: int
    values: Tensor  # int8 codes (rows, cols), or fp16 or fp32 values
    scales: Tensor | None  # fp16 (rows, 1)


def row_clips(w: Tensor) -> Tensor:
    """Return the CLIP_QUANTILES of |w| in each row (rows, cols), interpolated: (quantiles, rows, 1)."""
    depths = [(1 - quantile) * (w.size(1) - 1) for quantile in CLIP_QUANTILES]  # ranks below the largest
    top = w.abs().topk(math.ceil(depths[0]) + 1, dim=1).values  # (rows, k), descending
    clips = [torch.lerp(top[:, math.floor(depth)], top[:, math.ceil(depth)], depth % 1) for depth in depths]
    return torch.stack(clips).unsqueeze(2)


def prepare_weights(run: Run, weights: dict[str, Tensor], prune_frac: float) -> list[Prepared]:
    """Return all parameters with their candidate clips, the part `prune_frac` of each quantized one zeroed.

    Everything that does not depend on the grid belongs here; `run.calibrated` has what calibrations found out.
    """
    curvatures = run.calibrated.get("gptq", {})
    floor_scales = scale_floors(run.h, weights, curvatures)
    prepared = []
    for name, w in weights.items():
        w = w.detach()
        bits = stored_bits(run.h, name)
        if bits == 16:
            prepared.append(Prepared(name, bits, w.half(), None))
            continue
        num_pruned = int(prune_frac * w.numel())
        if num_pruned:
            threshold = w.abs().flatten().kthvalue(num_pruned).values
            w = w.masked_fill(w.abs() <= threshold, 0.0)
        w = w.float()
        curvature = curvatures.get(name)
        if curvature is not None and curvature.dead is None:
            curvature = None  # a table, whose rows are read one at a time
        if curvature is not None:
            w = w.masked_fill(curvature.dead, 0.0)
        prepared.append(Prepared(name, bits, w, row_clips(w), floor_scales[name], curvature))
    return prepared


def scale_floors(h: Hyperparameters, weights: dict[str, Tensor], curvatures: dict[str, Curvature]) -> dict[str, float]:
    """Return the factor on QUANT_FLOOR of each quantized parameter: 1, or with GPTQ what makes its step proportional to
    1 / sqrt(importance). The factors' geometric mean over all weights is 1.

    To second order, an error of variance step^2 / 12 in each of n weights costs n x importance x step^2 / 24, and twice
    the step saves n bits: the sum is least where importance x step^2 is the same everywhere. Factors are powers of
    2^(1/8), so that rounding in the sums of the calibration rarely changes them.
    """
    quantized = {name: w.numel() for name, w in weights.items() if stored_bits(h, name) < 16}
    if not curvatures:
        return dict.fromkeys(quantized, 1.0)
    largest = max(curvature.importance for curvature in curvatures.values()) or 1.0
    logs = {}
    for name in quantized:
        importance = max(curvatures[name].importance / largest, 1e-6)
        largest_code = 2 ** (stored_bits(h, name) - 1) - 1
        logs[name] = math.log2(largest_code) - 0.5 * math.log2(importance)
    mean = sum(logs[name] * count for name, count in quantized.items()) / sum(quantized.values())
    return {name: 2.0 ** (round(8 * (log - mean)) / 8) for name, log in logs.items()}


def quantize_rows(w: Tensor, clips: Tensor, bits: int, quant_floor: float) -> tuple[Tensor, Tensor]:
    """Return codes, int8 (rows, cols) in [-q, q] with q = 2^(bits - 1) - 1, and scales, fp16 (rows, 1): w is about
    codes x scales, scale = max(clip, quant_floor) / q.

    Each row takes the clip with the smallest squared error (GPTQ-lite). A higher floor makes a smaller file: published
    int6 had a hidden one of 1.0, an epsilon of 1/31 on the scale (PRs 518, 977, 1092).
    """
    q = 2 ** (bits - 1) - 1
    best_error = best_codes = best_scale = None
    for clip in clips:  # (rows, 1)
        scale = (clip.clamp_min(quant_floor) / q).half().clamp_min(SMALLEST_SCALE)
        if best_scale is not None and torch.equal(scale, best_scale):
            continue  # all rows are at the floor
        codes = (w / scale.float()).round_().clamp_(-q, q)
        error = (codes * scale.float() - w).square_().sum(1, keepdim=True)  # (rows, 1)
        if best_error is None:
            best_error, best_codes, best_scale = error, codes, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return best_codes.to(torch.int8), best_scale


GPTQ_BLOCK = 128  # columns whose errors move on one by one; those behind them get the sum


def gptq(w: Tensor, scales: Tensor, bits: int, order: Tensor, factor: Tensor) -> Tensor:
    """Return int8 codes (n, rows, cols) of matrices w on the grids of `scales` (n, rows, 1), rounded column by column
    in `order` (n, cols), with each column's error compensated in the later ones (GPTQ, Frantar et al. 2022).

    `factor` is U (n, cols, cols) of `factor_hessians`. Where H is diagonal, these are the nearest codes.
    """
    q = 2 ** (bits - 1) - 1
    order = order.unsqueeze(2).expand(-1, -1, w.size(1))  # (n, cols, rows)
    w = w.transpose(1, 2).gather(1, order)  # (n, cols, rows): a column is contiguous
    scales = scales.float().transpose(1, 2)  # (n, 1, rows)
    codes = torch.empty_like(w)
    for begin in range(0, w.size(1), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, w.size(1))
        block = w[:, begin:end]
        errors = torch.empty_like(block)
        for i in range(end - begin):
            column = block[:, i : i + 1]  # (n, 1, rows)
            code = (column / scales).round_().clamp_(-q, q)
            codes[:, begin + i : begin + i + 1] = code
            u = factor[:, begin + i, begin + i : end].unsqueeze(2)  # (n, columns from i on, 1)
            error = (column - code * scales) / u[:, :1]
            errors[:, i : i + 1] = error
            block[:, i + 1 :].addcmul_(u[:, 1:], error, value=-1)
        w[:, end:].baddbmm_(factor[:, begin:end, end:].transpose(1, 2), errors, alpha=-1)
    restored = torch.empty_like(codes).scatter_(1, order, codes)
    return restored.transpose(1, 2).to(torch.int8).contiguous()


def quantize_weights(prepared: Iterable[Prepared], quant_floor: float) -> list[Stored]:
    """Return prepared parameters on the grid that `quant_floor` gives. Matrices of one shape are rounded in one batch
    where GPTQ does it."""
    stored = {}
    same_shape: dict[tuple, list[Prepared]] = {}
    for p in prepared:
        if p.clips is None:
            stored[p.name] = Stored(p.name, p.bits, p.values, None)
            continue
        codes, scales = quantize_rows(p.values, p.clips, p.bits, quant_floor * p.floor_scale)
        stored[p.name] = Stored(p.name, p.bits, codes, scales)
        if p.curvature is not None:
            same_shape.setdefault((p.bits, *p.values.shape), []).append(p)
    for (bits, *_), batch in same_shape.items():
        weights = torch.stack([p.values for p in batch])
        scales = torch.stack([stored[p.name].scales for p in batch])
        orders = torch.stack([p.curvature.order for p in batch])
        factors = torch.stack([p.curvature.factor for p in batch])
        with full_fp32():
            rounded = gptq(weights, scales, bits, orders, factors)
        for p, codes in zip(batch, rounded):
            stored[p.name] = stored[p.name]._replace(values=codes)
    return list(stored.values())


def fit_artifact(run: Run, weights: dict[str, Tensor]) -> tuple[bytes, float]:
    """Return the artifact and its floor: QUANT_FLOOR, or the smallest whose code + model fit SIZE_LIMIT.

    Where nothing fits, return the last file that was tried.
    """
    h, rt = run.h, run.rt
    budget = h.size_limit - len(run.code)
    prepared = prepare_weights(run, weights, h.prune_frac)
    num_codes = sum(p.values.numel() for p in prepared if p.clips is not None)
    search = None
    quant_floor = h.quant_floor
    if quant_floor == "auto":
        quant_floor = 0.0
        search = FloorSearch(Estimate(prepared, h.compressor), budget) if num_codes else None
    best = None
    while True:
        if search is not None:
            quant_floor = search.next_floor()
        tensors = quantize_weights(prepared, quant_floor)
        blob = encode(h, tensors, quant_floor, h.compressor)
        rt.log(f"quantized: floor {quant_floor:.5f} gives {len(blob):,} of {budget:,} bytes")
        if best is None or len(blob) <= budget or len(best[1]) > budget:
            best = (tensors, blob, quant_floor)
        if search is None or search.is_over(quant_floor, len(blob)):
            break
    tensors, blob, quant_floor = best
    log_stored(run, prepared, tensors, blob)
    if h.prune_frac:
        num_changed = count_pruned(run, weights, prepared, quant_floor)
        rt.log(f"pruned: changed {num_changed:,} of {num_codes:,} codes")
    return blob, quant_floor


class FloorSearch:
    """Looks for the smallest floor whose file fits a budget. The estimate gives the first; its file shows by how many
    bytes the estimate is wrong, so that the second is nearly always within 0.1% of the budget.
    """

    # Bytes of a file for each byte of the estimate, before there is a file.
    TYPICAL_RATIO = {"zstd": 1.01, "lzma": 1.02, "rans": 1.0}
    TARGET = 0.9995  # of the budget
    NEAR_ENOUGH = 0.999  # the rest is worth 0.0001 bits per byte
    MAX_FILES = 8

    def __init__(self, estimate: Estimate, budget: int):
        self.estimate = estimate
        self.budget = budget
        self.wanted = self.TARGET * budget / self.TYPICAL_RATIO[estimate.codec]  # bytes of the estimate
        self.too_fine = -1.0  # the largest floor that was tried and does not fit
        self.fits = math.inf  # the smallest that was tried and does
        self.num_files = 0

    def next_floor(self) -> float:
        """Return the floor to try next: what the estimate says, if that lies between those that were tried."""
        floor = self.estimate.find_floor(self.wanted)
        if self.too_fine < floor < self.fits:
            return floor
        if math.isinf(self.fits):
            return max(2 * self.too_fine, 0.01)
        return (max(self.too_fine, 0.0) + self.fits) / 2

    def is_over(self, floor: float, size: int) -> bool:
        """Note the size of the file at a floor, and return whether none is worth trying any more."""
        self.num_files += 1
        self.wanted = self.TARGET * self.budget - (size - self.estimate.bytes_at(floor))
        if size > self.budget:
            self.too_fine = max(self.too_fine, floor)
            return floor >= self.estimate.LARGEST_FLOOR or self.num_files == self.MAX_FILES
        self.fits = min(self.fits, floor)
        return floor == 0 or size > self.NEAR_ENOUGH * self.budget or self.num_files == self.MAX_FILES


class Estimate:
    """The bytes of a file at any floor, from the entropy of a sample of its codes: about a million, in whole rows."""

    SAMPLE = 2**20
    LARGEST_FLOOR = 2.0**10  # beyond what QUANT_FLOOR may be

    def __init__(self, prepared: list[Prepared], codec: str):
        matrices = [p for p in prepared if p.clips is not None]
        self.plain_bytes = sum(2 * p.values.numel() for p in prepared if p.clips is None)
        num_codes = sum(p.values.numel() for p in matrices)
        step = max(1, num_codes // self.SAMPLE)  # of rows
        # Nearest codes: those of GPTQ have the same entropy to 0.5%, and the first file corrects that.
        self.sample = [p._replace(values=p.values[::step], clips=p.clips[:, ::step], curvature=None) for p in matrices]
        self.scale = num_codes / max(1, sum(p.values.numel() for p in self.sample))
        self.codec = codec
        self.known: dict[float, float] = {}

    def bytes_at(self, quant_floor: float) -> float:
        """Return the estimated bytes at a floor."""
        if quant_floor not in self.known:
            model = model_rows(quantize_weights(self.sample, quant_floor), self.codec)
            self.known[quant_floor] = self.plain_bytes + self.scale * sum(model.bits_by_family().values()) / 8
        return self.known[quant_floor]

    def find_floor(self, wanted: float) -> float:
        """Return the least floor whose estimate is at most `wanted` bytes, to 0.01% of it; 0 where that is enough."""
        if self.bytes_at(0.0) <= wanted:
            return 0.0
        low, high = -20.0, math.log2(self.LARGEST_FLOOR)
        while high - low > 1e-4:
            middle = (low + high) / 2
            if self.bytes_at(2.0**middle) <= wanted:
                high = middle
            else:
                low = middle
        return 2.0**high


def log_stored(run: Run, prepared: list[Prepared], tensors: list[Stored], blob: bytes) -> None:
    """Log where the bytes go: by family, weights, bits, clip, error, and bytes of the file in proportion to the entropy
    of codes. And the bytes that another coder would take for the same codes."""
    h, rt = run.h, run.rt
    is_rans = h.compressor == "rans"
    bits = model_rows(tensors, h.compressor).bits_by_family()
    families: dict[str, list[tuple[Prepared, Stored]]] = {}
    for p, stored in zip(prepared, tensors):
        families.setdefault(family_of(p.name), []).append((p, stored))
        if stored.scales is None:
            bits[family_of(p.name)] = bits.get(family_of(p.name), 0.0) + 16 * p.values.numel()
    for family, members in families.items():
        size = len(blob) * bits[family] / sum(bits.values())
        count = sum(p.values.numel() for p, _ in members)
        fields = {"weights": count, "bits": 8 * size / count, "bytes": round(size), **grid_and_error(members)}
        rt.record("stored", family=family, **fields)
        line = f"{count:>12,} weights, {fields['bits']:5.2f} bits each, {round(size):>11,} bytes"
        if "error" in fields:
            line += f", clip {fields['clip']:.4f}, error {fields['error']:.2%} of the weights"
        rt.log(f"stored: {family:<10} {line}")
    other = "rans"
    if is_rans:
        other = "zstd" if importlib.util.find_spec("zstandard") else "lzma"
    others_size = sum(map(len, frame(h, tensors, 0.0, other)))
    ratio = len(blob) / others_size - 1
    rt.log(f"stored: {h.compressor} takes {len(blob):,} bytes, {ratio:+.2%} against the {others_size:,} of {other}")
    rt.record("coders", **{h.compressor: len(blob), other: others_size})


def grid_and_error(members: list[tuple[Prepared, Stored]]) -> dict[str, float]:
    """Return the mean clip of the rows, and the root mean square of the errors over that of the weights. Both are empty
    where nothing is quantized."""
    clips, errors, squares = [], 0.0, 0.0
    for p, stored in members:
        if stored.scales is not None:
            scales = stored.scales.float()
            clips.append(scales.flatten() * (2 ** (p.bits - 1) - 1))
            errors += (stored.values.float() * scales - p.values).square().sum().item()
            squares += p.values.square().sum().item()
    if not clips:
        return {}
    return {"clip": torch.cat(clips).mean().item(), "error": math.sqrt(errors / max(squares, 1e-30))}


def count_pruned(run: Run, weights: dict[str, Tensor], pruned: list[Prepared], quant_floor: float) -> int:
    """Return how many codes pruning changed. The smallest weights have code 0 anyway (all of PR 562's 3%)."""
    unpruned = prepare_weights(run, weights, prune_frac=0.0)
    pairs = zip(quantize_weights(unpruned, quant_floor), quantize_weights(pruned, quant_floor))
    return sum(int((a.values != b.values).sum()) for a, b in pairs)


# rANS (Duda 2013): a coder that comes as near to the entropy of its tables as they are precise. Many lanes, each a
# coder of its own, work at once. A row's codes are nearly Gaussian and rows differ in width, which zstd and LZMA do
# not know: one table for rows of about the same width takes 0.5 to 2.9% less (records/README.md).
CLASSES = 8  # tables of a family
TABLE_CODES = 4096  # that a table needs at least: one takes about 80 bytes
RANS_BITS = 14  # a table's frequencies sum to 2^14
RANS_LOW = 2**16  # a lane's state is in [2^16, 2^32), and grows or shrinks by words of 16 bits
NUM_SYMBOLS = 256  # code + 128


class RowModel(NamedTuple):
    """Tables for the codes of tensors: rows of a family are sorted by their mean |code| and cut into equal classes."""

    classes: np.ndarray  # of each row, tensor after tensor: int64 (rows,)
    frequencies: np.ndarray  # of each symbol in a class, of 2^14: int64 (classes, 256)
    counts: np.ndarray  # of each symbol in a class: int64 (classes, 256)
    families: list[str]  # of each class

    def bits_by_family(self) -> dict[str, float]:
        """Return the bits that a coder with these tables takes for the codes of each family."""
        costs = RANS_BITS - np.log2(np.maximum(self.frequencies, 1))
        bits: dict[str, float] = {}
        for family, cost in zip(self.families, (self.counts * costs).sum(1)):
            bits[family] = bits.get(family, 0.0) + float(cost)
        return bits


def model_rows(tensors: Iterable[Stored], codec: str) -> RowModel:
    """Return tables for all codes of tensors: for rans up to CLASSES a family, or fewer if it is small. For zstd and
    LZMA, one a tensor: they do not know that rows differ, but adapt to what they have seen last."""
    groups: dict[str, list[tuple[int, np.ndarray]]] = {}
    family_of_group = {}
    num_rows = 0
    for name, bits, values, _ in tensors:
        if bits < 16 and values.numel():
            group = family_of(name) if codec == "rans" else name
            family_of_group[group] = family_of(name)
            groups.setdefault(group, []).append((num_rows, values.cpu().numpy()))
        if bits < 16:
            num_rows += len(values)
    classes = np.zeros(num_rows, np.int64)
    counts, families = [], []
    max_classes = CLASSES if codec == "rans" else 1
    for group, members in groups.items():
        own_rows = np.concatenate([np.arange(first, first + len(codes)) for first, codes in members])
        widths = np.concatenate([np.abs(codes.astype(np.float32)).mean(1) for _, codes in members])
        num_codes = sum(codes.size for _, codes in members)
        num_classes = max(1, min(max_classes, len(own_rows), num_codes // TABLE_CODES))
        ranked = own_rows[np.argsort(widths, kind="stable")]
        classes[ranked] = np.arange(len(ranked)) * num_classes // len(ranked)
        own_counts = np.zeros(num_classes * NUM_SYMBOLS, np.int64)
        for first, codes in members:
            keys = classes[first : first + len(codes), None] * NUM_SYMBOLS + (codes.astype(np.int64) + 128)
            own_counts += np.bincount(keys.ravel(), minlength=len(own_counts))
        classes[own_rows] += len(families)
        counts.append(own_counts.reshape(num_classes, NUM_SYMBOLS))
        families += [family_of_group[group]] * num_classes
    counts = np.concatenate(counts) if counts else np.zeros((0, NUM_SYMBOLS), np.int64)
    frequencies = np.array([normalize_counts(row) for row in counts]).reshape(counts.shape)
    return RowModel(classes, frequencies, counts, families)


def normalize_counts(counts: np.ndarray) -> np.ndarray:
    """Return int64 frequencies that sum to 2^14, in proportion to `counts`, at least 1 for what occurs."""
    exact = counts * (2**RANS_BITS / counts.sum())
    frequencies = np.where(counts > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    missing = 2**RANS_BITS - int(frequencies.sum())
    for _ in range(missing):
        frequencies[np.where(counts > 0, exact - frequencies, -np.inf).argmax()] += 1
    for _ in range(-missing):
        frequencies[frequencies.argmax()] -= 1
    return frequencies


def count_lanes(num_codes: int) -> int:
    """Return the lanes for so many codes. A lane's last state takes 4 bytes, 0.05% of 16,384 codes of 4 bits. No file
    has more than 32,768 steps."""
    return max(1, min(num_codes >> 14, max(1024, num_codes >> 15)))


def rans_encode(keys: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lanes' final states, uint32, and the words, uint16, of symbols `keys`, each class x 256 + symbol.

    Symbol i goes to lane i mod lanes. The last symbol is coded first, because decoding runs the other way.
    """
    starts = (np.cumsum(frequencies, axis=1) - frequencies).ravel().astype(np.uint64)
    frequencies = frequencies.ravel().astype(np.uint64)
    lanes = count_lanes(len(keys))
    states = np.full(lanes, RANS_LOW, np.uint64)
    words = [np.zeros(0, np.uint16)]
    for begin in range((len(keys) - 1) // lanes * lanes, -1, -lanes):
        step = keys[begin : begin + lanes]
        frequency = frequencies[step]
        x = states[: len(step)]
        is_full = x >= frequency << np.uint64(32 - RANS_BITS)
        words.append(x[is_full].astype(np.uint16)[::-1])  # the low 16 bits
        x = np.where(is_full, x >> np.uint64(16), x)
        quotient, remainder = np.divmod(x, frequency)
        states[: len(step)] = (quotient << np.uint64(RANS_BITS)) + remainder + starts[step]
    return states.astype(np.uint32), np.concatenate(words)[::-1]


def rans_decode(classes: np.ndarray, frequencies: np.ndarray, states: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return int8 codes, one for each of `classes` (uint8), from what `rans_encode` returned.

    Raise ValueError for tables that do not sum to 2^14, and unless all words are used and all states end where the
    encoder began: that also finds damage.
    """
    if not (frequencies.sum(1) == 2**RANS_BITS).all():
        raise ValueError("a table of frequencies does not sum to 2^14")
    if classes.size and classes.max() >= len(frequencies):
        raise ValueError("a row is of a class without a table")
    symbols = np.tile(np.arange(NUM_SYMBOLS, dtype=np.uint8), len(frequencies))
    symbol_at = np.repeat(symbols, frequencies.ravel())  # (classes x 2^14,)
    starts = (np.cumsum(frequencies, axis=1) - frequencies).ravel().astype(np.uint64)
    frequencies = frequencies.ravel().astype(np.uint64)
    decoded = np.empty(len(classes), np.uint8)
    states = states.astype(np.uint64)
    used = 0
    for begin in range(0, len(classes), len(states)):
        own_classes = classes[begin : begin + len(states)].astype(np.int64)
        x = states[: len(own_classes)]
        places = x & np.uint64(2**RANS_BITS - 1)
        symbol = symbol_at[own_classes << RANS_BITS | places.astype(np.int64)]
        decoded[begin : begin + len(states)] = symbol
        key = own_classes * NUM_SYMBOLS + symbol
        x = frequencies[key] * (x >> np.uint64(RANS_BITS)) + places - starts[key]
        is_low = np.flatnonzero(x < RANS_LOW)
        if used + len(is_low) > len(words):
            raise ValueError("its stream of codes is cut off")
        x[is_low] = x[is_low] << np.uint64(16) | words[used : used + len(is_low)]
        used += len(is_low)
        states[: len(own_classes)] = x
    if used < len(words) or (states != RANS_LOW).any():
        raise ValueError("its stream of codes is damaged")
    decoded ^= 128  # as int8, the symbol less 128
    return decoded.view(np.int8)


def rans_body(packed_payload: bytes, rows: RowModel, tensors: list[Stored]) -> list[Any]:
    """Return the pieces of a file of the codec rans behind its prefix: the length of the payload, compressed by LZMA,
    and that; the lanes' states; the words. In the payload, the rows' classes and the tables stand for the codes."""
    codes = [values.cpu().numpy() for _, bits, values, _ in tensors if bits < 16]
    lengths = np.repeat([c.shape[1] for c in codes], [len(c) for c in codes]).astype(np.int64)
    symbols = [(c.astype(np.int16) + 128).astype(np.uint16).ravel() for c in codes]
    keys = np.concatenate([*symbols, np.zeros(0, np.uint16)])
    keys += np.repeat(rows.classes.astype(np.uint16) * NUM_SYMBOLS, lengths)
    states, words = rans_encode(keys, rows.frequencies)
    streams = [array.astype(kind).view(np.uint8) for array, kind in ((states, "<u4"), (words, "<u2"))]
    return [struct.pack("<I", len(packed_payload)), packed_payload, *streams]


# What ships beside the artifact: this script, which unpacks itself. Decorators such as triton.jit ask `inspect` for the
# source of their function, and inspect falls back to `linecache`. (For classes it does not.)
PACKED = """# train_gpt_readable.py, packed: LZMA (with a checksum) + base85
import base64, linecache, lzma
source = lzma.decompress(base64.b85decode("%s")).decode()
linecache.cache["train_gpt_readable.py"] = len(source), None, source.splitlines(True), "train_gpt_readable.py"
exec(compile(source, "train_gpt_readable.py", "exec"))
"""
PACKED_HEAD, PACKED_TAIL = PACKED.split("%s")


def pack(source: bytes) -> bytes:
    """Return a script that unpacks itself and behaves as `source` does; its `__file__` is the packed one.

    Comments and docstrings stay: they cost 16 kB, 0.1% of the limit, and the readable file can be compared byte by
    byte. Tracebacks have the line numbers of the readable file.
    """
    compressed = lzma.compress(source, preset=9 | lzma.PRESET_EXTREME)
    packed = (PACKED % base64.b85encode(compressed).decode()).encode()
    assert unpack(packed) == source, "the packed script does not contain its source"
    return packed


def unpack(script: bytes) -> bytes | None:
    """Return the source in a script made by `pack`, only by parsing it, or None if it is not one."""
    text = script.decode("utf-8", "replace")
    if not (text.startswith(PACKED_HEAD) and text.endswith(PACKED_TAIL)):
        return None
    payload = text[len(PACKED_HEAD) : -len(PACKED_TAIL)]
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27)  # preset 9 needs half of that
        source = decompressor.decompress(base64.b85decode(payload), max_length=10_000_000)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("its source is cut off, too long, or followed by something")
        return source
    except (ValueError, lzma.LZMAError) as error:
        raise UserError(f"the packed script is damaged ({error}): take the one that ran") from None


def code_form(script: bytes) -> str:
    """Return packed or raw."""
    return "raw" if unpack(script) is None else "packed"


def shipped_code(h: Hyperparameters) -> bytes:
    """Return the script as it is shipped and counted. One that is packed already is shipped as it is."""
    if h.size_of_code == "raw" or code_form(SCRIPT) == "packed":
        return SCRIPT
    return pack(SCRIPT)


def write_code(run: Run) -> None:
    """Write the shipped script into the run's folder, and its source where that is packed."""
    if run.rt.rank != 0:
        return
    write_atomically(run.rt.run_dir / "train_gpt.py", run.code)
    source = unpack(run.code)
    if source is not None:
        write_atomically(run.rt.run_dir / "train_gpt_readable.py", source)


# A file is a prefix and the payload, compressed. Prefix: magic; half the SHA-256 of everything after it; format
# version; codec; bytes of the payload. Payload: length of a JSON header, that header, all int8 codes, and then, tensor
# by tensor, scales or other values. With the codec rans, the codes are beside the payload: see `rans_body`.
PREFIX = struct.Struct("<4s16sHHQ")
MAGIC = b"PGLF"
VERSION = 3
READABLE_VERSIONS = (2, 3)  # 2 has no rans
CODECS = {"none": 0, "zstd": 1, "lzma": 2, "rans": 3}
# What a file may unpack to: an artifact of 16 MB is not larger unless its weights have less than half a bit.
LARGEST_PAYLOAD = 2**28
LARGEST_HEADER = 2**20
LARGEST_FILE = 2**33
# Codes repeat nothing from far away, and far matches that save nothing cost time and bits. On 27 MB of int6 codes,
# zstd's level 22 for sources of 256 kB took 4 s and 15,060,356 bytes, the one for 27 MB 44 s and 15,062,863. LZMA with
# a dictionary of 64 kB and without contexts took 4 s and 15,202,597 bytes, by default 41 s and 15,582,392. Matches of 3
# bytes help fp16 values and hurt codes, where they took up to 8% more and varied with the floor: the smaller file wins.
ZSTD_SOURCE_BYTES = 2**18
ZSTD_MIN_MATCHES = (3, 6)
LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]}
LZMA_FOR_CODES = {"dict_size": 2**16, "lc": 0, "lp": 0, "pb": 0}  # what the above reads as well
DIGEST_END = 20  # magic and digest; the digest is of all bytes from here on


def frame(h: Hyperparameters, tensors: Iterable[Stored], quant_floor: float, codec: str, **extra: Any) -> list[Any]:
    """Return a whole file of the tensors in pieces, compressed with `codec`. Its header has the fields `extra`, too."""
    tensors = list(tensors)
    entries, codes, rest = [], [], []
    for name, bits, values, scales in tensors:
        entries.append((name, bits, list(values.shape)))
        if bits < 16:
            codes.append(raw_bytes(values))
            rest.append(raw_bytes(scales))
        else:
            rest.append(raw_bytes(values))
    fields = {"model": h.values(ModelKnob), "floor": quant_floor, **extra, "tensors": entries}
    rows = None
    if codec == "rans":
        rows = model_rows(tensors, codec)
        fields["classes"] = len(rows.frequencies)
        codes = [rows.classes.astype(np.uint8), rows.frequencies.astype("<u2").reshape(-1).view(np.uint8)]
    header = json.dumps(fields).encode()
    body = [struct.pack("<I", len(header)), header, *codes, *rest]
    length = sum(map(len, body))
    if rows is not None:
        body = rans_body(compress_lzma(b"".join(body)), rows, tensors)
    elif codec == "zstd":
        body = [compress_zstd(b"".join(body))]
    elif codec == "lzma":
        body = [compress_lzma(b"".join(body))]
    covered = [PREFIX.pack(MAGIC, b"", VERSION, CODECS[codec], length)[DIGEST_END:], *body]
    digest = hashlib.sha256()
    for piece in covered:
        digest.update(piece)
    return [MAGIC, digest.digest()[:16], *covered]


def compress_zstd(data: bytes) -> bytes:
    """Return `data` compressed by Zstandard at level 22, with short matches or without, whichever is smaller."""
    zstandard = require("zstandard", "or set COMPRESSOR=lzma")
    at_level_22 = functools.partial(zstandard.ZstdCompressionParameters.from_level, 22, source_size=ZSTD_SOURCE_BYTES)
    parameters = [at_level_22(min_match=min_match) for min_match in ZSTD_MIN_MATCHES]
    files = [zstandard.ZstdCompressor(compression_params=each).compress(data) for each in parameters]
    return min(files, key=len)


def compress_lzma(data: bytes) -> bytes:
    """Return `data` compressed by LZMA2 at its strongest preset, raw."""
    return lzma.compress(data, LZMA["format"], filters=[LZMA["filters"][0] | LZMA_FOR_CODES])


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor's values in their order, without a copy where they lie in it already."""
    return np.ascontiguousarray(tensor.cpu().numpy()).reshape(-1).view(np.uint8)


def encode(h: Hyperparameters, tensors: Iterable[Stored], quant_floor: float, codec: str) -> bytes:
    """Return a whole file of the tensors, compressed with `codec`."""
    return b"".join(frame(h, tensors, quant_floor, codec))


def decode(blob: bytes, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the model's knobs, and its weights in fp32 by name, from an artifact. See `parse`."""
    header, weights = parse(blob, source)
    return header["model"], weights


def parse(blob: bytes, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header of a file, and its tensors in fp32 by name. See `read_stored`."""
    header, tensors = read_stored(blob, source)
    weights = {}
    for name, _, values, scales in tensors:
        weights[name] = values.float()
        if scales is not None:
            rows = weights[name].view(len(scales), -1)
            weights[name] = (rows * scales.float()).view_as(values)
    return header, weights


def read_stored(blob: bytes, source: str) -> tuple[dict[str, Any], list[Stored]]:
    """Return the header of a file and its tensors as they are stored. The bytes are only parsed, never executed.

    Raise UserError that names `source` if they are not a complete, undamaged file of this format.
    """
    _, digest, version, codec, length = PREFIX.unpack(blob[: PREFIX.size].ljust(PREFIX.size))
    if len(blob) < PREFIX.size or blob[:4] != MAGIC or version not in READABLE_VERSIONS:
        found = f"{len(blob)} bytes, {blob[:4]!r}, format version {version}, this script reads 2 and 3"
        raise UserError(f"{source} is not an artifact of this script ({found}): use the script beside it")
    if hashlib.sha256(memoryview(blob)[DIGEST_END:]).digest()[:16] != digest:
        raise UserError(f"{source} is truncated or damaged ({len(blob)} bytes, wrong checksum): copy it again")
    if codec == CODECS["zstd"]:
        require("zstandard", f"to read {source}")
    try:
        body, streams = blob[PREFIX.size :], None
        if codec == CODECS["rans"]:
            end = 4 + struct.unpack_from("<I", body)[0]
            body, streams = body[4:end], body[end:]
        payload = _decompress(body, codec, length)
        return _parse_payload(payload, length, streams)
    except Exception as error:  # whatever a hostile file provokes is the file's fault
        raise UserError(f"{source} is malformed: {type(error).__name__}: {error}") from None


def _decompress(body: bytes, codec: int, length: int) -> bytes:
    """Return the payload, of which one byte more than the declared `length` is read at most."""
    if codec == CODECS["none"]:
        return body
    if length > LARGEST_PAYLOAD:
        raise ValueError(f"it unpacks to {length:,} bytes, more than {LARGEST_PAYLOAD:,}")
    if codec == CODECS["zstd"]:
        return importlib.import_module("zstandard").ZstdDecompressor().stream_reader(body).read(length + 1)
    if codec in (CODECS["lzma"], CODECS["rans"]):
        return lzma.LZMADecompressor(**LZMA).decompress(body, length + 1)
    raise ValueError(f"its codec is {codec}")


class Reader:
    """Takes arrays from the bytes of a payload, one after the other, without copying them."""

    def __init__(self, payload: bytes, offset: int):
        self.payload = payload
        self.offset = offset

    def take(self, kind: str, count: int) -> np.ndarray:
        """Return the next `count` values of a NumPy type. Raise ValueError if they are not there."""
        values = np.frombuffer(self.payload, kind, count, self.offset)
        self.offset += values.nbytes
        return values


def _parse_payload(payload: bytes, length: int, streams: bytes | None) -> tuple[dict[str, Any], list[Stored]]:
    """Return header and tensors. Raise whatever the parsers raise, and ValueError if bytes are missing or left over."""
    header_bytes = struct.unpack_from("<I", payload)[0]
    if header_bytes > LARGEST_HEADER:
        raise ValueError(f"its header has {header_bytes:,} bytes, more than {LARGEST_HEADER:,}")
    reader = Reader(payload, 4 + header_bytes)
    header = json.loads(payload[4 : reader.offset])
    entries = [(str(name), int(bits), [int(n) for n in shape]) for name, bits, shape in header["tensors"]]
    if len({name for name, _, _ in entries}) < len(entries):
        raise ValueError("a tensor is there twice")
    if any(n < 0 for _, _, shape in entries for n in shape):
        raise ValueError("a tensor has a negative size")
    coded_shapes = [shape for _, bits, shape in entries if bits < 16]
    num_codes = sum(map(math.prod, coded_shapes))
    if streams is None:
        codes = reader.take("i1", num_codes)
    else:
        codes = _read_rans(reader, int(header["classes"]), coded_shapes, num_codes, streams)
    tensors = []
    for name, bits, shape in entries:
        scales = None
        if bits < 16:
            values, codes = np.split(codes, [math.prod(shape)])
            values = values.reshape(shape[0], -1)
            scales = to_tensor(reader.take("<f2", shape[0]))[:, None]
        else:
            values = reader.take("<f4" if bits == 32 else "<f2", math.prod(shape))
        tensors.append(Stored(name, bits, to_tensor(values).reshape(shape), scales))
    if not reader.offset == len(payload) == length:
        raise ValueError(f"{len(payload)} bytes, of which {reader.offset} are described and {length} declared")
    header["model"] = dict(header["model"])
    return header, tensors


def to_tensor(values: np.ndarray) -> Tensor:
    """Return a tensor of its own with the values, in this machine's byte order."""
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def _read_rans(reader: Reader, num_classes: int, shapes: list[list[int]], num_codes: int, streams: bytes) -> np.ndarray:
    """Return the codes, int8, of tensors of these shapes: classes and tables come from the payload."""
    if num_codes > LARGEST_PAYLOAD:
        raise ValueError(f"it unpacks to {num_codes:,} codes, more than {LARGEST_PAYLOAD:,}")
    if not 0 <= num_classes <= 256:
        raise ValueError(f"it has {num_classes} classes of rows, and a byte has 256 values")
    num_rows = sum(shape[0] for shape in shapes)
    classes = reader.take("u1", num_rows)
    frequencies = reader.take("<u2", num_classes * NUM_SYMBOLS).reshape(num_classes, NUM_SYMBOLS).astype(np.int64)
    lengths = [math.prod(shape[1:]) for shape in shapes]
    lengths = np.repeat(np.array(lengths, np.int64), [shape[0] for shape in shapes])
    state_bytes = 4 * count_lanes(num_codes)
    states = np.frombuffer(streams[:state_bytes], "<u4")
    if 4 * len(states) != state_bytes:
        raise ValueError("its stream of codes is cut off")
    words = np.frombuffer(streams[state_bytes:], "<u2")
    return rans_decode(np.repeat(classes, lengths), frequencies, states, words)


def load_artifact(path: str | Path, blob: bytes | None = None) -> tuple[Hyperparameters, GPT]:
    """Return settings and model, rebuilt from the file alone. Model settings come from the file, all others from the
    environment.

    A model setting that the file is too old to have takes its `absent` value; `h.assumed` lists those. Raise UserError
    if the environment contradicts the file, or its tensors are not those of the model that it describes. With `blob`,
    the file's bytes, the path is only their name.
    """
    if blob is None:
        path = find_path(path, "artifact")
        if path.is_dir():
            raise UserError(f"{path} is a folder: give its file, {path / 'final_model.bin'}")
        blob = read_file(path, LARGEST_FILE)
    knobs, weights = decode(blob, str(path))
    own = Hyperparameters.knobs(ModelKnob)
    unknown = sorted(map(str, knobs.keys() - own.keys()))
    if unknown:
        names = ", ".join(unknown).upper()
        newer = "was written by a newer version of this script"
        raise UserError(f"{path} {newer}, with settings that this one lacks ({names}): use the train_gpt.py beside it")
    assumed = {name: knob.absent for name, knob in own.items() if name not in knobs}
    lost = [name.upper() for name, value in assumed.items() if value is None]
    if lost:
        fix = "if they are new, declare what older files stand for: ModelKnob(…, absent=…)"
        raise UserError(f"{path} lacks the model settings {', '.join(lost)}: {fix}")
    knobs |= assumed
    try:
        h = Hyperparameters(**knobs)
    except UserError as error:
        raise UserError(f"with the model settings of {path}: {error}") from None
    h.assumed = assumed
    for name in h.given.keys() & knobs.keys():
        if h.knobs()[name].parse(name, h.given[name]) != knobs[name]:
            raise UserError(f"{name.upper()}={h.given[name]} contradicts {path}, which has {knobs[name]}: unset it")
    with torch.device("meta"):  # names and shapes only: an absurd header allocates nothing
        model = GPT(h)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != {name: w.shape for name, w in weights.items()}:
        raise UserError(f"{path} has other tensors than the model that it describes")
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path} has weights that are not finite: export it again")
    model.load_state_dict(weights, assign=True)
    return h, model


def reload(run: Run, path: Path) -> dict[str, Any]:
    """Replace the model's weights by those in the file, and return the file's stats. Nothing else is scored."""
    start = run.rt.now()
    blob = run.rt.on_rank0(functools.partial(read_file, path, LARGEST_FILE))
    sha256 = hashlib.sha256(blob).hexdigest()
    _, decoded = load_artifact(path, blob)
    run.model.load_state_dict(decoded.state_dict())
    return {"bytes_model": len(blob), "artifact_sha256": sha256, "load_seconds": run.rt.now() - start}


def name_of(path: Path, rt: Runtime) -> str:
    """Return the name of a file in the run's folder; or its whole path, where that had no room for it."""
    return path.name if path.parent == rt.run_dir else str(path.absolute())


def write_checkpoint(run: Run) -> str:
    """Write the trained weights, averaged and exact, into checkpoint.bin, from which EXPORT_ONLY and RESUME go on.
    Return where it is. Where nothing takes it, the run goes on without: the weights are in memory."""
    rt = run.rt
    if rt.rank != 0:
        return ""
    exact = [Stored(name, 32, w.detach(), None) for name, w in run.model.named_parameters()]
    pieces = frame(run.h, exact, 0.0, "none")
    path, reason = rt.write_into([rt.run_dir], "checkpoint.bin", *pieces)
    if path is None:
        path, _ = rt.write_into(rt.other_folders(), "checkpoint.bin", *pieces)
    if path is None:
        rt.warn(f"the trained weights were not written ({reason}): this run goes on with those in memory")
        return ""
    return name_of(path, rt)


def export(run: Run) -> dict[str, Any]:
    """Write final_model.bin and return the export's stats. Raise UserError over the limit."""
    h, rt = run.h, run.rt
    for calibration in calibrations(h):
        if calibration.name not in run.calibrated:
            rt.log(f"WARNING: no calibration was run: {calibration.name}; EXPORT_ONLY needs training shards for it")
    start = time.perf_counter()
    weights = dict(run.model.named_parameters())
    if not all(w.half().isfinite().all() for w in weights.values()):  # some are stored in fp16
        raise UserError(f"the trained weights are not finite: lower MATRIX_LR={h.matrix_lr}; nothing was exported")
    size, quant_floor, artifact = 0, 0.0, ""
    if rt.rank == 0:
        blob, quant_floor = fit_artifact(run, weights)
        size = len(blob)
        artifact = name_of(rt.save("final_model.bin", blob), rt)
    size = int(rt.broadcast_from_rank0(size))
    quant_floor = rt.broadcast_from_rank0(quant_floor)
    total = size + len(run.code)
    sizes = f"model {size:,} + code {len(run.code):,} ({code_form(run.code)}) = {total:,} bytes"
    rt.log(f"artifact: {sizes} of {h.size_limit:,}, floor {quant_floor:.5f}")
    if total > h.size_limit:
        checkpoint = h.export_only or rt.saved.get("checkpoint.bin", rt.run_dir / "checkpoint.bin")
        fix = f"set QUANT_FLOOR=auto or fewer bits, and EXPORT_ONLY={checkpoint} to go on from the trained weights"
        if h.quant_floor == "auto":
            fix = f"no QUANT_FLOOR makes it fit, so make the model smaller; its trained weights are {checkpoint}"
        raise UserError(f"code + model are {total:,} bytes, over SIZE_LIMIT={h.size_limit:,}: {fix}")
    return {"artifact": artifact, "quant_floor": quant_floor, "export_seconds": time.perf_counter() - start}


# ==================================================== 9  SCORING ======================================================
class Score(NamedTuple):
    """The score of a text."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    num_targets: int
    num_bytes: int
    seconds: float


def bits_per_byte(loss_sum: float, num_bytes: int) -> float:
    """Return the bits per byte of a sum of nats over a text of `num_bytes`."""
    return loss_sum / math.log(2) / num_bytes


def plan_windows(begin: int, end: int, length: int, stride: int) -> np.ndarray:
    """Return windows (W, 3): first position, first target, end of targets.

    The targets are a partition of [begin, end): the first window has `length`, every other `stride`, the last what
    remains. (Published scripts scored the last targets up to 32 times.)
    """
    ends = np.append(np.arange(begin + length, end, stride), end)
    first_positions = np.maximum(ends - length, 0)
    first_targets = np.append(begin, ends[:-1])
    return np.stack((first_positions, first_targets, ends), axis=1)


def gather_windows(tokens: Tensor, windows: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets and target_idx, each (W, length), of windows (W, 3), all on one device.

    Targets of other windows are -100, and all are in an empty window of zeros; their index is N, the number of targets.
    """
    num_targets = len(tokens) - 1
    start, first_target, end = windows.split(1, dim=1)  # (W, 1) each
    positions = start + torch.arange(length + 1, device=tokens.device)  # (W, length + 1)
    ids = tokens[positions].long()
    # Position p has target p. A window's own targets are those in [first_target, end).
    target_idx = positions[:, :-1]
    is_own = (target_idx >= first_target) & (target_idx < end)
    targets = ids[:, 1:].where(is_own, -100)
    return ids[:, :-1], targets, target_idx.where(is_own, num_targets)


class Scorer:
    """Scores the windows of a text. Batches are dealt to the ranks in turn, so no score depends on their number, but
    for rounding: a batch has no more windows than a rank's share of a chunk."""

    def __init__(self, run: Run, val: Validation, stride: int, label: str = "scoring"):
        self.run = run
        self.val = val
        self.stride = stride
        self.length = min(run.h.window, val.num_targets)
        self.windows = plan_windows(0, val.num_targets, self.length, stride)
        self.tokens = val.tokens.to(run.rt.device)
        # This rank's scores. The last entry takes what padding writes and is never read.
        self.nll = torch.full((val.num_targets + 1,), math.nan, device=run.rt.device)
        self.loss_sum = torch.zeros((), dtype=run.rt.sum_dtype, device=run.rt.device)  # of a call
        self.matrices = CastMatrices(run.model)
        self.times_scored = np.zeros(val.num_targets, dtype=np.uint8)
        # Plain passes are short, and to record empties the allocator's cache, under a training that may be in progress.
        self.graphs = GraphCache(run.rt, "scoring", records=stride < self.length)
        self.progress = Progress(run.rt, f"{label} with stride {stride}", val.num_targets, "tok")
        self.start = run.rt.now()

    @torch.no_grad()
    def score(self, windows: np.ndarray) -> tuple[Tensor, int]:
        """Score the targets of consecutive windows. Return the nats and bytes of those that this rank scored."""
        rows = self.run.rt.max_rows["scoring"]
        full_rows = rows  # as in a plain score: one window alone would be a graph of its own, 25 s of compiling
        if not self.run.rt.compiled:  # rows for nothing would only take time
            rows = min(rows, len(self.windows))
            full_rows = 1
        is_full = windows[:, 2] - windows[:, 1] > self.stride  # the text's first window: all its positions are scored
        self.loss_sum.zero_()
        with self.matrices.used():
            byte_count = self._score_batches(windows[is_full], self.length, full_rows)
            byte_count += self._score_batches(windows[~is_full], min(self.stride, self.length), rows)
        return self.loss_sum.clone(), byte_count

    def _score_batches(self, windows: np.ndarray, last_n: int, rows: int) -> int:
        """Score windows whose targets are within their last positions, in batches of `rows`. Return the bytes of the
        targets that this rank scored."""
        rt = self.run.rt
        if not len(windows):
            return 0
        on_device = rt.to_device(windows)
        byte_count = 0
        for i, low in enumerate(range(0, len(windows), rows)):
            batch = windows[low : low + rows]
            begin, end = int(batch[0, 1]), int(batch[-1, 2])
            if i % rt.world_size == rt.rank:
                padding = (0, 0, 0, rows - len(batch))  # with empty windows
                padded = F.pad(on_device[low : low + rows], padding)
                self.graphs.run(self._score_tail, padded, last_n=last_n)
                byte_count += int(self.val.target_bytes[begin:end].sum())
                for _, first_target, window_end in batch:
                    self.times_scored[first_target:window_end] += 1
            self.progress.advance(end - begin)
        return byte_count

    def _score_tail(self, windows: Tensor, last_n: int) -> None:
        """Score the targets of windows (W, 3) at their last positions: write them into `nll`, add them to the sum."""
        inputs, targets, target_idx = gather_windows(self.tokens, windows, self.length)
        nll = self.run.token_nll(inputs, targets[:, -last_n:])  # (W, last_n)
        self.nll[target_idx[:, -last_n:]] = nll
        self.loss_sum += nll.sum(dtype=self.loss_sum.dtype)

    def result(self) -> Score:
        """Return the score, summed in float64. Assert that every target was scored once."""
        rt, n = self.run.rt, self.val.num_targets
        times_scored = rt.all_reduce(torch.from_numpy(self.times_scored))
        num_wrong = int((times_scored != 1).sum())
        assert num_wrong == 0, f"{num_wrong} of {n} targets not scored exactly once"
        nll = self.nll[:-1].cpu().double()
        known = nll.isfinite()
        sums = torch.stack((nll[known].sum(), known.sum().double()))
        loss_sum, num_known = rt.all_reduce(sums).tolist()
        if num_known != n:
            raise UserError(f"{n - num_known:.0f} of {n} scores are not finite: the model's weights overflow")
        seconds = rt.broadcast_from_rank0(rt.now() - self.start)
        num_bytes = self.val.num_bytes
        return Score(loss_sum / n, bits_per_byte(loss_sum, num_bytes), n, num_bytes, seconds)


def eval_val(run: Run, stride: int = 0) -> Score:
    """Return the score in windows that do not overlap, or that advance by `stride`."""
    scorer = Scorer(run, run.val, stride or run.h.window)
    scorer.score(scorer.windows)
    return scorer.result()


def eval_val_sliding(run: Run) -> Score:
    """Return the score in windows that advance by EVAL_STRIDE: nearly full context for every target."""
    return eval_val(run, run.h.stride)


# =================================================== 10  ADAPTATION ===================================================
class Batch(NamedTuple):
    """One step of adaptation: this rank's sequences, and the number of targets over all ranks."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), -100 where there is none
    num_targets: int


FULL_RATE_EPOCHS = 3  # up to which TTT_LR is the rate of a step, as published (PRs 549, 977, 1092)


class TTT:
    """Test-time training of all weights, in place: a test-time method, which scores text and then adapts to it.

    A step is the same for any number of processes: they share its sequences, padded with empty ones, and its gradient.
    Another method is a subclass that `pick_ttt` returns. On a GPU, the Python of its `update` runs twice and is then
    replayed (see GraphCache); CUDA_GRAPHS=0 runs it each time.
    """

    def __init__(self, run: Run):
        self.run = run
        h = run.h
        frozen_prefixes = tuple(f"blocks.{i}." for i in range(h.ttt_freeze_blocks))
        groups = collections.defaultdict(list)  # learning-rate multiplier -> parameters
        self.frozen = []
        for name, parameter in run.model.named_parameters():
            if name.startswith(frozen_prefixes):
                self.frozen.append(parameter)
                continue
            factors = [factor for part, factor in h.ttt_multipliers.items() if part in name]
            groups[factors[0] if factors else 1.0].append(parameter)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        sizes = [p.numel() for p in self.parameters]
        self.flat_gradient = torch.zeros(sum(sizes), device=run.rt.device)  # of one collective
        parts = self.flat_gradient.split(sizes)
        self.gradients = [part.view_as(p) for part, p in zip(parts, self.parameters)]
        fused = run.rt.has_graphs or None  # which takes learning rates that are tensors
        options = []
        for factor, parameters in groups.items():
            options.append({"params": parameters, "peak_lr": h.ttt_lr * factor, "weight_decay": 0.0})
        if h.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(options, momentum=h.ttt_momentum, fused=fused)
        else:
            self.optimizer = torch.optim.AdamW(options, fused=fused, capturable=run.rt.records_graphs)
        self.graphs = GraphCache(run.rt, "adaptation")

    def score(self, scorer: Scorer, windows: np.ndarray) -> tuple[Tensor, int]:
        """Score the windows' targets, once and for all. Return the nats and bytes of those that this rank scored.

        Like `add_gradients`, it must not communicate: where memory is short, the preflight repeats it with fewer rows.
        """
        return scorer.score(windows)

    def batches(self, tokens: Tensor, begin: int, end: int) -> list[Batch]:
        """Return batches that contain the targets [begin, end) once, over all ranks."""
        h, rt = self.run.h, self.run.rt
        length = min(h.reach, len(tokens) - 1)
        windows = plan_windows(begin, end, length, length)
        on_device = rt.to_device(windows)
        size = min(h.ttt_batch_seqs, len(windows))
        rows = math.ceil(size / rt.world_size)
        batches = []
        for low in range(0, len(windows), size):
            part = windows[low : low + size]
            own = on_device[low + rt.rank : low + size : rt.world_size]
            inputs, targets, _ = gather_windows(tokens, F.pad(own, (0, 0, 0, rows - len(own))), length)
            batches.append(Batch(inputs, targets, num_targets=int(part[-1, 2] - part[0, 1])))
        return batches

    def adapt(self, batch: Batch, lr_scale: float) -> None:
        """Train on a batch that has been scored, at the peak learning rates times `lr_scale`."""
        self.graphs.run(self.update, *batch, lr_scale)

    def update(self, inputs: Tensor, targets: Tensor, num_targets: float | Tensor, lr_scale: float | Tensor) -> None:
        """Take a step along the clipped gradient of the mean loss over all ranks' targets."""
        h = self.run.h
        self.flat_gradient.zero_()
        self.add_gradients(inputs, targets, num_targets)
        self.run.rt.all_reduce(self.flat_gradient)
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        if h.ttt_grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, h.ttt_grad_clip)
        set_learning_rates(self.optimizer, lr_scale)
        self.optimizer.step()
        self.run.model.zero_grad(set_to_none=True)

    def add_gradients(self, inputs: Tensor, targets: Tensor, num_targets: float | Tensor) -> None:
        """Add this rank's part of the gradient to `self.gradients`, in passes of one shape. Frozen parameters are none
        of autograd's business meanwhile."""
        parts = math.ceil(len(inputs) / self.run.rt.max_rows["adaptation"])
        rows = math.ceil(len(inputs) / parts)
        padding = (0, 0, 0, parts * rows - len(inputs))  # empty rows
        all_inputs = F.pad(inputs, padding).split(rows)
        all_targets = F.pad(targets, padding, value=-100).split(rows)
        with without_gradients(self.frozen):
            for part_inputs, part_targets in zip(all_inputs, all_targets):
                nll = self.run.token_nll(part_inputs, part_targets)
                loss = nll.sum() / num_targets
                gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
                torch._foreach_add_(self.gradients, gradients)


@contextlib.contextmanager
def without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients of these parameters are computed in this context."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def pick_ttt(run: Run) -> TTT:
    """Return the test-time method. The only place that chooses one."""
    return TTT(run)


def chunk_windows(windows: np.ndarray, chunk_tokens: int) -> list[np.ndarray]:
    """Return the windows of each chunk of `chunk_tokens` targets. A window belongs to the chunk of its first target."""
    chunk_id = windows[:, 1] // chunk_tokens
    _, starts = np.unique(chunk_id, return_index=True)
    return np.split(windows, starts[1:])


def chunk_lr_scale(h: Hyperparameters, done: float) -> float:
    """Return the factor on TTT_LR for each step on a chunk: a half cosine, from 1 where `done` is 0 to 0 where it is 1.

    More than three epochs share the sum of three's rates. So they cost time and, in all that was measured, no quality;
    at the rate of three, 50 epochs make a score worse by 0.1 bits per byte (records/README.md).
    """
    scale = cosine(done) if h.ttt_cosine else 1.0
    return scale * min(1.0, FULL_RATE_EPOCHS / h.ttt_epochs)


def eval_val_ttt(run: Run) -> Score:
    """Return the sliding score with score-first adaptation: a chunk is scored, and only then trained on.

    Nothing is scored twice, and nothing is trained on after the last chunk.
    """
    h, rt = run.h, run.rt
    ttt = pick_ttt(run)
    scorer = Scorer(run, run.val, h.stride)
    chunks = chunk_windows(scorer.windows, h.ttt_chunk_tokens)
    num_chunks = len(chunks)
    if num_chunks == 1:
        rt.log("WARNING: the text is one chunk, so nothing is adapted: lower TTT_CHUNK_TOKENS")
    # This rank's running sums, for the log. The result is summed again over all ranks and targets, in one order.
    loss_sum = torch.zeros((), dtype=rt.sum_dtype, device=rt.device)
    byte_count = 0

    def running_score() -> str:
        """Return rank 0's score so far, for its progress lines."""
        if not byte_count:
            return ""
        return f" rank0_bpb:{bits_per_byte(loss_sum.item(), byte_count):.4f}"

    scorer.progress.status = running_score
    for ci in range(num_chunks):
        windows = chunks[ci]
        with torch.no_grad():
            chunk_loss, chunk_bytes = ttt.score(scorer, windows)
            loss_sum += chunk_loss
            byte_count += chunk_bytes
        is_last_chunk = ci == num_chunks - 1
        if is_last_chunk:
            break
        lr_scale = chunk_lr_scale(h, ci / (num_chunks - 1))
        begin, end = int(windows[0, 1]), int(windows[-1, 2])
        for batch in ttt.batches(scorer.tokens, begin, end) * h.ttt_epochs:
            ttt.adapt(batch, lr_scale)  # forward, backward, optimizer.step()
    return scorer.result()


def adapt_before_scoring(run: Run) -> None:
    """Train on the whole text before it is scored, as PRs 518 and 562 did: TTT_MODE=pre BREAKS THE RULES."""
    run.rt.log("TTT_MODE=pre trains on the validation text before it is scored: this BREAKS THE RULES and is no record")
    ttt = pick_ttt(run)
    tokens = run.val.tokens.to(run.rt.device)
    batches = ttt.batches(tokens, 0, run.val.num_targets) * run.h.ttt_epochs
    progress = Progress(run.rt, "adapting before scoring", len(batches), "step")
    for i, batch in enumerate(batches):
        lr_scale = cosine(i / len(batches)) if run.h.ttt_cosine else 1.0
        ttt.adapt(batch, lr_scale)
        progress.advance(1)


def count_passes(run: Run) -> tuple[int, int]:
    """Return the batches that a rank scores for the final score, and the steps of an epoch of adaptation."""
    h, rt, num_targets = run.h, run.rt, run.val.num_targets
    length = min(h.window, num_targets)
    windows = plan_windows(0, num_targets, length, h.stride)
    chunks = [windows]
    texts = []  # numbers of targets that are adapted to, one after the other
    if h.ttt_enabled and h.ttt_mode == "pre":
        texts = [num_targets]
    elif h.ttt_enabled:
        chunks = chunk_windows(windows, h.ttt_chunk_tokens)
        texts = [int(chunk[-1, 2] - chunk[0, 1]) for chunk in chunks[:-1]]
    windows_at_once = rt.max_rows["scoring"] * rt.world_size
    num_batches = sum(math.ceil(len(chunk) / windows_at_once) for chunk in chunks)
    sequence = min(h.reach, num_targets)
    num_steps = sum(math.ceil(math.ceil(text / sequence) / h.ttt_batch_seqs) for text in texts)
    return num_batches, num_steps


def plan_evaluation(run: Run) -> None:
    """Predict the seconds of the final score from the preflight's, choose TTT_EPOCHS=auto, and log both. Warn of what
    will not fit EVAL_BUDGET_SECONDS. No target is ever left out: what takes longer takes longer."""
    h, rt = run.h, run.rt
    num_batches, num_steps = count_passes(run)
    scoring = num_batches * rt.pass_seconds["scoring"]
    epoch = num_steps * rt.pass_seconds.get("adaptation", 0.0)
    budget = 0.95 * h.eval_budget_seconds  # predictions on a CPU were 1 to 4% off
    fitting = FULL_RATE_EPOCHS  # where there is nothing to adapt to
    if epoch:
        fitting = min(1000, int(max(0.0, budget - scoring) / epoch))
    if h.ttt_epochs == "auto":
        h.ttt_epochs = max(1, fitting)
        rt.log(f"plan: TTT_EPOCHS=auto is {h.ttt_epochs}, which repeats this run's score")
    total = scoring
    parts = f"{scoring:.1f}s of scoring"
    if epoch:
        total += h.ttt_epochs * epoch
        parts += f", {h.ttt_epochs} epochs of {epoch:.1f}s"
        if h.ttt_mode == "score_first":
            parts += f" with steps of at most {h.ttt_lr * chunk_lr_scale(h, 0.0):g}"
    rt.record("plan", scoring_seconds=scoring, epochs=h.ttt_epochs if epoch else 0, epoch_seconds=epoch)
    line = f"the final score will take about {total:.0f}s of EVAL_BUDGET_SECONDS={h.eval_budget_seconds:g}: {parts}"
    if total <= budget:
        rt.log(f"plan: {line}")
        return
    fix = "use more GPUs or a larger EVAL_STRIDE"
    if fitting and epoch:
        fix = f"TTT_EPOCHS={fitting} fits"
    rt.log(f"WARNING: {line}; {fix}")


def final_score(run: Run) -> Score:
    """Return the score that is reported, with all adaptation that the settings ask for."""
    if not run.h.ttt_enabled:
        return eval_val_sliding(run)
    if run.h.ttt_mode == "pre":
        adapt_before_scoring(run)
        return eval_val_sliding(run)
    return eval_val_ttt(run)


# Bits per byte that quantization costs: in the published systems, and from where on something is wrong.
USUAL_QUANTIZATION_GAP = 0.008
LARGEST_QUANTIZATION_GAP = 0.02


def evaluate(run: Run, averaged_bpb: float = math.nan) -> tuple[Score, float]:
    """Return the final score, and the seconds that it took with all adaptation. Warn of steps that made it worse than
    they should: `averaged_bpb` is the score before quantization, where it is known."""
    h, rt = run.h, run.rt
    quantized = eval_val(run)
    log_score(rt, "quantized", quantized)
    gap = quantized.val_bpb - averaged_bpb
    if gap > LARGEST_QUANTIZATION_GAP:
        usual = f"where {USUAL_QUANTIZATION_GAP} is usual"
        rt.warn(f"ALARM: quantization made the score worse by {gap:.4f}, {usual}: give the weights more bits")
    before = quantized
    if h.eval_ladder and h.ttt_enabled:
        before = eval_val_sliding(run)
        log_score(rt, "sliding", before)
    start = rt.now()
    score = final_score(run)
    seconds = rt.broadcast_from_rank0(rt.now() - start)
    stage = "ttt" if h.ttt_enabled else "sliding"
    log_score(rt, stage, score)
    if not math.isfinite(score.val_loss):
        raise UserError(f"the final score is {score.val_loss}: lower TTT_LR={h.ttt_lr}, or set TTT_ENABLED=0")
    if h.ttt_enabled and score.val_bpb > before.val_bpb:
        worse = score.val_bpb - before.val_bpb
        rt.warn(f"ALARM: adaptation made the score worse by {worse:.4f}: lower TTT_LR={h.ttt_lr} or TTT_EPOCHS")
    return score, seconds


# ===================================================== 11  REPORT =====================================================
def log_score(rt: Runtime, stage: str, score: Score) -> None:
    """Log a score on the way: raw, averaged, quantized, sliding, ttt, or the one after a step."""
    times = f"eval_time:{1000 * score.seconds:.0f}ms"
    rt.log(f"{stage} val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f} {times}")
    rt.record("eval", stage=stage, **score._asdict())


def banner(run: Run) -> None:
    """Log the machine, the settings that are not defaults, the data, the parameters by group, and the plan."""
    h, rt = run.h, run.rt
    rt.record("config", machine=rt.describe(), **h.values())
    rt.log(f"run: {rt.run_dir}")
    rt.log(rt.describe())
    changed = []
    for name, knob in h.knobs().items():
        value = getattr(h, name)
        if value != knob.default:
            changed.append(f"{name.upper()}={value} ({knob.default})")
    rt.log("settings (defaults): " + (", ".join(changed) or "all at their defaults"))
    for name, value in h.assumed.items():
        rt.log(f"artifact: older than the setting {name.upper()}, which is taken as {value!r}")
    _log_parameters(run)
    rt.log(f"validation: {run.val.note}")
    if h.trains:
        _log_training_plan(run)
    if h.gptq_enabled and h.first_stage in ("train", "calibrate"):
        tokens = f"{h.gptq_calibration_batches} batches of TRAIN_BATCH_TOKENS={h.train_batch_tokens:,}"
        rt.log(f"plan: GPTQ learns from {tokens}; GPTQ_CALIBRATION_BATCHES sets their number")
    ttt = "no TTT"
    if h.ttt_enabled:
        ttt = f"TTT {h.ttt_mode} {h.ttt_optimizer} lr {h.ttt_lr} epochs {h.ttt_epochs}"
    rt.log(f"plan: score with stride {h.stride} of {h.window}, {ttt}")


def _log_parameters(run: Run) -> None:
    h = run.h
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    for group in PARAM_GROUPS:
        own = [name for name in sizes if param_group_of(name) is group]
        count = sum(sizes[name] for name in own)
        bits = sorted({stored_bits(h, name) for name in own})
        how = f"{group.optimizer}, lr {getattr(h, group.lr)}, bits {bits}"
        run.rt.log(f"parameters: {group.name:<10} {count:>12,} in {len(own):>3} tensors, {how}")
    run.rt.log(f"parameters: {sum(sizes.values()):,} in all")


def _log_training_plan(run: Run) -> None:
    h, rt = run.h, run.rt
    num_tokens = sum(map(len, run.train_shards))
    rt.log(f"training: {len(run.train_shards)} shards, {num_tokens:,} tokens, {h.train_batch_tokens:,} a step")
    warmdown = f"warm-down {h.warmdown_frac:.0%}"
    if h.warmdown_iters:
        warmdown = f"warm-down {h.warmdown_iters} steps"
    seconds = training_budget(h) or math.inf
    rt.log(f"plan: train {h.iterations:,} steps or {seconds:.0f}s, {warmdown}")


def rule_breaks(kind: str, score: Score, stats: dict[str, Any], total_bytes: int) -> dict[str, str]:
    """Return rule -> reason for each rule of the challenge that this run can see to be broken."""
    breaks = {}
    if kind == "ttt_pre":
        breaks["order"] = "TTT_MODE=pre trains on validation tokens before they are scored"
    if abs(score.num_bytes - 151.06e6) > 4e4:  # all merged logs of the challenge imply 151.02 to 151.10 million
        breaks["data"] = f"{score.num_bytes} bytes are not the challenge's validation set"
    if total_bytes > SIZE_LIMIT_BYTES:
        breaks["size"] = f"code + model are over {SIZE_LIMIT_BYTES:,} bytes"
    if "train_seconds" not in stats:
        breaks["train"] = "this run did not train"
    elif stats.get("train_segments", 1) > 1:
        breaks["train"] = f"it trained in {stats['train_segments']} segments, and a record does in one"
    elif stats["train_seconds"] + stats.get("calibration_seconds", 0.0) > TRAIN_LIMIT_SECONDS:
        breaks["train"] = f"training and calibration took over {TRAIN_LIMIT_SECONDS:.0f} s"
    if stats["eval_seconds"] > EVAL_LIMIT_SECONDS:
        breaks["eval"] = f"scoring took over {EVAL_LIMIT_SECONDS:.0f} s"
    return breaks


def report(run: Run, score: Score, stats: dict[str, Any]) -> None:
    """Write submission.json and the final line, whose form is the same for every kind of score."""
    h, rt = run.h, run.rt
    kind = "plain"
    if h.ttt_enabled:
        kind = f"ttt_{h.ttt_mode}"
    elif h.stride < h.window:
        kind = "sliding"
    total_bytes = stats["bytes_model"] + len(run.code)
    breaks = rule_breaks(kind, score, stats, total_bytes)
    rt.log(f"rules: {'; '.join(breaks.values()) or 'none broken, as far as this run can tell'}")
    stats["eval_seconds_strict"] = stats["eval_seconds"] + stats["load_seconds"] + stats["preflight_seconds"]
    result = {"run_id": rt.run_dir.name, "seed": h.seed, "kind": kind, **score._asdict(), **stats}
    result |= {"bytes_code": len(run.code), "code_form": code_form(run.code), "bytes_total": total_bytes}
    result |= {"compliant": not breaks, "rule_breaks": breaks, "machine": rt.describe()}
    rt.compiler.close()  # whatever is compiled from here on is in nobody's time
    result |= {"graphs_compiled_after_preflight": rt.compiler.num_late, "sequences_per_pass": rt.max_rows}
    result |= {"code_sha256": hashlib.sha256(run.code).hexdigest(), "settings": h.values()}
    rt.record("final", **result)
    exact = f"val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f} kind:{kind} targets:{score.num_targets}"
    times = f"eval_time:{1000 * stats['eval_seconds']:.0f}ms"
    rest = f"bytes:{score.num_bytes} {times} total_bytes:{total_bytes} compliant:{int(not breaks)}"
    rt.log(f"final_exact {exact} {rest}")
    if rt.rank == 0:  # last: a run that has it is finished
        rt.save("submission.json", (json.dumps(result, indent=2) + "\n").encode())


# Settings that may change while a run is stopped: where things are, and which lines and checkpoints there are.
FREE_SETTINGS = {
    *"run_id resume checkpoint_every data_path tokenizer_path train_log_every fallback_dir tensorboard".split(),
}


class Journal:
    """What a run needs to go on after it was stopped: journal.json in its folder, of which rank 0 sends the bytes.

    "settings", "data" and "code_sha256" must be the same again. "plan" has the type, the rows of a pass and the epochs
    that were chosen; "stages", the stats of those that are complete; "segments", the processes that have worked on the
    run, one after the other.
    """

    def __init__(self, h: Hyperparameters, rt: Runtime):
        """Find the run that goes on, and the stage where it does, or choose the folder of a new one."""
        self.h = h
        self.rt = rt
        self.lock: Any = None  # on rank 0
        self.is_stale = False  # journal.json, for want of room
        self.is_closed = False  # nothing more is noted, because what it would be about could not be kept
        found = json.loads(rt.on_rank0(self._find))
        self.folder = Path(found["folder"])
        self.is_new = found["is_new"]
        self.last_written = found["last_written"]
        self.content = {"stages": {}, "segments": []} | found["journal"] | {"launch": launch_name()}
        stages = self.content["stages"]
        if "train" in stages:
            h.first_stage = "calibrate"
        if "export" in stages:
            h.first_stage = "score"
        plan = self.content.get("plan")
        if plan:
            rt.dtype = getattr(torch, plan["dtype"])

    def _find(self) -> bytes:
        found, self.lock = find_run(self.h)
        return json.dumps(found).encode()

    def trained_model(self) -> GPT | None:
        """Return the model of a run that is trained already, on rank 0, from which the others get it."""
        if self.h.first_stage != "calibrate" or self.rt.rank != 0:
            return None
        return load_artifact(self.folder / self.content["stages"]["train"].get("checkpoint", "checkpoint.bin"))[1]

    def begin(self, run: Run) -> None:
        """Open the folder and begin a segment. Raise UserError where what goes on is another run."""
        h, rt = self.h, self.rt
        data = {"validation text": digest_of_heads([run.val.tokens.numpy()])}
        if run.train_shards:
            data["training shards"] = digest_of_heads(run.train_shards)
        settings = {name: value for name, value in h.values().items() if name not in FREE_SETTINGS}
        source = unpack(run.code) or run.code
        now = {"settings": settings, "data": data, "code_sha256": hashlib.sha256(source).hexdigest()}
        of_rank0 = json.loads(rt.on_rank0(lambda: json.dumps(now).encode()))
        differences = self._differences(of_rank0, now)
        if differences:
            raise UserError(f"rank {rt.rank} is not of the run of rank 0: {'; '.join(differences)}")
        differences = self._differences(self.content, now)
        if differences:
            own = f"its script is {self.folder / 'train_gpt.py'}"
            raise UserError(f"{self.folder} was another run, so it cannot go on: {'; '.join(differences)}; {own}")
        rt.on_rank0(functools.partial(self._check_room, run))
        if self.is_new:
            self.folder = Path(rt.on_rank0(self._make_folder).decode())
        rt.open_log(self.folder)
        if rt.rank == 0:
            self._remove("*.tmp", "rank*.error.txt")  # of earlier segments
        if rt.rank == 0 and "train" in self.content["stages"]:
            self._remove("checkpoint-*.bin")
        self.content = now | self.content
        plan = self.content.get("plan")
        if plan:
            h.ttt_epochs = plan["ttt_epochs"]
            if plan["processes"] == rt.world_size:
                rt.max_rows |= plan["sequences_per_pass"]
                rt.keeps_rows = True
        self._begin_segment()

    def _differences(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """Return what is not as it was, or as it is on another rank, item by item."""
        if "settings" not in before:
            return []
        differences = []
        for name, value in now["settings"].items():
            old = before["settings"].get(name, "unknown")
            if old != value:
                differences.append(f"{name.upper()} is {value} and not {old}")
        for name, value in now["data"].items():
            if before["data"].get(name, value) != value:
                differences.append(f"the {name} in DATA_PATH={self.h.data_path} is another")
        if before["code_sha256"] != now["code_sha256"]:
            differences.append(f"this script, {CODE}, is another")
        return differences

    def _check_room(self, run: Run) -> bytes:
        """Raise UserError where the disk has no room for the run's results. Warn where it has none for checkpoints."""
        folder = nearest_folder(self.folder)
        usage = shutil.disk_usage(folder)
        if not usage.total:  # some network volumes do not tell
            return b""
        free = usage.free + sum(path.stat().st_size for path in self.folder.glob("checkpoint*.bin"))
        results, checkpoints = bytes_to_write(run)
        room = f"{folder} has room for {free / 1e6:,.0f} MB"
        spare = 0
        if self.h.fallback_dir:
            spare = shutil.disk_usage(nearest_folder(Path(self.h.fallback_dir))).free
        if max(free, spare) < results:
            raise UserError(
                f"{room}, and the results of this run take {results / 1e6:,.0f} MB: "
                "free some, start in another folder, or set FALLBACK_DIR to one with room"
            )
        if free < results + checkpoints:
            needed = f"this run, with its checkpoints, may take {(results + checkpoints) / 1e6:,.0f} MB"
            self.rt.warn(f"{room}, and {needed}: what does not fit is left out, or goes to FALLBACK_DIR")
        return b""

    def _make_folder(self) -> bytes:
        """Make the new run's folder, and return its name. A time that another run has begun at gets a number."""
        folder, number = self.folder, 1
        folder.parent.mkdir(exist_ok=True)
        while True:
            try:
                folder.mkdir()
                self.lock = lock(folder)
                return str(folder).encode()
            except FileExistsError:
                if self.h.run_id:
                    fix = "choose another RUN_ID, move it away, or go on with it by RESUME=1"
                    raise UserError(f"{folder} exists already: {fix}") from None
            number += 1
            folder = self.folder.with_name(f"{self.folder.name}-{number}")

    def _begin_segment(self) -> None:
        rt, segments = self.rt, self.content["segments"]
        if segments:
            last = segments[-1]
            last["seconds"] = seconds_since(last["begun"], self.last_written)
            number = len(segments) + 1
            rt.log(
                f"---- stopped {last['seconds']:.0f}s after {last['begun']}; segment {number} of this run begins ----"
            )
            rt.record("segment", number=number, stage=self.h.first_stage)
        begun = datetime.fromtimestamp(time.time()).astimezone().isoformat(timespec="seconds")
        segments.append({"begun": begun, "stage": self.h.first_stage, "processes": rt.world_size, "seconds": None})
        self._write()

    def _write(self) -> bool:
        """Write the journal, on rank 0. Return whether it could be: no run ends for it."""
        if self.rt.rank != 0 or self.is_closed:
            return False
        content = json.dumps(self.content, indent=2) + "\n"
        try:
            write_atomically(self.folder / "journal.json", content.encode())
            return True
        except OSError as error:
            if not self.is_stale:
                self.rt.warn(f"{os_error_line(error)}; RESUME would begin where the journal was written last")
            self.is_stale = True
            return False

    def keep_plan(self) -> None:
        """Keep what sums and roundings depend on, so that the run goes on with the same. Kernels are chosen anew."""
        rt = self.rt
        dtype = str(rt.dtype).removeprefix("torch.")
        plan = {"dtype": dtype, "processes": rt.world_size, "sequences_per_pass": rt.max_rows}
        self.content["plan"] = plan | {"ttt_epochs": self.h.ttt_epochs}
        self._write()

    def stats(self) -> dict[str, Any]:
        """Return the stats of all stages that are complete."""
        stats = {}
        for of_stage in self.content["stages"].values():
            stats |= of_stage
        return stats

    def complete(self, stage: str, stats: dict[str, Any]) -> dict[str, Any]:
        """Note that a stage is complete: no later segment trains or exports again. Return the stage's stats."""
        self.content["stages"][stage] = stats
        self.is_closed |= stats.get("checkpoint") == ""
        is_written = self._write()
        if is_written:
            self._remove("checkpoint-*.bin")  # checkpoint.bin has the outcome of the training
        return stats

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def segments(self) -> list[dict[str, Any]]:
        """Return the segments so far, with the wall-clock seconds of each."""
        segments = self.content["segments"]
        segments[-1]["seconds"] = seconds_since(segments[-1]["begun"], time.time())
        return segments


def bytes_to_write(run: Run) -> tuple[int, int]:
    """Return the bytes of a run's results, and of the checkpoints of its training that are there at a time."""
    h = run.h
    num_parameters = sum(p.numel() for p in run.model.parameters())
    results = min(h.size_limit, 2**20 + 2 * num_parameters) + 2**22  # the artifact; logs and script
    if not h.trains:
        return results, 0
    sizes = collections.Counter()  # optimizer -> bytes
    for name, parameter in run.model.named_parameters():
        sizes[param_group_of(name).optimizer] += 4 * parameter.numel()
    weights = sizes.total()
    state = (1 + h.ema_enabled + h.swa_enabled) * weights + sizes["muon"] + 2 * sizes["adamw"]
    num_checkpoints = 3 if h.checkpoint_every else 1  # two, and the next one until it is whole
    return results + weights, num_checkpoints * state


def seconds_since(begun: str, now: float) -> float:
    """Return the seconds on the wall clock since `begun`; 0 where that was set back meanwhile."""
    return max(0.0, now - datetime.fromisoformat(begun).timestamp())


def digest_of_heads(parts: list[np.ndarray]) -> str:
    """Return a digest of the lengths and the first 4,096 tokens of each part: enough to tell data sets apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} ".encode() + part[:4096].tobytes())
    return digest.hexdigest()


def launch_name() -> str:
    """Return what names the command that this process is of, after a restart by it, too."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.getppid()}"


ELSEWHERE = "mend that, or start in another folder: a run keeps its files in logs/, below where it is started"


def find_run(h: Hyperparameters) -> tuple[dict[str, Any], Any]:
    """Return the folder of the run, whether it is new, what its journal says, and when its log was written last; and
    the lock on a folder that is there.

    A run goes on by RESUME, or where its launcher has restarted it (torchrun, SLURM). Raise UserError where the run
    that is to go on is not there, is finished, or is being worked on.
    """
    if h.fallback_dir:
        check_writable(Path(h.fallback_dir), "set FALLBACK_DIR to a folder that does")
    folder = find_interrupted(h)
    if folder is None:
        folder = Path("logs") / (h.run_id or f"{datetime.fromtimestamp(time.time()):%Y%m%d-%H%M%S}")
        if h.run_id and folder.exists():
            fix = "choose another RUN_ID, move it away, or go on with it by RESUME=1"
            raise UserError(f"{folder} exists already: {fix}")
        check_writable(folder.parent, ELSEWHERE)
        return {"folder": str(folder), "is_new": True, "journal": {}, "last_written": 0.0}, None
    if (folder / "submission.json").exists():
        raise UserError(f"the run in {folder} is finished: EVAL_ONLY={folder}/final_model.bin scores it again")
    logs = list(folder.glob("train.log"))
    if not logs and any(folder.iterdir()):
        raise UserError(f"{folder} has no train.log, so it is not the folder of a run: check RESUME and RUN_ID")
    check_writable(folder, ELSEWHERE)
    last_written = max((log.stat().st_mtime for log in logs), default=0.0)
    held = lock(folder)
    journal = read_journal(folder)
    if not journal and (folder / "checkpoint.bin").exists():
        raise UserError(f"{folder} has no journal.json, so it cannot go on: EXPORT_ONLY={folder}/checkpoint.bin may")
    return {"folder": str(folder), "is_new": False, "journal": journal, "last_written": last_written}, held


def find_interrupted(h: Hyperparameters) -> Path | None:
    """Return the folder of the run that RESUME names, or that this launcher began before it restarted its processes."""
    logs = Path("logs")
    if h.resume:
        folder = logs / h.run_id if h.resume == "1" else Path(h.resume)
        if not folder.is_dir():
            raise UserError(
                f"RESUME={h.resume} finds no run in {folder}: give 1 and the run's RUN_ID, or its folder, or no RESUME"
            )
        return folder
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        candidates = logs.glob(h.run_id or "*")
        own = [path for path in candidates if is_of_this_launch(path)]
        return max(own, key=lambda path: path.stat().st_mtime, default=None)
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if requeued and h.run_id and (logs / h.run_id).is_dir():
        return logs / h.run_id
    return None


def is_of_this_launch(folder: Path) -> bool:
    """Whether the command that this process is of began the run in a folder."""
    try:
        return read_journal(folder).get("launch") == launch_name()
    except UserError:  # of another run, then
        return False


def read_journal(folder: Path) -> dict[str, Any]:
    """Return what the journal in a folder says, or nothing where there is none: then nothing was kept so far."""
    path = folder / "journal.json"
    if not path.exists():
        return {}
    content = read_file(path, LARGEST_JSON)
    try:
        journal = {"stages": {}, "segments": []} | json.loads(content)
        check_journal(journal)
        return journal
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is no journal of a run ({error!r}): begin the run again") from None


def check_journal(journal: dict[str, Any]) -> None:
    """Raise ValueError, or what else the parts raise, where a journal does not have the form of one."""
    parts = [journal["stages"], *journal["stages"].values(), *journal["segments"]]
    parts += [journal[name] for name in ("settings", "data", "plan") if name in journal]
    if not isinstance(journal["segments"], list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError("its parts are no dictionaries")
    for segment in journal["segments"]:
        seconds_since(segment["begun"], 0.0)
        if not segment["begun"].isprintable():  # any character may stand between date and time
            raise ValueError("a segment does not say when it began")
    names = [stats.get(name, "") for name in ("artifact", "checkpoint") for stats in journal["stages"].values()]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError("it does not name its files")
    if "export" in journal["stages"] and "artifact" not in journal["stages"]["export"]:
        raise ValueError("it does not name its artifact")
    counted = ("train_segments", "train_seconds", "calibration_seconds", "averaged_bpb")
    numbers = [stats.get(name, 0) for name in counted for stats in journal["stages"].values()]
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("its numbers are none")
    if "settings" in journal and not {"data", "code_sha256"} <= journal.keys():
        raise ValueError("it does not say of what data and script it is")
    plan = journal.get("plan")
    if plan is None:
        return
    counts = [*plan["sequences_per_pass"].values(), plan["ttt_epochs"], plan["processes"]]
    if plan["dtype"] not in ("float32", "bfloat16") or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("its plan is none")


def smoke(h: Hyperparameters) -> None:
    """Print the line that reviewers look for, if the untrained model guesses uniformly. Takes seconds on a CPU."""
    seconds = time.process_time()  # since the start of Python
    torch.set_num_threads(1)  # on a busy machine two threads, waiting for each other, took 8 s instead of 2
    model = GPT(h)
    ids = torch.randint(h.vocab_size, (1, 65))
    loss = model(ids[:, :-1], ids[:, 1:]).item()
    assert abs(loss - math.log(h.vocab_size)) < 0.3, f"loss {loss}: the guesses are not uniform"
    sizes = f"dim={h.model_dim}, layers={h.num_layers}, vocab={h.vocab_size}, code={len(SCRIPT)} B"
    print(f"import OK in {seconds:.2f}s, {sizes}, SMOKE_TEST_PASS")


# ====================================================== 12  MAIN ======================================================
# The stages of `main`, in order, by the phase that each begins. records/audit.py watches the functions named here. To
# it, a stage that it does not know may open no shard and must not look at the validation text.
STAGES = {
    "setup": build_run,
    "preflight": preflight,
    "train": train,
    "calibrate": calibrate,
    "export": export,
    "load": reload,
    "score": evaluate,
    "report": report,
}


def load_tool(name: str) -> Any:
    """Return the module records/<name>.py, which a setting of that name asks for. It knows this script as `t`."""
    sys.path.insert(0, str(find_path(f"records/{name}.py", name.upper()).parent))
    return importlib.import_module(name)


def estimate(h: Hyperparameters) -> None:
    """Print what a run with these settings would take. Of the data no more than a manifest is read, if it is there."""
    if Path(h.data_path).is_dir():
        h = apply_manifest(h)
    load_tool("estimate").show(sys.modules[__name__], h)


def leave(line: str, status: int) -> NoReturn:
    """End this process with a line and an exit status. No more than that: the threads of a process group that was not
    left in order abort what ends around them."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the terminal may be gone
        print(line, end="\n" * bool(line), file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


def prepare_streams() -> None:
    """Let the terminal show any text: with escapes for characters that its encoding does not have. Where standard
    streams are closed, take their numbers: the next file would get them, and what libraries print."""
    while True:
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # there may be none
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Train, export, reload, score and report. EVAL_ONLY and EXPORT_ONLY start at a later stage."""
    launch = read_launch()
    h = Hyperparameters()
    if h.smoke:
        smoke(h)
        return
    if h.audit:
        load_tool("audit").Auditor(sys.modules[__name__])
    decoded = None
    source = h.eval_only or h.export_only
    if source:
        h, decoded = load_artifact(find_path(source, "EVAL_ONLY" if h.eval_only else "EXPORT_ONLY"))
    if h.estimate:
        if launch.rank == 0:
            estimate(h)
        return
    h = apply_manifest(h)
    with Runtime(h, launch) as rt:
        journal = Journal(h, rt)
        run = build_run(h, rt, decoded or journal.trained_model())
        journal.begin(run)
        write_code(run)
        banner(run)
        stats = journal.stats() | {"data": data_hashes(h), "preflight_seconds": preflight(run)}
        plan_calibration(run)
        plan_evaluation(run)
        journal.keep_plan()
        learned = {}
        if h.first_stage == "train":
            stats |= journal.complete("train", train(run))
        if h.first_stage in ("train", "calibrate"):
            learned, calibration_stats = calibrate(run)
            stats |= journal.complete("calibrate", calibration_stats)
        run = run._replace(train_shards=[], calibrated=learned)  # from here on, nothing can read the training shards
        if h.first_stage != "score":
            stats |= journal.complete("export", export(run))
        artifact = find_path(source, "EVAL_ONLY") if h.eval_only else rt.run_dir / stats["artifact"]
        stats |= reload(run, artifact)
        score, stats["eval_seconds"] = evaluate(run, stats.get("averaged_bpb", math.nan))
        stats["segments"] = journal.segments()
        report(run, score, stats)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then shows the traceback of the first process that failed
        main = importlib.import_module("torch.distributed.elastic.multiprocessing.errors").record(main)
    prepare_streams()
    try:
        main()
    except UserError as error:
        leave(f"train_gpt.py: error: {error}", status=1)
    except OSError as error:  # where the run has a folder, its traceback is there
        leave(f"train_gpt.py: error: {os_error_line(error)}", status=1)
    except Stopped as stopped:
        leave("", status=128 + stopped.number)
    except KeyboardInterrupt:
        leave("train_gpt.py: stopped before the run began", status=130)
    except Exception:
        leave(traceback.format_exc(), status=1)
