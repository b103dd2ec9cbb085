"""What importing costs: nothing for the package, no torch for the help, no diffusers for serving."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "PIL", "onnxruntime", "diffusers", "transformers", "pydantic")


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after `code`."""
    tail = "import sys; print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("LOADED")[2].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import sdfast; sdfast.__version__").intersection(HEAVY)


@pytest.mark.parametrize("arguments", ["--help", "generate --help", "export --help", "--version"])
def test_the_help_loads_nothing_heavy(arguments: str) -> None:
    code = f"from sdfast.cli import main; main({arguments.split()!r}, standalone_mode=False)"
    assert not loaded_by(code).intersection(HEAVY)


def test_drawing_on_an_onnx_engine_loads_neither_diffusers_nor_transformers(flat_onnx: Path) -> None:
    code = (
        "import sys, sdfast\n"
        "pipe = sdfast.Pipeline.from_engine(sys.argv[1], threads=1)\n"
        "assert pipe('a boat', num_inference_steps=2, scheduler='dpmpp_2m_karras', seed=1).images"
    )
    loaded = loaded_by(code, str(flat_onnx))
    assert "onnxruntime" in loaded
    assert not loaded & {"diffusers", "transformers", "onnxscript", "onnx_ir"}


def test_every_public_name_is_there() -> None:
    import sdfast

    for name in sdfast.__all__:
        assert getattr(sdfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pipeline_that_is_not'"):
        _ = sdfast.pipeline_that_is_not


def test_the_server_loads_no_torch_its_workers_do() -> None:
    code = "import sdfast.server.start, sdfast.server.listening, sdfast.server.worker.__main__"
    code += "\nfrom sdfast.server.app import create_app\nfrom sdfast.server.settings import Settings"
    code += "\nfrom sdfast.server.studio import WorkerStudio\ncreate_app(WorkerStudio([]), Settings.make())"
    assert not loaded_by(code) & {"torch", "onnxruntime", "scipy"}
