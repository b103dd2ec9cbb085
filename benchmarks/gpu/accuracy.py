"""Every module of an engine against float32 stock, beside the error of stock in fp16: the design's rule."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sides import EAGER, SIDES
from benchmarks.gpu.workloads import GUIDANCE, PROMPT, SCHEDULER, SEED
from sdfast.request import Request
from sdfast.validation.modules import Stock, measure
from sdfast.validation.observe import Run, StepInputs, observed_run
from sdfast.validation.rule import judge_module


def modules(bench: Bench, side: str, batch: int) -> dict[str, Any]:
    """The error of each module on what the float32 pipeline computes itself, in a batch of pictures.

    Also draws the truths of the batch's pictures, as the float32 pipeline is open.
    """
    engine, same = bench.side(side, batch).engine, bench.side(EAGER, batch).pipe  # type: ignore[attr-defined]
    run = _observed(bench)
    steps = [_repeated(step, batch) for step in run.steps]
    measured = measure(engine, Stock(bench.exact(), same), [PROMPT], [run], steps)
    for draw in bench.workload.pictures(batch):
        bench.truths(draw)
    figures = [judge_module(one, rounding="FP8" if SIDES[side].fp8 else None) for one in measured]
    bench.forget_exact()
    return {
        "side": side,
        "modules": [
            {
                "name": one.name,
                "what": one.what,
                "inputs": one.inputs,
                "relative_l2": one.relative_l2,
                "stock_relative_l2": one.stock_relative_l2,
                "bar": one.bar,
                "within_bar": one.passed,
            }
            for one in figures
        ],
    }


def _observed(bench: Bench) -> Run:
    """One guided picture in float32, with the U-Net's inputs at its first, middle and last step."""
    load = bench.workload
    request = Request.make(
        prompts=(PROMPT,),
        negative_prompts=(None,),
        height=load.height,
        width=load.width,
        num_inference_steps=load.guided[0],
        guidance_scale=GUIDANCE,
        scheduler=SCHEDULER,
        seed=SEED,
    )
    return observed_run(bench.exact(), request, {0, load.guided[0] // 2, load.guided[0] - 1})


def _repeated(step: StepInputs, batch: int) -> StepInputs:
    """The step of so many pictures: negatives first, then positives, as the loop has them."""

    def rows(tensor: Any) -> Any:
        return tensor.repeat_interleave(batch, dim=0)

    return replace(
        step,
        sample=rows(step.sample),
        hidden_states=rows(step.hidden_states),
        conditions={name: rows(value) for name, value in step.conditions.items()},
    )
