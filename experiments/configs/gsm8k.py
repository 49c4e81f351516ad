"""GSM8K on the released solutions and rationales.

MODEL       gemma_2b, gemma_7b or gemma2_9b, the paper's setting, for a TPU: every verifier of its tables. It needs
            --config.data_dir, --config.model.checkpoint=GEMMA and --config.tokenizer.path=tokenizer.model
MODEL_KIND  one of them alone: judge, dpo, orm, genrm, genrm_cot (these two without the solution part) or unified (both
            learn to solve as well, as in MODEL)
small       hours on 2 CPU cores: the largest Gemma from scratch that is worth it there; needs --config.data_dir
tiny        about 15 minutes on 2 CPU cores: a small Gemma from scratch; needs --config.data_dir
smoke       the same stages in a minute on made-up data with models that learn nothing; for tests
"""

from typing import Any

import ml_collections

from experiments.configs import common
from genrm_jax.runtime.errors import UserError

MODELS = ("gemma_2b", "gemma_7b", "gemma2_9b")
KINDS = ("judge", "dpo", "orm", "genrm", "genrm_cot", "unified")

# Tokens, measured on the release with a SentencePiece model of 32,000 pieces (median, 99%, largest):
#   solution 94, 250, 410    problem and solution, asked directly 298, 490, 700
#   rationale 208, 466, 615  problem, solution and rationale 507, 846, 1,086
# Gemma's tokenizer writes each digit as a piece of its own, so there is room for half as much again. What is longer is
# left out of training and counted.
_DIRECT_ROW, _COT_ROW, _RATIONALE = 1024, 2048, 768


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The config of a variant."""
  if variant in ("tiny", "smoke"):
    return common.locked(_tiny(variant == "smoke"))
  if variant == "small":
    return common.locked(_small())
  for model in MODELS:
    if variant == model:
      return common.locked(_paper(variant, model, ("judge", "dpo", "orm", "unified")))
    if variant.startswith(f"{model}_") and variant.removeprefix(f"{model}_") in KINDS:
      return common.locked(_paper(variant, model, (variant.removeprefix(f"{model}_"),)))
  models = (name for model in MODELS for name in (model, *(f"{model}_{kind}" for kind in KINDS)))
  known = ("small", "tiny", "smoke", *models)
  raise UserError(f"unknown config variant {variant!r}; there are: {', '.join(known)}")


def _task(**changes: Any) -> dict[str, Any]:
  return (
    dict(
      name="gsm8k",
      problems="files",  # of data_dir, or "tfds"
      rounds=(0, 1, 2, 3),  # of raw rationales; each has one to a solution
      direct_set=True,  # train on the solutions of the Yes/No set too
      num_train=0,  # problems; 0: all that are left
      num_val=128,
      num_eval=256,
      eval_candidates=16,  # a problem, drawn from its pool
      candidates="",  # a file of someone's own solutions, to be evaluated in place of the held-out pools
      made_up=0,  # problems of a made-up release, in place of data_dir
    )
    | changes
  )


def _grader(max_new_tokens: int, num_rationales: int, init_from: str = "") -> dict[str, Any]:
  """Where training rationales come from: the release, or (`way` reference or plain) a grader of our own.

  The grader is the model that `init_from` or `model.checkpoint` names.
  """
  return dict(
    way="released",
    reading="lenient-2",  # how a verdict is found in a raw rationale (data/verdict_reading.py)
    drop_leaks=False,  # drop rationales that name the reference solution
    max_per_label=16,
    num_rationales=num_rationales,
    sample=common.sampling(max_new_tokens=max_new_tokens, temperature=0.7),
    **common.start(init_from),
  )


def _paper(variant: str, model: str, kinds: tuple[str, ...]) -> dict[str, Any]:
  """The paper's setting where it is known (section 4, appendices A and B), else our choice, marked so."""

  def training(learning_rate: float, row_length: int, num_steps: int) -> dict[str, Any]:
    return dict(
      learning_rate=learning_rate,
      num_steps=num_steps,  # ours: about three times the direct set, twice the rationales; the best step is used
      batch_size=16,  # ours: rows of several examples, 55 (direct) to 64 (with rationales) a batch; the paper has 64
      row_length=row_length,
      drop_long=True,
      remat="dots",
      weight_decay=1e-2,
      # Ours: an evaluation takes as long as some ten steps, and a checkpoint of 2B parameters with moments is 30 GB.
      eval_every=250,
      save_every=1000,
      max_eval_rows=256,
    )

  solve_weight = 0.25 if "unified" in kinds else 0.0
  verifiers: dict[str, dict[str, Any]] = dict(
    judge=common.judge(max_new_tokens=_RATIONALE),
    dpo=common.dpo(beta=0.1, **training(1e-6, _COT_ROW, 6_000)),
    # At most 16 + 16 solutions a problem, and as many right ones as wrong: the defaults of common.verifier.
    orm=common.verifier(**training(1e-7, _DIRECT_ROW, 6_000)),
    genrm=common.verifier(solve_weight=solve_weight, **training(2e-6, _DIRECT_ROW, 6_000)),
    genrm_cot=common.verifier(max_rationales=4, solve_weight=solve_weight, **training(2e-6, _COT_ROW, 10_000)),
  )
  wanted = {name for kind in kinds for name in (("genrm", "genrm_cot") if kind == "unified" else (kind,))}
  return dict(
    variant=variant,
    seed=0,
    data_dir="",
    task=_task(),
    grader=_grader(_RATIONALE, num_rationales=4),
    tokenizer=dict(type="sentencepiece", path=""),
    prompts=common.prompts("genrm"),
    model=common.model(size=model, dtype="bfloat16"),
    cpu_devices=1,
    mesh=dict(data=1, fsdp=-1, tensor=1),
    verifiers={name: settings for name, settings in verifiers.items() if name in wanted},
    votes=dict(num_votes=32, sample=common.sampling(max_new_tokens=_RATIONALE, temperature=0.7)),
    # Ours: a prompt of at most 700 tokens, a rationale, and room. Four chips hold a large model and its cache together:
    # a token of the cache takes 18 KiB of Gemma 2B, which has one kv head, 448 KiB of 7B and 336 KiB of Gemma 2 9B.
    engine=common.engine(rows_per_batch=256, max_tokens=2048)
    if model == "gemma_2b"
    else common.engine(rows_per_batch=32, max_tokens=2048, tensor=4),
    report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2, 4, 8, 16, 32)),
  )


def _tiny(smoke: bool) -> dict[str, Any]:
  def training(steps: int, learning_rate: float) -> dict[str, Any]:
    return dict(
      num_steps=4 if smoke else steps,
      learning_rate=learning_rate,
      batch_size=8,
      row_length=512,
      drop_long=not smoke,
      smoke=smoke,
    )

  def verifier(steps: int) -> dict[str, Any]:
    return common.verifier(init_from="base", max_per_label=3, max_rationales=1, **training(steps, 5e-4))

  sizes = (
    dict(num_train=12, num_val=6, num_eval=6, eval_candidates=4, made_up=24) if smoke else dict(num_val=40, num_eval=30)
  )
  return dict(
    variant="smoke" if smoke else "tiny",
    seed=0,
    data_dir="",
    task=_task(rounds=(0,), direct_set=smoke, **sizes),
    grader=_grader(8 if smoke else 192, num_rationales=1, init_from="base"),
    tokenizer=dict(type="sentencepiece", path="", vocab_size=320 if smoke else 2048, max_lines=100_000),
    prompts=common.prompts("genrm_short"),
    model=common.tiny_model(smoke),
    cpu_devices=1 if smoke else 2,  # counts where there is no accelerator
    mesh=dict(data=-1, fsdp=1, tensor=1),
    base=dict(max_per_label=3, **common.training(best_by="loss_solve", **training(300, 2e-3))),
    verifiers=dict(orm=verifier(80), genrm=verifier(80), genrm_cot=verifier(140)),
    votes=dict(
      num_votes=2 if smoke else 4,
      sample=common.sampling(max_new_tokens=8 if smoke else 192, temperature=0.7),
    ),
    engine=common.engine(rows_per_batch=64, max_tokens=2048),
    report=dict(ns=(1, 2, 4) if smoke else (1, 2, 4, 8, 16), ks=(1, 2) if smoke else (1, 2, 4)),
  )


def _small() -> dict[str, Any]:
  """As large as a few hours of two cores allow, on all that the release has for training."""

  def training(num_steps: int, learning_rate: float) -> dict[str, Any]:
    return dict(
      num_steps=num_steps,
      learning_rate=learning_rate,
      batch_size=16,
      num_micro_batches=4,  # memory of 2 GB where the whole batch at once takes 7, and no slower
      row_length=768,
      drop_long=True,
      eval_every=100,
    )

  def verifier(**more: Any) -> dict[str, Any]:
    return common.verifier(init_from="base", **more, **training(300, 3e-4))

  widths = dict(num_layers=4, embed_dim=192, ffw_dim=768, num_heads=3, head_dim=64)
  return dict(
    variant="small",
    seed=0,
    data_dir="",
    task=_task(num_val=32, num_eval=320),
    grader=_grader(384, num_rationales=1, init_from="base"),
    tokenizer=dict(type="sentencepiece", path="", vocab_size=4096, max_lines=200_000),
    prompts=common.prompts("genrm_short"),
    model=common.model(size="tiny_gemma1", overrides=widths),
    cpu_devices=1,  # two verifiers at a time, each on one core, are faster than one on both
    mesh=dict(data=-1, fsdp=1, tensor=1),
    base=dict(max_per_label=32, **common.training(best_by="loss_solve", **training(500, 1.5e-3))),
    verifiers=dict(orm=verifier(), genrm=verifier(), genrm_cot=verifier(max_rationales=4)),
    votes=dict(num_votes=2, sample=common.sampling(max_new_tokens=384, temperature=0.7)),
    engine=common.engine(rows_per_batch=64, max_tokens=2048),
    report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2)),
  )
