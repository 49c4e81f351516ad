"""False equations are found, and nothing else; planted slips are found."""

import random

import pytest

from genrm_jax.tasks.gsm8k.arithmetic import false_equations, plant_slip


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("So 48 / 2 = 24 and 48 + 24 = 62.", ["48 + 24 = 62"]),
    ("They pay $10 * 3 = $60.", ["$10 * 3 = $60"]),
    ("In total 1,200 / 3 - 100 = 200 eggs", ["1,200 / 3 - 100 = 200"]),
    *((f"and {text}", [text]) for text in ("14 + 3 = 18", "12 - 15 = 3", "0.1 + 0.2 = 0.4", "1 / 2 * 6 x 2 = 7")),
    *(("- 4 * 3 = 13", ["4 * 3 = 13"]), ("x = 40 + 50 = 80", ["40 + 50 = 80"]), ("2 × 3 = 8", ["2 × 3 = 8"])),
    ("48 / 2 = 24, 48 + 24 = 72", []),
    ("10 / 3 = 3.33 and 10 / 3 = 3 and 20 / 3 = 7", []),  # rounded to what is shown, down or up
    ("2 * (3 + 4) = 15, (1 + 2) * 3 + 4 = 15", []),  # brackets are not judged
    ("3 * 2 = 4 + 2 = 6", []),  # a right side that goes on
    ("20% of 50 * 2 = 20, half of 4 + 2 = 4, 6 multiplied by 2 + 1 = 18", []),  # the front is in words
    ("3/4 = 75%, 3 / 4 = 75 percent, 7 / 2 = 3 remainder 1, 1.5 + 1 = 250 cents", []),
    ("5 - 2x = 3, y + 3 = 9, 2^3 * 2 = 16, 5 / 0 = 0, 12 = 13", []),
  ],
)
def test_false_equations_are_found_and_nothing_else(text, found):
  assert false_equations(text) == found


def test_a_planted_slip_is_carried_on_and_found():
  text = "He has 6 * 5 = 30 apples and eats 4, so 30 - 4 = 26 are left. He sells 26.\nThe answer is 26."
  for seed in range(20):
    slipped = plant_slip(text, random.Random(seed))
    assert slipped is not None
    (equation,) = false_equations(slipped)
    said = equation.rpartition(" ")[2]
    assert equation.startswith("30 - 4 = ") and len(said) == 2
    assert slipped == text.replace("26", said)
  for text in ("The answer is 5.", "2 + 2 = 5", "2 + 3 = 5 * 2 = 10", "3 / 0 = 3"):
    assert plant_slip(text, random.Random(0)) is None
  slipped = plant_slip("1 + 1 = 2 of 20, 2.5, 12, 1,2 and 2", random.Random(0))
  assert slipped == f"1 + 1 = {slipped[8]} of 20, 2.5, 12, 1,2 and {slipped[8]}"
