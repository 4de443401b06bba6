"""The real server in its own process, as `tablecast serve` starts it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

TABLECAST = Path(sys.executable).parent / "tablecast"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 15


class RunningServer:
    """`tablecast serve` on a free port. `settings` are environment variables, such as PORT."""

    def __init__(self, database_url: str, log: Path, *arguments: str, **settings: object) -> None:
        self.command = [str(TABLECAST), "serve", *arguments]
        given = {name: str(value) for name, value in settings.items()}
        self.env = os.environ | {"DATABASE_URL": database_url, "PORT": "0"} | given
        self.log_path = log
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def port(self) -> int:
        """The port it listens on; a restart keeps it."""
        return urlsplit(self.url).port or 80

    @property
    def log(self) -> str:
        """Everything the server has logged so far."""
        return self.log_path.read_text(errors="replace")

    def limit_files(self, files: int) -> None:
        """Limit how many files it may open, from the next start on."""
        self.command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *self.command]

    def start(self) -> None:
        """Start, and return once requests are answered. Raises RuntimeError with the log."""
        with self.log_path.open("a") as log:
            process = subprocess.Popen(
                self.command, env=self.env, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._process = process
        assert process.stdout is not None
        alarm = threading.Timer(START_TIMEOUT_S, process.kill)
        alarm.start()
        line = process.stdout.readline()
        alarm.cancel()
        if "http://" not in line:
            self.kill()
            raise RuntimeError(f"the server did not start: {line}{self.log}")
        self.url = line.split()[-1]
        self.env["PORT"] = str(self.port)

    def line(self) -> str:
        """The next line that it prints on standard output."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def stop(self, with_signal: signal.Signals = signal.SIGINT) -> int:
        """Ask the server to stop, wait until it has, and return its exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(with_signal)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def wait(self) -> int:
        """Wait until the server has stopped by itself, and return its exit code."""
        assert self._process is not None
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def restart(self) -> None:
        """Stop the server and start it again, on the same port."""
        self.stop()
        self.start()
