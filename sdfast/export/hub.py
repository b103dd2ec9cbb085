"""Fetching a checkpoint from the Hugging Face Hub, or from a mirror that speaks its protocol.

Two passes: the small files first, so that an unsupported model costs nothing, then exactly the weights that
the layout rules choose from the repository's listing. No pickle is fetched, nor anything sdfast does not use.
`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` mean what they mean to every other user of the Hub.
"""

import errno
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType

from sdfast.errors import CheckpointError, DependencyError
from sdfast.export import layout
from sdfast.export.files import Files, reason

_REVISION = r"(?!.*\.\.)[\w@][\w@ .+/#=-]*"
_TRANSPORTS = ("httpx2", "httpx", "requests")
"""What huggingface_hub speaks HTTP with, depending on its version."""


def download(
    repo: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    progress: Callable[[str], None],
) -> tuple[Path, str]:
    """The local snapshot of a checkpoint on the Hub and the commit it is of. Raises CheckpointError."""
    return _snapshot(
        repo,
        layout.config_files(variant),
        lambda files, names: _weights(files, names, variant),
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        progress=progress,
    )


def download_controlnet(
    repo: str, *, revision: str | None = None, variant: str | None = None, progress: Callable[[str], None]
) -> tuple[Path, str]:
    """The same of a ControlNet."""

    def choose(files: Files, names: Collection[str]) -> list[str]:
        layout.check_controlnet(names, repo)
        return _component_weights(files, names, layout.CONTROLNET, variant)

    configs = layout.controlnet_config_files(variant)
    return _snapshot(repo, configs, choose, revision=revision, progress=progress)


def download_vae(
    repo: str, *, revision: str | None = None, variant: str | None = None, progress: Callable[[str], None]
) -> tuple[Path, str]:
    """The same of a VAE, in a repository of its own or as a part of a checkpoint's."""

    def choose(files: Files, names: Collection[str]) -> list[str]:
        folder = layout.vae_folder(names, repo)
        before = f"{folder}/" if folder else ""
        own = {name.removeprefix(before) for name in names if name.startswith(before)}
        part = Files(files.folder / folder, repo, files.folder)
        return [before + name for name in _component_weights(part, own, layout.VAE_ALONE, variant)]

    return _snapshot(repo, layout.vae_config_files(variant), choose, revision=revision, progress=progress)


def download_image_encoder(
    repo: str, folder: str, *, revision: str | None = None, progress: Callable[[str], None]
) -> tuple[Path, str]:
    """The same of an image encoder that has a folder in a repository: the whole repository's snapshot."""

    def choose(files: Files, names: Collection[str]) -> list[str]:
        own = {name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}
        layout.check_image_encoder(own, f"{repo}/{folder}")
        part = Files(files.folder / folder, f"{repo}/{folder}", files.folder)
        weights = _component_weights(part, own, layout.IMAGE_ENCODER, None)
        return [f"{folder}/{name}" for name in weights]

    configs = [f"{folder}/{name}" for name in layout.image_encoder_config_files()]
    return _snapshot(repo, configs, choose, revision=revision, progress=progress)


def _snapshot(
    repo: str,
    configs: Sequence[str],
    choose: Callable[[Files, Collection[str]], list[str]],
    *,
    revision: str | None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    progress: Callable[[str], None],
) -> tuple[Path, str]:
    """configs: what is fetched first. choose: of the small files that are there, and the names of all, the
    weights that are to be fetched."""
    if revision is not None and not re.fullmatch(_REVISION, revision):
        raise CheckpointError(f"{repo}: {revision!r} is not the name of a branch, a tag or a commit")
    hub = _huggingface_hub()

    def fetch(revision: str | None, names: Collection[str]) -> Path:
        return Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(names),
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
            )
        )

    try:
        progress(f"looking up {repo} on {hub.constants.ENDPOINT}")
        folder = fetch(revision, configs)
        commit = folder.name
        sizes = {} if local_files_only else _listing(hub, repo, commit, token)
        files = Files(folder, repo)
        weights = choose(files, sizes.keys() or files.names)
        size = sum(sizes.get(name, 0) for name in weights)
        progress(
            f"fetching the weights of {repo} at {commit[:8]}" + (f", {size / 1e9:.2f} GB" if size else "")
        )
        fetch(commit, weights)
    except _failures(hub) as error:
        raise CheckpointError(_explain(hub, error, repo, revision)) from error
    return folder, commit


def download_file(
    repo: str,
    choose: Callable[[Collection[str]], str],
    *,
    revision: str | None = None,
    progress: Callable[[str], None],
) -> tuple[Path, str, str]:
    """One file of a repository: where it lies, its name there, and the commit. Raises CheckpointError.

    choose: the file, of all names that there are; of those in the cache, where the Hub cannot be reached.
    """
    if revision is not None and not re.fullmatch(_REVISION, revision):
        raise CheckpointError(f"{repo}: {revision!r} is not the name of a branch, a tag or a commit")
    hub = _huggingface_hub()
    try:
        progress(f"looking up {repo} on {hub.constants.ENDPOINT}")
        try:
            found = hub.HfApi().model_info(repo, revision=revision)
            names = [entry.rfilename for entry in found.siblings or ()]
        except (hub.errors.OfflineModeIsEnabled, *_transport_errors()) as error:
            if getattr(error, "response", None) is not None:
                raise  # it was reached, and said no
            folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        name = choose(names)
        progress(f"fetching {name} of {repo}")
        path = Path(hub.hf_hub_download(repo, name, revision=revision))  # by its name: that is found offline
    except _failures(hub) as error:
        raise CheckpointError(_explain(hub, error, repo, revision)) from error
    return path, name, path.parents[name.count("/")].name


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise DependencyError(
            'huggingface_hub is needed to fetch from the Hub: pip install "sdfast[export]"'
        ) from error
    return huggingface_hub


def _listing(hub: ModuleType, repo: str, commit: str, token: str | None) -> dict[str, int]:
    """Every file of the repository with its size in bytes; empty when the Hub cannot be reached.

    Empty is no failure here: the snapshot in the cache is then all there is, and is judged by itself.
    """
    try:
        entries = hub.HfApi(token=token).list_repo_tree(repo, revision=commit, recursive=True)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    except (hub.errors.OfflineModeIsEnabled, *_transport_errors()):
        return {}


def _weights(files: Files, names: Collection[str], variant: str | None) -> list[str]:
    """The weights files to fetch. names: of the listing, or of the cache when there is no listing."""
    if "model_index.json" not in names:
        raise CheckpointError(f"{files.source}: {layout.why_no_index(names)}")
    index = files.json("model_index.json")
    layout.check_index(index, files.source)
    return [
        name
        for component in layout.components(index)
        for name in _component_weights(files, names, component, variant)
    ]


def _component_weights(
    files: Files, names: Collection[str], component: str, variant: str | None
) -> list[str]:
    weights = layout.weights_file(names, component, variant, files.source)
    if weights.endswith(".json"):
        return list(layout.shard_files(files.json(weights), weights, files.source))
    return [weights]


def _transport_errors() -> tuple[type[Exception], ...]:
    """The root errors of the HTTP libraries in use."""
    roots = {"httpx2": "HTTPError", "httpx": "HTTPError", "requests": "RequestException"}
    return tuple(getattr(sys.modules[name], roots[name]) for name in _TRANSPORTS if name in sys.modules)


def _failures(hub: ModuleType) -> tuple[type[Exception], ...]:
    """What huggingface_hub may raise for reasons that lie outside of this program."""
    errors = hub.errors
    return (errors.EntryNotFoundError, errors.HFValidationError, *_transport_errors(), OSError)


def _explain(hub: ModuleType, error: Exception, repo: str, revision: str | None) -> str:
    """One line: what the Hub would not give, and what to do about it."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    page = f"{endpoint}/{repo}"
    known: tuple[tuple[type[Exception], str], ...] = (  # the first that fits: a gated one is also "not found"
        (
            errors.GatedRepoError,
            f"{repo} is gated: accept its conditions at {page}, then log in (hf auth login) or set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{repo}: no such model on {endpoint}, nor a folder or file of that name here; check the name, "
            "or, if it is private, log in (hf auth login) or set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no revision {revision!r}; its branches and tags are listed at {page}/tree/main",
        ),
        (errors.HFValidationError, f"{repo!r} is not a valid Hub id: {reason(error)}"),
        (
            errors.LocalEntryNotFoundError,
            f"{repo} is not complete in the local cache, and {endpoint} cannot be reached: check the "
            "connection and HF_HUB_OFFLINE, or give a folder",
        ),
    )
    for kind, message in known:
        if isinstance(error, kind):
            return message
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"{repo}: {endpoint} refused the token; log in again (hf auth login) or unset HF_TOKEN"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{repo}: no space left on the disk; free some, or set HF_HOME to a larger disk"
    return f"{repo}: the download failed ({reason(error)}); run the same command again, it goes on from there"
