"""Does docs/reliability.md name a test for each fault, and does each of them exist?"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_table_of_faults_names_exists():
    table = (ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", table))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
    rows = [line for line in table.split("\n**A checkpoint**")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20 and all("::test_" in row for row in rows)
