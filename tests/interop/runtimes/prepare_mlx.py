"""MLX's folders of our adapters, and exports that are refused."""

from __future__ import annotations

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def main() -> None:
    work = Work("mlx")
    base = ("--base", str(work.base))
    for case in ("plain", "rslora", "patterns", "dora"):
        ours.convert(work.adapter(case), work.own / case, "--for", "mlx", *base)
    for case in ("embedding", "tied_head", "bias", "saved_module"):
        name = f"{case}: `--for mlx` is refused"
        ours.refuses(work, name, work.adapter(case), "--for", "mlx", *base)


if __name__ == "__main__":
    main()
