"""Chemical formulas without pymatgen: reduced formulas in its exact spelling, and parsing.

The spelling matters because data are split by a hash of the reduced formula (`split_bucket`), so training nodes without pymatgen must
spell as pymatgen does; the tests compare the two.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Final

from gnome.crystals.elements import ELECTRONEGATIVITY, SYMBOLS
from gnome.errors import InvalidInput

_NOT_FULLY_REDUCED: Final = {
    "LiO": "Li2O2", "NaO": "Na2O2", "KO": "K2O2", "HO": "H2O2", "CsO": "Cs2O2", "RbO": "Rb2O2",
    "O": "O2", "N": "N2", "F": "F2", "Cl": "Cl2", "H": "H2",
}  # fmt: skip
_POLYANION_MAX_DIFFERENCE: Final = 1.65
_ATOMIC_NUMBER: Final = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}
_SUBSCRIPTS: Final = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_DOT = re.compile("[·•⋅∙]")  # between a salt and its water
_FACTOR = re.compile(r"\s*(\d+(?:\.\d+)?)\s*", re.ASCII)
_HYDRATE_WITH_POINT = re.compile(r"(?:[1-9]\d*|[A-Za-z)\]}])\s*\.\s*\d*\s*[(\[{]?\s*(?:H2O|OH2|D2O|NH3)")
_OXIDATION_STATE = re.compile(r"\((?:I{1,3}|IV|VI{0,3})\)")
_POINT_FIRST = re.compile(r"(?<![0-9])\.[0-9]")
_MAYBE_A_FACTOR = re.compile(r"[A-Z][a-z]?[1-9]\d*\.(?:[2-9]|1\d|2[0-4])(?=[A-Z])")
_SYMBOL = re.compile(r"[A-Z][a-z]?")
_BRACKET = "\0"  # stands for a whole bracket
_UNIT = re.compile(r"[A-Z][a-z]?|\0")
_INNERMOST = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
_TOKEN = re.compile(r"([A-Z][a-z]?)|([(\[{])|([)\]}])|(\d+(?:\.\d+)?)|([ \t]+(?!\d))", re.ASCII)
_CLOSES: Final = {"(": ")", "[": "]", "{": "}"}
MAX_FORMULA_LENGTH: Final = 200
MAX_ATOMS: Final = 100_000


def reduced_formula(composition: Mapping[int, int]) -> str:
    """Spell the reduced formula of integer amounts by atomic number, as pymatgen's `Composition.reduced_formula` does."""
    formula, _ = _reduce({SYMBOLS[z]: amount for z, amount in composition.items() if amount})
    return _NOT_FULLY_REDUCED.get(formula, formula)


def _reduce(amounts: Mapping[str, int]) -> tuple[str, int]:
    symbols = sorted(amounts, key=lambda symbol: (_electronegativity(symbol), symbol))
    factor = math.gcd(*amounts.values())
    tail = ""
    if len(symbols) >= 3:
        difference = _electronegativity(symbols[-1]) - _electronegativity(symbols[-2])
        if difference < _POLYANION_MAX_DIFFERENCE:
            group, repeats = _reduce({symbol: amounts[symbol] // factor for symbol in symbols[-2:]})
            if repeats != 1:
                tail, symbols = f"({group}){repeats}", symbols[:-2]
    head = "".join(symbol + (str(n) if (n := amounts[symbol] // factor) != 1 else "") for symbol in symbols)
    return head + tail, factor


def _electronegativity(symbol: str) -> float:
    return ELECTRONEGATIVITY[_ATOMIC_NUMBER[symbol]]


def chemical_system(composition: Mapping[int, float]) -> str:
    """Element symbols in alphabetical order, joined by '-'."""
    return "-".join(sorted(SYMBOLS[z] for z, amount in composition.items() if amount))


def split_bucket(formula: str) -> int:
    """Bucket 0 to 99 of a reduced formula: 0-54 train, 55-59 validation, 60-69 test, 70-99 kept aside."""
    return int(hashlib.md5(formula.encode(), usedforsecurity=False).hexdigest(), 16) % 100


def parse_formula(text: str) -> dict[int, int]:
    """Read a formula such as `Ba(NO3)2` into amounts by atomic number; fractional amounts are refused.

    Raises InvalidInput naming the formula and what in it cannot be read.
    """
    amounts = parse_amounts(text)
    whole = {z: round(amount) for z, amount in amounts.items()}
    if any(abs(amount - whole[z]) > 1e-8 for z, amount in amounts.items()):
        raise InvalidInput(f"formula {text!r} has fractional amounts; multiply it up to whole atoms")
    return dict(sorted(whole.items()))


def parse_amounts(text: str) -> dict[int, float]:
    """Read a formula such as `Li0.5CoO2` or `CuSO4·5H2O` into amounts by atomic number, fractional ones too.

    An element named twice is added up.  Raises InvalidInput naming the formula and what in it cannot be read.
    """
    if not text.strip():
        raise InvalidInput("an empty formula cannot be read")
    if len(text) > MAX_FORMULA_LENGTH:
        raise InvalidInput(f"formula {text[:20]!r}... has {len(text)} characters, the limit is {MAX_FORMULA_LENGTH}")
    plain = text.translate(_SUBSCRIPTS)
    _refuse_what_reads_two_ways(plain, text)
    amounts: dict[int, float] = {}
    for number, part in enumerate(_DOT.split(plain)):
        match = _FACTOR.match(part) if number else None
        rest, factor = (part[match.end() :], float(match.group(1))) if match else (part, 1.0)
        if not rest.strip() or factor == 0:
            raise InvalidInput(f"formula {text!r}: a dot stands between two formulas, one is missing")
        _add(amounts, {z: factor * amount for z, amount in _amounts_of(rest, text).items()})
    amounts = {z: amount for z, amount in amounts.items() if amount > 0}
    if not amounts:
        raise InvalidInput(f"formula {text!r} has no atoms")
    if not sum(amounts.values()) <= MAX_ATOMS:
        raise InvalidInput(f"formula {text!r} has {sum(amounts.values()):.6g} atoms, the limit is {MAX_ATOMS}; reduce it")
    return amounts


def _refuse_what_reads_two_ways(plain: str, text: str) -> None:
    if _HYDRATE_WITH_POINT.search(plain):
        raise InvalidInput(f"formula {text!r} may be a hydrate or have a fractional amount; write water as in CuSO4(H2O)5")
    if _POINT_FIRST.search(plain):
        raise InvalidInput(f"formula {text!r}: write a fraction as 0.5, and formulas side by side as CaO·2Al2O3")
    amount = _MAYBE_A_FACTOR.search(plain)
    if amount and plain.count(".") == 1:  # Al2O3.2SiO2, where Li1.5CoO2 is clear, and so are several fractions
        before, after = (set(_SYMBOL.findall(part)) for part in (plain[: amount.end()], plain[amount.end() :]))
        if before & after:
            raise InvalidInput(
                f"formula {text!r} may be two side by side or have a fractional amount; write Al2O3·2SiO2, or whole atoms"
            )
    if found := _OXIDATION_STATE.search(plain):
        raise InvalidInput(f"formula {text!r}: {found.group()} reads as iodine or vanadium; leave oxidation states out")


def _refuse_two_formulas(part: str, text: str) -> None:
    """Spaces may stand between elements or brackets, as in `Ba1 (N1 O3)2`; what reads as a formula by itself comes last: `Li Fe PO4`."""
    outside = part
    while inner := _INNERMOST.search(outside):
        _refuse_two_formulas(inner.group()[1:-1], text)
        outside = outside[: inner.start()] + _BRACKET + outside[inner.end() :]
    pieces = outside.split()
    for place, piece in enumerate(pieces):
        whole = not piece.startswith(_BRACKET) and len(_UNIT.findall(piece)) > 1
        if whole and not all(other.startswith(_BRACKET) for other in pieces[place + 1 :]):
            raise InvalidInput(
                f"formula {text!r} reads as several with spaces between them; give one at a time, or leave the spaces out"
            )


def _amounts_of(part: str, text: str) -> dict[int, float]:
    """Read a formula without dots; `text` is what messages name."""
    _refuse_two_formulas(part, text)
    stack: list[dict[int, float]] = [{}]
    expected: list[str] = []
    last: dict[int, float] = {}
    for symbol, opening, closing, number in _tokens(part, text):
        if number:
            if not last:
                raise InvalidInput(
                    f"formula {text!r}: the number {number} follows no element or bracket; isotopes and leading factors are not read"
                )
            if float(number) == 0:
                raise InvalidInput(f"formula {text!r}: an amount of 0 stands there; leave out what is not there")
            last = {z: amount * float(number) for z, amount in last.items()}
        _add(stack[-1], last)
        last = {_known(symbol, text): 1.0} if symbol else {}
        if opening:
            stack.append({})
            expected.append(_CLOSES[opening])
        elif closing:
            if not expected or expected.pop() != closing:
                raise InvalidInput(f"formula {text!r}: {closing} closes a bracket that was never opened")
            last = stack.pop()
            if not last:
                raise InvalidInput(f"formula {text!r}: a pair of brackets holds nothing")
    if len(stack) != 1:
        raise InvalidInput(f"formula {text!r}: a bracket is never closed")
    _add(stack[-1], last)
    return stack[0]


def _tokens(part: str, text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (symbol, opening, closing, number), one of them not empty; white space is passed over."""
    position = 0
    while position < len(part):
        match = _TOKEN.match(part, position)
        if match is None:
            hint = "; leave charges out" if part[position] in "+-^⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹" else ""
            raise InvalidInput(f"formula {text!r}: {part[position]!r} (after {part[:position]!r}) cannot be read{hint}")
        position = match.end()
        if match.group(5) is None:
            symbol, opening, closing, number = (match.group(i) or "" for i in range(1, 5))
            yield symbol, opening, closing, number


def _known(symbol: str, text: str) -> int:
    if symbol not in _ATOMIC_NUMBER:
        hint = "; write deuterium as H" if symbol in {"D", "T"} else ""
        raise InvalidInput(f"formula {text!r}: {symbol!r} is no supported element{hint}")
    return _ATOMIC_NUMBER[symbol]


def _add(into: dict[int, float], amounts: Mapping[int, float]) -> None:
    for z, amount in amounts.items():
        into[z] = into.get(z, 0.0) + amount
