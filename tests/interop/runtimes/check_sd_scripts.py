# requires: diffusers==0.42.1
# requires: transformers==5.23.0
# requires: torch
# requires: numpy
# without: torchvision
"""sd-scripts' own ``networks/lora.py`` as reader and writer, on a tiny Stable Diffusion 1.

It is in no package index: ``$SD_SCRIPTS`` names the file, or it is downloaded. What it imports
from its ``library`` is replaced by a few lines here; none of that touches a weight.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import sys
import types
import urllib.request
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parents[3]))  # our own code, in this environment

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from lorakit.core.adapter import Adapter  # noqa: E402
from lorakit.formats.format import Hints, Source  # noqa: E402
from lorakit.formats.kohya import FORMAT as KOHYA  # noqa: E402
from lorakit.formats.picture_names import read_name  # noqa: E402
from tests.formats.pictures import (  # noqa: E402
    adapter_for,
    attached,
    clip,
    delta,
    outputs,
    unet,
    write,
)
from tests.interop.runtimes.cases import Work, not_run  # noqa: E402

COMMIT = "6a584cad40e487069678a12d4b584b0e154ecfdc"
URL = f"https://raw.githubusercontent.com/kohya-ss/sd-scripts/{COMMIT}/networks/lora.py"

#: relative to the norm of each change, and outputs of order 1: float32 sums in another order
BAR = 1e-5

#: the modules of diffusers and transformers in which it adapts linears and convolutions
ADAPTED = (
    "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "CLIPAttention", "CLIPMLP",
)  # fmt: skip


def the_file(work: Work) -> Path:
    """``$SD_SCRIPTS``, or the pinned file, downloaded once."""
    if "SD_SCRIPTS" in os.environ:
        return Path(os.environ["SD_SCRIPTS"])
    path = work.own / f"lora-{COMMIT[:8]}.py"
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=60) as answer:
                path.write_bytes(answer.read())
        except OSError as error:
            not_run(f"{URL} cannot be downloaded ({error}); $SD_SCRIPTS may name the file")
    return path


def imported(path: Path):
    """Its module, with what it needs of ``library`` in a few lines."""

    def stub(name: str, **content) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)

    hashes = {"precalculate_safetensors_hashes": lambda tensors, metadata: ("0" * 64, "0" * 8)}
    stub("library", train_util=types.SimpleNamespace(**hashes))
    stub("library.utils", setup_logging=lambda *args, **more: None)
    stub("library.sdxl_original_unet", SdxlUNet2DConditionModel=type("Sdxl", (), {}))
    spec = importlib.util.spec_from_file_location("sd_scripts_lora", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def within_reach(models) -> set[str]:
    """Paths of the modules that its network adapts."""
    return {
        f"{component}.{name}.{child}"
        for component, model in models.items()
        for name, module in model.named_modules()
        if type(module).__name__ in ADAPTED
        for child, inner in module.named_modules()
        if type(inner).__name__ in ("Linear", "Conv2d")
    }


def relative(site, change) -> float:
    expected = delta(site)
    return float((change.detach().double().flatten(1) - expected).norm() / expected.norm())


def for_theirs(models):
    """Text encoder and UNet, named as in transformers 4, which sd-scripts is for."""
    holder = torch.nn.Module()
    holder.text_model = models["text_encoder"]
    return holder, models["unet"]


def with_theirs(theirs, models, path: Path, *, merged: bool):
    """What the models answer with a file, which its network merges or applies."""
    own = copy.deepcopy(models)
    pair = for_theirs(own)
    network, tensors = theirs.create_network_from_weights(
        1.0, str(path), None, *pair, for_inference=merged
    )
    if merged:
        network.merge_to(*pair, tensors, torch.float32, "cpu")
    else:
        network.apply_to(*pair)
        network.load_weights(str(path))
        network.eval()
    return own, network, outputs("sd1", own)


def largest(got, expected) -> float:
    return max(float((got[name] - expected[name]).abs().max()) for name in expected)


def ours_in_theirs(work: Work, theirs, models) -> None:
    """Convolutions and linears, ranks and alphas mixed, in our file."""
    adapter = adapter_for(models, ranks=(2, 3, 4), scalings=(0.5, 1.5), share=0.7, seed=3)
    reach = within_reach(models)
    adapter = adapter.with_(sites={p: s for p, s in adapter.sites.items() if p in reach})
    path = write(KOHYA.write(adapter, Hints(family="sd1")), work.own)
    with attached(models, adapter):
        meant = outputs("sd1", models)
    merged, network, got = with_theirs(theirs, models, path, merged=True)
    found = network.unet_loras + network.text_encoder_loras
    work.holds("our file: every module found", len(found) == len(adapter.sites), "")
    errors = [
        relative(site, merged_change(merged, models, place))
        for place, site in adapter.low_rank.items()
    ]
    work.agrees("our file: changes of merge_to", errors, np.zeros(len(errors)), BAR, "relative")
    work.agrees("our file: outputs after merge_to", largest(got, meant), 0, BAR, "outputs")
    _, _, got = with_theirs(theirs, models, path, merged=False)
    work.agrees("our file: outputs after apply_to", largest(got, meant), 0, BAR, "outputs")
    bare = outputs("sd1", models)
    work.differs("our file: left out", largest(bare, meant), 0, BAR, "outputs")
    without = work.own / "without_alphas.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}, without
    )
    _, _, got = with_theirs(theirs, models, without, merged=True)
    work.differs("our file: without its alphas", largest(got, meant), 0, BAR, "outputs")


def skipped(work: Work, theirs, models) -> None:
    """All that can be adapted in one file: what its network has no module for, and what we say."""
    adapter = adapter_for(models, ranks=(2,), share=1.0, seed=5)
    written = KOHYA.write(adapter, Hints(family="sd1"))
    path = write(written, work.own)
    network, tensors = theirs.create_network_from_weights(
        1.0, str(path), None, *for_theirs(models), for_inference=True
    )
    built = {lora.lora_name for lora in network.unet_loras + network.text_encoder_loras}
    names = {key.partition(".")[0] for key in tensors} - built
    left_out = sorted(read_name(name)[1].paths[0] for name in names)
    said = next(note for note in written.notes if "sd-scripts skips" in note)
    work.holds(
        "our file of everything: it skips what we say",
        bool(left_out) and f": {', '.join(left_out)}." in said,
        ", ".join(left_out),
    )


def merged_change(merged, models, place: str) -> torch.Tensor:
    component, _, name = place.partition(".")
    after = merged[component].get_submodule(name).weight.double()
    return after - models[component].get_submodule(name).weight.double()


def theirs_in_ours(work: Work, theirs, models, case: str, **settings) -> None:
    """What its own ``save_weights`` writes."""
    torch.manual_seed(1)
    own = copy.deepcopy(models)
    pair = for_theirs(own)
    network = theirs.create_network(1.0, 4, 3.0, None, *pair, **settings)
    loras = network.text_encoder_loras + network.unet_loras
    network.apply_to(*pair)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.eval()
    path = work.own / "theirs.safetensors"
    network.save_weights(str(path), None, {})
    adapter = read(path)
    errors, wrong = [], []
    for lora in loras:
        site = adapter.low_rank[read_name(lora.lora_name)[1].paths[0]]
        errors.append(relative(site, theirs.LoRAInfModule.get_weight(lora)))
        unscaled = theirs.LoRAInfModule.get_weight(lora) / lora.scale
        wrong.append(relative(site, unscaled))
    work.holds(f"{case}: as many sites as modules", len(adapter.sites) == len(loras))
    work.agrees(f"{case}: {len(loras)} changes", errors, np.zeros(len(errors)), BAR, "relative")
    work.differs(f"{case}: without its alphas", min(wrong), 0, BAR, "relative")
    with attached(models, adapter):
        ours = outputs("sd1", models)
    work.agrees(f"{case}: outputs", largest(ours, outputs("sd1", own)), 0, BAR, "outputs")


def read(path: Path) -> Adapter:
    reading = KOHYA.read(Source(path, path), Hints(family="sd1"))
    assert not reading.lost, dict(reading.lost)
    return reading.adapter


def main() -> None:
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    work = Work("sd_scripts")
    path = the_file(work)
    given = "given by $SD_SCRIPTS" if "SD_SCRIPTS" in os.environ else f"of commit {COMMIT[:8]}"
    size = len(path.read_text(encoding="utf-8"))
    theirs = imported(path)
    work.holds("its networks/lora.py", True, f"{given}, {size} characters")
    torch.manual_seed(0)
    models = {"unet": unet(), "text_encoder": clip()}
    ours_in_theirs(work, theirs, models)
    skipped(work, theirs, models)
    theirs_in_ours(work, theirs, models, "its linears")
    theirs_in_ours(work, theirs, models, "with convolutions", conv_dim=2, conv_alpha=1.0)


if __name__ == "__main__":
    main()
