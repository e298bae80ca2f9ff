"""Small sound files of every format that is read, as bytes, for the mutations to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.checkpoint import open_checkpoint
from lorakit.core.safetensors_io import write_safetensors
from lorakit.core.sites import LowRank
from lorakit.formats.convert import plan_reading
from lorakit.formats.format import Hints, Reading
from lorakit.formats.load import load_adapter
from lorakit.formats.registry import read

from . import language_models
from .small import small_adapter

HINTS = Hints(alpha=4, base=language_models.LLAMA)

Kind = Literal["safetensors", "gguf", "pickle"]


@dataclass(frozen=True)
class Sample:
    """A sound file or folder, and how it is read."""

    format: str
    files: Mapping[str, bytes]
    """Path in the folder → content."""
    weights: str
    """The one that holds the tensors."""
    kind: Kind
    named: str
    """What the reader is given; ``""`` is the folder."""
    read: Callable[[Path], Adapter | None]
    """Reads it; a checkpoint's reader reads every tensor and gives nothing."""

    @property
    def texts(self) -> list[str]:
        """Its files of JSON."""
        return [name for name in self.files if name.endswith(".json")]


def samples(folder: Path) -> list[Sample]:
    """One of each format, made in ``folder``."""
    makers = (_written, _pickled_peft, _by_hand, _checkpoint)
    found = []
    for number, maker in enumerate(makers):
        own = folder / str(number)
        own.mkdir()
        found += maker(own)
    return found


def _written(folder: Path) -> list[Sample]:
    """Formats that are written here too."""
    text, picture = language_models.adapter(), _picture_adapter()
    found = []
    for name, adapter, kind in (
        ("peft", small_adapter(), "safetensors"),
        ("mlx", text, "safetensors"),
        ("gguf", text, "gguf"),
        ("loralib", text, "pickle"),
        ("kohya", picture, "safetensors"),
        ("diffusers", picture, "safetensors"),
    ):
        out = folder / name
        planned = plan_reading(Reading(adapter), source="peft", to=name, hints=HINTS)
        if planned.target.folder:
            planned.write(out)
        else:
            out.mkdir()
            planned.write(out)
        weights = next(n for n in planned.files if not n.endswith((".json", ".md", ".jinja")))
        reader = load_adapter if name == "peft" else _registry
        found.append(
            _sample(name, out, weights, kind, "" if planned.target.folder else None, reader)
        )
    return found


def _pickled_peft(folder: Path) -> list[Sample]:
    """PEFT's older file beside a config."""
    from lorakit.core.safetensors_io import read_safetensors
    from lorakit.formats import save_adapter

    save_adapter(small_adapter(), folder / "peft")
    sound = folder / "peft" / "adapter_model.safetensors"
    torch.save(read_safetensors(sound)[0], folder / "peft" / "adapter_model.bin")
    sound.unlink()
    return [_sample("peft .bin", folder / "peft", "adapter_model.bin", "pickle", "", load_adapter)]


def _by_hand(folder: Path) -> list[Sample]:
    """Formats that are read only: their names, with random numbers."""
    new = _numbers()
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    loha = {
        f"{name}q.hada_w{i}_{x}": new(*s) for i in (1, 2) for x, s in (("a", (6, 2)), ("b", (2, 5)))
    }
    lokr = {
        f"{name}k.lokr_w1": new(2, 3),
        f"{name}k.lokr_w2_a": new(4, 2),
        f"{name}k.lokr_w2_b": new(2, 3),
    }
    locon = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": new(2, 3, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": new(2, 2, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": new(4, 2, 1, 1),
    }
    locon["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"] = new(2, 3, 1, 1)
    alphas = {f"{name}{x}.alpha": torch.tensor(1.0) for x in "qk"}
    (folder / "lycoris").mkdir()
    write_safetensors(folder / "lycoris" / "a.safetensors", loha | lokr | locon | alphas, {})

    h, mlp, kv = language_models.HIDDEN, language_models.MLP, 8
    tune = {}
    for module, (d_out, d_in) in {
        "attn.q_proj": (h, h), "attn.k_proj": (kv, h), "mlp.w2": (h, mlp)
    }.items():  # fmt: skip
        tune[f"layers.0.{module}.lora_a.weight"] = new(2, d_in)
        tune[f"layers.0.{module}.lora_b.weight"] = new(d_out, 2)
    (folder / "torchtune").mkdir()
    torch.save(tune, folder / "torchtune" / "adapter_0.pt")
    (folder / "torchtune" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))

    lit = {
        "transformer.h.0.attn.qkv.lora_A": new(4, h),
        "transformer.h.0.attn.qkv.lora_B": new(h + kv, 2),
        "transformer.h.1.attn.attn.lora_A": new(6, h),
        "transformer.h.1.attn.attn.lora_B": new(h + 2 * kv, 2),
        "transformer.h.0.mlp.proj.lora_A": new(2, mlp),
        "transformer.h.0.mlp.proj.lora_B": new(h, 2),
    }
    (folder / "litgpt").mkdir()
    torch.save({"model": lit}, folder / "litgpt" / "lit_model.pth.lora")
    return [
        _sample("lycoris", folder / "lycoris", "a.safetensors", "safetensors", None, _registry),
        _sample("torchtune", folder / "torchtune", "adapter_0.pt", "pickle", None, _registry),
        _sample("litgpt", folder / "litgpt", "lit_model.pth.lora", "pickle", None, _registry),
    ]


def _checkpoint(folder: Path) -> list[Sample]:
    """A whole model in two shards, with their index."""
    new = _numbers()
    shards = [
        {f"model.layers.{i}.{m}.weight": new(6, 5) for m in ("q_proj", "v_proj")} for i in (0, 1)
    ]
    where = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 480}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = "model-00001-of-00002.safetensors"
    return [_sample("checkpoint", folder, weights, "safetensors", "", _read_checkpoint)]


def _picture_adapter() -> Adapter:
    new = _numbers()
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    return Adapter(
        {
            f"{block}.attn1.to_q": LowRank(new(2, 5), new(6, 2), 0.5),
            f"{block}.attn2.to_out.0": LowRank(new(3, 4), new(6, 3), 2.0),
            "unet.mid_block.resnets.0.conv1": LowRank(
                new(2, 3, 3, 3), new(4, 2, 1, 1), 1.0, "conv"
            ),
            "text_encoder.encoder.layers.0.self_attn.q_proj": LowRank(new(2, 5), new(5, 2), 1.5),
        }
    )


def _registry(path: Path) -> Adapter:
    return read(path, hints=HINTS).adapter


def _read_checkpoint(path: Path) -> None:
    opened = open_checkpoint(path)
    for name in opened.entries:
        opened.read(name)


def _sample(
    name: str, folder: Path, weights: str, kind: Any, named: str | None, reader: Any
) -> Sample:
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    return Sample(name, files, weights, kind, weights if named is None else named, reader)


def _numbers() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)
