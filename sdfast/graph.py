"""CUDA graphs: work that is launched once and replayed, so that the host launches one thing a tick."""

from collections.abc import Callable

import torch


class Graph:
    """`work` on fixed tensors of a CUDA device, as one graph from its second call on.

    The first call runs the work as it is, which also loads the kernels: nothing may be loaded in a capture.
    The work must not wait for the device, nor take decisions on the host that differ from call to call. It
    runs on the caller's stream; captures go through a stream of their own.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if not self._warm:
            self._work()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server allocate in the meantime, which the default would not allow.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._work()
        return graph
