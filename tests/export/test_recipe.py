"""Recipes: what they say, and everything that can be wrong with one in one line."""

from pathlib import Path
from typing import Any

import pytest

from sdfast.errors import ExportError
from sdfast.export.recipe import EmbeddingSetting, LoraSetting, Recipe
from sdfast.manifest import Span

FREE = {"min": "64x64", "max": "128x128"}
RECIPES = sorted((Path(__file__).parents[2] / "export").glob("*.toml"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch: must be greater than or equal to 1 (got 0)"),
        ({"batch": -1}, "batch: must be greater"),
        ({"batch": 10**9}, "batch: must be less than or equal to 128"),
        ({"batch": "4"}, "batch: must be a valid integer (got '4')"),
        ({"batch": True}, "batch: must be a valid integer (got True)"),
        ({"batch": 4.0}, "batch: must be a valid integer"),
        ({"batch": []}, "batch: give at least one number"),
        ({"batch": [1, 0]}, "batch: must be greater"),
        ({"batch": [1, "2"]}, "batch: must be a valid integer (got '2')"),
        ({"sizes": []}, "sizes: "),
        ({"sizes": "512x512"}, "sizes: must be a list (got '512x512')"),
        ({"sizes": ["512"]}, "sizes: must be WIDTHxHEIGHT in pixels, such as '512x512' (got '512')"),
        (
            {"sizes": ["512x512", "0x512"]},
            "sizes: sides are multiples of 8 from 8 to 8192 pixels (got '0x512')",
        ),
        ({"sizes": ["12x12"]}, "sizes: sides are multiples of 8 from 8 to 8192 pixels (got '12x12')"),
        ({"sizes": ["-8x8"]}, "sizes: must be WIDTHxHEIGHT"),
        ({"sizes": ["99999x8"]}, "sizes: sides are"),
        ({"sizes": ["9" * 5000 + "x8"]}, "sizes: "),
        ({"sizes": [512]}, "sizes: must be a valid string"),
        ({"sizes": {"min": "64x64"}}, "sizes: 'max' is missing"),
        ({"sizes": {"min": "65x64", "max": "128x128"}}, "sizes: sides are"),
        ({"sizes": {"min": "128x64", "max": "64x128"}}, "sizes: min '128x64' is larger than max"),
        (
            {"sizes": {"min": "64x64", "max": "128x128", "mid": "1"}},
            "sizes: unknown field 'mid'; there are: min",
        ),
        ({"dtype": "int8"}, "dtype: must be 'fp32' or 'fp16' (got 'int8')"),
        ({"backend": "tensorrt"}, "backend: must be 'onnx', 'inductor' or 'eager'"),
        ({"provider": "rocm"}, "provider: must be 'cpu', 'cuda' or 'tensorrt' (got 'rocm')"),
        (
            {"backend": "eager", "provider": "cuda"},
            "provider: only the onnx backend has providers; for eager, leave it out (got 'cuda')",
        ),
        (
            {"backend": "inductor", "provider": "cuda"},
            "provider: only the onnx backend has providers; for inductor, give device instead (got 'cuda')",
        ),
        (
            {"device": "cuda"},
            "device: only the inductor backend compiles for a device; for onnx, give provider instead",
        ),
        (
            {"backend": "eager", "device": "cpu"},
            "device: only the inductor backend compiles for a device; for eager, name it when the engine is",
        ),
        ({"backend": "jax", "device": "cpu", "provider": "cpu"}, "backend: must be 'onnx', 'inductor' or"),
        ({"kernels": "own", "backend": "inductor"}, "kernels: must be 'auto' or 'compiler' (got 'own')"),
        (
            {"kernels": "compiler"},
            "kernels: only the inductor backend chooses kernels; leave it out (got 'compiler')",
        ),
        (
            {"kernels": "auto", "backend": "inductor", "device": "cpu", "dtype": "fp16"},
            "kernels: sdfast's own are for device cuda; leave it out (got 'auto')",
        ),
        (
            {"kernels": "auto", "backend": "inductor", "dtype": "fp16", "autotune": False},
            "kernels: sdfast's own are tried by autotuning, which is off; leave one of the two out",
        ),
        (
            {"kernels": "auto", "backend": "inductor", "dtype": "fp16", "sizes": FREE},
            "kernels: sdfast's own are tried for fixed sizes; give these as a list, or leave it out",
        ),
        ({"autotune": True}, "autotune: only the inductor backend times candidates; leave it out (got True)"),
        ({"autotune": False, "backend": "eager"}, "autotune: only the inductor backend times candidates"),
        (
            {"autotune": True, "backend": "inductor"},
            "autotune: on a CPU it tries the kernels for attention, and those for fixed sizes and batches",
        ),
        (
            {"autotune": True, "backend": "inductor", "sizes": FREE, "batch": [1]},
            "autotune: on a CPU it tries the kernels for attention, and those for fixed sizes and batches",
        ),
        (
            {"winograd": True, "dtype": "fp16"},
            "winograd: only graphs for the CPU have it: backend onnx, provider cpu; leave it out (got True)",
        ),
        ({"winograd": False, "backend": "inductor"}, "winograd: only graphs for the CPU have it"),
        ({"long_prompts": False}, "long_prompts: onnx engines take long prompts anyway; leave it out"),
        ({"long_prompts": True, "backend": "eager"}, "long_prompts: eager engines take long prompts"),
        (
            {"vae_dtype": "auto"},
            "vae_dtype: only fp16 engines choose it, and this one is fp32 as a whole; leave it out",
        ),
        ({"vae_dtype": "fp32", "backend": "eager"}, "vae_dtype: only fp16 engines choose it"),
        (
            {"backend": "jax", "autotune": True, "kernels": "auto", "winograd": True, "vae_dtype": "auto"},
            "backend: must be 'onnx', 'inductor' or 'eager' (got 'jax')",
        ),
        ({"provider": "rocm", "winograd": True}, "provider: must be 'cpu', 'cuda' or 'tensorrt'"),
        ({"fp8": "yes please"}, "fp8: must be a valid boolean"),
        (
            {"fp8": True},
            "fp8: the onnx backend has none; take backend inductor, or eager for checks (got True)",
        ),
        (
            {"fp8": True, "backend": "eager"},
            "fp8: the rest of the networks must be fp16; take dtype fp16 (got True)",
        ),
        (
            {"fp8": True, "backend": "inductor", "dtype": "fp16", "device": "cpu"},
            "fp8: compiled for device cuda alone; on a CPU take backend eager, for checks (got True)",
        ),
        ({"fp8": True, "backend": "eager", "dtype": "int8"}, "dtype: must be 'fp32' or 'fp16'"),
        ({"int8": 8}, "int8: must be a valid boolean"),
        (
            {"int8": True, "backend": "inductor"},
            "int8: the inductor backend has none; take backend onnx for the CPU; a GPU has FP8 instead: "
            "backend inductor, dtype fp16 and fp8 (got True)",
        ),
        (
            {"int8": True, "provider": "cuda"},
            "int8: only graphs for the CPU have it; take provider cpu and dtype fp32; a GPU has FP8 instead",
        ),
        ({"int8": True, "dtype": "fp16"}, "int8: only graphs for the CPU have it; take provider cpu"),
        (
            {"int8": True, "dtype": "fp16", "provider": "cpu"},
            "int8: the rest of the networks must be fp32; take dtype fp32 (got True)",
        ),
        ({"int8": True, "fp8": True, "backend": "eager", "dtype": "fp16"}, "int8: the rest of the networks"),
        ({"dtype": "fp16", "vae_dtype": "fp16"}, "vae_dtype: must be 'auto' or 'fp32' (got 'fp16')"),
        ({"revision": 5}, "revision: must be a valid string"),
        ({"checkpoint": ["a"]}, "checkpoint: must be a valid string"),
        ({"loras": "a"}, "loras: must be a list (got 'a')"),
        ({"loras": [{"scale": 1.0}]}, "loras: 'source' is missing"),
        ({"loras": [{"source": ""}]}, "loras: String should have at least 1 character (got '')"),
        ({"loras": [{"source": "a", "scale": float("nan")}]}, "loras: must be a finite number (got nan)"),
        ({"loras": [{"source": "a", "scale": float("-inf")}]}, "loras: must be a finite number (got -inf)"),
        ({"loras": [{"source": "a", "scale": "0.5"}]}, "loras: must be a valid number (got '0.5')"),
        ({"loras": [{"source": "a", "scale": True}]}, "loras: must be a valid number (got True)"),
        (
            {"loras": [{"source": "a", "weight": 1.0}]},
            "loras: unknown field 'weight'; there are: source, weight_name, revision, scale, on_request, "
            "name",
        ),
        ({"embeddings": "a"}, "embeddings: must be a list (got 'a')"),
        ({"embeddings": [{"token": "a"}]}, "embeddings: 'source' is missing"),
        ({"embeddings": [{"source": "a", "token": ""}]}, "embeddings: String should have at least 1 charact"),
        ({"embeddings": [{"source": "a", "token": "\ud800"}]}, "embeddings: must be a valid string, unable"),
        (
            {"embeddings": [{"source": "a", "scale": 1.0}]},
            "embeddings: unknown field 'scale'; there are: source, weight_name, revision, token",
        ),
        ({"chekpoint": "a"}, "chekpoint: unknown field 'chekpoint'; there are: checkpoint, revision"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_field_is_named_with_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        Recipe.make(**fields)
    assert str(caught.value).startswith(f"recipe: {message}")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_embeddings_are_tables_or_sources(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[[embeddings]]\nsource = "org/toy"\nrevision = "v1"\ntoken = "<toy>"')
    toy = EmbeddingSetting(source="org/toy", revision="v1", token="<toy>")
    assert Recipe.read(path).embeddings == (toy,)
    recipe = Recipe.make(embeddings=[toy, Path("b.safetensors")])
    assert recipe.embeddings == (toy, EmbeddingSetting(source="b.safetensors"))
    assert Recipe.recorded(recipe.model_dump(mode="json", exclude_none=True)).embeddings == recipe.embeddings


def test_loras_are_tables_or_sources(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[[loras]]\nsource = "org/oil"\nweight_name = "a.safetensors"\nscale = -1\n[[loras]]\nsource = "b"'
    )
    oil = LoraSetting(source="org/oil", weight_name="a.safetensors", scale=-1.0)
    assert Recipe.read(path).loras == (oil, LoraSetting(source="b"))
    assert Recipe.make(loras=["org/oil", Path("b")]).loras == (
        LoraSetting(source="org/oil", scale=1.0),
        LoraSetting(source="b"),
    )
    recorded = Recipe.make(loras=[oil]).model_dump(mode="json", exclude_none=True)
    assert Recipe.recorded(recorded).loras == (oil,)


@pytest.mark.parametrize(
    "content",
    [b"batch = ", b"\xff\xfe", b"batch = 1\nbatch = 2", b"[sizes", b'checkpoint = "a\ndtype = "b"'],
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"bad\.toml: not a recipe that can be read"):
        Recipe.read(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(ExportError, match="not a recipe that can be read"):
            Recipe.read(path)


def test_a_bad_field_in_a_file_names_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('dtype = "fp8"')
    with pytest.raises(ExportError, match=r"r\.toml: dtype: must be"):
        Recipe.read(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_in_the_tree_are_good(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.checkpoint
    assert recipe.size_spans(512)


def test_what_is_given_beside_a_recipe_wins(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('checkpoint = "org/name"\nbatch = 2\nsizes = ["64x96"]')
    recipe = Recipe.read(path, batch=3)
    assert (recipe.checkpoint, recipe.batch) == ("org/name", 3)


def test_sizes_and_batches_become_spans() -> None:
    assert Recipe().size_spans(512) == [(Span.exactly(512), Span.exactly(512))]
    several = Recipe.make(sizes=["64x96", "128x64", "64x96"], batch=[2, 1, 2])
    assert several.size_spans(8) == [
        (Span.exactly(96), Span.exactly(64)),
        (Span.exactly(64), Span.exactly(128)),
    ]
    assert several.unet_batches() == [Span.exactly(rows) for rows in (1, 2, 4)]
    assert several.unet_batches((2, 3)) == [Span.exactly(rows) for rows in (1, 2, 3, 4, 6)]
    assert several.max_images == 2
    free = Recipe.make(sizes={"min": "64x96", "max": "128x160"}, batch=3)
    assert free.size_spans(8) == [(Span(low=96, high=160), Span(low=64, high=128))]
    assert free.unet_batches() == [Span(low=1, high=6)]


def test_a_provider_follows_from_the_dtype_and_is_recorded() -> None:
    assert Recipe().provider == "cpu"
    assert Recipe(dtype="fp16").provider == "cuda"
    assert Recipe(dtype="fp16", provider="cpu").provider == "cpu"
    assert Recipe(dtype="fp32", provider="tensorrt").provider == "tensorrt"
    assert Recipe(backend="eager", dtype="fp16").provider is None
    assert Recipe(backend="inductor", dtype="fp16").provider is None
    assert Recipe(dtype="fp16").model_dump()["provider"] == "cuda"


def test_what_has_a_use_is_recorded_and_nothing_else() -> None:
    def recorded(**fields: Any) -> dict[str, Any]:
        return Recipe.make(**fields).model_dump(
            exclude={
                *("batch", "fp8", "int8", "dtype", "backend", "loras", "controlnet", "embeddings"),
                "ip_adapters",
                "pag",
            },
            exclude_none=True,
        )

    assert recorded() == {"provider": "cpu", "winograd": True}
    assert recorded(winograd=False) == {"provider": "cpu", "winograd": False}
    assert recorded(dtype="fp16") == {"provider": "cuda", "vae_dtype": "auto"}
    half_on_cpu = {"provider": "cpu", "winograd": True, "vae_dtype": "fp32"}
    assert recorded(dtype="fp16", provider="cpu", vae_dtype="fp32") == half_on_cpu
    assert recorded(backend="eager") == recorded(backend="inductor") == {}
    assert recorded(backend="inductor", autotune=False) == {"autotune": False}
    assert recorded(backend="inductor", long_prompts=True) == {"long_prompts": True}
    fixed = {"backend": "inductor", "batch": [1], "autotune": True}
    assert recorded(**fixed) == {"autotune": True}
    on_cuda = {"kernels": "auto", "autotune": True}
    assert recorded(backend="inductor", dtype="fp16", **on_cuda) == {**on_cuda, "vae_dtype": "auto"}
    never = {"kernels": "compiler", "autotune": False}
    assert recorded(backend="inductor", device="cuda", sizes=["8x8"], **never).items() >= never.items()


def test_a_recorded_recipe_may_name_what_meant_nothing_to_its_backend() -> None:
    all_of_them = {"dtype": "fp32", "provider": "cpu", "device": "cpu", "batch": 2, "fp8": False}
    all_of_them |= {
        "autotune": True,
        "kernels": "auto",
        "winograd": True,
        "vae_dtype": "auto",
        "long_prompts": False,
    }
    for backend, meant in (
        ("onnx", {"provider": "cpu", "winograd": True}),
        ("inductor", {"device": "cpu", "long_prompts": False}),
        ("eager", {}),
    ):
        recipe = Recipe.recorded({"backend": backend, **all_of_them})
        assert recipe == Recipe.make(backend=backend, batch=2, **meant)
        assert Recipe.recorded(recipe.model_dump(mode="json", exclude_none=True)) == recipe
    with pytest.raises(ExportError, match="recipe: batch: must be"):
        Recipe.recorded({"backend": "onnx", "batch": 0})
