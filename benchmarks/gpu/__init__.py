"""`python -m benchmarks.gpu`: sdfast against stock diffusers on one GPU, from the roofline to the picture.

__main__.py       the command
workloads.py      what is measured: architecture, size, steps, batches
plan.py           the parts, in order, and how they are resumed
document.py       the JSON that they are kept in
sides.py          what is compared; stock.py and ours.py are the two kinds of side
bench.py          checkpoint, engines, opened sides and the float32 truth, each made when first needed
measure.py        timing in turn
comparison.py     one case on every side: seconds, ratios, share of the roofline, error of the pictures
accuracy.py       every module against float32, beside stock's error
roofline.py       what the GPU can do; work.py counts what the networks ask for
kernels.py        the kernels of one step
own_kernels.py    sdfast's own kernels beside the compiler's and the definitions, shape by shape
tick.py           the arithmetic of a tick: torch's operations, compiled, and the own kernels
first_picture.py  from the start of a process to a saved picture, and the memory that it takes
report.py         the table, and the goals
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: there is no network
