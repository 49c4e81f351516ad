"""GSM8K: grade-school maths problems with a number for an answer (Cobbe et al., 2021), from files or TFDS.

answers.py reads and compares answers; released.py reads the solutions and rationales that the paper's authors released.
"""

import os
import re
from typing import Any

from etils import epath

from genrm_jax.records import Problem
from genrm_jax.runtime import files
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k import answers
from genrm_jax.tasks.gsm8k.rows import RowError, json_object, text_field

PathLike = str | os.PathLike[str]

SPLITS = ("train", "test")
_FOLDERS = ("grade-school-math/grade_school_math/data", "grade_school_math/data", "")


def read_problems(data_dir: PathLike, split: str) -> list[Problem]:
  """The problems of a split, in the order of its file; ids are `gsm8k/<split>/<line from 0>`.

  Args:
    data_dir: the folder that holds a clone of openai/grade-school-math, the clone, or the folder of the JSONL files.
    split: "train" or "test".

  Raises:
    UserError: unknown split, no file, no problem in it, or a line that is neither blank nor a GSM8K problem.
  """
  path = _problems_path(data_dir, split)
  problems = []
  with files.reader(path) as lines:
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      try:
        problems.append(_problem(f"gsm8k/{split}/{number - 1:05d}", split, json_object(line)))
      except RowError as e:
        raise UserError(f"{path}:{number}: {e}; is this the right file? Take it from a fresh clone") from e
  if not problems:
    raise UserError(f"{path}: no problem in it; take it from a fresh clone")
  return problems


def read_problems_tfds(split: str, data_dir: PathLike | None = None) -> list[Problem]:
  """The problems of a split from TensorFlow Datasets, without TensorFlow; ids are `gsm8k/<split>/tfds-<index>`.

  The order is that of the prepared dataset, not of the original file, hence the other ids.

  Args:
    split: "train" or "test".
    data_dir: where the dataset is, or will be, prepared; None for TFDS's default.

  Raises:
    UserError: unknown split, TFDS is not installed, or the dataset can neither be found nor prepared.
  """
  _check_split(split)
  try:
    import importlib_resources  # noqa: F401  (TFDS needs it to read, and does not say so)
    from tensorflow_datasets.text.gsm8k import gsm8k as tfds_gsm8k
  except ImportError as e:
    raise UserError(
      f"reading GSM8K through TFDS needs a missing package ({e}); pip install 'genrm-jax[tfds]', or clone "
      "https://github.com/openai/grade-school-math and read its files"
    ) from e
  where = None if data_dir is None else os.fspath(data_dir)
  try:
    # By its class: the name "gsm8k" is known only where the data has been prepared, or with TensorFlow.
    builder = tfds_gsm8k.Gsm8k(data_dir=where, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source(split=split)
    rows = [source[i] for i in range(len(source))]
  except Exception as e:  # whatever the network, the disk or a missing reader raises
    raise UserError(
      f"TFDS could not give gsm8k/{split} (data_dir={where}): {type(e).__name__}: {str(e)[:300]}; check the "
      "network and data_dir, or clone https://github.com/openai/grade-school-math and read its files"
    ) from e
  return [_tfds_problem(i, split, row) for i, row in enumerate(rows)]


def problem_key(question: str) -> str:
  """A question with its white space folded, by which the same problem is found in different releases."""
  return " ".join(question.split())


def _tfds_problem(index: int, split: str, row: dict[str, Any]) -> Problem:
  texts = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
  try:
    return _problem(f"gsm8k/{split}/tfds-{index:05d}", split, texts)
  except RowError as e:
    raise UserError(f"TFDS gsm8k/{split}, row {index}: {e}; prepare the dataset again, in another data_dir") from e


def _problem(problem_id: str, split: str, row: dict[str, Any]) -> Problem:
  """A problem from its question and the released solution, `... <<48/2=24>>24 ...\\n#### 72`."""
  question, (steps, mark, final) = text_field(row, "question"), text_field(row, "answer").rpartition("####")
  answer = answers.normalise_answer(final)
  if not mark or not answer:
    raise RowError('field "answer" does not end in "#### <number>"')
  steps = re.sub(r"<<.*?>>", "", steps).strip()
  # As the solutions of the release end.
  reference = f"{steps}\nThe answer is {answer}."
  return Problem(problem_id, "gsm8k", split, question.strip(), answer, reference)


def _problems_path(data_dir: PathLike, split: str) -> epath.Path:
  _check_split(split)
  places = [epath.Path(data_dir) / folder / f"{split}.jsonl" for folder in _FOLDERS]
  found = next((p for p in places if p.exists()), None)
  if found is None:
    raise UserError(
      f"no GSM8K {split} problems; looked for {', '.join(str(p) for p in places)}; "
      f"git clone https://github.com/openai/grade-school-math {epath.Path(data_dir) / 'grade-school-math'}"
    )
  return found


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise UserError(f"GSM8K has no split {split!r}; it has {' and '.join(SPLITS)}")
