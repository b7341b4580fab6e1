"""Measure what a run costs on this machine: the parts of a step, scoring, adaptation, export, start-up and memory.

    make bench                                    # this machine; at a small size where there is no GPU
    make bench CONFIG=pr1092                      # with the settings of a file in records/env/
    make bench VS=MLP_KERNEL=plain                # two settings in turns: the ratio of each time, with its interval
    python tests/bench.py --stages step --profile # one stage only; a trace and the 30 dearest operations

Tokens and weights are random: times do not depend on them. Each figure is a median between synchronized clocks, after
warm-up. They are printed, and written to logs/bench/<time>.json with all samples. Nothing is needed but torch, numpy
and sentencepiece; without zstandard the artifact is compressed once, by lzma."""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from estimate import training_flops  # noqa: E402

import train_gpt as t  # noqa: E402

# Dense bfloat16 peaks in TFLOP/s, from the makers' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0, "B200": 2250.0}
BYTES_A_WEIGHT = 0.589  # of the full model's 26,993,756 parameters in 16,000,000 bytes with a packed script of 95 kB
# What records/env/bench.env sets of these is the size for machines without a GPU.
SIZES = {"num_layers", "model_dim", "num_heads", "num_kv_heads", "train_seq_len", "train_batch_tokens"}


def spread_rows(w: torch.Tensor) -> torch.Tensor:
    """Returns random weights in the shape of `w`, whose rows differ in width as those of trained models do."""
    if w.ndim < 2:
        return torch.ones_like(w)
    return 0.16 * torch.randn_like(w) * torch.exp(0.3 * torch.randn_like(w[:, :1]))


class Case:
    """One set of settings: a run on random text, and what is timed of it. Every stage does its work once a call."""

    def __init__(self, folder: Path, **settings: Any):
        if importlib.util.find_spec("zstandard") is None:
            settings["compressor"] = "lzma"
        self.h = h = t.Hyperparameters(**settings)
        self.rt = rt = t.Runtime(h)
        rt.run_dir = folder
        torch.manual_seed(h.seed)
        model = t.GPT(h)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))  # no matrix of zeros, which would compress to nothing
        model = model.to(rt.device)
        model.compute_dtype = rt.dtype
        tokens = np.random.default_rng(0).integers(h.vocab_size, size=4 * h.train_batch_tokens, dtype=np.uint16)
        val = t.random_text(h, max(h.ttt_chunk_tokens, rt.max_rows["scoring"] * h.stride * 4))
        mean_loss, token_nll = rt.compile(model.forward), rt.compile(model.token_nll)
        self.run = t.Run(h, rt, model, mean_loss, token_nll, [tokens], val, t.shipped_code(h))
        t.limit_rows(self.run)
        t.pick_kernels(self.run)
        self.trainer = t.Trainer(self.run)
        t.fit_training(self.trainer)
        self.checkpoints = t.Checkpoints(self.trainer)
        self.loader = t.TokenLoader(h, rt, [tokens])
        self.batch = self.loader.next_batch()
        self.num_micro_batches = len(self.batch)
        self.blob = b""
        self.scorer = t.Scorer(self.run, val, h.stride)
        self.ttt = t.pick_ttt(self.run)
        self.adaptation_batch = self.ttt.batches(self.scorer.tokens, 0, min(h.ttt_chunk_tokens, val.num_targets))[0]
        rt.log = lambda line: None  # each checkpoint has one
        self.weights = {name: spread_rows(p.detach()) for name, p in model.named_parameters()}
        h = copy.copy(h)
        h.gptq_calibration_batches = 1
        num_weights = sum(p.numel() for p in model.parameters())
        h.size_limit = min(h.size_limit, len(self.run.code) + int(BYTES_A_WEIGHT * num_weights))
        self.exported = self.run._replace(h=h)
        self.curvatures: dict[str, t.Curvature] = {}

    # -------------------------------------------------------------------------------------------- stages of a step
    def forward(self) -> None:
        """A micro-batch forward, keeping what the backward pass needs."""
        self.run.mean_loss(*self.batch[0])

    def forward_backward(self) -> None:
        """A micro-batch forward and backward."""
        self.run.mean_loss(*self.batch[0]).backward()
        self.run.model.zero_grad(set_to_none=True)

    def prepare_optimizer(self) -> None:
        """Gives every parameter a gradient."""
        for p in self.trainer.parameters:
            p.grad = torch.zeros_like(p)

    def optimizer(self) -> None:
        """Reduction, clipping and the update."""
        self.trainer.optimizer.step(0.0, 0.95)

    def averages(self) -> None:
        """The moving average of the weights."""
        self.trainer.update_averages(1, 1.0)

    def prepare_loader(self) -> None:
        """Waits until the next batches are read, as they are in a training whose steps take longer."""
        concurrent.futures.wait(self.loader.futures)

    def load_batch(self) -> None:
        """A step's tokens, from the reading thread to the device."""
        self.batch = self.loader.next_batch()

    def step(self) -> None:
        """A whole step, as `train` takes it."""
        loss = self.trainer.step(0.0, self.loader.next_batch())
        self.rt.lagged_list(self.trainer.numbers_of_step(loss))

    def prepare_checkpoint(self) -> None:
        """Waits until the last checkpoint is written."""
        self.checkpoints.wait()

    def checkpoint(self) -> None:
        """The copy of the training's state, for which a step waits; the writing goes on beside the next steps."""
        self.checkpoints.save()

    # ----------------------------------------------------------------------------------------- scoring and export
    def score(self) -> None:
        """A batch of sliding windows with all its work on the host."""
        self.scorer.score(self.scorer.windows[1 : 1 + self.rt.max_rows["scoring"]])

    def adapt(self) -> None:
        """One step of adaptation."""
        self.ttt.adapt(self.adaptation_batch, lr_scale=0.0)

    def calibrate(self) -> None:
        """GPTQ's statistics of a batch, and the factors of its Hessians."""
        self.curvatures = t.measure_curvature(self.exported)

    def fit(self) -> None:
        """Weights to the artifact that fits the limit, by the clip search."""
        self.blob, _ = t.fit_artifact(self.exported, self.weights)

    def fit_gptq(self) -> None:
        """The same by GPTQ."""
        self.blob, _ = t.fit_artifact(self.exported._replace(calibrated={"gptq": self.curvatures}), self.weights)

    def reload(self) -> None:
        """The artifact to weights."""
        t.decode(self.blob, "the benchmark's artifact")


# Stage -> the methods that are timed, in order; method -> another one that comes before it, untimed.
STAGES = {
    "step": ("forward", "forward_backward", "optimizer", "averages", "load_batch", "step", "checkpoint"),
    "score": ("score",),
    "adapt": ("adapt",),
    "export": ("calibrate", "fit", "fit_gptq", "reload"),
}
PREPARE = {
    "optimizer": "prepare_optimizer",
    "load_batch": "prepare_loader",
    "step": "prepare_loader",
    "checkpoint": "prepare_checkpoint",
}
MAX_SECONDS = 8.0  # for the samples of a figure, of which there are at least three


def time_once(case: Case, name: str) -> float:
    """Returns the milliseconds of one call of a method, after what has to come before it."""
    if name in PREPARE:
        getattr(case, PREPARE[name])()
    start = case.rt.now()
    getattr(case, name)()
    return 1000 * (case.rt.now() - start)


def measure(cases: list[Case], stages: list[str], repeats: int) -> dict[str, list[list[float]]]:
    """Returns, for each method, the milliseconds of each case: lists of samples, taken in turns between the cases."""
    samples = {}
    for stage in stages:
        for name in STAGES[stage]:
            for case in cases:
                time_once(case, name)
                time_once(case, name)
            samples[name] = [[] for _ in cases]
            started = time.perf_counter()
            for i in range(repeats):
                for index in range(len(cases))[:: 1 if i % 2 == 0 else -1]:
                    samples[name][index].append(time_once(cases[index], name))
                if i >= 2 and time.perf_counter() - started > MAX_SECONDS * len(cases):
                    break
            print(f"measured {name}, {len(samples[name][0])} times", file=sys.stderr)
    return samples


def figures(case: Case, milliseconds: dict[str, float]) -> dict[str, float]:
    """Returns the table's rows, name with unit -> number, from the medians of the methods."""
    h, rt = case.h, case.rt
    rows = {}
    if "step" in milliseconds:
        own_tokens = h.train_batch_tokens / rt.world_size
        passes = case.num_micro_batches * milliseconds["forward_backward"]
        parts = passes + sum(milliseconds[name] for name in ("optimizer", "averages", "load_batch"))
        rows["micro-batch forward, ms"] = milliseconds["forward"]
        rows["micro-batch backward, ms"] = milliseconds["forward_backward"] - milliseconds["forward"]
        rows["micro-batches a step"] = case.num_micro_batches
        rows["optimizer, ms"] = milliseconds["optimizer"]
        rows["averages, ms"] = milliseconds["averages"]
        rows["loader, ms"] = milliseconds["load_batch"]
        rows["everything else, ms"] = milliseconds["step"] - parts
        rows["whole step, ms"] = milliseconds["step"]
        rows["tokens/s, all processes"] = h.train_batch_tokens / milliseconds["step"] * 1000
        rows["checkpoint, ms that a step waits"] = milliseconds["checkpoint"]
        name = torch.cuda.get_device_name() if rt.device.type == "cuda" else ""
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
        achieved = training_flops(h, case.run.model) * own_tokens / milliseconds["step"] / 1e9
        rows["model TFLOP/s a device"] = achieved
        if peak:
            rows["model FLOP utilisation, %"] = 100 * achieved / peak
    if "score" in milliseconds:
        windows = rt.max_rows["scoring"]
        targets = windows * h.stride
        rows["scoring, s per million targets"] = milliseconds["score"] / 1000 / targets * 1e6
        rows["scoring, million positions/s"] = windows * h.window / milliseconds["score"] / 1000
    if "adapt" in milliseconds:
        sequences = min(h.ttt_batch_seqs, math.ceil(h.ttt_chunk_tokens / h.window))
        rows["adaptation, s per million tokens and epoch"] = milliseconds["adapt"] / 1000 / (sequences * h.window) * 1e6
    if "fit" in milliseconds:
        rows["GPTQ: a batch of its calibration, s"] = rt.pass_seconds["calibration"]
        rows["GPTQ: factors of its Hessians, s"] = rt.pass_seconds["factorization"]
        rows["fit to the limit, s"] = milliseconds["fit"] / 1000
        rows["fit to the limit with GPTQ, s"] = milliseconds["fit_gptq"] / 1000
        rows["reload, s"] = milliseconds["reload"] / 1000
        rows["artifact, bytes"] = len(case.blob)
    return rows


def sign_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Returns an interval for the median of ratios, and its confidence: the innermost pair of order statistics that has
    95% or more, whatever the distribution; with fewer than 6 ratios there is none, and the widest is returned."""
    ordered, n = sorted(ratios), len(ratios)
    outside = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]  # k: values cut off a side
    cut = max((k for k in range(len(outside)) if outside[k] <= 0.05), default=0)
    return ordered[cut], ordered[n - 1 - cut], 1 - outside[cut] if outside else 0.0


def start_up(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds from the start of Python to the end of the preflight, with empty and with filled caches."""
    rows = {}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    for name in ("cold", "warm"):
        start = time.perf_counter()
        command = [sys.executable, __file__, "--preflight", json.dumps(settings)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"the preflight failed:\n{done.stdout}{done.stderr}")
        rows[f"start-up, {name}, s"] = time.perf_counter() - start
    return rows


def peak_memory(device: torch.device) -> float:
    """Returns the most memory in use so far, in GiB: the device's, or this process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def profile(case: Case, folder: Path) -> str:
    """Writes a trace of three steps and returns a table of the 30 dearest operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if case.rt.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            case.step()
        case.rt.now()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90)


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*STAGES, "startup"]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="what to measure (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="samples of a figure (%(default)s)")
    parser.add_argument("--vs", metavar="VAR=VALUE", help="a setting to compare with, in turns (start-up is left out)")
    parser.add_argument(
        "--profile", action="store_true", help="write a trace, print the 30 dearest operations of a step"
    )
    parser.add_argument("--preflight", metavar="JSON", help=argparse.SUPPRESS)  # of `start_up`, in a process of its own
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: a figure needs at least one sample")
    if arguments.vs and arguments.stages == ["startup"]:
        parser.error("--vs does not compare start-up: choose other stages")
    return arguments


def size_for(h: t.Hyperparameters) -> dict[str, Any]:
    """Returns the settings of the small size that the caller left alone, if there is no GPU."""
    if h.device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return {}
    lines = (ROOT / "records" / "env" / "bench.env").read_text().splitlines()
    small = dict(line.lower().split("=", 1) for line in lines if "=" in line)
    return {name: int(small[name]) for name in sorted(SIZES - h.given.keys())}


def parse_setting(text: str) -> dict[str, Any]:
    """Returns the setting of VAR=VALUE as the script's own parser reads it; UserError if there is none like it."""
    knobs = {name.upper(): knob for name, knob in t.Hyperparameters.knobs().items()}
    name, equals, value = text.partition("=")
    if name not in knobs:
        raise t.UserError(f"--vs {text}: {name} is not a setting{t.suggest(name, knobs)}")
    if not equals:
        raise t.UserError(f"--vs {text}: which value? Write {name}=VALUE")
    return {name.lower(): knobs[name].parse(name, value)}


def compare(samples: dict[str, list[list[float]]], vs: str) -> dict[str, Any]:
    """Prints and returns, for each method, the ratio of the second case's time to the first's, with its interval."""
    ratios = {}
    print(f"\n{vs} against the settings as they are: ratio of times, below 1 is faster")
    for name, (first, second) in samples.items():
        pairs = [b / a for a, b in zip(first, second)]
        low, high, confidence = sign_interval(pairs)
        ratios[name] = {"ratio": statistics.median(pairs), "low": low, "high": high, "confidence": confidence}
        print(f"  {name:18} {statistics.median(pairs):7.3f}   {low:.3f} to {high:.3f} ({100 * confidence:.0f}%)")
    return ratios


def main() -> None:
    """Measure, print and write."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.preflight:
            case = Case(folder, **json.loads(arguments.preflight))
            t.preflight(case.run)
            return
        settings = size_for(t.Hyperparameters())
        cases = [Case(folder, **settings)]
        case = cases[0]
        if arguments.vs:
            cases.append(Case(folder, **{**settings, **parse_setting(arguments.vs)}))
        stages = [stage for stage in arguments.stages if stage in STAGES]
        samples = measure(cases, stages, arguments.repeats)
        for each in cases:
            each.checkpoints.wait()
        medians = {name: statistics.median(values[0]) for name, values in samples.items()}
        rows = figures(case, medians)
        rows["peak memory, GiB"] = peak_memory(case.rt.device)
        if "startup" in arguments.stages and not arguments.vs:
            rows |= start_up(folder, settings)
        table = {"machine": case.rt.describe(), "date": f"{datetime.now():%Y-%m-%d %H:%M}", "figures": rows}
        table |= {"settings": case.h.values(), "samples_ms": samples}
        print(f"\n{table['machine']}")
        for name, value in rows.items():
            print(f"  {name:46} {value:14,.3f}")
        if arguments.vs:
            table["vs"] = {"setting": arguments.vs, "ratios": compare(samples, arguments.vs)}
        out = ROOT / "logs" / "bench"
        out.mkdir(parents=True, exist_ok=True)
        if arguments.profile:
            print(profile(case, out))
        path = out / f"{datetime.now():%Y%m%d-%H%M%S}.json"
        t.write_atomically(path, (json.dumps(table, indent=2) + "\n").encode())
        print(f"written: {path.relative_to(ROOT)}")
        case.rt.close()


if __name__ == "__main__":
    try:
        main()
    except t.UserError as error:
        sys.exit(f"bench.py: error: {error}")
