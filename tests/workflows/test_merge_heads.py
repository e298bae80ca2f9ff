"""Which head adapters were trained with, and whether a base's files have it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lorakit.core.adapter import Adapter
from lorakit.core.identity import BaseIdentity
from lorakit.core.sites import LowRank
from lorakit.errors import InputError
from lorakit.workflows.merge.heads import trained_for, why_in_memory


def adapter(architecture="", **task) -> Adapter:
    found = Adapter({"x": LowRank(torch.ones(2, 3), torch.ones(4, 2), scaling=1.0)})
    if task:
        found = dataclasses.replace(found, provenance={"task": task})
    if architecture:
        identity = BaseIdentity(name="b", architecture=architecture)
        found = dataclasses.replace(found, base=identity)
    return found


CLASSIFY = {"name": "classify", "labels": ["no", "yes"]}


def test_what_adapters_were_trained_for():
    assert trained_for({"a": adapter()}) is None
    assert trained_for({"a": adapter(name="causal")}) is None
    assert trained_for({"a": adapter(name="of another program")}) is None
    kind = trained_for({"a": adapter(**CLASSIFY), "b": adapter(**CLASSIFY)})
    assert (kind.name, kind.labels) == ("classify", ("no", "yes"))


@pytest.mark.parametrize(
    "other", [{"name": "classify", "labels": ["no", "maybe"]}, {"name": "causal"}]
)
def test_adapters_of_different_tasks_are_not_one_model(other):
    with pytest.raises(InputError, match="a and b were trained for different tasks, labels"):
        trained_for({"a": adapter(**CLASSIFY), "b": adapter(**other)})


@pytest.mark.parametrize(
    ("config", "architecture", "why"),
    [
        ({"architectures": ["BertModel"]}, "BertForSequenceClassification", "those of a BertModel"),
        ({"id2label": {"0": "no", "1": "maybe"}}, "", "has other labels than no, yes"),
        ({"id2label": {"0": "no", "1": "yes"}}, "BertForSequenceClassification", None),
    ],
)
def test_why_files_are_not_merged_tensor_by_tensor(tmp_path, config, architecture, why):
    told = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], **config}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "model.safetensors").touch()
    named = {"a": adapter(architecture, **CLASSIFY)}
    found = why_in_memory(tmp_path, trained_for(named), named)
    assert (found is None) == (why is None)
    assert why is None or why in found
