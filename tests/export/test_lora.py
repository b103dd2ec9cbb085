"""LoRAs merged into weights: equal to what stock diffusers and peft fuse, and to the definition."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.lora import with_loras
from sdfast.export.recipe import Recipe
from sdfast.validation import reference
from sdfast.validation.reference import reference_pipeline
from tests.export import loras
from tests.export.loras import Change, Naming, random_changes, write

RELATIVE = 1e-6
PLAIN = (4.0,)  # alphas that make nothing of them: the rank


def merged(folder: Path, *given: Any) -> Checkpoint:
    return with_loras(resolve(folder), Recipe.make(loras=given).loras)


def fused(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """What stock diffusers makes of the same LoRAs."""
    return dict(getattr(reference_pipeline(checkpoint), component).state_dict())


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def assert_same(own: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert own.keys() == truth.keys()
    for name, tensor in own.items():
        assert tensor.dtype == torch.float32
        error = (tensor.double() - truth[name].double()).norm() / truth[name].double().norm()
        assert error < RELATIVE, f"{name}: {error:.1e}"


def assert_merged(folder: Path, checkpoint: Checkpoint, changes: Iterable[Change], scale: float) -> None:
    """Own weights, stock's and the definition agree, in every tensor of every network."""
    pipe = reference_pipeline(checkpoint)
    by_component: dict[str, dict[str, Change]] = {}
    for change in changes:
        by_component.setdefault(change.component, {})[f"{change.layer}.weight"] = change
    assert by_component
    for component in checkpoint.components.keys() - {"vae"}:
        plain = loras.weights_of(folder, component)
        defined = {
            name: by_component[component][name].added_to(tensor, scale)
            if name in by_component.get(component, {})
            else tensor
            for name, tensor in plain.items()
        }
        own = bare(checkpoint.state_dict(component))
        assert_same(own, defined)
        assert_same(own, bare(getattr(pipe, component).state_dict()))
        for name in by_component.get(component, {}):  # that something was to be seen
            assert (own[name] - plain[name]).norm() > 0.01 * plain[name].norm()


@pytest.mark.parametrize(
    ("family", "naming", "layers", "alphas"),
    [
        ("sd", loras.peft, loras.EVERY_KIND, PLAIN),
        ("sdxl", loras.peft, loras.EVERY_KIND, PLAIN),
        ("sd", loras.diffusers, loras.EVERY_KIND, PLAIN),
        ("sdxl", loras.diffusers, loras.ATTENTION, PLAIN),
        ("sd", loras.processors, loras.ATTENTION, PLAIN),
        pytest.param("sd", loras.kohya, loras.EVERY_KIND, (1.0,), marks=pytest.mark.slow),
        ("sd", loras.kohya, loras.EVERY_KIND, (1.0, 1.0, 3.0)),
        pytest.param("sdxl", loras.kohya_xl, loras.EVERY_KIND, (8.0,), marks=pytest.mark.slow),
        ("sdxl", loras.kohya_xl, loras.EVERY_KIND, (2.0, 8.0, 8.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_format(
    family: str,
    naming: Naming,
    layers: str,
    alphas: tuple[float, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    ranks = (4,) if alphas == PLAIN else (4, 2)
    changes = random_changes(folder, layers, alphas=alphas, ranks=ranks)
    file = write(tmp_path / "lora.safetensors", changes, naming)
    assert_merged(folder, merged(folder, {"source": file, "scale": -0.7}), changes, -0.7)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_files_that_diffusers_saved(
    family: str, dora: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With PEFT's config in the header: alphas by pattern, rsLoRA, magnitudes."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = request.getfixturevalue(f"tiny_{family}")
    pipe = reference_pipeline(resolve(folder))
    configs = {
        "unet": LoraConfig(
            r=4,
            lora_alpha=2,
            use_dora=dora,
            target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj"],
            alpha_pattern={"to_q": 3.0, "down_blocks.1.resnets.0.conv1": 7},
            rank_pattern={"conv1": 2},
        ),
        "text_encoder": LoraConfig(
            r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "fc1", "out_proj"]
        ),
    }
    for name, config in configs.items():
        network = getattr(pipe, name)
        network.add_adapter(config, "own")
        for parameter_name, parameter in network.named_parameters():
            if "lora_" in parameter_name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    layers = {
        f"{n}_lora_layers": get_peft_model_state_dict(getattr(pipe, n), adapter_name="own") for n in configs
    }
    metadata = {f"{name}_lora_adapter_metadata": config.to_dict() for name, config in configs.items()}
    type(pipe).save_lora_weights(tmp_path / "lora", **layers, **metadata)

    checkpoint = merged(folder, {"source": tmp_path / "lora", "scale": 0.6})
    truth, plain = reference_pipeline(checkpoint), resolve(folder)
    for name in configs:
        own, before = bare(checkpoint.state_dict(name)), bare(plain.state_dict(name))
        assert_same(own, bare(getattr(truth, name).state_dict()))
        assert sum(not torch.equal(own[n], before[n]) for n in own) == sum(
            "lora_A" in n for n in layers[f"{name}_lora_layers"]
        )


def test_several_add_up_and_one_of_scale_0_is_nothing(tiny_sd: Path, tmp_path: Path) -> None:
    first = random_changes(tiny_sd, components=["unet"], seed=1)
    second = random_changes(tiny_sd, loras.ATTENTION, ranks=(2,), seed=2)
    files = [
        write(tmp_path / "first.safetensors", first, loras.kohya),
        write(tmp_path / "second.safetensors", second, loras.kohya),
    ]
    given = [{"source": files[0], "scale": 0.5}, {"source": files[1]}, {"source": files[0], "scale": 0.0}]
    checkpoint = merged(tiny_sd, *given)
    truth = reference_pipeline(checkpoint)
    for component in ("unet", "text_encoder"):
        defined = loras.weights_of(tiny_sd, component)
        for changes, scale in ((first, 0.5), (second, 1.0)):
            for change in (change for change in changes if change.component == component):
                name = f"{change.layer}.weight"
                defined[name] = change.added_to(defined[name], scale).float()
        own = bare(checkpoint.state_dict(component))
        assert_same(own, defined)
        assert_same(own, bare(getattr(truth, component).state_dict()))


def test_what_no_lora_touches_stays_where_it_lies(tiny_sd: Path, tmp_path: Path) -> None:
    """The rest are views of the mapped file, as without LoRAs."""
    changes = random_changes(tiny_sd, r"mid_block.*attn1\.to_q$", components=["unet"])
    checkpoint = merged(tiny_sd, write(tmp_path / "lora.safetensors", changes, loras.peft))
    assert list(checkpoint.loras[0].parts) == ["unet"]
    plain, own = resolve(tiny_sd).state_dict("unet"), checkpoint.state_dict("unet")
    assert [name for name in own if not torch.equal(own[name], plain[name])] == [
        f"{change.layer}.weight" for change in changes
    ]


def test_half_weights_are_merged_in_float32(tiny_sd: Path, tmp_path: Path) -> None:
    """And rounded once, by the engine."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "half"))
    for path in [*(folder / "unet").glob("*.safetensors"), *(folder / "text_encoder").glob("*.safetensors")]:
        save_file({n: t.half() for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    changes = random_changes(folder, loras.ATTENTION)
    checkpoint = merged(folder, write(tmp_path / "lora.safetensors", changes, loras.kohya))
    pipe = reference_pipeline(checkpoint)
    for component in ("unet", "text_encoder"):
        own, plain = bare(checkpoint.state_dict(component)), loras.weights_of(folder, component)
        truth = bare(getattr(pipe, component).state_dict())
        for change in (change for change in changes if change.component == component):
            name = f"{change.layer}.weight"
            defined = {name: change.added_to(plain[name], 1.0)}
            assert_same({name: own[name]}, defined)
            assert_same({name: own[name]}, {name: truth[name]})
        assert {own[name].dtype for name in own if name.endswith("bias")} == {torch.float16}


# ---------------------------------------------------------------- what is refused

Tensors = dict[str, Tensor]
TRANSFORMER = "a model with a transformer, such as Flux or SD3"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def kohya_tensors(folder: Path) -> Tensors:
    changes = random_changes(folder, r"mid_block.*attn1\.to_(q|k)$", components=["unet"])
    return {name: tensor for change in changes for name, tensor in loras.kohya(change).items()}


def refused(folder: Path, *given: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        merged(folder, *given)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{KOHYA}.lora_down.weight": None},
            f"{KOHYA}.alpha has no partner: the down matrix of mid_block.a",
        ),
        (
            {f"{KOHYA}.lora_up.weight": None},
            f"{KOHYA}.alpha has no partner: the up matrix of mid_block.attent",
        ),
        ({f"{KOHYA}.alpha": None}, f"{KOHYA}.lora_down.weight has no alpha, and 1 other layers have one"),
        ({f"{KOHYA}.alpha": torch.tensor(0.0)}, f"{KOHYA}.alpha is not a number other than 0"),
        ({f"{KOHYA}.alpha": torch.tensor(torch.inf)}, f"{KOHYA}.alpha is not a number other than 0"),
        ({f"{KOHYA}.alpha": torch.ones(2)}, f"{KOHYA}.alpha is not a number other than 0"),
        (
            {f"{KOHYA}.lora_up.weight": torch.full((64, 4), torch.nan)},
            "lora_up.weight holds numbers that are not",
        ),
        (
            {f"{KOHYA}.lora_up.weight": torch.ones(64, 4).long()},
            "lora_up.weight is torch.int64; floating point",
        ),
        (
            {f"{KOHYA}.lora_up.weight": torch.ones(64, 3)},
            "[64, 3], and the layer's weight [64, 64] needs [64, ran",
        ),
        (
            {f"{KOHYA}.lora_down.weight": torch.ones(4, 63)},
            "has shape [4, 63], and the layer's weight [64, 64] ne",
        ),
        ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64, 1, 1)}, "needs [rank, 64]"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(())}, "has shape [], and"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(0, 64)}, "has shape [0, 64], and"),
        (
            {"lora_unet_no_such_layer.alpha": torch.ones(())},
            "lora_unet_no_such_layer.alpha meets no layer of the",
        ),
        (
            {"lora_te_text_model_embeddings_token_embedding.alpha": torch.ones(())},
            "meets no layer of the text_enc",
        ),
        (
            {"unet.conv_in.weight": torch.ones(1)},
            "unet.conv_in.weight is none of the names that LoRAs of Stable D",
        ),
        ({"x": torch.ones(1), "y": torch.ones(1)}, "x (and 1 more) is none of the names"),
        (
            {f"{PEFT}.lora_A.weight": torch.ones(4, 64)},
            f"{KOHYA}.lora_down.weight and {PEFT}.lora_A.weight are both",
        ),
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
            "is for text_encoder_2, which",
        ),
        (
            {f"{KOHYA}.hada_w1_a": torch.ones(1)},
            f"{KOHYA}.hada_w1_a belongs to LoHa, of LyCORIS, which is not supp",
        ),
        ({f"{KOHYA}.lokr_w1": torch.ones(1)}, "belongs to LoKr, of LyCORIS"),
        ({f"{KOHYA}.lora_mid.weight": torch.ones(1)}, "belongs to a LoCon with a third matrix (lora_mid)"),
        ({f"{KOHYA}.dora_scale": torch.ones(64, 1)}, "belongs to DoRA in kohya's naming"),
        ({f"{PEFT}.lora_B.bias": torch.ones(64)}, "belongs to biases (lora_bias)"),
        ({f"{KOHYA}.diff": torch.ones(1)}, "belongs to whole differences (diff)"),
        ({"bundle_emb.x.string_to_param.*": torch.ones(1)}, "belongs to textual inversion"),
    ],
)
def test_tensors_that_mean_nothing(
    tiny_sd: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**kohya_tensors(tiny_sd), **change}
    file = tmp_path / "style.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    said = refused(tiny_sd, file)
    assert message in said
    assert said.startswith(f"LoRA {file}: ")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "its lora_adapter_metadata cannot be read as JSON"),
        ("[]", "its lora_adapter_metadata is not a JSON object"),
        ('{"unet.lora_alpha": "8"}', "has unet.lora_alpha = '8'"),
        ('{"unet.lora_alpha": NaN}', "has unet.lora_alpha = nan"),
        ('{"unet.alpha_pattern": {"(a+)+": 1}}', "has unet.alpha_pattern = {'(a+)+': 1}"),
        (
            '{"unet.init_lora_weights": "pissa"}',
            "has unet.init_lora_weights = 'pissa', which is not supported",
        ),
        ('{"unet.use_qalora": true}', "has unet.use_qalora = True, which is not supported"),
        ('{"unet.use_dora": true}', "0 of 1 layers of the unet have a magnitude (DoRA), and 1 should"),
    ],
)
def test_configs_that_ask_for_something_else(
    tiny_sd: Path, tmp_path: Path, metadata: str, message: str
) -> None:
    changes = random_changes(tiny_sd, r"mid_block.*attn1\.to_q$", components=["unet"])
    tensors = {name: tensor for change in changes for name, tensor in loras.peft(change).items()}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": metadata})
    assert message in refused(tiny_sd, tmp_path / "lora.safetensors")


def test_magnitudes_for_some_layers_only(tiny_sd: Path, tmp_path: Path) -> None:
    changes = random_changes(tiny_sd, r"mid_block.*attn1\.to_(q|k)$", components=["unet"])
    tensors = {name: tensor for change in changes for name, tensor in loras.peft(change).items()}
    save_file(tensors | {f"{PEFT}.lora_magnitude_vector": torch.ones(64)}, tmp_path / "lora.safetensors")
    assert "1 of 2 layers of the unet have a magnitude" in refused(tiny_sd, tmp_path / "lora.safetensors")
    save_file(tensors | {f"{PEFT}.lora_magnitude_vector": torch.ones(3)}, tmp_path / "lora.safetensors")
    assert "has shape [3], and the layer has 64 outputs" in refused(tiny_sd, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (
            {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": 2048},
            "SDXL",
        ),
        (
            {"unet.down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": 1024},
            "SD 2.x",
        ),
        ({"unet.mid_block.attentions.9.attn2.processor.to_v_lora.down.weight": 768}, "SD 1.x"),
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": 1280}, "SDXL"),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": 3072},
            TRANSFORMER,
        ),
        (
            {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": 3072},
            TRANSFORMER,
        ),
    ],
)
def test_loras_for_other_models_are_told_apart(
    tiny_sd: Path, tmp_path: Path, names: dict[str, int], looks: str
) -> None:
    save_file({name: torch.ones(4, width) for name, width in names.items()}, tmp_path / "lora.safetensors")
    said = refused(tiny_sd, tmp_path / "lora.safetensors")
    here = "the checkpoint is of models with 32 numbers a token of the prompt"
    assert f"; it looks like a LoRA for {looks}, and {here}" in said


def test_a_sum_beyond_float32(tiny_sd: Path, tmp_path: Path) -> None:
    save_file(kohya_tensors(tiny_sd), tmp_path / "lora.safetensors")
    checkpoint = merged(tiny_sd, {"source": tmp_path / "lora.safetensors", "scale": 1e39})
    with pytest.raises(CheckpointError, match=r"scale 1e\+39 into unet's mid_block.*not finite"):
        checkpoint.state_dict("unet")


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin"])
def test_pickles(tiny_sd: Path, tmp_path: Path, suffix: str) -> None:
    """Of whatever content, by their names."""
    (tmp_path / f"lora.{suffix}").write_bytes(b"x")
    assert f"lora.{suffix}: is a pickle. sdfast reads safetensors only" in refused(
        tiny_sd, tmp_path / f"lora.{suffix}"
    )
    assert f"holds no .safetensors file, but a pickle (lora.{suffix})" in refused(tiny_sd, tmp_path)
    assert "lora.pt: is a pickle" in refused(tiny_sd, {"source": tmp_path, "weight_name": "lora.pt"})


def test_files_that_are_not_safetensors(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"x" * 100)
    assert "is truncated, or not safetensors" in refused(tiny_sd, tmp_path / "lora.safetensors")
    save_file({}, tmp_path / "lora.safetensors")
    assert "holds no tensors" in refused(tiny_sd, tmp_path / "lora.safetensors")
    (tmp_path / "lora.txt").write_bytes(b"x")
    assert "is not a LoRA; give a .safetensors file" in refused(tiny_sd, tmp_path / "lora.txt")


def test_which_file_of_a_folder(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no .safetensors file, and is no LoRA" in refused(tiny_sd, folder)
    for name in ("b", "a"):
        save_file(kohya_tensors(tiny_sd), folder / f"{name}.safetensors")
    assert "holds a.safetensors, b.safetensors; say which with weight_name" in refused(tiny_sd, folder)
    assert "holds no c.safetensors; it holds a.s" in refused(
        tiny_sd, {"source": folder, "weight_name": "c.safetensors"}
    )
    assert "holds no ../x.safetensors" in refused(
        tiny_sd, {"source": folder, "weight_name": "../x.safetensors"}
    )
    named = merged(tiny_sd, {"source": folder, "weight_name": "b.safetensors"})
    assert named.loras[0].path == folder / "b.safetensors"
    save_file(kohya_tensors(tiny_sd), folder / "pytorch_lora_weights.safetensors")
    assert merged(tiny_sd, folder).loras[0].file == "pytorch_lora_weights.safetensors"
    assert "is a LoRA's folder, for which revision has no meaning" in refused(
        tiny_sd, {"source": folder, "revision": "main"}
    )
    assert "is a LoRA's file, for which weight_name has no meaning" in refused(
        tiny_sd, {"source": folder / "a.safetensors", "weight_name": "a.safetensors"}
    )
    assert "a LoRA is a .safetensors file, a folder that holds one, or a Hub id" in refused(tiny_sd, "no")


def test_without_peft_there_is_no_reference(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(kohya_tensors(tiny_sd), tmp_path / "lora.safetensors")
    checkpoint = merged(tiny_sd, tmp_path / "lora.safetensors")
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"needs peft for LoRA .*lora\.safetensors: pip install"):
        reference_pipeline(checkpoint)


def test_what_diffusers_does_not_load_has_no_reference(tiny_sd: Path, tmp_path: Path) -> None:
    """Kohya's names after the original layout, which diffusers knows of SDXL alone."""
    changes = random_changes(tiny_sd, r"mid_block.*attn1\.to_q$", components=["unet"])
    checkpoint = merged(tiny_sd, write(tmp_path / "lora.safetensors", changes, loras.kohya_xl))
    with pytest.raises(CheckpointError, match="so there is no reference"):
        reference_pipeline(checkpoint)
