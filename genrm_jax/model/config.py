"""ModelConfig, and the table of Gemma 1 / 2 / 3 sizes with their published parameter counts."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from genrm_jax.runtime.errors import UserError
from genrm_jax.runtime.sharding import DEFAULT_RULES, MULTI_QUERY_RULES, MeshAxes, Rules, check_rules

DTYPES = ("float32", "bfloat16")
LAYER_KINDS = ("local", "global")
MAX_LAYERS = 1000  # the largest Gemma has 62; more is an error in a file, and would take minutes and the memory
_SIZE_FIELDS = ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "ffw_dim")
_POSITIVE_FIELDS = ("query_scale", "rope_base_local", "rope_base_global", "rope_scale_global")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that decides a model's shapes, arithmetic and sharding. Hashable: it can be a static jit argument.

  Attributes:
    name: a key of SIZES, or a name of the user's own.
    vocab_size: rows of the embedding, which is also the output layer.
    num_layers: L.
    embed_dim: D, the width of the residual stream.
    num_heads: N, query heads.
    num_kv_heads: K; N must be a multiple of it. 1 is multi-query attention.
    head_dim: H; even, since RoPE rotates pairs.
    ffw_dim: F, the width of each of the two halves of the gated MLP.
    query_scale: queries are multiplied by it, instead of by 1 / sqrt(H).
    attn_softcap: attention logits are soft-capped to (-cap, cap); None for no cap.
    final_softcap: the same for the output logits.
    window: on a local layer a query sees its own key and keys fewer than `window` positions back.
    pattern: kinds of layers, "local" or "global", repeated over the depth and cut off at `num_layers`.
    rope_base_local: RoPE base of local layers.
    rope_base_global: RoPE base of global layers.
    rope_scale_global: on global layers, positions are divided by it.
    qk_norm: RMSNorm over H on queries and keys, before RoPE.
    post_norms: RMSNorm on the outputs of attention and of the MLP, before they are added to the residual stream.
    dtype: of activations and of the KV cache.
    param_dtype: of the parameters that `gemma.init` makes; a loaded checkpoint may have another.
    sharding: (logical axis, mesh axes) pairs that replace the family's default rules; `rules` holds all of them. It
      says where a model lives and not which model it is, so `to_dict` leaves it out.

  Raises:
    UserError: a field is out of range, or fields contradict each other.
  """

  name: str
  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ffw_dim: int
  query_scale: float
  attn_softcap: float | None
  final_softcap: float | None
  window: int | None
  pattern: tuple[str, ...]
  rope_base_local: float
  rope_base_global: float
  rope_scale_global: float
  qk_norm: bool
  post_norms: bool
  dtype: str = "float32"
  param_dtype: str = "float32"
  sharding: tuple[tuple[str, MeshAxes], ...] = ()

  def __post_init__(self) -> None:
    for field in _SIZE_FIELDS:
      self._require(
        field, _is_int(getattr(self, field)) and 0 < getattr(self, field) < 2**31, "a whole number above 0, below 2^31"
      )
    for field in _POSITIVE_FIELDS:
      self._require(field, _is_positive(getattr(self, field)), "a number above 0")
    for field in ("attn_softcap", "final_softcap"):
      value = getattr(self, field)
      self._require(field, value is None or _is_positive(value), "a number above 0, or None for no cap")
    for field in ("dtype", "param_dtype"):
      self._require(field, getattr(self, field) in DTYPES, f"one of {', '.join(DTYPES)}")
    for field in ("qk_norm", "post_norms"):
      self._require(field, isinstance(getattr(self, field), bool), "True or False")
    self._require("num_layers", self.num_layers <= MAX_LAYERS, f"at most {MAX_LAYERS}")
    self._require("head_dim", self.head_dim % 2 == 0, "even: RoPE rotates pairs of its entries")
    self._require("num_kv_heads", self.num_heads % self.num_kv_heads == 0, f"a divisor of num_heads = {self.num_heads}")
    known = isinstance(self.pattern, tuple) and bool(self.pattern) and all(k in LAYER_KINDS for k in self.pattern)
    self._require("pattern", known, "a non-empty tuple of 'local' and 'global'")
    whole = _is_int(self.window) and self.window is not None and self.window > 0
    self._require("window", self.window is None or whole, "a whole number above 0, or None")
    self._require("window", whole or "local" not in self.layer_kinds, "set, since some layers are local")
    check_rules(f"Model config {self.name!r}, sharding", dict(self.sharding))

  def _require(self, field: str, condition: bool, what: str) -> None:
    if not condition:
      raise UserError(f"Model config {self.name!r}: {field} = {getattr(self, field)!r}, but it must be {what}.")

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The kind of every layer, from the first to the last."""
    return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

  @property
  def rules(self) -> Rules:
    """The sharding rules: the family's defaults, with the replacements in `sharding`."""
    family = MULTI_QUERY_RULES if self.num_kv_heads == 1 else DEFAULT_RULES
    return types.MappingProxyType({**family, **dict(self.sharding)})

  def to_dict(self) -> dict[str, Any]:
    """The fields that make the model what it is, as plain JSON values: all but `sharding`."""
    fields = dataclasses.asdict(self) | {"pattern": list(self.pattern)}
    del fields["sharding"]
    return fields

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
    """Inverse of `to_dict`, also after a round trip through JSON; "sharding" may be added, as a mapping of rules.

    Raises:
      UserError: a key is unknown or missing, or a value is not allowed.
    """
    known = dataclasses.fields(cls)
    names = [f.name for f in known]
    unknown = sorted(set(fields) - set(names))
    if unknown:
      raise UserError(f"Unknown key in a model config: {', '.join(unknown)}. Known: {', '.join(names)}.")
    missing = [f.name for f in known if f.default is dataclasses.MISSING and f.name not in fields]
    if missing:
      raise UserError(f"Missing key in a model config: {', '.join(missing)}.")
    rules = fields.get("sharding", {})
    if not isinstance(rules, Mapping):
      raise UserError(f"sharding = {rules!r} in a model config, but it must map logical axes to mesh axes.")
    changed = {
      "pattern": _to_tuple(fields["pattern"]),
      "sharding": tuple(sorted((axis, _to_tuple(target)) for axis, target in rules.items())),
    }
    return cls(**{**fields, **changed})


class PublishedCount(NamedTuple):
  """Published parameter counts.

  `embedding` and `non_embedding` come from the tables of the Gemma reports: exact for Gemma 1 and 2, rounded to
  `rounded_to` for Gemma 3, whose embedding counts of 4B and above include the projection of image tokens. `hub_total`
  is the exact total of the safetensors files on Hugging Face: an embedding of `hub_vocab` rows, and for Gemma 3 4B and
  above the image encoder and its projection besides the text model.
  """

  embedding: int
  non_embedding: int
  rounded_to: int
  hub_total: int
  hub_vocab: int


def _to_tuple(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _is_int(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


_GEMMA1: dict[str, Any] = {
  "vocab_size": 256_128,
  "head_dim": 256,
  "attn_softcap": None,
  "final_softcap": None,
  "window": None,
  "pattern": ("global",),
  "rope_base_local": 10_000.0,
  "rope_base_global": 10_000.0,
  "rope_scale_global": 1.0,
  "qk_norm": False,
  "post_norms": False,
}
_GEMMA2: dict[str, Any] = _GEMMA1 | {
  "attn_softcap": 50.0,
  "final_softcap": 30.0,
  "window": 4096,
  "pattern": ("local", "global"),
  "post_norms": True,
}
_GEMMA3: dict[str, Any] = _GEMMA1 | {
  "vocab_size": 262_144,
  "window": 1024,
  "pattern": ("local",) * 5 + ("global",),
  "rope_base_global": 1_000_000.0,
  "rope_scale_global": 8.0,
  "qk_norm": True,
  "post_norms": True,
}


def _size(family: Mapping[str, Any], name: str, **fields: Any) -> ModelConfig:
  """A member of a family; query_scale is 1 / sqrt(H) unless `fields` says otherwise."""
  merged = {**family, **fields}
  return ModelConfig(**{"name": name, "query_scale": merged["head_dim"] ** -0.5, **merged})


# fmt: off
_ALL_SIZES = (
  _size(_GEMMA1, "gemma_2b", num_layers=18, embed_dim=2048, num_heads=8, num_kv_heads=1, ffw_dim=16_384),
  _size(_GEMMA1, "gemma_7b", num_layers=28, embed_dim=3072, num_heads=16, num_kv_heads=16, ffw_dim=24_576),
  _size(_GEMMA2, "gemma2_2b", num_layers=26, embed_dim=2304, num_heads=8, num_kv_heads=4, ffw_dim=9216),
  _size(_GEMMA2, "gemma2_9b", num_layers=42, embed_dim=3584, num_heads=16, num_kv_heads=8, ffw_dim=14_336),
  # The 27B models scale queries by the residual width per head, not by the head's own width.
  _size(_GEMMA2, "gemma2_27b", num_layers=46, embed_dim=4608, num_heads=32, num_kv_heads=16, ffw_dim=36_864,
        head_dim=128, query_scale=(4608 / 32) ** -0.5),
  _size(_GEMMA3, "gemma3_270m", num_layers=18, embed_dim=640, num_heads=4, num_kv_heads=1, ffw_dim=2048,
        window=512, rope_scale_global=1.0),
  _size(_GEMMA3, "gemma3_1b", num_layers=26, embed_dim=1152, num_heads=4, num_kv_heads=1, ffw_dim=6912,
        window=512, rope_scale_global=1.0),
  _size(_GEMMA3, "gemma3_4b", num_layers=34, embed_dim=2560, num_heads=8, num_kv_heads=4, ffw_dim=10_240),
  _size(_GEMMA3, "gemma3_12b", num_layers=48, embed_dim=3840, num_heads=16, num_kv_heads=8, ffw_dim=15_360),
  _size(_GEMMA3, "gemma3_27b", num_layers=62, embed_dim=5376, num_heads=32, num_kv_heads=16, ffw_dim=21_504,
        head_dim=128, query_scale=(5376 / 32) ** -0.5),
  # For tests, and for experiments on a laptop.
  _size(_GEMMA1, "tiny_gemma1", num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=1, ffw_dim=256,
        head_dim=32, vocab_size=128),
  _size(_GEMMA2, "tiny_gemma2", num_layers=4, embed_dim=64, num_heads=4, num_kv_heads=2, ffw_dim=128,
        head_dim=16, vocab_size=128, window=6),
  _size(_GEMMA3, "tiny_gemma3", num_layers=6, embed_dim=64, num_heads=4, num_kv_heads=2, ffw_dim=128,
        head_dim=16, vocab_size=128, window=6),
)
SIZES: Mapping[str, ModelConfig] = types.MappingProxyType({config.name: config for config in _ALL_SIZES})

# Gemma 1: arXiv 2403.08295, table 2. Gemma 2: arXiv 2408.00118, table 2. Gemma 3: arXiv 2503.19786, table 1, and the
# announcement of the 270M model.
PUBLISHED_COUNTS: Mapping[str, PublishedCount] = types.MappingProxyType({
  "gemma_2b": PublishedCount(524_550_144, 1_981_884_416, 1, 2_506_172_416, 256_000),
  "gemma_7b": PublishedCount(786_825_216, 7_751_248_896, 1, 8_537_680_896, 256_000),
  "gemma2_2b": PublishedCount(590_118_912, 2_024_517_888, 1, 2_614_341_888, 256_000),
  "gemma2_9b": PublishedCount(917_962_752, 8_324_201_984, 1, 9_241_705_984, 256_000),
  "gemma2_27b": PublishedCount(1_180_237_824, 26_047_480_320, 1, 27_227_128_320, 256_000),
  "gemma3_270m": PublishedCount(170_000_000, 100_000_000, 10_000_000, 268_098_176, 262_144),
  "gemma3_1b": PublishedCount(302_000_000, 698_000_000, 1_000_000, 999_885_952, 262_144),
  "gemma3_4b": PublishedCount(675_000_000, 3_209_000_000, 1_000_000, 4_300_079_472, 262_208),
  "gemma3_12b": PublishedCount(1_012_000_000, 10_759_000_000, 1_000_000, 12_187_325_040, 262_208),
  "gemma3_27b": PublishedCount(1_416_000_000, 25_600_000_000, 1_000_000, 27_432_406_640, 262_208),
})
# fmt: on


def get_config(name: str, **overrides: Any) -> ModelConfig:
  """The config `name` of SIZES, with the given fields replaced.

  No field follows another: a new `head_dim` leaves `query_scale` as it is.

  Raises:
    UserError: the name or a field is unknown, or the result is not a valid config.
  """
  if name not in SIZES:
    raise UserError(f"Unknown model size {name!r}. Known: {', '.join(SIZES)}.")
  return ModelConfig.from_dict(SIZES[name].to_dict() | overrides)
