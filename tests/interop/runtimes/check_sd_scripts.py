# requires: diffusers==0.42.1
# requires: transformers==5.23.0
# requires: torch
# requires: numpy
# requires: einops==0.8.2
# without: torchvision
"""sd-scripts' own ``networks/lora.py`` as reader and writer, on a tiny Stable Diffusion 1.

It is in no package index: ``$SD_SCRIPTS`` names its folder or that file in it, or it is
downloaded. What it imports from its ``library`` is replaced by a few lines here; none of that
touches a weight. ``check_sd_scripts_xl`` has the same rows on its own UNet of SDXL, and shares
this environment.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import re
import sys
import types
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
URL = f"https://raw.githubusercontent.com/kohya-ss/sd-scripts/{COMMIT}"
LORA = "networks/lora.py"

#: relative to the norm of each change, and outputs of order 1: float32 sums in another order
BAR = 1e-5

#: the modules of diffusers and transformers in which it adapts linears and convolutions
ADAPTED = (
    "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "CLIPAttention", "CLIPMLP",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The parts of one tiny pipeline."""

    family: str
    ours: dict[str, torch.nn.Module]
    """As diffusers and transformers have them."""
    theirs: dict[str, torch.nn.Module]
    """As its network takes them: of the same names and the same weights."""
    alike: tuple[str, str]
    """Two blocks of its UNet, in its names, whose modules have the same shapes."""


def the_file(work: Work, name: str) -> Path:
    """A file of sd-scripts, from ``$SD_SCRIPTS`` or downloaded once; and a row about it."""
    downloaded = path = work.folder / f"sd-scripts-{COMMIT[:8]}" / name
    if "SD_SCRIPTS" in os.environ:
        given = Path(os.environ["SD_SCRIPTS"])
        path = (given.parent.parent if given.is_file() else given) / name
        path = path if path.exists() else downloaded
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(f"{URL}/{name}", timeout=60) as answer:
                path.write_bytes(answer.read())
        except OSError as error:
            not_run(
                f"{URL}/{name} cannot be downloaded ({error}); $SD_SCRIPTS may name a folder "
                "of sd-scripts that has it"
            )
    origin = f"of commit {COMMIT[:8]}" if path == downloaded else "given by $SD_SCRIPTS"
    size = len(path.read_text(encoding="utf-8"))
    work.holds(f"its {name}", True, f"{origin}, {size} characters")
    return path


def stub_library() -> None:
    """What its files need of ``library``, in a few lines."""

    def stub(name: str, **content: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)

    hashes = {"precalculate_safetensors_hashes": lambda tensors, metadata: ("0" * 64, "0" * 8)}
    stub("library", train_util=types.SimpleNamespace(**hashes))
    stub("library.utils", setup_logging=lambda *args, **more: None)
    stub("library.sdxl_original_unet", SdxlUNet2DConditionModel=type("Sdxl", (), {}))


def imported(name: str, path: Path):
    """A file as the module of a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
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
    """Text encoders and UNet, named as in transformers 4, which sd-scripts is for."""
    first = torch.nn.Module()
    first.text_model = models["text_encoder"]
    second = [models["text_encoder_2"]] if "text_encoder_2" in models else []
    return [first, *second], models["unet"]


def loras_of(network) -> dict[str, Any]:
    """Our path → the network's own module."""
    loras = network.text_encoder_loras + network.unet_loras
    return {read_name(lora.lora_name)[1].paths[0]: lora for lora in loras}


def merged_by(theirs, base: Base, path: Path):
    """What its network changes in each weight when it merges a file, and then the outputs."""
    own = copy.deepcopy(base.theirs)
    pair = for_theirs(own)
    network, tensors = theirs.create_network_from_weights(
        1.0, str(path), None, *pair, for_inference=True
    )
    adapted = {place: lora.org_module for place, lora in loras_of(network).items()}
    before = {place: module.weight.double() for place, module in adapted.items()}
    network.merge_to(*pair, tensors, torch.float32, "cpu")
    changes = {place: module.weight.double() - before[place] for place, module in adapted.items()}
    return changes, outputs(base.family, own)


def applied_by(theirs, base: Base, path: Path):
    """The outputs with a file that its network applies beside the weights."""
    own = copy.deepcopy(base.theirs)
    pair = for_theirs(own)
    network, _ = theirs.create_network_from_weights(1.0, str(path), None, *pair)
    network.apply_to(*pair)
    network.load_weights(str(path))
    network.eval()
    return outputs(base.family, own)


def largest(got, expected) -> float:
    return max(float((got[name] - expected[name]).abs().max()) for name in expected)


def altered(path: Path, name: str, key_of: Callable[[str], str | None]) -> Path:
    """A copy of a file with other keys; without those that get none."""
    tensors = safetensors.torch.load_file(path)
    changed = {new: tensor for key, tensor in tensors.items() if (new := key_of(key)) is not None}
    to = path.with_name(name)
    safetensors.torch.save_file(changed, to)
    return to


def ours_in_theirs(work: Work, theirs, base: Base) -> None:
    """Convolutions and linears, ranks and alphas mixed, in our file."""
    adapter = adapter_for(base.ours, ranks=(2, 3, 4), scalings=(0.5, 1.5), share=0.7, seed=3)
    reach = within_reach(base.ours)
    adapter = adapter.with_(sites={p: s for p, s in adapter.sites.items() if p in reach})
    path = write(KOHYA.write(adapter, Hints(family=base.family)), work.own)
    with attached(base.ours, adapter):
        meant = outputs(base.family, base.ours)
    changes, got = merged_by(theirs, base, path)
    work.holds(
        "our file: every module found",
        set(changes) == set(adapter.sites),
        f"{len(changes)} modules",
    )
    errors = [relative(site, changes[place]) for place, site in adapter.low_rank.items()]
    work.agrees("our file: changes of merge_to", errors, np.zeros(len(errors)), BAR, "relative")
    work.agrees("our file: outputs after merge_to", largest(got, meant), 0, BAR, "outputs")
    got = applied_by(theirs, base, path)
    work.agrees("our file: outputs after apply_to", largest(got, meant), 0, BAR, "outputs")
    bare = outputs(base.family, base.theirs)
    work.differs("our file: left out", largest(bare, meant), 0, BAR, "outputs")
    without = altered(
        path, "without_alphas.safetensors", lambda key: None if key.endswith(".alpha") else key
    )
    _, got = merged_by(theirs, base, without)
    work.differs("our file: without its alphas", largest(got, meant), 0, BAR, "outputs")
    one, other = base.alike
    exchanged = altered(
        path,
        "exchanged.safetensors",
        lambda key: re.sub(f"{one}|{other}", lambda m: other if m[0] == one else one, key),
    )
    _, got = merged_by(theirs, base, exchanged)
    work.differs(f"our file: {one} and {other} exchanged", largest(got, meant), 0, BAR, "outputs")


def skipped(work: Work, theirs, base: Base) -> None:
    """All that can be adapted in one file: what its network has no module for, and what we say."""
    adapter = adapter_for(base.ours, ranks=(2,), share=1.0, seed=5)
    written = KOHYA.write(adapter, Hints(family=base.family))
    path = write(written, work.own)
    network, _ = theirs.create_network_from_weights(
        1.0, str(path), None, *for_theirs(base.theirs), for_inference=True
    )
    left_out = sorted(set(adapter.sites) - set(loras_of(network)))
    said = next(note for note in written.notes if "sd-scripts skips" in note)
    work.holds(
        "our file of everything: it skips what we say",
        bool(left_out) and f": {', '.join(left_out)}." in said,
        ", ".join(left_out),
    )


def theirs_in_ours(work: Work, theirs, base: Base, case: str, **settings) -> None:
    """What its own ``save_weights`` writes."""
    torch.manual_seed(1)
    own = copy.deepcopy(base.theirs)
    pair = for_theirs(own)
    network = theirs.create_network(1.0, 4, 3.0, None, *pair, **settings)
    loras = loras_of(network)
    network.apply_to(*pair)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.eval()
    path = work.own / "theirs.safetensors"
    network.save_weights(str(path), None, {})
    adapter = read(path, base.family)
    errors, wrong = [], []
    for place, lora in loras.items():
        site = adapter.low_rank[place]
        change = theirs.LoRAInfModule.get_weight(lora)
        errors.append(relative(site, change))
        wrong.append(relative(site, change / lora.scale))
    work.holds(
        f"{case}: as many sites as modules",
        len(adapter.sites) == len(network.text_encoder_loras + network.unet_loras),
    )
    work.agrees(f"{case}: {len(loras)} changes", errors, np.zeros(len(errors)), BAR, "relative")
    work.differs(f"{case}: without its alphas", min(wrong), 0, BAR, "relative")
    with attached(base.ours, adapter):
        ours = outputs(base.family, base.ours)
    meant = outputs(base.family, own)
    work.agrees(f"{case}: outputs", largest(ours, meant), 0, BAR, "outputs")
    bare = outputs(base.family, base.ours)
    work.differs(f"{case}: outputs, left out", largest(bare, meant), 0, BAR, "outputs")


def read(path: Path, family: str) -> Adapter:
    reading = KOHYA.read(Source(path, path), Hints(family=family))
    assert not reading.lost, dict(reading.lost)
    return reading.adapter


def both_ways(work: Work, theirs, base: Base) -> None:
    """Every row about one base."""
    ours_in_theirs(work, theirs, base)
    skipped(work, theirs, base)
    theirs_in_ours(work, theirs, base, "its linears")
    theirs_in_ours(work, theirs, base, "with convolutions", conv_dim=2, conv_alpha=1.0)


def main() -> None:
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    work = Work("sd_scripts")
    stub_library()
    theirs = imported("sd_scripts_lora", the_file(work, LORA))
    torch.manual_seed(0)
    models = {"unet": unet(), "text_encoder": clip()}
    alike = ("down_blocks_0_attentions_0", "down_blocks_0_attentions_1")
    both_ways(work, theirs, Base("sd1", models, models, alike))


if __name__ == "__main__":
    main()
