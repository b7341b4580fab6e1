"""What a rule is, the list of all rules, and how they are run.

A rule is a function that yields findings on a folder, under `@rule(id, gravest severity, meaning, source)`; one that
speaks for several ids has several. Sources: Rn is the challenge's README, rule by rule; #n is a pull request or an
issue of openai/parameter-golf."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .folder import Folder

SEVERITIES = ("reject", "warn", "note")  # from the gravest on


@dataclass
class Finding:
    """What one rule says of one folder, and the line that shows it."""

    rule: str
    severity: str
    message: str
    file: str = ""
    line: int = 0
    also: list[str] = field(default_factory=list)  # further places of the same finding


class Rule(NamedTuple):
    gravest: str  # severity
    meaning: str
    source: str


Check = Callable[["Folder"], Iterator[Finding]]
RULES: dict[str, Rule] = {}
CHECKS: list[Check] = []


def rule(identifier: str, gravest: str, meaning: str, source: str) -> Callable[[Check], Check]:
    """Enter a rule into the list, and the function that it stands above into those that are run."""
    RULES[identifier] = Rule(gravest, meaning, source)

    def enter(check: Check) -> Check:
        if check not in CHECKS:
            CHECKS.append(check)
        return check

    return enter


def further(identifier: str) -> Callable[[Check], Check]:
    """Enter one more function of a rule that is in the list."""
    return rule(identifier, *RULES[identifier])


FAULT = "X1"  # of this program
FIRST = "B1"  # a score that cannot be: nothing else counts before that is explained
RULES[FAULT] = Rule("reject", "the folder was read and every rule ran", "a fault of records/check.py")


def run_rules(folder: Folder) -> list[Finding]:
    """Return all findings on a folder, gravest first. Those that differ in numbers only are one."""
    findings = list(folder.findings)
    for check in CHECKS:
        try:
            findings += check(folder)
        except Exception as error:  # one rule's fault must not hide what the others found, and must be heard of
            message = f"{check.__name__} failed ({type(error).__name__}: {error}): please report this folder"
            findings.append(Finding(FAULT, "warn", message))
    order = list(RULES)

    def rank(finding: Finding) -> tuple[bool, int, int, str, int]:
        severity = SEVERITIES.index(finding.severity)
        return finding.rule != FIRST, severity, order.index(finding.rule), finding.file, finding.line

    return sorted(merge(findings), key=rank)


def merge(findings: list[Finding]) -> list[Finding]:
    """Return findings of which no two differ in numbers or places only; the first one lists the others' places."""
    merged: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = finding.rule, finding.severity, re.sub(r"[\d.,]+", "#", finding.message)
        first = merged.setdefault(key, finding)
        if first is not finding:
            first.also.append(f"{finding.file}:{finding.line}" if finding.line else finding.file)
    return list(merged.values())
