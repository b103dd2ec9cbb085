"""What is missing for a compile is found, or said."""

from pathlib import Path

import pytest
from torch.utils import cpp_extension

from sdfast.doctor import examine
from sdfast.export import toolkit

OUTPUT = """C++ compile error

Command:
g++ wrapper.cpp

Output:
In file included from wrapper.cpp:1:
/torch/device_utils.h:15:10: fatal error: {} No such file or directory
compilation terminated."""


def headers(place: Path, *names: str) -> Path:
    for name in names:
        (place / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "include" / name).touch()
    return place


def test_the_first_whole_set_of_headers_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, whole = headers(tmp_path / "part", "cuda.h"), headers(tmp_path / "whole", *toolkit.HEADERS)
    assert toolkit.cuda_home([tmp_path / "nowhere", part, whole]) == whole
    assert toolkit.cuda_home([part]) is None
    assert toolkit.cuda_home([]) is None
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(part))
    monkeypatch.setattr("torch.__file__", str(tmp_path / "torch" / "__init__.py"))
    with toolkit.with_cuda_headers():
        assert str(part) == cpp_extension.CUDA_HOME
    pip = headers(tmp_path / "nvidia" / "cu13", *toolkit.HEADERS)
    with pytest.raises(ZeroDivisionError), toolkit.with_cuda_headers():
        assert str(pip) == cpp_extension.CUDA_HOME
        raise ZeroDivisionError
    assert str(part) == cpp_extension.CUDA_HOME


@pytest.mark.parametrize("name", ["cuda.h:", "crt/host_defines.h:"])
def test_a_missing_header_is_told_with_how_to_get_it(name: str) -> None:
    inner = RuntimeError(OUTPUT.format(name))
    outer = ValueError("pages about itself")
    outer.__cause__ = inner
    assert toolkit.advice(outer) == (
        "C++ compile error: /torch/device_utils.h:15:10: fatal error: "
        f"{name} No such file or directory; {toolkit.NO_HEADERS}"
    )


def test_another_failure_is_told_by_its_first_error() -> None:
    failure = RuntimeError(
        "C++ compile error\nnote: x\na.cpp:3:1: error: no member named 'y'\nb.cpp: error: z"
    )
    assert toolkit.advice(failure) == "C++ compile error: a.cpp:3:1: error: no member named 'y'"
    assert toolkit.advice(KeyError()) == "KeyError"


def test_no_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert toolkit.compiler() is None
    assert toolkit.advice(RuntimeError("it failed")) == f"it failed; {toolkit.NO_COMPILER}"
    lines = {finding.name: finding for finding in examine()}
    assert (lines["C++ compiler"].state, lines["C++ compiler"].advice) == ("missing", toolkit.NO_COMPILER)
