"""Reads text that somebody else has written, within bounds."""

from __future__ import annotations

import codecs
from pathlib import Path

MAX_TEXT = 4_000_000  # bytes of a text
MAX_LINE = 20_000  # characters of a line
MAX_README = 200_000  # characters of a README that are looked at


def encoding_of(start: bytes) -> str:
    """Returns the encoding that a file's first bytes tell: Windows shells write UTF-16."""
    return "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """Returns up to so many bytes of a file as text, whatever its bytes are."""
    with open(path, "rb") as file:
        data = file.read(most)
    return data.decode(encoding_of(data[:2]), "replace")


def clean(text: str) -> str:
    """Returns text without control characters and lone surrogates: names and labels are somebody else's."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else "?" for character in text)
