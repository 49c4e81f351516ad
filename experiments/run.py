"""Any config, of a task of your own too.

python -m experiments.run --config=my_config.py --workdir=DIR
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main()
