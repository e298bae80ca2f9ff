"""An adapter of one layer in our loralib file, and what the layer must give."""

from __future__ import annotations

import shutil

import numpy as np
import torch

from lorakit import LoRASpec, save_adapter
from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("loralib")
    torch.manual_seed(0)
    A, B, W, x = (torch.randn(*s) for s in ((4, 16), (24, 4), (24, 16), (5, 16)))
    spec = LoRASpec(rank=4, alpha=10, targets=("plain",))
    shutil.rmtree(work.own / "peft", ignore_errors=True)
    folder = save_adapter(Adapter({"plain": LowRank(A, B, 2.5)}, spec), work.own / "peft")
    (work.own / "ours").mkdir(exist_ok=True)
    ours.convert(folder, work.own / "ours" / "lora.pt", "--to", "loralib")
    W64, A64, B64, x64 = (t.double().numpy() for t in (W, A, B, x))
    y = x64 @ (W64 + 2.5 * B64 @ A64).T
    np.savez(work.own / "ours.npz", x=x.numpy(), W=W.numpy(), y=y, alpha=10.0)


if __name__ == "__main__":
    main()
