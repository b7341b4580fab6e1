"""Statistics over seeds: published figures, independent references, the units, and every error."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("scipy", reason="records/significance.py needs scipy: pip install -r records/requirements.txt")
sys.path.insert(0, str(ROOT / "records"))
import significance as s  # noqa: E402
from scipy import stats  # noqa: E402

# Scores by seed, from submission.json in records/track_10min_16mb/ of github.com/openai/parameter-golf.
PR1019 = {  # 2026-03-25_ValCalib_GPTQ_XSA_BigramHash3072
    "314": {"val_loss": 1.88276292, "val_bpb": 1.11508120},
    "42": {"val_loss": 1.88156874, "val_bpb": 1.11437394},
    "999": {"val_loss": 1.88220393, "val_bpb": 1.11475014},
}
PR1736 = {  # 2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT
    "42": {"val_loss": 2.33302, "val_bpb": 1.06610},
    "0": {"val_loss": 2.33002, "val_bpb": 1.06473},
    "1234": {"val_loss": 2.33199, "val_bpb": 1.06563},
}
PR1514 = {  # 2026-04-09_A2_Muon097_3Seed
    "0": {"val_bpb": 1.07928348, "val_loss": 2.78790132},
    "42": {"val_bpb": 1.07996676, "val_loss": 2.78966630},
    "1234": {"val_bpb": 1.08024795, "val_loss": 2.79039264},
}
BPB1019, BPB1514, BPB1736 = ([entry["val_bpb"] for entry in pr.values()] for pr in (PR1019, PR1514, PR1736))
BPB549 = [1.11922988, 1.12002032, 1.11888882]  # of its logs, as the README of 1019 has them
BPB1019_FIRST = [1.11409447, 1.11421185, 1.11429444]  # an earlier state of 1019, calibrated on validation tokens
BPB1493 = [1.08079, 1.08103, 1.08118]  # 2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT
BPB1769 = [1.06356801, 1.0641313, 1.06466993, 1.06509678, 1.06516558]  # 2026-04-22_…_MLPClip12: the 5 it reports
LEFT_OUT = [1.06540571, 1.06534272]  # and the two seeds, 7 and 9999, that it names and does not count
BPB1855 = [1.05989454, 1.06124613, 1.06208695]  # 2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611
BPB1868 = [1.06083288, 1.06090748, 1.06248776]  # 2026-04-29_SmearGateBOSFix_3Seed_1.06141, the compliant rerun
BPB2135 = [1.05679341, 1.05610947, 1.05662016]  # README of pull request 2135, as are those of 2130
BPB2130 = [1.05689587, 1.05654656, 1.05664400]


def write(folder: Path, document: Any) -> Path:
    """Returns the folder, in which submission.json now holds the document (text as it is)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "submission.json").write_text(text)
    return folder


def scores(bpb: list[float], rate: float | None = 0.5) -> list[s.Score]:
    """Returns scores of the seeds 0, 1, … with losses at this many bits per byte per nat."""
    return [s.Score(seed, value, None if rate is None else value / rate) for seed, value in enumerate(bpb)]


# --------------------------------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("candidate", "baseline", "t", "df", "p"),  # each as published; None where it was not
    [
        (BPB1019, BPB549, "-11.8339", "3.3063", None),  # t_statistic and welch_df of its submission.json
        (BPB1019_FIRST, BPB549, "-15.23", "2.12", None),
        (BPB1514, BPB1493, None, None, "0.020"),
        (BPB1769, BPB1736, None, None, "0.063"),
        (BPB2135, BPB2130, "-0.82", "2.96", None),  # its p of 0.238 is 0.2375 here
    ],
)
def test_published_welch_tests_are_reproduced_to_their_last_digit(candidate, baseline, t, df, p):
    test = s.welch(candidate, baseline)
    for published, value in ((t, test.t), (df, test.df), (p, test.p)):
        if published is not None:
            assert f"{value:.{len(published.split('.')[1])}f}" == published


def test_a_two_sided_p_as_published_is_twice_ours():
    assert 2 * s.welch(BPB1019_FIRST, BPB549).p == pytest.approx(0.00335, abs=5e-6)


def test_recomputed_values_of_the_rules_document_come_out_again():
    """1855 against 1868 .355, 1769 against 1736 .0625, 1514 against 1493 .0204, from the submitted seeds alone."""
    found = [s.welch(*pair).p for pair in ((BPB1855, BPB1868), (BPB1769, BPB1736), (BPB1514, BPB1493))]
    assert [f"{found[0]:.3f}", f"{found[1]:.4f}", f"{found[2]:.4f}"] == ["0.355", "0.0625", "0.0204"]


def test_pull_request_1019_beats_549_by_more_than_the_margin(tmp_path):
    result = s.compare(s.read_scores(write(tmp_path, {"seed_results": PR1019})), scores(BPB549, None))
    plain, shifted = result["tests"]
    assert plain["t"] == pytest.approx(-11.8339, abs=5e-5) and plain["passes"]
    assert (f"{shifted['t']:.2f}", f"{shifted['p']:.4f}", shifted["passes"]) == ("-4.29", "0.0095", True)
    assert f"{shifted['margin_bpb']:.5f}" == "0.00296"  # of its 1,024 tokens
    assert result["difference"]["bits_per_byte"] == pytest.approx(-0.00464458, abs=1e-8)  # its delta_vs_pr549_bpb
    side = result["candidate"]
    assert f"{side['mean']['bits_per_byte']:.8f} {side['mean']['nats_per_token']:.8f}" == "1.11473509 1.88217853"
    assert f"{side['std']['bits_per_byte']:.8f} {side['std']['nats_per_token']:.8f}" == "0.00035387 0.00059750"


def test_the_margin_is_smaller_in_bits_per_byte_the_longer_the_tokens(tmp_path):
    """0.005 nats per token are 0.00194 bits per byte of the 8,192 tokens, 0.00228 with case operations."""
    for pr, expected in ((PR1514, "0.00194"), (PR1736, "0.00228")):
        candidate = s.read_scores(write(tmp_path, {"seed_results": pr}))
        assert f"{s.compare(candidate, scores(BPB549))['tests'][1]['margin_bpb']:.5f}" == expected


def test_seeds_that_are_left_out_flatter_a_result():
    """1769 reported the five best of seven seeds; of all it notes mean 1.06477, standard deviation 0.00069."""
    everything = s.summarize(BPB1769 + LEFT_OUT)
    assert (f"{everything.mean:.5f}", f"{everything.std:.5f}", everything.n) == ("1.06477", "0.00069", 7)
    assert s.welch(BPB1769, BPB1736).p < 0.07 < 0.1 < s.welch(BPB1769 + LEFT_OUT, BPB1736).p


def test_the_standard_deviation_is_the_samples_and_not_the_populations():
    """1855 published 0.00090, which divides by n."""
    summary = s.summarize(BPB1855)
    assert f"{summary.std:.5f}" == "0.00111" and f"{statistics.pstdev(BPB1855):.5f}" == "0.00090"
    assert summary.mean == pytest.approx(1.06107587, abs=5e-9)


# ------------------------------------------------------------------------------------------- independent references


def welch_by_hand(a: list[float], b: list[float], margin: float) -> tuple[float, float, float]:
    """Returns t, df and one-sided p by Welch's formulas, p by Simpson's rule over the density of t."""
    var_a, var_b = (sum((x - sum(v) / len(v)) ** 2 for x in v) / (len(v) - 1) / len(v) for v in (a, b))
    t = (sum(a) / len(a) + margin - sum(b) / len(b)) / math.sqrt(var_a + var_b)
    df = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    count, h = 20_000, t / 20_000
    density = [math.exp(log_norm - (df + 1) / 2 * math.log1p((i * h) ** 2 / df)) for i in range(count + 1)]
    area = h / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
    return t, df, 0.5 + area


def test_welch_equals_the_formulas_done_by_hand():
    rng = random.Random(0)
    for n_a, n_b, spread, margin in ((3, 3, 1.0, 0.0), (3, 5, 4.0, 0.5), (7, 2, 0.3, 0.1), (10, 10, 1.0, 2.0)):
        a, b = [rng.gauss(0, 1) for _ in range(n_a)], [rng.gauss(1, spread) for _ in range(n_b)]
        assert s.welch(a, b, margin)[:3] == pytest.approx(welch_by_hand(a, b, margin), rel=1e-9, abs=1e-11)


def test_welch_agrees_with_a_permutation_test():
    """All 12,870 ways to part 16 scores in two: the share whose difference is as low is p without a distribution.

    On 40 other draws of this size the two p were at most 0.0071 apart."""
    rng = random.Random(1)
    a, b = [rng.gauss(0, 1) for _ in range(8)], [rng.gauss(0.9, 1) for _ in range(8)]
    everything, observed = a + b, statistics.mean(a) - statistics.mean(b)
    total = sum(everything)
    sums = [sum(chosen) for chosen in itertools.combinations(everything, 8)]
    p = sum(part / 8 - (total - part) / 8 <= observed + 1e-12 for part in sums) / len(sums)
    assert 0.01 < p < 0.2 and s.welch(a, b).p == pytest.approx(p, abs=0.01)


@pytest.mark.slow
def test_a_candidate_exactly_at_the_margin_passes_no_more_often_than_alpha():
    """4,000 comparisons of 5 with 5 seeds, the true difference being the margin. Welch's test holds alpha only nearly:
    0.046 of 400,000 such comparisons gave p < 0.05. Four standard errors of the count are the tolerance around that.
    Without the shift nearly all would pass."""
    rng, alpha, count, margin = random.Random(2), 0.05, 4_000, 3.0
    passed = unshifted = 0
    for _ in range(count):
        a, b = [rng.gauss(-margin, 1) for _ in range(5)], [rng.gauss(0, 1) for _ in range(5)]
        passed += s.welch(a, b, margin).p < alpha
        unshifted += s.welch(a, b).p < alpha
    assert abs(passed / count - 0.046) < 4 * math.sqrt(alpha * (1 - alpha) / count)
    assert unshifted / count > 0.95


# ------------------------------------------------------------------------------------------------------- seeds needed


def test_the_seeds_for_the_expected_t_are_the_first_that_pass():
    """n scores a side that have exactly the mean and the standard deviation asked for: n pass, n - 1 do not."""
    for delta, margin, std in ((2.0, 0.0, 1.0), (1.5, 0.5, 1.0), (0.0046, 0.00296, 0.0005)):
        n = s.seeds_needed(delta, margin, std)

        def p(count: int, delta: float = delta, margin: float = margin, std: float = std) -> float:
            raw = list(range(count))
            unit = [(x - statistics.mean(raw)) / statistics.stdev(raw) * std for x in raw]
            return s.welch([x - delta for x in unit], unit, margin).p

        assert n > 2 and p(n) < 0.01 <= p(n - 1)


@pytest.mark.parametrize(("n", "effect"), [(2, 9.676), (3, 3.5), (7, 2.0), (22, 1.0)])
def test_the_power_is_that_of_simulated_comparisons(n, effect):
    """20,000 comparisons: four standard errors are at most 0.0142. At n = 2 the degrees of freedom of a pooled t test
    would promise 0.86; Welch's test has 0.42."""
    rng, count = np.random.default_rng(3), 20_000
    a, b = rng.normal(-effect - 0.5, 1, (count, n)), rng.normal(0, 1, (count, n))
    p = s.stats.ttest_ind(a + 0.5, b, axis=1, equal_var=False, alternative="less").pvalue
    power = s.welch_power(n, effect, alpha=0.01)
    assert 0.3 < power < 0.95 and float((p < 0.01).mean()) == pytest.approx(power, abs=0.0142)


def test_the_seeds_for_a_power_are_the_first_that_have_it():
    for effect in (0.5, 1.0, 1.5, 3.0, 9.676):
        n = s.seeds_needed(effect + 0.5, 0.5, 1.0, alpha=0.01, power=0.8)
        assert s.welch_power(n, effect) >= 0.8 > s.welch_power(n - 1, effect)
        assert n > s.seeds_needed(effect + 0.5, 0.5, 1.0, alpha=0.01)


def test_no_number_of_seeds_shows_what_is_not_there():
    assert s.seeds_needed(0.005, 0.005, 0.001) is None and s.seeds_needed(0.004, 0.005, 0.001, power=0.8) is None
    assert s.seeds_needed(1e-9, 0.0, 1.0) is None  # true, and beyond 1,000 seeds
    assert s.seeds_needed(1.0, 0.0, 1e-3) == s.seeds_needed(1.0, 0.0, 1e-3, power=0.8) == 2


@pytest.mark.parametrize(
    "arguments",
    [(1, 0, 0), (1, 0, -1), (1, 0, math.nan), (math.nan, 0, 1), (1, 0, 1, 0), (1, 0, 1, 1), (1, 0, 1, 0.1, 1)],
)
def test_seeds_needed_refuses_what_it_cannot_answer(arguments):
    with pytest.raises(ValueError):
        s.seeds_needed(*arguments)


# -------------------------------------------------------------------------------------------------- where no test is


def test_one_seed_has_a_mean_and_no_spread():
    summary = s.summarize([1.5])
    assert summary.mean == 1.5 and math.isnan(summary.std) and summary.n == 1
    assert s.describe(scores([1.5]))["std"] == dict.fromkeys(s.UNITS)


@pytest.mark.parametrize(
    ("candidate", "baseline", "reason"),
    [
        ([1.0], [1.1, 1.2], "candidate has one seed"),
        ([1.0, 1.01], [1.1], "baseline has one seed"),
        ([1.0, 1.0, 1.0], [1.1, 1.2], "candidate are all equal"),
        ([1.0, 1.01], [1.1, 1.1], "baseline are all equal"),
    ],
)
def test_a_side_without_a_spread_gets_a_reason_instead_of_a_p(candidate, baseline, reason):
    test = s.welch(candidate, baseline)
    assert test[:3] == (None, None, None) and reason in test.reason
    tested = s.compare(scores(candidate), scores(baseline))["tests"]
    assert [entry["passes"] for entry in tested] == [None, None] and reason in tested[1]["reason"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.0", None, True, 10**400])
def test_a_score_that_is_no_finite_number_is_an_error_and_not_left_out(bad):
    for call in (lambda: s.summarize([1.0, bad]), lambda: s.welch([1.0, bad, 1.1], [1.2, 1.3])):
        with pytest.raises(ValueError, match="finite number"):
            call()
    with pytest.raises(ValueError, match="the margin"):
        s.welch([1.0, 1.1], [1.2, 1.3], bad)


def test_no_scores_and_a_negative_margin_are_errors():
    with pytest.raises(ValueError, match="no scores"):
        s.summarize([])
    with pytest.raises(ValueError, match="negative"):
        s.welch([1.0, 1.1], [1.2, 1.3], -0.005)


# --------------------------------------------------------------------------------------------------------------- units


def test_nats_per_byte_are_bits_per_byte_times_ln_2():
    side = s.describe(scores(BPB549))
    for figure in ("mean", "std"):
        assert side[figure]["nats_per_byte"] == pytest.approx(math.log(2) * side[figure]["bits_per_byte"], rel=1e-12)


def test_with_one_tokenizer_the_test_in_nats_per_token_is_the_test_in_bits_per_byte():
    candidate, baseline = scores([1.00, 1.01, 1.03], 0.4), scores([1.05, 1.08, 1.06], 0.4)
    result = s.compare(candidate, baseline)
    in_nats = s.welch([x.val_loss for x in candidate], [x.val_loss for x in baseline], s.MARGIN)
    assert result["same_tokens"] is True and result["tests"][1]["p"] == pytest.approx(in_nats.p, rel=1e-9)
    assert result["difference"]["nats_per_token"] == pytest.approx(result["difference"]["bits_per_byte"] / 0.4)


def test_nats_per_token_of_two_tokenizers_are_not_compared_and_the_margin_is_the_candidates():
    result = s.compare(scores([1.00, 1.01, 1.03], 0.4), scores([1.05, 1.08, 1.06], 0.6))
    assert result["same_tokens"] is False and result["difference"]["nats_per_token"] is None
    assert result["tests"][1]["margin_bpb"] == pytest.approx(0.005 * 0.4)
    assert any("not comparable: the tokens differ" in line for line in s.show(result))


def test_without_a_val_loss_there_is_no_test_with_the_margin_and_it_says_so():
    plain, shifted = s.compare(scores([1.00, 1.01, 1.03], None), scores([1.05, 1.08, 1.06]))["tests"]
    assert plain["passes"] is not None and shifted["p"] is None and "no val_loss" in shifted["reason"]


def test_seeds_needed_come_from_the_measured_difference_and_both_spreads():
    candidate, baseline = [1.00, 1.01, 1.03], [1.02, 1.06, 1.03]
    result = s.compare(scores(candidate), scores(baseline), alpha=0.05)
    std = math.sqrt((statistics.variance(candidate) + statistics.variance(baseline)) / 2)
    delta = statistics.mean(baseline) - statistics.mean(candidate)
    assert result["pooled_bpb_std"] == pytest.approx(std)
    for test, margin in zip(result["tests"], (0.0, 0.005 * 0.5)):
        needed = [s.seeds_needed(delta, margin, std, 0.05, power) for power in (None, 0.8)]
        assert list(test["seeds_needed"].values()) == needed and None not in needed


def test_a_p_of_exactly_alpha_does_not_pass():
    candidate, baseline = scores([1.00, 1.01, 1.03]), scores([1.05, 1.08, 1.06])
    p = s.welch([x.val_bpb for x in candidate], [x.val_bpb for x in baseline]).p
    assert s.compare(candidate, baseline, p)["tests"][0]["passes"] is False
    assert s.compare(candidate, baseline, p * 1.001)["tests"][0]["passes"] is True


# ------------------------------------------------------------------------------------------------------------- reading

RUN = {"run_id": "a", "seed": 1337, "val_loss": 3.49291910, "val_bpb": 1.94700302, "settings": {"seed": 1337}}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (RUN, [(1337, 1.94700302, 3.49291910)]),
        (
            {"seeds": [314, 42, 999], "seed_results": PR1019},
            [(int(k), *list(v.values())[::-1]) for k, v in PR1019.items()],
        ),
        ({"seeds": PR1514}, [(int(k), *v.values()) for k, v in PR1514.items()]),
        ({"val_bpb": 1.1, "seed_results": {"seed_7": {"val_bpb": 1.1, "val_loss": None}}}, [(7, 1.1, None)]),
        ({"seeds": [42, 0], "seed_scores": [1.09057, 1.09084]}, [(42, 1.09057, None), (0, 1.09084, None)]),
    ],
)
def test_scores_are_read_in_the_forms_of_published_submissions(tmp_path, document, expected):
    folder = write(tmp_path / "run", document)
    assert s.read_scores(folder) == s.read_scores(str(folder / "submission.json")) == expected


TWO = {"1": {"val_bpb": 1.1, "val_loss": 2.2}, "2": {"val_bpb": 1.2, "val_loss": 2.4}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"seed_results": {"1": {"val_bpb": 1.1}, "01": {"val_bpb": 1.2}}}, "seed 1 is there twice"),
        ('{"seed_results": {"1": {"val_bpb": 1.1}, "1": {"val_bpb": 1.2}}}', "'1' is there twice"),
        ({"seeds": [1, 2, 3], "seed_results": TWO}, "no seed may be left out"),
        ({"seeds": [1], "seed_results": TWO}, "no seed may be left out"),
        ({"seeds": [1, 2, 2], "seed_results": TWO}, "no seed may be left out"),
        ({"seed_results": {**TWO, "3": {"val_bpb": 1.3}}}, "seed 3 has no val_loss"),
        (
            {"seed_results": {**TWO, "3": {"val_bpb": 1.3, "val_loss": 3.9}}},
            "seeds 1 and 3 differ in val_bpb / val_loss",
        ),
        ('{"seed": 1, "val_bpb": NaN}', "NaN is no number"),
        ('{"seed": 1, "val_bpb": 1e999}', "val_bpb of seed 1 is 'inf'"),
        ('{"seed": 1, "val_bpb": ' + "9" * 400 + "}", "val_bpb of seed 1"),
        ('{"seed": 1, "val_bpb": ' + "9" * 5000 + "}", "submission.json"),
        ({"seed": 1, "val_loss": 2.0}, "val_bpb of seed 1 is 'None'"),
        ({"seed": 1, "val_bpb": "1.1"}, "val_bpb of seed 1 is '1.1'"),
        ({"seed": 1, "val_bpb": True}, "val_bpb of seed 1 is 'True'"),
        ({"seed": 1, "val_bpb": 1.1, "val_loss": [2.2]}, "val_loss of seed 1"),
        ({"seed": 1, "val_bpb": 0}, "a score is over 0"),
        ({"seed": 1, "val_bpb": 1.1, "val_loss": -2.2}, "a score is over 0"),
        ({"seed": True, "val_bpb": 1.1}, "'True' stands where a seed is needed"),
        ({"seed": 1.5, "val_bpb": 1.1}, "'1.5' stands where a seed is needed"),
        ({"seed": None, "val_bpb": 1.1}, "'None' stands where a seed is needed"),
        ({"seed_results": {"mean": {"val_bpb": 1.1}}}, "'mean' stands where a seed is needed"),
        ({"seed_results": {"1_000": {"val_bpb": 1.1}}}, "'1_000' stands where a seed is needed"),
        ({"seed_results": {"1": 1.1}}, "seed 1 has no object with a val_bpb"),
        ({"seed_results": {}, "seed": 1, "val_bpb": 1.1}, "no scores by seed"),
        ({"seed_results": [1.1, 1.2]}, "no scores by seed"),
        ({"seeds": [1, 2], "seed_scores": [1.1]}, "no scores by seed"),
        ({"val_bpb": 1.1194, "val_loss": 1.89}, "no scores by seed"),
        ([RUN], "holds a list"),
        ("null", "holds a NoneType"),
        ('{"seed": 1, "val_', "cannot be read"),
        ("[" * 200_000, "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_is_not_usable_is_refused_with_its_path_and_the_reason(tmp_path, document, message):
    folder = write(tmp_path / "run", document)
    with pytest.raises(ValueError) as caught:
        s.read_scores(folder)
    assert message in str(caught.value) and str(folder / "submission.json") in str(caught.value)


def test_bytes_that_are_no_text_a_huge_file_and_no_file_are_refused(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b'{"seed": 1, "val_bpb": "\xff"}')
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(s.MAX_BYTES + 1)
    (tmp_path / "submission.json").mkdir()
    for path, message in (
        ("bytes.json", "cannot be read"),
        ("huge.json", "more than"),
        (".", "is no file"),
        ("x", "is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            s.read_scores(tmp_path / path)


def test_runs_become_one_side_and_a_seed_that_two_of_them_share_is_refused(tmp_path):
    a, b = write(tmp_path / "a", RUN), write(tmp_path / "b", {**RUN, "seed": 42})
    assert [score.seed for score in s.pool([a, b])] == [1337, 42]
    with pytest.raises(ValueError, match="seed 1337 is there twice"):
        s.pool([a, b, write(tmp_path / "c", RUN)])
    with pytest.raises(ValueError, match="seeds 5 and 1337 differ"):
        s.pool([a, write(tmp_path / "d", {**RUN, "seed": 5, "val_loss": 3.0})])


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_both_sides_both_tests_and_the_seeds_needed(tmp_path):
    candidate = write(tmp_path / "1019", {"seed_results": PR1019})
    baseline = [write(tmp_path / str(seed), {"seed": seed, "val_bpb": value}) for seed, value in enumerate(BPB549)]
    command = [
        sys.executable,
        str(ROOT / "records" / "significance.py"),
        str(candidate),
        "--against",
        *map(str, baseline),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for text in (
        "candidate: n = 3, seeds 314, 42, 999",
        "baseline: n = 3, seeds 0, 1, 2",
        "mean 1.11473509  sample std 0.00035387",
        "mean 1.88217853  sample std 0.00059750",
        "a side has no val_loss",
        "t -11.834  df 3.306  p 0.0004034  passes at p < 0.01",
        "by more than 0.005 nats per token of its own = 0.00296129 bits per byte",
        "t -4.289  df 3.306  p 0.009549  passes at p < 0.01",
        "seeds needed: 3 by the expected t, 4 to pass 80% of the time",
        "deviation 0.00048069 bits per byte",
    ):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_json_holds_the_comparison_and_alpha_decides(tmp_path, capsys):
    candidate, baseline = write(tmp_path / "a", {"seed_results": PR1019}), write(tmp_path / "b", {"seed_results": TWO})
    assert s.main([str(candidate), "--against", str(baseline), "--json", "--alpha", "0.2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == s.compare(s.read_scores(candidate), s.read_scores(baseline), 0.2)
    assert result["alpha"] == 0.2 and [test["margin_nats_per_token"] for test in result["tests"]] == [0.0, 0.005]


def test_without_a_baseline_there_is_only_the_summary(tmp_path, capsys):
    path = str(write(tmp_path, RUN))
    assert s.main([path]) == 0
    text = capsys.readouterr().out
    assert "n = 1, seeds 1337" in text and "unknown, one seed" in text and "Welch" not in text
    assert s.main([path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["std"] == dict.fromkeys(s.UNITS)


def test_one_seed_against_three_says_why_there_is_no_test_and_what_it_would_need(tmp_path, capsys):
    single = write(tmp_path / "a", {"seed": 1, "val_bpb": 1.0, "val_loss": 2.0})
    three = write(tmp_path / "b", {"seed_results": {str(x.seed): x._asdict() for x in scores([1.05, 1.08, 1.06])}})
    assert s.main([str(single), "--against", str(three)]) == 0
    text = capsys.readouterr().out
    assert text.count("no test: the candidate has one seed") == 2 and text.count("seeds needed: ") == 2
    assert "none up to" not in text


def test_input_that_is_not_usable_ends_with_status_2_and_one_line(tmp_path, capsys):
    good = str(write(tmp_path / "a", RUN))
    for arguments in ([str(tmp_path / "none")], [good, good], [good, "--against", str(tmp_path)]):
        assert s.main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("significance.py: error: ") and err.count("\n") == 1
    for arguments in ([], [good, "--alpha", "0"], [good, "--alpha", "nan"], [good, "--against"]):
        with pytest.raises(SystemExit) as caught:
            s.main(arguments)
        assert caught.value.code == 2


# ------------------------------------------------------------------------------------------------------ paired by seed
def test_the_paired_test_is_scipys_with_its_interval():
    ours, theirs = np.random.default_rng(0).normal(1.1, 0.001, (2, 5))
    expected = stats.ttest_rel(ours, theirs)
    for alpha in (0.01, 0.2):
        test = s.paired(list(ours - theirs), alpha)
        interval = expected.confidence_interval(1 - alpha)
        assert test.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (test.low, test.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert s.paired([0.1]).p is s.paired([0.1, 0.1]).p is None


def test_paired_power_and_seeds_are_those_of_simulated_experiments():
    random = np.random.default_rng(1)
    for n, effect, alpha in ((3, 2.0, 0.05), (8, 1.0, 0.05), (12, 1.4, 0.01)):
        samples = random.normal(effect, 1, (20_000, n))
        t = samples.mean(1) / samples.std(1, ddof=1) * math.sqrt(n)
        share = float((t > stats.t.isf(alpha / 2, n - 1)).mean())
        assert s.paired_power(n, effect, alpha) == pytest.approx(share, abs=4 * 0.5 / math.sqrt(20_000))
        needed = s.paired_seeds_needed(effect, 1.0, alpha, 0.8)
        assert (
            s.paired_power(needed, effect, alpha)
            >= 0.8
            > (s.paired_power(needed - 1, effect, alpha) if needed > 2 else 0)
        )
        assert s.paired_power(n, s.smallest_difference(n, 1.0, alpha, 0.8), alpha) == pytest.approx(0.8, abs=1e-6)
    assert s.paired_seeds_needed(1e-9, 1.0) is None


def test_holms_adjustment_is_that_of_the_textbook():
    """Holm 1979, worked by hand: sorted p times what is left, never falling, at most 1."""
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([0.9, 0.8]) == [1.0, 1.0] and s.holm([]) == []


def test_common_seeds_are_compared_by_seed_and_settings_that_differ_are_told(tmp_path, capsys):
    paths = {}
    for name, rate, offset in (("a", 0.1, 0.0), ("b", 0.2, 0.01)):
        paths[name] = []
        for seed, noise in ((1, 0.0), (2, 0.05), (3, 0.11)):
            bpb = 1.1 + noise + offset * (1 + seed / 10)
            document = {
                "seed": seed,
                "val_bpb": bpb,
                "val_loss": 2 * bpb,
                "settings": {"ttt_lr": rate, "run_id": f"{seed}"},
            }
            paths[name].append(str(write(tmp_path / f"{name}{seed}", document)))
    assert s.main([*paths["a"], "--against", *paths["b"]]) == 0
    text = capsys.readouterr().out
    assert "paired by the 3 common seeds" in text and "does not pass" in text  # Welch's test sees the seeds' spread
    assert s.main([*paths["a"], "--against", *paths["b"], "--alpha", "0.001"]) == 0
    assert "99.9% interval" in capsys.readouterr().out
    assert "the candidate has TTT_LR 0.1, not 0.2" in text and "NOT one sample" not in text
    assert s.main([*paths["a"][:2], paths["b"][2]]) == 0
    assert "NOT one sample: the runs of the candidate differ in TTT_LR 0.1, 0.2" in capsys.readouterr().out


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    folder = write(tmp_path, RUN)
    path = folder / "submission.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert s.read_scores(folder)


@pytest.mark.parametrize("tool", ["check", "report", "significance", "submit"])
def test_a_tool_without_its_packages_says_what_to_install(tool: str, tmp_path: Path) -> None:
    code = "import importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *rest: None if name == 'scipy' else find(name, *rest)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    command = [sys.executable, str(ROOT / f"records/{tool}.py"), "x"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    fix = "missing packages: scipy: pip install -r records/requirements.txt\n"
    assert (done.returncode, done.stderr) == (1, f"{tool}.py: error: {fix}")
