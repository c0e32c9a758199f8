"""Numbers of things, in words."""

_MANY = {"entry": "entries"}


def counted(n: int, name: str) -> str:
    """Spell a number of things: 1 crystal, 2 crystals."""
    return f"{n} {name if n == 1 else _MANY.get(name, name + 's')}"
