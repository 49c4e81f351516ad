"""What the list tasks share in their natural style, for a real Gemma: words, worked examples, answers."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from genrm_jax.records import Problem
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import statements

# Everyday words, many of which begin alike.
_WORDS = """
able about above acorn across actor adult advice again agent alarm album almond alpine amber anchor angle ankle answer
apple apron arch arena argue arm armour army arrow artist aspen atlas attic autumn avenue award badge bag bagel baker
balance balcony ball ballad balloon bamboo banana band bandage bank banner bar barber bark barley barn barrel basil
basin basket bath battery beach beacon bead beak beam bean bear beard beaver bed bee beech beetle bell belt bench berry
bicycle bird biscuit blanket blue board boat body bone bonnet book boot border borrow bottle boulder bowl box branch
brass bread breeze brick bridge bright broom brother brown brush bucket budget buffalo bugle builder bundle butter
button cabin cabinet cable cactus cake camel camera camp canal candle candy canoe canvas canyon cape captain car caravan
carbon card cargo carpet carrot cart carve castle cat cattle cave cedar cellar centre chain chair chalk chance chapel
chapter charm chart cheese cherry chess chest chestnut chicken chief child chimney church cinema circle circus city clay
clean clerk cliff climb cloak clock cloth cloud clover coach coal coast coat coffee coin cold collar colour comb comet
compass copper coral cork corn corner cotton country course cousin cover crab cradle crane crayon cream creek cricket
crown crystal cup cupboard curtain cushion daisy dance dawn deer desert desk diamond dinner dish doctor dolphin donkey
door dragon drawer dream dress drum duck dust eagle early earth east echo edge elbow elm engine evening fable fabric
factory falcon farm farmer feather fence fern ferry field fig finger fire fish flag flame flock flood floor flour flower
flute forest forge fork fountain fox frame friend frog frost fruit garden garlic gate giant ginger glass globe glove
goat gold goose grain granite grape grass gravel green guitar hammer harbour harp harvest hat hawk hazel heart hedge
helmet herb heron hill hillside honey hood hook horn horse hotel house husky ice ink inn iron island ivory ivy jacket
jar jewel judge juice jungle kettle key kitchen kite knee knife ladder lake lamb lamp lantern lark lawn leaf leather
lemon letter library light lily lime linen lion lizard lobster lock maple marble march market marsh mask meadow medal
melody melon metal mile milk mill mint mirror mist moon morning moss moth mountain mouse music napkin needle nest net
night north notebook oak oat ocean olive onion orange orchard orchid otter oven owl paddle page paint palace palm paper
parade park parrot path peach peacock pear pearl pebble pen pencil pepper piano pillow pilot pine planet plate plum
pocket pond pony poppy potato powder prairie prince pumpkin puzzle quarry queen quiet quilt rabbit radio rain raven reed
ribbon rice ring river road robin rock roof root rope rose saddle sail salmon salt sand scarf school sea seal season
seed shadow sheep shell ship shirt shoe silver sister sky snow soap song south sparrow spoon spring square stable star
station stone storm story stove straw stream street sugar summer sun swan table tailor tea temple tent thread thumb
ticket tiger timber toast tower town train tree trumpet tulip tunnel turtle uncle valley vase velvet village violin
wagon wall walnut water wave wax west whale wheat wheel willow wind window winter wolf wood wool yard yellow zebra
"""
WORDS = tuple(_WORDS.split())

# After its solution, a few-shot prompted base model continues with an invented question, as in its examples.
_NEXT_QUESTION = re.compile(r"^Q:", re.MULTILINE)
_MAX_CHARACTERS = 2000  # of an answer
_MARKUP = re.compile(r"</?[a-zA-Z]{1,8}>|\\(?:begin|end)\{[a-z]+\*?\}|\\[a-zA-Z]+|\\\W|[{}$]")
_ITEM = re.compile(r"\W*\d+[.)]\s*(?=\S)|\s*[-*•+]\s+")
_SENTENCE_END = re.compile(r"(?<![\W\d])([\"'*_`)]*)[.!?](?:\s.*|$)")


def random_word(rng: np.random.Generator, beginning: str = "") -> str:
  """A random one of `WORDS`, among those with this beginning."""
  words = [w for w in WORDS if w.startswith(beginning)] if beginning else WORDS
  return words[rng.integers(len(words))]


def few_shot(name: str, style: str, examples: Sequence[Problem], solve: str) -> str:
  """Worked examples that precede a base model's prompt: each is the filled template and the reference solution.

  Args:
    name: of the task.
    style: of the task; UserError unless it is "natural".
    examples: problems with references.
    solve: the template for a solution, with "{question}" in it.
  """
  if style != "natural":
    raise UserError(f'{name} has worked examples in the style "natural" only, not in {style!r}; set style="natural"')
  return "".join(f"{solve.replace('{question}', p.question)}{p.reference}\n\n" for p in examples)


def first_solution(text: str) -> str:
  """The solution alone, cut where a base model starts to invent the next question."""
  return _NEXT_QUESTION.split(text, maxsplit=1)[0].rstrip()


def final_answer(text: str) -> str | None:
  """The final answer of a solution, without markup; None where there is none.

  It is the content of a box after the last "answer is", else what follows that, up to the end of the sentence: the rest
  of the line, or else the next line, or the items of a vertical list, separated by spaces. Reading stops where the turn
  ends, and at a line that opens another question ("Q:").
  """
  text = statements.first_turn(first_solution(text))
  said = statements.after_answer_is(text)
  box = statements.last_box(text, _MAX_CHARACTERS)
  if box and box.content and (said is None or box.start >= said):
    return " ".join(_MARKUP.sub(" ", box.content).split()) or None
  if said is None:
    return None
  lines = [_MARKUP.sub(" ", line).strip() for line in text[said : said + _MAX_CHARACTERS].splitlines()]
  while len(lines) > 1 and (lines[0].endswith(":") or not _has_word(lines[0])):  # "as follows:"
    del lines[0]
    items = _items(lines)
    if len(items) > 1:
      return " ".join(items)
  items = _items(lines) if lines and _ITEM.match(lines[0]) else []
  line = " ".join(items) if len(items) > 1 else _SENTENCE_END.sub(r"\1", lines[0], count=1) if lines else ""
  return line if _has_word(line) else None


def _items(lines: Sequence[str]) -> list[str]:
  """The items of the vertical list that the lines begin with: numbered, with bullets, or one word per line."""
  marked = list(itertools.takewhile(_ITEM.match, filter(None, lines)))
  items = marked or itertools.takewhile(lambda line: len(line.split()) == 1, lines)
  return [_ITEM.sub("", line, count=1).rstrip(".,;") for line in items]


def _has_word(line: str) -> bool:
  return any(c.isalnum() for c in line)
