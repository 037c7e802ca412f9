"""What the user sees and does at a terminal: the live line, Ctrl-C, SIGTERM, a full disk."""
import errno
import fcntl
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from helpers import ROOT, TINY_RUN, one_error, read_rows

import tinylora
import train
from support import flags, live
from support.errors import InputError
from support.files import append_jsonl


def start(*words, **kw):
    # a shell's background job ignores Ctrl-C, and its children do
    kw.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen([sys.executable, "-u", "train.py", *words], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


# ------------------------------------------------------------------------------------ the live line

def read_terminal(master):
    try:
        return master.read(4096)
    except OSError:  # on Linux: nobody writes there any more
        return b""


def run_on_a_terminal(*words, env):
    """All that is written to a terminal of 80 columns."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, env=env,
                               stdout=terminal, stderr=terminal)
    os.close(terminal)
    with open(master, "rb", buffering=0) as screen:
        text = b"".join(iter(lambda: read_terminal(screen), b"")).decode()
    assert process.wait() == 0
    return text


def shown(text):
    """The lines that are on the screen in the end: a carriage return writes over a line."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        visible = ""
        for part in line.split("\r"):
            visible = part + visible[len(part):]
        lines.append(visible.rstrip())
    return lines


def without_numbers(lines):
    return [re.sub(r" *[\d.]+", "#", line.rstrip()) for line in lines]  # times differ


def test_the_live_line(tmp_path):
    """On a terminal the line moves within one chunk of rows, shows the time left, fits 80 columns
    and leaves nothing behind. In a pipe: the same other lines, and no live line at all."""
    env = os.environ | {"TQDM_MININTERVAL": "0"}
    command = [sys.executable, "train.py", *TINY_RUN, "--out", str(tmp_path / "2")]
    piped = subprocess.Popen(command, text=True, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    text = run_on_a_terminal(*TINY_RUN, "--out", str(tmp_path / "1"), env=env)
    before_step_1 = text[:text.index("step   1")]
    for label, rows in (("evaluation, greedy", 8), ("evaluation at T = 1", 8), ("step 1", 16)):
        # each of the three is one chunk
        pattern = (rf"\r{label}: +(\d+)%\|[^|]*\| \d\d:\d\d<\d\d:\d\d, "
                   rf"(\d+)/{rows} rows, token (\d+) of 24")
        frames = re.findall(pattern, before_step_1)
        percent, done, tokens = ([int(x) for x in column] for column in zip(*frames))
        assert set(tokens) >= {4, 8, 12, 16} and max(done) <= rows
        assert percent == sorted(percent) and max(percent) > min(percent)
    assert max(len(frame) for frame in re.split("[\r\n]", text) if "%|" in frame) <= 80
    output, errors = piped.communicate()
    assert piped.returncode == 0 and errors == ""
    assert not re.search("[\r\x1b]|%\\|", output)
    lines = without_numbers(shown(text))
    assert lines == without_numbers(output.split("\n")) and len(lines) > 10


def test_a_pipe_gets_a_plain_line_now_and_then(tmp_path, capsys, monkeypatch):
    """In a pipe a long evaluation was silent for minutes and seemed to hang."""
    monkeypatch.setattr(live, "QUIET", 0)
    flags = ["--eval-only", "--eval-count", "2", "--max-new-tokens", "24"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"evaluation, greedy: \d/2 rows, token \d+ of 24", x) for x in lines)


# ---------------------------------------------------------------------------------------- signals

def test_a_stopped_run_keeps_what_it_has(tmp_path):
    """Ctrl-C, and a cluster's way of stopping a job: no traceback; adapter, log and state so far
    are there; the last line is the command that goes on."""
    runs = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / str(code)
        process = start("--steps", "1000", "--prompts", "4", "--group", "4", "--eval-count", "2",
                        "--eval-every", "0", "--reward", "format", "--out", str(out))
        runs.append((process, number, code, out))
    for process, number, code, out in runs:
        for line in process.stdout:
            if line.startswith("step   3"):
                break
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in errors
        assert "interrupted" in errors
        assert errors.strip().endswith(f"python train.py --resume {out}")
        assert len(read_rows(out / "log.jsonl")) >= 3 and list(out.glob("state-*.safetensors"))
        v, _ = tinylora.read(out / "adapter.safetensors")
        assert v.numel() == 13 and v.abs().max() > 0


# ------------------------------------------------------------------------------------------- disks

def test_a_full_disk_ends_in_one_line(tmp_path):
    """No file may grow past 6 kB, as on a full disk: the message names the file, rows of the log
    are whole, the adapter is kept."""
    out = tmp_path / "run"
    flags = ["--samples", "1", "--steps", "100", "--out", str(out)]  # so that log.jsonl fills first
    process = start(*TINY_RUN, *flags, preexec_fn=lambda: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.startswith("error: ") and "log.jsonl" in errors
    assert errors.strip().count("\n") == 0
    assert len(read_rows(out / "log.jsonl")) > 5 and not list(out.glob("*.tmp*"))
    assert tinylora.read(out / "adapter.safetensors")[0].numel() == 13


def read_only(path, *args, **kw):
    """A stand-in, as tests may run as root, who may write everywhere."""
    raise OSError(errno.EROFS, "Read-only file system", str(path))


FOLDERS = {  # --out, methods of Path that a read-only disk refuses, words of the message
    "below a file": ("file/run", (), "run: cannot be made a folder (Not a dir"),
    "a file": ("file", (), "file: cannot be made a folder (File exists"),
    "new": ("new", ("mkdir",), "new: cannot be made a folder (Read-only"),
    # removing what is not there fails too on such a disk, and must not hide the reason
    "there": ("there", ("write_text", "unlink"), "config.json: cannot be written ([Errno 30] Read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_written_ends_in_one_line(name, tmp_path, monkeypatch, capsys):
    """A traceback, or the failed clearing up reported in place of its cause."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "there").mkdir()
    folder, refused, words = FOLDERS[name]
    with monkeypatch.context() as patch:
        for method in refused:
            patch.setattr(Path, method, read_only)
        out = ["--out", str(tmp_path / folder)]
        assert train.main(["--eval-only", "--eval-count", "1", *out]) == 2
    one_error(capsys, words)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "there"]


def test_a_disk_that_becomes_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(InputError, match="log.jsonl: cannot be written .*Read-only.*--resume"):
        append_jsonl(tmp_path / "log.jsonl", [{}])


def test_out_is_checked_before_a_model_is_fetched(tmp_path, monkeypatch, capsys):
    """A model of gigabytes was downloaded before --out was found to be read-only."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(flags, "find_model", lambda name: pytest.fail("fetched"))
    assert train.main(["--model", "some/model", "--out", str(tmp_path / "a" / "b")]) == 2
    one_error(capsys, f"{tmp_path} cannot be written")
