"""Coverage-guided fuzzing of one property with atheris: `python -m tests.faults.fuzz PROPERTY FOLDER [libFuzzer options]`."""

import sys
from pathlib import Path

import atheris

MODULES = ["pipelines.shards", "pipelines.json_file", "pipelines.printable", "model.checkpoint", "model.pickled", "tarfile"]
MODULES += ["zipfile", "pickletools", "json.decoder"]


def main() -> None:
    name, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=MODULES, enable_loader_override=False):
        from tests.faults.properties import PROPERTIES
    from tests.faults.valid import examples

    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(examples(name)):
        (corpus / f"example-{number}").write_bytes(content)
    atheris.Setup([sys.argv[0], str(corpus), *options], PROPERTIES[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
