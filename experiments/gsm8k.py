"""GSM8K with the solutions and rationales that the paper's authors released.

    python -m experiments.gsm8k --config=experiments/configs/gsm8k.py:tiny --config.data_dir=DATA --workdir=DIR

DATA holds clones of openai/grade-school-math and genrm-star/genrm-critiques. Verifiers are evaluated on a random sample
of the released candidates (Gemini 1.0 Pro) to held-out problems, or on your own solutions to GSM8K test problems
(config.task.candidates). Training rationales are the released raw ones whose verdict agrees with the label (paper,
section 3.3), or are sampled from your own grader (config.grader).
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main("gsm8k")
