"""A table from any scheduler object: the object is run on basis vectors, and what comes out is its map.

In every step the latents, the model output and the noise are given a direction of their own, so that the
coefficients of a step's result say which of them it depends on, and on which of the steps before: whatever
the object keeps in itself between its steps becomes visible as such a dependence.

Nothing here imports diffusers: an object counts as a scheduler when it has diffusers' methods.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sdfast.errors import RequestError
from sdfast.schedulers.table import Floats, Schedule

MAX_REGISTERS = 16  # each one is as large as the latents, in every row
SCALES = (0.0, 1.0, 8.0)  # of the random inputs that linearity is tested on; latents are seldom larger than 8
TOLERANCE = 1e-5  # relative; what is not linear is off by far more
NEGLIGIBLE = 1e-14  # relative; what is left of a coefficient that cancels

# What a scheduler's own methods raise for what they cannot do.
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

Run = list[tuple[torch.Tensor, torch.Tensor]]  # of each step: the network's input, the latents after it


def from_diffusers(scheduler: Any, eta: float = 0.0) -> Schedule:
    """The table of a scheduler object whose `set_timesteps` was called; the object itself is not changed.

    Of a table's R registers, the first are the latents, and the others hold what later steps still need of
    the latents, model outputs and noises of earlier steps. A table that is made from a scheduler's formulas
    may need fewer, since it can keep a combination of those.

    Args:
        scheduler: of any class with diffusers' `step(model_output, timestep, sample)`. A `begin_index` that
            was set is honoured.
        eta: given to a `step` that takes it.

    Raises:
        RequestError: the object has no timesteps yet, has stepped already, refuses a step, needs more than
            `MAX_REGISTERS`, or is not linear: it thresholds, clips, or draws noise unseen.
    """
    told = _ready(scheduler)
    probe = _Probe(scheduler, told, _options(scheduler, eta))
    coefficients, scales, draws = probe.map()
    probe.check_linear(coefficients, scales)
    name = type(scheduler).__name__
    return Schedule(
        timesteps=np.array([float(t) for t in told]),
        input_scale=scales,
        matrix=_matrices(name, coefficients),
        draws_noise=draws,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        noising=_noising(scheduler, told),
        scheduler=name,
        sampler=name.removesuffix("Scheduler"),
        schedule_type="Automatic",
    )


def run_of(
    scheduler: Any,
    *,
    num_inference_steps: int | None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Schedule:
    """The table of a run that is asked of a scheduler object: `set_timesteps`, on a copy, then the table.

    Raises `RequestError` for what the object's `set_timesteps` does not take, and as `from_diffusers`.
    """
    asked = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
    given = {name: value for name, value in asked.items() if value is not None}
    name, takes = type(scheduler).__name__, _parameters(scheduler, "set_timesteps")
    for option in given:
        if option not in takes:
            raise RequestError(f"{name}.set_timesteps takes no {option}; it takes {', '.join(takes)}")
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**{n: v if n == "num_inference_steps" else list(v) for n, v in given.items()})
    except _REFUSALS as error:
        raise RequestError(f"{name}.set_timesteps refuses {_shown(given)}: {_story(error)}") from error
    return from_diffusers(own, eta)


class _Followed(TorchFunctionMode):
    """While it is on, this thread's normal noise is `noise`, and float64 is not rounded to float32.

    Schedulers draw by `torch.randn`, which diffusers' `randn_tensor` calls, and some convert the latents to
    float32 for their own arithmetic. Other threads are not concerned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.zeros(0, dtype=torch.float64)
        self.draws = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            self.draws += 1
            return self.noise.clone()
        if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type) and _rounds(func, args, kwargs):
            return args[0]
        return func(*args, **kwargs)


def _rounds(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call makes float32 of a float64 tensor with more than one number."""
    if args[0].dtype != torch.float64 or not args[0].ndim:
        return False
    return func is torch.Tensor.float or torch.float32 in (*args[1:], *kwargs.values())


@dataclass(frozen=True)
class _Probe:
    """One scheduler object with the timesteps of its run, and what its `step` takes besides."""

    scheduler: Any
    timesteps: Sequence[Any]
    options: Mapping[str, Any]

    def map(self) -> tuple[Floats, Floats, np.ndarray]:
        """Coefficients [K, 3, K] of each step's result by the latents, model outputs and noises of all steps.

        With them the input scales [K] and whether a step draws noise [K].
        """
        K = len(self.timesteps)
        basis = torch.eye(3 * K, dtype=torch.float64).view(3, K, 1, 1, 1, 3 * K)
        run, draws = self._run(basis)
        x = basis[0].flatten(1).argmax(1)
        scales = np.array([float(scaled.flatten()[x[k]]) for k, (scaled, _) in enumerate(run)])
        rows = np.array([result.flatten().numpy() for _, result in run])
        return rows.reshape(K, 3, K), scales, draws

    def check_linear(self, coefficients: Floats, scales: Floats) -> None:
        """The object's results on random inputs are those coefficients of them, whatever their scale."""
        K = len(self.timesteps)
        generator = torch.Generator().manual_seed(0)
        unit = torch.randn(3, K, 1, 4, 3, 5, generator=generator, dtype=torch.float64)
        reference = float(np.abs(coefficients).max()) + float(np.abs(scales).max())
        for scale in SCALES:
            run, _ = self._run(unit * scale)
            for k, (scaled, result) in enumerate(run):
                due = np.tensordot(coefficients[k], (unit * scale).numpy(), axes=2)
                off = np.abs(result.numpy() - due).max()
                off += np.abs(scaled.numpy() - scales[k] * scale * unit[0, k].numpy()).max()
                if not off <= TOLERANCE * max(reference * scale, NEGLIGIBLE):
                    raise RequestError(self._not_linear(k, scale))

    def _not_linear(self, k: int, scale: float) -> str:
        where = f"{type(self.scheduler).__name__} in step {k + 1} of {len(self.timesteps)}"
        if not scale:
            return (
                f"{where} makes something of nothing: it adds a constant, or noise that is not torch.randn's"
            )
        return (
            f"{where} is not linear in the latents, the model output and the noise, so it cannot be a table."
            " Switch off what clips or thresholds (clip_sample, thresholding) in its config"
        )

    def _run(self, inputs: torch.Tensor) -> tuple[Run, np.ndarray]:
        """Every step on its own latents, model output and noise, inputs [3, K, ...]; and which steps drew."""
        scheduler, K = _fresh(self.scheduler), len(self.timesteps)
        run, draws = [], np.zeros(K, np.bool_)
        with torch.no_grad(), _Followed() as followed:
            for k, t in enumerate(self.timesteps):
                x, m, followed.noise = (part[k].clone() for part in inputs)
                followed.draws = 0
                scaled, result = self._step(scheduler, t, x, m)
                if followed.draws > 1:
                    raise RequestError(
                        f"{type(scheduler).__name__} draws noise {followed.draws} times in a step; a table"
                        " has one noise a step"
                    )
                run.append((scaled, result))
                draws[k] = followed.draws > 0
        return run, draws

    def _step(
        self, scheduler: Any, t: Any, x: torch.Tensor, m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's input and the latents after the step, both float64 and of x's shape."""
        name, shape = type(scheduler).__name__, x.shape
        try:
            scaled = (
                scheduler.scale_model_input(x.clone(), t) if hasattr(scheduler, "scale_model_input") else x
            )
            output = scheduler.step(m, t, x, **self.options)
        except _REFUSALS as error:
            raise RequestError(f"{name} refuses a step: {_story(error)}") from error
        result = output[0] if isinstance(output, tuple) else getattr(output, "prev_sample", None)
        for value in (scaled, result):
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                raise RequestError(
                    f"{name} makes something else than the next latents of a step: {type(value).__name__}"
                    f" instead of a tensor of the latents' shape"
                )
        return scaled.double(), result.double()  # type: ignore[union-attr]


def _matrices(name: str, coefficients: Floats) -> Floats:
    """The matrices [K, R, R + 2] of registers that hold the latents and what is needed of earlier steps.

    coefficients: [K, 3, K], of the result of each step by the latents, model outputs and noises of all steps.
    """
    K = len(coefficients)
    size = np.abs(coefficients).max(axis=(1, 2), keepdims=True)
    used = (np.abs(coefficients) > NEGLIGIBLE * size) | ~np.isfinite(coefficients)  # [K, 3, K]
    last_use = np.where(used.any(0), K - 1 - used[::-1].argmax(0), -1)  # [3, K]: the step that needs it last
    slots: dict[tuple[int, int], int] = {}  # what is held, and in which register
    plan = []
    for k in range(K):
        held = dict(slots)
        slots = {key: slot for key, slot in held.items() if last_use[key] > k}
        free = (slot for slot in range(1, 3 * K + 1) if slot not in slots.values())
        for kind in range(3):
            if last_use[kind, k] > k:
                slots[kind, k] = next(free)
        plan.append((held, slots))
    R = 1 + max((slot for _, after in plan for slot in after.values()), default=0)
    if R > MAX_REGISTERS:
        raise RequestError(
            f"{name} needs {R - 1} tensors of earlier steps at once; a table holds up to {MAX_REGISTERS - 1}"
        )
    matrices = np.zeros((K, R, R + 2))
    for k, (held, after) in enumerate(plan):
        column = {**held, (0, k): 0, (1, k): R, (2, k): R + 1}
        for key, c in column.items():
            matrices[k, 0, c] = coefficients[k][key]
        for key, slot in after.items():
            matrices[k, slot, column[key]] = 1.0
    return matrices


def _ready(scheduler: Any) -> Sequence[Any]:
    """The timesteps of the object's run. Raises `RequestError` when it has none, or is in their middle."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise RequestError(f"{name} is no scheduler: it needs set_timesteps(), timesteps and step()")
    timesteps = getattr(scheduler, "timesteps", None)
    custom = getattr(scheduler, "custom_timesteps", False)
    if timesteps is None or (getattr(scheduler, "num_inference_steps", 1) is None and not custom):
        raise RequestError(f"{name} has no timesteps: call its set_timesteps(num_inference_steps) first")
    if getattr(scheduler, "step_index", None) is not None or getattr(scheduler, "counter", 0):
        raise RequestError(f"{name} has stepped already: call its set_timesteps(num_inference_steps) again")
    told = list(timesteps[getattr(scheduler, "begin_index", None) or 0 :])
    if not told:
        raise RequestError(f"{name} has an empty list of timesteps: there is no step to do")
    return told


def _fresh(scheduler: Any) -> Any:
    """A copy that starts where the object would; told so, as a repeated timestep does not tell it."""
    own = copy.deepcopy(scheduler)
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(getattr(own, "begin_index", None) or 0)
    return own


def _options(scheduler: Any, eta: float) -> dict[str, Any]:
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not math.isfinite(eta):
        raise RequestError(f"eta={eta!r} is not a number from 0 to 1")
    if "eta" in _parameters(scheduler, "step"):
        return {"eta": float(eta)}
    if eta:
        raise RequestError(f"eta={eta:g}, but {type(scheduler).__name__}.step takes none; leave it at 0")
    return {}


def _noising(scheduler: Any, timesteps: Sequence[Any]) -> tuple[float, float]:
    """`Schedule.noising`: what `add_noise` makes of a picture and of noise at the first timestep."""
    own = _fresh(scheduler)
    if not hasattr(own, "add_noise"):
        if getattr(own, "begin_index", None):
            raise RequestError(f"{type(own).__name__} has no add_noise, so a run cannot start in its middle")
        return 0.0, float(getattr(own, "init_noise_sigma", 1.0))
    picture, noise = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)  # two pictures of one number each
    noisy = own.add_noise(picture, noise, torch.stack([torch.as_tensor(timesteps[0])] * 2))
    return float(noisy[0]), float(noisy[1])


def _parameters(scheduler: Any, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(scheduler, method)).parameters)


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.60}" for name, value in given.items())


def _story(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
