"""Children that hang, hoard, babble or leave their group: each is ended whole, and none waits for ever."""

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gnome.processes import (
    PASSIVE_THREADS,
    THREAD_VARIABLES,
    LineWorker,
    ProcessLost,
    ProcessTimeout,
    child_environment,
    end,
    processor_seconds,
    python_command,
    resident_bytes,
    run_bounded,
    start,
)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0
"""Seconds after which something that is waited for will not come, however busy the machine is."""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


def sleeping(seconds: str) -> list[int]:
    """Processes that sleep for exactly so long, whoever started them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if command[-2:] == ["sleep", seconds] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(command: list[str], given: bytes = b"", *, seconds: float = PATIENCE, max_output: int = 2**24) -> bytes:
    return run_bounded(command, given, seconds=seconds, memory_bytes=None, max_output=max_output)


class TestRunBounded:
    def test_a_time_limit_ends_the_whole_tree(self) -> None:
        """A grandchild in a session of its own, as the ranks of an MPI program have, included."""
        own = f"4801.{os.getpid()}"
        command = ["sh", "-c", f"setsid sleep {own} & setsid sh -c 'sleep {own}; true' & sleep {own}; true"]
        process = start(command)
        wait_for(lambda: len(sleeping(own)) == 3, "three children")
        assert len({os.getsid(pid) for pid in sleeping(own)}) == 3, "each in a session of its own"
        end(process)
        wait_for(lambda: not sleeping(own), "their end")
        with pytest.raises(ProcessTimeout, match=r"gave no answer within 1\.5 s"):
            run(command, seconds=1.5)
        wait_for(lambda: not sleeping(own), "their end after a time limit")

    def test_children_of_a_program_that_has_ended_end_too(self) -> None:
        own = f"4802.{os.getpid()}"
        assert run(["sh", "-c", f"sleep {own} > /dev/null & echo done"]) == b"done\n"
        wait_for(lambda: not sleeping(own), "the end of what it left behind")

    @pytest.mark.parametrize(
        ("left", "n"),
        [
            ("setsid sleep {own} > /dev/null &", 1),
            ("(setsid sh -c '(setsid sleep {own} &) ; sleep {own}; true' > /dev/null &)", 2),
        ],
        ids=["another session", "forked twice"],
    )
    @pytest.mark.parametrize(
        ("last", "words"), [("echo done", ""), ("kill -KILL $$", "exit code -9"), ("kill -SEGV $$", "exit code -11")]
    )
    def test_what_a_program_leaves_behind_ends_however_that_ended(self, left: str, n: int, last: str, words: str) -> None:
        own = f"4811.{os.getpid()}"
        wait = f"while [ $(pgrep -cxf 'sleep {own}') -lt {n} ]; do sleep 0.05; done"
        command = ["sh", "-c", f"{left.format(own=own)}\n{wait}; {last}"]
        if words:
            with pytest.raises(ProcessLost, match=words):
                run(command)
        else:
            assert run(command) == b"done\n"
        assert not sleeping(own)

    def test_there_is_one_limit_on_the_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float | None] = []
        wait = subprocess.Popen.wait

        def noting(process: "subprocess.Popen[bytes]", timeout: float | None = None) -> int:
            waited.append(timeout)
            return wait(process, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", noting)
        with pytest.raises(ProcessTimeout):
            run(["sh", "-c", "sleep 2; exec 1>&-; sleep 60; true"], seconds=3.0)
        assert waited[0] is not None
        assert waited[0] <= 1.0, "what is left when the output has been read"

    def test_a_busy_program_has_no_more_time_than_others(self) -> None:
        with pytest.raises(ProcessTimeout):
            run(python("import os\nwhile True: os.write(1, b'x' * 512)"), seconds=0.5, max_output=2**40)

    def test_memory_is_limited(self) -> None:
        hoard = python("x = bytearray(2**30); print(len(x))")
        assert run_bounded(hoard, b"", seconds=PATIENCE, memory_bytes=2**32, max_output=100) == b"1073741824\n"
        with pytest.raises(ProcessLost, match="ended with exit code 1"):
            run_bounded(hoard, b"", seconds=PATIENCE, memory_bytes=2**29, max_output=100)

    def test_output_is_limited(self) -> None:
        own = f"4803.{os.getpid()}"
        with pytest.raises(ProcessLost, match="wrote more than 100000 bytes"):
            run(["sh", "-c", f"setsid sleep {own} & exec yes"], max_output=100_000)
        wait_for(lambda: not sleeping(own), "the end of its child")

    def test_input_and_output_larger_than_the_pipes_wait_for_nobody(self) -> None:
        given = bytes(range(256)) * 2**15  # 8 MiB
        assert run(["cat"], given) == given

    def test_a_program_need_not_read_its_input(self) -> None:
        assert run(python("print('enough')"), b"x" * 2**22) == b"enough\n"

    def test_a_program_that_closes_its_output_and_lives_on_is_ended(self) -> None:
        own = f"4804.{os.getpid()}"
        with pytest.raises(ProcessTimeout):
            run(["sh", "-c", f"exec 1>&-; sleep {own}; true"], seconds=1.0)
        wait_for(lambda: not sleeping(own), "its end")

    @pytest.mark.parametrize(("code", "words"), [("exit 3", "exit code 3"), ("kill -SEGV $$", "exit code -11")])
    def test_exit_codes_are_said(self, code: str, words: str) -> None:
        with pytest.raises(ProcessLost, match=words):
            run(["sh", "-c", code])

    def test_the_environment_is_ours_or_the_one_given(self) -> None:
        shown = run(["env"]).decode().splitlines()
        assert "PYTHONSAFEPATH=1" in shown
        assert "OMP_WAIT_POLICY=PASSIVE" in shown
        given = run_bounded(["/usr/bin/env"], b"", seconds=PATIENCE, memory_bytes=None, max_output=1000, environment={"A": "b"})
        assert given == b"A=b\n"


class TestLineWorker:
    ECHO = """
        import json, os, sys
        for line in sys.stdin:
            question = json.loads(line)
            if "exit" in question:
                sys.exit(question["exit"])
            if "say" in question:
                print(question["say"], flush=True)
            elif "hang" in question:
                os.spawnvp(os.P_WAIT, "setsid", ["setsid", "-w", "sleep", question["hang"]])
            else:
                print(json.dumps({"pid": os.getpid(), **question}), flush=True)
    """

    def test_many_questions_are_answered_by_one_program(self) -> None:
        worker = LineWorker(python(self.ECHO), memory_bytes=None)
        try:
            answers = [worker.ask({"n": n}, seconds=PATIENCE) for n in range(5)]
        finally:
            worker.close()
        assert [answer["n"] for answer in answers] == list(range(5))
        (pid,) = {answer["pid"] for answer in answers}
        assert not psutil.pid_exists(pid)

    @pytest.mark.parametrize(
        ("question", "words"),
        [
            ({"exit": 3}, "ended with exit code 3"),
            ({"say": "no JSON"}, "answered with something that is no JSON"),
            ({"say": "[1]"}, "answered with something that is no JSON object"),
        ],
        ids=["ends", "no JSON", "no object"],
    )
    def test_a_loss_costs_its_own_question(self, question: dict[str, object], words: str) -> None:
        worker = LineWorker(python(self.ECHO), memory_bytes=None)
        try:
            before = worker.ask({}, seconds=PATIENCE)["pid"]
            with pytest.raises(ProcessLost, match=words):
                worker.ask(question, seconds=PATIENCE)
            assert not psutil.pid_exists(before)
            after = worker.ask({"n": 1}, seconds=PATIENCE)
        finally:
            worker.close()
        assert after["n"] == 1
        assert after["pid"] != before

    def test_what_gives_no_answer_in_time_is_ended_with_its_children(self) -> None:
        own = f"4805.{os.getpid()}"
        worker = LineWorker(python(self.ECHO), memory_bytes=None)
        try:
            worker.ask({}, seconds=PATIENCE)
            with pytest.raises(ProcessTimeout, match="gave no answer within 1 s"):
                worker.ask({"hang": own}, seconds=1.0)
            wait_for(lambda: not sleeping(own), "the end of its child")
            assert worker.ask({"n": 1}, seconds=PATIENCE)["n"] == 1
        finally:
            worker.close()

    def test_what_babbles_without_an_end_of_line_has_its_time_and_its_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        babble = python("import os\nwhile True: os.write(1, b'x' * 8192)")
        worker = LineWorker(babble, memory_bytes=None)
        with monkeypatch.context() as patch:
            patch.setattr("gnome.processes.MAX_LINE", 2**50)
            with pytest.raises(ProcessTimeout, match=r"gave no answer within 0\.5 s"):
                worker.ask({}, seconds=0.5)
        with pytest.raises(ProcessLost, match="wrote more than 67108864 bytes"):
            worker.ask({}, seconds=PATIENCE)
        assert worker._process is None

    def test_a_question_that_is_not_read_has_its_time(self) -> None:
        worker = LineWorker(["sleep", "4812"], memory_bytes=None)
        with pytest.raises(ProcessTimeout, match="gave no answer within 1 s"):
            worker.ask({"text": "x" * 2**20}, seconds=1.0)

    def test_a_long_question_and_a_long_answer_wait_for_nobody(self) -> None:
        worker = LineWorker(python(self.ECHO), memory_bytes=None)
        try:
            assert worker.ask({"text": "x" * 2**22}, seconds=PATIENCE)["text"] == "x" * 2**22
        finally:
            worker.close()

    def test_what_closes_its_output_and_lives_on_is_ended(self) -> None:
        own = f"4813.{os.getpid()}"
        worker = LineWorker(["sh", "-c", f"exec 1>&-; sleep {own}; true"], memory_bytes=None)
        with pytest.raises(ProcessTimeout, match="closed its output and did not end"):
            worker.ask({}, seconds=1.0)
        wait_for(lambda: not sleeping(own), "its end")

    def test_an_answer_nested_without_end_is_no_json(self) -> None:
        worker = LineWorker(python("print('[' * 10**6, flush=True); input(); input()"), memory_bytes=None)
        with pytest.raises(ProcessLost, match="no JSON"):
            worker.ask({}, seconds=PATIENCE)

    def test_another_thread_can_end_it(self) -> None:
        worker = LineWorker(["sleep", "4814"], memory_bytes=None)
        timer = threading.Timer(0.5, worker.kill)
        timer.start()
        with pytest.raises(ProcessLost, match="ended with exit code -9"):
            worker.ask({}, seconds=PATIENCE)
        timer.join()

    def test_an_answer_that_was_not_waited_for_meets_no_later_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        worker = LineWorker(python(self.ECHO), memory_bytes=None)

        def interrupted(*_: object, **__: object) -> bytes:
            raise KeyboardInterrupt

        try:
            worker.ask({"n": 0}, seconds=PATIENCE)
            with monkeypatch.context() as patch:
                patch.setattr("gnome.processes._exchange", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    worker.ask({"n": 1}, seconds=PATIENCE)
            assert worker.ask({"n": 2}, seconds=PATIENCE)["n"] == 2
        finally:
            worker.close()


@pytest.fixture
def among_decoys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds folders named as our packages are, and one of its own."""
    for name in ("gnome", "pipelines", "flows", "dft_stub", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"DECOY = {name!r}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHOW = (
    "import gnome, pipelines, flows, dft_stub, sys; print(*(m.__file__ for m in (gnome, pipelines, flows, dft_stub)), sep='\\n')"
)


class TestChildEnvironment:
    @pytest.mark.usefixtures("among_decoys")
    @pytest.mark.parametrize("searched", [False, True], ids=["not searched", "searched first"])
    def test_our_packages_win_over_folders_where_the_user_stands(
        self, searched: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if searched:  # as `python -c` and an interactive session do
            monkeypatch.setattr(sys, "path", ["", *sys.path])
        shown = run([sys.executable, "-c", SHOW])
        expected = [str(ROOT / name / "__init__.py") for name in ("gnome", "pipelines", "flows", "dft_stub")]
        assert shown.decode().splitlines() == expected
        if searched:  # the user's own modules are found all the same: an evaluator may be one
            assert run([sys.executable, "-c", "import mine; print(mine.__file__)"]).decode().strip().startswith(str(tmp_path))

    @pytest.mark.usefixtures("among_decoys")
    def test_a_module_of_ours_is_run(self) -> None:
        """Without `-P` the decoy has no such module."""
        command = python_command("flows", "--version")
        assert command[:3] == [sys.executable, "-P", "-m"]
        assert run(command)

    def test_it_says_how_many_threads_there_are_and_how_they_wait(self) -> None:
        environment = child_environment({"MINE": "x"}, threads=3)
        assert environment["PYTHONSAFEPATH"] == "1"
        assert {environment[name] for name in THREAD_VARIABLES} == {"3"}
        assert {child_environment()[name] for name in THREAD_VARIABLES} == {"1"}
        assert PASSIVE_THREADS.items() <= environment.items()
        assert environment["MINE"] == "x"
        assert child_environment({"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
        assert environment["PATH"] == os.environ["PATH"]


BURN = "import time\nwhile time.process_time() < 0.6: pass"


class TestProcessorTime:
    def test_children_that_have_ended_count(self) -> None:
        own = f"4806.{os.getpid()}"
        process = start(["sh", "-c", f'{sys.executable} -c "{BURN}"; sleep {own}; true'])
        try:
            wait_for(lambda: bool(sleeping(own)), "the end of the child that works")
            assert 0.55 < processor_seconds(process.pid) < 30
        finally:
            end(process)
        assert processor_seconds(process.pid) == 0.0, "of what is gone nothing is known"

    def test_grandchildren_that_still_work_count(self) -> None:
        process = start(["sh", "-c", f'setsid sh -c "{sys.executable} -c \\"while True: pass\\"; true"; true'])
        try:
            wait_for(lambda: processor_seconds(process.pid) > 0.5, "half a second of work")
            assert resident_bytes(process.pid) > 2 * 2**20
        finally:
            end(process)


PARENT = """
    import signal, sys
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it, and so would this
    from gnome.processes import LineWorker, run_bounded
    how, own = sys.argv[1:]
    command = ["sh", "-c", f"setsid sleep {own} & (setsid sh -c 'sleep {own}; true' &) ; sleep {own}; true"]
    if how == "run":
        run_bounded(command, b"", seconds=3600, memory_bytes=None, max_output=100)
    LineWorker(command, memory_bytes=None).ask({}, seconds=3600)
"""


@pytest.mark.parametrize("kind", ["run", "ask"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM], ids=lambda how: how.name)
def test_what_a_killed_parent_was_waiting_for_ends(kind: str, how: signal.Signals) -> None:
    own = f"4807.{os.getpid()}"
    parent = subprocess.Popen([*python(PARENT), kind, own], env=child_environment())
    try:
        wait_for(lambda: len(sleeping(own)) == 3, "the program and its children")
        parent.send_signal(how)
        parent.wait()
        wait_for(lambda: not sleeping(own), "their end")
    finally:
        parent.kill()
        parent.wait()
        for pid in sleeping(own):
            os.kill(pid, signal.SIGKILL)


def test_a_child_outlives_the_thread_that_started_it() -> None:
    """The system's own signal for a parent's death would come with the thread's."""
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(start(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
    thread.start()
    thread.join()
    (process,) = started
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        time.sleep(1.0)  # some looks of the guard
        process.stdin.write(b"there\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"there\n"
    finally:
        end(process)


def test_a_program_ends_with_its_guard() -> None:
    own = f"4808.{os.getpid()}"
    process = start(["sleep", own])
    wait_for(lambda: bool(sleeping(own)), "the program")
    process.kill()
    wait_for(lambda: not sleeping(own), "its end")
    end(process)


def test_a_guard_that_is_stopped_is_ended_with_what_it_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnome.processes._END_SECONDS", 0.5)
    own = f"4809.{os.getpid()}"
    process = start(["sh", "-c", f"setsid sleep {own} & sleep {own}; true"])
    wait_for(lambda: len(sleeping(own)) == 2, "the program and its child")
    process.send_signal(signal.SIGSTOP)
    end(process)
    wait_for(lambda: not sleeping(own), "their end")


def test_what_is_asked_first_may_say_goodbye() -> None:
    code = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: (print("goodbye", flush=True), exit(0)))
        print("here", flush=True)
        time.sleep(3600)
    """
    for seconds, expected in ((PATIENCE, b"goodbye\n"), (0.0, b"")):
        process = start(python(code), stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        said = process.stdout
        process.stdout = None
        end(process, terminate_seconds=seconds)
        with said:
            assert said.read() == expected
        assert process.returncode == (0 if seconds else -signal.SIGKILL)


@pytest.mark.parametrize("command", ["/nowhere/program", "no-such-program", "/tmp"])
def test_a_program_that_is_not_there_is_said_at_once(command: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{command}: no such program"):
        start([command])


def test_a_program_that_cannot_be_run_fails(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("#!/nowhere/interpreter\n")
    (tmp_path / "program").chmod(0o755)
    with pytest.raises(ProcessLost, match="ended with exit code 127"):
        run([str(tmp_path / "program")])


def test_a_guard_holds_no_file_open_and_leaves_signals_as_they_were() -> None:
    """What a program closes is closed, and it starts with the signals that a shell gives."""
    ours, theirs = os.pipe()
    process = start(["sh", "-c", f"exec {theirs}>&-; sleep 4810"], descriptors=[theirs])
    try:
        os.close(theirs)
        ready, _, _ = select.select([ours], [], [], PATIENCE)
        assert ready
        assert os.read(ours, 1) == b""
    finally:
        end(process)
        os.close(ours)
    shown = run(["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"]).decode()
    plain = subprocess.run(["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"], check=True, capture_output=True, text=True)
    assert shown == plain.stdout


def test_answers_are_json_lines() -> None:
    """The questions too: numbers, texts and lists come through as they are."""
    question = {"text": "zwei\nZeilen", "list": [1, 2.5, None], "n": -1}
    code = "import sys, json\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)"
    worker = LineWorker(python(code), memory_bytes=None)
    try:
        assert json.loads(json.dumps(worker.ask(question, seconds=PATIENCE)))["got"] == question
    finally:
        worker.close()
