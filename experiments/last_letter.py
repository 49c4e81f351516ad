"""Last Letter Concatenation (paper, section 4.1).

python -m experiments.last_letter --config=experiments/configs/last_letter.py:tiny --workdir=DIR
"""

import functools

from genrm_jax.pipeline import list_tasks, verifier_stages
from genrm_jax.tasks.last_letter import LastLetter

make_stages = functools.partial(list_tasks.make_stages, LastLetter)

if __name__ == "__main__":
  verifier_stages.main(make_stages)
