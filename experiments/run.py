"""Runs any config, including one of your own task.

python -m experiments.run --config=my_config.py --workdir=DIR
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main()
