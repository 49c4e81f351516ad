"""Gemma 1, 2 and 3 as pure functions: parameters are declared once, and `forward` is one scan over the layers.

Axis letters: B batch, T query, S key, L layers, N query heads, K kv heads, H head dim, D model width, F ffw width,
V vocabulary, W selected tokens, A kinds of layers in the model (local, global or both).

With h = rms_norm(x), a layer is

    x = x + post(attention(h) attn_out)        q = query_scale * rope(norm(h q)),  k = rope(norm(h k)),  v = h v
    x = x + post(gelu(h gate) * (h up) down)   post: a norm, or nothing (post_norms); norm: over H, or nothing (qk_norm)

and logits = soft_cap(rms_norm(x) E^T), where E is the input embedding.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from genrm_jax.model import attention, layers
from genrm_jax.model import cache as kv_cache
from genrm_jax.model.config import LAYER_KINDS, ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import FREE, constrain

if TYPE_CHECKING:
  from genrm_jax.model.lora import LoraConfig

Params = dict[str, Any]
Remat = Literal["none", "dots", "layer"]
Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """The declaration of one parameter."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # the logical axis of each dimension
  init: Initializer  # (key, shape, dtype) -> array
  is_norm: bool = False  # the scale of an RMSNorm


def param_specs(config: ModelConfig) -> dict[str, Any]:
  """All parameters as a tree of ParamSpec; those of the layers are stacked along a leading axis L."""
  c = config
  sizes = {
    "layers": c.num_layers,
    "vocab": c.vocab_size,
    "embed": c.embed_dim,
    "heads": c.num_heads,
    "kv_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "ffw": c.ffw_dim,
  }

  def spec(*axes: str, init: Initializer, is_norm: bool = False) -> ParamSpec:
    return ParamSpec(tuple(sizes[axis] for axis in axes), axes, init, is_norm)

  def dense(*axes: str, fan_in: int) -> ParamSpec:
    return spec("layers", *axes, init=jax.nn.initializers.normal(fan_in**-0.5))

  def norm(*axes: str) -> ParamSpec:
    return spec(*axes, init=jax.nn.initializers.zeros, is_norm=True)

  per_layer = {
    "pre_attention_norm": norm("layers", "embed"),
    "q": dense("embed", "heads", "head_dim", fan_in=c.embed_dim),
    "k": dense("embed", "kv_heads", "head_dim", fan_in=c.embed_dim),
    "v": dense("embed", "kv_heads", "head_dim", fan_in=c.embed_dim),
    "attn_out": dense("heads", "head_dim", "embed", fan_in=c.num_heads * c.head_dim),
    "pre_ffw_norm": norm("layers", "embed"),
    "gate": dense("embed", "ffw", fan_in=c.embed_dim),
    "up": dense("embed", "ffw", fan_in=c.embed_dim),
    "down": dense("ffw", "embed", fan_in=c.ffw_dim),
  }
  if c.qk_norm:
    per_layer |= {"q_norm": norm("layers", "head_dim"), "k_norm": norm("layers", "head_dim")}
  if c.post_norms:
    per_layer |= {"post_attention_norm": norm("layers", "embed"), "post_ffw_norm": norm("layers", "embed")}
  # Rows of norm about 1: multiplied by sqrt(D) as inputs, and as the output layer, they give values at unit scale.
  embedding = spec("vocab", "embed", init=jax.nn.initializers.normal(c.embed_dim**-0.5))
  return {"embedder": {"input_embedding": embedding}, "layers": per_layer, "final_norm": norm("embed")}


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Random parameters in `config.param_dtype`."""
  return init_specs(param_specs(config), key, config.param_dtype)


def init_specs(specs: Any, key: jax.Array, dtype: str) -> Any:
  """Arrays for a tree of ParamSpec. Each parameter is a function of the key and its own name only."""

  def make(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return spec.init(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)

  return jax.tree_util.tree_map_with_path(make, specs)


def num_params(config: ModelConfig) -> tuple[int, int]:
  """(number of embedding parameters, number of all others), from the shapes."""
  specs = param_specs(config)
  total = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
  embedding = math.prod(specs["embedder"]["input_embedding"].shape)
  return embedding, total - embedding


def norm_mask(config: ModelConfig, adapters: "LoraConfig | None" = None) -> dict[str, Any]:
  """A tree of bool with the structure of the parameters (and adapters): whether each is the scale of a norm."""
  specs = param_specs(config)
  if adapters is not None:
    from genrm_jax.model import lora  # which imports this module

    specs |= lora.param_specs(config, adapters)
  return jax.tree.map(lambda spec: spec.is_norm, specs)


def forward(
  params: Params,
  config: ModelConfig,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segments_BT: jax.Array,
  cache: KVCache | None = None,
  *,
  remat: Remat = "none",
) -> tuple[jax.Array, KVCache | None]:
  """Hidden states after the final norm.

  Without a cache, rows are packed: a token attends to the tokens of its segment up to itself. With a cache, each row is
  one sequence: new tokens are appended at `cache.length[b]` and attend to the whole row up to themselves. Prefill and
  decode are the same call, with T the width of the prompts or 1:

      cache.length 0 3      segments 1 1 1 1      entries written 0 1 2 3      length after 4 5
                                     1 1 0 0                      3 4 - -

  Args:
    params: as `param_specs` declares them, in any float dtype; cast to `config.dtype` where they are used. They may
      include low-rank adapters (model/lora.py).
    config: the model.
    tokens_BT: i32[B, T].
    positions_BT: i32[B, T], for RoPE and windows. They may have gaps; causality does not depend on them.
    segments_BT: i32[B, T], 0 is padding. With a cache, padding follows the real tokens, and only zero or non-zero
      matters.
    cache: the rows so far. The caller makes sure that it has room: tokens beyond its end are dropped, which shows in
      `length > S`.
    remat: what the backward pass recomputes. "none": nothing. "dots": everything but matrix products with weights.
      "layer": everything within a layer; only the residual stream is saved.

  Returns:
    x_BTD in `config.dtype` (finite but meaningless at padding), and the updated cache or None.
  """
  kinds = tuple(kind for kind in LAYER_KINDS if kind in config.layer_kinds)
  windows = tuple(config.window if kind == "local" else None for kind in kinds)
  if cache is None:
    entries_BT = None
    masks = [layers.packed_mask(positions_BT, segments_BT, window) for window in windows]
  else:
    entries_BT = kv_cache.entries(cache, segments_BT)
    key_positions_BS = kv_cache.write_positions(cache.positions, positions_BT, entries_BT)
    masks = [layers.cached_mask(entries_BT, positions_BT, key_positions_BS, window) for window in windows]
  angles = [_angles(config, kind, positions_BT) for kind in kinds]
  # One mask and one set of angles per kind of layer; each layer indexes them by its kind.
  masks_ABTS, cos_ABTH, sin_ABTH = jnp.stack(masks), jnp.cos(jnp.stack(angles)), jnp.sin(jnp.stack(angles))

  def body(carry: Any, scanned: Any) -> tuple[Any, None]:
    x_BTD, k_buffer, v_buffer = carry
    weights, index, kind = scanned
    if entries_BT is not None:
      weights = layers.layer_of(stacked, index)
    rope = functools.partial(layers.apply_rope, cos_BTH=cos_ABTH[kind], sin_BTH=sin_ABTH[kind])
    h_BTD = layers.rms_norm(x_BTD, weights["pre_attention_norm"])
    q_BTNH, k_BTKH, v_BTKH = _qkv(weights, config, h_BTD, rope)
    if entries_BT is not None:
      # The cache is part of the carry: as scanned inputs and outputs it would be copied at every step.
      k_buffer = kv_cache.write(k_buffer, k_BTKH, index, entries_BT)
      v_buffer = kv_cache.write(v_buffer, v_BTKH, index, entries_BT)
      k_BKSH, v_BKSH = kv_cache.read(k_buffer, index), kv_cache.read(v_buffer, index)
      attended_BTNH = layers.attention(q_BTNH, k_BKSH, v_BKSH, masks_ABTS[kind], config.attn_softcap)
    else:
      attended_BTNH = attention.packed(q_BTNH, k_BTKH, v_BTKH, masks_ABTS, kind, segments_BT, windows, config)
    out_BTD = layers.project(attended_BTNH, weights["attn_out"], num_axes=2)
    x_BTD = _add(config, x_BTD, out_BTD, weights.get("post_attention_norm"))
    h_BTD = layers.rms_norm(x_BTD, weights["pre_ffw_norm"])
    hidden_BTF = layers.gate_mlp(h_BTD, weights["gate"], weights["up"])
    hidden_BTF = constrain(hidden_BTF, ("activation_batch", None, "activation_ffw"), config.rules)
    out_BTD = layers.project(hidden_BTF, weights["down"])
    x_BTD = _add(config, x_BTD, out_BTD, weights.get("post_ffw_norm"))
    return (x_BTD, k_buffer, v_buffer), None

  if remat != "none":
    policy = jax.checkpoint_policies.save_only_these_names(layers.PRODUCT) if remat == "dots" else None
    # The scan already separates forward from backward, so preventing CSE would only cost time.
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
  kind_L = jnp.array([kinds.index(kind) for kind in config.layer_kinds], jnp.int32)
  stacked = _adapted(params)
  scanned = (stacked if cache is None else None, jnp.arange(config.num_layers, dtype=jnp.int32), kind_L)
  buffers = (None, None) if cache is None else (cache.k, cache.v)
  (x_BTD, k_LBKSH, v_LBKSH), _ = jax.lax.scan(body, (_embed(params, config, tokens_BT), *buffers), scanned)
  x_BTD = layers.rms_norm(x_BTD, params["final_norm"])
  if cache is None:
    return x_BTD, None
  length_B = cache.length + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
  return x_BTD, KVCache(k=k_LBKSH, v=v_LBKSH, positions=key_positions_BS, length=length_B)


def as_used(params: Params, config: ModelConfig) -> Params:
  """Casts parameters to the dtype in which `forward` and `unembed` use them: less memory, the same numbers.

  Donates `params`. Norms and adapters are used in float32 and keep their dtype.
  """
  mask = norm_mask(config)

  def cast(params: Params) -> Params:
    used = {
      name: jax.tree.map(lambda weight, keep: weight if keep else _cast(weight, config), params[name], mask[name])
      for name in mask
    }
    return params | used

  return jax.jit(cast, donate_argnums=0)(params)


def unembed(
  params: Params, config: ModelConfig, x: jax.Array, ids: jax.Array | Sequence[int] | None = None
) -> jax.Array:
  """Logits of the vocabulary, f32[..., V], or of the tokens `ids` only, f32[..., W]; soft-capped if the model is.

  Args:
    params: as for `forward`.
    config: the model.
    x: hidden states [..., D] from `forward`.
    ids: W token ids. The other logits are not computed.
  """
  table_VD = params["embedder"]["input_embedding"]
  if ids is not None:
    table_VD = table_VD[jnp.asarray(ids, jnp.int32)]
  logits = layers.einsum_to_float32("...D,VD->...V", x.astype(config.dtype), _cast(table_VD, config))
  return layers.soft_cap(logits, config.final_softcap)


def _embed(params: Params, config: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
  # The table is gathered along D first: a lookup in column shards would leave every device with the tokens of all batch
  # shards, from where the compiler finds no cheap way back to rows.
  table_VD = constrain(params["embedder"]["input_embedding"], (FREE, None), config.rules)
  x_BTD = _cast(table_VD[tokens_BT], config)
  # The released weights were trained with this factor rounded to the activations' dtype.
  return _residual(config, x_BTD * jnp.sqrt(config.embed_dim).astype(config.dtype))


def _qkv(
  weights: Params, config: ModelConfig, h_BTD: jax.Array, rope: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  q_BTNH = layers.project(h_BTD, weights["q"])
  k_BTKH = layers.project(h_BTD, weights["k"])
  v_BTKH = layers.project(h_BTD, weights["v"])
  if config.qk_norm:
    q_BTNH, k_BTKH = layers.rms_norm(q_BTNH, weights["q_norm"]), layers.rms_norm(k_BTKH, weights["k_norm"])
  q_BTNH = (rope(q_BTNH) * config.query_scale).astype(h_BTD.dtype)
  q_BTNH = constrain(q_BTNH, ("activation_batch", None, "activation_heads", None), config.rules)
  return q_BTNH, rope(k_BTKH).astype(h_BTD.dtype), v_BTKH


def _angles(config: ModelConfig, kind: str, positions_BT: jax.Array) -> jax.Array:
  if kind == "local":
    return layers.rope_angles(positions_BT, config.head_dim, config.rope_base_local, 1.0)
  return layers.rope_angles(positions_BT, config.head_dim, config.rope_base_global, config.rope_scale_global)


def _add(config: ModelConfig, x_BTD: jax.Array, out_BTD: jax.Array, post_norm_D: jax.Array | None) -> jax.Array:
  out_BTD = out_BTD if post_norm_D is None else layers.rms_norm(out_BTD, post_norm_D)
  return _residual(config, x_BTD + out_BTD)


def _residual(config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
  return constrain(x_BTD, ("activation_batch", None, "activation_embed"), config.rules)


def _adapted(params: Params) -> Params:
  """The layers' parameters, with each adapted matrix as an `Adapted`."""
  weights = params["layers"]
  adapted = {
    # A is scaled before it is rounded to the activations' dtype.
    name: layers.Adapted(weights[name], params["lora_scale"] * adapter["a"], adapter["b"])
    for name, adapter in params.get("lora", {}).items()
  }
  return weights | adapted


def _cast(weight: jax.Array, config: ModelConfig) -> jax.Array:
  return weight.astype(config.dtype)
