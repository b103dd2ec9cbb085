"""checkpoint → engine. The package is called like the function that it is for, so it can be called, too:
`from sdfast import export` gives one or the other, depending on what was imported before.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdfast.export.build import Progress
    from sdfast.export.recipe import Recipe


class _ExportPackage(ModuleType):
    def __call__(
        self,
        source: str | Path | None,
        target: str | Path,
        recipe: "Recipe | None" = None,
        *,
        progress: "Progress | None" = None,
    ) -> Path:
        """Build the engine of a checkpoint; see `sdfast.export.build.export`."""
        from sdfast.export.build import export

        return export(source, target, recipe, progress=progress)


sys.modules[__name__].__class__ = _ExportPackage
