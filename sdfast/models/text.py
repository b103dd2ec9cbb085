"""The text encoder as an engine needs it: every hidden state and the pooled embedding of a prompt."""

from typing import Any

import torch
from torch import Tensor, nn

from sdfast.errors import CheckpointError
from sdfast.models.lora import Choosing, RowScales

LEGACY_EOS = 2  # what old configs say in error: transformers takes the largest id for the end of the prompt


class TextEncoder(Choosing):
    """Wraps transformers' CLIPTextModel or CLIPTextModelWithProjection.

    With `final_norm` (Stable Diffusion 1.x and 2.x) each hidden state is finished by the model's last layer
    norm, so that skipping the last layers of CLIP is a matter of which state is read. SDXL reads them raw.

    The pooled state is taken here and not by the model, which looks for it among integers: ONNX Runtime's
    CUDA provider has no kernel for that, so a graph of the model's own would go over the processor.

    loras: what the branches of its layers are told by, where LoRAs change some, see `lora`.

    Raises `CheckpointError` for a model whose config names no one end-of-text token.
    """

    def __init__(self, model: Any, final_norm: bool, loras: RowScales | None = None) -> None:
        super().__init__()
        self.loras = loras
        self.model = model
        self.final_norm = final_norm
        self.projected = hasattr(model, "text_projection")
        self.eos = model.config.eos_token_id
        if not isinstance(self.eos, int):
            raise CheckpointError(
                f"the text encoder's config has eos_token_id {self.eos!r}; give the id of one token, "
                "for CLIP 49407"
            )

    def forward(self, input_ids: Tensor, loras: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input_ids [B, 77] int64 -> hidden_states [B, layers + 1, 77, D], and the embedding [B, P] of the
        whole prompt: projected if the checkpoint has a projection (SDXL's `text_embeds`), else pooled.

        loras [B or 1, n] float32: how much of each LoRA is added, where one changes its layers."""
        self._told(loras, next(self.model.parameters()).dtype)
        output = self.model(input_ids, output_hidden_states=True)
        states = torch.stack(output.hidden_states, dim=1)
        if self.final_norm:
            states = _last_layer_norm(self.model)(states)
        last = output.last_hidden_state
        rows = torch.arange(last.shape[0], device=last.device)  # len() would tie a graph to the example's
        pooled = last[rows, prompt_end(input_ids, self.eos)]
        return states, self.model.text_projection(pooled) if self.projected else pooled


def prompt_end(input_ids: Tensor, eos: int) -> Tensor:
    """input_ids [B, L] int64 -> the position [B] int64 of each prompt's end.

    That of the first `eos`, or 0 where there is none; for `LEGACY_EOS` that of the first of the largest ids,
    which are an embedding's where the prompt has one: its pooled state is then taken there, as by diffusers.
    The same as transformers', found among float32 numbers that are all different: whole ones below
    (largest id + 1) · L, which for CLIP is 3.8 million, and exact up to 16.7 million.
    """
    length = input_ids.shape[1]
    marks = input_ids if eos == LEGACY_EOS else input_ids == eos
    after = torch.arange(length - 1, -1, -1, device=input_ids.device)  # the first of equals is the largest
    return (marks.float() * length + after.float()).argmax(dim=-1)


def _last_layer_norm(model: nn.Module) -> nn.Module:
    """transformers 4 keeps it one level deeper than transformers 5 does."""
    name = next(name for name, _ in model.named_modules() if name.endswith("final_layer_norm"))
    return model.get_submodule(name)
