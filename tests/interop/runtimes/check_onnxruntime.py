# requires: onnxruntime-genai==0.18.0
# requires: onnx
# requires: onnx-ir
# requires: torch
# requires: transformers==5.23.0
# requires: peft==0.21.2
# requires: numpy==2.4.6
"""ONNX Runtime GenAI hot-loads our ``.onnx_adapter`` into the graph that its builder made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from cases import Work

#: logits in float32
BAR = 3e-4

work = Work("onnxruntime")


def built() -> Path:
    """The base with places for an adapter: the builder's weights of LoRA become inputs.

    Each keeps a value of zeros, so that the graph runs without an adapter too.
    """
    folder = work.own / "model"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "base"]
    flags = ["-p", "fp32", "-e", "cpu", "-c", str(work.own / "cache"), "--extra_options"]
    options = [f"adapter_path={work.adapter('plain')}"]
    command += ["-i", str(work.base), "-o", str(folder), *flags, *options]
    subprocess.run(command, check=True, stdout=sys.stderr)
    path = folder / "model.onnx"
    model = onnx.load(path)
    places = [t for t in model.graph.initializer if ".lora_A." in t.name or ".lora_B." in t.name]
    assert places, "the builder made no places for LoRA"
    for tensor in places:
        values = onnx.numpy_helper.to_array(tensor, str(folder))
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(values), tensor.name))
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, values.shape)
        )
    (folder / "model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    (folder / "done").touch()
    return folder


def logits(adapter: Path | None) -> np.ndarray:
    """Logits [T, V] of the prompt."""
    model = og.Model(str(built()))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=64, batch_size=1)
    generator = og.Generator(model, params)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), adapter.stem)
        generator.set_active_adapter(adapters, adapter.stem)
    generator.append_tokens(np.array([work.prompt], dtype=np.int32))
    return np.array(generator.get_output("logits"))[0]


bare = logits(None)
work.agrees("base", bare, work.expected("base"), BAR)
for case in ("plain", "rslora"):
    work.agrees(case, logits(work.own / f"{case}.onnx_adapter"), work.expected(case), BAR)
work.differs("no adapter", bare, work.expected("plain"), BAR)
other = logits(work.own / "rslora.onnx_adapter")
work.differs("another adapter", other, work.expected("plain"), BAR)
