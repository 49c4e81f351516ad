"""The tokenizer of a GGUF file of a Gemma, as the SentencePiece model that it was converted from.

The file holds the pieces with scores and SentencePiece's own types, but llama.cpp's converters change some: they mark
user-defined pieces (turn markers, <unused0>, runs of newlines) and unk as control pieces or as normal ones, write the
spaces of user-defined pieces as spaces, and fill the embedding's spare rows with pieces that no text has.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError

_KEY = "tokenizer.ggml"
_SPECIALS = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}  # SentencePiece's name and llama.cpp's
_SPACE = "▁"


def sentencepiece_model(where: str, metadata: Mapping[str, Any]) -> bytes:
  """The serialised ModelProto; the same metadata give the same bytes.

  Args:
    where: path of the file, for messages.
    metadata: of the file.

  Raises:
    UserError: the file has no tokenizer, one of another kind, or one that is malformed.
  """
  kind = metadata.get(f"{_KEY}.model")
  if kind != "llama":
    raise UserError(
      f"{where}: its tokenizer is {str(kind)[:80]!r}, not a SentencePiece model ('llama') as all Gemmas have; use a "
      "file that llama.cpp converted from the released model"
    )
  names, scores, types = (metadata.get(f"{_KEY}.{key}", []) for key in ("tokens", "scores", "token_type"))
  numbers = all(isinstance(given, np.ndarray) for given in (scores, types))
  if not numbers or not isinstance(names, list) or not len(names) == len(scores) == len(types) > 0:
    raise UserError(f"{where}: its tokenizer has no score and type for each of its pieces; copy the file again")
  proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
  num_pieces = len(names)
  while num_pieces and types[num_pieces - 1] == kinds.UNUSED:
    num_pieces -= 1
  ids = {special: _special_id(where, metadata, names[:num_pieces], special) for special in _SPECIALS}
  own = {i: kinds.UNKNOWN if special == "unk" else kinds.CONTROL for special, i in ids.items()}
  for i, (name, score, type_) in enumerate(zip(names[:num_pieces], scores.tolist(), types.tolist(), strict=False)):
    # SentencePiece scores the best merge -0.0, and user-defined pieces 0.0.
    is_merge = type_ == kinds.NORMAL and (score != 0 or math.copysign(1, score) < 0)
    if type_ in (kinds.NORMAL, kinds.CONTROL, kinds.UNKNOWN) and not is_merge:
      type_ = own.get(i, kinds.USER_DEFINED)
    if type_ not in kinds.Type.values():
      raise UserError(f"{where}: piece {i} of its tokenizer has type {type_}, which is none; copy the file again")
    proto.pieces.add(piece=name.replace(" ", _SPACE), score=score if is_merge else 0.0, type=type_)
  trainer.model_type, trainer.vocab_size = trainer.BPE, num_pieces
  trainer.byte_fallback = any(piece.type == kinds.BYTE for piece in proto.pieces)
  for special, i in ids.items():
    setattr(trainer, f"{special}_id", i)
    if i >= 0:
      setattr(trainer, f"{special}_piece", proto.pieces[i].piece)
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
  return proto.SerializeToString(deterministic=True)


def _special_id(where: str, metadata: Mapping[str, Any], names: list[str], special: str) -> int:
  """The id of a special piece, -1 if there is none.

  That of Gemma's name comes first: the metadata of a chat model may name a turn marker as eos.
  """
  if f"<{special}>" in names:
    return names.index(f"<{special}>")
  i = metadata.get(f"{_KEY}.{_SPECIALS[special]}_token_id", -1)
  if type(i) is not int or not -1 <= i < len(names):
    raise UserError(f"{where}: its tokenizer has {len(names)} pieces, but {special} is {i!r}; copy the file again")
  return i
