"""A few cases of `make fuzz`, so that the script stays in step with the package."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_few_cases(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GQ_LIGHTNING_HOME", "")  # which the script sets
    assert fuzz.main(["--cases", "30", "--seed", "1", "--kind", kind]) == 0, capsys.readouterr().out
