"""Reads and writes RoPE in Hugging Face's `config.json`: kind, theta and windows, as in transformers 4 and 5.

Ambiguous values, which two readers could interpret differently, are errors that name the key.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from pi_jax.errors import InputError
from pi_jax.rope.scaling import Default, Dynamic, Linear, Llama3, LongRope, Scaling, Yarn

KINDS: dict[str, type] = {cls.kind: cls for cls in (Default, Linear, Dynamic, Yarn, Llama3, LongRope)}
"""`rope_type` -> class. Kind 'ntk' is plain RoPE with another theta, so it has no `rope_type`."""

_ORIGINAL = "original_max_position_embeddings"
_WINDOW = "max_position_embeddings"
_SEQUENCE = "max_sequence_length"
_LLAMA_WINDOWS = (2048, 4096)  # of LLaMA 1 and 2
_DEFAULT_THETA = 10000.0
_DEFAULT_WINDOW = 2048  # both are the defaults of transformers' LlamaConfig


def from_hf(config: dict[str, Any]) -> Scaling:
    """Returns the scaling that a Hugging Face `config.json` describes, in either of its two layouts.

    transformers 4 writes `rope_theta` and `rope_scaling` (with the kind under `rope_type` or `type`); transformers 5
    writes `rope_parameters`, which includes theta. A missing theta means 10000, as in transformers. A missing original
    window is an error, whereas transformers silently uses `max_position_embeddings`.

    Raises:
      InputError: if the kind is unknown, a value is missing or invalid, or two keys contradict each other.
    """
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if section:
            if not isinstance(section, dict):
                raise InputError(f"{key} is {section!r}: it must be an object or null")
            found[key] = _from_section(key, section, config)
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise InputError(
            f"rope_parameters is {found['rope_parameters']}, but rope_scaling is {found['rope_scaling']}: "
            "remove the one that is wrong"
        )
    for scaling in found.values():
        return scaling
    return Default(_first(config.get("rope_theta"), _DEFAULT_THETA))


def _first(*values: Any) -> Any:
    """Returns the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _agreed(key: str, name: str, section: dict[str, Any], config: dict[str, Any]) -> Any:
    """Returns a value from the section or the top level of the config. If both have it, they must agree."""
    inside, beside = section.get(name), config.get(name)
    if inside is not None and beside is not None and inside != beside:
        raise InputError(f"{name} is {beside!r}, but {key} has {inside!r}: remove the one that is wrong")
    return _first(inside, beside)


def _from_section(key: str, section: dict[str, Any], config: dict[str, Any]) -> Scaling:
    theta = _first(_agreed(key, "rope_theta", section, config), _DEFAULT_THETA)
    names = [section[name] for name in ("rope_type", "type") if name in section]
    if not names and set(section) == {"rope_theta"}:
        names = ["default"]
    if not names or names[0] != names[-1]:
        # Never guess the kind: a reader that ignores a factor without a kind silently loses the scaling.
        raise InputError(f"{key} is {section}: it must name one kind under 'rope_type' (or 'type')")
    kind = names[0]
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{key} has rope_type {kind!r}: it must be one of {', '.join(KINDS)}")
    if _first(section.get("partial_rotary_factor"), 1.0) != 1.0:
        raise InputError(f"{key} has partial_rotary_factor {section['partial_rotary_factor']!r}: only 1.0 is supported")
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind])}
    values = {name: section[name] for name in fields if section.get(name) is not None} | {"theta": theta}
    if kind == "dynamic":
        values[_ORIGINAL] = _first(config.get(_WINDOW), _DEFAULT_WINDOW)
    elif _ORIGINAL in fields:
        values[_ORIGINAL] = _agreed(key, _ORIGINAL, section, config)
        if kind == "longrope" and isinstance(values[_ORIGINAL], int) and "factor" not in values:
            values["factor"] = _first(config.get(_WINDOW), _DEFAULT_WINDOW) / values[_ORIGINAL]  # as in transformers
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING or name == "factor"
        if required and values.get(name) is None:
            raise InputError(f"{key} of rope_type {kind!r} has no {name!r}")
    return KINDS[kind](**values)


def to_hf(scaling: Scaling, layout: Literal["v4", "v5"] = "v4") -> dict[str, Any]:
    """Returns the keys of `config.json` for a scaling; `window_to_hf` returns those for the windows.

    Layout "v4" is understood by transformers 4 and 5, vLLM, SGLang and llama.cpp. Layout "v5" is what transformers 5
    itself writes; transformers 4 silently reads it as *unscaled*. The factor is always a float, because vLLM rejects an
    integer. Values that equal the default of their kind are omitted.
    """
    section: dict[str, Any] = {"rope_type": scaling.kind}
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        beside = field.name == "theta" or (scaling.kind == "dynamic" and field.name == _ORIGINAL)
        if not beside and (field.name == "factor" or value != field.default):
            section[field.name] = list(value) if isinstance(value, tuple) else value
    if layout == "v5":
        return {"rope_parameters": {**section, "rope_theta": scaling.theta}}
    if scaling.kind == "default":
        return {"rope_theta": scaling.theta, "rope_scaling": None}
    return {"rope_theta": scaling.theta, "rope_scaling": {**section, "type": scaling.kind}}


class Window(NamedTuple):
    """Windows that a `config.json` states."""

    tokens: int
    """The window."""
    original: int | None
    """The window before its extension; None: never extended."""
    assumed: bool = False
    """Whether the file can be understood in two ways."""


def window_from_hf(config: dict[str, Any], scaling: Scaling, tokenizer_window: Any = None) -> Window:
    """Returns the windows of a `config.json`.

    With 'linear', `max_position_embeddings` is the extended window in some published models and the original one in
    others, as transformers once recommended. `max_sequence_length`, `original_max_position_embeddings` or the
    tokenizer's `model_max_length` decide. Without them it is taken for the original window, unless that of LLaMA 1 or 2
    follows from the other reading.

    Args:
      config: content of `config.json`.
      scaling: result of `from_hf`.
      tokenizer_window: `model_max_length` of the tokenizer, if known.
    """
    window = _first(config.get(_WINDOW), _DEFAULT_WINDOW)
    if scaling.kind == "linear":
        return _linear_window(config, scaling, window, tokenizer_window)
    if scaling.kind == "default":
        original = config.get(_ORIGINAL)
    else:
        original = scaling.original_max_position_embeddings
        if scaling.kind in ("dynamic", "yarn") and window == original:
            window = int(original * scaling.factor)
    return Window(window, original if original and original < window else None)


def _linear_window(config: dict[str, Any], scaling: Linear, window: int, tokenizer_window: Any) -> Window:
    for name in (_WINDOW, _SEQUENCE, _ORIGINAL):
        if type(_first(config.get(name), 1)) is not int:
            raise InputError(f"{name} is {config[name]!r}: it must be an integer")
    before, after = int(window / scaling.factor), int(window * scaling.factor)
    if stated := config.get(_SEQUENCE):
        window, original = max(window, stated), min(window, stated)
        return Window(window, original if original < window else None)
    if stated := (config.get(_ORIGINAL) or (config.get("rope_scaling") or {}).get(_ORIGINAL)):
        extended = max(window, int(stated * scaling.factor))
        return Window(extended, stated if stated < extended else None)
    if scaling.factor <= 1.0 or tokenizer_window == window:
        return Window(window, before if before < window else None)
    if tokenizer_window == after:
        return Window(after, window)
    if scaling.theta == _DEFAULT_THETA and before in _LLAMA_WINDOWS and window not in _LLAMA_WINDOWS:
        return Window(window, before, assumed=True)
    return Window(after, window, assumed=True)


def window_to_hf(scaling: Scaling, window: int, original: int | None) -> dict[str, int]:
    """Returns the keys of `config.json` for the windows, so that all readers derive the same length.

    `max_position_embeddings` is the extended window, as transformers and llama.cpp expect. With 'linear',
    `max_sequence_length` is the original window, which vLLM and SGLang multiply by the factor. With 'dynamic', readers
    expect the original window in `max_position_embeddings`. The other kinds contain the original window themselves,
    except that transformers 4 expects it at the top level for 'longrope'. With 'default', the original window is
    written only for pi_jax itself, for models that were extended by a larger theta.
    """
    if scaling.kind == "dynamic":
        return {_WINDOW: scaling.original_max_position_embeddings}
    if scaling.kind == "longrope":
        return {_WINDOW: window, _ORIGINAL: scaling.original_max_position_embeddings}
    if scaling.kind == "linear":
        return {_WINDOW: window, _SEQUENCE: original or window}
    if original and scaling.kind == "default":
        return {_WINDOW: window, _ORIGINAL: original}
    return {_WINDOW: window}
