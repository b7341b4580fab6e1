"""Figures of the challenge that more than one tool needs."""

from __future__ import annotations

from typing import NamedTuple

SIZE_LIMIT = 16_000_000  # bytes of code and model
TIME_LIMIT = 600.0  # seconds to train, and again to score
MARGIN = 0.005  # nats per token by which a record has to be better: the challenge's README, "Submission Process"
ALPHA = 0.01  # and the p below which that has to be shown, from the same place
SEEDS_OF_A_RECORD = 3  # "most often" enough, it says
VAL_BYTES = (151.02e6, 151.10e6)  # of the validation text: merged logs since 2026-03-18 lie in 151.024e6 .. 151.081e6


class Accepted(NamedTuple):
    """A record that the organizers accepted."""

    date: str
    bpb: float
    pull_request: int


# Each was the best when it was accepted; the challenge ended on 2026-04-30. From its README of 2026-05-04.
ACCEPTED = (
    Accepted("2026-03-21", 1.1248, 287),
    Accepted("2026-03-22", 1.1228, 374),
    Accepted("2026-03-23", 1.1194, 549),
    Accepted("2026-03-25", 1.1147, 1019),
    Accepted("2026-03-29", 1.1122, 1060),
    Accepted("2026-03-30", 1.1099, 1120),
    Accepted("2026-03-31", 1.1063, 1204),
    Accepted("2026-04-01", 1.0979, 1218),
    Accepted("2026-04-03", 1.0912, 1285),
    Accepted("2026-04-04", 1.0897, 1334),
    Accepted("2026-04-05", 1.0856, 1394),
    Accepted("2026-04-06", 1.0828, 1413),
    Accepted("2026-04-08", 1.0822, 1477),
    Accepted("2026-04-09", 1.0798, 1514),
    Accepted("2026-04-11", 1.0734, 1530),
    Accepted("2026-04-13", 1.0728, 1610),
    Accepted("2026-04-14", 1.0719, 1626),
    Accepted("2026-04-16", 1.0714, 1667),
    Accepted("2026-04-19", 1.0655, 1736),
    Accepted("2026-04-22", 1.0645, 1769),
    Accepted("2026-04-23", 1.0634, 1787),
    Accepted("2026-04-27", 1.0611, 1855),
    Accepted("2026-04-29", 1.0594, 1945),
    Accepted("2026-04-30", 1.0576, 2014),
    Accepted("2026-05-01", 1.0565, 2135),
)
