"""Compiling a module ahead of time with Inductor: a package of native code a form, the weights beside it.

The code takes its weights as constants that come later, so that it is small, forms and checkpoints share it,
and a checkpoint of the same networks needs no compile: the code is found again by what was traced
(`code_store`). Weights of convolutions lie channels-last, in which compiled convolutions want them; laid out
otherwise, they would be laid out anew in every call.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import kernels
from sdfast.backends.attention import Attention, exportable
from sdfast.backends.clock import clock_of
from sdfast.backends.fp8 import gathering, scaled_mm
from sdfast.backends.inductor import Axis, Code, Input, Layout, Literal
from sdfast.errors import ExportError, cause_line
from sdfast.export.choices import Choices
from sdfast.export.code_store import CodeStore
from sdfast.export.fp8 import FP8Convolutions
from sdfast.export.kernels import WITHOUT, OwnKernels, has_place, own_version, use_own
from sdfast.export.modules import Compiled, Form, ModuleSpec
from sdfast.export.quiet import quiet_compiler
from sdfast.export.toolkit import advice, with_cuda_headers
from sdfast.export.tracing import Dynamic, dynamic_shapes, example, file_stem, traced_with
from sdfast.export.weights import save_weights
from sdfast.manifest import Target, Variant, json_digest
from sdfast.models import ops
from sdfast.models.fp8 import convert, use_convolution, use_product
from sdfast.models.unet import Attending

SHARD = 512 * 2**20  # bytes: files of weights are read and verified side by side
LITERAL = 4096  # numbers: more than that is a weight

_SEPARATE_WEIGHTS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # Tensors of up to eight numbers too: as values in the code they would tie it to this checkpoint.
    "always_keep_tensor_constants": True,
    # Not written: with it, the compiler returns the constants that the code takes, under its names for them.
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}
_ON_CPU = {"cpp.dynamic_threads": True}  # not the number of threads that the exporter happens to have
# On a GPU. What is tried for a processor's products lays their weights out anew and puts them into the code.
_AUTOTUNED = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "conv_1x1_as_mm": True,
}


@dataclass(frozen=True)
class _Chosen:
    """What was measured for a form, a line each shape; what was taken; whether own kernels are part of it."""

    attention: tuple[str, ...]
    kernels: tuple[str, ...]
    attention_taken: dict[str, str]
    kernels_taken: dict[str, str]
    own: bool


@dataclass(frozen=True)
class _Rounded:
    """The 3×3 convolutions that go into FP8, by name; what was measured of each shape, and what was taken."""

    names: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiler:
    """How code is made.

    autotune: try the kernels for each shape of attention, and on a GPU the ways to compute each product, and
    take the fastest. own_kernels: try those of `sdfast.kernels` as well. say: told of what was left out.
    """

    target: Target
    autotune: bool
    store: CodeStore
    own_kernels: bool = True
    say: Callable[[str], None] = lambda message: None

    @property
    def options(self) -> dict[str, Any]:
        if self.target.device == "cpu":
            return {**_SEPARATE_WEIGHTS, **_ON_CPU}
        return {**_SEPARATE_WEIGHTS, **(_AUTOTUNED if self.autotune else {})}

    def compile(self, spec: ModuleSpec, place: Path) -> Compiled:
        """Write `spec` to `place`: a package and its description for each form, and the weights of all.

        Raises `ExportError` if the module cannot be traced, compiled or written.
        """
        network = laid_out_for(spec.load(), self.target.device)
        if isinstance(network, Attending):
            use_product(network, scaled_mm)
        # The largest batch first: there is most to gain, and what is chosen for it is chosen for all.
        forms = sorted(spec.forms, key=lambda form: form.batch.high, reverse=True)
        rounded = self._round(spec, forms, network)
        weights: dict[str, Tensor] = {}
        taken: dict[Form, _Chosen] = {}
        for form in forms:
            code, taken[form] = self._form(spec, form, network, rounded, place / _file(spec, form))
            weights.update(_weights_of(network, code))
        _write_weights(weights, spec.name, place)
        variants = [
            Variant(
                file=_file(spec, form),
                batch=form.batch,
                height=form.height,
                width=form.width,
                tokens=form.tokens,
                attention=taken[form].attention_taken,
                kernels=taken[form].kernels_taken,
            )
            for form in spec.forms
        ]
        return Compiled(variants, (*spec.fp8, *rounded.names))

    def _round(self, spec: ModuleSpec, forms: Sequence[Form], network: nn.Module) -> _Rounded:
        """Put those convolutions of `network` into FP8 that are faster so at every size of `forms`."""
        if not spec.fp8_convolutions:
            return _Rounded()
        contest = self._fp8_convolutions() if all(map(_is_sized, forms)) else None
        if contest is None:
            self.say(f"{spec.name}: no 3x3 convolution is in FP8, for none was measured; see docs/fp8.md")
            return _Rounded()
        largest = {(form.height, form.width): form for form in reversed(forms)}
        faster = [
            contest.faster(network, spec.fp8_convolutions, self._given(*traced_with(spec, form)))
            for form in largest.values()
        ]
        names = tuple(name for name in spec.fp8_convolutions if all(name in found for found in faster))
        convert(network, names)
        use_convolution(network, gathering(kernels.convolution_fp8()))
        self.say(f"{spec.name}: {len(names)} of {len(spec.fp8_convolutions)} 3x3 convolutions are in FP8")
        return _Rounded(names, tuple(contest.report()), contest.taken())

    def _given(self, inputs: Mapping[str, Tensor], dynamic: Dynamic) -> dict[str, Tensor]:
        """Example inputs, on the device."""
        return {
            name: example(tensor, dynamic.get(name, {})).to(self.target.device)
            for name, tensor in inputs.items()
        }

    def _form(
        self, spec: ModuleSpec, form: Form, network: nn.Module, rounded: _Rounded, path: Path
    ) -> tuple[Code, _Chosen]:
        inputs, dynamic = traced_with(spec, form)
        given = self._given(inputs, dynamic)
        chosen = self._choose(network, given, rounded, fixed=not dynamic)
        with _advised(chosen):
            program = _trace(network, given, dynamic)
        described = tuple(_input(name, tensor, dynamic.get(name, {})) for name, tensor in given.items())
        key = json_digest(
            {
                "graph": program.graph_module.print_readable(print_output=False),
                "ranges": sorted(map(str, program.range_constraints.items())),
                "inputs": [entry.model_dump() for entry in described],
                "outputs": spec.outputs,
                "weights": {n: Layout.of(w).model_dump() for n, w in _tensors(network).items()},
                "options": self.options,
                "target": self.target.model_dump(),
                **({"own kernels": own_version()} if chosen.own else {}),
            }
        )
        description = path.with_suffix(".json")
        targets = {"code.pt2": path, "code.json": description}

        def compile_now() -> None:
            with _advised(chosen):
                constants = _compile(program, given, path, self.options)
            literals = {n: c for n, c in constants.items() if n not in _tensors(network)}
            code = Code(
                module=spec.name,
                inputs=described,
                outputs=spec.outputs,
                constants={n: Layout.of(c) for n, c in constants.items() if n not in literals},
                literals={n: _literal(n, c, program.constants.values()) for n, c in literals.items()},
                attention=chosen.attention,
                kernels=chosen.kernels,
            )
            description.write_text(code.model_dump_json(), encoding="utf-8")

        self.store.fill(key, targets, compile_now)
        return Code.model_validate_json(description.read_bytes()), chosen

    def _choose(
        self, network: nn.Module, inputs: Mapping[str, Tensor], rounded: _Rounded, *, fixed: bool
    ) -> _Chosen:
        """Give a network of fixed sizes the fastest kernels for each of its shapes: what was measured."""
        tries = self.autotune and fixed
        attention = self._attention() if tries and isinstance(network, Attending) else None
        own = self._own() if tries and has_place(network) else None
        if isinstance(network, Attending):
            network.use_attention(attention or ops.attention)
        use_own(network, own)
        if attention or own:
            with torch.no_grad():
                network(**inputs)  # each shape is measured when it is met, which tracing could not
        return _Chosen(
            attention=tuple(sorted(attention.report())) if attention else (),
            kernels=tuple(sorted([*(own.report() if own else ()), *rounded.report])),
            attention_taken=attention.taken() if attention else {},
            kernels_taken={**(own.taken() if own else {}), **rounded.taken},
            own=(own is not None and own.uses_own()) or bool(rounded.names),
        )

    def _attention(self) -> Attention:
        device = torch.device(self.target.device)
        return Attention("auto", device, kernels=exportable(device), memory=self._choices(""))

    def _own(self) -> OwnKernels | None:
        """None where they are not wanted, or cannot run."""
        device = torch.device(self.target.device)
        if not self.own_kernels or kernels.why_none(device):
            return None
        memory = self._choices(f", own kernels {own_version()}")
        return OwnKernels(kernels.group_norms(), kernels.linear_geglus(), clock_of(device), memory, self.say)

    def _fp8_convolutions(self) -> FP8Convolutions | None:
        """None where nothing is measured, or own kernels are not wanted or cannot run."""
        device = torch.device(self.target.device)
        if not self.autotune or not self.own_kernels or kernels.why_none(device):
            return None
        memory = self._choices(f", own kernels {own_version()}")
        return FP8Convolutions(kernels.convolution_fp8(), clock_of(device), memory, self.say)

    def _choices(self, versions: str) -> Choices:
        """versions: of what computes, beside torch."""
        target = self.target
        name = torch.cuda.get_device_name() if target.device == "cuda" else target.architecture
        cuda = f", CUDA {target.cuda}" if target.cuda else ""
        return Choices(self.store.choices, f"{name}, torch {target.torch}{cuda}{versions}", self.say)


@contextmanager
def _advised(chosen: _Chosen) -> Iterator[None]:
    """What fails with own kernels may do without them, which is said."""
    try:
        yield
    except ExportError as error:
        if not chosen.own:
            raise
        raise ExportError(f"{error}; it has own kernels: {WITHOUT}") from error


def _is_sized(form: Form) -> bool:
    """Whether batch, height and width are fixed. Nothing that an image meets depends on the tokens."""
    return all(span is not None and span.fixed for span in (form.batch, form.height, form.width))


def _file(spec: ModuleSpec, form: Form) -> str:
    return f"{file_stem(spec, form)}.pt2"


def laid_out_for(network: nn.Module, device: str) -> nn.Module:
    """The network on `device`, the weights of its convolutions channels-last."""
    network = network.to(device).eval().requires_grad_(False)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 4:
                own = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, nn.Parameter(own, requires_grad=False))
    return network


def _trace(network: nn.Module, inputs: Mapping[str, Tensor], dynamic: Dynamic) -> Any:
    shapes = dynamic_shapes(inputs, dynamic, pictures=inputs.keys() & {"image"})
    try:
        with torch.no_grad(), quiet_compiler():
            return torch.export.export(network, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many unrelated types
        raise ExportError(f"{type(network).__name__} cannot be traced: {cause_line(error)}") from error


def _compile(
    program: Any, inputs: Mapping[str, Tensor], path: Path, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Write the package to `path`. The constants that it takes, by the names that it has for them."""
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    try:
        with torch.no_grad(), quiet_compiler(), with_cuda_headers():
            files: Any = aot_compile(program.module(), (), dict(inputs), options=dict(options))
            package_aoti(str(path), [file for file in files if isinstance(file, str)])
    except Exception as error:  # compilers fail in as many ways as there are
        raise ExportError(f"{path.stem} cannot be compiled: {advice(error)}") from error
    found = [file for file in files if not isinstance(file, str)]
    return {name: tensor for weights in found for name, (tensor, _) in weights.items()}


def _input(name: str, tensor: Tensor, axes: Mapping[int, tuple[str, int, int]]) -> Input:
    shape: list[Axis] = [axes[axis][1:] if axis in axes else size for axis, size in enumerate(tensor.shape)]
    return Input(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(shape))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Everything that may become a constant, by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _weights_of(network: nn.Module, code: Code) -> dict[str, Tensor]:
    """The weights that the code takes. Raises `ExportError` where they lie in memory in another way."""
    tensors = _tensors(network)
    for name, layout in code.constants.items():
        if name not in tensors or Layout.of(tensors[name]) != layout:
            raise ExportError(f"{code.module}: the compiler wants {name} as {layout!r}, which it is not")
    return {name: tensors[name] for name in code.constants}


def _literal(name: str, tensor: Tensor, traced: Iterable[Any]) -> Literal:
    """A tensor that was traced as it is. What the compiler made of weights would tie the code to them."""
    known = (c.to(tensor.device) for c in traced if isinstance(c, Tensor) and c.dtype == tensor.dtype)
    if not any(torch.equal(constant, tensor) for constant in known):
        raise ExportError(f"{name}: the compiler made {list(tensor.shape)} numbers of the weights")
    if tensor.numel() > LITERAL:
        raise ExportError(f"{name}: {tensor.numel()} numbers in the code; make it a parameter or a buffer")
    return Literal.of(tensor)


def _write_weights(weights: Mapping[str, Tensor], module: str, place: Path) -> None:
    """Files of up to about `SHARD` bytes, and an index of what lies where."""
    shards = _shards(weights)
    index = {}
    for number, shard in enumerate(shards, 1):
        whole = len(shards) == 1
        name = f"{module}.safetensors" if whole else f"{module}-{number:05}-of-{len(shards):05}.safetensors"
        save_weights({key: _as_it_lies(weights[key]) for key in shard}, place / name)
        index.update(dict.fromkeys(shard, name))
    (place / f"{module}.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in order, cut where a file is full."""
    shards: list[list[str]] = []
    room = 0
    for name in sorted(weights):
        size = weights[name].nbytes
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    return shards


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same numbers in the order in which they lie in memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    return tensor.permute(order).contiguous().cpu()
