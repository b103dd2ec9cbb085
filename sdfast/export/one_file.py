"""The one .safetensors file that holds a LoRA or an embedding: itself, in a folder, or on the Hub."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.checkpoint import Progress
from sdfast.export.files import Files, sha256
from sdfast.export.recipe import FileSetting
from sdfast.export.sources import kind_of

SHOWN = 3
_CONVERT = (
    "sdfast reads safetensors only, because a pickle can run code when it is read: where you trust the file, "
    "load its tensors and save them with safetensors.torch.save_file"
)


@dataclass(frozen=True)
class Wanted:
    """What is looked for, for messages ("a", "LoRA"); the name that diffusers gives to the file when it saves
    one, which goes before others; and the recipe's table of them."""

    article: str
    noun: str
    customary_name: str
    table: str

    def __str__(self) -> str:
        return f"{self.article} {self.noun}"

    @property
    def told(self) -> str:
        return f"{self} is a .safetensors file, a folder that holds one, or a Hub id"


@dataclass(frozen=True)
class Found:
    """A file that was found.

    source: what the user gave. file: the one in it that is meant, or None where the source is that itself.
    revision: the commit on the Hub. digest: the SHA-256 of the file.
    """

    source: str
    file: str | None
    revision: str | None
    path: Path
    digest: str

    @property
    def name(self) -> str:
        return _name(self.source, self.file)


def find(setting: FileSetting, wanted: Wanted, progress: Progress) -> Found:
    """The file that a setting means. Raises `CheckpointError` where there is none, or more than one."""
    source = setting.source
    kind = kind_of(source, wanted.told)
    _refuse_unused(setting, kind, wanted)
    if kind == "hub":
        return _fetch(setting, wanted, progress)
    path, file = Path(source).expanduser().resolve(), None
    if kind == "folder":
        files = Files(path, source)
        file = _choose(files.names, setting, wanted)
        path = files.path(file)
    else:
        _check_suffix(source, wanted)
    return Found(source, file, None, path, sha256(path, _name(source, file)))


def _fetch(setting: FileSetting, wanted: Wanted, progress: Progress) -> Found:
    from sdfast.export import hub

    def choose(names: Collection[str]) -> str:
        return _choose(names, setting, wanted)

    source = setting.source
    path, file, commit = hub.download_file(source, choose, revision=setting.revision, progress=progress)
    return Found(source, file, commit, path, sha256(path, _name(source, file)))


def _name(source: str, file: str | None) -> str:
    return source if file is None else f"{source.rstrip('/')}/{file}"


def _refuse_unused(setting: FileSetting, kind: str, wanted: Wanted) -> None:
    unused = {"file": ("weight_name", "revision"), "folder": ("revision",), "hub": ()}[kind]
    given = [field for field in unused if getattr(setting, field) is not None]
    if given:
        raise CheckpointError(
            f"{setting.source}: is {wanted}'s {kind}, for which {' and '.join(given)} has no meaning; "
            "leave it out"
        )


def _check_suffix(name: str, wanted: Wanted) -> None:
    if name.lower().endswith(layout.PICKLE_SUFFIXES):
        raise CheckpointError(f"{name}: is a pickle. {_CONVERT}")
    if not name.lower().endswith(".safetensors"):
        raise CheckpointError(f"{name}: is not {wanted}; give a .safetensors file")


def _choose(names: Collection[str], setting: FileSetting, wanted: Wanted) -> str:
    """Of the files in a folder or repository, the one that was asked for, or the only one it can be."""
    source, weight_name = setting.source, setting.weight_name
    if weight_name is not None:
        _check_suffix(_name(source, weight_name), wanted)
        if weight_name not in names:
            raise CheckpointError(f"{source}: holds no {weight_name}; it holds {_listed(_weights(names))}")
        return weight_name
    weights = _weights(names)
    if wanted.customary_name in weights:
        return wanted.customary_name
    if len(weights) > 1:
        raise CheckpointError(
            f"{source}: holds {_listed(weights)}; say which with weight_name, in a recipe's "
            f"[[{wanted.table}]]"
        )
    if not weights:
        pickles = sorted(name for name in names if name.endswith(layout.PICKLE_SUFFIXES))
        why = (
            f"but a pickle ({pickles[0]}). {_CONVERT}"
            if pickles
            else f"and is no {wanted.noun}; {wanted.told}"
        )
        raise CheckpointError(f"{source}: holds no .safetensors file, {why}")
    return weights[0]


def _weights(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return (
        f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
    ) or "no .safetensors file"
