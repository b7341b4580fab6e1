"""Fetch the published export of FineWeb, check all of it, and go on where an earlier call ended.

    python data/download.py --list                             # the variants that are really there
    python data/download.py                                    # sp1024: 80 training shards, validation, tokenizer
    python data/download.py --variant sp1024 --train-shards 1  # one training shard, to try things out

A file on disk is kept if its size, header, token range and SHA-256 are those of the export; the others are fetched into
`<root>/.download/`, checked there, and only then moved to `<root>/datasets/<name>/` and `<root>/tokenizers/`. So run it
again after any error: nothing that is whole is fetched twice, and nothing unchecked ever has a final name.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from build import byte_tokenizer
from shards import (
    BYTE_VOCAB_SIZE,
    HEADER_BYTES,
    ROOT,
    SHARD_NAME,
    SPLITS,
    DataError,
    Progress,
    ShardFacts,
    check_shard,
    errors_as_messages,
    hash_file,
    list_shards,
    locked,
    print_table,
    read_manifest,
    tokenizer_entry,
    write_atomically,
    write_manifest,
)

DATASET_PREFIX = "fineweb10B_"  # the variant sp1024 is the dataset fineweb10B_sp1024
DOCUMENTS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
LICENCE = "ODC-BY 1.0 (FineWeb, https://huggingface.co/datasets/HuggingFaceFW/fineweb), Common Crawl's terms of use"
SAFE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # what comes from elsewhere: no "..", no absolute path, nothing hidden
SAFE_PATH = re.compile(rf"({SAFE_NAME.pattern}/)*{SAFE_NAME.pattern}", re.ASCII)
MAX_FAILURES = 5  # requests for a file that gain not one byte, one after the other
RETRY_SECONDS, MAX_RETRY_SECONDS, TIMEOUT_SECONDS = 1.0, 60.0, 20.0
EPILOG = """environment: HF_TOKEN, a token for private or gated repositories; HF_ENDPOINT, a mirror of the Hub;
HF_HUB_OFFLINE=1, ask nobody and check what is here; and what else huggingface_hub reads"""


class HubUnreachable(DataError):
    """The Hub gives no answer now; what is on disk can still be checked."""


class RemoteFile(NamedTuple):
    """A file of the export; `path` is where it is below the remote root, and below the local one."""

    path: str
    size: int
    sha256: str | None
    blob_id: str


class Export(NamedTuple):
    """An export at one commit: the manifest that was published with it, and the files that are really there."""

    repo: str
    commit: str
    remote_root: str
    manifest: dict[str, Any]
    tree: dict[str, RemoteFile]

    def __str__(self) -> str:
        return f"{self.repo} at {self.commit[:12]}"


class Variant(NamedTuple):
    """One dataset of an export; `lacks` says what keeps it from being used."""

    name: str
    vocab_size: int
    stats: dict[str, Any]
    shards: dict[str, list[RemoteFile]]
    tokenizer: list[RemoteFile]  # the model, and its pieces as text where these are published too
    lacks: str


# ---- what the Hub has ------------------------------------------------------------------------------------------------


def import_hub() -> Any:
    """Returns the module huggingface_hub; DataError where it is absent or too old."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils.sha
    except ImportError:
        raise DataError("huggingface_hub is not installed: pip install -r data/requirements.txt") from None
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        raise DataError(f"huggingface_hub {huggingface_hub.__version__} is too old: pip install -U huggingface-hub")
    return huggingface_hub


def is_passing(status: int) -> bool:
    """Returns whether an HTTP status can be another one a little later."""
    return status in (408, 429) or status >= 500


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns all that questions to the Hub can raise into DataError, HubUnreachable where it is not the user's doing."""
    errors = import_hub().errors
    try:
        yield
    except errors.HFValidationError as error:
        raise DataError(f"{what}: no name of a repository: {error}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if is_passing(status):
            raise HubUnreachable(f"{what}: the Hub answers {status}") from None
        token = "the token that is set may not read it" if import_hub().get_token() else "HF_TOKEN holds no token"
        fix = f"check --repo, --revision and --remote-root; if all are right, it is private or gated, and {token}"
        raise DataError(f"{what}: the Hub answers {status}: {fix}") from None
    except ImportError as error:  # of what a proxy needs
        fix = f"pip install {error.name or 'socksio'}, or unset the proxy"
        raise HubUnreachable(f"{what}: the Hub cannot be asked ({error}): {fix}{proxies()}") from None
    except (errors.HTTPError, OSError, ValueError, KeyError, TypeError) as error:  # the last three: not the Hub's JSON
        raise HubUnreachable(f"{what}: the Hub cannot be asked ({type(error).__name__}: {error}){proxies()}") from None


def proxies() -> str:
    """Returns the proxies that this environment names, without passwords, in brackets; nothing without one."""
    names = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
    given = [(name, os.environ.get(name, "")) for name in (*names, *map(str.lower, names))]
    named = [f"{name}={re.sub('//[^/]*@', '//…@', value)}" for name, value in given if value]
    return f" ({', '.join(named)})" if named else ""


def file_url(export: Export, path: str) -> str:
    """Returns the address of a file of the export."""
    name = f"{export.remote_root}/{path}".lstrip("/")
    return import_hub().hf_hub_url(export.repo, name, repo_type="dataset", revision=export.commit)


def read_export(repo: str, remote_root: str, revision: str) -> Export:
    """Returns the export at the commit that `revision` is now. Paths that could lead out of a folder are left out."""
    hub, remote_root = import_hub(), remote_root.strip("/")
    what = f"{repo}, revision {revision}, folder {remote_root or '/'}"
    api = hub.HfApi()
    with hub_errors(what):
        commit = api.dataset_info(repo, revision=revision, timeout=TIMEOUT_SECONDS).sha
        entries = api.list_repo_tree(repo, remote_root or None, recursive=True, revision=commit, repo_type="dataset")
        tree, prefix = {}, f"{remote_root}/" if remote_root else ""
        for entry in entries:
            path = entry.path.removeprefix(prefix)
            if isinstance(entry, hub.hf_api.RepoFile) and SAFE_PATH.fullmatch(path):
                tree[path] = RemoteFile(path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
    if "manifest.json" not in tree:
        raise DataError(f"{what}: no manifest.json there, so no export: check --repo and --remote-root")
    export = Export(repo, commit, remote_root, {}, tree)
    with hub_errors(f"{what}, manifest.json"):
        headers, url = hub.utils.build_hf_headers(), file_url(export, "manifest.json")
        response = hub.utils.http_backoff("GET", url, headers=headers, timeout=TIMEOUT_SECONDS)
        hub.utils.hf_raise_for_status(response)
        return export._replace(manifest=response.json())


def read_variant(export: Export, entry: dict[str, Any], tokenizers: dict[str, dict[str, Any]]) -> Variant:
    """Returns a dataset of the manifest, with those of its files that the repository has."""
    name, folder = str(entry["name"]), f"datasets/{entry['name']}/"
    shards: dict[str, list[RemoteFile]] = {split: [] for split in SPLITS}
    for path, file in sorted(export.tree.items()):
        match = SHARD_NAME.fullmatch(path.removeprefix(folder))
        if path.startswith(folder) and match and "/" not in match[0]:
            shards[match[1]].append(file)
    described = tokenizers.get(entry.get("tokenizer_name"), {})
    model, vocab_size = str(described.get("model_path") or described.get("path")), int(entry["vocab_size"])
    paths = [path for path in (model, str(described.get("vocab_path"))) if path.startswith("tokenizers/")]
    tokenizer = [export.tree[path] for path in paths if path in export.tree]
    lacks = [f"no {split} shards" for split in SPLITS if not shards[split]]
    lacks += [] if tokenizer and tokenizer[0].path == model else [f"no tokenizer {model}"]
    lacks += [] if 1 < vocab_size <= 1 << 16 else [f"no vocabulary of {vocab_size} in 16 bits"]
    lacks += [] if SAFE_NAME.fullmatch(name) else ["no such name"]
    return Variant(name, vocab_size, dict(entry.get("stats") or {}), shards, tokenizer, ", ".join(lacks))


def read_variants(export: Export) -> dict[str, Variant]:
    """Returns the datasets of the manifest by the names that --variant has for them."""
    try:
        tokenizers = {entry["name"]: entry for entry in export.manifest["tokenizers"]}
        variants = [read_variant(export, entry, tokenizers) for entry in export.manifest["datasets"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"manifest.json of {export} is none of an export ({error!r}): check --repo") from None
    return {variant.name.removeprefix(DATASET_PREFIX): variant for variant in variants}


def choose(export: Export, name: str, train_shards: int) -> Variant:
    """Returns the variant that is asked for; DataError with what there is where the export lacks it."""
    variants = read_variants(export)
    variant = variants.get(name.removeprefix(DATASET_PREFIX))
    if variant is None or variant.lacks:
        why = f"is in the manifest, but the repository has {variant.lacks}" if variant else "is not there"
        there = ", ".join(sorted(key for key, variant in variants.items() if not variant.lacks)) or "none"
        raise DataError(f"--variant {name} {why}; in {export} there are: {there}")
    for split in SPLITS:
        listed, there = variant.stats.get(f"files_{split}"), len(variant.shards[split])
        if listed not in (None, there):
            print(f"the manifest of {export} lists {listed} {split} shards, the repository has {there}: taking those")
    num_train = len(variant.shards["train"])
    if not 0 <= train_shards <= num_train:
        raise DataError(f"--train-shards {train_shards}: {variant.name} has {num_train}, so choose 0 to {num_train}")
    return variant


def print_variants(export: Export) -> None:
    """Prints the variants that are there as a table, and what the others lack."""
    rows, variants = [("variant", "vocabulary", "train shards", "tokens", "GB")], read_variants(export)
    for name, variant in sorted(variants.items()):
        size = sum(file.size - HEADER_BYTES for files in variant.shards.values() for file in files)
        cells = (variant.vocab_size, len(variant.shards["train"]), f"{size // 2:,}", f"{size / 1e9:.2f}")
        rows += [] if variant.lacks else [(name, *map(str, cells))]
    print(export)
    print_table(rows)
    for name, variant in sorted(variants.items()):
        if variant.lacks:
            print(f"{name!r} is in the manifest only: the repository has {variant.lacks}")


# ---- what is on disk -------------------------------------------------------------------------------------------------


def read_own_export(root: Path, name: str, train_shards: int) -> Export:
    """Returns what our own manifest on disk says of the export, for when the Hub cannot be asked. Where there is none,
    the commit is empty; what it does not list but should stands there with a published name, and no content fits it."""
    name = name if (root / "datasets" / name).is_dir() else DATASET_PREFIX + name.removeprefix(DATASET_PREFIX)
    folder, manifest = root / "datasets" / name, None
    with contextlib.suppress(DataError):  # somebody else's manifest.json says nothing that could be trusted
        manifest = read_manifest(folder)
    manifest = manifest or {"tokenizer": {"path": "../../tokenizers/tokenizer", "vocab_size": 1 << 16}, "files": {}}
    files, tokenizer = manifest["files"], manifest["tokenizer"]
    tree = {}
    for file, entry in files.items():
        path = f"datasets/{name}/{file}"
        tree[path] = RemoteFile(path, HEADER_BYTES + 2 * int(entry["tokens"]), str(entry.get("sha256")), "")
    wanted = {"train": train_shards, "val": 1}
    for split in SPLITS:
        known = sum(f"_{split}_" in file for file in files)
        paths = (f"datasets/{name}/fineweb_{split}_{i:06d}.bin" for i in range(known, wanted[split]))
        tree.update({path: RemoteFile(path, 0, None, "") for path in paths})
    model = os.path.normpath(f"datasets/{name}/{tokenizer['path']}")
    for path in (model, *DOCUMENTS):
        size = (root / path).stat().st_size if (root / path).is_file() else 0  # the manifest does not say it
        tree[path] = RemoteFile(path, size, tokenizer.get("sha256") if path == model else None, "")
    source = {"repo": "an unknown repository", "revision": "an unknown commit" if files else ""}
    source |= next((s for s in manifest.get("sources", []) if isinstance(s, dict) and "repo" in s), {})
    datasets = [{"name": name, "tokenizer_name": "", "vocab_size": tokenizer["vocab_size"]}]
    published = {"datasets": datasets, "tokenizers": [{"name": "", "path": model}]}
    return Export(str(source["repo"]), str(source["revision"]), "", published, tree)


def refuse_foreign_shards(folder: Path, export: Export) -> None:
    """Raises DataError if the folder holds shards that the export does not have."""
    shards = [path.name for split in SPLITS for path in list_shards(folder, split)]
    foreign = [name for name in shards if f"datasets/{folder.name}/{name}" not in export.tree]
    if foreign:
        fix = "the trainer would read them too. Move them away, or choose another --root"
        raise DataError(f"{folder} holds {shorten(foreign)}, which {export} does not list: {fix}")


def select_files(export: Export, variant: Variant, train_shards: int, with_docs: bool, root: Path) -> list[RemoteFile]:
    """Returns the files that are asked for, and the other shards that are on disk already: the trainer reads these."""
    train = variant.shards["train"]
    more = [file for file in train[train_shards:] if os.path.lexists(root / file.path)]
    files = [*variant.shards["val"], *train[:train_shards], *more, *variant.tokenizer]
    if not with_docs:
        return files
    if absent := [name for name in DOCUMENTS if name not in export.tree]:
        raise DataError(f"--with-docs: {export} has no {' and no '.join(absent)}")
    documents, its_source = (export.tree[name] for name in DOCUMENTS)
    described = export.manifest.get("docs_meta")
    published = str(described["docs_sha256"]) if isinstance(described, dict) and "docs_sha256" in described else None
    return [*files, documents._replace(sha256=documents.sha256 or published), its_source]


def examine(file: RemoteFile, path: Path, vocab_size: int) -> ShardFacts:
    """Returns what the file at `path` holds after reading all of it; DataError if it is not `file` of the export."""
    if (size := path.stat().st_size) != file.size:
        raise DataError(f"{path} has {size:,} bytes, in the export {file.size:,}")
    is_shard = SHARD_NAME.fullmatch(path.name)
    facts = check_shard(path, vocab_size) if is_shard else ShardFacts(0, hash_file(path))
    if file.sha256 not in (None, facts.sha256):
        raise DataError(f"{path} has SHA-256 {facts.sha256[:12]}…, in the export {file.sha256[:12]}…")
    if file.sha256 is None and file.blob_id:  # a small file, which Git itself holds
        if import_hub().utils.sha.git_hash(path.read_bytes()) != file.blob_id:
            raise DataError(f"{path} has another content than in the export, Git's {file.blob_id[:12]}")
    return facts


def place(source: Path, target: Path) -> None:
    """Moves a checked file to its final name, under which there is the old one or all of the new."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a folder that is a link to another disk
            raise
        copy = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(source, copy)
        os.replace(copy, target)
        source.unlink()


def shorten(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- bringing one to the other ---------------------------------------------------------------------------------------


class Store:
    """The local copy of a variant, and the requests that complete it.

    huggingface_hub finds the addresses and the token, but its own download (2.4) writes to a name that no later call
    knows: an interrupted one would begin at zero again. Its http_get goes on, but hands over 10 MB at a time, and
    neither looks at the content. So the bytes are taken here; README.md has the figures.
    """

    def __init__(self, root: Path, export: Export, variant: Variant, jobs: int):
        self.root, self.export, self.variant, self.jobs = root, export, variant, jobs
        self.folder, self.staging = root / "datasets" / variant.name, root / ".download" / variant.name
        self.done, self.lock, self.stop = 0, threading.Lock(), threading.Event()

    def count(self, num_bytes: int) -> None:
        """Takes note of bytes that a thread has read or written."""
        with self.lock:
            self.done += num_bytes

    def in_parallel(
        self, label: str, total: int, work: Callable[[RemoteFile], Any], files: list[RemoteFile]
    ) -> list[Any]:
        """Returns for each file what `work` returns or the error it raises; says every few seconds how far it is."""
        progress, self.done = Progress(label, total / 1e6, "MB"), 0
        pool = concurrent.futures.ThreadPoolExecutor(self.jobs)
        try:
            waiting = futures = [pool.submit(work, file) for file in files]
            while waiting:
                waiting = concurrent.futures.wait(waiting, timeout=0.5).not_done
                progress.advance(self.done / 1e6 - progress.done)
        finally:
            self.stop.set()  # on Ctrl-C the threads end with the piece that they are at
            pool.shutdown(cancel_futures=True)
            self.stop.clear()
        errors = [future.exception() for future in futures]
        for error in errors:
            if error and not isinstance(error, (DataError, OSError)):
                raise error
        return [error or future.result() for error, future in zip(errors, futures)]

    def find(self, file: RemoteFile) -> ShardFacts | None:
        """Returns what is on disk of a file, None where it is missing or broken; moves it out of a doubled folder."""
        final = self.root / file.path
        for path in (final, self.root / "datasets" / file.path):
            try:
                facts = examine(file, path, self.variant.vocab_size)
            except FileNotFoundError:
                continue
            except (DataError, OSError) as error:
                print(f"broken: {error}")
                continue
            self.count(file.size)
            if path != final:
                print(f"moved here: {path}")
                place(path, final)
            return facts
        return None

    def find_all(self, files: list[RemoteFile]) -> dict[RemoteFile, ShardFacts]:
        """Returns those of the files that are on disk and whole."""
        there = sum(file.size for file in files if (self.root / file.path).exists())
        results = self.in_parallel("checking what is on disk", there, self.find, files)
        if errors := [result for result in results if isinstance(result, Exception)]:
            raise errors[0]
        return {file: facts for file, facts in zip(files, results) if facts}

    def staged(self, file: RemoteFile) -> Path:
        """Returns where a file is while it is fetched; the content is in the name, so that no two contents mix."""
        key = hashlib.sha256(f"{file.path} {file.sha256 or file.blob_id}".encode()).hexdigest()[:16]
        return self.staging / f"{key}.{Path(file.path).name}"

    def num_missing_bytes(self, files: list[RemoteFile]) -> int:
        """Returns the bytes that are still to be fetched; DataError if the disk has no room for them."""
        staged = sum(self.staged(file).stat().st_size for file in files if self.staged(file).exists())
        missing = max(0, sum(file.size for file in files) - staged)
        for folder in (self.staging, self.folder):
            above = next(path for path in (folder, *folder.parents) if path.exists())
            needed, free = missing * 1.01, shutil.disk_usage(above).free
            if free < needed:
                fix = "free some, choose fewer --train-shards, or another --root"
                raise DataError(f"{needed / 1e9:.2f} GB are needed in {above}, {free / 1e9:.2f} are free: {fix}")
        return missing

    def fetch_rest(self, file: RemoteFile, staged: Path) -> tuple[str, float]:
        """Appends to `staged` what one request gives. Returns why that was not all, and the seconds to wait that the
        server asks for; DataError where another request cannot help."""
        hub, start = import_hub(), staged.stat().st_size
        headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        request = {"headers": headers, "timeout": TIMEOUT_SECONDS}
        try:
            with hub.utils.get_session().stream("GET", file_url(self.export, file.path), **request) as response:
                status, pause = response.status_code, response.headers.get("Retry-After", "")
                if is_passing(status):
                    return f"the Hub answers {status}", float(pause) if pause.isdigit() else 0.0
                if status not in (200, 206, 416):
                    raise DataError(f"the Hub answers {status} for it")
                if status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    os.truncate(staged, 0)  # this answer does not go on where we are
                    self.count(-start)
                with staged.open("ab") as out:
                    for piece in response.iter_bytes() if status in (200, 206) else ():
                        out.write(piece)
                        out.flush()  # so that a killed process has lost nothing
                        self.count(len(piece))
                        if out.tell() > file.size or self.stop.is_set():
                            break
        except hub.errors.HTTPError as error:
            return f"{type(error).__name__}: {error}", 0.0
        return f"the Hub sent {staged.stat().st_size:,} of {file.size:,} bytes", 0.0

    def fetch(self, file: RemoteFile) -> ShardFacts:
        """Returns what a file holds that is now in its place; DataError if it cannot be had or is broken twice."""
        staged, errors = self.staged(file), []
        while len(errors) < 2:
            self.complete(file, staged)
            try:
                facts = examine(file, staged, self.variant.vocab_size)
            except DataError as error:
                errors.append(error)
                self.count(-staged.stat().st_size)
                staged.unlink()
            else:
                place(staged, self.root / file.path)
                return facts
        raise errors[-1]

    def complete(self, file: RemoteFile, staged: Path) -> None:
        """Fetches until `staged` has all bytes, from where an earlier call left it; DataError if that gets nowhere."""
        staged.touch()
        best, failures = staged.stat().st_size, 0
        while (size := staged.stat().st_size) < file.size:
            problem, pause = self.fetch_rest(file, staged)
            size = staged.stat().st_size
            best, failures = (size, 0) if size > best else (best, failures + 1)
            if failures > MAX_FAILURES or self.stop.is_set():
                raise DataError(f"{problem}, and so {failures} times")
            if size < file.size:
                self.stop.wait(min(pause or RETRY_SECONDS * 2**failures, MAX_RETRY_SECONDS))
        with staged.open("rb") as content:
            os.fsync(content.fileno())  # else a power failure can leave an empty file under the final name

    def fetch_all(self, files: list[RemoteFile]) -> dict[RemoteFile, ShardFacts]:
        """Returns what the fetched files hold; one failing file does not keep the others from their places."""
        total = self.num_missing_bytes(files)
        print(f"fetching {len(files)} files, {total / 1e6:,.1f} MB, of {self.export}", flush=True)
        with locked(self.staging / "lock"):
            results = self.in_parallel("fetched", total, self.fetch, files)
        failed = [(file, result) for file, result in zip(files, results) if isinstance(result, Exception)]
        if failed:
            lines = "".join(f"\n  {file.path}: {error}" for file, error in failed)
            head = f"{len(failed)} of {len(files)} files could not be fetched:"
            raise DataError(f"{head}{lines}\nThe others are in place: run it again")
        return dict(zip(files, results))

    def clean(self) -> None:
        """Removes what is staged, and what calls left that were killed, unless another one is fetching there."""
        with contextlib.suppress(DataError), locked(self.staging / "lock"):
            for pattern in ("manifest.json.*.tmp", "*.bin.tmp", "../../tokenizers/*.model.*.tmp"):
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
            shutil.rmtree(self.staging)
        with contextlib.suppress(OSError):  # absent, or it holds another variant's files
            self.staging.parent.rmdir()

    def tokenizer(self) -> Path:
        """Returns the SentencePiece model of the variant. The byte-level vocabulary is published as JSON, which says
        that the bytes are the ids from 4 on: the model that says the same is written beside it."""
        path = self.root / self.variant.tokenizer[0].path
        if path.suffix != ".json":
            return path
        try:
            config = json.loads(path.read_bytes())["config"]
            known = [config[key] for key in ("pad_id", "bos_id", "eos_id", "unk_id", "byte_offset", "byte_count")]
        except (ValueError, KeyError, TypeError, RecursionError):
            known = []
        if [*known, self.variant.vocab_size] != [0, 1, 2, 3, 4, 256, BYTE_VOCAB_SIZE]:
            raise DataError(f"{path} is not the byte-level vocabulary of 4 + 256 ids: use another --variant")
        write_atomically(path.with_suffix(".model"), byte_tokenizer())
        return path.with_suffix(".model")

    def describe(self, facts: dict[RemoteFile, ShardFacts]) -> dict[str, Any]:
        """Returns the manifest of the folder as it is now."""
        variant, export, splits = self.variant, self.export, {}
        for split, shards in variant.shards.items():
            here = [facts[file].tokens for file in shards if file in facts]
            splits[split] = {"shards": len(here), "tokens": sum(here)}
            documents, files = (variant.stats.get(key) for key in (f"docs_{split}", f"files_{split}"))
            if documents and files == len(here) == len(shards):  # what is published counts all of its shards
                splits[split]["documents"] = documents
        shards = sorted(file for files in variant.shards.values() for file in files if file in facts)
        return {
            "name": variant.name,
            "tokenizer": tokenizer_entry(self.folder, self.tokenizer(), variant.vocab_size),
            "splits": splits,
            "files": {Path(file.path).name: facts[file]._asdict() for file in shards},
            "sources": [{"repo": export.repo, "revision": export.commit, "licence": LICENCE}],
        }


# ---- the command -----------------------------------------------------------------------------------------------------


def download(args: argparse.Namespace) -> None:
    """Makes the local copy complete, or says what it lacks; writes its manifest and prints what is there."""
    root, reason = args.root, ""
    if not SAFE_NAME.fullmatch(args.variant):
        raise DataError(f"--variant {args.variant} is no name of a variant: see --list")
    try:
        export = read_export(args.repo, args.remote_root, args.revision)
    except HubUnreachable as error:
        export, reason = read_own_export(root, args.variant, args.train_shards), str(error)
    variant = choose(export, args.variant, args.train_shards)
    store = Store(root, export, variant, args.jobs)
    if export.commit:
        refuse_foreign_shards(store.folder, export)
    files = select_files(export, variant, args.train_shards, args.with_docs, root)
    found = store.find_all(files)
    missing = [file for file in files if file not in found]
    if reason and missing:
        raise DataError(explain_offline(args, reason, [Path(file.path).name for file in missing]))
    fetched = store.fetch_all(missing) if missing else {}
    if not reason:
        write_manifest(store.folder, store.describe({**found, **fetched}))
        store.clean()
    else:
        print(f"{reason}\nchecked against {store.folder / 'manifest.json'} instead: all is there")
    print_summary(store, {**found, **fetched}, fetched)


def explain_offline(args: argparse.Namespace, reason: str, missing: list[str]) -> str:
    """Returns what is missing and how to get it without a network here."""
    options = f"--variant {args.variant} --train-shards {args.train_shards}{' --with-docs' * args.with_docs}"
    source = shlex.join(["--repo", args.repo, "--remote-root", args.remote_root, "--revision", args.revision])
    command = f"python data/download.py {options} {source} --root FOLDER"
    fix = f"Where there is a network, run `{command}`, and copy what is then in FOLDER to {args.root}"
    return f"{reason}\nmissing or unproven of {args.variant}, {len(missing)} files: {shorten(missing)}\n{fix}"


def print_summary(store: Store, facts: dict[RemoteFile, ShardFacts], fetched: dict[RemoteFile, ShardFacts]) -> None:
    """Prints what is there now, what of it was fetched, and the command that trains on it."""
    rows, variant = [("split", "shards", "tokens", "GB")], store.variant
    for split, shards in variant.shards.items():
        here = [file for file in shards if file in facts]
        tokens, size = sum(facts[file].tokens for file in here), sum(file.size for file in here) / 1e9
        rows.append((split, f"{len(here)} of {len(shards)}", f"{tokens:,}", f"{size:.3f}"))
    print(f"{store.folder}, from {store.export}:")
    print_table(rows)
    size, there = sum(file.size for file in fetched) / 1e9, len(facts) - len(fetched)
    news = f"fetched {len(fetched)} files, {size:.3f} GB; {there} were there" if fetched else "all was there already"
    print(news)
    where = f"DATA_PATH={shlex.quote(str(store.folder))}"
    print(f"train with: {where} torchrun --standalone --nproc_per_node=8 train_gpt.py")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=style)
    parser.add_argument("--variant", default="sp1024", help="tokenizer of the shards, see --list (%(default)s)")
    parser.add_argument("--train-shards", type=int, default=80, help="how many, from the first; 0: none (%(default)s)")
    parser.add_argument("--repo", default="willdepueoai/parameter-golf", help="dataset of the Hub (%(default)s)")
    parser.add_argument("--remote-root", default="datasets", help="folder of the export in it (%(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where datasets/ and tokenizers/ are (%(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help="files at a time (%(default)s)")
    parser.add_argument("--with-docs", action="store_true", help="also the documents, for data/build.py: tens of GB")
    parser.add_argument("--list", action="store_true", help="print the variants that are there, and fetch nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; exits with status 1 and a message where something is wrong."""
    args = parse_arguments(arguments)
    with errors_as_messages("download", works_in_silence=True):
        if args.jobs < 1:
            raise DataError(f"--jobs {args.jobs}: choose 1 or more")
        if args.train_shards < 0:
            raise DataError(f"--train-shards {args.train_shards}: choose 0 or more")
        try:
            if args.list:
                print_variants(read_export(args.repo, args.remote_root, args.revision))
            else:
                download(args)
        except OSError as error:  # a disk that is full or not ours to write to
            raise DataError(f"{error}; what is checked is in place: mend this and run it again") from None


if __name__ == "__main__":
    main()
