"""Train, average, quantize, export, score and adapt a 16 MB language model: a whole Parameter Golf entry in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                   # the real thing: 600 s on 8 H100s
    python train_gpt.py                                                     # one GPU, an Apple GPU or a CPU, same file
    EVAL_ONLY=logs/<run>/final_model.bin TTT_EPOCHS=50 python train_gpt.py  # score or sweep test-time training only

Every setting is an environment variable, declared once in `Hyperparameters`. Reading downwards follows a token:

    1 hyper-parameters  one line a knob             7 training    averages, preflight, the timed loop
    2 runtime           device, ranks, clock, log   8 artifact    rows -> codes, scales -> a file of 16,000,000 bytes
    3 data              shards -> (x, y)            9 scoring     each target once, sliding windows -> bits per byte
    4 model             tokens -> nll              10 adaptation  score-first test-time training (TTT)
    5 families          name -> how it is treated  11 report      one final line, metrics.jsonl, submission.json
    6 optimizer         reduce, clip, Muon, AdamW  12 main        a table of contents

Shapes: B sequences, T positions, t scored positions at the end of T, D model width, H query heads, K key/value heads,
d head width, G = H / K, V vocabulary, W windows, N targets. Target i is tokens[i + 1]; ranges are half-open.
`loss` is a mean of nats a token, `bpb` bits a byte of the text. Attention crosses documents' bounds, n-grams do not."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import difflib
import hashlib
import importlib
import json
import lzma
import math
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CODE = Path(__file__).resolve()  # its bytes count towards the limit
SIZE_LIMIT_BYTES, TRAIN_LIMIT_SECONDS, EVAL_LIMIT_SECONDS = 16_000_000, 600.0, 600.0  # the challenge's rules


class UserError(ValueError):
    """Something that the user can mend: the message names the thing, its value and the fix."""


# ============================================== 1  HYPER-PARAMETERS ===================================================
BIG = 10**12
NUMBER = re.compile(r"[+-]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")  # no 092: float() reads 92.0
# Variables of the published scripts without an effect here (the README says why): names, and families by first word.
RETIRED = {*"DTG EMBED_LR GPTQ GRAD_QUANT HEAD_LR KEEP_FLOAT_MAX_NUMEL LATE LAWA MTP QAT WEIGHT_DECAY".split()}
RETIRED |= {"TRIGRAM_VOCAB_SIZE", "TRIGRAM_DIM"}
# Foreign variables, and first words that those share with knobs (MAX_JOBS): of these only a near spelling is an error.
COMMON = set("COMPILE DATA DEVICE EXPORT MAX MICRO MODEL MODEL_DIR NUM NUM_THREADS PROJ RUN SEED SIZE".split())


class Knob:
    """One setting: default, what is allowed (a closed range, or texts), meaning. Read on the class it is the default.
    The environment variable is the attribute's name in capitals; the type is the default's; switches are 0 or 1."""

    def __init__(self, default: Any, allowed: tuple | None, meaning: str):
        self.default, self.allowed, self.meaning = default, allowed, meaning

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self.default  # an instance's values lie in its own dictionary, which goes before this

    def parse(self, name: str, value: Any) -> Any:
        """Returns `value`, a text of the environment or a Python value, as this knob's type; raises UserError."""
        kind = type(self.default)
        try:
            if isinstance(value, str) and kind is not str:
                if not NUMBER.fullmatch(value):
                    raise ValueError
                value = {"0": False, "1": True}[value] if kind is bool else kind(value)
            value = float(value) if kind is float and type(value) is int else value
            numbers = self.allowed and kind is not str
            inside = self.allowed[0] <= value <= self.allowed[1] if numbers else value in (self.allowed or (value,))
            if type(value) is not kind or not inside:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            allowed = "0 or 1" if kind is bool else f"of type {kind.__name__}, in {self.allowed or 'any form'}"
            fix = f"it must be {allowed} (default {self.default}): {self.meaning}"
            raise UserError(f"{name.upper()}={value} is not allowed, {fix}") from None
        return value


class ModelKnob(Knob):
    """A knob that is part of the function which the weights belong to: the artifact's header carries it."""


class Hyperparameters:
    """All settings: `Hyperparameters.model_dim` is a default, `Hyperparameters()` reads the environment (`MODEL_DIM`),
    or raises UserError, `Hyperparameters(model_dim=64)` overrides. No dataclass: in review tools those fail on 3.10."""

    data_path = Knob("./data/datasets/fineweb10B_sp1024", None, "folder of the *_train_*.bin and *_val_*.bin shards")
    tokenizer_path = Knob("./data/tokenizers/fineweb_1024_bpe.model", None, "SentencePiece model of those shards")
    run_id = Knob("", None, "folder of the run under logs/; empty: the time of its start")
    seed = Knob(1337, (0, 2**31 - 1), "of the initial weights, the training's order and the preflight's tokens")
    device = Knob("auto", ("auto", "cuda", "mps", "cpu"), "auto: the first of these that is there")
    compile = Knob("auto", ("auto", "0", "1"), "torch.compile; auto: on CUDA only")
    attn_backend = Knob("auto", ("auto", "fa3", "fa2", "sdpa"), "auto: the first of these that can be used")
    max_val_tokens = Knob(0, (0, BIG), "score only so many targets; 0: all, and only that can be a record")
    eval_only = Knob("", None, "artifact to score without training")
    export_only = Knob("", None, "checkpoint to quantize, export and score without training")
    audit = Knob(False, None, "prove on the finished run that it kept the rules: records/audit.py, compliance.json")
    smoke = Knob(False, None, "only run the untrained model on random tokens and print one line")
    iterations = Knob(20_000, (1, BIG), "steps at most")
    max_wallclock_seconds = Knob(600.0, (0.0, 1e9), "seconds of training at most; 0: no limit")
    warmdown_frac = Knob(0.5, (0.0, 1.0), "last part of the run, in which the learning rate falls linearly to 0")
    warmdown_iters = Knob(0, (0, BIG), "the same in steps; used instead of the fraction when not 0")
    warmup_steps = Knob(20, (1, 1000), "untimed steps of the preflight, on random tokens (2 where nothing is compiled)")
    train_batch_tokens = Knob(786_432, (1, BIG), "tokens of an optimizer step over all processes")
    micro_batch_tokens = Knob(98_304, (1, BIG), "tokens of one forward and backward pass on a device at most")
    train_seq_len = ModelKnob(2048, (2, 2**20), "positions of a training sequence")
    loader = Knob("shuffled", ("shuffled", "sequential"), "order of the training windows; sequential: as in the files")
    train_log_every = Knob(500, (1, BIG), "steps between log lines (besides the first ten, and one every 30 s)")
    val_loss_every = Knob(4000, (0, BIG), "steps between validations; 0: only after the last")
    vocab_size = ModelKnob(1024, (2, 65_536), "pieces V")
    num_layers = ModelKnob(11, (2, 128), "blocks")
    model_dim = ModelKnob(512, (8, 16_384), "width D of the residual stream")
    num_heads = ModelKnob(8, (1, 256), "query heads H")
    num_kv_heads = ModelKnob(4, (1, 256), "key/value heads K (grouped-query attention); divides NUM_HEADS")
    mlp_mult = ModelKnob(3.0, (0.1, 64.0), "hidden width of the MLP over D")
    leaky_slope = ModelKnob(0.75, (0.0, 1.0), "LeakyReLU(slope)^2; 0: ReLU^2")
    tie_embeddings = ModelKnob(True, None, "must be 1: the head is the token embedding")
    logit_softcap = ModelKnob(30.0, (1e-3, 1e6), "c of logits = c tanh(logits / c)")
    rope_base = ModelKnob(10_000.0, (1.0, 1e9), "base of the rotary frequencies")
    rope_dims = ModelKnob(16, (0, 1024), "rotated dimensions of a head; 0: all")
    rope_train_len = ModelKnob(1024, (0, 2**20), "the base is scaled up from this length to TRAIN_SEQ_LEN; 0: never")
    xsa_last_n = ModelKnob(11, (0, 128), "exclusive self attention on the last n blocks, at most all")
    ln_scale = ModelKnob(True, None, "scale the normed inputs of block l by 1/sqrt(l + 1)")
    bigram_vocab_size = ModelKnob(2048, (0, 2**24), "rows of the bigram hash table, the last one reserved; 0: none")
    bigram_dim = ModelKnob(128, (1, 16_384), "its width")
    trigram_shared = ModelKnob(False, None, "look up trigrams in the bigram table too (PR 562)")
    ve_enabled = ModelKnob(True, None, "value embeddings: token identity added to the values of some blocks")
    ve_dim = ModelKnob(128, (1, 16_384), "width of their table")
    ve_layers = ModelKnob("-2,-1", None, "their blocks; a negative number counts from the last")
    value_residual = ModelKnob(False, None, "mix the first block's values into every block's")
    gated_attention = ModelKnob(False, None, "a sigmoid gate a head on the attention's output")
    qk_gain_init = Knob(1.5, (0.0, 100.0), "initial gain of the normed queries")
    tied_embed_init_std = Knob(0.005, (0.0, 10.0), "standard deviation of the initial token embedding")
    matrix_lr = Knob(0.027, (0.0, 10.0), "Muon learning rate")
    scalar_lr = Knob(0.025, (0.0, 10.0), "AdamW learning rate of gains, scales and gates")
    tied_embed_lr = Knob(0.035, (0.0, 10.0), "AdamW learning rate of embedding and hash tables")
    muon_momentum = Knob(0.99, (0.0, 0.9999), "after its warm-up")
    muon_momentum_warmup_start = Knob(0.92, (0.0, 0.9999), "at step 0")
    muon_momentum_warmup_steps = Knob(1500, (0, BIG), "steps from start to end, linear")
    muon_backend_steps = Knob(5, (1, 20), "Newton-Schulz iterations")
    muon_wd = Knob(0.04, (0.0, 10.0), "decoupled weight decay of the matrices")
    adam_wd = Knob(0.04, (0.0, 10.0), "decoupled weight decay of the tables (gains and gates have none)")
    beta1 = Knob(0.9, (0.0, 0.9999), "AdamW")
    beta2 = Knob(0.95, (0.0, 0.99999), "AdamW")
    adam_eps = Knob(1e-8, (1e-20, 1.0), "AdamW")
    grad_clip_norm = Knob(0.3, (0.0, 1e9), "norm of the reduced gradient at most; 0: off")
    ema_enabled = Knob(True, None, "export an exponential moving average of the weights")
    ema_decay = Knob(0.997, (0.0, 0.99999), "its decay, approached from below as (1 + step) / (10 + step)")
    swa_enabled = Knob(False, None, "export a mean of snapshots (of the EMA where that is on)")
    swa_every = Knob(50, (1, BIG), "steps between snapshots")
    swa_start_frac = Knob(0.4, (0.0, 1.0), "snapshots are taken while the learning-rate scale is below this")
    mlp_bits = Knob(6, (2, 16), "stored bits of the MLP matrices: 2 to 8, or 16 for fp16")
    attn_bits = Knob(6, (2, 16), "of the attention matrices")
    embed_bits = Knob(8, (2, 16), "of the token embedding and the value-embedding table")
    bigram_bits = Knob(8, (2, 16), "of the hash tables")
    proj_bits = Knob(16, (2, 16), "of the projections of hash tables and value embedding")
    fp16_keep_name_patterns = Knob("", None, "parts of names, with commas: such tensors are stored in fp16")
    quant_floor = Knob("auto", None, "least row clip; auto: the least whose code + model fit SIZE_LIMIT")
    prune_frac = Knob(0.0, (0.0, 0.9), "this part of each quantized matrix, the smallest in magnitude, is zeroed first")
    compressor = Knob("zstd", ("zstd", "lzma"), "zstd: level 22; lzma: preset 9, extreme")
    size_limit = Knob(SIZE_LIMIT_BYTES, (1, SIZE_LIMIT_BYTES), "bytes of code + model; more is an error")
    eval_seq_len = Knob(0, (0, 2**20), "positions of a scoring window, and of adaptation; 0: TRAIN_SEQ_LEN")
    eval_stride = Knob(64, (0, 2**20), "targets scored a window; 0: windows do not overlap")
    eval_batch_seqs = Knob(32, (1, 4096), "windows a forward pass")
    eval_ladder = Knob(False, None, "with TTT, score the sliding windows without it as well, for the report")
    ttt_enabled = Knob(True, None, "adapt at test time")
    ttt_mode = Knob("score_first", ("score_first", "pre"), "pre: adapt, then score, which BREAKS THE RULES")
    ttt_optimizer = Knob("sgd", ("sgd", "adamw"), "sgd with momentum, or adamw with betas 0.9 and 0.999, no decay")
    ttt_lr = Knob(0.03, (0.0, 10.0), "peak learning rate")
    ttt_epochs = Knob(3, (1, 1000), "passes over each chunk (pre: over the whole text)")
    ttt_chunk_tokens = Knob(32_768, (1, BIG), "targets scored before each adaptation")
    ttt_momentum = Knob(0.9, (0.0, 0.9999), "of sgd")
    ttt_batch_seqs = Knob(32, (1, 65_536), "sequences of an adaptation step over all processes")
    ttt_cosine = Knob(True, None, "the learning rate falls as a half cosine over the chunks (pre: over the steps)")
    ttt_grad_clip = Knob(1.0, (0.0, 1e9), "norm of the reduced gradient at most; 0: off")
    ttt_freeze_blocks = Knob(0, (0, 128), "the first n blocks are not adapted")
    ttt_lr_groups = Knob("", None, "learning-rate multipliers by part of the name, as mlp.proj:3,mlp.fc:0.5")

    def __init__(self, **overrides: Any):
        self.given = read_environment(self.knobs())
        self.chosen = {*self.given, *overrides}  # what the data's manifest cannot decide
        for name in overrides.keys() - self.knobs().keys():
            raise UserError(f"{name} is no setting{suggest(name, self.knobs())}")
        for name, knob in self.knobs().items():
            setattr(self, name, knob.parse(name, overrides.get(name, self.given.get(name, knob.default))))
        self.head_dim = self.model_dim // self.num_heads
        self.window = self.eval_seq_len or self.train_seq_len  # positions T of a scoring window
        self.stride = self.eval_stride or self.window  # targets scored by every window but the first
        self.check()

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """Returns name -> knob in the order of declaration."""
        return {name: knob for name, knob in vars(cls).items() if isinstance(knob, Knob)}

    def values(self, kind: type[Knob] = Knob) -> dict[str, Any]:
        """Returns name -> value of every knob of a kind."""
        return {name: getattr(self, name) for name, knob in self.knobs().items() if isinstance(knob, kind)}

    def check(self) -> None:
        """Derives what is written as text, and raises UserError where settings do not fit together."""
        dim, heads, kv, window = self.model_dim, self.num_heads, self.num_kv_heads, self.window
        tokens, length, layers, rope = self.train_batch_tokens, self.train_seq_len, self.num_layers, self.rope_dims
        table, training = self.bigram_vocab_size, not (self.eval_only or self.export_only)
        bits = [name.upper() for name in self.knobs() if name.endswith("_bits") and 8 < getattr(self, name) < 16]
        try:
            indices = [int(i) for i in self.ve_layers.split(",")] if self.ve_enabled else []
            pairs = [(part, number) for part, number in (x.split(":") for x in self.ttt_lr_groups.split(",") if x)]
        except ValueError:
            given = f"VE_LAYERS={self.ve_layers} TTT_LR_GROUPS={self.ttt_lr_groups}: one"
            raise UserError(f"{given} is malformed, use the forms 9,10 and mlp.proj:3,mlp.fc:0.5") from None
        self.ve_blocks = sorted({i + layers if i < 0 else i for i in indices})
        number = Knob(0.0, (0.0, 1e3), "a plain number (or auto, for QUANT_FLOOR)").parse
        self.floor = None if self.quant_floor == "auto" else number("quant_floor", self.quant_floor)
        self.ttt_multipliers = {part: number("ttt_lr_groups", text) for part, text in pairs}
        self.fp16_patterns = [part for part in self.fp16_keep_name_patterns.split(",") if part]
        for wrong, message in (
            (not self.tie_embeddings, "TIE_EMBEDDINGS=0 is not built: an untied head measured worse (+0.008)"),
            (dim % heads, f"MODEL_DIM={dim} is not a multiple of NUM_HEADS={heads}"),
            (heads % kv, f"NUM_HEADS={heads} is not a multiple of NUM_KV_HEADS={kv}"),
            (self.head_dim % 2, f"MODEL_DIM={dim} / NUM_HEADS={heads} is odd, but rotary positions need pairs"),
            (rope % 2 or rope > self.head_dim, f"ROPE_DIMS={rope} is odd or above the head width {self.head_dim}"),
            (max(length, window) * (rope or self.head_dim) > 2**27, f"{length} or {window} positions are too many"),
            (table == 1, "BIGRAM_VOCAB_SIZE=1 leaves no row for n-grams: use 0 or at least 2"),
            (self.trigram_shared and not table, "TRIGRAM_SHARED=1 needs BIGRAM_VOCAB_SIZE above 0"),
            (set(self.ve_blocks) - set(range(layers)), f"VE_LAYERS={self.ve_layers}: blocks are 0 to {layers - 1}"),
            (self.stride > window, f"EVAL_STRIDE={self.eval_stride} is above the window of {window} positions"),
            (training and tokens % length, f"TRAIN_BATCH_TOKENS={tokens} is not a multiple of TRAIN_SEQ_LEN={length}"),
            (self.ttt_freeze_blocks > layers, f"TTT_FREEZE_BLOCKS={self.ttt_freeze_blocks} is over {layers} layers"),
            (bits, f"{', '.join(bits)}: stored bits are 2 to 8, or 16 for fp16"),
            (self.eval_only and self.export_only, "EVAL_ONLY and EXPORT_ONLY are both set: use one of them"),
            (not re.fullmatch(r"(\w[\w.-]*)?", self.run_id), f"RUN_ID={self.run_id}: use letters, digits, '.', '_', -"),
        ):
            if wrong:
                raise UserError(message)


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean …?)' with the nearest known name, or an empty text."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def read_environment(knobs: Iterable[str]) -> dict[str, str]:
    """Returns knob -> text of the knobs that are set; refuses names that only look like one (4 of 44 READMEs)."""
    names, given = {knob.upper() for knob in knobs}, {}
    own_words = {name.split("_")[0] for name in names} - COMMON
    for name, value in os.environ.items():
        first = name.split("_")[0] if "_" in name else ""
        if name in names:
            given[name.lower()] = value
        elif {name, first} & RETIRED:
            raise UserError(f"{name} has no effect in this script: unset it (the README says what to use)")
        elif name not in COMMON and (first in own_words or difflib.get_close_matches(name, names, 1, 0.85)):
            raise UserError(f"{name} is no setting of this script{suggest(name, names)}: unset or rename it")
    return given


# =================================================== 2  RUNTIME =======================================================
class Runtime:
    """The machine: device, ranks, collectives, compilation, clock and log. Nothing else says CUDA or looks at a rank.
    With one process every collective returns its argument, so an algorithm has one code path for 1 and N processes."""

    def __init__(self, h: Hyperparameters):
        self.rank, self.local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.world_size, local_world_size = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.device = self._pick_device(h.device)
        cuda = self.device.type == "cuda"
        # GPUs before Ampere emulate bfloat16, and CPUs are as fast and more exact in float32 at test sizes.
        self.dtype = torch.bfloat16 if cuda and torch.cuda.get_device_capability()[0] >= 8 else torch.float32
        self.compiled = cuda if h.compile == "auto" else h.compile == "1"
        self.attend, self.attention_note = pick_attention(h.attn_backend, cuda and self.dtype == torch.bfloat16)
        self.lag, self.pending, self.files = int(cuda), None, []  # lag: steps that the host may be ahead of the device
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))  # torchrun would set 1
            torch.set_flush_denormal(True)
        if self.world_size > 1:
            importlib.import_module("torch._dynamo")  # later it would bind the group, whose threads outlive `close`
            # gloo beside NCCL: the host's decisions do not wait for the device. Half an hour: rank 0 exports alone.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        torch.manual_seed(h.seed)

    def _pick_device(self, name: str) -> torch.device:
        mps = torch.backends.mps.is_available() and self.world_size == 1  # gloo knows no MPS tensors
        present = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
        name = next(n for n in present if present[n]) if name == "auto" else name
        if not present[name] or (name == "cuda" and self.local_rank >= torch.cuda.device_count()):
            raise UserError(f"DEVICE={name} is not there for process {self.local_rank}: DEVICE or --nproc_per_node")
        if name == "cuda":
            torch.cuda.set_device(self.local_rank)
            torch.set_float32_matmul_precision("high")
        return torch.device(name, self.local_rank if name == "cuda" else None)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of `tensor` over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def reduce_scatter(self, stack: Tensor) -> Tensor:
        """Returns this rank's part of the sum of `stack`, whose first dimension the number of processes divides."""
        if self.world_size > 1:
            part = stack.new_empty((len(stack) // self.world_size, *stack.shape[1:]))
            (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(part, stack)  # its older name
        return part if self.world_size > 1 else stack

    def all_gather(self, part: Tensor) -> Tensor:
        """Returns the parts of all ranks as one tensor, in the order of the ranks."""
        if self.world_size > 1:
            stack = part.new_empty((len(part) * self.world_size, *part.shape[1:]))
            (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(stack, part.contiguous())
        return stack if self.world_size > 1 else part

    def agree(self, number: float) -> float:
        """Returns rank 0's `number` on every rank: a decision is taken once. The device is not waited for."""
        shared = torch.tensor(number, dtype=torch.float64)
        if self.world_size > 1:
            dist.broadcast(shared, 0)
        return shared.item()

    def compile(self, function: Callable) -> Callable:
        """Returns `function` compiled for fixed shapes, or as it is where compilation is off."""
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiled else function

    def to_device(self, array: np.ndarray) -> Tensor:
        """Returns the array as int64 on the device; the host does not wait for the copy."""
        tensor = torch.from_numpy(array).pin_memory() if self.device.type == "cuda" else torch.from_numpy(array)
        return tensor.to(self.device, non_blocking=True).long()

    def now(self) -> float:
        """Returns seconds on a monotonic clock, when all work given to the device is done."""
        if self.device.type != "cpu":
            (torch.cuda if self.device.type == "cuda" else torch.mps).synchronize()
        return time.perf_counter()

    def follow(self, number: Tensor) -> float:
        """Queues a number, and returns the one of `lag` calls ago (nan: none): the host is never further ahead."""
        if not self.lag:
            return number.item()
        copy = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        before, self.pending = self.pending, (copy, torch.cuda.current_stream().record_event())
        if before is None:
            return math.nan
        before[1].synchronize()
        return before[0].item()

    def describe(self) -> str:
        """Returns device, processes, numerics and versions on a line."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        numerics = f"dtype:{str(self.dtype)[6:]} compile:{int(self.compiled)} attention:{self.attention_note}"
        versions = f"torch:{torch.__version__} python:{platform.python_version()} threads:{torch.get_num_threads()}"
        return f"device:{self.device.type} ({name}) processes:{self.world_size} {numerics} {versions}"

    def open_log(self, run_id: str) -> None:
        """Makes logs/<run_id>/ with a copy of this script. A run that is there is never overwritten: UserError."""
        self.run_dir = Path("logs") / (run_id or f"{datetime.fromtimestamp(self.agree(time.time())):%Y%m%d-%H%M%S}")
        if self.agree(self.run_dir.exists()):
            raise UserError(f"{self.run_dir} exists already: choose another RUN_ID, or move it away")
        if self.rank == 0:
            self.run_dir.mkdir(parents=True)
            write_atomically(self.run_dir / "train_gpt.py", CODE.read_bytes())
            self.files = [(self.run_dir / n).open("x", 1, encoding="utf-8") for n in ("train.log", "metrics.jsonl")]

    def log(self, line: str) -> None:
        """Prints a line on rank 0, and keeps it in train.log."""
        for file in (sys.stdout, *self.files[:1]) if self.rank == 0 else ():
            print(line, file=file, flush=True)

    def record(self, event: str, **fields: Any) -> None:
        """Appends a JSON line to metrics.jsonl."""
        for file in self.files[1:]:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


class Progress:
    """Logs a line on long work every 15 seconds: done, rate, elapsed, time left."""

    def __init__(self, rt: Runtime, label: str, total: int, unit: str):
        self.rt, self.label, self.total, self.unit, self.done = rt, label, total, unit, 0
        self.start = self.last = time.perf_counter()

    def advance(self, amount: float) -> None:
        self.done, now = self.done + amount, time.perf_counter()
        if self.done < self.total and now - self.last > 15:
            self.last, seconds = now, now - self.start
            rate, left = f"{self.done / seconds:,.1f} {self.unit}/s", seconds * (self.total / self.done - 1)
            self.rt.log(f"{self.label}: {self.done:,}/{self.total:,} {rate} elapsed:{seconds:.0f}s left:{left:.0f}s")


def need(module: str, otherwise: str) -> Any:
    """Returns an imported package, or raises UserError: nothing else ever silently takes its place."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"the package {module} is missing: `pip install {module}`, {otherwise}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file of which nobody ever sees a part: under its name there is the old content, or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# ===================================================== 3  DATA ========================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, BOS = 20240520, 1, 1024, 1  # BOS: the first token of every document
DATA_HELP = "run `python data/download.py`, or `python data/demo.py` and set DATA_PATH=./data/datasets/demo_sp1024"


def find_path(path: str | Path, variable: str) -> Path:
    """Returns `path`, also looked for from the folders above this script: a copy of it may run in records/…/."""
    for base in (Path(), *CODE.parents):
        if (base / path).exists():
            return base / path
    fix = DATA_HELP if variable.endswith("_PATH") else "runs leave such files in logs/, the project has records/"
    raise UserError(f"{variable}={path} does not exist (looked from {Path.cwd()}): {fix}")


def load_data_shard(path: Path) -> np.ndarray:
    """Returns a shard's tokens, uint16, mapped (by torch: Python would keep files open); UserError if it is broken."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if header.size < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is no token shard ({size} bytes, begins with {header[:2].tolist()}): fetch it again")
    expected = SHARD_HEADER_BYTES + 2 * int(header[2])
    if header[2] < 1 or size != expected:
        state = "empty" if header[2] < 1 else "truncated" if size < expected else "oversized"
        raise UserError(f"{path} is {state}: {size} bytes, but its header declares {expected}: fetch it again")
    return torch.from_file(str(path), size=size // 2, dtype=torch.uint16).numpy()[SHARD_HEADER_BYTES // 2 :]


def settle_data(h: Hyperparameters) -> Hyperparameters:
    """Returns the settings with vocabulary and tokenizer of the shards' manifest.json; UserError where it is wrong."""
    folder, settled = find_path(h.data_path, "DATA_PATH"), copy.copy(h)
    if not (path := folder / "manifest.json").exists():
        return h
    try:
        manifest = json.loads(path.read_bytes())
        tokenizer, listed = manifest["tokenizer"], {(n, int(f["tokens"])) for n, f in manifest["files"].items()}
        found = {"vocab_size": int(tokenizer["vocab_size"]), "tokenizer_path": str(folder / tokenizer["path"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is no manifest of token shards ({error!r}): make it anew or remove it") from None
    shards = [shard for split in ("train", "val") for shard in folder.glob(f"*_{split}_*.bin")]
    for name, _ in sorted(listed ^ {(s.name, (s.stat().st_size - SHARD_HEADER_BYTES) // 2) for s in shards}):
        raise UserError(f"{folder / name} is not as {path} says: `python data/verify.py {folder}` tells what is wrong")
    vars(settled).update({name: h.knobs()[name].parse(name, found[name]) for name in found.keys() - h.chosen})
    file = find_path(settled.tokenizer_path, "TOKENIZER_PATH")
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != tokenizer.get("sha256"):
        raise UserError(f"TOKENIZER_PATH={file} is not the tokenizer that {path} names: unset it, or fetch it again")
    return settled


def load_shards(h: Hyperparameters, split: str) -> list[np.ndarray]:
    """Returns the shards of `split`, train or val, in order of their names. No file may be in both splits."""
    folder = find_path(h.data_path, "DATA_PATH")
    paths, others = (sorted(folder.glob(f"*_{s}_*.bin")) for s in (split, "val" if split == "train" else "train"))
    if not paths:
        raise UserError(f"DATA_PATH={folder} holds no *_{split}_*.bin: {DATA_HELP}")
    for both in {path.resolve() for path in paths} & {path.resolve() for path in others}:
        raise UserError(f"{both} is both a train and a validation shard (*_train_*, *_val_*): rename or remove it")
    shards = [load_data_shard(path) for path in paths]
    for path, shard in zip(paths, shards):  # all of them now: a run must not end with this after ten minutes
        if (highest := int(shard.max())) >= h.vocab_size:
            raise UserError(f"{path} holds token {highest}, but VOCAB_SIZE={h.vocab_size}: {DATA_HELP}")
    return shards


def batch_plan(h: Hyperparameters, world_size: int) -> tuple[int, int]:
    """Returns (sequences a rank and step, micro-batches that they are cut into), or raises UserError."""
    sequences, length = h.train_batch_tokens // h.train_seq_len, h.train_seq_len
    if sequences % world_size:
        raise UserError(f"TRAIN_BATCH_TOKENS={h.train_batch_tokens} is no multiple of {world_size} x {length} tokens")
    rows, most = sequences // world_size, max(1, h.micro_batch_tokens // length)
    return rows, next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most)


class TokenLoader:
    """Training batches of windows of T = TRAIN_SEQ_LEN tokens, two read ahead. The shards are a ring, an epoch all of
    its windows, each once: in file order, or (LOADER=shuffled) in an order, and from a phase below T, that SEED and
    epoch give. A step is the same for any number of processes and wherever reading began; a rank reads its own part."""

    def __init__(self, h: Hyperparameters, rt: Runtime, shards: list[np.ndarray], step: int = 0):
        self.h, self.rt, self.shards, self.step = h, rt, shards, step
        self.offsets = np.cumsum([0, *map(len, shards)])  # of the shards in the ring
        self.num_windows, self.epoch, self.phase, self.order = max(1, self.offsets[-1] // h.train_seq_len), -1, 0, None
        self.rows, self.num_micro_batches = batch_plan(h, rt.world_size)
        self.pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.futures = collections.deque(self.pool.submit(self._read, step + ahead) for ahead in range(2))

    def _begin(self, number: int) -> int:
        """Returns where in the ring a window begins, numbered over all steps and ranks."""
        epoch, index = divmod(number, self.num_windows)
        if self.h.loader == "sequential":
            return number * self.h.train_seq_len
        if epoch != self.epoch:  # 8 bytes a window: 31 MB and 0.1 s for the challenge's 8 billion tokens
            draw, self.epoch = np.random.default_rng((self.h.seed, epoch)), epoch
            self.phase, self.order = int(draw.integers(self.h.train_seq_len)), draw.permutation(self.num_windows)
        return self.phase + int(self.order[index]) * self.h.train_seq_len

    def _read(self, step: int) -> np.ndarray:
        """Returns this rank's windows of a step, int32 (rows, T + 1): each also holds its last target."""
        windows = np.empty((self.rows, self.h.train_seq_len + 1), np.int32)
        for row, window in enumerate(windows):
            at, num_read = self._begin((step * self.rt.world_size + self.rt.rank) * self.rows + row), 0
            while num_read < len(window):
                index = int(np.searchsorted(self.offsets, at % self.offsets[-1], side="right")) - 1
                part = self.shards[index][at % self.offsets[-1] - self.offsets[index] :][: len(window) - num_read]
                window[num_read : num_read + len(part)] = part
                at, num_read = at + len(part), num_read + len(part)
        return windows

    def next_batch(self) -> list[tuple[Tensor, Tensor]]:
        """Returns this rank's micro-batches of the next step: inputs and targets, int64 (B, T)."""
        tokens = self.rt.to_device(self.futures.popleft().result()).unflatten(0, (self.num_micro_batches, -1))
        self.step += 1
        self.futures.append(self.pool.submit(self._read, self.step + 1))
        return list(zip(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()))


def load_tokenizer(path: str, vocab_size: int) -> Any:
    """Returns the SentencePiece model; UserError if it does not fit VOCAB_SIZE or cannot count bytes rightly."""
    file = find_path(path, "TOKENIZER_PATH")
    sp = need("sentencepiece", "it counts the bytes of the tokens").SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"TOKENIZER_PATH={file} is no SentencePiece model ({error}): fetch it again") from None
    if sp.vocab_size() != vocab_size:
        raise UserError(f"{file} has {sp.vocab_size()} pieces, VOCAB_SIZE={vocab_size}: unset that, or use other data")
    if sp.is_unknown(sp.piece_to_id("\u2581")) and "<0x20>" not in sp.encode("x x", out_type=str):
        raise UserError(f"TOKENIZER_PATH={file} lacks the bare piece '\u2581', so bytes are miscounted: train it anew")
    return sp


def build_sentencepiece_luts(sp: Any, vocab_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Returns for each id (V,): bytes of its piece without a leading "\u2581", whether it has one, and whether it is a
    boundary, after which that "\u2581" is no space. Control, unknown and unused ids are boundaries of no bytes."""
    ids, pieces = range(vocab_size), [sp.id_to_piece(i) for i in range(vocab_size)]
    is_boundary_token = [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in ids]
    has_leading_space = [pieces[i].startswith("\u2581") and not is_boundary_token[i] for i in ids]
    texts = [pieces[i].removeprefix("\u2581").replace("\u2581", " ") for i in ids]
    base_bytes = [0 if is_boundary_token[i] else 1 if sp.is_byte(i) else len(texts[i].encode()) for i in ids]
    return tuple(torch.tensor(lut, device=device) for lut in (base_bytes, has_leading_space, is_boundary_token))


# The scored text: tokens, int32 (N + 1,); N; the UTF-8 bytes that the N targets decode to; a line about it.
Validation = collections.namedtuple("Validation", "tokens num_targets num_bytes note")


def load_validation_tokens(h: Hyperparameters) -> Validation:
    """Returns the text of all validation shards, cut to a multiple of the window as in all published scores."""
    sp, shards = load_tokenizer(h.tokenizer_path, h.vocab_size), load_shards(h, "val")
    tokens = torch.from_numpy(np.concatenate([shard.astype(np.int32) for shard in shards]))
    num_targets = min(len(tokens) - 1, h.max_val_tokens or BIG)
    num_targets = num_targets // h.window * h.window or num_targets
    left_off, tokens = len(tokens) - 1 - num_targets, tokens[: num_targets + 1]
    base_bytes, has_leading_space, is_boundary_token = build_sentencepiece_luts(sp, h.vocab_size)
    previous, target = tokens[:-1].long(), tokens[1:].long()
    num_bytes = int((base_bytes[target] + (has_leading_space[target] & ~is_boundary_token[previous])).sum())
    if not num_bytes:
        raise UserError(f"the validation shards of DATA_PATH={h.data_path} hold no text ({num_targets + 1} tokens)")
    note = f"{len(shards)} shards, {num_targets:,} targets ({left_off:,} left off), {num_bytes:,} bytes"
    return Validation(tokens, num_targets, num_bytes, f"{note}, {num_bytes / num_targets:.6f} bytes a target")


# ==================================================== 4  MODEL ========================================================
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns causal attention (B, t, H, d) of queries that end where the keys and values (B, T, K, d) end."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    t, length = q.size(2), k.size(2)
    if t == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))  # kernels with a mask know no groups
    mask = torch.ones(t, length, dtype=torch.bool, device=q.device).tril(length - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def pick_attention(wanted: str, usable: bool) -> tuple[Callable, str]:
    """Returns an attention function like `sdpa`, and a note: its name, and why those before it were passed over. On
    H100s whole steps took 83 ms with FlashAttention 3 and 94 to 101 ms with torch's kernel (PRs 549, 1092, 518)."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module.flash_attn_func(q, k, v, causal=True)  # aligns the ends of queries and keys, as `sdpa` does
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp as well

    notes = [] if usable else ["FlashAttention needs a GPU with bfloat16"]
    for name, package in (("fa3", "flash_attn_interface"), ("fa2", "flash_attn")) if usable else ():
        if wanted in ("auto", name):
            try:
                module = importlib.import_module(package)
                return flash, f"{name} ({'; '.join(notes) or 'found'})"
            except ImportError as error:
                notes.append(f"no {name}: {error}")
    if wanted in ("fa3", "fa2"):
        raise UserError(f"ATTN_BACKEND={wanted} cannot be used ({notes[0]}): install it or set ATTN_BACKEND=auto")
    return sdpa, f"sdpa ({'; '.join(notes) or 'as set'})"


def rms_norm(x: Tensor) -> Tensor:
    """Returns x over its root mean square, statistics in fp32; eps is written out as torch's default has changed."""
    return F.rms_norm(x.float(), (x.size(-1),), eps=1.1920929e-07).to(x.dtype)


class Linear(nn.Linear):
    """A matrix, and perhaps a bias: fp32 masters, cast to the activations' type at use."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) of a head's first r = ROPE_DIMS dimensions. The base is b max(1,
    TRAIN_SEQ_LEN / ROPE_TRAIN_LEN)^(r / (r - 2)) ("NTK-aware"). No buffers: no cast rounds positions (PR 562's)."""

    def __init__(self, h: Hyperparameters):
        super().__init__()
        r, ratio = h.rope_dims or h.head_dim, h.train_seq_len / (h.rope_train_len or h.train_seq_len)
        self.base = h.rope_base * (ratio ** (r / (r - 2)) if ratio > 1 and r > 2 else 1.0)
        frequencies = self.base ** (-torch.arange(0, r, 2, dtype=torch.float64, device="cpu") / r)
        positions = torch.arange(max(h.train_seq_len, h.window), dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies).unsqueeze(1)  # (T, 1, r / 2), the same for all heads
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def _apply(self, fn: Callable, recurse: bool = True) -> Rotary:
        self.cos, self.sin = (table.to(fn(torch.empty(0)).device) for table in (self.cos, self.sin))
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, end: int) -> Tensor:
        """Returns x (B, t, heads, d) at positions [end - t, end), its pairs (a, b) turned by position x frequency."""
        cos, sin = (table[end - x.size(1) : end].to(x.dtype) for table in (self.cos, self.sin))
        a, b, rest = x.split((cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def begins_document(ids: Tensor) -> Tensor:
    """Returns (B, T), True at tokens before which there is nothing: position 0 and each document's first, BOS."""
    return (ids == BOS) | (torch.arange(ids.size(1), device=ids.device) == 0)


class TokenTable(nn.Module):
    """A table of embeddings for token n-grams of the given orders, projected to `width` and scaled. Order 1 is the
    token itself (value embedding). Orders 2 and 3 are BigramHash and TrigramHash: an n-gram that ends at t has row
    (36313 id_t XOR 27191 id_{t-1} XOR 51497 id_{t-2}) mod (rows - 1); one that a document's start cuts, the last."""

    def __init__(self, rows: int, dim: int, width: int, orders: tuple[int, ...], scale: float):
        super().__init__()
        self.orders, self.embed, self.proj = orders, nn.Embedding(rows, dim), Linear(dim, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(scale))

    def rows_of(self, ids: Tensor, order: int) -> Tensor:
        """Returns the rows (B, T) of n-grams of one order; int64, as from id 59,138 on products overflow int32."""
        if order == 1:
            return ids
        key, reserved, begins = ids * 36313, self.embed.num_embeddings - 1, begins_document(ids)
        cut = begins if order == 2 else begins | begins.roll(1, 1)
        for back, prime in ((1, 27191), (2, 51497))[: order - 1]:
            key = key ^ (ids.roll(back, 1) * prime)
        return torch.where(cut, reserved, key % reserved)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        vectors = sum(self.embed(self.rows_of(ids, order)) for order in self.orders)
        return self.proj(vectors.to(dtype)) * self.scale.to(dtype)


class SmearGate(nn.Module):
    """(1 - g) x_t + g x_{t-1}, g = sigmoid(gate) for each channel; x_{t-1} is 0 where a document begins."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate).to(x.dtype)
        return (1 - g) * x + g * x.roll(1, 1).masked_fill(begins_document(ids).unsqueeze(-1), 0.0)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """Returns outputs y (B, t, H, d) without their part along their own position's value v (B, t, K, d). Exclusive self
    attention (XSA): y - (y . v / |v|^2) v for each query head of the group; the sums are fp32."""
    grouped, v = y.unflatten(2, (v.size(2), -1)).float(), v.unsqueeze(3).float()  # (B, t, K, G, d), (B, t, K, 1, d)
    part = (grouped * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp_min(1e-24)
    return (grouped - part * v).flatten(2, 3).to(y.dtype)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention. Order: project, value embedding, value residual, QK norm, rotary, gain, attend, XSA,
    gate, project. Queries are taken at the last t positions only, keys and values at all T."""

    def __init__(self, h: Hyperparameters, layer: int, rotary: Rotary):
        super().__init__()
        self.head_dim, self.use_xsa = h.head_dim, layer >= h.num_layers - h.xsa_last_n
        self.attend, self.rotary = sdpa, rotary
        self.c_q, self.proj = (Linear(h.model_dim, h.model_dim, bias=False) for _ in range(2))
        self.c_k, self.c_v = (Linear(h.model_dim, h.num_kv_heads * h.head_dim, bias=False) for _ in range(2))
        self.q_gain = nn.Parameter(torch.full((h.num_heads,), h.qk_gain_init))
        self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5])) if h.value_residual else None
        self.attn_gate = Linear(h.model_dim, h.num_heads) if h.gated_attention else None

    def forward(self, x: Tensor, v0: Tensor | None, ve: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        """Returns outputs (B, t, D) for inputs x (B, T, D), and the first block's values for the blocks after it."""
        length, last = x.size(1), x[:, -t:]
        q, k, v = self.c_q(last), self.c_k(x), self.c_v(x)
        v = v if ve is None else v + ve
        v0 = v if v0 is None else v0
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(x.dtype)
            v = mix[0] * v0 + mix[1] * v
        q, k, v = (z.unflatten(2, (-1, self.head_dim)) for z in (q, k, v))
        q, k = (self.rotary(rms_norm(z), length) for z in (q, k))
        y = self.attend(q * self.q_gain.to(x.dtype).unsqueeze(1), k, v)
        y = exclude_self(y, v[:, -t:]) if self.use_xsa else y
        if self.attn_gate is not None:
            y = y * torch.sigmoid(self.attn_gate(last)).unsqueeze(-1)
        return self.proj(y.flatten(2)), v0


class MLP(nn.Module):
    """LeakyReLU(x)^2 between two matrices: a negative input becomes slope^2 x^2, so its unit still learns."""

    def __init__(self, h: Hyperparameters):
        super().__init__()
        hidden, self.slope = int(h.mlp_mult * h.model_dim), h.leaky_slope
        self.fc, self.proj = Linear(h.model_dim, hidden, bias=False), Linear(hidden, h.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x), self.slope).square())


class Block(nn.Module):
    """Attention and MLP on normed inputs, scaled by 1/sqrt(layer + 1), after mixing in the embedding x0."""

    def __init__(self, h: Hyperparameters, layer: int, rotary: Rotary):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(h, layer, rotary), MLP(h)
        self.input_scale = 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(h.model_dim)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))))

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, ve: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        """Returns the stream (B, t, D) after the block, and the first block's values."""
        mix = self.resid_mix.to(x.dtype)
        u = mix[0] * x + mix[1] * x0
        a, v0 = self.attn(rms_norm(u) * self.input_scale, v0, ve, t)
        y = u[:, -t:] + self.attn_scale.to(x.dtype) * a
        return y + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(y) * self.input_scale), v0


class GPT(nn.Module):
    """The model, `GPT(h)` or `GPT(model_dim=64, …)`. Parameters are fp32, activations are of `compute_dtype`. A U-Net
    of blocks: each of the first half pushes its output, each of the second half adds one, last in first out."""

    def __init__(self, h: Hyperparameters | None = None, **knobs: Any):
        super().__init__()
        h = h or Hyperparameters(**knobs)
        self.compute_dtype, self.logit_softcap = torch.float32, h.logit_softcap
        self.num_encoders, self.ve_blocks, dim = h.num_layers // 2, h.ve_blocks, h.model_dim
        self.tok_emb, self.smear, rotary = nn.Embedding(h.vocab_size, dim), SmearGate(dim), Rotary(h)
        rows, width, orders = h.bigram_vocab_size, h.num_kv_heads * h.head_dim, (2, 3) if h.trigram_shared else (2,)
        self.bigram = TokenTable(rows, h.bigram_dim, dim, orders, 0.05) if rows else None
        self.ve_shared = TokenTable(h.vocab_size, h.ve_dim, width, (1,), 0.1) if self.ve_blocks else None
        self.blocks = nn.ModuleList(Block(h, layer, rotary) for layer in range(h.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.num_encoders, dim))
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in self.ve_blocks)
        if self.tok_emb.weight.device.type != "meta":  # there only names and shapes are wanted
            self.init_weights(h)

    @torch.no_grad()
    def init_weights(self, h: Hyperparameters) -> None:
        """Sets all initial weights but gains. Matrices into heads and hidden units are orthogonal, those out of them
        zero: every block begins as the identity. Projections of tables: orthogonal over sqrt(2 L); hash tables 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                std = {"tok_emb": h.tied_embed_init_std, "ve_shared.embed": 0.01}.get(name, 0.0)
                nn.init.normal_(module.weight, std=std)
            elif name.endswith(("attn.proj", "mlp.proj", "attn_gate")):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 4.0)  # of the gate: sigmoid(4) = 0.98, nearly open
            elif isinstance(module, Linear):
                nn.init.orthogonal_(module.weight, 1.0 if name.startswith("blocks.") else (2 * h.num_layers) ** -0.5)

    def hidden(self, ids: Tensor, tail: int | None = None) -> Tensor:
        """Returns the normed last states (B, t, D) of ids (B, T); t is `tail`, or T. Of other positions the last block
        needs keys and values only: the same function, with 9% fewer operations at t = 64 of T = 2048."""
        dtype, length = self.compute_dtype, ids.size(1)
        x = self.tok_emb(ids).to(dtype)
        x = x if self.bigram is None else x + self.bigram(ids, dtype)
        x = x0 = self.smear(rms_norm(x), ids)
        ve = None if self.ve_shared is None else self.ve_shared(ids, dtype)
        v0, skips, ve_scales = None, [], dict(zip(self.ve_blocks, self.ve_layer_scales))
        for layer, block in enumerate(self.blocks):
            if layer >= self.num_encoders and skips:
                x = x + self.skip_weights[layer - self.num_encoders].to(dtype) * skips.pop()
            own_ve = ve * ve_scales[layer].to(dtype) if layer in ve_scales else None
            x, v0 = block(x, x0, v0, own_ve, tail or length if layer == len(self.blocks) - 1 else length)
            if layer < self.num_encoders:
                skips.append(x)
        return rms_norm(x)

    def forward_logits(self, input_ids: Tensor, tail: int | None = None) -> Tensor:
        """Returns logits (B, t, V), fp32, within the soft cap."""
        x = self.hidden(input_ids, tail)
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)).float()
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def token_nll(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Returns nats (B, t) of targets (B, t) at the last t positions of inputs (B, T); 0 where a target is -100."""
        logits = self.forward_logits(input_ids, target_ids.size(1))
        return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction="none").view_as(target_ids)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Returns the mean loss in nats a token."""
        return self.token_nll(input_ids, target_ids).mean()


# ============================================ 5  FAMILIES OF PARAMETERS ===============================================
# What is done with the parameters whose whole name matches the pattern. Texts in the last three fields name knobs.
Family = collections.namedtuple("Family", "name pattern optimizer lr weight_decay bits")
BLOCK = r"blocks\.\d+\."
CONTROL = BLOCK + r"(attn_scale|mlp_scale|resid_mix|attn\.(q_gain|vr_lambda|attn_gate\.weight|attn_gate\.bias))"
CONTROL += r"|skip_weights|smear\.gate|\w+\.scale|ve_layer_scales\.\d+"
FAMILIES = (
    Family("attention", BLOCK + r"attn\.(c_q|c_k|c_v|proj)\.weight", "muon", "matrix_lr", "muon_wd", "attn_bits"),
    Family("mlp", BLOCK + r"mlp\.(fc|proj)\.weight", "muon", "matrix_lr", "muon_wd", "mlp_bits"),
    Family("projection", r"(bigram|ve_shared)\.proj\.weight", "muon", "matrix_lr", "muon_wd", "proj_bits"),
    Family("embedding", r"(tok_emb|ve_shared\.embed)\.weight", "adamw", "tied_embed_lr", "adam_wd", "embed_bits"),
    Family("hash_table", r"bigram\.embed\.weight", "adamw", "tied_embed_lr", "adam_wd", "bigram_bits"),
    # No decay: gains start at 1, and decay would pull them, and whole blocks with them, towards 0.
    Family("control", CONTROL, "adamw", "scalar_lr", 0.0, 16),
)


def family_of(name: str) -> Family:
    """Returns the family of a parameter; each has exactly one."""
    found = [family for family in FAMILIES if re.fullmatch(family.pattern, name)]
    assert len(found) == 1, f"parameter {name} is in the families {[family.name for family in found]}"
    return found[0]


def stored_bits(h: Hyperparameters, name: str) -> int:
    """Returns the bits in which the artifact keeps each value of a parameter; 16 is fp16."""
    bits = 16 if any(part in name for part in h.fp16_patterns) else family_of(name).bits
    return getattr(h, bits) if isinstance(bits, str) else bits


# =================================================== 6  OPTIMIZER =====================================================
def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Returns wide matrices (n, rows, cols) with the singular vectors of the given ones and singular values near 1.
    Quintic iteration of Muon (Jordan et al. 2024): small ones are lifted fast, all end in about [0.7, 1.2]."""
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.to(matrices.dtype)


# Muon's matrices of one shape, tall ones lying down; this rank's equal part of their momentum; each one's factor on the
# rate. The MLPs' fc and proj are one stack of 22: 8 ranks pad it by 9%, and two stacks of 11 by 45%.
Stack = collections.namedtuple("Stack", "parameters momentum lr lr_factors weight_decay")


class Optimizer:
    """Parallel Muon on the matrices (stacks reduce-scattered, orthogonalized in parts, gathered), AdamW on the rest.
    Gradients are averaged, then clipped by their joint norm: before, each process's noise would get its own factor."""

    def __init__(self, h: Hyperparameters, rt: Runtime, model: nn.Module):
        self.h, self.rt, self.model, self.orthogonalize = h, rt, model, rt.compile(newton_schulz)
        muon, adamw = collections.defaultdict(list), collections.defaultdict(list)
        for name, parameter in model.named_parameters():
            family = family_of(name)
            decay = getattr(h, family.weight_decay) if isinstance(family.weight_decay, str) else family.weight_decay
            kind, shape = (muon, sorted(parameter.shape)) if family.optimizer == "muon" else (adamw, ())
            kind[(*shape, getattr(h, family.lr), decay)].append(parameter)
        self.stacks = []
        for (rows, cols, lr, decay), group in muon.items():
            momentum = torch.zeros(math.ceil(len(group) / rt.world_size), rows, cols, device=rt.device)
            factors = torch.tensor([max(1.0, p.size(0) / p.size(1)) ** 0.5 for p in group], device=rt.device)
            self.stacks.append(Stack(group, momentum, lr, factors.view(-1, 1, 1), decay))
        groups = [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in adamw.items()]
        self.adamw = torch.optim.AdamW(groups, betas=(h.beta1, h.beta2), eps=h.adam_eps, fused=rt.device.type != "mps")
        self.replicated = [p for group in groups for p in group["params"]]

    def reduce(self) -> tuple[list[Tensor], Tensor]:
        """Averages the gradients over the processes; returns this rank's parts of the stacks', and the norm of all."""
        parts = []
        for stack in self.stacks:
            missing = len(stack.momentum) * self.rt.world_size - len(stack.parameters)
            gradients = torch.stack([p.grad.mT if p.size(0) > p.size(1) else p.grad for p in stack.parameters])
            gradients = self.rt.reduce_scatter(F.pad(gradients, (0, 0, 0, 0, 0, missing)))
            parts.append(gradients.div_(self.rt.world_size))
        sum_gradients(self.rt, self.replicated, 1 / self.rt.world_size)
        own = self.rt.all_reduce(sum(part.square().sum() for part in parts))
        return parts, (own + sum(p.grad.square().sum() for p in self.replicated)).sqrt()

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """Updates the parameters, drops their gradients and returns the norm that those had."""
        parts, norm = self.reduce()
        clip = (self.h.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0) if self.h.grad_clip_norm else norm.new_ones(())
        for stack, gradient in zip(self.stacks, parts):
            stack.momentum.mul_(momentum).add_(gradient.mul_(clip))
            nesterov, lr = gradient.add_(stack.momentum, alpha=momentum), stack.lr * lr_scale
            update = self.rt.all_gather(self.orthogonalize(nesterov, self.h.muon_backend_steps, self.rt.dtype))
            torch._foreach_mul_(stack.parameters, 1 - lr * stack.weight_decay)
            steps = zip(stack.parameters, update[: len(stack.parameters)] * (-lr * stack.lr_factors))
            torch._foreach_add_(stack.parameters, [u.mT if p.size(0) > p.size(1) else u for p, u in steps])
        torch._foreach_mul_([p.grad for p in self.replicated], clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        self.adamw.step()
        self.model.zero_grad(set_to_none=True)
        return norm


def sum_gradients(rt: Runtime, parameters: list[nn.Parameter], factor: float) -> None:
    """Replaces the gradients by `factor` times their sum over the processes, in one collective."""
    if rt.world_size > 1:
        flat = rt.all_reduce(torch.cat([p.grad.flatten() for p in parameters])).mul_(factor)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)


def learning_rate_scale(h: Hyperparameters, step: int, elapsed: float, step_seconds: float) -> float:
    """Returns the factor in [0, 1] on all learning rates: 1, then linear to 0 at the run's end by steps or clock. The
    fall takes WARMDOWN_FRAC of the run, on any machine; or WARMDOWN_ITERS steps (of `step_seconds` by the clock)."""
    steps_left, cap = h.iterations - step, h.max_wallclock_seconds
    if h.warmdown_iters:
        steps_left = min(steps_left, (cap - elapsed) / step_seconds) if cap and step_seconds else steps_left
        return min(1.0, max(0.0, steps_left / h.warmdown_iters))
    left = min(steps_left / h.iterations, 1 - elapsed / cap if cap else 1.0)
    return min(1.0, max(0.0, left) / h.warmdown_frac) if h.warmdown_frac else 1.0


def muon_momentum(h: Hyperparameters, step: int) -> float:
    """Returns Muon's momentum at a step: linear from the start of its warm-up to the end."""
    done = min(1.0, step / h.muon_momentum_warmup_steps) if h.muon_momentum_warmup_steps else 1.0
    return (1 - done) * h.muon_momentum_warmup_start + done * h.muon_momentum


def cosine(done: float) -> float:
    """Returns the half cosine from 1 at done = 0 to 0 at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


# =================================================== 7  TRAINING ======================================================
# One run: settings, machine, model with its entry points as training and scoring call them, training and scored text.
Run = collections.namedtuple("Run", "h rt model mean_loss token_nll train_shards val")


def build_run(h: Hyperparameters, rt: Runtime, decoded: GPT | None = None) -> Run:
    """Returns a run with checked data and the given or initial model, equal on all ranks, compiled where that is on."""
    val, shards = load_validation_tokens(h), [] if h.eval_only or h.export_only else load_shards(h, "train")
    model = (decoded or GPT(h)).to(rt.device)
    for part in (*h.fp16_patterns, *h.ttt_multipliers):
        if not any(part in name for name, _ in model.named_parameters()):
            raise UserError(f"{part}, of FP16_KEEP_NAME_PATTERNS or TTT_LR_GROUPS, is in no parameter's name: mend it")
    for parameter in model.parameters():
        rt.all_reduce(parameter.data.mul_(rt.rank == 0))  # those of rank 0
    model.compute_dtype = rt.dtype
    for block in model.blocks:
        block.attn.attend = rt.attend
    _ = batch_plan(h, rt.world_size) if shards else None
    return Run(h, rt, model, rt.compile(model.forward), rt.compile(model.token_nll), shards, val)


class Trainer:
    """The training step and its state. What is exported is an average, in fp32. The EMA's decay is min(EMA_DECAY, (1 +
    step) / (10 + step)), so that short runs forget their initialisation (0.997 holds 41% of it after 300 steps)."""

    def __init__(self, run: Run):
        self.run, self.parameters = run, list(run.model.parameters())
        self.optimizer, self.num_snapshots = Optimizer(run.h, run.rt, run.model), 0
        self.ema = [p.detach().clone() for p in self.parameters] if run.h.ema_enabled else []
        self.swa = [torch.zeros_like(p) for p in self.parameters] if run.h.swa_enabled else []

    def step(self, step: int, lr_scale: float, batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Trains on the micro-batches and returns the mean loss over them and the processes, on the device."""
        rt, total = self.run.rt, torch.zeros((), device=self.run.rt.device)
        for x, y in batch:
            loss = self.run.mean_loss(x, y) / len(batch)
            loss.backward()
            total += loss.detach()
        self.optimizer.step(lr_scale, muon_momentum(self.run.h, step))
        self.update_averages(step + 1, lr_scale)
        return rt.all_reduce(total / rt.world_size)

    @torch.no_grad()
    def update_averages(self, step: int, lr_scale: float) -> None:
        """Takes in the weights after step number `step`, counted from 1."""
        if self.ema:
            decay = min(self.run.h.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        if self.swa and lr_scale < self.run.h.swa_start_frac and step % self.run.h.swa_every == 0:
            torch._foreach_add_(self.swa, self.ema or self.parameters)
            self.num_snapshots += 1

    @torch.no_grad()
    def apply_average(self) -> str:
        """Puts the average into the model and returns a line on what was averaged."""
        average = torch._foreach_div(self.swa, self.num_snapshots) if self.num_snapshots else self.ema
        if average:
            torch._foreach_copy_(self.parameters, average)
        unused = "; WARNING: no SWA snapshot was taken, see SWA_EVERY" if self.swa and not self.num_snapshots else ""
        return f"averaging: EMA {'on' if self.ema else 'off'}, SWA of {self.num_snapshots} snapshots{unused}"


def preflight(run: Run) -> float:
    """Drives training, averaging, encoding, decoding, scoring and adaptation before the clock starts, on random tokens
    in the real shapes, which also compiles all graphs. Puts the initial weights back; returns the seconds it took."""
    h, rt, start = run.h, run.rt, run.rt.now()
    initial = [p.detach().clone() for p in run.model.parameters()]
    if not (h.eval_only or h.export_only):
        trainer, (rows, cuts) = Trainer(run), batch_plan(h, rt.world_size)
        for step in range(h.warmup_steps if rt.compiled else min(2, h.warmup_steps)):
            x = torch.randint(h.vocab_size, (cuts, rows // cuts, h.train_seq_len), device=rt.device)
            trainer.step(step, 1.0, list(zip(x, x.roll(-1, -1))))
        trainer.apply_average()
    weights = dict(run.model.named_parameters())
    if not h.eval_only and rt.rank == 0:
        decode(encode(h, quantize_weights(h, weights, 1.0, h.prune_frac), 1.0, h.compressor), "the preflight's file")
    chunk = h.ttt_chunk_tokens if h.ttt_mode == "score_first" else h.ttt_batch_seqs * h.window
    num_targets = max(chunk, h.eval_batch_seqs * h.window * rt.world_size)
    tokens = torch.randint(h.vocab_size, (num_targets + 1,), dtype=torch.int32)
    for stride in {h.window, h.stride}:
        scorer = Scorer(run, Validation(tokens, num_targets, num_targets, ""), stride, "preflight")
        scorer.score(scorer.windows[: 1 + h.eval_batch_seqs * rt.world_size])
    if h.ttt_enabled:
        adapter = Adapter(run)
        adapter.step(*adapter.batches(scorer.tokens, 0, chunk)[0], 0.0)
    with torch.no_grad():
        torch._foreach_copy_(list(weights.values()), initial)
    rt.log(f"preflight: the whole pipeline ran on random tokens in {rt.now() - start:.1f}s, before the clock starts")
    return rt.now() - start


def train(run: Run) -> dict[str, Any]:
    """Trains the model, leaves the averaged weights in it, and returns the figures of the training. The clock stops for
    validations. A step begins only if it, and those in flight, will end before the cap."""
    h, rt, cap = run.h, run.rt, run.h.max_wallclock_seconds
    trainer, loader = Trainer(run), TokenLoader(h, rt, run.train_shards)
    step, elapsed, step_seconds, settled, last_line, start = 0, 0.0, 0.0, 0.0, 0.0, rt.now()
    while step < h.iterations and not (cap and elapsed + 1.05 * step_seconds * (1 + rt.lag) > cap):
        lr_scale = learning_rate_scale(h, step, elapsed, step_seconds if step > 2 else 0.0)
        loss = rt.follow(trainer.step(step, lr_scale, loader.next_batch()))
        step, elapsed = step + 1, rt.agree(time.perf_counter() - start)
        settled = elapsed if step <= 2 else settled  # the first steps pay for caches: they are not in the mean
        step_seconds = (elapsed - settled) / (step - 2) if step > 2 else elapsed / step
        done = step - rt.lag  # the step that `loss` is of
        if step == 4 and lr_scale < 1 and h.warmdown_iters:
            rt.log(f"WARNING: WARMDOWN_ITERS={h.warmdown_iters} steps do not fit into this run: use WARMDOWN_FRAC")
        if done and not math.isfinite(loss):
            raise UserError(f"train_loss is {loss} at step {done}: lower MATRIX_LR={h.matrix_lr} or another rate")
        due = done <= 10 or done % h.train_log_every == 0 or step == h.iterations or elapsed - last_line > 30
        if done and due:
            last_line, rate = elapsed, h.train_batch_tokens / step_seconds
            left = max(0.0, min((h.iterations - step) * step_seconds, (cap or BIG) - elapsed))
            times = f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * step_seconds:.2f}ms tok/s:{rate:,.0f}"
            rt.log(f"step:{done}/{h.iterations} train_loss:{loss:.4f} {times} lr_scale:{lr_scale:.4f} left:{left:.0f}s")
            rt.record("train", step=done, train_loss=loss, seconds=elapsed, tokens_per_second=rate, lr_scale=lr_scale)
        if h.val_loss_every and step % h.val_loss_every == 0 and step < h.iterations:
            paused = rt.now()
            report_stage(rt, f"step:{step}/{h.iterations}", eval_val(run))
            start += rt.now() - paused
    ms, epochs = 1000 * rt.agree(rt.now() - start), float(step * h.train_batch_tokens / loader.offsets[-1])
    rt.log(f"trained: steps:{step} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms epochs:{epochs:.4f}")
    report_stage(rt, "raw", eval_val(run))
    rt.log(trainer.apply_average())
    report_stage(rt, "averaged", eval_val(run))
    return {"steps": step, "train_seconds": ms / 1000, "step_avg_ms": ms / step, "epochs": epochs}


# ==================================================== 8  ARTIFACT =====================================================
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16, so that a row of zeros has a step as well


def quantize_rows(w: Tensor, bits: int, floor: float) -> tuple[Tensor, Tensor]:
    """Returns codes, int8 (rows, cols) in [-q, q], q = 2^(bits - 1) - 1, and scales, fp16 (rows, 1), of w = codes x
    scales. scale = max(clip, floor) / q; a row's clip is the quantile of |w| with the least squared error (GPTQ-lite).
    A higher floor makes a smaller file: published int6 had it at 1.0, unknowingly (PRs 518, 977, 1092)."""
    w, q, best = w.detach().float(), 2 ** (bits - 1) - 1, None
    depths = [(1 - quantile) * (w.size(1) - 1) for quantile in CLIP_QUANTILES]  # ranks below the largest
    top = w.abs().topk(math.ceil(depths[0]) + 1, dim=1).values
    for depth in depths:
        clip = torch.lerp(top[:, math.floor(depth)], top[:, math.ceil(depth)], depth % 1).unsqueeze(1)
        scale = (clip.clamp_min(floor) / q).half().clamp_min(SMALLEST_SCALE)
        codes = (w / scale.float()).round_().clamp_(-q, q)
        new = ((codes * scale.float() - w).square_().sum(1, keepdim=True), codes, scale)
        best = new if best is None else [torch.where(new[0] < best[0], a, b) for a, b in zip(new, best)]
    return best[1].to(torch.int8), best[2]


def quantize_weights(h: Hyperparameters, weights: dict[str, Tensor], floor: float, prune: float) -> Iterator[tuple]:
    """Yields name, bits, codes and scales (or fp16 values and None) of all parameters, the part `prune` zeroed."""
    for name, w in weights.items():
        bits, w = stored_bits(h, name), w.detach()
        if bits < 16 and (count := int(prune * w.numel())):
            w = w.masked_fill(w.abs() <= w.abs().flatten().kthvalue(count).values, 0.0)
        yield name, bits, *((w.half(), None) if bits == 16 else quantize_rows(w, bits, floor))


def fit_artifact(h: Hyperparameters, rt: Runtime, weights: dict[str, Tensor]) -> tuple[bytes, float]:
    """Returns the artifact and its floor: QUANT_FLOOR, or the finest grid whose code + model fit SIZE_LIMIT. Sizes are
    real ones, and zstd-22 is slow, so the search is Newton's: a floor twice as high saves nearly a bit of each code."""
    budget, floor, best = h.size_limit - CODE.stat().st_size, h.floor or 0.0, None
    matrices = [w for name, w in weights.items() if stored_bits(h, name) < 16]
    num_codes, rows = sum(w.numel() for w in matrices), [w.abs().amax(1) for w in matrices] or [torch.ones(1)]
    for _ in range(10):
        blob = encode(h, quantize_weights(h, weights, floor, h.prune_frac), floor, h.compressor)
        rt.log(f"quantized: floor {floor:.5f} gives {len(blob):,} of {budget:,} bytes")
        if len(blob) <= budget and (best is None or floor < best[1]):
            best = (blob, floor)
        if not matrices or h.floor is not None or (best and (floor == 0 or len(best[0]) > 0.999 * budget)):
            break
        bits_over = (len(blob) - 0.9995 * budget) * 8 / num_codes
        floor = (floor or torch.cat(rows).median().item()) * 2 ** min(3.0, bits_over)
    blob, floor = best or (blob, floor)
    if h.prune_frac:  # the smallest weights have code 0 anyway (all of PR 562's 3%): say what it did
        pairs = zip(*(quantize_weights(h, weights, floor, part) for part in (0.0, h.prune_frac)))
        rt.log(f"pruned: changed {sum(int((a[2] != b[2]).sum()) for a, b in pairs):,} of {num_codes:,} codes")
    return blob, floor


# A file is PREFIX and the payload, compressed: magic; half the SHA-256 of all after it; format version; codec; bytes of
# the payload. A payload is the length of a JSON header, that header, all int8 codes, and all scales and other values.
PREFIX, MAGIC, VERSION = struct.Struct("<4s16sHHQ"), b"PGLF", 2
CODECS, LARGEST_PAYLOAD = {"none": 0, "zstd": 1, "lzma": 2}, 2**33
LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]}


def encode(h: Hyperparameters, tensors: Iterable[tuple], floor: float, codec: str) -> bytes:
    """Returns a whole file of tensors (name, bits, values or codes, None or scales)."""
    entries, codes, rest = [], [], []
    for name, bits, values, scales in tensors:
        entries.append((name, bits, list(values.shape)))
        (codes if bits < 16 else rest).append(values.cpu().numpy().tobytes())
        rest.append(b"" if scales is None else scales.cpu().numpy().tobytes())
    header = json.dumps({"model": h.values(ModelKnob), "floor": floor, "tensors": entries}).encode()
    body = payload = b"".join((struct.pack("<I", len(header)), header, *codes, *rest))
    if codec == "zstd":
        body = need("zstandard", "or set COMPRESSOR=lzma").ZstdCompressor(level=22).compress(payload)
    elif codec == "lzma":
        body = lzma.compress(payload, **LZMA)
    covered = PREFIX.pack(MAGIC, b"", VERSION, CODECS[codec], len(payload))[20:] + body
    return MAGIC + hashlib.sha256(covered).digest()[:16] + covered


def decode(blob: bytes, source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the model's knobs and weights, fp32 by name, from a file's bytes, which it only parses, or UserError."""

    def take(kind: str, count: int) -> Tensor:
        nonlocal offset
        values = np.frombuffer(payload, kind, count, offset)
        offset += values.nbytes
        return torch.from_numpy(values.astype(np.float32))

    _, digest, version, codec, length = PREFIX.unpack(blob[: PREFIX.size].ljust(PREFIX.size))
    if len(blob) < PREFIX.size or blob[:4] != MAGIC or version != VERSION:
        found = f"{len(blob)} bytes, {blob[:4]!r}, format version {version}, this script reads {VERSION}"
        raise UserError(f"{source} is no artifact of this script ({found}): use the script beside it")
    if hashlib.sha256(blob[20:]).digest()[:16] != digest or length > LARGEST_PAYLOAD:
        raise UserError(f"{source} is truncated or damaged ({len(blob)} bytes, wrong checksum): copy it again")
    payload, weights = blob[PREFIX.size :], {}
    zstandard = need("zstandard", f"to read {source}") if codec == CODECS["zstd"] else None
    try:
        if zstandard is not None:
            payload = zstandard.ZstdDecompressor().stream_reader(payload).read(length + 1)
        elif codec == CODECS["lzma"]:
            payload = lzma.LZMADecompressor(**LZMA).decompress(payload, length + 1)
        offset = 4 + struct.unpack_from("<I", payload)[0]
        header = json.loads(payload[4:offset])
        entries = [(str(name), int(bits), [int(n) for n in shape]) for name, bits, shape in header["tensors"]]
        codes = {name: take("i1", math.prod(shape)).view(shape[0], -1) for name, bits, shape in entries if bits < 16}
        for name, bits, shape in entries:
            values = take("<f4" if bits == 32 else "<f2", shape[0] if bits < 16 else math.prod(shape))
            weights[name] = (codes[name] * values.unsqueeze(1) if bits < 16 else values).view(shape)
        if not offset == len(payload) == length:
            raise ValueError(f"{len(payload)} bytes, of which {offset} are described and {length} declared")
        return dict(header["model"]), weights
    except Exception as error:  # whatever a hostile file provokes in the parsers, it is the file's fault
        raise UserError(f"{source} is malformed: {type(error).__name__}: {error}") from None


def load_artifact(path: str | Path) -> tuple[Hyperparameters, GPT]:
    """Returns settings and model, both rebuilt from the file alone; the environment adds what is not the model's.
    UserError if the environment contradicts the file, or the file's tensors are not those of the model it describes."""
    path = find_path(path, "artifact")
    knobs, weights = decode(path.read_bytes() if path.is_file() else b"", str(path))
    if knobs.keys() != (own := {name for name, knob in Hyperparameters.knobs().items() if isinstance(knob, ModelKnob)}):
        raise UserError(f"{path} has other model settings than this script: {sorted(map(str, knobs.keys() ^ own))}")
    h = Hyperparameters(**knobs)
    for name in h.given.keys() & knobs.keys():
        if h.knobs()[name].parse(name, h.given[name]) != knobs[name]:
            raise UserError(f"{name.upper()}={h.given[name]} contradicts {path}, which has {knobs[name]}: unset it")
    with torch.device("meta"):  # names and shapes only: an absurd header allocates nothing
        model = GPT(h)
    if {n: p.shape for n, p in model.named_parameters()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{path} holds other tensors than the model has that it describes")
    model.load_state_dict(weights, assign=True)
    return h, model


def reload(run: Run, path: Path) -> dict[str, Any]:
    """Puts the weights that the file holds into the model, nothing else remains there; returns the file's figures."""
    start, sha256 = run.rt.now(), hashlib.sha256(path.read_bytes()).hexdigest()
    run.model.load_state_dict(load_artifact(path)[1].state_dict())
    return {"bytes_model": path.stat().st_size, "artifact_sha256": sha256, "load_seconds": run.rt.now() - start}


def export(run: Run) -> dict[str, Any]:
    """Writes checkpoint.bin, then final_model.bin, and returns their figures; UserError over the size limit."""
    h, rt, weights, start = run.h, run.rt, dict(run.model.named_parameters()), time.perf_counter()
    if not all(w.half().isfinite().all() for w in weights.values()):  # fp16 is what some are stored in
        raise UserError(f"the trained weights are not finite: lower MATRIX_LR={h.matrix_lr}; nothing was exported")
    blob, floor, checkpoint = b"", 0.0, rt.run_dir / "checkpoint.bin"
    if rt.rank == 0:
        exact = ((name, 32, w.detach(), None) for name, w in weights.items())
        write_atomically(checkpoint, encode(h, exact, 0.0, "none"))
        blob, floor = fit_artifact(h, rt, weights)
        write_atomically(rt.run_dir / "final_model.bin", blob)
    size, floor = int(rt.agree(len(blob))), rt.agree(floor)
    total = size + CODE.stat().st_size
    rt.log(f"artifact: model {size:,} + code = {total:,} bytes of {h.size_limit:,}, floor {floor:.5f}")
    if total > h.size_limit:
        fix = f"set QUANT_FLOOR=auto or fewer bits, and EXPORT_ONLY={checkpoint} to go on from the trained weights"
        raise UserError(f"code + model are {total:,} bytes, over SIZE_LIMIT={h.size_limit:,}: {fix}")
    return {"quant_floor": floor, "export_seconds": time.perf_counter() - start}


# ==================================================== 9  SCORING ======================================================
# The score of a text: nats a token, bits a byte, what was scored, and the seconds that it took.
Score = collections.namedtuple("Score", "val_loss val_bpb num_targets num_bytes seconds")


def plan_windows(begin: int, end: int, length: int, stride: int) -> np.ndarray:
    """Returns windows (W, 3): first position, first target, end of targets. Targets are a partition of [begin, end):
    the first `length`, then `stride` each, the last what remains (published scripts scored the last up to 32 times)."""
    ends = np.append(np.arange(begin + length, end, stride), end)
    return np.stack((np.maximum(ends - length, 0), np.append(begin, ends[:-1]), ends), axis=1)


def gather_windows(rt: Runtime, tokens: Tensor, windows: np.ndarray, length: int, rows: int) -> tuple[Tensor, ...]:
    """Returns inputs, targets and their numbers (rows, length) of windows, the rest empty; not own: -100, number N."""
    spans = np.pad(windows, ((0, rows - len(windows)), (0, 0)))
    index = spans[:, :1] + np.arange(length + 1)
    own = (index[:, :-1] >= spans[:, 1:2]) & (index[:, :-1] < spans[:, 2:])
    numbers = rt.to_device(np.where(own, index[:, :-1], len(tokens) - 1))
    window = tokens[rt.to_device(index)].long()
    return window[:, :-1], window[:, 1:].masked_fill(numbers == len(tokens) - 1, -100), numbers


class Scorer:
    """Scores windows of a text. Batches are dealt to the ranks in turn, so no score depends on the number of ranks."""

    def __init__(self, run: Run, val: Validation, stride: int, label: str = "scoring"):
        self.run, self.val, self.stride, self.length = run, val, stride, min(run.h.window, val.num_targets)
        self.windows = plan_windows(0, val.num_targets, self.length, stride)
        self.tokens = val.tokens.to(run.rt.device)
        self.nll = torch.full((val.num_targets + 1,), math.nan, device=run.rt.device)  # the last slot is never read
        self.times_scored, self.start = np.zeros(val.num_targets, dtype=np.uint8), run.rt.now()
        self.progress = Progress(run.rt, f"{label} with stride {stride}", val.num_targets, "tok")

    @torch.no_grad()
    def score(self, windows: np.ndarray) -> None:
        """Fixes the nll of the windows' targets. The text's first window needs all positions, the others `stride`."""
        rt, wide = self.run.rt, windows[:, 2] - windows[:, 1] > self.stride
        for group, tail in ((windows[wide], self.length), (windows[~wide], min(self.stride, self.length))):
            rows = 1 if tail > self.stride else min(self.run.h.eval_batch_seqs, len(self.windows))
            for number, low in enumerate(range(0, len(group), rows)):
                batch = group[low : low + rows]
                if number % rt.world_size == rt.rank:
                    x, y, numbers = gather_windows(rt, self.tokens, batch, self.length, rows)
                    self.nll[numbers[:, -tail:]] = self.run.token_nll(x, y[:, -tail:])
                    for _, first, end in batch:
                        self.times_scored[first:end] += 1
                self.progress.advance(int(batch[-1, 2] - batch[0, 1]))

    def result(self) -> Score:
        """Returns the score, summed in float64; asserts that every target was scored exactly once."""
        nll, n = self.nll[:-1].cpu().double(), self.val.num_targets
        times_scored, known = self.run.rt.all_reduce(torch.from_numpy(self.times_scored)), nll.isfinite()
        assert (times_scored == 1).all(), f"{int((times_scored != 1).sum())} of {n} targets not scored exactly once"
        loss_sum, num_known = self.run.rt.all_reduce(torch.stack((nll[known].sum(), known.sum().double()))).tolist()
        if num_known != n:
            raise UserError(f"{n - num_known:.0f} of {n} scores are not finite: the model's weights overflow")
        seconds = self.run.rt.agree(self.run.rt.now() - self.start)
        return Score(loss_sum / n, loss_sum / math.log(2) / self.val.num_bytes, n, self.val.num_bytes, seconds)


def eval_val(run: Run, stride: int = 0) -> Score:
    """Returns the score in windows that do not overlap, or that advance by `stride`."""
    scorer = Scorer(run, run.val, stride or run.h.window)
    scorer.score(scorer.windows)
    return scorer.result()


def eval_val_sliding(run: Run) -> Score:
    """Returns the score in windows that advance by EVAL_STRIDE: nearly full context for every target."""
    return eval_val(run, run.h.stride)


# =================================================== 10  ADAPTATION ===================================================
class Adapter:
    """Test-time training (TTT) of the model, in place; that its text was scored before is its caller's concern. A step
    is the same for any number of processes: they share its sequences, filled up with empty ones, and its gradient."""

    def __init__(self, run: Run):
        self.run, h, groups = run, run.h, collections.defaultdict(list)
        for name, parameter in run.model.named_parameters():
            factors = [factor for part, factor in h.ttt_multipliers.items() if part in name]
            if not name.startswith(tuple(f"blocks.{i}." for i in range(h.ttt_freeze_blocks))):
                groups[(*factors, 1.0)[0]].append(parameter)
        self.parameters = [parameter for group in groups.values() for parameter in group]
        options = [{"params": p, "peak_lr": h.ttt_lr * factor, "weight_decay": 0.0} for factor, p in groups.items()]
        sgd = h.ttt_optimizer == "sgd"
        self.optimizer = torch.optim.SGD(options, momentum=h.ttt_momentum) if sgd else torch.optim.AdamW(options)

    def batches(self, tokens: Tensor, begin: int, end: int) -> list[tuple[Tensor, Tensor, int]]:
        """Returns this rank's batches (x, y, number of all ranks' targets) that cover the targets [begin, end) once."""
        h, rt, length = self.run.h, self.run.rt, min(self.run.h.window, len(tokens) - 1)
        windows = plan_windows(begin, end, length, length)
        size = min(h.ttt_batch_seqs, len(windows))
        parts, rows = [windows[i : i + size] for i in range(0, len(windows), size)], math.ceil(size / rt.world_size)
        own = [gather_windows(rt, tokens, part[rt.rank :: rt.world_size], length, rows)[:2] for part in parts]
        return [(x, y, int(part[-1, 2] - part[0, 1])) for (x, y), part in zip(own, parts)]

    def step(self, x: Tensor, y: Tensor, num_targets: int, lr_scale: float) -> None:
        """Takes an optimizer step on the mean loss over all ranks' targets."""
        most = max(1, self.run.h.micro_batch_tokens // x.size(1))
        for low in range(0, len(x), most):
            (self.run.token_nll(x[low : low + most], y[low : low + most]).sum() / num_targets).backward()
        sum_gradients(self.run.rt, self.parameters, 1.0)
        if self.run.h.ttt_grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.run.h.ttt_grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        self.optimizer.step()
        self.run.model.zero_grad(set_to_none=True)


def eval_val_ttt(run: Run) -> Score:
    """Returns the sliding score with score-first adaptation: a chunk's targets are scored, and only then trained on. A
    window belongs to the chunk of its first target. Nothing is scored twice, or trained on after the last chunk."""
    h, scorer, adapter = run.h, Scorer(run, run.val, run.h.stride), Adapter(run)
    chunks = np.split(scorer.windows, np.flatnonzero(np.diff(scorer.windows[:, 1] // h.ttt_chunk_tokens)) + 1)
    if len(chunks) == 1:
        run.rt.log("WARNING: the text is one chunk, so nothing is adapted: lower TTT_CHUNK_TOKENS")
    for index, windows in enumerate(chunks):
        scorer.score(windows)
        is_last_chunk = index == len(chunks) - 1
        if not is_last_chunk:
            lr_scale = cosine(index / (len(chunks) - 1)) if h.ttt_cosine else 1.0
            batches = adapter.batches(scorer.tokens, int(windows[0, 1]), int(windows[-1, 2]))
            for x, y, num_targets in batches * h.ttt_epochs:
                adapter.step(x, y, num_targets, lr_scale)
    return scorer.result()


def adapt_before_scoring(run: Run) -> None:
    """Trains on the whole text before it is scored, as PRs 518 and 562 did: TTT_MODE=pre BREAKS THE RULES."""
    run.rt.log("TTT_MODE=pre trains on the validation text before it is scored: this BREAKS THE RULES and is no record")
    adapter, tokens = Adapter(run), run.val.tokens.to(run.rt.device)
    steps = adapter.batches(tokens, 0, run.val.num_targets) * run.h.ttt_epochs
    progress = Progress(run.rt, "adapting before scoring", len(steps), "step")
    for number, (x, y, num_targets) in enumerate(steps):
        adapter.step(x, y, num_targets, cosine(number / len(steps)) if run.h.ttt_cosine else 1.0)
        progress.advance(1)


def final_score(run: Run) -> Score:
    """Returns the score that is reported, with all adaptation that the settings ask for."""
    if run.h.ttt_enabled and run.h.ttt_mode == "pre":
        adapt_before_scoring(run)
    return (eval_val_ttt if run.h.ttt_enabled and run.h.ttt_mode == "score_first" else eval_val_sliding)(run)


def evaluate(run: Run) -> tuple[Score, float]:
    """Returns the final score, and the seconds that it took with all adaptation."""
    report_stage(run.rt, "quantized", eval_val(run))
    if run.h.eval_ladder and run.h.ttt_enabled:
        report_stage(run.rt, "sliding", eval_val_sliding(run))
    start, score = run.rt.now(), final_score(run)
    seconds = run.rt.agree(run.rt.now() - start)
    report_stage(run.rt, "adapted" if run.h.ttt_enabled else "sliding", score)
    return score, seconds


# ===================================================== 11  REPORT =====================================================
def report_stage(rt: Runtime, stage: str, score: Score) -> None:
    """Logs a score on the way: raw, averaged, quantized, sliding, adapted, or that after a step."""
    rt.log(f"{stage} val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f} eval_time:{1000 * score.seconds:.0f}ms")
    rt.record("eval", stage=stage, **score._asdict())


def banner(run: Run) -> None:
    """Logs machine, settings that are not defaults, data, parameters by family, and the planned phases."""
    h, rt, training = run.h, run.rt, not (run.h.eval_only or run.h.export_only)
    rt.record("config", machine=rt.describe(), **h.values())
    rt.log(f"run: {rt.run_dir}\n{rt.describe()}")
    changed = [f"{n.upper()}={v} ({h.knobs()[n].default})" for n, v in h.values().items() if v != h.knobs()[n].default]
    rt.log("settings (defaults): " + (", ".join(changed) or "all at their defaults"))
    for family in FAMILIES:
        group = {n: p.numel() for n, p in run.model.named_parameters() if family_of(n) is family}
        how = f"{family.optimizer}, lr {getattr(h, family.lr)}, bits {sorted({stored_bits(h, n) for n in group})}"
        rt.log(f"parameters: {family.name:<10} {sum(group.values()):>12,} in {len(group):>3} tensors, {how}")
    rt.log(f"parameters: {sum(p.numel() for p in run.model.parameters()):,} in all\nvalidation: {run.val.note}")
    if training:
        shards, (rows, cuts) = run.train_shards, batch_plan(h, rt.world_size)
        rt.log(f"training: {len(shards)} shards, {sum(map(len, shards)):,} tokens, {h.train_batch_tokens:,} a step")
        rt.log(f"step: {rt.world_size} processes x {cuts} micro-batches x {rows // cuts} x {h.train_seq_len} tokens")
        warmdown = f"warm-down {h.warmdown_iters} steps" if h.warmdown_iters else f"warm-down {h.warmdown_frac:.0%}"
        rt.log(f"plan: train {h.iterations:,} steps or {h.max_wallclock_seconds or math.inf:.0f}s, {warmdown}")
    ttt = f"TTT {h.ttt_mode} {h.ttt_optimizer} lr {h.ttt_lr} epochs {h.ttt_epochs}" if h.ttt_enabled else "no TTT"
    rt.log(f"plan: score with stride {h.stride} of {h.window}, {ttt}")


def report(run: Run, score: Score, figures: dict[str, Any]) -> None:
    """Writes submission.json and the final line, whose form is the same for every kind of score."""
    h, rt, code = run.h, run.rt, CODE.read_bytes()
    kind = f"ttt_{h.ttt_mode}" if h.ttt_enabled else ("sliding" if h.stride < h.window else "plain")
    total, seconds, num_bytes = figures["bytes_model"] + len(code), figures["eval_seconds"], score.num_bytes
    checks = (
        ("order", kind == "ttt_pre", "TTT_MODE=pre trains on validation tokens before they are scored"),
        ("data", abs(num_bytes - 151.06e6) > 4e4, f"{num_bytes} bytes are not the challenge's validation set"),
        ("size", total > SIZE_LIMIT_BYTES, f"code + model are over {SIZE_LIMIT_BYTES:,} bytes"),
        ("train", figures.get("train_seconds", BIG) > TRAIN_LIMIT_SECONDS, "training took over 600 s, or elsewhere"),
        ("eval", seconds > EVAL_LIMIT_SECONDS, f"scoring took over {EVAL_LIMIT_SECONDS:.0f} s"),
    )
    breaks = {rule: reason for rule, broken, reason in checks if broken}
    rt.log(f"rules: {'; '.join(breaks.values()) or 'none broken, as far as this run can tell'}")
    figures["eval_seconds_strict"] = seconds + figures["load_seconds"] + figures["preflight_seconds"]
    result = {"run_id": rt.run_dir.name, "seed": h.seed, "kind": kind, **score._asdict(), **figures}
    result |= {"bytes_code": len(code), "bytes_total": total, "compliant": not breaks, "rule_breaks": breaks}
    result |= {"machine": rt.describe(), "code_sha256": hashlib.sha256(code).hexdigest(), "settings": h.values()}
    rt.record("final", **result)
    if rt.rank == 0:
        write_atomically(rt.run_dir / "submission.json", (json.dumps(result, indent=2) + "\n").encode())
    exact = f"val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f} kind:{kind} targets:{score.num_targets}"
    rest = f"bytes:{score.num_bytes} eval_time:{1000 * seconds:.0f}ms total_bytes:{total} compliant:{int(not breaks)}"
    rt.log(f"final_exact {exact} {rest}")


def smoke(h: Hyperparameters) -> None:
    """Prints the line that reviewers look for, if the untrained model guesses as it should; seconds of the CPU."""
    torch.set_num_threads(1)  # on a busy machine two, which wait for each other, took 8 s instead of 2
    seconds, model, ids = time.process_time(), GPT(h), torch.randint(h.vocab_size, (1, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(h.vocab_size)) < 0.3, "the guesses are not uniform"
    sizes = f"dim={h.model_dim}, layers={h.num_layers}, vocab={h.vocab_size}, code={CODE.stat().st_size} B"
    print(f"import OK in {seconds:.2f}s, {sizes}, SMOKE_TEST_PASS")


# ====================================================== 12  MAIN ======================================================
def main() -> None:
    """Trains, exports, reloads, scores and adapts, and reports; EVAL_ONLY and EXPORT_ONLY begin further down."""
    h = Hyperparameters()
    if h.smoke:
        return smoke(h)
    if h.audit:  # from outside: it watches the stages below, and adds its proofs to the report
        sys.path.insert(0, str(find_path("records/audit.py", "AUDIT").parent))
        importlib.import_module("audit").Auditor(sys.modules[__name__])
    source = h.eval_only or h.export_only
    h, decoded = load_artifact(source) if source else (h, None)
    rt = Runtime(h)
    run = build_run(settle_data(h), rt, decoded)
    rt.open_log(h.run_id)
    banner(run)
    figures = {"preflight_seconds": preflight(run)} | ({} if source else train(run))
    run = run._replace(train_shards=[])  # nothing can read them any more
    artifact = find_path(source, "EVAL_ONLY") if h.eval_only else rt.run_dir / "final_model.bin"
    figures |= ({} if h.eval_only else export(run)) | reload(run, artifact)
    score, figures["eval_seconds"] = evaluate(run)
    report(run, score, figures)
    rt.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"train_gpt.py: error: {error}")
