"""Gemma 3 270M as others read its GGUF file: logits of transformers, and llama.cpp's algorithm for token ids.

    pip install accelerate; python tests/peers/real_gemma.py      makes the golden, in two minutes and 8 GiB

transformers dequantises and converts the file itself. The golden holds its logits in float64 at some ids, and their
logsumexp over all ids.
"""

import heapq
import itertools
import pathlib
import random

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "gemma3_270m.npz"
TEXT = """\
Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. \
How many clips did Natalia sell altogether in April and May?
Natalia sold 48/2 = 24 clips in May.
Natalia sold 48+24 = 72 clips altogether in April and May.
The answer is 72.
Is the answer correct (Yes/No)? Yes
"""
_CONTROL, _USER_DEFINED = 3, 4


def corpus() -> list[str]:
  """Digits, newlines, spaces, code, HTML, many scripts, emoji, bytes, turn markers; and random mixtures of them.

  Without which llama.cpp takes for a space, and this library writes as bytes.
  """
  # fmt: off
  parts = [
    "1234567890", " 3.14", "-7", "1,000", "²", "½", "\n", "\n\n", "\n" * 33, "\r\n", "\t", "\t\t\t", " ", "  ",
    " " * 40, "a", " the", "The", " Yes", " No", "Yes/No", "don't", "naïve", "e\u0301", "Straße", "漢字",
    "日本語", "한국어", "العربية", "עברית", "हिन्दी", "ไทย", "Ελληνικά", "русский", "🏳️\u200d🌈",
    "👩🏽\u200d🔬", "🤖", "\U00010330", "\ue123", "\0", "\x7f", "\u200b", "\ufeff", "\ufffd", "<table>",
    "</td>", "<b>", "<0x41>", "<unused7>", "<end_of_turn>\n", "<start_of_turn>user\n", "<end_of_",
    "def f(x):\n    return x ** 2\n", "https://a.b/c?d=e#f", "$x^2$", "\\frac{1}{2}", "----------",
    "aaaaaaaaaaaaa", "?!", "«»", "“”", "…", "snake_case", "CamelCase", "<>", "[", "]",
  ]
  # fmt: on
  rng = random.Random(0)
  return [TEXT, *parts, *("".join(rng.choices(parts, k=rng.randrange(2, 30))) for _ in range(300))]


def llama_ids(metadata, texts, special=True):
  """The ids of texts by llama.cpp's tokenizer "llama", from a file's metadata as it stands.

  Args:
    metadata: of the file.
    texts: without bos.
    special: whether control pieces in a text are read as such.
  """
  names, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
  ids = {name: i for i, name in enumerate(names)}
  split_at = [i for i, kind in enumerate(types) if kind == _USER_DEFINED or (special and kind == _CONTROL)]
  split_at.sort(key=lambda i: -len(names[i]))

  def fragments(text):
    """Texts and ids: the longest piece is cut out everywhere, then the next."""
    out = [text]
    for i in split_at:
      if names[i] in text:
        cut = (part.split(names[i]) if isinstance(part, str) else [part] for part in out)
        out = [x for parts in cut for j, part in enumerate(parts) for x in ([i] if j else []) + [part] if x != ""]
    return out

  def merged(text):
    """Adjacent symbols are merged by the best score, the leftmost first."""
    symbols = list(text.replace(" ", "▁"))
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    queue = []

    def offer(left, right):
      pair = symbols[left] + symbols[right] if left >= 0 <= right else ""
      if pair in ids:
        heapq.heappush(queue, (-scores[ids[pair]], left, right, pair))

    for left, right in itertools.pairwise(range(len(symbols))):
      offer(left, right)
    while queue:
      _, left, right, pair = heapq.heappop(queue)
      if symbols[left] and symbols[right] and symbols[left] + symbols[right] == pair and after[left] == right:
        symbols[left], symbols[right], after[left] = pair, "", after[right]
        if after[right] >= 0:
          before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    for symbol in filter(None, symbols):
      yield from [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]

  return [[i for x in fragments(text) for i in (merged(x) if isinstance(x, str) else [x])] for text in texts]


def main() -> None:
  import torch
  import transformers

  from genrm_jax.checkpoints import names

  path = names.resolve(names.GEMMA3_270M)
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
  )
  torch.nn.Module.double(model)
  tokens = tokenizer(TEXT).input_ids
  with torch.no_grad():
    logits = model(input_ids=torch.tensor([tokens])).logits[0]
  ids = np.union1d(np.arange(0, logits.shape[-1], 2048), tokens)
  lse = torch.logsumexp(logits, -1).numpy()
  np.savez_compressed(GOLDEN, tokens=tokens, ids=ids, logits=logits[:, ids].numpy().astype(np.float32), logsumexp=lse)


if __name__ == "__main__":
  main()
