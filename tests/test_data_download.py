"""data/download.py against a server on this machine that speaks the Hub's protocol, with its mishaps."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import download
import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import pytest
import shards
from conftest import ROOT

import train_gpt as t

REPO, COMMIT, NAME = "someone/export", "c0ffee" + "0" * 34, "fineweb10B_sp1024"
FOLDER = f"datasets/{NAME}"
TRAIN = [f"{FOLDER}/fineweb_train_{i:06d}.bin" for i in range(4)]
VAL, MODEL, VOCAB = f"{FOLDER}/fineweb_val_000000.bin", "tokenizers/fineweb_1024_bpe.model", "tokenizers/fineweb.vocab"
ALL = {*TRAIN, VAL, MODEL, VOCAB}
PIECE = 1 << 16  # bytes that the server sends at a time


# ---- a Hub on this machine -------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a path is answered with in place of its content: a status, or a body that ends or stalls too early."""

    status: int = 200
    body: bytes | None = None
    stop_after: int | None = None  # bytes, then the connection ends
    stall_after: int | None = None  # bytes, then nothing more comes
    ignore_range: bool = False
    honest_length: bool = False  # Content-Length says what is sent


class Request(NamedTuple):
    """A request for content as it arrived, and the bytes of content that were sent."""

    path: str
    range: str | None
    token: str | None
    sent: int


class Hub:
    """One repository at one commit: an API and a content server on two ports, so on two origins."""

    def __init__(self, files: dict[str, bytes], manifest: dict[str, Any]):
        self.files, self.manifest = dict(files), json.loads(json.dumps(manifest))
        self.answers: dict[str, list[Answer]] = {}  # the first ones to come; the last one stays if `forever`
        self.forever: dict[str, Answer] = {}
        self.status, self.resolved, self.asked = 200, 0, []
        self.requests: list[Request] = []
        self.api_tokens: set[str | None] = set()
        self.released = threading.Event()
        self.pace: float | None = None  # bytes a second on each connection
        self.lock, self.num_sent = threading.Lock(), 0  # bytes of content that have left, also to who is gone by now
        self.servers = [self.serve(self.api), self.serve(self.content)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def serve(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
                    answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def close(self) -> None:
        self.released.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def tree(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "datasets/datasets", "oid": "0", "size": 0}]
        for path, body in {**self.files, "manifest.json": json.dumps(self.manifest).encode()}.items():
            entry = {
                "type": "file",
                "path": f"datasets/{path}",
                "oid": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(),
            }
            entry["size"] = len(body)
            if path.endswith((".bin", ".model", ".jsonl")):
                entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
            entries.append(entry)
        return entries

    def api(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        path = unquote(url.path)
        self.asked.append(path)
        if not path.startswith((f"/api/datasets/{REPO}/", f"/datasets/{REPO}/resolve/{COMMIT}/datasets/")):
            reply(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif self.status != 200:
            reply(handler, self.status, b"{}")
        elif path.endswith("/revision/main"):
            self.resolved += 1
            reply(handler, 200, json.dumps({"id": REPO, "sha": COMMIT}).encode())
        elif path.endswith((f"/tree/{COMMIT}/datasets", f"/tree/{COMMIT}")):  # in pages of three
            entries, first = self.tree(), int(url.query.partition("cursor=")[2] or 0)
            more = f'<{self.endpoint}{url.path}?recursive=true&cursor={first + 3}>; rel="next"'
            headers = {"Link": more} if first + 3 < len(entries) else {}
            reply(handler, 200, json.dumps(entries[first : first + 3]).encode(), headers)
        elif path.endswith("/datasets/manifest.json"):
            reply(handler, 200, json.dumps(self.manifest).encode())
        elif "/resolve/" in path:
            self.api_tokens.add(handler.headers.get("Authorization"))
            name = path.partition(f"{COMMIT}/datasets/")[2]
            known = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(self.files[name]))}
            known["X-Linked-ETag"] = f'"{hashlib.sha256(self.files[name]).hexdigest()}"'
            reply(handler, 302, b"", {"Location": f"{self.cdn}/{name}", **known})
        else:
            reply(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def content(self, handler: BaseHTTPRequestHandler) -> None:
        path, wanted = unquote(handler.path[1:]), handler.headers.get("Range")
        queue = self.answers.get(path)
        answer = queue.pop(0) if queue else self.forever.get(path, Answer())
        body = self.files[path] if answer.body is None else answer.body
        if self.pace:  # what is on its way when a client is killed is to be little
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
        start = int(wanted[6:-1]) if wanted and not answer.ignore_range else 0
        rest = body[start : start + answer.stop_after] if answer.stop_after is not None else body[start:]
        if answer.status != 200:
            self.requests.append(Request(path, wanted, handler.headers.get("Authorization"), 0))
            reply(handler, answer.status, b"no")
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(rest) if answer.honest_length else len(body) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.end_headers()
        rest = rest if answer.stall_after is None else rest[: answer.stall_after]
        self.requests.append(Request(path, wanted, handler.headers.get("Authorization"), len(rest)))
        for begin in range(0, len(rest), PIECE):
            piece = rest[begin : begin + PIECE]
            handler.wfile.write(piece)
            with self.lock:
                self.num_sent += len(piece)
            if self.pace:
                time.sleep(len(piece) / self.pace)
        if answer.stall_after is not None:
            self.released.wait(20)

    def fetched(self) -> list[str]:
        """The paths of which content was asked, sorted."""
        return sorted(request.path for request in self.requests)


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def pack(tokens: np.ndarray) -> bytes:
    return shards.shard_header(len(tokens)) + tokens.astype("<u2").tobytes()


def export_of(corpus: SimpleNamespace) -> SimpleNamespace:
    """Returns a small export in the published form: real text, a real tokenizer."""
    text = np.array(shards.open_shard(next(corpus.data_path.glob("*_train_000000.bin"))))
    files = {path: pack(text[i * 20000 : (i + 1) * 20000]) for i, path in enumerate([*TRAIN, VAL])}
    files |= {MODEL: corpus.tokenizer_path.read_bytes(), VOCAB: b"piece\t0\n"}
    stats = {"docs_train": 30, "docs_val": 7, "files_train": 4, "files_val": 1, "tokens_train": 80000}
    dataset = {"name": NAME, "tokenizer_name": "sp_bpe_1024", "vocab_size": 1024, "stats": stats}
    absent = {"name": "fineweb10B_byte260", "tokenizer_name": "pure_byte_260", "vocab_size": 260, "stats": {}}
    tokenizers = [
        {"name": "sp_bpe_1024", "kind": "sentencepiece_bpe", "model_path": MODEL, "vocab_path": VOCAB},
        {"name": "pure_byte_260", "kind": "byte", "path": "tokenizers/fineweb_pure_byte_260.json"},
    ]
    manifest = {"version": "1", "docs_meta": {}, "tokenizers": tokenizers, "datasets": [dataset, absent]}
    return SimpleNamespace(files=files, manifest=manifest)


@pytest.fixture(scope="module")
def published(corpus: SimpleNamespace) -> SimpleNamespace:
    return export_of(corpus)


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has huggingface_hub ask there: HF_ENDPOINT is read only once in a process."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(published: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, and this process's huggingface_hub pointed to it, with short waits."""
    hub = Hub(published.files, published.manifest)
    point_to(hub.endpoint, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power failure is tested, and disks are slow
    yield hub
    hub.close()
    huggingface_hub.utils.close_session()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


class Result(NamedTuple):
    """How a call ended: its error message, empty if none, and what it printed."""

    error: str
    out: str
    err: str


@pytest.fixture
def run(root: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the tool in this process."""

    def call(*options: str) -> Result:
        hub.requests.clear()
        error = ""
        try:
            download.main(["--repo", REPO, "--root", str(root), "--train-shards", "4", *options])
        except SystemExit as exit:
            error = str(exit.code)
        return Result(error, *capsys.readouterr())

    return call


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Returns the environment of a process that takes this server for the Hub and has a home of its own."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return given | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def start(hub: Hub, root: Path, *options: str) -> subprocess.Popen[str]:
    """Starts the tool as a real process."""
    command = [sys.executable, str(ROOT / "data/download.py"), "--repo", REPO, "--root", str(root), *options]
    pipe, before = subprocess.PIPE, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # what a shell starts in the background ignores SIGINT, and so would its children
        given = environment(hub, root.parent / "home")
        return subprocess.Popen(command, env=given, cwd=root.parent, text=True, stdout=pipe, stderr=pipe)
    finally:
        signal.signal(signal.SIGINT, before)


def contents(root: Path) -> dict[str, bytes]:
    """All files below the root except our manifest, by path."""
    paths = (path for path in root.rglob("*") if path.is_file() and path != root / FOLDER / "manifest.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def assert_all_there(hub: Hub, root: Path, paths: set[str] = ALL) -> None:
    assert contents(root) == {path: hub.files[path] for path in paths}, "missing, changed or left over"
    manifest = shards.read_manifest(root / FOLDER)
    assert manifest is not None
    expected = {Path(path).name: hashlib.sha256(hub.files[path]).hexdigest() for path in paths if path[-4:] == ".bin"}
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == expected
    assert not list(root.rglob("*.tmp")) and not (root / ".download").exists()


def assert_nothing_unchecked(hub: Hub, root: Path) -> None:
    """Under a final name there is the export's content or no file."""
    found = {path: body for path, body in contents(root).items() if not path.startswith(".download/")}
    assert all(body == hub.files[path] for path, body in found.items()), sorted(found)


def fill(hub: Hub, root: Path, paths: set[str] = ALL) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(hub.files[path])


# ---- whole and nothing twice -----------------------------------------------------------------------------------------


def test_a_new_machine_gets_every_file_bit_for_bit_and_the_trainer_reads_them(hub: Hub, root: Path) -> None:
    with start(hub, root, "--train-shards", "4", "--jobs", "3") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert_all_there(hub, root)
    assert hub.fetched() == sorted(ALL) and sum(r.sent for r in hub.requests) == sum(map(len, hub.files.values()))
    h = t.apply_manifest(t.Hyperparameters(data_path=str(root / FOLDER)))  # which is all that a user has to say
    assert h.vocab_size == 1024 and Path(h.tokenizer_path).samefile(root / MODEL)
    assert [len(shard) for shard in t.load_shards(h, "train")] == [20000] * 4
    assert len(t.load_shards(h, "val")) == 1 and t.load_tokenizer(h.tokenizer_path, 1024).vocab_size() == 1024
    assert re.search(r"train +4 of 4 +80,000 +0\.000\nval +1 of 1 +20,000 +0\.000\n", out), out
    assert "fetched 7 files, " in out and err == ""
    assert f"train with: DATA_PATH={root / FOLDER} torchrun --standalone --nproc_per_node=8 train_gpt.py" in out


def test_the_manifest_says_what_is_in_the_folder_and_where_it_comes_from(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    run("--train-shards", "2")
    manifest = json.loads((root / FOLDER / "manifest.json").read_text())
    sha256 = hashlib.sha256(hub.files[MODEL]).hexdigest()
    expected = {"path": f"../../{MODEL}", "vocab_size": 1024, "sha256": sha256}
    assert manifest["name"] == NAME and manifest["tokenizer"] == expected
    two_of_four = {"shards": 2, "tokens": 40000}  # the published number of documents counts all four
    assert manifest["splits"] == {"train": two_of_four, "val": {"shards": 1, "tokens": 20000, "documents": 7}}
    files = {
        Path(path).name: {"tokens": 20000, "sha256": hashlib.sha256(hub.files[path]).hexdigest()}
        for path in (*TRAIN[:2], VAL)
    }
    assert manifest["files"] == files
    (source,) = manifest["sources"]
    assert (source["repo"], source["revision"]) == (REPO, COMMIT) and "ODC-BY 1.0" in source["licence"]
    run("--train-shards", "4")
    assert json.loads((root / FOLDER / "manifest.json").read_text())["splits"]["train"]["documents"] == 30


def test_the_byte_level_variant_gets_a_model_that_says_what_its_json_says(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    folder, path = "datasets/fineweb10B_byte260", "tokenizers/fineweb_pure_byte_260.json"
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    text = np.array([1, *(4 + byte for byte in "naïve bytes ".encode() * 99)])
    hub.files |= {f"{folder}/fineweb_{split}_000000.bin": pack(text) for split in ("train", "val")}
    hub.files[path] = json.dumps({"tokenizer_type": "pure_byte", "config": config, "vocab_size": 260}).encode()
    assert run("--variant", "byte260", "--train-shards", "1").error == ""
    val = t.load_validation_tokens(t.apply_manifest(t.Hyperparameters(data_path=str(root / folder), eval_seq_len=64)))
    assert val.num_bytes == val.num_targets == (len(text) - 1) // 64 * 64
    assert "all was there already" in run("--variant", "byte260", "--train-shards", "1").out
    hub.files[path] = hub.files[path].replace(b'"byte_offset": 4', b'"byte_offset": 3')
    error = run("--variant", "byte260", "--train-shards", "1").error
    assert "fineweb_pure_byte_260.json is not the byte-level vocabulary of 4 + 256 ids" in error


def test_a_second_call_fetches_nothing_and_says_so(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    assert run().error == ""
    (root / FOLDER / "manifest.json.77.tmp").write_bytes(b"{")  # of a process that was killed in the middle of it
    second = run()
    assert second.error == "" and "all was there already" in second.out and hub.requests == []
    assert_all_there(hub, root)


def test_revision_manifest_and_content_are_those_of_one_commit(hub: Hub, run: Callable[..., Result]) -> None:
    run()  # the server knows content, tree and manifest of that commit only
    assert hub.resolved == 1 and sum("/resolve/" in path for path in hub.asked) == len(ALL) + 1


def test_missing_and_broken_files_are_fetched_and_no_others(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    fill(hub, root)
    (root / TRAIN[0]).unlink()
    (root / TRAIN[1]).write_bytes(b"")
    (root / TRAIN[2]).write_bytes(hub.files[TRAIN[2]][:-2])
    damaged = bytearray(hub.files[VAL])
    damaged[5000] ^= 1
    (root / VAL).write_bytes(damaged)
    (root / MODEL).write_bytes(hub.files[MODEL][::-1])
    result = run()
    assert result.error == "" and hub.fetched() == sorted([*TRAIN[:3], VAL, MODEL])
    for path, reason in ((TRAIN[1], "0 bytes"), (TRAIN[2], "bytes, in the export"), (VAL, "SHA"), (MODEL, "SHA-256")):
        assert re.search(rf"broken: {re.escape(str(root / path))} has {'.*' + reason}", result.out), result.out
    assert "fetched 5 files" in result.out and "; 2 were there" in result.out
    assert_all_there(hub, root)


def test_a_prefix_of_the_shards_is_taken_and_none_is_allowed(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    assert run("--train-shards", "0").error == ""
    assert_all_there(hub, root, {VAL, MODEL, VOCAB})
    assert run("--train-shards", "3").error == "" and hub.fetched() == TRAIN[:3]
    assert_all_there(hub, root, {*TRAIN[:3], VAL, MODEL, VOCAB})


def test_shards_beyond_those_asked_for_stay_are_checked_and_listed(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    fill(hub, root, {TRAIN[2]})
    (root / TRAIN[3]).write_bytes(hub.files[TRAIN[3]][:3000])  # the trainer would read this one too
    assert run("--train-shards", "1").error == ""
    assert hub.fetched() == sorted([TRAIN[0], TRAIN[3], VAL, MODEL, VOCAB])
    assert_all_there(hub, root, ALL - {TRAIN[1]})


# ---- networks that fail ----------------------------------------------------------------------------------------------


def test_a_dropped_connection_goes_on_by_range_and_no_byte_comes_twice(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.answers[TRAIN[1]] = [Answer(stop_after=15001), Answer(stop_after=7000)]
    assert run().error == ""
    requests = [request for request in hub.requests if request.path == TRAIN[1]]
    assert [request.range for request in requests] == [None, "bytes=15001-", "bytes=22001-"]
    assert sum(request.sent for request in requests) == len(hub.files[TRAIN[1]])
    assert_all_there(hub, root)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_by_range_in_the_next_call(
    number: int, hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.answers[TRAIN[0]] = [Answer(stall_after=3000)]
    with start(hub, root, "--train-shards", "1") as process:
        deadline = time.monotonic() + 15  # less than the server waits
        while not any(path.stat().st_size == 3000 for path in root.glob(f".download/{NAME}/*train_000000.bin")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(1)  # a busy machine would else get the rest before it hears of the signal
        hub.released.set()
        _, err = process.communicate(timeout=30)
    assert process.returncode and "Traceback" not in err
    assert "interrupted: run it again" in err or number == signal.SIGKILL
    assert not (root / TRAIN[0]).exists() and not (root / FOLDER / "manifest.json").exists()
    assert run("--train-shards", "1").error == ""
    (request,) = (request for request in hub.requests if request.path == TRAIN[0])
    assert request.range == "bytes=3000-" and request.sent == len(hub.files[TRAIN[0]]) - 3000
    assert_all_there(hub, root, {TRAIN[0], VAL, MODEL, VOCAB})


def test_a_server_that_does_not_know_ranges_begins_anew(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    hub.answers[VAL] = [Answer(stop_after=5000), Answer(ignore_range=True)]
    assert run().error == ""
    assert [r.range for r in hub.requests if r.path == VAL] == [None, "bytes=5000-"]
    assert_all_there(hub, root)


def test_a_content_length_that_is_too_short_is_not_the_end(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    hub.answers[VAL] = [Answer(stop_after=9000, honest_length=True)]
    assert run().error == ""
    assert_all_there(hub, root)


@pytest.mark.parametrize(
    "answer, reason, requests",
    [
        (Answer(status=500), "the Hub answers 500", 6),
        (Answer(status=404), "the Hub answers 404", 1),
        (Answer(body=b"short"), "the Hub sent 5 of 41,024 bytes", 7),
        (Answer(stop_after=100, ignore_range=True), "RemoteProtocolError", 7),
        (Answer(body=bytes(41024)), "is not a token shard", 2),
        (Answer(body=bytes(50000)), "50,000 bytes, in the export 41,024", 2),
    ],
    ids=["500", "404", "short", "drops", "corrupt", "long"],
)
def test_one_file_that_fails_for_good_does_not_keep_the_others(
    answer: Answer, reason: str, requests: int, hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.forever[TRAIN[1]] = answer
    failed = run("--jobs", "1")
    assert "1 of 7 files could not be fetched" in failed.error and "run it again" in failed.error
    assert f"{TRAIN[1]}: " in failed.error and reason in failed.error, failed.error
    assert hub.fetched().count(TRAIN[1]) == requests
    assert_nothing_unchecked(hub, root)
    assert {path for path in contents(root) if path[0] != "."} == ALL - {TRAIN[1]}
    assert not (root / FOLDER / "manifest.json").exists(), "a manifest of a folder that is not complete"
    hub.forever.clear()
    assert run().error == "" and set(hub.fetched()) == {TRAIN[1]}
    assert_all_there(hub, root)


@pytest.mark.parametrize("answer", [Answer(status=500), Answer(status=429), Answer(body=bytes(41024))])
def test_what_fails_once_is_asked_again(answer: Answer, hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    hub.answers[TRAIN[1]] = [answer]
    assert run().error == "" and hub.fetched().count(TRAIN[1]) == 2
    assert_all_there(hub, root)


def test_one_flipped_bit_in_what_is_sent_is_found(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    damaged = bytearray(hub.files[VAL])
    damaged[5000] ^= 1  # size, header and token range are still right
    hub.forever[VAL] = Answer(body=bytes(damaged))
    assert "has SHA-256" in run().error and hub.fetched().count(VAL) == 2
    assert_nothing_unchecked(hub, root)


def test_a_token_outside_of_the_vocabulary_is_refused_though_its_hash_is_right(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.files[TRAIN[3]] = pack(np.array([1, 1024]))
    assert "holds token 1024, but its tokenizer has 1024 pieces" in run().error
    assert not (root / TRAIN[3]).exists()
    assert_nothing_unchecked(hub, root)


def test_content_comes_by_redirect_and_the_token_stays_with_the_hub(hub: Hub, run: Callable[..., Result]) -> None:
    run()
    assert hub.api_tokens == {"Bearer hf_secret"} and {request.token for request in hub.requests} == {None}


def test_a_new_content_does_not_go_on_with_the_beginning_of_an_old_one(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.forever[VAL] = Answer(stop_after=5000, ignore_range=True)
    assert run().error
    hub.forever.clear()
    hub.files[VAL] = pack(np.arange(20000) % 1000)  # of the same size
    assert run().error == "" and [(r.path, r.range) for r in hub.requests] == [(VAL, None)]
    assert_all_there(hub, root)


@pytest.mark.parametrize("status, token", [(401, True), (403, True), (404, False)])
def test_a_refused_repository_is_named_with_the_revision_and_the_token(
    status: int, token: bool, hub: Hub, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = status
    if not token:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    error = run().error
    assert all(part in error for part in (REPO, "revision main", str(status), "--repo", "--revision"))
    assert ("the token that is set may not read it" if token else "HF_TOKEN holds no token") in error


@pytest.mark.parametrize("options", [("--revision", "v9"), ("--repo", "no/where"), ("--repo", "a b"), ("--jobs", "0")])
def test_a_name_that_the_hub_does_not_know_is_an_error_with_its_value(
    options: tuple[str, str], hub: Hub, run: Callable[..., Result]
) -> None:
    error = run(*options).error
    assert options[1] in error and error.startswith("download: error: ") and hub.requests == []


# ---- without a network -----------------------------------------------------------------------------------------------


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)  # nothing listens there


def test_without_a_network_complete_data_pass_against_their_own_manifest(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    before = contents(root), (root / FOLDER / "manifest.json").read_bytes()
    unplug(monkeypatch)
    result = run("--train-shards", "2")
    assert result.error == "" and "the Hub cannot be asked" in result.out and "all is there" in result.out
    assert re.search(r"train +4 of 4 ", result.out) and f"{REPO} at {COMMIT[:12]}" in result.out
    assert before == (contents(root), (root / FOLDER / "manifest.json").read_bytes())


@pytest.mark.parametrize("path", [TRAIN[3], VAL, MODEL])
def test_without_a_network_a_damaged_file_is_named(
    path: str, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    damaged = bytearray((root / path).read_bytes())
    damaged[5000] ^= 1
    (root / path).write_bytes(damaged)
    unplug(monkeypatch)
    result = run("--train-shards", "2")
    assert (
        f"missing or unproven of sp1024, 1 files: {Path(path).name}\n" in result.error and "has SHA-256" in result.out
    )


def test_without_a_network_what_is_missing_is_listed_with_the_way_to_get_it(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--train-shards", "2")
    unplug(monkeypatch)
    error = run("--train-shards", "4").error
    assert "missing or unproven of sp1024, 2 files: fineweb_train_000002.bin, fineweb_train_000003.bin\n" in error
    assert "python data/download.py --variant sp1024 --train-shards 4" in error and f"to {root}" in error


def test_without_a_network_and_without_a_manifest_nothing_counts_as_whole(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    unplug(monkeypatch)
    missing = "missing or unproven of sp1024, 6 files: fineweb_val_000000.bin, fineweb_train_000000.bin, "
    assert missing + "fineweb_train_000001.bin and 3 more\n" in run().error
    fill(hub, root)
    (root / FOLDER / "manifest.json").write_text(json.dumps(hub.manifest))
    assert missing in run().error
    assert_nothing_unchecked(hub, root)


@pytest.mark.parametrize(
    ("proxy", "fix"),
    [
        ("socks5://127.0.0.1:9", "or unset the proxy (ALL_PROXY=socks5://127.0.0.1:9)"),
        ("http://me:secret@nowhere.invalid", "(ALL_PROXY=http://…@nowhere.invalid)"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_and_local_data_are_still_checked(
    proxy: str, fix: str, hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    if proxy.startswith("socks") and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed here, so such a proxy is no error")
    run()
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "")
    with start(hub, root, "--train-shards", "4") as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in error and "secret" not in out
    assert "the Hub cannot be asked" in out and fix in out and "all is there" in out
    with start(hub, root, "--list") as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and len(error.splitlines()) == 1 and fix in error


def test_a_hub_that_is_down_counts_as_no_network(hub: Hub, run: Callable[..., Result]) -> None:
    run()
    hub.status = 503
    result = run()
    assert result.error == "" and "the Hub answers 503" in result.out


# ---- manifests and folders -------------------------------------------------------------------------------------------


def test_a_stale_manifest_on_disk_is_never_read_and_the_tree_is_right_about_the_number(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    fill(hub, root, {VAL})
    for path in (root / "manifest.json", root / FOLDER / "manifest.json"):
        path.write_text(json.dumps({"datasets": [{"name": "old", "stats": {"files_train": 1}}]}))
    hub.manifest["datasets"][0]["stats"]["files_train"] = 99
    result = run()
    assert result.error == "" and "lists 99 train shards, the repository has 4" in result.out
    (root / "manifest.json").unlink()
    assert_all_there(hub, root)
    assert "documents" not in json.loads((root / FOLDER / "manifest.json").read_text())["splits"]["train"]


def test_a_wrong_variant_is_an_error_with_the_right_ones(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    assert "is not there" in (error := run("--variant", "sp512").error) and "there are: sp1024" in error
    error = run("--variant", "byte260").error
    assert "in the manifest, but the repository has no train shards, no val shards, no tokenizer" in error
    assert "there are: sp1024" in error and contents(root) == {}


@pytest.mark.parametrize("number", ["5", "-1"])
def test_more_shards_than_there_are_is_an_error_with_their_number(
    number: str, root: Path, run: Callable[..., Result]
) -> None:
    assert f"--train-shards {number}: " in run("--train-shards", number).error and contents(root) == {}


def test_the_list_has_what_is_really_there(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    out = run("--list").out
    head, row, absent = out.splitlines()[1:]
    assert head.split() == ["variant", "vocabulary", "train", "shards", "tokens", "GB"]
    assert row.split() == ["sp1024", "1024", "4", "100,000", "0.00"] and absent.startswith("'byte260' is in the manif")
    assert not root.exists() and hub.requests == []


def test_good_files_of_a_doubled_folder_are_moved_into_place(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    fill(hub, root / "datasets", ALL - {TRAIN[2]})
    fill(hub, root, {TRAIN[0]})
    (root / "datasets" / TRAIN[1]).write_bytes(b"broken")
    result = run()
    assert result.error == "" and hub.fetched() == TRAIN[1:3]
    assert (
        f"moved here: {root / 'datasets' / VAL}" in result.out
        and f"broken: {root / 'datasets' / TRAIN[1]}" in result.out
    )
    left = {path: body for path, body in contents(root).items() if path.startswith("datasets/datasets/")}
    assert left == {f"datasets/{TRAIN[0]}": hub.files[TRAIN[0]], f"datasets/{TRAIN[1]}": b"broken"}, "a user's data"
    shutil.rmtree(root / "datasets/datasets")
    assert_all_there(hub, root)


def test_a_full_disk_is_an_error_before_the_first_byte(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 1.01 * sum(map(len, hub.files.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    error = run().error
    assert "0.00 GB are needed" in error and "are free" in error and "--train-shards" in error
    assert hub.requests == [] and contents(root) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed + 1))
    assert run().error == ""


def test_a_disk_that_fills_up_on_the_way_is_an_error_of_that_file(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    fail = OSError(28, "No space left on device")
    calls = iter([fail])
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(e) if (e := next(calls, None)) else real(handle)
    )
    error = run("--jobs", "1").error
    assert f"1 of 7 files could not be fetched:\n  {VAL}: " in error and "No space left on device" in error
    assert_nothing_unchecked(hub, root)
    assert run().error == "" and hub.requests == [], "what was fetched is used"


def test_a_folder_on_another_disk_gets_its_files_whole(
    hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if ".download" in str(source):
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run().error == ""
    assert_all_there(hub, root)


@pytest.mark.parametrize(
    "path", ["../../evil.model", "/etc/passwd", "tokenizers/../../evil", "download.py", "tokenizers/.."]
)
def test_a_manifest_cannot_name_a_tokenizer_elsewhere(
    path: str, hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.files[path] = b"evil"
    hub.manifest["tokenizers"][0]["model_path"] = path
    assert f"no tokenizer {path}" in run().error and hub.requests == [] and contents(root.parent) == {}


@pytest.mark.parametrize("name", ["..", "../..", "/tmp", "a/b", ".hidden", "a\nb"])
def test_a_manifest_cannot_name_a_folder_elsewhere(name: str, hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    hub.manifest["datasets"][0]["name"] = name
    hub.files[f"datasets/{name}/x_train_000000.bin"] = hub.files[f"datasets/{name}/x_val_000000.bin"] = b"evil"
    assert "--variant" in run("--variant", name).error and hub.requests == [] and contents(root.parent) == {}
    assert "there are: none" in run().error


def test_a_path_of_the_tree_that_leads_out_of_the_folder_is_no_shard(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    names = ("../../../evil_train_000009.bin", "/evil_train_000009.bin", "sub/x_train_000009.bin", "a b_val_000001.bin")
    hub.files |= {f"{FOLDER}/{name}": hub.files[VAL] for name in names}
    assert run().error == ""
    assert_all_there(hub, root)
    assert set(contents(root.parent)) == {f"data/{path}" for path in ALL} | {f"data/{FOLDER}/manifest.json"}


@pytest.mark.parametrize("change", [{"datasets": None}, {"tokenizers": [1]}, {"datasets": [{"name": NAME}]}])
def test_a_manifest_of_another_form_is_an_error(change: dict[str, Any], hub: Hub, run: Callable[..., Result]) -> None:
    hub.manifest |= change
    assert "is none of an export" in run().error


@pytest.mark.parametrize("name", ["other_train_000000.bin", "fineweb_val_000001.bin"])
def test_a_foreign_shard_is_an_error_that_names_it(
    name: str, hub: Hub, root: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    shutil.copy(root / VAL, root / FOLDER / name)
    assert f"holds {name}, which {REPO} at" in run().error and (root / FOLDER / name).exists()
    unplug(monkeypatch)
    assert f"holds {name}, which" in run().error


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_documents_come_too_where_they_are_asked_for(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    assert "has no docs_selected.jsonl" in run("--with-docs").error
    documents = {"docs_selected.jsonl": b'{"text": "x"}\n' * 99, "docs_selected.source_manifest.json": b"{}"}
    hub.files |= documents
    assert run("--with-docs").error == "" and set(documents) <= set(hub.fetched())
    assert_all_there(hub, root, {*ALL, *documents})


def test_a_hash_of_the_manifest_is_used_where_the_hub_has_none(
    hub: Hub, root: Path, run: Callable[..., Result]
) -> None:
    hub.manifest["docs_meta"]["docs_sha256"] = "0" * 64
    hub.files |= {"docs_selected.jsonl": b"{}\n", "docs_selected.source_manifest.json": b"{}"}
    tree = hub.tree()
    for entry in tree:
        if entry["path"].endswith(".jsonl"):
            del entry["lfs"]
    hub.tree = lambda: tree  # type: ignore[method-assign]
    assert "docs_selected.jsonl: " in (error := run("--with-docs").error) and "in the export 000000000000…" in error


def test_progress_says_bytes_speed_and_time_left(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "Progress", functools.partial(shards.Progress, every_seconds=0.0))
    lines = run().err.splitlines()
    assert any(re.fullmatch(r"fetched: [\d.]+ of 0\.\d MB, [\d.]+ MB/s, 0 s left", line) for line in lines), lines


def test_a_second_download_into_the_same_root_is_refused(hub: Hub, root: Path, run: Callable[..., Result]) -> None:
    with download.locked(root / ".download" / NAME / "lock"):
        assert "another process is at work on this" in run().error and hub.requests == []
        fill(hub, root)
        assert run().error == "" and (root / ".download" / NAME / "lock").exists(), "what another one needs"
    assert run().error == ""
    assert_all_there(hub, root)


def test_without_huggingface_hub_the_message_says_how_to_install_it(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without_it:  # the fixtures' ends need it again
        without_it.setitem(sys.modules, "huggingface_hub", None)
        assert "pip install -r data/requirements.txt" in run().error


def test_the_help_names_the_variables_of_the_environment(run: Callable[..., Result]) -> None:
    out = run("--help").out
    assert "HF_TOKEN" in out and "HF_ENDPOINT" in out
