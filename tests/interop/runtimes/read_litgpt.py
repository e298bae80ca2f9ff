"""litgpt's files, read by us and applied by PEFT to the same tiny base, beside its logits."""

from __future__ import annotations

import numpy as np

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work

BAR = 1e-4
IDS = [1, 17, 99, 4, 56, 23, 88, 9, 120, 61]


def main() -> None:
    work = Work("litgpt")
    tiny = work.folder / "tiny"
    for name in ("all", "query_value"):
        theirs = np.load(work.own / f"{name}.npy")
        flags = ["--alpha", "12", "--base", str(tiny), "--to", "peft"]
        if name != "all":
            flags += ["--enabled", "1,0,1"]
        folder = ours.convert(work.own / f"{name}.pth.lora", work.own / f"peft_{name}", *flags)
        read = ours.peft_logits(tiny, folder, IDS)
        work.agrees(f"litgpt's {name}, we read it", read, theirs, BAR)
        work.differs(f"litgpt's {name}, bare", ours.peft_logits(tiny, None, IDS), theirs, BAR)


if __name__ == "__main__":
    main()
