"""Serves the page of runs to this machine while they go on: `python records/report.py logs/a logs/b --watch`.

The page asks every two seconds what is new, and puts it in place without losing where one reads. At its top is the
state of now: what each run does, how much of its budgets is gone, when it will end, and at which loss. Figures are
drawn when a log has grown and somebody looks, in at most a tenth of the time, since a run may need the cores."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import report
from forecast import Forecast, forecast
from page import Picture, card, esc, num, page_look, whole_page
from report import named
from runs import Run, RunError, read_runs, t

ADDRESS = "127.0.0.1"  # nobody else's machine
POLL_MILLISECONDS = 2000
REST = 9.0  # seconds without drawing for each second of drawing
SILENT_SECONDS = 60.0  # in training a line comes every 30 s, in scoring every 15
FILES = ("metrics.jsonl", "final_model.bin", "compliance.json")
SCRIPT = """
let seen = "";
const gone = document.createElement("p");
gone.className = "card notes";
gone.textContent = "The server of this page has ended. Below is what it showed last.";
function replace(page) {
  const fresh = new DOMParser().parseFromString(page, "text/html");
  const open = [...document.querySelectorAll("details")].map((box) => box.open);
  const scrolled = [...document.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  const focus = [...document.querySelectorAll("summary, .scroll")].indexOf(document.activeElement);
  for (const name of ["header", "main"]) document.querySelector(name).replaceWith(fresh.querySelector(name));
  document.title = fresh.title;
  document.querySelectorAll("details").forEach((box, i) => { box.open = open[i] ?? false; });
  document.querySelectorAll(".scroll").forEach((box, i) => { box.scrollLeft = scrolled[i] ?? 0; });
  if (focus >= 0) document.querySelectorAll("summary, .scroll")[focus]?.focus({ preventScroll: true });
}
async function refresh() {
  if (!document.hidden) {
    try {
      const answer = await (await fetch("state?seen=" + seen)).json();
      if (answer.page) replace(answer.page);
      document.getElementById("now").innerHTML = answer.now;
      seen = answer.version;
      gone.remove();
    } catch {
      document.querySelector("h1").after(gone);
    }
  }
  setTimeout(refresh, MILLISECONDS);
}
refresh();
""".replace("MILLISECONDS", str(POLL_MILLISECONDS))


STYLE = """
#now { margin: 1rem 0 0; }
#now h3 { margin-bottom: .4rem; overflow-wrap: anywhere; }
#now > p { margin: .5rem 0 0; }
.bar { margin: 0 0 .6rem; }
.bar > span { display: block; height: 10px; border-radius: 5px; background: var(--rule); overflow: hidden; }
.bar > span > span { display: block; height: 100%; background: var(--c0); }
"""


# =================================================== now =============================================================
class Bar(NamedTuple):
    """How much of a budget is gone."""

    label: str
    text: str
    part: float  # of 1


class State(NamedTuple):
    """What a run does now."""

    doing: str
    bars: list[Bar]
    says: list[str]  # HTML


def state_of(run: Run, others: list[Run], now: float) -> State:
    """Return what a run does at a time, in seconds since 1970, from its events."""
    if not run.events:
        return State("not begun: there is no line in its log yet", [], [])
    last = run.events[-1]
    bars = [bar for bar in (training_bar(run), scoring_bar(run, now), size_bar(run)) if bar is not None]
    if run.final:
        return State("finished", bars, [])
    if last["event"] == "ended":
        return State(f"ended: {last['reason']}", bars, [])
    says = []
    silence = now - last.get("time", now)
    if silence > SILENT_SECONDS:
        minutes = f"{silence / 60:.0f} minutes" if silence > 90 else f"{silence:.0f} s"
        says.append(f"<b>No line for {minutes}</b>: the process may be dead, or compiling, or paused.")
    else:
        says += expectations(forecast(run, others, now))
        if last["event"] == "progress" and last["done"] and "time" in last:
            left = last["seconds"] * (last["total"] / last["done"] - 1)
            says.append(f"This should be done at {clock(last['time'] + left)}.")
    return State(phase_of(run), bars, says)


def phase_of(run: Run) -> str:
    """Return what a run that goes on is doing, from the last event that tells."""
    for event in reversed(run.events):
        kind = event["event"]
        if kind == "progress":
            return f"{event['label']}: {event['done'] / max(1, event['total']):.0%}"
        if kind in ("train", "checkpoint") or kind == "eval" and event["stage"].startswith("step:"):
            return f"training, step {run.steps:,} of at most {run.config['iterations']:,}"
        if kind == "eval":
            following = {"raw": "scoring the averaged weights", "averaged": "exporting"}
            return following.get(event["stage"], "computing the final score")
        if kind in ("stored", "coders"):
            return "scoring what is in the file"
        if kind == "plan":
            return "beginning"
    return "preparing: trying out the whole pipeline on random tokens"


def training_bar(run: Run) -> Bar | None:
    """Return how much of the training is over: by its clock or its steps, whichever ends it."""
    if not run.train:
        return None
    last, config = run.train[-1], run.config
    last = last | {name: value for name, value in run.last("train", "resumed").items() if name in ("step", "seconds")}
    parts = {}
    if config.get("iterations"):
        parts[f"{last['step']:,} of {config['iterations']:,} steps"] = last["step"] / config["iterations"]
    if config.get("max_wallclock_seconds"):
        budget = config["max_wallclock_seconds"]
        parts[f"{last['seconds']:,.0f} of {budget:,.0f} s"] = last["seconds"] / budget
    if not parts:
        return None
    text, part = max(parts.items(), key=lambda item: item[1])
    if run.last("trained") or any(name in run.scores for name in ("raw", "quantized")):
        return Bar("training", f"{run.train_seconds:,.0f} s, {run.steps:,} steps", 1.0)
    return Bar("training", text, min(1.0, part))


def scoring_bar(run: Run, now: float) -> Bar | None:
    """Return how much of the final score's budget it took, has taken so far, or is planned to take."""
    budget = run.config.get("eval_budget_seconds") or t.EVAL_LIMIT_SECONDS
    plan = run.last("plan")
    begins = "sliding" if run.config.get("eval_ladder") else "quantized"  # the score before it
    label = "final score"
    if run.final:
        seconds = run.final["eval_seconds"]
    elif begins in run.scores and "time" in run.scores[begins]:
        label += ", so far"
        seconds = now - run.scores[begins]["time"]
    elif plan:
        label += ", planned"
        seconds = plan["scoring_seconds"] + plan["epochs"] * plan["epoch_seconds"]
    else:
        return None
    return Bar(label, f"{seconds:,.0f} of {budget:,.0f} s", min(1.0, seconds / budget))


def size_bar(run: Run) -> Bar | None:
    """Return how much of the bytes the artifact takes."""
    if not run.bytes_artifact or not (run.final or run.scores.get("averaged")):
        return None
    text = f"{run.bytes_artifact:,} bytes without code, of {t.SIZE_LIMIT_BYTES:,}"
    size = run.bytes_artifact
    if run.final:
        size = run.final["bytes_total"]
        text = f"{size:,.0f} of {t.SIZE_LIMIT_BYTES:,} bytes"
    return Bar("size", text, min(1.0, size / t.SIZE_LIMIT_BYTES))


def expectations(expected: Forecast | None) -> list[str]:
    """Return lines on what a training is expected to come to."""
    if expected is None:
        return []
    lines = [f"Training should end at {clock(expected.training_ends)}, at step {num(expected.last_step)}"]
    if expected.score_is_there:
        lines[0] += f"; the score should be there at {clock(expected.score_is_there)}"
        lines[0] += ", export and the scores before it not counted"
    lines[0] += "."
    if expected.loss is not None:
        lines.append(
            f"Predicted loss at the end: <b>{num(expected.loss, '.3f')}</b> ± {num(expected.spread, '.3f')} "
            f"nats a token ({esc(expected.how)})."
        )
    return lines


def clock(seconds: float) -> str:
    """Return the time of day, with the date where it is not today."""
    moment = datetime.fromtimestamp(seconds)
    is_today = moment.date() == datetime.fromtimestamp(time.time()).date()
    return f"{moment:%H:%M:%S}" if is_today else f"{moment:%H:%M:%S on %Y-%m-%d}"


def bar_html(bar: Bar) -> str:
    """Return a bar with its label and text."""
    width = f'<span style="width:{100 * bar.part:.1f}%"></span>'
    aria = f'role="progressbar" aria-label="{esc(bar.label)}" aria-valuenow="{100 * bar.part:.0f}"'
    return f'<p class="bar"><small>{esc(bar.label)}: {esc(bar.text)}</small><span {aria}>{width}</span></p>'


def now_html(runs: list[Run], waiting: list[str], now: float) -> str:
    """Return the state of all runs at a time."""
    cards = []
    for run in runs:
        state = state_of(run, [other for other in runs if other is not run], now)
        title = f"<h3>{named(run)}: {esc(state.doing)}</h3>"
        says = "".join(f"<p>{line}</p>" for line in state.says)
        cards.append(card(title, *map(bar_html, state.bars), says))
    cards += [card(f"<h3>{esc(name)}: not there yet</h3>") for name in waiting]
    return f'<div class="grid">{"".join(cards)}</div><p class="muted">As of {clock(now)}.</p>'


# =================================================== serving =========================================================
class Watch:
    """The page of some folders, drawn anew when their files change and somebody asks."""

    def __init__(self, folders: list[str]):
        self.folders = folders
        self.lock = threading.Lock()
        self.files: list[tuple] = []  # of the page
        self.page = page_of([], {})
        self.trouble = ""  # why it is not newer
        self.started = time.time_ns()  # tells its versions from those of an earlier server at this address
        self.version = 0
        self.runs: list[Run] = []
        self.waiting: list[str] = []
        self.drawn = 0.0  # when the page was, on the monotonic clock
        self.draw_seconds = 0.0

    def look(self) -> list[tuple]:
        """Return time and size of all files that the page shows."""
        found = []
        for folder in self.folders:
            for name in FILES:
                path = Path(folder) / name
                stat = path.stat() if path.exists() else None
                found.append((stat.st_mtime_ns, stat.st_size) if stat else ())
        return found

    def answer(self, seen: str) -> dict[str, Any]:
        """Return the state of now; and the page, unless its version is the one that was seen."""
        with self.lock:
            is_rested = time.monotonic() - self.drawn >= REST * self.draw_seconds
            try:
                files = self.look()
                if files != self.files and is_rested:
                    self.files = files
                    self.draw()
                    self.trouble = ""
            except (RunError, t.UserError, OSError) as error:  # the page stays as it was
                self.trouble = card(f"<p>Below is what could be read before: {esc(error)}</p>")
            now = self.trouble + now_html(self.runs, self.waiting, time.time())
            version = f"{self.started}-{self.version}"
            return {"version": version, "now": now, "page": None if seen == version else self.page}

    def draw(self) -> None:
        """Read the runs that are there, and draw the page."""
        started = time.monotonic()
        self.waiting = [folder for folder in self.folders if not (Path(folder) / "metrics.jsonl").is_file()]
        self.runs = read_runs(self.folders, missing_ok=True)
        for run in self.runs:
            if not run.final:  # what is missing will come, and a line may be half written
                run.notes = []
        with page_look():
            pictures = report.draw_all([run for run in self.runs if run.config])
            self.page = page_of(self.runs, pictures)
        self.version += 1
        self.drawn = time.monotonic()
        self.draw_seconds = self.drawn - started


def page_of(runs: list[Run], pictures: dict[str, Picture]) -> str:
    """Return the page, with a place for the state of now."""
    now = '<div id="now" aria-live="off"></div>'
    begun = [run for run in runs if run.config]
    if begun:
        return report.page_html(begun, pictures, now, STYLE, SCRIPT)
    return whole_page("report of runs", "Runs that have not begun", now, {}, "", STYLE, SCRIPT)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the page's requests, and only those that were meant for this machine."""

    watch: Watch

    def do_GET(self) -> None:  # noqa: N802 - the name is the library's
        """Answer a request."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost", "[::1]"):  # a page of somebody else's, by a name that leads here
            self.reply(403, "text/plain", b"This page is for the machine that serves it: use localhost.\n")
            return
        path, _, query = self.path.partition("?")
        if path not in ("/", "/state"):
            self.reply(404, "text/plain", b"There is / alone.\n")
            return
        if path == "/":
            self.reply(200, "text/html; charset=utf-8", self.watch.answer(seen="")["page"].encode())
            return
        answer = self.watch.answer(query.removeprefix("seen="))
        self.reply(200, "application/json", json.dumps(answer).encode())

    def reply(self, status: int, kind: str, content: bytes) -> None:
        """Send an answer, which no browser keeps."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing for a request."""


def open_server(folders: list[str], port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of the page of folders. Raise RunError for folders that cannot be runs, and where the port is
    taken."""
    read_runs(folders, missing_ok=True)
    if not 0 <= port <= 65_535:
        raise RunError(f"--port {port} is none: give a number from 0, which takes a free one, to 65535")
    handler = type("WatchHandler", (Handler,), {"watch": Watch(folders)})
    try:
        server = http.server.ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        fix = "--port 0 takes a free one"
        raise RunError(f"port {port} cannot be opened ({error.strerror}): {fix}") from None
    server.daemon_threads = True
    return server


def main(folders: list[str], port: int) -> int:
    """Serve until Ctrl-C."""
    try:
        server = open_server(folders, port)
    except (RunError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    port = server.server_port
    tunnel = f"ssh -L {port}:{ADDRESS}:{port} {socket.gethostname()}"
    print(f"watching at http://{ADDRESS}:{port} until Ctrl-C; from elsewhere by way of: {tunnel}", flush=True)
    for folder in folders:
        if not Path(folder).is_dir():
            print(f"{folder} is not there yet: it is waited for", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    with contextlib.suppress(BrokenPipeError):
        print("\nstopped watching; the runs go on", flush=True)
    return 0
