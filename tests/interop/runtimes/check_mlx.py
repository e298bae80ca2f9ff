# requires: mlx[cpu]==0.32.4
# requires: mlx-lm==0.32.2
"""mlx-lm reads our folders; what its own trainer saved is left for ``read_mlx`` with its logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from cases import Work
from mlx_lm import load

#: logits in float32
BAR = 3e-4

work = Work("mlx")


def logits(adapter: Path | None) -> np.ndarray:
    model, _ = load(str(work.base), adapter_path=None if adapter is None else str(adapter))
    model.eval()
    return np.array(model(mx.array([work.prompt]))[0].astype(mx.float32))


def train(kind: str) -> Path:
    """Two steps of mlx-lm's own trainer on the last block; DoRA's cost it half a minute each."""
    data, out = work.own / "data", work.own / f"trained_{kind}"
    data.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        rows = [json.dumps({"text": f"{i} is a number."}) for i in range(2)]
        (data / f"{name}.jsonl").write_text("\n".join(rows))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", work.base]
    flags = "--batch-size 1 --iters 2 --num-layers 1 --learning-rate 1e-2 --val-batches 1"
    subprocess.run(
        [*command, "--data", data, "--adapter-path", out, "--fine-tune-type", kind, *flags.split()],
        check=True,
        stdout=sys.stderr,
    )
    return out


bare = logits(None)
work.agrees("base", bare, work.expected("base"), BAR)
for case in ("plain", "rslora", "patterns", "dora"):
    work.agrees(case, logits(work.own / case), work.expected(case), BAR)
work.differs("no adapter", bare, work.expected("plain"), BAR)

wrong = work.own / "wrong_scale"
shutil.rmtree(wrong, ignore_errors=True)
shutil.copytree(work.own / "plain", wrong)
config = json.loads((wrong / "adapter_config.json").read_text())
config["lora_parameters"]["scale"] = 20.0  # mlx-lm's own default
(wrong / "adapter_config.json").write_text(json.dumps(config))
work.differs("its default scale instead of ours", logits(wrong), work.expected("plain"), BAR)

for kind in ("lora", "dora"):
    np.save(work.own / f"trained_{kind}.npy", logits(train(kind)))
