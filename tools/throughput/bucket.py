"""A local folder as an S3 bucket of this machine that takes its time to answer: a stand-in for a distant one.

It knows just what reading takes: HEAD and GET with ranges, on names that exist. `python -m tools.throughput.bucket FOLDER
SECONDS` serves the folder as the bucket `bucket`, and prints the port.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web


@contextlib.contextmanager
def serve(folder: Path, latency_seconds: float) -> Iterator[str]:
    """The URL of the bucket, served by another process and set up in this one's environment until the block ends."""
    command = [sys.executable, "-m", "tools.throughput.bucket", str(folder), str(latency_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield "s3://bucket"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _serve(folder: Path, latency_seconds: float) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency_seconds)
        path = folder / request.match_info["name"]
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)  # with ranges, an ETag, and without the bytes passing through Python

    app = web.Application()
    app.router.add_get("/bucket/{name:.+}", answer)  # HEAD, too
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
