"""Our tokenizers as the files that Hugging Face's libraries, and the servers built on them, load.

A folder gets `tokenizer.json` (the algorithm and its vocabulary), `tokenizer_config.json` (special tokens, and for a
chat its template) and, for a SentencePiece tokenizer, the file itself as `tokenizer.model`. The ids of every text are
ours, with bos before them; one exception, which all tokenizers there share: a text that spells a special piece, such as
"<bos>", becomes that piece, unless it is encoded with `split_special_tokens=True`.

SentencePiece's BPE joins, of all neighbours whose joined text is a piece, the pair with the best score, the leftmost
of equals. Here instead a list says which pairs join, each with a rank of its own. The two give the same ids if the
list holds, in the order of the pieces' scores, one pair a piece: the one that is joined last when the piece's own text
is encoded. (No other can be: until a span of a text has become one piece, nothing was joined across its ends, so
inside it the same pairs were joined in the same order as if it stood alone.)
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
# The Jinja template of Gemma's turns, in the form in which prompts of text/prompts.py are written.
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
  """Writes the tokenizer into a folder, for `transformers.AutoTokenizer.from_pretrained`.

  Args:
    tokenizer: one of ours.
    folder: is made if need be; files of the same names are replaced.
    chat: adds the template of Gemma's turns.

  Raises:
    UserError: the tokenizer cannot be expressed there with the same ids for every text, has no turns for a chat, or the
      files could not be written.
  """
  files: dict[str, bytes] = {}
  if isinstance(tokenizer, CharTokenizer):
    content, names = _char(tokenizer)
  elif isinstance(tokenizer, SentencePieceTokenizer):
    content, names = _sentencepiece(tokenizer)
    files["tokenizer.model"] = tokenizer.file_bytes
  else:
    raise UserError(f"tokenizer {tokenizer.name} is of a kind that cannot be written for Hugging Face")
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
  """The document around a model. `split_out` are pieces that are found in a text before the model sees it."""
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
  """A character a token. Its unknown token is none of the vocabulary: to encode an unknown character is an error."""
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
  """BPE with byte pieces; UserError for a file whose ids it would not give."""
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  proto.ParseFromString(tokenizer.file_bytes)
  kinds = proto.SentencePiece
  # Spaces stand as they are, not as "▁": a "▁" in a text is then unknown and becomes bytes, as in our `encode`.
  names = [p.piece if p.type == kinds.BYTE else p.piece.replace(_SPACE, " ") for p in proto.pieces]
  of_kind: dict[int, set[int]] = {kind: set() for kind in kinds.Type.values()}
  for i, piece in enumerate(proto.pieces):
    of_kind[piece.type].add(i)
  scores = {names[i]: proto.pieces[i].score for i in of_kind[kinds.NORMAL]}
  merges = _merges(scores)
  ranks = [scores[left + right] for left, right in merges]
  normalizer = proto.normalizer_spec
  faults = {
    "it is no BPE model": proto.trainer_spec.model_type != proto.trainer_spec.BPE,
    "it changes texts (its normalisation is not identity)": bool(normalizer.precompiled_charsmap),
    "it keeps spaces as they are": not normalizer.escape_whitespaces,
    "it has not all 256 byte pieces": len(of_kind[kinds.BYTE]) != 256 or not proto.trainer_spec.byte_fallback,
    "it has no piece for a space": " " not in names,
    "it has pieces marked as unused": bool(of_kind[kinds.UNUSED]),
    "pieces stand in it twice": len(set(names)) != len(names),
    "pieces share a score": any(a == b for a, b in itertools.pairwise(ranks)),
    "a piece is made of others that are none": not {part for pair in merges for part in pair} <= set(names),
  }
  fault = next((what for what, found in faults.items() if found), None)
  if fault is not None:
    raise UserError(
      f"{tokenizer.spec()['path']}: Hugging Face's tokenizers would not give the same ids, since {fault}; "
      "use a tokenizer that was trained as `train_sentencepiece` does, or one of Gemma's"
    )
  unk = next(iter(of_kind[kinds.UNKNOWN]))
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
  turns = {i for i in of_kind[kinds.USER_DEFINED] if names[i] in TURN_MARKERS}
  content = _tokenizer_json(
    model,
    names,
    special=of_kind[kinds.CONTROL] | {unk, tokenizer.pad_id} | turns,
    split_out=of_kind[kinds.USER_DEFINED],
    bos_id=tokenizer.bos_id,
    decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
  )
  return content, names


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
  """The pair from which each piece is made, best score first."""
  pairs = (_last_pair(piece, scores) for piece in sorted(scores, key=scores.__getitem__, reverse=True))
  return [pair for pair in pairs if pair is not None]


def _last_pair(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
  """The two parts that BPE joins last when it encodes a piece's own text; None if it never joins them all."""
  parts = list(piece)
  while len(parts) > 2:
    pairs = [scores.get(a + b, -math.inf) for a, b in itertools.pairwise(parts)]
    best = pairs.index(max(pairs))
    if pairs[best] == -math.inf:
      return None
    parts[best : best + 2] = [parts[best] + parts[best + 1]]
  return (parts[0], parts[1]) if len(parts) == 2 else None
