r"""Answers: the last box of a text, and what the rules of --reward read in a box. One `answer_value` serves the grade and the vote.

Nothing that a model wrote is evaluated in this process: regular expressions read numbers into Fractions.
"""

import functools
import re
from fractions import Fraction

LONGEST_BOX = 10_000  # characters; a longer box is none
LONGEST_ANSWER = 1000  # a longer answer is compared word by word
LONGEST_NUMBER = 100
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,20}(?:(?P<brace>\{)|(?P<number>[+-]?\.?\d[^\s$]{0,100}?)(?=[.,;:]*(?:[\s$]|\\[)\]]|\Z))"
                 r"|(?<=\s)(?P<letter>[A-Z])(?!\w))", re.ASCII)


def answer_span(text):
    r"""The content of the last box in `text`, or None: \boxed{...}, \fbox{...}, or \boxed 2. A second candidate earns nothing."""
    box, starts = None, [text.rfind(name) for name in (r"\boxed", r"\fbox")]
    for _ in range(100):  # of those without content, as in "write it in \\boxed"
        last = max(starts)
        if box is not None or last < 0:
            break
        box, starts = BOX.match(text, last), [start if start < last else text.rfind(text[last : last + 5], 0, last) for start in starts]
    if box is None or not box["brace"]:
        return box and (box["number"] or box["letter"])
    depth = 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end(), box.end() + LONGEST_BOX):  # \{ does not open a group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[box.end() : token.start()]
    return None


# ---------------------------------------------------------------- one spelling

LETTER_UNITS = {"m": "meter", "s": "second", "g": "gram", "h": "hour", "L": "liter", "l": "liter"}
SPELLINGS = [(re.compile(pattern, re.ASCII), new) for pattern, new in (
    ("\u2212", "-"),
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " "),  # math delimiters
    (r"\\(?:left|right|bigg?[lr]?|Bigg?[lr]?|displaystyle|textstyle)(?![A-Za-z])", ""),
    (r"(?<![\d.,])[1-9]\d{0,2}(?: ?(?:\{ ?, ?\}|, ?\\!) ?\d{3})+(?!\d)", lambda match: re.sub(r"\D", "", match[0])),  # thousands
    (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),  # TeX takes one digit
    (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"([\^_]) ?\{ ?([\dA-Za-z]) ?\}|([\^_]) ?([\dA-Za-z])(?![\dA-Za-z])", r"\1\3{\2\4}"),
    (r"(?<=[\d} ])\\(?:text|textrm|textnormal|mathrm|mbox) ?\{ ?([msghLl]) ?\}", lambda match: f" {LETTER_UNITS[match[1]]} "),
    (r"\\(?:text|textrm|textnormal|textbf|textit|mathrm|mathbf|mathit|mbox) ?\{([^{}]*)\}", r" \1 "),
    (r" ?(?:\^ ?(?:\{ ?)?\\circ(?![A-Za-z])(?: ?\})?|°|\\degree(?![A-Za-z]))", " degree "),
    (r"\\?%", r" percent "),
)]


@functools.lru_cache(maxsize=10_000)
def spell(text):
    r"""Write what LaTeX can write in several ways in one: delimiters, \left \right, \dfrac, \frac12, thin spaces, \text{...}, minus.

    White space stays, one space each: 2 1/2 is no 21/2.
    """
    text = " ".join(text.split())
    if len(text) > LONGEST_ANSWER:
        return text
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = " ".join(text.split())
    if re.fullmatch(r"\{[^{}]*\}", text):
        text = text[1:-1].strip()
    return re.sub(r"(?<!\.) ?\.$", "", text)


def normalise(text):
    """`spell`, and spaces are dropped but between two digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", spell(text)) if len(text) <= LONGEST_ANSWER else spell(text)


# ---------------------------------------------------------------- numbers and units

NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?(?:/(\d+))?", re.ASCII)
FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?)(\d+)\}\{([+-]?)(\d+)\}", re.ASCII)


def parse_number(text):
    """Integer, decimal, a/b, 1,234 or 1 234 -> Fraction; anything else None. At most 100 characters; nothing is evaluated."""
    text = re.sub(r" ?([/{}]) ?|(?<=[+-]) ", r"\1", spell(text))
    if len(text) > LONGEST_NUMBER:
        return None
    fraction = FRACTION.fullmatch(text)
    if fraction:
        text = ("-" if (fraction[1] + fraction[2] + fraction[4]).count("-") % 2 else "") + f"{fraction[3]}/{fraction[5]}"
    if re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(" ", "")
    match = NUMBER.fullmatch(text)
    if not match or re.match(r"[+-]?0+,", text) or not re.search(r"[0-9]", (match[2] or "") + (match[3] or "")):
        return None
    if match[4] and (match[3] or int(match[4]) == 0):
        return None
    value = Fraction((match[2] or "0").replace(",", "") + (match[3] or ".").rstrip(".")) / int(match[4] or 1)
    return -value if match[1] == "-" else value


# One name for each unit, by its other names. An open list would take "5 squared".
UNITS = {name: line for line, names in {
    "cm": "centimeter centimetre", "meter": "metre", "km": "kilometer kilometre", "mm": "millimeter millimetre", "inch": "inches in",
    "foot": "feet ft", "yard": "yd", "mile": "mi", "kg": "kilogram kilo", "gram": "gm", "mg": "milligram", "pound": "lb", "ounce": "oz",
    "ton": "tonne", "second": "sec", "minute": "min", "hour": "hr", "day": "", "week": "", "month": "", "year": "yr", "degree": "deg",
    "radian": "rad", "percent": "percentage pct", "mph": "", "km per hour": "kmh kmph kph", "liter": "litre", "ml": "milliliter millilitre",
    "gallon": "gal", "acre": "", "hectare": "", "cent": "", "euro": "eur €", "sterling": "gbp £", "yen": "jpy ¥", "yuan": "rmb",
    "rupee": "rs ₹", "square": "sq", "cubic": "cu", "per": "",
    "dollar": "usd \\$", "thing": "unit people person child children student men man women woman",
}.items() for name in [line, *names.split()]}
NUMERALS = re.compile(  # nouns that count: 5 hundreds, 5 halves, 5 tenths, 5 times, and words in s that are no nouns
    r"(?:hundred|thousand|\w*illion|\w*illiard|lakh|crore|dozen|score|gros|pair|couple|half|halve|third|quarter|\w*th|second|one|two|three|"
    r"four|five|six|seven|eight|nine|zero|ten|\w*teen|\w+tie|\w*ty|twelve|eleven|double|triple|\w*tuple|time|square|cube|root|power|"
    r"minu|plu|les|decimal|digit|inverse|reciprocal|negative|factorial|exponent|log|\w*fold|equal|divide|exceed|thi|thu|alway|gro|"
    r"myriad|googol|trio|duo|basi|base|co|pi|multiple|factor|opposite|remainder|ha|wa|i|doe|sin|percentile|logarithm|fraction|proces|modulu|radical)s")
QUANTITY = re.compile(r"(.*[0-9)}.])(?: ([A-Za-z][A-Za-z ./]{0,40}?)| ?(\\\$|[€£¥₹]))(?: ?(?:\^ ?\{?([23])\}?|([²³])))?")


def split_unit(text):
    """A spelled text as (what is before its unit, the unit's one name): ("5", "cm"), ("5", "thing") for 5 eggs; None without a unit.

    A noun in the plural that is no numeral is a thing.
    """
    sign, currency, rest = re.fullmatch(r"([+-]? ?)(\\\$|[€£¥₹]|) ?(.*)", text, re.DOTALL).groups()
    if currency:
        text = f"{sign}{rest} {currency}"
    match = QUANTITY.fullmatch(text)
    if not match:
        return None
    words, power = re.findall(r"[a-z]+|\\\$|[€£¥₹]|/", (match[2] or match[3]).lower()), match[4] or {"²": "2", "³": "3"}.get(match[5], "")
    names = []
    for word in ("per" if word == "/" else word for word in words):
        name = UNITS.get(word, UNITS.get(word.removesuffix("s")) if len(word) > 2 else LETTER_UNITS.get(word) if "/" in words else None)
        if name is None and len(words) == 1 and re.fullmatch(r"[a-z]{3,}s", word) and not NUMERALS.fullmatch(word):
            name = "thing"
        if name is None:
            return None
        names.append(name)
    if names[-1] in ("square", "cubic", "per") or names[0] == "per" or len(set(names)) < len(names) or len(names) > 4:
        return None
    power = power or {"square": "2", "cubic": "3"}.get(names[0], "")
    return match[1], " ".join(name for name in names if name not in ("square", "cubic")) + power


def read_quantity(text):
    """A number with its unit -> (Fraction, the unit's name), or None. The unit is "" for a number alone."""
    text = spell(text)
    number, unit = split_unit(text) or (text, "")
    value = parse_number(number)
    return None if value is None else (value, unit)


def parse_quantity(text):
    """The number that --reward numeric reads, or None: its unit is dropped, whatever the unit is, and so is "x =" before it."""
    if len(text.strip()) > LONGEST_NUMBER:
        return None
    quantity = read_quantity(re.sub(r"^[A-Za-z](?: ?_ ?\{?[A-Za-z0-9]{1,9}\}?)? ?= ?", "", spell(text)))
    return quantity and quantity[0]


def parse_choice(text):
    r"""The letter of B, (B), B., B), B: Paris, \text{B} or \textbf{(B)} 12 -> "B"; anything else, and a second letter, None."""
    match = re.fullmatch(r"(?:\(([A-Z])\)|([A-Z])(?=[.):]|$))[.):]?(?: (.*))?", spell(text)) if len(text) <= LONGEST_ANSWER else None
    if not match or re.search(r"\b(?:[A-Z]|or|and|nor|not|either|neither|both)\b|[()][A-Z]", match[3] or ""):
        return None
    return match[1] or match[2]


def answer_value(text, reward):
    """What is compared and counted, as a string; None for nothing. [the rule of each --reward]

    exact: the words · numeric: the number, units dropped · choice: the letter A-Z · boxed, math: the number and its unit, or else the
    normalised LaTeX; 18 dollars and 18 eggs are 18, but 5 cm is not 5. math has more to say (grading.agree).
    """
    if reward == "exact":
        return " ".join(text.split()) or None
    if reward in ("numeric", "choice"):
        value = parse_quantity(text) if reward == "numeric" else parse_choice(text)
        return None if value is None else str(value)
    quantity = read_quantity(text)
    if quantity:
        return str(quantity[0]) if quantity[1] in ("", "dollar", "thing") else " ".join(map(str, quantity))
    return normalise(text) or None


def is_words(text):
    """True for two letters or more and nothing else. math-verify reads "east" as the product e a s t, which equals "seat"."""
    return re.fullmatch(r"[A-Za-z]{2,}", normalise(text)) is not None


# ---------------------------------------------------------------- what math-verify is asked

EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|\\approx(?:eq)?(?![A-Za-z])|≈|\\simeq?(?![A-Za-z])|\\doteq(?![A-Za-z])")
LISTED = re.compile(r" ?(?:[,;]|(?:[,;] ?)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?")
NAME = re.compile(r"(?!.*(?:\\(?:sqrt|frac\{\d|log|ln|exp|sin|cos|tan|not|neg|ne)(?![A-Za-z])|[+\-*^<>\d]))(?=.*[A-Za-z]).+")
# math-verify drops these, or reads them as it likes: the base of 101_2, primes, dots, a modulus, a time of day, a negation.
DROPPED = re.compile(r"\d ?_ ?\{?\w+\}?|['\"′]|\\[lcvd]?dots[a-z]?|\.\.\.|…|\\[bp]?mod(?![a-z])|\d{1,2}:[0-5]\d(?!\d)"
                     r"|\\(?:not|neg)(?![a-z])")
SETS = re.compile(r"\\(?:pm|mp|cup|in|le|ge|leq|geq|lt|gt|emptyset|mathbb|begin)(?![A-Za-z])|[<>]")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
FUNCTIONS = frozenset("and sin cos tan cot sec csc log exp lim max min gcd lcm mod inf sqrt infinity percent".split())


def split_outside(text, pattern):
    """The parts of a text between the matches of a pattern that stand in no bracket."""
    parts, start = [], 0
    for match in pattern.finditer(text):
        before = text[: match.start()]
        if sum(map(before.count, "([{")) <= sum(map(before.count, ")]}")):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def is_name(text):
    """Is the left side of an equation a name for the right one, as x, f(2), S_{ABC}, |AB| and (p,q) are, and 2x and 8 are not?"""
    return NAME.fullmatch(re.sub(r"_ ?(?:\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)", "", text)) is not None


def read_equation(text):
    """One answer as (name or None, values that must all be equal): x = 6+1 = 7 -> ("x", ["7"]), 6+1 = 7 -> (None, ["6+1", "7"]).

    An equation such as 2x+y = 1 is one value, itself. None for x = x, which says nothing.
    """
    left, *values = split_outside(text, EQUALS)
    if not values:
        return None, [left]
    if is_name(left):
        certain = not re.search(r"\\approx|≈|\\sim|\\doteq", text)
        return None if normalise(left) in map(normalise, values) else (left, values[-1:] if certain else values)
    variables = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))
    return (None, [f"{left}={values[0]}"]) if variables and len(values) == 1 else (None, [left, *values])


def is_equation(text):
    """Is there an equals sign outside of brackets?"""
    return len(split_outside(text, EQUALS)) > 1


def bracket_kinds(values):
    """Kinds of the brackets that hold a list, with the number of commas, sorted. A list without brackets is a set."""
    distinct = {normalise(value): value for value in values}.values()
    kinds, stack = [("{}", len(distinct) - 1)] if len(values) > 1 else [], []
    for token in re.findall(r"[(\[{)\]},;]", " ".join(distinct)):
        if token in "([{":
            stack.append([token, 0])
        elif token in ",;" and stack:
            stack[-1][1] += 1
        elif token in ")]}" and stack:
            opened, commas = stack.pop()
            kinds += [(opened + token, commas)] if commas else []
    return sorted(kinds)


def same_form(given, gold):
    """Have two lists of values the same words of three letters, brackets around lists, and other things that math-verify drops?"""
    texts = [" , ".join(values) for values in (given, gold)]
    words = [set(WORD.findall(re.sub(r"\\(?:begin|end) ?\{\w+\}(?: ?\{[clr|]*\})?", "", text))) - FUNCTIONS for text in texts]
    kinds = [bracket_kinds(given), bracket_kinds(gold)]
    if any(re.search(r"\\(?:pm|mp)(?![A-Za-z])", text) for text in texts):  # two values in one
        kinds = [[brackets for brackets, _ in side] for side in kinds]
    if words[0] != words[1] or sorted(DROPPED.findall(texts[0])) != sorted(DROPPED.findall(texts[1])):
        return False
    return kinds[0] == kinds[1] or not all(kinds) and SETS.search(texts[not kinds[1]]) is not None


def math_question(given, gold):
    r"""What math-verify is asked about two spelled answers: a tuple of pairs that must all be equal. None where the answers differ.

    math-verify takes the last of 8 = 7 and the first of 5 \approx 7, multiplies letters, drops the base of 101_2 and adds 3 to 4 in
    3 4 and (3)(4). So all sides of a chain must be the answer, and `same_form` must hold.
    """
    sides = []
    for text in (given, gold):
        text = re.sub(r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)
        text = re.sub(r"(?<=[\d)]) ?\((?=-?[\d.]+\))", r"\\cdot(", text)
        items = [read_equation(item) for item in split_outside(text, LISTED)]
        if None in items or re.search(r"\d \d", text):
            return None
        if len(items) > 1 and any(len(values) > 1 or is_equation(values[0]) for _, values in items):
            return None
        sides.append((text, items))
    (given, items), (gold, right_items) = sides
    if not same_form(*([values[-1] for _, values in side] for side in (items, right_items))):
        return None
    if len(items) > 1 or len(right_items) > 1:
        return ((given, gold),)
    (name, values), (right_name, rights) = items[0], right_items[0]
    pairs = [(value, side[-1]) for side in (values, rights) for value in side[:-1]]
    wholes = [f"{left}={side[-1]}" if left else side[-1] for left, side in ((name, values), (right_name, rights))]
    if is_equation(values[-1]) or is_equation(rights[-1]):
        return (*pairs, tuple(wholes)) if all(map(is_equation, wholes)) else None
    if name and right_name and normalise(name) != normalise(right_name):
        return (*pairs, tuple(wholes))
    return (*pairs, (values[-1], rights[-1]))
