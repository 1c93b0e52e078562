"""Write bundle/ and verdict.json: a tiny bundle with fixed keys and times, for other readers of the format.

    python tests/vectors/make_vectors.py [FOLDER]

Change these files only together with the version of the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / ".dev"), str(HERE.parent / "common")]

from bundles import Shape, honest, result_for  # noqa: E402
from hansa.common.verifier import verify_bundle  # noqa: E402


def main(folder: Path) -> None:
    """Two partners, two sampled rounds with public evaluation, a run that is refused, what is done under another charter between."""
    # A fixed sigma and fixed shares of delta: the bytes may not change when their choice gets better.
    made = honest(
        Shape(partners=2, rounds=2, q=0.5, steps=2, sigma=6.0, refused_run=True, others=0.35, golden=True, seed=4)
    )
    verdict = verify_bundle(made.write(folder / "bundle"))
    made.result = result_for(made, verdict)
    verdict = {**verify_bundle(made.write(folder / "bundle")), "bundle": "bundle"}
    (folder / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
