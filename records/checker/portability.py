"""Rules on where a script runs: its grammar, its imports, its variables, the names that reviewers look for."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ruff import find_ruff_bin

from .folder import Folder
from .reading import MAX_LINE, MAX_README
from .rules import Finding, rule
from .scripts import name_of


@rule("P1", "reject", "the script parses, also on Python 3.10", "R9, #1541, #1523")
def check_parses(folder: Folder) -> Iterator[Finding]:
    """P1: the grammar of Python 3.10, which reviewers run."""
    for script in folder.scripts:
        if not script.name.endswith(".py"):
            continue
        fault = syntax_error(script.source)
        if fault is None and script.tree is None:
            message = f"Python cannot parse it ({script.error[0]}), so it was not looked through"
            yield Finding("P1", "warn", message, script.name)
        if fault is None:
            continue
        message, line = fault
        if NEWER.search(message):
            yield Finding("P1", "warn", f"{message}: reviewers run 3.10, write it for that", script.name, line)
        elif line:
            yield Finding("P1", "reject", f"{message}: broken scripts are not accepted", script.name, line)
        else:
            yield Finding("P1", "warn", f"could not be parsed: {message}", script.name)


NEWER = re.compile(r"on Python 3\.10 \(syntax was added in Python 3\.\d+\)")
PARSE_SECONDS = 20  # a megabyte takes a fifth of one


def syntax_error(source: str) -> tuple[str, int] | None:
    """Return the first syntax error of a source by the grammar of Python 3.10, and its line; None if there is none.
    The line is 0 where the parser gave up. Ruff parses, as no module of Python knows older grammars of f-strings."""
    command = [find_ruff_bin(), "check", "--isolated", "--no-cache", "--quiet", "--output-format=json"]
    command += ["--target-version=py310", "--select=E", "--ignore=E", "-"]  # no rule but the grammar
    try:
        done = subprocess.run(
            command, input=source.encode("utf-8", "replace"), capture_output=True, timeout=PARSE_SECONDS
        )
        faults = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:  # nested so deeply that the parser's stack overflows
        return f"ruff found no answer ({type(error).__name__})", 0
    broken = [fault for fault in faults if not NEWER.search(fault["message"])]
    for fault in broken or faults:
        return fault["message"], fault["location"]["row"]
    return None


GPU_ONLY = re.compile(
    r"(?:flash_attn\w*|triton|xformers|cutlass\w*|transformer_engine|liger_kernel|bitsandbytes|apex|mamba_ssm|causal_conv1d"
    r"|fla|deep_gemm|pynvml|cupy)(?:\.|$)")  # fmt: skip
USUAL = {"torch", "numpy", "sentencepiece", "tqdm", "huggingface_hub", "datasets", "tiktoken", "typing_extensions"}
PROBE = re.compile(r"is_available|find_spec|hasattr|HAS_|environ")


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a statement that run with it: not those of lambdas, nor what a probe decides on."""
    parts = [node]
    for part in parts:  # grows while it is walked
        yield part
        if not isinstance(part, ast.Lambda) and not (isinstance(part, ast.IfExp) and PROBE.search(ast.dump(part.test))):
            parts += ast.iter_child_nodes(part)


def top_statements(body: list[ast.stmt], safe: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Yields the statements that run at import, each with whether a try or a probe guards it; none of functions."""
    for node in body:
        if isinstance(node, ast.Try):
            yield from top_statements(node.body, True)
            yield from top_statements([s for handler in node.handlers for s in handler.body], safe)
        elif isinstance(node, ast.If):
            test = ast.dump(node.test)
            if "__name__" not in test and "TYPE_CHECKING" not in test:
                probed = safe or bool(PROBE.search(test))
                yield from top_statements(node.body + node.orelse, probed)
        elif isinstance(node, (ast.With, ast.For, ast.While, ast.ClassDef)):
            yield from top_statements(node.body, safe)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, safe


@rule("P2", "warn", "the script imports without a GPU and its kernels", "#280, #735")
def check_imports(folder: Folder) -> Iterator[Finding]:
    """P2 and P5: what an import of the script needs: kernels, a GPU, packages that no requirements.txt names."""
    needed: set[str] = set()
    for script in folder.scripts:
        kernels: dict[str, int] = {}
        for node, safe in top_statements(script.tree.body) if script.tree else []:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            needed |= {name.split(".")[0] for name in names if name and not safe}
            kernels.update({name: node.lineno for name in names if GPU_ONLY.match(name) and not safe})
            for call in (n for n in at_import(node) if isinstance(n, ast.Call) and not safe):
                name = name_of(call.func)
                if re.search(r"^torch\.cuda\.(?!is_available|device_count|amp)|(?:^|\.)cuda$", name):
                    message = f"{name}() runs at import: reviewers import on a CPU, move it into main"
                    yield Finding("P2", "warn", message, script.name, call.lineno)
        if kernels:
            message = f"imports {', '.join(sorted(kernels))} unguarded: nothing runs without, fall back or say so"
            yield Finding("P2", "warn", message, script.name, min(kernels.values()))
    local = {script.name.split("/")[0].removesuffix(".py") for script in folder.scripts}
    extra = sorted(needed - USUAL - local - set(sys.stdlib_module_names))
    if extra and not any(Path(name).name.startswith("requirements") for name in folder.files):
        message = f"no requirements.txt, and the script needs {', '.join(extra[:8])}: name them (R10)"
        yield Finding("P5", "note", message, folder.scripts[0].name)


COMMAND = re.compile(r"\b(?:torchrun|python3?(?:\.\d+)?|accelerate|uv run)\b(?:.*?([\w./-]{1,200}\.py)\b)?")
ASSIGNED = re.compile(r"(?:^|[\s;(\"'])([A-Z][A-Z0-9_]{2,})=")
ELSEWHERE = re.compile(  # read by the shell, by torch and its libraries, by the scripts of the challenge's data
    r"(?:NCCL|CUDA|TORCH\w*|PYTORCH|PYTHON|HF|HUGGING\w*|TRITON|TOKENIZERS|WANDB|OMP|MKL|PIP|UV|GLOO|NVIDIA|CUBLAS|LD|UCX"
    r"|MASTER|NV|XLA|INDUCTOR|RUNPOD|MATCHED|MODAL|AWS|CONDA|VIRTUAL)_\w+"
    r"|PATH|HOME|RANK|WORLD_SIZE|LOCAL_RANK|TMPDIR|CC|CXX|NPROC\w*|NGPU\w*|MAX_JOBS|VENV|PWD|TZ|LANG")  # fmt: skip


def commands(text: str) -> Iterator[tuple[int, list[str], str]]:
    """Yields (line, variables set, script) of each command in a README's code blocks that runs Python. What a line sets
    for the shell alone, before && or ;, is not passed on, unless a command has it by $NAME and it sets variables."""
    inside, joined, first_line, exported, shell = False, "", 0, [], {}
    for count, line in enumerate(text[:MAX_README].splitlines(), 1):
        if line.lstrip(" >-*").startswith(("```", "~~~")):
            inside, joined, exported = not inside, "", []
        elif inside:
            first_line = first_line if joined else count
            line = re.sub(r"(?:^|\s)#.*", "", line).strip()
            if not line and joined:
                continue
            joined = f"{joined} {line.removesuffix(chr(92))}"[:MAX_LINE]
            if line.endswith("\\"):
                continue
            run = COMMAND.search(joined)
            *before, last = re.split(r"&&|;", joined[: run.start()] if run else joined)
            exported = exported + ASSIGNED.findall(" ".join(part for part in before if "export " in part))
            if run:
                variables = [*exported, *ASSIGNED.findall(last)]
                for name in {*re.findall(r"\$\{?(\w+)", last)} & shell.keys():
                    variables += ASSIGNED.findall(shell[name])
                yield first_line, variables, Path(run[1] or "").name
            elif joined.strip().startswith("export "):
                exported = exported + ASSIGNED.findall(last)
            elif text_of := re.fullmatch(r"\s*(\w+)=([\"'])(.*)\2\s*", joined):
                shell[text_of[1]] = text_of[3][:4000]
            joined = ""


@rule("P4", "warn", "variables of the README's commands are read by the script", "#549, #1787, #1855")
def check_variables(folder: Folder) -> Iterator[Finding]:
    """P4: a variable that a README's command sets and whose name is nowhere in the code: it does nothing. A name counts
    as read if it stands in the source; where names are computed, also in small letters."""
    code = "\n".join(script.source for script in folder.scripts)
    if "environ" not in code and "getenv" not in code or any(script.problem for script in folder.scripts):
        return
    whole, made = (
        r"environ(?:\.items\(|\.keys\(|\.copy\(|\)|\s*$)|\.upper\(\)",
        r"(?:environ\.get\(|environ\[|getenv\()f",
    )
    computed = re.search(f"{whole}|{made}", code, re.M)
    names = set(re.findall(r"\w+", code.upper() if computed else code))
    names |= set(re.findall(r"\$\{?(\w+)", folder.readme[1][:MAX_README]))  # read by the shell
    others = {Path(name).name for name in folder.files} - {folder.scripts[0].name}
    unread: dict[str, int] = {}
    for line, variables, script in commands(folder.readme[1].replace("\\_", "_")):
        if script in others or (script and not script.startswith("train")):
            continue
        unread.update({name: line for name in variables if name not in names and not ELSEWHERE.fullmatch(name)})
    if unread:
        message = f"set by a command, read nowhere in the script, so without effect: {', '.join(sorted(unread))}"
        yield Finding("P4", "warn", message, folder.readme[0], min(unread.values()))


@rule("P5", "note", "no traps: dataclass, silent codec, unnamed requirements", "R10, #840, #274")
@rule("D1", "note", "the names that automated reviewers look for", "#1741, #420")
def check_traps(folder: Folder) -> Iterator[Finding]:
    """P5 and D1: what trips reviewers' machines, and the names that they look for."""
    nodes = [(script.name, node) for script in folder.scripts for node in script.nodes()]
    for place, node in nodes:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Hyper") and node.decorator_list:
            if "dataclass" in ast.dump(node.decorator_list[0]):
                message = "a dataclass fails where 3.10 loads the file by spec_from_file_location: use a plain class"
                yield Finding("P5", "note", message, place, node.lineno)
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h) for h in node.handlers):
            if re.search(r"'(?:zstandard|brotli|zstd)'", ast.dump(node)) and "zlib" in ast.dump(node):
                message = "without its codec it falls back to zlib silently and outgrows the cap: fail at the start"
                yield Finding("P5", "note", message, place, node.lineno)
    names = {node.name for _, node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    wanted = ("Hyperparameters", "GPT", "main", "eval_val", "build_sentencepiece_luts", "load_validation_tokens")
    missing = [name for name in wanted if name not in names]
    guard = any(re.search(r"__name__\s*==", script.source) for script in folder.scripts)
    if names and (missing or not guard):
        message = f"automated reviewers look for {', '.join(missing + ([] if guard else ['a guard of main']))}"
        yield Finding("D1", "note", message, folder.scripts[0].name)
