"""What every experiment shares: the run (config, workdir, mesh), the stages of the verifiers, and the command line."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import genrm_jax
from experiments import stages as staging
from experiments.stages import Stage
from genrm_jax import sharding, verifiers
from genrm_jax.data import batches, candidates, store
from genrm_jax.errors import UserError
from genrm_jax.evals import report, tables
from genrm_jax.infer.decode import Engine
from genrm_jax.infer.sample import SampleConfig
from genrm_jax.model import gemma
from genrm_jax.model.config import ModelConfig, get_config
from genrm_jax.text.prompts import Prompter, get_format
from genrm_jax.text.tokenizer import CharTokenizer, SentencePieceTokenizer, Tokenizer
from genrm_jax.train import checkpoint, loop, losses, optim
from genrm_jax.types import Candidate, Problem, Rationale, Score


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir and its config; opens what the stages share when it is first needed."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The built-in one, or the SentencePiece file of this workdir (stage tokenizer)."""
    if self.config.tokenizer.type == "char":
      return CharTokenizer()
    return SentencePieceTokenizer(self.path("tokenizer.model"))

  @functools.cached_property
  def prompter(self) -> Prompter:
    return Prompter(self.tokenizer, get_format(self.config.prompt_format))

  @functools.cached_property
  def model(self) -> ModelConfig:
    c = self.config.model
    return get_config(c.size, vocab_size=self.tokenizer.vocab_size, **c.overrides.to_dict())

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return sharding.make_mesh(**self.config.mesh.to_dict())

  @functools.cached_property
  def param_shardings(self) -> Any:
    rules = sharding.rules_for(self.model.num_kv_heads)
    return sharding.param_shardings(gemma.param_specs(self.model), self.mesh, rules)

  def path(self, *parts: str) -> pathlib.Path:
    return self.workdir.joinpath(*parts)

  @property
  def verifier_names(self) -> list[str]:
    """Those of the config, in the order of the paper's tables."""
    for name in self.config.verifiers:
      verifiers.get_verifier(name)
    return [name for name in verifiers.VERIFIERS if name in self.config.verifiers]

  def train_config(self, name: str) -> loop.TrainConfig:
    """How the base, the generator or a verifier is trained."""
    c = self.config.verifiers[name] if name in self.config.verifiers else self.config[name]
    return loop.TrainConfig(optim=optim.OptimConfig(**c.optim.to_dict()), seed=self.config.seed, **c.loop.to_dict())

  def sample_config(self, name: str) -> SampleConfig:
    """How candidates or votes are sampled."""
    return SampleConfig(**self.config[name].sample.to_dict())

  def check_settings(self) -> None:
    """UserError now for a setting that would only be refused when its stage begins."""
    for name in ("base", "generator", *self.verifier_names):
      if name in self.config or name in self.config.verifiers:
        self.train_config(name)
    for name in ("candidates", "votes"):
      if name in self.config:
        self.sample_config(name)
    get_format(self.config.prompt_format)

  # Records.

  def problems(self, split: str) -> list[Problem]:
    return store.read_records(self.path("problems", f"{split}.jsonl"), Problem)

  def candidates(self, split: str) -> list[Candidate]:
    return store.read_records(self.path("candidates", f"{split}.jsonl"), Candidate)

  def rationales(self, split: str) -> list[Rationale]:
    return store.read_records(self.path("rationales", f"{split}.jsonl"), Rationale)

  def write_rationales(self, split: str, records: Sequence[Rationale]) -> None:
    store.write_records(self.path("rationales", f"{split}.jsonl"), records)

  # Models.

  def manifest(self, name: str, verifier: str | None) -> dict[str, Any]:
    """What a checkpoint of this run says of itself; a workdir may be moved, so a file is named without its folder."""
    tokenizer = self.tokenizer.spec()
    if "path" in tokenizer:
      tokenizer["path"] = pathlib.Path(tokenizer["path"]).name
    return {
      "code_version": genrm_jax.__version__,
      "run": name,
      "verifier": verifier,
      "model": self.model.to_dict(),
      "tokenizer": tokenizer,
      "prompts": dataclasses.asdict(self.prompter.format),
      "verdict_ids": {"yes": self.prompter.yes_id, "no": self.prompter.no_id, "cls": self.tokenizer.cls_id},
    }

  def _identity(self) -> dict[str, Any]:
    """The part of a manifest that must agree: parameters mean the same, a verdict is asked for as it was trained."""
    manifest = self.manifest("", None)
    same = {key: manifest[key] for key in ("model", "prompts", "verdict_ids")}
    return {**same, "tokenizer": {"digest": manifest["tokenizer"]["digest"]}}

  def init_params(self, source: str) -> Any:
    """Fresh parameters for source "" (from the config's seed), else those of the run called `source`."""
    if source:
      return self.load_params(source)[0]
    make = jax.jit(lambda key: gemma.init(self.model, key), out_shardings=self.param_shardings)
    return make(jax.random.key(self.config.seed))

  def load_params(self, name: str) -> tuple[Any, int]:
    """The best parameters of a finished run, on the mesh, and their step."""
    shapes = jax.eval_shape(lambda key: gemma.init(self.model, key), jax.random.key(0))
    where = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, self.param_shardings)
    return checkpoint.load_params(self.path("checkpoints", name), self._identity(), where)

  def engine(self, params: Any) -> Engine:
    c = self.config.engine
    return Engine(params, self.model, self.mesh, self.tokenizer.eos_id, c.rows_per_batch, c.max_tokens)

  def train(
    self,
    name: str,
    train_examples: Sequence[batches.Example],
    eval_examples: Sequence[batches.Example],
    make_loss: Callable[[int], losses.LossFn],
    config: ml_collections.ConfigDict,
    verifier: str | None = None,
  ) -> None:
    """Packs the examples and trains the run called `name` (`make_loss` is given the most targets that a row has)."""
    rows, eval_rows = (
      pack(f"{name}, {split}", examples, config)
      for split, examples in (("train", train_examples), ("val", eval_examples))
    )
    max_targets = max(rows.max_targets, eval_rows.max_targets)
    used = rows.data.segments.astype(bool).mean()
    say(
      f"{name}: {rows.num_examples} examples in {rows.num_rows} rows of {config.row_length}, {used:.0%} of them filled"
    )
    manifest = {**self.manifest(name, verifier), "data": rows.digest}
    loop.train(
      name,
      make_loss(max_targets),
      self.init_params(config.init_from),
      self.param_shardings,
      rows,
      eval_rows,
      self.train_config(name),
      self.mesh,
      manifest,
      self.workdir,
    )


def pack(what: str, examples: Sequence[batches.Example], config: ml_collections.ConfigDict) -> batches.Rows:
  """Rows of the examples; with `drop_long`, of those that fit into a row, and the others are counted."""
  if config.drop_long:
    fitting = [e for e in examples if len(e.tokens) <= config.row_length]
    left_out = len(examples) - len(fitting)
    say(f"{what}: {left_out} of {len(examples)} examples are left out, longer than {config.row_length} tokens")
    examples = fitting
  return batches.pack(examples, config.row_length)


# The verifiers' stages.


def verifier_examples(
  run: Run, verifier: verifiers.Verifier, split: str, settings: ml_collections.ConfigDict
) -> tuple[list[batches.Example], list[tuple[Problem, Candidate, Rationale | None]]]:
  """Training examples of one verifier on one split (with correct solutions if lambda > 0), and what they ask."""
  problem_of = {p.id: p for p in run.problems(split)}
  chosen = candidates.choose_for_training(
    run.candidates(split), settings.max_per_label, settings.balanced, run.config.seed
  )
  asked: list[tuple[Problem, Candidate, Rationale | None]]
  if verifier.needs_rationales:
    written: dict[tuple[str, int], list[Rationale]] = {}
    for r in run.rationales(split):
      if r.kept:
        written.setdefault((r.problem_id, r.candidate_index), []).append(r)
    asked = [
      (problem_of[c.problem_id], c, r)
      for c in chosen
      for r in written.get((c.problem_id, c.index), [])[: settings.max_rationales]
    ]
  else:
    asked = [(problem_of[c.problem_id], c, None) for c in chosen]
  examples = [verifiers.verify_example(verifier, run.prompter, p, c, r) for p, c, r in asked]
  if settings.solve_weight:
    examples += [verifiers.solve_example(run.prompter, problem_of[c.problem_id], c.text) for c in chosen if c.correct]
  return examples, asked


def train_verifier(run: Run, name: str, augment: Callable[[list[batches.Example]], list[batches.Example]]) -> None:
  """Trains one verifier, after the gate on its verdict tokens."""
  settings = run.config.verifiers[name]
  verifier = verifiers.get_verifier(name)
  examples, asked = verifier_examples(run, verifier, "train", settings)
  longest = max(len(e.tokens) for e in examples)
  verifiers.check_verdict_tokens(verifier, run.prompter, batches.pack(examples, longest), asked)
  eval_examples, _ = verifier_examples(run, verifier, "val", settings)
  run.train(
    name,
    augment(examples),
    eval_examples,
    lambda m: verifiers.make_loss(verifier, run.model, run.prompter, m, settings.solve_weight),
    settings,
    verifier=name,
  )


def score_verifier(run: Run, name: str) -> None:
  """Scores every candidate of the evaluation split; equal solutions to a problem are scored once."""
  params, step = run.load_params(name)
  pool = run.candidates("eval")
  scores = verifiers.score_candidates(
    verifiers.get_verifier(name),
    run.engine(params),
    run.prompter,
    run.problems("eval"),
    candidates.distinct(pool),
    step=step,
    seed=run.config.seed,
    num_votes=run.config.votes.num_votes,
    settings=run.sample_config("votes"),
  )
  text = {(c.problem_id, c.index): c.text for c in pool}
  of_text = {(s.problem_id, text[s.problem_id, s.candidate_index]): s for s in scores}
  every = [dataclasses.replace(of_text[c.problem_id, c.text], candidate_index=c.index) for c in pool]
  store.write_records(run.path("scores", f"{name}.jsonl"), every)


def write_report(run: Run, all_stages: Sequence[Stage], notes: Sequence[str]) -> None:
  """report/: report.md, index.html, results.json and figures."""
  config = run.config
  problems, pool = run.problems("eval"), run.candidates("eval")
  names = run.verifier_names
  scores = {n: store.read_records(run.path("scores", f"{n}.jsonl"), Score) for n in names}
  embedding, rest = gemma.num_params(run.model)
  meta = {
    "code_version": genrm_jax.__version__,
    "task": config.task.name,
    "variant": config.variant,
    "seed": config.seed,
    "config_hash": store.read_json(run.path("config.json"))["hash"],
    "model": f"{run.model.name}, {embedding + rest:,} parameters",
    "train_steps": {n: config.verifiers[n].optim.num_steps for n in names},
    "wall_seconds": staging.seconds_of(run.workdir, all_stages),
    "notes": list(notes),
  }
  results = report.build_results(
    problems, pool, scores, ns=config.report.ns, ks=config.report.ks, seed=config.seed, meta=meta
  )
  report.write_report(results, run.path("report"), examples=tables.pick_examples(problems, pool, scores))
  say(f"report: {run.path('report', 'index.html')}")


def verifier_stages(run: Run, augment: Callable[[list[batches.Example]], list[batches.Example]]) -> list[Stage]:
  """Train and score, for each verifier of the config."""
  out = []
  data = tuple(f"{kind}/{split}.jsonl" for kind in ("problems", "candidates") for split in ("train", "val"))
  written = tuple(f"rationales/{split}.jsonl" for split in ("train", "val"))
  for name in run.verifier_names:
    settings = run.config.verifiers[name]
    needs = data + (written if verifiers.get_verifier(name).needs_rationales else ())
    needs += (f"checkpoints/{settings.init_from}",) if settings.init_from else ()
    trained = f"checkpoints/{name}"
    out.append(
      Stage(f"train_{name}", functools.partial(train_verifier, run, name, augment), reads=needs, writes=(trained,))
    )
    asked = ("problems/eval.jsonl", "candidates/eval.jsonl", trained)
    scored = (f"scores/{name}.jsonl",)
    out.append(Stage(f"score_{name}", functools.partial(score_verifier, run, name), reads=asked, writes=scored))
  return out


def report_stage(run: Run, before: Sequence[Stage], notes: Sequence[str]) -> Stage:
  """The last stage; it reads the scores of all verifiers."""
  reads = ("problems/eval.jsonl", "candidates/eval.jsonl", *(f"scores/{n}.jsonl" for n in run.verifier_names))
  writes = tuple(f"report/{name}" for name in ("results.json", "report.md", "index.html"))
  return Stage("report", lambda: write_report(run, before, notes), reads=reads, writes=writes)


# The command line.


def use_cpu_devices(number: int) -> None:
  """Splits a CPU into so many devices, if that is what JAX runs on and XLA_FLAGS does not say otherwise.

  A small model keeps two cores busy as two devices, each with half of the batch, and hardly as one.
  """
  if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", number)


_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: FILE.py:VARIANT.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything that the run makes is kept.")
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by name; all if empty.")


def main(make_stages: Callable[[Run], list[Stage]]) -> None:
  """Runs an experiment's stages. A user's mistake ends in one message and exit code 1."""

  def run_main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells of its every step
    with _one_message():
      run = Run(ml_collections.FrozenConfigDict(_CONFIG.value), pathlib.Path(str(_WORKDIR.value)).absolute())
      stages = make_stages(run)
      run.check_settings()
      use_cpu_devices(run.config.cpu_devices)
      staging.claim_workdir(run.workdir, run.config.to_dict())
      staging.run_stages(run.workdir, stages, _STAGES.value, say)

  flags.mark_flags_as_required(["config", "workdir"])
  app.run(run_main, flags_parser=_parse_flags)


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
  try:
    yield
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(1)


def _parse_flags(argv: list[str]) -> list[str]:
  """The command line, parsed by absl, with words for a config file or a key that is not there."""
  overrides = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  with _one_message():
    try:
      rest = app.parse_flags_with_usage(argv)
      _CONFIG.value.to_dict()  # a file that could not be loaded shows itself only here
    except OSError as e:
      raise UserError(f"cannot load the config: {str(e).splitlines()[-1].strip()}") from e
    except (AttributeError, KeyError) as e:
      if not overrides:
        raise
      inner = e.args[0] if e.args else ""
      key = inner.args[0] if isinstance(inner, KeyError) else inner
      raise UserError(f"{', '.join(overrides)}: the config has no key {str(key).replace(chr(10), '. ')}") from e
  return rest
