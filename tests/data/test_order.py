import numpy as np
import pytest

from crate_kernels.data.order import epochs, shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 70_001])
def test_a_shuffle_is_a_permutation(count):
    assert np.array_equal(np.sort(shuffled(np.arange(count), count, 3)), np.arange(count))


def test_any_part_of_a_shuffle_is_that_of_the_whole():
    count = (1 << 40) + 12345
    positions = np.array([[0, 1, 2], [count - 1, count // 2, 77]])
    whole = shuffled(positions, count, 5)
    assert whole.shape == (2, 3)
    assert ((whole >= 0) & (whole < count)).all()
    assert np.array_equal(whole[1, 1:], shuffled(positions[1, 1:], count, 5))
    assert len(np.unique(whole)) == 6


def test_a_shuffle_shuffles():
    count, seeds = 1000, 400
    orders = np.stack([shuffled(np.arange(count), count, seed) for seed in range(seeds)])
    assert len(np.unique(orders, axis=0)) == seeds
    # Uniform entries have mean (count - 1) / 2 and deviation count / sqrt(12) at each position, and neighbors are not
    # correlated. Five standard errors are allowed, four for each of 1,000 positions at once would be exceeded.
    deviation = count / np.sqrt(12)
    assert np.abs(orders.mean(0) - (count - 1) / 2).max() < 5 * deviation / np.sqrt(seeds)
    centered = (orders - (count - 1) / 2) / deviation
    assert abs((centered[:, 1:] * centered[:, :-1]).mean()) < 5 / np.sqrt(seeds * count)
    assert abs((centered * (np.arange(count) - (count - 1) / 2) / deviation).mean()) < 5 / np.sqrt(seeds * count)


def test_positions_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.9"):
        shuffled(np.array([10]), 10, 0)


def test_a_run_of_samples_goes_through_epochs():
    parts = epochs(7, 8, 5)
    assert [(epoch, positions.tolist()) for epoch, positions in parts] == [(1, [2, 3, 4]), (2, [0, 1, 2, 3, 4])]
    assert epochs(0, 0, 5) == []
