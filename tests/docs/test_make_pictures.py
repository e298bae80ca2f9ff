"""The script that draws the README's pictures: the terminal from a run, the browser if there."""

from __future__ import annotations

import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = Path(__file__).parents[2] / "docs" / "make_pictures.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"kind": "note", "text": "lr is 0.001: <as asked>"}]
    rows += [
        {
            "kind": "step",
            "step": n,
            "loss": 2.0 / n,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": 10,
            "supervised": 5,
            "seconds": 1.0,
            "tokens_per_second": 10.0,
            "rss_mb": 900.0,
        }
        for n in range(1, 11)
    ]
    rows += [
        {"kind": "eval", "step": n, "loss": loss, "perplexity": math.exp(loss), "best": True}
        for n, loss in ((0, 2.5), (10, 1.25))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        yaml.safe_dump({"base": {"ref": "/a/b/tiny"}, "train": {"steps": 10}})
    )
    return folder


def test_the_terminal_is_drawn_and_loads_nothing(
    script: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    assert script.main([str(run), "--out", str(tmp_path / "p"), "--command", "lorakit x"]) == 1
    assert "report.png was not made" in capsys.readouterr().err
    svg = (tmp_path / "p" / "terminal.svg").read_text(encoding="utf-8")
    assert "url(http" not in svg
    assert "@font-face" not in svg
    text = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    for part in ("lorakit x", "<as asked>", "10/10", "2.500 → 1.250, best at step 10"):
        assert part in text
    assert str(tmp_path) not in text
    assert (run / "report.html").is_file()
