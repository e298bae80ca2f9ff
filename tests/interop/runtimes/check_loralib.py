# requires: loralib==0.1.2
# requires: torch
# requires: numpy==2.4.6
"""loralib, the paper's own code: its layers' files and outputs, and our file in its layers."""

from __future__ import annotations

import loralib
import numpy as np
import torch
from cases import Work
from torch import nn

BAR = 1e-5
ALPHA = 12

work = Work("loralib")
torch.manual_seed(0)


class Model(nn.Module):
    """A plain layer, a joined query, key and value, and one of which only two are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = loralib.Linear(16, 24, r=4, lora_alpha=ALPHA)
        self.all = loralib.MergedLinear(16, 36, r=4, lora_alpha=ALPHA, enable_lora=[True] * 3)
        self.two = loralib.MergedLinear(
            16, 36, r=4, lora_alpha=ALPHA, enable_lora=[True, False, True]
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"plain": self.plain(x), "all": self.all(x), "two": self.two(x)}


model = Model().train()
for name, parameter in model.named_parameters():
    if "lora_" in name:
        nn.init.normal_(parameter, std=0.3)
x = torch.randn(5, 16)
with torch.no_grad():
    theirs = model(x)
    for part in ("plain", "all", "two"):
        state = getattr(model, part).state_dict()
        lora = {f"{part}.{name}": value for name, value in state.items() if "lora_" in name}
        torch.save(lora, work.own / f"{part}.pt")
        values = {"x": x, "y": theirs[part], "W": state["weight"], "b": state["bias"]}
        np.savez(work.own / f"{part}.npz", **{name: v.numpy() for name, v in values.items()})
    whole = loralib.lora_state_dict(model)
    work.holds("files hold what lora_state_dict gives", len(whole) == 6)

    # our own file, written by prepare_loralib from the same shapes
    ours = torch.load(work.own / "ours" / "lora.pt", weights_only=True)
    kept = np.load(work.own / "ours.npz")
    layer = loralib.Linear(16, 24, r=4, lora_alpha=float(kept["alpha"]))
    state = {name.removeprefix("plain."): value for name, value in ours.items()}
    layer.weight.copy_(torch.from_numpy(kept["W"]))
    layer.bias.zero_()
    before = layer(torch.from_numpy(kept["x"]))
    missing = layer.load_state_dict(state, strict=False)
    work.holds("our file: every key is its own", not missing.unexpected_keys)
    got = layer(torch.from_numpy(kept["x"]))
    work.agrees("our file in its layer", got, kept["y"], BAR, "outputs")
    work.differs("our file not loaded", before, kept["y"], BAR, "outputs")
