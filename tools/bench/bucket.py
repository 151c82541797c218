"""A local folder as an S3 bucket of this machine that takes its time to answer: a stand-in for a distant one.

It knows just what reading takes: HEAD and GET with ranges, on names that exist, and lists of them. `python -m
tools.bench.bucket FOLDER SECONDS` serves the folder as the bucket `bucket`, and prints the port.
"""

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

PAGE = 1000  # names that one answer lists, as S3 has it


@contextlib.contextmanager
def serve(folder: Path, latency_seconds: float) -> Iterator[str]:
    """The URL of the bucket, served by another process and set up in this one's environment until the block ends."""
    command = [sys.executable, "-m", "tools.bench.bucket", str(folder), str(latency_seconds)]
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

    async def listing(request: web.Request) -> web.Response:
        await asyncio.sleep(latency_seconds)
        return web.Response(text=_listed(folder, request.query), content_type="application/xml")

    app = web.Application()
    app.router.add_get("/bucket", listing)
    app.router.add_get("/bucket/{name:.+}", answer)  # HEAD, too
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def _listed(folder: Path, query: Mapping[str, str]) -> str:
    """The answer to ListObjectsV2: a page of the files that begin with a prefix, without those in folders below."""
    place, _, start = query.get("prefix", "").rpartition("/")
    after, prefix = query.get("continuation-token", ""), f"{place}/" if place else ""
    there = os.scandir(folder / place) if (folder / place).is_dir() else ()
    names = sorted(entry.name for entry in there if entry.name.startswith(start) and entry.is_file() and entry.name > after)
    page = names[:PAGE]
    contents = []
    for name in page:
        status = (folder / prefix / name).stat()
        time = datetime.datetime.fromtimestamp(int(status.st_mtime), datetime.timezone.utc).isoformat()
        # As FileResponse has it.
        etag = f"&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;"
        contents.append(
            f"<Contents><Key>{escape(prefix + name)}</Key><Size>{status.st_size}</Size><ETag>{etag}</ETag>"
            f"<LastModified>{time}</LastModified></Contents>"
        )
    more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(names) > PAGE else ""
    truncated = str(bool(more)).lower()
    return f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{''.join(contents)}</ListBucketResult>"


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
