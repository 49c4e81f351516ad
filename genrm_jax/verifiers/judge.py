"""LLM-as-a-Judge: the prompt of GenRM-CoT on a model that was not trained to verify (paper, section 4)."""

from genrm_jax.verifiers.genrm_cot import CoTVotes


class Judge(CoTVotes):
  """Untrained models rarely end a rationale, so `settings["max_new_tokens"]` limits its length separately."""

  is_trained = False
