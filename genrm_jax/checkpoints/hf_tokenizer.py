"""Exports our tokenizers as files for Hugging Face's libraries and the servers built on them.

The export consists of `tokenizer.json` (the algorithm and its vocabulary), `tokenizer_config.json` (special tokens, and
a chat template if asked for) and, for a SentencePiece tokenizer, the original file as `tokenizer.model`. Every text
gets the same ids as from our tokenizer, preceded by bos. The one exception is common to all Hugging Face tokenizers: a
text that spells a special piece, such as "<bos>", becomes that piece unless encoded with `split_special_tokens=True`.

SentencePiece's BPE repeatedly merges the adjacent pair whose union is the piece with the best score, leftmost first.
Hugging Face's BPE merges pairs from a list, in the order of that list. Both give the same ids if the list has one pair
per piece, in the order of the pieces' scores: the pair that is merged last when the piece's own text is encoded. (No
other pair can form the piece: until a span has become one piece, nothing was merged across its ends, so the merges
inside it were those of the span alone, in the same order.)
"""

import itertools
import json
import math
import os
from typing import Any

from etils import epath
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import TURN_MARKERS, CharTokenizer, SentencePieceTokenizer, Tokenizer

PathLike = str | os.PathLike[str]

_SPACE = "▁"  # how SentencePiece writes a space
# The Jinja template of Gemma's turns, consistent with the prompts of text/prompts.py.
_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
    {{- raise_exception('turns must be of user, assistant, user, ...; put a system text into the first turn') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('user', 'model')[loop.index0 % 2] + '\\n' -}}
  {{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def export_tokenizer(tokenizer: Tokenizer, folder: PathLike, chat: bool) -> None:
  """Writes a tokenizer for `transformers.AutoTokenizer.from_pretrained`.

  Args:
    tokenizer: one of text/tokenizer.py.
    folder: created if needed; files of the same names are replaced.
    chat: add the chat template of Gemma's turns.

  Raises:
    UserError: the exported tokenizer would not give the same ids for every text, a chat is requested but the tokenizer
      has no turn markers, or the files cannot be written.
  """
  files: dict[str, bytes] = {}
  if isinstance(tokenizer, CharTokenizer):
    content, names = _char(tokenizer)
  elif isinstance(tokenizer, SentencePieceTokenizer):
    content, names = _sentencepiece(tokenizer)
    files["tokenizer.model"] = tokenizer.file_bytes
  else:
    raise UserError(f"tokenizer {tokenizer.name} is of a kind that cannot be exported to Hugging Face's format")
  missing = [marker for marker in TURN_MARKERS if chat and len(tokenizer.encode(marker)) != 1]
  if missing:
    raise UserError(
      f"tokenizer {tokenizer.name} has no piece {missing[0]!r}, which a chat needs; export it without chat"
    )
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands
    "bos_token": names[tokenizer.bos_id],
    "eos_token": names[tokenizer.eos_id],
    "pad_token": names[tokenizer.pad_id],
    "additional_special_tokens": [name for name in names if name in TURN_MARKERS],
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
  }
  if content["model"]["unk_token"] in names:
    config["unk_token"] = content["model"]["unk_token"]
  if chat:
    config["chat_template"] = _CHAT_TEMPLATE
  files["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()
  files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
  target = epath.Path(folder)
  try:
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      (target / name).write_bytes(data)
  except OSError as e:
    raise UserError(f"{target}: could not be written: {e.strerror or e}; check the path and the disk") from e


def _tokenizer_json(
  model: dict[str, Any], names: list[str], special: set[int], split_out: set[int], bos_id: int, **parts: Any
) -> dict[str, Any]:
  """The document around a model. `split_out` are pieces that are matched before the model sees the text."""
  bos = names[bos_id]
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  added = [{"id": i, "content": names[i], **flags, "special": i in special} for i in sorted(special | split_out)]
  first = {"SpecialToken": {"id": bos, "type_id": 0}}
  texts = {part: {"Sequence": {"id": part, "type_id": 0}} for part in ("A", "B")}
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": {
      "type": "TemplateProcessing",
      "single": [first, texts["A"]],
      "pair": [first, texts["A"], first, texts["B"]],
      "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    },
    "decoder": None,
    "model": model,
    **parts,
  }


def _char(tokenizer: CharTokenizer) -> tuple[dict[str, Any], list[str]]:
  """One token per character. The unknown token is not in the vocabulary, so encoding an unknown character fails."""
  names = ["<pad>", "<bos>", "<eos>", "<cls>"]
  names += [tokenizer.decode([i]) for i in range(len(names), tokenizer.vocab_size)]
  special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id}
  model = {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "<unk>"}
  content = _tokenizer_json(
    model,
    names,
    special,
    split_out={i for i, name in enumerate(names) if i not in special and len(name) > 1},
    bos_id=tokenizer.bos_id,
    pre_tokenizer={"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    decoder={"type": "Fuse"},
  )
  return content, names


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], list[str]]:
  """BPE with byte fallback; UserError for a file whose ids it would not reproduce."""
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  proto.ParseFromString(tokenizer.file_bytes)
  kinds = proto.SentencePiece
  # Spaces stay spaces instead of "▁": so a "▁" in a text is unknown and becomes bytes, as in our `encode`.
  names = [p.piece if p.type == kinds.BYTE else p.piece.replace(_SPACE, " ") for p in proto.pieces]
  ids: dict[int, set[int]] = {kind: set() for kind in kinds.Type.values()}
  for i, piece in enumerate(proto.pieces):
    ids[piece.type].add(i)
  scores = {names[i]: proto.pieces[i].score for i in ids[kinds.NORMAL]}
  merges = _merges(scores)
  ranks = [scores[left + right] for left, right in merges]
  normalizer = proto.normalizer_spec
  faults = {
    "it is not a BPE model": proto.trainer_spec.model_type != proto.trainer_spec.BPE,
    "it changes texts (its normalisation is not the identity)": bool(normalizer.precompiled_charsmap),
    "it keeps spaces as they are": not normalizer.escape_whitespaces,
    "it lacks some of the 256 byte pieces": len(ids[kinds.BYTE]) != 256 or not proto.trainer_spec.byte_fallback,
    "it has no piece for a space": " " not in names,
    "it has pieces marked as unused": bool(ids[kinds.UNUSED]),
    "it has a piece twice": len(set(names)) != len(names),
    "two pieces share a score": any(a == b for a, b in itertools.pairwise(ranks)),
    "a piece consists of parts that are not pieces": not {part for pair in merges for part in pair} <= set(names),
  }
  fault = next((what for what, found in faults.items() if found), None)
  if fault is not None:
    raise UserError(
      f"{tokenizer.spec()['path']}: Hugging Face's tokenizers would not give the same ids, since {fault}; "
      "use a tokenizer from `train_sentencepiece`, or one of Gemma's"
    )
  unk = next(iter(ids[kinds.UNKNOWN]))
  model = {
    "type": "BPE",
    "dropout": None,
    "unk_token": names[unk],
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
    "vocab": {name: i for i, name in enumerate(names)},
    "merges": merges,
  }
  turns = {i for i in ids[kinds.USER_DEFINED] if names[i] in TURN_MARKERS}
  content = _tokenizer_json(
    model,
    names,
    special=ids[kinds.CONTROL] | {unk, tokenizer.pad_id} | turns,
    split_out=ids[kinds.USER_DEFINED],
    bos_id=tokenizer.bos_id,
    decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
  )
  return content, names


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
  """The pair that forms each piece, best score first."""
  pairs = (_last_pair(piece, scores) for piece in sorted(scores, key=scores.__getitem__, reverse=True))
  return [pair for pair in pairs if pair is not None]


def _last_pair(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
  """The two parts that BPE merges last when it encodes a piece's own text; None if it does not end with one piece."""
  parts = list(piece)
  while len(parts) > 2:
    pairs = [scores.get(a + b, -math.inf) for a, b in itertools.pairwise(parts)]
    best = pairs.index(max(pairs))
    if pairs[best] == -math.inf:
      return None
    parts[best : best + 2] = [parts[best] + parts[best + 1]]
  return (parts[0], parts[1]) if len(parts) == 2 else None
