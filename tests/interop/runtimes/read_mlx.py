"""What mlx-lm's trainer saved, read by us and applied by PEFT, beside mlx-lm's own logits."""

from __future__ import annotations

import numpy as np

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work

BAR = 3e-4


def main() -> None:
    work = Work("mlx")
    bare = work.expected("base")
    for kind in ("lora", "dora"):
        theirs = np.load(work.own / f"trained_{kind}.npy")
        folder = ours.convert(
            work.own / f"trained_{kind}", work.own / f"peft_{kind}", "--to", "peft"
        )
        read = ours.peft_logits(work.base, folder, work.prompt)
        work.agrees(f"mlx-lm trained {kind}, we read it", read, theirs, BAR)
        work.differs(f"mlx-lm trained {kind}, bare base", bare, theirs, BAR)


if __name__ == "__main__":
    main()
