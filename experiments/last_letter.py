"""Last Letter Concatenation (paper, section 4.1).

python -m experiments.last_letter --config=experiments/configs/last_letter.py:tiny --workdir=DIR
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main("last_letter")
