"""The model against formulas: a second forward pass in plain loops, sizes, initial weights, causality, numerics."""

from __future__ import annotations

import copy
import importlib
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, wake

import train_gpt as t

Settings = Callable[..., t.Hyperparameters]


# ------------------------------------------------------------------------------------------ a second implementation


def rms_normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def hashed_row(ids: list[int], at: int, order: int, rows: int) -> int:
    """Row of the n-gram that ends at `at`, in Python's integers, which cannot overflow; the last one where the n-gram
    would begin before its document, whose first token is 1, or before the sequence."""
    if at < order - 1 or 1 in ids[at - order + 2 : at + 1]:
        return rows - 1
    key = 36313 * ids[at] ^ 27191 * ids[at - 1]
    return (key ^ 51497 * ids[at - 2] if order == 3 else key) % (rows - 1)


def rotated(x: np.ndarray, position: int, h: t.Hyperparameters) -> np.ndarray:
    """One head's vector, its first r dimensions taken as pairs (i, i + r / 2) and turned."""
    r, base = h.rope_dims or len(x), h.rope_base
    if h.rope_train_len and h.train_seq_len > h.rope_train_len and r > 2:
        base *= (h.train_seq_len / h.rope_train_len) ** (r / (r - 2))
    out = x.copy()
    for i in range(r // 2):
        angle = position * base ** (-2 * i / r)
        a, b = x[i], x[i + r // 2]
        out[i], out[i + r // 2] = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
    return out


def attention(h: t.Hyperparameters, w: dict, layer: int, x: np.ndarray, ve: np.ndarray, v0: list) -> np.ndarray:
    """Outputs (T, D) of a block's attention for its normed inputs; `v0` receives the first block's values."""
    name, num_positions, d = f"blocks.{layer}.attn.", len(x), h.model_dim // h.num_heads
    v = x @ w[name + "c_v.weight"].T + ve
    if not v0:
        v0.append(v)
    if h.value_residual:
        first, own = w[name + "vr_lambda"]
        v = first * v0[0] + own * v
    q, k = x @ w[name + "c_q.weight"].T, x @ w[name + "c_k.weight"].T
    out = np.zeros((num_positions, h.model_dim))
    for head in range(h.num_heads):
        group = head // (h.num_heads // h.num_kv_heads)
        mine, shared = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
        keys = [rotated(rms_normed(k[s, shared]), s, h) for s in range(num_positions)]
        for at in range(num_positions):
            query = rotated(rms_normed(q[at, mine]), at, h) * w[name + "q_gain"][head]
            scores = np.array([query @ keys[s] / math.sqrt(d) for s in range(at + 1)])
            weights = np.exp(scores - scores.max())
            y = sum(weights[s] / weights.sum() * v[s, shared] for s in range(at + 1))
            if layer >= h.num_layers - h.xsa_last_n:
                direction = v[at, shared] / np.linalg.norm(v[at, shared])
                y = y - (y @ direction) * direction
            if h.gated_attention:
                gate = w[name + "attn_gate.weight"][head] @ x[at] + w[name + "attn_gate.bias"][head]
                y = y * sigmoid(gate)
            if h.attn_gate_dims:
                y = y * 2 * sigmoid(w[name + "head_gate"][head] @ x[at, : h.attn_gate_dims])
            out[at, mine] = y
    return out @ w[name + "proj.weight"].T


def reference_logits(h: t.Hyperparameters, weights: dict, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of one sequence, float64."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    x = w["tok_emb.weight"][ids]
    tables = [("bigram.", (2, 3) if h.trigram_shared else (2,), h.bigram_vocab_size)]
    for name, orders, rows in tables:
        for order in orders if rows else ():
            hashed = w[name + "embed.weight"][[hashed_row(ids, at, order, rows) for at in range(len(ids))]]
            x = x + hashed @ w[name + "proj.weight"].T * w[name + "scale"]
    x, gate = rms_normed(x), sigmoid(w["smear.gate"])
    before = [x[at - 1] if at and ids[at] != 1 else 0 for at in range(len(ids))]
    x = np.stack([(1 - gate) * x[at] + gate * before[at] for at in range(len(ids))])
    x0, skips, v0, num_encoders = x, [], [], h.num_layers // 2
    with_ve = sorted(int(i) % h.num_layers for i in h.ve_layers.split(",")) if h.ve_enabled else []
    order = list(range(h.num_layers))
    again = [int(i) % h.num_layers for i in h.recur_layers.split(",") if i]
    place = again[-1] + 1 if again else 0
    for position, layer in enumerate(order[:place] + again + order[place:]):
        is_again = place <= position < place + len(again)
        name, scale = f"blocks.{layer}.", 1 / math.sqrt(layer + 1) if h.ln_scale else 1.0
        if layer >= num_encoders and skips and not is_again:
            skip = w["skip_weights"][layer - num_encoders] * skips.pop()
            open_part = sigmoid(w["skip_gates"][layer - num_encoders]) if h.gated_skips else None
            x = x + skip if open_part is None else (1 - open_part) * skip + open_part * x
        ve = 0.0
        if layer in with_ve:
            ve = w["ve_shared.embed.weight"][ids] @ w["ve_shared.proj.weight"].T * w["ve_shared.scale"]
            ve = ve * w[f"ve_layer_scales.{with_ve.index(layer)}"]
        u = w[name + "resid_mix"][0] * x + w[name + "resid_mix"][1] * x0
        y = u + w[name + "attn_scale"] * attention(h, w, layer, rms_normed(u) * scale, ve, v0)
        is_parallel = layer >= h.num_layers - h.parallel_last_n
        z = rms_normed(u if is_parallel else y) * scale @ w[name + "mlp.fc.weight"].T
        a = np.where(z > 0, z, h.leaky_slope * z)
        x = y + w[name + "mlp_scale"] * ((a * a) @ w[name + "mlp.proj.weight"].T)
        if layer < num_encoders and not is_again:
            skips.append(x)
    logits = rms_normed(x) @ w["tok_emb.weight"].T
    return h.logit_softcap * np.tanh(logits / h.logit_softcap)


PR_562 = {"num_layers": 4, "ve_enabled": False, "value_residual": True, "gated_attention": True, "trigram_shared": True}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logit_softcap": 0.7, "rope_train_len": 8},  # the cap bites, the base is scaled up
        {**PR_562, "leaky_slope": 0.5, "xsa_last_n": 2, "rope_train_len": 0},
        {"xsa_last_n": 1, "leaky_slope": 0.0},
        {"xsa_last_n": 0, "ln_scale": False},
        {"trigram_shared": True},
        {"bigram_vocab_size": 0, "rope_dims": 0, "rope_train_len": 16},
        {"num_layers": 5, "ve_layers": "-1,0,2", "value_residual": True},  # the first block's values hold an embedding
        {"num_layers": 2, "num_kv_heads": 4, "mlp_mult": 1.5},
        {"num_layers": 6, "num_kv_heads": 1, "rope_dims": 2, "gated_attention": True},
        {"attn_gate_dims": 5, "num_layers": 4},
        {"parallel_last_n": 2, "num_layers": 4},
        {"gated_skips": True, "num_layers": 5},
        {"recur_layers": "1,2", "num_layers": 5, "ve_layers": "2,-1", "value_residual": True},
        {"recur_layers": "0", "num_layers": 4, "value_residual": True},
        {"recur_layers": "-1", "num_layers": 4, "parallel_last_n": 1},
        {"rope_train_len": 8, "eval_seq_len": 48},  # a window longer than the training length, with the same base
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_logits_equal_a_second_implementation_in_plain_loops(tiny: Settings, settings: dict) -> None:
    h = tiny(**settings)
    model = t.GPT(h)
    wake(model, 0.3)
    ids = torch.randint(h.vocab_size, (2, 40 if h.eval_seq_len else 20))
    ids[0, 7], ids[1, 0], ids[1, 3], ids[1, 5] = 1, 1, 1, 1  # documents begin
    with torch.no_grad():
        logits = model.forward_logits(ids)
    expected = np.stack([reference_logits(h, model.state_dict(), row.tolist()) for row in ids])
    # fp32 against float64: unit roundoff 6e-8, times logits of up to 6, times the root of the ~1,000 roundings on a
    # path through at most 6 blocks: 1e-5. The softmax and the norms, which divide, may double that.
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------- sizes, initial weights, building


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 26_993_756),  # PRs 518 and 1092
        ({"bigram_vocab_size": 1536}, 26_928_220),  # PR 549
        ({**PR_562, "num_layers": 10}, 24_509_621),
    ],
    ids=["defaults", "bigram 1536", "PR 562"],
)
def test_the_full_size_model_has_the_published_parameters_and_begins_as_a_guess(settings: dict, count: int) -> None:
    model = t.GPT(device="cpu", **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    tokens = torch.randint(1024, (1, 65))
    # Initial logits are sums of 512 products of entries near 1 and N(0, 0.005^2): standard deviation 0.11, which adds
    # 0.11^2 / 2 = 0.006 to ln 1024 on average, and 0.11 / sqrt(64) = 0.014 of chance for 64 targets.
    with torch.no_grad():
        assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(1024), abs=0.1)


def test_initial_weights_are_the_published_ones(tiny: Settings) -> None:
    h = tiny(**{**PR_562, "ve_enabled": True, "qk_gain_init": 1.25, "vocab_size": 2000})
    seen = set()
    for name, parameter in t.GPT(h).named_parameters():
        last = name.removeprefix("blocks.").split(".", 1)[1] if name.startswith("blocks.") else name
        values = parameter.detach()
        if last in ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "mlp.fc.weight") or ".proj.w" in name[:20]:
            if last not in ("attn.proj.weight", "mlp.proj.weight"):
                gain = 1.0 if name.startswith("blocks.") else 1 / math.sqrt(2 * h.num_layers)
                short = values if values.size(0) <= values.size(1) else values.T
                identity = torch.eye(len(short)) * gain**2
                # A QR decomposition in fp32 is orthogonal to a few roundings of numbers up to 1: 96 x 6e-8.
                torch.testing.assert_close(short @ short.T, identity, rtol=0, atol=6e-6)
                seen.add(last)
                continue
        if last in ("tok_emb.weight", "ve_shared.embed.weight"):
            std = {"tok_emb.weight": 0.005, "ve_shared.embed.weight": 0.01}[last]
            # 32,000 or more normal numbers: a standard deviation is within 1 / sqrt(2 x 32,000) = 0.4%, four times that
            # is allowed; their mean is within 1 / sqrt(32,000) = 0.6% of it, four times that is allowed.
            assert values.std().item() == pytest.approx(std, rel=0.016) and abs(values.mean().item()) < 0.024 * std
            seen.add(last)
            continue
        expected = {
            "bigram.embed.weight": 0.0,
            "bigram.scale": 0.05,
            "ve_shared.scale": 0.1,
            "ve_layer_scales.0": 1.0,
            "ve_layer_scales.1": 1.0,
            "smear.gate": 0.0,
            "skip_weights": 1.0,
            "attn.proj.weight": 0.0,
            "mlp.proj.weight": 0.0,
            "attn.q_gain": 1.25,
            "attn.vr_lambda": 0.5,
            "attn.attn_gate.weight": 0.0,
            "attn.attn_gate.bias": 4.0,
            "attn_scale": 1.0,
            "mlp_scale": 1.0,
            "resid_mix": torch.stack((torch.ones(h.model_dim), torch.zeros(h.model_dim))),
        }[last]
        assert torch.equal(values, torch.as_tensor(expected).expand(values.shape)), name
        seen.add(last)
    assert len(seen) == 16 + 2 + 6  # constants, normal tables, orthogonal matrices: none is missing from the model


def test_blocks_begin_as_the_identity(tiny: Settings) -> None:
    h = tiny(num_layers=4)
    model = t.GPT(h)
    ids = torch.randint(h.vocab_size, (2, 16))
    x = t.rms_norm(model.tok_emb(ids))
    x = (x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]) / 2  # the smear gate is half open; hash tables are zero
    # The skips add multiples of x, which the last norm takes away again, but for its eps: 1.2e-7 against a mean square
    # of 0.5. Logits are below 0.1, so that is 1e-8; fp32 rounding of 32 products adds 32 x 6e-8 x 0.1.
    expected = 30 * torch.tanh(t.rms_norm(x) @ model.tok_emb.weight.T / 30)
    torch.testing.assert_close(model.forward_logits(ids), expected, rtol=0, atol=3e-7)


def test_settings_and_keywords_build_the_same_model(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    from_settings = t.GPT(tiny(gated_attention=True)).state_dict()
    torch.manual_seed(5)
    from_keywords = t.GPT(**{**TINY, "gated_attention": True}).state_dict()
    monkeypatch.setenv("GATED_ATTENTION", "1")
    torch.manual_seed(5)
    from_environment = t.GPT(**TINY).state_dict()
    for weights in (from_keywords, from_environment):
        assert weights.keys() == from_settings.keys()
        assert all(torch.equal(weights[name], from_settings[name]) for name in weights)


# ------------------------------------------------------------------------------------------------- which knobs count

BASE = {"rope_train_len": 8}  # so that every knob of the model has something to act on
OTHER_FUNCTION = {  # the same weights then mean another function
    "train_seq_len": 64,
    "leaky_slope": 0.5,
    "logit_softcap": 5.0,
    "rope_base": 500.0,
    "rope_dims": 8,
    "rope_train_len": 16,
    "xsa_last_n": 1,
    "ln_scale": False,
    "trigram_shared": True,
    "ve_layers": "0,1",
    "parallel_last_n": 1,
    "recur_layers": "1",
}
OTHER_SHAPES = {
    "vocab_size": 97,
    "num_layers": 4,
    "model_dim": 40,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_mult": 2.0,
    "bigram_vocab_size": 65,
    "bigram_dim": 8,
    "ve_enabled": False,
    "ve_dim": 8,
    "value_residual": True,
    "gated_attention": True,
    "attn_gate_dims": 4,
    "gated_skips": True,
}


def test_what_changes_the_model_is_carried_by_the_header_of_its_file() -> None:
    assert OTHER_FUNCTION.keys() | OTHER_SHAPES.keys() <= t.Hyperparameters(device="cpu").values(t.ModelKnob).keys()


@pytest.mark.parametrize(("name", "value"), OTHER_FUNCTION.items())
def test_a_knob_of_the_model_changes_its_function(tiny: Settings, name: str, value: object) -> None:
    model, other = t.GPT(tiny(**BASE)), t.GPT(tiny(**{**BASE, name: value}))
    wake(model)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(96, (2, 32))
    difference = (model.forward_logits(ids) - other.forward_logits(ids)).abs().max()
    assert difference > 1e-4  # rounding is below 1e-5, see the second implementation


@pytest.mark.parametrize(("name", "value"), OTHER_SHAPES.items())
def test_a_knob_of_the_model_changes_its_shapes(tiny: Settings, name: str, value: object) -> None:
    shapes = [
        {parameter: tensor.shape for parameter, tensor in t.GPT(tiny(**settings)).state_dict().items()}
        for settings in (BASE, {**BASE, name: value})
    ]
    assert shapes[0] != shapes[1]


OTHER_TEXTS = {
    "quant_floor": 0.5,
    "fp16_keep_name_patterns": "tok_emb",
    "ttt_lr_groups": "mlp.proj:3",
    "eval_attn_window": 32,
    "eval_seq_len": 64,
    "ttt_freeze_blocks": 1,
}


def another_value(tiny: Settings, name: str) -> object:
    """An allowed value of a knob that is not its value in the tiny settings."""
    knob, value = t.Hyperparameters.knobs()[name], getattr(tiny(), name)
    if name in OTHER_TEXTS or isinstance(value, str):
        return OTHER_TEXTS.get(name) or next((text for text in knob.allowed or () if text != value), "other")
    if isinstance(value, bool):
        return not value
    half = value // 2 if isinstance(value, int) else value / 2
    return half if half != value and half >= knob.allowed[0] else knob.allowed[1]


@pytest.mark.parametrize(
    "name", [name for name, knob in t.Hyperparameters.knobs().items() if not isinstance(knob, t.ModelKnob)]
)
def test_no_other_knob_changes_the_function_or_the_initial_weights(tiny: Settings, name: str) -> None:
    value, models = another_value(tiny, name), []
    assert value != getattr(tiny(), name)
    for settings in (BASE, {**BASE, name: value}):
        torch.manual_seed(3)
        models.append(t.GPT(tiny(**settings)))
    changed = {
        key.split(".")[-2] + "." + key.split(".")[-1]
        for key, weights in models[0].state_dict().items()
        if not torch.equal(weights, models[1].state_dict()[key])
    }
    assert changed == {"qk_gain_init": {"attn.q_gain"}, "tied_embed_init_std": {"tok_emb.weight"}}.get(name, set())
    wake(models[0])
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(96, (2, 32))
    assert torch.equal(models[0].forward_logits(ids), models[1].forward_logits(ids))


# ------------------------------------------------------------------------------------------- recurrence and the gate


def copied_blocks(model: t.GPT) -> t.GPT:
    """The same function with a block of its own in each place of the list."""
    plain = copy.deepcopy(model)
    for i in model.recur_blocks:
        plain.blocks.append(copy.deepcopy(model.blocks[i]))
        if i in model.ve_blocks:
            plain.ve_blocks.append(len(plain.blocks) - 1)
            plain.ve_layer_scales.append(copy.deepcopy(model.ve_layer_scales[model.ve_blocks.index(i)]))
    num_blocks, end = len(model.blocks), model.recur_blocks[-1] + 1
    plain.block_order = [*range(end), *range(num_blocks, len(plain.blocks)), *range(end, num_blocks)]
    return plain


@pytest.mark.parametrize("layers", ["2,3", "1", "4,5", "0,1", "3,4"])
def test_recurrence_is_the_model_with_copied_blocks_whose_gradients_add_up(tiny: Settings, layers: str) -> None:
    model = t.GPT(tiny(num_layers=6, recur_layers=layers, ve_layers="3,-1", value_residual=True))
    wake(model)
    plain = copied_blocks(model)
    ids = torch.randint(96, (2, 33))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    losses = [m(inputs, targets) for m in (model, plain)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    expected = {name: p.grad.clone() for name, p in plain.named_parameters()}
    for place, i in enumerate(model.recur_blocks):
        own, copied = f"blocks.{i}.", f"blocks.{6 + place}."
        for name in [name for name in expected if name.startswith(own)]:
            expected[name] += expected[copied + name.removeprefix(own)]
    for number, block in enumerate(plain.ve_blocks[2:]):
        expected[f"ve_layer_scales.{model.ve_blocks.index(block - 6 + model.recur_blocks[0])}"] += expected[
            f"ve_layer_scales.{2 + number}"
        ]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recurrence_that_is_off_is_the_plain_model_to_the_last_bit(tiny: Settings) -> None:
    torch.manual_seed(3)
    model = t.GPT(tiny(recur_layers="1,2"))
    torch.manual_seed(3)
    plain = t.GPT(tiny())
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.randint(96, (2, 20))
    wake(model)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.forward_logits(ids), plain.forward_logits(ids))
    model.set_recurrence(False)
    assert torch.equal(model.forward_logits(ids), plain.forward_logits(ids))


def test_the_narrow_gate_begins_open_and_leaves_the_other_weights_as_they_were(tiny: Settings) -> None:
    torch.manual_seed(3)
    gated = t.GPT(tiny(attn_gate_dims=4))
    torch.manual_seed(3)
    plain = t.GPT(tiny())
    assert all(torch.equal(w, gated.state_dict()[name]) for name, w in plain.state_dict().items())
    for block, other in zip(plain.blocks, gated.blocks):
        wake(block)
        other.load_state_dict(block.state_dict(), strict=False)
    ids = torch.randint(96, (2, 20))
    assert torch.equal(gated.forward_logits(ids), plain.forward_logits(ids))


# ------------------------------------------------------------------------------------------------------ single parts


def test_the_norm_is_over_the_root_mean_square_with_the_eps_of_fp32() -> None:
    x = torch.randn(5, 32) * 10.0 ** torch.arange(-5, 0).unsqueeze(1)  # from below the root of eps, 3.5e-4, to above
    # fp32: a mean of 32 squares, a root and a division, each within 6e-8 of itself.
    np.testing.assert_allclose(t.rms_norm(x).numpy(), rms_normed(x.double().numpy()), rtol=1e-6)
    halved = x.bfloat16()
    assert t.rms_norm(halved).dtype == torch.bfloat16
    # Statistics in fp32: what is left is the rounding of the result to 8 significant bits, and 1% of that for the rest.
    expected = rms_normed(halved.double().numpy())
    np.testing.assert_allclose(t.rms_norm(halved).double().numpy(), expected, rtol=1.01 * 2**-8)


@pytest.mark.parametrize(("order", "rows"), [(2, 2048), (3, 2048), (2, 2), (3, 2**24)])
def test_hashes_are_those_of_unbounded_integers(order: int, rows: int) -> None:
    table = t.ProjectedEmbedding(2, 4, 8, (order,), 1.0)
    table.embed.num_embeddings = rows  # only their number matters here
    # Products with the large ids need more than 32 bits; 1 begins a document.
    ids = torch.tensor([[5, 7, 0, 1023, 65_535, 65_535, 65_535, 59_139, 1, 8, 9, 1, 1, 4]])
    expected = [hashed_row(ids[0].tolist(), at, order, rows) for at in range(ids.size(1))]
    assert table.rows_of(ids, order).tolist() == [expected]
    cut = {0, 8, 11, 12} if order == 2 else {0, 1, 8, 9, 11, 12, 13}  # the row that no hash reaches
    assert [at for at, row in enumerate(expected) if row == rows - 1] == sorted(cut)


def test_hashes_by_hand() -> None:
    bigram = t.ProjectedEmbedding(2048, 4, 8, (2, 3), 1.0)
    ids = torch.tensor([[5, 7, 9]])
    # 36313 x 7 = 254191 XOR 27191 x 5 = 135955 is 127996, mod 2047: 1082. 36313 x 9 = 326817 XOR 27191 x 7 = 190337 is
    # 400160, mod 2047: 995; that XOR 51497 x 5 = 257485 is 390893, mod 2047: 1963.
    assert bigram.rows_of(ids, 2).tolist() == [[2047, 1082, 995]]
    assert bigram.rows_of(ids, 3).tolist() == [[2047, 2047, 1963]]
    assert bigram.rows_of(ids, 1).tolist() == [[5, 7, 9]]


@pytest.mark.parametrize("settings", [{}, {"trigram_shared": True}])
def test_a_narrow_hash_table_learns(tiny: Settings, settings: dict) -> None:
    """Published tables narrower than 64 had a projection of zeros before a table of zeros: no gradient, for ever."""
    model = t.GPT(tiny(bigram_dim=8, **settings))
    with torch.no_grad():  # the head is the embedding: only its first step makes it differ from a guess
        model.tok_emb.weight.normal_()
    ids = torch.randint(2, 96, (2, 17))
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert model.bigram.embed.weight.grad.any() and model.bigram.proj.weight.any()


def test_ngrams_and_smearing_do_not_reach_into_the_document_before() -> None:
    """What a document begins with has the same vectors after every other document, and as at the begin of a text."""
    table, smear = t.ProjectedEmbedding(64, 4, 8, (2, 3), 1.0), t.SmearGate(8)
    embed = torch.nn.Embedding(96, 8)
    document = [1, 7, 8, 9]
    outs = []
    for before in ([3, 4, 5], [6, 4, 9], []):
        ids = torch.tensor([before + document])
        outs.append(torch.cat((table(ids, torch.float32), smear(embed(ids), ids)), -1)[:, -4:])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert not torch.equal(smear(embed(ids), ids)[:, 1:], embed(ids)[:, 1:] / 2)  # inside of it, it smears


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({}, 22_081.79),  # 10,000 x 2^(16 / 14), as in PRs 518, 977 and 1092
        ({"train_seq_len": 1024}, 10_000.0),
        ({"train_seq_len": 512}, 10_000.0),  # never scaled down
        ({"rope_train_len": 0}, 10_000.0),
        ({"eval_seq_len": 4096}, 22_081.79),  # scoring uses the function that was trained
    ],
)
def test_the_rotary_base_is_scaled_to_the_training_length(settings: dict, base: float) -> None:
    assert t.Rotary(t.Hyperparameters(device="cpu", **settings)).base == pytest.approx(base, abs=0.005)


def test_rotary_tables_are_exact_and_no_cast_of_the_model_rounds_them(tiny: Settings) -> None:
    h = tiny(train_seq_len=2048, train_batch_tokens=2048)
    model = t.GPT(h).bfloat16()
    rotary = model.blocks[0].attn.rotary
    angles = np.outer(np.arange(2048), rotary.base ** (-np.arange(0, 4, 2) / 4))
    for table, function in ((rotary.cos, np.cos), (rotary.sin, np.sin)):
        assert table.dtype == torch.float32 and table.shape == (2048, 1, 2)
        # Rounded once, from float64: numbers below 1 are 2^-24 apart; 1% for two libraries' last bits.
        np.testing.assert_allclose(table[:, 0].double().numpy(), function(angles), rtol=0, atol=1.01 * 2**-25)
    assert model.half().float().blocks[2].attn.rotary.cos is rotary.cos  # one table for all blocks, not touched
    assert not any("rotary" in name for name in model.state_dict())
    model.to("meta")
    assert rotary.cos.device.type == rotary.sin.device.type == "meta"  # but it moves with the model


def test_excluded_outputs_are_orthogonal_to_their_own_value() -> None:
    y, v = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 3, 8)
    v *= 10.0 ** torch.tensor([0.0, 2.0, -2.0, -5.0, -9.0]).view(5, 1, 1)  # only the direction counts
    v[0, 0, 0] = 0.0
    out = t.xsa(y, v)
    direction = torch.nn.functional.normalize(v.double(), dim=-1).repeat_interleave(2, dim=2)  # head 2 g + i: group g
    # Sums of 8 products of numbers of up to 4 and 1 in fp32: 8 x 4 x 6e-8.
    assert (out * direction).sum(-1).abs().max() < 2e-6
    expected = y - direction * (y * direction).sum(-1, keepdim=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(out[0, 0, :2], y[0, 0, :2])  # a value of zero takes nothing away, and is no division by zero


# ------------------------------------------------------------------------------------------- causality, tail, losses

EVERYTHING = {**PR_562, "ve_enabled": True}


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_future_tokens_do_not_change_past_logits(tiny: Settings, settings: dict) -> None:
    model = t.GPT(tiny(**settings))
    wake(model)
    ids = torch.randint(96, (2, 24))
    with torch.no_grad():
        before = model.forward_logits(ids)
        for at in range(24):
            flipped = ids.clone()
            flipped[0, at] = (ids[0, at] + 1) % 96
            after = model.forward_logits(flipped)
            assert torch.equal(after[0, :at], before[0, :at]) and torch.equal(after[1], before[1])
            assert not torch.equal(after[0, at], before[0, at])
            tail = model.forward_logits(ids, 8)[0, : max(0, at - 16)]
            assert torch.equal(model.forward_logits(flipped, 8)[0, : max(0, at - 16)], tail)


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"num_layers": 2}], ids=["defaults", "everything", "2 layers"])
@pytest.mark.parametrize("num_targets", [1, 7, 31, 32])
def test_the_tail_alone_scores_as_in_the_whole(tiny: Settings, settings: dict, num_targets: int) -> None:
    model = t.GPT(tiny(**settings))
    wake(model)
    ids, targets = torch.randint(96, (2, 3, 32))
    with torch.no_grad():
        whole, tail = model.token_nll(ids, targets), model.token_nll(ids, targets[:, -num_targets:])
    assert whole.shape == (3, 32) and tail.shape == (3, num_targets)
    # The same terms, but attention with a mask and smaller matrix products add them in another order: ~30 roundings of
    # 6e-8 relative on losses of up to 10, which add in squares: 3e-6, and three times that for unlucky ones.
    torch.testing.assert_close(tail, whole[:, -num_targets:], rtol=0, atol=1e-5)


def test_probabilities_sum_to_one_and_the_loss_is_their_mean(tiny: Settings) -> None:
    model = t.GPT(tiny(**EVERYTHING))
    wake(model)
    ids, targets = torch.randint(96, (2, 2, 32))
    with torch.no_grad():
        nll = torch.stack([model.token_nll(ids, torch.full_like(ids, token)) for token in range(96)])
        # A sum of 96 fp32 numbers, each from a nll of ~5 that is exact to 5 x 6e-8.
        torch.testing.assert_close(nll.neg().exp().sum(0), torch.ones(2, 32), rtol=0, atol=2e-6)
        assert nll.std() > 0.1  # no uniform guess
        expected = nll.gather(0, targets.unsqueeze(0))[0]
        assert torch.equal(model.token_nll(ids, targets), expected)
        torch.testing.assert_close(model(ids, targets), expected.mean(), rtol=1e-6, atol=0)  # order of 64 additions


def test_targets_of_minus_100_cost_nothing(tiny: Settings) -> None:
    model = t.GPT(tiny())
    wake(model)
    ids, targets = torch.randint(96, (2, 2, 32))
    masked = targets.masked_fill(torch.rand(2, 32) < 0.5, -100)
    whole, part = model.token_nll(ids, targets), model.token_nll(ids, masked)
    assert torch.equal(part, whole.masked_fill(masked == -100, 0.0))
    part.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_are_slopes_of_the_loss(tiny: Settings) -> None:
    model = t.GPT(tiny(**EVERYTHING))
    wake(model)
    ids, targets = torch.randint(96, (2, 2, 32))
    model(ids, targets).backward()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) / parameter.numel() ** 0.5
        direction = parameter.grad / parameter.grad.norm() + noise  # along the gradient a slope stands out of rounding
        losses, size = [], 0.003
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * size)
                losses.append(model(ids, targets).item())
                parameter.sub_(direction, alpha=sign * size)
        # Central differences err by the loss's rounding, 10 x 6e-8 x 5 / 0.006 = 5e-4, and by 0.003^2 / 6 of its third
        # derivative, which is below 1% of a slope here (at 0.01, where it is 11 times as much, 2.6% were seen).
        expected = (losses[0] - losses[1]) / (2 * size)
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=0.01, abs=5e-4), name


# --------------------------------------------------------------------------------------------- numerics, compilation


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_bfloat16_activations_stay_close_and_parameters_stay_fp32(tiny: Settings, settings: dict) -> None:
    model = t.GPT(tiny(**settings))
    wake(model)
    ids, targets = torch.randint(96, (2, 4, 32))
    exact = model.forward_logits(ids)
    model.compute_dtype = torch.bfloat16
    rounded = model.forward_logits(ids)
    model(ids, targets).backward()
    assert rounded.dtype == torch.float32 and model.hidden(ids).dtype == torch.bfloat16
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    # A rounding to 8 significant bits is at most 2^-8 = 0.4%, about 0.17% in the mean square. A path through 4 blocks
    # meets about 20 of them a block, which add in squares: sqrt(80) x 0.17% = 1.5%; MLPs square their input, which
    # doubles its error: below 5%. And at least one rounding is there, or nothing was computed in bfloat16: above 0.1%.
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0.001 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_matrices_cast_ahead_give_the_same_bits_for_the_weights_of_the_moment_and_are_put_away(
    tiny: Settings, settings: dict, dtype: torch.dtype
) -> None:
    model = t.GPT(tiny(**settings))
    model.compute_dtype = dtype
    wake(model)
    ids, targets = torch.randint(96, (2, 4, 32))
    matrices = t.CastMatrices(model)
    places = [tensor.data_ptr() for tensor in matrices.tensors]
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    results = []
    with torch.no_grad():
        for _ in range(3):
            expected = model.token_nll(ids, targets)
            with matrices.used():
                assert all(linear.cast is not None for linear in linears)  # none is forgotten
                assert torch.equal(model.token_nll(ids, targets), expected)
            results.append(expected)
            for parameter in model.parameters():  # as adaptation does, in place
                parameter.mul_(1.1)
    assert not torch.equal(results[0], results[1])
    assert places == [tensor.data_ptr() for tensor in matrices.tensors]  # where a CUDA graph reads them
    with pytest.raises(KeyboardInterrupt), matrices.used():
        raise KeyboardInterrupt
    assert all(linear.cast is None for linear in linears)
    model(ids, targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def can_compile() -> bool:
    """Whether torch can build C++ kernels here: it needs a compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def test_the_model_is_one_graph_for_the_compiler(tiny: Settings) -> None:
    torch.compiler.reset()
    model = t.GPT(tiny(**{**EVERYTHING, "num_layers": 2}))
    wake(model)
    ids, targets = torch.randint(96, (2, 2, 32))
    for function, arguments in ((model.token_nll, (ids, targets)), (model.forward_logits, (ids, 8))):
        traced = torch.compile(function, dynamic=False, fullgraph=True, backend="eager")
        assert torch.equal(traced(*arguments), function(*arguments))  # the same kernels in the same order
    results = []
    for function in (model.forward, torch.compile(model.forward, dynamic=False, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = function(ids, targets)
        loss.backward()
        results.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (loss, gradients), (traced_loss, traced_gradients) = results
    # The traced backward pass adds in another order: ~100 roundings of 6e-8, in squares,
    # on a loss of up to 10 or relative to a gradient: 6e-6.
    torch.testing.assert_close(traced_loss, loss, rtol=0, atol=1e-5)
    for ours, theirs in zip(traced_gradients, gradients):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C++ compiler and Python.h for the CPU")
def test_the_compiled_model_scores_as_the_eager_one(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no processes, each of which imports torch
    torch.compiler.reset()
    h = tiny(num_layers=2, compile="1", value_residual=True, gated_attention=True)
    model, rt = t.GPT(h), t.Runtime(h)
    wake(model)
    ids, targets = torch.randint(96, (2, 2, 32))
    with torch.no_grad():
        compiled = rt.compile(model.token_nll)
        assert compiled is not model.token_nll
        for _ in range(2):  # fused kernels add in another order: ~100 roundings of 6e-8, in squares, on up to 10
            torch.testing.assert_close(compiled(ids, targets), model.token_nll(ids, targets), rtol=0, atol=1e-5)
            wake(model)  # new values of weights must be seen, not folded into the graph


def test_scoring_between_steps_compiles_no_training_graph_again(tiny: Callable) -> None:
    """Scoring casts matrices ahead. A step in training would else take a minute more, after the clock has started."""
    torch.compiler.reset()
    counter = importlib.import_module("torch._dynamo.testing").CompileCounter()
    model = t.GPT(tiny(num_layers=2))
    forward = torch.compile(model.forward, backend=counter)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    forward(ids, ids)
    compiled = counter.frame_count
    with t.CastMatrices(model).used(), torch.no_grad():
        model(ids, ids)
    forward(ids, ids)
    assert counter.frame_count == compiled > 0
