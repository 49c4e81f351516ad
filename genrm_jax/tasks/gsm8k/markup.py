r"""Plain text of a stated answer: without LaTeX, Markdown and HTML, its digits and signs in ASCII, one sign for money.

"**３½** cups" is "3 1/2 cups", "$\frac{1}{2}\text{ m}^2$" is "1/2 m ^2", "−US$5" is "-¤5".
"""

import functools
import re
import unicodedata

CURRENCY = "¤"  # Unicode's sign for any currency

_CODES = (
  "usd|eur|gbp|jpy|cny|rmb|inr|krw|aud|cad|nzd|hkd|sgd|twd|chf|sek|nok|dkk|isk|pln|czk|huf|rub|uah|ils|aed|sar|egp|zar|"
  r"ngn|ghs|kes|ugx|tzs|brl|mxn|clp|idr|myr|rm|php|thb|vnd|pkr|bdt|lkr|npr|(?:rs|rp|kr|tk)\.?"
)
# What must stand in a text for a rule to apply; what the rule replaces, and with what.
_RULES = tuple(
  (trigger, re.compile(pattern, re.IGNORECASE), instead)
  for trigger, pattern, instead in (
    ("{,}", r"\{,\}", ","),
    ("<", r"</?[a-z]{1,6}>", ""),
    ("\\", r"\\\$|\\(?:pounds|euro|yen)(?![a-z])", CURRENCY),
    ("\\", r"\\(?:[dtc]|s|nice)?frac\s*\{\s*(-?)\s*([0-9,]+)\s*\}\s*\{\s*([0-9,]+)\s*\}", r" \1\2/\3"),
    ("\\", r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])", r" \1/\2"),
    ("\\", r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\\degree(?![a-z])", "°"),
    ("\\", r"\\(?:begin|end)\s*\{[a-z]+\*?\}", " "),
    (
      "\\",  # Other commands, such as \sqrt and \pi, stay: they are part of an expression.
      r"\\(?:text|math|bold|bm|f?box|mbox|emph|underline|large|huge|normalsize|small|display|left|right|big|q?quad"
      r"|approx|sim|therefore|implies)[a-z]*\s*",
      " ",
    ),
    ("\\", r"\\(?![a-z])[()\[\]!,;: ]?", " "),
    ("", r"[{}`]|\$\$", " "),
    ("$", r"\$([^$]*)\$(?!-?\.?[0-9])", r" \1 "),
    ("**", r"(?<=[0-9])\*\*(?=[0-9])", "^"),
    ("**", r"\*\*", ""),
    ("_", r"(?<![a-z0-9])_+|_+(?![a-z0-9])", ""),
    ("$", r"\b(?:us|au?|ca?n?|nz|hk|sg?|nt|mx|r)\$|\$", CURRENCY),
    ("", rf"\b(?:{_CODES})\s*(?=-?\.?[0-9])", CURRENCY),
    (":00", r"\b([0-9]{1,2}):00(?![0-9])", r"\1"),
    (".", r"\b([ap])\.m\b\.?", r"\1m"),
  )
)
_EDGES = " :;,*\"'"
_ASCII = {
  **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u2796\ufe63\uff0d", "-"),
  **dict.fromkeys("‘’′", "'"),
  **dict.fromkeys("“”″", '"'),
  **{"٫": ".", "٬": ",", "。": ".", "、": ",", "∕": "/", "➕": "+", "º": "°", "$": "$"},
}
# Each character above or below the line, while a text is folded, comes after one of these.
_ABOVE, _BELOW = "\ue000", "\ue001"
_ABOVE_THE_LINE = re.compile(rf"((?:{_ABOVE}.)+)(?:/((?:{_BELOW}.)+))?")


def plain(text: str) -> str:
  """The text without markup and marks at its ends, with white space folded."""
  if not text.isascii():
    text = fold(text)
  before = None
  while text != before:  # removing markup may reveal more of it; each round shortens the text
    before = text
    for trigger, pattern, instead in _RULES:
      if trigger in text:
        text = pattern.sub(instead, text)
    text = " ".join(text.split()).rstrip(_EDGES + ".").lstrip(_EDGES)
  return text


def fold(text: str) -> str:
  """Digits of any script, fractions, powers, dashes and spaces in ASCII: "３½" -> "3 1/2", "10⁻²" -> "10^-2"."""
  text = _ABOVE_THE_LINE.sub(_typeset, "".join(map(_folded, text)))
  return text.replace(f"/{_BELOW}", "/").replace(_BELOW, "_").replace(_ABOVE, "")


def _typeset(match: re.Match[str]) -> str:
  """A power, or a fraction with its numerator above the line."""
  top, bottom = match[1].replace(_ABOVE, ""), match[2]
  return f" {top}/{bottom.replace(_BELOW, '')}" if bottom else f"^{top}"


@functools.lru_cache(maxsize=4096)
def _folded(c: str) -> str:
  if c in _ASCII:
    return _ASCII[c]
  if (digit := unicodedata.decimal(c, None)) is not None:
    return str(digit)
  kind, category = unicodedata.decomposition(c).partition(" ")[0], unicodedata.category(c)
  if category == "Sc":
    return CURRENCY
  if category in ("Cf", "Co"):  # zero-width characters
    return ""
  same = unicodedata.normalize("NFKC", c).replace("\u2044", "/")
  if same != c and not same.isascii():
    same = "".join(map(_folded, same))
  if kind == "<fraction>":
    return f" {same}"
  if kind in ("<super>", "<sub>") and not c.isalpha():
    return f"{_ABOVE if kind == '<super>' else _BELOW}{same}"
  return same
