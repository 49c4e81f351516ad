"""Gemma 1, 2 and 3 as pure functions: parameters are declared once, `forward` is one scan over the layers.

Einsum legend: B batch, T query index, S key index, L layers, N query heads, K kv heads, H head dim, D model width,
F ffw width, V vocabulary. In array names, A is the kinds of layers that the model has: local, global or both.

With h = rms_norm(x), a layer is

    x = x + post(attention(h) attn_out)        q = query_scale * rope(norm(h q)),  k = rope(norm(h k)),  v = h v
    x = x + post(gelu(h gate) * (h up) down)   post: a norm, or nothing (post_norms); norm: over H, or nothing (qk_norm)

and logits = soft_cap(rms_norm(x) E^T), with E the embedding that the tokens came from.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from genrm_jax.model import attention, layers
from genrm_jax.model import cache as kv_cache
from genrm_jax.model.config import LAYER_KINDS, ModelConfig
from genrm_jax.pytrees import KVCache
from genrm_jax.runtime.sharding import FREE, constrain

Params = dict[str, Any]
Remat = Literal["none", "dots", "layer"]
Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter: its shape, the logical axis of every dimension, and its initialiser (key, shape, dtype) -> array."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: Initializer


def param_specs(config: ModelConfig) -> dict[str, Any]:
  """Every parameter as a tree of ParamSpec; those of the layers are stacked along a leading L axis."""
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

  def spec(*axes: str, init: Initializer) -> ParamSpec:
    return ParamSpec(tuple(sizes[axis] for axis in axes), axes, init)

  def dense(*axes: str, fan_in: int) -> ParamSpec:
    return spec("layers", *axes, init=jax.nn.initializers.normal(fan_in**-0.5))

  def norm(*axes: str) -> ParamSpec:
    return spec(*axes, init=jax.nn.initializers.zeros)

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
  # Rows of length about 1: times sqrt(D) they enter the residual stream, and as the output layer they give logits, at
  # unit scale.
  embedding = spec("vocab", "embed", init=jax.nn.initializers.normal(c.embed_dim**-0.5))
  return {"embedder": {"input_embedding": embedding}, "layers": per_layer, "final_norm": norm("embed")}


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Random parameters in `config.param_dtype`."""
  return init_specs(param_specs(config), key, config.param_dtype)


def init_specs(specs: Any, key: jax.Array, dtype: str) -> Any:
  """Arrays for a tree of ParamSpec. A parameter's numbers depend on the key and its own name only."""

  def make(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return spec.init(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, dtype)

  return jax.tree_util.tree_map_with_path(make, specs)


def num_params(config: ModelConfig) -> tuple[int, int]:
  """(parameters of the embedding, all the others), counted from the shapes."""
  specs = param_specs(config)
  total = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs))
  embedding = math.prod(specs["embedder"]["input_embedding"].shape)
  return embedding, total - embedding


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

  Without a cache, rows are packed: a token sees the tokens of its own segment up to itself. With a cache, a row is one
  sequence: its new tokens are appended at `cache.length[b]` and see all that the row holds. Prefill and decode are the
  same call, with T the width of the prompts or 1:

      cache.length 0 3      segments 1 1 1 1      slots written 0 1 2 3      length after 4 5
                                     1 1 0 0                    3 4 - -

  Args:
    params: as `param_specs` declares them, in any float dtype; cast to `config.dtype` where they are used. With
      low-rank adapters among them (model/lora.py), these act beside the matrices that they belong to.
    config: the model.
    tokens_BT: i32[B, T].
    positions_BT: i32[B, T], for RoPE and windows; they may have gaps, and never decide the order.
    segments_BT: i32[B, T], 0 is padding. With a cache only 0 or not 0 matters, and padding follows the real tokens.
    cache: what the rows hold so far. It must have room: tokens beyond its end are lost, and `length > S` shows it.
    remat: what the backward pass computes again. "none": nothing, all that it reads is kept. "dots": all but the matrix
      products with weights, which are kept. "layer": everything within a layer; only the residual stream is kept.

  Returns:
    x_BTD in `config.dtype` (finite but meaningless at padding), and the cache with the new tokens, or None.
  """
  kinds = tuple(kind for kind in LAYER_KINDS if kind in config.layer_kinds)
  windows = tuple(config.window if kind == "local" else None for kind in kinds)
  if cache is None:
    slots_BT = None
    masks = [layers.packed_mask(positions_BT, segments_BT, window) for window in windows]
  else:
    slots_BT = kv_cache.slots(cache, segments_BT)
    key_positions_BS = kv_cache.write_positions(cache.positions, positions_BT, slots_BT)
    masks = [layers.cached_mask(slots_BT, positions_BT, key_positions_BS, window) for window in windows]
  angles = [_angles(config, kind, positions_BT) for kind in kinds]
  # One mask and one set of angles for each kind of layer, made once; a layer picks its own by number.
  masks_ABTS, cos_ABTH, sin_ABTH = jnp.stack(masks), jnp.cos(jnp.stack(angles)), jnp.sin(jnp.stack(angles))

  def body(carry: Any, scanned: Any) -> tuple[Any, None]:
    x_BTD, k_buffer, v_buffer = carry
    weights, index, kind = scanned
    rope = functools.partial(layers.apply_rope, cos_BTH=cos_ABTH[kind], sin_BTH=sin_ABTH[kind])
    h_BTD = layers.rms_norm(x_BTD, weights["pre_attention_norm"])
    q_BTNH, k_BSKH, v_BSKH = _qkv(weights, config, h_BTD, rope)
    if slots_BT is not None:
      # The cache rides in the carry and not in the scanned inputs and outputs, which would copy it at every step.
      k_buffer = kv_cache.write(k_buffer, k_BSKH, index, slots_BT)
      v_buffer = kv_cache.write(v_buffer, v_BSKH, index, slots_BT)
      k_BSKH, v_BSKH = k_buffer[index], v_buffer[index]
      attended_BTNH = layers.attention(q_BTNH, k_BSKH, v_BSKH, masks_ABTS[kind], config.attn_softcap)
    else:
      attended_BTNH = attention.packed(
        q_BTNH, k_BSKH, v_BSKH, masks_ABTS, kind, segments_BT, windows, config.attn_softcap
      )
    out_BTD = layers.project(attended_BTNH, weights["attn_out"], num_axes=2)
    x_BTD = _add(x_BTD, out_BTD, weights.get("post_attention_norm"))
    h_BTD = layers.rms_norm(x_BTD, weights["pre_ffw_norm"])
    hidden_BTF = layers.gate_mlp(h_BTD, weights["gate"], weights["up"])
    hidden_BTF = constrain(hidden_BTF, "batch", None, FREE)
    out_BTD = layers.project(hidden_BTF, weights["down"])
    x_BTD = _add(x_BTD, out_BTD, weights.get("post_ffw_norm"))
    return (x_BTD, k_buffer, v_buffer), None

  if remat != "none":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # A scan keeps forward and backward apart, so the guard against common subexpressions would only cost time.
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
  kind_L = jnp.array([kinds.index(kind) for kind in config.layer_kinds], jnp.int32)
  scanned = (_adapted(params), jnp.arange(config.num_layers, dtype=jnp.int32), kind_L)
  buffers = (None, None) if cache is None else (cache.k, cache.v)
  (x_BTD, k_LBSKH, v_LBSKH), _ = jax.lax.scan(body, (_embed(params, config, tokens_BT), *buffers), scanned)
  x_BTD = layers.rms_norm(x_BTD, params["final_norm"])
  if cache is None:
    return x_BTD, None
  length_B = cache.length + jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
  return x_BTD, KVCache(k=k_LBSKH, v=v_LBSKH, positions=key_positions_BS, length=length_B)


def as_used(params: Params, config: ModelConfig) -> Params:
  """The parameters in the dtype in which `forward` and `unembed` use them, for less memory and the same numbers.

  The given buffers are given over. Norms are used in float32 and stay what they are.
  """

  def cast(path: tuple[Any, ...], weight: jax.Array) -> jax.Array:
    return weight if "norm" in jax.tree_util.keystr(path) else _cast(weight, config)

  return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(cast, tree), donate_argnums=0)(params)


def unembed(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
  """Logits f32[..., V] of hidden states [..., D] as `forward` returns them, soft-capped where the model does so."""
  table_VD = _cast(params["embedder"]["input_embedding"], config)
  logits = layers.einsum_to_float32("...D,VD->...V", x.astype(config.dtype), table_VD)
  return layers.soft_cap(logits, config.final_softcap)


def _embed(params: Params, config: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
  # Rows are looked up in a table that is whole along D: a lookup in columns would leave the tokens of all batch shards
  # on every shard, and the compiler no good way back to rows.
  table_VD = constrain(params["embedder"]["input_embedding"], FREE, None)
  x_BTD = _cast(table_VD[tokens_BT], config)
  # The released weights were trained with this factor rounded to the activations' dtype.
  return constrain(x_BTD * jnp.sqrt(config.embed_dim).astype(config.dtype), "batch", None, None)


def _qkv(
  weights: Params, config: ModelConfig, h_BTD: jax.Array, rope: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  q_BTNH = layers.project(h_BTD, weights["q"])
  k_BTKH = layers.project(h_BTD, weights["k"])
  v_BTKH = layers.project(h_BTD, weights["v"])
  if config.qk_norm:
    q_BTNH, k_BTKH = layers.rms_norm(q_BTNH, weights["q_norm"]), layers.rms_norm(k_BTKH, weights["k_norm"])
  q_BTNH = constrain((rope(q_BTNH) * config.query_scale).astype(h_BTD.dtype), "batch", None, FREE, None)
  return q_BTNH, rope(k_BTKH).astype(h_BTD.dtype), v_BTKH


def _angles(config: ModelConfig, kind: str, positions_BT: jax.Array) -> jax.Array:
  if kind == "local":
    return layers.rope_angles(positions_BT, config.head_dim, config.rope_base_local, 1.0)
  return layers.rope_angles(positions_BT, config.head_dim, config.rope_base_global, config.rope_scale_global)


def _add(x_BTD: jax.Array, out_BTD: jax.Array, post_norm_D: jax.Array | None) -> jax.Array:
  out_BTD = out_BTD if post_norm_D is None else layers.rms_norm(out_BTD, post_norm_D)
  return constrain(x_BTD + out_BTD, "batch", None, None)


def _adapted(params: Params) -> Params:
  """The layers' parameters, each matrix that has an adapter together with it."""
  weights = params["layers"]
  adapted = {
    # The scale goes into A before A is rounded to the activations' dtype.
    name: layers.Adapted(weights[name], params["lora_scale"] * adapter["a"], adapter["b"])
    for name, adapter in params.get("lora", {}).items()
  }
  return weights | adapted


def _cast(weight: jax.Array, config: ModelConfig) -> jax.Array:
  return weight.astype(config.dtype)
