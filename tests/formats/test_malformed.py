"""Folders that are no sound adapter: one FormatError with every problem, and nothing else."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.errors import FormatError
from lorakit.formats import load_adapter, save_adapter
from lorakit.formats import pickled as pickled_module

from .small import small_adapter

PREFIX = "base_model.model."
SITE = "model.layers.0.attn.q_proj"
A, B = f"{PREFIX}{SITE}.lora_A.weight", f"{PREFIX}{SITE}.lora_B.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound adapter as PEFT would have written it: no header of ours."""
    path = save_adapter(small_adapter(), tmp_path / "adapter")
    (path / "chat_template.jinja").unlink()
    change_tensors(path, lambda tensors: None)
    return path


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return lambda folder: change_tensors(folder, change)


def put(key: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def drop(key: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(key))


def only_keys(*keys: str) -> Callable[[Path], None]:
    ones = {key: torch.ones(2, 2) for key in keys}
    return lambda folder: change_tensors(folder, lambda t: (t.clear(), t.update(ones)))


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def only_pickle(content: object, **options) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "adapter_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "adapter_model.bin", **options)

    return change


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


NAN, INF = torch.full((4, 6), float("nan")), torch.full((5, 4), float("inf"))

#: name → (what is done to a sound folder, words of the message)
MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "half: A without B": (drop(B), f"{SITE}: lora_B.weight is missing"),
    "half: B without A": (drop(A), f"{SITE}: lora_A.weight is missing"),
    "NaN": (put(A, NAN), f"{SITE}: A has 24 of 24 values that are NaN or Inf"),
    "Inf": (put(B, INF), f"{SITE}: B has 20 of 20 values that are NaN or Inf"),
    "integers": (put(A, torch.ones(4, 6, dtype=torch.int32)), "dtype torch.int32"),
    "rank of A": (put(A, torch.ones(3, 6)), f"{SITE}: A has rank 3"),
    "rank of the config": (config(r=5), f"{SITE}: its tensors have rank 4"),
    "rank of a pattern": (config(rank_pattern={"q_proj": 7}), "adapter_config.json gives 7"),
    "one dimension": (put(A, torch.ones(4)), f"{SITE}: A has shape (4,)"),
    "no dimension": (put(A, torch.tensor(1.0)), f"{SITE}: A has shape ()"),
    "empty A": (put(A, torch.ones(0, 6)), "none may be empty"),
    "conv of one half": (put(A, torch.ones(4, 6, 3, 3)), "kernels of equal dimension"),
    "embedding's half": (
        put(f"{PREFIX}{SITE}.lora_embedding_A", torch.ones(4, 9)),
        "lora_embedding_B is missing",
    ),
    "unknown key": (put(f"{PREFIX}{SITE}.extra", torch.ones(1)), f"{SITE}.extra: unknown"),
    "a key at the root": (put("surplus", torch.ones(1)), "surplus: does not begin with"),
    "a whole layer": (put(f"{PREFIX}model.norm.weight", torch.ones(2)), "model.norm.weight"),
    "a bias that was not trained": (put(f"{PREFIX}{SITE}.bias", torch.ones(2)), "bias = none"),
    "a bias of B that the config denies": (
        put(f"{PREFIX}{SITE}.lora_B.bias", torch.ones(5)),
        "has lora_B.bias, but lora_bias is False",
    ),
    "no bias of B although the config says so": (config(lora_bias=True), "lacks lora_B.bias"),
    "bias of B of a wrong length": (
        lambda f: (put(f"{PREFIX}{SITE}.lora_B.bias", torch.ones(9))(f), config(lora_bias=True)(f)),
        "its bias has shape (9,)",
    ),
    "a magnitude that the config denies": (
        put(f"{PREFIX}{SITE}.lora_magnitude_vector", torch.ones(5)),
        f"{SITE}: has lora_magnitude_vector (DoRA), but use_dora is False",
    ),
    "a magnitude of a wrong length": (
        put(f"{PREFIX}{SITE}.lora_magnitude_vector", torch.ones(1, 5)),
        "lora_magnitude_vector has shape (1, 5); expected (5,)",
    ),
    "a magnitude alone": (
        put(f"{PREFIX}model.other.lora_magnitude_vector", torch.ones(5)),
        "model.other: lora_A.weight is missing",
    ),
    "a magnitude and a bias of B": (
        lambda f: (
            put(f"{PREFIX}{SITE}.lora_magnitude_vector", torch.ones(5))(f),
            put(f"{PREFIX}{SITE}.lora_B.bias", torch.ones(5))(f),
        ),
        "has a bias of B and a magnitude",
    ),
    "trained tokens": (
        put(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(1, 2)),
        "single trained tokens",
    ),
    "the adapter's name": (rename(".lora_A.weight", ".lora_A.default.weight"), "name 'default'"),
    "attention as PEFT wraps it": (
        put(f"{PREFIX}{SITE}.base_layer.out_proj.lora_A.weight", torch.ones(2, 2)),
        "nn.MultiheadAttention",
    ),
    "no prefix": (rename(PREFIX, ""), "PEFT's names without the prefix"),
    "kohya": (
        only_keys("lora_unet_down_blocks_0_to_q.lora_down.weight", "lora_te_x.alpha"),
        "kohya's names",
    ),
    "LyCORIS": (only_keys("lycoris_blocks_0.hada_w1_a"), "LyCORIS's names"),
    "diffusers": (only_keys("transformer.h.0.to_q.lora.down.weight"), "diffusers' names"),
    "older diffusers": (only_keys("mid.processor.lora.up.weight"), "diffusers' older names"),
    "loralib": (only_keys("h.0.attn.lora_A", "h.0.attn.lora_B"), "loralib's names"),
    "mlx": (only_keys("model.layers.0.q_proj.lora_a"), "MLX"),
    "prompt tuning": (only_keys("prompt_embeddings"), "another PEFT method"),
    "a model's weights": (only_keys("model.embed.weight"), "a model's own weights"),
    "names of nobody": (only_keys("my_lora_thing"), "no dialect known here"),
    "no tensor": (only_keys(), "no tensor"),
    "saved statistics": (
        lambda f: (
            put(f"{PREFIX}bn.num_batches_tracked", torch.tensor(3))(f),
            config(modules_to_save=["bn"])(f),
        ),
        "bn: num_batches_tracked has dtype torch.int64",
    ),
    "two copies that differ": (
        lambda f: (
            put(f"{PREFIX}head.bias", torch.ones(3))(f),
            put(f"{PREFIX}head.modules_to_save.bias", torch.zeros(3))(f),
            config(modules_to_save=["head"])(f),
        ),
        "head: bias is in the file twice",
    ),
    "DoRA": (
        config(use_dora=True),
        "lacks lora_magnitude_vector (DoRA), but use_dora is True",
    ),
    "DoRA of a word": (config(use_dora="yes"), "use_dora is 'yes'; expected true or false"),
    "PiSSA": (config(init_lora_weights="pissa_niter_16"), "moved the base"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "a field of the future": (config(use_tomorrow=True), "use_tomorrow = True: this field is"),
    "rank of text": (config(r="8"), "r is '8'; expected a whole number"),
    "rank of zero": (config(r=0), "rank is 0"),
    "alpha of nothing": (config(lora_alpha=None), "lora_alpha is None"),
    "an alpha beyond numbers": (config(lora_alpha=10**400), "lora_alpha is"),
    "dropout of two": (config(lora_dropout=2), "dropout is 2"),
    "a pattern that is none": (config(rank_pattern={"(": 1}), "expressions with whole numbers"),
    "targets of numbers": (config(target_modules=[1]), "target_modules is [1]"),
    "an odd bias": (config(bias="some"), "bias is 'some'"),
    "an odd task": (config(task_type="POEM"), "task_type is 'POEM'"),
    "config is a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "holds a list; expected a JSON object",
    ),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
    "config is no text": (
        lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
        "is no JSON",
    ),
    "config of brackets": (
        lambda f: (f / "adapter_config.json").write_text("[" * 100_000),
        "is no JSON",
    ),
    "config is gone": (
        lambda f: (f / "adapter_config.json").unlink(),
        "has weights but no adapter_config.json",
    ),
    "weights are gone": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors",
    ),
    "weights are cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-10]
        ),
        "the file is cut off",
    ),
    "a pickle with code": (only_pickle({"a": Evil()}), "could run code"),
    "a pickle of bytes": (only_pickle(b"no pickle at all"), "is damaged"),
    "a pickle of a list": (only_pickle([torch.ones(1)]), "no mapping of names"),
    "an old pickle of code": (only_pickle(pickle.dumps(Evil())), "could run code"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(folder, name):
    load_adapter(folder)
    change, words = MUTATIONS[name]
    change(folder)
    with pytest.raises(FormatError) as caught:
        load_adapter(folder)
    assert type(caught.value) is FormatError
    assert words in str(caught.value)
    assert folder.name in str(caught.value)


def test_all_problems_are_in_one_error(folder):
    for name in ("half: A without B", "NaN", "DoRA", "rank of a pattern", "unknown key"):
        if name == "half: A without B":
            drop(B.replace("q_proj", "v_proj"))(folder)
        else:
            MUTATIONS[name][0](folder)
    with pytest.raises(FormatError) as caught:
        load_adapter(folder)
    message = str(caught.value)
    for words in ("v_proj: lora_B.weight is missing", "NaN", "use_dora", "gives 7", "extra"):
        assert words in message
    assert "Nothing of it was loaded" in message


HEADERS = {
    "no JSON": "{",
    "a list": "[]",
    "no layout": "{}",
    "newer": '{"layout": 99}',
    "a base that is none": '{"layout": 1, "base": {"name": "x"}}',
    "a base of text": '{"layout": 1, "base": "x"}',
    "provenance of text": '{"layout": 1, "provenance": "x"}',
    "paths of numbers": '{"layout": 1, "replaced": [1]}',
    "scaling of text": '{"layout": 1, "scaling": {"a": "x"}}',
    "an unknown setting": '{"layout": 1, "spec": {"colour": 1}}',
    "an impossible setting": '{"layout": 1, "spec": {"rank": 0}}',
    "a pattern of text": '{"layout": 1, "spec": {"rank_pattern": "x"}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_header(folder, name):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "lorakit": HEADERS[name]})
    with pytest.raises(FormatError, match="header"):
        load_adapter(folder)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "task_type",
             "alpha_pattern", "bias", "use_rslora", "exclude_modules", "layers_to_transform",
             "layers_pattern", "init_lora_weights", "lora_dropout", "lora_bias", "revision",
             "peft_type", "use_dora", "auto_mapping", "base_model_name_or_path", "strange"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
            | st.just("[") | st.just("q_proj"),
            lambda inner: st.lists(inner, max_size=2)
            | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=3,
        ),
        max_size=4,
    )
)  # fmt: skip
def test_any_config_loads_or_is_a_format_error(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        save_adapter(small_adapter(), folder)
    sound = (folder / "adapter_config.json").read_bytes()
    change_config(folder, **changes)
    try:
        load_adapter(folder)
    except FormatError:
        pass
    finally:
        (folder / "adapter_config.json").write_bytes(sound)


# --- what is not an adapter at all ----------------------------------------------------------------


def test_missing(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(FormatError, match=r"adaptor does not exist.*Did you mean .*adapter"):
        load_adapter(tmp_path / "adaptor")


def test_a_doubled_prefix(folder, caplog):
    """Of a PeftModel inside of another: PEFT warns and loads nothing."""
    expected = load_adapter(folder)
    rename("base_model.model.", "base_model.model.base_model.model.")(folder)
    assert load_adapter(folder).sites.keys() == expected.sites.keys()
    assert "one 'base_model.model.' is left out" in caplog.text


def test_floats_of_eight_bits(folder):
    def small(tensors):
        key = next(iter(tensors))
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    change_tensors(folder, small)
    with pytest.raises(FormatError, match=r"(?s)floats of 8 bits.*lora_A.*F8_E4M3.*16 bits first"):
        load_adapter(folder)


def test_a_folder_of_adapters_names_them(tmp_path):
    save_adapter(small_adapter(), tmp_path / "runs" / "one" / "adapter")
    with pytest.raises(FormatError, match=r"Give one of: .*one/adapter"):
        load_adapter(tmp_path / "runs")


def test_a_whole_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="is a whole model, not an adapter"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.gguf", "no GGUF file"),
        ("a.txt", "is no adapter"),
        ("a.safetensors", "has 1 bytes"),
    ],
)
def test_files_that_are_no_adapter(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError, match=words):
        load_adapter(tmp_path / name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FormatError, match="it holds nothing"):
        load_adapter(tmp_path)


# --- PEFT's older file ---------------------------------------------------------------------------


def test_a_pickle_of_tensors_is_read_and_said(folder, caplog):
    expected = load_adapter(folder)
    only_pickle(load_file(folder / "adapter_model.safetensors"))(folder)
    with caplog.at_level(logging.INFO, "lorakit"):
        loaded = load_adapter(folder)
    assert set(loaded.sites) == set(expected.sites)
    for path, site in expected.low_rank.items():
        assert torch.equal(loaded.low_rank[path].A, site.A)
    assert "save the adapter again to have safetensors" in caplog.text


def test_no_code_of_a_pickle_runs(folder, capsys):
    only_pickle({"a": Evil()})(folder)
    with pytest.raises(FormatError):
        load_adapter(folder)
    assert "code was run" not in capsys.readouterr().out
    torch.load(io.BytesIO((folder / "adapter_model.bin").read_bytes()), weights_only=False)
    assert "code was run" in capsys.readouterr().out  # it would have


def test_a_pickle_too_large(folder, monkeypatch):
    only_pickle(load_file(folder / "adapter_model.safetensors"))(folder)
    monkeypatch.setattr(pickled_module, "MAX_BYTES", 100)
    with pytest.raises(FormatError, match="are read up to 100"):
        load_adapter(folder)
