"""What every setting of a config may be, in one table. A config is checked against it before anything runs."""

import difflib
import math
import numbers
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from genrm_jax.model import gemma
from genrm_jax.model.config import DTYPES, SIZES
from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.sharding import MESH_AXES
from genrm_jax.tasks.base import SPLITS
from genrm_jax.training.loop import BEST_BY
from genrm_jax.verifiers.base import VERIFIERS

_LARGEST = 2**31 - 1  # counts become int32 on the devices
_LARGEST_SEED = 2**32 - 1  # jax.random.key reads 32 bits


class Kind(NamedTuple):
  """The values that a setting may have."""

  what: str  # for messages, after "must be"
  holds: Callable[[Any], bool]


class Section(NamedTuple):
  """A group of settings; `optional` names those that may be absent, and `more` allows settings of the user's own."""

  settings: Mapping[str, Any]  # name -> Kind or Section
  optional: tuple[str, ...] = ()
  more: bool = False


class Named(NamedTuple):
  """Groups under names that the user chooses."""

  each: Callable[[str, Any], Section]


def whole(low: int, high: int = _LARGEST, also: tuple[int, ...] = ()) -> Kind:
  shown = f"a whole number from {low:,}" + (f" to {high:,}" if high != _LARGEST else "")
  shown += "".join(f", or {n}" for n in also)
  return Kind(shown, lambda v: _is_whole(v) and (low <= v <= high or v in also))


def real(low: float = 0.0, high: float = math.inf, above: bool = False) -> Kind:
  """A finite number of `low` or more (`above`: above `low`), and at most `high`."""
  shown = f"a finite number {'above' if above else 'of at least'} {low:g}"
  shown += f" and at most {high:g}" if high < math.inf else ""
  return Kind(shown, lambda v: _is_real(v) and (v > low if above else v >= low) and v <= high)


def one_of(*names: str) -> Kind:
  return Kind(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def _is_whole(v: Any) -> bool:
  return isinstance(v, numbers.Integral) and not isinstance(v, bool)


def _is_real(v: Any) -> bool:
  return isinstance(v, numbers.Real) and not isinstance(v, bool) and math.isfinite(v)


def _is_path(v: Any) -> bool:
  return isinstance(v, str) and "\0" not in v


COUNT, SIZE = whole(0), whole(1)
FLAG = Kind("True or False", lambda v: isinstance(v, bool))
TEXT = Kind("a string", lambda v: isinstance(v, str))
TEXTS = Kind("a list of strings", lambda v: isinstance(v, (tuple, list)) and all(isinstance(s, str) for s in v))
PATH = Kind("a path, without NUL characters", _is_path)
LADDER = Kind(
  "a list of whole numbers from 1",
  lambda v: isinstance(v, (tuple, list)) and len(v) > 0 and all(_is_whole(n) and n >= 1 for n in v),
)
ROUNDS = Kind(
  "a list of whole numbers from 0", lambda v: isinstance(v, (tuple, list)) and all(COUNT.holds(n) for n in v)
)
GAPS = Kind(
  "a mapping from characters to whole numbers from 0",
  lambda v: isinstance(v, Mapping) and all(isinstance(k, str) and COUNT.holds(n) for k, n in v.items()),
)
ANY = Kind("anything", lambda v: True)
OPEN = Section({}, more=True)  # whoever reads it checks it

_MESH = Section({axis: whole(1, also=(-1,)) for axis in MESH_AXES}, optional=MESH_AXES)
_LORA = Section(dict(rank=COUNT, alpha=real(above=True), targets=TEXTS, save_frozen=FLAG))
_SAMPLE = Section(
  dict(max_new_tokens=SIZE, temperature=real(), top_k=COUNT, top_p=real(0, 1, above=True)), optional=("top_k", "top_p")
)
_START = dict(init_from=TEXT, lora=_LORA)
_FRACTION = Kind("a number from 0 up to, not including, 1", lambda v: _is_real(v) and 0 <= v < 1)
_TRAINING = _START | dict(
  row_length=whole(2),
  drop_long=FLAG,
  remat=one_of("auto", *typing.get_args(gemma.Remat)),
  loop=Section(
    dict(
      batch_size=SIZE,
      num_micro_batches=COUNT,
      log_every_steps=SIZE,
      eval_every_steps=SIZE,
      save_every_steps=SIZE,
      max_eval_rows=COUNT,
      best_by=one_of(*BEST_BY),
      stop_at_loss=real(),
    ),
    optional=("max_eval_rows", "best_by", "stop_at_loss"),
  ),
  optim=Section(
    dict(
      learning_rate=real(above=True),
      num_steps=SIZE,
      warmup_steps=COUNT,
      final_fraction=real(0, 1),
      weight_decay=real(),
      beta1=_FRACTION,
      beta2=_FRACTION,
      clip_norm=real(above=True),
    ),
    optional=("warmup_steps", "final_fraction", "weight_decay", "beta1", "beta2", "clip_norm"),
  ),
)
_TRAINING_OR_SHIPPED = _TRAINING | dict(shipped=TEXT)
_BY_LABEL = dict(max_problems=COUNT, max_per_label=SIZE, balanced=FLAG, max_rationales=COUNT, solve_weight=real())
_BUILT_IN_VERIFIER = Section(
  _TRAINING_OR_SHIPPED | _BY_LABEL | dict(max_new_tokens=SIZE),
  optional=("shipped", "max_problems", "solve_weight", "max_new_tokens"),
)


def _also(section: Section, **settings: Kind) -> Section:
  """The section with further settings, which may be absent."""
  return section._replace(settings={**section.settings, **settings}, optional=(*section.optional, *settings))


_VERIFIER = dict(
  judge=_also(Section(_START), max_new_tokens=SIZE),
  genrm_cot_greedy=_also(Section(_START), max_new_tokens=SIZE),
  genrm_cot=_also(_BUILT_IN_VERIFIER, min_agreement=_FRACTION),
  orm=_also(_BUILT_IN_VERIFIER, z_loss=real(), every_token=FLAG),
  dpo=Section(
    _TRAINING_OR_SHIPPED | dict(max_problems=COUNT, max_pairs=SIZE, beta=real(above=True)),
    optional=("shipped", "max_problems"),
  ),
  dpo_reference=Section(_START | dict(of=TEXT, beta=real(above=True))),
)
_OWN_VERIFIER = Section(
  _TRAINING | _BY_LABEL | dict(max_new_tokens=SIZE), optional=(*_TRAINING, *_BY_LABEL, "max_new_tokens"), more=True
)


def _verifier(name: str, settings: Any) -> Section:
  kind = settings.get("kind", name) if isinstance(settings, Mapping) else name
  if kind in VERIFIERS:
    section = _VERIFIER.get(kind, _BUILT_IN_VERIFIER)
    return _also(section, kind=TEXT)
  return _also(_OWN_VERIFIER, kind=TEXT)


_SPLIT = Section(dict(num_problems=SIZE, min_words=SIZE, max_words=SIZE), more=True)
_LISTS = dict(style=TEXT, walk=OPEN, index_shift=FLAG) | {split: _SPLIT for split in SPLITS}
_TASKS: dict[str, dict[str, Any]] = {
  "last_letter": _LISTS,
  "word_sorting": _LISTS,
  "gsm8k": dict(
    problems=TEXT,
    rounds=ROUNDS,
    direct_set=FLAG,
    num_train=COUNT,
    num_val=SIZE,
    num_eval=SIZE,
    eval_candidates=SIZE,
    candidates=PATH,
    made_up=COUNT,
  ),
  "math500": dict(num_candidates=SIZE, comparison_seconds=real(above=True)),
}


def _task(settings: Any) -> Section:
  name = settings.get("name") if isinstance(settings, Mapping) else ""
  known = {"name": TEXT, **_TASKS.get(name if isinstance(name, str) else "", {})}
  return Section(known, optional=tuple(known.keys() - {"name"}), more=True)  # its constructor checks the rest


def _tokenizer(settings: Any) -> Section:
  if not isinstance(settings, Mapping):
    return Section({})
  kind = settings.get("type")
  optional = {"path"} if kind == "char" else set()
  if kind == "char" or "vocab_size" not in settings:  # then none is trained here
    optional |= {"vocab_size", "max_lines"}
  known = dict(type=one_of("char", "sentencepiece"), path=PATH, vocab_size=SIZE, max_lines=SIZE)
  return Section(known, optional=tuple(optional))


_CONFIG = Section(
  dict(
    variant=TEXT,
    seed=whole(0, _LARGEST_SEED),
    data_dir=PATH,
    bank=PATH,
    verifier=PATH,
    problems=PATH,
    solutions=PATH,
    cpu_devices=whole(1, 4096),
    prompts=OPEN,
    model=Section(
      dict(
        checkpoint=PATH,
        size=one_of(*SIZES),
        overrides=OPEN,
        dtype=one_of(*DTYPES),
        param_dtype=one_of(*DTYPES),
        sharding=OPEN,
      )
    ),
    mesh=_MESH,
    gaps=GAPS,
    base=Section(
      _TRAINING
      | dict(max_per_label=SIZE, num_examples=SIZE, num_eval_examples=SIZE, short_answer_weight=real(above=True)),
      optional=("max_per_label", "num_examples", "num_eval_examples", "short_answer_weight"),
    ),
    generator=Section(_TRAINING_OR_SHIPPED | dict(num_eval_examples=SIZE), optional=("shipped",)),
    candidates=Section(
      _START | dict(num_train=SIZE, num_eval=SIZE, num_edited=COUNT, add_reference=FLAG, sample=_SAMPLE),
      optional=(*_START, "num_edited"),
    ),
    grader=Section(
      _START | dict(way=TEXT, reading=TEXT, drop_leaks=FLAG, max_per_label=SIZE, num_rationales=SIZE, sample=_SAMPLE)
    ),
    verifiers=Named(_verifier),
    votes=Section(dict(num_votes=SIZE, sample=_SAMPLE)),
    engine=Section(dict(rows_per_batch=SIZE, max_tokens=SIZE, mesh=_MESH)),
    report=Section(dict(ns=LADDER, ks=LADDER, top_scores=COUNT), optional=("top_scores",)),
  ),
  more=True,
)
_ALWAYS = ("seed", "variant", "task", "cpu_devices")
_TO_TRAIN = ("tokenizer", "prompts", "model", "mesh")  # needed beside `verifiers`, and the next if it holds any
_TO_SCORE = ("engine", "votes", "report")


def check(config: Mapping[str, Any]) -> None:
  """Checks the kind and range of every setting, and that none is missing or misspelt.

  Raises:
    UserError: names the setting, its value and what it must be.
  """
  needed: tuple[str, ...] = _ALWAYS
  if "verifiers" in config:
    needed += _TO_TRAIN + (_TO_SCORE if config["verifiers"] else ())
  for name in needed:
    if name not in config:
      raise UserError(f"the config has no {name!r}; see experiments/configs for examples")
  optional = tuple({*_CONFIG.settings, "tokenizer"} - set(needed))
  settings = {**_CONFIG.settings, "task": _task(config["task"]), "tokenizer": _tokenizer(config.get("tokenizer", {}))}
  _check("config", config, _CONFIG._replace(settings=settings, optional=optional))


def _check(place: str, value: Any, wanted: Any) -> None:
  if isinstance(wanted, Kind):
    if not wanted.holds(value):
      raise UserError(f"{place} must be {wanted.what}, not {_shown(value)}")
    return
  if not isinstance(value, Mapping):
    raise UserError(f"{place} must be a group of settings, not {_shown(value)}")
  if isinstance(wanted, Named):
    for name, inner in value.items():
      _check(f"{place}.{name}", inner, wanted.each(name, inner))
    return
  known = wanted.settings
  if missing := [name for name in known if name not in value and name not in wanted.optional]:
    raise UserError(f"{place} has no {missing[0]!r}; set {place}.{missing[0]}, see experiments/configs/common.py")
  for name, inner in value.items():
    if name in known:
      _check(f"{place}.{name}", inner, known[name])
    elif not wanted.more:
      close = difflib.get_close_matches(str(name), known, 1)
      hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
      raise UserError(f"{place} has no setting {name!r}; {hint}")


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


# Paths.

LOCATIONS = (
  *("data_dir", "bank", "verifier", "problems", "solutions"),
  *("model.checkpoint", "tokenizer.path", "task.candidates", "task.eval.bbh"),
)


def expand_paths(config: Any) -> None:
  """Replaces a leading ~ in the paths of a ConfigDict by the user's home folder, in place."""
  for key in LOCATIONS:
    *sections, name = key.split(".")
    section = config
    for inner in sections:
      section = section.get(inner) if hasattr(section, "get") else None
    if hasattr(section, "get") and isinstance(section.get(name), str):
      paths = section[name].split(",") if key == "verifier" else [section[name]]
      section[name] = ",".join(
        str(pathlib.Path(p.strip()).expanduser()) if p.strip().startswith("~") else p for p in paths
      )
