"""Adapters of every kind as files: PEFT reads ours, we read PEFT's, and the outputs are equal."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import transformers

from lorakit import load_adapter, save_adapter
from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError
from lorakit.layers import attach
from lorakit.tasks.kinds import Labelled
from tests.tasks.conftest import stir

# PEFT asks for a property that this transformers calls otherwise
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "vision": "AutoModelForImageClassification",
    "speech": "AutoModelForSpeechSeq2Seq",
    "embed": "AutoModel",
    "vision-chat": "AutoModelForImageTextToText",
}
TARGETS = {
    "classify": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
    "vision": ["q_proj", "v_proj"],
    "speech": ["q_proj", "fc2"],
    "embed": ["query", "dense"],
    "vision-chat": ["q_proj", "down_proj", "proj"],
}


def plain_model(bench):
    """The base as anybody loads it; its head is as random as ours was, so it is given."""
    torch.manual_seed(0)
    options = {}
    if isinstance(bench.kind, Labelled):
        options["num_labels"] = len(bench.kind.labels)
    auto = getattr(transformers, CLASSES[bench.name])
    return auto.from_pretrained(bench.folder, **options).eval()


def inputs_of(bench, base):
    """A batch of three rows as the kind makes it, for any model of this class."""
    data = bench.data(base)
    task = bench.kind.on(base.model, None)
    if bench.name == "embed":
        texts = [data[i].inputs["ids"][0] for i in (0, 3, 5)]
        return dict(task._rows._batch(texts))
    rows = (3,) if bench.name == "vision-chat" else (0, 3, 5)
    batch = task._batch([data[i] for i in rows])
    return {name: tensor for name, tensor in batch.items() if not name.startswith("_")}


@torch.no_grad()
def outputs(model, inputs):
    return model(**inputs)[0 if "labels" not in inputs else "logits"]


def test_peft_reads_what_is_written(bench, tmp_path):
    base = bench.base()
    handle = bench.attached(base)
    inputs = inputs_of(bench, base)
    with handle.use("a"):
        mine = outputs(base.model, inputs)
    with handle.use(None):
        bare = outputs(base.model, inputs)
    adapter = handle.snapshot("a").with_(task_type=bench.kind.peft_type, base=base.identity)
    save_adapter(adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain_model(bench), tmp_path / "adapter").eval()
    found = outputs(theirs, inputs)
    # float32, the products in another order
    assert torch.allclose(found, mine, rtol=1e-4, atol=2e-5)
    assert (mine - bare).abs().max() > 1e-2


def test_what_a_base_lacks_before_its_head_is_trained_too(benches, tmp_path):
    """A BERT that filled gaps has no pooler, so the one in front of a new head is new too."""
    bench = benches["classify"]
    folder = shutil.copytree(bench.folder, tmp_path / "masked")
    config = transformers.BertConfig.from_pretrained(folder)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    base = bench.kind.load_base(ref=str(folder), device="cpu", dtype="float32")
    chosen, _ = bench.kind.adapter_spec(LoRASpec(rank=2, train_modules=("pooler",)), base)
    assert chosen.train_modules == ("pooler", "classifier")
    spec, notes = bench.kind.adapter_spec(LoRASpec(rank=2), base)
    assert "the head (classifier) is new" in notes[0]
    assert "bert.pooler.dense: new, for the base's files lack it" in notes[1]
    save_adapter(attach(base.model, spec, "a").snapshot("a"), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert set(adapter.replaced) == {"classifier", "bert.pooler.dense"}
    bench.kind.check_start(adapter, base)
    kept = {path: site for path, site in adapter.sites.items() if "pooler" not in path}
    with pytest.raises(InputError, match=r"has bert\.pooler\.dense\.bias, bert\.pooler\.dense\.w"):
        bench.kind.check_start(adapter.with_(sites=kept), base)


def test_what_peft_writes_is_read(bench, tmp_path):
    head = ["classifier"] if bench.name in ("classify", "vision") else None
    targets = TARGETS[bench.name]
    if bench.name == "vision":  # whatever this version calls them
        names = {path.rpartition(".")[2] for path, _ in plain_model(bench).named_modules()}
        targets = [t for t in (*targets, "query", "value") if t in names]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, modules_to_save=head and list(head),
        task_type=bench.kind.peft_type, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(plain_model(bench), config).eval()
    base = bench.base()
    inputs = inputs_of(bench, base)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = outputs(theirs, inputs)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert set(adapter.replaced) == set(head or ())
    handle = attach(base.model, adapter, "a", allow_other_base=True)
    with handle.use("a"):
        found = outputs(base.model, inputs)
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-5)


# one with a head, one with two stacks, one with two towers
@pytest.mark.parametrize("name", ["classify", "t5", "vision-chat"])
def test_on_off_and_swapped(benches, name):
    """Off is the bare model to the bit, and each adapter is itself again after another."""
    bench = benches[name]
    base = bench.base()
    inputs = inputs_of(bench, base)
    bare = outputs(base.model, inputs)
    handle = bench.attached(base)
    spec, _ = bench.kind.adapter_spec(LoRASpec(rank=2), base)
    handle.add(spec, "b", trainable=True, seed=5)
    stir(handle, "b", seed=8)
    found = {}
    for number, mix in enumerate(("a", None, "b", "a")):
        with handle.use(mix):
            found[number] = outputs(base.model, inputs)
    assert torch.equal(found[1], bare)
    assert torch.equal(found[0], found[3])
    assert (found[0] - found[2]).abs().max() > 1e-3
    assert (found[0] - bare).abs().max() > 1e-3
    handle.detach()
    assert torch.equal(outputs(base.model, inputs), bare)


@pytest.mark.parametrize("name", ["t5", "bart", "speech"])
def test_generation_with_an_adapter_is_that_of_the_merged_model(benches, name):
    from lorakit import merge

    bench = benches[name]
    base = bench.base()
    data = bench.data(base)
    asked = [bench.kind.asked(data, i) for i in (0, 3)]
    before = bench.kind.predict(base, None, None, asked, 8)
    handle = bench.attached(base)
    stir(handle, "a", seed=11)
    found = bench.kind.predict(base, handle, "a", asked, 8)
    assert bench.kind.predict(base, handle, None, asked, 8) == before
    adapter = handle.snapshot("a")
    handle.detach()
    merge(base.model, [(adapter, 1.0)])
    assert bench.kind.predict(base, None, None, asked, 8) == found
    assert found != before


@pytest.mark.parametrize("name", ["classify", "vision"])
def test_predictions_name_labels(benches, name):
    bench = benches[name]
    base = bench.base()
    handle = bench.attached(base)
    data = bench.data(base)
    asked = [bench.kind.asked(data, i) for i in range(3)]
    task = bench.kind.on(base.model, handle)
    logits = task.measured([data[i] for i in range(3)], "a").outputs
    for text, row in zip(bench.kind.predict(base, handle, "a", asked, 8), logits, strict=True):
        label, _, share = text.partition(" ")
        p = torch.softmax(row, -1)
        assert label == bench.kind.labels[int(p.argmax())]
        assert share == f"({float(p.max()):.1%})"
