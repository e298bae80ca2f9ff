"""PEFT folders with every scale folded into B, because OpenVINO GenAI reads no config."""

from __future__ import annotations

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("openvino")
    for case in ("plain", "rslora", "patterns", "tied_head"):
        ours.convert(work.adapter(case), work.own / case, "--for", "openvino")
    for case in ("dora", "embedding", "bias", "saved_module"):
        name = f"{case}: `--for openvino` is refused"
        ours.refuses(work, name, work.adapter(case), "--for", "openvino")


if __name__ == "__main__":
    main()
