"""What the server needs beyond the package's own dependencies."""

from importlib.util import find_spec

from sdfast.errors import DependencyError

PACKAGES = ("fastapi", "h11", "prometheus_client", "python_multipart", "starlette", "uvicorn")


def check_packages() -> None:
    """Raises `DependencyError` when a package that serving needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f'serving needs {", ".join(missing)}; install with: pip install "sdfast[serve]"'
        )
