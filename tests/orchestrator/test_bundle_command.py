"""The bundle's commands, what they refuse, what they hide, and bundles of other programs' logs."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.bundle import archive
from orchestrator.bundle.__main__ import app
from orchestrator.bundle.archive import BundleError, unpack, write_archive
from orchestrator.bundle.redaction import HIDDEN, Redaction
from orchestrator.bundle.verify import verify
from orchestrator.findings import has_errors
from orchestrator.replay.record import experiment_result, replay, write
from tests.builders.bundles import edit_json, make_run
from tests.builders.commands import run_command
from tests.builders.logs import whole_run
from tests.builders.mllogs import submission
from tests.builders.mllogs import whole_run as whole_mllog


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("bundle")
    return make_run(folder / "run", folder / "data")


def call(*arguments: object) -> tuple[int, str]:
    """Exit code and output of a command of the bundle's."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


def test_a_run_is_bundled_verified_and_explained_by_commands(run: Path, tmp_path: Path) -> None:
    done = run_command(run, "--to", tmp_path / "b.zip", module="orchestrator.bundle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, text = call("verify", tmp_path / "b.zip")
    assert code == 0 and "verified. Checked: files, figures, settings, times, logs." in text
    assert done.stdout.split()[-1] in text  # the manifest's hash
    code, text = call("verify", tmp_path / "b.zip", "--json", "--manifest-sha256", "0" * 64)
    assert code == 1 and json.loads(text)["findings"][0]["code"] == "manifest_changed"
    code, text = call("rerun", tmp_path / "b.zip")
    assert code == 0
    for part in (f"git checkout {'0' * 40}", "experiment.yaml > run.yaml", "python -m orchestrator.run run.yaml"):
        assert part in text
    assert "accelerator: Test CPU then" in text


def test_what_a_stranger_wrote_is_no_command_and_no_traceback(run: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(run, tmp_path / "run")
    content = (hostile / "results.json").read_bytes()
    (hostile / "results.json").write_bytes(content.replace(b'"' + b"0" * 40, b'"x; touch /tmp/y; \\u001b[31m'))
    call("pack", hostile, "--to", tmp_path / "b.zip")
    code, text = call("rerun", tmp_path / "b.zip")
    assert code == 0 and "touch" not in text and "Which commit made it is not known" in text
    events = (hostile / "events.jsonl").read_bytes().replace(b'"generated":{', b'"generated":{"num_train":"x","y":{')
    (hostile / "events.jsonl").write_bytes(events.replace(b'"seed":0}},"model"', b'"seed":0}}},"model"', 1))
    assert call("pack", hostile, "--to", tmp_path / "c.zip")[0] == 0
    code, text = call("rerun", tmp_path / "c.zip")
    assert code == 2 and len(text.splitlines()) == 1 and "cannot be read of its events" in text
    code, text = call("verify", tmp_path / "c.zip")
    assert code == 1 and "\x1b" not in text and "not_checkable" in text


def test_two_runs_of_one_name_are_in_one_bundle(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copytree(run, tmp_path / "other" / "run")
    assert call("pack", run, tmp_path / "other" / "run", "--to", tmp_path / "b.zip")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    assert [path.name for path in verified.runs] == ["run", "run-run2"] and not has_errors(verified.findings)


def test_a_folder_that_cannot_become_a_bundle_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    running = shutil.copytree(run, tmp_path / "running")
    content = (running / "results.json").read_bytes()
    (running / "results.json").write_bytes(edit_json(content, lambda result: result.update(status="RUNNING")))
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "events.jsonl").write_text('{"kind": "run_started"\n')
    later = shutil.copytree(run, tmp_path / "later")
    (later / "results.json").write_bytes(edit_json(content, lambda result: result.update(schema_version=2)))
    for folder, reason in (
        (tmp_path / "nothing", "not a run's folder"), (tmp_path, "not a run's folder"),
        (running, "the run has not ended"), (broken, "holds no event that can be read"),
        (later, "not results that this version"),
    ):  # fmt: skip
        code, text = call("pack", folder, "--to", tmp_path / "b.zip")
        assert code == 2 and reason in text and len(text.splitlines()) == 1, text
    assert not (tmp_path / "b.zip").exists() and not list(tmp_path.glob(".b.zip*"))


def put(name: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Callable[[zipfile.ZipFile], None]:
    def add(file: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        file.writestr(info, content)

    return add


def bomb(file: zipfile.ZipFile) -> None:
    file.writestr("runs/x/bomb", bytes(50 * 2**20), zipfile.ZIP_DEFLATED)


def twice(file: zipfile.ZipFile) -> None:
    file.writestr("runs/x/results.json", "{}")
    file.writestr("runs/x/RESULTS.json", "{}")


@pytest.mark.parametrize(
    "hostile",
    [
        put("/etc/passwd"), put("../up"), put("runs/../../up"), put("runs//x"), put("runs\\x"), put("C:x"),
        put("runs/x/."), put("runs/x\x07"), put("runs/link", b"/etc/passwd", stat.S_IFLNK | 0o777), put("runs/x/", b""),
        put("/".join("abcdefghij")), put("a" * 300), twice, bomb, put("manifest.json", b"[" * 100_000),
        put("manifest.json", b'{"version": 9}'), put("runs/x/results.json"),
    ],
)  # fmt: skip
def test_a_strangers_zip_writes_nothing_outside_and_is_refused_in_one_line(
    hostile: Callable[[zipfile.ZipFile], None], tmp_path: Path
) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w") as file:
        hostile(file)
    (tmp_path / "to").mkdir()
    with pytest.raises(BundleError, match=r"^[^\n]*not a bundle[^\n]*$|^[^\n]*is none that this version reads[^\n]*$"):
        unpack(path, tmp_path / "to")
    assert {each.name for each in tmp_path.iterdir()} == {"b.zip", "to"}
    assert not [each for each in (tmp_path / "to").rglob("*") if each.is_symlink()]
    assert call("verify", path)[0] == 2


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_zip_is_no_bundle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.zip").write_bytes(content)
    for command in ("verify", "rerun"):
        code, text = call(command, tmp_path / "b.zip")
        assert code == 2 and "not a bundle" in text and len(text.splitlines()) == 1
    assert call("verify", tmp_path / "missing.zip")[0] == 2
    assert call("verify", tmp_path)[0] == 2


def test_a_damaged_bundle_is_refused(run: Path, tmp_path: Path) -> None:
    call("pack", run, "--to", tmp_path / "b.zip")
    content = (tmp_path / "b.zip").read_bytes()
    for number, damaged in enumerate((content[:-100], content[:200] + b"\0" * 50 + content[250:])):
        (tmp_path / f"{number}.zip").write_bytes(damaged)
        assert call("verify", tmp_path / f"{number}.zip")[0] == 2


def test_too_much_for_a_bundle_is_refused_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 10)
    with pytest.raises(BundleError, match="too much for one bundle"):
        write_archive(tmp_path / "b.zip", [("runs/a", b"x" * 6), ("runs/b", b"x" * 6)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH's ssh-keygen is not installed")
def test_a_signature_names_its_signer_and_does_not_fit_another_manifest(run: Path, tmp_path: Path) -> None:
    for name in ("key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    signers = {name: tmp_path / f"{name}.signers" for name in ("key", "other")}
    for name, path in signers.items():
        path.write_text(f"alice {(tmp_path / f'{name}.pub').read_text()}")
    assert call("pack", run, "--to", tmp_path / "b.zip", "--sign", tmp_path / "key")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "a", signers["key"])
    assert verified.findings == [] and verified.statements[-1].startswith("signature of alice (SHA256:")
    anybody = verify(tmp_path / "b.zip", tmp_path / "b")
    assert "signature of a key that no list names" in anybody.statements[-1]
    (finding,) = verify(tmp_path / "b.zip", tmp_path / "c", signers["other"]).findings
    assert finding.code == "signature_unknown"
    with zipfile.ZipFile(tmp_path / "b.zip") as source, zipfile.ZipFile(tmp_path / "d.zip", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content + b"\n" if name == "manifest.json" else content)
    (finding,) = verify(tmp_path / "d.zip", tmp_path / "d", signers["key"]).findings
    assert finding.code == "signature_wrong"
    call("pack", run, "--to", tmp_path / "e.zip")
    (finding,) = verify(tmp_path / "e.zip", tmp_path / "e", signers["key"]).findings
    assert finding.code == "not_signed"
    code, text = call("pack", run, "--to", tmp_path / "f.zip", "--sign", tmp_path / "key.pub.none")
    assert code == 2 and "cannot sign" in text and not (tmp_path / "f.zip").exists()


SECRETS = {
    "postgres://alice:pa55-w0rd@db.internal/mlflow": "postgres://db.internal/mlflow",
    "s3://bucket/x?access_key=AbCdEf123456&secret_key=zZ9": "s3://bucket/x",
    "Authorization: Bearer abcdef0123456789": f"Authorization: Bearer {HIDDEN}",
    "AKIAIOSFODNN7EXAMPLE": HIDDEN,
    "hf_abcdefghijklmnopqrstuv": HIDDEN,
    "ghp_abcdefghijklmnopqrstuvwxyz0123": HIDDEN,
    "password=hunter2hunter2": f"password={HIDDEN}",
    "the-value-of-a-variable": HIDDEN,
    "/home/alice/runs/x": "~/runs/x",
    "/scratch/home-of-bob/x and /root/x": "~/x and ~/x",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_hidden_in_text_and_in_json_which_stays_json(secret: str) -> None:
    redaction = Redaction({"MY_TOKEN": "the-value-of-a-variable", "HOME": "/scratch/home-of-bob", "PATH": "/usr/bin"})
    hidden = SECRETS[secret]
    assert redaction.apply(f"at {secret} now\n".encode()).decode() == f"at {hidden} now\n"
    document = {"uri": "sqlite://", secret: [secret, 1.25, "a@b.c"], "nested": json.dumps({"x": secret})}
    expected = {"uri": "sqlite://", hidden: [hidden, 1.25, "a@b.c"], "nested": json.dumps({"x": hidden})}
    for ascii_only in (True, False):
        text = redaction.apply(json.dumps(document, ensure_ascii=ascii_only).encode())
        assert json.loads(text) == expected


def test_planted_secrets_are_in_no_file_of_a_bundle_that_verifies(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "planted-7f3a-é")
    planted = shutil.copytree(run, tmp_path / "run")
    for path in planted.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt") and path.name != "mllog.txt":
            content = path.read_bytes().replace(b'"made"', b'"made planted-7f3a-\\u00e9 postgres://u:planted-url@h/x"')
            path.write_bytes(content.replace(b"trainers.rank INFO", "planted-7f3a-é INFO".encode(), 1))
    assert call("pack", planted, "--to", tmp_path / "b.zip")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    assert not has_errors(verified.findings), verified.findings
    contents = [path.read_bytes() for path in (tmp_path / "to").rglob("*") if path.is_file()]
    assert any(HIDDEN.encode() in content for content in contents)
    assert not [1 for content in contents if b"planted" in content or b"alice" in content]


def _logs_to_read_again(folder: Path) -> list[Path]:
    """The logs that `rerun` names, of the unpacked `b.zip`."""
    command = next(line for line in call("rerun", folder / "b.zip")[1].splitlines() if "orchestrator.replay" in line)
    with zipfile.ZipFile(folder / "b.zip") as archived:
        archived.extractall(folder / "unzipped")
    return [folder / "unzipped" / log for log in command.split("orchestrator.replay ")[1].split()]


def test_the_log_of_another_program_becomes_a_bundle_that_its_log_verifies(tmp_path: Path) -> None:
    replayed = replay([whole_run().write(tmp_path / "log.txt")])
    write(experiment_result("seen", replayed, []), replayed, tmp_path / "out")
    assert call("pack", tmp_path / "out", "--to", tmp_path / "b.zip")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    assert verified.findings == [] and verified.statements == ("files", "figures", "logs of another program")
    assert replay(_logs_to_read_again(tmp_path))[0].result.iterations == replayed[0].result.iterations
    path = tmp_path / "out" / "results.json"
    path.write_bytes(edit_json(path.read_bytes(), lambda r: r["trials"][0].update(time_to_train_seconds=60.0)))
    call("pack", tmp_path / "out", "--to", tmp_path / "c.zip")
    (finding,) = verify(tmp_path / "c.zip", tmp_path / "to2").findings
    assert "time_to_train_seconds: it is 60.0. The logs give 73" in finding.to_line()


def test_results_of_mlperf_become_a_bundle_with_their_score(tmp_path: Path) -> None:
    folder = submission(tmp_path / "made", *(whole_mllog(seed=seed, epoch_seconds=200.0 + seed) for seed in range(5)))
    replayed = replay([folder])
    write(experiment_result("mlperf", replayed, []), replayed, tmp_path / "out")
    assert call("pack", tmp_path / "out", "--to", tmp_path / "b.zip")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    assert verified.findings == []
    assert verified.statements == ("files", "figures", "score", "logs of another program")
    again = experiment_result("mlperf", replay(_logs_to_read_again(tmp_path)), [])
    assert again.benchmark == experiment_result("mlperf", replayed, []).benchmark
    path = tmp_path / "out" / "results.json"
    path.write_bytes(edit_json(path.read_bytes(), lambda result: result["benchmark"].update(score_minutes=1.0)))
    call("pack", tmp_path / "out", "--to", tmp_path / "c.zip")
    (finding,) = verify(tmp_path / "c.zip", tmp_path / "to2").findings
    assert "benchmark.score_minutes: it is 1.0. The logs give" in finding.to_line()


@pytest.mark.shared
def test_the_seeds_two_logs_form_a_bundle_that_verifies_to_its_table(shared_data: Path, tmp_path: Path) -> None:
    replayed = replay(sorted((shared_data / "seed_logs").glob("*.log")))
    write(experiment_result("seed", replayed, []), replayed, tmp_path / "seed")
    assert call("pack", tmp_path / "seed", "--to", tmp_path / "b.zip")[0] == 0
    verified = verify(tmp_path / "b.zip", tmp_path / "to")
    assert verified.findings == []
    table = (tmp_path / "seed" / "ai_rank.md").read_text()
    assert "| 1 | – | 9.66 |" in table and "| 8 | 22,922 | 55.27 | box ap: 37.83 mask ap: 34.48 | 5.72 |" in table
    result = json.loads((verified.runs[0] / "results.json").read_bytes())
    assert [round(trial["images_per_second"], 2) for trial in result["trials"]] == [9.66, 55.27]
    assert result["trials"][1]["time_to_box_target_seconds"] == 22898


@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        (
            "orchestrator.bundle",
            ["verify", "run.zip", "--manifest-sha256", "abc"],
            "not a SHA-256, which has 64 digits",
        ),
        ("orchestrator.bundle", ["run", "--to", "."], "it is a folder; name the file to write"),
        ("orchestrator.report", ["run.zip"], "bundles and files of references are shown by --to FOLDER"),
    ],
)
def test_an_argument_of_another_kind_is_refused_with_the_one_that_is_wanted(
    tmp_path: Path, module: str, arguments: list[str], text: str
) -> None:
    (tmp_path / "run.zip").touch()
    done = run_command(*arguments, cwd=tmp_path, module=module)
    assert done.returncode == 2 and text in done.stderr
