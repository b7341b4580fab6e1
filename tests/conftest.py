"""What the tests share: the script as a module, tiny settings, a real corpus, and the script as real processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # the challenge's real tokenizer and shards, where a checkout has them beside it
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
# One thread for every process that a test starts (this one has its own, below): tensors of these sizes gain nothing
# from more, and on a busy machine threads that wait for each other take many times as long.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ |= ONE_THREAD

import demo  # noqa: E402

import train_gpt as t  # noqa: E402

CODE = t.CODE.read_bytes()
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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Returns the processes of `-n auto`, unless the user has said: xdist knows nothing of a container's quota."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return t.available_cores()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the caller's shell reaches a test; there is one thread; torch's generator stays as it is."""
    for name in list(os.environ):
        if name.lower() in t.Hyperparameters.knobs():
            monkeypatch.delenv(name)
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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
def make_run(tiny: Callable[..., t.Hyperparameters], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., t.Run]:
    """A run of a tiny model on one process with random text, made awake: zero-initialised matrices become random."""

    def make(num_targets: int = 200, awake: bool = True, **overrides: object) -> t.Run:
        h = tiny(**overrides)
        rt = t.Runtime(h)
        rt.run_dir = tmp_path_factory.mktemp("run")
        torch.manual_seed(1)
        tokens = torch.randint(h.vocab_size, (num_targets + 1,), dtype=torch.int32)
        model = t.GPT(h)
        if awake:
            wake(model)
        val = t.Validation(tokens, torch.full((num_targets,), 2, dtype=torch.int16), 2 * num_targets, "random")
        shard = torch.randint(h.vocab_size, (5000,), dtype=torch.int32).numpy().astype("uint16")
        return t.Run(h, rt, model, rt.compile(model.forward), rt.compile(model.token_nll), [shard], val, CODE)

    return make


def replay(run: t.Run) -> list[Callable[[], None]]:
    """Makes the run replay its scoring and adaptation as on CUDA. A graph is here a call with the tensors that it was
    recorded with. Returns the list of all replays so far."""
    replays = []

    def record_graph(work: Callable[[], None]) -> Callable[[], None]:
        return lambda: (replays.append(work), work())[1]  # recording does nothing yet

    run.rt.has_graphs = run.rt.records_graphs = True
    run.rt.record_graph = record_graph
    return replays


def prepare(h: t.Hyperparameters, weights: dict[str, torch.Tensor], prune_frac: float = 0.0) -> list[t.Prepared]:
    """Weights as the export prepares them, of a run of which nothing else is needed."""
    return t.prepare_weights(t.Run(h, None, None, None, None, [], None, b""), weights, prune_frac)


@torch.no_grad()
def wake(model: torch.nn.Module, std: float = 0.2) -> None:
    """Adds noise to every parameter, so that no path is silenced by a zero initialisation."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * std)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Returns a folder that is filled once for all processes of this run of the tests: the others wait, and read it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, part = base / f"once-{name}", base / f"once-{name}.part"
        with FileLock(base / f"once-{name}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a process that failed
                part.mkdir()
                fill(part)
                part.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def corpus(once: Callable) -> SimpleNamespace:
    """The demonstration corpus, built once: real English, a real tokenizer, real shards."""
    folder = once("corpus", demo.build)
    data_path = folder / "datasets" / "demo_sp1024"
    return SimpleNamespace(
        folder=folder, data_path=data_path, tokenizer_path=folder / "tokenizers" / "demo_1024_bpe.model"
    )


def shell(corpus: SimpleNamespace, **settings: object) -> dict[str, str]:
    """Returns the environment of a user who has set the corpus and these settings, and no others."""
    return {
        **{name: value for name, value in os.environ.items() if name.lower() not in t.Hyperparameters.knobs()},
        "DATA_PATH": str(corpus.data_path),
        "TOKENIZER_PATH": str(corpus.tokenizer_path),
        **{name: str(value) for name, value in settings.items()},
    }


# A run of seconds, as a user's shell would set it.
SMALL = {
    "DEVICE": "cpu",
    "NUM_LAYERS": 3,
    "MODEL_DIM": 64,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "TRAIN_SEQ_LEN": 64,
    "TRAIN_BATCH_TOKENS": 1024,
    "ITERATIONS": 24,
    "MAX_VAL_TOKENS": 4096,
    "TTT_CHUNK_TOKENS": 1024,
    "EVAL_STRIDE": 16,
    "EVAL_LADDER": 1,
}


# A run of a second or two that does all there is to do, under the audit.
AUDITED = {
    "DEVICE": "cpu", "NUM_LAYERS": 2, "MODEL_DIM": 32, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 512, "ITERATIONS": 4, "MAX_VAL_TOKENS": 1024, "EVAL_STRIDE": 32, "TTT_CHUNK_TOKENS": 256,
    "AUDIT": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def audited(once: Callable, corpus: SimpleNamespace) -> Path:
    """The folder of a real, tiny, audited run, to be read or copied; what it printed lies beside it in stdout.txt."""

    def fill(folder: Path) -> None:
        command = [sys.executable, str(t.CODE)]
        environment = shell(corpus, **AUDITED, RUN_ID="a")
        done = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "logs/stdout.txt").write_text(done.stdout)

    return once("audited", fill) / "logs/a"


@pytest.fixture
def run_script(tmp_path: Path, corpus: SimpleNamespace) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script as a user would, in a folder of its own, under python or torchrun, on the demo corpus."""

    def run(
        num_processes: int = 1, cwd: Path = tmp_path, script: Path = t.CODE, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command = [*launcher, str(script)]
        return subprocess.run(
            command, env=shell(corpus, **settings), cwd=cwd, text=True, capture_output=True, timeout=300, check=False
        )

    return run
