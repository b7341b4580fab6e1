"""Unpacks and parses scripts. Nothing of them is run or imported."""

from __future__ import annotations

import ast
import base64
import bz2
import hashlib
import itertools
import lzma
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reading import read_text

MAX_SOURCE = 1_000_000  # bytes of an unpacked script
TEXT_CODES = {code.__name__: code for code in (base64.b85decode, base64.a85decode, base64.b64decode, base64.b32decode)}
MOST_LAYERS = 3  # of packing
NO_PYTHON = re.compile(rb"^\s*#include\b|\b__global__\b", re.M)
LOADERS = re.compile(
    r"exec|eval|run_path|run_module|import_module|__import__|spec_from_file_location|SourceFileLoader|CDLL|load_library"
    r"|load|load_inline")  # fmt: skip
RUNNERS = re.compile(r"\b(?:exec|CDLL|subprocess|runpy|import_module)\b")
LOADABLE = re.compile(r"\.(?:py|pyc|so|cpp|cu|cc|c|dll|pyd|xz|br|zip|b85|bin)$")
DATA = re.compile(r"model|weight|checkpoint|fineweb|train_|val_|token|quant.*\.bin$")


@dataclass
class Script:
    """One file of code: its size as shipped, its source after unpacking, its tree where it parses."""

    name: str
    size: int
    source: str = ""
    tree: ast.Module | None = None
    error: tuple[str, int] | None = None  # why it does not parse, and where
    packed: str = ""  # how it was packed
    problem: str = ""  # why it could not be unpacked
    content: bytes = b""  # of the source, as it was packed
    hashes: set[str] = field(default_factory=set)  # SHA-256 of the file and of what is packed in it
    mechanisms: list[Any] | None = None  # that were recognized in it, once it was looked through
    unseen: list[str] = field(default_factory=list)  # functions that could not be

    def nodes(self) -> Iterator[ast.AST]:
        """Yields all nodes of the tree, none where the source does not parse."""
        return ast.walk(self.tree) if self.tree else iter(())


def read_script(path: Path) -> Script:
    """Returns a script, unpacked as often as it was packed (three times at most), and parsed. Nothing of it is run."""
    script = Script(path.name, path.stat().st_size, read_text(path, MAX_SOURCE))
    script.hashes.add(hashlib.sha256(path.read_bytes() if script.size < MAX_SOURCE else b"").hexdigest())
    parse_script(script)
    for _ in range(MOST_LAYERS):
        payload = longest_constant(script)
        if payload is None:
            return script
        content, how = unpack(payload, script.source)
        if not content:
            script.problem = how
            return script
        if NO_PYTHON.search(content):  # a kernel, which the script compiles
            return script
        script.content, script.source = content, content.decode("utf-8", "replace")
        script.packed = f"{script.packed} > {how}".strip(" >")
        script.hashes.add(hashlib.sha256(content).hexdigest())
        parse_script(script)
    if longest_constant(script) is not None:
        script.problem = f"it is packed more than {MOST_LAYERS} times"
    return script


def parse_script(script: Script) -> None:
    """Sets the tree of a script's source, or why and where the running Python does not parse it."""
    script.tree, script.error = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in somebody's strings
        try:
            script.tree = ast.parse(script.source)
        except SyntaxError as error:
            script.error = str(error.msg), error.lineno or 0
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes, nesting
            script.error = str(error) or type(error).__name__, 0


def longest_constant(script: Script) -> bytes | str | None:
    """Returns the payload of a packed script: the constant that most of a source with exec is; None if there is none.
    Bytes are spelled with up to four characters each. Text with blanks is no payload."""
    runs = re.search(r"\b(?:exec|eval|__import__)\b", script.source)
    if not runs or not re.search(r"decompress|decode|marshal", script.source):
        return None
    values = [node.value for node in script.nodes() if isinstance(node, ast.Constant)]
    values = [v for v in values if isinstance(v, bytes) or (isinstance(v, str) and not re.search(r"\s", v[:500]))]
    longest = max(values, key=len, default="")
    return longest if len(longest) > max(200, 0.2 * len(script.source)) else None


def unpack(payload: bytes | str, wrapper: str) -> tuple[bytes, str]:
    """Returns the source in a payload and how it was packed; no source, and why, where no known way leads to one."""
    data = payload.encode("utf-8", "surrogatepass") if isinstance(payload, str) else payload
    candidates = [("bytes", data)] if isinstance(payload, bytes) else []
    for name, decode in TEXT_CODES.items():
        if name in wrapper:
            try:
                candidates.append((name, decode(data)))
            except ValueError:
                continue
    for (name, packed), (codec, decompress) in itertools.product(candidates, DECOMPRESSORS.items()):
        if len(content := decompress(packed)) >= MAX_SOURCE:
            return b"", f"it holds more than {MAX_SOURCE:,} bytes of source"
        text = content.decode("utf-8", "replace")
        if len(text) > 20 and "\0" not in text[:1000] and text.count("\ufffd") < 10:
            return content, f"{codec}, {name}"
    if "brotli" in wrapper and not brotli_module():
        return b"", "it is packed with brotli, and the package `brotli` is not installed here (pip install brotli)"
    return b"", "it is packed in a way that is not known here: ship the readable source beside it"


def unlzma(data: bytes) -> bytes:
    """Returns the content of LZMA data, with a header or raw LZMA2 or LZMA1; nothing where it is none of them."""
    raw = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 25}], [{"id": lzma.FILTER_LZMA1}]
    for make in (
        lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw[0]),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw[1]),
    ):
        try:
            content = (decoder := make()).decompress(data, MAX_SOURCE)
        except (lzma.LZMAError, EOFError, ValueError):
            continue
        if decoder.eof or len(content) > 200:
            return content
    return b""


def unzlib(data: bytes) -> bytes:
    """Returns the content of zlib, gzip or raw deflate data; nothing where it is none of them."""
    for window in (47, -15):
        try:
            return zlib.decompressobj(window).decompress(data, MAX_SOURCE)
        except zlib.error:
            continue
    return b""


def unbz2(data: bytes) -> bytes:
    """Returns the content of bzip2 data; nothing where it is none."""
    try:
        return bz2.BZ2Decompressor().decompress(data, MAX_SOURCE)
    except (OSError, ValueError):
        return b""


def brotli_module() -> Any:
    """Returns the brotli package, None where it is not installed."""
    try:
        import brotli
    except ImportError:
        return None
    return brotli


def unbrotli(data: bytes) -> bytes:
    """Returns the content of brotli data, fed in small pieces: a bomb ends early; nothing without the package."""
    brotli, pieces, length = brotli_module(), [], 0
    if brotli is None or len(data) > 2_000_000:
        return b""
    decoder = brotli.Decompressor()
    try:
        for start in range(0, len(data), 64):
            pieces.append(decoder.process(data[start : start + 64]))
            length += len(pieces[-1])
            if length > MAX_SOURCE:
                return b""
    except brotli.error:
        return b""
    return b"".join(pieces)


DECOMPRESSORS = {"lzma": unlzma, "zlib": unzlib, "bz2": unbz2, "brotli": unbrotli}


def name_of(node: ast.AST) -> str:
    """Returns the name with its dots, "os.environ.get", of an expression; nothing for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)])


def loaded_files(script: Script, files: list[str]) -> set[str]:
    """Returns the files of the folder that a script imports or loads by a name that it spells: they count as code."""
    stems: set[str] = set()
    for node in script.nodes() if not script.problem else ():  # else it is a wrapper that is seen, not the script
        if isinstance(node, ast.Import):
            stems |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").replace(".", "/")
            stems |= {base} | {f"{base}/{alias.name}".strip("/") for alias in node.names}
        elif isinstance(node, ast.Call) and LOADERS.fullmatch(name_of(node.func).rpartition(".")[2]):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            stems |= {Path(text).name for text in texts if isinstance(text, str) and len(text) < 200}
    if RUNNERS.search(script.source):  # then a file may be loaded in two steps
        stems |= {n.value for n in script.nodes() if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    paths = {path for stem in stems for path in (stem, f"{stem}.py", f"{stem}/__init__.py")}
    paths = {path for path in paths & set(files) if LOADABLE.search(path) and path != script.name}
    return {path for path in paths if not (DATA.search(path) and path.endswith((".bin", ".xz", ".br", ".zip")))}
