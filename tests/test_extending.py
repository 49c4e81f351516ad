"""The page on extending, as it stands: a task and a verifier in a user's own files run to a report."""

import json
import re
import sys

import processes
import pytest
from refusals import refused

import genrm_jax
from genrm_jax.data import jsonl
from genrm_jax.records import Score

PAGE = processes.ROOT / "docs" / "extending.md"


@pytest.fixture(scope="module")
def user(tmp_path_factory):
  """The user's folder with the page's files, after the page's command was run in it."""
  folder = tmp_path_factory.mktemp("user")
  blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
  assert [name for name, _ in blocks] == ["my_sums.py", "my_verifier.py", "my_config.py"]
  for name, text in blocks:
    (folder / name).write_text(text)
  (command,) = re.findall(r"```bash\n(python .*?)\n```", PAGE.read_text())
  done = processes.run(*command.split()[1:], cwd=folder, PYTHONPATH=f"{folder}:{processes.ROOT}")
  assert done.returncode == 0, done.stderr
  return folder


def test_the_users_task_and_verifier_stand_in_the_report_and_are_loaded_by_path(user, monkeypatch):
  work = user / "runs/sums"
  results = json.loads((work / "report/results.json").read_text())
  assert results["meta"]["task"] == "sums" and list(results["verifiers"]) == ["orm", "genrm_cot", "two_prompts"]
  assert "two_prompts" in (work / "report/report.md").read_text()
  scores = jsonl.read_records(work / "scores/two_prompts.jsonl", Score)
  assert all(len(s.votes) == 2 and s.value == pytest.approx(sum(v.p_yes for v in s.votes) / 2) for s in scores)
  assert any(r["kept"] for r in map(json.loads, (work / "rationales/train.jsonl").read_text().splitlines()))
  path = user / "runs/sums/checkpoints/two_prompts"
  monkeypatch.syspath_prepend(user)
  scores = jsonl.read_records(user / "runs/sums/scores/two_prompts.jsonl", Score)
  lines = (user / "runs/sums/candidates/eval.jsonl").read_text().splitlines()
  problems = {p["id"]: p["question"] for p in map(json.loads, (user / "runs/sums/problems/eval.jsonl").open())}
  pairs = [(problems[c["problem_id"]], c["text"]) for c in map(json.loads, lines)]
  verifier = genrm_jax.load(path)
  assert type(verifier.verifier).__name__ == "TwoPrompts"
  assert verifier.score_many(pairs) == pytest.approx([s.value for s in scores], rel=1e-4)
  monkeypatch.undo()
  sys.modules.pop("my_verifier", None)
  refused(("module my_verifier does not import", genrm_jax.load, user / "runs/sums/checkpoints/two_prompts"))
