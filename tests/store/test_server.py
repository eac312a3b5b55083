"""The suite of this folder again, against the real server of the PyPI package `milvus`.

The server listens on all interfaces, so it and its client, which is a pytest run of its own, live in a network
namespace without any way out, and in a process namespace that takes the server with it when it ends.
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.store.conftest import SERVER_FOLDER

FOLDER = Path(__file__).parent
SUITE = ("test_collection.py", "test_ingest.py", "test_raw_search.py")


def isolated():
    """The command that opens the namespaces, as root or as a user; skips where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the PyPI package `milvus` has the server for Linux on x86_64")
    if importlib.util.find_spec("milvus") is None:
        pytest.skip("the server is not installed: pip install milvus==2.3.5")
    namespaces = ["unshare", "--net", "--pid", "--fork", "--kill-child"]
    refusals = []
    for command in (namespaces, [*namespaces, "--map-root-user"]):
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=20)
        except OSError as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        if tried.returncode == 0:
            return command
        refusals.append(tried.stderr.strip())
    return pytest.skip(f"no network namespace may be made here: {'; '.join(refusals)}")


@pytest.mark.milvus_server
@pytest.mark.skipif(SERVER_FOLDER in os.environ, reason="this is that run")
def test_the_suite_on_a_real_server():
    command = [*isolated(), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(FOLDER / name) for name in SUITE]
    with tempfile.TemporaryDirectory(prefix="milvus-server-", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=480, check=False, env=os.environ | {SERVER_FOLDER: folder}
        )
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 90
    assert "skipped" not in done.stdout, done.stdout
