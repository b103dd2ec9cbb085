"""The checkpoint that an engine is compared with: the one it was exported from, or one that was asked for."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sdfast.engine import Engine
from sdfast.errors import CheckpointError, EngineError
from sdfast.export.additions import as_made
from sdfast.export.checkpoint import Checkpoint, resolve
from sdfast.export.one_file import Found
from sdfast.manifest import AddedControlNet, FromFile, UsedImageEncoder


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
        _all_digests(made_from.weights, made_from.beside, made_from.controlnets, made_from.image_encoder),
        _all_digests(
            found.digests(),
            (*found.loras, *found.chosen, *found.embeddings, *found.ip_adapters),
            [controlnet.record() for controlnet in found.controlnets],
            None if found.image_encoder is None else found.image_encoder.record(),
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


def _all_digests(
    weights: Mapping[str, str],
    beside: Iterable[Found | FromFile],
    controlnets: Sequence[AddedControlNet],
    image_encoder: UsedImageEncoder | None,
) -> dict[str, str]:
    """What a network is made of: digests by name."""
    return {
        **weights,
        **{one.name: one.digest for one in beside},
        **{
            f"{beside_as} {name}": digest
            for beside_as, one in zip(_controlnets(len(controlnets)), controlnets, strict=True)
            for name, digest in one.weights.items()
        },
        **{f"image encoder {n}": d for n, d in (image_encoder.weights if image_encoder else {}).items()},
    }


def _controlnets(count: int) -> list[str]:
    """What to call ControlNets: by their places, where there are several."""
    return ["ControlNet"] if count == 1 else [f"ControlNet {place}" for place in range(1, count + 1)]


def _changed(exported: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first weights file that differs, with both digests; "" when there is none."""
    for name in sorted({*exported, *found}):
        old, new = exported.get(name, "none"), found.get(name, "none")
        if old != new:
            return f"{name}: exported {old[:12]}, found {new[:12]}"
    return ""
