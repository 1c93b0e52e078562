"""Federated averaging with pfl-research. Importing pfl joins the other processes: see peer_pfl.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import bare
import harness
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from torch import Tensor, nn
from workloads import CLIP_NORM, NOISE_MULTIPLIER, Workload, loss


class _Measured(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return loss(self.model(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:  # of the first round alone: pfl insists
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class _PrivateAveraging(FederatedAveraging):
    """FederatedAveraging that trains a user by DP-SGD."""

    def __init__(self, train: bare.Train) -> None:
        super().__init__()
        self._train = train

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
        self._train(*user_dataset.raw_data)
        return model.get_model_difference(initial_model_state), Metrics()


class _Ticks(TrainingProcessCallback):
    def __init__(self, watch: harness.Stopwatch) -> None:
        self._watch = watch

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._watch.tick()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._watch.tick()
        return False, Metrics()


def run(workload: Workload, watch: harness.Stopwatch, options: argparse.Namespace) -> Mapping[str, Tensor]:
    clients = workload.data()
    users = [PyTorchTensorDataset(rows, user_id=str(i)) for i, rows in enumerate(clients)]  # batches are cached in them

    def sampled() -> Iterator[int]:
        for number in range(watch.rounds):
            yield from workload.cohort(number, len(clients))

    order = sampled()
    data = FederatedDataset(users.__getitem__, lambda: next(order, 0))
    measured = _Measured(workload.model())
    averaging = FederatedAveraging()
    processing = [WeightByDatapoints()]
    if workload.private and options.privacy == "local":
        processing.insert(0, GaussianMechanism(CLIP_NORM, NOISE_MULTIPLIER))
    elif workload.private:
        averaging = _PrivateAveraging(bare.opacus_once(measured.model, workload))
    model = PyTorchModel(
        measured,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(measured.parameters(), lr=1.0),
    )
    averaging.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=watch.rounds,
            evaluation_frequency=watch.rounds + 1,
            train_cohort_size=min(workload.cohort_size, len(clients)),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=processing),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[_Ticks(watch)],
        send_metrics_to_platform=False,
    )
    return {name.removeprefix("_module."): p.detach() for name, p in measured.model.named_parameters()}
