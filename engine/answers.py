r"""Answers: the last box of a text, and what the rules of --reward read in a box. One `answer_value` serves the grade and the vote.

Nothing that a model wrote is evaluated in this process: regular expressions read numbers into Fractions. Text that no rule understands
equals itself only.
"""

import functools
import re
from fractions import Fraction

LONGEST_BOX = 10_000  # characters; a longer box is none
LONGEST_ANSWER = 1000  # a longer answer is compared word by word
LONGEST_NUMBER = 100
BOX = re.compile(r"(?:(?<=\\)boxed|(?<=\\f)box)(?![A-Za-z])\s{0,20}(?:(?P<brace>\{)|(?P<number>[+-]?\.?\d[^\s$]{0,100}?)"
                 r"(?=[.,;:]*(?:[\s$]|\\[)\]]|\Z))|(?<=\s)(?P<letter>[A-Z])(?!\w))", re.ASCII)
BETWEEN_BOXES = re.compile(r"(?:[\s$,;{}]|\\[\s,;:!()\[\]]|\\q?quad|\\text|and|or){0,50}\\f?")


def answer_span(text):
    r"""The content of the last box in `text`, or None: \boxed{...}, \fbox{...}, or \boxed 2.

    Boxes side by side are a list: `\boxed{1}` and `\boxed{2}` are 1, 2, as for math-verify. Any other box before the last earns nothing.
    """
    boxes, place, behind = {}, len(text), None
    for after in reversed(text.rsplit("box", 1000)[1:]):
        place -= len(after) + len("box")
        box = BOX.match(text, place)
        if box is None:  # without content, as in "write it in \\boxed"
            continue
        content, end = read_braces(text, box.end()) if box["brace"] else (box["number"] or box["letter"], box.end())
        if content is not None and not content.strip() and not boxes:  # "as asked in \\boxed{}"
            continue
        if content is None or boxes and not (end <= behind and BETWEEN_BOXES.fullmatch(text, end, behind)):
            break
        boxes, behind = {answer_value(content, "boxed"): content} | boxes, place  # one answer in two spellings is one
    return ", ".join(boxes.values()) if boxes else None


def read_braces(text, start):
    """What stands before the brace that closes the one before `start`, and where it ends; (None, start) where none closes it."""
    depth = 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + LONGEST_BOX):  # \{ does not open a group
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start : token.start()], token.end()
    return None, start


# ---------------------------------------------------------------- one spelling

SIGNS = {"π": "pi", "θ": "theta", "α": "alpha", "∞": "infty", "∅": "emptyset", "≤": "leq", "≥": "geq", "≠": "neq", "±": "pm", "×": "times",
         "÷": "div", "·": "cdot", "∪": "cup", "∩": "cap", "∈": "in", "½": "frac{1}{2}"}
LETTER_UNITS = {"m": "meter", "s": "second", "g": "gram", "h": "hour", "L": "liter", "l": "liter"}
SPELLINGS = [(re.compile(pattern, re.ASCII), new) for pattern, new in (
    (r"\u2212|\A[\u2010-\u2015\uff0d](?=[\d.])", "-"),
    (r"[²³]", lambda match: "^2" if match[0] == "²" else "^3"),
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " "),  # math delimiters
    (r"\\(?:left|right|bigg?[lr]?|Bigg?[lr]?|displaystyle|textstyle)(?![A-Za-z])", ""),
    (r"(?<![\d.,])[1-9]\d{0,2}(?: ?(?:\{ ?, ?\}|, ?\\!) ?\d{3})+(?!\d)", lambda match: re.sub(r"\D", "", match[0])),  # thousands
    (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[dtc](frac|binom)(?![A-Za-z])", r"\\\1"),
    (r"\\operatorname\*? ?\{ ?([a-z]+) ?\}", r"\\\1 "),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"(?<![A-Za-z\\])(pi|ln|exp)(?![A-Za-z])", r"\\\1 "),
    (r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (f"[{''.join(SIGNS)}]", lambda match: f"\\{SIGNS[match[0]]} "),
    (r"\\([lr])brace(?![A-Za-z])", lambda match: r"\{" if match[1] == "l" else r"\}"),
    (r"\\([lgn])e(?:qslant)?(?![A-Za-z])", r"\\\1eq"),
    (r"\\(frac|sqrt|binom)(?: ?(\d)| ([A-Za-z])| ?(\\pi)(?![A-Za-z]))", r"\\\1{\2\3\4}"),  # TeX takes one digit, letter or command
    (r"(\\(?:frac|binom) ?\{[^{}]*\}) ?([\dA-Za-z])", r"\1{\2}"),
    (r"(?<=[\d} ])\\(?:text|textrm|textnormal|mathrm|mbox) ?\{ ?([msghLl]) ?\}", lambda match: f" {LETTER_UNITS[match[1]]} "),
    (r"\\(?:text|math|bold)(?:rm|normal|bf|it|symbol)? ?\{([^{}]*)\}|\\mbox ?\{([^{}]*)\}", r" \1\2 "),
    (r"([\^_]) ?\{ ?([\dA-Za-z]) ?\}|([\^_]) ?(\d(?!\d)|[A-Za-z](?![\dA-Za-z]))", r"\1\3{\2\4}"),
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
    return re.sub(r"(?<!\.) ?\.$|(?<!\\)\\$", "", text)  # \ and a space at the end have lost the space


def normalise(text):
    """`spell`, and spaces are dropped but between two digits."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", spell(text)) if len(text) <= LONGEST_ANSWER else spell(text)


# ---------------------------------------------------------------- numbers, units, letters

NUMBER = re.compile(r"[+-]?(?:\d+/\d*[1-9]\d*|(?:\d+|[1-9]\d{0,2}([, ])\d{3}(?:\1\d{3})*)(?:\.\d*)?|\.\d+)", re.ASCII)
FRACTION = re.compile(r"\A([+-]?)\\frac\{([+-]?)(\d+)\}\{([+-]?)(\d+)\}\Z", re.ASCII)


def parse_number(text):
    """Integer, decimal, a/b, 1,234 or 1 234 -> Fraction; anything else None. At most 100 characters; nothing is evaluated."""
    text = re.sub(r" ?([/{}]) ?|(?<=[+-]) ", r"\1", spell(text))
    text = FRACTION.sub(lambda m: "-" * ((m[1] + m[2] + m[4]).count("-") % 2) + f"{m[3]}/{m[5]}", text)
    return Fraction(re.sub(r"[, ]|\.\Z", "", text)) if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text) else None


# One name for each unit, by its other names. An open list would take "5 squared".
UNITS = {name: line for line, names in {
    "cm": "centimeter centimetre", "meter": "metre", "km": "kilometer kilometre", "mm": "millimeter millimetre", "inch": "inches in",
    "foot": "feet ft", "yard": "yd", "mile": "mi", "kg": "kilogram kilo", "gram": "gm", "mg": "milligram", "pound": "lb", "ounce": "oz",
    "ton": "tonne", "second": "sec", "minute": "min", "hour": "hr", "day": "", "week": "", "month": "", "year": "yr", "degree": "deg",
    "radian": "rad", "percent": "percentage pct", "mile per hour": "mph", "km per hour": "kmh kmph kph", "liter": "litre",
    "ml": "milliliter millilitre", "gallon": "gal", "acre": "", "hectare": "", "cent": "", "euro": "eur €", "sterling": "gbp £",
    "quart": "qt", "pint": "", "tablespoon": "tbsp", "teaspoon": "tsp", "byte": "", "bit": "", "joule": "", "watt": "", "newton": "",
    "volt": "", "amp": "ampere", "pascal": "", "decade": "", "century": "centuries", "arcminute": "", "arcsecond": "", "permille": "",
    "penny": "pennies", "nickel": "", "dime": "", "peso": "", "yen": "jpy ¥", "yuan": "rmb", "rupee": "rs ₹",
    "square": "sq", "cubic": "cu", "per": "/",
    "dollar": "usd \\$", "thing": "unit people person child children student men man women woman",
}.items() for name in [line, *names.split()]}
PREFIXED = re.compile(r"(nano|micro|milli|centi|deci|kilo|mega|giga|tera)(met(?:er|re)|gram|lit(?:er|re)|second|watt|volt|amp|ampere|hertz|"
                      r"byte|bit|joule|newton|pascal|ohm|calorie)s?")
# Words in s that are no things: 5 hundreds, halves, tenths, times, minus, has.
NUMERALS = re.compile(
    r"(?:hundred|thousand|\w*illi(?:on|ard)|lakh|crore|dozen|score|gros|pair|couple|half|halve|third|quarter|\w*th|one|two|three|four|five|"
    r"six|seven|eight|nine|zero|ten|\w*teen|\w+tie|\w*ty|twelve|eleven|double|triple|\w*tuple|time|square|cube|root|power|minu|plu|les|"
    r"decimal|digit|inverse|reciprocal|negative|factorial|exponent|\w*logarithm|log|\w*fold|equal|divide|exceed|thi|thu|alway|gro|myriad|"
    r"googol|trio|duo|basi|base|co|pi|multiple|factor|opposite|remainder|ha|wa|i|doe|sin|percentile|fraction|proces|modulu|radical)s")
QUANTITY = re.compile(r"(.*(?:[0-9)}]\.?|\\pi)) ?((?<= )[A-Za-z][A-Za-z ./]{0,40}?|\\\$|[€£¥₹])(?: ?\^\{([23])\})?")


def split_unit(text):
    """A spelled text as (what is before its unit, the unit's one name): ("5", "cm"), ("5", "thing") for 5 eggs; None without a unit.

    A noun in the plural that is no numeral is a thing.
    """
    match = QUANTITY.fullmatch(re.sub(r"\A([+-]? ?)(\\\$|[€£¥₹]) ?(.*)", r"\1\3 \2", text))  # currencies stand in front, too
    words, names = re.findall(r"[a-z]+|\\\$|[€£¥₹]|/", match[2].lower()) if match else [], []
    for word in words:
        name = UNITS.get(word, UNITS.get(word.removesuffix("s")) if len(word) > 2 else LETTER_UNITS.get(word) if "/" in words else None)
        if name is None and PREFIXED.fullmatch(word):
            name = re.sub("tres?", "ter", word.removesuffix("s"))
        if name is None and len(words) == 1 and re.fullmatch(r"[a-z]{3,}s", word) and not NUMERALS.fullmatch(word):
            name = "thing"
        names.append(name)
    known = names and None not in names and len(set(names)) == len(names) <= 4
    if not known or names[0] == "per" or names[-1] in ("square", "cubic", "per"):
        return None
    power = match[3] or {"square": "2", "cubic": "3"}.get(names[0], "")
    return match[1], " ".join(name for name in names if name not in ("square", "cubic")) + power


def read_quantity(text):
    """A number with its unit -> (Fraction, the unit's name), or None. The unit is "" for a number alone."""
    number, unit = split_unit(spell(text)) or (text, "")
    value = parse_number(number)
    return None if value is None else (value, unit)


def parse_quantity(text):
    """The number that --reward numeric reads, or None: its unit is dropped, whatever the unit is, and so is "x =" before it."""
    if len(text.strip()) > LONGEST_NUMBER:
        return None
    quantity = read_quantity(re.sub(r"^[A-Za-z](?: ?_ ?\{?[A-Za-z0-9]{1,9}\}?)? ?= ?", "", spell(text)))
    return quantity and quantity[0]


SECOND_CHOICE = re.compile(r"\A(?:or|and|nor|either|neither|not\Z|[A-Z]\b)|(?:[,(]|\b(?:or|and|nor)) ?[A-Z]\b|\b[A-Z][.):]")


def parse_choice(text):
    r"""The letter of B, (B), B., B), B: Paris, \text{B} or \textbf{(B)} 12 -> "B"; None for anything else, and where a second is named."""
    match = re.fullmatch(r"(?:\( ?([A-Z]) ?\)|([A-Z])(?=[.):]|$))[.):]?(?: (.*))?", spell(text)) if len(text) <= LONGEST_ANSWER else None
    if not match or SECOND_CHOICE.search(match[3] or ""):
        return None
    return match[1] or match[2]


@functools.lru_cache(maxsize=10_000)
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
        return str(quantity[0]) if quantity[1] in ("", "dollar", "thing", "thing2", "thing3") else " ".join(map(str, quantity))
    return normalise(text) or None


def is_words(text):
    """True for two letters or more and nothing else. math-verify reads "east" as the product e a s t, which equals "seat"."""
    return re.fullmatch(r"[A-Za-z]{2,}", normalise(text)) is not None


# ---------------------------------------------------------------- what math-verify is asked

# What math-verify reads. Other words and signs, if they stand in one of two answers only, make them different.
READ = frozenset(
    "frac sqrt cdot times div infty cup cap sum prod int binom log exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh max min "
    "gcd lcm lim begin end array matrix pmatrix bmatrix vmatrix leq geq neq emptyset varnothing mathbb lfloor rfloor lceil rceil".split())
UNREAD = re.compile(r"\\?[A-Za-z]{3,}|\d ?_ ?(?:\w+|\{[^{}]*\})|[fgh] ?\^\{-1\} ?(?=\()|\S'+|\^\{T\}"
                    r"|(?<![\d.])[\d.]+(?::[\d.]+|[eE][+-]?\d+)|\.\.+"
                    r"|[^\w\s\\.,;()\[\]{}+\-*/^=<>|!_&]|\[(?=(?:[^][,]*,){2}[^][,]*\])", re.ASCII)
ADDED = re.compile(r"\d \d|\d ?(?:\\?\{|\[) ?-?[\d.]|(?:\\\}|\]) ?[\d.]|(?:\A|[^A-Za-z^_\]}])\{[^{}]*\} ?[\d{]"  # 3 4, 3[4], {3}4
                   r"|\d ?[A-Za-z]+ ?\d|\A\d+(?: ?- ?\d+)+\Z|\A\d+(?: ?/ ?\d+){2,}\Z")  # 2 hours 30, 4 R 3; 3-2, 2024-01-05; 01/06/2024
# x, f(2), S_{ABC}, |AB| and (p,q) are names, when an equals sign follows; 2x and x^2 are not.
NAME = re.compile(r"(?:\A|(?<=, ))(?=[^=]*[A-Za-z])((?:\([^()=]*\)|\{[^{}=]*\}|_ ?(?:\w|\{[^{}=]*\})|[^-+*/^<>(){}=,;!_\\\d]"
                  r"|\\(?!(?:sqrt|frac ?\{\d|log|ln|exp|sin|cos|tan|not|neg?)(?![A-Za-z])))+?) ?= ?(?!\1(?:,|\Z))")


def unread(text):
    """What math-verify drops or multiplies: words, the base of 101_2, f^{-1}, primes, dots, times of day; and [ of a list, read as (."""
    return {re.sub(r"[\s(){}]|\[|\]", "", token) if "_" in token else token for token in UNREAD.findall(text)
            if token.strip("\\") not in READ}


def has_both_cases(text):
    """Is a letter used in both cases, as names of two things?"""
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|[A-Za-z]{3,}", "", text)))
    return any(letter.swapcase() in letters for letter in letters)


def math_question(given, gold):
    r"""What math-verify is asked about two spelled answers, as a pair; None where the answers differ.

    It takes the first of 5 \approx 7, drops what it does not know, adds 3 to 4 in 3 4 and (3)(4), multiplies 2 hours 30 and subtracts in
    2024-01-05. "x > 1 and" is not "x > 1 or". A name goes if one answer has none. It takes R for r, and divides in 1:2:3.
    """
    given, gold = (re.sub(r" ?: ?", ":", text) for text in (given, gold))
    if any(has_both_cases(text) or re.search(r":[^:=,]*:", text) for text in (given, gold)):
        return None
    pair, joined = [], [set(re.findall(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", text)) for text in (given, gold)]
    if all(joined) and joined[0] != joined[1] and all(re.search(r"[<>]|\\[lg]eq?(?![A-Za-z])", text) for text in (given, gold)):
        return None
    for text in (given, gold):
        text = re.sub(r"\\(?:approx(?:eq)?|simeq?|doteq|in)(?![A-Za-z])|≈", "=", text)
        text = re.sub(r" ?(?:[,;] ?)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ?| ?[,;] ?", ", ", text)  # a space: 0,111 is no number
        text = re.sub(r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)
        pair.append(re.sub(r"(?<=[\d)]) ?(?=\()|(?<=\)) ?(?=\d|\\frac)", r"\\cdot ", text))
    if sum("=" in text for text in pair) == 1:
        several = len({name for text in pair for name in NAME.findall(text)}) > 1  # the values of several names have an order
        pair = [f"({NAME.sub('', text)})" if several else NAME.sub("", text) for text in pair]
    if any(ADDED.search(text) for text in pair) or unread(pair[0]) != unread(pair[1]):
        return None
    return tuple(pair)
