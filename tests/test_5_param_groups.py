"""The table of families: every parameter is in one, and it decides optimizer, decay and stored bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

import train_gpt as t

Settings = Callable[..., t.Hyperparameters]

SWITCHES = {
    "bigram_vocab_size": (64, 0),
    "trigram_shared": (False, True),
    "ve_enabled": (True, False),
    "value_residual": (False, True),
    "gated_attention": (False, True),
    "num_layers": (2, 12),  # one with blocks of two digits
}


def combinations() -> Iterator[dict]:
    """Every combination of the model's switches that is allowed."""
    for values in itertools.product(*SWITCHES.values()):
        settings = dict(zip(SWITCHES, values))
        if settings["bigram_vocab_size"] or not settings["trigram_shared"]:
            yield settings


def build(h: t.Hyperparameters) -> t.GPT:
    """The model's names and shapes, without memory."""
    with torch.device("meta"):
        return t.GPT(h)


def expected_family(name: str) -> str:
    """The inventory once more, by parts of names instead of patterns."""
    *path, module, last = name.split(".")
    if last != "weight" or module == "attn_gate":
        return "control"
    if path and path[0] == "blocks":
        return "mlp" if path[2] == "mlp" else "attention"
    if module == "proj":
        return "projection"
    return "hash_table" if path and path[0] in ("bigram",) else "embedding"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_every_parameter_of_every_model_is_in_exactly_one_family(tiny: Settings) -> None:
    num_models, seen = 0, set()
    for settings in combinations():
        num_models += 1
        for name, parameter in build(tiny(**settings)).named_parameters():
            family = t.param_group_of(name)  # asserts that there is exactly one
            assert family.name == expected_family("x." + name if name.count(".") == 0 else name), (name, settings)
            # Muon is for matrices; what is neither matrix nor table must not decay, or gains would fall towards 0.
            assert parameter.ndim == 2 or (family.optimizer, family.weight_decay) == ("adamw", 0.0), name
            seen.add(family.name)
    assert num_models == 2**3 * (2 + 4) and seen == {family.name for family in t.PARAM_GROUPS}


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.q.weight",
        "blocks.0.attn.c_q.bias",
        "blocks.x.attn.c_q.weight",
        "module.blocks.0.attn.c_q.weight",
        "blocks.0.attn.c_q.weight.more",
        "lm_head.weight",
        "",
    ],
)
def test_a_parameter_without_a_family_is_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="is in the groups"):
        t.param_group_of(name)


def test_the_optimizer_holds_every_parameter_once_with_its_familys_settings(tiny: Settings) -> None:
    rates = {"matrix_lr": 0.1, "tied_embed_lr": 0.2, "scalar_lr": 0.3, "muon_wd": 0.4, "adam_wd": 0.5}
    h = tiny(gated_attention=True, value_residual=True, **rates)
    model = t.GPT(h)
    optimizer = t.Optimizer(h, t.Runtime(h), model)
    held = []
    for stack in optimizer.muon_groups:
        held += [(p, "muon", stack.lr, stack.weight_decay) for p in stack.wide + stack.tall]
    for group in optimizer.adamw.param_groups:
        held += [(p, "adamw", group["lr"], group["weight_decay"]) for p in group["params"]]
    expected = {
        "attention": ("muon", 0.1, 0.4),
        "mlp": ("muon", 0.1, 0.4),
        "projection": ("muon", 0.1, 0.4),
        "embedding": ("adamw", 0.2, 0.5),
        "hash_table": ("adamw", 0.2, 0.5),
        "control": ("adamw", 0.3, 0.0),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for p, *_ in held) == sorted(names.values())  # each once, none left out
    for parameter, *settings in held:
        name = names[id(parameter)]
        assert tuple(settings) == expected[expected_family("x." + name if "." not in name else name)], name


BITS = {"mlp_bits": 5, "attn_bits": 6, "embed_bits": 8, "bigram_bits": 7, "proj_bits": 4}
STORED = {
    "blocks.0.mlp.fc.weight": 5,
    "blocks.2.mlp.proj.weight": 5,
    "blocks.0.attn.c_q.weight": 6,
    "blocks.1.attn.c_k.weight": 6,
    "blocks.2.attn.c_k.weight": 6,
    "blocks.2.attn.proj.weight": 6,
    "tok_emb.weight": 8,
    "ve_shared.embed.weight": 8,
    "bigram.embed.weight": 7,
    "bigram.proj.weight": 4,
    "ve_shared.proj.weight": 4,
    "blocks.1.attn.attn_gate.weight": 16,
    "blocks.1.attn.q_gain": 16,
    "blocks.1.resid_mix": 16,
    "skip_weights": 16,
    "smear.gate": 16,
    "bigram.scale": 16,
    "ve_layer_scales.1": 16,
}


@pytest.mark.parametrize(
    ("patterns", "in_fp16"),
    [
        ("", set()),
        ("tok_emb,blocks.2.attn.c_k", {"tok_emb.weight", "blocks.2.attn.c_k.weight"}),  # PR 562 kept two such
        (".mlp.", {"blocks.0.mlp.fc.weight", "blocks.2.mlp.proj.weight"}),
        ("gram.embed,", {"bigram.embed.weight"}),  # a comma at the end is no pattern
    ],
)
def test_stored_bits_are_the_familys_except_where_a_pattern_keeps_fp16(
    tiny: Settings, patterns: str, in_fp16: set[str]
) -> None:
    h = tiny(fp16_keep_name_patterns=patterns, **BITS)
    assert {name: t.stored_bits(h, name) for name in STORED} == {
        name: 16 if name in in_fp16 else bits for name, bits in STORED.items()
    }


def test_stored_bits_by_default_are_those_of_the_published_systems(tiny: Settings) -> None:
    by_family = {t.param_group_of(name).name: t.stored_bits(tiny(), name) for name in STORED}
    published = {"attention": 6, "mlp": 6, "projection": 16, "embedding": 8, "hash_table": 8, "control": 16}
    assert by_family == published  # PRs 518, 977 and 1092


@pytest.fixture
def started(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., t.Run]:
    """Builds a run as `main` does, without data."""
    monkeypatch.setattr(t, "load_validation_tokens", lambda h: None)
    monkeypatch.setattr(t, "load_shards", lambda h, split: [])

    def start(**settings: object) -> t.Run:
        h = tiny(**settings)
        return t.build_run(h, t.Runtime(h))

    return start


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"fp16_keep_name_patterns": "tok_emd"}, "tok_emd"),
        ({"fp16_keep_name_patterns": "tok_emb,blocks.9.attn.c_k"}, "blocks.9.attn.c_k"),  # there are 3 blocks
        ({"ttt_lr_groups": "mlp_down:3"}, "mlp_down"),  # the name in PR 1092
        ({"ttt_lr_groups": "mlp.proj:3", "fp16_keep_name_patterns": "trigram"}, "trigram"),  # no table of its own
    ],
)
def test_a_pattern_that_matches_no_parameter_is_refused(started: Callable, settings: dict, part: str) -> None:
    with pytest.raises(t.UserError, match=f"^{part}, in FP16_KEEP_NAME_PATTERNS or TTT_LR_GROUPS, is in no parameter"):
        started(**settings)


def test_local_attention_narrower_than_that_of_training_is_refused(started: Callable) -> None:
    with pytest.raises(t.UserError, match="^EVAL_ATTN_WINDOW=16 is smaller than TRAIN_SEQ_LEN=32"):
        started(eval_attn_window=16)


def test_weights_gradients_and_optimizer_states_of_a_run_are_fp32(started: Callable) -> None:
    """Published: embeddings and tables in bf16 without masters, momentum and reduced gradients in bf16."""
    run = started(gated_attention=True, value_residual=True)
    reduced, dtypes = [], set()
    run.rt.world_size = 2
    run.rt.all_reduce = lambda x: reduced.append(x) or x
    run.rt.reduce_scatter = lambda x: reduced.append(x) or (lambda: x[: len(x) // 2].clone())
    run.rt.all_gather = lambda x: lambda: torch.cat((x, x))
    run.model.compute_dtype = torch.bfloat16  # as on a GPU
    optimizer = t.Optimizer(run.h, run.rt, run.model)
    ids = torch.randint(96, (2, 33))
    run.mean_loss(ids[:, :-1], ids[:, 1:]).backward()
    dtypes |= {p.dtype for p in run.model.parameters()} | {p.grad.dtype for p in run.model.parameters()}
    optimizer.step(1.0, 0.9)
    dtypes |= {stack.momentum.dtype for stack in optimizer.muon_groups} | {x.dtype for x in reduced}
    dtypes |= {x.dtype for state in optimizer.adamw.state.values() for x in state.values()}
    assert dtypes == {torch.float32} and len(reduced) > 3
    trainer = t.Trainer(started(swa_enabled=True))
    assert trainer.ema and trainer.swa and {x.dtype for x in trainer.ema + trainer.swa} == {torch.float32}


def test_training_and_scoring_call_the_compiled_model(started: Callable) -> None:
    for compiled in (True, False):
        run = started(compile="01"[compiled])
        calls = (run.mean_loss, run.token_nll)
        assert [call.__qualname__.startswith("CompilerWatch") for call in calls] == [compiled] * 2


def test_patterns_that_match_are_accepted(started: Callable) -> None:
    run = started(ttt_lr_groups="mlp.proj:3,mlp.fc:0.5", fp16_keep_name_patterns="tok_emb,blocks.2.attn.c_k")
    assert run.h.fp16_patterns == ["tok_emb", "blocks.2.attn.c_k"]
    assert run.h.ttt_multipliers == {"mlp.proj": 3.0, "mlp.fc": 0.5}
