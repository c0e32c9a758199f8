"""Words for people that several commands need."""


def plural(n: int, noun: str) -> str:
    """Spell a number of things: `1 hit`, `2 hits`, `0 analyses` for the noun `analysis`."""
    if n == 1:
        return f"{n} {noun}"
    return f"{n} {noun[:-2]}es" if noun.endswith("sis") else f"{n} {noun}s"
