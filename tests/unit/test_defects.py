"""Each defect that docs/sd_scripts_defects.md promises not to have is named by a test, and the other way round."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAMED = r"[Dd]efects? ((?:\d+(?: \([^)]*\))?(?:, | and )?)+)"


def test_every_defect_has_a_test_and_every_number_a_row() -> None:
    page = (ROOT / "docs" / "sd_scripts_defects.md").read_text(encoding="utf-8")
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    named: set[int] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__):
            for numbers in re.findall(_NAMED, path.read_text(encoding="utf-8")):
                named |= {int(number) for number in re.findall(r"\d+", re.sub(r"\(.*?\)", "", numbers))}
    assert set(range(1, 52)) <= listed  # the crashes and the wrong results
    assert named == listed
