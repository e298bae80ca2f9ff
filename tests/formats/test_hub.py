"""Adapters from and to a hub: the real client against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank
from lorakit.core.spec import LoRASpec
from lorakit.errors import FormatError
from lorakit.formats import load_adapter, push_adapter, save_adapter
from lorakit.formats.hub import is_hub_id

from .fake_hub import FakeHub

#: one process for all, because a client reads the hub's address when it is imported
SCRIPT = """
import contextlib, io, json, os, sys
from lorakit import load_adapter, push_adapter, LorakitError
from lorakit.bases.fetch import fetch
from lorakit.bases.source import Source
from lorakit.cli.main import main

def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()

def sites(ref):
    try:
        return sorted(load_adapter(ref).sites)
    except LorakitError as error:
        return str(error)

folder = sys.argv[1]
answers = {
    "main": command("push", folder, "me/mine", "--private", "--json"),
    "run": push_adapter(os.path.dirname(folder), "me/run"),
    "branch": command("push", folder, "me/mine", "--revision", "v2", "--message", "second"),
    "loaded": [sites(r) for r in ("me/mine", "me/mine@v2", "me/mine@v9", "me/none")],
}
said = []
found = fetch(Source("hub", "me/base", "me/base"), said.append)
answers["base"] = [sorted(os.listdir(found)), said]
os.environ["HF_TOKEN"] = "hf_bad"
answers["refused"] = command("push", folder, "me/other")
print(json.dumps(answers))
"""


def adapter() -> Adapter:
    torch.manual_seed(0)
    site = LowRank(torch.randn(2, 4), torch.randn(3, 2), 4.0)
    return Adapter(
        {"a.q": site}, LoRASpec(rank=2, alpha=8, targets="q"), tokenizer_files={"vocab.txt": b"x"}
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a client says that knows one hub, on this machine; and that hub."""
    home = tmp_path_factory.mktemp("home")
    folder = save_adapter(adapter(), home / "run" / "adapter")
    (folder / "optimizer.pt").write_bytes(b"not for the hub")
    model = dict.fromkeys(("config.json", "model.safetensors", "pytorch_model.bin"), b"{}")
    with FakeHub({"me/base": {"main": model}}) as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_good",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), hub


@pytest.mark.parametrize(
    ("ref", "is_id"),
    [
        ("owner/name", True),
        ("owner/name@v1.0", True),
        ("owner/name@refs/pr/3", True),
        ("name", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/b", False),
        ("runs/mine/adapter", False),
    ],
)
def test_what_is_a_hub_id(ref, is_id):
    assert is_hub_id(ref) is is_id


def test_upload(told):
    answers, hub = told
    code, out, err = answers["main"]
    assert code == 0, err
    assert json.loads(out)["url"] == f"{hub.url}/me/mine"
    assert hub.private == {"me/mine"}
    assert sorted(hub.repos["me/mine"]["main"]) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "vocab.txt",
    ]  # fmt: skip


def test_a_run_gives_its_adapter(told):
    _, hub = told
    assert hub.repos["me/run"]["main"] == hub.repos["me/mine"]["main"]


def test_upload_to_a_branch(told):
    answers, hub = told
    code, out, _ = answers["branch"]
    assert (code, out.strip()) == (0, f"{hub.url}/me/mine")
    assert hub.repos["me/mine"]["v2"] == hub.repos["me/mine"]["main"]


def test_download(told):
    main, branch, no_revision, nothing = told[0]["loaded"]
    assert main == branch == ["a.q"]
    assert "no such revision" in no_revision
    assert "There is no path me/none here" in nothing
    assert "no such repository" in nothing


def test_a_base_comes_without_other_copies_of_its_weights(told):
    files, said = told[0]["base"]
    assert files == ["config.json", "model.safetensors"]
    assert "fetching me/base" in said[0]


def test_refused_upload_names_the_next_step(told):
    code, _, err = told[0]["refused"]
    assert code == 2
    assert "hf auth login" in err
    assert "Traceback" not in err


def test_offline_is_a_clear_error():
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        FormatError, match=r"There is no path nobody/nothing here, and .*offline|reached"
    ):
        load_adapter("nobody/nothing")


def test_a_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(adapter(), "owner/name")
    assert list(load_adapter("owner/name").sites) == ["a.q"]


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "a/b@v1", "", "a b/c"])
def test_malformed_repository(tmp_path, repo_id):
    with pytest.raises(FormatError, match="owner/name"):
        push_adapter(adapter(), repo_id)


def test_a_broken_adapter_is_not_uploaded(tmp_path):
    folder = save_adapter(adapter(), tmp_path / "mine")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="q"):
        push_adapter(folder, "me/mine")


def test_a_revision_of_a_path_is_refused(tmp_path):
    folder = save_adapter(adapter(), tmp_path / "mine")
    with pytest.raises(FormatError, match="revisions exist on the hub"):
        load_adapter(folder, revision="v1")
    with pytest.raises(FormatError, match="names revision 'a'"):
        load_adapter("me/mine@a", revision="b")
