"""GGUF adapters for llama.cpp, and one whose q and k are in transformers' order of rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np

from tests.interop.runtimes import ours
from tests.interop.runtimes.cases import Work


def unpermuted(source: Path, out: Path, heads: int, kv_heads: int) -> None:
    """The same adapter without llama.cpp's order of rows in q and k.

    Rows of each head lie in llama.cpp as (half, 2) and in transformers as (2, half).
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        for name, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if tensor.name.endswith(f"{name}.weight.lora_b"):
                half = values.shape[0] // count // 2
                values = values.reshape(count, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    work = Work("xllamacpp")
    base = ("--base", str(work.base))
    for case in ("plain", "rslora", "patterns"):
        ours.convert(work.adapter(case), work.own / f"{case}.gguf", "--for", "llama.cpp", *base)
    ours.convert(work.adapter("plain"), work.own / "direct.gguf", "--to", "gguf", *base)
    config = json.loads((work.base / "config.json").read_text())
    partial = work.own / "unpermuted.partial"
    unpermuted(
        work.own / "plain.gguf",
        partial,
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    os.replace(partial, work.own / "unpermuted.gguf")
    for case in ("dora", "embedding", "tied_head", "bias"):
        for flags in (("--for", "llama.cpp"), ("--to", "gguf")):
            name = f"{case}: `{' '.join(flags)}` is refused"
            ours.refuses(work, name, work.adapter(case), *flags, *base)


if __name__ == "__main__":
    main()
