"""What one process does to one target: feed it, bound it, keep what it must not do.

Two engines. `atheris` (libFuzzer: guided by the lines and comparisons of our code that an input reaches) where it is installed; else
`pool`, which keeps an input when it is refused in a new place. Both use the target's own mutations.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

CPU_S = 5.0
"""What one input may cost."""
SLOW_S = 0.5
"""An input that costs more is kept for a look, though it is no finding."""
ROOM = 3 * 1024**3
"""Memory that inputs may take beyond what the process has when they begin."""


FILE = 64 * 1024**2
"""No input may make a larger file."""


class Hang(BaseException):
    """An input took more than CPU_S of processor time. No Exception: nothing in Hansa may catch it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Limits to memory and to files, and a handler for the alarm of `feed`."""

    def late(_: int, __: FrameType | None) -> None:
        raise Hang(f"more than {CPU_S} s")

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    files = resource.getrlimit(resource.RLIMIT_FSIZE)
    before, large = signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, files[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
        signal.signal(signal.SIGXFSZ, large)
        signal.signal(signal.SIGPROF, before)


class Session:
    """Feeds one target and counts. `folder`: where findings go; None keeps them in memory only."""

    def __init__(self, target: Any, folder: Path | None = None) -> None:
        self.target = target
        self.outcomes: Counter[str] = Counter()
        self.findings: dict[str, tuple[str, bytes]] = {}  # place -> (words, the first input)
        self.began = time.monotonic()
        self.slowest = 0.0
        self._folder = folder
        self._told = 0.0

    def restart(self) -> None:
        """Count from here: the first inputs import what they need."""
        self.began, self.slowest = time.monotonic(), 0.0
        self.outcomes.clear()
        if self._folder is not None:
            (self._folder / "slowest.bin").unlink(missing_ok=True)

    def feed(self, data: bytes) -> str:
        """One input; where it ended. A finding does not stop the session: its place is remembered."""
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            try:
                outcome = self.target.feed(data)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except (Exception, Hang) as err:
            outcome = "FOUND"
            self._found(err, data)
        took = time.process_time() - start
        if took > max(self.slowest, SLOW_S) and self._folder is not None:
            (self._folder / "slowest.bin").write_bytes(data)
        self.slowest = max(self.slowest, took)
        self.outcomes[outcome] += 1
        now = time.monotonic()
        if now - self._told > 1:
            self._told = now
            self.tell()
        return outcome

    def _found(self, err: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(err.__traceback__)
        ours = [f for f in frames if "/fuzz/" not in f.filename and any(f"/{x}/" in f.filename for x in FLOORS)]
        frame = (ours or frames)[-1]
        place = f"{type(err).__name__} {'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
        if place in self.findings:
            return
        self.findings[place] = ("".join(traceback.format_exception(err))[-4000:], data)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in place)
            (self._folder / f"{name}.bin").write_bytes(data)
            (self._folder / f"{name}.txt").write_text(self.findings[place][0])

    def stats(self) -> dict[str, Any]:
        return {
            "target": self.target.name,
            "seconds": time.monotonic() - self.began,
            "outcomes": dict(self.outcomes),
            "slowest_s": round(self.slowest, 2),
            "findings": sorted(self.findings),
        }

    def tell(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "stats.json").write_text(json.dumps(self.stats()))


FLOORS = ("common", "clients", "server", "simulations")


def pool(session: Session, rng: random.Random, stop: Callable[[int], bool]) -> None:
    """Without coverage: examples first, then changes of examples and of what was refused in a new place."""
    kept = list(session.target.examples())
    for data in kept:
        session.feed(data)
    seen: set[tuple[str, int]] = set()
    count = 0
    while not stop(count):
        data = session.target.mutate(rng.choice(kept), rng)
        place: tuple[str, int] | None = None
        if len(kept) < 2000:
            place = _place(session, data)
        else:
            session.feed(data)
        if place is not None and place not in seen:
            seen.add(place)
            kept.append(data)
        count += 1


def _place(session: Session, data: bytes) -> tuple[str, int] | None:
    """Feed, and say in which line of ours it was refused."""
    from hansa.common.errors import HansaError

    where: list[tuple[str, int]] = []
    plain = session.target.run

    class Watched:
        name = session.target.name

        @staticmethod
        def feed(data: bytes) -> str:
            try:
                plain(data)
            except BaseException as err:
                if isinstance(err, HansaError):
                    frames = traceback.extract_tb(err.__traceback__)
                    where.extend((f.filename, f.lineno or 0) for f in frames[-1:])
                raise
            return "taken"

    real = session.target
    try:
        session.target = _Through(real, Watched.feed)
        session.feed(data)
    finally:
        session.target = real
    return where[0] if where else None


class _Through:
    """A target whose run is watched."""

    def __init__(self, target: Any, run: Callable[[bytes], str]) -> None:
        self.name, self._target, self._run = target.name, target, run

    def feed(self, data: bytes) -> str:
        from dataclasses import replace

        return str(replace(self._target, run=self._run).feed(data))


def guided(name: str, seconds: float, folder: Path, corpus: Path, seed: int) -> None:
    """Under atheris; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["hansa"]):
        from fuzz.targets import TARGETS

        target = TARGETS[name]
        session = Session(target, folder)
        examples = target.examples()
        for data in examples:
            session.feed(data)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(examples):
        (corpus / f"seed-{number}").write_bytes(data)
    words = folder.with_name(f"{name}.dict")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    longest = min(max((len(data) for data in examples), default=0) * 2 + 4096, 400_000)

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.randrange(20) < (1 if target.json else 8):
            return bytes(atheris.Mutate(data, most))
        if target.json and rng.randrange(3) == 0:  # what libFuzzer keeps shrinks until little can be built from it
            data = rng.choice(examples)
        return target.mutate(data, rng)[:most]

    arguments = [
        sys.argv[0], str(corpus), f"-max_total_time={max(1, int(seconds))}", "-timeout=60", "-rss_limit_mb=6000", f"-seed={seed}",
        f"-max_len={longest}", f"-artifact_prefix={folder}/", "-print_final_stats=0", "-reduce_inputs=0",
        "-handle_xfsz=0",
        *([f"-dict={words}"] if target.words else []),
    ]  # fmt: skip
    # -1: nothing could be built of it, so nothing shall be made of it either.
    atheris.Setup(arguments, lambda data: -1 if session.feed(data) == "skipped" else 0, custom_mutator=change)
    with bounded():
        session.restart()
        atheris.Fuzz()


def unguided(name: str, seconds: float, folder: Path, seed: int) -> None:
    """Without atheris."""
    from fuzz.targets import TARGETS

    session = Session(TARGETS[name], folder)
    session.target.examples()
    for data in session.target.examples():
        session.feed(data)
    with bounded():
        session.restart()
        pool(session, random.Random(seed), lambda _: time.monotonic() - session.began > seconds)
    session.tell()
