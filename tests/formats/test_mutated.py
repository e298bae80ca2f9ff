"""Spoiled files by the hundred, and each defect that they found, by itself."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch

from lorakit.core.adapter import Adapter
from lorakit.core.checkpoint import open_checkpoint
from lorakit.core.expressions import cost_of, wrong_expression
from lorakit.core.gguf_file import read_gguf
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.errors import FormatError, InputError, LorakitError, MissingDependencyError
from lorakit.formats import load_adapter, save_adapter
from lorakit.formats.convert import convert
from lorakit.formats.format import Hints
from lorakit.formats.pickled import read_pickled
from lorakit.formats.registry import read

from . import mutation, mutation_edits
from .language_models import LLAMA
from .mutation_files import samples
from .small import contents, small_adapter


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_adapter(small_adapter(), tmp_path / "adapter")


BASE = {"name": "", "architecture": "", "shapes": {}, "samples": {}, "storage": ""}


def change_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- by the hundred ------------------------------------------------------------------------------


def test_a_few_hundred_files():
    report = mutation.run(count=330, seed=3)
    assert report.failures == []
    assert sum((report.read + report.rejected).values()) == 330
    assert sum(report.rejected.values()) > 200


@pytest.mark.slow
def test_some_thousand_files():
    report = mutation.run(count=5_500, seed=4)
    assert report.failures == []
    assert report.grown <= mutation.MAX_GROWTH, report.grown


def test_a_number_names_its_file(tmp_path):
    given = samples(tmp_path)
    for number in (0, 5, 40, 41):
        first, second = (mutation.file_of(given, 7, number)[2] for _ in range(2))
        assert first == second
        assert first != mutation.file_of(given, 8, number)[2]


def test_every_sample_is_sound(tmp_path):
    place = tmp_path / "place"
    for sample in samples(tmp_path):
        mutation._lay(place, sample.files)
        adapter = sample.read(place / sample.named)
        assert (adapter is None) == (sample.format == "checkpoint")
        if adapter is not None:
            mutation.check_sound(adapter)


def _hoard(path):
    _KEPT.append(bytearray(b"x") * 150_000_000)


def _fail(path):
    raise KeyError("x")


def _unnamed(path):
    raise FormatError("it is wrong")


def _unsound(path):
    adapter = small_adapter()
    next(iter(adapter.low_rank.values())).A[0, 0] = torch.nan
    return adapter


def _die(path):
    os.abort()


def _hang(path):
    """Within the interpreter's C code, where no exception gets in."""
    return re.match("(a+)+$", "a" * 60 + "!")


_KEPT: list[bytearray] = []
_TURNS = {
    _hoard: None,
    _fail: "KeyError",
    _unnamed: "the file is not named",
    _unsound: "AssertionError",
    _die: "ended the process",
    _hang: "took more than",
}


def breaks_a_rule(path):
    """A reader that does another wrong thing each time; the turn outlives the process."""
    turn = path.parent.parent / "turn"  # beside the folders of the processes
    number = int(turn.read_text()) if turn.exists() else 0
    turn.write_text(str(number + 1))
    return list(_TURNS)[number](path)


def test_the_rules_are_kept():
    """Every kind of failure is seen and names its file; the files behind it are read."""
    report = mutation.run(
        count=6, seed=0, formats=("mlx",), start=9, seconds=1.0,
        reader="tests.formats.test_mutated:breaks_a_rule",
    )  # fmt: skip
    words = [word for word in _TURNS.values() if word]
    assert len(report.failures) == len(words)
    for number, (failure, word) in enumerate(zip(report.failures, words, strict=True), 10):
        assert failure.startswith(f"mlx, seed 0, number {number}: ")
        assert word in failure
    assert sum(report.read.values()) == 2  # the first, and the one that was not sound
    assert report.grown > mutation.MAX_GROWTH


# --- expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", mutation_edits.BOMBS)
def test_expressions_without_bounds(text, folder):
    assert wrong_expression(text) is not None
    for changes in (
        {"rank_pattern": {text: 4}},
        {"target_modules": text},
        {"layers_pattern": text},
    ):
        change_config(folder, **{"rank_pattern": {}, "target_modules": ["q_proj"], **changes})
        with pytest.raises(FormatError, match=next(iter(changes))):
            load_adapter(folder)


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        r".*\.(q_proj|v_proj)",
        r"^model\.layers\.(1[0-9]|2[0-5])\.self_attn\..*",
        r"(?:.*\.)?(?:layers|h)\.(?:0|1|2)\.(?:.*\.)?(?:q_proj|v_proj)",
        r"(?!.*vision).*layers\.\d+\.mlp\.\w+_proj",
        r"^base\.model\[0\]\.x$",
        "|".join(
            re.escape(f"model.layers.{i}.mlp.experts.{j}") for i in range(60) for j in range(60)
        ),
    ],
)
def test_usual_expressions(text):
    assert wrong_expression(text) is None


@pytest.mark.parametrize(
    ("text", "ways", "degree"),
    [
        ("abc", 1, 0),
        ("a|bc|def", 3, 0),
        ("(ab|cd)(ef|gh|ij)", 6, 0),
        ("a*b+?c{2,}", 1, 3),
        ("a?b??", 4, 0),
        ("a{4}", 1, 0),
        ("(?=a*)(?!bb|cc)(?<=d)", 2, 1),
        ("(?>a*)[b-z]*+.", 1, 2),
        ("(?!.*a)b*c*", 1, 2),
        ("b*c*(?!.*a)", 1, 3),
        (r"^\d\w$", 1, 0),
    ],
)
def test_costs(text, ways, degree):
    cost = cost_of(text)
    assert (cost.ways, cost.degree) == (ways, degree)


def test_a_bound_over_all_names(tmp_path):
    """Each expression may be tried alone; a thousand of them on long names may not."""
    path = "model." + "a" * 900
    site = next(iter(small_adapter().sites.values()))
    adapter = small_adapter(sites={f"{path}{n}": site for n in range(30)})
    folder = save_adapter(adapter, tmp_path / "a")
    change_config(folder, rank_pattern={f".*a.*a.*b{n}": 4 for n in range(30)})
    with pytest.raises(FormatError, match="takes too long"):
        load_adapter(folder)


# --- configs and headers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**400},
        {"r": 2**40},
        {"rank_pattern": {"q": 10**400}},
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q": 10**400}},
    ],
)
def test_numbers_beyond_any(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(FormatError, match=next(iter(changes))):
        load_adapter(folder)


def test_halves_of_characters(folder):
    """JSON can name them, and no file can be written with them."""
    change_config(folder, base_model_name_or_path="\ud800")
    with pytest.raises(FormatError, match="is no JSON"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "said",
    [
        {"provenance": {"a": "\ud800"}},
        {"scaling": {"a": 10**400}},
        {"task_type": {}},
        {"spec": {"layers": [1]}},
        {"spec": {"exclude": [1]}},
        {"spec": {"targets": [[]]}},
        {"spec": {"targets": "(a+)+$"}},
        {"spec": {"rank": 10**400}},
        {"spec": {"rank_pattern": [["(a+)+$", 4]]}},
        {"spec": {"rank_pattern": [["q", 10**400]]}},
        {"spec": {"alpha_pattern": [[3, 4]]}},
        {"base": {**BASE, "shapes": {"a": [1e999]}}},
        {"base": {**BASE, "revision": []}},
    ],
)
def test_own_headers_that_lie(folder, said):
    path = folder / "adapter_model.safetensors"
    tensors, _ = read_safetensors(path)
    write_safetensors(path, tensors, {"lorakit": json.dumps({"layout": 1, **said})})
    with pytest.raises(FormatError, match="header"):
        load_adapter(folder)


def test_layers_by_the_thousand_million(folder):
    """A range that no model has is not written out."""
    adapter = load_adapter(folder)
    adapter = adapter.with_(
        spec=type(adapter.spec)(rank=4, targets=("q_proj", "v_proj"), layers="0-999999999")
    )
    save_adapter(adapter, folder)
    assert 'layers_to_transform": null' in (folder / "adapter_config.json").read_text()


@pytest.mark.parametrize("value", [10**400, float("nan"), True, "x"])
def test_scales_of_other_formats(tmp_path, value):
    given = {sample.format: sample for sample in samples(tmp_path)}
    for name, field in (("mlx", "lora_parameters"), ("torchtune", "lora_alpha")):
        sample = given[name]
        place = tmp_path / name
        mutation._lay(place, dict(sample.files))
        config = json.loads(sample.files["adapter_config.json"])
        config[field] = {**config[field], "scale": value} if name == "mlx" else value
        (place / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match="scale is" if name == "mlx" else "alpha"):
            read(place / sample.named, hints=Hints(base=LLAMA))


# --- files of tensors ----------------------------------------------------------------------------


def entry(shape, size):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"' + '":1,"'.join(map(str, range(200_000))) + '":1,"199999":1}', "'199999' twice"),
        ({"a": entry([1] * 17, 4)}, "17 dimensions"),
        ({"a": entry([2**62] * 300_000, 4)}, "300000 dimensions"),
        ({"": entry([1], 4)}, "an empty name"),
        ({"a" * 1001: entry([1], 4)}, "1001 characters"),
        ({"\x1b[2J": entry([1], 4)}, "cannot be printed"),
        ({"\u202egpj": entry([1], 4)}, "cannot be printed"),
        ({"\ud800": entry([1], 4)}, "cannot be printed"),
        ({"a": entry([1], 4), "__metadata__": {"\ud800": "x"}}, "no text"),
    ],
)
def test_safetensors_headers(tmp_path, header, words):
    text = header if isinstance(header, str) else json.dumps(header)
    (tmp_path / "a.safetensors").write_bytes(mutation_edits._joined(text, bytes(4)))
    with pytest.raises(FormatError, match=words) as caught:
        read_safetensors(tmp_path / "a.safetensors")
    mutation.check_message(str(caught.value), tmp_path)


def test_a_gguf_of_one_block(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(mutation_edits.gguf_bytes([], [[b"a", [], 8, 0]], bytes(34)))
    with pytest.raises(FormatError, match=r"Q8_0 tensor has the shape \(\)"):
        read_gguf(path).tensors()


def test_arrays_of_a_gguf_that_grow(tmp_path):
    value = (0).to_bytes(4, "little") + (11_000_000).to_bytes(8, "little") + bytes(11_000_000)
    (tmp_path / "a.gguf").write_bytes(mutation_edits.gguf_bytes([[b"a", 9, value]], [], b""))
    with pytest.raises(FormatError, match="11000000 values"):
        read_gguf(tmp_path / "a.gguf")


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (mutation_edits._archive(mutation_edits.doubled_key()), "never end"),
        (mutation_edits.doubled_key(), "never end"),
        (mutation_edits.doubled_key() + mutation_edits._archive(b"."), "never end"),
        (
            mutation_edits._archive(mutation_edits.calling("builtins", "bytearray", (2**40,))),
            "asks",
        ),
        (mutation_edits._archive(mutation_edits.calling("collections", "Counter", ("x",))), "asks"),
        (mutation_edits._bomb_archive(), "unpacks to"),
        (mutation_edits._stretched(), "the file holds 4 of them"),
        (saved({"a": torch.zeros(2, device="meta")}), "asks for|plain numbers"),
        (saved({"a": torch.eye(2).to_sparse()}), "asks for|plain numbers"),
        (saved({"a": torch.zeros(2).to(torch.float8_e4m3fn)}), "asks for|float8"),
        (saved({"a\x1b": torch.zeros(2)}), "cannot be printed"),
        (saved({3: torch.zeros(2)}), "no mapping"),
    ],
)
def test_pickles(tmp_path, content, words):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FormatError, match=words) as caught:
        read_pickled(tmp_path / "a.pt")
    mutation.check_message(str(caught.value), tmp_path)


@pytest.mark.parametrize("new", [True, False])
def test_sound_pickles(tmp_path, new):
    """What is refused above leaves everything that people save: views, ties, parameters, dtypes."""
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "c": whole[:, 1:], "d": torch.nn.Parameter(whole.half())}
    state |= {"e": whole.bfloat16(), "f": torch.tensor(3), "g": torch.zeros(0)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    found = read_pickled(tmp_path / "a.pt")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_products_that_grow(tmp_path):
    """Factors of 40 kB whose product has 10⁹ values and more."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    sides = {"a": torch.ones(5, 50_000), "b": torch.ones(50_000, 5)}
    loha = {f"{name}.hada_w{i}_{x}": sides[x] for i in (1, 2) for x in "ab"}
    lokr = {f"{name}.lokr_{x}": torch.ones(40_000, 2) for x in ("w1_a", "w2_a")}
    lokr |= {f"{name}.lokr_{x}": torch.ones(2, 3) for x in ("w1_b", "w2_b")}
    for tensors in (loha, lokr):
        write_safetensors(tmp_path / "a.safetensors", tensors, {})
        with pytest.raises(FormatError, match="becomes a LoRA of rank"):
            read(tmp_path / "a.safetensors")
    torch.save(
        {"x.lora_A": torch.ones(100_000, 1), "x.lora_B": torch.ones(100_000, 1)}, tmp_path / "a.pt"
    )
    with pytest.raises(FormatError, match="beyond any memory"):
        read(tmp_path / "a.pt", hints=Hints(alpha=1))


def test_an_alpha_beside_an_empty_factor(tmp_path):
    tensors = {"unet.a.lora_A.weight": torch.ones(0, 3), "unet.a.lora_B.weight": torch.ones(3, 0)}
    write_safetensors(tmp_path / "a.safetensors", tensors | {"unet.a.alpha": torch.tensor(1.0)}, {})
    with pytest.raises(FormatError, match="none may be empty"):
        read(tmp_path / "a.safetensors")


# --- messages ------------------------------------------------------------------------------------


def test_messages_do_not_steer_a_terminal():
    error = InputError("a\x1b[2Jb\nsecond line\tend " + "x" * 10_000)
    assert "\x1b" not in str(error)
    assert r"a\x1b[2Jb" in str(error)
    assert "\nsecond line\tend" in str(error)
    assert len(str(error)) < 2_100
    assert isinstance(MissingDependencyError("x", name="y"), LorakitError)


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
)
def test_pipes_in_a_folder(folder, name):
    """Opening a pipe that nobody writes to never returns."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "tokenizer.json":
        assert "tokenizer.json" not in load_adapter(folder).tokenizer_files
    else:
        with pytest.raises(FormatError):
            load_adapter(folder)


def test_pipes_and_devices_as_files(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / "b.gguf").symlink_to("/dev/zero")
    for path in ("a.safetensors", "b.gguf"):
        with pytest.raises(FormatError, match="is no adapter"):
            load_adapter(tmp_path / path)
        with pytest.raises(FormatError, match="is no file"):
            open_checkpoint(tmp_path / path)
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(FormatError, match="holds no model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a" * 300, "\x1b[2J", 3, None],
)
def test_shards_outside_of_their_folder(tmp_path, name):
    inside = tmp_path / "model"
    inside.mkdir()
    for place in (tmp_path / "out.safetensors", inside / "a.safetensors"):
        write_safetensors(place, {"w": torch.ones(1)}, {})
    index = {"weight_map": {"w": name}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError):
        open_checkpoint(inside)
    index = {"weight_map": {"w": "a.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(inside).entries) == {"w"}


def test_a_tokenizer_that_is_a_link_out_of_the_folder(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="outside of the adapter's folder"):
        load_adapter(folder)


def test_templates_in_a_linked_folder(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "other")
    with pytest.raises(FormatError, match="outside of the adapter's folder"):
        load_adapter(folder)


def test_the_cache_of_the_hub_has_links(folder, tmp_path):
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "0123",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, (name, content) in enumerate(contents(folder).items()):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert load_adapter(snapshot).tokenizer_files == {"chat_template.jinja": b"{{ x }}"}


@pytest.mark.parametrize("name", ["../x.json", "/x", "a/../../tokenizer.json", "other.txt"])
def test_tokenizer_files_do_not_leave_the_folder(tmp_path, name):
    with pytest.raises(FormatError):
        save_adapter(small_adapter(tokenizer_files={name: b"x"}), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_modules_named_as_paths(tmp_path):
    """A module's name is a key in a file, never a file's name."""
    site = next(iter(small_adapter().sites.values()))
    folder = save_adapter(Adapter({"../../x.y": site, "/etc/z.y": site}), tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(contents(folder))
    assert set(load_adapter(folder).sites) == {"../../x.y", "/etc/z.y"}


def test_converting_onto_the_input(folder, tmp_path):
    """Refused; where overwriting was allowed, the new file is whole."""
    before = contents(folder)
    with pytest.raises(FormatError, match="not empty"):
        convert(folder, folder, to="peft")
    with pytest.raises(FormatError, match="not empty"):
        convert(folder, folder, to="mlx", overwrite=True, allow_loss=True)
    assert contents(folder) == before
    convert(folder, folder, to="peft", overwrite=True)
    assert contents(folder) == before

    file = tmp_path / "a.pt"
    convert(folder, file, to="loralib", allow_loss=True)
    content = file.read_bytes()
    with pytest.raises(FormatError, match="exists already"):
        convert(file, file, to="loralib", hints=Hints(alpha=8))
    convert(file, file, to="loralib", hints=Hints(alpha=8), overwrite=True, allow_loss=True)
    assert file.read_bytes() == content


def test_an_output_that_is_a_pipe(folder, tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(FormatError, match="exists already"):
        convert(folder, tmp_path / "a.pt", to="loralib", allow_loss=True)
