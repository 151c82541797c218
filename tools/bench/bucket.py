"""A local folder as an S3 bucket with a latency, as a stand-in for a distant object store.

It supports what reading needs: HEAD, GET with ranges, and ListObjectsV2. `python -m tools.bench.bucket FOLDER SECONDS` serves
the folder as the bucket `bucket` on this machine, and prints the port.
"""

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock
from xml.sax.saxutils import escape

from aiohttp import web

PAGE = 1000  # names per answer, as in S3


@contextlib.contextmanager
def serve(folder: Path, latency_seconds: float) -> Iterator[str]:
    """Serves the bucket in another process, and yields its URL. The environment of this process names the server meanwhile."""
    command = [sys.executable, "-m", "tools.bench.bucket", str(folder), str(latency_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            with mock.patch.dict(os.environ, environment):
                yield "s3://bucket"
        finally:
            process.terminate()


async def _serve(folder: Path, latency_seconds: float) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(latency_seconds)
        path = folder / request.match_info.get("name", "")
        if path == folder:
            return web.Response(text=_listed(folder, request.query), content_type="application/xml")
        if not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)  # supports ranges, has an ETag, and keeps the bytes out of Python

    app = web.Application()
    app.router.add_get("/bucket", answer)
    app.router.add_get("/bucket/{name:.+}", answer)  # HEAD, too
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def _listed(folder: Path, query: Mapping[str, str]) -> str:
    """Answers ListObjectsV2 with a page of the files that begin with a prefix, without those in subfolders."""
    place, _, start = query.get("prefix", "").rpartition("/")
    after, prefix = query.get("continuation-token", ""), f"{place}/" if place else ""
    entries = os.scandir(folder / place) if (folder / place).is_dir() else ()
    names = sorted(entry.name for entry in entries if entry.name.startswith(start) and entry.is_file() and entry.name > after)
    page = names[:PAGE]
    is_truncated = len(names) > PAGE
    answer = f"<ListBucketResult><IsTruncated>{str(is_truncated).lower()}</IsTruncated>"
    for name in page:
        status = (folder / prefix / name).stat()
        time = datetime.datetime.fromtimestamp(int(status.st_mtime), datetime.timezone.utc).isoformat()
        etag = f"&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;"  # the same as FileResponse's
        answer += f"<Contents><Key>{escape(prefix + name)}</Key><Size>{status.st_size}</Size><ETag>{etag}</ETag>"
        answer += f"<LastModified>{time}</LastModified></Contents>"
    if is_truncated:
        answer += f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
    return f"{answer}</ListBucketResult>"


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
