"""How much memory processes hold while requests go by."""

from pathlib import Path

import numpy as np

from tests.server.house import children_of

_PAGE = 4096


class Memory:
    """Samples of a server's and its worker's resident memory, in bytes, by how many requests had ended."""

    def __init__(self, server: int) -> None:
        [worker] = children_of(server)
        self._pids = {"server": server, "worker": worker}
        self.samples: dict[str, list[tuple[int, int]]] = {name: [] for name in self._pids}

    def sample(self, requests: int) -> None:
        for name, pid in self._pids.items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.samples[name].append((requests, pages * _PAGE))

    def first_and_last(self, name: str) -> tuple[int, int]:
        return self.samples[name][0][1], self.samples[name][-1][1]

    def slope(self, name: str) -> float:
        """Bytes a request, over the second half: by then caches and pools are full."""
        half = self.samples[name][len(self.samples[name]) // 2 :]
        requests, sizes = np.array(half, dtype=float).T
        return float(np.polyfit(requests, sizes, 1)[0])
