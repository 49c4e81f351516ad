"""Converts Hugging Face's config.json of a Gemma model to and from ModelConfig.

The released files omit keys whose values are the defaults of transformers' config classes, so those defaults are part
of the format: see GemmaConfig, Gemma2Config and Gemma3TextConfig in transformers 5.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from genrm_jax.checkpoints.tensor_map import is_close
from genrm_jax.model.config import MAX_LAYERS, ModelConfig
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.json_lines import shown

ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
_WITH_IMAGES = {"gemma3": "Gemma3ForConditionalGeneration"}  # its text_config is a gemma3_text

# Values of absent keys.
_COMMON: dict[str, Any] = {
  "head_dim": 256,
  "rms_norm_eps": 1e-6,
  "query_pre_attn_scalar": 256.0,
  "sliding_window": 4096,
}
# fmt: off
_ABSENT: dict[str, dict[str, Any]] = {
  "gemma": _COMMON | {
    "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24_576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16,
  },
  "gemma2": _COMMON | {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2,
  },
  "gemma3_text": _COMMON | {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": 6,
  },
}
# fmt: on
_MAY_BE_NULL = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_KINDS = {"sliding_attention": "local", "full_attention": "global"}
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "factor"}
_LARGEST = 2**31 - 1  # of a size
_MAX_POSITIONS = {"gemma": 8192, "gemma2": 8192, "gemma3_text": 32_768}
_MAX_SCALED_POSITIONS = 131_072  # of the Gemma 3 sizes whose global layers divide positions by 8


def from_json(where: str, fields: Mapping[str, Any], name: str) -> ModelConfig:
  """The model of a config.json.

  Args:
    where: path of the file, for messages.
    fields: content of the file.
    name: name for the ModelConfig.

  Raises:
    UserError: the architecture is not Gemma 1, 2 or 3, or it uses arithmetic that this library lacks.
  """
  family, text = _text_model(where, fields)
  # Some exports prefix a key with an underscore.
  values = {**_ABSENT[family], **{key.removeprefix("_"): value for key, value in text.items()}}
  _check_arithmetic(where, family, values)
  kinds = _layer_kinds(where, family, values)
  base_local, base_global, scale_global = _rope(where, family, values, kinds)
  first = family == "gemma"
  try:
    return ModelConfig(
      name=name,
      vocab_size=values["vocab_size"],
      num_layers=values["num_hidden_layers"],
      embed_dim=values["hidden_size"],
      num_heads=values["num_attention_heads"],
      num_kv_heads=values["num_key_value_heads"],
      head_dim=values["head_dim"],
      ffw_dim=values["intermediate_size"],
      query_scale=(values["head_dim"] if first else values["query_pre_attn_scalar"]) ** -0.5,
      attn_softcap=None if first else values["attn_logit_softcapping"],
      final_softcap=None if first else values["final_logit_softcapping"],
      window=None if first else values["sliding_window"],
      pattern=shortest_pattern(kinds),
      rope_base_local=base_local,
      rope_base_global=base_global,
      rope_scale_global=scale_global,
      qk_norm=family == "gemma3_text",
      post_norms=not first,
    )
  except UserError as e:
    raise UserError(f"{where}: {e}") from e


def is_tied(fields: Mapping[str, Any]) -> bool:
  """Whether the output layer shares the embedding, as in every released Gemma."""
  text = fields.get("text_config") or {}
  return all(part.get("tie_word_embeddings") in (None, True) for part in (fields, text))


def to_json(
  config: ModelConfig, *, dtype: str, bos_id: int, eos_id: int | Sequence[int], pad_id: int
) -> dict[str, Any]:
  """The config.json of a model, with the keys of the released files, which every transformers and vLLM reads.

  Raises:
    UserError: Hugging Face's classes cannot express the model.
  """
  family = "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
  fields: dict[str, Any] = {
    "architectures": [ARCHITECTURES[family]],
    "model_type": family,
    "torch_dtype": dtype,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.ffw_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": _MAX_SCALED_POSITIONS if config.rope_scale_global > 1 else _MAX_POSITIONS[family],
    "rope_theta": float(config.rope_base_global),
    "tie_word_embeddings": True,
    "bos_token_id": bos_id,
    "eos_token_id": eos_id if isinstance(eos_id, int) else list(eos_id),
    "pad_token_id": pad_id,
  }
  if config.rope_scale_global != 1:
    fields["rope_scaling"] = {"rope_type": "linear", "factor": float(config.rope_scale_global)}
  if family != "gemma":
    names = {kind: name for name, kind in _KINDS.items()}
    fields |= {
      "query_pre_attn_scalar": round(config.query_scale**-2),
      "attn_logit_softcapping": _float(config.attn_softcap) if family == "gemma2" else None,
      "final_logit_softcapping": _float(config.final_softcap),
      "sliding_window": config.window,
      "layer_types": [names[kind] for kind in config.layer_kinds],
    }
  if family == "gemma3_text":
    fields["rope_local_base_freq"] = float(config.rope_base_local)
    # For readers older than layer_types, where this key can express the layers.
    for n in range(1, config.num_layers + 2):
      if every_nth_global(n, config.num_layers) == config.layer_kinds:
        fields["sliding_window_pattern"] = n
  _check_expressible(config, fields)
  return fields


def _check_expressible(config: ModelConfig, fields: Mapping[str, Any]) -> None:
  """Raises UserError for a model that would read back as another."""
  got = from_json(config.name, fields, config.name)
  for field in (*config.to_dict(), "layer_kinds"):
    a, b = getattr(config, field), getattr(got, field)
    # Another pattern may give the same layers, and the dtype is that of the tensors.
    if field not in ("pattern", "dtype", "param_dtype") and not is_close(a, b):
      raise UserError(
        f"Model {config.name}: {field} = {a!r} has no place in Hugging Face's {fields['model_type']}, which would read "
        f"{b!r}; save this model in another format"
      )


def _float(value: float | None) -> float | None:
  return None if value is None else float(value)


def _text_model(where: str, fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
  """(family, fields of its text model)."""
  given = fields.get("model_type")
  known = ARCHITECTURES | _WITH_IMAGES
  family = given if isinstance(given, str) and given in known else ""
  # Some exports name no architecture. Models with another head, such as a classifier, do.
  named = fields.get("architectures") or [known.get(family)]
  if not family or named != [known[family]]:
    names = ", ".join(map(str, named)) if isinstance(named, list) else shown(named)
    what = f"model_type {shown(given)}" + (f" with architecture {names}" if family else "")
    folders = ", ".join(f"{model_type} ({architecture})" for model_type, architecture in known.items())
    raise UserError(f"{where}: {what} is not supported; give the folder of one of {folders}")
  if fields.get("quantization_config"):
    raise UserError(f"{where}: the weights are quantised (quantization_config); give the original checkpoint")
  if family not in _WITH_IMAGES:
    return family, fields
  text = _object(where, fields, "text_config")
  if text.get("model_type", "gemma3_text") != "gemma3_text":
    raise UserError(f"{where}: a text_config of model_type {text['model_type']!r}; known: gemma3_text")
  return "gemma3_text", text


def _check_arithmetic(where: str, family: str, values: Mapping[str, Any]) -> None:
  # The first Gemma files say "gelu" but mean the tanh approximation that the models were trained with.
  gelus = (None, "gelu_pytorch_tanh")
  allowed: dict[str, tuple[Any, ...]] = {
    "hidden_act": gelus + (("gelu",) if family == "gemma" else ()),
    "hidden_activation": gelus,
    "attention_bias": (None, False),
    "use_bidirectional_attention": (None, False),
    "rms_norm_eps": (1e-6,),
  }
  if family == "gemma3_text":
    # transformers' Gemma 3 has this key and ignores it.
    allowed["attn_logit_softcapping"] = (None,)
  for key, known in allowed.items():
    if values.get(key) not in known:
      supported = " or ".join(json.dumps(value) for value in known)
      raise UserError(f"{where}: {key} is {shown(values.get(key))}; this library supports {supported} only")
  tied = values.get("tie_word_embeddings")
  if not isinstance(tied, bool | None):
    raise UserError(f"{where}: tie_word_embeddings is {shown(tied)}, but it must be true or false")
  for key, default in _ABSENT[family].items():
    if values[key] is not None or key not in _MAY_BE_NULL:
      largest = MAX_LAYERS if key == "num_hidden_layers" else _LARGEST
      _check_number(where, key, values[key], isinstance(default, int), largest)


def _check_number(where: str, key: str, value: Any, whole: bool = False, largest: int = _LARGEST) -> None:
  of_kind = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
  if not of_kind or not 0 < value <= largest:
    kind = "whole number" if whole else "number"
    raise UserError(f"{where}: {key} is {shown(value)}, but it must be a {kind} above 0 and at most {largest}")


def _object(where: str, fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
  """The object at a key, empty if absent or null."""
  value = {} if fields.get(key) is None else fields[key]
  if not isinstance(value, Mapping):
    raise UserError(f"{where}: {key} is {shown(value)}, but it must be a JSON object")
  return value


def _layer_kinds(where: str, family: str, values: Mapping[str, Any]) -> tuple[str, ...]:
  num_layers = values["num_hidden_layers"]
  if family == "gemma":
    return ("global",) * num_layers
  types = values.get("layer_types")
  if types is None:
    return every_nth_global(values["sliding_window_pattern"], num_layers)
  if not isinstance(types, list):
    raise UserError(f"{where}: layer_types is {shown(types)}, but it must be a list")
  unknown = sorted({str(t) for t in types if not isinstance(t, str) or t not in _KINDS})
  if unknown or len(types) != num_layers:
    what = f"names {', '.join(unknown)}" if unknown else f"has {len(types)} entries for {num_layers} layers"
    raise UserError(f"{where}: layer_types {what}; it must name {' or '.join(_KINDS)} for each layer")
  return tuple(_KINDS[t] for t in types)


def every_nth_global(n: int, num_layers: int) -> tuple[str, ...]:
  """Layer kinds in which every n-th layer is global."""
  return tuple("global" if i % n == 0 else "local" for i in range(1, num_layers + 1))


def shortest_pattern(kinds: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest that, repeated, gives the kinds of all layers."""
  lengths = range(1, len(kinds) + 1)
  return next(kinds[:n] for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def _rope(where: str, family: str, values: Mapping[str, Any], kinds: Sequence[str]) -> tuple[float, float, float]:
  """(RoPE base of local layers, of global layers, divisor of positions on global layers).

  transformers 5 writes rope_parameters, in Gemma 3 per type of layer. The released files have rope_theta and
  rope_scaling, which in Gemma 3 apply to global layers, and rope_local_base_freq.
  """
  given, scaling = _object(where, values, "rope_parameters"), _object(where, values, "rope_scaling")
  if family == "gemma3_text":
    _check_keys(where, given, set(_KINDS))
    base_local, base_global = values.get("rope_local_base_freq", 10_000.0), values.get("rope_theta", 1_000_000.0)
    local_rope = {"rope_theta": base_local, **_object(where, given, "sliding_attention")}
    global_rope = {"rope_theta": base_global, **_object(where, given, "full_attention"), **scaling}
  else:
    local_rope = global_rope = {"rope_theta": values.get("rope_theta", 10_000.0), **(scaling or given)}
  for rope in (local_rope, global_rope):
    _check_keys(where, rope, _ROPE_KEYS)
    _check_number(where, "rope_theta", rope["rope_theta"])
  if "local" in kinds and _rope_factor(where, local_rope) != 1:
    raise UserError(f"{where}: the RoPE of sliding layers is scaled; this library scales that of global layers only")
  return float(local_rope["rope_theta"]), float(global_rope["rope_theta"]), _rope_factor(where, global_rope)


def _check_keys(where: str, rope: Mapping[str, Any], known: set[str]) -> None:
  unknown = sorted(set(rope) - known)
  if unknown:
    raise UserError(f"{where}: the RoPE parameters have {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def _rope_factor(where: str, rope: Mapping[str, Any]) -> float:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "linear"):
    raise UserError(f"{where}: RoPE of type {kind!r}; known: default, linear")
  if kind == "default":
    return 1.0
  _check_number(where, "the factor of linear RoPE", rope.get("factor"))
  return float(rope["factor"])
