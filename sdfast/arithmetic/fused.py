"""The arithmetic on an NVIDIA GPU in two kernels a tick, where `device.py` has some ten torch operations."""

from sdfast.arithmetic.device import DeviceArithmetic
from sdfast.arithmetic.plan import Buffers, Capacity
from sdfast.errors import BackendError
from sdfast.kernels import why_none


class FusedArithmetic(DeviceArithmetic):
    """`DeviceArithmetic` whose `advance` is `kernels.advance.Advance`, on the same tensors.

    Its numbers differ from that one's by the rounding of float32 alone. Rows that rescale their guidance need
    the spread of a whole picture first, and those of further outputs, or of weights that vary, are rare: a
    capacity with such rows advances as in `DeviceArithmetic`.
    """

    def __init__(self, buffers: Buffers, capacity: Capacity) -> None:
        """Raises `BackendError` where these kernels cannot run."""
        if why := why_none(buffers.sample.device):
            raise BackendError(f"no kernels for the fused arithmetic: {why}; use DeviceArithmetic")
        from sdfast.kernels.advance import Advance, Tables

        super().__init__(buffers, capacity)
        self._fused = Advance(
            Tables(
                state=self._state,
                matrices=self._matrices,
                guidance=self._guidance.view(-1),
                lines=self._lines,
                stride=self._stride,
                idle=self._idle.view(-1),
                noise=self._noise if self._window else None,
                noise_lines=self._noise_lines,
                kept=self._kept if capacity.keeps else None,
                image=self._image,
                image_noise=self._image_noise,
                keeping=self._keeping,
                output=buffers.output,
                sample=buffers.sample,
                time_shift=buffers.time_shift,
                time_shifts=self._time_shifts,
            )
        )

    def advance(self) -> None:
        if self._capacity.rescales or self._capacity.further or self._capacity.varies:
            super().advance()
        else:
            self._fused()
