"""One function a scheduler: from a config and a run to a table. Each lies beside the config it reads.

A symbol in them is not a tensor but a *row of coefficients*: `x, m, z = np.eye(3)` makes the latents, the
model output and the noise the three basis directions, and every formula of a paper, written with them as it
stands, yields the coefficients of its result: `x + (sigma_next - sigma) * d` is a row of the matrix. Levels
are [K, 1] columns, so that one line does all K steps at once.

Two sets of units are in use. Some hold variance-preserving latents x = α x0 + σ ε with α² + σ² = 1; others
hold variance-exploding ones x = x0 + σ ε, and scale the network's input.
"""

from collections.abc import Callable
from typing import Any

from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.run import Run
from sdfast.schedulers.solvers.ddpm import (
    DDIMConfig,
    DDIMInverseConfig,
    DDPMConfig,
    ddim,
    ddim_inverse,
    ddpm,
)
from sdfast.schedulers.solvers.deis import DEISConfig, deis
from sdfast.schedulers.solvers.dpm2 import DPM2AncestralConfig, DPM2Config, dpm2, dpm2_ancestral
from sdfast.schedulers.solvers.dpm_sde import DPMSDEConfig, dpmpp_sde
from sdfast.schedulers.solvers.dpm_singlestep import DPMSinglestepConfig, dpm_singlestep
from sdfast.schedulers.solvers.dpm_solver import DPMSolverConfig, dpm_multistep
from sdfast.schedulers.solvers.edm import EDMDPMConfig, EDMEulerConfig, edm_dpm_multistep, edm_euler
from sdfast.schedulers.solvers.euler import EulerAncestralConfig, EulerConfig, euler, euler_ancestral
from sdfast.schedulers.solvers.heun import HeunConfig, heun
from sdfast.schedulers.solvers.lcm import LCMConfig, lcm
from sdfast.schedulers.solvers.lms import LMSConfig, lms
from sdfast.schedulers.solvers.pndm import PNDMConfig, pndm
from sdfast.schedulers.solvers.sa_solver import SASolverConfig, sa_solver
from sdfast.schedulers.solvers.tcd import TCDConfig, tcd
from sdfast.schedulers.solvers.unipc import UniPCConfig, unipc
from sdfast.schedulers.table import Schedule

_ALL: tuple[tuple[type[SchedulerConfig], Callable[[Any, Run], Schedule]], ...] = (
    (DDPMConfig, ddpm),
    (DDIMConfig, ddim),
    (DDIMInverseConfig, ddim_inverse),
    (PNDMConfig, pndm),
    (LCMConfig, lcm),
    (TCDConfig, tcd),
    (EulerConfig, euler),
    (EulerAncestralConfig, euler_ancestral),
    (HeunConfig, heun),
    (DPM2Config, dpm2),
    (DPM2AncestralConfig, dpm2_ancestral),
    (LMSConfig, lms),
    (DPMSDEConfig, dpmpp_sde),
    (EDMEulerConfig, edm_euler),
    (EDMDPMConfig, edm_dpm_multistep),
    (DPMSolverConfig, dpm_multistep),
    (DPMSinglestepConfig, dpm_singlestep),
    (DEISConfig, deis),
    (UniPCConfig, unipc),
    (SASolverConfig, sa_solver),
)

SOLVERS = {config.scheduler: (config, solver) for config, solver in _ALL}
