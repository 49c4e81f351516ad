"""Agreement of our GSM8K answer extraction with the release's, over all released solutions.

    python -m experiments.studies.gsm8k_answers --data_dir=DIR [--out=results/gsm8k/answers.json]

DIR holds clones of openai/grade-school-math and genrm-star/genrm-critiques. For each distinct solution of the raw pool,
our answer is compared with the released `extracted_answer`; there and for every row of the direct Yes/No set, our label
(is it the problem's answer?) is compared with the released one. Rules sort the differences into classes.
"""

import argparse
import re
from collections.abc import Iterator
from os.path import expanduser
from typing import Any, NamedTuple

from genrm_jax.data import jsonl
from genrm_jax.runtime.errors import one_message
from genrm_jax.tasks.gsm8k import problems
from genrm_jax.tasks.gsm8k.answers import extract_answer, normalise_answer, same_answer, stated_line
from genrm_jax.tasks.gsm8k.rows import BadRows, PathLike, iter_direct, iter_pool
from genrm_jax.tasks.statements import ANSWER_IS

_NUM_EXAMPLES = 2
_EXAMPLE_CHARACTERS = 60

# Class: (whose answer a human grader would accept, why the two differ). The first class that fits applies.
CLASSES = {
  "two statements": ("ours", "'answer is' stands twice; the release read the first, with all that follows"),
  "equation": ("ours", "'5 - 1 = 4': the release took the first number, or kept text after the last"),
  "scale": (
    "open",
    "'4 million', '5 dozen': 4 or 4000000, as the question asks; we take 4000000, the release 4 or text",
  ),
  "minus sign": ("ours", "the release lost the sign before a currency mark: -$20 became 20"),
  "time of day": ("ours", "'6:45 pm' is no number; the release took the hour, or kept the text as we do"),
  "several units": ("ours", "'2 hours and 15 minutes': the release took 2, or joined both; we keep the text"),
  "no number": ("both", "a sentence; both keep it, the release without its spaces"),
  "number in words": ("ours", "'four': the release kept the word"),
  "fraction": ("ours", "'36/7', '5 1/7', '1¼': the release cut it to its first number, or joined it to '51/7'"),
  "cents": ("open", "'$.16': we read dollars; the release 16, right where the question asks for cents"),
  "decimals": ("ours", "the release cut decimals off: 14.5 became 14"),
  "words beside the number": ("ours", "'about 51', '45 ounces', '**14**': the release kept the words"),
  "expression": ("ours", "'x + 11', '24n' is no number; the release took the number in it, or the text"),
  "several numbers": ("open", "'1 or 2', '120 minutes or 2 hours': the release took the first, or joined them"),
  "other": ("unknown", "not explained by the rules"),
}

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_UNIT = (
  r"\s*(?:day|hour|hr|min|minute|minuto|sec|second|week|month|year|foot|feet|inch|cup|pound|ounce|teaspoon)(?:e?s)?\b"
)
_RULES = (
  ("equation", re.compile(r"=")),
  ("scale", re.compile(r"[0-9]\s*(?:hundred|thousand|million|billion|dozens?|k)\b|\$[0-9.]+m\b")),
  ("time of day", re.compile(r"[0-9]:[0-9]|[0-9] ?[ap]\.?m\b")),
  ("several units", re.compile(rf"[0-9]{_UNIT}.*[0-9]{_UNIT}")),
)
_VARIABLE_OR_OPERATION = re.compile(r"[+*^]|[0-9][b-z]\b|(?<!')\b[b-hj-z]\b(?![.'])|[a-z)] - ")


class Compared(NamedTuple):
  """A solution and how it was read and labelled. `extracted` is None in the direct set, which has no answers."""

  part: str
  solution: str
  ours: str | None
  extracted: str | None
  target: str
  label: bool

  @property
  def labels_differ(self) -> bool:
    return same_answer(self.ours, self.target) != self.label


def classify(c: Compared) -> str:
  """The class of a difference, one of `CLASSES`."""
  stated = [stated_line(c.solution[m.end() :]).casefold() for m in ANSWER_IS.finditer(c.solution)]
  if len(stated) > 1:
    return "two statements"
  last = stated[0] if stated else ""
  ours = c.ours or ""
  is_number = _NUMBER.fullmatch(ours) is not None
  released = c.extracted if c.extracted is not None else c.target if c.label else ""
  if is_number and ours == f"-{normalise_answer(released)}":
    return "minus sign"
  for name, rule in _RULES:
    if rule.search(last):
      return name
  if not re.search(r"[0-9]", last):
    return "number in words" if is_number else "no number"
  if re.search(r"[0-9]\s*/\s*\$?[0-9]|[½⅓⅔¼¾⅕⅛]|\band (?:a )?(?:half|third|two-thirds)\b", last):
    return "fraction"
  if is_number and _NUMBER.fullmatch(released):
    if float(released) == round(100 * float(ours), 6):
      return "cents"
    if float(released) == int(float(ours)):
      return "decimals"
  elif is_number:
    return "words beside the number"
  if _VARIABLE_OR_OPERATION.search(normalise_answer(last)):
    return "expression"
  return "several numbers" if len(re.findall(r"-?[0-9][0-9.,]*", last)) > 1 else "other"


def compare(data_dir: PathLike) -> dict[str, Any]:
  """Counts for both parts of the release and the classes of differences, as JSON values."""
  bad = BadRows()
  parts: dict[str, dict[str, int]] = {}
  classes = {name: {"answers": 0, "labels": 0, "examples": []} for name in CLASSES}
  for c in _solutions(data_dir, bad):
    part = parts.setdefault(c.part, {"solutions": 0, "same_label": 0})
    part["solutions"] += 1
    part["same_label"] += not c.labels_differ
    agree = True
    if c.extracted is not None:
      agree = same_answer(c.ours, c.extracted)
      part["same_answer"] = part.get("same_answer", 0) + agree
    if not agree or c.labels_differ:
      row: dict[str, Any] = classes[classify(c)]
      row["answers"] += not agree
      row["labels"] += c.labels_differ
      # Prefer examples whose labels differ.
      shown = {"labels_differ": c.labels_differ, **_example(c)}
      row["examples"] = sorted([*row["examples"], shown], key=lambda e: not e["labels_differ"])[:_NUM_EXAMPLES]
  return {
    "parts": parts,
    "classes": [
      {"name": name, "right": CLASSES[name][0], "why": CLASSES[name][1], **row}
      for name, row in classes.items()
      if row["examples"]
    ],
    "bad_rows": {key: count for key, count in bad.to_dict().items() if key != "files"},
  }


def _solutions(data_dir: PathLike, bad: BadRows) -> Iterator[Compared]:
  """Every distinct solution of the pool (its rounds repeat the same ones) and every row of the direct set."""
  train = {problems.problem_key(p.question): p.answer for p in problems.read_problems(data_dir, "train")}
  seen = set()
  for row in iter_pool(data_dir, (0,), bad):
    if (row.question, row.solution) not in seen:
      seen.add((row.question, row.solution))
      answer = extract_answer(row.solution)
      yield Compared("raw pool", row.solution, answer, row.extracted_answer, row.target, row.correct)
  for split in ("train", "val"):
    for direct in iter_direct(data_dir, split, bad):
      target = train.get(problems.problem_key(direct.question))
      if target is None:
        bad.note("question is not a GSM8K train problem", direct.place)
      else:
        answer = extract_answer(direct.solution)
        yield Compared("direct set", direct.solution, answer, None, target, direct.correct)


def _example(c: Compared) -> dict[str, Any]:
  return {
    "text": c.solution[-_EXAMPLE_CHARACTERS:],
    "ours": c.ours and c.ours[:_EXAMPLE_CHARACTERS],
    "released": c.extracted and c.extracted[:_EXAMPLE_CHARACTERS],
    "target": c.target,
    "label": c.label,
  }


def table(results: dict[str, Any]) -> str:
  """The results as text."""
  lines = []
  for name, part in results["parts"].items():
    n = part["solutions"]
    lines.append(f"{name}: {n} solutions, same label {part['same_label']} ({part['same_label'] / n:.2%})")
    if "same_answer" in part:
      lines[-1] += f", same answer {part['same_answer']} ({part['same_answer'] / n:.2%})"
  lines += ["", f"{'class':<24} {'answers':>7} {'labels':>6}  right    why"]
  for c in results["classes"]:
    lines.append(f"{c['name']:<24} {c['answers']:>7} {c['labels']:>6}  {c['right']:<8} {c['why']}")
    for e in c["examples"]:
      label = "correct" if e["label"] else "incorrect"
      read = f"ours {e['ours']!r}, released {e['released']!r}, target {e['target']!r}, labelled {label}"
      lines.append(f"{'':>8}{e['text']!r}: {read}")
  lines += ["", "answers: differs from the released extracted_answer; labels: differs from the released label"]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data_dir", type=expanduser, required=True, help="folder with both clones")
  parser.add_argument("--out", type=expanduser, default="", help="file to write the results to, as JSON")
  args = parser.parse_args()
  with one_message():
    results = compare(args.data_dir)
    if args.out:
      jsonl.write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
  main()
