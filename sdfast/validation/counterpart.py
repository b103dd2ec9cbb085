"""The checkpoint that an engine is compared with: the one it was exported from, or one that was asked for."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdfast.engine import Engine
from sdfast.errors import CheckpointError, EngineError
from sdfast.export.added import Added
from sdfast.export.additions import as_made
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.one_file import Found
from sdfast.manifest import FromFile, OfComponent, Source


def counterpart(engine: Engine, given: str | Path | None) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to compare with, and what is to be said of it."""
    made_from = engine.manifest.checkpoint
    if made_from.graphs is not None:
        return _beside_graphs(engine, given)
    if given is None:
        try:
            found = resolve(
                made_from.source, revision=made_from.revision, variant=engine.manifest.recipe.get("variant")
            )
            found = as_made(found, engine.manifest)
        except CheckpointError as error:
            raise EngineError(
                f"{engine.folder}: what it was exported from is not there any more: {error}. Put it back, or "
                "give the checkpoint with --checkpoint"
            ) from error
    else:
        found = as_made(resolve(given), engine.manifest)
    changed = _changed(
        _all_digests(made_from.weights, made_from.beside, _components(made_from)),
        _all_digests(
            found.digests(),
            (*found.loras, *found.chosen, *found.embeddings, *found.ip_adapters),
            _components(found),
        ),
    )
    if not changed:
        return found, []
    if given is None:
        raise EngineError(
            f"{engine.folder}: exported from other weights than {made_from.source} now holds ({changed}), "
            "so a comparison would mean nothing; export it again, or name a checkpoint with --checkpoint"
        )
    return found, [f"compared, as asked, with weights that the engine was not exported from: {changed}"]


def _beside_graphs(engine: Engine, given: str | Path | None) -> tuple[Checkpoint, list[str]]:
    """The same where the engine is made of graphs, which do not tell of the checkpoint's weights."""
    made_from = engine.manifest.checkpoint
    if given is None:
        raise EngineError(
            f"{engine.folder}: made of graphs that {made_from.graphs} exported ({made_from.source}), which "
            "stock diffusers does not run; name the checkpoint that they were exported from with --checkpoint"
        )
    return resolve(given), [
        f"made of graphs that {made_from.graphs} exported, and compared, as asked, with {given}; "
        "conditioning and U-Net are one figure, as these graphs compute both in each step"
    ]


def _components(made_of: Source | Checkpoint) -> dict[str, Mapping[str, str]]:
    """The digests of each network that has a source of its own, by what to call it: ControlNets by their
    places, where there are several."""
    controlnets: Sequence[Added | OfComponent] = made_of.controlnets
    found: dict[str, Added | OfComponent | None] = {
        f"ControlNet {place}" if controlnets[1:] else "ControlNet": one
        for place, one in enumerate(controlnets, 1)
    }
    found |= {"VAE": made_of.vae, "image encoder": made_of.image_encoder}
    there = {name: one for name, one in found.items() if one is not None}
    return {name: one.digests if isinstance(one, Added) else one.weights for name, one in there.items()}


def _all_digests(
    weights: Mapping[str, str],
    beside: Iterable[Found | FromFile],
    components: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """What a network is made of: digests by name."""
    return {
        **weights,
        **{one.name: one.digest for one in beside},
        **{
            f"{beside_as} {name}": digest
            for beside_as, files in components.items()
            for name, digest in files.items()
        },
    }


def _changed(exported: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first weights file that differs, with both digests; "" when there is none."""
    for name in sorted({*exported, *found}):
        old, new = exported.get(name, "none"), found.get(name, "none")
        if old != new:
            return f"{name}: exported {old[:12]}, found {new[:12]}"
    return ""
