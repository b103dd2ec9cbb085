"""The text encoder as an engine needs it: every hidden state and the pooled embedding of a prompt."""

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Wraps transformers' CLIPTextModel or CLIPTextModelWithProjection.

    With `final_norm` (Stable Diffusion 1.x and 2.x) each hidden state is finished by the model's last layer
    norm, so that skipping the last layers of CLIP is a matter of which state is read. SDXL reads them raw.
    """

    def __init__(self, model: Any, final_norm: bool) -> None:
        super().__init__()
        self.model = model
        self.final_norm = final_norm
        self.projected = hasattr(model, "text_projection")

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [B, 77] int64 -> hidden_states [B, layers + 1, 77, D], and the embedding [B, P] of the
        whole prompt: projected if the checkpoint has a projection (SDXL's `text_embeds`), else pooled."""
        output = self.model(input_ids, output_hidden_states=True)
        states = torch.stack(output.hidden_states, dim=1)
        if self.final_norm:
            states = _last_layer_norm(self.model)(states)
        return states, output.text_embeds if self.projected else output.pooler_output


def _last_layer_norm(model: nn.Module) -> nn.Module:
    """transformers 4 keeps it one level deeper than transformers 5 does."""
    name = next(name for name, _ in model.named_modules() if name.endswith("final_layer_norm"))
    return model.get_submodule(name)
