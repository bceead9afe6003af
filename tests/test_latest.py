"""What is kept of the latest patterns of observations."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_repaint import observe
from jax_repaint.latest import Latest


def observed(row, value=0.0, sigma=0.01):
    cells = np.zeros((4, 5), bool)
    cells[row] = True
    return observe.from_cells(cells, np.full((4, 5, 2), value, np.float32), sigma, np.ones((4, 5), bool))


@pytest.fixture
def made():
    return []


@pytest.fixture
def get(made):
    latest = Latest(3, lambda text: len(text))

    def get(observation, others=(), text="a"):
        return latest.of_pattern(observation, others, lambda: made.append(text) or text)

    return get


def test_values_alone_make_no_other_pattern(get, made):
    prior = {"mean": jnp.zeros(3)}
    assert get(observed(0), prior, "a") == get(observed(0, value=2.0), prior, "b") == "a"
    assert get(observed(1), prior, "b") == "b"
    assert get(observed(0, sigma=0.02), prior, "c") == "c"
    assert get(observed(0), {"mean": jnp.ones(3)}, "d") == "d"
    assert made == ["a", "b", "c", "d"]


def test_what_was_not_used_for_longest_goes_first(get, made):
    for row, text in ((0, "a"), (1, "b"), (2, "c")):
        get(observed(row), text=text)
    get(observed(0), text="never")
    get(observed(3), text="d")
    assert [get(observed(row), text="never") for row in (0, 2, 3)] == ["a", "c", "d"]
    assert get(observed(1), text="b again") == "b again"
    assert made == ["a", "b", "c", "d", "b again"]


def test_one_is_kept_however_much_it_weighs(get, made):
    assert get(observed(0), text="long one") == get(observed(0), text="again") == "long one"
    get(observed(1), text="b")
    assert get(observed(0), text="again") == "again"


def test_nothing_is_kept_of_what_fails():
    latest = Latest(3, lambda _: 1)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        latest.of_pattern(observed(0), (), fail)
    assert latest.of_pattern(observed(0), (), lambda: None) is None
    assert latest.of_pattern(observed(0), (), fail) is None
