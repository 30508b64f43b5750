"""./quickstart and ./test, run with a stand-in for Python that records what it is asked to do."""

from __future__ import annotations

import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
from processes import Ended, ended, killed_if_late, read_until

ROOT = pathlib.Path(__file__).parent.parent

FAKE_PYTHON = r"""#!/bin/bash
here=$(dirname "$(readlink -f "$0")")
case "$*" in
"- "*) exec "{real}" "$@" ;;
--version) echo "Python 3.11.0" ;;
"-m venv "*) echo venv >>"{log}"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip "*) echo "pip ${{*: -1}}" >>"{log}"; [[ ! -e "{log}.fail" ]] ;;
"-m pytest -m slow"*) echo "$*" >>"{log}"; exit "${{SLOW:-0}}" ;;
"-m pytest "*) echo "$*" >>"{log}"; exit "${{FAST:-0}}" ;;
*) [[ ! -e $1.real ]] || exec "{real}" "$1.real" "$@"; echo "$*" >>"{log}" ;;
esac
"""

# Says that it runs, then waits for signals; at the end tells how often it was signalled.
INTERRUPTIBLE = """
import select, signal, socket
signal.alarm(300)  # ends it where a test fails
reader, writer = socket.socketpair()
writer.setblocking(False)
signal.set_wakeup_fd(writer.fileno())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
print("training", flush=True)
caught = list(reader.recv(1))
while select.select([reader], [], [], 0.3)[0]:
    caught += reader.recv(1)
print("committed after", *(signal.Signals(number).name for number in caught), flush=True)
"""


class Checkout:
    """A copy of what the commands need, in a folder with a space in its name."""

    def __init__(self, tmp_path: pathlib.Path) -> None:
        self.root = tmp_path / "a checkout"
        self.log = tmp_path / "log"
        self.python = tmp_path / "python3.11"
        self.python.write_text(FAKE_PYTHON.format(real=sys.executable, log=self.log))
        self.python.chmod(0o755)
        (self.root / "tools").mkdir(parents=True)
        for name in (
            *("quickstart", "test", "tools/environment.sh"),
            *("pyproject.toml", "setup.py", "constraints.txt"),
        ):
            shutil.copy(ROOT / name, self.root / name)

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return self.start_by([], name, *arguments, **environment)

    def start_by(
        self, prefix: list[str], name: str, *arguments: str, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command, given to another program that runs it."""
        return subprocess.Popen(
            [*prefix, str(self.root / name), *arguments],
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(self.python), **environment},
            cwd=self.root.parent,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, name: str, *arguments: str, **environment: str) -> Ended:
        return ended(self.start(name, *arguments, **environment))

    def calls(self) -> list[str]:
        """Return what the stand-in was asked to do since the last time this was asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


QUICK = "-m pytest -m not slow and not thorough -n 2 --dist loadfile"
FAST = "-m pytest -m not slow -n 2 --dist loadfile"


def test_the_project_is_installed_once(checkout: Checkout) -> None:
    assert checkout.run("test").status == 0
    assert checkout.calls() == ["venv", "pip .[test]", QUICK]
    assert checkout.run("test").status == 0
    assert checkout.calls() == [QUICK]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(
    checkout: Checkout, name: str
) -> None:
    checkout.run("test")
    checkout.calls()
    with open(checkout.root / name, "a") as file:
        file.write("# changed\n")
    checkout.run("test")
    assert checkout.calls() == ["pip .[test]", QUICK]


def test_a_moved_project_is_installed_again(checkout: Checkout) -> None:
    checkout.run("test")
    checkout.calls()
    checkout.root = checkout.root.rename(checkout.root.parent / "elsewhere")
    checkout.run("test")
    assert checkout.calls() == ["pip .[test]", QUICK]


def test_extras_add_up(checkout: Checkout) -> None:
    for extras in ("test", "test,parity", "test"):
        checkout.run("test", EXTRAS=extras)
    assert checkout.calls() == ["venv", "pip .[test]", QUICK, "pip .[test,parity]", QUICK, QUICK]


def test_an_unfinished_installation_is_begun_anew(checkout: Checkout) -> None:
    failing = pathlib.Path(f"{checkout.log}.fail")
    failing.touch()
    done = checkout.run("test")
    assert done.status == 1 and "tries again" in done.told
    assert checkout.calls() == ["venv", "pip .[test]"]
    failing.unlink()
    assert checkout.run("test").status == 0
    assert checkout.calls() == ["venv", "pip .[test]", QUICK]


def test_a_folder_that_is_someone_elses_is_left_alone(checkout: Checkout) -> None:
    (checkout.root / "mine").mkdir()
    done = checkout.run("test", VENV="mine")
    assert done.status == 1 and "VENV=another-folder" in done.told
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [("echo is Python 3.9", "python3.9 is Python 3.9"), ("exit 1", "python3.9 does not start")],
)
def test_an_unusable_python_is_named_with_the_reason(
    checkout: Checkout, program: str, reason: str
) -> None:
    old = checkout.python.with_name("python3.9")
    old.write_text(f"#!/bin/sh\n{program}\n")
    old.chmod(0o755)
    done = checkout.run("test", PYTHON=str(old))
    assert done.status == 1
    assert reason in done.told and "Needed: Python 3.11 to 3.13" in done.told


def test_a_missing_python_is_reported(checkout: Checkout) -> None:
    done = checkout.run("test", PYTHON="no-such-python")
    assert done.status == 1 and "nothing named no-such-python" in done.told


def test_without_arguments_thorough_tests_are_left_out_and_with_any_they_are_not(
    checkout: Checkout,
) -> None:
    checkout.run("test")
    checkout.run("test", "--all")
    assert checkout.calls()[2:] == [QUICK, FAST, "-m pytest -m slow"]


def test_arguments_go_to_pytest(checkout: Checkout) -> None:
    checkout.run("test", "-k", "a b", "-x")
    checkout.run("test", "--all", "-x")
    assert checkout.calls()[2:] == [f"{FAST} -k a b -x", f"{FAST} -x", "-m pytest -m slow -x"]


@pytest.mark.parametrize(
    ("fast", "slow", "status"),
    [(0, 5, 0), (5, 0, 0), (5, 5, 5), (1, 0, 1), (1, 5, 1), (0, 1, 1), (5, 1, 1), (2, 1, 2)],
)
def test_tests_of_which_one_half_selects_none_pass_if_the_other_half_does(
    fast: int, slow: int, status: int, checkout: Checkout
) -> None:
    said = {"FAST": str(fast), "SLOW": str(slow)}
    assert checkout.run("test", "--all", "-k", "something", **said).status == status
    assert checkout.run("test", "-k", "something", **said).status == fast


STEPS = [
    "examples/quickstart_data.py data/quickstart",
    *(
        f"create_finetune_tfrecords.py data/quickstart/{side}.jsonl quickstart.{side}"
        " --tokenizer bytes --seq 256 --output-dir data"
        for side in ("val", "train")
    ),
    "train.py --hosts 2 --config configs/quickstart.json",
    "-m mesh_transformer.plot runs/quickstart --output runs/quickstart/loss.png",
]


def test_quickstart_goes_through_its_steps(checkout: Checkout) -> None:
    done = checkout.run("quickstart")
    assert done.status == 0, done.told
    calls = checkout.calls()
    assert calls[:2] == ["venv", "pip .[pods]"]
    assert calls[2:-1] == STEPS
    sampling = "device_sample.py --config configs/quickstart.json --prompt def __init__(self, "
    assert calls[-1].startswith(sampling)
    assert "runs/quickstart/loss.png" in done.output


def test_quickstart_prepares_data_once_and_starts_over_when_asked(checkout: Checkout) -> None:
    (checkout.root / "data").mkdir()
    for side in ("train", "val"):
        (checkout.root / f"data/quickstart.{side}.index").write_text("records\n")
    assert checkout.run("quickstart", "--new").status == 0
    assert checkout.calls()[2:4] == [STEPS[3] + " --new", STEPS[4]]


def test_quickstart_trains_in_one_process_without_ray_when_asked(checkout: Checkout) -> None:
    assert checkout.run("quickstart", "--one-process", "--new").status == 0
    calls = checkout.calls()
    assert calls[1] == "pip ."
    assert calls[-3] == "device_train.py --config configs/quickstart.json --new"


def test_quickstart_stops_at_a_step_that_fails(checkout: Checkout) -> None:
    (checkout.root / "train.py.real").write_text("raise SystemExit(7)")
    done = checkout.run("quickstart")
    assert done.status == 7 and "exit status 7" in done.told
    assert checkout.calls()[-1] == STEPS[2]


def test_quickstart_refuses_unknown_arguments(checkout: Checkout) -> None:
    done = checkout.run("quickstart", "--knew")
    assert done.status == 2 and "./quickstart --new" in done.output
    assert checkout.calls() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_training_once_and_quickstart_says_how_to_go_on(
    checkout: Checkout, number: signal.Signals, status: int
) -> None:
    (checkout.root / "train.py.real").write_text(INTERRUPTIBLE)
    with checkout.start("quickstart") as running:
        read_until("training", running)
        running.send_signal(number)
        done = ended(running)
    assert "committed after SIGTERM\n" in done.output
    assert "./quickstart goes on from there" in done.output
    assert done.status == status


# Read by bash before a script: sends SIGINT as the script comes to a command of the training step.
SIGNALLED_AT = """
set -T
trap '
    if [[ $* == *train.py* && $BASH_COMMAND == {command}* ]]; then
        trap - DEBUG
        kill -INT $$
    fi
' DEBUG
"""


@pytest.mark.parametrize("command", ["local", "shift", "set\\ -m", "early=", "set\\ +m"])
def test_a_signal_as_a_step_begins_leaves_nothing_running(
    checkout: Checkout, command: str, tmp_path: pathlib.Path
) -> None:
    """Training would end when its input does, here after ./quickstart has ended."""
    (checkout.root / "train.py.real").write_text("input()\nprint('left running')")
    hook = tmp_path / "hook"
    hook.write_text(SIGNALLED_AT.format(command=command))
    with checkout.start("quickstart", BASH_ENV=str(hook)) as running:
        with killed_if_late(running):
            running.wait()
        done = ended(running, "\n")
    assert done.status == 130
    assert "left running" not in done.output and "./quickstart goes on from there" in done.output


def test_ctrl_c_at_a_terminal_reaches_training_once(checkout: Checkout) -> None:
    (checkout.root / "train.py.real").write_text(INTERRUPTIBLE)
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    with checkout.start_by([sys.executable, "-c", terminal], "quickstart") as running:
        read_until("training", running)
        done = ended(running, "\x03")
    assert "committed after SIGTERM\n" in done.output
    assert done.status == 130
