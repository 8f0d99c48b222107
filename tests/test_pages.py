"""Pages of the documentation whose Python is to be pasted: it runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["pipelines.md", "semi_supervised.md"])
def test_python_blocks_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    program = "\n".join(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    )
    assert "export_pipeline(" in program
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_link_of_a_page_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", (DOCS / page).read_text())
    assert [link for link in links if not (DOCS / link.partition("#")[0]).exists()] == []
