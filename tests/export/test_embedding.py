"""Embeddings in the text encoders' tables, as stock diffusers puts them there; what does not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.embedding import with_embeddings
from sdfast.export.loading import load_text_model
from sdfast.export.recipe import Recipe
from sdfast.validation.reference import reference_pipeline
from tests.export import embeddings
from tests.export.embeddings import automatic1111, diffusers, for_sdxl, vectors


def given(folder: Path, *found: Any) -> Checkpoint:
    return with_embeddings(resolve(folder), Recipe.make(embeddings=found).embeddings)


def table(checkpoint: Checkpoint, component: str) -> Tensor:
    return next(
        tensor
        for name, tensor in checkpoint.state_dict(component).items()
        if name.endswith("token_embedding.weight")
    )


def assert_tables_are_stocks(checkpoint: Checkpoint) -> None:
    pipe = reference_pipeline(checkpoint)
    for component in checkpoint.embeddings[0].first:
        truth = getattr(pipe, component).get_input_embeddings().weight
        assert torch.equal(table(checkpoint, component), truth)
        assert len(truth) == checkpoint.components[component].config["vocab_size"]
    assert "unet" not in checkpoint.embeddings[0].first


def test_every_form_has_the_rows_that_stock_gives_it(tiny_sd: Path, tmp_path: Path) -> None:
    checkpoint = given(
        tiny_sd,
        automatic1111(tmp_path / "EasyNegative.safetensors", 5, seed=1),
        diffusers(tmp_path / "one.safetensors", "<cat-toy>", 1, seed=2),
        {"source": diffusers(tmp_path / "some.safetensors", "<style>", 2, seed=3), "token": "Ölbild"},
    )
    told = [(one.token, one.vectors) for one in checkpoint.embeddings]
    assert told == [("EasyNegative", 5), ("<cat-toy>", 1), ("Ölbild", 2)]
    own = vectors(5, seed=1), vectors(1, seed=2), vectors(2, seed=3)
    assert torch.equal(table(checkpoint, "text_encoder")[-8:], torch.cat(own))
    assert_tables_are_stocks(checkpoint)


def test_a_file_for_sdxl_goes_into_both_encoders(tiny_sdxl: Path, tmp_path: Path) -> None:
    checkpoint = given(
        tiny_sdxl,
        for_sdxl(tmp_path / "a.b.safetensors", 3, seed=1),
        for_sdxl(tmp_path / "other.safetensors", 1, seed=2),
    )
    assert [one.token for one in checkpoint.embeddings] == ["a.b", "other"]
    for component, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        width = embeddings.WIDTHS[name]
        own = torch.cat([vectors(3, width, seed=1), vectors(1, width, seed=2)])
        assert torch.equal(table(checkpoint, component)[-4:], own)
    assert_tables_are_stocks(checkpoint)


def test_a_table_of_more_rows_than_tokens_ends_as_stocks_does(tiny_sd: Path, tmp_path: Path) -> None:
    """Some are padded to a round number of rows, which no token means."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "padded"))
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    rows = len(weights[name])
    weights[name] = torch.cat([weights[name], torch.full((9, 32), 7.0)])
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {rows}', f'"vocab_size": {rows + 9}'))
    checkpoint = given(folder, automatic1111(tmp_path / "zq.safetensors", 2))
    assert checkpoint.embeddings[0].first == {"text_encoder": rows}
    assert_tables_are_stocks(checkpoint)


def test_a_folder_with_the_file_that_diffusers_saves(tiny_sd: Path, tmp_path: Path) -> None:
    automatic1111(tmp_path / "zq.safetensors", 1)
    (tmp_path / "learned_embeds.bin").write_bytes(b"")
    diffusers(tmp_path / "learned_embeds.safetensors", "<toy>", 1)
    (found,) = given(tiny_sd, tmp_path).embeddings
    assert (found.file, found.token) == ("learned_embeds.safetensors", "<toy>")
    (found,) = given(tiny_sd, {"source": tmp_path, "weight_name": "zq.safetensors"}).embeddings
    assert (found.file, found.token) == ("zq.safetensors", "zq")


def test_half_precision_holds_them_rounded(tiny_sd: Path, tmp_path: Path) -> None:
    file = automatic1111(tmp_path / "zq.safetensors", 2)
    model = load_text_model(given(tiny_sd, file), "text_encoder", torch.float16)
    assert torch.equal(model.get_input_embeddings().weight[-2:], vectors(2).half())


Written = Callable[[Path], object]


def saved(**tensors: Tensor) -> Written:
    return lambda path: save_file(tensors, path)


REFUSED: dict[str, tuple[str, Written, str]] = {
    "another width": ("sd", saved(emb_params=torch.ones(2, 768)), "width 768, .* takes 32; .*SD 1.x; give"),
    "a width of none": ("sd", saved(emb_params=torch.ones(2, 33)), "takes 32; give one made for this"),
    "for SDXL": ("sd", lambda path: for_sdxl(path, 2), "is for SDXL, and the checkpoint is not"),
    "half for SDXL": ("sdxl", saved(clip_l=torch.ones(2, 32)), "holds clip_l, and one .* clip_g and clip_l"),
    "for SD": (
        "sdxl",
        lambda path: automatic1111(path, 2),
        "those for SDXL are for two",
    ),
    "swapped": (
        "sdxl",
        saved(clip_l=torch.ones(2, 48), clip_g=torch.ones(2, 32)),
        "clip_l has vectors of width 48, and the text_encoder of .* takes 32",
    ),
    "unequal": (
        "sdxl",
        saved(clip_l=torch.ones(2, 32), clip_g=torch.ones(3, 48)),
        "has 2 and 3 vectors for the two text encoders",
    ),
    "several": ("sd", saved(a=torch.ones(2, 32), b=torch.ones(2, 32)), "holds a, b; an embedding is one"),
    "nothing": ("sd", saved(), "holds no tensors; an embedding is one tensor"),
    "no vectors": (
        "sd",
        saved(zq=torch.ones(0, 32)),
        r"zq has shape \[0, 32\]; vectors have \[number, width",
    ),
    "three axes": ("sd", saved(zq=torch.ones(1, 2, 32)), r"zq has shape \[1, 2, 32\]"),
    "too many": ("sd", lambda path: automatic1111(path, 76), "has 76 vectors, .* has room for 75"),
    "NaN": ("sd", saved(zq=torch.full((2, 32), torch.nan)), "zq holds numbers that are not finite"),
    "infinite": ("sd", saved(zq=torch.tensor([[1.0] * 31 + [torch.inf]])), "not finite"),
    "whole numbers": ("sd", saved(zq=torch.ones(2, 32, dtype=torch.int32)), "zq is torch.int32; floating"),
    "a pickle's tensor": ("sd", lambda path: path.write_bytes(b"\x80\x02"), "truncated, or not safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family, write, reason = REFUSED[case]
    path = tmp_path / "zq.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        given(request.getfixturevalue(f"tiny_{family}"), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("my cat", "holds a space"),
        ("cat\n", "what cannot be shown"),
        ("cat\N{ZERO WIDTH SPACE}", "what cannot be shown"),
        ("(cat)", r"holds \(, of which prompts have another use"),
        ("[cat", r"holds \["),
        ("cat:2", "holds :"),
        ("a|b", r"holds \|"),
        ("cat\\", r"holds \\"),
        ("sea", "is one of .*'s own"),
        ("Cabin", "is one of .*'s own"),
        ("th", "is one of .*'s own"),
        ("<|endoftext|>", r"holds \|"),
        ("easynegative", "cannot be told from EasyNegative, that of"),
        ("EasyNegative_2", "cannot be told from EasyNegative, that of"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(
    tiny_sd: Path, tmp_path: Path, token: str, reason: str
) -> None:
    first = automatic1111(tmp_path / "EasyNegative.safetensors", 3)
    second = {"source": automatic1111(tmp_path / "zq.safetensors", 1), "token": token}
    with pytest.raises(CheckpointError, match=rf"zq\.safetensors: its token .*{reason}.*SOURCE=TOKEN"):
        given(tiny_sd, first, second)


def test_a_token_that_reads_as_a_second_vector_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    """Of one vector; stock would take both for one embedding of two."""
    files = [automatic1111(tmp_path / f"{name}.safetensors", 1) for name in ("zq", "zq_1", "zq_2")]
    with pytest.raises(CheckpointError, match="'zq_1' cannot be told from zq"):
        given(tiny_sd, *files[:2])
    with pytest.raises(CheckpointError, match="'zq' cannot be told from zq_1"):
        given(tiny_sd, files[1], files[0])
    assert len(given(tiny_sd, files[0], files[2]).embeddings) == 2


def test_as_many_vectors_as_a_prompt_has_room_for(tiny_sd: Path, tmp_path: Path) -> None:
    assert given(tiny_sd, automatic1111(tmp_path / "zq.safetensors", 75)).embeddings[0].vectors == 75


@pytest.mark.parametrize(
    ("name", "setting", "reason"),
    [
        ("zq.pt", {}, r"zq\.pt: is a pickle\. sdfast reads safetensors only"),
        ("learned_embeds.bin", {}, r"learned_embeds\.bin: is a pickle"),
        ("zq.txt", {}, "is not an embedding; give a .safetensors file"),
        ("zq.safetensors", {"weight_name": "a"}, "is an embedding's file, for which weight_name has no"),
    ],
)
def test_what_is_no_such_file_is_refused(
    tiny_sd: Path, tmp_path: Path, name: str, setting: dict[str, str], reason: str
) -> None:
    automatic1111(tmp_path / "whole.safetensors", 1).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=reason):
        given(tiny_sd, {"source": tmp_path / name, **setting})
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"no such file|not a Hub id"):
        given(tiny_sd, {"source": tmp_path / name})


def test_a_folder_of_several_asks_which(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file, and is no embedding"):
        given(tiny_sd, tmp_path)
    for name in "ab":
        automatic1111(tmp_path / f"{name}.safetensors", 1)
    with pytest.raises(
        CheckpointError, match=r"say which with weight_name, in a recipe's \[\[embeddings\]\]"
    ):
        given(tiny_sd, tmp_path)


def test_a_tokenizer_that_is_not_the_encoders_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "mixed"))
    config = folder / "text_encoder" / "config.json"
    rows = resolve(folder).components["text_encoder"].config["vocab_size"]
    config.write_text(config.read_text().replace(f'"vocab_size": {rows}', f'"vocab_size": {rows - 1}'))
    with pytest.raises(CheckpointError, match=rf"has {rows} tokens, and its text_encoder knows {rows - 1}"):
        given(folder, automatic1111(tmp_path / "zq.safetensors", 1))
