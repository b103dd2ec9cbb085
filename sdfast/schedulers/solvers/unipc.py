"""UniPC: a predictor, and a corrector that needs no evaluation of its own."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from sdfast.errors import RequestError
from sdfast.schedulers.config import FLOW, DynamicShifting, SigmaConfig, Thresholding
from sdfast.schedulers.levels import Final, preserving_levels
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.exponential import Ints, adams, along, known, moments, orders, visited
from sdfast.schedulers.table import Floats, Schedule, table


class UniPCConfig(Thresholding, DynamicShifting, SigmaConfig):
    scheduler = "UniPCMultistepScheduler"
    accepts = frozenset({"sigmas"})
    refused: ClassVar[Mapping[str, str]] = {
        "solver_p": "a predictor of one's own cannot be a table; set it to null",
        "shift_terminal": FLOW.replace("false", "null"),
    }

    solver_order: Literal[1, 2, 3] = 2
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: list[int] = Field([])  # steps whose result is left as predicted
    solver_p: Any = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    shift_terminal: float | None = None

    @property
    def sampler(self) -> str:
        return "UniPC" if self.solver_type == "bh1" else "UniPC bh2"

    @field_validator("solver_type", mode="before")
    @classmethod
    def _other_solvers_mean_bh2(cls, solver: Any) -> Any:
        return "bh2" if solver in ("midpoint", "heun", "logrho") else solver  # as diffusers does


def unipc(config: UniPCConfig, run: Run) -> Schedule:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867).

    Step k first goes once more from level k - 1 to level k, now that the output at k is known: UniC, from the
    latents before. From there UniP goes on to level k + 1. Both at once are one matrix. Registers: the
    predicted latents, the corrected ones of the step before, and the outputs of the steps before.
    """
    final: Final = "zero" if config.final_sigmas_type == "zero" else "run"
    t, levels = preserving_levels(config, run, final, rounded=config.use_karras_sigmas)
    order = orders(config.solver_order, run, len(t), falling=config.lower_order_final)
    _check_end(config, order)
    k = np.arange(len(t))

    x, x_before, *past, m, z = np.eye(config.solver_order + 4)
    D = known(config, x, m, past, levels, of_x0=config.predict_x0)
    seen = visited(levels, config.solver_order + 1)
    wanted = partial(_moments, config)

    again = along(levels[k - 1], levels[:-1], of_x0=config.predict_x0)
    corrects = (k > run.start) & ~np.isin(k - 1, config.disable_corrector)
    weights = adams(again, again.at(seen), np.where(corrects, np.roll(order, 1) + 1, 1), wanted)
    corrected = np.where(corrects[:, None], again.cross(x_before, D, weights, z), x)

    over = along(levels[:-1], levels[1:], of_x0=config.predict_x0)
    weights = adams(over, over.at(seen), order, wanted)
    kept = [D[:, i] for i in range(config.solver_order)]
    return table(config, run, t, levels, [over.cross(corrected, D, weights, z), corrected, *kept])


def _moments(config: UniPCConfig, g: Floats, count: int) -> Floats:
    """Between two outputs UniPC weighs the slope simply with B(h) / 2, where B is g or e^g - 1."""
    G = moments(g, count)
    if count == 2:
        G[:, 1] = g * (g if config.solver_type == "bh1" else G[:, 0]) / 2
    return G


def _check_end(config: UniPCConfig, order: Ints) -> None:
    """Where there is no noise, λ is infinite: only x0's first-order step gets there."""
    if config.final_sigmas_type == "zero" and (order[-1] > 1 or not config.predict_x0):
        raise RequestError(
            f"UniPCMultistepScheduler: predict_x0={config.predict_x0} with"
            f" lower_order_final={config.lower_order_final} cannot go to final_sigmas_type='zero', here as in"
            " diffusers; set that to 'sigma_min', or both others to true"
        )
