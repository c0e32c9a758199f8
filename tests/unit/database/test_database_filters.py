"""Filters against the same filter evaluated row by row in Python, with the three-valued logic of unknown values."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from database_rows import CHGNET, EMT, candidate, seed
from optimade.filterparser import LarkParser

from gnome.crystals.elements import SYMBOLS
from gnome.database.crystal_store import alphabetical_formula
from gnome.database.filters import FIELDS, MAX_COMPARISONS, MAX_DEPTH, MAX_LENGTH, to_condition
from gnome.database.query import count, query
from gnome.database.records import CrystalRecord
from gnome.database.store import Store
from gnome.errors import InvalidInput

Row = dict[str, Any]
Predicate = Callable[[Row], bool | None]
ELEMENTS = ["Li", "O", "Fe", "Na", "Cl"]


def random_records(rng: random.Random, n: int) -> list[CrystalRecord]:
    records = []
    for i in range(n):
        discovered = rng.random() < 0.4
        symbols = [rng.choice(ELEMENTS) for _ in range(rng.randint(1, 6))]
        records.append(
            seed(
                3.5 + i / 200,
                tuple(symbols),
                method=rng.choice([CHGNET, EMT]),
                e_form_per_atom=round(rng.uniform(-3, 1), 1),
                e_above_hull=rng.choice([None, 0.0, round(rng.uniform(0, 0.2), 2)]),
                space_group_number=rng.choice([None, 1, 62, 225]),
                protostructure=rng.choice([None, "AB_cF8", "ab_cF8", 'odd"\\_%*', "AB_", "été"]),
                origin="discovered" if discovered else rng.choice(["seed", "imported"]),
                round=rng.choice([1, 2]) if discovered else None,
                candidate_id=rng.choice(["c1", "c02"]) if discovered else None,
            )
        )
    return records


def fill(store: Store, rng: random.Random, n: int = 200) -> list[Row]:
    """Fill the tables and give the rows by the names that filters use, made from the records and not read back."""
    for number in (1, 2):
        store.start_round({}, 0)
        store.finish_round(number, {})
    store.add_candidates([candidate("c1", 1, parent_id="p-1"), candidate("c02", 2)])
    records = random_records(rng, n)
    assert store.add_crystals(records) == n
    return [
        {
            "id": record.crystal.id,
            "elements": {SYMBOLS[z] for z in record.crystal.composition},
            "nelements": len(record.crystal.composition),
            "nsites": record.crystal.n_atoms,
            "chemical_formula_reduced": alphabetical_formula(record.crystal.composition),
            "_gnome_chemical_system": record.crystal.chemical_system,
            "_gnome_volume_per_atom": record.crystal.volume_per_atom,
            "_gnome_e_form_per_atom": record.e_form_per_atom,
            "_gnome_e_above_hull": record.e_above_hull,
            "_gnome_space_group_number": record.space_group_number,
            "_gnome_protostructure": record.protostructure,
            "_gnome_method": record.method.label,
            "_gnome_origin": record.origin,
            "_gnome_round": record.round,
            "_gnome_parent": "p-1" if record.candidate_id == "c1" else None,
            "_gnome_generator": "substitution" if record.candidate_id else None,
        }
        for record in records
    ]


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}


def unknown_or(field: str, test: Callable[[Any], bool]) -> Predicate:
    return lambda row: None if row[field] is None else test(row[field])


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def random_comparison(rng: random.Random, rows: list[Row]) -> tuple[str, Predicate]:
    kind = rng.choice(["number", "number", "text", "fuzzy", "has", "has", "length", "known"])
    if kind == "number":
        field = rng.choice(
            ["nelements", "nsites", "_gnome_e_form_per_atom", "_gnome_e_above_hull", "_gnome_space_group_number", "_gnome_round"]
        )
        value = rng.choice([row[field] for row in rows if row[field] is not None]) + rng.choice([0, 0, 0.5])
        operator = rng.choice(list(COMPARE))
        predicate = unknown_or(field, lambda found: COMPARE[operator](found, value))
        return (f"{field}{operator}{value}" if rng.random() < 0.7 else f"{value} {FLIPPED[operator]} {field}"), predicate
    if kind in {"text", "fuzzy"}:
        fields = [
            "id",
            "_gnome_chemical_system",
            "_gnome_protostructure",
            "_gnome_method",
            "_gnome_origin",
            "_gnome_parent",
            "_gnome_generator",
        ]
        field = rng.choice(fields)
        value = rng.choice([row[field] for row in rows if row[field] is not None])
        if kind == "text":
            operator = rng.choice(list(COMPARE))
            return f"{field} {operator} {quoted(value)}", unknown_or(
                field, lambda found: COMPARE[operator](found.encode(), value.encode())
            )
        start = rng.randrange(len(value))
        part = rng.choice([value[start : start + 3], value[:2], value[-2:], value + "x", "%", "_", "*", "\\", '"', ""])
        word, test = rng.choice(
            [
                ("CONTAINS", lambda found: part in found),
                ("STARTS WITH", lambda found: found.startswith(part)),
                ("STARTS", lambda found: found.startswith(part)),
                ("ENDS WITH", lambda found: found.endswith(part)),
            ]
        )
        return f"{field} {word} {quoted(part)}", unknown_or(field, test)
    if kind == "has":
        asked = rng.sample([*ELEMENTS, "U"], rng.randint(1, 4))
        listed = ", ".join(map(quoted, asked))
        word, test = rng.choice(
            [
                ("ALL", lambda found: set(asked) <= found),
                ("ANY", lambda found: bool(set(asked) & found)),
                ("ONLY", lambda found: found <= set(asked)),
            ]
        )
        if rng.random() < 0.3:
            return f"elements HAS {quoted(asked[0])}", lambda row: asked[0] in row["elements"]
        return f"elements HAS {word} {listed}", lambda row: test(row["elements"])
    if kind == "length":
        operator, value = rng.choice(list(COMPARE)), rng.randint(0, 5)
        shown = "" if operator == "=" and rng.random() < 0.5 else operator + " "
        return f"elements LENGTH {shown}{value}", lambda row: COMPARE[operator](len(row["elements"]), value)
    field = rng.choice(list(rows[0]))
    known = rng.random() < 0.5
    return f"{field} IS {'KNOWN' if known else 'UNKNOWN'}", lambda row: (row[field] is not None) == known


def random_filter(rng: random.Random, rows: list[Row], depth: int = 3) -> tuple[str, Predicate]:
    shape = rng.choice(["one", "and", "or", "not"]) if depth else "one"
    if shape == "one":
        return random_comparison(rng, rows)
    if shape == "not":
        text, inner = random_filter(rng, rows, depth - 1)

        def negated(row: Row) -> bool | None:
            value = inner(row)
            return None if value is None else not value

        return f"NOT ({text})", negated
    parts = [random_filter(rng, rows, depth - 1) for _ in range(rng.randint(2, 3))]

    def joined(row: Row) -> bool | None:
        values = [predicate(row) for _, predicate in parts]
        decisive = shape == "or"
        return decisive if decisive in values else None if None in values else not decisive

    return f" {shape.upper()} ".join(f"({text})" for text, _ in parts), joined


def test_filters_find_what_python_finds(store: Store) -> None:
    rng = random.Random(20)
    rows = fill(store, rng)
    sizes = []
    for _ in range(200):
        text, predicate = random_filter(rng, rows)
        expected = sorted((row["id"], row["_gnome_method"]) for row in rows if predicate(row) is True)
        assert [(row["id"], row["method"]) for row in query(store, text)] == expected, text
        assert count(store, text) == len(expected)
        sizes.append(len(expected))
    assert sum(0 < size < len(rows) for size in sizes) > 100  # the filters tell rows apart


def test_precedence_is_not_then_and_then_or(store: Store) -> None:
    rows = fill(store, random.Random(3), 60)
    found = count(store, 'NOT elements HAS "O" AND nelements=2 OR elements HAS "Fe"')
    assert found == sum(("O" not in row["elements"] and row["nelements"] == 2) or "Fe" in row["elements"] for row in rows)
    assert count(store, "") == count(store, "  ") == 60


def test_formulas_match_in_any_order_of_elements(store: Store) -> None:
    store.add_crystals(
        [seed(4.0, ("Li", "Fe", "O", "O")), seed(4.1, ("O", "O", "Li", "Fe") * 2), seed(4.2, ("Li", "O")), seed(4.3, ("Fe", "O"))]
    )
    for spelling in ("LiFeO2", "FeLiO2", "O2FeLi", "Li2Fe2O4", "LiFe(O)2"):
        assert count(store, f'chemical_formula_reduced = "{spelling}"') == 2, spelling
        assert count(store, f'chemical_formula_reduced != "{spelling}"') == 2, spelling
        assert count(store, f'_gnome_reduced_formula = "{spelling}"') == 2, spelling
    assert count(store, 'chemical_formula_reduced = "Li2O2"') == 1  # the stored reduced formula is Li2O2, OPTIMADE's is LiO
    assert count(store, 'chemical_formula_reduced STARTS WITH "Fe"') == 3
    assert count(store, 'chemical_formula_anonymous = "A2BC"') == 2
    assert count(store, '_gnome_chemical_system = "O-Li-Fe"') == 2
    with pytest.raises(InvalidInput, match="position 28: formula 'LiQq'"):
        count(store, 'chemical_formula_reduced = "LiQq"')


INJECTIONS = [
    "'; DROP TABLE crystals; --",
    '" OR "1"="1',
    "x' OR '1'='1",
    "%",
    "_",
    "\\",
    "*",
    "$1",
    ":value",
    "%(x)s",
    "{0}",
    "\u202e",
    "💎",
    "' UNION SELECT label FROM methods --",
]


def test_strings_are_values_and_nothing_else(store: Store) -> None:
    sources = ["plain", *INJECTIONS]
    store.add_crystals([seed(4.0 + i / 10, source=source) for i, source in enumerate(sources)])
    searches: dict[str, Callable[[str, str], bool]] = {
        "=": lambda found, part: found == part,
        "!=": lambda found, part: found != part,
        "CONTAINS": lambda found, part: part in found,
        "STARTS WITH": lambda found, part: found.startswith(part),
        "ENDS WITH": lambda found, part: found.endswith(part),
    }
    for part in INJECTIONS:
        for operator, matches in searches.items():
            found = {row["source"] for row in query(store, f"_gnome_source {operator} {quoted(part)}")}
            assert found == {source for source in sources if matches(source, part)}, (operator, part)
    assert store.counts()["crystals"] == len(sources)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo=3", r"position 1: there is no field 'foo'; known are id, elements"),
        ("e_above_hull < 1", "position 1: there is no field 'e_above_hull'; did you mean _gnome_e_above_hull"),
        ("nsites=1 AND _gnome_nothing>2", "position 14: there is no field '_gnome_nothing'"),
        ("id.nested=3", "position 1: there is no field 'id.nested'"),
        ('nelements="2"', "position 11: nelements compares with a number"),
        ("id=3", "position 4: id compares with a text in double quotes"),
        ("nelements=TRUE", "position 1: nelements compares with a number, not with TRUE or FALSE"),
        ("nelements=nsites", "position 11: two fields cannot be compared"),
        ('"a"="b"', "position 5: a comparison needs a field on one side"),
        ("nelements=", "position 11: the filter ends too early"),
        ("(nelements=2", "position 13: the filter ends too early"),
        ("nelements=2)", r"position 12: '\)' cannot be read here"),
        ("nelements=2 AND", "position 16: the filter ends too early"),
        ("nelements=2 nsites=3", "join them with AND or OR"),
        ("nelements LIKE 3", "position 11: 'LIKE 3' cannot be read here"),
        ("id='a'", "position 4: \"'a'\" cannot be read here"),
        ('id="a', "position 4: '\"a' cannot be read here"),
        ('"' + "\t" * 200, "position 1: .* cannot be read here"),
        ("; DROP TABLE crystals", "position 1: '; DROP TABLE crystal' cannot be read here"),
        ('elements="K"', "position 1: elements is a list; use HAS"),
        ('elements HAS "Xx"', "position 14: 'Xx' is no element symbol"),
        ('elements HAS ""', "position 14: '' is no element symbol"),
        ('elements HAS ALL "K",3', "position 22: HAS needs element symbols"),
        ('elements HAS < "K"', "operators inside HAS are not supported"),
        ('elements HAS ANY < "K"', "operators inside HAS are not supported"),
        ('elements:nsites HAS "a":2', "compared item by item"),
        ('nelements HAS "K"', "position 1: nelements is no list; HAS"),
        ("nsites LENGTH 3", "position 1: nsites is no list; LENGTH"),
        ('nsites CONTAINS "3"', "position 1: nsites is no text; CONTAINS"),
        ("id CONTAINS 3", "position 13: CONTAINS needs a text"),
        ("nsites<1e999", "position 8: the number 1e999 is too large"),
        ('id="a\x00"', r"position 6: the character '\\x00' is not allowed"),
        ('id="\udc80"', r"position 5: the character '\\udc80' is not allowed"),
        ("(" * (MAX_DEPTH + 1) + 'id="a"' + ")" * (MAX_DEPTH + 1), f"position {MAX_DEPTH + 1}: brackets are nested more than"),
        ("(" * 9000, "brackets are nested more than"),
        ('id="' + "a" * MAX_LENGTH + '"', f"the limit is {MAX_LENGTH}"),
        (" OR ".join(["nsites=1"] * (MAX_COMPARISONS + 1)), f"more than {MAX_COMPARISONS} comparisons"),
        ("nsites=1 AND " * 700 + "nsites=1", f"more than {MAX_COMPARISONS} comparisons"),
    ],
)
def test_a_filter_that_cannot_be_used_is_told_where_and_why(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        to_condition(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("elements HAS Li", 'put the text in double quotes: "Li"'),
        ('elements HAS ALL "Li",O', 'put the text in double quotes: "O"'),
        ("elements HAS ANY Li", 'put the text in double quotes: "Li"'),
        ("chemical_formula_reduced=Li2O", 'put the text in double quotes: "Li2O"'),
        ("elements HAS 'Li'", "texts stand in double quotes"),
        ('elements has "Li"', "write HAS in capitals"),
        ("nelements=2 and nsites=3", "write AND in capitals"),
        ("nelements == 2", "write = for equal"),
        ("nelements <> 2", "write = for equal"),
        ('elements HAS "Li, O"', 'several are HAS ALL "Li", "O"'),
        ('formula = "Li2O"', "did you mean chemical_formula_reduced or _gnome_reduced_formula?"),
        ('_gnome_formula = "Li2O"', "did you mean chemical_formula_reduced or _gnome_reduced_formula?"),
        ("spacegroup = 225", "did you mean _gnome_space_group_number?"),
        ("e_above_hull < 0.1", "did you mean _gnome_e_above_hull?"),
        ("_gnome_e_abov_hull < 0.1", "did you mean _gnome_e_above_hull?"),
        ("energy_above_hull < 0.1", "did you mean _gnome_e_above_hull?"),
        ("_gnome_methd IS KNOWN", "did you mean _gnome_method?"),
        ("nelement = 2", "did you mean nelements"),
        ('elements HAS ALL "Na" "Cl"', 'several values are separated by commas, as in elements HAS ALL "Na", "Cl"'),
        ('elements HAS ANY "Na", "Cl" "K"', "several values are separated by commas"),
        ('Elements HAS "Li"', "names of fields are in small letters: elements"),
        ('nelements = 2 AND Formula = "Li2O"', "names of fields are in small letters: chemical_formula_reduced"),
        ('elements HAS "li"', "'li' is no element symbol; did you mean \"Li\"?"),
        ('elements HAS ANY "Na", "CL"', 'did you mean "Cl"?'),
        ("flavour = 2", "known are id, elements"),
        ('_gnome_origin = "discoverd"', "did you mean 'discovered'? There are seed, discovered, imported"),
        ('_gnome_origin != "Seed"', "did you mean 'seed'?"),
        ('"import" = _gnome_origin', "did you mean 'imported'?"),
        ('_gnome_origin = "nowhere"', "the origin 'nowhere'; there are seed"),
        ('_gnome_chemical_system = "LiFeO"', "'LiFeO' in 'LiFeO' is no element symbol; a chemical system is spelled as in Li-O"),
    ],
)
def test_a_filter_that_is_nearly_right_is_told_what_would_be(text: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=r"^filter, position \d+: ") as raised:
        to_condition(text)
    assert hint in str(raised.value)


def test_filters_at_the_limits_run(store: Store) -> None:
    store.add_crystals([seed()])
    assert count(store, "(" * MAX_DEPTH + "nsites=2" + ")" * MAX_DEPTH) == 1
    assert count(store, "NOT (" * MAX_DEPTH + "nsites=2" + ")" * MAX_DEPTH) == (1 if MAX_DEPTH % 2 == 0 else 0)
    assert count(store, " OR ".join(["nsites=1"] * (MAX_COMPARISONS - 1) + ["nsites=2"])) == 1
    assert count(store, "elements HAS ANY " + ",".join(quoted(symbol) for symbol in SYMBOLS[1:])) == 1
    assert count(store, 'id != "' + "((((" * 2000 + '"') == 1
    assert count(store, "nsites < 99999999999999999999999999 AND nsites > -9223372036854775809") == 1


SAMPLES = [
    'elements HAS "O" AND _gnome_e_above_hull < 0.05',
    'elements HAS ALL "Li" , "O" AND NOT elements HAS ANY "F","Cl" OR nelements>=3',
    'chemical_formula_reduced="Li2O"AND(nsites<=8)',
    "_gnome_round IS UNKNOWN AND 0.05 > _gnome_e_above_hull AND nsites != -3.5e2",
    'id STARTS "a" OR id ENDS WITH "b\\"c\\\\" OR id CONTAINS ""',
    "elements LENGTH 3 AND elements LENGTH >=2",
    "",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_the_fast_parser_reads_what_the_reference_parser_reads(text: str) -> None:
    from gnome.database.filters import _parser

    assert _parser().parse(text) == LarkParser(version=(1, 2, 0)).parse(text)


def test_rows_are_sorted_cut_and_complete(store: Store) -> None:
    rows = fill(store, random.Random(5), 50)
    by_hull = [row["e_above_hull"] for row in query(store, sort="_gnome_e_above_hull")]
    known = [value for value in by_hull if value is not None]
    assert known == sorted(known)
    assert by_hull == known + [None] * (50 - len(known))
    falling = query(store, sort=["-e_form_per_atom", "id"])
    assert all(a["e_form_per_atom"] >= b["e_form_per_atom"] for a, b in pairwise(falling))
    ties = query(store, sort="-nelements")
    assert all((-a["n_elements"], a["id"]) < (-b["n_elements"], b["id"]) for a, b in pairwise(ties))
    assert query(store, sort="-nelements", limit=7, offset=5) == ties[5:12]
    assert query(store, limit=0) == []
    assert [row["id"] for row in query(store)] == sorted(row["id"] for row in rows)
    with_crystal = query(store, limit=1, with_crystals=True)[0]
    assert with_crystal["crystal"].id == with_crystal["id"]
    for sort, message in (
        ("nothing", "cannot sort by 'nothing'"),
        ("id; DROP", "cannot sort by"),
        ("elements", "cannot sort by 'elements'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            query(store, sort=sort)
    with pytest.raises(InvalidInput, match="limit is -1"):
        query(store, limit=-1)


def test_every_field_can_be_asked_for_and_sorted_by(store: Store) -> None:
    store.add_crystals([seed()])
    for name, field in FIELDS.items():
        assert count(store, f"{name} IS KNOWN") + count(store, f"{name} IS UNKNOWN") == 1
        if field.kind != "elements":
            assert len(query(store, sort=f"-{name}")) == 1
