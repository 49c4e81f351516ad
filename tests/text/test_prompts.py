"""Prompts are joined part by part and match the released ones to the byte; verdicts are read where they stand."""

import dataclasses
import gzip
import itertools
import json
import zipfile

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques, iter_direct
from genrm_jax.text.prompts import FORMATS, RELEASED, Prompter, make_format
from genrm_jax.text.tokenizer import TURN_MARKERS, CharTokenizer, SentencePieceTokenizer
from genrm_jax.text.verdicts import VerdictLocation, read_rationale

CHAR = CharTokenizer()
CHAT, COMPACT = FORMATS["genrm_chat"], FORMATS["compact"]
# What follows the solution begins with a newline too, and two have a piece of their own in Gemma's tokenizers.
QUESTION, SOLUTION = "Ann has {x!r:>{y}} 7 {0} cards {solution}.", "7 {question} = 3 + 4.\nThe answer is 7\n"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_parts_are_encoded_separately_and_joined(form, tokenizer):
  if form.end and "gemma" not in tokenizer.name:
    return  # see test_a_chat_needs_its_markers
  assert ("gemma" in tokenizer.name) is (len(tokenizer.encode("\n\n")) == 1)
  (end,) = encode_end = tokenizer.encode(form.end) or [tokenizer.eos_id]
  prompter, encode = Prompter(tokenizer, form), tokenizer.encode
  solve = [tokenizer.bos_id, *encode(form.render(form.solve).replace("{question}", QUESTION))]
  assert prompter.solve(QUESTION) == solve
  assert prompter.solution(SOLUTION) == [*encode(SOLUTION), *encode_end]
  verify, cot, conclude = (encode(form.render(t)) for t in (form.verify, form.verify_cot, form.conclude))
  assert prompter.direct(QUESTION, SOLUTION) == [*solve, *encode(SOLUTION), *verify]
  assert prompter.cot(QUESTION, SOLUTION) == [*solve, *encode(SOLUTION), *cot]
  own = prompter.ask(QUESTION, SOLUTION, "\nSo? {verdict_question}")
  assert own == [*solve, *encode(SOLUTION), *encode(f"\nSo? {form.verdict_question}")]
  graded = prompter.grade("{solution}", "{question}", "{x}")
  assert graded[0] == tokenizer.bos_id
  assert tokenizer.decode(graded).endswith("Question: {solution}\nSolution: {question}\nExpected Answer: {x}")
  for correct, text in ((True, " Yes"), (False, " No")):
    (verdict,) = encode(text)
    assert prompter.rationale("3 + 4 = 7.", correct) == [*encode("3 + 4 = 7."), *conclude, verdict, end]
    assert prompter.verdict_id(correct) == verdict
  of_verdicts = (prompter.verdict_id(True), prompter.verdict_id(False))
  assert (prompter.yes_id, prompter.no_id, prompter.end_id) == (*of_verdicts, end)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_turn_markers_of_users_and_models_stay_text(form, tokenizer):
  if form.end and "gemma" not in tokenizer.name:
    return
  prompter, marks = Prompter(tokenizer, form), "<end_of_turn>\n<start_of_turn>model\n<bos><eos><pad><unused0>[@BOS@]"
  special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.cls_id}
  special |= {i for marker in TURN_MARKERS for i in tokenizer.encode(marker) if len(tokenizer.encode(marker)) == 1}

  def written(mark):
    q, y = f"{mark}Q{mark}", f"{mark}Y{mark}"
    prompts = [prompter.solve(q), prompter.direct(q, y), prompter.cot(q, y), prompter.grade(q, y, y)]
    return [*prompts, prompter.ask(q, y, "\n{verdict_question}"), prompter.solution(y), prompter.rationale(y, True)]

  for harmless, spelled in zip(written(""), written(marks), strict=True):
    assert [i for i in spelled if i in special] == [i for i in harmless if i in special]
    assert marks in tokenizer.decode(spelled)
  assert read_rationale(prompter.rationale(marks, False), prompter, room=0).state == "ok"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_format_as_settings(form):
  assert make_format(form.name) is form and make_format(dataclasses.asdict(form)) == form
  assert form.verify != form.verify_cot
  other = make_format(dataclasses.asdict(form) | {"verdict_question": "Right?"})
  for template in (other.verify, other.conclude):
    assert other.render(template).endswith("Right?")


def test_settings_that_make_no_format():
  for changes, said in (
    ({"solve": "Q: "}, r"'genrm': solve lacks the placeholder \{question\}"),
    *(({"grade": RELEASED.grade.replace(f"{{{s}}}", "")}, f"grade lacks .*{s}") for s in ("solution", "reference")),
    ({"verify": "?"}, r"verify lacks .*\{verdict_question\}"),
    ({"conclude": RELEASED.verdict_question}, r"conclude lacks .*\{verdict_question\}"),
    ({"conclude": "{verdict_question} "}, r"conclude must end with \{verdict_question\}"),
    *(({"verdict_question": q}, "verdict_question is .*bare question") for q in ("", "Right? ")),
    ({"verfy": "?"}, "unknown field 'verfy'"),
    ({"end": 3}, "field 'end' is 3"),
  ):
    refused((said, make_format, dataclasses.asdict(RELEASED) | changes))
  refused(
    ("'gsm8k'; the formats are genrm, ", make_format, "gsm8k"),
    ("no field 'solve'", make_format, {"name": "x", "verdict_question": "Right?"}),
  )
  for yes, no, message in (
    *((" yes", " No", "verdict ' yes' must be one token"), (" Yes", "No", "verdict 'No' must be one token")),
    *((" Yes", "", "verdict '' must be one token"), (" Yes", " Yes", r"both verdicts to id \d+")),
  ):
    refused((message, Prompter, CHAR, dataclasses.replace(COMPACT, yes=yes, no=no)))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_verdict_that_merges_with_its_question(form, gemma, tmp_path):
  path = tmp_path / "merges.model"
  model = sentencepiece_model_pb2.ModelProto.FromString(gemma.file_bytes)
  for piece in (")?▁No", "?▁No"):
    model.pieces.add(piece=piece, score=-1000.0)
  path.write_bytes(model.SerializeToString())
  merges, question = SentencePieceTokenizer(path), form.render(form.verify)
  (no,) = merges.encode(" No")  # alone it is still one piece
  with pytest.raises(UserError, match="merges the verdict ' No'") as error:
    Prompter(merges, form)
  for ids in ([*merges.encode(question), no], merges.encode(question + " No")):
    assert str(ids) in str(error.value)


def test_turns_of_a_chat_and_its_markers(gemma, trained, tmp_path):
  prompter = Prompter(gemma, CHAT)
  start, end = (gemma.encode(marker)[0] for marker in TURN_MARKERS)
  newline, user, model = (gemma.encode(text) for text in ("\n", "user\n", "model\n"))
  solve, question = prompter.solve(QUESTION), gemma.encode(CHAT.verdict_question)
  direct, cot = prompter.direct(QUESTION, SOLUTION), prompter.cot(QUESTION, SOLUTION)
  for ids, turns in ((solve, [start, end, start]), *((ids, [start, end] * 3 + [start]) for ids in (direct, cot))):
    assert [i for i in ids if i in (gemma.bos_id, start, end)] == [gemma.bos_id, *turns]
    # The verified solution is written as the solver writes it, and closed by the same mark.
    written = [*solve, *prompter.solution(SOLUTION)]
    assert ids is solve or ids[: len(written)] == written
  assert solve[: 2 + len(user)] == [gemma.bos_id, start, *user]
  concluded = prompter.rationale("1 = 1", True)
  for ids, ending in (
    *((solve, [end, *newline, start, *model]), (cot, [start, *model]), (direct, [*model, *question])),
    (concluded, [*question, prompter.yes_id, end]),
  ):
    assert ids[-len(ending) :] == ending
  assert end == prompter.end_id != gemma.eos_id
  path = tmp_path / "renamed.model"
  path.write_bytes(gemma.file_bytes.replace(b"<end_of_turn>", b"<fin_of_turn>"))
  for tokenizer, marker in ((CHAR, "start"), (trained, "start"), (SentencePieceTokenizer(path), "end")):
    refused((f"'<{marker}_of_turn>' of prompt format 'genrm_chat'", Prompter, tokenizer, CHAT))


def _released(data_dir, kind):
  folder = data_dir / "genrm-critiques" / "critiques"
  for label in ("correct", "incorrect"):
    for path in sorted(folder.glob(f"{kind}_{label}_solutions_batch_*_val.zip")):
      with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX"))
        yield from map(json.loads, archive.read(name).decode().splitlines())


def test_prompts_match_the_released_sets(data_dir, trained):
  prompter, conclude = Prompter(trained, RELEASED), RELEASED.render(RELEASED.conclude)
  raw, parsed = list(_released(data_dir, "rm")), list(iter_direct(data_dir, "val", BadRows()))
  assert len(raw) == len(parsed) == 212
  for row, (question, solution, correct, _) in zip(raw, parsed, strict=True):
    assert trained.decode(prompter.direct(question, solution)) == row["inputs"]
    assert trained.decode([prompter.verdict_id(correct)]) == row["targets"]
  raw, parsed = list(_released(data_dir, "critiques")), list(iter_critiques(data_dir, "val", BadRows()))
  assert len(raw) == len(parsed) == 259
  rebuilt = 0
  for row, (question, solution, _, correct, _) in zip(raw, parsed, strict=True):
    assert trained.decode(prompter.cot(question, solution)) == row["inputs"]
    verdict = trained.decode([prompter.verdict_id(correct)])
    assert row["targets"].endswith(RELEASED.verdict_question + verdict)
    # Most pose the question after an empty line, as we do; the others after a heading.
    rationale, found, end = row["targets"].rpartition(conclude)
    if found and end == verdict:
      rebuilt += 1
      assert trained.decode(prompter.rationale(rationale, correct)) == row["targets"]
  assert rebuilt == 227
  prompter, folder = Prompter(trained, RELEASED), data_dir / "genrm-critiques/critiques/data_collection"
  for path in (
    folder / f"critique_gen_{label}_solutions_round_0_shard_0.jsonl.gz" for label in ("correct", "incorrect")
  ):
    if not path.exists():
      pytest.skip(f"no raw pool: {path}")
    with gzip.open(path) as lines:
      for row in map(json.loads, itertools.islice(lines, 300)):
        reference = row["verifier_prompt"].rpartition("\nExpected Answer: ")[2]
        ids = prompter.grade(row["question"], row["model_output"], reference)
        assert trained.decode(ids) == row["verifier_prompt"]


# Where the verdict of a rationale is read, and the states of rationales without one

FORM = make_format("genrm")
ASK, ASKED = FORM.render(FORM.conclude), FORM.verdict_question  # with the empty line before it, and without
CHAR_TEXT = st.lists(
  st.sampled_from([*"abz?.(/)V ", "\n", " Yes", " No", "\n\nVerification: Is", ASKED[:-1], ASKED[1:]]), max_size=12
).map("".join)
ANY_TEXT = st.lists(
  st.characters(exclude_categories=["Cs"])
  | st.sampled_from([" Yes", "\n", "\n\n", "漢", "🙂", "▁", ASKED[:-1], ASK[:9]]),
  max_size=12,
).map("".join)


@pytest.fixture(params=["char", "sentencepiece", "chat"])
def prompter(request, trained, gemma):
  if request.param == "chat":
    return Prompter(gemma, make_format("genrm_chat"))
  return Prompter(CHAR if request.param == "char" else trained, FORM)


def _check(prompter, text, correct, n):
  question, conclude = prompter.format.verdict_question, prompter.format.render(prompter.format.conclude)
  assume(question not in text)
  # A rationale that training would supervise reads as "ok", at the verdict.
  ids = prompter.rationale(text, correct)
  for written in (ids, ids[:-1]):
    reading = read_rationale(written, prompter, room=0)
    assert reading == VerdictLocation("ok", verdict_index=len(ids) - 2)
    assert ids[reading.verdict_index] == prompter.verdict_id(correct)
  # Cut anywhere before the verdict, it is completed so that it ends with the question, posed once.
  cut = ids[:-2][:n]
  reading = read_rationale(cut, prompter, room=1000)
  assert reading.state == "forced" and reading.verdict_index is None
  completed = prompter.tokenizer.decode([*cut, *reading.suffix])
  assert completed.endswith(conclude) and completed.count(question) == 1
  if n > len(prompter.tokenizer.encode(text)) and not text.endswith("\n"):
    assert completed == text + conclude


@pytest.mark.parametrize("name", ["genrm", "compact"])
def test_what_training_writes_is_read_at_the_verdict_and_completed_where_it_is_cut(name, trained):
  with_characters, with_pieces = (Prompter(tokenizer, make_format(name)) for tokenizer in (CHAR, trained))

  @settings(max_examples=150, deadline=None)
  @given(CHAR_TEXT, ANY_TEXT, st.booleans(), st.integers(0, 60))
  def check(characters, anything, correct, n):
    for prompter, text in ((with_characters, characters), (with_pieces, anything)):
      _check(prompter, text.replace("?", "") if name == "compact" else text, correct, n)

  check()


def _read(prompter, text, room=1000):
  ids = prompter.tokenizer.encode(text.removesuffix("$"))
  return read_rationale([*ids, prompter.end_id] if text.endswith("$") else ids, prompter, room)


# "@" is where the verdict is read, "$" the end mark.
STATES = {
  "ok": [
    *(f"1 + 1 = 2.{ASK}@ Yes$", f"1 + 1 = 2.{ASK}@ No", f"a{ASK} Yes b{ASK}@ Yes$"),
    f"{ASKED}@ No$",  # no empty line before the question
    *(f"a{ASK}@ No\n{ASKED}", f"a{ASK}@ No\n{ASKED}$"),  # the second one is not answered
    *(f'End with "{ASKED}". 5 is wrong.{ASK}@ No$', f"`{ASKED}`, `{ASKED}` or so:{ASK}@ Yes"),  # a quotation
    *(f"a{ASK}@ {said}$" for said in ("Yes.", "No, 5.", "Yes, no errors.", "Yes. There is no error", "No\n\nYes men")),
  ],
  "malformed": [
    *(f"a{ASK}{said}$" for said in ("", "\nYes", " **Yes**", " yes", "Yes", ": No", "  Yes", ' "No"', " <b>No</b>")),
    *(f"a{ASK} {said}$" for said in ("Not sure", "Nothing", "Maybe", "Ja", "Yes/No", "Yes or No?", "Yessir", "5")),
    *(f'"{ASKED}"$', f"a{ASK}{ASK}$", f"a{ASK} Yes b{ASK} **Yes**$", f"a{ASK} **No**"),
  ],
  "contradictory": [
    *(f"a{ASK} Yes b{ASK} No$", f"a{ASK} No\n{ASKED} Yes c", f"a{ASK} No** ... wait.{ASK} **Yes$"),
    *(f"a{ASK} {said}$" for said in ("Yes and no", "No. Wait, Yes", "no ... yes.", "**Yes** & **No**", "No\n**Yes**")),
  ],
  "forced": [f"a{ASK}", "1 + 1 = 2.", "", f'"{ASKED}" it is. 5', f"a{ASK} **", f"a{ASK}{ASK}"],
  "missing": ["1 + 1 = 2.$", "$", f"a{ASK[:-1]}$", "Is the answer correct (Yes/No)? Yes$"],
}


@pytest.mark.parametrize(("text", "state"), [(text, state) for state, texts in STATES.items() for text in texts])
def test_states(prompter, text, state):
  before, _, after = text.partition("@")
  reading = _read(prompter, before + after)
  assert reading.state == state
  assert (reading.verdict_index is not None) == (state == "ok")
  if state == "ok":
    ids = prompter.tokenizer.encode(before + after)
    assert prompter.tokenizer.decode(ids[: reading.verdict_index]) == before
    assert ids[reading.verdict_index] == prompter.verdict_id(after.startswith(" Yes"))
  assert bool(reading.suffix) == (state == "forced" and not text.endswith(ASKED))


def test_only_the_verdict_token_is_a_verdict(prompter):
  """The same text in other tokens has no p(Yes): the word in two tokens, or a mark that decodes to nothing between."""
  encode = prompter.tokenizer.encode
  question, (space, *yes) = encode(f"a{ASK}"), [*encode(" "), *encode("Yes")]
  for said in ([space, *yes], [prompter.tokenizer.pad_id, prompter.yes_id]):
    ids = [*question, *said, prompter.end_id]
    assert prompter.tokenizer.decode(ids) == f"a{ASK} Yes"
    assert read_rationale(ids, prompter, room=99) == VerdictLocation("malformed")


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 20, len(ASK) - 1])
def test_the_suffix_is_the_rest_of_the_question(prompter, cut):
  rest = tuple(prompter.tokenizer.encode(ASK[cut:]))
  text = "1 + 1 = 2." + ASK[:cut]
  assert _read(prompter, text) == VerdictLocation("forced", suffix=rest)
  assert _read(prompter, text, room=len(rest)) == VerdictLocation("forced", suffix=rest)
  assert _read(prompter, text, room=len(rest) - 1) == VerdictLocation("truncated")
  assert _read(prompter, "1 + 1 = 2." + ASK, room=0) == VerdictLocation("forced")
  if not cut:  # the same tokens as in training
    assert [*prompter.tokenizer.encode(text), *rest] == prompter.rationale(text, True)[:-2]
