"""Text to token ids and back: a tiny built-in tokenizer, and any SentencePiece file.

Prompts and continuations are encoded separately and their ids joined, so the pieces of a text must not depend on its
position: `encode(" Yes")` is the same single id after a prompt as alone, and
`decode(encode(a) + encode(b)) == decode(encode(a)) + decode(encode(b))`.
"""

import hashlib
import io
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import sentencepiece
from etils import epath
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.unicode import half_pair

PathLike = str | os.PathLike[str]

# The verdicts; text/prompts.py checks that a tokenizer has one id for each.
VERDICT_PIECES = (" Yes", " No")

# The pieces that open and close a chat turn in Gemma's tokenizer files.
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
TURN_MARKERS = (START_OF_TURN, END_OF_TURN)

# A user-defined piece in brackets, such as a turn marker; an HTML tag has a closing tag as well.
CONTROL_PIECE = re.compile(r"▁?(?:<[^/<>\s][^<>\s]*>|\[[^\[\]\s]+\])")


def max_padding_rows(num_pieces: int) -> int:
  """How many more rows than there are pieces an embedding may have.

  Gemma 1 and 2 have 256,128 rows for 256,000 pieces, Gemma 3 on Hugging Face 262,208 for 262,144, so that they divide
  evenly over chips. Fine-tuning adds rows for new tokens and rounds up to a multiple of 64 to 1024.
  """
  return max(128, num_pieces // 200)


class Tokenizer(Protocol):
  """The interface of a tokenizer."""

  name: str
  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  cls_id: int  # the reserved piece whose logit is the ORM's score
  digest: str  # sha256, in hex, of the tokenizer's definition
  controls: re.Pattern[str]  # matches, as its group, what `encode` turns into a control id, such as a turn marker

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without bos or eos. Raises UserError where the tokenizer cannot express it.

    Text that spells a control piece becomes its id, so this is for templates.
    """

  def encode_plain(self, text: str) -> list[int]:
    """The ids of a text that others wrote: as `encode`, but a spelled control piece stays text."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; pad, bos, eos, cls, turn markers and an embedding's padding rows are "".

    Raises UserError for an id outside the vocabulary and its padding rows.
    """

  def spec(self) -> dict[str, Any]:
    """A JSON description, from which `load_tokenizer` opens the same tokenizer."""


def load_tokenizer(spec: dict[str, Any], base_dir: PathLike | None = None) -> Tokenizer:
  """Opens the tokenizer that a `Tokenizer.spec()` describes.

  Args:
    spec: the description.
    base_dir: a folder, such as a checkpoint's, in which the tokenizer's file is looked up first by its name, then by
      the path in the description. Without it, only the path counts.

  Raises:
    UserError: unknown type, no such file, or another tokenizer than the one described.
  """
  kind = spec.get("type")
  tokenizer: Tokenizer
  if kind == "char":
    tokenizer = CharTokenizer()
  elif kind == "sentencepiece":
    tokenizer = SentencePieceTokenizer(_find(spec["path"], base_dir))
  else:
    raise UserError(f'tokenizer type {kind!r} is unknown; the types are "char" and "sentencepiece"')
  if tokenizer.digest != spec["digest"]:
    raise UserError(
      f"tokenizer {tokenizer.name}: digest {tokenizer.digest[:12]}, but {str(spec['digest'])[:12]} was expected; "
      "restore the tokenizer of this run"
    )
  return tokenizer


def check_vocab(tokenizer: Tokenizer, num_rows: int) -> None:
  """Raises UserError unless an embedding with `num_rows` rows fits: one row per piece and few to spare.

  As in transformers, spare rows count in the softmax and may be sampled; `decode` gives "" for them. So p(Yes) is the
  same there and here, also where fine-tuning has trained rows that the SentencePiece file does not know.
  """
  most = max_padding_rows(tokenizer.vocab_size)
  if not 0 <= num_rows - tokenizer.vocab_size <= most:
    raise UserError(
      f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} pieces, but the model's embedding {num_rows} rows; it "
      f"needs a row for each piece and may have up to {most} more: "
      "use the tokenizer file that came with the model, or set the model's vocab_size"
    )


class CharTokenizer:
  """Printable ASCII and newline, one token per character; " Yes" and " No" are one token each.

  For tiny models trained from scratch.
  """

  name = "char"
  pad_id, bos_id, eos_id, cls_id = range(4)
  controls = re.compile("((?!))")  # none: no text becomes a special id

  def __init__(self) -> None:
    characters = ["\n", *(chr(c) for c in range(ord(" "), ord("~") + 1))]
    self._pieces = ["", "", "", "", *VERDICT_PIECES, *characters]
    self._ids = {piece: i for i, piece in enumerate(self._pieces) if piece}
    self._split = re.compile("|".join(map(re.escape, VERDICT_PIECES)) + "|.", re.DOTALL).findall
    self.vocab_size = len(self._pieces)
    self.digest = hashlib.sha256(json.dumps(["char", self._pieces]).encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without bos or eos. Raises UserError for a character that is not in the table."""
    try:
      return [self._ids[piece] for piece in self._split(text)]
    except KeyError:
      place, character = next((i, c) for i, c in enumerate(text) if c not in self._ids)
      around = text[max(0, place - 20) : place + 20]
      raise UserError(
        f"the char tokenizer has no {character!r} (U+{ord(character):04X}), at character {place} of the text, "
        f"in {around!r}; replace it, or use a SentencePiece tokenizer"
      ) from None

  encode_plain = encode

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; specials and padding rows are ""."""
    _check_range(ids, self.vocab_size, self.name)
    return "".join([self._pieces[i] for i in ids if i < self.vocab_size])

  def spec(self) -> dict[str, Any]:
    """A JSON description for `load_tokenizer`."""
    return {"type": "char", "digest": self.digest}


class SentencePieceTokenizer:
  """Any SentencePiece file: from `train_sentencepiece`, Gemma's, or another.

  Two features of SentencePiece are disabled on loading, since they would make the pieces of a text depend on its
  position: the space in front of a text (`add_dummy_prefix`) and the folding of spaces (`remove_extra_whitespaces`).
  Everything else is as the file says. So, for any file, " Yes" and "Yes" differ, spaces are kept, and joined ids decode
  to the joined texts. Two losses of a file remain:
    - its normalisation (nmt_nfkc, the default of SentencePiece, turns a newline into a space and "½" into "1⁄2");
    - without byte pieces, unknown characters (they become unk, which decodes to " ⁇ ") and "▁" (which becomes a space).
  With identity normalisation and byte pieces, as in our files and Gemma's, decode(encode(x)) == x for every text.

  Reserved ids: bos and eos are the file's. The padding id is the file's or, where it has none, unk: padding has no
  weight and is masked in attention, so the id only has to exist. cls is the first of `CLS_PIECES` in the file.

  Controls are user-defined pieces in brackets, such as Gemma's <start_of_turn>, <unused0> and <mask>, but not its HTML
  tags. `encode` gives their ids, `encode_plain` never does. Turn markers decode to nothing. So neither a user's text
  nor a sampled one can open or close a turn in a later prompt.

  `file_bytes` is the content of the file.
  """

  CLS_PIECES = ("<cls>", "<unused0>", "<extra_id_0>", "▁<extra_id_0>")

  def __init__(self, path: PathLike, file_bytes: bytes | None = None) -> None:
    """Opens a file, or the model in `file_bytes`, which was found at `path`.

    Raises:
      UserError: it is missing, no SentencePiece model, or lacks bos, eos or a piece for cls.
    """
    self._path = os.fspath(path)
    self.file_bytes = _read_model(self._path) if file_bytes is None else file_bytes
    try:
      model = _without_folding(self.file_bytes, self._path)
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (RuntimeError, UnicodeDecodeError) as e:  # the latter: its own message quotes a damaged piece
      raise UserError(f"{self._path}: a damaged SentencePiece model ({e}); copy the file again") from e
    sp = self._processor
    self.name = f"sentencepiece:{epath.Path(path).name}"
    self.digest = hashlib.sha256(self.file_bytes).hexdigest()
    self.vocab_size = sp.get_piece_size()
    trainer = model.trainer_spec
    self.bos_id = self._require("bos", sp.bos_id(), trainer.bos_piece)
    self.eos_id = self._require("eos", sp.eos_id(), trainer.eos_piece)
    self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else sp.unk_id()
    known = [i for i in map(sp.piece_to_id, self.CLS_PIECES) if i != sp.unk_id()]
    if not known:
      raise UserError(
        f"{self._path}: no piece to read the ORM's score from, none of {', '.join(self.CLS_PIECES)}; "
        "use the tokenizer file that came with the model, or one from `train_sentencepiece`"
      )
    self.cls_id = known[0]
    marked = zip(map(sp.piece_to_id, TURN_MARKERS), map(sp.encode, TURN_MARKERS), strict=True)
    turn_ids = [i for i, ids in marked if i != sp.unk_id() and ids == [i]]
    self._specials = frozenset((self.pad_id, self.bos_id, self.eos_id, self.cls_id, *turn_ids))
    own = {p.piece: i for i, p in enumerate(model.pieces) if p.type == p.USER_DEFINED}
    own = {piece: i for piece, i in own.items() if CONTROL_PIECE.fullmatch(piece) and f"</{piece[1:]}" not in own}
    ids = self._specials.union(own.values()) - {sp.unk_id()}
    spelled = {i: text for i in ids if sp.encode(text := sp.id_to_piece(i).replace("▁", " ")) == [i]}
    self._control_ids = frozenset(spelled)
    longest_first = sorted(spelled.values(), key=lambda text: (-len(text), text))
    self.controls = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    self._control_starts = re.compile(f"(?={self.controls.pattern})")
    # SentencePiece writes a space as "▁" and confuses the two; encoded as bytes, a real "▁" survives.
    as_bytes = [sp.piece_to_id(f"<0x{b:02X}>") for b in "▁".encode()]
    self._underscore = None if sp.unk_id() in as_bytes else as_bytes

  def _require(self, what: str, token_id: int, piece: str) -> int:
    if token_id < 0:
      raise UserError(
        f"{self._path}: the file has no {what} piece, by its trainer_spec a control piece called {piece!r}; set its "
        f"{what}_piece to the name that the piece has, use the tokenizer file that came with the model, or train one "
        "with `train_sentencepiece`"
      )
    return token_id

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without bos or eos. Raises UserError for invalid Unicode."""
    if not text.isascii():
      _check_unicode(text)
      if self._underscore is not None and "▁" in text:
        first, *rest = text.split("▁")
        ids = self._processor.encode(first)
        for part in rest:
          ids += self._underscore + self._processor.encode(part)
        return ids
    return self._processor.encode(text)

  def encode_plain(self, text: str) -> list[int]:
    """The ids of a text that others wrote, none of them a control's. Raises UserError for invalid Unicode."""
    parts = [text]
    if self.controls.search(text):  # faster than all starts; cut after its first character, a piece is not found
      cuts = [0, *(match.start() + 1 for match in self._control_starts.finditer(text)), len(text)]
      parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
    ids = [i for part in parts for i in self.encode(part)]
    if self._control_ids.isdisjoint(ids):
      return ids
    return [i for character in text for i in self.encode(character)]  # the file's normalisation spelled a control

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; specials, turn markers and padding rows are "", invalid UTF-8 becomes U+FFFD."""
    _check_range(ids, self.vocab_size, self.name)
    return self._processor.decode([int(i) for i in ids if i < self.vocab_size and i not in self._specials])

  def spec(self) -> dict[str, Any]:
    """A JSON description for `load_tokenizer`, without the file itself."""
    return {"type": "sentencepiece", "path": self._path, "digest": self.digest}


def train_sentencepiece(
  texts: Iterable[str], path: PathLike, vocab_size: int, seed: int = 0, max_lines: int = 400_000
) -> SentencePieceTokenizer:
  """Learns a BPE vocabulary, writes it to `path` and opens it. The same arguments give the same bytes.

  decode(encode(x)) == x for every text; digits are separate pieces; a newline, " Yes" and " No" are always one piece
  each; pad, eos, bos, unk and cls are ids 0 to 4.

  Args:
    texts: training data, read once.
    path: the file to write; missing folders are created.
    vocab_size: the total number of pieces; at least about 300, since 256 are bytes.
    seed: of the sample that is drawn if there are more than `max_lines` lines.
    max_lines: how many lines of at most 4,096 characters are held in memory.

  Raises:
    UserError: too few texts for `vocab_size`, or `vocab_size` is too small for their characters.
  """
  if vocab_size < _MIN_VOCAB_SIZE:
    raise UserError(
      f"vocab_size {vocab_size} is too small: bytes and reserved pieces alone are {_MIN_VOCAB_SIZE}; use some thousands"
    )
  model = io.BytesIO()
  lines = _sample(_lines(texts), max_lines, random.Random(seed))
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      byte_fallback=True,
      split_digits=True,
      user_defined_symbols=["\n", *(piece.replace(" ", "▁") for piece in VERDICT_PIECES)],
      control_symbols=["<cls>"],
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      num_threads=1,  # with more threads the result would depend on timing
      shuffle_input_sentence=False,
      max_sentence_length=8 * _MAX_LINE_CHARACTERS,
      minloglevel=2,
    )
  except RuntimeError as e:
    raise UserError(_training_remedy(str(e), len(lines), vocab_size)) from e
  target = epath.Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.write_bytes(model.getvalue())
    temporary.replace(target)
  except OSError as e:
    raise UserError(f"{os.fspath(path)}: could not be written: {e.strerror or e}; check the path and the disk") from e
  return SentencePieceTokenizer(path)


_MAX_LINE_CHARACTERS = 4096
_MIN_VOCAB_SIZE = 256 + len(("pad", "eos", "bos", "unk", "cls", "newline")) + len(VERDICT_PIECES)


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """The lines of texts, in pieces, since SentencePiece ignores long sentences altogether."""
  for text in texts:
    _check_unicode(text)
    for line in text.split("\n"):
      for start in range(0, len(line), _MAX_LINE_CHARACTERS):
        yield line[start : start + _MAX_LINE_CHARACTERS]


def _sample(lines: Iterable[str], size: int, rng: random.Random) -> list[str]:
  """A uniform sample of at most `size` lines (reservoir sampling)."""
  kept: list[str] = []
  for seen, line in enumerate(lines):
    if seen < size:
      kept.append(line)
    elif (place := rng.randrange(seen + 1)) < size:
      kept[place] = line
  return kept


def _training_remedy(error: str, num_lines: int, vocab_size: int) -> str:
  """An error of SentencePiece as a message with a remedy."""
  if not num_lines:
    return "no text to train a tokenizer on; pass at least some lines"
  if too_high := re.search(r"too high.*<= (\d+)", error):
    return (
      f"vocab_size {vocab_size} is too large for a text of {num_lines} lines; "
      f"use at most {too_high[1]}, or pass more text"
    )
  if too_low := re.search(r"required_chars\. \d+ vs (\d+)", error):
    return f"vocab_size {vocab_size} is too small for the characters of this text; use at least {too_low[1]}"
  return f"SentencePiece could not train on {num_lines} lines with vocab_size {vocab_size}: {error.split('] ')[-1]}"


def _find(path: str, base_dir: PathLike | None) -> epath.Path:
  """The tokenizer file of a description: in `base_dir` if it is there, else at its path."""
  places = [epath.Path(path)]
  if base_dir is not None:
    places = [epath.Path(base_dir) / epath.Path(path).name, epath.Path(base_dir) / path]
  found = next((p for p in places if p.exists()), None)
  if found is None:
    raise UserError(f"no tokenizer file at {' or '.join(str(p) for p in places)}; put the file there")
  return found


def _read_model(path: str) -> bytes:
  try:
    return epath.Path(path).read_bytes()
  except FileNotFoundError as e:
    raise UserError(f"{path}: no such tokenizer file; check the path") from e
  except (OSError, ValueError) as e:  # ValueError: NUL in the path
    why = getattr(e, "strerror", None) or e
    raise UserError(f"{path}: the tokenizer file could not be read: {why}; check the path and its permissions") from e


def _without_folding(serialized: bytes, path: str) -> Any:
  """The ModelProto of a file, without the space in front of a text and without the folding of spaces."""
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  try:
    model.ParseFromString(serialized)
  except message.DecodeError:
    model.Clear()
  if not model.pieces or not all(isinstance(p.piece, str) for p in model.pieces):  # bytes: no UTF-8
    raise UserError(f"{path}: not a SentencePiece model, or a damaged one; copy the file again")
  model.normalizer_spec.add_dummy_prefix = False
  model.normalizer_spec.remove_extra_whitespaces = False
  return model


def _check_unicode(text: str) -> None:
  if fault := half_pair(text):
    raise UserError(f"the text has {fault}")


def _check_range(ids: Sequence[int], vocab_size: int, name: str) -> None:
  limit = vocab_size + max_padding_rows(vocab_size)
  for i in ids:
    if not 0 <= i < limit:
      raise UserError(
        f"id {i} is outside the {vocab_size} ids of tokenizer {name}; was it sampled with another tokenizer?"
      )
