"""Proofs of data/demo.py: what the corpus holds, how it is split, tokenized and stored; what `check` says of a run."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

DEMO_PATH = Path(__file__).resolve().parent.parent / "data" / "demo.py"
DATASET, TOKENIZER = "datasets/demo_sp1024", "tokenizers/demo_1024_bpe.model"
TRAIN_SHARDS = [f"{DATASET}/demo_train_000000.bin", f"{DATASET}/demo_train_000001.bin"]
VALIDATION_SHARD = f"{DATASET}/demo_val_000000.bin"


def load_demo() -> ModuleType:
    """Returns data/demo.py as a fresh module; `data` is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("demo_under_test", DEMO_PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture(scope="session")
def built(once: Callable) -> Path:
    """Returns the output folder of one build that all tests read and none changes."""
    pytest.importorskip("sentencepiece", reason="only the demonstration's build needs sentencepiece")
    return once("corpus", demo.build)  # the same that other files train on


@pytest.fixture(scope="session")
def corpus() -> Any:
    """Returns the documents of both splits, collected again from the running interpreter."""
    return demo.split_documents(demo.collect_documents(Path(os.__file__).parent))


@pytest.fixture(scope="session")
def processor(built: Path) -> Any:
    """Returns the tokenizer as a user loads it: from the file."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(built / TOKENIZER))


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns header (256,) int32 and tokens (n,) uint16, by the format's own definition and not by demo.py."""
    content = path.read_bytes()
    return np.frombuffer(content[:1024], dtype="<i4"), np.frombuffer(content[1024:], dtype="<u2")


def read_documents(*paths: Path) -> list[list[int]]:
    """Returns the tokens of each document without its BOS."""
    documents: list[list[int]] = []
    for path in paths:
        tokens = read_shard(path)[1]
        starts = np.flatnonzero(tokens == 1)
        assert starts[0] == 0, f"{path.name} starts inside a document"
        documents += [part[1:].tolist() for part in np.split(tokens, starts[1:])]
    return documents


def normalize(text: str) -> str:
    """Returns what `nmt_nfkc` makes of `text`, by the standard library's NFKC and not SentencePiece's own tables.

    The nmt part drops control characters and the byte order mark (both occur in the library of CPython 3.13).
    """
    words = unicodedata.normalize("NFKC", text).split()
    kept = ("".join(c for c in word if c != "\ufeff" and unicodedata.category(c) != "Cc") for word in words)
    return " ".join(word for word in kept if word)


def hash_files(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below `folder` by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- documents and split -----------------------------------------------------------------------------------------


def test_modules_are_read_in_source_order_and_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    for folder in ("package", "package/test", "site-packages", "idlelib/idle_test"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text(f'"""In {folder}."""')
    (tmp_path / "a.py").write_text(
        f'"""First\n  line.\n\n\tSecond."""\nopen({str(trap)!r}, "w")\n'
        'try:\n    pass\nexcept OSError:\n    def f():\n        """Third."""\n'
        '        class C:\n            """Fourth."""\n'
        'async def g():\n    """Fifth."""\n"""Not a docstring."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "undecodable.py").write_bytes(b'"""\xff"""')
    (tmp_path / "surrogate.py").write_text('"""\\ud800"""')
    documents = sorted(demo.read_modules(tmp_path))
    assert documents == ["First line.\n\nSecond.\n\nThird.\n\nFourth.\n\nFifth.", "In package."]
    assert not trap.exists()


def test_a_python_without_library_sources_is_an_error_and_not_a_small_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries its library's sources"):
        demo.collect_documents(tmp_path)


def test_the_split_depends_on_the_texts_only_and_drops_copies_from_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MIN_VALIDATION_BYTES", 4000)
    monkeypatch.setattr(demo, "VALIDATION_FRACTION", 0.0)
    shared = "This paragraph is long enough to be a copy, and it stands in every document alike."
    short = "See also."
    documents = [f"{shared}\n\n{short}\n\n{'word ' * 60}{i}" for i in range(60)]
    huge = [f"{'long ' * 5000}{i}" for i in range(60)]
    documents += huge
    corpus = demo.split_documents(documents)
    assert corpus == demo.split_documents(reversed(documents))
    assert 4000 <= demo.count_bytes(corpus.validation) < 4000 + len(documents[59])
    assert len(corpus.train) + len(corpus.validation) == 120
    assert all(shared in text for text in corpus.validation)
    assert not any(shared in text for text in corpus.train)
    assert sum(short in text for text in corpus.train) == corpus.num_dropped_paragraphs == 60 - len(corpus.validation)
    assert set(huge) <= set(corpus.train), "one huge document must not become most of the validation set"


def test_no_document_and_no_long_paragraph_is_in_both_splits(corpus: Any) -> None:
    assert len(set(corpus.train)) == len(corpus.train) and len(set(corpus.validation)) == len(corpus.validation)
    assert not set(corpus.train) & set(corpus.validation)
    train_paragraphs = {paragraph for text in corpus.train for paragraph in text.split("\n\n")}
    shared = {p for text in corpus.validation for p in text.split("\n\n") if p in train_paragraphs}
    assert max(map(len, shared), default=0) < 60
    assert demo.count_bytes(corpus.validation) >= 165_000
    assert 0.05 < demo.count_bytes(corpus.validation) / demo.count_bytes(corpus.train + corpus.validation) < 0.10


def test_stored_splits_share_no_document(built: Path) -> None:
    train = {tuple(document) for document in read_documents(*(built / name for name in TRAIN_SHARDS))}
    validation = {tuple(document) for document in read_documents(built / VALIDATION_SHARD)}
    assert len(validation) >= 30 and not train & validation


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def test_every_document_decodes_to_its_normalized_text(built: Path, corpus: Any, processor: Any) -> None:
    stored = {
        "train": read_documents(*(built / name for name in TRAIN_SHARDS)),
        "validation": read_documents(built / VALIDATION_SHARD),
    }
    for split, documents in stored.items():
        assert processor.decode(documents) == [normalize(text) for text in getattr(corpus, split)]


def test_special_ids_and_bytes_stand_where_the_challenge_has_them(processor: Any) -> None:
    assert processor.get_piece_size() == 1024
    assert [processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [processor.id_to_piece(i) for i in range(4, 260)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert processor.is_unknown(3) and processor.is_control(1) and processor.is_byte(4) and not processor.is_byte(260)


def test_a_lone_space_is_one_piece(processor: Any) -> None:
    assert processor.id_to_piece(processor.piece_to_id("\u2581")) == "\u2581"
    assert processor.encode("a 🦜", out_type=str)[:2] == ["a", "\u2581"]  # before bytes a space stands alone


def test_text_outside_the_vocabulary_survives_as_bytes(processor: Any) -> None:
    text = "naïve 🦜 parrots 日本語 👩🏽"
    tokens = processor.encode(text)
    assert processor.decode(tokens) == text
    assert [f"<0x{byte:02X}>" for byte in "🦜".encode()] == processor.encode("🦜", out_type=str)
    assert processor.unk_id() not in tokens


def test_white_space_folds_and_digits_split_as_in_the_challenge(processor: Any) -> None:
    assert processor.encode("a\n\n\tb ") == processor.encode("a b")
    assert processor.encode("\n") == []
    with_digit = [piece for piece in map(processor.id_to_piece, range(260, 1024)) if any(map(str.isdigit, piece))]
    assert len(with_digit) >= 10 and {len(piece) for piece in with_digit} == {1}
    assert not processor.id_to_piece(processor.encode("the")[0]).startswith("\u2581")  # no dummy prefix


def test_the_tokenizer_learns_from_documents_of_any_length(corpus: Any) -> None:
    # SentencePiece leaves out sentences above its limit (4,192 bytes by default) without an error.
    pytest.importorskip("sentencepiece")
    import sentencepiece

    trained = demo.builder.train_tokenizer([*corpus.train[:100], "zyzzyva " * 5000], 512, 40_000)
    trained = sentencepiece.SentencePieceProcessor(model_proto=trained)
    assert trained.encode("a zyzzyva", out_type=str) == ["a", "\u2581zyzzyva"]


# ---- shards and manifest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAIN_SHARDS, VALIDATION_SHARD])
def test_a_shard_is_its_header_and_exactly_its_tokens(built: Path, name: str) -> None:
    header, tokens = read_shard(built / name)
    assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
    assert (built / name).stat().st_size == 256 * 4 + 2 * len(tokens)
    assert tokens.max() < 1024


def test_each_document_starts_with_bos_and_has_no_other_special_token(built: Path, corpus: Any) -> None:
    train = read_documents(*(built / name for name in TRAIN_SHARDS))
    validation = read_documents(built / VALIDATION_SHARD)
    assert (len(train), len(validation)) == (len(corpus.train), len(corpus.validation))
    assert min(min(document) for document in train + validation) >= 4
    # Their number depends on the documentation that this Python carries: 662,000 on Debian's 3.11, 759,000 elsewhere.
    sizes = [int(read_shard(built / name)[0][2]) for name in TRAIN_SHARDS]
    assert min(sizes) > 0.4 * sum(sizes) > 200_000, f"shards of very unequal size: {sizes}"


def test_the_manifest_tells_what_is_on_disk(built: Path, corpus: Any, processor: Any) -> None:
    manifest = json.loads((built / DATASET / "manifest.json").read_text())
    files = hash_files(built)
    del files[f"{DATASET}/manifest.json"]
    tokenizer = {"path": f"../../{TOKENIZER}", "vocab_size": 1024, "sha256": files[TOKENIZER]}
    assert manifest["tokenizer"] == tokenizer and set(files) == {TOKENIZER, *TRAIN_SHARDS, VALIDATION_SHARD}
    assert {f"{DATASET}/{name}": file["sha256"] for name, file in manifest["files"].items()} == {
        name: sha256 for name, sha256 in files.items() if name != TOKENIZER
    }
    assert manifest["corpus_sha256"] == demo.hash_corpus(corpus)
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    # Bytes counted piece by piece, as for bits per byte: BOS 0, a byte token 1, else UTF-8 with a space for each ▁.
    pieces = [processor.id_to_piece(i).replace("\u2581", " ").encode() for i in range(1024)]
    sizes = np.array([0 if i < 4 else 1 if processor.is_byte(i) else len(piece) for i, piece in enumerate(pieces)])
    for split, names in (("train", TRAIN_SHARDS), ("val", [VALIDATION_SHARD])):
        tokens = np.concatenate([read_shard(built / name)[1] for name in names])
        num_bytes = int(sizes[tokens].sum())
        assert manifest["splits"][split] == {
            "documents": int((tokens == 1).sum()),
            "tokens": len(tokens),
            "bytes": num_bytes,
            "bytes_per_token": num_bytes / len(tokens),
        }
    assert manifest["splits"]["val"]["tokens"] >= 60_000


def test_two_builds_are_byte_identical(built: Path, tmp_path: Path) -> None:
    # Another process with another hash seed, so that neither a set's nor a dict's order can decide anything.
    command = [sys.executable, str(DEMO_PATH), "--output", str(tmp_path)]
    result = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "built in" in result.stdout and result.stderr == ""
    assert hash_files(tmp_path) == hash_files(built)


def test_a_second_build_repairs_what_is_damaged_and_else_writes_nothing(
    built: Path, corpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "collect_documents", lambda library: corpus.train + corpus.validation)
    monkeypatch.setattr(demo, "split_documents", lambda documents: corpus)  # the corpus is there: save the 2 s
    expected = hash_files(built)
    for name in expected:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((built / name).read_bytes())
    for damage in (None, VALIDATION_SHARD, TOKENIZER, f"{DATASET}/manifest.json", "force"):
        if damage not in (None, "force"):
            (tmp_path / damage).write_bytes((tmp_path / damage).read_bytes()[:-1] + b"?")
        demo.build(tmp_path, force=damage == "force")
        assert ("up to date" in capsys.readouterr().out) == (damage is None), damage
        assert hash_files(tmp_path) == expected, damage
    (tmp_path / TRAIN_SHARDS[1]).unlink()
    demo.build(tmp_path)
    assert hash_files(tmp_path) == expected
    monkeypatch.setattr(demo, "split_documents", lambda documents: corpus._replace(train=corpus.train[::-1]))
    demo.build(tmp_path)
    assert "up to date" not in capsys.readouterr().out, "another corpus must not pass for this one"


def test_a_vocabulary_that_two_megabytes_cannot_fill_is_refused_with_the_range(tmp_path: Path) -> None:
    for vocab_size in (300, 70_000):
        with pytest.raises(ValueError, match=f"vocab_size={vocab_size}: choose 512 to 8192"):
            demo.build(tmp_path, vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_importing_the_file_reads_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        f"import sys, importlib.util as u; sys.path.insert(0, {str(DEMO_PATH.parent)!r})\n"
        f"spec = u.spec_from_file_location('demo', {str(DEMO_PATH)!r}); module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'sentencepiece', 'torch', 'pydoc_data'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n" and not list(tmp_path.iterdir())


# ---- check -------------------------------------------------------------------------------------------------------


def healthy_metrics() -> list[dict[str, Any]]:
    """Returns the lines of a run that learnt: loss from ln(1024) to 3.7 nats, bits per byte in the documented range."""
    bpb = sum(demo.FINAL_BPB_RANGE) / 2
    return [
        {"event": "start", "run_id": "demo"},
        {"event": "train", "step": 1, "train_loss": math.log(1024) + 0.01},
        {"event": "train", "step": 100, "train_loss": 4.5},
        {"event": "train", "step": 200, "train_loss": 3.7},
        {"event": "eval", "stage": "raw", "val_loss": 3.9, "val_bpb": bpb},
        {"event": "eval", "stage": "sliding", "val_loss": 3.8, "val_bpb": bpb},
        {"event": "final", "val_loss": 3.8, "val_bpb": bpb},
    ]


def check_lines(folder: Path, lines: list[dict[str, Any]]) -> int:
    """Returns the exit status of `check` on these lines, through the command line's own entry point."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        demo.main(["check", str(folder)])
    except SystemExit as stop:
        if not isinstance(stop.code, int):
            raise
        return stop.code
    return 0


def test_check_passes_a_run_that_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_lines(tmp_path, healthy_metrics()) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 3 and "FAIL" not in out and "sliding val_bpb" in out


@pytest.mark.parametrize(("iterations", "is_said"), [(1000, True), (200, False)])
def test_check_says_where_a_slow_machine_is_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], iterations: int, is_said: bool
) -> None:
    lines = [{"event": "config", "iterations": iterations}, *healthy_metrics()]
    assert check_lines(tmp_path, lines) == 0 and "slow" not in capsys.readouterr().out
    lines[-1]["val_bpb"] = 9.0
    assert check_lines(tmp_path, lines) == 1
    assert ("only 200 of 1000 steps" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("index", "key", "value", "failing"),
    [
        (1, "train_loss", math.log(1024) + 0.21, "first train_loss"),
        (1, "train_loss", math.log(1024) - 0.21, "first train_loss"),
        (3, "train_loss", math.log(1024) + 0.01 - 1.99, "last train_loss"),
        (3, "train_loss", math.nan, "last train_loss"),
        (6, "val_bpb", demo.FINAL_BPB_RANGE[0] - 0.01, "final val_bpb"),
        (6, "val_bpb", demo.FINAL_BPB_RANGE[1] + 0.01, "final val_bpb"),
        (6, "val_bpb", math.nan, "final val_bpb"),
    ],
)
def test_check_fails_each_figure_outside_its_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], index: int, key: str, value: float, failing: str
) -> None:
    lines = healthy_metrics()
    lines[index][key] = value
    assert check_lines(tmp_path, lines) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 1 and failures[0].startswith(f"FAIL {failing}")


def test_check_orders_the_losses_by_step_and_not_by_line(tmp_path: Path) -> None:
    lines = healthy_metrics()
    lines[1], lines[3] = lines[3], lines[1]
    assert check_lines(tmp_path, lines) == 0


def test_check_says_what_an_unusable_run_lacks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file; give the folder"):
        demo.main(["check", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="no such file; give the folder"):
        demo.main(["check", str(tmp_path)])
    good = healthy_metrics()
    for lines, message in (
        (good[:-1], "0 lines with event 'final'"),
        (good + good[-1:], "2 lines with event 'final'"),
        (good[:1] + good[4:], "no line with event 'train'"),
        ([*good, {"event": "train", "step": 300}], r"metrics.jsonl:8: not a metrics line \(KeyError\('train_loss'\)\)"),
        ([*good, {"step": 300}], r"metrics.jsonl:8: not a metrics line \(KeyError\('event'\)\)"),
    ):
        with pytest.raises(SystemExit, match=message):
            check_lines(tmp_path, lines)
    (tmp_path / "metrics.jsonl").write_text('{"event": "tra')
    with pytest.raises(SystemExit, match="metrics.jsonl:1: not a metrics line"):
        demo.main(["check", str(tmp_path)])
