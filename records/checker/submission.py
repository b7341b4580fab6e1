"""Reads submission.json: the figures of the whole and of each seed, in the forms that submissions use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any


class Printed(float):
    """A number of a JSON file that remembers how many decimals it was written with."""

    decimals: int = 0

    def __new__(cls, text: Any) -> Any:
        value = super().__new__(cls, text)
        if not isinstance(text, str):  # the statistics of Python 3.10 make their results of the type of their values
            return float(value)
        mantissa, _, exponent = text.lower().partition("e")
        value.decimals = len(mantissa.partition(".")[2]) - int(exponent[:4] or 0)
        return value


def number(value: Any) -> float | None:
    """Returns a finite number, also one written as text; None for everything else, booleans included."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d[\d,]{0,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?\s*", value):
        value = Printed(value.strip().replace(",", ""))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e18:
        return None
    return value if math.isfinite(value) else None


def first(entry: dict[str, Any], *keys: str) -> float | None:
    """Returns the first of some keys that is a number."""
    return next((value for key in keys if (value := number(entry.get(key))) is not None), None)


def bpb_of(entry: dict[str, Any]) -> float | None:
    """Returns the bits per byte that submission.json gives for the whole or for a seed."""
    others = ("mean_bpb", "val_bpb_exact", "final_val_bpb", "bpb", "ttt_val_bpb")
    return first(entry, "val_bpb", "val_bpb_mean", "mean_val_bpb", *others)


def bytes_of(entry: dict[str, Any]) -> float | None:
    """Returns the bytes of the artifact that submission.json gives for a seed."""
    return first(entry, "artifact_bytes", "bytes_total", "total_bytes", "submission_bytes", "artifact_size_bytes")


def seconds_of(entry: dict[str, Any], *names: str) -> float | None:
    """Returns the first of some times that submission.json gives for a seed, in seconds."""
    units = (("_s", 1.0), ("_seconds", 1.0), ("_ms", 1e-3))
    found = (value * scale for n in names for u, scale in units if (value := number(entry.get(n + u))) is not None)
    return next(found, None)


def tolerance(claimed: float, decimals: int = 8) -> float:
    """Returns how far two figures may be apart that are the same number: one unit of the last digit printed."""
    printed = claimed.decimals if isinstance(claimed, Printed) else 8
    return min(max(1.01 * 10.0 ** -max(min(printed, decimals), 0), 1e-6), 5e-3)


def read_seeds(submission: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the results of each seed: an object or a list under one of the names in use, else the list of seeds, with
    the list of scores beside it where there is one of the same length."""
    scores = submission.get("seed_scores", submission.get("seed_val_bpb"))
    for key in ("seed_results", "per_seed_results", "per_seed", "results_by_seed", "runs", "results", "seeds", "seed"):
        value = submission.get(key)
        if isinstance(value, dict):
            entries = list(value.items())
        else:
            listed = value if isinstance(value, list) else [value]
            beside = scores if isinstance(scores, list) and len(scores) == len(listed) else [None] * len(listed)
            entries = [
                (e.get("seed"), e) if isinstance(e, dict) else (e, {"val_bpb": s}) for e, s in zip(listed, beside)
            ]
        found: dict[int, dict[str, Any]] = {}
        for name, entry in entries[:1000]:
            digits = re.search(r"\d{1,9}", str(name)) if isinstance(name, (str, int)) else None
            if digits and not isinstance(name, bool) and (isinstance(entry, dict) or key not in ("runs", "results")):
                found[int(digits[0])] = entry if isinstance(entry, dict) else {"val_bpb": entry}
        if found:
            return found
    return {}


def walk(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """Yields (place, key, value) of every key of a JSON document."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs if depth < 20 else ():
        place = f"{path}.{key}".strip(".")[-120:]
        yield place, str(key), value
        yield from walk(value, place, depth + 1)
