"""Every quantity once: its name, unit and meaning.

Tables, files, database columns and JSON keys are spelled with these names and no others.  A `Quantity` is a string, so it
serves directly as a key: `row[Quantity.E_FORM_PER_ATOM]`.
"""

from enum import StrEnum

STABLE_TOLERANCE = 1e-3
"""eV/atom: a crystal within this distance of the hull of its method is called stable."""

NEAR_HULL_TOLERANCE = 0.05
"""eV/atom: a crystal within this distance of the hull of its method is called near-hull (also GNoME's filter threshold)."""

COMPETING_WITHIN = 0.1
"""eV/atom: a compound within this distance of the hull counts as competing."""

PLAUSIBLE_E_FORM = (-6.0, 5.0)
"""eV/atom: formation energies outside are refused everywhere; no real or hypothetical solid has one."""


class Quantity(StrEnum):
    """A named quantity; `unit` is empty for counts, labels and ratios."""

    unit: str
    meaning: str

    def __new__(cls, name: str, unit: str, meaning: str) -> "Quantity":
        """Make a string member that carries its unit and meaning."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.unit = unit
        member.meaning = meaning
        return member

    ID = "id", "", "content hash that names a crystal or candidate for ever"
    REDUCED_FORMULA = "reduced_formula", "", "reduced chemical formula, pymatgen's spelling"
    CHEMICAL_SYSTEM = "chemical_system", "", "element symbols in alphabetical order, joined by '-'"
    PROTOSTRUCTURE = "protostructure", "", "AFLOW-style prototype label with its elements"
    SPACE_GROUP_NUMBER = "space_group_number", "", "international space group number, 1 to 230"
    N_ATOMS = "n_atoms", "", "atoms in the cell"
    N_ELEMENTS = "n_elements", "", "distinct elements"
    VOLUME_PER_ATOM = "volume_per_atom", "angstrom^3/atom", "cell volume divided by the number of atoms"
    ENERGY_PER_ATOM = "energy_per_atom", "eV/atom", "raw energy as the evaluator's method gives it"
    CORRECTION_PER_ATOM = "correction_per_atom", "eV/atom", "added to the raw energy before the formation energy is taken"
    E_FORM_PER_ATOM = "e_form_per_atom", "eV/atom", "formation energy from the elements, corrections included"
    E_ABOVE_HULL = "e_above_hull", "eV/atom", "distance above the convex hull of the same method, at least 0"
    DECOMPOSITION_ENERGY = (
        "decomposition_energy",
        "eV/atom",
        "formation energy minus that of the competing phases; negative when it lowers the hull",
    )
    DECOMPOSES_TO = "decomposes_to", "", "the competing phases and their atomic fractions"
    N_COMPETING = "n_competing", "", "compounds of the system and its subsystems within 0.1 eV/atom of the hull, itself left out"
    SUPPORTED = "supported", "", "whether any compound of the system or its subsystems competes, not the elements alone"
    FORMULA_CHECK = "formula_check", "", "probability that the formula is stable, from the compositional ensemble"
    SPREAD = "spread", "eV/atom", "inter-quartile range over the members of the ensemble"
    E_FORM_UNCERTAINTY = (
        "e_form_uncertainty",
        "eV/atom",
        "half of the interval around e_form_per_atom that holds 68 % of the truths, by errors on examples kept from training",
    )
    DECOMPOSITION_UNCERTAINTY = "decomposition_uncertainty", "eV/atom", "the same for decomposition_energy"
    P_STABLE = "p_stable", "", "probability that decomposition_energy is at most 0"
    NO_P_STABLE = "no_p_stable", "", "why there is no p_stable; empty where there is one"
    VOLUME_SCALE = "volume_scale", "", "factor on the volume at which the ensemble saw its lowest energy"
    METHOD = "method", "", "label of code, functional and settings behind an energy"
    ORIGIN = "origin", "", "seed | discovered | imported"
    ROUND = "round", "", "number of the round that produced the row"
    PARENT = "parent", "", "id of the crystal a candidate was made from"
    GENERATOR = "generator", "", "name of the generator that proposed the candidate"
    HIT_RATE = (
        "hit_rate",
        "",
        "distinct new compositions with a known competitor that lie on the hull of all known and found, over all evaluations",
    )
    NOTE = "note", "", "what to know before trusting the row; empty when there is nothing"
    REFUSED = "refused", "", "why an input was not answered; empty when it was"
