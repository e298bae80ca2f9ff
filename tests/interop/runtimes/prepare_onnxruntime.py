"""ONNX Runtime's adapters, and exports that are refused."""

from __future__ import annotations

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("onnxruntime")
    for case in ("plain", "rslora"):
        out = work.own / f"{case}.onnx_adapter"
        ours.convert(work.adapter(case), out, "--for", "onnxruntime")
    for case in ("dora", "embedding", "bias", "saved_module"):
        name = f"{case}: `--for onnxruntime` is refused"
        ours.refuses(work, name, work.adapter(case), "--for", "onnxruntime")


if __name__ == "__main__":
    main()
