"""Proofs of data/verify.py: a good folder passes, and every kind of damage is found by the check meant for it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import build
import numpy as np
import pytest
import sentencepiece
import shards
import verify
from conftest import ROOT, SHARED

import train_gpt as t

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the challenge's data is not beside this checkout")
ONSETS, RIMES = "b d f g k l m n p r s t v z".split(), "a e i o u an el ir os um".split()
SHARD_TOKENS = 1_000
NAMES = ["headers", "manifest", "tokens", "documents", "overlap", "bytes", "fingerprint"]


def make_texts(count: int, seed: int) -> list[str]:
    """Returns documents of random words, some of them with what a small vocabulary has to spell in bytes."""
    draw = random.Random(seed)
    words = ["".join(draw.choice(ONSETS) + draw.choice(RIMES) for _ in range(draw.randint(1, 3))) for _ in range(500)]
    ends = ["", "", "", " naïve café", " 日本語", " 🦜 12 €", " a  b"]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) + draw.choice(ends) for _ in range(count)]


def build_folder(root: Path, name: str, vocab: str, seed: int = 0) -> Path:
    """Returns a folder that data/build.py made of 300 documents, 40 of them for validation."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(300, seed))
    (root / "documents.jsonl").write_text(lines)
    options = f"--dedup exact --val-documents 40 --shard-tokens {SHARD_TOKENS} --jobs 1"
    arguments = [str(root / "documents.jsonl"), "--name", name, "--vocab", vocab, "--root", str(root)]
    build.main([*arguments, *options.split()])
    return next((root / "datasets").glob(f"{name}_*"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by vocabulary, built once, which no test changes; `other` is of other documents."""
    root = tmp_path_factory.mktemp("verify")
    folders = {"bytes": build_folder(root, "good", "bytes"), "512": build_folder(root, "good", "512")}
    return folders | {"other": build_folder(root, "other", "512", seed=1)}


@pytest.fixture
def good(built: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the folder of 512 pieces, to be damaged."""
    return shutil.copytree(built["512"], tmp_path / built["512"].name)


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Looks at a folder in this process, and returns exit status, failed checks, and by check status and words."""

    def looked(folder: Path, *options: object) -> SimpleNamespace:
        arguments = [str(folder), "--json", *map(str, options)]
        status = verify.main(arguments if "--jobs" in arguments else [*arguments, "--jobs", "1"])
        result = json.loads(capsys.readouterr().out)
        checks = {check["check"]: check for check in result["checks"]}
        assert list(checks) == NAMES
        statuses = {name: check["status"] for name, check in checks.items()}
        assert result["failed"] == [name for name in NAMES if statuses[name] == "FAIL"]
        assert status == (1 if result["failed"] else 0)
        words = {name: "\n".join([check["found"], *check["findings"]]) for name, check in checks.items()}
        return SimpleNamespace(status=status, failed=result["failed"], statuses=statuses, words=words)

    return looked


# ---- what the tests read and write themselves, by the format's definition --------------------------------------------


def read(folder: Path, split: str) -> np.ndarray:
    """Returns the tokens of a split."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in paths])


def write(folder: Path, split: str, tokens: list[int] | np.ndarray, size: int = SHARD_TOKENS) -> None:
    """Writes a split anew in shards of `size` tokens."""
    for path in folder.glob(f"*_{split}_*.bin"):
        path.unlink()
    tokens = np.array(tokens, "<u2")
    for number, begin in enumerate(range(0, len(tokens), size)):
        part, header = tokens[begin : begin + size], np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / f"good_{split}_{number:06d}.bin").write_bytes(header.tobytes() + part.tobytes())


def documents_of(tokens: np.ndarray) -> list[list[int]]:
    """Returns the documents of a split, BOS first, by a plain loop."""
    documents: list[list[int]] = []
    for token in tokens.tolist():
        if token == 1:
            documents.append([])
        documents[-1].append(token)
    return documents


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reseal(folder: Path, figures: bool = False) -> None:
    """Makes the manifest agree with the shards: counts and hashes; documents and bytes too if that is wanted."""

    def change(manifest: dict) -> None:
        contents = {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}
        manifest["files"] = {
            name: {"tokens": len(content) // 2 - 512, "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for split, stated in manifest["splits"].items():
            tokens = read(folder, split)
            stated["tokens"] = len(tokens)
            if figures:
                documents = documents_of(tokens)
                num_bytes = sum(len(sp.decode(document).encode()) for document in documents)
                stated |= {"documents": len(documents), "bytes": num_bytes, "bytes_per_token": num_bytes / len(tokens)}

    edit_manifest(folder, change)


def spanning(folder: Path, split: str) -> int:
    """Returns how many documents go on in a next shard."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return sum(int(np.frombuffer(path.read_bytes()[1024:1026], "<u2")[0]) != 1 for path in paths[1:])


# ---- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", ["512", "bytes"])
def test_a_built_folder_passes_every_check_with_the_manifests_own_figures(
    vocab: str, built: dict[str, Path], look: Callable[..., SimpleNamespace]
) -> None:
    assert spanning(built[vocab], "train") > 5 and spanning(built[vocab], "val") >= 1
    found, manifest = look(built[vocab]), json.loads((built[vocab] / "manifest.json").read_text())
    assert found.status == 0
    assert found.statuses == {**dict.fromkeys(NAMES, "ok"), "fingerprint": "note"}, found.words
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert f"{train['tokens'] + val['tokens']:,} tokens" in found.words["headers"]
    assert found.words["documents"] == f"train {train['documents']}, val 40"
    assert f"val {val['bytes_per_token']:.4f} a token (all of 40 documents)" in found.words["bytes"]
    assert "0 of 40 validation documents" in found.words["overlap"]


def test_two_processes_find_what_one_finds(good: Path, look: Callable[..., SimpleNamespace]) -> None:
    tokens = read(good, "val")
    write(good, "train", [*read(good, "train"), *documents_of(tokens)[3], 1, 1, 3, 600])
    assert look(good, "--jobs", 2) == look(good, "--jobs", 1)


def test_the_table_has_a_row_for_each_check_and_a_finding_below_it(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "good_train_000001.bin").write_bytes(b"")
    assert verify.main([str(good)]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:2] for line in lines if line[0] != " "]
    assert rows == [["check", "found"], *map(list, zip(NAMES, ["FAIL", *["warn"] * 5, "note"]))]
    at = next(number for number, line in enumerate(lines) if line.startswith("headers"))
    assert lines[at + 1].strip() == "good_train_000001.bin has 0 bytes, less than a shard's header of 1024"


def test_long_work_says_on_standard_error_how_far_it_is(
    built: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "Progress", functools.partial(shards.Progress, every_seconds=0.0))
    assert verify.main([str(built["512"])]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(list(built["512"].glob("*.bin")))
    assert all(line.startswith("looking at shards: ") for line in lines) and lines[-1].endswith(", 0 s left")


def test_the_demonstration_corpus_passes(corpus: SimpleNamespace, look: Callable[..., SimpleNamespace]) -> None:
    found = look(corpus.data_path)
    assert found.statuses == {**dict.fromkeys(NAMES, "ok"), "fingerprint": "note"}, found.words
    assert "another text: a score on it is no challenge score" in found.words["fingerprint"]


# ---- what is wrong ---------------------------------------------------------------------------------------------------

TRAIN, VAL = "good_train_000002.bin", "good_val_000000.bin"


def change_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content[:-2], "declares"),
        (lambda content: content[:1000], "has 1000 bytes, less than a shard's header"),
        (lambda content: content + b"\0\0", "declares"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: b"\x89PNG" + content[4:], "is not a token shard"),
    ],
    ids=["truncated", "cut in its header", "oversized", "0 bytes", "foreign"],
)
@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_a_broken_shard_is_named_by_headers_alone_and_the_other_checks_go_on_without_it(
    change: Callable[[bytes], bytes], words: str, name: str, good: Path, look: Callable[..., SimpleNamespace]
) -> None:
    change_file(name, change)(good)
    found = look(good)
    assert found.failed == ["headers"], found.words
    assert re.search(f"^{name}.*{words}", found.words["headers"], re.M)
    others = [other for other in NAMES[1:] if found.statuses[other] not in ("skipped", "note")]
    assert others and all(found.statuses[other] == "warn" for other in others)
    assert all(f"without {name}" in found.words[other] for other in others)


def test_all_broken_shards_are_counted_and_the_first_ones_shown(
    good: Path, look: Callable[..., SimpleNamespace]
) -> None:
    broken = sorted(good.glob("*_train_*.bin"))[:8]
    for path in broken:
        path.write_bytes(b"")
    lines = look(good).words["headers"].splitlines()[1:]
    assert [line.split()[0] for line in lines[:-1]] == [path.name for path in broken[:5]] and lines[
        -1
    ] == "… and 3 more"


@pytest.mark.parametrize("cut, words", [(501, "cannot be read"), (500, "changed while it was read")])
def test_a_shard_that_changes_meanwhile_is_named_by_headers(
    cut: int, words: str, good: Path, look: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = shards.read_num_tokens

    def read_then_cut(path: Path) -> int:
        num_tokens = once(path)
        if path.name == TRAIN:  # as another process might, between two looks
            path.write_bytes(path.read_bytes()[:-cut])
        return num_tokens

    monkeypatch.setattr(shards, "read_num_tokens", read_then_cut)
    found = look(good)
    assert found.failed == ["headers"] and re.search(f"^{TRAIN} {words}", found.words["headers"], re.M)


def test_what_is_on_both_sides_of_a_broken_shard_is_no_document(
    good: Path, look: Callable[..., SimpleNamespace]
) -> None:
    document, train = max(documents_of(read(good, "val")), key=len), read(good, "train")
    half, size = len(document) // 2, 500
    begin = size - half  # the first half ends a shard, the second one begins the next but one
    around = [1, *[300] * (begin - 1), *document[:half], *[300] * size, *document[half:], *train]
    write(good, "train", around, size)
    (good / "manifest.json").unlink()
    (good / "good_train_000001.bin").write_bytes(b"")
    found = look(good, "--tokenizer", good / "tokenizer.model")
    assert found.failed == ["headers"] and found.words["overlap"].startswith("0 of 40 ")


def test_a_file_of_both_splits_and_one_of_none_are_named(good: Path, look: Callable[..., SimpleNamespace]) -> None:
    shutil.copy(good / TRAIN, good / "x_train_0_val_0.bin")
    shutil.copy(good / TRAIN, good / "fineweb-train.bin")
    words = look(good).words["headers"]
    assert "x_train_0_val_0.bin is both" in words and "fineweb-train.bin is in no split" in words


def put(split: str, place: int, token: int) -> Callable[[Path], None]:
    """Returns a damage: another token somewhere, in shards that the manifest agrees with."""

    def damage(folder: Path) -> None:
        tokens = read(folder, split).copy()
        place_of = next(i for i in itertools.count(place) if tokens[i] != 1 and tokens[i - 1] != 1)
        tokens[place_of] = token
        write(folder, split, tokens)
        reseal(folder)

    return damage


def empty_document(split: str, place: str) -> Callable[[Path], None]:
    """Returns a damage: a BOS more, before another or at the end; the manifest agrees but for that."""

    def damage(folder: Path) -> None:
        tokens = read(folder, split)
        starts = np.flatnonzero(tokens == 1)
        at = {"middle": int(starts[5]), "end": len(tokens), "boundary": int(starts[5])}[place]
        write(folder, split, np.insert(tokens, at, 1), at + 1 if place == "boundary" else SHARD_TOKENS)
        reseal(folder)
        edit_manifest(folder, lambda m: m["splits"][split].update(documents=m["splits"][split]["documents"] + 1))

    return damage


def no_first_bos(folder: Path) -> None:
    tokens = read(folder, "train").copy()
    tokens[0] = 300
    write(folder, "train", tokens)
    reseal(folder)
    edit_manifest(folder, lambda m: m["splits"]["train"].update(documents=m["splits"]["train"]["documents"] - 1))


def leak(where: str) -> Callable[[Path], None]:
    """Returns a damage: the sixth validation document also in training, in a manifest that agrees with it all."""

    def damage(folder: Path) -> None:
        document, tokens = documents_of(read(folder, "val"))[5], read(folder, "train")
        at = len(tokens) if where == "end" else int(np.flatnonzero(tokens == 1)[9])
        size = {"inside": 10**6, "end": 10**6, "two shards": at + 3, "many shards": 40, "a shard's begin": at}[where]
        write(folder, "train", np.insert(tokens, at, document), size)
        reseal(folder, figures=True)

    return damage


def manifest_says(*keys: str, value: object) -> Callable[[Path], None]:
    """Returns a damage: another value in the manifest."""

    def change(manifest: dict) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return lambda folder: edit_manifest(folder, change)


DAMAGES: list[tuple[str, Callable[[Path], object], list[str], str]] = [
    (
        "an id that no piece has",
        put("train", 1500, 512),
        ["tokens"],
        r"_train_000001.bin: an id beyond the vocabulary at token .* 1 in all$",
    ),
    (
        "a very large id",
        put("val", 50, 65535),
        ["tokens"],
        r"^good_val_000000.bin: an id beyond the vocabulary at token .* 1 in all$",
    ),
    ("unk", put("val", 1100, 3), ["tokens"], r"^good_val_000001.bin: unk \(3\) at token 10\d, 1 in all$"),
    ("pad", put("train", 1500, 0), ["tokens"], r"^good_train_000001.bin: pad \(0\) at "),
    ("eos", put("train", 1500, 2), ["tokens"], r"^good_train_000001.bin: eos \(2\) at "),
    ("an empty document", empty_document("train", "middle"), ["documents"], "_train_000000.bin: an empty document at "),
    ("BOS at the end", empty_document("val", "end"), ["documents"], "_val_.*: an empty document at "),
    (
        "two BOS in two shards",
        empty_document("train", "boundary"),
        ["documents"],
        "_train_000000.bin: an empty document at",
    ),
    ("no BOS first", no_first_bos, ["documents"], "^good_train_000000.bin begins with token 300, not with BOS"),
    ("documents miscounted", manifest_says("splits", "val", "documents", value=41), ["documents"], "val has 40 .* 41"),
    ("another count", manifest_says("files", TRAIN, "tokens", value=999), ["manifest"], f"^{TRAIN} has 1,000 .* 999"),
    (
        "another hash",
        manifest_says("files", TRAIN, "sha256", value="0" * 64),
        ["manifest"],
        f"^{TRAIN} has another SHA",
    ),
    (
        "another total",
        manifest_says("splits", "val", "tokens", value=7),
        ["manifest"],
        "its val shards have .* split 7",
    ),
    ("no totals", manifest_says("splits", value=[]), ["manifest"], "its split None"),
    ("no manifest of ours", manifest_says("files", value=3), ["manifest"], "is not a manifest of this project"),
    ("a missing file", lambda f: (f / TRAIN).unlink(), ["manifest"], f"^{TRAIN} is missing"),
    (
        "a file more",
        lambda f: shutil.copy(f / TRAIN, f / "x_train_9.bin"),
        ["manifest"],
        "^x_train_9.bin is not listed",
    ),
    (
        "no tokenizer",
        lambda f: (f / "tokenizer.model").unlink(),
        ["manifest"],
        "the tokenizer tokenizer.model is missing",
    ),
    ("another vocabulary", manifest_says("tokenizer", "vocab_size", value=513), ["manifest"], "has 512 pieces, .* 513"),
    ("a leak", leak("inside"), ["overlap"], "^good_train_000000.bin at token .* is good_val_000000.bin at token "),
    ("a leak at the end", leak("end"), ["overlap"], "^1 of 40 validation documents in training, 1 times"),
    (
        "a leak over two shards",
        leak("two shards"),
        ["overlap"],
        "^good_train_000000.bin at token .* is good_val_000000",
    ),
    ("a leak over many shards", leak("many shards"), ["overlap"], "^1 of 40 validation documents in training, 1 times"),
    (
        "a leak that begins a shard",
        leak("a shard's begin"),
        ["overlap"],
        "^good_train_000001.bin at token 0 is good_val",
    ),
    ("bytes a token of val", manifest_says("splits", "val", "bytes_per_token", value=2.5), ["bytes"], "says 2.5$"),
    ("bytes a token of train", manifest_says("splits", "train", "bytes_per_token", value=2.5), ["bytes"], "says 2.5$"),
    ("bytes of val", manifest_says("splits", "val", "bytes", value=77), ["bytes"], r"val has bytes \d+, .* says 77$"),
]


@pytest.mark.parametrize("damage, failed, words", [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_found_by_the_check_meant_for_it_and_by_no_other(
    damage: Callable[[Path], object], failed: list[str], words: str, good: Path, look: Callable[..., SimpleNamespace]
) -> None:
    damage(good)
    found = look(good, "--all")
    assert found.failed == failed, found.words
    assert re.search(words, found.words[failed[0]], re.M), found.words[failed[0]]
    assert "warn" not in found.statuses.values()


def test_a_swapped_tokenizer_is_found_and_nothing_is_decoded_with_it(
    good: Path, built: dict[str, Path], look: Callable[..., SimpleNamespace]
) -> None:
    shutil.copy(built["other"] / "tokenizer.model", good)
    found = look(good)
    assert found.failed == ["manifest"]
    assert "the tokenizer tokenizer.model has another SHA-256" in found.words["manifest"]
    assert (found.statuses["bytes"], found.words["bytes"]) == ("skipped", "the tokenizer is not the manifest's")


def test_a_file_that_is_no_tokenizer_fails_bytes(good: Path, look: Callable[..., SimpleNamespace]) -> None:
    (good / "manifest.json").unlink()
    (good / "tokenizer.model").write_bytes(b"no model")
    found = look(good, "--tokenizer", good / "tokenizer.model")
    assert found.failed == ["bytes"] and "is not a SentencePiece model" in found.words["bytes"]


def test_what_could_not_be_measured_is_skipped_and_not_called_right(
    good: Path, built: dict[str, Path], look: Callable[..., SimpleNamespace]
) -> None:
    (good / "manifest.json").unlink()
    for split in ("train", "val"):
        tokens = read(good, split)
        write(good, split, np.where(tokens == 1, 1, 400))
    found = look(good, "--tokenizer", built["bytes"] / "tokenizer.model")
    assert found.statuses["bytes"] == "skipped" and "no document could be measured" in found.words["bytes"]
    assert "tokens" in found.failed


@pytest.mark.parametrize("lut, change", [(0, lambda x: x + (x == 2)), (1, lambda x: ~x), (2, lambda x: x | True)])
def test_a_wrong_count_of_bytes_fails_bytes_and_names_a_document(
    lut: int,
    change: Callable,
    good: Path,
    look: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = t.build_sentencepiece_luts

    def wrong(*arguments: object) -> tuple:
        luts = list(right(*arguments))
        luts[lut] = change(luts[lut])
        return tuple(luts)

    monkeypatch.setattr(t, "build_sentencepiece_luts", wrong)
    edit_manifest(
        good, lambda m: [split.pop("bytes") and split.pop("bytes_per_token") for split in m["splits"].values()]
    )
    found = look(good)
    assert found.failed == ["bytes"]
    assert re.search(
        r"^good_val_000000.bin: .* at token \d+ \(\d+ counted, \d+ in its text\), \d+ in all$",
        found.words["bytes"],
        re.M,
    )


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [11, 200, 10**6])
@pytest.mark.parametrize("piece_bytes", [34, 8 << 20])
def test_documents_overlap_and_bytes_are_those_of_plain_loops_for_any_size_of_shards_and_pieces(
    size: int, piece_bytes: int, good: Path, look: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", piece_bytes)
    draw, val, train = random.Random(size), documents_of(read(good, "val")), documents_of(read(good, "train"))[:60]
    val += [val[0], val[7]]  # copies within validation: a note only
    leaked = draw.sample(val, 6)
    train += [*leaked, leaked[0], val[2][:-1], [*val[3], 300]]  # the last two only resemble one
    draw.shuffle(train)
    for split, documents in (("train", train), ("val", val)):
        write(good, split, list(itertools.chain(*documents)), size)
    (good / "manifest.json").unlink()

    found = look(good, "--tokenizer", good / "tokenizer.model", "--all")
    assert found.words["documents"] == f"train {len(train)}, val {len(val)}"
    distinct = {tuple(document) for document in val}
    times = [tuple(document) for document in train if tuple(document) in distinct]
    first = f"{len(set(times))} of {len(distinct)} validation documents in training, {len(times)} times"
    assert found.words["overlap"].startswith(f"{first}; {len(val) - len(distinct)} copies in validation")
    place = 0
    for document in train:
        if tuple(document) in distinct:
            break
        place += len(document)
    assert f"good_train_{place // size:06d}.bin at token {place % size:,} is good_val_" in found.words["overlap"]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(good / "tokenizer.model"))
    for split, documents in (("train", train), ("val", val)):
        ratio = sum(len(sp.decode(d).encode()) for d in documents) / sum(map(len, documents))
        assert f"{split} {ratio:.4f} a token (all of {len(documents)} documents)" in found.words["bytes"]
    assert found.failed == ["overlap"]


def test_a_sample_of_training_is_the_first_piece_of_the_first_shard_of_each_tenth(
    good: Path, look: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", 200)
    tokens = read(good, "train")
    write(good, "train", tokens[: 300 * 25], 300)
    reseal(good)
    starts = [place for place in np.flatnonzero(tokens[: 300 * 25] == 1).tolist()]
    chosen = {25 * tenth // 10 for tenth in range(10)}
    expected = sum(place // 300 in chosen and place % 300 < 100 for place in starts)
    assert f"({expected} of {len(starts)} documents)" in look(good).words["bytes"]
    assert f"(all of {len(starts)} documents)" in look(good, "--all").words["bytes"]


def test_the_place_of_an_id_is_counted_from_the_shards_begin_over_all_pieces(
    good: Path, look: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", 34)
    tokens = read(good, "train").copy()
    tokens[[2_345, 2_346, 2_800]] = 3
    write(good, "train", tokens)
    assert "good_train_000002.bin: unk (3) at token 345, 3 in all" in look(good).words["tokens"].splitlines()


@pytest.mark.parametrize("room", [100, 1_400])  # tokens in its first shard: below and above the limit
def test_a_document_without_end_is_named_and_not_held_in_memory(
    room: int, good: Path, look: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", 200)
    monkeypatch.setattr(verify, "LONGEST", 500)
    longest: list[int] = []
    look_at = verify.Inspector.look_at_documents

    def watched(self: verify.Inspector, number: int, position: int, tokens: np.ndarray, *rest: object) -> None:
        longest.append(len(tokens))
        look_at(self, number, position, tokens, *rest)

    monkeypatch.setattr(verify.Inspector, "look_at_documents", watched)
    train, val = documents_of(read(good, "train")), documents_of(read(good, "val"))
    size = len(list(itertools.chain(*train[:9]))) + room
    endless = [1, *[300] * 20_000]
    write(good, "train", list(itertools.chain(*train[:9], endless, *train[9:30], val[1], endless)), size)
    reseal(good)
    edit_manifest(good, lambda m: m["splits"]["train"].pop("documents"))
    found = look(good)
    assert found.failed == ["overlap"] and found.statuses["documents"] == "warn"
    assert found.words["documents"].count("a document too long to look into") == 2
    assert max(longest) <= 500 + 2 * 100


# ---- the end of a split, and which text it is ------------------------------------------------------------------------


@pytest.mark.parametrize("place, failed", [("end", []), ("middle", ["bytes"])])
def test_only_a_splits_last_document_may_be_cut_inside_of_a_character(
    place: str, failed: list[str], built: dict[str, Path], tmp_path: Path, look: Callable[..., SimpleNamespace]
) -> None:
    folder = shutil.copytree(built["bytes"], tmp_path / "good_byte260")
    tokens = read(folder, "val").tolist()
    cut = [1, *(byte + 4 for byte in "a 🦜".encode()[:-1])]
    write(folder, "val", [*tokens, *cut] if place == "end" else [*cut, *tokens])
    (folder / "manifest.json").unlink()
    found = look(folder, "--tokenizer", folder / "tokenizer.model")
    assert found.failed == failed, found.words
    assert place == "end" or "at token 0 (5 counted, " in found.words["bytes"]


PUBLISHED = [(1024, 62_021_632), (4096, 45_508_608), (4096, 45_514_752), (8192, 40_540_160)]
WHOLE, PART, ANOTHER = (
    "the challenge's validation set",
    "a part of the challenge's validation set (41,600 of 50,000 documents)",
    "another text: a score on it is no challenge score",
)


@pytest.mark.parametrize(
    "vocab_size, num_targets, num_documents, num_bytes, begins, status, words",
    [
        *((v, n, 50_000, 151_060_000, True if v == 1024 else None, "ok", WHOLE + " (") for v, n in PUBLISHED),
        *((v, n, 50_000, None, True if v == 1024 else None, "ok", WHOLE + " (") for v, n in PUBLISHED),
        (260, 151_072_768, 50_000, 151_030_000, None, "ok", WHOLE + ", by documents and bytes ("),
        (8192, 40_500_000, 50_000, 151_060_000, None, "warn", WHOLE + ", by documents and bytes ("),
        (1024, 50_000_000, 41_600, 125_000_000, True, "warn", PART),
        (1024, 62_021_632, 50_000, 151_060_000, False, "note", ANOTHER),
        (8192, 36_500_000, 41_600, 125_000_000, None, "note", ANOTHER),
        (8192, 40_540_160, 50_000, 176_300_000, None, "note", ANOTHER),
        (8192, 40_540_160, 49_999, 151_060_000, None, "note", ANOTHER),
        (4096, 40_540_160, 50_000, None, None, "note", ANOTHER),
        (260, 151_072_768, 50_000, None, None, "note", ANOTHER),
    ],
)
def test_the_fingerprint_says_which_text_it_is(
    vocab_size: int,
    num_targets: int,
    num_documents: int,
    num_bytes: int | None,
    begins: bool | None,
    status: str,
    words: str,
) -> None:
    found = verify.fingerprint(vocab_size, num_targets, num_documents, num_bytes, begins)
    assert found[0] == status and found[1].startswith(words)


@needs_shared
def test_the_challenges_real_data_passes_and_is_recognised_as_a_part(look: Callable[..., SimpleNamespace]) -> None:
    found = look(SHARED / "bench_web", "--tokenizer", SHARED / "fineweb_1024_bpe.model")
    assert found.status == 0
    assert found.words["fingerprint"] == "a part of the challenge's validation set (902 of 50,000 documents)"
    fine = dict.fromkeys(NAMES, "ok")
    assert found.statuses == {**fine, "manifest": "skipped", "fingerprint": "warn"}, found.words
    assert "(all of 902 documents)" in found.words["bytes"]


@needs_shared
@pytest.mark.parametrize(
    "tokens, changed, status, words",
    [
        (523 + 1259 + 331 + 1759 + 400, None, "warn", r"a part .* \(\d of 50,000 documents\)"),
        (100_000, None, "warn", r"a part of the challenge's validation set \(\d+ of 50,000 documents\)"),
        (100_000, 4_000, "note", "another text"),
        (4_000, None, "note", "another text"),  # shorter than what is known: nothing is claimed
    ],
)
def test_a_subset_in_the_challenges_folders_is_recognised_with_the_tokenizer_found_by_name(
    tokens: int,
    changed: int | None,
    status: str,
    words: str,
    tmp_path: Path,
    look: Callable[..., SimpleNamespace],
) -> None:
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").symlink_to(SHARED / "fineweb_1024_bpe.model")
    val = read(SHARED / "bench_web", "val")[:tokens].copy()
    if changed:
        val[changed] = 300 + val[changed] % 7
    write(folder, "val", val, 30_000)
    write(
        folder,
        "train",
        np.frombuffer((SHARED / "bench_web" / "fineweb_train_000000.bin").read_bytes()[1024:9000], "<u2"),
    )
    found = look(folder)
    assert found.failed == [] and found.statuses["bytes"] == "ok", found.words
    assert found.statuses["fingerprint"] == status and re.match(words, found.words["fingerprint"])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["{}", "--tokenizer", "nowhere"], ["{}", "--jobs", "-1"], ["{}", "--jobs", "x"], ["{}", "--tables"]],
    ids=" ".join,
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.main([argument.format(tmp_path) for argument in arguments])
    assert ended.value.code == 2


def test_an_empty_folder_fails_and_says_what_is_missing(tmp_path: Path, look: Callable[..., SimpleNamespace]) -> None:
    found = look(tmp_path)
    assert found.failed == ["headers"] and "there is no *_val_*.bin" in found.words["headers"]
    assert "data/build.py make one" in found.words["manifest"] and found.statuses["manifest"] == "skipped"
    assert {found.statuses[name] for name in NAMES if name != "headers"} == {"skipped"}, "nothing was looked at"


def test_ten_thousand_shards_need_no_more_open_files_than_a_few(built: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(built["512"], tmp_path / "good_sp512")
    train = documents_of(read(folder, "train"))
    document = next(document for document in train if len(document) > 20)[:20]
    count = 10_000
    write(folder, "train", document * count, 20)
    write(folder, "val", read(folder, "val"), 20)
    (folder / "manifest.json").unlink()
    command = f"ulimit -n 256; exec {sys.executable} {ROOT / 'data' / 'verify.py'} {folder} --json --jobs 1"
    command += f" --tokenizer {folder / 'tokenizer.model'}"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    checks = {check["check"]: check["found"] for check in json.loads(done.stdout)["checks"]}
    assert checks["headers"].startswith("10,000 train") and checks["documents"] == "train 10,000, val 40"
