"""Word Sorting (paper, section 4.1).

python -m experiments.word_sorting --config=experiments/configs/word_sorting.py:tiny --workdir=DIR
"""

import functools

from genrm_jax.pipeline import list_tasks, verifier_stages
from genrm_jax.tasks.word_sorting import WordSorting

make_stages = functools.partial(list_tasks.make_stages, WordSorting)

if __name__ == "__main__":
  verifier_stages.main(make_stages)
