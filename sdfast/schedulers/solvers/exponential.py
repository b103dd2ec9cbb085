"""Exponential integrators: what DPM-Solver, DEIS, UniPC and SA-Solver have in common.

With λ = log(α / σ) for time, the probability flow, and every SDE with the same marginals, is linear in x but
for what the network predicts, D (x0, or ε). From level s to level t its solution is therefore

    x_t = keep x_s - gain ∫ e^{g - v} D(v) dv + noise z        over v from 0 to g

(Lu et al. 2022a, proposition 3.1; Lu et al. 2022b, proposition 4.1; with noise: Xue et al. 2023).
A solver only decides which outputs D is interpolated between: Σ w_i D(v_i) stands for the integral, with
weights that are right for every polynomial of a lower degree than there are outputs. Where a solver takes a
rougher value for one of the moments ∫ e^{g - v} v^n dv, it says so in its own file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdfast.schedulers.config import SchedulerConfig
from sdfast.schedulers.prediction import predicted_noise, predicted_x0
from sdfast.schedulers.run import Run
from sdfast.schedulers.table import Floats

Ints = NDArray[np.int64]
Moments = Callable[[Floats, int], Floats]  # g [n] and an order p -> moments [n, p]


@dataclass(frozen=True)
class Interval:
    """The way of K steps from levels s to levels t (σ/α), as far as it is known exactly. All are [K, 1].

    clock: v is this times λ - λ_s.
    """

    keep: Floats
    gain: Floats
    noise: Floats
    clock: Floats
    s: Floats
    t: Floats

    @property
    def g(self) -> Floats:
        """Where the integral ends, [K, 1]."""
        return self.at(self.t)

    def at(self, levels: Floats) -> Floats:
        """v at noise levels [K, n]."""
        return self.clock * np.log(self.s / levels)

    def cross(self, x: Floats, outputs: Floats, weights: Floats, z: Floats) -> Floats:
        """x_t, [K, columns], of x_s, of outputs [K, P, columns] with weights [K, P], and of unit noise."""
        integral: Floats = np.einsum("kp,kpc->kc", weights, outputs)
        x_t: Floats = self.keep * x - self.gain * integral + self.noise * z
        return x_t


def along(s: Floats, t: Floats, tau: Floats | float = 0.0, *, of_x0: bool) -> Interval:
    """From levels s to levels t, [K] each, for D = x0 or D = ε, with τ times the noise of the SDE."""
    return (along_x0 if of_x0 else along_noise)(s, t, tau)


def along_x0(s: Floats, t: Floats, tau: Floats | float = 0.0) -> Interval:
    """For D = x0: the flow (τ = 0), or the SDE with τ times its noise (τ = 1: the reverse of the chain)."""
    s, t, tau = s[:, None], t[:, None], np.broadcast_to(tau, len(s))[:, None]
    alpha_s, alpha_t = 1 / np.sqrt(s**2 + 1), 1 / np.sqrt(t**2 + 1)
    forgotten = (t / s) ** tau**2  # e^{-τ²h}, also where h is infinite
    return Interval(
        keep=t * alpha_t / (s * alpha_s) * forgotten,
        gain=alpha_t,
        noise=t * alpha_t * np.sqrt(np.maximum(1 - forgotten**2, 0)),  # t may be s, but for rounding
        clock=-(1 + tau**2),
        s=s,
        t=t,
    )


def along_noise(s: Floats, t: Floats, tau: Floats | float = 0.0) -> Interval:
    """For D = ε: the flow (τ = 0), or the SDE with τ times its noise."""
    s, t, tau = s[:, None], t[:, None], np.broadcast_to(tau, len(s))[:, None]
    alpha_s, alpha_t = 1 / np.sqrt(s**2 + 1), 1 / np.sqrt(t**2 + 1)
    return Interval(
        keep=alpha_t / alpha_s,
        gain=(1 + tau**2) * t * alpha_t,
        noise=tau * t * alpha_t * np.sqrt(np.maximum((s / t) ** 2 - 1, 0)),
        clock=np.ones_like(s),
        s=s,
        t=t,
    )


def moments(g: Floats, count: int) -> Floats:
    """∫ e^{g - v} v^n dv over v from 0 to g, for n below `count`: [K] -> [K, count].

    They are n! g^{n+1} φ_{n+1}(g) of the exponential integrators' φ functions.
    """
    G = [np.expm1(g)]
    for n in range(1, count):
        G.append(n * G[-1] - g**n)
    return np.stack(G, axis=-1)


def quadrature(nodes: Floats, wanted: Floats) -> Floats:
    """Weights w with Σ w_i v_i^n equal to the wanted moment n, [K, p] each."""
    scale = np.abs(nodes).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    n = np.arange(nodes.shape[1])
    powers = (nodes / scale)[:, None, :] ** n[:, None]  # [K, n, i]
    solved: Floats = np.linalg.solve(powers, (wanted / scale**n)[:, :, None])
    return solved[:, :, 0]


def adams(over: Interval, nodes: Floats, order: Ints, wanted: Moments) -> Floats:
    """Weights [K, P] of the outputs at `nodes` [K, P], of which step k takes the first order[k]."""
    weights = np.zeros_like(nodes)
    g = over.g[:, 0]
    for p in np.unique(order):
        k = order == p
        weights[k, :p] = quadrature(nodes[k, :p], wanted(g[k], int(p)))
    return weights


def visited(levels: Floats, count: int) -> Floats:
    """Column i: the level i steps before each of the K, [K, count]; before the first step, nothing of use."""
    return np.stack([np.roll(levels[:-1], i) for i in range(count)], axis=1)


def known(
    config: SchedulerConfig, x: Floats, m: Floats, past: list[Floats], levels: Floats, *, of_x0: bool
) -> Floats:
    """D as it is known in each step, [K, 1 + P, columns]: of its model output now, then of P registers."""
    alpha = 1 / np.sqrt(levels[:-1, None] ** 2 + 1)
    predicted = predicted_x0 if of_x0 else predicted_noise
    own = predicted(config, x, m, alpha, levels[:-1, None] * alpha)
    earlier = [np.broadcast_to(register, own.shape) for register in past]
    return np.stack([own, *earlier], axis=1)


def orders(highest: int, run: Run, steps: int, *, falling: bool) -> Ints:
    """The order of each step, [K]: one output more is known in every step; `falling`: at the end one less."""
    k = np.arange(steps)
    order = np.minimum(highest, k - run.start + 1)
    if falling:
        order = np.minimum(order, steps - k)
    return np.maximum(order, 1)
