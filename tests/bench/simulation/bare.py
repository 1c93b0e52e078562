"""The yardstick: plain PyTorch. Load the parameters into one model, train on consecutive batches, average by rows.

    python bare.py --workload w2-dp [--private engine|each|once|functional]

DP-SGD four ways: Opacus' `PrivacyEngine.make_private` for each client, as its documentation shows; by hand from its
GradSampleModule, wrapped around the model for `each` client or `once` for all; by hand from torch.func (`functional`: vmap of
grad). `table.py` measures all and divides by the fastest. Those by hand draw noise from torch's generator, add it in float32 and
keep no account: less work than an engine has that protects anybody.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping

import harness
import torch
from torch import Tensor, nn
from workloads import CLIP_NORM, NOISE_MULTIPLIER, Workload, loss

Train = Callable[[Tensor, Tensor], None]


def plain(model: nn.Module, workload: Workload) -> Train:
    """One epoch of consecutive batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)

    def train(x: Tensor, y: Tensor) -> None:
        for some_x, some_y in zip(x.split(workload.batch), y.split(workload.batch), strict=True):
            optimizer.zero_grad()
            loss(model(some_x), some_y).backward()
            optimizer.step()

    return train


def private(model: nn.Module, workload: Workload, by_record: Callable[[Tensor, Tensor], list[Tensor]]) -> Train:
    """DP-SGD from gradients by record, [n, ...] for each parameter."""
    parameters = list(model.parameters())

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> None:
        if len(y):
            with torch.enable_grad():
                gradients = by_record(x, y)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            factors = (CLIP_NORM / norms).clamp(max=1.0)
            sums = [(factors @ g.flatten(1)).view_as(p) for g, p in zip(gradients, parameters, strict=True)]
        else:
            sums = [torch.zeros_like(p) for p in parameters]
        for p, total in zip(parameters, sums, strict=True):
            total += torch.normal(0.0, NOISE_MULTIPLIER * CLIP_NORM, p.shape)
            p.add_(total, alpha=-workload.lr / workload.batch)

    def train(x: Tensor, y: Tensor) -> None:
        for _ in range(workload.steps(len(y))):
            taken = torch.rand(len(y)) < workload.batch / len(y)
            step(x[taken], y[taken])

    return train


def _opacus(model: nn.Module, workload: Workload) -> tuple[Train, Callable[[], None]]:
    """DP-SGD by Opacus' hooks, and what takes them off again."""
    from opacus import GradSampleModule

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    wrapped = GradSampleModule(model, loss_reduction="sum")
    parameters = list(model.parameters())

    def by_record(x: Tensor, y: Tensor) -> list[Tensor]:
        loss(wrapped(x), y, "none").sum().backward()
        gradients = [p.grad_sample for p in parameters]
        for p in parameters:
            p.grad = p.grad_sample = None
        return gradients

    return private(model, workload, by_record), wrapped.to_standard_module


def opacus_once(model: nn.Module, workload: Workload) -> Train:
    return _opacus(model, workload)[0]


def opacus_each(model: nn.Module, workload: Workload) -> Train:
    def train(x: Tensor, y: Tensor) -> None:
        train_one, unwrap = _opacus(model, workload)
        train_one(x, y)
        unwrap()

    return train


def opacus_engine(model: nn.Module, workload: Workload) -> Train:
    from opacus_client import train_privately

    return lambda x, y: train_privately(model, x, y, workload)


def functional(model: nn.Module, workload: Workload) -> Train:
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())

    def one(values: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return loss(torch.func.functional_call(model, state, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    def by_record(x: Tensor, y: Tensor) -> list[Tensor]:
        return each([p.detach() for p in parameters], x, y)

    return private(model, workload, by_record)


PRIVATE = {"engine": opacus_engine, "each": opacus_each, "once": opacus_once, "functional": functional}


def run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    model = workload.model()
    clients = workload.data()
    train = (PRIVATE[options.private] if workload.private else plain)(model, workload)
    parameters = list(model.parameters())
    current = [p.detach().clone() for p in parameters]
    watch.tick()
    for number in range(watch.rounds):
        cohort = [clients[i] for i in workload.cohort(number, len(clients))][:: -1 if options.backwards else 1]
        everyone = sum(len(y) for _, y in cohort)
        mean = [torch.zeros_like(p) for p in current]
        for x, y in cohort:
            with torch.no_grad():
                for p, start in zip(parameters, current, strict=True):
                    p.copy_(start)
            train(x, y)
            with torch.no_grad():
                for total, p in zip(mean, parameters, strict=True):
                    total.add_(p, alpha=len(y) / everyone)
        current = mean
        watch.tick()
    return {name: value for (name, _), value in zip(model.named_parameters(), current, strict=True)}


if __name__ == "__main__":
    parser = harness.arguments()
    parser.add_argument("--private", choices=PRIVATE, default="once")
    parser.add_argument(
        "--backwards", action="store_true", help="average in the opposite order: what rounding alone does"
    )
    harness.main("bare", lambda: f"torch {torch.__version__}", run, parser)
