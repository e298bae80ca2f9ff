"""Losses and gradients of every kind, against float64 formulas on weights that were merged.

The oracle adds scaling · B A to the weights themselves and takes the head's trained values; it
calls the model with one example at a time, and computes the loss from the logits by hand.
"""

from __future__ import annotations

import copy
import math
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.core.spec import LoRASpec
from lorakit.tasks.rows import RowSpec
from lorakit.tasks.task import Stretch
from lorakit.tasks.vision_chat import processed
from lorakit.train.distributed import World
from lorakit.train.interrupt import StopRequest
from lorakit.train.loop import Loop
from tests.tasks.conftest import stir

from . import small
from .conftest import Bench


def merged(model, adapter):
    """A copy with the adapter in its weights, and the leaves that its gradient is taken of."""
    model = copy.deepcopy(model)
    leaves = {}
    for path, site in adapter.low_rank.items():
        A = site.A.double().requires_grad_()
        B = site.B.double().requires_grad_()
        leaves[f"{path}.lora_A"], leaves[f"{path}.lora_B"] = A, B
        module = model.get_submodule(path)
        weight = module.weight.detach() + site.scaling * B @ A
        del module.weight
        module.weight = weight
    for path, site in adapter.replaced.items():
        module = model.get_submodule(path)
        for name, value in site.tensors_by_name.items():
            leaf = value.double().requires_grad_()
            leaves[f"{path}.{name}"] = leaf
            del module._parameters[name]
            setattr(module, name, leaf)
    return model, leaves


def log_p(logits, index):
    """Of one entry, by the definition."""
    logits = logits.double()
    top = logits.max()
    return logits[index] - top - torch.log(torch.exp(logits - top).sum())


def by_hand(bench: Bench, model, example) -> torch.Tensor:
    """An example's summed loss from the model's own logits, alone."""
    inputs = example.inputs
    if bench.name in ("classify", "vision"):
        if bench.name == "classify":
            given = {"input_ids": torch.tensor(inputs["ids"])[None].long()}
        else:
            with Image.open(inputs["asked"].source) as picture:
                pixels = np.asarray(picture.convert("RGB").resize((16, 16), 2), np.float64)
            pixels = (pixels / 255 - 0.5) / 0.5
            given = {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)[None]}
        return -log_p(model(**given).logits[0], inputs["label"])
    if bench.name == "vision-chat":
        return answer_by_hand(model, inputs)
    labels = inputs["labels"].tolist()
    start = model.config.decoder_start_token_id
    decoder = torch.tensor([[start, *labels[:-1]]])
    if bench.name == "speech":
        with wave.open(inputs["asked"].source) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        made = inputs["extractor"](
            sound.astype(np.float32), sampling_rate=16000, return_tensors="pt"
        )
        given = {"input_features": made["input_features"].double()}
    else:
        given = {"input_ids": torch.tensor(inputs["ids"])[None].long()}
    logits = model(**given, decoder_input_ids=decoder).logits[0]
    return -sum(log_p(logits[t], label) for t, label in enumerate(labels))


def answer_by_hand(model, inputs):
    """The words behind the last ``<s> assistant``, and the end; each from all before it."""
    pictures = [Path(picture.source).read_bytes() for picture in inputs["pictures"]]
    given = processed(inputs["processor"], inputs["messages"], pictures, ask=False)
    given["pixel_values"] = given["pixel_values"].double()
    ids = given["input_ids"][0].tolist()
    start = len(ids) - ids[::-1].index(1) + 1  # <s> has number 1, and then comes "assistant"
    logits = model(**given).logits[0]
    return -sum(log_p(logits[t - 1], ids[t]) for t in range(start, len(ids)))


@pytest.mark.parametrize("name", ["classify", "t5", "bart", "vision", "speech", "vision-chat"])
def test_gradients_are_those_of_float64_formulas(benches, name):
    bench = benches[name]
    base = bench.base(dtype="float64")
    handle = bench.attached(base)
    data = bench.data(base)
    task = bench.kind.on(base.model, handle)
    handle.flat("a")  # gathers the gradients of the sites
    assert task.mode == ("single" if name == "vision-chat" else "padded")
    examples = [data[i] for i in (0, 3, 5)]
    if name not in ("vision", "vision-chat"):
        assert len({example.size for example in examples}) > 1
    sums = task.losses([Stretch(examples, "a")])
    sums.sum().backward()
    adapter, found = handle.snapshot("a"), gradients(handle, "a")
    handle.detach()
    model, leaves = merged(base.model, adapter)
    expected = sum(by_hand(bench, model, example) for example in examples)
    # WAV samples and pixels are rounded to float32 on their way in
    close = 1e-6 if name == "speech" else 1e-9
    assert sums.item() == pytest.approx(expected.item(), rel=close)
    expected.backward()
    assert set(found) == set(leaves)
    for path, leaf in leaves.items():
        size = leaf.grad.norm()
        assert float((found[path] - leaf.grad).norm()) <= 1e-5 * float(size) + 1e-12, path
        assert size > 0, path


def gradients(handle, name):
    """Tensor's name → its stretch of the flat gradient."""
    flat, start, found = handle.flat(name).grad, 0, {}
    for tensor_name in handle._banks[name]._order:
        tensor = handle._banks[name].get(tensor_name)
        found[tensor_name] = flat[start : start + tensor.numel()].view(tensor.shape).clone()
        start += tensor.numel()
    return found


def clear(handle, name):
    if handle.flat(name).grad is not None:
        handle.flat(name).grad.zero_()


def test_contrast_is_that_of_the_formula(benches, tmp_path):
    """Against a float64 loop over pairs, with equal positives left out of each other's rivals;
    in training, in an evaluation, and in what is told beside the loss."""
    bench = benches["embed"]
    base = bench.base(dtype="float64")
    rows = [
        {"anchor": row["text"], "positive": row["target"], "negative": other["text"]}
        for row, other in zip(small.texts(5), small.texts(5, seed=1), strict=True)
    ]
    rows[1]["positive"] = rows[0]["positive"]
    file = small.write_rows(tmp_path / "rows.jsonl", rows)
    data = bench.kind.load_data(RowSpec((str(file),)), base)
    handle = bench.attached(base)
    task = bench.kind.on(base.model, handle)
    examples = list(data)
    loss = task.losses([Stretch(examples, "a")]).item()
    outputs = task.measured(examples, "a").outputs.numpy()
    adapter = handle.snapshot("a")
    assert "pooler.dense" not in adapter.sites  # no vector is made of it
    handle.detach()
    model, _ = merged(base.model, adapter)

    def vector(ids):
        hidden = model(input_ids=torch.tensor(ids)[None].long()).last_hidden_state[0]
        mean = hidden.mean(0)
        return mean / mean.square().sum().sqrt()

    anchors, positives, negatives = (
        [vector(example.inputs["ids"][i]) for example in examples] for i in range(3)
    )
    expected, ranks = [], []
    for i, anchor in enumerate(anchors):
        near = [(anchor @ one).item() for one in (*positives, *negatives)]
        rivals = [x for j, x in enumerate(near) if j not in {0: (0, 1), 1: (0, 1)}.get(i, (i,))]
        own = math.exp(20 * near[i])
        expected.append(-math.log(own / (own + sum(math.exp(20 * x) for x in rivals))))
        ranks.append(1 + sum(x >= near[i] for x in rivals))
    assert loss == pytest.approx(sum(expected), rel=1e-9)
    assert task.contrasted(outputs) == pytest.approx(expected, rel=1e-9)
    told = bench.kind.metrics(loss, data, range(5), outputs)
    assert told["accuracy"] == pytest.approx(sum(rank == 1 for rank in ranks) / 5)
    assert told["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 5)
    assert max(ranks) > 1


def test_a_batch_may_be_cut_anywhere(bench):
    """Padding, company and order change nothing; dropout is on."""
    base = bench.base(dtype="float64")
    handle = bench.attached(base, LoRASpec(rank=2, alpha=3, dropout=0.3))
    task = bench.kind.on(base.model, handle)
    data = bench.data(base)
    for module in base.model.modules():
        module.training = False
    for path in handle.snapshot("a").sites:
        base.model.get_submodule(path).training = True
    examples = [data[i] for i in range(6)]
    stretch = Stretch(examples, "a", seed=4, step=2, dropout=True)
    if task.whole is not None:
        again = task.losses([Stretch(examples[::-1], "a", seed=4, step=2, dropout=True)])
        assert again.item() == pytest.approx(task.losses([stretch]).item(), rel=1e-9)
        return

    def gradient(parts):
        clear(handle, "a")
        total = 0.0
        for part in parts:
            sums = task.losses([Stretch(part, "a", seed=4, step=2, dropout=True)])
            sums.sum().backward()
            total += float(sums.sum().detach())
        return total, handle.flat("a").grad.clone()

    loss, whole = gradient([examples])
    other, cut = gradient([examples[4:], examples[1:4], examples[:1]])
    assert other == pytest.approx(loss, rel=1e-9)
    assert float(whole.norm()) > 0
    assert float((cut - whole).norm()) <= 1e-9 * float(whole.norm())
    # and it is dropout that was measured
    plain = float(task.losses([Stretch(examples, "a")]).detach())
    assert abs(plain - loss) > 1e-6 * abs(loss)


@pytest.mark.parametrize("name", ["classify", "t5", "vision", "speech"])
def test_runs_that_share_a_forward_do_not_touch(benches, name):
    """Each stretch's loss and gradient are those that it has alone."""
    bench = benches[name]
    base = bench.base(dtype="float64")
    handle = bench.attached(base)
    spec, _ = bench.kind.adapter_spec(LoRASpec(rank=3, alpha=3), base)
    handle.add(spec, "b", trainable=True, seed=2)
    stir(handle, "b", seed=9)
    handle.activate(None)
    task = bench.kind.on(base.model, handle)
    data = bench.data(base)
    first = Stretch([data[0], data[1]], "a")
    second = Stretch([data[2], data[3], data[4]], "b")

    def both(*calls):
        for one in "ab":
            clear(handle, one)
        sums = [task.losses(stretches) for stretches in calls]
        torch.cat(sums).sum().backward()
        return torch.cat(sums).detach(), [handle.flat(one).grad.clone() for one in "ab"]

    alone, gradients_alone = both([first], [second])
    together, gradients_together = both([first, second])
    assert torch.allclose(together, alone, rtol=1e-9)
    for mine, theirs in zip(gradients_together, gradients_alone, strict=True):
        assert float(theirs.norm()) > 0
        assert float((mine - theirs).norm()) <= 1e-9 * float(theirs.norm())
    assert task.why_apart(handle.snapshot("a")) is None


def test_a_process_without_rows_to_validate_takes_part(benches, monkeypatch):
    """The third process of three with two rows: sums of the same shapes, and nothing of its own."""
    bench = benches["classify"]
    base = bench.base()
    data = bench.data(base)
    summed = []

    def sum_(self, tensor):
        if tensor.ndim:
            summed.append((tuple(tensor.shape), float(tensor.abs().sum())))
            tensor += 1  # as if from the others
        return tensor

    monkeypatch.setattr(World, "sum_", sum_)
    loop = Loop(
        bench.kind.on(base.model, None), world=World(rank=2, size=3), stop=StopRequest(),
        kind=bench.kind,
    )  # fmt: skip
    run = SimpleNamespace(validation=(data, [0, 1]), job=SimpleNamespace(most_tokens=None))
    loop._validation._loss_of(run, None)
    assert summed == [((2, 2), 0.0), ((2, 3), 0.0)]
