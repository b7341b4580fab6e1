"""What the pages and the files of settings tell the reader to type, open or look up is there; and what `make` does with
paths, with files of settings from Windows, and with processes that fail.

Nothing here knows a sentence, a table or a heading: pages may be written anew. What is checked is taken from them."""

from __future__ import annotations

import ast
import builtins
import fnmatch
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_1_hyperparameters
from conftest import ROOT

import train_gpt as t

PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))) if path.is_file()]
ENV_FILES = sorted((ROOT / "records" / "env").glob("*.env"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w./-]+):(?!=)", MAKEFILE, re.M))
CODE = {path: path.read_text() for folder in ("", "data/", "records/") for path in ROOT.glob(f"{folder}*.py")}
KNOBS = {name.upper() for name in t.Hyperparameters.knobs()}
# What is made by commands, and so is not in a fresh checkout.
MADE = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
KEYWORDS = {"do", "done", "then", "else", "fi", "if", "while", "{", "}", "!", "time", "exec", "env", "nohup", "sudo"}
SETTING = re.compile(r"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*)=")
OWN_SUFFIXES = (".py", ".env", ".sh", ".toml", "requirements.txt", "Makefile")


# ------------------------------------------------------------------------------------------------------- commands
def variables(page: Path) -> set[str]:
    """Returns the variables that something reads: settings, those of `make`, names in the code, other programs, and the
    settings that the page's own examples declare."""
    declared = {name.upper() for name in re.findall(r"(\w+) = (?:Model)?Knob\(", page.read_text())}
    in_code = {word for text in CODE.values() for word in re.findall(r"\b[A-Z][A-Z0-9_]+\b", text)}
    of_make = set(re.findall(r"\$\((?:value )?(\w+)\)|^(\w+) *[:?]?=", MAKEFILE, re.M))
    return KNOBS | declared | in_code | {*test_1_hyperparameters.FOREIGN} | {name for pair in of_make for name in pair}


def is_there(path: str, page: Path) -> bool:
    """Whether a path, seen from the root or from the page's folder, is in the checkout or is made by a command."""
    parts = Path(path).parts
    begins = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    made = any(fnmatch.fnmatch(begin, pattern) for begin in begins for pattern in MADE)
    return made or path.startswith(("/", "~", "$")) or (ROOT / path).exists() or (page.parent / path).exists()


def split(line: str) -> Iterator[list[str]]:
    """Yields the simple commands of a line of shell."""
    tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
    tokens.whitespace_split = True
    words: list[str] = []
    for token in (*tokens, ";"):
        if token.strip("();&|<>"):
            words.append(token)
        else:
            yield words
            words = []


def faults(line: str, page: Path = ROOT / "README.md") -> list[str]:
    """Returns what a line of shell names that is not there."""
    found = []
    known = variables(page)
    for words in split(line):
        while words and words[0] in KEYWORDS:
            words = words[1:]
        if not words or words[0] == "for":
            continue
        given = [match[1] for word in words if (match := SETTING.match(word))]
        if words[0] in ("export", "unset"):
            given += [word.split("=")[0] for word in words[1:]]
        found += [f"{name} is read by nothing" for name in given if name not in known]
        words = [word for word in words if not SETTING.match(word)]
        plain = [word for word in words[1:] if not word.startswith("-")]
        command = Path(words[0]).name if words else ""
        if command == "make":
            found += [f"make {target}: no such target" for target in plain if target not in TARGETS]
        elif command in ("source", "."):
            found += [f"{path} is not there" for path in plain[:1] if not is_there(path, page)]
        elif "/" in command and not is_there(command, page):
            found.append(f"{command} is not there")
        found += [f"{path} is not there" for path in plain if path.endswith(OWN_SUFFIXES) and not is_there(path, page)]
        script = next((ROOT / path for path in plain if path.endswith(".py") and (ROOT / path) in CODE), None)
        words = words[: words.index("--")] if "--" in words else words  # what follows is a command of its own
        if script and command.startswith("python"):
            options = [word.split("=")[0] for word in words if word.startswith("--")]
            found += [f"{script.name} has no {o}" for o in options if f'"{o}"' not in CODE[script]]
    for names in re.findall(r"\bCONFIG=(?:\"([^\"]*)\"|'([^']*)'|([\w-]+))", line):
        systems = "".join(names).split()
        found += [f"records/env/{s}.env is not there" for s in systems if not is_there(f"records/env/{s}.env", page)]
    return found


def blocks(page: Path) -> list[str]:
    """Returns the lines of a page's blocks of shell, those that go on with a backslash as one."""
    text = "".join(re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", page.read_text(), re.M | re.S))
    return text.replace("\\\n", " ").splitlines()


def spans(page: Path) -> list[str]:
    """Returns what stands in backticks in a page's text, outside its blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_name_only_what_is_there(page: Path) -> None:
    commands = blocks(page)
    # In a sentence, too; "…" stands for something there.
    commands += [
        s for s in spans(page) if re.match(r"(make|python3?|torchrun|source|[A-Z_0-9]+=\S+) ", s) and "…" not in s
    ]
    assert commands or page.parent != ROOT, "the first page says how to begin"
    found = {line: faults(line, page) for line in commands}
    assert not any(found.values()), {line: said for line, said in found.items() if said}


@pytest.mark.parametrize("file", ENV_FILES, ids=lambda file: file.stem)
def test_the_commands_in_a_file_of_settings_name_only_what_is_there(file: Path) -> None:
    comments = "\n".join(re.findall(r"#(.*)", file.read_text()))
    commands = re.findall(
        r"\((set -a;.*?)\)|`((?:make|python|torchrun) [^`]+)`|  ((?:make|python|torchrun) .*)", comments
    )
    found = {line: faults(re.sub(r"  +.*", "", line)) for parts in commands for line in parts if line}
    assert not any(found.values()), {line: said for line, said in found.items() if said}
    named = re.findall(r"records/\w[\w./]*\w", comments)
    assert not [path for path in named if not is_there(path, file)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("make tset  # the proofs", "make tset"),
        ("source .venv/bin/activate && make demo demmo", "make demmo"),
        ("TTT_EPOCH=5 python train_gpt.py", "TTT_EPOCH is"),
        ("for x in a b; do SEED=$x TTT_LRR=$x python train_gpt.py; done", "TTT_LRR is"),
        ("export SEED=1 SEDE=2", "SEDE is"),
        ("make data VARIANTS=sp1024", "VARIANTS is"),
        ("python data/biuld.py my_documents/", "data/biuld.py is"),
        ("python data/build.py my_documents/ --vocabulary 4096", "build.py has no --vocabulary"),
        ("torchrun --standalone --nproc_per_node=8 train.py", "train.py is"),
        ("(set -a; . records/env/pr1093.env; torchrun --standalone train_gpt.py)", "records/env/pr1093.env is"),
        ('SEED=1 make train CONFIG="pr1092 toys"', "records/env/toys.env is"),
    ],
)
def test_a_command_that_names_something_else_would_be_found(line: str, fault: str) -> None:
    said = faults(line)
    assert said and all(part.startswith((fault, "records/env/" if "env/" in fault else fault)) for part in said), said


def test_a_command_that_is_right_would_not_be_found() -> None:
    for line in (
        "",
        "make demo    # the whole pipeline",
        "SEED=$seed LOADER=$l RUN_ID=$l-$seed make train CONFIG=bench; done; done",
        "(set -a; . records/env/pr518.env; TTT_EPOCHS=30; torchrun --standalone --nproc_per_node=8 train_gpt.py)",
        "CUDA_VISIBLE_DEVICES=0 EVAL_ONLY=logs/demo/final_model.bin python train_gpt.py > out.txt 2>&1 &",
        "python data/build.py data/docs_selected.jsonl --name mine --vocab 8192 | tee log",
        "cd my/folder && .venv/bin/python -m pip install torch && git status",
    ):
        assert faults(line) == [], line


# ---------------------------------------------------------------------------------------------------------- names
def definitions(node: ast.AST, within: str = "") -> set[str]:
    """Returns every name that code defines: classes, functions, variables; those of a class as Class.name."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and part is not node:
            names.add(within + part.name)
        elif isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
            names.add(within + (part.id if isinstance(part, ast.Name) else part.attr))
        elif isinstance(part, ast.alias):
            names.add(within + (part.asname or part.name))
        if isinstance(part, ast.ClassDef) and part is not node:
            names |= definitions(part, f"{part.name}.")
    return names


DEFINED = {name for text in CODE.values() for name in definitions(ast.parse(text))}
FILES = [ROOT / "Makefile", Path(test_1_hyperparameters.__file__), *ENV_FILES]
WORDS = {*re.findall(r"\w+", " ".join([*CODE.values(), *(file.read_text() for file in FILES)])), *KNOBS}


def is_lost(span: str) -> bool:
    """Whether a text in backticks looks like a name of this project's code, and is none."""
    name = span.split("(")[0].split("=")[0]
    if re.fullmatch(r"[A-Z][a-z]\w*\.[a-z_]\w*", name):  # Class.method; a class of a package is its own affair
        return name not in DEFINED and (name.split(".")[0] in DEFINED or name.split(".")[0] not in WORDS)
    if re.fullmatch(r"[A-Za-z_]\w*\(.*\)", span):  # a call
        return name not in DEFINED and not hasattr(builtins, name)
    # A setting (or one that is named because it is refused: the settings' tests know it), a constant, a function, a
    # field of a file: somewhere in the code the word stands. Tests have a test of their own.
    looks_so = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|(?!test_)[a-z][a-z0-9]*(_[a-z0-9]+)+", name)
    return bool(looks_so) and name not in WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_in_a_page_are_names_of_the_code(page: Path) -> None:
    lost = {span for span in spans(page) if is_lost(span)}
    assert not lost


def test_a_name_that_the_code_lost_would_be_found() -> None:
    for span in ("Scorer.grade", "Scorrer.result", "eval_val_sliding_windows", "fit_it()", "WARMUP_STEP=3", "TTT_LRS"):
        assert is_lost(span), span
    for span in (
        "Scorer.result",
        "eval_val_sliding",
        "GPT(h)",
        "WARMUP_STEPS=3",
        "print(1)",
        "make demo",
        "a",
        "README.md",
    ):
        assert not is_lost(span), span


def test_the_tests_that_pages_name_exist() -> None:
    """Above all those of the table of defects: each row names what would notice its return."""
    defined = set(
        re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in ROOT.glob("tests/test_*.py")), re.M)
    )
    rows = [line for page in PAGES for line in page.read_text().splitlines() if re.match(r"\|\W*[A-Z]-\d+\b", line)]
    assert rows, "the defects of the published systems stand in a table, a row each"
    for row in rows:
        assert re.search(r"`test_\w+`", row), row
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= defined, page


# ---------------------------------------------------------------------------------------------------------- links
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as code hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


# ---------------------------------------------------------------------------------------------------------- make
needs_make = pytest.mark.skipif(not shutil.which("make") or not shutil.which("bash"), reason="make or bash is missing")
MADE_ALREADY = [
    option for name in ("setup", ".venv/run", ".venv/tools", ".venv/data", ".venv/test") for option in ("-o", name)
]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `make` in a checkout whose path has a space and an umlaut. Its python prints its arguments, one a line, and
    knows of two GPUs."""
    folder = tmp_path / "wü rk"
    shutil.copytree(ROOT / "records" / "env", folder / "records" / "env")
    shutil.copy(ROOT / "Makefile", folder)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\ncase "$2" in *device_count*) echo 2;; *) printf "<%s>\\n" "$@";; esac\n')
    python.chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-s", *MADE_ALREADY, "BIN=bin", *arguments]
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)

    run.folder = folder
    return run


@needs_make
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["report", "RUN=logs/a logs/b"], ["records/report.py", "logs/a", "logs/b"]),
        (["report", "RUN='logs/a b' logs/c"], ["records/report.py", "logs/a b", "logs/c"]),
        (["report", 'RUN="logs/a b" logs/c'], ["records/report.py", "logs/a b", "logs/c"]),
        (["audit", "RUN='logs/ä b'"], ["records/audit.py", "logs/ä b"]),
        (["audit", "RUN=logs/a\\ b"], ["records/audit.py", "logs/a b"]),
        (["verify-data", "DATA=data/my set"], ["data/verify.py", "data/my set"]),
        (["verify-data"], ["data/verify.py"]),
        (["verify-data", 'DATA=Wörter für `5 $USD"'], ["data/verify.py", 'Wörter für `5 $USD"']),
        (["bench-data", "DOCS='Wörter 1.jsonl' b.jsonl"], ["tests/bench_data.py", "Wörter 1.jsonl", "b.jsonl"]),
    ],
)
def test_a_folder_with_a_space_in_it_reaches_the_tool_as_one(
    arguments: list[str], expected: list[str], make: Callable
) -> None:
    done = make(*arguments)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"<{word}>" for word in expected]), done


@needs_make
@pytest.mark.parametrize("target", ["report", "audit"])
def test_a_tool_that_needs_runs_says_so(target: str, make: Callable) -> None:
    done = make(target)
    assert done.returncode == 2
    assert done.stdout.startswith(f"make {target} needs RUN, folders of ")


@needs_make
@pytest.mark.parametrize("target", ["train", "bench", "submission-demo", "demo"])
@pytest.mark.parametrize("kind", ["line ends", "byte order mark"])
def test_make_refuses_settings_that_a_shell_cannot_read_and_says_how_to_mend_them(
    kind: str, target: str, make: Callable
) -> None:
    """Every value would end in a carriage return. A mark before the first comment makes a command of it: make ran the
    demonstration where `make demo` stood there in backticks."""
    name = "demo" if target == "demo" else "mine"
    path = make.folder / "records" / "env" / f"{name}.env"
    good = b"# As `touch oops` has it.\nSEED=7\n"
    path.write_bytes(good.replace(b"\n", b"\r\n") if kind == "line ends" else b"\xef\xbb\xbf" + good)
    names = {"demo": [], "submission-demo": [f"CONFIG={name}"]}.get(target, [f"CONFIG=toy {name}"])
    arguments = [target, *names]
    done = make(*arguments)
    assert done.returncode == 2
    said, mending = done.stdout.splitlines()
    assert said.startswith(f"records/env/{name}.env has the line ends of Windows (CR LF) or a byte order mark")
    assert not (make.folder / "oops").exists()
    subprocess.run(["bash", "-c", mending], cwd=make.folder, check=True)
    assert path.read_bytes() == good
    assert "line ends of Windows" not in make(*arguments).stdout


@pytest.mark.skipif(not shutil.which("git"), reason="git is missing")
def test_git_leaves_the_line_ends_of_what_shells_and_python_read(tmp_path: Path) -> None:
    """Git for Windows is installed with core.autocrlf=true, and its checkouts are also used from WSL and containers."""
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    contents = {name: b"one\ntwo\n" for name in ("toy.env", "Makefile", "run", "script.py", "README.md", "a.svg")}
    contents |= {name: b"one\ntwo\r\n" for name in ("val.bin", "bpe.model", "a.parquet", "a.png")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    git = functools.partial(subprocess.run, cwd=tmp_path, env=environment, check=True, capture_output=True)
    git(["git", "init"])
    git(["git", "config", "core.autocrlf", "true"])
    git(["git", "add", "."])
    for name in contents:
        (tmp_path / name).unlink()
    git(["git", "checkout", "--", "."])
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents
