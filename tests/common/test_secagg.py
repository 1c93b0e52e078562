"""Secure aggregation: the sum is exact whoever drops out, and no list of questions opens anything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.common import secagg
from hansa.common.errors import MessageError, Refusal, Refused
from hansa.common.identity import Identity, canonical
from hansa.common.secagg import Agreement, Revealed, Ring, Sent, Sum, agree, mask, new_key, public_key, reveal

CHARTER, MODEL = "c" * 64, "d" * 64


@dataclass
class People:
    """A charter's partners, with their keys of one run."""

    count: int
    colluding: int = 0
    quorum: int | None = None
    identities: dict[str, Identity] = field(init=False)
    private: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        names = [f"p{number:03d}" for number in range(self.count)]
        self.identities = {name: Identity.generate(name) for name in names}
        self.private = {name: new_key() for name in names}

    @property
    def keys(self) -> dict[str, str]:
        return {name: one.key for name, one in self.identities.items()}

    @property
    def threshold(self) -> int:
        return secagg.threshold_of(self.count, self.colluding)

    def agreement(self, roster: Iterable[str] | None = None, **changes: Any) -> Agreement:
        names = list(self.identities) if roster is None else list(roster)
        made = Agreement(
            charter_sha256=CHARTER,
            run_id="run-1",
            round=1,
            attempt=0,
            model_sha256=MODEL,
            keys={name: public_key(self.private[name]) for name in names},
            threshold=self.threshold,
            quorum=self.quorum or self.threshold,
            bits=32,
            length=5,
        )
        return replace(made, **changes)

    def masked(self, agreement: Agreement, name: str, values: Ring) -> tuple[Ring, Sent]:
        return mask(agreement, self.identities[name], self.private[name], values)

    def agree(self, agreement: Agreement, name: str, words: Mapping[str, bytes], before: Any = None) -> bytes:
        return agree(agreement, self.identities[name], words, self.keys, before)

    def reveal(
        self,
        agreement: Agreement,
        name: str,
        survivors: Iterable[str],
        signatures: Mapping[str, bytes],
        shares: Mapping[str, bytes],
    ) -> Revealed:
        return reveal(agreement, name, self.private[name], list(survivors), signatures, shares, self.keys)


_people: dict[tuple[int, int], People] = {}


def people(count: int, colluding: int = 0) -> People:
    """Keys are made once; every test has agreements of its own."""
    return _people.setdefault((count, colluding), People(count, colluding))


def vectors(names: Iterable[str], bits: int, length: int, seed: int) -> dict[str, Ring]:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(f"uint{bits}")
    high = 2**bits - 1
    return {name: rng.integers(0, high, length, dtype=dtype, endpoint=True) for name in names}


def summed(values: Mapping[str, Ring], names: Iterable[str]) -> list[int]:
    """By Python's own integers."""
    chosen = [values[name] for name in names]
    bits = 8 * chosen[0].dtype.itemsize
    return [sum(int(v[i]) for v in chosen) % 2**bits for i in range(len(chosen[0]))]


@dataclass
class Attempt:
    """An honest one, in which some drop out before each of their three answers."""

    people: People
    agreement: Agreement
    values: dict[str, Ring]
    sum: Sum = field(init=False)
    signatures: dict[str, bytes] = field(default_factory=dict)
    revealed: dict[str, Revealed] = field(default_factory=dict)

    def play(self, drop: tuple[set[str], set[str], set[str]] = (set(), set(), set())) -> list[int]:
        who, keys = self.people, self.people.keys
        self.sum = Sum(self.agreement)
        for name in self.agreement.roster:
            if name not in drop[0]:
                self.sum.add(name, *who.masked(self.agreement, name, self.values[name]), keys[name])
        survivors, words = list(self.sum.arrived), self.sum.words()
        alive = [name for name in survivors if name not in drop[1]]
        for name in alive:
            self.signatures[name] = who.agree(self.agreement, name, words)
            self.sum.check_signed(name, self.signatures[name], keys[name])
        for name in alive:
            if name not in drop[2]:
                shares = self.sum.shares(name)
                self.revealed[name] = who.reveal(self.agreement, name, survivors, self.signatures, shares)
        total = self.sum.open(self.revealed)
        assert not self.sum.liars
        return [int(v) for v in total]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_sum_is_exact_for_every_dropout_at_every_phase(count: int) -> None:
    """Everybody drops out before one of the three answers or not at all: every combination down to the quorum."""
    who = people(count)
    agreement = who.agreement()
    values = vectors(agreement.roster, 32, 5, 1)
    tried = 0
    for phases in itertools.product(range(4), repeat=count):
        drop = tuple({n for n, phase in zip(agreement.roster, phases, strict=True) if phase == k} for k in range(3))
        left = count - sum(map(len, drop))
        if left < who.threshold:
            continue
        tried += 1
        survivors = [name for name in agreement.roster if name not in drop[0]]
        made = Attempt(who, agreement, values).play(drop)  # type: ignore[arg-type]
        assert made == summed(values, survivors)
    assert tried == {3: 10, 4: 13, 5: 106}[count]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_sum_is_exact_for_rosters_up_to_30(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 30), "count")
    colluding = data.draw(st.integers(0, (count - 1) // 3), "t")
    who = people(count, colluding)
    bits = data.draw(st.sampled_from(secagg.RINGS), "bits")
    length = data.draw(st.integers(1, 40), "length")
    names = list(who.identities)
    asked = data.draw(st.integers(who.threshold, count), "roster")
    roster = data.draw(st.permutations(names), "who")[:asked]
    agreement = who.agreement(roster, bits=bits, length=length, attempt=data.draw(st.integers(0, 3)))
    stay = data.draw(st.integers(who.threshold, asked), "left")
    phases = [data.draw(st.integers(0, 2)) for _ in range(asked - stay)]
    drop = tuple({n for n, phase in zip(roster, phases, strict=False) if phase == k} for k in range(3))
    values = vectors(roster, bits, length, data.draw(st.integers(0, 2**32)))
    survivors = [name for name in roster if name not in drop[0]]
    assert Attempt(who, agreement, values).play(drop) == summed(values, survivors)  # type: ignore[arg-type]


def test_below_the_threshold_nothing_opens() -> None:
    who = people(5)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 2))
    one.play()
    with pytest.raises(MessageError, match="only 2 revealed what opens the sum, needed are 3"):
        one.sum.open(dict(list(one.revealed.items())[:2]))
    with pytest.raises(Refused, match="2 signatures under this list of survivors, needed are 3"):
        who.reveal(agreement, "p000", one.sum.arrived, dict(list(one.signatures.items())[:2]), one.sum.shares("p000"))


# -- attacks: the coordinator, alone or with up to t partners ------------------------------------------------------------


def refused(reason: Refusal, what: str) -> Any:
    """The refusal of that name, with these words."""

    class Expect:
        def __enter__(self) -> Expect:
            return self

        def __exit__(self, kind: Any, err: Any, _: Any) -> bool:
            assert isinstance(err, Refused), f"not refused: {err!r}"
            assert err.reason is reason, err
            assert what in str(err), err
            return True

    return Expect()


def sealed(who: People, name: str, **changes: Any) -> bytes:
    about = {"charter_sha256": CHARTER, "run_id": "run-1", "private": who.private[name]} | changes
    return secagg.signed_key(who.identities[name], **about)


def test_keys_that_the_coordinator_made() -> None:
    who, server = people(3), Identity.generate("p001")
    good = {name: sealed(who, name) for name in who.identities}
    assert secagg.read_keys(good, CHARTER, "run-1", who.keys) == who.agreement().keys
    made = secagg.signed_key(server, CHARTER, "run-1", new_key())
    for given_as_p1, what in (
        (made, "the key given as p001's"),  # its own, whatever certificate it has
        (good["p002"], "the key given as p001's"),  # another partner's
        (sealed(who, "p001", run_id="run-0"), "another run"),  # replayed
        (sealed(who, "p001", charter_sha256="e" * 64), "another run, charter"),
        (b"", "the key given as p001's"),
        (good["p001"][:-9] + b"AAAAAAA==", "the key given as p001's"),
    ):
        with refused(Refusal.SECAGG_KEY, what):
            secagg.read_keys({**good, "p001": given_as_p1}, CHARTER, "run-1", who.keys)
    with refused(Refusal.SECAGG_ROSTER, "no partner"):
        secagg.read_keys({**good, "coordinator": made}, CHARTER, "run-1", who.keys)
    twin = {**good, "p001": sealed(who, "p001", private=who.private["p000"])}
    with refused(Refusal.SECAGG_KEY, "two partners with one key"):
        secagg.read_keys(twin, CHARTER, "run-1", who.keys)


def test_a_key_for_which_every_secret_is_known() -> None:
    """A point of small order makes the shared secret 0."""
    who = people(3)
    agreement = who.agreement()
    zero = replace(agreement, keys={**agreement.keys, "p002": "00" * 32})
    with refused(Refusal.SECAGG_KEY, "p002's key"):
        who.masked(zero, "p000", vectors(["x"], 32, 5, 0)["x"])


def test_a_key_in_another_form_or_of_small_order_is_refused_before_anybody_pays() -> None:
    who = people(3)
    good = public_key(who.private["p001"])
    twin = bytes.fromhex(good)[:31] + bytes([bytes.fromhex(good)[31] | 0x80])  # the same point
    forms = [good.upper(), twin.hex(), "00" * 32, "01" + "00" * 31, (2**255 - 19).to_bytes(32, "little").hex()]
    for form in forms:
        said = {"v": 1, "charter_sha256": CHARTER, "run_id": "run-1", "name": "p001", "key": form}
        made = who.identities["p001"].seal(secagg.KEY_TYPE, canonical(said))
        with refused(Refusal.SECAGG_KEY, "the key given as p001's"):
            secagg.read_keys({"p001": made}, CHARTER, "run-1", who.keys)


@pytest.mark.parametrize(
    ("changes", "reason", "what"),
    [
        ({"quorum": 2}, Refusal.SECAGG_TERMS, "agreed is 3"),
        ({"threshold": 2}, Refusal.SECAGG_TERMS, "a threshold of 2"),
        ({"threshold": 4}, Refusal.SECAGG_TERMS, "a threshold of 4"),
        ({"bits": 16}, Refusal.SECAGG_TERMS, "no ring"),
        ({"length": 0}, Refusal.SECAGG_TERMS, "no ring"),
        ({"without": ["p000"]}, Refusal.SECAGG_ROSTER, "p000 is not in the roster"),
        ({"without": ["p003", "p004", "p002"]}, Refusal.SECAGG_TERMS, "a roster of 2"),
        ({"other": "p001"}, Refusal.SECAGG_ROSTER, "no partner"),
        ({"mine": True}, Refusal.SECAGG_ROSTER, "with its key of this run"),
    ],
)
def test_terms_that_were_not_agreed(changes: dict[str, Any], reason: Refusal, what: str) -> None:
    who = people(5)
    agreement = who.agreement()
    without = changes.get("without", [])
    changes = {key: value for key, value in changes.items() if key != "without"}
    keys = {n: k for n, k in agreement.keys.items() if n not in without}
    if other := changes.get("other"):
        keys = {n if n != other else "stranger": k for n, k in keys.items()}
    if changes.get("mine"):
        keys["p000"] = public_key(new_key())
    terms = {key: value for key, value in changes.items() if key not in ("other", "mine")}
    made = replace(agreement, keys=keys, **terms)
    with refused(reason, what):
        made.check("p000", who.private["p000"], list(who.identities), 0, 3)
    agreement.check("p000", who.private["p000"], list(who.identities), 0, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"attempt": 1},
        {"run_id": "run-2"},
        {"charter_sha256": "e" * 64},
        {"model_sha256": "e" * 64},
        {"threshold": 2},
        {"quorum": 4},
        {"length": 4},
        {"bits": 64},
        {"roster": True},
        {"order": True},
        {"key": True},
    ],
)
def test_two_partners_who_were_told_different_things(changes: dict[str, Any]) -> None:
    """Other models, rosters, rounds, thresholds to different partners: whoever agrees sees it; and masks do not cancel anyway."""
    who = People(4)
    agreement = who.agreement()
    keys = dict(agreement.keys)
    if changes.get("roster"):
        del keys["p003"]
    if changes.get("order"):
        keys = dict(reversed(keys.items()))
    if changes.get("key"):
        keys["p003"] = public_key(new_key())
    named = {key: value for key, value in changes.items() if key not in ("roster", "order", "key")}
    other = replace(agreement, keys=keys, **named)
    assert other.digest != agreement.digest
    values = vectors(agreement.roster, 32, 5, 3)
    told = {name: other if name == "p001" else agreement for name in agreement.roster}
    sent = {name: who.masked(a, name, values[name][: a.length].astype(f"uint{a.bits}")) for name, a in told.items()}
    words = {name: one.word for name, (_, one) in sent.items()}
    with refused(Refusal.SECAGG_SURVIVORS, "p001 took part in another attempt"):
        who.agree(agreement, "p000", words)
    with pytest.raises(Refused, match=r"took part in another attempt|not in the roster"):
        who.agree(other, "p001", words)
    with pytest.raises((Refused, MessageError)):
        Sum(agreement).add("p001", *sent["p001"], who.keys["p001"])


def test_words_and_signatures_of_others() -> None:
    who = people(4)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 4))
    one.play()
    words = one.sum.words()
    for bad in ({**words, "p001": words["p002"]}, {**words, "p001": b"x"}):
        with refused(Refusal.SECAGG_SURVIVORS, "the word given as p001's"):
            who.agree(agreement, "p000", bad)
    survivors, shares = list(words), one.sum.shares("p000")
    forged = Identity.generate("p001").seal(secagg.LIST_TYPE, b"{}")
    for bad in ({**one.signatures, "p001": one.signatures["p002"]}, {**one.signatures, "p001": forged}):
        with refused(Refusal.SECAGG_SURVIVORS, "the list given as p001's"):
            who.reveal(agreement, "p000", survivors, bad, shares)
    fewer = {name: words[name] for name in ("p000", "p001", "p002")}
    with refused(Refusal.SECAGG_SURVIVORS, "p001 signed another list"):
        who.reveal(
            agreement, "p000", survivors, {**one.signatures, "p001": who.agree(agreement, "p001", fewer)}, shares
        )
    # signatures of those who dropped out, or one three times, do not count
    with refused(Refusal.SECAGG_SURVIVORS, "0 signatures"):
        who.reveal(agreement, "p000", list(fewer), {"p003": one.signatures["p003"]}, shares)
    # nor does the word of another round open this one
    later = replace(agreement, round=2)
    again = Attempt(who, later, one.values)
    again.play()
    with refused(Refusal.SECAGG_SURVIVORS, "signed another list"):
        who.reveal(later, "p000", survivors, one.signatures, again.sum.shares("p000"))


def test_a_peer_that_is_called_dropped_though_its_vector_arrived() -> None:
    """Its own mask stays closed: what the others reveal of it are the masks between them."""
    who = people(5)
    agreement = who.agreement()
    values = vectors(agreement.roster, 32, 5, 5)
    sent = {name: who.masked(agreement, name, values[name]) for name in agreement.roster}
    lied = Sum(agreement)
    for name in agreement.roster[:4]:
        lied.add(name, *sent[name], who.keys[name])
    signatures = {name: who.agree(agreement, name, lied.words()) for name in lied.arrived}
    revealed = {n: who.reveal(agreement, n, lied.arrived, signatures, lied.shares(n)) for n in lied.arrived}
    victim, (vector, given_with) = "p004", sent["p004"]
    assert [int(v) for v in lied.open(revealed)] == summed(values, agreement.roster[:4])
    assert all(victim not in one.own for one in revealed.values())
    assert all(victim not in {n for n, _ in one.between} for one in revealed.values())
    opened = vector.copy()
    for name, one in revealed.items():  # all masks with others are known; what is left is under the own one
        secagg._add_stream(opened, one.dropped[victim], -secagg._sign(agreement, victim, name))
    assert list(opened) != list(values[victim])
    with refused(Refusal.SECAGG_SURVIVORS, "p004 is called dropped, but it sent its vector"):
        who.agree(agreement, victim, lied.words())
    assert given_with.word not in lied.words().values()


def test_dropped_to_some_and_alive_to_others_over_two_restarts() -> None:
    """What was signed once is recorded; whoever is asked again signs the same list or none."""
    who = people(5)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 6))
    one.play()
    words = one.sum.words()
    without = {name: word for name, word in words.items() if name != "p004"}
    recorded = sorted(words)
    for _restart in range(2):
        assert who.agree(agreement, "p000", words, recorded) == one.signatures["p000"]
        with refused(Refusal.SECAGG_SURVIVORS, "both alive and dropped"):
            who.agree(agreement, "p000", without, recorded)
    with refused(Refusal.SECAGG_SURVIVORS, "both alive and dropped"):
        who.agree(agreement, "p000", words, sorted(without))


def test_a_cohort_below_the_quorum() -> None:
    who = People(5, quorum=4)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 7))
    one.play()
    words = {name: word for name, word in one.sum.words().items() if name in ("p000", "p001", "p002")}
    with refused(Refusal.SECAGG_SURVIVORS, "3 survivors, agreed are 4"):
        who.agree(agreement, "p000", words)
    with refused(Refusal.SECAGG_ROSTER, "not in the roster"):
        who.agree(replace(agreement, keys=dict(list(agreement.keys.items())[:4])), "p000", one.sum.words())


def test_shares_that_do_not_fit() -> None:
    who = people(5)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 8))
    one.play()
    survivors, shares = list(one.sum.arrived), one.sum.shares("p000")
    earlier = Attempt(who, replace(agreement, attempt=1), one.values)
    earlier.play()
    changed = shares["p001"][:20] + bytes([shares["p001"][20] ^ 1]) + shares["p001"][21:]
    for bad in (
        changed,
        one.sum.shares("p002")["p001"],  # what was meant for another
        shares["p002"],  # another's
        earlier.sum.shares("p000")["p001"],  # of another attempt: replayed
        b"",
        bytes(12),
    ):
        # Nothing is revealed of it, and all else is: who deals what nobody can read must not make others fall silent.
        revealed = who.reveal(agreement, "p000", survivors, one.signatures, {**shares, "p001": bad})
        assert set(revealed.own) == set(survivors) - {"p001"}
        with refused(Refusal.SECAGG_SHARE, "the share given as p001's"):
            who.reveal(agreement, "p000", survivors, one.signatures, {**shares, **dict.fromkeys(survivors[1:], bad)})
    for odd in ({k: v for k, v in shares.items() if k != "p001"}, {**shares, "x": b""}):
        with refused(Refusal.SECAGG_SHARE, "not one share of every survivor"):
            who.reveal(agreement, "p000", survivors, one.signatures, odd)


@pytest.mark.parametrize("liars", [["p000"], ["p000", "p003"], ["p004"]])
def test_a_partner_that_reveals_what_does_not_fit_is_named_and_the_sum_is_right(liars: list[str]) -> None:
    who = people(7)
    agreement = who.agreement()
    values = vectors(agreement.roster, 32, 5, 9)
    one = Attempt(who, agreement, values)
    one.play(({"p006"}, set(), set()))
    for name in liars:
        true = one.revealed[name]
        wrong = {peer: bytes([share[0]]) + bytes(16) for peer, share in true.own.items()}
        one.revealed[name] = replace(true, own=wrong, dropped={"p006": bytes(16)})
    total, named = one.sum.open(one.revealed), sorted(one.sum.liars)
    assert [int(v) for v in total] == summed(values, agreement.roster[:6])
    assert named == liars
    for name in agreement.roster[:3]:  # more than can be told apart
        one.revealed[name] = replace(one.revealed[name], own={})
    with pytest.raises(MessageError, match="p000's own mask cannot be opened"):
        one.sum.open(one.revealed)


def test_who_deals_a_mask_that_no_shares_open_is_named() -> None:
    """By a commitment to another seed: everybody's share fits the others', and the sum is lost; not so whom it is to be tried without."""
    who = people(5)
    agreement = who.agreement()
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 11))
    one.play()
    sent = one.sum.arrived["p002"]
    one.sum.arrived["p002"] = replace(sent, commitments={**sent.commitments, "p002": "0" * 64})
    with pytest.raises(MessageError, match="p002's own mask cannot be opened"):
        one.sum.open(one.revealed)
    assert one.sum.liars == {"p002"}


@pytest.mark.parametrize("liars", [["p000"], ["p000", "p001"], ["p002", "p016"]])
def test_liars_among_thirty_are_named_wherever_they_stand(liars: list[str]) -> None:
    """Also the first ones, whose shares would be taken first: of 30 there are more ways to choose 16 than can be tried."""
    who = people(30)
    agreement = who.agreement()
    values = vectors(agreement.roster, 32, 5, 12)
    one = Attempt(who, agreement, values)
    one.play(({"p029"}, set(), {"p028"}))
    for name in liars:
        true = one.revealed[name]
        wrong = {peer: bytes([share[0]]) + bytes(16) for peer, share in true.own.items()}
        between = {pair: bytes(17) for pair in true.between}
        one.revealed[name] = replace(true, own=wrong, between=between)
    total, named = one.sum.open(one.revealed), sorted(one.sum.liars)
    assert [int(v) for v in total] == summed(values, agreement.roster[:29])
    assert named == liars


def test_vectors_of_another_length_or_ring() -> None:
    who = people(3)
    agreement = who.agreement()
    values = vectors(["x"], 32, 5, 10)["x"]
    for bad in (values[:4], values.astype(np.uint64), values.reshape(1, 5), values.astype(np.int32)):
        with pytest.raises(MessageError, match=r"agreed is uint32 \[5\]"):
            who.masked(agreement, "p000", bad)
        masked, sent = who.masked(agreement, "p000", values)
        with pytest.raises(MessageError, match=r"agreed is uint32 \[5\]"):
            Sum(agreement).add("p000", bad, sent, who.keys["p000"])
    total = Sum(agreement)
    total.add("p000", masked, sent, who.keys["p000"])
    with pytest.raises(MessageError, match="a second vector"):
        total.add("p000", masked, sent, who.keys["p000"])
    with pytest.raises(MessageError, match="a stranger"):
        total.add("p009", masked, sent, who.keys["p000"])
    less = replace(sent, shares={k: v for k, v in sent.shares.items() if k != "p002"})
    with pytest.raises(MessageError, match="exactly the roster"):
        Sum(agreement).add("p000", masked, less, who.keys["p000"])


# -- why lists are signed before anything is revealed ---------------------------------------------------------------------


def opened_by_split_views(
    agreement: Agreement, views: Mapping[str, set[str]], target: set[str], colluding: set[str]
) -> set[str]:
    """Which of `target`'s masks the coordinator could NOT remove if everybody revealed for the list that it was shown (`views`).

    The protocol without its second exchange: what each honest partner reveals for its own list, but a share of its own mask.
    """
    missing = set()
    for victim in target:
        shares = {n for n, view in views.items() if victim in view and n != victim} | colluding  # its own one not
        if len(shares) < agreement.threshold:
            missing.add(f"own mask of {victim}")
        for peer in set(agreement.roster) - target - colluding:
            by_victim, by_peer = peer not in views[victim], victim not in views[peer]
            if not (by_victim or by_peer):
                missing.add(f"mask between {victim} and {peer}")
    return missing


def test_without_signed_lists_one_vector_is_opened_and_with_them_it_is_not() -> None:
    """Four partners, quorum 3, one colluding (DESIGN's 2T − n > t holds: T = 3): lists that differ open a single vector."""
    who = People(4, colluding=1, quorum=3)
    agreement = who.agreement()
    assert 2 * agreement.threshold - 4 > 1
    victim, a, b, c = agreement.roster
    views = {victim: {victim, b, c}, a: {victim, a, c}, b: {a, b, c}}
    assert all(len(view) >= agreement.quorum and name in view for name, view in views.items())
    # All but its own share of its own mask; had it revealed that one too, nothing would be left.
    assert opened_by_split_views(agreement, views, {victim}, {c}) == {f"own mask of {victim}"}
    assert opened_by_split_views(agreement, views, {victim}, {c, victim}) == set()
    # The real thing: each honest partner signs the list that it is shown; no list has a threshold of signatures, with c's under all.
    one = Attempt(who, agreement, vectors(agreement.roster, 32, 5, 11))
    one.play()
    words = one.sum.words()
    for asked, view in views.items():
        shown = {name: words[name] for name in view}
        signatures = {asked: who.agree(agreement, asked, shown), c: who.agree(agreement, c, shown)}
        with refused(Refusal.SECAGG_SURVIVORS, "2 signatures under this list of survivors, needed are 3"):
            shares = {n: s for n, s in one.sum.shares(asked).items() if n in view}
            who.reveal(agreement, asked, sorted(view), signatures, shares)


def test_without_signed_lists_a_sum_of_fewer_than_the_quorum_is_opened() -> None:
    """Ten partners, nobody colludes, quorum and threshold 6: four vectors come out alone, though nobody reveals its own share."""
    who = people(10)
    agreement = who.agreement()
    assert (agreement.threshold, agreement.quorum) == (6, 6)
    q, x, z = (set(agreement.roster[a:b]) for a, b in ((0, 4), (4, 7), (7, 10)))
    views = dict.fromkeys(q, q | z) | dict.fromkeys(x, q | x) | dict.fromkeys(z, x | z)
    assert all(len(view) >= 6 and name in view for name, view in views.items())
    assert opened_by_split_views(agreement, views, q, set()) == set()
    one = {name: set(agreement.roster) for name in agreement.roster}
    assert opened_by_split_views(agreement, one, q, set()) != set()  # where all are shown the same, it is not


def test_no_two_lists_get_a_threshold_of_signatures() -> None:
    """2T − n > t, whoever colludes signs both: for every n to 40 and t, the honest ones cannot fill two lists."""
    for n in range(3, 41):
        for t in range(n - 1):
            threshold = secagg.threshold_of(n, t)
            assert 2 * threshold - n > t
            assert 2 * (threshold - 1) - n <= t  # and it is the least
            assert 2 * (threshold - t) > n - t  # two lists need that many honest signatures, of n - t


# -- ring ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20), st.sampled_from(secagg.RINGS))
def test_integers_come_back_from_the_ring(values: list[int], bits: int) -> None:
    given_values = np.array(values, np.int64)
    assert list(secagg.from_ring(secagg.to_ring(given_values, bits))) == values


def test_what_does_not_fit_in_the_ring_wraps_as_a_sum_would() -> None:
    for value in (2**31, -(2**31) - 1, 2**62 + 5):
        (wrapped,) = secagg.from_ring(secagg.to_ring(np.array([value]), 32))
        assert (int(wrapped) - value) % 2**32 == 0
        assert list(secagg.from_ring(secagg.to_ring(np.array([value]), 64))) == [value]
    assert len(secagg.to_ring(np.zeros(0, np.int64), 32)) == 0


def test_the_ring_is_large_enough_and_no_larger() -> None:
    bits, chance = secagg.ring_for(bound=1e6, std=1e7, values=60 * 36)
    assert (bits, chance < -1000) == (32, True)
    assert secagg.ring_for(1e6, 2.6e8, 60 * 36)[0] == 64  # 8.2 standard deviations are not enough for 2^-40 a run
    assert secagg.ring_for(1e6, 2.5e8, 60 * 36)[0] == 32  # 8.5 are
    assert secagg.ring_for(1e6, 2.5e8, 10**6 * 100)[0] == 64  # not for more values
    assert secagg.ring_for(2.0**31, 1.0, 1)[0] == 64
    assert secagg.ring_for(5.0, 0.0, 10) == (32, -np.inf)
    with pytest.raises(ValueError, match="coarser grid"):
        secagg.ring_for(1e19, 1.0, 1)
    # against the normal tail, which the discrete Gaussian's is close to: the bound is above it, and not by much
    from scipy.stats import norm

    room = 2.0**31 - 1 - 1e6
    for std in (1.8e8, 2.0e8, 2.3e8):
        real = np.log2(2 * norm.sf(room / std) * 2160)
        bound = 1 + np.log2(2160) - (room / std) ** 2 / (2 * np.log(2))
        assert real < bound < real + 5


# -- statistics ----------------------------------------------------------------------------------------------------------


def _uniform(sample: np.ndarray[Any, Any]) -> float:
    """p-value of the bytes of a sample being uniform (chi-squared)."""
    from scipy.stats import chisquare

    return float(chisquare(np.bincount(sample.view(np.uint8), minlength=256)).pvalue)


def test_masked_vectors_are_uniform_and_a_broken_generator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    who = people(4)
    agreement = who.agreement(length=50_000)
    zero = np.zeros(50_000, np.uint32)
    masked = [who.masked(agreement, name, zero)[0] for name in agreement.roster[:2] for _ in range(2)]
    assert all(_uniform(one) > 1e-6 for one in masked)
    assert all(_uniform(a - b) > 1e-6 for a, b in itertools.combinations(masked, 2))  # the own mask is fresh
    assert _uniform(zero) < 1e-6

    def broken(values: Ring, seed: bytes, sign: int) -> None:
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        values ^= (rng.integers(0, 2**31, len(values))).astype(values.dtype)  # the top bit is never set

    monkeypatch.setattr(secagg, "_add_stream", broken)
    assert _uniform(who.masked(agreement, "p000", zero)[0]) < 1e-6
    monkeypatch.undo()
    monkeypatch.setattr(secagg.os, "urandom", bytes)  # an own mask that is the same every time
    a, b = (who.masked(agreement, "p000", zero)[0] for _ in range(2))
    assert _uniform(a - b) < 1e-6


def test_shares_of_two_attempts_are_independent() -> None:
    """Of the same secret, too: T − 1 shares say nothing, and none is used twice."""
    seen: set[bytes] = set()
    columns = []
    for _ in range(2000):
        shares = secagg._split(bytes(16), 3, 5)
        seen |= set(shares)
        columns.append([int.from_bytes(s, "big") for s in shares[:2]])
    assert len(seen) == 2000 * 5
    low = np.array([[v % 256 for v in row] for row in columns], np.uint8)
    assert _uniform(low[:, 0].copy()) > 1e-6
    assert _uniform(low[:, 1].copy()) > 1e-6
    assert _uniform(low[:, 0] - low[:, 1]) > 1e-6  # together: they are pairwise independent
    assert _uniform(np.array([int.from_bytes(secagg._split(bytes(16), 1, 1)[0], "big") % 256] * 2000, np.uint8)) < 1e-6


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret_and_no_fewer(secret: bytes, threshold: int, data: Any) -> None:
    count = data.draw(st.integers(threshold, 15))
    shares = secagg._split(secret, threshold, count)
    chosen = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    found: Callable[[int], int] = secagg._combine({at: shares[at - 1] for at in chosen})
    assert found(0) == int.from_bytes(secret, "big")
    if threshold > 1:
        fewer = secagg._combine({at: shares[at - 1] for at in chosen[1:]})
        assert fewer(0) != int.from_bytes(secret, "big")
