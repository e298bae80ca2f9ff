# requires: torchtune==0.6.1
# requires: torchao==0.12.0
# requires: torch
# without: torchvision
"""torchtune's own model of a tiny llama with LoRA and DoRA, its adapter file and its logits."""

from __future__ import annotations

import sys
import types

import numpy as np
import torch
from cases import Work
from safetensors.torch import load_file

# the last torchao that torchtune takes imports two functions for a kernel of int8 attention from
# where this torch no longer has them; nothing here runs it
moved = types.ModuleType("torch._inductor.kernel.flex_attention")
moved.construct_strides = moved.maybe_realize = None
sys.modules[moved.__name__] = moved

from torchtune.models.convert_weights import hf_to_tune  # noqa: E402
from torchtune.models.llama2 import lora_llama2  # noqa: E402
from torchtune.modules.peft import get_adapter_params  # noqa: E402

IDS = [1, 17, 99, 4, 56, 23, 88, 9, 120, 61]

work = Work("torchtune")
weights = load_file(work.folder / "tiny" / "model.safetensors")
base = hf_to_tune(weights, num_heads=4, num_kv_heads=2, dim=64)

for kind in ("lora", "dora"):
    torch.manual_seed(0)
    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=96,
        max_seq_len=64,
        norm_eps=1e-5,
        lora_rank=4,
        lora_alpha=12,
        use_dora=kind == "dora",
    ).eval()
    missing = model.load_state_dict(base, strict=False)
    work.holds(f"{kind}: it takes the tiny base", not missing.unexpected_keys)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    adapter = get_adapter_params(model)
    with torch.no_grad():
        for name, parameter in adapter.items():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        np.save(work.own / f"{kind}.npy", model(torch.tensor([IDS]))[0].float().numpy())
    torch.save({name: p.detach() for name, p in adapter.items()}, work.own / f"{kind}.pt")
