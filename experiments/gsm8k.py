"""GSM8K on the solutions and rationales that the paper's authors released.

    python -m experiments.gsm8k --config=experiments/configs/gsm8k.py:tiny --config.data_dir=DATA --workdir=DIR

DATA holds clones of openai/grade-school-math and genrm-star/genrm-critiques. The candidates are the released ones
(Gemini 1.0 Pro), or a file of your own solutions to GSM8K test problems (config.task.candidates); verifiers are
evaluated on a draw from the pools of held-out problems. Rationales for training come from the raw pool, kept where
their verdict agrees with the label (paper, section 3.3), or from a grader of your own (config.grader).
"""

from genrm_jax.pipeline import cli

if __name__ == "__main__":
  cli.main("gsm8k")
