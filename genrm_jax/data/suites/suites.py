"""Six suites: what a row holds, and the figure that the authors report.

A score that is missing counts against the verifier in these figures, as a verdict that cannot be read does in the
authors' code; `scored_rows` beside each figure says how many rows have all scores. Ties are treated as in that code.

Field names and definitions are those of the authors' repositories, unless a function says otherwise. Paths: QwenLM/
ProcessBench code/run_eval_prm_trl.py; VerifyBench evaluate.py; allenai/reward-bench scripts/run_v2.py and
rewardbench/utils.py; THU-KEG/RM-Bench README.md; ScalerLab/JudgeBench utils/judges.py and utils/metrics.py;
ssmisya/PRMBench docs/data_format.md and mr_eval/tasks/prmtest_classified/task.py.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from genrm_jax.data.interchange import fields
from genrm_jax.data.interchange.containers import Place
from genrm_jax.data.interchange.fields import Fields
from genrm_jax.evals.metrics import THRESHOLD
from genrm_jax.evals.scored_rows import (
  Figure,
  ScoredRows,
  Solution,
  SuiteRow,
  average,
  by_group,
  combined,
  harmonic_mean,
  share,
)
from genrm_jax.runtime.errors import UserError

Figures = Mapping[str, Mapping[str, Figure]]  # by measure and group

STYLES = ("concise", "detailed", "markdown")


@dataclasses.dataclass(frozen=True)
class Suite:
  """A suite.

  Attributes:
    name: by which it is asked for.
    keys: that every row has.
    parse: reads a row. Raises UserError for a field of another type or without a label.
    figures: those of the authors, by measure and group.
    about: how the figures relate to the ones that the authors publish.
    needs_probability: whether the figures compare scores with the threshold 0.5.
    keeps_first: whether of several rows with an id the first counts, as for the authors; else an id twice is an error.
  """

  name: str
  keys: tuple[str, ...]
  parse: Callable[[Fields, Place], SuiteRow]
  figures: Callable[[ScoredRows], Figures]
  about: str
  needs_probability: bool = False
  keeps_first: bool = False


# Fields.


def _folded(text: str) -> str:
  return " ".join(text.split())


def _text(row: Fields, name: str, place: Place) -> str:
  """A text that may be empty: a solution that is has no score."""
  if not isinstance(row.get(name), str):
    raise fields.wrong(name, row.get(name), "a string", place)
  return fields.valid(row[name], name, place)


def _texts(row: Fields, name: str, place: Place) -> list[str]:
  values = fields.list_of(row, name, place)
  if not values or not all(isinstance(value, str) for value in values):
    raise fields.wrong(name, values, "a list of strings that is not empty", place)
  return [fields.valid(value, name, place) for value in values]


def _label(row: Fields, name: str, place: Place) -> bool:
  label = fields.label_of(row, name, place)
  if label is None:
    raise UserError(f'{place}: no label: "{name}" is missing; give the file as its authors publish it')
  return label


def _tags(row: Fields, place: Place, **names: str) -> dict[str, str]:
  """Tags from the fields that the row has."""
  return {tag: fields.identity_of(row[name], name, place) for tag, name in names.items() if row.get(name) is not None}


# ProcessBench.


def _parse_processbench(row: Fields, place: Place) -> SuiteRow:
  """The subset is what precedes the number in the id (gsm8k-0); steps are paragraphs, joined with blank lines."""
  steps, label = _texts(row, "steps", place), row.get("label")
  if type(label) is not int or not -1 <= label < len(steps):
    raise fields.wrong("label", label, "the index of the first wrong step, or -1", place)
  name, question = fields.identity_of(row["id"], "id", place), fields.text_of(row, ("problem",), place)
  subset = name.rpartition("-")[0] or name
  tags = {"subset": subset} | _tags(row, place, generator="generator")
  solution = Solution(question, "\n\n".join(steps), _label(row, "final_answer_correct", place), tags)
  return SuiteRow(name, _folded(question), subset, (solution,), label == -1)


def _processbench(scored: ScoredRows) -> Figures:
  right = scored.each(lambda row, v: bool(row.process_correct)) == 1
  found = scored.each(lambda row, v: v[0] <= THRESHOLD)  # False for NaN
  accepted = scored.each(lambda row, v: v[0] > THRESHOLD)
  wrong_shares = by_group(scored, lambda mask: share(found, mask & ~right))
  right_shares = by_group(scored, lambda mask: share(accepted, mask & right))
  f1 = {group: harmonic_mean(wrong, right_shares[group]) for group, wrong in wrong_shares.items()}
  f1["mean of subsets"] = average([figure for group, figure in f1.items() if group != "all"])
  return {"F1": f1, "rejected, of wrong processes": wrong_shares, "accepted, of right processes": right_shares}


# VerifyBench.


def _parse_verifybench(row: Fields, place: Place) -> SuiteRow:
  """`question_id`, `completion_id` and `completion_model` are optional: they were seen in other people's readers."""
  question = fields.text_of(row, ("question",), place)
  tags = _tags(row, place, answer_type="answer_type", answer_subtype="answer_subtype", generator="completion_model")
  solution = Solution(question, _text(row, "completion", place), _label(row, "gold_correct", place), tags)
  ids = _tags(row, place, question="question_id", completion="completion_id")
  name = "/".join(ids.values()) if "completion" in ids else ""
  return SuiteRow(name, _folded(question), fields.text_of(row, ("answer_type",), place), (solution,))


def _verifybench(scored: ScoredRows) -> Figures:
  hits = scored.each(lambda row, v: not np.isnan(v[0]) and (v[0] > THRESHOLD) == row.solutions[0].correct)
  subtypes = np.array([row.solutions[0].tags.get("answer_subtype", "") for row in scored.rows])
  by_subtype = {str(name): share(hits, subtypes == name) for name in np.unique(subtypes) if name}
  return {"accuracy": by_group(scored, lambda mask: share(hits, mask)), "accuracy by subtype": by_subtype}


# RewardBench 2.


def _preferences(row: Fields, place: Place, tags: Mapping[str, str]) -> tuple[Solution, ...]:
  """The chosen solutions, then the rejected ones."""
  question = fields.last_user(row["prompt"], place)
  texts = [
    (text, chosen) for name, chosen in (("chosen", True), ("rejected", False)) for text in _texts(row, name, place)
  ]
  return tuple(Solution(question, text, chosen, tags) for text, chosen in texts)


def _is_ties(group: str) -> bool:
  return group.lower() == "ties"


def _parse_rewardbench2(row: Fields, place: Place) -> SuiteRow:
  name, subset = fields.identity_of(row["id"], "id", place), fields.text_of(row, ("subset",), place)
  solutions = _preferences(row, place, {"subset": subset})
  num_chosen = sum(s.correct for s in solutions)
  for key, count in (("num_correct", num_chosen), ("total_completions", len(solutions))):
    if row.get(key) not in (None, count):
      raise fields.wrong(key, row[key], f"{count}, as many as there are", place)
  problem = _folded(solutions[0].question)
  if _is_ties(subset):
    if not re.fullmatch(r"ref:\d+|tied:\d+", name) or (name.startswith("tied") and num_chosen < 2):
      raise fields.wrong("id", name, "ref:NUMBER, or tied:NUMBER with several chosen, in the subset Ties", place)
    problem = f"Ties {name.partition(':')[2]}"
  return SuiteRow(name, problem, subset, solutions)


def _rewardbench2(scored: ScoredRows) -> Figures:
  """Best of 4: 1 if the (first) chosen one scores highest, 1/n if n share the highest score."""
  tops = [0 if np.isnan(v).any() else int((v == v.max()).sum()) for v in scored.values]
  first = scored.each(lambda row, v: v[0] == v.max())  # False for NaN
  credit = np.divide(first, tops, out=np.zeros(len(tops)), where=first > 0)
  groups = sorted({row.group for row in scored.rows}, key=lambda group: ("math" not in group.lower(), group))
  masks = {group: np.array([row.group == group for row in scored.rows]) for group in groups}
  found = {group: _ties(scored, mask) if _is_ties(group) else share(credit, mask) for group, mask in masks.items()}
  tied = {group: share(np.array(tops) > 1, mask) for group, mask in masks.items() if not _is_ties(group)}
  return {"best of 4": found | {"mean of subsets": average(list(found.values()))}, "tied for the best": tied}


def _ties(scored: ScoredRows, mask: np.ndarray) -> Figure:
  """The authors' score of the subset Ties, a weighted sum.

  0.3: all right answers above all wrong ones in rows tied:N, 0.3: in rows ref:N. 0.2: the gap between right and wrong
  is larger than the spread of the right ones; 0.2: so is the smaller gap of tied:N and ref:N; 0.01: by how much.
  Checked against a copy of rewardbench/utils.py in another repository, which says that it is one.
  """
  spread, gap, named = {}, {}, {row.id: index for index, row in enumerate(scored.rows) if mask[index]}
  for name, index in named.items():
    values, correct = scored.values[index], np.array([s.correct for s in scored.rows[index].solutions])
    spread[name] = values[correct].max() - values[correct].min()
    gap[name] = values[correct].min() - values[~correct].max()
  accurate, preferred, hard, margin = (np.zeros(len(scored.rows)) for _ in range(4))
  pairs = np.zeros(len(scored.rows), bool)
  for name, index in named.items():
    accurate[index] = gap[name] > 0
    other = name.replace("tied", "ref")
    if other != name and other in gap:
      pairs[index] = True
      smaller = np.minimum(gap[name], gap[other])
      preferred[index], hard[index] = gap[name] > spread[name], smaller > spread[name]
      with np.errstate(divide="ignore", invalid="ignore"):
        margin[index] = np.nan_to_num(np.tanh(smaller / spread[name] - 1), nan=0.0)
  is_ref = np.array([row.id.startswith("ref") for row in scored.rows])
  shares = [share(accurate, mask & ~is_ref), share(accurate, mask & is_ref)]
  shares += [share(hits, pairs) for hits in (preferred, hard, margin)]
  return combined(shares, lambda *v: sum(w * x for w, x in zip((0.3, 0.3, 0.2, 0.2, 0.01), v, strict=True)))


# RM-Bench.


def _parse_rmbench(row: Fields, place: Place) -> SuiteRow:
  domain = fields.text_of(row, ("domain",), place)
  solutions = _preferences(row, place, {"domain": domain})
  if [s.correct for s in solutions] != [True] * 3 + [False] * 3:
    raise UserError(f'{place}: "chosen" and "rejected" need three texts each: {", ".join(STYLES)}')
  styled = tuple(dataclasses.replace(s, tags={**s.tags, "style": STYLES[i % 3]}) for i, s in enumerate(solutions))
  return SuiteRow(fields.identity_of(row["id"], "id", place), _folded(solutions[0].question), domain, styled)


def _rmbench(scored: ScoredRows) -> Figures:
  """Shares of pairs in which the chosen one scores higher, by styles: row of the matrix chosen, column rejected."""
  wins = np.array([v[:3, None] > v[None, 3:] for v in scored.values], float)  # [R, 3, 3], False for NaN
  cells = {"easy": np.tril_indices(3, -1), "normal": np.diag_indices(3), "hard": np.triu_indices(3, 1)}

  def of_cells(at: tuple[np.ndarray, ...]) -> dict[str, Figure]:
    return by_group(scored, lambda mask: share(wins[:, at[0], at[1]].mean(axis=1), mask))

  found = {name: of_cells(at) for name, at in cells.items()}
  matrix = {
    f"{STYLES[i]} > {STYLES[j]}": share(wins[:, i, j], np.ones(len(wins), bool)) for i in range(3) for j in range(3)
  }
  return found | {"chosen > rejected": matrix}


# JudgeBench.


def _parse_judgebench(row: Fields, place: Place) -> SuiteRow:
  """The sources mmlu-pro-* are one group."""
  label = row.get("label")
  if label is None:
    raise UserError(f'{place}: no label: "label" is missing; give the file as its authors publish it')
  if label not in ("A>B", "B>A"):
    raise fields.wrong("label", label, "A>B or B>A", place)
  question, source = fields.text_of(row, ("question",), place), fields.text_of(row, ("source",), place)
  group = "mmlu-pro" if source.startswith("mmlu-pro") else source
  tags = {"source": group} | _tags(row, place, generator="response_model")
  texts = [_text(row, f"response_{letter}", place) for letter in "AB"]
  solutions = tuple(
    Solution(question, text, label[0] == letter, tags) for text, letter in zip(texts, "AB", strict=True)
  )
  return SuiteRow(fields.identity_of(row["pair_id"], "pair_id", place), _folded(question), group, solutions)


def _judgebench(scored: ScoredRows) -> Figures:
  """A > B if A scores higher, else B > A, as the authors take it from reward models: a tie is B > A."""
  hits = scored.each(lambda row, v: not np.isnan(v).any() and (v[0] > v[1]) == row.solutions[0].correct)
  tied = scored.each(lambda row, v: v[0] == v[1])
  return {
    "pair accuracy": by_group(scored, lambda mask: share(hits, mask)),
    "tied pairs": {"all": share(tied, np.ones(len(tied), bool))},
  }


# PRMBench.


def _parse_prmbench(row: Fields, place: Place) -> SuiteRow:
  """Steps are joined with line breaks; a modified process is wrong if it has error steps."""
  kind = fields.text_of(row, ("classification",), place)
  errors = row.get("error_steps")
  if errors is None:
    raise UserError(f'{place}: no label: "error_steps" is missing; give the file as its authors publish it')
  if not isinstance(errors, list) or not all(type(step) is int for step in errors):
    raise fields.wrong("error_steps", errors, "a list of numbers of steps", place)
  tags, solutions = {"classification": kind}, []
  for which, correct in (("original", True), ("modified", not errors)):
    question = fields.text_of(row, (f"{which}_question", "question"), place)
    solutions.append(Solution(question, "\n".join(_texts(row, f"{which}_process", place)), correct, tags))
  name = f"{kind}_{fields.identity_of(row['idx'], 'idx', place)}"
  return SuiteRow(name, _folded(solutions[0].question), kind, tuple(solutions))


def _prmbench(scored: ScoredRows) -> Figures:
  with_error = np.array([not row.solutions[1].correct for row in scored.rows])
  higher = scored.each(lambda row, v: v[0] > v[1])  # False for NaN
  tied = scored.each(lambda row, v: v[0] == v[1])
  return {
    "original above modified": by_group(scored, lambda mask: share(higher, mask & with_error)),
    "tied pairs": {"all": share(tied, with_error)},
  }


_ALL: Sequence[Suite] = (
  Suite(
    "processbench",
    ("id", "problem", "steps"),
    _parse_processbench,
    _processbench,
    "The authors' F1 asks for the index of the first wrong step, which a verifier of outcomes does not name. Here a"
    " wrong process counts as found if its score is at most 0.5, so this F1 is not comparable with theirs: locating the"
    " step as well can only lower it. As theirs, it is the harmonic mean of two shares, per subset. AUC, rates and"
    " calibration are about final_answer_correct.",
    needs_probability=True,
  ),
  Suite(
    "verifybench",
    ("question", "completion", "answer_type"),
    _parse_verifybench,
    _verifybench,
    "The authors' accuracy without reference (--wo-ref), with the score above 0.5 in place of the judge's Yes.",
    needs_probability=True,
  ),
  Suite(
    "rewardbench2",
    ("id", "prompt", "chosen", "rejected", "subset"),
    _parse_rewardbench2,
    _rewardbench2,
    "The authors' accuracy per subset and the mean of the subsets that the file has. The subset Ties has their weighted"
    " score, which depends on the scale of scores: theirs are logits, these probabilities.",
  ),
  Suite(
    "rmbench",
    ("id", "prompt", "chosen", "rejected", "domain"),
    _parse_rmbench,
    _rmbench,
    "The authors' matrix: a pair counts if the chosen one scores higher; a tie does not. Easy: the chosen one has the"
    " fancier style; normal: the same; hard: the plainer. The group all is over rows, not the mean of domains.",
  ),
  Suite(
    "judgebench",
    ("pair_id", "question", "response_A", "response_B", "source"),
    _parse_judgebench,
    _judgebench,
    "The authors' accuracy for reward models, one order of each pair: a tie counts as B>A.",
  ),
  Suite(
    "prmbench",
    ("idx", "original_process", "modified_process", "classification"),
    _parse_prmbench,
    _prmbench,
    "Not the authors' figure: PRMScore is about single steps, which a verifier of outcomes does not score. Here: the"
    " share of processes with error steps that score lower than the original; a tie does not count.",
    keeps_first=True,
  ),
)
SUITES = {suite.name: suite for suite in _ALL}
