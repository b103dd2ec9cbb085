"""What a compiler sees of the kernels: a node each in an exported graph, whose launches Inductor takes."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86_64")

from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch.export import Dim

from sdfast import kernels


class Block(nn.Module):
    """Every operation once or twice, its shift a slice of a longer one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
        self.proj_weight, self.proj_bias = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor, time_shift: Tensor) -> Tensor:
        whole, parts = (kernels.group_norms()[f"triton {name}"] for name in ("whole", "parts"))
        shift = time_shift.split_with_sizes([32, 64], dim=-1)[1]
        x = x.contiguous(memory_format=torch.channels_last)
        x = whole(x, shift, self.weight, self.bias, 8, 1e-5, True)
        x = parts(x, None, self.weight, self.bias, 8, 1e-5, False)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        return kernels.linear_geglus()["triton"](tokens, self.proj_weight, self.proj_bias)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 64, 8, 6), torch.randn(2, 96)


BATCH, HEIGHT, WIDTH = Dim("batch", min=1, max=8), Dim("height", min=2, max=64), Dim("width", min=2, max=64)
DYNAMIC = {"x": {0: BATCH, 2: HEIGHT, 3: WIDTH}, "time_shift": {0: BATCH}}


@pytest.mark.parametrize("dynamic", [None, DYNAMIC], ids=["static", "dynamic"])
def test_an_export_keeps_each_as_one_node(dynamic: dict[str, dict[int, object]] | None) -> None:
    program = torch.export.export(Block(), inputs(), dynamic_shapes=dynamic)
    ours = [
        node for node in program.graph.nodes if getattr(node.target, "namespace", None) == "sdfast_triton"
    ]
    assert [node.target.__name__ for node in ours] == [
        "group_norm_whole.default",
        "group_norm_parts.default",
        "linear_geglu.default",
    ]
    assert all(node.meta["val"].is_contiguous(memory_format=torch.channels_last) for node in ours[:2])
    batch, tokens, features = ours[2].meta["val"].shape
    assert features == 24
    if dynamic is None:
        assert (batch, tokens) == (2, 48)
    else:  # nothing in a launch pins a size down
        bounds = sorted((r.lower, r.upper) for r in program.range_constraints.values())
        assert bounds == [(1, 8), (2, 64), (2, 64)]


@pytest.mark.filterwarnings("ignore:Encountered an exception in identify_mutated_tensors")
def test_a_compiler_gets_the_launches_themselves() -> None:
    """Inductor is given these nodes, and compiles the kernels into what it makes. No device: nothing runs."""
    seen: list[tuple[str, object]] = []

    class Stop(Exception):
        pass

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        for node in graph.graph.nodes:
            if node.target is triton_kernel_wrapper_functional:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                seen.append((kernel.fn.__name__, node.kwargs["grid"]))
        raise Stop

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Stop"):
        torch.compile(Block(), backend=aot_autograd(fw_compiler=compiler))(*inputs())
    names = [name for name, _ in seen]
    assert names == [
        "group_norm_whole_kernel",
        "group_norm_moments_kernel",
        "group_norm_merge_kernel",
        "group_norm_apply_kernel",
        "linear_geglu_kernel",
    ]
    grids = dict(seen)
    assert grids["group_norm_whole_kernel"] == [(8, 2, 1)]  # groups, pictures
    assert grids["group_norm_apply_kernel"] == [(1, 1, 2)]
    assert len(grids["linear_geglu_kernel"]) == 3  # one for each tile size
