"""A server of vLLM on the loopback interface, for tests and benchmarks."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def data_url(image) -> str:
    """A picture as the content of a message."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


@contextlib.contextmanager
def serve(model: Path, log: Path, *arguments: str, hiprune: dict, start_seconds: float = 300):
    """A client of a server that is up. The server is stopped with its workers, whatever happens."""
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "vllm_command.py"), "serve", str(model), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(256 << 20), *arguments]
    command += ["--hf-overrides", json.dumps({"hiprune": hiprune})]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)
        started = time.monotonic()
        while True:
            with contextlib.suppress(Exception):
                client.models.list()
                break
            if server.poll() is not None or time.monotonic() - started > start_seconds:
                raise RuntimeError(f"server: did not start: {log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield client
        if server.poll() is not None:
            raise RuntimeError(f"server: died: {log.read_text()[-4000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # one that runs in the background takes no SIGINT
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
