"""Names the objects in a pickle without loading it."""

import pickletools
import re
from typing import BinaryIO

# What torch.save writes for tensors, dicts, devices, sizes, dtypes, bytes, and the Counter of MultiStepLR. It is less than
# torch's `weights_only` allows: `bytearray`, for example, would allocate any amount of memory.
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) (set|complex)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter"
    r"|torch(\.cuda)? [A-Z][A-Za-z0-9]*Storage|torch\.storage UntypedStorage"
    r"|torch (device|Size|float(16|32|64)|bfloat16|u?int(8|16|32|64)|bool|complex(64|128))|torch\.serialization _get_layout"
)
# These opcodes name a class or a function in another way than GLOBAL. torch.save uses them with another protocol only.
_BY_NAME, _OTHER_WAYS = "STACK_GLOBAL", ("INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER")


def unknown_objects(file: BinaryIO) -> list[str]:
    """Returns the classes and functions that a pickle names besides those of tensors and plain values, as `module.name`.

    It reads to the end of the pickle, and neither imports nor calls anything.

    Args:
        file: At the start of the pickle.

    Raises:
        ValueError: It is not a pickle, or it is cut short.
    """
    found, texts = dict[str, None](), ["", ""]
    for opcode, value, _ in pickletools.genops(file):
        if isinstance(value, str) and "UNICODE" in opcode.name:
            texts = [texts[1], value]
        if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(value)):
            found[str(value).replace(" ", ".")] = None
        elif opcode.name == _BY_NAME:
            found[".".join(texts)] = None
        elif opcode.name in _OTHER_WAYS:
            found[f"opcode {opcode.name}"] = None
    return [*found]
