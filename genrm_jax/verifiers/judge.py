"""LLM-as-a-Judge: asked like GenRM-CoT, of a model that was not trained for it (paper, section 4)."""

from genrm_jax.verifiers.genrm_cot import CoTVotes


class Judge(CoTVotes):
  """It has not learnt to end a rationale either, so `settings["max_new_tokens"]` limits it."""

  is_trained = False
