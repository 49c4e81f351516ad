"""A Gemma that compiles in no time, with the character tokenizer and its prompts, for the tests of verifiers."""

from genrm_jax.model.config import get_config
from genrm_jax.text.prompts import Prompter, make_format
from genrm_jax.text.tokenizer import CharTokenizer

CHAR = CharTokenizer()
PROMPTER = Prompter(CHAR, make_format("compact"))
CONFIG = get_config(
  "tiny_gemma1",
  vocab_size=CHAR.vocab_size,
  num_layers=1,
  embed_dim=32,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  ffw_dim=64,
)
