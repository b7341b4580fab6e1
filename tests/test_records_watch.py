"""Watching runs: the page grows with a live run, outlives it, and says what is known of its end; TensorBoard, too."""

from __future__ import annotations

import errno
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL, shell
from test_records_report import browser, show, write_events, write_run  # noqa: F401 - a fixture

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import forecast  # noqa: E402
import report  # noqa: E402
import watch  # noqa: E402
from runs import read_run, read_runs  # noqa: E402

BEGUN = 1_800_000_000.0  # seconds since 1970, when the runs of these tests began


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are drawn as often as they are asked for."""
    monkeypatch.setattr(watch, "REST", 0.0)


def live_events(events: list[dict[str, Any]], upto: str, steps: int = 0) -> list[dict[str, Any]]:
    """The first events of a run, with the times at which they came: those up to the first of a kind, or to a step."""
    kept = []
    for event in events:
        kept.append(event | {"time": BEGUN + event.get("seconds", 0.0)})
        if event["event"] == upto and event.get("step", 0) >= steps or event.get("stage") == upto:
            return kept
    raise AssertionError(f"no {upto}")


def state(folder: Path, others: tuple[Path, ...] = (), now: float = BEGUN + 30) -> watch.State:
    runs = read_runs([str(path) for path in (folder, *others)])
    return watch.state_of(runs[0], runs[1:], now)


PLAN = {"event": "plan", "scoring_seconds": 40.0, "epochs": 3, "epoch_seconds": 20.0}


# ---------------------------------------------------------------------------------------------------- what a run does


@pytest.mark.parametrize(
    ("upto", "doing"),
    [
        ("config", "preparing: trying out the whole pipeline"),
        ("train", "training, step 1 of at most 500"),
        ("raw", "scoring the averaged weights"),
        ("averaged", "exporting"),
        ("quantized", "computing the final score"),
        ("final", "finished"),
    ],
)
def test_the_page_says_what_a_run_does(tmp_path: Path, upto: str, doing: str) -> None:
    events = write_run(tmp_path / "a", iterations=500)
    write_events(tmp_path / "a", live_events(events, upto))
    assert state(tmp_path / "a").doing.startswith(doing)


def test_progress_of_a_long_score_is_told(tmp_path: Path) -> None:
    events = live_events(write_run(tmp_path / "a"), "quantized")
    progress = {"event": "progress", "label": "scoring with stride 64", "done": 45, "total": 100, "seconds": 9.0}
    write_events(tmp_path / "a", [*events, progress | {"time": BEGUN + 29}])
    seen = state(tmp_path / "a")
    assert seen.doing == "scoring with stride 64: 45%"
    assert seen.says == [f"This should be done at {watch.clock(BEGUN + 29 + 11)}."]


def test_bars_are_parts_of_the_budgets(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", iterations=500, max_wallclock_seconds=60.0)
    config, *rest = live_events(events, "train", steps=20)
    write_events(tmp_path / "a", [config, PLAN, *rest])
    training, scoring = state(tmp_path / "a").bars
    last = rest[-1]
    assert training.text == f"{last['seconds']:,.0f} of 60 s" and training.part == pytest.approx(last["seconds"] / 60)
    assert (scoring.text, scoring.part) == ("100 of 600 s", pytest.approx(1 / 6))  # 40 + 3 x 20
    write_events(tmp_path / "a", [config | {"max_wallclock_seconds": 0.0}, *rest])
    assert state(tmp_path / "a").bars[0].part == pytest.approx(last["step"] / 500)
    write_events(tmp_path / "a", [PLAN, *live_events(events, "quantized")])
    scored = live_events(events, "quantized")[-1]["time"]
    assert state(tmp_path / "a", now=scored + 66).bars[1] == ("final score, so far", "66 of 600 s", pytest.approx(0.11))
    write_events(tmp_path / "a", live_events(events, "final"))
    assert [bar.label for bar in state(tmp_path / "a").bars] == ["training", "final score"]


def test_a_silent_run_is_told_from_one_that_has_ended(tmp_path: Path) -> None:
    events = live_events(write_run(tmp_path / "a"), "train", steps=20)
    write_events(tmp_path / "a", events)
    last = events[-1]["time"]
    assert not any("No line" in line for line in state(tmp_path / "a", now=last + 59).says)
    assert any("No line for 80 s" in line for line in state(tmp_path / "a", now=last + 80).says)
    assert any("No line for 10 minutes" in line for line in state(tmp_path / "a", now=last + 600).says)
    ended = {"event": "ended", "reason": "stopped by SIGTERM", "time": last + 1}
    write_events(tmp_path / "a", [*events, ended])
    over = state(tmp_path / "a", now=last + 600)
    assert over.doing == "ended: stopped by SIGTERM" and over.says == []
    write_events(tmp_path / "a", [*events, ended, events[-1] | {"time": last + 90}])  # it goes on
    assert state(tmp_path / "a", now=last + 91).doing.startswith("training")


def test_a_report_tells_why_a_run_has_ended(tmp_path: Path) -> None:
    events = live_events(write_run(tmp_path / "a"), "train", steps=20)
    write_events(tmp_path / "a", [*events, {"event": "ended", "reason": "step 20: train_loss is nan"}])
    run = read_run(tmp_path / "a", "a", 0, True)
    assert any("after step 20: step 20: train_loss is nan" in note for note in run.notes)


# ---------------------------------------------------------------------------------------------------- forecasts


def test_the_end_is_forecast_from_the_pace_and_the_budget(tmp_path: Path) -> None:
    """Steps take 0.65 s. 500 steps end after 325 s; a budget of 60 s ends before."""
    events = write_run(tmp_path / "a", iterations=500, max_wallclock_seconds=0.0, steps=100)
    config, *rest = live_events(events, "train", steps=50)
    write_events(tmp_path / "a", [config, PLAN, *rest])
    run = read_run(tmp_path / "a", "a", 0, True)
    found = forecast.forecast(run, [], now=0.0)
    assert (found.training_ends, found.last_step) == (pytest.approx(BEGUN + 325), 500)
    assert found.score_is_there == pytest.approx(BEGUN + 425)
    run.config["max_wallclock_seconds"] = 60.0
    found = forecast.forecast(run, [], now=0.0)
    assert (found.training_ends, found.last_step) == (pytest.approx(BEGUN + 60, abs=0.65), int(60 / 0.65))
    run.scores["raw"] = {}
    assert forecast.forecast(run, [], now=0.0) is None


def test_steps_that_recurrence_makes_longer_are_forecast_before_and_after_it_begins(tmp_path: Path) -> None:
    """Of 11 blocks two run twice from 40% of the run on: 0.65 s a step become 13/11 of that."""
    events = write_run(tmp_path / "a", iterations=500, max_wallclock_seconds=0.0, steps=100)
    config, *rest = live_events(events, "train", steps=50)
    config |= {"recur_layers": "4,5", "recur_start_frac": 0.4, "num_layers": 11}
    write_events(tmp_path / "a", [config, *rest])
    run = read_run(tmp_path / "a", "a", 0, True)
    late = 0.65 * 13 / 11
    found = forecast.forecast(run, [], now=0.0)
    assert (found.training_ends, found.last_step) == (pytest.approx(BEGUN + 200 * 0.65 + 300 * late), 500)
    run.config["max_wallclock_seconds"] = 100.0
    now = int(40 / 0.65)
    found = forecast.forecast(run, [], now=0.0)
    assert found.last_step == now + int((100 - now * 0.65) / late)
    assert found.training_ends == pytest.approx(BEGUN + 100, abs=late)
    begun = [{"event": "recurrence", "step": 50, "seconds": 32.5}]
    begun += [{"event": "train", "step": 50 + i, "seconds": 32.5 + i, "train_loss": 3.0} for i in range(1, 21)]
    write_events(
        tmp_path / "b", [config | {"max_wallclock_seconds": 0.0}, *rest, *live_events(begun, "train", steps=70)]
    )
    run = read_run(tmp_path / "b", "b", 0, True)
    assert forecast.forecast(run, [], now=0.0).training_ends == pytest.approx(BEGUN + 52.5 + 430)


def test_a_resumed_run_is_forecast_from_its_checkpoint(tmp_path: Path) -> None:
    """Killed after step 100, it goes on an hour later from step 60, of 500 steps of 0.65 s."""
    events = live_events(write_run(tmp_path / "a", iterations=500, max_wallclock_seconds=0.0, steps=100), "raw")[:-1]
    again = [
        {"event": "segment", "number": 2, "stage": "train", "time": BEGUN + 3600},
        events[0] | {"time": BEGUN + 3601},
        {"event": "resumed", "step": 60, "seconds": 39.0, "time": BEGUN + 3610},
    ]
    write_events(tmp_path / "a", [*events, *again])
    run = read_run(tmp_path / "a", "a", 0, True)
    found = forecast.forecast(run, [], now=0.0)
    assert (found.training_ends, found.last_step) == (pytest.approx(BEGUN + 3610 + 440 * 0.65), 500)
    assert watch.training_bar(run).text == "60 of 500 steps"


def test_after_the_training_the_bar_has_its_real_steps(tmp_path: Path) -> None:
    events = live_events(write_run(tmp_path / "a", iterations=500), "train", steps=20)
    write_events(tmp_path / "a", [*events, {"event": "trained", "steps": 32, "seconds": 99.6, "time": BEGUN + 100}])
    run = read_run(tmp_path / "a", "a", 0, True)
    assert watch.training_bar(run) == watch.Bar("training", "100 s, 32 steps", 1.0)
    assert forecast.forecast(run, [], now=0.0) is None


def test_nothing_is_forecast_from_a_few_steps(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", iterations=500, max_wallclock_seconds=0.0, steps=200)
    for steps, is_there in ((90, False), (120, True)):
        write_events(tmp_path / "a", live_events(events, "train", steps=steps))
        found = forecast.forecast(read_run(tmp_path / "a", "a", 0, True), [], now=0.0)
        assert (found.loss is not None) == is_there, steps


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_loss_that_follows_the_law_is_forecast_within_what_is_claimed(part: float) -> None:
    generator = np.random.default_rng(0)
    misses = []
    for _ in range(40):
        fall, drop, exponent = generator.normal(0.4, 0.1), generator.normal(0.3, 0.15), generator.uniform(0.3, 1.0)
        parts = np.arange(0.05, part, 0.01)
        rates = np.minimum(1.0, (1 - parts) / 0.5)
        losses = 3.0 + fall * parts**-exponent + drop * rates + generator.normal(0, 0.02, len(parts))
        mean, spread = forecast.follow_law(parts, losses, rates)
        misses.append(abs(mean - (3.0 + fall)) / spread)
    # Of a normal deviate 5% are beyond 2 and 0.3% beyond 3.
    assert sum(miss > 2 for miss in misses) <= 8 and max(misses) < 5, sorted(misses)[-5:]


def test_what_is_known_grows_with_the_steps() -> None:
    spreads = []
    for part in (0.3, 0.6, 0.95):
        parts = np.arange(0.05, part, 0.01)
        rates = np.minimum(1.0, (1 - parts) / 0.5)
        noise = np.random.default_rng(1).normal(0, 0.02, len(parts))
        spreads.append(forecast.follow_law(parts, 3.0 + 0.4 * parts**-0.5 + 0.3 * rates + noise, rates)[1])
    assert spreads == sorted(spreads, reverse=True) and spreads[0] > 0.1 and spreads[-1] < 0.05


def test_a_finished_run_with_the_same_schedule_is_what_to_compare_with(tmp_path: Path) -> None:
    write_run(tmp_path / "base", bpb=1.9, steps=100, iterations=100)
    events = write_run(tmp_path / "a", bpb=1.95, steps=100, iterations=100, seed=2)
    write_events(tmp_path / "a", live_events(events, "train", steps=60))
    runs = read_runs([str(tmp_path / "a"), str(tmp_path / "base")])
    found = forecast.forecast(runs[0], runs[1:], now=0.0)
    # All losses of these made-up runs are 1.7 x 0.05 apart.
    assert found.loss == pytest.approx(runs[1].scores["raw"]["val_loss"] + 1.7 * 0.05)
    assert found.spread < 1e-6 and "+0.085 from base" in found.how
    runs[1].config["warmdown_frac"] = 0.2  # another schedule
    assert "power law" in forecast.forecast(runs[0], runs[1:], now=0.0).how


def test_an_old_log_without_times_is_watched_too(tmp_path: Path) -> None:
    events = write_run(tmp_path / "a", iterations=500)
    config = {name: value for name, value in events[0].items() if not name.startswith("gptq")}
    write_events(tmp_path / "a", [config, *(event for event in events if event["event"] == "train")])
    assert state(tmp_path / "a").doing.startswith("training")


# ---------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Serves folders, and returns a function that asks for a path."""
    servers = []

    def start(*folders: Path) -> SimpleNamespace:
        server = watch.open_server(list(map(str, folders)), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

        def ask(path: str, host: str = "localhost") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        return SimpleNamespace(ask=ask, url=f"http://127.0.0.1:{server.server_port}/", server=server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_page_is_sent_again_only_when_a_log_has_grown(tmp_path: Path, serve: Callable[..., Any]) -> None:
    events = write_run(tmp_path / "a")
    write_events(tmp_path / "a", live_events(events, "train", steps=10))
    ask = serve(tmp_path / "a").ask
    first = json.loads(ask("/state?seen=")[1])
    assert "step 10" in first["now"] and "Loss against steps" in first["page"]
    assert "Loss against steps" in ask(f"/?seen={first['version']}")[1]
    again = json.loads(ask(f"/state?seen={first['version']}")[1])
    assert again["page"] is None and again["version"] == first["version"]
    write_events(tmp_path / "a", live_events(events, "train", steps=20), end='{"event": "train", "st')
    grown = json.loads(ask(f"/state?seen={first['version']}")[1])
    assert "step 20" in grown["now"] and grown["page"] and "cut off" not in grown["page"]


def test_drawing_takes_a_tenth_of_the_time(
    tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REST", 9.0)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)
    draw = watch.Watch.draw

    def slow(self: watch.Watch) -> None:
        draw(self)
        self.draw_seconds = 2.0

    monkeypatch.setattr(watch.Watch, "draw", slow)
    events = write_run(tmp_path / "a")
    write_events(tmp_path / "a", live_events(events, "train", steps=10))
    page = watch.Watch([str(tmp_path / "a")])
    page.answer("")
    write_events(tmp_path / "a", live_events(events, "train", steps=20))
    clock.now = 117.9
    assert "step 10" in page.answer("")["now"]
    clock.now = 118.1
    assert "step 20" in page.answer("")["now"]


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, serve: Callable[..., Any]) -> None:
    write_run(tmp_path / "b")
    ask = serve(tmp_path / "a", tmp_path / "b").ask
    before = json.loads(ask("/state?seen=")[1])
    assert "not there yet" in before["now"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").touch()
    assert "not begun" in json.loads(ask("/state?seen=")[1])["now"]
    colour = re.search(r"var\(--(c\d)\)", before["now"])[1]
    write_run(tmp_path / "a")
    after = json.loads(ask("/state?seen=")[1])["now"]
    assert "not there yet" not in after
    assert re.findall(r"var\(--(c\d)\)", after)[1] == colour == "c1"  # b keeps its colour


def test_a_broken_log_is_said_and_the_page_stays(tmp_path: Path, serve: Callable[..., Any]) -> None:
    write_run(tmp_path / "a")
    ask = serve(tmp_path / "a").ask
    assert "finished" in json.loads(ask("/state?seen=")[1])["now"]
    (tmp_path / "a" / "metrics.jsonl").write_text("<script>\n{}\n")
    answer = json.loads(ask("/state?seen=")[1])
    assert (
        "is not JSON" in answer["now"] and "Loss against steps" in answer["page"] and "<script>\n" not in answer["now"]
    )
    assert ask("/")[0] == 200


@pytest.mark.parametrize(
    "event",
    [
        {"event": "train", "step": -1, "train_loss": 3.0, "seconds": 1.0},
        {"event": "train", "step": 5, "train_loss": float("nan"), "seconds": 1.0},
        {"event": "train", "step": 5, "train_loss": 3.0, "seconds": 1.0, "time": None},
        {"event": "train", "step": 5, "train_loss": 3.0, "seconds": 1.0, "time": 1e30},
        {"event": "train", "step": 5, "train_loss": 3.0, "seconds": 1.0, "lr_scale": "1"},
        {"event": "progress", "label": "x", "done": "much", "total": 1, "seconds": 1},
        {"event": "ended", "reason": 3},
        {"event": "config", "seed": 1, "train_batch_tokens": 1, "machine": "", "iterations": "150"},
        {"event": "config", "seed": 1, "train_batch_tokens": 1, "machine": "", "eval_budget_seconds": "y"},
    ],
)
def test_a_strange_event_is_said_and_the_server_goes_on(
    tmp_path: Path, serve: Callable[..., Any], event: dict[str, Any]
) -> None:
    events = live_events(write_run(tmp_path / "a"), "train", steps=20)
    ask = serve(tmp_path / "a").ask
    assert ask("/state?seen=")[0] == 200
    write_events(tmp_path / "a", [*(events if event["event"] != "config" else []), event])
    status, answer = ask("/state?seen=")
    assert status == 200 and "metrics.jsonl:" in json.loads(answer)["now"]
    write_events(tmp_path / "a", events)
    assert "Below is what could be read" not in json.loads(ask("/state?seen=")[1])["now"]


def test_a_tab_of_an_earlier_server_gets_the_new_page(tmp_path: Path, serve: Callable[..., Any]) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    seen = json.loads(serve(tmp_path / "a").ask("/state?seen=")[1])["version"]
    assert json.loads(serve(tmp_path / "b").ask(f"/state?seen={seen}")[1])["page"]


def test_only_this_machine_is_answered(tmp_path: Path, serve: Callable[..., Any]) -> None:
    write_run(tmp_path / "a")
    served = serve(tmp_path / "a")
    assert served.server.server_address[0] == "127.0.0.1"
    assert served.ask("/state?seen=", host="evil.example")[0] == 403
    assert served.ask("/../../etc/passwd")[0] == 404 and served.ask("/", host="127.0.0.1")[0] == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}", "{a}"], "is given twice"),
        (["{a}/metrics.jsonl"], "is a file: give the folder of a run"),
        (["{a}", "--port", "99999"], "--port 99999 is none: give a number from 0"),
    ],
)
def test_what_cannot_be_watched_is_said_at_once(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    assert report.main([*(word.format(a=tmp_path / "a") for word in words), "--watch"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("words", [["--watch", "--out", "x"], ["--port", "5"]])
def test_options_without_effect_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["logs/a", *words])
    assert "leave" in capsys.readouterr().err


def test_a_taken_port_is_said(tmp_path: Path, serve: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    port = serve(tmp_path).server.server_port
    assert report.main([str(tmp_path), "--watch", "--port", str(port)]) == 2
    printed = capsys.readouterr().err
    assert f"port {port} cannot be opened" in printed and "--port 0" in printed and printed.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- a live run


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Returns the first true answer of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not come")


@pytest.mark.slow
def test_a_browser_watches_a_live_run_grow_and_die(
    browser: Any,  # noqa: F811
    corpus: SimpleNamespace,
    tmp_path: Path,
    serve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The real script. Where one reads stays where it is; the page is right on phone and desktop, in light and dark."""
    settings = SMALL | {"ITERATIONS": 100_000, "MAX_WALLCLOCK_SECONDS": 500, "TRAIN_LOG_EVERY": 5, "WARMUP_STEPS": 1}
    process = subprocess.Popen(
        [sys.executable, str(t.CODE)], env=shell(corpus, **settings, RUN_ID="a"), cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        served = serve(tmp_path / "logs" / "a")
        show(browser, served.url, 1280, 900, "light")
        browser.get_log("browser")

        def now() -> str:
            return browser.execute_script("return document.getElementById('now').innerText")

        def step() -> int:
            found = re.search(r"training, step ([\d,]+)", now())
            return int(found[1].replace(",", "")) if found else 0

        wait_for(lambda: "not there yet" in now() or "preparing" in now() or step())
        wait_for(lambda: step() >= 15)
        browser.execute_script("document.querySelector('.scroll').scrollLeft = 7; scrollTo(0, 300)")
        points = "return document.querySelector('#loss_steps svg').innerHTML.length"
        before, seen = browser.execute_script(points), step()
        wait_for(lambda: step() >= seen + 20)
        wait_for(lambda: browser.execute_script(points) > before)
        assert browser.execute_script("return scrollY") == 300
        wait_for(lambda: "Training should end at" in now() and "Predicted loss at the end" in now())
        for width, height in ((360, 800), (1280, 900)):
            for mode in ("light", "dark"):
                show(browser, served.url, width, height, mode)
                wait_for(lambda: step() > 0)
                assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
                bars = "return [...document.querySelectorAll('.bar > span')].map(e => e.getBoundingClientRect().height)"
                assert browser.execute_script(bars)[:2] == [10, 10]
        process.send_signal(signal.SIGKILL)
        process.wait()
        monkeypatch.setattr(watch, "SILENT_SECONDS", 0.0)
        wait_for(lambda: "No line for" in now())
        assert browser.get_log("browser") == []
        served.server.shutdown()
        served.server.server_close()
        wait_for(
            lambda: "The server of this page has ended" in browser.execute_script("return document.body.innerText")
        )
        assert step() > 0  # what it showed last
    finally:
        process.kill()


@pytest.mark.slow
def test_a_run_says_in_its_log_why_it_ended(
    run_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_script(**SMALL, QUANT_FLOOR=0, SIZE_LIMIT=200_000, RUN_ID="a")  # what cannot fit
    events = [json.loads(line) for line in (tmp_path / "logs/a/metrics.jsonl").read_text().splitlines()]
    assert done.returncode == 1 and events[-1]["event"] == "ended"
    assert f"error: {events[-1]['reason']}" in done.stderr
    assert (tmp_path / "logs/a/train.log").read_text().rstrip().endswith(events[-1]["reason"])
    assert all(abs(event["time"] - time.time()) < 600 for event in events)


# ---------------------------------------------------------------------------------------------------- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_reads_the_numbers_of_the_log(
    run_script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_script(**SMALL, VAL_LOSS_EVERY=10, TENSORBOARD=1, RUN_ID="a")
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (tmp_path / "logs/a/metrics.jsonl").read_text().splitlines()]
    read = scalars(tmp_path / "logs" / "a")
    train = [(e["step"], pytest.approx(e["train_loss"])) for e in events if e["event"] == "train"]
    assert read["train/train_loss"] == train and len(train) > 5
    scores = {e["stage"]: e["val_bpb"] for e in events if e["event"] == "eval"}
    assert read["validation/val_bpb"] == [(s, pytest.approx(scores[f"step:{s}/24"])) for s in (10, 20)]
    assert read["ttt/val_bpb"] == [(24, pytest.approx(scores["ttt"]))]
    assert read["final/bytes_total"] == [(24, pytest.approx(events[-1]["bytes_total"]))]


def board_in(folder: Path) -> t.TensorBoard:
    board = t.TensorBoard()
    board.open(folder)
    return board


def test_steps_that_a_resumed_run_takes_again_are_shown_once(tmp_path: Path) -> None:
    step = {"lr_scale": 1.0, "tokens_per_second": 9.0}
    board = board_in(tmp_path)
    for i in range(1, 9):
        board.add("train", {"step": i, "train_loss": 100.0 + i, **step})
    board.add("ended", {"reason": "stopped"})
    time.sleep(1.1)  # TensorBoard orders the files by the second in their names
    again = board_in(tmp_path)
    again.add("resumed", {"step": 5, "seconds": 1.0})
    for i in (6, 7):
        again.add("train", {"step": i, "train_loss": float(i), **step})
    again.add("ended", {"reason": "stopped"})
    expected = [(i, 100.0 + i) for i in range(1, 6)] + [(6, 6.0), (7, 7.0)]
    assert scalars(tmp_path)["train/train_loss"] == expected


def test_a_full_disk_ends_the_curves_and_not_the_run(
    make_run: Callable[..., t.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rt = make_run(tensorboard=True).rt
    rt.open_log(tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rt.board.writer.add_scalar = full
    for step in (1, 2):
        rt.record("train", step=step, train_loss=1.0, lr_scale=1.0, tokens_per_second=1.0)
    assert capsys.readouterr().out.count("TensorBoard gets no more numbers: No space left on device") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_package_the_run_does_not_begin(monkeypatch: pytest.MonkeyPatch, tiny: Callable) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(t.UserError, match="the package tensorboard is missing: `pip install tensorboard`"):
        t.Runtime(tiny(tensorboard=True))
