"""From files to batches and bytes: what is refused, what is read in which order, and how bytes are counted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import shards
import torch
from conftest import ROOT, SHARED, TINY

import train_gpt as t

MAGIC, VERSION = 20240520, 1  # the format as the challenge's data has it
BOS = 1


def shard_bytes(tokens: Any, magic: int = MAGIC, version: int = VERSION, num_tokens: int | None = None) -> bytes:
    """Returns a shard: 256 little-endian int32, of which three are used, then the tokens as little-endian uint16."""
    num_tokens = len(tokens) if num_tokens is None else num_tokens
    return struct.pack("<3i", magic, version, num_tokens) + bytes(253 * 4) + struct.pack(f"<{len(tokens)}H", *tokens)


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 1001])
def test_a_shard_comes_back_as_it_was_written(num_tokens: int, tmp_path: Path) -> None:
    tokens = [65_535, 0, 256, 1, *range(num_tokens)][:num_tokens]
    path = tmp_path / "a_train_0.bin"
    path.write_bytes(shard_bytes(tokens))
    assert path.read_bytes() == shards.shard_header(num_tokens) + np.array(tokens, "<u2").tobytes()  # data/'s tools
    shard = t.load_data_shard(path)
    assert shard[:].dtype == np.uint16 and shard[:].tolist() == tokens and len(shard) == num_tokens
    assert shard.max() == max(tokens)
    for begin, end in [(0, 1), (1, 3), (num_tokens - 1, num_tokens + 9), (5, 2)]:
        assert shard[begin:end].tolist() == tokens[begin:end]


def test_shards_are_taken_in_the_order_of_their_names_and_by_split(
    tmp_path: Path, tiny: Callable[..., t.Hyperparameters]
) -> None:
    for token, name in enumerate(
        ["a_train_000010", "a_train_000002", "b_train_000001", "a_val_000000", "training", "x"]
    ):
        (tmp_path / f"{name}.bin").write_bytes(shard_bytes([token]))
    (tmp_path / "a_train_000003.bin.part").write_bytes(b"still being fetched")
    h = tiny(data_path=str(tmp_path))
    assert [shard[:].tolist() for shard in t.load_shards(h, "train")] == [[1], [0], [2]]
    assert [shard[:].tolist() for shard in t.load_shards(h, "val")] == [[3]]


def test_paths_are_also_looked_for_above_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., t.Hyperparameters]
) -> None:
    """A copy of the script in records/<name>/ finds the data of the repository, from wherever it is started."""
    data, script, elsewhere = tmp_path / "repo" / "data", tmp_path / "repo" / "records" / "x", tmp_path / "elsewhere"
    for folder in (data, script, elsewhere):
        folder.mkdir(parents=True)
    (data / "a_train_0.bin").write_bytes(shard_bytes([7]))
    monkeypatch.setattr(t, "CODE", script / "train_gpt.py")
    monkeypatch.chdir(elsewhere)
    assert t.find_path("./data", "DATA_PATH") == data
    (elsewhere / "data").mkdir()
    assert t.find_path("./data", "DATA_PATH").resolve() == elsewhere / "data"  # but the user's own folder goes first
    assert t.find_path(data, "DATA_PATH") == data


# ---- what is refused -------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], **options: Any) -> bytes:
    """Returns a small SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", pad_id=0, bos_id=BOS, eos_id=2, unk_id=3,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def bad(tmp_path: Path, corpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A folder with good shards to spoil, and `main` on it, which is to end with an error and without a trace."""
    data, cwd = tmp_path / "shards", tmp_path / "cwd"
    data.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    tokens = np.random.default_rng(0).integers(300, 1024, 400).tolist()
    settings = {**TINY, "vocab_size": 1024, "iterations": 1, "data_path": data, "ttt_enabled": 0}
    settings = {name.upper(): str(value) for name, value in settings.items()}
    settings |= {"TOKENIZER_PATH": str(corpus.tokenizer_path), "RUN_ID": "bad"}
    for split in ("train", "val"):
        (data / f"a_{split}_000000.bin").write_bytes(shard_bytes([BOS, *tokens]))
        (data / f"a_{split}_000001.bin").write_bytes(shard_bytes([BOS, *tokens[::-1]]))

    def refused(**changed: object) -> str:
        for name, value in {**settings, **changed}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(t.UserError) as raised:
            t.main()
        assert list(cwd.iterdir()) == [], "a run that cannot start must leave nothing behind, least of all its RUN_ID"
        return str(raised.value)

    yield SimpleNamespace(data=data, tokens=tokens, refused=refused, tmp=tmp_path)


TOKENS = [BOS, *range(300, 700)]
GOOD = shard_bytes(TOKENS)
SPOILED_SHARDS = {
    "wrong magic": (shard_bytes(TOKENS, magic=MAGIC + 1), r"not a token shard.*starts with \[20240521, 1\]"),
    "wrong version": (shard_bytes(TOKENS, version=2), r"not a token shard.*starts with \[20240520, 2\]"),
    "no shard at all": (b"\x28\xb5\x2f\xfd" * 300, r"not a token shard"),
    "text": (b"not a shard\n", r"not a token shard.*\(12 bytes,"),
    "empty file": (b"", r"not a token shard.*\(0 bytes,"),
    "half a header": (GOOD[:512], r"not a token shard.*\(512 bytes,"),
    "only a header": (GOOD[:1024], r"truncated: 1024 bytes, but its header declares 1826"),
    "a token less": (GOOD[:-2], r"truncated: 1824 bytes, but its header declares 1826"),
    "a byte less": (GOOD[:-1], r"truncated: 1825 bytes, but its header declares 1826"),
    "a byte more": (GOOD + b"\0", r"oversized: 1827 bytes, but its header declares 1826"),
    "two in one": (GOOD + GOOD, r"oversized: 3652 bytes, but its header declares 1826"),
    "a negative count": (shard_bytes(TOKENS, num_tokens=-5), r"1826 bytes"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", SPOILED_SHARDS)
def test_a_spoiled_shard_is_refused_before_anything_is_written(kind: str, split: str, bad: SimpleNamespace) -> None:
    content, found = SPOILED_SHARDS[kind]
    path = bad.data / f"a_{split}_000001.bin"
    path.write_bytes(content)
    message = bad.refused()
    assert re.match(f"{re.escape(str(path))} is .*{found}", message), message
    assert message.endswith("fetch it again")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_without_tokens_is_not_called_oversized(split: str, bad: SimpleNamespace) -> None:
    """Its size is what its header declares: a message that says otherwise sends the user the wrong way."""
    path = bad.data / f"a_{split}_000001.bin"
    path.write_bytes(shard_bytes([]))
    message = bad.refused()
    assert message.startswith(f"{path} is ") and "oversized" not in message and "truncated" not in message, message


@pytest.mark.parametrize("token", [1024, 65_535])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_written(
    split: str, token: int, bad: SimpleNamespace
) -> None:
    # In the second shard, behind the first batch: nothing may fail for the first time after ten minutes of training.
    (bad.data / f"a_{split}_000001.bin").write_bytes(shard_bytes([*TOKENS, token, 5]))
    message = bad.refused()
    assert f"token {token}" in message and "VOCAB_SIZE=1024" in message and split in message, message
    assert "demo.py" in message, message


def test_the_highest_token_of_the_vocabulary_is_read_and_arrives(
    tmp_path: Path, corpus: SimpleNamespace, tiny: Callable
) -> None:
    paths = {"data_path": str(tmp_path), "tokenizer_path": str(corpus.tokenizer_path)}
    h, tokens = tiny(vocab_size=1024, loader="sequential", **paths), [BOS, *range(1023, 511, -1)]
    for split in ("train", "val"):
        (tmp_path / f"a_{split}_0.bin").write_bytes(shard_bytes(tokens))
    assert int(t.load_validation_tokens(h).tokens.max()) == 1023
    ((x, _),) = make_loader(h, t.load_shards(h, "train")).next_batch()
    assert x.flatten().tolist() == tokens[:256]


def test_more_shards_than_a_process_may_hold_files_open_are_listed_and_read(tmp_path: Path) -> None:
    """Exports of up to 1,500 shards are in use, and 1,024 open files are a common limit; here it is 64 of 2,000."""
    for number in range(2000):
        (tmp_path / f"a_train_{number:06d}.bin").write_bytes(shard_bytes([BOS, number % 900, 5, 6]))
    code = f"""
import resource, types, torch
import train_gpt as t
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
h = t.Hyperparameters(data_path={str(tmp_path)!r}, train_seq_len=8, eval_stride=8, train_batch_tokens=8000)
shards = t.load_shards(h, "train")
rt = types.SimpleNamespace(rank=0, world_size=1, to_device=lambda array: torch.from_numpy(array).long())
rt.max_rows = {{"training": 1000}}
x = torch.cat([x for x, y in t.TokenLoader(h, rt, shards).next_batch()])
assert len(shards) == 2000 and x.shape == (1000, 8) and x.unique().numel() > 200, x
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def remove(pattern: str) -> Callable[[SimpleNamespace], None]:
    return lambda bad: [path.unlink() for path in bad.data.glob(pattern)]


def add(name: str, content: bytes = GOOD) -> Callable[[SimpleNamespace], None]:
    return lambda bad: (bad.data / name).write_bytes(content)


def link_validation_as_train(bad: SimpleNamespace) -> None:
    os.symlink(bad.data / "a_val_000000.bin", bad.data / "a_train_000002.bin")


@pytest.mark.parametrize(
    ("spoil", "settings", "parts"),
    [
        (None, {"DATA_PATH": "nowhere"}, ["DATA_PATH=nowhere does not exist", "python data/demo.py"]),
        (None, {"TOKENIZER_PATH": "no.model"}, ["TOKENIZER_PATH=no.model does not exist", "python data/demo.py"]),
        (remove("*.bin"), {}, ["DATA_PATH=", "shards has no *_val_*.bin", "python data/download.py"]),
        (remove("*val*"), {}, ["DATA_PATH=", "shards has no *_val_*.bin", "python data/demo.py"]),
        (remove("*train*"), {}, ["DATA_PATH=", "shards has no *_train_*.bin", "python data/demo.py"]),
        (
            add("a_train_val_0.bin"),
            {},
            ["a_train_val_0.bin is both a train and a validation shard", "rename or remove"],
        ),
        (link_validation_as_train, {}, ["a_val_000000.bin is both a train and a validation shard", "rename or remove"]),
        (None, {"VOCAB_SIZE": 1000}, ["has 1024 pieces, VOCAB_SIZE=1000", "unset that, or use other data"]),
        (
            add("t.model", b"no model"),
            {"TOKENIZER_PATH": "../shards/t.model"},
            ["t.model is not a SentencePiece", "fetch"],
        ),
        (add("t.model", b""), {"TOKENIZER_PATH": "../shards/t.model"}, ["TOKENIZER_PATH=../shards/t.model"]),
        (None, {"TOKENIZER_PATH": "../shards"}, ["TOKENIZER_PATH=../shards is a folder", "name a file in it"]),
    ],
)
def test_missing_and_wrong_files_are_refused_by_variable_value_and_fix(
    spoil: Callable | None, settings: dict, parts: list[str], bad: SimpleNamespace
) -> None:
    if spoil:
        spoil(bad)
    message = bad.refused(**settings)
    for part in parts:
        assert part in message, (part, message)


def test_a_validation_text_without_a_byte_is_refused(bad: SimpleNamespace) -> None:
    remove("*_val_*")(bad)
    add("a_val_0.bin", shard_bytes([BOS] * 65))(bad)
    assert re.match(r"the validation shards of DATA_PATH=\S+ have no text", bad.refused())


def test_a_tokenizer_without_the_bare_space_piece_is_refused(bad: SimpleNamespace) -> None:
    """Without it a lone space becomes three byte tokens (or unknown), and bits per byte come out wrong."""
    path = bad.tmp / "bare.model"
    path.write_bytes(
        train_tokenizer(["abcabcab" * 4, "cabbage"], vocab_size=300, byte_fallback=True, add_dummy_prefix=False)
    )
    sp = sentencepiece.SentencePieceProcessor(str(path))
    assert sp.encode("a b", out_type=str)[1:4] == ["<0xE2>", "<0x96>", "<0x81>"]  # the fixture is what it should be
    message = bad.refused(TOKENIZER_PATH=path, VOCAB_SIZE=sp.vocab_size())
    assert message.startswith(f"TOKENIZER_PATH={path} lacks the bare piece '▁'") and "retrain it" in message


# ---- the manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path, corpus: SimpleNamespace, tiny: Callable) -> SimpleNamespace:
    """A copy of the demonstration corpus with its manifest, and the settings of a run on it."""
    for folder in (corpus.data_path, corpus.tokenizer_path.parent):
        shutil.copytree(folder, tmp_path / folder.relative_to(corpus.data_path.parents[1]))
    data = tmp_path / "datasets" / corpus.data_path.name

    def settle(**chosen: object) -> t.Hyperparameters:
        given = {name: value for name, value in TINY.items() if name != "vocab_size"}
        return t.apply_manifest(t.Hyperparameters(**{**given, "data_path": str(data), **chosen}))

    tokenizer = tmp_path / "tokenizers" / corpus.tokenizer_path.name
    manifest = json.loads((data / "manifest.json").read_text())
    return SimpleNamespace(
        data=data, tokenizer=tokenizer, manifest=manifest, settle=settle, path=data / "manifest.json"
    )


def test_vocabulary_and_tokenizer_are_those_of_the_manifest(
    described: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (described.data.parents[1] / "elsewhere").mkdir()
    monkeypatch.chdir(described.data.parents[1] / "elsewhere")
    h = described.settle()
    assert h.vocab_size == 1024 and Path(h.tokenizer_path).samefile(described.tokenizer)
    assert t.load_validation_tokens(h).num_targets > 60_000
    copied = described.tokenizer.with_name("copy.model")
    shutil.copy(described.tokenizer, copied)
    h = described.settle(tokenizer_path=str(copied), vocab_size=1024)  # the same, said by the user
    assert (h.vocab_size, h.tokenizer_path) == (1024, str(copied))
    described.path.unlink()
    assert described.settle().tokenizer_path == t.Hyperparameters.tokenizer_path, (
        "without a manifest the default counts"
    )


def test_another_vocabulary_or_tokenizer_than_the_manifests_is_refused(
    described: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = described.tokenizer.with_name("other.model")
    other.write_bytes(train_tokenizer(["the cat sat on the mat"] * 50, vocab_size=290, byte_fallback=True))
    with pytest.raises(t.UserError, match=rf"TOKENIZER_PATH={other} is not the tokenizer that {described.path} names"):
        described.settle(tokenizer_path=str(other))
    monkeypatch.setenv("VOCAB_SIZE", "2048")
    with pytest.raises(t.UserError, match=r"has 1024 pieces, VOCAB_SIZE=2048: unset that"):
        t.load_validation_tokens(described.settle())
    monkeypatch.delenv("VOCAB_SIZE")
    shutil.copy(other, described.tokenizer)
    with pytest.raises(t.UserError, match="is not the tokenizer that"):
        described.settle()
    described.tokenizer.unlink()
    with pytest.raises(t.UserError, match=r"TOKENIZER_PATH=.*demo_1024_bpe.model does not exist"):
        described.settle()


def test_a_run_names_its_data_as_sha256sum_does(described: SimpleNamespace) -> None:
    hashes = t.data_hashes(described.settle())
    for split in ("train", "val"):
        listed = f"cd {shlex.quote(str(described.data))} && LC_ALL=C sha256sum *_{split}_*.bin | sha256sum"
        said = subprocess.run(["bash", "-c", listed], capture_output=True, text=True, check=True).stdout
        assert hashes[f"{split}_sha256"] == said.split()[0]
    assert hashes["tokenizer_sha256"] == hashlib.sha256(described.tokenizer.read_bytes()).hexdigest()
    assert t.data_hashes(described.settle(eval_only="final_model.bin")).keys() == {"tokenizer_sha256", "val_sha256"}
    train, val = (described.manifest["files"][f"demo_{split}_000000.bin"] for split in ("train", "val"))
    train["sha256"] = "../../x"  # no hash: the others of the split do not stand for all
    described.path.write_text(json.dumps(described.manifest))
    assert t.data_hashes(described.settle()).keys() == {"tokenizer_sha256", "val_sha256"}
    val["sha256"] = "0" * 64
    described.path.write_text(json.dumps(described.manifest))
    with pytest.raises(
        t.UserError, match=r"demo_val_000000.bin is not the shard that manifest.json names: `python data"
    ):
        t.data_hashes(described.settle())
    described.path.unlink()
    hashes = t.data_hashes(described.settle(tokenizer_path=str(described.tokenizer)))
    assert hashes.keys() == {"tokenizer_sha256", "val_sha256"}


@pytest.mark.parametrize("kind", ["missing", "more", "shorter", "missing validation"])
def test_shards_that_are_not_the_manifests_are_refused(kind: str, described: SimpleNamespace) -> None:
    """One shard of eighty cost users hours, and 0.1 bits per byte."""
    name = {"more": "x_train_000009.bin", "missing validation": "demo_val_000000.bin"}.get(
        kind, "demo_train_000001.bin"
    )
    path = described.data / name
    if kind == "more":
        path.write_bytes(GOOD)
    elif kind == "shorter":
        path.write_bytes(shard_bytes(t.load_data_shard(path)[:-5].tolist()))
    else:
        path.unlink()
    with pytest.raises(t.UserError, match=rf"{path} does not match {described.path}: `python data/verify.py"):
        described.settle()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: b"",
        lambda m: b"\xff\xfe",
        lambda m: b"[" * 100_000,
        lambda m: json.dumps(m).encode()[:-9],
        lambda m: json.dumps([m]).encode(),
        lambda m: json.dumps({**m, "tokenizer": None}).encode(),
        lambda m: json.dumps({**m, "tokenizer": "demo"}).encode(),
        lambda m: json.dumps({**m, "tokenizer": {**m["tokenizer"], "vocab_size": "many"}}).encode(),
        lambda m: json.dumps({**m, "tokenizer": {**m["tokenizer"], "path": 7}}).encode(),
        lambda m: json.dumps({**m, "tokenizer": {**m["tokenizer"], "vocab_size": 1e400}}).encode(),
        lambda m: json.dumps({**m, "files": ["a"]}).encode(),
        lambda m: json.dumps({**m, "files": {"a_train_0.bin": 7}}).encode(),
        lambda m: json.dumps({**m, "files": {"a_train_0.bin": {"tokens": None}}}).encode(),
    ],
)
def test_what_is_no_manifest_is_refused(spoil: Callable[[dict], bytes], described: SimpleNamespace) -> None:
    described.path.write_bytes(spoil(described.manifest))
    with pytest.raises(t.UserError, match=rf"{described.path} is not a manifest of token shards .*: rebuild or remove"):
        described.settle()


@pytest.mark.parametrize("vocab_size", [1, 65_537, -1])
def test_a_vocabulary_that_cannot_be_is_refused_in_a_manifest_too(vocab_size: int, described: SimpleNamespace) -> None:
    described.manifest["tokenizer"]["vocab_size"] = vocab_size
    described.path.write_text(json.dumps(described.manifest))
    with pytest.raises(t.UserError, match=f"VOCAB_SIZE={vocab_size} is not allowed"):
        described.settle()


# ---- batches ---------------------------------------------------------------------------------------------------------


def make_shards(lengths: list[int], tokens: np.ndarray | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns shards and the whole ring: every token is its own position there, so that it says where it was read."""
    ring = np.arange(sum(lengths)) if tokens is None else tokens
    return [part.astype(np.uint16) for part in np.split(ring, np.cumsum(lengths)[:-1])], ring


def make_loader(
    h: t.Hyperparameters, shards: list[np.ndarray], rank: int = 0, world_size: int = 1, step: int = 0
) -> t.TokenLoader:
    return t.TokenLoader(h, make_runtime(h, rank, world_size), shards, step)


def make_runtime(h: t.Hyperparameters, rank: int, world_size: int) -> SimpleNamespace:
    """Returns what a loader needs to know of the machine, whose passes have MICRO_BATCH_TOKENS or all of a step."""
    tokens = h.train_batch_tokens if h.micro_batch_tokens == "auto" else h.micro_batch_tokens
    to_device: Callable = lambda array: torch.from_numpy(array).long()  # noqa: E731
    max_rows = {"training": max(1, tokens // h.train_seq_len)}
    return SimpleNamespace(rank=rank, world_size=world_size, to_device=to_device, max_rows=max_rows)


def read_step(loaders: list[t.TokenLoader]) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets (sequences, T) of a step, those of all ranks in their order."""
    parts = [pair for loader in loaders for pair in loader.next_batch()]
    return tuple(torch.cat([pair[i] for pair in parts]).numpy() for i in (0, 1))


LENGTHS = {
    "one shard": [1000],
    "shards of many sizes": [37, 50, 113, 1, 1, 402],
    "a batch is a shard": [256, 256],
    "a batch is twice around": [20, 41, 50],
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_batches_are_slices_of_the_ring_for_any_number_of_processes(
    lengths: list[int], world_size: int, tiny: Callable
) -> None:
    h = tiny(vocab_size=2048, micro_batch_tokens=64, loader="sequential")  # a step is 8 sequences of 32
    shards, ring = make_shards(lengths)
    num_steps, num_tokens = 12, h.train_batch_tokens
    endless = np.tile(ring, 1 + (num_steps * num_tokens + 1) // len(ring) + 1)
    loaders = [make_loader(h, shards, rank, world_size) for rank in range(world_size)]
    for step in range(num_steps):
        parts = [loader.next_batch() for loader in loaders]
        for batch in parts:  # at most 64 tokens a pass, all of one shape
            assert len(batch) == 4 // world_size and {x.shape for pair in batch for x in pair} == {(2, 32)}
            assert {x.dtype for pair in batch for x in pair} == {torch.int64}
        x, y = (torch.cat([pair[i] for batch in parts for pair in batch]).flatten().numpy() for i in (0, 1))
        begin = step * num_tokens
        np.testing.assert_array_equal(x, endless[begin : begin + num_tokens])
        np.testing.assert_array_equal(y, endless[begin + 1 : begin + num_tokens + 1])
        assert {loader.step for loader in loaders} == {step + 1}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5000], [1300, 37, 1, 900, 2600, 162], [200, 200]], ids=["one", "many", "few"])
def test_shuffled_windows_cover_each_epoch_once_in_another_order_from_another_phase(
    lengths: list[int], world_size: int, tiny: Callable
) -> None:
    h = tiny(vocab_size=8192)  # a step is 8 sequences of 32
    shards, ring = make_shards(lengths)
    loaders = [make_loader(h, shards, rank, world_size) for rank in range(world_size)]
    num_windows, total = len(ring) // 32, len(ring)
    steps = [read_step(loaders) for _ in range(-(-3 * num_windows // 8))]
    x, y = (np.concatenate([step[i] for step in steps]) for i in (0, 1))
    begins = x[:, 0]  # a token is its own position in the ring
    np.testing.assert_array_equal(x, (begins[:, None] + np.arange(32)) % total)  # each is a stretch of the text,
    np.testing.assert_array_equal(y, (x + 1) % total)  # and its targets are the tokens that follow there
    epochs = [begins[i * num_windows : (i + 1) * num_windows] for i in range(3)]
    for epoch in epochs:
        phase = epoch.min() if total % 32 else epoch.min() % 32
        covered = np.sort(np.concatenate([(begin + np.arange(32)) % total for begin in epoch]))
        assert len(np.unique(covered)) == len(covered) == num_windows * 32, "no token twice, all but total % 32 of them"
        assert (
            len(np.unique((epoch - phase) % total % 32)) <= 2
        )  # windows stand side by side, across the ring's end too
        assert (np.diff(epoch) != 32).mean() > 0.7 or num_windows < 20, "neighbours in the text are none in the epoch"
    assert len({tuple(epoch) for epoch in epochs}) == 3 and len({int(epoch.min() % 32) for epoch in epochs}) > 1


def test_the_order_is_the_seeds_and_the_same_for_any_number_of_processes(tiny: Callable) -> None:
    shards, _ = make_shards([3000, 2000])
    first = [read_step([make_loader(tiny(vocab_size=8192), shards)])[0] for _ in range(2)]
    again = [read_step([make_loader(tiny(vocab_size=8192), shards, rank, 4) for rank in range(4)])[0] for _ in range(2)]
    other = read_step([make_loader(tiny(vocab_size=8192, seed=2), shards)])[0]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other)


@pytest.mark.parametrize("loader", ["shuffled", "sequential"])
def test_reading_that_begins_at_a_step_goes_on_as_if_it_had_never_stopped(loader: str, tiny: Callable) -> None:
    h, (shards, _) = tiny(vocab_size=8192, loader=loader), make_shards([1500, 800])  # an epoch is 71 windows, 9 steps
    through = make_loader(h, shards, 1, 2)
    batches = [read_step([through]) for _ in range(24)]
    for step in (1, 8, 9, 20):
        resumed = make_loader(h, shards, 1, 2, step)
        for expected in batches[step : step + 4]:
            np.testing.assert_array_equal(read_step([resumed]), expected)


def test_a_text_shorter_than_a_window_is_read_around(tiny: Callable) -> None:
    x, y = read_step([make_loader(tiny(vocab_size=8192), make_shards([20])[0])])
    np.testing.assert_array_equal(y, (x + 1) % 20)


def test_the_next_two_batches_are_read_while_this_one_is_used(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], t.TokenLoader._read

    def spy(self: t.TokenLoader, step: int) -> np.ndarray:
        reads.append((step, threading.current_thread().name.split("_")[0]))
        return read(self, step)

    monkeypatch.setattr(t.TokenLoader, "_read", spy)
    loader = make_loader(tiny(vocab_size=2048), make_shards([1000])[0])
    for step in range(3):
        loader.next_batch()
        for future in loader.futures:
            future.result(timeout=10)  # is being read, though nobody has asked for it yet
        assert reads == [(number, "loader") for number in range(step + 3)]  # two steps ahead: slow disks stutter


@pytest.mark.parametrize("loader", ["shuffled", "sequential"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_token_is_a_target_once_an_epoch(world_size: int, loader: str, tiny: Callable) -> None:
    h = tiny(vocab_size=2048, loader=loader)
    shards, ring = make_shards([300, 211, 1, 512])  # 1024 tokens: an epoch is 4 steps of 256
    loaders = [make_loader(h, shards, rank, world_size) for rank in range(world_size)]
    for _ in range(3):
        targets = [y.flatten() for _ in range(4) for loader in loaders for _, y in loader.next_batch()]
        assert sorted(torch.cat(targets).tolist()) == ring.tolist()


def test_micro_batches_are_a_partition_of_the_rows_of_a_rank(tiny: Callable) -> None:
    shards, _ = make_shards([700])
    whole = make_loader(tiny(vocab_size=2048, micro_batch_tokens=10**6), shards, 1, 2).next_batch()
    cut = make_loader(tiny(vocab_size=2048, micro_batch_tokens=32), shards, 1, 2).next_batch()
    assert len(whole) == 1 and len(cut) == 4
    for i in (0, 1):
        assert torch.equal(torch.cat([pair[i] for pair in cut]), whole[0][i])


def test_the_batch_plan_holds_to_its_bounds(tiny: Callable) -> None:
    draw = random.Random(0)
    for _ in range(200):
        world_size, rows, length = draw.choice([1, 2, 3, 8]), draw.randint(1, 60), draw.choice([2, 32, 100])
        h = tiny(
            train_seq_len=length, eval_seq_len=32, train_batch_tokens=world_size * rows * length,
            micro_batch_tokens=draw.randint(1, 2 * rows * length),
        )  # fmt: skip
        rows_of_a_pass, cuts = t.batch_plan(h, make_runtime(h, 0, world_size))
        assert rows_of_a_pass * cuts == rows
        fits = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n * length <= h.micro_batch_tokens]
        # The fewest equal passes that fit; where not even one sequence does, a sequence a pass.
        assert cuts == (fits[0] if fits else rows)


@pytest.mark.parametrize(("world_size", "plan"), [(8, (48, 1)), (4, (48, 2)), (1, (48, 8))])
def test_passes_of_98_304_tokens_are_one_on_each_of_8_gpus_and_eight_on_one(
    world_size: int, plan: tuple[int, int]
) -> None:
    h = t.Hyperparameters(micro_batch_tokens=98_304)
    assert t.batch_plan(h, make_runtime(h, 0, world_size)) == plan


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tiny: Callable) -> None:
    message = r"TRAIN_BATCH_TOKENS=256 is not a multiple of 3 x 32 tokens"
    with pytest.raises(t.UserError, match=message):
        t.batch_plan(tiny(), make_runtime(tiny(), 0, 3))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def split_documents(tokens: np.ndarray) -> list[list[int]]:
    """Returns the documents, each with its BOS."""
    starts = np.flatnonzero(tokens == BOS)
    assert starts[0] == 0
    return [part.tolist() for part in np.split(tokens, starts[1:])]


def count_target_bytes(tokens: list[int], luts: tuple[torch.Tensor, ...]) -> int:
    """Returns the bytes of all tokens but the first, as scoring counts them."""
    base_bytes, has_leading_space, is_boundary_token = luts
    previous, target = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    return int((base_bytes[target] + (has_leading_space[target] & ~is_boundary_token[previous])).sum())


def assert_bytes_equal_the_decode(sp: Any, documents: list[list[int]]) -> int:
    """Asserts it document by document, and across their boundaries; returns the bytes of all."""
    luts = t.build_sentencepiece_luts(sp, sp.vocab_size())
    expected = [len(text.encode()) for text in sp.decode(documents)]
    for document, num_bytes in zip(documents, expected):
        assert count_target_bytes(document, luts) == num_bytes, sp.decode(document)[:80]
    assert count_target_bytes([token for document in documents for token in document], luts) == sum(expected)
    return sum(expected)


def test_bytes_of_the_demonstration_corpus_are_those_of_its_decoded_text(corpus: SimpleNamespace) -> None:
    sp = t.load_tokenizer(str(corpus.tokenizer_path), 1024)
    manifest = json.loads((corpus.data_path / "manifest.json").read_text())
    for split in ("val", "train"):
        tokens = [t.load_data_shard(path)[:] for path in sorted(corpus.data_path.glob(f"*_{split}_*.bin"))]
        num_bytes = assert_bytes_equal_the_decode(sp, split_documents(np.concatenate(tokens)))
        assert num_bytes == manifest["splits"][split]["bytes"]


@pytest.mark.skipif(not SHARED.exists(), reason="the challenge's data is not beside this checkout")
def test_bytes_of_the_challenges_validation_text_are_those_of_its_decoded_text(tiny: Callable) -> None:
    path = SHARED / "fineweb_1024_bpe.model"
    sp = t.load_tokenizer(str(path), 1024)
    (shard,) = (SHARED / "bench_web").glob("*_val_*.bin")
    tokens = t.load_data_shard(shard)[:]
    documents = split_documents(tokens)
    assert_bytes_equal_the_decode(sp, documents)
    assert any(sp.is_byte(int(token)) for token in np.unique(tokens))  # characters without a piece are among them
    h = tiny(vocab_size=1024, tokenizer_path=str(path), data_path=str(shard.parent), train_seq_len=256)
    val = t.load_validation_tokens(h)
    assert val.num_targets == (len(tokens) - 1) // 256 * 256
    scored = split_documents(tokens[: val.num_targets + 1])
    expected = sum(len(text.encode()) for text in sp.decode(scored))
    assert not sp.decode(scored[-1]).endswith("\ufffd")  # the cut is not inside a character, where decoding adds bytes
    assert val.num_bytes == expected
    # The 62 M tokens of the whole split have 2.435924 bytes a token; the 902 documents of this part scatter around it.
    assert abs(val.num_bytes / val.num_targets - 2.435924) < 0.05
    assert f"{expected / val.num_targets:.6f} bytes a target" in val.note


TEXTS = ["the cat sat on the mat", "of the people, by the people, for the people", "naïve café 日本語 and 12 more €"]


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "add_dummy_prefix": False, "split_digits": True},  # as the challenge's
        {"byte_fallback": True, "add_dummy_prefix": True},
        {
            "byte_fallback": True,
            "add_dummy_prefix": True,
            "treat_whitespace_as_suffix": False,
            "split_by_number": False,
        },
        {"byte_fallback": True, "add_dummy_prefix": False, "split_by_whitespace": False},  # pieces of several words
    ],
    ids=["challenge", "dummy prefix", "numbers whole", "several words a piece"],
)
def test_bytes_are_right_for_other_tokenizers_too_or_the_tokenizer_is_refused(
    options: dict[str, Any], tmp_path: Path, tiny: Callable
) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(train_tokenizer(TEXTS * 50, vocab_size=360, **options))
    sp = sentencepiece.SentencePieceProcessor(str(path))
    if "split_by_whitespace" in options:  # the fixture has what it is for
        assert any("▁" in sp.id_to_piece(i)[1:] for i in range(sp.vocab_size()))
    try:
        sp = t.load_tokenizer(str(path), sp.vocab_size())
    except t.UserError:
        return
    documents = sp.encode([*TEXTS, "unseen: ☃ 🙂\u00a0x", "a  b"], add_bos=True)
    num_bytes = assert_bytes_equal_the_decode(sp, documents)
    tokens = [token for document in documents for token in document]
    (tmp_path / "a_val_0.bin").write_bytes(shard_bytes(tokens))
    paths = {"data_path": str(tmp_path), "tokenizer_path": str(path)}
    val = t.load_validation_tokens(tiny(vocab_size=sp.vocab_size(), eval_seq_len=1, eval_stride=1, **paths))
    assert (val.num_targets, val.num_bytes) == (len(tokens) - 1, num_bytes)


def test_the_tables_follow_from_the_kinds_of_the_pieces() -> None:
    """Expected values by hand: control, unknown and unused ids are boundaries of no bytes, byte pieces
    have one, others the UTF-8 bytes of what follows a leading "▁"."""
    table = [
        ("<pad>", "control", 0, False, True),
        ("▁ctl", "control", 0, False, True),
        ("<unk>", "unknown", 0, False, True),
        ("▁old", "unused", 0, False, True),
        ("<0xE2>", "byte", 1, False, False),
        ("▁", "normal", 0, True, False),
        ("▁the", "normal", 3, True, False),
        ("the", "normal", 3, False, False),
        ("é", "normal", 2, False, False),
        ("▁日本", "normal", 6, True, False),
        ("<0x41>", "normal", 6, False, False),  # spelled like a byte, but none
    ]
    kinds = [kind for _, kind, *_ in table]
    sp = SimpleNamespace(
        id_to_piece=lambda i: table[i][0],
        **{f"is_{kind}": lambda i, kind=kind: kinds[i] == kind for kind in ("control", "unknown", "unused", "byte")},
    )
    base_bytes, has_leading_space, is_boundary_token = t.build_sentencepiece_luts(sp, len(table))
    assert base_bytes.tolist() == [row[2] for row in table]
    assert has_leading_space.tolist() == [row[3] for row in table]
    assert is_boundary_token.tolist() == [row[4] for row in table]
    assert has_leading_space.dtype == is_boundary_token.dtype == torch.bool


# ---- the validation text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "max_val_tokens", "num_targets"),
    [
        (32, 0, 992),  # 1001 tokens, 1000 targets, cut to whole windows
        (500, 0, 1000),
        (64, 100, 64),
        (32, 96, 96),
        (32, 95, 64),
        (32, 10**9, 992),
        (32, 20, 20),  # less than a window is scored as it is
        (2048, 0, 1000),
        (2048, 300, 300),
    ],
)
def test_the_validation_text_is_cut_to_whole_windows_and_to_the_tokens_asked_for(
    window: int, max_val_tokens: int, num_targets: int, corpus: SimpleNamespace, tmp_path: Path, tiny: Callable
) -> None:
    sp = t.load_tokenizer(str(corpus.tokenizer_path), 1024)
    text = "The quick brown fox jumps over the lazy dog, and what it sees there is not to be believed. "
    tokens = [token for _ in range(100) for token in sp.encode(text * 2, add_bos=True)][:1001]
    for name, part in (("z_val_1", tokens[333:]), ("a_val_2", tokens[:333])):
        (tmp_path / f"{name}.bin").write_bytes(shard_bytes(part))
    paths = {"data_path": str(tmp_path), "tokenizer_path": str(corpus.tokenizer_path)}
    h = tiny(vocab_size=1024, eval_seq_len=window, max_val_tokens=max_val_tokens, **paths)
    val = t.load_validation_tokens(h)
    assert val.num_targets == num_targets
    assert val.tokens.tolist() == tokens[: num_targets + 1] and val.tokens.dtype == torch.int32
    scored = split_documents(np.array(tokens[: num_targets + 1]))
    assert val.num_bytes == sum(len(part.encode()) for part in sp.decode(scored))
    assert val.note.startswith(f"2 shards, {num_targets:,} targets ({1000 - num_targets:,} left off)")
