"Intervals of accuracies and of differences: never of width 0, the same ones wherever they are shown"
import numpy as np
import pytest
from scipy import stats

from post_training.core.files import UserError
from post_training.evaluation.statistics import by_skill, mean_interval, paired_difference


def width(result):
    low, high = result["interval"]
    return high - low


@pytest.mark.parametrize("scores", ([1]*10, [0]*10, [1.]*200, [[1, 1, 1, 1]]*10, [.5]*10, [1], [[0, 1]]), ids=str)
def test_no_mean_is_certain(scores):
    "Scores that are all alike say little about other prompts"
    found = mean_interval(scores)
    mean = np.mean([np.mean(s) for s in scores])
    assert width(found) > 1/len(scores)/2 and found["interval_method"].startswith("Clopper-Pearson")
    assert 0 <= found["interval"][0] <= mean <= found["interval"][1] <= 1


@pytest.mark.parametrize("before, after", (([1]*20, [1]*20), ([0]*20, [1]*20), ([[1, 0]]*20, [[1, 0]]*20), ([.3]*9, [.3]*9), ([0], [1])),
                         ids=str)
def test_no_difference_is_certain(before, after):
    assert width(paired_difference(before, after)) > .1


def test_coverage_is_kept():
    "Exact, over all outcomes: at least 95 % for 20 and 60 prompts"
    for n in (20, 60):
        ends = [mean_interval([1]*x + [0]*(n - x))["interval"] for x in range(n + 1)]
        for p in np.linspace(.02, .99, 40):
            weights = stats.binom.pmf(np.arange(n + 1), n, p)
            assert sum(w for w, (low, high) in zip(weights, ends) if low - 5e-5 <= p <= high + 5e-5) >= .95


def test_samples_of_one_prompt_are_not_prompts():
    "Four equal samples of each prompt say as much as one"
    once = np.random.default_rng(0).random(60) < .9
    one, four = mean_interval(once), mean_interval(np.repeat(once[:, None], 4, 1))
    assert width(one) <= width(four) + .02 and width(four) < 1.1*width(one)
    apart = mean_interval(np.random.default_rng(0).random((60, 4)) < .5)
    assert width(apart) < .6*width(mean_interval([0, 1]*30)) # where prompts are alike, samples do count


def test_signs_are_symmetric():
    rng = np.random.default_rng(1)
    for k in (1, 3):
        a, b = rng.random((40, k)) < .8, rng.random((40, k)) < .9
        low, high = paired_difference(a, b)["interval"]
        assert paired_difference(b, a)["interval"] == pytest.approx([-high, -low], abs=2e-4)
        flipped = mean_interval(~a)["interval"]
        assert mean_interval(a)["interval"] == pytest.approx([1 - flipped[1], 1 - flipped[0]], abs=2e-4)


def test_tango_agrees_with_the_published_formula_for_one_kind_of_change():
    "Without losses the score test has a closed form: b of n gained, c = 0"
    n, b, z2 = 50, 5, 1.959964**2
    low, high = paired_difference([0]*b + [1]*(n - b), [1]*n)["interval"]
    # upper end: (b - n d)^2 = z2 n d (1 - d), the binomial score interval
    roots = np.roots([n*n + n*z2, -(2*n*b + n*z2), b*b])
    assert high == pytest.approx(max(roots), abs=1e-4) and low < b/n


def test_each_skill_has_its_interval():
    skills = by_skill([dict(skill="a")]*10 + [dict(source="b")]*3, [1.]*10 + [[1., 0.]]*2 + [None])
    assert skills["a"]["interval"] == [.6915, 1.] and skills["b"]["n"] == 2
    assert {v["interval_method"].split(",")[0] for v in skills.values()} == {"Clopper-Pearson"}


@pytest.mark.parametrize("scores", ([], [[]], [None], [float("inf")]), ids=str)
def test_what_is_no_score_is_refused(scores):
    with pytest.raises(UserError): mean_interval(scores)
