"""From config.json to the shapes of a decoder like Llama's: what Qwen2, Qwen3 and Llama have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from xpo_jax.io.text import shorten
from xpo_jax.models.family import ModelConfig
from xpo_jax.models.rope import Llama3, Yarn, read_rope_scaling, rope_parameters


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Shapes and constants of one decoder; a family is a subclass that says in what it differs.

    Attributes:
      rope_scaling: of the rotary positions, see rope.py; None for none.
    """

    label: ClassVar[str]  # for errors: "a Qwen2 or Qwen2.5"
    qkv_bias: ClassVar[bool] = False  # q, k and v are linear maps with biases
    qk_norm: ClassVar[bool] = False  # heads of q and k are normed before they are rotated
    defaults: ClassVar[Mapping[str, Any]] = {}  # of transformers, for fields that a config.json lacks
    refused: ClassVar[Mapping[str, str]] = {}  # fields that must be absent or false: why

    rope_scaling: Llama3 | Yarn | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Read the fields of a config.json.

        Rotary positions are read in the old spelling (rope_theta, rope_scaling) and the new one (rope_parameters).

        Raises:
          ValueError: a missing field, or an architecture that decoder.py does not compute.
        """
        try:
            rope = rope_parameters(hf)
        except ValueError as error:
            raise ValueError(f"config.json: {error}; correct it") from error
        hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
        fields: dict[str, Any] = {f.name: hf.get(f.name) for f in dataclasses.fields(ModelConfig)}
        fields["rope_theta"] = rope.get("rope_theta")
        for name, value in {"tie_word_embeddings": False, **cls.defaults}.items():
            if fields[name] is None:
                fields[name] = value
        if fields["head_dim"] is None and type(hidden) is int and type(heads) is int and heads > 0:
            fields["head_dim"] = hidden // heads
        missing = [name for name, value in fields.items() if value is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; is this {cls.label} model?")
        wrong = [
            f"{f.name} is {fields[f.name]!r}" for f in dataclasses.fields(ModelConfig) if not _fits(f, fields)
        ]
        if wrong:
            raise ValueError(
                f"config.json has values of the wrong type: {', '.join(wrong)}; restore the model's file"
            )
        fields["rope_theta"] = float(fields["rope_theta"])
        reasons = _unsupported(cls, hf, rope, fields)
        try:
            scaling = read_rope_scaling(rope, fields["max_position_embeddings"])
        except ValueError as error:
            reasons.append(str(error))
        if reasons:
            raise ValueError(
                f"config.json requires what xpo_jax does not compute: {'; '.join(reasons)}; choose another model"
            )
        if scaling is not None and scaling.tokens is not None:
            fields["max_position_embeddings"] = max(fields["max_position_embeddings"], scaling.tokens)
        return cls(**fields, rope_scaling=scaling)


def _unsupported(
    cls: type[DecoderConfig], hf: Mapping[str, Any], rope: Mapping[str, Any], fields: Mapping[str, Any]
) -> list[str]:
    """Return what a config.json requires beyond the modules of decoder.py."""
    reasons = [f"{name} is {hf[name]!r}{why}" for name, why in cls.refused.items() if hf.get(name)]
    if hf.get("hidden_act", "silu") != "silu":
        reasons.append(f"hidden_act is {hf.get('hidden_act')!r}, not 'silu'")
    if hf.get("use_sliding_window"):
        reasons.append("use_sliding_window is true")
    rotated = hf.get("partial_rotary_factor", rope.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        reasons.append(f"partial_rotary_factor is {rotated!r}, not 1")
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        reasons.append(f"layer_types is {shorten(repr(kinds), 60)}, not 'full_attention' throughout")
    if fields["rope_theta"] <= 1:
        reasons.append(f"rope_theta is {fields['rope_theta']}, not above 1")
    if fields["num_attention_heads"] % fields["num_key_value_heads"] != 0:
        reasons.append("num_key_value_heads does not divide num_attention_heads")
    return reasons


def _fits(field: dataclasses.Field[Any], values: Mapping[str, Any]) -> bool:
    """Whether a field has its type; numbers must be positive."""
    value = values[field.name]
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,)}[str(field.type)]
    return type(value) in kinds and (kinds == (bool,) or 0 < value < math.inf)
