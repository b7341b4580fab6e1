"""Proofs of data/build.py and data/documents.py: what becomes a document, in which split, as which tokens and bytes."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import build
import demo
import documents
import numpy as np
import parallel
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import shards
import torch
import zstandard
from conftest import ROOT, SHARED, SMALL, TINY, shell

import train_gpt as t

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the challenge's data is not beside this checkout")
STEMS, ENDINGS = "the of and to in is on by it or be at as an we us if my do no", " ra lo min tor ness ing kel va dum"
WORDS = [stem + ending for stem in STEMS.split() for ending in ENDINGS.split(" ")]


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Returns documents of random words: no two have five words in a row in common but by chance."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))).capitalize() + "." for _ in range(count)]


TEXTS = [
    *make_texts(400),
    "naïve café 日本語 🦜 and 12 more €",
    "a\n\nb\tc  d",
    "▁ stands for a space",
    "ﬁ\u00a0ligature",
]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer, made once."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(build.train_tokenizer(TEXTS, 512, 10_000))
    return path


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., SimpleNamespace]:
    """Builds in this process, with the small tokenizer unless another vocabulary is asked for; returns the result."""

    def made(
        *paths: object, name: str = "x", vocab: object = model, jobs: int = 1, **options: object
    ) -> SimpleNamespace:
        arguments = [
            *map(str, paths),
            "--name",
            name,
            "--vocab",
            str(vocab),
            "--jobs",
            str(jobs),
            "--root",
            str(tmp_path),
        ]
        for option, value in options.items():
            arguments += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
        build.main(arguments)
        return read_folder(next((tmp_path / "datasets").glob(f"{name}_*")))

    return made


def read_folder(folder: Path) -> SimpleNamespace:
    """Returns manifest, tokenizer, and the documents' tokens by split, read by the format's definition alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {}
    for split in ("train", "val"):
        parts = [path.read_bytes() for path in sorted(folder.glob(f"*_{split}_*.bin"))]
        for part in parts:
            header = np.frombuffer(part[:1024], "<i4")
            assert header[:3].tolist() == [20240520, 1, (len(part) - 1024) // 2] and not header[3:].any()
        tokens = np.concatenate([np.frombuffer(part[1024:], "<u2") for part in parts])
        starts = np.flatnonzero(tokens == 1)
        assert starts[0] == 0 and len(tokens) == manifest["splits"][split]["tokens"]
        found[split] = np.split(tokens, starts[1:])
    return SimpleNamespace(
        folder=folder, manifest=manifest, encoder=build.Encoder(folder / manifest["tokenizer"]["path"]), **found
    )


def texts_of(built: SimpleNamespace, split: str) -> list[str]:
    return built.encoder.decode(getattr(built, split))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- real documents, real vocabularies -------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("vocab", ["1024", "4096", "8192", "16384", "bytes"])
def test_real_documents_come_back_and_the_metric_counts_their_bytes_for_every_vocabulary(
    vocab: str, make: Callable, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((SHARED / "documents").glob("*.jsonl"))
    texts = [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]
    built = make(*paths, vocab=vocab, val_documents=200, shard_tokens=300_000)
    normal = built.encoder.normalize(texts)
    dropped = sum(built.manifest["dropped"].values())
    assert sum(len(getattr(built, split)) for split in ("train", "val")) == len(texts) - dropped and dropped < 30
    left = {split: texts_of(built, split) for split in ("train", "val")}
    assert set(left["train"] + left["val"]) <= set(normal), "decoded text is the normalized input"
    if not dropped:
        assert sorted(left["train"] + left["val"]) == sorted(normal)
    if vocab == "bytes":
        assert set(left["train"] + left["val"]) <= set(texts)
    # The metric's count, by the trainer, document by document, against the UTF-8 length of the text.
    h = t.apply_manifest(t.Hyperparameters(data_path=str(built.folder)))
    assert h.vocab_size == {"bytes": 260}.get(vocab) or h.vocab_size == int(vocab)
    luts = t.build_sentencepiece_luts(t.load_tokenizer(h.tokenizer_path, h.vocab_size), h.vocab_size)
    for split, expected in left.items():
        for tokens, text in zip(getattr(built, split), expected):
            assert metric_bytes(tokens, luts) == len(text.encode()), text[:80]
        figures = built.manifest["splits"][split]
        assert figures["bytes"] == sum(len(text.encode()) for text in expected)
        assert figures["bytes_per_token"] == figures["bytes"] / figures["tokens"]
    val = t.load_validation_tokens(
        tiny(**{n: getattr(h, n) for n in ("data_path", "vocab_size", "tokenizer_path")}, eval_seq_len=1, eval_stride=1)
    )
    assert val.num_bytes == built.manifest["splits"]["val"]["bytes"]


def metric_bytes(tokens: np.ndarray, luts: tuple[torch.Tensor, ...]) -> int:
    """Returns the bytes that scoring counts for a document behind its BOS."""
    base_bytes, has_leading_space, is_boundary_token = luts
    ids = torch.from_numpy(tokens.astype(np.int64))
    return int((base_bytes[ids[1:]] + (has_leading_space[ids[1:]] & ~is_boundary_token[ids[:-1]])).sum())


def test_the_byte_level_vocabulary_is_the_challenges_and_leaves_text_as_it_is(tmp_path: Path) -> None:
    """Published byte-level shards have the ids 4 to 259 for the bytes, and SentencePiece reads the model."""
    path = tmp_path / "bytes.model"
    path.write_bytes(build.byte_tokenizer())
    encoder, texts = (
        build.Encoder(path),
        [*TEXTS, "  two  spaces ", "\ttab\r\n", "\0 \x7f <0x41><s>", "a\u0301 ﬁ", "▁", ""],
    )
    for text, tokens in zip(texts, encoder.encode(texts)):
        assert tokens.tolist() == [1, *(4 + byte for byte in text.encode())]
        assert encoder.decode([tokens]) == encoder.normalize([text]) == [text]
    sp = encoder.sp
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3, 4, 259)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>", "<0xFF>"]
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.get_piece_size()) == (0, 1, 2, 3, 260)
    base_bytes, has_leading_space, is_boundary_token = t.build_sentencepiece_luts(t.load_tokenizer(str(path), 260), 260)
    assert base_bytes.tolist() == [0] * 4 + [1] * 256 and not has_leading_space.any()
    assert is_boundary_token.tolist() == [True] * 4 + [False] * 256


@needs_shared
def test_the_challenges_tokenizer_gives_the_published_tokens(make: Callable) -> None:
    """All 1,321 documents stand in the published shards token by token; so do decoded ones of the validation split."""
    published = {}
    for split in ("train", "val"):
        tokens = np.concatenate(
            [t.load_data_shard(path)[:] for path in sorted((SHARED / "bench_web").glob(f"*_{split}_*.bin"))]
        )
        published[split] = {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])}
    head = SHARED / "documents/fineweb_train_head.jsonl"
    built = make(head, vocab=SHARED / "fineweb_1024_bpe.model", dedup="none", val_documents=21, val_first=True)
    assert (len(built.train), len(built.val)) == (1300, 21)
    assert all(tokens.tobytes() in published["train"] for tokens in built.train + built.val)
    validation = [np.frombuffer(tokens, "<u2") for tokens in sorted(published["val"])]
    again = built.encoder.encode(built.encoder.decode(validation))
    assert sum(a.tobytes() == b.tobytes() for a, b in zip(again, validation)) >= len(validation) - 1  # the last is cut


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_order_is_that_of_the_input_and_documents_go_on_across_shards(make: Callable, tmp_path: Path) -> None:
    built = make(
        write_jsonl(tmp_path / "a.jsonl", TEXTS), val_documents=30, shard_tokens=1000, dedup="none", licence="CC0 1.0"
    )
    normal = built.encoder.normalize(TEXTS)
    val = texts_of(built, "val")
    assert val == [text for text in normal if text in set(val)] and len(val) == 30
    assert texts_of(built, "train") == [text for text in normal if text not in set(val)]
    sizes = [len(t.load_data_shard(path)) for path in sorted(built.folder.glob("*_train_*.bin"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    starts = [t.load_data_shard(path)[:1][0] for path in sorted(built.folder.glob("*_train_*.bin"))]
    assert 1 not in starts[1:3], "a document goes on in the next shard"
    facts = {path.name: shards.check_shard(path, 512)._asdict() for path in built.folder.glob("*.bin")}
    assert built.manifest["files"] == facts
    (source,), path = built.manifest["sources"], tmp_path / "a.jsonl"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source["file"], source["bytes"], source["sha256"]) == ("a.jsonl", path.stat().st_size, digest)
    assert source["licence"] == "CC0 1.0"


def test_the_first_documents_are_held_out_where_that_is_asked_for(make: Callable, tmp_path: Path) -> None:
    built = make(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_documents=7, val_first=True)
    assert texts_of(built, "val") == built.encoder.normalize(TEXTS[:7])


def test_the_split_is_the_seeds_and_does_not_depend_on_the_order(make: Callable, tmp_path: Path) -> None:
    path, turned = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    built = {
        name: set(texts_of(make(source, name=name, seed=seed, val_documents=40), "val"))
        for name, source, seed in (("a", path, 1), ("b", turned, 1), ("c", path, 2))
    }
    assert built["a"] == built["b"] != built["c"]


def test_copies_of_validation_documents_are_kept_out_of_training(make: Callable, tmp_path: Path) -> None:
    texts = make_texts(300, seed=5, words=200)
    held = texts[:20]
    exact = [text.upper().replace(" ", "\n") for text in held[:10]]  # other case and white space
    near = [change_words(text, 1, number) for number, text in enumerate(held[10:])]
    far = [change_words(text, 10, number) for number, text in enumerate(held + held)]  # of some 150: half is shared
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, *exact, *near, *far])
    found = {}
    for dedup in ("near", "exact", "none"):
        built = make(path, name=dedup, dedup=dedup, val_documents=20, val_first=True)
        normal, train = built.encoder.normalize, set(texts_of(built, "train"))
        assert texts_of(built, "val") == normal(held)
        found[dedup] = [len(train & set(normal(kind))) for kind in (texts[20:], exact, near, far)]
        found[dedup].append({what: n for what, n in built.manifest["dropped"].items() if n})
    assert found["none"] == [280, 10, 10, 40, {}]
    assert found["exact"] == [280, 0, 10, 40, {"exact duplicates": 10}]
    assert found["near"] == [280, 0, 0, 40, {"exact duplicates": 10, "near duplicates": 10}]


def change_words(text: str, count: int, seed: int) -> str:
    words, draw = text.split(), random.Random(seed)
    for place in draw.sample(range(len(words)), count):
        words[place] = f"changed{place}"
    return " ".join(words)


def test_a_random_validation_document_is_held_out_once_however_often_it_occurs(make: Callable, tmp_path: Path) -> None:
    built = make(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS, *TEXTS]), val_documents=50)
    val = texts_of(built, "val")
    assert len(set(val)) == len(val) == 50
    assert not set(val) & set(texts_of(built, "train"))
    assert built.manifest["dropped"]["exact duplicates"] == 100


def test_signatures_estimate_how_much_text_two_documents_share() -> None:
    """Against the exact Jaccard index of all their 32-byte pieces, of which the signature sees one in eight: of 150
    shingles a share has a standard deviation of 0.04, and 128 hash values of it one of 0.044."""
    errors = []
    for number, text in enumerate(map(build.fold, make_texts(60, seed=3, words=200))):
        other = build.fold(change_words(text, 1 + number % 9, number))
        pieces = [{s.encode()[i : i + 32] for i in range(len(s.encode()) - 31)} for s in (text, other)]
        exact = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
        errors.append(build.sign(text).jaccard(build.sign(other)) - exact)
    assert max(map(abs, errors)) < 5 * 0.06 and abs(np.mean(errors)) < 0.03
    assert build.sign("short").jaccard(build.sign("short")) == build.sign("").jaccard(build.sign("")) == 1.0


def test_near_duplicates_are_found_in_text_without_spaces_and_a_common_head_makes_none(
    make: Callable, tmp_path: Path
) -> None:
    draw = random.Random(8)
    articles = [
        "新华社北京十一月二十五日电：" + "".join(chr(draw.randint(0x4E00, 0x7000)) for _ in range(300))
        for _ in range(200)
    ]
    articles += ['{"a":1,"b":[' + ",".join(str(draw.randint(0, 10**9)) for _ in range(90)) + "]}" for _ in range(100)]
    draw.shuffle(articles)
    copies = [f"据{text}" for text in articles[:20]]  # a character more in front
    built = make(write_jsonl(tmp_path / "a.jsonl", articles + copies), vocab="bytes", val_documents=20, val_first=True)
    assert texts_of(built, "train") == articles[20:]
    assert built.manifest["dropped"]["near duplicates"] == 20


# ---- the same result -------------------------------------------------------------------------------------------------


def test_builds_are_byte_identical_for_any_number_of_processes(make: Callable, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(6000))  # 2 MB: three batches
    one = make(path, name="a", vocab=600, jobs=1, shard_tokens=50_000)
    two = make(path, name="b", vocab=600, jobs=2, shard_tokens=50_000)
    a, b = files_of(one.folder), {n.replace("b_", "a_", 1): content for n, content in files_of(two.folder).items()}
    manifests = [json.loads(files.pop("manifest.json").replace(b'"b_', b'"a_')) for files in (a, b)]
    assert a == b and manifests[0] == manifests[1] and len(a) == 8


def test_a_finished_build_is_not_made_again_and_another_one_does_not_replace_it(
    make: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    make(path)
    with monkeypatch.context() as patch:
        patch.setattr(build.Build, "scan", lambda self: pytest.fail("it is there already"))
        make(path)
    assert "up to date" in capsys.readouterr().out
    for other in ({"seed": 5}, {"val_documents": 9}, {"licence": "CC0"}):
        with pytest.raises(shards.DataError, match="exists, and was not made from this: another --name"):
            make(path, **other)
    write_jsonl(path, TEXTS[::-1])
    with pytest.raises(shards.DataError, match="was not made from this"):
        make(path)


def test_a_killed_build_goes_on_where_it_was_and_ends_the_same(make: Callable, tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(12_000))  # 4 MB: five batches
    whole = make(path, name="whole", shard_tokens=60_000)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import build; build.JOURNAL_SECONDS = 0.0\n"
        "count, encode = 0, build.Worker.encode\n"
        "def slow(self, task):\n"
        "    global count; count += 1\n"
        "    if count == 4: print('waiting', flush=True); time.sleep(60)\n"
        "    return encode(self, task)\n"
        "build.Worker.encode = slow; build.main()"
    )
    arguments = [str(path), "--name", "killed", "--vocab", str(model), "--jobs", "1", "--root", str(tmp_path)]
    command = [sys.executable, "-c", code, str(ROOT / "data"), *arguments, "--shard-tokens", "60000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "it ended before it could be killed"
    process.kill()
    process.wait()
    assert not list((tmp_path / "datasets").glob("killed_sp512")), "nothing unfinished has the final name"
    work = tmp_path / "datasets/killed_sp512.building"
    assert json.loads((work / "journal.json").read_text())["batches"] == 3
    growing = max(work.glob("*_train_*.bin"))
    growing.write_bytes(growing.read_bytes() + b"written after the journal")
    (work / "journal.json.77.tmp").write_bytes(b"{")  # of a process that was killed in the middle of it
    encoded, encode = [], build.Worker.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Worker, "encode", lambda self, task: (encoded.append(task), encode(self, task))[1])
        resumed = make(path, name="killed", shard_tokens=60_000)
    assert 0 < len(encoded) < 5, "what was encoded is not encoded again"
    assert {n.replace("killed_", "whole_"): c for n, c in files_of(resumed.folder).items() if n.endswith(".bin")} == {
        n: c for n, c in files_of(whole.folder).items() if n.endswith(".bin")
    }
    assert resumed.manifest["splits"] == whole.manifest["splits"] and not work.exists()
    assert len(files_of(resumed.folder)) == len(files_of(whole.folder)), "left over"


def test_an_unfinished_build_of_other_settings_is_not_gone_on_with(
    make: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(build.Build, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(path, seed=1)
    assert (tmp_path / "datasets/x_sp512.building").exists()
    built = make(path, seed=2)
    assert "is of another build: beginning anew" in capsys.readouterr().out and built.manifest["settings"]["seed"] == 2


def test_files_that_change_while_they_are_read_are_refused(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, select = write_jsonl(tmp_path / "a.jsonl", TEXTS), build.Build.select
    monkeypatch.setattr(build.Build, "select", lambda self: (select(self), write_jsonl(path, TEXTS[1:] + TEXTS[:1]))[0])
    with pytest.raises(shards.DataError, match="the files changed while they were read"):
        make(path)
    assert not (tmp_path / "datasets/x_sp512").exists()


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(text.split()) for text in TEXTS]
    lines = "".join(json.dumps({"id": 1, "body": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    plain = "\n".join(texts).encode()  # without a newline at its end
    folder = tmp_path / "folder/inner"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "notes.md").write_text("no document by its name")
    table = pyarrow.table({"id": range(len(texts)), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    half = zstandard.ZstdCompressor().compress(lines[:5000]), zstandard.ZstdCompressor().compress(lines[5000:])
    for name, content in (
        ("a.jsonl", lines),
        ("b.jsonl.gz", gzip.compress(lines[:7000]) + gzip.compress(lines[7000:])),  # files may be put together
        ("c.jsonl.zst", b"".join(half)),
        ("d.txt", plain),
        ("e.txt", "\r\n \n\n".join(texts).encode()),
        ("f.data", lines),
    ):
        (tmp_path / name).write_bytes(content)
    expected = files_of(make(tmp_path / "a.jsonl", name="a", text_key="body", dedup="none").folder)
    others = {
        "b": (tmp_path / "b.jsonl.gz", {"text_key": "body"}),
        "c": (tmp_path / "c.jsonl.zst", {"text_key": "body"}),
        "d": (tmp_path / "d.txt", {"text_unit": "line"}),
        "e": (tmp_path / "e.txt", {"text_unit": "paragraph"}),
        "f": (tmp_path / "f.data", {"format": "jsonl", "text_key": "body"}),
        "g": (tmp_path / "folder", {}),
        "h": (tmp_path / "a.parquet", {"text_key": "body"}),
        "i": ("-", {"text_key": "body"}),
        "j": ("-", {"format": "text", "text_unit": "line"}),
    }
    packed = zstandard.ZstdCompressor().compress(lines)
    others["k"] = ("-", {"text_key": "body"})
    for name, (path, options) in others.items():
        content = {"j": plain, "k": packed}.get(name, lines)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        built = make(path, name=name, dedup="none", **options)
        assert built.manifest["rejected"] == ({"not read: .md": 1} if name == "g" else {})
        found = files_of(built.folder)
        for shard in ("train_000000.bin", "val_000000.bin"):
            assert found[f"{name}_{shard}"] == expected[f"a_{shard}"], (name, shard)
    assert not list((tmp_path / "datasets").glob("*stdin*"))


# ---- what lies in folders --------------------------------------------------------------------------------------------


def test_links_are_followed_and_hidden_files_are_counted(make, tmp_path):
    elsewhere, folder = tmp_path / "elsewhere" / "deep", tmp_path / "folder"
    elsewhere.mkdir(parents=True)
    folder.mkdir()
    write_jsonl(elsewhere / "b.jsonl", TEXTS[200:])
    write_jsonl(folder / "a.jsonl", TEXTS[:200])
    write_jsonl(folder / ".a-checkpoint.jsonl", TEXTS)
    (folder / ".ipynb_checkpoints").mkdir()
    write_jsonl(folder / ".ipynb_checkpoints" / "a.jsonl", TEXTS)
    (folder / "linked").symlink_to(elsewhere.parent)
    expected = make(write_jsonl(tmp_path / "all.jsonl", TEXTS), name="y", dedup="none")
    built = make(folder, name="z", dedup="none")
    assert built.manifest["rejected"] == {"not read: hidden": 2}
    assert built.manifest["splits"]["train"]["tokens"] == expected.manifest["splits"]["train"]["tokens"]


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("b.jsonl", "gone.jsonl", "leads to gone.jsonl, which is not there: mend or remove that link"),
        ("b.jsonl", "a.jsonl", "by another name or given twice: leave one of them out"),
        ("b", ".", "by another name: remove the link between them"),
    ],
)
def test_a_link_that_cannot_be_followed_is_refused_with_the_fix(make, tmp_path, name, target, reason):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / name).symlink_to(target)
    with pytest.raises(shards.DataError, match=re.escape(reason)):
        make(folder)


def test_two_folders_that_link_to_each_other_are_refused(make, tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / f"{name}.jsonl", TEXTS)
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    with pytest.raises(shards.DataError, match="by another name: remove the link between them"):
        make(tmp_path / "one")


def test_a_file_that_is_given_twice_is_refused(make, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(shards.DataError, match="given twice"):
        make(path, path)
    os.link(path, tmp_path / "b.jsonl")
    with pytest.raises(shards.DataError, match=re.escape(f"{tmp_path / 'b.jsonl'} is {path}")):
        make(path, tmp_path / "b.jsonl")


def test_what_may_not_be_read_is_refused_before_anything_is(make, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "closed").mkdir(parents=True)
    path = write_jsonl(folder / "a.jsonl", TEXTS)
    real = os.scandir  # tests may be run as root, who may read all

    def scandir(place):
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(shards.DataError, match="closed cannot be listed .Permission denied.: change its permissions"):
        make(folder)
    monkeypatch.setattr(os, "scandir", real)
    monkeypatch.setattr(documents.os, "access", lambda place, mode: Path(place) != path)
    with pytest.raises(shards.DataError, match="a.jsonl cannot be read: change its permissions"):
        make(folder)


def zstd_of_window(content: bytes, log: int) -> bytes:
    """Returns one frame that asks for a window of 2^log bytes, as `zstd --long` writes it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


def test_large_windows_of_zstandard_are_read_up_to_a_bound_and_then_the_command_is_named(make, tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    path = tmp_path / "with space.jsonl.zst"
    path.write_bytes(zstd_of_window(lines, 29))
    assert make(path, dedup="none").manifest["rejected"] == {}
    path.write_bytes(zstd_of_window(lines, 30))
    with pytest.raises(shards.DataError) as refused:
        make(path, name="y", bad="skip")
    assert f"zstd -dc --long=31 '{path}' | python data/build.py - …" in str(refused.value)


def test_text_that_parquet_holds_as_bytes_is_read(make, tmp_path):
    texts = [text.encode() for text in TEXTS]
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    expected = make(write_jsonl(tmp_path / "a.jsonl", TEXTS), name="y", dedup="none")
    built = make(tmp_path / "a.parquet", name="z", dedup="none")
    assert built.manifest["rejected"] == {} and built.manifest["splits"] == expected.manifest["splits"]
    broken = pyarrow.table({"text": pyarrow.array([*texts, b"caf\xe9"], pyarrow.binary())})
    pyarrow.parquet.write_table(broken, tmp_path / "b.parquet")
    built = make(tmp_path / "b.parquet", name="w", dedup="none", bad="skip")
    assert built.manifest["rejected"] == {"no UTF-8": 1}


def test_the_printed_command_trains_from_a_folder_with_a_space_and_an_umlaut(model, tmp_path):
    home = tmp_path / "Meine Wörter"
    home.mkdir()
    write_jsonl(home / "a b.jsonl", TEXTS)
    command = [sys.executable, str(ROOT / "data" / "build.py"), "a b.jsonl", "--name", "x", "--vocab", str(model)]
    done = subprocess.run([*command, "--root", "."], cwd=home, capture_output=True, text=True, check=True)
    absolute = subprocess.run([*command, "--root", str(home)], cwd=home, capture_output=True, text=True, check=True)
    assert "up to date" in absolute.stdout
    printed = [re.search(r"train on it with\n    (DATA_PATH=.*)", out)[1] for out in (done.stdout, absolute.stdout)]
    short = SMALL | {"ITERATIONS": 1, "TTT_ENABLED": 0, "MAX_VAL_TOKENS": 256}
    settings = shell(SimpleNamespace(data_path="", tokenizer_path=""), **short)
    del settings["DATA_PATH"], settings["TOKENIZER_PATH"]  # the command has one, the manifest the other
    for number, line in enumerate(printed):
        line = line.replace("python train_gpt.py", f"{sys.executable} {ROOT / 'train_gpt.py'}")
        settings["RUN_ID"] = f"r{number}"
        ran = subprocess.run(["bash", "-c", line], cwd=home, env=settings, capture_output=True, text=True)
        assert ran.returncode == 0 and "final_exact" in ran.stdout, ran.stderr[-2000:]


# ---- what is no document ---------------------------------------------------------------------------------------------

BAD_LINES = {  # what stands in a line, why it is no document
    b'{"text": "broken"': r"no JSON \(Expecting ',' delimiter at character 18\)",
    b'{"text": 7}': "no text under the key text",
    b'{"txt": "x"}': "no key text",
    b'["text"]': "no text under the key text",
    b'{"text": "\xff\xfe"}': r"no UTF-8 \(byte 0xff at 10\)",
    b'{"text": "\\ud800"}': "no Unicode text",
    b'{"text": " \\n "}': "an empty document",
    b"\x00\x01\x02\x03": "no JSON",
    b"[" * 20_000: "no JSON",
    b'{"text": "' + b"x" * 5000 + b'"}': r"too long \(5,000 bytes, --max-document-bytes is 4,000",
    b'{"text": ' + b"7" * 5000 + b"}": "no JSON",
    b"y" * 50_000_000: r"too long \(50,000,001 bytes",
}


def test_bad_lines_are_named_counted_and_never_land_in_a_shard(
    make: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad, path = TEXTS[:100], list(BAD_LINES), tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in good]
    for number, line in enumerate(bad):
        lines.insert(5 * number + 3, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(shards.DataError, match=f"{len(bad)} places hold no document: mend them, or .* --bad skip"):
        make(path, max_document_bytes=4000)
    shown = capfd.readouterr().err
    for number, (line, reason) in enumerate(BAD_LINES.items()):
        named = re.search(rf"{re.escape(str(path))}:{lines.index(line) + 1}: {reason}", shown)
        assert named or number >= build.SHOWN_REJECTIONS, (line[:30], reason)
    report = [
        json.loads(line) for line in (tmp_path / "datasets/x_sp512.building/rejected.jsonl").read_text().splitlines()
    ]
    assert [(r["file"], r["line"]) for r in report] == [(str(path), lines.index(line) + 1) for line in bad]
    for rejected, reason in zip(report, BAD_LINES.values()):
        assert re.match(reason, rejected["reason"]), rejected
    built = make(path, max_document_bytes=4000, bad="skip", dedup="none")
    assert sorted(texts_of(built, "train") + texts_of(built, "val")) == sorted(built.encoder.normalize(good))
    assert sum(built.manifest["rejected"].values()) == len(bad) and (built.folder / "rejected.jsonl").exists()


BOM = b"\xef\xbb\xbf"
BLANK_LINES = [b"", b" ", b"\t \r", b"\r", b"\x0b\x0c", BOM, BOM + b" \r", "\u00a0\u3000\u2028".encode()]
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n", b"\n\n\n \n", b"\r\n" * 40_000, b"\n" + BOM])
@pytest.mark.parametrize("unit", ["json", "line", "paragraph"])
def test_blank_lines_are_no_documents_and_are_counted_as_an_editor_does(
    unit: str, end: bytes, packer: str, tmp_path: Path
) -> None:
    """They stand before, between and after three documents; the last but one is none, which is named by its line."""
    kind, good, bad = ("jsonl", b'{"text": "%d"}', b"{") if unit == "json" else ("text", b"%d", b"\xff")
    lines = [*BLANK_LINES, good % 1, *BLANK_LINES, BOM + good % 2, b"", bad, b"", good % 3]
    content = b"\n".join(lines)
    path = tmp_path / f"a.data{packer}"
    path.write_bytes(PACKERS[packer](content + end))
    options = documents.Options(format=kind, text_unit=unit if kind == "text" else "file")
    sources, _ = documents.find_sources([path], options)
    parts = [documents.parse_batch(batch, options) for batch in documents.read_batches(sources, options)]
    assert [text.strip() for texts, _ in parts for text in texts] == ["1", "2", "3"]
    assert [found.line for _, rejected in parts for found in rejected] == [lines.index(bad) + 1]


def test_a_file_with_blank_lines_is_built_like_one_without(make: Callable, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl").write_bytes(b"\r\n\r\n" + b"\r\n \r\n".join(lines) + b"\n" * 3_000_000)  # whole batches
    expected, found = (make(tmp_path / f"{name}.jsonl", name=name, dedup="none") for name in "ab")
    for split in ("train", "val"):
        assert texts_of(found, split) == texts_of(expected, split)
    assert found.manifest["rejected"] == {}
    assert not (found.folder / "rejected.jsonl").exists()


def test_a_file_of_blank_lines_holds_no_documents(make: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\r\n" * 9)
    with pytest.raises(shards.DataError, match="there are no documents in"):
        make(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"\r\n" * 9)  # as one document it is an empty one
    with pytest.raises(shards.DataError, match="1 places hold no document"):
        make(tmp_path / "a.txt")


def test_blank_lines_in_the_metrics_of_a_demonstration_are_passed_over(tmp_path: Path) -> None:
    events = [{"event": "train", "step": 1, "train_loss": 6.9}, {"event": "final", "val_loss": 3.0, "val_bpb": 2.0}]
    lines = ["", *map(json.dumps, events), " ", "no JSON"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\r\n\n")
    assert {event: len(found) for event, found in demo.read_metrics(tmp_path).items() if found} == {
        "train": 1,
        "final": 1,
    }
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="metrics.jsonl:5: not a metrics line"):
        demo.read_metrics(tmp_path)


def test_bad_files_are_named_and_the_others_are_read(make: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    packed = zstandard.ZstdCompressor().compress(b"".join(json.dumps({"text": x}).encode() + b"\n" for x in TEXTS))
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "nul.txt").write_bytes(b"text with a \0 in it")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "damaged.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}\n' * 9)[:-9])
    (folder / "damaged.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    (folder / "no.jsonl.gz").write_bytes(b"no gzip")
    (folder / "no.parquet").write_bytes(b"no parquet")
    built = make(folder, bad="skip", dedup="none")
    left = set(texts_of(built, "train") + texts_of(built, "val"))
    assert left - {"lost"} == set(built.encoder.normalize(TEXTS))
    report = [json.loads(line) for line in (built.folder / "rejected.jsonl").read_text().splitlines()]
    reasons = {Path(r["file"]).name: r["reason"] for r in report}
    assert reasons.keys() == {path.name for path in folder.iterdir()} - {"a.jsonl"}
    assert reasons["nul.txt"].startswith("binary data") and reasons["empty.txt"] == "an empty document"
    assert "no UTF-8" in reasons["binary.txt"] and "no UTF-8" in reasons["latin1.txt"]
    for name in ("damaged.jsonl.gz", "no.jsonl.gz", "no.parquet"):
        assert reasons[name].startswith("the file cannot be read from here on"), reasons


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["{}/empty"], "holds no documents by its name .*.jsonl.*: rename it, or say --format"),
        (["{}/a.dat"], "a.dat holds no documents by its name"),
        (["{}/a.jsonl", "--vocab", "100"], "--vocab 100 is not between 512 and 65,536"),
        (["{}/a.jsonl", "--vocab", "no.model"], "--vocab no.model is no number, not `bytes`, and no file"),
        (["{}/a.jsonl", "--vocab", "{}/a.dat"], "a.dat is not a SentencePiece model"),
        (["{}/a.jsonl", "--vocab", "60000"], "no tokenizer of 60,000 pieces"),
        (["{}/a.jsonl", "--name", "../x"], "--name ../x: use letters"),
        (["{}/a.jsonl", "--name", "my_val"], "--name my_val: .* no _train or _val as a word"),
        (["{}/a.jsonl", "--jobs", "0"], "--jobs 0 is not between 1 and"),
        (["{}/a.jsonl", "--val-documents", "404"], "404 documents do not give 404 for validation"),
        (["{}/few.jsonl", "--val-documents", "0"], "3 documents do not give 0 for validation: set --val-documents"),
        (["{}/none.jsonl"], "there are no documents in .*none.jsonl"),
        (["{}/pipe.jsonl"], "pipe.jsonl is no regular file, .*: pipe it to this command, and give -"),
        (["{}/number.parquet"], "1 places hold no document"),
        (["{}/a.jsonl", "--vocab", "³"], "--vocab ³ is no number"),
        (["{}/a.jsonl", "--vocab", "00512"], "--vocab 00512 is no number"),
        (["{}/a.jsonl", "--sample-bytes", "1"], "--sample-bytes 1 is not between 10,000 and"),
        (["{}/a.parquet"], "a.parquet has no column text, but body: say --text-key"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value_and_the_fix(
    arguments: list[str], message: str, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.dat").write_bytes(b"x")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "few.jsonl", TEXTS[:3])
    (tmp_path / "none.jsonl").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"text": [7]}), tmp_path / "number.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    given = [argument.format(tmp_path) for argument in arguments]
    defaults = ["--name", "x", "--vocab", str(model), "--root", str(tmp_path / "out"), "--jobs", "1"]
    with pytest.raises(shards.DataError, match=message):
        build.main([given[0], *defaults, *given[1:]])
    assert not list((tmp_path / "out").glob("datasets/x_*/"))[1:], "at most the unfinished build"


def test_tokenizers_that_would_miscount_are_refused(make: Callable, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    kinds = {
        "fallback": ({}, "does not decode to its text: use another tokenizer"),
        "space": ({"byte_fallback": True, "sentence": "abcabdabc"}, "lacks the bare piece"),
        "bos": ({"bos_id": 2, "eos_id": 1, "byte_fallback": True}, "BOS 2"),
    }
    for name, (options, message) in kinds.items():
        with pytest.raises(shards.DataError, match=message):
            make(path, vocab=odd_model(tmp_path / f"{name}.model", **options), name=name)


def odd_model(path: Path, sentence: str = "abc abd", **options: object) -> Path:
    """Makes a tokenizer that knows no characters but those of a sentence."""
    content, ids = io.BytesIO(), {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence] * 20), model_writer=content, model_type="bpe", vocab_size=300,
        hard_vocab_limit=False, minloglevel=2, **{**ids, **options},
    )  # fmt: skip
    path.write_bytes(content.getvalue())
    return path


def test_training_documents_that_a_tokenizer_cannot_write_are_counted_and_left_out(
    make: Callable, tmp_path: Path
) -> None:
    texts = [f"ab{'c ' * number}" for number in range(1, 30)]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, "x", "ab x", "\u200b"])  # no piece, and nothing in normal form
    built = make(path, vocab=odd_model(tmp_path / "small.model"), val_documents=5, val_first=True, dedup="none")
    assert sorted(texts_of(built, "train")) == sorted(text.strip() for text in texts[5:])
    assert built.manifest["dropped"] == {"no tokens, or unknown ones": 3}


# ---- memory, processes, the command ----------------------------------------------------------------------------------


def test_no_more_than_four_batches_a_process_are_under_way(tmp_path: Path) -> None:
    sources, _ = documents.find_sources([write_jsonl(tmp_path / "a.jsonl", TEXTS[:50])], documents.Options())
    (batch,), drawn = documents.read_batches(sources, documents.Options()), 0

    def tasks() -> Iterator[build.Task]:
        nonlocal drawn
        while drawn < 40:
            drawn += 1
            yield build.Task(batch, frozenset())

    worker = functools.partial(build.Worker, documents.Options(), build.Settings("bytes"))
    results = parallel.in_order(worker, "scan", tasks(), 2)
    for number, found in enumerate(results, 1):
        assert len(found.keys) == 50 and drawn - number < parallel.AHEAD * 2
    assert number == drawn == 40


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory of processes is read in /proc")
def test_memory_stays_bounded_however_large_the_input_is(tmp_path: Path, model: Path) -> None:
    """The docstring's bound, 150 MB and 150 MB a process: 450 MB for two, of 4 MB of documents as of 16."""
    texts = make_texts(15_000)
    peaks = []
    for copies in (1, 4):
        path = write_jsonl(tmp_path / f"{copies}.jsonl", texts * copies)
        arguments = [str(path), "--name", f"x{copies}", "--vocab", str(model), "--jobs", "2", "--root", str(tmp_path)]
        process = subprocess.Popen([sys.executable, str(ROOT / "data/build.py"), *arguments], stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.02)
        assert process.returncode == 0
        peaks.append(peak)
    assert peaks[0] < 450e6 and peaks[1] < 450e6 and peaks[1] < 1.2 * peaks[0], peaks


def resident_bytes(pid: int) -> int:
    """Returns the memory of a process and of all that it has started."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return total
    return total + sum(resident_bytes(int(child)) for child in children)


def test_every_pass_and_the_tokenizers_training_say_how_far_they_are(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "Progress", functools.partial(shards.Progress, every_seconds=0.0))
    make(write_jsonl(tmp_path / "a.jsonl", make_texts(6000)), vocab=600)
    lines = capfd.readouterr().err.splitlines()
    for label, last in (
        ("reading", r"1\.5 MB, [\d.,]+ MB/s"),
        ("sampling", r"2\.0 of 2\.0 batches"),
        ("tokenizer", r"\d+\.0 of 600\.0 pieces"),
        ("encoding", r"1\.5 of 1\.5 MB, [\d.,]+ MB/s, 0 s left"),
    ):
        own = [line for line in lines if line.startswith(f"{label}: ")]
        assert own and re.match(rf"{label}: {last}", own[-1]), (label, own)


def test_two_builds_of_one_folder_do_not_get_into_each_others_way(make: Callable, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with shards.locked(tmp_path / "datasets/.x_sp512.lock"):
        with pytest.raises(shards.DataError, match="another process is at work on this"):
            make(path)
        make(path, name="y")
    make(path)


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked for in /proc")
def test_no_process_outlives_a_build_that_was_killed(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60_000))
    arguments = [str(path), "--name", "x", "--vocab", str(model), "--jobs", "2", "--root", str(tmp_path)]
    command = [sys.executable, "-u", str(ROOT / "data/build.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert "documents" in process.stdout.readline()
    time.sleep(0.5)
    process.kill()
    process.wait()
    for _ in range(100):
        left = [p for p in Path("/proc").glob("[0-9]*/stat") if session_of(p) == process.pid]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"{len(left)} processes are left after 10 s")


def session_of(stat: Path) -> int:
    """Returns the session that a process belongs to, 0 if it is none any more."""
    try:
        state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return 0
    return 0 if state == "Z" else int(session)


def test_large_rows_of_parquet_files_are_read_few_at_a_time(tmp_path: Path) -> None:
    """120 rows of 1 MB, which are too long here, took 0.7 GB: a row group was decoded at once."""
    rows = [f"{number} " + "abcdefgh" * 125_000 for number in range(120)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [*rows, "good"]}), tmp_path / "a.parquet", compression="NONE")
    del rows
    code = (
        f"import sys, resource; sys.path.insert(0, {str(ROOT / 'data')!r})\n"
        "import documents as d; from pathlib import Path\n"
        f"o = d.Options(max_document_bytes=1000); s, _ = d.find_sources([Path({str(tmp_path / 'a.parquet')!r})], o)\n"
        "import pyarrow.parquet; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = [d.parse_batch(b, o) for b in d.read_batches(s, o)]\n"
        "print(sum(len(f[1]) for f in found), sum(len(f[0]) for f in found))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert done[:2] == ["120", "1"] and int(done[2]) < 250_000, done


def test_a_line_that_is_small_only_while_it_is_packed_does_not_fill_the_memory(tmp_path: Path) -> None:
    """600 MB in 60 kB: a piece of 128 KiB of the file was all of it."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(packer.compress(b"x" * 10_000_000) for _ in range(60)) + packer.flush()
    assert len(packed) < 100_000
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    code = (
        f"import sys, resource; sys.path.insert(0, {str(ROOT / 'data')!r})\n"
        "import documents as d; from pathlib import Path\n"
        f"s, _ = d.find_sources([Path({str(tmp_path / 'a.jsonl.zst')!r})], d.Options())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(*[r.reason for b in d.read_batches(s, d.Options()) for r in d.parse_batch(b, d.Options())[1]])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "too long (600,000,000 bytes" in done[0] and int(done[1]) < 150_000, done


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_quietly_and_says_how_to_go_on(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(60_000))
    arguments = [str(path), "--name", "x", "--vocab", str(model), "--jobs", "2", "--root", str(tmp_path)]
    command = [sys.executable, "-u", str(ROOT / "data/build.py"), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "documents" in process.stdout.readline()  # the first pass is over
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors == "build.py: interrupted: run it again\n"


@pytest.mark.parametrize(("vocab", "size"), [("700", 700), ("bytes", 260)])
def test_the_trainer_needs_no_further_settings(
    vocab: str, size: int, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole pipeline on what was built, with DATA_PATH and nothing else that concerns data; then the artifact."""
    built = make(write_jsonl(tmp_path / "a.jsonl", make_texts(1500)), vocab=vocab, val_documents=20)
    given = {**TINY, "iterations": 3, "max_val_tokens": 256, "data_path": built.folder, "run_id": "a"}
    for name, value in given.items():
        if name != "vocab_size":
            monkeypatch.setenv(name.upper(), str(value))
    monkeypatch.chdir(tmp_path)
    t.main()
    lines = [json.loads(line) for line in Path("logs/a/metrics.jsonl").read_text().splitlines()]
    first = next(line["train_loss"] for line in lines if line["event"] == "train")
    assert abs(first - np.log(size)) < 0.2, "it begins at a uniform guess of this vocabulary"
    final = lines[-1]
    assert final["settings"]["vocab_size"] == size and final["settings"]["tokenizer_path"].startswith(str(built.folder))
    monkeypatch.setenv("EVAL_ONLY", "logs/a/final_model.bin")
    monkeypatch.setenv("RUN_ID", "b")
    for name in TINY.keys() & {n for n, knob in t.Hyperparameters.knobs().items() if isinstance(knob, t.ModelKnob)}:
        monkeypatch.delenv(name.upper(), raising=False)
    t.main()
    assert json.loads(Path("logs/b/submission.json").read_text())["val_bpb"] == final["val_bpb"]
