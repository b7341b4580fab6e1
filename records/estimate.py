"""Say what a run will be before it is paid for: parameters, bytes, memory, operations, time, data, broken rules.

    ESTIMATE=1 python train_gpt.py                              # of the defaults: no data, no GPU, a few seconds
    ESTIMATE=1 NUM_LAYERS=12 MLP_MULT=4 python train_gpt.py     # of any settings

Bytes come from the script's own quantizer and coders, applied to normal rows, as those of trained matrices nearly are.
Times are predicted from operations and bytes; or, where records/bench/ has a file that `make bench` wrote on such a
card, taken from that. No prediction of time has been compared with a GPU yet."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

FIGURES = Path(__file__).resolve().parent / "bench"  # copies of logs/bench/*.json, of GPUs
SAMPLE_CODES = 2**17  # of each shape; the entropy of so many was within 0.4% of that of 16 times as many
# Bytes of the codes of a trained family, in units of those of normal rows: as measured, see records/README.md.
TRAINED = {"attention": 1.0, "mlp": 0.987, "embedding": 1.012, "hash_table": 1.01, "projection": 1.0, "control": 1.0}
# In the file, of a value in fp16: the exponents of a trained embedding repeat.
FP16_BYTES = {"embedding": 1.83}
UNCERTAINTY = 0.03  # 16 real files were at most 2.6% off: records/README.md#estimates
VALIDATION_BYTES = 151.06e6
# Bytes of text for each token of the challenge's tokenizers, by log2 of the vocabulary: sp1024 by its 62,021,632
# targets, sp4096 and sp8192 by what published runs report in nats a token and in bits per byte (PRs 1218, 1394).
BYTES_A_TOKEN = ((10, 12, 13), (2.4356, 3.32, 3.73))
SHARD_TOKENS = 100_000_000
PUBLISHED_SHARDS = 80
# Values of 2 bytes that element-wise kernels move for a token: for each layer and channel, each layer and hidden unit,
# each channel, and each piece of the vocabulary. Fitted to what Inductor counts in passes compiled for an H200.
BYTES_MOVED = {"training": (45.4, 5.07, 13.0, 3.09), "scoring": (16.3, 2.16, 13.3, 0.0)}
DEFAULT_PARAMETERS = 26_993_756
BACKWARD_ATTENTION = 2.5  # operations of its backward pass, which computes the weights again, for each of the forward
SMALL_PASS = 1.3  # of a token in a step of adaptation, whose passes are small, for one of training


class Card(NamedTuple):
    """GPUs, with the rates behind the predictions in the README's section "Speed"."""

    name: str
    count: int
    memory: float  # bytes that a process may use
    bandwidth: float  # bytes a second of element-wise kernels
    products: float  # operations a second of matrix products with 512 to 1,536 terms
    attention: float  # operations a second of causal attention with heads of 64
    rest: float  # seconds of a step beside its passes, for DEFAULT_PARAMETERS

    @property
    def title(self) -> str:
        """Number and name."""
        return f"{self.count} x {self.name}"


CARDS = (
    Card("H100", 8, 78e9, 2.9e12, 560e12, 345e12, 0.0022),
    Card("H200", 1, 138e9, 4.0e12, 620e12, 331e12, 0.0030),
)


# =================================================== bytes ===========================================================
class FamilySize(NamedTuple):
    """What the parameters of a family take in the file."""

    family: str
    num_weights: int
    bits: list[int]  # stored bits
    num_bytes: float  # predicted, with QUANT_FLOOR=0
    num_codes: int  # weights that are quantized
    code_bytes: float  # of `num_bytes`, those of the codes


def family_sizes(t: Any, h: Any, model: torch.nn.Module) -> list[FamilySize]:
    """Return the predicted bytes of each family of parameters on the finest grid."""
    known: dict[tuple[int, int], float] = {}
    sizes = []
    for group in t.PARAM_GROUPS:
        own = [(name, p) for name, p in model.named_parameters() if t.param_group_of(name) is group]
        all_bits = sorted({t.stored_bits(h, name) for name, _ in own})
        num_codes, code_bytes, plain_bytes = 0, 0.0, 0.0
        for name, parameter in own:
            bits = t.stored_bits(h, name)
            if bits == 16:
                plain_bytes += FP16_BYTES.get(group.name, 2.0) * parameter.numel()
                continue
            shape = (parameter.shape[1], bits)
            if shape not in known:
                known[shape] = code_bits(t, *shape, h.compressor)
            num_codes += parameter.numel()
            code_bytes += TRAINED[group.name] * parameter.numel() * known[shape] / 8
            plain_bytes += 2 * parameter.shape[0]  # a scale for each row
        count = sum(p.numel() for _, p in own)
        sizes.append(FamilySize(group.name, count, all_bits, code_bytes + plain_bytes, num_codes, code_bytes))
    return [size for size in sizes if size.num_weights]


def code_bits(t: Any, columns: int, bits: int, codec: str) -> float:
    """Return the bits that the file has for a code of a normal row with so many columns, on the finest grid."""
    rows = torch.randn(max(1, SAMPLE_CODES // columns), columns, generator=torch.Generator().manual_seed(0))
    codes, scales = t.quantize_rows(rows, t.row_clips(rows), bits, 0.0)
    model = t.model_rows([t.Stored("blocks.0.mlp.fc.weight", bits, codes, scales)], codec)
    return sum(model.bits_by_family().values()) / codes.numel() * t.FloorSearch.TYPICAL_RATIO.get(codec, 1.0)


class Artifact(NamedTuple):
    """How the file meets the limit."""

    finest: float  # bytes with QUANT_FLOOR=0
    budget: int  # bytes that the code leaves
    finest_bits: float  # for a code, with QUANT_FLOOR=0
    bits: float  # for a code, where the file fills the budget

    @property
    def is_coarser(self) -> bool:
        """Whether the finest grid does not fit."""
        return self.finest > self.budget

    @property
    def can_fit(self) -> bool:
        """Whether there is room for a bit a code, less than which no grid of use takes."""
        return self.bits >= 1

    @property
    def step_ratio(self) -> float:
        """How many times as wide the steps are as on the finest grid. Twice the width saves a bit of each code."""
        return 2 ** max(0.0, self.finest_bits - self.bits)


def predict_artifact(h: Any, sizes: list[FamilySize], num_code_bytes: int) -> Artifact:
    """Return the file that these sizes make beside so many bytes of code."""
    num_codes = max(1, sum(size.num_codes for size in sizes))
    code_bytes = sum(size.code_bytes for size in sizes)
    finest = sum(size.num_bytes for size in sizes)
    budget = h.size_limit - num_code_bytes
    left = budget - (finest - code_bytes)
    return Artifact(finest, budget, 8 * code_bytes / num_codes, 8 * left / num_codes)


# =================================================== work ============================================================
class Work(NamedTuple):
    """What a token costs in a pass."""

    products: float  # operations
    attention: float  # operations
    moved: float  # bytes, by element-wise kernels


def forward_work(h: Any, model: torch.nn.Module, kind: str) -> Work:
    """Return the operations of a forward pass over a token, and the bytes that a pass of a kind moves for it: training,
    forward and backward; or scoring, in which the last block has queries at the scored positions only.

    Two operations for each weight of a matrix product (the token embedding is one, as the head). Four of causal
    attention for each channel, layer and key.
    """
    tables = ("ve_shared.embed.weight", "bigram.embed.weight", "skip_weights", "skip_gates", "resid_mix")
    products = {n: 2 * p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith(tables)}
    runs = {i: model.block_order.count(i) for i in range(len(model.blocks))}
    for name in products:
        if name.startswith("blocks."):
            products[name] *= runs[int(name.split(".")[1])]
    length, reach = (h.window, h.reach) if kind == "scoring" else (h.train_seq_len, h.train_seq_len)
    mean_keys = reach - reach**2 / (2 * length)  # of a position: half of them where it reaches back to the beginning
    attention = 4 * h.model_dim * mean_keys
    num_layers = len(model.block_order)
    full_layers = float(num_layers)  # those that compute all positions
    if kind == "scoring" and h.stride < h.window:
        kept = h.stride / h.window
        last = f"blocks.{model.block_order[-1]}."
        partial = ("tok_emb.weight", last + "attn.c_q.weight", last + "attn.proj.weight")
        partial += (last + "mlp.fc.weight", last + "mlp.proj.weight")
        for name in partial:
            runs_of_block = runs[model.block_order[-1]] if name.startswith(last) else 1
            products[name] -= (1 - kept) * products[name] / runs_of_block
        full_layers -= 1 - kept
    a, b, c, d = BYTES_MOVED[kind]
    hidden = h.mlp_mult * h.model_dim
    moved = 2 * (full_layers * (a * h.model_dim + b * hidden) + c * h.model_dim + d * h.vocab_size)
    return Work(sum(products.values()), full_layers * attention, moved)


def training_flops(h: Any, model: torch.nn.Module) -> float:
    """Return the operations of the model's function for a training token: three times those of the forward pass."""
    work = forward_work(h, model, "training")
    return 3 * (work.products + work.attention)


class Machine:
    """What the script's plans of passes ask of a Runtime, answered for a card."""

    def __init__(self, t: Any, h: Any, card: Card):
        self.world_size = card.count
        self.device = torch.device("cuda")
        self.compiled = h.compile != "0"
        self.dtype = torch.float32 if h.dtype == "float32" else torch.bfloat16
        self.keeps_rows = False
        self.memory = card.memory
        self.max_rows = t.Runtime._initial_rows(self, h)

    def free_memory(self) -> float:
        """Return the bytes that a process may use."""
        return self.memory

    def least(self, value: float) -> float:
        """Return the value: all ranks are alike."""
        return value


class Rates(NamedTuple):
    """Seconds of a GPU, for a token but for the rest of a step."""

    training: float  # forward and backward
    rest: float  # of a step beside its passes
    scoring: float  # of a position
    adaptation: float
    source: str


def predicted_rates(h: Any, model: torch.nn.Module, card: Card) -> Rates:
    """Return rates from operations and bytes, as if nothing overlapped."""
    work = forward_work(h, model, "training")
    training = work.moved / card.bandwidth + 3 * work.products / card.products
    training += (1 + BACKWARD_ATTENTION) * work.attention / card.attention
    work = forward_work(h, model, "scoring")
    scoring = work.moved / card.bandwidth + work.products / card.products + work.attention / card.attention
    rest = card.rest * sum(p.numel() for p in model.parameters()) / DEFAULT_PARAMETERS
    source = "predicted, never measured"
    slower = [f"{name.upper()}={getattr(h, name)}" for name in ("dtype", "compile") if getattr(h, name) != "auto"]
    if h.dtype == "float32" or h.compile == "0":
        source += f", for compiled passes in bfloat16: {' '.join(slower)} takes longer"
    return Rates(training, rest, scoring, SMALL_PASS * training, source)


class Measured(NamedTuple):
    """A file of make bench."""

    path: Path
    date: str
    h: Any  # its settings
    figures: dict[str, float]

    def work(self, t: Any, kind: str) -> float:
        """Return the operations of a forward pass over a token."""
        with torch.device("meta"):
            work = forward_work(self.h, t.GPT(self.h), kind)
        return work.products + work.attention


def measured_rates(t: Any, h: Any, model: torch.nn.Module, card: Card) -> Rates | None:
    """Return rates from the file of the card in records/bench/ whose settings are nearest, in proportion to the
    operations; or None where there is no such file."""
    ours = {kind: sum(forward_work(h, model, kind)[:2]) for kind in ("training", "scoring")}

    def ratio(file: Measured, kind: str) -> float:
        return ours[kind] / file.work(t, kind)

    files = read_figures(t, card)
    if not files:
        return None
    newest = sorted(files, key=lambda file: file.date, reverse=True)
    nearest = min(newest, key=lambda file: abs(math.log(ratio(file, "training"))))
    rows = nearest.figures
    passes = rows["micro-batch forward, ms"] + rows["micro-batch backward, ms"]
    rest = rows["whole step, ms"] - rows["micro-batches a step"] * passes
    training = rows["micro-batches a step"] * passes / nearest.h.train_batch_tokens
    scale = ratio(nearest, "training")
    source = f"make bench, {nearest.date[:10]}, {nearest.path.name}"
    if scale != 1:
        source += f", times {scale:.2f} for the operations"
    return Rates(
        training=training / 1000 * scale,
        rest=max(0.0, rest) / 1000 * scale,
        scoring=1e-6 / rows["scoring, million positions/s"] * ratio(nearest, "scoring"),
        adaptation=1e-6 * rows["adaptation, s per million tokens and epoch"] * scale,
        source=source,
    )


NEEDED_FIGURES = (
    "micro-batch forward, ms",
    "micro-batch backward, ms",
    "micro-batches a step",
    "whole step, ms",
    "scoring, million positions/s",
    "adaptation, s per million tokens and epoch",
)


def read_figures(t: Any, card: Card) -> list[Measured]:
    """Return the files in records/bench/ that `make bench` wrote on one such card. Raise UserError for other files."""
    found = []
    for path in sorted(FIGURES.glob("*.json")):
        try:
            table = json.loads(path.read_bytes())
            machine = table["machine"]
            if card.name not in machine or "processes:1 " not in machine:
                continue
            figures = {name: float(table["figures"][name]) for name in NEEDED_FIGURES}
            if not all(math.isfinite(number) and number > 0 for number in figures.values()):
                raise ValueError(f"a figure is not above 0: {figures}")
            knobs = [*t.Hyperparameters.knobs(t.ModelKnob), "eval_stride", "eval_seq_len", "train_batch_tokens"]
            settings = {name: table["settings"][name] for name in knobs if name in table["settings"]}
            found.append(Measured(path, str(table["date"]), t.Hyperparameters(**settings), figures))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = repr(error).replace("\n", " ")
            raise t.UserError(f"{path} is not what make bench writes ({reason:.120}): remove it") from None
    return found


class Plan(NamedTuple):
    """A run on a card. Times are in seconds."""

    card: Card
    sequences: int  # of a pass
    num_passes: int  # of a step, on each GPU
    memory: float  # bytes of a GPU at the peak of the training
    steps: list[float]  # durations: of all, or before and after RECUR_START_FRAC
    step: float  # their mean over the run
    num_steps: int  # that fit, or ITERATIONS
    scoring: float
    epochs: int
    epoch: float  # of adaptation; 0 without
    source: str

    @property
    def evaluation(self) -> float:
        """Seconds of the final score."""
        return self.scoring + self.epochs * self.epoch


def plan_run(t: Any, h: Any, model: torch.nn.Module, card: Card) -> Plan:
    """Return passes, memory and times of a run on a card."""
    machine = Machine(t, h, card)
    run = SimpleNamespace(h=h, rt=machine, model=model, val=SimpleNamespace(num_targets=validation_targets(h)))
    t.limit_rows(run)
    sequences, num_passes = t.batch_plan(h, machine)
    num_parameters = sum(p.numel() for p in model.parameters())
    memory = (4 + t.STATE_BYTES) * num_parameters + sequences * h.train_seq_len * t.bytes_per_token(h, machine)
    rates = measured_rates(t, h, model, card) or predicted_rates(h, model, card)
    steps = [h.train_batch_tokens / card.count * rates.training + rates.rest]
    step = steps[0]
    if h.recur_blocks:
        with model.without_recurrence():
            first = measured_rates(t, h, model, card) or predicted_rates(h, model, card)
        steps.insert(0, h.train_batch_tokens / card.count * first.training + first.rest)
        step = 1 / (h.recur_start_frac / steps[0] + (1 - h.recur_start_frac) / steps[-1])
    scoring, epoch = evaluation_seconds(t, run, rates)
    epochs = h.ttt_epochs if epoch else 0
    if epochs == "auto":
        epochs = max(1, int(max(0.0, h.eval_budget_seconds - scoring) / epoch))
    num_steps = steps_in_budget(t, h, step)
    return Plan(card, sequences, num_passes, memory, steps, step, num_steps, scoring, epochs, epoch, rates.source)


def steps_in_budget(t: Any, h: Any, step: float) -> int:
    """Return the steps that a training takes; 0 where calibrations leave no time for one."""
    if not h.max_wallclock_seconds:
        return h.iterations
    h = copy.copy(h)
    if h.gptq_enabled:
        h.predicted_seconds = {"gptq": h.gptq_calibration_batches * step}  # its passes are those of steps
    try:
        seconds = t.training_budget(h)
    except t.UserError:
        return 0
    return min(h.iterations, max(1, int(seconds / step)))


def evaluation_seconds(t: Any, run: Any, rates: Rates) -> tuple[float, float]:
    """Return the seconds of scoring, and of an epoch of adaptation."""
    h, machine = run.h, run.rt
    num_batches, num_updates = t.count_passes(run)
    positions = num_batches * machine.max_rows["scoring"] * h.window
    share = min(h.ttt_batch_seqs * h.reach, h.ttt_chunk_tokens) / machine.world_size
    return positions * rates.scoring, num_updates * share * rates.adaptation


def validation_targets(h: Any) -> int:
    """Return the targets of the challenge's validation text with a vocabulary of this size."""
    bytes_a_token = float(np.interp(math.log2(h.vocab_size), *BYTES_A_TOKEN))
    num_targets = int(VALIDATION_BYTES / bytes_a_token)
    return min(num_targets, h.max_val_tokens or num_targets)


# =================================================== showing =========================================================
def broken_rules(t: Any, h: Any, artifact: Artifact, plan: Plan) -> list[str]:
    """Return a line for each rule of the challenge, or limit of the card, that these settings would break."""
    lines = []
    if plan.memory > plan.card.memory and h.trains:
        needed, there = plan.memory / 2**30, plan.card.memory / 2**30
        lines.append(f"memory: {needed:.1f} GiB are needed on each GPU, which has {there:.1f}")
    if h.trains and not artifact.can_fit:
        lines.append(f"size: code + model cannot be {h.size_limit:,} bytes; make the model smaller")
    elif h.trains and h.quant_floor == 0 and artifact.is_coarser:
        sizes = f"{artifact.finest / 1e6:.2f} MB, {artifact.budget / 1e6:.2f} are left"
        lines.append(f"size: QUANT_FLOOR=0 makes {sizes}: use auto")
    training = plan.num_steps * plan.step
    if h.trains and not plan.num_steps:
        lines.append(f"train: calibrations leave no step in MAX_WALLCLOCK_SECONDS={h.max_wallclock_seconds:g}")
    elif h.trains and training > t.TRAIN_LIMIT_SECONDS:
        lines.append(f"train: {plan.num_steps:,} steps take {training:.0f} s of {t.TRAIN_LIMIT_SECONDS:.0f}")
    if not h.trains:
        lines.append("train: this does not train")
    if plan.evaluation > t.EVAL_LIMIT_SECONDS:
        lines.append(f"eval: the final score takes {plan.evaluation:.0f} s of {t.EVAL_LIMIT_SECONDS:.0f}")
    if h.ttt_enabled and h.ttt_mode == "pre":
        lines.append("order: TTT_MODE=pre trains on validation tokens before they are scored")
    if h.max_val_tokens:
        lines.append(f"data: MAX_VAL_TOKENS={h.max_val_tokens:,} scores a part of the validation set")
    return lines


def describe(t: Any, h: Any) -> list[str]:
    """Return the lines of the estimate."""
    with torch.device("meta"):  # names and shapes only
        model = t.GPT(h)
    code = t.shipped_code(h)
    sizes = family_sizes(t, h, model)
    artifact = predict_artifact(h, sizes, len(code))
    plans = [plan_run(t, h, model, card) for card in CARDS]
    lines = [f"estimate of {' '.join(changed_settings(h)) or 'the defaults'}", ""]
    if "data_path" in h.given and not Path(h.data_path).is_dir():
        lines[0] += f"; {h.data_path} is not there, so its manifest is not read: VOCAB_SIZE={h.vocab_size} is assumed"
    lines += describe_bytes(t, h, sizes, artifact, len(code))
    lines += ["", *describe_work(h, model)]
    for plan in plans:
        lines += ["", *describe_plan(t, h, plan, artifact)]
    return lines


def changed_settings(h: Any) -> list[str]:
    """Return NAME=value for the settings that are no defaults, as one may type them."""
    changed = []
    for name, knob in h.knobs().items():
        value = getattr(h, name)
        if value != knob.default and name != "estimate":
            changed.append(f"{name.upper()}={int(value) if isinstance(value, bool) else value}")
    return changed


def describe_bytes(t: Any, h: Any, sizes: list[FamilySize], artifact: Artifact, num_code_bytes: int) -> list[str]:
    """Return the lines on parameters and bytes."""
    num_parameters = sum(size.num_weights for size in sizes)
    lines = [
        f"{'family':<12}{'parameters':>14}{'stored bits':>13}{'bits in file':>14}{'bytes':>14}   on the finest grid"
    ]
    for size in sizes:
        each = 8 * size.num_bytes / size.num_weights
        bits = ", ".join(map(str, size.bits))
        lines.append(f"{size.family:<12}{size.num_weights:>14,}{bits:>13}{each:>14.2f}{size.num_bytes:>14,.0f}")
    deviation = UNCERTAINTY * artifact.finest
    lines.append(f"{'together':<12}{num_parameters:>14,}{'':>27}{artifact.finest:>14,.0f}   ± {deviation:,.0f}")
    room = f"{artifact.budget:,} bytes are left beside {num_code_bytes:,} of code"
    if h.eval_only:
        size = t.find_path(h.eval_only, "EVAL_ONLY").stat().st_size
        return [*lines, f"artifact: {h.eval_only} has {size:,} bytes; {room}"]
    if h.quant_floor != "auto":
        size = f"that of QUANT_FLOOR={h.quant_floor:g} depends on how large the weights get, and is not foreseen"
        if h.quant_floor == 0:
            size = f"QUANT_FLOOR=0 is this grid: {artifact.finest / 1e6:.2f} MB"
        return [*lines, f"artifact: {room}; {size}"]
    if not artifact.can_fit:
        return [*lines, f"artifact: {room}, too few for any grid"]
    if not artifact.is_coarser:
        how = "which may be too few" if artifact.finest + deviation > artifact.budget else "so the finest grid fits"
        return [*lines, f"artifact: {artifact.finest / 1e6:.2f} MB; {room}, {how}"]
    lines.append(f"artifact: {room}, so QUANT_FLOOR=auto fills them: {artifact.bits:.2f} bits for a code, not")
    lines.append(f"          {artifact.finest_bits:.2f}, by steps that are {artifact.step_ratio:.2f} times as wide")
    return lines


def describe_work(h: Any, model: torch.nn.Module) -> list[str]:
    """Return the lines on operations."""
    forward, scoring = forward_work(h, model, "training"), forward_work(h, model, "scoring")
    parts = f"{forward.products / 1e6:.1f} of matrix products, {forward.attention / 1e6:.1f} of attention"
    once = (scoring.products + scoring.attention) / 1e6
    return [
        f"operations: {training_flops(h, model) / 1e6:.1f} million for a training token; forward {parts}",
        f"            {once:.1f} million for a position in scoring, {h.window / h.stride:.0f} positions for a target",
    ]


def describe_plan(t: Any, h: Any, plan: Plan, artifact: Artifact) -> list[str]:
    """Return the lines on a card."""
    lines = [f"{plan.card.title}: {plan.source}"]
    if h.trains:
        lines += describe_training(h, plan)
    score = f"{plan.scoring:.3g} s of scoring"
    if plan.epoch:
        score += f" and {count(plan.epochs, 'epoch')} of {plan.epoch:.3g} s, {plan.evaluation:.3g} s together"
    rules = broken_rules(t, h, artifact, plan)
    lines.append(f"  score:  {score}")
    lines.append(f"  rules:  {'; '.join(rules) or 'none would be broken, as far as can be foreseen'}")
    return lines


def describe_training(h: Any, plan: Plan) -> list[str]:
    """Return the lines on steps and data."""
    num_tokens = plan.num_steps * h.train_batch_tokens
    shards = math.ceil(num_tokens / SHARD_TOKENS)
    passes = f"{count(plan.num_passes, 'pass', 'passes')} of {plan.sequences} x {h.train_seq_len} tokens on each GPU"
    data = f"{count(shards, 'shard')} of 100 million tokens, {shards * 0.2:.1f} GB"
    if shards > PUBLISHED_SHARDS:
        epochs = num_tokens / PUBLISHED_SHARDS / SHARD_TOKENS
        data += f"; {PUBLISHED_SHARDS} are fetched by default, and would be read {epochs:.1f} times"
    each = f"{1000 * plan.step:.3g} ms"
    if len(plan.steps) > 1:
        first, later = (f"{1000 * step:.3g} ms" for step in plan.steps)
        each = f"{first}, and {later} from {h.recur_start_frac:.0%} of the time on"
    return [
        f"  step:   {each}, {passes}, {plan.memory / 2**30:.1f} GiB of memory each",
        f"  train:  {count(plan.num_steps, 'step')} in {plan.num_steps * plan.step:.3g} s, {num_tokens:,} tokens",
        f"  data:   {data}",
    ]


def count(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def show(t: Any, h: Any) -> None:
    """Print the estimate."""
    print("\n".join(describe(t, h)))
