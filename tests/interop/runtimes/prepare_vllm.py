"""A folder whose patterns are folded, and exports that are refused."""

from __future__ import annotations

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("vllm")
    ours.convert(work.adapter("patterns"), work.own / "patterns", "--for", "vllm")
    for case in ("dora", "bias", "saved_module"):
        name = f"{case}: `--for vllm` is refused"
        ours.refuses(work, name, work.adapter(case), "--for", "vllm")


if __name__ == "__main__":
    main()
