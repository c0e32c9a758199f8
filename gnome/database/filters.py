"""The OPTIMADE filter language, translated to SQL.

The grammar is that of the `optimade` package (version 1.2), read by an LALR parser: its time grows with the length of the filter, and
its errors have a position.  Every value of a user becomes a bound parameter, and no pattern matching of the database is used, so a
filter can neither inject SQL nor wildcards.  Length, nesting and the number of comparisons are bounded.

Unknown values follow SQL: a comparison with one is neither true nor false, and so is its NOT; neither matches.  IS UNKNOWN finds them.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from lark import Lark, Token, Transformer, Tree
from lark.exceptions import UnexpectedInput, VisitError
from lark.lexer import PatternRE, TerminalDef
from optimade.filterparser.lark_parser import AVAILABLE_PARSERS
from sqlalchemy import BigInteger, ColumnElement, Double, Integer, Text, and_, exists, func, literal, not_, or_, select, true

from gnome.crystals.elements import SYMBOLS
from gnome.crystals.formula import parse_formula, reduced_formula
from gnome.database.crystal_store import SHOWN_COLUMNS, alphabetical_formula
from gnome.database.filter_hints import comma_hint, field_hint, reading_hint, value_hint
from gnome.database.schema import ORIGINS, crystal_elements, crystals, methods
from gnome.database.text_search import contains
from gnome.errors import InvalidInput
from gnome.quantities import Quantity

MAX_LENGTH: Final = 10_000
MAX_DEPTH: Final = 30
MAX_COMPARISONS: Final = 300
MAX_VALUES: Final = 500
PREFIX: Final = "_gnome_"

_STRING = r'"(?:[^"\\]|\\.)*"'
_MAX_INTEGER = 2**63 - 1
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}

Condition = ColumnElement[bool]


@dataclass(frozen=True, kw_only=True)
class Field:
    """A name that may stand in a filter: its column, and what kind of values it has.

    `kind` is text, integer, float or elements.  `spell` brings a text to the spelling that is stored, and refuses what no crystal has;
    `whole` to what it is the beginning of.
    """

    column: ColumnElement[Any]
    kind: str
    spell: Callable[[str], str] | None = None
    whole: Callable[[ColumnElement[str], int], ColumnElement[str]] | None = None


def _chemical_system(text: str) -> str:
    symbols = [symbol.strip() for symbol in text.split("-")]
    if unknown := [symbol for symbol in symbols if symbol not in SYMBOLS[1:]]:
        raise InvalidInput(f"{unknown[0][:20]!r} in {text[:40]!r} is no element symbol; a chemical system is spelled as in Li-O")
    return "-".join(sorted(set(symbols)))


def _origin(text: str) -> str:
    if text not in ORIGINS:
        raise InvalidInput(f"no crystal has the origin {text[:40]!r}; {value_hint(text, ORIGINS)}")
    return text


def _alphabetical(text: str) -> str:
    return alphabetical_formula(parse_formula(text))


def _reduced(text: str) -> str:
    return reduced_formula(parse_formula(text))


def _whole_method(text: ColumnElement[str], n: int) -> ColumnElement[str]:
    """The label that a text of n characters is, or that alone begins so; otherwise the text itself."""
    label = methods.c.label
    alone = select(func.min(label)).where(func.substr(label, 1, n) == text).having(func.count() == 1).scalar_subquery()
    return func.coalesce(select(label).where(label == text).scalar_subquery(), alone, text)


def _kind(column: Any) -> str:
    return "integer" if isinstance(column.type, Integer) else "float" if isinstance(column.type, Double) else "text"


_SPELLINGS: Final[dict[str, Callable[[str], str]]] = {
    str(Quantity.CHEMICAL_SYSTEM): _chemical_system,
    str(Quantity.REDUCED_FORMULA): _reduced,
    str(Quantity.ORIGIN): _origin,
}
_NOT_FILTERED = {"id", "decomposes_to", "versions", "created_at", "chemical_formula_reduced", "chemical_formula_anonymous"}
FIELDS: Final[dict[str, Field]] = {
    "id": Field(column=crystals.c.id, kind="text"),
    "elements": Field(column=crystals.c.n_elements, kind="elements"),
    "nelements": Field(column=crystals.c.n_elements, kind="integer"),
    "nsites": Field(column=crystals.c.n_atoms, kind="integer"),
    "chemical_formula_reduced": Field(column=crystals.c.chemical_formula_reduced, kind="text", spell=_alphabetical),
    "chemical_formula_anonymous": Field(column=crystals.c.chemical_formula_anonymous, kind="text"),
    **{
        PREFIX + name: Field(
            column=column,
            kind=_kind(column),
            spell=_SPELLINGS.get(name),
            whole=_whole_method if name == Quantity.METHOD else None,
        )
        for name, column in SHOWN_COLUMNS.items()
        if name not in _NOT_FILTERED
    },
}
"""Everything a filter may ask for."""


def to_condition(text: str) -> Condition:
    """Translate a filter into a condition on `crystals` joined with `candidates`; an empty filter matches everything.

    Raises InvalidInput with one line: what is wrong, where, and what would be right.
    """
    _check_bounds(text)
    try:
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        at_end = getattr(getattr(error, "token", None), "type", "") == "$END"
        position = len(text.rstrip()) if at_end else int(error.pos_in_stream or 0)
        problem = "the filter ends too early" if at_end else f"{text[position : position + 20]!r} cannot be read here"
        hint = comma_hint(text) or ("" if at_end else reading_hint(text, position))
        raise _invalid(position, f"{problem}; {hint}" if hint else problem) from None
    try:
        return _ToCondition().transform(tree)
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidInput):
            raise error.orig_exc from None
        raise


@functools.cache
def _parser() -> Lark:
    grammar = AVAILABLE_PARSERS[1, 2, 0]["default"].read_text(encoding="utf-8")

    def edit(terminal: TerminalDef) -> None:
        # The grammar's own pattern tries every split of a run of tabs when the closing quote is missing: exponential time.
        if terminal.name == "ESCAPED_STRING":
            terminal.pattern = PatternRE(_STRING, ["s"])

    return Lark(grammar, parser="lalr", maybe_placeholders=False, edit_terminals=edit)


def _check_bounds(text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise InvalidInput(f"the filter has {len(text)} characters, the limit is {MAX_LENGTH}")
    for position, character in enumerate(text):
        if character == "\x00" or "\ud800" <= character <= "\udfff":
            raise _invalid(position, f"the character {character!r} is not allowed")
    depth = 0
    for match in re.finditer(_STRING + r"|[()]", text, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise _invalid(match.start(), f"brackets are nested more than {MAX_DEPTH} deep")


def _invalid(position: int, problem: str) -> InvalidInput:
    return InvalidInput(f"filter, position {position + 1}: {problem}")


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A constant of the filter; `value` is a text, a number or a truth value, or the name of a field when `kind` is field."""

    kind: str
    value: Any
    position: int


class _ToCondition(Transformer[Token, Condition]):
    """Bottom-up over the tree of the grammar; the methods are named after its rules."""

    def __init__(self) -> None:
        super().__init__()
        self._comparisons = 0
        self._values = 0

    def filter(self, children: list[Condition]) -> Condition:
        if len(children) > 1:
            raise InvalidInput("filter: two conditions stand side by side; join them with AND or OR")
        return children[0] if children else true()

    def expression(self, children: list[Condition]) -> Condition:
        return children[0] if len(children) == 1 else or_(*children)

    def expression_clause(self, children: list[Condition]) -> Condition:
        return children[0] if len(children) == 1 else and_(*children)

    def expression_phrase(self, children: list[Any]) -> Condition:
        return not_(children[-1]) if isinstance(children[0], Token) else children[0]

    def comparison(self, children: list[Condition]) -> Condition:
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            raise InvalidInput(f"filter: more than {MAX_COMPARISONS} comparisons")
        return children[0]

    def _count_value(self) -> None:
        self._values += 1
        if self._values > MAX_VALUES:  # SQLite nests a list of conditions that many deep
            raise InvalidInput(f"filter: more than {MAX_VALUES} values")

    def property(self, children: list[Token]) -> _Value:
        return _Value(kind="field", value=".".join(children), position=children[0].start_pos or 0)

    def string(self, children: list[Token]) -> _Value:
        self._count_value()
        text = re.sub(r"\\(.)", r"\1", children[0][1:-1], flags=re.DOTALL)
        return _Value(kind="text", value=text, position=children[0].start_pos or 0)

    def number(self, children: list[Token]) -> _Value:
        self._count_value()
        token = children[0]
        number = int(token) if token.type == "SIGNED_INT" and len(token) < 30 else float(token)
        if isinstance(number, int) and abs(number) > _MAX_INTEGER:
            number = float(number)
        if not math.isfinite(number):
            raise _invalid(token.start_pos or 0, f"the number {token[:20]} is too large")
        return _Value(kind="number", value=number, position=token.start_pos or 0)

    def signed_int(self, children: list[Token]) -> _Value:
        return self.number(children)

    def bool(self, _children: list[Token]) -> _Value:
        return _Value(kind="truth value", value="TRUE or FALSE", position=0)

    def value(self, children: list[_Value]) -> _Value:
        return children[0]

    constant = non_string_value = not_implemented_string = value

    def constant_first_comparison(self, children: list[Any]) -> Condition:
        constant, operator, other = children
        if other.kind != "field":
            raise _invalid(other.position, "a comparison needs a field on one side")
        return _compare(other, _FLIPPED[str(operator)], constant)

    def property_first_comparison(self, children: list[Any]) -> Condition:
        name, make = children
        return make(name)

    def value_op_rhs(self, children: list[Any]) -> Callable[[_Value], Condition]:
        operator, value = children
        return lambda name: _compare(name, str(operator), value)

    def known_op_rhs(self, children: list[Token]) -> Callable[[_Value], Condition]:
        return lambda name: _known(name, known=children[1].type == "KNOWN")

    def fuzzy_string_op_rhs(self, children: list[Any]) -> Callable[[_Value], Condition]:
        return lambda name: _fuzzy(name, children[0].type, children[-1])

    def set_op_rhs(self, children: list[Any]) -> Callable[[_Value], Condition]:
        kinds = [child.type for child in children if isinstance(child, Token)]
        values = children[-1] if isinstance(children[-1], list) else [children[-1]]
        return lambda name: _has(name, kinds[1:], values)

    def value_list(self, children: list[Any]) -> list[Any]:
        return children

    def length_op_rhs(self, children: list[Any]) -> Callable[[_Value], Condition]:
        operator = str(children[1]) if len(children) == 3 else "="
        return lambda name: _length(name, operator, children[-1])

    def set_zip_op_rhs(self, _children: list[Any]) -> Callable[[_Value], Condition]:
        def refuse(name: _Value) -> Condition:
            raise _invalid(name.position, "lists compared item by item (the ':' operator) are not supported")

        return refuse

    def __default__(self, data: str, children: list[Any], meta: Any) -> Any:
        return Tree(data, children, meta)


def _field(name: _Value) -> Field:
    if name.value not in FIELDS:
        raise _invalid(name.position, f"there is no field {name.value[:60]!r}; {field_hint(name.value, FIELDS, PREFIX)}")
    return FIELDS[name.value]


def _compare(name: _Value, operator: str, value: _Value) -> Condition:
    field = _field(name)
    if field.kind == "elements":
        raise _invalid(name.position, "elements is a list; use HAS, HAS ALL, HAS ANY, HAS ONLY or LENGTH")
    if value.kind == "field":
        raise _invalid(value.position, "two fields cannot be compared; expected a number or a text in double quotes")
    if (field.kind == "text") != (value.kind == "text") or value.kind == "truth value":
        expected = "a text in double quotes" if field.kind == "text" else "a number"
        raise _invalid(
            value.position or name.position,
            f"{name.value} compares with {expected}, not with {value.value if value.kind == 'truth value' else repr(value.value)}",
        )
    if value.kind == "number":
        bound: ColumnElement[Any] = (
            literal(value.value, BigInteger()) if isinstance(value.value, int) else literal(value.value, Double())
        )
    else:
        text = value.value
        if field.spell is not None and operator in {"=", "!="}:
            try:
                text = field.spell(text)
            except InvalidInput as error:
                raise _invalid(value.position, str(error)) from None
        bound = literal(text, Text())
        if field.whole is not None and operator in {"=", "!="} and text:
            bound = field.whole(bound, len(text))
    operations: dict[str, Callable[[], Condition]] = {
        "=": lambda: field.column == bound,
        "!=": lambda: field.column != bound,
        "<": lambda: field.column < bound,
        "<=": lambda: field.column <= bound,
        ">": lambda: field.column > bound,
        ">=": lambda: field.column >= bound,
    }
    return operations[operator]()


def _known(name: _Value, *, known: bool) -> Condition:
    column = _field(name).column
    return column.is_not(None) if known else column.is_(None)


def _fuzzy(name: _Value, operator: str, value: _Value) -> Condition:
    field = _field(name)
    if field.kind != "text":
        raise _invalid(name.position, f"{name.value} is no text; CONTAINS, STARTS WITH and ENDS WITH search texts")
    if value.kind != "text":
        raise _invalid(value.position or name.position, f"{operator} needs a text in double quotes")
    part = literal(value.value, Text())
    if operator == "CONTAINS":
        return contains(field.column, part)
    n_part = func.length(part)
    start = literal(1, Integer()) if operator == "STARTS" else func.length(field.column) - n_part + 1
    return func.substr(field.column, start, n_part) == part  # of a shorter text there is less than n_part to be had


def _has(name: _Value, kinds: list[str], values: list[Any]) -> Condition:
    if _field(name).kind != "elements":
        raise _invalid(name.position, f"{name.value} is no list; HAS searches the list elements")
    if "OPERATOR" in kinds or any(isinstance(value, Token) for value in values):
        raise _invalid(name.position, "operators inside HAS are not supported")
    for value in values:
        if value.kind != "text":
            raise _invalid(value.position or name.position, "HAS needs element symbols in double quotes")
        if value.value not in SYMBOLS[1:]:
            several = re.fullmatch(r"[A-Z][a-z]?([\s,;-]+[A-Z][a-z]?)+", value.value.strip())
            quoted = ", ".join(f'"{symbol}"' for symbol in re.findall(r"[A-Z][a-z]?", value.value))
            advice = f"; several are HAS ALL {quoted}" if several else ""
            meant = value.value.strip().capitalize()
            if not several and meant in SYMBOLS[1:]:
                advice = f'; did you mean "{meant}"?'
            raise _invalid(value.position, f"{value.value[:20]!r} is no element symbol{advice}")
    symbols = sorted({value.value for value in values})
    if kinds == ["ONLY"]:
        return not_(_has_element(crystal_elements.c.element.not_in(symbols)))
    if kinds == ["ANY"]:
        return _having(crystal_elements.c.element.in_(symbols))
    return and_(*(_having(crystal_elements.c.element == symbol) for symbol in symbols))


def _having(condition: Condition) -> Condition:
    """Crystals with such an element, found through the index that begins with the element."""
    return crystals.c.key.in_(select(crystal_elements.c.crystal_key).where(condition))


def _has_element(condition: Condition) -> Condition:
    """Crystals with such an element, looked up crystal by crystal."""
    return exists().where(crystal_elements.c.crystal_key == crystals.c.key, condition)


def _length(name: _Value, operator: str, value: _Value) -> Condition:
    if _field(name).kind != "elements":
        raise _invalid(name.position, f"{name.value} is no list; LENGTH counts the list elements")
    return _compare(_Value(kind="field", value="nelements", position=name.position), operator, value)
