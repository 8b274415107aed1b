"""RoPE in Hugging Face's `config.json`: kind, theta and windows, in the layouts of transformers 4 and 5.

Reading never guesses: what two readers would understand differently is refused, with the name of the key.
"""

import dataclasses
from typing import Any, Literal

from pi_jax.errors import InputError
from pi_jax.rope.scaling import Default, Dynamic, Linear, Llama3, LongRope, Scaling, Yarn

KINDS: dict[str, type] = {cls.kind: cls for cls in (Default, Linear, Dynamic, Yarn, Llama3, LongRope)}
"""`rope_type` -> class. Kind 'ntk' is plain RoPE with another theta and has no name of its own in a file."""

_ORIGINAL = "original_max_position_embeddings"
_WINDOW = "max_position_embeddings"
_DEFAULT_THETA = 10000.0
_DEFAULT_WINDOW = 2048  # of transformers' LlamaConfig, as theta


def from_hf(config: dict[str, Any]) -> Scaling:
    """The scaling that a Hugging Face `config.json` describes, in either of its two layouts.

    transformers 4 writes `rope_theta` and `rope_scaling` (kind under `rope_type` or `type`); transformers 5 writes
    `rope_parameters`, with theta inside. A missing theta is 10000, as in transformers. A missing original window is an
    error, where transformers silently takes `max_position_embeddings`.

    Raises:
      InputError: for an unknown kind, a missing or bad value, or two places that disagree.
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
            f"rope_parameters says {found['rope_parameters']} but rope_scaling says {found['rope_scaling']}: "
            "remove the one that is wrong"
        )
    for scaling in found.values():
        return scaling
    return Default(_first(config.get("rope_theta"), _DEFAULT_THETA))


def _first(*values: Any) -> Any:
    """The first value that is not null."""
    return next((value for value in values if value is not None), None)


def _agreed(key: str, name: str, section: dict[str, Any], config: dict[str, Any]) -> Any:
    """A value that stands in the section, beside it, or in both with the same content."""
    inside, beside = section.get(name), config.get(name)
    if inside is not None and beside is not None and inside != beside:
        raise InputError(f"{name} is {beside!r} but {key} has {inside!r}: remove the one that is wrong")
    return _first(inside, beside)


def _from_section(key: str, section: dict[str, Any], config: dict[str, Any]) -> Scaling:
    theta = _first(_agreed(key, "rope_theta", section, config), _DEFAULT_THETA)
    names = [section[name] for name in ("rope_type", "type") if name in section]
    if not names and set(section) == {"rope_theta"}:
        names = ["default"]
    if not names or names[0] != names[-1]:
        # A factor without a kind is how other exporters lost their scaling silently: never guess.
        raise InputError(f"{key} is {section}: it must name one kind under 'rope_type' (or 'type')")
    kind = names[0]
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{key} has rope_type {kind!r}: known kinds are {', '.join(KINDS)}")
    if _first(section.get("partial_rotary_factor"), 1.0) != 1.0:
        raise InputError(f"{key} has partial_rotary_factor {section['partial_rotary_factor']!r}: only 1.0 is supported")
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind])}
    values = {name: section[name] for name in fields if section.get(name) is not None} | {"theta": theta}
    if kind == "dynamic":
        values[_ORIGINAL] = config.get(_WINDOW, _DEFAULT_WINDOW)
    elif _ORIGINAL in fields:
        values[_ORIGINAL] = _agreed(key, _ORIGINAL, section, config)
        if kind == "longrope" and isinstance(values[_ORIGINAL], int) and "factor" not in values:
            values["factor"] = config.get(_WINDOW, _DEFAULT_WINDOW) / values[_ORIGINAL]  # as transformers
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING or name == "factor"
        if required and values.get(name) is None:
            raise InputError(f"{key} of rope_type {kind!r} has no {name!r}")
    return KINDS[kind](**values)


def to_hf(scaling: Scaling, layout: Literal["v4", "v5"] = "v4") -> dict[str, Any]:
    """The keys of `config.json` for a scaling; `window_to_hf` has those for the windows.

    Layout "v4" is what every reader of today takes (transformers 4 and 5, vLLM, SGLang, llama.cpp); "v5" is what
    transformers 5 itself writes, which transformers 4 reads as *unscaled without a word*. The factor is always a
    float: vLLM refuses an integer. Values that are the default of their kind are left out.
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


def window_from_hf(config: dict[str, Any], scaling: Scaling) -> tuple[int, int | None]:
    """The window in tokens that a `config.json` stands for, and the one before its extension (None: never extended)."""
    window = config.get(_WINDOW, _DEFAULT_WINDOW)
    if scaling.kind == "linear":
        # Which of the two is the longer one differs between published models.
        window, original = sorted((window, config.get("max_sequence_length") or window), reverse=True)
    elif scaling.kind == "default":
        original = config.get(_ORIGINAL)
    else:
        original = scaling.original_max_position_embeddings
        if scaling.kind in ("dynamic", "yarn") and window == original:
            window = int(original * scaling.factor)
    return window, original if original and original < window else None


def window_to_hf(scaling: Scaling, window: int, original: int | None) -> dict[str, int]:
    """The keys of `config.json` for the windows, so that every reader derives the same length.

    `max_position_embeddings` is the extended window, which transformers and llama.cpp want. Beside 'linear',
    `max_sequence_length` is the original one, which vLLM and SGLang multiply by the factor. Readers of 'dynamic'
    compute with `max_position_embeddings` as the original window. The other kinds hold it themselves; transformers 4
    wants that of 'longrope' outside, and that of a changed theta is for our own use.
    """
    if scaling.kind == "dynamic":
        return {_WINDOW: scaling.original_max_position_embeddings}
    if scaling.kind == "longrope":
        return {_WINDOW: window, _ORIGINAL: scaling.original_max_position_embeddings}
    if original and scaling.kind == "linear":
        return {_WINDOW: window, "max_sequence_length": original}
    if original and scaling.kind == "default":
        return {_WINDOW: window, _ORIGINAL: original}
    return {_WINDOW: window}
