"""The raw pool of rationales is measured beside the released set."""

from experiments.studies import gsm8k_rationales
from genrm_jax.tasks.gsm8k.rows import CritiqueRow, Place, PoolRow
from genrm_jax.text.prompts import RELEASED

ASK = RELEASED.verdict_question


def test_the_pool_is_measured_beside_the_released_set(capsys):
  def row(question, solution, text, correct, line):
    return PoolRow(question, solution, line, "4", "4" if correct else "5", correct, text, 0, Place("shard", line))

  def released(question, solution, text, verdict):
    return CritiqueRow(question, solution, f"{text}\n\n{ASK} {verdict}", verdict == "Yes", Place("val", 1))

  pool = [
    row("How  many?", "four", f"**Verification:**\n\nfour\nis right\n\n**Final Grade:** {ASK} Yes", True, 1),
    row("How many?", "four", "fine\nVerification: Is the answer correct? Yes", True, 2),
    row("How many?", "five", f"as the Expected Answer\n\n{ASK} No", False, 3),
    row("How much?", "six", f"six\n\n{ASK} No", True, 4),
  ]
  known = [
    released("How many?", "four", "\nfour is right", "Yes"),
    released("How many?", "4", "another", "Yes"),
    released("Who?", "Ada", "Expected Answer: Bo", "No"),
  ]
  found, replay = gsm8k_rationales.measure(pool, known)
  assert found["rationales"] == 4
  right, wrong, both = found["ledgers"]["lenient-2"].values()
  assert (right["all"], right["kept"], right["dropped: verdict disagrees with the label"]) == (3, 2, 1)
  assert (right["solutions"], right["problems"]) == ({"all": 2, "kept": 1}, {"all": 2, "kept": 1})
  assert wrong["kept"] == 1
  assert both == {"all": 1, "kept": 1}
  assert found["ledgers"]["lenient-2+drop_leaks"]["incorrect"]["kept"] == 0
  ours, theirs, search = found["released_validation"].values()
  assert search == {
    "correct": {"rows": 2, "problem in the pool": 2, "solution in the pool": 1, "rationale in the pool": 1},
    "incorrect": {"rows": 1, "problem in the pool": 0, "solution in the pool": 0, "rationale in the pool": 0},
  }
  assert [(table["rows"], table["starts with a line break"]) for table in (ours["correct"], theirs["correct"])] == [
    (2, 0),
    (2, 0.5),
  ]
  for label, n in (("correct", 2), ("incorrect", 1)):
    assert ours[label]["rows"] == n
    assert ours[label]["ends in the verdict question and the verdict"] == 1
    assert ours[label]["verdict is the label"] == ours[label]["empty line before the question"] == 1
    assert ours[label]["heading 'Final Grade' before the question"] == 0
  assert theirs["incorrect"]["names the reference"] == ours["incorrect"]["names the reference"] == 1
  gsm8k_rationales.show(found, replay)
  printed = capsys.readouterr().out
  assert "shard:2; kept -> no verdict" in printed
  assert "verdict Yes -> none 1" in printed
