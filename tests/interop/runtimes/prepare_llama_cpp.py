"""The same adapters as for the prebuilt llama.cpp."""

from __future__ import annotations

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("llama_cpp")
    for case in ("plain", "rslora", "patterns"):
        out = work.own / f"{case}.gguf"
        ours.convert(work.adapter(case), out, "--for", "llama.cpp", "--base", str(work.base))


if __name__ == "__main__":
    main()
