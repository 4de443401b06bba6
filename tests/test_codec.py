"""The protocol libraries are imported late, and by whoever comes first."""

import subprocess
import sys

SOURCE = """
import sys, threading, time
sys.setswitchinterval(1e-5)
from app.socketio import codec

assert not {"engineio", "socketio"} & sys.modules.keys()
failures = []

def use():
    try:
        codec.libraries()
        codec.decode("40"), codec.decode_message("0"), codec.decode_payload(b"4")
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=use) for _ in range(3)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    use()
    time.sleep(0.001)
sys.exit(", ".join(failures) or None)
"""


def test_clients_that_come_while_the_libraries_are_imported() -> None:
    """A server that has just started imports the libraries in a thread; the first clients need them
    in the same moment, and nobody fails.
    """
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", SOURCE], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
