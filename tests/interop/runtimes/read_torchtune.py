"""torchtune's files, read by us and applied by PEFT to the same tiny base, beside its logits."""

from __future__ import annotations

import numpy as np

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work

BAR = 1e-4
IDS = [1, 17, 99, 4, 56, 23, 88, 9, 120, 61]


def main() -> None:
    work = Work("torchtune")
    tiny = work.folder / "tiny"
    for kind in ("lora", "dora"):
        theirs = np.load(work.own / f"{kind}.npy")
        flags = ("--alpha", "12", "--base", str(tiny), "--to", "peft")
        folder = ours.convert(work.own / f"{kind}.pt", work.own / f"peft_{kind}", *flags)
        read = ours.peft_logits(tiny, folder, IDS)
        work.agrees(f"torchtune's {kind}, we read it", read, theirs, BAR)
        work.differs(f"torchtune's {kind}, bare", ours.peft_logits(tiny, None, IDS), theirs, BAR)


if __name__ == "__main__":
    main()
