"""Whatever an evaluator answers, the database takes what is admitted of it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_stub.admission import admit
from dft_stub.evaluator import Evaluation, Failure
from flows.records import evaluation_record
from gnome.crystals.crystal import Crystal
from gnome.database.records import CandidateRecord
from gnome.database.store import Store
from gnome.stability.method import Method

METHOD = Method(code="here", functional="f")
ASKED = Crystal.from_symbols(2.9 * np.eye(3), ["Cu", "Zn"], [[0, 0, 0], [0.5, 0.5, 0.5]])
LOST = Crystal(2.9 * np.eye(3), np.array([29, 30]), np.array([[0, 0, 0], [0.5, np.inf, 0.5]]))

texts = st.text(st.characters(codec=None), max_size=8)  # halves of characters and nulls among them
numbers = st.one_of(
    st.floats(),
    st.integers(),
    st.floats(-8, 8),
    st.floats(width=32).map(np.float32),
    st.integers(-5, 2**40).map(np.int64),
    st.sampled_from([None, True, 10**400, 1e11, -1, 1j, np.array([1.0, 2.0]), np.array(1.0)]),
    texts,
)
lists = st.one_of(
    st.none(),
    st.lists(numbers, max_size=3),
    st.lists(st.lists(st.floats(), min_size=3, max_size=3), min_size=2, max_size=3),
    st.sampled_from([np.zeros((2, 3)), np.full((3, 3), np.nan), np.zeros(2), np.ones((2, 3)) * 1j, "forces", {"a": 1}]),
    st.lists(st.floats(-1, 1), min_size=2, max_size=2).map(np.array),
)
answers = st.builds(
    Evaluation,
    id=st.just("a"),
    method=st.one_of(
        st.just(METHOD),
        st.builds(Method, code=st.just("here"), functional=st.just("f"), versions=st.dictionaries(texts, texts, max_size=1)),
        st.sampled_from([Method(code="there", functional="f"), None]),
    ),
    converged=st.booleans(),
    failure=st.one_of(st.none(), st.sampled_from(Failure), texts),
    crystal=st.integers(0, 5).map([ASKED, ASKED.scaled(1.1), ASKED.scaled(60.0), LOST, None, ASKED.to_dict()].__getitem__),
    message=st.one_of(texts, st.none(), st.integers()),
    **dict.fromkeys(
        ("energy_per_atom", "correction_per_atom", "e_form_per_atom", "max_force", "n_steps", "cost_seconds"),
        st.one_of(st.floats(0, 4), numbers),
    ),
    **dict.fromkeys(("forces", "stress", "magnetic_moments"), st.one_of(st.none(), lists)),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('admission') / 'gnome.db'}") as store:
        store.start_round({}, 0)
        yield store


@settings(max_examples=25)
@given(given_answers=st.lists(answers, min_size=1, max_size=12))
def test_the_store_takes_what_is_admitted(store: Store, given_answers: list[Evaluation]) -> None:
    n_before = len(store.candidate_ids_of_round(1))
    names = [f"candidate {n_before + i}" for i in range(len(given_answers))]
    store.add_candidates(CandidateRecord(id=name, round=1, generator="g", crystal=ASKED) for name in names)
    admitted = [admit(replace(answer, id=name), ASKED, METHOD) for name, answer in zip(names, given_answers, strict=True)]
    records = {found.id: evaluation_record(found, 1) for found in admitted}
    assert store.add_evaluations(records.values()) == len(names)
    stored = {one.candidate_id: one for one in store.evaluations_of_round(1)}
    for name, found, answer in zip(names, admitted, given_answers, strict=True):
        assert _fields(stored[name]) == _fields(records[name]) == _fields(found), "nothing is lost on the way"
        if found.converged:
            assert (found.crystal, answer.failure) == (answer.crystal, None)


def _fields(record: Any) -> dict[str, Any]:
    names = (
        "converged",
        "failure",
        "message",
        "energy_per_atom",
        "correction_per_atom",
        "e_form_per_atom",
        "max_force",
        "n_steps",
    )
    return {name: getattr(record, name) for name in (*names, "cost_seconds", "forces", "stress", "magnetic_moments")}
