"""Attention of packed rows: a kernel where TPUs have one that pays, else `layers.attention`; the numbers are the same.

On a TPU, rows of `_KERNEL_FROM` tokens and more go through splash attention (Pallas), which keeps the T x T logits in
the chip's fast memory and skips blocks that the mask leaves empty. Which of the two is chosen when the program is
lowered, so a compiler for a TPU that is not there chooses as the TPU would.

Einsum legend: B batch, T query index, S key index, N query heads, K kv heads, H head dim, A kinds of layers.
"""

import functools
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from genrm_jax.model import layers
from genrm_jax.runtime.sharding import DEFAULT_RULES, rules_for

_KERNEL_FROM = 1024  # tokens of a row
_LANES = 128  # the kernel takes head dims that are multiples of it


def packed(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  masks_ABTS: jax.Array,
  kind: jax.Array,
  segments_BT: jax.Array,
  windows_A: Sequence[int | None],
  softcap: float | None,
) -> jax.Array:
  """Attention within the segments of packed rows, [B, T, N, H].

  The kernel counts a window in tokens, the masks in positions: they agree where positions have no gaps. At padding the
  two differ; what is there has no meaning.

  Args:
    q_BTNH: scaled and turned queries.
    k_BTKH: turned keys.
    v_BTKH: values.
    masks_ABTS: layers.packed_mask for each kind of layer.
    kind: which of them this layer is, i32[].
    segments_BT: i32.
    windows_A: of each kind of layer.
    softcap: of the logits.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]

  def plain(q, k, v):
    return layers.attention(q, k, v, masks_ABTS[kind], softcap)

  def kernel(q, k, v):
    # A window that holds the whole row is none.
    kinds = [None if window is None or window >= T else window for window in windows_A]
    branches = [functools.partial(splash_attention, window=window, softcap=softcap) for window in kinds]
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
  interpret: bool = False,
) -> jax.Array:
  """Causal attention within segments by the kernel, under the mesh that is set, if one is.

  Args:
    q_BTNH: T is a multiple of 128, and so is H.
    k_BTKH: keys.
    v_BTKH: values.
    segments_BT: i32.
    window: how many tokens a query sees, itself among them; None for all before it.
    softcap: of the logits.
    interpret: run the kernel on any device, slowly.
  """
  # Imported where it is used: it takes a quarter of a second.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  num_kv_heads = k_BTKH.shape[2]

  def on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    q_BNTH, k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    kernel = _kernel(q_BNTH.shape[1], q_BNTH.shape[2], window, softcap, interpret)
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(segments_BT, segments_BT))
    return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)

  if jax.sharding.get_abstract_mesh().empty:
    return on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT)
  batch, heads = DEFAULT_RULES["batch"], DEFAULT_RULES["heads"]
  of_q = PartitionSpec(batch, None, heads, None)
  of_kv = PartitionSpec(batch, None, rules_for(num_kv_heads)["kv_heads"], None)
  specs = (of_q, of_kv, of_kv, PartitionSpec(batch, None))
  return jax.shard_map(on_shard, in_specs=specs, out_specs=of_q, check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segments_BT)


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
