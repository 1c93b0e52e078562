"""Bytes that are computed from the model's shapes are those that the signed wire really makes, within 2 %."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hansa.common.config import load_config
from hansa.common.flower import Message, RecordDict
from hansa.common.frames import length_of
from hansa.common.messages import Manifest, SignedWire
from hansa.simulations.federation import Simulation
from hansa.simulations.traffic import Traffic, message_bytes
from support import charter, config, identity

CONFIGS = Path(__file__).parents[2] / "configs"


def signed_size(tensors: dict[str, Any], in_reply_to: str = "0" * 64) -> int:
    sender = identity("cleveland")
    wire = SignedWire(sender, {}, "0" * 64)
    manifest = Manifest(
        "train", "coordinator", "cleveland", "0" * 64, "a" * 16, 3, f"{'a' * 16}.3.train.cleveland", in_reply_to, {}
    )
    records, _ = wire.encode(manifest, wire.pack(tensors))
    return size(records)


def size(records: RecordDict) -> int:
    sealed = records["manifest"]["sealed"]
    assert isinstance(sealed, bytes)
    return len(sealed) + sum(length_of(array) for array in records["chunks"].values())  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    "shapes",
    [
        {"w": (2, 35), "b": (2,)},  # configs/heart.yaml
        {"0.weight": (1500, 1000)},  # two chunks
        {f"layers.{i}.weight": (48, 48) for i in range(40)},
        {"c1.weight": (16, 1, 5, 5), "c2.weight": (32, 16, 5, 5), "f.weight": (62, 512), "f.bias": (62,)},
    ],
    ids=["heart", "chunks", "deep", "lenet"],
)
def test_a_message_is_as_large_as_the_signed_wire_makes_it(shapes: dict[str, tuple[int, ...]]) -> None:
    real = signed_size({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "")
    population = charter(partners=(), population={"clients": 200, "declared_records": 50}).charter
    traffic = Traffic(population, shapes, 2)
    assert traffic.request("train") == traffic.request("evaluate") == pytest.approx(real, rel=0.02)
    answer = signed_size({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert traffic.reply("train", 0) == pytest.approx(answer, rel=0.02)
    # The parameters alone are not enough: with many small tensors, or few parameters, the manifest is most of it.
    bare = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert bare < real
    for vector, width in ((np.uint32, 4), (np.uint64, 8)):
        masked = signed_size({"masked": np.zeros(10_000, vector)})
        assert message_bytes({"masked": ((10_000,), width)}) == pytest.approx(masked, rel=0.02)


def exchanged(name: str, rounds: int, tmp_path: Path) -> dict[str, list[tuple[int, ...]]]:
    """By message type, of every real exchange of a run: bytes of request and reply, and those that were estimated."""
    settings = load_config(CONFIGS / f"{name}.yaml")
    settings = settings.model_copy(update={"algorithm": settings.algorithm.model_copy(update={"rounds": rounds})})
    simulation = Simulation(settings, CONFIGS, tmp_path / name)
    shapes = {n: v.shape for n, v in simulation._initial().items()}
    traffic = Traffic(simulation.signed.charter, shapes, len(simulation.task.classes))
    deliver = simulation.grid._deliver  # type: ignore[attr-defined]
    sizes = [entry.declared_records for entry in (settings.partners or {}).values()]
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    def spy(message: Message) -> Message:
        reply: Message = deliver(message)
        kind = message.metadata.message_type
        if kind in ("train", "evaluate", "query.agree", "query.reveal") and int(message.metadata.group_id) > 1:
            records = sizes[message.metadata.dst_node_id - 1]
            estimates = traffic.request(kind), traffic.reply(kind, records)
            found[kind].append((size(message.content), size(reply.content), *estimates))
        return reply

    simulation.grid._deliver = spy  # type: ignore[attr-defined]
    try:
        simulation.run()
    finally:
        simulation.close()
    return found


def test_messages_of_a_tiny_model_are_about_as_estimated(tmp_path: Path) -> None:
    """72 parameters: nearly all of a message is what is told of ledgers and masks, which varies from round to round."""
    found = exchanged("heart", 6, tmp_path)
    masked = exchanged("heart-shared", 6, tmp_path)
    for kinds in (found, masked):
        for kind, sizes in kinds.items():
            down, up, estimated_down, estimated_up = np.sum(sizes, axis=0)
            assert estimated_down == pytest.approx(down, rel=0.15 if kind == "train" else 0.02), kind
            assert estimated_up == pytest.approx(up, rel=0.15 if kind == "train" else 0.02), kind
    assert set(found) == {"train", "evaluate"}
    assert set(masked) == {"train", "query.agree", "query.reveal", "evaluate"}


def test_noisy_histograms(tmp_path: Path) -> None:
    bins = {"kind": "private", "noise_multiplier": 5, "bins": 40}
    terms = charter(
        evaluation=bins, privacy={"kind": "local", "epsilon": 1, "delta": 1e-4, "clip_norm": 1, "noise_multiplier": 50}
    )
    real = signed_size({"histogram": np.zeros((2, 40))})
    assert Traffic(terms.charter, {"w": (2,)}, 2).reply("evaluate", 100) == pytest.approx(real, rel=0.02)
    assert config().system is None
