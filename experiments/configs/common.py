"""Pieces that the configs share. A config is plain, locked and complete."""

from typing import Any

import ml_collections

from genrm_jax.runtime.errors import UserError

# The most positions left out at random after these characters, in training only: see data/batches.with_gaps.
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
  evaluate_every: int = 0,
  stop_at_loss: float = 0.0,
  smoke: bool = False,
) -> dict[str, Any]:
  """How one model is trained.

  The rows of a batch go through the model in `num_micro_batches` parts, one after another. Each step is that of the
  whole batch; memory is that of a part. `remat` (none, dots or layer) is what the backward pass computes again.

  It is evaluated on held-out rows and saved every `evaluate_every` steps (0: as often as suits `num_steps`), and
  training ends there when their loss is not above `stop_at_loss`.

  `init_from` names the run whose best parameters it starts from ("": `model.checkpoint`, or random numbers). An example
  longer than a row is an error, or with `drop_long` left out and counted. With `lora.rank` above 0 only low-rank
  adapters are trained.
  """
  return dict(
    **start(init_from),
    row_length=row_length,
    drop_long=drop_long,
    remat=remat,
    loop=dict(
      batch_size=batch_size,
      num_micro_batches=num_micro_batches,
      log_every_steps=2 if smoke else evaluate_every or 20,
      save_every_steps=2 if smoke else evaluate_every or (100 if num_steps >= 200 else 20),
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


def tiny_model(smoke: bool) -> dict[str, Any]:
  """A tiny Gemma from scratch, or one that compiles and runs in no time.

  Where `checkpoint` names the folder of a Gemma checkpoint (released or of Hugging Face), the model is that one, and
  `size` and `overrides` do not count.
  """
  widths = dict(num_layers=1, embed_dim=32, ffw_dim=64) if smoke else dict(num_layers=4, embed_dim=128, ffw_dim=256)
  return dict(checkpoint="", size="tiny_gemma1", overrides=widths, dtype="float32", param_dtype="float32")
