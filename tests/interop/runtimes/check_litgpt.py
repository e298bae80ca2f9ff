# requires: litgpt==0.5.13
# requires: torch
# requires: safetensors
# without: torchvision
"""litgpt's own model of a tiny llama with LoRA, its adapter files and its logits."""

from __future__ import annotations

import lightning
import numpy as np
import torch
from cases import Work
from litgpt.lora import GPT, Config, lora_filter
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file

IDS = [1, 17, 99, 4, 56, 23, 88, 9, 120, 61]
#: which of query, key and value are trained
PARTS = {"all": (True, True, True), "query_value": (True, False, True)}

work = Work("litgpt")
weights = load_file(work.folder / "tiny" / "model.safetensors")
fabric = lightning.Fabric(accelerator="cpu", devices=1)

for name, (query, key, value) in PARTS.items():
    torch.manual_seed(0)
    config = Config(
        name="tiny",
        block_size=64,
        vocab_size=128,
        padded_vocab_size=128,
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=64,
        head_size=16,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=96,
        lora_r=4,
        lora_alpha=12,
        lora_query=query,
        lora_key=key,
        lora_value=value,
        lora_projection=True,
        lora_mlp=True,
    )
    state: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, state, dict(weights))
    model = GPT(config).eval()
    missing = model.load_state_dict(state, strict=False)
    work.holds(f"{name}: it takes the tiny base", not missing.unexpected_keys)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        np.save(work.own / f"{name}.npy", model(torch.tensor([IDS]))[0].float().numpy())
    path = work.own / f"{name}.pth.lora"
    fabric.save(path, {"model": model}, filter={"model": lora_filter})
