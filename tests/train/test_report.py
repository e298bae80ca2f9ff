"""The report: right numbers, nothing loaded, nothing unescaped, and no part is required.

Pages are read back with the standard library's parser; norms and ranks are checked against a
dense SVD in float64.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank, Replace
from lorakit.core.spec import LoRASpec
from lorakit.errors import InputError
from lorakit.formats import save_adapter
from lorakit.train.report import write_report

EVIL = "<script>alert('x')</script>\"&{title}"
VOID = {"meta", "line", "rect", "circle", "polyline", "br"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and whether all tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "

    def titles(self) -> list[str]:
        """Headings of the sections that are there."""
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def sites(layers: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{layer}.{kind}": LowRank(
            torch.randn(4, 8, generator=generator), torch.randn(6, 4, generator=generator), 2.0
        )
        for layer in range(layers)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    }


def make_run(folder: Path, *, adapter: Any = None, **changes: Any) -> Path:
    """A whole run folder, some of whose parts a test replaces or leaves out (``None``)."""
    parts: dict[str, Any] = {
        "steps": [
            {
                "kind": "step",
                "step": n,
                "loss": 1.2 + math.exp(-n / 8),
                "lr": 1e-3 * (1 - n / 80),
                "grad_norm": 0.5,
                "tokens": 1000,
                "supervised": 300,
                "seconds": 2.0,
                "tokens_per_second": 500.0,
                "rss_mb": 1024.0,
            }
            for n in range(1, 81)
        ],
        "evals": [
            {"kind": "eval", "step": n, "loss": loss, "perplexity": math.exp(loss), "seconds": 5.0}
            for n, loss in ((0, 2.5), (40, 1.3), (80, 1.4))
        ],
        "notes": [{"kind": "note", "text": "lr is 0.0013: what LoRA likes here"}],
        "settings": {
            "base": {"ref": "smollm2", "device": "cpu"},
            "train": {
                "steps": 80,
                "lr": 0.0013,
                "betas": [0.9, 0.99],
                "truncate": False,
                "validation_fraction": 0.05,
            },
            "lora": {"rank": 4, "rank_pattern": {}},
            "data_report": {
                "files": ["mine.csv"],
                "rows": 1549,
                "used": 1547,
                "dropped": {"longer than 2048 tokens": 2},
                "dropped_rows": ["mine.csv, row 14: 3000 tokens"],
                "tokens": 61892,
                "supervised_tokens": 15473,
                "histogram": [[10, 20, 900], [20, 30, 647]],
            },
            "hardware": {"processor": "Some CPU", "cores": 2},
            "versions": {"torch": "2.13.0"},
        },
        "samples": [
            {
                "prompt": "<|im_start|>user\nname[Blue Spice]",
                "reference": ["Blue Spice is a pub.", "A pub: Blue Spice."],
                "base": "Blue Spice is a spice.",
                "adapter": "A pub: Blue Spice.",
            }
        ],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for name in ("notes", "steps", "evals") for row in parts[name] or ()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if parts["settings"] is not None:
        (folder / "run.yaml").write_text(yaml.safe_dump(parts["settings"], sort_keys=False))
    if parts["samples"] is not None:
        lines = "".join(json.dumps(sample) + "\n" for sample in parts["samples"])
        (folder / "samples.jsonl").write_text(lines)
    if adapter is not False:
        made = adapter or Adapter(
            sites(), LoRASpec(rank=4, alpha=8), base=BaseIdentity("smollm2", "LlamaForCausalLM")
        )
        save_adapter(made, folder / "adapter")
    return folder


def page_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


ALL = [
    "Loss",
    "Answers",
    "What changed in the model",
    "Data",
    "Course of the run",
    "Using the adapter",
    "Settings",
    "Machine",
    "Notes",
]


def test_the_page_says_what_the_folder_holds(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "my run"))
    assert page.titles() == ALL
    text = " ".join(page.text.split())
    for part in (
        "An adapter for smollm2, trained for 80 steps in 2 min 55 s on 1,547 rows, 5% of them held",
        "the loss fell from 2.500 to 1.300 (best at step 40)",
        f"{math.exp(1.2):.3g} times as likely as under the base",
        "2.500 → 1.300",  # the tiles
        f"{math.exp(2.5):.2f} → {math.exp(1.3):.2f}",
        "336 parameters, rank 4",
        "80 k",
        "1.0 GB",
        "best 1.300",
        "the base 2.500",
        "25.0% of 61,892 tokens",
        "2: longer than 2048 tokens",
        "mine.csv, row 14: 3000 tokens",
        "betas 0.9, 0.99",
        "truncate no",
        "rank_pattern none",
        "Some CPU",
        "lr is 0.0013: what LoRA likes here",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ):
        assert part in text, part
    assert f"--adapter '{tmp_path}/my run/adapter'" in text  # quoted for the shell
    assert "What this page could not show" not in text


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "r"))
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page.source
    assert set(re.findall(r"url\(([^)]*)\)", page.source)) == {
        "#clip-loss-over-steps",
        "#clip-learning-rate",
        "#clip-tokens-per-second",
        "#clip-norm-of-the-gradient--before-clipping",
        "#clip-memory-of-the-process--gb",
    }
    assert "prefers-color-scheme: dark" in page.source


def evil_run(folder: Path) -> Path:
    adapter = Adapter(
        {EVIL.replace(".", ""): LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)},
        LoRASpec(rank=1),
        base=BaseIdentity(EVIL, EVIL),
    )
    return make_run(
        folder,
        adapter=adapter,
        notes=[{"kind": "note", "text": EVIL}],
        settings={
            "base": {"ref": EVIL, "device": EVIL},
            EVIL: {EVIL: EVIL},
            "alone": EVIL,
            "data_report": {
                EVIL: EVIL,
                "files": [EVIL],
                "dropped": {EVIL: EVIL},
                "dropped_rows": [EVIL],
                "notes": [EVIL],
                "histogram": [[EVIL, 1, 2]],
            },
            "validation_report": {"files": [EVIL], "rows": EVIL},
            "hardware": {EVIL: EVIL},
            "versions": {EVIL: EVIL},
        },
        samples=[
            {"prompt": EVIL, "reference": EVIL, "base": EVIL, "adapter": f"other {EVIL} {EVIL}"},
            {"prompt": EVIL, "reference": [EVIL, EVIL], "base": EVIL + "!", "adapter": EVIL},
            {"prompt": EVIL, "base": EVIL, "adapter": EVIL},
            {"prompt": None, "reference": {"a": EVIL}, "base": 3, "adapter": [EVIL]},
            {},
        ],
    )


def test_every_text_from_outside_is_escaped(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path / f"a<b>{'&'}"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "b>")]
    assert "<script" not in page.source
    plain = " ".join(page.text.split())
    assert plain.count("<script>alert('x')</script>") >= 15
    assert "a<b>&" in plain


@pytest.mark.parametrize(
    ("left_out", "gone"),
    [
        ({"evals": None}, []),
        ({"samples": None}, ["Answers"]),
        ({"samples": []}, ["Answers"]),
        ({"steps": None}, ["Course of the run"]),
        ({"steps": None, "evals": None, "notes": None}, ["Loss", "Course of the run"]),
        ({"settings": None}, ["Data", "Settings", "Machine"]),
        ({"settings": {}}, ["Data", "Settings", "Machine"]),
        ({"settings": {"data_report": 3, "hardware": None, "base": None}}, ["Data", "Machine"]),
        ({"adapter": False}, ["What changed in the model", "Using the adapter"]),
    ],
)
def test_no_part_is_required(tmp_path: Path, left_out: dict[str, Any], gone: list[str]) -> None:
    page = page_of(make_run(tmp_path / "r", **left_out))
    assert page.titles() == [title for title in ALL if title not in gone]
    if set(left_out) & {"evals", "samples", "adapter"} or left_out == {"settings": None}:
        assert "What this page could not show" in page.text
    assert "NaN" not in page.source
    assert ">None<" not in page.source


def test_steps_without_a_finite_loss_are_said(tmp_path: Path) -> None:
    steps = [{"kind": "step", "step": n, "loss": None if n > 3 else 2.0} for n in range(1, 6)]
    page = page_of(make_run(tmp_path / "r", steps=steps, evals=None))
    assert "2 step(s) had no finite loss" in page.text
    assert "the training loss went from" in page.text


def test_a_run_that_did_not_help_says_so(tmp_path: Path) -> None:
    evals = [{"kind": "eval", "step": n, "loss": 1.0 + n} for n in (0, 5)]
    page = page_of(make_run(tmp_path / "r", evals=evals))
    assert "this run did not help" in page.text


def test_what_a_run_went_on_with_is_not_called_the_base(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    (folder / "start").mkdir()
    page = page_of(folder)
    assert "the starting adapter 2.500" in page.text
    assert "under the starting adapter" in " ".join(page.text.split())


def test_a_wild_step_is_cut_and_counted(tmp_path: Path) -> None:
    steps = [{"kind": "step", "step": n, "loss": 2.0 + 0.01 * (n % 5)} for n in range(1, 201)]
    steps[100]["loss"] = 900.0
    page = page_of(make_run(tmp_path / "r", steps=steps, evals=None))
    assert "1 step lies outside the frame" in page.text


def test_answers_show_what_differs_from_the_nearest_reference(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "r"))
    assert re.findall(r"<mark>(.*?)</mark>", page.source) == ["spice"]
    assert "equal to the reference" in page.source
    assert '<span class="same">A pub: Blue Spice.</span>' in page.source
    # six of seven words of the nearest reference, twice, over twelve
    assert "83% alike" in page.source
    assert "<span>&lt;|im_start|&gt;</span>user" in page.source


def test_long_texts_and_many_samples_are_cut_and_counted(tmp_path: Path) -> None:
    long = "word " * 2000
    samples = [{"prompt": long, "reference": [long] * 9, "base": long[::-1], "adapter": ""}] * 15
    page = page_of(make_run(tmp_path / "r", samples=samples))
    assert "(6,000 more characters)" in page.text
    assert "3 more are in samples.jsonl" in page.text
    assert "… and 5 more" in page.text
    assert "(no text)" in page.text


def cells(page: Page) -> dict[str, str]:
    """Text of every cell of the heat maps: place → number."""
    found = re.findall(r"<title>layer (\S+), ([^:]*): (‖ΔW‖|effective rank) ([^<]*)<", page.source)
    return {f"{what} {kind} {layer}": number for layer, kind, what, number in found}


def test_norms_and_effective_ranks_are_those_of_the_dense_change(tmp_path: Path) -> None:
    found = cells(page_of(make_run(tmp_path / "r")))
    assert len(found) == 12
    for path, site in sites().items():
        layer, kind = path.removeprefix("model.layers.").split(".", 1)
        dense = site.scaling * site.B.double() @ site.A.double()
        values = torch.linalg.svdvals(dense)
        share = values[:4] / values[:4].sum()
        rank = math.exp(-float((share * share.log()).sum()))
        # three digits are shown
        assert float(found[f"‖ΔW‖ {kind} {layer}"]) == pytest.approx(dense.norm().item(), rel=5e-3)
        assert float(found[f"effective rank {kind} {layer}"]) == pytest.approx(rank, rel=5e-3)


def low_rank() -> LowRank:
    return LowRank(torch.ones(2, 3), torch.ones(3, 2), 1.0)


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["encoder.block.0.q", "decoder.block.0.q"], ["encoder.block · q", "decoder.block · q"]),
        (["layers.10.q", "layers.9.q"], ["q", "q"]),
        (["head", "layers.1.q"], ["head", "q"]),
        (["features.0", "features.3"], ["features", "features"]),
        (["lone"], ["lone"]),
    ],
)
def test_places_of_other_architectures(tmp_path: Path, paths: list[str], rows: list[str]) -> None:
    adapter = Adapter({path: low_rank() for path in paths}, LoRASpec(rank=2))
    found = cells(page_of(make_run(tmp_path / "r", adapter=adapter)))
    assert len(found) == 2 * len(paths)
    assert {name.split(" ", 1)[1].rsplit(" ", 1)[0] for name in found if "‖" in name} == set(rows)


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    adapter = Adapter({f"layers.{n}.q": low_rank() for n in (10, 9, 100)}, LoRASpec(rank=2))
    page = page_of(make_run(tmp_path / "r", adapter=adapter))
    order = re.findall(r"layer (\d+), q: ‖", page.source)
    assert order == ["9", "10", "100"]


def test_many_kinds_of_places_are_put_together(tmp_path: Path) -> None:
    paths = [f"layers.{n}.experts.{e}.up" for n in range(2) for e in range(60)]
    adapter = Adapter({path: low_rank() for path in paths}, LoRASpec(rank=2))
    page = page_of(make_run(tmp_path / "r", adapter=adapter))
    assert len(cells(page)) == 4
    assert "mean of up to 60 weights" in page.text
    strange = {f"place{chr(97 + n // 26)}{chr(97 + n % 26)}": low_rank() for n in range(50)}
    page = page_of(make_run(tmp_path / "s", adapter=Adapter(strange, LoRASpec(rank=2))))
    assert "10 more kinds of modules are not drawn" in page.text


def test_an_adapter_of_modules_trained_whole(tmp_path: Path) -> None:
    adapter = Adapter({"score": Replace({"weight": torch.ones(2, 3)})}, LoRASpec(rank=2))
    page = page_of(make_run(tmp_path / "r", adapter=adapter))
    assert "score (6)" in page.text
    assert cells(page) == {}


def test_the_page_can_be_written_again_and_is_the_same(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        write_report(tmp_path)
