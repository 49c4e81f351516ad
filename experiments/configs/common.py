"""Building blocks of the configs."""

import dataclasses
import math
from typing import Any

import ml_collections

from genrm_jax.model.config import get_config
from genrm_jax.model.lora import TARGETS
from genrm_jax.runtime.errors import UserError
from genrm_jax.text.prompts import make_format

# Maximum random position gap after each of these characters, in training only; see data/packing.with_gaps.
LIST_GAPS = {"0123456789": 10, "=;!?": 40}


def locked(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """A ConfigDict that accepts no new keys."""
  return ml_collections.ConfigDict(values).lock()


def check_variant(variant: str, known: tuple[str, ...]) -> None:
  if variant not in known:
    raise UserError(f"unknown config variant {variant!r}; there are: {', '.join(known)}")


def start(init_from: str = "") -> dict[str, Any]:
  """Initialization of a model, and its low-rank adapters (rank 0: none)."""
  return dict(init_from=init_from, lora=dict(rank=0, alpha=16.0, targets=("q", "k", "v", "attn_out"), save_frozen=True))


def adapters(rank: int) -> dict[str, Any]:
  """Low-rank adapters of every matrix of the layers, saved without the weights that they adapt."""
  return dict(rank=rank, alpha=16.0, targets=tuple(TARGETS), save_frozen=False)


def training(
  *,
  num_steps: int,
  learning_rate: float,
  batch_size: int,
  row_length: int,
  init_from: str = "",
  drop_long: bool = False,
  weight_decay: float = 0.0,
  num_micro_batches: int = 0,
  remat: str = "auto",
  eval_every: int = 0,
  save_every: int = 0,
  max_eval_rows: int = 0,
  best_by: str = "loss_verify",
  stop_at_loss: float = 0.0,
  smoke: bool = False,
) -> dict[str, Any]:
  """How one model is trained.

  Args:
    num_steps: optimizer steps.
    learning_rate: peak; warmup and decay follow from `num_steps`.
    batch_size: packed rows per step.
    row_length: tokens per packed row.
    init_from: the model of this run whose best step training starts from; "" means `model.checkpoint` or random.
    drop_long: drop and count examples longer than a row; otherwise they are an error.
    weight_decay: AdamW; norm scales are not decayed.
    num_micro_batches: parts of a batch that are processed in turn, which saves memory; a step is still one update. 0:
      as many as the size of the logits asks for (training/sizes.py).
    remat: what the backward pass recomputes: "none", "dots", "layer", or "auto", which chooses by size.
    eval_every: steps between evaluations on held-out rows; 0 chooses a value for small models.
    save_every: steps between checkpoints, a multiple of `eval_every`; 0 means `eval_every`.
    max_eval_rows: held-out rows per evaluation; 0 means all.
    best_by: the step with the lowest of this held-out metric is used: "loss", "loss_verify" or "loss_solve".
    stop_at_loss: training ends once that metric is at most this value.
    smoke: evaluate and save every two steps.
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
  """How one verifier is trained: on 16 correct and 16 incorrect solutions per problem, as in the paper.

  Args:
    max_problems: train on the first `max_problems` problems; 0 means all.
    max_per_label: solutions per problem and label.
    balanced: as many correct as incorrect solutions.
    max_rationales: rationales per solution (GenRM-CoT); 0 means to train on solutions only.
    solve_weight: the paper's lambda.
    **train: arguments of `training`.
  """
  return dict(
    max_problems=max_problems,
    max_per_label=max_per_label,
    balanced=balanced,
    max_rationales=max_rationales,
    solve_weight=solve_weight,
    **training(**train),
  )


def orm(*, z_loss: float = 1e-4, every_token: bool = False, **settings: Any) -> dict[str, Any]:
  """How the ORM is trained: as `verifier`, with the paper's z-loss, weighted by `z_loss` (appendix B).

  With `every_token`, each token of the solution predicts the label, and not only the last one of the prompt.
  """
  return dict(z_loss=z_loss, every_token=every_token, **verifier(**settings))


def genrm_cot(*, min_agreement: float = 0.5, **settings: Any) -> dict[str, Any]:
  """How GenRM-CoT is trained on sampled rationales: as `verifier`, but only on some solutions.

  Of these, more than the share `min_agreement` of the rationales agree with the label (paper, appendix C); 0: on all.
  """
  return dict(min_agreement=min_agreement, **verifier(**settings))


def dpo(*, max_pairs: int = 8, beta: float = 0.1, **train: Any) -> dict[str, Any]:
  """How the DPO verifier is trained: on up to `max_pairs` pairs of a correct and an incorrect solution per problem."""
  return dict(max_problems=0, max_pairs=max_pairs, beta=beta, **training(**train))


def dpo_reference(*, init_from: str = "", beta: float = 0.1, of: str = "dpo") -> dict[str, Any]:
  """The score of the DPO verifier `of` with its reference, the model that it starts from, beside its likelihood."""
  return dict(of=of, beta=beta, **start(init_from))


def judge(max_new_tokens: int) -> dict[str, Any]:
  """LLM-as-a-Judge: not trained. Untrained models rarely end a rationale, so its length is limited separately."""
  return dict(max_new_tokens=max_new_tokens, **start())


def greedy(of: str = "genrm_cot") -> dict[str, Any]:
  """The trained GenRM-CoT `of` with one greedy rationale per solution, beside its votes (paper, figure 11)."""
  return start(of)


def sampling(*, max_new_tokens: int, temperature: float) -> dict[str, Any]:
  return dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=0, top_p=1.0)


def engine(*, rows_per_batch: int, max_tokens: int, tensor: int = 1) -> dict[str, Any]:
  """Inference settings; each process samples and scores on its local devices."""
  return dict(rows_per_batch=rows_per_batch, max_tokens=max_tokens, mesh=dict(data=-1, fsdp=1, tensor=tensor))


def model(
  *,
  size: str,
  dtype: str = "float32",
  param_dtype: str = "float32",
  checkpoint: str = "",
  overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """A Gemma.

  Args:
    size: a name in genrm_jax/model/config.py; it also sets the default sharding rules.
    dtype: of activations.
    param_dtype: of parameters; training requires float32, except of weights that only adapters change.
    checkpoint: folder of a Gemma checkpoint (released or Hugging Face); then `size` and `overrides` have no effect.
    overrides: fields of the model config to change.
  """
  rules = dict(get_config(size).rules)
  return dict(
    checkpoint=checkpoint,
    size=size,
    overrides=overrides or {},
    dtype=dtype,
    param_dtype=param_dtype,
    sharding=rules,
  )


def gemma3_270m() -> dict[str, Any]:
  """The pretrained Gemma 3 270M in bfloat16, to be adapted."""
  return model(size="gemma3_270m", checkpoint="gemma3_270m", dtype="bfloat16", param_dtype="bfloat16")


def tiny_model(smoke: bool, checkpoint: str = "") -> dict[str, Any]:
  """A tiny Gemma from scratch; even smaller for smoke tests."""
  widths = dict(num_layers=1, embed_dim=32, ffw_dim=64) if smoke else dict(num_layers=4, embed_dim=128, ffw_dim=256)
  return model(size="tiny_gemma1", checkpoint=checkpoint, overrides=widths)


def prompts(name: str) -> dict[str, str]:
  """All templates of a named format; each can be overridden, as in --config.prompts.verify=TEXT."""
  return dataclasses.asdict(make_format(name))
