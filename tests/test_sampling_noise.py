"Samples of many rows are independent: their seeds differ, and so do the numbers that are drawn from them"
import numpy as np
import pytest

from post_training.core.shards import seed_of
from post_training.models.generate import row_noise

ROWS, SAMPLES = 100_000, 10


@pytest.fixture(scope="module")
def noise():
    "The first three uniform numbers of a million samples, [ROWS, SAMPLES, 3], and their seeds"
    seeds = [seed_of(42, f"row{i}", j) for i in range(ROWS) for j in range(SAMPLES)]
    return np.array(seeds), row_noise(seeds, 3).double().numpy().reshape(ROWS, SAMPLES, 3)


@pytest.mark.slow
def test_a_million_samples_draw_different_numbers(noise):
    seeds, u = noise
    assert len(np.unique(seeds)) == ROWS * SAMPLES
    assert len(np.unique(seeds & (2**32 - 1))) < ROWS * SAMPLES - 50  # the lower 32 bits alone repeat
    assert len(np.unique(u.reshape(-1, 3), axis=0)) == ROWS * SAMPLES


@pytest.mark.slow
def test_samples_are_uniform_and_uncorrelated(noise):
    _, u = noise
    counts = np.histogram(u, 1000, (0, 1))[0]
    expected = u.size / 1000
    chi2 = ((counts - expected)**2 / expected).sum()
    assert abs(chi2 - 999) < 6 * np.sqrt(2 * 999), chi2
    flat = u - u.mean()
    pairs = dict(samples=(flat[:, :-1, 0], flat[:, 1:, 0]), rows=(flat[:-1, :, 0], flat[1:, :, 0]), tokens=(flat[..., 0], flat[..., 1]), first_last=(flat[:, 0, 0], flat[:, -1, 0]))
    for name, (a, b) in pairs.items():
        r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(r) * np.sqrt(a.size) < 5, (name, r)
