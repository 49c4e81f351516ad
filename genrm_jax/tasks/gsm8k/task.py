"""GSM8K as a task: its own problems, or the solutions and rationales that the paper's authors released for them."""

import tempfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from genrm_jax.records import Candidate, Problem, Rationale
from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks import base
from genrm_jax.tasks.gsm8k import answers, sample
from genrm_jax.tasks.gsm8k.problems import read_problems, read_problems_tfds
from genrm_jax.tasks.gsm8k.released import DIRECT_SOURCE, Release, iter_rationales, scan, with_direct_set
from genrm_jax.tasks.gsm8k.rows import BadRows

SOURCES = ("files", "tfds")


class GSM8K:
  """The task. Splits separate problems, never only solutions."""

  name = "gsm8k"
  splits = ("train", "val", "eval")

  def __init__(
    self,
    data_dir: str = "",
    problems: str = "files",
    rounds: Sequence[int] = (0, 1, 2, 3),
    direct_set: bool = True,
    num_train: int = 0,
    num_val: int = 128,
    num_eval: int = 256,
    eval_candidates: int = 16,
    candidates: str = "",
    made_up: int = 0,
  ):
    """Reads nothing yet.

    Args:
      data_dir: the folder that holds the clones of grade-school-math and genrm-critiques.
      problems: where GSM8K's problems are read from: "files" (of `data_dir`) or "tfds".
      rounds: of the released raw rationales; each has one per solution.
      direct_set: whether to train on the solutions of the released Yes/No set too.
      num_train: training problems; 0: all that are left.
      num_val: held-out problems on which checkpoints are chosen.
      num_eval: held-out problems for evaluation.
      eval_candidates: per problem, drawn from its pool.
      candidates: a file of the user's own solutions to GSM8K's test problems, which then are the eval problems.
      made_up: if above 0, a made-up release of so many problems stands in for `data_dir`.
    """
    if problems not in SOURCES:
      raise UserError(f"config.task.problems is {problems!r}; it is {' or '.join(SOURCES)}")
    self._source, self._own_candidates = problems, candidates
    self._rounds, self._direct_set, self._eval_candidates = tuple(rounds), direct_set, eval_candidates
    self._sizes = {"train": num_train, "val": num_val, "eval": num_eval}
    self._data_dir, self._num_made_up = data_dir, made_up
    self._made_up: tempfile.TemporaryDirectory[str] | None = None  # lives as long as the task

  @property
  def data_dir(self) -> epath.Path:
    """The folder with the clones, or of the made-up release, which is written when it is first needed."""
    if self._num_made_up:
      if self._made_up is None:
        self._made_up = tempfile.TemporaryDirectory(prefix="genrm-gsm8k-")
        sample.write(epath.Path(self._made_up.name), self._num_made_up, seed=0)
      return epath.Path(self._made_up.name)
    if not self._data_dir:
      raise UserError("give the folder with the clones of grade-school-math and genrm-critiques: --config.data_dir=DIR")
    return epath.Path(self._data_dir).expanduser()

  def problems(self, split: str, rng: np.random.Generator) -> list[Problem]:
    """GSM8K's own problems in random order: its test problems for eval, disjoint train problems for train and val."""
    found = self._known("test" if split == "eval" else "train")
    if split != "eval":
      found = sorted(found, key=lambda p: (zlib.crc32(p.id.encode()), p.id))
      num_val = self._sizes["val"]
      found = found[:num_val] if split == "val" else found[num_val:]
    order = rng.permutation(len(found))
    return [found[i] for i in order[: self._sizes[split] or len(found)]]

  def grade(self, problem: Problem, text: str) -> base.Grade:
    """See `answers.extract_answer` and `answers.same_answer`."""
    answer = answers.extract_answer(text)
    return base.Grade(answer, answers.same_answer(answer, problem.answer))

  @property
  def notes(self) -> tuple[str, ...]:
    """For the report: where the candidates come from."""
    if self._own_candidates:
      return (f"Candidates: {self._own_candidates}, solutions to GSM8K test problems.",)
    return (
      "Candidates: the released solutions of Gemini 1.0 Pro to GSM8K train problems; the evaluation problems are in no "
      "training row.",
    )

  def released(self, seed: int) -> base.Released:
    """The release: training problems with all their solutions, held-out ones with those of the pool.

    The eval problems have `eval_candidates` solutions each, drawn at random. With a file of the user's own, there are
    no candidates of split eval, and its problems are all of GSM8K's test problems. Rationales are streamed.

    Raises:
      UserError: no such data, or fewer problems than the splits need.
    """
    bad = BadRows()
    release = scan(self.data_dir, self._known("train"), self._rounds, bad)
    split_of = self._split(release.problems, seed)
    if self._direct_set:
      release = with_direct_set(release, self.data_dir, bad)
      if not self._sizes["train"]:
        split_of = {p.id: split_of.get(p.id, "train") for p in release.problems}
    problems = {split: [p for p in release.problems if split_of.get(p.id) == split] for split in self.splits}
    pools = {split: [c for p in found for c in release.candidates[p.id]] for split, found in problems.items()}
    # The direct set was chosen by label, so that held-out figures from it would mean nothing.
    pools["val"] = [c for c in pools["val"] if c.source != DIRECT_SOURCE]
    pools["eval"] = [c for p in problems["eval"] for c in self._drawn(release.candidates[p.id], seed)]
    if self._own_candidates:
      problems["eval"] = self._known("test")
      del pools["eval"]
    return base.Released(problems, pools, self._rationales(release, bad), bad.to_dict)

  def _rationales(self, release: Release, bad: BadRows) -> Iterator[Rationale]:
    # A generator of the task's own: it keeps the task, and so a made-up release, until the rationales have been read.
    yield from iter_rationales(self.data_dir, release, self._rounds, bad)

  def _known(self, split: str) -> list[Problem]:
    """GSM8K's own problems, which define the right answers."""
    return read_problems(self.data_dir, split) if self._source == "files" else read_problems_tfds(split)

  def _split(self, problems: Sequence[Problem], seed: int) -> dict[str, str]:
    """The split of each problem of the pool, by id: eval and val at random, the others for training."""
    num_train, num_val = self._sizes["train"], self._sizes["val"]
    num_eval = 0 if self._own_candidates else self._sizes["eval"]
    if num_eval + num_val + (num_train or 1) > len(problems):
      raise UserError(
        f"config.task asks for {num_train or 1} + {num_val} + {num_eval} problems (num_train, num_val, num_eval), but "
        f"the shards in {self.data_dir} hold {len(problems)}; get more shards or lower these numbers"
      )
    order = [problems[i].id for i in np.random.default_rng(seed).permutation(len(problems))]
    last = num_eval + num_val + num_train if num_train else len(order)
    parts = (order[num_eval + num_val : last], order[num_eval : num_eval + num_val], order[:num_eval])
    return {problem_id: split for split, ids in zip(self.splits, parts, strict=True) for problem_id in ids}

  def _drawn(self, candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """A draw from a problem's pool that depends on the seed and the problem only; all of it if it is small."""
    pool = [c for c in candidates if c.source != DIRECT_SOURCE]
    if not pool:
      return []
    rng = np.random.default_rng([seed, zlib.crc32(pool[0].problem_id.encode())])
    return [pool[i] for i in sorted(rng.permutation(len(pool))[: self._eval_candidates])]
