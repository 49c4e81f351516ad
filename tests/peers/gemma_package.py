"""Tiny random models of the `gemma` package, their checkpoints and their logits.

`make` needs the package, which requires Python 3.12; `CASES` does not.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from genrm_jax.model.config import ModelConfig, get_config

T = 24


class Case(NamedTuple):
  """A model and the form of its checkpoint: flat keys, as released, or nested; gate and up weights F D or D F."""

  config: ModelConfig
  flat: bool
  transposed: bool = False
  images: bool = False  # with an image encoder
  query_norm: str = "BY_ONE_OVER_SQRT_HEAD_DIM"


def _config(name: str, like: str, **fields: Any) -> ModelConfig:
  sizes = {"vocab_size": 64, "embed_dim": 24, "num_heads": 4, "head_dim": 8, "ffw_dim": 40, "query_scale": 8**-0.5}
  return dataclasses.replace(get_config(like, **sizes | fields), name=name)


# Caps are small enough to affect logits of this size, windows are shorter than the rows, and gemma_2 scales queries by
# the width per head, like Gemma 2 27B.
_CAPS: dict[str, Any] = {"attn_softcap": 2.0, "final_softcap": 4.0, "query_scale": 6**-0.5}
CASES = {
  "gemma_1_mqa": Case(_config("gemma_1_mqa", "tiny_gemma1", num_layers=3, num_kv_heads=1), flat=True),
  "gemma_1_mha": Case(_config("gemma_1_mha", "tiny_gemma1", num_layers=2, num_kv_heads=4), flat=False),
  "gemma_2": Case(
    _config("gemma_2", "tiny_gemma2", num_layers=4, num_kv_heads=2, window=6, **_CAPS),
    flat=True,
    transposed=True,
    query_norm="BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS",
  ),
  "gemma_3": Case(
    _config("gemma_3", "tiny_gemma3", num_layers=7, num_kv_heads=2, window=6, rope_scale_global=8.0),
    flat=True,
    transposed=True,
    images=True,
  ),
}


def make(case_name: str, folder: pathlib.Path) -> None:
  """Writes folder/checkpoint, saved by the package, and folder/logits.npz: tokens [B, T], logits [B, T, V].

  Padding is token 0; the rows have none, some on the right, some on the left, and much on the right.
  """
  from gemma import gm
  from gemma.gm.ckpts import _checkpoint

  case = CASES[case_name]
  model, params = random_model(case)
  tree = params if not case.flat else _checkpoint._nested_to_flat(params)
  checkpoint = folder.absolute() / "checkpoint"
  gm.ckpts.save_params(tree, checkpoint, wait_until_finished=True)
  (checkpoint / "commit_success.txt").unlink()  # it holds only a local path
  tokens = np.random.default_rng(1).integers(1, case.config.vocab_size, (4, T)).astype(np.int32)
  tokens[1, -7:] = 0
  tokens[2, :5] = 0
  tokens[3, 3:] = 0
  np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits(model, params, tokens))


def logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
  """Logits of the package, f32[B, T, V]; it derives positions and masks from padding (token 0)."""
  return np.asarray(model.apply({"params": params}, tokens).logits)


def random_model(case: Case) -> tuple[Any, Any]:
  """(module of the package, float32 parameters at natural scale, with norm scales that are not 0)."""
  import jax
  import jax.numpy as jnp
  from gemma import gm

  model = gm.nn.Transformer(config=_their_config(case), dtype=jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, T), jnp.int32))["params"]
  rng = np.random.default_rng(0)

  def fill(path: Any, leaf: Any) -> jax.Array:
    return jnp.asarray(rng.normal(scale=_std(path[-2].key, path[-1].key, leaf.shape, case), size=leaf.shape), "float32")

  return model, jax.tree_util.tree_map_with_path(fill, shapes)


def _std(module: str, leaf: str, shape: tuple[int, ...], case: Case) -> float:
  if leaf in ("scale", "bias"):
    return 0.3
  if leaf == "input_embedding":
    return 2 * case.config.embed_dim**-0.5
  if module == "attn_vec_einsum":
    return (shape[0] * shape[1]) ** -0.5
  fan_in = shape[-1] if leaf == "gating_einsum" and case.transposed else shape[-2]
  return fan_in**-0.5


def _their_config(case: Case) -> Any:
  from gemma.gm.nn import _config as theirs
  from gemma.gm.nn import _modules
  from gemma.gm.nn.vision import _vision, _vision_utils

  kinds = {"local": _modules.AttentionType.LOCAL_SLIDING, "global": _modules.AttentionType.GLOBAL}
  images = _vision.SigLiPFromPatches(
    siglip_encoder=_vision_utils.ViTModel(patch_size=(2, 2), width=8, depth=1, mlp_dim=8, num_heads=1),
    siglip_exit=_vision.VisionExit(output_length=4),
    num_mm_tokens_per_image_prepool=4,
    num_mm_tokens_per_image=4,
    image_height=4,
    image_width=4,
  )
  c = case.config
  return theirs.TransformerConfig(
    num_embed=c.vocab_size,
    embed_dim=c.embed_dim,
    hidden_dim=c.ffw_dim,
    num_heads=c.num_heads,
    head_dim=c.head_dim,
    num_kv_heads=c.num_kv_heads,
    final_logit_softcap=c.final_softcap,
    use_post_attn_norm=c.post_norms,
    use_post_ffw_norm=c.post_norms,
    attention_types=tuple(kinds[kind] for kind in c.layer_kinds),
    query_pre_attn_norm=theirs.QueryPreAttentionNormalisation[case.query_norm],
    attn_logits_soft_cap=c.attn_softcap,
    sliding_window_size=c.window,
    transpose_gating_einsum=case.transposed,
    use_qk_norm=c.qk_norm,
    local_base_frequency=int(c.rope_base_local),
    global_base_frequency=int(c.rope_base_global),
    global_scale_factor=c.rope_scale_global,
    vision_encoder=images if case.images else None,
  )
