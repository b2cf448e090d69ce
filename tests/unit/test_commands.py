"""What is typed: answered before anything heavy is imported, in today's spelling and in those before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diki_ray.commands.app import run
from diki_ray.commands.old_spellings import rewritten
from diki_ray.commands.places import config_file, configured, one_run, rehearsed, server_limits, storage_of
from diki_ray.config.protocols import protocols

HEAVY = ("torch", "ray", "open_clip", "matplotlib", "plotly", "sklearn")
QUICK = (
    ([], "Usage: "),
    (["--help"], "continual"),
    (["store", "rollback", "--help"], "SEQ"),
    (["evaluate"], "give --run"),
    (["evaluate", "--run", "r", "--routing", "some"], "--routing is image or batch"),
    (["predict", "a.png", "--run", "r", "--template", "a {}"], "--template is for --classes"),
    (["serve", "--run", "r", "--no-such", "3"], "there is no option --no-such"),
    (["serve", "--run", "r", "--max-images", "x"], "--max-images needs a number"),
    (["serve-front", "--max-images", "3"], "there is no option --max-images"),
    (["serve-front", "--help"], "--upstream"),
    (["init"], "Missing argument"),
    (["init", "no_such_folder"], "there is no folder no_such_folder"),
    (["init", "/tmp", "--output", "/dev/null"], "/dev/null is there already"),
    (["init", "folder", "--pretrained", "openai"], "--pretrained goes with --backbone"),
    (["doctor", "--config", "none.yaml"], "none.yaml"),
    (["doctor", "--help"], "Exit code 1"),
    (["continual", "--config", "quickstart", "--json"], "--json goes with --plan"),
    (["prepare"], "give either SOURCEs or --protocol"),
    (["continual", "--config", "none.yaml"], "none.yaml"),
    (["continual", "--config", "quickstart", "train.epoch=3"], "train.epoch: there is no such field"),
    (["sweep", "--config", "none.yaml"], "none.yaml"),
    (["rehearse", "mtil-9/coop"], "there is no protocol 'mtil-9'"),
    (["rehearse", "mtil-1/zhou"], "write NAME/coop or NAME/zscl"),
    (["rehearse", "mtil-1", "run.seed=x"], "run.seed"),
)


def test_help_and_every_mistake_are_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, runpy\n"
        "from diki_ray.commands.app import run\n"
        f"for arguments, said in {QUICK!r}:\n"
        "    print(run(None, arguments), flush=True)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    for arguments, said in QUICK:
        assert said in done.stdout + done.stderr, arguments


def test_what_is_wrong_has_exit_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIKI_RUN", raising=False)
    assert {run(None, arguments) for arguments, _ in QUICK[3:] if "--help" not in arguments} == {2}
    assert run(None, ["--help"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "now"),
    [
        ("evaluate s r --order a,b", "evaluate --storage=s --run=r --order a,b"),
        ("evaluate s r --classes --json", "evaluate --storage=s --run=r --classes --json"),
        ("evaluate --run r --compare a b --json", "evaluate --run r --compare a --compare b --json"),
        ("export s r folder", "export --storage=s --run=r folder"),
        ("import task_3.pt s r --classes c.json", "import --storage=s --run=r task_3.pt --classes c.json"),
        ("import t.pt s r --config c a.b=1", "import --storage=s --run=r t.pt --config c a.b=1"),
        ("store list s", "store list --storage=s"),
        ("store list s r --history", "store list --storage=s --run=r --history"),
        ("store rollback s r 3", "store rollback --storage=s --run=r 3"),
        ("store fill s r --backbone b.py", "store fill --storage=s --run=r --backbone b.py"),
        ("prepare x --class-names a b --name n", "prepare x --class-names a --class-names b --name n"),
        ("report r other", "report r other"),
        ("export folder --storage s --run r", "export folder --storage s --run r"),
    ],
)
def test_old_spellings_are_todays(typed: str, now: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rewritten(typed.split()) == now.split()
    assert ("now written as options" in capsys.readouterr().err) == ("--storage=" in now)


def test_a_command_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIKI_STORAGE", raising=False)
    assert storage_of(None) == "storage"
    (tmp_path / "runs" / "runs").mkdir(parents=True)
    assert storage_of(None) == "runs"  # what was the default before is found where it lies
    monkeypatch.setenv("DIKI_STORAGE", "s3://b/p")
    monkeypatch.setenv("DIKI_RUN", "r")
    assert one_run(None, None, None) == ("s3://b/p", "r", None)
    assert one_run("here", "mine", None) == ("here", "mine", None)
    (tmp_path / "c.yaml").write_text("run: {name: c, storage: elsewhere}\ntasks: [{data: x}]\n")
    assert one_run(None, None, "c.yaml")[:2] == ("elsewhere", "c")
    assert configured("c.yaml", (), "here", "d").run.model_dump() | {} == {
        **configured("c.yaml", ["run.storage=here", "run.name=d"], None, None).run.model_dump()
    }


def test_our_configurations_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert yaml.safe_load(Path(config_file("quickstart")).read_text())["run"]["name"] == "quickstart"
    assert config_file("no_such") == "no_such"
    (tmp_path / "quickstart").write_text("")
    assert config_file("quickstart") == "quickstart"  # a file of one's own comes first


@pytest.mark.parametrize("name", list(protocols()))
def test_every_benchmark_has_a_configuration_that_can_be_rehearsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIKI_STORAGE", raising=False)
    real = configured(name.replace("-", "_"), (), None, None)
    small = rehearsed(name, ["run.storage=s3://bucket/team"])
    assert small.protocol == real.protocol
    assert small.run.name == small.protocol.replace("/", "-")
    assert (small.run.storage, small.data.root) == ("s3://bucket/team/rehearsal", "s3://bucket/team/rehearsal/prepared")
    assert (small.backbone.name, small.backbone.pretrained) == ("embedded", None)
    assert small.evaluate.model_copy(update={"text_grid": 33}) == real.evaluate
    assert small.train.model_copy(update={"epochs": 10}) == real.train
    assert rehearsed(name, ["train.epochs=2", "data.root=/elsewhere"]).data.root == "/elsewhere"
    # Real data is never written over.
    assert rehearsed(f"{name}/zscl", ["data.sources=/data/mtil"]).data.sources == "rehearsal/zscl"


def test_a_servers_limits_are_read_with_their_types() -> None:
    limits = server_limits(["--max-images", "8", "--refresh-s=0.5"], of_front=False)
    assert limits == {"max_images": 8, "refresh_s": 0.5}
