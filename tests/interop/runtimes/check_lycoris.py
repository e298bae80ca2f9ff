# requires: lycoris-lora==4.1.3
# requires: torch
# requires: numpy
# requires: diffusers
# requires: transformers
# without: torchvision
"""LyCORIS as writer and reader: each algorithm's own change of a weight beside ours.

Its network for sd-scripts is made on a tiny UNet, given random values, saved with its own
``save_weights`` and read here; our kohya file is read by its ``create_network_from_weights``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[3]))  # our own code, in LyCORIS' environment

import lycoris.kohya as theirs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from lycoris.config import PRESET  # noqa: E402

from lorakit.formats.format import Hints, Source  # noqa: E402
from lorakit.formats.kohya import FORMAT as KOHYA  # noqa: E402
from lorakit.formats.lycoris import FORMAT as LYCORIS  # noqa: E402
from lorakit.formats.picture_names import read_name  # noqa: E402
from tests.formats.pictures import adapter_for, clip, delta, unet, write  # noqa: E402
from tests.interop.runtimes.cases import Work  # noqa: E402

#: relative to the norm of each weight's change: float32 products of float32 factors
BAR = 1e-5

CASES = {
    "LoCon": {"algo": "locon"},
    "LoCon, rsLoRA": {"algo": "locon", "rs_lora": True},
    "LoCon, tucker": {"algo": "locon", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoHa, rsLoRA": {"algo": "loha", "rs_lora": True},
    "LoHa, tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both in factors": {"algo": "lokr", "factor": 8, "decompose_both": True},
    "LoKr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
}
#: what has no low rank, at a rank at which nothing is left out
FULL = {
    "LoKr of two full matrices": {"algo": "lokr", "full_matrix": True},
    "full difference": {"algo": "full"},
}

#: its own preset names the time embedding twice in diffusers' UNet, and then fails
PRESET["lorakit"] = {**PRESET["full"], "unet_target_name": ["conv_in", "conv_out"]}


def network_of(models, **settings):
    torch.manual_seed(1)
    network = theirs.create_network(
        1.0, 2, 3.0, None, models["text_encoder"], models["unet"], conv_dim=2, conv_alpha=1.0,
        preset="lorakit", **settings,
    )  # fmt: skip
    loras = network.unet_loras + network.text_encoder_loras
    with torch.no_grad():
        for lora in loras:
            for parameter in lora.parameters():
                parameter.normal_(std=0.3)
    for lora in loras:
        network.add_module(lora.lora_name, lora)
    return network, loras


def relative(site, their_delta) -> float:
    expected = their_delta.detach().double().flatten(1)
    return float((delta(site) - expected).norm() / expected.norm())


def their_weight(lora):
    """The change that its forward applies; its ``get_diff_weight`` has LoHa's scale twice."""
    if lora.name == "full":  # before it is applied, it saves what it will have become
        return lora.custom_state_dict()["diff"]
    if hasattr(lora, "get_weight"):
        return lora.get_weight(lora.shape)
    return lora.get_diff_weight()[0]


def compare(work, case, models, settings, rank=None):
    network, loras = network_of(models, **settings)
    path = work.own / "x.safetensors"
    network.save_weights(str(path), None, {})
    source = Source(path, path)
    form = LYCORIS if LYCORIS.recognises(source) else KOHYA
    reading = form.read(source, Hints(rank=rank, family="sd1"))
    sites = reading.adapter.low_rank
    errors, wrong = [], []
    for lora in loras:
        (place,) = read_name(lora.lora_name)[1].paths
        errors.append(relative(sites[place], their_weight(lora)))
        other = next(o for o in loras if o.shape == lora.shape)
        if other is not lora:
            wrong.append(relative(sites[place], their_weight(other)))
    work.agrees(f"{case}: {len(loras)} weights", errors, np.zeros(len(errors)), BAR, "relative")
    work.differs(f"{case}: another module's", min(wrong), 0.0, BAR, "relative")
    work.holds(f"{case}: nothing lost", not reading.lost, str(dict(reading.lost))[:200])


def ours_in_theirs(work, models):
    """Conv, linear, ranks and alphas mixed, in our file."""
    adapter = adapter_for(
        {"unet": models["unet"]}, ranks=(2, 3), scalings=(0.5, 1.5), share=0.5, seed=3
    )
    path = write(KOHYA.write(adapter, Hints(family="sd1")), work.own)
    network, _ = theirs.create_network_from_weights(1.0, str(path), None, None, models["unet"])
    work.holds("our file: every module found", len(network.unet_loras) == len(adapter.sites))
    found = {read_name(lora.lora_name)[1].paths[0]: lora for lora in network.unet_loras}
    errors = [
        relative(adapter.low_rank[place], lora.get_diff_weight()[0])
        for place, lora in found.items()
    ]
    work.agrees("our file: its changes", errors, np.zeros(len(errors)), BAR, "relative")
    folded = [
        float((delta(site) / site.scaling - delta(site)).norm() / delta(site).norm())
        for site in adapter.low_rank.values()
    ]
    work.differs("our file: without its scales", min(folded), 0.0, BAR, "relative")


def main() -> None:
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    work = Work("lycoris", Path(folder))
    torch.manual_seed(0)
    models = {"unet": unet(), "text_encoder": clip()}
    for case, settings in CASES.items():
        # in so small a model some LoKr are of two full matrices, which need a rank
        rank = 10_000 if settings["algo"] == "lokr" else None
        compare(work, case, models, settings, rank)
    for case, settings in FULL.items():
        compare(work, case, models, settings, rank=10_000)
    ours_in_theirs(work, models)


if __name__ == "__main__":
    main()
