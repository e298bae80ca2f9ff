"""PEFT's ``LoraConfig`` and our ``LoRASpec``: every field of theirs maps, is harmless, or is named.

PEFT has one class with forty fields for many methods. What changes the forward or the base in a
way that plain LoRA cannot express is refused, with all such fields in one error; a field that this
version has never heard of is refused too unless it is switched off.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.core.expressions import MAX_RANK, wrong_expression
from lorakit.core.spec import LoRASpec
from lorakit.errors import SpecError, collected

logger = logging.getLogger(__name__)

#: PEFT's task types
TASK_TYPES = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)

#: heads that PEFT adds to ``modules_to_save`` by itself
AUTOMATIC_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

#: fields that become settings of a spec
MAPPED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_dora",
    "use_rslora",
}

#: fields about the file's origin, which are kept with an adapter and written again
FILE_FACTS = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "revision")

#: fields that say something about the file or the session, not about the adapter's settings; a
#: file's tensors show ``lora_bias``
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}

_RETRAIN = "load it with PEFT and merge it, or train it as plain LoRA"

#: fields that make it another method; the value is what the method does and the next step
FOREIGN = {
    "alora_invocation_tokens": f"aLoRA acts only after certain tokens; {_RETRAIN}",
    "arrow_config": f"Arrow routes among adapters by their content; {_RETRAIN}",
    "ensure_weight_tying": "tied adapters share their values; save it from PEFT without tying",
    "kasa_config": f"KaSA changes the base and puts a diagonal between A and B; {_RETRAIN}",
    "layer_replication": "it belongs to a base whose layers were repeated; build that base first",
    "megatron_config": "its layers are Megatron's parallel ones; export it to plain modules first",
    "monteclora_config": f"MonteCLoRA samples its weights; {_RETRAIN}",
    "trainable_token_indices": f"it trains single rows of the embedding; {_RETRAIN}",
    "use_bdlora": f"BD-LoRA stores block-diagonal factors; {_RETRAIN}",
    "use_qalora": f"QA-LoRA pools the input; {_RETRAIN}",
    "velora_config": f"VeLoRA compresses activations in training; {_RETRAIN}",
}

_PLAIN_INITS: dict[bool | str, str] = {
    True: "kaiming",
    False: "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}

#: initialisations that left the base as it was: once trained, the file is plain LoRA
_SPENT_INITS = ("eva", "mica")

#: initialisations that took their first B·A out of the base's weight
_MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_BIAS = {"none": "none", "lora_only": "lora", "all": "all"}


def spec_from_config(raw: Mapping[str, Any]) -> LoRASpec:
    """The settings of a ``LoraConfig``'s dictionary, for a new adapter.

    Raises:
        SpecError: fields without counterpart here, or with impossible values. All are listed.
    """
    unnamed = raw.get("target_modules") is None and not raw.get("modules_to_save")
    spec, problems = read_config({**raw, "target_modules": "all-linear"} if unnamed else raw)
    if unnamed:
        problems.append(
            "target_modules is not given, and PEFT then chooses by the model's type; name the "
            'modules, or give "all-linear"'
        )
    if raw.get("target_parameters") and raw.get("layers_to_transform") is not None:
        problems.append(
            "layers_to_transform does not act on target_parameters in PEFT; name the parameters "
            "by their whole paths instead"
        )
    if raw.get("lora_bias"):
        problems.append(
            "lora_bias = True: it trains a bias behind each B, which is read from files and cannot "
            'be begun here; leave it out, or give bias="all" or our bias="new" instead'
        )
    if problems or spec is None:
        raise SpecError(collected("This PEFT config cannot be taken over", problems))
    heads = AUTOMATIC_HEADS.get(str(_plain(raw.get("task_type"))), ())
    if heads and not set(heads) & set(spec.train_modules):
        logger.warning(
            "for this task PEFT also trains the head (%s) without being told; here, name it in "
            "train_modules",
            " or ".join(heads),
        )
    return spec


def read_config(
    raw: Mapping[str, Any], *, trained: bool = False
) -> tuple[LoRASpec | None, list[str]]:
    """The spec, and everything that is wrong.

    Args:
        raw: the dictionary, as in ``adapter_config.json`` or from ``LoraConfig.to_dict()``.
        trained: it stands beside trained weights, so how they were initialised is history.

    Returns:
        ``None`` in place of a spec where its own fields are the problem.
    """
    raw = {str(name): _plain(value) for name, value in raw.items()}
    problems = [*_foreign(raw), *_init_problems(raw.get("init_lora_weights", True), trained)]
    wrong = malformed(raw)
    if wrong:
        return None, [*wrong, *problems]
    targets = raw.get("target_modules")
    targets = () if targets is None else targets
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers and raw.get("layers_pattern") and not isinstance(targets, str):
        targets, layers = _layered(targets, layers, raw["layers_pattern"]), None
    parameters = {name.removesuffix(".weight") for name in _names(raw.get("target_parameters"))}
    if parameters:
        targets = (*_names(targets), *parameters)
    try:
        spec = LoRASpec(
            rank=raw.get("r", 8),
            alpha=float(raw.get("lora_alpha", 8)),
            targets=targets if isinstance(targets, str) else tuple(sorted(set(targets))),
            exclude=_excluded(raw.get("exclude_modules")),
            layers=",".join(map(str, sorted(set(layers)))) if layers else None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            scaling="alpha/sqrt(r)" if raw.get("use_rslora") else "alpha/r",
            dropout=float(raw.get("lora_dropout", 0.0)),
            bias=_BIAS[raw.get("bias", "none")],  # type: ignore[arg-type]
            train_modules=_names(raw.get("modules_to_save")),
            init=_plain_init(raw.get("init_lora_weights", True)),
            variant="dora" if raw.get("use_dora") else "lora",
        )
    except SpecError as error:
        lines = [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
        return None, [*lines, *problems]
    return spec, problems


def config_from_spec(
    spec: LoRASpec,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    target_parameters: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    lora_bias: bool = False,
    **file_facts: Any,
) -> dict[str, Any]:
    """``adapter_config.json`` as data: the fields that every reader knows.

    Fields of newer PEFT versions are left out while they are off, because older versions warn
    about what they do not know. How A was drawn is left out too: PEFT would run that
    initialisation again before it loads the values, and its orthogonal one refuses odd ranks.
    With parameters the dropout is left out as well: PEFT refuses to load it beside them.

    Args:
        spec: settings, with rank, alpha and patterns as the file needs them.
        target_modules: names or a regular expression, in PEFT's sense.
        target_parameters: names of parameters of fused experts, and of routers' weights.
        file_facts: ``FILE_FACTS`` and ``task_type``.
    """
    config: dict[str, Any] = {
        "alpha_pattern": {k: as_number(v) for k, v in spec.alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": {ours: theirs for theirs, ours in _BIAS.items()}[spec.bias],
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": list(layers_to_transform) if layers_to_transform else None,
        "lora_alpha": as_number(spec.alpha),
        "lora_dropout": 0 if target_parameters else as_number(spec.dropout),
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.rank_pattern),
        "revision": None,
        "target_modules": (
            target_modules if isinstance(target_modules, str) else sorted(target_modules)
        ),
        "task_type": None,
        "use_dora": spec.variant == "dora",
        "use_rslora": spec.scaling == "alpha/sqrt(r)",
    }
    if exclude_modules:
        config["exclude_modules"] = sorted(exclude_modules)
    if lora_bias:
        config["lora_bias"] = True
    if target_parameters:
        config["target_parameters"] = sorted(target_parameters)
    unknown = set(file_facts) - set(config)
    assert not unknown, unknown
    return dict(sorted({**config, **file_facts}.items()))


def as_number(value: float) -> int | float:
    """32.0 as 32: some readers expect a whole number where PEFT writes one."""
    return int(value) if float(value).is_integer() else float(value)


def _foreign(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    if raw.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {raw['peft_type']!r}; only LORA is read")
        if raw["peft_type"] == "PREFIX_TUNING":
            problems[-1] += '. A new prefix is LoRASpec(targets="none", prefix=n)'
    for name, value in raw.items():
        if name in MAPPED or name in HARMLESS:
            continue
        off = value is None or value is False or value in ({}, [], "")
        if off and name not in FOREIGN:
            logger.info("adapter_config.json: %s is unknown and off (%r)", name, value)
        elif not off and name in FOREIGN:
            problems.append(f"{name} = {_short(value)}: {FOREIGN[name]}")
        elif not off:
            problems.append(
                f"{name} = {_short(value)}: this field is unknown here; a newer lorakit may "
                "know it, or remove it if it does not change the adapter's forward"
            )
    return problems


def _init_problems(value: Any, trained: bool) -> list[str]:
    if isinstance(value, (bool, str)) and value in _PLAIN_INITS:
        if value is False and not trained:
            logger.warning("init_lora_weights=False draws B at random in PEFT; here B starts at 0")
        return []
    if isinstance(value, str) and value.startswith(_MOVED_BASE):
        return [
            f"init_lora_weights = {value!r} moved the base's weights, so the file fits only that "
            "moved base; save it again from PEFT with path_initial_model_for_weight_conversion, "
            "which makes it a plain difference"
        ]
    if value in _SPENT_INITS:
        if trained:
            logger.info("the adapter was initialised with %s; its trained values are plain", value)
            return []
        return [f"init_lora_weights = {value!r} is not available here; use true or 'gaussian'"]
    return [
        f"init_lora_weights = {value!r} is unknown; expected true, false, 'gaussian' or "
        "'orthogonal'"
    ]


def _plain_init(value: Any) -> Any:
    return _PLAIN_INITS.get(value, "kaiming") if isinstance(value, (bool, str)) else "kaiming"


def malformed(raw: Mapping[str, Any]) -> list[str]:
    """Fields whose value has the wrong type or an impossible expression."""
    checks = {
        "r": (_is_rank, f"a whole number of at most {MAX_RANK}"),
        "lora_alpha": (is_number, "a finite number"),
        "lora_dropout": (is_number, "a number"),
        "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
        "use_dora": (lambda v: isinstance(v, bool), "true or false"),
        "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
        "fan_in_fan_out": (lambda v: isinstance(v, bool), "true or false"),
        "bias": (lambda v: isinstance(v, str) and v in _BIAS, "none, all or lora_only"),
        "target_modules": (_is_targets, "a name or a list of names, or a simpler expression"),
        "exclude_modules": (_is_targets, "a name or a list of names, or a simpler expression"),
        "modules_to_save": (_is_names, "a list of names"),
        "target_parameters": (_is_parameters, "a list of parameters' names with their module's"),
        "layers_pattern": (_is_targets, "a name or a list of names"),
        "layers_to_transform": (
            lambda v: _is_int(v) or (isinstance(v, list) and all(map(_is_int, v))),
            "a layer's number or a list of them",
        ),
        "rank_pattern": (_pattern_of(_is_rank), "expressions with whole numbers"),
        "alpha_pattern": (_pattern_of(is_number), "expressions with numbers"),
        "task_type": (lambda v: isinstance(v, str) and v in TASK_TYPES, ", ".join(TASK_TYPES)),
        "base_model_name_or_path": (lambda v: isinstance(v, str), "a name"),
        "revision": (lambda v: isinstance(v, str), "a name"),
        "auto_mapping": (lambda v: isinstance(v, dict), "an object"),
    }
    needed = {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias"}
    return [
        f"{name} is {_short(raw[name])}; expected {expected}"
        for name, (fits, expected) in checks.items()
        if name in raw and not (raw[name] is None and name not in needed) and not fits(raw[name])
    ]


def _layered(targets: Sequence[str], layers: Sequence[int], pattern: Any) -> str:
    """One expression for names that PEFT looks for below certain blocks of a named list."""
    blocks = "|".join(_names(pattern))
    numbers = "|".join(str(n) for n in sorted(set(layers)))
    ends = "|".join(re.escape(name) for name in sorted(set(targets)))
    return rf"(?:.*\.)?(?:{blocks})\.(?:{numbers})\.(?:.*\.)?(?:{ends})"


def _excluded(value: Any) -> tuple[str, ...]:
    """Names, or the one expression that PEFT matches with a whole path, which a name would not be.

    Here a plain name is the end of a path.
    """
    return (f"(?:{value})",) if isinstance(value, str) and value else _names(value)


def _plain(value: Any) -> Any:
    """Sets, tuples and enums, which a config object holds, as JSON would hold them."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "value", value)


def _names(value: Any) -> tuple[str, ...]:
    """Names as a tuple without repetitions; PEFT repeats them each time it loads a classifier."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and value <= MAX_RANK


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that fits a float."""
    try:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and (math.isfinite(value))
        )
    except OverflowError:  # an integer beyond any float
        return False


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _is_parameters(value: Any) -> bool:
    """PEFT takes no single string here; ``"weight"`` alone would be every module's."""
    return isinstance(value, list) and _is_names(value) and "weight" not in value


def _is_targets(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return _is_names(value) and all(wrong_expression(word) is None for word in words)


def _pattern_of(fits: Any) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(
            wrong_expression(key) is None and fits(number) for key, number in value.items()
        )

    return check


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
