"""What mutation testing changes: one thing at a time, and nothing that only people read."""

from __future__ import annotations

import ast
from pathlib import Path

from scripts.mutants import mutants, mutated

SOURCE = '''
"""Words."""
LIMIT: int = 3

class Bag:
    size: int = 0

    @property
    def full(self) -> bool:
        """More words."""
        return self.size >= LIMIT and not self.open

    def add(self, count: int = 1) -> None:
        if self.open:
            self.size += count
'''


def test_each_mutant_changes_one_thing(tmp_path: Path) -> None:
    path = tmp_path / "bag.py"
    path.write_text(SOURCE)
    found = mutants(path, "bag.py")
    assert [one.id.removeprefix("bag.py ") for one in found] == [
        "-: 3 -> 4",
        "Bag: 0 -> 1",
        "Bag.full: return self.size >= LIMIT and (not self.open) -> return None",
        "Bag.full: self.size >= LIMIT and (not self.open) -> self.size >= LIMIT or not self.open",
        "Bag.full: self.size >= LIMIT and (not self.open) -> not self.open",
        "Bag.full: self.size >= LIMIT and (not self.open) -> self.size >= LIMIT",
        "Bag.full: self.size >= LIMIT -> self.size > LIMIT",
        "Bag.full: not self.open -> self.open",
        "Bag.add: 1 -> 2",
        "Bag.add: self.open -> not self.open",
        "Bag.add: self.size += count -> self.size -= count",
        "Bag.add: self.size += count -> pass",
    ]
    assert [one.scope for one in found] == ["", "", *["Bag.full"] * 6, "", *["Bag.add"] * 3]
    texts = {ast.unparse(mutated(path, one.index)) for one in found}
    assert len(texts) == len(found)
    assert all('"""Words."""' in text and "-> bool" in text and "@property" in text for text in texts)


def test_a_mutant_keeps_its_name_when_other_functions_change(tmp_path: Path) -> None:
    path = tmp_path / "bag.py"
    path.write_text(SOURCE)
    before = {(one.id, one.digest) for one in mutants(path, "bag.py") if one.scope == "Bag.add"}
    path.write_text(SOURCE.replace("LIMIT: int = 3", "LIMIT: int = 5 * 6").replace("not self.open", "self.open"))
    assert before == {(one.id, one.digest) for one in mutants(path, "bag.py") if one.scope == "Bag.add"}
