"""Hostile files: what a reader makes of any file is a valid value, or one line that names the file.

Hypothesis makes the inputs of a pass from valid ones, and a process of its own reads them: where it crashes, the input
still lies in its folder. Nothing of it may be executed, imported or written elsewhere, as Python's audit events show.

    make fuzz                           # 100,000 inputs of a random seed, which is printed
    make fuzz INPUTS=20000 SEED=5       # as many, of this seed
"""

from __future__ import annotations

import base64
import contextlib
import copy
import faulthandler
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch
import zstandard
from conftest import prepare
from hypothesis import strategies as st
from test_8_artifact import SMALL, payload_of, seal

import train_gpt as t

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux has it")
Files = dict[str, Any]  # path in the input's folder -> its bytes, or what PLACE puts there
NUM_INPUTS = 400  # of a reader in `make test`, besides the crafted ones
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))  # of `make fuzz`
NUM_FUZZ_INPUTS = int(os.environ.get("FUZZ_INPUTS") or 100_000)  # for all readers
LONGEST_SECONDS = 20.0  # of a core for an input; the slowest takes about 3
HANGING_SECONDS = 180.0  # on the clock, of a busy machine
# What reading may add to the memory. An artifact may unpack to 2^28 bytes, all of them codes, of which two arrays of
# fp32 are made: 2.0 GiB are measured. JSON of 2^23 bytes may be a million dictionaries: 0.2 GiB, 0.6 for a journal.
LARGEST_ARTIFACT = 5 * 2**29
LARGEST_OTHER = 2**30
ADDRESS_SPACE = 2**32  # beyond it, allocations fail


# ------------------------------------------------------------------------------------------------------ what is hostile
class Plant:
    """Executes something if it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


CALL = "__import__('os').system('touch executed')"
SAVED = io.BytesIO()
torch.save(Plant(), SAVED)
FOREIGN = [b"", bytes(2000), pickle.dumps(Plant()), SAVED.getvalue(), CALL.encode(), b"#!/bin/sh\ntouch executed\n"]
PLACE = {
    "link": lambda path, target: path.symlink_to(target),
    "fifo": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "sparse": lambda path, size: (path.touch(), os.truncate(path, size)),
}
NO_FILES = [("fifo", 0), ("folder", 0), ("link", "absent"), ("link", "/dev/zero"), ("link", "."), ("sparse", 2**40)]
PATHS = [*"|..|../../x|/|/dev/zero|/dev/full|a\0b|\r|a\nb|\x1b[2J|\ud800|\udc80".split("|"), "x" * 300]
TEXTS = [*PATHS, "é", "1" * 5000, "NaN", "1e400", "-1", "1_0", CALL]
WHOLE = [0, 1, -1, 2, 3, 16, 17, 255, 2**15, 2**20, 2**24, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 10**400]
NUMBERS = [*WHOLE, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf]
LENGTHS = st.sampled_from([0, 1, 3, 255, 2**16, 2**20, 2**20 + 1, 2**28, 2**28 + 1, 2**31 - 1, 2**32 - 1])
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(TEXTS) | st.text(max_size=4)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=5)


def one_in(number: int) -> st.SearchStrategy[bool]:
    """True once in so many draws."""
    return st.integers(1, number).map(lambda drawn: drawn == number)


@st.composite
def damaged(draw: Callable, blob: bytes) -> bytes:
    """Bytes that are cut, overwritten, inserted or repeated in one to three places, half of them early."""
    data = bytearray(blob)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 64)))
        length = draw(LENGTHS).to_bytes(4, "little")
        new = draw(st.binary(max_size=8) | st.sampled_from((length, bytes(data[at:][:99]))))
        removed = draw(st.sampled_from((len(new), len(new), 0, 100, len(data))))
        data[at : at + removed] = new
    return bytes(data)


def parts(tree: Any) -> list:
    """Returns a tree and all that is in it."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tree, *(part for child in inner for part in parts(child))]


@st.composite
def mutated(draw: Callable, tree: dict) -> Any:
    """A tree with one to three random parts replaced, removed or added, by anything or by a copy of another part."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        everything = parts(tree)
        place = draw(st.sampled_from([part for part in everything if part and isinstance(part, (dict, list))] or [[0]]))
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        value = copy.deepcopy(draw(VALUES | st.sampled_from(everything)))
        act = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if act == "replace":
            place[key] = value
        elif act == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(KEYS)] = value
        else:
            place.insert(key, value)
    return tree


def as_json(tree: Any) -> bytes:
    """Returns JSON."""
    return json.dumps(tree).encode()


def json_texts(tree: dict) -> st.SearchStrategy[bytes]:
    """JSON of mutated trees, or damaged JSON."""
    return mutated(tree).map(as_json) | mutated(tree).map(as_json) | damaged(as_json(tree))


def tricks(tree: dict, size: int) -> list[bytes]:
    """Returns JSON of at most `size` bytes that no tree stands for: too deep, a million dictionaries, long numbers, a
    key twice, other encodings."""
    text, first = json.dumps(tree), json.dumps(next(iter(tree)))
    deep = "[" * 100_000 + "]" * 100_000
    many = "[" + '{"":0},' * (size // 7 - 1000) + "0]"
    made = [f'{text[:-1]}, "x": {end}}}' for end in (deep, many, "9" * 20_000, "1e999")]
    made += [f"{text[:-1]}, {first}: 1}}", deep, "[" * size, "null"]
    return (
        [one.encode() for one in made] + [text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig")] + [b'"\xff"']
    )


def contents(*strategies: st.SearchStrategy[bytes]) -> st.SearchStrategy:
    """One of these, or sometimes something that is no such file at all."""
    return one_in(30).flatmap(lambda rare: st.sampled_from(FOREIGN + NO_FILES) if rare else st.one_of(*strategies))


# --------------------------------------------------------------------------------------------------------- the readers
class Reader(NamedTuple):
    """What reads, and what it is given."""

    valid: Files
    path: str  # of the file that is attacked
    attacks: st.SearchStrategy  # on its content
    crafted: list[Any]  # its content, or that of other files
    read: Callable[[Path], None]  # what is in a folder; asserts that what comes out is valid
    names: tuple[str, ...]  # one of these is in every message
    largest: int = LARGEST_OTHER  # bytes of memory that an input may take
    opens: bool = True  # the file itself, in the place of which there may be a pipe


def compress(payload: bytes, codec: int) -> bytes:
    """Returns a payload as the format stores it, compressed quickly."""
    if codec == t.CODECS["zstd"]:
        return zstandard.ZstdCompressor(level=1).compress(payload)
    quick = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    return lzma.compress(payload, format=lzma.FORMAT_RAW, filters=quick) if codec == t.CODECS["lzma"] else payload


def split(payload: bytes) -> tuple[dict, bytes]:
    """Returns header and data."""
    end = 4 + struct.unpack_from("<I", payload)[0]
    return json.loads(payload[4:end]), payload[end:]


def described_bytes(text: bytes) -> int:
    """Returns the bytes of data that a header describes, up to a million, or 0 where it makes no sense."""
    total = 0
    with contextlib.suppress(Exception):
        for _, bits, shape in json.loads(text)["tensors"]:
            total += math.prod(shape) + 2 * shape[0] if bits < 16 else math.prod(shape) * (4 if bits == 32 else 2)
        return max(0, min(int(total), 10**6))
    return 0


@st.composite
def sealed(draw: Callable, payload: bytes) -> bytes:
    """A file with a right checksum, of which something else is wrong."""
    header, data = split(payload)
    text = draw(json_texts(header) | st.just(json.dumps(header).encode()))
    if draw(st.booleans()):
        needed = described_bytes(text)
        data = (data * (needed // len(data) + 1))[:needed]
    if draw(one_in(8)):
        data = draw(damaged(data))
    payload = payload_of(text, data)
    if draw(one_in(8)):
        payload = draw(damaged(payload))
    codec = draw(st.sampled_from((0, 0, 1, 2, 4)))
    body = compress(payload, codec)
    if draw(one_in(8)):
        body = draw(damaged(body))
    length = draw(LENGTHS | st.just(2**64 - 1)) if draw(one_in(8)) else len(payload)
    version = draw(st.integers(0, 2**16 - 1)) if draw(one_in(20)) else t.VERSION
    return seal(payload, version, codec, length, body)


@st.composite
def coded_rows(draw: Callable, blob: bytes) -> bytes:
    """A file of the codec rans with a right checksum, of which header, tables, states or words are wrong."""
    body = blob[t.PREFIX.size :]
    end = 4 + struct.unpack_from("<I", body)[0]
    payload, streams = t._decompress(body[4:end], t.CODECS["rans"], 2**20), body[end:]
    header, data = split(payload)
    wrong = draw(st.sampled_from(("header", "data", "streams", "packed")))
    if wrong == "header":
        payload = payload_of(draw(json_texts(header)), data)
    if wrong == "data":
        payload = payload_of(json.dumps(header).encode(), draw(damaged(data)))
    if wrong == "streams":
        streams = draw(damaged(streams) | st.binary(max_size=len(streams)))
    packed = t.compress_lzma(payload)
    if wrong == "packed":
        packed = draw(damaged(packed))
    size = len(packed) if draw(st.booleans()) else draw(st.integers(0, 2**32 - 1))
    length = draw(LENGTHS) if draw(one_in(8)) else len(payload)
    return seal(b"", codec=3, length=length, body=struct.pack("<I", size) + packed + streams)


def bombs(header: dict, data: bytes) -> list[bytes]:
    """Returns small files that declare much, or unpack to much."""
    many = as_json({**header, "tensors": [["w", 8, [1, 2**28 - 4000]]]})
    fat = payload_of(many.ljust(3994), bytes(2**28 - 3998))  # 2^28 bytes, all described
    classes = np.zeros((1, t.NUM_SYMBOLS), "<u2")
    classes[0, 128] = 2**t.RANS_BITS  # a table of one symbol: codes without a word
    text = as_json({**header, "classes": 1, "tensors": [["w", 8, [1, 2**28]]]})
    nothing = payload_of(text, b"\0" + classes.tobytes())
    packed = t.compress_lzma(nothing + b"\0<")
    states = np.full(t.count_lanes(2**28), t.RANS_LOW, "<u4").tobytes()
    frame, chunks = compress(bytes(2**20), 1), compress(bytes(2**26), 2)  # each can be repeated, to 3 GiB
    widest = {"train_seq_len": 786_432, "model_dim": 128, "num_heads": 1, "num_kv_heads": 1, "rope_dims": 128}
    made = [seal(fat, codec=1, body=compress(fat, 1))]
    made.append(seal(nothing + bytes(2), codec=3, body=struct.pack("<I", len(packed)) + packed + states))
    made += [seal(payload_of(text, data)) for text in tricks(header, t.LARGEST_HEADER)]
    # The largest tables of rotary positions, and as many tensors as a header can have.
    made.append(seal(payload_of({"model": header["model"] | widest, "tensors": []}, b"")))
    made.append(
        seal(payload_of({"model": header["model"], "tensors": [[f"t{i}", 32, [0]] for i in range(45_000)]}, b""))
    )
    made.append(seal(b"", codec=1, length=2**28, body=frame * 3000))
    made.append(seal(b"", codec=2, length=2**26, body=chunks[:-1] * 48 + b"\0"))
    for log in (27, 28, 31, 41):  # an empty block, and a window of 2^(10 + exponent) bytes
        body = b"\x28\xb5\x2f\xfd\0%c\1\0\0" % ((log - 10) << 3)
        made.append(seal(b"", codec=1, length=2**28, body=body))
    return made


def artifact(make_run: Callable) -> Reader:
    """load_artifact: the format, the settings in the header, and the tensors."""
    run = make_run(**SMALL)
    weights = {name: p.detach() for name, p in run.model.named_parameters()}
    blob = t.encode(run.h, t.quantize_weights(prepare(run.h, weights), 0.01), 0.01, "none")
    payload = blob[t.PREFIX.size :]
    header, coded = split(payload)
    *others, last = ([name, 32, list(w.shape)] for name, w in weights.items())  # exact, in the order of their data
    data = b"".join(w.numpy().tobytes() for w in weights.values())

    def exact(tensors: list, data: bytes) -> bytes:
        return seal(payload_of({**header, "tensors": tensors}, data))

    def read(folder: Path) -> None:
        h, model = t.load_artifact(folder / "m.bin")
        header, _ = t.read_stored((folder / "m.bin").read_bytes(), "m.bin")
        assert sorted((name, list(p.shape)) for name, p in model.named_parameters()) == sorted(
            (name, shape) for name, _, shape in header["tensors"]
        )
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
        assert all(getattr(h, name) == value for name, value in dict(header["model"]).items())
        assert model(torch.zeros(1, 2).long(), torch.zeros(1, 2).long()).shape == ()

    rows = t.encode(run.h, t.quantize_weights(prepare(run.h, weights), 0.01), 0.01, "rans")
    crafted = bombs(header, coded)
    crafted.append(exact([*others, last], b"\xff" * len(data)))  # not finite
    crafted.append(exact([*others, last, last], data + data[-4 * math.prod(last[2]) :]))
    crafted.append(exact([*others, [last[0], 32, [-1, last[2][1]]]], data))
    attacks = contents(damaged(blob), *[sealed(payload)] * 4, *[coded_rows(rows)] * 2)
    return Reader({"m.bin": blob}, "m.bin", attacks, crafted, read, ("{folder}/m.bin",), LARGEST_ARTIFACT)


def checkpoint(make_run: Callable) -> Reader:
    """Checkpoints.restore: the newest state of a training. One that cannot be read is left out with a warning."""
    run = make_run(**SMALL)
    run.rt.run_dir = Path.cwd()
    lines: list[str] = []
    run.rt._print = lambda line, *_: lines.append(line)
    checkpoints = t.Checkpoints(t.Trainer(run))
    checkpoints.save()
    checkpoints.wait()
    blob = Path("checkpoint-0.bin").read_bytes()
    header, data = split(blob[t.PREFIX.size :])

    def read(folder: Path) -> None:
        lines.clear()
        run.rt.run_dir = folder
        checkpoints.restore()
        if lines[0].startswith("WARNING"):
            raise t.UserError(lines[0])
        numbers, tensors = checkpoints.trainer.state()
        del numbers["random"]
        assert all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers.values())
        assert [tensor.shape for tensor in tensors] == checkpoints.shapes
        assert all(tensor.isfinite().all() for tensor in tensors), "a state that is not finite"
        assert 0 <= torch.rand(1000).min() and torch.rand(1000).max() < 1, "the generator works"

    training = mutated(header["training"]).map(lambda new: seal(payload_of({**header, "training": new}, data)))
    attacks = contents(damaged(blob), sealed(blob[t.PREFIX.size :]), training)
    crafted, path = [seal(payload_of(header, b"\xff" * len(data)))], "checkpoint-7.bin"
    return Reader({path: blob}, path, attacks, crafted, read, ("{folder}",), LARGEST_ARTIFACT)


def journal(make_run: Callable) -> Reader:
    """Journal, and what `main` does with it: what RESUME finds, compares with this run, reloads and goes on with."""
    run = make_run(**SMALL, run_id="a")
    rt, lines = run.rt, []
    rt._print = lambda line, *_: lines.append(line)
    fresh = {"dtype": rt.dtype, "max_rows": rt.max_rows, "keeps_rows": False}

    def go_on(h: t.Hyperparameters) -> t.Journal:
        vars(rt).update(copy.deepcopy(fresh), files=[])
        with contextlib.ExitStack() as stack:
            found = t.Journal(h, rt)
            stack.callback(lambda: [file.close() for file in (*rt.files, found.lock) if file])
            found.trained_model()
            found.begin(run._replace(h=h))
            if h.first_stage == "score":
                t.reload(run, rt.run_dir / found.stats()["artifact"])
        return found

    begun = go_on(copy.copy(run.h))
    begun.keep_plan()
    begun.complete("train", {"checkpoint": t.write_checkpoint(run)})
    shutil.copy(rt.run_dir / "checkpoint.bin", rt.run_dir / "final_model.bin")
    begun.complete("export", {"artifact": "final_model.bin"})
    valid = {str(path): path.read_bytes() for path in rt.run_dir.iterdir()} | {"logs/a/fifo": ("fifo", 0)}
    tree = json.loads(valid["logs/a/journal.json"])
    at_first = {name: value for name, value in tree.items() if name not in ("plan", "stages")}

    def read(folder: Path) -> None:
        lines.clear()
        h = copy.copy(run.h)
        h.resume = "1"
        found = go_on(h)
        assert all(line.isprintable() for line in lines), lines
        assert found.segments()[-1]["seconds"] >= 0 and all(isinstance(segment, dict) for segment in found.segments())
        assert h.ttt_epochs >= 1
        assert json.loads((folder / "logs/a/journal.json").read_bytes())["launch"] == t.launch_name()

    dates = ("9999-12-31T23:59:59", "0001-01-01", "2024-01-01\r10:00:00", 3)
    changes = [{"segments": [{"begun": date}]} for date in dates]
    for path in [*PATHS, "fifo"]:
        changes += [{"stages": {"export": {"artifact": path}}}, {"stages": {"train": {"checkpoint": path}}}]
    crafted = [as_json(change | tree | change) for change in changes] + tricks(tree, t.LARGEST_JSON)
    crafted += [as_json({key: value for key, value in tree.items() if key != name}) for name in tree]
    attacks = contents(json_texts(tree), json_texts(at_first))
    names = ("logs/a", "is a folder", "is a pipe or a device", "cannot be read")  # a file elsewhere
    return Reader(valid, "logs/a/journal.json", attacks, crafted, read, names)


def shard(num_tokens: int, declared: int | None = None) -> bytes:
    """Returns a file of tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, num_tokens if declared is None else declared
    return header.tobytes() + (np.arange(num_tokens) % 96).astype("<u2").tobytes()


def shards(make_run: Callable) -> Reader:
    """load_shards, and all tokens of what it returns."""
    h = make_run().h
    valid = {"x_train_0.bin": shard(500), "x_train_1.bin": shard(500), "x_val_0.bin": shard(500)}

    def read(folder: Path) -> None:
        h.data_path = str(folder)
        for found in (*t.load_shards(h, "train"), *t.load_shards(h, "val")):
            tokens = found[:]
            assert len(tokens) == len(found) == (found.path.stat().st_size - 1024) // 2 > 0
            assert tokens.max() < h.vocab_size

    declared = st.integers(-(2**31), 2**31 - 1).map(lambda number: shard(90, number))
    crafted = [{name: b"?"} for name in ("\r_train_.bin", "\x1b[2J_val_\n.bin", "é_val_.bin")]
    crafted += [{name: ("link", name)} for name in ("x_val_1.bin", "a_train_.bin")]
    crafted += [shard(9, 2**31 - 1), shard(0), ("link", "x_val_0.bin")]
    return Reader(valid, "x_train_1.bin", contents(damaged(shard(500)), declared), crafted, read, ("{folder}",))


def manifest(make_run: Callable) -> Reader:
    """apply_manifest: the manifest, the shards that it lists, and the tokenizer that it names."""
    h = make_run().h
    h.chosen = set()
    tokenizer = {"path": "../x.model", "vocab_size": 320, "sha256": hashlib.sha256(b"a model").hexdigest()}
    tree = {"tokenizer": tokenizer, "files": {f"x_{s}_0.bin": {"tokens": 50, "sha256": ""} for s in ("train", "val")}}
    links = {"d/fifo": ("fifo", 0), "d/itself": ("link", "itself"), "d/large": ("sparse", 2**40)}
    valid = {"d/x_train_0.bin": shard(50), "d/x_val_0.bin": shard(50), "x.model": b"a model", **links}
    valid["d/manifest.json"] = json.dumps(tree).encode()

    def read(folder: Path) -> None:
        h.data_path = str(folder / "d")
        settings = t.apply_manifest(h)
        if not (folder / "d/manifest.json").exists():  # a link to nowhere is none
            assert settings is h
            return
        assert 2 <= settings.vocab_size <= 65_536
        assert Path(settings.tokenizer_path).read_bytes() == b"a model"

    changes = [{"path": path} for path in (*PATHS, "y" * 10**6, None, 3, "/proc/self/mem", "fifo", "itself", "large")]
    changes += [{"vocab_size": number} for number in (*NUMBERS, True, "320", "9" * 5000, CALL)]
    crafted = [as_json({"tokenizer": tokenizer | change, "files": tree["files"]}) for change in changes]
    for name in ("../x", "/x_val_.bin", "\r", "\x1b[2J_val_1.bin", "\ud800"):
        crafted.append(as_json({"files": {**tree["files"], name: {"tokens": 50}}, "tokenizer": tokenizer}))
    crafted += [{"d/x_val_1.bin": content} for content in NO_FILES] + tricks(tree, t.LARGEST_JSON)
    attacks = contents(json_texts(tree))
    return Reader(valid, "d/manifest.json", attacks, crafted, read, ("{folder}", "TOKENIZER_PATH="))


Piece = tuple[bytes, float, int]  # text, score, type


def varint(number: int) -> bytes:
    """Returns a number as protobuf writes it."""
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def model_of(pieces: list[Piece], settings: bytes) -> bytes:
    """Returns a SentencePiece model. Its settings follow its pieces."""
    messages = []
    for text, score, kind in pieces:
        messages.append(b"\n" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
    return b"".join(b"\n" + varint(len(message)) + message for message in messages) + settings


@st.composite
def models(draw: Callable, pieces: list[Piece], settings: bytes) -> bytes:
    """A model of which pieces are changed, dropped or repeated, and some bytes of the settings changed."""
    pieces, settings = list(pieces), bytearray(settings)
    texts = st.sampled_from([b"", b"\xff", "\u2581".encode(), b"<0x20>", b"w" * 40_000]) | st.binary(max_size=9)
    numbers = st.integers(0, 6) | st.integers(0, 2**64 - 1)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(pieces) - 1))
        new = draw(texts), draw(st.floats(width=32)), draw(numbers)
        pieces[at : at + 1] = draw(st.sampled_from(([new], [new], [new], [], [pieces[at]] * 2)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(settings) - 1) | st.integers(0, min(len(settings) - 1, 99)))
        settings[at] = draw(st.integers(0, 255))
    return model_of(pieces, bytes(settings))


def tokenizer(_: Callable) -> Reader:
    """load_tokenizer, which is C++, and the tables of the pieces' bytes."""
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20
    options = {"vocab_size": 320, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, "model_type": "bpe"}
    options |= {"byte_fallback": True, "add_dummy_prefix": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    trained = []
    for rule in ("identity", "nmt_nfkc"):
        writer, train = io.BytesIO(), sentencepiece.SentencePieceTrainer.train
        train(sentence_iterator=iter(text), model_writer=writer, normalization_rule_name=rule, **options)
        sp = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
        kinds = [6 if sp.is_byte(i) else 3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 1 for i in range(320)]
        pieces = [(sp.id_to_piece(i).encode(), sp.get_score(i), kind) for i, kind in enumerate(kinds)]
        short = len(model_of(pieces, b"")) - 2 * kinds.count(1)  # the most frequent type is not written
        trained.append((pieces, writer.getvalue()[short:]))
    pieces, settings = trained[0]

    def read(folder: Path) -> None:
        sp = t.load_tokenizer(str(folder / "x.model"), 320)
        base_bytes, has_space, is_boundary = t.build_sentencepiece_luts(sp, 320)
        assert base_bytes.shape == has_space.shape == is_boundary.shape == (320,)
        longest = max(len(sp.id_to_piece(i).encode()) for i in range(320))
        assert 0 <= base_bytes.min() and base_bytes.max() <= longest and not base_bytes[is_boundary].any()

    crafted = [settings, model_of(pieces, b"")]
    for piece in (b"", b"\xff\xfe", b"w" * 32_768, b"w" * 70_000, b"a\0b", b"\xed\xa0\x80", "\u2581".encode() * 50_000):
        crafted += [model_of([*pieces[:-1], (piece, 0.0, kind)], settings) for kind in range(8)]
    whole = [model_of(*parts) for parts in trained]
    attacks = contents(*map(damaged, whole), *(models(*parts) for parts in trained), models(pieces, settings))
    return Reader({"x.model": whole[1]}, "x.model", attacks, crafted, read, ("{folder}/x.model",))


def environment(make_run: Callable) -> Reader:
    """Hyperparameters, and the paths among them as `main` reads them. The file has NAME=value, ended by NULs."""
    rt = make_run().rt
    knobs = [name.upper() for name in t.Hyperparameters.knobs()]
    others = [*sorted(t.RETIRED), "MODEL_DIMS", "TRAIN_X\r", "TRAIN_\ud800", "model_dim", "ITERATION", "MUON_\n"]

    def written(*pairs: tuple[str, str]) -> bytes:
        lines = [f"{name.replace('=', '_') or 'X'}={value}".replace("\0", "") for name, value in pairs]
        return "\0".join(lines).encode("utf-8", "surrogatepass")

    def read(folder: Path) -> None:
        os.environb.clear()
        lines = (folder / "env").read_bytes().split(b"\0")
        os.environb.update(line.split(b"=", 1) for line in lines if b"=" in line[1:])
        h = t.Hyperparameters()
        assert all(t.Hyperparameters.knobs()[name].parse(name, value) == value for name, value in h.values().items())
        source = h.eval_only or h.export_only
        if source:
            t.load_artifact(t.find_path(source, "EVAL_ONLY" if h.eval_only else "EXPORT_ONLY"))
        if "data_path" in h.given:
            t.apply_manifest(h)
        if "tokenizer_path" in h.given:
            t.load_tokenizer(h.tokenizer_path, h.vocab_size)
        h.fallback_dir = ""  # a file would be made there, as the user wishes
        rt.on_rank0(lambda: str(t.find_run(h)).encode(errors="surrogateescape"))

    number = st.from_regex(t.NUMBER, fullmatch=True) | st.sampled_from(WHOLE).map(str)
    lists = st.lists(number | st.sampled_from(["mlp:1", "a:b:c", ":", "mlp.proj:1e999"]), max_size=4).map(",".join)
    values = st.sampled_from(TEXTS) | number | lists | st.text(max_size=10)
    names = st.sampled_from(knobs) | st.sampled_from(knobs + others) | st.text(max_size=20)
    attacks = st.lists(st.tuples(names, values), min_size=1, max_size=3).map(lambda pairs: written(*pairs))
    paths = "DATA_PATH TOKENIZER_PATH EVAL_ONLY EXPORT_ONLY RESUME RUN_ID VE_LAYERS TTT_LR_GROUPS".split()
    tried = [*((name, "\r") for name in knobs), *((name, "1") for name in others), ("SEED", "9" * 10**6)]
    crafted = [written(pair) for pair in tried]
    crafted += [written((name, text)) for name in paths for text in (*PATHS, "y" * 10**6)]
    said = (*knobs, *sorted(t.RETIRED), "is not a setting", "is a folder", "/dev/", "name too long")
    return Reader({"env": b""}, "env", attacks, crafted, read, said, opens=False)


def script(_: Callable) -> Reader:
    """unpack: the source in a packed script, which is parsed."""
    source = f"print('hello')\n{CALL}\n".encode() * 30

    def packed(compressed: bytes) -> bytes:
        return (t.PACKED % base64.b85encode(compressed).decode()).encode()

    def read(folder: Path) -> None:
        content = (folder / "x.py").read_bytes()
        found = t.unpack(content)
        if found is None:
            assert not (content.startswith(t.PACKED_HEAD.encode()) and content.endswith(t.PACKED_TAIL.encode()))
            return
        text = content[len(t.PACKED_HEAD) : -len(t.PACKED_TAIL)]
        assert found == lzma.decompress(base64.b85decode(text)), "what the script itself would run"

    plain = lzma.compress(source, check=lzma.CHECK_NONE)
    wide = bytearray(plain)
    wide[16] = 40  # the dictionary's size: 4 GiB
    wide[20:24] = struct.pack("<I", zlib.crc32(wide[12:20]))
    bomb, alone = lzma.compress(bytes(2**26), preset=0), lzma.compress(source, format=lzma.FORMAT_ALONE)
    crafted = [packed(text) for text in (wide, plain * 2, b"", plain[:-9], bomb, alone)]
    crafted.append((t.PACKED % '" + CALL + "').encode())
    whole = t.pack(source)
    bare = whole[len(t.PACKED_HEAD) :]
    inner = damaged(plain) | damaged(lzma.compress(source))
    attacks = damaged(whole) | damaged(bare).map(lambda end: t.PACKED_HEAD.encode() + end) | inner.map(packed)
    return Reader({"x.py": whole}, "x.py", attacks, crafted, read, ("packed script",), opens=False)


READERS = [artifact, checkpoint, journal, manifest, shards, tokenizer, environment, script]


# ---------------------------------------------------------------------------------------------------------- the attack
EXECUTION = set(
    "exec compile import marshal.load marshal.loads pickle.find_class code.__new__ ctypes.dlopen os.system os.exec "
    "os.fork os.forkpty os.posix_spawn os.spawn os.kill subprocess.Popen pty.spawn socket.connect socket.bind".split()
)
CHANGES = set("os.remove os.rename os.mkdir os.rmdir os.link os.symlink os.truncate os.chmod".split())


def memory(figure: str) -> int:
    """Returns a figure of this process's memory, in bytes."""
    return 1024 * int(re.search(rf"{figure}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Attack:
    """Gives a reader one input after the other, and keeps count."""

    def __init__(self, reader: Reader, folder: Path):
        self.reader = reader
        self.folder = folder  # of the input that is read
        self.is_reading = False
        self.events: list[str] = []  # while it is read
        self.tally = {"tried": 0, "refused": 0, "accepted": 0, "slowest": 0.0, "peak": 0}
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
            "".encode(encoding)  # Python imports the encodings of JSON when it meets them
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple) -> None:
        if not self.is_reading:
            return
        writes = event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        writes = writes and not isinstance(args[0], int)
        is_elsewhere = writes and not os.path.abspath(os.fsdecode(args[0])).startswith(str(self.folder))
        if event in EXECUTION or is_elsewhere:
            self.events.append(f"{event} {args!r:.200}")

    def place(self, content: Any) -> None:
        """Makes the input's folder: the valid files, with another content of one of them, or with other ones."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.chdir(self.folder)
        other = content if isinstance(content, dict) else {self.reader.path: content}
        for name, one in {**self.reader.valid, **other}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(one, bytes):
                path.write_bytes(one)
            else:
                PLACE[one[0]](path, one[1])

    def once(self, content: Any) -> None:
        """Lets the reader read an input. Raises what it should not have raised, or AssertionError."""
        self.place(content)
        self.events.clear()
        message = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)
        start = time.process_time()
        self.is_reading = True
        try:
            self.reader.read(self.folder)
        except t.UserError as error:
            message = str(error)
        finally:
            self.is_reading = False
            faulthandler.cancel_dump_traceback_later()
        tally = self.tally
        seconds = time.process_time() - start
        tally["slowest"] = max(tally["slowest"], seconds)
        tally["tried"] += 1
        tally["accepted" if message is None else "refused"] += 1
        taken = memory("VmHWM") - before
        tally["peak"] = max(tally["peak"], taken)
        assert seconds < LONGEST_SECONDS, f"it took {seconds:.1f} s"
        assert taken <= self.reader.largest, f"it took {taken:,} bytes of memory, more than {self.reader.largest:,}"
        assert not self.events, "something was executed, or written elsewhere"
        assert not Path("executed").exists()
        if message is not None:
            names = [name.format(folder=self.folder) for name in self.reader.names]
            assert any(name in message for name in names), f"the file is not named: {message:.300}"
            assert message.isprintable(), f"not one line of printable text: {message!r:.300}"
            assert "MemoryError" not in message, "it took all memory"

    def run(self, num_inputs: int, seed: int | None) -> list[str]:
        """Gives it the valid input, the crafted ones, and so many others. Returns what went wrong."""
        torch.set_flush_denormal(False)  # which a Runtime has set, and hypothesis cannot bear
        self.place({})
        self.reader.read(self.folder)  # at the first time, packages import parts of themselves
        faults = []

        def attempt(label: str, work: Callable[[], None]) -> None:
            try:
                work()
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                faults.append(f"{label}: {error!r:.500} in {frame.name}, line {frame.lineno}")

        self.once({})
        for content in FOREIGN + NO_FILES * self.reader.opens + self.reader.crafted:
            attempt(f"{content!r:.200}", lambda: self.once(content))  # noqa: B023 - called now
        settings = hypothesis.settings(
            max_examples=num_inputs,
            derandomize=seed is None,
            deadline=None,
            database=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
        )
        once = settings(hypothesis.given(self.reader.attacks)(lambda content: self.once(content)))
        attempt(f"found by hypothesis, and now in {self.folder}", once if seed is None else hypothesis.seed(seed)(once))
        return faults


def attack(reader: Callable, make_run: Callable, base: Path, num_inputs: int, seed: int | None) -> dict[str, Any]:
    """Returns the tally of a pass, made in a process of its own. Fails with what went wrong."""
    with torch.device("meta"):
        torch.empty(1)  # imports parts of torch, once for all passes
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open(send, "w") as pipe:
            try:
                os.chdir(base)
                hypothesis.configuration.set_hypothesis_home_dir(base / "hypothesis")  # nothing in the checkout
                one = Attack(reader(make_run), base / "input")
                resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))
                json.dump({"faults": one.run(num_inputs, seed), **one.tally}, pipe)
            except BaseException:
                json.dump({"faults": [f"{traceback.format_exc()[-3000:]}\nThe input is in {base / 'input'}."]}, pipe)
        os._exit(0)
    os.close(send)
    with open(receive) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not outcome:
        pytest.fail(f"the reader crashed or hung (status {status}): the input is in {base / 'input'}", pytrace=False)
    tally = json.loads(outcome)
    if tally["faults"]:
        pytest.fail("\n".join(tally["faults"]), pytrace=False)
    return tally


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_any_file_is_a_valid_value_or_one_line_that_names_it(
    reader: Callable, make_run: Callable, tmp_path: Path
) -> None:
    tally = attack(reader, make_run, tmp_path, NUM_INPUTS, seed=None)
    assert tally["accepted"] >= 5 and tally["refused"] > tally["tried"] / 5, "the inputs reach both outcomes"


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_so_is_any_of_a_hundred_thousand(
    reader: Callable, make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n{reader.__name__}, SEED={SEED}: ", end="", flush=True)
        tally = attack(reader, make_run, tmp_path, NUM_FUZZ_INPUTS // len(READERS), SEED)
        counts = "{tried:,} inputs, {refused:,} refused, {accepted:,} accepted, slowest {slowest:.2f} s".format(**tally)
        print(f"{counts}, peak {tally['peak'] / 2**20:,.0f} MiB", end=" ", flush=True)
    assert tally["tried"] == tally["refused"] + tally["accepted"] >= NUM_FUZZ_INPUTS // len(READERS)
