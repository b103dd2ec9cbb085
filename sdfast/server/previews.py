"""Previews: what a picture will be, as far as the step at hand tells."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdfast.loop import Rows
from sdfast.row import Row
from sdfast.schedulers.estimate import clean_estimate
from sdfast.server.work import Work


@dataclass(frozen=True)
class Before:
    """A row before the step after which its estimate is wanted, the preview's index counted from 0.

    latents: [C, h, w] float32. estimate: see `clean_estimate`.
    """

    work: Work
    preview: int
    row: Row
    latents: torch.Tensor
    estimate: tuple[float, float]

    def clean(self, rows: Rows) -> torch.Tensor:
        """What the step has told of the clean latents, [C, h, w] float32."""
        a, b = self.estimate
        return a * self.latents + b * rows.output_of(self.row)


def previews_due(works: Iterable[Work], rows: Rows, scheduler_config: Mapping[str, Any]) -> list[Before]:
    """The rows of which a preview is wanted after their next step, as they are before it."""
    due, steps = [], rows.steps
    for work in works:
        row = work.first_running
        if row in steps and work.preview_due(row, steps[row] + 1):
            estimate = clean_estimate(row.schedule, steps[row], scheduler_config)
            if estimate is not None:
                due.append(Before(work, work.next_preview(), row, rows.latents_of(row), estimate))
    return due
