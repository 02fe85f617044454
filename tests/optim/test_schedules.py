from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from ftlab.config import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    PolynomialConfig,
    ScheduleConfig,
    WSDConfig,
)
from ftlab.errors import ConfigError
from ftlab.optim.schedules import make_schedule, warmup_steps

ALL = [ConstantConfig, LinearConfig, CosineConfig, WSDConfig, PolynomialConfig, InverseSqrtConfig]
FALLING = [LinearConfig, CosineConfig, WSDConfig, PolynomialConfig]


def curve(config: ScheduleConfig, total: int) -> list[float]:
    factor = make_schedule(config, total)
    return [factor(step) for step in range(total)]


def test_constant() -> None:
    assert curve(ConstantConfig(warmup_steps=4), 7) == [0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_linear() -> None:
    assert curve(LinearConfig(warmup_steps=2), 6) == [0.5, 1, 0.75, 0.5, 0.25, 0]
    assert curve(LinearConfig(warmup_steps=0, final_factor=0.5), 5) == [1, 0.875, 0.75, 0.625, 0.5]


def test_cosine() -> None:
    assert curve(CosineConfig(warmup_steps=1), 5) == pytest.approx(
        [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0]
    )
    assert curve(CosineConfig(warmup_steps=2, final_factor=0.1), 4) == pytest.approx([0.5, 1, 0.55, 0.1])


def test_polynomial() -> None:
    assert curve(PolynomialConfig(warmup_steps=0, power=2.0), 5) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16, 0])
    config = PolynomialConfig(warmup_steps=0, power=1.0, final_factor=0.2)
    assert curve(config, 9) == pytest.approx(curve(LinearConfig(warmup_steps=0, final_factor=0.2), 9))


def test_wsd() -> None:
    config = WSDConfig(warmup_steps=2, decay_fraction=0.4)
    assert curve(config, 10) == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert curve(WSDConfig(warmup_steps=2, decay_fraction=0), 5) == [0.5, 1, 1, 1, 1]
    assert curve(WSDConfig(warmup_steps=0, decay_fraction=1), 5) == [1, 0.75, 0.5, 0.25, 0]
    assert curve(WSDConfig(warmup_steps=5, decay_fraction=0.5), 10)[4:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


def test_inverse_sqrt() -> None:
    assert curve(InverseSqrtConfig(warmup_steps=4), 17)[3::4] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])
    assert curve(InverseSqrtConfig(warmup_steps=0), 4) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("total", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 0}, {"warmup_fraction": 0.03}, {"warmup_fraction": 0.4}])
def test_of_every_schedule(kind: type[ScheduleConfig], total: int, warmup: dict[str, Any]) -> None:
    config = kind(**warmup)
    factors, num_warmup = curve(config, total), warmup_steps(config, total)
    assert factors[0] == 1 / max(num_warmup, 1)
    assert max(factors) == factors[max(num_warmup - 1, 0)] == 1.0
    assert factors[:num_warmup] == sorted(factors[:num_warmup])
    assert factors[num_warmup:] == sorted(factors[num_warmup:], reverse=True)
    assert make_schedule(config, total)(total + 5) == factors[-1]


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("final", [0.0, 0.1, 0.3, 1.0])
def test_last_factor_is_exact(kind: Any, final: float) -> None:
    for total in (2, 3, 33):
        assert curve(kind(final_factor=final), total)[-1] == final


def test_warmup_steps_come_before_the_fraction() -> None:
    assert warmup_steps(LinearConfig(warmup_steps=3, warmup_fraction=0.9), 10) == 3
    assert warmup_steps(LinearConfig(warmup_fraction=0.29), 100) == 29
    assert warmup_steps(LinearConfig(warmup_fraction=0.03), 10) == 0


@pytest.mark.parametrize(
    ("config", "total", "key"),
    [
        (LinearConfig(warmup_steps=10), 10, "schedule.warmup_steps"),
        (ConstantConfig(warmup_steps=1), 1, "schedule.warmup_steps"),
        (CosineConfig(warmup_fraction=1.0), 10, "schedule.warmup_fraction"),
        (WSDConfig(warmup_steps=6, decay_fraction=0.5), 10, "schedule.decay_fraction"),
        (LinearConfig(), 0, "at least one optimizer step"),
        (ScheduleConfig(), 10, "schedule: choose"),
    ],
)
def test_what_does_not_fit_is_refused(config: ScheduleConfig, total: int, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_schedule(config, total)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 33, 100])
def test_fractions_that_sum_to_one_fit_into_a_run_of_any_length(total: int) -> None:
    for share in range(100):
        make_schedule(WSDConfig(warmup_fraction=share / 100, decay_fraction=round(1 - share / 100, 2)), total)


def test_the_check_of_a_configuration_needs_no_torch() -> None:
    program = "import sys, ftlab.optim.schedules; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_negative_step_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="negative"):
        make_schedule(ConstantConfig(), 5)(-1)
