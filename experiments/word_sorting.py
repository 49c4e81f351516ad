"""Word Sorting (paper, section 4.1).

python -m experiments.word_sorting --config=experiments/configs/word_sorting.py:tiny --workdir=DIR
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main("word_sorting")
