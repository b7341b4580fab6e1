"""What the tests share: the script as a module, tiny settings, a real corpus, and the script as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # the challenge's real tokenizer and shards, where a checkout has them beside it
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import demo  # noqa: E402

import train_gpt as t  # noqa: E402

TINY = {
    "device": "cpu",
    "vocab_size": 96,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 4,
    "bigram_vocab_size": 64,
    "bigram_dim": 16,
    "ve_dim": 16,
    "train_seq_len": 32,
    "train_batch_tokens": 256,
    "eval_stride": 8,
    "eval_batch_seqs": 4,
    "ttt_chunk_tokens": 64,
    "ttt_batch_seqs": 2,
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the caller's shell reaches a test; torch's generator and threads are as before afterwards. Tensors
    of these sizes gain nothing from threads, and wait for each other on a busy machine: there is one."""
    for name in list(os.environ):
        if name.lower() in t.Hyperparameters.knobs():
            monkeypatch.delenv(name)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard by this process and those that it starts: what a shell starts in the background is deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tiny() -> Callable[..., t.Hyperparameters]:
    """Settings of a model that runs in milliseconds, with overrides."""
    return lambda **overrides: t.Hyperparameters(**{**TINY, **overrides})


@pytest.fixture
def make_run(tiny: Callable[..., t.Hyperparameters]) -> Callable[..., t.Run]:
    """A run of a tiny model on one process with random text, made awake: zero-initialised matrices become random."""

    def make(num_targets: int = 200, awake: bool = True, **overrides: object) -> t.Run:
        h = tiny(**overrides)
        rt = t.Runtime(h)
        rt.run_dir = Path()
        torch.manual_seed(1)
        tokens = torch.randint(h.vocab_size, (num_targets + 1,), dtype=torch.int32)
        model = t.GPT(h)
        if awake:
            wake(model)
        val = t.Validation(tokens, num_targets, 2 * num_targets, "random")
        shard = torch.randint(h.vocab_size, (5000,), dtype=torch.int32).numpy().astype("uint16")
        return t.Run(h, rt, model, rt.compile(model.forward), rt.compile(model.token_nll), [shard], val)

    return make


@torch.no_grad()
def wake(model: torch.nn.Module, std: float = 0.2) -> None:
    """Adds noise to every parameter, so that no path is silenced by a zero initialisation."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * std)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The demonstration corpus, built once: real English, a real tokenizer, real shards."""
    output = tmp_path_factory.mktemp("corpus")
    demo.build(output)
    data_path = output / "datasets" / "demo_sp1024"
    return SimpleNamespace(data_path=data_path, tokenizer_path=output / "tokenizers" / "demo_1024_bpe.model")


@pytest.fixture
def run_script(tmp_path: Path, corpus: SimpleNamespace) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script as a user would, in a folder of its own, under python or torchrun, on the demo corpus."""

    def run(num_processes: int = 1, cwd: Path = tmp_path, **settings: object) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        environment = {
            **{name: value for name, value in os.environ.items() if name.lower() not in t.Hyperparameters.knobs()},
            "DATA_PATH": str(corpus.data_path),
            "TOKENIZER_PATH": str(corpus.tokenizer_path),
            **{name: str(value) for name, value in settings.items()},
        }
        command = [*launcher, str(ROOT / "train_gpt.py")]
        return subprocess.run(
            command, env=environment, cwd=cwd, text=True, capture_output=True, timeout=300, check=False
        )

    return run
