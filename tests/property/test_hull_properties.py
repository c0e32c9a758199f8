"""What every convex hull obeys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gnome.stability.hull import ConvexHull, HullEntry

ELEMENTS = [3, 8, 11, 17, 26]

compositions = st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 6), min_size=1, max_size=4)
energies = st.floats(-4, 2, allow_nan=False).map(lambda value: round(value, 3))


@st.composite
def entry_lists(draw: st.DrawFn, max_size: int = 15) -> list[HullEntry]:
    drawn = draw(st.lists(st.tuples(compositions, energies), max_size=max_size))
    return [
        HullEntry(id=str(i), composition=composition, e_form_per_atom=energy) for i, (composition, energy) in enumerate(drawn)
    ]


@settings(deadline=None, max_examples=150)
@given(entry_lists(), compositions, energies, st.lists(compositions, min_size=1, max_size=10))
def test_adding_an_entry_never_raises_the_hull(entries, composition, energy, asked) -> None:
    hull = ConvexHull("m", entries)
    before = hull.energies(asked)
    hull.add([HullEntry(id="new", composition=composition, e_form_per_atom=energy)])
    after = hull.energies(asked)
    assert (after <= before + 1e-10).all()
    assert np.allclose(after, ConvexHull("m", hull.entries).energies(asked), rtol=0, atol=1e-10)  # as if made anew
    if len(composition) > 1:
        assert hull.energy(composition) <= energy + 1e-10


@settings(deadline=None, max_examples=150)
@given(entry_lists(), compositions, compositions)
def test_the_hull_is_convex_and_never_above_the_elements(entries, first, second) -> None:
    hull = ConvexHull("m", entries)
    mixture = {z: first.get(z, 0) + second.get(z, 0) for z in {*first, *second}}
    n_first, n_second = sum(first.values()), sum(second.values())
    of_first, of_second, of_mixture = hull.energies([first, second, mixture])
    assert of_mixture <= (n_first * of_first + n_second * of_second) / (n_first + n_second) + 1e-9
    assert max(of_first, of_second, of_mixture) <= 0.0


@settings(deadline=None, max_examples=150)
@given(entry_lists())
def test_stable_entries_lie_on_the_hull_and_no_compound_below(entries) -> None:
    hull = ConvexHull("m", entries)
    assert all(hull.e_above_hull(entry.composition, entry.e_form_per_atom) == 0.0 for entry in hull.stable(0.0))
    for entry in entries:
        distance = entry.e_form_per_atom - hull.energy(entry.composition)
        if len(entry.composition) > 1:
            assert distance >= -1e-9
        signed = hull.decomposition_energy(entry.composition, entry.e_form_per_atom)
        assert signed <= distance + 1e-9
        if (
            signed < -1e-9 and len(entry.composition) > 1
        ):  # what lowers the hull of the others is on the hull, or a polymorph above
            lowest = min(other.e_form_per_atom for other in entries if _ratio(other.composition) == _ratio(entry.composition))
            assert hull.e_above_hull(entry.composition, lowest) == 0.0


@settings(deadline=None, max_examples=100)
@given(entry_lists(), compositions, st.integers(2, 9), energies)
def test_scaling_a_composition_changes_nothing(entries, composition, factor, energy) -> None:
    hull = ConvexHull("m", entries)
    scaled = {z: factor * amount for z, amount in composition.items()}
    assert hull.energy(scaled) == hull.energy(composition)
    assert hull.decomposition_energy(scaled, energy) == hull.decomposition_energy(composition, energy)
    assert hull.decomposition(scaled) == hull.decomposition(composition)


@settings(deadline=None, max_examples=100)
@given(entry_lists(), compositions, st.booleans())
def test_products_are_a_mixture_with_the_energy_of_the_hull(entries, composition, competing_only) -> None:
    hull = ConvexHull("m", entries)
    products = hull.decomposition(composition, competing_only=competing_only)
    by_id = {entry.id: entry for entry in entries}
    energy = sum(
        product.fraction * (by_id[product.id].e_form_per_atom if product.id and len(by_id[product.id].composition) > 1 else 0.0)
        for product in products
    )
    expected = -hull.decomposition_energy(composition, 0.0) if competing_only else hull.energy(composition)
    assert abs(energy - expected) < 1e-9
    assert abs(sum(product.fraction for product in products) - 1) < 1e-12


def _ratio(composition: dict[int, int]) -> dict[int, float]:
    total = sum(composition.values())
    return {z: amount / total for z, amount in composition.items()}
