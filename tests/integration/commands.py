"""Running commands, and what tests ask of every one: the exit status, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from posthoc_ema.cli import main

DONE, DATA_SAYS_NO, MISUSE = 0, 1, 2


def invoke(*args: Any, status: int = DONE) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="posthoc-ema")
    said = f"exit status {result.exit_code}\n{result.stdout}\n{result.stderr}"
    assert result.exit_code == status, said
    assert "Traceback" not in result.stderr, said
    return result


def invoke_json(*args: Any, status: int = DONE) -> Any:
    """What a command says with --json: standard output must be one strict JSON document."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(invoke(*args, "--json", status=status).stdout, parse_constant=refuse)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))
