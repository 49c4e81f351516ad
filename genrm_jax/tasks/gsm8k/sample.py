"""A made-up release in the layout of the real one, so that the smoke run needs no files."""

import gzip
import json
import zipfile

import numpy as np
from etils import epath

from genrm_jax.text.prompts import get_format

_FORM = get_format("genrm")
_NAMES = ("Ada", "Bo", "Cleo", "Dan")
_THINGS = ("apples", "books", "coins", "shells")


def write(folder: epath.Path, num_problems: int, seed: int) -> epath.Path:
  """Writes `num_problems` sums with six solutions each, half of them right; returns `folder`.

  Four have a grading and are the pool, two are the Yes/No set.
  """
  rng = np.random.default_rng(seed)
  problems: list[dict[str, str]] = []
  graded: dict[str, list[dict[str, str | int]]] = {"correct": [], "incorrect": []}
  direct: dict[str, list[dict[str, str | int]]] = {"correct": [], "incorrect": []}
  for i in range(num_problems):
    a, b = (int(x) for x in rng.integers(2, 50, size=2))
    name, thing = _NAMES[rng.integers(4)], _THINGS[rng.integers(4)]
    question = f"{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now? (no. {i})"
    problems.append({"question": question, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"})
    for j in range(6):
      right = j % 2 == 0
      claimed = a + b if right else a + b + int(rng.integers(1, 9))
      opening = ("So", "Then", "Now")[j // 2]
      solution = f"{name} starts with {a}. {opening} {a} + {b} = {claimed}. The answer is {claimed}."
      verdict, kind = ("Yes", "correct") if right else ("No", "incorrect")
      if j >= 4:
        asked = _FORM.solve.replace("{question}", question) + solution + _FORM.verify
        direct[kind].append({"inputs": asked, "targets": f" {verdict}", "question_id": i, "model_output_id": j})
        continue
      graded[kind].append(
        {
          "question": question,
          "question_id": i,
          "model_output": solution,
          "model_output_id": j,
          "extracted_answer": str(claimed),
          "target": str(a + b),
          "correctness": int(right),
          "verifier_prompt": "",
          "verifier_output": f"{a} + {b} is {a + b}.\n\nVerification: Is the answer correct (Yes/No)? {verdict}",
        }
      )
  gsm8k = folder / "grade-school-math/grade_school_math/data"
  pool = folder / "genrm-critiques/critiques/data_collection"
  gsm8k.mkdir(parents=True, exist_ok=True)
  pool.mkdir(parents=True, exist_ok=True)
  (gsm8k / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
  for kind, rows in graded.items():
    with (pool / f"critique_gen_{kind}_solutions_round_0_shard_0.jsonl.gz").open("wb") as f:
      f.write(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
  for kind, rows in direct.items():
    for split, part in (("", rows[1:]), ("_val", rows[:1])):
      name = f"rm_{kind}_solutions_batch_00{split}"
      with (pool.parent / f"{name}.zip").open("wb") as f, zipfile.ZipFile(f, "w") as archive:
        archive.writestr(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
  return folder
