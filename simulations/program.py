"""A model as one program for many clients: traced (torch.fx) into the layers of `layers.py` and what needs no parameters.

The user's model is an ordinary `nn.Module`. What has no parameters works on records and does not care whose they are; autograd knows its
backward, and six common ones are written by hand.

`compiled` tries the program on some records against autograd before it gives it out; a model that is not made of known layers, or
mixes records, is `Unsupported`, and is trained client by client by `clients/training.py`.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, fx, nn

from .layers import LAYERS, Fast, Groups, Layer, Pass, Place, StackedConv, StackedNorm, Unsupported

aten = torch.ops.aten


# Without parameters, the same for every record.
_PLAIN_MODULES = tuple(
    getattr(nn, name)
    for name in [
        "ReLU",
        "LeakyReLU",
        "ELU",
        "SELU",
        "CELU",
        "GELU",
        "SiLU",
        "Mish",
        "Tanh",
        "Sigmoid",
        "Hardtanh",
        "Hardsigmoid",
        "Hardswish",
        "ReLU6",
        "Softplus",
        "Softsign",
        "Tanhshrink",
        "Softshrink",
        "Hardshrink",
        "LogSigmoid",
        "Softmax",
        "LogSoftmax",
        "Identity",
        "Flatten",
        "Unflatten",
        "MaxPool1d",
        "MaxPool2d",
        "AvgPool1d",
        "AvgPool2d",
        "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d",
        "AdaptiveMaxPool1d",
        "AdaptiveMaxPool2d",
        "ZeroPad2d",
        "ConstantPad1d",
        "ConstantPad2d",
        "ReflectionPad2d",
        "Upsample",
        "GroupNorm",
        "LayerNorm",
        "Linear",
        "Conv1d",
        "Conv2d",
        "Embedding",
    ]
)
_PLAIN_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem, operator.pow),
    *(operator.floordiv, getattr),
    *(torch.flatten, torch.cat, torch.stack, torch.add, torch.mul, torch.sub, torch.div, torch.relu, torch.tanh, torch.sigmoid),
    *(torch.mean, torch.sum, torch.max, torch.amax, torch.exp, torch.log, torch.sqrt, torch.square, torch.abs, torch.clamp),
    *(torch.softmax, torch.log_softmax, torch.transpose, torch.permute, torch.reshape, torch.squeeze, torch.unsqueeze),
    *(torch.matmul, torch.bmm, torch.split, torch.chunk, torch.arange),
    *(F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.tanh, F.sigmoid, F.softmax, F.log_softmax, F.softplus, F.hardtanh),
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(F.pad, F.normalize, F.scaled_dot_product_attention, F.interpolate),
}  # fmt: skip
_PLAIN_METHODS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "pow",
        "view",
        "reshape",
        "flatten",
        "size",
        "dim",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "mean",
        "sum",
        "amax",
        "max",
        "relu",
        "tanh",
        "sigmoid",
        "softmax",
        "log_softmax",
        "exp",
        "log",
        "sqrt",
        "square",
        "abs",
        "clamp",
        "float",
        "long",
        "to",
        "expand",
        "repeat",
        "chunk",
        "split",
        "matmul",
        "bmm",
        "type_as",
    ]
)


class Program:
    """A model that was compiled; see `compiled`.

    Attributes:
        names: of the trainable parameters, in the order of their places in a row.
        shapes: theirs.
        size: numbers in a row.
        layers: those with parameters, by name.
        once: every layer is used once: only then a record's gradient is the sum of what `Pass.late` has of its layers.
        dropout: it draws.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.shapes = tuple(parameters), tuple(tuple(p.shape) for p in parameters.values())
        self.size = sum(p.numel() for p in parameters.values())
        self.dtype = next(iter(parameters.values())).dtype if parameters else torch.float32
        places, at = {}, 0
        for name, p in parameters.items():
            places[name] = Place(at, tuple(p.shape))
            at += p.numel()
        if next(model.buffers(), None) is not None:
            raise Unsupported("it has buffers")
        _refuse_hooks(model)
        whole = nn.Sequential(model)  # or what is one layer itself would be traced into
        before = _random_states()
        try:
            graph = fx.Tracer().trace(whole)
        except Exception as error:  # whatever a model does that cannot be traced
            raise Unsupported(f"it cannot be traced: {error}") from error
        if before != _random_states():
            raise Unsupported("it draws random numbers of its own")
        self._modules = dict(whole.named_modules())
        self.layers = dict[str, Layer]()
        for node in graph.nodes:
            _refuse_in_place(node)
        self._nodes = [node for node in graph.nodes if node.op == "output" or node.users or node.op == "placeholder"]
        self.once = True
        self.dropout = False
        placed: set[str] = set()
        for node in self._nodes:
            self._check(node, places, placed)
        if missing := set(places) - placed:
            raise Unsupported(f"parameter '{min(missing)}' is used outside of a known layer")
        self._first = {node.name: next((n.name for n in node.all_input_nodes), "") for node in self._nodes}
        self._pool_first()
        self._needed = self._depending()
        self._layer = {
            node.name: self.layers[str(node.target)] for node in self._nodes if str(node.target) in self.layers
        }
        self._after_convolutions()

    def _check(self, node: fx.Node, places: dict[str, Place], placed: set[str]) -> None:
        if node.op in ("placeholder", "output"):
            if node.op == "output" and not isinstance(node.args[0], fx.Node):
                raise Unsupported("it returns more than one tensor")
            return
        if node.op == "call_function" and (node.target in _PLAIN_FUNCTIONS or node.target is F.dropout):
            self.dropout = self.dropout or node.target is F.dropout
            return
        if node.op == "call_method" and node.target in _PLAIN_METHODS:
            return
        if node.op != "call_module":
            raise Unsupported(f"it uses {_called(node)}")
        name, module = str(node.target), self._modules[str(node.target)]
        own = {n: f"{name}.{n}".removeprefix("0.") for n, _ in module.named_parameters(recurse=False)}
        trainable = {n: places[full] for n, full in own.items() if full in places}
        what = _layer(name, module)
        if not trainable:
            if not isinstance(module, (*_PLAIN_MODULES, nn.Dropout)):
                raise Unsupported(f"{what} is not known")
            if getattr(module, "inplace", False):
                raise Unsupported(f"{what} works in place")
            self.dropout = self.dropout or isinstance(module, nn.Dropout)
            return
        kind = LAYERS.get(type(module))
        if kind is None or len(trainable) != len(own):
            raise Unsupported(f"{what} is not known, or trainable in parts only")
        if isinstance(module, nn.Embedding) and (module.padding_idx is not None or module.max_norm or module.sparse):
            raise Unsupported(f"{what} has padding_idx, max_norm or sparse")
        self.once = self.once and name not in self.layers
        self.layers[name] = kind(name, module, trainable)
        placed |= {own[n] for n in trainable}

    def _pool_first(self) -> None:
        """The largest of some values, then ReLU: the same as the other way round, gradient and all, on a quarter of the values."""
        for relu in list(self._nodes):
            pool = next(iter(relu.users), None)
            if relu.op == "call_module" and type(self._modules[str(relu.target)]) is nn.ReLU and len(relu.users) == 1:
                assert pool is not None
                if pool.op == "call_module" and type(self._modules[str(pool.target)]) is nn.MaxPool2d:
                    relu.target, pool.target = pool.target, relu.target

    def _after_convolutions(self) -> None:
        """What follows a convolution is computed with it, while its answer is in the cache."""
        for node in list(self._nodes):
            layer, last = self._layer.get(node.name), node
            if not isinstance(layer, StackedConv) or layer.lines or not self.once:
                continue
            while len(last.users) == 1:
                after = next(iter(last.users))
                module = self._modules[str(after.target)] if after.op == "call_module" else nn.Identity()
                if type(module) not in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.MaxPool2d):
                    break
                layer.tail.append(functools.partial(_FAST[type(module)], module))
                self._nodes.remove(last)
                self._first[after.name] = self._first.pop(last.name)
                self._layer[after.name] = self._layer.pop(last.name)
                last = after

    def _depending(self) -> set[str]:
        """Nodes whose gradient is wanted: those that depend on a parameter."""
        wanted: set[str] = set()
        for node in self._nodes:
            if any(n.name in wanted for n in node.all_input_nodes) or str(node.target) in self.layers:
                wanted.add(node.name)
        return wanted

    @property
    def work(self) -> int:
        """Multiplications of one record's way through it, about."""
        return sum(layer.products for layer in self.layers.values())

    def gradients(
        self,
        run: Pass,
        x: Tensor,
        seed: Callable[[Tensor], Tensor],
        factors: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """One forward and backward pass; gradients are added to run.grads.

        Args:
            x: [rows, ...], in the order of run.groups.
            seed: output [rows, k] -> its gradient, of the sum over records of the loss of each (times its weight).
            factors: norms of the records' gradients [rows] -> what each counts [rows]; asked when run.private.
        """
        run.late.clear()  # of a pass that an error ended
        values: dict[str, Any] = {}
        pulls: dict[str, tuple[list[str], Callable[[Tensor], Sequence[Tensor | None]]]] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                values[node.name] = x
                continue
            if node.op == "output":
                break
            values[node.name] = self._forward(run, node, values, pulls)
        last = self._nodes[-1].args[0]
        assert isinstance(last, fx.Node)
        flowing: dict[str, Tensor] = {last.name: seed(values[last.name])}
        for node in reversed(self._nodes):
            if (dy := flowing.pop(node.name, None)) is None or node.name not in pulls:
                continue
            sources, pull = pulls.pop(node.name)
            for source, dx in zip(sources, pull(dy), strict=True):
                if dx is not None and source in self._needed:
                    flowing[source] = flowing[source] + dx if source in flowing else dx
        if run.private:
            assert factors is not None
            squares = run.late[0][0]()
            for norms, _ in run.late[1:]:
                squares = squares + norms()
            counted = factors(squares.sqrt())
            for _, add in run.late:
                add(counted)
            run.late.clear()

    def _forward(self, run: Pass, node: fx.Node, values: dict[str, Any], pulls: dict[str, Any]) -> Any:
        first = self._first[node.name]
        if (layer := self._layer.get(node.name)) is not None:
            wanted = first in self._needed
            y, kept = layer.forward(run, values[first])
            pulls[node.name] = [first], lambda dy: [layer.backward(run, kept, dy, wanted)]
            return y
        name = str(node.target)
        if node.op == "call_module":
            module, x = self._modules[name], values[first]
            wanted = first in self._needed
            if isinstance(module, nn.Dropout):
                return self._dropout(run, node.name, first, x, module.p, pulls)
            if type(module) in _FAST:
                y, back = _FAST[type(module)](module, x)
                if wanted:
                    pulls[node.name] = [first], lambda dy: [back(dy)]
                return y
        args: Any = fx.node.map_arg(node.args, lambda n: values[n.name])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values[n.name])
        function: Callable[..., Any]
        if node.op == "call_module":
            function = module
        elif node.op == "call_method":
            # What is contiguous there need not be here: images lie channels last.
            name = "reshape" if name == "view" else name
            function = getattr(torch.Tensor, name) if isinstance(args[0], Tensor) else getattr(type(args[0]), name)
        else:
            assert callable(node.target)
            function = node.target
            if function is F.dropout:
                p, training = _dropout_terms(*args, **kwargs)
                return self._dropout(run, node.name, first, args[0], p, pulls) if training else args[0]
            if function in (F.relu, torch.relu):
                y, back = _relu(None, args[0])
                if first in self._needed:
                    pulls[node.name] = [first], lambda dy: [back(dy)]
                return y
        sources = [n for n in node.all_input_nodes if n.name in self._needed and _differentiable(values[n.name])]
        if not sources:
            return function(*args, **kwargs)
        return self._by_autograd(function, node, values, sources, pulls)

    def _by_autograd(
        self,
        function: Callable[..., Any],
        node: fx.Node,
        values: dict[str, Any],
        sources: list[fx.Node],
        pulls: dict[str, Any],
    ) -> Any:
        """Anything that has no parameters: autograd knows its backward."""
        with torch.enable_grad():
            own = {n.name: values[n.name].detach().requires_grad_() for n in sources}
            given = {n.name: own.get(n.name, values[n.name]) for n in node.all_input_nodes}
            y = function(
                *fx.node.map_arg(node.args, lambda n: given[n.name]),
                **fx.node.map_arg(node.kwargs, lambda n: given[n.name]),
            )
        if not isinstance(y, Tensor):
            if isinstance(y, tuple | list) and any(isinstance(part, Tensor) for part in y):
                raise Unsupported(f"{_called(node)} gives more than one tensor")
            return y
        if not y.requires_grad:
            return y

        def pull(dy: Tensor) -> Sequence[Tensor | None]:
            return torch.autograd.grad(y, list(own.values()), dy, allow_unused=True)

        pulls[node.name] = list(own), pull
        return y.detach()

    def _dropout(self, run: Pass, name: str, first: str, x: Tensor, p: float, pulls: dict[str, Any]) -> Tensor:
        """Each client's from its own generator, as `nn.Dropout` draws it for that client alone."""
        if p == 0:
            pulls[name] = [first], lambda dy: [dy]
            return x
        mask = torch.zeros(x.shape, dtype=x.dtype)
        for c, begin, _ in run.groups.slices():
            if run.real[c]:
                mask[begin : begin + run.real[c]].bernoulli_(1 - p, generator=run.generators[c])
        mask /= 1 - p
        pulls[name] = [first], lambda dy: [dy * mask]
        return x * mask


def _dropout_terms(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[float, bool]:
    if inplace:
        raise Unsupported("dropout works in place")
    return p, training


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _relu(_: object, x: Tensor) -> Fast:
    y = x.clamp_min(0)
    return y, lambda dy: aten.threshold_backward(dy, y, 0)


def _tanh(_: object, x: Tensor) -> Fast:
    y = torch.tanh(x)
    return y, lambda dy: aten.tanh_backward(dy, y)


def _sigmoid(_: object, x: Tensor) -> Fast:
    y = torch.sigmoid(x)
    return y, lambda dy: aten.sigmoid_backward(dy, y)


def _flatten(module: nn.Flatten, x: Tensor) -> Fast:
    shape = x.shape
    return x.flatten(module.start_dim, module.end_dim), lambda dy: dy.view(shape)


def _max_pool(module: nn.MaxPool2d, x: Tensor) -> Fast:
    def two(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple | list) else [value, value]

    size, padding, dilation = two(module.kernel_size), two(module.padding), two(module.dilation)
    stride = two(module.stride) if module.stride is not None else size
    y, which = aten.max_pool2d_with_indices(x, size, stride, padding, dilation, module.ceil_mode)
    return y, lambda dy: aten.max_pool2d_with_indices_backward(
        dy, x, size, stride, padding, dilation, module.ceil_mode, which
    )


_FAST: dict[type[nn.Module], Callable[[Any, Tensor], Fast]] = {
    nn.ReLU: _relu,
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
}


def _refuse_hooks(model: nn.Module) -> None:
    """What is hung on a layer or a parameter is not in the trace."""
    for name, module in model.named_modules():
        hung = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hung):
            raise Unsupported(f"layer '{name}' has hooks")
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise Unsupported(f"parameter '{name}' has hooks")


def _random_states() -> tuple[object, ...]:
    numbers: Any = np.random.get_state()
    return random.getstate(), numbers[1].tobytes(), numbers[2], torch.get_rng_state().numpy().tobytes()


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _layer(name: str, module: nn.Module) -> str:
    """A layer by the name that the model's author knows: here the model itself is the layer "0" of a whole."""
    own = name.removeprefix("0").removeprefix(".")
    return f"layer '{own}' ({type(module).__name__})" if own else type(module).__name__


def _refuse_in_place(node: fx.Node) -> None:
    """A statement that changes a tensor has no users in the trace, and others may have seen the tensor before or after."""
    if node.op == "get_attr":
        own = str(node.target).removeprefix("0.")
        made = own.startswith("_tensor_constant")  # torch.fx's name of what forward made
        raise Unsupported("it makes a tensor of its own" if made else f"parameter '{own}' is used outside of a layer")
    if node.op not in ("call_function", "call_method"):
        return
    known = node.target in _PLAIN_METHODS if node.op == "call_method" else node.target in {*_PLAIN_FUNCTIONS, F.dropout}
    if not known:
        raise Unsupported(f"it uses {_called(node)}")
    if "out" in node.kwargs or node.kwargs.get("inplace") or (node.target in _ACTIVATIONS and True in node.args):
        raise Unsupported(f"{_called(node)} works in place")


_ACTIVATIONS = {F.relu, F.leaky_relu, F.elu, F.silu, F.mish, F.hardtanh}


# -- making one ----------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], records: Tensor, private: bool) -> Program:
    """The model as a program, tried against autograd before it is given out: on these records, and on made-up ones.

    Args:
        model: in train mode; passes `tasks.check_layers`.
        loss: (output, labels [n]) -> losses [n].
        records: a few [n, ...], as they will be.
        private: gradients are to be clipped by record.

    Raises:
        Unsupported: it is not made of known layers, mixes records, or comes out otherwise than by autograd.
    """
    program = Program(model)
    if private and not program.once:
        raise Unsupported("a layer is used more than once")
    if private and any(isinstance(layer, StackedNorm) and layer.bias is None for layer in program.layers.values()):
        raise Unsupported("a node refuses a normalisation without bias")
    sizes = (3, 1, 2)
    rows = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    shape, dtype = records.shape[1:], records.dtype
    made_up = [torch.randint(0, 2, (rows, *shape), generator=generator).to(dtype)]  # 0 and 1: also valid as tokens
    if dtype.is_floating_point:
        records = records[records.flatten(1).isfinite().all(1)]
    if len(records):
        made_up.append(records[torch.arange(rows) % len(records)])
    if dtype.is_floating_point:  # of different sizes: what mixes by the largest number of a batch, say, shows
        scale = torch.tensor([1.0, 0.1, 30.0, 3.0, 1.0, 0.3], dtype=dtype).view(-1, *[1] * len(shape))
        made_up.append(torch.randn(rows, *shape, generator=generator, dtype=dtype) * scale)
    params = torch.randn(len(sizes), program.size, generator=generator, dtype=program.dtype) * 0.3
    for number, x in enumerate(made_up):
        labels = torch.zeros(rows, dtype=torch.int64) if not number else torch.tensor([1, 0, 0, 1, 0, 1])
        for groups in (Groups(sizes), Groups([2, 2, 2]), Groups([rows])):
            _try(program, model, loss, params[: len(groups.sizes)], x, labels, groups, private, bool(number))
    return program


def _try(
    program: Program,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    x: Tensor,
    labels: Tensor,
    groups: Groups,
    private: bool,
    may_fail: bool,
) -> None:
    """Raises Unsupported unless gradients are autograd's; for protected work also each record's norm and share.

    Args:
        may_fail: not every model takes these records.
    """
    weights = 0.5 + torch.arange(len(x), dtype=program.dtype) / len(x)
    expected, lengths = torch.zeros_like(params), torch.zeros(len(x), dtype=program.dtype)
    try:
        for c, begin, end in groups.slices():
            for i in range(begin, end) if private else ():
                alone = _by_autograd(model, program, loss, params[c], x[i : i + 1], labels[i : i + 1])
                lengths[i] = alone.norm()
                expected[c] += alone * weights[i]
            if not private:
                expected[c] = _by_autograd(model, program, loss, params[c], x[begin:end], labels[begin:end])
    except Exception as error:
        if may_fail:
            return
        raise Unsupported(f"model or loss fails on made-up records: {error}") from error
    norms: list[Tensor] = []

    def factors(found: Tensor) -> Tensor:
        norms.append(found)
        return weights

    grads = torch.zeros_like(params)
    run = Pass(params, grads, private)
    run.generators = [torch.Generator().manual_seed(0) for _ in groups.sizes]
    run.groups, run.real = groups, groups.sizes

    def seed(output: Tensor) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            return torch.autograd.grad(loss(output, labels).sum(), output)[0]

    try:
        with torch.no_grad():
            program.gradients(run, x, seed, factors)
    except Unsupported:
        raise
    except Exception as error:  # a shape that only one record or one client at a time has, say
        raise Unsupported(f"it cannot be computed for many clients at once: {error}") from error
    if not all(_close(made, alone) for made, alone in zip(grads, expected, strict=True)) or (
        private and not _close(norms[0], lengths)
    ):
        raise Unsupported("gradients for many clients at once differ from those of each alone")


def _close(made: Tensor, expected: Tensor) -> bool:
    largest = float(torch.nan_to_num(expected, 0.0, 0.0, 0.0).abs().max())
    return torch.allclose(made, expected, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)


def _by_autograd(
    model: nn.Module,
    program: Program,
    loss: Callable[[Tensor, Tensor], Tensor],
    params: Tensor,
    records: Tensor,
    labels: Tensor,
) -> Tensor:
    """The gradient of the sum of losses, [parameters]."""
    at, own = 0, {}
    for name, shape in zip(program.names, program.shapes, strict=True):
        own[name] = params[at : at + math.prod(shape)].view(shape).clone().requires_grad_()
        at += math.prod(shape)
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(0)
    try:
        total = loss(torch.func.functional_call(model, own, (records,)), labels).sum()
        parts = torch.autograd.grad(total, list(own.values()), materialize_grads=True)
    finally:
        torch.default_generator.set_state(state)
    return torch.cat([part.reshape(-1) for part in parts])
