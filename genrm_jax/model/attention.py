"""Attention of packed rows: splash attention on TPUs where it is faster, else `layers.attention`, to the same numbers.

On a TPU, rows of at least `_KERNEL_FROM` tokens go through splash attention (Pallas), which keeps the T x T logits in
fast on-chip memory and skips blocks that are fully masked. The choice is made when the program is lowered, so compiling
for an absent TPU chooses as that TPU would.

Axis letters: B batch, T query, S key, N query heads, K kv heads, H head dim, A kinds of layers.
"""

import functools
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from genrm_jax.model import layers
from genrm_jax.model.config import ModelConfig
from genrm_jax.runtime.sharding import Rules

_KERNEL_FROM = 1024  # tokens per row
_LANES = 128  # the kernel needs T and H to be multiples of it


def packed(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  masks_ABTS: jax.Array,
  kind: jax.Array,
  segments_BT: jax.Array,
  windows_A: Sequence[int | None],
  config: ModelConfig,
) -> jax.Array:
  """Attention within the segments of packed rows, [B, T, N, H].

  The kernel measures windows in tokens, the masks in positions; they agree where positions have no gaps. The two paths
  differ at padding, where the result has no meaning.

  Args:
    q_BTNH: pre-scaled; RoPE has been applied to q and k.
    k_BTKH: keys.
    v_BTKH: values.
    masks_ABTS: `layers.packed_mask` per kind of layer.
    kind: i32[], this layer's kind as an index into `masks_ABTS` and `windows_A`.
    segments_BT: i32[B, T], 0 is padding.
    windows_A: window per kind of layer, None for a global one.
    config: for its soft-cap and its sharding rules.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  softcap = config.attn_softcap

  def plain(q, k, v):
    k_BKTH, v_BKTH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return layers.attention(q, k_BKTH, v_BKTH, masks_ABTS[kind], softcap)

  def kernel(q, k, v):
    # A window as long as the row masks nothing.
    kinds = [None if window is None or window >= T else window for window in windows_A]
    branches = [
      functools.partial(splash_attention, window=window, softcap=softcap, rules=config.rules) for window in kinds
    ]
    if len(set(kinds)) == 1:
      return branches[0](q, k, v, segments_BT)
    return jax.lax.switch(kind, branches, q, k, v, segments_BT)

  if T < _KERNEL_FROM or T % _LANES or H % _LANES:
    return plain(q_BTNH, k_BTKH, v_BTKH)
  return jax.lax.platform_dependent(q_BTNH, k_BTKH, v_BTKH, tpu=kernel, default=plain)


def splash_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  *,
  window: int | None,
  softcap: float | None,
  rules: Rules,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention within segments by the Pallas kernel, under the current mesh if one is set.

  Args:
    q_BTNH: T and H are multiples of 128.
    k_BTKH: keys.
    v_BTKH: values.
    segments_BT: i32[B, T].
    window: how many tokens a query sees, its own included; None for all tokens up to its own.
    softcap: of the logits.
    rules: sharding rules.
    interpret: run the kernel on any device, slowly.
  """
  # Imported lazily: the import takes a quarter of a second.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  def on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    q_BNTH, k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    kernel = _kernel(q_BNTH.shape[1], q_BNTH.shape[2], window, softcap, interpret)
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(segments_BT, segments_BT))
    return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)

  if jax.sharding.get_abstract_mesh().empty:
    return on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT)
  batch = rules["activation_batch"]
  q_spec = PartitionSpec(batch, None, rules["activation_heads"], None)
  kv_spec = PartitionSpec(batch, None, rules["activation_kv_heads"], None)
  specs = (q_spec, kv_spec, kv_spec, PartitionSpec(batch, None))
  return jax.shard_map(on_shard, in_specs=specs, out_specs=q_spec, check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _kernel(num_heads: int, num_tokens: int, window: int | None, softcap: float | None, interpret: bool):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  size = next(size for size in (512, 256, 128) if num_tokens % size == 0)
  shape = (num_tokens, num_tokens)
  mask = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
  blocks = splash.BlockSizes(
    block_q=size,
    block_kv=size,
    block_kv_compute=size,
    block_q_dkv=size,
    block_kv_dkv=size,
    block_kv_dkv_compute=size,
    use_fused_bwd_kernel=True,
  )
  return splash.make_splash_mha(
    splash_mask.MultiHeadMask([mask] * num_heads),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )
