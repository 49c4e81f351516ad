"""Boxed answers are read, compared within a time limit that holds, and graded; broken files are named."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from refusals import refused

from genrm_jax.records import Problem
from genrm_jax.tasks.math500 import equality
from genrm_jax.tasks.math500 import problems as math500
from genrm_jax.tasks.math500.problems import BOXED, EMPTY, NOWHERE, SAID, TOO_LONG, UNBALANCED, read_answer

ANSWERS = [
  *((text, "7", BOXED) for text in (r"so \boxed{7}.", r"\boxed{3}, no: \boxed{7}", r"\fbox{7}", r"\boxed {7}")),
  *((text, "5", BOXED) for text in (r"\boxed{x = \boxed{5}}", r"so $\boxed 5$.", r"\boxed 5 it is")),
  (r"The answer is 3. But \boxed{4}", "4", BOXED),
  (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}", BOXED),
  (r"$\boxed 2x + 1$ is it", "2x + 1", BOXED),
  (r"\(\boxed \frac12\)", r"\frac12", BOXED),
  (r"\boxed{\{1, 2\}}", r"\{1, 2\}", BOXED),
  (r"\boxed{\}}", r"\}", BOXED),
  ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}\n", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", BOXED),
  ("The answer is 3.5.", "3.5", SAID),
  ("The answer is 3. The answer is 10,000. I hope so.", "10,000", SAID),
  ("The final answer is: $x = 2$, as said.", "x = 2", SAID),
  (r"the answer is \(\frac{1}{2}\) of it", r"\frac{1}{2}", SAID),
  (r"The answer is $\$5$.", r"\$5", SAID),
  ("The answer is\nRome\nin Italy", "Rome", SAID),
  (r"\boxedfoo{3} The answer is 4", "4", SAID),
  ("The answer is $5$ or \\(6\\).", "5, 6", SAID),
  ("The answer is $x=1$, $x=2$, and $x=3$, since $x>0$.", "x=1, x=2, x=3", SAID),
  ("The answer is $5$ hours and $6$ minutes.", r"5\text{ hours and }6\text{ minutes}", SAID),
  ("The answer is\n$$\n18\n$$<end_of_turn>\nThe answer is 3", "18", SAID),
  ("\\[\\boxed{7}\\]<|im_end|>", "7", BOXED),
  *((text, None, NOWHERE) for text in ("", "x = 5", "The answer is ", "The answer isotope is 5")),
  *((text, None, EMPTY) for text in (r"\boxed{}", r"The answer is 5: \boxed{ \, }", r"\boxed")),
  *((text, None, UNBALANCED) for text in (r"\boxed{5", r"\boxed{3} \boxed{\frac{1}{2}")),
  (r"\boxed{" + "{" * 10_000 + "1" + "}" * 10_001, None, TOO_LONG),
  (r"\boxed{" + "{" * 10_000, None, TOO_LONG),
  ("The answer is " + "9" * 5000, None, TOO_LONG),
]


@pytest.mark.parametrize(("text", "answer", "where"), ANSWERS)
def test_an_answer_is_read_from_the_last_box_or_statement(text, answer, where):
  assert read_answer(text) == (answer, where)


def test_reading_takes_linear_time():
  start = time.process_time()
  for text in (
    *(r"\boxed{" + "9" * 5_000_000 + "}", "9" * 5_000_000, r"\boxed{" * 300_000, r"\boxed " + "\\" * 1_000_000),
    *("the answer is " * 300_000, "The answer is " + " " * 1_000_000),
  ):
    read_answer(text)
  assert time.process_time() - start < 10


@pytest.fixture(scope="module")
def equal():
  pytest.importorskip("math_verify")
  with equality.MathEqual(20.0) as compare:
    yield compare


# Pairs that are equal, and pairs that are not, some of which math-verify calls equal.
SAME = r"""
  \frac{1}{2} = 0.5 | \frac12 = 1/2 | x^2 + 2x + 1 = (x+1)^2 | 2\sqrt{2} = \sqrt{8} | 1, 2, 3 = 3,1,2 | 1{,}234 = 1234
  3\frac{1}{2} = 3.5 | 3 1/2 = 3.5 | 2\ 3/4 = \frac{11}{4} | 90^\circ = 90 | \text{Sunday} = \text{sunday}
  Sunday = sunday | 1/3 = 0.3333333 | \frac{1}{1234} = 0.00081037 | 1/81 = 0.012346 | \frac{1}{1000000} = 10^{-6}
  50\% = 50 | 50\% = 0.5 | \{1/3, 0.5\} = \{0.3333333, 1/2\} | (-\infty, 3] = (-\infty,\frac{6}{2}]
  2516_8 = 2516_{8} | 2516_8 = 2516 | \log_2 8 = 3 | 10 \text{ cm} = 10
  1 \text{ hour} = 1\text{ hour } 0 \text{ minutes} | 5 \text{ mL} = 5\text{ ml} | \text{(C)} = c
  \angle ABC = \angle CBA | \triangle ABC = \triangle BCA | x^2+C = x^2+c | 5\text{ or }6 = 5, 6
  10\text{ AM} = 10\text{ a.m.} | \log_2 3 = \frac{\ln 3}{\ln 2} | \frac 1 2 = 0.5 | \binom 5 2 = 10 | 5! = 120
  1 000 000 = 1{,}000{,}000.0
"""
OTHER = r"""
  5 = 6 | x = y | [1,2) = (1,2) | \pi = 3.14 | (1,2) = (2,1) | \text{odd} = even | 11/2 = 1 1/2 | 23 = 2 \quad 3
  12 = 1 2 | 1 = 1 1/2 | 3 = 1 2 | 5 = 2\ 3 | \frac{1}{2^{99}} = \frac{1}{2^{98}} | 10^{-20} = 2\cdot 10^{-20}
  0.00000001 = 0.00000002 | x+10^{-20} = x+2\cdot10^{-20} | \{10^{-20}\} = \{10^{-21}\} | (10^{-20},1) = (10^{-21},1)
  2516_8 = 2516_9 | 10.1_2 = 10.1_3 | 1\text{ hour }30\text{ minutes} = 1\text{ hour }20\text{ minutes}
  1\text{ hour }30\text{ minutes} = 1\text{ hour} | 1\text{ hour and }30\text{ minutes} = 1
  6\text{ feet }2\text{ inches} = 6\text{ ft }3\text{ in} | 10^\circ 30' = 40^\circ
  5\text{ hours} = 5\text{ minutes} | 5\text{ cm} = 5\text{ m} | 3\text{ apples and }4\text{ pears} = 3
  \$5 = 5\text{ or }6 | 3\text{ apples and }4\text{ pears} = 3\text{ apples and }5\text{ pears}
  10\text{ a.m.} = 10\text{ p.m.} | a = A | 2x = 2X | AB = ab | y=2x = Y=2X | \Gamma = \gamma | P(A) = P(a)
  \angle ABC = \angle ACB | m\angle BAC = m\angle CBA
"""


def _pairs(cases):
  pairs = [case.strip() for part in cases.split("\n") for case in part.split("|") if case.strip()]
  return [tuple(pair.split(" = ")) for pair in pairs]


def test_other_forms_are_equal_and_other_answers_are_not(equal):
  for cases, same in ((SAME, True), (OTHER, False)):
    pairs = _pairs(cases)
    found = {pair: (equal(*pair), equal(*pair[::-1])) for pair in pairs}
    assert len(pairs) > 30 and found == dict.fromkeys(pairs, (same, same))


def test_the_same_text_needs_no_library(monkeypatch):
  pytest.importorskip("math_verify")
  same = [(r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\left(1, 2\right)", "(1,2)"), (r"\$5", "5."), (r"1\,000 ", "$1000$")]
  with equality.MathEqual(1.0) as compare:
    assert all(compare(*pair) for pair in [*same, ("{" * 400, " " + "{" * 400)])
    assert compare._worker is None and compare.counts == {equality.SAME_TEXT: 5}
  refused(*(("more than 0 seconds", equality.MathEqual, seconds) for seconds in (0, -1.0, float("nan"), float("inf"))))
  monkeypatch.setattr(equality.importlib.util, "find_spec", lambda name: None)
  refused((r"genrm-jax\[math\]", equality.MathEqual, 1.0))


def test_a_long_comparison_is_killed_and_counted():
  pytest.importorskip("math_verify")
  with equality.MathEqual(0.5) as compare:
    first = compare._start()
    assert compare("2", "9^{9^{9^9}}") is None
    assert first.poll() is not None, "it is gone"
    hangs = compare._start()
    os.kill(hangs.pid, signal.SIGSTOP)  # it takes no CPU time
    assert compare("1", "2") is None and hangs.returncode == -signal.SIGKILL
    assert compare("2", "9" * 1001) is None
    assert compare.counts == {equality.TIMED_OUT: 2, "too long": 1}


def test_a_worker_that_dies_is_counted_and_replaced(equal):
  before = equal.counts.copy()
  assert equal("5", r"\frac{") is False and equal("5", "\ud800\n\0") is False and equal("1/2", "0.5") is True
  first = equal._worker
  first.kill()
  first.wait()
  assert equal("1", "2") is None
  assert equal.counts - before == {equality.UNREADABLE: 2, equality.EQUAL: 1, equality.DIED: 1}
  assert equal("1/2", "0.5") is True
  second = equal._worker
  assert second.pid != first.pid
  assert equal("1/4", "0.25") is True and equal._worker is second, "one process for many"


def test_no_process_is_left_behind():
  pytest.importorskip("math_verify")
  with equality.MathEqual(20.0) as compare:
    compare("1/2", "0.5")
    worker = compare._worker
  with pytest.raises(ProcessLookupError):
    os.kill(worker.pid, 0)
  # Even if the caller has died, a worker ends at the end of its input, and at its CPU limit.
  command = [sys.executable, "-P", equality._WORKER]
  for limit, line, status in (("20", b"", 0), ("0.1", b'["2", "9^{9^{9^9}}"]\n', -signal.SIGPROF)):
    with subprocess.Popen([*command, limit], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
      worker.stdin.write(line)
      worker.stdin.flush()
      if not line:
        worker.stdin.close()
      assert worker.wait(timeout=60) == status
      assert worker.stdout.read() == b"ready\n"


def _solutions(*answers, correct=None):
  return [math500.Solution("p", f"so \\boxed{{{a}}}", correct) for a in answers]


PROBLEM = Problem("p", "math500", "eval", "?", "1/2")


def test_equal_answers_vote_together():
  pairs = []

  def compare(right, answer):
    pairs.append((right, answer))
    return {"0.5": right == "1/2", "7.0": right == "7", "bad": None}.get(answer, False)

  graded = math500.grade(PROBLEM, [*_solutions("7", "0.5", "7.0", "bad", "7", "0.5", "bad"), *_solutions("")], compare)
  assert [g.candidate.answer for g in graded] == ["7", "1/2", "7", "bad", "7", "1/2", "bad", None]
  assert [g.equal for g in graded] == [False, True, False, None, False, True, None, False]
  assert [g.candidate.correct for g in graded] == [g.equal is True for g in graded]
  assert [g.candidate.index for g in graded] == list(range(8)) and graded[-1].where == EMPTY
  expected = [("1/2", "7"), ("1/2", "0.5"), ("1/2", "7.0"), ("7", "7.0"), ("1/2", "bad")]
  assert pairs == expected, "each distinct answer once"
  labelled = [*_solutions("1/2", correct=False), *_solutions("7", correct=True)]
  graded = math500.grade(PROBLEM, labelled, lambda a, b: a == b)
  assert [(g.candidate.correct, g.equal) for g in graded] == [(False, True), (True, False)]


ROW = {"problem": "What is $1 + 1$?", "solution": "It is \\boxed{2}.", "answer": "2", "subject": "Sums", "level": 1}


def _write(path, *rows):
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return path


def test_problems_and_solutions_are_read(tmp_path):
  other = {"problem": "And $2 + 2$?", "answer": " 4 ", "unique_id": "test/sums/2.json", "level": "Level 1"}
  problems = math500.read_problems(_write(tmp_path / "problems", ROW, "", other))
  assert problems == [
    Problem("math500/00000", "math500", "eval", ROW["problem"], "2", ROW["solution"]),
    Problem("test/sums/2.json", "math500", "eval", "And $2 + 2$?", "4", ""),
  ]
  rows = (
    {"unique_id": "test/sums/2.json", "solution": "a", "correct": False},
    {"problem": " What  is\n$1 + 1$?", "solution": "b"},
    {"problem": other["problem"], "unique_id": "test/sums/2.json", "solution": "c"},
  )
  found = math500.read_solutions(_write(tmp_path / "solutions", *rows), problems)
  texts = {name: [(s.text, s.correct) for s in solutions] for name, solutions in found.items()}
  assert texts == {"math500/00000": [("b", None)], "test/sums/2.json": [("a", False), ("c", None)]}


def test_broken_files(tmp_path):
  for rows, said in (
    *(([ROW, line], ":2: not JSON") for line in ("{", "[" * 100_000, b"\xff".decode("latin-1") + "{")),
    (["[1]"], ":1: expected a JSON object"),
    ([{"problem": "x"}], ':1: no field "answer"'),
    ([{**ROW, "anser": "3"}], ':1: unknown field "anser"'),
    *(([{**ROW, **change}], ':1: field ".*" is .*, expected a') for change in ({"answer": 2}, {"level": None})),
    ([{**ROW, "answer": " $ "}], ':1: "answer" is empty'),
    ([ROW, {**ROW, "answer": "3"}], ":2: the problem of .*problems:1 again"),
    ([], ": the file holds no problem"),
  ):
    refused((rf"^{tmp_path}/problems{said}", math500.read_problems, _write(tmp_path / "problems", *rows)))
  refused((f"{tmp_path}/none: could not be read", math500.read_problems, tmp_path / "none"))
  problems = [Problem(str(i), "math500", "eval", f"p{i}", "1") for i in range(3)]
  for row, said in (
    ({}, ':2: no field "problem" or "unique_id"'),
    ({"problem": "p0", "solution": ...}, ':2: no field "solution"'),
    ({"problem": "p0", "correct": 1}, ':2: field "correct" is 1'),
    *(({name: "none"}, rf":2: a solution to an unknown problem \({name} 'no") for name in ("problem", "unique_id")),
    ({"problem": "p0", "unique_id": "1"}, ':2: "problem" and "unique_id" are of two problems'),
    ({"problem": "p0"}, ": no solution to '1' and 1 other problems"),
  ):
    row = {name: value for name, value in ({"solution": "x"} | row).items() if value is not ...}
    path = _write(tmp_path / "solutions", {"problem": "p0", "solution": "x"}, row)
    refused((rf"^{path}{said}", math500.read_solutions, path, problems))
