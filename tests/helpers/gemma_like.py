"""Writes small SentencePiece files with the layout of Gemma's, since the real ones are not freely available.

The algorithm and its settings, the control and user-defined pieces and their ids up to the runs of spaces, and the
place of the 256 bytes are Gemma's. The rest of the vocabulary is learnt from made-up texts.
"""

import io
import pathlib

import sentencepiece

from genrm_jax.text.tokenizer import SentencePieceTokenizer

VOCAB_SIZE = 750
_UNUSED = [f"<unused{i}>" for i in range(99)]
_TAGS = ("table", "tr", "th", "td", "h1", "h2", "blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code")
_AFTER_TURNS = [
  *("\n" * n for n in range(1, 32)),
  *("▁" * n for n in range(2, 32)),
  *(f"<{slash}{tag}>" for slash in ("", "/") for tag in _TAGS),
]
USER_DEFINED = {
  2: ["<mask>", "<2mass>", "[@BOS@]", *_UNUSED, "<start_of_turn>", "<end_of_turn>", *_AFTER_TURNS],
  3: ["<mask>", "[multimodal]", *_UNUSED, "<start_of_turn>", "<end_of_turn>", *_AFTER_TURNS],
}

TEXTS = [
  f"{name} has {n} {thing} and gives {half} of them away. How many {thing} are left? "
  f"{n} - {half} = {n - half}, so she has {n - half} {thing}. The answer is {n - half}.\n"
  f"Verification: Is the answer correct (Yes/No)? {verdict}. Let's verify step by step.\n"
  f"(1) {verdict}: «naïve» — ½ of 漢字 + {'-' * (n % 9)}{'a' * (n % 7)}\n"
  f"def solve(x):\n  return x - {half}  # {verdict}\n"
  for verdict in ("Yes", "No")
  for name in ("Ann", "Talitha", "Solomon", "Émile", "李")
  for n in range(2, 40, 3)
  for half, thing in ((n // 2, "apples"), (n // 3, "days of work"), (n // 4, "dollars"))
]


def write(path, family: int) -> SentencePieceTokenizer:
  """Writes the file of a family (2 for Gemma 1 and 2, 3 for Gemma 3) and opens it; always the same bytes."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(line for text in TEXTS for line in text.split("\n")),
    model_writer=model,
    model_type="bpe",
    vocab_size=VOCAB_SIZE,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    byte_fallback=True,
    split_digits=True,
    user_defined_symbols=USER_DEFINED[family],
    **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
    **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    num_threads=1,
    shuffle_input_sentence=False,
    minloglevel=2,
  )
  pathlib.Path(path).write_bytes(model.getvalue())
  return SentencePieceTokenizer(path)
