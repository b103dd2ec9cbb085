"""The estimate of the clean latents in the middle of a run."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdfast.schedulers import Schedule, schedule
from sdfast.schedulers.estimate import clean_estimate
from tests.fakes import SCHEDULER_CONFIG

STEPS = 20


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_it_is_the_pred_original_sample_of_diffusers(name: str, prediction_type: str) -> None:
    config = {**SCHEDULER_CONFIG, "prediction_type": prediction_type}
    stock = getattr(diffusers, name).from_config(config)
    stock.set_timesteps(STEPS)
    plan, generator = schedule(name, config, num_inference_steps=STEPS), torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) * plan.init_noise_sigma
    for k, t in enumerate(stock.timesteps):
        m = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        stock.scale_model_input(x, t)
        stepped = stock.step(m, t, x)
        found = clean_estimate(plan, k, config)
        assert found is not None
        torch.testing.assert_close(
            found[0] * x + found[1] * m, stepped.pred_original_sample.double(), rtol=2e-4, atol=2e-4
        )
        x = stepped.prev_sample.double()


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("euler", 1e-3),
        ("heun", 1e-3),
        ("ddim", 1e-3),
        ("unipc", 1e-3),
        ("deis", 1e-3),
        ("dpmpp_2m", 1e-3),
        ("dpmpp_2m_karras", 0.1),  # its timesteps are rounded, which shows at the clean end
        ("pndm", 1e-3),
    ],
)
def test_a_network_that_knows_the_picture_stays_on_its_line(name: str, off: float) -> None:
    """One clean picture from first to last: then the noise that the network sees is always the same."""
    plan, clean = schedule(name, SCHEDULER_CONFIG, num_inference_steps=STEPS), 0.7
    registers, noises = np.zeros(plan.registers), []
    registers[0] = 1.3 * plan.init_noise_sigma
    for k in range(len(plan)):
        found = clean_estimate(plan, k, SCHEDULER_CONFIG)
        assert found is not None
        a, b = found
        noises.append((clean - a * registers[0]) / b)
        registers = plan.matrix[k] @ [*registers, noises[-1], 0.0]
    assert np.ptp(noises) < off * abs(noises[0])
    assert abs(registers[0] - clean) < 0.06  # what is left of the noise at DDIM's last level


@pytest.mark.parametrize("config", [{"_class_name": "EDMEulerScheduler"}])
def test_none_where_the_network_predicts_otherwise(config: dict[str, Any]) -> None:
    plan = schedule("EDMEulerScheduler", config, num_inference_steps=4)
    assert clean_estimate(plan, 0, config) is None

    class Own(diffusers.DDIMScheduler):  # type: ignore[misc]
        pass

    own = Own.from_config({**SCHEDULER_CONFIG, "_class_name": "Own"})
    own.set_timesteps(4)
    assert clean_estimate(Schedule.from_diffusers(own), 0, SCHEDULER_CONFIG) is None
