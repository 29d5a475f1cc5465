"""One line of what `verify` found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A comparison. `holds` None: not asked for."""

    name: str
    holds: bool | None
    what: str
