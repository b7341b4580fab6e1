"""The entropy coder for rows of codes: lossless, as small as its tables say, and what is malformed is refused."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import prepare, wake

import train_gpt as t

M = 2**14  # what a table's frequencies sum to


def stored(name: str, codes: np.ndarray, bits: int = 8) -> t.Stored:
    """Codes as a quantizer returns them, with a scale for each row."""
    return t.Stored(name, bits, torch.from_numpy(codes.astype(np.int8)), torch.ones(len(codes), 1).half())


def rows_of_codes(rows: int, cols: int, bits: int = 6, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Normal rows of several widths, rounded and clipped to the alphabet."""
    rng, largest = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    widths = largest / 6 * np.exp(spread * rng.normal(size=(rows, 1)))
    return np.clip(np.rint(rng.normal(size=(rows, cols)) * widths), -largest, largest)


def file_of(h: t.Hyperparameters, tensors: list[t.Stored]) -> bytes:
    return t.encode(h, tensors, 0.5, "rans")


def assert_round_trip(h: t.Hyperparameters, tensors: list[t.Stored]) -> None:
    header, got = t.read_stored(file_of(h, tensors), "x")
    assert [s.name for s in got] == [s.name for s in tensors] and header["floor"] == 0.5
    for own, expected in zip(got, tensors):
        assert own.values.dtype == expected.values.dtype and torch.equal(own.values, expected.values), own.name
        assert (own.scales is None) == (expected.scales is None)
        assert own.scales is None or torch.equal(own.scales, expected.scales)


# ------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_alphabet_comes_back(tiny: Callable, bits: int) -> None:
    codes = rows_of_codes(60, 300, bits)
    codes[0, : 2**bits - 1] = np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))[:300]  # every code occurs
    assert_round_trip(tiny(), [stored("blocks.0.mlp.fc.weight", codes, bits)])


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((7, 5)),
        np.full((300, 100), -3),
        np.array([[5]]),
        rows_of_codes(1, 5000),
        rows_of_codes(5000, 1),
        np.zeros((4, 0)),
        np.full((1, 1), -128),  # no quantizer gives it, but int8 has it
        rows_of_codes(1031, 33),  # a prime number of rows, and no multiple of the lanes
    ],
    ids=["zeros", "one symbol", "one code", "one row", "one column", "no columns", "the smallest", "odd sizes"],
)
def test_unusual_tensors_come_back(tiny: Callable, codes: np.ndarray) -> None:
    assert_round_trip(tiny(), [stored("tok_emb.weight", codes)])


def test_tensors_of_several_families_widths_and_types_come_back(tiny: Callable) -> None:
    tensors = [
        stored("blocks.0.attn.c_q.weight", rows_of_codes(200, 64)),
        t.Stored("skip_weights", 16, torch.randn(3, 8).half(), None),
        stored("tok_emb.weight", rows_of_codes(500, 30, 8, 1), 8),
        stored("blocks.0.mlp.proj.weight", rows_of_codes(90, 256, 5, 2), 5),
        t.Stored("exact", 32, torch.randn(5), None),
        stored("of no known family", rows_of_codes(20, 20, 4, 3), 4),
    ]
    assert_round_trip(tiny(), tensors)
    assert_round_trip(tiny(), tensors[1::3])  # without any codes


def test_a_model_comes_back_as_from_the_other_coders(tiny: Callable) -> None:
    h = tiny(mlp_bits=5, proj_bits=7)
    model = t.GPT(h)
    wake(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tensors = t.quantize_weights(prepare(h, weights), 0.3)
    plain = t.decode(t.encode(h, tensors, 0.3, "none"), "x")
    coded = t.decode(t.encode(h, tensors, 0.3, "rans"), "x")
    assert plain[0] == coded[0] and plain[1].keys() == coded[1].keys()
    assert all(torch.equal(w, coded[1][name]) for name, w in plain[1].items())


# -------------------------------------------------------------------------------------------------------------- size
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_stream_is_within_a_thousandth_of_the_entropy_of_its_tables(bits: int) -> None:
    tensors = [stored("blocks.0.mlp.fc.weight", rows_of_codes(1000, 512, bits))]
    rows = t.model_rows(tensors, "rans")
    body = t.rans_body(b"", rows, tensors)
    probabilities = rows.frequencies / M
    costs = np.where(rows.counts > 0, -np.log2(np.maximum(probabilities, 1e-9)), 0)
    entropy = (rows.counts * costs).sum() / 8
    assert sum(rows.bits_by_family().values()) / 8 == pytest.approx(entropy)
    assert entropy <= sum(map(len, body)) <= 1.001 * entropy + 4
    ideal = 0.0  # with tables that are no fractions of 2^14
    for counts in rows.counts:
        p = counts[counts > 0] / counts.sum()
        ideal -= (counts[counts > 0] * np.log2(p)).sum() / 8
    assert entropy <= 1.001 * ideal


def test_rows_of_unequal_width_take_less_than_zstd_and_equal_ones_no_more(tiny: Callable) -> None:
    for spread, most in ((0.5, 0.96), (0.3, 0.98), (0.0, 1.0)):
        tensors = [stored("blocks.0.mlp.fc.weight", rows_of_codes(2000, 512, 6, spread=spread), 6)]
        assert len(file_of(tiny(), tensors)) < most * len(t.encode(tiny(), tensors, 0.5, "zstd"))


def test_a_table_has_its_sum_and_keeps_what_is_rare() -> None:
    rng = np.random.default_rng(0)
    for counts in (
        np.eye(256, dtype=int)[7],
        np.ones(256, int),
        np.array([10**9] + [1] * 255),
        np.array([0, 1, 0, 10**6] + [0] * 252),
        *(rng.integers(0, 10 ** rng.integers(1, 8), 256) for _ in range(50)),
    ):
        frequencies = t.normalize_counts(counts)
        assert frequencies.sum() == M and ((frequencies > 0) == (counts > 0)).all()


def test_the_number_of_steps_is_bounded() -> None:
    """A lane is a step of Python for each of its codes: no file, whatever it claims, keeps a machine for minutes."""
    for num_codes in (0, 1, 100, 2**13, 10**6, 26_869_760, 2**28):
        lanes = t.count_lanes(num_codes)
        assert math.ceil(num_codes / lanes) <= 2**15
        assert 4 * lanes <= max(4, num_codes / 2048)


# ------------------------------------------------------------------------------------------------------- bad streams
def seal(blob: bytes) -> bytes:
    """The file with its checksum made right again."""
    return blob[:4] + hashlib.sha256(blob[20:]).digest()[:16] + blob[20:]


def parts_of(blob: bytes) -> tuple[bytes, int]:
    """The file, and where its states and words begin."""
    return blob, 32 + 4 + struct.unpack_from("<I", blob, 32)[0]


def test_nearly_every_damage_to_a_stream_is_found_without_the_checksum(tiny: Callable) -> None:
    """What is not is a code for another of the same frequency, whose place in the table differs by the bit."""
    codes = rows_of_codes(12, 50)
    blob, begin = parts_of(file_of(tiny(), [stored("tok_emb.weight", codes)]))
    flips, found = 0, 0
    for position in range(begin, len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << position % 8
        flips += 1
        try:
            t.read_stored(seal(bytes(damaged)), "x")
        except t.UserError as error:
            assert re.search(r"malformed.*(damaged|cut off)", str(error))
            found += 1
    assert flips > 250 and found >= 0.98 * flips
    for change in (blob[:-2], blob + bytes(2), blob[: begin + 2], blob[:begin], blob[:-1]):
        with pytest.raises(t.UserError, match="malformed"):
            t.read_stored(seal(change), "x")


def test_what_the_payload_claims_of_its_tables_is_checked(tiny: Callable) -> None:
    tensors = [stored("tok_emb.weight", rows_of_codes(40, 500))]
    rows = t.model_rows(tensors, "rans")

    def refused(frequencies: np.ndarray, classes: np.ndarray, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            t.rans_decode(classes, frequencies, np.full(2, 2**16), np.zeros(0, np.uint16))

    refused(np.full((1, 256), 63), np.zeros(10, np.uint8), "sum to 2")
    refused(rows.frequencies, np.full(10, len(rows.frequencies), np.uint8), "without a table")
    refused(np.zeros((0, 256), np.int64), np.zeros(10, np.uint8), "without a table")
    for num_classes in (-1, 257, 50_000):  # each would take 16 kB
        reader = t.Reader(bytes(2**26), 0)
        with pytest.raises(ValueError, match="classes of rows"):
            t._read_rans(reader, num_classes, [[1, 1]], 1, bytes(4))


@pytest.mark.parametrize("num_streams", [2000, pytest.param(1_000_000, marks=pytest.mark.fuzz)])
def test_random_streams_are_decoded_or_refused(num_streams: int) -> None:
    """Random tables, states and words: nothing but a value or a ValueError comes out, and few come out right."""
    rng = np.random.default_rng(num_streams)
    accepted = 0
    for _ in range(num_streams):
        num_classes, num_codes = rng.integers(1, 4), rng.integers(0, 40)
        frequencies = np.zeros((num_classes, 256), np.int64)
        for table in frequencies:
            used = rng.integers(0, 256, rng.integers(1, 5))
            np.add.at(table, used, 1)
            table[used[0]] += M - table.sum() + int(rng.random() < 0.05)
        classes = rng.integers(0, num_classes + int(rng.random() < 0.05), num_codes).astype(np.uint8)
        states = rng.integers(0, 2**32, rng.integers(1, 4), dtype=np.uint32)
        if rng.random() < 0.1:
            states[:] = 2**16
        words = rng.integers(0, 2**16, rng.integers(0, 20), dtype=np.uint16)
        try:
            codes = t.rans_decode(classes, frequencies, states, words)
        except ValueError:
            continue
        accepted += 1
        assert codes.dtype == np.int8 and codes.shape == classes.shape
    assert accepted < 0.05 * num_streams
