"""Weights to codes and scales, to a file, and back: the formulas, the limit, and every way a file can be bad."""

from __future__ import annotations

import hashlib
import json
import lzma
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from conftest import prepare, wake

import train_gpt as t

QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
CODE_BYTES = Path(t.__file__).stat().st_size
# All that the model can have, in a shape of its own; a window of 64 goes with the default EVAL_STRIDE.
RICH = {
    "train_seq_len": 64,
    "train_batch_tokens": 256,
    "trigram_shared": True,
    "value_residual": True,
    "gated_attention": True,
    "leaky_slope": 0.3,
    "logit_softcap": 11.0,
    "xsa_last_n": 1,
    "ve_layers": "0,2",
}
# The smallest file: 2 layers of width 8, and no tables.
SMALL = {
    "vocab_size": 8,
    "num_layers": 2,
    "model_dim": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "rope_dims": 2,
    "bigram_vocab_size": 0,
    "ve_enabled": False,
    "train_seq_len": 64,
    "train_batch_tokens": 256,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this size run faster on one thread, and alike on every machine."""
    monkeypatch.setattr(t, "available_cores", lambda: 1)


# ------------------------------------------------------------------------------------------------ the quantizer
def quantize_reference(w: np.ndarray, bits: int, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes, scales, the number of the chosen quantile and whether a row is ambiguous, from the formula.

    A row is ambiguous if rounding errors of fp32 can decide it: its scale changes as fp16 when the clip changes by
    2e-6 of itself, or another scale has the same squared error to 1e-5 of it.
    """
    q = 2 ** (bits - 1) - 1
    codes, scales = np.zeros(w.shape, np.int8), np.zeros((len(w), 1), np.float16)
    chosen, ambiguous = np.zeros(len(w), int), np.zeros(len(w), bool)

    def as_fp16(clip: float) -> np.float16:
        return max(np.float16(max(clip, floor) / q), np.float16(2.0**-24))

    for r, row in enumerate(w):
        candidates = []
        for number, quantile in enumerate(QUANTILES):
            clip = float(np.quantile(np.abs(row.astype(np.float64)), quantile, method="linear"))
            scale = as_fp16(clip)
            # One division in fp32, as IEEE rounds it on every machine, and to even at ties.
            row_codes = np.clip(np.rint(row / np.float32(scale)), -q, q)
            error = float(((row_codes.astype(np.float64) * float(scale) - row) ** 2).sum())
            candidates.append((error, number, scale, row_codes, as_fp16(clip * 1.000002) != as_fp16(clip / 1.000002)))
        error, chosen[r], scales[r], codes[r], unsure = min(candidates, key=lambda c: (c[0], c[1]))
        ambiguous[r] = unsure or any(c[2] != scales[r] and c[0] <= error * 1.00001 for c in candidates)
    return codes, scales, chosen, ambiguous


def quantized(w: torch.Tensor, bits: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix, in the two steps of the export."""
    return t.quantize_rows(w, t.row_clips(w), bits, floor)


def awkward_matrix(cols: int = 700) -> np.ndarray:
    """Returns fp32 rows of every kind: normal, heavy tails, zeros, one huge value, equal values, tiny ones."""
    rng = np.random.default_rng(5)
    rows = [rng.normal(size=cols) * 10.0 ** rng.uniform(-2, 1) for _ in range(12)]
    rows += [rng.standard_t(2, size=cols) * 0.1 for _ in range(12)]
    rows += [np.zeros(cols), np.full(cols, 0.3), -np.full(cols, 2.0), rng.normal(size=cols) * 1e-5]
    outlier = rng.normal(size=cols) * 0.05
    outlier[17] = -1000.0
    single = np.zeros(cols)
    single[3] = 5.0
    return np.stack([*rows, outlier, single]).astype(np.float32)


@pytest.mark.parametrize("floor", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_scales_are_those_of_the_formula(bits: int, floor: float) -> None:
    w = awkward_matrix()
    codes, scales = quantized(torch.from_numpy(w), bits, floor)
    expected_codes, expected_scales, chosen, ambiguous = quantize_reference(w, bits, floor)
    assert ambiguous.sum() <= 3, "the matrix must decide nearly all of its rows"
    if floor < 1:
        assert len(set(chosen[~ambiguous])) >= (2 if bits == 2 else 3), (
            "rows must choose their clips, else the choice is not tested"
        )
    assert (codes.dtype, scales.dtype, tuple(scales.shape)) == (torch.int8, torch.float16, (len(w), 1))
    assert np.array_equal(scales.numpy()[~ambiguous], expected_scales[~ambiguous])
    assert np.array_equal(codes.numpy()[~ambiguous], expected_codes[~ambiguous])


@pytest.mark.parametrize("floor", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_value_within_the_clip_is_off_by_half_a_step_at_most(bits: int, floor: float) -> None:
    q, w = 2 ** (bits - 1) - 1, awkward_matrix()
    codes, scales = (x.double().numpy() for x in quantized(torch.from_numpy(w), bits, floor))
    assert np.abs(codes).max() == q if floor < 1 or bits < 8 else np.abs(codes).max() <= q
    inside = np.abs(w) <= q * scales
    # w / scale is rounded to fp32 first, which moves a value of at most q steps by at most q 2^-24 steps.
    assert (np.abs(codes * scales - w)[inside] <= (scales * (0.5 + q * 2.0**-24) * np.ones_like(w))[inside]).all()
    clipped = np.sign(w) * q
    assert np.array_equal(codes[~inside], clipped[~inside]), "what lies beyond the clip gets the last code"
    assert (scales >= max(floor / q, 2.0**-24) * (1 - 2.0**-11)).all(), "fp16 rounds the least scale by 2^-11 at most"


def test_a_row_is_quantized_as_if_it_were_alone() -> None:
    w = torch.from_numpy(awkward_matrix())
    codes, scales = quantized(w, 6, 0.0)
    for row in range(len(w)):
        alone = quantized(w[row : row + 1], 6, 0.0)
        assert torch.equal(alone[0], codes[row : row + 1]) and torch.equal(alone[1], scales[row : row + 1])


@pytest.mark.parametrize("cols", [1, 2, 3, 5000])
def test_rows_of_any_width_are_quantized_by_the_formula(cols: int) -> None:
    w = np.random.default_rng(cols).normal(size=(4, cols)).astype(np.float32)
    codes, scales = quantized(torch.from_numpy(w), 6, 0.0)
    expected_codes, expected_scales, _, ambiguous = quantize_reference(w, 6, 0.0)
    assert not ambiguous.any()
    assert np.array_equal(codes.numpy(), expected_codes) and np.array_equal(scales.numpy(), expected_scales)


@pytest.mark.parametrize("prune_frac", [0.0, 0.03, 0.5])
def test_pruning_zeroes_exactly_the_smallest_part_of_each_quantized_matrix(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch, prune_frac: float
) -> None:
    h = tiny(prune_frac=prune_frac)
    torch.manual_seed(3)
    weights = {n: torch.randn(p.shape) for n, p in t.GPT(h).named_parameters()}
    num_quantized = 0
    monkeypatch.setattr(t, "quantize_rows", lambda w, clips, bits, floor: (w, w))
    for name, bits, values, _ in t.quantize_weights(prepare(h, weights, h.prune_frac), 0.0):
        w = weights[name]
        if bits == 16:
            assert torch.equal(values, w.half()), "fp16 tensors are not pruned"
            continue
        order = w.abs().flatten().argsort()
        zeros = order[: int(prune_frac * w.numel())]  # random normals: no two have one magnitude among these few
        expected = w.flatten().clone()
        expected[zeros] = 0
        assert torch.equal(values, expected.view_as(w)), name
        num_quantized += 1
    assert num_quantized > 10


@pytest.mark.parametrize("prune_frac", [0.03, 0.6])
def test_pruning_says_how_many_codes_it_changed(
    make_run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, prune_frac: float
) -> None:
    """PR 562 pruned 3% of each matrix, below half a step of its grid: not one int5 code changed."""
    run = make_run(prune_frac=prune_frac, quant_floor="1.0")  # the weights' magnitudes are below 1: a grid of 1 / q
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.uniform_(-0.9, 0.9)
    run.rt.run_dir, changed, count = tmp_path, 0, 0
    for name, w in named(run.model).items():
        if (bits := t.stored_bits(run.h, name)) < 16:
            step = np.float64(np.float16(1 / (2 ** (bits - 1) - 1)))
            smallest = np.sort(w.abs().flatten().double().numpy())[: int(prune_frac * w.numel())]
            changed, count = changed + int((np.round(smallest / step) != 0).sum()), count + w.numel()
    t.export(run)
    assert f"pruned: changed {changed:,} of {count:,} codes" in capsys.readouterr().out


@pytest.mark.parametrize("codec", ["zstd", "lzma"])
@pytest.mark.parametrize("kind", ["phrases", "rows"])
def test_the_compressors_are_as_strong_as_their_published_levels(tiny: Callable, codec: str, kind: str) -> None:
    """zstd-22 and LZMA preset 9, extreme, which published scripts used as they are; on rows of codes, stronger."""
    h, rng = tiny(), np.random.default_rng(0)
    if kind == "phrases":
        phrases = [rng.integers(-3, 4, rng.integers(20, 400)) for _ in range(40)]  # with long repetitions levels differ
        codes = np.concatenate([phrases[i] for i in rng.integers(0, 40, 300)])[:30_000].reshape(30, 1000)
    else:
        widths = np.exp(rng.normal(size=(2000, 1))) * 4
        codes = np.clip(np.rint(rng.normal(size=(2000, 512)) * widths), -31, 31)
    tensors = [t.Stored("x", 6, torch.from_numpy(codes.astype(np.int8)), torch.ones(len(codes), 1).half())]
    payload = t.encode(h, tensors, 0.1, "none")[t.PREFIX.size :]
    if codec == "zstd":
        published = zstandard.ZstdCompressor(level=22).compress(payload)
        weaker = zstandard.ZstdCompressor(level=12).compress(payload)
    else:
        published, weaker = (
            lzma.compress(payload, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": preset}])
            for preset in (9 | lzma.PRESET_EXTREME, 0)
        )
    size = len(t.encode(h, tensors, 0.1, codec)) - t.PREFIX.size
    assert size <= 1.002 * len(published)
    if kind == "phrases":
        assert len(published) < len(weaker)
    else:
        assert size < 0.995 * len(published)


def test_only_rank_0_quantizes_and_compresses(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(t, "encode", lambda *args: calls.append(args) or b"x" * 100)
    for rank in (1, 0):
        run = make_run(quant_floor="1.0")
        run.rt.run_dir, run.rt.rank = tmp_path, rank
        t.export(run)
        assert len(calls) == (0 if rank else 1)
        assert len(list(tmp_path.iterdir())) == len(calls)


# ---------------------------------------------------------------------------------------------------- the round trip
def make_model(tiny: Callable, seed: int = 2, std: float = 0.2, **settings: object) -> tuple[t.Hyperparameters, t.GPT]:
    h = tiny(**settings)
    torch.manual_seed(seed)
    model = t.GPT(h)
    wake(model, std)
    return h, model


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def write_artifact(path: Path, h: t.Hyperparameters, model: t.GPT, floor: float = 0.01, codec: str = "none") -> bytes:
    blob = t.encode(h, t.quantize_weights(prepare(h, named(model), h.prune_frac), floor), floor, codec)
    path.write_bytes(blob)
    return blob


def assert_equal_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, w in expected.items():
        assert got[name].dtype == torch.float32 and got[name].shape == w.shape, name
        assert torch.equal(got[name], w), name


@pytest.mark.parametrize("codec", list(t.CODECS))
def test_decoding_returns_codes_times_scales_and_the_model_knobs_bit_by_bit(tiny: Callable, codec: str) -> None:
    h, model = make_model(
        tiny, **RICH, mlp_bits=5, attn_bits=2, bigram_bits=3, proj_bits=7, fp16_keep_name_patterns="c_k"
    )
    weights, expected = named(model), {}
    for name, w in weights.items():
        bits = {
            "mlp": 5,
            "attn.c_q": 2,
            "attn.c_v": 2,
            "attn.proj": 2,
            "gram.embed": 3,
            "ram.proj": 7,
            "shared.proj": 7,
        }
        bits |= {"tok_emb": 8, "ve_shared.embed": 8}
        found = [b for part, b in bits.items() if part in name and w.dim() == 2 and "gate" not in name]
        expected[name] = w.half().float()
        if found:
            codes, scales = quantized(w, found[0], 0.01)  # itself compared with the formula above
            expected[name] = codes.float() * scales.float()
    assert sum(not torch.equal(w, weights[n].half().float()) for n, w in expected.items()) >= 20
    blob = t.encode(h, t.quantize_weights(prepare(h, weights, h.prune_frac), 0.01), 0.01, codec)
    knobs, decoded = t.decode(blob, "x")
    assert_equal_weights(decoded, expected)
    assert knobs == h.values(t.ModelKnob)
    assert blob == t.encode(h, t.quantize_weights(prepare(h, weights, h.prune_frac), 0.01), 0.01, codec), (
        "the same file from the same weights"
    )


def test_export_writes_an_exact_checkpoint_and_the_file_that_it_reports(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(quant_floor="0.5", compressor="lzma")
    run.rt.run_dir = tmp_path
    t.write_checkpoint(run)
    figures = t.export(run)
    knobs, weights = t.decode((tmp_path / "checkpoint.bin").read_bytes(), "checkpoint")
    assert_equal_weights(weights, named(run.model))
    assert knobs == run.h.values(t.ModelKnob)
    artifact = (tmp_path / "final_model.bin").read_bytes()
    assert figures["quant_floor"] == 0.5
    direct = t.decode(
        t.encode(run.h, t.quantize_weights(prepare(run.h, named(run.model), run.h.prune_frac), 0.5), 0.5, "none"),
        "x",
    )[1]
    assert_equal_weights(t.decode(artifact, "artifact")[1], direct)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.bin", "final_model.bin"]


def test_a_file_is_written_and_read_without_pickle(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, model = make_model(tiny, **RICH)
    write_artifact(tmp_path / "m.bin", h, model)
    t.load_artifact(tmp_path / "m.bin")  # torch imports parts of itself at the first use

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for name in ("save", "savez", "savez_compressed", "load"):
        monkeypatch.setattr(np, name, refuse)
    for codec in t.CODECS:
        write_artifact(tmp_path / "m.bin", h, model, codec=codec)
        _, loaded = t.load_artifact(tmp_path / "m.bin")
        assert loaded.skip_weights.equal(model.skip_weights.half().float())


@pytest.mark.parametrize("codec", ["none", "zstd", "lzma"])
def test_a_file_of_format_version_2_is_still_read(tiny: Callable, tmp_path: Path, codec: str) -> None:
    """As scripts wrote it before rans: zstd-22 for the whole payload, LZMA with its largest dictionary."""
    payload = write_artifact(tmp_path / "m.bin", *make_model(tiny, **RICH))[t.PREFIX.size :]
    body = payload
    if codec == "zstd":
        body = zstandard.ZstdCompressor(level=22).compress(payload)
    elif codec == "lzma":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
        body = lzma.compress(payload, format=lzma.FORMAT_RAW, filters=filters)
    old = seal(payload, version=2, codec={"none": 0, "zstd": 1, "lzma": 2}[codec], body=body)
    knobs, weights = t.decode(old, "an old file")
    expected = t.decode((tmp_path / "m.bin").read_bytes(), "a new one")
    assert knobs == expected[0]
    assert_equal_weights(weights, expected[1])


def test_the_file_alone_rebuilds_the_function(tiny: Callable, tmp_path: Path) -> None:
    h, model = make_model(tiny, **RICH)
    write_artifact(tmp_path / "m.bin", h, model)
    torch.manual_seed(99)  # nothing of the loading is random
    state = torch.get_rng_state()
    loaded_h, loaded = t.load_artifact(tmp_path / "m.bin")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded_h.values(t.ModelKnob) == h.values(t.ModelKnob)
    assert not loaded_h.given
    model.load_state_dict(t.decode((tmp_path / "m.bin").read_bytes(), "x")[1])
    ids = torch.randint(h.vocab_size, (2, 64))
    with torch.no_grad():
        assert torch.equal(loaded.forward_logits(ids), model.forward_logits(ids))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_a_model_of_full_size_round_trips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Without compression: level 22 takes a minute on these 27 MB, and small files go through all codecs above.
    h = t.Hyperparameters(device="cpu")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in t.GPT(h).named_parameters()}
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    assert sum(w.numel() for w in weights.values()) == 26_993_756
    tensors, expected = [], {}
    for name, bits, values, scales in t.quantize_weights(prepare(h, weights, h.prune_frac), 0.0):
        tensors.append((name, bits, values, scales))
        expected[name] = values.float() if scales is None else values.float() * scales.float()
    (tmp_path / "m.bin").write_bytes(t.encode(h, tensors, 0.0, "none"))
    assert_equal_weights(named(t.load_artifact(tmp_path / "m.bin")[1]), expected)
    # A step is at most 1/31 of 5.7 standard deviations, the largest of 2.7e7 normals: half of one of each is the most
    # that a value can be off by, if it is not clipped. Half a step in fp16 and int8 is far less.
    worst = max((expected[n] - w).abs().max().item() for n, w in weights.items())
    assert worst <= 0.05 * 6.0 / 31 / 2 + 0.05 * 3, worst


# ------------------------------------------------------------------------------------------------------- bad files
def seal(
    payload: bytes, version: int = t.VERSION, codec: int = 0, length: int | None = None, body: bytes | None = None
) -> bytes:
    """Returns a file with a right checksum, written from the format: magic, half the SHA-256 of what follows it,
    format version (u16), codec (u16), bytes of the payload (u64), the payload as it is stored."""
    length = len(payload) if length is None else length
    covered = struct.pack("<HHQ", version, codec, length) + (payload if body is None else body)
    return b"PGLF" + hashlib.sha256(covered).digest()[:16] + covered


def payload_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + data


@pytest.fixture
def small(tiny: Callable, tmp_path: Path) -> tuple[bytes, dict, bytes]:
    """A small artifact, uncompressed; its header; the data after that."""
    h, model = make_model(tiny, **SMALL)
    blob = write_artifact(tmp_path / "small.bin", h, model)
    end = 36 + struct.unpack_from("<I", blob, 32)[0]
    header, data = json.loads(blob[36:end]), blob[end:]
    assert seal(payload_of(blob[36:end], data)) == blob, "the format is the one that `seal` writes"
    assert t.load_artifact(tmp_path / "small.bin")
    return blob, header, data


@pytest.mark.parametrize("codec", list(t.CODECS))
def test_a_file_cut_off_anywhere_is_refused(tiny: Callable, tmp_path: Path, codec: str) -> None:
    blob = write_artifact(tmp_path / "m.bin", *make_model(tiny, **SMALL), codec=codec)
    for length in range(len(blob)):
        with pytest.raises(t.UserError, match="not an artifact|truncated or damaged"):
            t.decode(blob[:length], "x")
    with pytest.raises(t.UserError, match="truncated or damaged"):
        t.decode(blob + b"\0", "x")


@pytest.mark.parametrize("codec", list(t.CODECS))
def test_a_flipped_bit_anywhere_is_refused(tiny: Callable, tmp_path: Path, codec: str) -> None:
    blob = bytearray(write_artifact(tmp_path / "m.bin", *make_model(tiny, **SMALL), codec=codec))
    for position in range(len(blob)):
        for bit in range(8) if position < 40 else (position % 8,):
            blob[position] ^= 1 << bit
            with pytest.raises(t.UserError, match="not an artifact|format version|truncated or damaged"):
                t.decode(bytes(blob), "x")
            blob[position] ^= 1 << bit
    assert t.decode(bytes(blob), "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an artifact.*0 bytes"),
        (b"PGLF", "not an artifact.*4 bytes"),
        (b"PK\x03\x04" + bytes(100), "not an artifact"),  # what torch.save writes
        (b"\x28\xb5\x2f\xfd" + bytes(100), "not an artifact"),  # a bare zstd stream
        (seal(b"", version=1), "format version 1, this script reads 2 and 3"),
        (seal(b""), "malformed"),
        (seal(b"\0\0"), "malformed"),
        (seal(b"\xff\xff\xff\xff{}"), "malformed"),
        (seal(payload_of(b"not JSON", b"")), "malformed"),
        (seal(payload_of([], b"")), "malformed"),
        (seal(payload_of({}, b"")), "malformed"),
        (seal(payload_of(b"[" * 100_000, b"")), "malformed"),
        (seal(b"", codec=1, length=10, body=b"no zstd stream"), "malformed"),
        (seal(b"", codec=2, length=10, body=b"no lzma stream"), "malformed"),
    ],
    ids=range(14),
)
def test_what_is_no_artifact_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(t.UserError, match=message) as caught:
        t.load_artifact(path)
    assert "foreign.bin" in str(caught.value)


@pytest.mark.parametrize("name", ["absent.bin", "a folder"])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a folder").mkdir()
    with pytest.raises(t.UserError, match=name):
        t.load_artifact(tmp_path / name)


@pytest.mark.parametrize("codec", [0, 1, 2])
@pytest.mark.parametrize("declared", [-1, 1, 2**40, 2**64 - 1])
def test_a_wrong_declared_length_is_refused(small: tuple, codec: int, declared: int) -> None:
    payload = small[0][32:]
    zstandard = pytest.importorskip("zstandard")
    body = (payload, zstandard.ZstdCompressor().compress(payload), lzma.compress(payload, **t.LZMA))[codec]
    assert t.decode(seal(payload, codec=codec, body=body), "x")
    length = len(payload) + declared if abs(declared) == 1 else declared
    with pytest.raises(t.UserError, match="malformed|damaged"):
        t.decode(seal(payload, codec=codec, length=length, body=body), "x")


@pytest.mark.parametrize("codec", [1, 2])
def test_a_bomb_is_not_unpacked_further_than_declared(
    small: tuple, codec: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = b"\xff\xff\xff\x7f" + b" " * 40_000_000  # declares all that follows to be the header
    body = (
        zstandard.ZstdCompressor(level=1).compress(bomb)
        if codec == 1
        else lzma.compress(bomb, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    )
    blob, unpacked = seal(b"", codec=codec, length=1000, body=body), []
    parse = t._parse_payload
    monkeypatch.setattr(t, "_parse_payload", lambda *args: (unpacked.append(len(args[0])), parse(*args))[1])
    with pytest.raises(t.UserError, match="malformed"):
        t.decode(blob, "x")
    assert unpacked == [1001], "the declared bytes, and one to notice more"
    with pytest.raises(t.UserError, match="malformed: .* unpacks to 268,435,457 bytes, more than 268,435,456"):
        t.decode(seal(b"", codec=codec, length=2**28 + 1, body=body), "x")
    assert unpacked == [1001]


def test_a_header_that_does_not_fit_its_model_or_data_is_refused(small: tuple, tmp_path: Path) -> None:
    blob, header, data = small
    model, tensors = header["model"], header["tensors"]
    exact = [(name, w) for name, w in t.decode(blob, "x")[1].items()]
    index = next(i for i, (_, bits, _) in enumerate(tensors) if bits < 16)
    first = tensors[index]
    rows, cols = first[2]

    def changed(**values: object) -> dict:
        return {**header, "model": {**model, **values}}

    def replaced(name: str, shape: list) -> dict:
        return {**header, "tensors": [*tensors[:index], [name, first[1], shape], *tensors[index + 1 :]]}

    def in_fp32(pairs: list) -> tuple[dict, bytes]:
        entries = [[name, 32, list(w.shape)] for name, w in pairs]
        return {**header, "tensors": entries}, b"".join(w.numpy().tobytes() for _, w in pairs)

    def entry(shape: list, bits: int = 8) -> dict:
        return {**header, "tensors": [[first[0], bits, shape]]}

    cases = {
        "an unknown knob": (changed(no_such_knob=1), data),
        "the name of an argument": (changed(self=1), data),
        "a knob of training": (changed(ttt_mode="pre"), data),
        "a knob of the wrong type": (changed(model_dim="wide"), data),
        "a knob out of range": (changed(num_layers=10**9), data),
        "knobs that do not fit together": (changed(num_heads=3), data),
        "a knob that is null": (changed(model_dim=None), data),
        "no knobs": ({**header, "model": {}}, data),
        "knobs without names": ({**header, "model": [[1, 2]]}, data),
        "knobs that are a number": ({**header, "model": 3}, data),
        "a missing shape knob": ({**header, "model": {k: v for k, v in model.items() if k != "model_dim"}}, data),
        # Its value would come from the environment, and the weights would silently be those of another function.
        "a missing function knob": ({**header, "model": {k: v for k, v in model.items() if k != "leaky_slope"}}, data),
        "another width": (changed(model_dim=16), data),
        "another depth": (changed(num_layers=3), data),
        "a missing tensor": in_fp32(exact[:-1]),
        "an additional tensor": in_fp32([*exact, ("more", torch.ones(3))]),
        "a missing tensor, its data left": ({**header, "tensors": tensors[:-1]}, data),
        "no tensors": ({**header, "tensors": []}, b""),
        "tensors without shapes": ({**header, "tensors": [[name, bits] for name, bits, _ in tensors]}, data),
        "a renamed tensor": (replaced("tok_emb", first[2]), data),
        "a transposed tensor": (replaced(first[0], [2 * rows, cols // 2]), data),
        "too little data": (header, data[:-1]),
        "too much data": (header, data + b"\0"),
        "a huge shape": (entry([10**12, 10**12]), bytes(100)),
        "a huge empty shape": (entry([10**18, 0]), b""),
        "an overflowing shape": (entry([2**62, 2**62, 2**62]), b""),
        "a negative shape": (entry([-1, -1]), bytes(100)),
        "a scalar of codes": (entry([]), bytes(3)),
        "bits that are no number": (entry(first[2], "many"), bytes(100)),
    }
    outcomes, path = {}, tmp_path / "crafted.bin"
    path.write_bytes(seal(payload_of(*in_fp32(exact))))
    assert t.load_artifact(path), "without a fault it is a right file"
    for case, (bad, rest) in cases.items():
        path.write_bytes(seal(payload_of(bad, rest)))
        try:
            t.load_artifact(path)
            outcomes[case] = "loaded"
        except t.UserError:
            pass
        except Exception as error:
            outcomes[case] = repr(error)
    assert not outcomes, "each of these must be a UserError"


def test_no_header_makes_the_loader_fail_in_another_way_or_change_the_function(small: tuple, tmp_path: Path) -> None:
    blob, header, data = small
    text, rng, path, loaded = json.dumps(header).encode(), random.Random(0), tmp_path / "fuzzed.bin", 0
    expected = t.decode(blob, "x")[1]
    for _ in range(400):
        mutated = bytearray(text)
        for _ in range(rng.choice((1, 1, 2, 5))):
            mutated[rng.randrange(len(mutated))] = rng.choice(b'0123456789{}[],:"-.eE tfn')
        path.write_bytes(seal(payload_of(bytes(mutated), data)))
        try:
            h, model = t.load_artifact(path)
        except t.UserError:
            continue
        loaded += 1
        assert_equal_weights(named(model), expected)
        # A changed digit of, say, ROPE_BASE is a right file of another model; the settings must be those of the file.
        for name, value in json.loads(bytes(mutated))["model"].items():
            assert getattr(h, name) == value
        assert h.values(t.ModelKnob).keys() == json.loads(bytes(mutated))["model"].keys()
    assert loaded >= 5, "some mutations, as of the floor's digits, are harmless"


@pytest.mark.parametrize("shape", [[2000], [40, 50], [10, 10, 20]])
def test_a_file_never_decodes_to_more_values_than_it_has_bytes(small: tuple, shape: list) -> None:
    # Codes of one dimension times their scales would be an outer product: 4 n^2 bytes from a file of 3 n.
    header = {**small[1], "tensors": [["tok_emb.weight", 8, shape]]}
    blob = seal(payload_of(header, bytes(2000 + 2 * shape[0])))
    try:
        weights = t.decode(blob, "x")[1]
    except t.UserError:
        return
    assert sum(w.numel() for w in weights.values()) <= len(blob)


def test_an_absurd_shape_in_the_header_allocates_nothing(
    small: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, header, _ = small
    outer = torch.outer

    def small_outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.numel() * b.numel() <= 2**27, "the tables of rotary positions are real ones: 1 GiB is enough"
        return outer(a, b)

    monkeypatch.setattr(torch, "outer", small_outer)
    # 128 layers of width 4096 are 2 10^10 parameters; 786,432 positions of a head as wide as the model, 13 10^9 angles.
    for knobs in (
        {"num_layers": 128, "model_dim": 4096, "num_heads": 256, "num_kv_heads": 256},
        {"train_seq_len": 786_432, "model_dim": 2**14, "num_heads": 1, "num_kv_heads": 1, "rope_dims": 0},
    ):
        bad = {**header, "model": {**header["model"], **knobs}, "tensors": []}
        (tmp_path / "m.bin").write_bytes(seal(payload_of(bad, b"")))
        start = time.process_time()
        with pytest.raises(t.UserError):
            t.load_artifact(tmp_path / "m.bin")
        assert time.process_time() - start < 5.0


def test_an_environment_that_contradicts_the_file_is_refused_and_one_that_agrees_is_not(
    tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, model = make_model(tiny, **RICH)
    write_artifact(tmp_path / "m.bin", h, model)
    monkeypatch.setenv("MODEL_DIM", "32")
    monkeypatch.setenv("LEAKY_SLOPE", "0.3")
    monkeypatch.setenv("TTT_EPOCHS", "50")
    loaded, _ = t.load_artifact(tmp_path / "m.bin")
    assert (loaded.ttt_epochs, loaded.model_dim) == (50, 32)
    for name, value in (("MODEL_DIM", "64"), ("LEAKY_SLOPE", "0.75"), ("VE_LAYERS", "-1"), ("GATED_ATTENTION", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(t.UserError, match=f"{name}={value} contradicts .*m.bin"):
                t.load_artifact(tmp_path / "m.bin")


# ------------------------------------------------------------------------------------------------------- the limit
def run_with_limit(make_run: Callable, tmp_path: Path, std: float, fraction: float, **settings: object) -> t.Run:
    """Returns a run whose limit is the code and a fraction of what its weights take on the finest grid."""
    run = make_run(awake=False, size_limit=16_000_000, compressor="lzma", **settings)
    wake(run.model, std)
    finest = t.encode(run.h, t.quantize_weights(prepare(run.h, named(run.model), run.h.prune_frac), 0.0), 0.0, "lzma")
    run.h.size_limit, run.rt.run_dir = CODE_BYTES + int(fraction * len(finest)), tmp_path
    return run


@pytest.mark.parametrize(
    ("std", "fraction"),
    [(0.05, 1.0), (0.05, 0.9), (0.05, 0.5), (0.5, 0.7), pytest.param(0.5, 0.99, id="rows wider than the first floors")],
)
def test_the_automatic_floor_fits_the_limit_and_is_no_coarser_than_needed(
    make_run: Callable, tmp_path: Path, std: float, fraction: float
) -> None:
    run = run_with_limit(make_run, tmp_path, std, fraction)
    figures = t.export(run)
    size, budget = (tmp_path / "final_model.bin").stat().st_size, run.h.size_limit - CODE_BYTES
    assert size <= budget, "the file on the disk and this script's own bytes fit"
    if fraction == 1.0:
        assert figures["quant_floor"] == 0.0
        return
    # A floor of 3/4 makes codes 0.4 bits longer where it decides: 5% of a file with 6 bits a code, and more than the
    # 0.5% that a step of the search and the noise of a compressor on 30,000 bytes leave unused.
    finer = 0.75 * figures["quant_floor"]
    assert (
        len(
            t.encode(
                run.h,
                t.quantize_weights(prepare(run.h, named(run.model), run.h.prune_frac), finer),
                finer,
                "lzma",
            )
        )
        > budget
    )
    assert size > 0.98 * budget


def test_a_fixed_floor_over_the_limit_is_refused_and_says_how_to_go_on(make_run: Callable, tmp_path: Path) -> None:
    run = run_with_limit(make_run, tmp_path, 0.5, 0.9, quant_floor="0.0")
    with pytest.raises(t.UserError, match=r"over SIZE_LIMIT=.*QUANT_FLOOR.*EXPORT_ONLY=\S*checkpoint\.bin"):
        t.export(run)


def test_the_limit_counts_the_bytes_of_the_code(make_run: Callable, tmp_path: Path) -> None:
    run = run_with_limit(make_run, tmp_path, 0.5, 1.0, quant_floor="0.0")
    t.export(run)  # exactly at the limit
    run.h.size_limit -= 1
    with pytest.raises(t.UserError, match=f"code \\+ model are {run.h.size_limit + 1:,} bytes"):
        t.export(run)


def test_a_missing_zstandard_is_an_error_before_training(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    with pytest.raises(t.UserError, match="zstandard is missing.*pip install zstandard.*COMPRESSOR=lzma"):
        t.preflight(run)
    t.preflight(make_run(compressor="lzma"))


@pytest.mark.parametrize("size_limit", [16_000_000, CODE_BYTES + 1000])
def test_a_model_without_quantized_matrices_is_exported_or_refused_like_any_other(
    make_run: Callable, tmp_path: Path, size_limit: int
) -> None:
    bits = dict.fromkeys(("mlp_bits", "attn_bits", "embed_bits", "bigram_bits", "proj_bits"), 16)
    run = make_run(**bits, compressor="lzma", size_limit=size_limit)
    run.rt.run_dir = tmp_path
    if size_limit < 16_000_000:
        with pytest.raises(t.UserError, match="over SIZE_LIMIT"):
            t.export(run)
        return
    t.export(run)
    _, weights = t.decode((tmp_path / "final_model.bin").read_bytes(), "x")
    assert_equal_weights(weights, {name: w.half().float() for name, w in named(run.model).items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_exported(make_run: Callable, tmp_path: Path, value: float) -> None:
    run = make_run()
    run.rt.run_dir = tmp_path
    with torch.no_grad():
        run.model.blocks[1].mlp.fc.weight[3, 5] = value
    with pytest.raises(t.UserError, match="not finite"):
        t.export(run)
    assert not list(tmp_path.iterdir()), "nothing half-written"
