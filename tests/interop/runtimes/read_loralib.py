"""loralib's own files, read by us: the layer's output in float64 beside its own."""

from __future__ import annotations

import numpy as np

from lorakit.core.sites import LowRank
from lorakit.errors import FormatError
from lorakit.formats.format import Hints
from lorakit.formats.registry import read
from tests.interop.runtimes.cases import Work

BAR = 1e-5
ALPHA = 12.0


def output(site: LowRank, kept: dict[str, np.ndarray]) -> np.ndarray:
    W, b, x = (kept[name].astype(np.float64) for name in ("W", "b", "x"))
    change = site.scaling * site.B.double().numpy() @ site.A.double().numpy()
    return x @ (W + change).T + b


def main() -> None:
    work = Work("loralib")
    enabled = {"two": (True, False, True)}
    for part in ("plain", "all", "two"):
        kept = dict(np.load(work.own / f"{part}.npz"))
        hints = Hints(alpha=ALPHA, enabled=enabled.get(part, ()))
        site = read(work.own / f"{part}.pt", hints=hints).adapter.sites[part]
        assert isinstance(site, LowRank)
        work.agrees(f"{part}, we read it", output(site, kept), kept["y"], BAR, "outputs")
        bare = kept["x"] @ kept["W"].T + kept["b"]
        work.differs(f"{part}, without it", bare, kept["y"], BAR, "outputs")
    for name, hints in (("plain", Hints()), ("two", Hints(alpha=ALPHA))):
        try:
            read(work.own / f"{name}.pt", hints=hints)
        except FormatError as error:
            work.refuses(f"{name}: what the file does not say is asked for", str(error))
        else:
            work.refuses(f"{name}: what the file does not say is asked for", None)


if __name__ == "__main__":
    main()
