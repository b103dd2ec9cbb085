"""Where a prompt ends, and the state there: what transformers takes, on every way to compute it."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdfast.errors import CheckpointError
from sdfast.models.text import LEGACY_EOS, TextEncoder, prompt_end
from tests.models.conftest import randomise

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = [CLIPTextModel, CLIPTextModelWithProjection]


def model(kind, eos):
    config = CLIPTextConfig(**SIZES, vocab_size=100, projection_dim=24, bos_token_id=98, eos_token_id=eos)
    return randomise(kind(config))


def prompts(eos):
    """Random ids in which eos stands first, last, once, up to nine times, all over, and nowhere in some."""
    ids = torch.randint(3, 90, (40, 77), generator=torch.Generator().manual_seed(0))
    for row in range(36):
        places = torch.randperm(77, generator=torch.Generator().manual_seed(row))[: row % 9 + 1]
        ids[row, places] = eos
    ids[36], ids[37, 0], ids[38, -1], ids[39, 20:] = eos, eos, eos, eos
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos", [99, 40, LEGACY_EOS])
def test_the_pooled_state_is_transformers(kind, eos):
    """40: other ids are larger. 2: the largest id ends the prompt, and several are the largest."""
    theirs = model(kind, eos)
    ids = prompts(99 if eos == LEGACY_EOS else eos)
    ids[:3] = ids[:3].clamp(max=50)  # without 99: the largest of 77 ids that often are the same
    output = theirs(ids)
    pooled = TextEncoder(theirs, final_norm=True)(ids)[1]
    assert torch.equal(pooled, output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output)
    marks = ids if eos == LEGACY_EOS else (ids == eos).int()
    assert torch.equal(prompt_end(ids, eos), marks.argmax(dim=-1))
    assert len(prompt_end(ids, eos).unique()) > 10


@pytest.mark.parametrize("first", [49400, 56900])
def test_the_ends_of_clips_own_ids_are_exact(first):
    """The largest ids that CLIP has, and those of a hundred embeddings behind them, side by side: neighbours
    at the far end of what float32 tells apart."""
    ids = torch.randint(first, first + 8, (500, 77), generator=torch.Generator().manual_seed(1))
    ids[:, ::9] = torch.randint(49400, 49408, (500, 9), generator=torch.Generator().manual_seed(2))
    for eos in (49407, LEGACY_EOS):
        marks = ids if eos == LEGACY_EOS else (ids == eos).int()
        assert torch.equal(prompt_end(ids, eos), marks.argmax(dim=-1))


def test_a_prompt_without_an_end_is_read_at_its_start():
    assert prompt_end(torch.tensor([[5, 6, 7]]), 99).tolist() == [0]


def test_a_config_without_one_end_is_refused():
    theirs = model(CLIPTextModel, 99)
    theirs.config.eos_token_id = None
    with pytest.raises(CheckpointError, match="eos_token_id None; give the id of one token"):
        TextEncoder(theirs, final_norm=True)
