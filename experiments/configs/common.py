"""Pieces that the configs share. A config is plain, locked and complete."""

import dataclasses
import math
from typing import Any

import ml_collections

from genrm_jax.model.config import get_config
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import make_format

# The most positions left out at random after these characters, in training only: see data/packing.with_gaps.
LIST_GAPS = {"0123456789": 10, "=;!?": 40}


def locked(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """A ConfigDict that takes no new keys."""
  return ml_collections.ConfigDict(values).lock()


def check_variant(variant: str, known: tuple[str, ...]) -> None:
  if variant not in known:
    raise UserError(f"unknown config variant {variant!r}; there are: {', '.join(known)}")


def start(init_from: str = "") -> dict[str, Any]:
  """What a model starts from, and the low-rank adapters on it (rank 0: none)."""
  return dict(init_from=init_from, lora=dict(rank=0, alpha=16.0, targets=("q", "k", "v", "attn_out"), save_frozen=True))


def training(
  *,
  num_steps: int,
  learning_rate: float,
  batch_size: int,
  row_length: int,
  init_from: str = "",
  drop_long: bool = False,
  weight_decay: float = 0.0,
  num_micro_batches: int = 1,
  remat: str = "none",
  eval_every: int = 0,
  save_every: int = 0,
  max_eval_rows: int = 0,
  best_by: str = "loss_verify",
  stop_at_loss: float = 0.0,
  smoke: bool = False,
) -> dict[str, Any]:
  """How one model is trained.

  The rows of a batch go through the model in `num_micro_batches` parts, one after another. Each step is that of the
  whole batch; memory is that of a part. `remat` (none, dots or layer) is what the backward pass recomputes.

  It is evaluated on at most `max_eval_rows` held-out rows (0: all) every `eval_every` steps and saved every
  `save_every` (0: as often as suits `num_steps` of a small model). The saved step with the least `best_by` ("loss",
  "loss_verify" or "loss_solve", on held-out rows) is the one that is used; training ends where that is not above
  `stop_at_loss`.

  `init_from` names the training whose best parameters it starts from ("": `model.checkpoint`, or random numbers). An
  example longer than a row is an error, or with `drop_long` left out and counted. With `lora.rank` above 0 only
  low-rank adapters are trained.
  """
  eval_every = 2 if smoke else eval_every or (100 if num_steps >= 200 else 20)
  save_every = 2 if smoke else save_every or eval_every
  return dict(
    **start(init_from),
    row_length=row_length,
    drop_long=drop_long,
    remat=remat,
    loop=dict(
      batch_size=batch_size,
      num_micro_batches=num_micro_batches,
      log_every_steps=math.gcd(20 if eval_every <= 100 else 50, eval_every),
      eval_every_steps=eval_every,
      save_every_steps=save_every,
      max_eval_rows=max_eval_rows,
      best_by=best_by,
      stop_at_loss=stop_at_loss,
    ),
    optim=dict(
      learning_rate=learning_rate,
      num_steps=num_steps,
      warmup_steps=min(num_steps // 10, 100),
      final_fraction=0.1,
      weight_decay=weight_decay,
      beta1=0.9,
      beta2=0.95,
      clip_norm=1.0,
    ),
  )


def verifier(
  *,
  max_problems: int = 0,
  max_per_label: int = 16,
  balanced: bool = True,
  max_rationales: int = 4,
  solve_weight: float = 0.0,
  **train: Any,
) -> dict[str, Any]:
  """How one verifier is trained: the paper's 16 + 16 solutions a problem, balanced; `solve_weight` is its lambda.

  `max_problems` keeps that many of the first problems (0: all).
  """
  return dict(
    max_problems=max_problems,
    max_per_label=max_per_label,
    balanced=balanced,
    max_rationales=max_rationales,
    solve_weight=solve_weight,
    **training(**train),
  )


def dpo(*, max_pairs: int = 8, beta: float = 0.1, **train: Any) -> dict[str, Any]:
  """How the DPO verifier is trained: at most `max_pairs` of a correct and an incorrect solution a problem."""
  return dict(max_problems=0, max_pairs=max_pairs, beta=beta, **training(**train))


def judge(max_new_tokens: int) -> dict[str, Any]:
  """LLM-as-a-Judge is not trained; it has not learnt to end either, so its rationales have a limit of their own."""
  return dict(max_new_tokens=max_new_tokens, **start())


def sampling(*, max_new_tokens: int, temperature: float) -> dict[str, Any]:
  return dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=0, top_p=1.0)


def engine(*, rows_per_batch: int, max_tokens: int, tensor: int = 1) -> dict[str, Any]:
  """How models are sampled from and score: each process by itself, on its own devices."""
  return dict(rows_per_batch=rows_per_batch, max_tokens=max_tokens, mesh=dict(data=-1, fsdp=1, tensor=tensor))


def model(
  *, size: str, dtype: str = "float32", checkpoint: str = "", overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
  """A Gemma of a size of genrm_jax/model/config.py, `overrides` in place of its fields.

  Where `checkpoint` names the folder of a Gemma checkpoint (released or Hugging Face), the model is that one, and
  `size` and `overrides` do not count. Activations are of `dtype`; parameters that are trained must be float32.
  `sharding` lays logical axes on mesh axes, activations' axes included.
  """
  rules = dict(get_config(size).rules)
  return dict(
    checkpoint=checkpoint, size=size, overrides=overrides or {}, dtype=dtype, param_dtype="float32", sharding=rules
  )


def tiny_model(smoke: bool, checkpoint: str = "") -> dict[str, Any]:
  """A tiny Gemma from scratch, or one that compiles and runs in no time."""
  widths = dict(num_layers=1, embed_dim=32, ffw_dim=64) if smoke else dict(num_layers=4, embed_dim=128, ffw_dim=256)
  return model(size="tiny_gemma1", checkpoint=checkpoint, overrides=widths)


def prompts(name: str) -> dict[str, str]:
  """Every template of a named format; each may be changed, as in --config.prompts.verify=TEXT."""
  return dataclasses.asdict(make_format(name))
