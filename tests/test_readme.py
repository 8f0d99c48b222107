"""The README's Python runs as it stands there, and its commands and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


# Two minutes, of which all but the imports are one training of the default length.
@pytest.mark.parametrize("shortened", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_python_blocks_run_in_order(shortened: bool, tmp_path: Path) -> None:
    program = "\n".join(blocks("python"))
    pretraining = 'out="runs/my-digits")'
    assert program.count("pretrain(") == program.count(pretraining) == 1
    if shortened:
        program = program.replace(pretraining, 'out="runs/my-digits", train={"max_epochs": 1})')
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http|#)[^)]+)\)", README))))
def test_link_leads_to_a_file(link: str) -> None:
    assert (CHECKOUT / link.partition("#")[0]).exists()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_test_command_is_the_one_that_ci_runs() -> None:
    assert "make test" in README
    assert re.search(r"^make test$", (CHECKOUT / ".ci" / "run").read_text(), flags=re.MULTILINE)
