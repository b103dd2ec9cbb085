"""The samplers there are: each a diffusers scheduler, and the config fields that the name decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sdfast.schedulers.schedule_types import EXPONENTIAL, KARRAS, NO_OTHER_SIGMAS, PLAIN, PLAIN_TYPES

_UNCLIPPED = {"clip_sample": False}  # latents have no bounds to clip to; the class default is for pixels
_DPMPP_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
_DRAWN_ANEW = "; noise is drawn anew, where AUTOMATIC1111 and ComfyUI follow one Brownian path"
_HEUN = {"solver_type": "heun"}
_DPMPP_2M_SDE = _DPMPP_2M | {"algorithm_type": "sde-dpmsolver++"}
_DPMPP_3M = _DPMPP_2M | {"solver_order": 3}
_DPMPP_3M_SDE = _DPMPP_2M_SDE | {"solver_order": 3}
_DPM_SOLVER = _DPMPP_2M | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPMPP_2S = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_flow_sigmas": False,
}
_UNIPC = {"solver_order": 3, "predict_x0": True, "lower_order_final": True, "use_flow_sigmas": False}
_BH1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # diffusers' bh1 has no number for no noise
_BH2 = {"solver_type": "bh2"}


@dataclass(frozen=True)
class Sampler:
    """A name that can be asked for, and what it means.

    Attributes:
        scheduler: diffusers class name.
        sampler: AUTOMATIC1111 sampler name.
        schedule_type: AUTOMATIC1111 schedule type.
        short_name: for command lines and requests.
        overrides: config fields that the name decides, whatever the checkpoint's config says. Empty when the
            scheduler was asked for by its class name: then its config decides.
        evaluations: network evaluations a step.
        advice: when to use it, in one line.
        aliases: other names it goes by.
        layout: of `layouts.LAYOUTS`, where that decides the noise levels instead of the config.
    """

    scheduler: str
    sampler: str
    schedule_type: str
    short_name: str
    overrides: Mapping[str, Any]
    evaluations: int
    advice: str
    aliases: tuple[str, ...] = field(default=())
    layout: str = ""

    @property
    def name(self) -> str:
        """The name people know: "DPM++ 2M Karras", "Euler a"."""
        plain = self.schedule_type in PLAIN_TYPES
        return self.sampler if plain else f"{self.sampler} {self.schedule_type}"


def _sampler(
    scheduler: str,
    sampler: str,
    schedule_type: str,
    short: str,
    overrides: Mapping[str, Any],
    advice: str,
    *aliases: str,
    evaluations: int = 1,
) -> Sampler:
    settled = MappingProxyType(dict(overrides))
    return Sampler(scheduler, sampler, schedule_type, short, settled, evaluations, advice, aliases)


SAMPLERS: tuple[Sampler, ...] = (
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        "Karras",
        "dpmpp_2m_karras",
        _DPMPP_2M | NO_OTHER_SIGMAS | KARRAS,
        "the usual choice: finished pictures at 20 to 30 steps",
        "DPM++ 2M Automatic",  # AUTOMATIC1111's own default for this sampler
        "dpmpp_2m_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        "Uniform",
        "dpmpp_2m",
        _DPMPP_2M | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps; often better below 15 steps",
        "k_dpmpp_2m",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Exponential",
        "dpmpp_2m_sde_exponential",
        _DPMPP_2M_SDE | EXPONENTIAL,
        "DPM++ 2M with new noise at every step: more detail, 25 steps or more" + _DRAWN_ANEW,
        "DPM++ 2M SDE Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Karras",
        "dpmpp_2m_sde_karras",
        _DPMPP_2M_SDE | NO_OTHER_SIGMAS | KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
        "dpmpp_2m_sde_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE",
        "Uniform",
        "dpmpp_2m_sde",
        _DPMPP_2M_SDE | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Exponential",
        "dpmpp_2m_sde_heun_exponential",
        _DPMPP_2M_SDE | _HEUN | EXPONENTIAL,
        "DPM++ 2M SDE, the change between steps weighed exactly" + _DRAWN_ANEW,
        "DPM++ 2M SDE Heun Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Karras",
        "dpmpp_2m_sde_heun_karras",
        _DPMPP_2M_SDE | _HEUN | NO_OTHER_SIGMAS | KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 2M SDE Heun",
        "Uniform",
        "dpmpp_2m_sde_heun",
        _DPMPP_2M_SDE | _HEUN | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Exponential",
        "dpmpp_3m_sde_exponential",
        _DPMPP_3M_SDE | EXPONENTIAL,
        "third order with new noise at every step, 30 steps or more" + _DRAWN_ANEW,
        "DPM++ 3M SDE Automatic",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Karras",
        "dpmpp_3m_sde_karras",
        _DPMPP_3M_SDE | NO_OTHER_SIGMAS | KARRAS,
        "as above with Karras levels" + _DRAWN_ANEW,
        "dpmpp_3m_sde_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M SDE",
        "Uniform",
        "dpmpp_3m_sde",
        _DPMPP_3M_SDE | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps" + _DRAWN_ANEW,
        "k_dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M",
        "Karras",
        "dpmpp_3m_karras",
        _DPMPP_3M | NO_OTHER_SIGMAS | KARRAS,
        "DPM++ 2M with one step more of memory: for low guidance",
        "dpmpp_3m_k",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM++ 3M",
        "Uniform",
        "dpmpp_3m",
        _DPMPP_3M | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps",
    ),
    _sampler(
        "DPMSolverMultistepScheduler",
        "DPM-Solver 2M",
        "Uniform",
        "dpm_solver_2m",
        _DPM_SOLVER | NO_OTHER_SIGMAS | PLAIN,
        "DPM-Solver as first published, on the noise; DPM++ 2M bears guidance better",
        "DPM-Solver",
    ),
    _sampler(
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S",
        "Karras",
        "dpmpp_2s_karras",
        _DPMPP_2S | NO_OTHER_SIGMAS | KARRAS,
        "pairs of evaluations, each counted as a step; draws no noise, unlike DPM++ 2S a",
        "dpmpp_2s_k",
    ),
    _sampler(
        "DPMSolverSinglestepScheduler",
        "DPM++ 2S",
        "Uniform",
        "dpmpp_2s",
        _DPMPP_2S | NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps",
    ),
    _sampler(
        "DEISMultistepScheduler",
        "DEIS",
        "Automatic",
        "deis",
        NO_OTHER_SIGMAS | PLAIN,
        "an exponential Adams method on the noise; 20 to 30 steps",
        "DEIS Uniform",
    ),
    _sampler(
        "DEISMultistepScheduler",
        "DEIS",
        "Karras",
        "deis_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "DEIS with Karras levels",
        "deis_k",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC",
        "Automatic",
        "unipc",
        _UNIPC | _BH1 | NO_OTHER_SIGMAS | PLAIN,
        "third order, each step corrected by the next one's evaluation: good from 8 steps on",
        "uni_pc",
        "UniPC Uniform",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC",
        "Karras",
        "unipc_karras",
        _UNIPC | _BH1 | NO_OTHER_SIGMAS | KARRAS,
        "UniPC with Karras levels",
        "unipc_k",
        "uni_pc_karras",
    ),
    _sampler(
        "UniPCMultistepScheduler",
        "UniPC bh2",
        "Automatic",
        "unipc_bh2",
        _UNIPC | _BH2 | NO_OTHER_SIGMAS | PLAIN,
        "UniPC's other weights, for more than 10 steps",
        "uni_pc_bh2",
        "UniPC bh2 Uniform",
    ),
    _sampler(
        "SASolverScheduler",
        "SA-Solver",
        "Automatic",
        "sa_solver",
        NO_OTHER_SIGMAS | PLAIN,
        "predictor, corrector, and noise in the middle of the run; 20 steps or more",
        "SA-Solver Uniform",
    ),
    _sampler(
        "EulerDiscreteScheduler",
        "Euler",
        "Automatic",
        "euler",
        NO_OTHER_SIGMAS | PLAIN,
        "simple and predictable; 30 steps or more",
        "k_euler",
        "Euler Uniform",
    ),
    _sampler(
        "EulerDiscreteScheduler",
        "Euler",
        "Karras",
        "euler_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "Euler with more of its steps where the detail is made",
    ),
    _sampler(
        "EulerAncestralDiscreteScheduler",
        "Euler a",
        "Automatic",
        "euler_a",
        {},
        "new noise at every step: softer, more varied; the picture never settles with more steps",
        "euler_ancestral",
        "k_euler_a",
        "k_euler_ancestral",
        "Euler a Uniform",
    ),
    _sampler(
        "HeunDiscreteScheduler",
        "Heun",
        "Automatic",
        "heun",
        NO_OTHER_SIGMAS | PLAIN | _UNCLIPPED,
        "Euler corrected by a second look at where a step ends: exact, at twice the cost",
        "k_heun",
        "Heun Uniform",
        evaluations=2,
    ),
    _sampler(
        "LMSDiscreteScheduler",
        "LMS",
        "Automatic",
        "lms",
        NO_OTHER_SIGMAS | PLAIN,
        "fourth order from the steps before, at Euler's cost; 30 steps or more",
        "k_lms",
        "LMS Uniform",
    ),
    _sampler(
        "LMSDiscreteScheduler",
        "LMS",
        "Karras",
        "lms_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "LMS with more of its steps where the detail is made",
    ),
    _sampler(
        "KDPM2DiscreteScheduler",
        "DPM2",
        "Karras",
        "dpm2_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "midpoint steps: exact, at twice the cost",
        "DPM2 Automatic",
        evaluations=2,
    ),
    _sampler(
        "KDPM2DiscreteScheduler",
        "DPM2",
        "Uniform",
        "dpm2",
        NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps",
        "dpm_2",
        "k_dpm_2",
        evaluations=2,
    ),
    _sampler(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        "Karras",
        "dpm2_a_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "DPM2 with new noise at every step",
        "DPM2 a Automatic",
        evaluations=2,
    ),
    _sampler(
        "KDPM2AncestralDiscreteScheduler",
        "DPM2 a",
        "Uniform",
        "dpm2_a",
        NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps",
        "dpm_2_ancestral",
        "k_dpm_2_a",
        "k_dpm_2_ancestral",
        evaluations=2,
    ),
    _sampler(
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        "Karras",
        "dpmpp_sde_karras",
        NO_OTHER_SIGMAS | KARRAS,
        "detailed and varied, finished at 10 to 15 steps of two evaluations; needs torchsde",
        "DPM++ SDE Automatic",
        evaluations=2,
    ),
    _sampler(
        "DPMSolverSDEScheduler",
        "DPM++ SDE",
        "Uniform",
        "dpmpp_sde",
        NO_OTHER_SIGMAS | PLAIN,
        "as above with evenly spaced timesteps",
        "k_dpmpp_sde",
        "dpmpp_sde_gpu",
        evaluations=2,
    ),
    _sampler(
        "EDMEulerScheduler",
        "EDM Euler",
        "Automatic",
        "edm_euler",
        {},
        "for checkpoints trained with EDM's preconditioning only, such as CosXL",
    ),
    _sampler(
        "EDMDPMSolverMultistepScheduler",
        "EDM DPM++ 2M",
        "Automatic",
        "edm_dpmpp_2m",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        "for checkpoints trained with EDM's preconditioning only, such as Playground 2.5",
    ),
    _sampler(
        "DDIMScheduler",
        "DDIM",
        "Automatic",
        "ddim",
        _UNCLIPPED,
        "the classic; eta from 0 (deterministic) to 1 (as noisy as DDPM); 50 steps",
    ),
    _sampler(
        "PNDMScheduler",
        "PLMS",
        "Automatic",
        "plms",
        {"skip_prk_steps": True},
        "Stable Diffusion 1.x's own default: DDIM of fourth order, one evaluation more than steps",
        "pndm",
    ),
    _sampler(
        "PNDMScheduler",
        "PNDM PRK",
        "Automatic",
        "pndm_prk",
        {"skip_prk_steps": False},
        "PLMS warmed up by Runge-Kutta steps: four evaluations in each of the first three, then one",
    ),
    _sampler(
        "LCMScheduler",
        "LCM",
        "Automatic",
        "lcm",
        _UNCLIPPED,
        "for LCM checkpoints and LoRAs only: 4 to 8 steps, guidance 1 to 2",
        "LCM Uniform",
    ),
    _sampler(
        "TCDScheduler",
        "TCD",
        "Automatic",
        "tcd",
        _UNCLIPPED,
        "for TCD checkpoints and LoRAs only: 4 to 20 steps; eta is gamma, 0.3 is usual",
    ),
    _sampler(
        "DDIMInverseScheduler",
        "DDIM Inverse",
        "Automatic",
        "ddim_inverse",
        _UNCLIPPED,
        "not for drawing: takes a picture's latents back to the noise that DDIM would draw them from",
        "ddim_inversion",
    ),
    _sampler(
        "DDPMScheduler",
        "DDPM",
        "Automatic",
        "ddpm",
        _UNCLIPPED,
        "the original chain: 1000 steps at its best, the reference for everything else",
    ),
)
