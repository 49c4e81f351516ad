"""Reads Gemma models from GGUF files, with their tokenizer.

Matrices are [outputs, inputs], as Hugging Face stores them. Norms are stored as 1 + scale. What the metadata do not say
is the same for all Gemmas of a family, and llama.cpp knows it: the scale of queries, the RoPE base of local layers, and
mostly the pattern of layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from genrm_jax.checkpoints import gguf_file, gguf_tokenizer, hugging_face, tensor_map
from genrm_jax.checkpoints.hugging_face_config import every_nth_global, shortest_pattern
from genrm_jax.checkpoints.tensor_map import CheckpointReader, Tensor, is_close
from genrm_jax.model.config import MAX_LAYERS, PUBLISHED_COUNTS, SIZES, ModelConfig
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import SentencePieceTokenizer

_FAMILIES = ("gemma", "gemma2", "gemma3")
# Names of parameters in the files.
_NAMES = {
  "input_embedding": "token_embd",
  "final_norm": "output_norm",
  "q": "attn_q",
  "k": "attn_k",
  "v": "attn_v",
  "attn_out": "attn_output",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
  "pre_attention_norm": "attn_norm",
  "post_attention_norm": "post_attention_norm",
  "pre_ffw_norm": "ffn_norm",
  "post_ffw_norm": "post_ffw_norm",
  "q_norm": "attn_q_norm",
  "k_norm": "attn_k_norm",
}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Values of absent keys, as llama.cpp reads them.
_PERIODS = {"gemma": 1, "gemma2": 2, "gemma3": 6}  # every n-th layer is global
_SOFTCAPS = {"gemma": (None, None), "gemma2": (50.0, 30.0), "gemma3": (None, 0.0)}
_WINDOWS = {"gemma": None, "gemma2": 4096, "gemma3": None}
_ROPE_BASE = 10_000.0


def open_file(path: epath.Path) -> CheckpointReader:
  """Reads and validates the metadata and the index of a file.

  Raises:
    UserError: the file is cut off, malformed, of another architecture, a part of a model or of a quantised type that
      cannot be read; its size differs from the table; a tensor is missing or of another shape; the output layer is not
      the embedding.
  """
  where = str(path)
  metadata, entries = gguf_file.read_index(path)
  _check_kind(where, metadata)
  if _EMBEDDING not in entries or len(entries[_EMBEDDING].shape) != 2:
    raise UserError(f"{where}: no tensor {_EMBEDDING}, so it holds no whole model; give the file of a whole Gemma")
  config = tensor_map.check_size(where, config_of(where, metadata, entries[_EMBEDDING].shape[0], path.stem))
  named = tensors(config)
  tensor_map.check_shapes(where, {name: entry.shape for name, entry in entries.items()}, named, config)
  unknown = sorted(set(entries) - {tensor.name for tensor in named} - {_HEAD})
  if unknown:
    raise UserError(
      f"{where}: {len(unknown)} tensors do not belong to {config.name}, the first is {unknown[0]}; give the file of a "
      "Gemma without additions, its adapters (LoRA) merged"
    )
  _check_head(path, entries)
  return CheckpointReader(
    where,
    config,
    named,
    lambda name: gguf_file.read_tensor(path, entries[name]),
    lambda: SentencePieceTokenizer(where, gguf_tokenizer.sentencepiece_model(where, metadata)),
  )


def tensors(config: ModelConfig) -> list[Tensor]:
  """The tensors of a file of this model."""
  return [_as_stored(tensor) for tensor in hugging_face.tensors(config, "")]


def _as_stored(tensor: Tensor) -> Tensor:
  ((path, layer),) = tensor.holds
  name = f"{_NAMES[path.rpartition('/')[2]]}.weight"
  tensor = tensor._replace(name=name if layer is None else f"blk.{layer}.{name}")
  if len(tensor.shape) > 1:
    return tensor
  return tensor._replace(
    to_params=lambda stored: [stored.astype(np.float32) - 1],
    from_params=lambda params: params[0].astype(np.float32) + 1,
  )


def _check_kind(where: str, metadata: Mapping[str, Any]) -> None:
  """Raises UserError unless the file is a whole language model of a known family."""
  family = metadata.get("general.architecture")
  if family == "clip" or metadata.get("general.type") == "mmproj":
    raise UserError(f"{where}: the projector of an image encoder (mmproj); give the file of the language model")
  if family not in _FAMILIES:
    raise UserError(f"{where}: architecture {family!r} is not supported; give a file of one of {', '.join(_FAMILIES)}")
  if (kind := metadata.get("general.type", "model")) != "model":
    raise UserError(f"{where}: its general.type is {kind!r}, not a model; give the file of a whole Gemma")
  if (parts := metadata.get("split.count", 0)) not in (0, 1):
    raise UserError(f"{where}: one of {parts} parts of a model; join them first (llama-gguf-split --merge)")


def _check_head(path: epath.Path, entries: Mapping[str, gguf_file.Entry]) -> None:
  """Raises UserError if the output layer differs from the embedding."""
  head, table = entries.get(_HEAD), entries[_EMBEDDING]
  if head is None:
    return
  same = (head.type, head.shape) == (table.type, table.shape)
  if not same or not np.array_equal(gguf_file.read_tensor(path, head), gguf_file.read_tensor(path, table)):
    raise UserError(
      f"{path}: {_HEAD} is not the embedding ({_EMBEDDING}); this library supports only models that share one "
      "table for input and output, as all released Gemmas do"
    )


def config_of(where: str, metadata: Mapping[str, Any], vocab_size: int, name: str) -> ModelConfig:
  """The model that the metadata describe."""
  family = metadata["general.architecture"]
  numbers = _Numbers(where, family, metadata)
  num_layers, embed_dim = numbers.whole("block_count"), numbers.whole("embedding_length")
  num_heads = numbers.whole("attention.head_count")
  head_dim = numbers.whole("attention.key_length", embed_dim // max(1, num_heads))
  for key in ("attention.value_length", "rope.dimension_count"):
    numbers.expect(key, head_dim)
  numbers.expect("attention.layer_norm_rms_epsilon", 1e-6)
  first, third = family == "gemma", family == "gemma3"
  window = None if first else numbers.whole("attention.sliding_window", _WINDOWS[family]) or None
  base, (attn_softcap, final_softcap) = numbers.real("rope.freq_base", _ROPE_BASE), _SOFTCAPS[family]
  scaling = metadata.get(f"{family}.rope.scaling.type", "none")
  if scaling not in ("none", "linear"):
    raise UserError(f"{where}: RoPE scaling of type {scaling!r}; known: none, linear")
  factor = numbers.real("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0
  if factor != 1 and not third:
    raise UserError(f"{where}: RoPE is scaled by {factor:g}; this library scales that of Gemma 3's global layers only")
  fields = {
    "num_layers": num_layers,
    "embed_dim": embed_dim,
    "num_heads": num_heads,
    "num_kv_heads": numbers.whole("attention.head_count_kv", num_heads),
    "head_dim": head_dim,
    "ffw_dim": numbers.whole("feed_forward_length"),
    "attn_softcap": attn_softcap and numbers.real("attn_logit_softcapping", attn_softcap),
    "final_softcap": None if final_softcap is None else numbers.real("final_logit_softcapping", final_softcap) or None,
    "window": window,
    "rope_base_local": numbers.real("rope.freq_base_swa", _ROPE_BASE) if third else base,
    "rope_base_global": base,
    "rope_scale_global": factor,
    "qk_norm": third,
    "post_norms": not first,
    "query_scale": _query_scale(family, num_layers, embed_dim, head_dim),
    "pattern": ("global",)
    if window is None
    else numbers.pattern(min(max(1, num_layers), MAX_LAYERS), _PERIODS[family]),
  }
  try:
    return ModelConfig(name=name, vocab_size=vocab_size, **fields)
  except UserError as e:
    raise UserError(f"{where}: {e}") from e


def _query_scale(family: str, num_layers: int, embed_dim: int, head_dim: int) -> float:
  """That of the released size, or that of most."""
  key = (family != "gemma", family == "gemma3", num_layers, embed_dim)
  sizes = [SIZES[name] for name in PUBLISHED_COUNTS]
  known = [s.query_scale for s in sizes if (s.post_norms, s.qk_norm, s.num_layers, s.embed_dim) == key]
  return known[0] if known else max(1, head_dim) ** -0.5


class _Numbers:
  """The metadata of a family's model; a value of another kind is a UserError."""

  def __init__(self, where: str, family: str, metadata: Mapping[str, Any]):
    self._where, self._family, self._metadata = where, family, metadata

  def whole(self, key: str, absent: int | None = None) -> Any:
    return self._get(key, absent, int, "whole number")

  def real(self, key: str, absent: float) -> Any:
    return self._get(key, absent, float, "number")

  def expect(self, key: str, value: float) -> None:
    """Raises UserError if a key is there with another value."""
    found = self._metadata.get(f"{self._family}.{key}", value)
    if not is_close(found, value):
      found = f"{found:g}" if isinstance(found, float) else repr(found)[:80]
      raise UserError(f"{self._where}: {self._family}.{key} is {found}; this library supports {value:g} only")

  def pattern(self, num_layers: int, period: int) -> tuple[str, ...]:
    """The kinds of layers; the metadata may hold the period, or whether each layer is local."""
    key = "attention.sliding_window_pattern"
    given = self._metadata.get(f"{self._family}.{key}", period)
    if isinstance(given, np.ndarray) and len(given) == num_layers:
      return shortest_pattern(tuple("local" if local else "global" for local in given))
    return shortest_pattern(every_nth_global(max(1, self.whole(key, period)), num_layers))

  def _get(self, key: str, absent: Any, kind: type, what: str) -> Any:
    name = f"{self._family}.{key}"
    if name not in self._metadata and absent is not None:
      return absent
    value = self._metadata.get(name)
    if type(value) is not kind:
      found = "missing" if value is None else f"{str(value)[:80]!r}"
      raise UserError(f"{self._where}: {name} is {found}, but it must be a {what}; use a file that llama.cpp converted")
    return value
