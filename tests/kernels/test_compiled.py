"""Every kernel, at every tile size that can be launched, compiled for GPUs that are not here."""

import math
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86_64")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdfast.kernels import advance, conv3x3_fp8, geglu, group_norm

SHARED = 227 * 1024  # bytes that one program may have on sm_90
HALVES = {"x", "shift", "weight", "bias", "y", "output", "sample", "time_shift", "time_shifts"}
LINES = {"lines", "stride", "moved", "noise_lines"}
FLAGS = {"idle", "kept"}
ODD = {"guided", "all_lines", "rows", "chunks", "M", "H", "W", "H_read", "W_read", "h", "w"}
"""What need not be a multiple of 16."""


@dataclass(frozen=True)
class Case:
    """A kernel, what it is specialised to, and its launch. scalars: its arguments that are numbers."""

    kernel: Any
    fixed: dict[str, Any]
    scalars: tuple[str, ...]
    warps: int
    stages: int = 3
    wide: frozenset[str] = field(default=frozenset())  # float32 though they are the network's
    rounded: frozenset[str] = field(default=frozenset())  # float8 though they are the network's

    def __str__(self) -> str:
        values = "-".join(str(value) for value in self.fixed.values())
        return f"{self.kernel.__name__}-{values}-{self.warps}-{self.stages}" + "-float32" * bool(self.wide)

    def signature(self) -> dict[str, str]:
        def kind(name: str) -> str:
            if name in self.fixed:
                return "constexpr"
            if name in self.scalars:
                return "fp32" if name == "eps" else "i32"
            if name in LINES:
                return "*i64"
            if name in FLAGS:
                return "*i1"
            if name in self.rounded:
                return "*fp8e4nv"
            return "*fp16" if name in HALVES - self.wide else "*fp32"

        return {name: kind(name) for name in self.kernel.arg_names}


def norms(channels: int, groups: int, shifted: bool, silu: bool, wide: bool = False) -> list[Case]:
    each = channels // groups
    block, kinds = triton.next_power_of_2(each), frozenset(HALVES) if wide else frozenset()
    per_group = {"C": channels, "D": each, "SHIFTED": shifted}
    tile = {"BLOCK_P": group_norm.PARTS_PIXELS, "BLOCK_C": group_norm.PARTS_CHANNELS}
    merged = {"BLOCK_K": max(1, group_norm.MERGED // block), "BLOCK_D": block}
    chunk = {"CHUNK": group_norm.chunk_pixels(channels)}
    whole = {"SILU": silu, "BLOCK_P": group_norm.WHOLE_TILE // block, "BLOCK_D": block}
    a, b = ("P", "shift_stride", "eps"), ("P", "chunks", "shift_stride", "eps")
    return [
        Case(group_norm.group_norm_whole_kernel, {**per_group, **whole}, a, 8, wide=kinds),
        Case(group_norm.group_norm_moments_kernel, {"C": channels, **chunk, **tile}, ("P",), 8, wide=kinds),
        Case(group_norm.group_norm_merge_kernel, {**per_group, **chunk, **merged}, b, 8, wide=kinds),
        Case(
            group_norm.group_norm_apply_kernel, {"C": channels, "SILU": silu, **tile}, ("P",), 8, wide=kinds
        ),
    ]


def products(wide: bool, even: bool = True) -> list[Case]:
    return [
        Case(
            geglu.linear_geglu_kernel,
            {"EVEN": even, "GROUP_M": geglu.GROUPED_ROWS, **config.kwargs},
            ("M", "I", "F"),
            config.num_warps,
            config.num_stages,
            frozenset(HALVES) if wide else frozenset(),
        )
        for config in (geglu.FULL_CONFIGS if wide else geglu.HALF_CONFIGS)
    ]


def convolutions(inputs: int, stride: int = 1, twice: bool = False) -> list[Case]:
    settings = {"I": inputs, "STRIDE": stride, "BEFORE": 1, "TWICE": twice, "BIASED": True}
    return [
        Case(
            conv3x3_fp8.conv3x3_fp8_kernel,
            {**settings, "GROUP_M": conv3x3_fp8.GROUPED_ROWS, **config.kwargs},
            ("M", "H", "W", "H_read", "W_read", "h", "w", "O"),
            config.num_warps,
            config.num_stages,
            rounded=frozenset({"x", "weight"}),
        )
        for config in conv3x3_fp8.CONFIGS
    ]


def tile(case: Case) -> int:
    """How many numbers a program of a product holds."""
    sizes = [value for name, value in case.fixed.items() if name.startswith("BLOCK_")]
    return math.prod(sizes) * case.stages


def advances(registers: int, draws: bool, keeps: bool) -> Case:
    block = triton.next_power_of_2(registers + 2)
    sizes = {"BLOCK_S": block, "BLOCK_L": 32, "BLOCK_N": advance.NUMBERS}
    fixed = {"R": registers, "DRAWS": draws, "KEEPS": keeps, **sizes}
    scalars = ("N", "sample_stride", "guided", "all_lines")
    return Case(advance.advance_rows_kernel, fixed, scalars, advance.ROW_WARPS)


FETCH = Case(
    advance.fetch_time_shifts_kernel,
    {"BLOCK_L": 32, "BLOCK_T": advance.COPIED},
    ("T", "rows", "all_lines"),
    advance.COPY_WARPS,
)
# Each kernel in float16 and in float32, at the sizes that take most registers and shared memory.
LARGEST = [
    *norms(320, 32, True, True),
    *norms(2560, 32, True, True)[:1],
    *norms(512, 32, False, False, wide=True),
    max(products(wide=False), key=tile),
    max(products(wide=True), key=tile),
    *products(wide=False, even=False)[-1:],
    convolutions(320)[0],
    advances(8, True, True),
    FETCH,
]
OTHERS = [
    *(case for channels in (960, 1280, 1920) for case in norms(channels, 32, True, True)[:1]),
    *norms(128, 32, False, True),
    *products(wide=False),
    *products(wide=True),
    *(case for inputs in (16, 320, 640, 2560) for case in convolutions(inputs)),
    *(case for given in ({"stride": 2}, {"twice": True}) for case in convolutions(1280, **given)),
    *(advances(registers, True, keeps) for registers in (4, 8) for keeps in (False, True)),
]
CASES = LARGEST + [
    pytest.param(case, marks=pytest.mark.slow) for case in OTHERS if str(case) not in map(str, LARGEST)
]


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here and now, not found in a cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def compiled(case: Case, capability: int) -> Any:
    signature = case.signature()
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32") and name not in ODD
    }
    source = ASTSource(case.kernel, signature, case.fixed, aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes of its stack: that is where registers are spilled to."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", told)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_compiles_for_an_h100_and_spills_nothing(case: Case, tmp_path: Path) -> None:
    kernel = compiled(case, 90)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == 0
    assert 0 < used["REG"] <= 65536 // (32 * case.warps)
    assert kernel.metadata.shared <= SHARED
    if case.kernel is geglu.linear_geglu_kernel:
        assert ("wgmma" in kernel.asm["ptx"]) == (not case.wide)  # float32 is not rounded for tensor cores
    elif case.kernel is conv3x3_fp8.conv3x3_fp8_kernel:
        assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", kernel.asm["ptx"])
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]  # 16 bytes of each tile a copy
        steps = case.fixed["I"] > case.fixed["BLOCK_K"]  # of a tap: the next begins while one is multiplied
        assert ("wgmma.wait_group.sync.aligned 1" in kernel.asm["ptx"]) == steps
    elif "moments" in case.kernel.__name__ or "apply" in case.kernel.__name__:
        assert "ld.global.v4" in kernel.asm["ptx"]  # 16 bytes a thread


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 120])
def test_a_convolution_in_fp8_compiles_for_the_other_gpus_that_have_it(
    capability: int, tmp_path: Path
) -> None:
    kernel = compiled(convolutions(320)[-1], capability)
    assert "e4m3.e4m3" in kernel.asm["ptx"]
    assert resources(kernel.asm["cubin"], tmp_path)["STACK"] == 0
    assert kernel.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 120])
@pytest.mark.parametrize(
    "case", [*norms(320, 32, True, True), products(wide=False)[-1], advances(4, True, True), FETCH], ids=str
)
def test_it_compiles_for_other_gpus(case: Case, capability: int, tmp_path: Path) -> None:
    kernel = compiled(case, capability)
    assert resources(kernel.asm["cubin"], tmp_path)["STACK"] == 0
    assert kernel.metadata.shared <= 99 * 1024  # what a program may have on the smallest of them
