"""Costs and scaling laws: against closed forms, planted coefficients and published figures."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from llmbook.architecture import DecoderSettings, derive_decoder
from llmbook.core import InputError, SettingsError
from llmbook.optimisation import DEVICES, Device
from llmbook.scaling import Law, Trial, bootstrap_laws, compare_devices, fit_law, plan_cost

SHAPE = DecoderSettings(64, 2, 32, 2, 2, 48, 16)


def test_more_devices_take_less_time_but_not_less_money():
    one, eight = plan_cost(SHAPE, 10**9), plan_cost(SHAPE, 10**9, count=8)
    assert math.isclose(one.hours, 8 * eight.hours) and math.isclose(one.dollars, eight.dollars)


def test_a_plan_by_hand():
    device = Device(flops=1e12, memory=10, watts=500, price=2.0)
    plan = plan_cost(derive_decoder(12), 10**9, device, utilisation=0.5)
    assert math.isclose(plan.hours, plan.flops / 0.5e12 / 3600) and math.isclose(plan.dollars, 2 * plan.hours)
    assert math.isclose(plan.kilowatt_hours, plan.hours / 2)
    assert 0.9 < plan.flops / (6 * plan.parameters * plan.tokens) < 1.3


def test_bad_plans_are_named():
    for options in ({"utilisation": 2}, {"utilisation": 0}, {"count": 0}):
        with pytest.raises(SettingsError, match="0 to 1"):
            plan_cost(SHAPE, 10, **options)
    with pytest.raises(SettingsError, match="no device `toaster`"):
        plan_cost(SHAPE, 10, "toaster")
    assert len(compare_devices(SHAPE, 10**6).rows) == len(DEVICES)


def make_runs(law: Law, noise: float = 0.0, seed: int = 0) -> list[Trial]:
    chance = np.random.default_rng(seed)
    return [
        Trial(int(n), int(d), float(law(n, d)) * math.exp(chance.normal(0, noise)))
        for n in np.geomspace(1e6, 1e9, 5) for d in np.geomspace(2e7, 5e10, 5)
    ]


@pytest.mark.parametrize("law", [
    Law(1.69, 406.4, 410.7, 0.34, 0.28), Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    Law(0.5, 60.0, 3000.0, 0.2, 0.45), Law(2.5, 1e4, 1e4, 0.6, 0.6),
])
def test_planted_coefficients_are_recovered(law):
    found = fit_law(make_runs(law))
    for name, value in asdict(law).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.05), name
    noisy = fit_law(make_runs(law, noise=0.003))
    assert noisy(1e10, 2e11) == pytest.approx(law(1e10, 2e11), rel=0.02)  # ten times the largest


def test_failed_runs_do_not_bend_the_law():
    law = Law(1.8, 482.0, 2085.0, 0.35, 0.37)
    runs = make_runs(law)
    spoilt = [Trial(r.parameters, r.tokens, r.loss * (1.5 if i in (3, 12, 20) else 1)) for i, r in enumerate(runs)]
    assert fit_law(spoilt)(1e10, 2e11) == pytest.approx(law(1e10, 2e11), rel=0.01)


@pytest.mark.parametrize("budget", [1e18, 1e21, 5.76e23])
def test_split_is_the_minimum(budget):
    law = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
    parameters, tokens = law.split(budget)
    assert 6 * parameters * tokens == pytest.approx(budget)
    sizes = parameters * np.geomspace(0.2, 5, 201)
    assert law(parameters, tokens) <= law(sizes, budget / 6 / sizes).min() * (1 + 1e-12)
    if budget > 1e23:  # Chinchilla: 70e9 weights, 1.4e12 tokens
        assert parameters == pytest.approx(70e9, rel=0.1) and tokens == pytest.approx(1.4e12, rel=0.1)


def test_intervals_hold_the_truth_and_shrink_with_less_noise():
    law, widths = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658), []
    for noise in (0.01, 0.001):
        runs = make_runs(law, noise, seed=3)
        laws = bootstrap_laws(runs, fit_law(runs), 40)
        low, high = np.quantile([one(1e10, 2e11) for one in laws], [0.01, 0.99])
        assert low * 0.99 < law(1e10, 2e11) < high * 1.01
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_runs_that_decide_nothing_are_refused():
    runs = make_runs(Law(1.8, 300, 300, 0.3, 0.3))
    for some in ([], runs[:5], [r for r in runs if r.parameters == runs[0].parameters] * 2, [*runs, Trial(1, 1, math.nan)],
                 [*runs, Trial(0, 1, 2.0)]):
        with pytest.raises(InputError, match="6 runs or more"):
            fit_law(some)


def test_script_for_a_gpu_runs_and_says_where(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "gpu_training.py"
    command = [sys.executable, script, tmp_path / "result.json", "--smoke", "--steps", "6"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert "smoke test: these are no results" in told and result["smoke"]
    assert [row["model"] for row in result["rows"]] == ["124M", "1B"]
    assert all(row["tokens/s"] > 0 and row["precision"] == "float32" for row in result["rows"])
    import torch

    if not torch.cuda.is_available():
        refused = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert refused.returncode == 3 and "no GPU here" in refused.stderr
