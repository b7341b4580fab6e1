"""Every setting: its default, the environment, what is refused and in which words, and which settings fit together."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import train_gpt as t

KNOBS = t.Hyperparameters.knobs()
DEFAULTS = {name: knob.default for name, knob in KNOBS.items()}

# Legal values besides the defaults, where a step away from the default does not fit the other defaults. A new knob
# needs no entry, unless it is a text of its own form, or has to fit another one.
OTHER_VALUES: dict[str, Any] = {
    "recur_layers": "4,5",
    "train_batch_tokens": 2048,
    "train_seq_len": 1024,
    "model_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 8,
    "bigram_vocab_size": 512,
    "ve_layers": "0,3",
    "quant_floor": 0.5,
    "size_limit": 15_000_000,
    "eval_seq_len": 4096,
    "ttt_lr_groups": "mlp.proj:3",
    **{name: 4 for name in KNOBS if name.endswith("_bits")},
}


def other_value(name: str) -> Any:
    """Returns a legal value that is not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default, allowed = KNOBS[name].default, KNOBS[name].allowed
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return next(choice for choice in allowed if choice != default) if allowed else "other"
    if isinstance(default, int):
        return default + 1 if default < allowed[1] else default - 1
    return (default + (allowed[0] if default != allowed[0] else allowed[1])) / 2


def as_text(value: Any) -> str:
    """Returns the value as one writes it in a shell."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def bad_texts(knob: t.Knob) -> list[str]:
    """Returns texts that the knob must refuse: no number, not as numbers are written, or just outside the range."""
    if knob.kind is bool:
        return ["", "2", "-1", "true", "True", "yes", "01", "1.0", " 1"]
    if knob.kind is str:
        return ["nonsense", "", knob.default.upper(), f" {knob.default}"] if knob.allowed else []
    low, high = knob.allowed
    wrong = ["", "many", "092", "00", "0x10", "1,5", "nan", "inf", "-inf", " 1", "1 ", "1__0", "--1", "1e", "."]
    if knob.kind is int:
        return [*wrong, str(low - 1), str(high + 1), "1.5", "1.0", "1e3"]
    below, above = (end + sign * max(abs(end) * 2**-52, 1e-300) for end, sign in ((low, -1), (high, 1)))
    return [*wrong, repr(below), repr(above), "1e999", "-1e999"]


def bad_values(knob: t.Knob) -> list[Any]:
    """Returns Python values of a wrong type, or not a number, that no type conversion may hide."""
    if knob.kind is bool:
        return [0, 1, 1.0, None]
    if knob.kind is str:
        return [5, None, True, ["auto"]]
    return [None, True, [1], float("nan"), *([1.0] if knob.kind is int else [])]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes its arguments the whole environment."""
    return lambda *pairs, **variables: monkeypatch.setattr(os, "environ", {**dict(pairs), **variables})


def upper(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the settings as variables of the environment."""
    return [(name.upper(), as_text(value)) for name, value in settings.items()]


def test_a_default_is_read_on_the_class_and_can_be_written_down() -> None:
    for name, knob in KNOBS.items():
        default = getattr(t.Hyperparameters, name)
        assert default == knob.default, name
        for given in (default, as_text(default)):
            parsed = knob.parse(name, given)
            assert parsed == default and type(parsed) is type(default), (name, given, parsed)


def test_the_environment_sets_a_knob_with_its_type_and_no_other(environment: Callable) -> None:
    for name, default in DEFAULTS.items():
        wanted = other_value(name)
        assert wanted != default, name
        environment((name.upper(), as_text(wanted)))
        if name == "tie_embeddings":  # its other value is understood, and then refused
            with pytest.raises(t.UserError, match="TIE_EMBEDDINGS=0 is not supported"):
                t.Hyperparameters()
            continue
        h = t.Hyperparameters()
        assert h.values() == {**DEFAULTS, name: wanted}
        assert type(getattr(h, name)) is KNOBS[name].kind, name
        assert getattr(t.Hyperparameters, name) == default, name  # on the class it is still the default
        assert h.given == {name: as_text(wanted)}


def test_an_override_beats_the_environment(environment: Callable) -> None:
    for name in KNOBS.keys() - {"tie_embeddings"}:
        environment((name.upper(), as_text(other_value(name))))
        assert t.Hyperparameters(**{name: DEFAULTS[name]}).values() == DEFAULTS
        environment((name.upper(), as_text(DEFAULTS[name])))
        assert t.Hyperparameters(**{name: other_value(name)}).values() == {**DEFAULTS, name: other_value(name)}


@pytest.mark.parametrize("kind", [bool, int, float, str])
def test_a_bad_value_is_refused_with_the_variable_the_value_and_what_is_allowed(
    kind: type, environment: Callable
) -> None:
    knobs = {name: knob for name, knob in KNOBS.items() if knob.kind is kind}
    assert knobs
    for name, knob in knobs.items():
        allowed = ["0 or 1"] if kind is bool else [str(part) for part in knob.allowed or ()]
        for bad in [*bad_texts(knob), *bad_values(knob)]:
            with pytest.raises(t.UserError) as raised:
                if isinstance(bad, str):
                    environment((name.upper(), bad))
                    t.Hyperparameters()
                else:
                    environment()
                    t.Hyperparameters(**{name: bad})
                pytest.fail(f"{name}={bad!r} was accepted")
            message = str(raised.value)
            assert message.startswith(f"{name.upper()}={bad} is not allowed"), message
            for part in (*allowed, kind.__name__ if not allowed else "", f"default {knob.default}"):
                assert part in message, (part, message)
            assert message.endswith(knob.meaning)
            assert raised.value.__suppress_context__, "a user is shown one line, not the parser's own error"


def test_the_ends_of_a_range_and_every_choice_are_allowed() -> None:
    for name, knob in KNOBS.items():
        for value in knob.allowed or ():
            parsed = knob.parse(name, str(value))
            assert parsed == value and type(parsed) is knob.kind, (name, value, parsed)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train_batch_tokens", "786_432", 786432),
        ("seed", "+7", 7),
        ("matrix_lr", ".02", 0.02),
        ("matrix_lr", "2e-2", 0.02),
        ("matrix_lr", "1.", 1.0),
        ("matrix_lr", "1", 1.0),
        ("adam_eps", "1E-10", 1e-10),
        ("matrix_lr", 1, 1.0),  # a whole number for a real one, in Python too
        ("ema_enabled", "0", False),
        ("ema_enabled", "1", True),
    ],
)
def test_the_usual_ways_to_write_a_number_are_understood(name: str, text: Any, value: Any) -> None:
    parsed = KNOBS[name].parse(name, text)
    assert parsed == value and type(parsed) is type(value)


def test_the_defaults_are_the_documented_configuration(environment: Callable) -> None:
    environment()
    assert t.Hyperparameters().values() == DEFAULTS
    documented = {
        "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0, "vocab_size": 1024,
        "xsa_last_n": 11, "leaky_slope": 0.75, "bigram_vocab_size": 2048, "rope_dims": 16,
        "qk_gain_init": 1.5, "logit_softcap": 30.0, "ln_scale": True, "ve_enabled": True, "value_residual": False,
        "matrix_lr": 0.027, "scalar_lr": 0.025, "tied_embed_lr": 0.035, "muon_momentum": 0.99,
        "muon_momentum_warmup_start": 0.92, "muon_wd": 0.04, "adam_wd": 0.04, "grad_clip_norm": 0.3,
        "train_batch_tokens": 786_432, "train_seq_len": 2048, "max_wallclock_seconds": 600.0,
        "iterations": 20_000, "warmdown_frac": 0.5,
        "ema_enabled": True, "ema_decay": 0.997, "swa_enabled": False, "mlp_bits": 6, "attn_bits": 6,
        "embed_bits": 8, "quant_floor": "auto", "compressor": "zstd", "size_limit": 16_000_000, "eval_stride": 64,
        "ttt_enabled": True, "ttt_mode": "score_first", "ttt_optimizer": "sgd", "ttt_lr": 0.03, "ttt_momentum": 0.9,
        "ttt_epochs": 3, "ttt_chunk_tokens": 32_768, "ttt_cosine": True, "max_val_tokens": 0,
    }  # fmt: skip
    types = {name: type(value) for name, value in documented.items()}
    assert {name: DEFAULTS[name] for name in documented} == documented
    assert {name: type(DEFAULTS[name]) for name in documented} == types  # 3 is equal to 3.0, and read differently


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        # The two slips in the printed command of PR 1092: a momentum of 92, and a variable that nothing read.
        ("MUON_MOMENTUM_WARMUP_START", "092", ["MUON_MOMENTUM_WARMUP_START=092", "0.9999", "default 0.92"]),
        ("WARMDRON_ITERS", "3500", ["WARMDRON_ITERS", "did you mean WARMDOWN_ITERS?"]),
        # A first word that only this script uses, and spellings near to those with a common first word.
        ("TTT_EPOCH", "3", ["TTT_EPOCH ", "did you mean TTT_EPOCHS?"]),
        ("EMA_DECAI", "0.9", ["did you mean EMA_DECAY?"]),
        ("MODEL_DIMS", "64", ["did you mean MODEL_DIM?"]),
        ("DATAPATH", "x", ["did you mean DATA_PATH?"]),
        ("TTT_LEARNING_RATE", "1", ["TTT_LEARNING_RATE is not a setting"]),
        ("SEEDS", "1", ["did you mean SEED?"]),
        ("NUM_LAYER", "3", ["did you mean NUM_LAYERS?"]),
        ("MAX_WALLCLOCK_SECOND", "3", ["did you mean MAX_WALLCLOCK_SECONDS?"]),
    ],
)
def test_a_variable_without_effect_is_an_error_that_names_it(
    variable: str, value: str, parts: list[str], environment: Callable
) -> None:
    environment((variable, value))
    with pytest.raises(t.UserError) as raised:
        t.Hyperparameters()
    for part in parts:
        assert part in str(raised.value), (part, str(raised.value))


def test_a_variable_that_is_retired_or_was_never_read_is_refused_by_name(environment: Callable) -> None:
    """Of those that published scripts set: some they did not read themselves, some have no effect in this one."""
    retired = """
        LAWA_ENABLED LAWA_K MTP_NUM_HEADS GPTQ_SAMPLES DTG_ENABLED GRAD_QUANT QAT_ENABLED QAT_THRESHOLD WEIGHT_DECAY
        LATE_QAT LATE_QAT_THRESHOLD TRIGRAM_DIM EMBED_LR HEAD_LR KEEP_FLOAT_MAX_NUMEL
    """
    refusals = dict.fromkeys(retired.split(), "no effect")
    refusals |= dict.fromkeys("MUON_BETA2 VAL_BATCH_SIZE TTT_TEMP GRAD_ACCUM".split(), "not a setting")
    for variable, reason in refusals.items():
        environment((variable, "1"))
        with pytest.raises(t.UserError) as raised:
            t.Hyperparameters()
            pytest.fail(f"{variable} was accepted")
        message = str(raised.value)
        assert message.startswith(f"{variable} ") and reason in message and "unset" in message, message


def test_a_refusal_without_a_suggestion_is_still_a_sentence(environment: Callable) -> None:
    environment(TTT_ZZZZZZZZZZZZZZZZZZZZZZ="1")
    with pytest.raises(t.UserError, match=r"is not a setting of this script[.:;,] ?[Uu]nset or rename it"):
        t.Hyperparameters()


def test_a_letter_left_out_or_doubled_is_an_error_with_the_right_name(environment: Callable) -> None:
    names = [name.upper() for name in KNOBS]
    for right in names:
        for at in {0, len(right) // 2, len(right) - 1} if len(right) > 3 else ():  # less is not near to anything
            for wrong in {right[:at] + right[at + 1 :], right[:at] + right[at] + right[at:]} - {*names, *t.COMMON}:
                environment((wrong, "1"))
                with pytest.raises(t.UserError) as raised:
                    t.Hyperparameters()
                    pytest.fail(f"{wrong} was accepted")
                suggested = re.search(r"did you mean (\w+)\?", str(raised.value))
                assert str(raised.value).startswith(f"{wrong} ") and suggested, (wrong, str(raised.value))
                # BETA is as near to BETA1 as to BETA2: there either will do.
                nearness = [difflib.SequenceMatcher(None, name, wrong).ratio() for name in (suggested[1], right)]
                assert suggested[1] == right or nearness[0] >= nearness[1], (wrong, suggested[1])


FOREIGN = """
    PATH HOME USER SHELL LANG LC_ALL TERM PWD OLDPWD SHLVL TMPDIR TZ EDITOR DISPLAY HOSTNAME LD_LIBRARY_PATH MAKEFLAGS
    VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PYTHONPATH PYTHONUNBUFFERED PIP_CACHE_DIR UV_CACHE_DIR XDG_RUNTIME_DIR
    RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE
    MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS
    TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE TORCH_NCCL_ASYNC_ERROR_HANDLING TORCHINDUCTOR_CACHE_DIR
    CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_LAUNCH_BLOCKING CUDA_DEVICE_ORDER NVIDIA_VISIBLE_DEVICES NCCL_DEBUG
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK TORCH_LOGS TRITON_CACHE_DIR GLOO_SOCKET_IFNAME
    OMP_NUM_THREADS MKL_NUM_THREADS NUM_THREADS NUMEXPR_MAX_THREADS NUM_NODES NUM_GPUS NUMBER_OF_PROCESSORS
    MAX_JOBS MAX_WORKERS DATA_DIR DATA_ROOT MODEL_NAME MODEL_DIR MODEL_ID MODEL_PATH DEVICE_ID RUN_NAME SEED_FILE SIZE
    PROJ_DATA PROJ_LIB EXPORT_DIR COMPILE_FLAGS MICRO_VERSION TOKENIZERS_PARALLELISM HF_HOME HF_TOKEN WANDB_MODE
    WANDB_RUN_ID SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS CI GITHUB_RUN_ID PYTEST_CURRENT_TEST SSH_CONNECTION _
""".split()


def test_a_variable_of_another_program_is_accepted_and_changes_nothing(environment: Callable) -> None:
    for variable in FOREIGN:
        environment((variable, "7"))
        h = t.Hyperparameters()  # a refusal names the variable
        assert h.values() == DEFAULTS and h.given == {}, variable


@pytest.mark.parametrize(("name", "near"), [("modle_dim", "model_dim"), ("zzzz", "")])
def test_an_override_that_is_no_setting_is_refused_with_the_nearest_name(
    name: str, near: str, environment: Callable
) -> None:
    environment()
    with pytest.raises(t.UserError) as raised:
        t.Hyperparameters(**{name: 64})
    assert str(raised.value) == f"{name} is not a setting" + (f" (did you mean {near}?)" if near else "")


CROSS_CHECKS: list[tuple[dict[str, Any], str]] = [
    ({"tie_embeddings": False}, r"TIE_EMBEDDINGS=0"),
    ({"model_dim": 510}, r"MODEL_DIM=510 .*multiple of NUM_HEADS=8"),
    ({"num_kv_heads": 3}, r"NUM_HEADS=8 .*multiple of NUM_KV_HEADS=3"),
    ({"num_kv_heads": 16}, r"NUM_HEADS=8 .*multiple of NUM_KV_HEADS=16"),
    ({"model_dim": 24, "rope_dims": 2}, r"MODEL_DIM=24 / NUM_HEADS=8 is odd"),
    ({"rope_dims": 15}, r"ROPE_DIMS=15 is odd or larger than the head width 64"),
    ({"rope_dims": 66}, r"ROPE_DIMS=66 is odd or larger than the head width 64"),
    ({"model_dim": 2048, "rope_dims": 256, "eval_seq_len": 2**20}, r"1048576 positions are too many"),
    ({"bigram_vocab_size": 1}, r"BIGRAM_VOCAB_SIZE=1 leaves no row.* 0 or at least 2"),
    ({"trigram_shared": True, "bigram_vocab_size": 0}, r"TRIGRAM_SHARED=1 needs BIGRAM_VOCAB_SIZE above 0"),
    ({"ve_layers": "9,11"}, r"VE_LAYERS=9,11: blocks are 0 to 10"),
    ({"ve_layers": "-12"}, r"VE_LAYERS=-12: blocks are 0 to 10"),
    ({"num_layers": 10, "ve_layers": "9,10"}, r"VE_LAYERS=9,10: blocks are 0 to 9"),
    ({"ve_layers": ""}, r"VE_LAYERS= .*malformed.*9,10"),
    ({"recur_layers": "4;5"}, r"RECUR_LAYERS=4;5 .*malformed.*9,10"),
    ({"recur_layers": "5,4"}, r"RECUR_LAYERS=5,4: give neighbours in their order"),
    ({"recur_layers": "3,5"}, r"RECUR_LAYERS=3,5: give neighbours in their order"),
    ({"recur_layers": "10,11"}, r"RECUR_LAYERS=10,11: .*blocks 0 to 10"),
    ({"recur_layers": "-12"}, r"RECUR_LAYERS=-12: .*blocks 0 to 10"),
    ({"gated_attention": True, "attn_gate_dims": 12}, r"GATED_ATTENTION=1 and ATTN_GATE_DIMS .*use one"),
    ({"attn_gate_dims": 600}, r"ATTN_GATE_DIMS=600 is more than MODEL_DIM=512"),
    ({"ve_layers": "last"}, r"VE_LAYERS=last .*malformed.*9,10"),
    ({"eval_attn_window": 2049}, r"EVAL_ATTN_WINDOW=2049 is larger than the window of 2048.*EVAL_SEQ_LEN"),
    ({"ttt_epochs": "auto", "ttt_mode": "pre"}, r"TTT_EPOCHS=auto is for TTT_MODE=score_first"),
    ({"eval_stride": 2049}, r"EVAL_STRIDE=2049 is larger than the window of 2048"),
    ({"eval_stride": 64, "eval_seq_len": 32}, r"EVAL_STRIDE=64 is larger than the window of 32"),
    ({"train_batch_tokens": 786_433}, r"TRAIN_BATCH_TOKENS=786433 is not a multiple of TRAIN_SEQ_LEN=2048"),
    ({"train_batch_tokens": 1024}, r"TRAIN_BATCH_TOKENS=1024 is not a multiple of TRAIN_SEQ_LEN=2048"),
    ({"ttt_freeze_blocks": 12}, r"TTT_FREEZE_BLOCKS=12 is more than the 11 blocks"),
    ({"quant_floor": "-0.1"}, r"QUANT_FLOOR=-0\.1 .*auto, or of type float, from 0.0 to 1000"),
    ({"quant_floor": "1001"}, r"QUANT_FLOOR=1001(\.0)? .*1000"),
    ({"quant_floor": "nan"}, r"QUANT_FLOOR=nan"),
    ({"quant_floor": "none"}, r"QUANT_FLOOR=none .*auto"),
    ({"ttt_lr_groups": "mlp.proj"}, r"TTT_LR_GROUPS=mlp\.proj.*malformed.*mlp\.proj:3"),
    ({"ttt_lr_groups": "mlp.proj:3:4"}, r"TTT_LR_GROUPS=mlp\.proj:3:4.*malformed"),
    ({"ttt_lr_groups": "mlp.proj:fast"}, r"TTT_LR_GROUPS=(mlp\.proj:)?fast"),
    ({"ttt_lr_groups": "mlp.proj:-1"}, r"TTT_LR_GROUPS=(mlp\.proj:)?-1.*1000"),
    ({"ttt_lr_groups": "mlp.proj:nan"}, r"TTT_LR_GROUPS=(mlp\.proj:)?nan.*1000"),
    ({"mlp_bits": 9}, r"MLP_BITS.* 2 to 8, or 16"),
    ({"attn_bits": 15, "proj_bits": 12}, r"ATTN_BITS, PROJ_BITS.* 2 to 8, or 16"),
    ({"eval_only": "a", "export_only": "b"}, r"EVAL_ONLY and EXPORT_ONLY are both set"),
    *(
        ({"run_id": run_id}, f"RUN_ID={re.escape(run_id)}: use letters, digits")
        for run_id in ("a/b", "../up", "a b", "/tmp", ".", "..")
    ),
]


@pytest.mark.parametrize(("settings", "message"), CROSS_CHECKS)
def test_settings_that_do_not_fit_together_are_refused_by_name(
    settings: dict[str, Any], message: str, environment: Callable
) -> None:
    environment()
    with pytest.raises(t.UserError, match=message):
        t.Hyperparameters(**settings)
    environment(*upper(settings))
    with pytest.raises(t.UserError, match=message):
        t.Hyperparameters()


@pytest.mark.parametrize(
    ("settings", "derived"),
    [
        ({}, {"head_dim": 64, "window": 2048, "stride": 64, "ve_blocks": [9, 10], "quant_floor": "auto"}),
        ({"num_layers": 3, "ve_layers": "-1,0,2"}, {"ve_blocks": [0, 2]}),
        ({"ve_enabled": False, "ve_layers": "99"}, {"ve_blocks": []}),
        ({"eval_stride": 0}, {"stride": 2048}),
        ({"eval_stride": 2048}, {"stride": 2048}),
        ({"eval_seq_len": 1024, "eval_stride": 0}, {"window": 1024, "stride": 1024}),
        ({"rope_dims": 64}, {"rope_dims": 64}),
        ({"rope_dims": 0, "num_heads": 4}, {"head_dim": 128}),
        ({"num_kv_heads": 8}, {"num_kv_heads": 8}),
        ({"bigram_vocab_size": 2}, {"bigram_vocab_size": 2}),
        ({"ttt_freeze_blocks": 11}, {"ttt_freeze_blocks": 11}),
        ({"quant_floor": "0"}, {"quant_floor": 0.0}),
        ({"quant_floor": "1000"}, {"quant_floor": 1000.0}),
        ({"ttt_lr_groups": "mlp.proj:3,mlp.fc:.5"}, {"ttt_multipliers": {"mlp.proj": 3.0, "mlp.fc": 0.5}}),
        ({"fp16_keep_name_patterns": "tok_emb,,attn.c_k"}, {"fp16_patterns": ["tok_emb", "attn.c_k"]}),
        ({"mlp_bits": 2, "attn_bits": 8, "embed_bits": 16}, {"mlp_bits": 2, "attn_bits": 8, "embed_bits": 16}),
        ({"run_id": "a-B.3_c"}, {"run_id": "a-B.3_c"}),
    ],
)
def test_the_edges_of_what_fits_are_accepted_and_derived_rightly(
    settings: dict[str, Any], derived: dict[str, Any], environment: Callable
) -> None:
    environment()
    h = t.Hyperparameters(**settings)
    assert {name: getattr(h, name) for name in derived} == derived


@pytest.mark.parametrize("settings", [{"quant_floor": "092"}, {"ttt_lr_groups": "mlp.proj:05"}])
def test_numbers_inside_texts_are_read_as_strictly_as_the_others(settings: dict, environment: Callable) -> None:
    """092 was meant as 0.92 in a published command: nowhere may it be 92."""
    environment()
    with pytest.raises(t.UserError, match="|".join(settings).upper()):
        t.Hyperparameters(**settings)


def test_two_instances_do_not_share_their_values(environment: Callable) -> None:
    environment()
    first, second = t.Hyperparameters(model_dim=128), t.Hyperparameters(seed=1)
    assert (first.model_dim, first.seed, second.model_dim, second.seed) == (128, 1337, 512, 1)


def test_the_header_carries_what_the_function_of_the_weights_depends_on(environment: Callable) -> None:
    environment()
    # Shapes, switches and constants of the model. That nothing else gets into it is shown in test_knobs: there every
    # setting of training and storage is turned, and the file stays as it is.
    assert set(t.Hyperparameters().values(t.ModelKnob)) >= {
        "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "leaky_slope",
        "tie_embeddings", "logit_softcap", "train_seq_len", "rope_base", "rope_dims", "rope_train_len", "xsa_last_n",
        "ln_scale", "bigram_vocab_size", "bigram_dim", "trigram_shared",
        "ve_enabled", "ve_dim", "ve_layers", "value_residual", "gated_attention",
    }  # fmt: skip


SOLITARY = """
    import importlib.util, os, random, sys, threading

    class Block:
        def find_spec(self, name, *rest):
            if name.split(".")[0] in ("sentencepiece", "zstandard", "flash_attn", "flash_attn_interface"):
                raise ImportError(f"{name} is not here")

    import numpy, torch, torch.distributed
    sys.meta_path.insert(0, Block())
    attempts = []
    sys.addaudithook(lambda event, _: attempts.append(event) if event.startswith(("socket.", "subprocess.")) else None)
    torch.cuda._lazy_init = lambda: attempts.append("cuda")

    def state():
        return (
            dict(os.environ), os.listdir(), os.getcwd(), list(sys.argv), list(sys.path), threading.active_count(),
            torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
            torch.distributed.is_initialized(), torch.are_deterministic_algorithms_enabled(),
        )

    before = state()
    spec = importlib.util.spec_from_file_location("reviewed", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert state() == before, "importing changed something"
    assert "reviewed" not in sys.modules and not attempts, attempts

    try:
        module.Hyperparameters()
    except module.UserError as error:
        assert "WARMDRON_ITERS" in str(error)  # only now is the environment read
    else:
        raise AssertionError("a misspelt variable was accepted")
    del os.environ["WARMDRON_ITERS"]
    small = dict(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, vocab_size=32, train_seq_len=8)
    model = module.GPT(**small, train_batch_tokens=8, eval_stride=4, bigram_vocab_size=8)
    ids = torch.arange(8).unsqueeze(0)
    loss, logits = model(ids, ids.roll(-1)), model.forward_logits(ids)
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1).flatten())
    torch.testing.assert_close(loss, reference)
    assert not torch.cuda.is_initialized() and not attempts, attempts
    print("alone")
"""


def test_the_file_loads_unregistered_without_gpu_tokenizer_network_or_side_effect(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name.lower() not in KNOBS}
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(SOLITARY), str(ROOT / "train_gpt.py")],
        env={**environment, "WARMDRON_ITERS": "3500", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
