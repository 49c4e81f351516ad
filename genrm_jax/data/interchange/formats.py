r"""The formats of candidate files: the keys that identify each, and its conversion to `Row`.

    {"question": "How many ...?", "solution": "... The answer is 7.", "correct": true}

is this library's format ("simple"); FORMATS lists the others. A format is one function from a row to a `Row`.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from genrm_jax.data.interchange import containers, fields
from genrm_jax.data.interchange.containers import PathLike, Place
from genrm_jax.data.interchange.fields import Fields, Unusable
from genrm_jax.records import Vote
from genrm_jax.runtime.errors import UserError

QUESTION = ("question", "problem")


@dataclasses.dataclass(frozen=True)
class Row:
  """What a row holds.

  Attributes:
    question: "" if the row does not have it; then `problem_id` names the problem.
    solutions: in the order of the row.
    why: if not "", no solution of the row can be used, and why.
    problem_id: "" if the question identifies the problem.
    answer: the right answer, "" if unknown.
    reference: a worked solution, or "".
    task: the data set, or "".
    split: of the data set, or "".
    labels: whether each solution is correct; None if the row does not say. Empty: for none.
    answers: the final answer of each solution, as `labels`.
    votes: on the only solution.
    index: of the only solution among those of its problem; None: they are counted in file order.
    key: if not "", no other row of the file may have it.
    repeats: whether other rows of the file may hold the same solutions again.
  """

  question: str
  solutions: tuple[str | Unusable, ...] = ()
  why: str = ""
  problem_id: str = ""
  answer: str = ""
  reference: str = ""
  task: str = ""
  split: str = ""
  labels: tuple[bool | None, ...] = ()
  answers: tuple[str | None, ...] = ()
  votes: tuple[Vote, ...] = ()
  index: int | None = None
  key: str = ""
  repeats: bool = False


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Attributes:
    name: by which it can be asked for.
    keys: a row has one key of each group.
    parse: (row, place, inputs) -> Row; `inputs` is what `read_inputs` returned, None without a second file.
    several: whether a row may hold several solutions.
    read_inputs: reads the second file or folder, which has the questions; None if the format needs none.
  """

  name: str
  keys: tuple[tuple[str, ...], ...]
  parse: Callable[[Fields, Place, Any], Row]
  several: bool = True
  read_inputs: Callable[[PathLike], Any] | None = None

  def fits(self, row: Fields) -> bool:
    return all(any(key in row for key in group) for group in self.keys)

  def __str__(self) -> str:
    return f"{self.name} ({', '.join('|'.join(group) for group in self.keys)})"


# One function per format.


def _simple(row: Fields, place: Place, inputs: Any) -> Row:
  del inputs
  identity = next((name for name in ("problem_id", "unique_id") if row.get(name) is not None), None)
  answer, reference = fields.answer_of(row.get("answer"), place)
  return Row(
    fields.text_of(row, QUESTION, place) if any(key in row for key in QUESTION) else "",
    fields.solutions_of([row["solution"]], "solution", place),
    problem_id=fields.text_of(row, (identity,), place) if identity else "",
    answer=answer,
    reference=reference,
    labels=(fields.label_of(row, "correct", place),),
  )


def _lm_eval(row: Fields, place: Place, inputs: Any) -> Row:
  """lm-eval --log_samples: one line per document and filter, each with all responses."""
  del inputs
  doc, name = fields.object_of(row, "doc", place), fields.identity_of(row["doc_id"], "doc_id", place)
  answer, reference = fields.answer_of(row.get("target"), place)
  responses = fields.list_of(row, "resps", place)
  if len(responses) == 1 and isinstance(responses[0], list):
    responses = responses[0]
  scored = any(isinstance(response, list) for response in responses)  # (log-likelihood, greedy) of each choice
  solutions = () if scored else fields.solutions_of(responses, "resps", place)
  return Row(
    fields.text_of(doc, (*QUESTION, "Question", "Problem"), place, "doc."),
    solutions,
    "log-likelihoods of choices, no text" if scored else "",
    problem_id=name,
    answer=answer,
    reference=reference,
    labels=(fields.label_of(row, "exact_match", place),) if len(solutions) == 1 else (),
    key=f"{name}, filter {row.get('filter', 'none')}",
    repeats=True,
  )


def _openai_batch(row: Fields, place: Place, inputs: Mapping[str, str] | None) -> Row:
  """The output of a batch; the question is the last user message of the request."""
  name = fields.text_of(row, ("custom_id",), place)
  known = functools.partial(Row, "" if inputs is None else inputs.get(name, ""), problem_id=name, key=name)
  response = row["response"]
  if inputs is not None and name not in inputs:
    return known(why="custom_id is not in the input file")
  if row.get("error") or response is None:
    return known(why="an error in place of a response")
  response = fields.object_of(row, "response", place)
  if (status := response.get("status_code", 200)) != 200:
    return known(why=f"status code {status!r:.20}")
  body = response if "choices" in response else fields.object_of(response, "body", place)  # older vLLM has no body
  if not body.get("choices"):
    return known(why="a response without choices")
  texts = []
  for choice in fields.list_of(body, "choices", place):
    if not isinstance(choice, dict):
      raise fields.wrong("choices", choice, "objects", place)
    message = choice.get("message")
    texts.append(message.get("content") if isinstance(message, dict) else choice.get("text"))
  return known(fields.solutions_of(texts, "choices[].message.content", place))


def _batch_inputs(path: PathLike) -> dict[str, str]:
  """The question of each request of a batch."""
  questions: dict[str, str] = {}
  for row, place in itertools.chain.from_iterable(map(containers.rows_of, containers.files_of(path))):
    name, body = fields.text_of(row, ("custom_id",), place), fields.object_of(row, "body", place)
    if name in questions:
      raise UserError(f"{place}: custom_id {name!r} again; remove one of the two requests")
    questions[name] = (
      fields.last_user(body["messages"], place) if "messages" in body else fields.text_of(body, ("prompt",), place)
    )
  return questions


def _nemo_skills(row: Fields, place: Place, inputs: Any) -> Row:
  del inputs
  answer, reference = fields.answer_of(row.get("expected_answer"), place)
  failed = row["generation"] in ("", None) and bool(row.get("error"))
  predicted = row.get("predicted_answer")
  return Row(
    fields.text_of(row, QUESTION, place),
    () if failed else fields.solutions_of([row["generation"]], "generation", place),
    "a soft failure in place of a generation" if failed else "",
    answer=answer,
    reference=reference,
    labels=(fields.label_of(row, "symbolic_correct", place),),
    answers=(None if predicted is None else fields.answer_of(predicted, place)[0],),
  )


def _search_and_learn(row: Fields, place: Place, inputs: Any) -> Row:
  """Also ThinkPRM. `solution`, if there is one, is a reference."""
  del inputs
  answer, _ = fields.answer_of(row["answer"], place)
  name = fields.text_of(row, ("unique_id",), place) if row.get("unique_id") is not None else ""
  return Row(
    fields.text_of(row, ("problem",), place),
    fields.solutions_of(fields.list_of(row, "completions", place), "completions", place),
    problem_id=name,
    answer=answer,
    reference=fields.text_of(row, ("solution",), place) if row.get("solution") else "",
    key=name,
  )


def _verl(row: Fields, place: Place, inputs: Any) -> Row:
  """Also Tunix. A data set has no solutions; verl's generation adds them as `responses`."""
  del inputs
  reward, extra = fields.object_of(row, "reward_model", place), row.get("extra_info") or {}
  if not isinstance(extra, dict):
    raise fields.wrong("extra_info", extra, "an object", place)
  index, split, source = extra.get("index"), extra.get("split") or "", fields.text_of(row, ("data_source",), place)
  has = row.get("responses") is not None
  return Row(
    fields.text_of(extra, ("question",), place, "extra_info.")
    if extra.get("question")
    else fields.last_user(row["prompt"], place),
    fields.solutions_of(fields.list_of(row, "responses", place), "responses", place) if has else (),
    "" if has else "no responses",
    problem_id="" if index is None else "/".join([source, *filter(None, [split]), str(index)]),
    answer=fields.answer_of(reward.get("ground_truth"), place)[0],
    reference=fields.text_of(extra, ("answer",), place, "extra_info.") if extra.get("answer") else "",
    task=source,
    split=split,
  )


def _samples(row: Fields, place: Place, inputs: Any) -> Row:
  """sc-genrm-scaling and Large Language Monkeys; a problem has its own file there, named by its number."""
  del inputs
  answer, reference = fields.answer_of(row.get("gt_answer"), place)
  samples = fields.solutions_of(fields.list_of(row, "samples", place), "samples", place)
  labels: tuple[bool | None, ...] = ()
  for name in ("is_corrects", "is_correct"):
    if row.get(name) is not None:
      labels = tuple(fields.label_of({name: value}, name, place) for value in fields.list_of(row, name, place))
      if len(labels) != len(samples):
        raise UserError(f"{place}: {len(samples)} samples but {len(labels)} labels in {name!r}; correct one of them")
  return Row(
    fields.text_of(row, QUESTION, place),
    samples,
    problem_id="" if place.row else place.stem,
    answer=answer,
    reference=reference,
    labels=labels,
  )


def _sc_genrm_votes(row: Fields, place: Place, inputs: Callable[[str], tuple[Row, Fields]] | None) -> Row:
  """problem_{i}/solution_{j}.yaml: verifications of sample j of {i}.yaml, which is in the second folder."""
  numbers = re.search(r"problem_(\d+)/solution_(\d+)\.\w+$", place.file)
  if not numbers:
    raise UserError(f"{place}: verifications are in problem_I/solution_J.yaml; keep the names that they were given")
  name, index = numbers[1], int(numbers[2])
  votes = tuple(_vote(v, place) for v in fields.list_of(row, "verifications", place))
  if inputs is None:
    return Row("", problem_id=name, votes=votes, index=index)
  of_problem, file = inputs(name)
  if index >= len(of_problem.solutions):
    raise UserError(f"{place}: {file} has {len(of_problem.solutions)} samples, none of number {index}; give its folder")
  return dataclasses.replace(
    of_problem,
    solutions=of_problem.solutions[index : index + 1],
    labels=of_problem.labels[index : index + 1],
    votes=votes,
    index=index,
  )


def _sample_files(path: PathLike) -> Callable[[str], tuple[Row, str]]:
  """A function from the number of a problem to its samples and their file."""
  files = {Place(file).stem: file for file in containers.files_of(path)}

  @functools.lru_cache(maxsize=1)  # the files of a problem follow each other
  def read(name: str) -> tuple[Row, str]:
    if name not in files:
      raise UserError(f"{path}: no {name}.yaml, which the verifications are of; give the folder of the samples")
    rows = list(containers.rows_of(files[name]))
    if len(rows) != 1 or not all(key in rows[0][0] for key in ("samples",)):
      raise UserError(f"{files[name]}: not the samples of one problem; give the folder of the samples")
    return _samples(*rows[0], None), files[name]

  return read


def _vote(found: Any, place: Place) -> Vote:
  """A vote; -1 stands for a probability that was not among the ones recorded.

  If only p(no) was, p(yes) is taken as 1 - p(no), as in their evaluation: else a verifier that was asked for the most
  likely token alone would have no vote against a solution.
  """
  if not isinstance(found, dict):
    raise fields.wrong("verifications", found, "objects", place)
  numbers: list[float | None] = []
  for name in ("p(yes)", "p(no)"):
    p: Any = found.get(name)
    if type(p) not in (int, float) or not (p == -1 or 0 <= p <= 1.001):
      raise fields.wrong(f"verifications[].{name}", p, "a probability, or -1", place)
    numbers.append(None if p == -1 else min(float(p), 1.0))
  yes, no = numbers
  text = fields.text_of(found, ("verification",), place, "verifications[].") if found.get("verification") else ""
  if yes is None and no is None:
    return Vote("missing", None, None, 0, text)
  return Vote("ok", 1.0 - no if yes is None and no is not None else yes, no, 0, text)


# In the order in which a row is tried: more telling keys first. A row for search-and-learn may hold a "solution", too.
FORMATS: Mapping[str, Format] = {
  f.name: f
  for f in (
    Format("lm_eval", (("doc_id",), ("doc",), ("resps",)), _lm_eval),
    Format("openai_batch", (("custom_id",), ("response",)), _openai_batch, read_inputs=_batch_inputs),
    Format("sc_genrm_votes", (("prompt",), ("verifications",)), _sc_genrm_votes, False, _sample_files),
    Format("verl", (("data_source",), ("prompt",), ("reward_model",)), _verl),
    Format("search_and_learn", (("problem",), ("answer",), ("completions",)), _search_and_learn),
    Format("nemo_skills", (QUESTION, ("expected_answer",), ("generation",)), _nemo_skills, False),
    Format("large_language_monkeys", (QUESTION, ("samples",), ("is_corrects", "is_correct")), _samples),
    Format("sc_genrm", (QUESTION, ("samples",)), _samples),
    Format("simple", ((*QUESTION, "problem_id", "unique_id"), ("solution",)), _simple, False),
  )
}


def recognise(row: Fields, place: Place) -> Format:
  """The format of a row by its keys. Raises UserError, naming the keys and the formats, if it is in none."""
  for found in FORMATS.values():
    if found.fits(row):
      return found
  raise UserError(
    f"{place}: no known format has the keys of this row, {fields.keys_of(row)}; the formats are "
    f"{'; '.join(map(str, FORMATS.values()))}"
  )
