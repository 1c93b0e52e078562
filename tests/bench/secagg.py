"""What secure aggregation costs a client and the coordinator, beside Flower's SecAgg+, on the same vector.

    python tests/bench/secagg.py [--partners 10 30 100] [--repeat 7]

Bars of issue 5, for 1M parameters: without dropouts a client computes (CPU time) at most 60 ms a round at 10 partners and 150 ms
at 30, and uploads at most 4.1 MB at 10; with 30 % dropped after their masks were dealt, the coordinator opens the sum within 2 s
(by the wall clock) at 10 and at 30. Everything else is printed for information. Exits 1 when a bar is missed.

One client is measured; the others are played once, before the clock runs. Ours and Flower's take turns, after one of each that is
not counted. What is in the figures:

  ours    everything that a client does in a round, from checking what was agreed to three encoded answers. Key and identity are of
          a run, and made before. An answer is JSON, bytes in it base64; the vector travels beside it as raw bytes. This is an
          assumption: the round loop does not send them yet. Reading JSON, transport and the node's ledger are in no figure.
  flower  the four stages of flwr's secaggplus_mod, called one by one, with every peer a neighbour and our threshold; its answers
          in its own protobuf. Its stages also make two keys a round and quantize, which ours do elsewhere; quantizing is timed once
          more by itself and left out of the second ratio. Copying to and from protobuf, and its mod's checks and saved state, are in
          no figure. Its masks are of another strength: a Mersenne Twister from a seed of 32 bits.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_multiply
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from hansa.common.identity import Identity
from hansa.common.noise import SecureNoise
from hansa.common.secagg import (
    Agreement,
    Revealed,
    Ring,
    Sent,
    Sum,
    agree,
    mask,
    new_key,
    public_key,
    reveal,
    threshold_of,
    to_ring,
)

LENGTH = 1_000_000
CLIP, TARGET = 8.0, 2**22
"""Flower's defaults: values from -8 to 8 on a grid of 2^22 points."""
CLIENT_MS = {10: 60.0, 30: 150.0}
UPLOAD_MB = {10: 4.1}
RECOVERY_S = {10: 2.0, 30: 2.0}


@dataclass
class Cost:
    """Of one client in one round: seconds, and bytes that it sends."""

    cpu: float = 0.0
    wall: float = 0.0
    sent: int = 0

    def run(self, work: Callable[[], Any]) -> Any:
        """Do this with the clocks running."""
        wall, cpu = time.perf_counter(), time.process_time()
        done = work()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        return done

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall, self.sent + other.sent)


# -- ours --------------------------------------------------------------------------------------------------------------


def encoded(**said: Any) -> bytes:
    """An answer as JSON."""
    return json.dumps(said, separators=(",", ":"), default=lambda data: base64.b64encode(data).decode()).encode()


def first_answer(masked: Ring, sent: Sent) -> list[bytes]:
    return [masked.tobytes(), encoded(word=sent.word, shares=sent.shares, commitments=sent.commitments)]


def last_answer(revealed: Revealed) -> list[bytes]:
    between: dict[str, dict[str, bytes]] = {}
    for (survivor, gone), share in revealed.between.items():
        between.setdefault(survivor, {})[gone] = share
    return [encoded(own=revealed.own, dropped=revealed.dropped, between=between)]


class Ours:
    """Partners of one attempt, all of whom have answered, once for each number of those who drop out before they send a vector."""

    def __init__(self, count: int, values: Ring, dropouts: Sequence[int]) -> None:
        self.names = [f"partner-{at:03d}" for at in range(count)]
        self.identities = {name: Identity.generate(name) for name in self.names}
        self.keys = {name: one.key for name, one in self.identities.items()}
        self.private = {name: new_key() for name in self.names}
        self.values, self.colluding = values, count // 10  # t: threshold 17 at 30 partners, as in docs/adr/0014
        threshold = threshold_of(count, self.colluding)
        self.agreement = Agreement(
            charter_sha256="c" * 64,
            run_id="bench",
            round=1,
            attempt=0,
            model_sha256="d" * 64,
            keys={name: public_key(key) for name, key in self.private.items()},
            threshold=threshold,
            quorum=threshold,
            bits=32,
            length=LENGTH,
        )
        self.sums = {gone: Sum(self.agreement) for gone in dropouts}
        for at, name in enumerate(self.names):
            masked, sent = mask(self.agreement, self.identities[name], self.private[name], values)
            for gone, total in self.sums.items():
                if at < count - gone:
                    total.add(name, masked, sent, self.keys[name])
        self.signatures: dict[int, dict[str, bytes]] = {}
        self.revealed: dict[int, dict[str, Revealed]] = {}
        for gone, total in self.sums.items():
            words = total.words()
            self.signatures[gone] = {
                name: agree(self.agreement, self.identities[name], words, self.keys, None) for name in words
            }
            self.revealed[gone] = {name: self._reveal(self.agreement, name, gone, total.shares(name)) for name in words}

    def _reveal(self, agreement: Agreement, name: str, gone: int, shares: Mapping[str, bytes]) -> Revealed:
        signatures = self.signatures[gone]
        return reveal(agreement, name, self.private[name], list(signatures), signatures, shares, self.keys)

    def client(self) -> dict[int, list[Cost]]:
        """By who dropped out, what each of the three answers costs."""
        me = self.names[0]
        identity, private = self.identities[me], self.private[me]
        agreement = replace(self.agreement)  # its digest is not computed yet
        quorum = agreement.quorum

        def masking() -> tuple[Sent, list[bytes]]:
            agreement.check(me, private, self.names, self.colluding, quorum)
            masked, sent = mask(agreement, identity, private, self.values)
            return sent, first_answer(masked, sent)

        first = Cost()
        sent, answer = first.run(masking)
        first.sent = sum(map(len, answer))
        costs = {}
        for gone, total in self.sums.items():
            words, shares = total.words(), {**total.shares(me), me: sent.shares[me]}
            second, third = Cost(), Cost()
            answer = second.run(
                lambda words=words: [encoded(signature=agree(agreement, identity, words, self.keys, None))]
            )
            second.sent = sum(map(len, answer))
            answer = third.run(lambda gone=gone, shares=shares: last_answer(self._reveal(agreement, me, gone, shares)))
            third.sent = sum(map(len, answer))
            costs[gone] = [first, second, third]
        return costs

    def open(self, gone: int, silent: bool) -> Cost:
        """What the coordinator pays for the sum.

        Args:
            silent: as few reveal as may: masks between the others and who dropped out come from shares, too.
        """
        revealed = list(self.revealed[gone].items())
        if silent:
            revealed = revealed[: self.agreement.threshold]
        cost = Cost()
        total = cost.run(lambda: self.sums[gone].open(dict(revealed)))
        wanted = self.values * np.uint32(len(self.sums[gone].arrived))
        if self.sums[gone].liars or not np.array_equal(total, wanted):
            raise SystemExit("the sum is wrong: nothing that was measured counts")
        return cost


# -- Flower ------------------------------------------------------------------------------------------------------------


class Flower:
    """One client of SecAgg+, and the keys of its peers."""

    def __init__(self, count: int, floats: npt.NDArray[np.float32], threshold: int) -> None:
        self.ids = [2**62 + at for at in range(count)]  # as long as Flower's own
        self.parameters, self.floats = ndarrays_to_parameters([floats]), floats
        self.peers = {
            one: [public_key_to_bytes(generate_key_pairs()[1]), public_key_to_bytes(generate_key_pairs()[1])]
            for one in self.ids[1:]
        }
        self.terms = {
            Key.SAMPLE_NUMBER: count,
            Key.SHARE_NUMBER: count,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: 2**32,
            Key.MAX_WEIGHT: 1000.0,
        }

    def client(self, dropouts: Sequence[int]) -> tuple[dict[int, Cost], Cost]:
        """By who dropped out, what the four stages cost together; and of that what quantizing does."""
        me = self.ids[0]
        state = SecAggPlusState(nid=me)
        before = Cost()

        def stage(cost: Cost, work: Callable[[], Any]) -> Any:
            reply = cost.run(work)
            record = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(reply))})
            cost.sent += recorddict_to_proto(record).ByteSize()
            return reply

        own = stage(before, lambda: _setup(state, self.terms))
        keys = {str(one): pair for one, pair in self.peers.items()}
        keys = {str(me): [own[Key.PUBLIC_KEY_1], own[Key.PUBLIC_KEY_2]], **keys}
        stage(before, lambda: _share_keys(state, keys))
        # What the peers dealt: only opened and kept here, so that any bytes of the right length will do.
        shares = [os.urandom(len(held[me])) for held in (state.rd_seed_share_dict, state.sk1_share_dict)]
        dealt = {
            Key.SOURCE_LIST: list(self.peers),
            Key.CIPHERTEXT_LIST: [
                encrypt(state.ss2_dict[one], share_keys_plaintext_concat(one, me, *shares)) for one in self.peers
            ],
        }
        stage(before, lambda: _collect_masked_vectors(state, dealt, 1000, self.parameters))
        costs = {}
        for gone in dropouts:
            alive, dead = self.ids[: len(self.ids) - gone], self.ids[len(self.ids) - gone :]
            last = Cost()
            asked = {Key.ACTIVE_NODE_ID_LIST: alive, Key.DEAD_NODE_ID_LIST: dead}
            stage(last, lambda asked=asked: _unmask(state, asked))
            costs[gone] = before + last
        quantizing = Cost()
        quantizing.run(lambda: quantize(parameters_multiply([self.floats], 1.0), CLIP, TARGET))
        return costs, quantizing


# -- the table ---------------------------------------------------------------------------------------------------------


def middle(costs: Sequence[Cost]) -> Cost:
    """The median of each."""
    return Cost(*(statistics.median(getattr(one, what) for one in costs) for what in ("cpu", "wall", "sent")))


def spread(costs: Sequence[Cost]) -> str:
    found = [one.cpu * 1e3 for one in costs]
    return f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def measure(count: int, repeat: int, missed: list[str]) -> None:
    """Print what `count` partners cost, and note the bars that are missed."""
    dropouts = (0, round(0.3 * count))
    floats = np.random.default_rng(1).standard_normal(LENGTH).astype(np.float32)
    grid = np.rint(np.clip(floats, -CLIP, CLIP).astype(np.float64) * (TARGET / (2 * CLIP))).astype(np.int64)
    ours = Ours(count, to_ring(grid, 32), dropouts)
    flower = Flower(count, floats, ours.agreement.threshold)
    rounds, theirs = [], []
    for _ in range(repeat + 1):
        rounds.append(ours.client())
        theirs.append(flower.client(dropouts))
    rounds, theirs = rounds[1:], theirs[1:]
    quantizing = middle([one for _, one in theirs])

    def bar(what: str, found: float, limits: Mapping[int, float], unit: str) -> None:
        if count in limits and found > limits[count]:
            missed.append(f"{count} partners: {what} {found:.2f} {unit}, the bar is {limits[count]:g} {unit}")

    print(f"{count} partners, threshold {ours.agreement.threshold}, {LENGTH:,} parameters, medians of {repeat}")
    for gone in dropouts:
        mine = [sum(one[gone], Cost()) for one in rounds]
        other = [one[gone] for one, _ in theirs]
        a, b = middle(mine), middle(other)
        parts = [middle(list(one)) for one in zip(*(one[gone] for one in rounds), strict=True)]
        print(f"  {gone} dropped     {'CPU ms':>24} {'wall ms':>9} {'upload bytes':>14}")
        for name, all_of, one in (("ours", mine, a), ("Flower", other, b)):
            print(f"    {name:<11} {spread(all_of):>24} {one.wall * 1e3:>9.1f} {int(one.sent):>14,}")
        bare = b.cpu - quantizing.cpu
        print(f"    ours/Flower {a.cpu / b.cpu:>24.2f} {a.wall / b.wall:>9.2f} {a.sent / b.sent:>14.2f}"
              f"   CPU without Flower's quantizing ({quantizing.cpu * 1e3:.1f} ms): {a.cpu / bare:.2f}")  # fmt: skip
        print("    ours, by answer: " + "; ".join(
            f"{name} {one.cpu * 1e3:.1f} ms, {int(one.sent):,} bytes"
            for name, one in zip(("mask", "agree", "reveal"), parts, strict=True)))  # fmt: skip
        if not gone:
            bar("a client computes", a.cpu * 1e3, CLIENT_MS, "ms")
            bar("a client uploads", a.sent / 1e6, UPLOAD_MB, "MB")
        for silent in (False, True) if gone else (False,):
            found = [ours.open(gone, silent) for _ in range(repeat)]
            wall = middle(found).wall
            told = f"only {ours.agreement.threshold} reveal" if silent else "all reveal"
            print(f"    coordinator opens, {told}: CPU ms {spread(found)}, wall {wall * 1e3:.1f}")
            if gone and not silent:
                bar(f"with {gone} dropped the coordinator opens in", wall, RECOVERY_S, "s")
    print(flush=True)


def noise(repeat: int) -> None:
    """What the noise costs that goes in before the mask."""
    for std in (100.0, 1e5):
        costs = [Cost() for _ in range(repeat)]
        for one in costs:
            one.run(lambda std=std: SecureNoise().discrete_gaussian(LENGTH, std))
        print(f"discrete Gaussian noise, {LENGTH:,} values, std {std:g}: CPU ms {spread(costs)}, "
              f"wall {middle(costs).wall * 1e3:.1f}")  # fmt: skip


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--partners", type=int, nargs="+", default=[10, 30, 100])
    asked.add_argument("--repeat", type=int, default=7, help="rounds whose median is taken, 5 or more")
    args = asked.parse_args()
    if args.repeat < 5 or min(args.partners) < 3:
        asked.error("a median of 5 or more, and 3 partners or more")
    missed: list[str] = []
    for count in args.partners:
        measure(count, args.repeat, missed)
    noise(args.repeat)
    for one in missed:
        print(f"MISSED: {one}")
    if not missed:
        held = [str(count) for count in args.partners if count in CLIENT_MS]
        print(
            f"all bars held at {' and '.join(held)} partners" if held else "no bar is set for these numbers of partners"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
