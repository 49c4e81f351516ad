"""A made-up release in the layout of the real one, so that smoke runs need no files."""

import gzip
import json
import zipfile

import numpy as np
from etils import epath

from genrm_jax.text.prompts import RELEASED

_NAMES = ("Ada", "Bo", "Cleo", "Dan")
_THINGS = ("apples", "books", "coins", "shells")
_NUM_TEST = 12


def write(folder: epath.Path, num_problems: int, seed: int) -> epath.Path:
  """Writes `num_problems` sums with six solutions each, half of them correct, and a few test problems without any.

  Of the six, four have a rationale and make up the pool; two make up the Yes/No set. Returns `folder`.
  """
  rng = np.random.default_rng(seed)
  problems: list[dict[str, str]] = []
  pool: dict[str, list[dict[str, str | int]]] = {"correct": [], "incorrect": []}
  direct: dict[str, list[dict[str, str | int]]] = {"correct": [], "incorrect": []}
  for i in range(num_problems + _NUM_TEST):
    a, b = (int(x) for x in rng.integers(2, 50, size=2))
    name, thing = _NAMES[rng.integers(4)], _THINGS[rng.integers(4)]
    question = f"{name} has {a} {thing} and finds {b} more. How many {thing} does {name} have now? (no. {i})"
    problems.append({"question": question, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"})
    for j in range(6 if i < num_problems else 0):
      correct = j % 2 == 0
      claimed = a + b if correct else a + b + int(rng.integers(1, 9))
      opening = ("So", "Then", "Now")[j // 2]
      solution = f"{name} starts with {a}. {opening} {a} + {b} = {claimed}. The answer is {claimed}."
      verdict, label = (RELEASED.yes, "correct") if correct else (RELEASED.no, "incorrect")
      if j >= 4:
        prompt = RELEASED.render(RELEASED.solve, question=question) + solution + RELEASED.render(RELEASED.verify)
        direct[label].append({"inputs": prompt, "targets": verdict, "question_id": i, "model_output_id": j})
        continue
      pool[label].append(
        {
          "question": question,
          "question_id": i,
          "model_output": solution,
          "model_output_id": j,
          "extracted_answer": str(claimed),
          "target": str(a + b),
          "correctness": int(correct),
          "verifier_prompt": "",
          "verifier_output": f"{a} + {b} is {a + b}.{RELEASED.render(RELEASED.conclude)}{verdict}",
        }
      )
  gsm8k = folder / "grade-school-math/grade_school_math/data"
  raw = folder / "genrm-critiques/critiques/data_collection"
  gsm8k.mkdir(parents=True, exist_ok=True)
  raw.mkdir(parents=True, exist_ok=True)
  (gsm8k / "train.jsonl").write_text(_lines(problems[:num_problems]))
  (gsm8k / "test.jsonl").write_text(_lines(problems[num_problems:]))
  for label, rows in pool.items():
    with (raw / f"critique_gen_{label}_solutions_round_0_shard_0.jsonl.gz").open("wb") as f:
      f.write(gzip.compress(_lines(rows).encode()))
  for label, rows in direct.items():
    for split, part in (("", rows[1:]), ("_val", rows[:1])):
      name = f"rm_{label}_solutions_batch_00{split}"
      with (raw.parent / f"{name}.zip").open("wb") as f, zipfile.ZipFile(f, "w") as archive:
        archive.writestr(f"{name}.jsonl", _lines(part))
  return folder


def _lines(rows: list[dict[str, str]] | list[dict[str, str | int]]) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)
