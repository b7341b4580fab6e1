"""The picture in the README: its numbers are those of the code, and it is an SVG that a browser can show as it is."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import architecture  # noqa: E402

COMMITTED = architecture.PICTURE.read_text(encoding="utf-8")


def test_the_committed_picture_is_what_the_script_draws_now() -> None:
    assert architecture.draw() == COMMITTED, "the defaults have changed: run `make architecture` and commit the picture"


def test_settings_of_the_environment_do_not_change_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_LAYERS", "3")
    monkeypatch.setenv("MODEL_DIM", "not a number")
    assert architecture.draw() == COMMITTED


def test_the_parts_of_the_picture_add_up_to_the_model() -> None:
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in t.GPT(t.Hyperparameters()).parameters())
    _, counts = architecture.default_model()
    assert sum(counts.values()) == total and min(counts.values()) > 0
    assert f"{total:,} parameters" in COMMITTED


def test_the_picture_is_well_formed_small_and_needs_nothing_else() -> None:
    root = ElementTree.fromstring(COMMITTED)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(COMMITTED.encode()) <= 12_000
    assert "prefers-color-scheme:dark" in COMMITTED
    links = [value for value in re.findall(r"(?:href|src)=|url\(([^)]*)\)", COMMITTED) if value != "#h"]
    assert not links and "<script" not in COMMITTED and "@import" not in COMMITTED


def test_the_readme_shows_the_picture() -> None:
    assert "](records/architecture.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
