"""A malicious coordinator under secure aggregation: each attack ends in a named refusal that is on the node's ledger, and gains nothing.

It has the coordinator's real identity key and asks four real nodes what it likes; where it says so, one partner works with it.
Quorum 3, threshold 3, one may collude, two rounds, two retries (tests/masked_support.py). After each attack an honest round of
everybody goes through: the fixture sees to it.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hansa.clients.datasets import RegisteredDataset
from hansa.clients.gate import Gate
from hansa.clients.law import Control
from hansa.clients.outbox import Outbox
from hansa.common import secagg
from hansa.common.certificates import check_peer, read_certificate
from hansa.common.errors import ConfigError, IdentityError, MessageError, Refusal, RunFailed
from hansa.common.flower import Message
from hansa.common.identity import Envelope, Identity, canonical, read_envelope, write_envelope
from hansa.common.masking import revealed_from
from hansa.common.messages import Manifest, to_bytes
from hansa.common.noise import SecureNoise
from hansa.common.secagg import KEY_TYPE, LIST_TYPE, Ring, agree, new_key, signed_key
from hansa.simulations.federation import Simulation
from masked_support import (
    HOSPITALS,
    NAMES,
    RETRIES,
    ROUNDS,
    Asked,
    Attempt,
    Between,
    Plain,
    Plot,
    Sums,
    Town,
    retold,
    simulation,
)
from support import Killed

KEY, ROSTER, TERMS = Refusal.SECAGG_KEY, Refusal.SECAGG_ROSTER, Refusal.SECAGG_TERMS
SURVIVORS, SHARE = Refusal.SECAGG_SURVIVORS, Refusal.SECAGG_SHARE
THREE = NAMES[:3]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    try:
        for name in NAMES:
            made.start(name)
        yield made
    finally:
        made.close()


@pytest.fixture
def town(standing: Town) -> Iterator[Town]:
    """Everybody is up; after the attack an honest round of everybody goes through, and opens to their sum."""
    yield standing
    for name in NAMES:
        if name not in standing.sites:
            standing.start(name)
    with pytest.MonkeyPatch.context() as patch:
        plain, honest = Plain.watch(patch), standing.plot()
        assert honest.attempt().train().agree().reveal().open() == plain.sum(NAMES, 1)
        honest.close()
    assert all(honest.kinds(name) == ["hold", "debit", "commit", "survivors", "release"] for name in NAMES)


@pytest.fixture
def plot(town: Town) -> Iterator[Plot]:
    """A run of the attacker, in which somebody may collude."""
    made = town.plot()
    yield made
    made.close()


def masks(town: Town, name: str) -> Path:
    return town.keys.home(name).path / "state" / "masks"


def private_key(plot: Plot, name: str) -> bytes:
    """What only the partner has: to show what an attacker is missing, or what one who colludes gives away."""
    return next(
        key
        for key in (path.read_bytes() for path in masks(plot.town, name).iterdir())
        if secagg.public_key(key) in read_envelope(plot.envelopes[name], KEY_TYPE).payload.decode()
    )


def without_pairs(attempt: Attempt, victim: str, seeds: dict[str, bytes]) -> Ring:
    """A masked vector, with the masks of these seeds taken off; the own mask is still on it."""
    vector = attempt.vectors[victim].copy()
    for peer, seed in seeds.items():
        secagg._add_stream(vector, seed, -secagg._sign(attempt.agreed, victim, peer))
    return vector


def own_seed(attempt: Attempt, victim: str, shares: dict[str, bytes]) -> bytes | None:
    """The own mask's seed from shares, where they are enough."""
    points = {attempt.agreed.roster.index(holder) + 1: share for holder, share in shares.items()}
    seed = secagg._combine(points)(0)
    made = seed.to_bytes(secagg.SHARE, "big")[1:]
    return made if sha256(made).hexdigest() == attempt.sent[victim].commitments[victim] else None


# -- keys ----------------------------------------------------------------------------------------------------------------


def _body(plot: Plot, **changes: Any) -> bytes:
    said = json.loads(read_envelope(plot.envelopes["ben"], KEY_TYPE).payload)
    return canonical({**said, **changes})


def _mine(plot: Plot) -> bytes:
    """Ben's key, replaced by one that the coordinator signed in his name."""
    return signed_key(Identity("ben", plot.boss._private), plot.signed.sha256, plot.run, new_key())


def _unsigned(plot: Plot) -> bytes:
    return write_envelope(Envelope(KEY_TYPE, _body(plot, key=secagg.public_key(new_key())), ()))


def _edited(plot: Plot) -> bytes:
    """Another key under ben's signature."""
    signed = read_envelope(plot.envelopes["ben"], KEY_TYPE)
    return write_envelope(replace(signed, payload=_body(plot, key=secagg.public_key(new_key()))))


def _twice(plot: Plot) -> bytes:
    payload = _body(plot)
    signed = read_envelope(plot.envelopes["ben"], KEY_TYPE)
    mine = (plot.boss.key, plot.boss.sign(KEY_TYPE, payload))
    return write_envelope(replace(signed, signatures=(*signed.signatures, mine)))


def _ca(plot: Plot) -> bytes:
    """By somebody to whom the connection CA issued a valid certificate in ben's name: he has no identity key of the charter."""
    thief = plot.town.keys.home("ben", "thief")
    with pytest.raises(IdentityError, match="not endorsed by ben's identity key"):  # nor does the link let him in
        check_peer(read_certificate(thief.tls_certificate()), plot.identities, datetime.now(UTC), None)
    return signed_key(thief.identity(), plot.signed.sha256, plot.run, new_key())


def _of_another(plot: Plot, charter: str) -> bytes:
    other = plot.town.plot(charter)
    other.close()
    return other.envelopes["ben"]


FORGED: dict[str, tuple[Callable[[Plot], bytes], str]] = {
    "made by the coordinator": (_mine, "not signed by"),
    "unsigned": (_unsigned, "not exactly one signature"),
    "edited": (_edited, "bad signature"),
    "signed twice": (_twice, "not exactly one signature"),
    "by a certificate of the CA": (_ca, "not signed by"),
    "another partner's": (lambda plot: plot.envelopes["cy"], "not signed by"),
    "of another run": (lambda plot: _of_another(plot, "one"), "it is for another run, charter or partner"),
    "of another charter": (lambda plot: _of_another(plot, "none"), "it is for another run, charter or partner"),
    "no envelope": (lambda plot: b"key", ""),
}


@pytest.mark.parametrize("made", FORGED)
def test_a_key_that_is_not_its_partners_for_this_run(plot: Plot, made: str) -> None:
    """Refused before anything is spent, and in the exchanges after a vector as well."""
    make, words = FORGED[made]
    bad, good = plot.attempt(keys={"ben": make(plot)}), plot.attempt()
    words = f"the key given as ben's: {words}"
    with plot.town.nothing_spent():
        plot.refused(bad.ask("train", "ada"), KEY, words, plot.model)
    if made != "made by the coordinator":
        return
    good.train().agree()
    bad.sent, bad.signatures = good.sent, good.signatures
    plot.refused(bad.ask_agree("ada", NAMES, request_id="agree"), KEY, words)
    plot.refused(bad.ask_reveal("ada", NAMES), KEY, words)


def _top_bit(key: str) -> str:
    raw = bytes.fromhex(key)
    return (raw[:-1] + bytes([raw[-1] ^ 128])).hex()


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        pytest.param(str, "two partners with one key", id="as it is"),
        pytest.param(str.upper, "the key given as ben's: no key in it", id="in capitals"),
        pytest.param(_top_bit, "ben's: a key in another form", id="with the bit that X25519 ignores"),
    ],
)
def test_one_key_for_two_partners(plot: Plot, spelled: Callable[[str], str], words: str) -> None:
    """Ben, who colludes, signs ada's public key as his own: the secrets of others with both would be the same."""
    stolen = spelled(json.loads(read_envelope(plot.envelopes["ada"], KEY_TYPE).payload)["key"])
    twin = plot.town.keys.home("ben").identity().seal(KEY_TYPE, _body(plot, key=stolen))
    with plot.town.nothing_spent():
        for asked in ("ada", "cy"):
            attempt = plot.attempt(keys={"ben": twin})
            plot.refused(attempt.ask("train", asked), KEY, words, plot.model)


def test_a_key_for_which_every_secret_is_known(plot: Plot) -> None:
    """Ben, who colludes, signs a point of small order: whatever the peer's key is, the secret between them is 0."""
    zero = plot.town.keys.home("ben").identity().seal(KEY_TYPE, _body(plot, key="00" * 32))
    with plot.town.nothing_spent():
        plot.refused(plot.attempt(keys={"ben": zero}).ask("train", "ada"), KEY, "the key given as ben's", plot.model)


def test_strangers_in_the_roster(plot: Plot) -> None:
    eve = Identity.generate("eve")
    keys = {
        "eve": signed_key(eve, plot.signed.sha256, plot.run, new_key()),
        "coordinator": signed_key(plot.boss, plot.signed.sha256, plot.run, new_key()),
    }
    with plot.town.nothing_spent():
        for name in keys:
            for roster in ((*NAMES, name), (*THREE, name)):
                attempt = plot.attempt(roster=roster, keys=keys)
                plot.refused(attempt.ask("train", "ada"), ROSTER, f"'{name}' is no partner of this charter", plot.model)
        plot.refused(
            plot.attempt(roster=("ben", "cy", "dee")).ask("train", "ada"),
            ROSTER,
            "ada is not in the roster",
            plot.model,
        )
    ask = plot.attempt().ask("train", "ada")
    ask.fields["masked"]["keys"].append(ask.fields["masked"]["keys"][1])
    with plot.town.nothing_recorded(), pytest.raises(MessageError, match="one partner twice"):
        plot.send(ask, plot.model)


# -- terms ---------------------------------------------------------------------------------------------------------------

LOWERED: dict[str, tuple[dict[str, Any], str]] = {
    "threshold lowered": ({"threshold": 2}, "a threshold of 2"),
    "threshold raised": ({"threshold": 4}, "a threshold of 4"),
    "quorum lowered": ({"quorum": 2}, "a quorum of 2, agreed is 3"),
    "quorum none": ({"quorum": 0}, "a quorum of 0, agreed is 3"),
    "another ring": ({"bits": 64}, "of 64 bits are not what the charter comes to"),
    "no ring": ({"bits": 16}, "no ring of 16 bits"),
    "shorter": ({"length": 1}, "1 numbers of 32 bits are not what the charter comes to"),
    "one retry too many": ({"attempt": RETRIES + 1}, "attempt 3, and 2 retries agreed"),
}


@pytest.mark.parametrize("charter", ["one", "none"])
def test_terms_that_were_not_agreed(town: Town, charter: str) -> None:
    plot = town.plot(charter)
    good = plot.attempt().train()
    for terms, words in LOWERED.values():
        bad = plot.attempt(terms=terms)
        bad.sent = good.sent
        with town.nothing_spent():
            plot.refused(bad.ask("train", "ada", request_id="train"), TERMS, words, plot.model)
            plot.refused(bad.ask_agree("ada", NAMES), TERMS, words)
            plot.refused(bad.ask_reveal("ada", NAMES), TERMS, words)
    plot.close()


def test_a_roster_below_the_quorum(plot: Plot) -> None:
    with plot.town.nothing_spent():
        for roster in (("ada", "ben"), ("ada",)):
            words = f"a roster of {len(roster)} or a quorum of 3, agreed is 3"
            plot.refused(plot.attempt(roster=roster).ask("train", "ada"), TERMS, words, plot.model)


def test_survivors_below_the_quorum(plot: Plot) -> None:
    """Also where all of the roster arrived: two lists of two each would open two sums of two."""
    attempt = plot.attempt().train()
    with plot.town.nothing_spent():
        for listed in (("ada", "ben"), ("ada",)):
            words = f"{len(listed)} survivors, agreed are 3 or more"
            plot.refused(attempt.ask_agree("ada", listed), SURVIVORS, words)
    assert plot.kinds("ada") == ["hold", "debit", "commit"]
    attempt.agree()  # nothing was signed before


# -- what partners are told must be the same --------------------------------------------------------------------------------


def test_rosters_that_differ_between_partners(plot: Plot) -> None:
    """Ben is told of fewer, or of another order, than the others: his masks do not cancel, and nobody agrees with him."""
    ours = plot.attempt().train("ada", "cy", "dee")
    theirs = plot.attempt(roster=("dee", "cy", "ben", "ada")).train("ben")
    words = {**{name: one.word for name, one in ours.sent.items()}, "ben": theirs.sent["ben"].word}
    plot.refused(ours.ask_agree("ada", words), SURVIVORS, "ben took part in another attempt")
    plot.refused(theirs.ask_agree("ben", words), SURVIVORS, "ada took part in another attempt")
    less = plot.attempt(1, 1, roster=THREE).train("ada", "ben")
    more = plot.attempt(1, 1).train("cy")
    words = {name: one.word for name, one in (*less.sent.items(), *more.sent.items())}
    plot.refused(less.ask_agree("ada", words), SURVIVORS, "cy took part in another attempt")
    plot.refused(more.ask_agree("cy", words), SURVIVORS, "took part in another attempt")


def test_another_model_for_one_partner(plot: Plot) -> None:
    """A gradient at a model of the coordinator's choice would be in the sum."""
    other = {name: value + 1 for name, value in plot.model.items()}
    ours, theirs = plot.attempt().train("ada", "cy", "dee"), plot.attempt(model=other).train("ben")
    words = {**{name: one.word for name, one in ours.sent.items()}, "ben": theirs.sent["ben"].word}
    plot.refused(ours.ask_agree("ada", words), SURVIVORS, "ben took part in another attempt (round, model, roster")
    plot.refused(theirs.ask_agree("ben", words), SURVIVORS, "took part in another attempt")
    # to say the other model's name to who has the first one does not help
    plot.refused(theirs.ask_agree("ada", words, request_id="agree"), SURVIVORS, "sent no vector in this attempt")


def test_words_of_another_round_or_partner(plot: Plot) -> None:
    """Somebody whose vector never came is called alive: with his word of another round, of another's, of the coordinator's own."""
    before, now = plot.attempt(1).train(), plot.attempt(2).train(*THREE)
    mine = Identity("dee", plot.boss._private).seal(secagg.WORD_TYPE, b"{}")
    for word, words in (
        (before.sent["dee"].word, "dee took part in another attempt"),
        (now.sent["cy"].word, "the word given as dee's: not signed by"),
        (mine, "the word given as dee's: not signed by"),
        (b"", "the word given as dee's"),
    ):
        said = {**{name: one.word for name, one in now.sent.items()}, "dee": word}
        plot.refused(now.ask_agree("ada", said), SURVIVORS, words)
    stranger = {**{name: one.word for name, one in now.sent.items()}, "eve": mine}
    plot.refused(now.ask_agree("ada", stranger), ROSTER, "'eve' is not in the roster")


# -- survivors -----------------------------------------------------------------------------------------------------------


def test_the_signer_itself_called_dropped(plot: Plot) -> None:
    attempt = plot.attempt().train()
    for name in NAMES:
        others = [n for n in NAMES if n != name]
        with plot.town.nothing_spent():
            plot.refused(
                attempt.ask_agree(name, others), SURVIVORS, f"{name} is called dropped, but it sent its vector"
            )


def test_a_peer_called_dropped_whose_vector_arrived(plot: Plot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dee's vector is held back, ben colludes: everything else opens, her own mask does not, and no second list is signed."""
    plain, attempt = Plain.watch(monkeypatch), plot.attempt().train()
    attempt.agree(survivors=THREE).reveal(survivors=THREE)
    assert attempt.open(THREE) == plain.sum(THREE, 1)
    for name in ("ada", "cy"):
        words = "another list was signed before: one peer would be both alive and dropped"
        plot.refused(attempt.ask_agree(name, NAMES, request_id="second"), SURVIVORS, words)
        assert plot.kinds(name) == ["hold", "debit", "commit", "survivors"]
    # all that the coordinator, ben and the answers come to
    ben = private_key(plot, "ben")
    seeds = {n: r.dropped["dee"] for n, r in attempt.revealed.items()}
    assert seeds["ben"] == secagg._pair_seed(
        attempt.agreed, "ben", "dee", secagg._pairs(attempt.agreed, "ben", ben)["dee"]
    )
    secret = secagg._pairs(attempt.agreed, "ben", ben)["dee"]
    held = secagg._unseal(attempt.agreed, "dee", "ben", secret, attempt.sent["dee"].shares["ben"])
    assert all("dee" not in one.own for one in attempt.revealed.values())
    assert own_seed(attempt, "dee", {"ben": held["dee"]}) is None
    left = without_pairs(attempt, "dee", seeds)
    assert not (left == plain.of("dee", 1)).any()
    # her own mask is all that was missing
    shares = {"ben": held["dee"]}
    for name in ("ada", "cy"):
        mine = secagg._pairs(attempt.agreed, name, private_key(plot, name))["dee"]
        shares[name] = secagg._unseal(attempt.agreed, "dee", name, mine, attempt.sent["dee"].shares[name])["dee"]
    seed = own_seed(attempt, "dee", shares)
    assert seed is not None
    secagg._add_stream(left, seed, -1)
    assert (left == plain.of("dee", 1)).all()


def test_both_kinds_of_one_peer(plot: Plot) -> None:
    """Alive by the list that was signed, dropped by the one that is shown at the reveal: with a colluder's signature under both."""
    attempt = plot.attempt().train().agree()
    ben = plot.town.keys.home("ben").identity()
    words = {name: attempt.sent[name].word for name in THREE}
    lied = agree(attempt.agreed, ben, words, plot.identities, None)
    mixed = {**attempt.signatures, "ben": lied}
    with plot.town.nothing_spent():
        plot.refused(attempt.ask_reveal("ada", NAMES, mixed), SURVIVORS, "ben signed another list")
        plot.refused(attempt.ask_reveal("ada", THREE, {"ben": lied}), SURVIVORS, "ben signed another list")
        plot.refused(attempt.ask_reveal("ada", THREE), SHARE, "not one share of every survivor")
    attempt.reveal()
    for one in attempt.revealed.values():
        assert (set(one.own), one.dropped, one.between) == (set(NAMES), {}, {})
    # and where she is called dropped, nothing of hers but that comes
    other = plot.attempt(2).train().agree(survivors=THREE).reveal(survivors=THREE)
    for name, one in other.revealed.items():
        assert (set(one.own), set(one.dropped)) == (set(THREE), {"dee"})
        assert set(one.between) == {(peer, "dee") for peer in THREE}
        assert name in THREE
    plot.refused(other.ask_reveal("ada", NAMES), SHARE, "not one share of every survivor")


def test_signatures_that_are_not_enough(plot: Plot) -> None:
    attempt = plot.attempt().train().agree()
    mine = Identity("cy", plot.boss._private).seal(LIST_TYPE, secagg._list(attempt.agreed, sorted(NAMES)))
    two = {name: attempt.signatures[name] for name in ("ada", "ben")}
    for signatures, words in (
        (two, "2 signatures under this list of survivors, needed are 3"),
        ({**two, "eve": attempt.signatures["cy"]}, "2 signatures under this list"),
        ({**two, "cy": attempt.signatures["ben"]}, "the list given as cy's: not signed by"),
        ({**two, "cy": mine}, "the list given as cy's: not signed by"),
        ({}, "0 signatures"),
    ):
        plot.refused(attempt.ask_reveal("ada", NAMES, signatures), SURVIVORS, words)


def test_dropped_to_some_and_alive_to_others_over_two_restarts(plot: Plot) -> None:
    """Whoever is asked again signs the list that it signed before, or none: its ledger remembers."""
    town, attempt = plot.town, plot.attempt().train()
    told = {"ada": NAMES, "ben": NAMES, "cy": THREE, "dee": ("ada", "cy", "dee")}
    for name, listed in told.items():
        attempt.agree(name, survivors=listed)
    first = dict(attempt.signatures)
    for restart in range(2):
        for name, listed in told.items():
            town.start(name)
            attempt.agree(name, survivors=listed)  # the same list, as often as one likes
            assert attempt.signatures[name] == first[name]
            for other in (NAMES, THREE, ("ada", "cy", "dee")):
                if name in other and other != listed:
                    ask = attempt.ask_agree(name, other, request_id=f"{name}-{restart}-{len(other)}")
                    with town.nothing_spent():
                        plot.refused(ask, SURVIVORS, "both alive and dropped")
    for name in ("ada", "ben"):
        plot.refused(attempt.ask_reveal(name, NAMES, {n: first[n] for n in ("ada", "ben")}), SURVIVORS, "2 signatures")
    assert all(plot.kinds(name) == ["hold", "debit", "commit", "survivors"] for name in NAMES)


def test_a_dropout_in_a_round_does_not_open_the_round_before(plot: Plot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 1 was opened with all, so dee's own mask in it is known; what is revealed of her in round 2 fits nothing of it."""
    plain = Plain.watch(monkeypatch)
    before = plot.attempt(1).train().agree().reveal()
    now = plot.attempt(2).train().agree(survivors=THREE).reveal(survivors=THREE)
    assert (before.open(), now.open(THREE)) == (plain.sum(NAMES, 1), plain.sum(THREE, 2))
    seeds = {name: one.dropped["dee"] for name, one in now.revealed.items()}
    by_shares = {
        peer: secagg._combine(
            {now.agreed.roster.index(n) + 1: one.between[peer, "dee"] for n, one in now.revealed.items()}
        )(0).to_bytes(secagg.SEED, "big")
        for peer in THREE
    }
    assert seeds == by_shares
    assert {sha256(s).hexdigest() for s in seeds.values()} <= set(now.sent["dee"].commitments.values())
    assert not {sha256(s).hexdigest() for s in seeds.values()} & set(before.sent["dee"].commitments.values())
    own = own_seed(before, "dee", {name: one.own["dee"] for name, one in before.revealed.items()})
    assert own is not None
    for known in (seeds, {}):
        left = without_pairs(before, "dee", known)
        secagg._add_stream(left, own, -1)
        assert not (left == plain.of("dee", 1)).any()
    pairs = secagg._pairs(before.agreed, "dee", private_key(plot, "dee"))  # with the seeds of round 1 it would be open
    left = without_pairs(before, "dee", {n: secagg._pair_seed(before.agreed, "dee", n, pairs[n]) for n in THREE})
    secagg._add_stream(left, own, -1)
    assert (left == plain.of("dee", 1)).all()
    # and round 1 is not asked again with her called dropped
    with plot.town.nothing_spent():
        for name in THREE:
            plot.refused(before.ask_agree(name, THREE, request_id="again"), SURVIVORS, "both alive and dropped")
            ask = before.ask_reveal(name, THREE, now.signatures)
            plot.refused(ask, SURVIVORS, "signed another list")
            ask = before.ask_reveal(name, NAMES, now.signatures)
            plot.refused(ask, SURVIVORS, "signed another list")


# -- shares ----------------------------------------------------------------------------------------------------------------


def test_shares_that_do_not_fit(plot: Plot) -> None:
    """Of another attempt, for another, another's, changed, none: whoever is asked to open them says so, and opens nothing."""
    before, attempt = plot.attempt().train(), plot.attempt(1, 1).train().agree()
    good = {name: attempt.sent[name].shares["ada"] for name in NAMES}
    ben = good["ben"]
    for bad in (
        before.sent["ben"].shares["ada"],
        attempt.sent["ben"].shares["cy"],
        good["cy"],
        ben[:30] + bytes([ben[30] ^ 1]) + ben[31:],
        b"",
    ):
        with plot.town.nothing_spent():
            ask = attempt.ask_reveal("ada", NAMES, shares={**good, "ben": bad, "dee": bad})
            plot.refused(ask, SHARE, "the share given as ben's is not one, or of another attempt")
            # One alone makes nobody fall silent: who dealt it may have meant that. Of its mask nothing is revealed.
            reply, _, _ = plot.send(attempt.ask_reveal("ada", NAMES, shares={**good, "ben": bad}))
            assert set(revealed_from(reply.fields["revealed"]).own) == {"ada", "cy", "dee"}
    for odd in ({n: s for n, s in good.items() if n != "ben"}, {**good, "eve": ben}):
        plot.refused(attempt.ask_reveal("ada", NAMES, shares=odd), SHARE, "not one share of every survivor")
    plot.refused(before.ask_reveal("ada", NAMES), SURVIVORS, "signed no list of survivors for this attempt")


# -- rounds again ------------------------------------------------------------------------------------------------------------


def test_a_replayed_round(plot: Plot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes again, from the outbox, also after a restart: no second vector under the same masks, no second debit."""
    attempt = plot.attempt()
    records = plot.records(attempt.ask("train", "ada"), plot.model)
    ask = attempt.ask("train", "ada")
    first, plain = to_bytes(plot.push(ask, records)), Plain.watch(monkeypatch)
    reads: list[int] = []
    opened = RegisteredDataset.open
    monkeypatch.setattr(RegisteredDataset, "open", lambda self: reads.append(1) or opened(self))
    for _restart in range(2):
        with plot.town.nothing_recorded():
            assert to_bytes(plot.push(ask, records)) == first
        plot.town.start("ada")
    assert (plot.kinds("ada"), reads, plain.seen) == (["hold", "debit", "commit"], [], [])


@pytest.mark.parametrize("at", ["before it is kept", "before it is committed"])
def test_a_crash_before_the_vector_left(plot: Plot, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """What was masked then is gone: nothing can be agreed on, and the same request brings the one vector that was paid for."""
    attempt, plain = plot.attempt(), Plain.watch(monkeypatch)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((Outbox, "put", die) if at == "before it is kept" else (Gate, "commit", die)))
        with pytest.raises(Killed):
            plot.send(attempt.ask("train", "ada"), plot.model)
    plot.town.start("ada")
    attempt.train("ben", "cy", "dee")
    none = attempt.ask_agree("ada", ("ben", "cy", "dee"), request_id="early")
    plot.refused(none, SURVIVORS, "this node sent no vector in this attempt")
    attempt.train("ada").agree().reveal()
    assert attempt.open() == plain.sum(NAMES, 1)
    assert [name for name, *_ in plain.seen].count("ada") == 2
    assert plot.kinds("ada") == ["hold", "debit", "commit", "survivors"]


def test_the_same_request_with_another_content(plot: Plot) -> None:
    """One attempt masks one vector, and has one list, whatever the requests are called."""
    attempt = plot.attempt().train()
    other = {name: value + 1 for name, value in plot.model.items()}
    fewer = plot.attempt(roster=THREE)
    with plot.town.nothing_spent():
        plot.refused(attempt.ask("train", "ada"), Refusal.REPLAY, "was taken before", other)
        plot.refused(fewer.ask("train", "ada"), Refusal.REPLAY, "was taken before", plot.model)
        plot.refused(attempt.ask("train", "ada", more=1), Refusal.REPLAY, "was taken before", plot.model)
        for again in (attempt, fewer):
            ask = again.ask("train", "ada", request_id="again")
            plot.refused(ask, Refusal.ROUND, "was asked for before", plot.model)
    attempt.agree("ada")
    plot.refused(attempt.ask_agree("ada", NAMES, more=1), Refusal.REPLAY, "was taken before")
    second = plot.attempt(1, 1).train()
    taken = attempt.ask("agree", "ada").request_id
    plot.refused(second.ask_agree("ada", NAMES, request_id=taken), Refusal.REPLAY, "was taken before")
    assert plot.kinds("ada").count("survivors") == 1


def test_exchanges_out_of_order(plot: Plot) -> None:
    """Agree before train, reveal before agree, and both for attempts in which this node sent nothing."""
    attempt, later = plot.attempt(), plot.attempt(1, 1)
    none = "this node sent no vector in this attempt"
    attempt.train("ben", "cy", "dee")
    with plot.town.nothing_spent():
        plot.refused(attempt.ask_agree("ada", ("ben", "cy", "dee")), SURVIVORS, none)
        reveal = attempt.ask_reveal("ada", ("ben", "cy", "dee"), {})
        plot.refused(reveal, SURVIVORS, none)
    attempt.train("ada")
    with plot.town.nothing_spent():
        plot.refused(attempt.ask_reveal("ada", NAMES, {}), SURVIVORS, "signed no list of survivors for this attempt")
    attempt.agree().reveal()
    later.sent, later.signatures = attempt.sent, attempt.signatures
    for other in (later, plot.attempt(2)):
        other.sent, other.signatures = attempt.sent, attempt.signatures
        with plot.town.nothing_spent():
            plot.refused(other.ask_agree("ada", NAMES), SURVIVORS, none)
            plot.refused(other.ask_reveal("ada", NAMES), SURVIVORS, none)


def test_a_retry_is_fresh_and_paid_for(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts of one round, same roster and model: other batches, noise, own masks, masks with peers, shares; two debits."""
    plot, plain = town.plot("none"), Plain.watch(monkeypatch)
    attempts = [plot.attempt(1, number).train() for number in range(2)]
    for name in NAMES:
        assert (plain.of(name, 1, 0) != plain.of(name, 1, 1)).mean() > 0.9
        assert plot.kinds(name) == ["hold", *["debit", "commit"] * 2]
        debits = [e.body for e in town.ledger(name) if e.type == "debit" and e.body["run_id"] == plot.run]
        assert [d["masked"]["attempt"] for d in debits] == [0, 1]
        assert len({d["masked"]["agreement"] for d in debits}) == 2
    commitments = [one for a in attempts for sent in a.sent.values() for one in sent.commitments.values()]
    assert len(set(commitments)) == 2 * (
        len(NAMES) + len(NAMES) * (len(NAMES) - 1) // 2
    )  # two partners have one between them
    shares = [share for a in attempts for sent in a.sent.values() for share in sent.shares.values()]
    assert len(set(shares)) == len(shares)
    # without noise what is left is the batch
    monkeypatch.setattr(SecureNoise, "discrete_gaussian", lambda self, size, std: np.zeros(size, np.int64))
    for number in range(2):
        plot.attempt(2, number).train("ada")
    assert (plain.of("ada", 2, 0) != plain.of("ada", 2, 1)).any()
    plot.close()


def test_more_attempts_than_are_held(plot: Plot) -> None:
    """Two rounds and two retries are held: who used the retries in the first round has none for the second."""
    for number, attempt in ((1, 0), (1, 1), (1, 2), (2, 0)):
        plot.attempt(number, attempt).train("ada")
    words = "nothing more is held for train"
    with plot.town.nothing_spent():
        plot.refused(plot.attempt(2, 1).ask("train", "ada"), Refusal.NOT_HELD, words, plot.model)
        plot.refused(plot.attempt(3, 0).ask("train", "ada"), Refusal.NOT_HELD, words, plot.model)
    assert plot.kinds("ada").count("debit") == ROUNDS + RETRIES


def test_a_round_that_there_is_not(plot: Plot) -> None:
    with plot.town.nothing_spent():
        for number in (0, ROUNDS + 1):
            ask = plot.attempt(number).ask("train", "ada")
            plot.refused(ask, Refusal.ROUND, f"round {number} is not one to train", plot.model)


# -- around it -----------------------------------------------------------------------------------------------------------


MALFORMED: dict[str, Any] = {
    "nothing": None,
    "empty": {},
    "a list": [],
    "without keys": {"keys": None},
    "a roster of names": {"keys": ["ada", "ben", "cy"]},
    "a bool": {"attempt": True},
    "negative": {"attempt": -1},
    "text": {"threshold": "3"},
    "more": {"more": 1},
    "not base64": {"keys": [["ada", "*"]]},
}


def test_a_train_request_without_an_attempt(plot: Plot) -> None:
    """Under a charter with secure aggregation nothing is ever answered with a plain update, nor is anything spent."""
    good = plot.attempt().fields
    for how, change in MALFORMED.items():
        masked = {**good, **change} if isinstance(change, dict) and change else change
        fields = {} if how == "nothing" else {"masked": masked}
        with plot.town.nothing_recorded(), pytest.raises(MessageError):
            plot.send(plot.ask("train", 1, "ada", fields=fields), plot.model)
    assert plot.kinds("ada") == ["hold"]


def test_under_a_charter_without_secure_aggregation(town: Town) -> None:
    """Its rounds are its own, with noise of their own; there is nothing to agree on or to reveal."""
    plain, plot = town.plot("plain"), town.plot()
    attempt = plot.attempt()
    for kind in ("agree", "reveal"):
        ask = plain.ask(kind, 1, "ada", fields={"masked": attempt.fields, "model_sha256": attempt.agreed.model_sha256})
        with town.nothing_spent():
            plain.refused(ask, TERMS, "no attempt at secure aggregation")
    reply, tensors, _ = plain.send(plain.ask("train", 1, "ada", fields={"masked": attempt.fields}), plain.model)
    assert (reply.kind, set(tensors)) == ("update", set(plain.model))
    (debit,) = (e.body for e in town.ledger("ada") if e.type == "debit" and e.body["run_id"] == plain.run)
    assert debit["event"]["mechanism"] != "shared-gaussian/1"
    assert "masked" not in debit
    for one in (plain, plot):
        one.close()


def test_evaluation_is_as_without(plot: Plot) -> None:
    """Only public scores leave, asked for between the exchanges of a round; and nothing else of it can be asked for as evaluation."""
    attempt = plot.attempt().train()
    reply, tensors, _ = plot.send(plot.ask("evaluate", 1, "ada"), plot.model)
    assert (reply.kind, set(tensors)) == ("scores", {"scores", "labels"})
    records = plot.records(attempt.ask("train", "ada", request_id="as"), plot.model)
    with (
        plot.town.nothing_recorded(),
        pytest.raises(MessageError, match="a request to train, delivered as one to evaluate"),
    ):
        plot.push(plot.ask("evaluate", 1, "ada"), records)
    assert attempt.agree().reveal().open()


def asked_again(attempt: Attempt, request_id: str) -> list[tuple[Manifest, Any]]:
    """Every exchange of an attempt that went as far as signatures, under new names."""
    return [
        (attempt.plot.attempt(1, 1).ask("train", "ada", request_id=request_id), attempt.plot.model),
        (attempt.ask_agree("ada", NAMES, request_id=f"{request_id}-agree"), None),
        (attempt.ask_reveal("ada", NAMES, request_id=f"{request_id}-reveal"), None),
    ]


def test_after_the_run_was_closed(plot: Plot) -> None:
    attempt = plot.attempt().train().agree()
    plot.send(plot.ask("close", ROUNDS + 1, "ada"))
    with plot.town.nothing_spent():
        for ask, tensors in asked_again(attempt, "closed"):
            plot.refused(ask, Refusal.NOT_HELD, "", tensors)
        plot.refused(attempt.ask("train", "ada"), Refusal.NOT_HELD, "", plot.model)  # a replay, too
    assert not [key for key in masks(plot.town, "ada").iterdir() if key.name == _file(plot)], "its key is forgotten"


def test_after_a_run_was_signed_for_but_not_closed(plot: Plot) -> None:
    """A closing checkpoint ends a run as well: its key is still there, and opens nothing any more."""
    attempt = plot.attempt().train().agree()
    plot.town.sites["ada"].gate.close_run(plot.run, plot.signed.sha256)
    with plot.town.nothing_spent():
        for ask, tensors in asked_again(attempt, "ended"):
            plot.refused(ask, Refusal.NOT_HELD, "this run is not open here", tensors)


@pytest.mark.parametrize("how", ["signed for", "ended"])
def test_a_key_is_forgotten_when_its_run_is_over(town: Town, how: str) -> None:
    """Also without a request to close: at a checkpoint that is to be signed, or at the next run where a run ended by itself."""
    plot = town.plot()
    attempt = plot.attempt().train().agree()
    if how == "signed for":
        closing = base64.b64encode(b"{}").decode()  # the run is over before it is looked at
        with pytest.raises(MessageError):
            plot.send(plot.ask("sign", ROUNDS + 1, "ada", fields={"closing": closing}))
    else:
        town.sites["ada"].gate.close_run(plot.run, plot.signed.sha256)
        town.plot("none").close()
    assert plot.kinds("ada") == ["hold", "debit", "commit", "survivors", "release"]
    assert not (masks(town, "ada") / _file(plot)).exists()
    plot.refused(attempt.ask_agree("ada", NAMES), Refusal.NOT_HELD, "no key for secure aggregation")
    plot.close()


def test_while_the_site_is_paused(plot: Plot) -> None:
    attempt = plot.attempt().train().agree()
    control = Control(plot.town.keys.home("ada").path / "state" / "control")
    control.pause()
    try:
        with plot.town.nothing_spent():
            for ask, tensors in asked_again(attempt, "paused"):
                plot.refused(ask, Refusal.PAUSED, "this node is paused", tensors)
    finally:
        control.resume()
    attempt.reveal()


def test_after_a_partner_left_the_charter(town: Town) -> None:
    plot = town.plot("left")
    attempt = plot.attempt().train().agree()
    Control(town.keys.home("ada").path / "state" / "control").withdraw(plot.signed.sha256)
    for at, (ask, tensors) in enumerate(asked_again(attempt, "left")):
        also = ("release",) if at == 0 else ()  # what it held is free
        plot.refused(ask, Refusal.WITHDRAWN, "this partner withdrew from the charter", tensors, also=also)
    assert plot.kinds("ada") == ["hold", "debit", "commit", "survivors", "release"]
    plot.close()


def test_a_run_whose_sums_fit_no_ring_is_not_held(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each of its rounds would fail, unsigned and unrecorded, and the budget stay held for it."""

    def none(_: object) -> None:
        raise ConfigError("secure aggregation: no ring", "Declare fewer records.")

    plot = Plot(town, town.charters["one"], next(town.run_ids))
    with monkeypatch.context() as patch, town.nothing_spent():
        patch.setattr("hansa.clients.app.fixed_point", none)
        plot.refused(plot.ask("open", 0, "ada"), Refusal.NUMERIC, "no ring")
    assert not (masks(town, "ada") / _file(plot)).exists()


# -- keys that are lost ------------------------------------------------------------------------------------------------------


def _file(plot: Plot) -> str:
    return sha256(f"{plot.signed.sha256} {plot.run}".encode()).hexdigest()[:32]


def test_a_lost_key_is_not_replaced(plot: Plot) -> None:
    """As after a restore without it: this run is over for this node, and no second key masks anything in it."""
    attempt = plot.attempt().train().agree()
    (masks(plot.town, "ada") / _file(plot)).unlink()
    plot.town.start("ada")
    with plot.town.nothing_spent():
        for ask, tensors in asked_again(attempt, "lost"):
            plot.refused(ask, Refusal.NOT_HELD, "no key for secure aggregation in this run", tensors)
    assert not (masks(plot.town, "ada") / _file(plot)).exists()


@pytest.mark.parametrize("left", [b"", bytes(31)], ids=["empty", "short"])
def test_a_damaged_key_is_refused_in_words(plot: Plot, left: bytes) -> None:
    (masks(plot.town, "ada") / _file(plot)).write_bytes(left)
    attempt = plot.attempt()
    with plot.town.nothing_spent():
        plot.refused(attempt.ask("train", "ada"), Refusal.NOT_HELD, "is damaged", attempt.model)


@pytest.mark.parametrize("how", ["lost", "closed"])
def test_a_second_key_of_one_run(plot: Plot, how: str) -> None:
    """The request that opened the run is sent again when its key is gone: nobody signs two keys for one run."""
    if how == "closed":
        plot.send(plot.ask("close", ROUNDS + 1, "ada"))
    else:
        (masks(plot.town, "ada") / _file(plot)).unlink()
    words = "this run is over here" if how == "closed" else "no key for secure aggregation in this run"
    plot.refused(plot.ask("open", 0, "ada"), Refusal.NOT_HELD, words)
    assert not (masks(plot.town, "ada") / _file(plot)).exists()


def test_opening_again_signs_the_same_key(plot: Plot) -> None:
    first = dict(plot.envelopes)
    plot.town.start("ada")
    plot.open()
    assert plot.envelopes == first
    plot.refused(plot.ask("open", 0, "ada", request_id="open-again"), Refusal.REPLAY, "this run is already held")
    plot.attempt().train().agree().reveal().open()


# -- partners that lie to an honest coordinator ----------------------------------------------------------------------------------


LIAR, HONEST = HOSPITALS[1], (HOSPITALS[0], *HOSPITALS[2:])


def _vector(change: Callable[[Any], Any]) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda _, tensors: tensors.update(masked=change(tensors["masked"]))


def _less(what: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda fields, _: fields["sent"][what].pop(HOSPITALS[2])


VECTORS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "too short": (_vector(lambda v: v[:-1]), "vector is uint32"),
    "too long": (_vector(lambda v: np.append(v, v[:1])), "vector is uint32"),
    "of another ring": (_vector(lambda v: v.astype(np.uint64)), "vector is uint64"),
    "of floats": (_vector(lambda v: v.astype(np.float32)), "vector is float32"),
    "of two dimensions": (_vector(lambda v: v.reshape(1, -1)), "vector is uint32"),
    "none": (lambda _, tensors: tensors.clear(), "masked"),
    "without its shares": (lambda fields, _: fields.pop("sent"), "without what goes with it"),
    "a share short": (_less("shares"), "did not share its masks with exactly the roster"),
    "a commitment short": (_less("commitments"), "did not share its masks with exactly the roster"),
    "with no word": (lambda fields, _: fields["sent"].update(word=""), "the word given as hungary's"),
}


def between(
    made: Simulation, patch: pytest.MonkeyPatch, **lies: Callable[[dict[str, Any], dict[str, Any]], object]
) -> Between:
    """A Grid on which LIAR changes what it answers, by kind of request."""

    def hook(asked: Asked, honest: Callable[[], Message]) -> Message | None:
        change = lies.get(asked.kind) if asked.to == LIAR else None
        return honest() if change is None else retold(made, LIAR, asked, honest(), change)

    return Between(made, hook, patch)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What an honest coordinator says: partner -> details of its answers to train; and who lies."""
    return {"answers": [], "liars": []}


def listen(made: Simulation, told: dict[str, list[Any]]) -> None:
    def notify(event: str, **facts: Any) -> None:
        if event == "answer" and facts["answer"].outcome == "invalid":
            told["answers"].append((facts["partner"], facts["kind"], facts["answer"].detail))
        if event == "liar":
            told["liars"].append((facts["partner"], facts["round"]))

    made.coordinator._notify = notify


@pytest.mark.parametrize("how", VECTORS)
def test_a_vector_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, list[Any]], how: str
) -> None:
    """It does not count, and the others' sum is opened without its sender."""
    change, words = VECTORS[how]
    plain, sums = Plain.watch(monkeypatch), Sums.watch(monkeypatch)
    with contextlib.closing(simulation(tmp_path / "out")) as made:
        listen(made, told)
        between(made, monkeypatch, train=change)
        assert made.run().why == "completed"
        ((number, summed),) = sums.seen
        assert (number, tuple(summed.survivors)) == (1, HONEST)
        assert [int(v) for v in summed.total] == plain.sum(HONEST, 1)
        ((name, kind, detail),) = told["answers"]
        assert (name, kind) == (LIAR, "train")
        assert words in detail
        (answers,) = (e.body["replies"] for e in made.run_ledger.of("answers") if e.body["purpose"] == "train")
        assert {n: one["outcome"] for n, one in answers.items()} == {LIAR: "invalid", **dict.fromkeys(HONEST, "ok")}


def test_two_vectors_that_are_none_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, _ = VECTORS["too short"]
    with contextlib.closing(simulation(tmp_path / "out")) as made:

        def hook(asked: Asked, honest: Callable[[], Message]) -> Message:
            lies = asked.to in HOSPITALS[:2] and asked.kind == "train"
            return retold(made, asked.to, asked, honest(), change) if lies else honest()

        grid = Between(made, hook, monkeypatch)
        with pytest.raises(RunFailed, match="round 1: too few masked vectors came; 2 went along, the quorum is 3"):
            made.run()
        assert {one.kind for one in grid.asked} == {"open", "train"}, "nothing was revealed"


def test_a_partner_that_lies_when_it_reveals_is_named_and_the_sum_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, list[Any]]
) -> None:
    def wrong(fields: dict[str, Any], _: object) -> None:
        own = fields["revealed"]["own"]
        fields["revealed"]["own"] = {name: "A" + share[1:-4] + "AAA=" for name, share in own.items()}

    plain, sums = Plain.watch(monkeypatch), Sums.watch(monkeypatch)
    with contextlib.closing(simulation(tmp_path / "out")) as made:
        listen(made, told)
        between(made, monkeypatch, reveal=wrong)
        assert made.run().why == "completed"
    ((_, summed),) = sums.seen
    assert [int(v) for v in summed.total] == plain.sum(HOSPITALS, 1)
    assert told == {"answers": [], "liars": [(LIAR, 1)]}


def test_a_partner_whose_key_is_none_takes_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A point of small order: it is found out when the run is accepted, and the others go on."""
    with contextlib.closing(simulation(tmp_path / "out")) as made:

        def zero(fields: dict[str, Any], _: object) -> None:
            said = json.loads(read_envelope(base64.b64decode(fields["key"]), KEY_TYPE).payload)
            made_up = made._identity(LIAR).seal(KEY_TYPE, canonical({**said, "key": "00" * 32}))
            fields["key"] = base64.b64encode(made_up).decode()

        between(made, monkeypatch, open=zero)
        assert made.run().history[0]["partners"] == len(HONEST)


def test_a_seed_of_another_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One drops out; LIAR had committed to a seed between the two that is none, and reveals it: the run fails in words, or goes on."""
    gone = HOSPITALS[2]
    with contextlib.closing(simulation(tmp_path / "out")) as made:

        def commit(fields: dict[str, Any], _: object) -> None:
            fields["sent"]["commitments"][gone] = sha256(b"x").hexdigest()

        def reveal(fields: dict[str, Any], _: object) -> None:
            fields["revealed"]["dropped"][gone] = base64.b64encode(b"x").decode()

        grid = between(made, monkeypatch, train=commit, reveal=reveal)
        hook = grid.hook
        grid.hook = lambda asked, honest: (
            asked.lost() if (asked.to, asked.kind) == (gone, "train") else hook(asked, honest)
        )
        with contextlib.suppress(RunFailed):
            made.run()


def _spoilt_shares(fields: dict[str, Any], _: object) -> None:
    shares = fields["sent"]["shares"]
    fields["sent"]["shares"] = {name: share if name == LIAR else "AAAA" + share[4:] for name, share in shares.items()}


def _spoilt_commitments(fields: dict[str, Any], _: object) -> None:
    fields["sent"]["commitments"] = dict.fromkeys(fields["sent"]["commitments"], "0" * 64)


@pytest.mark.parametrize("spoil", [_spoilt_shares, _spoilt_commitments], ids=["shares", "commitments"])
def test_one_partner_that_spoils_a_sum_cannot_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    """There are three others, which is the quorum, and a retry."""
    retry = {"colluding": 1, "retries": 1}
    with contextlib.closing(simulation(tmp_path / "out", secure_aggregation=retry)) as made:
        between(made, monkeypatch, train=spoil)
        assert made.run().why == "completed"


@pytest.mark.parametrize("spoil", [_spoilt_shares, _spoilt_commitments], ids=["shares", "commitments"])
def test_who_spoils_a_sum_learns_nothing_and_the_run_fails_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    with contextlib.closing(simulation(tmp_path / "out")) as made:
        between(made, monkeypatch, train=spoil)
        with pytest.raises(
            RunFailed, match=r"(?s)round 1: .*'s own mask cannot be opened.*of the run's 0 retries.*--resume"
        ):
            made.run()
        refusals = {n: [e.body["reason"] for e in made.gates[n].ledger.of("refuse")] for n in HONEST}
        assert refusals == {name: [] for name in HONEST}
