"""The `hansa` script from its first moment on: Ctrl-C ends it with exit code 130, SIGTERM with 143, and either with one line.

While modules are imported nothing has begun, and out of some of them an interrupt comes as another exception: the process ends
at once. From then on both are exceptions, so that everybody lets go of what he holds.
"""

from __future__ import annotations

import os
import signal
import sys

from .errors import CTRL_C, STOPPED, TERMINATED


def main() -> None:
    """Entry point of the `hansa` script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _at_once)
    from .cli import application, run

    app = application()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(run(sys.argv[1:], app))


def _at_once(number: int, _: object) -> None:
    os.write(2, f"hansa: {STOPPED}\n".encode())
    os._exit(CTRL_C if number == signal.SIGINT else TERMINATED)
