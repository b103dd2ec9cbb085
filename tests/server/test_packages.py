"""Packages that only serving needs: missing ones are told, and nothing else loads them."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from sdfast.errors import DependencyError
from sdfast.server.app import create_app
from sdfast.server.run import serve
from sdfast.server.settings import Settings
from tests.server.studio import FakeStudio
from tests.test_imports import loaded_by

SERVING = {"fastapi", "starlette", "uvicorn", "prometheus_client"}


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name == missing else importlib.util.find_spec(name)

    monkeypatch.setattr("sdfast.server.packages.find_spec", find)
    for start in (create_app, serve):
        with pytest.raises(DependencyError) as caught:
            start(FakeStudio(), Settings.make())
        assert str(caught.value) == f'serving needs {missing}; install with: pip install "sdfast[serve]"'


def test_what_a_command_line_imports_to_serve_loads_no_server() -> None:
    assert not SERVING & loaded_by("import sdfast.server.run, sdfast.server.settings")
