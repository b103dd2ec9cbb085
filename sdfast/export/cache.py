"""Where what is built on the way is kept for the next time: engines of first use, compiled code."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where cached engines lie: `SDFAST_CACHE`, or `sdfast/engines` in the user's cache directory."""
    given = os.environ.get("SDFAST_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdfast" / "engines"
