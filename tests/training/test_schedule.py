"""What depends on the step alone."""

from itertools import pairwise

import pytest

from omnisieve.training.schedule import draw_ratio, draw_seed, warmup_cosine


def factors(total: int, warmup: int, floor: float) -> list[float]:
    return [warmup_cosine(step, total=total, warmup=warmup, floor=floor) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert factors(20, 4, 0.1)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_to_the_floor():
    values = factors(20, 4, 0.1)[3:]
    assert all(a > b for a, b in pairwise(values))
    assert values[8] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert values[-1] == pytest.approx(0.1)


def test_schedule_without_warm_up_starts_below_the_peak_and_never_at_zero():
    assert all(0 < value <= 1 for value in factors(5, 0, 0.0)[:-1])


def test_schedule_of_warm_up_alone():
    assert factors(3, 3, 0.1) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_ratios_are_a_function_of_seed_and_step_within_bounds():
    drawn = [draw_ratio(3, step, 0.15, 0.5) for step in range(200)]
    assert drawn == [draw_ratio(3, step, 0.15, 0.5) for step in range(200)]
    assert min(drawn) >= 0.15
    assert max(drawn) <= 0.5
    assert max(drawn) - min(drawn) > 0.3
    assert drawn != [draw_ratio(4, step, 0.15, 0.5) for step in range(200)]


def test_seeds_of_steps_differ():
    assert len({draw_seed(seed, step) for seed in range(5) for step in range(6)}) == 30
