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
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sdfast.errors import RequestError
from sdfast.schedulers.experts import first_row, rows_until
from sdfast.schedulers.run import left_out
from sdfast.schedulers.table import Floats, Schedule

MAX_REGISTERS = 16  # each one is as large as the latents, in every row
SCALES = (0.0, 1.0, 8.0)  # of the random inputs that linearity is tested on; latents are seldom larger than 8
TOLERANCE = 1e-5  # relative; what is not linear is off by far more
TINY = 1e-14  # of a result that should be nothing
NEGLIGIBLE = 1e-10  # relative to a step's coefficients; what cancels leaves some 1e-16 of them

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


def from_diffusers(scheduler: Any, eta: float = 0.0, start: int | None = None) -> Schedule:
    """The table of a scheduler object whose `set_timesteps` was called; the object itself is not changed.

    Of a table's R registers, the first holds the latents, and the others those combinations of earlier
    latents, model outputs and noises that later steps need.

    Args:
        scheduler: of any class with diffusers' `step(model_output, timestep, sample)`.
        eta: given to a `step` that takes it.
        start: how many of its timesteps to leave out at the beginning; by default the `begin_index` that was
            set.

    Raises:
        RequestError: the object has no timesteps yet, has stepped already, refuses a step, needs more than
            `MAX_REGISTERS`, or is not linear: it thresholds, clips, or draws noise unseen.
    """
    name = _checked(scheduler)
    begin = (getattr(scheduler, "begin_index", None) or 0) if start is None else start
    told = list(scheduler.timesteps)[begin:]
    if not told:
        raise RequestError(f"{name} has no timestep after the first {begin}: there is no step to do")
    own = copy.deepcopy(scheduler)
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(begin)  # 0, too: without, a repeated first timestep is taken for its second
    probe = _Probe(own, told, _options(own, eta))
    coefficients, scales, draws = probe.map()
    probe.check_linear(coefficients, scales)
    return Schedule(
        timesteps=np.array([float(t) for t in told]),
        input_scale=scales,
        matrix=_matrices(name, coefficients),
        draws_noise=draws,
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        noising=probe.noising(begin),
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
    strength: float = 1.0,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> Schedule:
    """The table of a run that is asked of a scheduler object: `set_timesteps`, on a copy, then the table.

    The arguments are those of `sdfast.schedulers.schedule`.

    Raises `RequestError` for what the object's `set_timesteps` does not take, and as `from_diffusers`.
    """
    lists = {"timesteps": timesteps, "sigmas": sigmas}
    given: dict[str, Any] = {name: list(values) for name, values in lists.items() if values is not None}
    if num_inference_steps is not None:
        given["num_inference_steps"] = num_inference_steps
    _check_is_one(scheduler)
    name, takes = type(scheduler).__name__, _parameters(scheduler, "set_timesteps")
    for option in given:
        if option not in takes:
            raise RequestError(f"{name}.set_timesteps takes no {option}; it takes {', '.join(takes)}")
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**given)
    except _REFUSALS as error:
        raise RequestError(f"{name}.set_timesteps refuses {_shown(given)}: {_story(error)}") from error
    order = getattr(own, "order", 1)
    steps = num_inference_steps or len(own.timesteps) // order
    start, train = left_out(steps, strength) * order, _trained_on(own)
    if denoising_start is not None:
        start = first_row(np.array([float(t) for t in own.timesteps]), denoising_start, train, order)
    made = from_diffusers(own, eta, start)
    return made if denoising_end is None else made.first(rows_until(made.timesteps, denoising_end, train))


def _trained_on(scheduler: Any) -> int:
    """How many timesteps the network of a scheduler knows: diffusers' usual number where it does not say."""
    return int(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))


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
            size = args[0].shape if func is torch.randn_like else _size(args, kwargs)
            if size != self.noise.shape:
                raise RequestError(f"noise of shape {list(size)} is drawn, which is not the latents' shape")
            return self.noise.clone()
        if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type) and _rounds(func, args, kwargs):
            return args[0]
        return func(*args, **kwargs)


def _size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size:
    """The shape that `torch.randn` is asked for: one sequence, or a number a side."""
    given = args or (kwargs["size"],)
    return torch.Size(given[0] if isinstance(given[0], Sequence) else given)


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
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            raise RequestError(
                f"{type(self.scheduler).__name__} has no finite coefficients for step {finite.argmin() + 1}"
                f" of {K}: check prediction_type and the betas in its config"
            )
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
                if not off <= TOLERANCE * max(reference * scale, TINY):
                    raise RequestError(self._not_linear(k, scale))

    def noising(self, begin: int) -> Floats | None:
        """`Schedule.noising`: what `add_noise` makes of a picture and of noise before each step."""
        own, name, rows = copy.deepcopy(self.scheduler), type(self.scheduler).__name__, []
        if not hasattr(own, "add_noise"):
            if begin:
                raise RequestError(f"{name} has no add_noise, so no run starts in its middle")
            return None
        picture, noise = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)  # pictures of one number
        with torch.no_grad(), _Followed() as followed:
            followed.noise = torch.zeros_like(picture)
            for t in self.timesteps:
                try:
                    noisy = own.add_noise(picture, noise, torch.stack([torch.as_tensor(t)] * 2))
                except _REFUSALS as error:
                    raise RequestError(f"{name}.add_noise refuses: {_story(error)}") from error
                rows.append([float(noisy[0]), float(noisy[1])])
                self._step(own, t, torch.zeros_like(picture), torch.zeros_like(picture))
        return np.array([*rows, [1.0, 0.0]])

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
        scheduler, K = copy.deepcopy(self.scheduler), len(self.timesteps)
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
    """The matrices [K, R, R + 2] whose composition has these coefficients, with as few registers as can be.

    The steps from k on need some combinations of the inputs before k: a basis of those is what the registers
    hold. It is found from the end: to what later steps need, each step adds what it needs itself.

    coefficients: [K, 3, K], of the result of each step by the latents, model outputs and noises of all steps.
    """
    K = len(coefficients)
    rows = coefficients.transpose(0, 2, 1).reshape(K, 3 * K)  # by the inputs of step 0, of step 1, …
    held = [np.zeros((0, 3 * K))]  # of step k: [registers, 3k], orthonormal rows
    for k in reversed(range(K)):
        needed = rows[k, : 3 * k] / np.linalg.norm(rows[k])
        held.insert(0, _row_space(np.vstack([held[0][:, : 3 * k], needed])))
    R = 1 + max(map(len, held))
    if R > MAX_REGISTERS:
        raise RequestError(
            f"{name} needs {R - 1} tensors of earlier steps at once; a table holds up to {MAX_REGISTERS - 1}"
        )
    matrices = np.zeros((K, R, R + 2))
    for k, (old, new) in enumerate(pairwise(held)):
        results = np.vstack([rows[k : k + 1, : 3 * k + 3], new])
        matrices[k, : len(results), 1 : 1 + len(old)] = results[:, : 3 * k] @ old.T
        for kind, column in enumerate((0, R, R + 1)):
            matrices[k, : len(results), column] = results[:, 3 * k + kind]
    return matrices


def _row_space(rows: Floats) -> Floats:
    """Orthonormal rows that span these, all but what is negligible of them: rows are of length 1 or less."""
    _, weights, basis = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(basis[weights > NEGLIGIBLE])


def _checked(scheduler: Any) -> str:
    """The class's name. Raises `RequestError` for an object without timesteps, or in the middle of them."""
    name = type(scheduler).__name__
    _check_is_one(scheduler)
    custom = getattr(scheduler, "custom_timesteps", False)
    counted = not hasattr(scheduler, "num_inference_steps") or scheduler.num_inference_steps is not None
    if not (counted or custom) or getattr(scheduler, "timesteps", None) is None:
        raise RequestError(f"{name} has no timesteps: call its set_timesteps(num_inference_steps) first")
    if getattr(scheduler, "step_index", None) is not None or getattr(scheduler, "counter", False):
        raise RequestError(f"{name} has stepped already: call its set_timesteps(num_inference_steps) again")
    return name


def _check_is_one(scheduler: Any) -> None:
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "set_timesteps"):
        raise RequestError(
            f"{type(scheduler).__name__} is no scheduler: one has set_timesteps(), timesteps and step()"
        )


def _options(scheduler: Any, eta: float) -> dict[str, Any]:
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not math.isfinite(eta):
        raise RequestError(f"eta={eta!r} is not a number from 0 to 1")
    if "eta" in _parameters(scheduler, "step"):
        return {"eta": float(eta)}
    if eta:
        raise RequestError(f"eta={eta:g}, but {type(scheduler).__name__}.step takes none; leave it at 0")
    return {}


def _parameters(scheduler: Any, method: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(scheduler, method)).parameters)


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.60}" for name, value in given.items())


def _story(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
