"""What the command prints where."""

import pytest
from typer.testing import CliRunner

from orchestrator.run import DONE, Request, app


def test_what_ray_prints_to_stdout_does_not_spoil_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(request: Request) -> int:
        print("(raylet) A worker died or was killed")
        request.print_json('{"ok": true}')
        return DONE

    monkeypatch.setattr("orchestrator.run._check", check)
    done = CliRunner().invoke(app, ["--preflight", "--json"])
    assert (done.exit_code, done.stdout) == (DONE, '{"ok": true}\n')
    assert "(raylet)" in done.stderr
